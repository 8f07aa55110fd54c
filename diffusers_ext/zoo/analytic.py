"""Denoisers whose answers are known exactly: Gaussian mixtures with closed-form scores in float64.

A `GaussianMixture` knows its score, density, posterior and probability-flow ODE at every noise level
x = alpha * x0 + sigma * noise. `AnalyticDenoiser` turns it into `model(sample, timestep)` with any noise schedule and
prediction type, `AnalyticUNet` into a model for diffusers pipelines, `comfy_denoiser` into a ComfyUI model function.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from diffusers.models.unets.unet_2d_condition import UNet2DConditionOutput

from ..prediction import NoiseSchedule, Prediction, expand


SCHEDULES = ("sd", "linear", "cosine", "flow", "edm")


def schedule(name: str = "sd", num_train_timesteps: int = 1000) -> NoiseSchedule:
    """A well-known noise schedule.

    Args:
        name: `"sd"` (Stable Diffusion's scaled-linear betas), `"linear"` (1e-4..0.02), `"cosine"`, `"flow"` or `"edm"`
            (alpha = 1, timestep log(sigma) / 4).
        num_train_timesteps: Length of the discrete schedules; timestep of pure noise for `"flow"`.
    """
    n = num_train_timesteps
    if name == "sd":
        return NoiseSchedule.from_betas(torch.linspace(0.00085**0.5, 0.012**0.5, n, dtype=torch.float64) ** 2)
    if name == "linear":
        return NoiseSchedule.from_betas(torch.linspace(1e-4, 0.02, n, dtype=torch.float64))
    if name == "cosine":
        bar = torch.cos((torch.arange(n + 1, dtype=torch.float64) / n + 0.008) / 1.008 * math.pi / 2) ** 2
        return NoiseSchedule.from_betas((1 - bar[1:] / bar[:-1]).clamp(max=0.999))
    if name in ("flow", "edm"):
        return NoiseSchedule("flow" if name == "flow" else "ve", None, n)
    raise ValueError(f"unknown schedule {name!r}; known: {', '.join(SCHEDULES)}")


@dataclass(frozen=True)
class Posterior:
    """The clean sample given a noisy one: a Gaussian mixture per batch item, in the components' eigenbases.

    Args:
        weights: `[batch, K]` probabilities of the components.
        means: `[batch, K, n]`.
        variances: `[batch or 1, K, n]` along each eigenvector.
        basis: `[K, n, n]` eigenvectors in columns, or None where the covariances are diagonal.
        shape: Shape of one sample.
    """

    weights: torch.Tensor
    means: torch.Tensor
    variances: torch.Tensor
    basis: torch.Tensor | None
    shape: tuple[int, ...]

    def mean(self) -> torch.Tensor:
        """E[x0 | x], `[batch, *shape]`: what a perfect denoiser predicts."""
        return (self.weights[..., None] * self.means).sum(1).reshape(-1, *self.shape)

    def covariance(self) -> torch.Tensor:
        """Cov[x0 | x], `[batch, n, n]`."""
        inner = torch.diag_embed(self.variances)
        if self.basis is not None:
            inner = self.basis @ inner @ self.basis.mT
        centred = self.means - self.mean().flatten(1)[:, None]
        inner = inner + centred[..., :, None] * centred[..., None, :]
        return (self.weights[..., None, None] * inner).sum(1)

    def sample(self, generator: torch.Generator | None = None) -> torch.Tensor:
        """One draw of x0 per batch item, `[batch, *shape]`."""
        k = torch.multinomial(self.weights, 1, generator=generator)[:, 0]
        rows = torch.arange(len(k))
        noise = torch.randn(self.means[:, 0].shape, generator=generator, dtype=self.means.dtype)
        offset = noise * self.variances.expand_as(self.means)[rows, k].sqrt()
        if self.basis is not None:
            offset = (self.basis[k] @ offset[..., None])[..., 0]
        return (self.means[rows, k] + offset).reshape(-1, *self.shape)


class GaussianMixture:
    """A data distribution whose noisy scores, densities, posteriors and ODE paths are known exactly.

    Args:
        means: `[K, *shape]`, one mean per component.
        variances: Diagonal covariances: number, `[K]`, `[*shape]`-broadcastable or `[K, *shape]`. Default 1.
        covariances: Full covariances `[K, n, n]` with n = prod(shape), in place of `variances`.
        weights: `[K]` probabilities; default equal.

    Example:
        >>> mixture = GaussianMixture(torch.randn(3, 8), variances=0.05)
        >>> score = mixture.score(torch.randn(4, 8), alpha=0.6, sigma=0.8)
    """

    def __init__(self, means, variances=None, covariances=None, weights=None):
        means = torch.as_tensor(means, dtype=torch.float64)
        self.shape = tuple(means.shape[1:])
        self.means = means.flatten(1) if self.shape else means[:, None]
        self.basis = None
        if covariances is not None:
            if variances is not None:
                raise ValueError("give either `variances` or `covariances`, not both")
            covariances = torch.as_tensor(covariances, dtype=torch.float64).expand(
                len(means), *[self.means.shape[1]] * 2
            )
            self.variances, self.basis = torch.linalg.eigh(covariances)
        else:
            self.variances = _per_component(1.0 if variances is None else variances, means)
        if not (self.variances > 0).all():
            raise ValueError("every variance of a component must be positive")
        weights = torch.ones(len(means)) if weights is None else torch.as_tensor(weights)
        if weights.shape != (len(means),) or not (weights > 0).all():
            raise ValueError(f"`weights` must be {len(means)} positive numbers, got {weights.tolist()}")
        self.weights = weights.double() / weights.double().sum()

    @classmethod
    def gaussian(cls, mean, variance=None, covariance=None) -> GaussianMixture:
        """One Gaussian: `mean` of the sample's shape, `variance` broadcastable to it, or `covariance` `[n, n]`."""
        mean = torch.as_tensor(mean, dtype=torch.float64)
        variance = (
            None if variance is None else torch.as_tensor(variance, dtype=torch.float64).expand(mean.shape)[None]
        )
        return cls(mean[None], variance, None if covariance is None else torch.as_tensor(covariance)[None])

    def component(self, index: int) -> GaussianMixture:
        """One component as a distribution of its own, e.g. the conditional model in a guidance test."""
        one = slice(index, index + 1)
        mean = self.means[one].reshape(1, *self.shape)
        if self.basis is None:
            return GaussianMixture(mean, self.variances[one].reshape(mean.shape))
        return GaussianMixture(mean, covariances=self.covariances()[one])

    def covariances(self) -> torch.Tensor:
        """Full covariances, `[K, n, n]`."""
        diagonal = torch.diag_embed(self.variances)
        return diagonal if self.basis is None else self.basis @ diagonal @ self.basis.mT

    def mean(self) -> torch.Tensor:
        """Mean of the data, `shape`."""
        return (self.weights[:, None] * self.means).sum(0).reshape(self.shape)

    def sample(self, n: int, generator: torch.Generator | None = None) -> torch.Tensor:
        """`n` independent data points, `[n, *shape]` in float64."""
        zero = torch.zeros(n, *self.shape, dtype=torch.float64)
        return self.posterior(zero, 0.0, 1.0).sample(generator)

    def log_density(self, x: torch.Tensor, alpha=1.0, sigma=0.0) -> torch.Tensor:
        """log p(x) of the noisy distribution, `[batch]`. `alpha`, `sigma`: numbers or `[batch]`."""
        return torch.logsumexp(self._joint(x, alpha, sigma)[0], 1)

    def score(self, x: torch.Tensor, alpha=1.0, sigma=0.0) -> torch.Tensor:
        """Gradient of `log_density` in x, of x's shape."""
        log_joint, z, variance, _ = self._joint(x, alpha, sigma)
        pull = self._rotate_back(-z / variance)
        return (torch.softmax(log_joint, 1)[..., None] * pull).sum(1).reshape(x.shape)

    def noise(self, x: torch.Tensor, alpha, sigma) -> torch.Tensor:
        """E[noise | x] = -sigma * score: what a perfect epsilon model predicts; finite at sigma 0."""
        return -expand(torch.as_tensor(sigma, dtype=torch.float64), x) * self.score(x, alpha, sigma)

    def denoise(self, x: torch.Tensor, alpha, sigma) -> torch.Tensor:
        """E[x0 | x]: what a perfect sample model predicts; finite at alpha 0 and at sigma 0."""
        return self.posterior(x, alpha, sigma).mean()

    def posterior(self, x: torch.Tensor, alpha, sigma) -> Posterior:
        """The exact distribution of the clean sample given a noisy one."""
        log_joint, z, variance, (alpha, sigma) = self._joint(x, alpha, sigma)
        gain = alpha * self.variances / variance
        means = self.means + self._rotate_back(gain * z)
        spread = self.variances * sigma**2 / variance
        return Posterior(torch.softmax(log_joint, 1), means, spread, self.basis, self.shape)

    def condition(self, operator: torch.Tensor, measurement: torch.Tensor, noise_std: float) -> GaussianMixture:
        """The exact posterior of the data given `measurement = operator @ x0 + noise_std * noise`, again a mixture.

        Args:
            operator: `[m, n]`.
            measurement: `[m]`.
            noise_std: Standard deviation of the measurement noise, > 0.
        """
        a, cov = operator.double(), self.covariances()
        seen = a @ cov @ a.T + noise_std**2 * torch.eye(len(a), dtype=torch.float64)
        gain = torch.linalg.solve(seen, a @ cov).mT
        rest = measurement.double() - self.means @ a.T
        evidence = torch.distributions.MultivariateNormal(torch.zeros_like(rest), seen).log_prob(rest)
        weights = torch.softmax(self.weights.log() + evidence, 0)
        means = self.means + (gain @ rest[..., None])[..., 0]
        cov = cov - gain @ a @ cov
        return GaussianMixture(means.reshape(-1, *self.shape), covariances=(cov + cov.mT) / 2, weights=weights)

    def ode(self, x: torch.Tensor, source: tuple, target: tuple, steps: int = 400) -> torch.Tensor:
        """Where the probability-flow ODE carries `x` from noise level `source` to `target`, both `(alpha, sigma)`.

        Exact for one Gaussian; for mixtures fifth-order (two RK4 runs of `steps` and `2 * steps`, extrapolated).
        """
        (a, s), (a_to, s_to) = ([torch.as_tensor(v, dtype=torch.float64) for v in level] for level in (source, target))
        if len(self.means) > 1:
            z = solve_ode(
                self.velocity, x.double() / torch.hypot(a, s), torch.atan2(s, a), torch.atan2(s_to, a_to), steps
            )
            return z * torch.hypot(a_to, s_to)
        _, z, variance, _ = self._joint(x, a, s)
        ratio = (a_to**2 * self.variances + s_to**2) / variance
        return (a_to * self.means + self._rotate_back(ratio.sqrt() * z)).reshape(x.shape)

    def velocity(self, x: torch.Tensor, phi) -> torch.Tensor:
        """Exact v prediction cos(phi) noise - sin(phi) x0 at the noise level alpha = cos(phi), sigma = sin(phi)."""
        phi = torch.as_tensor(phi, dtype=torch.float64)
        a, s = torch.cos(phi), torch.sin(phi)
        return expand(a, x) * self.noise(x, a, s) - expand(s, x) * self.denoise(x, a, s)

    def _joint(self, x: torch.Tensor, alpha, sigma):
        """log p(component, x) `[batch, K]`, centred x in the eigenbases `[batch, K, n]`, its variances, the levels."""
        alpha, sigma = (torch.as_tensor(v, dtype=torch.float64).reshape(-1, 1, 1) for v in (alpha, sigma))
        z = x.double().reshape(len(x), 1, -1) - alpha * self.means
        if self.basis is not None:
            z = torch.einsum("kij,bki->bkj", self.basis, z)
        variance = alpha**2 * self.variances + sigma**2
        log_likelihood = -0.5 * (z**2 / variance + torch.log(2 * math.pi * variance)).sum(-1)
        return self.weights.log() + log_likelihood, z, variance, (alpha, sigma)

    def _rotate_back(self, z: torch.Tensor) -> torch.Tensor:
        return z if self.basis is None else torch.einsum("kij,bkj->bki", self.basis, z)


def _per_component(variances, means: torch.Tensor) -> torch.Tensor:
    variances = torch.as_tensor(variances, dtype=torch.float64)
    if variances.shape == means.shape[:1] and means.ndim > 1 and variances.shape != means.shape[1:]:
        variances = expand(variances, means)
    spread = variances.expand(means.shape)
    return spread.flatten(1) if means.ndim > 1 else spread[:, None]


def solve_ode(velocity: Callable, z: torch.Tensor, source, target, steps: int = 400) -> torch.Tensor:
    """Reference solution of the probability-flow ODE in the angle phi = atan(sigma / alpha).

    z = x / sqrt(alpha^2 + sigma^2) obeys dz/dphi = cos(phi) noise - sin(phi) x0, which is regular from pure noise
    (pi / 2) to clean data (0). RK4 with `steps` and `2 * steps` steps, Richardson-extrapolated.

    Args:
        velocity: `(z, phi) -> dz/dphi`, phi a float64 scalar tensor.
        z: Start, float64 for a reference.
        source, target: phi at start and end.
        steps: Steps of the coarser run.
    """

    def run(n: int) -> torch.Tensor:
        return rk4(velocity, z, source + torch.linspace(0, 1, n + 1, dtype=torch.float64) * (target - source))

    fine = run(2 * steps)
    return fine + (fine - run(steps)) / 15


def rk4(slope: Callable, y: torch.Tensor, grid: torch.Tensor) -> torch.Tensor:
    """Classical Runge-Kutta for dy/du = slope(y, u) along the float64 nodes `grid`; four calls per step."""
    for u, v in zip(grid[:-1], grid[1:]):
        h, mid = (v - u).to(y.device), (u + v) / 2
        k1 = slope(y, u)
        k2 = slope(y + h / 2 * k1, mid)
        k3 = slope(y + h / 2 * k2, mid)
        k4 = slope(y + h * k3, v)
        y = y + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
    return y


class AnalyticDenoiser:
    """A perfect denoiser as `model(sample, timestep)`; counts its calls.

    Args:
        mixture: The data distribution.
        noise_schedule: Maps timesteps to noise levels; see `schedule`.
        prediction: What it returns: `"epsilon"`, `"v_prediction"`, `"sample"` or `"flow_prediction"`.

    Example:
        >>> model = AnalyticDenoiser(GaussianMixture.gaussian(torch.zeros(4, 8, 8)), schedule("sd"), "epsilon")
        >>> noise = model(torch.randn(2, 4, 8, 8), 500)
    """

    def __init__(self, mixture: GaussianMixture, noise_schedule: NoiseSchedule, prediction: Prediction = "epsilon"):
        self.mixture, self.schedule, self.prediction = mixture, noise_schedule, prediction
        self.calls = 0

    def __call__(self, sample: torch.Tensor, timestep, *args, **kwargs) -> torch.Tensor:
        """Prediction for `sample` `[batch, *shape]` at `timestep` (number, scalar or `[batch]`), in sample's dtype."""
        self.calls += 1
        alpha, sigma = self.schedule.levels(self.schedule.log_snr(timestep))
        x, (a, s) = sample.double(), (expand(v, sample) for v in (alpha, sigma))
        if self.prediction == "epsilon":
            output = self.mixture.noise(x, alpha, sigma)
        elif self.prediction == "sample":
            output = self.mixture.denoise(x, alpha, sigma)
        else:
            noise, x0 = self.mixture.noise(x, alpha, sigma), self.mixture.denoise(x, alpha, sigma)
            output = a * noise - s * x0 if self.prediction == "v_prediction" else noise - x0
        return output.to(sample.dtype)


def edm_preconditioned(mixture: GaussianMixture, sigma_data: float = 0.5) -> Callable:
    """The raw network F of an EDM model: `F(c_in * x, log(sigma) / 4)`, for diffusers' EDM schedulers."""

    def network(sample: torch.Tensor, timestep, *args, **kwargs) -> torch.Tensor:
        sigma = torch.exp(4 * torch.as_tensor(timestep, dtype=torch.float64))
        s, total = expand(sigma, sample), (expand(sigma, sample) ** 2 + sigma_data**2)
        x = sample.double() * total.sqrt()
        x0 = mixture.denoise(x, 1.0, sigma)
        return ((x0 - sigma_data**2 / total * x) * total.sqrt() / (s * sigma_data)).to(sample.dtype)

    return network


def comfy_denoiser(mixture: GaussianMixture, flow: bool = False) -> Callable:
    """A ComfyUI model function `model(x, sigma, **extra_args) -> denoised`.

    Args:
        mixture: The data distribution.
        flow: Noise like a flow model (`model_sampling.CONST`: x = (1 - sigma) x0 + sigma noise) instead of
            x = x0 + sigma noise.
    """

    def model(x: torch.Tensor, sigma: torch.Tensor, **extra_args) -> torch.Tensor:
        sigma = torch.as_tensor(sigma, dtype=torch.float64)
        return mixture.denoise(x, 1 - sigma if flow else 1.0, sigma).to(x.dtype)

    return model


class AnalyticUNet(ModelMixin, ConfigMixin):
    """A perfect denoiser in the place of a pipeline's UNet; saves and loads like any model.

    The prompt embedding selects the distribution: `encoder_hidden_states[:, 0, 0] = k` means component k alone, a
    negative number the whole mixture. Build it with `from_mixture`.

    Args:
        in_channels: Channels of the latents.
        sample_size: Height and width of the latents.
        num_components: Components of the mixture (diagonal covariances).
        noise_schedule: Name for `schedule`.
        prediction: Prediction type.
        time_cond_proj_dim: Always None; pipelines look for it.
    """

    @register_to_config
    def __init__(
        self,
        in_channels: int = 4,
        sample_size: int = 8,
        num_components: int = 1,
        noise_schedule: str = "sd",
        prediction: Prediction = "epsilon",
        time_cond_proj_dim: None = None,
    ):
        super().__init__()
        shape = (in_channels, sample_size, sample_size)
        self.levels = schedule(noise_schedule)
        self.means = torch.nn.Parameter(torch.zeros(num_components, *shape, dtype=torch.float64))
        self.variances = torch.nn.Parameter(torch.ones(num_components, *shape, dtype=torch.float64))
        self.weights = torch.nn.Parameter(torch.ones(num_components, dtype=torch.float64))
        self.requires_grad_(False)

    @classmethod
    def from_mixture(cls, mixture: GaussianMixture, noise_schedule: str = "sd", prediction: str = "epsilon"):
        """The UNet of a mixture with diagonal covariances and 3-D samples."""
        if mixture.basis is not None or len(mixture.shape) != 3 or mixture.shape[1] != mixture.shape[2]:
            raise ValueError(f"AnalyticUNet needs (C, S, S) samples and diagonal covariances, got {mixture.shape}")
        model = cls(mixture.shape[0], mixture.shape[1], len(mixture.means), noise_schedule, prediction)
        model.means.data = mixture.means.reshape(-1, *mixture.shape).clone()
        model.variances.data = mixture.variances.reshape(-1, *mixture.shape).clone()
        model.weights.data = mixture.weights.clone()
        return model

    @staticmethod
    def embedding(component: int, batch_size: int = 1) -> torch.Tensor:
        """Prompt embedding `[batch, 1, 1]` that selects `component` (-1: the mixture)."""
        return torch.full((batch_size, 1, 1), float(component))

    def forward(self, sample, timestep, encoder_hidden_states=None, return_dict: bool = True, **kwargs):
        """Prediction `[batch, C, H, W]`, as `UNet2DConditionOutput` or a tuple."""
        mixture = GaussianMixture(self.means, self.variances, weights=self.weights)
        chosen = [-1] * len(sample) if encoder_hidden_states is None else encoder_hidden_states[:, 0, 0].int().tolist()
        times = torch.as_tensor(timestep).expand(len(sample))
        rows = []
        for x, t, k in zip(sample, times, chosen):
            part = mixture if k < 0 else mixture.component(k)
            rows.append(AnalyticDenoiser(part, self.levels, self.config.prediction)(x[None], t[None]))
        output = torch.cat(rows)
        return UNet2DConditionOutput(sample=output) if return_dict else (output,)


def latent_pipeline(mixture: GaussianMixture, scheduler, noise_schedule: str = "sd", prediction: str = "epsilon"):
    """A `StableDiffusionPipeline` around `AnalyticUNet`, without text encoder and VAE.

    Call it with `prompt_embeds=AnalyticUNet.embedding(k)`, `negative_prompt_embeds=AnalyticUNet.embedding(-1)` and
    `output_type="latent"`.
    """
    from diffusers import StableDiffusionPipeline

    pipe = StableDiffusionPipeline(
        vae=None,
        text_encoder=None,
        tokenizer=None,
        unet=AnalyticUNet.from_mixture(mixture, noise_schedule, prediction),
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe
