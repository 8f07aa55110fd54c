from __future__ import annotations

import functools
import json
import math

import pytest
import torch
from diffusers import DDIMScheduler, DiffusionPipeline, DPMSolverMultistepScheduler

from diffusers_ext import SolverSchedule, SolverScheduleSearch, USFScheduler, solve_usf, zoo
from diffusers_ext.schedulers._usf_schedule import PRESETS, Derivative, Formula, Step, preset_steps
from diffusers_ext.schedulers.usf_s3 import (
    Solver,
    levels_of,
    log_snr_of,
    phis,
    pipeline_fitness,
    times_of,
    trajectory_fitness,
)
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


@pytest.mark.parametrize("steps", [5, 10])
@pytest.mark.parametrize("upstream, preset", [(DPMSolverMultistepScheduler, "dpmpp_2m"), (DDIMScheduler, "ddim")])
def test_scheduler_agrees_with_diffusers(upstream, preset, steps):
    options = {"timestep_spacing": "trailing", "beta_schedule": "linear"}
    theirs = upstream(**options, **({"clip_sample": False} if preset == "ddim" else {"lower_order_final": True}))
    ours = USFScheduler(preset=preset, beta_schedule="linear")
    ends = []
    for scheduler in (theirs, ours):
        model, x = AnalyticDenoiser(MIXTURE, LINEAR), noise().float()
        scheduler.set_timesteps(steps)
        for t in scheduler.timesteps:
            x = scheduler.step(model(x, t), t, x).prev_sample
        ends.append(x)
    assert (ends[0] - ends[1]).abs().max() < 2e-3  # diffusers keeps its table in float32


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


def search(seed: int = 0, n: int = 16) -> tuple[SolverScheduleSearch, list[SolverSchedule]]:
    scheduler = USFScheduler(final_sigmas_type="sigma_min")
    presets = [
        USFScheduler(final_sigmas_type="sigma_min", skip_type=skip).preset_schedule(5, name)
        for name in ("dpmpp_2m", "dpmpp_3m", "unipc_bh2", "ddim")
        for skip in ("logSNR", "time_uniform")
    ]
    fitness = fitness_on(scheduler, 1, n)
    return SolverScheduleSearch(fitness, presets, calls=5, seed=seed, analytic_first_step=True), presets


def fitness_on(scheduler, seed: int, n: int = 64):
    levels = levels_of(scheduler.preset_schedule(2), scheduler.noise_schedule)
    x = noise(n, seed)
    return trajectory_fitness(MIXTURE.denoise, scheduler.noise_schedule, x, MIXTURE.ode(x, levels[0], levels[-1]))


def test_search_beats_the_best_preset():
    found, presets = search(n=192)
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
