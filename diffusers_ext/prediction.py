"""Noise levels and conversions between what denoisers predict. Pure functions, any float dtype.

A noisy sample is `x = alpha * x0 + sigma * noise`. Variance preserving (VP): alpha^2 + sigma^2 = 1. Flow matching:
alpha = 1 - sigma. Variance exploding (VE, also ComfyUI's EPS models): alpha = 1.

`alpha` and `sigma` broadcast against the sample: pass tensors already shaped for it (see `expand`), or numbers.
"""

from __future__ import annotations

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
