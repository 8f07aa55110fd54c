from __future__ import annotations

import functools
import json
import math

import pytest
import torch
from diffusers import DDIMScheduler, DiffusionPipeline, DPMSolverMultistepScheduler, UniPCMultistepScheduler

from diffusers_ext import EMS, SolverSchedule, SolverScheduleSearch, USFScheduler, solve_usf, zoo
from diffusers_ext.schedulers import dpm_solver_v3
from diffusers_ext.schedulers._ems import log_snr_span
from diffusers_ext.schedulers._usf_predictor import SchedulePredictor
from diffusers_ext.schedulers._usf_schedule import PRESETS, Derivative, Formula, Step, preset_steps
from diffusers_ext.schedulers._usf_solver import Solver, phis
from diffusers_ext.schedulers.usf_s3 import levels_of, log_snr_of, pipeline_fitness, times_of, trajectory_fitness
from diffusers_ext.zoo.analytic import AnalyticDenoiser, GaussianMixture, schedule


LINEAR = schedule("linear")
MIXTURE = GaussianMixture(torch.randn(4, 8, generator=torch.Generator().manual_seed(0)), variances=0.3)


def noise(n: int = 32, seed: int = 1) -> torch.Tensor:
    return torch.randn(n, 8, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def nodes(n: int, end: float = 19.0) -> list[tuple[float, float]]:
    """Levels even in log-SNR from t = 1 to t = 0.02."""
    ends = LINEAR.table[-1].item(), LINEAR.log_snr(torch.tensor(end)).item()
    return list(zip(*(v.tolist() for v in LINEAR.levels(torch.linspace(*ends, n + 1, dtype=torch.float64)))))


def run(levels, steps, x, **options) -> torch.Tensor:
    solver = Solver(levels, steps, **options)
    return solve_usf(solver, lambda y, i: MIXTURE.denoise(y, *levels[i]), x)


def dpmpp_2m(levels, x, noise_form: bool = False, taylor: bool = False) -> torch.Tensor:
    """DPM-Solver(++) 2M as published, first order at the first and last step."""
    lam = [math.log(a / s) for a, s in levels]
    old = None
    for i, ((a, s), (at, st)) in enumerate(zip(levels, levels[1:])):
        x0 = MIXTURE.denoise(x, a, s)
        m = (x - a * x0) / s if noise_form else x0
        h = lam[i + 1] - lam[i]
        z = h if noise_form else -h
        slope = 0.0
        if 0 < i < len(levels) - 2:
            r = (lam[i] - lam[i - 1]) / h
            d = (m - old) / r
            slope = (math.expm1(z) - z) / z * d if taylor else 0.5 * math.expm1(z) * d
        x = (at / a if noise_form else st / s) * x - (st if noise_form else at) * (math.expm1(z) * m + slope)
        old = m
    return x


def ddim(levels, x) -> torch.Tensor:
    for (a, s), (at, st) in zip(levels, levels[1:]):
        x0 = MIXTURE.denoise(x, a, s)
        x = at * x0 + st / s * (x - a * x0)
    return x


def dpm_solver_2s(levels, x) -> torch.Tensor:
    """Single-step DPM-Solver-2 on pairs of steps; the middle node is given."""
    lam = [math.log(a / s) for a, s in levels]
    for i in range(0, len(levels) - 1, 2):
        (a, s), (a1, s1), (at, st) = levels[i : i + 3]
        h, h1 = lam[i + 2] - lam[i], lam[i + 1] - lam[i]
        eps = (x - a * MIXTURE.denoise(x, a, s)) / s
        u = a1 / a * x - s1 * math.expm1(h1) * eps
        eps1 = (u - a1 * MIXTURE.denoise(u, a1, s1)) / s1
        r1 = h1 / h
        x = at / a * x - st * math.expm1(h) * eps - st / (2 * r1) * math.expm1(h) * (eps1 - eps)
    return x


@pytest.mark.parametrize(
    "preset, published",
    [
        ("ddim", ddim),
        ("dpmpp_2m", dpmpp_2m),
        ("dpmpp_2m_taylor", lambda levels, x: dpmpp_2m(levels, x, taylor=True)),
        ("dpm_2m", lambda levels, x: dpmpp_2m(levels, x, noise_form=True)),
        ("dpm_solver_2s", dpm_solver_2s),
    ],
)
def test_presets_are_the_published_solvers(preset, published):
    levels, x = nodes(8), noise()
    assert (run(levels, preset_steps(preset, 8, to_clean=False), x) - published(levels, x)).abs().max() < 1e-8


@pytest.mark.parametrize("steps", [5, 8, 10, 20])
@pytest.mark.parametrize(
    "preset, upstream, options",
    [
        ("dpmpp_2m", DPMSolverMultistepScheduler, {}),
        ("unipc_bh2", UniPCMultistepScheduler, {}),
        ("unipc_bh2", UniPCMultistepScheduler, {"final_sigmas_type": "sigma_min"}),
        ("unipc_bh1", UniPCMultistepScheduler, {"final_sigmas_type": "sigma_min", "solver_type": "bh1"}),
    ],
)
def test_scheduler_agrees_with_diffusers(preset, upstream, options, steps):
    theirs = upstream(timestep_spacing="trailing", beta_schedule="linear", **options)
    end = options.get("final_sigmas_type", "zero")
    ours = USFScheduler(preset=preset, beta_schedule="linear", final_sigmas_type=end)
    for scheduler in (theirs, ours):
        scheduler.set_timesteps(steps)
    theirs.sigmas = torch.tensor([s / a for a, s in ours._levels], dtype=torch.float64)  # its own are float32
    ends = []
    for scheduler in (theirs, ours):
        model, x = AnalyticDenoiser(MIXTURE, LINEAR), noise()
        for here, t in zip(ours.timesteps, scheduler.timesteps):
            x = scheduler.step(model(x, here), t, x).prev_sample
        ends.append(x)
    limit = 1e-6 if preset == "dpmpp_2m" else 1e-12  # diffusers' DPM-Solver++ steps in float32
    assert (ends[0] - ends[1]).abs().max() < limit * ends[0].abs().max()


def test_ddim_agrees_with_diffusers():
    theirs = DDIMScheduler(timestep_spacing="trailing", beta_schedule="linear", clip_sample=False)
    ours, ends = USFScheduler(preset="ddim", beta_schedule="linear"), []
    for scheduler in (theirs, ours):
        model, x = AnalyticDenoiser(MIXTURE, LINEAR), noise()
        scheduler.set_timesteps(10)
        for t in scheduler.timesteps:
            x = scheduler.step(model(x, t), t, x).prev_sample
        ends.append(x)
    assert (ends[0] - ends[1]).abs().max() < 1e-6 * ends[0].abs().max()


@functools.cache
def exact_end() -> torch.Tensor:
    return MIXTURE.ode(noise(), nodes(1)[0], nodes(1)[-1])


def full_order(prediction: str, order: int, n: int) -> list[Step]:
    steps = []
    for i in range(n):
        q = min(order, i + 1)
        points = tuple(range(-2, -q - 1, -1))
        steps.append(Step(Formula(prediction, -1, (Derivative(points),) * (q - 1))))
    return steps


@pytest.mark.parametrize("order, least", [(1, 0.9), (2, 1.7), (3, 2.6), (4, 3.0)])
@pytest.mark.parametrize("prediction", ["noise", "data"])
def test_order_of_convergence(prediction, order, least):
    x, counts = noise(), (48, 96, 136, 192)
    exact = exact_end()
    errors = [(run(nodes(n), full_order(prediction, order, n), x) - exact).norm(dim=1).median().item() for n in counts]
    slope = (
        -torch.linalg.lstsq(
            torch.stack([torch.tensor(counts).double().log(), torch.ones(4, dtype=torch.float64)], 1),
            torch.tensor(errors, dtype=torch.float64).log()[:, None],
        )
        .solution[0]
        .item()
    )
    assert slope >= least


def test_pseudo_corrector_raises_the_order():
    x = noise()
    exact = exact_end()

    def error(n, corrector):
        steps = [Step(s.formula, corrector if i < n - 1 else "none") for i, s in enumerate(full_order("data", 2, n))]
        return (run(nodes(n), steps, x) - exact).norm().item()

    assert error(96, "pseudo") < 0.5 * error(96, "none")
    assert error(48, "pseudo") > 4.5 * error(96, "pseudo")


def test_phi_functions():
    for z in (-3.0, -0.5, 0.009, 0.011, 2.0):
        series = [sum(z**k / math.factorial(k + i) for k in range(40)) for i in range(1, 5)]
        assert phis(z, 4) == pytest.approx(series, rel=1e-6)


@pytest.mark.parametrize("afs", ["none", "zero_x0"])
@pytest.mark.parametrize("corrector", ["none", "pseudo", "implicit"])
def test_calls_equal_the_formula(afs, corrector):
    plain = USFScheduler().preset_schedule(6, "dpmpp_2m")
    steps = tuple(Step(s.formula, corrector if i < 5 else "none") for i, s in enumerate(plain.steps))
    chosen = SolverSchedule(plain.times, steps, afs)
    levels, calls = levels_of(chosen, LINEAR), []
    solver = Solver(levels, chosen.steps, chosen.afs)
    solve_usf(solver, lambda y, i: calls.append(i) or MIXTURE.denoise(y, *levels[i]), noise())
    expected = 6 - (afs == "zero_x0") + (5 if corrector == "implicit" else 0)
    assert len(calls) == chosen.calls == expected


def test_analytic_first_step_is_exact_for_the_mean():
    """x0 of the first call replaced by the data's mean: at pure noise that is what a perfect model says."""
    plain = USFScheduler().preset_schedule(6, "dpmpp_2m")
    levels = levels_of(plain, LINEAR)
    mean = tuple(MIXTURE.mean().tolist())
    x, exact = noise(), run(levels, plain.steps, noise())
    assert (run(levels, plain.steps, x, afs="average_x0", average_x0=mean) - exact).abs().max() < 0.05


def test_scheduler_with_analytic_first_step_equals_the_solver():
    plain = USFScheduler().preset_schedule(6, "dpmpp_2m")
    chosen = SolverSchedule(plain.times, plain.steps, "zero_x0")
    scheduler = USFScheduler(schedule=chosen.to_dict())
    scheduler.set_timesteps(5)
    assert len(scheduler.timesteps) == 5
    model, x = AnalyticDenoiser(MIXTURE, scheduler.noise_schedule), noise()
    for i, t in enumerate(scheduler.timesteps):
        level = torch.tensor(scheduler._log_snr[i], dtype=torch.float64)
        inputs = scheduler.scale_model_input(x, t)
        x = scheduler.step(model(inputs, scheduler.noise_schedule.timestep(level)), t, x).prev_sample
    levels = levels_of(chosen, scheduler.noise_schedule)
    assert (x - run(levels, chosen.steps, noise(), afs="zero_x0")).abs().max() < 1e-8


def test_times_round_trip():
    for name in ("linear", "flow", "edm"):
        t = torch.linspace(1.0, 0.01, 12, dtype=torch.float64).tolist()
        assert times_of(log_snr_of(t, schedule(name)), schedule(name))[1:] == pytest.approx(t[1:], abs=1e-9)


@pytest.mark.parametrize("preset", PRESETS)
def test_file_round_trip(preset, tmp_path):
    chosen = USFScheduler().preset_schedule(7, preset)
    chosen.save(tmp_path / "seven.json")
    assert SolverSchedule.load(tmp_path / "seven.json") == chosen
    assert list(tmp_path.iterdir()) == [tmp_path / "seven.json"]


def test_authors_names_are_read():
    values = USFScheduler().preset_schedule(3, "dpmpp_2m").to_dict()
    values |= {"afs": "no_afs", "corrector_types": [{"type": "no_corrector"}] * 3}
    assert SolverSchedule.from_dict(values) == USFScheduler().preset_schedule(3, "dpmpp_2m")


def test_a_correctors_relaxation_is_kept_and_read_from_authors_files():
    ours = USFScheduler().preset_schedule(3, "unipc_bh2")
    assert SolverSchedule.from_dict(json.loads(json.dumps(ours.to_dict()))) == ours
    derivative = {"estimate": "Difference_1", "active_points": [-1], "relaxation": "unipc-bh2"}
    theirs = {"type": "pseudo", "start_point": -2, "taylor_order": 2, "derivative_type": [derivative]}
    values = ours.to_dict()
    assert SolverSchedule.from_dict({**values, "corrector_types": [theirs, *values["corrector_types"][1:]]}) == ours
    derivative["relaxation"] = "no_relaxation"
    read = SolverSchedule.from_dict({**values, "corrector_types": [theirs, *values["corrector_types"][1:]]})
    assert read.steps[0].relaxation is None and read.steps[1:] == ours.steps[1:]


def broken(**changes) -> dict:
    return {**json.loads(json.dumps(USFScheduler().preset_schedule(4, "dpmpp_2m").to_dict())), **changes}


DERIVATIVE = {"estimate": "Difference_1", "active_points": [-2], "relaxation": None}


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"orders": [2, 2, 2, 1], "derivative_types": [[DERIVATIVE]] * 3 + [[]]}, "step 0: order 2"),
        ({"timesteps": [1.0, 0.5, 0.6, 0.2, 0.0]}, "step 1: times fall from 0.5 to 0.6"),
        (
            {"derivative_types": [[], [{**DERIVATIVE, "active_points": [-1]}], [DERIVATIVE], []]},
            r"step 1: active points \(-1,\) with the start point",
        ),
        ({"derivative_types": [[], [{**DERIVATIVE, "active_points": [-3]}], [DERIVATIVE], []]}, "step 1: active"),
        ({"prediction_types": ["data", "v", "data", "data"]}, "step 1: prediction"),
        ({"start_points": [-1, -3, -1, -1]}, "step 1: start point"),
        ({"orders": [1, 2, 2]}, "differ in length"),
        ({"skip_coefficients": [0.9, 1.0]}, "skip coefficients"),
        ({"afs": "average_x0"}, "average_x0"),
        ({"corrector_types": ["none", "none", "none", "pseudo"]}, "step 3"),
        ({"corrector_types": [{"type": "pseudo", "relaxation": "strong"}, "none", "none", "none"]}, "step 0"),
    ],
)
def test_invalid_schedules(changes, message):
    with pytest.raises(ValueError, match=message):
        SolverSchedule.from_dict(broken(**changes))


