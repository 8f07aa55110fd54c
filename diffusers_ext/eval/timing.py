"""Paired timing: A and B run in turn, so that load on the machine hits both alike and only their ratio is reported."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class PairedTiming:
    """Time of `candidate` over time of `baseline`, pair by pair: below 1 means the candidate is faster."""

    ratio: float
    ratio_min: float
    ratio_max: float
    pairs: int

    def to_dict(self) -> dict[str, float]:
        """Plain numbers for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        return f"{self.ratio:.3f} ({self.ratio_min:.3f} to {self.ratio_max:.3f}, {self.pairs} pairs)"


def _seconds(function: Callable[[], Any], clock: Callable[[], float]) -> float:
    _synchronize()
    start = clock()
    function()
    _synchronize()
    return clock() - start


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def paired_ratio(
    candidate: Callable[[], Any],
    baseline: Callable[[], Any],
    pairs: int = 5,
    warmup: int = 1,
    clock: Callable[[], float] = time.perf_counter,
) -> PairedTiming:
    """Ratio of running times, from interleaved runs after a warm-up. Lone times are never reported.

    The order inside a pair alternates, so that neither side always profits from warm memory.

    Args:
        candidate: What may be faster; called without arguments.
        baseline: What it is compared with.
        pairs: Timed pairs, at least 1.
        warmup: Untimed runs of each before, 0 or more.
        clock: Seconds; `time.process_time` counts only this process and suits a machine with other load.

    Returns:
        `PairedTiming` with the median, smallest and largest ratio.

    Example:
        >>> from diffusers_ext.eval import paired_ratio
        >>> paired_ratio(lambda: sum(range(100_000)), lambda: sum(range(400_000))).ratio < 1
        True
    """
    if pairs < 1 or warmup < 0:
        raise ValueError(f"pairs is {pairs} and warmup {warmup}; accepted: pairs >= 1, warmup >= 0")
    for _ in range(warmup):
        baseline()
        candidate()
    ratios = []
    for index in range(pairs):
        if index % 2:
            fast = _seconds(candidate, clock)
            slow = _seconds(baseline, clock)
        else:
            slow = _seconds(baseline, clock)
            fast = _seconds(candidate, clock)
        ratios.append(fast / slow)
    return PairedTiming(statistics.median(ratios), min(ratios), max(ratios), pairs)
