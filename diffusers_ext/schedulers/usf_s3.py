"""USF: exponential-integrator steps whose order, prediction, start, derivative estimates and corrector are data.

lambda = log(alpha / sigma), h = lambda_t - lambda_s. A "solver schedule" lists the choices of every step; S^3
searches for good ones. Points are counted from the newest: -1 is where the sample is. https://arxiv.org/abs/2312.07243
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from ..prediction import NoiseSchedule, to_noise, to_x0
from ..registry import Claim, MethodRecord, register
from ._common import NoiseLevelScheduler, guided_model, require_choice, schedule_config
from ._native import NativeRun
from ._usf_schedule import PRESETS, Formula, SolverSchedule, Step, preset_steps
from ._usf_search import SolverScheduleSearch
from .dpm_solver_v3 import SKIP_TYPES, skip_nodes


__all__ = ["SolverSchedule", "SolverScheduleSearch", "USFScheduler", "solve_usf"]


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
    """x_t = keep * x[start] + sum of weight * F[node] over `weights`."""

    start: int
    keep: float
    noise: bool
    weights: dict[int, float]

    def __call__(self, points: dict[int, Point]) -> torch.Tensor:
        """The sample at the target from the evaluated points."""
        x = self.keep * points[self.start].x
        for node, weight in self.weights.items():
            x = x + weight * (points[node].noise if self.noise else points[node].x0)
        return x


@dataclass(frozen=True)
class Point:
    """A node that has been visited: the sample there and what the model saw in it."""

    x: torch.Tensor
    noise: torch.Tensor
    x0: torch.Tensor


def make_update(formula: Formula, levels: Sequence[tuple[float, float]], newest: int, target: int) -> Update:
    """Coefficients of one Taylor step from node newest + 1 + formula.start to node `target`."""
    at = [math.log(a / s) if s > 0 else math.inf for a, s in levels]
    s, noise = newest + 1 + formula.start, formula.prediction == "noise"
    (alpha_s, sigma_s), (alpha_t, sigma_t) = levels[s], levels[target]
    if math.isinf(at[target]):
        return Update(s, 0.0, False, {s: alpha_t})
    h = at[target] - at[s]
    z = h if noise else -h
    scale = -sigma_t if noise else alpha_t
    p = phis(z, formula.order)
    weights = {s: scale * h * p[0]}
    for i, derivative in enumerate(formula.derivatives, start=1):
        nodes = [newest + 1 + point for point in derivative.points]
        factor = scale * h ** (i + 1) * p[i]
        factor *= relaxation(derivative.relaxation, h, z, derivative.coefficient) if i == 1 else 1.0
        for node, a in zip(nodes, derivative_weights([at[n] - at[s] for n in nodes], i)):
            weights[node] = weights.get(node, 0.0) + factor * a
            weights[s] -= factor * a
    return Update(s, alpha_t / alpha_s if noise else sigma_t / sigma_s, noise, weights)


def _euler(prediction: str) -> Formula:
    return Formula(prediction, -1, ())


class Solver:
    """A solver schedule compiled for noise levels; knows nothing of diffusers or ComfyUI.

    Args:
        levels: `(alpha, sigma)` of the N + 1 nodes, noisiest first; the last sigma may be 0.
        steps: Choices of the N steps.
        afs: Analytic first step: `"none"`, `"zero_x0"` or `"average_x0"` saves the call at node 0.
        average_x0: Mean of the data for `"average_x0"`, a number or one per channel.

    Attributes:
        calls: Node of every model call, in order.
    """

    def __init__(
        self, levels: Sequence[tuple[float, float]], steps: Sequence[Step], afs: str = "none", average_x0=None
    ):
        self.levels, self.steps, self.afs = list(levels), list(steps), afs
        self.average_x0 = average_x0
        n = len(self.steps)
        self._predictors = [self._compile(step.formula, i, i + 1) for i, step in enumerate(self.steps)]
        self._correctors = [
            None if step.corrector == "none" else self._compile(step.formula.corrected(), i + 1, i + 1)
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
            return Update(newest, 1.0, False, {})
        if len(set(sigmas)) < len(sigmas):
            return make_update(_euler(formula.prediction), self.levels, newest, target)
        return make_update(formula, self.levels, newest, target)

    def first(self, x: torch.Tensor) -> tuple[torch.Tensor, dict[int, Point]]:
        """What the first model call is given, and the points known by then (one with an analytic first step)."""
        if self.afs == "none":
            return x, {}
        alpha, sigma = self.levels[0]
        if self.afs == "zero_x0":
            point = Point(x, x / sigma, torch.zeros_like(x))
        else:
            mean = torch.as_tensor(self.average_x0, dtype=x.dtype, device=x.device)
            mean = mean.reshape(-1, *[1] * (x.ndim - 2)).expand_as(x) if mean.ndim else mean.expand_as(x)
            point = Point(x, (x - alpha * mean) / sigma, mean)
        points = {0: point}
        return self._predictors[0](points), points

    def advance(
        self, points: dict[int, Point], x: torch.Tensor, noise: torch.Tensor, x0: torch.Tensor, call: int
    ) -> tuple[torch.Tensor, dict[int, Point]]:
        """From model call number `call`, at sample `x`, to what the next call is given (or the result)."""
        node = self.calls[call]
        again = call > 0 and self.calls[call - 1] == node and node in points
        points = {**points, node: Point(x, noise, x0)}
        if not again and node > 0 and self._correctors[node - 1] is not None:
            x = self._apply(self._correctors[node - 1], points, x)
            points[node] = Point(x, noise, x0)
            if call + 1 < len(self.calls) and self.calls[call + 1] == node:
                return x, points
        if node == len(self.steps):
            return x, points
        update = self._predictors[node]
        if not self._known(update, points):  # a run that began in the middle has no history yet
            update = make_update(_euler(self.steps[node].formula.prediction), self.levels, node, node + 1)
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


def log_snr_of(times: Sequence[float], schedule: NoiseSchedule) -> torch.Tensor:
    """Log-SNR at t in [0, 1]: (timestep + 1) / length of discrete models, sigma of flow models; +inf at 0."""
    t = torch.tensor(times, dtype=torch.float64)
    if schedule.family == "ve":
        return -torch.log(t)
    if schedule.family == "flow":
        return -torch.logit(t.clamp(max=1 - 1e-6))
    found = schedule.log_snr(t * len(schedule.table) - 1)
    return torch.where(t == 0, math.inf, found)


def times_of(log_snr: torch.Tensor, schedule: NoiseSchedule) -> list[float]:
    """The inverse of `log_snr_of`."""
    clean = torch.isinf(log_snr)
    if schedule.family == "ve":
        return torch.exp(-log_snr).tolist()
    if schedule.family == "flow":
        return torch.sigmoid(-log_snr).tolist()
    t = (schedule.timestep(log_snr.masked_fill(clean, 0)) + 1) / len(schedule.table)
    return t.masked_fill(clean, 0).tolist()


def levels_of(solver_schedule: SolverSchedule, schedule: NoiseSchedule) -> list[tuple[float, float]]:
    """`(alpha, sigma)` of a solver schedule's nodes."""
    return list(zip(*(v.tolist() for v in schedule.levels(log_snr_of(solver_schedule.times, schedule)))))


