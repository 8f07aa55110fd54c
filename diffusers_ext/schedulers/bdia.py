"""BDIA: a time-symmetric two-step DDIM that can be solved backwards exactly, with one model call per step.

z_i is the sample at level i, noise grows with i. D(j | z_i) = alpha_j x0_i + sigma_j e_i is the DDIM map from z_i to
any level j; z_{i-1} = gamma (z_{i+1} - D(i+1 | z_i)) + D(i-1 | z_i). https://arxiv.org/abs/2307.10829
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from ..registry import Claim, MethodRecord, register
from ._common import NoiseLevelScheduler, clean_and_noise, combine, guided_model, require_choice, schedule_config
from ._pictures import decode, encode


__all__ = ["BDIADDIMInverseScheduler", "BDIADDIMScheduler", "LatentPair", "bdia_edit", "bdia_invert", "bdia_sample"]

logger = logging.getLogger(__name__)
_STATES = {"float32": torch.float32, "float64": torch.float64}
_NOISE_LIKE = 3.0  # standard deviation above which an inverted latent no longer looks like noise


def ddim_map(x0: torch.Tensor, e: torch.Tensor, level: Sequence[float]) -> torch.Tensor:
    """D(j | z_i): the sample at `level` = (alpha_j, sigma_j) with the clean sample and noise of z_i."""
    return combine(level, (x0, e))


def bdia_step(x0, e, noisier, noisier_level, cleaner_level, gamma: float) -> torch.Tensor:
    """z_{i-1} from z_{i+1} (`noisier`) and the prediction at z_i; plain DDIM where there is no z_{i+1} (None)."""
    if noisier is None or gamma == 0:
        return ddim_map(x0, e, cleaner_level)
    clean, noise = (b - gamma * a for a, b in zip(noisier_level, cleaner_level))
    return combine((gamma, clean, noise), (noisier, x0, e))


def bdia_inverse_step(x0, e, cleaner, cleaner_level, noisier_level, gamma: float) -> torch.Tensor:
    """z_{i+1} from z_{i-1} (`cleaner`) and the prediction at z_i: `bdia_step` solved for it; DDIM without z_{i-1}."""
    if cleaner is None:
        return ddim_map(x0, e, noisier_level)
    clean, noise = (a - b / gamma for a, b in zip(noisier_level, cleaner_level))
    return combine((1 / gamma, clean, noise), (cleaner, x0, e))


def _check_gamma(gamma: float, invert: bool, state_dtype: str = "float64") -> None:
    if not 0 <= gamma <= 1:
        raise ValueError(f"gamma is {gamma}; it must lie in [0, 1] (0: DDIM, 1: fully symmetric)")
    if invert and gamma == 0:
        raise ValueError("gamma is 0, plain DDIM, which is not invertible: use gamma in (0, 1], best 1")
    if invert and gamma < 1 and state_dtype != "float64":
        raise ValueError(f"gamma is {gamma}; inversion with gamma below 1 grows and needs state_dtype='float64'")


def _stamp(x: torch.Tensor) -> tuple | None:
    """Equal for a tensor that nobody has written to; None where torch does not keep count."""
    return None if x.is_inference() else (x.data_ptr(), x._version, x.shape, x.dtype)


class _TwoStep(NoiseLevelScheduler):
    """State that both directions share: the two last samples, more precise than the latents in a pipeline's loop."""

    _older = _newer = _rounded = _stamp = None

    @classmethod
    def from_config(cls, config=None, return_unused_kwargs: bool = False, **kwargs):
        """See `NoiseLevelScheduler.from_config`; `set_alpha_to_one` of DDIM becomes `final_sigmas_type`."""
        if config is not None and "set_alpha_to_one" in config and "final_sigmas_type" not in config:
            config = {**config, "final_sigmas_type": "zero" if config["set_alpha_to_one"] else "sigma_min"}
        return super().from_config(config, return_unused_kwargs, **kwargs)

    def _reset(self) -> None:
        self._times = self.timesteps.tolist()
        self._older = self._newer = self._rounded = self._stamp = None

    def set_pair(self, noisy: torch.Tensor, less_noisy: torch.Tensor) -> None:
        """Begin the run with two samples at consecutive levels, as `get_pair` returns them.

        The next `step` is then at the second timestep (or at the begin index, if one is set above 0), with
        `less_noisy` as its sample when sampling and `noisy` when inverting.

        Raises:
            RuntimeError: `set_timesteps` has not been called, or a run is under way.
            ValueError: The shapes differ.
        """
        if self.num_inference_steps is None or self._step_index is not None:
            raise RuntimeError("call `set_pair` right after `set_timesteps`")
        if noisy.shape != less_noisy.shape:
            raise ValueError(f"the pair has two shapes, {tuple(noisy.shape)} and {tuple(less_noisy.shape)}")
        self._begin_index = self._begin_index or 1
        dtype = _STATES[self.config.state_dtype]
        self._older, self._newer = (v.to(dtype) for v in self._in_order(noisy, less_noisy))

    def get_pair(self) -> tuple[torch.Tensor, torch.Tensor]:
        """`(noisy, less_noisy)`: the last two samples, in `state_dtype`.

        Raises:
            RuntimeError: No step has been made, or a model output was NaN or infinite.
        """
        if self._older is None or self._newer is None:
            raise RuntimeError("there is no pair before the first step")
        if self._sums:
            self._require_finite()
        return self._in_order(self._older, self._newer)

    def _in_order(self, a, b):
        return a, b

    def step(self, model_output, timestep, sample, generator=None, return_dict: bool = True):
        """See `NoiseLevelScheduler.step`.

        Raises:
            ValueError: `timestep` is not that of the coming step.
        """
        self._check_turn(timestep)
        self._sample_dtype = sample.dtype
        self._untouched = self._stamp is not None and _stamp(sample) == self._stamp
        return super().step(model_output, timestep, sample, generator, return_dict)

    def _check_turn(self, timestep) -> None:
        i = self._step_index if self._step_index is not None else self._begin_index
        if i is None or self.num_inference_steps is None or i >= self.num_inference_steps:
            return
        if isinstance(timestep, torch.Tensor) and timestep.device.type != "cpu":
            return  # reading it would make every step wait for the device
        if not math.isclose(float(timestep), self._times[i], rel_tol=1e-4, abs_tol=1e-3):
            raise ValueError(
                f"step() got timestep {float(timestep):g} where {self._times[i]:g} is next: a two-step method takes "
                "the timesteps in order; call `set_timesteps` for a new run"
            )

    def _precise(self, x: torch.Tensor) -> torch.Tensor:
        """`x` with the digits that the last step had to round away."""
        if self._newer is None:
            return x.to(_STATES[self.config.state_dtype])
        if self._rounded is None or self._untouched:  # right after set_pair, or the sample that the last step returned
            return self._newer
        return x.to(self._newer.dtype) + (self._newer - self._rounded.to(self._newer.dtype))

    def _keep(self, here: torch.Tensor, result: torch.Tensor) -> torch.Tensor:
        self._older, self._newer, self._rounded = here, result, result.to(self._sample_dtype)
        self._stamp = _stamp(self._rounded)
        return self._rounded

    def _predict(self, output: torch.Tensor, z: torch.Tensor, level) -> tuple[torch.Tensor, torch.Tensor]:
        """Clean sample and noise; at a clean level that of the lowest noise level where 0 / 0 would be."""
        prediction, output = self.config.prediction_type, output.to(z.dtype)
        if level[1] == 0 and prediction == "sample":
            level = tuple(v.item() for v in self.noise_schedule.levels(self._model_range(1000)[-1]))
        return clean_and_noise(output, z, level, prediction)


