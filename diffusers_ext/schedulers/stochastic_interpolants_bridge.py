"""Stochastic interpolants between two sets of pictures: the paths, the losses, and sampling both ways.

x_t = alpha(t) x0 + beta(t) x1 + gamma(t) z, t from 0 (x0) to 1 (x1), z standard normal. One-sided paths start at
noise: they have no x0, and gamma(0) = 1. With eta = E[z | x_t] and v = E[alpha' x0 + beta' x1 | x_t] the score is
s = -eta / gamma and the drift b = v + gamma' eta. https://arxiv.org/abs/2303.08797
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from diffusers import DiffusionPipeline, ImagePipelineOutput, UNet2DModel
from diffusers.image_processor import VaeImageProcessor
from diffusers.utils.torch_utils import randn_tensor

from ..prediction import expand
from ._common import require_choice
from .stochastic_interpolants import INTEGRATORS, advance, plan


__all__ = ["BridgePipeline", "Interpolant", "interpolant_training_loss"]

GAMMAS = ("brownian", "zero", "bsquared", "sinesquared", "sigmoid")
TWO_SIDED = ("linear", "trig", "encoding-decoding")
FROM_NOISE = ("one-sided-linear", "one-sided-trig")
ONE_SIDED = (*FROM_NOISE, "mirror")
TARGETS = ("b", "v", "eta", "s")
_BUMP = 10.0  # steepness of the sigmoid bump
_EDGE = 1e-3


def unit_gamma(kind: str, t: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`(gamma, gamma', gamma gamma')` of a type; the product is finite also where gamma' is not."""
    if kind == "brownian":
        gamma, product = torch.sqrt(t * (1 - t)), (1 - 2 * t) / 2
        return gamma, product / gamma, product
    if kind == "zero":
        gamma, slope = torch.zeros_like(t), torch.zeros_like(t)
    elif kind == "bsquared":
        gamma, slope = t * (1 - t), 1 - 2 * t
    elif kind == "sinesquared":
        gamma, slope = torch.sin(math.pi * t) ** 2, math.pi * torch.sin(2 * math.pi * t)
    else:
        rise, fall = (torch.sigmoid(_BUMP * (t - 0.5) + shift) for shift in (1, -1))
        end = torch.sigmoid(torch.tensor([1.0, -1.0], dtype=torch.float64) - _BUMP / 2).diff().neg().item()
        gamma, slope = rise - fall - end, _BUMP * (rise * (1 - rise) - fall * (1 - fall))
    return gamma, slope, gamma * slope


