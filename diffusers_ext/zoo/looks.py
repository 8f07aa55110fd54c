"""Looks of the shapes world: three ways in which the same scene can be shown, and statistics that measure them."""

from __future__ import annotations

import torch

from . import world


# Pairs of opposing labels, in the order of the columns of `levels` and `statistics`.
LABELS = (
    ("vivid colours", "grey colours"),
    ("warm light", "cold light"),
    ("bright centre", "bright edges"),
)
_CHROMA = {1: 1.2, -1: 0.7}
_WARMTH, _CURVE = 0.15, 0.35
_LUMA = torch.tensor([0.299, 0.587, 0.114]).view(3, 1, 1)


def _distance(size: int) -> torch.Tensor:
    """Squared distance from the middle, `[size, size]`, mean 0; 1 is half the picture."""
    at = (torch.arange(size) + 0.5) / size * 2 - 1
    distance = at[:, None] ** 2 + at[None] ** 2
    return distance - distance.mean()


def levels(n: int, seed: int) -> torch.Tensor:
    """Look of `n` pictures, `[n, 3]`: 1 the first label of a pair, -1 the second, 0 (half of them) neither."""
    draws = torch.randint(0, 4, (n, len(LABELS)), generator=torch.Generator().manual_seed(seed))
    return torch.tensor([-1, 0, 0, 1])[draws]


def show(images: torch.Tensor, look: torch.Tensor) -> torch.Tensor:
    """Pictures of the world with a look: more or less chroma, warm or cold light, brighter centre or edges.

    Args:
        images: `[n, 3, h, h]` in [-1, 1].
        look: `[n, 3]` of -1, 0, 1, see `levels`.

    Returns:
        The same shape and range. Rows of zeros leave a picture as it is.
    """
    chroma = torch.ones(len(look))
    for level, factor in _CHROMA.items():
        chroma[look[:, 0] == level] = factor
    warm, centre = (look[:, i].float().view(-1, 1, 1, 1) for i in (1, 2))
    pixels = (images + 1) / 2
    luma = (pixels * _LUMA).sum(1, keepdim=True)
    pixels = torch.lerp(luma, pixels, chroma.view(-1, 1, 1, 1))
    light = 1 + _WARMTH * warm * torch.tensor([1.0, 0.0, -1.0]).view(3, 1, 1)
    lit = pixels * light * (1 - _CURVE * centre * _distance(images.shape[-1]))
    return torch.where((look == 0).all(1).view(-1, 1, 1, 1), images, lit.clamp(0, 1) * 2 - 1)


def _measure(images: torch.Tensor) -> torch.Tensor:
    distance = _distance(images.shape[-1])
    pixels = (images.clamp(-1, 1) + 1) / 2
    most, least, luma = pixels.amax(1), pixels.amin(1), (pixels * _LUMA).sum(1)
    red, green, blue = pixels.mean((2, 3)).unbind(1)
    saturation = (most - least).mean((1, 2)) / most.mean((1, 2))
    warmth = (red - blue) / (red + green + blue)
    fall = -(luma * distance).mean((1, 2)) / distance.square().mean() / luma.mean((1, 2))
    return torch.stack([saturation, warmth, fall], 1)


def statistics(images: torch.Tensor, specs: torch.Tensor) -> torch.Tensor:
    """How much of each look pictures show, beyond what their captions ask for; `[n, 3]`.

    Saturation (chroma over brightness), warmth (red minus blue, over all) and fall of brightness towards the edges
    (over the mean brightness), each minus its value in the plain scene of the same spec: a red ground is no warm light.
    More saturated red is none either, so the plain scene's warmth counts in proportion to the saturation.

    Args:
        images: `[n, 3, 64, 64]` in [-1, 1].
        specs: `[n, 9]`, what the pictures show or should show.
    """
    plain = world.render(specs, torch.full((len(specs), 17), 0.5))[0]
    found, wanted = _measure(images), _measure(plain)
    wanted[:, 1] *= found[:, 0] / wanted[:, 0].clamp(min=0.05)
    return found - wanted
