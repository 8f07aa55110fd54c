"""Schedulers: how near few steps come to the converged solution, beside diffusers' own solvers.

All solvers are driven by the same loop on the same guided model, starting noise and number of model calls. The
reference is a Runge-Kutta solution of the probability-flow ODE, checked against float64 with twice the steps.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import diffusers
import torch

from diffusers_ext import zoo
from diffusers_ext.eval import mean_psnr, paired_ratio
from diffusers_ext.prediction import NoiseSchedule, to_noise, to_x0
from diffusers_ext.registry import MethodRecord
from diffusers_ext.schedulers._common import guided_model
from diffusers_ext.zoo.analytic import rk4


CALLS = (5, 8, 10, 15, 20)
PICTURES = 16
GUIDANCE = 3.0
SEARCHED_CALLS = 8
REFERENCE_STEPS = 50  # of four calls
PEERS = ("DDIM", "Euler", "Heun", "DPM++ 2M", "UniPC")
CLASSES = {
    "DDIM": ("DDIMScheduler", {}),
    "Euler": ("EulerDiscreteScheduler", {}),
    "Heun": ("HeunDiscreteScheduler", {}),
    "DPM++ 2M": ("DPMSolverMultistepScheduler", {}),
    "DPM++ 2M Karras": ("DPMSolverMultistepScheduler", {"use_karras_sigmas": True}),
    "DEIS multistep": ("DEISMultistepScheduler", {}),
    "UniPC": ("UniPCMultistepScheduler", {}),
}
# diffusers' Karras levels are those of VP models, and its DDIM of them too: Euler is DDIM for flow models
FLOW_CLASSES = {
    "Euler": ("FlowMatchEulerDiscreteScheduler", {}),
    "Heun": ("FlowMatchHeunDiscreteScheduler", {}),
    **{
        name: (CLASSES[name][0], {"use_flow_sigmas": True, "prediction_type": "flow_prediction"})
        for name in ("DPM++ 2M", "DEIS multistep", "UniPC")
    },
}


class NoSuchSteps(ValueError):
    """A solver takes no number of steps that fits a number of model calls."""


@dataclass
class Bed:
    """A shipped model with everything a comparison needs."""

    name: str
    captions: list[str]
    pipe: Any
    noise: torch.Tensor
    model: Callable
    schedule: NoiseSchedule
    prediction: str
    specs: torch.Tensor
    reference: torch.Tensor = field(default=None)

    @property
    def flow(self) -> bool:
        return self.schedule.family == "flow"

    @functools.cached_property
    def true_pictures(self) -> torch.Tensor:
        """The pictures of `reference`."""
        return decode(self, self.reference)


@dataclass(frozen=True)
class Outcome:
    """What a solver made of the noise of a bed: calls spent, pictures, and how near they are to the reference."""

    calls: int
    images: torch.Tensor
    error: float
    psnr: float
    accuracy: float


def make_bed(name: str, pictures: int, dtype: torch.dtype = torch.float32) -> Bed:
    """Model, captions and starting noise; the noise of a picture does not depend on their number."""
    pipe, scenes = zoo.load(name, dtype=dtype), zoo.held_out(pictures)
    latents = [torch.randn(4, 16, 16, generator=torch.Generator().manual_seed(i)) for i in range(pictures)]
    noise = torch.stack(latents).to(dtype)
    schedule = NoiseSchedule.from_scheduler(pipe.scheduler)
    if schedule.family == "flow":
        noise = pipe._pack_latents(noise, *noise.shape)
    prediction = "flow_prediction" if schedule.family == "flow" else pipe.scheduler.config.prediction_type
    model = guided_model(pipe, scenes.captions, GUIDANCE)
    return Bed(name, list(scenes.captions), pipe, noise, model, schedule, prediction, scenes.specs)


@torch.no_grad()
def reference(bed: Bed, steps: int) -> torch.Tensor:
    """The converged solution: Runge-Kutta from the noisiest level to the cleanest, then its denoised sample."""
    log_snr = bed.schedule.table[[-1, 0]] if bed.schedule.table is not None else torch.tensor([-13.8, 6.9]).double()
    start, end = (torch.atan(torch.exp(-lam)) for lam in log_snr)

    def both(z: torch.Tensor, phi: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        lam = -torch.log(torch.tan(phi))
        alpha, sigma = (v.to(z) for v in bed.schedule.levels(lam))
        x = z * torch.hypot(alpha, sigma)
        output = bed.model(x, bed.schedule.timestep(lam).to(z))
        return to_noise(output, x, alpha, sigma, bed.prediction), to_x0(output, x, alpha, sigma, bed.prediction)

    def velocity(z: torch.Tensor, phi: torch.Tensor) -> torch.Tensor:
        noise, x0 = both(z, phi)
        return torch.cos(phi).to(z) * noise - torch.sin(phi).to(z) * x0

    z = rk4(velocity, bed.noise, torch.linspace(0, 1, steps + 1).double() * (end - start) + start)
    return both(z, end)[1]


def float64_gap(name: str) -> float:
    """Root mean square difference between the reference and a float64 one with twice the steps, on two pictures."""
    single, double = make_bed(name, 2), make_bed(name, 2, torch.float64)
    gap = reference(single, REFERENCE_STEPS) - reference(double, 2 * REFERENCE_STEPS)
    return gap.pow(2).mean().sqrt().item()


def peer(name: str, bed: Bed) -> Any | None:
    """One of diffusers' schedulers for the model of `bed`; None where diffusers has none for flow models."""
    made, options = (FLOW_CLASSES if bed.flow else CLASSES).get(name, (None, {}))
    if made is None:
        return None
    public = getattr(diffusers, made)
    return public(**options) if bed.flow else public.from_config(bed.pipe.scheduler.config, **options)


