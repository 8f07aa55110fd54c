"""Beginning a run in the middle of its grid: noise levels of any diffusers scheduler, its tail, clean latents.

A scheduler keeps its samples in one of three spaces: x = alpha * x0 + sigma * noise with alpha^2 + sigma^2 = 1 (DDIM,
DPM-Solver, UniPC), with alpha = 1 (Euler, Heun, LMS, EDM) or with alpha = 1 - sigma (flow matching). A level is the
pair (alpha, sigma) of floats in the scheduler's own space.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from tqdm.auto import tqdm

from ..prediction import NoiseSchedule
from ._checkpoint import Checkpoint, require_size
from ._pictures import starting_noise


Level = tuple[float, float]


# --- a scheduler's grid -------------------------------------------------------------------------------------------


def space_of(scheduler) -> str:
    """`"vp"`, `"ve"` (alpha = 1) or `"flow"`: how the scheduler's samples are scaled.

    Raises:
        ValueError: The scheduler tells no noise levels, or cannot begin in the middle.
    """
    config, name = scheduler.config, type(scheduler).__name__
    if hasattr(scheduler, "plms_timesteps") or hasattr(scheduler, "prk_timesteps"):
        raise ValueError(
            f"{name} builds its history from the first step on and cannot begin in the middle: use "
            "DPMSolverMultistepScheduler.from_config(pipe.scheduler.config) or another scheduler"
        )
    if "sigma_data" in config:
        return "ve"
    if config.get("prediction_type") == "flow_prediction" or config.get("use_flow_sigmas") or "FlowMatch" in name:
        return "flow"
    if not hasattr(scheduler, "alphas_cumprod"):
        raise ValueError(
            f"the noise levels of {name} are not known: use a scheduler with betas, sigma_data or flow matching"
        )
    return "ve" if float(getattr(scheduler, "init_noise_sigma", 1.0)) != 1.0 else "vp"


def level_of_sigma(sigma: float, space: str) -> Level:
    """Level of an entry of a scheduler's `sigmas`, which for VP samples is sigma / alpha."""
    if space == "vp":
        alpha = 1 / math.sqrt(1 + sigma * sigma)
        return alpha, sigma * alpha
    return (1.0 if space == "ve" else 1 - sigma), sigma


def level_of_timestep(scheduler, timestep: float) -> Level:
    """Level of a timestep of the model, in the space of the scheduler's samples."""
    schedule, space = NoiseSchedule.from_scheduler(scheduler), space_of(scheduler)
    log_snr = schedule.log_snr(torch.tensor(float(timestep), dtype=torch.float64))
    if space == "ve":
        return 1.0, math.exp(-log_snr.item())
    alpha, sigma = schedule.levels(log_snr)
    return alpha.item(), sigma.item()


def node_levels(scheduler) -> list[Level]:
    """Level at which every step of the run begins, after `set_timesteps`.

    Raises:
        RuntimeError: `set_timesteps` has not been called.
    """
    if getattr(scheduler, "num_inference_steps", None) is None:
        raise RuntimeError("the scheduler has no grid yet: call `set_timesteps` first")
    space, order = space_of(scheduler), scheduler.order
    if getattr(scheduler, "sigmas", None) is None:
        return [level_of_timestep(scheduler, t) for t in scheduler.timesteps[::order].tolist()]
    steps = len(scheduler.timesteps[::order])
    return [level_of_sigma(float(s), space) for s in scheduler.sigmas[::order][:steps]]


def begin_at(scheduler, step: int) -> torch.Tensor:
    """Make the next call of `scheduler.step` the one of `step` and return the timesteps from there on.

    Raises:
        ValueError: The grid has no such step.
        RuntimeError: A run is under way.
    """
    steps = len(node_levels(scheduler))
    if int(step) != step or not 0 <= step < steps:
        raise ValueError(f"step {step} is outside the grid: it has steps 0 to {steps - 1}")
    if getattr(scheduler, "step_index", None) is not None:
        raise RuntimeError("the scheduler is in the middle of a run: call `set_timesteps` first")
    index = int(step) * scheduler.order
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(index)
    return scheduler.timesteps[index:]


def native_level(sampling, sigma: torch.Tensor) -> Level:
    """Level of ComfyUI's samples at a noise level, from its `model_sampling`."""
    one, zero, at = torch.ones(1).double(), torch.zeros(1).double(), sigma.double().reshape(1).cpu()
    return tuple(sampling.noise_scaling(at, *pair).item() for pair in ((zero.clone(), one), (one.clone(), zero)))


# --- the tail of a pipeline's run ---------------------------------------------------------------------------------


class _Tail:
    """Stands in for a pipeline's scheduler during one call: the pipeline sees the steps from `step` on only.

    Its latents are samples of the scheduler at that step, so they are not scaled again.
    """

    init_noise_sigma = 1.0

    def __init__(self, scheduler, step: int, level: Level | None = None):
        self.scheduler, self._step, self._level = scheduler, step, level
        # pipelines look at the signature
        self.set_timesteps = functools.wraps(scheduler.set_timesteps)(lambda *a, **k: self._set_timesteps(*a, **k))

    def __getattr__(self, name: str):
        return getattr(self.__dict__["scheduler"], name)

    def _set_timesteps(self, *args, **kwargs) -> None:
        self.scheduler.set_timesteps(*args, **kwargs)
        self.timesteps = begin_at(self.scheduler, self._step)
        found = node_levels(self.scheduler)[self._step]
        if self._level is not None and abs(found[1] - self._level[1]) > 1e-4 * max(self._level):
            raise RuntimeError(
                f"the pipeline chose noise level {found[1]:.5g} where {self._level[1]:.5g} was prepared: pass "
                "`sigmas` or `timesteps`"
            )

    def set_begin_index(self, begin_index: int = 0) -> None:
        self.scheduler.set_begin_index(self._step * self.scheduler.order + begin_index)


