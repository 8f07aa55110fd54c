"""Latents of a pipeline: starting noise, from pictures, and back; Stable Diffusion and Flux layouts."""

from __future__ import annotations

import torch


def _is_flux(pipe) -> bool:
    return not hasattr(pipe, "unet")


def _channels(pipe) -> int:
    return pipe.transformer.config.in_channels // 4 if _is_flux(pipe) else pipe.unet.config.in_channels


def _dtype(pipe) -> torch.dtype:
    return (pipe.transformer if _is_flux(pipe) else pipe.unet).dtype


def starting_noise(pipe, count: int, height: int | None, width: int | None, generator=None):
    """Noise as the denoiser takes it, and the size `(height, width)` in pixels of its pictures."""
    side = pipe.default_sample_size if _is_flux(pipe) else pipe.unet.config.sample_size
    height, width = height or side * pipe.vae_scale_factor, width or side * pipe.vae_scale_factor
    latents = pipe.prepare_latents(count, _channels(pipe), height, width, _dtype(pipe), pipe.device, generator)
    return (latents[0] if _is_flux(pipe) else latents), (height, width)


def encode(pipe, images):
    """Latents of pictures (PIL, or tensor `[batch, 3, h, w]` in [-1, 1]) and their size `(height, width)`."""
    pixels = images if isinstance(images, torch.Tensor) else pipe.image_processor.preprocess(images)
    config, size = pipe.vae.config, tuple(pixels.shape[-2:])
    latents = pipe.vae.encode(pixels.to(pipe.device, pipe.vae.dtype)).latent_dist.mode()
    latents = (latents - (config.get("shift_factor") or 0.0)) * config.scaling_factor
    if _is_flux(pipe):
        latents = pipe._pack_latents(latents, *latents.shape)
    return latents.to(_dtype(pipe)), size


def decode(pipe, latents: torch.Tensor, size: tuple[int, int]) -> list:
    """PIL pictures of latents."""
    config = pipe.vae.config
    if _is_flux(pipe):
        latents = pipe._unpack_latents(latents, *size, pipe.vae_scale_factor)
    latents = latents / config.scaling_factor + (config.get("shift_factor") or 0.0)
    return pipe.image_processor.postprocess(pipe.vae.decode(latents, return_dict=False)[0])
