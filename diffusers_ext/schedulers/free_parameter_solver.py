"""Free parameters of few-step sampling: where to start, where to stop, how to bend the grid in between.

sigma is sigma / alpha here, as in k-diffusion; D is the clean sample the model predicts. The run stops above zero
noise: a VAE hides what is left. https://arxiv.org/abs/2510.02390
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from tqdm.auto import tqdm

from ..prediction import NoiseSchedule, to_x0
from ..registry import Claim, MethodRecord, register
from ._checkpoint import Checkpoint
from ._common import NoiseLevelScheduler, require_choice, schedule_config


__all__ = ["FreeParameterScheduler", "FreeParameterSigmas", "tune_free_parameters"]

# preset -> steps -> (n0, rho0, stop index j)
PRESETS: dict[str, dict[int, tuple[int, float, int]]] = {
    "sd15": {4: (8, 5.0, 5), 5: (8, 5.0, 6), 6: (8, 5.0, 6), 8: (12, 7.0, 9)},
    "sdxl": {4: (8, 5.0, 6), 5: (8, 5.0, 6), 6: (8, 5.0, 6), 8: (12, 12.0, 10)},
}
SOLVERS = ("auto", "first", "2m")
STOPS = ("residual", "denoise")
_SECOND_ORDER_STEPS = (7, 8)
_TIME_RHO = 1.2


def karras(n: int, start: float, end: float, rho: float) -> torch.Tensor:
    """n values from `start` to `end`, even in the power 1 / rho."""
    a, b = start ** (1 / rho), end ** (1 / rho)
    return (a + torch.linspace(0, 1, n, dtype=torch.float64) * (b - a)) ** rho


def free_parameter_levels(
    schedule: NoiseSchedule, steps: int, n0: int, rho0: float, stop_index: int, time_rho: float = _TIME_RHO
) -> torch.Tensor:
    """Log-SNR at the N + 1 nodes, float64.

    Args:
        schedule: Noise levels of a model trained on discrete steps.
        steps: N.
        n0: Levels of the first, coarse grid over all noise levels of the model.
        rho0: Its exponent.
        stop_index: Which of them to stop at, 1 to n0 - 1.
        time_rho: Exponent of the second grid, which runs over time.
    """
    if schedule.table is None:
        raise ValueError("free parameters need a model trained on discrete timesteps, not a flow or EDM model")
    if not 1 <= stop_index <= n0 - 1:
        raise ValueError(f"stop_index is {stop_index}; with n0={n0} it lies in 1 to {n0 - 1}, where noise is left")
    if steps < 1 or not (rho0 > 0 and time_rho > 0):
        raise ValueError(f"steps is {steps}, rho0 {rho0}, time_rho {time_rho}; all must be above 0")
    table = schedule.table
    coarse = karras(n0, torch.exp(-table[-1]).item(), torch.exp(-table[0]).item(), rho0)
    ends = schedule.timestep(-torch.log(coarse[[0, stop_index]])).clamp(0, len(table) - 1)
    times = karras(steps + 1, ends[0].item(), ends[1].item(), time_rho)
    alphas_cumprod = torch.sigmoid(2 * table)
    low = times.floor().long().clamp(max=len(table) - 1)
    high, share = (low + 1).clamp(max=len(table) - 1), times - low
    bar = (1 - share) * alphas_cumprod[low] + share * alphas_cumprod[high]
    return 0.5 * (torch.log(bar) - torch.log1p(-bar))


def preset_parameters(preset: str, steps: int) -> tuple[int, float, int]:
    """`(n0, rho0, stop_index)` of a preset.

    Raises:
        ValueError: The preset has no such number of steps; lists those it has.
    """
    require_choice("preset", preset, (*PRESETS, "custom"))
    if steps not in PRESETS[preset]:
        raise ValueError(
            f"the preset {preset!r} has no {steps} steps; it has {', '.join(map(str, PRESETS[preset]))}. Give "
            "n0, rho0 and stop_index with preset='custom' for another number"
        )
    return PRESETS[preset][steps]


def step_free(
    x: torch.Tensor,
    d: torch.Tensor,
    old: torch.Tensor | None,
    levels: Sequence[tuple[float, float]],
) -> torch.Tensor:
    """One data-prediction step between the last two of `levels`: DPM-Solver++ 2M if `old`, the D before, is given.

    Args:
        x: Sample at the second to last of `levels`.
        d: D there.
        old: D one node earlier, or None for a first-order step (DDIM).
        levels: `(alpha, sigma)` of the node before, of this node and of the next one.
    """
    (alpha, sigma), (alpha_next, sigma_next) = levels[-2:]
    if sigma_next == 0:
        return alpha_next * d
    h = math.log(alpha_next / sigma_next) - math.log(alpha / sigma)
    if old is not None:
        r = (math.log(alpha / sigma) - math.log(levels[0][0] / levels[0][1])) / h
        d = (1 + 1 / (2 * r)) * d - 1 / (2 * r) * old
    return sigma_next / sigma * x - alpha_next * math.expm1(-h) * d


@dataclass(frozen=True)
class FreeParameterSigmas:
    """Noise levels and timesteps of a few-step run; `sigmas, timesteps = FreeParameterSigmas("sd15", 5)`.

    Paper: https://arxiv.org/abs/2510.02390.

    Args:
        preset: `"sd15"` or `"sdxl"` (4, 5, 6 or 8 steps), or `"custom"`.
        steps: N.
        n0: Levels of the coarse grid; given with `"custom"` only.
        rho0: Exponent of the coarse grid.
        stop_index: Level of the coarse grid to stop at.
        time_rho: Exponent of the grid over time.
        alphas_cumprod: Of the model; default Stable Diffusion's.

    Raises:
        ValueError: The preset has no such number of steps, or a parameter is missing or out of range.

    Example:
        >>> sigmas, timesteps = FreeParameterSigmas("sd15", 5)
    """

    preset: str = "sd15"
    steps: int = 5
    n0: int | None = None
    rho0: float | None = None
    stop_index: int | None = None
    time_rho: float = _TIME_RHO
    alphas_cumprod: torch.Tensor | None = None

    @property
    def parameters(self) -> tuple[int, float, int]:
        """`(n0, rho0, stop_index)`."""
        given = (self.n0, self.rho0, self.stop_index)
        if self.preset != "custom":
            if given != (None, None, None):
                raise ValueError(f"the preset {self.preset!r} sets n0, rho0 and stop_index: use preset='custom'")
            return preset_parameters(self.preset, self.steps)
        if None in given:
            raise ValueError(f"preset 'custom' needs n0, rho0 and stop_index, got {given}")
        return given

    def log_snr(self, schedule: NoiseSchedule) -> torch.Tensor:
        """Log-SNR at the N + 1 nodes for a model's noise levels."""
        return free_parameter_levels(schedule, self.steps, *self.parameters, self.time_rho)

    def __iter__(self) -> Iterator[torch.Tensor]:
        """Yields sigmas `[N + 1]` and the (fractional) timesteps `[N + 1]` that belong to them, float64."""
        bar = self.alphas_cumprod
        if bar is None:
            bar = torch.cumprod(1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2, 0)
        schedule = NoiseSchedule.from_alphas_cumprod(bar)
        log_snr = self.log_snr(schedule)
        return iter((torch.exp(-log_snr), schedule.timestep(log_snr)))


