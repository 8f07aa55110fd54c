"""Denoising MCMC against exact joint distributions, the authors' integrator, and its own chains run one by one."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

import diffusers_ext
from diffusers_ext import (
    DenoisingLangevinGibbs,
    DLGConfig,
    NoiseLevelClassifier,
    noise_levels,
    pipeline_latents,
    train_noise_classifier,
    zoo,
)
from diffusers_ext.schedulers.dmcmc import choose_level, integrate, integrator_calls, langevin_step, per_sample_grid
from diffusers_ext.schedulers.dmcmc_native import (
    init_calls,
    init_native,
    native_config,
    native_denoiser,
    sample_calls,
    sample_native,
)
from diffusers_ext.zoo import analytic


MIX = analytic.GaussianMixture(
    torch.tensor([[-0.9, 0.2], [1.1, -0.3]]), variances=torch.tensor([[0.5, 0.5], [0.4, 0.4]]), weights=[0.6, 0.4]
)
SMALL = DLGConfig(
    eta=0.04, n_skip=2, points=8, sigma_min=0.2, sigma_max=2.0, num_levels=16, sigma_update="exact", tweedie_sigma=0.0,
    init_points=10, init_sweeps=2, burn_in=2,
)  # fmt: skip


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def denoise(x, sigma):
    return MIX.denoise(x, 1.0, sigma).to(x.dtype)


def log_density(x, sigma):
    return MIX.log_density(x, 1.0, sigma)


def exact_logits(config):
    """What a perfect classifier returns."""
    levels = noise_levels(config.sigma_min, config.sigma_max, config.num_levels)
    return lambda x: torch.stack([log_density(x, s.expand(len(x))) for s in levels], 1)


def chains(config=SMALL, n=4, seed=0, classifier=log_density, dtype=torch.float64):
    chain = DenoisingLangevinGibbs(denoise, classifier, config)
    return chain.init((n, 2), seeded(seed), dtype)


# --- the chain ----------------------------------------------------------------------------------------------------


def quick_logits(config):
    """`exact_logits` with the distances to the means computed once."""
    levels = noise_levels(config.sigma_min, config.sigma_max, config.num_levels)
    variance = MIX.variances[:, :1] + levels**2

    def logits(x):
        distance = ((x[:, None] - MIX.means) ** 2).sum(2)[:, :, None]
        parts = MIX.weights.log()[:, None] - distance / (2 * variance) - torch.log(variance)
        return torch.logaddexp(parts[:, 0], parts[:, 1])

    return logits


@pytest.fixture(scope="module")
def equilibrium():
    """20 000 independent chains, long after a start far from equilibrium (all at one noise level)."""
    config = replace(SMALL, eta=0.12, eta_clip=0.1, init_noise=1.0, sigma_update="sample")
    chain = DenoisingLangevinGibbs(denoise, quick_logits(config), config)
    chain.generator = seeded(1)
    chain.start(MIX.sample(20_000, seeded(2)))
    chain.sweep(150)
    return chain


def test_levels():
    levels = noise_levels(0.01, 50.0, 1000)
    assert levels[0] == 50.0 and len(levels) == 1000
    assert levels[-1] == pytest.approx(0.01 * 5000**1e-3) and levels[-1] > 0.01
    ratios = levels[1:] / levels[:-1]
    assert (ratios - ratios[0]).abs().max() < 1e-12


def test_noise_levels_are_log_uniform(equilibrium):
    """The levels are even in log sigma, so each is as likely as the others: chi-square with K - 1 degrees."""
    k = SMALL.num_levels
    seen = torch.stack([(equilibrium.sigma - s).abs() < 1e-12 for s in equilibrium.levels]).sum(1).double()
    assert seen.sum() == 20_000
    chi2 = ((seen - 20_000 / k) ** 2 / (20_000 / k)).sum().item()
    z = ((chi2 / (k - 1)) ** (1 / 3) - 1 + 2 / (9 * (k - 1))) / math.sqrt(2 / (9 * (k - 1)))  # Wilson and Hilferty
    assert z < 2.33  # p > 0.01


def test_samples_at_a_noise_level_have_its_moments(equilibrium):
    spread = MIX.posterior(torch.zeros(1, 2), 0.0, 1.0).covariance()[0].trace()
    for part in equilibrium.levels.split(4):
        here = torch.isin(equilibrium.sigma, part)
        x, sigma = equilibrium.x[here] - MIX.mean(), equilibrium.sigma[here]
        assert (x.mean(0).abs() < 3 * x.std(0) / math.sqrt(len(x))).all()
        surplus = (x**2).sum(1) - spread - 2 * sigma**2
        assert surplus.mean().abs() < 3 * surplus.std() / math.sqrt(len(x))


def test_denoised_samples_have_the_weights_of_the_modes(equilibrium):
    start = {key: value.clone() for key, value in equilibrium.state_dict().items()}
    samples = equilibrium.sample()
    equilibrium.load_state_dict(start)
    direct = MIX.sample(200_000, seeded(9))
    share = (direct[:, 0] > 0.1).double().mean()
    found = (samples[:, 0] > 0.1).double().mean()
    assert abs(found - share) < 3 * math.sqrt(share * (1 - share) / len(samples))


def test_argmax_is_sharper_than_sampling():
    """Levels on the histogram, counted by its entropy: near all with draws, few with the most likely ones."""
    config, used = replace(SMALL, burn_in=40), {}
    for update in ("argmax", "sample"):
        chain = chains(replace(config, sigma_update=update), 2000, classifier=quick_logits(config))
        share = torch.stack([torch.isclose(chain.sigma, s) for s in chain.levels]).double().mean(1)
        used[update] = torch.exp(-torch.xlogy(share, share).sum()).item()
    assert used["argmax"] < 0.7 * used["sample"]


def test_exact_and_sample_are_the_same_with_a_perfect_classifier():
    a = chains(SMALL, 50)
    for logits in (exact_logits(SMALL), quick_logits(SMALL)):
        b = chains(replace(SMALL, sigma_update="sample"), 50, classifier=logits)
        torch.testing.assert_close(a.x, b.x)
        assert torch.equal(a.sigma, b.sigma)


def test_langevin_step():
    x, score, z = (torch.randn(3, 2, generator=seeded(i)) for i in range(3))
    torch.testing.assert_close(langevin_step(x, score, 0.64, z), x + 0.32 * score + 0.8 * z)


def test_choose_level():
    logits = torch.log(torch.tensor([[0.2, 0.5, 0.3]])).repeat(20_000, 1)
    assert (choose_level(logits, "argmax") == 1).all()
    drawn = torch.bincount(choose_level(logits, "sample", seeded())) / 20_000
    assert (drawn - torch.tensor([0.2, 0.5, 0.3])).abs().max() < 0.02


def test_step_size_is_limited_at_low_levels():
    wild = replace(SMALL, sigma_min=0.01, eta=0.8, init_eta=0.8, burn_in=30)
    narrow = analytic.GaussianMixture(torch.zeros(1, 2), variances=1e-6)
    results = {}
    for clip in (None, 0.5):
        chain = DenoisingLangevinGibbs(
            lambda x, s: narrow.denoise(x, 1.0, s), lambda x, s: -((torch.log(s) - math.log(0.012)) ** 2) * 1e4,
            replace(wild, eta_clip=clip),
        )  # fmt: skip
        chain.generator = seeded()
        results[clip] = chain.start(torch.zeros(50, 2, dtype=torch.float64)).x.abs().max()
    assert results[0.5] < 0.2 and not results[None] < 1e6


# --- pictures of the chain ----------------------------------------------------------------------------------------


def energy_distance(a, b):
    def mean(x, y):
        return torch.cdist(x, y).mean()

    return (2 * mean(a, b) - mean(a, a) - mean(b, b)).item()


def test_half_the_calls_of_the_plain_sampler():
    """From noise level 50: a chain with n calls per picture is nearer to the data than a sampler with 2 n."""
    config = DLGConfig(
        eta=0.1, n_skip=2, points=3, sigma_min=0.05, sigma_max=50.0, num_levels=60, sigma_update="sample",
        tweedie_sigma=0.0, eta_clip=0.3, init_points=20, burn_in=60,
    )  # fmt: skip
    n = 2000
    chain = chains(config, n, classifier=quick_logits(config))
    ours, calls = chain.sample(n), chain.calls_per_picture
    points = max(p for p in range(3, 30) if integrator_calls("kar1", p) <= 2 * calls)
    start = 50 * torch.randn(n, 2, generator=seeded(5), dtype=torch.float64)
    grid = per_sample_grid(torch.full((n,), 50.0, dtype=torch.float64), 0.05, points)
    plain, truth = integrate(denoise, start, grid), MIX.sample(n, seeded(6))
    assert calls == 2 + 3 and integrator_calls("kar1", points) == 9
    assert energy_distance(ours, truth) < energy_distance(plain, truth)


def test_calls_are_counted():
    chain = chains(replace(SMALL, tweedie_sigma=0.1, integrator="euler"))
    chain.sample(8)
    assert chain.calls_per_picture == 2 + 7 + 1
    assert chain.calls == 2 * 10


def test_the_denoised_sample_does_not_go_back():
    """kar1 takes no noise: sampling leaves the chain where sweeps alone leave it."""
    a, b = chains(), chains()
    a.sample(8)
    b.sweep(2 * SMALL.n_skip)
    assert torch.equal(a.x, b.x) and torch.equal(a.sigma, b.sigma)


def test_the_lowest_level_of_a_block_is_denoised():
    chain, seen = chains(replace(SMALL, n_skip=6), 3), []
    model = chain._model

    def spy(x, sigma):
        seen.append((x.clone(), sigma.clone()))
        return model(x, sigma)

    before = chain.sigma
    chain._model = spy
    chain.sample()
    states, visited = (torch.stack(part) for part in zip(*seen[:6]))  # the block ends with a seventh state
    assert torch.equal(visited[0], before)
    lowest, chosen = torch.minimum(visited.min(0).values, chain.sigma), visited.argmin(0)
    x, sigma = seen[6]
    torch.testing.assert_close(sigma, lowest)
    for row in range(3):
        ended_lower = chain.sigma[row] < visited[:, row].min()
        assert torch.equal(x[row], chain.x[row] if ended_lower else states[chosen[row], row])


# --- integrators --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("integrator", ["kar1", "euler", "dpmpp_2m"])
def test_own_levels_for_each_sample(integrator):
    sigma = torch.tensor([0.3, 5.0, 1.2, 40.0], dtype=torch.float64)
    x = torch.randn(4, 2, generator=seeded(), dtype=torch.float64) * sigma[:, None]
    grid = per_sample_grid(sigma, 0.01, 12)
    together = integrate(denoise, x, grid, integrator)
    for i in range(4):
        alone = integrate(denoise, x[i : i + 1], per_sample_grid(sigma[i : i + 1], 0.01, 12), integrator)
        torch.testing.assert_close(alone[0], together[i], rtol=1e-12, atol=1e-12)


def test_grid_is_the_authors():
    sigma, n, rho = torch.tensor([2.0, 9.0], dtype=torch.float64), 7, 7
    grid = per_sample_grid(sigma, 0.01, n)
    for b in range(2):
        for i in range(n - 1):
            expected = (sigma[b] ** (1 / rho) + i / (n - 2) * (0.01 ** (1 / rho) - sigma[b] ** (1 / rho))) ** rho
            assert grid[b, i] == pytest.approx(expected.item(), rel=1e-12)
    assert (grid[:, -1] == 0).all()


@pytest.mark.parametrize("integrator", ["kar1", "kar2"])
def test_steps_of_the_released_integrators(integrator):
    """Written with scores, as the authors do; kar2 with their constants."""
    sigma = torch.tensor([0.6, 3.0], dtype=torch.float64)
    start = torch.randn(2, 2, generator=seeded(), dtype=torch.float64) * sigma[:, None]
    grid, x, generator = per_sample_grid(sigma, 0.01, 9), start, seeded(3)
    for i in range(8):
        here, following = grid[:, i : i + 1], grid[:, i + 1 : i + 2]
        if integrator == "kar2":
            noise = 1.007 * torch.randn(2, 2, generator=generator, dtype=torch.float64)
            active = (here >= 0.05) & (here <= 1.0)
            raised = here * (1 + min(80 / 9, math.sqrt(2) - 1) * active)
            x, here = x + (raised**2 - here**2).sqrt() * noise, raised
        d = -here * MIX.score(x, 1.0, here[:, 0])
        moved = x + (following - here) * d
        if i < 7:
            d = (d - following * MIX.score(moved, 1.0, following[:, 0])) / 2
            moved = x + (following - here) * d
        x = moved
    torch.testing.assert_close(integrate(denoise, start, grid, integrator, seeded(3)), x, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("integrator, order", [("euler", 1), ("kar1", 2), ("dpmpp_2m", 2)])
def test_order(integrator, order):
    sigma = torch.full((20,), 4.0, dtype=torch.float64)
    x = torch.randn(20, 2, generator=seeded(), dtype=torch.float64) * 4
    exact, errors = MIX.ode(x, (1.0, 4.0), (1.0, 0.0), 300), []
    for points in (33, 65, 129, 257):
        found = integrate(denoise, x, per_sample_grid(sigma, 1e-4, points), integrator)
        errors.append(math.log2((found - exact).abs().mean()))
    assert abs((errors[0] - errors[-1]) / 3 - order) < 0.15


# --- state --------------------------------------------------------------------------------------------------------


def test_chains_go_on_from_a_file(tmp_path):
    chain = chains()
    chain.sample(4)
    chain.save(tmp_path / "chain.safetensors")
    expected = chain.sample(8)
    again = DenoisingLangevinGibbs(denoise, log_density, SMALL)
    again.load(tmp_path / "chain.safetensors")
    assert torch.equal(again.sample(8), expected) and again.calls_per_picture == chain.calls_per_picture
    assert [p.name for p in tmp_path.iterdir()] == ["chain.safetensors"]


# --- noise classifier ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pictures():
    """Smooth latents: noise seen through a wide filter."""
    x = torch.randn(48, 4, 16, 16, generator=seeded())
    return torch.nn.functional.avg_pool2d(x, 5, 1, 2) * 4


@pytest.fixture(scope="module")
def classifier(pictures):
    return train_noise_classifier(pictures[:32], 200, 0.05, 20.0, steps=500, progress=False)


def test_classifier_reads_noise_levels(classifier, pictures):
    levels = noise_levels(0.05, 20.0, 200)
    for k in (20, 60, 100, 140):
        noisy = pictures[32:] + levels[k] * torch.randn(16, 4, 16, 16, generator=seeded(k))
        found = levels[classifier(noisy.float()).argmax(1)] / levels[k]
        assert 0.85 < found.median() < 1.15


def test_classifier_takes_any_size_and_tokens(classifier, pictures):
    wide = pictures[:2].repeat(1, 1, 2, 2)
    assert classifier(wide).shape == (2, 200)
    tokens = train_noise_classifier(pictures[:4].flatten(2).mT, 50, steps=2, progress=False)
    assert tokens(pictures[:2].flatten(2).mT).shape == (2, 50)
    with pytest.raises(ValueError, match="4 channels"):
        classifier(torch.zeros(1, 3, 16, 16))


def test_classifier_is_saved(classifier, pictures, tmp_path):
    classifier.save_pretrained(tmp_path)
    again = NoiseLevelClassifier.from_pretrained(tmp_path)
    assert again.config.sigma_max == 20.0
    torch.testing.assert_close(again(pictures[:2]), classifier(pictures[:2]))


def test_training_where_gradients_are_off(pictures):
    """ComfyUI runs its nodes in inference mode."""
    settings = {"num_levels": 50, "steps": 3, "batch_size": 8, "progress": False}
    expected = train_noise_classifier(pictures, **settings)
    with torch.inference_mode():
        found = train_noise_classifier(pictures * 1.0, **settings)
    assert all(torch.equal(a, b) for a, b in zip(found.parameters(), expected.parameters()))


def test_interrupted_training_goes_on(pictures, tmp_path):
    settings = {"num_levels": 50, "steps": 115, "batch_size": 8, "progress": False}
    expected = train_noise_classifier(pictures, **settings)
    file = tmp_path / "training.safetensors"

    def stop(step):
        if step == 110:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_noise_classifier(pictures, **settings, checkpoint=file, on_step=stop)
    steps = []
    found = train_noise_classifier(pictures, **settings, checkpoint=file, on_step=steps.append)
    assert steps[0] == 101
    for a, b in zip(found.parameters(), expected.parameters()):
        assert torch.equal(a, b)
    with pytest.raises(ValueError, match="seed"):
        train_noise_classifier(pictures, **settings, checkpoint=file, seed=1)


# --- pipelines ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["shapes_unet", "shapes_unet_eps", "shapes_dit"])
def test_chains_on_a_pipeline(name, request):
    pipe, scenes = request.getfixturevalue(name), zoo.held_out(2)
    latents = pipeline_latents(pipe, scenes.images)
    config = DLGConfig.for_pipe(pipe, n_skip=2, points=5, init_points=5, init_sweeps=1, burn_in=1, num_levels=100)
    levels = (config.num_levels, config.sigma_min, config.sigma_max)
    net = train_noise_classifier(latents, *levels, steps=50, progress=False)
    chain = DenoisingLangevinGibbs.from_pipe(
        pipe, scenes.captions, net, config, guidance_scale=2.0, height=64, width=64
    )  # fmt: skip
    chain.init(generator=seeded())
    samples = chain.sample(4)
    assert samples.shape == (4, *latents.shape[1:]) and samples.isfinite().all()
    assert chain.calls_per_picture == 2 + 7 + 1
    assert (chain.sigma >= config.sigma_min).all() and (chain.sigma <= config.sigma_max * 1.001).all()
    with pytest.raises(ValueError, match="sigma_max"):
        DenoisingLangevinGibbs.from_pipe(pipe, ["x"], lambda x: x, replace(config, sigma_max=1e6))


def test_pipeline_score_is_that_of_the_model(shapes_unet, shapes_dit):
    """One prediction at the model's own timestep, by hand."""
    from diffusers_ext.schedulers._common import guided_model

    caption = zoo.held_out(1).captions
    for pipe, shape in ((shapes_unet, (1, 4, 16, 16)), (shapes_dit, (1, 64, 16))):
        chain = DenoisingLangevinGibbs.from_pipe(pipe, caption, lambda x: x)
        x, t = torch.randn(shape, generator=seeded()), torch.tensor([400.0])
        model = guided_model(pipe, caption)
        if pipe is shapes_dit:
            alpha, level = 0.6, 0.4
            expected = alpha * x - level * model(alpha * x, t)
        else:
            bar = pipe.scheduler.alphas_cumprod[400].double()
            alpha, level = bar.sqrt().item(), (1 - bar).sqrt().item()
            expected = alpha * alpha * x - level * model(alpha * x, t)
        found = chain.denoise(x, torch.tensor([level / alpha], dtype=torch.float32))
        assert (found - expected).abs().max() < 2e-3


