"""Feature inheritance and model switching in ComfyUI's own classes: same decisions and outputs as in diffusers."""

from __future__ import annotations

import importlib
import math

import pytest
import torch

import diffusers_ext
from diffusers_ext import FeatureInheritanceConfig, zoo


pytestmark = pytest.mark.comfy
CAPTION = "a small red circle left of a large green square, striped blue background"
STEPS = 6


@pytest.fixture(scope="module")
def shapes(native_pipe, encode):
    model, clip, _ = native_pipe("shapes-unet")
    return model, encode(clip, CAPTION), encode(clip, "")


@pytest.fixture(scope="module")
def nodes(comfy):
    return importlib.import_module("comfy_nodes.caching_a_sdm")


@pytest.fixture
def patch(dx_nodes):
    def node(
        model,
        granularity="block",
        interval=2,
        mode="uniform",
        dense_fraction=0.4,
        start=0.0,
        end=1.0,
        modules=None,
        forecast_order=0,
    ):
        preset = "deep" if modules is None else "custom"
        values = (preset, granularity, interval, mode, dense_fraction, start, end, modules or "", forecast_order)
        return dx_nodes["DXFeatureInheritance"].execute(model, *values).args[0]

    return node


@pytest.fixture
def switch(dx_nodes):
    return lambda a, b, percent=0.5: dx_nodes["DXMultiModelSwitch"].execute(a, b, percent).args[0]


@pytest.fixture
def ksample(comfy, shapes):
    """The core KSampler on the shapes model; returns latents."""
    _, positive, negative = shapes

    def run(model, steps=STEPS, sampler="euler", batch=2, size=16, latent=None, **kwargs):
        given = {"samples": torch.zeros(batch, 4, size, size) if latent is None else latent}
        return comfy.nodes.common_ksampler(
            model, 0, steps, 3.0, sampler, "normal", positive, negative, given, **kwargs
        )[0]["samples"]

    return run


@pytest.fixture
def executed(shapes):
    """How often the first modules of two blocks really run while a function does."""
    unet = shapes[0].model.diffusion_model

    def count(function):
        calls = {"shallow": 0, "deep": 0}
        modules = {"shallow": unet.input_blocks[1][0].in_layers[0], "deep": unet.middle_block[0].in_layers[0]}

        def counter(name):
            def hook(*_):
                calls[name] += 1

            return hook

        handles = [module.register_forward_pre_hook(counter(name)) for name, module in modules.items()]
        function()
        for handle in handles:
            handle.remove()
        return calls

    return count


def test_names_are_those_of_diffusers(nodes, shapes):
    """Every part has the name of the module that does the same in diffusers: same number of parameters."""
    theirs = dict(zoo.load("shapes-unet").unet.named_modules())
    parts = nodes.parts_of(shapes[0].model.diffusion_model)
    units = nodes._units_of(parts)
    for name, module in (parts | units).items():
        assert sum(p.numel() for p in module.parameters()) == sum(p.numel() for p in theirs[name].parameters()), name
    wanted = [
        n for n in theirs if n.split(".")[-2:-1] in (["resnets"], ["attentions"], ["upsamplers"], ["downsamplers"])
    ]
    assert set(parts) == set(wanted)


CASES = {
    "blocks": {},
    "layers": {"granularity": "layer", "modules": "up_blocks.1.resnets.0, mid_block"},
    "units": {"granularity": "unit", "interval": 3},
    "inner units": {
        "granularity": "unit",
        "modules": "up_blocks.1.attentions.0.transformer_blocks.0.attn2, mid_block",
    },
    "early": {"mode": "early_dense", "interval": 3},
    "random": {"mode": "random"},
    "forecast": {"mode": "early_dense", "interval": 3, "forecast_order": 1},
}


