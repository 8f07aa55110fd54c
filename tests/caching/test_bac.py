"""BAC: the programme against brute force, unions, call counts, an independent loop, calibration, refusals.

That it never goes stale is tested for every cache in `tests/common/test_cache_matrix.py`.
"""

from __future__ import annotations

import importlib.util
import itertools
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    PixArtTransformer2DModel,
    SD3Transformer2DModel,
)

import diffusers_ext
from diffusers_ext import BACConfig, BACStatistics, calibrate_bac, measure_bac, zoo
from diffusers_ext.caching._bac_calls import Plan, Recorder
from diffusers_ext.caching._bac_schedule import (
    adaptive_schedules,
    bubbling_union,
    even_schedule,
    gains,
    mean_difference,
    score,
    similarity,
    stretched,
    volatility,
)
from diffusers_ext.caching.bac import run_length, sub_blocks
from diffusers_ext.eval import count_macs, macs_by_module


def make_pixart(layers=2, width=16, **changes):
    torch.manual_seed(0)
    model = PixArtTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=width // 2,
        in_channels=4,
        out_channels=4,
        num_layers=layers,
        cross_attention_dim=width,
        sample_size=8,
        caption_channels=8,
        use_additional_conditions=False,
        **changes,
    )
    for parameter in model.parameters():
        if parameter.abs().max() == 0:
            torch.nn.init.normal_(parameter, std=0.2)
    return model.eval().requires_grad_(False)


def target_of(model, scheduler=None):
    return SimpleNamespace(transformer=model, scheduler=scheduler or DDIMScheduler(clip_sample=False))


def denoise(target, steps, seed=1, batch=2, predict=None):
    generator = torch.Generator().manual_seed(seed)
    text, x = torch.randn(batch, 5, 8, generator=generator), torch.randn(batch, 4, 8, 8, generator=generator)
    model, scheduler = target.transformer, target.scheduler
    predict = predict or (lambda x, t: model(x, text, timestep=t.expand(batch), return_dict=False)[0])
    scheduler.set_timesteps(steps)
    with torch.no_grad():
        for t in scheduler.timesteps:
            x = scheduler.step(predict(x, t), t, x).prev_sample
    return x


# ---- the programme


def brute_force(matrix, updates):
    """The best score over all subsets with step 0, summed term by term."""
    total = len(matrix)
    best = -float("inf")
    for rest in itertools.combinations(range(1, total), updates - 1):
        steps = (0, *rest)
        last = [max(u for u in steps if u <= s) for s in range(total)]
        best = max(best, sum(matrix[last[s], s].item() for s in range(total) if s not in steps))
    return best


@pytest.mark.parametrize("total, updates", [(2, 2), (5, 2), (7, 3), (8, 7), (10, 4), (6, 6)])
@pytest.mark.parametrize("sign", [1, -1], ids=["similarity", "distance"])
def test_the_programme_is_optimal(total, updates, sign):
    generator = torch.Generator().manual_seed(total * updates)
    matrices = sign * torch.rand(4, total, total, generator=generator, dtype=torch.float64)
    schedules = adaptive_schedules(matrices, updates)
    for matrix, steps in zip(matrices, schedules):
        assert steps[0] == 0 and len(set(steps)) == updates and list(steps) == sorted(steps)
        assert score(matrix, steps) == pytest.approx(brute_force(matrix, updates), rel=1e-12)


def test_uniform_similarity_scores_what_is_reused():
    (steps,) = adaptive_schedules(torch.ones(1, 9, 9), 4)
    assert score(torch.ones(9, 9), steps) == 9 - 4


@pytest.mark.parametrize("starts, total", [((0, 3, 8), 12), ((0, 1, 2, 9), 10)])
def test_phases_are_updated_where_they_begin(starts, total):
    phase = torch.tensor([sum(s <= t for s in starts) for t in range(total)])
    assert adaptive_schedules((phase[:, None] == phase).double()[None], len(starts)) == [starts]


