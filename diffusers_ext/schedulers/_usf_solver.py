"""The engine of USF: one exponential-integrator step from a list of choices, and a run of such steps.

lambda = log(alpha / sigma), h = lambda_t - lambda_s. Three forms of the ODE: F is the noise, the clean sample, or what
DPM-Solver-v3's statistics leave of it, g = e^(S_s - S) f - e^(S_s) (B - B_s) with f = (sigma noise - l x) / alpha.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from ..prediction import NoiseSchedule
from ._ems import EMS
from ._usf_schedule import Formula, Step
from .dpm_solver_v3 import Segment


_RELEASED_CELLS = 250  # the authors' statistics have 250 to 1200 cells: used as they are, to agree with their results
_FINE = 64  # cells per step of refined statistics


def phis(z: float, count: int) -> list[float]:
    """P_1 = (e^z - 1) / z, P_{i+1} = (P_i - 1 / i!) / z."""
    if abs(z) < 1e-2:
        return [sum(z**k / math.factorial(k + i) for k in range(8)) for i in range(1, count + 1)]
    values = [math.expm1(z) / z]
    for i in range(1, count):
        values.append((values[-1] - 1 / math.factorial(i)) / z)
    return values


def relaxation(kind: str | None, h: float, z: float, coefficient: float) -> float:
    """Factor 1 + O(h) on the first derivative; z is h for noise and -h for data prediction."""
    if kind is None or z == 0:
        return 1.0
    if kind == "linear":
        return 1 + coefficient * h
    if kind == "unipc-bh1":
        return 0.5 * z * z / (math.expm1(z) - z)
    if kind in ("dpmsolver-2", "unipc-bh2"):
        return 0.5 * z * math.expm1(z) / (math.expm1(z) - z)
    return 1 + (-0.5 if kind == "-0.5exp" else 0.5) * math.expm1(z)


def derivative_weights(distances: Sequence[float], order: int) -> list[float]:
    """a with sum_j a_j d_j^m / m! = [m == order], m = 1..k: the derivative from differences to the start point."""
    d = torch.tensor(distances, dtype=torch.float64)
    powers = torch.stack([d**m / math.factorial(m) for m in range(1, len(distances) + 1)])
    unit = torch.zeros(len(distances), dtype=torch.float64)
    unit[order - 1] = 1
    return torch.linalg.solve(powers, unit).tolist()


@dataclass(frozen=True)
class Update:
    """x_t = keep * x[start] + sum of weight * F[node] over `weights` + constant."""

    start: int
    keep: float | torch.Tensor
    prediction: str
    weights: dict[int, float | torch.Tensor]
    constant: float | torch.Tensor = 0.0

    def __call__(self, points: dict[int, Point]) -> torch.Tensor:
        """The sample at the target from the evaluated points."""
        x = self.keep * points[self.start].x
        for node, weight in self.weights.items():
            x = x + weight * points[node].value(self.prediction)
        return x + self.constant if self.prediction == "v3" else x

    def to(self, like: torch.Tensor) -> Update:
        """With the device and dtype of `like`."""
        weights = {node: _like(weight, like) for node, weight in self.weights.items()}
        return replace(self, keep=_like(self.keep, like), weights=weights, constant=_like(self.constant, like))


def _like(value: float | torch.Tensor, like: torch.Tensor) -> float | torch.Tensor:
    return value.to(like) if isinstance(value, torch.Tensor) else value


@dataclass(frozen=True)
class Point:
    """A node that has been visited: the sample there, what the model saw in it, and f where statistics are used."""

    x: torch.Tensor
    noise: torch.Tensor
    x0: torch.Tensor
    f: torch.Tensor | None = None

    def value(self, prediction: str) -> torch.Tensor:
        """F of a form of the ODE."""
        return {"noise": self.noise, "data": self.x0, "v3": self.f}[prediction]


class Statistics:
    """Statistics of a model on the nodes of a run, each of which takes the nearest point of their grid.

    Args:
        ems: Statistics; refined if they have less than 250 cells, or a step would span less than one.
        schedule: Noise levels of the model.
        log_snr: Of the nodes, increasing; the last may be +inf.
    """

    def __init__(self, ems: EMS, schedule: NoiseSchedule, log_snr: Sequence[float]):
        low, high = ems.log_snr[0].item(), ems.log_snr[-1].item()
        cells = len(ems.log_snr) - 1
        inside = [min(max(lam, low), high) for lam in log_snr]
        gaps = [b - a for a, b in zip(inside, inside[1:]) if b - a > 1e-9]
        per_step = min(gaps, default=high - low) * cells / (high - low)
        enough = per_step >= (1 if cells >= _RELEASED_CELLS else _FINE)
        factor = 1 if enough else 2 ** math.ceil(math.log2(_FINE / per_step))
        self.ems, self.schedule = ems.refined(factor) if factor > 1 else ems, schedule
        self.nodes = [round((lam - low) / (high - low) * cells * factor) for lam in inside]

    def slope(self, node: int, alpha: float) -> torch.Tensor:
        """(1 - l) / alpha, the x in f = (1 - l) x / alpha - x0."""
        return (1 - self.ems.l[self.nodes[node]].double()) / alpha


def make_update(
    formula: Formula,
    levels: Sequence[tuple[float, float]],
    newest: int,
    target: int,
    statistics: Statistics | None = None,
) -> Update:
    """Coefficients of one Taylor step from node newest + 1 + formula.start to node `target`."""
    at = [math.log(a / s) if s > 0 else math.inf for a, s in levels]
    s = newest + 1 + formula.start
    (alpha_s, sigma_s), (alpha_t, sigma_t) = levels[s], levels[target]
    if math.isinf(at[target]):
        return Update(s, 0.0, "data", {s: alpha_t})
    if formula.prediction == "v3":
        return _v3_update(formula, levels, at, s, newest, target, statistics)
    noise, h = formula.prediction == "noise", at[target] - at[s]
    z = h if noise else -h
    scale = -sigma_t if noise else alpha_t
    moments = [scale * h ** (i + 1) * p for i, p in enumerate(phis(z, formula.order))]
    weights = _node_weights(formula, at, s, newest, h, z, moments)
    return Update(s, alpha_t / alpha_s if noise else sigma_t / sigma_s, formula.prediction, weights)


def _node_weights(formula: Formula, at, s: int, newest: int, h: float, z: float, moments: Sequence) -> dict:
    """Weight of F at every node: `moments[i]` belongs to the i-th derivative at s."""
    weights = {s: moments[0]}
    for i, derivative in enumerate(formula.derivatives, start=1):
        nodes = [newest + 1 + point for point in derivative.points]
        factor = relaxation(derivative.relaxation, h, z, derivative.coefficient) if i == 1 else 1.0
        for node, a in zip(nodes, derivative_weights([at[n] - at[s] for n in nodes], i)):
            weights[node] = weights.get(node, 0.0) + moments[i] * factor * a
            weights[s] = weights[s] - moments[i] * factor * a
    return weights


def _v3_update(formula: Formula, levels, at, s: int, newest: int, target: int, statistics: Statistics) -> Update:
    """The step in g, written as one in f: with integrals from s on, g = e^(-S) f - B and g_s = f_s."""
    places, h = statistics.nodes, at[target] - at[s]
    visited = sorted({newest + 1 + p for d in formula.derivatives for p in d.points} - {s})
    c = Segment(statistics.ems, statistics.schedule, [places[s], *(places[n] for n in visited)], places[target])
    moments = [c.ahead(c.power(i)) for i in range(formula.order)]
    weights = _node_weights(formula, at, s, newest, h, h, moments)
    local = dict(zip([s, *visited], c.nodes))
    decay = levels[target][0] * torch.exp(-c.L[c.target])
    constant = c.ahead(c.B) - sum(w * c.B[local[n]] for n, w in weights.items())
    in_f = {n: -decay * w * torch.exp(-c.S[local[n]]) for n, w in weights.items()}
    return Update(s, decay / levels[s][0], "v3", in_f, -decay * constant)


def _statistics(levels, steps: Sequence[Step], ems: EMS | None, schedule) -> Statistics | None:
    """Statistics on the nodes of a run if any of its steps needs them."""
    needing = [i for i, step in enumerate(steps) if step.formula.prediction == "v3"]
    if not needing:
        return None
    if ems is None:
        raise ValueError(
            f"solver schedule, step {needing[0]}: prediction v3 needs the statistics of the model: give them to "
            "load_ems (or to the USF Sampler)"
        )
    return Statistics(ems, schedule, [math.log(a / s) if s > 0 else math.inf for a, s in levels])


def _euler(prediction: str) -> Formula:
    return Formula(prediction, -1, ())


class Solver:
    """A solver schedule compiled for noise levels; knows nothing of diffusers or ComfyUI.

    Args:
        levels: `(alpha, sigma)` of the N + 1 nodes, noisiest first; the last sigma may be 0.
        steps: Choices of the N steps.
        afs: Analytic first step: `"none"`, `"zero_x0"` or `"average_x0"` saves the call at node 0.
        average_x0: Mean of the data for `"average_x0"`, a number or one per channel.
        ems: Statistics of the model, for steps of prediction `"v3"`.
        schedule: Noise levels of the model, with `ems`.

    Raises:
        ValueError: A step needs statistics and there are none.

    Attributes:
        calls: Node of every model call, in order.
    """

    def __init__(
        self,
        levels: Sequence[tuple[float, float]],
        steps: Sequence[Step],
        afs: str = "none",
        average_x0=None,
        ems: EMS | None = None,
        schedule: NoiseSchedule | None = None,
    ):
        self.levels, self.steps, self.afs = list(levels), list(steps), afs
        self.average_x0 = average_x0
        self._statistics = _statistics(self.levels, self.steps, ems, schedule)
        self._place: tuple | None = None
        n = len(self.steps)
        self._predictors = [self._compile(step.formula, i, i + 1) for i, step in enumerate(self.steps)]
        self._correctors = [
            None if step.corrector == "none" else self._compile(step.formula.corrected(step.relaxation), i + 1, i + 1)
            for i, step in enumerate(self.steps)
        ]
        self.calls: list[int] = []
        for node in range(0 if afs == "none" else 1, n + 1):
            corrector = self.steps[node - 1].corrector if node > 0 else "none"
            if node < n or corrector != "none":
                self.calls += [node, node] if corrector == "implicit" and node < n else [node]

    def _compile(self, formula: Formula, newest: int, target: int) -> Update:
        """An update; where nodes coincide (repeated timesteps) a derivative cannot be told and it is first order."""
        used = {formula.start, *(p for d in formula.derivatives for p in d.points)}
        sigmas = [self.levels[newest + 1 + p][1] / self.levels[newest + 1 + p][0] for p in used]
        if target <= newest and len(set(sigmas)) < len(sigmas):
            return Update(newest, 1.0, "data", {})
        if len(set(sigmas)) < len(sigmas):
            formula = _euler(formula.prediction)
        return make_update(formula, self.levels, newest, target, self._statistics)

    def _move_to(self, like: torch.Tensor) -> None:
        """Put the coefficients that are tensors where the samples are, once."""
        if self._statistics is None or self._place == (like.device, like.dtype):
            return
        self._place = (like.device, like.dtype)
        self._predictors = [u.to(like) for u in self._predictors]
        self._correctors = [u and u.to(like) for u in self._correctors]
        self._slopes = [self._statistics.slope(n, alpha).to(like) for n, (alpha, _) in enumerate(self.levels)]

    def _point(self, node: int, x: torch.Tensor, noise: torch.Tensor, x0: torch.Tensor) -> Point:
        self._move_to(x)
        return Point(x, noise, x0, None if self._statistics is None else self._slopes[node] * x - x0)

    def first(self, x: torch.Tensor) -> tuple[torch.Tensor, dict[int, Point]]:
        """What the first model call is given, and the points known by then (one with an analytic first step)."""
        if self.afs == "none":
            return x, {}
        alpha, sigma = self.levels[0]
        if self.afs == "zero_x0":
            point = self._point(0, x, x / sigma, torch.zeros_like(x))
        else:
            mean = torch.as_tensor(self.average_x0, dtype=x.dtype, device=x.device)
            mean = mean.reshape(-1, *[1] * (x.ndim - 2)).expand_as(x) if mean.ndim else mean.expand_as(x)
            point = self._point(0, x, (x - alpha * mean) / sigma, mean)
        points = {0: point}
        return self._predictors[0](points), points

    def advance(
        self, points: dict[int, Point], x: torch.Tensor, noise: torch.Tensor, x0: torch.Tensor, call: int
    ) -> tuple[torch.Tensor, dict[int, Point]]:
        """From model call number `call`, at sample `x`, to what the next call is given (or the result)."""
        node = self.calls[call]
        again = call > 0 and self.calls[call - 1] == node and node in points
        points = {**points, node: self._point(node, x, noise, x0)}
        if not again and node > 0 and self._correctors[node - 1] is not None:
            x = self._apply(self._correctors[node - 1], points, x)
            points[node] = replace(points[node], x=x)
            if call + 1 < len(self.calls) and self.calls[call + 1] == node:
                return x, points
        if node == len(self.steps):
            return x, points
        update = self._predictors[node]
        if not self._known(update, points):  # a run that began in the middle has no history yet
            update = self._compile(_euler(self.steps[node].formula.prediction), node, node + 1).to(x)
        return update(points), points

    def _apply(self, update: Update, points: dict[int, Point], x: torch.Tensor) -> torch.Tensor:
        return update(points) if self._known(update, points) else x

    @staticmethod
    def _known(update: Update, points: dict[int, Point]) -> bool:
        return update.start in points and all(node in points for node in update.weights)


def solve_usf(solver: Solver, model: Callable, x: torch.Tensor) -> torch.Tensor:
    """Run a solver.

    Args:
        solver: Compiled schedule.
        model: `(x, node) -> clean sample`.
        x: Sample at node 0.
    """
    x, points = solver.first(x)
    for call, node in enumerate(solver.calls):
        x0 = model(x, node)
        alpha, sigma = solver.levels[node]
        x, points = solver.advance(points, x, (x - alpha * x0) / sigma, x0, call)
    return x
