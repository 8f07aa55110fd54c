"""BAC: every attention and feed-forward of a transformer has its own list of steps at which it is recomputed.

Ji et al., "Block-wise Adaptive Caching for Accelerating Diffusion Policy", ICLR 2026,
https://arxiv.org/abs/2506.13456
"""

from __future__ import annotations

import json
import math
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers.hooks import ModelHook
from diffusers.hooks._common import _ALL_TRANSFORMER_BLOCK_IDENTIFIERS, _ATTENTION_CLASSES, _FEEDFORWARD_CLASSES
from diffusers.models.transformers.transformer_flux import FluxSingleTransformerBlock

from .._fields import require_types
from ..apply import Attachment, MethodConfig, denoiser_of
from ..eval.macs import macs_by_module
from ..registry import Claim, MethodRecord, register
from ._bac_calls import Plan, Recorder
from ._bac_schedule import Steps, even_schedule, stretched
from ._common import (
    PREFIX,
    Position,
    RunHook,
    RunTracker,
    install,
    macs_or_warning,
    outlines,
    place_of,
    refuse_other_caches,
)
from ._forecast import require_order


__all__ = ["BACConfig"]

_HOOK = PREFIX + "bac"
_FORMAT = "diffusers_ext.bac"
_SHARE = 0.3  # of the steps, where nothing else is said: the released command line takes 30 of 100


@dataclass(frozen=True)
class SubBlock:
    """A part of a transformer block whose output, before it is added to the stream, can be reused.

    Args:
        name: Where it is in the model, e.g. `"transformer_blocks.0.ff"`.
        kind: `"attention"`, `"ffn"`, or `"block"` for a block that computes both side by side.
        output: The module that gives the output.
        inputs: Modules that run before it and for nothing else.
    """

    name: str
    kind: str
    output: torch.nn.Module
    inputs: tuple[torch.nn.Module, ...] = ()


def sub_blocks(model: torch.nn.Module) -> dict[str, SubBlock]:
    """The sub-blocks of a transformer by name.

    Raises:
        ValueError: It has none, or is a UNet.
    """
    name = type(model).__name__
    if hasattr(model, "down_blocks"):
        raise ValueError(f"BAC works on transformers; {name} is a UNet: use DeepCacheConfig or FasterDiffusionConfig")
    lists = {n: c for n, c in model.named_children() if n in _ALL_TRANSFORMER_BLOCK_IDENTIFIERS}
    found = {
        part.name: part
        for n, blocks in lists.items()
        for i, block in enumerate(blocks)
        for part in _parts(f"{n}.{i}", getattr(block, "_orig_mod", block))
    }
    if not found:
        raise ValueError(
            "BAC needs a transformer with a list of blocks that hold attention and feed-forward modules of diffusers, "
            f"such as DiT, PixArt, Stable Diffusion 3 or Flux; {name} has none"
        )
    return found


def _parts(name: str, block: torch.nn.Module) -> Iterator[SubBlock]:
    if isinstance(block, FluxSingleTransformerBlock):
        yield SubBlock(name, "block", block.proj_out, (block.attn, block.proj_mlp))
        return
    for child_name, child in block.named_children():
        child = getattr(child, "_orig_mod", child)
        if isinstance(child, _ATTENTION_CLASSES):
            yield SubBlock(f"{name}.{child_name}", "attention", child)
        elif isinstance(child, _FEEDFORWARD_CLASSES):
            yield SubBlock(f"{name}.{child_name}", "ffn", child)


def run_length(target: Any, time: float | None = None) -> tuple[int, int] | None:
    """Different timesteps of a pipeline's schedule, and which of them a run that starts at `time` visits first."""
    scheduler = getattr(target, "scheduler", None)
    if scheduler is None:
        return None
    first = getattr(scheduler, "begin_index", None)
    if first is None and time is not None:
        first = place_of(target, time)
    places = torch.as_tensor(scheduler.timesteps).diff().ne(0).cumsum(0).tolist()
    return [0, *places][-1] + 1, [0, *places][first or 0]


@dataclass
class Shared:
    """Read by the hooks on sub-blocks, written by the root hook: a `Pass` or `Recording`, None outside of a call."""

    call: Any = None


