#!/usr/bin/env python3
"""Train text-to-image pipelines from nothing: data, judge, text encoders, autoencoder, denoisers, export, model card.

    python examples/train_shapes/train.py all --work shapes_work            # every stage in order, CPU, hours
    python examples/train_shapes/train.py unet --work shapes_work           # one stage
    torchrun --nproc-per-node 2 examples/train_shapes/train.py unet --work shapes_work     # two CPU processes
    python examples/train_shapes/train.py dit --work shapes_work --device cuda

Every training stage may be stopped (Ctrl-C, SIGTERM, power cut) and goes on from its checkpoint when started again.
README.md in this folder explains the recipe.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import report
import stages
import torch
from accelerate import PartialState

from diffusers_ext.training.fitting import Budget, add_budget_arguments, chosen_budget


# The recipe: what each training stage does when no option says otherwise.
BUDGETS = {
    "judge": Budget(steps=6000, batch=64, lr=2e-3),
    "clip": Budget(steps=4500, batch=64, lr=2e-3),
    "t5": Budget(steps=4500, batch=64, lr=2e-3),
    "vae": Budget(steps=12_000, batch=16, lr=3e-3),
    "unet": Budget(steps=8000, batch=32, lr=1.2e-3),
    "unet-eps": Budget(steps=2500, batch=32, lr=1.2e-3),
    "dit": Budget(steps=8000, batch=32, lr=1.2e-3, ema=0.999),
}
DENOISERS = ["unet", "unet-eps", "dit"]
STAGES = ["data", "judge", "clip", "t5", "vae", "cache", *DENOISERS, "export", "evaluate", "card"]


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=["all", *STAGES])
    parser.add_argument("--work", type=Path, default=Path("shapes_work"), help="working folder")
    parser.add_argument("--images", type=int, default=24_576, help="data: size of the training set")
    parser.add_argument("--init", type=Path, help="start from this safetensors file of weights")
    parser.add_argument("--teacher", type=Path, help="unet-eps, dit: weights of a trained unet to learn from")
    parser.add_argument("--model", choices=DENOISERS, help="export, evaluate, card: only this one")
    parser.add_argument("--recipe", type=Path, help="card: text file on how the weights were made")
    parser.add_argument("-n", type=int, default=1000, help="evaluate: held-out captions")
    parser.add_argument("--inference-steps", type=int, default=20, help="evaluate: steps of the scheduler")
    parser.add_argument("--guidance", type=float, default=3.0, help="evaluate: guidance scale")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of each process")
    add_budget_arguments(parser)
    return parser.parse_args(argv)


def run(stage: str, options: argparse.Namespace) -> None:
    """Run one stage."""
    work, init = options.work, options.init
    models = [options.model] if options.model else DENOISERS
    if stage == "data":
        stages.data(work, options.images)
    elif stage == "judge":
        stages.judge(work, chosen_budget(BUDGETS[stage], options), init)
    elif stage in ("clip", "t5"):
        stages.text(work, chosen_budget(BUDGETS[stage], options), init, stage)
    elif stage == "vae":
        stages.vae(work, chosen_budget(BUDGETS[stage], options), init)
    elif stage == "cache":
        stages.cache(work)
    elif stage in DENOISERS:
        stages.denoiser(work, chosen_budget(BUDGETS[stage], options), init, stage, options.teacher)
    elif stage == "export":
        print("exported", *(stages.export(work, model) for model in models))
    elif stage == "evaluate":
        for model in models:
            print(report.evaluate(_folder(work, model), options.n, options.inference_steps, options.guidance))
    else:
        for model in models:
            report.card(_folder(work, model), options.recipe or Path(__file__).parent / "recipe.md")


def _folder(work: Path, model: str) -> Path:
    return work / "export" / f"shapes-{model}"


def _run_all(options: argparse.Namespace) -> None:
    """Every stage in order; the epsilon UNet and the transformer learn from the finished v UNet."""
    teacher = options.work / "unet.safetensors"
    for stage in STAGES:
        learns = stage in ("unet-eps", "dit")
        start = {"teacher": teacher if learns else None, "init": teacher if stage == "unet-eps" else None}
        run(stage, argparse.Namespace(**{**vars(options), **start}))


def main(argv: list[str] | None = None) -> None:
    """Entry point of the command line."""
    options = _arguments(argv)
    options.work.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(options.threads)
    state = PartialState(cpu=options.device != "cuda")
    if options.stage == "all":
        _run_all(options)
    elif options.stage in BUDGETS or state.is_main_process:
        run(options.stage, options)
    state.destroy_process_group()


if __name__ == "__main__":
    main()
