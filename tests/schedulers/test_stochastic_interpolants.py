"""SDEs of flow models and bridges, against closed forms on Gaussians and mixtures and the authors' step."""

from __future__ import annotations

import math
import subprocess
import sys

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, UNet2DModel

import diffusers_ext
from diffusers_ext import BridgePipeline, Interpolant, StochasticInterpolantScheduler, interpolant_training_loss
from diffusers_ext.schedulers.stochastic_interpolants import advance, flow_plan, flow_score, flow_slope
from diffusers_ext.schedulers.stochastic_interpolants_bridge import GAMMAS, TWO_SIDED, integrate_bridge
from diffusers_ext.schedulers.stochastic_interpolants_native import sample_flow_sde
from diffusers_ext.zoo import analytic


MIX = analytic.GaussianMixture(
    torch.tensor([[-1.0, 0.6], [0.9, 1.0], [0.4, -1.2]]),
    variances=torch.tensor([0.15, 0.3, 0.2]),
    weights=[0.5, 0.3, 0.2],
)


def velocity(x, t):
    """Exact velocity at timestep t, v = (x - E[x0 | x]) / sigma."""
    sigma = torch.as_tensor(t, dtype=torch.float64) / 1000
    return ((x - MIX.denoise(x, 1 - sigma, sigma)) / sigma).to(x.dtype)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def noise(n=6, seed=1, dtype=torch.float64):
    return torch.randn(n, 2, generator=seeded(seed), dtype=dtype)


def drive(scheduler, x, model=velocity, seed=0):
    generator = seeded(seed)
    for t in scheduler.timesteps:
        x = scheduler.step(model(x, t), t, x, generator=generator).prev_sample
    return x


def sampled(n, steps, seed=0, start_seed=1, **options):
    scheduler = StochasticInterpolantScheduler(**options)
    scheduler.set_timesteps(sigmas=torch.linspace(1, 1 / steps, steps).tolist())
    return drive(scheduler, noise(n, start_seed), seed=seed)


# --- the ODE and the score ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"shift": 3.0}, {"use_dynamic_shifting": True}, {"use_karras_sigmas": True}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_scale_zero_is_flow_match_euler_bitwise(options, dtype):
    theirs = FlowMatchEulerDiscreteScheduler(**options)
    ours = StochasticInterpolantScheduler.from_config(theirs.config, diffusion_scale=0.0)
    for scheduler in (theirs, ours):
        scheduler.set_timesteps(13, mu=0.8)
    assert torch.equal(theirs.sigmas, ours.sigmas) and torch.equal(theirs.timesteps, ours.timesteps)
    x = y = noise().to(dtype)
    for t in theirs.timesteps:
        x = theirs.step(velocity(x, t), t, x).prev_sample
        y = ours.step(velocity(y, t), t, y).prev_sample
        assert torch.equal(x, y)


def test_score_identity():
    for sigma in (0.02, 0.3, 0.9, 1.0):
        x, level = 2 * noise(50), torch.tensor(1000 * sigma, dtype=torch.float64)
        score = flow_score(x, velocity(x, level), sigma)
        assert (score - MIX.score(x, 1 - sigma, sigma)).abs().max() < 1e-10 / sigma


def test_slope_is_drift_plus_diffusion_times_score():
    sigma, e, x = 0.4, 0.7, noise()
    v = velocity(x, torch.tensor(400.0, dtype=torch.float64))
    expected = -v + e * MIX.score(x, 1 - sigma, sigma)
    torch.testing.assert_close(flow_slope(x, v, sigma, e / sigma), expected, rtol=1e-12, atol=1e-12)


# --- the same marginals for every diffusion -----------------------------------------------------------------------


def within_three_errors(x, mixture):
    """Mean and covariance of samples, in standard errors from those of the mixture."""
    n, mean = len(x), mixture.mean()
    centred = x - mean
    target = mixture.posterior(torch.zeros(1, *mixture.shape, dtype=torch.float64), 0.0, 1.0).covariance()[0]
    products = centred[:, :, None] * centred[:, None, :]
    mean_off = centred.mean(0) / (x.std(0) / math.sqrt(n))
    cov_off = (products.mean(0) - target) / (products.std(0) / math.sqrt(n))
    return max(mean_off.abs().max().item(), cov_off.abs().max().item()) < 3


