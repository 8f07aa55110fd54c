"""BAC as a native MODEL patch: same decisions, outputs and statistics as on the diffusers side."""

from __future__ import annotations

import importlib
from dataclasses import replace

import pytest
import torch

import diffusers_ext
from diffusers_ext import BACConfig, measure_bac, zoo


pytestmark = pytest.mark.comfy
CAPTION = "a small red circle left of a large green square, striped blue background"
STEPS = 6


@pytest.fixture(scope="module")
def shapes(native_pipe, encode):
    model, clip, _ = native_pipe("shapes-dit")
    return model, encode(clip, CAPTION), encode(clip, "")


@pytest.fixture(scope="module")
def nodes(comfy):
    return importlib.import_module("comfy_nodes.caching_bac")


@pytest.fixture
def patch(nodes):
    def node(model, updates=2, schedule=None, rescale=False, forecast_order=0):
        return nodes.DXBACApply.execute(model, nodes.EVEN, updates, rescale, schedule, forecast_order).args[0]

    return node


@pytest.fixture
def ksample(comfy, shapes):
    """The core KSampler node on the shapes model; returns latents."""
    _, positive, negative = shapes

    def run(model, steps=STEPS, sampler="euler", batch=1, size=16, denoise=1.0):
        latent = {"samples": torch.zeros(batch, 4, size, size)}
        return comfy.nodes.common_ksampler(
            model, 0, steps, 3.0, sampler, "simple", positive, negative, latent, denoise=denoise
        )[0]["samples"]

    return run


@pytest.fixture
def executed(nodes):
    """How often the weights of each sub-block are used while a function runs."""

    def count(model, function):
        counts, handles = {}, []
        for parts in nodes.places_of(model).values():
            for part in parts:
                # A module's own forward is shadowed by the cache; its weights are not.
                for module in (*part.outputs, *part.inputs):
                    leaf = next(m for m in reversed(list(module.modules())) if isinstance(m, torch.nn.Linear))
                    handles.append((part.name, leaf, leaf.weight.data_ptr()))
        places = {pointer: (name, i) for i, (name, _, pointer) in enumerate(handles)}
        linear = torch.nn.functional.linear

        def counting(x, weight, bias=None):
            if weight.data_ptr() in places:
                key = places[weight.data_ptr()]
                counts[key] = counts.get(key, 0) + 1
            return linear(x, weight, bias)

        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(torch.nn.functional, "linear", counting)
            function()
        return {name: {n for key, n in counts.items() if key[0] == name} for name, _, _ in handles}

    return count


def uneven(names, total):
    """A different list for every sub-block."""
    generator = torch.Generator().manual_seed(0)
    lists = {
        n: (0, *(1 + torch.randperm(total - 1, generator=generator)[: 1 + i % 3]).sort().values.tolist())
        for i, n in enumerate(names)
    }
    return BACConfig(lists, num_inference_steps=total)


def on_diffusers(pipe, log):
    """Outputs of the diffusers transformer for logged inputs, as ComfyUI shapes them."""
    ids = pipe._prepare_latent_image_ids(1, 8, 8, torch.device("cpu"), torch.float32)
    context, y = log[0][2:4]
    words = torch.zeros(context.shape[1], 3)
    with torch.no_grad():
        for x, t, seen, *_, out in log:
            assert torch.equal(seen, context)
            packed = pipe._pack_latents(x, len(x), 4, 16, 16)
            tokens = pipe.transformer(packed, context, y, t, ids, words, return_dict=False)[0]
            yield tokens, pipe._pack_latents(out, len(x), 4, 16, 16)


@pytest.mark.parametrize("order", [0, 1])
def test_parity_with_diffusers(shapes, nodes, patch, ksample, recorded, order):
    """Every sub-block has steps of its own; what one side reuses, the other does."""
    config = uneven(nodes.kinds_of(nodes.places_of(shapes[0])), STEPS)
    outer, log = recorded(shapes[0])
    ksample(patch(outer, schedule=config, forecast_order=order))
    config = replace(config, forecast_order=order)
    pipe = zoo.load("shapes-dit")
    with diffusers_ext.apply(pipe.transformer, config) as handle:
        for ours, theirs in on_diffusers(pipe, log):
            torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)
        assert handle.summary()["bac"]["sub_blocks_run"] == sum(map(len, config.schedule.values()))


