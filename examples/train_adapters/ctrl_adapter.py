#!/usr/bin/env python3
"""Train an edge ControlNet for one small model, then a Ctrl-Adapter that lets it drive another one.

    python examples/train_adapters/ctrl_adapter.py controlnet --work ctrl_work
    python examples/train_adapters/ctrl_adapter.py shapes-unet --work ctrl_work
    python examples/train_adapters/ctrl_adapter.py once-shapes-unet --work ctrl_work
    python examples/train_adapters/ctrl_adapter.py shapes-dit --work ctrl_work

Every stage goes on from its checkpoint when started again.
"""

from __future__ import annotations

import argparse
import functools
import inspect
import json
from pathlib import Path

import torch
from diffusers import ControlNetModel
from safetensors.torch import save_file
from torch import nn

from diffusers_ext import CtrlAdapterControl, CtrlAdapterModel, zoo
from diffusers_ext.training.denoising import task_of
from diffusers_ext.training.fitting import Budget, Draws, begin, fit, script_parser
from diffusers_ext.training.shapes import ShapesSet, denoising_loss, encode_text, shapes_set
from diffusers_ext.zoo.conditions import edges


SOURCE, CONTROLNET = "shapes-unet-eps", "controlnet-edges-shapes-unet-eps"
BUDGETS = {
    "controlnet": Budget(steps=800, batch=16, lr=2e-3),
    "shapes-unet": Budget(steps=200, batch=16, lr=2e-3),
    "once-shapes-unet": Budget(steps=268, batch=16, lr=2e-3),
    "shapes-dit": Budget(steps=280, batch=16, lr=8e-3),
}
# Share of phrases that captions leave out; the adapter is to learn places, sizes and grounds from the edges.
CAPTION_DROP = {"controlnet": 0.15, "shapes-unet": 0.6, "once-shapes-unet": 0.6, "shapes-dit": 0.7}
# Sizes of the small models; attention heads of 16 channels.
SMALL = {"controlnet_sample_size": 16, "transformer_dim": 64, "attention_head_dim": 16, "norm_groups": 8}
ONCE = {"skip_conv_in": True, "fixed_controlnet_timestep": 500, "fixed_adapter_timestep": 500}
# Where the adapters are. Group B has the size of the transformer's tokens, so nothing is averaged.
LOCATIONS = {"shapes-unet": "AB", "once-shapes-unet": "AB", "shapes-dit": "B"}
# A transformer has other noise levels: its ControlNet sees the edges only, always at the same timestep.
KINDS = {
    "shapes-unet": {"num_adapters_per_location": 3},
    "once-shapes-unet": ONCE,
    "shapes-dit": {"num_adapters_per_location": 1, **ONCE},
}
# Share of steps that are moved to high noise levels of the flow, where places and sizes are decided.
HIGH = {"shapes-dit": 0.4}
# What fresh weights add to a transformer's tokens, in every block, disturbs it most.
START_SMALL = ("shapes-dit",)


def small_controlnet(unet: nn.Module) -> ControlNetModel:
    """A ControlNet that starts as the encoder of a UNet, without the attention of its middle block."""
    known = inspect.signature(ControlNetModel.__init__).parameters
    config = {name: unet.config[name] for name in known if name in unet.config}
    config |= {"mid_block_type": "UNetMidBlock2D", "conditioning_embedding_out_channels": (16, 32, 64)}
    model = ControlNetModel(**config)
    shared = {name: value for name, value in unet.state_dict().items() if name in model.state_dict()}
    model.load_state_dict(shared, strict=False)
    # By default the last layer of the condition's encoder is zero and the others shrink what passes: nothing would be
    # learnt for thousands of steps. The zeros behind the blocks are enough to start as the plain UNet.
    for layer in model.controlnet_cond_embedding.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight)
            nn.init.zeros_(layer.bias)
    return model


class Controlled(nn.Module):
    """A UNet with the residuals of a ControlNet, called as the UNet is."""

    def __init__(self, unet: nn.Module, controlnet: nn.Module):
        super().__init__()
        self.unet, self.controlnet = unet, controlnet

    def forward(self, x: torch.Tensor, t: torch.Tensor, text: torch.Tensor, condition: torch.Tensor):
        down, mid = self.controlnet(x, t, text, condition, return_dict=False)
        return self.unet(x, t, text, down_block_additional_residuals=down, mid_block_additional_residual=mid)


