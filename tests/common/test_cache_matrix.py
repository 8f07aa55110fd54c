"""Every cache and attention method on tiny models of every layout it names, in all that could leave it stale.

A run is a plain loop over a scheduler, so that resets must come from the cache itself, as in a user's own loop.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FlowMatchHeunDiscreteScheduler
from diffusers.models.attention_processor import IPAdapterAttnProcessor2_0, SD3IPAdapterJointAttnProcessor2_0
from diffusers.models.embeddings import ImageProjection, MultiIPAdapterImageProjection
from diffusers.models.transformers.transformer_flux import FluxIPAdapterAttnProcessor
from safetensors.torch import load_file

import diffusers_ext
from diffusers_ext._flux_tokens import image_ids, pack, unpack
from diffusers_ext.caching._common import Inputs
from diffusers_ext.registry import list_methods


STEPS = 10
SIZE = 8
TRAINED = 4
TEXT = 8
LAYOUTS = {"unet": ("unet",), "dit": ("dit", "pixart"), "mmdit": ("sd3", "flux")}
LAYOUTS["any"] = sum(LAYOUTS.values(), ())


class Setup(NamedTuple):
    """How a method is used here.

    Args:
        settings: Under which it acts on these models.
        figure: Of its summary: tells that it did.
        keeps: Does it keep tensors from one call to the next?
    """

    settings: dict[str, Any] = {}
    figure: str = "reused"
    keeps: bool = True


# Methods for sizes that a model was not trained for; caches need nothing.
SETUPS = {
    "any-size-diffusion": Setup({"tile_size": TRAINED}, "pixels_from_the_step_before"),
    "attention-entropy-scaling": Setup({"base_size": (TRAINED, TRAINED)}, "scaled", keeps=False),
    "hidiffusion": Setup({}, "windowed_calls", keeps=False),
    "vmoba": Setup({"blocks": 4}, "sparse", keeps=False),
}
METHODS = [record for record in list_methods() if record.kind in ("cache", "attention")]


# Options that let a method reuse more than its paper does.
OPTIONS = {"forecast_order": 1, "reuse_text": True}


def _with_options(record):
    """The record of the same method with as many of these options as it has."""
    fields = record.public.__dataclass_fields__
    given = {name: value for name, value in OPTIONS.items() if name in fields}
    return dataclasses.replace(record, public=functools.partial(record.public, **given))


WITH_OPTIONS = [_with_options(r) for r in METHODS if OPTIONS.keys() & r.public.__dataclass_fields__.keys()]
CASES = [
    (record, layout)
    for record in METHODS + WITH_OPTIONS
    for layout in dict.fromkeys(n for t in record.targets for n in LAYOUTS.get(t, ()))
]


def _setup(record):
    return SETUPS.get(record.slug, Setup())


def _config(record):
    return record.public(**_setup(record).settings)


@pytest.fixture(scope="module")
def build(tiny_model):
    """Function from a layout to a fresh target."""
    return lambda layout: SimpleNamespace(
        transformer=tiny_model(layout, size=TRAINED, text=TEXT), scheduler=FlowMatchEulerDiscreteScheduler()
    )


def _conditions(layout, batch, words=5, seed=1):
    """Keyword arguments of a call; the same objects for every step of a run, as in a pipeline."""
    generator = torch.Generator().manual_seed(seed)
    text = torch.randn(batch, words, TEXT, generator=generator)
    if layout == "dit":
        return {"class_labels": torch.randint(0, 9, (batch,), generator=generator)}
    if layout in ("unet", "pixart"):
        return {"encoder_hidden_states": text}
    return {"encoder_hidden_states": text, "pooled_projections": torch.randn(batch, TEXT, generator=generator)}


def _call(layout, model, x, t, conditions, **extra):
    """Velocity of latents [B, 4, H, W], whatever the model calls its inputs."""
    if layout == "unet":
        return model(x, t, return_dict=False, **conditions, **extra)[0]
    if layout != "flux":
        return model(x, timestep=t.expand(len(x)), return_dict=False, **conditions, **extra)[0]
    size = x.shape[-2:]
    out = model(
        pack(x),
        timestep=t.expand(len(x)) / 1000,
        img_ids=image_ids(*size, x.device),
        txt_ids=torch.zeros(conditions["encoder_hidden_states"].shape[1], 3, device=x.device),
        return_dict=False,
        **conditions,
        **extra,
    )[0]
    return unpack(out, *size)


def _like(model, conditions):
    """Conditions on the device and in the type of a model."""
    return {k: v.to(model.device, model.dtype if v.is_floating_point() else None) for k, v in conditions.items()}


def _noise(batch, height, width):
    return torch.randn(batch, 4, height, width, generator=torch.Generator().manual_seed(2))


def run(
    target, layout, batch=2, height=SIZE, width=SIZE, words=5, steps=STEPS, start=0, stop=None, predict=None, **extra
):
    """Latents after a plain sampling loop from step `start`; `stop` breaks off before that step."""
    model, scheduler = target.transformer, target.scheduler
    conditions = _like(model, _conditions(layout, batch, words))
    predict = predict or (lambda x, t: _call(layout, model, x, t, conditions, **extra))
    scheduler.set_timesteps(steps, device=model.device)
    scheduler.set_begin_index(start)
    x = _noise(batch, height, width).to(model.device, model.dtype)
    with torch.no_grad():
        for index, t in enumerate(scheduler.timesteps[start:]):
            if index == stop:
                break
            x = scheduler.step(predict(x, t), t, x).prev_sample
    return x


def _param(record, layout):
    """The first layout of every target is tested at once, its relatives in the slow run."""
    first = layout in [layouts[0] for layouts in LAYOUTS.values()]
    name = f"{record.slug}-options" if record in WITH_OPTIONS else record.slug
    return pytest.param((record, layout), id=f"{name}-{layout}", marks=[] if first else [pytest.mark.slow])


@pytest.fixture(params=[_param(*case) for case in CASES])
def case(request, build):
    record, layout = request.param
    return record, layout, build(layout)


def _fresh(case, **settings):
    """A run on a model that has never run anything else under this cache."""
    record, layout, target = case
    with diffusers_ext.apply(target, _config(record)):
        return run(target, layout, **settings)


def test_there_is_a_case_for_every_method():
    assert {record.slug for record, _ in CASES} == {record.slug for record in METHODS}


def test_it_acts_and_comes_off(case):
    record, layout, target = case
    plain = run(target, layout)
    with diffusers_ext.apply(target, _config(record)) as handle:
        cached = run(target, layout)
        figures = handle.summary()[record.slug]
    assert figures[_setup(record).figure] > 0
    if record.kind == "cache":
        assert figures["computed"] > 0 and figures["macs_saved"] > 0
    assert torch.isfinite(cached).all() and not torch.equal(cached, plain)
    assert torch.equal(run(target, layout), plain)


SETTINGS = [
    {},
    {"batch": 1},
    {"height": 12, "width": 12},
    {"words": 3},
    {"steps": 12},
    {"start": 3},
    {},
]


def test_runs_of_different_layouts_in_a_row(case):
    """Batch, size, prompt length, number of steps, image-to-image starts: each as if it ran alone."""
    record, layout, target = case
    alone = [_fresh(case, **setting) for setting in SETTINGS]
    with diffusers_ext.apply(target, _config(record)):
        for setting, expected in zip(SETTINGS, alone):
            assert torch.equal(run(target, layout, **setting), expected), setting


def test_another_dtype(case, build):
    record, layout, target = case
    other = build(layout)
    other.transformer.to(torch.bfloat16)
    expected = _fresh((record, layout, other))
    with diffusers_ext.apply(target, _config(record)):
        run(target, layout, stop=6)
        target.transformer.to(torch.bfloat16)
        assert torch.equal(run(target, layout), expected)
    assert expected.dtype == torch.bfloat16 and torch.isfinite(expected).all()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a second device")
def test_another_device(case, build):
    record, layout, target = case
    other = build(layout)
    other.transformer.to("cuda")
    expected = _fresh((record, layout, other))
    with diffusers_ext.apply(target, _config(record)):
        run(target, layout, stop=6)
        target.transformer.to("cuda")
        torch.testing.assert_close(run(target, layout), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("moved", [False, True])
def test_another_device_in_mid_run(case, build, moved, monkeypatch):
    """A call that says it is elsewhere gets nothing of the calls before, and equals the first of a run."""
    record, layout, target = case
    if not _setup(record).keeps:
        pytest.skip("keeps no tensors from call to call")
    key, device, conditions = Inputs.key, ["here"], _conditions(layout, 2)
    monkeypatch.setattr(Inputs, "key", lambda inputs: (device[0], key(inputs)))
    twin, outputs = build(layout), []

    def predict(x, t):
        outputs.append((x, t, _call(layout, target.transformer, x, t, conditions)))
        device[0] = "elsewhere" if moved and len(outputs) == 5 else device[0]
        return outputs[-1][-1]

    with diffusers_ext.apply(target, _config(record)):
        run(target, layout, predict=predict)
    x, t, out = outputs[5]
    twin.scheduler.set_timesteps(STEPS)
    with torch.no_grad(), diffusers_ext.apply(twin, _config(record)):
        assert torch.equal(_call(layout, twin.transformer, x, t, conditions), out) == moved


def test_copies_are_refused_while_it_is_on(case, tmp_path):
    """A copy would run on the original's weights. Saving is not copying, and afterwards copies are free."""
    record, layout, target = case
    model = target.transformer
    plain = run(target, layout)
    with diffusers_ext.apply(target, _config(record)):
        inner = [m for m in model.modules() if m is not model and hasattr(m, "_diffusers_hook")]
        for given in (target, model, *inner[:1]):
            with pytest.raises(RuntimeError, match="remove methods before copying"):
                copy.deepcopy(given)
        model.save_pretrained(tmp_path)
    twin = copy.deepcopy(target)
    saved = load_file(tmp_path / "diffusion_pytorch_model.safetensors")
    assert saved.keys() == model.state_dict().keys()
    assert all(torch.equal(saved[name], tensor) for name, tensor in model.state_dict().items())
    assert torch.equal(run(twin, layout), plain)
    for parameter in twin.transformer.parameters():
        parameter.zero_()
    assert torch.equal(run(target, layout), plain) and not torch.equal(run(twin, layout), plain)