def test_gains_leave_out_the_step_itself():
    matrix = torch.arange(16.0).view(1, 4, 4)
    phi = gains(matrix)[0]
    assert phi[0, 1] == 0 and phi[0, 4] == 1 + 2 + 3 and phi[1, 3] == 6 and phi[2, 4] == 11
    assert phi[2, 2] == phi[3, 0] == -torch.inf


def test_similarities_written_out():
    f = torch.randn(3, 4, 6, generator=torch.Generator().manual_seed(0))
    pairs = {
        "cosine": lambda a, b: torch.cosine_similarity(a, b, dim=0),
        "mse": lambda a, b: -(a - b).pow(2).mean(),
        "l1": lambda a, b: -(a - b).abs().mean(),
        "l2": lambda a, b: -(a - b).norm(),
    }
    for metric, pair in pairs.items():
        expected = torch.stack([torch.stack([pair(n[t], n[s]) for s in range(4)]) for n in f for t in range(4)])
        expected = expected.view(3, 4, 4).mean(0).double()
        torch.testing.assert_close(similarity(f, metric), expected, atol=1e-6, rtol=1e-6)
    later = [(n[t] - n[s]).abs().mean().item() for n in f for t in range(4) for s in range(t + 1, 4)]
    assert volatility(mean_difference(f)) == pytest.approx(sum(later) / len(later), rel=1e-6)


def test_even_and_stretched():
    assert even_schedule(10, 3) == (0, 3, 6) and even_schedule(4, 4) == (0, 1, 2, 3)
    assert stretched((0, 3, 9), 10, 20) == (0, 6, 18)
    assert stretched((0, 1, 2, 9), 10, 5) == (0, 1, 4) and stretched((0, 9), 10, 5) == (0, 4)


# ---- unions


@pytest.mark.parametrize("candidates", ["ffn", "all"])
@pytest.mark.parametrize("blocks", [0, 1, 3, 9])
def test_a_selected_block_is_fresh_whenever_a_later_feed_forward_is(blocks, candidates):
    generator = torch.Generator().manual_seed(blocks)
    names = [f"{i}.{kind}" for i in range(4) for kind in ("attn", "ff")]
    feed_forward = names[1::2]
    errors = dict(zip(names, torch.rand(8, generator=generator).tolist()))
    before = {n: (0, *(1 + torch.randperm(11, generator=generator)[:3]).sort().values.tolist()) for n in names}
    after = bubbling_union(before, feed_forward, errors, blocks, candidates)
    known = names if candidates == "all" else feed_forward
    selected = sorted(known, key=errors.get)[len(known) - min(blocks, len(known)) :]
    assert len(selected) == min(blocks, len(known))
    for name in names:
        later = [n for n in feed_forward if names.index(n) > names.index(name)]
        expected = set(before[name]).union(*(after[n] for n in later)) if name in selected else set(before[name])
        assert set(after[name]) == expected and list(after[name]) == sorted(expected)


def test_unions_reach_the_first_block_through_the_one_between():
    before = {"a": (0,), "b": (0, 2), "c": (0, 5)}
    after = bubbling_union(before, ["a", "b", "c"], {"a": 3, "b": 2, "c": 1}, 2)
    assert after == {"a": (0, 2, 5), "b": (0, 2, 5), "c": (0, 5)}


# ---- what runs


def uneven(names, total):
    """A different list for every sub-block."""
    generator = torch.Generator().manual_seed(0)
    return {
        n: (0, *(1 + torch.randperm(total - 1, generator=generator)[: 2 + i % 3]).sort().values.tolist())
        for i, n in enumerate(names)
    }


@pytest.mark.parametrize("order", [0, 1, 2])
def test_equals_the_rule_written_out(by_hand, order):
    target = target_of(make_pixart())
    schedule = uneven(sub_blocks(target.transformer), 10)
    undo = by_hand(target.transformer, schedule, order)
    expected = denoise(target, 10)
    undo()
    config = BACConfig(schedule, num_inference_steps=10, forecast_order=order)
    with diffusers_ext.apply(target, config) as handle:
        torch.testing.assert_close(denoise(target, 10), expected, atol=1e-4 if order else 0, rtol=0)
        figures = handle.summary()["bac"]
    runs = sum(map(len, schedule.values()))
    assert figures["sub_blocks_run"] == runs and figures["sub_blocks_reused"] == 10 * len(schedule) - runs
    assert not torch.equal(denoise(target, 10), expected)


