"""All caches and their peers in one picture: how much of the time is left, and how near the pictures stay.

Every setting of every cache of the catalogue, diffusers' own caches, the published DeepCache, tomesd and cache-dit,
and the plain alternative to all of them: fewer steps.
"""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

import diffusers_ext
from benchmarks.bac import ORDERS, UPDATES
from benchmarks.cache import INTERVALS, Setting, dbcache, ending, helper, own_settings
from diffusers_ext import BACStatistics, measure_bac, zoo
from diffusers_ext.eval import count_macs, mean_psnr, paired_ratio
from diffusers_ext.registry import list_methods


STEPS = {"shapes-unet": 30, "shapes-dit": 20}
FEWER = {"shapes-unet": (24, 18, 12, 9, 6), "shapes-dit": (16, 12, 9, 6)}
OURS, DIFFUSERS, NOTHING = "diffusers-ext", "diffusers", "-"
PICTURES, TIMED_PICTURES, PAIRS = 8, 4, 3
# Captions on which MagCache and BAC are calibrated, none of those that are measured.
CALIBRATION, CALIBRATION_START = 4, 1000
COLUMNS = ["Model", "Library", "Setting", "MACs", "Time", "PSNR to the full run", "Judge: all attributes"]


@dataclass(frozen=True)
class Point:
    """One measured setting."""

    library: str
    method: str
    setting: str
    macs: float
    time: Any
    psnr: float
    accuracy: float


@contextmanager
def _merged_tokens(pipe: Any, ratio: float) -> Iterator[None]:
    """Token merging for Stable Diffusion."""
    import tomesd

    tomesd.apply_patch(pipe, ratio=ratio)
    try:
        yield
    finally:
        tomesd.remove_patch(pipe)


def _upstream() -> dict[str, list[Any]]:
    """Configs of diffusers' caches for transformers, by name; at least three strengths where they have a dial."""
    from diffusers.hooks import FirstBlockCacheConfig, TaylorSeerCacheConfig

    return {
        "FirstBlockCache": [FirstBlockCacheConfig(threshold=x) for x in (0.06, 0.08, 0.1, 0.13, 0.2)],
        "TaylorSeer": [
            TaylorSeerCacheConfig(cache_interval=n, disable_cache_before_step=2, max_order=1) for n in INTERVALS
        ],
    }


class MagCache:
    """diffusers' MagCache with ratios that it measures on this model, steps and guidance, before its first use.

    Args:
        steps: Of every run.
    """

    def __init__(self, steps: int):
        self.steps, self.ratios = steps, []

    def turned_on(self, pipe: Any, skipped: int, retention: float = 0.2) -> AbstractContextManager:
        """MagCache on a pipeline, skipping at most so many steps in a row after a share of them in full."""
        from diffusers.hooks import MagCacheConfig

        self.ratios = self.ratios or self._calibrated(pipe)
        given = {"mag_ratios": self.ratios, "num_inference_steps": self.steps}
        return diffusers_ext.apply(pipe, MagCacheConfig(max_skip_steps=skipped, retention_ratio=retention, **given))

    def _calibrated(self, pipe: Any) -> list[float]:
        """Mean of the ratios of conditional and unconditional calls."""
        from diffusers.hooks import MagCacheConfig

        captions = zoo.held_out(CALIBRATION, start=CALIBRATION_START).captions
        with diffusers_ext.apply(pipe, MagCacheConfig(calibrate=True, num_inference_steps=self.steps)) as handle:
            zoo.generate(pipe, captions, num_inference_steps=self.steps)
            ratios = handle.summary()["mag-cache"]["mag_ratios"]
        return torch.tensor(ratios).mean(0).tolist()


