"""DEIS: exponential integrators in the model's own time, in rho = sigma / alpha, in log rho, and Runge-Kutta.

With v = x / alpha and rho = sigma / alpha the probability-flow ODE is dv/drho = eps. tAB, rhoAB and log-rho AB replace
eps by the polynomial through its last values in t, rho or log rho and integrate it exactly; rhoRK is a Runge-Kutta
method in rho; iPNDM takes the constant Adams-Bashforth weights. https://arxiv.org/abs/2204.13902
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence

import numpy as np
import torch

from ..prediction import NoiseSchedule
from ..registry import Claim, MethodRecord, register
from ._common import NoiseLevelScheduler, clean_and_noise, combine, require_choice, schedule_config
from ._native import NativeRun


__all__ = ["DEISFullScheduler"]

METHODS = ("t_ab", "rho_ab", "logrho_ab", "ipndm", "rho_rk")
PHASES = ("t", "log", "rho")
QUADRATURES = ("gauss", "riemann")
_MAX_ORDER = 4
_PURE_NOISE = 1e5  # of rho

# name -> (nodes c, rows a, weights b) of the explicit Runge-Kutta methods of the paper
RK_TABLEAUS: dict[str, tuple[tuple, tuple, tuple]] = {
    "1euler": ((0,), ((),), (1,)),
    "2heun": ((0, 1), ((), (1,)), (1 / 2, 1 / 2)),
    "3kutta": ((0, 1 / 2, 1), ((), (1 / 2,), (-1, 2)), (1 / 6, 4 / 6, 1 / 6)),
    "3ral": ((0, 1 / 2, 3 / 4), ((), (1 / 2,), (0, 3 / 4)), (2 / 9, 1 / 3, 4 / 9)),
    "3heun": ((0, 1 / 3, 2 / 3), ((), (1 / 3,), (0, 2 / 3)), (1 / 4, 0, 3 / 4)),
    "3vdh": ((0, 8 / 15, 2 / 3), ((), (8 / 15,), (1 / 4, 5 / 12)), (1 / 4, 0, 3 / 4)),
    "3ssprk": ((0, 1, 1 / 2), ((), (1,), (1 / 4, 1 / 4)), (1 / 6, 1 / 6, 2 / 3)),
    "4rk": ((0, 1 / 2, 1 / 2, 1), ((), (1 / 2,), (0, 1 / 2), (0, 0, 1)), (1 / 6, 1 / 3, 1 / 3, 1 / 6)),
}
_ADAMS_BASHFORTH = ((1.0,), (3 / 2, -1 / 2), (23 / 12, -16 / 12, 5 / 12), (55 / 24, -59 / 24, 37 / 24, -9 / 24))


# --- time of the model <-> rho ---------------------------------------------------------------------------------------


class Clock:
    """The model's own time as a function of rho: discrete VP time interpolates alpha^2 linearly, as the authors do.

    Flow models have t = sigma; models with continuous noise levels have t = log rho.

    Args:
        schedule: Noise levels of the model.
    """

    def __init__(self, schedule: NoiseSchedule):
        self.family = schedule.family
        if schedule.table is not None:
            self.bar = torch.sigmoid(2 * schedule.table).numpy()

    def rho(self, t) -> np.ndarray:
        """rho at times `t`."""
        t = np.asarray(t, dtype=np.float64)
        if self.family != "vp":
            return t / (1 - t) if self.family == "flow" else np.exp(t)
        bar = np.interp(t, np.arange(len(self.bar)), self.bar).clip(1e-7, 1 - 1e-7)
        return np.sqrt((1 - bar) / bar)

    def time(self, rho) -> np.ndarray:
        """Time at `rho`; that of the cleanest level of a discrete model below it."""
        rho = np.asarray(rho, dtype=np.float64)
        if self.family != "vp":
            return rho / (1 + rho) if self.family == "flow" else np.log(rho)
        return np.interp(-1 / (1 + rho**2), -self.bar, np.arange(len(self.bar)))


def time_grid(clock, steps: int, phase: str, kappa: float, start: float, end: float) -> np.ndarray:
    """Times t_0 = start ... t_N = end: `t` by t^(1/kappa), `log` by log rho, `rho` by rho^(1/kappa)."""
    if phase == "t":
        return np.linspace(start ** (1 / kappa), end ** (1 / kappa), steps + 1) ** kappa
    first, last = clock.rho(start), clock.rho(end)
    if phase == "log":
        return clock.time(np.exp(np.linspace(np.log(first), np.log(last), steps + 1)))
    return clock.time(np.linspace(first ** (1 / kappa), last ** (1 / kappa), steps + 1) ** kappa)


def without_repeats(times: np.ndarray, last: int) -> np.ndarray:
    """Times of a discrete model: if two fall in one timestep, whole timesteps, the smallest free ones filling up.

    With more times than timesteps they stay fractional.
    """
    whole = np.unique(times.astype(int))
    if len(whole) == len(times) or len(times) > last + 1:
        return times
    free = np.setdiff1d(np.arange(1, last + 1), whole)[: len(times) - len(whole)]
    return np.sort(np.concatenate([whole, free]))[::-1].astype(np.float64)


# --- weights of past evaluations -------------------------------------------------------------------------------------


@functools.cache
def _gauss_legendre(n: int = 64) -> tuple[np.ndarray, np.ndarray]:
    points, weights = np.polynomial.legendre.leggauss(n)
    return (points + 1) / 2, weights / 2


def lagrange(u: np.ndarray, nodes: Sequence[float], j: int) -> np.ndarray:
    """Lagrange basis polynomial: 1 at `nodes[j]`, 0 at the other nodes."""
    factors = [(u - other) / (nodes[j] - other) for k, other in enumerate(nodes) if k != j]
    return math.prod(factors) if factors else np.ones_like(u)


def ab_weights(nodes: Sequence[float], target: float, variable: Callable) -> list[float]:
    """C_ij / alpha_{i+1}: integrals over rho from `nodes[0]` to `target` of the Lagrange polynomials in `variable`.

    Args:
        nodes: rho of the evaluations, newest (rho_i) first.
        target: rho_{i+1} >= 0.
        variable: Array of rho -> variable of the polynomial (time, rho or log rho).
    """
    share, weight = _gauss_legendre()
    rho = nodes[0] + (target - nodes[0]) * share
    u, at = variable(rho), [float(v) for v in variable(np.asarray(nodes))]
    return [float((weight * lagrange(u, at, j)).sum() * (target - nodes[0])) for j in range(len(nodes))]


def riemann_weights(nodes: Sequence[float], target: float, clock, variable: str) -> list[float]:
    """`ab_weights` by the authors' rule: the left Riemann sum of 10 000 terms in t (tAB) or rho (rhoAB)."""
    share = np.arange(10_000) / 10_000
    if variable == "rho":
        u, at, measure = nodes[0] + (target - nodes[0]) * share, list(nodes), (target - nodes[0]) / 10_000
    else:
        *at, end = np.round(clock.time(np.array([*nodes, target])), 9).tolist()  # whole timesteps are whole again
        span = end - at[0]
        u = at[0] + span * share
        measure = _slope(clock, u) * span / 10_000
    return [float((measure * lagrange(u, at, j)).sum()) for j in range(len(nodes))]


