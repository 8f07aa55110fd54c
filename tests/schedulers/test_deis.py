"""DEIS against exact ODE solutions, identities, diffusers' own DEIS and an independent quadrature."""

from __future__ import annotations

import functools
import math

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DEISMultistepScheduler

from diffusers_ext.prediction import PREDICTIONS
from diffusers_ext.schedulers.deis import (
    RK_TABLEAUS,
    Clock,
    DEISFullScheduler,
    Weights,
    advance,
    riemann_weights,
    rk_next,
    sample_deis,
    stage_plan,
    time_grid,
    without_repeats,
)
from diffusers_ext.zoo import analytic


AB = ("t_ab", "rho_ab", "logrho_ab", "ipndm")
SD = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}


class LinearVP:
    """Continuous VP with linear beta, in closed form."""

    family, b0, b1 = "linear", 0.1, 20.0

    def rho(self, t):
        t = np.asarray(t, dtype=np.float64)
        return np.sqrt(np.expm1(0.5 * t**2 * (self.b1 - self.b0) + self.b0 * t))

    def time(self, rho):
        c, a = np.log1p(np.asarray(rho, dtype=np.float64) ** 2), (self.b1 - self.b0) / 2
        return (-self.b0 + np.sqrt(self.b0**2 + 4 * a * c)) / (2 * a)


def mixture(n=8, k=4):
    g = torch.Generator().manual_seed(0)
    return analytic.GaussianMixture(0.7 * torch.randn(k, n, generator=g), variances=0.25)


MIX = mixture()


@functools.cache
def exact(first, last):
    """Where the ODE carries `start()` between two levels `(alpha, sigma)`."""
    return MIX.ode(start(), first, last, steps=400)


