"""VMoBA as a MODEL patch: outputs and choices of the diffusers side, on Flux, Stable Diffusion 3 and Wan layouts."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import diffusers_ext
from diffusers_ext import VMoBAConfig, zoo


pytestmark = pytest.mark.comfy
CAPTION = "a small red circle left of a large green square, striped blue background"
STEPS = 5


@pytest.fixture(scope="module")
def shapes(native_pipe, encode):
    model, clip, _ = native_pipe("shapes-dit")
    return model, encode(clip, CAPTION), encode(clip, "")


@pytest.fixture
def patch(dx_nodes):
    def node(model, threshold=0.25, blocks=8, start=0.2, compete="query_head"):
        return dx_nodes["DXVMoBAAttention"].execute(model, threshold, blocks, start, compete).args[0]

    return node


@pytest.fixture
def runs(comfy, monkeypatch):
    """Every run that is counted, in order."""
    module, started = pytest.importorskip("comfy_nodes.attention_vmoba"), []
    original = module.Run

    def new_run():
        started.append(original())
        return started[-1]

    monkeypatch.setattr(module, "Run", new_run)
    return started


@pytest.fixture
def ksample(comfy, shapes):
    _, positive, negative = shapes

    def run(model, size=(8, 12), steps=STEPS, sampler="euler", batch=1):
        latent = {"samples": torch.zeros(batch, 4, *size)}
        arguments = (model, 0, steps, 3.0, sampler, "simple", positive, negative, latent)
        return comfy.nodes.common_ksampler(*arguments)[0]["samples"]

    return run


def test_parity_with_diffusers(comfy, shapes, patch, runs):
    """Two guided pictures, not square: the same blocks, and the same latents."""
    model, positive, negative = shapes
    pipe = zoo.load("shapes-dit")
    noise = torch.randn(2, 4, 16, 24, generator=torch.Generator().manual_seed(3))
    with diffusers_ext.apply(pipe, VMoBAConfig(0.25, 8, threshold_type="head_global")) as handle:
        expected = pipe(
            [CAPTION] * 2,
            negative_prompt=[""] * 2,
            true_cfg_scale=3.0,
            guidance_scale=1.0,
            height=64,
            width=96,
            num_inference_steps=STEPS,
            max_sequence_length=20,
            latents=pipe._pack_latents(noise, 2, 4, 16, 24),
            output_type="latent",
        ).images
        figures = handle.summary()["vmoba"]
    sampled = comfy.sample.sample_custom(
        patch(model, compete="head_global"),
        noise,
        3.0,
        comfy.samplers.sampler_object("euler"),
        pipe.scheduler.sigmas,
        positive,
        negative,
        torch.zeros_like(noise),
        seed=0,
        disable_pbar=True,
    )
    latents = model.get_model_object("latent_format").process_in(sampled)
    torch.testing.assert_close(pipe._pack_latents(latents, 2, 4, 16, 24), expected, atol=1e-4, rtol=0)
    (run,) = runs
    # Guidance runs in one batch here and in turn there.
    assert (2 * run.full, 2 * run.sparse) == (figures["full"], figures["sparse"]) == (2, 8)
    kept = list(figures["kept"].values())
    assert sum(run.kept) / len(run.kept) == pytest.approx(sum(kept) / len(kept), abs=1e-6)


def test_full_threshold_changes_nothing(shapes, patch, ksample):
    model = shapes[0]
    plain = ksample(model)
    torch.testing.assert_close(ksample(patch(model, 1.0, start=0.0)), plain, atol=1e-5, rtol=1e-5)
    assert torch.equal(ksample(patch(model, start=1.0)), plain)
    sparse = ksample(patch(model))
    assert torch.isfinite(sparse).all() and not torch.allclose(sparse, plain, atol=1e-3)
    assert torch.equal(ksample(model), plain)


def test_two_calls_per_step_and_odd_sizes(shapes, patch, ksample, runs):
    patched = patch(patch(shapes[0], 0.9), blocks=4)
    first = ksample(patched, sampler="heun", size=(9, 7), steps=4)
    # Of 7 calls, those at the first of 4 noise levels are full: the start of the first step.
    assert (runs[0].full, runs[0].sparse) == (1, 6)
    ksample(patched, size=(8, 8), steps=2)
    assert torch.equal(ksample(patched, sampler="heun", size=(9, 7), steps=4), first)


def test_stable_diffusion_3(tiny_pipe, patch, comfy, runs):
    model = tiny_pipe("sd3")[0]
    transformer = model.model.diffusion_model
    words, pooled = transformer.context_embedder.in_features, transformer.y_embedder.mlp[0].in_features
    generator = torch.Generator().manual_seed(0)
    text = torch.randn(1, 7, words, generator=generator)
    cond = [[text, {"pooled_output": torch.randn(1, pooled, generator=generator)}]]
    latent = {"samples": torch.zeros(1, 16, 8, 8)}

    def run(m):
        return comfy.nodes.common_ksampler(m, 0, 4, 2.0, "euler", "simple", cond, cond, latent)[0]["samples"]

    plain = run(model)
    torch.testing.assert_close(run(patch(model, 1.0, start=0.0)), plain, atol=1e-4, rtol=1e-4)
    sparse = run(patch(model, 0.3, 4))
    assert runs[-1].sparse == 3 and 0 < (sparse - plain).norm() < 0.5 * plain.norm()


# diffusers' name of every part of Wan whose name differs in ComfyUI
_WAN = {
    "condition_embedder.time_embedder.linear_1": "time_embedding.0",
    "condition_embedder.time_embedder.linear_2": "time_embedding.2",
    "condition_embedder.text_embedder.linear_1": "text_embedding.0",
    "condition_embedder.text_embedder.linear_2": "text_embedding.2",
    "condition_embedder.time_proj": "time_projection.1",
    "attn1": "self_attn",
    "attn2": "cross_attn",
    "to_q": "q",
    "to_k": "k",
    "to_v": "v",
    "to_out.0": "o",
    "ffn.net.0.proj": "ffn.0",
    "ffn.net.2": "ffn.2",
    "norm2": "norm3",
    "proj_out": "head.head",
}


def _wan_twins():
    """The same weights as diffusers' and as ComfyUI's model."""
    from comfy.ldm.wan.model import WanModel
    from comfy.ops import disable_weight_init
    from diffusers import WanTransformer3DModel

    torch.manual_seed(0)
    theirs = WanTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4,
        out_channels=4,
        text_dim=8,
        freq_dim=256,
        ffn_dim=32,
        num_layers=3,
        rope_max_seq_len=32,
    ).eval()
    weights = {}
    for name, tensor in theirs.state_dict().items():
        for old, new in _WAN.items():
            name = name.replace(f"{old}.", f"{new}.")
        name = name.replace("scale_shift_table", "modulation")
        weights["head.modulation" if name == "modulation" else name] = tensor
    native = WanModel(
        model_type="t2v", in_dim=4, dim=24, ffn_dim=32, text_dim=8, out_dim=4, num_heads=2, num_layers=3,
        operations=disable_weight_init, device="cpu", dtype=torch.float32,
    ).eval()  # fmt: skip
    native.load_state_dict(weights)
    return theirs.requires_grad_(False), native.requires_grad_(False)


@pytest.mark.parametrize("words", [5, 96])
def test_wan_equals_diffusers(comfy, words):
    """Text as long as the video too: cross-attention stays full."""
    module = pytest.importorskip("comfy_nodes.attention_vmoba")
    theirs, native = _wan_twins()
    generator = torch.Generator().manual_seed(1)
    x, text = torch.randn(2, 4, 4, 8, 12, generator=generator), torch.randn(2, words, 8, generator=generator)
    t = torch.tensor([500.0, 500.0])
    config = VMoBAConfig(0.25, 6, full_attention_first_steps=0)
    method, run = module.VMoBA(config, module.patch_sizes(native), is_video=True), module.Run()
    options = {module.KEY: run, "sigmas": torch.tensor([0.5]), "sample_sigmas": torch.tensor([0.5, 0.0])}

    def apply_model(x, t, c_concat, context, control, options):
        return native(x, t, context, transformer_options=options)

    plain = apply_model(x, t, None, text, None, {})
    sparse = method.forward(apply_model, x, t, None, text, None, options)
    torch.testing.assert_close(theirs(x, t, text).sample, plain, atol=1e-4, rtol=1e-4)
    with diffusers_ext.apply(theirs, config) as handle:
        torch.testing.assert_close(theirs(x, t, text).sample, sparse, atol=1e-4, rtol=1e-4)
        kept = handle.summary()["vmoba"]["kept"]
    assert run.kept == pytest.approx(list(kept.values())) and len(run.kept) == 3
    assert not torch.allclose(sparse, plain, atol=1e-3)


def test_refusals(comfy, native_pipe, patch):
    with pytest.raises(ValueError, match="this model is a UNetModel"):
        patch(native_pipe("shapes-unet")[0])
    module = pytest.importorskip("comfy_nodes.attention_vmoba")
    method = module.VMoBA(VMoBAConfig(full_attention_first_steps=0), (1, 2, 2), is_video=False)
    attention = module.SparseAttention(method, torch.Size((1, 4, 8, 8)), module.Run())
    q = torch.randn(1, 2, 20, 8)
    for extra in ({"transformer_options": {"reference_image_num_tokens": [4]}}, {"mask": torch.ones(20, 20)}):
        with pytest.raises(ValueError, match="VMoBA"):
            attention(F.scaled_dot_product_attention, q, q, q, 2, skip_reshape=True, **extra)