def _slope(clock, t: np.ndarray) -> np.ndarray:
    """drho/dt = -(d alpha^2 / dt) / (2 alpha^4 rho); of a discrete model in the cell to the right of a timestep."""
    rho = clock.rho(t)
    if clock.family != "vp":
        return (1 + rho) ** 2 if clock.family == "flow" else rho
    cell = np.floor(t).astype(int).clip(0, len(clock.bar) - 2)
    return -(clock.bar[cell + 1] - clock.bar[cell]) * (1 + rho**2) ** 2 / (2 * rho)


class Weights:
    """Weights of the last evaluations of eps in v_{i+1} = v_i + sum_j w_j eps_{i-j}, computed once.

    Args:
        method: `"t_ab"`, `"rho_ab"`, `"logrho_ab"` or `"ipndm"`.
        rhos: rho of the N + 1 nodes.
        clock: Time of the model, see `Clock`.
        quadrature: `"gauss"` (to round-off) or `"riemann"` (the authors' sum; tAB and rhoAB).
    """

    def __init__(self, method: str, rhos: Sequence[float], clock, quadrature: str = "gauss"):
        self.method, self.rhos, self.clock, self.quadrature = method, list(rhos), clock, quadrature
        self._known: dict[tuple[int, int], list[float]] = {}

    def __call__(self, i: int, degree: int) -> list[float]:
        """`degree + 1` weights of step `i`, newest first; one for log rho to rho = 0, infinitely far away."""
        if (i, degree) not in self._known:
            self._known[i, degree] = self._compute(i, degree)
        return self._known[i, degree]

    def _compute(self, i: int, degree: int) -> list[float]:
        target = self.rhos[i + 1]
        degree = 0 if self.method == "logrho_ab" and target == 0 else degree
        nodes = list(dict.fromkeys(self.rhos[i - j] for j in range(degree + 1)))
        if len(nodes) <= degree:  # repeated timesteps
            return self._without_repeats(i, degree, nodes)
        if self.method == "ipndm":
            return [(target - nodes[0]) * a for a in _ADAMS_BASHFORTH[degree]]
        if self.quadrature == "riemann" and self.method != "logrho_ab":
            return riemann_weights(nodes, target, self.clock, "rho" if self.method == "rho_ab" else "t")
        variable = {"t_ab": self.clock.time, "rho_ab": np.asarray, "logrho_ab": np.log}[self.method]
        return ab_weights(nodes, target, variable)

    def _without_repeats(self, i: int, degree: int, nodes: list[float]) -> list[float]:
        """Weights of the polynomial through the distinct nodes; the others get 0."""
        distinct = Weights(self.method, [*nodes[::-1], self.rhos[i + 1]], self.clock, self.quadrature)
        weights = dict(zip(nodes, distinct(len(nodes) - 1, len(nodes) - 1)))
        return [weights.pop(self.rhos[i - j], 0.0) for j in range(degree + 1)]


