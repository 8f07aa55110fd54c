"""Noise of several strengths in a flow model's sampler: do the pictures stay as good, and how different are they?"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from benchmarks._common import picture_grid
from benchmarks.scheduler import GUIDANCE, Bed, decode, make_bed, overhead, run
from diffusers_ext import zoo
from diffusers_ext.eval.metrics import frechet_distance, mean_psnr
from diffusers_ext.registry import MethodRecord


CALLS = (10, 20)
PICTURES = 48
SAMPLERS = {
    "FlowMatchEuler (diffusers)": None,
    "SDE, scale 0": {"diffusion_scale": 0.0},
    "SDE, scale 0.5": {"diffusion_scale": 0.5},
    "SDE, scale 1": {"diffusion_scale": 1.0},
    "SDE, scale 0.5, trapezoid": {"diffusion_scale": 0.5, "integrator": "trapezoid"},
}


def sampler(record: MethodRecord, bed: Bed, options: dict[str, Any] | None) -> Any:
    """A scheduler for the model of `bed`; diffusers' own without options."""
    config = bed.pipe.scheduler.config
    if options is None:
        return type(bed.pipe.scheduler).from_config(config)
    return record.public.from_config(config, noise_seed=0, **options)


def bench(
    record: MethodRecord, out_dir: Path, pictures: int = PICTURES, calls: tuple[int, ...] = CALLS
) -> dict[str, Any]:
    """Judge's score and Frechet distance at each noise strength; arguments as in `benchmarks/scheduler.py`."""
    bed, judge = make_bed("shapes-dit", pictures), zoo.load_judge()
    real = judge.features(zoo.held_out(pictures).images)
    rows, drawn = [], {}
    for n in calls:
        plain = None
        for label, options in SAMPLERS.items():
            latents, made = run(sampler(record, bed, options), bed, n)
            images = decode(bed, latents)
            plain = images if plain is None else plain
            same = "equal" if torch.equal(images, plain) else f"{mean_psnr(images, plain):.1f} dB"
            accuracy = judge.accuracy(images, bed.specs)["all"]
            rows.append(
                [label, made, f"{accuracy:.1%}", f"{frechet_distance(judge.features(images), real):.1f}", same]
            )
            drawn[f"{label}\n{made} calls"] = images
    shown = [name for name in drawn if "trapezoid" not in name and "scale 0\n" not in name]
    last = [name for name in shown if name.endswith(f"\n{calls[-1]} calls")]
    return {
        "columns": ["Sampler", "Model calls", "Judge: all right", "Frechet distance", "To diffusers' picture"],
        "rows": rows,
        "notes": (
            f"shapes-dit, {pictures} held-out captions, guidance {GUIDANCE:g}, the same starting noise for all. "
            "Frechet distance of the judge's features to the true scenes of these captions: it falls with more "
            "pictures, so only rows of this table compare. Processor time of the steps alone on "
            "4 x 128 x 128 latents, beside "
            f"diffusers' DPM-Solver++: {overhead(record)}."
        ),
        "picture": picture_grid({name: drawn[name][:8] for name in last}, Path(out_dir) / f"{record.slug}.png"),
    }
