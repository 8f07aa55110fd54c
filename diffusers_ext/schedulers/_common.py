"""What the schedulers share: noise-level tables, timesteps, step bookkeeping, dtype rules, adding noise."""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable, Sequence

import torch
from diffusers import DDIMScheduler
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.schedulers.scheduling_utils import KarrasDiffusionSchedulers, SchedulerMixin, SchedulerOutput

from ..prediction import PREDICTIONS, NoiseSchedule, expand


_SPACINGS = ("linspace", "leading", "trailing")
_FINALS = ("zero", "sigma_min")
_LAST_FLOW_SIGMA = 1 - 1e-6  # pure noise has log-SNR -inf, which no exponential integrator can start from


def _schedule_options(
    self,
    num_train_timesteps: int = 1000,
    beta_start: float = 0.0001,
    beta_end: float = 0.02,
    beta_schedule: str = "linear",
    trained_betas: list[float] | None = None,
    rescale_betas_zero_snr: bool = False,
    prediction_type: str = "epsilon",
    timestep_spacing: str = "trailing",
    steps_offset: int = 0,
    final_sigmas_type: str = "zero",
    use_karras_sigmas: bool = False,
    shift: float = 1.0,
    use_dynamic_shifting: bool = False,
    time_shift_type: str = "exponential",
    base_shift: float = 0.5,
    max_shift: float = 1.15,
    base_image_seq_len: int = 256,
    max_image_seq_len: int = 4096,
) -> None:
    """The options every scheduler here has, under the names diffusers uses."""


def schedule_config(init: Callable) -> Callable:
    """Decorator of a scheduler's `__init__`: adds the options of `NoiseLevelScheduler` to its own and stores all.

    The body runs after the noise schedule has been set up; all options are in `self.config`.
    """
    shared = list(inspect.signature(_schedule_options).parameters.values())
    own = list(inspect.signature(init).parameters.values())
    names = [p.name for p in own[1:]]

    rest = [p for p in shared[1:] if p.name not in names]  # an own default wins
    signature = inspect.Signature(shared[:1] + own[1:] + rest)

    @functools.wraps(init)
    def run(self, *args, **options):
        signature.bind(self, *args, **options)
        self._set_up_schedule()
        init(self, **{name: self.config[name] for name in names})

    del run.__wrapped__  # or inspect would show only the own options
    run.__signature__ = signature
    return register_to_config(run)


