from __future__ import annotations

import importlib
import math
import sys

import pytest
import torch
from diffusers import DDIMScheduler, DiffusionPipeline, FlowMatchEulerDiscreteScheduler

from diffusers_ext import (
    FlowMatchTrainingScheduler,
    TimestepSampler,
    Trajectory,
    flow_matching_loss,
    resolution_shift,
    shift_timesteps,
    zoo,
)
from diffusers_ext.schedulers.rectified_flow_sd3 import MAX_MODE_SCALE, loss_weight, mode_map


SAMPLERS = [
    TimestepSampler("uniform"),
    TimestepSampler("logit_normal"),
    TimestepSampler("logit_normal", m=0.5, s=0.6),
    TimestepSampler("logit_normal", m=-0.5, s=1.0, shift=3.0),
    TimestepSampler("mode", s=1.29),
    TimestepSampler("mode", s=-0.5, shift=2.0),
    TimestepSampler("cosmap"),
    TimestepSampler("cosmap", shift=0.5),
]
GRID = torch.linspace(1e-5, 1 - 1e-5, 400_001, dtype=torch.float64)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def cumulative(density: torch.Tensor) -> torch.Tensor:
    return torch.cat([torch.zeros(1), torch.cumulative_trapezoid(density, GRID)])


@pytest.mark.parametrize("sampler", SAMPLERS, ids=str)
def test_density_integrates_to_one(sampler):
    assert cumulative(sampler.density(GRID))[-1].item() == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize("sampler", SAMPLERS, ids=str)
def test_samples_follow_the_density(sampler):
    n = 100_000
    t = sampler.sample(n, generator(1), dtype=torch.float64).sort().values
    cdf = cumulative(sampler.density(GRID))
    place = ((t - GRID[0]) / (GRID[1] - GRID[0])).round().long().clamp(0, len(GRID) - 1)
    ranks = torch.arange(n + 1, dtype=torch.float64) / n
    distance = torch.maximum((ranks[1:] - cdf[place]).abs().max(), (cdf[place] - ranks[:-1]).abs().max())
    x = distance.item() * math.sqrt(n)
    p = 2 * sum((-1) ** (k - 1) * math.exp(-2 * k**2 * x**2) for k in range(1, 101)) if x > 0.2 else 1.0
    assert p > 0.01


def test_negative_mean_goes_to_the_data_side():
    assert TimestepSampler("logit_normal", m=-1.0).sample(5000, generator()).mean() < 0.4
    assert TimestepSampler("logit_normal", m=1.0).sample(5000, generator()).mean() > 0.6


def test_cosmap_density_is_the_slope_of_the_inverse_map():
    t, h = torch.linspace(0.01, 0.99, 99, dtype=torch.float64), 1e-6

    def inverse(t):
        return 2 / math.pi * torch.atan(1 / (1 - t) - 1)

    slope = (inverse(t + h) - inverse(t - h)) / (2 * h)
    assert (TimestepSampler("cosmap").density(t) - slope).abs().max() < 1e-6


def test_cosmap_has_the_log_snr_of_the_cosine_schedule():
    u = torch.linspace(0.05, 0.95, 19, dtype=torch.float64)
    t = 1 - 1 / (torch.tan(math.pi / 2 * u) + 1)
    assert torch.allclose(Trajectory("rectified").log_snr(t), Trajectory("cosine").log_snr(u), atol=1e-10)


def test_mode_of_scale_zero_is_uniform():
    t = torch.linspace(0.01, 0.99, 99, dtype=torch.float64)
    assert (TimestepSampler("mode", s=0.0).density(t) - 1).abs().max() < 1e-12
    assert mode_map(torch.tensor(0.0), 1.0) == 1 and mode_map(torch.tensor(1.0), 1.0).abs() < 1e-6


@pytest.mark.parametrize("sampler", SAMPLERS[1:], ids=str)
def test_sampling_equals_weighting(sampler):
    """E_uniform[pi(t) L(t)] = E_pi[L(t)] within three standard errors."""

    def loss(t):
        return torch.sin(5 * t) + t**2

    n = 200_000
    u = torch.rand(n, generator=generator(3), dtype=torch.float64)
    weighted, drawn = sampler.density(u) * loss(u), loss(sampler.sample(n, generator(4), dtype=torch.float64))
    error = math.sqrt((weighted.var() / n + drawn.var() / n).item())
    assert abs((weighted.mean() - drawn.mean()).item()) < 3 * error


