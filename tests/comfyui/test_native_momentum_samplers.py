from __future__ import annotations

import pytest
import torch

from diffusers_ext import DPMSolverMultistepMomentumScheduler, GHVBScheduler, PLMSMomentumScheduler
from diffusers_ext.prediction import from_x0
from diffusers_ext.zoo.analytic import GaussianMixture


pytestmark = pytest.mark.comfy
MIXTURE = GaussianMixture(torch.randn(3, 4, 16, 16, generator=torch.Generator().manual_seed(0)), variances=0.1)


def scheduler_for(make, sampling, flow: bool, **options):
    """The scheduler with the noise levels of a ComfyUI model."""
    if flow:
        return make(prediction_type="flow_prediction", final_sigmas_type="zero", **options)
    bar = 1 / (1 + sampling.sigmas.double() ** 2)
    betas = 1 - bar / torch.cat([torch.ones(1), bar[:-1]])
    return make(trained_betas=betas.tolist(), final_sigmas_type="zero", **options)


@pytest.mark.parametrize("steps", [5, 8, 10, 20])
@pytest.mark.parametrize("name, prediction", [("shapes-unet", "epsilon"), ("shapes-dit", "flow_prediction")])
@pytest.mark.parametrize(
    "node, arguments, make, options",
    [
        ("DXGHVBSampler", (1.5, False), GHVBScheduler, {"order": 1.5}),
        ("DXGHVBSampler", (2.5, True), GHVBScheduler, {"order": 2.5, "denoise_last": True}),
        ("DXPLMSHeavyBallSampler", (3.5, False, False), PLMSMomentumScheduler, {"order": 3.5}),
        ("DXPLMSHeavyBallSampler", (2.5, True, False), PLMSMomentumScheduler,
         {"order": 2.5, "momentum_type": "nesterov"}),
        ("DXDPMpp2MHeavyBall", (0.7,), DPMSolverMultistepMomentumScheduler, {"beta": 0.7}),
    ],
)  # fmt: skip
def test_same_latents_as_the_scheduler(
    dx_nodes, native_pipe, sample_analytic, name, prediction, steps, node, arguments, make, options
):
    flow = prediction == "flow_prediction"
    sampling = native_pipe(name)[0].get_model_object("model_sampling")
    top, bottom = (1.0, 0.03) if flow else (14.6, float(sampling.sigmas[0]))
    sigmas = torch.cat([torch.linspace(top**0.3, bottom**0.3, steps) ** (1 / 0.3), torch.zeros(1)])
    sigmas[0] = top
    scheduler = scheduler_for(make, sampling, flow, **options)
    scheduler.set_timesteps(sigmas=sigmas[:-1].tolist())
    noise = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(1))
    x = noise * scheduler._levels[0][1]  # ComfyUI adds sigma * noise below its noisiest level
    for i, t in enumerate(scheduler.timesteps):
        alpha, sigma = scheduler._levels[i]
        output = from_x0(MIXTURE.denoise(x, alpha, sigma), x.double(), alpha, sigma, prediction).float()
        x = scheduler.step(output, t, x).prev_sample
    sampler = dx_nodes[node].execute(*arguments).result[0]
    native = sample_analytic(sampler, sigmas, noise, MIXTURE, name)
    assert (native - x).abs().max() < 1e-5