def test_every_step_is_exact():
    target = target_of(make_pixart())
    plain = denoise(target, 6)
    for config in (
        BACConfig(num_updates=6),
        BACConfig({n: range(6) for n in sub_blocks(target.transformer)}, None, 6),
    ):
        with diffusers_ext.apply(target, config) as handle:
            assert torch.equal(denoise(target, 6), plain)
            assert handle.summary()["bac"]["macs_saved"] == 0
    assert torch.equal(denoise(target, 6), plain)


def test_each_module_runs_as_often_as_its_list_says(count_runs):
    """On the Flux layout, whose single blocks run attention and feed-forward side by side."""
    pipe = zoo.load("shapes-dit")
    parts = sub_blocks(pipe.transformer)
    assert {part.kind for part in parts.values()} == {"attention", "ffn", "block"}
    schedule = uneven(parts, 6)
    # Hooks on the reused modules themselves would also see calls that are answered from memory.
    inside = {
        f"{name}/{i}": next(m for m in module.modules() if isinstance(m, torch.nn.Linear) and m is not module)
        for name, part in parts.items()
        for i, module in enumerate((part.output, *part.inputs))
        if list(module.children())
    }
    assert {key.partition("/")[0] for key in inside} == set(parts)

    def draw():
        zoo.generate(pipe, ["a red circle"], num_inference_steps=6, guidance_scale=1.0)

    full = count_macs(draw)
    with diffusers_ext.apply(pipe, BACConfig(schedule, num_inference_steps=6)) as handle:
        counts = count_runs(draw, **inside)
        left = count_macs(draw)
        figures = handle.summary()["bac"]
    assert counts == {key: len(schedule[key.partition("/")[0]]) for key in inside}
    assert figures["sub_blocks_run"] == sum(map(len, schedule.values()))
    assert full - left == round(figures["macs_saved"] * figures["macs_full_call"] * 6)


def test_macs_are_those_of_the_sub_blocks_left_out():
    """On PixArt-alpha's size, on the meta device: three different calls of a run."""
    with torch.device("meta"):
        model = PixArtTransformer2DModel(sample_size=64, caption_channels=64, use_additional_conditions=False).eval()
        inputs = (torch.randn(1, 4, 64, 64), torch.randn(1, 20, 64))
    model.adaln_single.register_forward_pre_hook(lambda _, args: (args[0].to("meta"), *args[1:]))
    parts = macs_by_module(model, *inputs, timestep=torch.tensor([9.0]), depth=3)
    names = list(sub_blocks(model))
    assert len(names) == 3 * 28
    lists = {n: (0,) if n.endswith("ff") else (0, 1) if n.endswith("attn2") else (0, 1, 2) for n in names}
    with diffusers_ext.apply(model, BACConfig(lists, num_inference_steps=3)) as handle:
        ran = [count_macs(model, *inputs, timestep=torch.tensor([t])) for t in (900.0, 800.0, 700.0)]
        saved = handle.summary()["bac"]["macs_saved"]
    ff, attn2 = (sum(parts[n] for n in names if n.endswith(kind)) for kind in ("ff", "attn2"))
    assert ran == [parts[""], parts[""] - ff, parts[""] - ff - attn2]
    assert saved == pytest.approx((2 * ff + attn2) / (3 * parts[""]))


def test_chunked_feed_forwards_give_back_every_chunk():
    target = target_of(make_pixart())
    with diffusers_ext.apply(target, BACConfig(num_updates=3)):
        whole = denoise(target, 8)
    for block in target.transformer.transformer_blocks:
        block.set_chunk_feed_forward(4, dim=1)
    with diffusers_ext.apply(target, BACConfig(num_updates=3)):
        torch.testing.assert_close(denoise(target, 8), whole, atol=1e-5, rtol=1e-5)