def searched(bed: Bed, images: int = 4, evaluations: int = 48) -> Any:
    """USF with schedules found on other captions; named solvers above `SEARCHED_CALLS` calls."""
    from diffusers_ext.schedulers.usf_s3 import SolverScheduleSearch, USFScheduler, pipeline_fitness

    scheduler = USFScheduler.from_config(bed.pipe.scheduler.config)
    fitness = pipeline_fitness(bed.pipe, zoo.scenes(images, 1).captions, GUIDANCE, seed=10**6, size=64)
    for calls in (n for n in CALLS if n <= SEARCHED_CALLS):
        starts = [scheduler.preset_schedule(calls, name) for name in ("unipc_bh2", "dpmpp_2m", "dpmpp_3m")]
        search = SolverScheduleSearch(fitness, starts, calls, analytic_first_step=not bed.flow, screen=4, stage=15)
        scheduler.load_schedule(search.run(evaluations, progress=False))
    return scheduler


class FittedPerSteps:
    """OLSS fitted to 50 first-order steps of eight other captions, once for each number of steps."""

    def __init__(self, bed: Bed, images: int = 8, teacher_steps: int = 50):
        from diffusers_ext.schedulers.olss import OLSSRecorder

        teacher = peer("Euler" if bed.flow else "DDIM", bed)
        self._recorder, self._students, self._now = OLSSRecorder(teacher), {}, None
        model = guided_model(bed.pipe, zoo.scenes(images, 1).captions, GUIDANCE)
        x = torch.randn(images, *bed.noise.shape[1:], generator=torch.Generator().manual_seed(10**6))
        spaced = {"sigmas": torch.linspace(1, 1 / teacher_steps, teacher_steps).tolist()}
        self._recorder.set_timesteps(**(spaced if bed.flow else {"num_inference_steps": teacher_steps}))
        for t in self._recorder.timesteps:
            x = self._recorder.step(model(x, t), t, x, return_dict=False)[0]

    def set_timesteps(self, num_inference_steps: int) -> None:
        """Fit for this number of steps, unless it has been done."""
        from diffusers_ext.schedulers.olss import OLSSScheduler

        if num_inference_steps not in self._students:
            self._students[num_inference_steps] = OLSSScheduler.fit(self._recorder, num_inference_steps)
        self._now = self._students[num_inference_steps]
        self._now.set_timesteps(num_inference_steps)

    def __getattr__(self, name: str):
        return getattr(self.__dict__["_now"], name)


