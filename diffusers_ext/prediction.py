"""Noise levels and conversions between what denoisers predict. Pure functions, any float dtype.

A noisy sample is `x = alpha * x0 + sigma * noise`. Variance preserving (VP): alpha^2 + sigma^2 = 1. Flow matching:
alpha = 1 - sigma. Variance exploding (VE, also ComfyUI's EPS models): alpha = 1.

`alpha` and `sigma` broadcast against the sample: pass tensors already shaped for it (see `expand`), or numbers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch


Prediction = Literal["epsilon", "v_prediction", "sample", "flow_prediction"]
PREDICTIONS: tuple[str, ...] = get_args(Prediction)


def _require(prediction: str) -> None:
    if prediction not in PREDICTIONS:
        raise ValueError(f"prediction_type is {prediction!r}; accepted: {', '.join(PREDICTIONS)}")


def expand(level: torch.Tensor, sample: torch.Tensor) -> torch.Tensor:
    """View noise levels of shape `(batch,)` or `()` so that they broadcast against `sample`."""
    return level.reshape(level.shape + (1,) * (sample.ndim - level.ndim))


def log_snr(alpha: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
    """Half the log signal-to-noise ratio, lambda = log(alpha / sigma); +inf at sigma 0."""
    return torch.log(alpha) - torch.log(sigma)


def vp_from_ve(sigma_ve: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """VP `(alpha, sigma)` with the signal-to-noise ratio of VE noise level `sigma_ve` = sigma / alpha."""
    alpha = torch.rsqrt(1 + sigma_ve**2)
    return alpha, sigma_ve * alpha


def flow_from_ve(sigma_ve: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Flow `(alpha, sigma)` with the signal-to-noise ratio of VE noise level `sigma_ve`."""
    alpha = 1 / (1 + sigma_ve)
    return alpha, sigma_ve * alpha


def to_x0(output: torch.Tensor, x: torch.Tensor, alpha, sigma, prediction: Prediction) -> torch.Tensor:
    """Clean sample from a model output at `x = alpha * x0 + sigma * noise`.

    `v_prediction` is v = alpha * noise - sigma * x0 with alpha^2 + sigma^2 = 1; `flow_prediction` is
    v = noise - x0 with alpha = 1 - sigma.
    """
    _require(prediction)
    if prediction == "sample":
        return output
    if prediction == "epsilon":
        return (x - sigma * output) / alpha
    if prediction == "v_prediction":
        return alpha * x - sigma * output
    return x - sigma * output


def to_noise(output: torch.Tensor, x: torch.Tensor, alpha, sigma, prediction: Prediction) -> torch.Tensor:
    """Noise from a model output; same conventions as `to_x0`."""
    _require(prediction)
    if prediction == "epsilon":
        return output
    if prediction == "sample":
        return (x - alpha * output) / sigma
    if prediction == "v_prediction":
        return sigma * x + alpha * output
    return x + alpha * output


def from_x0(x0: torch.Tensor, x: torch.Tensor, alpha, sigma, prediction: Prediction) -> torch.Tensor:
    """Model output of type `prediction` that means clean sample `x0`; the inverse of `to_x0` (needs sigma > 0)."""
    _require(prediction)
    if prediction == "sample":
        return x0
    if prediction == "epsilon":
        return (x - alpha * x0) / sigma
    if prediction == "v_prediction":
        return (alpha * x - x0) / sigma
    return (x - x0) / sigma


def _interpolate(x: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """Piecewise linear `table` at (fractional) index `x`, extrapolated at the ends; differentiable in `x`."""
    low = x.detach().floor().long().clamp(0, len(table) - 2)
    return table[low] + (x - low) * (table[low + 1] - table[low])


@dataclass(frozen=True)
class NoiseSchedule:
    """The noise levels of a trained model: log-SNR <-> (alpha, sigma) <-> the timestep the model is given.

    Args:
        family: `"vp"` (alpha^2 + sigma^2 = 1), `"flow"` (alpha = 1 - sigma) or `"ve"` (alpha = 1).
        table: Log-SNR of timesteps 0, 1, ..., float64, strictly decreasing; for models trained on discrete steps.
            Without it a flow model gets `num_train_timesteps * sigma` and a VE model EDM's `log(sigma) / 4`.
        num_train_timesteps: Timestep of pure noise in flow models.

    Example:
        >>> schedule = NoiseSchedule.from_betas(torch.linspace(1e-4, 0.02, 1000))
        >>> alpha, sigma = schedule.levels(schedule.log_snr(torch.tensor(500)))
    """

    family: Literal["vp", "flow", "ve"]
    table: torch.Tensor | None = None
    num_train_timesteps: int = 1000

    def __post_init__(self) -> None:
        if self.family not in ("vp", "flow", "ve"):
            raise ValueError(f"noise schedule family is {self.family!r}; accepted: vp, flow, ve")
        if self.family == "vp" and self.table is None:
            raise ValueError("a vp schedule needs `table`: use NoiseSchedule.from_betas or from_alphas_cumprod")

    @classmethod
    def from_betas(cls, betas: torch.Tensor) -> NoiseSchedule:
        """VP schedule of a discrete-time model trained with `betas`."""
        return cls.from_alphas_cumprod(torch.cumprod(1 - betas.double(), 0))

    @classmethod
    def from_alphas_cumprod(cls, alphas_cumprod: torch.Tensor) -> NoiseSchedule:
        """VP schedule from cumulative products; a terminal 0 (zero-SNR schedules) is lifted to 2^-24, as upstream."""
        bar = alphas_cumprod.double().clamp(min=2**-24)
        return cls("vp", 0.5 * (torch.log(bar) - torch.log1p(-bar)), len(bar))

    @classmethod
    def from_scheduler(cls, scheduler) -> NoiseSchedule:
        """The noise levels that a diffusers scheduler (or this package's) describes by its config."""
        config = scheduler.config
        flow = config.get("prediction_type") == "flow_prediction" or config.get("use_flow_sigmas")
        if flow or not (hasattr(scheduler, "alphas_cumprod") or "sigma_data" in config):
            return cls("flow", None, config.num_train_timesteps)
        if "sigma_data" in config:
            return cls("ve")
        return cls.from_alphas_cumprod(scheduler.alphas_cumprod)

    def levels(self, log_snr: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """`(alpha, sigma)` at a log-SNR."""
        if self.family == "vp":
            return torch.sigmoid(2 * log_snr).sqrt(), torch.sigmoid(-2 * log_snr).sqrt()
        if self.family == "flow":
            return torch.sigmoid(log_snr), torch.sigmoid(-log_snr)
        return torch.ones_like(log_snr), torch.exp(-log_snr)

    def log_snr(self, timestep: torch.Tensor) -> torch.Tensor:
        """Log-SNR (float64) at a timestep of the model, fractional ones included."""
        t = torch.as_tensor(timestep, dtype=torch.float64)
        if self.table is not None:
            return _interpolate(t, self.table.to(t.device))
        return -torch.logit(t / self.num_train_timesteps) if self.family == "flow" else -4 * t

    def timestep(self, log_snr: torch.Tensor) -> torch.Tensor:
        """Timestep of the model at a log-SNR, the inverse of `log_snr`."""
        if self.table is None:
            return -log_snr / 4 if self.family == "ve" else self.num_train_timesteps * torch.sigmoid(-log_snr)
        rising = self.table.to(log_snr.device).flip(0)
        high = torch.searchsorted(rising, log_snr.detach().contiguous()).clamp(1, len(rising) - 1)
        share = (log_snr - rising[high - 1]) / (rising[high] - rising[high - 1])
        return len(rising) - high - share