@pytest.mark.parametrize("scale", [0.0, 0.25, 0.5, 1.0])
def test_marginals_do_not_depend_on_the_diffusion(scale):
    x = sampled(20_000, 400, diffusion_scale=scale, last_step="denoise")
    assert within_three_errors(x, MIX)


@pytest.mark.parametrize("profile, integrator", [("sigma2", "trapezoid"), ("sin", "heun"), ("constant", "trapezoid")])
def test_marginals_of_the_other_profiles_and_integrators(profile, integrator):
    x = sampled(5_000, 150, diffusion_scale=0.7, diffusion_profile=profile, integrator=integrator)
    assert within_three_errors(x, MIX)


def test_the_wrong_sign_of_the_score_would_be_seen():
    """What the test of the marginals shows when the score has the sign of the released noise model."""
    x, sigmas = noise(5_000), torch.linspace(1, 0, 101).tolist()
    generator = seeded()
    for move in flow_plan(sigmas, [1 / 100] * 100, scale=0.25):
        v = velocity(x, torch.tensor(1000 * move.at))
        z = torch.randn(x.shape, generator=generator, dtype=x.dtype) if move.noise else None
        x = advance(move, x, -2 * v - flow_slope(x, v, move.at, move.rate), None, z)[0]
    assert not within_three_errors(x, MIX)


@pytest.mark.parametrize("scale", [0.0, 0.5])
def test_noise_only_with_diffusion(scale):
    runs = [sampled(4, 20, seed=seed, diffusion_scale=scale) for seed in (0, 0, 1)]
    assert torch.equal(runs[0], runs[1])
    assert torch.equal(runs[0], runs[2]) == (scale == 0)


# --- order --------------------------------------------------------------------------------------------------------


def gaussian_moments(steps, integrator, scale, profile="sigma", mean=0.8, var=1.5, end=0.1):
    """Errors of mean and variance at the end of a run on N(mean, var): x is a vector of the coefficients of 1, of the
    start and of each noise, on which an affine velocity acts linearly."""
    sigmas = torch.linspace(1, end, steps + 1, dtype=torch.float64)
    moves = flow_plan(sigmas.tolist(), sigmas.diff().neg().tolist(), profile, scale, integrator)
    units = torch.eye(len(moves) + 2, dtype=torch.float64)
    x, memory = units[1], None
    for k, move in enumerate(moves):
        s = move.at
        total = (1 - s) ** 2 * var + s**2
        centred = x - (1 - s) * mean * units[0]
        v = (s - (1 - s) * var) / total * centred - mean * units[0]
        x, memory = advance(move, x, flow_slope(x, v, s, move.rate), memory, units[k + 2])
    error = [x[0] - (1 - end) * mean, (x[1:] ** 2).sum() - ((1 - end) ** 2 * var + end**2)]
    return torch.stack(error).abs()


@pytest.mark.parametrize("scale, profile", [(0.0, "sigma"), (0.5, "sigma"), (1.0, "sigma2"), (0.8, "sin")])
@pytest.mark.parametrize("integrator, order", [("euler", 1), ("heun", 1), ("trapezoid", 2)])
def test_weak_order(integrator, order, scale, profile):
    counts = (64, 128, 256, 512)
    errors = torch.stack([gaussian_moments(n, integrator, scale, profile) for n in counts])
    slopes = -torch.log2(errors[1:] / errors[:-1])
    assert (slopes[:, 1] - order).abs().max() < 0.15
    if integrator == "heun":  # the others carry the mean exactly, for it is linear in sigma
        assert (slopes[:, 0] - order).abs().max() < 0.15
    else:
        assert errors[:, 0].max() < 1e-9


