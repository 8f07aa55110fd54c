from __future__ import annotations

import functools
import logging

import diffusers
import pytest
import torch
from diffusers import DDIMScheduler, DiffusionPipeline
from safetensors.torch import save_file

from diffusers_ext import OLSSCoefficients, OLSSRecorder, OLSSScheduler, fit_olss, zoo
from diffusers_ext.schedulers.olss import step_olss, uniform_path
from diffusers_ext.zoo.analytic import AnalyticDenoiser, GaussianMixture, schedule


SD = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
MIXTURE = GaussianMixture(torch.randn(3, 8, generator=torch.Generator().manual_seed(0)), variances=0.2)
GAUSSIAN = GaussianMixture.gaussian(torch.linspace(-1, 1, 8), 0.3)


def noise(n: int, seed: int) -> torch.Tensor:
    return torch.randn(n, 8, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def levels(m: int) -> tuple[list[int], list[tuple[float, float]]]:
    """Timesteps and levels of DDIM with m trailing steps, ending clean."""
    times = [round(1000 - i * 1000 / m) - 1 for i in range(m)]
    pairs = schedule("sd").levels(schedule("sd").log_snr(torch.tensor(times)))
    return times, [*zip(*(v.tolist() for v in pairs)), (1.0, 0.0)]


def ddim(x: torch.Tensor, m: int, data=MIXTURE) -> tuple[list[int], torch.Tensor, torch.Tensor]:
    """Timesteps, states and epsilons of a DDIM run in float64."""
    times, nodes = levels(m)
    states, outputs = [x], []
    for (a, s), (a_to, s_to) in zip(nodes, nodes[1:]):
        eps = data.noise(x, a, s)
        x = a_to / a * x + (s_to - a_to / a * s) * eps
        states.append(x)
        outputs.append(eps)
    return times, torch.stack(states), torch.stack(outputs)


@functools.cache
def teacher() -> tuple:
    return ddim(noise(256, 1), 100)


def replay(fitted: OLSSCoefficients, x: torch.Tensor, m: int = 100, data=MIXTURE) -> torch.Tensor:
    """The student in closed loop: it calls the model on its own samples."""
    nodes, start, outputs = levels(m)[1], x, []
    for i, wx, we in zip(fitted.indices, fitted.wx, fitted.we):
        outputs.append(data.noise(x, *nodes[i]))
        x = step_olss(start, outputs, wx, we)
    return x


def rmse(a: torch.Tensor, b: torch.Tensor) -> float:
    return (a - b).square().mean().sqrt().item()


def test_as_many_steps_as_the_teacher_reproduce_it():
    times, x, e = ddim(noise(256, 1), 8)
    fitted = fit_olss(times, x, e, 8, path="uniform", ridge=0.0)
    assert max(fitted.error) < 1e-10 and list(fitted.timesteps) == times
    assert (replay(fitted, x[0], 8) - x[-1]).abs().max() < 1e-6


@pytest.mark.parametrize(
    "steps, path, ridge, share", [(8, "search", 0.0, 0.3), (10, "uniform", 1e-6, 0.2), (20, "uniform", 1e-6, 0.1)]
)
def test_closed_loop_is_nearer_to_the_teacher_than_ddim(steps, path, ridge, share):
    fitted = fit_olss(*teacher(), steps, path=path, ridge=ridge)
    held_out = noise(16, 2)
    goal = ddim(held_out, 100)[1][-1]
    assert rmse(replay(fitted, held_out), goal) <= share * rmse(ddim(held_out, steps)[1][-1], goal)


def test_searched_path_has_the_smaller_largest_error():
    for steps in (5, 8):
        searched, even = (fit_olss(*teacher(), steps, path=p, ridge=0.0) for p in ("search", "uniform"))
        assert max(searched.error) <= max(even.error)
        assert len(searched.indices) == steps and sorted(set(searched.indices)) == list(searched.indices)
    assert uniform_path(100, 10) == list(range(0, 100, 10))


def test_instability_without_ridge_is_reported(caplog):
    with caplog.at_level(logging.WARNING, logger="diffusers_ext"):
        bare = fit_olss(*teacher(), 20, path="uniform", ridge=0.0)
    assert bare.condition > 1e8 and "condition number" in caplog.text
    held_out = noise(16, 2)
    goal = ddim(held_out, 100)[1][-1]
    damped = fit_olss(*teacher(), 20, path="uniform", ridge=1e-6)
    assert rmse(replay(bare, held_out), goal) > 100 * rmse(replay(damped, held_out), goal)


def test_one_gaussian_is_nearly_exact():
    for steps in (3, 5):
        fitted = fit_olss(*ddim(noise(256, 1), 50, GAUSSIAN), steps, ridge=0.0)
        held_out = noise(16, 2)
        goal = ddim(held_out, 50, GAUSSIAN)[1][-1]
        assert rmse(replay(fitted, held_out, 50, GAUSSIAN), goal) < 1e-4
        assert rmse(ddim(held_out, steps, GAUSSIAN)[1][-1], goal) > 0.05


def test_fit_is_the_normal_equations():
    """Against an independent solution, with and without ridge."""
    times, x, e = ddim(noise(64, 3), 12)
    for ridge in (0.0, 1e-3):
        fitted = fit_olss(times, x, e, 3, path="uniform", ridge=ridge)
        a = torch.stack([x[0].flatten(), e[0].flatten(), e[4].flatten()], 1)
        w = torch.linalg.solve(a.T @ a + ridge * len(a) * torch.eye(3), a.T @ x[8].flatten())
        assert torch.allclose(torch.tensor([fitted.wx[1], *fitted.we[1]]).double(), w, rtol=1e-6)


def test_a_step_sees_no_future_outputs():
    fitted = fit_olss(*teacher(), 6)
    assert [len(row) for row in fitted.we] == [1, 2, 3, 4, 5, 6]


def drive(scheduler, model, x: torch.Tensor) -> torch.Tensor:
    for t in scheduler.timesteps:
        inputs = scheduler.scale_model_input(x, t)
        x = scheduler.step(model(inputs, t), t, x, return_dict=False)[0]
    return x


TEACHERS = {
    "DDIM": lambda: DDIMScheduler(**SD, timestep_spacing="trailing", clip_sample=False),
    "DPM++": lambda: diffusers.DPMSolverMultistepScheduler(**SD, timestep_spacing="trailing"),
    "Euler": lambda: diffusers.EulerDiscreteScheduler(**SD, timestep_spacing="trailing"),
    "flow": lambda: diffusers.FlowMatchEulerDiscreteScheduler(),
}


@pytest.mark.parametrize("name", TEACHERS)
def test_recorded_teachers_are_reproduced(name):
    recorder = OLSSRecorder(TEACHERS[name]())
    prediction = "flow_prediction" if name == "flow" else "epsilon"
    model = AnalyticDenoiser(MIXTURE, schedule("flow" if name == "flow" else "sd"), prediction)
    for seed in (1, 2):
        recorder.set_timesteps(40)
        x = noise(64, seed).float() * getattr(recorder, "init_noise_sigma", 1.0)
        for t in recorder.timesteps:
            inputs = recorder.scale_model_input(x, t) if name != "flow" else x
            x = recorder.step(model(inputs, t), t, x, return_dict=False)[0]
    times, states, outputs = recorder.trajectories()
    assert states.shape == (41, 128, 8) and outputs.shape == (40, 128, 8)
    student = OLSSScheduler.fit(recorder, 8)
    student.set_timesteps(8)
    ends = drive(student, model, states[0])
    assert rmse(ends, states[-1]) < 0.1 * states[-1].std().item()
    assert student.init_noise_sigma == pytest.approx(float(getattr(recorder, "init_noise_sigma", 1.0)))


def test_half_precision_and_two_runs():
    student = OLSSScheduler.from_coefficients(fit_olss(*teacher(), 5), DDIMScheduler(**SD).config)
    model, ends = AnalyticDenoiser(MIXTURE, schedule("sd")), []
    for dtype in (torch.float32, torch.float32, torch.float16):
        student.set_timesteps(5)
        ends.append(drive(student, model, noise(4, 5).to(dtype)))
    assert torch.equal(ends[0], ends[1]) and ends[2].dtype == torch.float16
    assert (ends[2].float() - ends[0]).abs().max() < 0.1


def test_file_round_trip(tmp_path):
    fitted = fit_olss(*teacher(), 5)
    fitted.save(tmp_path / "c.json")
    assert OLSSCoefficients.load(tmp_path / "c.json") == fitted
    (tmp_path / "d.json").write_text("{}")
    with pytest.raises(ValueError, match="no OLSS coefficients"):
        OLSSCoefficients.load(tmp_path / "d.json")


def test_bad_input():
    times, x, e = ddim(noise(1, 1), 20)
    with pytest.raises(ValueError, match="record more images"):
        fit_olss(times, x, e, 10)
    with pytest.raises(ValueError, match="do not fit"):
        fit_olss(times, x[:-1], e, 2)
    with pytest.raises(ValueError, match="1 to 20"):
        fit_olss(times, x, e, 21)
    with pytest.raises(ValueError, match="path"):
        fit_olss(times, x, e, 2, path="random")
    with pytest.raises(ValueError, match="OLSSScheduler.fit"):
        OLSSScheduler().set_timesteps(5)
    with pytest.raises(RuntimeError, match="no complete run"):
        OLSSRecorder(DDIMScheduler()).trajectories()


def record(recorder: OLSSRecorder, seed: int, stop: int | None = None) -> None:
    """A run of a teacher, or its first steps."""
    model, x = AnalyticDenoiser(MIXTURE, schedule("sd"), "epsilon"), noise(16, seed).float()
    recorder.set_timesteps(20)
    for t in recorder.timesteps[:stop]:
        x = recorder.step(model(x, t), t, x, return_dict=False)[0]


def test_recording_goes_on_in_another_process(tmp_path):
    whole, file = OLSSRecorder(TEACHERS["DDIM"]()), tmp_path / "runs.safetensors"
    for seed in (1, 2):
        record(whole, seed)
    first = OLSSRecorder(TEACHERS["DDIM"]())
    record(first, 1)
    record(first, 2, stop=7)
    first.save(file)
    later = OLSSRecorder(TEACHERS["DDIM"]()).load(file)
    record(later, 2)
    for a, b in zip(later.trajectories(), whole.trajectories()):
        assert a == b if isinstance(a, list) else torch.equal(a, b)


def test_files_that_hold_no_runs(tmp_path):
    file = tmp_path / "bad.safetensors"
    save_file({"x": torch.zeros(2)}, file)
    with pytest.raises(ValueError, match="holds no recorded runs"):
        OLSSRecorder(DDIMScheduler()).load(file)
    shapes = {"timesteps": torch.zeros(3), "x": torch.zeros(3, 1, 2), "e": torch.zeros(3, 1, 2)}
    save_file(shapes, file, {"format": "diffusers_ext.olss_runs"})
    with pytest.raises(ValueError, match="do not fit together"):
        OLSSRecorder(DDIMScheduler()).load(file)


def test_wrong_use_of_a_fitted_scheduler():
    student = OLSSScheduler.from_coefficients(fit_olss(*teacher(), 5), DDIMScheduler(**SD).config)
    with pytest.raises(ValueError, match="was fitted for 5"):
        student.set_timesteps(6)
    with pytest.raises(ValueError, match="num_inference_steps only"):
        student.set_timesteps(timesteps=[9, 8, 7, 6, 5])
    student.set_timesteps(5)
    student.set_begin_index(2)
    x = noise(1, 1)
    with pytest.raises(ValueError, match="step 2 came where step 0 was due"):
        student.step(x, student.timesteps[2], x)


@pytest.mark.parametrize(
    "make",
    [
        lambda: diffusers.EulerAncestralDiscreteScheduler(),
        lambda: diffusers.DDPMScheduler(),
        lambda: diffusers.DPMSolverMultistepScheduler(algorithm_type="sde-dpmsolver++"),
        lambda: diffusers.FlowMatchEulerDiscreteScheduler(stochastic_sampling=True),
        lambda: diffusers.HeunDiscreteScheduler(),
    ],
)
def test_stochastic_and_multi_call_teachers_are_refused(make):
    with pytest.raises(ValueError, match="record"):
        OLSSRecorder(make())


def test_noise_in_ddim_is_refused():
    recorder = OLSSRecorder(DDIMScheduler())
    recorder.set_timesteps(4)
    x = torch.zeros(1, 2)
    with pytest.raises(ValueError, match="eta is 0.5"):
        recorder.step(x, recorder.timesteps[0], x, eta=0.5)


def test_pipeline_fits_and_reloads_bit_equal(shapes_unet, tmp_path):
    recorder = OLSSRecorder(DDIMScheduler.from_config(shapes_unet.scheduler.config, timestep_spacing="trailing"))
    shapes_unet.scheduler = recorder
    zoo.generate(shapes_unet, ["a red circle"], 6, 1.0)
    shapes_unet.scheduler = OLSSScheduler.fit(recorder, 3)
    shapes_unet.save_pretrained(tmp_path)
    reloaded = DiffusionPipeline.from_pretrained(tmp_path)
    reloaded.set_progress_bar_config(disable=True)
    assert type(reloaded.scheduler) is OLSSScheduler
    ours, theirs = (zoo.generate(p, ["a red circle"], 3, 1.0) for p in (shapes_unet, reloaded))
    assert torch.equal(ours, theirs)


def test_flow_pipeline(shapes_dit):
    shapes_dit.scheduler = recorder = OLSSRecorder(shapes_dit.scheduler)
    zoo.generate(shapes_dit, ["a red circle"], 6, 1.0)
    shapes_dit.scheduler = OLSSScheduler.fit(recorder, 3)
    assert zoo.generate(shapes_dit, ["a red circle"], 3, 1.0).isfinite().all()
