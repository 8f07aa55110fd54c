"""Analytical teleportation: the early part of sampling in closed form, without calling the model.

Near pure noise the score is that of a Gaussian with the mean and covariance of the data, whose probability-flow ODE
has an exact solution; see `GaussianTeleport`.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import safe_open

from ..prediction import NoiseSchedule
from ..registry import Claim, MethodRecord, register
from ._checkpoint import require_size, write_tensors
from ._pictures import encode
from ._start import Level, begin_at, call_from, draw_latents, level_of_timestep, native_level, node_levels


__all__ = ["GaussianStatistics", "GaussianTeleport", "teleport_call"]

logger = logging.getLogger(__name__)

_FORMAT = "diffusers-ext Gaussian statistics"
_MOST_MODES = 256


# --- the solution -------------------------------------------------------------------------------------------------
# Data ~ N(mu, U diag(l) U^T); U [d, r] has orthonormal columns, the variance of all other directions is 0. Samples are
# x = alpha x0 + sigma noise, flattened to [batch, d]; a level is (alpha, sigma).


def spread(l: torch.Tensor, level: Level) -> torch.Tensor:
    """Standard deviation sqrt(sigma^2 + alpha^2 l) of noisy samples along the modes, `[r]`."""
    alpha, sigma = level
    return (sigma**2 + alpha**2 * l).sqrt()


def propagate(y: torch.Tensor, U: torch.Tensor, l: torch.Tensor, source: Level, target: Level) -> torch.Tensor:
    """K(t, t') y: where a deviation `y` `[batch, d]` at level `source` has gone at level `target`.

    K = (sigma_t / sigma_t') (I - U U^T) + U diag(sqrt((sigma_t^2 + alpha_t^2 l) / (sigma_t'^2 + alpha_t'^2 l))) U^T.
    """
    rest = target[1] / source[1]
    c = y @ U
    return rest * y + ((spread(l, target) / spread(l, source) - rest) * c) @ U.mT


def solve_gaussian(
    x: torch.Tensor, mu: torch.Tensor, U: torch.Tensor, l: torch.Tensor, source: Level, target: Level
) -> torch.Tensor:
    """The exact probability-flow ODE from level `source` to `target`, for `x` `[batch, d]` and `mu` `[d]`.

    Raises:
        ValueError: `source` has no noise, so that the directions without variance hold no information.
    """
    if source[1] <= 0:
        raise ValueError(f"the start level (alpha, sigma) is {source}: sigma must be above 0")
    return target[0] * mu + propagate(x - source[0] * mu, U, l, source, target)


def gaussian_denoised(x: torch.Tensor, mu: torch.Tensor, U: torch.Tensor, l: torch.Tensor, level: Level):
    """E[x0 | x] = mu + sum_k xi_k u_k (u_k . (x - alpha mu)) with xi_k = alpha l_k / (sigma^2 + alpha^2 l_k)."""
    alpha, _ = level
    xi = alpha * l / spread(l, level) ** 2
    return mu + (xi * ((x - alpha * mu) @ U)) @ U.mT


def plane_share(states: torch.Tensor, components: int = 2) -> torch.Tensor:
    """Share of a trajectory's variance in its leading principal components: near 1 if it is a rotation in a plane.

    Args:
        states: `[steps, batch, ...]`, at least 2 steps.
        components: How many components.

    Returns:
        `[batch]` in [0, 1].
    """
    paths = states.flatten(2).transpose(0, 1)
    values = torch.linalg.svdvals(paths - paths.mean(1, keepdim=True)).square()
    return values[:, :components].sum(1) / values.sum(1)


# --- statistics ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class GaussianStatistics:
    """Mean and leading principal components of clean latents, as the scheduler sees them.

    Make them with `from_latents`, `from_images` or `from_pipeline`. Guidance and the prompt belong to the statistics:
    take latents of one prompt, drawn with the guidance you sample with, and then the mean alone (`rank=0`): guidance
    pushes samples away from what the covariance of its own pictures describes.

    Args:
        mu: Mean, of the shape of one latent.
        U: `[d, r]`, orthonormal columns over the flattened latent; r = 0 is a teleport by the mean alone.
        l: `[r]` variances along them.
        metadata: What they were computed from, strings.
    """

    mu: torch.Tensor
    U: torch.Tensor
    l: torch.Tensor
    metadata: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _check_shapes(tuple(self.mu.shape), tuple(self.U.shape), tuple(self.l.shape))

    @property
    def rank(self) -> int:
        """Number of components."""
        return len(self.l)

    @classmethod
    def from_latents(
        cls,
        latents: torch.Tensor,
        rank: int | None = None,
        shrinkage: float = 0.0,
        metadata: dict[str, str] | None = None,
    ) -> GaussianStatistics:
        """Statistics of clean latents.

        Args:
            latents: `[n, ...]`, n >= 2, scaled as the denoiser takes them (times `vae.config.scaling_factor`; packed
                for Flux).
            rank: Components to keep, 0 to n - 1. Default: n / 10, at most 256; more are not well determined.
            shrinkage: In [0, 1): draws the variances towards their mean, for few samples.
            metadata: Notes to keep.

        Raises:
            ValueError: Too few or too large latents, NaN among them, `rank` or `shrinkage` out of range.
        """
        n, d = len(latents), latents[:1].numel()
        if n < 2 or d == 0:
            raise ValueError(f"statistics need at least 2 latents, got {tuple(latents.shape)}")
        most = min(n - 1, d)
        rank = min(n // 10, _MOST_MODES, most) if rank is None else rank
        if not 0 <= rank <= most:
            raise ValueError(f"rank is {rank}; {n} latents of {d} numbers determine 0 to {most} components")
        if not 0 <= shrinkage < 1:
            raise ValueError(f"shrinkage is {shrinkage}; it must lie in [0, 1)")
        require_size("latents", n, d)
        if rank > n / 10:
            logger.warning("%d components of %d latents are uncertain: use %d latents or more", rank, n, 10 * rank)
        rows = latents.detach().flatten(1).double()
        if not torch.isfinite(rows).all():
            raise ValueError("the latents contain NaN or infinity")
        mu = rows.mean(0)
        _, s, V = torch.linalg.svd(rows - mu, full_matrices=False)
        l = s[:rank].square() / (n - 1)
        l = l + shrinkage * (l.mean() - l) if rank else l
        kept = torch.promote_types(latents.dtype, torch.float32)
        about = {"num_samples": str(n), "shrinkage": str(shrinkage), **(metadata or {})}
        return cls(mu.reshape(latents.shape[1:]).to(kept), V[:rank].mT.contiguous().to(kept), l.to(kept), about)

    @classmethod
    @torch.no_grad()
    def from_images(cls, pipe, images, batch_size: int = 16, **options) -> GaussianStatistics:
        """Statistics of pictures (PIL, or tensor `[n, 3, h, w]` in [-1, 1]); `options` of `from_latents`."""
        parts = [encode(pipe, images[i : i + batch_size])[0].cpu() for i in range(0, len(images), batch_size)]
        return cls.from_latents(torch.cat(parts), **options)

    @classmethod
    def from_pipeline(
        cls, pipe, prompts: Sequence[str], num_samples: int, rank: int | None = None, shrinkage: float = 0.0, **options
    ) -> GaussianStatistics:
        """Statistics of what a pipeline draws.

        Args:
            pipe: A text-to-image pipeline with the scheduler to draw with.
            prompts: What to draw; one prompt gives statistics of that prompt.
            num_samples: Latents to draw, ten times `rank` or more.
            rank, shrinkage: Of `from_latents`.
            options: `num_inference_steps`, `batch_size`, `seed`, `checkpoint` (a file to go on from after an
                interruption), `progress`, `on_batch`, and arguments of the pipeline such as `guidance_scale`.

        Example:
            >>> statistics = GaussianStatistics.from_pipeline(pipe, ["a red circle"], 200, guidance_scale=3.0)
            >>> statistics.save("red-circle.safetensors")
        """
        latents = draw_latents(pipe, prompts, num_samples, **options)
        about = {"prompts": json.dumps(list(prompts)[:8]), "guidance_scale": str(options.get("guidance_scale", ""))}
        return cls.from_latents(latents, rank, shrinkage, about)

    def save(self, path: str | Path) -> None:
        """Write a safetensors file with tensors mu, U, l and the metadata in its header."""
        header = {"format": _FORMAT, "about": json.dumps(self.metadata)}
        write_tensors(path, {"mu": self.mu, "U": self.U, "l": self.l}, header)

    @classmethod
    def load(cls, path: str | Path) -> GaussianStatistics:
        """Read a file of `save`; names, shapes and sizes are checked before anything is allocated.

        Raises:
            ValueError: Not such a file, or its tensors do not fit together.
        """
        with safe_open(path, "pt") as file:
            header = file.metadata() or {}
            if header.get("format") != _FORMAT or set(file.keys()) != {"mu", "U", "l"}:
                raise ValueError(f"{path} holds no Gaussian statistics: make them with GaussianStatistics.save")
            _check_shapes(*(tuple(file.get_slice(name).get_shape()) for name in ("mu", "U", "l")))
            return cls(*(file.get_tensor(name) for name in ("mu", "U", "l")), json.loads(header.get("about", "{}")))

    def solve(self, x: torch.Tensor, source: Level, target: Level) -> torch.Tensor:
        """Samples `x` `[batch, ...]` at level `source` carried to level `target`; same shape and dtype."""
        return self._on_rows(solve_gaussian, x, source, target)

    def denoised(self, x: torch.Tensor, level: Level) -> torch.Tensor:
        """The clean sample that the Gaussian predicts for `x` at a level."""
        return self._on_rows(gaussian_denoised, x, level)

    def propagate(self, deviation: torch.Tensor, source: Level, target: Level) -> torch.Tensor:
        """Where a change of the sample at level `source` has gone at level `target`."""
        return self._on_rows(lambda y, mu, U, l, *levels: propagate(y, U, l, *levels), deviation, source, target)

    def emergence(self) -> torch.Tensor:
        """Log-SNR log(alpha / sigma) at which every component is half decided, alpha^2 l = sigma^2; `[r]`."""
        return -0.5 * torch.log(self.l)

    def agreement(self, denoised: torch.Tensor, x: torch.Tensor, level: Level) -> tuple[float, float]:
        """How well the Gaussian score describes a network at one level.

        Args:
            denoised: The network's clean samples for `x`.
            x: Samples `[batch, ...]` at `level`.
            level: (alpha, sigma).

        Returns:
            Cosine of the two scores, and the mean square error relative to the network's score.
        """
        ours, theirs = (level[0] * x0 - x for x0 in (self.denoised(x, level), denoised))
        cosine = torch.nn.functional.cosine_similarity(ours.flatten(1), theirs.flatten(1)).mean()
        return cosine.item(), ((ours - theirs).square().sum() / theirs.square().sum()).item()

    def _on_rows(self, function: Callable, x: torch.Tensor, *levels: Level) -> torch.Tensor:
        if x.shape[1:] != self.mu.shape:
            raise ValueError(
                f"the statistics are of latents of shape {tuple(self.mu.shape)}, these have {tuple(x.shape[1:])}: "
                "compute statistics for this model and picture size"
            )
        work = torch.promote_types(x.dtype, torch.float32)
        mu, U, l = (v.to(x.device, work) for v in (self.mu.flatten(), self.U, self.l))
        return function(x.flatten(1).to(work), mu, U, l, *levels).reshape(x.shape).to(x.dtype)


def _check_shapes(mu: tuple, U: tuple, l: tuple) -> None:
    d = math.prod(mu)
    if not mu or len(U) != 2 or len(l) != 1 or (d, l[0]) != U or l[0] > d:
        raise ValueError(
            f"statistics need mu of a latent's shape, U [d, r] and l [r] with r <= d, got mu {mu}, U {U} and l {l}"
        )
    require_size("statistics", *U)


# --- teleport -----------------------------------------------------------------------------------------------------


@register(
    MethodRecord(
        slug="painters-teleport",
        family="schedulers",
        kind="tool",
        title="Diffusion Models Generate Images Like Painters: an Analytical Theory of Outline First, Details Later",
        arxiv="2303.02490",
        summary="Skip the first quarter of any sampler's steps: the Gaussian of your latents gives them for free.",
        targets=("any",),
        predictions=("epsilon", "v_prediction", "sample", "flow_prediction"),
        nodes=("DXGaussianStatsFromLatents", "DXAnalyticTeleport"),
        claim=Claim(
            text="Steps replaced by the closed form without loss of quality",
            setting="the author's follow-up on unconditional 64 x 64 models, upper end of 20 to 30 %",
            value=30,
            unit="% of the steps",
        ),
    )
)
class GaussianTeleport:
    """Carries starting noise to the middle of a scheduler's grid without calling the model.

    Paper: https://arxiv.org/abs/2303.02490. `teleport_call` does everything for a pipeline; this class is for loops of
    your own.

    Args:
        statistics: `GaussianStatistics` of the clean latents, or one for each batch item.
        scheduler: Any scheduler of diffusers or this package except PNDM, after `set_timesteps`. Samples in VP,
            sigma (Euler, Heun, EDM) and flow scaling are told apart.

    Example:
        >>> scheduler.set_timesteps(40)
        >>> latents, timesteps = GaussianTeleport(statistics, scheduler).teleport(torch.randn(1, 4, 16, 16), 10)
        >>> for t in timesteps:
        ...     noise = unet(scheduler.scale_model_input(latents, t), t, prompt_embeds).sample
        ...     latents = scheduler.step(noise, t, latents).prev_sample

    Limits: right as long as the data look like one Gaussian through the noise, about the first quarter of the steps;
    prompts that differ much need statistics of their own. Directions without variance in the statistics only shrink
    with the noise.
    """

    def __init__(self, statistics: GaussianStatistics | Sequence[GaussianStatistics], scheduler):
        self.statistics, self.scheduler = statistics, scheduler

    def teleport(self, noise: torch.Tensor, to_index: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Latents at step `to_index` of the grid, and the timesteps that are left; the scheduler begins there.

        Args:
            noise: Starting noise `[batch, ...]` of variance 1, as pipelines take it; `init_noise_sigma` is applied.
            to_index: Steps to skip, 0 to their number - 1.

        Raises:
            ValueError: `to_index` is outside the grid, or the latents do not fit the statistics.
            RuntimeError: The scheduler has no grid, or is in the middle of a run.
        """
        levels = node_levels(self.scheduler)
        timesteps = begin_at(self.scheduler, to_index)
        x = noise * float(getattr(self.scheduler, "init_noise_sigma", 1.0))
        return self._solve(x, levels[0], levels[int(to_index)]), timesteps

    def solution(self, x_T: torch.Tensor, t: float) -> torch.Tensor:
        """The solution at timestep `t` that starts from the scheduler's sample `x_T` at its first step."""
        return self._solve(x_T, node_levels(self.scheduler)[0], level_of_timestep(self.scheduler, t))

    def emergence_timesteps(self) -> torch.Tensor:
        """Timestep at which every component of the statistics is half decided, noisiest first; `[r]`."""
        if not isinstance(self.statistics, GaussianStatistics):
            raise ValueError("emergence_timesteps needs one set of statistics, not one for each batch item")
        return NoiseSchedule.from_scheduler(self.scheduler).timestep(self.statistics.emergence().double())

    def _solve(self, x: torch.Tensor, source: Level, target: Level) -> torch.Tensor:
        if isinstance(self.statistics, GaussianStatistics):
            return self.statistics.solve(x, source, target)
        if len(self.statistics) != len(x):
            raise ValueError(f"{len(self.statistics)} statistics for {len(x)} latents: give one, or one per latent")
        return torch.cat([s.solve(row[None], source, target) for s, row in zip(self.statistics, x)])


def teleport_call(
    pipe,
    prompt=None,
    *,
    statistics: GaussianStatistics | Sequence[GaussianStatistics],
    skip_steps: int,
    num_inference_steps: int = 50,
    **kwargs,
):
    """Call a pipeline without its first steps: they are replaced by the closed form.

    Args:
        pipe: Pipeline of the Stable Diffusion or Flux layout with any scheduler but PNDM.
        prompt: As the pipeline takes it.
        statistics: Of the clean latents, or one for each picture.
        skip_steps: Steps to leave out, about a quarter of `num_inference_steps`.
        num_inference_steps: Steps of the whole grid.
        kwargs: Other arguments of the pipeline. `latents` is starting noise, as always.

    Returns:
        What the pipeline returns.

    Raises:
        ValueError: `skip_steps` is outside the grid, or the statistics are of other latents.

    Example:
        >>> images = teleport_call(pipe, "a red circle", statistics=statistics, skip_steps=10, num_inference_steps=40)
    """

    def start(scheduler, noise: torch.Tensor) -> torch.Tensor:
        return GaussianTeleport(statistics, scheduler).teleport(noise, skip_steps)[0]

    return call_from(pipe, start, skip_steps, prompt, num_inference_steps, **kwargs)


def teleport_native(statistics: GaussianStatistics, sampling, noise: torch.Tensor, sigmas: torch.Tensor, skip: int):
    """Latents of a ComfyUI model at `sigmas[skip]`, scaled so that its samplers take them without added noise.

    Args:
        statistics: Of clean latents as the model sees them.
        sampling: The model's `model_sampling`.
        noise: Starting noise of variance 1.
        sigmas: Noise levels of the whole run.
        skip: Steps to leave out, from 1 up.
    """
    if not 0 < skip < len(sigmas) - 1:
        raise ValueError(f"skip is {skip}; with {len(sigmas) - 1} steps it must be 1 to {len(sigmas) - 2}")

    source, target = native_level(sampling, sigmas[0]), native_level(sampling, sigmas[skip])
    pure = float(sigmas[0]) >= float(sampling.sigma_max) * (1 - 1e-5)  # ComfyUI's own test
    first, clean = sigmas[:1].double().cpu(), torch.zeros_like(noise, dtype=torch.float64)
    x = sampling.noise_scaling(first, noise.double(), clean, pure)
    return (statistics.solve(x, source, target) / target[0]).to(noise.dtype)
