"""DPM-OT: a semi-discrete optimal-transport map from noise to stored noisy latents, the start of a short run.

The map is the gradient of a convex piecewise linear potential, so it sends noise to single stored latents and never to
a mixture of two modes; see `SemiDiscreteOT`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path

import torch
from safetensors import safe_open
from tqdm.auto import tqdm

from ..registry import Claim, MethodRecord, register
from ._checkpoint import Checkpoint, require_size, write_tensors
from ._common import require_choice
from ._start import Level, begin_at, call_from, level_of_timestep, native_level, node_levels


__all__ = ["SemiDiscreteOT", "OTStart"]

_FORMAT = "diffusers-ext semi-discrete OT"
_SOURCES = ("normal", "uniform")
_SAME_LEVEL = 1e-3  # in log-SNR
_FEWEST_SAMPLES = 4000


# --- the map ------------------------------------------------------------------------------------------------------
# Brenier potential u(x) = max_i(<x, y_i> + h_i), targets y [n, d], heights h [n]; cell W_i = {x: i is the argmax} and
# T(x) = y_i there. The energy E(h) = int u dmu - sum nu_i h_i is convex, its gradient is mu(W_i) - nu_i.


def best_cells(
    x: torch.Tensor, y: torch.Tensor, h: torch.Tensor, k: int = 1, batch: int = 1000
) -> tuple[torch.Tensor, torch.Tensor]:
    """Values <x, y_i> + h_i and indices of the `k` largest, `[b, k]`, for `x` `[b, d]`, `batch` targets at a time."""
    values, places = x.new_empty(len(x), 0), torch.empty(len(x), 0, dtype=torch.long, device=x.device)
    for start in range(0, len(y), batch):
        part = torch.addmm(h[start : start + batch], x, y[start : start + batch].mT)
        found, where = part.topk(min(k, part.shape[1]), dim=1)
        values, places = torch.cat([values, found], 1), torch.cat([places, where + start], 1)
        values, order = values.topk(min(k, values.shape[1]), dim=1)
        places = places.gather(1, order)
    return values, places


def adam_step(h: torch.Tensor, m: torch.Tensor, v: torch.Tensor, g: torch.Tensor, lr: float):
    """One step on the gradient `g`, without bias correction; heights keep the mean 0. Returns new (h, m, v)."""
    m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
    h = h - lr * m / (v.sqrt() + 1e-8)
    return h - h.mean(), m, v


def normal_angles(y: torch.Tensor, pairs: torch.Tensor) -> torch.Tensor:
    """Angles between the normals (y_i, -1) of the hyperplanes of the first and the other cells, `[b, k - 1]`."""
    first, others = y[pairs[:, :1]], y[pairs[:, 1:]]
    length = [(v.square().sum(-1) + 1).sqrt() for v in (first, others)]
    cosine = ((first * others).sum(-1) + 1) / (length[0] * length[1])
    return torch.acos(cosine.clamp(-1, 1))


def extension_weights(values: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
    """Weights `[b, k]` of the k best cells, from the values `[b, k + 1]` of one more.

    They fall linearly to 0 where a cell is about to leave the k best and are equal where two cells meet, so the
    extension is continuous. `keep` `[b, k]` says which cells may take part.
    """
    gaps = (values[:, :-1] - values[:, -1:]) * keep
    gaps[:, 0] += torch.finfo(gaps.dtype).tiny  # all values equal
    return gaps / gaps.sum(1, keepdim=True)


# --- fitting ------------------------------------------------------------------------------------------------------


@dataclass
class _Fit:
    """Where a fit is; everything that a file needs to go on bit for bit."""

    h: torch.Tensor
    m: torch.Tensor
    v: torch.Tensor
    best: torch.Tensor
    total: torch.Tensor  # of the heights since the last decay
    iteration: int = 0
    decays: int = 0
    bad: int = 0
    since: int = 0
    lowest: float = math.inf
    done: bool = False

    def tensors(self) -> dict[str, torch.Tensor]:
        """All of it; numbers have no dimensions."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        exact = {name: torch.float64 for name, value in values.items() if isinstance(value, float)}
        return {name: torch.as_tensor(value, dtype=exact.get(name)) for name, value in values.items()}

    @classmethod
    def of(cls, tensors: dict[str, torch.Tensor]) -> _Fit:
        """From `tensors`."""
        return cls(**{name: value if value.ndim else value.item() for name, value in tensors.items()})


