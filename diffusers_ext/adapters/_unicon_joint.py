"""UniCon's maths: updates that follow the owner of a token, joint attention, and the rows of a batch as inputs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel
from torch import nn

from ..apply import denoiser_of


PROJECTIONS = ("to_q", "to_k", "to_v", "to_out.0")
POST_JOINTS = ("conv_fuse", "conv")


class LowRank(nn.Module):
    """alpha / r W_up W_down x, the update of one projection; W_up begins at zero."""

    def __init__(self, inputs: int, outputs: int, rank: int, alpha: float):
        super().__init__()
        self.down = nn.Linear(inputs, rank, bias=False)
        self.up = nn.Linear(rank, outputs, bias=False)
        self.factor = alpha / rank
        nn.init.normal_(self.down.weight, std=1 / rank)
        nn.init.zeros_(self.up.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.factor * self.up(self.down(x))


class Branch(nn.Module):
    """A tree of modules whose state dict has the names of the model's layers."""

    def plant(self, path: str, leaf: nn.Module) -> None:
        """Put a module at a dotted path, which `get_submodule` finds."""
        *inner, last = path.split(".")
        place: nn.Module = self
        for part in inner:
            if part not in place._modules:
                place.add_module(part, Branch())
            place = place._modules[part]
        place.add_module(last, leaf)


def joint_attention(attn: nn.Module, h_x: torch.Tensor, h_y: torch.Tensor, xy: nn.Module, yx: nn.Module) -> tuple:
    """jx = attention(h_x to h_y), jy = attention(h_y to h_x), through the frozen projections of a self-attention.

    Updates follow the owner of a token: xy acts on whatever is computed from x (q and out of jx, k and v in jy), yx on
    whatever is computed from y.

    Args:
        attn: diffusers' `Attention`.
        h_x, h_y: `[n, tokens, c]`, normed hidden states of both inputs.
        xy, yx: Hold a `LowRank` for each of `PROJECTIONS`.

    Returns:
        jx, jy, each `[n, tokens, c]`.
    """

    def projected(name: str, h: torch.Tensor, lora: nn.Module) -> torch.Tensor:
        return attn.get_submodule(name)(h) + lora.get_submodule(name)(h)

    def heads(h: torch.Tensor) -> torch.Tensor:
        return h.unflatten(-1, (attn.heads, -1)).transpose(1, 2)

    (q_x, k_x, v_x), (q_y, k_y, v_y) = (
        [heads(projected(name, h, lora)) for name in PROJECTIONS[:3]] for h, lora in ((h_x, xy), (h_y, yx))
    )
    found = []
    for q, k, v, lora in ((q_x, k_y, v_y, xy), (q_y, k_x, v_x, yx)):
        mixed = F.scaled_dot_product_attention(q, k, v, scale=attn.scale).transpose(1, 2).flatten(2)
        found.append(projected("to_out.0", mixed, lora))
    return tuple(found)


def post_joint(layer: nn.Linear, jx: torch.Tensor, jy: torch.Tensor) -> tuple:
    """The layer after the joint attention: "conv" C -> C on each, "conv_fuse" 2C -> 2C on both, x before y."""
    if layer.in_features == jx.shape[-1]:
        return layer(jx), layer(jy)
    return layer(torch.cat([jx, jy], -1)).chunk(2, -1)


@dataclass(frozen=True, eq=False)
class Pair:
    """Which rows of a batch are x and y of each other.

    Attributes:
        x, y: `[n]` indices, the same number each.
        w_x, w_y: Weights of what is added to x and to y.
    """

    x: torch.Tensor
    y: torch.Tensor
    w_x: float = 1.0
    w_y: float = 1.0

    def __post_init__(self) -> None:
        if self.x.shape != self.y.shape:
            raise ValueError(f"{len(self.x)} rows of x for {len(self.y)} rows of y: give as many of each")


@dataclass(frozen=True, eq=False)
class Arrangement:
    """The pairs of one adapter in one call of the UNet.

    Attributes:
        pairs: May be empty: nothing is joined.
        rows: Rows of the batch.
        joint: False leaves the joint attention out; the update of y stays.
    """

    pairs: tuple[Pair, ...]
    rows: int
    joint: bool = True

    def copies(self, batch: int) -> int:
        """How often the batch is stacked: caches may compute several steps at once."""
        if batch % self.rows:
            raise RuntimeError(
                f"attention got a batch of {batch} for {self.rows} rows that UniCon knows of: another method changes "
                "the batch inside of the UNet; take it off"
            )
        return batch // self.rows

    def stacked(self, batch: int) -> Iterator[Pair]:
        """The pairs in a batch that holds several copies of the rows."""
        starts = range(0, batch, self.rows) if self.copies(batch) > 1 else [0]
        for pair in self.pairs:
            x, y = (rows if batch == self.rows else torch.cat([rows + s for s in starts]) for rows in (pair.x, pair.y))
            yield Pair(x, y, pair.w_x, pair.w_y)


def rows_of(rows: Any, batch: int, device: torch.device) -> torch.Tensor:
    """Indices `[n]` from a slice, a list or a tensor."""
    if isinstance(rows, slice):
        return torch.arange(batch, device=device)[rows]
    indices = torch.as_tensor(rows, dtype=torch.long)
    if len(indices) and int(indices.max()) >= batch:
        raise ValueError(f"a pair names row {int(indices.max())} of a batch of {batch}: count rows from 0")
    return indices.to(device)


def blocks_of(target: Any) -> dict[str, nn.Module]:
    """Transformer blocks of a Stable Diffusion UNet by name.

    Raises:
        ValueError: Another model, or one without self-attention.
    """
    unet = denoiser_of(target)
    if not isinstance(unet, UNet2DConditionModel):
        raise ValueError(
            f"{type(unet).__name__} has no blocks that UniCon knows: use a UNet2DConditionModel (Stable Diffusion)"
        )
    found = {
        name: block
        for name, block in unet.named_modules()
        if hasattr(block, "attn1") and not getattr(block, "only_cross_attention", False)
    }
    if not found:
        raise ValueError("this UNet has no self-attention for UniCon to work beside")
    return found


def plain(layer: nn.Module) -> nn.Module:
    """The projection below any LoRA: a hook on it stays when a LoRA comes or goes."""
    while hasattr(layer, "base_layer"):
        layer = layer.base_layer
    return layer


def widths_of(blocks: Mapping[str, nn.Module]) -> dict[str, int]:
    """Channels of the self-attention of every block."""
    return {name: plain(block.attn1.to_q).in_features for name, block in blocks.items()}


def low_ranks(widths: Mapping[str, int], names: Iterable[str], text: int, rank: int, alpha: float) -> Branch:
    """A `LowRank` for each projection of the named attentions of all blocks."""
    tree = Branch()
    for block, width in widths.items():
        for attention in names:
            for projection in PROJECTIONS:
                inputs = text if attention == "attn2" and projection in ("to_k", "to_v") else width
                tree.plant(f"{block}.{attention}.{projection}", LowRank(inputs, width, rank, alpha))
    return tree


def post_layers(widths: Mapping[str, int], kind: str) -> Branch:
    """The zero-initialised layers after the joint attentions."""
    tree = Branch()
    for block, width in widths.items():
        size = 2 * width if kind == "conv_fuse" else width
        layer = nn.Linear(size, size, bias=False)
        nn.init.zeros_(layer.weight)
        tree.plant(block, layer)
    return tree