@pytest.mark.parametrize("case", CASES)
def test_parity_with_diffusers(shapes, patch, ksample, recorded, case):
    """The calls of the KSampler, repeated on the diffusers side with its own inheritance."""
    given = dict(CASES[case])
    model, log = recorded(patch(shapes[0], **given))
    ksample(model)
    if "modules" in given:
        given["modules"] = [name.strip() for name in given["modules"].split(",")]
    config = FeatureInheritanceConfig(**{"dense_fraction": 0.4, "num_inference_steps": STEPS, **given})
    unet, context = zoo.load("shapes-unet").unet, log[0][2]
    with torch.no_grad(), diffusers_ext.apply(unet, config) as handle:
        for x, t, _, out in log:
            torch.testing.assert_close(unet(x, t, context).sample, out, atol=1e-4, rtol=0)
        figures = handle.summary()["a-sdm"]
    assert figures["computed"] == sum(config.mask(STEPS)) and figures["reused"] == STEPS - figures["computed"] > 0


def test_all_computed_is_exact_and_nothing_stays(shapes, patch, ksample, executed):
    model = shapes[0]
    before = {n for n, m in model.model.diffusion_model.named_modules() if "forward" in m.__dict__}
    plain = ksample(model)
    for granularity in ("block", "unit"):
        assert torch.equal(ksample(patch(model, granularity, interval=1)), plain)
    calls = executed(lambda: ksample(patch(model, interval=3)))
    assert calls == {"shallow": STEPS, "deep": 2}
    assert {n for n, m in model.model.diffusion_model.named_modules() if "forward" in m.__dict__} == before
    assert torch.equal(ksample(model), plain)


def test_part_of_the_run(shapes, patch, ksample, executed):
    model = shapes[0]
    assert executed(lambda: ksample(patch(model, interval=10, start=0.5)))["deep"] == STEPS // 2 + 1
    assert executed(lambda: ksample(patch(model, interval=10, end=0.5)))["deep"] == math.ceil(STEPS / 2) + 1


def test_runs_do_not_see_each_other(shapes, patch, ksample):
    model = patch(shapes[0], interval=4)
    clean = ksample(model)
    ksample(model, batch=1, size=24)
    ksample(model, steps=5, denoise=0.6)
    broken, calls = model.clone(), []

    def fail(args):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return args["denoised"]

    broken.set_model_sampler_post_cfg_function(fail)
    with pytest.raises(KeyboardInterrupt):
        ksample(broken)
    assert not [n for n, m in shapes[0].model.diffusion_model.named_modules() if "forward" in m.__dict__]
    assert torch.equal(ksample(model), clean)


