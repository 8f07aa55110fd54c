from __future__ import annotations

import math

import pytest
import torch
from diffusers import DDIMScheduler, DiffusionPipeline, FlowMatchEulerDiscreteScheduler

from diffusers_ext import FreeParameterScheduler, FreeParameterSigmas, tune_free_parameters, zoo
from diffusers_ext.schedulers.free_parameter_solver import PRESETS
from diffusers_ext.zoo.analytic import AnalyticDenoiser, GaussianMixture, schedule


SD = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
MIXTURE = GaussianMixture(torch.randn(4, 8, generator=torch.Generator().manual_seed(0)), variances=0.05)


def noise(n: int = 64, seed: int = 1) -> torch.Tensor:
    return torch.randn(n, 8, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def k_diffusion(x: torch.Tensor, sigmas: torch.Tensor, second_order: bool) -> torch.Tensor:
    """DPM-Solver++ 1 or 2M in k-diffusion's variables (x = x0 + sigma noise), written independently."""
    old = None
    for i in range(len(sigmas) - 1):
        d = MIXTURE.denoise(x, 1.0, sigmas[i])
        h = torch.log(sigmas[i] / sigmas[i + 1])
        use = d
        if second_order and old is not None:
            r = torch.log(sigmas[i - 1] / sigmas[i]) / h
            use = (1 + 1 / (2 * r)) * d - 1 / (2 * r) * old
        x = sigmas[i + 1] / sigmas[i] * x - torch.expm1(-h) * use
        old = d
    return x


def drive(scheduler, steps: int, x: torch.Tensor, data=MIXTURE) -> tuple[torch.Tensor, int]:
    scheduler.set_timesteps(steps)
    model = AnalyticDenoiser(data, scheduler.noise_schedule, scheduler.config.prediction_type)
    for i, t in enumerate(scheduler.timesteps):
        exact = scheduler.noise_schedule.timestep(torch.tensor(scheduler._log_snr[i], dtype=torch.float64))
        x = scheduler.step(model(x, exact), t, x).prev_sample
    return x, model.calls


def test_sigmas_are_the_published_ones():
    sigmas, timesteps = FreeParameterSigmas("sd15", 5)
    expected = [14.6146, 4.5188, 1.9615, 1.0010, 0.5015, 0.1320]
    assert sigmas.tolist() == pytest.approx(expected, abs=1e-3)
    assert timesteps.tolist() == pytest.approx([999, 772.5, 556.7, 354.2, 170.0, 18.3], abs=0.05)
    eight = next(iter(FreeParameterSigmas("sd15", 8)))
    assert eight.tolist() == pytest.approx(
        [14.6146, 6.7121, 3.6076, 2.1723, 1.4045, 0.9366, 0.6169, 0.3725, 0.1472], abs=1e-3
    )


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("steps", [4, 5, 6, 8])
def test_presets_make_n_calls_and_stop_above_zero(preset, steps):
    scheduler = FreeParameterScheduler(**SD, preset=preset)
    x, calls = drive(scheduler, steps, noise())
    assert calls == steps and len(scheduler.timesteps) == steps and torch.isfinite(x).all()
    assert scheduler.sigmas[-1] > 0.05 and (scheduler.sigmas.diff() < 0).all()
    assert not torch.equal(scheduler.timesteps[1:], scheduler.timesteps[1:].round())


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("steps, second_order", [(4, False), (5, False), (6, False), (8, True)])
def test_same_as_k_diffusion(steps, second_order, prediction):
    scheduler = FreeParameterScheduler(**SD, prediction_type=prediction)
    x = noise()
    ours, _ = drive(scheduler, steps, x)
    sigmas = torch.exp(-torch.tensor(scheduler._log_snr, dtype=torch.float64))
    scale = scheduler._levels[0][0], scheduler._levels[-1][0]
    expected = k_diffusion(x / scale[0], sigmas, second_order)
    assert (ours / scale[1] - expected).abs().max() < 1e-6
    kept = FreeParameterScheduler(**SD, prediction_type=prediction, rescale_final=True)
    assert (drive(kept, steps, x)[0] - expected).abs().max() < 1e-6


def test_solver_can_be_chosen():
    x = noise()
    results = {s: drive(FreeParameterScheduler(**SD, solver=s), 8, x)[0] for s in ("auto", "first", "2m")}
    assert torch.equal(results["auto"], results["2m"]) and not torch.equal(results["first"], results["2m"])
    results = {s: drive(FreeParameterScheduler(**SD, solver=s), 5, x)[0] for s in ("auto", "first")}
    assert torch.equal(results["auto"], results["first"])


def test_denoise_makes_one_more_call_to_clean():
    scheduler = FreeParameterScheduler(**SD, stop="denoise")
    x, calls = drive(scheduler, 5, noise())
    plain = FreeParameterScheduler(**SD)
    before, _ = drive(plain, 5, noise())
    assert calls == 6 and scheduler.sigmas[-1] == 0
    assert (x - MIXTURE.denoise(before, *plain._levels[-1])).abs().max() < 1e-9


def leading_ddim(data, steps: int, x: torch.Tensor) -> torch.Tensor:
    table = schedule("sd")
    times = [(steps - 1 - i) * (1000 // steps) + 1 for i in range(steps)]
    levels = [*zip(*(v.tolist() for v in table.levels(table.log_snr(torch.tensor(times))))), (1.0, 0.0)]
    for (a, s), (at, st) in zip(levels, levels[1:]):
        d = data.denoise(x, a, s)
        x = at * d + st / s * (x - a * d)
    return x


@pytest.mark.parametrize("dimensions", [2, 8, 32])
def test_five_calls_beat_ddim_on_leading_timesteps(dimensions):
    """Residual noise is taken out by the exact denoiser before the comparison, as a VAE would hide it."""
    means = torch.randn(8, dimensions, generator=torch.Generator().manual_seed(0))
    data, table = GaussianMixture(means, variances=0.2), schedule("sd")
    x = torch.randn(256, dimensions, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    exact = data.ode(x, [v.item() for v in table.levels(table.table[-1])], (1.0, 0.0), 200)
    scheduler = FreeParameterScheduler(**SD)
    end, calls = drive(scheduler, 5, x, data)
    ours = data.denoise(end, *scheduler._levels[-1])
    assert calls == 5
    assert (ours - exact).square().mean() <= (leading_ddim(data, 5, x) - exact).square().mean()


def tuning(seed: int = 3):
    x = noise(128, seed)
    sd = schedule("sd")
    levels = sd.levels(sd.table[-1])
    exact = MIXTURE.ode(x, levels, (1.0, 0.0))

    def sampler(sigmas):
        end = k_diffusion(x / levels[0], sigmas, False)
        return MIXTURE.denoise(end, 1.0, sigmas[-1])

    return sampler, lambda y: (y - exact).square().mean().item()


def test_tuning():
    sampler, fitness = tuning()
    start = FreeParameterSigmas("sd15", 5)
    assert tune_free_parameters(sampler, fitness, start, (5.0,), (6,), (1.2,)) == start
    best = tune_free_parameters(sampler, fitness, start)
    assert fitness(sampler(next(iter(best)))) <= fitness(sampler(next(iter(start))))
    assert best.preset == "custom" and best.parameters[0] == 8


def test_interrupted_tuning_goes_on(tmp_path):
    sampler, fitness = tuning()
    start, file, scores = FreeParameterSigmas("sd15", 5), tmp_path / "tuning.safetensors", []

    def counted(y: torch.Tensor) -> float:
        if len(scores) == 7:
            scores.append(None)
            raise KeyboardInterrupt
        scores.append(fitness(y))
        return scores[-1]

    whole = tune_free_parameters(sampler, fitness, start, progress=False)
    with pytest.raises(KeyboardInterrupt):
        tune_free_parameters(sampler, counted, start, checkpoint=file)
    with pytest.raises(ValueError, match="no unfinished tuning with grid"):
        tune_free_parameters(sampler, counted, start, (5.0,), checkpoint=file)
    assert tune_free_parameters(sampler, counted, start, checkpoint=file) == whole
    assert len(scores) == 1 + 36 and not file.exists()


def test_batch_dtype_and_two_runs():
    scheduler = FreeParameterScheduler(**SD)
    together = drive(scheduler, 5, noise(3))[0]
    assert torch.allclose(drive(scheduler, 5, noise(3)[1:2])[0], together[1:2], atol=1e-10)
    assert torch.equal(drive(scheduler, 5, noise(3))[0], together)
    half = drive(scheduler, 5, noise(3).half())[0]
    assert half.dtype == torch.float16 and (half - together).abs().max() < 0.05


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: FreeParameterScheduler().set_timesteps(7), "4, 5, 6, 8"),
        (lambda: FreeParameterScheduler().set_timesteps(0), "from 1 up"),
        (lambda: FreeParameterScheduler(preset="sd3"), "sd15"),
        (lambda: FreeParameterScheduler(prediction_type="flow_prediction"), "not flow"),
        (lambda: FreeParameterScheduler.from_config(FlowMatchEulerDiscreteScheduler().config), "not flow"),
        (lambda: list(FreeParameterSigmas("custom", 5, 8, 5.0, 8)), "1 to 7"),
        (lambda: list(FreeParameterSigmas("custom", 5, 8, 5.0)), "needs n0"),
        (lambda: list(FreeParameterSigmas("sd15", 5, 8)), "custom"),
        (lambda: list(FreeParameterSigmas("custom", 5, 8, -1.0, 3)), "above 0"),
        (lambda: FreeParameterScheduler().set_timesteps(timesteps=[500]), "at least two"),
    ],
)
def test_bad_input(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_own_sigmas_stop_where_they_end():
    scheduler = FreeParameterScheduler(**SD)
    scheduler.set_timesteps(sigmas=[14.0, 3.0, 0.2])
    assert scheduler.num_inference_steps == 2 and scheduler.sigmas.tolist() == pytest.approx(
        [14.0, 3.0, 0.2], rel=1e-5
    )


def test_pipeline_reloads_bit_equal(shapes_unet, tmp_path):
    options = {"preset": "custom", "n0": 10, "rho0": 4.0, "stop_index": 7, "solver": "2m", "stop": "denoise"}
    shapes_unet.scheduler = FreeParameterScheduler.from_config(shapes_unet.scheduler.config, **options)
    shapes_unet.save_pretrained(tmp_path)
    reloaded = DiffusionPipeline.from_pretrained(tmp_path)
    reloaded.set_progress_bar_config(disable=True)
    assert type(reloaded.scheduler) is FreeParameterScheduler
    assert {k: reloaded.scheduler.config[k] for k in options} == options
    ours, theirs = (zoo.generate(p, ["a red circle"], 3, 1.0) for p in (shapes_unet, reloaded))
    assert torch.equal(ours, theirs)


def test_config_of_upstream_is_taken_over():
    ours = FreeParameterScheduler.from_config(DDIMScheduler(**SD).config)
    assert ours.config.beta_end == SD["beta_end"]
    ours.set_timesteps(4)
    assert ours.sigmas[0].item() == pytest.approx(math.exp(-schedule("sd").table[-1].item()), rel=1e-4)
