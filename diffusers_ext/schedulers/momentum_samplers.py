"""Momentum for solvers: heavy ball (HB), generalised heavy ball (GHVB) and Nesterov (NT).

In x / alpha and s = sigma / alpha the diffusion ODE is dx/ds = eps (in flow models dx/dsigma = v). Few large steps of
a high-order solver leave its stability region, which shows as blotches at large guidance; momentum widens the region.
An order r between integers trades accuracy for stability. https://arxiv.org/abs/2307.11118
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch

from ..registry import Claim, MethodRecord, register
from ._common import NoiseLevelScheduler, clean_and_noise, combine, require_choice, schedule_config
from ._native import NativeRun
from .dpm_solver import Level, coefficients


__all__ = [
    "DPMSolverMultistepMomentumScheduler",
    "GHVBScheduler",
    "PLMSMomentumScheduler",
    "UniPCMultistepMomentumScheduler",
]

MOMENTA = ("ghvb", "hb", "nesterov")
_MAX_ORDER = 5
_LOW_STEPS = 15  # diffusers lowers the order at the end of shorter runs

# weight of u_{n-j} in the mixer of order k: (constant + slope * beta) / (divisor * beta)
_MIXERS: dict[int, tuple[tuple[tuple[float, float], ...], float]] = {
    1: (((0, 1),), 1),
    2: (((2, 1), (-2, 1)), 2),
    3: (((18, 5), (-24, 8), (6, -1)), 12),
    4: (((46, 9), (-78, 19), (42, -5), (-10, 1)), 24),
    5: (((1650, 251), (-3420, 646), (2880, -264), (-1380, 106), (270, -19)), 720),
}


# --- mixing -------------------------------------------------------------------------------------------------------


def split_order(order: float) -> tuple[int, float]:
    """Integer order k and damping beta of a fractional order: 3.5 is k = 4, beta = 0.5; 3 is k = 3, beta = 1.

    Raises:
        ValueError: Not in (0, 5].
    """
    if not 0 < order <= _MAX_ORDER:
        raise ValueError(f"order is {order}; it must lie in (0, {_MAX_ORDER}]")
    whole = math.floor(order)
    return (whole, 1.0) if order == whole else (whole + 1, order - whole)


def mixer(k: int, beta: float = 1.0) -> list[float]:
    """Weights of u_n, u_{n-1}, ... of order k; for beta = 1 those of Adams-Bashforth. Their sum is 1."""
    weights, divisor = _MIXERS[k]
    return [(constant + slope * beta) / (divisor * beta) for constant, slope in weights]


def mix(history: Sequence[torch.Tensor], k: int, beta: float) -> torch.Tensor:
    """`mixer` applied to the values so far, newest first; of lower order as long as there are fewer."""
    return combine(mixer(min(k, len(history)), beta), history)


def damp(velocity: torch.Tensor | None, value: torch.Tensor, beta: float) -> torch.Tensor:
    """(1 - beta) velocity + beta value; `value` where there is no velocity yet."""
    return value if velocity is None or beta == 1 else torch.lerp(velocity, value, beta)


class Momentum:
    """Direction of the next step from the slopes so far.

    Args:
        kind: `"ghvb"` (mixer of the velocities), `"hb"` (velocity of the mixed slopes) or `"nesterov"`.
        order: r in (0, 5].

    Limits: for equal steps only are orders above 2 what they promise.
    """

    def __init__(self, kind: str, order: float):
        require_choice("momentum", kind, MOMENTA)
        self.kind = kind
        self.k, self.beta = split_order(order)
        self._velocity: torch.Tensor | None = None
        self._history: list[torch.Tensor] = []

    def __call__(self, slope: torch.Tensor) -> torch.Tensor:
        """Take the slope at the current sample, return the direction to step in."""
        if self.kind == "ghvb":
            self._velocity = self._damped(slope)
            self._push(self._velocity)
            return mix(self._history, self.k, self.beta)
        self._push(slope)
        mixed = mix(self._history, self.k, 1.0)
        self._velocity = self._damped(mixed)
        return self._velocity if self.kind == "hb" else self._damped(mixed)

    def _damped(self, value: torch.Tensor) -> torch.Tensor:
        return damp(self._velocity, value, self.beta)

    def _push(self, value: torch.Tensor) -> None:
        self._history = [value, *self._history[: self.k - 1]]


def follow(x0, slope: torch.Tensor, direction: torch.Tensor, s: float, after: float, scale: float = 1.0):
    """scale (x + (after - s) direction), where x = x0 + s slope; written so that float32 bears large s."""
    return combine((scale, scale * after, scale * (after - s)), (x0, slope, direction - slope))


# --- DPM-Solver++ and UniPC ---------------------------------------------------------------------------------------


def dpmpp_2m_direction(m0: torch.Tensor, m1: torch.Tensor, s1: Level, s0: Level, t: Level) -> torch.Tensor:
    """m0 + D1 / 2: what the second-order multistep (midpoint) update puts in the place of the clean sample."""
    r0 = (s0.log_snr - s1.log_snr) / (t.log_snr - s0.log_snr)
    return combine((1 + 0.5 / r0, -0.5 / r0), (m0, m1))


def unipc_weights(log_snr: Sequence[float], target: float, correct: bool, variant: str):
    """Coefficients of one UniPC update in data form: `(h phi_1, [weight of m_t - m0,] weights of m_k - m0)`.

    Args:
        log_snr: lambda of the last evaluations, newest first; their number is the order.
        target: lambda of the level to go to.
        correct: Corrector, which knows m_t; its weight comes first.
        variant: `"bh1"` or `"bh2"`, the function B(h).
    """
    hh, order = log_snr[0] - target, len(log_snr)
    phi = math.expm1(hh)
    if math.isinf(hh):
        return phi, []
    r = [(v - log_snr[0]) / -hh for v in log_snr[1:]] + [1.0]
    b_h, term, b = (hh if variant == "bh1" else phi), phi / hh - 1, []
    for n in range(1, order + 1):
        b.append(term * math.factorial(n) / b_h)
        term = term / hh - 1 / math.factorial(n + 1)
    powers = np.array([[v**n for v in r] for n in range(order)])
    if correct:
        rhos = [0.5] if order == 1 else np.linalg.solve(powers, b).tolist()
        return phi, [b_h * rhos[-1], *(b_h * rho / v for rho, v in zip(rhos, r[:-1]))]
    rhos = [0.5] * (order - 1) if order <= 2 else np.linalg.solve(powers[:-1, :-1], b[:-1]).tolist()
    return phi, [b_h * rho / v for rho, v in zip(rhos, r)]


def unipc_value(phi: float, weights: Sequence[float], m0: torch.Tensor, others: Sequence[torch.Tensor]):
    """h phi_1 m0 + sum of weights (m - m0): x_t = sigma_t / sigma_s x - alpha_t value."""
    return combine((phi - sum(weights), *weights), (m0, *others[: len(weights)]))


def _check_beta(beta: float) -> None:
    if not 0 < beta <= 1:
        raise ValueError(f"beta is {beta}; it must lie in (0, 1] (1: no momentum)")


# --- ComfyUI ------------------------------------------------------------------------------------------------------


def sample_momentum(
    model, x, sigmas, extra_args=None, callback=None, disable=None, momentum="ghvb", order=2.0, denoise_last=False
):
    """GHVB, PLMS with heavy ball, or with Nesterov momentum, as a ComfyUI sampler.

    Args:
        model, x, sigmas, extra_args, callback, disable: As ComfyUI passes them.
        momentum: `"ghvb"`, `"hb"` or `"nesterov"`.
        order: r in (0, 5].
        denoise_last: Return the clean prediction on a last step to noise level 0.
    """
    direction = Momentum(momentum, order)
    run = NativeRun(model, x, sigmas, extra_args, callback)
    for i, (s, after) in enumerate(zip(run.levels, run.levels[1:])):
        x0 = run.denoised(x, s[1])
        run.report(i, x, x0)
        slope = (x - x0) / s[1]
        d = direction(slope)
        x = x0 if denoise_last and after[1] == 0 else follow(x0, slope, d, s[1], after[1])
    return run.finish(x)


def sample_dpmpp_2m_momentum(model, x, sigmas, extra_args=None, callback=None, disable=None, beta: float = 0.8):
    """DPM-Solver++(2M) with heavy-ball momentum as a ComfyUI sampler; as in diffusers, a step to 0 is first order.

    Args:
        model, x, sigmas, extra_args, callback, disable: As ComfyUI passes them.
        beta: In (0, 1]; 1 is no momentum.
    """
    _check_beta(beta)
    run = NativeRun(model, x, sigmas, extra_args, callback)
    levels, older, velocity = [Level(*level) for level in run.levels], None, None
    for i in range(run.steps):
        m = run.denoised(x, run.levels[i][1])
        run.report(i, x, m)
        value = m
        if older is not None and levels[i + 1].sigma > 0:
            value = dpmpp_2m_direction(m, older, levels[i - 1], levels[i], levels[i + 1])
            velocity = value = damp(velocity, value, beta)
        x, older = combine(coefficients(levels[i], levels[i + 1], True)[:2], (x, value)), m
    return run.finish(x)


# --- schedulers ---------------------------------------------------------------------------------------------------


class _MomentumScheduler(NoiseLevelScheduler):
    """Steps along the direction of a `Momentum`; subclasses name it."""

    _kind: str

    def _reset(self) -> None:
        self._momentum = Momentum(self._kind, self.config.order)

    def _advance(self, i, output, x, generator):
        c, (alpha, sigma), (alpha_to, sigma_to) = self.config, self._levels[i], self._levels[i + 1]
        if self.noise_schedule.family == "flow":
            x0, slope, s, after, scale = torch.sub(x, output, alpha=sigma), output, sigma, sigma_to, 1.0
        else:
            x0, slope = clean_and_noise(output, x, (alpha, sigma), c.prediction_type)
            s, after, scale = sigma / alpha, sigma_to / alpha_to, alpha_to
        d = self._momentum(slope)
        if c.denoise_last and i + 1 == self.num_inference_steps:
            d = slope
        return follow(x0, slope, d, s, after, scale)


@register(
    MethodRecord(
        slug="momentum-samplers",
        family="schedulers",
        kind="scheduler",
        title="Diffusion Sampling with Momentum for Mitigating Divergence Artifacts",
        arxiv="2307.11118",
        summary="Momentum against blotches at few steps and large guidance, with a continuous order.",
        targets=("any",),
        predictions=("epsilon", "v_prediction", "sample", "flow_prediction"),
        nodes=("DXGHVBSampler", "DXPLMSHeavyBallSampler", "DXDPMpp2MHeavyBall"),
        claim=Claim("Order of convergence of PLMS with heavy-ball momentum", "theory", 1, "order"),
    )
)
class GHVBScheduler(_MomentumScheduler):
    """Samples with generalised heavy-ball momentum of any order in (0, 5]. Paper: https://arxiv.org/abs/2307.11118

    Args:
        order: r. Integers are PLMS (Adams-Bashforth), 1 is DDIM (Euler for flow models), fractions lie between in
            accuracy and stability: 1.5 and 2.5 at few steps and large guidance, 3.5 otherwise.
        denoise_last: Take the last step with order 1: to noise level 0 that is the clean prediction.

    The other options are those of `diffusers_ext.schedulers._common.NoiseLevelScheduler`.

    Example:
        >>> pipe.scheduler = diffusers_ext.GHVBScheduler.from_config(pipe.scheduler.config, order=2.5)

    Limits: the weights assume equal steps of sigma / alpha; on other grids orders above 2 fall to 2.
    """

    _kind = "ghvb"

    @schedule_config
    def __init__(self, order: float = 2.0, denoise_last: bool = False):
        split_order(order)


class PLMSMomentumScheduler(_MomentumScheduler):
    """Samples with PLMS and heavy-ball or Nesterov momentum; first order for fractional orders, and very stable.

    Paper: https://arxiv.org/abs/2307.11118

    Args:
        order: r in (0, 5]; integers are plain PLMS.
        momentum_type: `"hb"` or `"nesterov"`.
        denoise_last: Take the last step with order 1: to noise level 0 that is the clean prediction.

    The other options are those of `diffusers_ext.schedulers._common.NoiseLevelScheduler`.

    Example:
        >>> pipe.scheduler = diffusers_ext.PLMSMomentumScheduler.from_config(pipe.scheduler.config, order=3.5)
    """

    @schedule_config
    def __init__(self, order: float = 2.0, momentum_type: str = "hb", denoise_last: bool = False):
        split_order(order)
        require_choice("momentum_type", momentum_type, MOMENTA[1:])

    @property
    def _kind(self) -> str:
        return self.config.momentum_type


class DPMSolverMultistepMomentumScheduler(NoiseLevelScheduler):
    """Samples with DPM-Solver++(2M) (midpoint) and heavy-ball momentum. Paper: https://arxiv.org/abs/2307.11118

    Args:
        beta: In (0, 1]; 1 is diffusers' `DPMSolverMultistepScheduler` without momentum.
        lower_order_final: First-order last step below 15 steps; a step to noise level 0 always is.

    The other options are those of `diffusers_ext.schedulers._common.NoiseLevelScheduler`.

    Example:
        >>> scheduler = diffusers_ext.DPMSolverMultistepMomentumScheduler.from_config(pipe.scheduler.config, beta=0.8)
    """

    @schedule_config
    def __init__(self, beta: float = 0.8, lower_order_final: bool = True):
        _check_beta(beta)

    def _reset(self) -> None:
        self._nodes = [Level(*level) for level in self._levels]
        self._older = self._velocity = None

    def _advance(self, i, output, x, generator):
        m, n = clean_and_noise(output, x, self._levels[i], self.config.prediction_type)[0], self._nodes
        last = i + 1 == self.num_inference_steps
        low = last and (n[-1].sigma == 0 or (self.config.lower_order_final and self.num_inference_steps < _LOW_STEPS))
        value = m
        if self._older is not None and not low and n[i - 1].log_snr < n[i].log_snr < n[i + 1].log_snr:
            value = dpmpp_2m_direction(m, self._older, n[i - 1], n[i], n[i + 1])
            self._velocity = value = damp(self._velocity, value, self.config.beta)
        self._older = m
        return combine(coefficients(n[i], n[i + 1], True)[:2], (x, value))


class UniPCMultistepMomentumScheduler(NoiseLevelScheduler):
    """Samples with UniPC in data form and heavy-ball momentum. Paper: https://arxiv.org/abs/2307.11118

    Args:
        beta: In (0, 1]; 1 is diffusers' `UniPCMultistepScheduler` without momentum.
        solver_order: 1 to 3.
        variant: `"bh2"` or `"bh1"`.
        predictor_momentum: Give the predictor momentum too; the released code does so to the corrector only.
        lower_order_final: Lower the order at the end of a run; a step to noise level 0 is first order.

    The other options are those of `diffusers_ext.schedulers._common.NoiseLevelScheduler`.

    Example:
        >>> scheduler = diffusers_ext.UniPCMultistepMomentumScheduler.from_config(pipe.scheduler.config, beta=0.8)
    """

    @schedule_config
    def __init__(
        self,
        beta: float = 0.8,
        solver_order: int = 2,
        variant: str = "bh2",
        predictor_momentum: bool = False,
        lower_order_final: bool = True,
    ):
        _check_beta(beta)
        require_choice("solver_order", solver_order, (1, 2, 3))
        require_choice("variant", variant, ("bh1", "bh2"))

    def _reset(self) -> None:
        self._nodes = [Level(*level) for level in self._levels]
        self._outputs: list[torch.Tensor] = []
        self._before, self._order = None, 0
        self._velocities: dict[bool, torch.Tensor] = {}

    def _update(self, i: int, x, outputs: Sequence, order: int, m_t=None) -> torch.Tensor:
        """From node `i` to the next one by the evaluations up to node `i`; corrected if `m_t` is given."""
        s, t, correct, unit = self._nodes[i], self._nodes[i + 1], m_t is not None, 1.0
        past = [self._nodes[i - k].log_snr for k in range(order)]
        phi, weights = unipc_weights(past, t.log_snr, correct, self.config.variant)
        others = [m_t, *outputs[1:order]] if correct else outputs[1:order]
        value = unipc_value(phi, weights, outputs[0], others)
        if t.sigma > 0 and (correct or self.config.predictor_momentum):
            unit = t.sigma * phi
            self._velocities[correct] = value = damp(self._velocities.get(correct), value / unit, self.config.beta)
        return combine((t.sigma / s.sigma, -t.alpha * unit), (x, value))

    def _advance(self, i, output, x, generator):
        m = clean_and_noise(output, x, self._levels[i], self.config.prediction_type)[0]
        left = self.num_inference_steps - i
        if self._before is not None and self._nodes[i].log_snr > self._nodes[i - 1].log_snr:
            x = self._update(i - 1, self._before, self._outputs, self._order, m)
        self._outputs = [m, *self._outputs[: self.config.solver_order - 1]]
        self._before, self._order = x, self._next_order(i, left)
        if self._nodes[i + 1].log_snr == self._nodes[i].log_snr:
            return x
        return self._update(i, x, self._outputs, self._order)

    def _next_order(self, i: int, left: int) -> int:
        order = self.config.solver_order
        if self.config.lower_order_final:
            order = min(order, left)
        if self._nodes[i + 1].sigma == 0:
            return 1
        past = [self._nodes[i - k].log_snr for k in range(len(self._outputs))]
        distinct = next((k + 1 for k, (a, b) in enumerate(zip(past, past[1:])) if a <= b), len(past))
        return min(order, distinct)