class CalibratedBAC:
    """BAC with steps that it chooses on this model, number of steps and guidance, before its first use.

    Args:
        steps: Of every run.
    """

    def __init__(self, steps: int):
        self.steps, self.statistics = steps, None

    def settings(self) -> Iterator[tuple[str, str, Setting]]:
        """Three strengths, repeated and forecast."""
        for order in ORDERS:
            for updates in UPDATES:
                turned_on = functools.partial(self.turned_on, updates=updates, order=order)
                yield OURS, f"bac, calibrated{ending(order)}", Setting(f"M = {updates}", turned_on)

    def turned_on(self, pipe: Any, updates: int, order: float) -> AbstractContextManager:
        """BAC with so many updates on a pipeline."""
        self.statistics = self.statistics or self._measured(pipe)
        return diffusers_ext.apply(pipe, replace(self.statistics.config(updates), forecast_order=order))

    def _measured(self, pipe: Any) -> BACStatistics:
        def draw(seed: int) -> None:
            captions = zoo.held_out(1, start=seed).captions
            zoo.generate(pipe, captions, num_inference_steps=self.steps, seed=seed)

        return measure_bac(pipe, draw, CALIBRATION, calibration_seed=CALIBRATION_START, progress=False)


def settings_of(name: str) -> Iterator[tuple[str, str, Setting]]:
    """(library, method, setting) of all caches that run on a shipped model."""
    target = "unet" if name == "shapes-unet" else "mmdit"
    for record in list_methods(kind="cache"):
        if {target, "any"} & set(record.targets):
            for setting in own_settings(record):
                family = f", {setting.family}" if setting.family else ""
                yield OURS, record.slug + family, replace(setting, name=setting.name.removesuffix(family))
    if target == "unet":
        for n in INTERVALS:
            yield "DeepCache (PyPI)", "deepcache", Setting(f"N = {n}", lambda pipe, n=n: helper(pipe, n))
        for ratio in (0.25, 0.5, 0.75):
            merged = Setting(f"{ratio:.0%} of the tokens", lambda pipe, r=ratio: _merged_tokens(pipe, r))
            yield "tomesd", "token merging", merged
        return
    yield from CalibratedBAC(STEPS[name]).settings()
    for method, configs in _upstream().items():
        for config in configs:
            dial = getattr(config, "threshold", None) or getattr(config, "cache_interval", None)
            yield DIFFUSERS, method, Setting(f"{dial:g}", lambda pipe, c=config: diffusers_ext.apply(pipe, c))
    mag = MagCache(STEPS[name])
    for skipped in (1, 2, 3):
        yield DIFFUSERS, "MagCache", Setting(f"K = {skipped}", lambda pipe, k=skipped: mag.turned_on(pipe, k))
    for threshold in (0.06, 0.08, 0.12, 0.24):
        yield "cache-dit", "DBCache", Setting(f"{threshold:g}", lambda pipe, x=threshold: dbcache(pipe, x))


class Bench:
    """A shipped model with its full run, against which settings are measured."""

    def __init__(self, name: str, pictures: int):
        self.name, self.steps = name, STEPS[name]
        self.pipe, self.scenes, self.judge = zoo.load(name), zoo.held_out(pictures), zoo.load_judge()
        if name == "shapes-unet":
            from diffusers import DDIMScheduler

            self.pipe.scheduler = DDIMScheduler.from_config(self.pipe.scheduler.config)
        self.short = self.scenes.captions[:TIMED_PICTURES]
        self.full = self.draw(self.steps)
        self.full_macs = count_macs(lambda: self.run(self.steps))

    def draw(self, steps: int) -> torch.Tensor:
        return zoo.generate(self.pipe, self.scenes.captions, num_inference_steps=steps)

    def run(self, steps: int) -> None:
        zoo.generate(self.pipe, self.short, num_inference_steps=steps)

    def measure(
        self, library: str, method: str, setting: str, turned_on: Callable[[], AbstractContextManager], steps: int
    ) -> Point:
        """Pictures, operations and time under `turned_on`, beside the full run."""

        def candidate() -> None:
            with turned_on():
                self.run(steps)

        with turned_on():
            images = self.draw(steps)
        macs = count_macs(candidate) / self.full_macs
        # Processor time of this process: other load on the machine must not decide.
        timing = paired_ratio(candidate, lambda: self.run(self.steps), pairs=PAIRS, clock=time.process_time)
        accuracy = self.judge.accuracy(images, self.scenes.specs)["all"]
        return Point(library, method, setting, macs, timing, mean_psnr(images, self.full), accuracy)

    def points(self) -> Iterator[Point]:
        """Every cache and its peers, then fewer steps."""
        for library, method, setting in settings_of(self.name):
            yield self.measure(library, method, setting.name, lambda s=setting: s.turned_on(self.pipe), self.steps)
        for steps in FEWER[self.name]:
            yield self.measure(NOTHING, "fewer steps", f"{steps} steps", nullcontext, steps)


