"""Maths of HiDiffusion that diffusers and ComfyUI share: windows, the coarse downsampler, when each part acts."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn


Size = tuple[int, int]
Steps = tuple[int, int]
_NEVER: Steps = (0, 0)
# Of the 50 steps of the official setting the downsampler is coarse in the first 8, in the aggressive form.
_AGGRESSIVE_SHARE = 8 / 50
_FEW_STEPS = 8


def window_of(size: Size, grid: int) -> Size:
    """Sides of a window when `grid` x `grid` of them cover a feature map of this size."""
    return math.ceil(size[0] / grid), math.ceil(size[1] / grid)


def window_shift(window: Size, quarters: int) -> Size:
    """Shift of the windows, in tokens: 0, 1, 2 or 3 times the whole quarter of a window's side."""
    return window[0] // 4 * quarters, window[1] // 4 * quarters


def to_windows(x: torch.Tensor, size: Size, grid: int, quarters: int) -> torch.Tensor:
    """Tokens of a feature map -> tokens of its shifted windows.

    Args:
        x: `[b, h * w, c]`.
        size: (h, w). Where `grid` does not divide it, the map is stretched to the next size that it does.
        grid: Windows on each axis.
        quarters: See `window_shift`.

    Returns:
        `[b * grid * grid, tokens of a window, c]`; the windows of one picture follow one another.
    """
    window = window_of(size, grid)
    x = _stretched(x, size, (grid * window[0], grid * window[1]))
    shift = window_shift(window, quarters)
    x = x.unflatten(1, (grid * window[0], grid * window[1]))
    x = x.roll((-shift[0], -shift[1]), (1, 2))
    x = x.unflatten(2, (grid, window[1])).unflatten(1, (grid, window[0]))
    return x.transpose(2, 3).flatten(3, 4).flatten(0, 2)


def from_windows(x: torch.Tensor, size: Size, grid: int, quarters: int) -> torch.Tensor:
    """Undoes `to_windows`, exactly where `grid` divides the size."""
    window = window_of(size, grid)
    shift = window_shift(window, quarters)
    x = x.unflatten(0, (-1, grid, grid)).unflatten(3, window).transpose(2, 3)
    x = x.flatten(3, 4).flatten(1, 2).roll(shift, (1, 2)).flatten(1, 2)
    return _stretched(x, (grid * window[0], grid * window[1]), size)


def _stretched(x: torch.Tensor, size: Size, target: Size) -> torch.Tensor:
    if size == target:
        return x
    return resized(x.unflatten(1, size).movedim(-1, 1), target).movedim(1, -1).flatten(1, 2)


def resized(x: torch.Tensor, size: Sequence[int]) -> torch.Tensor:
    """`[b, c, h, w]` in another size, bicubic; the same tensor where it has it already."""
    size = tuple(size)
    return x if tuple(x.shape[-2:]) == size else F.interpolate(x, size=size, mode="bicubic")


def halved(x: torch.Tensor) -> torch.Tensor:
    """`[b, c, h, w]` with every 2 x 2 pixels averaged; odd borders count too."""
    return F.avg_pool2d(x, 2, ceil_mode=True)


def token_grid(latent: Size, tokens: int) -> Size | None:
    """Height and width of the level of a UNet that has this many tokens; None if there is none."""
    for ratio in (2**k for k in range(16)):
        size = math.ceil(latent[0] / ratio), math.ceil(latent[1] / ratio)
        if size[0] * size[1] == tokens:
            return size
    return None


@contextmanager
def coarse(convolution: nn.Module) -> Iterator[None]:
    """Inside the block a 3 x 3 convolution of stride 2 takes a quarter of the size, with the same weights.

    Stride 4, padding 2, dilation 2. `convolution` may be wrapped (LoRA): every such convolution inside is changed.
    """
    changed = [m for m in convolution.modules() if isinstance(m, nn.Conv2d) and is_downsampling(m)]
    values = {"stride": (4, 4), "padding": (2, 2), "dilation": (2, 2), "_reversed_padding_repeated_twice": [2] * 4}
    before = [{name: getattr(m, name) for name in values} for m in changed]
    try:
        for module in changed:
            vars(module).update(values)
        yield
    finally:
        for module, kept in zip(changed, before):
            vars(module).update(kept)


