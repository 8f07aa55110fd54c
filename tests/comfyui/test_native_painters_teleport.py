from __future__ import annotations

import diffusers
import pytest
import torch

from diffusers_ext import GaussianStatistics, GaussianTeleport
from diffusers_ext.prediction import from_x0
from diffusers_ext.zoo.analytic import GaussianMixture


pytestmark = pytest.mark.comfy
MIXTURE = GaussianMixture(torch.randn(3, 4, 16, 16, generator=torch.Generator().manual_seed(0)), variances=0.1)
STATISTICS = GaussianStatistics.from_latents(MIXTURE.sample(200, torch.Generator().manual_seed(1)).float(), 12)


class Noise:
    """What RandomNoise hands on."""

    seed = 0

    def generate_noise(self, latent: dict) -> torch.Tensor:
        return torch.randn(latent["samples"].shape, generator=torch.Generator().manual_seed(self.seed))


def scheduler_for(sampling, flow: bool, sigmas: torch.Tensor):
    """diffusers' Euler with the noise levels of a ComfyUI model."""
    if flow:
        scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
        scheduler.set_timesteps(sigmas=sigmas[:-1].tolist())
        return scheduler
    bar = 1 / (1 + sampling.sigmas.double() ** 2)
    betas = 1 - bar / torch.cat([torch.ones(1), bar[:-1]])
    scheduler = diffusers.EulerDiscreteScheduler(trained_betas=betas.tolist(), timestep_spacing="leading")
    scheduler.set_timesteps(sigmas=sigmas.tolist())
    return scheduler


@pytest.mark.parametrize("steps", [5, 8, 10, 20])
@pytest.mark.parametrize("name, flow", [("shapes-unet", False), ("shapes-dit", True)])
def test_same_latents_as_the_scheduler(comfy, dx_nodes, native_pipe, sample_analytic, name, flow, steps):
    model = native_pipe(name)[0]
    sampling, skip = model.get_model_object("model_sampling"), max(1, steps // 4)
    top = 1.0 if flow else float(sampling.sigma_max)
    sigmas = torch.cat([torch.linspace(top**0.5, 0.2, steps).square(), torch.zeros(1)])
    empty = {"samples": torch.zeros(2, 4, 16, 16)}
    node = dx_nodes["DXAnalyticTeleport"]
    latent, tail = node.execute(model, Noise(), sigmas, empty, skip, "", STATISTICS).result
    native = sample_analytic(
        comfy.samplers.sampler_object("euler"), tail, torch.zeros(2, 4, 16, 16), MIXTURE, name, latent["samples"]
    )

    scheduler = scheduler_for(sampling, flow, sigmas)
    x, timesteps = GaussianTeleport(STATISTICS, scheduler).teleport(Noise().generate_noise(empty), skip)
    for i, t in enumerate(timesteps):
        sigma = float(scheduler.sigmas[skip + i])
        alpha = 1 - sigma if flow else 1.0
        x0 = MIXTURE.denoise(x, alpha, sigma)
        output = from_x0(x0, x.double(), alpha, sigma, "flow_prediction" if flow else "epsilon").float()
        x = scheduler.scale_model_input(x, t) * (sigma**2 + 1) ** 0.5 if not flow else x  # keeps its state in order
        x = scheduler.step(output, t, x).prev_sample
    assert (native - x).abs().max() < 1e-5


def test_gaussian_model_ends_where_the_whole_run_does(comfy, dx_nodes, native_pipe, sample_analytic):
    """On Gaussian data skipped steps cost nothing: the shorter run ends nearer to the exact solution."""
    mean = torch.randn(4, 16, 16, generator=torch.Generator().manual_seed(3))
    data = GaussianMixture.gaussian(mean, 0.5)
    statistics = GaussianStatistics(mean, torch.eye(1024), torch.full((1024,), 0.5))
    model, empty = native_pipe("shapes-unet")[0], {"samples": torch.zeros(1, 4, 16, 16)}
    sigmas = comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), "normal", 20)
    latent, tail = dx_nodes["DXAnalyticTeleport"].execute(model, Noise(), sigmas, empty, 5, "", statistics).result
    euler, noise = comfy.samplers.sampler_object("euler"), Noise().generate_noise(empty)
    ours = sample_analytic(euler, tail, torch.zeros_like(noise), data, latent=latent["samples"])
    whole = sample_analytic(euler, sigmas, noise, data)
    top = float(sigmas[0])
    exact = data.ode(noise.double() * (1 + top**2) ** 0.5, (1.0, top), (1.0, 0.0)).float()
    assert (ours - exact).norm() < (whole - exact).norm() < 0.2 * exact.norm()


def test_node_saves_and_loads_inside_the_folders(comfy, dx_nodes, native_pipe, monkeypatch, tmp_path):
    import folder_paths

    monkeypatch.setattr(folder_paths, "models_dir", str(tmp_path / "models"))
    monkeypatch.setattr(folder_paths, "get_output_directory", lambda: str(tmp_path / "output"))
    model, fit, jump = (
        native_pipe("shapes-dit")[0],
        dx_nodes["DXGaussianStatsFromLatents"],
        dx_nodes["DXAnalyticTeleport"],
    )
    latents = torch.randn(12, 4, 16, 16, generator=torch.Generator().manual_seed(2))
    stats = fit.execute(model, {"samples": latents}, 3, 0.0, "mine").result[0]
    scaled = model.model.process_latent_in(latents)
    torch.testing.assert_close(stats.mu, scaled.mean(0))
    again = GaussianStatistics.load(tmp_path / "output/gaussian_stats/mine.safetensors")
    assert torch.equal(again.U, stats.U) and torch.equal(again.l, stats.l)
    sigmas, empty = torch.linspace(1, 0, 9), {"samples": torch.zeros(1, 4, 16, 16)}
    by_file = jump.execute(model, Noise(), sigmas, empty, 2, "mine.safetensors").result[0]["samples"]
    connected = jump.execute(model, Noise(), sigmas, empty, 2, "", stats).result[0]["samples"]
    assert torch.equal(by_file, connected)
    for bad in ("../x", "a/b", "", ".hidden", "a\\b"):
        assert fit.validate_inputs(bad) is not True
    with pytest.raises(ValueError, match="no statistics"):
        jump.execute(model, Noise(), sigmas, empty, 2, "../output/gaussian_stats/mine.safetensors")
    for bad in (0, 8):
        with pytest.raises(ValueError, match="skip is"):
            jump.execute(model, Noise(), sigmas, empty, bad, "", stats)
    with pytest.raises(ValueError, match="this model and picture size"):
        jump.execute(model, Noise(), sigmas, {"samples": torch.zeros(1, 4, 8, 8)}, 2, "", stats)
