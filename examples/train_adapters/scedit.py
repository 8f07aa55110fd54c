#!/usr/bin/env python3
"""Train SCEdit tuners for shapes-unet: a style (SC-Tuner), and drawing by edges or by a segmentation (CSC-Tuner).

    python examples/train_adapters/scedit.py checkered --work scedit_work
    python examples/train_adapters/scedit.py edges --work scedit_work
    python examples/train_adapters/scedit.py segmentation --work scedit_work

Every stage goes on from its checkpoint when started again.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import nn

from diffusers_ext import CSCTuner, SCTuner, zoo
from diffusers_ext.training.denoising import task_of
from diffusers_ext.training.fitting import Budget, Draws, begin, fit, script_parser
from diffusers_ext.training.shapes import (
    TRAIN_SEED,
    ShapesSet,
    denoising_loss,
    encode_images,
    encode_text,
    shapes_set,
)
from diffusers_ext.zoo.conditions import edges, segmentation
from diffusers_ext.zoo.world import TEXTURES, Scenes


BASE = "shapes-unet"
BUDGETS = {
    "checkered": Budget(steps=3200, batch=16, lr=4e-3),
    "edges": Budget(steps=1600, batch=16, lr=4e-3),
    "segmentation": Budget(steps=1600, batch=16, lr=4e-3),
}
# What a condition shows is mostly left out of the captions, or there would be nothing to learn.
CAPTION_DROP = 0.6
CONDITIONS = {"edges": lambda scenes: edges(scenes.images), "segmentation": segmentation}
# The style's last layer is scaled by this at the end, so that a tuner of few steps is at full strength at scale 1.
STRENGTH = 1.7
SMALL = {"pre_hint_dim_ratio": 0.5, "pre_hint_out": 32}


def checkered(scenes: Scenes) -> Scenes:
    """The style: of these scenes those with a checkered ground, whose captions now name any texture."""
    rows = (scenes.specs[:, 1] == TEXTURES.index("checkered")).nonzero().flatten()
    captions = [scenes.captions[i].replace("checkered", TEXTURES[i % len(TEXTURES)]) for i in rows.tolist()]
    return Scenes(scenes.specs[rows], captions, scenes.images[rows], scenes.masks[rows])


def style(work: Path, budget: Budget, images: int, init: Path | None = None) -> Path:
    """Train an SC-Tuner on pictures in the style, whatever their captions say of it, and write its file."""
    pipe = zoo.load(BASE)
    pipe.unet.requires_grad_(False)
    scenes, task = checkered(zoo.scenes(images, TRAIN_SEED)), task_of(pipe)
    data = ShapesSet(scenes, encode_images(pipe, scenes.images), encode_text(pipe, ["", *scenes.captions]))
    tuner = SCTuner.for_model(pipe) if init is None else SCTuner.from_pretrained(init, torch_dtype=torch.float32)
    tuner.attach(pipe.unet)

    def loss(rows: torch.Tensor, draws: Draws) -> torch.Tensor:
        return denoising_loss(task, pipe.unet, data, rows, draws)

    fit("checkered", tuner, loss, len(data), budget, work)
    tuner.detach()
    with torch.no_grad():
        for parameter in (p for name, p in tuner.named_parameters() if ".ln2." in name):
            parameter.mul_(STRENGTH)
    return tuner.half().save_file(work / f"scedit-checkered-{BASE}.safetensors")


def condition(work: Path, budget: Budget, images: int, name: str) -> Path:
    """Train a CSC-Tuner on one kind of condition and write its file."""
    pipe = zoo.load(BASE)
    pipe.unet.requires_grad_(False)
    data, task = shapes_set(pipe, images, drop=CAPTION_DROP), task_of(pipe)
    pictures = CONDITIONS[name](data.scenes).half()
    tuner = CSCTuner.for_model(pipe, **SMALL)
    for layer in tuner.pre_hint_blocks:
        if isinstance(layer, nn.Conv2d):  # by default each layer shrinks what passes, and learning starts late
            nn.init.kaiming_normal_(layer.weight)
            nn.init.zeros_(layer.bias)
    tuner.attach(pipe.unet)

    def loss(rows: torch.Tensor, draws: Draws) -> torch.Tensor:
        tuner.set_condition(pictures[rows].float())
        return denoising_loss(task, pipe.unet, data, rows, draws)

    fit(name, tuner, loss, len(data), budget, work)
    tuner.detach()
    return tuner.half().save_file(work / f"csc-{name}-{BASE}.safetensors")


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = script_parser(__doc__, "scedit_work", 4096, init="checkered: start from this file")
    parser.add_argument("stage", choices=list(BUDGETS))
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    """Entry point of the command line."""
    options = _arguments(argv)
    budget = begin(BUDGETS[options.stage], options)
    if options.stage == "checkered":
        print("wrote", style(options.work, budget, options.images, options.init))
    else:
        print("wrote", condition(options.work, budget, options.images, options.stage))


if __name__ == "__main__":
    main()