# --- steps -----------------------------------------------------------------------------------------------------------


def advance(
    x0: torch.Tensor, rho: float, evaluations: Sequence, weights: Sequence[float], scale: float = 1.0
) -> torch.Tensor:
    """scale * (v + sum of weights times evaluations of eps): every update of this module.

    v = x0 + rho * eps is taken apart, for near pure noise (x0 and the first evaluation are of order 1, rho is not)
    float32 would lose the sum.

    Args:
        x0: Clean sample predicted where v stands.
        rho: Its rho.
        evaluations: eps; the first one belongs to `x0`.
        weights: One per evaluation.
        scale: alpha of the level to go to.
    """
    weights = [rho + weights[0], *weights[1:]]
    used = [(scale * w, e) for w, e in zip(weights, evaluations) if w]
    return combine((scale, *(w for w, _ in used)), (x0, *(e for _, e in used)))


def stage_plan(rhos: Sequence[float], nodes: Sequence[float]) -> tuple[list[float], list[tuple[int, int]]]:
    """Model calls of a Runge-Kutta run: rho of every call and the last rho; first call of its step and of the next.

    A step from pure noise (a flow model's first) or to rho = 0 is an Euler step of one call: rho is not bounded there.
    """
    calls, steps = [], []
    for rho, after in zip(rhos[:-1], rhos[1:]):
        chosen = nodes if after > 0 and rho < _PURE_NOISE else nodes[:1]
        steps += [(len(calls), len(calls) + len(chosen))] * len(chosen)
        calls += [rho + c * (after - rho) for c in chosen]
    return [*calls, rhos[-1]], steps


def rk_next(
    start: tuple, slopes: Sequence[torch.Tensor], h: float, tableau, last: bool, scale: float = 1.0
) -> torch.Tensor:
    """Where the next evaluation is wanted: stage `len(slopes)`, or the end of the step after its last stage.

    Args:
        start: `(x0, rho)` at the start of the step.
        slopes: Evaluations of eps in this step, in order.
        h: Length of the step in rho.
        tableau: Entry of `RK_TABLEAUS`.
        last: Go to the end of the step; with too few slopes by an Euler step.
        scale: alpha of the level to go to.
    """
    _, rows, b = tableau
    end = b if len(slopes) == len(b) else (1,)
    return advance(*start, slopes, [h * w for w in (end if last else rows[len(slopes)])], scale)


def _check(method: str, ab_order: int, rk_method: str, quadrature: str) -> None:
    require_choice("method", method, METHODS)
    require_choice("rk_method", rk_method, tuple(RK_TABLEAUS))
    require_choice("quadrature", quadrature, QUADRATURES)
    limit = 3 if method == "ipndm" else _MAX_ORDER
    if ab_order not in range(limit + 1):
        raise ValueError(f"ab_order is {ab_order}; {method} accepts the polynomial degrees 0 to {limit}")