def count_of(prompt, kwargs: dict) -> int:
    """Number of pictures that a pipeline call will draw."""
    embeds = kwargs.get("prompt_embeds")
    prompts = 1 if isinstance(prompt, str) else len(prompt if prompt is not None else embeds)
    return prompts * kwargs.get("num_images_per_prompt", 1)


def _plan(pipe, scheduler, tokens: int, steps: int, kwargs: dict) -> None:
    """Set the grid that the pipeline will set by itself."""
    given = {name: kwargs[name] for name in ("sigmas", "timesteps") if kwargs.get(name) is not None}
    if hasattr(pipe, "unet"):
        scheduler.set_timesteps(**(given or {"num_inference_steps": steps}))
        return
    config = scheduler.config
    if not given:
        even = torch.linspace(1, 1 / steps, steps, dtype=torch.float64).tolist()
        given = {"num_inference_steps": steps} if config.get("use_flow_sigmas") else {"sigmas": even}
    if config.get("use_dynamic_shifting"):
        low, high = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
        base, top = config.get("base_shift", 0.5), config.get("max_shift", 1.15)
        given["mu"] = base + (top - base) / (high - low) * (tokens - low)
    scheduler.set_timesteps(**given)


def call_from(pipe, make_start: Callable, step, prompt=None, num_inference_steps: int = 50, **kwargs):
    """Call a pipeline on latents at the beginning of `step` of its grid.

    Args:
        pipe: Stable Diffusion or Flux layout (others: pass `latents`).
        make_start: `(scheduler with its grid, unit noise) -> latents` at the level of `step`.
        step: Steps to leave out, or a function of the scheduler with its grid that tells them.
        prompt, num_inference_steps, kwargs: Of the pipeline. `latents` is unit noise.
    """
    scheduler, height, width = pipe.scheduler, kwargs.get("height"), kwargs.get("width")
    pipe.scheduler = _Tail(scheduler, 0)
    try:
        noise = kwargs.pop("latents", None)
        if noise is None:
            noise, _ = starting_noise(pipe, count_of(prompt, kwargs), height, width, kwargs.get("generator"))
        _plan(pipe, scheduler, noise.shape[1], num_inference_steps, kwargs)
        step = step(scheduler) if callable(step) else step
        start = make_start(scheduler, noise).to(noise.dtype)
        pipe.scheduler = _Tail(scheduler, step, node_levels(scheduler)[step])
        return pipe(prompt=prompt, num_inference_steps=num_inference_steps, latents=start, **kwargs)
    finally:
        pipe.scheduler = scheduler


# --- clean latents ------------------------------------------------------------------------------------------------


@torch.no_grad()
def draw_latents(
    pipe,
    prompts: Sequence[str],
    num_samples: int,
    num_inference_steps: int = 20,
    batch_size: int = 16,
    seed: int = 0,
    checkpoint: str | Path | None = None,
    progress: bool = True,
    on_batch: Callable[[int], None] | None = None,
    **call,
) -> torch.Tensor:
    """Clean latents of a pipeline `[num_samples, ...]` as its scheduler sees them; sample i has prompt i mod n.

    Ctrl-C, or an exception from `on_batch`, stops it after a batch; with a `checkpoint` the next call goes on there.

    Args:
        pipe: A text-to-image pipeline.
        prompts: What to draw.
        num_samples: How many, at least 1.
        num_inference_steps, call: Of the pipeline.
        batch_size: Samples per call.
        seed: The noise of a sample depends on it and on the sample's number only.
        checkpoint: safetensors file of what has been drawn so far.
        progress: Show a progress bar.
        on_batch: Called with the number of samples drawn so far.
    """
    if isinstance(prompts, str) or not prompts or num_samples < 1 or batch_size < 1:
        raise ValueError(
            f"give a list of prompts, num_samples and batch_size from 1 up, got {prompts!r}, {num_samples} and "
            f"{batch_size}"
        )
    about = {
        "prompts": list(prompts),
        "steps": num_inference_steps,
        "seed": seed,
        "call": sorted(map(str, call.items())),
    }
    unfinished = Checkpoint(checkpoint, "latents", about)
    done = unfinished.read().get("latents", torch.empty(0))
    with tqdm(total=num_samples, initial=min(len(done), num_samples), desc="latents", disable=not progress) as bar:
        while len(done) < num_samples:
            numbers = range(len(done), min(len(done) + batch_size, num_samples))
            noise = [torch.Generator().manual_seed(seed * 100003 + i) for i in numbers]
            drawn = pipe(
                prompt=[prompts[i % len(prompts)] for i in numbers],
                num_inference_steps=num_inference_steps,
                generator=noise,
                output_type="latent",
                **call,
            ).images.cpu()
            require_size("latents", num_samples, *drawn.shape[1:])
            done = drawn if len(done) == 0 else torch.cat([done, drawn])
            unfinished.write({"latents": done})
            bar.update(len(numbers))
            if on_batch is not None:
                on_batch(len(done))
    return done[:num_samples]