class Interpolant:
    """A path between two distributions, with what its losses need.

    Paper: https://arxiv.org/abs/2303.08797.

    Args:
        path: `"linear"`, `"trig"` or `"encoding-decoding"` between two sets of samples; `"one-sided-linear"` or
            `"one-sided-trig"` from noise; `"mirror"` from x1 to itself.
        gamma_type: Noise in between: `"brownian"` sqrt(t (1 - t)), `"zero"`, `"bsquared"` t (1 - t),
            `"sinesquared"` sin^2(pi t) or `"sigmoid"` (a bump). One-sided paths from noise have none of it.
        gamma_scale: A >= 0; gamma is multiplied by sqrt(A).

    Raises:
        ValueError: Unknown path or type, A below 0, or "trig" with a gamma above 1.

    Example:
        >>> path = Interpolant("linear", "brownian")
        >>> x_t, z = path.calc_xt(torch.rand(4), blurred, sharp)
    """

    def __init__(self, path: str = "linear", gamma_type: str = "brownian", gamma_scale: float = 1.0):
        require_choice("path", path, TWO_SIDED + ONE_SIDED)
        require_choice("gamma_type", gamma_type, GAMMAS)
        if not 0 <= gamma_scale < math.inf:
            raise ValueError(f"gamma_scale is {gamma_scale}; gamma^2 is multiplied by it, so it must be from 0 up")
        self.path, self.gamma_type, self.gamma_scale = path, gamma_type, gamma_scale
        self.one_sided = path in ONE_SIDED
        top = self.levels(torch.tensor(0.5, dtype=torch.float64))[2] if path == "trig" else 0.0
        if top > 1 + 1e-12:
            raise ValueError(f"gamma reaches {float(top):.3g}; 'trig' needs gamma <= 1: lower gamma_scale")

    @property
    def noiseless(self) -> bool:
        """Whether gamma is 0 everywhere."""
        return self.path not in FROM_NOISE and (self.gamma_type == "zero" or self.gamma_scale == 0)

    def _gamma(self, t: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """`(gamma, gamma', gamma gamma')`; on paths from noise gamma is the factor of the noise they start from."""
        if self.path == "one-sided-linear":
            return 1 - t, -torch.ones_like(t), t - 1
        if self.path == "one-sided-trig":
            gamma, slope = torch.cos(math.pi / 2 * t), -math.pi / 2 * torch.sin(math.pi / 2 * t)
            return gamma, slope, gamma * slope
        gamma, slope, product = unit_gamma("zero" if self.noiseless else self.gamma_type, t)
        root = math.sqrt(self.gamma_scale)
        return root * gamma, root * slope, self.gamma_scale * product

    def levels(self, t: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """`(alpha, beta, gamma)` at times `t`, each of t's shape."""
        return self._path(t)[0]

    def slopes(self, t: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """`(alpha', beta', gamma gamma')` at times `t`; the product, for gamma' itself can be infinite at the ends."""
        return self._path(t)[1]

    def _path(self, t: torch.Tensor) -> tuple[tuple, tuple]:
        gamma, _, product = self._gamma(t)
        zero, one, angle = torch.zeros_like(t), torch.ones_like(t), math.pi / 2 * t
        cos, sin = torch.cos(angle), torch.sin(angle)
        if self.path in ("linear", "one-sided-linear"):
            (a, b), (da, db) = (1 - t, t), (-one, one)
        elif self.path == "one-sided-trig":
            (a, b), (da, db) = (zero, sin), (zero, math.pi / 2 * cos)
        elif self.path == "mirror":
            (a, b), (da, db) = (zero, one), (zero, zero)
        elif self.path == "trig":
            root = torch.sqrt((1 - gamma**2).clamp(min=0))
            bend = torch.where(root > 0, -product / root.clamp(min=1e-30), zero)
            (a, b) = root * cos, root * sin
            da, db = bend * cos - math.pi / 2 * b, bend * sin + math.pi / 2 * a
        else:
            wave, slope = torch.cos(math.pi * t) ** 2, -math.pi * torch.sin(2 * math.pi * t)
            first = t <= 0.5
            (a, b) = torch.where(first, wave, zero), torch.where(first, zero, wave)
            da, db = torch.where(first, slope, zero), torch.where(first, zero, slope)
        if self.one_sided:
            a, da = zero, zero
        return (a, b, gamma), (da, db, product)

    def calc_xt(self, t, x0, x1, z=None, generator: torch.Generator | None = None):
        """`(x_t, z)`.

        Args:
            t: `[batch]` or a scalar tensor, in [0, 1].
            x0, x1: Samples of one shape; x0 of a one-sided path is its noise z, or None to have it drawn.
            z: The noise; drawn where it is not given.
            generator: For drawing it.
        """
        z = self._noise(x0, x1, z, generator)
        a, b, g = (expand(level, x1) for level in self.levels(t))
        return (b * x1 if self.one_sided else a * x0 + b * x1) + g * z, z

    def antithetic(self, t, x0, x1, z=None, generator: torch.Generator | None = None):
        """`(x_t with z, x_t with -z, z)`: the pair whose losses are averaged. Arguments as in `calc_xt`."""
        plus, z = self.calc_xt(t, x0, x1, z, generator)
        return plus, plus - 2 * expand(self.levels(t)[2], x1) * z, z

    def _noise(self, x0, x1, z, generator) -> torch.Tensor:
        if not self.one_sided and (x0 is None or x0.shape != x1.shape):
            given = None if x0 is None else tuple(x0.shape)
            raise ValueError(f"x0 and x1 must have one shape, got {given} and {tuple(x1.shape)}")
        if z is None and self.one_sided:
            z = x0
        return randn_tensor(x1.shape, generator, x1.device, x1.dtype) if z is None else z

    def targets(self, t, x0, x1, z) -> dict[str, torch.Tensor]:
        """What `"b"`, `"v"`, `"eta"` and `"s"` models have to predict at x_t on average, each of x1's shape.

        "s", and "b" with "brownian", are infinite at the ends.
        """
        da, db, _ = (expand(v, x1) for v in self.slopes(t))
        gamma, slope, _ = (expand(v, x1) for v in self._gamma(t))
        v = db * x1 if self.one_sided else da * x0 + db * x1
        return {"b": v + slope * z, "v": v, "eta": z, "s": -z / gamma}

    def score(self, eta: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """s = -eta / gamma. (The released code's noise model has the other sign.)"""
        return -eta / expand(self.levels(t)[2], eta)

    def drift(self, v: torch.Tensor, score: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """b = v - gamma gamma' s."""
        return v - expand(self.slopes(t)[2], v) * score


def interpolant_training_loss(
    model: Callable,
    interpolant: Interpolant,
    x0: torch.Tensor | None,
    x1: torch.Tensor,
    target: str = "b",
    t: torch.Tensor | None = None,
    antithetic: bool = True,
    generator: torch.Generator | None = None,
    z: torch.Tensor | None = None,
) -> torch.Tensor:
    """Mean over the batch of |f|^2 / 2 - target . f, whose minimiser is the field (a sum over a sample's elements).

    Args:
        model: `f(x_t, t)` with `t` `[batch]`, returning x_t's shape.
        interpolant: The path.
        x0: Samples at t = 0, `[batch, ...]`; of a one-sided path its noise, or None.
        x1: Samples at t = 1.
        target: `"b"` (drift), `"v"` (velocity without the noise), `"eta"` (noise) or `"s"` (score).
        t: Times `[batch]`; by default uniform in [0.001, 0.999], for gamma' may be infinite at the ends.
        antithetic: Average over z and -z; the variance of "b" and "s" stays bounded with it.
        generator: For times and noise.
        z: Noise instead of drawn one.

    Raises:
        ValueError: Unknown target, shapes that differ, or a score of a path without noise.

    Example:
        >>> loss = diffusers_ext.interpolant_training_loss(lambda x, t: net(x, 1000 * t).sample, path, blurred, sharp)
    """
    require_choice("target", target, TARGETS)
    if target in ("eta", "s") and interpolant.noiseless:
        raise ValueError(f"a path without noise (gamma 0) has no {target!r}: train 'b'")
    if t is None:
        u = torch.rand(len(x1), generator=generator, device=generator.device if generator else x1.device)
        t = (_EDGE + (1 - 2 * _EDGE) * u).to(x1)
    plus, minus, z = interpolant.antithetic(t, x0, x1, z, generator)
    loss = _quadratic(model(plus, t), interpolant.targets(t, x0, x1, z)[target])
    if antithetic:
        loss = (loss + _quadratic(model(minus, t), interpolant.targets(t, x0, x1, -z)[target])) / 2
    return loss


def _quadratic(f: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    if f.shape != target.shape:
        raise ValueError(f"the model returned {tuple(f.shape)} for samples of shape {tuple(target.shape)}")
    return (f**2 / 2 - target * f).flatten(1).sum(1).mean()


@torch.no_grad()
def integrate_bridge(
    b: Callable,
    eta: Callable | None,
    interpolant: Interpolant,
    x: torch.Tensor,
    steps: int = 50,
    diffusion: float = 0.0,
    reverse: bool = False,
    integrator: str = "trapezoid",
    start_end: tuple[float, float] = (0.0, 1.0),
    generator: torch.Generator | None = None,
    constant: bool = False,
) -> torch.Tensor:
    """Carry samples along the bridge: dX = (b + e s) dt + sqrt(2 e) dW, or back with -b.

    Args:
        b: Drift `b(x, t)`, t a 0-dimensional tensor.
        eta: Noise model `eta(x, t)`; None with `diffusion` 0.
        interpolant: The path they were trained on.
        x: Samples at the start.
        steps: Equal steps.
        diffusion: c, from 0 (ODE) up.
        reverse: From t = 1 to 0.
        integrator: `"euler"`, `"heun"` or `"trapezoid"`.
        start_end: Times of the two ends.
        generator: For the noise.
        constant: e = c as in the released code, instead of e = c gamma(t), which is finite at the ends too.
    """
    times = torch.linspace(*start_end, steps + 1, dtype=torch.float64)
    times = times.flip(0) if reverse else times

    def spread(t: float) -> float:
        return float(interpolant.levels(torch.tensor(t, dtype=torch.float64))[2])

    def rate(t: float) -> float:
        return diffusion / spread(t) if constant else diffusion

    memory = None
    for move in plan(times.tolist(), times.diff().abs().tolist(), spread, rate, integrator):
        slope = None
        if move.step:
            t = torch.tensor(move.at, dtype=x.dtype, device=x.device)
            slope = -b(x, t) if reverse else b(x, t)
            slope = slope - move.rate * eta(x, t) if move.rate else slope
        z = randn_tensor(x.shape, generator, x.device, x.dtype) if move.noise else None
        x, memory = advance(move, x, slope, memory, z)
    return x


class BridgePipeline(DiffusionPipeline):
    """Turns pictures of one kind into another with models trained by `interpolant_training_loss`, and back.

    Paper: https://arxiv.org/abs/2303.08797.

    Args:
        b: `UNet2DModel` of the drift, called with timestep 1000 t.
        eta: `UNet2DModel` of the noise; only `diffusion` above 0 needs it.
        path, gamma_type, gamma_scale: The `Interpolant` they were trained on.

    Example:
        >>> bridge = diffusers_ext.BridgePipeline(b=net, path="linear", gamma_type="brownian")
        >>> sharp = bridge(blurred, num_inference_steps=20).images

    Limits: pictures are carried one to one, in pixels: the two kinds must have one size.
    """

    _optional_components = ["eta"]
    model_cpu_offload_seq = "b->eta"

    def __init__(
        self,
        b: UNet2DModel,
        eta: UNet2DModel | None = None,
        path: str = "linear",
        gamma_type: str = "brownian",
        gamma_scale: float = 1.0,
    ):
        super().__init__()
        self.interpolant = Interpolant(path, gamma_type, gamma_scale)
        self.register_modules(b=b, eta=eta)
        self.register_to_config(path=path, gamma_type=gamma_type, gamma_scale=gamma_scale)
        self.image_processor = VaeImageProcessor(vae_scale_factor=1)

    @torch.no_grad()
    def __call__(
        self,
        image,
        num_inference_steps: int = 50,
        diffusion: float = 0.0,
        reverse: bool = False,
        integrator: str = "trapezoid",
        generator: torch.Generator | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
    ):
        """Carry pictures from t = 0 to 1.

        Args:
            image: PIL picture or list, or tensor `[batch, channels, h, w]` in [-1, 1].
            num_inference_steps: Equal steps.
            diffusion: Strength c of the noise e = c gamma(t); 0 is the ODE.
            reverse: From t = 1 to 0.
            integrator: `"euler"`, `"heun"` or `"trapezoid"`.
            generator: For the noise.
            output_type: `"pil"`, `"np"` or `"pt"`.
            return_dict: Return `ImagePipelineOutput` instead of a tuple.

        Raises:
            ValueError: An argument is out of range, or noise is wanted without an `eta` model.
            RuntimeError: A model returned NaN or infinity.
        """
        require_choice("integrator", integrator, INTEGRATORS)
        if int(num_inference_steps) != num_inference_steps or num_inference_steps < 1:
            raise ValueError(f"num_inference_steps is {num_inference_steps}; it must be a whole number from 1 up")
        if not 0 <= diffusion < math.inf:
            raise ValueError(f"diffusion is {diffusion}; it must be a number from 0 (the ODE) up")
        if diffusion and self.eta is None:
            raise ValueError("diffusion above 0 needs the `eta` model, the noise: pass one, or diffusion=0")
        x = self.image_processor.preprocess(image) if not isinstance(image, torch.Tensor) else image
        x = x.to(self.device, self.b.dtype)
        b, eta = (net and self._field(net) for net in (self.b, self.eta))
        options = {"reverse": reverse, "integrator": integrator, "generator": generator}
        x = integrate_bridge(b, eta, self.interpolant, x, int(num_inference_steps), diffusion, **options)
        if not torch.isfinite(x).all():
            raise RuntimeError("a model of the bridge returned NaN or infinity: try a higher precision or more steps")
        images = self.image_processor.postprocess(x, output_type)
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    @staticmethod
    def _field(net: UNet2DModel) -> Callable:
        return lambda x, t: net(x, 1000 * t).sample
