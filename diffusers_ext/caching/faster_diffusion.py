"""Faster Diffusion: run the encoder of a UNet at key steps only, and the decoder of several steps in one batch.

Li et al., "Faster Diffusion: Rethinking the Role of UNet Encoder in Diffusion Models", NeurIPS 2024,
https://arxiv.org/abs/2312.09608
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers.hooks import ModelHook

from .._fields import require_types
from ..apply import Attachment, MethodConfig, denoiser_of
from ..registry import Claim, MethodRecord, register
from ._common import (
    PREFIX,
    Inputs,
    Position,
    RunHook,
    RunTracker,
    distinct_tensors,
    install,
    macs_on_meta,
    macs_or_warning,
    map_tensors,
    outlines,
    place_of,
    refuse_fused_qkv,
    refuse_other_caches,
    steps_left,
    tensors_in,
)
from ._forecast import History, require_order


__all__ = ["FasterDiffusionConfig"]

logger = logging.getLogger(__name__)
_HOOK = PREFIX + "faster-diffusion"
_RESIDUALS = ("down_block_additional_residuals", "mid_block_additional_residual")
_PARTS = ("conv_in", "down_blocks", "mid_block", "up_blocks")
# Key steps of the official schedules and the number of steps they were tuned for.
_NAMED = {
    "50ls": (50, lambda i: i in (0, 1, 2, 3, 5, 10, 15, 25, 35)),
    "75ls": (75, lambda i: i < 10 or i > 65 or i % 5 == 0),
    "100ls": (100, lambda i: i < 10 or i > 85 or i % 5 == 0),
    "pro": (50, lambda i: math.isqrt(9 + 8 * i) ** 2 == 9 + 8 * i),
}
KeySteps = int | str | Sequence[int] | None


def key_step_list(total: int, key_steps: KeySteps = None) -> list[int]:
    """Steps of a run of `total` steps at which the encoder runs.

    Args:
        total: Steps of the run, T.
        key_steps: N for {i : i mod N = 0}; `"50ls"`, `"75ls"`, `"100ls"` or `"pro"`, stretched by T / 50 (75, 100)
            where the run has another number of steps; a list with 0; None for `"50ls"` at 50 steps, else N = 4.

    Raises:
        ValueError: A list without 0, or with steps that the run does not have.
    """
    if key_steps is None:
        key_steps = "50ls" if total == 50 else 4
    if isinstance(key_steps, int):
        return list(range(0, total, key_steps))
    if isinstance(key_steps, str):
        tuned_for, is_key = _NAMED[key_steps]
        return sorted({i * total // tuned_for for i in range(tuned_for) if is_key(i)})
    beyond = [i for i in key_steps if i >= total]
    if beyond:
        raise ValueError(f"key_steps holds {beyond}, but the run has {total} steps, 0 to {total - 1}")
    return sorted(set(key_steps))


def decoded_together(step: int, total: int, keys: Sequence[int], max_parallel: int) -> int:
    """How many steps from `step` on share its features and are decoded in one batch."""
    following = next((k for k in sorted(keys) if k > step), total)
    return max(1, min(following - step, max_parallel))


def tile(value: Any, copies: int, rows: int | None = None) -> Any:
    """`copies` of every tensor along its first dimension, one whole batch after the other (`repeat`).

    Args:
        value: Tensors, also inside of tuples, lists and dicts.
        copies: How many.
        rows: Only tensors with this many rows; others are passed through.
    """

    def tiled(t: torch.Tensor) -> torch.Tensor:
        if copies == 1 or t.ndim == 0 or rows not in (None, t.shape[0]):
            return t
        return t.repeat(copies, *[1] * (t.ndim - 1))

    return distinct_tensors(value, tiled)


def first_copy(value: Any, copies: int) -> Any:
    """The first of the batches that `tile` made."""
    return map_tensors(value, lambda t: t if t.ndim == 0 else t[: t.shape[0] // copies])


@dataclass
class _Store:
    """Of one kind of call: what its key steps left.

    Args:
        encoded: What conv_in, the down blocks and the mid block returned, by the number of the hook.
        residuals: ControlNet's of the last key step.
        ahead: Outputs decoded ahead by timestep.
    """

    encoded: History
    residuals: dict[str, Any] = field(default_factory=dict)
    ahead: dict[float, Any] = field(default_factory=dict)


@dataclass
class _Shared:
    """Read by the encoder hooks, written by the root hook. `encoded` is None outside of a call."""

    encoded: dict[int, Any] | None = None
    replay: bool = False
    copies: int = 1


class _EncoderHook(ModelHook):
    """On a part of the encoder: runs it once for all copies of the batch and remembers, or gives what it remembers."""

    def __init__(self, shared: _Shared, index: int):
        super().__init__()
        self.shared, self.index = shared, index

    def new_forward(self, module: torch.nn.Module, *args, **kwargs):
        encoded, copies = self.shared.encoded, self.shared.copies
        if encoded is None:
            return self.fn_ref.original_forward(*args, **kwargs)
        if not self.shared.replay:
            if copies > 1:
                args, kwargs = first_copy((args, kwargs), copies)
            output = self.fn_ref.original_forward(*args, **kwargs)
            # Parents, FreeU and adapters write into outputs in place.
            encoded[self.index] = distinct_tensors(output, lambda t: t.detach().clone())
            return output if copies == 1 else tile(output, copies)
        output = encoded[self.index]
        return distinct_tensors(output, torch.clone) if copies == 1 else tile(output, copies)


@dataclass
class _Plan:
    """Of one call: its step, is that a key step, and which timesteps are decoded in it, the current one first."""

    step: int
    is_key: bool
    times: list[torch.Tensor] = field(default_factory=list)


class _RootHook(RunHook[_Store]):
    """On the UNet: decides what runs, decodes ahead, and hands out what was decoded before."""

    def __init__(self, config: FasterDiffusionConfig, shared: _Shared, target: Any):
        super().__init__(RunTracker(lambda: _Store(History(config.forecast_order))))
        self.config, self.shared, self.target = config, shared, target
        self.computed = self.reused = self.decoder_batches = 0
        self.arguments: tuple[tuple, dict] | None = None
        self.keys: list[int] = []

    def begin_run(self, args: tuple, kwargs: dict) -> None:
        self.computed = self.reused = self.decoder_batches = 0
        self.arguments = outlines((args, kwargs))
        self.total = self.config.num_inference_steps or steps_left(self.target, self.tracker.time)
        self.keys = key_step_list(self.total, self.config.key_steps) if self.total else []

    def begin_call(self, position: Position[_Store]) -> None:
        self.store = position.state
        is_key = not self.store.encoded.kept or self.config.is_key_step(position.step, self.total)
        self.plan = _Plan(position.step, is_key)
        if is_key:
            self.store.ahead.clear()
        if self.config.max_parallel > 1 and self.total:
            count = decoded_together(position.step, self.total, self.keys, self.config.max_parallel)
            self.plan.times = following_times(self.target, self.tracker.time, count)
        self.computed += is_key
        self.reused += not is_key

    @torch.compiler.disable(recursive=False)
    def run(self, args: tuple, kwargs: dict) -> Any:
        ahead = self.store.ahead.pop(self.tracker.time, None)
        if ahead is not None:
            return ahead
        args, kwargs, copies = self._arguments(args, kwargs)
        self._prepare(kwargs, copies)
        self.decoder_batches += 1
        output = self.fn_ref.original_forward(*args, **kwargs)
        return output if copies == 1 else self._keep_ahead(output, copies)

    @torch.compiler.disable
    def _prepare(self, kwargs: dict, copies: int) -> None:
        """Tell the encoder hooks what to do; at a key step they fill a new record."""
        shared, store, plan = self.shared, self.store, self.plan
        if plan.is_key:
            store.residuals = {k: kwargs[k] for k in _RESIDUALS if kwargs.get(k) is not None}
        shared.encoded = {} if plan.is_key else store.encoded.at(plan.step)
        shared.replay, shared.copies = not plan.is_key, copies

    def end_call(self) -> None:
        if self.plan.is_key:
            self.store.encoded.add(self.plan.step, self.shared.encoded)

    @torch.compiler.disable
    def _arguments(self, args: tuple, kwargs: dict) -> tuple[tuple, dict, int]:
        """Inputs of the call that really happens: residuals frozen if asked for, several timesteps in one batch."""
        arguments = dict(self._signature.bind(*args, **kwargs).arguments)
        control = any(arguments.get(name) is not None for name in _RESIDUALS)
        if self.config.freeze_control and not self.plan.is_key:
            kwargs = {**kwargs, **self.store.residuals}
        copies = len(self.plan.times)
        if copies < 2:
            return args, kwargs, 1
        if control and not self.config.freeze_control:
            raise ValueError(
                "decoding ahead has no ControlNet residuals of later steps: set freeze_control=True, or max_parallel=1"
            )
        rows = Inputs.of(arguments).sample.shape[0]
        arguments = {**arguments, **{k: v for k, v in kwargs.items() if k in _RESIDUALS}}
        times = torch.stack([t.to(Inputs.of(arguments).sample.device) for t in self.plan.times])
        extra = arguments.pop("kwargs", {})
        arguments = tile({**arguments, **extra}, copies, rows)
        arguments["timestep"] = times.repeat_interleave(rows)
        return (), arguments, copies

    @torch.compiler.disable
    def _keep_ahead(self, output: Any, copies: int) -> Any:
        parts = zip(*(t.chunk(copies) for t in tensors_in(list(_values(output)))))
        outputs = [_like(output, part) for part in parts]
        self.store.ahead = {float(t): out for t, out in zip(self.plan.times[1:], outputs[1:])}
        return outputs[0]

    def release(self) -> None:
        self.shared.encoded, self.shared.replay, self.shared.copies, self.store = None, False, 1, None

    def macs(self, unet: torch.nn.Module) -> dict[str, int]:
        """MACs of a key call and of a call of the decoder alone with the last run's shapes, on the meta device."""
        counts = {}
        with self.aside():
            self.shared.encoded = {}
            for name, self.shared.replay in (("full", False), ("reused", True)):
                counts[name] = macs_on_meta(unet, self.arguments)
        return counts