def test_uniform_weight_is_the_flow_matching_weight():
    t = torch.linspace(0.02, 0.98, 49, dtype=torch.float64)
    assert torch.allclose(TimestepSampler("uniform").weight(t), Trajectory("rectified").matching_weight(t), rtol=1e-8)


def test_trajectories():
    t = torch.linspace(0.02, 0.98, 49, dtype=torch.float64)
    for kind in ("cosine", "ldm_linear"):
        a, b = Trajectory(kind).levels(t)
        assert torch.allclose(a**2 + b**2, torch.ones_like(t))
        assert (Trajectory(kind).log_snr(t).diff() < 0).all()
    ddim = DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    a = Trajectory("ldm_linear").levels(torch.tensor([0.001, 0.5, 1.0]))[0]
    assert torch.allclose(a**2, ddim.alphas_cumprod[[0, 499, 999]].double(), rtol=1e-5)
    log_b = torch.log(Trajectory("edm").levels(torch.rand(200_000, generator=generator(), dtype=torch.float64))[1])
    assert log_b.mean().item() == pytest.approx(-1.2, abs=0.02)
    assert log_b.std().item() == pytest.approx(1.2, abs=0.02)


def test_shift_group_law_and_constant_log_snr_difference():
    t = torch.linspace(0.01, 0.99, 99, dtype=torch.float64)
    assert torch.allclose(shift_timesteps(shift_timesteps(t, 2.5), 1.7), shift_timesteps(t, 4.25), atol=1e-14)
    difference = Trajectory().log_snr(shift_timesteps(t, 3.0)) - Trajectory().log_snr(t)
    assert (difference + 2 * math.log(3)).abs().max() < 1e-10
    assert resolution_shift(4 * 1024, 1024) == 2
    assert resolution_shift(1024**2, 512**2, base_shift=1.5) == 3


def test_shift_keeps_the_uncertainty_of_the_mean():
    """A constant picture of n pixels at t is known as well as one of m pixels at the shifted t."""
    n, m, t = 64, 1024, torch.tensor(0.3, dtype=torch.float64)
    shifted = shift_timesteps(t, resolution_shift(m, n))
    assert (t / (1 - t) / math.sqrt(n)).item() == pytest.approx((shifted / (1 - shifted) / math.sqrt(m)).item())


def test_paper_grid_is_shifted_once():
    scheduler = FlowMatchTrainingScheduler(shift=3.0)
    scheduler.set_timesteps(10)
    expected = shift_timesteps(torch.linspace(1, 0.1, 10, dtype=torch.float64), 3.0)
    assert torch.allclose(scheduler.sigmas[:-1].double(), expected, atol=1e-6) and scheduler.sigmas[-1] == 0
    ours, theirs = (
        FlowMatchTrainingScheduler(shift=3.0, inference_grid="diffusers"),
        FlowMatchEulerDiscreteScheduler(shift=3.0),
    )
    for each in (ours, theirs):
        each.set_timesteps(10)
    assert torch.equal(ours.sigmas, theirs.sigmas)


def test_euler_steps_are_exact_on_a_straight_flow():
    """One data point makes every path straight: Euler is exact at any number of steps."""
    scheduler, point = FlowMatchTrainingScheduler(shift=2.0), torch.tensor([[1.0, -2.0]])
    scheduler.set_timesteps(3)
    x = torch.tensor([[0.3, 0.4]])
    for sigma, t in zip(scheduler.sigmas, scheduler.timesteps):
        x = scheduler.step((x - point) / sigma, t, x).prev_sample
    assert torch.allclose(x, point, atol=1e-6)


def test_noise_levels_are_continuous_and_shifted_once():
    scheduler = FlowMatchTrainingScheduler(shift=3.0, sampler_mean=0.2)
    sigmas, timesteps = scheduler.sample_noise_levels(1000, generator(2))
    plain = TimestepSampler("logit_normal", m=0.2).sample(1000, generator(2), dtype=torch.float64)
    assert torch.allclose(sigmas.double(), shift_timesteps(plain, 3.0), atol=1e-6)
    assert torch.equal(timesteps, 1000 * sigmas) and not torch.equal(timesteps, timesteps.round())
    other, _ = scheduler.sample_noise_levels(1000, generator(2), shift=resolution_shift(4, 1))
    assert torch.allclose(other.double(), shift_timesteps(plain, 2.0), atol=1e-6)