@pytest.mark.parametrize("how", ["between steps", "inside the model"])
def test_an_interrupted_run_leaves_nothing_behind(case, how):
    record, layout, target = case
    clean = _fresh(case)
    with diffusers_ext.apply(target, _config(record)):
        if how == "between steps":
            run(target, layout, stop=6, steps=STEPS + 1)
        else:
            calls = []

            def fail(*_):
                calls.append(1)
                if len(calls) == 6:
                    raise KeyboardInterrupt

            last = [m for m in target.transformer.modules() if isinstance(m, (torch.nn.Linear, torch.nn.Conv2d))][-1]
            handle = last.register_forward_hook(fail)
            with pytest.raises(KeyboardInterrupt):
                run(target, layout)
            handle.remove()
        assert torch.equal(run(target, layout), clean)


def test_guidance_in_turn_equals_guidance_in_one_batch(case):
    record, layout, target = case
    model = target.transformer
    both = _conditions(layout, 2)
    first, second = ({k: v[i : i + 1].clone() for k, v in both.items()} for i in range(2))

    def split(x, t):
        u, c = _call(layout, model, x, t, first), _call(layout, model, x, t, second)
        return u + 2 * (c - u)

    def batched(x, t):
        u, c = _call(layout, model, torch.cat([x, x]), t, both).chunk(2)
        return u + 2 * (c - u)

    results = []
    for predict in (split, batched):
        with diffusers_ext.apply(target, _config(record)):
            results.append(run(target, layout, batch=1, predict=predict))
    torch.testing.assert_close(*results, atol=1e-4, rtol=1e-4)


