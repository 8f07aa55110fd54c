"""SDE samplers of flow models: noise of any strength e(t) during sampling, with the same distribution at every level.

A flow model's velocity holds its score, s = -E[n | x] / sigma, so that dX = (b + e s) dt + sqrt(2 e) dW has the
marginals of the ODE dX = b dt for every e >= 0. Here x = (1 - sigma) x0 + sigma n, the model predicts v = n - x0,
t = 1 - sigma and b = -v. https://arxiv.org/abs/2303.08797
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.configuration_utils import register_to_config
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteSchedulerOutput
from diffusers.utils.torch_utils import randn_tensor

from ..prediction import expand
from ..registry import Claim, MethodRecord, register
from ._common import _translate, combine, require_choice, require_finite


__all__ = ["StochasticInterpolantScheduler"]

PROFILES = ("sigma", "sigma2", "sin", "constant")
INTEGRATORS = ("euler", "heun", "trapezoid")
LAST_STEPS = ("denoise", "sde")


def flow_noise(x: torch.Tensor, v: torch.Tensor, sigma: float) -> torch.Tensor:
    """E[n | x] = x + (1 - sigma) v."""
    return torch.add(x, v, alpha=1 - sigma)


def flow_score(x: torch.Tensor, v: torch.Tensor, sigma: float) -> torch.Tensor:
    """Score of the noisy distribution, s = -E[n | x] / sigma, from a flow model's output v at sigma > 0."""
    return -flow_noise(x, v, sigma) / sigma


def flow_slope(x: torch.Tensor, v: torch.Tensor, sigma: float, rate: float) -> torch.Tensor:
    """b + e s = -v - rate E[n | x] with rate = e / sigma, finite at sigma 0."""
    return -v if rate == 0 else combine((-rate, -1 - rate * (1 - sigma)), (x, v))


def diffusion_rate(profile: str, scale: float, sigma: float) -> float:
    """e(sigma) / sigma of a profile: e = c sigma, c sigma^2, c sin^2(pi sigma) or c."""
    if scale == 0:
        return 0.0
    if profile == "sigma":
        return scale
    if profile == "sigma2":
        return scale * sigma
    if sigma == 0:
        return 0.0 if profile == "sin" else math.inf
    return scale * (math.sin(math.pi * sigma) ** 2 if profile == "sin" else 1.0) / sigma


@dataclass(frozen=True)
class Move:
    """One model call of a run, and what becomes of the sample.

    Args:
        kind: `"euler"`; or `"predict"` and `"correct"`, the two halves of a Heun step.
        node: Index of the call's noise level or time.
        at: That level or time.
        rate: e / (factor of the noise) there.
        step: Length of the step.
        noise: Standard deviation of the noise to add.
    """

    kind: str
    node: int
    at: float
    rate: float
    step: float
    noise: float


def advance(move: Move, x: torch.Tensor, slope: torch.Tensor | None, memory: tuple | None, z: torch.Tensor | None):
    """`(sample, memory)` after one move, from the slope b + e s at `x`.

    `memory` is what a `"predict"` keeps for its `"correct"`; without it a `"correct"` adds the noise only. `z` is
    standard normal and needed where `move.noise` is above 0.
    """
    first = None
    if move.kind == "correct":
        if memory is not None:
            x, first = memory
            x = x + move.step / 2 * (first + slope)
        return _kick(x, z, move.noise), None
    if move.kind == "predict":
        base = _kick(x, z, move.noise)
        return base + move.step * slope, (base, slope)
    return _kick(x + move.step * slope, z, move.noise), None


def _kick(x: torch.Tensor, z: torch.Tensor | None, noise: float) -> torch.Tensor:
    return torch.add(x, z, alpha=noise) if noise else x