class _OutputHook(ModelHook):
    """On the module that gives a sub-block's output: hands out the stored one, or runs it and reports."""

    def __init__(self, shared: Shared, name: str):
        super().__init__()
        self.shared, self.name = shared, name

    # The decision stays outside of compiled graphs, the module's own forward is still compiled.
    @torch.compiler.disable(recursive=False)
    def new_forward(self, module: torch.nn.Module, *args, **kwargs):
        call = self.shared.call
        if call is None:
            return self.fn_ref.original_forward(*args, **kwargs)
        if self.name in call.reused:
            return call.recall(self.name)
        output = self.fn_ref.original_forward(*args, **kwargs)
        call.keep(self.name, output)
        return output


class _InputHook(ModelHook):
    """On a module that only feeds a sub-block's output: where that is reused, it gives tokens without channels."""

    def __init__(self, shared: Shared, name: str):
        super().__init__()
        self.shared, self.name = shared, name

    @torch.compiler.disable(recursive=False)
    def new_forward(self, module: torch.nn.Module, *args, **kwargs):
        call = self.shared.call
        if call is None or self.name not in call.reused:
            return self.fn_ref.original_forward(*args, **kwargs)
        hidden_states = args[0] if args else kwargs["hidden_states"]
        return hidden_states[..., :0]


class RootHook(RunHook):
    """On the transformer: knows the step and the kind of each call.

    Args:
        source: `Recorder`, or the `Plan` of the current run.
        shared: Also given to the hooks on sub-blocks.
        new_kind: Makes the state of a kind of call.
    """

    def __init__(self, source: Plan | Recorder, shared: Shared, new_kind: Callable[[], Any]):
        super().__init__(RunTracker(new_kind))
        self.source, self.shared, self.first = source, shared, 0

    def begin_call(self, position: Position) -> None:
        self.shared.call = self.source.begin(position.state, self.first + self.tracker.run_step)

    def end_call(self) -> None:
        self.shared.call.end()

    def release(self) -> None:
        self.shared.call = None


class _CacheHook(RootHook):
    """Applies a config, and counts."""

    def __init__(self, config: BACConfig, target: Any, parts: Mapping[str, SubBlock]):
        super().__init__(Plan({}, 0), Shared(), dict)
        self.config, self.target, self.parts = config, target, parts
        self.computed = self.calls = 0
        self.reused: Counter[str] = Counter()
        self.arguments: tuple[tuple, dict] = (), {}

    def begin_run(self, args: tuple, kwargs: dict) -> None:
        length = run_length(self.target, self.tracker.time)
        total, self.first = length or (self.config.num_inference_steps or 0, 0)
        self.source = Plan.of(self.config.schedule_for(self.parts, total), total, self.config.forecast_order)
        self.computed, self.calls, self.reused = 0, 0, Counter()
        self.arguments = outlines((args, kwargs))

    def end_call(self) -> None:
        self.calls += 1
        self.computed += not self.shared.call.reused
        self.reused.update(self.shared.call.reused)
        super().end_call()

    def macs(self, model: torch.nn.Module) -> dict[str, int]:
        """MACs of a full call (under "") and of each sub-block, counted on the meta device."""
        args, kwargs = self.arguments
        with self.aside():
            counts = macs_by_module(_OnMeta(model), *args, depth=sys.maxsize, **kwargs)
        places = {module: f"model.{name}" for name, module in model.named_modules()}
        modules = {name: (part.output, *part.inputs) for name, part in self.parts.items()}
        each = {name: sum(counts.get(places[m], 0) for m in found) for name, found in modules.items()}
        return {"": counts[""], **each}


class _OnMeta(torch.nn.Module):
    """A model that computes with shapes only, its weights left where they are."""

    def __init__(self, model: torch.nn.Module):
        super().__init__()
        self.model = model

    def forward(self, *args, **kwargs):
        state = outlines({**dict(self.model.named_parameters()), **dict(self.model.named_buffers())})
        return torch.func.functional_call(self.model, state, args, kwargs)


def hooks_of(
    model: torch.nn.Module, root: RootHook, parts: Mapping[str, SubBlock]
) -> Iterator[tuple[torch.nn.Module, ModelHook]]:
    """All hooks of a cache or a calibration, for `install`."""
    yield model, root
    for name, part in parts.items():
        yield part.output, _OutputHook(root.shared, name)
        yield from ((module, _InputHook(root.shared, name)) for module in part.inputs)


