"""RAS: exact on fresh caches, counted, fair to every token, and its refusals.

That it never goes stale is tested for every cache in `tests/common/test_cache_matrix.py`.
"""

from __future__ import annotations

import functools
import json
import math
from types import SimpleNamespace

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DiTTransformer2DModel,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    HeunDiscreteScheduler,
    PixArtTransformer2DModel,
    SD3Transformer2DModel,
    UniPCMultistepScheduler,
)

import diffusers_ext
from diffusers_ext import RASConfig, zoo
from diffusers_ext.caching import ras, ras_tokens
from diffusers_ext.caching.ras_tokens import Cache, Call, Known, Plan, Regions, active_tokens, token_scores
from diffusers_ext.eval import macs_by_module, mean_psnr


# ---- which tokens


def test_scores_by_hand():
    noise = torch.randn(2, 3, 4, 6, dtype=torch.float64)
    scores = token_scores(noise, 2)
    assert scores.shape == (2, 6)
    block = noise[1, :, 2:4, 4:6]
    assert scores[1, 5] == pytest.approx(block.std(0).mean().item())
    assert token_scores(noise, 2, "l2norm")[1, 5] == pytest.approx(block.norm(dim=0).mean().item())
    packed = FluxPipeline._pack_latents(noise, 2, 3, 4, 6)
    for metric in ("std", "l2norm"):
        torch.testing.assert_close(token_scores(packed, 2, metric), token_scores(noise, 2, metric))
    assert token_scores(noise[:, :, :3, :5], 2).shape == (2, 6), "sizes that are no multiple of a token"


def by_the_published_code(scores, skips, count, high_ratio, scale):
    """One picture: sort score * exp(s * D), leave out the lowest and the highest."""
    order = (scores * torch.exp(scale * (skips - 30))).argsort()
    low, high = int(count * (1 - high_ratio)), int(count * high_ratio)
    return order[low : len(order) - high].sort().values