def test_only_what_will_be_used_is_kept():
    plan = Plan.of({"a": (0, 1), "b": (0, 3)}, 4)
    store = plan.new_kind()
    for step, reused, stored in (
        (0, set(), {"b"}),
        (1, {"b"}, {"a", "b"}),
        (2, {"a", "b"}, {"a", "b"}),
        (3, {"a"}, {"a"}),
    ):
        call = plan.begin(store, step)
        assert call.reused == reused
        for name in ("a", "b"):
            if name in call.reused:
                call.recall(name)
            else:
                call.keep(name, torch.zeros(1))
        call.end()
        assert set(store) == stored
    late = plan.begin(plan.new_kind(), 2)
    assert late.reused == set() and late.kept == {"a"}, "a kind of call that begins late computes everything"


def test_gates_and_the_stream_stay_live():
    """A block of which nothing runs adds its old branches, weighted for the current time, to its current input."""
    model = make_pixart(1)
    block, branches, calls = model.transformer_blocks[0], {}, []
    for name in ("attn1", "attn2", "ff"):
        module = getattr(block, name)
        module.register_forward_hook(lambda _, args, out, name=name: branches.setdefault(name, out))
    block.register_forward_hook(
        lambda _, args, kwargs, out: calls.append((args[0], kwargs["timestep"], out)), with_kwargs=True
    )
    text = torch.randn(1, 5, 8)
    with diffusers_ext.apply(model, BACConfig(num_updates=2, num_inference_steps=4)), torch.no_grad():
        for t in (900.0, 100.0):
            model(torch.randn(1, 4, 8, 8), text, timestep=torch.tensor([t]), return_dict=False)
    x, time_embedding, out = calls[1]
    gates = block.scale_shift_table[None] + time_embedding.reshape(1, 6, -1)
    expected = x + gates[:, 2:3] * branches["attn1"] + branches["attn2"] + gates[:, 5:6] * branches["ff"]
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(calls[0][0], x)


# ---- where in the run a call is


def test_the_length_of_a_run_counts_different_timesteps():
    for scheduler in (DDIMScheduler(), FlowMatchHeunDiscreteScheduler()):
        scheduler.set_timesteps(8)
        target = SimpleNamespace(scheduler=scheduler)
        assert run_length(target) == run_length(target, float(scheduler.timesteps[0])) == (8, 0)
    midpoints = SimpleNamespace(timesteps=torch.tensor([900, 800, 800, 700, 600]), begin_index=3)
    assert run_length(SimpleNamespace(scheduler=midpoints)) == (4, 2)


def test_image_to_image_starts_inside_of_the_schedule():
    target = SimpleNamespace(scheduler=FlowMatchEulerDiscreteScheduler())
    target.scheduler.set_timesteps(10)
    target.scheduler.set_begin_index(4)
    assert run_length(target) == (10, 4)
    target.scheduler = DDIMScheduler()
    target.scheduler.set_timesteps(10)
    assert run_length(target, float(target.scheduler.timesteps[4])) == (10, 4)
    assert run_length(SimpleNamespace()) is None


# ---- calibration


@pytest.fixture(scope="module")
def small():
    """A small model, and statistics of three runs of it."""
    target = target_of(make_pixart())
    statistics = measure_bac(target, lambda seed: denoise(target, 6, seed), 3, progress=False)
    return target, statistics


def test_what_is_measured_is_what_the_modules_give(small):
    target, statistics = small
    outputs = {name: [] for name in statistics.names}
    handles = [
        target.transformer.get_submodule(name).register_forward_hook(
            lambda _, args, out, name=name: outputs[name].append(out.flatten(1))
        )
        for name in outputs
    ]
    for seed in range(3):
        denoise(target, 6, seed)
    for handle in handles:
        handle.remove()
    for name, found in zip(statistics.names, statistics.similarity):
        features = torch.cat([torch.stack(outputs[name][i : i + 6], 1) for i in (0, 6, 12)])
        assert features.shape[:2] == (6, 6)
        torch.testing.assert_close(found, similarity(features), atol=1e-9, rtol=0)
        assert statistics.errors[name] == pytest.approx(volatility(mean_difference(features)))
    assert list(statistics.names) == [
        f"transformer_blocks.{i}.{part}" for i in (0, 1) for part in ("attn1", "attn2", "ff")
    ]
    assert statistics.feed_forward == ("transformer_blocks.0.ff", "transformer_blocks.1.ff")


