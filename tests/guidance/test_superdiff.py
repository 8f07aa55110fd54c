"""SuperDiff against exact scores: mode fractions, density estimates, equal density, and the weights' algebra."""

from __future__ import annotations

import math

import pytest
import torch

from diffusers_ext.guidance.superdiff import (
    NoiseStep,
    Superposition,
    divergence,
    guided,
    kappa_and,
    kappa_equal,
    log_density_step,
    log_density_step_ode,
)
from diffusers_ext.guidance.superdiff_scheduler import SuperDiffEulerScheduler, noise_step
from diffusers_ext.prediction import from_x0
from diffusers_ext.zoo.analytic import GaussianMixture


UP = GaussianMixture([[-1.5, 1.5], [1.5, 1.5]], variances=0.16)
DOWN = GaussianMixture([[-1.5, -1.5], [1.5, -1.5]], variances=0.16)
LEFT = GaussianMixture([[-2.0, 0.0]], variances=0.25)
EVERYTHING = GaussianMixture([[-1.5, 1.5], [1.5, 1.5], [-1.5, -1.5], [1.5, -1.5]], variances=0.16)
MODES = torch.cat([UP.means, DOWN.means])


def karras(steps: int) -> list[float]:
    scheduler = SuperDiffEulerScheduler(prediction_type="flow_prediction", sigma_min=0.02, sigma_max=80.0)
    scheduler.set_timesteps(steps)
    return [float(s / (1 - s)) for s in scheduler.sigmas]


def sample(models, mix: Superposition, steps: int, n: int = 2000, seed: int = 0, unconditional=None, final_noise=True):
    """Run `mix` over exact denoisers from sigma 80 to 0; returns x `[n, 2]`."""
    generator, sigmas = torch.Generator().manual_seed(seed), karras(steps)
    x = sigmas[0] * torch.randn(n, 2, generator=generator, dtype=torch.float64)
    for i, (sigma, after) in enumerate(zip(sigmas, sigmas[1:])):
        noise = torch.randn(n, 2, generator=generator, dtype=torch.float64)
        step = NoiseStep(x, noise, sigma, after, "epsilon", False, i, steps, final_noise)
        v = torch.stack([m.noise(x, 1.0, sigma) for m in models])
        v_u = None if unconditional is None else unconditional.noise(x, 1.0, sigma)
        x = step.moved(step.dx(guided(v, v_u, mix.weigh(step, v, v_u), mix.guidance_scale)))
    return x


def far_and_fractions(x: torch.Tensor) -> tuple[float, torch.Tensor]:
    distance, nearest = torch.cdist(x, MODES).min(1)
    return (distance > 1.2).double().mean().item(), torch.bincount(nearest, minlength=4) / len(x)


def exact_gap(x: torch.Tensor) -> torch.Tensor:
    return UP.log_density(x) - DOWN.log_density(x)


@pytest.fixture(scope="module")
def runs():
    """x and mix of every operation at 100 and 1000 steps."""
    results = {}
    for operation in ("or", "and", "average"):
        for steps in (100, 1000):
            mix = Superposition(2, operation, guidance_scale=1.0)
            results[operation, steps] = (sample((UP, DOWN), mix, steps), mix)
    return results


@pytest.mark.parametrize("steps", [100, 1000])
def test_or_samples_the_mixture(runs, steps):
    far, fractions = far_and_fractions(runs["or", steps][0])
    assert far < 0.03
    # 2000 samples: one standard deviation of a fraction is 0.01
    assert (fractions - 0.25).abs().max() < 0.03


def test_average_is_not_the_mixture(runs):
    assert far_and_fractions(runs["average", 1000][0])[0] > 0.5


def estimate_error(run) -> float:
    x, mix = run
    final = mix.log_likelihoods[..., -1]
    return (final[0] - final[1] - exact_gap(x)).abs().median().item()


def test_ito_estimate_converges_to_the_exact_densities(runs):
    assert estimate_error(runs["or", 1000]) < 0.2
    assert estimate_error(runs["or", 1000]) < estimate_error(runs["or", 100]) / 4


