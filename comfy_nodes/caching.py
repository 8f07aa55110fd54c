"""Caches as MODEL patches: reuse work between the steps of one sampling run."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

import torch
from comfy.ldm.modules.diffusionmodules.openaimodel import (
    UNetModel,
    apply_control,
    forward_timestep_embed,
    timestep_embedding,
)
from comfy.patcher_extension import WrappersMP
from comfy_api.latest import io

from ._inputs import forecast_input
from ._runs import run_options


KEY = "diffusers_ext.deepcache"
logger = logging.getLogger(__name__)


@dataclass
class _Store:
    """Of one kind of call: `History` of the stored feature, and how many attention blocks ran before it."""

    features: Any
    transformer_index: int = 0


class DeepCache:
    """The wrappers of one patched MODEL. What a run remembers lives in that run's options, never here.

    Args:
        config: `DeepCacheConfig`, whose schedule decides.
        branch: Number of the skip connection up to which the UNet still runs.
        start_percent, end_percent: Part of the run that may reuse.
    """

    def __init__(self, config: Any, branch: int, start_percent: float, end_percent: float):
        self.config, self.branch = config, branch
        self.start_percent, self.end_percent = start_percent, end_percent

    def sample(self, executor, *args, **kwargs):
        """OUTER_SAMPLE: a fresh tracker for this run, gone when it ends, however it ends."""
        from diffusers_ext.caching._common import RunTracker
        from diffusers_ext.caching._forecast import History

        guider = executor.class_obj
        sampling = guider.model_patcher.get_model_object("model_sampling")
        run = _Run(
            RunTracker(lambda: _Store(History(self.config.forecast_order))),
            sampling.percent_to_sigma(self.start_percent),
            sampling.percent_to_sigma(self.end_percent),
        )
        try:
            with run_options(guider, KEY, run):
                return executor(*args, **kwargs)
        finally:
            logger.info("DeepCache: %d UNet calls in full, %d shallow", run.computed, run.reused)

    def forward(
        self, executor, x, timesteps=None, context=None, y=None, control=None, transformer_options=None, **kwargs
    ):
        """DIFFUSION_MODEL: the whole UNet, or its shallow part around the stored feature."""
        options = transformer_options or {}
        run: _Run | None = options.get(KEY)
        position = run.begin(x, options) if run else None
        if position is None:
            return executor(x, timesteps, context, y, control, options, **kwargs)
        store: _Store = position.state
        unet: UNetModel = executor.class_obj
        if not store.features.kept or self.config.is_full_step(position.step):
            run.computed += 1
            options = self._recording(options, store, position.step, unet)
            return executor(x, timesteps, context, y, control, options, **kwargs)
        run.reused += 1
        feature, start = store.features.at(position.step).clone(), store.transformer_index
        return shallow_forward(unet, self.branch, feature, start, x, timesteps, context, y, control, options, **kwargs)

    def _recording(self, options: dict, store: _Store, step: int, unet: UNetModel) -> dict:
        """Options with a patch that stores what enters the branch's layer, before other patches change it in place."""
        layer = len(unet.output_blocks) - 1 - self.branch

        def record(h, hsp, transformer_options):
            if transformer_options["block"] == ("output", layer):
                store.features.add(step, h.detach().clone())
                store.transformer_index = transformer_options.get("transformer_index", 0)
            return h, hsp

        patches = options.get("patches", {})
        ours = [record, *patches.get("output_block_patch", [])]
        return {**options, "patches": {**patches, "output_block_patch": ours}}


class _Run:
    """One sampling run: where it is, which part of it may reuse, and how often it did."""

    def __init__(self, tracker: Any, start_sigma: float, end_sigma: float):
        self.tracker, self.start_sigma, self.end_sigma = tracker, start_sigma, end_sigma
        self.computed = self.reused = 0

    def begin(self, x: torch.Tensor, options: dict):
        """Position of this call, or None where the cache is off."""
        from diffusers_ext.caching._common import Inputs

        sigma, uuids = float(options["sigmas"].max()), options.get("uuids")
        if uuids is None or not self.end_sigma < sigma <= self.start_sigma:
            return None
        return self.tracker.begin(Inputs(x, sigma, []), tuple(uuids))


def _embedding(unet: UNetModel, x, timesteps, y, options: dict) -> torch.Tensor:
    emb = unet.time_embed(timestep_embedding(timesteps, unet.model_channels, repeat_only=False).to(x.dtype))
    for patch in options.get("patches", {}).get("emb_patch", []):
        emb = patch(emb, unet.model_channels, options)
    return emb if unet.num_classes is None else emb + unet.label_emb(y)


