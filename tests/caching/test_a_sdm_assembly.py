"""Experts in convolutions, assembled UNets, their distillation, and several UNets over a run."""

from __future__ import annotations

import copy
import importlib.util
import json
import subprocess
import sys

import pytest
import torch
from diffusers import DDIMScheduler, UNet2DConditionModel
from torch import nn
from torch.nn import functional as F

from diffusers_ext import (
    AssembledUNet,
    AssemblyDistillation,
    ConditionalConv2d,
    MultiUNetSwitch,
    assemble_unet,
    calibration_batches,
    layers_to_keep,
    prediction_error,
    removable_units,
    unit_sensitivity,
    units_to_keep,
    zoo,
)
from diffusers_ext.caching._a_sdm_layout import joins_alike
from diffusers_ext.caching.a_sdm_assembly import _bypasses
from diffusers_ext.caching.a_sdm_switch import model_at


# ---- experts

CONVOLUTIONS = {
    "plain": {"padding": 1},
    "strided": {"stride": 2, "padding": (1, 0)},
    "grouped": {"groups": 2, "padding": "same"},
    "dilated": {"dilation": 2, "bias": False},
}


def _conv(name):
    torch.manual_seed(0)
    return nn.Conv2d(4, 6, 3, **CONVOLUTIONS[name])


@pytest.mark.parametrize("name", CONVOLUTIONS)
@pytest.mark.parametrize("experts", [1, 4])
def test_experts_start_as_the_plain_convolution(name, experts):
    conv, x = _conv(name), torch.randn(3, 4, 9, 9)
    torch.testing.assert_close(ConditionalConv2d.from_conv(conv, experts)(x), conv(x), atol=1e-6, rtol=0)


@pytest.mark.parametrize("name", CONVOLUTIONS)
@pytest.mark.parametrize("gating", ["softmax", "sigmoid"])
def test_a_batch_equals_its_singles(name, gating):
    module = ConditionalConv2d.from_conv(_conv(name), 3, gating, time_channels=5)
    nn.init.normal_(module.weight)
    x, temb = torch.randn(4, 4, 9, 9), torch.randn(4, 5)
    out, gates = module(x, temb), module.gates(x, temb)
    assert (gates[0] - gates[1]).abs().max() > 1e-3
    geometry = {**module.geometry, "groups": module.groups}
    for i in range(4):
        kernel = sum(r * w for r, w in zip(gates[i], module.weight))
        torch.testing.assert_close(
            out[i : i + 1], F.conv2d(x[i : i + 1], kernel, module.bias, **geometry), atol=1e-5, rtol=0
        )


def test_gates():
    """Softmax gates sum to one; sigmoid gates do not, and scale what a converted convolution gives."""
    conv, x = _conv("dilated"), torch.randn(3, 4, 9, 9)
    soft, sigmoid = (ConditionalConv2d.from_conv(conv, 4, gating) for gating in ("softmax", "sigmoid"))
    torch.testing.assert_close(soft.gates(x).sum(1), torch.ones(3))
    total = sigmoid.gates(x).sum(1)
    assert (total - 1).abs().min() > 0.1
    torch.testing.assert_close(sigmoid(x), conv(x) * total[:, None, None, None], atol=1e-5, rtol=0)


def test_gradients_reach_every_expert_and_the_gate():
    module = ConditionalConv2d.from_conv(_conv("plain"))
    module(torch.randn(3, 4, 9, 9)).square().sum().backward()
    per_expert = module.weight.grad.flatten(1).norm(dim=1)
    assert (per_expert > 0).all() and len(set(per_expert.tolist())) == 4, "no two experts learn the same"
    nn.init.normal_(module.weight)
    module(torch.randn(3, 4, 9, 9)).square().sum().backward()
    assert module.gate.weight.grad.abs().sum() > 0


