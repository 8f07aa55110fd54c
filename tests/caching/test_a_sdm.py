"""Feature inheritance against DeepCache, manual arithmetic, counted operations and its own contract."""

from __future__ import annotations

import itertools
import random
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from diffusers import DDIMScheduler, DiTTransformer2DModel, FluxTransformer2DModel, UNet2DConditionModel
from diffusers.models.attention_processor import Attention
from torch import nn

import diffusers_ext
from diffusers_ext import DeepCacheConfig, FeatureInheritanceConfig, zoo
from diffusers_ext.caching._a_sdm_modules import deep_blocks
from diffusers_ext.caching.a_sdm import time_mask
from diffusers_ext.eval import mean_psnr


LAYOUTS = ["sd", "sdxl", "inpaint", "one-layer", "uneven", "unet2d", "svd"]


# ---- time masks


@pytest.mark.parametrize(
    "mode, expected",
    [
        ("uniform", "1001001001"),
        ("early_dense", "1111001001"),
        ("late_dense", "1001001111"),
        ("both_dense", "1100100111"),
    ],
)
def test_masks(mode, expected):
    assert "".join(map(str, time_mask(10, 3, mode, dense_fraction=0.4))) == expected


@pytest.mark.parametrize("mode", ["uniform", "early_dense", "late_dense", "both_dense", "random"])
def test_masks_begin_with_one_and_reach_their_share(mode):
    for total, interval, fraction in itertools.product((1, 2, 7, 50), (1, 2, 5), (0.0, 0.2, 1.0)):
        mask = time_mask(total, interval, mode, fraction, seed=3)
        assert len(mask) == total and mask[0] == 1 and set(mask) <= {0, 1}
        if interval == 1 or (fraction == 1 and mode.endswith("dense")):
            assert all(mask)
        if fraction == 0 and mode != "random":
            assert mask == time_mask(total, interval)
        if mode == "random":
            assert sum(mask) == sum(time_mask(total, interval))
            assert mask == time_mask(total, interval, mode, fraction, seed=3)
    assert time_mask(50, 2, "random", seed=1) != time_mask(50, 2, "random", seed=2)


def test_a_given_mask_is_followed_and_computed_beyond():
    config = FeatureInheritanceConfig(mode=[1, 0, 0, 1])
    assert config.mask(6) == [1, 0, 0, 1, 1, 1] and config.mask(3) == [1, 0, 0]
    assert [config.is_computed(i) for i in range(6)] == [True, False, False, True, True, True]


def test_deep_blocks_of_known_models():
    assert deep_blocks([True, True, True, False]) == [
        "down_blocks.2",
        "down_blocks.3",
        "mid_block",
        "up_blocks.0",
        "up_blocks.1",
    ]
    assert deep_blocks([False, True, True]) == ["down_blocks.2", "mid_block", "up_blocks.0"]
    assert deep_blocks([True, False]) == ["down_blocks.1", "mid_block", "up_blocks.0"]
    assert deep_blocks([False] * 4, mid=False) == ["down_blocks.2", "down_blocks.3", "up_blocks.0", "up_blocks.1"]


# ---- exactness


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("granularity", ["block", "unit"])
def test_all_ones_and_removal_are_exact_on_every_layout(make_unet, run_loop, traces, name, granularity):
    unet = make_unet(name)
    plain, before = run_loop(unet, name, steps=3), traces(unet)
    with diffusers_ext.apply(unet, FeatureInheritanceConfig(granularity=granularity, interval=1)):
        assert torch.equal(run_loop(unet, name, steps=3), plain)
    with diffusers_ext.apply(unet, FeatureInheritanceConfig(granularity=granularity, interval=2)):
        cached = run_loop(unet, name, steps=3)
    assert torch.isfinite(cached).all() and not torch.equal(cached, plain)
    assert traces(unet) == before
    assert torch.equal(run_loop(unet, name, steps=3), plain)


