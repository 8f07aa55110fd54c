"""DPM-OT: samples between the modes of a ring of Gaussians, from the transport and from noise; exact denoiser."""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any

import diffusers
import torch

from diffusers_ext import SemiDiscreteOT
from diffusers_ext.registry import MethodRecord
from diffusers_ext.schedulers._start import node_levels
from diffusers_ext.zoo.analytic import AnalyticDenoiser, GaussianMixture, schedule


MODES, RADIUS, STD = 8, 2.0, 0.05
TARGETS, POINTS, STEPS, LEFT = 512, 4000, 20, 5
OPTIONS = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "timestep_spacing": "trailing"}
PEERS = ("DDIM", "DPMSolverMultistep", "UniPCMultistep")


def ring() -> GaussianMixture:
    angle = torch.arange(MODES).double() * 2 * math.pi / MODES
    return GaussianMixture(RADIUS * torch.stack([angle.cos(), angle.sin()], 1), STD**2)


def make(name: str, steps: int):
    scheduler = getattr(diffusers, f"{name}Scheduler")(**OPTIONS)
    if name == "DDIM":
        scheduler.register_to_config(clip_sample=False)
    scheduler.set_timesteps(steps)
    return scheduler


def run(scheduler, data: GaussianMixture, x: torch.Tensor, first: int = 0, eta: float = 0.0) -> torch.Tensor:
    model = AnalyticDenoiser(data, schedule("sd"), "epsilon")
    extra = {"eta": eta, "generator": torch.Generator().manual_seed(7)} if eta else {}
    for t in scheduler.timesteps[first:]:
        x = scheduler.step(model(x, t), t, x, return_dict=False, **extra)[0]
    return x


def scatter(clouds: dict[str, torch.Tensor], path: Path) -> Path:
    """Save the points of every run."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(clouds), figsize=(2.6 * len(clouds), 3.4), dpi=120)
    for cell, (label, points) in zip(axes, clouds.items()):
        cell.scatter(*points[:1500].T, s=1)
        cell.set(title=label, xlim=(-2.6, 2.6), ylim=(-2.6, 2.6), xticks=[], yticks=[], aspect="equal")
        cell.title.set_fontsize(8)
    figure.tight_layout(rect=(0, 0, 1, 0.96))
    figure.savefig(path)
    pyplot.close(figure)
    return path


def bench(record: MethodRecord, out_dir: Path) -> dict[str, Any]:
    """Rows per run: model calls, share of points far from every mode, number of different points."""
    data, base = ring(), make("DDIM", STEPS)
    levels, first = node_levels(base), STEPS - LEFT
    clean = data.sample(TARGETS, torch.Generator().manual_seed(3))
    began = time.process_time()
    ot = SemiDiscreteOT.from_latents(clean, levels[first], seed=4).fit(progress=False)
    fit_time, worst = time.process_time() - began, (ot.masses(10**5) * TARGETS - 1).abs().max().item()
    noise = torch.randn(POINTS, 2, generator=torch.Generator().manual_seed(5), dtype=torch.float64)

    def begin(step: int) -> torch.Tensor:
        return ot.start(noise, levels[step], torch.Generator().manual_seed(6))

    runs = {
        f"{name} from noise, {n} calls": (n, run(make(name, n), data, noise))
        for name in PEERS
        for n in (LEFT, 10, STEPS)
    }
    runs[f"OT start, DDIM, {LEFT} calls"] = (LEFT, run(base, data, begin(first), first))
    runs[f"OT start a step earlier, DDIM, {LEFT + 1} calls"] = (
        LEFT + 1, run(make("DDIM", STEPS), data, begin(first - 1), first - 1)
    )  # fmt: skip
    runs[f"OT start, DDIM with eta 1, {LEFT} calls"] = (
        LEFT, run(make("DDIM", STEPS), data, begin(first), first, eta=1.0)
    )  # fmt: skip
    rows = []
    for label, (calls, x) in runs.items():
        outside = (torch.cdist(x, data.means).min(1).values > 4 * STD).double().mean().item()
        rows.append([label.rsplit(",", 1)[0], calls, f"{outside:.1%}", len(torch.unique(x.round(decimals=6), dim=0))])
    shown = (f"DDIM from noise, {LEFT} calls", "DDIM from noise, 10 calls", *list(runs)[-3:])
    columns = ["Run", "Model calls", "Further than 4 std from every mode", f"Different points of {POINTS}"]
    notes = (
        f"{MODES} Gaussians of standard deviation {STD} on a ring of radius {RADIUS:g}, exact denoiser, the same "
        f"noise for all; {TARGETS} targets, runs from the transport make the last of {STEPS} steps. The fit took "
        f"{fit_time:.0f} s of processor time; largest error of a cell's mass on fresh noise {worst:.0%}."
    )
    clouds = {label.replace(", ", "\n"): runs[label][1] for label in shown}
    return {
        "columns": columns,
        "rows": rows,
        "notes": notes,
        "picture": scatter(clouds, out_dir / f"{record.slug}.png"),
    }