def test_experts_refuse():
    with pytest.raises(ValueError, match="num_experts is 0"):
        ConditionalConv2d(4, 4, 3, num_experts=0)
    with pytest.raises(ValueError, match="unknown gating"):
        ConditionalConv2d(4, 4, 3, gating="hard")
    for wrong in (nn.Linear(2, 2), nn.Conv2d(2, 2, 3, padding=1, padding_mode="circular")):
        with pytest.raises(ValueError, match="cannot have experts"):
            ConditionalConv2d.from_conv(wrong)
    with pytest.raises(ValueError, match="time_channels is None"):
        ConditionalConv2d(4, 4, 3)(torch.randn(1, 4, 8, 8), torch.randn(1, 5))


# ---- assembly


def _output(unet, make_inputs, name="sd"):
    x, kwargs = make_inputs(name, 2, 16)
    with torch.no_grad():
        return unet(x, 500, **kwargs).sample


def _by_hand(unet, removed):
    """A copy of a UNet whose units are bypassed by forward hooks: resnets of the up path lose their skip."""
    unet = copy.deepcopy(unet)

    def bypass(module, args, kwargs, output):
        states = args[0] if args else kwargs["hidden_states"]
        if isinstance(output, tuple):
            return (states,)
        return states[:, : output.shape[1]] if states.ndim == 4 else states

    for name in removed:
        unet.get_submodule(name).register_forward_hook(bypass, with_kwargs=True)
    return unet


REMOVALS = {
    "one attention": ("sd", ["mid_block.attentions.0"], False),
    "a skip": ("sd", ["up_blocks.1.resnets.1"], False),
    "attentions of a block": ("sd", ["down_blocks.1.attentions.0", "down_blocks.1.attentions.1"], True),
    "the middle": ("sd", ["mid_block.resnets.0", "mid_block.resnets.1", "mid_block.attentions.0"], True),
    "a layer up and down": (
        "sd",
        ["down_blocks.1.resnets.1", "down_blocks.1.attentions.1", "up_blocks.1.resnets.1", "up_blocks.1.attentions.1"],
        True,
    ),
    "layers that do not match": ("sd", ["down_blocks.1.resnets.1", "down_blocks.1.attentions.1"], False),
    "blocks of transformers": (
        "sdxl",
        [
            *(f"down_blocks.2.attentions.{j}.transformer_blocks.1" for j in range(2)),
            *(f"up_blocks.0.attentions.{j}.transformer_blocks.0" for j in range(3)),
            "mid_block.attentions.0.transformer_blocks.1",
        ],
        True,
    ),
    "some blocks of transformers": ("sdxl", ["mid_block.attentions.0.transformer_blocks.1"], False),
}


@pytest.mark.parametrize("case", REMOVALS)
def test_assembled_is_the_original_with_units_bypassed(make_unet, make_inputs, tmp_path, case):
    """Same outputs, as many parameters less as announced, and the same after a reload."""
    name, removed, plain = REMOVALS[case]
    unet = make_unet(name)
    units = removable_units(unet)
    before = {key: value.clone() for key, value in unet.state_dict().items()}
    smaller = assemble_unet(unet, [unit for unit in units if unit not in removed])
    assert type(smaller) is (UNet2DConditionModel if plain else AssembledUNet)
    assert unet.num_parameters() - smaller.num_parameters() == sum(units[unit] for unit in removed)
    expected = _output(_by_hand(unet, removed), make_inputs, name)
    assert torch.equal(_output(smaller, make_inputs, name), expected)
    assert not torch.allclose(expected, _output(unet, make_inputs, name), atol=1e-4)
    smaller.save_pretrained(tmp_path)
    assert torch.equal(_output(type(smaller).from_pretrained(tmp_path), make_inputs, name), expected)
    assert all(torch.equal(value, before[key]) for key, value in unet.state_dict().items())
    with torch.no_grad():
        next(smaller.parameters()).add_(1)
    assert all(torch.equal(value, before[key]) for key, value in unet.state_dict().items()), "weights are copies"


