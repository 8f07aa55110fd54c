from __future__ import annotations

import pytest
import torch

from diffusers_ext import EVODiffMultistepScheduler
from diffusers_ext.prediction import from_x0
from diffusers_ext.schedulers._native import native_schedule
from diffusers_ext.zoo.analytic import GaussianMixture


pytestmark = pytest.mark.comfy
MIXTURE = GaussianMixture(torch.randn(3, 4, 16, 16, generator=torch.Generator().manual_seed(0)), variances=0.1)


@pytest.mark.parametrize("steps", [5, 8, 10, 20])
@pytest.mark.parametrize("name, prediction", [("shapes-unet", "epsilon"), ("shapes-dit", "flow_prediction")])
def test_same_latents_as_the_scheduler(dx_nodes, native_pipe, sample_analytic, name, prediction, steps):
    scheduler = EVODiffMultistepScheduler(prediction_type=prediction)
    scheduler.noise_schedule = native_schedule(native_pipe(name)[0].get_model_object("model_sampling"))
    scheduler.set_timesteps(steps)
    x = noise = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(1))
    for i, t in enumerate(scheduler.timesteps):
        alpha, sigma = scheduler._levels[i]
        output = from_x0(MIXTURE.denoise(x, alpha, sigma), x.double(), alpha, sigma, prediction).float()
        x = scheduler.step(output, t, x).prev_sample
    if prediction == "flow_prediction":
        noise = noise / scheduler.sigmas[0]  # ComfyUI scales the first noise by sigma 0.999
    sampler = dx_nodes["DXEVODiffSampler"].execute("ddim", True).result[0]
    native = sample_analytic(sampler, scheduler.sigmas.clone(), noise, MIXTURE, name)
    assert (native - x).abs().max() < 1e-5
