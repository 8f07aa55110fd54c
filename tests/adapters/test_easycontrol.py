"""EasyControl against an independent forward pass with the paper's mask, and what its cache and files promise."""

from __future__ import annotations

import importlib.util
import math
import os
import re
import signal
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from diffusers import (
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    FluxControlNetModel,
    FluxImg2ImgPipeline,
    FluxInpaintPipeline,
    FluxTransformer2DModel,
)
from diffusers.hooks import FirstBlockCacheConfig
from diffusers.models.embeddings import MultiIPAdapterImageProjection
from diffusers.models.transformers.transformer_flux import FluxIPAdapterAttnProcessor
from PIL import Image
from safetensors.torch import load_file, save_file

import diffusers_ext
from diffusers_ext import EasyControlAdapter, easycontrol_images, zoo
from diffusers_ext._flux_tokens import grid_of, image_ids, pack
from diffusers_ext.adapters.easycontrol import fit_spatial, fit_subject, spatial_ids, subject_ids
from diffusers_ext.eval import count_macs
from diffusers_ext.zoo.conditions import colourless, edge_f1, edge_iou, edges, subjects


TEXT, WORDS, ROWS, COLUMNS = 8, 5, 4, 6
SIZES = {
    "num_layers": 2,
    "num_single_layers": 2,
    "attention_head_dim": 8,
    "num_attention_heads": 2,
    "joint_attention_dim": TEXT,
    "pooled_projection_dim": TEXT,
    "in_channels": 16,
}


@pytest.fixture(scope="module", params=[True, False], ids=["guidance", "plain"])
def flux(request):
    torch.manual_seed(0)
    model = FluxTransformer2DModel(**SIZES, axes_dims_rope=(2, 2, 4), guidance_embeds=request.param)
    for parameter in model.parameters():  # zero modulation would hide every block
        if parameter.abs().max() == 0:
            torch.nn.init.normal_(parameter, std=0.2)
    return model.eval().requires_grad_(False)


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


def call(model, seed=1, batch=2, words=WORDS, rows=ROWS, columns=COLUMNS):
    """Arguments of a denoiser call."""
    draw = torch.Generator().manual_seed(seed)
    arguments = {
        "hidden_states": torch.randn(batch, rows * columns, 16, generator=draw),
        "timestep": torch.full((batch,), 0.7),
        "pooled_projections": torch.randn(batch, TEXT, generator=draw),
        "encoder_hidden_states": torch.randn(batch, words, TEXT, generator=draw),
        "img_ids": image_ids(2 * rows, 2 * columns),
        "txt_ids": torch.zeros(words, 3),
    }
    return arguments | ({"guidance": torch.full((batch,), 3.5)} if model.config.guidance_embeds else {})


def made(model, seed=0, kind="spatial", rank=4, alpha=2.0, latents=(1, 4, 4, 4)):
    """An adapter that does something, and has a condition, without training."""
    adapter = EasyControlAdapter.for_model(model, rank=rank, network_alpha=alpha, condition_type=kind).eval()
    draw = torch.Generator().manual_seed(seed)
    for parameter in adapter.parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=draw) * 0.3)
    adapter.set_latents(torch.randn(latents, generator=draw))
    return adapter


def outputs(model, arguments, *adapters, scales=(1.0, 1.0)):
    for adapter, scale in zip(adapters, scales):
        adapter.attach(model, scale)
    try:
        return model(**arguments).sample
    finally:
        for adapter in adapters:
            adapter.detach()


# The forward pass of the paper, written out: text, image and condition tokens in one sequence under one mask.


def _lora(adapter, prefix, name, x, scale):
    state = adapter.state_dict()
    down, up = (state.get(f"{prefix}.attn.processor.{name}_loras.0.{part}.weight") for part in ("down", "up"))
    return scale * adapter.config.network_alpha / adapter.config.rank * x @ down.T @ up.T


def _rope(x, ids, dims=(2, 2, 4)):
    """Rotation of neighbouring pairs, in complex numbers."""
    angles = [
        ids[:, axis, None].double() * 10000 ** (-torch.arange(0, d, 2).double() / d) for axis, d in enumerate(dims)
    ]
    turn = torch.polar(torch.ones(()).double(), torch.cat(angles, 1))
    pairs = torch.view_as_complex(x.double().unflatten(-1, (-1, 2)).contiguous())
    return torch.view_as_real(pairs * turn).flatten(-2).to(x.dtype)


def _norm(x):
    return F.layer_norm(x, x.shape[-1:], eps=1e-6)


def _rms(x, norm):
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + norm.eps) * norm.weight


def _attention(q, k, v, ids, mask):
    q, k = _rope(q, ids), _rope(k, ids)
    weights = (q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1]) + mask).softmax(-1)
    return (weights @ v).transpose(1, 2).flatten(2)


def _split_heads(x):
    return x.unflatten(-1, (2, 8)).transpose(1, 2)


