"""Delta-DiT as a MODEL patch: spans of transformer blocks are replaced by the change they made before."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch
from comfy.ldm.flux.model import Flux
from comfy.ldm.modules.diffusionmodules.mmdit import MMDiT
from comfy.patcher_extension import WrappersMP
from comfy_api.latest import io

from ._inputs import forecast_input
from ._runs import run_options


KEY = "diffusers_ext.delta-dit"
logger = logging.getLogger(__name__)


def block_places(model: Any) -> list[tuple[str, int]]:
    """Where ComfyUI lets the blocks of a transformer be replaced, in running order. Others raise `ValueError`."""
    transformer = model.model.diffusion_model
    if isinstance(transformer, Flux):
        lists = {"double_block": transformer.double_blocks, "single_block": transformer.single_blocks}
    elif isinstance(transformer, MMDiT):
        lists = {"double_block": transformer.joint_blocks}
    else:
        raise ValueError(
            f"Delta-DiT works here on Flux and Stable Diffusion 3; this model is a {type(transformer).__name__}. For "
            "UNets use DeepCache, for other transformers ComfyUI's EasyCache."
        )
    return [(kind, index) for kind, blocks in lists.items() for index in range(len(blocks))]


class _Run:
    """One sampling run: its schedule, where it is, and how often it reused."""

    def __init__(self, tracker: Any, plan: Any):
        self.tracker, self.plan = tracker, plan
        self.computed = self.reused = 0

    def begin(self, x: torch.Tensor, options: dict):
        """(state, what to do) of this call."""
        from diffusers_ext.caching._common import Inputs

        sigma = float(options["sigmas"].max())
        position = self.tracker.begin(Inputs(x, sigma, []), tuple(options["uuids"]))
        return position.state, self.plan.call(position.state, position.step, self.tracker.run_step)

    def end(self, store: Any, call: Any) -> None:
        """Keep what a full call recorded."""
        self.reused += call.reused is not None
        self.computed += call.reused is None
        if call.reused is None:
            self.plan.keep(store, call)


class DeltaDiT:
    """The wrappers of one patched MODEL. What a run remembers lives in that run's options, never here.

    Args:
        config: `DeltaDiTConfig`, whose schedule decides.
        new_tracker: Makes the `RunTracker` of a sampling run.
        places: Blocks of the transformer, see `block_places`.
    """

    def __init__(self, config: Any, new_tracker: Callable[[], Any], places: list[tuple[str, int]]):
        self.config, self.new_tracker, self.places = config, new_tracker, places

    def sample(self, executor, noise, latent_image, sampler, sigmas, *args, **kwargs):
        """OUTER_SAMPLE: a fresh run, gone when it ends, however it ends."""
        run = _Run(self.new_tracker(), self.config.plan(len(self.places), len(sigmas) - 1))
        try:
            with run_options(executor.class_obj, KEY, run):
                return executor(noise, latent_image, sampler, sigmas, *args, **kwargs)
        finally:
            logger.info("Delta-DiT: %d model calls in full, %d with a span skipped", run.computed, run.reused)

    def forward(
        self, executor, x, t, c_concat=None, c_crossattn=None, control=None, transformer_options=None, **kwargs
    ):
        """APPLY_MODEL: the transformer with every block asking first whether it must run."""
        options = transformer_options or {}
        run: _Run | None = options.get(KEY)
        if run is None or options.get("uuids") is None:
            return executor(x, t, c_concat, c_crossattn, control, options, **kwargs)
        store, call = run.begin(x, options)
        output = executor(x, t, c_concat, c_crossattn, control, self._patched(options, call), **kwargs)
        run.end(store, call)
        return output

    def _patched(self, options: dict, call: Any) -> dict:
        """Options whose block patches are ours, around those of other nodes."""
        replaced = options.get("patches_replace", {})
        theirs = replaced.get("dit", {})
        ours = {p: _block_patch(call, i, p[0], theirs.get(p)) for i, p in enumerate(self.places)}
        return {**options, "patches_replace": {**replaced, "dit": {**theirs, **ours}}}


def _block_patch(call: Any, index: int, kind: str, inner: Callable | None) -> Callable:
    """Patch of one block, in the form ComfyUI calls it; streams are (image, text)."""

    def streams_of(out: dict, words: int | None) -> tuple:
        if words is None:
            return out["img"], out["txt"]
        return out["img"][:, words:], out["img"][:, :words]

    def patch(args: dict, extra: dict) -> dict:
        words = args["transformer_options"]["img_slice"][0] if kind == "single_block" else None
        streams = call.enter(index, streams_of(args, words))
        if streams is None:
            out = inner(args, extra) if inner else extra["original_block"](args)
            call.leave(index, streams_of(out, words))
            return out
        img, txt = streams
        return {"img": img, "txt": txt} if words is None else {"img": torch.cat((txt, img), 1)}

    return patch


class DXDeltaDiTCache(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="DXDeltaDiTCache",
            display_name="Delta-DiT Cache (Flux, SD3)",
            category="diffusers-ext/caching",
            description="On most steps a span of transformer blocks is replaced by the change it made before: the "
            "rear blocks while outlines form, the front blocks while details form. 1.6 times cheaper by default.",
            search_aliases=["delta dit", "delta cache", "block cache", "speed up", "faster", "flux", "diffusers-ext"],
            inputs=[
                io.Model.Input("model", tooltip="A Flux or Stable Diffusion 3 model. LoRA and control keep working."),
                io.Int.Input(
                    "interval",
                    default=2,
                    min=1,
                    max=100,
                    tooltip="One full step, then interval - 1 cheap ones. 1 changes nothing; 2 or 3 is usual.",
                ),
                io.Int.Input(
                    "cached_blocks",
                    default=0,
                    min=0,
                    max=200,
                    tooltip="Blocks that cheap steps leave out, at most one less than the model has (Flux 57, SD3 "
                    "medium 24). 0 takes three quarters of them.",
                ),
                io.Float.Input(
                    "boundary_percent",
                    default=0.5,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="Share of the steps during which the rear blocks are left out; the front blocks after it.",
                ),
                forecast_input(),
                io.Int.Input(
                    "start_step",
                    default=1,
                    min=1,
                    max=1000,
                    optional=True,
                    tooltip="First step that may leave out blocks, counted from 0; those before it run in full. 1 is "
                    "the paper's; 4 to 6 of 20 saves less and stays closer to the picture without a cache.",
                ),
            ],
            outputs=[io.Model.Output(tooltip="The model with Delta-DiT. Works with every sampler node.")],
        )

    @classmethod
    def execute(
        cls, model, interval, cached_blocks, boundary_percent, forecast_order=0, start_step=1
    ) -> io.NodeOutput:
        from diffusers_ext.caching._common import RunTracker
        from diffusers_ext.caching.delta_dit import DeltaDiTConfig, Store

        places = block_places(model)
        config = DeltaDiTConfig(
            interval, cached_blocks or None, boundary_percent, forecast_order=forecast_order, start_step=start_step
        )
        config.plan(len(places), 1)  # refuses more blocks than there are
        cache = DeltaDiT(config, lambda: RunTracker(Store), places)
        patched = model.clone()
        for kind, wrapper in ((WrappersMP.OUTER_SAMPLE, cache.sample), (WrappersMP.APPLY_MODEL, cache.forward)):
            patched.remove_wrappers_with_key(kind, KEY)
            patched.add_wrapper_with_key(kind, KEY, wrapper)
        return io.NodeOutput(patched)


NODES = [DXDeltaDiTCache]