def tune_free_parameters(
    sampler: Callable[[torch.Tensor], torch.Tensor],
    fitness: Callable[[torch.Tensor], float],
    start: FreeParameterSigmas,
    rho0: Sequence[float] = (3.0, 5.0, 7.0, 10.0),
    stop_index: Sequence[int] = (),
    time_rho: Sequence[float] = (1.0, 1.2, 1.5),
    checkpoint: str | Path | None = None,
    progress: bool = True,
) -> FreeParameterSigmas:
    """The best free parameters on a grid around `start`, which is always among the candidates.

    Ctrl-C stops it after a candidate; with a `checkpoint` the next call goes on there.

    Args:
        sampler: Takes sigmas `[N + 1]` (decreasing, the last above 0) to samples, with fixed starting noise.
        fitness: Of samples, lower is better.
        start: A preset, or custom parameters.
        rho0: Exponents of the coarse grid to try.
        stop_index: Levels to stop at to try; default the one of `start` and its neighbours.
        time_rho: Exponents of the grid over time to try.
        checkpoint: safetensors file of the scores so far; deleted at the end. Name another for another model.
        progress: Show a progress bar.

    Returns:
        The winner; `start` itself if nothing is better.
    """
    n0, own_rho, own_stop = start.parameters
    stops = stop_index or [j for j in (own_stop - 1, own_stop, own_stop + 1) if 1 <= j <= n0 - 1]
    grid = [p for p in itertools.product(rho0, stops, time_rho) if p != (own_rho, own_stop, start.time_rho)]
    others = [replace(start, preset="custom", n0=n0, rho0=r, stop_index=j, time_rho=b) for r, j, b in grid]
    candidates = [start, *others]
    unfinished = Checkpoint(checkpoint, "tuning", {"steps": start.steps, "start": start.parameters, "grid": grid})
    scores = unfinished.read().get("scores", torch.empty(0)).tolist()
    first = len(scores)
    for candidate in tqdm(candidates[first:], "free parameters", len(candidates), initial=first, disable=not progress):
        scores.append(float(fitness(sampler(next(iter(candidate))))))
        unfinished.write({"scores": torch.tensor(scores, dtype=torch.float64)})
    unfinished.delete()
    return candidates[min(range(len(scores)), key=scores.__getitem__)]


