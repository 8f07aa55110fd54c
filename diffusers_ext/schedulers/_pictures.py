"""Latents of a pipeline: starting noise, from pictures, and back; Stable Diffusion and Flux layouts."""

from __future__ import annotations

from pathlib import Path

import torch


def _is_flux(pipe) -> bool:
    return not hasattr(pipe, "unet")


def _channels(pipe) -> int:
    return pipe.transformer.config.in_channels // 4 if _is_flux(pipe) else pipe.unet.config.in_channels


def _dtype(pipe) -> torch.dtype:
    return (pipe.transformer if _is_flux(pipe) else pipe.unet).dtype


def latent_shape(pipe, size: int | None = None) -> tuple[int, ...]:
    """Shape of one latent as the denoiser takes it, for square pictures of `size` pixels (default the pipeline's)."""
    default = pipe.default_sample_size if _is_flux(pipe) else pipe.unet.config.sample_size
    side = default if size is None else size // pipe.vae_scale_factor
    return ((side // 2) ** 2, 4 * _channels(pipe)) if _is_flux(pipe) else (_channels(pipe), side, side)


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


def read_captioned(pipe, folder: str | Path, size: int | None = None, limit: int | None = None):
    """Pictures `[n, 3, size, size]` in [-1, 1] and captions of a folder, cropped to squares a pipeline takes.

    Args:
        pipe: Stable Diffusion or Flux layout.
        folder: Pictures (png, jpg, webp), each with its caption in a text file of the same name: `cat.jpg`, `cat.txt`.
        size: Side in pixels; default that of the pipeline's own pictures.
        limit: At most so many, in the order of their names.

    Raises:
        ValueError: No pictures there, or one without a caption.
    """
    from PIL import Image

    paths = [p for p in sorted(Path(folder).glob("*")) if p.suffix.lower() in (".png", ".jpg", ".jpeg", ".webp")]
    bare = [p.name for p in paths[:limit] if not p.with_suffix(".txt").is_file()]
    if bare or not paths:
        problem = f"{bare[0]} has no caption" if bare else f"there are no pictures in {folder}"
        raise ValueError(f"{problem}: give png, jpg or webp files, each with a text file of the same name")
    side = (
        size or (pipe.default_sample_size if _is_flux(pipe) else pipe.unet.config.sample_size) * pipe.vae_scale_factor
    )
    images = []
    for path in paths[:limit]:
        with Image.open(path) as picture:
            images.append(picture.convert("RGB"))
    pixels = [pipe.image_processor.preprocess(i, side, side, resize_mode="crop") for i in images]
    return torch.cat(pixels), [p.with_suffix(".txt").read_text(encoding="utf-8").strip() for p in paths[:limit]]