class SemiDiscreteOT:
    """Optimal transport from noise to a set of targets: every target gets its share of the noise, the nearest one.

    Args:
        targets: `[n, ...]`, n >= 2: noisy latents for sampling (see `from_latents`), or any points.
        weights: `[n]` shares of the targets, positive; equal by default.
        source: Law of the noise, `"normal"` (N(0, I), what diffusion latents start from) or `"uniform"` ([0, 1]^d).
        level: (alpha, sigma) of the targets, for `OTStart`.
        h: Heights of a finished fit.

    Raises:
        ValueError: Weights that do not match, targets that are not finite or too large.

    Example:
        >>> ot = SemiDiscreteOT(torch.randn(64, 2)).fit()
        >>> points = ot.map(torch.randn(1000, 2))
    """

    def __init__(
        self,
        targets: torch.Tensor,
        weights: torch.Tensor | None = None,
        source: str = "normal",
        level: Level | None = None,
        h: torch.Tensor | None = None,
    ):
        require_choice("source", source, _SOURCES)
        n = len(targets)
        weights = torch.full((n,), 1 / max(n, 1)) if weights is None else weights
        _check_shapes(tuple(targets.shape), tuple(weights.shape), (n,) if h is None else tuple(h.shape))
        if not torch.isfinite(targets).all():
            raise ValueError("the targets contain NaN or infinity")
        if not (weights > 0).all():
            raise ValueError("every weight must be above 0")
        self.targets, self.source, self.level = targets.detach(), source, level
        self.weights = (weights.double() / weights.double().sum()).to(targets.device)
        self.h = None if h is None else h.detach()
        self._angles: tuple[float, float] | None = None

    @classmethod
    def from_latents(cls, latents: torch.Tensor, level: Level, seed: int = 0, **options) -> SemiDiscreteOT:
        """The transport to clean latents with noise put on them.

        Args:
            latents: Clean latents `[n, ...]` as the scheduler sees them.
            level: (alpha, sigma) of the noisy ones; `OTStart.level_of(scheduler, timestep)` gives it.
            seed: Seed of the noise.
            options: `weights`.
        """
        alpha, sigma = level
        noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(seed), dtype=latents.dtype)
        return cls(alpha * latents + sigma * noise.to(latents.device), level=(alpha, sigma), **options)

    def __len__(self) -> int:
        return len(self.targets)

    def _rows(self) -> torch.Tensor:
        """Centred flat targets: taking the mean away moves all values of an x alike and spares precision."""
        rows = self.targets.flatten(1).to(torch.promote_types(self.targets.dtype, torch.float32))
        return rows - rows.mean(0)

    def _draw(self, count: int, d: int, generator: torch.Generator, like: torch.Tensor) -> torch.Tensor:
        draw = torch.randn if self.source == "normal" else torch.rand
        return draw(count, d, generator=generator, dtype=like.dtype).to(like.device)

    @torch.no_grad()
    def fit(
        self,
        max_iter: int = 9000,
        lr: float = 0.1,
        samples: int | None = None,
        batch_size_source: int = 4000,
        batch_size_target: int = 1000,
        tolerance: float = 8e-4,
        patience: int = 50,
        decays: int = 3,
        seed: int = 0,
        checkpoint: str | Path | None = None,
        progress: bool = True,
        on_iteration: Callable[[int], None] | None = None,
    ) -> SemiDiscreteOT:
        """Find the heights by Monte-Carlo gradient descent.

        Ctrl-C, or an exception from `on_iteration`, stops it; with a `checkpoint` the next call goes on there, bit for
        bit.

        Args:
            max_iter: Iterations at most.
            lr: Step size, in units of the targets' root mean square around their mean.
            samples: Noise per iteration at first, default 10 n but at least 4000; doubled at every decay.
            batch_size_source, batch_size_target: Noise and targets per matrix product.
            tolerance: Stop when the gradient's norm is below it and no cell is empty.
            patience: Iterations without progress before a decay, which doubles the samples and takes 0.8 of `lr`.
            decays: How many; the fit ends when the patience after the last one is over.
            seed: Seed of the noise.
            checkpoint: safetensors file of the unfinished fit, written every 50 iterations and at the end.
            progress: Show a progress bar.
            on_iteration: Called with the number of finished iterations.

        Returns:
            The transport itself, with `h`.
        """
        n, y = len(self), self._rows()
        samples = samples or max(10 * n, _FEWEST_SAMPLES)
        if max_iter < 1 or samples < 1 or lr <= 0 or batch_size_source < 1 or batch_size_target < 1:
            raise ValueError("max_iter, samples, lr and the batch sizes must be above 0")
        lr = lr * y.square().mean().sqrt().item()
        if self.source == "normal" and y.shape[1] > n:  # only the span of the targets counts, and N(0, I) looks alike
            y = torch.linalg.qr(y.mT)[1].mT.contiguous()
        about = {"n": n, "d": y.shape[1], "samples": samples, "lr": round(lr, 9), "seed": seed, "patience": patience}
        about |= {"decays": decays, "sum": round(float(self.targets.double().abs().sum()), 6), "source": self.source}
        zero = torch.zeros(n, dtype=torch.float64, device=y.device)
        unfinished = Checkpoint(checkpoint, "fit", about)
        found = unfinished.read()
        state = _Fit.of(found) if found else _Fit(zero, zero, zero, zero, zero)

        def gradient(h: torch.Tensor, count: int, number: int) -> torch.Tensor:
            generator = torch.Generator().manual_seed(seed * 1000003 + number)
            hits = torch.zeros(n, dtype=torch.float64, device=y.device)
            for start in range(0, count, batch_size_source):
                x = self._draw(min(batch_size_source, count - start), y.shape[1], generator, y)
                hits += torch.bincount(best_cells(x, y, h.to(y), 1, batch_size_target)[1][:, 0], minlength=n)
            return hits / count - self.weights

        with tqdm(total=max_iter, initial=state.iteration, desc="optimal transport", disable=not progress) as bar:
            while state.iteration < max_iter and not state.done:
                _iterate(state, gradient, samples, lr, tolerance, patience, decays, self.weights)
                if state.iteration % 50 == 0 or state.done:
                    unfinished.write(state.tensors())
                bar.update()
                if on_iteration is not None:
                    on_iteration(state.iteration)
        # a single gradient is noise below 1 / sqrt(samples): the candidates are compared on much more of it
        candidates = [state.best, state.h, state.total / max(state.since, 1)]
        norms = [gradient(h, 4 * samples << state.decays, -1).norm().item() for h in candidates]
        best = candidates[norms.index(min(norms))]
        self.h, self._angles = (best - best.mean()).to(y.dtype), None
        return self

    def _require_fit(self) -> torch.Tensor:
        if self.h is None:
            raise RuntimeError("the transport has no heights yet: call fit(), or load a saved one")
        return self.h

    def cells(self, x: torch.Tensor, topk: int = 1, angle_threshold: float = 0.7) -> tuple[torch.Tensor, torch.Tensor]:
        """Indices and weights `[batch, k]` of the targets that noise is sent to.

        Args:
            x: Noise `[batch, ...]`.
            topk: 1 for the map itself; more mixes the best cells, where their hyperplanes do not meet at an angle of
                a mode boundary.
            angle_threshold: In [0, 1]: largest angle, between the smallest (0) and the largest (1) of neighbours.
        """
        h, y = self._require_fit(), self._rows()
        if x.shape[1:] != self.targets.shape[1:]:
            raise ValueError(f"noise of shape {tuple(x.shape)} for targets of shape {tuple(self.targets.shape)}")
        if not 1 <= topk < len(self):
            raise ValueError(f"topk is {topk}; with {len(self)} targets it must be 1 to {len(self) - 1}")
        rows = x.flatten(1).to(y)
        if topk == 1:
            places = best_cells(rows, y, h.to(y))[1]
            return places, torch.ones_like(places, dtype=y.dtype)
        values, places = best_cells(rows, y, h.to(y), topk + 1)
        low, high = self._angle_range(y)
        theta = (normal_angles(self.targets.flatten(1).to(y), places[:, :-1]) - low) / (high - low)
        keep = torch.cat([torch.ones_like(theta[:, :1]), (theta <= angle_threshold).to(theta)], 1)
        return places[:, :-1], extension_weights(values, keep)

    def _angle_range(self, y: torch.Tensor) -> tuple[float, float]:
        """Smallest and largest angle between neighbouring cells; from fixed noise, so that a batch does not matter."""
        if self._angles is None:
            x = self._draw(2000, y.shape[1], torch.Generator().manual_seed(0), y)
            theta = normal_angles(self.targets.flatten(1).to(y), best_cells(x, y, self.h.to(y), 2)[1])
            self._angles = theta.min().item(), max(theta.max().item(), theta.min().item() + 1e-12)
        return self._angles

    def map(self, x: torch.Tensor, topk: int = 1, angle_threshold: float = 0.7) -> torch.Tensor:
        """T(x): the targets that noise `[batch, ...]` is sent to; arguments as for `cells`."""
        places, weights = self.cells(x, topk, angle_threshold)
        chosen = self.targets[places]
        return (weights.to(chosen).reshape(*places.shape, *[1] * (chosen.ndim - 2)) * chosen).sum(1)

    def masses(self, count: int = 10**6, seed: int = 1, batch_size: int = 4000) -> torch.Tensor:
        """Share of fresh noise in every cell, `[n]`."""
        h, y = self._require_fit(), self._rows()
        generator, hits = torch.Generator().manual_seed(seed), torch.zeros(len(y), dtype=torch.float64)
        for start in range(0, count, batch_size):
            x = self._draw(min(batch_size, count - start), y.shape[1], generator, y)
            hits += torch.bincount(best_cells(x, y, h.to(y))[1][:, 0], minlength=len(y)).cpu()
        return hits / count

    def start(
        self, noise: torch.Tensor, level: Level, generator: torch.Generator | None = None, topk: int = 1
    ) -> torch.Tensor:
        """Latents at `level` for starting noise of variance 1.

        Where `level` is noisier than the targets, and where targets are mixed, the missing noise is added: this is
        what makes pictures differ that are sent to the same target.

        Raises:
            ValueError: The targets have no level, or are noisier than `level`.
        """
        if self.level is None:
            raise ValueError("the targets have no noise level: make them with from_latents, or pass `level`")
        (alpha, sigma), (a, s) = self.level, level
        if a <= 0 or math.log(a / s) > math.log(alpha / sigma) + _SAME_LEVEL:
            raise ValueError(
                f"the targets have sigma / alpha {sigma / alpha:.4g}, the run starts at {s / max(a, 1e-12):.4g}: "
                "start at the level of the targets or a noisier one, or make targets for this model and start"
            )
        if self.source != "normal":
            raise ValueError("starting noise is normal: a transport from uniform noise does not fit it")
        places, weights = self.cells(noise, topk)
        chosen = self.targets[places].to(noise.device)
        weights = weights.to(chosen).reshape(*places.shape, *[1] * (chosen.ndim - 2))
        mixed, held = (weights * chosen).sum(1) * (a / alpha), (a / alpha * sigma) ** 2 * weights.square().sum(1)
        missing = (s**2 - held).clamp(min=0).sqrt() * (s**2 - held > 2 * _SAME_LEVEL * s**2)
        fresh = torch.randn(noise.shape, generator=generator, dtype=chosen.dtype).to(chosen.device)
        return (mixed + missing * fresh).to(noise.dtype)

    def save(self, path: str | Path) -> None:
        """Write a safetensors file with targets, weights and heights."""
        tensors = {"targets": self.targets, "weights": self.weights, "h": self._require_fit()}
        level = None if self.level is None else list(self.level)
        write_tensors(path, tensors, {"format": _FORMAT, "source": self.source, "level": json.dumps(level)})

    @classmethod
    def load(cls, path: str | Path) -> SemiDiscreteOT:
        """Read a file of `save`; names, shapes and sizes are checked before anything is allocated.

        Raises:
            ValueError: Not such a file, or its tensors do not fit together.
        """
        names = ("targets", "weights", "h")
        with safe_open(path, "pt") as file:
            header = file.metadata() or {}
            if header.get("format") != _FORMAT or set(file.keys()) != set(names):
                raise ValueError(f"{path} holds no transport: make one with SemiDiscreteOT(...).fit().save(path)")
            _check_shapes(*(tuple(file.get_slice(name).get_shape()) for name in names))
            targets, weights, h = (file.get_tensor(name) for name in names)
        level = json.loads(header["level"])
        return cls(targets, weights, header["source"], None if level is None else tuple(level), h)


