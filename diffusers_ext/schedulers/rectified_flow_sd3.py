"""Where a rectified flow is trained and sampled: densities of the noise level, loss weights, resolution shift (SD3).

z_t = (1 - t) x0 + t noise, t = 0 data, t = 1 noise; the model predicts v = noise - x0. https://arxiv.org/abs/2403.03206
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.configuration_utils import register_to_config

from ..prediction import expand
from ..registry import Claim, MethodRecord, register
from ._common import require_choice


__all__ = [
    "FlowMatchTrainingScheduler",
    "TimestepSampler",
    "Trajectory",
    "flow_matching_loss",
    "resolution_shift",
    "shift_timesteps",
]

TIMESTEP_SAMPLERS = ("logit_normal", "mode", "cosmap", "uniform")
LOSS_WEIGHTINGS = ("none", "cosmap", "sigma_sqrt")
MAX_MODE_SCALE = 2 / (math.pi - 2)
_EDGE = 1e-5


def shift_timesteps(t: torch.Tensor, alpha: float) -> torch.Tensor:
    """Move noise levels t in [0, 1] to alpha t / (1 + (alpha - 1) t); alpha > 1 means more noise (eq. 23).

    Args:
        t: Any shape.
        alpha: Shift, > 0: 3 for SD3 at 1024 x 1024, 1 leaves t alone. The log-SNR falls by 2 log(alpha) everywhere.
    """
    if not alpha > 0:
        raise ValueError(f"the shift is {alpha}; it must be above 0")
    return alpha * t / (1 + (alpha - 1) * t)


def resolution_shift(m: float, n: float, base_shift: float = 1.0) -> float:
    """The shift that m pixels need if n pixels need `base_shift`: sqrt(m / n) * base_shift.

    The mean of a constant picture is known sqrt(m / n) times better at m pixels; the shift adds the noise that undoes
    it.

    Example:
        >>> resolution_shift(1024 * 1024, 512 * 512)
        2.0
    """
    if not (m > 0 and n > 0 and base_shift > 0):
        raise ValueError(f"resolutions and shift must be above 0, got m={m}, n={n}, base_shift={base_shift}")
    return math.sqrt(m / n) * base_shift


def mode_map(u: torch.Tensor, s: float) -> torch.Tensor:
    """f(u) = 1 - u - s (cos^2(pi u / 2) - 1 + u): uniform u to a density peaked, or hollow, in the middle (eq. 20)."""
    return 1 - u - s * (torch.cos(math.pi / 2 * u) ** 2 - 1 + u)


def _mode_density(t: torch.Tensor, s: float) -> torch.Tensor:
    """|df^-1 / dt| = 1 / |f'(u)|; f falls, so u is found by bisection."""
    low, high = torch.zeros_like(t), torch.ones_like(t)
    for _ in range(60):
        u = (low + high) / 2
        above = mode_map(u, s) > t
        low, high = torch.where(above, u, low), torch.where(above, high, u)
    return 1 / (1 + s - s * math.pi / 2 * torch.sin(math.pi * u))


def _logit_normal_density(t: torch.Tensor, m: float, s: float) -> torch.Tensor:
    """Density of sigmoid(m + s n), n standard normal (eq. 19)."""
    z = (torch.logit(t) - m) / s
    return torch.exp(-(z**2) / 2) / (s * math.sqrt(2 * math.pi) * t * (1 - t))


def _cosmap_density(t: torch.Tensor) -> torch.Tensor:
    """Density of 1 - 1 / (tan(pi u / 2) + 1), the log-SNR of the cosine schedule (eq. 21)."""
    return 2 / (math.pi - 2 * math.pi * t + 2 * math.pi * t**2)


def loss_weight(t: torch.Tensor, kind: str) -> torch.Tensor:
    """Weight of the loss at t: `"none"` (1), `"cosmap"` (2 / (pi (1 - 2t + 2t^2))) or `"sigma_sqrt"` (1 / t^2)."""
    require_choice("loss_weighting", kind, LOSS_WEIGHTINGS)
    if kind == "none":
        return torch.ones_like(t)
    return _cosmap_density(t) if kind == "cosmap" else t.clamp(min=_EDGE) ** -2