def sample_deis(
    model, x, sigmas, extra_args=None, callback=None, disable=None, method="t_ab", ab_order=3, rk_method="3kutta"
):
    """DEIS as a ComfyUI sampler on given noise levels; tAB takes the time of the model at hand.

    Args:
        model, x, sigmas, extra_args, callback, disable: See ComfyUI's KSAMPLER.
        method, ab_order, rk_method: See `DEISFullScheduler`.
    """
    _check(method, ab_order, rk_method, "gauss")
    run = NativeRun(model, x, sigmas, extra_args, callback)
    if method == "rho_rk":
        return _sample_rk(run, x, RK_TABLEAUS[rk_method])
    weights, history = Weights(method, run.rhos, Clock(run.schedule)), []
    for i in range(run.steps):
        eps, x0 = run.noise(x, run.sigmas[i])
        run.report(i, x, x0)
        history = [eps, *history[:ab_order]]
        x = advance(x0, run.rhos[i], history, weights(i, len(history) - 1), run.levels[i + 1][0])
    return run.finish(x)


def _sample_rk(run: NativeRun, x: torch.Tensor, tableau) -> torch.Tensor:
    rhos, steps = stage_plan(run.rhos, tableau[0])
    done = 0
    for i, (first, end) in enumerate(steps):
        eps, x0 = run.noise(x, rhos[i] / (1 + rhos[i]) if run.flow else rhos[i])
        if i == first:
            run.report(done, x, x0)
            done, start, slopes = done + 1, (x0, rhos[i]), []
        slopes.append(eps)
        after = 1 / (1 + rhos[i + 1]) if run.flow else 1.0
        x = rk_next(start, slopes, rhos[end] - rhos[first], tableau, i + 1 == end, after)
    return run.finish(x)


