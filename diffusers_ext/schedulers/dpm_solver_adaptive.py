"""DPM-Solver with adaptive steps: two orders share their evaluations, and their difference sets the step.

The number of model calls depends on the sample, so this is no scheduler for a pipeline but a sampler of its own.
https://arxiv.org/abs/2206.00927 (algorithm 3 and appendix C)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from ..prediction import NoiseSchedule, Prediction, to_noise, to_x0
from ._common import guided_model
from ._native import NativeRun
from ._pictures import decode, starting_noise
from .dpm_solver import _FLOW_ENDS, Level, LogAlphaClock, _check, anchor, first_order, second_order, single_stage


__all__ = ["AdaptiveOutput", "DPMSolverAdaptiveSampler", "adaptive_sample"]


@dataclass(frozen=True)
class AdaptiveOutput:
    """Result of an adaptive run.

    Args:
        sample: Sample at the end, in the denoiser's space.
        nfe: Network calls: order * (accepted + rejected).
        accepted: Steps taken.
        rejected: Steps tried again with a smaller size.
        images: Decoded PIL images; only from `adaptive_sample`.
    """

    sample: torch.Tensor
    nfe: int
    accepted: int
    rejected: int
    images: list | None = None


def attempt(predict: Callable, levels: Callable, x, log_snr: float, h: float, order: int, data, solver_type):
    """One step by `order` and by `order - 1` from the same `order` evaluations: `(high, low)`.

    Args:
        predict: `predict(x, level) -> network output`.
        levels: lambda -> `Level`.
        x: Sample at lambda `log_snr`.
        h: Step in lambda.
    """
    fractions = {2: (0, 1 / 2, 1), 3: (0, 1 / 3, 2 / 3, 1)}[order]
    nodes, outputs, y, base = [levels(log_snr + r * h) for r in fractions], [], x, x
    for level in nodes[:-1]:
        outputs.append(predict(y, level))
        base = anchor(x, outputs[0], nodes[0], data) if level is nodes[0] else base
        y = single_stage(base, outputs, nodes, data, solver_type)
    if order == 2:
        return y, first_order(base, outputs[0], nodes[0], nodes[-1], data)
    return y, second_order(base, outputs[0], outputs[1], nodes[0], nodes[-1], 1 / 3, data, solver_type)


def error_ratio(high: torch.Tensor, low: torch.Tensor, before: torch.Tensor, atol: float, rtol: float) -> float:
    """E: root mean square of (high - low) / max(atol, rtol max(|low|, |before|)), of the worst batch item."""
    delta = torch.clamp(rtol * torch.maximum(low.abs(), before.abs()), min=atol)
    return ((high - low) / delta).flatten(1).square().mean(1).sqrt().max().item()


def adaptive_steps(
    predict: Callable,
    levels: Callable,
    x: torch.Tensor,
    start: float,
    end: float,
    done: Callable[[float], bool],
    order: int,
    data: bool,
    solver_type: str,
    atol: float,
    rtol: float,
    h_init: float,
    theta: float,
    max_calls: int,
) -> AdaptiveOutput:
    """Step from lambda `start` to `end`, each step accepted where E <= 1, the next of size theta h E^(-1 / order)."""
    log_snr, h, before, accepted, rejected = start, h_init, x, 0, 0
    while not done(log_snr):
        high, low = attempt(predict, levels, x, log_snr, h, order, data, solver_type)
        ratio = error_ratio(high, low, before, atol, rtol)
        if not math.isfinite(ratio):
            raise RuntimeError(
                f"step {accepted + 1} gave NaN or infinity: try a higher precision or a lower guidance scale"
            )
        if ratio <= 1:
            x, before, log_snr, accepted = high, low, log_snr + h, accepted + 1
        else:
            rejected += 1
        h = min(theta * h * ratio ** (-1 / order) if ratio > 0 else math.inf, end - log_snr)
        if order * (accepted + rejected) >= max_calls and not done(log_snr):
            raise RuntimeError(
                f"not at the end after {max_calls} model calls (lambda {log_snr:.3f} of {end:.3f}): raise atol or rtol"
            )
    return AdaptiveOutput(x, order * (accepted + rejected), accepted, rejected)


def _check_adaptive(order, algorithm_type, solver_type, atol, rtol, h_init, theta) -> None:
    _check(order, algorithm_type, solver_type)
    if order == 1:
        raise ValueError("order is 1; adaptive steps compare two orders: use 2 or 3")
    if min(atol, rtol, h_init, theta) <= 0 or theta >= 1:
        raise ValueError(f"atol {atol}, rtol {rtol} and h_init {h_init} must be above 0 and theta {theta} in (0, 1)")


class DPMSolverAdaptiveSampler:
    """Samples with as many steps as the tolerance needs. Paper: https://arxiv.org/abs/2206.00927

    Args:
        schedule: Noise levels of the model, e.g. `scheduler.noise_schedule` or `NoiseSchedule.from_scheduler(...)`.
        prediction: What the model predicts.
        order: 2 or 3; the step is compared with one order less.
        algorithm_type: Network expanded as data (`"dpmsolver++"`) or as noise (`"dpmsolver"`).
        solver_type: `"dpmsolver"` or `"taylor"`.
        atol, rtol: Error allowed per step, absolute and relative to the sample; atol 0.0078 is 2 / 256 of the range.
        h_init: First step in lambda.
        theta: Safety factor of the step size, in (0, 1).
        t_end: Last time in units of the training time, in (0, 1).
        max_calls: Give up after this many model calls.

    Example:
        >>> sampler = DPMSolverAdaptiveSampler(NoiseSchedule.from_scheduler(pipe.scheduler), "v_prediction")
        >>> result = sampler.sample(model, torch.randn(1, 4, 16, 16))

    Limits: every step waits for the device, to learn its error. The whole batch takes the steps its worst item needs.
    """

    def __init__(
        self,
        schedule: NoiseSchedule,
        prediction: Prediction = "epsilon",
        order: int = 3,
        algorithm_type: str = "dpmsolver++",
        solver_type: str = "dpmsolver",
        atol: float = 0.0078,
        rtol: float = 0.05,
        h_init: float = 0.05,
        theta: float = 0.9,
        t_end: float = 1e-3,
        max_calls: int = 10_000,
    ):
        _check_adaptive(order, algorithm_type, solver_type, atol, rtol, h_init, theta)
        if not 0 < t_end < 1:
            raise ValueError(f"t_end is {t_end}; it must lie in (0, 1), e.g. 0.001")
        self.schedule, self.prediction, self.t_end = schedule, prediction, t_end
        self._options = (order, algorithm_type == "dpmsolver++", solver_type, atol, rtol, h_init, theta, max_calls)

    def _levels(self, log_snr: float) -> Level:
        alpha, sigma = self.schedule.levels(torch.tensor(log_snr, dtype=torch.float64))
        return Level(alpha.item(), sigma.item())

    @torch.no_grad()
    def sample(self, model: Callable, x: torch.Tensor) -> AdaptiveOutput:
        """Denoise.

        Args:
            model: `model(x, timestep) -> output`, with guidance inside.
            x: Noise `[batch, ...]` in the model's space; the arithmetic is in its dtype, float32 at least.

        Raises:
            RuntimeError: The model returned NaN, or `max_calls` were not enough.
        """
        clock, data = LogAlphaClock(self.schedule), self._options[1]
        flow = self.schedule.family == "flow"
        unit = 1.0 if flow else clock.start + 1
        first, last = (_FLOW_ENDS["logSNR"], self.t_end) if flow else (unit - 1, unit * self.t_end - 1)
        scale = self.schedule.num_train_timesteps if flow else 1

        def predict(y: torch.Tensor, level: Level) -> torch.Tensor:
            t = torch.tensor(float(clock.time(level.log_snr)) * scale, dtype=y.dtype, device=y.device)
            output = model(y.to(x.dtype), t).to(y.dtype)
            return (to_x0 if data else to_noise)(output, y, level.alpha, level.sigma, self.prediction)

        return adaptive_steps(
            predict,
            self._levels,
            x.to(torch.promote_types(x.dtype, torch.float32)),
            float(clock.log_snr(first)),
            float(clock.log_snr(last)),
            lambda v: abs(float(clock.time(v)) - last) <= 1e-5 * unit,
            *self._options,
        )


@torch.no_grad()
def adaptive_sample(
    pipe,
    prompts: Sequence[str],
    guidance_scale: float = 3.0,
    negative_prompt: str = "",
    height: int | None = None,
    width: int | None = None,
    generator: torch.Generator | None = None,
    **options,
) -> AdaptiveOutput:
    """Draw prompts with a text-to-image pipeline in as many steps as the tolerance needs.

    Args:
        pipe: Pipeline of the Stable Diffusion or Flux layout; its scheduler tells noise levels and prediction type.
        prompts: One per picture.
        guidance_scale: Classifier-free guidance; 1 turns it off.
        negative_prompt: Prompt of the unconditional branch.
        height, width: Pixels; default the pipeline's own.
        generator: For the starting noise.
        options: Of `DPMSolverAdaptiveSampler`, e.g. `rtol=0.01`.

    Returns:
        `AdaptiveOutput` with `images`, `nfe`, `accepted`, `rejected`.

    Example:
        >>> result = diffusers_ext.adaptive_sample(zoo.load("shapes-unet"), ["a red circle"], rtol=0.1)
        >>> result.nfe

    Limits: dynamic shifts of flow models do not apply; the solver chooses its own times.
    """
    if isinstance(prompts, str) or not len(prompts):
        raise ValueError(f"prompts is {prompts!r}; pass a list of at least one string")
    schedule = NoiseSchedule.from_scheduler(pipe.scheduler)
    prediction = "flow_prediction" if schedule.family == "flow" else pipe.scheduler.config.prediction_type
    latents, size = starting_noise(pipe, len(prompts), height, width, generator)
    model = guided_model(pipe, prompts, guidance_scale, negative_prompt)
    result = DPMSolverAdaptiveSampler(schedule, prediction, **options).sample(model, latents)
    images = decode(pipe, result.sample.to(latents.dtype), size)
    return AdaptiveOutput(result.sample, result.nfe, result.accepted, result.rejected, images)


def sample_dpm_solver_adaptive(
    model, x, sigmas, extra_args=None, callback=None, disable=None,
    order=3, algorithm_type="dpmsolver++", solver_type="dpmsolver", atol=0.0078, rtol=0.05, h_init=0.05, theta=0.9,
):  # fmt: skip
    """Adaptive DPM-Solver as a ComfyUI sampler from the first to the last positive noise level of `sigmas`.

    A last level of 0 is reached by one more call, which returns the clean prediction.

    Args:
        model, x, sigmas, extra_args, callback, disable: As ComfyUI passes them.
        order, algorithm_type, solver_type, atol, rtol, h_init, theta: See `DPMSolverAdaptiveSampler`.
    """
    _check_adaptive(order, algorithm_type, solver_type, atol, rtol, h_init, theta)
    run = NativeRun(model, x, sigmas, extra_args, callback)
    clean, data = run.sigmas[-1] == 0, algorithm_type == "dpmsolver++"
    start, end = Level(*run.levels[0]).log_snr, Level(*run.levels[-1 - clean]).log_snr

    def predict(y: torch.Tensor, level: Level) -> torch.Tensor:
        eps, x0 = run.noise(y, level.sigma)
        # ComfyUI's progress counts the steps of `sigmas`
        share = (level.log_snr - start) / max(end - start, 1e-9)
        run.report(min(int(share * run.steps), run.steps - 1), y, x0)
        return x0 if data else eps

    x = adaptive_steps(
        predict, lambda v: Level(*run.level(run.sigma_at(v))), x, start, end, lambda v: end - v < 1e-5,
        order, data, solver_type, atol, rtol, h_init, theta, 10_000,
    ).sample  # fmt: skip
    return run.finish(run.denoised(x, run.sigmas[-2]) if clean else x)