@pytest.mark.parametrize("integrator, order", [("euler", 1), ("trapezoid", 2)])
def test_order_of_the_ode_on_a_mixture(integrator, order):
    x, errors = noise(20), []
    exact = MIX.ode(x, (0.0, 1.0), (0.95, 0.05), 200)
    for steps in (20, 40, 80, 160):
        sigmas = torch.linspace(1, 0.05, steps + 1, dtype=torch.float64).tolist()
        y, memory = x, None
        for move in flow_plan(sigmas, [0.95 / steps] * steps, scale=0.0, integrator=integrator):
            v = velocity(y, torch.tensor(1000 * move.at, dtype=torch.float64))
            y, memory = advance(move, y, flow_slope(y, v, move.at, move.rate), memory, None)
        errors.append((y - exact).abs().mean().log2().item())
    slope = (errors[0] - errors[-1]) / 3
    assert abs(slope - order) < 0.15


def test_steps_of_the_released_integrator():
    """Constant noise, uniform times: Euler-Maruyama, and the Heun step whose slopes are both at the new time."""
    eps, times = 0.3, torch.linspace(0.05, 0.9, 12, dtype=torch.float64)
    dt, sigmas = float(times[1] - times[0]), (1 - times).tolist()

    def drift(x, t):
        s = 1 - float(t)
        return -velocity(x, torch.tensor(1000 * s, dtype=torch.float64)) + eps * MIX.score(x, 1 - s, s)

    for integrator in ("euler", "heun"):
        x, generator = noise(), seeded()
        for t in times[:-1]:
            dw = math.sqrt(dt) * torch.randn(x.shape, generator=generator, dtype=x.dtype)
            if integrator == "euler":
                x = x + drift(x, t) * dt + math.sqrt(2 * eps) * dw
                continue
            moved = x + math.sqrt(2 * eps) * dw
            k1 = drift(moved, t + dt)
            x = moved + dt / 2 * (k1 + drift(moved + dt * k1, t + dt))
        y, memory, generator = noise(), None, seeded()
        for move in flow_plan(sigmas, [dt] * 11, "constant", eps, integrator, clip=1e9):
            v = velocity(y, torch.tensor(1000 * move.at, dtype=torch.float64))
            z = torch.randn(y.shape, generator=generator, dtype=y.dtype) if move.noise else None
            y, memory = advance(move, y, flow_slope(y, v, move.at, move.rate), memory, z)
        torch.testing.assert_close(y, x, rtol=1e-9, atol=1e-9)


# --- the scheduler ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("integrator, calls", [("euler", 8), ("heun", 16), ("trapezoid", 15)])
def test_calls_and_timesteps(integrator, calls):
    scheduler = StochasticInterpolantScheduler(integrator=integrator)
    scheduler.set_timesteps(8)
    assert len(scheduler.timesteps) == calls
    assert (scheduler.timesteps.diff() <= 0).all()
    assert all(1000 * m.at == pytest.approx(t) for m, t in zip(scheduler._moves, scheduler.timesteps.tolist()))
    assert drive(scheduler, noise()).isfinite().all()


@pytest.mark.parametrize("integrator", ["euler", "heun", "trapezoid"])
def test_image_to_image(integrator):
    """From the middle of a run: the moments are right, so the noise of the first step is not lost."""
    scheduler = StochasticInterpolantScheduler(integrator=integrator, diffusion_scale=0.7)
    scheduler.set_timesteps(120)
    begin = 60 * scheduler.order
    scheduler.set_begin_index(begin)
    clean = MIX.sample(5_000, seeded(3))
    t, generator = scheduler.timesteps[begin], seeded()
    x = scheduler.scale_noise(clean, t[None], noise(5_000, 5))
    for t in scheduler.timesteps[begin:]:
        x = scheduler.step(velocity(x, t), t, x, generator=generator).prev_sample
    assert within_three_errors(x, MIX)


def test_last_step_without_noise_is_the_denoised_sample():
    scheduler = StochasticInterpolantScheduler(diffusion_scale=1.0)
    scheduler.set_timesteps(sigmas=[0.5, 0.2])
    scheduler.set_begin_index(1)
    x, t = noise(), scheduler.timesteps[1]
    expected = MIX.denoise(x, 1 - t.double() / 1000, t.double() / 1000)
    assert (scheduler.step(velocity(x, t), t, x).prev_sample - expected).abs().max() < 1e-6
    scheduler = StochasticInterpolantScheduler(diffusion_scale=1.0, last_step="sde")
    scheduler.set_timesteps(sigmas=[0.5, 0.2])
    assert scheduler._moves[-1].noise > 0


