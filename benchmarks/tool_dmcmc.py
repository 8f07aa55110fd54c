"""Denoising MCMC: pictures of a prompt from chains, beside sampling each from noise with as many model calls."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch

from benchmarks._common import picture_grid
from diffusers_ext import zoo
from diffusers_ext.registry import MethodRecord
from diffusers_ext.schedulers._pictures import starting_noise
from diffusers_ext.schedulers.dmcmc import DLGConfig, integrate, integrator_calls, per_sample_grid
from diffusers_ext.schedulers.dmcmc_classifier import pipeline_latents, train_noise_classifier


PROMPTS, CHAINS, PICTURES = 4, 2, 8  # chains per prompt, pictures per chain
GUIDANCE = 3.0
SETTINGS = ((4, 4), (6, 8))  # n_skip, points


@torch.no_grad()
def _decoded(pipe: Any, latents: torch.Tensor) -> torch.Tensor:
    return pipe.vae.decode(latents / pipe.vae.config.scaling_factor).sample.clamp(-1, 1)


def _spread(features: torch.Tensor, groups: torch.Tensor) -> float:
    """Mean distance between two pictures of a group."""
    distances = [torch.pdist(features[groups == g]).mean() for g in groups.unique()]
    return torch.stack(distances).mean().item()


def bench(record: MethodRecord, out_dir: Path) -> dict[str, Any]:
    """Judge's score and variety at equal numbers of calls; the start of the chains told apart."""
    pipe, scenes, judge = zoo.load("shapes-unet"), zoo.held_out(PROMPTS), zoo.load_judge()
    base = DLGConfig.for_pipe(pipe, integrator="dpmpp_2m", init_points=12)
    levels = (base.num_levels, base.sigma_min, base.sigma_max)
    began = time.process_time()
    latents = pipeline_latents(pipe, zoo.scenes(64, 1).images)
    classifier = train_noise_classifier(latents, *levels, progress=False)
    training = time.process_time() - began
    prompt = torch.arange(PROMPTS).repeat_interleave(CHAINS)
    captions = [scenes.captions[i] for i in prompt]
    every = prompt.repeat(PICTURES)
    rows, drawn = [], {}

    def add(label: str, calls: float, start: int, samples: torch.Tensor) -> None:
        images = torch.cat([_decoded(pipe, part) for part in samples.split(32)])
        features = judge.features(images)
        accuracy = judge.accuracy(images, scenes.specs[every])["all"]
        rows.append([label, f"{calls:g}", start, f"{accuracy:.1%}", f"{_spread(features, every):.1f}"])
        drawn[f"{label}\n{calls:g} calls"] = images[:: PROMPTS * CHAINS]  # the first chain's pictures

    for n_skip, points in SETTINGS:
        config = DLGConfig.for_pipe(
            pipe, integrator="dpmpp_2m", init_points=12, n_skip=n_skip, points=points, tweedie_sigma=0.0
        )
        chains = record.public.from_pipe(pipe, captions, classifier, config, GUIDANCE)
        chains.init(generator=torch.Generator().manual_seed(0))
        samples = chains.sample(len(every))
        calls = int(chains.calls_per_picture)
        start = integrator_calls("kar2", config.init_points) + config.init_sweeps + config.burn_in
        add(f"DLG, {n_skip} sweeps + {points - 1}", calls, start, samples)
        add("DPM-Solver++ from noise", calls, 0, plain(chains, pipe, calls + 1))
    notes = (
        f"shapes-unet, {PROMPTS} captions, {CHAINS} chains each, {PICTURES} pictures per chain, guidance "
        f"{GUIDANCE:g}. Both denoise with the same two-step solver and end at the model's lowest noise level. "
        "Start: calls of a chain before its first picture. Variety: mean distance of the judge's features between "
        "pictures of a prompt. "
        f"The noise classifier took {training:.0f} s of processor time."
    )
    columns = ["Sampler", "Calls per picture", "Start", "Judge: all right", "Variety"]
    return {
        "columns": columns,
        "rows": rows,
        "notes": notes,
        "picture": picture_grid(drawn, Path(out_dir) / f"{record.slug}.png"),
    }


@torch.no_grad()
def plain(chains: Any, pipe: Any, points: int) -> torch.Tensor:
    """As many pictures of the same prompts from pure noise, with the same model and solver."""
    config, n = chains.config, len(chains.x)
    found = []
    for i in range(PICTURES):
        noise = starting_noise(pipe, n, None, None, torch.Generator().manual_seed(i))[0]
        top = torch.full((n,), config.sigma_max)
        levels = per_sample_grid(top, config.sigma_min, points)
        found.append(integrate(chains.denoise, config.sigma_max * noise, levels, "dpmpp_2m"))
    return torch.cat(found)