def joint_forward(model, arguments, conditions):
    """Output and condition keys of every block. `conditions`: (adapter, packed latents, positions, scale)."""
    x, t = model.x_embedder(arguments["hidden_states"]), model.context_embedder(arguments["encoder_hidden_states"])
    cs = [model.x_embedder(tokens.expand(len(x), -1, -1)) for _, tokens, _, _ in conditions]
    guidance = [arguments["guidance"] * 1000] if "guidance" in arguments else []
    embed = model.time_text_embed
    temb = embed(arguments["timestep"] * 1000, *guidance, arguments["pooled_projections"])
    cond_temb = embed(torch.zeros(len(x)), *guidance, arguments["pooled_projections"])
    ids = torch.cat([arguments["txt_ids"], arguments["img_ids"], *(i for _, _, i, _ in conditions)]).float()
    lengths = [t.shape[1] + x.shape[1], *(c.shape[1] for c in cs)]
    owner = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    mask = torch.where((owner[:, None] == 0) | (owner[:, None] == owner), 0.0, -1e20)
    parts = [t.shape[1], x.shape[1], *lengths[1:]]

    for i, block in enumerate(model.transformer_blocks):
        prefix, attn = f"transformer_blocks.{i}", block.attn

        def mod(linear, emb):
            return [m[:, None] for m in linear(F.silu(emb)).chunk(6, 1)]

        streams = [(t, block.norm1_context.linear, temb), (x, block.norm1.linear, temb)]
        streams += [(c, block.norm1.linear, cond_temb) for c in cs]
        mods = [mod(linear, emb) for _, linear, emb in streams]
        normed = [_norm(s) * (1 + m[1]) + m[0] for (s, _, _), m in zip(streams, mods)]
        heads = {}
        for name, own, added in zip("qkv", (attn.to_q, attn.to_k, attn.to_v), "qkv"):
            rows = [getattr(attn, f"add_{added}_proj")(normed[0]), own(normed[1])]
            rows += [
                own(n) + _lora(adapter, prefix, name, n, scale)
                for n, (adapter, _, _, scale) in zip(normed[2:], conditions)
            ]
            split = [_split_heads(r) for r in rows]
            if name != "v":
                norms = [getattr(attn, f"norm_added_{name}")] + [getattr(attn, f"norm_{name}")] * (1 + len(cs))
                split = [_rms(s, n) for s, n in zip(split, norms)]
            heads[name] = torch.cat(split, 2)
        out = _attention(heads["q"], heads["k"], heads["v"], ids, mask).split(parts, 1)
        projected = [attn.to_add_out(out[0]), attn.to_out[0](out[1])]
        projected += [
            attn.to_out[0](o) + _lora(adapter, prefix, "proj", o, scale)
            for o, (adapter, _, _, scale) in zip(out[2:], conditions)
        ]
        feeds = [block.ff_context] + [block.ff] * (1 + len(cs))
        done = []
        for (s, _, _), m, p, feed in zip(streams, mods, projected, feeds):
            s = s + m[2] * p
            done.append(s + m[5] * feed(_norm(s) * (1 + m[4]) + m[3]))
        t, x, *cs = done

    for i, block in enumerate(model.single_transformer_blocks):
        prefix, attn = f"single_transformer_blocks.{i}", block.attn
        streams = [(torch.cat([t, x], 1), temb), *((c, cond_temb) for c in cs)]
        mods = [[m[:, None] for m in block.norm.linear(F.silu(emb)).chunk(3, 1)] for _, emb in streams]
        normed = [_norm(s) * (1 + m[1]) + m[0] for (s, _), m in zip(streams, mods)]
        heads = {}
        for name in "qkv":
            own = getattr(attn, f"to_{name}")
            rows = [own(normed[0])]
            rows += [
                own(n) + _lora(adapter, prefix, name, n, scale)
                for n, (adapter, _, _, scale) in zip(normed[1:], conditions)
            ]
            split = _split_heads(torch.cat(rows, 1))
            heads[name] = split if name == "v" else _rms(split, getattr(attn, f"norm_{name}"))
        out = _attention(heads["q"], heads["k"], heads["v"], ids, mask).split(lengths, 1)
        done = [
            s + m[2] * block.proj_out(torch.cat([o, F.gelu(block.proj_mlp(n), approximate="tanh")], 2))
            for (s, _), m, n, o in zip(streams, mods, normed, out)
        ]
        t, x, cs = done[0][:, : t.shape[1]], done[0][:, t.shape[1] :], done[1:]

    scale, shift = model.norm_out.linear(F.silu(temb)).chunk(2, 1)
    return model.proj_out(_norm(x) * (1 + scale[:, None]) + shift[:, None])


def described(adapter, rows=ROWS, columns=COLUMNS, scale=1.0):
    """What `joint_forward` wants to know of an adapter with a condition."""
    condition = adapter._condition
    grid = condition.latents.shape[-2] // 2, condition.latents.shape[-1] // 2
    ids = subject_ids(grid) if condition.kind == "subject" else spatial_ids((rows, columns), grid)
    return adapter, pack(condition.latents), ids, scale


@pytest.mark.parametrize("count", [0, 1, 2])
@pytest.mark.parametrize("cached", [True, False])
def test_it_is_the_masked_forward_pass(flux, count, cached):
    """Every step of a run, with and without the cache, for 0 to 2 conditions of both kinds."""
    adapters = [made(flux), made(flux, 3, "subject", rank=2, latents=(2, 4, 2, 6))][:count]
    for adapter, scale in zip(adapters, (1.0, 0.6)):
        adapter.use_kv_cache = cached
        adapter.attach(flux, scale)
    arguments = call(flux)
    for step in range(3):
        arguments["hidden_states"] = call(flux, step)["hidden_states"]
        arguments["timestep"] = torch.full((2,), 0.9 - 0.3 * step)
        expected = joint_forward(flux, arguments, [described(a, scale=s) for a, s in zip(adapters, (1.0, 0.6))])
        assert (flux(**arguments).sample - expected).abs().max() < 1e-5
    for adapter in adapters:
        adapter.detach()