def test_the_other_sign_of_the_square_is_wrong():
    """With + |d| ||v||^2 / sigma, as in the published OR branch, the estimate does not converge."""
    steps, generator, sigmas = 400, torch.Generator().manual_seed(0), karras(400)
    x = sigmas[0] * torch.randn(1000, 2, generator=generator, dtype=torch.float64)
    right, wrong = torch.zeros(2, 1000, dtype=torch.float64), torch.zeros(2, 1000, dtype=torch.float64)
    for i, (sigma, after) in enumerate(zip(sigmas, sigmas[1:])):
        noise = torch.randn(1000, 2, generator=generator, dtype=torch.float64)
        step = NoiseStep(x, noise, sigma, after, "epsilon", False, i, steps)
        v = torch.stack([m.noise(x, 1.0, sigma) for m in (UP, DOWN)])
        dx = step.dx(v[0])
        right += log_density_step(dx, v, sigma, step.d)
        wrong += log_density_step(dx, v, sigma, step.d) + 2 * abs(step.d) / sigma * (v**2).sum(-1)
        x = step.moved(dx)
    errors = [((log_q[0] - log_q[1]) - exact_gap(x)).abs().median().item() for log_q in (right, wrong)]
    assert errors[0] < 0.5
    assert errors[1] > 20 * errors[0]


def test_and_finds_equal_density(runs):
    x, mix = runs["and", 1000]
    assert x[:, 1].abs().mean() < 0.02
    assert exact_gap(x).abs().median() < 0.1
    final = mix.log_likelihoods[..., -1]
    assert (final[0] - final[1]).abs().max() < 0.1
    assert exact_gap(runs["average", 1000][0]).abs().median() > 4


@pytest.mark.parametrize("final_noise", [True, False])
def test_lift_is_the_final_difference(final_noise):
    mix = Superposition(2, "and", guidance_scale=1.0, lift=3.0)
    x = sample((UP, DOWN), mix, 300, n=500, final_noise=final_noise)
    final = mix.log_likelihoods[..., -1]
    assert (final[1] - final[0] - 3.0).abs().max() < 1e-6
    assert (-exact_gap(x)).median().item() == pytest.approx(3.0, abs=0.5)


def test_or_bias_chooses_the_first_model():
    x = sample((UP, DOWN), Superposition(2, "or", 1.0, logp=1000.0), 100)
    assert (x[:, 1] > 0).double().mean() > 0.99


def test_or_follows_unequal_odds():
    mix = Superposition(2, "or", 1.0, logp=math.log(3))
    x = sample((UP, DOWN), mix, 200)
    assert (x[:, 1] > 0).double().mean().item() == pytest.approx(0.75, abs=0.04)


def test_or_with_three_models():
    mix = Superposition(3, "or", 1.0)
    x = sample((UP, DOWN, LEFT), mix, 200)
    nearest = torch.cdist(x, torch.cat([MODES, LEFT.means])).argmin(1)
    fractions = torch.bincount(nearest, minlength=5) / len(x)
    assert fractions[:2].sum().item() == pytest.approx(1 / 3, abs=0.05)
    assert fractions[2:4].sum().item() == pytest.approx(1 / 3, abs=0.05)


def test_and_with_three_models_equalises_all():
    """Three isotropic Gaussians of one width in the plane: equal density at the circumcentre."""
    corners = [GaussianMixture([m], variances=0.2) for m in ([0.0, 0.0], [2.0, 0.0], [0.0, 2.0])]
    mix = Superposition(3, "and", 1.0)
    x = sample(corners, mix, 300, n=300)
    spread = mix.log_likelihoods[..., -1]
    assert (spread.max(0).values - spread.min(0).values).max() < 1e-6
    assert (x - 1.0).abs().max() < 0.05


