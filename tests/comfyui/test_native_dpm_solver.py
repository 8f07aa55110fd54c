from __future__ import annotations

import pytest
import torch

from diffusers_ext import DPMSolverFastScheduler
from diffusers_ext.prediction import from_x0
from diffusers_ext.zoo.analytic import GaussianMixture


pytestmark = pytest.mark.comfy
MIXTURE = GaussianMixture(torch.randn(3, 4, 16, 16, generator=torch.Generator().manual_seed(0)), variances=0.1)


def scheduler_for(sampling, flow: bool, **options) -> DPMSolverFastScheduler:
    """The scheduler with the noise levels of a ComfyUI model."""
    if flow:
        return DPMSolverFastScheduler(prediction_type="flow_prediction", final_sigmas_type="zero", **options)
    bar = 1 / (1 + sampling.sigmas.double() ** 2)
    betas = 1 - bar / torch.cat([torch.ones(1), bar[:-1]])
    return DPMSolverFastScheduler(trained_betas=betas.tolist(), final_sigmas_type="zero", **options)


@pytest.mark.parametrize("steps", [5, 8, 10, 20])
@pytest.mark.parametrize("name, prediction", [("shapes-unet", "epsilon"), ("shapes-dit", "flow_prediction")])
@pytest.mark.parametrize("algorithm, order", [("dpmsolver++", 3), ("dpmsolver++", 2), ("dpmsolver", 2)])
def test_same_latents_as_the_scheduler(
    dx_nodes, native_pipe, sample_analytic, name, prediction, steps, algorithm, order
):
    flow = prediction == "flow_prediction"
    if flow and algorithm == "dpmsolver":
        pytest.skip("the noise form divides by alpha")
    sampling = native_pipe(name)[0].get_model_object("model_sampling")
    top, bottom = (1.0, 0.03) if flow else (14.6, float(sampling.sigmas[0]))
    sigmas = torch.cat([torch.linspace(top**0.3, bottom**0.3, steps) ** (1 / 0.3), torch.zeros(1)])
    sigmas[0] = top
    scheduler = scheduler_for(sampling, flow, algorithm_type=algorithm, order=order)
    scheduler.set_timesteps(sigmas=sigmas[:-1].tolist())
    noise = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(1))
    x = noise * scheduler._levels[0][1]  # ComfyUI adds sigma * noise below its noisiest level
    for i, t in enumerate(scheduler.timesteps):
        alpha, sigma = scheduler._levels[i]
        output = from_x0(MIXTURE.denoise(x, alpha, sigma), x.double(), alpha, sigma, prediction).float()
        x = scheduler.step(output, t, x).prev_sample
    sampler = dx_nodes["DXDPMSolverFastExact"].execute(order, algorithm, "dpmsolver", "given").result[0]
    native = sample_analytic(sampler, sigmas, noise, MIXTURE, name)
    # the noise form adds up multiples of eps as large as sigma / alpha, here 14.6, in float32
    assert (native - x).abs().max() < (1e-5 if algorithm == "dpmsolver++" else 2e-5)


@pytest.mark.parametrize("name", ["shapes-unet", "shapes-dit"])
def test_adaptive_node_follows_the_ode(dx_nodes, native_pipe, sample_analytic, name):
    flow = name == "shapes-dit"
    top = 0.999 if flow else 14.6
    sigmas = torch.tensor([top, 0.5, 0.01, 0.0])
    noise = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(1))
    sampler = dx_nodes["DXDPMSolverAdaptivePP"].execute(3, 1e-4, 1e-4, "dpmsolver").result[0]
    native = sample_analytic(sampler, sigmas, noise, MIXTURE, name)
    first = (1 - top, top) if flow else (1.0, top)
    exact = MIXTURE.ode(top * noise.double(), first, (1.0, 1e-6), steps=200)
    assert (native - exact).abs().max() < 2e-3
