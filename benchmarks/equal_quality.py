"""Caches against their peers at equal quality: our settings, each beside the cheapest one of a peer that is as close.

Peers are the published helper of DeepCache, and diffusers' first-block cache, MagCache and TaylorSeer, at many
settings of the dials that they have. Ours and the peer's run in turn, so that the ratio of their times is free of what
else the machine does.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import diffusers_ext
from benchmarks.bac import UPDATES
from benchmarks.cache import FORECAST, TURNS, ending, first_block, helper, in_turns, tuned
from benchmarks.frontier import CalibratedBAC, MagCache
from diffusers_ext import DeepCacheConfig, FasterDiffusionConfig, FeatureInheritanceConfig, zoo
from diffusers_ext.eval import count_macs, mean_psnr, paired_ratio
from diffusers_ext.registry import get_method


STEPS = {"shapes-unet": 50, "shapes-dit": 20}
PICTURES, PAIRS = 16, 7
# The transformer is so small that with fewer its calls into torch take as long as its sums.
TIMED_PICTURES = {"shapes-unet": 4, "shapes-dit": 16}
# Two settings that compute the same differ by rounding.
SAME = 0.05
COLUMNS = ["Model", "Ours", "PSNR", "MACs", "Cheapest peer as close", "PSNR", "MACs", "Our time / peer's"]


@dataclass(frozen=True)
class Setting:
    """A setting by name, what turns it on for a pipeline, and once measured its PSNR and share of operations."""

    name: str
    turned_on: Callable[[Any], AbstractContextManager]
    psnr: float = float("inf")
    macs: float = 1.0

    def figures(self) -> list[str]:
        """As in the table."""
        return [self.name, f"{self.psnr:.2f} dB", f"{self.macs:.3f}"]


NOTHING = Setting("none: without a cache", lambda pipe: nullcontext())


def ours(name: str) -> Iterator[Setting]:
    """Settings of this package, chosen on captions that are not measured."""

    def setting(label: str, config: Any) -> Setting:
        return Setting(label, lambda pipe: diffusers_ext.apply(pipe, config))

    if name == "shapes-unet":
        yield setting("deepcache, N = 2", DeepCacheConfig(2))
        for n in (2, 3, 5):
            yield setting(f"deepcache, N = {n}{FORECAST}", DeepCacheConfig(n, forecast_order=1))
        for n in (2, 3):
            yield setting(f"a-sdm, N = {n}{FORECAST}", FeatureInheritanceConfig(interval=n, forecast_order=1))
        for k in (2, 3):
            yield setting(f"faster-diffusion, key steps {k}, parabola", FasterDiffusionConfig(k, forecast_order=2))
        return
    for label, config in tuned(get_method("delta-dit"))[1].items():
        yield setting(f"delta-dit, {label}", config)
    for turn in TURNS:
        label, config = in_turns(get_method("ras"), *turn)
        if config.reuse_text:
            yield setting(f"ras, {label}", config)
    bac = CalibratedBAC(STEPS[name])
    for updates in UPDATES:
        yield Setting(f"bac, calibrated, M = {updates}{ending(0.5)}", lambda p, m=updates: bac.turned_on(p, m, 0.5))


def peers(name: str) -> Iterator[Setting]:
    """Settings of others over the dials that they have."""
    if name == "shapes-unet":
        for n, branch in [(2, b) for b in range(9)] + [(3, b) for b in (0, 3, 6, 8)]:
            yield Setting(f"PyPI DeepCache, N = {n}, branch {branch}", lambda p, n=n, b=branch: helper(p, n, b))
        return
    from diffusers.hooks import TaylorSeerCacheConfig

    for x in (0.06, 0.065, 0.07, 0.08, 0.09, 0.1, 0.11, 0.13, 0.16, 0.2, 0.25, 0.3):
        yield Setting(f"diffusers FirstBlockCache, threshold {x}", lambda p, x=x: first_block(p, x))
    mag = MagCache(STEPS[name])
    for skipped in (1, 2, 3):
        for share in (0.15, 0.2, 0.25, 0.3, 0.35, 0.4, 0.45, 0.5):
            label = f"diffusers MagCache, K = {skipped}, retention {share}"
            yield Setting(label, lambda p, k=skipped, r=share: mag.turned_on(p, k, r))
    for n in (2, 3):
        for start in (4, 5, 6, 7, 8):
            config = TaylorSeerCacheConfig(cache_interval=n, disable_cache_before_step=start, max_order=1)
            label = f"diffusers TaylorSeer, interval {n}, from step {start}"
            yield Setting(label, lambda p, c=config: diffusers_ext.apply(p, c))


class Bench:
    """A shipped model and its pictures without a cache."""

    def __init__(self, name: str):
        self.name, self.pipe = name, zoo.load(name)
        if name == "shapes-unet":
            from diffusers import DDIMScheduler

            self.pipe.scheduler = DDIMScheduler.from_config(self.pipe.scheduler.config)
        self.reference = self.draw(PICTURES)
        self.full = count_macs(lambda: self.draw(1))

    def draw(self, count: int) -> torch.Tensor:
        """Pictures of the first captions."""
        return zoo.generate(self.pipe, zoo.held_out(PICTURES).captions[:count], num_inference_steps=STEPS[self.name])

    def measured(self, setting: Setting) -> Setting:
        """With its figures."""
        with setting.turned_on(self.pipe):
            psnr = mean_psnr(self.draw(PICTURES), self.reference)
            macs = count_macs(lambda: self.draw(1)) / self.full
        return Setting(setting.name, setting.turned_on, psnr, macs)

    def rows(self) -> Iterator[tuple[list[str], Any]]:
        """A row per setting of ours, and its ratio of times."""
        theirs = [NOTHING, *map(self.measured, peers(self.name))]
        for setting in map(self.measured, ours(self.name)):
            peer = cheapest(theirs, setting.psnr)
            # Processor time of this process: other load on the machine must not decide.
            ratio = paired_ratio(self._timed(setting), self._timed(peer), pairs=PAIRS, clock=time.process_time)
            yield [self.name, *setting.figures(), *peer.figures(), str(ratio)], ratio

    def _timed(self, setting: Setting) -> Callable[[], None]:
        def run() -> None:
            with setting.turned_on(self.pipe):
                self.draw(TIMED_PICTURES[self.name])

        return run


def cheapest(settings: list[Setting], psnr: float) -> Setting:
    """The one with the fewest operations among those at least as close."""
    return min((s for s in settings if s.psnr >= psnr - SAME), key=lambda s: s.macs)


def plot(measured: list[tuple[list[str], Any]], path: Path) -> Path:
    """Ratios of times with their smallest and largest; left of 1 ours is faster."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(9, 0.36 * len(measured) + 1), dpi=110)
    for place, (_, ratio) in enumerate(measured):
        axes.plot([ratio.ratio_min, ratio.ratio_max], [place, place], color="0.7", lw=3, solid_capstyle="round")
        axes.plot(ratio.ratio, place, "o", color="tab:blue")
    axes.axvline(1, color="0.4", lw=1)
    axes.set_yticks(range(len(measured)), [f"{row[1]}\nand {row[4]}" for row, _ in measured], fontsize=6)
    axes.set(xlabel="our time / the peer's, at equal quality", ylim=(len(measured) - 0.5, -0.5))
    axes.grid(axis="x", alpha=0.3)
    figure.tight_layout()
    figure.savefig(path)
    pyplot.close(figure)
    return path


def bench(out_dir: Path) -> dict[str, Any]:
    """Measure every setting; see `benchmarks/run.py` for what is returned."""
    measured = [entry for name in STEPS for entry in Bench(name).rows()]
    searched = ", ".join(f"{sum(1 for _ in peers(name))} on {name}" for name in STEPS)
    timed = ", ".join(f"{count} on {name}" for name, count in TIMED_PICTURES.items())
    notes = (
        f"{PICTURES} held-out captions, guidance 3; DDIM with 50 steps, Euler with 20. PSNR to the pictures without a "
        f"cache. MACs are shares of the run without one. Peer settings searched: {searched}. The last column is "
        f"processor time of ours over the peer's, the median of {PAIRS} interleaved pairs with their smallest and "
        f"largest, pictures at once: {timed}. BAC and MagCache were calibrated on four other captions."
    )
    rows = [row for row, _ in measured]
    return {"columns": COLUMNS, "rows": rows, "notes": notes, "picture": plot(measured, out_dir / "equal_quality.png")}