def test_invalid_files(tmp_path):
    (tmp_path / "a.json").write_text("[1, 2]")
    (tmp_path / "b.json").write_text("no json")
    for name in ("a.json", "b.json"):
        with pytest.raises(ValueError, match="not a solver schedule"):
            USFScheduler().load_schedule(tmp_path / name)
    with pytest.raises(ValueError, match="preset"):
        USFScheduler(preset="euler")


def search(seed: int = 0, n: int = 16, screen: int = 1) -> tuple[SolverScheduleSearch, list[SolverSchedule]]:
    scheduler = USFScheduler(final_sigmas_type="sigma_min")
    presets = [
        USFScheduler(final_sigmas_type="sigma_min", skip_type=skip).preset_schedule(5, name)
        for name in ("dpmpp_2m", "dpmpp_3m", "unipc_bh2", "ddim")
        for skip in ("logSNR", "time_uniform")
    ]
    fitness = fitness_on(scheduler, 1, n)
    options = {"seed": seed, "screen": screen, "analytic_first_step": True}
    return SolverScheduleSearch(fitness, presets, calls=5, **options), presets


def fitness_on(scheduler, seed: int, n: int = 64):
    levels = levels_of(scheduler.preset_schedule(2), scheduler.noise_schedule)
    x = noise(n, seed)
    return trajectory_fitness(MIXTURE.denoise, scheduler.noise_schedule, x, MIXTURE.ode(x, levels[0], levels[-1]))