@register(
    MethodRecord(
        slug="bdia",
        family="schedulers",
        kind="scheduler",
        title="Exact Diffusion Inversion via Bi-directional Integration Approximation",
        arxiv="2307.10829",
        summary="DDIM that can be inverted exactly at one call per step, for editing; better at few steps too.",
        targets=("any",),
        predictions=("epsilon", "v_prediction", "sample", "flow_prediction"),
        nodes=("DXBDIASampler", "DXBDIAInvert", "DXBDIASampleFromPair"),
        claim=Claim("Model calls per step of an exactly invertible sampler", "EDICT needs 2", 1, "call"),
    )
)
class BDIADDIMScheduler(_TwoStep):
    """Samples with BDIA-DDIM, which `BDIADDIMInverseScheduler` runs backwards. Paper: https://arxiv.org/abs/2307.10829

    Args:
        gamma: In [0, 1]: 0 is DDIM, 1 fully symmetric. The authors advise 0.5 at 10 steps and 1 at 40.
        state_dtype: Precision of the two samples kept between steps, `"float64"` or `"float32"`.
        timestep_spacing, steps_offset, final_sigmas_type: The authors' grid by default.

    The other options are those of `diffusers_ext.schedulers._common.NoiseLevelScheduler`.

    Example:
        >>> pipe.scheduler = diffusers_ext.BDIADDIMScheduler.from_config(pipe.scheduler.config, gamma=0.5)

    Limits: no noise is added (eta = 0), predictions are never clipped. Both would end exactness.
    """

    @schedule_config
    def __init__(
        self,
        gamma: float = 1.0,
        state_dtype: str = "float64",
        timestep_spacing: str = "leading",
        steps_offset: int = 1,
        final_sigmas_type: str = "sigma_min",
    ):
        require_choice("state_dtype", state_dtype, tuple(_STATES))
        _check_gamma(gamma, invert=False)

    def _advance(self, i, output, x, generator):
        z = self._precise(x)
        x0, e = self._predict(output, z, self._levels[i])
        return self._keep(
            z, bdia_step(x0, e, self._older, self._levels[i - 1], self._levels[i + 1], self.config.gamma)
        )


