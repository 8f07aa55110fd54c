#!/usr/bin/env python3
"""Train an edge ControlNet for one small model, then the Ctrl-Adapter that lets it drive another one.

    python examples/train_adapters/ctrl_adapter.py controlnet --work ctrl_work
    python examples/train_adapters/ctrl_adapter.py adapter --work ctrl_work --controlnet ctrl_work/controlnet

Both stages go on from their checkpoint when started again.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from diffusers import ControlNetModel
from torch import nn

from diffusers_ext import zoo
from diffusers_ext.training.denoising import task_of
from diffusers_ext.training.fitting import Budget, Draws, fit
from diffusers_ext.training.shapes import denoising_loss, shapes_set
from diffusers_ext.zoo.conditions import edges


SOURCE = "shapes-unet-eps"
BUDGETS = {
    "controlnet": Budget(steps=1000, batch=16, lr=1e-3),
}


def small_controlnet(unet: nn.Module) -> ControlNetModel:
    """A ControlNet that starts as the encoder of a UNet, without the attention of its middle block."""
    names = ControlNetModel.__init__.__wrapped__.__code__.co_varnames
    config = {key: value for key, value in unet.config.items() if key in names and not key.startswith("_")}
    config |= {"mid_block_type": "UNetMidBlock2D", "conditioning_embedding_out_channels": (16, 32, 64)}
    model = ControlNetModel(**config)
    model.load_state_dict({k: v for k, v in unet.state_dict().items() if k in model.state_dict()}, strict=False)
    return model


class Controlled(nn.Module):
    """A UNet with the residuals of a ControlNet, called as the UNet is."""

    def __init__(self, unet: nn.Module, controlnet: nn.Module):
        super().__init__()
        self.unet, self.controlnet = unet, controlnet

    def forward(self, x: torch.Tensor, t: torch.Tensor, text: torch.Tensor, condition: torch.Tensor):
        down, mid = self.controlnet(x, t, text, condition, return_dict=False)
        return self.unet(x, t, text, down_block_additional_residuals=down, mid_block_additional_residual=mid)


def controlnet(work: Path, budget: Budget, images: int) -> None:
    """Train the ControlNet: a diffusers folder `controlnet`."""
    pipe = zoo.load(SOURCE)
    pipe.unet.requires_grad_(False).to(memory_format=torch.channels_last)
    data = shapes_set(pipe, images)
    hints = edges(data.scenes.images).bool()
    model, task = small_controlnet(pipe.unet).to(memory_format=torch.channels_last), task_of(pipe)
    whole = Controlled(pipe.unet, model)

    def loss(rows: torch.Tensor, draws: Draws) -> torch.Tensor:
        condition = hints[rows].float().expand(-1, 3, -1, -1)
        return denoising_loss(task, whole, data, rows, draws, condition=condition)

    fit("controlnet", model, loss, len(data), budget, work).half().save_pretrained(work / "controlnet")


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=list(BUDGETS))
    parser.add_argument("--work", type=Path, default=Path("ctrl_work"), help="working folder")
    parser.add_argument("--images", type=int, default=6144, help="size of the training set")
    for name, kind in (("steps", int), ("batch", int), ("lr", float), ("seed", int)):
        parser.add_argument(f"--{name}", type=kind, help="see diffusers_ext.training.fitting.Budget")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    """Entry point of the command line."""
    from dataclasses import replace

    options = _arguments(argv)
    given = {name: getattr(options, name) for name in ("steps", "batch", "lr", "seed") if getattr(options, name)}
    options.work.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    torch.manual_seed(options.seed or 0)
    controlnet(options.work, replace(BUDGETS[options.stage], **given), options.images)


if __name__ == "__main__":
    main()