def test_two_model_closed_form_equals_the_linear_system():
    generator = torch.Generator().manual_seed(1)
    v, noise, v_u = (torch.randn(*s, 5, 7, generator=generator).double() for s in ((2,), (), ()))
    offset = torch.tensor([0.0, 0.3], dtype=torch.float64)
    kappa = kappa_and(v, v_u, noise, 2.0, -0.1, 4.0, offset)
    dx = -0.2 * guided(v, v_u, kappa, 4.0) + noise
    change = log_density_step(dx, v, 2.0, -0.1)
    torch.testing.assert_close(change[1] - change[0], torch.full((5,), 0.3, dtype=torch.float64))
    # the same through the K-model branch, with a third model that changes nothing: weights are not unique, dx is
    three = torch.stack([v[0], (v[0] + v[1]) / 2, v[1]])
    target = torch.stack([(-0.2 * guided(v, None, kappa, 1.0) * (m - v[1])).sum(-1) for m in three[:2]])
    solved = kappa_equal(three, None, 1.0, -0.2, 0.0, target)
    torch.testing.assert_close(guided(three, None, solved, 1.0), guided(v, None, kappa, 1.0))
    torch.testing.assert_close(solved.sum(0), torch.ones(5, dtype=torch.float64))


@pytest.mark.parametrize("operation", ["or", "and", "average"])
@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.parametrize("guidance", [1.0, 5.0])
def test_equal_models_are_the_plain_sampler_bitwise(operation, count, guidance):
    mix = Superposition(count, operation, guidance)
    unconditional = None if guidance == 1 else EVERYTHING
    x = sample([UP] * count, mix, 30, n=50, unconditional=unconditional)
    assert mix.kappas.isfinite().all()
    torch.testing.assert_close(mix.kappas, torch.full_like(mix.kappas, 1 / count))

    scheduler = SuperDiffEulerScheduler(sigma_min=0.02, sigma_max=80.0)
    scheduler.set_timesteps(30)
    scheduler.sigmas = torch.tensor(karras(30), dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    plain = karras(30)[0] * torch.randn(50, 2, generator=generator, dtype=torch.float64)
    for t, sigma in zip(scheduler.timesteps, karras(30)):
        v = UP.noise(plain, 1.0, sigma)
        if unconditional is not None:
            v_u = unconditional.noise(plain, 1.0, sigma)
            v = v_u + guidance * (v - v_u)
        plain = scheduler.step(v, t, plain, generator).prev_sample
    assert torch.equal(x, plain)


@pytest.mark.parametrize("operation", ["or", "and", "average"])
def test_epsilon_v_and_flow_models_agree(operation):
    """One exact model in three parametrisations: the same trajectory, seen in VE coordinates."""
    ends = {}
    for prediction in ("epsilon", "v_prediction", "flow_prediction"):
        scheduler = SuperDiffEulerScheduler(prediction_type=prediction, sigma_min=0.02, sigma_max=80.0)
        scheduler.set_timesteps(60)
        generator = torch.Generator().manual_seed(0)
        x = 80.0 * torch.randn(40, 2, generator=generator, dtype=torch.float64)
        state = x / 81.0 if scheduler.flow else x
        mix = Superposition(2, operation, 2.0)
        for i in range(60):
            noise = torch.randn(40, 2, generator=generator, dtype=torch.float64)
            step = noise_step(scheduler, i, state, noise)
            alpha = 1 / (1 + step.sigma) if scheduler.flow else 1 / math.sqrt(1 + step.sigma**2)
            z = step.model_input
            models = (UP, DOWN, EVERYTHING)
            outputs = [
                from_x0(m.denoise(z, alpha, alpha * step.sigma), z, alpha, alpha * step.sigma, prediction)
                for m in models
            ]
            v = step.epsilon(torch.stack(outputs))
            kappa = mix.weigh(step, v[:2], v[2])
            state = step.moved(step.dx(guided(v[:2], v[2], kappa, 2.0)))
        ends[prediction] = (state, mix.log_likelihoods)
    for prediction in ("v_prediction", "flow_prediction"):
        for got, expected in zip(ends[prediction], ends["epsilon"]):
            torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-6)


def run_ode(steps: int, exact_divergence: bool):
    generator, sigmas = torch.Generator().manual_seed(0), karras(steps)
    x = 80.0 * torch.randn(300, 2, generator=generator, dtype=torch.float64)
    mix = Superposition(2, "and_ode", 1.0)
    for i, (sigma, after) in enumerate(zip(sigmas, sigmas[1:])):
        step = NoiseStep(x, torch.zeros_like(x), sigma, after, "epsilon", False, i, steps)
        probes = [torch.tensor([1.0, s], dtype=torch.float64).expand_as(x) for s in (1.0, -1.0)]
        if not exact_divergence:
            probes = [torch.randn(x.shape, generator=generator, dtype=torch.float64).sign()]
        pairs = [[divergence(lambda y, m=m, s=sigma: m.noise(y, 1.0, s), x, p) for p in probes] for m in (UP, DOWN)]
        v = torch.stack([p[0][0] for p in pairs])
        div = torch.stack([torch.stack([d for _, d in p]).mean(0) for p in pairs])
        kappa = mix.weigh_ode(step, v, None, div)
        x = step.moved(step.d * guided(v, None, kappa, 1.0))
    return x, mix