def _values(output: Any) -> Iterator[Any]:
    return iter(output) if isinstance(output, tuple) else iter(output.values())


def _like(output: Any, parts: Sequence[torch.Tensor]) -> Any:
    """A model output of the same kind with other tensors."""
    return tuple(parts) if isinstance(output, tuple) else type(output)(**dict(zip(output.keys(), parts)))


def following_times(target: Any, time: float, count: int) -> list[torch.Tensor]:
    """The timestep and those after it in the schedule, `count` at most; empty if its place is unknown."""
    place = place_of(target, time)
    return [] if place is None else list(target.scheduler.timesteps[place : place + count])


class _ControlHook(RunHook[History]):
    """On a ControlNet whose residuals are frozen: it need not run where nobody reads its output."""

    def __init__(self, root: _RootHook):
        super().__init__(RunTracker(History))
        self.root = root

    def begin_run(self, args: tuple, kwargs: dict) -> None:
        config = self.root.config
        total = config.num_inference_steps or steps_left(self.root.target, self.tracker.time)
        self.keys = key_step_list(total, config.key_steps)

    def begin_call(self, position: Position[History]) -> None:
        self.position = position
        self.runs = not position.state.kept or position.step in self.keys

    def release(self) -> None:
        self.position = None

    @torch.compiler.disable(recursive=False)
    def run(self, args: tuple, kwargs: dict) -> Any:
        history = self.position.state
        if self.runs:
            history.add(self.position.step, self.fn_ref.original_forward(*args, **kwargs))
        return history.newest


