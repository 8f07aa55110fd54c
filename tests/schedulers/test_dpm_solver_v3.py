"""DPM-Solver-v3 against exact solutions, closed-form statistics and diffusers' own solvers."""

from __future__ import annotations

import logging
import math

import diffusers
import numpy as np
import pytest
import torch

import diffusers_ext
from diffusers_ext.prediction import NoiseSchedule
from diffusers_ext.schedulers.dpm_solver_v3 import (
    EMS,
    DPMSolverV3MultistepScheduler,
    History,
    Solver,
    SolverOptions,
    compute_ems,
    log_snr_span,
    skip_nodes,
)
from diffusers_ext.zoo import analytic


SD = analytic.schedule("sd")
FLOW = analytic.schedule("flow")


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def linear_vp():
    """Continuous linear VP, beta 0.1 to 20, sampled at t = 0.001, 0.002, ... 1."""
    t = torch.arange(1, 1001, dtype=torch.float64) / 1000
    return NoiseSchedule.from_alphas_cumprod(torch.exp(-(20 - 0.1) / 2 * t**2 - 0.1 * t))


def ends(schedule):
    return [tuple(v.item() for v in schedule.levels(torch.tensor(lam).double())) for lam in log_snr_span(schedule)]


def solve(model, schedule, ems, nodes, options, x):
    """Drive the pure solver; `model(x, alpha, sigma)` returns the clean sample."""
    solver, history, calls = Solver(ems, schedule, nodes, options), History(), 0
    for i in range(len(nodes) - 1):
        x, history = solver.advance(history, x, model(x, *solver.levels[i]), i)
        calls += 1
    return x, calls


def rmse(a, b):
    return (a - b).pow(2).mean().sqrt().item()


def gaussian_ems(schedule, mean, variance, cells):
    """Closed form: l = sigma^2 / V with V = alpha^2 s^2 + sigma^2, s = 0, b = -l' m."""
    grid = torch.linspace(*log_snr_span(schedule), cells + 1, dtype=torch.float64).requires_grad_()
    alpha, sigma = schedule.levels(grid)
    l = sigma**2 / (alpha**2 * variance + sigma**2)
    (slope,) = torch.autograd.grad(l.sum(), grid)
    l = l.detach()
    return EMS(grid.detach(), l, torch.zeros_like(l), -slope * mean)


@pytest.mark.parametrize("schedule", [linear_vp(), FLOW], ids=["vp", "flow"])
@pytest.mark.parametrize("cells, limit", [(120, 1e-3), (400, 1e-4), (1200, 1e-5)])
def test_one_step_is_exact_on_gaussian_data(schedule, cells, limit):
    """The decisive test: with exact statistics one first-order step lands on the exact ODE solution."""
    data = analytic.GaussianMixture.gaussian(torch.tensor([0.7]), torch.tensor([0.09]))
    x, nodes = torch.randn(64, 1, generator=rng(), dtype=torch.float64), skip_nodes(schedule, 1, "time_uniform")
    exact = data.ode(x, *ends(schedule))
    ours, calls = solve(data.denoise, schedule, gaussian_ems(schedule, 0.7, 0.09, cells), nodes, SolverOptions(1), x)
    degenerate, _ = solve(
        data.denoise, schedule, EMS.constant(*log_snr_span(schedule), cells), nodes, SolverOptions(1), x
    )
    assert (ours - exact).abs().max() < limit and calls == 1
    assert (degenerate - exact).abs().max() > 0.3


def test_statistics_equal_the_closed_form():
    data = analytic.GaussianMixture.gaussian(torch.tensor([0.7, -0.4]), torch.tensor([0.09, 0.5]))
    model = analytic.AnalyticDenoiser(data, SD)
    ems = compute_ems(lambda x, t, rows: model(x, t), SD, data.sample(32, rng()), num_grid=150, progress=False)
    for i, (mean, variance) in enumerate([(0.7, 0.09), (-0.4, 0.5)]):
        exact = gaussian_ems(SD, mean, variance, 150)
        torch.testing.assert_close(ems.l[:, i], exact.l, atol=1e-6, rtol=0)
        assert ems.s[:, i].abs().max() == 0  # f is constant: no slope to fit
        # l' is a moving average, so b is not exact
        torch.testing.assert_close(ems.b[:, i], exact.b, atol=5e-3, rtol=0)


