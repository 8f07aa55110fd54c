from __future__ import annotations

import math

import diffusers
import pytest
import torch

from diffusers_ext import GaussianStatistics, GaussianTeleport, USFScheduler, teleport_call, zoo
from diffusers_ext.eval import frechet_distance, mean_psnr
from diffusers_ext.prediction import NoiseSchedule
from diffusers_ext.schedulers._start import call_from, draw_latents, node_levels
from diffusers_ext.schedulers.painters_teleport import plane_share
from diffusers_ext.zoo.analytic import AnalyticUNet, GaussianMixture, latent_pipeline, schedule, solve_ode


SD = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
LEVELS = {  # a noisy and a cleaner level of every space
    "vp": ((0.068, math.sqrt(1 - 0.068**2)), (0.6, 0.8)),
    "edm": ((1.0, 80.0), (1.0, 0.7)),
    "flow": ((0.001, 0.999), (0.6, 0.4)),
    "flow from pure noise": ((0.0, 1.0), (0.3, 0.7)),
}


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def low_rank(d: int = 8, r: int = 3) -> GaussianStatistics:
    """Exact statistics of a Gaussian of rank r."""
    U = torch.linalg.qr(normal(d, d, seed=4))[0][:, :r].contiguous()
    return GaussianStatistics(normal(d, seed=5), U, torch.tensor([3.0, 0.9, 0.05, 0.002])[:r].double())


def data_of(statistics: GaussianStatistics) -> GaussianMixture:
    U, tiny = statistics.U, 1e-14 * torch.eye(len(statistics.U)).double()  # mixtures want positive variances
    return GaussianMixture.gaussian(statistics.mu, covariance=U @ torch.diag(statistics.l) @ U.T + tiny)


def of_mixture(data: GaussianMixture, rank: int | None = None) -> GaussianStatistics:
    """Exact mean and covariance of a mixture."""
    gaps = data.means - data.mean().flatten()
    total = torch.einsum("k,kij->ij", data.weights, data.covariances() + gaps[:, :, None] * gaps[:, None, :])
    l, U = torch.linalg.eigh(total)
    kept = slice(None) if rank is None else slice(len(l) - rank, None)
    return GaussianStatistics(data.mean(), U[:, kept].contiguous(), l[kept])


@pytest.mark.parametrize("levels", LEVELS.values(), ids=LEVELS)
def test_equals_runge_kutta_on_gaussian_data(levels):
    statistics, (source, target) = low_rank(), levels
    covariance, eye = statistics.U @ torch.diag(statistics.l) @ statistics.U.T, torch.eye(8).double()

    def velocity(z: torch.Tensor, phi: torch.Tensor) -> torch.Tensor:
        a, s = torch.cos(phi), torch.sin(phi)
        x0 = statistics.mu + (z - a * statistics.mu) @ torch.linalg.solve(
            a**2 * covariance + s**2 * eye, a * covariance
        )
        return a * (z - a * x0) / s - s * x0

    x = normal(6, 8) * source[1]
    start, end = (torch.tensor(math.atan2(s, a), dtype=torch.float64) for a, s in levels)
    z = solve_ode(velocity, x / math.hypot(*source), start, end, steps=400)
    assert (statistics.solve(x, source, target) - z * math.hypot(*target)).abs().max() < 1e-8


@pytest.mark.parametrize("levels", LEVELS.values(), ids=LEVELS)
def test_two_hops_are_one(levels):
    statistics, x, (source, target) = low_rank(), normal(6, 8), levels
    middle = tuple(math.sqrt(a * b) for a, b in zip(source, target))
    twice = statistics.solve(statistics.solve(x, source, middle), middle, target)
    assert (twice - statistics.solve(x, source, target)).abs().max() < 1e-10


def test_at_no_noise_samples_have_the_covariance_of_the_data():
    statistics = low_rank()
    x = normal(100_000, 8, seed=1)
    x0 = statistics.solve(x, (0.0, 1.0), (1.0, 0.0))
    found, U = torch.cov(x0.T), statistics.U
    expected = U @ torch.diag(statistics.l) @ U.T
    assert (found - expected).norm() < 0.01 * expected.norm()
    assert (x0.mean(0) - statistics.mu).norm() < 0.01 * statistics.mu.norm()


