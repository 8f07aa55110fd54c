"""DPM-Solver-v3: few-step sampling in the parameterisation that suits the model best.

lambda = log(alpha / sigma). The integrand of the probability-flow ODE is written with three curves l, s, b ("empirical
model statistics", measured once on the frozen model): f = (sigma * eps - l * x) / alpha. A multistep
predictor-corrector works on what is left of it. https://arxiv.org/abs/2310.13268
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from ..prediction import NoiseSchedule, to_x0
from ..registry import Claim, MethodRecord, register
from ._common import NoiseLevelScheduler, require_choice, schedule_config
from ._ems import EMS, calibrate_ems, clean_latents, compute_ems, log_snr_span
from ._native import NativeRun
from ._with_ems import StatisticsMixin, check_span


__all__ = ["EMS", "DPMSolverV3MultistepScheduler", "calibrate_ems", "clean_latents", "compute_ems"]

logger = logging.getLogger(__name__)
SKIP_TYPES = ("logSNR", "time_uniform", "time_quadratic", "edm")
_CELLS_PER_STEP = 5
_DEGENERATE_CELLS = 1200


def _cumulative(y: torch.Tensor, step: float) -> torch.Tensor:
    """Trapezoid integral from the first grid point to each."""
    return torch.cat([torch.zeros_like(y[:1]), ((y[1:] + y[:-1]) * (step / 2)).cumsum(0)])


def _derivatives(r: Sequence[float], pseudo: bool) -> torch.Tensor:
    """Matrix M with G_k = sum_j M[k, j] g_j: derivatives at r[0] = 0 from values at distances r.

    True ones solve the Vandermonde system, pseudo ones are k! times Newton's divided differences over the first k + 1
    nodes.
    """
    p = len(r)
    factorial = torch.tensor([float(math.factorial(k)) for k in range(p)], dtype=torch.float64)
    if not pseudo:
        powers = torch.tensor(r, dtype=torch.float64)[:, None] ** torch.arange(p)
        return factorial[:, None] * torch.linalg.inv(powers)
    matrix = torch.zeros(p, p, dtype=torch.float64)
    for k in range(p):
        for j in range(k + 1):
            matrix[k, j] = factorial[k] / math.prod(r[j] - r[m] for m in range(k + 1) if m != j)
    return matrix


@dataclass(frozen=True)
class Update:
    """x_t = x * x_s + sum_j weights[j] * f_j + constant, elementwise."""

    x: torch.Tensor
    weights: tuple[torch.Tensor, ...]
    constant: torch.Tensor

    def __call__(self, x: torch.Tensor, fs: Sequence[torch.Tensor]) -> torch.Tensor:
        """Apply to a sample and to f at the nodes, in the order the update was made for."""
        total = self.x * x + self.constant
        for weight, f in zip(self.weights, fs):
            total = total + weight * f
        return total

    def to(self, like: torch.Tensor) -> Update:
        """With the device and dtype of `like`."""
        return Update(self.x.to(like), tuple(w.to(like) for w in self.weights), self.constant.to(like))


class Segment:
    """The part of the statistics between the outermost nodes of an update, with integrals anchored at nodes[0].

    Anchored exponents stay small, where e^(L + S) over the whole grid would overflow.
    """

    def __init__(self, ems: EMS, schedule: NoiseSchedule, nodes: Sequence[int], target: int):
        low, high = min(*nodes, target), max(*nodes, target)
        part = slice(low, high + 1)
        self.nodes, self.anchor, self.target = [n - low for n in nodes], nodes[0] - low, target - low
        lam = ems.log_snr[part].double()
        self.step = (ems.log_snr[1] - ems.log_snr[0]).item()
        self.r = lam - lam[self.anchor]
        self.alpha = schedule.levels(lam)[0]
        self.l, s, b = (v[part].double() for v in (ems.l, ems.s, ems.b))
        self.L, self.S = self._anchored(self.l), self._anchored(s)
        self.B = self._anchored(torch.exp(-self.S) * b)

    def _anchored(self, y: torch.Tensor) -> torch.Tensor:
        total = _cumulative(y, self.step)
        return total - total[self.anchor]

    def ahead(self, values: torch.Tensor) -> torch.Tensor:
        """int_s^t e^{(L + S)(r)} values(r) dr; `values` on the segment's grid."""
        y = (torch.exp(self.L + self.S) * values)[self.anchor : self.target + 1]
        return _cumulative(y, self.step)[-1]

    def power(self, k: int) -> torch.Tensor:
        """(r - lambda_s)^k / k!, shaped like the statistics."""
        return (self.r**k / math.factorial(k)).reshape(-1, *[1] * (self.l.ndim - 1))