def test_one_list_for_all_is_the_best_for_the_mean(small):
    _, statistics = small
    lists = set(statistics.config(3).schedule.values())
    assert lists == set(adaptive_schedules(statistics.similarity.mean(0)[None], 3)) and len(lists) == 1
    each = statistics.config(3, bua_blocks=0, shared=False)
    assert list(each.schedule.values()) == adaptive_schedules(statistics.similarity, 3) != list(lists) * 6


def test_names_are_in_the_order_in_which_they_run():
    target = target_of(make_pixart())
    blocks = target.transformer.transformer_blocks[0]
    ff = blocks.ff
    del blocks.ff
    blocks._modules = {"ff": ff, **blocks._modules}
    assert list(sub_blocks(target.transformer))[0].endswith("ff")
    statistics = measure_bac(target, lambda seed: denoise(target, 2, seed), 1, progress=False)
    assert statistics.names[0].endswith("attn1") and statistics.names[2].endswith("0.ff")


def test_calibration_repeats_and_leaves_the_model_alone(small, traces):
    target, statistics = small
    before = traces(target.transformer)
    plain = denoise(target, 6)
    config = calibrate_bac(target, lambda seed: denoise(target, 6, seed), 3, calibration_samples=3, progress=False)
    assert config == statistics.config(3) and traces(target.transformer) == before
    assert torch.equal(denoise(target, 6), plain)
    assert {len(steps) for steps in statistics.config(3, bua_blocks=0, shared=False).schedule.values()} == {3}


def test_calibration_that_is_interrupted(small, traces):
    target, _ = small
    before, seen = traces(target.transformer), []

    def run(seed):
        if seen:
            raise KeyboardInterrupt
        seen.append(denoise(target, 4, seed))

    with pytest.raises(KeyboardInterrupt):
        measure_bac(target, run, progress=False)
    assert traces(target.transformer) == before


def test_calibration_looks_at_a_part_of_large_outputs(small):
    target, statistics = small
    some = measure_bac(target, lambda seed: denoise(target, 6, seed), 3, max_elements=100, progress=False)
    gap = (some.similarity - statistics.similarity).abs().max()
    assert 0 < gap < 0.2
    recorder = Recorder("cosine", 3, 0)
    whole = torch.arange(10.0)[None]
    assert torch.equal(recorder.elements([whole]), recorder.elements([whole[:, :4], whole[:, 4:]]))


def test_guidance_in_two_calls_measures_both():
    """Two calls per step with two prompts count as two samples, as they do in one batch."""
    target = target_of(make_pixart())
    model, generator = target.transformer, torch.Generator().manual_seed(3)
    prompts = torch.randn(2, 5, 8, generator=generator)
    parts = [prompts[:1].clone(), prompts[1:].clone()]

    def split(x, t):
        u, c = (model(x, text, timestep=t.expand(1), return_dict=False)[0] for text in parts)
        return u + 2 * (c - u)

    def batched(x, t):
        u, c = model(torch.cat([x, x]), prompts, timestep=t.expand(2), return_dict=False)[0].chunk(2)
        return u + 2 * (c - u)

    found = [
        measure_bac(target, lambda seed, p=p: denoise(target, 4, seed, 1, p), 1, progress=False)
        for p in (split, batched)
    ]
    torch.testing.assert_close(found[0].similarity, found[1].similarity, atol=1e-5, rtol=0)


def test_stages_of_a_step_count_once():
    target = target_of(make_pixart(), FlowMatchHeunDiscreteScheduler())
    statistics = measure_bac(target, lambda seed: denoise(target, 5, seed), 1, progress=False)
    assert statistics.num_steps == 5
    with diffusers_ext.apply(target, statistics.config(3, shared=False), num_inference_steps=5) as handle:
        denoise(target, 5)
        assert handle.summary()["bac"]["reused"] > 0


