"""Delta-DiT: on most steps, add the change that a run of transformer blocks made before instead of running them.

Chen et al., "Delta-DiT: A Training-Free Acceleration Method Tailored for Diffusion Transformers", 2024,
https://arxiv.org/abs/2406.01125
"""

from __future__ import annotations

import inspect
import logging
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers.hooks import ModelHook
from diffusers.hooks._common import _SPATIAL_TRANSFORMER_BLOCK_IDENTIFIERS, _TEMPORAL_TRANSFORMER_BLOCK_IDENTIFIERS
from diffusers.hooks._helpers import TransformerBlockMetadata, TransformerBlockRegistry

from .._fields import require_types
from ..apply import Attachment, MethodConfig, denoiser_of
from ..registry import Claim, MethodRecord, register
from ._common import (
    PREFIX,
    Position,
    RunHook,
    RunTracker,
    install,
    macs_on_meta,
    macs_or_warning,
    outlines,
    refuse_other_caches,
    steps_of,
)
from ._forecast import History, require_order


__all__ = ["DeltaDiTConfig"]

logger = logging.getLogger(__name__)
_HOOK = PREFIX + "delta-dit"
_HEADLINE_SPEEDUP = 1.6
_ORDERS = ("rear_then_front", "front_then_rear", "rear", "front")
_STORES = ("both", "active")
# Image tokens, then text tokens or None. A block kind that keeps both in one sequence has one stream.
Streams = tuple[torch.Tensor | None, ...]


def speedup(blocks: int, cached: int, interval: int) -> float:
    """L / (L - Nc (N - 1) / N): how many times fewer blocks a long run executes."""
    return blocks / (blocks - cached * (interval - 1) / interval)


def cached_blocks_for(times: float, blocks: int, interval: int) -> int:
    """The number of cached blocks whose `speedup` is nearest to `times`: Nc = L (1 - 1/s) N / (N - 1)."""
    wanted = round(blocks * (1 - 1 / times) * interval / (interval - 1))
    return min(max(wanted, 1), blocks - 1)


def span_name(step: int, boundary: int, order: str) -> str:
    """Which end of the transformer is cached on this step: the first stage ends before step `boundary`."""
    first, _, second = order.partition("_then_")
    return first if step < boundary else second or first


def span_bounds(name: str, blocks: int, cached: int) -> tuple[int, int]:
    """First block of a span and the one after its last: the front span is [0, Nc), the rear span [L - Nc, L)."""
    return (0, cached) if name == "front" else (blocks - cached, blocks)


def change(after: Streams, before: Streams) -> Streams:
    """Delta = h_out - h_in of each stream; None where a span drops the stream."""
    return tuple(None if a is None else (a - b).detach() for a, b in zip(after, before))


def add_change(before: Streams, delta: Streams) -> Streams:
    """h_in + Delta of each stream."""
    return tuple(None if d is None else b + d for b, d in zip(before, delta))


def _copy(streams: Streams) -> Streams:
    return tuple(None if s is None else s.clone() for s in streams)


@dataclass
class Store:
    """Of one kind of call: the deltas of its last full steps by span name."""

    deltas: dict[str, History] = field(default_factory=dict)


@dataclass
class Call:
    """One pass through the blocks. Every block asks `enter` before it runs and tells `leave` what came out.

    Args:
        bounds: First block and end of each span by name.
        reused: The span that is replaced by its delta, or None.
        recorded: Spans whose delta a full pass keeps.
        deltas: What to replace with; after a full pass, what was recorded.
        index: Calls of its kind before it.
    """

    bounds: dict[str, tuple[int, int]]
    reused: str | None
    recorded: tuple[str, ...]
    deltas: dict[str, Streams]
    index: int = 0
    inputs: dict[str, Streams] = field(default_factory=dict)
    result: Streams | None = None

    def enter(self, block: int, streams: Streams) -> Streams | None:
        """What the block yields without running, or None if it must run."""
        if self.reused is not None:
            start, stop = self.bounds[self.reused]
            if block == start:
                self._skip(streams)
            if self.result is not None and start <= block < stop:
                # In between, models add control residuals, some in place. The delta holds them: they are dropped.
                if block == stop - 1:
                    return self.result
                return streams if block != start else _copy(self.result)
        for name in self.recorded:
            if block == self.bounds[name][0]:
                self.inputs[name] = _copy(streams)
        return None

    def leave(self, block: int, streams: Streams) -> None:
        """Keep the delta of the spans that end with this block."""
        for name in self.recorded:
            if block == self.bounds[name][1] - 1 and name in self.inputs:
                self.deltas[name] = change(streams, self.inputs.pop(name))

    def _skip(self, streams: Streams) -> None:
        delta = self.deltas[self.reused]
        if all(d is None or d.shape == s.shape for d, s in zip(delta, streams)):
            self.result = add_change(streams, delta)
        else:  # another tool changed the number of tokens: run in full
            self.recorded, self.reused, self.deltas = (self.reused,), None, {}


