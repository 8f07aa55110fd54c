"""VMoBA: exact where everything is chosen, chosen as the paper says, counted, and off without a trace."""

from __future__ import annotations

import itertools
import json
import time
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from diffusers import (
    FlowMatchEulerDiscreteScheduler,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    UNet2DModel,
    WanTransformer3DModel,
)

import diffusers_ext
from diffusers_ext import VMoBAConfig
from diffusers_ext.attention import vmoba_blocks
from diffusers_ext.attention.vmoba_blocks import (
    Rule,
    block_attention,
    cut,
    divided,
    gates,
    partitions,
    sparse_attention,
)
from diffusers_ext.eval import count_macs, paired_ratio


GRID = (4, 6, 10)
CHUNKS = [(1, 6, 10), (0.75, 6, 10), (4, 3, 5), (2, 3, 2), (1, 2, 10)]


def _normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def _qkv(tokens, batch=2, heads=3, width=8, dtype=torch.float64):
    return tuple(_normal(batch, heads, tokens, width, seed=i, dtype=dtype) for i in range(3))


# ---- blocks


@pytest.mark.parametrize("chunk", CHUNKS)
def test_blocks_hold_neighbours(chunk):
    """Against a list of every token's place."""
    t, h, w = GRID
    partition = cut(GRID, chunk)
    assert sorted(partition.order.tolist()) == list(range(t * h * w)) and sum(partition.sizes) == t * h * w
    blocks, start = [], 0
    for size in partition.sizes:
        blocks.append(set(partition.order[start : start + size].tolist()))
        start += size
    expected = {}
    for number, (i, j, k) in enumerate(itertools.product(range(t), range(h), range(w))):
        key = number // round(chunk[0] * 60) if chunk[1:] == (h, w) else (i // chunk[0], j // chunk[1], k // chunk[2])
        expected.setdefault(key, set()).add(number)
    assert blocks == list(expected.values())
    values = torch.randn(t * h * w)
    assert torch.equal(values[partition.order][partition.order.argsort()], values)
    assert torch.bincount(partition.own()).tolist() == list(partition.sizes)


def test_last_slab_may_be_short():
    assert cut(GRID, (1.5, 6, 10)).sizes == (90, 90, 60)
    assert cut(GRID, (9, 6, 10)).sizes == (240,)


@pytest.mark.parametrize("chunk", [(4, 4, 5), (3, 3, 5), (4, 6, 3)])
def test_chunks_that_do_not_divide(chunk):
    with pytest.raises(ValueError, match=rf"{chunk[0]}, {chunk[1]}, {chunk[2]}.*\(4, 6, 10\)"):
        cut(GRID, chunk)


@pytest.mark.parametrize("grid", [(21, 30, 52), (16, 16, 16), (1, 64, 64), (5, 7, 11), (1, 1, 1)])
def test_automatic_blocks(grid):
    cuts = partitions(grid, 16)
    assert all(sum(p.sizes) == grid[0] * grid[1] * grid[2] for p in cuts)
    if grid[1] > 7:
        assert all(12 <= len(p.sizes) <= 20 for p in cuts)
    assert divided((16, 16, 16), 16) == (4, 8, 8) and divided((64, 64), 16) == (16, 16)


# ---- attention


@pytest.mark.parametrize("chunk", CHUNKS)
@pytest.mark.parametrize("words, image_first", [(0, True), (7, True), (7, False)])
@pytest.mark.parametrize("rule", [Rule(threshold=1.0), Rule("topk", topk=1000), Rule(threshold=1.0, scope="overall")])
def test_everything_chosen_is_full_attention(chunk, words, image_first, rule):
    q, k, v = _qkv(240 + words, dtype=torch.float32)
    output, cost = sparse_attention(q, k, v, cut(GRID, chunk), rule, image_first)
    torch.testing.assert_close(output, F.scaled_dot_product_attention(q, k, v), atol=1e-5, rtol=1e-5)
    assert cost.kept == 1 and cost.macs > cost.full_macs