def test_search_beats_the_best_preset():
    found, presets = search(n=192, screen=4)
    best = found.run(200, progress=False)
    held_out = fitness_on(USFScheduler(final_sigmas_type="sigma_min"), 77, 256)
    assert best.calls <= 5
    assert held_out(best) ** 0.5 <= 0.6 * min(held_out(p) for p in presets) ** 0.5


def test_search_is_deterministic_and_resumes(tmp_path):
    whole = search(3)[0]
    whole.run(40, progress=False)
    first, second = search(3)[0], search(4)[0]
    first.run(25, progress=False)
    first.save(tmp_path / "state.json")
    second.load(tmp_path / "state.json")
    second.run(15, progress=False)
    assert second.scored == whole.scored
    with pytest.raises(ValueError, match="5 calls"):
        SolverScheduleSearch(lambda s: 0.0, search()[1], calls=6).load(tmp_path / "state.json")
    with pytest.raises(ValueError, match="makes do"):
        SolverScheduleSearch(lambda s: 0.0, search()[1], calls=4)


def test_an_interrupted_search_goes_on():
    found, _ = search()

    def stop(n):
        if n == 9:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        found.run(20, progress=False, on_evaluation=stop)
    assert len(found.scored) == 10
    found.run(2, progress=False)
    assert len(found.scored) == 12