def test_cost_of_a_step_is_the_attention_to_more_keys(flux):
    """Exactly: no projection or feed-forward runs for the condition after the first step."""
    arguments, adapters = call(flux), [made(flux), made(flux, 3, "subject")]
    base = count_macs(flux, **arguments)
    width, blocks, queries, batch, keys = 16, 4, WORDS + ROWS * COLUMNS, 2, 4
    attention = 2 * batch * blocks * queries * keys * width
    for count in (1, 2):
        for adapter in adapters[:count]:
            adapter.attach(flux)
        first, later = count_macs(flux, **arguments), count_macs(flux, **arguments)
        assert later - base == count * attention
        assert first > later
        for adapter in adapters[:count]:
            adapter.use_kv_cache = False
        assert count_macs(flux, **arguments) >= first
        for adapter in adapters[:count]:
            adapter.use_kv_cache = True
            adapter.detach()


def keys_values(adapter, model, arguments):
    model(**arguments)
    return [tensor for pair in adapter._bank.made for tensor in pair]


def same(one, two):
    return all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


def test_conditions_see_neither_each_other_nor_the_picture(flux):
    """Bit for bit: other conditions, noise, timestep and text change no key; the pooled text does."""
    a, b = made(flux), made(flux, 3)
    a.use_kv_cache = b.use_kv_cache = False
    with a.attach(flux), b.attach(flux):
        arguments = call(flux)
        before = keys_values(a, flux, arguments)
        b.set_latents(b._condition.latents + 1)
        assert same(keys_values(a, flux, arguments), before)
        for name in ("hidden_states", "timestep", "encoder_hidden_states"):
            assert same(keys_values(a, flux, arguments | {name: arguments[name] * 0.5}), before), name
        more = {"encoder_hidden_states": torch.randn(2, WORDS + 1, TEXT), "txt_ids": torch.zeros(WORDS + 1, 3)}
        assert same(keys_values(a, flux, arguments | more), before)
        other = {"pooled_projections": arguments["pooled_projections"] + 1}
        assert not same(keys_values(a, flux, arguments | other), before)


def test_the_cache_follows_what_it_depends_on(flux):
    """Pooled text, guidance, picture, strength, size, batch and dtype; each call is right as if it were alone."""
    adapter, cases = made(flux), [call(flux), call(flux, 5), call(flux, rows=6, columns=4), call(flux, batch=1)]
    if flux.config.guidance_embeds:
        cases.append(call(flux) | {"guidance": torch.full((2,), 1.0)})
    alone = [outputs(flux, arguments, adapter) for arguments in cases]
    with adapter.attach(flux):
        for _ in range(2):
            for arguments, expected in zip(cases, alone):
                assert torch.equal(flux(**arguments).sample, expected)
        arguments = cases[0]
        arguments["pooled_projections"].mul_(2)
        changed = flux(**arguments).sample
        adapter.clear_cache()
        assert torch.equal(flux(**arguments).sample, changed) and not torch.equal(changed, alone[0])
        for change in (lambda: adapter.set_scale(0.5), lambda: adapter.set_latents(torch.zeros(1, 4, 4, 4))):
            change()
            now = flux(**arguments).sample
            assert not torch.equal(now, changed)
            changed = now
    arguments["pooled_projections"].div_(2)


def test_a_new_run_sees_new_weights(flux):
    """The same prompt tensors with other weights: the cache of the last run is dropped."""
    adapter, arguments = made(flux), call(flux)
    with adapter.attach(flux):
        flux(**arguments | {"timestep": torch.full((2,), 0.1)})
        weight = flux.transformer_blocks[0].attn.to_k.weight
        kept = weight.clone()
        weight.mul_(1.5)
        try:
            out = flux(**arguments).sample
            adapter.clear_cache()
            assert torch.equal(out, flux(**arguments).sample)
        finally:
            weight.copy_(kept)


def test_the_cache_stays_small(flux):
    adapter = made(flux)
    with adapter.attach(flux):
        for seed in range(10):
            flux(**call(flux, seed))
        assert len(adapter._kept) <= 4
    assert not adapter._kept and adapter._bank.made is None


def test_fresh_updates_leave_the_stream_of_the_base_model(flux):
    """W_up = 0: the condition's rows are those of any adapter with zero weights; being attended changes the output."""
    fresh, zero = EasyControlAdapter.for_model(flux, rank=4), made(flux)
    fresh.set_latents(zero._condition.latents)
    for parameter in zero.parameters():
        parameter.zero_()
    arguments = call(flux)
    with fresh.attach(flux):
        assert torch.allclose(flux(**arguments).sample, joint_forward(flux, arguments, [described(zero)]), atol=1e-5)
    assert not torch.allclose(outputs(flux, arguments, fresh), flux(**arguments).sample, atol=1e-3)
    ups = [p for name, p in fresh.named_parameters() if ".up." in name]
    downs = torch.cat([p.flatten() for name, p in fresh.named_parameters() if ".down." in name])
    assert all(not p.any() for p in ups) and abs(downs.std() - 1 / 4) < 0.02


def test_off_and_removed_are_bit_equal(flux):
    arguments, adapter = call(flux), made(flux)
    bare, names, processors = flux(**arguments).sample, set(flux.state_dict()), flux.attn_processors
    with adapter.attach(flux, 0.0):
        assert torch.equal(flux(**arguments).sample, bare)
        adapter.set_scale(1.0)
        assert not torch.equal(flux(**arguments).sample, bare)
        assert set(flux.state_dict()) == names
    assert torch.equal(flux(**arguments).sample, bare)
    assert flux.attn_processors == processors
    assert all("processor" not in block.attn._modules for block in flux.transformer_blocks)


