"""DPM-Solver: exponential solvers in half log-SNR, single-step on a budget of calls, multistep, and adaptive.

lambda = log(alpha / sigma). From lambda_s to lambda_t = lambda_s + h the linear part of the diffusion ODE is solved
exactly and the network m (noise eps, or data x0 in DPM-Solver++) is Taylor-expanded in lambda:
x_t = a x + k1 m + k2 m' + k3 m''. https://arxiv.org/abs/2206.00927, https://arxiv.org/abs/2211.01095
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from ..prediction import NoiseSchedule
from ..registry import Claim, MethodRecord, register
from ._common import NoiseLevelScheduler, clean_and_noise, clean_sample, combine, require_choice, schedule_config
from ._native import NativeRun


__all__ = ["DPMSolverFastScheduler"]

ALGORITHMS = ("dpmsolver++", "dpmsolver")
SOLVER_TYPES = ("dpmsolver", "taylor")
SKIP_TYPES = ("logSNR", "time_uniform", "time_quadratic")
METHODS = ("singlestep", "singlestep_fixed", "multistep")
_FLOW_ENDS = {"logSNR": 0.999, "time_uniform": 1 - 1e-6, "time_quadratic": 1 - 1e-6}


# --- time of the model <-> lambda ---------------------------------------------------------------------------------


class LogAlphaClock:
    """lambda of a model's time: a discrete model's log alpha is linear between timesteps and extrapolated outside.

    Discrete models are cut at lambda = -5.1, where cosine schedules run away.

    Args:
        schedule: Noise levels of the model.
    """

    def __init__(self, schedule: NoiseSchedule):
        self.family = schedule.family
        if schedule.table is not None:
            kept = schedule.table[schedule.table >= -5.1]
            self._log_alpha = -0.5 * np.logaddexp(0, -2 * kept.numpy())

    @property
    def start(self) -> float:
        """The noisiest timestep of a discrete model."""
        return len(self._log_alpha) - 1.0

    def log_snr(self, t) -> np.ndarray:
        """lambda at (fractional) timesteps, or at sigma of a flow model."""
        t = np.asarray(t, dtype=np.float64)
        if self.family == "flow":
            return np.log1p(-t) - np.log(t)
        cell = np.floor(t).astype(int).clip(0, len(self._log_alpha) - 2)
        low, high = self._log_alpha[cell], self._log_alpha[cell + 1]
        log_alpha = low + (t - cell) * (high - low)
        return log_alpha - 0.5 * np.log(-np.expm1(2 * log_alpha))

    def time(self, log_snr) -> np.ndarray:
        """Timestep (or sigma of a flow model) at lambda."""
        log_snr = np.asarray(log_snr, dtype=np.float64)
        if self.family == "flow":
            return 1 / (1 + np.exp(log_snr))
        log_alpha = -0.5 * np.logaddexp(0, -2 * log_snr)
        rising = -self._log_alpha
        cell = (np.searchsorted(rising, -log_alpha, side="right") - 1).clip(0, len(rising) - 2)
        return cell + (-log_alpha - rising[cell]) / (rising[cell + 1] - rising[cell])


def uniform(clock, skip_type: str, start: float, end: float, steps: int) -> np.ndarray:
    """lambda of `steps + 1` points between times `start` and `end` (index units; t = (index + 1) / 1000)."""
    if skip_type == "logSNR":
        return np.linspace(clock.log_snr(start), clock.log_snr(end), steps + 1)
    shift = 0.0 if clock.family == "flow" else 1.0
    power = 1 if skip_type == "time_uniform" else 2
    ends = (start + shift) ** (1 / power), (end + shift) ** (1 / power)
    return clock.log_snr(np.linspace(*ends, steps + 1) ** power - shift)


# --- steps --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Level:
    """A noise level: alpha, sigma and lambda = log(alpha / sigma), +inf for clean."""

    alpha: float
    sigma: float

    @property
    def log_snr(self) -> float:
        return math.log(self.alpha / self.sigma) if self.sigma > 0 else math.inf


def coefficients(s: Level, t: Level, data: bool) -> tuple[float, float, float, float]:
    """a, k1, k2, k3 of x_t = a x + k1 m + k2 m' h + k3 m'' h^2 for the data (++) or noise form.

    To a clean level only the first order exists: k2 = k3 = 0.
    """
    h = t.log_snr - s.log_snr
    if h == 0:
        return 1.0, 0.0, 0.0, 0.0
    if h == math.inf:
        return (0.0, t.alpha, 0.0, 0.0) if data else (t.alpha / s.alpha, -t.alpha * s.sigma / s.alpha, 0.0, 0.0)
    if data:
        p1 = math.expm1(-h)
        p2 = p1 / h + 1
        return t.sigma / s.sigma, -t.alpha * p1, t.alpha * p2, -t.alpha * (p2 / h - 0.5)
    p1 = math.expm1(h)
    p2 = p1 / h - 1
    return t.alpha / s.alpha, -t.sigma * p1, -t.sigma * p2, -t.sigma * (p2 / h - 0.5)


def anchor(x: torch.Tensor, m: torch.Tensor, s: Level, data: bool) -> torch.Tensor:
    """What the steps below start from: the sample x at s (data form), or the clean sample there (noise form).

    In the noise form a x + k1 m is alpha_t x0 + sigma_t m. Near pure noise x and k1 m are some ten times larger than
    their sum, which float32 would round away. `m` is the network's output at s.
    """
    return x if data else combine((1 / s.alpha, -s.sigma / s.alpha), (x, m))


def ends(s: Level, t: Level, data: bool) -> tuple[float, float]:
    """First-order weights of `anchor` and of the network output at s."""
    return coefficients(s, t, data)[:2] if data else (t.alpha, t.sigma)


def first_order(base: torch.Tensor, m: torch.Tensor, s: Level, t: Level, data: bool) -> torch.Tensor:
    """DDIM from s to t, whichever of the two the network predicts; `base` is the `anchor` of s."""
    return combine(ends(s, t, data), (base, m))


def second_order(base, m, m1, s: Level, t: Level, r1: float, data: bool, solver_type: str) -> torch.Tensor:
    """Two evaluations, at lambda_s and lambda_s + r1 h; r1 < 0 is the previous step's, as in multistep 2M."""
    _, k1, k2, _ = coefficients(s, t, data)
    return combine((*ends(s, t, data), (k1 / 2 if solver_type == "dpmsolver" else k2) / r1), (base, m, m1 - m))


