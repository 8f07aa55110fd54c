from __future__ import annotations

import json

import pytest
import torch

from diffusers_ext import EMS, SolverSchedule, USFScheduler
from diffusers_ext.schedulers._ems import log_snr_span
from diffusers_ext.schedulers._native import native_schedule
from diffusers_ext.schedulers.usf_s3 import levels_of


pytestmark = pytest.mark.comfy


@pytest.mark.parametrize("preset", ["dpmpp_2m", "unipc_bh2"])
@pytest.mark.parametrize("steps", [5, 8, 10, 20])
@pytest.mark.parametrize("name", ["shapes-unet", "shapes-dit"])
def test_same_latents_as_the_scheduler(
    dx_nodes, native_pipe, scheduler_of, solved, mixture, sample_analytic, name, preset, steps
):
    scheduler = scheduler_of(USFScheduler, name, preset=preset, skip_type="logSNR")
    scheduler.set_timesteps(steps)
    chosen = scheduler.preset_schedule(steps)
    noise = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(1))
    sampler, sigmas = dx_nodes["DXUSFSampler"].execute(native_pipe(name)[0], "ddim", 5, "normal", chosen).result
    assert torch.allclose(sigmas, scheduler.sigmas, rtol=1e-5)
    start = noise / sigmas[0] if name == "shapes-dit" else noise
    native = sample_analytic(sampler, sigmas, start, mixture, name)
    assert (native - solved(scheduler, noise)).abs().max() < 1e-5


def test_analytic_first_step(dx_nodes, native_pipe, scheduler_of, solved, mixture, sample_analytic):
    scheduler = scheduler_of(USFScheduler, "shapes-unet")
    plain = scheduler.preset_schedule(6, "dpmpp_2m")
    chosen = SolverSchedule(plain.times, plain.steps, "zero_x0")
    scheduler.load_schedule(chosen)
    scheduler.set_timesteps(5)
    noise = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(1))
    model = native_pipe("shapes-unet")[0]
    sampler, sigmas = dx_nodes["DXUSFSampler"].execute(model, "ddim", 5, "normal", chosen).result
    native = sample_analytic(sampler, sigmas, noise, mixture, "shapes-unet")
    assert (native - solved(scheduler, noise)).abs().max() < 1e-5


def test_named_solver_takes_comfyui_noise_levels(comfy, dx_nodes, native_pipe, mixture, sample_analytic):
    model = native_pipe("shapes-unet")[0]
    sampler, sigmas = dx_nodes["DXUSFSampler"].execute(model, "dpmpp_2m", 8, "karras").result
    sampling = model.get_model_object("model_sampling")
    assert torch.allclose(sigmas, comfy.samplers.calculate_sigmas(sampling, "karras", 8), rtol=1e-4)
    noise = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(1))
    core = comfy.samplers.sampler_object("dpmpp_2m")
    ours, theirs = (sample_analytic(s, sigmas, noise, mixture) for s in (sampler, core))
    assert (ours - theirs).abs().max() < 0.1  # core's is second order before the end as well
    with pytest.raises(ValueError, match="same USF Sampler"):
        sample_analytic(sampler, sigmas[1:], noise, mixture)


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


def test_statistics_reach_the_sampler_and_the_search(
    dx_nodes, native_pipe, scheduler_of, solved, mixture, sample_analytic, monkeypatch, tmp_path
):
    """v3 steps: the same latents as the scheduler with the same statistics, and a search that may use them."""
    import folder_paths

    monkeypatch.setattr(folder_paths, "get_output_directory", lambda: str(tmp_path))
    model, clip, _ = native_pipe("shapes-unet")
    scheduler = scheduler_of(USFScheduler, "shapes-unet", preset="v3_2m", skip_type="logSNR")
    ems = EMS.constant(*log_snr_span(scheduler.noise_schedule), 400, 0.7, -0.2, 0.05)
    scheduler.load_ems(ems)
    scheduler.set_timesteps(6)
    chosen = scheduler.preset_schedule(6)
    noise = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(1))
    sampler, sigmas = dx_nodes["DXUSFSampler"].execute(model, "ddim", 5, "normal", chosen, ems).result
    native = sample_analytic(sampler, sigmas, noise, mixture, "shapes-unet")
    assert (native - solved(scheduler, noise)).abs().max() < 1e-5
    without = dx_nodes["DXUSFSampler"].execute(model, "ddim", 5, "normal", chosen).result[0]
    with pytest.raises(ValueError, match="needs the statistics"):
        sample_analytic(without, sigmas, noise, mixture, "shapes-unet")
    condition = clip.encode_from_tokens_scheduled(clip.tokenize("a red circle"), show_pbar=False)
    latent = {"samples": torch.zeros(1, 4, 16, 16)}
    node = dx_nodes["DXUSFSearch"]
    found = node.execute(model, condition, condition, latent, 1.0, 3, 5, 0, "v3", 2, ems).result[0]
    assert found.calls <= 3