# --- native -------------------------------------------------------------------------------------------------------

IMAGE = analytic.GaussianMixture(torch.randn(2, 4, 8, 8, generator=seeded()), variances=0.1)


class Model:
    """A ComfyUI model function with the `model_sampling` that it hides."""

    def __init__(self, flow):
        base = (type("CONST", (), {}),) if flow else ()
        sampling = type("Sampling", base, {"sigma_min": 0.03, "sigma_max": 14.6})()
        inner = type("Model", (), {"model_sampling": sampling})()
        self.inner_model = type("Guider", (), {"inner_model": inner})()
        self.flow, self.calls = flow, 0

    def __call__(self, x, sigma, **extra):
        self.calls += 1
        return analytic.comfy_denoiser(IMAGE, self.flow)(x, sigma)


@pytest.mark.parametrize("flow", [False, True])
def test_native_is_the_class(flow):
    model = Model(flow)
    options = {"n_skip": 2, "points": 5, "init_points": 6, "init_sweeps": 2, "burn_in": 2, "num_levels": 100}
    config = native_config(model, **options)
    assert (config.sigma_min, config.sigma_max) == ((0.01, 80.0) if flow else (0.03, 14.6))
    state, net = init_native(model, (2, 4, 8, 8), torch.device("cpu"), 5, config, training_steps=20)
    assert model.calls == init_calls(config)
    before = {key: value.clone() for key, value in state.items()}
    native, _ = sample_native(model, state, net, config, 5, torch.device("cpu"))
    assert model.calls == init_calls(config) + sample_calls(config, 2, 5)
    assert all(torch.equal(state[key], before[key]) for key in state)

    chain = DenoisingLangevinGibbs(lambda x, s: IMAGE.denoise(x, 1.0, s).to(x.dtype), net, config)
    chain.load_state_dict(state)
    torch.testing.assert_close(chain.sample(5), native, rtol=0, atol=1e-4)
    clean = chain.initial_samples((2, 4, 8, 8), seeded(5))
    exact = DenoisingLangevinGibbs(native_denoiser(model), net, config).initial_samples((2, 4, 8, 8), seeded(5))
    torch.testing.assert_close(clean, exact, rtol=0, atol=1e-4)