@register(
    MethodRecord(
        slug="faster-diffusion",
        family="caching",
        kind="cache",
        title="Faster Diffusion: Rethinking the Role of UNet Encoder in Diffusion Models",
        arxiv="2312.09608",
        summary="UNet encoder at a few key steps only, several decoder steps in one batch, no training",
        targets=("unet",),
        predictions=("epsilon", "v_prediction", "sample", "flow_prediction"),
        nodes=("DXFasterDiffusion", "DXFasterDiffusionSampler"),
        claim=Claim(
            text="Stable Diffusion sampling 41 percent faster without training",
            setting="SD v1.5, 50 steps, GPU",
            value=1.69,
            unit="times faster",
        ),
        conflicts=("a-sdm", "any-size-diffusion", "deepcache", "hidiffusion"),
    )
)
@dataclass(frozen=True)
class FasterDiffusionConfig(MethodConfig):
    """Runs the encoder of a UNet at key steps only; on the steps in between its decoder reuses those features.

    The decoder still gets the time and text of each step. As it then depends on nothing else, several steps can be
    decoded in one batch. Works on any UNet with down, mid and up blocks: Stable Diffusion 1, 2, XL, ControlNet,
    DeepFloyd-IF, video. Paper: https://arxiv.org/abs/2312.09608

    Args:
        key_steps: N for every N-th step; `"50ls"`, `"75ls"`, `"100ls"`, `"pro"`, the official schedules, stretched to
            the run's length; a list with 0; None (default) for `"50ls"` at 50 steps and every 4th step otherwise.
        max_parallel: Steps decoded in one batch at most. 1 (default) is the sequential form; more takes more memory
            and uses a GPU better.
        freeze_control: Keep the ControlNet residuals of the key step, as the paper does; the ControlNet of the
            pipeline then runs at key steps only. Default: residuals of every step are added.
        num_inference_steps: Steps of the run, where a model is used without a pipeline that knows.
        forecast_order: What the decoder gets between key steps: 0 (default), the features of the last one, as in the
            paper; 1 or 2, their forecast, the line or parabola through the last two or three key steps. For samplers
            that add no noise, and key steps close to each other, this stays much closer to the run without the
            method at the same cost, but for memory. Fractions mix their neighbours. Needs `max_parallel=1`.

    Raises:
        ValueError: Values out of range; on `apply`, a model without an encoder and a decoder, or a two-stage scheduler
            (Heun, KDPM2) with `max_parallel` above 1.

    Example:
        >>> import diffusers_ext
        >>> from diffusers_ext import FasterDiffusionConfig, zoo
        >>> pipe = zoo.load("shapes-unet")
        >>> with diffusers_ext.apply(pipe, FasterDiffusionConfig(key_steps=4)) as handle:
        ...     image = pipe("a red circle", num_inference_steps=12, height=64, width=64).images[0]
        ...     handle.summary()["faster-diffusion"]["reused"]
        9

    Limits:
        Non-key predictions do not see the current latents. Few-step samplers have no steps to share.
        `torch.compile(fullgraph=True)` is impossible: the decision is a graph break.
    """

    key_steps: KeySteps = None
    max_parallel: int = 1
    freeze_control: bool = False
    num_inference_steps: int | None = None
    forecast_order: float = 0

    def __post_init__(self) -> None:
        require_types(self)
        require_order(self.forecast_order)
        keys = self.key_steps
        if isinstance(keys, str) and keys not in _NAMED:
            raise ValueError(f"key_steps is {keys!r}; accepted names: {', '.join(_NAMED)}")
        if isinstance(keys, int) and keys < 1:
            raise ValueError(f"key_steps is {keys}; accepted: whole numbers from 1")
        if not isinstance(keys, (str, int, type(None))):
            object.__setattr__(self, "key_steps", tuple(sorted(set(keys))))
            if not self.key_steps or self.key_steps[0] != 0:
                raise ValueError(f"key_steps lists {self.key_steps}; it must hold 0 and no negative step")
        if self.max_parallel < 1:
            raise ValueError(f"max_parallel is {self.max_parallel}; accepted: whole numbers from 1")
        if self.forecast_order and self.max_parallel > 1:
            raise ValueError(
                f"forecast_order={self.forecast_order} forecasts the features of one step, max_parallel="
                f"{self.max_parallel} decodes several from those of the key step: leave one of them at its default"
            )
        if self.num_inference_steps is not None:
            key_step_list(self.num_inference_steps, keys)

    def is_key_step(self, step: int, total: int | None = None) -> bool:
        """Does the encoder run on this step of a run of `total` steps? By interval or list where that is unknown."""
        if total is not None:
            return step in key_step_list(total, self.key_steps)
        if isinstance(self.key_steps, tuple):
            return step in self.key_steps
        return step % (self.key_steps or 4) == 0

    def check(self, target: Any, num_inference_steps: int | None = None) -> tuple[str, ...]:
        unet = denoiser_of(target)
        _require_unet(unet)
        refuse_fused_qkv(unet)
        refuse_other_caches(unet)
        scheduler = getattr(target, "scheduler", None)
        steps = num_inference_steps or self.num_inference_steps
        if scheduler is None and steps is None and isinstance(self.key_steps, str):
            raise ValueError(
                f"key_steps={self.key_steps!r} depends on the length of the run: give num_inference_steps"
            )
        if self.max_parallel > 1:
            _require_schedule(scheduler)
        if self.freeze_control and scheduler is None and self.num_inference_steps is None:
            raise ValueError("freeze_control needs the length of the run: apply it to the pipeline")
        if steps is not None and len(key_step_list(steps, self.key_steps)) >= steps:
            return (f"faster-diffusion: none of {steps} steps can be reused; use more steps or fewer key_steps",)
        return ()

    def attach(self, target: Any) -> Attachment:
        unet = denoiser_of(target)
        shared = _Shared()
        root = _RootHook(self, shared, target)
        control = getattr(target, "controlnet", None)
        with ExitStack() as undo:
            undo.callback(install(unet, _hooks(unet, root), _HOOK))
            if self.freeze_control and isinstance(control, torch.nn.Module):
                undo.callback(install(control, [(control, _ControlHook(root))], _HOOK))
            return Attachment(undo.pop_all().close, lambda: _summary(root, unet))