@pytest.mark.parametrize("high_ratio", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("scale", [0.0, 0.1, 1.0])
def test_official_choice(high_ratio, scale):
    torch.manual_seed(0)
    scores, skips = torch.rand(3, 20).double(), torch.randint(0, 6, (3, 20)).double()
    chosen = active_tokens(scores, skips, 10, high_ratio, scale, "official")
    for i in range(3):
        assert torch.equal(chosen[i], by_the_published_code(scores[i], skips[i], 10, high_ratio, scale))


def test_balanced_choice_prefers_what_was_left_out():
    scores, skips = torch.arange(1.0, 9.0)[None], torch.zeros(1, 8)
    assert active_tokens(scores, skips, 4, 1.0, 0.5).tolist() == [[0, 1, 2, 3]]
    assert active_tokens(scores, skips, 4, 0.0, 0.5).tolist() == [[4, 5, 6, 7]]
    assert active_tokens(scores, skips, 4, 0.5, 0.5).tolist() == [[2, 3, 4, 5]]
    skips[0, [0, 7]] = 20.0
    for high_ratio in (0.0, 0.5, 1.0):
        assert {0, 7} <= set(active_tokens(scores, skips, 4, high_ratio, 0.5)[0].tolist())
    assert 7 not in active_tokens(scores, skips, 4, 1.0, 0.5, "official")[0]
    assert active_tokens(scores, skips, 0, 1.0, 0.5).shape == (1, 8)


def test_which_steps():
    plan = RASConfig(0.5).plan(30)
    assert (plan.start, plan.end, plan.resets) == (4, 29, (12, 22)), "the paper's steps for T = 30"
    assert [i for i in range(30) if not plan.skipped(i, 64)] == [0, 1, 2, 3, 12, 22]
    assert {plan.skipped(i, 64) for i in range(30)} == {0, 32}
    assert not RASConfig(1.0).plan(30).skipped(9, 64) and not RASConfig(1.0).plan(30).keeps(9)
    assert Plan(30, 4, 29, (), 0.001).skipped(9, 64) == 63


def test_dynamic_number_by_hand():
    plan = Plan(30, 4, 29, (), 0.5, 256, 4)
    for step in range(4, 30):
        wanted = 2048 + 256 * (step // 4 - ((30 + 4) // 4) // 2)
        assert plan.skipped(step, 4096) == max(0, wanted // 64 * 64)
    assert plan.skipped(29, 300) == 299, "one token at least is computed"


@pytest.mark.parametrize("high_ratio", [0.0, 0.5, 1.0])
def test_no_token_starves(high_ratio):
    """Noise that ranks the tokens the same way at every step."""
    noise = torch.linspace(0.5, 1.5, 64).view(1, 1, 8, 8) * torch.tensor([1.0, -1.0]).view(1, 2, 1, 1)
    spread = {}
    for scale in (0.0, 0.5):
        regions = Regions(Plan(28, 4, 27, (), 0.5), 1, "std", high_ratio, scale, "balanced")
        for step in range(27):
            regions.observe(noise, step)
        spread[scale] = (regions.skips.max() - regions.skips.min()).item()
        assert scale == 0 or regions.skips.max() < 24, "no token is left out on all 24 steps"
        assert regions.skips.sum() == 24 * 32 == 28 * 64 - 4 * 64 - sum(regions.history)
    assert spread[0.5] < spread[0.0] == 24


# ---- a part of the tokens


def _transformer(name, patch=2):
    torch.manual_seed(0)
    small = {"num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 2, "in_channels": 4}
    if name == "flux":
        small |= {"in_channels": 16, "num_single_layers": 2, "joint_attention_dim": 8, "pooled_projection_dim": 8}
        model = FluxTransformer2DModel(**small, axes_dims_rope=(2, 2, 4))
    elif name == "sd3":
        model = SD3Transformer2DModel(
            **small, sample_size=8, patch_size=patch, out_channels=4, joint_attention_dim=8, caption_projection_dim=16,
            pooled_projection_dim=8, pos_embed_max_size=16, qk_norm="rms_norm", dual_attention_layers=(0,),
        )  # fmt: skip
    elif name == "pixart":
        model = PixArtTransformer2DModel(
            **small, sample_size=8, patch_size=patch, out_channels=4, cross_attention_dim=16, caption_channels=8,
            use_additional_conditions=False,
        )  # fmt: skip
    else:
        model = DiTTransformer2DModel(**small, sample_size=8, patch_size=patch, num_embeds_ada_norm=9)
    for parameter in model.parameters():
        if parameter.abs().max() == 0:
            torch.nn.init.normal_(parameter, std=0.2)
    return SimpleNamespace(transformer=model.eval().requires_grad_(False), scheduler=FlowMatchEulerDiscreteScheduler())


@functools.cache
def _conditions(batch):
    """The same tensors at every step, as in a pipeline."""
    generator = torch.Generator().manual_seed(1)
    text, pooled = torch.randn(batch, 5, 8, generator=generator), torch.randn(batch, 8, generator=generator)
    return text, pooled, torch.arange(batch)


def _call(name, model, x, t, batch):
    text, pooled, labels = _conditions(batch)
    time, rest = t.expand(batch), {"return_dict": False}
    if name == "dit":
        return model(x, time, labels, **rest)[0]
    if name == "pixart":
        return model(x, text, timestep=time, **rest)[0]
    if name == "sd3":
        return model(x, text, pooled, time, **rest)[0]
    h, w = x.shape[-2:]
    tokens = FluxPipeline._pack_latents(x, batch, 4, h, w)
    ids = FluxPipeline._prepare_latent_image_ids(batch, h // 2, w // 2, x.device, x.dtype)
    out = model(tokens, text, pooled, time / 1000, ids, torch.zeros(5, 3), **rest)[0]
    return FluxPipeline._unpack_latents(out, h * 8, w * 8, 8)


NAMES = ("dit", "pixart", "sd3", "flux")


def _hook(target):
    (hook,) = [h for h in target.transformer._diffusers_hook.hooks.values() if isinstance(h, ras._RootHook)]
    return hook


@pytest.mark.parametrize(
    "name, patch, size",
    [(n, 2, (8, 8)) for n in NAMES] + [("sd3", 1, (4, 6)), ("sd3", 4, (8, 16)), ("flux", 2, (6, 8))],
)
@pytest.mark.parametrize("reuse_text", [False, True])
@pytest.mark.parametrize("batch", [1, 2, 3, 4])
def test_a_part_equals_the_same_part_of_the_whole(name, patch, size, batch, reuse_text):
    """Any tokens, other ones for each picture, with keys and values fresh from a whole pass at the same input."""
    target = _transformer(name, patch)
    model, t = target.transformer, torch.tensor(400.0)
    x = torch.randn(batch, 4, *size, generator=torch.Generator().manual_seed(2))
    count = size[0] * size[1] // patch**2
    index = torch.stack([torch.randperm(count, generator=torch.Generator().manual_seed(i))[:3] for i in range(batch)])
    with torch.no_grad(), diffusers_ext.apply(target, RASConfig()):
        hook, cache = _hook(target), Cache()
        hook.paused = True
        plain = _call(name, model, x, t, batch)
        outputs = []
        for chosen in (None, index):
            hook.shared.call = Call(cache, chosen, True, count, reuse_text=reuse_text)
            outputs.append(_call(name, model, x, t, batch))
            # What was not computed comes from the cache: without it, only the computed tokens may agree.
            cache.output = Known((torch.full_like(cache.output.newest[0], 9.0),))
        hook.shared.call = None
    assert torch.equal(outputs[0], plain)
    mask = torch.zeros(batch, count).scatter(1, index, 1.0).view(batch, 1, size[0] // patch, size[1] // patch)
    mask = mask.repeat_interleave(patch, 2).repeat_interleave(patch, 3).bool().expand_as(plain)
    torch.testing.assert_close(outputs[1][mask], plain[mask], atol=1e-5, rtol=1e-4)
    assert (outputs[1][~mask] == 9).all()


def run(target, name, batch=1, size=(8, 8), steps=12, scheduler=None):
    target.scheduler = scheduler or target.scheduler
    target.scheduler.set_timesteps(steps)
    x = torch.randn(batch, 4, *size, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        for t in target.scheduler.timesteps:
            x = target.scheduler.step(_call(name, target.transformer, x, t, batch), t, x).prev_sample
    return x


@pytest.mark.parametrize("name", NAMES)
def test_ratio_one_is_exact_and_nothing_stays(name):
    target = _transformer(name)
    plain, scheduler = run(target, name), set(vars(target.scheduler))
    with diffusers_ext.apply(target, RASConfig(1.0)) as handle:
        assert torch.equal(run(target, name), plain)
        assert handle.summary()["ras"]["reused"] == 0
    assert torch.equal(run(target, name), plain)
    assert set(vars(target.scheduler)) == scheduler


def on_the_line(seen, i):
    """The straight line through the last two (step, noise) of one token, at step i; one alone is repeated."""
    (a, u), (b, v) = ([seen[-1], *seen])[-2:]
    return v if a == b else v + (v - u) * (i - b) / (b - a)


def by_the_paper(target, x, steps, start, ratio, resets, order=0):
    """Sampling without hooks: whole passes everywhere, their noise replaced on the tokens that were left out.

    Right for a model whose tokens do not see each other.
    """
    regions = Regions(Plan(steps, start, steps - 1, resets, ratio), 2, "std", 1.0, 3.0, "balanced")
    scheduler, seen = target.scheduler, {}
    scheduler.set_timesteps(steps)
    with torch.no_grad():
        for i, t in enumerate(scheduler.timesteps):
            noise = _call("dit", target.transformer, x, t, len(x))
            index = regions.active(i, len(x))
            for picture in range(len(x)):
                for token in range(16):
                    part = noise[picture, :, token // 4 * 2 :, token % 4 * 2 :][:, :2, :2]
                    known = seen.setdefault((picture, token), [])
                    if index is None or token in index[picture]:
                        # Steps long before the first that leaves out tokens are not kept.
                        if index is not None or i >= start - 1 - math.ceil(order):
                            known.append((i, part.clone()))
                    else:
                        part.copy_(torch.lerp(known[-1][1], on_the_line(known, i), order))
            regions.observe(noise, i)
            x = scheduler.step(noise, t, x).prev_sample
    return x


@pytest.mark.parametrize("start", [1, 3])
@pytest.mark.parametrize("order", [0.0, 0.6, 1.0])
def test_equals_the_algorithm_written_out(order, start):
    """On a DiT whose attention is turned off, so that keys and values do not matter."""
    target = _transformer("dit")
    for block in target.transformer.transformer_blocks:
        torch.nn.init.zeros_(block.attn1.to_out[0].weight)
    x = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(3))
    expected = by_the_paper(target, x, 12, start, 0.5, (6,), order)
    with diffusers_ext.apply(target, RASConfig(0.5, start, error_reset_steps=[6], forecast_order=order)):
        actual = run(target, "dit", batch=2)
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16])
def test_forecast_keys_and_values_are_exact_on_lines(dtype):
    """Two sequences of 3 text and 8 image tokens that move evenly, each computed when it is its turn."""
    start, slope = (torch.randint(-8, 8, (2, 2, 4, 11, 2), generator=torch.Generator().manual_seed(0)) / 8).to(dtype)
    start, slope = start.to(dtype), slope.to(dtype)
    plan, cache = Plan(12, 3, 11, (7,), 0.25, forecast_order=1), Cache()
    for step in range(12):
        whole = start + step * slope
        index = torch.stack([torch.randperm(8)[:2].sort().values for _ in range(2)]) if plan.skipped(step, 8) else None
        call = plan.call(cache, index, 8, step)
        part = whole
        if index is not None:
            places = torch.cat([torch.arange(3).expand(2, -1), index + 3], 1)
            part = torch.stack([w[:, p] for w, p in zip(whole, places)])
        key, value = call.keys_values("layer", part, -part, image_first=False)
        if step < 3 or index is None:
            continue
        assert key.dtype == value.dtype == dtype
        torch.testing.assert_close(key, whole, atol=1e-2 if dtype == torch.float16 else 1e-6, rtol=0)
        torch.testing.assert_close(value, -whole, atol=1e-2 if dtype == torch.float16 else 1e-6, rtol=0)


def test_from_the_second_step_on():
    target = _transformer("flux")
    with diffusers_ext.apply(target, RASConfig(0.5, 1, error_reset_steps=[])) as handle:
        assert torch.isfinite(run(target, "flux", steps=4)).all()
        assert handle.summary()["ras"]["tokens"] == [8, 8, 8]


@pytest.mark.parametrize("scheduler", [UniPCMultistepScheduler, DDIMScheduler])
def test_other_schedulers_are_fed_the_whole_noise(scheduler):
    target = _transformer("dit")
    target.scheduler = scheduler()
    plain = run(target, "dit")
    with diffusers_ext.apply(target, RASConfig(0.75)) as handle:
        cached = run(target, "dit")
        assert handle.summary()["ras"]["reused"] == 6
    assert 0 < (cached - plain).norm() < 0.5 * plain.norm()


class _FluxCall(torch.nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return _call("flux", self.inner, x, torch.tensor(9.0), 1)


@pytest.mark.parametrize("words", [5, 1])
def test_counted_tokens_and_operations(words):
    """The MLP costs (|A| + text) / (N + text) of a whole step; all but one of the text tokens can be left out."""
    target = _transformer("flux")
    seen = []
    handle = target.transformer.transformer_blocks[0].ff.register_forward_pre_hook(
        lambda _, args: seen.append(args[0].shape[1])
    )
    with diffusers_ext.apply(target, RASConfig(0.25, 2, 9, [5], reuse_text=words == 1)) as applied:
        run(target, "flux")
        figures = applied.summary()["ras"]
        plan = RASConfig(0.25, 2, 9, [5]).plan(12)
        assert seen[:12] == [16 - plan.skipped(i, 16) for i in range(12)]
        assert figures["tokens"] == [4] * 7 and sum(seen[:12]) == 5 * 16 + 7 * 4
        hook, parts = _hook(target), {}
        hook.paused, cache = True, Cache()
        for index in (None, torch.arange(4)[None]):
            hook.shared.call = Call(cache, index, True, 16, reuse_text=words == 1)
            parts[index is None] = macs_by_module(_FluxCall(target.transformer), torch.randn(1, 4, 8, 8), depth=5)
        hook.shared.call = None
    handle.remove()
    mlp = "inner.single_transformer_blocks.0.proj_mlp"
    assert parts[False][mlp] / parts[True][mlp] == pytest.approx((4 + words) / (16 + 5))
    assert parts[True][""] == figures["macs_full_call"] and parts[False][""] == figures["macs_reused_call"][4]


# ---- the trained model


@pytest.fixture(scope="module")
def pipe():
    return zoo.load("shapes-dit")


def test_larger_ratios_are_more_faithful(pipe):
    captions = zoo.held_out(2).captions

    def draw():
        return zoo.generate(pipe, captions, num_inference_steps=10)

    reference, scores = draw(), []
    for ratio in (0.9, 0.2):
        with diffusers_ext.apply(pipe, RASConfig(ratio)):
            scores.append(mean_psnr(draw(), reference))
    assert scores[0] > scores[1] + 1, scores


def draw(pipe, config):
    """Two pictures, and the share of operations that was saved."""
    with diffusers_ext.apply(pipe, config) as handle:
        images = zoo.generate(pipe, zoo.held_out(2).captions, num_inference_steps=20)
        return images, handle.summary()["ras"].get("macs_saved")


def test_forecasts_are_closer(pipe):
    """At the same operations, with steps in between that compute everything."""
    (reference, _), scores, saved = draw(pipe, RASConfig(1.0)), [], []
    for order in (0, 1):
        images, share = draw(pipe, RASConfig(0.125, 6, error_reset_steps=range(7, 20, 2), forecast_order=order))
        scores.append(mean_psnr(images, reference))
        saved.append(share)
    assert scores[1] > scores[0] + 2 and saved[0] == saved[1], (scores, saved)


def test_text_costs_more_than_it_gives(pipe):
    """Leaving out the text tokens too saves a tenth of the run and moves pictures by less than RAS does."""
    plan = {"error_reset_steps": range(8, 20, 2), "forecast_order": 1}
    reference, _ = draw(pipe, RASConfig(1.0))
    computed, saved = draw(pipe, RASConfig(0.0625, 7, **plan))
    reused, more = draw(pipe, RASConfig(0.0625, 7, **plan, reuse_text=True))
    assert mean_psnr(reused, computed) > mean_psnr(computed, reference) + 6
    assert mean_psnr(reused, reference) > mean_psnr(computed, reference) - 0.5
    assert more > saved + 0.07, (saved, more)


@pytest.mark.slow
def test_better_than_random_tokens(pipe, monkeypatch):
    """Half of the tokens, 16 captions: also better than random tokens that take turns."""
    captions = zoo.held_out(16).captions

    def draw(config):
        with diffusers_ext.apply(pipe, config):
            return zoo.generate(pipe, captions, num_inference_steps=28)

    reference = draw(RASConfig(1.0))
    score = mean_psnr(draw(RASConfig(0.5)), reference)
    generator = torch.Generator().manual_seed(0)
    monkeypatch.setattr(ras_tokens, "token_scores", lambda noise, *_: torch.rand(len(noise), 64, generator=generator))
    for starvation in (0.0, 3.0):
        random = mean_psnr(draw(RASConfig(0.5, starvation_scale=starvation)), reference)
        assert score > random + 0.5, (score, random, starvation)


# ---- refusals


@pytest.mark.parametrize(
    "values, words",
    [
        ({"sample_ratio": 0}, "sample_ratio is 0"),
        ({"sample_ratio": 1.1}, "sample_ratio is 1.1"),
        ({"start_step": 0}, "start_step is 0.*first step must compute everything"),
        ({"end_step": 2}, "end_step is 2"),
        ({"error_reset_steps": [-1]}, "error_reset_steps"),
        ({"error_reset_steps": [9], "num_inference_steps": 9}, "a run of 9 steps accepts 0 to 8"),
        ({"metric": "max"}, "'std', 'l2norm'"),
        ({"high_ratio": 2}, "high_ratio is 2"),
        ({"starvation_scale": -1}, "starvation_scale is -1"),
        ({"starvation_mode": "none"}, "'balanced', 'official'"),
        ({"skip_num_step_length": -1}, "skip_num_step_length is -1"),
        ({"patch_size": 0}, "patch_size is 0"),
        ({"forecast_order": 2}, "forecast_order is 2; accepted: 0 to 1"),
    ],
)
def test_bad_values(values, words):
    with pytest.raises(ValueError, match=words):
        RASConfig(**values)


def test_refuses_what_it_cannot_follow(make_unet, traces):
    with pytest.raises(ValueError, match="UNet2DConditionModel handles image tokens.*SD3Transformer2DModel"):
        diffusers_ext.apply(make_unet(), RASConfig())
    target = _transformer("dit")
    with pytest.raises(ValueError, match="apply it to the pipeline"):
        diffusers_ext.apply(target.transformer, RASConfig())
    target.scheduler = HeunDiscreteScheduler()
    with pytest.raises(ValueError, match="HeunDiscreteScheduler evaluates the model 2 times"):
        diffusers_ext.apply(target, RASConfig())
    assert traces(target.transformer) == ({}, set(), False)


def test_refuses_another_scheduler_in_mid_air():
    target = _transformer("dit")
    with diffusers_ext.apply(target, RASConfig()):
        target.scheduler = FlowMatchEulerDiscreteScheduler()
        with pytest.raises(RuntimeError, match="another scheduler"):
            run(target, "dit")


def test_refuses_reset_steps_after_the_end():
    target = _transformer("dit")
    with pytest.raises(ValueError, match="a run of 12 steps accepts 0 to 11"):
        diffusers_ext.apply(target, RASConfig(error_reset_steps=[12]), num_inference_steps=12)
    with diffusers_ext.apply(target, RASConfig(error_reset_steps=[12])), pytest.raises(ValueError, match="run of 12"):
        run(target, "dit")


def test_refuses_to_join_delta_dit():
    target = _transformer("dit")
    with (
        diffusers_ext.apply(target, diffusers_ext.DeltaDiTConfig(span_order="rear")),
        pytest.raises(ValueError, match="cannot be combined"),
    ):
        diffusers_ext.apply(target, RASConfig())


def test_warns_when_nothing_is_left_out():
    target = _transformer("dit")
    assert "none of 4 steps" in diffusers_ext.check(target, RASConfig(), num_inference_steps=4).warnings[0]
    assert diffusers_ext.check(target, RASConfig(1.0), num_inference_steps=30).warnings
    assert not diffusers_ext.check(target, RASConfig(), num_inference_steps=8).warnings


def test_config_travels_as_json():
    config = RASConfig(0.4, 5, 20, [8, 12], "l2norm", 0.3, 1.0, "official", 64, 4, 2, 28, 1)
    assert diffusers_ext.MethodConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
