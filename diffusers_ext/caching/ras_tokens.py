"""Which image tokens a step computes, and what stands in for the others: the part of RAS that every door shares."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F


def token_scores(noise: torch.Tensor, patch: int, metric: str = "std") -> torch.Tensor:
    """How busy the predicted noise of each token is: the mean over its pixels of a measure over the channels.

    Args:
        noise: Latents `[B, C, H, W]`, or packed tokens `[B, N, C * patch * patch]`.
        patch: Width of a token in latent pixels.
        metric: `"std"` or `"l2norm"`.

    Returns:
        Tensor `[B, N]` in float32 or better.
    """
    noise = noise.float() if noise.dtype.itemsize < 4 else noise
    packed = noise.ndim == 3
    pixels = noise.unflatten(-1, (-1, patch * patch)).movedim(2, 1) if packed else noise
    busy = pixels.std(1) if metric == "std" else pixels.norm(dim=1)
    return busy.mean(-1) if packed else F.avg_pool2d(busy[:, None], patch, ceil_mode=True).flatten(1)


def active_tokens(
    scores: torch.Tensor, skips: torch.Tensor, count: int, high_ratio: float, scale: float, mode: str = "balanced"
) -> torch.Tensor:
    """The tokens to compute, after leaving out `count` of the lowest and highest scores.

    Args:
        scores: `[B, N]`.
        skips: `[B, N]`, how often each token was left out so far.
        count: Tokens to leave out.
        high_ratio: Share of them taken from the highest scores.
        scale: s of the factor exp(s * skips) that keeps a token from being left out again and again.
        mode: `"balanced"` lowers the score of such tokens where the highest are taken, `"official"` raises it there
            too, as the published code does.

    Returns:
        Indices `[B, N - count]`, ascending.
    """
    high = int(count * high_ratio)
    low = count - high if mode == "balanced" else int(count * (1 - high_ratio))
    weight = torch.exp(scale * (skips - skips.amax(1, keepdim=True)))
    order = (scores * weight).argsort(dim=1, stable=True)
    if mode == "balanced":
        rest = order[:, low:]
        order = rest.gather(1, (scores / weight.clamp_min(1e-30)).gather(1, rest).argsort(dim=1, stable=True))
        low = 0
    return order[:, low : order.shape[1] - high].sort(dim=1).values


@dataclass(frozen=True)
class Plan:
    """Which steps of a run leave out how many tokens.

    Args:
        steps: T, steps of the run.
        start, end: First and last step that may leave out tokens.
        resets: Steps in between that compute all of them.
        ratio: Share of the tokens that is computed.
        change, every: The dynamic rule: `change` more tokens are left out every `every` steps; 0 keeps the number.
    """

    steps: int
    start: int
    end: int
    resets: tuple[int, ...]
    ratio: float
    change: int = 0
    every: int = 0

    def skipped(self, step: int, tokens: int) -> int:
        """Tokens left out on a step, out of `tokens`."""
        if not self.start <= step <= self.end or step in self.resets:
            return 0
        count = int((1 - self.ratio) * tokens)
        if self.every:
            count += self.change * (step // self.every - (self.steps + self.start) // self.every // 2)
            count = count // 64 * 64
        return min(max(count, 0), tokens - 1)

    def keeps(self, step: int) -> bool:
        """Must this step leave keys, values and outputs for the next one?"""
        return self.skipped(step + 1, 1 << 30) > 0 or self.skipped(step, 1 << 30) > 0


@dataclass
class Regions:
    """The choice of tokens during one run.

    Args:
        plan: See `Plan`.
        patch, metric: See `token_scores`.
        high_ratio, scale, mode: See `active_tokens`.
    """

    plan: Plan
    patch: int
    metric: str
    high_ratio: float
    scale: float
    mode: str
    tokens: int = 0
    skips: torch.Tensor | None = None
    chosen: torch.Tensor | None = None
    chosen_for: int = -1
    history: list[int] = field(default_factory=list)

    def observe(self, noise: torch.Tensor, step: int) -> None:
        """Choose the tokens of step `step + 1` from the noise predicted at `step`, guidance included."""
        if self.chosen_for > step:
            return
        scores = token_scores(noise, self.patch, self.metric)
        if self.skips is None or self.skips.shape != scores.shape:
            self.skips = torch.zeros_like(scores)
        self.tokens, self.chosen_for = scores.shape[1], step + 1
        count = self.plan.skipped(step + 1, self.tokens)
        self.chosen = None
        if count:
            self.chosen = active_tokens(scores, self.skips, count, self.high_ratio, self.scale, self.mode)
            self.skips = (self.skips + 1).scatter_add(1, self.chosen, -torch.ones_like(scores))
            self.history.append(self.tokens - count)

    def active(self, step: int, batch: int) -> torch.Tensor | None:
        """Tokens `[batch, n]` that step `step` computes, the same for each kind of guidance; None for all."""
        if self.chosen is None or self.chosen_for != step or batch % len(self.chosen):
            return None
        return self.chosen.repeat(batch // len(self.chosen), 1)


@dataclass
class Cache:
    """Of one kind of call: keys and values of every attention layer for all tokens, and the last outputs."""

    layers: dict = field(default_factory=dict)
    output: torch.Tensor | None = None


@dataclass
class Call:
    """One pass of the model.

    Args:
        cache: Of its kind of call.
        index: Tokens to compute, `[M, n]`, or None for all.
        keep: Whether keys, values and outputs are kept.
        tokens: Tokens that the index chooses from. What a model appends to them is always computed.
    """

    cache: Cache
    index: torch.Tensor | None
    keep: bool
    tokens: int
    rotary: tuple[torch.Tensor, torch.Tensor] | None = None
    _places: dict[int, tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)

    def gather(self, tokens: torch.Tensor) -> torch.Tensor:
        """`[M, N, ...]` -> the rows that are computed."""
        if self.index is None:
            self.tokens = tokens.shape[1]
            return tokens
        if tokens.shape[1] > self.tokens:
            more = torch.arange(self.tokens, tokens.shape[1], device=self.index.device).expand(len(self.index), -1)
            self.index, self.tokens = torch.cat([self.index, more], 1), tokens.shape[1]
            self._places.clear()
        _, rows = self.places(0, True)
        return tokens.flatten(0, 1)[rows].unflatten(0, self.index.shape)

    def complete(self, tokens: torch.Tensor) -> torch.Tensor:
        """The output of all tokens: those that were computed among the last ones of the others."""
        if self.index is not None:
            last, (_, rows) = self.cache.output, self.places(0, True)
            tokens = last.flatten(0, 1).index_copy(0, rows, tokens.flatten(0, 1)).view_as(last)
        if self.keep:
            self.cache.output = tokens.detach().clone()
        return tokens

    def places(self, words: int, image_first: bool) -> tuple[torch.Tensor, torch.Tensor]:
        """Where the computed tokens and `words` text tokens are in the whole sequences.

        Returns:
            Positions in each sequence `[M, s]`, and rows of all sequences in one list `[M * s]`: whole rows are copied
            faster than `gather` and `scatter` copy single numbers.
        """
        if words not in self._places:
            text = torch.arange(words, device=self.index.device).expand(len(self.index), -1)
            parts = [self.index, text + self.tokens] if image_first else [text, self.index + words]
            places = torch.cat(parts, 1)
            starts = torch.arange(len(places), device=places.device)[:, None] * (self.tokens + words)
            self._places[words] = places, (places + starts).flatten()
        return self._places[words]

    def keys_values(
        self, layer: object, key: torch.Tensor, value: torch.Tensor, image_first: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of the whole sequence.

        Args:
            layer: Names the attention layer.
            key, value: `[M, ..., S, D]` of the computed image tokens and all text tokens.
            image_first: Whether the image comes before the text.
        """
        if self.index is None:
            if self.keep:
                self.cache.layers[layer] = _rows(key).detach().clone(), _rows(value).detach().clone()
            return key, value
        _, rows = self.places(key.shape[-2] - self.index.shape[1], image_first)
        whole = [old.index_copy(0, rows, _rows(new)) for old, new in zip(self.cache.layers[layer], (key, value))]
        self.cache.layers[layer] = whole[0].detach(), whole[1].detach()
        return tuple(tensor.unflatten(0, (len(self.index), -1)).movedim(1, -2) for tensor in whole)


def _rows(tensor: torch.Tensor) -> torch.Tensor:
    """`[M, ..., S, D]` -> `[M * S, ..., D]`."""
    return tensor.movedim(-2, 1).flatten(0, 1)