def _down(unet: UNetModel, branch: int, x, run_block, control, options: dict) -> list[torch.Tensor]:
    """Skips 0 to `branch`."""
    patches = options.get("patches", {})
    skips, h = [], x
    for index, module in enumerate(unet.input_blocks[: branch + 1]):
        options["block"] = ("input", index)
        h = apply_control(run_block(module, h), control, "input")
        for patch in patches.get("input_block_patch", []):
            h = patch(h, options)
        skips.append(h)
        for patch in patches.get("input_block_patch_after_skip", []):
            h = patch(h, options)
    return skips


def shallow_forward(
    unet: UNetModel, branch: int, feature, transformer_index, x, timesteps, context, y, control, options, **kwargs
):
    """The UNet's forward without what lies deeper than `branch`, with a feature in its place that may be written into.

    Control, patches and block numbers are as in the whole forward; `transformer_index` attention blocks are left out.
    """
    options["original_shape"], options["transformer_index"] = list(x.shape), 0
    emb = _embedding(unet, x, timesteps, y, options)
    video = {
        "time_context": kwargs.get("time_context"),
        "num_video_frames": kwargs.get("num_video_frames", unet.default_num_video_frames),
        "image_only_indicator": kwargs.get("image_only_indicator"),
    }

    def run_block(module, h, output_shape=None):
        return forward_timestep_embed(module, h, emb, context, options, output_shape, **video)

    skips = _down(unet, branch, x, run_block, control, options)
    options["transformer_index"] = transformer_index
    first = len(unet.output_blocks) - 1 - branch
    if control is not None:
        # Control is taken off the end of its list, one entry per block: drop those of the blocks that do not run.
        residuals = control.get("output", [])
        del residuals[max(0, len(residuals) - first) :]
    h = feature
    for index in range(first, len(unet.output_blocks)):
        options["block"] = ("output", index)
        skip = apply_control(skips.pop(), control, "output")
        for patch in options.get("patches", {}).get("output_block_patch", []):
            h, skip = patch(h, skip, options)
        h = h if skip is None else torch.cat([h, skip], dim=1)
        h = run_block(unet.output_blocks[index], h, skips[-1].shape if skips else None)
    h = h.type(x.dtype)
    return unet.id_predictor(h) if unet.predict_codebook_ids else unet.out(h)


def _require_unet(model: Any, branch: int) -> None:
    unet = model.model.diffusion_model
    if not isinstance(unet, UNetModel):
        raise ValueError(
            f"DeepCache needs a UNet (Stable Diffusion 1, 2, XL, SVD); this model is a {type(unet).__name__}. "
            "For other models use ComfyUI's EasyCache."
        )
    if branch >= len(unet.output_blocks):
        raise ValueError(
            f"block_id is {branch}; this UNet has {len(unet.output_blocks)} skips, so the last is "
            f"{len(unet.output_blocks) - 1}"
        )


class DXDeepCache(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="DXDeepCache",
            display_name="DeepCache (UNet)",
            category="diffusers-ext/caching",
            description="Runs the whole UNet only every few steps and its shallow part in between: two to four times "
            "fewer operations with near-identical pictures. Stable Diffusion 1, 2, XL, inpainting, SVD.",
            search_aliases=["deepcache", "deep cache", "speed up", "faster", "feature cache", "diffusers-ext"],
            inputs=[
                io.Model.Input("model", tooltip="A UNet model. LoRA, ControlNet and other patches keep working."),
                io.Int.Input(
                    "interval",
                    default=3,
                    min=1,
                    max=100,
                    tooltip="One full step, then interval - 1 shallow ones. 1 changes nothing; 2 to 5 is usual.",
                ),
                io.Int.Input(
                    "block_id",
                    default=0,
                    min=0,
                    max=31,
                    tooltip="Skip connection up to which the UNet still runs (0 to 11 for SD 1.5, 0 to 8 for SDXL). 0 "
                    "is fastest; larger is slower and more faithful.",
                ),
                io.Float.Input(
                    "start_percent",
                    default=0.0,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="Steps before this part of the run are computed in full.",
                ),
                io.Float.Input(
                    "end_percent",
                    default=1.0,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="Steps after this part of the run are computed in full.",
                ),
                forecast_input(),
            ],
            outputs=[io.Model.Output(tooltip="The model with DeepCache. Works with every sampler node.")],
        )

    @classmethod
    def execute(cls, model, interval, block_id, start_percent, end_percent, forecast_order=0) -> io.NodeOutput:
        from diffusers_ext.caching.deepcache import DeepCacheConfig

        _require_unet(model, block_id)
        config = DeepCacheConfig(interval, forecast_order=forecast_order)
        cache = DeepCache(config, block_id, start_percent, end_percent)
        patched = model.clone()
        for kind, wrapper in ((WrappersMP.OUTER_SAMPLE, cache.sample), (WrappersMP.DIFFUSION_MODEL, cache.forward)):
            patched.remove_wrappers_with_key(kind, KEY)
            patched.add_wrapper_with_key(kind, KEY, wrapper)
        return io.NodeOutput(patched)


NODES = [DXDeepCache]
