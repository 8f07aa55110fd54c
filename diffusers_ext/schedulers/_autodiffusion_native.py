"""The search for timesteps on a ComfyUI model, from inside a sampler call."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

from ._native import model_sampling_of, native_schedule
from .autodiffusion import ScheduleSearchResult, TimestepSearch, even, grid_of, sigmas_of, trajectory_mse
from .usf_s3 import preset_of_sigmas, sample_usf


REFERENCE_STEPS = 40


class NativeSampler:
    """Samples of a ComfyUI model for a candidate: always the same noise, through any of ComfyUI's samplers.

    Args:
        model: The function a KSAMPLER hands to its sampler.
        noise: Noise of unit variance `[n, ...]`.
        extra_args: As ComfyUI passes them.
        sampler: ComfyUI's sampler function `(model, x, sigmas, extra_args, callback, disable) -> x`.
        leave_out: Told every candidate before it is drawn.
    """

    def __init__(
        self,
        model: Callable,
        noise: torch.Tensor,
        extra_args: dict | None,
        sampler: Callable,
        leave_out: Callable[[ScheduleSearchResult], None],
    ):
        self.model, self.noise, self.extra_args, self.sampler = model, noise, extra_args or {}, sampler
        self.leave_out, self.sampling = leave_out, model_sampling_of(model)

    def __call__(self, candidate: ScheduleSearchResult) -> torch.Tensor:
        """Final latents of a candidate."""
        self.leave_out(candidate)
        return self.run(self.sampler, candidate.sigmas)

    def run(self, sampler: Callable, sigmas: tuple[float, ...], **options) -> torch.Tensor:
        """Final latents of noise levels."""
        levels = torch.tensor(sigmas, dtype=torch.float32, device=self.noise.device)
        highest = float(self.sampling.sigma_max)
        from_pure_noise = sigmas[0] > highest or math.isclose(sigmas[0], highest, rel_tol=1e-5)
        x = self.sampling.noise_scaling(levels[0], self.noise, torch.zeros_like(self.noise), from_pure_noise)
        return sampler(self.model, x, levels, extra_args=self.extra_args, callback=None, disable=True, **options)

    def reference(self) -> torch.Tensor:
        """What many third-order steps of DPM-Solver++ make of the noise."""
        schedule = native_schedule(self.sampling)
        sigmas = sigmas_of(even(grid_of(schedule), REFERENCE_STEPS), schedule)
        return self.run(sample_usf, sigmas, solver_schedule=preset_of_sigmas("dpmpp_3m", sigmas, schedule))


def native_search(sampler: NativeSampler, num_steps: int, **options: Any) -> TimestepSearch:
    """A search for the samples nearest to many steps; `options` are those of `TimestepSearch`."""
    schedule = native_schedule(sampler.sampling)
    return TimestepSearch(sampler, num_steps, trajectory_mse(sampler.reference()), schedule, **options)