def test_search_on_a_pipeline_and_reload(shapes_unet, tmp_path):
    fitness = pipeline_fitness(shapes_unet, ["a red circle", "a blue star"], 1.0, reference_steps=8)
    shapes_unet.scheduler = USFScheduler.from_config(shapes_unet.scheduler.config)
    start = [shapes_unet.scheduler.preset_schedule(3, name) for name in ("ddim", "dpmpp_2m")]
    found = SolverScheduleSearch(fitness, start, calls=3, seed=1)
    best = found.run(8, progress=False)
    assert found.scored[0][0] <= min(fitness(s) for s in start) and found.scored[0][0] > 0
    shapes_unet.scheduler.load_schedule(best)
    shapes_unet.save_pretrained(tmp_path)
    reloaded = DiffusionPipeline.from_pretrained(tmp_path)
    reloaded.set_progress_bar_config(disable=True)
    assert type(reloaded.scheduler) is USFScheduler
    reloaded.scheduler.set_timesteps(best.calls)
    ours, theirs = (zoo.generate(p, ["a red circle"], best.calls, 1.0) for p in (shapes_unet, reloaded))
    assert torch.equal(ours, theirs)


# prediction type of DPM-Solver-v3


def waves(cells: int = 960) -> EMS:
    """Statistics that are no special case, smooth in log-SNR and different per element.

    At the noisy end they are those of data prediction: there the first steps, of low order, cost no accuracy.
    """
    grid = torch.linspace(*log_snr_span(LINEAR), cells + 1, dtype=torch.float64)
    u, phase = (grid - grid[0])[:, None] / 5, torch.linspace(0, 2, 8, dtype=torch.float64)
    part = 1 - torch.exp(-(u**2))
    l, s, b = 1 - part * (0.4 - 0.3 * torch.sin(u + phase)), 0.3 * torch.cos(u - phase), 0.2 * torch.sin(2 * u + phase)
    return EMS(grid, l, part * s, part * b)


