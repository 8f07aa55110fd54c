"""The analytic models against autograd, quadrature, Monte Carlo and upstream solvers."""

from __future__ import annotations

import math

import diffusers
import pytest
import torch

from diffusers_ext.prediction import PREDICTIONS, NoiseSchedule, expand, to_noise, to_x0
from diffusers_ext.zoo import analytic


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def covariance(n, k, seed=1):
    root = torch.randn(k, n, n, generator=rng(seed), dtype=torch.float64) / n**0.5
    return root @ root.mT + 0.1 * torch.eye(n, dtype=torch.float64)


MIXTURES = {
    "gaussian": analytic.GaussianMixture.gaussian(torch.tensor([0.7, -0.2]), torch.tensor([0.09, 0.5])),
    "diagonal": analytic.GaussianMixture(torch.randn(3, 2, generator=rng()), torch.tensor([0.1, 0.3, 0.6])),
    "full": analytic.GaussianMixture(
        torch.randn(3, 2, generator=rng()), covariances=covariance(2, 3), weights=torch.tensor([1.0, 2.0, 5.0])
    ),
    "image": analytic.GaussianMixture(torch.randn(2, 3, 4, 4, generator=rng()), 0.2),
}


@pytest.fixture(params=MIXTURES, ids=str)
def mixture(request):
    return MIXTURES[request.param]


def noisy(mixture, alpha, sigma, n=5):
    x0 = mixture.sample(n, rng(3))
    return alpha * x0 + sigma * torch.randn(x0.shape, generator=rng(4), dtype=torch.float64)


def test_score_is_the_gradient_of_the_log_density(mixture):
    x = noisy(mixture, 0.6, 0.8).requires_grad_()
    (gradient,) = torch.autograd.grad(mixture.log_density(x, 0.6, 0.8).sum(), x)
    torch.testing.assert_close(mixture.score(x, 0.6, 0.8), gradient)


def test_tweedie_links_noise_and_denoised(mixture):
    x = noisy(mixture, 0.6, 0.8)
    back = 0.6 * mixture.denoise(x, 0.6, 0.8) + 0.8 * mixture.noise(x, 0.6, 0.8)
    torch.testing.assert_close(back, x)


def test_density_integrates_to_one_and_matches_torch():
    mixture = MIXTURES["full"]
    axis = torch.linspace(-8, 8, 401, dtype=torch.float64)
    grid = torch.cartesian_prod(axis, axis)
    assert math.isclose(mixture.log_density(grid, 0.9, 0.3).exp().sum() * (axis[1] - axis[0]) ** 2, 1, abs_tol=1e-8)
    noisy_cov = 0.81 * mixture.covariances() + 0.09 * torch.eye(2)
    reference = torch.distributions.MixtureSameFamily(
        torch.distributions.Categorical(mixture.weights),
        torch.distributions.MultivariateNormal(0.9 * mixture.means, noisy_cov),
    )
    torch.testing.assert_close(mixture.log_density(grid[:50], 0.9, 0.3), reference.log_prob(grid[:50]))


def test_posterior_is_bayes_rule():
    mixture, alpha, sigma = MIXTURES["full"], 0.7, 0.5
    x = noisy(mixture, alpha, sigma, 1)
    x0 = mixture.sample(400_000, rng(7))
    likelihood = torch.softmax(-((x - alpha * x0) ** 2).sum(1) / (2 * sigma**2), 0)
    mean = (likelihood[:, None] * x0).sum(0)
    posterior = mixture.posterior(x, alpha, sigma)
    torch.testing.assert_close(posterior.mean()[0], mean, atol=5e-3, rtol=0)
    weighted = likelihood[:, None, None] * (x0 - mean)[:, :, None] * (x0 - mean)[:, None, :]
    torch.testing.assert_close(posterior.covariance()[0], weighted.sum(0), atol=5e-3, rtol=0)
    many = mixture.posterior(x.expand(100_000, 2), alpha, sigma).sample(rng(8))
    torch.testing.assert_close(many.mean(0), mean, atol=1e-2, rtol=0)
    torch.testing.assert_close(many.T.cov(), posterior.covariance()[0], atol=1e-2, rtol=0)