def test_several_in_any_order(flux):
    arguments, a, b = call(flux), made(flux), made(flux, 3, "subject")
    bare, one = flux(**arguments).sample, outputs(flux, arguments, a)
    assert (outputs(flux, arguments, a, b) - outputs(flux, arguments, b, a)).abs().max() < 1e-5
    first, second = a.attach(flux), b.attach(flux)
    both = flux(**arguments).sample
    b.set_scale(0)
    assert torch.equal(flux(**arguments).sample, one) and not torch.allclose(both, one, atol=1e-3)
    b.set_scale(1)
    first.remove()
    assert torch.equal(flux(**arguments).sample, outputs_of_attached(flux, arguments, b, second))
    assert torch.equal(flux(**arguments).sample, bare)


def outputs_of_attached(model, arguments, adapter, handle):
    handle.remove()
    return outputs(model, arguments, adapter)


@pytest.mark.parametrize("image", [(64, 64), (4, 6), (3, 7)])
@pytest.mark.parametrize("condition", [(32, 32), (4, 2)])
def test_positions(image, condition):
    spatial = spatial_ids(image, condition)
    for axis in (0, 1):
        values = spatial[:, axis + 1].unique()
        assert values[0] == 0 and values[-1] < image[axis]
        assert torch.allclose(values.diff(), torch.tensor(image[axis] / condition[axis]).double())
    subject = subject_ids(condition)
    assert len(subject) == condition[0] * condition[1]
    assert subject[:, 1].min() == 64 and subject[:, 2].max() == condition[1] - 1 and not subject[:, 0].any()
    ids = image_ids(2 * image[0], 2 * image[1])
    assert grid_of(ids) == grid_of(ids[None]) == image
    reference = ids + torch.tensor([1.0, 0, 0])
    assert grid_of(torch.cat([ids, reference])) == image


def test_positions_of_large_pictures_survive_bf16():
    assert grid_of(image_ids(2 * 300, 2 * 300).bfloat16()) == (300, 300)


def test_pictures_are_fitted():
    wide = torch.rand(1, 3, 20, 40) * 2 - 1
    assert fit_spatial(wide, 32).shape == (1, 3, 32, 32)
    subject = fit_subject(wide, 32)
    assert subject.shape == (1, 3, 32, 32)
    assert not subject[..., :8, :].any() and not subject[..., 24:, :].any() and subject[..., 8:24, :].any()
    odd = fit_subject(torch.ones(1, 3, 21, 32), 32)
    assert odd.shape[-2:] == (32, 32), "the odd pixel is not lost"
    assert odd[..., 5, :].all() and not odd[..., 4, :].any() and not odd[..., 26, :].any() and odd[..., 25, :].all()
    assert torch.equal(fit_spatial(wide[..., :20], 20), wide[..., :20])
    assert fit_spatial(wide, (24, 48)).shape == (1, 3, 24, 48)


def published_file(path, model, rank=3, **changes):
    adapter = EasyControlAdapter.for_model(model, rank=rank)
    for parameter in adapter.parameters():
        torch.nn.init.normal_(parameter)
    save_file({k: changes.get(k, v) for k, v in adapter.state_dict().items()}, path)
    return adapter


def test_a_published_file_loads_and_comes_back(flux, tmp_path):
    path = tmp_path / "canny.safetensors"
    written = published_file(path, flux)
    assert len(load_file(path)) == 2 * (2 * 4 + 2 * 3)
    loaded = EasyControlAdapter.from_pretrained(path)
    assert loaded.config.rank == 3 and loaded.config.dim == 16
    written.set_latents(torch.ones(1, 4, 4, 4))
    loaded.set_latents(torch.ones(1, 4, 4, 4))
    assert torch.equal(outputs(flux, call(flux), written), outputs(flux, call(flux), loaded))
    loaded.save_file(tmp_path / "own.safetensors")
    loaded.save_pretrained(tmp_path / "folder")
    for again in (tmp_path / "own.safetensors", tmp_path / "folder"):
        assert same(EasyControlAdapter.from_pretrained(again).parameters(), written.parameters())
    assert set(load_file(tmp_path / "own.safetensors")) == set(load_file(path)), "the names of the authors"


def test_the_paper_s_size():
    """Against what the layout asks for: 380 tensors, 149.4 million numbers at rank 128; the record says the same."""
    with torch.device("meta"):
        adapter = EasyControlAdapter()
    assert len(adapter.state_dict()) == 380
    count = sum(p.numel() for p in adapter.parameters())
    assert count == 190 * 2 * 3072 * 128
    assert round(count / 1e6, 1) == EasyControlAdapter.method.claim.value


def test_bad_files(flux, tmp_path):
    path, up = tmp_path / "bad.safetensors", "transformer_blocks.1.attn.processor.v_loras.0.up.weight"
    published_file(path, flux, **{up: torch.zeros(16, 4)})
    with pytest.raises(ValueError, match=f"{up.replace('.', '[.]')} has shape .16, 4.*16, 3"):
        EasyControlAdapter.from_pretrained(path)
    tensors = EasyControlAdapter.for_model(flux, rank=3).state_dict()
    for change, message in (
        (lambda t: t.pop(up), f"1 tensors missing: {up}"),
        (lambda t: t.update({"lora.weight": torch.zeros(2)}), "not an EasyControl file.*lora.weight"),
        (lambda t: t.update({up.replace(".0.up", ".1.up"): torch.zeros(16, 3)}), "several conditions"),
    ):
        changed = dict(tensors)
        change(changed)
        save_file(changed, path)
        with pytest.raises(ValueError, match=message):
            EasyControlAdapter.from_pretrained(path)


def test_the_kind_of_a_published_file_can_be_told(flux, tmp_path):
    published_file(tmp_path / "subject.safetensors", flux)
    adapter = EasyControlAdapter.from_pretrained(tmp_path / "subject.safetensors", condition_type="subject")
    assert adapter.config.condition_type == "subject"


def test_bad_input(flux, shapes_unet, shapes_dit):
    with pytest.raises(ValueError, match="made for dim=128, this transformer has 16"):
        EasyControlAdapter(2, 2, 128, rank=2).attach(flux)
    with pytest.raises(ValueError, match="works on FluxTransformer2DModel, not on UNet2DConditionModel"):
        made(flux).attach(shapes_unet)
    with pytest.raises(ValueError, match="rank is 17: give 1 to 16"):
        EasyControlAdapter.for_model(flux, rank=17)
    with pytest.raises(ValueError, match="unknown condition_type 'spacial'. Did you mean 'spatial'"):
        EasyControlAdapter.for_model(flux, rank=2, condition_type="spacial")
    for change in ({"network_alpha": float("nan")}, {"cond_size": 500}):
        with pytest.raises(ValueError, match=f"{next(iter(change))} is .*: give"):
            EasyControlAdapter.for_model(flux, rank=2, **change)
    adapter, picture = EasyControlAdapter.for_model(shapes_dit, rank=2), torch.zeros(1, 3, 64, 64)
    for wrong in (picture + 255, picture * torch.nan, picture[:, :1] - 1):
        with pytest.raises(ValueError, match="pictures with values from"):
            adapter.set_condition(shapes_dit, wrong)
    for size in (60, 4, (64, 60)):
        with pytest.raises(ValueError, match=re.escape(f"cond_size is {size}: give a multiple of 8")):
            adapter.set_condition(shapes_dit, picture, cond_size=size)
    with pytest.raises(ValueError, match="subjects are padded to a square, give one number"):
        adapter.set_condition(shapes_dit, picture, "subject", cond_size=(32, 40))
    with pytest.raises(ValueError, match="start 0.5 and end 0.2"):
        adapter.set_condition(shapes_dit, picture, cond_size=32, start=0.5, end=0.2)
    with pytest.raises(TypeError, match="has no vae"):
        adapter.set_condition(shapes_dit.transformer, picture)
    with pytest.raises(ValueError, match="shape .3, 64, 64"):
        adapter.set_condition(shapes_dit, picture[0], cond_size=32)
    with pytest.raises(ValueError, match="even sides"):
        adapter.set_latents(torch.zeros(1, 4, 3, 4))
    with adapter.attach(shapes_dit), pytest.raises(RuntimeError, match="no picture: call set_condition"):
        zoo.generate(shapes_dit, ["a red circle"], 1)


def test_bad_calls(flux):
    """Pictures that do not fit the batch, above all guidance in one batch; another VAE; replaced processors."""
    arguments, adapter = call(flux, batch=4), made(flux, latents=(2, 4, 4, 4))
    with adapter.attach(flux):
        with pytest.raises(ValueError, match="2 condition pictures for a batch of 4.*guidance in one batch"):
            flux(**arguments)
        adapter.set_latents(torch.zeros(1, 16, 4, 4))
        with pytest.raises(ValueError, match="token has 64 numbers, the transformer takes 16"):
            flux(**arguments)
        adapter.set_latents(torch.zeros(1, 4, 4, 4))
        attn = flux.single_transformer_blocks[1].attn
        ours = attn.processor
        attn.set_processor(type(ours.inner)())
        with pytest.raises(RuntimeError, match="processor of single_transformer_blocks.1.attn was replaced"):
            flux(**arguments)
        attn.set_processor(ours)
    attn.set_processor(lambda *args: None)
    try:
        with pytest.raises(ValueError, match="single_transformer_blocks.1.attn has a function"):
            adapter.attach(flux)
    finally:
        attn.set_processor(ours.inner)


def test_one_picture_per_adapter(shapes_dit):
    a, b = (EasyControlAdapter.for_model(shapes_dit, rank=2, cond_size=32) for _ in range(2))
    subject = EasyControlAdapter.for_model(shapes_dit, rank=2, cond_size=32, condition_type="subject")
    scenes = zoo.held_out(3)
    with a.attach(shapes_dit), subject.attach(shapes_dit), b.attach(shapes_dit):
        with pytest.raises(ValueError, match="1 spatial pictures for 2 attached spatial adapters"):
            easycontrol_images(shapes_dit, [scenes.images[:1]])
        with pytest.raises(ValueError, match="0 subject pictures for 1"):
            easycontrol_images(shapes_dit, [scenes.images[:1], scenes.images[1:2]])
        assert a._condition is None
        easycontrol_images(shapes_dit, list(scenes.images[:2, None]), [Image.new("RGB", (40, 20))], cond_size=16)
        kinds = [x._condition.kind for x in (a, subject, b)]
        assert kinds == ["spatial", "subject", "spatial"]
        assert a._condition.latents.shape == subject._condition.latents.shape == (1, 4, 4, 4)
        assert not torch.equal(a._condition.latents, b._condition.latents)


# Together with other things.


def test_with_a_lora_of_peft(flux):
    """A LoRA on the base acts on the condition's rows too, as in the authors' code; a new run sees it switched off."""
    from peft import LoraConfig

    model = FluxTransformer2DModel.from_config(flux.config).eval()
    model.load_state_dict(flux.state_dict())
    adapter, arguments = made(model), call(model)
    without = outputs(model, arguments, adapter)
    model.add_adapter(LoraConfig(r=2, target_modules=["to_k", "to_v"], init_lora_weights=False))
    with adapter.attach(model):
        late = model(**arguments | {"timestep": torch.full((2,), 0.1)}).sample
        with_lora = model(**arguments).sample
        model.disable_adapters()
        model(**arguments | {"timestep": torch.full((2,), 0.1)})
        assert torch.allclose(model(**arguments | {"timestep": torch.full((2,), 0.7)}).sample, without, atol=1e-6)
    assert not torch.allclose(with_lora, without, atol=1e-3) and torch.isfinite(late).all()