def start(n=4, seed=1, dims=8):
    return torch.randn(n, dims, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def level(rho):
    return 1 / math.sqrt(1 + rho**2), rho / math.sqrt(1 + rho**2)


def evaluate(v, rho):
    """eps and the clean sample at v."""
    alpha, sigma = level(rho)
    return MIX.noise(alpha * v, alpha, sigma), MIX.denoise(alpha * v, alpha, sigma)


def run_ab(method, degree, rhos, clock, x, quadrature="gauss"):
    weights, history, v = Weights(method, rhos, clock, quadrature), [], x / level(rhos[0])[0]
    for i in range(len(rhos) - 1):
        eps, x0 = evaluate(v, rhos[i])
        history = [eps, *history[:degree]]
        v = advance(x0, rhos[i], history, weights(i, len(history) - 1))
    return v * level(rhos[-1])[0]


def run_rk(name, rhos, x):
    calls, steps = stage_plan(rhos, RK_TABLEAUS[name][0])
    v = x / level(rhos[0])[0]
    for i, (first, end) in enumerate(steps):
        eps, x0 = evaluate(v, calls[i])
        if i == first:
            begun, slopes = (x0, calls[i]), []
        slopes.append(eps)
        v = rk_next(begun, slopes, calls[end] - calls[first], RK_TABLEAUS[name], i + 1 == end)
    return v * level(rhos[-1])[0]


@pytest.fixture(scope="module")
def problem():
    clock, x = LinearVP(), start()
    ends = [float(clock.rho(t)) for t in (1.0, 0.02)]
    return clock, x, exact(level(ends[0]), level(ends[1]))


def slope(steps, errors):
    return -np.polyfit(np.log(steps), np.log(errors), 1)[0]


@pytest.mark.parametrize("name, order", [("1euler", 1), ("2heun", 2), ("3kutta", 3), ("4rk", 4)])
def test_runge_kutta_order(problem, name, order):
    clock, x, end = problem
    steps, errors = (20, 40, 80, 160), []
    for n in steps:
        rhos = clock.rho(time_grid(clock, n, "log", 1, 1.0, 0.02)).tolist()
        errors.append((run_rk(name, rhos, x) - end).abs().mean().item())
    assert slope(steps, errors) == pytest.approx(order, abs=0.15)


@pytest.mark.parametrize("name", ["3ral", "3heun", "3vdh", "3ssprk"])
def test_third_order_conditions(name):
    """sum b = 1, sum b c = 1/2, sum b c^2 = 1/3, sum b a c = 1/6, and every row of a sums to its c."""
    c, rows, b = RK_TABLEAUS[name]
    inner = [sum(a * c[k] for k, a in enumerate(row)) for row in rows]
    sums = [sum(b), sum(w * u for w, u in zip(b, c)), sum(w * u**2 for w, u in zip(b, c))]
    sums.append(sum(w * u for w, u in zip(b, inner)))
    assert sums == pytest.approx([1, 1 / 2, 1 / 3, 1 / 6], abs=1e-14)
    assert [sum(row) for row in rows] == pytest.approx(list(c), abs=1e-14)


@pytest.mark.parametrize("method", ["t_ab", "rho_ab", "logrho_ab"])
@pytest.mark.parametrize("degree", [1, 2])
def test_adams_bashforth_order(problem, method, degree):
    clock, x, end = problem
    steps, errors = (60, 120, 240, 480), []
    for n in steps:
        rhos = clock.rho(time_grid(clock, n, "t", 2, 1.0, 0.02)).tolist()
        errors.append((run_ab(method, degree, rhos, clock, x) - end).abs().mean().item())
    assert slope(steps, errors) == pytest.approx(degree + 1, abs=0.15)


def test_t_ab_beats_ddim_at_ten_steps(problem):
    clock, x, end = problem
    rhos = clock.rho(time_grid(clock, 10, "t", 2, 1.0, 0.02)).tolist()
    error = {q: (run_ab("t_ab", q, rhos, clock, x) - end).abs().mean().item() for q in (0, 3)}
    assert error[3] < error[0] / 3


@pytest.mark.parametrize("method", AB)
@pytest.mark.parametrize("clock", [LinearVP(), Clock(analytic.schedule("sd")), Clock(analytic.schedule("flow"))])
def test_weights_sum_to_the_ddim_coefficient(method, clock):
    ends = (999, 0) if clock.family == "vp" else (0.99, 0.01)
    rhos = clock.rho(time_grid(clock, 12, "t", 2, *ends)).tolist()
    weights = Weights(method, rhos, clock)
    for i in range(12):
        for degree in range(min(i, 3 if method == "ipndm" else 4) + 1):
            assert sum(weights(i, degree)) == pytest.approx(rhos[i + 1] - rhos[i], rel=1e-11, abs=1e-10)


@pytest.mark.parametrize("degree", range(5))
def test_rho_ab_is_exact_for_polynomials(degree):
    """v' = polynomial of the method's degree: the error stays at what the start-up steps left."""
    coefficients = torch.randn(degree + 1, generator=torch.Generator().manual_seed(2)).double()
    f, primitive = (
        lambda r: sum(c * r**k for k, c in enumerate(coefficients)),
        lambda r: sum(c * r ** (k + 1) / (k + 1) for k, c in enumerate(coefficients)),
    )
    rhos = np.geomspace(5, 0.1, 12).tolist()
    weights, v = Weights("rho_ab", rhos, Clock(analytic.schedule("edm"))), torch.tensor(0.0, dtype=torch.float64)
    for i in range(degree, 11):
        values = [f(rhos[i - j]) for j in range(degree + 1)]
        v = advance(v - rhos[i] * values[0], rhos[i], values, weights(i, degree))
    assert abs(v - (primitive(rhos[-1]) - primitive(rhos[degree]))) < 1e-10


def test_riemann_sum_is_the_authors_and_close_to_the_integral():
    clock = Clock(analytic.schedule("sd"))
    nodes, target = clock.rho([640.0, 800.0, 999.0]).tolist(), float(clock.rho(490.0))
    for variable, method in (("t", "t_ab"), ("rho", "rho_ab")):
        riemann = riemann_weights(nodes, target, clock, variable)
        gauss = Weights(method, [*nodes[::-1], target], clock)(2, 2)
        assert np.abs(np.subtract(riemann, gauss)).max() < 2e-4 * np.abs(gauss).max()
        assert riemann != gauss
    # written out once, term by term, for tAB
    t = 640 + (490 - 640) * np.arange(10_000) / 10_000
    bar = np.interp(t, np.arange(1000), clock.bar)
    slope = (np.diff(clock.bar)[t.astype(int)]) / bar
    integrand = -0.5 * slope / np.sqrt(1 - bar) / np.sqrt(bar)
    basis = (t - 800) * (t - 999) / ((640 - 800) * (640 - 999))
    expected = (integrand * basis).sum() * (490 - 640) / 10_000
    assert riemann_weights(nodes, target, clock, "t")[0] == pytest.approx(expected, rel=1e-9)


def test_repeated_timesteps_are_filled_with_the_smallest_free_ones():
    times = np.array([10.0, 7.2, 4.4, 2.1, 1.4, 1.2, 0.0])
    assert without_repeats(times, 10).tolist() == [10, 7, 4, 3, 2, 1, 0]
    assert without_repeats(times[:4], 10).tolist() == times[:4].tolist()


# --- the scheduler ----------------------------------------------------------------------------------------------


def drive(scheduler, model, x, **choice):
    scheduler.set_timesteps(**choice)
    for t in scheduler.timesteps:
        x = scheduler.step(model(x, t), t, x).prev_sample
    return x


@pytest.mark.parametrize("options", [*({"method": m, "ab_order": 0} for m in AB), {"method": "rho_rk"}], ids=str)
@pytest.mark.parametrize("final", ["zero", "sigma_min"])
def test_degree_zero_is_ddim(options, final):
    ddim = DDIMScheduler(**SD, clip_sample=False, set_alpha_to_one=final == "zero", timestep_spacing="trailing")
    model = analytic.AnalyticDenoiser(MIX, analytic.schedule("sd"))
    ours = DEISFullScheduler(**SD, **options, rk_method="1euler", final_sigmas_type=final)
    ddim.set_timesteps(10)
    x = start()
    expected = x
    for t in ddim.timesteps:
        expected = ddim.step(model(expected, t), t, expected).prev_sample
    actual = drive(ours, model, x, timesteps=ddim.timesteps.tolist())
    assert (actual - expected).abs().max() < 1e-6


@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_log_rho_is_the_deis_of_diffusers(order, prediction):
    theirs = DEISMultistepScheduler(
        **SD, solver_order=order, lower_order_final=False, timestep_spacing="trailing", prediction_type=prediction
    )
    model = analytic.AnalyticDenoiser(MIX, analytic.schedule("sd"), prediction)
    theirs.set_timesteps(10)
    theirs.sigmas = theirs.sigmas.double()  # in float32 its weights are good to 1e-4 only
    expected = start()
    for t in theirs.timesteps:
        expected = theirs.step(model(expected, t), t, expected).prev_sample
    ours = DEISFullScheduler(**SD, method="logrho_ab", ab_order=order - 1, prediction_type=prediction)
    actual = drive(ours, model, start(), timesteps=theirs.timesteps.tolist())
    assert (actual - expected).abs().max() < 1e-6


@pytest.mark.parametrize("method", AB)
@pytest.mark.parametrize("schedule", ["sd", "cosine", "flow"])
def test_converges_to_the_ode_on_every_schedule(method, schedule):
    """The class on its own grid. Order above 1, but for iPNDM, whose weights assume equal steps in rho."""
    prediction = "flow_prediction" if schedule == "flow" else "epsilon"
    betas = {"sd": SD, "cosine": {"beta_schedule": "squaredcos_cap_v2"}, "flow": {}}[schedule]
    errors = []
    for steps in (40, 160):
        s = DEISFullScheduler(**betas, method=method, ab_order=2, prediction_type=prediction)
        s.set_timesteps(steps)
        model = analytic.AnalyticDenoiser(MIX, s.noise_schedule, prediction)
        levels = [s._levels[k] for k in (0, -1)]
        errors.append((drive(s, model, start(), num_inference_steps=steps) - exact(*levels)).abs().mean().item())
    assert errors[1] < errors[0] / (3 if method == "ipndm" else 4)


@pytest.mark.parametrize("name", RK_TABLEAUS)
@pytest.mark.parametrize("final", ["zero", "sigma_min"])
def test_runge_kutta_makes_stages_times_steps_calls(name, final):
    model = analytic.AnalyticDenoiser(MIX, analytic.schedule("sd"))
    stages = len(RK_TABLEAUS[name][0])
    ours = DEISFullScheduler(**SD, method="rho_rk", rk_method=name, final_sigmas_type=final)
    x = drive(ours, model, start(), num_inference_steps=12)
    assert model.calls == (12 * stages if final == "sigma_min" else 11 * stages + 1)
    assert ours.order == stages
    levels = [ours._levels[k] for k in (0, -1)]
    assert (x - exact(*levels)).abs().mean() < (0.08 if stages == 1 else 0.02)


def test_runge_kutta_class_follows_the_function():
    ours = DEISFullScheduler(**SD, method="rho_rk", rk_method="3ssprk")
    model = analytic.AnalyticDenoiser(MIX, analytic.schedule("sd"))
    ours.set_timesteps(6)
    rhos = [*ours._weights.rhos[::3]]
    times = []
    x = start()
    for t in ours.timesteps:
        times.append(float(t))
        alpha, sigma = ours._levels[ours.step_index or 0]
        x = ours.step(MIX.noise(x, alpha, sigma), t, x).prev_sample
    assert (x - run_rk("3ssprk", rhos, start())).abs().max() < 1e-10
    assert times == pytest.approx(ours._clock.time(ours._weights.rhos[:-1]).tolist(), abs=1e-3)
    assert model.calls == 0


def test_runge_kutta_run_that_begins_inside_a_step_follows_the_ode():
    ours = DEISFullScheduler(**SD, method="rho_rk", rk_method="4rk")
    ours.set_timesteps(40)
    ours.set_begin_index(81)
    x0 = MIX.sample(8, torch.Generator().manual_seed(5))
    x = begun = ours.add_noise(x0, start(8), ours.timesteps[81])
    model = analytic.AnalyticDenoiser(MIX, ours.noise_schedule)
    for t in ours.timesteps[81:]:
        x = ours.step(model(x, t), t, x).prev_sample
    end = MIX.ode(begun, ours._levels[81], ours._levels[-1], steps=400)
    assert (x - end).abs().mean() < 0.03


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_prediction_types_agree(prediction):
    schedule = "flow" if prediction == "flow_prediction" else "sd"
    s = DEISFullScheduler(**SD, prediction_type=prediction)
    s.set_timesteps(10)
    levels = [s._levels[k] for k in (0, -1)]
    x = drive(s, analytic.AnalyticDenoiser(MIX, s.noise_schedule, prediction), start(), num_inference_steps=10)
    assert s.noise_schedule.family == ("flow" if schedule == "flow" else "vp")
    assert (x - exact(*levels)).abs().mean() < 0.08


@pytest.mark.parametrize(
    "options, message",
    [
        ({"ab_order": 5}, "ab_order is 5"),
        ({"ab_order": -1}, "ab_order is -1"),
        ({"method": "ipndm", "ab_order": 4}, "degrees 0 to 3"),
        ({"sampling_eps": 0.0}, "sampling_eps is 0.0"),
        ({"ts_order": 0}, "ts_order 0"),
        ({"method": "ab"}, "method is 'ab'"),
        ({"rk_method": "5rk"}, "rk_method is '5rk'"),
        ({"ts_phase": "x"}, "ts_phase is 'x'"),
        ({"quadrature": "x"}, "quadrature is 'x'"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        DEISFullScheduler(**options)


@pytest.mark.parametrize("steps", [0, -3, 2.5, 1001])
def test_bad_step_counts(steps):
    with pytest.raises(ValueError, match="num_inference_steps"):
        DEISFullScheduler().set_timesteps(steps)


@pytest.mark.parametrize("sigmas", [[], [1.0], [1.0, 2.0, 0.0], [1.0, 1.0, 0.0]])
def test_native_sampler_refuses_bad_noise_levels(sigmas):
    with pytest.raises(ValueError, match="sigmas"):
        sample_deis(analytic.comfy_denoiser(MIX), start(), torch.tensor(sigmas))


def test_native_sampler_names_the_call_that_went_wrong():
    def model(x, sigma):
        return x * (math.nan if sigma[0] < 1 else 0.5)

    with pytest.raises(RuntimeError, match="call 3 of 4"):
        sample_deis(model, start(), torch.tensor([3.0, 2.0, 0.9, 0.5, 0.0]))


def test_default_grids_are_even_for_flow_models_and_the_authors_for_others():
    flow = DEISFullScheduler(prediction_type="flow_prediction")
    flow.set_timesteps(10)
    gaps = flow.timesteps.double().diff()
    assert torch.allclose(gaps, gaps[:1].expand(9), rtol=1e-6)
    diffusion = DEISFullScheduler()
    diffusion.set_timesteps(10)
    assert torch.equal(diffusion.timesteps, _with(ts_order=2.0).timesteps)
    assert torch.equal(_with(ts_phase="rho").timesteps, _with(ts_phase="rho", ts_order=7.0).timesteps)


def _with(**options):
    scheduler = DEISFullScheduler(**options)
    scheduler.set_timesteps(10)
    return scheduler
