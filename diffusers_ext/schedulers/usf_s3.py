"""USF: exponential-integrator steps whose order, prediction, start, derivative estimates and corrector are data.

lambda = log(alpha / sigma), h = lambda_t - lambda_s. A "solver schedule" lists the choices of every step; S^3
searches for good ones. Points are counted from the newest: -1 is where the sample is. https://arxiv.org/abs/2312.07243
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from ..prediction import NoiseSchedule, to_noise, to_x0
from ..registry import Claim, MethodRecord, register
from ._common import NoiseLevelScheduler, guided_model, require_choice, schedule_config
from ._ems import EMS
from ._native import NativeRun
from ._pictures import latent_shape
from ._usf_schedule import PRESETS, SolverSchedule, preset_steps
from ._usf_search import SolverScheduleSearch
from ._usf_solver import Point, Solver, solve_usf
from ._with_ems import StatisticsMixin
from .dpm_solver_v3 import SKIP_TYPES, skip_nodes


__all__ = ["SolverSchedule", "SolverScheduleSearch", "USFScheduler", "solve_usf"]


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


def compiled(chosen: SolverSchedule, schedule: NoiseSchedule, ems: EMS | None = None) -> Solver:
    """A solver schedule as a solver for a model's noise levels."""
    return Solver(levels_of(chosen, schedule), chosen.steps, chosen.afs, chosen.average_x0, ems, schedule)


def trajectory_fitness(
    model: Callable, schedule: NoiseSchedule, x: torch.Tensor, reference: torch.Tensor, ems: EMS | None = None
) -> Callable[[SolverSchedule], float]:
    """Fitness for a search: mean squared distance of a run's end to `reference`.

    Args:
        model: `(x, alpha, sigma) -> clean sample`.
        schedule: Noise levels of the model.
        x: Starting noise `[n, ...]`, the same for all candidates.
        reference: Where the exact solution takes it.
        ems: Statistics of the model, for schedules with v3 prediction.
    """

    def fitness(candidate: SolverSchedule) -> float:
        solver = compiled(candidate, schedule, ems)
        return (solve_usf(solver, lambda y, i: model(y, *solver.levels[i]), x) - reference).square().mean().item()

    return fitness


@torch.no_grad()
def pipeline_fitness(
    pipe,
    prompts: Sequence[str],
    guidance_scale: float = 1.0,
    reference_steps: int = 30,
    seed: int = 0,
    ems: EMS | None = None,
    size: int | None = None,
) -> Callable[[SolverSchedule], float]:
    """`trajectory_fitness` of a text-to-image pipeline, against DPM-Solver++ 3M with many steps.

    Args:
        pipe: Stable Diffusion or Flux layout, any scheduler.
        prompts: What to draw, one starting noise each.
        guidance_scale: The one you will sample with.
        reference_steps: Steps of the reference.
        seed: Seed of the noise.
        ems: Statistics of the pipeline's model, for schedules with v3 prediction.
        size: Height and width in pixels; default the pipeline's.
    """
    scheduler = USFScheduler.from_config(pipe.scheduler.config, schedule=None)
    schedule, kind = scheduler.noise_schedule, scheduler.config.prediction_type
    guided = guided_model(pipe, prompts, guidance_scale)
    x = torch.randn(len(prompts), *latent_shape(pipe, size), generator=torch.Generator().manual_seed(seed)).to(
        pipe.device
    )

    @torch.no_grad()
    def model(y: torch.Tensor, alpha: float, sigma: float) -> torch.Tensor:
        log_snr = torch.tensor(math.log(alpha / sigma), dtype=torch.float64)
        return to_x0(guided(y, schedule.timestep(log_snr).to(y)), y, alpha, sigma, kind)

    reference = scheduler.preset_schedule(reference_steps, "dpmpp_3m")
    solver = compiled(reference, schedule)
    end = solve_usf(solver, lambda y, i: model(y, *solver.levels[i]), x)
    return trajectory_fitness(model, schedule, x, end, ems)


def sample_usf(model, x, sigmas, extra_args=None, callback=None, disable=None, solver_schedule=None, ems=None):
    """A solver schedule as a ComfyUI sampler; `sigmas` must be those of the schedule.

    Args:
        model, x, sigmas, extra_args, callback, disable: As ComfyUI passes them.
        solver_schedule: `SolverSchedule` with as many steps as `sigmas`.
        ems: Statistics of the model, for schedules with v3 prediction.
    """
    run = NativeRun(model, x, sigmas, extra_args, callback)
    if len(solver_schedule.steps) != run.steps:
        raise ValueError(
            f"the solver schedule has {len(solver_schedule.steps)} steps and the sigmas {run.steps}: connect the "
            "SIGMAS of the same USF Sampler node"
        )
    chosen = solver_schedule
    solver = Solver(run.levels, chosen.steps, chosen.afs, chosen.average_x0, ems, run.schedule)

    def predict(y: torch.Tensor, node: int) -> torch.Tensor:
        denoised = run.denoised(y, run.sigmas[node])
        run.report(min(node, run.steps - 1), y, denoised)
        return denoised

    return run.finish(solve_usf(solver, predict, x))


