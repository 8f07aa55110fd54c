"""What a method has to measure, fit or search before its first run, in pictures it would take as long to draw."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from benchmarks.scheduler import GUIDANCE, FittedPerSteps, make_bed, peer
from diffusers_ext import (
    GaussianStatistics,
    OTStart,
    SemiDiscreteOT,
    SolverScheduleSearch,
    TimestepSearch,
    USFScheduler,
    calibrate_ems,
    clean_latents,
    pipeline_latents,
    train_noise_classifier,
    zoo,
)
from diffusers_ext.schedulers._ems import DATA, GRID
from diffusers_ext.schedulers.usf_s3 import pipeline_fitness


MODEL = "shapes-unet"
PICTURE_STEPS = 20


def tasks(pictures: int = 4) -> dict[str, tuple[str, Callable[[], Any]]]:
    """Method -> what is done, and the doing."""
    pipe = zoo.load(MODEL)
    pipe.set_progress_bar_config(disable=True)
    bed = make_bed(MODEL, pictures)
    captions = zoo.scenes(pictures, 1).captions

    def statistics() -> None:
        scenes = zoo.held_out(DATA)
        latents, how = clean_latents(pipe, scenes.images), {"estimator": "fd", "num_grid": GRID, "progress": False}
        calibrate_ems(pipe, latents, scenes.captions, GUIDANCE, **how)

    def olss() -> None:
        FittedPerSteps(bed).set_timesteps(8)

    def transport() -> None:
        pipe.scheduler.set_timesteps(PICTURE_STEPS)
        latents = pipeline_latents(pipe, zoo.scenes(512, 1).images)
        level = OTStart.level_of(pipe.scheduler, pipe.scheduler.timesteps[-10])
        SemiDiscreteOT.from_latents(latents, level).fit(progress=False)

    def classifier() -> None:
        train_noise_classifier(pipeline_latents(pipe, zoo.scenes(64, 1).images), progress=False)

    def gaussian() -> None:
        GaussianStatistics.from_pipeline(
            pipe, captions[:1], 200, num_inference_steps=PICTURE_STEPS, guidance_scale=GUIDANCE, progress=False
        )

    def solver_schedule() -> None:
        scheduler = USFScheduler.from_config(pipe.scheduler.config)
        starts = [scheduler.preset_schedule(8, name) for name in ("unipc_bh2", "dpmpp_2m", "dpmpp_3m")]
        fitness = pipeline_fitness(pipe, captions, GUIDANCE, size=64)
        SolverScheduleSearch(fitness, starts, 8, screen=4).run(200, progress=False)

    def timesteps() -> None:
        TimestepSearch.for_pipeline(pipe, captions, 4, GUIDANCE, scheduler=peer("DDIM", bed), size=64).run(False)

    return {
        "dpm-solver-v3": (f"statistics of {DATA} pictures on {GRID} levels, by differences", statistics),
        "olss": ("50 recorded steps of 8 pictures, fitted to 8", olss),
        "dpm-ot": ("transport to 512 latents", transport),
        "dmcmc": ("classifier of noise levels, 1000 steps", classifier),
        "painters-teleport": ("200 drawn pictures of one prompt", gaussian),
        "usf-s3": (f"200 solver schedules of 8 calls, {pictures} captions", solver_schedule),
        "autodiffusion": (f"500 lists of 4 timesteps, {pictures} captions", timesteps),
    }


def _seconds(function: Callable[[], Any]) -> float:
    began = time.perf_counter()
    function()
    return time.perf_counter() - began


def bars(pictures: dict[str, float], path: Path) -> Path:
    """Save what each calibration costs, cheapest on top."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    ordered = dict(sorted(pictures.items(), key=lambda item: -item[1]))
    figure, axes = pyplot.subplots(figsize=(7, 0.4 * len(ordered) + 1), dpi=110)
    axes.bar_label(axes.barh(list(ordered), list(ordered.values())), fmt="%.0f", padding=3, fontsize=8)
    axes.set(xlabel=f"pictures of {PICTURE_STEPS} steps that could be drawn meanwhile", title=MODEL)
    axes.margins(x=0.12)
    figure.tight_layout()
    figure.savefig(path)
    pyplot.close(figure)
    return path


def bench(out_dir: Path) -> dict[str, Any]:
    """Do every calibration once, on all cores.

    Args:
        out_dir: Where the picture is written.

    Returns:
        `columns`, `rows`, `notes` and `picture`, as `benchmarks/run.py` expects.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(os.cpu_count() or 1)
    try:
        pipe, captions = zoo.load(MODEL), zoo.held_out(8).captions
        zoo.generate(pipe, captions, 2, GUIDANCE)  # the first call of a process is slower
        one = _seconds(lambda: zoo.generate(pipe, captions, PICTURE_STEPS, GUIDANCE)) / len(captions)
        todo = tqdm(tasks().items(), desc="calibrations")
        took = {name: (what, _seconds(work)) for name, (what, work) in todo}
    finally:
        torch.set_num_threads(threads)
    rows = [[name, what, f"{s:.0f} s", f"{s / one:.0f}"] for name, (what, s) in took.items()]
    notes = (
        f"What the pages and the command line suggest, {MODEL}, guidance {GUIDANCE:g}, {os.cpu_count()} threads. Last "
        f"column: how many pictures of {PICTURE_STEPS} steps the same model draws in that time, in batches of "
        f"{len(captions)}. All of them show progress and go on where they were stopped."
    )
    columns = ["Method", "What is done once", "Time", "In pictures"]
    picture = bars({name: s / one for name, (_, s) in took.items()}, Path(out_dir) / "calibrations.png")
    return {"columns": columns, "rows": rows, "notes": notes, "picture": picture}
