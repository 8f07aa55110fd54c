"""Seamless tiles as a MODEL patch: outputs of the diffusers side, one tile is exact, every model layout."""

from __future__ import annotations

import importlib

import pytest
import torch

import diffusers_ext
from diffusers_ext import SeamlessTilingConfig, zoo
from diffusers_ext._flux_tokens import pack, unpack


pytestmark = pytest.mark.comfy
CAPTION = "a small red circle left of a large green square, striped blue background"


@pytest.fixture
def patch(dx_nodes):
    def node(model, side=64, offset_mode="random", overlap=32, **options):
        defaults = {"random_reset_step": 4, "cover_on_reset": True, "tile_batch_size": 4, "noise_reference": True}
        values = {**defaults, "noise_ema": 0.0, "seed": 0, **options}
        return dx_nodes["DXSeamlessTiledDiffusion"].execute(model, side, offset_mode, overlap, **values).args[0]

    return node


@pytest.fixture
def sample(comfy, native_pipe, encode, recorded):
    """`sample(patch)` -> latents from the core KSampler, and every whole call of the network: arguments and output."""

    def run(patch=lambda model: model, size=(32, 24), steps=10, name="shapes-unet", sampler="euler"):
        model, clip, _ = native_pipe(name)
        model, calls = recorded(patch(model))
        latent = {"samples": torch.zeros(1, 4, *size)}
        conds = encode(clip, CAPTION), encode(clip, "")
        out = comfy.nodes.common_ksampler(model, 0, steps, 3.0, sampler, "normal", *conds, latent)[0]
        return out["samples"], calls

    return run


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"cover_on_reset": False, "random_reset_step": 3},
        {"offset_mode": "positive"},
        {"offset_mode": "complete", "noise_ema": 0.2},
        {"noise_reference": False},
    ],
)
def test_parity_with_diffusers(sample, patch, options):
    """Same inputs, step by step: same tiles, same references, same outputs."""
    _, calls = sample(lambda model: patch(model, seed=5, **options))
    unet = zoo.load("shapes-unet").unet
    config = SeamlessTilingConfig(tile_size=16, seed=5, num_inference_steps=10, **options)
    # One tensor for all steps: another text would be another kind of call.
    text = calls[0][2]
    with torch.no_grad(), diffusers_ext.apply(unet, config) as handle:
        for x, t, context, out in calls:
            assert torch.equal(context, text)
            torch.testing.assert_close(unet(x, t, text).sample, out, atol=1e-4, rtol=0)
        figures = handle.summary()["any-size-diffusion"]
    assert figures["calls"] == len(calls) == 10
    assert (figures["pixels_from_the_step_before"] > 0) == options.get("noise_reference", True)


def test_parity_with_diffusers_on_flux(sample, patch):
    """The same on an MMDiT, whose tokens the diffusers side gets packed; odd places of tiles too."""
    _, calls = sample(lambda model: patch(model, seed=5), name="shapes-dit")
    model = zoo.load("shapes-dit").transformer
    config = SeamlessTilingConfig(tile_size=16, seed=5, num_inference_steps=10)
    text, pooled = calls[0][2:4]
    ids = torch.cartesian_prod(torch.zeros(1), torch.arange(16.0), torch.arange(12.0))
    with torch.no_grad(), diffusers_ext.apply(model, config) as handle:
        for x, t, _, _, *_, out in calls:
            tokens = model(pack(x), text, pooled, t, ids, torch.zeros(text.shape[1], 3)).sample
            torch.testing.assert_close(unpack(tokens, 32, 24), out, atol=1e-4, rtol=0)
        figures = handle.summary()["any-size-diffusion"]
    assert figures["calls"] == 10 and figures["pixels_from_the_step_before"] > 0