def levels_of_sigmas(sigmas: Sequence[float], schedule: NoiseSchedule) -> torch.Tensor:
    """Log-SNR of ComfyUI's noise levels; +inf at 0."""
    s = torch.tensor(list(sigmas), dtype=torch.float64)
    if schedule.family == "flow":
        return -torch.logit(s.clamp(max=1 - 1e-6))
    return -torch.log(s)


def preset_of_sigmas(preset: str, sigmas: Sequence[float], schedule: NoiseSchedule) -> SolverSchedule:
    """A named solver on ComfyUI's noise levels."""
    log_snr = levels_of_sigmas(sigmas, schedule)
    steps = preset_steps(preset, len(log_snr) - 1, to_clean=bool(torch.isinf(log_snr[-1])))
    return SolverSchedule(tuple(times_of(log_snr, schedule)), steps)


def native_sigmas(solver_schedule: SolverSchedule, schedule: NoiseSchedule) -> torch.Tensor:
    """ComfyUI's noise levels of a solver schedule, float32."""
    is_flow = schedule.family == "flow"
    return torch.tensor([s if is_flow else s / a for a, s in levels_of(solver_schedule, schedule)]).float()


def trajectory_fitness(
    model: Callable, schedule: NoiseSchedule, x: torch.Tensor, reference: torch.Tensor
) -> Callable[[SolverSchedule], float]:
    """Fitness for a search: mean squared distance of a run's end to `reference`.

    Args:
        model: `(x, alpha, sigma) -> clean sample`.
        schedule: Noise levels of the model.
        x: Starting noise `[n, ...]`, the same for all candidates.
        reference: Where the exact solution takes it.
    """

    def fitness(candidate: SolverSchedule) -> float:
        levels = levels_of(candidate, schedule)
        solver = Solver(levels, candidate.steps, candidate.afs, candidate.average_x0)
        return (solve_usf(solver, lambda y, i: model(y, *levels[i]), x) - reference).square().mean().item()

    return fitness