def on_grid(ems: EMS, n: int) -> list[tuple[float, float]]:
    """Levels at grid points, from the noisiest to a point well before the clean end."""
    cells = len(ems.log_snr) - 1
    places = [round(cells * 0.6 * i / n) for i in range(n + 1)]
    return list(zip(*(v.tolist() for v in LINEAR.levels(ems.log_snr[places].double()))))


@pytest.mark.parametrize("order", [2, 3])
def test_v3_presets_are_dpm_solver_v3_without_its_corrector(order):
    ems = waves()
    levels, options = on_grid(ems, 8), dpm_solver_v3.SolverOptions(order, use_corrector=False)
    log_snr = torch.tensor([math.log(a / s) for a, s in levels], dtype=torch.float64)
    other, history, x = dpm_solver_v3.Solver(ems, LINEAR, log_snr, options), dpm_solver_v3.History(), noise()
    for i in range(8):
        x, history = other.advance(history, x, MIXTURE.denoise(x, *other.levels[i]), i)
    steps = preset_steps(f"v3_{order}m", 8, to_clean=False)
    assert (run(levels, steps, noise(), ems=ems, schedule=LINEAR) - x).abs().max() < 1e-9


def randomly(kind: str, seed: int = 0) -> list[Step]:
    """Six steps with every other choice random."""
    steps = []
    for step in preset_steps("dpmpp_3m", 6, to_clean=False):
        relaxed = [Derivative(d.points, None, 0.0) for d in step.formula.derivatives]
        steps.append(Step(Formula(kind, -1, tuple(relaxed)), "pseudo" if len(steps) in (1, 3) else "none"))
    return steps