# --- bad input ----------------------------------------------------------------------------------------------------


def test_classifier_for_other_levels(classifier):
    with pytest.raises(ValueError, match="num_levels = 200"):
        DenoisingLangevinGibbs(denoise, classifier, replace(SMALL, sigma_update="argmax"))
    config = replace(SMALL, sigma_update="sample")
    with pytest.raises(ValueError, match="16 levels"):
        chains(config, classifier=lambda x: torch.zeros(len(x), 15))


def test_before_the_start():
    chain = DenoisingLangevinGibbs(denoise, log_density, SMALL)
    for use in (chain.sample, chain.sweep, chain.state_dict):
        with pytest.raises(RuntimeError, match="init"):
            use()
    with pytest.raises(ValueError, match="batch"):
        chain.init()
    with pytest.raises(ValueError, match="lacks"):
        chain.load_state_dict({"x": torch.zeros(1)})


@pytest.mark.parametrize(
    "option, value",
    [("eta", 0.0), ("n_skip", 0), ("points", 2), ("integrator", "rk4"), ("sigma_update", "best"), ("sigma_max", 0.1),
     ("eta_clip", -1.0), ("num_levels", 1), ("tweedie_sigma", -0.1), ("sigma_min", math.nan)],
)  # fmt: skip
def test_bad_options(option, value):
    with pytest.raises(ValueError, match=option):
        replace(SMALL, **{option: value})


def test_nan_of_the_model():
    chain = chains()
    chain._model = lambda x, sigma: x * math.nan
    with pytest.raises(RuntimeError, match="eta"):
        chain.sample()
    with pytest.raises(ValueError, match="at least one"):
        chains().sample(0)


def test_public_names():
    assert diffusers_ext.DenoisingLangevinGibbs is DenoisingLangevinGibbs