def flow_matching_loss(
    output: torch.Tensor, x0: torch.Tensor, noise: torch.Tensor, weight: torch.Tensor | None = None
) -> torch.Tensor:
    """Mean over the batch of weight * |v - (noise - x0)|^2 (eq. 12); the square is averaged over a sample.

    Args:
        output: Predicted v, `[batch, ...]`.
        x0: Clean samples of the same shape.
        noise: Their noise.
        weight: `[batch]`, default 1.
    """
    if output.shape != x0.shape or noise.shape != x0.shape:
        shapes = [tuple(v.shape) for v in (output, x0, noise)]
        raise ValueError(f"output, x0 and noise must have one shape, got {shapes[0]}, {shapes[1]} and {shapes[2]}")
    error = ((output - (noise - x0)) ** 2).flatten(1).mean(1)
    return (error if weight is None else weight.to(error) * error).mean()


@dataclass(frozen=True)
class TimestepSampler:
    """Draws the noise levels a rectified flow is trained on, and knows their density.

    Paper: https://arxiv.org/abs/2403.03206.

    Args:
        kind: `"logit_normal"` (best in the paper), `"mode"` (peaked, yet positive at the ends), `"cosmap"` (log-SNR of
            the cosine schedule) or `"uniform"`.
        m: Mean of the logit; below 0 trains more on clean samples, above 0 on noisy ones.
        s: Standard deviation of the logit, > 0; or scale of the mode, -1 to 2 / (pi - 2), default 1.29. Other kinds
            have no `m` and `s`.
        shift: `shift_timesteps` applied to what was drawn, for training at another resolution.

    Raises:
        ValueError: Unknown kind, or a parameter out of range or not of this kind.

    Example:
        >>> t = TimestepSampler("logit_normal", m=0.0, s=1.0).sample(16)

    Limits: diffusers' training scripts take such numbers as an index into their falling list of timesteps, which turns
    m around and shifts again. Use t directly: the noise level is t, the model's timestep 1000 t.
    """

    kind: str = "logit_normal"
    m: float | None = None
    s: float | None = None
    shift: float = 1.0
    _scale: float = field(init=False, repr=False, compare=False, default=0.0)

    def __post_init__(self) -> None:
        require_choice("timestep_sampler", self.kind, TIMESTEP_SAMPLERS)
        accepted = {"logit_normal": ("m", "s"), "mode": ("s",)}.get(self.kind, ())
        for name in ("m", "s"):
            if getattr(self, name) is not None and name not in accepted:
                raise ValueError(f"the timestep sampler {self.kind!r} has no parameter {name}: leave it out")
        default = {"logit_normal": 1.0, "mode": 1.29}.get(self.kind, 0.0)
        scale = default if self.s is None else self.s
        if self.kind == "logit_normal" and not scale > 0:
            raise ValueError(f"s of logit_normal is {scale}; it must be above 0")
        if self.kind == "mode" and not -1 <= scale <= MAX_MODE_SCALE:
            raise ValueError(f"s of mode is {scale}; it must lie in [-1, {MAX_MODE_SCALE:.4f}]")
        if not self.shift > 0:
            raise ValueError(f"the shift is {self.shift}; it must be above 0")
        object.__setattr__(self, "_scale", scale)

    @classmethod
    def from_config(cls, config: dict) -> TimestepSampler:
        """The sampler of a dict with `kind` and its parameters, as `to_config` returns it."""
        unknown = set(config) - {"kind", "m", "s", "shift"}
        if unknown:
            raise ValueError(f"unknown timestep sampler options {sorted(unknown)}; accepted: kind, m, s, shift")
        return cls(**config)

    def to_config(self) -> dict:
        """`kind`, `shift` and the parameters that were given."""
        given = {"kind": self.kind, "m": self.m, "s": self.s, "shift": self.shift}
        return {name: value for name, value in given.items() if value is not None}

    def sample(
        self, n: int, generator: torch.Generator | None = None, device=None, dtype: torch.dtype = torch.float32
    ) -> torch.Tensor:
        """`n` independent noise levels in [0, 1], `[n]`."""
        draw = torch.randn if self.kind == "logit_normal" else torch.rand
        u = draw(n, generator=generator, dtype=torch.float64)
        if self.kind == "logit_normal":
            t = torch.sigmoid((self.m or 0.0) + self._scale * u)
        elif self.kind == "cosmap":
            t = 1 - 1 / (torch.tan(math.pi / 2 * u) + 1)
        else:
            t = mode_map(u, self._scale)
        return shift_timesteps(t, self.shift).to(device, dtype)

    def density(self, t: torch.Tensor) -> torch.Tensor:
        """pi(t), of t's shape, in float64; t is kept 1e-5 away from 0 and 1."""
        shifted = t.double().clamp(_EDGE, 1 - _EDGE)
        t = shift_timesteps(shifted, 1 / self.shift)
        if self.kind == "logit_normal":
            density = _logit_normal_density(t, self.m or 0.0, self._scale)
        elif self.kind == "cosmap":
            density = _cosmap_density(t)
        else:
            density = _mode_density(t, self._scale)
        return density * self.shift / (self.shift - (self.shift - 1) * shifted) ** 2

    def weight(self, t: torch.Tensor) -> torch.Tensor:
        """t / (1 - t) pi(t): the weight of the noise-prediction loss under uniform t that this density equals."""
        inner = t.double().clamp(_EDGE, 1 - _EDGE)
        return inner / (1 - inner) * self.density(t)


