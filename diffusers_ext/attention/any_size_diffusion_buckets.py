"""Training for many aspect ratios, the first stage of Any-Size-Diffusion: buckets, batches of one bucket.

Zheng et al., "Any-Size-Diffusion: Toward Efficient Text-Driven Synthesis for Any-Size HD Images", 2023,
https://arxiv.org/abs/2308.16582
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch.utils.data import Sampler


__all__ = ["AspectBuckets", "BucketBatchSampler"]


@dataclass(frozen=True)
class AspectBuckets:
    """Canvases of nearly equal area and different aspect ratios.

    Args:
        area: Pixels of a canvas, 512 * 512 for Stable Diffusion 1.5.
        ratios: Heights over widths.
        multiple: Sides are rounded to multiples of this; 8 for the VAE, 64 keeps every level of a UNet even.

    Raises:
        ValueError: No ratio, one that is not above 0, or an area too small for the multiple.

    Example:
        >>> from diffusers_ext import AspectBuckets
        >>> AspectBuckets(area=512 * 512).nearest(1080, 1920)
        (384, 704)
    """

    area: int = 512 * 512
    ratios: tuple[float, ...] = (1.0, 3 / 4, 4 / 3, 9 / 16, 16 / 9)
    multiple: int = 64

    def __post_init__(self) -> None:
        object.__setattr__(self, "ratios", tuple(self.ratios))
        if not self.ratios or min(self.ratios) <= 0:
            raise ValueError(f"ratios are {self.ratios}; accepted: one or more numbers above 0 (height / width)")
        if self.multiple < 1 or min(min(size) for size in self.sizes) < self.multiple:
            raise ValueError(
                f"an area of {self.area} pixels has no canvas with sides of at least {self.multiple}: raise area, "
                "or lower multiple"
            )

    @property
    def sizes(self) -> tuple[tuple[int, int], ...]:
        """Height and width of every canvas, each once."""

        def rounded(x: float) -> int:
            return round(x / self.multiple) * self.multiple

        found = ((rounded(math.sqrt(self.area * r)), rounded(math.sqrt(self.area / r))) for r in self.ratios)
        return tuple(dict.fromkeys(found))

    def nearest(self, height: int, width: int) -> tuple[int, int]:
        """The canvas whose ratio is nearest to that of a picture."""
        if height < 1 or width < 1:
            raise ValueError(f"the picture is {height} x {width}; accepted: sides from 1")
        return min(self.sizes, key=lambda size: abs(math.log(size[0] * width / (size[1] * height))))

    def fit(self, image: torch.Tensor, generator: torch.Generator | None = None) -> torch.Tensor:
        """A picture in its nearest canvas: resized until it covers it, then cropped.

        Args:
            image: `[c, h, w]`.
            generator: Draws the place of the crop; without one it is the middle.
        """
        height, width = self.nearest(*image.shape[-2:])
        scale = max(height / image.shape[-2], width / image.shape[-1])
        size = [max(round(side * scale), least) for side, least in zip(image.shape[-2:], (height, width))]
        x = F.interpolate(image[None], size=size, mode="bicubic", antialias=True)[0].clamp(image.min(), image.max())
        room = size[0] - height, size[1] - width
        top, left = (
            r // 2 if generator is None else int(torch.randint(r + 1, (1,), generator=generator)) for r in room
        )
        return x[:, top : top + height, left : left + width]


class BucketBatchSampler(Sampler[list[int]]):
    """Batches of indices whose pictures share a canvas, in random order; for `DataLoader(batch_sampler=...)`.

    Args:
        sizes: Height and width of every picture of the data set.
        buckets: See `AspectBuckets`.
        batch_size: Pictures per batch.
        drop_last: Leave out the last, smaller batch of each canvas.
        seed: Of the order, together with the epoch.

    Example:
        >>> from diffusers_ext import AspectBuckets, BucketBatchSampler
        >>> sampler = BucketBatchSampler([(512, 512), (1080, 1920), (600, 610)], AspectBuckets(), batch_size=2)
        >>> sorted(len(batch) for batch in sampler)
        [1, 2]
    """

    def __init__(
        self,
        sizes: Sequence[tuple[int, int]],
        buckets: AspectBuckets,
        batch_size: int,
        drop_last: bool = False,
        seed: int = 0,
    ):
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}; accepted: whole numbers from 1")
        self.batch_size, self.drop_last, self.seed, self.epoch = batch_size, drop_last, seed, 0
        self.members: dict[tuple[int, int], list[int]] = {}
        for index, size in enumerate(sizes):
            self.members.setdefault(buckets.nearest(*size), []).append(index)

    def set_epoch(self, epoch: int) -> None:
        """Another order for another epoch; the same one on every machine."""
        self.epoch = epoch

    def __len__(self) -> int:
        counts = (len(indices) / self.batch_size for indices in self.members.values())
        return sum(math.floor(n) if self.drop_last else math.ceil(n) for n in counts)

    def __iter__(self) -> Iterator[list[int]]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        batches = []
        for indices in self.members.values():
            order = [indices[i] for i in torch.randperm(len(indices), generator=generator).tolist()]
            batches += [order[i : i + self.batch_size] for i in range(0, len(order), self.batch_size)]
        if self.drop_last:
            batches = [batch for batch in batches if len(batch) == self.batch_size]
        yield from (batches[i] for i in torch.randperm(len(batches), generator=generator).tolist())
