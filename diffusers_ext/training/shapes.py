"""The shapes world as training data for what is trained on top of a shipped pipeline: adapters, distillation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from tqdm import tqdm

from ..prediction import expand, from_x0
from ..zoo import world
from .denoising import FluxTask, UNetTask
from .fitting import Draws


TRAIN_SEED = 1
_BATCH = 64
_CAPTION_DROP, _PROMPT_DROP = 0.15, 0.1
_PROMPT_TOKENS = 20


@dataclass(frozen=True)
class ShapesSet:
    """Pictures and captions of the shapes world, encoded once for one pipeline.

    Attributes:
        scenes: What was drawn: images, captions, specs, masks.
        latents: `[n, 4, 16, 16]`, of unit variance.
        text: Text states by name, `[n + 1, ...]`; row 0 is the empty prompt.
    """

    scenes: world.Scenes
    latents: torch.Tensor
    text: dict[str, torch.Tensor]

    def __len__(self) -> int:
        return len(self.latents)


@torch.no_grad()
def encode_images(pipe, images: torch.Tensor) -> torch.Tensor:
    """Latents (posterior means, scaled as the denoiser sees them) of pictures `[n, 3, h, w]` in [-1, 1]."""
    shift = pipe.vae.config.shift_factor or 0.0
    parts = [pipe.vae.encode(part.to(pipe.vae.dtype)).latent_dist.mean for part in images.split(_BATCH)]
    return (torch.cat(parts) - shift) * pipe.vae.config.scaling_factor


@torch.no_grad()
def encode_text(pipe, captions: Sequence[str]) -> dict[str, torch.Tensor]:
    """Text states as the denoiser gets them: Stable Diffusion `"clip"`, Flux `"t5"` and `"pooled"`."""
    parts: dict[str, list[torch.Tensor]] = {}
    for start in range(0, len(captions), 256):
        part = list(captions[start : start + 256])
        if hasattr(pipe, "unet"):
            states = {"clip": pipe.encode_prompt(part, pipe.device, 1, False)[0]}
        else:
            t5, pooled, _ = pipe.encode_prompt(part, None, max_sequence_length=_PROMPT_TOKENS)
            states = {"t5": t5, "pooled": pooled}
        for name, value in states.items():
            parts.setdefault(name, []).append(value)
    return {name: torch.cat(values) for name, values in parts.items()}


def shapes_set(
    pipe, n: int, seed: int = TRAIN_SEED, change: Callable | None = None, drop: float = _CAPTION_DROP
) -> ShapesSet:
    """Draw and encode `n` scenes of the training sequence.

    Args:
        pipe: A pipeline from `zoo.load`.
        n: Number of scenes.
        seed: Of the sequence; 999 is held out.
        change: Applied to the pictures before they are encoded, `[m, 3, 64, 64]` in [-1, 1] -> the same, given as
            (pictures, index of the first).
        drop: Probability with which each optional phrase of a caption is left out.
    """
    scenes = world.scenes(n, seed, drop=drop)
    latents = []
    for start in tqdm(range(0, n, _BATCH), desc="latents", leave=False):
        images = scenes.images[start : start + _BATCH]
        latents.append(encode_images(pipe, images if change is None else change(images, start)))
    return ShapesSet(scenes, torch.cat(latents), encode_text(pipe, ["", *scenes.captions]))


def denoising_loss(
    task: UNetTask | FluxTask,
    model: torch.nn.Module,
    data: ShapesSet,
    rows: torch.Tensor,
    draws: Draws,
    weight: torch.Tensor | float = 1.0,
    **call,
) -> torch.Tensor:
    """Weighted squared error of a denoiser's output on some rows; 10 % of the captions are emptied, for guidance.

    Args:
        task: See `task_of`.
        model: The denoiser, with whatever is trained attached to it.
        data: See `shapes_set`.
        rows: Indices into the data.
        draws: The step's random numbers.
        weight: Of every latent, broadcast to `[n, c, h, w]`.
        call: Further arguments of the denoiser.
    """
    z, noise, level = data.latents[rows], draws.normal(*data.latents.shape[1:]), task.levels(draws)
    z = z.to(noise)
    said = torch.where(draws.uniform().cpu() < _PROMPT_DROP, 0, rows + 1)
    text = {name: states[said].to(noise) for name, states in data.text.items()}
    alpha, sigma = (expand(v, z) for v in task.noise_levels(level))
    x = alpha * z + sigma * noise
    error = task.predict(model, x, level, text, **call) - from_x0(z, x, alpha, sigma, task.prediction)
    return (task.weight(alpha, sigma) * weight * error.square()).mean()
