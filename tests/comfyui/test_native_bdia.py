from __future__ import annotations

import pytest
import torch

from diffusers_ext import BDIADDIMScheduler, zoo


pytestmark = pytest.mark.comfy


@pytest.mark.parametrize("gamma", [0.5, 1.0])
@pytest.mark.parametrize("steps", [5, 8, 10, 20])
@pytest.mark.parametrize("name", ["shapes-unet", "shapes-dit"])
def test_same_latents_as_the_scheduler(dx_nodes, scheduler_of, parity_gap, name, steps, gamma):
    scheduler = scheduler_of(BDIADDIMScheduler, name, gamma=gamma, final_sigmas_type="zero")
    assert parity_gap(dx_nodes["DXBDIASampler"].execute(gamma).result[0], scheduler, name, steps) < 1e-5


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
