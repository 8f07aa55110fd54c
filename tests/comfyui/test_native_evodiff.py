from __future__ import annotations

import pytest
import torch

from diffusers_ext import EVODiffMultistepScheduler


pytestmark = pytest.mark.comfy


@pytest.mark.parametrize("steps", [5, 8, 10, 20])
@pytest.mark.parametrize("name", ["shapes-unet", "shapes-dit"])
def test_same_latents_as_the_scheduler(dx_nodes, scheduler_of, solved, mixture, sample_analytic, name, steps):
    scheduler = scheduler_of(EVODiffMultistepScheduler, name)
    scheduler.set_timesteps(steps)
    noise = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(1))
    ours = solved(scheduler, noise)
    if name == "shapes-dit":
        noise = noise / scheduler.sigmas[0]  # ComfyUI scales the first noise by sigma 0.999
    sampler = dx_nodes["DXEVODiffSampler"].execute("ddim", True).result[0]
    native = sample_analytic(sampler, scheduler.sigmas.clone(), noise, mixture, name)
    assert (native - ours).abs().max() < 1e-5
