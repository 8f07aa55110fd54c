"""Condition pictures of the shapes world (edges, depth, subjects, ...), and how well two edge maps agree."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from . import world
from .world import Scenes


def edges(images: torch.Tensor, low: int = 60, high: int = 120) -> torch.Tensor:
    """Canny edges of pictures, by OpenCV.

    Args:
        images: `[n, 3, h, w]` in [-1, 1].
        low, high: Canny's two thresholds, of 255.

    Returns:
        `[n, 1, h, w]` float32, 1 on edges and 0 elsewhere.

    Raises:
        ImportError: OpenCV is not installed.
    """
    try:
        import cv2
    except ImportError as error:
        raise ImportError("edges() needs OpenCV: pip install 'diffusers-ext[conditions]'") from error
    pictures = ((images.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).cpu().contiguous().numpy()
    found = [torch.from_numpy(cv2.Canny(picture, low, high)) for picture in pictures]
    return torch.stack(found)[:, None].float() / 255


def depth(scenes: Scenes) -> torch.Tensor:
    """Nearness `[n, 1, 64, 64]` in [0, 1], see `Scenes.depth`."""
    return scenes.depth


def segmentation(scenes: Scenes) -> torch.Tensor:
    """Colour-coded masks `[n, 3, 64, 64]` in [0, 1]: object 1 red, object 2 green, ground black."""
    return F.pad(scenes.masks, (0, 0, 0, 0, 0, 1))


def outlines(scenes: Scenes, width: int = 1) -> torch.Tensor:
    """Edges of the objects alone, without the ground's texture; `[n, 1, 64, 64]` of zeros and ones.

    Args:
        scenes: Of `zoo.scenes` or `zoo.held_out`.
        width: Pixels that every line is widened by on both sides; thin lines do not survive a VAE.
    """
    return _near(edges(segmentation(scenes) * 2 - 1), width)


def subjects(specs: torch.Tensor, seed: int = 0) -> torch.Tensor:
    """Pictures of the first objects by themselves, small, on mid grey: their shape and colour, not their place.

    Args:
        specs: `[n, 9]`, see `world.ATTRIBUTES`.
        seed: Of radius, tint and place in the picture, which are not those of the scenes.

    Returns:
        `[n, 3, 32, 32]` in [-1, 1].
    """
    shape, colour = specs[:, 3], specs[:, 4]
    # One small object in the center, on a ground of its own colour: edges have no other one mixed in.
    absent = torch.tensor([len(world.SHAPES), len(world.COLOURS), len(world.SIZES)]).expand(len(specs), 3)
    none = torch.zeros_like(shape)
    alone = torch.cat([torch.stack([colour, none, none, shape, colour, none], 1), absent], 1)
    draws = torch.rand(len(specs), 17, generator=torch.Generator().manual_seed(seed))
    images, masks = world.render(alone, draws)
    return (images * masks[:, :1])[..., 16:48, 16:48]


def colourless(captions: Sequence[str], specs: torch.Tensor) -> list[str]:
    """Captions without the colour of the first object: it has to come from elsewhere, such as from `subjects`."""
    nouns = [(list(world.COLOURS)[c], list(world.SHAPES)[s]) for s, c in specs[:, 3:5].tolist()]
    return [
        caption.replace(f"{colour} {shape}", shape, 1)
        for caption, (colour, shape) in zip(captions, nouns, strict=True)
    ]


def _near(edge_map: torch.Tensor, tolerance: int) -> torch.Tensor:
    """Everything within `tolerance` pixels of an edge."""
    return F.max_pool2d(edge_map, 2 * tolerance + 1, stride=1, padding=tolerance)


def edge_f1(found: torch.Tensor, wanted: torch.Tensor, tolerance: int = 1) -> torch.Tensor:
    """Harmonic mean of precision and recall of edge pixels, per picture.

    Args:
        found, wanted: Edge maps `[n, 1, h, w]` of zeros and ones.
        tolerance: A pixel counts if the other map has an edge at most so many pixels away (in both axes).

    Returns:
        `[n]` in [0, 1]; 0 for a map without edges.
    """
    total = (1, 2, 3)
    precision = (found * _near(wanted, tolerance)).sum(total) / found.sum(total).clamp(min=1)
    recall = (wanted * _near(found, tolerance)).sum(total) / wanted.sum(total).clamp(min=1)
    return 2 * precision * recall / (precision + recall).clamp(min=1e-12)


def edge_iou(found: torch.Tensor, wanted: torch.Tensor, tolerance: int = 1) -> torch.Tensor:
    """Intersection over union of edge maps that were widened by `tolerance` pixels; `[n]` in [0, 1]."""
    found, wanted = _near(found, tolerance), _near(wanted, tolerance)
    total = (1, 2, 3)
    return torch.minimum(found, wanted).sum(total) / torch.maximum(found, wanted).sum(total).clamp(min=1)
