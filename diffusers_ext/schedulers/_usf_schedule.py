"""Solver schedules of USF: what each step does, as data that is checked, named and kept in JSON files."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ._common import require_choice


PREDICTIONS = ("noise", "data", "v3")
_V3 = "dpmsolver_v3"  # its name in the authors' files
RELAXATIONS = (None, "linear", "dpmsolver-2", "unipc-bh1", "unipc-bh2", "0.5exp", "-0.5exp")
CORRECTORS = ("none", "pseudo", "implicit")
AFS = ("none", "zero_x0", "average_x0")
MAX_ORDER = 4


@dataclass(frozen=True)
class Derivative:
    """Estimate of one derivative from the differences of `points` to the start point.

    Args:
        points: Which evaluated points, -1 the newest; as many as the order of the estimate.
        relaxation: Factor on the first derivative, one of `RELAXATIONS`.
        coefficient: c of the `"linear"` relaxation 1 + c h.
    """

    points: tuple[int, ...]
    relaxation: str | None = None
    coefficient: float = 0.0


@dataclass(frozen=True)
class Formula:
    """One Taylor step.

    Args:
        prediction: `"noise"`, `"data"` or `"v3"` (the parametrisation of DPM-Solver-v3, needs statistics).
        start: Point the step starts from, -1 the newest.
        derivatives: Estimates of the first, second, ... derivative; order = their number + 1.
    """

    prediction: str
    start: int
    derivatives: tuple[Derivative, ...]

    @property
    def order(self) -> int:
        return len(self.derivatives) + 1

    def corrected(self, relaxation: str | None = None) -> Formula:
        """The corrector: the same step again, one order higher, with the point it led to (now -1) among the points."""
        points = [(*(p - 1 for p in d.points), -1) for d in self.derivatives] or [()]
        first = Derivative(points[0] or (-1,), relaxation)
        rest = [Derivative(p) for p in (*points[1:], points[-1])] if self.derivatives else []
        return Formula(self.prediction, self.start - 1, (first, *rest))


@dataclass(frozen=True)
class Step:
    """A predictor and whether its result is corrected.

    Args:
        formula: The predictor.
        corrector: `"none"`, `"pseudo"` or `"implicit"` (one more call).
        relaxation: Factor on the corrector's first derivative, as in `Derivative`.
    """

    formula: Formula
    corrector: str = "none"
    relaxation: str | None = None


def check_step(step: Step, i: int) -> None:
    """Raise `ValueError` naming step `i` unless it can be taken with i + 1 points."""
    f, have = step.formula, i + 1
    _require(f.prediction in PREDICTIONS, i, f"prediction {f.prediction!r}; accepted: {', '.join(PREDICTIONS)}")
    _require(step.corrector in CORRECTORS, i, f"corrector {step.corrector!r}; accepted: {', '.join(CORRECTORS)}")
    _require(step.relaxation in RELAXATIONS and step.relaxation != "linear", i, f"relaxation {step.relaxation!r}")
    _require(f.order <= MAX_ORDER, i, f"order {f.order}; at most {MAX_ORDER}")
    _require(f.order <= have, i, f"order {f.order}, but only {have} points are known then")
    _require(-have <= f.start <= -1, i, f"start point {f.start}; it lies between {-have} and -1")
    for n, derivative in enumerate(f.derivatives, start=1):
        _require(derivative.relaxation in RELAXATIONS, i, f"relaxation {derivative.relaxation!r}")
        _require(len(derivative.points) >= n, i, f"{len(derivative.points)} active points for derivative {n}")
        _require(f.start not in derivative.points, i, f"active points {derivative.points} with the start point")
        _require(len(set(derivative.points)) == len(derivative.points), i, f"repeated points {derivative.points}")
        outside = [p for p in derivative.points if not -have <= p <= -1]
        _require(not outside, i, f"active points {outside}; they lie between {-have} and -1")


def _require(ok: bool, i: int, problem: str) -> None:
    if not ok:
        raise ValueError(f"solver schedule, step {i}: {problem}")


@dataclass(frozen=True)
class SolverSchedule:
    """Every choice of a run: times, and per step order, prediction, start, derivative estimates and corrector.

    Args:
        times: t at the N + 1 nodes, falling: (timestep + 1) / length for discrete models, sigma for flow models. The
            last may be 0 (clean) if the last step is a first-order data step.
        steps: The N steps.
        afs: Analytic first step, saves one call: `"none"`, `"zero_x0"` or `"average_x0"`.
        average_x0: Mean of the data for `"average_x0"`: a number or one per channel.

    Raises:
        ValueError: Something cannot be done; the message names the step.

    Example:
        >>> schedule = USFScheduler(beta_schedule="scaled_linear").preset_schedule(5, "dpmpp_2m")
        >>> schedule.save("five.json")
    """

    times: tuple[float, ...]
    steps: tuple[Step, ...]
    afs: str = "none"
    average_x0: float | tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        require_choice("afs", self.afs, AFS)
        if len(self.times) != len(self.steps) + 1 or not self.steps:
            raise ValueError(f"solver schedule: {len(self.times)} times for {len(self.steps)} steps")
        for i, (before, after) in enumerate(zip(self.times, self.times[1:])):
            _require(math.isfinite(before) and 0 <= after < before, i, f"times fall from {before} to {after}")
        for i, step in enumerate(self.steps):
            check_step(step, i)
        last, i = self.steps[-1], len(self.steps) - 1
        if self.times[-1] == 0:
            plain = last.formula == Formula("data", -1, ()) and last.corrector == "none"
            _require(plain, i, "a step to time 0 must be a first-order data step from -1 without corrector")
        if self.afs == "average_x0" and self.average_x0 is None:
            raise ValueError("solver schedule: afs average_x0 needs `average_x0`, the mean of the data")

    @property
    def calls(self) -> int:
        """Model calls of a run."""
        implicit = sum(s.corrector == "implicit" for s in self.steps[:-1])
        return len(self.steps) - (self.afs != "none") + implicit + (self.steps[-1].corrector != "none")

    def to_dict(self) -> dict[str, Any]:
        """Plain lists and numbers, under the names of the authors' files."""
        derivatives = [
            [
                {
                    "estimate": f"Difference_{len(d.points)}",
                    "active_points": list(d.points),
                    "relaxation": d.relaxation,
                    "relaxation_coefficient": d.coefficient,
                }
                for d in s.formula.derivatives
            ]
            for s in self.steps
        ]
        average = list(self.average_x0) if isinstance(self.average_x0, tuple) else self.average_x0
        return {
            "timesteps": list(self.times),
            "orders": [s.formula.order for s in self.steps],
            "prediction_types": [f"{_written(s.formula.prediction)}_prediction" for s in self.steps],
            "start_points": [s.formula.start for s in self.steps],
            "derivative_types": derivatives,
            "corrector_types": [{"type": s.corrector, "relaxation": s.relaxation} for s in self.steps],
            "afs": self.afs,
            "average_x0": average,
        }

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> SolverSchedule:
        """The schedule of `to_dict`, or of an author's file turned into lists."""
        names = ("timesteps", "orders", "prediction_types", "start_points", "derivative_types", "corrector_types")
        missing = [name for name in names if name not in values]
        if missing or values.get("skip_coefficients"):
            problem = f"lacks {', '.join(missing)}" if missing else "has skip coefficients, which are not supported"
            raise ValueError(f"solver schedule {problem}")
        n = len(values["orders"])
        if any(len(values[name]) != n for name in names[2:]):
            raise ValueError(f"solver schedule: the lists {', '.join(names[1:])} differ in length")
        steps = tuple(_read_step(values, i) for i in range(n))
        average, afs = values.get("average_x0"), values.get("afs", "none")
        average = tuple(average) if isinstance(average, list) else average
        return cls(tuple(map(float, values["timesteps"])), steps, "none" if afs == "no_afs" else afs, average)

    def save(self, path: str | Path) -> None:
        """Write a JSON file."""
        part = Path(path).with_suffix(".part")
        part.write_text(json.dumps(self.to_dict(), indent=1) + "\n", encoding="utf-8")
        part.replace(path)

    @classmethod
    def load(cls, path: str | Path) -> SolverSchedule:
        """Read a file of `save`."""
        try:
            values = json.loads(Path(path).read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{path} is not a solver schedule: {error}") from error
        if not isinstance(values, dict):
            raise ValueError(f"{path} is not a solver schedule: it holds no JSON object")
        return cls.from_dict(values)


def _written(prediction: str) -> str:
    return _V3 if prediction == "v3" else prediction


def _read_step(values: dict[str, Any], i: int) -> Step:
    order, kind = values["orders"][i], str(values["prediction_types"][i]).removesuffix("_prediction")
    kind = "v3" if kind == _V3 else kind
    listed = values["derivative_types"][i][: order - 1]
    _require(len(listed) == order - 1, i, f"order {order} with {len(listed)} derivatives")
    derivatives = []
    for d in listed:
        points = tuple(d["active_points"])
        _require(d["estimate"] == f"Difference_{len(points)}", i, f"{d['estimate']} with {len(points)} active points")
        coefficient = float(d.get("relaxation_coefficient") or 0.0)
        derivatives.append(Derivative(points, _read_relaxation(d), coefficient))
    return Step(Formula(kind, values["start_points"][i], tuple(derivatives)), *_read_corrector(values, i))


def _read_relaxation(derivative: dict[str, Any]) -> str | None:
    kind = derivative.get("relaxation")
    return None if kind == "no_relaxation" else kind


def _read_corrector(values: dict[str, Any], i: int) -> tuple[str, str | None]:
    """Type and relaxation of a corrector: a name, our dictionary, or the authors' with a `derivative_type`."""
    written = values["corrector_types"][i]
    written = written if isinstance(written, dict) else {"type": written}
    if written["type"] in (None, "none", "no_corrector"):
        return "none", None
    first = (written.get("derivative_type") or [written])[0]
    return written["type"], _read_relaxation(first)


def _multistep(prediction: str, order: int, relax: str | None, corrector: str = "none") -> Callable:
    def build(n: int) -> list[Step]:
        steps = []
        for i in range(n):
            q = min(order, i + 1, n - i)
            points = tuple(range(-2, -q - 1, -1))
            first = [Derivative(points, relax if q == 2 else None)] if q > 1 else []
            derivatives = (*first, *(Derivative(points) for _ in range(q - 2)))
            formula = Formula(prediction, -1, derivatives)
            corrected = corrector != "none" and i < n - 1
            steps.append(Step(formula, corrector, None if q > 1 else relax) if corrected else Step(formula))
        return steps

    return build


def _single(prediction: str) -> Callable:
    def build(n: int) -> list[Step]:
        second = Step(Formula(prediction, -2, (Derivative((-1,), "dpmsolver-2"),)))
        return [second if i % 2 else Step(Formula(prediction, -1, ())) for i in range(n)]

    return build


PRESETS: dict[str, Callable[[int], list[Step]]] = {
    "ddim": _multistep("data", 1, None),
    "dpmpp_2m": _multistep("data", 2, "dpmsolver-2"),
    "dpmpp_2m_taylor": _multistep("data", 2, None),
    "dpmpp_3m": _multistep("data", 3, None),
    "dpm_2m": _multistep("noise", 2, "dpmsolver-2"),
    "dpm_solver_2s": _single("noise"),
    "dpmpp_2s": _single("data"),
    "v3_2m": _multistep("v3", 2, None),
    "v3_3m": _multistep("v3", 3, None),
    "unipc": _multistep("data", 2, None, "pseudo"),
    "unipc_bh1": _multistep("data", 2, "unipc-bh1", "pseudo"),
    "unipc_bh2": _multistep("data", 2, "unipc-bh2", "pseudo"),
}


def preset_steps(name: str, n: int, to_clean: bool) -> tuple[Step, ...]:
    """The steps of a named solver; orders fall towards the end; a step to clean data is first order."""
    steps = PRESETS[name](n)
    if to_clean:
        steps[-1] = Step(Formula("data", -1, ()))
    return tuple(steps)