def third_order_inner(base, m, m1, s: Level, s2: Level, r1: float, r2: float, data: bool) -> torch.Tensor:
    """The sample at lambda_s + r2 h, where the third evaluation is made."""
    k2 = coefficients(s, s2, data)[2]
    return combine((*ends(s, s2, data), r2 / r1 * k2), (base, m, m1 - m))


def third_order(base, m, m1, m2, s: Level, t: Level, r1: float, r2: float, data: bool, solver_type: str):
    """Three evaluations, at lambda_s, lambda_s + r1 h and lambda_s + r2 h."""
    _, _, k2, k3 = coefficients(s, t, data)
    if solver_type == "dpmsolver":
        return combine((*ends(s, t, data), k2 / r2), (base, m, m2 - m))
    # D1 = (r2 D10 - r1 D11) / (r2 - r1), D2 = 2 (D11 - D10) / (r2 - r1)
    of_d10, of_d11 = (r2 * k2 - 2 * k3) / (r2 - r1), (2 * k3 - r1 * k2) / (r2 - r1)
    return combine((*ends(s, t, data), of_d10 / r1, of_d11 / r2), (base, m, m1 - m, m2 - m))


def third_order_multistep(base, m0, m1, m2, s: Level, t: Level, r0: float, r1: float, data: bool, exact: bool):
    """Multistep 3M: r0, r1 are the last two steps over h. `exact` doubles D2, without which it is second order."""
    _, _, k2, k3 = coefficients(s, t, data)
    # D1 = D10 + r0 / (r0 + r1) (D10 - D11), D2 = (D10 - D11) / (r0 + r1)
    of_difference = (r0 * k2 + (2 * k3 if exact else k3)) / (r0 + r1)
    weights = (*ends(s, t, data), (k2 + of_difference) / r0, -of_difference / r1)
    return combine(weights, (base, m0, m0 - m1, m1 - m2))


