"""Faster Diffusion as a MODEL patch, and as a SAMPLER that decodes several steps in one batch."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from typing import Any

import torch
from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel, apply_control, forward_timestep_embed
from comfy.model_patcher import create_model_options_clone
from comfy.model_sampling import CONST
from comfy.patcher_extension import WrappersMP
from comfy.samplers import KSAMPLER
from comfy_api.latest import io

from ._inputs import forecast_input
from ._runs import run_options
from .caching import _embedding


KEY = "diffusers_ext.faster-diffusion"
logger = logging.getLogger(__name__)


@dataclass
class _Features:
    """What the encoder of a UNet gave: the skips, the middle before ControlNet, and where attention counting stood."""

    skips: list[torch.Tensor]
    middle: torch.Tensor
    transformer_index: int


@dataclass
class _Store:
    """Of one kind of call: `History` of what the encoder gave at key steps, and outputs decoded ahead by timestep."""

    encoded: Any
    transformer_index: int = 0
    ahead: dict[float, torch.Tensor] = field(default_factory=dict)


class _Run:
    """One sampling run: its schedule, where it is, and how often it reused.

    Args:
        tracker: `RunTracker` of the run.
        keys: Steps at which the encoder runs.
        timesteps: Timestep of each step, as the UNet gets it.
        max_parallel: Steps decoded in one batch at most.
    """

    def __init__(self, tracker: Any, keys: list[int], timesteps: list[float], max_parallel: int):
        self.tracker, self.keys, self.timesteps, self.max_parallel = tracker, keys, timesteps, max_parallel
        self.computed = self.reused = self.batches = 0

    def begin(self, x: torch.Tensor, options: dict):
        from diffusers_ext.caching._common import Inputs

        inputs = Inputs(x, float(options["sigmas"].max()), [])
        return self.tracker.begin(inputs, tuple(options["uuids"]))

    def times(self, step: int, now: float) -> list[float]:
        """Timesteps to decode in a call at `step`, the current one first."""
        from diffusers_ext.caching.faster_diffusion import decoded_together

        if step >= len(self.timesteps) or self.timesteps[step] != now:
            return [now]
        count = decoded_together(step, len(self.timesteps), self.keys, self.max_parallel)
        return self.timesteps[step : step + count]


def _blocks(unet: UNetModel, emb, context, options: dict, kwargs: dict):
    """A function that runs one block of the UNet."""
    video = {
        "time_context": kwargs.get("time_context"),
        "num_video_frames": kwargs.get("num_video_frames", unet.default_num_video_frames),
        "image_only_indicator": kwargs.get("image_only_indicator"),
    }
    return lambda module, h, shape=None: forward_timestep_embed(module, h, emb, context, options, shape, **video)


def encode(unet: UNetModel, x, timesteps, context, y, control, options: dict, **kwargs) -> _Features:
    """The UNet's forward up to its middle block, patches and control as there."""
    options["original_shape"], options["transformer_index"] = list(x.shape), 0
    run = _blocks(unet, _embedding(unet, x, timesteps, y, options), context, options, kwargs)
    patches = options.get("patches", {})
    skips, h = [], x
    for index, module in enumerate(unet.input_blocks):
        options["block"] = ("input", index)
        h = apply_control(run(module, h), control, "input")
        for patch in patches.get("input_block_patch", []):
            h = patch(h, options)
        skips.append(h)
        for patch in patches.get("input_block_patch_after_skip", []):
            h = patch(h, options)
    options["block"] = ("middle", 0)
    if unet.middle_block is not None:
        h = run(unet.middle_block, h)
    return _Features(skips, h, options["transformer_index"])


