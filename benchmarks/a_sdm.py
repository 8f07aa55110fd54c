"""A-SDM: feature inheritance as every cache; beside it the UNet assembled and distilled by the example; a switch."""

from __future__ import annotations

import importlib.util
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

import diffusers_ext
from benchmarks import cache
from benchmarks.cache import INTERVALS, Setting, Size, helper
from diffusers_ext import AssembledUNet, MultiUNetSwitch, assemble_unet, removable_units, zoo
from diffusers_ext.registry import MethodRecord


EXAMPLE = Path(__file__).resolve().parent.parent / "examples" / "assemble_unet.py"
SWITCH = 0.4
SIZE = Size(steps=30, pictures=16, timed_pictures=4, timed_steps=20)


def distilled() -> tuple[torch.nn.Module, dict[str, Any]]:
    """The UNet that the example assembles and distils with its recipe, and its figures."""
    spec = importlib.util.spec_from_file_location("assemble_unet", EXAMPLE)
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    with tempfile.TemporaryDirectory() as folder:
        figures = example.main(["--work", folder])
        return AssembledUNet.from_pretrained(Path(folder) / "unet"), figures


@contextmanager
def _with_unet(pipe: Any, make: Callable[[torch.nn.Module], torch.nn.Module]) -> Iterator[None]:
    """The pipeline with another UNet, made from its own."""
    original = pipe.unet
    pipe.unet = make(original)
    try:
        yield
    finally:
        pipe.unet = original


def settings(record: MethodRecord, light: torch.nn.Module) -> list[Setting]:
    """Other settings of feature inheritance, the published DeepCache, and the smaller UNet."""
    whole = zoo.load("shapes-unet").unet
    keep = [unit for unit in removable_units(whole) if unit not in light.config.removed]
    raw = assemble_unet(whole, keep)
    points = [(0, "full"), (SWITCH, "light")]
    configs = {
        "units, every 2nd step": record.public(granularity="unit"),
        "N = 3, first 40% computed": record.public(interval=3, mode="early_dense", dense_fraction=0.4),
    }
    rows = [Setting(name, lambda pipe, c=config: diffusers_ext.apply(pipe, c)) for name, config in configs.items()]
    rows += [Setting(f"N = {n}, PyPI DeepCache 0.1.1", lambda pipe, n=n: helper(pipe, n)) for n in INTERVALS]
    unets = {
        "assembled, not distilled": lambda _: raw,
        "assembled, 300 steps": lambda _: light,
        f"switch to it at {SWITCH:.0%}": lambda unet: MultiUNetSwitch({"full": unet, "light": light}, points),
    }
    return rows + [Setting(name, lambda pipe, m=make: _with_unet(pipe, m)) for name, make in unets.items()]


def bench(record: MethodRecord, out_dir: Path) -> dict[str, Any]:
    """Measure A-SDM.

    Args:
        record: Its catalogue record.
        out_dir: Where the picture is written.

    Returns:
        `columns`, `rows`, `notes` and `picture`, as `benchmarks/run.py` expects.
    """
    light, figures = distilled()
    result = cache.bench(record, out_dir, settings(record, light), SIZE)
    whole, small = figures["parameters"]
    errors = [figures[f"error {when}"] for when in ("of the original", "after removal", "after distillation")]
    result["notes"] += (
        f" Assembled: {len(figures['removed'])} of the units of shapes-unet left out, {small / whole:.0%} of its "
        f"parameters; error of the prediction {errors[0]:.3f} with all units, {errors[1]:.3f} without, "
        f"{errors[2]:.3f} after 300 steps of distillation with 16 pictures: "
        f"{figures['share of the gap closed']:.0%} of the gap."
    )
    return result