def test_interrupted_statistics_go_on(tmp_path):
    data = analytic.GaussianMixture.gaussian(torch.tensor([0.7, -0.4]), torch.tensor([0.09, 0.5]))
    model, file, seen = analytic.AnalyticDenoiser(data, SD), tmp_path / "part.safetensors", []

    def measured(**options) -> EMS:
        points = data.sample(16, rng())
        return compute_ems(lambda x, t, rows: model(x, t), SD, points, num_grid=12, progress=False, **options)

    def stop(n: int) -> None:
        if n == 5:
            raise KeyboardInterrupt

    whole = measured()
    with pytest.raises(KeyboardInterrupt):
        measured(checkpoint=file, on_grid_point=stop)
    with pytest.raises(ValueError, match="no unfinished statistics with seed"):
        measured(checkpoint=file, seed=1)
    resumed = measured(checkpoint=file, on_grid_point=seen.append)
    assert seen == list(range(6, 13)) and not file.exists()
    for name in ("l", "s", "b"):
        assert torch.equal(getattr(resumed, name), getattr(whole, name))


@pytest.fixture(scope="module")
def mixture():
    return analytic.GaussianMixture(torch.randn(3, 8, generator=rng(5)), 0.2)


@pytest.fixture(scope="module")
def mixture_ems(mixture):
    model = analytic.AnalyticDenoiser(mixture, SD)
    data = mixture.sample(2048, rng(6))
    return compute_ems(
        lambda x, t, rows: model(x, t), SD, data, num_grid=400, batch_size=2048, progress=False, estimator="fd"
    )


def test_statistics_halve_the_error_on_a_mixture(mixture, mixture_ems):
    x = torch.randn(64, 8, generator=rng(7), dtype=torch.float64)
    reference = mixture.ode(x, *ends(SD), steps=200)
    for steps in (5, 10):
        nodes = skip_nodes(SD, steps, "time_uniform")
        ours, calls = solve(mixture.denoise, SD, mixture_ems, nodes, SolverOptions(2), x)
        plain, _ = solve(mixture.denoise, SD, EMS.constant(*log_snr_span(SD), 1200), nodes, SolverOptions(2), x)
        assert rmse(ours, reference) <= 0.5 * rmse(plain, reference) and calls == steps


@pytest.mark.parametrize(
    "options, order",
    [
        (SolverOptions(1, use_corrector=False, lower_order_final=False), 1),
        (SolverOptions(2, use_corrector=False, lower_order_final=False), 2),
        (SolverOptions(3, use_corrector=False, lower_order_final=False), 3),
        (SolverOptions(1, lower_order_final=False), 2),
    ],
    ids=["first", "second", "third", "first, corrected"],
)
def test_order_of_convergence(mixture, options, order):
    x = mixture.sample(16, rng(8)) * 0.5 + torch.randn(16, 8, generator=rng(9), dtype=torch.float64)
    ems = EMS.constant(*log_snr_span(SD), 4800)
    reference = mixture.ode(x, *ends(SD), steps=400)
    steps = (20, 40, 80, 160)
    errors = [
        rmse(solve(mixture.denoise, SD, ems, skip_nodes(SD, n, "logSNR"), options, x)[0], reference) for n in steps
    ]
    assert -np.polyfit(np.log(steps), np.log(errors), 1)[0] == pytest.approx(order, abs=0.15)


def test_corrector_lowers_the_error(mixture):
    x = torch.randn(64, 8, generator=rng(7), dtype=torch.float64)
    reference, nodes = mixture.ode(x, *ends(SD), steps=200), skip_nodes(SD, 20, "logSNR")
    ems = EMS.constant(*log_snr_span(SD), 1200)
    errors = [
        rmse(solve(mixture.denoise, SD, ems, nodes, SolverOptions(2, use_corrector=c), x)[0], reference)
        for c in (True, False)
    ]
    assert errors[0] < 0.7 * errors[1]


def upstream(algorithm, order, **kwargs):
    return diffusers.DPMSolverMultistepScheduler(
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.012,
        algorithm_type=algorithm,
        solver_order=order,
        final_sigmas_type="sigma_min",
        **kwargs,
    )


