#!/usr/bin/env python3
"""Train VMix on the shapes world: three sliders for how a scene looks, on a frozen shapes-unet.

    python examples/train_adapters/vmix.py --work vmix_work

Captions say nothing about the look; the labels of each picture do. Stopped by Ctrl-C, the same command goes on.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from diffusers_ext import VMixAdapter, zoo
from diffusers_ext.adapters.vmix import aesthetic_rows
from diffusers_ext.training.denoising import task_of
from diffusers_ext.training.fitting import Budget, Draws, begin, fit, script_parser
from diffusers_ext.training.shapes import TRAIN_SEED, ShapesSet, denoising_loss, shapes_set
from diffusers_ext.zoo import looks


BUDGET = Budget(steps=700, batch=32, lr=3e-3)
LABELS_DROPPED = 0.1


class Trained(nn.Module):
    """The adapter, and the LoRA that takes up what sets the training pictures apart from the model's; not kept."""

    def __init__(self, adapter: VMixAdapter, unet: nn.Module, lora_rank: int):
        super().__init__()
        self.adapter = adapter
        unet.requires_grad_(False)
        if lora_rank:
            from peft import LoraConfig

            unet.add_adapter(LoraConfig(r=lora_rank, target_modules=["to_q", "to_k", "to_v", "to_out.0"]))
        self.helper = nn.ParameterList(p for p in unet.parameters() if p.requires_grad)


def vmix_loss(pipe, adapter: VMixAdapter, data: ShapesSet, levels: torch.Tensor) -> Callable:
    """Denoising loss with the labels of the pictures as condition; 10 % of the pictures lose theirs."""
    task = task_of(pipe)

    def loss(rows: torch.Tensor, draws: Draws) -> torch.Tensor:
        known = draws.uniform(1) >= LABELS_DROPPED
        adapter.set_condition(aesthetic_rows(adapter.aes_emb, levels[rows].to(known.device) * known))
        return denoising_loss(task, pipe.unet, data, rows, draws)

    return loss


def train(work: Path, budget: Budget, images: int, lora_rank: int = 0) -> Path:
    """Train, and write `vmix-shapes-unet.safetensors`."""
    pipe = zoo.load("shapes-unet")
    levels = looks.levels(images, budget.seed)
    data = shapes_set(
        pipe, images, TRAIN_SEED, lambda pictures, start: looks.show(pictures, levels[start : start + len(pictures)])
    )
    adapter = VMixAdapter.for_model(pipe, looks.LABELS)
    trained = Trained(adapter, pipe.unet, lora_rank)
    pipe.unet.to(budget.device)
    with adapter.attach(pipe.unet):
        fit("vmix", trained, vmix_loss(pipe, adapter, data, levels), images, budget, work, drop="helper")
    return adapter.half().save_file(work / "vmix-shapes-unet.safetensors")


def main(argv: list[str] | None = None) -> None:
    """Entry point of the command line."""
    parser = script_parser(__doc__, "vmix_work", 4096, devices=True)
    parser.add_argument("--lora-rank", type=int, default=0, help="of a LoRA that is trained along; 0 for none")
    options = parser.parse_args(argv)
    budget = begin(BUDGET, options)
    print(train(options.work, budget, options.images, options.lora_rank))


if __name__ == "__main__":
    main()
