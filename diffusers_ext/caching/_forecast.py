"""What a cached feature is likely to be by now: the polynomial through its last full steps, continued.

Repeating a feature is the polynomial of order 0. Orders 1 and 2 continue its trend, as TaylorSeer does for the outputs
of transformer blocks (Liu et al., https://arxiv.org/abs/2503.06923). Orders in between mix both neighbours: a trend
that is continued in part errs less where forecasts reach far, as damped trends do in time series.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from ._common import map_tensors, tensors_in


MAX_ORDER = 2


def lagrange_weights(steps: Sequence[int], step: float) -> list[float]:
    """Weights w_i with p(step) = sum_i w_i p(steps_i) for every polynomial p of a degree below len(steps)."""
    weights = []
    for i, own in enumerate(steps):
        weight = 1.0
        for j, other in enumerate(steps):
            if j != i:
                weight *= (step - other) / (own - other)
        weights.append(weight)
    return weights


def forecast_weights(steps: Sequence[int], step: float, order: float) -> list[float]:
    """Weights of values at `steps` in their forecast for `step`, of `order` or the largest that they allow."""
    order = min(order, len(steps) - 1)
    low = math.floor(order)
    repeated, continued = (_through(steps, step, degree) for degree in (low, math.ceil(order)))
    return [a + (order - low) * (b - a) for a, b in zip(repeated, continued)]


def _through(steps: Sequence[int], step: float, degree: int) -> list[float]:
    last = steps[-degree - 1 :]
    return [0.0] * (len(steps) - len(last)) + lagrange_weights(last, step)


def require_order(order: float, largest: int = MAX_ORDER) -> None:
    """Raise `ValueError` unless `forecast_order` is one that is accepted."""
    if not 0 <= order <= largest:
        raise ValueError(f"forecast_order is {order}; accepted: 0 to {largest}")


@dataclass
class History:
    """The last full steps of one kind of call.

    Args:
        order: Of the polynomial; as many full steps and one are kept. 0 repeats the newest, bit for bit; a fraction
            mixes the polynomials of the whole numbers around it.
    """

    order: float = 0
    kept: list[tuple[int, Any]] = field(default_factory=list)

    @property
    def newest(self) -> Any:
        """What the last full step left, or None before the first."""
        return self.kept[-1][1] if self.kept else None

    def add(self, step: int, value: Any) -> None:
        """A full step: `value` is tensors inside of tuples, lists and dicts."""
        self.kept = [*self.kept[-math.ceil(self.order) :], (step, value)] if self.order else [(step, value)]

    def at(self, step: int) -> Any:
        """The forecast for a step, in the form of what was kept. Tensors without numbers stay as they are."""
        known = [(s, tensors_in(value)) for s, value in self.kept]
        newest = known[-1][1]
        # Another tool may have changed the number of tokens in between.
        alike = [(s, values) for s, values in known if [v.shape for v in values] == [v.shape for v in newest]]
        if len(alike) == 1:
            return self.newest
        weights = forecast_weights([s for s, _ in alike], step, self.order)
        done: dict[int, torch.Tensor] = {}  # a tensor that occurs twice stays one
        for values in zip(*(values for _, values in alike)):
            if id(values[-1]) not in done:
                done[id(values[-1])] = _weighted(weights, values)
        return map_tensors(self.newest, lambda t: done[id(t)])


def _weighted(weights: Sequence[float], values: Sequence[torch.Tensor]) -> torch.Tensor:
    """sum_i w_i v_i, in float32 at least: trends of half-precision features are small beside the features."""
    last = values[-1]
    if last.device.type == "meta" or not last.is_floating_point():
        return last
    wide = torch.promote_types(last.dtype, torch.float32)
    total = sum(weight * value.to(wide) for weight, value in zip(weights, values))
    return total.to(last.dtype)
