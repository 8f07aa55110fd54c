"""Which image tokens a step computes, and what stands in for the others: the part of RAS that every door shares."""

from __future__ import annotations

import math
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
        forecast_order: Of what stands in for tokens that are left out; 0 repeats them.
        reuse_text: Whether a step that leaves out image tokens leaves out all text tokens but the first.
    """

    steps: int
    start: int
    end: int
    resets: tuple[int, ...]
    ratio: float
    change: int = 0
    every: int = 0
    forecast_order: float = 0
    reuse_text: bool = False

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
        """Must this step leave keys, values and outputs for the next ones?"""
        return any(self.skipped(step + ahead, 1 << 30) for ahead in range(2 + math.ceil(self.forecast_order)))

    def call(self, cache: Cache, index: torch.Tensor | None, tokens: int, step: int) -> Call:
        """A pass of the model at a step; see `Call`."""
        keep = self.keeps(step)
        if not keep:
            cache.clear()
        now = torch.tensor(float(step)) if self.forecast_order else None
        return Call(cache, index, keep, tokens, now, self.forecast_order, self.reuse_text)


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
class Known:
    """Tensors whose first axis are the tokens of all sequences in one list, each as it was last computed.

    Args:
        newest: Of the last step that computed the token. They are written to: nobody else may hold them.
        before: Of the one before that; None where nothing is forecast.
    """

    newest: tuple[torch.Tensor, ...]
    before: tuple[torch.Tensor, ...] | None = None

    def update(self, rows: torch.Tensor, new: tuple[torch.Tensor, ...]) -> None:
        """Take in `rows` as computed anew."""
        for older, old in zip(self.before or (), self.newest):
            older.index_copy_(0, rows, old[rows])
        for old, value in zip(self.newest, new):
            old.index_copy_(0, rows, value.detach())

    def at(self, reach: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """On the line through both, per token: 0 is the one before, 1 the newest, 2 as far again."""
        return tuple(_line(before, newest, reach) for before, newest in zip(self.before, self.newest))


def _line(before: torch.Tensor, newest: torch.Tensor, reach: torch.Tensor) -> torch.Tensor:
    # In float32 at least: trends of half-precision features are small beside the features.
    wide = torch.promote_types(newest.dtype, torch.float32)
    weight = reach.view(-1, *[1] * (newest.ndim - 1)).to(wide)
    return torch.lerp(before.to(wide), newest.to(wide), weight).to(newest.dtype)


@dataclass
class Cache:
    """Of one kind of call: keys and values of every attention layer for all tokens, and the last outputs.

    `steps` has, by the number of rows, the steps at which each row was computed last and before that.
    """

    layers: dict[object, Known] = field(default_factory=dict)
    output: Known | None = None
    steps: dict[int, tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)

    def clear(self) -> None:
        """Forget everything."""
        self.layers, self.output, self.steps = {}, None, {}


@dataclass
class Call:
    """One pass of the model.

    Args:
        cache: Of its kind of call.
        index: Tokens to compute, `[M, n]`, or None for all.
        keep: Whether keys, values and outputs are kept.
        tokens: Tokens that the index chooses from. What a model appends to them is always computed.
        now: Step of the run if tokens that are left out are forecast, None if they are repeated.
        order: Of the forecast, up to 1: the share of the trend that is continued.
        reuse_text: Whether text tokens but the first are left out wherever image tokens are.
    """

    cache: Cache
    index: torch.Tensor | None
    keep: bool
    tokens: int
    now: torch.Tensor | None = None
    order: float = 1
    reuse_text: bool = False
    rotary: tuple[torch.Tensor, torch.Tensor] | None = None
    _places: dict[int, tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)
    _reach: dict[int, torch.Tensor] = field(default_factory=dict)

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

    def gather_text(self, text: torch.Tensor) -> torch.Tensor:
        """`[M, W, ...]` -> the text tokens that are computed."""
        return text if self.index is None else text[:, : self._words(text.shape[1])]

    def _words(self, words: int) -> int:
        # One remains: models and kernels do not expect sequences without tokens.
        return min(words, 1) if self.reuse_text else words

    def complete(self, tokens: torch.Tensor) -> torch.Tensor:
        """The output of all tokens: those that were computed among what stands in for the others."""
        flat = (tokens.flatten(0, 1),)
        if self.index is None:
            if self.keep:
                # The scheduler may hold the tokens themselves.
                self.cache.output = self._all(self.cache.output, (flat[0].clone(),))
            return tokens
        _, rows = self.places(0, True)
        (whole,) = self._standing(self.cache.output, rows, flat)
        return (whole.clone() if self.now is None else whole).unflatten(0, (len(self.index), -1))

    def places(self, words: int, image_first: bool) -> tuple[torch.Tensor, torch.Tensor]:
        """Where the computed tokens are in whole sequences that have `words` text tokens.

        Returns:
            Positions in each sequence `[M, s]`, and rows of all sequences in one list `[M * s]`: whole rows are copied
            faster than `gather` and `scatter` copy single numbers.
        """
        if words not in self._places:
            text = torch.arange(self._words(words), device=self.index.device).expand(len(self.index), -1)
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
        new, known = (_rows(key), _rows(value)), self.cache.layers.get(layer)
        if self.index is None:
            if self.keep:
                self.cache.layers[layer] = self._all(known, new)
            return key, value
        words = len(known.newest[0]) // len(self.index) - self.tokens
        _, rows = self.places(words, image_first)
        whole = self._standing(known, rows, new)
        return tuple(tensor.unflatten(0, (len(self.index), -1)).movedim(1, -2) for tensor in whole)

    def _all(self, known: Known | None, new: tuple[torch.Tensor, ...]) -> Known:
        """What is known after all tokens were computed."""
        new = tuple(_own(tensor) for tensor in new)
        if self.now is None:
            return Known(new)
        self._reached(len(new[0]), new[0].device, None)
        return Known(new, tuple(tensor.clone() for tensor in new) if known is None else known.newest)

    def _standing(self, known: Known, rows: torch.Tensor, new: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        """What stands for all tokens after `rows` were computed."""
        known.update(rows, new)
        whole = known.newest
        if self.now is not None:
            whole = known.at(self._reached(len(known.newest[0]), rows.device, rows))
        if any(tensor.requires_grad for tensor in new):
            whole = tuple(tensor.index_copy(0, rows, value) for tensor, value in zip(whole, new))
        return whole

    def _reached(self, count: int, device: torch.device, rows: torch.Tensor | None) -> torch.Tensor:
        """How far each of `count` rows is continued, see `Known.at`; notes that `rows`, or all, are computed now."""
        if count not in self._reach:
            now = self.now.to(device).expand(count)
            newest, before = self.cache.steps.get(count, (now, now))
            before = newest if rows is None else before.index_copy(0, rows, newest[rows])
            newest = now if rows is None else newest.index_copy(0, rows, now[rows])
            self.cache.steps[count] = newest, before
            ahead = torch.where(newest > before, (now - newest) / (newest - before), 0.0)
            self._reach[count] = 1 + self.order * ahead
        return self._reach[count]


def _own(tensor: torch.Tensor) -> torch.Tensor:
    """Without gradients, and without what else a storage holds; where gradients need the tensor, a copy."""
    return tensor.detach().clone() if tensor.requires_grad else tensor.contiguous()


def _rows(tensor: torch.Tensor) -> torch.Tensor:
    """`[M, ..., S, D]` -> `[M * S, ..., D]`."""
    return tensor.movedim(-2, 1).flatten(0, 1)


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary embedding of `[M, H, S, D]` by tables `[M, S, D]` or `[1, S, D]` whose neighbours are a pair."""
    x = x.transpose(1, 2)
    first, second = x.unflatten(-1, (-1, 2)).unbind(-1)
    turned = torch.stack([-second, first], -1).flatten(-2)
    return (x.float() * cos[:, :, None] + turned.float() * sin[:, :, None]).to(x.dtype).transpose(1, 2)