@torch.no_grad()
def variants(record: MethodRecord, bed: Bed) -> dict[str, Any]:
    """The method's scheduler for the model of `bed`, by label."""
    config = bed.pipe.scheduler.config
    name = record.public.__name__.removesuffix("Scheduler")
    if record.slug == "olss":
        return {f"{name}, fitted per steps": FittedPerSteps(bed)}
    if record.slug == "usf-s3":
        return {f"{name}, searched up to {SEARCHED_CALLS}": searched(bed), name: record.public.from_config(config)}
    if record.slug == "evodiff":
        even = record.public.from_config(config, skip_type="logSNR")
        return {name: record.public.from_config(config), f"{name}, logSNR": even}
    if record.slug != "dpm-solver-v3":
        return {name: record.public.from_config(config)}
    from diffusers_ext.schedulers._ems import DATA, GRID, calibrate_ems, clean_latents

    scenes = zoo.held_out(DATA)
    latents = clean_latents(bed.pipe, scenes.images)
    ems = calibrate_ems(bed.pipe, latents, scenes.captions, GUIDANCE, estimator="fd", num_grid=GRID)
    options = {"final_sigmas_type": "zero"}
    with_ems = record.public.from_config(config, **options).load_ems(ems)
    return {
        "DPM-Solver-v3": with_ems,
        "DPM-Solver-v3, degenerate": record.public.from_config(config, degenerated=True, **options),
    }


@torch.no_grad()
def run(scheduler: Any, bed: Bed, calls: int) -> tuple[torch.Tensor, int]:
    """Latents after at most `calls` model calls, and the number of calls made."""
    for steps in range(calls, 0, -1):
        if isinstance(scheduler, diffusers.FlowMatchEulerDiscreteScheduler):
            scheduler.set_timesteps(sigmas=torch.linspace(1, 1 / steps, steps).tolist())
        else:
            try:
                scheduler.set_timesteps(steps)
            except ValueError:  # a method made for other numbers of steps takes the next lower one
                continue
        if len(scheduler.timesteps) <= calls:
            break
    else:
        raise NoSuchSteps(f"{type(scheduler).__name__} takes no number of steps that fits {calls} model calls")
    x = bed.noise * getattr(scheduler, "init_noise_sigma", 1.0)
    for t in scheduler.timesteps:
        inputs = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
        x = scheduler.step(bed.model(inputs, t), t, x, return_dict=False)[0]
    return x, len(scheduler.timesteps)


@torch.no_grad()
def decode(bed: Bed, latents: torch.Tensor) -> torch.Tensor:
    """Pictures `[n, 3, 64, 64]` in [-1, 1]."""
    vae = bed.pipe.vae
    if bed.flow:
        latents = bed.pipe._unpack_latents(latents, 64, 64, bed.pipe.vae_scale_factor)
    return vae.decode(latents / vae.config.scaling_factor + (vae.config.shift_factor or 0)).sample.clamp(-1, 1)


def plain(record: MethodRecord) -> Any:
    """The method's scheduler without a model, for 20 steps."""
    if record.slug == "olss":
        k = 20
        return record.public(timesteps=list(range(950, -1, -50)), wx=[1.0] * k, we=[[0.1] * (i + 1) for i in range(k)])
    options = {
        "dpm-solver-v3": {"degenerated": True},
        "free-parameter-solver": {"preset": "custom", "n0": 30, "rho0": 7.0, "stop_index": 25},
    }
    return record.public(**options.get(record.slug, {}))


def overhead(record: MethodRecord) -> str:
    """Processor time of a run's steps beside diffusers' DPM-Solver++, latents 4 x 128 x 128, no model."""
    x = torch.randn(1, 4, 128, 128)

    def steps_of(scheduler: Any) -> Callable[[], None]:
        def go() -> None:
            scheduler.set_timesteps(20)
            for t in scheduler.timesteps:
                scheduler.step(x, t, x, return_dict=False)

        return go

    ours, theirs = steps_of(plain(record)), steps_of(diffusers.DPMSolverMultistepScheduler())
    return str(paired_ratio(ours, theirs, pairs=5, warmup=1, clock=time.process_time))


@functools.cache
def compared(name: str, pictures: int, calls: tuple[int, ...]) -> tuple[Bed, list[list[Any]], dict, str]:
    """What every method is compared with on one model, once per process: reference, rows and pictures of the peers."""
    bed = make_bed(name, pictures)
    bed.reference = reference(bed, REFERENCE_STEPS)
    peers = {label: scheduler for label in PEERS if (scheduler := peer(label, bed)) is not None}
    drawn: dict = {}
    return bed, list(rows_of(bed, peers, calls, drawn)), drawn, f"{name} {float64_gap(name):.1e}"


@functools.cache
def judge() -> Any:
    """The classifier that reads pictures, loaded once."""
    return zoo.load_judge()