def test_stable_diffusion_3_parts():
    """Joint attention gives a tuple, 3.5 has a second attention, the last block drops the text."""
    torch.manual_seed(0)
    model = SD3Transformer2DModel(
        sample_size=8, in_channels=4, out_channels=4, num_layers=2, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=8, caption_projection_dim=16, pooled_projection_dim=8, pos_embed_max_size=8,
        dual_attention_layers=(0,), qk_norm="rms_norm",
    ).eval()  # fmt: skip
    names = [name.removeprefix("transformer_blocks.") for name in sub_blocks(model)]
    assert names == ["0.attn", "0.attn2", "0.ff", "0.ff_context", "1.attn", "1.ff"]
    x, text, pooled = torch.randn(1, 4, 8, 8), torch.randn(1, 5, 8), torch.randn(1, 8)
    with torch.no_grad(), diffusers_ext.apply(model, BACConfig(num_updates=2, num_inference_steps=4)):
        # An input that does not move, at times that hardly do: what is reused is what would have been computed.
        first, second = (model(x, text, pooled, torch.tensor([t]), return_dict=False)[0] for t in (500.0, 499.99))
    torch.testing.assert_close(first, second, atol=1e-3, rtol=1e-3)


# ---- files


def test_a_schedule_travels_as_json(small, tmp_path):
    config = small[1].config(3, shared=False)
    config.save(tmp_path / "bac.json")
    again = BACConfig.load(tmp_path / "bac.json")
    assert again == config and list(again.schedule) == list(config.schedule)
    values = json.loads((tmp_path / "bac.json").read_text(encoding="utf-8"))
    assert (values["model_class"], values["scheduler_class"]) == ("PixArtTransformer2DModel", "DDIMScheduler")
    assert values["num_steps"] == 6 and values["metric"] == "cosine" and values["stats"]["num_updates"] == 3
    assert diffusers_ext.MethodConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize("text", ["", "[]", '{"format": "other"}', '{"format": "diffusers_ext.bac", "num_steps": 4}'])
def test_other_files_are_refused(tmp_path, text):
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(ValueError, match="x.json holds no BAC schedule"):
        BACConfig.load(tmp_path / "x.json")
    with pytest.raises(ValueError, match="calibrate_bac"):
        BACConfig().save(tmp_path / "y.json")


def test_another_number_of_steps(small):
    target, statistics = small
    config = statistics.config(3, 0, shared=False)
    preflight = diffusers_ext.check(target, config, num_inference_steps=12)
    assert "is for 6 steps and the run has 12" in preflight.errors[0]
    with diffusers_ext.apply(target, config), pytest.raises(ValueError, match="is for 6 steps and the run has 12"):
        denoise(target, 12)
    config = BACConfig(config.schedule, num_inference_steps=6, rescale=True)
    with diffusers_ext.apply(target, config, num_inference_steps=12) as handle:
        denoise(target, 12)
        assert handle.summary()["bac"]["sub_blocks_run"] == 3 * len(config.schedule)


def test_another_sampler_warns(small):
    target, statistics = small
    other = target_of(target.transformer, DDPMScheduler())
    assert (
        "calibrated with DDIMScheduler, not DDPMScheduler"
        in diffusers_ext.check(other, statistics.config(3)).warnings[0]
    )
    assert not diffusers_ext.check(target, statistics.config(3)).warnings


# ---- refusals


@pytest.mark.parametrize(
    "values, words",
    [
        ({"num_updates": 1}, "num_updates is 1; accepted: 2"),
        ({"num_updates": 7, "num_inference_steps": 6}, r"num_updates is 7.*\(6\)"),
        ({"num_inference_steps": 0}, "num_inference_steps is 0"),
        ({"schedule": {"a": (0,)}}, "comes with num_inference_steps"),
        ({"schedule": {"a": (0,)}, "num_inference_steps": 4, "num_updates": 2}, "no num_updates"),
        ({"schedule": {"a": ()}, "num_inference_steps": 4}, r"steps of a are \[\]"),
        ({"schedule": {"a": (1, 2)}, "num_inference_steps": 4}, r"steps of a are \[1, 2\]; accepted: 0 and then"),
        ({"schedule": {"a": (0, 4)}, "num_inference_steps": 4}, "up to 3"),
        ({"schedule": {"a": (0, 2, 2)}, "num_inference_steps": 4}, r"\[0, 2, 2\]"),
    ],
)
def test_bad_values(values, words):
    with pytest.raises(ValueError, match=words):
        BACConfig(**values)


