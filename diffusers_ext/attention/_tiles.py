"""Tiles whose grid moves from step to step: where they lie, how their outputs are merged. For every framework."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch


Size = tuple[int, int]
Mode = Literal["random", "positive", "complete", "fixed"]
MODES: tuple[str, ...] = ("random", "positive", "complete", "fixed")
# Below this number of steps the output of the step before is too old to stand in for a missing one.
FEW_STEPS = 8
_VARIANCE = 0.01


def gaussian_window(size: Size, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Weights `[h, w]` of a tile, largest in its middle: exp(-u^2 / 2 v) on each axis, u in tile widths, v = 0.01."""
    axes = [(torch.arange(n, dtype=torch.float64) - (n - 1) / 2) / n for n in size]
    y, x = ((-(u**2) / (2 * _VARIANCE)).exp() for u in axes)
    return (y[:, None] * x[None, :]).to(dtype)


@dataclass(frozen=True)
class Offsets:
    """Where the grid of tiles begins at each step.

    Args:
        mode: `"random"`: anew at every step, from 0 up to below `overlap`, but (0, 0) first and at every `reset`-th;
            `"positive"`, `"complete"`: all pairs of multiples of `stride` from 0 (from -`tile`) up to below `tile` in
            turn; `"fixed"`: always (0, 0), plain tiling.
        tile: Side of a tile.
        stride, overlap, reset: See `mode`.
        seed: Of the random offsets.
        covering: At every `reset`-th step the grid moves too, and further tiles cover what it leaves.
    """

    mode: str
    tile: int
    stride: int
    overlap: int
    reset: int | None
    seed: int
    covering: bool = False

    def is_reset(self, step: int) -> bool:
        """Is this one of the steps at which tiles cover all of the picture?"""
        return self.mode == "random" and self.reset is not None and step % self.reset == 0

    def at(self, step: int) -> Size:
        """(y, x) at this step, counted from 0."""
        if self.mode == "random":
            still = step == 0 or (self.is_reset(step) and not self.covering)
            return (0, 0) if still else self._drawn(step)
        if self.mode == "fixed":
            return 0, 0
        places = range(0 if self.mode == "positive" else -self.tile, self.tile, self.stride)
        row, column = divmod(step % len(places) ** 2, len(places))
        return places[row], places[column]

    def _drawn(self, step: int) -> Size:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + step)
        y, x = torch.randint(self.overlap, (2,), generator=generator).tolist()
        return y, x


def origins(length: int, tile: int, offset: int, cover: bool) -> list[int]:
    """Where tiles begin on an axis, each once. Tiles at the border are moved inside, not shortened.

    Args:
        length: Of the axis.
        tile: Side of a tile, at most `length`.
        offset: Of the grid.
        cover: Add tiles where the moved grid leaves a strip.
    """
    count = -(-length // tile)
    found = {min(max(i * tile + offset, 0), length - tile) for i in range(count)}
    return sorted(found | ({0, length - tile} if cover else set()))


def boxes(size: Size, tile: Size, offset: Size, cover: bool) -> list[Size]:
    """(y, x) of the upper left corner of every tile, row by row."""
    rows, columns = (origins(*axis, cover) for axis in zip(size, tile, offset))
    return [(y, x) for y in rows for x in columns]


def cut(x: torch.Tensor, corners: Sequence[Size], size: Size, tile: Size) -> torch.Tensor:
    """Tiles of a spatial tensor, one whole batch after the other.

    Args:
        x: `[b, c, h, w]` in the size of the latents, or smaller by powers of two, as residuals are.
        corners: Of the tiles, in latents.
        size: Of the latents.
        tile: Size of a tile in latents.
    """
    by = max(round(size[0] / x.shape[-2]), 1)
    th, tw = -(-tile[0] // by), -(-tile[1] // by)
    parts = []
    for y, left in corners:
        top, side = min(round(y / by), x.shape[-2] - th), min(round(left / by), x.shape[-1] - tw)
        parts.append(x[..., top : top + th, side : side + tw])
    return torch.cat(parts)


def merge(
    predict: Callable[[Sequence[Size]], torch.Tensor],
    size: Size,
    corners: Sequence[Size],
    window: torch.Tensor,
    batch: int,
    reference: torch.Tensor | None = None,
    ema: float = 0.0,
) -> torch.Tensor:
    """The output for the whole canvas: the weighted mean of the tiles, and the reference where there is none.

    Args:
        predict: Corners of tiles -> their outputs, one whole batch after the other.
        size: Of the canvas.
        corners: Of all tiles.
        window: Weights of a tile, `[tile h, tile w]`.
        batch: Tiles per call of `predict`.
        reference: Output of the step before. Without one the tiles must cover the canvas.
        ema: m in m * reference + (1 - m) * output.
    """
    tile, total, weights = window.shape, None, None
    for start in range(0, len(corners), batch):
        chunk = corners[start : start + batch]
        outputs = predict(chunk)
        if total is None:
            exact = torch.promote_types(outputs.dtype, torch.float32)
            shape = (outputs.shape[0] // len(chunk), outputs.shape[1], *size)
            total, weights = outputs.new_zeros(shape, dtype=exact), outputs.new_zeros(size, dtype=exact)
            window = window.to(total)
        for (y, x), output in zip(chunk, outputs.chunk(len(chunk))):
            total[..., y : y + tile[0], x : x + tile[1]] += output * window
            weights[y : y + tile[0], x : x + tile[1]] += window
    merged = total / weights.clamp(min=torch.finfo(weights.dtype).tiny)
    if reference is not None:
        before = reference.to(merged)
        merged = torch.where(weights > 0, torch.lerp(merged, before, ema), before)
    return merged.to(outputs.dtype)


def uncovered(size: Size, tile: Size, corners: Sequence[Size]) -> int:
    """Number of pixels in no tile."""
    covered = torch.zeros(size, dtype=torch.bool)
    for y, x in corners:
        covered[y : y + tile[0], x : x + tile[1]] = True
    return int((~covered).sum())


def overlapping_tiles(size: Size, tile: Size) -> int:
    """Tiles of ordinary tiling, in which neighbours share half of their width."""
    rows, columns = (-(-2 * (length - side) // side) + 1 for length, side in zip(size, tile))
    return rows * columns


def seam_ratio(images: torch.Tensor, tile: int) -> float:
    """Mean step between neighbouring pixels across borders of tiles over that elsewhere: 1 without seams.

    Args:
        images: `[n, c, h, w]`.
        tile: Side of a tile in pixels; borders are its multiples.
    """
    across, elsewhere = [], []
    for x in (images.double(), images.double().mT):
        steps = (x[..., 1:, :] - x[..., :-1, :]).abs().mean((0, 1, 3))
        border = (torch.arange(1, len(steps) + 1) % tile) == 0
        across.append(steps[border])
        elsewhere.append(steps[~border])
    return (torch.cat(across).mean() / torch.cat(elsewhere).mean()).item()