def controlnet(work: Path, budget: Budget, images: int, drop: float, init: Path | None) -> Path:
    """Train the ControlNet, from its beginning or from a file, and write its file."""
    pipe = zoo.load(SOURCE)
    pipe.unet.requires_grad_(False).to(memory_format=torch.channels_last)
    data = shapes_set(pipe, images, drop=drop)
    hints = edges(data.scenes.images).bool()
    model, task = small_controlnet(pipe.unet) if init is None else zoo.load_controlnet(init), task_of(pipe)
    model.to(memory_format=torch.channels_last)
    whole = Controlled(pipe.unet, model)

    def loss(rows: torch.Tensor, draws: Draws) -> torch.Tensor:
        condition = hints[rows].float().expand(-1, 3, -1, -1)
        return denoising_loss(task, whole, data, rows, draws, condition=condition)

    model = fit("controlnet", model, loss, len(data), budget, work).half()
    config = {key: value for key, value in model.config.items() if not key.startswith("_")}
    path = work / f"{CONTROLNET}.safetensors"
    weights = {name: value.contiguous() for name, value in model.state_dict().items()}
    save_file(weights, path, {"class": type(model).__name__, "config": json.dumps(config)})
    path.chmod(0o644)
    return path


def _controlnet_of(work: Path) -> ControlNetModel:
    """The ControlNet that was trained in this folder, else the shipped one."""
    path = work / f"{CONTROLNET}.safetensors"
    return zoo.load_controlnet(path if path.exists() else CONTROLNET).requires_grad_(False)


class ControlledTask:
    """A training task whose denoiser is drawn by the edges of its rows."""

    def __init__(self, task, adapter: CtrlAdapterModel, make_control, high: float = 0.0):
        self.task, self.adapter, self.make_control, self.high = task, adapter, make_control, high
        self.noise_levels, self.weight, self.prediction = task.noise_levels, task.weight, task.prediction

    def levels(self, draws: Draws) -> torch.Tensor:
        """Noise levels of the task; some of them, for a flow, drawn again from 0.45 to 0.99."""
        if not self.high:
            return self.task.levels(draws)
        return torch.where(draws.uniform() < self.high, 0.45 + 0.54 * draws.uniform(), self.task.levels(draws))

    def predict(self, model, x, level, text):
        """The denoiser's output, controlled."""
        self.adapter.control = self.make_control(text["source"])
        return self.task.predict(model, x, level, text)


def adapter(work: Path, budget: Budget, images: int, drop: float, name: str) -> Path:
    """Train the adapter for one backbone and write its file; ControlNet and backbone are frozen."""
    pipe, source, control = zoo.load(name.removeprefix("once-")), zoo.load(SOURCE), _controlnet_of(work)
    backbone = getattr(pipe, "unet", None) or pipe.transformer
    backbone.requires_grad_(False)
    data = shapes_set(pipe, images, drop=drop)
    said = {**data.text, "source": encode_text(source, ["", *data.scenes.captions])["clip"]}
    data = ShapesSet(data.scenes, data.latents, said)
    hints = edges(data.scenes.images).bool()
    torch.manual_seed(budget.seed)
    model = CtrlAdapterModel.for_model(pipe, control, LOCATIONS[name], **SMALL, **KINDS[name])
    if name in START_SMALL:
        model.start_small()
    model.attach(backbone)

    def loss(rows: torch.Tensor, draws: Draws) -> torch.Tensor:
        pictures = hints[rows].float().expand(-1, 3, -1, -1)
        control_of = functools.partial(CtrlAdapterControl, control, pictures)
        task = ControlledTask(task_of(pipe), model, control_of, HIGH.get(name, 0.0))
        return denoising_loss(task, backbone, data, rows, draws)

    fit(name, model, loss, len(data), budget, work)
    model.detach()
    return model.half().save_file(work / f"ctrl-adapter-{name}.safetensors")


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = script_parser(__doc__, "ctrl_work", 4096, init="controlnet: go on from this file")
    parser.add_argument("stage", choices=list(BUDGETS))
    parser.add_argument("--drop", type=float, help="share of phrases that captions leave out")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    """Entry point of the command line."""
    options = _arguments(argv)
    budget = begin(BUDGETS[options.stage], options)
    drop = CAPTION_DROP[options.stage] if options.drop is None else options.drop
    if options.stage == "controlnet":
        print("wrote", controlnet(options.work, budget, options.images, drop, options.init))
    else:
        print("wrote", adapter(options.work, budget, options.images, drop, options.stage))


if __name__ == "__main__":
    main()