class BDIADDIMInverseScheduler(_TwoStep):
    """Runs `BDIADDIMScheduler` backwards, from a clean latent to noise; the way back is exact.

    Timesteps rise: the first is that of the clean level, the model is always called at the lower level of a step.
    After the last step `get_pair()` returns what `BDIADDIMScheduler.set_pair` needs.
    Paper: https://arxiv.org/abs/2307.10829

    Args:
        gamma: In (0, 1], as for sampling; 1 by default, for below 1 the noise grows like (1 / gamma)^(steps / 2).
        state_dtype: `"float64"`; `"float32"` with gamma 1 only, and exact only to float32.
        timestep_spacing, steps_offset, final_sigmas_type: Those of the sampling run.

    Example:
        >>> inverse = diffusers_ext.BDIADDIMInverseScheduler.from_config(pipe.scheduler.config)

    Limits: guidance, prompt and grid must be the same both ways for a reconstruction.
    """

    @schedule_config
    def __init__(
        self,
        gamma: float = 1.0,
        state_dtype: str = "float64",
        timestep_spacing: str = "leading",
        steps_offset: int = 1,
        final_sigmas_type: str = "sigma_min",
    ):
        require_choice("state_dtype", state_dtype, tuple(_STATES))
        _check_gamma(gamma, invert=True, state_dtype=state_dtype)

    def _reset(self) -> None:
        clean, schedule = self._log_snr[-1], self.noise_schedule
        last = schedule.timestep(torch.tensor(clean, dtype=torch.float64)).item() if clean < math.inf else 0.0
        times = [max(last, 0.0), *self.timesteps.flip(0).tolist()[:-1]]
        self.timesteps = torch.tensor(times, device=self.timesteps.device, dtype=self.timesteps.dtype)
        self.sigmas, self._levels = self.sigmas.flip(0), self._levels[::-1]
        super()._reset()

    def _in_order(self, a, b):
        return b, a

    def _advance(self, i, output, x, generator):
        z = self._precise(x)
        x0, e = self._predict(output, z, self._levels[i])
        gamma, levels = self.config.gamma, self._levels
        return self._keep(z, bdia_inverse_step(x0, e, self._older, levels[i - 1], levels[i + 1], gamma))


# --- pictures with a pipeline -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LatentPair:
    """An inverted latent: two samples at consecutive levels and the run they belong to.

    Args:
        noisy, less_noisy: Samples in float64.
        num_inference_steps: Steps of the whole run.
        inverted_steps: Steps that were inverted.
        gamma: Of the inversion.
    """

    noisy: torch.Tensor
    less_noisy: torch.Tensor
    num_inference_steps: int
    inverted_steps: int
    gamma: float


def _run(scheduler, model: Callable, x: torch.Tensor, times) -> torch.Tensor:
    for t in times:
        x = scheduler.step(model(x, t), t, x).prev_sample
    return x


