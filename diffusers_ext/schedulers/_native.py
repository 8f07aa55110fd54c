"""Driving a solver from ComfyUI: a model function `(x, sigma) -> denoised` on a list of noise levels.

ComfyUI's samples are x = alpha * x0 + sigma * noise with alpha = 1 (Stable Diffusion layouts) or alpha = 1 - sigma
(flow matching). Nothing here imports ComfyUI.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from ..prediction import NoiseSchedule


LAST_FLOW_SIGMA = 1 - 1e-6  # pure noise has log-SNR -inf, which no exponential integrator can start from


def model_sampling_of(model):
    """ComfyUI's `model_sampling` behind the model function of a sampler; None for a plain function."""
    for name in ("inner_model", "inner_model", "model_sampling"):
        model = getattr(model, name, None)
    return model


def is_flow(sampling) -> bool:
    """Whether ComfyUI adds noise as flow matching does."""
    return any(c.__name__ == "CONST" for c in type(sampling).__mro__)


def native_schedule(sampling) -> NoiseSchedule:
    """Noise levels of a ComfyUI model in this package's terms: discrete VP, flow, or continuous (VE)."""
    if is_flow(sampling):
        return NoiseSchedule("flow")
    sigmas = getattr(sampling, "sigmas", None)
    if sigmas is None or type(sampling).__name__.find("Continuous") >= 0:
        return NoiseSchedule("ve")
    table = -torch.log(sigmas.detach().double().cpu())
    return NoiseSchedule("vp", table, len(table))


def check_sigmas(sigmas: torch.Tensor) -> list[float]:
    """Noise levels of a run as floats.

    Raises:
        ValueError: Fewer than two levels, or not strictly descending to a last level >= 0.
    """
    values = [float(s) for s in sigmas.detach().double().cpu()]
    if len(values) < 2:
        raise ValueError(f"sigmas holds {len(values)} noise levels; a sampler needs at least 2 (one step)")
    if any(b >= a for a, b in zip(values, values[1:])) or values[-1] < 0 or not math.isfinite(values[0]):
        raise ValueError(f"sigmas must descend strictly to a last value >= 0, got {[round(v, 4) for v in values]}")
    return values


class NativeRun:
    """One run of a ComfyUI model: calls it, reports progress, watches for NaN without waiting for the device.

    Args:
        model: The function a KSAMPLER hands to its sampler.
        x: Sample at the first noise level.
        sigmas: 1-D noise levels, descending; the last may be 0.
        extra_args, callback: As ComfyUI passes them.

    Attributes:
        levels: `(alpha, sigma)` floats of every node; flow models start no nearer than 1e-6 to pure noise.
        schedule: Noise levels of the model.
    """

    def __init__(self, model: Callable, x: torch.Tensor, sigmas: torch.Tensor, extra_args=None, callback=None):
        sampling = model_sampling_of(model)
        self._model, self._extra, self._callback = model, extra_args or {}, callback
        self._bad: list[torch.Tensor] = []
        self.flow = is_flow(sampling)
        self.schedule = native_schedule(sampling)
        self.sigmas = check_sigmas(sigmas)
        if self.flow and self.sigmas[0] > 1:
            raise ValueError(f"noise levels of a flow model lie in [0, 1], got {self.sigmas[0]}")
        self.levels = [self.level(s) for s in self.sigmas]
        self.steps = len(self.sigmas) - 1
        self._ones = x.new_ones(x.shape[0])

    def level(self, sigma: float) -> tuple[float, float]:
        """`(alpha, sigma)` of ComfyUI's samples at a noise level."""
        sigma = min(sigma, LAST_FLOW_SIGMA) if self.flow else sigma
        return (1 - sigma if self.flow else 1.0), sigma

    def sigma_at(self, log_snr: float) -> float:
        """ComfyUI's noise level at log(alpha / sigma)."""
        return 1 / (1 + math.exp(log_snr)) if self.flow and log_snr < 700 else math.exp(-log_snr)

    @property
    def rhos(self) -> list[float]:
        """sigma / alpha of every node."""
        return [sigma / alpha for alpha, sigma in self.levels]

    def denoised(self, x: torch.Tensor, sigma: float) -> torch.Tensor:
        """The model's clean sample; one call."""
        x0 = self._model(x, sigma * self._ones, **self._extra)
        self._bad.append(~torch.isfinite(x0.detach()).all())
        return x0

    def noise(self, x: torch.Tensor, sigma: float) -> tuple[torch.Tensor, torch.Tensor]:
        """`(noise, clean sample)`; one call."""
        alpha, sigma = self.level(sigma)
        x0 = self.denoised(x, sigma)
        return (x - alpha * x0) / sigma, x0

    def report(self, i: int, x: torch.Tensor, x0: torch.Tensor) -> None:
        """Tell ComfyUI about step `i`: progress, previews, interruption."""
        if self._callback is not None:
            sigma = self.sigmas[i]
            self._callback({"x": x, "i": i, "sigma": sigma, "sigma_hat": sigma, "denoised": x0})

    def finish(self, x: torch.Tensor) -> torch.Tensor:
        """The result, once it is known that no model output was NaN or infinite.

        Raises:
            RuntimeError: One was; names the call.
        """
        bad = torch.stack(self._bad)
        if bad.any():
            call = int(bad.int().argmax()) + 1
            raise RuntimeError(
                f"the model returned NaN or infinity in call {call} of {len(bad)}: try a higher precision, a lower "
                "guidance scale or other noise levels"
            )
        return x
