#!/usr/bin/env python3
"""Train VMix on the shapes world: three sliders for how a scene looks, on a frozen shapes-unet.

    python examples/train_adapters/vmix.py --work vmix_work

Captions say nothing about the look; the labels of each picture do. Stopped by Ctrl-C, the same command goes on.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from diffusers_ext import VMixAdapter, zoo
from diffusers_ext.adapters.vmix import aesthetic_rows
from diffusers_ext.prediction import expand, from_x0
from diffusers_ext.training.denoising import task_of
from diffusers_ext.training.fitting import Budget, Draws, begin, fit, script_parser
from diffusers_ext.training.shapes import ShapesSet, denoising_loss, encode_images, shapes_set
from diffusers_ext.zoo import looks


BUDGET = Budget(steps=1600, batch=16, lr=3e-3)
LABELS_DROPPED = 0.1
STRENGTH = 0.6  # of the values that are written: guidance of 3 makes up for the rest
# The look of a picture with each label. Sampling makes what is learnt as vivid brighter: a part of that is taken back.
SHOWN = torch.tensor([[1.12, 0.0, -0.2], [0.0, 1.05, 0.0], [0.0, 0.0, 0.9]])


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


def paper_loss(pipe, adapter: VMixAdapter, data: ShapesSet, shown: torch.Tensor, levels: torch.Tensor) -> Callable:
    """Denoising loss with the labels of the pictures as condition; 10 % of the pictures lose theirs."""
    task, data = task_of(pipe), replace(data, latents=shown)

    def loss(rows: torch.Tensor, draws: Draws) -> torch.Tensor:
        known = draws.uniform(1) >= LABELS_DROPPED
        adapter.set_condition(aesthetic_rows(adapter.aes_emb, levels[rows].to(known.device) * known))
        return denoising_loss(task, pipe.unet, data, rows, draws)

    return loss


def paired_loss(pipe, adapter: VMixAdapter, data: ShapesSet, shown: torch.Tensor, levels: torch.Tensor) -> Callable:
    """The same without the error that the plain model makes: a label is held to the difference that its look makes.

    Every scene gets the same noise twice, with its look and without. The plain model sees it without; what it
    answers, plus what the look changes in the right answer, is what the model with labels should say with the look.
    The error of the plain model is most of the paper's loss, and no fault of the labels. Without labels, there is no
    look, and nothing to change.
    """
    task, change = task_of(pipe), shown - data.latents

    def loss(rows: torch.Tensor, draws: Draws) -> torch.Tensor:
        known = draws.uniform(1) >= LABELS_DROPPED
        noise, level = draws.normal(*change.shape[1:]), task.levels(draws)
        text = {name: states[rows + 1].to(noise) for name, states in data.text.items()}
        alpha, sigma = (expand(v, noise) for v in task.noise_levels(level))
        x, look = alpha * data.latents[rows].to(noise) + sigma * noise, change[rows].to(noise) * known[..., None, None]
        adapter.set_scale(0)
        with torch.no_grad():
            plain = task.predict(pipe.unet, x, level, text)
        adapter.set_scale(1)
        adapter.set_condition(aesthetic_rows(adapter.aes_emb, levels[rows].to(known.device) * known))
        wanted = plain + from_x0(look, alpha * look, alpha, sigma, task.prediction)
        error = task.predict(pipe.unet, x + alpha * look, level, text) - wanted
        return (task.weight(alpha, sigma) * error.square()).mean()

    return loss


def scale_values(adapter: VMixAdapter, factor: float) -> None:
    """Multiply everything that the adapter adds."""
    with torch.no_grad():
        for weight in adapter.value_layers.parameters():
            weight.mul_(factor)


def train(work: Path, budget: Budget, images: int, lora_rank: int = 0, init: Path | None = None) -> Path:
    """Train, from the weights of another file if given, and write `vmix-shapes-unet.safetensors`.

    A LoRA that is trained along needs the paper's loss.
    """
    pipe = zoo.load("shapes-unet")
    data, levels = shapes_set(pipe, images), looks.levels(images, budget.seed).float()
    shown = encode_images(pipe, looks.show(data.scenes.images, levels @ SHOWN))
    adapter = VMixAdapter.for_model(pipe, looks.LABELS)
    if init is not None:
        adapter.load_state_dict(VMixAdapter.from_pretrained(init, torch_dtype=torch.float32).state_dict())
        scale_values(adapter, 1 / STRENGTH)
    trained, loss_of = Trained(adapter, pipe.unet, lora_rank), paper_loss if lora_rank else paired_loss
    pipe.unet.to(budget.device)
    with adapter.attach(pipe.unet):
        fit("vmix", trained, loss_of(pipe, adapter, data, shown, levels), images, budget, work, drop="helper")
    scale_values(adapter, STRENGTH)
    return adapter.half().save_file(work / "vmix-shapes-unet.safetensors")


def main(argv: list[str] | None = None) -> None:
    """Entry point of the command line."""
    parser = script_parser(__doc__, "vmix_work", 4096, init="file of an adapter to start from", devices=True)
    parser.add_argument("--lora-rank", type=int, default=0, help="of a LoRA that is trained along; 0 for none")
    options = parser.parse_args(argv)
    budget = begin(BUDGET, options)
    print(train(options.work, budget, options.images, options.lora_rank, options.init))


if __name__ == "__main__":
    main()
