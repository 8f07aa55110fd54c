"""Empirical model statistics of DPM-Solver-v3: what they are, how they are measured, stored and refined."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import safe_open
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm.auto import tqdm

from ..prediction import NoiseSchedule, Prediction, to_noise
from ._checkpoint import MAX_ELEMENTS, Checkpoint, write_tensors
from ._common import guided_model
from ._native import model_sampling_of, native_schedule
from ._pictures import encode


REDUCTIONS = ("element", "channel", "scalar")
DATA, GRID = 64, 30  # for the shipped models: two minutes on two cores; data matter more than grid points
_FORMAT = "diffusers_ext.ems"


@dataclass(frozen=True, eq=False)
class EMS:
    """Empirical model statistics: curves l, s, b over a uniform grid of log-SNR.

    Args:
        log_snr: `[n + 1]`, increasing, uniform, float64.
        l, s, b: `[n + 1, ...]`; the rest broadcasts against one sample.
        metadata: What they were computed for (guidance scale, data, noise schedule...), strings.
    """

    log_snr: torch.Tensor
    l: torch.Tensor
    s: torch.Tensor
    b: torch.Tensor
    metadata: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _check_shapes(self.log_snr.shape, self.l.shape, self.s.shape, self.b.shape)
        gaps = self.log_snr.diff()
        if not (gaps > 0).all() or (gaps.max() - gaps.min()) > 1e-4 * gaps.mean():
            raise ValueError("the log-SNR grid of the statistics must be uniform and increasing")

    @classmethod
    def constant(cls, low: float, high: float, cells: int, l: float = 1.0, s: float = 0.0, b: float = 0.0) -> EMS:
        """Curves without a model: l=1, s=0, b=0 gives DPM-Solver++ (data form), l=0, s=-1, b=0 the noise form."""
        grid = torch.linspace(low, high, cells + 1, dtype=torch.float64)
        return cls(grid, *(torch.full_like(grid, v) for v in (l, s, b)), {"degenerated": "true"})

    def refined(self, factor: int) -> EMS:
        """The same piecewise linear curves on a grid with `factor` times as many cells."""
        n = len(self.log_snr) - 1
        if (n * factor + 1) * self.l[0].numel() > MAX_ELEMENTS:
            raise ValueError(
                f"{n * factor} cells of statistics of shape {tuple(self.l.shape[1:])} are too large: use fewer steps "
                "or statistics computed with reduce='channel'"
            )
        place = torch.arange(n * factor + 1)
        low = (place // factor).clamp(max=n - 1)
        share = (place - low * factor).double() / factor

        def stretch(curve: torch.Tensor) -> torch.Tensor:
            w = share.reshape(-1, *[1] * (curve.ndim - 1))
            return curve.double()[low] * (1 - w) + curve.double()[low + 1] * w

        return EMS(*(stretch(c) for c in (self.log_snr, self.l, self.s, self.b)), self.metadata)

    def save(self, path: str | Path) -> None:
        """Write a safetensors file with the metadata in its header."""
        tensors = {"lambda": self.log_snr, "l": self.l, "s": self.s, "b": self.b}
        header = {"format": _FORMAT, "version": "1", "config": json.dumps(self.metadata)}
        write_tensors(path, tensors, header)

    @classmethod
    def load(cls, path: str | Path) -> EMS:
        """Read a file of `save`; names, shapes and sizes are checked before anything is allocated.

        Raises:
            ValueError: Not a statistics file, or its tensors do not fit together.
        """
        with safe_open(path, "pt") as file:
            header = file.metadata() or {}
            if header.get("format") != _FORMAT or set(file.keys()) != {"lambda", "l", "s", "b"}:
                raise ValueError(f"{path} is not a statistics file: make one with compute_ems(...).save(path)")
            names = ("lambda", "l", "s", "b")
            _check_shapes(*(tuple(file.get_slice(name).get_shape()) for name in names))
            return cls(*(file.get_tensor(name) for name in names), json.loads(header.get("config", "{}")))


def _check_shapes(grid, l, s, b) -> None:
    if len(grid) != 1 or grid[0] < 3 or not tuple(l) == tuple(s) == tuple(b) or tuple(l[:1]) != tuple(grid):
        raise ValueError(
            f"statistics need a grid of at least 3 points and l, s, b of one shape that begins with its length, got "
            f"lambda {tuple(grid)}, l {tuple(l)}, s {tuple(s)}, b {tuple(b)}"
        )
    if math.prod(l) > MAX_ELEMENTS:
        raise ValueError(f"statistics of shape {tuple(l)} are too large (at most {MAX_ELEMENTS} elements)")


def _smooth_slope(l: torch.Tensor, step: torch.Tensor) -> torch.Tensor:
    """dl/dlambda by differences, averaged over +-5 points of the paper's grids, fewer at the ends.

    On a coarse grid five points would be a good part of the curve: the window is at most +-2 % of the grid.
    """
    slope = torch.gradient(l, spacing=step.item(), dim=0)[0]
    total = torch.cat([torch.zeros_like(slope[:1]), slope.cumsum(0)])
    n, half = torch.arange(len(l)), min(5, len(l) // 50)
    low, high = (n - half).clamp(min=0), (n + half + 1).clamp(max=len(l))
    return (total[high] - total[low]) / (high - low).reshape(-1, *[1] * (l.ndim - 1))


def _least_squares(l, slope, levels, means, products, reduce: Callable) -> tuple[torch.Tensor, torch.Tensor]:
    """s and b from the moments of (sigma eps, x, sigma eps_d): the best fit f' = s f + b (eq. 11).

    alpha f = sigma eps - l x and alpha f' = (l - 1) sigma eps - l' x + sigma eps_d, so every moment of f and f' is a
    combination of theirs.
    """
    alpha = levels[0].reshape(-1, *[1] * (l.ndim - 1))
    of_f = [torch.ones_like(l), -l, torch.zeros_like(l)]
    of_slope = [l - 1, -slope, torch.ones_like(l)]

    def mean(u):
        return reduce(sum(c * m for c, m in zip(u, means))) / alpha

    def product(u, v):
        return reduce(sum(u[i] * v[j] * products[i][j] for i in range(3) for j in range(3))) / alpha**2

    f, df = mean(of_f), mean(of_slope)
    square = product(of_f, of_f)
    variance = square - f**2
    # single-Gaussian data makes f constant: nothing to fit, and 0 / 0
    flat = variance <= 1e-10 * (f**2 + torch.finfo(torch.float64).tiny)
    s = torch.where(flat, 0.0, (product(of_f, of_slope) - f * df) / torch.where(flat, 1.0, variance))
    return s, df - s * f


def _reducer(reduce: str, ndim: int) -> Callable:
    """Average over what the statistics do not distinguish; grid dimension first. Packed tokens have channels last."""
    if reduce == "element":
        return lambda v: v
    kept = {0} if reduce == "scalar" else {0, ndim - 1 if ndim == 3 else 1}
    dims = [d for d in range(ndim) if d not in kept]
    return lambda v: v.mean(dims, keepdim=True) if dims else v


class _Noise:
    """eps(x, lambda) of a model and its directional derivatives."""

    def __init__(self, model: Callable, schedule: NoiseSchedule, prediction: Prediction, estimator: str):
        self.model, self.schedule, self.prediction, self.estimator = model, schedule, prediction, estimator

    def __call__(self, x: torch.Tensor, lam: torch.Tensor, rows: slice) -> torch.Tensor:
        alpha, sigma = (v.to(x) for v in self.schedule.levels(lam))
        output = self.model(x, self.schedule.timestep(lam).to(x), rows)
        return to_noise(output, x, alpha, sigma, self.prediction)

    def along(self, x, lam, dx, dlam: float, rows: slice) -> tuple[torch.Tensor, torch.Tensor]:
        """eps and d eps/dx dx + d eps/dlambda dlam."""
        if self.estimator == "jvp":
            tangents = (dx, torch.tensor(dlam, dtype=lam.dtype, device=lam.device))
            # the fused attention kernels have no forward-mode derivative
            with sdpa_kernel(SDPBackend.MATH):
                return torch.func.jvp(lambda x, lam: self(x, lam, rows), (x, lam), tangents)
        h = 1e-4 if x.dtype == torch.float64 else 1e-2
        plus = self(x + h * dx, lam + h * dlam, rows)
        minus = self(x - h * dx, lam - h * dlam, rows)
        return (plus + minus) / 2, (plus - minus) / (2 * h)


def _moments(noise: _Noise, lam: torch.Tensor, data, z, probe, batch_size: int):
    """At one grid point: diagonal of sigma d eps/dx, means and products of (sigma eps, x, sigma eps_d)."""
    alpha, sigma = (v.to(data) for v in noise.schedule.levels(lam))
    drift = {"vp": sigma**2, "flow": sigma, "ve": torch.zeros_like(sigma)}[noise.schedule.family]
    totals = None
    for start in range(0, len(data), batch_size):
        rows = slice(start, start + batch_size)
        x = alpha * data[rows] + sigma * z[rows]
        eps, pulled = noise.along(x, lam, probe[rows], 0.0, rows)
        _, eps_d = noise.along(x, lam, drift * x - sigma * eps, 1.0, rows)
        u = [v.double() for v in (sigma * eps, x, sigma * eps_d)]
        parts = [(sigma * pulled * probe[rows]).double(), *u, *(u[i] * u[j] for i, j in _PAIRS)]
        sums = torch.stack([p.sum(0) for p in parts])
        totals = sums if totals is None else totals + sums
    return totals / len(data)


_PAIRS = ((0, 0), (0, 1), (0, 2), (1, 1), (1, 2), (2, 2))


def _all_moments(
    noise: _Noise, grid, data, seed: int, batch_size: int, unfinished: Checkpoint, progress, on_grid_point
):
    """`_moments` at every grid point, `[n + 1, 10, ...]`; goes on from what is there."""
    generator = torch.Generator().manual_seed(seed)
    z = torch.randn(data[: (len(data) + 1) // 2].shape, generator=generator, dtype=torch.float64)
    # antithetic: at high noise the mean of z would drown E[f']
    z = torch.cat([z, -z])[: len(data)].to(data)
    probe = torch.randint(0, 2, data.shape, generator=generator).mul(2).sub(1).to(data)
    rows = list(unfinished.read().get("moments", ()))
    first = len(rows)
    for n in tqdm(range(first, len(grid)), "model statistics", len(grid), initial=first, disable=not progress):
        rows.append(_moments(noise, grid[n].to(data.device), data, z, probe, batch_size).cpu())
        unfinished.write({"moments": torch.stack(rows)})
        if on_grid_point is not None:
            on_grid_point(n)
    unfinished.delete()
    return torch.stack(rows)


@torch.no_grad()
def compute_ems(
    model: Callable,
    schedule: NoiseSchedule,
    data: torch.Tensor,
    prediction: Prediction = "epsilon",
    num_grid: int = 120,
    log_snr_range: tuple[float, float] | None = None,
    guidance_scale: float = 1.0,
    reduce: str = "element",
    estimator: str = "jvp",
    batch_size: int = 32,
    seed: int = 0,
    dataset: str = "",
    checkpoint: str | Path | None = None,
    progress: bool = True,
    on_grid_point: Callable[[int], None] | None = None,
) -> EMS:
    """Measure a model's statistics for `DPMSolverV3MultistepScheduler`.

    Every grid point costs two directional derivatives of the model on all data (`"fd"`: four evaluations).
    Ctrl-C, or an exception from `on_grid_point`, stops it at a grid point; with a `checkpoint` the next call goes on
    there.

    Args:
        model: `model(x, timestep, rows)` with guidance inside; `rows` is the slice of `data` that x was made from.
            `diffusers_ext.schedulers._common.guided_model` makes one from a pipeline.
        schedule: Noise levels of the model, e.g. `scheduler.noise_schedule`.
        data: Clean latents `[n, ...]` as the scheduler sees them, n >= 2: about 50 for `"scalar"`, some hundred for
            `"channel"`, a thousand for `"element"`. Too few are worse than no statistics. The arithmetic is in their
            dtype.
        prediction: What the model predicts.
        num_grid: Cells of the grid, 30 to 1200; data before cells.
        log_snr_range: Ends of the grid; default all noise levels of the model.
        guidance_scale: Guidance inside `model`; stored, so that another one can be warned about.
        reduce: One curve per `"element"`, per `"channel"` or a `"scalar"` one.
        estimator: Derivatives by `"jvp"` (forward-mode, exact) or `"fd"` (finite differences, any model).
        batch_size: Data per model call.
        seed: Seed of noise and probes; the same for all grid points.
        dataset: Name of the data, stored.
        checkpoint: safetensors file of the grid points measured so far; deleted at the end.
        progress: Show a progress bar.
        on_grid_point: Called with the index of each finished grid point.

    Returns:
        `EMS`, to be saved with `.save(path)` or given to `scheduler.load_ems`.

    Example:
        >>> ems = compute_ems(model, scheduler.noise_schedule, latents, "v_prediction", reduce="channel")
        >>> scheduler.load_ems(ems)
    """
    if reduce not in REDUCTIONS or estimator not in ("jvp", "fd"):
        raise ValueError(
            f"reduce is {reduce!r} (accepted: {', '.join(REDUCTIONS)}), estimator {estimator!r} (jvp, fd)"
        )
    if len(data) < 2 or num_grid < 10:
        raise ValueError(f"statistics need at least 2 data points and 10 cells, got {len(data)} and {num_grid}")
    if 12 * (num_grid + 1) * data[0].numel() > 4 * MAX_ELEMENTS:
        raise ValueError(
            f"{num_grid} cells for data of shape {tuple(data.shape[1:])} are too large: use a smaller grid"
        )
    grid = torch.linspace(*(log_snr_range or log_snr_span(schedule)), num_grid + 1, dtype=torch.float64)
    noise = _Noise(model, schedule, prediction, estimator)
    about = {"guidance_scale": guidance_scale, "dataset": dataset, "num_data": len(data), "prediction": prediction}
    about |= {"family": schedule.family, "estimator": estimator, "seed": seed}
    own = {"grid": grid.tolist(), "data": data.double().sum().item()}
    unfinished = Checkpoint(checkpoint, "statistics", {**about, **own})
    measured = _all_moments(noise, grid, data, seed, batch_size, unfinished, progress, on_grid_point)
    average = _reducer(reduce, data.ndim)
    diagonal, *moments = measured.unbind(1)
    l = average(diagonal)
    pairs = dict(zip(_PAIRS, moments[3:]))
    products = [[pairs[min(i, j), max(i, j)] for j in range(3)] for i in range(3)]
    slope = _smooth_slope(l, grid[1] - grid[0])
    s, b = _least_squares(l, slope, schedule.levels(grid), moments[:3], products, average)
    return EMS(grid, l, s, b, {k: str(v) for k, v in {**about, "reduce": reduce}.items()})


def log_snr_span(schedule: NoiseSchedule) -> tuple[float, float]:
    """Log-SNR at the noisiest and the cleanest level of a model.

    Discrete models: their last and first timestep; flow: sigma 0.999 and 0.001; EDM: sigma 80 and 0.002.
    """
    if schedule.table is not None:
        return schedule.table[-1].item(), schedule.table[0].item()
    return (-math.log(999), math.log(999)) if schedule.family == "flow" else (-math.log(80), -math.log(0.002))


def calibrate_ems(pipe, latents: torch.Tensor, prompts: Sequence[str], guidance_scale: float = 1.0, **options) -> EMS:
    """Statistics of a text-to-image pipeline.

    Args:
        pipe: Stable Diffusion or Flux layout.
        latents: Clean latents `[n, ...]` as the scheduler sees them (packed for Flux), scaled.
        prompts: One per latent.
        guidance_scale: The one that will be used for sampling.
        options: Of `compute_ems`; `reduce` is `"scalar"` unless given, which fifty latents are enough for.

    Example:
        >>> ems = calibrate_ems(pipe, clean_latents(pipe, images), captions, guidance_scale=3.0)
        >>> pipe.scheduler.load_ems(ems)
    """
    schedule = NoiseSchedule.from_scheduler(pipe.scheduler)
    prediction = "flow_prediction" if schedule.family == "flow" else pipe.scheduler.config.prediction_type
    model = guided_model(pipe, prompts, guidance_scale)
    settings = {"reduce": "scalar", "guidance_scale": guidance_scale, **options}
    return compute_ems(model, schedule, latents, prediction, **settings)


def native_ems(model: Callable, latents: torch.Tensor, extra_args: dict | None = None, **options) -> EMS:
    """Statistics of a ComfyUI model.

    Args:
        model: The function a KSAMPLER hands to its sampler: `(x, sigma, **extra_args) -> denoised`, guidance inside.
        latents: Clean latents as the model sees them.
        extra_args: As ComfyUI passes them.
        options: Of `compute_ems`. The estimator is `"fd"`: ComfyUI runs models in inference mode, without derivatives.
    """
    sampling = model_sampling_of(model)
    schedule = native_schedule(sampling)

    def noise(x: torch.Tensor, timestep: torch.Tensor, rows: slice) -> torch.Tensor:
        alpha, sigma = (v.to(x) for v in schedule.levels(schedule.log_snr(timestep)))
        scale = 1 if schedule.family == "flow" else alpha  # ComfyUI's samples have alpha = 1 unless they are flows
        x0 = model(x / scale, (sigma / scale).expand(len(x)), **(extra_args or {}))
        return (x - alpha * x0) / sigma

    return compute_ems(noise, schedule, latents, "epsilon", estimator="fd", progress=False, **options)


@torch.no_grad()
def clean_latents(pipe, images) -> torch.Tensor:
    """Latents of pictures as the scheduler of a pipeline sees them: scaled, and packed for the Flux layout.

    Args:
        pipe: Stable Diffusion or Flux layout.
        images: PIL pictures of one size, or a tensor `[n, 3, h, w]` in [-1, 1].

    Example:
        >>> latents = clean_latents(pipe, images)
    """
    return encode(pipe, images)[0]