@torch.no_grad()
def pipeline_fitness(
    pipe, prompts: Sequence[str], guidance_scale: float = 1.0, reference_steps: int = 30, seed: int = 0
) -> Callable[[SolverSchedule], float]:
    """`trajectory_fitness` of a text-to-image pipeline, against DPM-Solver++ 3M with many steps.

    Args:
        pipe: Stable Diffusion or Flux layout, any scheduler.
        prompts: What to draw, one starting noise each.
        guidance_scale: The one you will sample with.
        reference_steps: Steps of the reference.
        seed: Seed of the noise.
    """
    scheduler = USFScheduler.from_config(pipe.scheduler.config, schedule=None)
    schedule, kind = scheduler.noise_schedule, scheduler.config.prediction_type
    guided = guided_model(pipe, prompts, guidance_scale)
    channels, side = _latent_size(pipe)
    shape = (channels, side, side) if hasattr(pipe, "unet") else ((side // 2) ** 2, channels)
    x = torch.randn(len(prompts), *shape, generator=torch.Generator().manual_seed(seed)).to(pipe.device)

    @torch.no_grad()
    def model(y: torch.Tensor, alpha: float, sigma: float) -> torch.Tensor:
        log_snr = torch.tensor(math.log(alpha / sigma), dtype=torch.float64)
        return to_x0(guided(y, schedule.timestep(log_snr).to(y)), y, alpha, sigma, kind)

    reference = scheduler.preset_schedule(reference_steps, "dpmpp_3m")
    levels = levels_of(reference, schedule)
    end = solve_usf(Solver(levels, reference.steps), lambda y, i: model(y, *levels[i]), x)
    return trajectory_fitness(model, schedule, x, end)


def _latent_size(pipe) -> tuple[int, int]:
    if hasattr(pipe, "unet"):
        return pipe.unet.config.in_channels, pipe.unet.config.sample_size
    return pipe.transformer.config.in_channels, pipe.default_sample_size


def sample_usf(model, x, sigmas, extra_args=None, callback=None, disable=None, solver_schedule=None):
    """A solver schedule as a ComfyUI sampler; `sigmas` must be those of the schedule.

    Args:
        model, x, sigmas, extra_args, callback, disable: As ComfyUI passes them.
        solver_schedule: `SolverSchedule` with as many steps as `sigmas`.
    """
    run = NativeRun(model, x, sigmas, extra_args, callback)
    if len(solver_schedule.steps) != run.steps:
        raise ValueError(
            f"the solver schedule has {len(solver_schedule.steps)} steps and the sigmas {run.steps}: connect the "
            "SIGMAS of the same USF Sampler node"
        )
    solver = Solver(run.levels, solver_schedule.steps, solver_schedule.afs, solver_schedule.average_x0)

    def predict(y: torch.Tensor, node: int) -> torch.Tensor:
        denoised = run.denoised(y, run.sigmas[node])
        run.report(min(node, run.steps - 1), y, denoised)
        return denoised

    return run.finish(solve_usf(solver, predict, x))


def search_native(model, x, extra_args, sigmas: dict[int, list[float]], calls: int, evaluations: int, seed, on_step):
    """S^3 on a ComfyUI model from inside a sampler call.

    Args:
        model, x, extra_args: As ComfyUI passes them to a sampler.
        sigmas: Noise levels by number of steps: those of `calls`, and more for the reference.
        calls: Model calls of the schedule.
        evaluations: Schedules to try.
        seed: Seed of the search.
        on_step: Called after every evaluation.
    """
    run = NativeRun(model, x, torch.tensor(sigmas[calls]), extra_args)

    def denoise(y: torch.Tensor, alpha: float, sigma: float) -> torch.Tensor:
        scale = 1.0 if run.flow else alpha  # ComfyUI's samples of a VP model have alpha 1
        return run.denoised(y / scale, sigma / scale)

    schedule = run.schedule
    presets = [preset_of_sigmas(p, sigmas[calls], schedule) for p in ("unipc_bh2", "dpmpp_2m", "dpmpp_3m", "ddim")]
    reference = preset_of_sigmas("dpmpp_3m", sigmas[max(sigmas)], schedule)
    levels = levels_of(reference, schedule)
    start = x * (1.0 if run.flow else levels[0][0])
    end = solve_usf(Solver(levels, reference.steps), lambda y, i: denoise(y, *levels[i]), start)
    search = SolverScheduleSearch(trajectory_fitness(denoise, schedule, start, run.finish(end)), presets, calls, seed)
    return search.run(evaluations, progress=False, on_evaluation=on_step)


@register(
    MethodRecord(
        slug="usf-s3",
        family="schedulers",
        kind="scheduler",
        title="A Unified Sampling Framework for Solver Searching of Diffusion Probabilistic Models",
        arxiv="2312.07243",
        summary="Every step its own solver, written in a file; search the best file for 3 to 10 calls.",
        targets=("any",),
        predictions=("epsilon", "v_prediction", "sample", "flow_prediction"),
        nodes=("DXUSFSampler", "DXUSFSearch"),
        claim=Claim(
            text="FID (DPM-Solver-v3: 12.45)",
            setting="EDM model, CIFAR-10, 5 function evaluations, searched schedule of the repository",
            value=3.93,
            unit="FID",
        ),
    )
)
class USFScheduler(NoiseLevelScheduler):
    """Sampler driven by a solver schedule: a named one, or a file that a search has found.

    Paper: https://arxiv.org/abs/2312.07243.

    Args:
        preset: Solver used for numbers of steps without a file: one of `"ddim"`, `"dpmpp_2m"`, `"dpmpp_2m_taylor"`,
            `"dpmpp_3m"`, `"dpm_2m"`, `"dpm_solver_2s"`, `"dpmpp_2s"`, `"unipc_bh1"`, `"unipc_bh2"`, `"unipc"`.
        skip_type: Spacing of a preset's nodes: `"logSNR"`, `"time_uniform"`, `"time_quadratic"`, `"edm"`, or None for
            `timestep_spacing`.
        schedule: Solver schedules as dicts (`SolverSchedule.to_dict`), one or a list for several numbers of calls.

    The other options are those of `NoiseLevelScheduler`.

    Raises:
        ValueError: A schedule is invalid; the message names the step.

    Example:
        >>> pipe.scheduler = USFScheduler.from_config(pipe.scheduler.config, preset="unipc_bh2")
        >>> image = pipe("a red circle", num_inference_steps=6).images[0]

    Limits: noise and data prediction only; the DPM-Solver-v3 prediction type and the skip coefficients of the paper's
    files are refused. With an analytic first step, only pipelines that call `scale_model_input` (not Flux-like ones).
    """

    @schedule_config
    def __init__(self, preset: str = "dpmpp_2m", skip_type: str | None = None, schedule: dict | list | None = None):
        require_choice("preset", preset, tuple(PRESETS))
        require_choice("skip_type", skip_type, (None, *SKIP_TYPES))
        given = [] if schedule is None else [schedule] if isinstance(schedule, dict) else schedule
        self._schedules = {s.calls: s for s in map(SolverSchedule.from_dict, given)}
        self._solver: Solver | None = None
        self._points: dict[int, Point] = {}

    @classmethod
    def from_preset(cls, preset: str, config=None, skip_type: str | None = None, **options) -> USFScheduler:
        """A named solver for the model of another scheduler's `config`."""
        return cls.from_config(config or {}, preset=preset, skip_type=skip_type, **options)

    def load_schedule(self, schedule: SolverSchedule | str | Path) -> USFScheduler:
        """Use this solver schedule, or the file it is in, whenever its number of calls is asked for."""
        schedule = schedule if isinstance(schedule, SolverSchedule) else SolverSchedule.load(schedule)
        self._schedules[schedule.calls] = schedule
        self.register_to_config(schedule=[s.to_dict() for s in self._schedules.values()])
        return self

    def preset_schedule(self, num_inference_steps: int, preset: str | None = None) -> SolverSchedule:
        """The solver schedule of a preset for this model, a starting point for a search."""
        chosen = preset or self.config.preset
        require_choice("preset", chosen, tuple(PRESETS))
        log_snr = self._nodes(*super()._choose(num_inference_steps, None, None, None), None)
        steps = preset_steps(chosen, num_inference_steps, to_clean=bool(torch.isinf(log_snr[-1])))
        return SolverSchedule(tuple(times_of(log_snr, self.noise_schedule)), steps)

    def _nodes(self, log_snr: torch.Tensor, times: torch.Tensor, mu: float | None) -> torch.Tensor:
        if self.config.skip_type is None:
            return log_snr
        nodes = skip_nodes(self.noise_schedule, len(times), self.config.skip_type)
        if self.noise_schedule.family == "flow":
            nodes = -torch.logit(self._shifted(torch.sigmoid(-nodes), mu))
        return torch.cat([nodes[:-1], log_snr[-1:]])

    def _choose(self, steps, sigmas, timesteps, mu) -> tuple[torch.Tensor, torch.Tensor]:
        own = sigmas is not None or timesteps is not None
        if not own and steps in self._schedules:
            return self._from_file(self._schedules[steps])
        log_snr, times = super()._choose(steps, sigmas, timesteps, mu)
        if not own and self.config.skip_type is not None:
            log_snr = self._nodes(log_snr, times, mu)
            times = self.noise_schedule.timestep(log_snr[:-1])
        plan = preset_steps(self.config.preset, len(times), to_clean=bool(torch.isinf(log_snr[-1])))
        self._solver = Solver(list(zip(*(v.tolist() for v in self.noise_schedule.levels(log_snr)))), plan)
        return log_snr, times

    def _from_file(self, chosen: SolverSchedule) -> tuple[torch.Tensor, torch.Tensor]:
        if chosen.afs != "none" and self.noise_schedule.family == "flow":
            raise ValueError("flow pipelines cannot take an analytic first step: use a solver schedule with afs none")
        self._solver = solver = Solver(
            levels_of(chosen, self.noise_schedule), chosen.steps, chosen.afs, chosen.average_x0
        )
        log_snr = log_snr_of(chosen.times, self.noise_schedule)
        times = self.noise_schedule.timestep(log_snr[solver.calls])
        return torch.cat([log_snr[solver.calls], log_snr[-1:]]), times

    def _reset(self) -> None:
        self._points = {}

    def scale_model_input(self, sample: torch.Tensor, timestep=None) -> torch.Tensor:
        """The sample; at the start of a run with an analytic first step, the sample after that step."""
        starts = self._step_index is None and not self._begin_index
        if self._solver is None or self._solver.afs == "none" or not starts:
            return sample
        work = torch.promote_types(sample.dtype, torch.float32)
        return self._solver.first(sample.to(work))[0].to(sample.dtype)

    def _advance(self, i: int, output: torch.Tensor, x: torch.Tensor, generator) -> torch.Tensor:
        if i == 0 and self._solver.afs != "none":
            x, self._points = self._solver.first(x)
        level, kind = self._levels[i], self.config.prediction_type
        noise, x0 = to_noise(output, x, *level, kind), to_x0(output, x, *level, kind)
        after, self._points = self._solver.advance(self._points, x, noise, x0, i)
        return after