@pytest.mark.parametrize("name, branch", [("sd", 0), ("sd", 4), ("sdxl", 0), ("uneven", 3), ("unet2d", 8), ("svd", 0)])
@pytest.mark.parametrize("interval, order", [(2, 0), (3, 0), (2, 1)])
def test_branches_are_deepcache(make_unet, run_loop, name, branch, interval, order):
    unet = make_unet(name)
    with diffusers_ext.apply(unet, DeepCacheConfig(interval, branch, forecast_order=order)):
        expected = run_loop(unet, name, steps=4)
    config = FeatureInheritanceConfig(f"branch-{branch}", "layer", interval, forecast_order=order)
    with diffusers_ext.apply(unet, config):
        torch.testing.assert_close(run_loop(unet, name, steps=4), expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    "granularity, modules",
    # The output of a cross-attention is its branch, nothing live is added.
    [("block", "deep"), ("layer", "branch-1"), ("unit", ["mid_block.attentions.0.transformer_blocks.0.attn2"])],
)
@pytest.mark.parametrize("order", [0, 1, 2])
def test_equals_the_rule_written_out(make_unet, run_loop, by_hand, granularity, modules, order):
    """A time mask with uneven gaps."""
    unet, mask = make_unet(), [1, 1, 0, 1, 0, 0, 1, 0]
    config = FeatureInheritanceConfig(modules, granularity, mode=mask, forecast_order=order)
    computed = [i for i, runs in enumerate(mask) if runs]
    undo = by_hand(unet, dict.fromkeys(config.names(unet), computed), order)
    expected = run_loop(unet, steps=8)
    undo()
    with diffusers_ext.apply(unet, config):
        torch.testing.assert_close(run_loop(unet, steps=8), expected, atol=1e-5, rtol=0)
    assert not torch.allclose(run_loop(unet, steps=8), expected, atol=1e-5)


def test_a_branch_costs_what_it_does_in_deepcache(make_unet, run_loop):
    unet, figures = make_unet(), []
    for config in (DeepCacheConfig(2), FeatureInheritanceConfig("branch-0", "layer")):
        with diffusers_ext.apply(unet, config) as handle:
            run_loop(unet, calls=2)
            figures.append(next(iter(handle.summary().values())))
    assert figures[0]["macs_reused_call"] == figures[1]["macs_reused_call"] < figures[0]["macs_full_call"]


def test_deep_blocks_of_stable_diffusion_are_a_branch_too(make_unet, run_loop):
    """What lies around them is live on both sides: same pictures as the branch that begins there."""
    unet = make_unet()
    with diffusers_ext.apply(unet, DeepCacheConfig(3, cache_block_id=0, cache_layer_id=2)):
        expected = run_loop(unet)
    with diffusers_ext.apply(unet, FeatureInheritanceConfig(interval=3)):
        torch.testing.assert_close(run_loop(unet), expected, atol=1e-6, rtol=0)


# ---- what runs


def test_modules_run_as_often_as_the_mask_has_ones(make_unet, run_loop, count_runs):
    unet = make_unet()
    inside = {"mid": unet.mid_block.resnets[0].conv1, "deep": unet.up_blocks[0].resnets[0].conv1}
    outside = {"first": unet.down_blocks[0].resnets[0].conv1, "last": unet.conv_out}
    for mode in ("uniform", "early_dense", "late_dense", "both_dense", "random", (1, 0, 0, 0, 1)):
        config = FeatureInheritanceConfig(interval=4, mode=mode, num_inference_steps=10)
        with diffusers_ext.apply(unet, config):
            counts = count_runs(lambda: run_loop(unet, steps=10), **inside, **outside)
        ones = sum(config.mask(10))
        assert counts == {"mid": ones, "deep": ones, "first": 10, "last": 10}, mode


def test_the_length_of_the_run_comes_from_the_scheduler(make_unet, run_loop, count_runs):
    target = SimpleNamespace(unet=make_unet(), scheduler=DDIMScheduler())
    mid = target.unet.mid_block.resnets[0]
    with diffusers_ext.apply(target, FeatureInheritanceConfig(interval=5, mode="late_dense", dense_fraction=0.5)):
        for steps, ones in ((10, 6), (6, 4)):
            target.scheduler.set_timesteps(steps)
            times = target.scheduler.timesteps
            assert count_runs(lambda t=times: run_loop(target.unet, timesteps=t), mid=mid)["mid"] == ones