@dataclass(frozen=True)
class Trajectory:
    """The forward processes the paper compares, z_t = a x0 + b noise, under one interface.

    Args:
        kind: `"rectified"`, `"cosine"`, `"ldm_linear"` (Stable Diffusion's betas) or `"edm"` (a = 1).
        m: Mean of log b for `"edm"`.
        s: Standard deviation of log b for `"edm"`, > 0.

    Example:
        >>> a, b = Trajectory("cosine").levels(torch.linspace(0.1, 0.9, 9))
    """

    kind: str = "rectified"
    m: float = -1.2
    s: float = 1.2

    def __post_init__(self) -> None:
        require_choice("trajectory", self.kind, ("rectified", "cosine", "ldm_linear", "edm"))
        if not self.s > 0:
            raise ValueError(f"s of the trajectory is {self.s}; it must be above 0")

    def levels(self, t: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """`(a, b)` at t in (0, 1), float64."""
        t = t.double()
        if self.kind == "rectified":
            return 1 - t, t
        if self.kind == "cosine":
            return torch.cos(math.pi / 2 * t), torch.sin(math.pi / 2 * t)
        if self.kind == "edm":
            return torch.ones_like(t), torch.exp(self.m + self.s * torch.special.ndtri(t))
        beta = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
        log_a = torch.cat([torch.zeros(1), 0.5 * torch.log1p(-beta).cumsum(0)])
        place = (t * 1000).clamp(0, 1000)
        low = place.floor().long().clamp(max=999)
        a = torch.exp(log_a[low] + (place - low) * (log_a[low + 1] - log_a[low]))
        return a, torch.sqrt(1 - a**2)

    def log_snr(self, t: torch.Tensor) -> torch.Tensor:
        """log(a^2 / b^2), the paper's lambda (twice the lambda of DPM-Solver)."""
        a, b = self.levels(t)
        return 2 * (torch.log(a) - torch.log(b))

    def matching_weight(self, t: torch.Tensor) -> torch.Tensor:
        """-1/2 lambda'(t) b^2: the weight that makes the noise-prediction loss conditional flow matching (eq. 14)."""
        t = t.double().detach().requires_grad_()
        with torch.enable_grad():
            slope = torch.autograd.grad(self.log_snr(t).sum(), t)[0]
        return -0.5 * slope * self.levels(t.detach())[1] ** 2


@register(
    MethodRecord(
        slug="rectified-flow-sd3",
        family="schedulers",
        kind="training",
        title="Scaling Rectified Flow Transformers for High-Resolution Image Synthesis",
        arxiv="2403.03206",
        summary="Train flow models on the noise levels that matter; the right shift at any resolution.",
        targets=("any",),
        predictions=("flow_prediction",),
        nodes=("DXResolutionShift",),
        claim=Claim(
            text="GenEval score (DALL-E 3: 0.67)",
            setting="8B model trained with logit-normal noise levels and shift 3, 1024 x 1024, after DPO",
            value=0.74,
            unit="GenEval overall",
        ),
    )
)
class FlowMatchTrainingScheduler(FlowMatchEulerDiscreteScheduler):
    """Euler sampler of flow models that also trains them: continuous noise levels from any density, and the loss.

    Paper: https://arxiv.org/abs/2403.03206. `shift` is used for training and sampling alike, as in SD3.

    Args:
        timestep_sampler: Density of the noise levels in training, see `TimestepSampler`.
        sampler_mean: Its m (`"logit_normal"`).
        sampler_scale: Its s (`"logit_normal"`, `"mode"`).
        loss_weighting: `"none"`, `"cosmap"` or `"sigma_sqrt"`.
        inference_grid: `"paper"`: 1, 1 - 1/T ... 1/T, shifted once. `"diffusers"`: as
            `FlowMatchEulerDiscreteScheduler`, whose last level is shifted twice.

    The other options are those of `diffusers.FlowMatchEulerDiscreteScheduler`.

    Raises:
        ValueError: An option is out of range, or density and weighting both are CosMap.

    Example:
        >>> scheduler = FlowMatchTrainingScheduler.from_config(pipe.scheduler.config)
        >>> sigmas, timesteps = scheduler.sample_noise_levels(len(latents))
        >>> noisy = scheduler.noised(latents, noise, sigmas)
        >>> loss = scheduler.loss(pipe.transformer(noisy, timesteps / 1000, ...)[0], latents, noise, sigmas)

    Limits: flow models only.
    """

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        shift: float = 1.0,
        use_dynamic_shifting: bool = False,
        base_shift: float | None = 0.5,
        max_shift: float | None = 1.15,
        base_image_seq_len: int = 256,
        max_image_seq_len: int = 4096,
        invert_sigmas: bool = False,
        shift_terminal: float | None = None,
        use_karras_sigmas: bool = False,
        use_exponential_sigmas: bool = False,
        use_beta_sigmas: bool = False,
        time_shift_type: str = "exponential",
        stochastic_sampling: bool = False,
        timestep_sampler: str = "logit_normal",
        sampler_mean: float | None = None,
        sampler_scale: float | None = None,
        loss_weighting: str = "none",
        inference_grid: str = "paper",
    ):
        require_choice("loss_weighting", loss_weighting, LOSS_WEIGHTINGS)
        require_choice("inference_grid", inference_grid, ("paper", "diffusers"))
        if timestep_sampler == loss_weighting == "cosmap":
            raise ValueError("CosMap density and CosMap weighting do the same thing twice: choose one of them")
        self.sampler = TimestepSampler(timestep_sampler, sampler_mean, sampler_scale)
        own = ("timestep_sampler", "sampler_mean", "sampler_scale", "loss_weighting", "inference_grid")
        super().__init__(**{k: v for k, v in self.config.items() if k not in own and not k.startswith("_")})

    @classmethod
    def from_config(cls, config=None, return_unused_kwargs: bool = False, **kwargs):
        """This scheduler with the settings of another flow-matching scheduler.

        Raises:
            ValueError: The config is of a scheduler that is not for flow models.
        """
        config = config or {}
        flow = config.get("use_flow_sigmas") or config.get("prediction_type") == "flow_prediction"
        if not flow and ("beta_start" in config or "sigma_data" in config):
            raise ValueError(
                f"the scheduler config is of a model with betas or EDM noise levels, and {cls.__name__} trains and "
                "samples flow models only"
            )
        if "flow_shift" in config:
            config = {**config, "shift": config["flow_shift"]}
        return super().from_config(config, return_unused_kwargs, **kwargs)

    def set_timesteps(self, num_inference_steps=None, device=None, sigmas=None, mu=None, timesteps=None) -> None:
        """Choose the noise levels of a run; arguments as in `diffusers.FlowMatchEulerDiscreteScheduler`."""
        c = self.config
        spaced = c.use_karras_sigmas or c.use_exponential_sigmas or c.use_beta_sigmas
        if c.inference_grid == "paper" and not spaced and sigmas is timesteps is None:
            sigmas = torch.linspace(1, 1 / num_inference_steps, num_inference_steps, dtype=torch.float64).tolist()
        super().set_timesteps(num_inference_steps, device, sigmas=sigmas, mu=mu, timesteps=timesteps)

    def sample_noise_levels(
        self, n: int, generator: torch.Generator | None = None, device=None, shift: float | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Noise levels for a training batch, continuous and shifted.

        Args:
            n: Batch size.
            generator: For reproducible draws (on the CPU).
            device: Where the result is wanted.
            shift: Instead of the `shift` of the config, e.g. `resolution_shift(...)` for batches of other sizes.

        Returns:
            `(sigmas, timesteps)`, each `[n]` float32; timesteps = num_train_timesteps * sigmas, not rounded.
        """
        t = self.sampler.sample(n, generator, dtype=torch.float64)
        sigmas = shift_timesteps(t, self.shift if shift is None else shift).to(device, torch.float32)
        return sigmas, sigmas * self.config.num_train_timesteps

    def noised(self, x0: torch.Tensor, noise: torch.Tensor, sigmas: torch.Tensor) -> torch.Tensor:
        """(1 - sigma) x0 + sigma noise for `sigmas` `[batch]`."""
        sigma = expand(sigmas.to(x0), x0)
        return (1 - sigma) * x0 + sigma * noise

    def loss(self, output: torch.Tensor, x0: torch.Tensor, noise: torch.Tensor, sigmas: torch.Tensor) -> torch.Tensor:
        """`flow_matching_loss` with the weighting of the config."""
        return flow_matching_loss(output, x0, noise, loss_weight(sigmas, self.config.loss_weighting))
