from __future__ import annotations

import functools

import pytest
import torch

from diffusers_ext import StochasticInterpolantScheduler
from diffusers_ext.zoo.analytic import GaussianMixture


pytestmark = pytest.mark.comfy
MIXTURE = GaussianMixture(torch.randn(3, 4, 16, 16, generator=torch.Generator().manual_seed(0)), variances=0.1)
SEED = 11


@pytest.fixture
def sample_seeded(comfy, sample_analytic, monkeypatch):
    """`sample_analytic` with the seed that a sampling node would hand to ComfyUI, as the last argument."""
    plain = comfy.samplers.CFGGuider.sample

    def run(*args, seed):
        monkeypatch.setattr(comfy.samplers.CFGGuider, "sample", functools.partialmethod(plain, seed=seed))
        return sample_analytic(*args)

    return run


def node(dx_nodes, **options):
    defaults = {"profile": "sigma", "scale": 0.5, "integrator": "euler", "clip": 1.0, "last_step": "denoise"}
    return dx_nodes["DXFlowSDESampler"].execute(**{**defaults, **options}).result[0]


@pytest.mark.parametrize("steps", [5, 8, 10, 20])
@pytest.mark.parametrize("integrator", ["euler", "heun", "trapezoid"])
def test_same_latents_as_the_scheduler(dx_nodes, sample_seeded, steps, integrator):
    """Through ComfyUI's own sampling code, with the noise that its seed stands for."""
    scheduler = StochasticInterpolantScheduler(diffusion_scale=0.8, diffusion_profile="sin", integrator=integrator)
    scheduler.set_timesteps(sigmas=torch.linspace(1, 1 / steps, steps).tolist())
    x = noise = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(1))
    generator = torch.Generator().manual_seed(SEED + 1)
    for t in scheduler.timesteps:
        sigma = t.double() / 1000
        v = ((x - MIXTURE.denoise(x, 1 - sigma, sigma)) / sigma).float()
        x = scheduler.step(v, t, x, generator=generator).prev_sample
    sampler = node(dx_nodes, profile="sin", scale=0.8, integrator=integrator)
    native = sample_seeded(sampler, scheduler.sigmas, noise, MIXTURE, "shapes-dit", seed=SEED)
    assert (native - x).abs().max() < 1e-5


def test_scale_zero_is_core_euler(comfy, dx_nodes, sample_analytic):
    noise = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(1))
    sigmas = torch.linspace(1, 0, 9)
    ours = sample_analytic(node(dx_nodes, scale=0.0), sigmas, noise, MIXTURE, "shapes-dit")
    core = sample_analytic(comfy.samplers.sampler_object("euler"), sigmas, noise, MIXTURE, "shapes-dit")
    assert (ours - core).abs().max() < 1e-5


def test_seed_of_the_run_is_the_seed_of_the_noise(dx_nodes, sample_seeded):
    noise = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(1))
    sigmas = torch.linspace(1, 0, 7)
    runs = [sample_seeded(node(dx_nodes), sigmas, noise, MIXTURE, "shapes-dit", seed=s) for s in (3, 3, 4)]
    assert torch.equal(runs[0], runs[1]) and not torch.equal(runs[0], runs[2])


def test_other_models_are_refused(dx_nodes, sample_analytic):
    noise = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(1))
    with pytest.raises(ValueError, match="flow model"):
        sample_analytic(node(dx_nodes), torch.tensor([10.0, 1.0, 0.0]), noise, MIXTURE, "shapes-unet")