@dataclass(frozen=True)
class Plan:
    """The schedule of one run on one model: pure arithmetic, shared by every door.

    Args:
        interval: N, every N-th call runs in full, counted from the last step before `start_step`.
        bounds: First block and end of each span by name.
        boundary: Step with which the second stage begins.
        order: Span of the first stage, then of the second.
        store: Whether a full step before the boundary also keeps what the second stage needs.
        forecast_order: Of the forecast from full steps.
        start_step: First step that may be reused.
    """

    interval: int
    bounds: dict[str, tuple[int, int]]
    boundary: int
    order: str
    store: str
    forecast_order: float = 0
    start_step: int = 1

    def call(self, store: Store, calls: int, step: int) -> Call:
        """What to do with a call.

        Args:
            store: Of its kind of call.
            calls: Calls of its kind before it.
            step: Step of the run.
        """
        span = span_name(step, self.boundary, self.order)
        # Every kind of call happens once per step; one that first happened late has no warm-up.
        since = min(calls, step - self.start_step + 1)
        if since > 0 and since % self.interval and span in store.deltas:
            return Call(self.bounds, span, (), {span: store.deltas[span].at(calls)}, calls)
        return Call(self.bounds, None, self._needed(step), {}, calls)

    def keep(self, store: Store, call: Call) -> None:
        """After a full call: remember the deltas that it recorded, and forget spans that it did not."""
        store.deltas = {name: store.deltas.get(name, History(self.forecast_order)) for name in call.deltas}
        for name, delta in call.deltas.items():
            store.deltas[name].add(call.index, delta)

    def _needed(self, step: int) -> tuple[str, ...]:
        """Spans whose delta a full step keeps: of its own stage, or of all steps that will look back at it.

        In the warm-up that is what its last step keeps, if as many as the forecast reaches back come before it.
        """
        last = max(step, self.start_step - 1)
        intervals = 1 + math.ceil(self.forecast_order) - (last - step)  # that look back at this step
        if self.interval == 1 or intervals < 1:
            return ()
        steps = [last] if self.store == "active" else range(last + 1, last + self.interval * intervals)
        return tuple(dict.fromkeys(span_name(i, self.boundary, self.order) for i in steps))


@dataclass
class _Shared:
    """Read by the block hooks, written by the root hook. None outside of a call."""

    call: Call | None = None


class _BlockHook(ModelHook):
    """On a transformer block: translates its arguments and outputs to streams and back."""

    def __init__(self, shared: _Shared, index: int, metadata: TransformerBlockMetadata):
        super().__init__()
        self.shared, self.index = shared, index
        named = [(metadata.return_hidden_states_index, metadata.hidden_states_argument_name)]
        if metadata.return_encoder_hidden_states_index is not None:
            named.append((metadata.return_encoder_hidden_states_index, metadata.encoder_hidden_states_argument_name))
        self.outputs, self.names = zip(*named)
        self.returns_tuple = len(named) > 1

    def initialize_hook(self, module: torch.nn.Module) -> torch.nn.Module:
        parameters = list(inspect.signature(type(module).forward).parameters)[1:]
        self.positions = [parameters.index(name) for name in self.names]
        return module

    def new_forward(self, module: torch.nn.Module, *args, **kwargs):
        call = self.shared.call
        if call is None:
            return self.fn_ref.original_forward(*args, **kwargs)
        given = (kwargs[n] if n in kwargs else args[p] for n, p in zip(self.names, self.positions))
        streams = call.enter(self.index, tuple(given))
        if streams is None:
            output = self.fn_ref.original_forward(*args, **kwargs)
            self.returns_tuple = isinstance(output, tuple)
            parts = output if self.returns_tuple else (output,)
            call.leave(self.index, tuple(parts[i] for i in self.outputs))
            return output
        return tuple(s for _, s in sorted(zip(self.outputs, streams))) if self.returns_tuple else streams[0]


