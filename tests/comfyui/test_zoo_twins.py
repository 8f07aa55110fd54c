"""The shipped models give the same numbers in ComfyUI's classes as in diffusers'."""

from __future__ import annotations

import functools

import pytest
import torch

from diffusers_ext import zoo
from diffusers_ext.zoo import comfy_layout


CAPTIONS = ["a small red circle left of a large green square, striped blue background", "", "zebra 42!"]
UNETS = [n for n in zoo.names() if "unet" in n]
STEPS = 20

load = functools.cache(zoo.load)


def _noise(n: int = 2) -> torch.Tensor:
    return torch.randn(n, 4, 16, 16, generator=torch.Generator().manual_seed(3))


def _states(pipe, caption: str):
    """What the diffusers pipeline feeds its denoiser: (token states, pooled vector or None)."""
    if hasattr(pipe, "unet"):
        ids = pipe.tokenizer(caption, padding="max_length", truncation=True, return_tensors="pt").input_ids
        return pipe.text_encoder(ids)[0], None
    states, pooled, _ = pipe.encode_prompt(caption, None, max_sequence_length=pipe.tokenizer.model_max_length)
    return states, pooled


@pytest.mark.parametrize("name", zoo.names())
@pytest.mark.parametrize("caption", CAPTIONS)
@torch.no_grad()
def test_prompt_embeddings(native_pipe, encode, name, caption):
    states, pooled = _states(load(name), caption)
    ((native_states, extra),) = encode(native_pipe(name)[1], caption)
    torch.testing.assert_close(native_states, states, atol=1e-4, rtol=0)
    if pooled is not None:
        torch.testing.assert_close(extra["pooled_output"], pooled, atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", zoo.names())
@torch.no_grad()
def test_autoencoder(native_pipe, name):
    reference, native = load(name).vae, native_pipe(name)[2]
    picture = torch.rand(2, 64, 64, 3, generator=torch.Generator().manual_seed(1))
    latent = reference.encode(picture.movedim(-1, 1) * 2 - 1).latent_dist.mode()
    torch.testing.assert_close(native.encode(picture), latent, atol=1e-4, rtol=0)
    decoded = (reference.decode(latent).sample / 2 + 0.5).clamp(0, 1).movedim(1, -1)
    torch.testing.assert_close(native.decode(latent), decoded, atol=1e-4, rtol=0)


def _sample(comfy, native, encode, sigmas, cfg: float) -> torch.Tensor:
    """20 Euler steps in ComfyUI, latents in the scale of the diffusers pipelines."""
    model, clip, _ = native
    sampled = comfy.sample.sample_custom(
        model,
        _noise(),
        cfg,
        comfy.samplers.sampler_object("euler"),
        sigmas,
        encode(clip, CAPTIONS[0]),
        encode(clip, ""),
        torch.zeros_like(_noise()),
        seed=0,
        disable_pbar=True,
    )
    return model.get_model_object("latent_format").process_in(sampled)


@pytest.mark.parametrize("name", UNETS)
@torch.no_grad()
def test_unet_picture_after_20_steps(comfy, native_pipe, encode, name):
    pipe = load(name)
    expected = pipe(
        [CAPTIONS[0]] * 2, num_inference_steps=STEPS, guidance_scale=3.0, latents=_noise(), output_type="latent"
    ).images
    # DDIM without noise is Euler in sigma = sqrt((1 - alpha) / alpha).
    sampling = native_pipe(name)[0].get_model_object("model_sampling")
    sigmas = torch.cat([sampling.sigmas[pipe.scheduler.timesteps], torch.zeros(1)])
    torch.testing.assert_close(_sample(comfy, native_pipe(name), encode, sigmas, 3.0), expected, atol=1e-4, rtol=0)


@torch.no_grad()
def test_dit_picture_after_20_steps(comfy, native_pipe, encode):
    pipe = load("shapes-dit")
    packed = pipe._pack_latents(_noise(), 2, 4, 16, 16)
    expected = pipe(
        [CAPTIONS[0]] * 2,
        negative_prompt=[""] * 2,
        true_cfg_scale=3.0,
        guidance_scale=1.0,
        height=64,
        width=64,
        num_inference_steps=STEPS,
        max_sequence_length=pipe.tokenizer.model_max_length,
        latents=packed,
        output_type="latent",
    ).images
    sampled = _sample(comfy, native_pipe("shapes-dit"), encode, pipe.scheduler.sigmas, 3.0)
    torch.testing.assert_close(pipe._pack_latents(sampled, 2, 4, 16, 16), expected, atol=1e-4, rtol=0)


def test_loader_offers_the_shipped_models(dx_nodes):
    (combo,) = dx_nodes["DXLoadShapes"].define_schema().inputs
    assert list(combo.options) == zoo.names()


def test_unknown_model_is_named():
    with pytest.raises(ValueError, match="shapes-unt.*Did you mean 'shapes-unet'"):
        comfy_layout.model_folder("shapes-unt")


def test_unnamed_tensors_are_refused():
    config = comfy_layout.read_config("shapes-unet", "unet")
    with pytest.raises(ValueError, match="no ComfyUI name for the tensor 'extra.weight'"):
        comfy_layout.unet_state({"extra.weight": torch.zeros(1)}, config)


def test_a_vae_with_attention_is_refused():
    config = {**comfy_layout.read_config("shapes-unet", "vae"), "mid_block_add_attention": True}
    with pytest.raises(ValueError, match="attention in its middle block"):
        comfy_layout.vae_state({}, config)