def test_deterministic_and_finds_equal_density():
    x, mix = run_ode(120, exact_divergence=True)
    final = mix.log_likelihoods[..., -1]
    assert (final[0] - final[1]).abs().max() < 1e-6
    assert exact_gap(x).abs().median() < 0.3
    noisy, _ = run_ode(120, exact_divergence=False)
    assert noisy[:, 1].abs().mean() < 0.2


def test_ode_density_matches_the_exact_one():
    """Along the probability flow of UP itself, the estimated gain is log p_0 - log p_80, constant included."""
    sigmas, x = karras(800), 80.0 * torch.randn(50, 2, generator=torch.Generator().manual_seed(0)).double()
    start, gain = UP.log_density(x, 1.0, sigmas[0]), 0.0
    for sigma, after in zip(sigmas[:-1], sigmas[1:-1]):
        probes = [torch.tensor([1.0, s], dtype=torch.float64).expand_as(x) for s in (1.0, -1.0)]
        pairs = [divergence(lambda y, s=sigma: UP.noise(y, 1.0, s), x, p) for p in probes]
        v = pairs[0][0]
        div = (pairs[0][1] + pairs[1][1]) / 2
        gain = gain + log_density_step_ode(v, v[None], div[None], sigma, after - sigma)[0]
        x = x + (after - sigma) * v
    torch.testing.assert_close(gain, UP.log_density(x, 1.0, sigmas[-2]) - start, atol=0.3, rtol=0)


def test_no_final_noise_ends_on_the_denoised_state():
    x = torch.randn(4, 3, dtype=torch.float64)
    vf = torch.randn(4, 3, dtype=torch.float64)
    step = NoiseStep(x, torch.randn_like(x), 0.5, 0.0, "epsilon", False, 9, 10, final_noise=False)
    torch.testing.assert_close(step.moved(step.dx(vf)), x - 0.5 * vf)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"operation": "xor"}, "unknown operation 'xor'"),
        ({"operation": "ad"}, "Did you mean 'and'"),
        ({"num_models": 1}, "two or more"),
        ({"temperature": 0.0}, "temperature"),
        ({"logp": [0.0, 1.0, 2.0]}, "logp"),
        ({"num_models": 3, "lift": 1.0}, "lift"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        Superposition(**{"num_models": 2, **settings})


def test_half_precision_state_and_batch_independence():
    """fp16 states keep their dtype; log densities are float64; a batch equals its rows."""
    generator = torch.Generator().manual_seed(0)
    x, noise = (torch.randn(3, 4, 4, 4, generator=generator) for _ in range(2))
    outputs = torch.randn(3, 3, 4, 4, 4, generator=generator)

    def one(rows, dtype=torch.float32):
        mix = Superposition(2, "and", 3.0)
        step = NoiseStep(x[rows].to(dtype), noise[rows], 1.5, 1.3, "v_prediction")
        v = step.epsilon(outputs[:, rows].to(dtype))
        return step.moved(step.dx(guided(v[:2], v[2], mix.weigh(step, v[:2], v[2]), 3.0))), mix.log_likelihoods

    whole, log_q = one(slice(0, 3))
    rows = [one(slice(i, i + 1)) for i in range(3)]
    torch.testing.assert_close(whole, torch.cat([r[0] for r in rows]))
    torch.testing.assert_close(log_q, torch.cat([r[1] for r in rows], 1))
    half, log_half = one(slice(0, 3), torch.float16)
    assert half.dtype == torch.float16
    assert log_half.dtype == torch.float64
    torch.testing.assert_close(half.float(), whole, atol=5e-2, rtol=1e-2)
