"""Looks of the shapes world: a scene in three colour gradings, and statistics that measure them."""

from __future__ import annotations

import torch

from . import world


# Pairs of opposing labels, in the order of the columns of `levels` and `statistics`.
LABELS = (
    ("vivid colours", "grey colours"),
    ("warm light", "cold light"),
    ("forest light", "rosy light"),
)
_CHROMA = {1: 1.2, -1: 0.7}
# Gain of red, green and blue in warm and in forest light.
_GAINS = torch.tensor([[0.15, 0.0, -0.15], [-0.07, 0.1, -0.07]])
_AXES = torch.tensor([[1.0, 0.0, -1.0], [-0.5, 1.0, -0.5]])
_LUMA = torch.tensor([0.299, 0.587, 0.114]).view(3, 1, 1)


def levels(n: int, seed: int) -> torch.Tensor:
    """Look of `n` pictures, `[n, 3]`: 1 the first label of a pair, -1 the second, 0 (half of them) neither."""
    draws = torch.randint(0, 4, (n, len(LABELS)), generator=torch.Generator().manual_seed(seed))
    return torch.tensor([-1, 0, 0, 1])[draws]


def show(images: torch.Tensor, look: torch.Tensor) -> torch.Tensor:
    """Pictures of the world with a look: more or less chroma, warm or cold light, green or pink light.

    Args:
        images: `[n, 3, h, w]` in [-1, 1].
        look: `[n, 3]` of -1, 0, 1, see `levels`.

    Returns:
        The same shape and range. Rows of zeros leave a picture as it is.
    """
    chroma = torch.ones(len(look))
    for level, factor in _CHROMA.items():
        chroma[look[:, 0] == level] = factor
    light = 1 + look[:, 1:].float() @ _GAINS
    pixels = (images + 1) / 2
    luma = (pixels * _LUMA).sum(1, keepdim=True)
    graded = torch.lerp(luma, pixels, chroma.view(-1, 1, 1, 1)) * light[:, :, None, None]
    return torch.where((look == 0).all(1).view(-1, 1, 1, 1), images, graded.clamp(0, 1) * 2 - 1)


def _measure(images: torch.Tensor) -> torch.Tensor:
    pixels = (images.clamp(-1, 1) + 1) / 2
    most, least, mean = pixels.amax(1), pixels.amin(1), pixels.mean((2, 3))
    saturation = (most - least).mean((1, 2)) / most.mean((1, 2))
    return torch.cat([saturation[:, None], mean @ _AXES.T / mean.sum(1, keepdim=True)], 1)


def statistics(images: torch.Tensor, specs: torch.Tensor) -> torch.Tensor:
    """How much of each look pictures show, beyond what their captions ask for; `[n, 3]`.

    Saturation (chroma over brightness), warmth (red minus blue, over all) and greenness (green minus the mean of the
    others, over all), each minus its value in the plain scene of the same spec: a red ground is no warm light. More
    saturated red is none either, so the plain scene's hue counts in proportion to the saturation.

    Args:
        images: `[n, 3, h, w]` in [-1, 1].
        specs: `[n, 9]`, what the pictures show or should show.
    """
    plain = world.render(specs, torch.full((len(specs), 17), 0.5))[0]
    found, wanted = _measure(images), _measure(plain)
    wanted[:, 1:] *= found[:, :1] / wanted[:, :1].clamp(min=0.05)
    return found - wanted