def test_an_extra_call_per_step_does_not_disturb(case):
    """Perturbed or layer-skipping guidance: a second call at each step, with the prompt of the first."""
    record, layout, target = case
    clean = _fresh(case)
    conditions = _conditions(layout, 2)

    def predict(x, t):
        out = _call(layout, target.transformer, x, t, conditions)
        _call(layout, target.transformer, 0.5 * x, t, conditions)
        return out

    with diffusers_ext.apply(target, _config(record)):
        assert torch.equal(run(target, layout, predict=predict), clean)


def test_two_evaluations_per_step(case):
    """Heun: supported and repeatable, or refused before the run."""
    record, layout, target = case
    target.scheduler = FlowMatchHeunDiscreteScheduler()
    preflight = diffusers_ext.check(target, _config(record))
    if not preflight.ok:
        with pytest.raises(ValueError, match="FlowMatchHeunDiscreteScheduler"):
            diffusers_ext.apply(target, _config(record))
        assert not [m for m in target.transformer.modules() if hasattr(m, "_diffusers_hook")]
        pytest.skip(f"refused before the run, with nothing applied: {preflight.errors[0]}")
    with diffusers_ext.apply(target, _config(record)) as handle:
        first = run(target, layout, steps=8)
        figures = handle.summary()[record.slug]
        assert figures[_setup(record).figure] > 0
        if record.kind == "cache":
            assert figures["computed"] + figures["reused"] == 15
        assert torch.equal(run(target, layout, steps=8), first)