def is_downsampling(module: nn.Module) -> bool:
    """Is this the 3 x 3 convolution with stride 2 and padding 1 that Stable Diffusion shrinks its features with?"""
    found = tuple(getattr(module, name, None) for name in ("kernel_size", "stride", "padding", "dilation"))
    return found == ((3, 3), (2, 2), (1, 1), (1, 1))


@dataclass(frozen=True)
class Placement:
    """Which levels of a UNet the parts of HiDiffusion act on; 0 is the outermost.

    Args:
        levels: Resolutions of the UNet.
        attention: First level with attention: its self-attention is windowed.
        conv: Level whose downsampler becomes coarse; None without one.
        pool: Level whose features are pooled behind the first pair of layers; None without one.
    """

    levels: int
    attention: int
    conv: int | None
    pool: int | None

    @classmethod
    def of(cls, attends: Sequence[bool]) -> Placement:
        """The paper's placement, from which levels have attention (UNets of SD 1 and 2: from level 0, XL: from 1)."""
        levels, first = len(attends), list(attends).index(True)
        pool = 1 if first == 0 else first
        return cls(
            levels, first, first if first < levels - 1 else None, pool if any(attends[pool : pool + 1]) else None
        )

    @property
    def pool_is_first(self) -> bool:
        """Where attention starts below the outermost level (SDXL) pooling is the main device, else the downsampler."""
        return self.attention > 0


@dataclass(frozen=True)
class Active:
    """What one call of a UNet does otherwise than usual.

    Args:
        conv: Is the downsampler coarse?
        pool: Are features pooled?
        windows: Windows on each axis of self-attention; 1 for none.
    """

    conv: bool = False
    pool: bool = False
    windows: int = 1

    def sizes(self, latent: Size, place: Placement) -> list[tuple[Size, Size]]:
        """Height and width at which each level begins and ends, outermost first."""
        size, found = latent, []
        for level in range(place.levels):
            end = _part(size, 2) if self.pool and level == place.pool else size
            found.append((size, end))
            size = _part(end, 4 if self.conv and level == place.conv else 2)
        return found


def _part(size: Size, by: int) -> Size:
    return math.ceil(size[0] / by), math.ceil(size[1] / by)


@dataclass(frozen=True)
class Plan:
    """When each part acts in a run: steps (from, to) of the coarse downsampler and of pooling; windows per axis."""

    conv: Steps = _NEVER
    pool: Steps = _NEVER
    windows: int = 1

    def at(self, step: int) -> Active:
        """What happens at this step of the run, counted from 0."""
        return Active(self.conv[0] <= step < self.conv[1], self.pool[0] <= step < self.pool[1], self.windows)


def paper_ratios(scale: float, place: Placement, steps: int, control: bool = False) -> tuple[float, float]:
    """The paper's (T1, T2): shares of the run in which the first and the second device act.

    Args:
        scale: Larger side over the side in training. Nothing is repaired up to 1.
        place: See `Placement`; SDXL's models for few steps have values of their own.
        steps: Steps of the run.
        control: Does a ControlNet take part?
    """
    if scale <= 1:
        return 0.0, 0.0
    if place.pool_is_first and steps <= _FEW_STEPS:
        return 0.5, 0.0
    if place.pool_is_first and control:
        return 0.5, 0.0 if scale < 4 else 0.3
    return (0.4, 0.0) if scale < 4 else (0.7, 0.3)


def plan(place: Placement, steps: int, ratios: tuple[float, float], aggressive: bool, windows: int) -> Plan:
    """When each part acts.

    Args:
        place: See `Placement`.
        steps: Steps of the run.
        ratios: (T1, T2), see `paper_ratios`.
        aggressive: The coarse downsampler for the first 8/50 of the run, then pooling until T1 of it.
        windows: Windows on each axis.
    """
    first, second = (_share(steps, ratio) for ratio in ratios)
    if aggressive:
        switch = min(_share(steps, _AGGRESSIVE_SHARE), first)
        return Plan((0, switch), (switch, first), windows)
    conv, pool = (second, first) if place.pool_is_first else (first, second)
    return Plan(
        (0, conv) if place.conv is not None else _NEVER, (0, pool) if place.pool is not None else _NEVER, windows
    )


def _share(steps: int, ratio: float) -> int:
    # 0.7 * 10 is a little less than 7.
    return int(steps * ratio + 1e-6)


def draw_quarters(seed: int, step: int, layers: int) -> list[int]:
    """Shift of every windowed layer at one step, in quarters of a window: the same for all calls of the step."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
    return torch.randint(4, (layers,), generator=generator).tolist()