def test_what_runs(shapes, nodes, patch, ksample, executed):
    model = shapes[0]
    config = uneven(nodes.kinds_of(nodes.places_of(model)), STEPS)
    counts = executed(model, lambda: ksample(patch(model, schedule=config)))
    assert counts == {name: {len(steps)} for name, steps in config.schedule.items()}


def test_calibration_measures_what_diffusers_measures(shapes, nodes, comfy, ksample, recorded, tmp_path, monkeypatch):
    """On the same calls: the same similarities, in the same order of sub-blocks, in a file that both sides read."""
    model, positive, negative = shapes
    outer, log = recorded(model)
    monkeypatch.setattr(nodes.FILES.__class__, "folders", lambda self: [tmp_path, tmp_path])
    found, measure = [], nodes._measure
    monkeypatch.setattr(nodes, "_measure", lambda *args: found.append(measure(*args)) or found[0])
    latent = {"samples": torch.zeros(2, 4, 16, 16)}
    sampler = comfy.samplers.sampler_object("euler")
    sigmas = comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), "simple", STEPS)
    config = nodes.DXBACCalibrate.execute(
        outer, positive, negative, 3.0, latent, sampler, sigmas, 3, "cosine", False, 2, 0, "mine"
    ).args[0]
    pipe = zoo.load("shapes-dit")
    expected = measure_bac(pipe.transformer, lambda seed: list(on_diffusers(pipe, log)), 1, progress=False)
    assert found[0].names == expected.names and found[0].feed_forward == expected.feed_forward
    torch.testing.assert_close(found[0].similarity, expected.similarity, atol=1e-4, rtol=0)
    assert found[0].errors == pytest.approx(expected.errors, rel=1e-3)
    assert config == BACConfig.load(tmp_path / "mine.json") and config.num_inference_steps == STEPS
    assert diffusers_ext.check(pipe, config, num_inference_steps=STEPS).ok
    choices = (("mine.json", 2, False), (nodes.EVEN, 2, False, config))
    named, given = (nodes.DXBACApply.execute(model, *choice).args[0] for choice in choices)
    assert torch.equal(ksample(named), ksample(given))


def test_every_step_is_exact_and_the_given_model_is_untouched(shapes, patch, ksample):
    model = shapes[0]
    plain = ksample(model)
    assert torch.equal(ksample(patch(model, STEPS)), plain)
    cached = ksample(patch(model))
    assert not torch.equal(cached, plain) and torch.isfinite(cached).all()
    assert torch.equal(ksample(model), plain)
    assert not [m for m in model.model.diffusion_model.modules() if "forward" in m.__dict__]


@pytest.mark.parametrize("sampler", ["heun", "dpm_2", "dpmpp_2m"])
def test_samplers(shapes, patch, ksample, executed, sampler):
    """Samplers that call the model between two noise levels stay within a step."""
    patched = patch(shapes[0], 3)
    counts = executed(patched, lambda: ksample(patched, sampler=sampler))
    calls = {"heun": (6, 5), "dpm_2": (6, 5), "dpmpp_2m": (3, 0)}[sampler]
    assert all(n <= {calls[0]} | {calls[1]} for n in counts.values()), counts
    assert torch.equal(ksample(patched, sampler=sampler), ksample(patched, sampler=sampler))


def test_steps_by_noise_level(nodes):
    run = nodes._Run(None, dict, torch.tensor([1.0, 0.7, 0.4, 0.0]))
    assert [run.step_of(s) for s in (1.2, 1.0, 0.8, 0.7, 0.5, 0.4, 0.1)] == [0, 0, 0, 1, 1, 2, 2]


def test_runs_do_not_see_each_other(shapes, patch, ksample):
    patched = patch(shapes[0])
    clean = ksample(patched)
    ksample(patched, batch=2, size=20)
    ksample(patched, denoise=0.5)
    assert torch.equal(ksample(patched), clean)
    broken, calls = patched.clone(), []

    def fail_after_two(args):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return args["denoised"]

    broken.set_model_sampler_post_cfg_function(fail_after_two)
    with pytest.raises(KeyboardInterrupt):
        ksample(broken)
    assert torch.equal(ksample(patched), clean)


def test_conditions_in_turn_equal_conditions_in_one_batch(shapes, patch, ksample, monkeypatch):
    patched = patch(shapes[0])
    together = ksample(patched)
    monkeypatch.setattr(shapes[0].model, "memory_required", lambda *_, **__: 1e30)
    torch.testing.assert_close(ksample(patched), together, atol=1e-4, rtol=0)