def test_one_block_is_full_attention():
    q, k, v = _qkv(240)
    output, _ = sparse_attention(q, k, v, cut(GRID, (4, 6, 10)), Rule(threshold=0.01), scale=0.3)
    torch.testing.assert_close(output, F.scaled_dot_product_attention(q, k, v, scale=0.3))


def masked_attention(query, key, value, keep, sizes, scale=None):
    """The same over a mask of every pair of tokens."""
    mask = keep.repeat_interleave(torch.tensor(sizes), -1)
    return F.scaled_dot_product_attention(query, key, value, mask, scale=scale)


def _random_choice(tokens, blocks):
    keep = torch.rand(2, 3, tokens, blocks, generator=torch.Generator().manual_seed(5)) < 0.3
    keep[..., 0] |= ~keep.any(-1)
    return keep


def test_merged_parts_equal_a_mask_with_gradients():
    sizes = (50, 3, 120, 67)
    inputs = [x.requires_grad_() for x in _qkv(240)]
    keep, weight = _random_choice(240, 4), _normal(2, 3, 240, 8, seed=9)
    results = []
    for attention in (block_attention, masked_attention):
        output = attention(*inputs, keep, sizes)
        results.append((output, *torch.autograd.grad((output * weight).sum(), inputs)))
    for ours, reference in zip(*results):
        torch.testing.assert_close(ours, reference, atol=1e-9, rtol=1e-9)


def test_half_precision_and_large_logits():
    q, k, v = (x.bfloat16() for x in _qkv(240))
    keep, sizes = _random_choice(240, 4), (60,) * 4
    output = block_attention(q, k, v, keep, sizes)
    assert output.dtype == torch.bfloat16
    exact = masked_attention(*(x.double() for x in (q, k, v)), keep, sizes)
    torch.testing.assert_close(output.double(), exact, atol=0.03, rtol=0.03)
    q, k, v = _qkv(240)
    torch.testing.assert_close(
        block_attention(400 * q, k, v, keep, sizes), masked_attention(400 * q, k, v, keep, sizes), atol=1e-7, rtol=1e-6
    )


# ---- the choice


def _pools(scope, tensor):
    """Lists of entries that compete, with their places."""
    groups = {}
    for place in itertools.product(*map(range, tensor.shape)):
        key = {"query_head": place[:3], "head_global": place[:2], "overall": place[:1]}[scope]
        groups.setdefault(key, []).append(place)
    return groups.values()


@pytest.mark.parametrize("scope", vmoba_blocks.SCOPES)
@pytest.mark.parametrize("tau", [0.1, 0.25, 0.6, 0.95])
def test_chosen_mass_is_enough_and_no_more(scope, tau):
    own, gate = torch.arange(12) // 3, _normal(2, 2, 12, 4, seed=3)
    keep = Rule(threshold=tau, scope=scope).select(gate, own)
    for pool in _pools(scope, gate):
        values = [gate[p].item() for p in pool]
        low, high = min(values), max(values)
        similar = {p: (v - low) / (high - low) for p, v in zip(pool, values)}
        mine = {p for p in pool if own[p[2]] == p[3]}
        chosen = {p for p in pool if keep[p]}
        assert mine <= chosen
        mass, total = sum(similar[p] for p in chosen), sum(similar.values())
        others = sorted(similar[p] for p in chosen - mine)
        assert mass >= tau * total - 1e-9
        assert not others or mass - others[0] < tau * total, "one block fewer would not be enough"
        left_out = [similar[p] for p in set(pool) - chosen]
        assert not others or not left_out or others[0] >= max(left_out), "the most similar blocks first"


@pytest.mark.parametrize("scope", vmoba_blocks.SCOPES)
def test_a_number_of_blocks(scope):
    own, gate = torch.arange(12) // 3, _normal(2, 2, 12, 4, seed=3)
    keep = Rule("topk", topk=2, scope=scope).select(gate, own)
    for pool in _pools(scope, gate):
        queries = len({p[:3] for p in pool})
        chosen = {p for p in pool if keep[p]}
        mine = {p for p in pool if own[p[2]] == p[3]}
        assert len(chosen) == 2 * queries and mine <= chosen
        assert min(gate[p] for p in chosen - mine) >= max(gate[p] for p in set(pool) - chosen)