@register(
    MethodRecord(
        slug="deis",
        family="schedulers",
        kind="scheduler",
        title="Fast Sampling of Diffusion Models with Exponential Integrator",
        arxiv="2204.13902",
        summary="DEIS complete: polynomials in the model's own time, in rho and in log rho, Runge-Kutta and iPNDM.",
        targets=("any",),
        predictions=("epsilon", "v_prediction", "sample", "flow_prediction"),
        nodes=("DXDEISExact",),
        claim=Claim("FID of the best DEIS variant", "CIFAR-10, 10 network evaluations", 4.17, "FID"),
    )
)
class DEISFullScheduler(NoiseLevelScheduler):
    """Samples with any variant of DEIS, on its own time grid. Paper: https://arxiv.org/abs/2204.13902

    `num_inference_steps=N` gives N steps from the noisiest level to the cleanest one: N model calls, or N times the
    stages of `rk_method`. Runs with given `sigmas` or `timesteps` take these instead of the grid.

    Args:
        method: `"t_ab"` (polynomial in the model's time), `"rho_ab"`, `"logrho_ab"` (what diffusers' DEIS does),
            `"ipndm"` (constant weights, uniform times) or `"rho_rk"` (Runge-Kutta).
        ab_order: Degree of the polynomial, 0 (DDIM) to 4 (`"ipndm"`: 3); it goes through `ab_order + 1` evaluations.
        rk_method: `"1euler"`, `"2heun"`, `"3kutta"`, `"3ral"`, `"3heun"`, `"3vdh"`, `"3ssprk"` or `"4rk"`.
        ts_phase: Grid uniform in t^(1/ts_order) (`"t"`), log rho (`"log"`) or rho^(1/ts_order) (`"rho"`).
        ts_order: Exponent of the grid, > 0. Default: 7 for `"rho"`, else 2, the authors', but 1 for flow models, whose
            times are even already.
        sampling_eps: Last time of flow models, in (0, 1); discrete models end at timestep 0.
        quadrature: `"gauss"` (weights to round-off) or `"riemann"` (the authors' sum, off in the fourth digit).
        final_sigmas_type: `"sigma_min"` (as the authors: end at the lowest level) or `"zero"` (end clean).

    The other options are those of `diffusers_ext.schedulers._common.NoiseLevelScheduler`.

    Example:
        >>> pipe.scheduler = diffusers_ext.DEISFullScheduler.from_config(pipe.scheduler.config, ab_order=2)

    Limits: a grid in log rho or rho is of no use for flow models, whose rho is infinite at the start. Samples of
    discrete models may be taken at fractional timesteps.
    """

    @schedule_config
    def __init__(
        self,
        method: str = "t_ab",
        ab_order: int = 3,
        rk_method: str = "3kutta",
        ts_phase: str = "t",
        ts_order: float | None = None,
        sampling_eps: float = 1e-3,
        quadrature: str = "gauss",
        final_sigmas_type: str = "sigma_min",
    ):
        _check(method, ab_order, rk_method, quadrature)
        require_choice("ts_phase", ts_phase, PHASES)
        if not 0 < sampling_eps < 1 or not (ts_order is None or ts_order > 0):
            raise ValueError(
                f"sampling_eps is {sampling_eps} and ts_order {ts_order}; they must lie in (0, 1) and above 0"
            )
        self._tableau = RK_TABLEAUS[rk_method]
        self._clock = Clock(self.noise_schedule)
        if method == "rho_rk":
            self.order = len(self._tableau[0])

    def _choose(self, steps, sigmas, timesteps, mu):
        own = sigmas is timesteps is None and not self.config.use_karras_sigmas and steps and int(steps) == steps > 0
        own = own and (self.noise_schedule.family == "flow" or steps <= self.config.num_train_timesteps)
        log_snr, times = self._own_grid(int(steps), mu) if own else super()._choose(steps, sigmas, timesteps, mu)
        if self.config.method != "rho_rk":
            return log_snr, times
        rhos, self._steps = stage_plan(torch.exp(-log_snr).tolist(), self._tableau[0])
        if self.order > 1:
            times = torch.from_numpy(self._clock.time(rhos[:-1])) * self._time_unit
        return -torch.log(torch.tensor(rhos, dtype=torch.float64)), times

    @property
    def _time_unit(self) -> float:
        """Model timesteps per unit of the clock."""
        return self.config.num_train_timesteps if self.noise_schedule.family == "flow" else 1.0

    def _own_grid(self, steps: int, mu: float | None) -> tuple[torch.Tensor, torch.Tensor]:
        c, flow = self.config, self.noise_schedule.family == "flow"
        last = c.num_train_timesteps - 1
        start, end = (1 - 1e-6, c.sampling_eps) if flow else (last, 0)
        phase = "t" if c.method == "ipndm" else c.ts_phase
        usual = 7.0 if phase == "rho" else 1.0 if flow else 2.0
        kappa = 1.0 if c.method == "ipndm" else c.ts_order or usual
        times = time_grid(self._clock, steps, phase, kappa, start, end)
        times = self._shifted(times, mu) if flow else without_repeats(times.clip(0, last), last)
        log_snr = -torch.log(torch.from_numpy(self._clock.rho(times)))
        if c.final_sigmas_type == "zero":
            log_snr[-1] = math.inf
        times = torch.from_numpy(times[:-1].copy()) * self._time_unit
        return log_snr, times.long() if torch.equal(times, times.round()) else times

    def _reset(self) -> None:
        rhos = [sigma / alpha for alpha, sigma in self._levels]
        self._weights = Weights(self.config.method, rhos, self._clock, self.config.quadrature)
        self._history: list[torch.Tensor] = []
        if self.config.method != "rho_rk":
            for i in range(self.num_inference_steps):
                self._weights(i, min(i, self.config.ab_order))

    def _advance(self, i, output, x, generator):
        x0, eps = clean_and_noise(output, x, self._levels[i], self.config.prediction_type)
        scale = self._levels[i + 1][0]
        if self.config.method == "rho_rk":
            return self._stage(i, eps, x0, scale)
        self._history = [eps, *self._history[: self.config.ab_order]]
        weights = self._weights(i, len(self._history) - 1)
        return advance(x0, self._weights.rhos[i], self._history, weights, scale)

    def _stage(self, i: int, eps: torch.Tensor, x0: torch.Tensor, scale: float) -> torch.Tensor:
        (first, end), rhos = self._steps[i], self._weights.rhos
        if i == first:
            self._start = x0, rhos[i]
        elif not self._history:  # the run began inside a step
            return advance(x0, rhos[i], [eps], [rhos[i + 1] - rhos[i]], scale)
        slopes = [*self._history, eps]
        self._history = [] if i + 1 == end else slopes
        return rk_next(self._start, slopes, rhos[end] - rhos[first], self._tableau, i + 1 == end, scale)
