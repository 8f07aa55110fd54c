"""SuperDiff: mix diffusion models by their running log densities (OR: the mixture, AND: equal density).

Notation of the paper, in variance-exploding form: x = x0 + sigma * noise, v_k the noise predicted by model k, score
s_k = -v_k / sigma, d = sigma_next - sigma < 0, K models stacked in the first axis, `[K, B, ...]`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from diffusers.configuration_utils import register_to_config
from diffusers.guiders.guider_utils import BaseGuidance, GuiderOutput

from ..prediction import expand, to_noise
from ..registry import Claim, MethodRecord, register, unknown


__all__ = ["SuperDiffGuidance"]

OPERATIONS = ("or", "and", "and_ode", "average")
FLOW_RANGE = (0.02, 80.0)
_FLOOR = 1e-12


def _wide(x: torch.Tensor) -> torch.Tensor:
    """float64, where the device has it: log densities of thousands of dimensions cancel in float32."""
    return x.float() if x.device.type == "mps" else x.double()


def dot(a: torch.Tensor, b: torch.Tensor, dims: int) -> torch.Tensor:
    """Inner product over the last `dims` axes, in float64."""
    return (_wide(a) * _wide(b)).flatten(-dims).sum(-1)


def guided(v: torch.Tensor, v_u: torch.Tensor | None, kappa: torch.Tensor, g: float) -> torch.Tensor:
    """v_u + g * (sum_k kappa_k v_k - v_u), written with differences so that equal v_k give exactly v_k.

    Args:
        v: Predictions of the K models, `[K, B, ...]`.
        v_u: Unconditional prediction `[B, ...]`; None stands for guidance scale 1.
        kappa: Weights `[K, B]` that sum to 1 over K.
        g: Guidance scale.
    """
    weights = expand(kappa[:-1].to(v.dtype), v)
    mix = v[-1] + (weights * (v[:-1] - v[-1])).sum(0)
    return mix if v_u is None else v_u + g * (mix - v_u)


def log_density_step(dx: torch.Tensor, v: torch.Tensor, sigma: float, d: float) -> torch.Tensor:
    """Ito estimate of the change of log q_k along the SDE step `dx`, `[K, B]`; needs no divergence."""
    dims = dx.ndim - 1
    return -(abs(d) / sigma) * dot(v, v, dims) - dot(dx, v, dims) / sigma


def log_density_step_ode(vf: torch.Tensor, v: torch.Tensor, div: torch.Tensor, sigma: float, d: float):
    """Change of log q_k along the ODE step dx = d * vf, `[K, B]`; `div` from `divergence`."""
    return d * (div + dot(v, v - vf, vf.ndim - 1) / sigma)


def divergence(fn: Callable, x: torch.Tensor, probe: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """`fn(x)` and Hutchinson's -(probe . J probe), one forward-mode pass. `probe`: Rademacher, of x's shape."""
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        v, jv = torch.func.jvp(fn, (x,), (probe,))
    return v, -dot(probe, jv, x.ndim - 1)


def kappa_or(log_q: torch.Tensor, logp: torch.Tensor, temperature: float) -> torch.Tensor:
    """Weights of the mixture, `[K, B]`: softmax over k of T * (log q_k + log p_k)."""
    return torch.softmax(temperature * (log_q + logp[:, None]), 0)


def kappa_equal(v, v_u, g: float, drift: float, noise: torch.Tensor | float, target: torch.Tensor) -> torch.Tensor:
    """Weights with <drift * vf + noise, v_k - v_K> = target_k for k < K and sum 1, `[K, B]`.

    Closed form for K = 2, linear system else. Where models agree (nothing to solve) the weights stay at 1 / K.
    """
    dims, count = v.ndim - 2, len(v)
    delta = v[:-1] - v[-1]
    g = 1.0 if v_u is None else g
    base = v[-1] if v_u is None else v_u + g * (v[-1] - v_u)
    rest = (target - dot(drift * base + noise, delta, dims)) / (drift * g)
    gram = dot(delta[:, None], delta[None], dims)
    if count == 2:
        square = gram[0]
        kappa = torch.where(square > _FLOOR, rest / square.clamp(min=_FLOOR), 0.5)
    else:
        gram, even = gram.permute(2, 0, 1), torch.full_like(rest.T, 1 / count)
        residual = rest.T[..., None] - gram @ even[..., None]
        kappa = (even + (torch.linalg.pinv(gram, hermitian=True) @ residual)[..., 0]).T
    return torch.cat([kappa, 1 - kappa.sum(0, keepdim=True)])


def kappa_and(v, v_u, noise, sigma: float, d: float, g: float, offset: torch.Tensor) -> torch.Tensor:
    """AND weights for the SDE step dx = 2 d vf + noise: every log q_k changes alike (plus `offset` `[K]`)."""
    square = dot(v, v, v.ndim - 2)
    target = -sigma * (offset[:-1] - offset[-1])[:, None] - abs(d) * (square[:-1] - square[-1])
    return kappa_equal(v, v_u, g, 2 * d, noise, target)


def kappa_and_ode(v, v_u, div, sigma: float, d: float, g: float, offset: torch.Tensor) -> torch.Tensor:
    """AND weights for the ODE step dx = d vf, from the divergences `div` `[K, B]`."""
    square = dot(v, v, v.ndim - 2) + sigma * div
    target = square[:-1] - square[-1] - (sigma / d) * (offset[:-1] - offset[-1])[:, None]
    return kappa_equal(v, v_u, g, 1.0, 0.0, target)


def karras_levels(low: float, high: float, steps: int, rho: float = 7.0) -> torch.Tensor:
    """VE noise levels from `high` to `low` and then 0, `[steps + 1]` float64.

    The Euler step needs small ratios of neighbours, which even spacing of a flow model's s does not give near s = 1.
    """
    levels = torch.linspace(high ** (1 / rho), low ** (1 / rho), steps, dtype=torch.float64) ** rho
    return torch.cat([levels, levels.new_zeros(1)])


@dataclass(frozen=True)
class NoiseStep:
    """One step of a noise schedule, in variance-exploding terms whatever the model's own convention is.

    Args:
        sample: State `[B, ...]` as pipelines and ComfyUI hold it: VE for epsilon and v models, (1 - s) x0 + s noise
            for flow models.
        noise: Standard normal draw of sample's shape; the one that is weighed is the one that is added.
        sigma, sigma_next: VE noise levels.
        prediction: What the model returns.
        flow: The state is a flow model's.
        index, num_steps: Position in the run.
        final_noise: Keep the SDE's noise on the step to sigma 0 (as the paper's code); else end on the denoised state.
    """

    sample: torch.Tensor
    noise: torch.Tensor
    sigma: float
    sigma_next: float
    prediction: str
    flow: bool = False
    index: int = 0
    num_steps: int = 1
    final_noise: bool = True

    def _alpha(self, sigma: float) -> float:
        return 1 / (1 + sigma) if self.flow else 1 / math.sqrt(1 + sigma**2)

    @property
    def d(self) -> float:
        return self.sigma_next - self.sigma

    @property
    def is_denoising(self) -> bool:
        """The last step of a run without final noise: x + d * vf, no SDE step, so no density estimate."""
        return self.sigma_next == 0 and not self.final_noise

    @property
    def density_steps(self) -> int:
        """Steps of the whole run that carry the density estimate."""
        return max(self.num_steps - (not self.final_noise), 1)

    @property
    def x(self) -> torch.Tensor:
        """The VE state, at least float32."""
        x = self.sample if self.sample.dtype == torch.float64 else self.sample.float()
        return x / self._alpha(self.sigma) if self.flow else x

    def at(self, x: torch.Tensor) -> NoiseStep:
        """The same step at another VE state."""
        return replace(self, sample=x * self._alpha(self.sigma) if self.flow else x)

    @property
    def model_input(self) -> torch.Tensor:
        """What the network sees: the VE state times alpha."""
        return (self.x * self._alpha(self.sigma)).to(self.sample.dtype)

    @property
    def noise_term(self) -> torch.Tensor:
        """sqrt(2 |d| sigma) * noise."""
        scale = 0.0 if self.is_denoising else math.sqrt(2 * abs(self.d) * self.sigma)
        return scale * self.noise.to(self.x.dtype)

    def epsilon(self, output: torch.Tensor) -> torch.Tensor:
        """v_k from a raw model output (or several, stacked)."""
        alpha = self._alpha(self.sigma)
        return to_noise(output.to(self.x.dtype), self.x * alpha, alpha, self.sigma * alpha, self.prediction)

    def dx(self, vf: torch.Tensor) -> torch.Tensor:
        """The reverse-SDE step 2 d vf + noise (not the probability-flow step: note the factor 2)."""
        return (1 if self.is_denoising else 2) * self.d * vf + self.noise_term

    def moved(self, dx: torch.Tensor) -> torch.Tensor:
        """The state at `sigma_next`, in sample's convention and dtype."""
        x = self.x + dx
        return (x * self._alpha(self.sigma_next) if self.flow else x).to(self.sample.dtype)