@register(
    MethodRecord(
        slug="free-parameter-solver",
        family="schedulers",
        kind="scheduler",
        title="Hyperparameters are all you need: Using five-step inference for an original diffusion model to "
        "generate images comparable to the latest distillation model",
        arxiv="2510.02390",
        summary="Stable Diffusion in 4 to 8 steps by a better grid that stops before the noise is gone.",
        targets=("unet",),
        predictions=("epsilon", "v_prediction", "sample"),
        nodes=("DXFreeParameterSigmas",),
        claim=Claim(
            text="FID (DPM-Solver++ 2M with 20 steps: 17.3)",
            setting="Stable Diffusion 1.5, COCO 2014, 8 steps",
            value=15.7,
            unit="FID",
        ),
    )
)
class FreeParameterScheduler(NoiseLevelScheduler):
    """Sampler with the paper's grids for 4, 5, 6 and 8 steps, which stop while a little noise is left.

    Paper: https://arxiv.org/abs/2510.02390.

    Args:
        preset: `"sd15"`, `"sdxl"`, or `"custom"` with `n0`, `rho0` and `stop_index` for any number of steps.
        n0: Levels of the coarse grid.
        rho0: Its exponent.
        stop_index: Level of the coarse grid to stop at, 1 to n0 - 1.
        time_rho: Exponent of the grid over time.
        solver: `"first"` (DDIM), `"2m"` (DPM-Solver++ 2M), or `"auto"`: 2M for 7 and 8 steps, as the authors.
        stop: `"residual"` leaves noise in the latents (0.13 to 0.15 of their size; a VAE hides it), `"denoise"` makes
            one more call that ends as `final_sigmas_type` says.
        rescale_final: Return the result divided by alpha, as the authors' code does (under 1 % larger).

    The other options are those of `NoiseLevelScheduler`; `timestep_spacing` and `use_karras_sigmas` have no effect.

    Raises:
        ValueError: A flow model; at `set_timesteps`, a number of steps that the preset does not have.

    Example:
        >>> pipe.scheduler = FreeParameterScheduler.from_config(pipe.scheduler.config, preset="sd15")
        >>> image = pipe("a red circle", num_inference_steps=5).images[0]

    Limits: models with Stable Diffusion's noise levels; no flow models.
    """

    fixed_steps = tuple(PRESETS["sd15"])

    @schedule_config
    def __init__(
        self,
        preset: str = "sd15",
        n0: int | None = None,
        rho0: float | None = None,
        stop_index: int | None = None,
        time_rho: float = _TIME_RHO,
        solver: str = "auto",
        stop: str = "residual",
        rescale_final: bool = False,
    ):
        require_choice("preset", preset, (*PRESETS, "custom"))
        require_choice("solver", solver, SOLVERS)
        require_choice("stop", stop, STOPS)
        if self.noise_schedule.table is None:
            raise ValueError(
                "FreeParameterScheduler serves models with betas (epsilon, v_prediction, sample), not flow"
            )
        self._old: torch.Tensor | None = None

    def _choose(self, steps, sigmas, timesteps, mu) -> tuple[torch.Tensor, torch.Tensor]:
        if sigmas is not None or timesteps is not None:
            log_snr, times = super()._choose(steps, sigmas, timesteps, mu)
            log_snr = log_snr if self.config.stop == "denoise" else log_snr[:-1]
            if len(log_snr) < 2:
                raise ValueError("own sigmas or timesteps need a start and a stop: give at least two")
            return log_snr, times[: len(log_snr) - 1]
        if steps is None or int(steps) != steps or steps < 1:
            raise ValueError(f"num_inference_steps is {steps}; it must be a whole number from 1 up")
        c = self.config
        grid = FreeParameterSigmas(c.preset, int(steps), c.n0, c.rho0, c.stop_index, c.time_rho)
        log_snr = grid.log_snr(self.noise_schedule)
        if c.stop == "denoise":
            log_snr = torch.cat([log_snr, self._final()])
        return log_snr, self.noise_schedule.timestep(log_snr[:-1])

    def _reset(self) -> None:
        self._old = None

    def _second_order(self) -> bool:
        steps = self.num_inference_steps - (self.config.stop == "denoise")
        return self.config.solver == "2m" or (self.config.solver == "auto" and steps in _SECOND_ORDER_STEPS)

    def _advance(self, i: int, output: torch.Tensor, x: torch.Tensor, generator) -> torch.Tensor:
        d = to_x0(output, x, *self._levels[i], self.config.prediction_type)
        old = self._old if self._second_order() and i > 0 and self._levels[i] != self._levels[i - 1] else None
        after = step_free(x, d, old, self._levels[max(i - 1, 0) : i + 2])
        self._old = d
        if self.config.rescale_final and i + 1 == self.num_inference_steps:
            after = after / self._levels[-1][0]
        return after
