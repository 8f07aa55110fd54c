"""RAS as a MODEL patch: most steps compute a part of the image, the rest keeps its noise of the step before."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from comfy.ldm.flux.model import Flux
from comfy.ldm.modules.diffusionmodules.mmdit import MMDiT
from comfy.patcher_extension import WrappersMP
from comfy_api.latest import io

from ._inputs import forecast_input
from ._runs import run_options


KEY = "diffusers_ext.ras"
logger = logging.getLogger(__name__)


class _Places:
    """Where the tokens of a supported transformer come in and go out. Others raise `ValueError`."""

    def __init__(self, model: Any):
        transformer = model.model.diffusion_model
        if isinstance(transformer, Flux):
            self.last = ("single_block", len(transformer.single_blocks) - 1)
            self.first, self.patch = None, transformer.patch_size
        elif isinstance(transformer, MMDiT):
            self.last = ("double_block", len(transformer.joint_blocks) - 1)
            self.first, self.patch = ("double_block", 0), transformer.x_embedder.patch_size[0]
        else:
            raise ValueError(
                f"RAS works here on Flux and Stable Diffusion 3; this model is a {type(transformer).__name__}. For "
                "UNets use DeepCache, for other transformers ComfyUI's EasyCache."
            )


class _Run:
    """One sampling run: where it is, what it chose, and how often it left out tokens."""

    def __init__(self, tracker: Any, regions: Any):
        self.tracker, self.regions = tracker, regions
        self.size: torch.Size | None = None
        self.computed = self.reused = 0

    def begin(self, x: torch.Tensor, options: dict):
        """What this call computes."""
        from diffusers_ext.caching._common import Inputs

        position = self.tracker.begin(Inputs(x, float(options["sigmas"].max()), []), tuple(options["uuids"]))
        step, cache = self.tracker.run_step, position.state
        fits = cache.output is not None and x.shape[-2:] == self.size
        patch = self.regions.patch
        tokens = -(-x.shape[-2] // patch) * -(-x.shape[-1] // patch)
        index = self.regions.active(step, len(x)) if fits else None
        return self.regions.plan.call(cache, index, tokens, step)

    def observe(self, x: torch.Tensor, noise: torch.Tensor) -> None:
        """Choose the tokens of the next step."""
        self.size = x.shape[-2:]
        self.regions.observe(noise, self.tracker.run_step)


def learn(args: dict) -> torch.Tensor:
    """After guidance: let the run see the predicted noise."""
    run: _Run | None = args["model_options"]["transformer_options"].get(KEY)
    if run is not None:
        run.observe(args["input"], (args["input"] - args["denoised"]) / _like(args["sigma"], args["input"]))
    return args["denoised"]


def _like(sigma: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return sigma.view(-1, *[1] * (x.ndim - 1)).to(x)


def _tokens(image: torch.Tensor, patch: int) -> torch.Tensor:
    """[M, C, H, W] -> [M, N, C * patch * patch], padded where the size is no multiple of `patch`."""
    image = F.pad(image, (0, -image.shape[-1] % patch, 0, -image.shape[-2] % patch))
    return F.pixel_unshuffle(image, patch).flatten(2).transpose(1, 2)


def _image(tokens: torch.Tensor, like: torch.Tensor, patch: int) -> torch.Tensor:
    """The inverse of `_tokens` for an image shaped like `like`."""
    height, width = -(-like.shape[-2] // patch), -(-like.shape[-1] // patch)
    image = F.pixel_shuffle(tokens.transpose(1, 2).unflatten(2, (height, width)), patch)
    return image[..., : like.shape[-2], : like.shape[-1]]


class RegionAdaptiveSampling:
    """The wrappers of one patched MODEL. What a run remembers lives in that run's options, never here.

    Args:
        new_run: Makes the `_Run` of a number of steps.
        places: See `_Places`.
    """

    def __init__(self, new_run: Callable[[int], _Run], places: _Places):
        self.new_run, self.places = new_run, places

    def sample(self, executor, noise, latent_image, sampler, sigmas, *args, **kwargs):
        """OUTER_SAMPLE: a fresh run, gone when it ends, however it ends."""
        run = self.new_run(len(sigmas) - 1)
        try:
            with run_options(executor.class_obj, KEY, run):
                return executor(noise, latent_image, sampler, sigmas, *args, **kwargs)
        finally:
            logger.info("RAS: %d model calls in full, %d on a part of the image", run.computed, run.reused)

    def forward(self, executor, x, t, c_concat=None, context=None, control=None, transformer_options=None, **kwargs):
        """APPLY_MODEL: the transformer on the chosen tokens, the others as they were."""
        options = transformer_options or {}
        run: _Run | None = options.get(KEY)
        if run is None or options.get("uuids") is None or kwargs.get("ref_latents") is not None:
            return executor(x, t, c_concat, context, control, options, **kwargs)
        call = run.begin(x, options)
        control, options = self._control(control, call), self._patched(options, call)
        denoised = executor(x, t, c_concat, context, control, options, **kwargs)
        noise = (x - denoised) / _like(t, x)
        whole = call.complete(call.gather(_tokens(noise, self.places.patch)))
        run.computed += call.index is None
        run.reused += call.index is not None
        return denoised if call.index is None else x - _like(t, x) * _image(whole, x, self.places.patch)

    def _control(self, control: dict | None, call: Any) -> dict | None:
        """Residuals of the computed tokens; those after the last block meet all tokens again."""
        if control is None or call.index is None:
            return control
        whole = ("output", self.places.last[1])
        return {
            kind: [r if r is None or (kind, i) == whole else call.gather(r) for i, r in enumerate(residuals)]
            for kind, residuals in control.items()
        }

    def _patched(self, options: dict, call: Any) -> dict:
        """Options with our patches around those of other nodes."""
        options = {**options, "optimized_attention_override": _attention(call, options)}
        if call.index is None:
            return options
        replaced, patches = options.get("patches_replace", {}), options.get("patches", {})
        theirs = replaced.get("dit", {})
        ours = {self.places.last: _outgoing(call, theirs.get(self.places.last))}
        if self.places.first is None:
            patches = {**patches, "post_input": [*patches.get("post_input", []), _incoming_input(call)]}
        else:
            inner = ours.get(self.places.first, theirs.get(self.places.first))
            ours[self.places.first] = _incoming_block(call, inner)
        return {**options, "patches": patches, "patches_replace": {**replaced, "dit": {**theirs, **ours}}}


def _attention(call: Any, options: dict) -> Callable:
    """Attention whose queries see the keys and values of all tokens."""
    inner, layers = options.get("optimized_attention_override"), itertools.count()

    def attention(func, q, k, v, *args, mask=None, **kwargs):
        if q.ndim == 3:  # Stable Diffusion 3 keeps the heads of the values apart, and only theirs
            v = v.flatten(2)
        k, v = call.keys_values(next(layers), k, v, image_first=False)
        if mask is not None and mask.shape[-1] != k.shape[-2]:
            raise ValueError("RAS does not know how to extend an attention mask over the tokens it leaves out")
        return inner(func, q, k, v, *args, mask=mask, **kwargs) if inner else func(q, k, v, *args, mask=mask, **kwargs)

    return attention


def _incoming_input(call: Any) -> Callable:
    """Flux: the chosen tokens, with their positions."""

    def patch(args: dict) -> dict:
        image = {name: call.gather(args[name]) for name in ("img", "img_ids")}
        return {**args, **image, **{name: call.gather_text(args[name]) for name in ("txt", "txt_ids")}}

    return patch


def _run_block(args: dict, extra: dict, inner: Callable | None) -> dict:
    return inner(args, extra) if inner else extra["original_block"](args)


def _incoming_block(call: Any, inner: Callable | None) -> Callable:
    """Stable Diffusion 3: the chosen tokens, positions included, enter the first block."""

    def patch(args: dict, extra: dict) -> dict:
        tokens = {"img": call.gather(args["img"]), "txt": call.gather_text(args["txt"])}
        return _run_block({**args, **tokens}, extra, inner)

    return patch


def _outgoing(call: Any, inner: Callable | None) -> Callable:
    """The last block hands on all tokens, the others empty: their noise is put in place afterwards."""

    def patch(args: dict, extra: dict) -> dict:
        out = _run_block(args, extra, inner)
        tokens = out["img"]
        words = tokens.shape[1] - call.index.shape[1]
        empty = tokens.new_zeros(len(tokens), call.tokens, tokens.shape[2])
        index = call.index[..., None].expand(-1, -1, tokens.shape[2])
        return {**out, "img": torch.cat([tokens[:, :words], empty.scatter(1, index, tokens[:, words:])], 1)}

    return patch


class DXRegionAdaptiveSampling(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="DXRegionAdaptiveSampling",
            display_name="Region-Adaptive Sampling (Flux, SD3)",
            category="diffusers-ext/caching",
            description="After the first steps, computes only the parts of the image that need it most; the rest "
            "keeps the noise predicted before. The cost of such a step falls with the share of the image it computes.",
            search_aliases=["ras", "region adaptive", "token skipping", "speed up", "faster", "flux", "diffusers-ext"],
            inputs=[
                io.Model.Input("model", tooltip="A Flux or Stable Diffusion 3 model. LoRA and control keep working."),
                io.Float.Input(
                    "ratio",
                    default=0.25,
                    min=0.05,
                    max=1.0,
                    step=0.05,
                    tooltip="Share of the image that a cheap step computes. 1 changes nothing.",
                ),
                io.Int.Input(
                    "start_step", default=4, min=1, max=1000, tooltip="First step that computes only a part."
                ),
                io.Int.Input(
                    "end_step", default=1000, min=1, max=1000, tooltip="Last step that does; 1000 means the last one."
                ),
                io.String.Input(
                    "reset_steps",
                    default="",
                    tooltip="Steps in between that compute everything, as in 12, 22. Empty takes 40 and 73 percent of "
                    "the run.",
                ),
                io.Combo.Input(
                    "metric",
                    options=["std", "l2norm"],
                    tooltip="How busy the predicted noise of a place is: its spread or its size over the channels.",
                ),
                io.Float.Input(
                    "high_ratio",
                    default=1.0,
                    min=0.0,
                    max=1.0,
                    step=0.05,
                    tooltip="Share of the left-out places taken from the busiest, the rest from the calmest.",
                ),
                io.Float.Input(
                    "starvation",
                    default=3.0,
                    min=0.0,
                    max=10.0,
                    step=0.05,
                    tooltip="How strongly a place that was left out is preferred next time; from about 2 on, places "
                    "take turns.",
                ),
                forecast_input(largest=1),
                io.Boolean.Input(
                    "reuse_text",
                    default=False,
                    optional=True,
                    tooltip="Cheap steps leave out the text tokens too: they cost less, at hardly any difference in "
                    "the picture. Off computes them at every step, as in the paper.",
                ),
            ],
            outputs=[io.Model.Output(tooltip="The model with RAS. Works with every sampler node.")],
        )

    @classmethod
    def execute(
        cls,
        model,
        ratio,
        start_step,
        end_step,
        reset_steps,
        metric,
        high_ratio,
        starvation,
        forecast_order=0,
        reuse_text=False,
    ) -> io.NodeOutput:
        from diffusers_ext.caching.ras import RASConfig

        places, resets = _Places(model), _steps(reset_steps)
        more = {"forecast_order": forecast_order, "reuse_text": reuse_text}
        config = RASConfig(ratio, start_step, end_step, resets, metric, high_ratio, starvation, **more)
        cache = RegionAdaptiveSampling(lambda steps: _new_run(config, steps, places.patch), places)
        patched = model.clone()
        for kind, wrapper in ((WrappersMP.OUTER_SAMPLE, cache.sample), (WrappersMP.APPLY_MODEL, cache.forward)):
            patched.remove_wrappers_with_key(kind, KEY)
            patched.add_wrapper_with_key(kind, KEY, wrapper)
        patched.set_model_sampler_post_cfg_function(learn)
        return io.NodeOutput(patched)


def _steps(text: str) -> list[int] | None:
    """Whole numbers between commas; None where there is nothing."""
    parts = [part.strip() for part in text.split(",") if part.strip()]
    if not all(part.isdecimal() for part in parts):
        raise ValueError(f"reset_steps is {text!r}; accepted: whole numbers between commas, such as 12, 22")
    return [int(part) for part in parts] or None


def _new_run(config: Any, steps: int, patch: int) -> _Run:
    from diffusers_ext.caching._common import RunTracker
    from diffusers_ext.caching.ras_tokens import Cache

    return _Run(RunTracker(Cache), config.regions(steps, patch))


NODES = [DXRegionAdaptiveSampling]