def decode(unet: UNetModel, features: _Features, x, timesteps, context, y, control, options: dict, **kwargs):
    """The UNet's forward from its middle block on. `x` gives shape and type only."""
    options["original_shape"], options["transformer_index"] = list(x.shape), features.transformer_index
    emb = _embedding(unet, x, timesteps, y, options)
    run = _blocks(unet, emb, context, options, kwargs)
    patches = options.get("patches", {})
    # Control and patches write in place.
    options["block"] = ("middle", 0)
    h, skips = apply_control(features.middle.clone(), control, "middle"), list(features.skips)
    seen = {"x": x, "emb": emb, "context": context, "y": y, "timesteps": timesteps, "transformer_options": options}
    for patch in patches.get("middle_block_after_patch", []):
        h = patch({"h": h, **seen})["h"]
    for index, module in enumerate(unet.output_blocks):
        options["block"] = ("output", index)
        skip = apply_control(skips.pop().clone(), control, "output")
        for patch in patches.get("output_block_patch", []):
            h, skip = patch(h, skip, options)
        h = h if skip is None else torch.cat([h, skip], dim=1)
        h = run(module, h, skips[-1].shape if skips else None)
    h = h.type(x.dtype)
    return unet.id_predictor(h) if unet.predict_codebook_ids else unet.out(h)


def forward(executor, x, timesteps=None, context=None, y=None, control=None, transformer_options=None, **kwargs):
    """DIFFUSION_MODEL: encoder at key steps, decoder for one step or several, or what was decoded before."""
    options = transformer_options or {}
    run: _Run | None = options.get(KEY)
    if run is None or options.get("uuids") is None:
        return executor(x, timesteps, context, y, control, options, **kwargs)
    unet, position, now = executor.class_obj, run.begin(x, options), float(timesteps[0])
    store, is_key = position.state, not position.state.encoded.kept or position.step in run.keys
    run.computed, run.reused = run.computed + is_key, run.reused + (not is_key)
    if is_key:
        store.ahead.clear()
        features = encode(unet, x, timesteps, context, y, control, options, **kwargs)
        store.encoded.add(position.step, (features.skips, features.middle))
        store.transformer_index = features.transformer_index
    if now in store.ahead:
        return store.ahead.pop(now)
    run.batches += 1
    times = run.times(position.step, now)
    if not is_key:
        features = _Features(*store.encoded.at(position.step), store.transformer_index)
    if len(times) == 1:
        return decode(unet, features, x, timesteps, context, y, control, options, **kwargs)
    outputs = _decode_ahead(unet, features, times, x, timesteps, context, y, control, options, kwargs)
    store.ahead = dict(zip(times[1:], outputs[1:]))
    return outputs[0]


def _decode_ahead(unet, features: _Features, times: list[float], x, timesteps, context, y, control, options, kwargs):
    """Outputs of several steps from one batch of the decoder, one whole batch of conditions after the other."""
    from diffusers_ext.caching.faster_diffusion import tile

    count, rows = len(times), x.shape[0]
    many = _Features(tile(features.skips, count), tile(features.middle, count), features.transformer_index)
    lists = {name: options[name] * count for name in ("cond_or_uncond", "uuids") if name in options}
    ahead = timesteps.new_tensor(times).repeat_interleave(rows)
    inputs = tile((x, context, y, control, kwargs), count, rows)
    out = decode(unet, many, inputs[0], ahead, inputs[1], inputs[2], inputs[3], {**options, **lists}, **inputs[4])
    return out.chunk(count)


def _new_run(sampling: Any, sigmas: torch.Tensor, key_steps: Any, max_parallel: int = 1, order: float = 0) -> _Run:
    from diffusers_ext.caching._common import RunTracker
    from diffusers_ext.caching._forecast import History
    from diffusers_ext.caching.faster_diffusion import key_step_list

    timesteps = sampling.timestep(sigmas[:-1]).float().tolist()
    tracker = RunTracker(lambda: _Store(History(order)))
    return _Run(tracker, key_step_list(len(timesteps), key_steps), timesteps, max_parallel)