def _macs_of_modules(unet, run):
    """Multiplications by name of the leaf that makes them, from shapes: convolutions, linears, attention products."""
    counts = Counter()

    def counter(name):
        def hook(module, args, kwargs, out):
            if isinstance(module, nn.Conv2d):
                kernel = module.kernel_size[0] * module.kernel_size[1]
                counts[name] += out.numel() * module.in_channels // module.groups * kernel
            elif isinstance(module, nn.Linear):
                counts[name] += out.numel() * module.in_features
            else:
                states = args[0] if args else kwargs["hidden_states"]
                text = kwargs.get("encoder_hidden_states")
                keys = states.shape[1] if text is None else text.shape[1]
                counts[name] += 2 * states.shape[0] * states.shape[1] * keys * module.to_q.out_features

        return hook

    handles = [
        module.register_forward_hook(counter(name), with_kwargs=True)
        for name, module in unet.named_modules()
        if isinstance(module, (nn.Conv2d, nn.Linear, Attention))
    ]
    run()
    for handle in handles:
        handle.remove()
    return counts


@pytest.fixture(scope="module")
def stable_diffusion():
    """Stable Diffusion 1.5's UNet without numbers, and a call of it at a timestep."""
    with torch.device("meta"):
        unet = UNet2DConditionModel(sample_size=64, cross_attention_dim=768).eval().requires_grad_(False)
        latents, text = torch.randn(1, 4, 64, 64), torch.randn(1, 77, 768)
    return unet, lambda t: unet(latents, torch.tensor(t), encoder_hidden_states=text)


@pytest.mark.parametrize("granularity", ["block", "unit"])
def test_macs_are_those_of_what_runs(stable_diffusion, granularity):
    """At the size of Stable Diffusion 1.5, within 1 % of the sum over the modules that still run."""
    unet, call = stable_diffusion
    counts = _macs_of_modules(unet, lambda: call(900.0))
    config = FeatureInheritanceConfig(granularity=granularity)
    names = config.names(unet)
    skipped = sum(n for leaf, n in counts.items() if any(leaf.startswith(name + ".") for name in names))
    shortcuts = 0
    if granularity == "unit":
        shortcuts = sum(counts[f"{name}.conv_shortcut"] for name in names)
    with diffusers_ext.apply(unet, config) as handle:
        call(900.0)
        call(800.0)
        figures = handle.summary()["a-sdm"]
    total = sum(counts.values())
    assert figures["macs_reused_call"] == pytest.approx(total - skipped + shortcuts, rel=0.01)
    assert figures["macs_full_call"] == pytest.approx(total + shortcuts, rel=0.01)


def test_nothing_is_kept_where_nothing_is_inherited(make_unet, run_loop):
    """Two computed steps in a row: the first leaves no features behind, unless a forecast looks back at it."""
    unet = make_unet()
    for order, counts in ((0, (0, 1, 1, 0)), (1, (1, 2, 2, 2)), (2, (1, 2, 2, 3))):
        with diffusers_ext.apply(unet, FeatureInheritanceConfig(mode=[1, 1, 0, 1], forecast_order=order)):
            hook = next(h for h in unet._diffusers_hook.hooks.values())
            for calls, kept in enumerate(counts, 1):
                unet._reset_stateful_cache()
                run_loop(unet, calls=calls)
                (context,) = hook.tracker._contexts.values()
                assert len(context.state.kept) == kept


# ---- units


def test_units_follow_the_input_and_blocks_do_not(make_unet, make_inputs):
    unet = make_unet()
    x, kwargs = make_inputs("sd", 1, 16)
    everything = [n for n, _ in unet.named_children() if n == "mid_block"]
    everything += [f"{side}_blocks.{i}" for side in ("down", "up") for i in range(3)]
    outputs = {}
    with torch.no_grad():
        for granularity in ("block", "unit"):
            with diffusers_ext.apply(unet, FeatureInheritanceConfig(everything, granularity, interval=9)):
                unet(x, 900, **kwargs)
                outputs[granularity] = [unet(s * x, t, **kwargs).sample for s, t in ((1, 800), (-2, 700))]
    assert torch.equal(*outputs["block"]) and not torch.allclose(*outputs["unit"], atol=0.1)


UNITS = {
    "mid_block.resnets.0": lambda m, x: x,
    "up_blocks.1.resnets.0": lambda m, x: m.conv_shortcut(x),
    "down_blocks.1.attentions.0": lambda m, x: x,
    "down_blocks.1.attentions.0.transformer_blocks.0": lambda m, x: x,
    "up_blocks.1.attentions.0.transformer_blocks.0.attn1": lambda m, x: 0,
    "up_blocks.1.attentions.0.transformer_blocks.0.attn2": lambda m, x: 0,
    "up_blocks.1.attentions.0.transformer_blocks.0.ff": lambda m, x: 0,
}