def search_native(
    model,
    x,
    extra_args,
    sigmas: dict[int, list[float]],
    calls: int,
    evaluations: int,
    seed: int,
    on_step: Callable[[int], None],
    ems: EMS | None = None,
    screen: int = 1,
) -> SolverSchedule:
    """S^3 on a ComfyUI model from inside a sampler call.

    Args:
        model, x, extra_args: As ComfyUI passes them to a sampler.
        sigmas: Noise levels by number of steps: those of `calls`, and more for the reference.
        calls: Model calls of the schedule.
        evaluations: Schedules to try.
        seed: Seed of the search.
        on_step: Called after every evaluation.
        ems: Statistics of the model; lets the search use v3 prediction.
        screen: Candidates drawn for each that is evaluated, see `SolverScheduleSearch`.
    """
    run = NativeRun(model, x, torch.tensor(sigmas[calls]), extra_args)

    def denoise(y: torch.Tensor, alpha: float, sigma: float) -> torch.Tensor:
        scale = 1.0 if run.flow else alpha  # ComfyUI's samples of a VP model have alpha 1
        return run.denoised(y / scale, sigma / scale)

    schedule = run.schedule
    presets = [preset_of_sigmas(p, sigmas[calls], schedule) for p in ("unipc_bh2", "dpmpp_2m", "dpmpp_3m", "ddim")]
    reference = preset_of_sigmas("dpmpp_3m", sigmas[max(sigmas)], schedule)
    solver = compiled(reference, schedule)
    start = x * (1.0 if run.flow else solver.levels[0][0])
    end = run.finish(solve_usf(solver, lambda y, i: denoise(y, *solver.levels[i]), start))
    fitness = trajectory_fitness(denoise, schedule, start, end, ems)
    options = {"with_statistics": ems is not None, "screen": screen}
    return SolverScheduleSearch(fitness, presets, calls, seed, **options).run(evaluations, False, on_step)


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
class USFScheduler(StatisticsMixin, NoiseLevelScheduler):
    """Sampler driven by a solver schedule: a named one, or a file that a search has found.

    Paper: https://arxiv.org/abs/2312.07243.

    Args:
        preset: Solver used for numbers of steps without a file: one of `"ddim"`, `"dpmpp_2m"`, `"dpmpp_2m_taylor"`,
            `"dpmpp_3m"`, `"dpm_2m"`, `"dpm_solver_2s"`, `"dpmpp_2s"`, `"unipc_bh1"`, `"unipc_bh2"`, `"unipc"`; with
            statistics of the model (`load_ems`) also `"v3_2m"` and `"v3_3m"`.
        skip_type: Spacing of a preset's nodes: `"logSNR"`, `"time_uniform"`, `"time_quadratic"`, `"edm"`, or None for
            `timestep_spacing`.
        schedule: Solver schedules as dicts (`SolverSchedule.to_dict`), one or a list for several numbers of calls.
        ems_file: Set by `load_ems`.

    The other options are those of `NoiseLevelScheduler`.

    Raises:
        ValueError: A schedule is invalid, or needs statistics and there are none; the message names the step.

    Example:
        >>> pipe.scheduler = USFScheduler.from_config(pipe.scheduler.config, preset="unipc_bh2")
        >>> image = pipe("a red circle", num_inference_steps=6).images[0]

    Limits: the skip coefficients of the paper's files, which scale connections inside the model, are refused. With an
    analytic first step, only pipelines that call `scale_model_input` (not Flux-like ones).
    """

    @schedule_config
    def __init__(
        self,
        preset: str = "dpmpp_2m",
        skip_type: str | None = None,
        schedule: dict | list | None = None,
        ems_file: str | None = None,
    ):
        require_choice("preset", preset, tuple(PRESETS))
        require_choice("skip_type", skip_type, (None, *SKIP_TYPES))
        given = [] if schedule is None else [schedule] if isinstance(schedule, dict) else schedule
        self._schedules = {s.calls: s for s in map(SolverSchedule.from_dict, given)}
        self.ems: EMS | None = None
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
        levels = list(zip(*(v.tolist() for v in self.noise_schedule.levels(log_snr))))
        self._solver = Solver(levels, plan, ems=self.ems, schedule=self.noise_schedule)
        return log_snr, times

    def _from_file(self, chosen: SolverSchedule) -> tuple[torch.Tensor, torch.Tensor]:
        if chosen.afs != "none" and self.noise_schedule.family == "flow":
            raise ValueError("flow pipelines cannot take an analytic first step: use a solver schedule with afs none")
        self._solver = solver = compiled(chosen, self.noise_schedule, self.ems)
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