def make_update(ems: EMS, schedule: NoiseSchedule, nodes: Sequence[int], target: int, pseudo: bool) -> Update:
    """The formula of order len(nodes) from nodes[0] to `target`, linear in x and in f at the nodes.

    A predictor has older nodes behind the anchor nodes[0]; a corrector has `target` itself as nodes[1].
    """
    c = Segment(ems, schedule, nodes, target)
    matrix = _derivatives([c.r[n].item() for n in c.nodes], pseudo)
    moments = [c.ahead(c.power(k)) for k in range(len(nodes))]  # E_k
    decay = c.alpha[c.target] * torch.exp(-c.L[c.target])
    shares = [sum(m * e for m, e in zip(column, moments)) for column in matrix.T]
    constant = c.ahead(c.B) - sum(share * c.B[n] for share, n in zip(shares, c.nodes))
    weights = tuple(-decay * share * torch.exp(-c.S[n]) for share, n in zip(shares, c.nodes))
    return Update(decay / c.alpha[c.anchor], weights, -decay * constant)


def make_finish(ems: EMS, schedule: NoiseSchedule, node: int, target: int) -> Update:
    """x0 at `target` without a model call: f is continued from `node`, then x0 = (1 - l) x / alpha - f."""
    c = Segment(ems, schedule, [node], target)
    growth = torch.exp(c.S[c.target])
    return Update((1 - c.l[c.target]) / c.alpha[c.target], (-growth,), -growth * c.B[c.target])


@dataclass(frozen=True)
class History:
    """What a step needs of the past: grid index and f of evaluated points, newest first; the last sample and order."""

    indices: tuple[int, ...] = ()
    fs: tuple[torch.Tensor, ...] = ()
    x: torch.Tensor | None = None
    order: int = 0


@dataclass(frozen=True)
class SolverOptions:
    """Options of the solver; see `DPMSolverV3MultistepScheduler`."""

    solver_order: int = 2
    use_corrector: bool = True
    c_pseudo: bool = True
    p_pseudo: bool = False
    lower_order_final: bool = True
    half_corrector: bool = False