@pytest.mark.parametrize("algorithm, l, s", [("dpmsolver++", 1.0, 0.0), ("dpmsolver", 0.0, -1.0)])
@pytest.mark.parametrize("cells, limit", [(1200, 1e-4), (20_000, 1e-6)])
def test_constant_statistics_are_the_known_solvers(mixture, algorithm, l, s, cells, limit):
    """Order 1 on equal nodes, compared with diffusers' own implementation run on the snapped levels in float64."""
    ems = EMS.constant(*log_snr_span(SD), cells, l, s)
    solver = Solver(ems, SD, skip_nodes(SD, 10, "logSNR"), SolverOptions(1, use_corrector=False))
    peer = upstream(algorithm, 1)
    peer.set_timesteps(10)
    peer.sigmas = torch.exp(-solver.log_snr)
    peer.lower_order_nums = 0
    ours = theirs = torch.randn(16, 8, generator=rng(), dtype=torch.float64)
    history = History()
    for i, t in enumerate(peer.timesteps):
        ours, history = solver.advance(history, ours, mixture.denoise(ours, *solver.levels[i]), i)
        theirs = peer.step(mixture.noise(theirs, *solver.levels[i]), t, theirs).prev_sample
    assert (ours - theirs).abs().max() < limit


def test_degenerate_finish_is_the_first_order_step_to_zero(mixture):
    x = torch.randn(4, 8, generator=rng(), dtype=torch.float64)
    nodes = torch.cat([skip_nodes(SD, 3, "logSNR")[:-1], torch.tensor([math.inf])])
    solver, history = Solver(EMS.constant(*log_snr_span(SD), 1200), SD, nodes, SolverOptions(2)), History()
    for i in range(3):
        alpha, sigma = solver.levels[i]
        x0 = mixture.denoise(x, alpha, sigma)
        x, history = solver.advance(history, x, x0, i)
    torch.testing.assert_close(x, x0)


def test_finish_is_the_denoised_end_point_without_a_call():
    data = analytic.GaussianMixture.gaussian(torch.tensor([0.7]), torch.tensor([0.001]))
    x, ems = torch.randn(32, 1, generator=rng(7), dtype=torch.float64), gaussian_ems(SD, 0.7, 0.001, 1200)
    nodes = skip_nodes(SD, 10, "time_uniform")
    end, calls = solve(data.denoise, SD, ems, nodes, SolverOptions(2), x)
    clean = torch.cat([nodes[:-1], torch.tensor([math.inf])])
    finished, calls_finished = solve(data.denoise, SD, ems, clean, SolverOptions(2), x)
    assert (finished - data.denoise(end, *ends(SD)[1])).abs().max() < 1e-4 < (finished - end).abs().max()
    assert calls == calls_finished == 10


@pytest.mark.parametrize("reduce, shape", [("element", (3, 4, 4)), ("channel", (3, 1, 1)), ("scalar", (1, 1, 1))])
@pytest.mark.parametrize("estimator", ["jvp", "fd"])
def test_reductions_and_estimators(reduce, shape, estimator):
    data = analytic.GaussianMixture(torch.randn(2, 3, 4, 4, generator=rng()), 0.3)
    model = analytic.AnalyticDenoiser(data, FLOW, "flow_prediction")
    x0 = data.sample(24, rng(1))

    def run(**options):
        return compute_ems(
            lambda x, t, rows: model(x, t), FLOW, x0, "flow_prediction", 20, reduce=reduce, progress=False, **options
        )

    ems = run(estimator=estimator, batch_size=7)
    assert ems.l.shape == ems.s.shape == ems.b.shape == (21, *shape)
    torch.testing.assert_close(ems.l, run(estimator="jvp").l, atol=1e-4, rtol=0)
    assert ems.metadata["reduce"] == reduce and ems.metadata["num_data"] == "24"


def test_hutchinson_error_falls_with_the_number_of_data():
    """Against the exact diagonal of the Jacobian, averaged over a large sample."""
    data = analytic.GaussianMixture(torch.randn(3, 8, generator=rng(5)), 0.2)
    model, lam = analytic.AnalyticDenoiser(data, SD), torch.tensor(0.0, dtype=torch.float64)
    alpha, sigma = SD.levels(lam)
    x = alpha * data.sample(4000, rng(1)) + sigma * torch.randn(4000, 8, generator=rng(2), dtype=torch.float64)
    # d noise / dx = (1 - alpha^2 / sigma^2 Cov[x0 | x]) / sigma
    spread = data.posterior(x, alpha, sigma).covariance().diagonal(dim1=1, dim2=2)
    exact = (1 - alpha**2 / sigma**2 * spread).mean(0)
    errors = []
    for n in (64, 4096):
        ems = compute_ems(
            lambda x, t, rows: model(x, t), SD, data.sample(n, rng(3)), num_grid=10, log_snr_range=(-1.0, 1.0),
            batch_size=n, progress=False,
        )  # fmt: skip
        errors.append((ems.l[5] - exact).abs().max().item())
    assert errors[1] < 4 / 4096**0.5 and errors[1] < errors[0]