def plan(
    nodes: Sequence[float],
    steps: Sequence[float],
    spread: Callable[[float], float],
    rate: Callable[[float], float],
    integrator: str = "euler",
    clip: float = math.inf,
    plain_last: bool = False,
) -> list[Move]:
    """The model calls of a run over `nodes`.

    `"euler"` is Euler-Maruyama. `"heun"` is the authors': noise first, then a Heun step with both slopes at the new
    node. `"trapezoid"` has one slope at each end, which is of weak order 2.

    Args:
        nodes: N + 1 noise levels or times.
        steps: N lengths, > 0.
        spread: Factor of the noise in the sample at a node (sigma of a flow), >= 0.
        rate: e / spread at a node.
        integrator: See above.
        clip: Upper bound of e step / spread^2, the share of its way to the mean that the noise part of a sample may
            go in one step; e is lowered where it would be more.
        plain_last: The last step adds no noise and follows the ODE.
    """
    moves: list[Move] = []
    # the end has spread 0 and no score: the last step there is an Euler step, as in diffusers' Heun schedulers
    last = len(steps) - 1 if spread(nodes[-1]) == 0 else len(steps)

    def call(kind: str, node: int, step: float) -> Move:
        """A call without noise, its rate lowered to what the step can take."""
        s = spread(nodes[node])
        bound = clip * s / step if step > 0 else math.inf
        return Move(kind, node, nodes[node], min(rate(nodes[node]), bound) if s > 0 else 0.0, step, 0.0)

    def noise(*calls: Move) -> float:
        e = sum(move.rate * spread(move.at) for move in calls) / len(calls)
        return math.sqrt(2 * e * calls[0].step)

    for i, step in enumerate(steps):
        here = call("euler", i, step)
        if i == last or integrator == "euler":
            plain = plain_last and i == len(steps) - 1
            moves.append(replace(here, rate=0.0) if plain else replace(here, noise=noise(here)))
            continue
        there = call("correct", i + 1, step)
        if integrator == "trapezoid":
            moves += [replace(here, kind="predict", noise=noise(here, there)), there]
            continue
        # the model is to be called on the noised sample: the call before it, or an idle first one, adds this noise
        before = moves.pop() if moves else Move("correct", 0, nodes[0], 0.0, 0.0, 0.0)
        moves += [replace(before, noise=noise(there)), replace(there, kind="predict"), there]
    return moves


def flow_plan(
    sigmas: Sequence[float],
    steps: Sequence[float],
    profile: str = "sigma",
    scale: float = 0.5,
    integrator: str = "euler",
    clip: float | None = 1.0,
    last_step: str = "denoise",
) -> list[Move]:
    """`plan` for the noise levels of a flow model; the arguments are those of `StochasticInterpolantScheduler`."""
    return plan(
        sigmas,
        steps,
        lambda sigma: sigma,
        lambda sigma: diffusion_rate(profile, scale, sigma),
        integrator,
        math.inf if clip is None else clip,
        plain_last=last_step == "denoise" and sigmas[-1] == 0,
    )


def _require_flow(prediction_type: str) -> None:
    if prediction_type != "flow_prediction":
        raise ValueError(
            f"prediction_type is {prediction_type!r}; this scheduler samples flow models only ('flow_prediction', "
            "e.g. SD3 or Flux)"
        )


def check_options(profile: str, scale: float, integrator: str, clip: float | None, last_step: str) -> None:
    """Raise `ValueError` for options that are unknown, out of range, or diverge at noise level 0."""
    require_choice("diffusion_profile", profile, PROFILES)
    require_choice("integrator", integrator, INTEGRATORS)
    require_choice("last_step", last_step, LAST_STEPS)
    if not 0 <= scale < math.inf:
        raise ValueError(f"diffusion_scale is {scale}; it must be a number from 0 (the ODE) up")
    if clip is not None and not clip > 0:
        raise ValueError(f"diffusion_clip is {clip}; it must be above 0, or None")
    if clip is None and profile == "constant" and scale > 0:
        raise ValueError(
            "a constant diffusion times the score grows without bound towards noise level 0: give diffusion_clip (1 "
            "is a good value), or the profile 'sigma'"
        )