def test_conditions_in_turn_equal_conditions_in_one_batch(shapes, patch, ksample, monkeypatch):
    model = patch(shapes[0], "unit")
    together = ksample(model)
    monkeypatch.setattr(shapes[0].model, "memory_required", lambda *_, **__: 1e30)
    torch.testing.assert_close(ksample(model), together, atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", ["heun", "dpmpp_2m", "dpmpp_2s_ancestral"])
def test_samplers(shapes, patch, ksample, executed, name):
    model = patch(shapes[0])
    calls = executed(lambda: ksample(model, sampler=name))
    assert calls["deep"] < 0.7 * calls["shallow"]
    assert torch.equal(ksample(model, sampler=name), ksample(model, sampler=name))


def test_control_of_the_current_step_is_added(shapes, nodes):
    """The skip of an inherited down block gets the control of each step, and does not keep it."""
    unet = shapes[0].model.diffusion_model
    config = FeatureInheritanceConfig(granularity="block")
    modules, call = nodes.select(unet, config), nodes.Call(0, {})
    torch.manual_seed(0)
    x, context, t = torch.randn(1, 4, 16, 16), torch.randn(1, 20, 128), torch.tensor([500.0])

    def run(call, control=None):
        forwards = [(m, call.forward(n, m, False)) for n, m in modules.items()]
        with torch.no_grad(), nodes.standing_in(forwards):
            return unet(x, t, context, None, control, {})

    def control(scale):
        # Taken off the end, shallowest first; the last entries belong to the deepest skips.
        return {"middle": [scale * torch.ones(1, 128, 4, 4)]}

    plain = run(call)
    inherits = nodes.Call(1, call.features, inherits=True)
    torch.testing.assert_close(run(inherits), plain)
    with torch.no_grad():
        expected = unet(x, t, context, None, control(2.0), {})
    run(nodes.Call(0, {}), control(2.0))
    assert not torch.allclose(expected, plain)
    torch.testing.assert_close(run(inherits, control(0.0)), plain)


def test_switch_with_one_model_changes_nothing(shapes, switch, ksample):
    model = shapes[0]
    assert torch.equal(ksample(switch(model, model)), ksample(model))


@pytest.fixture(scope="module")
def other(shapes):
    """The shapes model loaded a second time, with other weights."""
    model = importlib.import_module("comfy_nodes._shapes").load_model("shapes-unet").clone()
    weights = model.model.state_dict()
    changed = [key for key in weights if ".middle_block." in key and key.endswith("weight")]
    assert changed and model.add_patches({key: ("diff", (0.5 * weights[key],)) for key in changed})
    return model


def test_switch_is_a_split_of_the_steps(shapes, other, switch, ksample):
    """Against two KSamplers that share the steps."""
    model = shapes[0]
    together = ksample(switch(model, other, 0.5))
    half = ksample(model, start_step=0, last_step=STEPS // 2)
    split = ksample(other, latent=half, start_step=STEPS // 2, last_step=STEPS, disable_noise=True)
    torch.testing.assert_close(together, split, atol=1e-4, rtol=0)
    assert not torch.allclose(together, ksample(model), atol=1e-3)
    assert torch.equal(ksample(switch(model, other, 1.0)), ksample(model))
    assert torch.equal(ksample(switch(model, other, 0.0)), ksample(other))


def test_switch_to_another_prediction(shapes, native_pipe, switch, ksample):
    """A v and an epsilon model: each translates its own output."""
    a, b = shapes[0], native_pipe("shapes-unet-eps")[0]
    together, alone = ksample(switch(a, b, 0.5)), ksample(a)
    assert 0 < (together - alone).norm() / alone.norm() < 1


def test_switch_keeps_the_patches_of_the_second_model(shapes, switch, ksample):
    """A patch of model_b acts in its part only."""
    model, calls = shapes[0], []

    def attention(q, k, v, extra):
        calls.append(1)
        return q, k, v

    other = model.clone()
    other.set_model_attn1_patch(attention)
    ksample(other)
    alone = len(calls)
    calls.clear()
    assert torch.equal(ksample(switch(model, other)), ksample(model))
    assert len(calls) == alone / 2


def test_switch_loads_the_second_model(shapes, other, switch):
    patched = switch(shapes[0], other)
    assert [m.model for m in patched.get_nested_additional_models()] == [other.model]
    assert not switch(shapes[0], shapes[0].clone()).get_nested_additional_models()


def test_refusals(native_pipe, shapes, patch, switch):
    flux = native_pipe("shapes-dit")[0]
    with pytest.raises(ValueError, match="this model is a Flux"):
        patch(flux)
    with pytest.raises(ValueError, match="they cannot share one run"):
        switch(shapes[0], flux)
    changed = shapes[0].clone()
    key = next(k for k in changed.model.state_dict() if k.startswith("diffusion_model.out.2.weight"))
    changed.add_patches({key: ("diff", (torch.ones_like(changed.model.state_dict()[key]),))})
    with pytest.raises(ValueError, match="a second time"):
        switch(shapes[0], changed)
    for given, words in (
        ({"modules": "up_blocks.9"}, "no blocks"),
        ({"modules": "up_blocks.9", "granularity": "layer"}, "unknown block or layer"),
        ({"modules": "down_blocks.0.downsamplers.0", "granularity": "unit"}, "no residual branch"),
        ({"modules": " , "}, "modules is empty"),
    ):
        with pytest.raises(ValueError, match=words):
            patch(shapes[0], **given)
