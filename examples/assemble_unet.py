#!/usr/bin/env python3
"""Assemble a smaller UNet out of shapes-unet and distil it (A-SDM).

    python examples/assemble_unet.py --work assemble_work

Scores every unit by how much the error of the prediction rises without it, keeps the most sensitive ones of every
block, gives convolutions experts if asked to, distils, and writes `<work>/unet`, which `AssembledUNet.from_pretrained`
loads. It goes on from its checkpoint when started again.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch

from diffusers_ext import (
    AssemblyDistillation,
    assemble_unet,
    calibration_batches,
    prediction_error,
    removable_units,
    unit_sensitivity,
    units_to_keep,
    zoo,
)
from diffusers_ext.prediction import expand, from_x0
from diffusers_ext.training.denoising import task_of
from diffusers_ext.training.fitting import Budget, Draws, begin, fit, script_parser
from diffusers_ext.training.shapes import encode_images, encode_text, shapes_set


BASE = "shapes-unet"
BUDGET = Budget(steps=300, batch=16, lr=1e-3, save_every=50)


def calibration(pipe, n: int) -> list:
    """Pictures that no training saw, noised at all timesteps."""
    scenes = zoo.held_out(n)
    text = encode_text(pipe, list(scenes.captions))["clip"]
    return calibration_batches(pipe.scheduler, encode_images(pipe, scenes.images), text)


def assemble(pipe, keep_ratio: float, experts: int, batches: list) -> torch.nn.Module:
    """The smaller UNet, with experts in the 3 x 3 convolutions of its up path if `experts` is above 1."""
    keep = units_to_keep(unit_sensitivity(pipe.unet, batches), keep_ratio)
    student = assemble_unet(pipe.unet, keep)
    if experts < 2:
        return student
    names = [f"up_blocks.{i}.resnets.0.conv1" for i in range(len(student.up_blocks))]
    present = [name for name in names if f"{name}.weight" in student.state_dict()]
    return assemble_unet(pipe.unet, keep, conditional=present, num_experts=experts)


def distil(pipe, student: torch.nn.Module, work: Path, budget: Budget, images: int) -> torch.nn.Module:
    """Teach the assembled UNet what the original does."""
    pipe.unet.requires_grad_(False)
    data, task = shapes_set(pipe, images), task_of(pipe)
    loss_of_batch = AssemblyDistillation(pipe.unet, student)

    def loss(rows: torch.Tensor, draws: Draws) -> torch.Tensor:
        z, noise, t = data.latents[rows], draws.normal(*data.latents.shape[1:]), task.levels(draws)
        alpha, sigma = (expand(level, z) for level in task.noise_levels(t))
        x = alpha * z + sigma * noise
        return loss_of_batch(from_x0(z, x, alpha, sigma, task.prediction), x, t, data.text["clip"][rows + 1])

    return fit("unet", student, loss, len(data), budget, work)


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = script_parser(__doc__, "assemble_work", 2048)
    parser.add_argument("--keep-ratio", type=float, default=0.5, help="share of each block's units that stays")
    parser.add_argument("--experts", type=int, default=1, help="kernels per convolution of the up path, 1 for none")
    parser.add_argument("--calibration", type=int, default=64, help="pictures to score and to measure with")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> dict:
    """Entry point of the command line; returns and prints the figures."""
    options = _arguments(argv)
    budget = begin(BUDGET, options)
    pipe = zoo.load(BASE)
    batches = calibration(pipe, options.calibration)
    student = assemble(pipe, options.keep_ratio, options.experts, batches)
    figures = {
        "parameters": [pipe.unet.num_parameters(), student.num_parameters()],
        "removed": [n for n in removable_units(pipe.unet) if n in student.config.get("removed", ())],
        "error of the original": prediction_error(pipe.unet, batches),
        "error after removal": prediction_error(student, batches),
    }
    student = distil(pipe, student, options.work, budget, options.images)
    figures["error after distillation"] = prediction_error(student, batches)
    opened = figures["error after removal"] - figures["error of the original"]
    figures["share of the gap closed"] = (
        1 - (prediction_error(student, batches) - figures["error of the original"]) / opened
    )
    student.save_pretrained(options.work / "unet")
    print(json.dumps(figures, indent=2))
    return figures


if __name__ == "__main__":
    main()