@torch.no_grad()
def bdia_invert(
    pipe,
    latents: torch.Tensor,
    prompt: str | Sequence[str],
    num_inference_steps: int = 50,
    gamma: float = 1.0,
    guidance_scale: float = 1.0,
    negative_prompt: str = "",
    strength: float = 1.0,
) -> LatentPair:
    """Clean latents to noise, exactly.

    Args:
        pipe: Pipeline of the Stable Diffusion or Flux layout; its scheduler tells the noise levels.
        latents: Clean latents `[batch, ...]` as the denoiser takes them (Flux: packed).
        prompt: What the latents show; one text or one per item.
        num_inference_steps: Steps of the whole run.
        gamma: In (0, 1].
        guidance_scale, negative_prompt: Guidance, the same as for the way back.
        strength: Share of the steps to invert, in (0, 1].

    Returns:
        `LatentPair` for `bdia_sample`. Warns where the noisier sample no longer looks like noise.
    """
    steps = int(num_inference_steps * strength)
    if not 0 < strength <= 1 or steps < 1:
        raise ValueError(f"strength is {strength}; it must lie in (0, 1] and leave at least one step")
    scheduler = BDIADDIMInverseScheduler.from_config(pipe.scheduler.config, gamma=gamma)
    scheduler.set_timesteps(num_inference_steps, pipe.device)
    model = guided_model(pipe, _prompts(prompt, len(latents)), guidance_scale, negative_prompt)
    _run(scheduler, model, latents, scheduler.timesteps[:steps])
    noisy, less_noisy = scheduler.get_pair()
    if noisy.std() > _NOISE_LIKE:
        logger.warning(
            "the inverted latent has a standard deviation of %.3g: it reconstructs, but is no noise to edit from. Use "
            "gamma=1 or fewer steps.",
            noisy.std().item(),
        )
    return LatentPair(noisy, less_noisy, num_inference_steps, steps, gamma)


def _prompts(prompt: str | Sequence[str], count: int) -> list[str]:
    prompts = [prompt] * count if isinstance(prompt, str) else list(prompt)
    if len(prompts) != count:
        raise ValueError(f"{len(prompts)} prompts for {count} latents: pass one text, or one per latent")
    return prompts


@torch.no_grad()
def bdia_sample(
    pipe, pair: LatentPair, prompt: str | Sequence[str], guidance_scale: float = 1.0, negative_prompt: str = ""
) -> torch.Tensor:
    """Clean latents from an inverted pair: the original for the prompt of the inversion, an edit for another one.

    Args:
        pipe: The pipeline of the inversion.
        pair: From `bdia_invert`.
        prompt: One text or one per item.
        guidance_scale, negative_prompt: Guidance.
    """
    scheduler = BDIADDIMScheduler.from_config(pipe.scheduler.config, gamma=pair.gamma)
    scheduler.set_timesteps(pair.num_inference_steps, pipe.device)
    begin = pair.num_inference_steps - pair.inverted_steps + 1
    scheduler.set_begin_index(begin)
    scheduler.set_pair(pair.noisy, pair.less_noisy)
    model = guided_model(pipe, _prompts(prompt, len(pair.noisy)), guidance_scale, negative_prompt)
    dtype = (pipe.unet if hasattr(pipe, "unet") else pipe.transformer).dtype
    return _run(scheduler, model, pair.less_noisy.to(dtype), scheduler.timesteps[begin:])


def bdia_edit(
    pipe,
    image,
    source_prompt: str | Sequence[str],
    target_prompt: str | Sequence[str],
    guidance_scale: float = 3.0,
    strength: float = 0.8,
    num_inference_steps: int = 50,
    gamma: float = 1.0,
) -> list:
    """Change pictures by changing their description.

    Args:
        pipe: Pipeline of the Stable Diffusion or Flux layout.
        image: PIL picture or list, or tensor `[batch, 3, h, w]` in [-1, 1].
        source_prompt: What it shows.
        target_prompt: What it should show.
        guidance_scale: Of both ways.
        strength: Share of the steps to go back, in (0, 1]; smaller keeps more of the picture.
        num_inference_steps: Steps of the whole run.
        gamma: In (0, 1].

    Returns:
        List of PIL pictures.

    Example:
        >>> edited = diffusers_ext.bdia_edit(pipe, image, "a red circle", "a blue circle", strength=0.7)
    """
    with torch.no_grad():
        latents, size = encode(pipe, image)
    pair = bdia_invert(pipe, latents, source_prompt, num_inference_steps, gamma, guidance_scale, strength=strength)
    edited = bdia_sample(pipe, pair, target_prompt, guidance_scale)
    with torch.no_grad():
        return decode(pipe, edited, size)
