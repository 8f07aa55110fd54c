"""Momentum samplers against Adams-Bashforth, stability theory, diffusers' solvers and exact ODE solutions."""

from __future__ import annotations

import functools
import math

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, UniPCMultistepScheduler

from diffusers_ext.prediction import PREDICTIONS
from diffusers_ext.schedulers.momentum_samplers import (
    MOMENTA,
    DPMSolverMultistepMomentumScheduler,
    GHVBScheduler,
    Momentum,
    PLMSMomentumScheduler,
    UniPCMultistepMomentumScheduler,
    follow,
    mixer,
    sample_dpmpp_2m_momentum,
    sample_momentum,
    split_order,
)
from diffusers_ext.zoo import analytic


SD = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
MIX = analytic.GaussianMixture(
    0.7 * torch.randn(4, 8, generator=torch.Generator().manual_seed(0)), variances=torch.tensor([0.2, 0.25, 0.3, 0.35])
)
CLASSES = (
    GHVBScheduler,
    PLMSMomentumScheduler,
    DPMSolverMultistepMomentumScheduler,
    UniPCMultistepMomentumScheduler,
)


def start(n=4, seed=1):
    return torch.randn(n, 8, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def drive(scheduler, model, x, **choice):
    scheduler.set_timesteps(**choice)
    for t in scheduler.timesteps:
        x = scheduler.step(model(x, t), t, x).prev_sample
    return x


def sd_model(prediction="epsilon"):
    return analytic.AnalyticDenoiser(MIX, analytic.schedule("sd"), prediction)


def adams_bashforth(order: int) -> list[float]:
    """Weights by integrating the interpolation polynomial over the next step, newest first."""
    weights = []
    for j in range(order):
        basis = np.poly1d([1.0])
        for k in range(order):
            if k != j:
                basis *= np.poly1d([1.0, k]) / (k - j)
        primitive = basis.integ()
        weights.append(primitive(1.0) - primitive(0.0))
    return weights


@pytest.mark.parametrize("k", range(1, 6))
def test_mixer(k):
    assert mixer(k, 1.0) == pytest.approx(adams_bashforth(k), abs=1e-13)
    for beta in np.random.default_rng(0).uniform(0.05, 1.0, 10):
        assert sum(mixer(k, beta)) == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize("order, expected", [(3.5, (4, 0.5)), (0.7, (1, 0.7)), (3, (3, 1.0)), (1, (1, 1.0))])
def test_split_order(order, expected):
    assert split_order(order) == pytest.approx(expected)


@pytest.mark.parametrize("order", range(1, 6))
@pytest.mark.parametrize("kind", MOMENTA)
def test_integer_orders_are_adams_bashforth(kind, order):
    momentum, slopes = Momentum(kind, order), []
    for n in range(9):
        slopes.insert(0, start(seed=n))
        expected = sum(w * e for w, e in zip(adams_bashforth(min(order, n + 1)), slopes))
        assert (momentum(slopes[0]) - expected).abs().max() < 1e-12


def test_fractional_orders_written_out():
    """GHVB(1.5): velocities mixed; HB: mixed slopes damped; Nesterov: the damped ones mixed once more."""
    e0, e1, b = start(seed=1), start(seed=2), 0.5
    directions = {}
    for kind in MOMENTA:
        momentum = Momentum(kind, 1.5)
        assert torch.equal(momentum(e0), e0)
        directions[kind] = momentum(e1)
    v = (1 - b) * e0 + b * e1
    torch.testing.assert_close(directions["ghvb"], ((2 + b) * v - (2 - b) * e0) / (2 * b))
    p = 1.5 * e1 - 0.5 * e0
    hb = (1 - b) * e0 + b * p
    torch.testing.assert_close(directions["hb"], hb)
    torch.testing.assert_close(directions["nesterov"], (1 - b) * hb + b * p)


# --- stability ----------------------------------------------------------------------------------------------------


def largest_root(order: float, z: float) -> float:
    """Largest growth per step of GHVB on u' = lambda u with lambda h = z, from its one-step matrix."""
    k, beta = split_order(order)
    weights = mixer(k, beta)
    # state: u_n, v_{n-1}, ..., v_{n-k}
    v_now = np.zeros(k + 1)
    v_now[0], v_now[1] = beta, 1 - beta
    matrix = np.zeros((k + 1, k + 1))
    matrix[0, 0] = 1.0
    matrix[0] += z * weights[0] * v_now
    for j in range(1, k):
        matrix[0, j] += z * weights[j]
    matrix[1] = v_now
    for j in range(2, k + 1):
        matrix[j, j - 1] = 1.0
    return np.abs(np.linalg.eigvals(matrix)).max()


@pytest.mark.parametrize(
    "order, limit",
    [
        (1, -2.0), (1.3, -1.70), (1.5, -1.50), (1.7, -1.30), (2, -1.00), (2.3, -0.87),
        (2.5, -0.78), (2.7, -0.69), (3, -0.545), (3.5, -0.43), (3.7, -0.38), (4, -0.30),
    ],
)  # fmt: skip
def test_limits_of_stability(order, limit):
    grid = np.arange(-0.005, -2.2, -0.005)
    unstable = next(z for z in grid if largest_root(order, z) > 1 + 1e-9)
    assert unstable + 0.005 == pytest.approx(limit, abs=0.01)


def grow(order: float, h: float, kind="ghvb") -> float:
    momentum, x = Momentum(kind, order), torch.tensor(1.0, dtype=torch.float64)
    for _ in range(30):
        x = x + h * momentum(x)
    return abs(x.item())


def test_stable_steps():
    assert grow(1.3, -1.4) < 0.1 and grow(1.5, -1.4) < 0.1
    assert grow(1.7, -1.4) > 10 and grow(2, -1.4) > 1e4
    assert grow(1.7, -1.2) < 0.1 and grow(2, -1.2) > 100


# --- convergence --------------------------------------------------------------------------------------------------


@functools.cache
def end_of_ode():
    return MIX.ode(10 * start(), (1.0, 10.0), (1.0, 0.5), steps=400)


def measured_order(kind, order, steps=(100, 160, 250, 400)):
    errors = []
    for n in steps:
        grid = torch.linspace(10.0, 0.5, n + 1, dtype=torch.float64)
        x = sample_momentum(analytic.comfy_denoiser(MIX), 10 * start(), grid, momentum=kind, order=order)
        errors.append((x - end_of_ode()).abs().mean().item())
    return -np.polyfit(np.log(steps), np.log(errors), 1)[0]


@pytest.mark.parametrize("order, least", [(1, 0.9), (1.5, 1.6), (2, 1.6), (2.5, 2.5), (3, 2.5), (3.5, 3.3), (4, 3.3)])
def test_ghvb_has_the_order_of_its_mixer(order, least):
    assert least <= measured_order("ghvb", order) <= math.ceil(order) + 0.6


@pytest.mark.parametrize("kind", ["hb", "nesterov"])
@pytest.mark.parametrize("order", [0.7, 1.5, 2.5, 3.5])
def test_heavy_ball_and_nesterov_stay_first_order(kind, order):
    assert measured_order(kind, order) == pytest.approx(1.0, abs=0.15)


# --- against diffusers --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [GHVBScheduler, PLMSMomentumScheduler])
@pytest.mark.parametrize("to_one", [True, False])
def test_order_one_is_ddim(make, to_one):
    ddim = DDIMScheduler(**SD, clip_sample=False, set_alpha_to_one=to_one, timestep_spacing="trailing")
    ddim.alphas_cumprod, ddim.final_alpha_cumprod = ddim.alphas_cumprod.double(), ddim.final_alpha_cumprod.double()
    ours = make(**SD, order=1, final_sigmas_type="zero" if to_one else "sigma_min")
    expected = drive(ddim, sd_model(), start(), num_inference_steps=20)
    assert (drive(ours, sd_model(), start(), num_inference_steps=20) - expected).abs().max() < 1e-12


def upstream_run(upstream, steps):
    upstream.set_timesteps(steps)
    upstream.sigmas = upstream.sigmas.double()
    x = start()
    for t in upstream.timesteps:
        x = upstream.step(sd_model()(x, t), t, x).prev_sample
    return x


@pytest.mark.parametrize("steps", [8, 20])
@pytest.mark.parametrize("final", ["zero", "sigma_min"])
def test_beta_one_is_the_multistep_solver_of_diffusers(steps, final):
    options = {"timestep_spacing": "trailing", "final_sigmas_type": final}
    expected = upstream_run(DPMSolverMultistepScheduler(**SD, **options), steps)
    ours = DPMSolverMultistepMomentumScheduler(**SD, **options, beta=1.0)
    # it steps in float32
    assert (drive(ours, sd_model(), start(), num_inference_steps=steps) - expected).abs().max() < 2e-6


@pytest.mark.parametrize("solver_order", [1, 2, 3])
@pytest.mark.parametrize("variant, final", [("bh1", "sigma_min"), ("bh2", "sigma_min"), ("bh2", "zero")])
def test_beta_one_is_the_unipc_of_diffusers(solver_order, variant, final):
    options = {"timestep_spacing": "trailing", "final_sigmas_type": final, "solver_order": solver_order}
    expected = upstream_run(UniPCMultistepScheduler(**SD, **options, solver_type=variant), 12)
    ours = UniPCMultistepMomentumScheduler(**SD, **options, beta=1.0, variant=variant)
    both = UniPCMultistepMomentumScheduler(**SD, **options, beta=1.0, variant=variant, predictor_momentum=True)
    for scheduler in (ours, both):
        assert (drive(scheduler, sd_model(), start(), num_inference_steps=12) - expected).abs().max() < 2e-6


def test_heavy_ball_on_dpm_solver_written_out():
    s = DPMSolverMultistepMomentumScheduler(
        **SD, beta=0.6, lower_order_final=False, final_sigmas_type="sigma_min", prediction_type="sample"
    )
    actual = drive(s, analytic.AnalyticDenoiser(MIX, s.noise_schedule, "sample"), start(), num_inference_steps=9)
    x, older, v = start(), None, None
    for i in range(9):
        (a, b), (a_to, b_to) = s._levels[i], s._levels[i + 1]
        m, h = MIX.denoise(x, a, b), math.log(a_to / b_to) - math.log(a / b)
        d = m
        if older is not None:
            before = s._levels[i - 1]
            d1 = (m - older) * h / (math.log(a / b) - math.log(before[0] / before[1]))
            d = m + 0.5 * d1
            v = d if v is None else 0.4 * v + 0.6 * d
            d = v
        x, older = b_to / b * x - a_to * math.expm1(-h) * d, m
    assert (actual - x).abs().max() < 1e-10


def test_momentum_acts_in_the_corrector_of_unipc():
    model = sd_model()
    runs = {}
    for name, options in {
        "none": {"beta": 1.0}, "corrector": {"beta": 0.5}, "both": {"beta": 0.5, "predictor_momentum": True}
    }.items():  # fmt: skip
        runs[name] = drive(UniPCMultistepMomentumScheduler(**SD, **options), model, start(), num_inference_steps=10)
    assert (runs["none"] - runs["corrector"]).abs().max() > 1e-3
    assert (runs["both"] - runs["corrector"]).abs().max() > 1e-3


@pytest.mark.parametrize("cls", CLASSES)
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_converges_to_the_ode(cls, prediction):
    """On levels evenly spaced in log-SNR; where they are not, the published momentum of UniPC is far off."""
    flow = prediction == "flow_prediction"
    s = cls(**SD, prediction_type=prediction, final_sigmas_type="sigma_min")
    errors = []
    for steps in (25, 100):
        levels = torch.logspace(1.1, -1.3, steps, dtype=torch.float64)
        s.set_timesteps(sigmas=(levels / (1 + levels) if flow else levels).tolist())
        model = analytic.AnalyticDenoiser(MIX, s.noise_schedule, prediction)
        x = start()
        for t in s.timesteps[:-1]:
            x = s.step(model(x, t), t, x).prev_sample
        end = MIX.ode(start(), s._levels[0], s._levels[-2], steps=100)
        errors.append((x - end).abs().mean().item())
    assert errors[1] < errors[0] / 2.5 and errors[1] < 0.06


@pytest.mark.parametrize("cls", CLASSES)
def test_nothing_is_left_for_the_next_run(cls):
    s, model = cls(**SD), sd_model()
    first = drive(s, model, start(), num_inference_steps=7)
    assert torch.equal(first, drive(s, model, start(), num_inference_steps=7))


@pytest.mark.parametrize("cls", CLASSES)
def test_repeated_timesteps_stay_finite(cls):
    x = drive(cls(**SD), sd_model(), start(), timesteps=[900, 600, 600, 300, 300, 10])
    assert x.isfinite().all()


@pytest.mark.parametrize("cls", CLASSES)
def test_save_and_load(cls, tmp_path):
    options = {"order": 2.5} if "order" in cls().config else {"beta": 0.6}
    s = cls(**SD, **options)
    s.save_pretrained(tmp_path)
    again = cls.from_pretrained(tmp_path)
    expected = drive(s, sd_model(), start(), num_inference_steps=6)
    assert torch.equal(drive(again, sd_model(), start(), num_inference_steps=6), expected)


def test_follow_is_the_euler_step_of_its_direction():
    x0, slope, d = start(seed=3), start(seed=4), start(seed=5)
    torch.testing.assert_close(follow(x0, slope, d, 7.0, 3.0), x0 + 7.0 * slope + (3.0 - 7.0) * d)


def test_denoise_last():
    model = sd_model("sample")
    s = GHVBScheduler(**SD, order=3.5, denoise_last=True, prediction_type="sample")
    s.set_timesteps(8)
    x = start()
    for t in s.timesteps:
        output = model(x, t)
        x = s.step(output, t, x).prev_sample
    torch.testing.assert_close(x, output)
    sigmas = torch.tensor([5.0, 2.0, 1.0, 0.3, 0.0])
    native = [
        sample_momentum(analytic.comfy_denoiser(MIX), 5 * start(), sigmas, denoise_last=v) for v in (True, False)
    ]
    assert not torch.equal(*native)


# --- bad input ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", [0, -1.0, 5.1, math.nan])
def test_order_out_of_range(order):
    for make in (GHVBScheduler, PLMSMomentumScheduler):
        with pytest.raises(ValueError, match="order is"):
            make(order=order)
    with pytest.raises(ValueError, match="order is"):
        sample_momentum(analytic.comfy_denoiser(MIX), start(), torch.tensor([1.0, 0.0]), order=order)


@pytest.mark.parametrize("beta", [0.0, -0.5, 1.01, math.nan])
def test_beta_out_of_range(beta):
    for make in (DPMSolverMultistepMomentumScheduler, UniPCMultistepMomentumScheduler):
        with pytest.raises(ValueError, match="beta is"):
            make(beta=beta)
    with pytest.raises(ValueError, match="beta is"):
        sample_dpmpp_2m_momentum(analytic.comfy_denoiser(MIX), start(), torch.tensor([1.0, 0.0]), beta=beta)


def test_unknown_momentum():
    with pytest.raises(ValueError, match="momentum_type is 'ghvb'"):
        PLMSMomentumScheduler(momentum_type="ghvb")
    with pytest.raises(ValueError, match="momentum is 'x'"):
        Momentum("x", 2)