def _lora(target):
    from peft import LoraConfig, inject_adapter_in_model

    inject_adapter_in_model(LoraConfig(r=2, target_modules=["to_q", "to_v"]), target.transformer)
    for index, (name, parameter) in enumerate(sorted(target.transformer.named_parameters())):
        if "lora" in name:
            torch.nn.init.normal_(parameter, std=0.3, generator=torch.Generator().manual_seed(index))


def test_lora_before_and_after(case):
    record, layout, target = case
    plain = _fresh(case)
    with diffusers_ext.apply(target, _config(record)):
        _lora(target)
        after = run(target, layout)
    before = _fresh(case)
    assert torch.equal(before, after) and not torch.equal(before, plain)


@pytest.mark.slow
@pytest.mark.parametrize("first", ["compile", "apply"])
def test_compiled(case, first):
    record, layout, target = case
    expected = _fresh(case)
    torch._dynamo.reset()
    model = target.transformer
    conditions = _conditions(layout, 2)
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    if first == "compile":
        target.transformer = torch.compile(model, backend=backend)
        handle = diffusers_ext.apply(target, _config(record))
    else:
        handle = diffusers_ext.apply(target, _config(record))
        target.transformer = torch.compile(model, backend=backend)
    compiled = target.transformer
    result = run(target, layout, predict=lambda x, t: _call(layout, compiled, x, t, conditions))
    torch.testing.assert_close(result, expected, atol=1e-4, rtol=1e-4)
    assert graphs and handle.summary()[record.slug][_setup(record).figure] > 0
    handle.remove()
    torch._dynamo.reset()


