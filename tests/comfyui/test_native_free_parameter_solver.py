from __future__ import annotations

import pytest
import torch

from diffusers_ext import FreeParameterScheduler
from diffusers_ext.prediction import from_x0
from diffusers_ext.schedulers._native import native_schedule
from diffusers_ext.zoo.analytic import GaussianMixture


pytestmark = pytest.mark.comfy
MIXTURE = GaussianMixture(torch.randn(3, 4, 16, 16, generator=torch.Generator().manual_seed(0)), variances=0.1)
CUSTOM = {"n0": 14, "rho0": 6.0, "stop_index": 10, "time_rho": 1.2}


@pytest.mark.parametrize(
    "preset, steps, solver",
    [("sd15", 5, "euler"), ("sd15", 8, "dpmpp_2m"), ("custom", 10, "euler"), ("custom", 20, "dpmpp_2m")],
)
def test_same_latents_as_the_scheduler(comfy, dx_nodes, native_pipe, sample_analytic, preset, steps, solver):
    model = native_pipe("shapes-unet")[0]
    options = {"preset": preset, **(CUSTOM if preset == "custom" else {})}
    scheduler = FreeParameterScheduler(**options, solver="first" if solver == "euler" else "2m")
    scheduler.noise_schedule = native_schedule(model.get_model_object("model_sampling"))
    scheduler.set_timesteps(steps)
    sigmas = dx_nodes["DXFreeParameterSigmas"].execute(model, {**options, "steps": str(steps)}).result[0]
    assert torch.allclose(sigmas, scheduler.sigmas, rtol=1e-6) and sigmas[-1] > 0
    x = noise = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(1))
    for i, t in enumerate(scheduler.timesteps):
        alpha, sigma = scheduler._levels[i]
        output = from_x0(MIXTURE.denoise(x, alpha, sigma), x.double(), alpha, sigma, "epsilon").float()
        x = scheduler.step(output, t, x).prev_sample
    native = sample_analytic(comfy.samplers.sampler_object(solver), sigmas, noise, MIXTURE)
    assert (native * scheduler._levels[-1][0] - x).abs().max() < 1e-5


def test_flow_models_are_refused(dx_nodes, native_pipe):
    with pytest.raises(ValueError, match="flow models"):
        dx_nodes["DXFreeParameterSigmas"].execute(native_pipe("shapes-dit")[0], {"preset": "sd15", "steps": "5"})