def single_stage(base, outputs: Sequence, levels: Sequence[Level], data: bool, solver_type: str) -> torch.Tensor:
    """The sample wanted next inside, or at the end of, a single step of order `len(levels) - 1`.

    Args:
        base: `anchor` of `levels[0]`.
        outputs: Network outputs so far in this step, 1 to order of them.
        levels: Of the evaluations of the step, then its end.
    """
    s, t = levels[0], levels[-1]
    order, done, h = len(levels) - 1, len(outputs), levels[-1].log_snr - levels[0].log_snr
    r = [(v.log_snr - s.log_snr) / h for v in levels[1:-1]]
    if done == 1:
        return first_order(base, outputs[0], s, levels[1], data)
    if order == 2:
        return second_order(base, *outputs, s, t, r[0], data, solver_type)
    if done == 2:
        return third_order_inner(base, *outputs, s, levels[2], *r, data)
    return third_order(base, *outputs, s, t, *r, data, solver_type)


def multi_step(base, outputs: Sequence, levels: Sequence[Level], t: Level, order: int, data, solver_type, exact):
    """A multistep update.

    Args:
        base: `anchor` of `levels[0]`.
        outputs, levels: Last network outputs and their levels, newest first; those at equal levels are not used.
        t: Level to go to.
        order: Highest order.
    """
    s, h = levels[0], t.log_snr - levels[0].log_snr
    gaps = [a.log_snr - b.log_snr for a, b in zip(levels, levels[1:])]
    order = min(order, 1 + next((i for i, gap in enumerate(gaps) if gap <= 0), len(gaps)))
    if order == 1 or h in (0, math.inf):
        return first_order(base, outputs[0], s, t, data)
    if order == 2:
        return second_order(base, *outputs[:2], s, t, -gaps[0] / h, data, solver_type)
    return third_order_multistep(base, *outputs[:3], s, t, gaps[0] / h, gaps[1] / h, data, exact)


# --- plans --------------------------------------------------------------------------------------------------------