def test_parity_with_diffusers_on_sd3(comfy, sd3_twins, patch):
    """Whose network asks no wrappers in ComfyUI, and has the positions of the picture's middle."""
    model, theirs, conds, calls = sd3_twins
    latent = {"samples": torch.zeros(1, 16, 16, 12)}
    patched = patch(patch(model, 128), seed=5)  # the second replaces the first
    comfy.nodes.common_ksampler(patched, 0, 10, 3.0, "euler", "normal", *conds, latent)
    config = SeamlessTilingConfig(tile_size=8, overlap=4, seed=5, num_inference_steps=10)
    text, pooled = calls[0][2:4]
    with torch.no_grad():
        plain = theirs(calls[-1][0], text, pooled, calls[-1][1]).sample
        with diffusers_ext.apply(theirs, config) as handle:
            for x, t, _, _, out in calls:
                torch.testing.assert_close(theirs(x, text, pooled, t).sample, out, atol=1e-4, rtol=0)
            figures = handle.summary()["any-size-diffusion"]
    assert figures["calls"] == len(calls) == 10 and figures["pixels_from_the_step_before"] > 0
    assert not torch.allclose(calls[-1][-1], plain, atol=1e-2)
    assert "forward" not in vars(model.model.diffusion_model)


@pytest.mark.parametrize("name", ["shapes-unet", "shapes-dit"])
def test_one_tile_is_exact_and_more_are_not(sample, patch, name):
    assert torch.equal(sample(patch, (16, 16), name=name)[0], sample(size=(16, 16), name=name)[0])
    tiled, plain = sample(patch, (32, 16), name=name)[0], sample(size=(32, 16), name=name)[0]
    assert torch.isfinite(tiled).all() and not torch.allclose(tiled, plain, atol=1e-2)


def test_runs_repeat_and_the_given_model_is_untouched(sample, patch, native_pipe):
    before = sample()[0]
    first = sample(patch)[0]
    unet = native_pipe("shapes-unet")[0].model.diffusion_model

    def fail(*_):
        raise KeyboardInterrupt

    handle = unet.middle_block[0].register_forward_pre_hook(fail)
    with pytest.raises(KeyboardInterrupt):
        sample(patch)
    handle.remove()
    assert torch.equal(sample(patch)[0], first)
    assert torch.equal(sample()[0], before)


def test_two_stage_sampler(sample, patch):
    first = sample(patch, sampler="heun")[0]
    assert torch.isfinite(first).all() and torch.equal(sample(patch, sampler="heun")[0], first)


def test_memory_for_one_condition_at_a_time_changes_nothing(sample, patch, native_pipe, monkeypatch):
    """Conditional and unconditional calls in turn: each has a reference of its own."""
    together = sample(patch)[0]
    monkeypatch.setattr(native_pipe("shapes-unet")[0].model, "memory_required", lambda *_, **__: 1e30)
    torch.testing.assert_close(sample(patch)[0], together, atol=1e-4, rtol=0)


def test_control_is_cut(comfy, native_pipe, patch):
    """Four equal tiles with constant residuals: every quarter is as if it were alone."""
    nodes = importlib.import_module("comfy_nodes.attention_any_size_diffusion")
    from diffusers_ext.caching._common import RunTracker

    unet = native_pipe("shapes-unet")[0].model.diffusion_model
    tiling = nodes.SeamlessTiling(SeamlessTilingConfig(tile_size=16))
    skips = []
    x, context, t = torch.randn(1, 4, 16, 16), torch.randn(1, 20, 128), torch.tensor([500.0])

    def call(x, residuals, **options):
        given = {"output": [torch.full(s, 0.3) for s in residuals], "middle": [torch.full(residuals[-1], 0.2)]}
        options = {"sigmas": torch.tensor([1.0]), "uuids": [0], "cond_or_uncond": [0], **options}
        with torch.no_grad():
            return unet(x, t, context, None, given if residuals[0] else None, options)

    with torch.no_grad():
        unet(
            x,
            t,
            context,
            transformer_options={"patches": {"input_block_patch": [lambda h, _: skips.append(h.shape) or h]}},
        )
    alone = call(x, skips)
    doubled = [(1, s[1], 2 * s[2], 2 * s[3]) for s in skips]
    options = {
        nodes.KEY: (RunTracker(nodes._Store), 10),
        "wrappers": {"diffusion_model": {nodes.KEY: [tiling.forward]}},
    }
    whole = call(x.repeat(1, 1, 2, 2), doubled, **options)
    torch.testing.assert_close(whole, alone.repeat(1, 1, 2, 2), atol=1e-5, rtol=0)


def test_refusals(native_pipe, patch):
    model = native_pipe("shapes-unet")[0]
    with pytest.raises(ValueError, match="takes multiples of 4 latents, 16 pixels"):
        patch(model, side=24)
    with pytest.raises(ValueError, match="offset_stride is 32, larger than a tile"):
        patch(model, overlap=128)