@pytest.mark.parametrize("name", UNITS)
def test_a_unit_adds_its_stored_branch_to_the_live_input(make_unet, make_inputs, name):
    unet = make_unet()
    module, live = unet.get_submodule(name), UNITS[name]
    x, kwargs = make_inputs("sd", 2, 16)
    branch = []

    def outputs(first, second):
        with torch.no_grad():
            return unet(first, 900, **kwargs).sample, unet(second, 800, **kwargs).sample

    def by_hand(_, args, given, out):
        states = args[0] if args else given["hidden_states"]
        tensor = out[0] if isinstance(out, tuple) else out
        if not branch:
            branch.append(tensor - live(module, states))
            return out
        new = live(module, states) + branch[0]
        return (new,) if isinstance(out, tuple) else new

    handle = module.register_forward_hook(by_hand, with_kwargs=True)
    expected = outputs(x, 0.5 * x)
    handle.remove()
    plain = outputs(x, 0.5 * x)
    with diffusers_ext.apply(unet, FeatureInheritanceConfig([name], "unit")) as applied:
        actual = outputs(x, 0.5 * x)
        assert applied.summary()["a-sdm"]["reused"] == 1
    assert torch.equal(actual[0], plain[0])
    torch.testing.assert_close(actual[1], expected[1], atol=1e-5, rtol=0)
    assert not torch.allclose(actual[1], plain[1], atol=1e-6)


def test_residual_attention_with_a_scale(make_unet, run_loop):
    """Attention that adds its own input, as in unconditional UNets."""
    unet = make_unet("unet2d")
    attention = unet.mid_block.attentions[0]
    attention.rescale_output_factor = 2.0
    config = FeatureInheritanceConfig(["mid_block.attentions.0"], "unit", interval=9)
    seen = []

    def note(_, args, kwargs, out):
        seen.append((args[0] if args else kwargs["hidden_states"], out))

    with diffusers_ext.apply(unet, config):
        handle = attention.register_forward_hook(note, with_kwargs=True)
        run_loop(unet, "unet2d", steps=3)
        handle.remove()
    branches_seen = [out - x / 2 for x, out in seen]
    torch.testing.assert_close(branches_seen[2], branches_seen[0], atol=1e-5, rtol=0)
    assert not torch.allclose(seen[2][0], seen[0][0])


def test_names_stand_for_what_is_inside(make_unet):
    unet = make_unet()

    def names(*args):
        return FeatureInheritanceConfig(*args).names(unet)

    assert names(["up_blocks.1.resnets.0"], "layer") == ["up_blocks.1.attentions.0", "up_blocks.1.resnets.0"]
    assert "up_blocks.1.upsamplers.0" in names(["up_blocks.1.attentions.2"], "layer")
    assert names(["mid_block"], "unit") == ["mid_block.attentions.0", "mid_block.resnets.0", "mid_block.resnets.1"]
    inner = "mid_block.attentions.0.transformer_blocks.0"
    assert names([f"{inner}.attn2", f"{inner}.ff"], "unit") == [f"{inner}.attn2", f"{inner}.ff"]
    assert set(names("deep")) == set(deep_blocks([True, True, False]))


# ---- what happens around


def _twice(unet, x, kwargs, config, first, second):
    """Output of a computed and of an inheriting call, at nearly the same time, with these further arguments."""
    with torch.no_grad(), diffusers_ext.apply(unet, config):
        unet(x, torch.tensor(500.0), **kwargs, **first)
        return unet(x, torch.tensor(499.999), **kwargs, **second).sample


@pytest.mark.parametrize("granularity", ["block", "layer", "unit"])
def test_control_residuals_of_the_current_step_are_used(make_unet, make_inputs, granularity):
    """ControlNet's: with the middle inherited alone, nothing that inherits depends on them."""
    unet = make_unet()
    x, kwargs = make_inputs("sd", 2, 16)
    sizes = [(8, 16)] * 3 + [(8, 8)] + [(16, 8)] * 2 + [(16, 4)] * 3

    def control(seed):
        torch.manual_seed(seed)
        down = tuple(torch.randn(2, c, s, s) * 0.3 for c, s in sizes)
        return {"down_block_additional_residuals": down, "mid_block_additional_residual": torch.randn(2, 16, 4, 4)}

    for modules in (["mid_block"], ["down_blocks.1", "mid_block"]):
        config = FeatureInheritanceConfig(modules, granularity)
        with torch.no_grad():
            expected = unet(x, torch.tensor(499.999), **kwargs, **control(1)).sample
        actual = _twice(unet, x, kwargs, config, control(0), control(1))
        torch.testing.assert_close(actual, expected, atol=1e-3, rtol=0)


