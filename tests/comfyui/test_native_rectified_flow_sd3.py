from __future__ import annotations

import pytest
import torch

from diffusers_ext import FlowMatchTrainingScheduler, shift_timesteps
from diffusers_ext.zoo.analytic import GaussianMixture


pytestmark = pytest.mark.comfy
MIXTURE = GaussianMixture(torch.randn(3, 4, 16, 16, generator=torch.Generator().manual_seed(0)), variances=0.1)


@pytest.mark.parametrize("size, shift", [(64, 3.0), (128, 6.0)])
def test_noise_levels_are_shifted(dx_nodes, native_pipe, size, shift):
    model = native_pipe("shapes-dit")[0]
    patched = dx_nodes["DXResolutionShift"].execute(model, size, size, 64, 3.0).result[0]
    levels = patched.get_model_object("model_sampling").sigmas
    grid = torch.arange(1, 1001, dtype=torch.float64) / 1000
    assert torch.allclose(levels.double(), shift_timesteps(grid, shift), atol=1e-6)
    assert type(model.get_model_object("model_sampling")) is not type(patched.get_model_object("model_sampling"))
    sampling, before = patched.get_model_object("model_sampling"), model.get_model_object("model_sampling")
    assert torch.allclose(sampling.timestep(torch.tensor(0.3)), before.timestep(torch.tensor(0.3)))


@pytest.mark.parametrize("steps", [5, 8, 10, 20])
def test_same_latents_as_the_scheduler(comfy, dx_nodes, native_pipe, sample_analytic, steps):
    patched = dx_nodes["DXResolutionShift"].execute(native_pipe("shapes-dit")[0], 128, 64, 64, 1.5).result[0]
    scheduler = FlowMatchTrainingScheduler(shift=1.5 * 2**0.5)
    scheduler.set_timesteps(steps)
    levels = patched.get_model_object("model_sampling")
    sigmas = torch.cat([levels.sigma(torch.linspace(1, 1 / steps, steps) * levels.multiplier), torch.zeros(1)])
    assert torch.allclose(sigmas, scheduler.sigmas, atol=1e-6)
    x = noise = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(1))
    for sigma, t in zip(scheduler.sigmas, scheduler.timesteps):
        denoised = MIXTURE.denoise(x, 1 - sigma.double(), sigma).float()
        x = scheduler.step((x - denoised) / sigma, t, x).prev_sample
    native = sample_analytic(comfy.samplers.sampler_object("euler"), sigmas, noise, MIXTURE, patched)
    assert (native - x).abs().max() < 1e-5


def test_model_without_flow_is_refused(dx_nodes, native_pipe):
    with pytest.raises(ValueError, match="flow model"):
        dx_nodes["DXResolutionShift"].execute(native_pipe("shapes-unet")[0], 64, 64, 64, 3.0)