def test_patching_twice_replaces(shapes, patch, ksample):
    model = shapes[0]
    assert torch.equal(ksample(patch(patch(model, 4), 2)), ksample(patch(model, 2)))


def test_patches_of_other_nodes_stay(shapes, patch, ksample):
    """A node that leaves out block 1, as skip-layer guidance does, and one that changes what attention gives."""
    model = shapes[0].clone()
    model.set_model_patch_replace(lambda args, extra: args, "dit", "double_block", 1)
    model.set_model_patch(lambda attention, options: 0.5 * attention, "attn1_output_patch")
    plain = ksample(model)
    assert torch.equal(ksample(patch(model, STEPS)), plain) and not torch.equal(plain, ksample(shapes[0]))
    assert torch.isfinite(ksample(patch(model))).all()


def test_control_counts_once(shapes, nodes):
    """With an input that does not move, a pass that reuses everything equals the whole pass, residuals included."""
    from diffusers_ext.caching._bac_calls import Plan

    transformer = shapes[0].model.diffusion_model
    torch.manual_seed(0)
    x, context, y = torch.randn(1, 4, 16, 16), torch.randn(1, 20, 128), torch.randn(1, 128)
    places = nodes.places_of(shapes[0])
    plan, cache = Plan.of(dict.fromkeys(nodes.kinds_of(places), (0,)), 3), nodes.BlockCache(None, places)

    def control():
        generator = torch.Generator().manual_seed(1)
        return {k: [torch.randn(1, 64, 128, generator=generator) for _ in range(8)] for k in ("input", "output")}

    def run(call=None):
        options = cache.patched({}, call) if call else {}
        return transformer(x, torch.tensor([0.5]), context, y, control=control(), transformer_options=options)

    with torch.no_grad():
        store, plain = plan.new_kind(), run()
        for step in range(3):
            call = plan.begin(store, step)
            torch.testing.assert_close(run(call), plain, atol=1e-4, rtol=1e-4)
            call.end()
            assert bool(call.reused) == (step > 0)


def test_stable_diffusion_3(tiny_pipe, nodes, patch, executed, comfy):
    """Joint blocks, the last of which drops the text."""
    model = tiny_pipe("sd3")[0]
    width = model.model.diffusion_model.context_embedder.in_features
    pooled = model.model.diffusion_model.y_embedder.mlp[0].in_features
    cond = [[torch.randn(1, 7, width), {"pooled_output": torch.randn(1, pooled)}]]
    latent = {"samples": torch.zeros(1, 16, 8, 8)}

    def run(m):
        return comfy.nodes.common_ksampler(m, 0, 5, 2.0, "euler", "simple", cond, cond, latent)[0]["samples"]

    plain = run(model)
    assert torch.equal(run(patch(model, 5)), plain)
    config = uneven(nodes.kinds_of(nodes.places_of(model)), 5)
    cached = patch(model, schedule=config)
    # Text that is dropped afterwards is never projected, but its queries take part in the attention.
    counts = executed(model, lambda: run(cached))
    assert counts == {name: {len(steps)} for name, steps in config.schedule.items()}
    assert torch.isfinite(run(cached)).all() and not torch.equal(run(cached), plain)


def test_refusals(native_pipe, shapes, nodes, patch, ksample):
    with pytest.raises(ValueError, match="this model is a UNetModel"):
        patch(native_pipe("shapes-unet")[0])
    config = uneven(nodes.kinds_of(nodes.places_of(shapes[0])), 5)
    with pytest.raises(ValueError, match="is for 5 steps and the run has 6"):
        ksample(patch(shapes[0], schedule=config))
    assert torch.isfinite(ksample(patch(shapes[0], schedule=config, rescale=True))).all()
    with pytest.raises(ValueError, match="made for another model"):
        patch(shapes[0], schedule=BACConfig({"transformer_blocks.0.ff": (0,)}, num_inference_steps=5))
    with pytest.raises(ValueError, match="num_updates is 8"):
        ksample(patch(shapes[0], 8))
    with pytest.raises(ValueError, match="updates is 7; 6 steps accept"):
        nodes.DXBACCalibrate.execute(shapes[0], [], [], 1.0, {}, None, torch.zeros(7), 7, "cosine", True, 0, 0, "no")