class Solver:
    """DPM-Solver-v3 for one choice of noise levels; knows nothing of diffusers or ComfyUI.

    Args:
        ems: Statistics; refined so that every step spans at least five cells.
        schedule: Noise levels of the model.
        log_snr: `[N + 1]`, increasing; +inf at the end means: remove the noise left at the clean end of the grid.
        options: See `SolverOptions`.

    Raises:
        ValueError: The statistics do not cover the noise levels of the model.
    """

    def __init__(self, ems: EMS, schedule: NoiseSchedule, log_snr: torch.Tensor, options: SolverOptions):
        check_span(ems, schedule)
        low, high = ems.log_snr[0].item(), ems.log_snr[-1].item()
        self.finish = log_snr[-1].item() == math.inf
        wanted = log_snr.double().clamp(low, high)
        cell = (high - low) / (len(ems.log_snr) - 1)
        gaps = [gap for gap in wanted.diff().tolist() if gap > cell / 100]  # smaller ones are repeated timesteps
        # powers of two nest, so that snapping nodes that are snapped already changes nothing
        doublings = math.ceil(math.log2(_CELLS_PER_STEP * cell / min(gaps, default=cell)) - 0.01)
        self.ems = ems.refined(2 ** max(0, doublings))
        share = (wanted - low) / (high - low)
        self.indices: list[int] = (share * (len(self.ems.log_snr) - 1)).round().long().tolist()
        self.schedule, self.options = schedule, options
        self.log_snr = self.ems.log_snr[self.indices].double()
        self.levels = list(zip(*(v.tolist() for v in schedule.levels(self.log_snr))))
        self.early = (schedule.timestep(self.log_snr) > schedule.num_train_timesteps / 2).tolist()
        self._cache: dict = {}

    def advance(self, history: History, x: torch.Tensor, x0: torch.Tensor, i: int) -> tuple[torch.Tensor, History]:
        """From node i to node i + 1: next sample and new history. `x0` is the clean sample predicted from x."""
        # (sigma eps - l x) / alpha without its cancellation at high noise; stays as it is when the corrector moves x
        f = self._slope(i, x) * x - x0
        indices, fs = (self.indices[i], *history.indices), (f, *history.fs)
        x = self._corrected(history, x, indices, fs, i)
        steps_left = len(self.indices) - 1 - i
        order = min(self.options.solver_order, steps_left if self.options.lower_order_final else steps_left + 3)
        places = _distinct(indices, range(len(indices)), order)
        target = self.indices[i + 1]
        after = self._apply(x, indices, fs, places, target, self.options.p_pseudo)
        if self.finish and steps_left == 1:
            key = ("finish", indices[0], target)
            finish = self._cached(key, x, lambda: make_finish(self.ems, self.schedule, indices[0], target))
            after = finish(after, fs)
        keep = self.options.solver_order
        return after, History(indices[:keep], fs[:keep], x, len(places))

    def _corrected(self, history: History, x: torch.Tensor, indices, fs, i: int) -> torch.Tensor:
        """The sample at node i again, now that f there is known, from the node before."""
        o = self.options
        order = history.order + 1 if o.c_pseudo else history.order
        if not o.use_corrector or order < 2 or (o.half_corrector and not self.early[i]):
            return x
        places = _distinct(indices, (1, 0, *range(2, len(indices))), order)
        return self._apply(history.x, indices, fs, places, indices[0], o.c_pseudo) if len(places) > 1 else x

    def _apply(self, x: torch.Tensor, indices, fs, places: Sequence[int], target: int, pseudo: bool) -> torch.Tensor:
        nodes = [indices[p] for p in places]
        key = (*nodes, target, pseudo)
        update = self._cached(key, x, lambda: make_update(self.ems, self.schedule, nodes, target, pseudo))
        return update(x, [fs[p] for p in places])

    def _slope(self, i: int, like: torch.Tensor) -> torch.Tensor:
        return self._cached(("slope", i), like, lambda: (1 - self.ems.l[self.indices[i]].double()) / self.levels[i][0])

    def _cached(self, key: tuple, like: torch.Tensor, make: Callable):
        key = (*key, like.device, like.dtype)
        if key not in self._cache:
            self._cache[key] = make().to(like)
        return self._cache[key]


def _distinct(indices: Sequence[int], places: Sequence[int], count: int) -> list[int]:
    """The first `count` places with different grid indices: a repeated timestep says nothing about a derivative."""
    chosen: list[int] = []
    for place in places:
        if len(chosen) < count and indices[place] not in [indices[c] for c in chosen]:
            chosen.append(place)
    return chosen


def skip_nodes(schedule: NoiseSchedule, steps: int, skip_type: str) -> torch.Tensor:
    """Log-SNR of `steps + 1` nodes over the whole range: uniform in log-SNR, in time, in sqrt(time), or EDM's."""
    low, high = ends = torch.tensor(log_snr_span(schedule), dtype=torch.float64)
    share = torch.linspace(0, 1, steps + 1, dtype=torch.float64)
    if skip_type == "logSNR":
        return low + share * (high - low)
    if skip_type == "edm":
        root = torch.exp(-ends / 7)
        return -7 * torch.log(root[0] + share * (root[1] - root[0]))
    power = 2 if skip_type == "time_quadratic" else 1
    root = schedule.timestep(ends).clamp(min=0) ** (1 / power)
    return schedule.log_snr((root[0] + share * (root[1] - root[0])) ** power).clamp(low, high)