def parse_key_steps(text: str) -> Any:
    """`"auto"`, the name of a schedule, an interval or a list of steps, as `FasterDiffusionConfig` takes it."""
    from diffusers_ext.caching.faster_diffusion import FasterDiffusionConfig

    parts = [part.strip() for part in text.split(",")]
    if all(part.isdigit() for part in parts):
        value: Any = int(parts[0]) if len(parts) == 1 else [int(part) for part in parts]
    else:
        value = None if text.strip() == "auto" else text.strip()
    return FasterDiffusionConfig(key_steps=value).key_steps


class FasterDiffusion:
    """The OUTER_SAMPLE wrapper of one patched MODEL. What a run remembers lives in that run's options, never here."""

    def __init__(self, key_steps: Any, forecast_order: float):
        self.key_steps, self.forecast_order = key_steps, forecast_order

    def sample(self, executor, noise, latent_image, sampler, sigmas, *args, **kwargs):
        guider = executor.class_obj
        sampling = guider.model_patcher.get_model_object("model_sampling")
        run = _new_run(sampling, sigmas, self.key_steps, order=self.forecast_order)
        try:
            with run_options(guider, KEY, run):
                return executor(noise, latent_image, sampler, sigmas, *args, **kwargs)
        finally:
            logger.info("Faster Diffusion: %d UNet calls with encoder, %d without", run.computed, run.reused)


def _with_run(extra_args: dict, run: _Run) -> dict:
    """Arguments of a sampler's model calls, with a run of its own."""
    options = create_model_options_clone(extra_args.get("model_options", {}))
    transformer = options.setdefault("transformer_options", {})
    transformer[KEY] = run
    wrappers = transformer.setdefault("wrappers", {})
    wrappers[WrappersMP.DIFFUSION_MODEL] = {**wrappers.get(WrappersMP.DIFFUSION_MODEL, {}), KEY: [forward]}
    return {**extra_args, "model_options": options}


@torch.no_grad()
def sample_faster_diffusion(
    model,
    x,
    sigmas,
    extra_args=None,
    callback=None,
    disable=None,
    key_steps=None,
    max_parallel=8,
    noise_injection=0.003,
    injection_start=0.5,
    before_model=False,
):
    """Euler's method (DDIM without noise) that decodes several steps in one batch and adds some initial noise late."""
    from diffusers_ext.caching.faster_diffusion_sampling import injected

    base = model.inner_model.inner_model
    _require_unet(base.diffusion_model)
    sampling = base.model_sampling
    flow = isinstance(sampling, CONST)
    x_T = x if flow else x / (1 + sigmas[0] ** 2).sqrt()
    late = sampling.percent_to_sigma(1 - injection_start)
    run = _new_run(sampling, sigmas, key_steps, max_parallel)
    arguments = _with_run(extra_args or {}, run)
    for i, (sigma, following) in enumerate(zip(sigmas[:-1], sigmas[1:])):
        scale = 1.0 if flow else (1 + sigma**2).sqrt()
        noisy = injected(x, x_T * scale, noise_injection, float(sigma), late)
        denoised = model(noisy if before_model else x, sigma * x.new_ones([x.shape[0]]), **arguments)
        if not before_model:
            denoised = denoised + (noisy - x) * _share_of_input(sampling, sigma)
        if callback is not None:
            callback({"x": noisy, "i": i, "sigma": sigma, "sigma_hat": sigma, "denoised": denoised})
        x = denoised + (noisy - denoised) / sigma * following
    logger.info("Faster Diffusion: %d encoder calls, %d decoder batches", run.computed, run.batches)
    return x


def _share_of_input(sampling: Any, sigma: torch.Tensor) -> torch.Tensor:
    """d denoised / d x at a fixed output of the UNet: the scheduler's step sees the injected latents."""
    zero, one = torch.zeros(1, 1, 1, 1), torch.ones(1, 1, 1, 1)
    at = sigma.cpu().reshape(1)
    return (sampling.calculate_denoised(at, zero, one) - sampling.calculate_denoised(at, zero, zero)).to(sigma).item()