def test_file_round_trip_is_bit_exact(mixture_ems, tmp_path):
    mixture_ems.save(tmp_path / "ems.safetensors")
    again = EMS.load(tmp_path / "ems.safetensors")
    for name in ("log_snr", "l", "s", "b"):
        assert torch.equal(getattr(again, name), getattr(mixture_ems, name))
    assert again.metadata == mixture_ems.metadata


def test_statistics_travel_with_the_scheduler(mixture_ems, tmp_path):
    scheduler = sd_scheduler().load_ems(mixture_ems)
    scheduler.save_pretrained(tmp_path)
    again = DPMSolverV3MultistepScheduler.from_pretrained(tmp_path)
    assert torch.equal(again.ems.s, mixture_ems.s)
    (tmp_path / "ems.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="ems_file"):
        DPMSolverV3MultistepScheduler.from_pretrained(tmp_path)


def sd_scheduler(**kwargs):
    return DPMSolverV3MultistepScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, **kwargs)


def test_scheduler_snaps_and_feeds_the_snapped_time(mixture_ems):
    scheduler = sd_scheduler().load_ems(mixture_ems)
    scheduler.set_timesteps(7)
    grid = scheduler._solver.ems.log_snr
    for t in scheduler.timesteps:
        assert (grid - SD.log_snr(t.double())).abs().min() < 1e-4
    gaps = torch.tensor(scheduler._solver.indices).diff()
    assert gaps.min() >= 5


def test_half_corrector_corrects_only_early(mixture):
    nodes, x = skip_nodes(SD, 10, "time_uniform"), torch.randn(4, 8, generator=rng(), dtype=torch.float64)
    ems = EMS.constant(*log_snr_span(SD), 1200)
    paths = [solve(mixture.denoise, SD, ems, nodes, SolverOptions(2, use_corrector=u, half_corrector=h), x)[0]
             for u, h in ((True, False), (True, True), (False, False))]  # fmt: skip
    assert not torch.equal(paths[0], paths[1]) and not torch.equal(paths[1], paths[2])


def test_warnings(mixture_ems, caplog):
    with caplog.at_level(logging.WARNING):
        sd_scheduler().set_timesteps(5)
    assert "no statistics" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        sd_scheduler(degenerated=True).set_timesteps(5)
        sd_scheduler(guidance_scale=1.0).load_ems(mixture_ems).set_timesteps(5)
        assert not caplog.text
        sd_scheduler(guidance_scale=7.5).load_ems(mixture_ems).set_timesteps(5)
    assert "guidance scale 1.0, not 7.5" in caplog.text


def test_bad_input(mixture_ems, tmp_path):
    with pytest.raises(ValueError, match="solver_order is 4"):
        sd_scheduler(solver_order=4)
    with pytest.raises(ValueError, match="skip_type"):
        sd_scheduler(skip_type="karras")
    with pytest.raises(ValueError, match="compute statistics for this model"):
        DPMSolverV3MultistepScheduler(prediction_type="flow_prediction").load_ems(mixture_ems)
    with pytest.raises(ValueError, match="one shape"):
        EMS(torch.linspace(0, 1, 5), torch.zeros(5), torch.zeros(5, 2), torch.zeros(5))
    with pytest.raises(ValueError, match="uniform"):
        EMS(torch.tensor([0.0, 1.0, 3.0]), *[torch.zeros(3)] * 3)
    with pytest.raises(ValueError, match="too large"):
        EMS.constant(0, 1, 4).__class__(torch.linspace(0, 1, 3), *[torch.zeros(1).expand(3, 2**27)] * 3)
    from safetensors.torch import save_file

    save_file({"l": torch.zeros(3)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="not a statistics file"):
        EMS.load(tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="estimator"):
        compute_ems(None, SD, torch.zeros(4, 2), estimator="ad")
    with pytest.raises(ValueError, match="at least 2 data"):
        compute_ems(None, SD, torch.zeros(1, 2))


def test_calibration_can_be_interrupted():
    def stop(n):
        if n == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compute_ems(
            lambda x, t, rows: x, SD, torch.zeros(4, 2, dtype=torch.float64), progress=False, on_grid_point=stop
        )


def test_public_names():
    assert diffusers_ext.DPMSolverV3MultistepScheduler is DPMSolverV3MultistepScheduler
    assert diffusers_ext.get_method("dpm-solver-v3").public is DPMSolverV3MultistepScheduler
