#!/usr/bin/env python3
"""Train a UniCon adapter for shapes-unet: image and depth, or image and outlines, drawn side by side.

    python examples/train_adapters/unicon.py depth --work unicon_work
    python examples/train_adapters/unicon.py edge --work unicon_work

Goes on from its checkpoint when started again.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from diffusers_ext import UniConAdapter, zoo
from diffusers_ext.prediction import expand, from_x0
from diffusers_ext.training.denoising import UNetTask, task_of
from diffusers_ext.training.fitting import Budget, Draws, begin, fit, script_parser
from diffusers_ext.training.shapes import encode_images, shapes_set
from diffusers_ext.zoo import conditions


BASE = "shapes-unet"
BUDGET = Budget(steps=1600, batch=8, lr=4e-3)
RANK = 16
# What a condition shows is mostly left out of the captions, or there would be nothing to learn.
CAPTION_DROP = 0.6
PROMPT_DROP = 0.1
# Shares of the pairs with y and with x almost free of noise, as control and estimation see them all along.
CLEAN_Y, CLEAN_X, CLEAN = 0.35, 0.25, 60
CONDITIONS = {"depth": conditions.depth, "edge": conditions.outlines}


def timesteps(task: UNetTask, draws: Draws) -> torch.Tensor:
    """t_x and t_y `[2, n]`, independent of each other."""
    t = torch.stack([task.levels(draws), task.levels(draws)])
    kind, clean = draws.uniform(), (CLEAN * draws.uniform(2)).long().T
    chosen = torch.stack([(kind >= CLEAN_Y) & (kind < CLEAN_Y + CLEAN_X), kind < CLEAN_Y])
    return torch.where(chosen, clean, t)


def said(rows: torch.Tensor, draws: Draws) -> torch.Tensor:
    """Which text x and y read `[2, n]`: 0, the empty prompt, for x where r < 2p and for y where p < r < 3p."""
    r, p = draws.uniform(), PROMPT_DROP
    return torch.where(torch.stack([r < 2 * p, (r > p) & (r < 3 * p)]), 0, rows + 1)


def train(work: Path, budget: Budget, images: int, name: str, init: Path | None = None) -> Path:
    """Train an adapter on one kind of condition and write its file."""
    pipe = zoo.load(BASE)
    pipe.unet.requires_grad_(False)
    data, task = shapes_set(pipe, images, drop=CAPTION_DROP), task_of(pipe)
    pictures = CONDITIONS[name](data.scenes).expand(-1, 3, -1, -1) * 2 - 1
    latents = torch.stack([data.latents, encode_images(pipe, pictures)], 1)
    if init is None:
        adapter = UniConAdapter.for_model(pipe, model_name=name, base=BASE, rank=RANK)
    else:
        adapter = UniConAdapter.from_pretrained(init, torch_dtype=torch.float32)
    adapter.attach(pipe.unet)

    def loss(rows: torch.Tensor, draws: Draws) -> torch.Tensor:
        half = len(rows)
        z, t = latents[rows].transpose(0, 1).flatten(0, 1), timesteps(task, draws).flatten()
        noise = draws.normal(2, *z.shape[1:]).transpose(0, 1).flatten(0, 1)
        text = {"clip": data.text["clip"][said(rows, draws).flatten()]}
        alpha, sigma = (expand(v, z) for v in task.noise_levels(t))
        x = alpha * z + sigma * noise
        with adapter.paired((slice(half), slice(half, None), 1.0, 1.0)):
            error = task.predict(pipe.unet, x, t, text) - from_x0(z, x, alpha, sigma, task.prediction)
        return (task.weight(alpha, sigma) * error.square()).mean()

    fit(name, adapter, loss, len(data), budget, work)
    adapter.detach()
    return adapter.half().save_file(work / f"unicon-{name}-{BASE}.safetensors")


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = script_parser(__doc__, "unicon_work", 4096, init="start from this file")
    parser.add_argument("condition", choices=list(CONDITIONS))
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    """Entry point of the command line."""
    options = _arguments(argv)
    budget = begin(BUDGET, options)
    print("wrote", train(options.work, budget, options.images, options.condition, options.init))


if __name__ == "__main__":
    main()
