"""Chosen modules of a model keep what they gave at the last full step, and give it again on the steps in between."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import torch
from diffusers.hooks import ModelHook

from ._common import (
    Position,
    RunHook,
    RunTracker,
    distinct_tensors,
    install,
    macs_on_meta,
    macs_or_warning,
    outlines,
    tensors_in,
)
from ._forecast import History


@dataclass
class Record:
    """What one full step leaves, by the number of the hook."""

    outputs: dict[int, Any] = field(default_factory=dict)


@dataclass
class Shared:
    """Read by the hooks of the modules, written by the root hook. `record` is None outside of a call.

    A full step always fills a fresh `Record`, so that all of them look alike to `torch.compile`.
    """

    record: Record | None = None
    reuse: bool = False


class InheritHook(ModelHook):
    """On a module: its whole output is inherited.

    Copies both ways, as FreeU and T2I adapters write into outputs in place; a tensor that occurs twice stays one.
    """

    def __init__(self, shared: Shared, index: int):
        super().__init__()
        self.shared, self.index = shared, index

    def new_forward(self, module: torch.nn.Module, *args, **kwargs):
        record = self.shared.record
        if record is not None and self.shared.reuse:
            return self.replay(module, record.outputs[self.index], args, kwargs)
        output = self.fn_ref.original_forward(*args, **kwargs)
        if record is not None:
            record.outputs[self.index] = self.keep(module, output, args, kwargs)
        return output

    def keep(self, module: torch.nn.Module, output: Any, args: tuple, kwargs: dict) -> Any:
        """What is stored at a full step."""
        return distinct_tensors(output, lambda t: t.detach().clone())

    def replay(self, module: torch.nn.Module, kept: Any, args: tuple, kwargs: dict) -> Any:
        """What the module gives instead of running."""
        return distinct_tensors(kept, torch.clone)


class InheritRoot(RunHook[History]):
    """On the model: decides between a full step and one on which the hooked modules inherit.

    Args:
        is_full: Does everything run on this step, counted from the start of the run?
        shared: Of the hooks of the modules.
        watched: Number of the hook whose change from one full step to the next is reported.
        order: Of the forecast from full steps.
    """

    def __init__(self, is_full: Callable[[int], bool], shared: Shared, watched: int, order: float):
        super().__init__(RunTracker(lambda: History(order)))
        self.is_full, self.shared, self.watched = is_full, shared, watched
        self.position: Position[History] | None = None
        self.computed = self.reused = 0
        self.changes: list[torch.Tensor] = []
        self.arguments: tuple[tuple, dict] | None = None

    def begin_run(self, args: tuple, kwargs: dict) -> None:
        self.computed = self.reused = 0
        self.changes = []
        self.arguments = outlines((args, kwargs))

    def begin_call(self, position: Position[History]) -> None:
        self.position, history = position, position.state
        reuse = bool(history.kept) and not self.is_full(position.step)
        self.shared.reuse, self.shared.record = reuse, Record(history.at(position.step)) if reuse else Record()
        self.computed += not reuse
        self.reused += reuse

    def end_call(self) -> None:
        if not self.shared.reuse:
            history = self.position.state
            new, old = self.shared.record, history.newest
            if new is not None and old is not None:
                self.changes.append(_change(new.outputs[self.watched], old[self.watched]))
            if new is None:
                history.kept.clear()
            else:
                history.add(self.position.step, new.outputs)

    def release(self) -> None:
        self.shared.record, self.shared.reuse, self.position = None, False, None

    def macs(self, model: torch.nn.Module) -> dict[str, int]:
        """MACs of a full and of a reused call with the last run's shapes, counted on the meta device."""
        counts = {}
        with self.aside():
            self.shared.record = Record()
            for name, self.shared.reuse in (("full", False), ("reused", True)):
                counts[name] = macs_on_meta(model, self.arguments)
        return counts

    def summary(self, model: torch.nn.Module) -> dict[str, Any]:
        """Figures of the last run."""
        figures: dict[str, Any] = {"computed": self.computed, "reused": self.reused}
        calls = self.computed + self.reused
        if not calls:
            return figures
        figures["feature_change"] = [float(change) for change in self.changes]
        if counts := macs_or_warning(self.macs, model):
            figures["macs_full_call"], figures["macs_reused_call"] = counts["full"], counts["reused"]
            figures["macs_saved"] = self.reused / calls * (1 - counts["reused"] / counts["full"])
        return figures


def inherit(
    model: torch.nn.Module, root: InheritRoot, hooked: Iterable[tuple[torch.nn.Module, InheritHook]], name: str
) -> Callable[[], None]:
    """Put the root hook on a model and the others on its modules, compiled or not. All or nothing.

    Returns:
        Function that takes them off.
    """
    modules = ((getattr(module, "_orig_mod", module), hook) for module, hook in hooked)
    return install(model, chain([(model, root)], modules), name)


def _change(new: Any, old: Any) -> torch.Tensor:
    """Relative change of a stored feature from one full step to the next."""
    new, old = tensors_in(new)[0].float(), tensors_in(old)[0].float()
    return (new - old).norm() / old.norm()
