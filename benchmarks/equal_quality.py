"""Caches against their peers at equal quality: settings that keep pictures as close, timed against each other.

Each pair is a setting of this package and the nearest setting of the published helper of DeepCache, or of diffusers'
first-block cache, that is no closer to the pictures without a cache. They run in turn, so that the ratio of their
times is free of what else the machine does.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import diffusers_ext
from benchmarks.cache import FORECAST, first_block, helper, tuned
from benchmarks.frontier import CalibratedBAC
from diffusers_ext import (
    DeepCacheConfig,
    FasterDiffusionConfig,
    FeatureInheritanceConfig,
    RASConfig,
    zoo,
)
from diffusers_ext.eval import count_macs, mean_psnr, paired_ratio
from diffusers_ext.registry import get_method


STEPS = {"shapes-unet": 50, "shapes-dit": 20}
PICTURES, TIMED_PICTURES, PAIRS = {64: 16, 128: 8}, {64: 4, 128: 2}, 7
FBC, PYPI = "diffusers FirstBlockCache", "PyPI DeepCache 0.1.1"
COLUMNS = ["Model", "Ours", "PSNR", "MACs", "Peer", "PSNR", "MACs", "Our time / peer's"]
TurnedOn = Callable[[Any], AbstractContextManager]


@dataclass(frozen=True)
class Pair:
    """A setting of ours and one of a peer, by name, for pictures of `side` x `side`."""

    ours: str
    config: Any
    peer: str
    strength: Any
    side: int = 64


def _pairs(name: str) -> Iterator[Pair]:
    if name == "shapes-unet":
        yield Pair("deepcache, N = 2", DeepCacheConfig(2), PYPI, (2, 0))
        yield Pair("deepcache, N = 3" + FORECAST, DeepCacheConfig(3, forecast_order=1), PYPI, (2, 0))
        yield Pair("a-sdm, N = 3" + FORECAST, FeatureInheritanceConfig(interval=3, forecast_order=1), PYPI, (2, 3))
        yield Pair("faster-diffusion, key steps 2, parabola", FasterDiffusionConfig(2, forecast_order=2), PYPI, (3, 6))
        return
    _, warm_ups = tuned(get_method("delta-dit"))
    for (setting, config), threshold in zip(warm_ups.items(), (0.08, 0.1, 0.13, 0.19)):
        yield Pair(f"delta-dit, {setting}", config, FBC, threshold)
    yield Pair("bac, calibrated, M = 10" + FORECAST, 10, FBC, 0.11)
    thirds = RASConfig(0.125, start_step=6, error_reset_steps=range(8, 20, 3), forecast_order=1)
    yield Pair("ras, 12.5%, from step 6, every third in full" + FORECAST, thirds, FBC, 0.065, 128)


class Bench:
    """A shipped model and its pictures without a cache."""

    def __init__(self, name: str):
        self.name, self.steps, self.pipe = name, STEPS[name], zoo.load(name)
        if name == "shapes-unet":
            from diffusers import DDIMScheduler

            self.pipe.scheduler = DDIMScheduler.from_config(self.pipe.scheduler.config)
        self.bac = CalibratedBAC(self.steps)
        self.plain: dict[int, tuple[torch.Tensor, int]] = {}

    def draw(self, side: int, count: int) -> torch.Tensor:
        """Pictures of the first captions."""
        captions = zoo.held_out(PICTURES[side]).captions[:count]
        return zoo.generate(self.pipe, captions, num_inference_steps=self.steps, height=side, width=side)

    def ours(self, pair: Pair) -> TurnedOn:
        """What turns our setting on. BAC's is a number of updates, calibrated before its first use."""
        if isinstance(pair.config, int):
            return lambda pipe: self.bac.turned_on(pipe, pair.config, 1)
        return lambda pipe: diffusers_ext.apply(pipe, pair.config)

    def peer(self, pair: Pair) -> TurnedOn:
        """What turns the peer's setting on."""
        if pair.peer == PYPI:
            return lambda pipe: helper(pipe, *pair.strength)
        return lambda pipe: first_block(pipe, pair.strength)

    def quality(self, turned_on: TurnedOn, side: int) -> list[str]:
        """PSNR to the pictures without a cache, and the share of operations."""
        if side not in self.plain:
            full = count_macs(lambda: self.draw(side, TIMED_PICTURES[side]))
            self.plain[side] = self.draw(side, PICTURES[side]), full
        reference, full = self.plain[side]
        with turned_on(self.pipe):
            psnr = mean_psnr(self.draw(side, PICTURES[side]), reference)
            share = count_macs(lambda: self.draw(side, TIMED_PICTURES[side])) / full
        return [f"{psnr:.2f} dB", f"{share:.3f}"]

    def rows(self) -> Iterator[tuple[list[str], Any]]:
        """A row per pair, and its ratio of times."""
        for pair in _pairs(self.name):
            ours, peer = self.ours(pair), self.peer(pair)
            found, theirs = self.quality(ours, pair.side), self.quality(peer, pair.side)
            # Processor time of this process: other load on the machine must not decide.
            ratio = paired_ratio(
                self._timed(ours, pair.side), self._timed(peer, pair.side), pairs=PAIRS, clock=time.process_time
            )
            model = self.name if pair.side == 64 else f"{self.name}, {pair.side} x {pair.side}"
            yield [model, pair.ours, *found, f"{pair.peer}, {_shown(pair.strength)}", *theirs, str(ratio)], ratio

    def _timed(self, turned_on: TurnedOn, side: int) -> Callable[[], None]:
        def run() -> None:
            with turned_on(self.pipe):
                self.draw(side, TIMED_PICTURES[side])

        return run


def _shown(strength: Any) -> str:
    return f"N = {strength[0]}, branch {strength[1]}" if isinstance(strength, tuple) else f"threshold {strength}"


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
    """Measure every pair; see `benchmarks/run.py` for what is returned."""
    measured = [entry for name in STEPS for entry in Bench(name).rows()]
    notes = (
        f"{PICTURES[64]} held-out captions ({PICTURES[128]} at 128 x 128), guidance 3; DDIM with 50 steps, Euler with "
        f"20. PSNR to the pictures without a cache. MACs are shares of the run without one, with {TIMED_PICTURES[64]} "
        f"({TIMED_PICTURES[128]}) pictures. The last column is processor time of ours over the peer's, the median of "
        f"{PAIRS} interleaved pairs with their smallest and largest. BAC was calibrated on four other captions."
    )
    rows = [row for row, _ in measured]
    return {"columns": COLUMNS, "rows": rows, "notes": notes, "picture": plot(measured, out_dir / "equal_quality.png")}