def fast_orders(calls: int, order: int) -> list[int]:
    """Orders of the single steps that spend exactly `calls` network calls (DPM-Solver-fast)."""
    if order == 1:
        return [1] * calls
    if order == 2:
        return [2] * (calls // 2) + [1] * (calls % 2)
    k = calls // 3 + 1
    return {0: [3] * (k - 2) + [2, 1], 1: [3] * (k - 1) + [1], 2: [3] * (k - 1) + [2]}[calls % 3] if calls else []


def step_bounds(log_snr: Sequence[float], orders: Sequence[int]) -> list[tuple[int, int]]:
    """For every call the first call of its step and that of the next one; unusable steps become first-order ones.

    Args:
        log_snr: lambda of every call and of the end.
        orders: Of the steps; their sum is the number of calls.
    """
    bounds, first = [], 0
    for order in orders:
        nodes = log_snr[first : first + order + 1]
        usable = nodes[-1] < math.inf and all(b > a for a, b in zip(nodes, nodes[1:]))
        steps = [(first, first + order)] * order if usable else [(i, i + 1) for i in range(first, first + order)]
        bounds += steps
        first += order
    return bounds


def inner_nodes(clock, outer: Sequence[float], orders: Sequence[int], skip_type: str) -> list[float]:
    """lambda of every call and of the end: each step is divided as the whole run is."""
    nodes = []
    for low, high, order in zip(outer, outer[1:], orders):
        ends = clock.time([low, high])
        nodes += uniform(clock, skip_type, *ends, order)[:-1].tolist() if order > 1 else [low]
    return [*nodes, outer[-1]]


def fast_plan(clock, calls: int, order: int, skip_type: str, start: float, end: float, fixed: bool):
    """`(lambda of every call and of the end, orders)` of a single-step run from time `start` to `end`."""
    orders = [order] * (calls // order) if fixed else fast_orders(calls, order)
    if fixed or skip_type == "logSNR":
        outer = uniform(clock, skip_type, start, end, len(orders))
    else:
        outer = uniform(clock, skip_type, start, end, calls)[np.cumsum([0, *orders])]
    return inner_nodes(clock, outer.tolist(), orders, skip_type), orders


def _check(order: int, algorithm_type: str, solver_type: str) -> None:
    require_choice("algorithm_type", algorithm_type, ALGORITHMS)
    require_choice("solver_type", solver_type, SOLVER_TYPES)
    if order not in (1, 2, 3):
        raise ValueError(f"order is {order}; DPM-Solver exists for orders 1, 2 and 3")


def sample_dpm_solver_fast(
    model, x, sigmas, extra_args=None, callback=None, disable=None,
    order=3, algorithm_type="dpmsolver++", solver_type="dpmsolver", spacing="paper",
):  # fmt: skip
    """DPM-Solver-fast as a ComfyUI sampler: as many model calls as `sigmas` has steps.

    Args:
        model, x, sigmas, extra_args, callback, disable: As ComfyUI passes them.
        order, algorithm_type, solver_type: See `DPMSolverFastScheduler`.
        spacing: `"paper"` keeps the ends of `sigmas` and spaces single steps evenly in lambda; `"given"` evaluates at
            the given levels. A last level of 0 is reached by one first-order step either way.
    """
    _check(order, algorithm_type, solver_type)
    require_choice("spacing", spacing, ("paper", "given"))
    run = NativeRun(model, x, sigmas, extra_args, callback)
    log_snr = [Level(*level).log_snr for level in run.levels]
    clean = log_snr[-1] == math.inf
    orders = fast_orders(run.steps - clean, order)
    if spacing == "paper" and orders:
        outer = np.linspace(log_snr[0], log_snr[-1 - clean], len(orders) + 1)
        parts = [np.linspace(a, b, n + 1)[:-1] for a, b, n in zip(outer, outer[1:], orders)]
        log_snr = [*np.concatenate(parts).tolist(), outer[-1], *[math.inf] * clean]
    bounds = step_bounds(log_snr, [*orders, *[1] * clean])
    levels = [Level(*run.level(run.sigma_at(v))) for v in log_snr]
    data, base, outputs = algorithm_type == "dpmsolver++", x, []
    for i, (first, end) in enumerate(bounds):
        eps, x0 = run.noise(x, levels[i].sigma)
        run.report(i, x, x0)
        base, outputs = (x if data else x0, []) if i == first else (base, outputs)
        outputs.append(x0 if data else eps)
        x = single_stage(base, outputs, levels[first : end + 1], data, solver_type)
    return run.finish(x)


@register(
    MethodRecord(
        slug="dpm-solver",
        family="schedulers",
        kind="scheduler",
        title="DPM-Solver: A Fast ODE Solver for Diffusion Probabilistic Model Sampling in Around 10 Steps",
        arxiv="2206.00927",
        summary="Single-step DPM-Solver with exactly N calls, exact third-order multistep, and adaptive steps.",
        targets=("any",),
        predictions=("epsilon", "v_prediction", "sample", "flow_prediction"),
        nodes=("DXDPMSolverFastExact", "DXDPMSolverAdaptivePP"),
        claim=Claim("FID of DPM-Solver", "CIFAR-10, 10 network evaluations", 4.70, "FID"),
    )
)
class DPMSolverFastScheduler(NoiseLevelScheduler):
    """Samples with the solvers of the DPM-Solver papers, with exactly `num_inference_steps` model calls.

    Papers: https://arxiv.org/abs/2206.00927, https://arxiv.org/abs/2211.01095. For adaptive steps see
    `diffusers_ext.adaptive_sample`.

    Args:
        order: 1 (DDIM), 2 or 3.
        algorithm_type: Network expanded as data (`"dpmsolver++"`) or as noise (`"dpmsolver"`).
        solver_type: `"dpmsolver"` or `"taylor"`, two second- and third-order updates.
        skip_type: Grid uniform in `"logSNR"`, `"time_uniform"` or `"time_quadratic"` (uniform in the root of time).
        method: `"singlestep"` (DPM-Solver-fast: steps of order 3, 2, 1 that use up the calls), `"singlestep_fixed"`
            (all of one order; the remainder of calls / order is not made) or `"multistep"`.
        t_end: Last time in units of the training time, in (0, 1): 1e-3 for few steps, 1e-4 for many.
        exact_third_order: Multistep order 3 with the correct weight of the second difference; the published one,
            also in diffusers, is second-order accurate.
        lower_order_final: Multistep runs below 10 steps end with lower orders.
        final_sigmas_type: `"sigma_min"` (end at `t_end`) or `"zero"` (the last call returns the clean prediction).

    The other options are those of `diffusers_ext.schedulers._common.NoiseLevelScheduler`.

    Example:
        >>> pipe.scheduler = diffusers_ext.DPMSolverFastScheduler.from_config(pipe.scheduler.config, order=2)

    Limits: at least `order` calls. Inner calls are at fractional timesteps. Given `sigmas` or `timesteps` are where
    the calls are made. The noise form divides by alpha: not for flow models or zero-SNR schedules.
    """

    min_inference_steps = 3

    @schedule_config
    def __init__(
        self,
        order: int = 3,
        algorithm_type: str = "dpmsolver++",
        solver_type: str = "dpmsolver",
        skip_type: str = "logSNR",
        method: str = "singlestep",
        t_end: float = 1e-3,
        exact_third_order: bool = False,
        lower_order_final: bool = True,
        final_sigmas_type: str = "sigma_min",
    ):
        _check(order, algorithm_type, solver_type)
        require_choice("skip_type", skip_type, SKIP_TYPES)
        require_choice("method", method, METHODS)
        if not 0 < t_end < 1:
            raise ValueError(f"t_end is {t_end}; it must lie in (0, 1), e.g. 0.001")
        self._clock = LogAlphaClock(self.noise_schedule)

    @classmethod
    def from_config(cls, config=None, return_unused_kwargs: bool = False, **kwargs):
        """See `NoiseLevelScheduler.from_config`; solver choices that only other classes have are not taken over."""
        if config is not None and hasattr(config, "items"):
            known = {"algorithm_type": ALGORITHMS, "solver_type": SOLVER_TYPES, "skip_type": SKIP_TYPES}
            config = {k: v for k, v in config.items() if k not in known or v in known[k]}
        return super().from_config(config, return_unused_kwargs, **kwargs)

    def _choose(self, steps, sigmas, timesteps, mu):
        c = self.config
        own = sigmas is timesteps is None and steps is not None and int(steps) == steps and not c.use_karras_sigmas
        if own and steps < c.order:
            raise ValueError(f"num_inference_steps is {steps}; order {c.order} needs at least {c.order}")
        log_snr, times = self._own(int(steps), mu) if own else super()._choose(steps, sigmas, timesteps, mu)
        values, clean = log_snr.tolist(), bool(log_snr[-1] == math.inf)
        calls = len(values) - 1 - clean
        fixed = own and c.method == "singlestep_fixed"
        orders = [c.order] * (calls // c.order) if fixed else fast_orders(calls, c.order)
        self._bounds = step_bounds(values, [*orders, *[1] * clean])
        return log_snr, times

    def _own(self, steps: int, mu: float | None) -> tuple[torch.Tensor, torch.Tensor]:
        c, flow, clean = self.config, self.noise_schedule.family == "flow", self.config.final_sigmas_type == "zero"
        n = 1.0 if flow else self._clock.start + 1
        start, end = (_FLOW_ENDS[c.skip_type], c.t_end) if flow else (n - 1, n * c.t_end - 1)
        if c.method == "multistep":
            log_snr = uniform(self._clock, c.skip_type, start, end, steps - clean)
        else:
            fixed = c.method == "singlestep_fixed"
            log_snr = np.array(fast_plan(self._clock, steps - clean, c.order, c.skip_type, start, end, fixed)[0])
        times = self._clock.time(log_snr)
        if flow:
            times = self._shifted(times, mu)
            log_snr = self._clock.log_snr(times)
        log_snr, times = np.append(log_snr, [math.inf] * clean), times if clean else times[:-1]
        return torch.from_numpy(log_snr), torch.from_numpy(times * (c.num_train_timesteps if flow else 1))

    def _reset(self) -> None:
        self._nodes = [Level(*level) for level in self._levels]
        self._outputs: list[torch.Tensor] = []

    def _advance(self, i, output, x, generator):
        c, data = self.config, self.config.algorithm_type == "dpmsolver++"
        seen = (output, x, self._levels[i], c.prediction_type)
        base, m = (x, clean_sample(*seen)) if data else clean_and_noise(*seen)
        if c.method == "multistep":
            self._outputs = [m, *self._outputs[: c.order - 1]]
            left = self.num_inference_steps - i
            order = min(c.order, left) if c.lower_order_final and self.num_inference_steps < 10 else c.order
            past = self._nodes[i - len(self._outputs) + 1 : i + 1][::-1]
            return multi_step(
                base, self._outputs, past, self._nodes[i + 1], order, data, c.solver_type, c.exact_third_order
            )
        first, end = self._bounds[i]
        if i == first:
            self._base = base
        elif not self._outputs:  # the run began inside a step
            return first_order(base, m, self._nodes[i], self._nodes[i + 1], data)
        outputs = [*self._outputs, m]
        self._outputs = [] if i + 1 == end else outputs
        return single_stage(self._base, outputs, self._nodes[first : end + 1], data, c.solver_type)
