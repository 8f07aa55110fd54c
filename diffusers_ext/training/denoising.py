"""What the training of a denoiser consists of: noise levels, loss weights and the call, for UNets and for Flux."""

from __future__ import annotations

import torch
from torch import nn

from .._flux_tokens import image_ids, pack, unpack
from .fitting import Draws


def alphas_and_sigmas(scheduler) -> tuple[torch.Tensor, torch.Tensor]:
    """Signal and noise level of every training timestep of a diffusion (not flow) scheduler."""
    return scheduler.alphas_cumprod.sqrt(), (1 - scheduler.alphas_cumprod).sqrt()


class UNetTask:
    """Noise levels, loss weights and calls of a Stable Diffusion UNet.

    The error of the clean latents is weighted by min(snr + 1, 6), whatever is predicted: v and epsilon models learn
    the same thing and differ in parametrisation only.

    Args:
        scheduler: With `alphas_cumprod` and `prediction_type` "epsilon" or "v_prediction".
        mean_weight: Weight of the squared mean error of every channel, for pictures with flat areas.
        noise_offset: Standard deviation of a random mean that is added to the noise.
    """

    def __init__(self, scheduler, mean_weight: float = 0.0, noise_offset: float = 0.0):
        self.prediction = scheduler.config.prediction_type
        self.mean_weight, self.noise_offset = mean_weight, noise_offset
        self.alpha, self.sigma = alphas_and_sigmas(scheduler)

    def levels(self, draws: Draws) -> torch.Tensor:
        """Timesteps of 1000; 55 % of them in [100, 550), where shapes are decided."""
        u, v = draws.uniform(2).unbind(1)
        return torch.where(u < 0.55, 100 + 450 * v, 1000 * v).long()

    def noise_levels(self, t: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Signal and noise level of timesteps."""
        return self.alpha.to(t.device)[t], self.sigma.to(t.device)[t]

    def weight(self, alpha: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        """Loss weight of the model's output."""
        snr = (alpha / sigma) ** 2
        # Error of x0 per error of the output, squared.
        gain = sigma**2 if self.prediction == "v_prediction" else 1 / snr
        return (snr + 1).clamp(max=6) * gain

    @staticmethod
    def predict(
        model: nn.Module, x: torch.Tensor, t: torch.Tensor, text: dict[str, torch.Tensor], **call
    ) -> torch.Tensor:
        """Output for noisy latents `x [n, c, h, w]`, timesteps `t [n]`, `text["clip"] [n, tokens, width]`."""
        return model(x.contiguous(memory_format=torch.channels_last), t, text["clip"], **call).sample


class FluxTask:
    """Noise levels, loss weights and calls of a Flux transformer: rectified flow, x = (1 - s) x0 + s noise."""

    prediction = "flow_prediction"
    mean_weight = noise_offset = 0.0

    def levels(self, draws: Draws) -> torch.Tensor:
        """Noise levels s: 70 % logit-normal, 30 % uniform."""
        u, v = draws.uniform(2).unbind(1)
        return torch.where(u < 0.7, torch.sigmoid(draws.normal()), v).clamp(0.004, 0.996)

    def noise_levels(self, s: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Signal and noise level."""
        return 1 - s, s

    def weight(self, alpha: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        """Loss weight of the model's output: 1."""
        return torch.ones_like(sigma)

    @staticmethod
    def predict(
        model: nn.Module, x: torch.Tensor, s: torch.Tensor, text: dict[str, torch.Tensor], **call
    ) -> torch.Tensor:
        """Output for noisy latents `x [n, c, h, w]`, levels `s [n]`, `text["t5"]` and `text["pooled"]`."""
        height, width = x.shape[-2:]
        output = model(
            hidden_states=pack(x),
            timestep=s,
            pooled_projections=text["pooled"],
            encoder_hidden_states=text["t5"],
            img_ids=image_ids(height, width, x.device).to(x.dtype),
            txt_ids=torch.zeros(text["t5"].shape[1], 3, device=x.device),
            **call,
        ).sample
        return unpack(output, height, width)


def task_of(pipe) -> UNetTask | FluxTask:
    """The task that the denoiser of a Stable Diffusion or Flux pipeline was trained for."""
    return UNetTask(pipe.scheduler) if hasattr(pipe, "unet") else FluxTask()
