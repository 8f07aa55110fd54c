"""Distances between pictures, latents and sets of features. Pure functions."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def _same_shape(a: torch.Tensor, b: torch.Tensor) -> None:
    if a.shape != b.shape:
        raise ValueError(f"shapes differ: {tuple(a.shape)} and {tuple(b.shape)}; give two tensors of one shape")


def _pictures(a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    _same_shape(a, b)
    if a.ndim != 4:
        raise ValueError(f"pictures have shape {tuple(a.shape)}; accepted: (n, channels, height, width)")
    return a.double(), b.double()


def psnr(images: torch.Tensor, reference: torch.Tensor, data_range: float = 2.0) -> torch.Tensor:
    """Peak signal-to-noise ratio in dB of each picture, 10 log10(range^2 / MSE); `inf` for equal pictures.

    Args:
        images: Shape `(n, channels, height, width)`.
        reference: Same shape.
        data_range: Largest minus smallest possible value; 2 for pictures in [-1, 1].

    Returns:
        Shape `(n,)`, float64.
    """
    a, b = _pictures(images, reference)
    mse = (a - b).square().flatten(1).mean(1)
    return 10 * torch.log10(data_range**2 / mse)


def mean_psnr(images: torch.Tensor, reference: torch.Tensor, data_range: float = 2.0) -> float:
    """PSNR of the mean squared error over all pictures: one equal picture does not make it infinite."""
    a, b = _pictures(images, reference)
    return float(10 * torch.log10(data_range**2 / (a - b).square().mean()))


def _gaussian_window(size: int, sigma: float) -> torch.Tensor:
    x = torch.arange(size, dtype=torch.float64) - (size - 1) / 2
    g = torch.exp(-x.square() / (2 * sigma**2))
    g = g / g.sum()
    return g[:, None] * g[None, :]


def ssim(images: torch.Tensor, reference: torch.Tensor, data_range: float = 2.0) -> torch.Tensor:
    """Structural similarity of each picture (Wang et al. 2004: 11 x 11 Gaussian window, sigma 1.5), 1 for equal.

    Args:
        images: Shape `(n, channels, height, width)`, sides of at least 11.
        reference: Same shape.
        data_range: Largest minus smallest possible value.

    Returns:
        Shape `(n,)`, float64.
    """
    a, b = _pictures(images, reference)
    if min(a.shape[-2:]) < 11:
        raise ValueError(f"pictures are {a.shape[-2]} x {a.shape[-1]}; ssim needs at least 11 x 11")
    window = _gaussian_window(11, 1.5).to(a.device).expand(a.shape[1], 1, 11, 11)

    def mean(x: torch.Tensor) -> torch.Tensor:
        return F.conv2d(x, window, groups=x.shape[1])

    mu_a, mu_b = mean(a), mean(b)
    var_a, var_b = mean(a * a) - mu_a**2, mean(b * b) - mu_b**2
    cov = mean(a * b) - mu_a * mu_b
    c1, c2 = (0.01 * data_range) ** 2, (0.03 * data_range) ** 2
    score = (2 * mu_a * mu_b + c1) * (2 * cov + c2) / ((mu_a**2 + mu_b**2 + c1) * (var_a + var_b + c2))
    return score.flatten(1).mean(1)


def relative_error(value: torch.Tensor, reference: torch.Tensor) -> float:
    """`||value - reference|| / ||reference||` over all elements: the usual error of latents."""
    _same_shape(value, reference)
    reference = reference.double()
    return float((value.double() - reference).norm() / reference.norm())


def _moments(features: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    if features.ndim != 2 or features.shape[0] < 2:
        raise ValueError(f"features have shape {tuple(features.shape)}; accepted: (n, dimensions) with n >= 2")
    features = features.double()
    return features.mean(0), torch.cov(features.T).reshape(features.shape[1], features.shape[1])


def frechet_distance(features_a: torch.Tensor, features_b: torch.Tensor) -> float:
    """Frechet distance of Gaussians fitted to two sets of features (FID when they are Inception features).

    |mu_a - mu_b|^2 + tr(C_a + C_b - 2 (C_a^1/2 C_b C_a^1/2)^1/2). It shrinks as sets grow: compare equal sizes only.

    Args:
        features_a: Shape `(n, dimensions)`, n >= 2.
        features_b: Shape `(m, dimensions)`, m >= 2.
    """
    mu_a, cov_a = _moments(features_a)
    mu_b, cov_b = _moments(features_b)
    if mu_a.shape != mu_b.shape:
        raise ValueError(f"features have {mu_a.shape[0]} and {mu_b.shape[0]} dimensions; give equal ones")
    values, vectors = torch.linalg.eigh(cov_a)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    cross = torch.linalg.eigvalsh(root @ cov_b @ root).clamp(min=0).sqrt().sum()
    return float((mu_a - mu_b).square().sum() + cov_a.trace() + cov_b.trace() - 2 * cross)
