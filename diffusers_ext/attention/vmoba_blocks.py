"""Attention over chosen blocks of keys: the part of VMoBA that every door shares.

Tokens are numbered frame by frame, line by line, as video transformers keep them: t x h x w.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F


Grid = tuple[int, int, int]
SCOPES = {"overall": 1, "head_global": 2, "query_head": 3}
MODES = ("threshold", "topk")
FALLBACKS = ("self", "full")


@dataclass(frozen=True)
class Partition:
    """A cut of the tokens into blocks.

    Args:
        order: Tokens block by block, `[S]`.
        sizes: Tokens of each block; they add up to S.
    """

    order: torch.Tensor
    sizes: tuple[int, ...]

    def own(self) -> torch.Tensor:
        """The block of each token, in the order of `order`, `[S]`."""
        sizes = torch.tensor(self.sizes, device=self.order.device)
        return torch.arange(len(self.sizes), device=self.order.device).repeat_interleave(sizes)


def cut(grid: Grid, chunk: tuple[float, int, int]) -> Partition:
    """Blocks of `chunk` = (c_t, c_h, c_w) tokens on a grid of (t, h, w).

    Whole frames may be cut anywhere, even within one: c_t may be a fraction there, and the last block may be short.

    Raises:
        ValueError: Other chunks that do not divide the grid.
    """
    t, h, w = grid
    tokens = torch.arange(t * h * w)
    if tuple(chunk[1:]) == (h, w):
        length = max(round(chunk[0] * h * w), 1)
        blocks = tokens // length
    else:
        if any(size % c for size, c in zip(grid, chunk)):
            raise ValueError(
                f"blocks of {tuple(chunk)} tokens do not divide a video of {grid} tokens (time, height, width)"
            )
        c_t, c_h, c_w = chunk
        places = (tokens // (h * w) // c_t, tokens // w % h // c_h, tokens % w // c_w)
        blocks = (places[0] * (h // c_h) + places[1]) * (w // c_w) + places[2]
    return Partition(blocks.argsort(stable=True), tuple(torch.bincount(blocks).tolist()))


def divided(grid: tuple[int, ...], blocks: int) -> tuple[int, ...]:
    """The chunk that cuts a grid into about `blocks` blocks, as nearly cubic as its divisors allow."""
    options = itertools.product(*([c for c in range(1, size + 1) if size % c == 0] for size in grid))

    def badness(chunk: tuple[int, ...]) -> float:
        count = math.prod(size // c for size, c in zip(grid, chunk))
        return abs(math.log(count / blocks)) + 0.1 * math.log(max(chunk) / min(chunk))

    return min(options, key=badness)


def partitions(
    grid: Grid,
    blocks: int = 16,
    chunk_1d: float | None = None,
    chunk_2d: tuple[int, int] | None = None,
    chunk_3d: Grid | None = None,
) -> tuple[Partition, Partition, Partition]:
    """The three cuts that layers use in turn: along time, into columns through all frames, into cubes.

    Args:
        grid: Tokens in time, height and width.
        blocks: Blocks of each cut, as nearly as the grid allows, where its chunk is None.
        chunk_1d: Frames per block.
        chunk_2d: Height and width of a column.
        chunk_3d: Frames, height and width of a cube.
    """
    t, h, w = grid
    columns = chunk_2d or divided((h, w), blocks)
    chunks = (
        (chunk_1d or math.ceil(t * h * w / blocks) / (h * w), h, w),
        (t, *columns),
        chunk_3d or divided(grid, blocks),
    )
    return tuple(cut(grid, chunk) for chunk in chunks)


def gates(query: torch.Tensor, key: torch.Tensor, sizes: tuple[int, ...]) -> torch.Tensor:
    """How much each query looks for each block: its product with the mean of the block's keys, in float32 or better.

    Args:
        query, key: `[B, H, S, D]`, block by block, after norms and rotary embedding.
        sizes: Of the C blocks.

    Returns:
        `[B, H, S, C]`.
    """
    wide = torch.promote_types(query.dtype, torch.float32)
    means = torch.stack([part.to(wide).mean(-2) for part in key.split(sizes, -2)], -2)
    return query.to(wide) @ means.transpose(-1, -2)


@dataclass(frozen=True)
class Rule:
    """Which blocks a query attends to besides its own.

    Args:
        mode: `"threshold"` or `"topk"`.
        threshold: tau, the share of all similarity that the chosen blocks hold; 1 is every block.
        scope: What competes: `"query_head"`, the blocks of each query; `"head_global"`, of all queries of a head;
            `"overall"`, of all heads too.
        topk: Blocks per query on average, its own included.
        fallback: `"full"` attends to everything when nothing but own blocks is chosen, as the published code does.
    """

    mode: str = "threshold"
    threshold: float = 0.25
    scope: str = "query_head"
    topk: int = 4
    fallback: str = "self"

    def select(self, gate: torch.Tensor, own: torch.Tensor) -> torch.Tensor:
        """Chosen blocks of each query, `[B, H, S, C]`.

        Args:
            gate: See `gates`.
            own: The block of each query, `[S]`.
        """
        count = gate.shape[-1]
        mine = F.one_hot(own, count).bool().expand_as(gate)
        if (self.mode == "threshold" and self.threshold >= 1) or (self.mode == "topk" and self.topk >= count):
            return torch.ones_like(mine)
        start = SCOPES[self.scope]
        choose = self._most_similar if self.mode == "threshold" else self._nearest
        keep = choose(gate.flatten(start), mine.flatten(start)).view_as(gate) | mine
        return torch.ones_like(mine) if self.fallback == "full" and torch.equal(keep, mine) else keep

    def _most_similar(self, pool: torch.Tensor, mine: torch.Tensor) -> torch.Tensor:
        """The fewest entries that, with the own ones, hold the share `threshold` of the pool's similarity."""
        low, high = pool.aminmax(dim=-1, keepdim=True)
        similar = (pool - low) / torch.where(high - low > 1e-6, high - low, 1.0)
        wanted = self.threshold * similar.sum(-1, keepdim=True) - (similar * mine).sum(-1, keepdim=True)
        values, order = similar.masked_fill(mine, -1.0).sort(dim=-1, descending=True, stable=True)
        values = values.clamp_min(0).double()
        return torch.zeros_like(mine).scatter(-1, order, values.cumsum(-1) - values < wanted)

    def _nearest(self, pool: torch.Tensor, mine: torch.Tensor) -> torch.Tensor:
        kept = self.topk * int(mine[(0,) * (mine.ndim - 1)].sum())
        order = pool.masked_fill(mine, torch.inf).topk(kept, dim=-1).indices
        return torch.zeros_like(mine).scatter(-1, order, True)


