"""Metrics against closed forms."""

from __future__ import annotations

import math

import pytest
import torch

from diffusers_ext.eval import frechet_distance, mean_psnr, psnr, relative_error, ssim


def test_psnr_of_a_known_error():
    a = torch.zeros(3, 3, 8, 8)
    b = a + torch.tensor([0.0, 0.02, 0.2]).reshape(3, 1, 1, 1)
    assert psnr(a, b).tolist() == pytest.approx([math.inf, 40.0, 20.0])
    assert mean_psnr(a, b) == pytest.approx(10 * math.log10(4 / ((0.02**2 + 0.2**2) / 3)))
    assert psnr(a, b, data_range=1.0)[1].item() == pytest.approx(40 - 20 * math.log10(2))


def test_ssim_closed_forms():
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(2, 3, 32, 32, generator=generator, dtype=torch.float64)
    assert ssim(x, x).tolist() == pytest.approx([1.0, 1.0])
    flat = torch.full((1, 1, 16, 16), 0.5)
    c1 = 0.01**2
    expected = (2 * 0.5 * 0.25 + c1) / (0.5**2 + 0.25**2 + c1)
    assert ssim(flat, flat / 2, data_range=1.0).item() == pytest.approx(expected)
    worse = [ssim(x + s * torch.randn(x.shape, generator=generator, dtype=x.dtype), x).mean() for s in (0.05, 0.2, 1)]
    assert worse == sorted(worse, reverse=True)


def test_relative_error():
    reference = torch.tensor([3.0, 4.0])
    assert relative_error(torch.tensor([3.0, 4.5]), reference) == pytest.approx(0.1)


def _whitened(n, d, seed):
    """Features with sample mean exactly 0 and sample covariance exactly 1."""
    x = torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    x = x - x.mean(0)
    return x @ torch.linalg.inv(torch.linalg.cholesky(torch.cov(x.T))).T


def test_frechet_distance_of_gaussians():
    x = _whitened(500, 6, seed=0)
    scale = torch.arange(1, 7, dtype=torch.float64)
    shift = torch.linspace(-1, 1, 6, dtype=torch.float64)
    assert frechet_distance(x, x) == pytest.approx(0, abs=1e-9)
    assert frechet_distance(x, x + shift) == pytest.approx(shift.square().sum().item())
    other = _whitened(400, 6, seed=1) * scale + shift
    expected = (shift.square() + (scale - 1) ** 2).sum().item()
    assert frechet_distance(x, other) == pytest.approx(expected)
    assert frechet_distance(other, x) == pytest.approx(expected)


def test_frechet_distance_with_covariances_that_do_not_commute():
    generator = torch.Generator().manual_seed(3)
    m = torch.randn(4, 4, generator=generator, dtype=torch.float64)
    a, b = _whitened(300, 4, 4) * torch.tensor([1.0, 2, 3, 4]), _whitened(300, 4, 5) @ m
    cov_a, cov_b = torch.cov(a.T), torch.cov(b.T)
    eigenvalues = torch.linalg.eigvals(cov_a @ cov_b).real
    expected = (cov_a.trace() + cov_b.trace() - 2 * eigenvalues.sqrt().sum()).item()
    assert frechet_distance(a, b) == pytest.approx(expected)


def test_fewer_samples_than_dimensions_is_finite():
    x = torch.randn(5, 20, generator=torch.Generator().manual_seed(0))
    assert frechet_distance(x, x) == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda: psnr(torch.zeros(1, 3, 8, 8), torch.zeros(1, 3, 8, 9)), "shapes differ"),
        (lambda: psnr(torch.zeros(3, 8, 8), torch.zeros(3, 8, 8)), "accepted"),
        (lambda: ssim(torch.zeros(1, 1, 8, 8), torch.zeros(1, 1, 8, 8)), "11 x 11"),
        (lambda: frechet_distance(torch.zeros(4, 2), torch.zeros(4, 3)), "dimensions"),
        (lambda: frechet_distance(torch.zeros(1, 2), torch.zeros(4, 2)), "n >= 2"),
    ],
)
def test_errors_say_what_is_accepted(call, words):
    with pytest.raises(ValueError, match=words):
        call()