def test_diffusion_is_lowered_for_long_steps():
    moves = flow_plan([1.0, 0.5, 0.1, 0.02, 0.0], [0.5, 0.4, 0.08, 0.02], "constant", 4.0)
    assert all(m.rate * m.step <= m.at + 1e-12 for m in moves)
    free = flow_plan([1.0, 0.5, 0.1, 0.02, 0.0], [0.5, 0.4, 0.08, 0.02], "constant", 4.0, clip=1e9)
    assert [m.rate for m in free][1] == 8.0


def test_own_seed_of_the_noise():
    scheduler, results = StochasticInterpolantScheduler(noise_seed=7), []
    for _ in range(2):
        scheduler.set_timesteps(6)
        x = noise()
        for t in scheduler.timesteps:
            x = scheduler.step(velocity(x, t), t, x).prev_sample
        results.append(x)
    assert torch.equal(*results)


def test_shipped_model_draws_the_same_scene_differently(shapes_dit, judge):
    scenes = diffusers_ext.zoo.held_out(4)
    pictures = []
    for scale in (0.0, 0.5):
        config = shapes_dit.scheduler.config
        shapes_dit.scheduler = StochasticInterpolantScheduler.from_config(config, diffusion_scale=scale, noise_seed=0)
        pictures.append(diffusers_ext.zoo.generate(shapes_dit, scenes.captions, num_inference_steps=12))
    assert all(p.isfinite().all() for p in pictures)
    assert (pictures[0] - pictures[1]).abs().mean() > 1e-3
    features = [judge.features(p) for p in pictures]
    own, other = ((features[1] - f).norm(dim=1).mean() for f in (features[0], features[0].roll(1, 0)))
    assert own < other


# --- native -------------------------------------------------------------------------------------------------------


class _Flow:
    """What ComfyUI's model functions hide: a flow model's `model_sampling`."""

    def __init__(self):
        sampling = type("Sampling", (type("CONST", (), {}),), {})()
        inner = type("Model", (), {"model_sampling": sampling})()
        self.inner_model = type("Guider", (), {"inner_model": inner})()

    def __call__(self, x, sigma, **extra):
        return analytic.comfy_denoiser(MIX, flow=True)(x, sigma)


@pytest.mark.parametrize("integrator, calls", [("euler", 6), ("heun", 11), ("trapezoid", 11)])
def test_native_is_the_scheduler(integrator, calls):
    scheduler = StochasticInterpolantScheduler(integrator=integrator, diffusion_scale=0.6)
    scheduler.set_timesteps(6)
    seen = []

    class Counted(_Flow):
        def __call__(self, x, sigma, **extra):
            seen.append(float(sigma[0]))
            return super().__call__(x, sigma)

    native = sample_flow_sde(Counted(), noise(), scheduler.sigmas, {"seed": 3}, integrator=integrator, scale=0.6)
    assert (native - drive(scheduler, noise(), seed=4)).abs().max() < 1e-5
    assert len(seen) == calls


def test_native_needs_a_flow_model():
    with pytest.raises(ValueError, match="flow model"):
        sample_flow_sde(analytic.comfy_denoiser(MIX), noise(), torch.tensor([1.0, 0.5, 0.0]))


# --- bad input ----------------------------------------------------------------------------------------------------


def test_bad_options():
    with pytest.raises(ValueError, match="diffusion_clip"):
        StochasticInterpolantScheduler(diffusion_profile="constant", diffusion_clip=None)
    for options in (
        {"diffusion_scale": -0.1},
        {"diffusion_scale": math.nan},
        {"diffusion_profile": "cosine"},
        {"diffusion_clip": 0.0},
        {"integrator": "rk4"},
        {"last_step": "skip"},
    ):
        with pytest.raises(ValueError, match=next(iter(options))):
            StochasticInterpolantScheduler(**options)
    with pytest.raises(ValueError, match="gamma_scale"):
        Interpolant(gamma_scale=-1.0)
    with pytest.raises(ValueError, match="gamma <= 1"):
        Interpolant("trig", "brownian", gamma_scale=5.0)
    with pytest.raises(ValueError, match="path"):
        Interpolant("cubic")