def test_loss():
    x0, noise = torch.randn(4, 2, 3, generator=generator()), torch.randn(4, 2, 3, generator=generator(1))
    sigmas = torch.tensor([0.1, 0.4, 0.6, 0.9])
    scheduler = FlowMatchTrainingScheduler(loss_weighting="sigma_sqrt")
    assert scheduler.loss(noise - x0, x0, noise, sigmas) == 0
    assert scheduler.loss(noise - x0 + 1, x0, noise, sigmas).item() == pytest.approx((sigmas**-2).mean().item())
    assert torch.equal(scheduler.noised(x0, noise, torch.zeros(4)), x0)
    assert torch.allclose(loss_weight(sigmas, "cosmap"), TimestepSampler("cosmap").density(sigmas).float())


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: TimestepSampler("mode", s=-1.1), "must lie in"),
        (lambda: TimestepSampler("mode", s=MAX_MODE_SCALE + 0.01), "must lie in"),
        (lambda: TimestepSampler("logit_normal", s=0.0), "above 0"),
        (lambda: TimestepSampler("logit_normal", s=-1.0), "above 0"),
        (lambda: TimestepSampler("cosmap", s=1.0), "no parameter s"),
        (lambda: TimestepSampler("beta"), "logit_normal"),
        (lambda: TimestepSampler.from_config({"kind": "mode", "scale": 1}), "scale"),
        (lambda: TimestepSampler(shift=0.0), "above 0"),
        (lambda: shift_timesteps(torch.ones(1), -1.0), "above 0"),
        (lambda: resolution_shift(0, 10), "above 0"),
        (lambda: Trajectory("sine"), "rectified"),
        (lambda: FlowMatchTrainingScheduler(timestep_sampler="cosmap", loss_weighting="cosmap"), "twice"),
        (lambda: FlowMatchTrainingScheduler.from_config(DDIMScheduler().config), "flow models only"),
        (lambda: flow_matching_loss(torch.ones(1, 2), torch.ones(1, 3), torch.ones(1, 3)), "one shape"),
    ],
)
def test_bad_input(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_sampler_round_trip():
    for sampler in SAMPLERS:
        assert TimestepSampler.from_config(sampler.to_config()) == sampler


def test_pipeline_reloads_bit_equal(shapes_dit, tmp_path):
    options = {"timestep_sampler": "mode", "sampler_scale": 1.0, "loss_weighting": "cosmap", "shift": 2.0}
    shapes_dit.scheduler = FlowMatchTrainingScheduler.from_config(shapes_dit.scheduler.config, **options)
    shapes_dit.save_pretrained(tmp_path)
    reloaded = DiffusionPipeline.from_pretrained(tmp_path)
    reloaded.set_progress_bar_config(disable=True)
    assert type(reloaded.scheduler) is FlowMatchTrainingScheduler
    assert {k: reloaded.scheduler.config[k] for k in options} == options
    ours, theirs = (zoo.generate(p, ["a red circle"], 3, 1.0) for p in (shapes_dit, reloaded))
    assert torch.equal(ours, theirs)


@pytest.fixture
def training_bench(repository):
    sys.path.insert(0, str(repository))
    try:
        yield importlib.import_module("benchmarks.training")
    finally:
        sys.path.remove(str(repository))


@pytest.mark.slow
def test_middle_levels_learn_better_with_logit_normal(training_bench, shapes_dit):
    """Equal budget on the shapes latents: lower held-out loss in the middle, samples not worse by more than 10 %."""
    b = training_bench
    data, held = b.shapes_latents(shapes_dit, 1024, 1), b.shapes_latents(shapes_dit, 128, 999)
    uniform, normal = (b.train(b.TIMESTEP_SAMPLERS[n], data, 400) for n in ("uniform", "logit-normal (0, 1)"))
    losses = [b.middle(b.validation_losses(m, held)) for m in (uniform, normal)]
    distances = [b.sampled_distance(m, data) for m in (uniform, normal)]
    assert losses[1] < losses[0]
    assert distances[1] <= 1.1 * distances[0]
