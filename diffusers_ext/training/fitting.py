"""One training loop for every network, on accelerate: data parallel, resumable to the bit, with progress.

Started by `accelerate launch` or `torchrun`, the processes share every batch. Everything random in step `k` comes from
a generator seeded by `(seed, k)`, and everything a run has learnt so far is in one safetensors file. So a run that was
killed and started again ends in the same bits as one that was not.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import signal
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from pathlib import Path

import torch
from accelerate import Accelerator, PartialState
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from tqdm import tqdm

from .muon import optimizers


@dataclass(frozen=True)
class Budget:
    """How long and how fast to train.

    Attributes:
        steps: Optimizer steps in all. The learning rate falls to 1 % of `lr` along a cosine of this length.
        batch: Samples per step, over all processes together.
        lr: Peak learning rate, reached after 50 steps.
        ema: Decay of the weight average that is kept as the result, in [0, 1).
        seed: Of batches and noise.
        save_every: Steps between checkpoints.
        device: "cpu" or "cuda".

    Raises:
        ValueError: Another device, or numbers that cannot train.
    """

    steps: int
    batch: int
    lr: float
    ema: float = 0.998
    seed: int = 0
    save_every: int = 100
    device: str = "cpu"

    def __post_init__(self) -> None:
        if self.device not in ("cpu", "cuda"):
            raise ValueError(f"device is {self.device!r}; accepted: 'cpu', 'cuda'")
        if min(self.steps, self.batch, self.save_every) < 1 or self.lr <= 0 or not 0 <= self.ema < 1:
            raise ValueError(f"{self}: steps, batch and save_every need 1 or more, lr above 0, ema in [0, 1)")


def add_budget_arguments(parser: argparse.ArgumentParser, devices: bool = True) -> None:
    """One option for every field of `Budget`; what is not given stays as the recipe says.

    Args:
        parser: Of a training script.
        devices: Whether the script can train elsewhere than on the CPU.
    """
    kinds = {"int": int, "float": float, "str": str}
    for field in fields(Budget):
        if devices or field.name != "device":
            option = "--" + field.name.replace("_", "-")
            parser.add_argument(option, type=kinds[str(field.type)], help=f"see {Budget.__module__}.Budget")


def script_parser(
    doc: str | None, work: str, images: int, init: str | None = None, devices: bool = False
) -> argparse.ArgumentParser:
    """The options that all training scripts share.

    Args:
        doc: Docstring of the script.
        work: Default working folder.
        images: Default size of the training set.
        init: Help of the option that names a file to start from; None for no such option.
        devices: Whether the script can train elsewhere than on the CPU.
    """
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path(work), help=f"working folder, {work} by default")
    parser.add_argument("--images", type=int, default=images, help=f"size of the training set, {images} by default")
    if init is not None:
        parser.add_argument("--init", type=Path, help=init)
    add_budget_arguments(parser, devices)
    return parser


def begin(recipe: Budget, options: argparse.Namespace) -> Budget:
    """Make the working folder, seed torch, take one thread; the budget of `chosen_budget`."""
    budget = chosen_budget(recipe, options)
    options.work.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    torch.manual_seed(budget.seed)
    return budget


def chosen_budget(recipe: Budget, options: argparse.Namespace) -> Budget:
    """The recipe's budget with what the command line says otherwise."""
    given = {field.name: getattr(options, field.name, None) for field in fields(Budget)}
    return replace(recipe, **{name: value for name, value in given.items() if value is not None})


class Draws:
    """Random numbers of one step.

    Every process draws for the whole batch and keeps its own rows, so the result does not depend on how many processes
    share the work.
    """

    def __init__(self, seed: int, step: int, batch: int, device: str):
        self._generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
        self._batch, self._device = batch, device
        state = PartialState(cpu=device == "cpu")
        self._rows = slice(state.process_index, batch, state.num_processes)

    def indices(self, count: int, step: int, seed: int) -> torch.Tensor:
        """The rows of the data set for this step: epochs of random permutations, cut into batches."""
        per_epoch = max(count // self._batch, 1)
        epoch, place = divmod(step, per_epoch)
        order = torch.randperm(count, generator=torch.Generator().manual_seed(seed * 7919 + epoch))
        return order[place * self._batch :][: self._batch][self._rows]

    def uniform(self, *shape: int) -> torch.Tensor:
        """Numbers in [0, 1), `[own rows, *shape]`."""
        return torch.rand(self._batch, *shape, generator=self._generator)[self._rows].to(self._device)

    def normal(self, *shape: int) -> torch.Tensor:
        """Standard normal numbers, `[own rows, *shape]`."""
        return torch.randn(self._batch, *shape, generator=self._generator)[self._rows].to(self._device)

    def shared(self) -> float:
        """One number in [0, 1), the same for the whole batch."""
        return torch.rand((), generator=self._generator).item()


def write_tensors(path: Path, tensors: dict[str, torch.Tensor], note: dict | None = None) -> None:
    """Write a safetensors file in one move: readers find the old or the new one, never half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_suffix(".part")
    apart = {k: v.detach().cpu().clone(memory_format=torch.contiguous_format) for k, v in tensors.items()}
    save_file(apart, fresh, {"note": json.dumps(note or {})})
    fresh.chmod(0o644)
    os.replace(fresh, path)


def read_tensors(path: Path, device: str = "cpu") -> tuple[dict[str, torch.Tensor], dict]:
    """Tensors and note of a file from `write_tensors`."""
    with safe_open(path, "pt", device) as file:
        return {name: file.get_tensor(name) for name in file.keys()}, json.loads(file.metadata()["note"])  # noqa: SIM118


class _Run:
    """A model in training with its optimizers and weight average, and their way to and from one file."""

    def __init__(self, model: nn.Module, budget: Budget):
        self.model, self.budget, self.step = model, budget, 0
        self.optimizers = optimizers(model, budget.lr)
        self.average = {name: value.detach().clone() for name, value in model.state_dict().items()}
        self.weights = [p for group in self.optimizers for g in group.param_groups for p in g["params"]]

    def _moments(self) -> dict[str, torch.Tensor]:
        found = {}
        for which, optimizer in enumerate(self.optimizers):
            for index, weight in enumerate(p for g in optimizer.param_groups for p in g["params"]):
                for name, value in optimizer.state[weight].items():
                    found[f"optimizer.{which}.{index}.{name}"] = torch.as_tensor(value)
        return found

    def save(self, path: Path) -> None:
        tensors = {f"model.{k}": v for k, v in self.model.state_dict().items()}
        tensors |= {f"average.{k}": v for k, v in self.average.items()} | self._moments()
        write_tensors(path, tensors, {"step": self.step})

    def load(self, path: Path) -> None:
        tensors, note = read_tensors(path, self.budget.device)
        self.step = note["step"]
        self.model.load_state_dict({k[6:]: v for k, v in tensors.items() if k.startswith("model.")})
        self.average = {k[8:]: v for k, v in tensors.items() if k.startswith("average.")}
        for which, optimizer in enumerate(self.optimizers):
            for index, weight in enumerate(p for g in optimizer.param_groups for p in g["params"]):
                prefix = f"optimizer.{which}.{index}."
                state = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
                optimizer.state[weight].update({k: v.cpu() if k == "step" else v for k, v in state.items()})

    def update(self, rate: float) -> None:
        """Clip, step, average. Gradients are in place."""
        nn.utils.clip_grad_norm_(self.weights, 1.0)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = self.budget.lr * rate
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        self.step += 1
        decay = min(self.budget.ema, (1 + self.step) / (10 + self.step))
        with torch.no_grad():
            for name, value in self.model.state_dict().items():
                mean = self.average[name]
                mean.lerp_(value, 1 - decay) if value.is_floating_point() else mean.copy_(value)


def _reduce(
    accelerator: Accelerator, weights: list[torch.Tensor], loss: torch.Tensor, stop: bool
) -> tuple[float, bool]:
    """Average gradients and loss over the processes; stop when any of them was asked to."""
    if accelerator.num_processes == 1:
        return loss.item(), stop
    extra = torch.stack([loss.float(), torch.full_like(loss, float(stop))])
    flat = accelerator.reduce(torch.cat([extra, *(w.grad.detach().reshape(-1) for w in weights)]), "mean")
    for weight, grad in zip(weights, flat[2:].split([w.numel() for w in weights])):
        weight.grad.copy_(grad.reshape(weight.shape))
    return flat[0].item(), flat[1].item() > 0


def _rate(step: int, steps: int) -> float:
    """Share of the peak learning rate: linear warm-up, then a cosine down to 1 %."""
    return min(1.0, (step + 1) / 50) * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * step / steps)))


class _StopRequest:
    """Turns Ctrl-C and SIGTERM into a flag that is looked at between steps."""

    def __init__(self):
        self.seen = False

    def __enter__(self) -> _StopRequest:
        self._before = {s: signal.signal(s, self._note) for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    def _note(self, *_) -> None:
        self.seen = True

    def __exit__(self, *_) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)


def fit(
    name: str,
    model: nn.Module,
    loss_of: Callable[[torch.Tensor, Draws], torch.Tensor],
    count: int,
    budget: Budget,
    work: Path,
    drop: str | None = None,
) -> nn.Module:
    """Train `model` and leave its averaged weights in `work/name.safetensors`.

    Goes on from `work/name.checkpoint.safetensors` when an earlier run of the same stage left one.

    Args:
        name: Of the stage.
        model: What to train; parameters without `requires_grad` stay as they are.
        loss_of: From this process's rows of the data set and the step's random numbers to a scalar loss.
        count: Size of the data set.
        budget: See `Budget`.
        work: Working folder.
        drop: Name of a child module that is trained but not written.

    Returns:
        The model with averaged weights, on the CPU, in eval mode.

    Raises:
        SystemExit: Stopped by Ctrl-C or SIGTERM; the checkpoint is written.
    """
    precision = "bf16" if budget.device == "cuda" else "no"
    accelerator = Accelerator(cpu=budget.device == "cpu", mixed_precision=precision)
    run, checkpoint = _Run(model.to(accelerator.device).train(), budget), work / f"{name}.checkpoint.safetensors"
    if checkpoint.exists():
        run.load(checkpoint)
    bar = tqdm(total=budget.steps, initial=run.step, desc=name, mininterval=2, disable=not accelerator.is_main_process)
    smooth = None
    with _StopRequest() as request:
        while run.step < budget.steps:
            draws = Draws(budget.seed, run.step, budget.batch, budget.device)
            with accelerator.autocast():
                loss = loss_of(draws.indices(count, run.step, budget.seed), draws)
            accelerator.backward(loss)
            value, stop = _reduce(accelerator, run.weights, loss.detach(), request.seen)
            run.update(_rate(run.step, budget.steps))
            smooth = value if smooth is None else 0.98 * smooth + 0.02 * value
            bar.set_postfix_str(f"loss {smooth:.4f}", refresh=False)
            bar.update()
            if accelerator.is_main_process and (stop or run.step % budget.save_every == 0):
                run.save(checkpoint)
            if stop:
                raise SystemExit(f"{name}: stopped after step {run.step}; run the same command to go on")
    bar.close()
    model.load_state_dict(run.average)
    if accelerator.is_main_process:
        kept = {k: v for k, v in model.state_dict().items() if k.split(".")[0] != drop}
        write_tensors(work / f"{name}.safetensors", kept, {"steps": run.step, "batch": budget.batch})
        checkpoint.unlink(missing_ok=True)
    return model.to("cpu").eval()
