#!/usr/bin/env python3
"""Train an EasyControl adapter that lets the small Flux follow edges, or take the colour of an object from a picture.

    python examples/train_adapters/easycontrol.py --work easycontrol_work
    python examples/train_adapters/easycontrol.py --kind colour --work easycontrol_work

Goes on from the checkpoint when started again. The result is `<work>/easycontrol-<kind>-shapes-dit.safetensors`.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F

from diffusers_ext import EasyControlAdapter, zoo
from diffusers_ext.training.denoising import task_of
from diffusers_ext.training.fitting import Budget, Draws, begin, fit, script_parser
from diffusers_ext.training.shapes import ShapesSet, denoising_loss, encode_images, encode_text, shapes_set
from diffusers_ext.zoo.conditions import colourless, edges, subjects


BASE, RANK = "shapes-dit", 16
CAPTION_DROP = 0.6  # what a caption does not say has to be read from the edges
FOCUS = 5.0  # further weight of the object whose colour is learnt: it is a tenth of the picture
BUDGET = Budget(steps=1200, batch=16, lr=3e-3, ema=0.99)
KINDS = {
    "edge": {"condition_type": "spatial", "cond_size": 64},
    "colour": {"condition_type": "subject", "cond_size": 32},
}


def shown(kind: str, pipe, images: int) -> tuple[ShapesSet, torch.Tensor, torch.Tensor]:
    """Pictures with captions, their conditions, and weights of the loss.

    Conditions are edges, or the first object by itself: then no caption tells its colour.
    """
    data = shapes_set(pipe, images, drop=CAPTION_DROP)
    scenes = data.scenes
    if kind == "edge":
        return data, (edges(scenes.images) * 2 - 1).expand(-1, 3, -1, -1), torch.ones(images, 1, 1, 1)
    text = encode_text(pipe, ["", *colourless(scenes.captions, scenes.specs)])
    return replace(data, text=text), subjects(scenes.specs), 1 + FOCUS * F.avg_pool2d(scenes.masks[:, :1], 4)


def train(work: Path, budget: Budget, images: int, init: Path | None = None, kind: str = "edge") -> Path:
    """Train the adapter, from the weights of another one if given; returns its file."""
    pipe, name = zoo.load(BASE), f"easycontrol-{kind}-{BASE}"
    pipe.transformer.requires_grad_(False)
    (data, pictures, weights), task = shown(kind, pipe, images), task_of(pipe)
    conditions = encode_images(pipe, pictures)
    adapter = EasyControlAdapter.for_model(pipe, rank=RANK, **KINDS[kind])
    if init is not None:
        adapter.load_state_dict(EasyControlAdapter.from_pretrained(init, torch_dtype=torch.float32).state_dict())
    # Nothing follows the last block, so its queries of the condition are never used.
    adapter.single_transformer_blocks[-1].attn.processor.q_loras.requires_grad_(False)

    def loss(rows: torch.Tensor, draws: Draws) -> torch.Tensor:
        adapter.set_latents(conditions[rows])
        return denoising_loss(task, pipe.transformer, data, rows, draws, weights[rows])

    with adapter.attach(pipe):
        fit(name, adapter, loss, len(data), budget, work)
    return adapter.half().save_file(work / f"{name}.safetensors")


def main(argv: list[str] | None = None) -> None:
    """Entry point of the command line."""
    parser = script_parser(__doc__, "easycontrol_work", 8192, init="file of an adapter to start from")
    parser.add_argument("--kind", choices=KINDS, default="edge", help="of the condition, edge by default")
    options = parser.parse_args(argv)
    print(train(options.work, begin(BUDGET, options), options.images, options.init, options.kind))


if __name__ == "__main__":
    main()
