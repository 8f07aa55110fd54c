"""BAC inside of a model call: what each sub-block reuses and keeps, or what a calibration records of it.

A `Pass` is one model call. Both doors, diffusers hooks and ComfyUI patches, ask it before a sub-block runs and tell it
what came out.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from ._bac_schedule import Steps, mean_difference, similarity
from ._common import map_tensors, tensors_in
from ._forecast import History


# Of one kind of call: what each sub-block gave at its last updates, as lists of outputs in the order in which it gave
# them. Mostly one, but chunked feed-forwards give several, and so does a joint attention whose two projections are
# caught one by one.
Store = dict[str, History]
# Of one kind of call in a calibration: what each sub-block gave, by step.
Rows = dict[int, dict[str, torch.Tensor]]


@dataclass
class Pass:
    """One model call.

    Args:
        store: Outputs kept by earlier calls of its kind; brought up to date by `end`.
        reused: Sub-blocks that do not run.
        kept: Sub-blocks whose output a later call will want.
        step: Of the run.
        order: Of the forecast from earlier updates.
    """

    store: Store
    reused: frozenset[str]
    kept: frozenset[str]
    step: int
    order: float
    fresh: dict[str, list[Any]] = field(default_factory=dict)
    forecast: dict[str, list[Any]] = field(default_factory=dict)
    ran: set[str] = field(default_factory=set)
    visits: Counter[str] = field(default_factory=Counter)

    def recall(self, name: str) -> Any:
        """The next output that stands in for a reused sub-block."""
        if name not in self.forecast:
            self.forecast[name] = self.store[name].at(self.step)
        self.visits[name] += 1
        return self.forecast[name][self.visits[name] - 1]

    def keep(self, name: str, output: Any) -> None:
        """Take the next output of a sub-block that ran."""
        self.ran.add(name)
        if name in self.kept:
            self.fresh.setdefault(name, []).append(map_tensors(output, torch.Tensor.detach))

    def end(self) -> None:
        """The call succeeded: forget what is out of date."""
        for name in self.ran - self.fresh.keys():
            self.store.pop(name, None)
        for name, outputs in self.fresh.items():
            self.store.setdefault(name, History(self.order)).add(self.step, outputs)


@dataclass(frozen=True)
class Plan:
    """The schedule of one run.

    Args:
        updates: Steps at which each sub-block is recomputed.
        total: T, steps of the run.
        order: Of the forecast from earlier updates.
    """

    updates: Mapping[str, frozenset[int]]
    total: int
    order: float = 0

    @classmethod
    def of(cls, schedule: Mapping[str, Steps], total: int, order: float = 0) -> Plan:
        return cls({name: frozenset(steps) for name, steps in schedule.items()}, total, order)

    @staticmethod
    def new_kind() -> Store:
        """State of a kind of call."""
        return {}

    def _due(self, name: str, step: int) -> bool:
        return step >= self.total or step in self.updates[name]

    def begin(self, store: Store, step: int) -> Pass:
        """What to do with a call at a step; a sub-block without a stored output always runs."""
        reused = frozenset(name for name in store if not self._due(name, step))
        ran = (name for name in self.updates if name not in reused)
        kept = frozenset(name for name in ran if self.order or not self._due(name, step + 1))
        return Pass(store, reused, kept, step, self.order)


@dataclass
class Recording:
    """One model call of a calibration: everything runs, outputs are noted. Same interface as `Pass`."""

    recorder: Recorder
    rows: Rows
    step: int
    parts: dict[str, list[torch.Tensor]] = field(default_factory=dict)
    reused: frozenset[str] = frozenset()
    kept: frozenset[str] = frozenset()

    def keep(self, name: str, output: Any) -> None:
        self.parts.setdefault(name, []).extend(t.detach().flatten(1) for t in tensors_in(output))

    def end(self) -> None:
        self.recorder.order.update(dict.fromkeys(self.parts))
        if self.step not in self.rows:  # of several calls within a step, the first counts
            self.rows[self.step] = {name: self.recorder.elements(parts) for name, parts in self.parts.items()}


class Recorder:
    """Gathers outputs of whole runs and averages their similarities.

    Args:
        metric: Of `similarity`.
        max_elements: Elements of one output that are looked at, always the same ones, drawn at random.
        seed: Of the draw.
    """

    def __init__(self, metric: str, max_elements: int, seed: int):
        self.metric, self.max_elements, self.seed = metric, max_elements, seed
        self.kinds: list[Rows] = []
        self.order: dict[str, None] = {}  # sub-blocks in the order in which they ran
        self.similarity: dict[str, torch.Tensor] = {}
        self.difference: dict[str, torch.Tensor] = {}
        self.samples = 0
        self._chosen: dict[int, torch.Tensor] = {}

    def new_kind(self) -> Rows:
        """State of a kind of call."""
        self.kinds.append({})
        return self.kinds[-1]

    def begin(self, rows: Rows, step: int) -> Recording:
        """A call at a step."""
        return Recording(self, rows, step)

    def elements(self, parts: list[torch.Tensor]) -> torch.Tensor:
        """`[rows, at most max_elements]` of the outputs of one sub-block."""
        sizes = [part.shape[1] for part in parts]
        whole = sum(sizes)
        if whole <= self.max_elements:
            return torch.cat([part.float().cpu() for part in parts], 1)
        if whole not in self._chosen:
            generator = torch.Generator().manual_seed(self.seed)
            self._chosen[whole] = torch.randperm(whole, generator=generator)[: self.max_elements].sort().values
        picked, start = [], 0
        for part, size in zip(parts, sizes):
            chosen = self._chosen[whole]
            here = chosen[(chosen >= start) & (chosen < start + size)] - start
            picked.append(part[:, here.to(part.device)].float().cpu())
            start += size
        return torch.cat(picked, 1)

    def end_run(self) -> None:
        """Add the kinds of call that ran every sub-block at every step of the run to the averages.

        Raises:
            ValueError: Nothing was recorded, or a run has another number of steps than the ones before.
        """
        kinds, self.kinds = self.kinds, []
        steps = 1 + max((step for rows in kinds for step in rows), default=-1)
        if not steps:
            raise ValueError("nothing was recorded: the function must run the model at every step of a whole run")
        before = next((len(s) for s in self.similarity.values()), steps)
        if steps != before:
            raise ValueError(f"a calibration run had {steps} steps, the ones before {before}: use one number of steps")
        for rows in kinds:
            if len(rows) == steps and all(row.keys() == self.order.keys() for row in rows.values()):
                self._add([rows[step] for step in range(steps)])

    def _add(self, rows: Sequence[Mapping[str, torch.Tensor]]) -> None:
        n = len(next(iter(rows[0].values())))
        for name in rows[0]:
            features = torch.stack([row[name] for row in rows], 1)
            for sums, found in (
                (self.similarity, similarity(features, self.metric)),
                (self.difference, mean_difference(features)),
            ):
                sums[name] = sums.get(name, 0) + n * found
        self.samples += n
