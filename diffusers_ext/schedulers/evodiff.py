"""EVODiff: a two-step solver whose second-order term is scaled per sample and channel to lower the step's variance.

kappa = sigma / alpha, m = data prediction. Dot products sum over positions, not over batch and channels. The authors'
sampler is for alpha = 1, where kappa = sigma = t; here every model is solved as that one, x / alpha, would be.
https://arxiv.org/abs/2509.26096
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from ..registry import Claim, MethodRecord, register
from ._common import NoiseLevelScheduler, clean_sample, require_choice, schedule_config
from ._native import NativeRun
from .dpm_solver_v3 import SKIP_TYPES, skip_nodes


__all__ = ["EVODiffMultistepScheduler"]

FINALS = ("ddim", "official")
_TINY = 1e-20  # identical predictions would divide 0 by 0
_MANY_STEPS = 20
_PURE_NOISE = 500.0  # of kappa: a log-SNR step from such a level is far longer than the next one


def dot(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """<a, b> over positions: `[B, C, ...]` -> `[B, C, 1, ...]`, tokens `[B, L, C]` -> `[B, 1, C]`."""
    if a.ndim > 3:
        return torch.linalg.vecdot(a.flatten(2), b.flatten(2)).reshape(*a.shape[:2], *[1] * (a.ndim - 2))
    return (a * b).sum(1, keepdim=True)


def projection(ab: torch.Tensor, bb: torch.Tensor) -> torch.Tensor:
    """<a, b> / <b, b>, limited to [-2, 2]."""
    return torch.div(ab, bb.clamp(min=_TINY)).clamp(-2, 2)


@dataclass(frozen=True)
class Interval:
    """Numbers of the step from node 0 to node t, node 1 being the one before node 0.

    Args:
        keep: sigma_t / sigma_0.
        gain: sigma_t h, the weight of the data prediction in the Euler step.
        h: 1 / kappa_t - 1 / kappa_0.
        q0: kappa_t / kappa_0.
        r: Log-SNR of the last step by that of this one.
        base: sqrt(q0 / q1).
        w: Weight of the measured balance, 0.5 (1 - tn^2).
    """

    keep: float
    gain: float
    h: float
    q0: float
    r: float
    base: float
    w: float

    def euler(self, x: torch.Tensor, m: torch.Tensor) -> torch.Tensor:
        """DDIM step, E."""
        return torch.mul(x, self.keep).add_(m, alpha=self.gain)

    def balance(self, ab: torch.Tensor, bb: torch.Tensor) -> torch.Tensor:
        """c: how much of the older prediction is taken off the newer one."""
        return projection(ab, bb).mul_(self.w).add_((1 - self.w) * self.base)


@dataclass(frozen=True)
class Pending:
    """A step whose probe is being evaluated: Euler part, probe, D1, its weight in the probe and the step's numbers."""

    step: Interval
    euler: torch.Tensor
    probe: torch.Tensor
    d1: torch.Tensor
    weight: torch.Tensor


@dataclass(frozen=True)
class History:
    """The last two predictions with their nodes and dot products, and the step that waits for its probe."""

    m0: torch.Tensor | None = None
    m1: torch.Tensor | None = None
    node0: int = 0
    node1: int = 0
    a00: torch.Tensor | None = None
    a11: torch.Tensor | None = None
    a01: torch.Tensor | None = None
    pending: Pending | None = None


def make_probe(step: Interval, history: History, x: torch.Tensor) -> Pending:
    """Where the model is asked next (steps 3 to 5)."""
    c1 = step.balance(history.a01, history.a11)
    d1 = torch.addcmul(history.m0, c1, history.m1, value=-1)
    share = c1.abs().mul_(0.25).sigmoid().clamp(0.25, 1.5)  # r_i by r
    weight = share.reciprocal() * (0.5 * step.gain / step.r)
    euler = step.euler(x, history.m0)
    return Pending(step, euler, torch.addcmul(euler, weight, d1), d1, weight)


def finish(pending: Pending, history: History, mt: torch.Tensor, at0: torch.Tensor, steps: int) -> torch.Tensor:
    """The sample at the probe's node, now that the prediction `mt` at the probe is known (steps 7 to 10).

    Everything is a combination of D1 and D2 per channel, so three dot products give all projections. With
    B_pre = D1 / (r h) and B_next = r / h D2 the projection of step 8 does not change when both are divided by r / h.
    """
    step, d1 = pending.step, pending.d1
    d2 = torch.addcmul(mt, step.balance(at0, history.a00), history.m0, value=-1)
    d11, d12, d22 = dot(d1, d1), dot(d1, d2), dot(d2, d2)
    ratio, older = step.r**-2, d11 * step.r**-4
    difference = torch.add(d22, older).sub_(d12, alpha=2 * ratio)
    eta = projection(torch.sub(d22, older), difference).abs().mul_(0.5).sigmoid() * 0.5
    u, v = eta * (-1 / step.r), eta.mul(-step.r).add_(step.r)  # B_theta = u D1 + v D2
    along = torch.addcmul(d11, u, d11, value=-1).addcmul_(v, d12, value=-1) * pending.weight  # <P1, D1>
    z = projection(along, d11).div(step.gain).abs().sub_(0.5)
    if steps > _MANY_STEPS:
        g = (history.m0 - history.m1) / step.h
        z = -z * torch.sigmoid(projection(dot(history.m0, g), dot(g, g)) * (2 - step.q0**2))
    scale = z.sigmoid().reciprocal() * (0.5 * step.gain)
    return torch.addcmul(pending.euler, u * scale, d1).addcmul_(v * scale, d2)


