"""The scheduler of SuperDiff: Euler steps of the reverse SDE, for every prediction type."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import torch
from diffusers import DDPMScheduler
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.schedulers.scheduling_utils import SchedulerMixin, SchedulerOutput
from diffusers.utils.torch_utils import randn_tensor

from ..prediction import NoiseSchedule, expand
from .superdiff import FLOW_RANGE, NoiseStep, karras_levels


__all__ = ["SuperDiffEulerScheduler"]


def noise_step(scheduler, index: int, sample: torch.Tensor, noise: torch.Tensor) -> NoiseStep:
    """Step `index` of a diffusers scheduler's run, after its `set_timesteps`.

    Works for every scheduler whose `sigmas` run from the first noise level to the last, one more than `timesteps`.

    Raises:
        ValueError: The scheduler has no such sigmas.
    """
    sigmas = getattr(scheduler, "sigmas", None)
    if sigmas is None or len(sigmas) != len(scheduler.timesteps) + 1:
        raise ValueError(
            f"{type(scheduler).__name__} has no noise levels (`sigmas`, one per step) for SuperDiff to follow; use "
            "SuperDiffEulerScheduler.from_config(pipe.scheduler.config)"
        )
    flow = NoiseSchedule.from_scheduler(scheduler).family == "flow"
    levels = [float(s) for s in sigmas[index : index + 2]]
    if flow:
        levels = [s / max(1 - s, 1e-3) for s in levels]
    prediction = "flow_prediction" if flow else scheduler.config.prediction_type
    final_noise = scheduler.config.get("final_noise", True)
    return NoiseStep(sample, noise, *levels, prediction, flow, index, len(scheduler.timesteps), final_noise)


class SuperDiffEulerScheduler(SchedulerMixin, ConfigMixin):
    """Euler steps of the reverse SDE with full noise, the steps SuperDiff's density estimate is made for.

    x <- x + 2 d v + sqrt(2 |d| sigma) * noise at noise levels spaced as Karras et al. do, for epsilon, v and flow
    models. On its own it is a plain stochastic sampler: `pipe.scheduler = SuperDiffEulerScheduler.from_config(
    pipe.scheduler.config)`. Paper: https://arxiv.org/abs/2412.17762

    Args:
        num_train_timesteps, beta_start, beta_end, beta_schedule, trained_betas, rescale_betas_zero_snr: Training noise
            schedule, as in diffusers' schedulers; a flow model uses `num_train_timesteps` only.
        prediction_type: `"epsilon"`, `"v_prediction"`, `"sample"` or `"flow_prediction"`.
        sigma_min, sigma_max: Range of VE noise levels. Default: that of the training schedule, 0.02 to 80 for flow.
        rho: Spacing of the levels, > 0.
        final_noise: Noise on the last step too, as in the paper's code; False ends on the denoised state.

    Limits: 50 steps or more; the error of the density estimate falls as 1 / steps.
    """

    order = 1
    _compatibles: list[str] = []

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        beta_start: float = 0.0001,
        beta_end: float = 0.02,
        beta_schedule: str = "linear",
        trained_betas: np.ndarray | list[float] | None = None,
        rescale_betas_zero_snr: bool = False,
        prediction_type: str = "epsilon",
        sigma_min: float | None = None,
        sigma_max: float | None = None,
        rho: float = 7.0,
        final_noise: bool = True,
    ):
        if prediction_type != "flow_prediction":
            training = DDPMScheduler(
                num_train_timesteps, beta_start, beta_end, beta_schedule, trained_betas,
                rescale_betas_zero_snr=rescale_betas_zero_snr,
            )  # fmt: skip
            self.alphas_cumprod = training.alphas_cumprod
        self._schedule = NoiseSchedule.from_scheduler(self)
        self.set_timesteps(num_train_timesteps)

    @property
    def flow(self) -> bool:
        return self._schedule.family == "flow"

    @property
    def init_noise_sigma(self) -> float:
        """Standard deviation of the first state."""
        first = float(self.sigmas[0])
        return first if self.flow else math.sqrt(first**2 + 1)

    @property
    def step_index(self) -> int | None:
        return self._step_index

    @property
    def begin_index(self) -> int | None:
        return self._begin_index

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Start in the middle of the schedule (image to image)."""
        self._begin_index = begin_index

    def _range(self) -> tuple[float, float]:
        table = self._schedule.table
        low, high = FLOW_RANGE if table is None else (float(torch.exp(-table[i])) for i in (0, -1))
        return self.config.sigma_min or low, self.config.sigma_max or high

    def set_timesteps(self, num_inference_steps: int, device=None, mu: float | None = None) -> None:
        """Choose the noise levels.

        Args:
            num_inference_steps: Steps, >= 1.
            device: Device of `timesteps`.
            mu: Ignored; some pipelines pass a shift, but the spacing here is in VE noise levels.
        """
        ve = karras_levels(*self._range(), num_inference_steps, self.config.rho)
        self.timesteps = self._schedule.timestep(-torch.log(ve[:-1])).float().to(device)
        self.sigmas = ve / (1 + ve) if self.flow else ve
        self.num_inference_steps = num_inference_steps
        self._step_index = self._begin_index = self._pending = None

    def _index(self, timestep) -> int:
        if self._step_index is None:
            nearest = int((self.timesteps - torch.as_tensor(timestep).to(self.timesteps)).abs().argmin())
            self._step_index = nearest if self._begin_index is None else self._begin_index
        return self._step_index

    def scale_model_input(self, sample: torch.Tensor, timestep=None) -> torch.Tensor:
        """The network's input for the state `sample`."""
        return noise_step(self, self._index(timestep), sample, sample).model_input

    def begin_step(self, sample: torch.Tensor, timestep, generator=None) -> NoiseStep:
        """Draw the noise of the coming `step` in advance, for a guider that has to weigh it."""
        dtype = torch.promote_types(sample.dtype, torch.float32)
        noise = randn_tensor(sample.shape, generator=generator, device=sample.device, dtype=dtype)
        self._pending = noise_step(self, self._index(timestep), sample, noise)
        return self._pending

    def step(self, model_output, timestep, sample, generator=None, return_dict: bool = True):
        """One SDE step, with the noise of `begin_step` if that was called."""
        step = self._pending or self.begin_step(sample, timestep, generator)
        step = replace(step, sample=sample)
        self._pending = None
        self._step_index += 1
        prev_sample = step.moved(step.dx(step.epsilon(model_output)))
        return SchedulerOutput(prev_sample=prev_sample) if return_dict else (prev_sample,)

    def add_noise(self, original_samples: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """The state of clean samples at `timesteps` `[B]`."""
        ve = torch.exp(-self._schedule.log_snr(timesteps)).to(original_samples)
        state = original_samples + expand(ve, noise) * noise
        return state / expand(1 + ve, noise) if self.flow else state

    def __len__(self) -> int:
        return self.config.num_train_timesteps
