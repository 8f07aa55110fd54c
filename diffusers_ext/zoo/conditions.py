"""Condition pictures of the shapes world (edges, depth, segmentation), and how well two edge maps agree."""

from __future__ import annotations

import torch
import torch.nn.functional as F

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