def test_denoised_is_the_conditional_mean_and_propagate_the_difference_of_two_solutions():
    statistics, x = low_rank(), normal(5, 8)
    source, target = LEVELS["vp"]
    torch.testing.assert_close(
        statistics.denoised(x, target), data_of(statistics).denoise(x, *target), atol=1e-12, rtol=0
    )
    d = normal(5, 8, seed=9)
    moved = statistics.solve(x + d, source, target) - statistics.solve(x, source, target)
    torch.testing.assert_close(statistics.propagate(d, source, target), moved, atol=1e-12, rtol=0)


def mixture_errors(rank: int | None) -> list[float]:
    """Relative error against the true solution on an 8-D mixture of 3 modes at log-SNR -4 ... 0, started at -6."""
    data = GaussianMixture(normal(3, 8, seed=2), 0.1, weights=torch.tensor([0.5, 0.3, 0.2]))
    statistics, levels = of_mixture(data, rank), schedule("sd").levels
    source = tuple(v.item() for v in levels(torch.tensor(-6.0).double()))
    x, errors = normal(32, 8, seed=3), []
    for lam in (-4.0, -3.0, -2.0, -1.0, 0.0):
        target = tuple(v.item() for v in levels(torch.tensor(lam).double()))
        true = data.ode(x, source, target, steps=100)
        errors.append(((statistics.solve(x, source, target) - true).norm() / true.norm()).item())
    return errors


def test_error_on_a_mixture_is_small_early_and_grows():
    full, mean_only = mixture_errors(None), mixture_errors(0)
    assert full[2] < 1e-3 and full[3] < 2e-2, full
    assert full == sorted(full) and all(a < b for a, b in zip(full, mean_only))


def test_trajectories_of_a_gaussian_lie_in_a_plane():
    data = GaussianStatistics(torch.zeros(8).double(), torch.eye(8).double(), torch.tensor([9.0, 4, 2, 1, 1, 1, 1, 1]))
    x, source = normal(32, 8), LEVELS["vp"][0]
    angles = torch.linspace(math.atan2(source[1], source[0]), 0.02, 60).tolist()
    states = torch.stack([data.solve(x, source, (math.cos(a), math.sin(a))) for a in angles])
    assert plane_share(states).min() >= 0.95
    wild = normal(60, 32, 8, seed=7)
    assert plane_share(wild).max() < 0.7


def test_emergence_and_agreement():
    statistics = low_rank()
    lam = statistics.emergence()
    alpha, sigma = schedule("sd").levels(lam)
    torch.testing.assert_close(alpha**2 * statistics.l, sigma**2)
    scheduler = diffusers.DDIMScheduler(**SD)
    times = GaussianTeleport(statistics, scheduler).emergence_timesteps()
    torch.testing.assert_close(NoiseSchedule.from_scheduler(scheduler).log_snr(times), lam)
    assert (times.diff() < 0).all()
    x, level = normal(16, 8), LEVELS["vp"][1]
    cosine, error = statistics.agreement(data_of(statistics).denoise(x, *level), x, level)
    assert cosine == pytest.approx(1) and error < 1e-20
    other = GaussianStatistics(statistics.mu + 1, statistics.U, statistics.l)
    cosine, error = other.agreement(data_of(statistics).denoise(x, *level), x, level)
    assert cosine < 0.999 and error > 1e-3


# --- statistics ---------------------------------------------------------------------------------------------------


def test_statistics_are_those_of_the_latents():
    latents = (normal(400, 2, 3, 3) @ torch.diag(torch.tensor([2.0, 1, 0.3]).double())) + 1
    statistics = GaussianStatistics.from_latents(latents, rank=18)
    rows = latents.flatten(1)
    torch.testing.assert_close(statistics.mu, latents.mean(0))
    torch.testing.assert_close(statistics.U @ torch.diag(statistics.l) @ statistics.U.T, torch.cov(rows.T))
    shrunk = GaussianStatistics.from_latents(latents, rank=18, shrinkage=0.5)
    torch.testing.assert_close(shrunk.l.sum(), statistics.l.sum())
    torch.testing.assert_close(shrunk.l.std(), 0.5 * statistics.l.std())
    few = GaussianStatistics.from_latents(latents[:5], rank=4)  # fewer latents than dimensions
    torch.testing.assert_close(few.U @ torch.diag(few.l) @ few.U.T, torch.cov(rows[:5].T))
    torch.testing.assert_close(few.U.T @ few.U, torch.eye(4).double())


