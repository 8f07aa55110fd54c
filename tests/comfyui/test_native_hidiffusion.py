"""HiDiffusion as a MODEL patch: outputs of the diffusers side, layouts of real UNets, nothing at the trained size."""

from __future__ import annotations

import importlib

import pytest
import torch

import diffusers_ext
from diffusers_ext import HiDiffusionConfig, zoo


pytestmark = pytest.mark.comfy
CAPTION = "a small red circle left of a large green square, striped blue background"
STEPS = 10


@pytest.fixture
def patch(dx_nodes):
    def node(model, side=64, raunet=True, windows=True, t1=-1.0, t2=-1.0, aggressive="auto", seed=0):
        return dx_nodes["DXHiDiffusion"].execute(model, side, raunet, windows, t1, t2, aggressive, seed).args[0]

    return node


@pytest.fixture
def sample(comfy, native_pipe, encode, recorded):
    """`sample(patch)` -> latents from the core KSampler, and every call of the UNet: arguments and output."""

    def run(patch=lambda model: model, size=(32, 32), sampler="euler", steps=STEPS, name="shapes-unet", denoise=1.0):
        model, clip, _ = native_pipe(name)
        model, calls = recorded(patch(model))
        latent = {"samples": torch.zeros(1, 4, *size)}
        conds = encode(clip, CAPTION), encode(clip, "")
        out = comfy.nodes.common_ksampler(model, 0, steps, 3.0, sampler, "normal", *conds, latent, denoise)[0]
        return out["samples"], calls

    return run


@pytest.mark.parametrize(
    "size, ratios",
    [((32, 32), (-1.0, -1.0)), ((24, 40), (0.4, 0.6)), ((17, 35), (0.3, 0.5)), ((64, 20), (-1.0, -1.0))],
)
def test_parity_with_diffusers(sample, patch, size, ratios):
    """Same inputs, step by step: same devices, same windows, same shifts, same outputs."""
    _, calls = sample(lambda model: patch(model, t1=ratios[0], t2=ratios[1], seed=7), size)
    assert len(calls) == STEPS
    pipe = zoo.load("shapes-unet")
    t1, t2 = (None if r < 0 else r for r in ratios)
    config = HiDiffusionConfig(t1_ratio=t1, t2_ratio=t2, seed=7, num_inference_steps=STEPS)
    with torch.no_grad(), diffusers_ext.apply(pipe.unet, config) as handle:
        for x, t, context, out in calls:
            # one after the other in time: a batch has one timestep
            torch.testing.assert_close(pipe.unet(x, t, context).sample, out, atol=1e-4, rtol=0)
        figures = handle.summary()["hidiffusion"]
    assert figures["coarse_calls"] > 0 and figures["windowed_calls"] == STEPS


def test_nothing_changes_at_the_trained_size_or_switched_off(sample, patch):
    assert torch.equal(sample(patch, (16, 16))[0], sample(size=(16, 16))[0])
    off = sample(lambda model: patch(model, raunet=False, windows=False))[0]
    assert torch.equal(off, sample()[0])


def test_the_given_model_is_untouched_also_after_an_error(sample, patch, native_pipe):
    before = sample()[0]
    model = native_pipe("shapes-unet")[0]
    unet = model.model.diffusion_model
    strides = [m.stride for m in unet.modules() if isinstance(m, torch.nn.Conv2d)]

    def fail(*_):
        raise KeyboardInterrupt

    handle = unet.middle_block.register_forward_pre_hook(fail)
    handle_2 = unet.middle_block[0].register_forward_pre_hook(fail)
    with pytest.raises(KeyboardInterrupt):
        sample(patch)
    handle.remove()
    handle_2.remove()
    assert [m.stride for m in unet.modules() if isinstance(m, torch.nn.Conv2d)] == strides
    assert torch.equal(sample()[0], before)


def test_runs_repeat_and_stages_of_a_step_share_its_devices(sample, patch, native_pipe):
    first = sample(patch)[0]
    assert torch.equal(sample(patch)[0], first)
    unet = native_pipe("shapes-unet")[0].model.diffusion_model
    sizes = []
    handle = unet.middle_block[0].register_forward_pre_hook(lambda _, args: sizes.append(args[0].shape[-1]))
    sample(patch, sampler="dpm_2")  # a second evaluation between two levels, none in the last step
    handle.remove()
    assert sizes == [4] * 8 + [8] * 11


def test_image_to_image_counts_its_own_steps(sample, patch, native_pipe):
    unet = native_pipe("shapes-unet")[0].model.diffusion_model
    sizes = []
    handle = unet.middle_block[0].register_forward_pre_hook(lambda _, args: sizes.append(args[0].shape[-1]))
    sample(patch, denoise=0.5)
    handle.remove()
    assert sizes == [4] * 4 + [8] * 6