@pytest.mark.parametrize("granularity", ["block", "layer"])
def test_what_an_adapter_adds_in_place_counts_once(make_unet, make_inputs, granularity):
    """T2I adapters write into what a down block returned."""
    unet = make_unet()
    x, kwargs = make_inputs("sd", 2, 16)
    torch.manual_seed(0)
    shapes = ((8, 16), (16, 8), (16, 4))

    def adapter(scale):
        return {"down_intrablock_additional_residuals": [scale * torch.ones(2, c, s, s) for c, s in shapes]}

    config = FeatureInheritanceConfig(["down_blocks.2"], granularity, interval=9)
    with torch.no_grad(), diffusers_ext.apply(unet, config):
        for time in (500.0, 499.999, 499.998):
            actual = unet(x, torch.tensor(time), **kwargs, **adapter(1.0)).sample
    with torch.no_grad():
        expected = unet(x, torch.tensor(499.998), **kwargs, **adapter(1.0)).sample
    torch.testing.assert_close(actual, expected, atol=1e-3, rtol=0)


def test_inherited_down_block_hands_out_skips_of_one_step(make_unet, run_loop):
    """Hidden output and skips come from the same computed step, and in-place writes do not pile up in them."""
    unet = make_unet()
    unet.enable_freeu(s1=0.6, s2=0.4, b1=1.5, b2=1.6)
    block, seen = unet.down_blocks[1], []
    with diffusers_ext.apply(unet, FeatureInheritanceConfig(interval=4)):
        handle = block.register_forward_hook(lambda _, __, out: seen.append([t.clone() for t in (out[0], *out[1])]))
        run_loop(unet, steps=6)
        handle.remove()
    for step, source in ((1, 0), (2, 0), (3, 0), (5, 4)):
        assert all(torch.equal(a, b) for a, b in zip(seen[step], seen[source]))
    assert not torch.equal(seen[4][0], seen[0][0])