def test_units_that_change_shapes_stay(make_unet):
    units = removable_units(make_unet())
    assert "down_blocks.1.resnets.0" not in units and "down_blocks.1.resnets.1" in units, "8 to 16 channels"
    assert "up_blocks.2.resnets.0" not in units and "up_blocks.1.resnets.0" in units, "16 to 8 channels"
    assert sum("transformer_blocks" in name for name in removable_units(make_unet("sdxl"))) == 12


def test_skips_of_a_stage():
    """Two layers down, three up; the block after the removal must pop what it popped with the layer bypassed."""
    assert joins_alike(2, [0], [0, 2]) and joins_alike(2, [0], [1, 2]) and joins_alike(2, [0, 1], [0, 1, 2])
    assert not joins_alike(2, [0], [0, 1, 2]) and not joins_alike(2, [], [2]) and not joins_alike(3, [1, 2], [1, 2, 3])


def test_an_assembled_unet_can_be_cut_again_and_get_experts(make_unet, make_inputs, tmp_path):
    unet = make_unet()
    first = ["mid_block.attentions.0"]
    names = ["up_blocks.1.resnets.0.conv1", "up_blocks.2.resnets.2.conv2"]
    keep = [unit for unit in removable_units(unet) if unit not in first]
    once = assemble_unet(unet, keep, conditional=names, num_experts=3)
    torch.testing.assert_close(
        _output(once, make_inputs), _output(assemble_unet(unet, keep), make_inputs), atol=1e-5, rtol=0
    )
    assert once.get_submodule(names[0]).weight.shape[0] == 3
    left = removable_units(once)
    assert set(left) == set(keep)
    twice = assemble_unet(once, [unit for unit in left if unit != "up_blocks.1.resnets.1"])
    assert twice.config.removed == [*first, "up_blocks.1.resnets.1"] and twice.config.conditional == names
    twice.save_pretrained(tmp_path)
    assert torch.equal(_output(AssembledUNet.from_pretrained(tmp_path), make_inputs), _output(twice, make_inputs))
    with pytest.raises(ValueError, match="3 experts"):
        twice.add_experts(["conv_in"], 2)
    with pytest.raises(ValueError, match="unknown convolution"):
        twice.add_experts(["conv_inn"], 3)


def test_assembly_refuses(make_unet):
    unet = make_unet()
    units = list(removable_units(unet))
    with pytest.raises(ValueError, match="nothing to leave out"):
        assemble_unet(unet, units)
    with pytest.raises(ValueError, match="Did you mean 'mid_block.resnets.0'"):
        assemble_unet(unet, ["mid_block.resnet.0"])
    with pytest.raises(TypeError, match="got Linear"):
        removable_units(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="unknown unit"):
        AssembledUNet(**{**_config(unet), "removed": ["conv_in"]})
    with pytest.raises(ValueError, match="keep_ratio is 0"):
        units_to_keep(dict.fromkeys(units, 1.0), 0)


def _config(unet):
    return {key: value for key, value in unet.config.items() if not key.startswith("_")}


FRESH = """
import json, sys
import diffusers_ext
from diffusers import DiffusionPipeline
from diffusers_ext import zoo
pipe = DiffusionPipeline.from_pretrained(sys.argv[1])
pipe.set_progress_bar_config(disable=True)
picture = zoo.generate(pipe, ["a red circle"], num_inference_steps=2)
print(json.dumps([type(pipe.unet).__name__, picture.double().sum().item(), picture.double().std().item()]))
"""


def test_a_pipeline_with_an_assembled_unet_reloads_in_a_fresh_process(shapes_unet, tmp_path):
    unet = shapes_unet.unet
    try:
        shapes_unet.unet = assemble_unet(unet, [n for n in removable_units(unet) if n != "mid_block.resnets.1"])
        shapes_unet.save_pretrained(tmp_path)
        picture = zoo.generate(shapes_unet, ["a red circle"], num_inference_steps=2)
    finally:
        shapes_unet.unet = unet
    command = [sys.executable, "-c", FRESH, str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True)
    kind, total, deviation = json.loads(result.stdout.splitlines()[-1])
    assert kind == "AssembledUNet"
    assert (total, deviation) == (picture.double().sum().item(), picture.double().std().item())


# ---- scores


def test_sensitivity_is_the_rise_of_the_error(make_unet, make_inputs):
    unet = make_unet()
    x, kwargs = make_inputs("sd", 4, 16)
    batches = calibration_batches(DDIMScheduler(), x, kwargs["encoder_hidden_states"], batch_size=3)
    assert [len(target) for _, target in batches] == [3, 1]
    plain = copy.deepcopy(unet)
    names = ["mid_block.resnets.0", "up_blocks.1.attentions.1", "up_blocks.0.resnets.2"]
    scores = unit_sensitivity(unet, batches, names)
    assert list(scores) == names
    for name in names:
        rows = []
        for model in (_by_hand(plain, [name]), plain):
            with torch.no_grad():
                errors = torch.cat([(model(**given).sample - target) ** 2 for given, target in batches])
            rows.append(errors.mean().item())
        assert scores[name] == pytest.approx(rows[0] - rows[1], abs=1e-6)
    assert torch.equal(_output(unet, make_inputs), _output(plain, make_inputs))
    assert dict(_bypasses(unet)).keys() == dict(_bypasses(plain)).keys()
    with pytest.raises(ValueError, match="batches is empty"):
        unit_sensitivity(unet, [])
    with pytest.raises(ValueError, match="unknown unit"):
        unit_sensitivity(unet, batches, ["conv_in"])


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_calibration_targets_are_what_a_perfect_model_gives(prediction):
    """The target and the noisy latents together give the latents back, at timesteps over the whole schedule."""
    scheduler = DDIMScheduler(prediction_type=prediction, clip_sample=False)
    latents = torch.randn(10, 4, 8, 8)
    batches = calibration_batches(scheduler, latents, torch.zeros(10, 5, 8), seed=3)
    times = torch.cat([given["timestep"] for given, _ in batches])
    assert sorted(times.tolist()) == [50 + 100 * i for i in range(10)]
    noisy, target = torch.cat([g["sample"] for g, _ in batches]), torch.cat([t for _, t in batches])
    for x0, x, out, t in zip(latents, noisy, target, times):
        scheduler.set_timesteps(1000)
        step = scheduler.step(out[None], int(t), x[None])
        torch.testing.assert_close(step.pred_original_sample[0], x0, atol=1e-4, rtol=1e-4)


def test_the_most_sensitive_units_of_each_block_stay():
    scores = {"mid_block.resnets.0": 1.0, "mid_block.attentions.0": 3.0, "mid_block.resnets.1": 2.0}
    scores |= {"up_blocks.0.resnets.0": 0.1, "up_blocks.0.attentions.0.transformer_blocks.1": 0.2}
    assert units_to_keep(scores, 0.3) == ["mid_block.attentions.0", "up_blocks.0.attentions.0.transformer_blocks.1"]
    assert units_to_keep(scores, 0.5) == [*list(scores)[1:3], "up_blocks.0.attentions.0.transformer_blocks.1"]
    assert units_to_keep(scores, 1) == list(scores)


def test_layers_to_keep_give_a_plain_unet(make_unet, make_inputs):
    """BK-SDM's cut: one layer per down block. The cheapest of the ways that keep the shapes is taken."""
    unet = make_unet()
    units = removable_units(unet)
    scores = dict.fromkeys(units, 1.0) | {"up_blocks.1.resnets.1": 5.0}
    keep = layers_to_keep(unet, scores, 1)
    smaller = assemble_unet(unet, keep)
    assert type(smaller) is UNet2DConditionModel and smaller.config.layers_per_block == [1, 1, 1]
    assert "up_blocks.1.resnets.1" in keep and "up_blocks.1.resnets.0" not in keep
    removed = [name for name in units if name not in keep]
    assert torch.equal(_output(smaller, make_inputs), _output(_by_hand(unet, removed), make_inputs))
    with pytest.raises(ValueError, match="cannot be cut to 3 layers"):
        layers_to_keep(unet, scores, 3)


# ---- distillation