def _check_shapes(targets: tuple, weights: tuple, h: tuple) -> None:
    if len(targets) < 2 or targets[0] < 2:
        raise ValueError(f"targets need the shape [n, ...] with n >= 2, got {targets}")
    if weights != targets[:1] or h != targets[:1]:
        raise ValueError(f"{targets[0]} targets need as many weights and heights, got {weights} and {h}")
    require_size("targets", *targets)


def _iterate(state: _Fit, gradient: Callable, samples: int, lr: float, tolerance, patience, decays, weights) -> None:
    g = gradient(state.h, samples << state.decays, state.iteration)
    norm, empty = g.norm().item(), bool((g + weights == 0).any())
    if norm < state.lowest:
        state.lowest, state.best, state.bad = norm, state.h, 0  # the heights that were measured, not the next ones
    else:
        state.bad += 1
    state.total, state.since = state.total + state.h, state.since + 1
    state.done = norm < tolerance and not empty
    if state.bad > patience and state.decays == decays:
        state.done = True
    elif state.bad > patience:
        state.decays, state.bad, state.lowest = state.decays + 1, 0, math.inf
        state.total, state.since = torch.zeros_like(state.total), 0
    if not state.done:
        state.h, state.m, state.v = adam_step(state.h, state.m, state.v, g, lr * 0.8**state.decays)
    state.iteration += 1