def test_bad_calibrations(small):
    target, statistics = small
    for updates in (1, 7):
        with pytest.raises(ValueError, match=f"num_updates is {updates}"):
            statistics.config(updates)
    with pytest.raises(ValueError, match="num_updates is 1"):
        calibrate_bac(target, denoise, 1)
    with pytest.raises(ValueError, match="bua_blocks is -1"):
        statistics.config(3, -1)
    with pytest.raises(ValueError, match="bua_candidates 'some'"):
        statistics.config(3, bua_candidates="some")
    for options, words in (
        ({"calibration_samples": 0}, "calibration_samples is 0"),
        ({"max_elements": 0}, "max_elements 0"),
        ({"metric": "angle"}, "metric 'angle'"),
    ):
        with pytest.raises(ValueError, match=words):
            measure_bac(target, denoise, **options)
    with pytest.raises(ValueError, match="nothing was recorded"):
        measure_bac(target, lambda seed: None, progress=False)
    with pytest.raises(ValueError, match="had 3 steps, the ones before 2"):
        measure_bac(target, lambda seed: denoise(target, 2 + seed), 2, progress=False)
    with diffusers_ext.apply(target, BACConfig()), pytest.raises(ValueError, match="active cache"):
        measure_bac(target, denoise)


def test_calibration_needs_calls_that_run_everything():
    recorder = Recorder("cosine", 9, 0)
    for step in (0, 1):
        call = recorder.begin(recorder.kinds[0] if recorder.kinds else recorder.new_kind(), step)
        call.keep("a", torch.ones(1, 2))
        call.end()
    recorder.end_run()
    with pytest.raises(ValueError, match="never seen: b"):
        BACStatistics.of(recorder, {"a": "ffn", "b": "ffn"}, {})


def test_refuses_schedules_of_other_models(traces):
    target = target_of(make_pixart())
    schedule = dict.fromkeys(sub_blocks(target.transformer), (0, 2))
    less = dict(list(schedule.items())[1:])
    for wrong, words in (
        ({**schedule, "transformer_blocks.9.ff": (0,)}, "names transformer_blocks.9.ff, which the model lacks"),
        (less, "has no entry for transformer_blocks.0.attn1"),
    ):
        with pytest.raises(ValueError, match=words):
            diffusers_ext.apply(target, BACConfig(wrong, num_inference_steps=4))
    assert traces(target.transformer) == ({}, set(), False)


def test_refuses_other_models(make_unet):
    with pytest.raises(ValueError, match="UNet2DConditionModel is a UNet: use DeepCacheConfig"):
        diffusers_ext.apply(make_unet(), BACConfig(num_inference_steps=4))
    with pytest.raises(ValueError, match="which a model does not know"):
        diffusers_ext.apply(make_pixart(), BACConfig())
    assert "to the number of steps (4)" in str(
        diffusers_ext.check(make_pixart(), BACConfig(num_updates=5), num_inference_steps=4).errors
    )


def test_refuses_an_active_upstream_cache():
    from diffusers.hooks import FirstBlockCacheConfig

    pipe = zoo.load("shapes-dit")
    pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=0.1))
    with pytest.raises(ValueError, match="disable_cache"):
        diffusers_ext.apply(pipe, BACConfig())


def test_fused_projections_are_fine():
    from diffusers import FluxTransformer2DModel

    model = FluxTransformer2DModel(
        in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=8, num_attention_heads=1,
        joint_attention_dim=4, pooled_projection_dim=4, axes_dims_rope=(2, 2, 4),
    )  # fmt: skip
    model.fuse_qkv_projections()
    assert diffusers_ext.check(model, BACConfig(num_inference_steps=4)).ok


