"""DPM-Solver against exact ODE solutions, diffusers' multistep solver, and its own budget."""

from __future__ import annotations

import functools
import math
import warnings

import numpy as np
import pytest
import torch
from diffusers import DPMSolverMultistepScheduler

import diffusers_ext
from diffusers_ext.schedulers.dpm_solver import (
    ALGORITHMS,
    METHODS,
    SKIP_TYPES,
    SOLVER_TYPES,
    DPMSolverFastScheduler,
    Level,
    LogAlphaClock,
    anchor,
    fast_orders,
    fast_plan,
    multi_step,
    sample_dpm_solver_fast,
    single_stage,
)
from diffusers_ext.schedulers.dpm_solver_adaptive import (
    DPMSolverAdaptiveSampler,
    adaptive_sample,
    sample_dpm_solver_adaptive,
)
from diffusers_ext.zoo import analytic


SD = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
MIX = analytic.GaussianMixture(
    0.7 * torch.randn(4, 2, generator=torch.Generator().manual_seed(0)), variances=[0.2, 0.25, 0.3, 0.35]
)


def start(n=8):
    return torch.randn(n, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def vp(log_snr):
    return Level(*(v.item() for v in analytic.schedule("sd").levels(torch.tensor(log_snr, dtype=torch.float64))))


@functools.cache
def exact(low=-5.0, high=3.5):
    a, b = vp(low), vp(high)
    return MIX.ode(start(), (a.alpha, a.sigma), (b.alpha, b.sigma), steps=400)


def network(x, level, data):
    return (MIX.denoise if data else MIX.noise)(x, level.alpha, level.sigma)


def run_single(order, steps, data, solver_type):
    x, ends = start(), np.linspace(-5.0, 3.5, steps + 1)
    for low, high in zip(ends, ends[1:]):
        levels, outputs, y = [vp(v) for v in np.linspace(low, high, order + 1)], [], x
        for level in levels[:-1]:
            outputs.append(network(y, level, data))
            y = single_stage(anchor(x, outputs[0], levels[0], data), outputs, levels, data, solver_type)
        x = y
    return x


def run_multi(order, steps, data, solver_type, exact_third=False):
    x, levels, outputs = start(), [vp(v) for v in np.linspace(-5.0, 3.5, steps + 1)], []
    for i in range(steps):
        outputs = [network(x, levels[i], data), *outputs[: order - 1]]
        past = levels[i - len(outputs) + 1 : i + 1][::-1]
        x = multi_step(
            anchor(x, outputs[0], levels[i], data), outputs, past, levels[i + 1], order, data, solver_type, exact_third
        )
    return x


def slope(run, steps=(48, 72, 108, 162)):
    errors = [(run(n) - exact()).abs().mean().item() for n in steps]
    return -np.polyfit(np.log(steps), np.log(errors), 1)[0]


@pytest.mark.parametrize("data", [True, False])
@pytest.mark.parametrize("solver_type", SOLVER_TYPES)
@pytest.mark.parametrize("order", [1, 2, 3])
def test_order_of_single_steps(order, solver_type, data):
    measured = slope(lambda n: run_single(order, n, data, solver_type))
    assert measured == pytest.approx(order, abs=0.15)


@pytest.mark.parametrize("data", [True, False])
@pytest.mark.parametrize("solver_type", SOLVER_TYPES)
def test_order_of_multistep_2(solver_type, data):
    assert slope(lambda n: run_multi(2, n, data, solver_type)) == pytest.approx(2, abs=0.15)


@pytest.mark.parametrize("data", [True, False])
def test_published_third_order_multistep_is_second_order_and_the_exact_one_third(data):
    steps = (96, 144, 216, 324)
    assert slope(lambda n: run_multi(3, n, data, "dpmsolver"), steps) < 2.5
    assert slope(lambda n: run_multi(3, n, data, "dpmsolver", True), steps) == pytest.approx(3, abs=0.15)


def test_forms_and_types_agree_where_they_must():
    """First order is DDIM in both forms; Taylor and dpmsolver differ."""
    s, t = vp(-1.0), vp(0.5)
    x = start()
    eps, x0 = network(x, s, False), network(x, s, True)
    ddim = t.alpha * x0 + t.sigma * eps
    for data, m in ((True, x0), (False, eps)):
        stage = single_stage(anchor(x, m, s, data), [m], [s, t], data, "taylor")
        torch.testing.assert_close(stage, ddim, rtol=1e-13, atol=1e-13)


def test_the_noise_form_is_the_published_one():
    """alpha_t / alpha_s x - sigma_t (e^h - 1) eps (eq. 3.7), which `anchor` rewrites for float32."""
    s, t, x = vp(-1.0), vp(0.5), start()
    eps = network(x, s, False)
    published = t.alpha / s.alpha * x - t.sigma * np.expm1(1.5) * eps
    ours = single_stage(anchor(x, eps, s, False), [eps], [s, t], False, "dpmsolver")
    torch.testing.assert_close(ours, published, rtol=1e-13, atol=1e-13)


def drive(scheduler, model, x, **choice):
    scheduler.set_timesteps(**choice)
    for t in scheduler.timesteps:
        x = scheduler.step(model(x, t), t, x).prev_sample
    return x


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("ours, theirs", [("dpmsolver", "midpoint"), ("taylor", "heun")])
@pytest.mark.parametrize("order", [1, 2, 3])
def test_multistep_is_that_of_diffusers(algorithm, ours, theirs, order):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        upstream = DPMSolverMultistepScheduler(
            **SD, solver_order=order, algorithm_type=algorithm, solver_type=theirs, lower_order_final=False,
            final_sigmas_type="sigma_min", timestep_spacing="trailing",
        )  # fmt: skip
    upstream.set_timesteps(12)
    upstream.sigmas = upstream.sigmas.double()
    model = analytic.AnalyticDenoiser(MIX, analytic.schedule("sd"))
    expected = start()
    for t in upstream.timesteps:
        expected = upstream.step(model(expected, t), t, expected).prev_sample
    scheduler = DPMSolverFastScheduler(
        **SD, method="multistep", order=order, algorithm_type=algorithm, solver_type=ours, lower_order_final=False
    )
    actual = drive(scheduler, model, start(), timesteps=upstream.timesteps.tolist())
    assert (actual - expected).abs().max() < 1e-6


@pytest.mark.parametrize("calls", range(5, 26))
def test_budget_is_met_exactly(calls):
    for order in (1, 2, 3):
        assert sum(fast_orders(calls, order)) == calls
        for skip in SKIP_TYPES:
            for final in ("zero", "sigma_min"):
                model = analytic.AnalyticDenoiser(MIX, analytic.schedule("sd"))
                scheduler = DPMSolverFastScheduler(**SD, order=order, skip_type=skip, final_sigmas_type=final)
                if order == 3 and skip == "logSNR":
                    drive(scheduler, model, start(1), num_inference_steps=calls)
                    assert model.calls == calls
                scheduler.set_timesteps(calls)
                assert len(scheduler.timesteps) == calls


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("skip", SKIP_TYPES)
@pytest.mark.parametrize(
    "schedule, prediction", [("sd", "epsilon"), ("cosine", "sample"), ("flow", "flow_prediction")]
)
def test_scheduler_converges_to_the_ode(schedule, prediction, skip, method):
    betas = {"sd": SD, "cosine": {"beta_schedule": "squaredcos_cap_v2"}, "flow": {}}[schedule]
    errors = []
    for steps in (15, 60):
        s = DPMSolverFastScheduler(**betas, order=2, method=method, skip_type=skip, prediction_type=prediction)
        s.set_timesteps(steps)
        first, last = s._levels[0], s._levels[-1]
        x = drive(s, analytic.AnalyticDenoiser(MIX, s.noise_schedule, prediction), start(4), num_inference_steps=steps)
        errors.append((x - MIX.ode(start(4), first, last, steps=80)).abs().mean().item())
    assert errors[1] < errors[0] / 4 and errors[1] < 0.02


def test_grids():
    clock = LogAlphaClock(analytic.schedule("sd"))
    times = np.array([999.0, 500.25, 3.0, 0.0, -0.9])
    np.testing.assert_allclose(clock.time(clock.log_snr(times)), times, atol=1e-9)
    log_snr, orders = fast_plan(clock, 9, 3, "logSNR", 999, 0, False)
    assert orders == [3, 3, 2, 1] and len(log_snr) == 10
    outer = [log_snr[k] for k in (0, 3, 6, 8, 9)]
    assert np.ptp(np.diff(outer)) < 1e-12
    assert log_snr[1] - log_snr[0] == pytest.approx((log_snr[3] - log_snr[0]) / 3)
    uniform, _ = fast_plan(clock, 9, 3, "time_uniform", 999, 0, False)
    np.testing.assert_allclose(clock.time(uniform), np.linspace(999, 0, 10), atol=1e-6)


def test_last_call_returns_the_clean_prediction():
    model = analytic.AnalyticDenoiser(MIX, analytic.schedule("sd"), "sample")
    s = DPMSolverFastScheduler(**SD, prediction_type="sample", final_sigmas_type="zero")
    s.set_timesteps(9)
    x = start()
    for t in s.timesteps:
        output = model(x, t)
        x = s.step(output, t, x).prev_sample
    torch.testing.assert_close(x, output)
    assert float(s.timesteps[-1]) == pytest.approx(0, abs=1e-4)


def test_run_that_begins_inside_a_step_follows_the_ode():
    s = DPMSolverFastScheduler(**SD)
    s.set_timesteps(60)
    s.set_begin_index(31)
    x = begun = s.add_noise(MIX.sample(8, torch.Generator().manual_seed(5)), start(), s.timesteps[31])
    model = analytic.AnalyticDenoiser(MIX, s.noise_schedule)
    for t in s.timesteps[31:]:
        x = s.step(model(x, t), t, x).prev_sample
    assert (x - MIX.ode(begun, s._levels[31], s._levels[-1], steps=120)).abs().mean() < 0.02


# --- adaptive -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("order", [2, 3])
def test_tighter_tolerance_costs_calls_and_buys_accuracy(algorithm, order):
    schedule, calls, errors = analytic.schedule("sd"), [], []
    clock = LogAlphaClock(schedule)
    ends = [vp(float(clock.log_snr(t))) for t in (999.0, 0.0)]
    end = MIX.ode(start(), *((v.alpha, v.sigma) for v in ends), steps=400)
    for rtol in (0.1, 0.05, 0.01, 0.001):
        model = analytic.AnalyticDenoiser(MIX, schedule)
        sampler = DPMSolverAdaptiveSampler(schedule, order=order, algorithm_type=algorithm, rtol=rtol, atol=rtol / 10)
        result = sampler.sample(model, start())
        assert result.nfe == order * (result.accepted + result.rejected) == model.calls
        calls.append(result.nfe)
        errors.append((result.sample - end).abs().max().item())
    assert sorted(calls) == calls and calls[1] < calls[2] < calls[3]
    assert sorted(errors, reverse=True) == errors
    assert errors[-1] < 1e-3


@pytest.mark.parametrize("order", [2, 3])
def test_calls_fall_by_one_rejected_step_at_most_when_the_tolerance_is_a_little_tighter(order):
    """Calls come `order` at a time, and loose runs have few steps: the docs page says so."""
    schedule, ladders = analytic.schedule("sd"), []
    means = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))
    data = analytic.GaussianMixture(means, variances=0.05)
    for seed in (1, 2, 3):
        x = torch.randn(16, 8, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        samplers = [
            DPMSolverAdaptiveSampler(schedule, order=order, rtol=r, atol=r / 10) for r in (0.1, 0.07, 0.05, 0.03)
        ]
        ladders.append([s.sample(analytic.AnalyticDenoiser(data, schedule), x).nfe for s in samplers])
    steps = np.diff(ladders)
    assert (steps >= -order).all() and (steps % order == 0).all()
    assert (steps[:, 1:].sum(1) > 0).all()


def test_adaptive_sampler_on_flow_models():
    schedule = analytic.schedule("flow")
    result = DPMSolverAdaptiveSampler(schedule, "flow_prediction", rtol=1e-3, atol=1e-3).sample(
        analytic.AnalyticDenoiser(MIX, schedule, "flow_prediction"), start()
    )
    end = MIX.ode(start(), (0.001, 0.999), (0.999, 0.001), steps=400)
    assert (result.sample - end).abs().max() < 5e-3


def test_adaptive_sampler_gives_up_and_names_nan():
    schedule = analytic.schedule("sd")
    with pytest.raises(RuntimeError, match="after 30 model calls"):
        DPMSolverAdaptiveSampler(schedule, rtol=1e-9, atol=1e-9, max_calls=30).sample(
            analytic.AnalyticDenoiser(MIX, schedule), start()
        )
    with pytest.raises(RuntimeError, match="step 1 gave NaN"):
        DPMSolverAdaptiveSampler(schedule).sample(lambda x, t: x * math.nan, start())


def test_adaptive_sample_draws_pictures():
    from diffusers_ext import zoo

    captions = ["a large red circle on the left, plain blue background"]
    for name in ("shapes-unet", "shapes-dit"):
        result = adaptive_sample(
            zoo.load(name), captions, generator=torch.Generator().manual_seed(0), rtol=0.5, height=64, width=64
        )
        assert result.nfe == 3 * (result.accepted + result.rejected)
        assert result.images[0].size == (64, 64)
        assert np.asarray(result.images[0]).std() > 10
    with pytest.raises(ValueError, match="list of at least one"):
        adaptive_sample(zoo.load("shapes-unet"), "a string")


# --- native samplers ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("flow", [False, True])
@pytest.mark.parametrize("spacing", ["paper", "given"])
def test_native_sampler_spends_one_call_per_step(flow, spacing):
    calls = []
    denoise = analytic.comfy_denoiser(MIX)

    def model(x, sigma):
        calls.append(float(sigma[0]))
        return denoise(x, sigma)

    sigmas = torch.cat([torch.linspace(3.0, 0.1, 11), torch.zeros(1)])
    x = sample_dpm_solver_fast(model, 3 * start(), sigmas, spacing=spacing)
    assert len(calls) == 11 and calls[0] == pytest.approx(3.0) and calls[-1] == pytest.approx(0.1)
    end = MIX.ode(3 * start(), (1.0, 3.0), (1.0, 1e-6), steps=120)
    assert (x - end).abs().mean() < 0.05


def test_native_adaptive_sampler_reaches_the_end_of_the_ode():
    sigmas = torch.tensor([10.0, 1.0, 0.02, 0.0])
    x = sample_dpm_solver_adaptive(analytic.comfy_denoiser(MIX), 10 * start(), sigmas, rtol=1e-3, atol=1e-3)
    assert (x - MIX.ode(10 * start(), (1.0, 10.0), (1.0, 1e-6), steps=300)).abs().max() < 5e-3


# --- bad input ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options, message",
    [
        ({"order": 0}, "order is 0"),
        ({"order": 4}, "order is 4"),
        ({"t_end": 0.0}, "t_end is 0.0"),
        ({"t_end": -0.1}, "t_end is -0.1"),
        ({"algorithm_type": "x"}, "algorithm_type is 'x'"),
        ({"solver_type": "midpoint"}, "solver_type is 'midpoint'"),
        ({"skip_type": "x"}, "skip_type is 'x'"),
        ({"method": "adaptive"}, "method is 'adaptive'"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        DPMSolverFastScheduler(**options)


@pytest.mark.parametrize("order, steps", [(3, 2), (2, 1), (1, 0)])
def test_fewer_steps_than_the_order(order, steps):
    with pytest.raises(ValueError, match="at least"):
        DPMSolverFastScheduler(order=order).set_timesteps(steps)


@pytest.mark.parametrize("options", [{"order": 1}, {"rtol": 0.0}, {"atol": -1.0}, {"theta": 1.0}, {"t_end": 0.0}])
def test_bad_adaptive_options(options):
    with pytest.raises(ValueError, match="order is 1|atol|t_end"):
        DPMSolverAdaptiveSampler(analytic.schedule("sd"), **options)


def test_public_names():
    assert diffusers_ext.DPMSolverFastScheduler is DPMSolverFastScheduler
    assert diffusers_ext.adaptive_sample is adaptive_sample