def test_configs_that_do_not_fit():
    for option in ("invert_sigmas", "use_beta_sigmas"):
        with pytest.raises(ValueError, match=option):
            StochasticInterpolantScheduler.from_config({"shift": 1.0, option: True})
    scheduler = StochasticInterpolantScheduler()
    scheduler.set_timesteps(4)
    with pytest.raises(TypeError, match="s_churn"):
        scheduler.step(noise(), scheduler.timesteps[0], noise(), s_churn=1.0)


# --- bridges ------------------------------------------------------------------------------------------------------

M0, M1 = torch.tensor([1.0, -0.5]).double(), torch.tensor([-1.0, 2.0]).double()
S0, S1 = torch.tensor([[0.6, 0.2], [0.2, 0.4]]).double(), torch.tensor([[0.3, -0.1], [-0.1, 0.9]]).double()
NOISE = (torch.zeros(2).double(), torch.eye(2).double())


def gaussian_fields(path, first=(M0, S0), second=(M1, S1)):
    """Exact `b(x, t)` and `eta(x, t)` between two Gaussians, from the joint Gaussian of (x0, x1, z) and x_t."""

    def parts(x, t):
        (a, b, g), (da, db, _) = path.levels(t), path.slopes(t)
        cov = a**2 * first[1] + b**2 * second[1] + g**2 * torch.eye(2)
        centred = torch.linalg.solve(cov, (x - a * first[0] - b * second[0]).T).T
        x0, x1 = first[0] + a * centred @ first[1], second[0] + b * centred @ second[1]
        return da * x0 + db * x1, g * centred, -centred

    def drift(x, t):
        v, _, score = parts(x, t)
        return path.drift(v, score, t)

    return drift, lambda x, t: parts(x, t)[1]


PATHS = [(path, gamma) for path in TWO_SIDED for gamma in GAMMAS if (path, gamma) != ("encoding-decoding", "zero")]


@pytest.mark.parametrize("kind, gamma", PATHS)
def test_slopes_are_derivatives(kind, gamma):
    path, t = Interpolant(kind, gamma, 0.7), torch.tensor([0.1, 0.37, 0.62, 0.9], dtype=torch.float64)
    h = 1e-6
    a, b, g = ((high - low) / (2 * h) for high, low in zip(path.levels(t + h), path.levels(t - h)))
    da, db, product = path.slopes(t)
    numeric, exact = torch.stack([a, b, g * path.levels(t)[2]]), torch.stack([da, db, product])
    torch.testing.assert_close(numeric, exact, rtol=0, atol=1e-7)
    ends = torch.stack([v[[0, -1]] for v in path.levels(torch.tensor([0.0, 0.5, 1.0]).double())])
    torch.testing.assert_close(ends, torch.tensor([[1.0, 0], [0, 1], [0, 0]]).double(), rtol=0, atol=1e-12)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("kind, gamma", PATHS)
def test_bridge_between_two_gaussians(kind, gamma, reverse):
    """An affine ODE carries the mean, and the mean plus each column of a root of S0, to those of the other end."""
    path, ends = Interpolant(kind, gamma), [(M0, S0), (M1, S1)]
    (m0, s0), (m1, s1) = ends[::-1] if reverse else ends
    points = torch.cat([m0[None], m0 + torch.linalg.cholesky(s0).T])
    b, _ = gaussian_fields(path)
    y = integrate_bridge(b, None, path, points, 200, reverse=reverse)
    columns = y[1:] - y[0]
    assert (y[0] - m1).norm() < 0.01 * m1.norm()
    assert (columns.T @ columns - s1).norm() < 0.01 * s1.norm()


