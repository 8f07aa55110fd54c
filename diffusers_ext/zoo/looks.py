"""Looks of the shapes world: a scene graded in three ways that keep its colours' names, and statistics of them."""

from __future__ import annotations

import torch

from . import world


# Pairs of opposing labels, in the order of the columns of `levels` and `statistics`.
LABELS = (
    ("vivid colours", "grey colours"),
    ("warm light", "cold light"),
    ("bright light", "dim light"),
)
_CHROMA = 0.1
# What warm and bright light add to red, green and blue. The first leaves brightness as it is, the second chroma.
_LIGHT = torch.tensor([[0.025, -0.0079, -0.025], [0.03, 0.03, 0.03]])
_LUMA = torch.tensor([0.299, 0.587, 0.114]).view(3, 1, 1)


def levels(n: int, seed: int) -> torch.Tensor:
    """Look of `n` pictures, `[n, 3]`: 1 the first label of a pair, -1 the second, 0 (half of them) neither."""
    draws = torch.randint(0, 4, (n, len(LABELS)), generator=torch.Generator().manual_seed(seed))
    return torch.tensor([-1, 0, 0, 1])[draws]


def show(images: torch.Tensor, look: torch.Tensor) -> torch.Tensor:
    """Pictures of the world with a look: more or less chroma, warm or cold light, more or less light.

    Args:
        images: `[n, 3, h, w]` in [-1, 1].
        look: `[n, 3]` of -1, 0, 1, see `levels`; numbers in between are weaker looks.

    Returns:
        The same shape and range. Rows of zeros leave a picture as it is.
    """
    look = look.float()
    pixels = (images + 1) / 2
    luma = (pixels * _LUMA).sum(1, keepdim=True)
    chroma = 1 + _CHROMA * look[:, :1, None, None]
    graded = torch.lerp(luma, pixels, chroma) + (look[:, 1:] @ _LIGHT)[:, :, None, None]
    return torch.where((look == 0).all(1).view(-1, 1, 1, 1), images, graded.clamp(0, 1) * 2 - 1)


def _measure(images: torch.Tensor) -> torch.Tensor:
    pixels = (images.clamp(-1, 1) + 1) / 2
    opponents = torch.stack([pixels[:, 0] - pixels[:, 2], pixels[:, 1] - pixels[:, [0, 2]].mean(1)], 1)
    contrast = opponents.var((2, 3)).sum(1).sqrt()
    return torch.stack([contrast, opponents[:, 0].mean((1, 2)), (pixels * _LUMA).sum(1).mean((1, 2))], 1)


def statistics(images: torch.Tensor, specs: torch.Tensor) -> torch.Tensor:
    """How much of each look pictures show, beyond what their captions ask for; `[n, 3]`.

    Colour contrast (spread over the picture of red minus blue, and of green minus both), warmth (mean of red minus
    blue) and brightness (mean luma), each minus its value in the plain scene of the same spec: a red ground is no warm
    light. Nor is more saturated red, so the plain scene's warmth counts in proportion to the contrast. Chroma itself
    would be no measure of the first look: warm light adds some to red and takes some from blue.

    Args:
        images: `[n, 3, h, w]` in [-1, 1].
        specs: `[n, 9]`, what the pictures show or should show.
    """
    plain = world.render(specs, torch.full((len(specs), 17), 0.5))[0]
    found, wanted = _measure(images), _measure(plain)
    wanted[:, 1] *= (found[:, 0] / wanted[:, 0].clamp(min=0.05)).clamp(0.5, 1.5)
    return found - wanted
