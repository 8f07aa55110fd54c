from __future__ import annotations

import pytest
import torch

from diffusers_ext import BDIADDIMScheduler, zoo
from diffusers_ext.prediction import from_x0
from diffusers_ext.zoo.analytic import GaussianMixture


pytestmark = pytest.mark.comfy
MIXTURE = GaussianMixture(torch.randn(3, 4, 16, 16, generator=torch.Generator().manual_seed(0)), variances=0.1)


def scheduler_for(sampling, flow: bool, **options) -> BDIADDIMScheduler:
    """The scheduler with the noise levels of a ComfyUI model."""
    if flow:
        return BDIADDIMScheduler(prediction_type="flow_prediction", final_sigmas_type="zero", **options)
    bar = 1 / (1 + sampling.sigmas.double() ** 2)
    betas = 1 - bar / torch.cat([torch.ones(1), bar[:-1]])
    return BDIADDIMScheduler(trained_betas=betas.tolist(), final_sigmas_type="zero", **options)


@pytest.mark.parametrize("steps", [5, 8, 10, 20])
@pytest.mark.parametrize("name, prediction", [("shapes-unet", "epsilon"), ("shapes-dit", "flow_prediction")])
@pytest.mark.parametrize("gamma", [0.5, 1.0])
def test_same_latents_as_the_scheduler(dx_nodes, native_pipe, sample_analytic, name, prediction, steps, gamma):
    flow = prediction == "flow_prediction"
    sampling = native_pipe(name)[0].get_model_object("model_sampling")
    top, bottom = (1.0, 0.03) if flow else (14.6, float(sampling.sigmas[0]))
    sigmas = torch.cat([torch.linspace(top**0.3, bottom**0.3, steps) ** (1 / 0.3), torch.zeros(1)])
    sigmas[0] = top
    scheduler = scheduler_for(sampling, flow, gamma=gamma)
    scheduler.set_timesteps(sigmas=sigmas[:-1].tolist())
    noise = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(1))
    x = noise * scheduler._levels[0][1]  # ComfyUI adds sigma * noise below its noisiest level
    for i, t in enumerate(scheduler.timesteps):
        alpha, sigma = scheduler._levels[i]
        output = from_x0(MIXTURE.denoise(x, alpha, sigma), x.double(), alpha, sigma, prediction).float()
        x = scheduler.step(output, t, x).prev_sample
    sampler = dx_nodes["DXBDIASampler"].execute(gamma).result[0]
    native = sample_analytic(sampler, sigmas, noise, MIXTURE, name)
    assert (native - x).abs().max() < 1e-5


@pytest.mark.parametrize("name", ["shapes-unet", "shapes-unet-eps", "shapes-dit"])
def test_inverted_latents_come_back(comfy, dx_nodes, native_pipe, encode, name):
    """Both nodes on a shipped model with guidance, through ComfyUI's own sampling code."""
    if name not in zoo.names():
        pytest.skip(f"{name} is not shipped")
    model, clip, _ = native_pipe(name)
    positive, negative = encode(clip, "a large red circle on the left, plain blue background"), encode(clip, "")
    sigmas = comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), "normal", 12)
    channels = model.get_model_object("latent_format").latent_channels
    latent = 0.5 * torch.randn(1, channels, 16, 16, generator=torch.Generator().manual_seed(2))
    invert, sample = dx_nodes["DXBDIAInvert"], dx_nodes["DXBDIASampleFromPair"]
    pair = invert.execute(model, positive, negative, 2.0, sigmas, {"samples": latent}, 1.0).result[0]
    back = sample.execute(model, positive, negative, 2.0, pair).result[0]["samples"]
    assert back.shape == latent.shape
    assert (back - latent).abs().max() < 1e-3
    other = sample.execute(model, encode(clip, "a small green star"), negative, 2.0, pair).result[0]["samples"]
    assert (other - latent).abs().max() > 1e-2