@pytest.mark.parametrize("kind, curves", [("data", (1.0, 0.0)), ("noise", (0.0, -1.0))])
def test_v3_with_degenerate_statistics_is_data_or_noise_prediction(kind, curves):
    ems = EMS.constant(*log_snr_span(LINEAR), 20000, *curves)
    plain = run(nodes(6), randomly(kind), noise())
    assert (run(nodes(6), randomly("v3"), noise(), ems=ems, schedule=LINEAR) - plain).abs().max() < 2e-3
    assert (run(nodes(6), randomly("noise" if kind == "data" else "data"), noise()) - plain).abs().max() > 0.05


def test_one_v3_step_is_exact_for_a_gaussian():
    """With the closed-form statistics of Gaussian data, l = sigma^2 / (alpha^2 v + sigma^2), s = 0, b = -l' m."""
    variance, mean = 0.09, 0.7
    data = GaussianMixture.gaussian(torch.full((8,), mean), torch.full((8,), variance))
    grid = torch.linspace(*log_snr_span(LINEAR), 1201, dtype=torch.float64).requires_grad_()
    alpha, sigma = LINEAR.levels(grid)
    l = sigma**2 / (alpha**2 * variance + sigma**2)
    (slope,) = torch.autograd.grad(l.sum(), grid)
    ems = EMS(grid.detach(), l.detach()[:, None], torch.zeros(1201, 1).double(), -slope[:, None] * mean)
    levels, errors = on_grid(ems, 1), []
    exact = data.ode(noise(), *levels)
    for kind in ("v3", "data"):
        solver = Solver(levels, [Step(Formula(kind, -1, ()))], ems=ems, schedule=LINEAR)
        errors.append((solve_usf(solver, lambda y, i: data.denoise(y, *levels[i]), noise()) - exact).abs().max())
    assert errors[0] < 1e-4 and errors[1] > 0.1


@pytest.mark.parametrize("order, least", [(1, 0.9), (2, 1.7), (3, 2.6)])
def test_order_of_convergence_with_statistics(order, least):
    ems, counts, errors = waves(1920), (48, 96, 192) if order == 3 else (24, 48, 96), []
    exact = MIXTURE.ode(noise(8), on_grid(ems, 24)[0], on_grid(ems, 24)[-1])
    for n in counts:
        steps = full_order("v3", order, n)
        found = run(on_grid(ems, n), steps, noise(8), ems=ems, schedule=LINEAR)
        errors.append((found - exact).norm(dim=1).median().item())
    assert math.log(errors[0] / errors[-1]) / math.log(counts[-1] / counts[0]) >= least


def test_coarse_statistics_are_refined_and_fine_ones_used_as_they_are():
    coarse, fine = waves(30), waves(960)
    solvers = [Solver(nodes(8), preset_steps("v3_2m", 8, False), ems=e, schedule=LINEAR) for e in (coarse, fine)]
    cells = [len(s._statistics.ems.log_snr) - 1 for s in solvers]
    assert cells[0] >= 64 * 8 and cells[1] == 960


