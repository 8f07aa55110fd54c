"""Delta-DiT against an independent loop over the blocks, its counts, and its refusals.

That it never goes stale is tested for every cache in `tests/common/test_cache_matrix.py`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import json
from types import SimpleNamespace

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DiTTransformer2DModel,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    HeunDiscreteScheduler,
)
from diffusers.hooks import FirstBlockCacheConfig

import diffusers_ext
from diffusers_ext import DeltaDiTConfig, zoo
from diffusers_ext.caching import delta_dit
from diffusers_ext.caching._common import steps_of
from diffusers_ext.caching.delta_dit import Call, Store, cached_blocks_for, span_bounds, span_name, speedup
from diffusers_ext.eval import count_macs, macs_by_module, mean_psnr


def make_dit(blocks=8, seed=0, width=16):
    torch.manual_seed(seed)
    model = DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=width // 2,
        in_channels=4,
        num_layers=blocks,
        sample_size=8,
        num_embeds_ada_norm=9,
    )
    for parameter in model.parameters():
        if parameter.abs().max() == 0:
            torch.nn.init.normal_(parameter, std=0.2)
    return model.eval().requires_grad_(False)


def denoise(model, steps, predict=None, scheduler=None):
    scheduler = scheduler or DDIMScheduler(clip_sample=False)
    scheduler.set_timesteps(steps)
    labels = torch.tensor([1, 7])
    predict = predict or (lambda x, t: model(x, timestep=t.expand(2), class_labels=labels, return_dict=False)[0])
    x = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        for t in scheduler.timesteps:
            x = scheduler.step(predict(x, t), t, x).prev_sample
    return x


# ---- the method


def test_formulas():
    assert speedup(28, 21, 2) == pytest.approx(1.6)
    assert cached_blocks_for(1.6, 28, 2) == 21
    for blocks, interval in ((12, 2), (28, 3), (57, 2)):
        for cached in range(1, blocks):
            assert cached_blocks_for(speedup(blocks, cached, interval), blocks, interval) == cached
    assert [span_name(i, 2, "rear_then_front") for i in range(4)] == ["rear", "rear", "front", "front"]
    assert [span_name(i, 2, "front_then_rear") for i in range(4)] == ["front", "front", "rear", "rear"]
    assert {span_name(i, 2, "front") for i in range(4)} == {"front"}
    assert span_bounds("front", 8, 3) == (0, 3) and span_bounds("rear", 8, 3) == (5, 8)


def by_the_paper(model, full, spans, recall):
    """The algorithm over the modules of a DiT, without hooks: `full` steps and the span of every step.

    `recall(history, step)` gives what to add instead of a span, of `(step, delta)` of the full steps before.
    """
    state = {"step": 0, "deltas": {span: [] for span in spans}}
    labels = torch.tensor([1, 7])

    def run(h, t, first, last):
        for block in model.transformer_blocks[first:last]:
            h = block(h, timestep=t, class_labels=labels)
        return h

    def predict(x, t):
        t, i = t.expand(2), state["step"]
        h, blocks = model.pos_embed(x), len(model.transformer_blocks)
        if i in full:
            outputs = [h]
            for l in range(blocks):
                outputs.append(run(outputs[-1], t, l, l + 1))
            for span in set(spans):
                state["deltas"][span].append((i, outputs[span[1]] - outputs[span[0]]))
            h = outputs[-1]
        else:
            start, stop = spans[i]
            h = run(run(h, t, 0, start) + recall(state["deltas"][spans[i]], i), t, stop, blocks)
        state["step"] += 1
        emb = model.transformer_blocks[0].norm1.emb(t, labels, hidden_dtype=h.dtype)
        shift, scale = model.proj_out_1(torch.nn.functional.silu(emb)).chunk(2, dim=1)
        h = model.proj_out_2(model.norm_out(h) * (1 + scale[:, None]) + shift[:, None])
        return h.view(2, 4, 4, 2, 2, 4).permute(0, 5, 1, 3, 2, 4).reshape(2, 4, 8, 8)

    return predict


@pytest.mark.parametrize(
    "interval, cached, boundary, store, full, order, start",
    [
        (2, 6, 5, "both", {0, 2, 4, 6, 8}, 0, 1),
        (3, 3, 4, "both", {0, 3, 6, 9}, 0, 1),
        (3, 3, 4, "active", {0, 3, 4, 6, 9}, 0, 1),
        (4, 7, 0, "both", {0, 4, 8}, 0, 1),
        (2, 6, 5, "both", {0, 2, 4, 6, 8}, 1, 1),
        (3, 3, 4, "both", {0, 3, 6, 9}, 2, 1),
        (3, 6, 5, "both", {0, 1, 2, 3, 6, 9}, 0, 4),
        (3, 6, 5, "both", {0, 1, 2, 3, 6, 9}, 1, 4),
        (2, 3, 3, "both", {0, 1, 2, 3, 5, 7, 9}, 2, 4),
        (3, 3, 4, "active", {0, 1, 2, 4, 5, 8}, 0, 3),
    ],
)
def test_equals_the_algorithm_written_out(interval, cached, boundary, store, full, order, start, continue_history):
    model = make_dit()
    spans = [(8 - cached, 8) if i < boundary else (0, cached) for i in range(10)]
    recall = functools.partial(continue_history, order=order)
    expected = denoise(model, 10, by_the_paper(model, full, spans, recall))
    config = DeltaDiTConfig(
        interval, cached, boundary_step=boundary, store=store, forecast_order=order, start_step=start
    )
    with diffusers_ext.apply(model, config) as handle:
        actual = denoise(model, 10)
        figures = handle.summary()["delta-dit"]
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)
    assert (figures["computed"], figures["reused"]) == (len(full), 10 - len(full))


def test_one_is_exact_and_nothing_stays():
    model = make_dit()
    plain, before = denoise(model, 6), set(vars(model))
    with diffusers_ext.apply(model, DeltaDiTConfig(1, boundary_step=3)) as handle:
        assert torch.equal(denoise(model, 6), plain)
        assert handle.summary()["delta-dit"]["macs_saved"] == 0
    assert torch.equal(denoise(model, 6), plain) and set(vars(model)) == before


@pytest.mark.parametrize(
    "blocks, steps, interval, cached, runs", [(28, 20, 2, 14, 420), (8, 20, 2, 6, 100), (12, 15, 3, 8, 100)]
)
def test_block_calls(count_runs, blocks, steps, interval, cached, runs):
    """Half of the paper's DiT for half of 20 steps: 20 x 28 - 10 x 14."""
    model = make_dit(blocks, width=4)
    config = DeltaDiTConfig(interval, cached, num_inference_steps=steps)
    with diffusers_ext.apply(model, config) as handle:
        inside = {str(i): block.attn1 for i, block in enumerate(model.transformer_blocks)}
        counts = count_runs(lambda: denoise(model, steps), **inside)
        assert sum(counts.values()) == runs == handle.summary()["delta-dit"]["blocks_run"]
    full = -(-steps // interval)
    assert runs == steps * blocks - (steps - full) * cached
    if steps % interval == 0:
        assert steps * blocks / runs == pytest.approx(speedup(blocks, cached, interval))


def test_macs_are_those_of_the_blocks_left_out():
    """On PixArt-alpha's size, on the meta device."""
    from diffusers import PixArtTransformer2DModel

    with torch.device("meta"):
        model = PixArtTransformer2DModel(sample_size=64, caption_channels=64, use_additional_conditions=False).eval()
        inputs = (torch.randn(1, 4, 64, 64), torch.randn(1, 20, 64))
    model.adaln_single.register_forward_pre_hook(lambda _, args: (args[0].to("meta"), *args[1:]))
    parts = macs_by_module(model, *inputs, timestep=torch.tensor([9.0]), depth=2)
    with diffusers_ext.apply(model, DeltaDiTConfig(boundary_step=1)):
        ran = [count_macs(model, *inputs, timestep=torch.tensor([t])) for t in (900.0, 800.0)]
    skipped = sum(parts[f"transformer_blocks.{i}"] for i in range(21))
    assert ran[0] == parts[""] and ran[0] - ran[1] == skipped
    assert 0.25 < ran[1] / ran[0] < 0.26, "a quarter of the blocks and the small rest"


def test_adding_changes_beats_stale_outputs(monkeypatch):
    """Replacing the span's output by an old one forgets the current latents."""
    model = make_dit()
    plain, config = denoise(model, 20), DeltaDiTConfig(2, 6, boundary_step=10)

    def error():
        with diffusers_ext.apply(model, config):
            return (denoise(model, 20) - plain).pow(2).mean()

    ours = error()
    monkeypatch.setattr(delta_dit, "change", lambda after, before: after)
    monkeypatch.setattr(delta_dit, "add_change", lambda before, stored: stored)
    assert error() > 5 * ours > 0


@pytest.mark.parametrize("order", ["rear", "front"])
def test_a_skipped_step_at_the_same_input_equals_the_full_one(order):
    """h_in + (h_out - h_in). The times differ for the cache, and are the same number for the model, in float32."""
    model, x = make_dit(), torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    labels, times = torch.tensor([1, 7]), torch.tensor([500, 500 - 1e-9], dtype=torch.float64)

    def call(t):
        return model(x, timestep=t.expand(2), class_labels=labels, return_dict=False)[0]

    with torch.no_grad(), diffusers_ext.apply(model, DeltaDiTConfig(2, 6, span_order=order)) as handle:
        full, skipped = call(times[0]), call(times[1])
        assert handle.summary()["delta-dit"]["blocks_run"] == 8 + 2
    torch.testing.assert_close(skipped, full, atol=1e-6 * full.abs().max().item(), rtol=0)


@pytest.mark.slow
def test_the_order_of_the_paper_is_closer_on_a_trained_model():
    """Rear then front against front then rear at equal cost, mean over 16 pictures."""
    pipe, captions, orders = zoo.load("shapes-dit"), zoo.held_out(16).captions, ("rear_then_front", "front_then_rear")
    plain, errors = zoo.generate(pipe, captions), []
    for order in orders:
        with diffusers_ext.apply(pipe, DeltaDiTConfig(2, span_order=order)):
            errors.append((zoo.generate(pipe, captions) - plain).pow(2).mean().item())
    assert 0 < errors[0] <= errors[1], errors


def test_a_change_in_the_number_of_tokens_computes_in_full():
    tokens = torch.arange(24.0).view(1, 6, 4)
    call = Call({"front": (0, 2)}, "front", (), {"front": (torch.ones(1, 8, 4),)})
    assert call.enter(0, (tokens,)) is None and call.enter(1, (tokens,)) is None
    call.leave(1, (3 * tokens,))
    assert call.reused is None and torch.equal(call.deltas["front"][0], 2 * tokens)


def test_only_what_will_be_used_is_kept():
    def kept(step, interval, store, order=0):
        config = DeltaDiTConfig(interval, 4, boundary_step=5, store=store, forecast_order=order)
        return config.plan(8, None).call(Store(), 0, step).recorded

    assert kept(0, 2, "both") == ("rear",) and kept(6, 2, "both") == ("front",)
    assert kept(4, 2, "both") == ("front",) and kept(3, 4, "both") == ("rear", "front")
    assert kept(4, 2, "active") == ("rear",) and kept(0, 1, "both") == ()
    assert kept(0, 2, "both", 1) == ("rear",) and kept(2, 2, "both", 1) == ("rear", "front")


# ---- the warm-up


def simulated(config, steps):
    """(step, reused span or None, spans recorded by a full step, full steps that a reused one looks at) of a run."""
    plan, store = config.plan(8, steps), Store()
    for step in range(steps):
        call = plan.call(store, step, step)
        looked_at = [s for s, _ in store.deltas[call.reused].kept] if call.reused else []
        yield step, call.reused, call.recorded, looked_at
        if call.reused is None:
            call.deltas = {name: (torch.zeros(1),) for name in call.recorded}
            plan.keep(store, call)


@pytest.mark.parametrize("start", [1, 2, 3, 6, 11])
@pytest.mark.parametrize("interval", [1, 2, 3, 5])
def test_schedule_with_a_warm_up(start, interval):
    """Full steps, what the others look back at, and that nothing else is kept: all boundaries, orders and stores."""
    steps = 30
    cycle = {i for i in range(steps) if i < start or (i - (start - 1)) % interval == 0}
    for boundary, order, store in itertools.product(range(14), (0, 1, 2), ("both", "active")):
        config = DeltaDiTConfig(interval, 5, boundary_step=boundary, store=store, forecast_order=order)
        run = list(simulated(dataclasses.replace(config, start_step=start), steps))
        full = [step for step, reused, *_ in run if reused is None]
        late = {boundary} if store == "active" and boundary >= start else set()
        assert set(full) == cycle | late
        names = {step: "rear" if step < boundary else "front" for step in range(steps)}
        assert all(reused in (None, names[step]) for step, reused, *_ in run)
        used = {(s, reused) for *_, reused, _, looked_at in run for s in looked_at}
        recorded = {(step, name) for step, _, spans, _ in run for name in spans}
        if store == "both":
            expected = {step: [s for s in full if s < step][-order - 1 :] for step in range(steps) if step not in full}
            assert {step: looked_at for step, reused, _, looked_at in run if reused} == expected
            settled = steps - interval * (order + 1)
            assert {(s, n) for s, n in recorded if s < settled} == {(s, n) for s, n in used if s < settled}
        else:
            assert all(len(spans) <= 1 for *_, spans, _ in run)
            assert all(s >= start - 1 - order for s, _ in recorded)


@pytest.mark.parametrize("start", [1, 2, 4])
def test_two_calls_per_step_warm_up_together(count_runs, start):
    """Heun: every timestep but the first and last is seen twice, so the second kind of call begins one step late."""
    model, full = make_dit(), {}
    labels = torch.tensor([1, 7])

    def predict(x, t):
        def call():
            predict.out = model(x, timestep=t.expand(2), class_labels=labels, return_dict=False)[0]

        ran = count_runs(call, last=model.transformer_blocks[-1].attn1)["last"]
        full.setdefault(t.item(), []).append(ran == 1)
        return predict.out

    with diffusers_ext.apply(model, DeltaDiTConfig(2, 6, span_order="rear", start_step=start)):
        denoise(model, 9, predict, FlowMatchHeunDiscreteScheduler())
    first, second = ([calls[n] for calls in full.values() if n < len(calls)] for n in (0, 1))
    assert len(first) == 9 and len(second) == 8
    assert first == [i < start or (i - (start - 1)) % 2 == 0 for i in range(9)]
    born = max(1, start - 1)
    assert second == [i < start or (i - born) % 2 == 0 for i in range(1, 9)]


def test_a_run_that_is_all_warm_up_is_exact():
    model = make_dit()
    plain, config = denoise(model, 6), DeltaDiTConfig(2, 6, boundary_step=3, start_step=6)
    assert "none of 6 steps" in diffusers_ext.check(model, config, num_inference_steps=6).warnings[0]
    assert not diffusers_ext.check(model, config, num_inference_steps=7).warnings
    with diffusers_ext.apply(model, config) as handle:
        assert torch.equal(denoise(model, 6), plain)
        assert handle.summary()["delta-dit"]["computed"] == 6
        denoise(model, 7)
        assert handle.summary()["delta-dit"]["reused"] == 1


def test_after_a_warm_up_it_beats_diffusers_first_block_cache():
    """Fewer operations, and at least as close to the pictures without a cache."""
    pipe, captions = zoo.load("shapes-dit"), zoo.held_out(4).captions
    ours = DeltaDiTConfig(cache_interval=3, num_cached_blocks=11, forecast_order=1, start_step=6)

    def drawn(config=None):
        """(operations, pictures)"""
        images = []
        with diffusers_ext.apply(pipe, config) if config else contextlib.nullcontext():
            macs = count_macs(lambda: images.append(zoo.generate(pipe, captions, num_inference_steps=20)))
        return macs, images[0]

    reference = drawn()[1]
    (macs, images), (peer_macs, peer_images) = drawn(ours), drawn(FirstBlockCacheConfig(threshold=0.1))
    assert macs < peer_macs and mean_psnr(images, reference) >= mean_psnr(peer_images, reference)


# ---- more of the models


def test_layer_skipping_guidance_of_stable_diffusion_3():
    """A call that leaves out the first and last block of the span computes everything it is asked for."""
    from diffusers import SD3Transformer2DModel

    torch.manual_seed(0)
    model = SD3Transformer2DModel(
        sample_size=8, in_channels=4, out_channels=4, num_layers=6, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=8, caption_projection_dim=16, pooled_projection_dim=8, pos_embed_max_size=8,
    ).eval()  # fmt: skip
    x, text, pooled = torch.randn(1, 4, 8, 8), torch.randn(1, 5, 8), torch.randn(1, 8)
    skipped = [0, 3]

    @torch.no_grad()
    def run():
        times = torch.tensor([900.0, 700.0, 500.0])
        return [model(x, text, pooled, t.expand(1), skip_layers=skipped, return_dict=False)[0] for t in times]

    plain = run()
    with diffusers_ext.apply(model, DeltaDiTConfig(3, 4, span_order="front")):
        assert all(map(torch.equal, run(), plain))


# ---- where the boundary is


def test_the_number_of_steps_comes_from_the_scheduler():
    target = SimpleNamespace(scheduler=FlowMatchEulerDiscreteScheduler())
    target.scheduler.set_timesteps(14)
    assert steps_of(target) == 14
    target.scheduler.set_begin_index(4)
    assert steps_of(target) == 10
    target.scheduler = HeunDiscreteScheduler()
    target.scheduler.set_timesteps(8)
    assert steps_of(target) == 8 and len(target.scheduler.timesteps) == 15


def test_the_boundary_of_a_pipeline(count_runs):
    pipe = zoo.load("shapes-dit")
    model = pipe.transformer
    inside = {"first": model.transformer_blocks[0].ff, "last": model.single_transformer_blocks[-1].proj_mlp}

    def draw(steps):
        zoo.generate(pipe, ["a red circle"], num_inference_steps=steps, guidance_scale=1.0)

    with diffusers_ext.apply(pipe, DeltaDiTConfig(boundary=0.25)):
        assert count_runs(lambda: draw(8), **inside) == {"first": 5, "last": 7}
        assert count_runs(lambda: draw(4), **inside) == {"first": 2, "last": 4}


def test_a_model_alone_needs_to_be_told():
    model = make_dit()
    with pytest.raises(ValueError, match="num_inference_steps or boundary_step"):
        diffusers_ext.apply(model, DeltaDiTConfig())
    for config in (
        DeltaDiTConfig(boundary_step=3),
        DeltaDiTConfig(num_inference_steps=6),
        DeltaDiTConfig(span_order="rear"),
    ):
        assert diffusers_ext.check(model, config).ok


# ---- the trained model


def test_fewer_blocks_are_more_faithful():
    pipe, captions = zoo.load("shapes-dit"), zoo.held_out(2).captions

    def draw(config=None):
        if config is None:
            return zoo.generate(pipe, captions, num_inference_steps=10)
        with diffusers_ext.apply(pipe, config):
            return zoo.generate(pipe, captions, num_inference_steps=10)

    reference = draw()
    scores = [mean_psnr(draw(DeltaDiTConfig(2, n)), reference) for n in (2, 9)]
    scores.append(mean_psnr(draw(DeltaDiTConfig(5, 9)), reference))
    assert scores[0] > scores[1] > scores[2], scores


# ---- refusals


@pytest.mark.parametrize(
    "values, words",
    [
        ({"cache_interval": 0}, "cache_interval is 0"),
        ({"num_cached_blocks": 0}, "num_cached_blocks is 0"),
        ({"boundary": 1.5}, "boundary is 1.5"),
        ({"boundary_step": -1}, "boundary_step is -1"),
        ({"boundary_step": 9, "num_inference_steps": 8}, "accepts 0 to 8"),
        ({"span_order": "middle"}, "'rear_then_front', 'front_then_rear'"),
        ({"store": "none"}, "'both', 'active'"),
        ({"start_step": 0}, "start_step is 0; accepted: whole numbers from 1"),
        ({"start_step": 1.5}, "start_step is 1.5; accepted: whole numbers"),
    ],
)
def test_bad_values(values, words):
    with pytest.raises(ValueError, match=words):
        DeltaDiTConfig(**values)


def test_refuses_more_blocks_than_there_are(traces):
    model = make_dit(4)
    with pytest.raises(ValueError, match="num_cached_blocks is 4.*accepted: 1 to 3"):
        diffusers_ext.apply(model, DeltaDiTConfig(2, 4, boundary_step=1))
    with pytest.raises(ValueError, match="a run of 5 steps accepts 0 to 5"):
        diffusers_ext.apply(model, DeltaDiTConfig(2, 3, boundary_step=6), num_inference_steps=5)
    assert traces(model) == ({}, set(), False)


def test_refuses_models_it_cannot_cut(make_unet):
    with pytest.raises(ValueError, match="UNet2DConditionModel has none. For UNets use DeepCacheConfig"):
        diffusers_ext.apply(make_unet(), DeltaDiTConfig(boundary_step=1))
    with pytest.raises(ValueError, match="at least two blocks"):
        diffusers_ext.apply(make_dit(1), DeltaDiTConfig(boundary_step=1))

    class Block(torch.nn.Module):
        pass

    model = torch.nn.Module()
    model.blocks = torch.nn.ModuleList([Block(), Block()])
    with pytest.raises(ValueError, match="inputs and outputs of Block.*TransformerBlockRegistry"):
        diffusers_ext.apply(model, DeltaDiTConfig(boundary_step=1))
    model.temporal_transformer_blocks = torch.nn.ModuleList()
    with pytest.raises(ValueError, match="alternate"):
        diffusers_ext.apply(model, DeltaDiTConfig(boundary_step=1))


def test_refuses_an_active_upstream_cache():
    pipe = zoo.load("shapes-dit")
    pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=0.1))
    with pytest.raises(ValueError, match="disable_cache"):
        diffusers_ext.apply(pipe, DeltaDiTConfig())


def test_fused_projections_are_fine():
    from diffusers import FluxTransformer2DModel

    model = FluxTransformer2DModel(
        in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=8, num_attention_heads=1,
        joint_attention_dim=4, pooled_projection_dim=4, axes_dims_rope=(2, 2, 4),
    )  # fmt: skip
    model.fuse_qkv_projections()
    assert diffusers_ext.check(model, DeltaDiTConfig(span_order="rear")).ok


def test_warns_when_no_step_can_be_reused():
    model = make_dit()
    assert (
        "none of 1 steps"
        in diffusers_ext.check(model, DeltaDiTConfig(span_order="rear"), num_inference_steps=1).warnings[0]
    )
    assert diffusers_ext.check(model, DeltaDiTConfig(1, span_order="rear"), num_inference_steps=9).warnings
    assert not diffusers_ext.check(model, DeltaDiTConfig(), num_inference_steps=2).warnings


def test_config_travels_as_json():
    config = DeltaDiTConfig(3, 5, 0.4, 6, "front_then_rear", "active", 20, 1, 4)
    assert diffusers_ext.MethodConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
