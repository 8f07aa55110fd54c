"""Denoising MCMC: a Markov chain on (noisy sample, noise level) that stays near the data and is denoised now and then.

Samples are x = x0 + sigma n (models with another scaling are brought to it), p(sigma) is log-uniform on K levels. One
sweep of Denoising Langevin Gibbs (DLG) is a Langevin step in x at fixed sigma, then a new sigma given x.
https://arxiv.org/abs/2209.14593
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from ..prediction import NoiseSchedule, expand, to_x0
from ..registry import Claim, MethodRecord, register
from ._common import guided_model, require_choice
from ._pictures import starting_noise


__all__ = ["DLGConfig", "DenoisingLangevinGibbs", "noise_levels"]

SIGMA_UPDATES = ("argmax", "sample", "exact")
INTEGRATORS = ("kar1", "kar2", "euler", "dpmpp_2m")
RHO = 7
S_CHURN, S_MIN, S_MAX, S_NOISE = 80.0, 0.05, 1.0, 1.007  # of kar2, for samples of unit scale


def noise_levels(sigma_min: float, sigma_max: float, count: int = 1000) -> torch.Tensor:
    """The K levels sigma_min (sigma_max / sigma_min)^u, u from 1 down to 1e-3; float64, the noisiest first."""
    u = torch.linspace(1.0, 1e-3, count, dtype=torch.float64)
    return sigma_min * (sigma_max / sigma_min) ** u


def langevin_step(x: torch.Tensor, score: torch.Tensor, eta: torch.Tensor | float, z: torch.Tensor) -> torch.Tensor:
    """x + (eta / 2) score + sqrt(eta) z; eta a number or of a shape that broadcasts."""
    eta = torch.as_tensor(eta, dtype=x.dtype, device=x.device)
    return x + eta / 2 * score + eta.sqrt() * z


def choose_level(logits: torch.Tensor, update: str, generator: torch.Generator | None = None) -> torch.Tensor:
    """Index of the new level of each row of `logits` `[batch, K]`: the most likely one, or one drawn from them."""
    if update == "argmax":
        return logits.argmax(1)
    chances = torch.softmax(torch.nan_to_num(logits.double()), 1)  # a NaN is reported with the samples
    return torch.multinomial(chances, 1, generator=generator)[:, 0]


def per_sample_grid(sigma_start: torch.Tensor, sigma_min: float, points: int) -> torch.Tensor:
    """`[batch, points]`: each sample's own levels, even in sigma^(1/7) from `sigma_start` to `sigma_min`, then 0."""
    first = sigma_start[:, None] ** (1 / RHO)
    share = torch.linspace(0, 1, points - 1, dtype=sigma_start.dtype, device=sigma_start.device)
    grid = (first + share * (sigma_min ** (1 / RHO) - first)) ** RHO
    return torch.cat([grid, torch.zeros_like(sigma_start)[:, None]], 1)


def integrator_calls(integrator: str, points: int) -> int:
    """Model calls of `integrate`."""
    return 2 * (points - 1) - 1 if integrator in ("kar1", "kar2") else points - 1


def integrate(
    denoise: Callable,
    x: torch.Tensor,
    grid: torch.Tensor,
    integrator: str = "kar1",
    generator: torch.Generator | None = None,
    on_call: Callable | None = None,
) -> torch.Tensor:
    """Denoise a batch whose samples each have their own noise levels.

    Args:
        denoise: `D(x, sigma)` with sigma `[batch]`, returning the clean sample.
        x: `[batch, ...]` at the first levels.
        grid: `[batch, N]` levels, falling to 0.
        integrator: `"kar1"` (Heun), `"kar2"` (Heun with churn), `"euler"` or `"dpmpp_2m"`.
        generator: Noise of "kar2".
        on_call: Called after every step with its index and the clean sample.
    """
    older = None
    for i in range(grid.shape[1] - 1):
        sigma, following = grid[:, i], grid[:, i + 1]
        if integrator == "kar2":
            x, sigma = _churn(x, sigma, grid.shape[1], generator)
        x0 = denoise(x, sigma)
        s, t = expand(sigma, x), expand(following, x)
        last = i == grid.shape[1] - 2
        if integrator == "dpmpp_2m" and older is not None and not last:
            x = _two_step(x, x0, older, grid[:, i - 1], sigma, following)
        else:
            slope = (x - x0) / s
            moved = x + (t - s) * slope
            if integrator in ("kar1", "kar2") and not last:
                slope = (slope + (moved - denoise(moved, following)) / t) / 2
                moved = x + (t - s) * slope
            x = moved
        older = x0
        if on_call is not None:
            on_call(i, x0)
    return x