def test_with_a_controlnet(flux):
    """Residuals reach the image's rows; the condition's keys stay as they are."""
    torch.manual_seed(4)
    net = FluxControlNetModel(**SIZES, axes_dims_rope=[2, 2, 4], guidance_embeds=flux.config.guidance_embeds).eval()
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    adapter, arguments = made(flux), call(flux)
    double, single = net(**arguments, controlnet_cond=arguments["hidden_states"], return_dict=False)
    residuals = {"controlnet_block_samples": double, "controlnet_single_block_samples": single}
    with adapter.attach(flux):
        before = keys_values(adapter, flux, arguments)
        assert same(keys_values(adapter, flux, arguments | residuals), before)
        both = flux(**arguments, **residuals).sample
    for other in (flux(**arguments, **residuals).sample, outputs(flux, arguments, adapter)):
        assert not torch.allclose(both, other, atol=1e-3)


class _IP:
    """A Flux with an IP-Adapter, as diffusers lays one out."""

    def __init__(self, flux):
        self.model = FluxTransformer2DModel.from_config(flux.config).eval()
        self.model.load_state_dict(flux.state_dict())
        torch.manual_seed(7)
        for block in self.model.transformer_blocks:
            block.attn.set_processor(FluxIPAdapterAttnProcessor(16, TEXT, num_tokens=(4,), scale=0.8))
        self.model.encoder_hid_proj = MultiIPAdapterImageProjection([torch.nn.Identity()])
        self.embeds = torch.randn(2, 3, TEXT)

    def __call__(self, arguments):
        return self.model(
            **arguments, joint_attention_kwargs={"ip_adapter_image_embeds": [self.embeds[:, None]]}
        ).sample


def test_with_an_ip_adapter(flux):
    """It goes on underneath: a condition without weight on its keys leaves its output alone, in double blocks too."""
    ip, arguments, adapter = _IP(flux), call(flux), made(flux)
    plain = ip(arguments)
    assert not torch.allclose(plain, flux(**arguments).sample, atol=1e-3)
    with adapter.attach(ip.model):
        both = ip(arguments)
        for key, (pairs, inputs) in adapter._kept.items():  # no tokens left: the IP-Adapter alone, on our path
            adapter._kept[key] = [tuple(part[:, :0] for part in pair) for pair in pairs], inputs
        assert torch.allclose(ip(arguments), plain, atol=1e-6)
    assert torch.equal(ip(arguments), plain)
    for other in (plain, outputs(flux, arguments, adapter)):
        assert not torch.allclose(both, other, atol=1e-3)


def test_with_compile(flux):
    adapter, arguments = made(flux), call(flux)
    expected = outputs(flux, arguments, adapter)
    torch._dynamo.reset()
    compiled = torch.compile(flux, backend="eager")
    with adapter.attach(compiled):
        for _ in range(2):
            assert torch.allclose(compiled(**arguments).sample, expected, atol=1e-6)


def test_with_offloading(flux, monkeypatch):
    """While the model is elsewhere the condition waits: its first attention layer computes it."""
    adapter, arguments = made(flux), call(flux)
    expected, order = outputs(flux, arguments, adapter), []
    with adapter.attach(flux):
        monkeypatch.setattr(FluxTransformer2DModel, "device", torch.device("meta"))
        monkeypatch.setattr(type(adapter), "_encode", noted(type(adapter)._encode, order, "condition"))
        hook = flux.context_embedder.register_forward_hook(lambda *_: order.append("model"))
        assert torch.equal(flux(**arguments).sample, expected)
        hook.remove()
    assert order == ["model", "condition"]


def noted(function, order, name):
    def run(*args):
        order.append(name)
        return function(*args)

    return run


def _caches():
    ours = [r.public() for r in diffusers_ext.list_methods(kind="cache") if {"mmdit", "any"} & set(r.targets)]
    return [*ours, FirstBlockCacheConfig(threshold=0.2)]


@pytest.mark.parametrize("config", _caches(), ids=lambda config: type(config).__name__)
def test_with_every_cache(config, shapes_dit):
    """Cached pictures stay nearer to the controlled ones than to the plain ones, and nothing stays behind."""
    adapter = EasyControlAdapter.from_pretrained(zoo.adapter_file("easycontrol-edge-shapes-dit"))
    scenes = zoo.held_out(2)
    adapter.set_condition(shapes_dit, edges(scenes.images))

    def draw():
        return zoo.generate(shapes_dit, scenes.captions, num_inference_steps=12)

    bare = draw()
    with adapter.attach(shapes_dit):
        full = draw()
        with diffusers_ext.apply(shapes_dit, config):
            cached = draw()
    closer = (cached - full).square().mean() / (cached - bare).square().mean()
    assert torch.isfinite(cached).all() and not torch.equal(cached, full) and closer < 0.5
    assert torch.equal(draw(), bare)


def test_start_and_end(flux):
    pipe = SimpleNamespace(transformer=flux, scheduler=FlowMatchEulerDiscreteScheduler())
    pipe.scheduler.set_timesteps(4)
    adapter, arguments = made(flux), call(flux)
    adapter.set_latents(adapter._condition.latents, start=0.25, end=0.75)
    active = []
    for time in pipe.scheduler.timesteps:
        now = arguments | {"timestep": time.expand(2) / 1000}
        bare = flux(**now).sample
        with adapter.attach(pipe):
            active.append(not torch.equal(flux(**now).sample, bare))
    assert active == [False, True, True, False]