# --- starting a run -----------------------------------------------------------------------------------------------


@register(
    MethodRecord(
        slug="dpm-ot",
        family="schedulers",
        kind="tool",
        title="DPM-OT: A New Diffusion Probabilistic Model Based on Optimal Transport",
        arxiv="2307.11308",
        summary="Only the last steps of any sampler, begun at stored noisy latents that optimal transport chooses.",
        targets=("any",),
        predictions=("epsilon", "v_prediction", "sample", "flow_prediction"),
        nodes=("DXOTFit", "DXOTStartLatent"),
        claim=Claim(
            text="Function evaluations of a high-quality sample",
            setting="unconditional pictures, 32 x 32 and larger, abstract",
            value=10,
            unit="evaluations, about",
        ),
    )
)
class OTStart:
    """Calls a pipeline from the middle of its grid, on latents that a transport has chosen.

    Paper: https://arxiv.org/abs/2307.11308

    Args:
        pipe: Pipeline of the Stable Diffusion or Flux layout with any scheduler but PNDM.
        ot: Fitted transport to noisy latents of this model.
        start_timestep: Timestep to begin at, one of those that the scheduler will visit. At the level of the targets
            they are taken as they are; at a noisier one noise is added.
        topk: Targets to mix, see `SemiDiscreteOT.cells`.

    Example:
        >>> pipe.scheduler.set_timesteps(20)
        >>> t = pipe.scheduler.timesteps[-10]
        >>> ot = SemiDiscreteOT.from_latents(latents, OTStart.level_of(pipe.scheduler, t)).fit()
        >>> images = OTStart(pipe, ot, t)("a red circle", num_inference_steps=20).images

    Limits: with a deterministic sampler, targets at the start level and `topk=1` there are only as many different
    pictures as targets, near copies of what these were made from. Use a stochastic sampler, or start at a noisier
    level than that of the targets. Targets belong to a prompt (or class) like the pictures they were made from.
    """

    def __init__(self, pipe, ot: SemiDiscreteOT, start_timestep: float, topk: int = 1):
        self.pipe, self.ot, self.start_timestep, self.topk = pipe, ot, float(start_timestep), topk

    @staticmethod
    def level_of(scheduler, timestep: float) -> Level:
        """(alpha, sigma) of a timestep, in the scaling of the scheduler's samples."""
        return level_of_timestep(scheduler, timestep)

    def latents(
        self, noise: torch.Tensor, generator: torch.Generator | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Latents at the start and the timesteps that are left, for a loop of your own; call `set_timesteps` first.

        Args:
            noise: Starting noise `[batch, ...]` of variance 1.
            generator: Of the noise that is added.
        """
        timesteps = begin_at(self.pipe.scheduler, self._step(self.pipe.scheduler))
        return self._latents(self.pipe.scheduler, noise, generator), timesteps

    def _latents(self, scheduler, noise: torch.Tensor, generator: torch.Generator | None) -> torch.Tensor:
        return self.ot.start(noise, node_levels(scheduler)[self._step(scheduler)], generator, self.topk)

    def _step(self, scheduler) -> int:
        times = scheduler.timesteps[:: scheduler.order].double().cpu()
        gaps = (times - self.start_timestep).abs()
        if gaps.min() > 1e-3 * max(1.0, self.start_timestep):
            raise ValueError(
                f"timestep {self.start_timestep:g} is not in the schedule; it has "
                f"{', '.join(f'{t:g}' for t in times.tolist())}"
            )
        return int(gaps.argmin())

    def __call__(self, prompt=None, *, num_inference_steps: int = 50, **kwargs):
        """Call the pipeline; arguments and result are the pipeline's.

        Args:
            prompt: As the pipeline takes it.
            num_inference_steps: Steps of the whole grid, of which those from `start_timestep` on are made.
            kwargs: Other arguments. `latents` is starting noise; `generator` also draws the noise that is added.
        """
        generator = kwargs.get("generator")
        generator = generator[0] if isinstance(generator, list) else generator

        def start(scheduler, noise: torch.Tensor) -> torch.Tensor:
            return self._latents(scheduler, noise, generator)

        return call_from(self.pipe, start, self._step, prompt, num_inference_steps, **kwargs)


def start_native(ot: SemiDiscreteOT, sampling, sigma: torch.Tensor, noise: torch.Tensor, seed: int, topk: int = 1):
    """Latents of a ComfyUI model at `sigma`, scaled so that its samplers take them without added noise."""
    level = native_level(sampling, sigma)
    generator = torch.Generator().manual_seed(seed + 1)
    return ot.start(noise, level, generator, topk) / level[0]