def _residuals(layout, batch):
    """ControlNet residuals in the arguments of each layout that takes them."""
    generator = torch.Generator().manual_seed(4)
    tokens = [0.5 * torch.randn(batch, SIZE * SIZE // 4, 16, generator=generator) for _ in range(2)]
    if layout == "flux":
        return {"controlnet_block_samples": tokens, "controlnet_single_block_samples": tokens}
    if layout == "sd3":
        return {"block_controlnet_hidden_states": tokens}
    shapes = [(8, SIZE), (8, SIZE), (8, SIZE // 2), (16, SIZE // 2)]
    down = [0.5 * torch.randn(batch, c, s, s, generator=generator) for c, s in shapes]
    return {"down_block_additional_residuals": down, "mid_block_additional_residual": down[-1]}


def _still(case, **extra):
    """Outputs with and without the cache of a run whose input does not move and whose time hardly does."""
    record, layout, target = case
    scheduler, x, conditions = target.scheduler, _noise(2, SIZE, SIZE), _conditions(layout, 2)
    scheduler.set_timesteps(STEPS)
    times = torch.linspace(500, 499.99, STEPS)
    with torch.no_grad():
        plain = _call(layout, target.transformer, x, times[0], conditions, **extra)
        with diffusers_ext.apply(target, _config(record)) as handle:
            outputs = []
            for t, real in zip(times, scheduler.timesteps):
                outputs.append(_call(layout, target.transformer, x, t, conditions, **extra))
                scheduler.step(outputs[-1], real, x)
            assert handle.summary()[record.slug]["reused"] > 0
    return plain, outputs


def test_an_input_that_does_not_move(case):
    """What is reused is what would have been computed."""
    if case[0].kind != "cache":
        pytest.skip("changes what is computed at other sizes, on purpose")
    plain, outputs = _still(case)
    for out in outputs:
        torch.testing.assert_close(out, plain, atol=1e-3, rtol=1e-3)


def _require_effect(case, extra, other):
    """Further inputs act under the method; caches change nothing about them, runs repeat, and it comes off."""
    record, layout, target = case
    if record.kind == "cache":
        plain, outputs = _still(case, **extra)
        assert not torch.allclose(plain, _still(case, **other)[0], atol=1e-2)
        for out in outputs:
            torch.testing.assert_close(out, plain, atol=1e-3, rtol=1e-3)
    plain = run(target, layout, **extra)
    with diffusers_ext.apply(target, _config(record)) as handle:
        without, first = run(target, layout, **other), run(target, layout, **extra)
        assert handle.summary()[record.slug][_setup(record).figure] > 0
        assert torch.equal(run(target, layout, **extra), first) and not torch.allclose(first, without, atol=1e-2)
        assert torch.equal(run(target, layout, **other), without)
    assert torch.equal(run(target, layout, **extra), plain)


def test_control_residuals(case):
    layout = case[1]
    if layout in ("dit", "pixart"):
        pytest.skip("no ControlNet of diffusers feeds this transformer")
    _require_effect(case, _residuals(layout, 2), {})


def _image_prompts(layout, model):
    """An IP-Adapter put on the model; the arguments that bring two images."""
    torch.manual_seed(5)
    own = {
        "unet": lambda attn: IPAdapterAttnProcessor2_0(attn.to_q.out_features, TEXT, num_tokens=(4,)),
        "sd3": lambda attn: SD3IPAdapterJointAttnProcessor2_0(16, 16, 8, 16, scale=1.0),
        "flux": lambda attn: FluxIPAdapterAttnProcessor(16, 16),
    }[layout]
    processors = {
        name: p
        if "attn1" in name or "single" in name
        else own(model.get_submodule(name.removesuffix(".processor"))).requires_grad_(False)
        for name, p in model.attn_processors.items()
    }
    model.set_attn_processor(processors)
    if layout == "unet":
        model.encoder_hid_proj = MultiIPAdapterImageProjection([ImageProjection(6, TEXT, 4)]).requires_grad_(False)
        model.register_to_config(encoder_hid_dim_type="ip_image_proj")
        return tuple({"added_cond_kwargs": {"image_embeds": [torch.randn(2, 1, 6)]}} for _ in range(2))
    time, images = {"temb": torch.randn(2, 16)} if layout == "sd3" else {}, torch.randn(2, 2, 4, 16)
    given = [image if layout == "sd3" else [image] for image in images]
    return tuple({"joint_attention_kwargs": {"ip_hidden_states": image, **time}} for image in given)


def test_image_prompts(case):
    """IP-Adapter: its attention processors and embeddings work under a method, on and off."""
    record, layout, target = case
    if layout in ("dit", "pixart"):
        pytest.skip("diffusers has no IP-Adapter for this transformer")
    with diffusers_ext.apply(target, _config(record)):  # put on while the method is there
        images = _image_prompts(layout, target.transformer)
        if record.slug == "ras" and layout == "sd3":
            with pytest.raises(ValueError, match="IP-Adapter of Stable Diffusion 3"):
                run(target, layout, **images[0])
    if preflight := diffusers_ext.check(target, _config(record)):
        _require_effect(case, *images)
        return
    with pytest.raises(ValueError, match="unload the IP-Adapter"):
        diffusers_ext.apply(target, _config(record))
    pytest.skip(f"refused: {preflight.errors[0]}")