def final_step(step: Interval, history: History, x: torch.Tensor, kappas: tuple[float, float]) -> torch.Tensor:
    """The last step of the released code, made for noise that ends near 0 (`kappas`: before and after it)."""
    k = 1 - math.sqrt(kappas[0] * kappas[1])
    d = 1 - 0.5 * math.sqrt(step.q0 if step.q0 < 0.5 else step.q0 - 0.5)
    return k * step.euler(x, history.m0) + 0.5 * step.gain * (history.m0 - d * history.m1)


class Solver:
    """EVODiff for one choice of noise levels; knows nothing of diffusers or ComfyUI.

    Args:
        levels: `(alpha, sigma)` of every node, noisiest first; the first alpha and the last sigma may be 0.
        final: Last step of the solver: `"ddim"` or `"official"`.
        denoise: Spend the last call on the data prediction at the last node with noise, and return it.
    """

    def __init__(self, levels: Sequence[tuple[float, float]], final: str = "ddim", denoise: bool = True):
        require_choice("final", final, FINALS)
        if len(levels) < 4:
            raise ValueError(f"EVODiff needs at least 3 steps, got {len(levels) - 1}")
        self.clean = denoise and levels[-1][1] == 0
        self.levels = list(levels)[:-1] if self.clean else list(levels)
        self.kappas = [sigma / alpha if alpha > 0 else math.inf for alpha, sigma in self.levels]
        self.final = final
        self.steps = len(self.levels) - 1

    def advance(self, history: History, x: torch.Tensor, m: torch.Tensor, i: int) -> tuple[torch.Tensor, History]:
        """From the data prediction at node i to what the model is given at node i + 1, and the new history."""
        a00 = dot(m, m)
        a01 = None if history.m0 is None else dot(m, history.m0)
        if history.pending is not None:
            x = finish(history.pending, history, m, a01, self.steps)
        if i == self.steps:
            return m, History()
        if history.m0 is not None and self.levels[i] != self.levels[history.node0]:
            kept = (history.m0, history.node0, history.a00, a01)
        else:  # a repeated node says nothing about a difference: it replaces the newest
            a01 = None if history.m1 is None else dot(m, history.m1)
            kept = (history.m1, history.node1, history.a11, a01)
        m1, node1, a11, a01 = kept
        return self._leave(History(m, m1, i, node1, a00, a11, a01), x, i)

    def _leave(self, history: History, x: torch.Tensor, i: int) -> tuple[torch.Tensor, History]:
        step, last = self.interval(history.node1, i, i + 1), i + 1 == self.steps
        first = history.m1 is None or self.kappas[history.node1] > _PURE_NOISE
        if last and self.final == "official" and not first:
            return final_step(step, history, x, (self.kappas[i], self.kappas[i + 1])), history
        if last or first or step.h == 0:
            return step.euler(x, history.m0), history
        pending = make_probe(step, history, x)
        return pending.probe, replace(history, pending=pending)

    def interval(self, node1: int, node0: int, target: int) -> Interval:
        """Numbers of the step from `node0` to `target`; r and base are 1 where there is no earlier node."""
        (alpha0, sigma0), (alpha, sigma) = self.levels[node0], self.levels[target]
        k1, k0, k = (self.kappas[n] for n in (node1, node0, target))
        q0, r, base = k / k0, 1.0, 1.0
        if k1 > k0 > k > 0 and k1 < math.inf:
            r, base = math.log(k1 / k0) / math.log(k0 / k), math.sqrt(q0 / (k0 / k1))
        tn = (k + self.kappas[-1]) / (self.kappas[0] + self.kappas[-1])
        h = alpha / sigma - alpha0 / sigma0 if sigma > 0 else math.inf
        return Interval(sigma / sigma0, alpha - sigma * alpha0 / sigma0, h, q0, r, base, 0.5 * (1 - tn**2))


def sample(solver: Solver, model: Callable, x: torch.Tensor) -> torch.Tensor:
    """Run a solver on `model(x, i) -> data prediction at node i`; one call per step."""
    history = History()
    for i in range(solver.steps + solver.clean):
        x, history = solver.advance(history, x, model(x, i), i)
    return x


