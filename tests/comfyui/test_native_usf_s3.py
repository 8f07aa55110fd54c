from __future__ import annotations

import json

import pytest
import torch

from diffusers_ext import SolverSchedule, USFScheduler
from diffusers_ext.prediction import from_x0
from diffusers_ext.schedulers._native import native_schedule
from diffusers_ext.schedulers.usf_s3 import levels_of
from diffusers_ext.zoo.analytic import GaussianMixture


pytestmark = pytest.mark.comfy
MIXTURE = GaussianMixture(torch.randn(3, 4, 16, 16, generator=torch.Generator().manual_seed(0)), variances=0.1)


def sampled(scheduler, prediction, noise):
    x = noise
    for i, t in enumerate(scheduler.timesteps):
        alpha, sigma = scheduler._levels[i]
        inputs = scheduler.scale_model_input(x, t)
        output = from_x0(MIXTURE.denoise(inputs, alpha, sigma), inputs.double(), alpha, sigma, prediction).float()
        x = scheduler.step(output, t, x).prev_sample
    return x


@pytest.mark.parametrize("steps", [5, 8, 10, 20])
@pytest.mark.parametrize("preset", ["dpmpp_2m", "unipc_bh2"])
@pytest.mark.parametrize("name, prediction", [("shapes-unet", "epsilon"), ("shapes-dit", "flow_prediction")])
def test_same_latents_as_the_scheduler(dx_nodes, native_pipe, sample_analytic, name, prediction, preset, steps):
    model = native_pipe(name)[0]
    scheduler = USFScheduler(preset=preset, prediction_type=prediction, skip_type="logSNR")
    scheduler.noise_schedule = native_schedule(model.get_model_object("model_sampling"))
    scheduler.set_timesteps(steps)
    chosen = scheduler.preset_schedule(steps)
    noise = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(1))
    sampler, sigmas = dx_nodes["DXUSFSampler"].execute(model, "ddim", 5, "normal", chosen).result
    assert torch.allclose(sigmas, scheduler.sigmas, rtol=1e-5)
    start = noise / sigmas[0] if prediction == "flow_prediction" else noise
    native = sample_analytic(sampler, sigmas, start, MIXTURE, name)
    assert (native - sampled(scheduler, prediction, noise)).abs().max() < 1e-5


def test_analytic_first_step(dx_nodes, native_pipe, sample_analytic):
    model = native_pipe("shapes-unet")[0]
    scheduler = USFScheduler()
    scheduler.noise_schedule = native_schedule(model.get_model_object("model_sampling"))
    plain = scheduler.preset_schedule(6, "dpmpp_2m")
    chosen = SolverSchedule(plain.times, plain.steps, "zero_x0")
    scheduler.load_schedule(chosen)
    scheduler.set_timesteps(5)
    noise = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(1))
    sampler, sigmas = dx_nodes["DXUSFSampler"].execute(model, "ddim", 5, "normal", chosen).result
    native = sample_analytic(sampler, sigmas, noise, MIXTURE, "shapes-unet")
    assert (native - sampled(scheduler, "epsilon", noise)).abs().max() < 1e-5


def test_named_solver_takes_comfyui_noise_levels(comfy, dx_nodes, native_pipe, sample_analytic):
    model = native_pipe("shapes-unet")[0]
    sampler, sigmas = dx_nodes["DXUSFSampler"].execute(model, "dpmpp_2m", 8, "karras").result
    sampling = model.get_model_object("model_sampling")
    assert torch.allclose(sigmas, comfy.samplers.calculate_sigmas(sampling, "karras", 8), rtol=1e-4)
    noise = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(1))
    core = comfy.samplers.sampler_object("dpmpp_2m")
    ours, theirs = (sample_analytic(s, sigmas, noise, MIXTURE) for s in (sampler, core))
    assert (ours - theirs).abs().max() < 0.1  # core's is second order before the end as well
    with pytest.raises(ValueError, match="same USF Sampler"):
        sample_analytic(sampler, sigmas[1:], noise, MIXTURE)


def test_search_saves_a_better_schedule(dx_nodes, native_pipe, monkeypatch, tmp_path):
    import folder_paths

    monkeypatch.setattr(folder_paths, "models_dir", str(tmp_path / "models"))
    monkeypatch.setattr(folder_paths, "get_output_directory", lambda: str(tmp_path / "output"))
    model, clip, _ = native_pipe("shapes-unet")
    condition = clip.encode_from_tokens_scheduled(clip.tokenize("a red circle"), show_pbar=False)
    latent = {"samples": torch.zeros(2, 4, 16, 16)}
    node = dx_nodes["DXUSFSearch"]
    found = node.execute(model, condition, condition, latent, 1.0, 3, 8, 0, "mine").result[0]
    path = tmp_path / "output/usf/mine.json"
    assert SolverSchedule.from_dict(json.loads(path.read_text())) == found and found.calls <= 3
    assert len(levels_of(found, native_schedule(model.get_model_object("model_sampling")))) == len(found.times)
    sampler, sigmas = dx_nodes["DXUSFSampler"].execute(model, "mine.json", 5, "normal").result
    assert len(sigmas) == len(found.times)
    for bad in ("../x", "a/b", "", ".hidden", "a\\b"):
        assert node.validate_inputs(bad) is not True
    with pytest.raises(ValueError, match="no solver schedule"):
        dx_nodes["DXUSFSampler"].execute(model, "other.json", 5, "normal")