@pytest.mark.parametrize("granularity", ["layer", "unit"])
def test_runs_do_not_see_each_other(make_unet, run_loop, granularity):
    unet = make_unet()
    config = FeatureInheritanceConfig(granularity=granularity, interval=3)
    settings = [{}, {"batch": 1}, {"size": 24}, {"steps": 9}, {"calls": 2}, {}]
    alone = []
    for setting in settings:
        with diffusers_ext.apply(unet, config):
            alone.append(run_loop(unet, **setting))
    with diffusers_ext.apply(unet, config):
        for setting, expected in zip(settings, alone):
            assert torch.equal(run_loop(unet, **setting), expected)
        failing = unet.up_blocks[2].resnets[2]
        handle = failing.register_forward_hook(lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            run_loop(unet)
        handle.remove()
        assert torch.equal(run_loop(unet), alone[0])


def test_another_prompt_in_the_middle_starts_afresh(make_unet, make_inputs, count_runs):
    """Prompt edits: what an inherited cross-attention would give belongs to the old prompt."""
    unet = make_unet()
    x, kwargs = make_inputs("sd", 1, 16)
    other = kwargs["encoder_hidden_states"].flip(1)

    def run():
        with torch.no_grad():
            unet(x, 900, **kwargs)
            unet(x, 800, encoder_hidden_states=other)
            unet(x, 700, encoder_hidden_states=other)

    with diffusers_ext.apply(unet, FeatureInheritanceConfig(interval=9)):
        assert count_runs(run, mid=unet.mid_block.resnets[0].conv1)["mid"] == 2


def test_lora_before_and_after_in_units(make_unet, run_loop):
    from peft import LoraConfig

    lora = LoraConfig(r=2, target_modules=["to_q", "to_v", "conv2", "conv_shortcut"], init_lora_weights=False)
    results = []
    for lora_first in (True, False):
        unet = make_unet()
        if lora_first:
            unet.add_adapter(lora)
        with diffusers_ext.apply(unet, FeatureInheritanceConfig(granularity="unit", interval=3)):
            if not lora_first:
                unet.add_adapter(lora)
            for name, parameter in sorted(unet.named_parameters()):
                if "lora" in name:
                    torch.manual_seed(len(name))
                    torch.nn.init.normal_(parameter, std=0.3)
            results.append(run_loop(unet))
    assert torch.equal(*results)


@pytest.mark.slow
def test_compiled_units(make_unet, run_loop):
    unet = make_unet("one-layer")
    torch._dynamo.reset()
    with diffusers_ext.apply(unet, FeatureInheritanceConfig(granularity="unit", interval=3)) as handle:
        expected = run_loop(unet)
        compiled = torch.compile(unet, backend="eager")
        torch.testing.assert_close(run_loop(compiled), expected, atol=1e-5, rtol=0)
        assert handle.summary()["a-sdm"]["reused"] == 4
    torch._dynamo.reset()


# ---- transformers


def _transformers():
    torch.manual_seed(0)
    heads = {"num_attention_heads": 2, "attention_head_dim": 8, "in_channels": 4}
    dit = DiTTransformer2DModel(num_layers=3, sample_size=8, num_embeds_ada_norm=9, **heads)
    flux = FluxTransformer2DModel(
        num_layers=2,
        num_single_layers=1,
        joint_attention_dim=8,
        pooled_projection_dim=8,
        axes_dims_rope=(2, 2, 4),
        **heads,
    )
    x = torch.randn(1, 4, 8, 8)
    dit_inputs = {"class_labels": torch.tensor([3])}
    flux_inputs = {
        "encoder_hidden_states": torch.randn(1, 5, 8),
        "pooled_projections": torch.randn(1, 8),
        "img_ids": torch.zeros(64, 3),
        "txt_ids": torch.zeros(5, 3),
    }
    tokens = x.flatten(2).mT
    yield dit, lambda s, t: dit(s * x, timestep=torch.tensor([t]), **dit_inputs).sample
    yield flux, lambda s, t: flux(s * tokens, timestep=torch.tensor([t]), **flux_inputs).sample


@pytest.mark.parametrize("kind", ["dit", "flux"])
def test_transformers_inherit_in_units(kind):
    model, call = dict(zip(("dit", "flux"), _transformers()))[kind]
    model.eval().requires_grad_(False)
    for parameter in model.parameters():
        if parameter.abs().max() == 0:
            nn.init.normal_(parameter, std=0.2)
    plain = call(1, 0.5)
    config = FeatureInheritanceConfig(["transformer_blocks.1"], "unit", interval=9)
    with diffusers_ext.apply(model, config) as handle:
        assert torch.equal(call(1, 0.5), plain)
        torch.testing.assert_close(call(1, 0.499999), plain, atol=1e-3, rtol=1e-3)
        assert not torch.allclose(call(-2, 0.4), plain, atol=0.1)
        figures = handle.summary()["a-sdm"]
    assert figures["reused"] == 2 and figures["macs_reused_call"] < 0.9 * figures["macs_full_call"]
    assert torch.equal(call(1, 0.5), plain)
    for given in ((["transformer_blocks.1"], "block"), (["transformer_blocks.1"], "layer")):
        with pytest.raises(ValueError, match="is no UNet"):
            diffusers_ext.apply(model, FeatureInheritanceConfig(*given))
    with pytest.raises(ValueError, match=f"{type(model).__name__} has none"):
        diffusers_ext.apply(model, FeatureInheritanceConfig())


# ---- quality


def test_deep_blocks_are_a_better_choice_than_chance(shapes_unet):
    """Of layers that save as much per step, drawn at random."""
    unet, captions = shapes_unet.unet, list(zoo.held_out(6).captions)

    def draw():
        return zoo.generate(shapes_unet, captions, num_inference_steps=12)

    full = draw()
    layers = [n for n in dict(unet.named_modules()) if n.split(".")[-2:-1] in (["resnets"], ["attentions"])]
    text = torch.randn(1, 20, 128)
    counts = _macs_of_modules(unet, lambda: unet(torch.randn(1, 4, 16, 16), 500, encoder_hidden_states=text))

    def cost(names):
        return sum(n for leaf, n in counts.items() if any(leaf.startswith(name + ".") for name in names))

    wanted = cost(FeatureInheritanceConfig().names(unet))

    def chosen(seed):
        for attempt in itertools.count():
            order = random.Random(f"{seed} {attempt}").sample(layers, len(layers))
            for count in range(1, len(order)):
                names = FeatureInheritanceConfig(order[:count], "layer").names(unet)
                if abs(cost(names) / wanted - 1) < 0.03 and names:
                    return order[:count]

    def quality(config):
        with diffusers_ext.apply(shapes_unet, config):
            return mean_psnr(draw(), full)

    deep = quality(FeatureInheritanceConfig())
    chance = [quality(FeatureInheritanceConfig(chosen(seed), "layer")) for seed in range(3)]
    assert deep > max(chance), (deep, chance)


# ---- refusals


@pytest.mark.parametrize(
    "values, words",
    [
        ({"modules": "shallow"}, "'deep', 'branch-0'"),
        ({"modules": []}, "modules is empty"),
        ({"granularity": "blck"}, "Did you mean 'block'"),
        ({"interval": 0}, "interval is 0"),
        ({"mode": "early"}, "unknown mode"),
        ({"mode": [0, 1, 1]}, "begin with 1"),
        ({"mode": [1, 2]}, "0s and 1s only"),
        ({"mode": []}, "begin with 1"),
        ({"dense_fraction": 1.5}, "dense_fraction is 1.5"),
        ({"num_inference_steps": 0}, "num_inference_steps is 0"),
    ],
)
def test_bad_values(values, words):
    with pytest.raises(ValueError, match=words):
        FeatureInheritanceConfig(**values)


@pytest.mark.parametrize(
    "values, words",
    [
        ({"modules": ["mid_blok"]}, "Did you mean 'mid_block'"),
        ({"modules": ["up_blocks.0.resnets.0"]}, "unknown block"),
        ({"modules": ["up_blocks.0.resnets.7"], "granularity": "layer"}, "unknown block or layer"),
        ({"modules": ["conv_in"], "granularity": "layer"}, "unknown block or layer"),
        ({"modules": ["up_block.0"], "granularity": "unit"}, "unknown module"),
        ({"modules": ["conv_in"], "granularity": "unit"}, "conv_in has no residual branch"),
        ({"modules": ["down_blocks.0.downsamplers.0"], "granularity": "unit"}, "no residual branch"),
        ({"modules": "branch-9", "granularity": "layer"}, "branch-0 to branch-8"),
        ({"modules": "branch-0"}, "unknown block"),
        ({"mode": "random"}, "give num_inference_steps"),
    ],
)
def test_what_a_model_does_not_have(make_unet, traces, values, words):
    unet = make_unet()
    with pytest.raises(ValueError, match=words):
        diffusers_ext.apply(unet, FeatureInheritanceConfig(**values))
    assert traces(unet) == ({}, set(), False)


def test_refuses_chunked_feed_forwards(make_unet):
    unet = make_unet()
    block = unet.mid_block.attentions[0].transformer_blocks[0]
    block.set_chunk_feed_forward(2, 1)
    config = FeatureInheritanceConfig(["mid_block.attentions.0.transformer_blocks.0.ff"], "unit")
    with pytest.raises(ValueError, match="disable_forward_chunking"):
        diffusers_ext.apply(unet, config)


def test_refuses_other_reuse_of_the_same_layers(make_unet):
    unet = make_unet()
    with diffusers_ext.apply(unet, FeatureInheritanceConfig()):
        for other in (DeepCacheConfig(), diffusers_ext.FasterDiffusionConfig(), diffusers_ext.HiDiffusionConfig()):
            assert "cannot be combined" in diffusers_ext.check(unet, other).errors[0]
    unet.fuse_qkv_projections()
    with pytest.raises(ValueError, match="unfuse_qkv_projections"):
        diffusers_ext.apply(unet, FeatureInheritanceConfig())


def test_warns_when_no_step_can_inherit(make_unet):
    unet = make_unet()
    for config in (FeatureInheritanceConfig(interval=1), FeatureInheritanceConfig(mode=[1, 1])):
        assert "none of 9 steps" in diffusers_ext.check(unet, config, num_inference_steps=9).warnings[0]
    assert not diffusers_ext.check(unet, FeatureInheritanceConfig(), num_inference_steps=2).warnings


def test_config_travels_as_json():
    for config in (
        FeatureInheritanceConfig(),
        FeatureInheritanceConfig(["mid_block"], "unit", mode=[1, 0]),
        FeatureInheritanceConfig("branch-3", "layer", 5, "random", seed=4, num_inference_steps=20),
    ):
        assert diffusers_ext.MethodConfig.from_dict(config.to_dict()) == config