def _unet(comfy, layout):
    """A narrow UNet of ComfyUI with the blocks of Stable Diffusion 1.5 or XL, and diffusers' names of its levels."""
    from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel

    shared = {"image_size": 32, "in_channels": 4, "out_channels": 4, "model_channels": 32, "num_res_blocks": 2}
    shared |= {"num_head_channels": 8, "use_spatial_transformer": True, "context_dim": 8}
    if layout == "sd":
        depth = {"channel_mult": [1, 1, 1, 1], "transformer_depth": [1, 1, 1, 1, 1, 1, 0, 0]}
        return UNetModel(**shared, **depth, transformer_depth_middle=1, transformer_depth_output=[1] * 9 + [0] * 3)
    depth = {"channel_mult": [1, 1, 1], "transformer_depth": [0, 0, 2, 2, 3, 3]}
    return UNetModel(
        **shared, **depth, transformer_depth_middle=3, transformer_depth_output=[0] * 3 + [2] * 3 + [3] * 3
    )


@pytest.mark.parametrize("layout", ["sd", "xl"])
def test_layout_of_real_unets(comfy, layout):
    nodes = importlib.import_module("comfy_nodes.attention_hidiffusion")
    unet = _unet(comfy, layout)
    found = nodes.Layout.of(unet)
    if layout == "sd":
        assert found.attends == [True, True, True, False] and found.downs == [3, 6, 9]
        assert found.pairs == [[1, 2], [4, 5], [7, 8], [10, 11]]
        assert found.outputs == [[9, 10, 11], [6, 7, 8], [3, 4, 5], [0, 1, 2]]
        assert len(found.windowed(unet, 0)) == 5
    else:
        assert found.attends == [False, True, True] and found.downs == [3, 6]
        assert found.outputs == [[6, 7, 8], [3, 4, 5], [0, 1, 2]]
        assert len(found.windowed(unet, 1)) == 10


@pytest.mark.parametrize("layout", ["sd", "xl"])
@pytest.mark.parametrize("size", [(64, 64), (63, 45)])
@pytest.mark.parametrize("ratios", [(1.0, 0.0), (0.0, 1.0), (1.0, 1.0)])
def test_every_size_runs_with_control(comfy, layout, size, ratios):
    """Residuals of the usual sizes act in the sizes that the features have: constants as broadcast constants."""
    nodes = importlib.import_module("comfy_nodes.attention_hidiffusion")
    torch.manual_seed(0)
    unet = _unet(comfy, layout)
    for parameter in unet.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    patches = nodes.HiDiffusion(
        HiDiffusionConfig(t1_ratio=ratios[0], t2_ratio=ratios[1], base_size=(16, 16)), unet, False
    )
    skips = []

    def call(control, patched=True):
        sigma = torch.tensor([5.0])
        options = {"sample_sigmas": torch.tensor([5.0, 2.0, 1.0, 0.5, 0.0]), "sigmas": sigma}
        if patched:
            options["patches"] = {
                "input_block_patch": [patches.pool],
                "output_block_patch": [patches.unpool],
                "attn1_patch": [patches.enter],
                "attn1_output_patch": [patches.leave],
            }
            options["wrappers"] = {"diffusion_model": {nodes.KEY: [patches.forward]}}
        else:
            options["patches"] = {"input_block_patch": [lambda h, _: skips.append(h.shape) or h]}
        x = torch.randn(1, 4, *size, generator=torch.Generator().manual_seed(1))
        with torch.no_grad():
            return unet(x, torch.tensor([500.0]), torch.ones(1, 3, 8), None, control, options)

    plain = call(None, patched=False)
    alone = call(None)
    assert alone.shape == plain.shape and torch.isfinite(alone).all() and not torch.allclose(alone, plain)

    def control(shapes):
        output = [torch.full(s, 0.3) for s in shapes]
        return {
            "output": output,
            "middle": [torch.full(shapes[-1], 0.2)],
            "input": [torch.full(s, 0.1) for s in shapes[::-1]],
        }

    controlled = call(control(skips))
    small = call(control([(1, s[1], 1, 1) for s in skips]))
    torch.testing.assert_close(controlled, small, atol=1e-5, rtol=0)
    assert not torch.allclose(controlled, alone)


def test_refusals(native_pipe, patch):
    with pytest.raises(ValueError, match="this model is a Flux"):
        patch(native_pipe("shapes-dit")[0])
    with pytest.raises(ValueError, match="aggressive"):
        patch(native_pipe("shapes-unet")[0], aggressive="on")
