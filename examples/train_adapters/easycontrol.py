#!/usr/bin/env python3
"""Train an EasyControl adapter that lets the small Flux follow edges.

    python examples/train_adapters/easycontrol.py --work easycontrol_work

Goes on from the checkpoint when started again. The result is `<work>/easycontrol-edge-shapes-dit.safetensors`.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from diffusers_ext import EasyControlAdapter, zoo
from diffusers_ext.training.denoising import task_of
from diffusers_ext.training.fitting import Budget, Draws, begin, fit, script_parser
from diffusers_ext.training.shapes import denoising_loss, encode_images, shapes_set
from diffusers_ext.zoo.conditions import edges
from diffusers_ext.zoo.world import Scenes


BASE, RANK = "shapes-dit", 16
NAME = f"easycontrol-edge-{BASE}"
CAPTION_DROP = 0.6  # what a caption does not say has to be read from the edges
BUDGET = Budget(steps=1200, batch=16, lr=3e-3, ema=0.99)


def edge_pictures(scenes: Scenes) -> torch.Tensor:
    """White edges on black, `[n, 3, 64, 64]` in [-1, 1]."""
    return (edges(scenes.images) * 2 - 1).expand(-1, 3, -1, -1)


def train(work: Path, budget: Budget, images: int, init: Path | None = None) -> Path:
    """Train the adapter, from the weights of another one if given; returns its file."""
    pipe = zoo.load(BASE)
    pipe.transformer.requires_grad_(False)
    data, task = shapes_set(pipe, images, drop=CAPTION_DROP), task_of(pipe)
    conditions = encode_images(pipe, edge_pictures(data.scenes))
    adapter = EasyControlAdapter.for_model(pipe, rank=RANK, cond_size=64)
    if init is not None:
        adapter.load_state_dict(EasyControlAdapter.from_pretrained(init, torch_dtype=torch.float32).state_dict())
    # Nothing follows the last block, so its queries of the condition are never used.
    adapter.single_transformer_blocks[-1].attn.processor.q_loras.requires_grad_(False)

    def loss(rows: torch.Tensor, draws: Draws) -> torch.Tensor:
        adapter.set_latents(conditions[rows])
        return denoising_loss(task, pipe.transformer, data, rows, draws)

    with adapter.attach(pipe):
        fit(NAME, adapter, loss, len(data), budget, work)
    return adapter.half().save_file(work / f"{NAME}.safetensors")


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = script_parser(__doc__, "easycontrol_work", 8192, init="file of an adapter to start from")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    """Entry point of the command line."""
    options = _arguments(argv)
    budget = begin(BUDGET, options)
    print(train(options.work, budget, options.images, options.init))


if __name__ == "__main__":
    main()