@pytest.mark.parametrize("constant", [False, True])
@pytest.mark.parametrize("reverse", [False, True])
def test_bridge_with_noise(reverse, constant):
    path, n = Interpolant("linear", "brownian"), 5_000
    source, target = ((M1, S1), (M0, S0)) if reverse else ((M0, S0), (M1, S1))
    start = source[0] + noise(n, 4) @ torch.linalg.cholesky(source[1]).T
    b, eta = gaussian_fields(path)
    y = integrate_bridge(
        b, eta, path, start, 200, 0.5, reverse, start_end=(1e-3, 1 - 1e-3), generator=seeded(), constant=constant
    )
    assert within_three_errors(y, analytic.GaussianMixture.gaussian(target[0], covariance=target[1]))


@pytest.mark.parametrize("kind", ["one-sided-linear", "one-sided-trig"])
def test_one_sided_path_is_a_flow(kind):
    path = Interpolant(kind)
    b, _ = gaussian_fields(path, NOISE)
    points = torch.cat([torch.zeros(1, 2).double(), torch.eye(2).double()])
    y = integrate_bridge(b, None, path, points, 200)
    columns = y[1:] - y[0]
    assert (y[0] - M1).norm() < 0.01 * M1.norm() and (columns.T @ columns - S1).norm() < 0.01 * S1.norm()


def test_mirror_keeps_its_distribution():
    """x_t = x1 + gamma z: widened in the middle, back at the end; the drift is -gamma gamma' s both ways."""
    path = Interpolant("mirror", "brownian")
    b, _ = gaussian_fields(path, NOISE)
    points = torch.cat([M1[None], M1 + torch.linalg.cholesky(S1).T])
    half = integrate_bridge(b, None, path, points, 100, start_end=(0.0, 0.5))
    wide = half[1:] - half[0]
    assert (wide.T @ wide - S1 - torch.eye(2) / 4).norm() < 0.01
    for reverse in (False, True):
        assert (integrate_bridge(b, None, path, points, 200, reverse=reverse) - points).abs().max() < 0.01


def fitted(path, target, t, n=100_000):
    """Exact minimiser (w, c) of the loss over f(x) = w x + c for x0 ~ N(1, 0.5), x1 ~ N(-1, 2) at one time."""
    x0 = 1 + math.sqrt(0.5) * torch.randn(n, 1, generator=seeded(1), dtype=torch.float64)
    x1 = -1 + math.sqrt(2) * torch.randn(n, 1, generator=seeded(2), dtype=torch.float64)
    times = torch.full((n,), t, dtype=torch.float64)

    def loss(weights):
        return interpolant_training_loss(
            lambda x, _: weights[0] * x + weights[1], path, None if path.one_sided else x0, x1, target, times,
            generator=seeded(3),
        )  # fmt: skip

    zero = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    gradient = torch.autograd.grad(loss(zero), zero)[0]
    hessian = torch.autograd.functional.hessian(loss, zero)
    return -torch.linalg.solve(hessian, gradient)


@pytest.mark.parametrize("target", ["b", "v", "eta", "s"])
@pytest.mark.parametrize("kind", ["linear", "trig", "one-sided-linear", "mirror"])
def test_minimiser_of_the_loss_is_the_field(kind, target):
    path, t = Interpolant(kind, "brownian"), torch.tensor(0.3, dtype=torch.float64)
    (a, b, g), (da, db, product) = path.levels(t), path.slopes(t)
    total, mean = a**2 * 0.5 + b**2 * 2 + g**2, a - b
    gains = {"v": da * a * 0.5 + db * b * 2, "eta": g, "s": torch.tensor(-1.0)}
    gains["b"] = gains["v"] + product
    offset = {"v": da - db, "b": da - db}.get(target, 0.0)
    expected = torch.stack([gains[target] / total, offset - gains[target] / total * mean])
    assert (fitted(path, target, 0.3) - expected).norm() < 0.02 * max(expected.norm(), 0.5)


def test_noise_and_score_have_opposite_signs():
    path, t, z = Interpolant("linear"), torch.tensor(0.3), torch.ones(1, 2)
    target = path.targets(t[None], torch.zeros(1, 2), torch.zeros(1, 2), z)
    assert torch.allclose(path.score(target["eta"], t), target["s"]) and (target["s"] < 0).all()


