from __future__ import annotations

import pytest
import torch

from diffusers_ext import DenoisingLangevinGibbs
from diffusers_ext.zoo.analytic import GaussianMixture


pytestmark = pytest.mark.comfy
MIXTURE = GaussianMixture(torch.randn(3, 4, 16, 16, generator=torch.Generator().manual_seed(0)), variances=0.1)
CAPTION = "a large red circle on the left, plain blue background"


@pytest.fixture
def analytic_model(comfy, native_pipe, monkeypatch):
    """A shipped model with the exact denoiser of `MIXTURE` in the place of its network."""
    from diffusers_ext.zoo.analytic import comfy_denoiser

    def make(name):
        model = native_pipe(name)[0].clone()
        denoise = comfy_denoiser(
            MIXTURE, isinstance(model.get_model_object("model_sampling"), comfy.model_sampling.CONST)
        )
        model.set_model_unet_function_wrapper(lambda apply_model, args: denoise(args["input"], args["timestep"]))
        monkeypatch.setattr(type(model.model.latent_format), "process_out", lambda self, latent: latent)
        return model

    return make


@pytest.fixture
def conditioning(native_pipe, encode):
    return lambda name: (encode(native_pipe(name)[1], CAPTION), encode(native_pipe(name)[1], ""))


@pytest.mark.parametrize("integrator", ["kar1", "kar2", "euler", "dpmpp_2m"])
@pytest.mark.parametrize("name", ["shapes-unet", "shapes-dit"])
def test_same_latents_as_the_class(dx_nodes, analytic_model, conditioning, name, integrator):
    """Both nodes through ComfyUI's own sampling code; then the class with the exact denoiser from the same chains."""
    model, prompts = analytic_model(name), conditioning(name)
    empty = {"samples": torch.zeros(2, 4, 16, 16)}
    init, sample = dx_nodes["DXDLGChainInit"], dx_nodes["DXDLGSample"]
    chain = init.execute(model, *prompts, 1.0, empty, 3, 0.8, "argmax", 30).result[0]
    latents, after = sample.execute(model, *prompts, 1.0, chain, 3, 2, 5, integrator).result
    assert latents["samples"].shape == (3, 4, 16, 16)
    from dataclasses import replace

    config = replace(chain["config"], n_skip=2, points=5, integrator=integrator)
    ours = DenoisingLangevinGibbs(
        lambda x, s: MIXTURE.denoise(x, 1.0, s).to(x.dtype), chain["classifier"], config
    )  # fmt: skip
    ours.load_state_dict(chain["state"])
    assert (ours.sample(3) - latents["samples"]).abs().max() < 1e-4
    assert (ours.x - after["state"]["x"]).abs().max() < 1e-4
    again = sample.execute(model, *prompts, 1.0, chain, 3, 2, 5, integrator).result[0]
    assert torch.equal(again["samples"], latents["samples"])
    more = sample.execute(model, *prompts, 1.0, after, 3, 2, 5, integrator).result[0]
    assert not torch.equal(more["samples"], latents["samples"])
