"""DeepCache against the published helper, a literal reading of the paper, and its own contract."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch
from DeepCache import DeepCacheSDHelper
from diffusers import DDIMScheduler, HeunDiscreteScheduler
from diffusers.utils.torch_utils import apply_freeu

import diffusers_ext
from diffusers_ext import DeepCacheConfig
from diffusers_ext.caching.deepcache import Branch, branches, quad_steps, skipped_modules, uniform_steps
from diffusers_ext.eval import count_macs


# ---- schedules


def test_golden_quad_schedule():
    assert quad_steps(50, 5, 15, 1.4) == [0, 5, 9, 13, 17, 21, 26, 31, 37, 43]


@pytest.mark.parametrize("total, interval, center, power", [(50, 2, 15, 1.4), (30, 3, 10, 1.2), (100, 10, 40, 2.0)])
def test_quad_schedule_has_its_size_and_starts_at_zero(total, interval, center, power):
    steps = quad_steps(total, interval, center, power)
    assert len(steps) == -(-total // interval) and steps[0] == 0
    assert steps == sorted(set(steps)) and steps[-1] < total


def test_impossible_quad_schedule_names_both():
    with pytest.raises(ValueError, match="pow=1.01 and center=49"):
        quad_steps(50, 1, 49, 1.01)
    with pytest.raises(ValueError, match="pow=.*center="):
        DeepCacheConfig(skip_mode="quad", cache_interval=1, center=49, num_inference_steps=50)


def test_uniform_and_explicit_schedules():
    assert uniform_steps(10, 4) == [0, 4, 8] == DeepCacheConfig(cache_interval=4).full_steps(10)
    config = DeepCacheConfig(skip_mode=[7, 0, 3])
    assert config.full_steps(10) == [0, 3, 7]
    assert [i for i in range(10) if config.is_full_step(i)] == [0, 3, 7]


def test_steps_beyond_a_quad_schedule_run_in_full():
    config = DeepCacheConfig(skip_mode="quad", cache_interval=5, num_inference_steps=50)
    assert config.full_steps(53) == [0, 5, 9, 13, 17, 21, 26, 31, 37, 43, 50, 51, 52]
    assert [i for i in range(53) if config.is_full_step(i)] == config.full_steps(53)


# ---- parity


def with_helper(unet, branch, interval, loop, size=8):
    scheduler = DDIMScheduler()
    scheduler.set_timesteps(7)
    helper = DeepCacheSDHelper(pipe=SimpleNamespace(unet=unet, scheduler=scheduler))
    helper.set_params(cache_interval=interval, cache_branch_id=branch)
    helper.enable()
    try:
        return loop(unet, steps=7, size=size)
    finally:
        helper.disable()


@pytest.mark.parametrize("interval", [1, 2, 3, 5])
def test_parity_with_the_published_helper(make_unet, run_loop, interval):
    unet = make_unet()
    plain = run_loop(unet, steps=7, size=8)
    errors = []
    for branch in range(9):
        with diffusers_ext.apply(unet, DeepCacheConfig(cache_interval=interval, cache_branch_id=branch)):
            ours = run_loop(unet, steps=7, size=8)
        torch.testing.assert_close(ours, with_helper(unet, branch, interval, run_loop), atol=1e-6, rtol=0)
        errors.append((ours - plain).abs().max().item())
    assert (max(errors) == 0) == (interval == 1), "with N > 1 every branch differs from the plain run"


def literal_step(unet, x, t, text, branch, feature=None, down=None, mid=None):
    """The Algorithm of the paper written out for a UNet2DConditionModel: one step and the feature C.

    `feature` None is a full step. `down` and `mid` are ControlNet residuals.
    """
    emb = unet.time_embedding(unet.get_time_embed(sample=x, timestep=t))
    b, l = branch.block, branch.layer

    def attend(block, j, h):
        attention = getattr(block, "attentions", None)
        return attention[j](h, encoder_hidden_states=text, return_dict=False)[0] if attention else h

    h = unet.conv_in(x)
    skips = [h]
    for i, block in enumerate(unet.down_blocks):
        for j, resnet in enumerate(block.resnets):
            if feature is None or i < b or (i == b and j < l):
                h = attend(block, j, resnet(h, emb))
                skips.append(h)
        if block.downsamplers and (feature is None or i < b):
            h = block.downsamplers[0](h)
            skips.append(h)
    skips = [s + r for s, r in zip(skips, down)] if down else skips
    if feature is None:
        h = unet.mid_block(h, emb, encoder_hidden_states=text)
        h = h + mid if mid is not None else h
    for i in range(len(unet.up_blocks) - 1, -1, -1):
        block = unet.up_blocks[len(unet.up_blocks) - 1 - i]
        for j in range(len(block.resnets) - 1, -1, -1):
            if (i, j) == (b, l):
                h = feature.clone() if feature is not None else h
                stored = h.clone()
            if feature is None or i < b or (i == b and j <= l):
                k = len(block.resnets) - 1 - j
                skip = skips.pop()
                if getattr(block, "s1", None) is not None:
                    scales = {name: getattr(block, name) for name in ("s1", "s2", "b1", "b2")}
                    h, skip = apply_freeu(block.resolution_idx, h.clone(), skip, **scales)
                h = attend(block, k, block.resnets[k](torch.cat([h, skip], 1), emb))
        if block.upsamplers and (feature is None or i <= b):
            h = block.upsamplers[0](h)
    return unet.conv_out(unet.conv_act(unet.conv_norm_out(h))), stored


def literal_run(unet, make_inputs, branch, interval, steps=6, name="sd"):
    x, kwargs = make_inputs(name, 2, 16)
    scheduler = DDIMScheduler()
    scheduler.set_timesteps(steps)
    feature = None
    with torch.no_grad():
        for i, t in enumerate(scheduler.timesteps):
            known = None if i % interval == 0 else feature
            out, feature = literal_step(unet, x, t, kwargs["encoder_hidden_states"], branch, known)
            x = x + 0.1 * out
    return x


@pytest.mark.parametrize("name, count", [("sd", 9), ("sd2", 9), ("one-layer", 6), ("uneven", 7)])
def test_parity_with_the_paper(make_unet, run_loop, make_inputs, name, count):
    unet = make_unet(name)
    known = branches(unet)
    assert len(known) == count
    for index, branch in enumerate(known):
        config = DeepCacheConfig(cache_interval=3, cache_branch_id=index)
        explicit = DeepCacheConfig(cache_interval=3, cache_block_id=branch.block, cache_layer_id=branch.layer)
        expected = literal_run(unet, make_inputs, branch, 3)
        for chosen in (config, explicit):
            with diffusers_ext.apply(unet, chosen):
                torch.testing.assert_close(run_loop(unet), expected, atol=1e-5, rtol=0)


def test_free_u_scales_in_place_and_does_not_pile_up(make_unet, run_loop, make_inputs):
    unet = make_unet()
    unet.enable_freeu(s1=0.6, s2=0.4, b1=1.5, b2=1.6)
    for index in (3, 6, 8):
        with diffusers_ext.apply(unet, DeepCacheConfig(cache_interval=4, cache_branch_id=index)):
            ours = run_loop(unet)
        expected = literal_run(unet, make_inputs, branches(unet)[index], 4)
        torch.testing.assert_close(ours, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("index", [0, 2, 5, 7])
def test_controlnet_residuals_of_the_current_step_are_used(make_unet, make_inputs, index):
    unet = make_unet()
    x, kwargs = make_inputs("sd", 2, 16)
    text = kwargs["encoder_hidden_states"]
    branch = branches(unet)[index]

    def residuals(seed):
        torch.manual_seed(seed)
        sizes = [(8, 16)] * 3 + [(8, 8)] + [(16, 8)] * 2 + [(16, 4)] * 3
        return [torch.randn(2, c, s, s) * 0.1 for c, s in sizes], torch.randn(2, 16, 4, 4) * 0.1

    feature = None
    with torch.no_grad(), diffusers_ext.apply(unet, DeepCacheConfig(cache_interval=2, cache_branch_id=index)):
        for step, t in enumerate((900, 800)):
            down, mid = residuals(step)
            ours = unet(
                x, t, text, down_block_additional_residuals=tuple(down), mid_block_additional_residual=mid
            ).sample
            expected, feature = literal_step(unet, x, t, text, branch, feature, down, mid)
            torch.testing.assert_close(ours, expected, atol=1e-5, rtol=0)


# ---- exactness


@pytest.mark.parametrize("name", ["sd", "sd2", "sdxl", "inpaint", "one-layer", "uneven", "unet2d", "svd"])
def test_interval_one_and_removal_are_exact_on_every_layout(make_unet, run_loop, traces, name):
    unet = make_unet(name)
    plain, before = run_loop(unet, name), traces(unet)
    last = len(branches(unet)) - 1
    for branch in (1, last):
        with diffusers_ext.apply(unet, DeepCacheConfig(cache_interval=1, cache_branch_id=branch)):
            assert torch.equal(run_loop(unet, name), plain)
        with diffusers_ext.apply(unet, DeepCacheConfig(cache_interval=2, cache_branch_id=branch)) as handle:
            cached = run_loop(unet, name)
            figures = handle.summary()["deepcache"]
        assert (figures["computed"], figures["reused"]) == (3, 3)
        assert 0 < figures["macs_reused_call"] < figures["macs_full_call"]
        assert torch.isfinite(cached).all() and not torch.equal(cached, plain)
        assert traces(unet) == before == ({}, set(), False)
        assert torch.equal(run_loop(unet, name), plain)


def test_deeper_branches_are_never_worse(make_unet, run_loop):
    unet = make_unet()
    plain = run_loop(unet)
    errors = []
    for branch in range(9):
        with diffusers_ext.apply(unet, DeepCacheConfig(cache_interval=3, cache_branch_id=branch)):
            errors.append((run_loop(unet) - plain).norm().item())
    assert all(deeper <= shallower * 1.06 for shallower, deeper in zip(errors, errors[1:]))


def test_outputs_of_skipped_modules_reach_nothing(make_unet, run_loop):
    """They are left uninitialised: filled with NaN, the result must not change."""
    unet = make_unet()
    for branch in range(9):
        with diffusers_ext.apply(unet, DeepCacheConfig(cache_interval=3, cache_branch_id=branch)):
            plain = run_loop(unet)
            torch.use_deterministic_algorithms(True)
            try:
                filled = run_loop(unet)
            finally:
                torch.use_deterministic_algorithms(False)
        assert torch.equal(plain, filled)


# ---- what runs


def test_module_calls(make_unet, run_loop, count_runs):
    unet = make_unet()
    with diffusers_ext.apply(unet, DeepCacheConfig(cache_interval=5)):
        counts = count_runs(
            lambda: run_loop(unet, steps=50, batch=1, size=8),
            conv_in=unet.conv_in,
            mid=unet.mid_block.resnets[0],
            deep_up=unet.up_blocks[0].resnets[0],
            first_down=unet.down_blocks[0].resnets[0],
            last_up=unet.up_blocks[-1].resnets[-1],
            before_last_up=unet.up_blocks[-1].resnets[-2].conv1,
            conv_out=unet.conv_out,
        )
    assert counts == {
        "conv_in": 50,
        "mid": 10,
        "deep_up": 10,
        "first_down": 10,
        "last_up": 50,
        "before_last_up": 10,
        "conv_out": 50,
    }


def test_quad_and_explicit_schedules_run_as_planned(make_unet, run_loop, count_runs):
    unet = make_unet()
    quad = DeepCacheConfig(skip_mode="quad", cache_interval=5, num_inference_steps=50)
    for config, expected in ((quad, 10), (DeepCacheConfig(skip_mode=[0, 1, 2, 20]), 4)):
        with diffusers_ext.apply(unet, config):
            counts = count_runs(lambda: run_loop(unet, steps=50, batch=1, size=8), mid=unet.mid_block.resnets[0])
        assert counts["mid"] == expected


def test_reported_macs_are_those_that_run(make_unet, make_inputs):
    unet = make_unet()
    x, kwargs = make_inputs("sd", 2, 16)
    plain = count_macs(unet, x, 900, **kwargs)
    with torch.no_grad(), diffusers_ext.apply(unet, DeepCacheConfig(cache_interval=2, cache_branch_id=1)) as handle:
        ran = [count_macs(unet, x, t, **kwargs) for t in (900, 800, 700)]
        figures = handle.summary()["deepcache"]
        assert count_macs(unet, x, 600, **kwargs) == ran[1], "summary() does not disturb the run"
    assert ran[0] == ran[2] == plain == figures["macs_full_call"]
    assert ran[1] == figures["macs_reused_call"] < plain
    assert figures["macs_saved"] == pytest.approx((plain - ran[1]) / (3 * plain))
    assert len(figures["feature_change"]) == 1 and figures["feature_change"][0] > 0


# ---- never stale


def interrupted(unet, run_loop, how):
    if how == "between steps":
        run_loop(unet, calls=2)
    elif how == "after the first step":
        run_loop(unet, calls=1)
    else:
        hook = unet.conv_out.register_forward_hook(lambda *_: (_ for _ in ()).throw(KeyboardInterrupt()))
        with pytest.raises(KeyboardInterrupt):
            run_loop(unet, calls=2)
        hook.remove()


@pytest.mark.parametrize("name", ["sd", "unet2d"])
@pytest.mark.parametrize("how", ["between steps", "after the first step", "inside the model"])
def test_an_interrupted_run_leaves_nothing_behind(make_unet, run_loop, how, name):
    unet = make_unet(name)
    with diffusers_ext.apply(unet, DeepCacheConfig(cache_interval=4)):
        clean = run_loop(unet, name)
        unet._reset_stateful_cache()
        if name == "sd" or how != "inside the model":
            interrupted(unet, lambda u, **k: run_loop(u, name, **k), how)
        assert torch.equal(run_loop(unet, name), clean)


def test_layouts_in_a_row(make_unet, run_loop):
    unet = make_unet()
    config = DeepCacheConfig(cache_interval=3)
    settings = [{"batch": 2}, {"batch": 1}, {"size": 24}, {"size": 8, "batch": 3}, {"batch": 2}]
    alone = []
    for setting in settings:
        with diffusers_ext.apply(unet, config):
            alone.append(run_loop(unet, **setting))
    with diffusers_ext.apply(unet, config):
        for setting, expected in zip(settings, alone):
            assert torch.equal(run_loop(unet, **setting), expected)


def test_odd_sizes(make_unet, run_loop):
    """Sizes that the UNet resizes to on its way up, which it reads from skips that a cache may have skipped."""
    unet = make_unet()
    for branch in range(9):
        with diffusers_ext.apply(unet, DeepCacheConfig(cache_interval=2, cache_branch_id=branch)):
            torch.testing.assert_close(
                run_loop(unet, steps=7, size=18), with_helper(unet, branch, 2, run_loop, size=18)
            )


def test_a_batch_equals_its_singles(make_unet, make_inputs):
    unet = make_unet()
    x, kwargs = make_inputs("sd", 3, 16)
    text = kwargs["encoder_hidden_states"]

    def run(x, text):
        with torch.no_grad():
            for t in (900, 700, 500, 300):
                x = x + 0.1 * unet(x, t, text).sample
        return x

    with diffusers_ext.apply(unet, DeepCacheConfig(cache_interval=2)):
        whole = run(x, text)
        singles = torch.cat([run(x[i : i + 1], text[i : i + 1]) for i in range(3)])
    torch.testing.assert_close(whole, singles, atol=1e-5, rtol=0)


def test_split_guidance_equals_batched(make_unet, make_inputs):
    """Conditional and unconditional in turn, found by their conditioning, against both in one batch."""
    unet = make_unet()
    x0, kwargs = make_inputs("sd", 2, 16)
    both = kwargs["encoder_hidden_states"]
    uncond, cond = both[:1], both[1:].clone()

    def run(predict):
        x = x0[:1]
        with torch.no_grad():
            for t in (900, 700, 500, 300, 100):
                u, c = predict(x, t)
                x = x + 0.1 * (u + 3 * (c - u))
        return x

    with diffusers_ext.apply(unet, DeepCacheConfig(cache_interval=3)) as handle:
        split = run(lambda x, t: (unet(x, t, uncond).sample, unet(x, t, cond).sample))
        assert handle.summary()["deepcache"]["reused"] == 6
        batched = run(lambda x, t: unet(torch.cat([x, x]), t, both).sample.chunk(2))
        assert handle.summary()["deepcache"]["reused"] == 3
    torch.testing.assert_close(split, batched, atol=1e-5, rtol=0)


def test_perturbed_guidance_keeps_a_feature_per_call(make_unet, make_inputs):
    """Two calls per step with one prompt: each must see its own feature, as if it ran alone."""
    unet = make_unet()
    x, kwargs = make_inputs("sd", 1, 16)
    times = (900, 700, 500)

    def run(*scales):
        with torch.no_grad():
            return [[unet(x * s, t, **kwargs).sample for s in scales] for t in times]

    with diffusers_ext.apply(unet, DeepCacheConfig(cache_interval=3)):
        together = run(1.0, 2.0)
    alone = []
    for scale in (1.0, 2.0):
        with diffusers_ext.apply(unet, DeepCacheConfig(cache_interval=3)):
            alone.append([out[0] for out in run(scale)])
    for step in range(3):
        assert all(torch.equal(together[step][i], alone[i][step]) for i in range(2))


def test_heun_repeats_timesteps(make_unet, run_loop, count_runs):
    unet = make_unet()
    scheduler = HeunDiscreteScheduler()
    scheduler.set_timesteps(8)
    assert len(scheduler.timesteps) == 15
    with diffusers_ext.apply(unet, DeepCacheConfig(cache_interval=3)):
        counts = count_runs(lambda: run_loop(unet, timesteps=scheduler.timesteps), mid=unet.mid_block.resnets[0])
    assert counts["mid"] == 6, "predictor and corrector evaluations have a feature each: 3 of 8 and 3 of 7 run in full"


def test_turning_guidance_off_in_the_middle(make_unet, make_inputs, count_runs):
    unet = make_unet()
    x, kwargs = make_inputs("sd", 2, 16)
    text = kwargs["encoder_hidden_states"]
    half = text[1:]

    def run():
        with torch.no_grad():
            for t in (900, 800):
                unet(x, t, text)
            for t in (700, 600, 500):
                unet(x[:1], t, half)

    with diffusers_ext.apply(unet, DeepCacheConfig(cache_interval=3)):
        assert count_runs(run, mid=unet.mid_block.resnets[0])["mid"] == 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(make_unet, make_inputs, dtype):
    unet = make_unet().to(dtype)
    x, kwargs = make_inputs("sd", 1, 16)
    x, text = x.to(dtype), kwargs["encoder_hidden_states"].to(dtype)

    def run():
        with torch.no_grad():
            return [unet(x, t, text).sample for t in (900, 800, 700)]

    plain = run()
    with diffusers_ext.apply(unet, DeepCacheConfig(cache_interval=2)):
        cached = run()
    assert torch.equal(plain[0], cached[0]) and torch.equal(plain[2], cached[2])
    assert not torch.equal(plain[1], cached[1])
    assert cached[1].dtype == dtype and (cached[1] - plain[1]).norm() < plain[1].norm()


def test_training_graphs_are_not_kept(make_unet, make_inputs):
    unet = make_unet()
    x, kwargs = make_inputs("sd", 1, 16)
    with diffusers_ext.apply(unet, DeepCacheConfig(cache_interval=2)):
        unet(x.requires_grad_(), 900, **kwargs)
        (out,) = unet(x, 800, return_dict=False, **kwargs)
    (grad,) = torch.autograd.grad(out.sum(), x)
    assert torch.isfinite(grad).all()


@pytest.mark.parametrize("first", ["compile", "apply"])
def test_compiled(make_unet, run_loop, first):
    unet = make_unet("one-layer")
    torch._dynamo.reset()
    with diffusers_ext.apply(unet, DeepCacheConfig(cache_interval=3)):
        expected = run_loop(unet)
    plain = run_loop(unet)
    graphs = []

    def backend(graph, inputs):
        graphs.append(len(graph.graph.nodes))
        return graph.forward

    if first == "compile":
        compiled = torch.compile(unet, backend=backend)
        torch.testing.assert_close(run_loop(compiled), plain, atol=1e-5, rtol=0)
        graphs.clear()
        handle = diffusers_ext.apply(SimpleNamespace(unet=compiled), DeepCacheConfig(cache_interval=3))
    else:
        handle = diffusers_ext.apply(unet, DeepCacheConfig(cache_interval=3))
        compiled = torch.compile(unet, backend=backend)
    torch.testing.assert_close(run_loop(compiled), expected, atol=1e-5, rtol=0)
    assert handle.summary()["deepcache"]["reused"] == 4
    large = [size for size in graphs if size > 20]
    assert len(large) == 2 and min(large) < max(large) / 3, "one graph for full steps, a much smaller one for the rest"
    handle.remove()
    torch.testing.assert_close(run_loop(compiled), plain, atol=1e-5, rtol=0)
    torch._dynamo.reset()


def test_lora_before_and_after(make_unet, run_loop):
    from peft import LoraConfig

    lora = LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False)
    config = DeepCacheConfig(cache_interval=3, cache_branch_id=1)
    results = []
    for lora_first in (True, False):
        unet = make_unet()
        if lora_first:
            unet.add_adapter(lora)
        with diffusers_ext.apply(unet, config):
            if not lora_first:
                unet.add_adapter(lora)
            for name, parameter in sorted(unet.named_parameters()):
                if "lora" in name:
                    torch.manual_seed(len(name))
                    torch.nn.init.normal_(parameter, std=0.3)
            results.append(run_loop(unet))
        plain = run_loop(unet)
        unet.delete_adapters("default")
    assert torch.equal(*results) and not torch.equal(results[0], plain)


# ---- refusals


@pytest.mark.parametrize(
    "values, words",
    [
        ({"cache_interval": 0}, "cache_interval is 0"),
        ({"cache_block_id": 1}, "together"),
        ({"skip_mode": "cubic"}, "'uniform', 'quad'"),
        ({"skip_mode": [3, 5]}, "must hold 0"),
        ({"skip_mode": []}, "must hold 0"),
        ({"skip_mode": [-1, 0]}, "must hold 0"),
        ({"skip_mode": "quad"}, "num_inference_steps"),
    ],
)
def test_bad_values(values, words):
    with pytest.raises(ValueError, match=words):
        DeepCacheConfig(**values)


@pytest.mark.parametrize(
    "values, words",
    [
        ({"cache_branch_id": 9}, "accepted: 0 to 8"),
        ({"cache_branch_id": -1}, "accepted: 0 to 8"),
        ({"cache_block_id": 0, "cache_layer_id": 3}, r"\(0, 2\)"),
    ],
)
def test_branches_beyond_the_last_skip(make_unet, traces, values, words):
    unet = make_unet()
    with pytest.raises(ValueError, match=words):
        diffusers_ext.apply(unet, DeepCacheConfig(**values))
    assert traces(unet) == ({}, set(), False)


def test_refuses_models_without_skips():
    from diffusers import DiTTransformer2DModel

    dit = DiTTransformer2DModel(num_attention_heads=2, attention_head_dim=4, num_layers=1, in_channels=4)
    with pytest.raises(ValueError, match="DiTTransformer2DModel is none.*FirstBlockCacheConfig"):
        diffusers_ext.apply(dit, DeepCacheConfig())


def test_refuses_layouts_it_does_not_know():
    from diffusers import UNet2DModel

    kinds = {"down_block_types": ["SkipDownBlock2D"], "up_block_types": ["SkipUpBlock2D"]}
    unet = UNet2DModel(sample_size=8, block_out_channels=(32,), layers_per_block=1, **kinds)
    with pytest.raises(ValueError, match="SkipDownBlock2D"):
        diffusers_ext.apply(unet, DeepCacheConfig())


def test_refuses_to_be_applied_twice(make_unet):
    unet = make_unet()
    with diffusers_ext.apply(unet, DeepCacheConfig()), pytest.raises(ValueError, match="already"):
        diffusers_ext.apply(unet, DeepCacheConfig(cache_interval=2))


def test_refuses_fused_projections(make_unet):
    unet = make_unet()
    unet.fuse_qkv_projections()
    with pytest.raises(ValueError, match="unfuse_qkv_projections"):
        diffusers_ext.apply(unet, DeepCacheConfig())


def test_refuses_an_active_upstream_cache(make_unet):
    from diffusers.hooks import PyramidAttentionBroadcastConfig, apply_pyramid_attention_broadcast

    unet = make_unet()
    config = PyramidAttentionBroadcastConfig(
        cross_attention_block_skip_range=2,
        current_timestep_callback=lambda: 1,
        cross_attention_block_identifiers=("blocks",),
    )
    apply_pyramid_attention_broadcast(unet, config)
    with pytest.raises(ValueError, match="disable_cache"):
        diffusers_ext.apply(unet, DeepCacheConfig())


def test_warns_when_no_step_can_be_reused(make_unet, caplog):
    unet = make_unet()
    preflight = diffusers_ext.check(unet, DeepCacheConfig(cache_interval=3), num_inference_steps=1)
    assert preflight.ok and "none of 1 steps" in preflight.warnings[0]
    assert not diffusers_ext.check(unet, DeepCacheConfig(cache_interval=3), num_inference_steps=2).warnings
    with (
        caplog.at_level("WARNING"),
        diffusers_ext.apply(unet, DeepCacheConfig(cache_interval=1), num_inference_steps=9),
    ):
        assert "none of 9 steps" in caplog.text


def test_config_travels_as_json():
    for config in (DeepCacheConfig(), DeepCacheConfig(skip_mode=[0, 4], cache_block_id=1, cache_layer_id=2)):
        values = json.loads(json.dumps(config.to_dict()))
        assert values["method"] == "deepcache" and DeepCacheConfig.from_dict(values) == config
        assert diffusers_ext.MethodConfig.from_dict(values) == config


def test_skipped_modules_follow_the_rule(make_unet):
    """Mid always; block i > b always; i < b never; i = b: down kinds with j >= l, up kinds with j > l."""
    unet = make_unet()
    names = {id(module): name for name, module in unet.named_modules()}
    modules, source = skipped_modules(unet, Branch(1, 2))
    assert [names[id(m)] for m in modules] == [
        "down_blocks.1.downsamplers.0",
        "down_blocks.2",
        "mid_block",
        "up_blocks.0",
    ]
    assert names[id(source)] == "up_blocks.0"
    _, source = skipped_modules(unet, Branch(1, 0))
    assert names[id(source)] == "up_blocks.1.attentions.1"