def sample_dpm_solver_v3(
    model: Callable,
    x: torch.Tensor,
    sigmas: torch.Tensor,
    extra_args: dict | None = None,
    callback: Callable | None = None,
    disable: bool | None = None,
    ems: EMS | None = None,
    **options,
) -> torch.Tensor:
    """DPM-Solver-v3 as a ComfyUI sampler function; the noise levels are snapped to the grid of the statistics.

    Args:
        model, x, sigmas, extra_args, callback, disable: As a KSAMPLER passes them.
        ems: Statistics of the model; None for the degenerate mode.
        options: Of `SolverOptions`.
    """
    run = NativeRun(model, x, sigmas, extra_args, callback)
    cfg = getattr(getattr(model, "inner_model", None), "cfg", None)
    if ems is None:
        ems = EMS.constant(*log_snr_span(run.schedule), _DEGENERATE_CELLS)
    else:
        _warn_of_guidance(ems, cfg)
    nodes = [-math.log(rho) if rho > 0 else math.inf for rho in run.rhos]
    solver = Solver(ems, run.schedule, torch.tensor(nodes, dtype=torch.float64), SolverOptions(**options))
    vp = run.schedule.family == "vp"  # ComfyUI scales VP samples by 1 / alpha
    x = x / math.sqrt(1 + run.sigmas[0] ** 2) if vp else x
    history = History()
    for i in range(run.steps):
        alpha, sigma = solver.levels[i]
        scale = alpha if vp else 1.0
        x0 = run.denoised(x / scale, sigma / scale)
        run.report(i, x / scale, x0)
        x, history = solver.advance(history, x, x0, i)
    return run.finish(x / solver.levels[-1][0] if vp and not solver.finish else x)


def _warn_of_guidance(ems: EMS, wanted: float | None) -> None:
    measured = ems.metadata.get("guidance_scale")
    if wanted is not None and measured is not None and float(measured) != float(wanted):
        logger.warning("the statistics were computed at guidance scale %s, not %s", measured, wanted)


