"""BDIA on ComfyUI's model functions: sampling, inversion to a pair, and sampling from a pair.

Discrete models are solved in their own VP space, as in diffusers: the two-step formula is not the same in another one.
"""

from __future__ import annotations

import math

import torch

from ._native import NativeRun
from .bdia import _check_gamma, bdia_inverse_step, bdia_step


class _Path:
    """A run in the model's own space: levels, scales from ComfyUI's samples to it, and predictions in float64."""

    def __init__(self, model, x, sigmas, extra_args, callback):
        self.run = NativeRun(model, x, sigmas, extra_args, callback)
        self.dtype = x.dtype
        vp = self.run.schedule.family == "vp"
        self.scales = [1 / math.sqrt(1 + s * s) if vp else 1.0 for _, s in self.run.levels]
        self.levels = [(a * c, s * c) for (a, s), c in zip(self.run.levels, self.scales)]

    def start(self, x: torch.Tensor, i: int) -> torch.Tensor:
        return x.double() * self.scales[i]

    def end(self, z: torch.Tensor, i: int) -> torch.Tensor:
        return (z / self.scales[i]).to(self.dtype)

    def predict(self, z: torch.Tensor, i: int, step: int):
        """Clean sample and noise at node `i`; at noise level 0 those of a model call just above it."""
        alpha, sigma = self.levels[i]
        if sigma == 0:
            lowest = self._lowest()
            scale = 1 / math.sqrt(1 + lowest * lowest) if self.run.schedule.family == "vp" else 1.0
            eps, x0 = self.run.noise((z / scale).to(self.dtype), lowest)
            self.run.report(step, (z / scale).to(self.dtype), x0)
            return z, eps.double()
        x = self.end(z, i)
        x0 = self.run.denoised(x, self.run.levels[i][1])
        self.run.report(step, x, x0)
        x0 = x0.double()
        return x0, (z - alpha * x0) / sigma

    def _lowest(self) -> float:
        table = self.run.schedule.table
        return math.exp(-table[0].item()) if table is not None else min(1e-3, self.run.sigmas[-2] / 2)


def sample_bdia(model, x, sigmas, extra_args=None, callback=None, disable=None, gamma: float = 1.0, pair=None):
    """BDIA-DDIM as a ComfyUI sampler.

    Args:
        model, x, sigmas, extra_args, callback, disable: As ComfyUI passes them.
        gamma: In [0, 1]; 0 is DDIM.
        pair: `(noisy, less_noisy)` of `invert_bdia` on the same sigmas, to begin with instead of `x`.
    """
    _check_gamma(gamma, invert=pair is not None)
    path = _Path(model, x, sigmas, extra_args, callback)
    older, z, first = None, path.start(x, 0), 0
    if pair is not None:
        older, z, first = pair[0].to(x.device), pair[1].to(x.device), 1
    for i in range(first, path.run.steps):
        x0, e = path.predict(z, i, i)
        z, older = bdia_step(x0, e, older, path.levels[i - 1], path.levels[i + 1], gamma), z
    return path.run.finish(path.end(z, path.run.steps))


def invert_bdia(model, x, sigmas, extra_args=None, callback=None, gamma: float = 1.0):
    """The pair `(noisy, less_noisy)`, in float64 and in the model's own space, that leads to the clean sample `x`.

    Args:
        model, extra_args, callback: As ComfyUI passes them.
        x: Sample at the last of `sigmas`.
        sigmas: Descending, as for sampling.
        gamma: In (0, 1].
    """
    _check_gamma(gamma, invert=True)
    path = _Path(model, x, sigmas, extra_args, callback)
    n = path.run.steps
    older, z = None, path.start(x, n)
    for i in range(n, 0, -1):
        x0, e = path.predict(z, i, n - i)
        cleaner = path.levels[i + 1] if i < n else None
        z, older = bdia_inverse_step(x0, e, older, cleaner, path.levels[i - 1], gamma), z
    path.run.finish(z)
    return z, older
