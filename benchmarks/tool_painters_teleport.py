"""Analytical teleportation: the whole run beside runs that leave out their first steps, same noise, same sampler."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch
from diffusers import DDIMScheduler

from benchmarks._common import picture_grid
from diffusers_ext import GaussianStatistics, teleport_call, zoo
from diffusers_ext.eval import mean_psnr
from diffusers_ext.registry import MethodRecord
from diffusers_ext.schedulers._start import call_from, draw_latents


PRECISE, OPEN = "a large red circle on the left, plain blue background", "a red circle"
CASES = ((PRECISE, 1.0), (PRECISE, 3.0), (OPEN, 3.0))
STEPS, SKIPS = 40, (5, 10)
SAMPLES, RANK = 64, 6


@torch.no_grad()
def pixels(pipe, latents: torch.Tensor) -> torch.Tensor:
    return pipe.vae.decode(latents / pipe.vae.config.scaling_factor).sample.clamp(-1, 1)


def runs(pipe, prompt: str, guidance: float, pictures: int) -> dict[str, tuple[int, torch.Tensor]]:
    """Label -> model calls and pictures; the first is the whole run."""
    options = {"guidance_scale": guidance}
    drawn = draw_latents(pipe, [prompt], SAMPLES, 10, batch_size=32, seed=7, progress=False, **options)
    statistics = {f"teleport, rank {RANK}": RANK, "teleport, mean only": 0}
    statistics = {label: GaussianStatistics.from_latents(drawn, rank) for label, rank in statistics.items()}
    prompts = [prompt] * pictures

    def common(steps: int = STEPS) -> dict[str, Any]:
        noise = [torch.Generator().manual_seed(500 + i) for i in range(pictures)]
        return {"num_inference_steps": steps, "generator": noise, "output_type": "latent", **options}

    found = {f"whole run, {STEPS} steps": (STEPS, pipe(prompts, **common()).images)}
    for skip in SKIPS:
        left = STEPS - skip
        for label, s in statistics.items():
            call = teleport_call(pipe, prompts, statistics=s, skip_steps=skip, **common())
            found[f"{label}, skip {skip}"] = (left, call.images)
    late = call_from(pipe, lambda scheduler, noise: noise, skip, prompts, **common())
    found[f"noise put at step {skip}"] = (left, late.images)
    found[f"{left} steps of their own"] = (left, pipe(prompts, **common(left)).images)
    return {label: (calls, pixels(pipe, latents)) for label, (calls, latents) in found.items()}


def bench(record: MethodRecord, out_dir: Path, pictures: int = 8) -> dict[str, Any]:
    """Rows per guidance and run: model calls, PSNR to the whole run, what the judge reads."""
    pipe, judge, rows, lines = zoo.load("shapes-unet"), zoo.load_judge(), [], {}
    pipe.set_progress_bar_config(disable=True)
    config = pipe.scheduler.config
    pipe.scheduler = DDIMScheduler.from_config(config, timestep_spacing="trailing", clip_sample=False)
    began = time.perf_counter()
    for prompt, guidance in CASES:
        drawn, asked = runs(pipe, prompt, guidance, pictures), [zoo.parse(prompt)] * pictures
        goal = next(iter(drawn.values()))[1]
        for label, (calls, images) in drawn.items():
            right = judge.accuracy(images, torch.tensor(asked))["all"]
            same = "" if images is goal else f"{mean_psnr(images, goal):.1f} dB"
            rows.append([prompt, f"{guidance:g}", label, calls, same, f"{right:.0%}"])
            if (prompt, guidance) == CASES[0] and "mean" not in label:
                lines[label.replace(", ", "\n")] = images
    columns = ["Prompt", "Guidance", "DDIM run", "Model calls", "PSNR to the whole run", "Judge: all that was asked"]
    notes = (
        f"shapes-unet, {pictures} pictures of a prompt from the same noise; statistics of {SAMPLES} other latents "
        f"of that prompt and guidance, drawn with 10 steps. All of it took {time.perf_counter() - began:.0f} s."
    )
    return {
        "columns": columns,
        "rows": rows,
        "notes": notes,
        "picture": picture_grid(lines, out_dir / f"{record.slug}.png"),
    }