def _require_unet(unet: Any) -> None:
    if not isinstance(unet, UNetModel):
        raise ValueError(
            f"Faster Diffusion needs a UNet (Stable Diffusion 1, 2, XL); this model is a {type(unet).__name__}. For "
            "other models use ComfyUI's EasyCache."
        )


def _key_steps_input() -> io.String.Input:
    return io.String.Input(
        "key_steps",
        default="auto",
        tooltip="Steps at which the encoder runs. auto: 50ls at 50 steps, else every 4th. Or a schedule (50ls, 75ls, "
        "100ls, pro), a number N for every N-th step, or a list: 0, 1, 2, 5, 10.",
    )


class DXFasterDiffusion(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="DXFasterDiffusion",
            display_name="Faster Diffusion (UNet)",
            category="diffusers-ext/caching",
            description="Runs the encoder of a UNet at a few key steps only; the decoder reuses its features in "
            "between. Stable Diffusion 1, 2, XL.",
            search_aliases=["faster diffusion", "encoder propagation", "speed up", "feature cache", "diffusers-ext"],
            inputs=[
                io.Model.Input("model", tooltip="A UNet model. LoRA, ControlNet and other patches keep working."),
                _key_steps_input(),
                forecast_input(),
            ],
            outputs=[io.Model.Output(tooltip="The model with Faster Diffusion. Works with every sampler node.")],
        )

    @classmethod
    def execute(cls, model, key_steps: str, forecast_order: float = 0) -> io.NodeOutput:
        _require_unet(model.model.diffusion_model)
        patched, cache = model.clone(), FasterDiffusion(parse_key_steps(key_steps), forecast_order)
        for kind, wrapper in ((WrappersMP.OUTER_SAMPLE, cache.sample), (WrappersMP.DIFFUSION_MODEL, forward)):
            patched.remove_wrappers_with_key(kind, KEY)
            patched.add_wrapper_with_key(kind, KEY, wrapper)
        return io.NodeOutput(patched)


class DXFasterDiffusionSampler(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="DXFasterDiffusionSampler",
            display_name="Faster Diffusion Sampler",
            category="diffusers-ext/caching",
            description="Euler (DDIM) sampling of a UNet that runs the encoder at key steps and decodes the steps in "
            "between in one batch.",
            search_aliases=["faster diffusion", "parallel decoder", "speed up", "diffusers-ext"],
            inputs=[
                _key_steps_input(),
                io.Int.Input(
                    "max_parallel",
                    default=8,
                    min=1,
                    max=64,
                    tooltip="Steps decoded in one batch at most. More takes more memory and uses a GPU better.",
                ),
                io.Float.Input(
                    "noise_injection",
                    default=0.003,
                    min=0.0,
                    max=0.1,
                    step=0.001,
                    tooltip="Share of the initial noise added at each late step, which brings back texture. 0: none.",
                ),
                io.Float.Input(
                    "injection_start",
                    default=0.5,
                    min=0.01,
                    max=1.0,
                    step=0.01,
                    tooltip="Noise is added when this share of the timesteps is left.",
                ),
                io.Combo.Input(
                    "injection_point",
                    options=["official", "model", "step"],
                    default="official",
                    tooltip="model: the UNet sees the added noise. step: only the sampler's step does. official: as "
                    "in the published code, model for max_parallel 1 and step above.",
                ),
            ],
            outputs=[io.Sampler.Output(tooltip="For SamplerCustom and SamplerCustomAdvanced.")],
        )

    @classmethod
    def execute(cls, key_steps, max_parallel, noise_injection, injection_start, injection_point) -> io.NodeOutput:
        options = {
            "key_steps": parse_key_steps(key_steps),
            "max_parallel": max_parallel,
            "noise_injection": noise_injection,
            "injection_start": injection_start,
            "before_model": injection_point == "model" or (injection_point == "official" and max_parallel == 1),
        }
        return io.NodeOutput(KSAMPLER(sample_faster_diffusion, extra_options=options))


NODES = [DXFasterDiffusion, DXFasterDiffusionSampler]