class _RootHook(RunHook[Store]):
    """On the transformer: decides between a full and a reused pass."""

    def __init__(self, config: DeltaDiTConfig, target: Any, blocks: int):
        super().__init__(RunTracker(Store))
        self.config, self.target, self.blocks, self.shared = config, target, blocks, _Shared()
        self.plan: Plan | None = None
        self.store: Store | None = None
        self.computed = 0
        self.reused: dict[str, int] = {}
        self.changes: list[torch.Tensor] = []
        self.arguments: tuple[tuple, dict] | None = None

    def begin_run(self, args: tuple, kwargs: dict) -> None:
        self.plan = self.config.plan(self.blocks, steps_of(self.target))
        self.computed, self.reused, self.changes = 0, {}, []
        self.arguments = outlines((args, kwargs))

    def begin_call(self, position: Position[Store]) -> None:
        self.store = position.state
        self.shared.call = self.plan.call(self.store, position.step, self.tracker.run_step)

    def end_call(self) -> None:
        call = self.shared.call
        if call.reused is not None:
            self.reused[call.reused] = self.reused.get(call.reused, 0) + 1
        else:
            self.computed += 1
            shared_names = call.deltas.keys() & self.store.deltas.keys()
            self.changes += [_relative(call.deltas[n], self.store.deltas[n].newest) for n in sorted(shared_names)]
            self.plan.keep(self.store, call)

    def release(self) -> None:
        self.shared.call = self.store = None

    def macs(self, model: torch.nn.Module) -> dict[str, int]:
        """MACs of a full call (under "full") and of calls that reuse each span, counted on the meta device."""
        full = Call(self.plan.bounds, None, tuple(self.reused), {})
        counts = {}
        with self.aside():
            for call in (full, *(Call(self.plan.bounds, name, (), full.deltas) for name in self.reused)):
                self.shared.call = call
                counts[call.reused or "full"] = macs_on_meta(model, self.arguments)
        return counts


def _relative(new: Streams, old: Streams) -> torch.Tensor:
    """Relative change of an image delta from one full step to the next."""
    new, old = new[0].float(), old[0].float()
    return (new - old).norm() / old.norm()


def transformer_blocks(model: torch.nn.Module) -> list[torch.nn.Module]:
    """The blocks of a transformer in running order.

    Raises:
        ValueError: No such blocks, blocks of a kind that diffusers does not describe, or blocks that alternate.
    """
    name = type(model).__name__
    lists = {n: child for n, child in model.named_children() if isinstance(child, torch.nn.ModuleList)}
    blocks = [block for n in lists if n in _SPATIAL_TRANSFORMER_BLOCK_IDENTIFIERS for block in lists[n]]
    if len(blocks) < 2:
        raise ValueError(
            f"Delta-DiT needs a transformer with a list of at least two blocks, such as DiT, PixArt, SD3 or Flux; "
            f"{name} has none. For UNets use DeepCacheConfig"
        )
    if any(n in _TEMPORAL_TRANSFORMER_BLOCK_IDENTIFIERS for n in lists):
        raise ValueError(f"Delta-DiT cannot cut a span out of {name}: its spatial and temporal blocks alternate")
    if len({_metadata(block).return_encoder_hidden_states_index is None for block in blocks}) > 1:
        raise ValueError(f"Delta-DiT cannot cut a span out of {name}: its block kinds do not pass on the same streams")
    return blocks


def _metadata(block: torch.nn.Module) -> TransformerBlockMetadata:
    kind = type(getattr(block, "_orig_mod", block))
    try:
        return TransformerBlockRegistry.get(kind)
    except ValueError:
        raise ValueError(
            f"diffusers does not describe the inputs and outputs of {kind.__name__}: register them with "
            "diffusers.hooks.TransformerBlockRegistry.register(...)"
        ) from None