def outcome(scheduler: Any, bed: Bed, calls: int) -> Outcome:
    """Run a solver with at most `calls` model calls and compare its latents and pictures with the reference."""
    latents, made = run(scheduler, bed, calls)
    images = decode(bed, latents)
    error = (latents - bed.reference).pow(2).mean().sqrt().item()
    accuracy = judge().accuracy(images, bed.specs)["all"]
    return Outcome(made, images, error, mean_psnr(images, bed.true_pictures), accuracy)


def rows_of(bed: Bed, solvers: dict[str, Any], calls: Sequence[int], pictures: dict) -> Iterator[list[Any]]:
    """A row per solver: latent error and PSNR at each number of calls, judge at the fewest."""
    pictures["reference"] = (bed.true_pictures, None)
    for label, scheduler in solvers.items():
        found = [outcome(scheduler, bed, n) for n in calls]
        pictures[label] = (found[0].images, found[0].psnr)
        made = ["" if o.calls == n else f", {o.calls} calls" for o, n in zip(found, calls)]
        cells = [f"{o.error:.4f} ({o.psnr:.1f} dB{note})" for o, note in zip(found, made)]
        yield [bed.name, label, *cells, f"{found[0].accuracy:.1%}", f"{found[-1].accuracy:.1%}"]


def reference_row(bed: Bed, calls: Sequence[int]) -> list[Any]:
    """What the judge reads in the converged pictures."""
    score = f"{judge().accuracy(bed.true_pictures, bed.specs)['all']:.1%}"
    return [bed.name, "reference", *[""] * len(calls), score, score]


def _grid(pictures: dict[str, tuple[torch.Tensor, float | None]], ours: Sequence[str], calls: int, path: Path) -> Path:
    """Reference, best peer and the method at the fewest calls, one line each."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    best = max((k for k in pictures if k not in ours and k != "reference"), key=lambda k: pictures[k][1])
    lines = {"reference\n200 calls": pictures["reference"][0]}
    for label in (best, ours[0]):
        lines[f"{label}\n{calls} calls, {pictures[label][1]:.1f} dB"] = pictures[label][0]
    count = min(8, len(pictures["reference"][0]))
    figure, axes = pyplot.subplots(
        len(lines), count, figsize=(1.1 * count + 1.4, 1.2 * len(lines)), dpi=120, squeeze=False
    )
    for line, (label, images) in zip(axes, lines.items()):
        for cell, image in zip(line, images):
            cell.imshow(((image.permute(1, 2, 0) + 1) / 2).clamp(0, 1).numpy(), interpolation="nearest")
            cell.set(xticks=[], yticks=[])
        line[0].set_ylabel(label, fontsize=7)
    figure.tight_layout(pad=0.4)
    figure.savefig(path)
    pyplot.close(figure)
    return path


def bench(
    record: MethodRecord,
    out_dir: Path,
    pictures: int = PICTURES,
    calls: Sequence[int] = CALLS,
    models: Sequence[str] = ("shapes-unet", "shapes-dit"),
) -> dict[str, Any]:
    """Measure a scheduler.

    Args:
        record: Its catalogue record.
        out_dir: Where the picture is written.
        pictures: Captions to draw.
        calls: Numbers of model calls (with guidance inside), fewest first.
        models: Shipped models; those whose prediction type the method does not support are left out.

    Returns:
        `columns`, `rows`, `notes` and `picture`, as `benchmarks/run.py` expects.
    """
    rows, gaps, picture = [], [], None
    for name in models:
        bed, peer_rows, drawn, gap = compared(name, pictures, tuple(calls))
        if bed.prediction not in record.predictions:
            continue
        drawn = dict(drawn)
        own = variants(record, bed)
        rows += [*rows_of(bed, own, calls, drawn), *peer_rows, reference_row(bed, calls)]
        gaps.append(gap)
        picture = picture or _grid(drawn, list(own), calls[0], Path(out_dir) / f"{record.slug}.png")
    columns = ["Model", "Sampler", *(f"{n} calls" for n in calls), f"Judge, {calls[0]}", f"Judge, {calls[-1]}"]
    notes = (
        "Root mean square error of the latents to the converged solution (200 calls) and PSNR of the pictures to its "
        f"picture; {pictures} held-out captions, guidance {GUIDANCE:g}, the same noise for all. Judge: attributes "
        "right at the fewest and the most calls. Error of the reference itself, by float64 with 400 calls: "
        f"{', '.join(gaps)}. Processor time of the steps alone on 4 x 128 x 128 latents, beside diffusers' "
        f"DPM-Solver++: {overhead(record)}."
    )
    return {"columns": columns, "rows": rows, "notes": notes, "picture": picture}