def test_gates_by_hand():
    q, k, _ = _qkv(10)
    gate = gates(q, k, (4, 6))
    assert gate[1, 2, 3, 1] == pytest.approx((q[1, 2, 3] @ k[1, 2, 4:].mean(0)).item())
    assert gates(q.half(), k.half(), (4, 6)).dtype == torch.float32


def test_nothing_but_own_blocks():
    """Equal gates hold no similarity: the own block is enough, unless the published rule is asked for."""
    gate, own = torch.zeros(1, 1, 4, 2), torch.tensor([0, 0, 1, 1])
    alone = Rule().select(gate, own)
    assert alone[0, 0].tolist() == [[True, False]] * 2 + [[False, True]] * 2
    assert Rule(fallback="full").select(gate, own).all()


def test_kept_share_falls_with_the_threshold():
    q, k, v = _qkv(240)
    kept = [sparse_attention(q, k, v, cut(GRID, (2, 3, 5)), Rule(threshold=tau))[1].kept for tau in (1, 0.7, 0.4, 0.1)]
    assert kept == sorted(kept, reverse=True) and len(set(kept)) == 4


@pytest.mark.parametrize("words", [0, 5])
def test_cost_is_what_runs(words):
    q, k, v = _qkv(240 + words)
    partition, costs = cut(GRID, (2, 3, 5)), []
    counted = count_macs(lambda: costs.append(sparse_attention(q, k, v, partition, Rule())[1]))
    assert counted == costs[0].macs < costs[0].full_macs
    assert costs[0].full_macs == count_macs(F.scaled_dot_product_attention, q, k, v)


def _planted(blocks=16, size=64, width=32):
    """Keys around one direction per block, queries towards one block each, another one than their own."""
    centres = F.normalize(_normal(blocks, width), dim=-1)
    target = torch.arange(blocks).roll(3).repeat_interleave(size)
    keys = 8 * centres.repeat_interleave(size, 0) + 0.1 * _normal(blocks * size, width, seed=1)
    queries = 8 * centres[target] + 0.1 * _normal(blocks * size, width, seed=2)
    values = _normal(blocks * size, width, seed=3)
    return [x[None, None] for x in (queries, keys, values)], target


@pytest.mark.parametrize(
    "rule", [Rule(threshold=0.15), Rule("topk", topk=3), Rule("topk", topk=3, scope="head_global")]
)
def test_planted_blocks_are_found(rule):
    (q, k, v), target = _planted()
    sizes, own = (64,) * 16, torch.arange(16).repeat_interleave(64)
    keep = rule.select(gates(q, k, sizes), own)
    assert keep[0, 0, torch.arange(1024), target].double().mean() > 0.99
    assert keep.double().mean() < 0.3
    full = F.scaled_dot_product_attention(q, k, v)
    error = (block_attention(q, k, v, keep, sizes) - full).norm() / full.norm()
    shuffled = torch.rand(keep.shape, generator=torch.Generator().manual_seed(4)).argsort(-1)
    random = keep.gather(-1, shuffled) | F.one_hot(own, 16).bool()
    random_error = (block_attention(q, k, v, random, sizes) - full).norm() / full.norm()
    assert error < 1e-2 and random_error > 5 * error


# ---- models


def _wan():
    return WanTransformer3DModel(
        num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4, text_dim=8, freq_dim=16,
        ffn_dim=32, num_layers=4, rope_max_seq_len=32,
    )  # fmt: skip


def _sd3():
    return SD3Transformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=4, num_layers=2, sample_size=16,
        joint_attention_dim=8, caption_projection_dim=16, pooled_projection_dim=8, pos_embed_max_size=16,
        dual_attention_layers=(0,),
    )  # fmt: skip