def test_with_two_calls_per_timestep(flux):
    """Heun: every call is what it is without a cache, and the condition is computed once."""
    scheduler, adapter, arguments = FlowMatchHeunDiscreteScheduler(), made(flux), call(flux)
    scheduler.set_timesteps(4)
    calls = [arguments | {"timestep": t.expand(2) / 1000} for t in scheduler.timesteps]
    assert len(scheduler.timesteps.unique()) < len(calls)
    alone = [outputs(flux, now, adapter) for now in calls]
    with adapter.attach(flux):
        base = [count_macs(flux, **now) for now in calls]
        assert base[0] > base[1] and len(set(base[1:])) == 1
        assert all(torch.equal(flux(**now).sample, expected) for now, expected in zip(calls, alone))


@pytest.mark.parametrize("pipeline", [FluxImg2ImgPipeline, FluxInpaintPipeline])
def test_on_other_pipelines_of_flux(pipeline, shapes_dit, edge):
    """No pipeline of its own is needed: image to image and inpainting take the adapter as they are."""
    scenes, pipe = zoo.held_out(1), pipeline(**shapes_dit.components)
    pipe.set_progress_bar_config(disable=True)
    edge.set_condition(pipe, edges(scenes.images))
    settings = {"prompt": scenes.captions, "image": (scenes.images + 1) / 2, "height": 64, "width": 64}
    settings |= {"max_sequence_length": 20, "guidance_scale": 1.0, "strength": 1.0, "num_inference_steps": 2}
    if pipeline is FluxInpaintPipeline:
        settings["mask_image"] = torch.ones(1, 1, 64, 64)

    def run():
        return pipe(generator=torch.Generator().manual_seed(0), output_type="pt", **settings).images

    plain = run()
    with edge.attach(pipe):
        assert (run() - plain).abs().max() > 0.01
        edge.set_scale(0)
        assert torch.equal(run(), plain)
    assert torch.equal(run(), plain)


# Trained.


@pytest.fixture
def edge():
    """The shipped adapter."""
    return EasyControlAdapter.from_pretrained(zoo.adapter_file("easycontrol-edge-shapes-dit"))


@pytest.fixture
def colour():
    """The shipped adapter that takes a colour from a subject."""
    return EasyControlAdapter.from_pretrained(zoo.adapter_file("easycontrol-colour-shapes-dit"))


def draw(pipe, captions, *adapters, steps=10, **size):
    for adapter in adapters:
        adapter.attach(pipe)
    images = zoo.generate(pipe, captions, steps, **size)
    diffusers_ext.remove(pipe)
    return images


def iou(images, wanted):
    """Exact pixels: within one pixel, captions alone agree by half."""
    return edge_iou(edges(images), wanted, tolerance=0).mean().item()


@pytest.mark.parametrize("kind", ["edge", "colour"])
def test_the_trained_adapters_are_small(shapes_dit, kind):
    file = zoo.adapter_file(f"easycontrol-{kind}-shapes-dit")
    parameters = sum(p.numel() for p in EasyControlAdapter.from_pretrained(file).parameters())
    assert parameters < 0.05 * sum(p.numel() for p in shapes_dit.transformer.parameters())
    assert file.stat().st_size < 400_000


def test_it_follows_edges(edge, shapes_dit):
    """Captions that leave place, size and ground open, so that it is the edges that say them."""
    scenes = zoo.held_out(16)
    wanted, captions = edges(scenes.images), zoo.scenes(16, 999, drop=1.0).captions

    def controlled(condition):
        edge.set_condition(shapes_dit, condition)
        return iou(draw(shapes_dit, captions, edge), wanted)

    agreement = controlled(wanted)
    assert agreement > 2 * iou(draw(shapes_dit, captions), wanted)
    assert agreement > 2 * controlled(wanted.roll(1, 0))
    assert agreement > 2 * controlled(torch.zeros_like(wanted))


def stretched(images, width):
    return F.interpolate(images, (64, width), mode="bilinear", antialias=True)


@pytest.mark.parametrize("cond_size", [64, (64, 80)])
def test_it_follows_edges_in_a_shape_it_never_saw(edge, shapes_dit, cond_size):
    """80 x 64 pixels: nearer to the stretched edges than to those of another scene."""
    scenes = zoo.held_out(8)
    wanted = edges(scenes.images)
    edge.set_condition(shapes_dit, edges(stretched(scenes.images, 80)), cond_size=cond_size)
    wide = draw(shapes_dit, scenes.captions, edge, width=80)
    assert wide.shape[-2:] == (64, 80)
    found = edges(stretched(wide, 64))
    assert edge_f1(found, wanted).mean() > 1.2 * edge_f1(found, wanted.roll(1, 0)).mean()


@pytest.mark.slow
def test_an_unseen_shape_costs_less_than_a_fifth(edge, shapes_dit):
    """Agreement with edges in 80 x 64 pixels, with a condition of that shape, against that in 64 x 64."""
    scenes = zoo.held_out(48)
    wanted = edges(scenes.images)

    def agreement(width):
        condition = edges(stretched(scenes.images, width)) if width != 64 else wanted
        edge.set_condition(shapes_dit, condition, cond_size=(64, width))
        with edge.attach(shapes_dit):
            images = zoo.generate(shapes_dit, scenes.captions, 20, width=width)
        return edge_f1(edges(stretched(images, 64)), wanted).mean()

    assert agreement(80) > 0.8 * agreement(64)


@pytest.mark.slow
def test_three_times_the_agreement_of_scale_zero(edge, shapes_dit):
    """Exact edge pixels, captions that leave place, size and ground open; scale 1 against scale 0."""
    scenes = zoo.held_out(48)
    wanted, captions = edges(scenes.images), zoo.scenes(48, 999, drop=1.0).captions
    edge.set_condition(shapes_dit, wanted)
    with edge.attach(shapes_dit):
        on = iou(zoo.generate(shapes_dit, captions, 20, batch_size=48), wanted)
        edge.set_scale(0)
        assert on > 3 * iou(zoo.generate(shapes_dit, captions, 20, batch_size=48), wanted)