@register(
    MethodRecord(
        slug="bac",
        family="caching",
        kind="cache",
        title="Block-wise Adaptive Caching for Accelerating Diffusion Policy",
        arxiv="2506.13456",
        summary="Each attention and feed-forward of a transformer recomputed at steps chosen for it by calibration",
        targets=("dit", "mmdit"),
        predictions=("epsilon", "v_prediction", "sample", "flow_prediction"),
        nodes=("DXBACCalibrate", "DXBACApply"),
        claim=Claim(
            text="Diffusion policies up to 3 times faster with the same success rates",
            setting="robot manipulation benchmarks, GPU",
            value=3,
            unit="times faster",
        ),
        conflicts=("any-size-diffusion", "delta-dit", "ras"),
    )
)
@dataclass(frozen=True)
class BACConfig(MethodConfig):
    """Makes a transformer cheaper by recomputing each of its attentions and feed-forwards only at steps of its own.

    In between, the output of a sub-block is the one of its last update; it is stored before the residual addition, and
    adaLN gates use the current time. `calibrate_bac` measures how fast each output changes and chooses the steps; the
    config without a schedule takes steps at equal distances. Works with DiT, PixArt, Stable Diffusion 3, Flux and
    transformers made of diffusers' attention and feed-forward modules. Paper: https://arxiv.org/abs/2506.13456

    Args:
        schedule: Steps at which each sub-block is recomputed, by its name in the model, each list beginning with 0.
            None (default) takes `num_updates` steps at equal distances for all.
        num_updates: M, 2 to the number of steps; only without a schedule. None takes three tenths of the steps.
        num_inference_steps: T that the schedule is for; without a schedule, steps of the run where a model is used
            without a pipeline that knows.
        rescale: Stretch the schedule to a run with another number of steps, instead of refusing it.
        origin: What the schedule was calibrated with, for the file and for warnings.
        forecast_order: What a sub-block gives in between: 0 (default), the output of its last update, as in the paper;
            1 or 2, its forecast, the line or parabola through its last two or three updates. For samplers that add no
            noise, and updates at equal distances, 1 stays closer to the run without a cache at nearly the same cost,
            but for memory. Fractions mix their neighbours: 0.5 is half of the trend.

    Raises:
        ValueError: Values out of range; on `apply`, a UNet, a model without such sub-blocks or with others than the
            schedule names; when a run begins, another number of steps than the schedule is for.

    Example:
        >>> import diffusers_ext
        >>> from diffusers_ext import BACConfig, zoo
        >>> pipe = zoo.load("shapes-dit")
        >>> with diffusers_ext.apply(pipe, BACConfig(num_updates=4)) as handle:
        ...     images = zoo.generate(pipe, ["a red circle"], num_inference_steps=12)
        ...     handle.summary()["bac"]["computed"]  # of 2 x 12 calls, with guidance
        8

    Limits:
        A schedule is for one model, number of steps and sampler. The outputs of all sub-blocks are kept in memory.
        `torch.compile` breaks the graph at every sub-block.
    """

    schedule: Mapping[str, Steps] | None = None
    num_updates: int | None = None
    num_inference_steps: int | None = None
    rescale: bool = False
    origin: Mapping[str, Any] | None = None
    forecast_order: float = 0

    def __post_init__(self) -> None:
        require_types(self)
        require_order(self.forecast_order)
        if self.num_inference_steps is not None and self.num_inference_steps < 1:
            raise ValueError(f"num_inference_steps is {self.num_inference_steps}; accepted: whole numbers from 1")
        if self.schedule is None:
            if self.num_updates is not None:
                require_updates(self.num_updates, self.num_inference_steps)
            return
        if self.num_inference_steps is None or self.num_updates is not None:
            raise ValueError("a schedule comes with num_inference_steps, the steps it is for, and no num_updates")
        given = {name: tuple(steps) for name, steps in self.schedule.items()}
        object.__setattr__(self, "schedule", given)
        for name, steps in given.items():
            _require_steps(name, steps, self.num_inference_steps)

    def schedule_for(self, names: Iterable[str], total: int) -> dict[str, Steps]:
        """The steps of every sub-block in a run of `total` steps.

        Raises:
            ValueError: The schedule is for other sub-blocks or another number of steps.
        """
        if self.schedule is None:
            updates = self.num_updates or min(max(2, math.ceil(_SHARE * total)), total)
            if updates > 1:
                require_updates(updates, total)
            return dict.fromkeys(names, even_schedule(total, updates))
        _require_names(self.schedule, list(names))
        made_for = self.num_inference_steps or total
        if total != made_for and not self.rescale:
            raise ValueError(
                f"this schedule is for {made_for} steps and the run has {total}: calibrate for {total}, or stretch it "
                "with rescale=True"
            )
        return {name: stretched(steps, made_for, total) for name, steps in self.schedule.items()}

    def save(self, path: str | Path) -> None:
        """Write the schedule as a JSON file, which `load` and the ComfyUI node read."""
        if self.schedule is None:
            raise ValueError("there is no schedule to save: make one with calibrate_bac")
        values = {"format": _FORMAT, **(self.origin or {}), "num_steps": self.num_inference_steps}
        part = Path(path).with_suffix(".part")
        part.write_text(json.dumps({**values, "schedule": self.schedule}, indent=1) + "\n", encoding="utf-8")
        part.replace(path)

    @classmethod
    def load(cls, path: str | Path, rescale: bool = False) -> BACConfig:
        """Read a file of `save`.

        Args:
            path: JSON file.
            rescale: Stretch the schedule to runs with another number of steps.

        Raises:
            ValueError: It is not such a file.
        """
        try:
            values = json.loads(Path(path).read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{path} holds no BAC schedule: {error}") from error
        if not isinstance(values, dict) or values.pop("format", None) != _FORMAT:
            raise ValueError(f"{path} holds no BAC schedule: make one with calibrate_bac(...).save(path)")
        schedule, steps = values.pop("schedule", None), values.pop("num_steps", None)
        if not isinstance(schedule, dict):
            raise ValueError(f"{path} holds no BAC schedule: its entry 'schedule' is missing")
        return cls(schedule, num_inference_steps=steps, rescale=rescale, origin=values or None)

    def check(self, target: Any, num_inference_steps: int | None = None) -> tuple[str, ...]:
        model = denoiser_of(target)
        parts = sub_blocks(model)
        refuse_other_caches(model)
        scheduler = getattr(target, "scheduler", None)
        if getattr(scheduler, "order", 1) > 1:  # some of them visit more timesteps than they have steps
            num_inference_steps = None
        total = num_inference_steps or self.num_inference_steps or (run_length(target) or (None,))[0]
        if total is None:
            raise ValueError(
                "which steps are recomputed depends on their number, which a model does not know: apply to the "
                "pipeline, or give num_inference_steps"
            )
        schedule = self.schedule_for(parts, total)
        warnings = []
        if all(len(steps) == total for steps in schedule.values()):
            warnings.append(f"bac: none of {total} steps can be reused; use more steps or fewer updates")
        made_with = (self.origin or {}).get("scheduler_class")
        if scheduler is not None and made_with not in (None, type(scheduler).__name__):
            warnings.append(f"bac: the schedule was calibrated with {made_with}, not {type(scheduler).__name__}")
        return tuple(warnings)

    def attach(self, target: Any) -> Attachment:
        model = denoiser_of(target)
        parts = sub_blocks(model)
        root = _CacheHook(self, target, parts)
        return Attachment(install(model, hooks_of(model, root, parts), _HOOK), lambda: _summary(root, model))


def require_updates(num_updates: int, steps: int | None) -> None:
    """Raise `ValueError` unless M is 2 to the number of steps."""
    if num_updates < 2 or (steps is not None and num_updates > steps):
        raise ValueError(f"num_updates is {num_updates}; accepted: 2 to the number of steps ({steps or 'T'})")


def _require_steps(name: str, steps: Steps, total: int) -> None:
    if not steps or steps[0] != 0 or any(b <= a for a, b in zip(steps, steps[1:])) or steps[-1] >= total:
        raise ValueError(
            f"the steps of {name} are {list(steps)}; accepted: 0 and then rising numbers up to {total - 1}"
        )


def _require_names(schedule: Mapping[str, Steps], names: list[str]) -> None:
    strangers = [name for name in schedule if name not in names]
    missing = [name for name in names if name not in schedule]
    if strangers or missing:
        what = f"names {strangers[0]}, which the model lacks" if strangers else f"has no entry for {missing[0]}"
        raise ValueError(
            f"the schedule {what} ({len(strangers)} unknown, {len(missing)} missing): it was made for another model; "
            "calibrate for this one"
        )


def _summary(root: _CacheHook, model: torch.nn.Module) -> dict[str, Any]:
    """Figures of the last run."""
    figures: dict[str, Any] = {"computed": root.computed, "reused": root.calls - root.computed}
    if not root.calls:
        return figures
    reused = root.reused.total()
    figures["sub_blocks_run"], figures["sub_blocks_reused"] = root.calls * len(root.parts) - reused, reused
    if macs := macs_or_warning(root.macs, model):
        figures["macs_full_call"] = macs[""]
        figures["macs_saved"] = sum(macs[n] * count for n, count in root.reused.items()) / (macs[""] * root.calls)
    return figures
