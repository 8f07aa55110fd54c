from __future__ import annotations

from types import SimpleNamespace

import diffusers
import pytest
import torch

from diffusers_ext import OTStart, SemiDiscreteOT
from diffusers_ext.prediction import from_x0
from diffusers_ext.schedulers._start import native_level
from diffusers_ext.zoo.analytic import GaussianMixture


pytestmark = pytest.mark.comfy
MIXTURE = GaussianMixture(torch.randn(3, 4, 16, 16, generator=torch.Generator().manual_seed(0)), variances=0.1)
CLEAN = MIXTURE.sample(12, torch.Generator().manual_seed(1)).float()


def scheduler_for(sampling, flow: bool, sigmas: torch.Tensor):
    """diffusers' Euler with the noise levels of a ComfyUI model."""
    if flow:
        scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
        scheduler.set_timesteps(sigmas=sigmas[:-1].tolist())
        return scheduler
    bar = 1 / (1 + sampling.sigmas.double() ** 2)
    betas = 1 - bar / torch.cat([torch.ones(1), bar[:-1]])
    scheduler = diffusers.EulerDiscreteScheduler(trained_betas=betas.tolist())
    scheduler.set_timesteps(sigmas=sigmas.tolist())
    return scheduler


@pytest.fixture(scope="module")
def fitted(native_pipe):
    """`fitted(name, sigma)` -> a transport to targets at a noise level of a ComfyUI model."""

    def fit(name: str, sigma: torch.Tensor) -> SemiDiscreteOT:
        level = native_level(native_pipe(name)[0].get_model_object("model_sampling"), sigma)
        return SemiDiscreteOT.from_latents(CLEAN, level, seed=2).fit(max_iter=30, samples=200, progress=False)

    return fit


@pytest.mark.parametrize("steps", [5, 8, 10, 20])
@pytest.mark.parametrize("more", [0, 1])
@pytest.mark.parametrize("name, flow", [("shapes-unet", False), ("shapes-dit", True)])
def test_same_latents_as_the_scheduler(comfy, dx_nodes, native_pipe, sample_analytic, fitted, name, flow, more, steps):
    model = native_pipe(name)[0]
    sampling, left = model.get_model_object("model_sampling"), steps // 2 + more
    top = 1.0 if flow else float(sampling.sigma_max)
    sigmas = torch.cat([torch.linspace(top**0.5, 0.2, steps).square(), torch.zeros(1)])
    ot = fitted(name, sigmas[-1 - steps // 2])
    latent, tail = dx_nodes["DXOTStartLatent"].execute(model, sigmas, left, 2, 1, 5, "", ot).result
    empty, euler = torch.zeros(2, 4, 16, 16), comfy.samplers.sampler_object("euler")
    native = sample_analytic(euler, tail, empty, MIXTURE, name, latent["samples"])

    scheduler = scheduler_for(sampling, flow, sigmas)
    noise = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(5))
    start = OTStart(SimpleNamespace(scheduler=scheduler), ot, scheduler.timesteps[-left].item())
    x, timesteps = start.latents(noise, torch.Generator().manual_seed(6))
    assert len(timesteps) == left == len(tail) - 1
    for i, t in enumerate(timesteps):
        sigma = float(scheduler.sigmas[steps - left + i])
        alpha, prediction = (1 - sigma, "flow_prediction") if flow else (1.0, "epsilon")
        output = from_x0(MIXTURE.denoise(x, alpha, sigma), x.double(), alpha, sigma, prediction).float()
        if not flow:
            scheduler.scale_model_input(x, t)  # Euler wants to be asked
        x = scheduler.step(output, t, x).prev_sample
    assert (native - x).abs().max() < 1e-5


def test_fit_node_saves_resumes_and_stays_inside_its_folders(dx_nodes, native_pipe, monkeypatch, tmp_path):
    import comfy.model_management
    import folder_paths

    monkeypatch.setattr(folder_paths, "models_dir", str(tmp_path / "models"))
    monkeypatch.setattr(folder_paths, "get_output_directory", lambda: str(tmp_path / "output"))
    model, fit, begin = native_pipe("shapes-dit")[0], dx_nodes["DXOTFit"], dx_nodes["DXOTStartLatent"]
    sigmas, folder = torch.linspace(1, 0, 9), tmp_path / "output/ot_maps"
    arguments = (model, {"samples": CLEAN}, sigmas, 4, 55, 0, "mine")
    whole = fit.execute(*arguments).result[0]
    assert [p.name for p in folder.iterdir()] == ["mine.safetensors"]
    calls = []

    def interrupt() -> None:
        calls.append(1)
        if len(calls) == 52:
            raise comfy.model_management.InterruptProcessingException

    with monkeypatch.context() as stopped:
        stopped.setattr(comfy.model_management, "throw_exception_if_processing_interrupted", interrupt)
        with pytest.raises(comfy.model_management.InterruptProcessingException):
            fit.execute(*arguments[:-1], "other")
    assert [p.name for p in folder.glob("other*")] == ["other.unfinished"]
    assert torch.equal(fit.execute(*arguments[:-1], "other").result[0].h, whole.h)
    assert [p.name for p in folder.glob("other*")] == ["other.safetensors"]
    by_file = begin.execute(model, sigmas, 4, 1, 1, 3, "mine.safetensors").result[0]["samples"]
    assert torch.equal(by_file, begin.execute(model, sigmas, 4, 1, 1, 3, "", whole).result[0]["samples"])
    for bad in ("../x", "a/b", "", ".hidden", "a\\b"):
        assert fit.validate_inputs(bad) is not True
    with pytest.raises(ValueError, match="no map"):
        begin.execute(model, sigmas, 4, 1, 1, 3, "../output/ot_maps/mine.safetensors")
    with pytest.raises(ValueError, match="noisier"):
        begin.execute(model, sigmas, 2, 1, 1, 3, "", whole)
    for bad in (0, 9):
        with pytest.raises(ValueError, match="steps_left"):
            begin.execute(model, sigmas, bad, 1, 1, 3, "", whole)