@dataclass
class Superposition:
    """The running log densities of one sampling run and the weights that follow from them.

    Args:
        num_models: K >= 2.
        operation: `"or"`, `"and"`, `"and_ode"` or `"average"`.
        guidance_scale: Classifier-free guidance of the mix. The densities use the unguided predictions.
        temperature: Sharpness of OR, > 0; below 1 softens it.
        logp: Prior log-odds of OR: K numbers, or one for the first model.
        lift: Log densities wanted at the end of AND: K numbers (only differences matter), or one for the second of
            two models: final log q_B - log q_A = lift.
    """

    num_models: int
    operation: str = "and"
    guidance_scale: float = 7.5
    temperature: float = 1.0
    logp: float | list[float] = 0.0
    lift: float | list[float] = 0.0
    _log_q: list[torch.Tensor] = field(default_factory=list, init=False)
    _kappa: list[torch.Tensor] = field(default_factory=list, init=False)

    def __post_init__(self) -> None:
        check_settings(self.operation, self.temperature)
        if self.num_models < 2:
            raise ValueError(f"SuperDiff mixes two or more models or prompts, got {self.num_models}")
        self._logp, self._lift = self._per_model("logp", 0), self._per_model("lift", 1)

    def _per_model(self, name: str, position: int) -> torch.Tensor:
        given, count = getattr(self, name), self.num_models
        if isinstance(given, (int, float)):
            if name == "lift" and given and count > 2:
                raise ValueError(f"a single `lift` is for two models; give {count} numbers for {count} models")
            given = [0.0] * position + [given] + [0.0] * (count - position - 1)
        if len(given) != count:
            raise ValueError(f"`{name}` must be one number or {count} (one per model), got {given!r}")
        return torch.tensor(given, dtype=torch.float64)

    def weigh(self, step: NoiseStep, v: torch.Tensor, v_u: torch.Tensor | None) -> torch.Tensor:
        """Weights `[K, B]` for an SDE step; records them and the log densities after it.

        Args:
            step: Noise levels, state and noise draw of the step.
            v: Noise predictions `[K, B, ...]`.
            v_u: Unconditional noise prediction, or None.
        """
        if self.operation == "and_ode":
            raise RuntimeError("operation 'and_ode' takes ODE steps: call weigh_ode with the divergences")
        log_q = self._start(v)
        if self.operation == "or":
            kappa = kappa_or(log_q, self._logp.to(log_q), self.temperature)
        elif self.operation == "and":
            offset = self._lift.to(log_q) / step.density_steps
            kappa = kappa_and(v, v_u, step.noise_term, step.sigma, step.d, self.guidance_scale, offset)
        else:
            kappa = torch.full_like(log_q, 1 / self.num_models)
        if not step.is_denoising:
            dx = step.dx(guided(v, v_u, kappa, self.guidance_scale))
            log_q = log_q + log_density_step(dx, v, step.sigma, step.d)
        return self._record(kappa, log_q)

    def weigh_ode(self, step: NoiseStep, v, v_u, div: torch.Tensor) -> torch.Tensor:
        """Weights `[K, B]` for a deterministic AND step with divergences `div` `[K, B]`."""
        log_q = self._start(v)
        offset = self._lift.to(log_q) / step.num_steps
        kappa = kappa_and_ode(v, v_u, div, step.sigma, step.d, self.guidance_scale, offset)
        vf = guided(v, v_u, kappa, self.guidance_scale)
        return self._record(kappa, log_q + log_density_step_ode(vf, v, div, step.sigma, step.d))

    def _start(self, v: torch.Tensor) -> torch.Tensor:
        if len(v) != self.num_models:
            raise ValueError(f"expected predictions of {self.num_models} models, got {len(v)}")
        if not self._log_q:
            self._log_q.append(_wide(v.new_zeros(v.shape[:2])))
        return self._log_q[-1]

    def _record(self, kappa: torch.Tensor, log_q: torch.Tensor) -> torch.Tensor:
        self._kappa.append(kappa)
        self._log_q.append(log_q)
        return kappa

    @property
    def log_likelihoods(self) -> torch.Tensor:
        """Estimated change of log q_k since the start, `[K, B, N + 1]`."""
        return torch.stack(self._log_q, -1)

    @property
    def kappas(self) -> torch.Tensor:
        """Weights of every step, `[K, B, N]`."""
        return torch.stack(self._kappa, -1)

    def report(self) -> str:
        """One line per sample: its final log densities relative to the likeliest model, and its mean weights."""
        log_q, weights = self.log_likelihoods[..., -1].T, self.kappas.mean(-1).T
        lines = []
        for number, (row, weight) in enumerate(zip(log_q - log_q.max(1, keepdim=True).values, weights), 1):
            densities = ", ".join(f"{chr(65 + k)} {round(value, 2) + 0.0:.2f}" for k, value in enumerate(row.tolist()))
            shares = ", ".join(f"{value:.2f}" for value in weight.tolist())
            lines.append(f"{number}: log density {densities} nats; mean weights {shares}")
        return "\n".join(lines)