@register(
    MethodRecord(
        slug="stochastic-interpolants",
        family="schedulers",
        kind="scheduler",
        title="Stochastic Interpolants: A Unifying Framework for Flows and Diffusions",
        arxiv="2303.08797",
        summary="Sample SD3 or Flux with an SDE of any noise strength; train bridges between two sets of pictures.",
        targets=("any",),
        predictions=("flow_prediction",),
        nodes=("DXFlowSDESampler",),
        claim=Claim(
            text="Samples keep their distribution for every diffusion e(t) >= 0",
            setting="theorem: exact velocity, continuous time; the paper has no benchmark score",
        ),
    )
)
class StochasticInterpolantScheduler(FlowMatchEulerDiscreteScheduler):
    """Samples flow models (SD3, Flux...) with an SDE; at scale 0 it is `FlowMatchEulerDiscreteScheduler`.

    Paper: https://arxiv.org/abs/2303.08797. Noise levels, shift and timesteps are those of the flow-matching Euler
    scheduler.

    Args:
        diffusion_profile: Noise strength e at level sigma: `"sigma"` (c sigma), `"sigma2"` (c sigma^2), `"sin"`
            (c sin^2(pi sigma)) or `"constant"` (c).
        diffusion_scale: c, from 0 (the ODE) up; 0.5 is mild, 1 to 2 strong.
        integrator: `"euler"` (Euler-Maruyama, one model call per step); `"heun"`, the authors', or `"trapezoid"`, of
            weak order 2, two calls per step. "heun" makes one more call than it needs, for a pipeline calls the model
            before the first noise can be added.
        diffusion_clip: Upper bound of e * step / sigma^2; e is lowered where a step is too long. None: no bound.
        last_step: `"denoise"` (no noise in the step to 0) or `"sde"`.
        noise_seed: Seed of the noise where `step` is given no generator, as by most pipelines of flow models; None:
            torch's global one.
        prediction_type: `"flow_prediction"`, the only one.

    The other options are those of `diffusers.FlowMatchEulerDiscreteScheduler`, without `invert_sigmas`,
    `use_beta_sigmas` and `stochastic_sampling`.

    Raises:
        ValueError: An option is out of range, or the model is no flow model.

    Example:
        >>> pipe.scheduler = diffusers_ext.StochasticInterpolantScheduler.from_config(pipe.scheduler.config)

    Limits: Euler-Maruyama is of first order: with few steps use a small scale, or `"trapezoid"`.
    """

    _compatibles = ["FlowMatchEulerDiscreteScheduler"]
    _left_out = ("invert_sigmas", "use_beta_sigmas")

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
        shift_terminal: float | None = None,
        use_karras_sigmas: bool = False,
        use_exponential_sigmas: bool = False,
        time_shift_type: str = "exponential",
        diffusion_profile: str = "sigma",
        diffusion_scale: float = 0.5,
        integrator: str = "euler",
        diffusion_clip: float | None = 1.0,
        last_step: str = "denoise",
        noise_seed: int | None = None,
        prediction_type: str = "flow_prediction",
    ):
        _require_flow(prediction_type)
        check_options(diffusion_profile, diffusion_scale, integrator, diffusion_clip, last_step)
        upstream = inspect.signature(FlowMatchEulerDiscreteScheduler.__init__).parameters
        super().__init__(**{k: v for k, v in self.config.items() if k in upstream})
        self.num_inference_steps: int | None = None
        self.init_noise_sigma = 1.0
        self.order = 1 if integrator == "euler" else 2

    @classmethod
    def from_config(cls, config=None, return_unused_kwargs: bool = False, **kwargs):
        """This scheduler with the settings of another one of a flow model; its `stochastic_sampling` is replaced.

        Raises:
            ValueError: The config is of no flow model, or uses `invert_sigmas` or `use_beta_sigmas`.
        """
        config = _translate(config)
        if hasattr(config, "get"):
            _require_flow(config.get("prediction_type", "flow_prediction"))
            for name in cls._left_out:
                if config.get(name):
                    raise ValueError(f"{cls.__name__} has no {name}: turn it off, or pass `sigmas` to set_timesteps")
        return super().from_config(config, return_unused_kwargs, **kwargs)

    def scale_model_input(self, sample: torch.Tensor, timestep=None) -> torch.Tensor:
        """Nothing to do: samples are in the model's own space."""
        return sample

    def scale_noise(self, sample: torch.Tensor, timestep: torch.Tensor, noise: torch.Tensor | None = None):
        """`sample` at the noise level of `timestep` `[batch]`: (1 - sigma) sample + sigma noise."""
        if self.num_inference_steps is None or self.order == 1:
            return super().scale_noise(sample, timestep, noise)
        begin = self._begin_index if self._step_index is None else self._step_index
        calls = [self.index_for_timestep(t) for t in timestep] if begin is None else [begin] * len(timestep)
        sigmas = self.sigmas[[self._moves[i].node for i in calls]]
        sigma = expand(sigmas.to(sample.device, sample.dtype), sample)
        return sigma * noise + (1.0 - sigma) * sample

    def add_noise(self, original_samples: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """Clean samples at the noise level of `timesteps`; `scale_noise` with the usual order of arguments."""
        return self.scale_noise(original_samples, timesteps, noise)

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        sigmas: Sequence[float] | None = None,
        mu: float | None = None,
        timesteps: Sequence[float] | None = None,
    ) -> None:
        """Choose the noise levels of a run; arguments as in `diffusers.FlowMatchEulerDiscreteScheduler`.

        Raises:
            ValueError: No choice was given, or the number of steps is no whole number from 1 up.
        """
        given = num_inference_steps
        if given is not None and (int(given) != given or given < 1):
            raise ValueError(f"num_inference_steps is {given}; it must be a whole number from 1 up")
        if given is sigmas is timesteps is None:
            raise ValueError("give `num_inference_steps`, `sigmas` or `timesteps`")
        super().set_timesteps(num_inference_steps, device, sigmas=sigmas, mu=mu, timesteps=timesteps)
        c, levels = self.config, self.sigmas.cpu()
        steps = (levels[:-1] - levels[1:]).tolist()
        sde = (c.diffusion_profile, c.diffusion_scale, c.integrator, c.diffusion_clip, c.last_step)
        self._moves = flow_plan(levels.tolist(), steps, *sde)
        self.timesteps = self.timesteps[[move.node for move in self._moves]]
        self._memory, self._sums, self._generator = None, [], None

    def step(
        self,
        model_output: torch.Tensor,
        timestep,
        sample: torch.Tensor,
        generator=None,
        return_dict: bool = True,
        **unused,
    ) -> FlowMatchEulerDiscreteSchedulerOutput | tuple[torch.Tensor]:
        """The sample for the next model call.

        Args:
            model_output: Velocity v = noise - x0 that the model predicted for `sample`.
            timestep: Timestep of `sample`; used only to find the start of a run.
            sample: Current sample `[batch, ...]`.
            generator: `torch.Generator` or one per batch item, for the noise.
            return_dict: Return an output object instead of a tuple.

        Raises:
            RuntimeError: `set_timesteps` has not been called, the run is over, or (at its last step, which alone waits
                for the device) a model output was NaN or infinite.
            ValueError: `model_output` has another shape than `sample`.
            TypeError: An option that only other samplers have, e.g. `s_churn`.
        """
        self._check_turn(model_output, sample, unused)
        if self._step_index is None:
            self._init_step_index(timestep)
        if self._step_index >= len(self._moves):
            raise RuntimeError(f"all {len(self._moves)} steps are done: call `set_timesteps` for a new run")
        self._sums.append(model_output.sum(dtype=torch.float32))
        if self.config.diffusion_scale == 0 and self.order == 1 and sample.dtype != torch.float64:
            x = super().step(model_output, 0.0, sample, return_dict=False)[0]
        else:
            x = self._advance(model_output, sample, generator)
            self._step_index += 1
        if self._step_index == len(self._moves):
            require_finite(self._sums, self._step_index, len(self._moves))
        return FlowMatchEulerDiscreteSchedulerOutput(prev_sample=x) if return_dict else (x,)

    def _advance(self, model_output: torch.Tensor, sample: torch.Tensor, generator) -> torch.Tensor:
        move, work = self._moves[self._step_index], torch.promote_types(sample.dtype, torch.float32)
        x, v = sample.to(work), model_output.to(work)
        z = randn_tensor(x.shape, generator or self._own_generator(x.device), x.device, work) if move.noise else None
        x, self._memory = advance(move, x, flow_slope(x, v, move.at, move.rate), self._memory, z)
        return x.to(model_output.dtype)

    def _own_generator(self, device: torch.device) -> torch.Generator | None:
        if self._generator is None and self.config.noise_seed is not None:
            self._generator = torch.Generator(device).manual_seed(self.config.noise_seed)
        return self._generator

    def _check_turn(self, model_output: torch.Tensor, sample: torch.Tensor, unused: dict) -> None:
        if unused:
            raise TypeError(
                f"step() of {type(self).__name__} has no {', '.join(unused)}: its noise is diffusion_scale"
            )
        if self.num_inference_steps is None:
            raise RuntimeError("call `set_timesteps` before the first step")
        if model_output.shape != sample.shape:
            raise ValueError(
                f"the model returned {tuple(model_output.shape)} for a sample of shape {tuple(sample.shape)}"
            )
