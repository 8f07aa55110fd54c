"""DPM-Solver-v3 in ComfyUI's own sampling code: the scheduler's latents, and statistics of native models."""

from __future__ import annotations

import pytest
import torch

from diffusers_ext import EMS, DPMSolverV3MultistepScheduler
from diffusers_ext.schedulers._native import native_schedule
from diffusers_ext.schedulers.dpm_solver_v3 import log_snr_span
from diffusers_ext.zoo.analytic import GaussianMixture


pytestmark = pytest.mark.comfy


def smooth_statistics(schedule) -> EMS:
    """Curves that are neither trivial nor those of the model: parity has to hold for any."""
    low, high = log_snr_span(schedule)
    grid = torch.linspace(low, high, 121, dtype=torch.float64)
    wave = torch.linspace(0, 1, 4, dtype=torch.float64).reshape(1, 4, 1, 1)
    place = grid.reshape(-1, 1, 1, 1)
    l = torch.sigmoid(-place + wave)
    return EMS(grid, l, -0.2 * l + 0.1 * wave, 0.1 * torch.sin(place + wave), {"guidance_scale": "1.0"})


@pytest.mark.parametrize("with_ems", [True, False], ids=["ems", "degenerate"])
@pytest.mark.parametrize("steps", [5, 8, 10, 20])
@pytest.mark.parametrize("name", ["shapes-unet", "shapes-dit"])
def test_same_latents_as_the_scheduler(
    dx_nodes, scheduler_of, solved, mixture, sample_analytic, name, with_ems, steps
):
    scheduler = scheduler_of(DPMSolverV3MultistepScheduler, name)
    ems = smooth_statistics(scheduler.noise_schedule) if with_ems else None
    if with_ems:
        scheduler.load_ems(ems)
    scheduler.set_timesteps(steps)
    sigmas = scheduler.sigmas.clone()
    noise = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(1))
    ours = solved(scheduler, noise)
    if name == "shapes-dit":
        noise = noise / sigmas[0]  # ComfyUI scales the first noise by sigma 0.999; a scheduler gets it as it is
    sampler = dx_nodes["DXDPMv3Sampler"].execute(2, True, False, ems).result[0]
    assert (sample_analytic(sampler, sigmas, noise, mixture, name) - ours).abs().max() < 1e-5


@pytest.fixture
def analytic_model(comfy, native_pipe):
    """A native model whose network is the exact denoiser of one Gaussian."""

    def make(name):
        from diffusers_ext.zoo.analytic import comfy_denoiser

        model = native_pipe(name)[0].clone()
        flow = isinstance(model.get_model_object("model_sampling"), comfy.model_sampling.CONST)
        denoise = comfy_denoiser(GaussianMixture.gaussian(torch.full((4, 8, 8), 0.7), torch.full((), 0.09)), flow)
        model.set_model_unet_function_wrapper(lambda apply_model, args: denoise(args["input"], args["timestep"]))
        return model

    return make


@pytest.mark.parametrize("name", ["shapes-unet", "shapes-dit"])
def test_statistics_of_a_native_model(comfy, dx_nodes, native_pipe, analytic_model, name):
    """Against the closed form l = sigma^2 / (alpha^2 s^2 + sigma^2), through ComfyUI's own sampling code."""
    model = analytic_model(name)
    condition = [[torch.zeros(1, 20, 128), {"pooled_output": torch.zeros(1, 128)}]]
    latents = {"samples": torch.randn(4, 4, 8, 8)}
    node = dx_nodes["DXDPMv3ComputeEMS"]
    ems = node.execute(model, condition, condition, latents, 1.0, 20, "channel", 2, 0).result[0]
    alpha, sigma = native_schedule(model.get_model_object("model_sampling")).levels(ems.log_snr)
    exact = sigma**2 / (0.09 * alpha**2 + sigma**2)
    torch.testing.assert_close(ems.l[:, :, 0, 0], exact[:, None].expand(21, 4), atol=5e-3, rtol=0)
    assert ems.l.shape == (21, 4, 1, 1) and ems.metadata["guidance_scale"] == "1.0"


def test_files_stay_in_comfyui_folders(dx_nodes, monkeypatch, tmp_path):
    import folder_paths

    monkeypatch.setattr(folder_paths, "models_dir", str(tmp_path / "models"))
    monkeypatch.setattr(folder_paths, "get_output_directory", lambda: str(tmp_path / "output"))
    ems = EMS.constant(-5, 5, 20)
    dx_nodes["DXSaveEMS"].execute(ems, "mine")
    assert (tmp_path / "output/ems/mine.safetensors").is_file()
    again = dx_nodes["DXLoadEMS"].execute("mine.safetensors").result[0]
    assert torch.equal(again.l, ems.l)
    assert "mine.safetensors" in dx_nodes["DXLoadEMS"].define_schema().inputs[0].options
    for bad in ("../x", "a/b", "", ".hidden", "a\\b"):
        assert dx_nodes["DXSaveEMS"].validate_inputs(bad) is not True
    with pytest.raises(ValueError, match="no statistics file"):
        dx_nodes["DXLoadEMS"].execute("../output/ems/mine.safetensors")
