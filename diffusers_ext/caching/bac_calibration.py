"""Calibration of BAC: run the plain model on a few samples, see how fast each sub-block changes, choose the steps."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from tqdm.auto import tqdm

from ..apply import denoiser_of
from ._bac_calls import Recorder
from ._bac_schedule import CANDIDATES, METRICS, adaptive_schedules, bubbling_union, score, volatility
from ._common import PREFIX, install, stateful_hooks
from .bac import BACConfig, RootHook, Shared, hooks_of, require_updates, sub_blocks


__all__ = ["BACStatistics", "calibrate_bac", "measure_bac"]

MAX_ELEMENTS = 2**14


@dataclass(frozen=True, eq=False)
class BACStatistics:
    """How the outputs of sub-blocks change along a run. One measurement gives schedules for any number of updates.

    Args:
        names: Sub-blocks in the order in which they run.
        feed_forward: Those of them with a feed-forward network.
        similarity: `[B, T, T]`, float64: how well the output of one step stands in for that of another.
        errors: Mean absolute change of each output over all pairs of steps, by name.
        origin: What was measured: model, scheduler, metric.
    """

    names: tuple[str, ...]
    feed_forward: tuple[str, ...]
    similarity: torch.Tensor
    errors: Mapping[str, float]
    origin: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, recorder: Recorder, kinds: Mapping[str, str], origin: Mapping[str, Any]) -> BACStatistics:
        """What a recorder has seen; `kinds` are those of all sub-blocks of the model by name.

        Raises:
            ValueError: No kind of call ran all sub-blocks at all steps.
        """
        if not recorder.samples or len(recorder.order) != len(kinds):
            silent = [name for name in kinds if name not in recorder.order] or ["none by name"]
            raise ValueError(
                f"no call was recorded at every step in which every sub-block ran (never seen: {silent[0]}): "
                "calibrate with whole runs, without guidance that leaves out layers"
            )
        names = tuple(recorder.order)
        found = torch.stack([recorder.similarity[name] for name in names]) / recorder.samples
        errors = {name: volatility(recorder.difference[name] / recorder.samples) for name in names}
        return cls(names, tuple(n for n in names if kinds[n] != "attention"), found, errors, origin)

    @property
    def num_steps(self) -> int:
        """T."""
        return self.similarity.shape[-1]

    def config(
        self, num_updates: int, bua_blocks: int = 5, bua_candidates: str = "ffn", shared: bool = True
    ) -> BACConfig:
        """The schedule with the most similarity between what is reused and what it stands in for.

        Args:
            num_updates: M, updates of each sub-block, 2 to the number of steps.
            bua_blocks: Where each has its own list: this many volatile sub-blocks are also recomputed whenever a later
                feed-forward is; that adds updates to theirs. 0 leaves it out.
            bua_candidates: They are chosen among the `"ffn"` sub-blocks, or among `"all"`.
            shared: One list for all sub-blocks (default), from their mean similarity: no output is ever computed from
                a stale one, which came closer to the full run wherever it was measured. False: a list for each, as in
                the paper.
        """
        require_updates(num_updates, self.num_steps)
        if bua_blocks < 0 or bua_candidates not in CANDIDATES:
            raise ValueError(
                f"bua_blocks is {bua_blocks} (accepted: from 0), bua_candidates {bua_candidates!r} "
                f"(accepted: {', '.join(CANDIDATES)})"
            )
        mean = self.similarity.mean(0).expand_as(self.similarity)
        found = adaptive_schedules(mean if shared else self.similarity, num_updates)
        chosen = dict(zip(self.names, found))
        stats = {
            "num_updates": num_updates,
            "bua_blocks": bua_blocks,
            "bua_candidates": bua_candidates,
            "shared": shared,
            "score": {n: score(s, chosen[n]) for n, s in zip(self.names, self.similarity)},
            "error": dict(self.errors),
        }
        union = bubbling_union(chosen, self.feed_forward, self.errors, bua_blocks, bua_candidates)
        return BACConfig(union, num_inference_steps=self.num_steps, origin={**self.origin, "stats": stats})


def measure_bac(
    target: Any,
    run_fn: Callable[[int], Any],
    calibration_samples: int = 8,
    calibration_seed: int = 0,
    metric: str = "cosine",
    max_elements: int = MAX_ELEMENTS,
    progress: bool = True,
) -> BACStatistics:
    """Run the plain model and measure how fast the output of each sub-block changes. Ctrl-C leaves nothing behind.

    Args:
        target: Pipeline or model without a cache.
        run_fn: `run_fn(seed)` draws one sample, or one batch, in a whole run: with the sampler, the number of steps
            and the guidance that will be used, and with another prompt or observation for each seed.
        calibration_samples: How often it is called, with seeds from `calibration_seed` on.
        calibration_seed: The first seed.
        metric: `"cosine"`, or a distance: `"mse"`, `"l1"`, `"l2"`.
        max_elements: Elements of each output that are compared, drawn at random, always the same ones.
        progress: Show a progress bar.

    Returns:
        `BACStatistics`, whose `.config(num_updates)` is ready for `apply`.

    Raises:
        ValueError: Values out of range, an active cache, no whole run, or runs of different length.
    """
    if calibration_samples < 1 or max_elements < 1 or metric not in METRICS:
        raise ValueError(
            f"calibration_samples is {calibration_samples} and max_elements {max_elements} (accepted: from 1), metric "
            f"{metric!r} (accepted: {', '.join(METRICS)})"
        )
    model = denoiser_of(target)
    parts = sub_blocks(model)
    if active := stateful_hooks(model):
        raise ValueError(f"calibrate the plain model: it has an active cache ({active[0]}), remove it first")
    recorder = Recorder(metric, max_elements, calibration_seed)
    root = RootHook(recorder, Shared(), recorder.new_kind)
    undo = install(model, hooks_of(model, root, parts), PREFIX + "bac-calibration")
    try:
        for sample in tqdm(range(calibration_samples), desc="block similarities", disable=not progress):
            run_fn(calibration_seed + sample)
            root.reset_state(model)
            recorder.end_run()
    finally:
        undo()
    origin = {"model_class": type(model).__name__, "metric": metric}
    if hasattr(target, "scheduler"):
        origin["scheduler_class"] = type(target.scheduler).__name__
    return BACStatistics.of(recorder, {name: part.kind for name, part in parts.items()}, origin)


def calibrate_bac(
    target: Any,
    run_fn: Callable[[int], Any],
    num_updates: int,
    bua_blocks: int = 5,
    bua_candidates: str = "ffn",
    shared: bool = True,
    **options: Any,
) -> BACConfig:
    """Measure a model and choose the steps at which each of its sub-blocks is recomputed.

    Args:
        target: Pipeline or model without a cache.
        run_fn: `run_fn(seed)` draws one sample in a whole run, see `measure_bac`.
        num_updates: M, updates of each sub-block, 2 to the number of steps.
        bua_blocks, bua_candidates, shared: See `BACStatistics.config`.
        options: Of `measure_bac`: `calibration_samples`, `calibration_seed`, `metric`, ...

    Returns:
        `BACConfig` for `apply`; `.save(path)` writes it to a file.

    Example:
        >>> import diffusers_ext
        >>> from diffusers_ext import calibrate_bac, zoo
        >>> pipe = zoo.load("shapes-dit")
        >>> captions = zoo.held_out(2).captions
        >>> config = calibrate_bac(
        ...     pipe,
        ...     lambda seed: zoo.generate(pipe, [captions[seed]], num_inference_steps=8, seed=seed),
        ...     num_updates=4,
        ...     calibration_samples=2,
        ... )
        >>> with diffusers_ext.apply(pipe, config):
        ...     images = zoo.generate(pipe, ["a red circle"], num_inference_steps=8)
    """
    require_updates(num_updates, None)
    return measure_bac(target, run_fn, **options).config(num_updates, bua_blocks, bua_candidates, shared)