class NoiseLevelScheduler(SchedulerMixin, ConfigMixin):
    """Base of the schedulers: subclasses decorate `__init__` with `schedule_config` and implement `_advance`.

    Samples live in the model's own space, x = alpha * x0 + sigma * noise, so `init_noise_sigma` is 1 and
    `scale_model_input` does nothing. Arithmetic is in float32 (float64 for float64 samples) whatever the latents'
    dtype, noise levels are Python floats computed in float64: a step never waits for the device.

    Args:
        num_train_timesteps: Length of the model's training schedule.
        beta_start, beta_end, beta_schedule, trained_betas, rescale_betas_zero_snr: Betas of a VP model, as in
            `diffusers.DDIMScheduler`. Not used with `"flow_prediction"`.
        prediction_type: `"epsilon"`, `"v_prediction"`, `"sample"` or `"flow_prediction"` (flow matching models).
        timestep_spacing: `"trailing"`, `"leading"` or `"linspace"` choice of timesteps of a VP model.
        steps_offset: Added to the timesteps of `"leading"`.
        final_sigmas_type: Where a run ends: `"zero"` (clean) or `"sigma_min"` (lowest noise level of the model).
        use_karras_sigmas: Space noise levels by sigma^(1/7).
        shift: Static time shift of flow models.
        use_dynamic_shifting: Shift by `mu` of `set_timesteps` instead.
        time_shift_type: `"exponential"` (by e^mu) or `"linear"` (by mu).
        base_shift, max_shift, base_image_seq_len, max_image_seq_len: Read by pipelines that compute `mu`.
    """

    order = 1
    _compatibles = [e.name for e in KarrasDiffusionSchedulers if e.name != "EDMEulerScheduler"] + [
        "FlowMatchEulerDiscreteScheduler"
    ]

    @classmethod
    def from_config(cls, config=None, return_unused_kwargs: bool = False, **kwargs):
        """This scheduler with the settings of another one; `pipe.scheduler.config` of any pipeline is accepted.

        Raises:
            ValueError: The config describes an EDM-preconditioned model.
        """
        return super().from_config(_translate(config), return_unused_kwargs, **kwargs)

    def _set_up_schedule(self) -> None:
        c = self.config
        require_choice("prediction_type", c.prediction_type, PREDICTIONS)
        require_choice("timestep_spacing", c.timestep_spacing, _SPACINGS)
        require_choice("final_sigmas_type", c.final_sigmas_type, _FINALS)
        require_choice("time_shift_type", c.time_shift_type, ("exponential", "linear"))
        if c.prediction_type == "flow_prediction":
            self.noise_schedule = NoiseSchedule("flow", None, c.num_train_timesteps)
        else:
            names = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas")
            upstream = DDIMScheduler(
                **{name: c[name] for name in names}, rescale_betas_zero_snr=c.rescale_betas_zero_snr
            )
            self.alphas_cumprod = upstream.alphas_cumprod
            self.noise_schedule = NoiseSchedule.from_alphas_cumprod(upstream.alphas_cumprod)
        self.init_noise_sigma = 1.0
        self.num_inference_steps: int | None = None
        self.timesteps = torch.arange(c.num_train_timesteps).flip(0)
        self.sigmas = self._sigma_of(self._model_range(c.num_train_timesteps))
        self._step_index: int | None = None
        self._begin_index: int | None = None

    def _model_range(self, n: int) -> torch.Tensor:
        """Log-SNR of timesteps n-1 ... 0 (VP) or of flow sigmas 1 - 1/n ... 1/n, increasing."""
        schedule = self.noise_schedule
        if schedule.table is not None:
            return schedule.table.flip(0)
        return -torch.logit(torch.linspace(1 - 1 / n, 1 / n, n, dtype=torch.float64))

    def _sigma_of(self, log_snr: torch.Tensor) -> torch.Tensor:
        """diffusers' `sigmas`: sigma / alpha for VP, sigma for flow; float32."""
        is_flow = self.noise_schedule.family == "flow"
        return (torch.sigmoid(-log_snr) if is_flow else torch.exp(-log_snr)).float()

    def __len__(self) -> int:
        return self.config.num_train_timesteps

    @property
    def step_index(self) -> int | None:
        """Index of the next step; None before the first one."""
        return self._step_index

    @property
    def begin_index(self) -> int | None:
        """Index of the first step of the run, set by pipelines that start in the middle."""
        return self._begin_index

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Start the run at this index (image-to-image)."""
        self._begin_index = begin_index

    def scale_model_input(self, sample: torch.Tensor, timestep=None) -> torch.Tensor:
        """Nothing to do: samples are in the model's own space."""
        return sample

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        sigmas: Sequence[float] | None = None,
        timesteps: Sequence[float] | None = None,
        mu: float | None = None,
    ) -> None:
        """Choose the noise levels of a run and forget the previous run.

        Args:
            num_inference_steps: Number of steps, from 1 up.
            device: Where `timesteps` is kept.
            sigmas: Own noise levels instead, decreasing: sigma / alpha for VP models, sigma in (0, 1] for flow models
                (shifted like the default ones). A last 0 is optional.
            timesteps: Own timesteps instead, decreasing.
            mu: Dynamic shift of flow models; needed when `use_dynamic_shifting` is on, ignored otherwise.

        Raises:
            ValueError: Not exactly one choice was given, or it is out of range.
        """
        log_snr, times = self._choose(num_inference_steps, sigmas, timesteps, mu)
        self._log_snr = log_snr.tolist()
        self._levels = list(zip(*(v.tolist() for v in self.noise_schedule.levels(log_snr))))
        self.sigmas = self._sigma_of(log_snr)
        whole = times.dtype == torch.int64
        self.timesteps = times.to(device) if whole else times.float().to(device)
        self.num_inference_steps = len(times)
        self._step_index = self._begin_index = None
        self._sums: list[torch.Tensor] = []
        self._reset()

    def _choose(self, steps, sigmas, timesteps, mu) -> tuple[torch.Tensor, torch.Tensor]:
        """Log-SNR at the N + 1 nodes (float64, +inf for clean) and the N timesteps the model is given."""
        if sum(v is not None for v in (sigmas, timesteps)) > 1 or (steps is sigmas is timesteps is None):
            raise ValueError("give one of `num_inference_steps`, `sigmas` or `timesteps`")
        if steps is not None and (int(steps) != steps or steps < 1):
            raise ValueError(f"num_inference_steps is {steps}; it must be a whole number from 1 up")
        if timesteps is not None:
            times = _decreasing("timesteps", timesteps)
            log_snr = self.noise_schedule.log_snr(times)
            times = times.long() if torch.equal(times, times.round()) else times
        elif sigmas is not None or self.noise_schedule.family == "flow" or self.config.use_karras_sigmas:
            log_snr = self._from_sigmas(steps, sigmas, mu)
            times = self.noise_schedule.timestep(log_snr[log_snr < math.inf])
        else:
            times = self._spaced(steps)
            log_snr = self.noise_schedule.log_snr(times)
        if log_snr[-1] < math.inf:
            log_snr = torch.cat([log_snr, self._final()])
        return log_snr.clamp(min=-_log_odds(_LAST_FLOW_SIGMA)), times

    def _final(self) -> torch.Tensor:
        clean = self.config.final_sigmas_type == "zero"
        return torch.full((1,), math.inf, dtype=torch.float64) if clean else self._model_range(1000)[-1:]

    def _spaced(self, steps: int) -> torch.Tensor:
        n, spacing = self.config.num_train_timesteps, self.config.timestep_spacing
        if steps > n:
            raise ValueError(f"num_inference_steps is {steps}, but the model was trained on {n} timesteps")
        if spacing == "linspace":
            times = torch.linspace(n - 1, 0, steps + 1, dtype=torch.float64)[:-1]
        elif spacing == "leading":
            times = torch.arange(steps - 1, -1, -1) * (n // steps) + self.config.steps_offset
        else:
            times = n - torch.arange(steps, dtype=torch.float64) * (n / steps) - 1
        return times.round().long().clamp(0, n - 1)

    def _from_sigmas(self, steps: int | None, sigmas, mu: float | None) -> torch.Tensor:
        flow = self.noise_schedule.family == "flow"
        if sigmas is None and self.config.use_karras_sigmas:
            ends = torch.exp(-self._model_range(self.config.num_train_timesteps)[[0, -1]] / 7)
            return -7 * torch.log(ends[0] + torch.linspace(0, 1, steps, dtype=torch.float64) * (ends[1] - ends[0]))
        sigma = torch.linspace(1, 1 / steps, steps).double() if sigmas is None else _decreasing("sigmas", sigmas)
        if not flow:
            return -torch.log(sigma)
        if sigma[0] > 1:
            raise ValueError(f"sigmas of a flow model lie in [0, 1], got {sigma[0].item()}")
        return -torch.logit(self._shifted(sigma, mu))

    def _shifted(self, sigma: torch.Tensor, mu: float | None) -> torch.Tensor:
        if not self.config.use_dynamic_shifting:
            factor = self.config.shift
        elif mu is None:
            raise ValueError("this scheduler has use_dynamic_shifting=True: pass `mu` to set_timesteps")
        else:
            factor = math.exp(mu) if self.config.time_shift_type == "exponential" else mu
        return factor * sigma / (1 + (factor - 1) * sigma)

    def _reset(self) -> None:
        """Forget the history of the previous run; called at the end of `set_timesteps`."""

    def _advance(self, i: int, output: torch.Tensor, x: torch.Tensor, generator) -> torch.Tensor:
        """The sample at node i + 1 from the sample `x` and the model output at node i (float32 or float64)."""
        raise NotImplementedError(f"{type(self).__name__} does not implement _advance()")

    def step(
        self, model_output: torch.Tensor, timestep, sample: torch.Tensor, generator=None, return_dict: bool = True
    ) -> SchedulerOutput | tuple[torch.Tensor]:
        """One step of the run: the sample at the next, lower noise level.

        Args:
            model_output: What the model predicted for `sample`, same shape.
            timestep: Timestep of `sample`; used only to find the start of a run.
            sample: Current sample `[batch, ...]`.
            generator: `torch.Generator` or one per batch item, for stochastic schedulers.
            return_dict: Return `SchedulerOutput` instead of a tuple.

        Raises:
            RuntimeError: `set_timesteps` has not been called, the run is over, or (at its last step, which alone waits
                for the device) a model output was NaN or infinite.
            ValueError: `model_output` has another shape than `sample`.
        """
        if self.num_inference_steps is None:
            raise RuntimeError("call `set_timesteps` before the first step")
        if model_output.shape != sample.shape:
            raise ValueError(
                f"the model returned {tuple(model_output.shape)} for a sample of shape {tuple(sample.shape)}: models "
                "that also predict a variance are not supported"
            )
        if self._step_index is None:
            self._step_index = self.index_for_timestep(timestep) if self._begin_index is None else self._begin_index
        if self._step_index >= self.num_inference_steps:
            raise RuntimeError(f"all {self.num_inference_steps} steps are done: call `set_timesteps` for a new run")
        self._sums.append(model_output.sum(dtype=torch.float32))  # not finite if any element is not
        work = torch.promote_types(sample.dtype, torch.float32)
        after = self._advance(self._step_index, model_output.to(work), sample.to(work), generator).to(sample.dtype)
        self._step_index += 1
        if self._step_index == self.num_inference_steps:
            self._require_finite()
        return SchedulerOutput(prev_sample=after) if return_dict else (after,)

    def _require_finite(self) -> None:
        """Raise `RuntimeError` if a model output of this run was NaN or infinite, naming the step."""
        require_finite(self._sums, self._step_index, self.num_inference_steps)

    def index_for_timestep(self, timestep) -> int:
        """Index of the first occurrence of `timestep` in the run (the nearest one if it does not occur)."""
        return int((self.timesteps - torch.as_tensor(timestep, device=self.timesteps.device)).abs().argmin())

    def add_noise(self, original_samples: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """Clean samples at the noise level of `timesteps` (`[batch]` or one): alpha * x0 + sigma * noise."""
        alpha, sigma = self.noise_schedule.levels(self.noise_schedule.log_snr(timesteps.cpu()))
        work = torch.promote_types(original_samples.dtype, torch.float32)
        alpha, sigma = (expand(v.to(original_samples.device, work), original_samples) for v in (alpha, sigma))
        return (alpha * original_samples.to(work) + sigma * noise.to(work)).to(original_samples.dtype)

    def scale_noise(self, sample: torch.Tensor, timestep: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        """`add_noise` with the argument order that flow-matching pipelines use."""
        return self.add_noise(sample, noise, timestep)


def require_finite(sums: Sequence[torch.Tensor], done: int, steps: int) -> None:
    """Raise `RuntimeError` naming the step whose model output has a sum that is NaN or infinite.

    Args:
        sums: Sums of the model outputs of the last steps, 0-dimensional.
        done: Number of steps made.
        steps: Steps of the whole run.
    """
    flags = torch.isfinite(torch.stack(list(sums))).tolist()
    if not all(flags):
        step = done - len(flags) + flags.index(False) + 1
        raise RuntimeError(
            f"the model returned NaN or infinity at step {step} of {steps}: try a higher precision or a lower "
            "guidance scale"
        )


def combine(weights: Sequence[float], tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """Sum of weights times tensors, with one pass over memory per term."""
    total = tensors[0] * weights[0]
    for w, v in zip(weights[1:], tensors[1:]):
        total.add_(v, alpha=w)
    return total


def clean_sample(output: torch.Tensor, x: torch.Tensor, level: tuple, prediction: str) -> torch.Tensor:
    """Clean sample from a model output at `level` = (alpha, sigma), floats; see `prediction.to_x0`."""
    alpha, sigma = level
    if prediction == "epsilon":
        return combine((1 / alpha, -sigma / alpha), (x, output))
    if prediction == "v_prediction":
        return combine((alpha, -sigma), (x, output))
    return output if prediction == "sample" else torch.sub(x, output, alpha=sigma)


def clean_and_noise(output: torch.Tensor, x: torch.Tensor, level: tuple, prediction: str):
    """`(clean sample, noise)` from a model output at `level` = (alpha, sigma), floats; see `prediction.to_noise`."""
    clean, (alpha, sigma) = clean_sample(output, x, level, prediction), level
    if prediction == "epsilon":
        return clean, output
    if prediction == "sample":
        return clean, combine((1 / sigma, -alpha / sigma), (x, output))
    if prediction == "v_prediction":
        return clean, combine((sigma, alpha), (x, output))
    return clean, torch.add(x, output, alpha=alpha)


def _translate(config):
    """A scheduler config of diffusers in the option names used here."""
    if config is None or not hasattr(config, "get"):
        return config
    if "sigma_data" in config:
        raise ValueError(
            "this config is of an EDM-preconditioned model, which this scheduler does not support; it accepts VP "
            "models (epsilon, v_prediction, sample) and flow models (flow_prediction)"
        )
    # diffusers' FlowMatch schedulers have a shift and neither betas nor a prediction type
    if not config.get("use_flow_sigmas") and ("shift" not in config or "beta_start" in config):
        return config
    known = {"prediction_type": "flow_prediction", "shift": config.get("shift", config.get("flow_shift", 1.0))}
    defaults = [name for name in config.get("_use_default_values", ()) if name not in known]
    return {**config, **known, "_use_default_values": defaults}


def require_choice(name: str, value, accepted: Sequence) -> None:
    """Raise `ValueError` naming the option, what it is and what is accepted."""
    if value not in accepted:
        raise ValueError(f"{name} is {value!r}; accepted: {', '.join(map(str, accepted))}")


def _decreasing(name: str, values: Sequence[float]) -> torch.Tensor:
    values = torch.as_tensor(values, dtype=torch.float64).cpu()
    if values.ndim != 1 or len(values) == 0 or (values < 0).any() or (values.diff() > 0).any():
        raise ValueError(f"`{name}` must be a list of decreasing numbers >= 0, got {values.tolist()}")
    if name == "sigmas" and values[0] == 0:
        raise ValueError("`sigmas` must begin above 0")
    return values


def _log_odds(p: float) -> float:
    return math.log(p / (1 - p))


def guided_model(pipe, prompts: Sequence[str], guidance_scale: float = 1.0, negative_prompt: str = "") -> Callable:
    """The denoiser of a text-to-image pipeline as `model(x, timestep)` with classifier-free guidance inside.

    For calibrating solvers on a pipeline. `x[i]` is conditioned on `prompts[i]`; for Flux layouts x is packed, as its
    scheduler sees it.

    Args:
        pipe: `StableDiffusionPipeline` or `FluxPipeline` (or one with the same `encode_prompt` and denoiser).
        prompts: One per batch item; `rows` of the returned function's keyword selects a part of them.
        guidance_scale: 1 turns guidance off.
        negative_prompt: Prompt of the unconditional branch.

    Returns:
        `model(x, timestep, rows=slice(None))`.
    """
    if hasattr(pipe, "unet"):
        branch = functools.partial(_unet_branch, pipe)
    elif type(pipe.transformer).__name__ == "FluxTransformer2DModel":
        branch = functools.partial(_flux_branch, pipe)
    else:
        raise ValueError(f"cannot drive {type(pipe).__name__}; supported: Stable Diffusion and Flux layouts")
    with torch.no_grad():
        conditional = branch(list(prompts))
        unconditional = branch([negative_prompt] * len(prompts)) if guidance_scale != 1 else None

    def model(x: torch.Tensor, timestep: torch.Tensor, rows: slice = slice(None)) -> torch.Tensor:
        output = conditional(x, timestep, rows)
        if unconditional is None:
            return output
        base = unconditional(x, timestep, rows)
        return base + guidance_scale * (output - base)

    return model


def _unet_branch(pipe, prompts: list[str]) -> Callable:
    states = pipe.encode_prompt(prompts, pipe.device, 1, False)[0]

    def run(x, timestep, rows):
        return pipe.unet(x, timestep, encoder_hidden_states=states[rows], return_dict=False)[0]

    return run


def _flux_branch(pipe, prompts: list[str]) -> Callable:
    length = pipe.tokenizer_2.model_max_length
    states, pooled, text_ids = pipe.encode_prompt(prompts, None, max_sequence_length=min(length, 512))

    def run(x, timestep, rows):
        side = math.isqrt(x.shape[1])
        image_ids = pipe._prepare_latent_image_ids(len(x), side, side, x.device, x.dtype)
        time = timestep.to(x.dtype).expand(len(x)) / 1000
        return pipe.transformer(
            hidden_states=x,
            timestep=time,
            encoder_hidden_states=states[rows],
            pooled_projections=pooled[rows],
            txt_ids=text_ids,
            img_ids=image_ids,
            return_dict=False,
        )[0]

    return run
