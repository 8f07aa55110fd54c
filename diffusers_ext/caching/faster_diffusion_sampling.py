"""Faster Diffusion's own sampling loop, and its re-injection of the initial noise; see `faster_diffusion`."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.callbacks import PipelineCallback

from ..apply import apply
from .faster_diffusion import FasterDiffusionConfig, following_times, place_of


__all__ = ["FasterDiffusionCallback", "faster_diffusion_denoise"]


def injected(x: torch.Tensor, x_T: torch.Tensor, noise_injection: float, time: float, start: float) -> torch.Tensor:
    """x + a x_T in the late part of a run, where `time`, t / T_train or a flow's sigma, is below `start`."""
    return x + noise_injection * x_T.to(x) if noise_injection and time < start else x


def initial_noise(scheduler: Any, latents: torch.Tensor, step: int) -> torch.Tensor:
    """x_T in the units of the latents at a step: Euler and its like keep x multiplied by (1 + sigma^2)^(1/2)."""
    if float(scheduler.init_noise_sigma) == 1:
        return latents
    ratio = (1 + float(scheduler.sigmas[step]) ** 2) / (1 + float(scheduler.sigmas[0]) ** 2)
    return latents * float(scheduler.init_noise_sigma) * ratio**0.5


class FasterDiffusionCallback(PipelineCallback):
    """Adds a little of the initial noise to the latents in the late part of a run, which brings back texture.

    Args:
        latents: The initial latents that are given to the pipeline too, [b, c, h, w], standard normal.
        noise_injection: a, default 0.003; 0 does nothing.
        injection_start: Share of the training timesteps below which it happens, in (0, 1], default 0.5.

    Raises:
        ValueError: Values out of range.

    Example:
        >>> import torch
        >>> from diffusers_ext import FasterDiffusionCallback, zoo
        >>> pipe, noise = zoo.load("shapes-unet"), torch.randn(1, 4, 16, 16)
        >>> callback = FasterDiffusionCallback(noise)
        >>> image = pipe("a red circle", latents=noise, callback_on_step_end=callback, num_inference_steps=4).images[0]
    """

    def __init__(self, latents: torch.Tensor, noise_injection: float = 0.003, injection_start: float = 0.5):
        super().__init__(cutoff_step_index=None, cutoff_step_ratio=1.0)
        _require_injection(noise_injection, injection_start)
        self.latents, self.noise_injection, self.injection_start = latents, noise_injection, injection_start

    @property
    def tensor_inputs(self) -> list[str]:
        return ["latents"]

    def callback_fn(self, pipeline: Any, step_index: int, timestep: Any, callback_kwargs: dict) -> dict:
        scheduler = pipeline.scheduler
        following = following_times(pipeline, float(timestep), 2)
        if len(following) == 2:
            time = float(following[1]) / scheduler.config.num_train_timesteps
            x_T = initial_noise(scheduler, self.latents, place_of(pipeline, float(following[1])))
            x = callback_kwargs["latents"]
            callback_kwargs["latents"] = injected(x, x_T, self.noise_injection, time, self.injection_start)
        return callback_kwargs


def _require_injection(noise_injection: float, injection_start: float) -> None:
    if noise_injection < 0 or not 0 < injection_start <= 1:
        raise ValueError(
            f"noise_injection is {noise_injection}, injection_start {injection_start}; accepted: from 0, and (0, 1]"
        )


@torch.no_grad()
def faster_diffusion_denoise(
    pipe: Any,
    latents: torch.Tensor,
    prompt_embeds: torch.Tensor,
    negative_prompt_embeds: torch.Tensor | None = None,
    config: FasterDiffusionConfig | None = None,
    num_inference_steps: int = 50,
    guidance_scale: float = 7.5,
    noise_injection: float = 0.003,
    injection_start: float = 0.5,
    injection_point: str = "official",
    **unet_kwargs: Any,
) -> torch.Tensor:
    """Sample latents in the paper's own loop, with several decoder steps in one batch.

    Args:
        pipe: Pipeline with `unet` and a scheduler of one call per step.
        latents: Standard normal noise [b, c, h, w].
        prompt_embeds: [b, n, d].
        negative_prompt_embeds: [b, n, d]; None leaves guidance out.
        config: Default `FasterDiffusionConfig(max_parallel=8)`.
        num_inference_steps: T.
        guidance_scale: Weight of the prompt.
        noise_injection: a; 0 adds no noise.
        injection_start: Share of the training timesteps below which noise is added.
        injection_point: `"model"`: before the model is called, `"step"`: only before the scheduler's step,
            `"official"`: as the published loops do, `"step"` if decoding in parallel and `"model"` if not.
        unet_kwargs: Further inputs of the UNet for the guided batch, e.g. `added_cond_kwargs`.

    Returns:
        Denoised latents [b, c, h, w].

    Raises:
        ValueError: Values out of range, or what `FasterDiffusionConfig` refuses.
    """
    config = config or FasterDiffusionConfig(max_parallel=8)
    _require_injection(noise_injection, injection_start)
    if injection_point not in ("model", "step", "official"):
        raise ValueError(f"injection_point is {injection_point!r}; accepted: 'model', 'step', 'official'")
    before_model = injection_point == "model" or (injection_point == "official" and config.max_parallel == 1)
    guided = negative_prompt_embeds is not None
    text = torch.cat([negative_prompt_embeds, prompt_embeds]) if guided else prompt_embeds
    scheduler = pipe.scheduler
    scheduler.set_timesteps(num_inference_steps, device=latents.device)
    x = latents * scheduler.init_noise_sigma
    with apply(pipe, config):
        for step, t in enumerate(scheduler.timesteps):
            time, x_T = float(t) / scheduler.config.num_train_timesteps, initial_noise(scheduler, latents, step)
            noisy = injected(x, x_T, noise_injection, time, injection_start)
            seen = scheduler.scale_model_input(noisy if before_model else x, t)
            seen = torch.cat([seen, seen]) if guided else seen
            eps = pipe.unet(seen, t, encoder_hidden_states=text, return_dict=False, **unet_kwargs)[0]
            if guided:
                uncond, cond = eps.chunk(2)
                eps = uncond + guidance_scale * (cond - uncond)
            x = scheduler.step(eps, t, noisy, return_dict=False)[0]
    return x