@register(
    MethodRecord(
        slug="dpm-solver-v3",
        family="schedulers",
        kind="scheduler",
        title="DPM-Solver-v3: Improved Diffusion ODE Solver with Empirical Model Statistics",
        arxiv="2310.13268",
        summary="Few-step sampler that adapts to your model through statistics measured once in minutes.",
        targets=("any",),
        predictions=("epsilon", "v_prediction", "sample", "flow_prediction"),
        nodes=("DXDPMv3ComputeEMS", "DXDPMv3Sampler", "DXSaveEMS", "DXLoadEMS"),
        claim=Claim(
            text="Mean squared error of the latents to the converged solution",
            setting="Stable Diffusion 1.4, 5 function evaluations, guidance 7.5",
            value=0.55,
            unit="MSE",
        ),
    )
)
class DPMSolverV3MultistepScheduler(StatisticsMixin, NoiseLevelScheduler):
    """Sampler that adapts to the model: statistics measured once make few steps go further.

    Paper: https://arxiv.org/abs/2310.13268. Give it statistics with `load_ems`; they travel with `save_pretrained` as
    `ems.safetensors`. Without them it runs in degenerate mode, which is DPM-Solver++ as a predictor-corrector.

    Args:
        solver_order: 1 to 3; 2 for guided, 3 for unconditional sampling.
        use_corrector: Correct every point with the evaluation made there (no extra calls; needs order 2 or 3).
        c_pseudo: Corrector of one order more, from divided differences.
        p_pseudo: Divided differences in the predictor too.
        lower_order_final: Lower the order towards the end of the run.
        half_corrector: Correct only in the noisier half of time; for large guidance scales.
        skip_type: Where the steps are: `"time_uniform"`, `"logSNR"` (low resolutions), `"time_quadratic"` or `"edm"`.
            Steps are snapped to the grid of the statistics.
        degenerated: Ignore the statistics (l=1, s=0, b=0).
        guidance_scale: The one you sample with; if given, statistics of another one are warned about.
        ems_file: Set by `load_ems`.

    The other options are those of `NoiseLevelScheduler`; `timestep_spacing` and `use_karras_sigmas` have no effect.

    Example:
        >>> pipe.scheduler = DPMSolverV3MultistepScheduler.from_config(pipe.scheduler.config)
        >>> pipe.scheduler.load_ems(calibrate_ems(pipe, latents, captions, guidance_scale=3.0))
        >>> image = pipe("a red circle", num_inference_steps=8, guidance_scale=3.0).images[0]

    Limits: statistics belong to one model, guidance scale and, with `reduce="element"`, latent size.
    """

    @schedule_config
    def __init__(
        self,
        solver_order: int = 2,
        use_corrector: bool = True,
        c_pseudo: bool = True,
        p_pseudo: bool = False,
        lower_order_final: bool = True,
        half_corrector: bool = False,
        skip_type: str = "time_uniform",
        degenerated: bool = False,
        guidance_scale: float | None = None,
        ems_file: str | None = None,
    ):
        require_choice("solver_order", solver_order, (1, 2, 3))
        require_choice("skip_type", skip_type, SKIP_TYPES)
        self.ems: EMS | None = None
        self._solver: Solver | None = None
        self._history = History()
        self._options = SolverOptions(
            solver_order, use_corrector, c_pseudo, p_pseudo, lower_order_final, half_corrector
        )

    def _statistics(self) -> EMS:
        if self.config.degenerated or self.ems is None:
            if not self.config.degenerated:
                logger.warning(
                    "DPM-Solver-v3 has no statistics and runs in degenerate mode (DPM-Solver++): compute them with "
                    "diffusers_ext.calibrate_ems and give them to scheduler.load_ems"
                )
            return EMS.constant(*log_snr_span(self.noise_schedule), _DEGENERATE_CELLS)
        _warn_of_guidance(self.ems, self.config.guidance_scale)
        return self.ems

    def _choose(self, steps, sigmas, timesteps, mu) -> tuple[torch.Tensor, torch.Tensor]:
        wanted, _ = super()._choose(steps, sigmas, timesteps, mu)
        if sigmas is None and timesteps is None:
            final, wanted = wanted[-1:], skip_nodes(self.noise_schedule, int(steps), self.config.skip_type)
            if self.noise_schedule.family == "flow" and self.config.skip_type.startswith("time"):
                wanted = -torch.logit(self._shifted(torch.sigmoid(-wanted), mu))
            wanted = torch.cat([wanted[:-1], final])
        self._solver = self._solver_for(wanted)
        snapped = self._solver.log_snr.clone()
        times = self.noise_schedule.timestep(snapped)[:-1]
        if self._solver.finish:
            snapped[-1] = math.inf
        return snapped, times

    def _solver_for(self, wanted: torch.Tensor) -> Solver:
        """The solver of the previous run, with its coefficients, if nothing has changed."""
        key = (self.ems, self.config.degenerated, tuple(wanted.tolist()))
        if self._solver is None or self._solver_key != key:
            self._solver_key = key
            return Solver(self._statistics(), self.noise_schedule, wanted, self._options)
        return self._solver

    def _reset(self) -> None:
        self._history = History()

    def _advance(self, i: int, output: torch.Tensor, x: torch.Tensor, generator) -> torch.Tensor:
        x0 = to_x0(output, x, *self._levels[i], self.config.prediction_type)
        after, self._history = self._solver.advance(self._history, x, x0, i)
        return after