@register(
    MethodRecord(
        slug="delta-dit",
        family="caching",
        kind="cache",
        title="Delta-DiT: A Training-Free Acceleration Method Tailored for Diffusion Transformers",
        arxiv="2406.01125",
        summary="1.6 times fewer transformer blocks: the change a span of blocks makes is added instead of recomputed",
        targets=("dit", "mmdit"),
        predictions=("epsilon", "v_prediction", "sample", "flow_prediction"),
        nodes=("DXDeltaDiTCache",),
        claim=Claim(
            text="PixArt-alpha and DiT-XL 1.6 times faster, often with better scores",
            setting="20 steps, GPU",
            value=1.6,
            unit="times faster",
        ),
        conflicts=("any-size-diffusion", "bac", "ras"),
    )
)
@dataclass(frozen=True)
class DeltaDiTConfig(MethodConfig):
    """Makes a transformer pipeline 1.6 times cheaper without training.

    A full step stores what a span of consecutive blocks added to its input. On the steps in between the span does not
    run: its stored change is added to the current input. Early in the run, while outlines form, the rear blocks are
    the span; later, while details form, the front blocks are. Works with DiT, PixArt, Stable Diffusion 3, Flux and
    every transformer whose blocks diffusers describes. Paper: https://arxiv.org/abs/2406.01125

    Args:
        cache_interval: N: one full step, then N - 1 cheap ones. 1 changes nothing. Default 2.
        num_cached_blocks: Nc: blocks of the span, 1 to one less than the transformer has. None takes three quarters,
            which makes N = 2 1.6 times cheaper.
        boundary: Share of the run's steps, 0 to 1, after which the second stage begins. Default 0.5.
        boundary_step: Names the step with which the second stage begins instead.
        span_order: `"rear_then_front"`, `"front_then_rear"`, or `"rear"` or `"front"` for one span throughout.
        store: `"both"` keeps a second delta around the boundary; `"active"` computes the step at the boundary in full.
        num_inference_steps: Steps of the run; read from the scheduler when applied to a pipeline.
        forecast_order: What is added: 0 (default), the change of the last full step, as in the paper; 1 or 2, its
            forecast, the line or parabola through those of the last two or three full steps. For samplers that add
            no noise, 1 stays closer to the run without a cache at the same cost, but for memory. Fractions mix their
            neighbours: 0.5, half of the trend, is closer still where intervals are long.
        start_step: First step that may be reused, from 1. Default 1, as in the paper; steps before it are computed in
            full, the last of them begins the first interval. A later start saves less and stays closer.

    Raises:
        ValueError: Values out of range; on `apply`, a model without a list of blocks or with too few of them.

    Example:
        >>> import diffusers_ext
        >>> from diffusers_ext import DeltaDiTConfig, zoo
        >>> pipe = zoo.load("shapes-dit")
        >>> with diffusers_ext.apply(pipe, DeltaDiTConfig()) as handle:
        ...     images = zoo.generate(pipe, ["a red circle"], num_inference_steps=12)
        ...     handle.summary()["delta-dit"]["blocks_run"]  # of 2 x 12 x 12, with guidance
        180

    Limits:
        Few-step models gain little: take N = 2 and few blocks there. The delta carries the control and adapter
        signals of its full step. `torch.compile(fullgraph=True)` is impossible: the decision is a graph break.
    """

    cache_interval: int = 2
    num_cached_blocks: int | None = None
    boundary: float = 0.5
    boundary_step: int | None = None
    span_order: str = "rear_then_front"
    store: str = "both"
    num_inference_steps: int | None = None
    forecast_order: float = 0
    start_step: int = 1

    def __post_init__(self) -> None:
        require_types(self)
        require_order(self.forecast_order)
        if self.cache_interval < 1:
            raise ValueError(f"cache_interval is {self.cache_interval}; accepted: whole numbers from 1")
        if self.num_cached_blocks is not None and self.num_cached_blocks < 1:
            raise ValueError(f"num_cached_blocks is {self.num_cached_blocks}; accepted: whole numbers from 1, or None")
        if not 0 <= self.boundary <= 1:
            raise ValueError(f"boundary is {self.boundary}; accepted: a share of the steps, 0 to 1")
        if self.boundary_step is not None and self.boundary_step < 0:
            raise ValueError(f"boundary_step is {self.boundary_step}; accepted: a step from 0, or None")
        if self.span_order not in _ORDERS:
            raise ValueError(f"span_order is {self.span_order!r}; accepted: {', '.join(map(repr, _ORDERS))}")
        if self.store not in _STORES:
            raise ValueError(f"store is {self.store!r}; accepted: {', '.join(map(repr, _STORES))}")
        if self.start_step < 1:
            raise ValueError(f"start_step is {self.start_step}; accepted: whole numbers from 1")
        if self.num_inference_steps is not None:
            self._refuse_late_boundary(self.num_inference_steps)

    def plan(self, blocks: int, steps: int | None) -> Plan:
        """The schedule on a transformer of `blocks` blocks for a run of `steps` steps."""
        cached = self.num_cached_blocks
        if cached is None:
            cached = cached_blocks_for(_HEADLINE_SPEEDUP, blocks, 2)
        if cached >= blocks:
            raise ValueError(
                f"num_cached_blocks is {cached}; this transformer has {blocks} blocks, accepted: 1 to {blocks - 1}"
            )
        bounds = {name: span_bounds(name, blocks, cached) for name in self.span_order.split("_then_")}
        boundary = self._boundary(steps)
        return Plan(
            self.cache_interval, bounds, boundary, self.span_order, self.store, self.forecast_order, self.start_step
        )

    def _boundary(self, steps: int | None) -> int:
        if self.boundary_step is not None:
            return self.boundary_step
        if "_then_" not in self.span_order:
            return 0
        steps = self.num_inference_steps or steps
        if steps is None:
            raise ValueError(
                "where the second stage begins depends on the number of steps, which a model does not know: apply to "
                "the pipeline, or give num_inference_steps or boundary_step"
            )
        return round(self.boundary * steps)

    def _refuse_late_boundary(self, steps: int) -> None:
        if self.boundary_step is not None and self.boundary_step > steps:
            raise ValueError(f"boundary_step is {self.boundary_step}; a run of {steps} steps accepts 0 to {steps}")

    def check(self, target: Any, num_inference_steps: int | None = None) -> tuple[str, ...]:
        model = denoiser_of(target)
        blocks = transformer_blocks(model)
        steps = num_inference_steps or self.num_inference_steps
        self.plan(len(blocks), steps or steps_of(target))
        refuse_other_caches(model)
        if steps is not None:
            self._refuse_late_boundary(steps)
            if self.cache_interval == 1 or steps <= self.start_step:
                cure = "use more steps, a larger cache_interval or a smaller start_step"
                return (f"delta-dit: none of {steps} steps can be reused; {cure}",)
        return ()

    def attach(self, target: Any) -> Attachment:
        model = denoiser_of(target)
        blocks = transformer_blocks(model)
        root = _RootHook(self, target, len(blocks))
        return Attachment(install(model, _hooks(model, root, blocks), _HOOK), lambda: _summary(root, model))


def _hooks(
    model: torch.nn.Module, root: _RootHook, blocks: Iterable[torch.nn.Module]
) -> Iterator[tuple[torch.nn.Module, ModelHook]]:
    yield model, root
    for index, block in enumerate(blocks):
        yield getattr(block, "_orig_mod", block), _BlockHook(root.shared, index, _metadata(block))


def _summary(root: _RootHook, model: torch.nn.Module) -> dict[str, Any]:
    """Figures of the last run."""
    reused = sum(root.reused.values())
    figures: dict[str, Any] = {"computed": root.computed, "reused": reused}
    if not root.computed:
        return figures
    skipped = sum((stop - start) * root.reused.get(n, 0) for n, (start, stop) in root.plan.bounds.items())
    figures["blocks_run"] = (root.computed + reused) * root.blocks - skipped
    figures["delta_change"] = [float(value) for value in root.changes]
    if macs := macs_or_warning(root.macs, model):
        figures["macs_full_call"] = macs["full"]
        figures["macs_reused_call"] = {name: macs[name] for name in root.reused}
        saved = sum(count * (macs["full"] - macs[name]) for name, count in root.reused.items())
        figures["macs_saved"] = saved / (macs["full"] * (root.computed + reused))
    return figures
