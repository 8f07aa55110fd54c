from __future__ import annotations

import math

import pytest
import torch
from diffusers import DiffusionPipeline

from diffusers_ext import EVODiffMultistepScheduler, zoo
from diffusers_ext.schedulers.evodiff import Solver, dot, sample, sample_evodiff
from diffusers_ext.zoo.analytic import AnalyticDenoiser, GaussianMixture, comfy_denoiser, schedule


PICTURES = GaussianMixture(torch.randn(3, 4, 6, 6, generator=torch.Generator().manual_seed(0)), variances=0.1)
PLANE = GaussianMixture(torch.tensor([[1.0, 0.2], [-0.8, 0.7], [0.1, -1.1]]), variances=0.2)


def noise(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def edm(steps: int, clean: bool = True, top: float = 80.0, end: float = 0.002) -> list[tuple[float, float]]:
    """Log-spaced EDM levels: `steps` solver steps, then the clean one."""
    sigmas = torch.exp(torch.linspace(math.log(top), math.log(end), steps + 1, dtype=torch.float64)).tolist()
    return [(1.0, s) for s in sigmas] + [(1.0, 0.0)] * clean


def run(levels, final="ddim", denoise=True, x=None, mixture=PICTURES) -> torch.Tensor:
    x = 80 * noise(2, 4, 6, 6) if x is None else x
    solver = Solver(levels, final, denoise)
    return sample(solver, lambda y, i: mixture.denoise(y, *levels[i]), x)


def reference(predict, x, sigmas, steps):
    """The published loop written out for alpha = 1 (kappa = sigma = t), official last step, then denoising."""

    def inner(a, b):
        return torch.einsum("bchw,bchw->bc", a, b)[:, :, None, None]

    def proj(a, b):
        return (inner(a, b) / inner(b, b)).clamp(-2, 2)

    top, end = sigmas[0], sigmas[steps]
    m1 = predict(x, sigmas[0])
    x = sigmas[1] / sigmas[0] * x + (1 - sigmas[1] / sigmas[0]) * m1
    m0 = predict(x, sigmas[1])
    for i in range(2, steps + 1):
        before, here, t = sigmas[i - 2], sigmas[i - 1], sigmas[i]
        h, q0, q1 = 1 / t - 1 / here, t / here, here / before
        euler = q0 * x + t * h * m0
        if i == steps:
            d = 1 - 0.5 * math.sqrt(q0 if q0 < 0.5 else q0 - 0.5)
            x = (1 - math.sqrt(t * here)) * euler + 0.5 * t * h * (m0 - d * m1)
            break
        r = math.log(before / here) / math.log(here / t)
        w, base = 0.5 * (1 - ((t + end) / (top + end)) ** 2), math.sqrt(q0 / q1)
        c1 = (1 - w) * base + w * proj(m0, m1)
        d1 = m0 - c1 * m1
        r_i = (torch.sigmoid(0.25 * c1.abs()) * r).clamp(0.25 * r, 1.5 * r)
        probe = euler + 0.5 * t * h / r_i * d1
        mt = predict(probe, t)
        d2 = mt - ((1 - w) * base + w * proj(mt, m0)) * m0
        back, ahead = d1 / (r * h), r * d2 / h
        eta = 0.5 * torch.sigmoid((0.5 * proj(ahead + back, ahead - back)).abs())
        b = -eta * d1 / r + (1 - eta) * r * d2
        z = (proj(probe - euler - 0.5 * t * h / r_i * b, d1) / (h * t)).abs() - 0.5
        if steps > 20:
            g = (m0 - m1) / h
            z = -z * torch.sigmoid(proj(m0, g) * (2 - q0**2))
        x = euler + 0.5 * t * h * b / torch.sigmoid(z)
        m0, m1 = mt, m0
    return predict(x, end)


@pytest.mark.parametrize("steps", [3, 6, 12, 20, 21, 25])
def test_equals_the_published_loop(steps):
    levels, x = edm(steps), 80 * noise(2, 4, 6, 6)
    expected = reference(lambda y, s: PICTURES.denoise(y, 1.0, s), x, [s for _, s in levels], steps)
    assert (run(levels, "official", x=x) - expected).abs().max() < 1e-9


@pytest.mark.parametrize("steps", [3, 5, 10])
@pytest.mark.parametrize("end", ["zero", "sigma_min"])
def test_one_call_per_step(steps, end):
    model = AnalyticDenoiser(PICTURES, schedule("sd"))
    scheduler = EVODiffMultistepScheduler.from_config(
        EVODiffMultistepScheduler().config, beta_schedule="scaled_linear", final_sigmas_type=end
    )
    scheduler.set_timesteps(steps)
    x = noise(1, 4, 6, 6)
    for t in scheduler.timesteps:
        x = scheduler.step(model(x, t), t, x).prev_sample
    assert model.calls == steps and torch.isfinite(x).all()


@pytest.mark.parametrize("final", ["ddim", "official"])
def test_every_model_is_solved_as_its_edm_twin(final):
    """x / alpha of a variance-preserving or flow model takes exactly the path of the authors' alpha = 1 sampler."""
    ve = edm(22)
    start = run(ve, final)
    for alpha_of in (lambda k: (1 + k**2) ** -0.5, lambda k: 1 / (1 + k)):
        levels = [(alpha_of(k), alpha_of(k) * k) for _, k in ve]
        x = 80 * noise(2, 4, 6, 6) * levels[0][0]
        assert (run(levels, final, x=x) - start).abs().max() < 1e-9


def test_a_level_of_pure_noise_counts_as_no_past():
    """Flow models start there; what a step from it would say about the log-SNR is infinite."""
    levels = [(1 - s, s) for s in torch.linspace(1, 0, 9, dtype=torch.float64).tolist()]
    x = noise(64, 2)
    exact = PLANE.ode(x, (1e-6, 1 - 1e-6), (1.0, 1e-6))
    error = (run(levels, x=x, mixture=PLANE) - exact).square().mean().sqrt()
    assert error < (ddim(levels, x, PLANE) - exact).square().mean().sqrt()


def test_channels_and_pictures_are_independent():
    x = 80 * noise(2, 4, 6, 6)
    order, levels = torch.tensor([2, 0, 3, 1]), edm(8)
    permuted = GaussianMixture(PICTURES.means.reshape(3, 4, 6, 6)[:, order], variances=0.1)
    assert torch.allclose(run(levels, x=x[:, order], mixture=permuted), run(levels, x=x)[:, order], atol=1e-9)
    other = torch.cat([x[:1], 3 * x[1:]])
    assert torch.allclose(run(levels, x=other)[:1], run(levels, x=x)[:1], atol=1e-12)


def test_dot_products_sum_over_positions_only():
    assert dot(torch.ones(2, 4, 3, 5), torch.ones(2, 4, 3, 5)).flatten().tolist() == [15.0] * 8
    assert dot(torch.ones(2, 7, 3), torch.ones(2, 7, 3)).shape == (2, 1, 3)


def ddim(levels, x, mixture):
    for (a, s), (a_to, s_to) in zip(levels, levels[1:]):
        m = mixture.denoise(x, a, s)
        x = a_to * m + s_to / s * (x - a * m)
    return x


def test_error_falls_and_is_below_ddim():
    x = 80 * noise(64, 2)
    exact = PLANE.ode(x, (1.0, 80.0), (1.0, 0.002))

    def error(y):
        return (y - exact).square().mean().sqrt().item()

    ours = {n: error(run(edm(n, clean=False), denoise=False, x=x, mixture=PLANE)) for n in (10, 15, 20, 40)}
    plain = {n: error(ddim(edm(n, clean=False), x, PLANE)) for n in (10, 15, 20)}
    assert ours[10] > ours[20] > ours[40]
    assert sum(ours[n] < plain[n] for n in plain) >= 2


def test_constant_prediction_gives_ddim():
    """Uniform log-SNR steps and a constant data prediction: all differences vanish."""
    levels, m = edm(9), noise(2, 4, 6, 6, seed=3)
    x = 80 * noise(2, 4, 6, 6)
    constant = type("Constant", (), {"denoise": lambda self, x, a, s: m})()
    solver = Solver(levels[:-1])
    assert torch.allclose(sample(solver, lambda y, i: m, x), ddim(levels[:-1], x, constant), atol=1e-10)


def test_zero_prediction_is_finite():
    assert torch.isfinite(sample(Solver(edm(6)), lambda y, i: torch.zeros_like(y), noise(1, 2, 3, 3))).all()


@pytest.mark.parametrize(
    "name, prediction", [("sd", "epsilon"), ("cosine", "v_prediction"), ("flow", "flow_prediction")]
)
def test_predictions_and_schedules_agree_with_the_solver(name, prediction):
    """The class on an analytic model equals the pure solver on the same nodes."""
    model = AnalyticDenoiser(PICTURES, schedule(name), prediction)
    betas = {"sd": "scaled_linear", "cosine": "squaredcos_cap_v2", "flow": "linear"}[name]
    sd = {"beta_start": 0.00085, "beta_end": 0.012} if name == "sd" else {}
    scheduler = EVODiffMultistepScheduler(beta_schedule=betas, prediction_type=prediction, **sd)
    scheduler.set_timesteps(8)
    x = start = noise(2, 4, 6, 6)
    for t in scheduler.timesteps.double():
        x = scheduler.step(model(x, t), t, x).prev_sample
    levels = scheduler._levels
    expected = sample(Solver(levels), lambda y, i: PICTURES.denoise(y, *levels[i]), start)
    assert (x - expected).abs().max() < 1e-4


def test_repeated_timesteps_are_harmless():
    scheduler = EVODiffMultistepScheduler()
    scheduler.set_timesteps(timesteps=[900, 900, 600, 600, 600, 200, 50])
    model, x = AnalyticDenoiser(PICTURES, schedule("linear")), noise(1, 4, 6, 6)
    for t in scheduler.timesteps:
        x = scheduler.step(model(x, t), t, x).prev_sample
    assert torch.isfinite(x).all()


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: EVODiffMultistepScheduler(solver_order=3), "solver_order"),
        (lambda: EVODiffMultistepScheduler(final="none"), "final"),
        (lambda: EVODiffMultistepScheduler(skip_type="karras"), "skip_type"),
        (lambda: EVODiffMultistepScheduler().set_timesteps(2), "at least 3 steps"),
        (lambda: EVODiffMultistepScheduler().set_timesteps(sigmas=[3.0, 1.0]), "at least 3 steps"),
        (
            lambda: sample_evodiff(comfy_denoiser(PLANE), noise(1, 2), torch.tensor([3.0, 1.0, 0.0])),
            "at least 3 steps",
        ),
        (lambda: sample_evodiff(comfy_denoiser(PLANE), noise(1, 2), torch.tensor([1.0, 3.0, 2.0, 0.0])), "descend"),
    ],
)
def test_bad_input(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_gradients_flow_through_a_run():
    """For guidance by a loss on the result: no operation overwrites what the backward pass needs."""
    scheduler = EVODiffMultistepScheduler()
    scheduler.set_timesteps(6)
    start = noise(2, 2).reshape(1, 2, 2, 1).requires_grad_()
    x = start
    for t in scheduler.timesteps:
        x = scheduler.step(torch.tanh(x), t, x).prev_sample
    (gradient,) = torch.autograd.grad(x.square().sum(), start)
    moved = start.detach().clone()
    moved[0, 0, 0, 0] += 1e-6
    y = moved
    scheduler.set_timesteps(6)
    for t in scheduler.timesteps:
        y = scheduler.step(torch.tanh(y), t, y).prev_sample
    change = (y.square().sum() - x.square().sum()).item() / 1e-6
    assert gradient[0, 0, 0, 0].item() == pytest.approx(change, rel=1e-3)


def test_pipeline_reloads_bit_equal(shapes_unet, tmp_path):
    shapes_unet.scheduler = EVODiffMultistepScheduler.from_config(shapes_unet.scheduler.config, skip_type="edm")
    shapes_unet.save_pretrained(tmp_path)
    reloaded = DiffusionPipeline.from_pretrained(tmp_path)
    reloaded.set_progress_bar_config(disable=True)
    assert type(reloaded.scheduler) is EVODiffMultistepScheduler and reloaded.scheduler.config.skip_type == "edm"
    ours, theirs = (zoo.generate(p, ["a red circle"], 4, 1.0) for p in (shapes_unet, reloaded))
    assert torch.equal(ours, theirs)
