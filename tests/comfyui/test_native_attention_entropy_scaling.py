"""Attention-entropy scaling as a MODEL patch: outputs of the diffusers side, nothing at the trained size."""

from __future__ import annotations

import pytest
import torch

import diffusers_ext
from diffusers_ext import AttentionEntropyScalingConfig, HiDiffusionConfig, zoo


pytestmark = pytest.mark.comfy
CAPTION = "a small red circle left of a large green square, striped blue background"


@pytest.fixture
def patch(dx_nodes):
    def node(model, strength=1.0, start=0.0, end=1.0, base=64):
        return dx_nodes["DXAttentionEntropyScaling"].execute(model, base, base, strength, start, end).args[0]

    return node


@pytest.fixture
def sample(comfy, native_pipe, encode):
    """`sample(name, patch)` -> latents from the core KSampler, and every call of the model: arguments and output."""

    def run(name, patch=lambda model: model, size=32, steps=3):
        model, clip, _ = native_pipe(name)
        calls, model = [], patch(model).clone()

        def note(executor, x, timesteps, context, *rest, **kwargs):
            out = executor(x, timesteps, context, *rest, **kwargs)
            calls.append((x.clone(), timesteps.clone(), context.clone(), rest, dict(kwargs), out.clone()))
            return out

        model.add_wrapper_with_key(comfy.patcher_extension.WrappersMP.DIFFUSION_MODEL, "note", note)
        latent = {"samples": torch.zeros(1, 4, size, size)}
        conds = encode(clip, CAPTION), encode(clip, "")
        out = comfy.nodes.common_ksampler(model, 0, steps, 3.0, "euler", "normal", *conds, latent)[0]
        return out["samples"], calls

    return run


def test_unet_parity_with_diffusers(sample, patch):
    _, calls = sample("shapes-unet", patch)
    unet = zoo.load("shapes-unet").unet
    with torch.no_grad(), diffusers_ext.apply(unet, AttentionEntropyScalingConfig()) as handle:
        for x, t, context, *_, out in calls:
            torch.testing.assert_close(unet(x, t, context).sample, out, atol=1e-4, rtol=0)
        assert handle.summary()["attention-entropy-scaling"]["scaled"] == len(calls)


def test_parity_beside_hidiffusion(sample, patch, dx_nodes):
    """Windows and shrunk levels are compared with what their layers had in training, here as there."""
    options = {"trained_size": 64, "raunet": True, "window_attention": True, "t1_ratio": -1.0, "t2_ratio": -1.0}
    options |= {"aggressive": "auto", "seed": 0}

    def both(model):
        return patch(dx_nodes["DXHiDiffusion"].execute(model, **options).args[0])

    _, calls = sample("shapes-unet", both)
    unet = zoo.load("shapes-unet").unet
    configs = HiDiffusionConfig(num_inference_steps=len(calls)), AttentionEntropyScalingConfig()
    with torch.no_grad(), diffusers_ext.apply(unet, *configs) as handle:
        for x, t, context, *_, out in calls:
            torch.testing.assert_close(unet(x, t, context).sample, out, atol=1e-4, rtol=0)
        assert handle.summary()["hidiffusion"]["coarse_calls"] > 0


def test_a_level_of_one_token_is_refused_beforehand(native_pipe, patch):
    model = native_pipe("shapes-unet")[0]
    with pytest.raises(ValueError, match="single token on level"):
        patch(model, base=16)
    patch(model, base=16, strength=0.0)


def test_transformer_parity_with_diffusers(sample, patch, native_pipe):
    """The first call's inputs are the same with and without; diffusers' transformer must answer both alike."""
    pipe = zoo.load("shapes-dit")
    _, calls = sample("shapes-dit", patch)
    plain = sample("shapes-dit")[1]
    ids = torch.zeros(256, 3)
    ids[:, 1:] = torch.cartesian_prod(torch.arange(16), torch.arange(16))
    for (x, t, context, rest, kwargs, out), configs in (
        (calls[0], [AttentionEntropyScalingConfig(base_size=(16, 16))]),
        (plain[0], []),
    ):
        pooled = rest[0] if rest else kwargs["y"]
        n = len(x)
        tokens = x.view(n, 4, 16, 2, 16, 2).permute(0, 2, 4, 1, 3, 5).reshape(n, 256, 16)
        with torch.no_grad(), diffusers_ext.apply(pipe.transformer, *configs):
            v = pipe.transformer(tokens, context, pooled, t, ids, torch.zeros(context.shape[1], 3)).sample
        ours = v.view(n, 16, 16, 4, 2, 2).permute(0, 3, 1, 4, 2, 5).reshape(x.shape)
        torch.testing.assert_close(ours, out, atol=1e-4, rtol=0)
    assert not torch.allclose(calls[0][-1], plain[0][-1], atol=1e-3)


def test_parity_with_diffusers_on_sd3(comfy, sd3_twins, patch):
    """Whose network asks no wrappers in ComfyUI."""
    model, theirs, conds, calls = sd3_twins
    latent = {"samples": torch.zeros(1, 16, 16, 12)}
    comfy.nodes.common_ksampler(patch(model), 0, 3, 3.0, "euler", "normal", *conds, latent)
    with torch.no_grad():
        plain = theirs(*calls[-1][:1], *calls[-1][2:4], calls[-1][1]).sample
        with diffusers_ext.apply(theirs, AttentionEntropyScalingConfig()):
            for x, t, text, pooled, out in calls:
                torch.testing.assert_close(theirs(x, text, pooled, t).sample, out, atol=1e-4, rtol=0)
    assert len(calls) == 3 and not torch.allclose(calls[-1][-1], plain, atol=1e-3)


@pytest.mark.parametrize("name", ["shapes-unet", "shapes-dit"])
def test_nothing_changes_at_the_trained_size_or_strength_zero(sample, patch, name):
    assert torch.equal(sample(name, patch, size=16)[0], sample(name, size=16)[0])
    assert torch.equal(sample(name, lambda model: patch(model, strength=0.0))[0], sample(name)[0])


def test_only_the_chosen_part_of_the_run_is_scaled(sample, patch):
    plain = sample("shapes-unet")[1]
    late = sample("shapes-unet", lambda model: patch(model, start=0.5))[1]
    assert torch.equal(late[0][-1], plain[0][-1])
    early = sample("shapes-unet", lambda model: patch(model, end=0.1))[1]
    assert not torch.equal(early[0][-1], plain[0][-1])


def test_the_given_model_is_untouched(sample, patch):
    before = sample("shapes-unet")[0]
    sample("shapes-unet", patch)
    assert torch.equal(sample("shapes-unet")[0], before)


def test_attention_that_cannot_be_reached_is_an_error(sample, patch, monkeypatch, comfy):
    """A transformer that does not hand its options to the attention function."""
    from comfy.ldm.flux import layers, math

    closed = math.attention
    monkeypatch.setattr(layers, "attention", lambda *args, transformer_options=None, **kwargs: closed(*args, **kwargs))
    with pytest.raises(ValueError, match="cannot be reached"):
        sample("shapes-dit", patch)