def test_condition_is_bayes_rule():
    mixture, operator, y, std = MIXTURES["full"], torch.tensor([[1.0, 0.5]]), torch.tensor([0.3]), 0.4
    x0 = mixture.sample(400_000, rng(7))
    weights = torch.softmax(-((y - x0 @ operator.double().T)[:, 0] ** 2) / (2 * std**2), 0)
    conditioned = mixture.condition(operator, y, std)
    torch.testing.assert_close(conditioned.mean(), (weights[:, None] * x0).sum(0), atol=1e-2, rtol=0)
    direct = conditioned.log_density(x0[:20]) - mixture.log_density(x0[:20])
    expected = -((y - x0[:20] @ operator.double().T)[:, 0] ** 2) / (2 * std**2)
    torch.testing.assert_close(direct - direct[0], expected - expected[0])


def test_samples_have_the_moments():
    mixture = MIXTURES["full"]
    x = mixture.sample(200_000, rng())
    torch.testing.assert_close(x.mean(0), mixture.mean(), atol=1e-2, rtol=0)


@pytest.mark.parametrize("name", analytic.SCHEDULES)
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_every_schedule_and_prediction_converts_back(mixture, name, prediction):
    schedule = analytic.schedule(name)
    defined_in = {"v_prediction": "vp", "flow_prediction": "flow"}
    if defined_in.get(prediction, schedule.family) != schedule.family:
        pytest.skip("v is defined for vp, flow velocity for flow")
    time = torch.tensor([0.4, -0.3] if name == "edm" else [300, 720])
    alpha, sigma = schedule.levels(schedule.log_snr(time))
    x = noisy(mixture, expand(alpha, mixture.sample(2)), expand(sigma, mixture.sample(2)), 2)
    model = analytic.AnalyticDenoiser(mixture, schedule, prediction)
    output, a, s = model(x, time), expand(alpha, x), expand(sigma, x)
    torch.testing.assert_close(to_x0(output, x, a, s, prediction), mixture.denoise(x, alpha, sigma))
    torch.testing.assert_close(to_noise(output, x, a, s, prediction), mixture.noise(x, alpha, sigma))
    assert model(x.half(), time).dtype == torch.float16 and model.calls == 2


def test_gaussian_ode_closed_form_equals_the_integrator():
    single = MIXTURES["gaussian"]
    twice = analytic.GaussianMixture(single.means.repeat(2, 1), single.variances.repeat(2, 1))
    for source, target in [((0.0, 1.0), (1.0, 0.0)), ((0.6, 0.8), (0.98, 0.199)), ((1.0, 20.0), (1.0, 0.01))]:
        x = noisy(single, *source)
        torch.testing.assert_close(twice.ode(x, source, target), single.ode(x, source, target), atol=1e-8, rtol=1e-8)


def test_mixture_ode_preserves_the_density(mixture):
    """Instantaneous change of variables: log p moves by minus the log-determinant of the flow."""
    if mixture.shape != (2,):
        pytest.skip("needs a small Jacobian")
    x, source, target = noisy(mixture, 0.6, 0.8, 2), (0.6, 0.8), (0.95, 0.31)
    flow = torch.func.jacrev(lambda x: mixture.ode(x[None], source, target, 100)[0])
    moved = mixture.ode(x, source, target, 100)
    change = mixture.log_density(moved, *target) - mixture.log_density(x, *source)
    determinant = torch.stack([torch.linalg.slogdet(flow(row)).logabsdet for row in x])
    torch.testing.assert_close(change, -determinant, atol=1e-7, rtol=0)


def test_edm_preconditioning_gives_the_denoiser():
    mixture, sigma = MIXTURES["gaussian"], torch.tensor([0.3, 5.0], dtype=torch.float64)
    network = analytic.edm_preconditioned(mixture)
    x = noisy(mixture, 1.0, sigma[:, None], 2)
    total = (sigma**2 + 0.25)[:, None]
    output = network(x / total.sqrt(), sigma.log() / 4)
    x0 = 0.25 / total * x + sigma[:, None] * 0.5 / total.sqrt() * output
    torch.testing.assert_close(x0, mixture.denoise(x, 1.0, sigma))


