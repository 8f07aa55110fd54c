"""Searched schedules: the same sampler and number of steps on its own timesteps and on those a search has found.

The search sees other captions and other noise than the comparison.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch

from benchmarks._common import picture_grid
from benchmarks.scheduler import GUIDANCE, Bed, decode, make_bed, peer
from diffusers_ext import TimestepSearch, zoo
from diffusers_ext.apply import denoiser_of
from diffusers_ext.eval import mean_psnr
from diffusers_ext.eval.macs import count_macs
from diffusers_ext.registry import MethodRecord
from diffusers_ext.schedulers._autodiffusion_blocks import skipping
from diffusers_ext.schedulers.autodiffusion import PipelineSampler, ScheduleSearchResult, apply_schedule


PICTURES = 12
SIZE = 64  # pixels
REFERENCE_STEPS = 60
SEARCHED_ON = 6  # captions
CASES = (
    ("shapes-unet", "DDIM", 4, 0.0),
    ("shapes-unet", "DDIM", 4, 0.25),
    ("shapes-unet", "DPM++ 2M", 5, 0.0),
    ("shapes-dit", "Euler", 4, 0.0),
)


def search(bed: Bed, sampler: str, steps: int, share: float) -> tuple[ScheduleSearchResult, str]:
    """What a search finds, and its processor time."""
    options: dict[str, Any] = {"population": 20, "max_epochs": 6}
    if share:
        options = {"population": 14, "max_epochs": 10, "max_prun": share, "leave_out_blocks": True}
    captions, before = zoo.scenes(SEARCHED_ON, 1).captions, time.process_time()
    found = TimestepSearch.for_pipeline(
        bed.pipe, captions, steps, GUIDANCE, scheduler=peer(sampler, bed), seed=10**6, size=SIZE, **options
    )
    best = found.run(progress=False)
    return best, f"{found.evaluations} schedules, {time.process_time() - before:.0f} s"


@torch.no_grad()
def draw(bed: Bed, sampler: str, steps: int, result: ScheduleSearchResult | None) -> tuple[torch.Tensor, int]:
    """Latents, and operations of all calls of the denoiser."""
    run, ends = PipelineSampler(bed.pipe, bed.captions, GUIDANCE, peer(sampler, bed), size=SIZE), []
    run.noise = bed.noise
    scheduler = run.scheduler if result is None else apply_schedule(run.scheduler, result)
    with skipping(denoiser_of(bed.pipe), {} if result is None else result.skips):
        operations = count_macs(lambda: ends.append(run.run(scheduler, steps)))
    return ends[0], operations


def converged(bed: Bed) -> torch.Tensor:
    """Latents after many third-order steps from the noise of `bed`."""
    run = PipelineSampler(bed.pipe, bed.captions, GUIDANCE, size=SIZE)
    run.noise = bed.noise
    return run.reference(REFERENCE_STEPS)


def _cells(bed: Bed, latents: torch.Tensor) -> tuple[list[str], torch.Tensor]:
    images = decode(bed, latents)
    error = (latents - bed.reference).pow(2).mean().sqrt().item()
    psnr = mean_psnr(images, decode(bed, bed.reference))
    judged = zoo.load_judge().accuracy(images, bed.specs)["all"]
    return [f"{error:.4f}", f"{psnr:.1f} dB", f"{judged:.1%}"], images


def bench(record: MethodRecord, out_dir: Path, pictures: int = PICTURES, cases=CASES) -> dict[str, Any]:
    """Measure searches for timesteps.

    Args:
        record: Its catalogue record.
        out_dir: Where the picture is written.
        pictures: Captions to draw.
        cases: Model, sampler, steps and largest share of blocks left out.

    Returns:
        `columns`, `rows`, `notes` and `picture`, as `benchmarks/run.py` expects.
    """
    rows, lines, beds = [], {}, {}
    for name, sampler, steps, share in cases:
        if name not in beds:
            beds[name] = make_bed(name, pictures)
            beds[name].reference = converged(beds[name])
        bed = beds[name]
        own, whole = draw(bed, sampler, steps, None)
        result, took = search(bed, sampler, steps, share)
        ours, less = draw(bed, sampler, steps, result)
        what = f"searched, up to {share:.0%} of the blocks left out" if share else "searched"
        for label, latents, operations, note in (("own", own, whole, ""), (what, ours, less, took)):
            cells, images = _cells(bed, latents)
            if label != "own" or share == 0:
                rows.append([name, sampler, steps, label, *cells, f"{operations / whole:.2f}", note])
            if (name, sampler) == cases[0][:2] and share == 0:
                lines[f"{sampler}, {steps} steps\n{label} timesteps\n{cells[1]}"] = images
    first = beds[cases[0][0]]
    lines = {f"reference\n{REFERENCE_STEPS} steps": decode(first, first.reference), **lines}
    notes = (
        f"Root mean square error of the latents to the converged solution ({REFERENCE_STEPS} steps of DPM-Solver++ "
        "3M), PSNR of the pictures to its picture, attributes that the judge reads right; "
        f"{pictures} held-out captions, guidance {GUIDANCE:g}. The searches saw {SEARCHED_ON} other captions and "
        "other noise. Operations of the denoiser relative to the whole one; processor time of the search."
    )
    columns = ["Model", "Sampler", "Steps", "Timesteps", "Error", "PSNR", "Judge", "Operations", "Search"]
    picture = picture_grid(lines, Path(out_dir) / f"{record.slug}.png")
    return {"columns": columns, "rows": rows, "notes": notes, "picture": picture}