def _hooks(unet: torch.nn.Module, root: _RootHook) -> Iterator[tuple[torch.nn.Module, ModelHook]]:
    yield unet, root
    parts = [unet.conv_in, getattr(unet, "transformer_in", None), *unet.down_blocks, unet.mid_block]
    for index, module in enumerate(m for m in parts if m is not None):
        yield getattr(module, "_orig_mod", module), _EncoderHook(root.shared, index)


def _summary(root: _RootHook, unet: torch.nn.Module) -> dict[str, Any]:
    """Figures of the last run."""
    figures: dict[str, Any] = {"computed": root.computed, "reused": root.reused}
    calls = root.computed + root.reused
    if not calls:
        return figures
    figures["decoder_batches"] = root.decoder_batches
    if macs := macs_or_warning(root.macs, unet):
        figures["macs_full_call"], figures["macs_reused_call"] = macs["full"], macs["reused"]
        figures["macs_saved"] = root.reused / calls * (1 - macs["reused"] / macs["full"])
    return figures


def _require_unet(model: torch.nn.Module) -> None:
    missing = [part for part in _PARTS if not hasattr(model, part)]
    if missing:
        raise ValueError(
            f"Faster Diffusion needs a UNet with an encoder and a decoder; {type(model).__name__} has no "
            f"{', '.join(missing)}. Transformers have caches of their own, e.g. diffusers' FirstBlockCacheConfig"
        )


def _require_schedule(scheduler: Any) -> None:
    if scheduler is None:
        raise ValueError("max_parallel above 1 needs to know the next timesteps: apply it to the pipeline")
    if getattr(scheduler, "order", 1) > 1:
        raise ValueError(
            f"{type(scheduler).__name__} calls the model at stages of a step that depend on one another: use "
            "max_parallel=1, or a scheduler with one call per step (DDIM, Euler, DPM-Solver++ multistep)"
        )