def test_two_conditions_without_joint_training(edge, shapes_dit):
    """The outline of each object as a condition of its own: together better at each than the other alone."""
    scenes = zoo.held_out(24)
    pairs = scenes.specs[:, 2] >= zoo.world.ROW
    captions = [c for c, pair in zip(zoo.scenes(24, 999, drop=1.0).captions, pairs) if pair]
    outlines = [edges((scenes.masks[pairs, which, None] * 2 - 1).expand(-1, 3, -1, -1)) for which in (0, 1)]
    other = EasyControlAdapter.from_pretrained(zoo.adapter_file("easycontrol-edge-shapes-dit"))
    for adapter, outline in zip((edge, other), outlines):
        adapter.set_condition(shapes_dit, outline)

    def found(*adapters):
        """Share of each outline that has an edge within a pixel."""
        near = F.max_pool2d(edges(draw(shapes_dit, captions, *adapters)), 3, 1, 1)
        return [((near * outline).sum() / outline.sum()).item() for outline in outlines]

    both, first, second = found(edge, other), found(edge), found(other)
    assert both[0] > second[0] and both[1] > first[1]


def of_two_kinds(pipe, edge, colour, scenes):
    """Give both adapters their pictures; captions that only the pictures complete."""
    edge.set_condition(pipe, edges(scenes.images))
    colour.set_condition(pipe, subjects(scenes.specs, seed=999))
    assert colour.config.condition_type == colour._condition.kind == "subject"
    return colourless(scenes.captions, scenes.specs)


def test_two_trained_kinds_in_any_order(edge, colour, shapes_dit):
    captions = of_two_kinds(shapes_dit, edge, colour, zoo.scenes(2, 999, drop=1.0))
    bare, alone = draw(shapes_dit, captions, steps=2), [draw(shapes_dit, captions, a, steps=2) for a in (edge, colour)]
    both = draw(shapes_dit, captions, edge, colour, steps=2)
    assert (draw(shapes_dit, captions, colour, edge, steps=2) - both).abs().max() < 1e-4
    with edge.attach(shapes_dit), colour.attach(shapes_dit):
        for scales, expected in (((1, 0), alone[0]), ((0, 1), alone[1]), ((0, 0), bare)):
            edge.set_scale(scales[0])
            colour.set_scale(scales[1])
            assert torch.equal(zoo.generate(shapes_dit, captions, 2), expected)
    assert all((both - other).abs().max() > 0.1 for other in (*alone, bare))


@pytest.mark.slow
def test_two_kinds_that_were_trained_apart(edge, colour, shapes_dit, judge):
    """Edges and a subject: together each does what it does alone, which the other does not."""
    scenes = zoo.scenes(96, 999, drop=1.0)
    captions, wanted = of_two_kinds(shapes_dit, edge, colour, scenes), edges(scenes.images)

    def measured(*adapters):
        images = draw(shapes_dit, captions, *adapters, steps=20, batch_size=96)
        return iou(images, wanted), judge.accuracy(images, scenes.specs)["colour1"]

    both, edges_alone, subject_alone = measured(edge, colour), measured(edge), measured(colour)
    assert both[0] > 2 * subject_alone[0] and both[1] > edges_alone[1] + 0.2
    assert both[0] > 0.9 * edges_alone[0] and both[1] > subject_alone[1] - 0.05


@pytest.mark.slow
def test_control_keeps_what_the_caption_says(edge, shapes_dit, judge):
    """All attributes of the caption: at most three points below the plain model."""
    scenes = zoo.held_out(200)
    edge.set_condition(shapes_dit, edges(scenes.images))
    plain = judge.accuracy(zoo.generate(shapes_dit, scenes.captions), scenes.specs)["all"]
    with edge.attach(shapes_dit):
        controlled = zoo.generate(shapes_dit, scenes.captions, batch_size=200)
    assert judge.accuracy(controlled, scenes.specs)["all"] > plain - 0.03


@pytest.fixture(scope="module")
def script(repository):
    """The training example."""
    source = repository / "examples/train_adapters/easycontrol.py"
    spec = importlib.util.spec_from_file_location("train_easycontrol", source)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("kind", ["edge", "colour"])
def test_training_runs_and_resumes(script, tmp_path, monkeypatch, kind):
    """Two steps of the example, in one go and with Ctrl-C between them, end in the same weights."""
    loss, budget = script.denoising_loss, script.Budget(steps=2, batch=2, lr=1e-3, save_every=1)

    def interrupted(*args, **kwargs):
        os.kill(os.getpid(), signal.SIGINT)
        return loss(*args, **kwargs)

    with torch.enable_grad():
        torch.manual_seed(0)
        files = [script.train(tmp_path / "one", budget, 4, kind=kind)]
        torch.manual_seed(0)
        monkeypatch.setattr(script, "denoising_loss", interrupted)
        with pytest.raises(SystemExit, match="stopped after step 1"):
            script.train(tmp_path / "two", budget, 4, kind=kind)
        monkeypatch.setattr(script, "denoising_loss", loss)
        files.append(script.train(tmp_path / "two", budget, 4, kind=kind))
    trained, resumed = map(EasyControlAdapter.from_pretrained, files)
    assert same(trained.parameters(), resumed.parameters())
    assert any(p.any() for name, p in trained.named_parameters() if ".up." in name)
    assert trained.config.condition_type == {"edge": "spatial", "colour": "subject"}[kind]