def _churn(x: torch.Tensor, sigma: torch.Tensor, points: int, generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Add noise to the samples whose level is between `S_MIN` and `S_MAX`; their new levels."""
    active = (sigma >= S_MIN) & (sigma <= S_MAX)
    raised = sigma * (1 + min(S_CHURN / points, math.sqrt(2) - 1) * active)
    z = torch.randn(x.shape, generator=generator, dtype=x.dtype, device=x.device)
    return x + expand((raised**2 - sigma**2).sqrt(), x) * S_NOISE * z, raised


def _two_step(x, x0, older, before, sigma, following) -> torch.Tensor:
    """DPM-Solver++(2M) for x = x0 + sigma n."""
    h, h_last = torch.log(sigma / following), torch.log(before / sigma)
    lead = expand(h / (2 * h_last), x)
    ratio = expand(following / sigma, x)
    return ratio * x + (1 - ratio) * ((1 + lead) * x0 - lead * older)


@dataclass(frozen=True)
class DLGConfig:
    """Settings of `DenoisingLangevinGibbs`; the defaults are the authors' for CIFAR-10, in pixels of [0, 1].

    Args:
        eta: Step size of the Langevin step, > 0. Scale it with the square of the noise levels that should be visited.
        n_skip: Sweeps between two pictures, >= 1.
        points: Noise levels of a denoising run with its 0, >= 3.
        integrator: `"kar1"` (Heun), `"kar2"` (Heun with churn), `"euler"` or `"dpmpp_2m"`.
        sigma_update: `"argmax"` (the authors'), `"sample"`, or `"exact"` with a density instead of a classifier.
        sigma_min: Lowest level, > 0.
        sigma_max: Highest level. `for_pipe` knows those of a pipeline's model.
        num_levels: K.
        tweedie_sigma: Level of the last denoising, x + e^2 score(x, e); 0 leaves it out.
        eta_clip: c: never a larger step than c sigma^2, which keeps low levels from exploding. None: as released.
        init_points: Levels of the stochastic sampler that finds the start.
        init_noise: Noise added to what it finds.
        init_eta: Step size of the first sweeps.
        init_sweeps: Their number.
        burn_in: Sweeps with `eta` after them.
    """

    eta: float = 0.8
    n_skip: int = 10
    points: int = 20
    integrator: str = "kar1"
    sigma_update: str = "argmax"
    sigma_min: float = 0.01
    sigma_max: float = 50.0
    num_levels: int = 1000
    tweedie_sigma: float = 0.01
    eta_clip: float | None = None
    init_points: int = 20
    init_noise: float = 0.5
    init_eta: float = 0.5
    init_sweeps: int = 10
    burn_in: int = 10

    def __post_init__(self) -> None:
        require_choice("integrator", self.integrator, INTEGRATORS)
        require_choice("sigma_update", self.sigma_update, SIGMA_UPDATES)
        positive = ("eta", "init_eta", "sigma_min", *(() if self.eta_clip is None else ("eta_clip",)))
        for name, least in (("n_skip", 1), ("points", 3), ("init_points", 3), ("num_levels", 2)):
            if int(getattr(self, name)) != getattr(self, name) or getattr(self, name) < least:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be a whole number from {least} up")
        for name in positive:
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be above 0")
        for name in ("tweedie_sigma", "init_noise", "init_sweeps", "burn_in"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be from 0 up")
        if not self.sigma_min < self.sigma_max < math.inf:
            raise ValueError(f"sigma_max is {self.sigma_max}; it must be above sigma_min = {self.sigma_min}")

    @classmethod
    def for_pipe(cls, pipe: Any, **options) -> DLGConfig:
        """Settings with the noise levels that the model of a pipeline knows.

        Args:
            pipe: Its scheduler describes the levels.
            options: Fields of this class.
        """
        low, high = pipeline_range(pipe)
        low = max(low, cls.sigma_min)
        return cls(**{"sigma_min": low, "sigma_max": high, "tweedie_sigma": low, **options})


@register(
    MethodRecord(
        slug="dmcmc",
        family="schedulers",
        kind="tool",
        title="Denoising MCMC for Accelerating Diffusion-Based Generative Models",
        arxiv="2209.14593",
        summary="Draw many pictures of one prompt from a Markov chain near the data, at a fraction of the calls each.",
        targets=("any",),
        predictions=("epsilon", "v_prediction", "sample", "flow_prediction"),
        nodes=("DXDLGChainInit", "DXDLGSample"),
        claim=Claim("FID at about 10 model calls per picture", "CIFAR-10, score model NCSN++, VE", 3.86, "FID"),
    )
)
class DenoisingLangevinGibbs:
    """Markov chains that hand out a picture every few sweeps. Paper: https://arxiv.org/abs/2209.14593

    Args:
        denoise: `D(x, sigma)`: clean samples of x = x0 + sigma n, sigma `[batch]`. See `from_pipe` for pipelines.
        noise_classifier: `c(x)` -> logits `[batch, K]` over the levels, e.g. a `NoiseLevelClassifier`; with
            `sigma_update="exact"` the log density `p(x, sigma)` -> `[batch]` of the noisy samples instead.
        config: See `DLGConfig`.

    Raises:
        ValueError: The classifier is made for other levels.

    Example:
        >>> chain = DenoisingLangevinGibbs.from_pipe(pipe, ["a red circle"] * 8, classifier)
        >>> chain.init(generator=torch.Generator().manual_seed(0))
        >>> latents = chain.sample(32)

    Limits: pictures of one chain resemble each other, and a chain hardly ever crosses to a far mode: run many in
    parallel. Worth it from several pictures per chain on.
    """

    method: MethodRecord

    def __init__(self, denoise: Callable, noise_classifier: Callable, config: DLGConfig | None = None):
        self.config = config or DLGConfig()
        c = self.config
        self.levels = noise_levels(c.sigma_min, c.sigma_max, c.num_levels)
        if c.sigma_update != "exact":
            _check_classifier(noise_classifier, c)
        self._model, self._classifier = denoise, noise_classifier
        self.x: torch.Tensor | None = None
        self.sigma: torch.Tensor | None = None
        self.generator: torch.Generator | None = None
        self.shape: tuple[int, ...] | None = None
        self.calls = self.pictures = 0
        self.on_call: Callable[[], None] | None = None

    @classmethod
    def from_pipe(
        cls,
        pipe: Any,
        prompts: Sequence[str],
        noise_classifier: Callable,
        config: DLGConfig | None = None,
        guidance_scale: float = 1.0,
        negative_prompt: str = "",
        height: int | None = None,
        width: int | None = None,
    ) -> DenoisingLangevinGibbs:
        """One chain per prompt, on the latents of a Stable Diffusion or Flux pipeline.

        Args:
            pipe: The pipeline.
            prompts: One per chain; repeat a prompt for several chains.
            noise_classifier: See the class; `train_noise_classifier(pipeline_latents(...))` makes one.
            config: Its levels must be within those of the model; default `DLGConfig.for_pipe(pipe)`.
            guidance_scale, negative_prompt: Guidance.
            height, width: Of the pictures, in pixels; square for Flux. By default the pipeline's.
        """
        schedule = NoiseSchedule.from_scheduler(pipe.scheduler)
        flow = schedule.family == "flow"
        prediction = "flow_prediction" if flow else pipe.scheduler.config.get("prediction_type", "epsilon")
        model = guided_model(pipe, prompts, guidance_scale, negative_prompt)

        def denoise(x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
            log_snr = -torch.log(sigma.double())
            alpha, level = (expand(v.to(x), x) for v in schedule.levels(log_snr))
            output = model(alpha * x, schedule.timestep(log_snr).to(x))
            return to_x0(output, alpha * x, alpha, level, prediction)

        chain = cls(denoise, noise_classifier, config or DLGConfig.for_pipe(pipe))
        low, high = pipeline_range(pipe)
        for name, level in asdict(chain.config).items():
            if name in ("sigma_min", "sigma_max") and not low * (1 - 1e-6) <= level <= high * (1 + 1e-6):
                raise ValueError(f"{name} is {level}; the model knows noise levels from {low:.4g} to {high:.4g}")
        chain.shape = tuple(starting_noise(pipe, len(prompts), height, width)[0].shape)
        return chain

    def denoise(self, x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        """Clean samples; counts the call."""
        self.calls += 1
        x0 = self._model(x, sigma)
        if self.on_call is not None:
            self.on_call()
        return x0

    def score(self, x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        """(D - x) / sigma^2."""
        return (self.denoise(x, sigma) - x) / expand(sigma, x) ** 2

    def level_logits(self, x: torch.Tensor) -> torch.Tensor:
        """Logits `[batch, K]` of p(sigma | x) over `levels`.

        Raises:
            ValueError: The classifier returned another shape.
        """
        k = self.config.num_levels
        if self.config.sigma_update == "exact":
            every = self.levels.to(x.device).repeat(len(x))
            return self._classifier(x.repeat_interleave(k, 0), every).reshape(len(x), k)
        logits = self._classifier(x)
        if logits.shape != (len(x), k):
            raise ValueError(f"the noise classifier returned {tuple(logits.shape)}; {len(x)} x {k} levels are needed")
        return logits

    def _new_sigma(self, x: torch.Tensor) -> torch.Tensor:
        index = choose_level(self.level_logits(x), self.config.sigma_update, self.generator)
        return self.levels.to(x.device)[index].to(x.dtype)

    @torch.no_grad()
    def init(
        self,
        batch: int | Sequence[int] | None = None,
        generator: torch.Generator | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> DenoisingLangevinGibbs:
        """Start the chains: a stochastic sampler from the highest level, some noise, sweeps.

        Args:
            batch: Shape of the chains `[batch, ...]`; None for that of the pipeline.
            generator: For all randomness, here and in `sample`; also says on which device.
            dtype: Of the chains.
        """
        return self.start(self.initial_samples(batch, generator, dtype))

    @torch.no_grad()
    def initial_samples(self, batch=None, generator=None, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """Clean samples that `init` starts from, by the stochastic sampler (kar2)."""
        shape = self.shape if batch is None else batch
        if shape is None or isinstance(shape, int):
            raise ValueError("give `batch`, the whole shape of the chains, e.g. (8, 4, 64, 64)")
        c, self.generator = self.config, generator
        device = generator.device if generator else torch.device("cpu")
        x = c.sigma_max * torch.randn(tuple(shape), generator=generator, dtype=dtype, device=device)
        top = torch.full((len(x),), c.sigma_max, dtype=dtype, device=device)
        return integrate(self.denoise, x, per_sample_grid(top, c.sigma_min, c.init_points), "kar2", generator)

    @torch.no_grad()
    def start(self, samples: torch.Tensor) -> DenoisingLangevinGibbs:
        """Start the chains at clean samples `[batch, ...]`."""
        c = self.config
        self.x = samples + c.init_noise * self._randn(samples)
        self.sigma = self._new_sigma(self.x)
        self._sweep(c.init_eta, c.init_sweeps)
        self._sweep(c.eta, c.burn_in)
        self.calls = self.pictures = 0
        return self

    def _randn(self, like: torch.Tensor) -> torch.Tensor:
        return torch.randn(like.shape, generator=self.generator, dtype=like.dtype, device=like.device)

    def _sweep(self, eta: float, times: int = 1) -> None:
        for _ in range(times):
            step = torch.full_like(self.sigma, eta)
            if self.config.eta_clip is not None:
                step = torch.minimum(step, self.config.eta_clip * self.sigma**2)
            score = self.score(self.x, self.sigma)
            self.x = langevin_step(self.x, score, expand(step, self.x), self._randn(self.x))
            self.sigma = self._new_sigma(self.x)

    @torch.no_grad()
    def sweep(self, times: int = 1) -> None:
        """Move the chains without denoising."""
        self._require_start()
        self._sweep(self.config.eta, times)

    @torch.no_grad()
    def sample(self, n: int | None = None) -> torch.Tensor:
        """`n` clean samples (default: one per chain), chain after chain, `n_skip` sweeps apart.

        Raises:
            RuntimeError: `init` has not been called, or the model returned NaN or infinity.
        """
        self._require_start()
        n = len(self.x) if n is None else n
        if n < 1:
            raise ValueError(f"n is {n}; ask for at least one sample")
        blocks = [self._block() for _ in range(-(-n // len(self.x)))]
        self.pictures += len(self.x) * len(blocks)
        samples = torch.cat(blocks)[:n]
        if not torch.isfinite(samples).all():
            raise RuntimeError(
                "a chain has run into NaN or infinity: lower eta, or set eta_clip, e.g. to 1, and start again"
            )
        return samples

    def _block(self) -> torch.Tensor:
        """`n_skip` sweeps, then a copy of the state with the lowest level visited is denoised."""
        c = self.config
        x, sigma = self.x, self.sigma
        for _ in range(c.n_skip):
            self._sweep(c.eta)
            lower = self.sigma < sigma
            x, sigma = torch.where(expand(lower, x), self.x, x), torch.where(lower, self.sigma, sigma)
        x = integrate(self.denoise, x, per_sample_grid(sigma, c.sigma_min, c.points), c.integrator, self.generator)
        if c.tweedie_sigma:
            x = self.denoise(x, torch.full_like(sigma, c.tweedie_sigma))
        return x

    @property
    def calls_per_picture(self) -> float:
        """Model calls since the start, over pictures: n_skip + integrator + 1 (the classifier is not counted)."""
        return self.calls * len(self.x) / self.pictures if self.pictures else math.nan

    def _require_start(self) -> None:
        if self.x is None:
            raise RuntimeError("the chains have not been started: call `init` first")

    def state_dict(self) -> dict[str, torch.Tensor]:
        """The chains and their random numbers; `load_state_dict` continues them bit for bit."""
        self._require_start()
        state = {"x": self.x.clone(), "sigma": self.sigma.clone(), "counts": torch.tensor([self.calls, self.pictures])}
        if self.generator is not None:
            state["rng"] = self.generator.get_state()
        return state

    def load_state_dict(self, state: dict[str, torch.Tensor], device: str | torch.device = "cpu") -> None:
        """Continue chains of `state_dict` on `device`."""
        missing = {"x", "sigma", "counts"} - set(state)
        if missing:
            raise ValueError(f"this is no state of DLG chains: it lacks {', '.join(sorted(missing))}")
        self.x, self.sigma = state["x"].to(device), state["sigma"].to(device)
        self.calls, self.pictures = state["counts"].tolist()
        self.generator = torch.Generator(device) if "rng" in state else None
        if self.generator is not None:
            self.generator.set_state(state["rng"].cpu())

    def save(self, path: str | os.PathLike) -> None:
        """Write the chains to a safetensors file; an interruption leaves the old file or the new one."""
        part = Path(path).with_suffix(".part")
        save_file(self.state_dict(), part, metadata={k: str(v) for k, v in asdict(self.config).items()})
        os.replace(part, path)

    def load(self, path: str | os.PathLike, device: str | torch.device = "cpu") -> None:
        """Continue the chains of a file."""
        self.load_state_dict(load_file(path), device)


def pipeline_range(pipe: Any) -> tuple[float, float]:
    """Lowest and highest noise level sigma / alpha of a pipeline's model; up to 80 for flow models."""
    table = NoiseSchedule.from_scheduler(pipe.scheduler).table
    return (1e-3, 80.0) if table is None else (math.exp(-table[0].item()), math.exp(-table[-1].item()))


def _check_classifier(classifier: Any, config: DLGConfig) -> None:
    """Raise `ValueError` for a `NoiseLevelClassifier` trained on other levels; functions are checked when called."""
    trained = getattr(classifier, "config", None)
    for name in ("num_levels", "sigma_min", "sigma_max"):
        if trained is not None and not math.isclose(trained[name], getattr(config, name), rel_tol=1e-6):
            raise ValueError(
                f"the noise classifier was trained with {name} = {trained[name]}, the chains have "
                f"{getattr(config, name)}: train one for these levels, or put its values into the config"
            )
