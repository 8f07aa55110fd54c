"""Seamless tiles: seams, cost and pictures beside plain tiles, tiles with shared halves, and no tiles."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from diffusers import StableDiffusionPipeline

import diffusers_ext
from benchmarks._common import picture_grid
from diffusers_ext import AnySizeDiffusionPipeline, SeamlessTilingConfig, zoo
from diffusers_ext.attention._tiles import Size, seam_ratio
from diffusers_ext.eval import count_macs, paired_ratio
from diffusers_ext.registry import MethodRecord


COLUMNS = ["Size", "Tiles", "Calls per step", "MACs", "Time", "Seams", "First shape", "All attributes"]
TRAINED, STEPS, STRENGTH = 64, 60, 0.15
PICTURES = {128: 16, 256: 6}
CONFIGS = {
    "plain": SeamlessTilingConfig(offset_mode="fixed", noise_reference=False),
    "moved at random": SeamlessTilingConfig(),
    "as published": SeamlessTilingConfig(cover_on_reset=False),
    "moved in turn": SeamlessTilingConfig(offset_mode="positive"),
}


def halves(size: Size, tile: Size, offset: Size, cover: bool) -> list[Size]:
    """Ordinary tiles, which share half of their width with the next."""
    rows, columns = (sorted({*range(0, n - t, t // 2), n - t}) for n, t in zip(size, tile))
    return [(y, x) for y in rows for x in columns]


@contextmanager
def shared_halves(pipe: Any):
    """Tiles with shared halves on the same machinery: the peer (MultiDiffusion with a stride of half a tile)."""
    with (
        patch("diffusers_ext.attention.any_size_diffusion.boxes", halves),
        diffusers_ext.apply(pipe, CONFIGS["plain"]) as handle,
    ):
        yield handle


def settings() -> dict[str, Any]:
    """Name -> function that puts it on a pipeline."""
    own = {name: lambda pipe, c=config: diffusers_ext.apply(pipe, c) for name, config in CONFIGS.items()}
    return {"none": None, "shared halves": shared_halves, **own}


@torch.no_grad()
def enlarged(pipe: Any, captions: Sequence[str], small: torch.Tensor, size: int, steps: int = STEPS) -> torch.Tensor:
    """The second stage on pictures of the first."""
    large = F.interpolate(small, (size, size), mode="bicubic").clamp(0, 1)
    generators = [torch.Generator().manual_seed(i) for i in range(len(captions))]
    return (
        super(AnySizeDiffusionPipeline, pipe)
        .__call__(
            list(captions),
            image=large,
            strength=STRENGTH,
            num_inference_steps=steps,
            guidance_scale=1.0,
            generator=generators,
            output_type="pt",
        )
        .images
    )


def turned_on(pipe: Any, setting: Any) -> AbstractContextManager:
    """A setting on a pipeline, or nothing."""
    return ExitStack() if setting is None else setting(pipe)


def rows_of(pipe: Any, size: int, pictures: dict[str, torch.Tensor]):
    """Rows of one size; what is drawn goes into `pictures`."""
    scenes, judge = zoo.held_out(PICTURES[size]), zoo.load_judge()
    small = (zoo.generate(first_stage(pipe), scenes.captions) + 1) / 2

    def short() -> None:
        enlarged(pipe, scenes.captions[:1], small[:1], size)

    def run(setting: Any) -> None:
        with turned_on(pipe, setting):
            short()

    peer_macs = count_macs(run, shared_halves)
    for name, setting in settings().items():
        calls, timing = "", "1" if name == "shared halves" else ""
        with turned_on(pipe, setting) as handle:
            images = enlarged(pipe, scenes.captions, small, size)
            if setting is not None:
                figures = handle.summary()["any-size-diffusion"]
                calls = f"{figures['tiles'] / figures['calls']:.3g}"
        macs = f"{count_macs(run, setting) / peer_macs:.3f}"
        if name in ("none", "plain", "moved at random"):
            timing = str(
                paired_ratio(lambda s=setting: run(s), lambda: run(shared_halves), 3, clock=time.process_time)
            )
        read = judge.accuracy(F.interpolate(images * 2 - 1, (TRAINED, TRAINED), mode="area"), scenes.specs)
        pictures[f"{size}\n{name}"] = images * 2 - 1
        found = f"{seam_ratio(images, TRAINED):.3f}", f"{read['shape1']:.0%}", f"{read['all']:.0%}"
        yield [f"{size} x {size}", name, calls, macs, timing, *found]


def first_stage(pipe: Any) -> Any:
    """The text-to-image pipeline of the first stage."""
    base = StableDiffusionPipeline.from_pipe(pipe)
    base.set_progress_bar_config(disable=True)
    return base


def bench(record: MethodRecord, out_dir: Path) -> dict[str, Any]:
    """Measure seamless tiles; see `benchmarks/run.py` for the answer's form."""
    pipe = AnySizeDiffusionPipeline.from_pipe(zoo.load("shapes-unet"))
    pipe.set_progress_bar_config(disable=True)
    pictures: dict[str, torch.Tensor] = {}
    rows = [row for size in PICTURES for row in rows_of(pipe, size, pictures)]
    notes = (
        f"shapes-unet, trained at {TRAINED} x {TRAINED}: pictures of held-out captions (16 and 6), enlarged, then the "
        f"last {STRENGTH:.0%} of {STEPS} steps without guidance. Seams: mean step between neighbouring pixels across "
        "borders of plain tiles over that elsewhere; the line without tiles shows what the scenes themselves have. "
        "MACs and time as shares of ordinary tiles with shared halves, one picture; processor time, median of three "
        "interleaved pairs with smallest and largest. The judge reads pictures scaled down to the trained size."
    )
    return {
        "columns": COLUMNS,
        "rows": rows,
        "notes": notes,
        "picture": picture_grid(pictures, out_dir / "grid.png", 4),
    }