@pytest.mark.parametrize("flow", [False, True])
def test_comfy_denoiser(flow):
    mixture, sigma = MIXTURES["image"], torch.tensor([0.4, 0.9])
    x = noisy(mixture, 1.0, 0.5, 2)
    expected = mixture.denoise(x, 1 - sigma if flow else torch.ones(2), sigma)
    torch.testing.assert_close(analytic.comfy_denoiser(mixture, flow)(x, sigma, model_options={}), expected)


def test_schedules_agree_with_diffusers():
    for name, settings in [("sd", ("scaled_linear", 0.00085, 0.012)), ("linear", ("linear", 1e-4, 0.02))]:
        kind, start, end = settings
        upstream = diffusers.DDIMScheduler(beta_schedule=kind, beta_start=start, beta_end=end)
        schedule, rebuilt = analytic.schedule(name), NoiseSchedule.from_scheduler(upstream)
        alpha = schedule.levels(schedule.log_snr(torch.arange(1000)))[0]
        torch.testing.assert_close(alpha.float() ** 2, upstream.alphas_cumprod, atol=1e-6, rtol=1e-4)
        torch.testing.assert_close(rebuilt.table, schedule.table, atol=1e-4, rtol=1e-4)
    cosine = NoiseSchedule.from_scheduler(diffusers.DDIMScheduler(beta_schedule="squaredcos_cap_v2"))
    torch.testing.assert_close(cosine.table[:-1], analytic.schedule("cosine").table[:-1], atol=1e-3, rtol=1e-3)


class TestPipeline:
    @pytest.fixture
    def pipe(self):
        mixture = analytic.GaussianMixture(torch.randn(2, 4, 8, 8, generator=rng()), 0.05)
        scheduler = diffusers.DPMSolverMultistepScheduler(
            beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1, solver_order=2
        )
        return analytic.latent_pipeline(mixture, scheduler)

    def run(self, pipe, component, steps):
        embedding = analytic.AnalyticUNet.embedding
        latents = torch.randn(1, 4, 8, 8, generator=rng(5), dtype=torch.float64)
        return pipe(
            prompt_embeds=embedding(component),
            negative_prompt_embeds=embedding(-1),
            guidance_scale=1.0,
            latents=latents,
            num_inference_steps=steps,
            output_type="latent",
        ).images, latents

    def test_pipeline_converges_to_the_exact_solution(self, pipe):
        """With component 0 chosen the solution is Gaussian, hence closed form."""
        errors = []
        for steps in (25, 100):
            out, latents = self.run(pipe, 0, steps)
            top = pipe.scheduler.timesteps[0].item()
            levels = pipe.unet.levels.levels(pipe.unet.levels.log_snr(torch.tensor([top])))
            gaussian = analytic.GaussianMixture(pipe.unet.means, pipe.unet.variances).component(0)
            exact = gaussian.ode(latents, [v.item() for v in levels], (1.0, 0.0))
            errors.append((out - exact).pow(2).mean().sqrt().item())
        assert errors[1] < errors[0] / 2.5 and errors[1] < 0.02

    def test_save_and_load(self, pipe, tmp_path):
        pipe.unet.save_pretrained(tmp_path)
        again = analytic.AnalyticUNet.from_pretrained(tmp_path)
        x = torch.randn(2, 4, 8, 8, generator=rng())
        assert torch.equal(again(x, 500).sample, pipe.unet(x, 500).sample)


def test_bad_input():
    with pytest.raises(ValueError, match="known: sd"):
        analytic.schedule("karras")
    with pytest.raises(ValueError, match="positive"):
        analytic.GaussianMixture(torch.zeros(2, 3), variances=0.0)
    with pytest.raises(ValueError, match="either"):
        analytic.GaussianMixture(torch.zeros(2, 3), variances=1.0, covariances=torch.eye(3))
    with pytest.raises(ValueError, match="weights"):
        analytic.GaussianMixture(torch.zeros(2, 3), weights=torch.ones(3))
    with pytest.raises(ValueError, match="AnalyticUNet"):
        analytic.AnalyticUNet.from_mixture(MIXTURES["diagonal"])
