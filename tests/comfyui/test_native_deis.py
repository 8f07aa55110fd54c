from __future__ import annotations

import pytest
import torch

from diffusers_ext import DEISFullScheduler
from diffusers_ext.prediction import from_x0
from diffusers_ext.zoo.analytic import GaussianMixture


pytestmark = pytest.mark.comfy
MIXTURE = GaussianMixture(torch.randn(3, 4, 16, 16, generator=torch.Generator().manual_seed(0)), variances=0.1)


def scheduler_for(sampling, flow: bool, **options) -> DEISFullScheduler:
    """The scheduler with the noise levels of a ComfyUI model."""
    if flow:
        return DEISFullScheduler(prediction_type="flow_prediction", final_sigmas_type="zero", **options)
    bar = 1 / (1 + sampling.sigmas.double() ** 2)
    betas = 1 - bar / torch.cat([torch.ones(1), bar[:-1]])
    return DEISFullScheduler(trained_betas=betas.tolist(), final_sigmas_type="zero", **options)


@pytest.mark.parametrize("steps", [5, 8, 10, 20])
@pytest.mark.parametrize("name, prediction", [("shapes-unet", "epsilon"), ("shapes-dit", "flow_prediction")])
@pytest.mark.parametrize("method", ["t_ab", "rho_ab", "logrho_ab", "ipndm", "rho_rk"])
def test_same_latents_as_the_scheduler(dx_nodes, native_pipe, sample_analytic, name, prediction, steps, method):
    flow = prediction == "flow_prediction"
    sampling = native_pipe(name)[0].get_model_object("model_sampling")
    top, bottom = (1.0, 0.03) if flow else (14.6, float(sampling.sigmas[0]))
    sigmas = torch.cat([torch.linspace(top**0.3, bottom**0.3, steps) ** (1 / 0.3), torch.zeros(1)])
    sigmas[0] = top
    scheduler = scheduler_for(sampling, flow, method=method)
    scheduler.set_timesteps(sigmas=sigmas[:-1].tolist())
    noise = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(1))
    x = noise * scheduler._levels[0][1]  # ComfyUI adds sigma * noise below its noisiest level
    for i, t in enumerate(scheduler.timesteps):
        alpha, sigma = scheduler._levels[i]
        output = from_x0(MIXTURE.denoise(x, alpha, sigma), x.double(), alpha, sigma, prediction).float()
        x = scheduler.step(output, t, x).prev_sample
    sampler = dx_nodes["DXDEISExact"].execute(method, 3, "3kutta").result[0]
    native = sample_analytic(sampler, sigmas, noise, MIXTURE, name)
    assert (native - x).abs().max() < 1e-5


def test_node_refuses_a_degree_the_method_lacks(dx_nodes):
    node = dx_nodes["DXDEISExact"]
    assert node.validate_inputs("t_ab", 4) is True
    assert "0 to 3" in node.validate_inputs("ipndm", 4)