def test_file_round_trip_and_bad_files(tmp_path):
    statistics = GaussianStatistics.from_latents(normal(50, 4, 2, 2).float(), 5, metadata={"prompt": "a cat"})
    statistics.save(tmp_path / "s.safetensors")
    again = GaussianStatistics.load(tmp_path / "s.safetensors")
    assert all(torch.equal(getattr(again, n), getattr(statistics, n)) for n in ("mu", "U", "l"))
    assert again.metadata == statistics.metadata and again.metadata["prompt"] == "a cat"
    assert not list(tmp_path.glob("*.part"))
    from safetensors.torch import save_file

    save_file({"mu": torch.zeros(3)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="no Gaussian statistics"):
        GaussianStatistics.load(tmp_path / "other.safetensors")
    save_file(
        {"mu": torch.zeros(3), "U": torch.zeros(4, 2), "l": torch.zeros(2)},
        tmp_path / "bad.safetensors",
        {"format": "diffusers-ext Gaussian statistics"},
    )
    with pytest.raises(ValueError, match="U \\(4, 2\\)"):
        GaussianStatistics.load(tmp_path / "bad.safetensors")


def test_bad_statistics():
    latents = normal(5, 8)
    for options in ({"rank": 5}, {"rank": -1}, {"shrinkage": 1.0}):
        with pytest.raises(ValueError, match="rank|shrinkage"):
            GaussianStatistics.from_latents(latents, **options)
    with pytest.raises(ValueError, match="at least 2"):
        GaussianStatistics.from_latents(latents[:1])
    with pytest.raises(ValueError, match="NaN"):
        GaussianStatistics.from_latents(torch.full((4, 3), torch.nan))
    with pytest.raises(ValueError, match="too large"):  # refused before it is allocated
        GaussianStatistics.from_latents(torch.zeros(1, 1).expand(2**15, 2**15))


def test_drawing_is_interrupted_and_goes_on(tmp_path):
    class Stop(Exception):
        pass

    def stop(count: int) -> None:
        if count >= 8:
            raise Stop

    pipe, calls = small_pipe(diffusers.DDIMScheduler(**SD)), []
    prompts = {"prompts": ["a"], "num_samples": 20, "num_inference_steps": 2, "batch_size": 4, "progress": False}
    original = pipe.encode_prompt
    pipe.encode_prompt = lambda prompt, *a, **k: calls.append(len(prompt)) or embed(len(prompt))
    checkpoint = tmp_path / "part.safetensors"
    with pytest.raises(Stop):
        GaussianStatistics.from_pipeline(pipe, **prompts, rank=2, checkpoint=checkpoint, on_batch=stop)
    resumed = GaussianStatistics.from_pipeline(pipe, **prompts, rank=2, checkpoint=checkpoint)
    assert sum(calls) == 20
    whole = GaussianStatistics.from_pipeline(pipe, **prompts, rank=2)
    assert torch.equal(resumed.U, whole.U) and torch.equal(resumed.mu, whole.mu)
    with pytest.raises(ValueError, match="no unfinished latents with prompts"):
        GaussianStatistics.from_pipeline(pipe, **{**prompts, "prompts": ["b"]}, checkpoint=checkpoint)
    with pytest.raises(ValueError, match="list of prompts"):
        GaussianStatistics.from_pipeline(pipe, "a", 4)
    pipe.encode_prompt = original


def embed(count: int):
    return AnalyticUNet.embedding(-1, count), AnalyticUNet.embedding(-1, count)


def small_pipe(scheduler, data: GaussianMixture | None = None):
    data = data or GaussianMixture(normal(2, 4, 4, 4, seed=8), 0.3)
    return latent_pipeline(data, scheduler)


# --- schedulers and pipelines -------------------------------------------------------------------------------------

SHAPE = (4, 4, 4)
GAUSSIAN = GaussianMixture.gaussian(normal(*SHAPE, seed=8), normal(*SHAPE, seed=6).square() + 0.05)
STATISTICS = GaussianStatistics(GAUSSIAN.mean(), torch.eye(64).double(), GAUSSIAN.variances.flatten())
NAMES = [
    "DDIMScheduler", "DDPMScheduler", "DPMSolverMultistepScheduler", "DPMSolverSinglestepScheduler",
    "UniPCMultistepScheduler", "DEISMultistepScheduler", "EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler",
    "HeunDiscreteScheduler", "KDPM2DiscreteScheduler", "EDMEulerScheduler",
    "FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler",
]  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_teleport_lands_on_the_exact_solution_in_the_space_of_the_scheduler(name):
    options = {} if "Flow" in name or "EDM" in name else SD
    scheduler = getattr(diffusers, name)(**options)
    scheduler.set_timesteps(10)
    noise = normal(3, *SHAPE, seed=11)
    x, timesteps = GaussianTeleport(STATISTICS, scheduler).teleport(noise, 4)
    levels = node_levels(scheduler)
    start = noise * float(getattr(scheduler, "init_noise_sigma", 1.0))
    torch.testing.assert_close(x, GAUSSIAN.ode(start, levels[0], levels[4]), atol=1e-9, rtol=0)
    assert len(timesteps) == len(scheduler.timesteps) - 4 * scheduler.order
    assert timesteps[0] == scheduler.timesteps[4 * scheduler.order]
    # the levels are those of the scheduler: noise added by it has the same size
    if not (name.startswith("EDM") or "Flow" in name):
        noisy = scheduler.add_noise(torch.zeros(1, *SHAPE), torch.ones(1, *SHAPE), timesteps[:1])
        assert noisy.max().item() == pytest.approx(levels[4][1], rel=2e-3)


@pytest.mark.parametrize("name", ["DDIM", "DPMSolverMultistep", "UniPCMultistep", "EulerDiscrete", "HeunDiscrete"])
@pytest.mark.parametrize("spacing", ["leading", "trailing"])
def test_pipeline_of_a_gaussian_ends_where_the_whole_run_does(name, spacing):
    scheduler = getattr(diffusers, f"{name}Scheduler")(**SD, timestep_spacing=spacing)
    pipe = small_pipe(scheduler, GAUSSIAN)
    prompt = {"prompt_embeds": embed(2)[0], "negative_prompt_embeds": embed(2)[1], "guidance_scale": 1.0}
    common = {**prompt, "num_inference_steps": 60, "output_type": "latent"}

    def noise():
        return [torch.Generator().manual_seed(i) for i in range(2)]

    full = pipe(**common, generator=noise()).images
    skipped = teleport_call(pipe, statistics=STATISTICS, skip_steps=30, **common, generator=noise()).images
    late = call_from(pipe, lambda s, z: z * s.init_noise_sigma, 30, **common, generator=noise()).images
    assert pipe.scheduler is scheduler
    error, plain = ((v - full).square().mean().sqrt().item() for v in (skipped, late))
    assert error < 0.05 and error < 0.2 * plain, (error, plain)


def test_own_schedulers_and_statistics_per_item():
    scheduler = USFScheduler.from_config(diffusers.DDIMScheduler(**SD).config)
    scheduler.set_timesteps(10)
    other = GaussianStatistics(STATISTICS.mu + 1, STATISTICS.U, STATISTICS.l)
    noise = normal(2, *SHAPE)
    x, _ = GaussianTeleport([STATISTICS, other], scheduler).teleport(noise, 3)
    assert scheduler.begin_index == 3
    for i, statistics in enumerate((STATISTICS, other)):
        torch.testing.assert_close(x[i], GaussianTeleport(statistics, scheduler).teleport(noise, 3)[0][i])
    with pytest.raises(ValueError, match="2 statistics for 3"):
        GaussianTeleport([STATISTICS, other], scheduler).teleport(normal(3, *SHAPE), 3)


def test_solution_at_a_timestep():
    scheduler = diffusers.EulerDiscreteScheduler(**SD)
    scheduler.set_timesteps(10)
    teleport, noise = GaussianTeleport(STATISTICS, scheduler), normal(2, *SHAPE)
    there, timesteps = teleport.teleport(noise, 4)
    same = teleport.solution(noise * float(scheduler.init_noise_sigma), timesteps[0].item())
    torch.testing.assert_close(there, same, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_keeps_its_dtype(dtype):
    scheduler = diffusers.DDIMScheduler(**SD)
    scheduler.set_timesteps(10)
    x, _ = GaussianTeleport(STATISTICS, scheduler).teleport(normal(2, *SHAPE).to(dtype), 3)
    assert x.dtype == dtype and x.isfinite().all()


def test_bad_input():
    scheduler, noise = diffusers.DDIMScheduler(**SD), normal(1, *SHAPE)
    teleport = GaussianTeleport(STATISTICS, scheduler)
    with pytest.raises(RuntimeError, match="set_timesteps"):
        teleport.teleport(noise, 2)
    scheduler.set_timesteps(10)
    for bad in (-1, 10, 2.5):
        with pytest.raises(ValueError, match="outside the grid"):
            teleport.teleport(noise, bad)
    with pytest.raises(ValueError, match="this model"):
        teleport.teleport(normal(1, 4, 8, 8), 2)
    with pytest.raises(ValueError, match="sigma must be above 0"):
        STATISTICS.solve(noise, (1.0, 0.0), (0.6, 0.8))
    pndm = diffusers.PNDMScheduler(**SD)
    pndm.set_timesteps(10)
    with pytest.raises(ValueError, match="PNDM"):
        GaussianTeleport(STATISTICS, pndm).teleport(noise, 2)
    euler = diffusers.EulerDiscreteScheduler(**SD)
    euler.set_timesteps(4)
    euler.step(noise, euler.timesteps[0], noise)
    with pytest.raises(RuntimeError, match="middle of a run"):
        GaussianTeleport(STATISTICS, euler).teleport(noise, 2)


# --- shipped models -----------------------------------------------------------------------------------------------


@torch.no_grad()
def pixels(pipe, latents: torch.Tensor) -> torch.Tensor:
    return pipe.vae.decode(latents / pipe.vae.config.scaling_factor).sample.clamp(-1, 1)


@pytest.mark.slow
def test_a_quarter_of_the_steps_of_shapes_unet_can_be_skipped(shapes_unet):
    """40 DDIM steps and 30 from the closed form end in the same pictures; starting later from noise does not."""
    pipe, n = shapes_unet, 12
    config = pipe.scheduler.config
    pipe.scheduler = diffusers.DDIMScheduler.from_config(config, timestep_spacing="trailing", clip_sample=False)
    prompt, plain = "a large red circle on the left, plain blue background", {"guidance_scale": 1.0}
    latents = draw_latents(pipe, [prompt], 64, num_inference_steps=10, batch_size=32, seed=7, progress=False, **plain)
    statistics = GaussianStatistics.from_latents(latents, 6)

    def common():
        noise = [torch.Generator().manual_seed(500 + i) for i in range(n)]
        return {"num_inference_steps": 40, "generator": noise, "output_type": "latent", **plain}

    full = pipe([prompt] * n, **common()).images
    ours = teleport_call(pipe, [prompt] * n, statistics=statistics, skip_steps=10, **common()).images
    late = call_from(pipe, lambda scheduler, noise: noise, 10, [prompt] * n, **common()).images
    goal = pixels(pipe, full)
    near, far = (mean_psnr(pixels(pipe, v), goal) for v in (ours, late))
    assert near >= 25 and far < near - 5, (near, far)
    whole, skipped = (frechet_distance(features(v), features(latents)) for v in (full, ours))
    assert skipped <= 1.1 * whole, (skipped, whole)


def features(latents: torch.Tensor) -> torch.Tensor:
    """Channel means and standard deviations of VAE latents."""
    return torch.cat([latents.mean((2, 3)), latents.std((2, 3))], 1)


def test_flux_layout_with_a_shift(shapes_dit):
    """The grid that is planned is the one the pipeline sets, also with a dynamic shift; the tail runs."""
    pipe, prompt = shapes_dit, "a red circle"
    statistics = GaussianStatistics.from_images(pipe, zoo.held_out(8).images, rank=2)
    common = {"statistics": statistics, "skip_steps": 1, "num_inference_steps": 3, "height": 64, "width": 64,
              "max_sequence_length": 20, "guidance_scale": 1.0, "output_type": "latent"}  # fmt: skip
    config = pipe.scheduler.config
    for shifted in (False, True):
        pipe.scheduler = diffusers.FlowMatchEulerDiscreteScheduler.from_config(config, use_dynamic_shifting=shifted)
        latents = teleport_call(pipe, prompt, **common, generator=torch.Generator().manual_seed(0)).images
        assert latents.isfinite().all() and latents.shape[1:] == statistics.mu.shape
    with pytest.raises(ValueError, match="outside the grid"):
        teleport_call(pipe, prompt, **{**common, "skip_steps": 3})