def test_loss_is_task_output_and_features(make_unet, make_inputs):
    teacher = make_unet()
    student = assemble_unet(teacher, [n for n in removable_units(teacher) if n != "mid_block.resnets.0"])
    student.requires_grad_(True)
    x, kwargs = make_inputs("sd", 2, 16)
    target = torch.randn_like(x)
    outputs = []
    for model in (teacher, student):
        found = []
        blocks = [*model.down_blocks, model.mid_block, *model.up_blocks]
        handles = [
            b.register_forward_hook(lambda _, __, o, f=found: f.append(o[0] if isinstance(o, tuple) else o))
            for b in blocks
        ]
        outputs.append((model(x, 500, **kwargs).sample, found))
        for handle in handles:
            handle.remove()
    (eps_t, f_t), (eps_s, f_s) = outputs
    features = sum((a - b).square().mean() for a, b in zip(f_t, f_s))
    expected = (eps_s - target).square().mean() + 2 * (eps_s - eps_t).square().mean() + 3 * features
    loss = AssemblyDistillation(teacher, student, 2.0, 3.0)(target, x, 500, **kwargs)
    torch.testing.assert_close(loss, expected)
    loss.backward()
    assert student.conv_in.weight.grad is not None and teacher.conv_in.weight.grad is None


def _example(repository):
    spec = importlib.util.spec_from_file_location("assemble_unet_example", repository / "examples/assemble_unet.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    return script


def test_example_assembles_distils_and_saves(repository, tmp_path):
    """A few steps with experts: the error falls, and what is saved is what was measured."""
    script = _example(repository)
    options = {"steps": 12, "batch": 8, "images": 64, "calibration": 8, "experts": 2, "lr": 2e-3}
    figures = script.main(["--work", str(tmp_path), *(f"--{name}={value}" for name, value in options.items())])
    whole, small = figures["parameters"]
    assert small < 0.9 * whole and figures["removed"]
    assert figures["error of the original"] < figures["error after distillation"] < figures["error after removal"]
    unet = AssembledUNet.from_pretrained(tmp_path / "unet")
    assert unet.config.removed == figures["removed"] and unet.config.conditional
    batches = script.calibration(zoo.load(script.BASE), 8)
    assert prediction_error(unet, batches) == pytest.approx(figures["error after distillation"], rel=1e-5)


@pytest.mark.slow
def test_300_steps_close_more_than_half_of_the_gap(repository, tmp_path):
    figures = _example(repository).main(["--work", str(tmp_path), "--steps", "300"])
    assert figures["share of the gap closed"] > 0.5


# ---- several UNets


def test_points_are_fractions_of_the_timesteps():
    points = [(0, "a"), (0.4, "b"), (0.9, "c")]
    assert [model_at(t, 1000, points) for t in (999, 600, 599, 100, 99, 0)] == ["a", "a", "b", "b", "c", "c"]


def _switch(make_unet, points=((0, "a"), (0.4, "b"))):
    unet = make_unet()
    light = assemble_unet(unet, [n for n in removable_units(unet) if n != "up_blocks.1.resnets.1"])
    return unet, light, MultiUNetSwitch({"a": unet, "b": light}, points)


def test_one_model_under_both_keys_changes_nothing(make_unet, run_loop):
    unet = make_unet()
    plain = run_loop(unet)
    assert torch.equal(run_loop(MultiUNetSwitch({"a": unet, "b": unet}, [(0, "a"), (0.5, "b")])), plain)


def test_a_switch_is_a_split_of_the_steps(make_unet, run_loop, make_inputs):
    unet, light, switch = _switch(make_unet)
    scheduler = DDIMScheduler()
    scheduler.set_timesteps(6)
    x, kwargs = make_inputs("sd", 2, 16)
    with torch.no_grad():
        for t in scheduler.timesteps:
            x = x + 0.1 * (unet if t >= 600 else light)(x, t, **kwargs).sample
    assert torch.equal(run_loop(switch), x)
    assert not torch.equal(run_loop(unet), x) and not torch.equal(run_loop(light), x)


def test_a_switch_stands_for_a_unet(make_unet):
    unet, _, switch = _switch(make_unet)
    assert switch.config is unet.config and switch.add_embedding is getattr(unet, "add_embedding", None)
    assert (
        switch.dtype == torch.float32
        and switch.device.type == "cpu"
        and switch.to(torch.bfloat16).dtype == torch.bfloat16
    )
    sdxl = make_unet("sdxl")
    assert MultiUNetSwitch({"a": sdxl}, [(0, "a")]).add_embedding is sdxl.add_embedding


def test_a_switch_in_a_pipeline_and_saved(shapes_unet, tmp_path):
    unet = shapes_unet.unet
    light = assemble_unet(unet, [n for n in removable_units(unet) if n != "mid_block.attentions.0"])
    try:
        pictures = {}
        for key, model in (("full", unet), ("light", light)):
            shapes_unet.unet = MultiUNetSwitch({"full": unet, "light": light}, [(0, key)])
            pictures[key] = zoo.generate(shapes_unet, ["a red circle"], num_inference_steps=3)
            shapes_unet.unet = model
            assert torch.equal(zoo.generate(shapes_unet, ["a red circle"], num_inference_steps=3), pictures[key])
        shapes_unet.unet = MultiUNetSwitch({"full": unet, "light": light}, [(0, "full"), (0.5, "light")])
        both = zoo.generate(shapes_unet, ["a red circle"], num_inference_steps=3)
        shapes_unet.unet.save_pretrained(tmp_path / "unet")
        shapes_unet.unet = MultiUNetSwitch.from_pretrained(tmp_path, subfolder="unet")
        assert torch.equal(zoo.generate(shapes_unet, ["a red circle"], num_inference_steps=3), both)
        assert type(shapes_unet.unet.unets["light"]) is AssembledUNet
    finally:
        shapes_unet.unet = unet
    assert not torch.equal(both, pictures["full"]) and not torch.equal(both, pictures["light"])


def test_a_pipeline_with_a_switch_reloads(shapes_unet, tmp_path):
    from diffusers import DiffusionPipeline

    unet = shapes_unet.unet
    try:
        shapes_unet.unet = MultiUNetSwitch({"a": unet, "b": unet}, [(0, "a"), (0.5, "b")])
        shapes_unet.save_pretrained(tmp_path)
        expected = zoo.generate(shapes_unet, ["a red circle"], num_inference_steps=2)
    finally:
        shapes_unet.unet = unet
    pipe = DiffusionPipeline.from_pretrained(tmp_path)
    pipe.set_progress_bar_config(disable=True)
    assert isinstance(pipe.unet, MultiUNetSwitch)
    assert torch.equal(zoo.generate(pipe, ["a red circle"], num_inference_steps=2), expected)


def test_switch_refuses(make_unet, tmp_path):
    unet = make_unet()
    with pytest.raises(ValueError, match="unets is empty"):
        MultiUNetSwitch({}, [(0, "a")])
    for points in ([], [(0.1, "a")], [(0, "a"), (0.5, "a"), (0.5, "a")], [(0, "a"), (1.5, "a")]):
        with pytest.raises(ValueError, match="switch_points is"):
            MultiUNetSwitch({"a": unet}, points)
    with pytest.raises(ValueError, match="unknown model 'b'"):
        MultiUNetSwitch({"a": unet}, [(0, "b")])
    with pytest.raises(ValueError, match="in_channels of 'b' is 9"):
        MultiUNetSwitch({"a": unet, "b": make_unet("inpaint")}, [(0, "a")])
    switch = MultiUNetSwitch({"a": unet, "b": unet}, [(0, "a"), (0.5, "b")])
    with pytest.raises(ValueError, match="split it"):
        switch(torch.randn(2, 4, 16, 16), torch.tensor([900, 100]), torch.randn(2, 5, 8))
    with pytest.raises(ValueError, match="holds no switch.json"):
        MultiUNetSwitch.from_pretrained(tmp_path)