def test_warns_when_no_step_can_be_reused():
    target = target_of(make_pixart())
    assert (
        "none of 4 steps" in diffusers_ext.check(target, BACConfig(num_updates=4), num_inference_steps=4).warnings[0]
    )
    assert not diffusers_ext.check(target, BACConfig(num_updates=3), num_inference_steps=4).warnings


# ---- where it comes from


@pytest.fixture(scope="module")
def policy():
    """The example's module, whose policy here has random weights."""
    path = Path(__file__).resolve().parents[2] / "examples/diffusion_policy.py"
    spec = importlib.util.spec_from_file_location("diffusion_policy", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_diffusion_policy(policy, count_runs):
    """A decoder over chunks of actions: calibrated, applied, counted, and exact where nothing is left out."""
    torch.manual_seed(0)
    target = policy.new_target(policy.TinyDiffusionPolicy(32, 2).eval().requires_grad_(False))
    statistics = measure_bac(target, lambda seed: policy.plan(target, seed, 2, 12), 2, progress=False)
    assert [name.rpartition(".")[2] for name in statistics.names] == 2 * ["attn1", "attn2", "ff"]
    plain, observed = policy.plan(target, 0, 2, 12)
    with diffusers_ext.apply(target, BACConfig(num_updates=12)):
        assert torch.equal(policy.plan(target, 0, 2, 12)[0], plain)
    config = statistics.config(4, bua_blocks=1, shared=False)
    inside = {
        name: next(m for m in target.transformer.get_submodule(name).modules() if isinstance(m, torch.nn.Linear))
        for name in config.schedule
    }
    with diffusers_ext.apply(target, config):
        counts = count_runs(lambda: policy.plan(target, 0, 2, 12), **inside)
    assert counts == {name: len(steps) for name, steps in config.schedule.items()}
    assert policy.crossed(plain, observed).shape == (2,)


def test_demonstrations_of_the_policy_cross_the_room(policy):
    """Straight lines do not: the task needs a choice of side."""
    generator = torch.Generator().manual_seed(0)
    observed = policy.rooms(200, generator)
    paths = policy.demonstrations(observed, generator)
    assert policy.crossed(paths, observed).all()
    assert 50 < (paths[:, 8, 1] > 0).sum() < 150
    start, goal = observed[:, :, :2], observed[:, :, 2:]
    straight = start + torch.linspace(0, 1, policy.HORIZON).view(1, -1, 1) * (goal - start)
    assert policy.crossed(straight, observed).float().mean() < 0.5


# ---- the trained model


@pytest.fixture(scope="module")
def latents():
    """Latents of shapes-dit after 50 steps, without and with a config."""
    pipe, captions = zoo.load("shapes-dit"), zoo.held_out(24).captions

    def draw(config=None, captions=captions[:16], seed=0):
        kept = {}

        def keep(pipe, step, t, kwargs):
            kept["latents"] = kwargs["latents"]
            return {}

        options = {"num_inference_steps": 50, "seed": seed, "guidance_scale": 1.0, "callback_on_step_end": keep}
        if config is None:
            zoo.generate(pipe, list(captions), **options)
        else:
            with diffusers_ext.apply(pipe, config):
                zoo.generate(pipe, list(captions), **options)
        return kept["latents"]

    statistics = measure_bac(pipe, lambda seed: draw(None, captions[16 + seed :][:1], 100 + seed), 8, progress=False)
    return draw, statistics


@pytest.mark.slow
def test_calibrated_steps_beat_even_ones_at_equal_cost(latents):
    """Final latents of 16 noises after 50 steps, ten updates of every sub-block, one list for all.

    Lists of their own, as in the paper, are further from the full run than even steps on this model.
    """
    draw, statistics = latents
    reference = draw()
    configs = statistics.config(10), BACConfig(num_updates=10)
    calibrated, even = ((draw(config) - reference).pow(2).mean().item() for config in configs)
    assert calibrated < even