def test_v3_schedules_need_statistics_and_keep_them(tmp_path):
    chosen = USFScheduler(final_sigmas_type="sigma_min").preset_schedule(5, "v3_2m")
    assert chosen.to_dict()["prediction_types"] == ["dpmsolver_v3_prediction"] * 5
    scheduler = USFScheduler(schedule=chosen.to_dict(), beta_schedule="linear")
    with pytest.raises(ValueError, match="step 0: prediction v3 needs the statistics"):
        scheduler.set_timesteps(5)
    with pytest.raises(ValueError, match="log-SNR"):
        scheduler.load_ems(EMS.constant(-3, 3, 50))
    scheduler.load_ems(waves())
    scheduler.save_pretrained(tmp_path)
    ends = []
    for s in (scheduler, USFScheduler.from_pretrained(tmp_path)):
        model, x = AnalyticDenoiser(MIXTURE, LINEAR), noise().float()
        s.set_timesteps(5)
        for t in s.timesteps:
            x = s.step(model(x, t), t, x).prev_sample
        ends.append(x)
    assert torch.equal(*ends) and ends[0].isfinite().all()
    plain = SolverSchedule(chosen.times, chosen.steps)
    levels = levels_of(plain, scheduler.noise_schedule)
    wanted = run(levels, plain.steps, noise(), ems=waves(), schedule=LINEAR)
    assert (ends[0] - wanted).abs().max() < 2e-3
    (tmp_path / "ems.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="USFScheduler.from_pretrained"):
        USFScheduler.from_pretrained(tmp_path)


def test_search_with_statistics_uses_them():
    low, high = log_snr_span(LINEAR)
    ems = EMS.constant(low, high, 300, 0.7, -0.2, 0.0)
    scheduler = USFScheduler(final_sigmas_type="sigma_min")
    starts = [scheduler.preset_schedule(4, "dpmpp_2m"), scheduler.preset_schedule(4, "v3_2m")]
    x = noise(8)
    levels = levels_of(starts[0], scheduler.noise_schedule)
    end = MIXTURE.ode(x, levels[0], levels[-1])
    fitness = trajectory_fitness(MIXTURE.denoise, scheduler.noise_schedule, x, end, ems)
    found = SolverScheduleSearch(fitness, starts, 4, with_statistics=True)
    found.run(25, progress=False)
    mixed = {tuple(sorted({s.formula.prediction for s in chosen.steps})) for _, chosen in found.evaluated}
    assert any("v3" in kinds and len(kinds) > 1 for kinds in mixed)
    assert found.scored[0][0] <= min(fitness(s) for s in starts)
    without = SolverScheduleSearch(lambda s: 0.0, starts[:1], 4)
    without.run(25, progress=False)
    assert "v3" not in {s.formula.prediction for _, chosen in without.evaluated for s in chosen.steps}


# predictor


def middle_time(schedule: SolverSchedule) -> float:
    """A fitness that only a schedule's features decide: where its second point is, and how many correctors it has."""
    return abs(schedule.times[1] - 0.5) + 0.1 * sum(s.corrector == "none" for s in schedule.steps)


def test_predictor_ranks_schedules_that_it_has_not_seen():
    drawn = SolverScheduleSearch(middle_time, search()[1], calls=5, seed=5)
    drawn.run(160, progress=False)
    schedules, scores = [s for _, s in drawn.evaluated], [v for v, _ in drawn.evaluated]
    predictor = SchedulePredictor(0).fit(schedules[:120], scores[:120])
    with torch.no_grad():
        value = predictor(schedules[120:])
    true = torch.tensor(scores[120:])
    pairs = true[:, None] > true[None, :]
    right = ((value[:, None] > value[None, :]) & pairs).sum() / pairs.sum()
    assert right > 0.75
    assert predictor.best(schedules[120:]) == schedules[120:][int(value.argmin())]
    again = SchedulePredictor(0).fit(schedules[:120], scores[:120])
    with torch.no_grad():
        assert torch.equal(again(schedules[120:]), value)


def test_screened_search_evaluates_better_candidates():
    means = []
    for screen in (1, 8):
        found = SolverScheduleSearch(middle_time, search()[1], calls=5, seed=2, screen=screen, stage=15)
        found.run(45, progress=False)
        means.append(sum(v for v, _ in found.evaluated[15:]) / 30)
    assert means[1] < means[0]


def test_screened_search_resumes(tmp_path):
    def fresh() -> SolverScheduleSearch:
        return SolverScheduleSearch(middle_time, search()[1], calls=5, seed=2, screen=2, stage=8)

    whole, first, second = fresh(), fresh(), fresh()
    whole.run(22, progress=False)
    first.run(13, progress=False)
    first.save(tmp_path / "state.json")
    second.load(tmp_path / "state.json")
    second.run(9, progress=False)
    assert second.evaluated == whole.evaluated
    with pytest.raises(ValueError, match="screen 2"):
        SolverScheduleSearch(middle_time, search()[1], calls=5).load(tmp_path / "state.json")
    with pytest.raises(ValueError, match="screen is 0"):
        SolverScheduleSearch(middle_time, search()[1], calls=5, screen=0)