def sample_evodiff(
    model, x, sigmas, extra_args=None, callback=None, disable=None, final: str = "ddim", denoise_to_zero: bool = True
):
    """EVODiff as a ComfyUI sampler.

    Args:
        model, x, sigmas, extra_args, callback, disable: As ComfyUI passes them.
        final: See `EVODiffMultistepScheduler`.
        denoise_to_zero: See `EVODiffMultistepScheduler`.
    """
    run = NativeRun(model, x, sigmas, extra_args, callback)
    solver = Solver(run.levels, final, denoise_to_zero)

    def predict(y: torch.Tensor, i: int) -> torch.Tensor:
        denoised = run.denoised(y, run.sigmas[i])
        run.report(i, y, denoised)
        return denoised

    return run.finish(sample(solver, predict, x))


@register(
    MethodRecord(
        slug="evodiff",
        family="schedulers",
        kind="scheduler",
        title="EVODiff: Entropy-aware Variance Optimized Diffusion Inference",
        arxiv="2509.26096",
        summary="Second-order steps that adapt to every picture and channel as they go; nothing to calibrate.",
        targets=("any",),
        predictions=("epsilon", "v_prediction", "sample", "flow_prediction"),
        nodes=("DXEVODiffSampler",),
        claim=Claim(
            text="FID of 50,000 samples (DPM-Solver++: 5.10)",
            setting="EDM model, CIFAR-10, 10 function evaluations",
            value=2.78,
            unit="FID",
        ),
    )
)
class EVODiffMultistepScheduler(NoiseLevelScheduler):
    """Two-step sampler that rescales its second-order term per picture and channel, from the predictions themselves.

    Paper: https://arxiv.org/abs/2509.26096. One model call per step. What the model is given between two steps is a
    probe, not the sample: read latents at the end of a run only.

    Args:
        solver_order: 2 is the only order there is.
        skip_type: Where the steps are: `"logSNR"` (the authors', for EDM models of pixels), `"time_uniform"`,
            `"time_quadratic"`, `"edm"`, or None: what the model's own configuration says (`timestep_spacing` and so
            on), which is better for guided latent models.
        final: Last step of the solver: `"ddim"`, or `"official"`, the released code's, which shrinks the sample by
            1 - sqrt(sigma sigma') and is made for EDM models that end at sigma 0.002.
        denoise_to_zero: Spend the last call on the clean prediction at the lowest noise level and return it, as the
            authors do; otherwise the solver itself goes to the end.

    The other options are those of `NoiseLevelScheduler`; with a `skip_type` those of its steps have no effect.

    Raises:
        ValueError: Order other than 2; at `set_timesteps` fewer than 3 steps.

    Example:
        >>> pipe.scheduler = EVODiffMultistepScheduler.from_config(pipe.scheduler.config)
        >>> image = pipe("a red circle", num_inference_steps=10).images[0]

    Limits: coefficients are per latent channel, which for Flux-like pipelines are the channels of packed tokens. First
    order in the limit of many steps: it is made for 5 to 25. Above 20 steps the published formula can diverge where a
    channel has only one or two positions.
    """

    min_inference_steps = 3

    @schedule_config
    def __init__(
        self, solver_order: int = 2, skip_type: str | None = None, final: str = "ddim", denoise_to_zero: bool = True
    ):
        require_choice("solver_order", solver_order, (2,))
        if skip_type is not None:
            require_choice("skip_type", skip_type, SKIP_TYPES)
        require_choice("final", final, FINALS)
        self._history = History()
        self._solver: Solver | None = None

    def _choose(self, steps, sigmas, timesteps, mu) -> tuple[torch.Tensor, torch.Tensor]:
        log_snr, times = super()._choose(steps, sigmas, timesteps, mu)
        skip_type = self.config.skip_type
        if sigmas is None and timesteps is None and len(times) < 3:
            raise ValueError(f"EVODiff needs at least 3 steps, got {len(times)}")
        if sigmas is None and timesteps is None and skip_type is not None:
            clean = torch.isinf(log_snr[-1])
            nodes = skip_nodes(self.noise_schedule, len(times) - int(clean), skip_type)
            if self.noise_schedule.family == "flow":
                nodes = -torch.logit(self._shifted(torch.sigmoid(-nodes), mu))
            log_snr = torch.cat([nodes, log_snr[-1:]]) if clean else nodes
            times = self.noise_schedule.timestep(log_snr[:-1])
        alpha, sigma = self.noise_schedule.levels(log_snr)
        levels = list(zip(alpha.tolist(), sigma.tolist()))
        self._solver = Solver(levels, self.config.final, self.config.denoise_to_zero)
        return log_snr, times

    def _reset(self) -> None:
        self._history = History()

    def _advance(self, i: int, output: torch.Tensor, x: torch.Tensor, generator) -> torch.Tensor:
        m = clean_sample(output, x, self._levels[i], self.config.prediction_type)
        after, self._history = self._solver.advance(self._history, x, m, i)
        return after
