"""DPM-OT beside whole runs: samples between the modes of a ring of Gaussians, and pictures of one caption."""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any

import diffusers
import torch

from benchmarks._common import picture_grid
from diffusers_ext import OTStart, SemiDiscreteOT, pipeline_latents, zoo
from diffusers_ext.eval import frechet_distance, psnr
from diffusers_ext.registry import MethodRecord
from diffusers_ext.schedulers._start import node_levels
from diffusers_ext.zoo.analytic import AnalyticDenoiser, GaussianMixture, schedule


MODES, RADIUS, STD = 8, 2.0, 0.05
TARGETS, POINTS, STEPS, LEFT = 512, 4000, 20, 5
OPTIONS = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "timestep_spacing": "trailing"}
PEERS = ("DDIM", "DPMSolverMultistep", "UniPCMultistep")
CAPTION = "a large red circle above a small blue star, plain white background"
PICTURES = 96


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


def ring_rows(path: Path) -> tuple[list[list[Any]], str]:
    """Runs on the ring, and the note on the fit."""
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
        different = len(torch.unique(x.round(decimals=6), dim=0))
        rows.append(
            ["ring", label.rsplit(",", 1)[0], calls, f"{outside:.1%} between the modes", f"{different} points"]
        )
    shown = (f"DDIM from noise, {LEFT} calls", "DDIM from noise, 10 calls", *list(runs)[-3:])
    scatter({label.replace(", ", "\n"): runs[label][1] for label in shown}, path)
    note = (
        f"Ring: {MODES} Gaussians of standard deviation {STD} on a ring of radius {RADIUS:g}, exact denoiser, "
        f"{POINTS} points, the same noise for all; a point further than 4 of them from every mode is between. "
        f"{TARGETS} targets, runs from the transport make the last of {STEPS} steps. The fit took {fit_time:.0f} s of "
        f"processor time; largest error of a cell's mass on fresh noise {worst:.0%}."
    )
    return rows, note


def _caption_scenes(count: int, seed: int) -> torch.Tensor:
    spec = torch.tensor(zoo.world.parse(CAPTION)).expand(count, -1)
    return zoo.world.render(spec, torch.rand(count, 17, generator=torch.Generator().manual_seed(seed)))[0]


def _draw(pipe: Any, count: int, batch: int = 32, **options: Any) -> torch.Tensor:
    parts = []
    for start in range(0, count, batch):
        noise = [torch.Generator().manual_seed(i) for i in range(start, min(start + batch, count))]
        shape = {"height": 64, "width": 64, "output_type": "pt", "guidance_scale": 3.0}
        parts.append(pipe(prompt=[CAPTION] * len(noise), generator=noise, **shape, **options).images * 2 - 1)
    return torch.cat(parts)


@torch.no_grad()
def picture_rows(count: int = PICTURES, targets: int = TARGETS) -> tuple[list[list[Any]], dict[str, torch.Tensor]]:
    """Pictures of one caption by shapes-unet, from noise and from the transport to other pictures of the caption."""
    pipe, judge = zoo.load("shapes-unet"), zoo.load_judge()
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = diffusers.DDIMScheduler.from_config(pipe.scheduler.config, timestep_spacing="trailing")
    pipe.scheduler.set_timesteps(STEPS)
    known, real = _caption_scenes(targets, 1), _caption_scenes(count, 2)
    first, earlier = (pipe.scheduler.timesteps[STEPS - n] for n in (LEFT, LEFT + 1))
    ot = SemiDiscreteOT.from_latents(pipeline_latents(pipe, known), OTStart.level_of(pipe.scheduler, first), seed=4)
    ot.fit(progress=False)
    runs = {f"DDIM from noise, {n} calls": (n, _draw(pipe, count, num_inference_steps=n)) for n in (LEFT, 10, STEPS)}
    for label, calls, step, options in (
        ("OT start, DDIM", LEFT, first, {}),
        ("OT start a step earlier, DDIM", LEFT + 1, earlier, {}),
        ("OT start, DDIM with eta 1", LEFT, first, {"eta": 1.0}),
    ):
        drawn = _draw(OTStart(pipe, ot, step), count, num_inference_steps=STEPS, **options)
        runs[f"{label}, {calls} calls"] = (calls, drawn)
    rows, spec = [], torch.tensor(zoo.world.parse(CAPTION)).expand(count, -1)
    for label, (calls, images) in runs.items():
        away = frechet_distance(judge.features(images), judge.features(real))
        right = judge.accuracy(images, spec)["all"]
        near = torch.stack([psnr(image.expand_as(known), known).max() for image in images]).mean().item()
        quality = f"Frechet distance {away:.1f}, judge {right:.0%}"
        rows.append(["shapes-unet", label.rsplit(",", 1)[0], calls, quality, f"nearest target {near:.1f} dB"])
    return rows, {label: images for label, (_, images) in runs.items()}


def bench(record: MethodRecord, out_dir: Path) -> dict[str, Any]:
    """Rows per run: model calls, how far the results are from the data, how new they are."""
    rows, note = ring_rows(out_dir / "ring.png")
    more, lines = picture_rows()
    picture = _stacked(
        out_dir / "ring.png", picture_grid(lines, out_dir / "pictures.png"), out_dir / f"{record.slug}.png"
    )
    notes = (
        f"{note} Pictures: {PICTURES} of {CAPTION!r} by shapes-unet, guidance 3, beside as many true scenes of it "
        f"(features of the judge); {TARGETS} other scenes of this caption are the targets. The last column says how "
        "close a picture is to a target: much closer than a run from noise means a copy."
    )
    columns = ["Data", "Run", "Model calls", "Off the data", "New"]
    return {"columns": columns, "rows": rows + more, "notes": notes, "picture": picture}


def _stacked(above: Path, below: Path, path: Path) -> Path:
    from PIL import Image

    parts = [Image.open(p).convert("RGB") for p in (above, below)]
    width = max(p.width for p in parts)
    page = Image.new("RGB", (width, sum(p.height for p in parts)), "white")
    for i, part in enumerate(parts):
        page.paste(part, ((width - part.width) // 2, i * parts[0].height))
    page.save(path)
    return path