def test_antithetic_pairs():
    path, t = Interpolant("linear"), torch.tensor([0.2, 0.7])
    x0, x1 = noise(2).float(), noise(2, 3).float()
    plus, minus, z = path.antithetic(t, x0, x1, generator=seeded())
    torch.testing.assert_close((plus + minus) / 2, (1 - t)[:, None] * x0 + t[:, None] * x1)
    torch.testing.assert_close(plus - minus, 2 * torch.sqrt(t * (1 - t))[:, None] * z)


def test_antithetic_pairs_keep_the_loss_bounded_at_the_ends():
    path, x = Interpolant("linear"), torch.zeros(1, 1)

    def spread(antithetic):
        values = [
            interpolant_training_loss(
                lambda x, t: 0.3 * x + 0.2, path, x, x, "b", torch.tensor([1e-4]), antithetic, seeded(i)
            )
            for i in range(50)
        ]
        return torch.stack(values).std()

    assert spread(True) < 0.05 * spread(False)


def tiny_unet(seed):
    torch.manual_seed(seed)
    return UNet2DModel(
        sample_size=8, in_channels=3, out_channels=3, block_out_channels=(8, 8), layers_per_block=1, norm_num_groups=4,
        down_block_types=("DownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "UpBlock2D"),
        add_attention=False,
    ).eval()  # fmt: skip


@pytest.fixture(scope="module")
def bridge():
    pipe = BridgePipeline(tiny_unet(0), tiny_unet(1), "trig", "brownian", 0.5)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_bridge_pipeline_runs_the_bridge(bridge):
    x = torch.rand(2, 3, 8, 8, generator=seeded()) * 2 - 1
    b, eta = (lambda x, t, net=net: net(x, 1000 * t).sample for net in (bridge.b, bridge.eta))
    expected = integrate_bridge(b, eta, Interpolant("trig", "brownian", 0.5), x, 4, 0.3, generator=seeded(5))
    images = bridge(x, 4, diffusion=0.3, generator=seeded(5), output_type="pt").images
    torch.testing.assert_close(images, (expected / 2 + 0.5).clamp(0, 1))
    assert bridge(x, 2).images[0].size == (8, 8)


@pytest.mark.slow
def test_bridge_pipeline_reloads_in_a_fresh_process(bridge, tmp_path):
    bridge.save_pretrained(tmp_path / "bridge")
    again = BridgePipeline.from_pretrained(tmp_path / "bridge")
    expected = again(torch.ones(1, 3, 8, 8), 3, output_type="pt").images
    # weights in memory of another alignment are summed in another order
    torch.testing.assert_close(bridge(torch.ones(1, 3, 8, 8), 3, output_type="pt").images, expected)
    script = (
        "import sys, torch, diffusers_ext; from diffusers import DiffusionPipeline; "
        "pipe = DiffusionPipeline.from_pretrained(sys.argv[1]); assert pipe.interpolant.gamma_scale == 0.5; "
        "torch.save(pipe(torch.ones(1, 3, 8, 8), 3, output_type='pt').images, sys.argv[2])"
    )
    subprocess.run([sys.executable, "-c", script, tmp_path / "bridge", tmp_path / "out.pt"], check=True)
    assert torch.equal(torch.load(tmp_path / "out.pt"), expected)


def test_bridge_pipeline_refuses(bridge):
    x = torch.zeros(1, 3, 8, 8)
    with pytest.raises(ValueError, match="eta"):
        BridgePipeline(tiny_unet(0))(x, diffusion=0.1)
    for options in ({"num_inference_steps": 0}, {"diffusion": -1.0}, {"integrator": "rk4"}):
        with pytest.raises(ValueError, match=next(iter(options))):
            bridge(x, **options)
    with pytest.raises(RuntimeError, match="NaN"):
        bridge(x * math.nan, 1)
    with pytest.raises(ValueError, match="one shape"):
        interpolant_training_loss(lambda x, t: x, Interpolant(), x, x[..., :4])
    with pytest.raises(ValueError, match="no 'eta'"):
        interpolant_training_loss(lambda x, t: x, Interpolant("linear", "zero"), x, x, "eta")
