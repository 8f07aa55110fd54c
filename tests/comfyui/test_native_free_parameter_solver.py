from __future__ import annotations

import pytest
import torch

from diffusers_ext import FreeParameterScheduler


pytestmark = pytest.mark.comfy
CUSTOM = {"n0": 14, "rho0": 6.0, "stop_index": 10, "time_rho": 1.2}


@pytest.mark.parametrize(
    "preset, steps, solver",
    [("sd15", 5, "euler"), ("sd15", 8, "dpmpp_2m"), ("custom", 10, "euler"), ("custom", 20, "dpmpp_2m")],
)
def test_same_latents_as_the_scheduler(
    comfy, dx_nodes, native_pipe, scheduler_of, solved, mixture, sample_analytic, preset, steps, solver
):
    options = {"preset": preset, **(CUSTOM if preset == "custom" else {})}
    kind = "first" if solver == "euler" else "2m"
    scheduler = scheduler_of(FreeParameterScheduler, "shapes-unet", **options, solver=kind)
    scheduler.set_timesteps(steps)
    model = native_pipe("shapes-unet")[0]
    sigmas = dx_nodes["DXFreeParameterSigmas"].execute(model, {**options, "steps": str(steps)}).result[0]
    assert torch.allclose(sigmas, scheduler.sigmas, rtol=1e-6) and sigmas[-1] > 0
    noise = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(1))
    native = sample_analytic(comfy.samplers.sampler_object(solver), sigmas, noise, mixture)
    assert (native * scheduler._levels[-1][0] - solved(scheduler, noise)).abs().max() < 1e-5


def test_flow_models_are_refused(dx_nodes, native_pipe):
    with pytest.raises(ValueError, match="flow models"):
        dx_nodes["DXFreeParameterSigmas"].execute(native_pipe("shapes-dit")[0], {"preset": "sd15", "steps": "5"})