def frontier(points: list[Point]) -> list[Point]:
    """Points that no other one beats in both time and PSNR, fastest first; settings that changed nothing aside."""
    best, kept = -math.inf, []
    for point in sorted(points, key=lambda p: (p.time.ratio, -p.psnr)):
        if best < point.psnr < math.inf:
            best = point.psnr
            kept.append(point)
    return kept


def _row(name: str, p: Point) -> list[str]:
    shown = f"{p.method}, {p.setting}"
    return [name, p.library, shown, f"{p.macs:.3f}", str(p.time), f"{p.psnr:.2f} dB", f"{p.accuracy:.0%}"]


def plot(panels: dict[str, list[Point]], path: Path) -> Path:
    """PSNR over the share of time, one panel per model; the frontier is a line."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(panels), figsize=(8 * len(panels), 4.8), dpi=110, squeeze=False)
    for panel, (name, points) in zip(axes[0], panels.items()):
        families = dict.fromkeys((p.library, p.method) for p in points)
        for place, family in enumerate(families):
            own = [(p.time.ratio, p.psnr) for p in points if (p.library, p.method) == family]
            marker, hollow = "osv^D<>p*"[place % 9], family[0] != OURS
            label = ", ".join(part for part in family if part != NOTHING)
            colour = pyplot.get_cmap("tab10")(place % 10)
            panel.plot(*zip(*own), marker, color=colour, mfc="none" if hollow else colour, label=label)
        panel.plot(*zip(*((p.time.ratio, p.psnr) for p in frontier(points))), color="0.6", lw=1, zorder=0)
        panel.set(xlabel="share of the full run's time", ylabel="PSNR to the full run, dB", title=name)
        panel.grid(alpha=0.3)
        panel.legend(frameon=False, fontsize=7, loc="upper left", bbox_to_anchor=(1, 1))
    figure.tight_layout()
    figure.savefig(path)
    pyplot.close(figure)
    return path


def _verdict(name: str, points: list[Point]) -> str:
    listed = "; ".join(
        f"{p.time.ratio:.2f} of the time at {p.psnr:.1f} dB: {p.method} {p.setting}"
        + (f" ({p.library})" if p.library not in (OURS, NOTHING) else "")
        for p in frontier(points)
    )
    return f"Frontier on {name}: {listed}."


def bench(out_dir: Path, pictures: int = PICTURES, models: tuple[str, ...] = tuple(STEPS)) -> dict[str, Any]:
    """Measure all caches and peers on the shipped models.

    Args:
        out_dir: Where the picture is written.
        pictures: Held-out captions to draw.
        models: Shipped models.

    Returns:
        `columns`, `rows`, `notes` and `picture`, as `benchmarks/run.py` expects.
    """
    panels = {name: list(Bench(name, pictures).points()) for name in models}
    rows = [_row(name, point) for name, points in panels.items() for point in points]
    notes = (
        f"{' '.join(_verdict(name, points) for name, points in panels.items())}\n\n{pictures} held-out captions, "
        f"guidance 3; DDIM with {STEPS['shapes-unet']} steps, Euler with {STEPS['shapes-dit']}. MACs and time are "
        f"shares of the full run, of whole pipeline calls with {TIMED_PICTURES} pictures; time is processor time, the "
        "median of interleaved pairs with their smallest and largest. MagCache and BAC, where it says so, were "
        f"calibrated on {CALIBRATION} other captions."
    )
    return {"columns": COLUMNS, "rows": rows, "notes": notes, "picture": plot(panels, out_dir / "frontier.png")}