def _flux():
    return FluxTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=16, num_layers=1, num_single_layers=2,
        joint_attention_dim=8, pooled_projection_dim=8, axes_dims_rope=(2, 2, 4),
    )  # fmt: skip


BUILDERS = {"wan": _wan, "sd3": _sd3, "flux": _flux}
STEPS = 5


def _build(name):
    torch.manual_seed(0)
    model = BUILDERS[name]().eval().requires_grad_(False)
    for parameter in model.parameters():
        if parameter.abs().max() == 0:
            torch.nn.init.normal_(parameter, std=0.2)
    return SimpleNamespace(transformer=model, scheduler=FlowMatchEulerDiscreteScheduler())


def _text(batch):
    return _normal(batch, 5, 8, seed=7, dtype=torch.float32), _normal(batch, 8, seed=8, dtype=torch.float32)


def _call(name, model, x, t, text):
    """Velocity of latents [B, 4, T, H, W]; pictures are videos of one frame."""
    words, pooled = text
    if name == "wan":
        return model(x, t.expand(len(x)), words, return_dict=False)[0]
    b, c, _, h, w = x.shape
    if name == "sd3":
        return model(x[:, :, 0], words, pooled, t.expand(b), return_dict=False)[0][:, :, None]
    tokens = x.view(b, c, h // 2, 2, w // 2, 2).permute(0, 2, 4, 1, 3, 5).reshape(b, h * w // 4, 4 * c)
    ids = torch.cartesian_prod(torch.zeros(1), torch.arange(h / 2), torch.arange(w / 2))
    out = model(tokens, words, pooled, t.expand(b) / 1000, ids, torch.zeros(5, 3), return_dict=False)[0]
    return out.view(b, h // 2, w // 2, c, 2, 2).permute(0, 3, 1, 4, 2, 5).reshape(b, c, 1, h, w)


def run(target, name, batch=2, size=(4, 8, 12), steps=STEPS, model=None, fail_at=None):
    """Latents after a plain sampling loop."""
    model = target.transformer if model is None else model
    size, text = (size if name == "wan" else (1, *size[1:])), _text(batch)
    target.scheduler.set_timesteps(steps)
    x = _normal(batch, 4, *size, seed=3, dtype=torch.float32)
    for index, t in enumerate(target.scheduler.timesteps):
        if index == fail_at:
            raise KeyboardInterrupt
        x = target.scheduler.step(_call(name, model, x, t, text), t, x).prev_sample
    return x


each_model = pytest.mark.parametrize("name", BUILDERS)


@each_model
def test_full_threshold_changes_nothing(name):
    target = _build(name)
    plain = run(target, name)
    with diffusers_ext.apply(target, VMoBAConfig(1.0, full_attention_first_steps=0)) as handle:
        torch.testing.assert_close(run(target, name), plain, atol=1e-5, rtol=1e-5)
        figures = handle.summary()["vmoba"]
    assert figures["sparse"] == STEPS and set(figures["kept"].values()) == {1.0}
    assert torch.equal(run(target, name), plain)


@each_model
def test_equals_masked_attention(name, monkeypatch):
    """The whole model, with full attention over a mask in place of the parts."""
    target, config = _build(name), VMoBAConfig(0.3, blocks=6)
    plain = run(target, name)
    with diffusers_ext.apply(target, config):
        sparse = run(target, name)
        monkeypatch.setattr(vmoba_blocks, "block_attention", masked_attention)
        torch.testing.assert_close(run(target, name), sparse, atol=1e-5, rtol=1e-5)
    assert torch.isfinite(sparse).all() and not torch.allclose(sparse, plain, atol=1e-4)


@each_model
def test_operations_are_counted_exactly(name):
    target = _build(name)
    plain = count_macs(lambda: run(target, name))
    with diffusers_ext.apply(target, VMoBAConfig(0.2, blocks=6)) as handle:
        sparse = count_macs(lambda: run(target, name))
        figures = handle.summary()["vmoba"]
    assert figures["macs_full_call"] * STEPS == plain
    assert figures["macs_saved"] == pytest.approx(1 - sparse / plain, abs=1e-12)


def test_which_steps_and_layers(monkeypatch):
    target, seen = _build("wan"), []
    original = vmoba_blocks.sparse_attention

    def note(query, key, value, cut, *rest):
        seen.append(cut.sizes)
        return original(query, key, value, cut, *rest)

    monkeypatch.setattr("diffusers_ext.attention.vmoba.sparse_attention", note)
    config = VMoBAConfig(block_1d=2, block_2d=(2, 3), block_3d=(2, 2, 6), full_attention_first_layers=1)
    with diffusers_ext.apply(target, config) as handle:
        run(target, "wan", steps=10)
        figures = handle.summary()["vmoba"]
    columns, cubes, slabs = (24,) * 4, (24,) * 4, (48,) * 2
    assert seen == [columns, cubes, slabs] * 8, "of 10 steps the first two are full, of 4 layers the first"
    assert (figures["full"], figures["sparse"]) == (2, 8) and sorted(figures["kept"]) == [1, 2, 3]


SETTINGS = [{}, {"batch": 1}, {"size": (2, 12, 8)}, {"steps": 3}]


@each_model
def test_runs_in_a_row_do_not_see_each_other(name):
    target, config = _build(name), VMoBAConfig(0.2, blocks=4)
    alone = []
    for setting in SETTINGS:
        with diffusers_ext.apply(target, config):
            alone.append(run(target, name, **setting))
    with diffusers_ext.apply(target, config):
        with pytest.raises(KeyboardInterrupt):
            run(target, name, fail_at=3)
        for setting, expected in zip(SETTINGS, alone):
            assert torch.equal(run(target, name, **setting), expected), setting


@each_model
def test_each_sample_chooses_for_itself(name):
    target = _build(name)
    x, (words, pooled) = _normal(2, 4, 1, 8, 12, seed=3, dtype=torch.float32), _text(2)
    t = torch.tensor(500.0)
    with diffusers_ext.apply(target, VMoBAConfig(0.2, blocks=4, full_attention_first_steps=0)):
        both = _call(name, target.transformer, x, t, (words, pooled))
        for i in range(2):
            one = _call(name, target.transformer, x[i : i + 1], t, (words[i : i + 1], pooled[i : i + 1]))
            torch.testing.assert_close(one, both[i : i + 1], atol=1e-5, rtol=1e-5)


def test_it_can_be_trained():
    target = _build("wan")
    target.transformer.train().requires_grad_(True)
    with diffusers_ext.apply(target, VMoBAConfig(0.2, blocks=4, full_attention_first_steps=0)):
        x = _normal(1, 4, 4, 8, 8, dtype=torch.float32)
        _call("wan", target.transformer, x, torch.tensor(500.0), _text(1)).square().mean().backward()
    gradients = [p.grad for n, p in target.transformer.named_parameters() if "attn1.to_" in n]
    assert all(g is not None and torch.isfinite(g).all() for g in gradients)
    assert all(target.transformer.blocks[0].attn1.to_k.weight.grad.abs().amax(0) > 0)


def test_it_leaves_no_trace():
    target = _build("wan")
    before = {name: set(vars(m)) for name, m in target.transformer.named_modules()}
    with diffusers_ext.apply(target, VMoBAConfig()):
        run(target, "wan")
    assert {name: set(vars(m)) for name, m in target.transformer.named_modules()} == before


@pytest.mark.slow
@pytest.mark.parametrize("first", ["compile", "apply"])
@pytest.mark.parametrize("name", BUILDERS)
def test_compiled(name, first):
    target, config = _build(name), VMoBAConfig(0.2, blocks=4)
    with diffusers_ext.apply(target, config):
        expected = run(target, name)
    torch._dynamo.reset()
    compiled = torch.compile(target.transformer, backend="eager") if first == "compile" else None
    with diffusers_ext.apply(target, config) as handle:
        if compiled is None:
            compiled = torch.compile(target.transformer, backend="eager")
        torch.testing.assert_close(run(target, name, model=compiled), expected, atol=1e-4, rtol=1e-4)
        assert handle.summary()["vmoba"]["sparse"] == STEPS - 1
    torch._dynamo.reset()


@pytest.mark.slow
def test_faster_than_full_attention_at_4096_tokens():
    q, k, v = _qkv(4096, batch=1, heads=4, width=128, dtype=torch.float32)
    partition, rule = partitions((16, 16, 16))[2], Rule("topk", topk=4)
    assert sparse_attention(q, k, v, partition, rule)[1].kept <= 0.25
    timing = paired_ratio(
        lambda: sparse_attention(q, k, v, partition, rule),
        lambda: F.scaled_dot_product_attention(q, k, v),
        clock=time.process_time,
    )
    assert timing.ratio < 0.6, str(timing)


# ---- refusals


@pytest.mark.parametrize(
    "values, words",
    [
        ({"threshold": 0}, "threshold is 0; accepted: above 0"),
        ({"threshold": 1.1}, "threshold is 1.1"),
        ({"blocks": 0}, "blocks is 0"),
        ({"block_1d": 0}, "block_1d is 0"),
        ({"block_2d": (2, 2, 2)}, r"block_2d is \(2, 2, 2\); accepted: 2 whole"),
        ({"block_3d": (2, 0, 2)}, "block_3d"),
        ({"threshold_type": "block"}, "'query_head'"),
        ({"select_mode": "all"}, "'threshold', 'topk'"),
        ({"topk": 0}, "topk is 0"),
        ({"full_attention_first_steps": 2}, "full_attention_first_steps is 2"),
        ({"full_attention_first_layers": -1}, "full_attention_first_layers is -1"),
        ({"fallback": "none"}, "'self', 'full'"),
    ],
)
def test_bad_values(values, words):
    with pytest.raises(ValueError, match=words):
        VMoBAConfig(**values)


def test_refusals():
    with pytest.raises(ValueError, match="UNet2DModel; it works on WanTransformer3DModel"):
        diffusers_ext.apply(
            UNet2DModel(block_out_channels=(8,), down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",),
                        norm_num_groups=4),
            VMoBAConfig(),
        )  # fmt: skip
    target = _build("wan")
    with pytest.raises(ValueError, match="fewer than its 4 layers"):
        diffusers_ext.apply(target, VMoBAConfig(full_attention_first_layers=4))
    with pytest.raises(ValueError, match="give num_inference_steps"):
        diffusers_ext.apply(target.transformer, VMoBAConfig())
    with (
        diffusers_ext.apply(target, VMoBAConfig(block_2d=(3, 3))),
        pytest.raises(ValueError, match=r"4, 3, 3.*4, 4, 6"),
    ):
        run(target, "wan")
    with diffusers_ext.apply(target, VMoBAConfig()), pytest.raises(ValueError, match="already applied"):
        diffusers_ext.apply(target, VMoBAConfig())
    assert diffusers_ext.check(target, VMoBAConfig(full_attention_first_steps=1), num_inference_steps=4).warnings


def test_reference_pictures_are_refused():
    target = _build("flux")
    ids = torch.cartesian_prod(torch.arange(2.0), torch.arange(4.0), torch.arange(4.0))
    words, pooled = _text(1)
    config = VMoBAConfig(full_attention_first_steps=0)
    with diffusers_ext.apply(target, config), pytest.raises(ValueError, match="32 tokens are not 4 x 4"):
        target.transformer(torch.randn(1, 32, 16), words, pooled, torch.ones(1), ids, torch.zeros(5, 3))


def test_config_travels_as_json():
    config = VMoBAConfig(0.5, 8, 1.5, (2, 4), (1, 2, 4), "overall", "topk", 3, 0.1, 1, "full", 20)
    assert diffusers_ext.MethodConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