def block_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    keep: torch.Tensor,
    sizes: tuple[int, ...],
    scale: float | None = None,
) -> torch.Tensor:
    """Exact softmax attention of every query over its own choice of key blocks.

    Each block is multiplied with the queries that chose it; the parts are merged by their log-sum-exp. Differentiable
    in query, key and value.

    Args:
        query: `[B, H, S, D]`.
        key, value: `[B, H, N, D]`, block by block.
        keep: Which of the C blocks each query attends to, at least one, `[B, H, S, C]`.
        sizes: Tokens of each block; they add up to N.
        scale: Factor on the logits. None is 1 / sqrt(D).
    """
    query = query * (query.shape[-1] ** -0.5 if scale is None else scale)
    heads = zip(*(x.flatten(0, 1) for x in (query, key, value, keep)))
    return torch.stack([_one_head(q, k.split(sizes), v.split(sizes), c) for q, k, v, c in heads]).view(
        *query.shape[:-1], value.shape[-1]
    )


def _one_head(query: torch.Tensor, keys: tuple, values: tuple, keep: torch.Tensor) -> torch.Tensor:
    chosen = keep.t().nonzero()[:, 1].split(keep.sum(0).tolist())
    parts = [_part(query[rows], k, v) for rows, k, v in zip(chosen, keys, values)]
    rows = torch.cat(chosen)
    peaks, weights, outputs = (torch.cat(part) for part in zip(*parts))
    peak = torch.full_like(query[:, 0], -torch.inf, dtype=peaks.dtype).scatter_reduce(0, rows, peaks, "amax")
    share = (peaks - peak[rows]).exp()
    total = torch.zeros_like(peak).index_add(0, rows, share * weights)
    whole = outputs.new_zeros(len(query), outputs.shape[-1]).index_add(0, rows, share[:, None] * outputs)
    return (whole / total[:, None]).to(query.dtype)


def _part(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Largest logit, sum of exponentials relative to it, and their sum over values, for one block of keys."""
    logits = query @ key.t()
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    peak = logits.detach().amax(-1)
    weights = logits.sub_(peak[:, None]).exp_()
    return peak, weights.sum(-1), (weights.to(value.dtype) @ value).to(weights.dtype)


@dataclass(frozen=True)
class Cost:
    """What a sparse attention took.

    Args:
        macs: Multiply-accumulates, choosing included.
        full_macs: Those of full attention.
        kept: Share of (query, block) pairs of the picture that were chosen.
    """

    macs: int
    full_macs: int
    kept: float


def sparse_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    partition: Partition,
    rule: Rule,
    image_first: bool = True,
    scale: float | None = None,
) -> tuple[torch.Tensor, Cost]:
    """VMoBA attention in place of `scaled_dot_product_attention`.

    Args:
        query, key, value: `[B, H, N, D]`: the picture's tokens and any number of text tokens. Text attends to
            everything, and everything attends to it.
        partition: Of the picture's tokens.
        rule: See `Rule`.
        image_first: Whether the picture comes before the text.
        scale: Factor on the logits. None is 1 / sqrt(D).

    Returns:
        Output `[B, H, N, D]` and its cost.
    """
    order = partition.order.to(query.device)
    image, total = len(order), key.shape[-2]
    words = torch.arange(total - image, device=order.device)
    order = torch.cat([order, words + image] if image_first else [order + len(words), words])
    query, key, value = (x.index_select(-2, order) for x in (query, key, value))
    sizes = partition.sizes
    with torch.no_grad():
        gate = gates(query[..., :image, :], key[..., :image, :], sizes)
        keep = rule.select(gate, partition.own().to(order.device))
    chosen = keep.float().mean().item()
    if len(words):
        keep = F.pad(keep, (0, 1, 0, len(words)), value=True)
        sizes = (*sizes, len(words))
    output = block_attention(query, key, value, keep, sizes, scale).index_select(-2, order.argsort())
    pairs = int((keep.sum((0, 1, 2)).cpu() * torch.tensor(sizes)).sum())
    width = query.shape[-1] + value.shape[-1]
    full = math.prod(query.shape[:-1]) * total * width
    return output, Cost(pairs * width + gate.numel() * query.shape[-1], full, chosen)