def check_settings(operation: str, temperature: float = 1.0) -> None:
    """Raise `ValueError` for an unknown operation or a temperature that is not positive."""
    if operation not in OPERATIONS:
        raise ValueError(unknown("operation", operation, OPERATIONS))
    if not temperature > 0:
        raise ValueError(f"`temperature` must be > 0, got {temperature}")


@register(
    MethodRecord(
        slug="superdiff",
        family="guidance",
        kind="guider",
        title="The Superposition of Diffusion Models Using the Ito Density Estimator",
        arxiv="2412.17762",
        summary="Mix prompts or models with OR and AND while sampling, with a log density of each for every picture",
        targets=("unet", "mmdit"),
        predictions=("epsilon", "v_prediction", "flow_prediction"),
        nodes=("DXSuperDiffGuider", "DXSamplerSuperDiff", "DXSuperDiffSigmas", "DXSuperDiffReport"),
        claim=Claim(
            text="The density estimate costs no divergence and no network call beyond those of the mixed models",
            setting="Stable Diffusion v1-4, two prompts, network evaluations per step over those of the mix itself",
            value=1.0,
            unit="x",
        ),
    )
)
class SuperDiffGuidance(BaseGuidance):
    """Two prompts as OR, AND or average in a modular pipeline.

    Paper: https://arxiv.org/abs/2412.17762. Build the pipeline from `SuperDiffStableDiffusionXLBlocks` and
    give it a `SuperDiffEulerScheduler`: OR and AND need the noise of the coming step, which it draws in advance.
    For ready pipelines, more than two prompts and `"and_ode"` see `SuperDiffPipeline`.

    Args:
        operation: `"or"`, `"and"` or `"average"`.
        guidance_scale: Classifier-free guidance; 1 leaves the unconditional prediction out.
        temperature: Sharpness of OR, > 0.
        logp: Bias of OR towards the first prompt, in nats.
        lift: Final log q_B - log q_A of AND.
        start, stop: Part of the run in which the mix is on; outside, the first prompt alone.
        enabled: False: the first prompt alone.

    Example:
        >>> guider = SuperDiffGuidance(operation="or", guidance_scale=5.0)
        >>> guider.num_conditions
        3
    """

    _input_predictions = ["pred_cond", "pred_cond_b", "pred_uncond"]

    @register_to_config
    def __init__(
        self,
        operation: str = "and",
        guidance_scale: float = 7.5,
        temperature: float = 1.0,
        logp: float = 0.0,
        lift: float = 0.0,
        start: float = 0.0,
        stop: float = 1.0,
        enabled: bool = True,
    ):
        super().__init__(start, stop, enabled)
        check_settings(operation, temperature)
        if operation == "and_ode":
            raise ValueError("operation 'and_ode' needs derivatives of the network: use SuperDiffPipeline for it")
        self._step_context: NoiseStep | None = None
        self.superposition: Superposition | None = None

    def begin_step(self, step: NoiseStep) -> None:
        """Tell the guider what the coming step adds; the first step of a run starts new log densities."""
        if step.index == 0 or self.superposition is None:
            config = self.config
            self.superposition = Superposition(
                2, config.operation, config.guidance_scale, config.temperature, config.logp, config.lift
            )
        self._step_context = step

    def prepare_inputs(self, data: dict[str, tuple]) -> list:
        """One batch per prediction; each field is a tensor or a tuple (first prompt, second prompt, unconditional)."""
        return [self._prepare_batch(data, i, name) for i, name in enumerate(self._active_predictions())]

    def prepare_inputs_from_block_state(self, data, input_fields: dict) -> list:
        """As `prepare_inputs`, with names of block-state fields in place of the values."""
        names = self._active_predictions()
        return [self._prepare_batch_from_block_state(input_fields, data, i, name) for i, name in enumerate(names)]

    def forward(self, pred_cond, pred_cond_b=None, pred_uncond=None) -> GuiderOutput:
        """The mix of the raw predictions.

        Raises:
            RuntimeError: OR or AND without `begin_step`: the pipeline has no SuperDiff denoiser block.
        """
        if pred_cond_b is None:
            return GuiderOutput(pred=pred_cond, pred_cond=pred_cond, pred_uncond=pred_uncond)
        outputs, step = torch.stack([pred_cond, pred_cond_b]), self._step_context
        self._step_context = None
        if step is not None:
            v_u = None if pred_uncond is None else step.epsilon(pred_uncond)
            kappa = self.superposition.weigh(step, step.epsilon(outputs), v_u)
        elif self.config.operation == "average":
            kappa = outputs.new_full(outputs.shape[:2], 0.5)
        else:
            raise RuntimeError(
                f"SuperDiffGuidance(operation={self.config.operation!r}) must see the noise of each step: build the "
                "pipeline from SuperDiffStableDiffusionXLBlocks and use SuperDiffEulerScheduler"
            )
        pred = guided(outputs, pred_uncond, kappa, self.config.guidance_scale)
        return GuiderOutput(pred=pred, pred_cond=pred_cond, pred_uncond=pred_uncond)

    @property
    def is_conditional(self) -> bool:
        return self._count_prepared in (1, 2)

    @property
    def num_conditions(self) -> int:
        return len(self._active_predictions())

    def _active_predictions(self) -> list[str]:
        active = self._enabled
        if active and self._step is not None and self._num_inference_steps is not None:
            first, last = (int(f * self._num_inference_steps) for f in (self._start, self._stop))
            active = first <= self._step < last
        if not active:
            return self._input_predictions[:1]
        return self._input_predictions[: 2 if self.config.guidance_scale == 1 else 3]
