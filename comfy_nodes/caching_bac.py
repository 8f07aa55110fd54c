"""BAC as a MODEL patch: attentions and feed-forwards inside of transformer blocks run only at steps of their own."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import comfy.model_management
import comfy.sample
import comfy.samplers
import comfy.utils
import torch
from comfy.ldm.flux.model import Flux
from comfy.ldm.modules.diffusionmodules.mmdit import MMDiT
from comfy.patcher_extension import WrappersMP
from comfy_api.latest import io

from ._files import SavedFiles, check_name
from ._inputs import forecast_input, name_input, seed_input
from ._runs import run_options, standing_in


SCHEDULE = io.Custom("DX_BAC_SCHEDULE")
FILES = SavedFiles("bac", ".json", "BAC schedule")
EVEN = "equal distances"
KEY = "diffusers_ext.bac"
ATTENTION_PATCHES = ("attn1_patch", "attn1_output_patch")
logger = logging.getLogger(__name__)


class Part(NamedTuple):
    """A sub-block, under the name that it has in diffusers.

    Where it is reused, `inputs` give one empty token in place of their output, and attention over those tokens costs
    nothing; `outputs` then give what they gave before.
    """

    name: str
    kind: str
    outputs: tuple[torch.nn.Module, ...]
    inputs: tuple[torch.nn.Module, ...] = ()


Places = dict[tuple[str, int], list[Part]]


def places_of(model: Any) -> Places:
    """The sub-blocks of each block, in running order, by where ComfyUI lets the block be replaced."""
    transformer = model.model.diffusion_model
    if isinstance(transformer, Flux):
        double = {("double_block", i): _flux_double(i, b) for i, b in enumerate(transformer.double_blocks)}
        return double | {("single_block", i): _flux_single(i, b) for i, b in enumerate(transformer.single_blocks)}
    if isinstance(transformer, MMDiT):
        return {("double_block", i): list(_joint(i, b)) for i, b in enumerate(transformer.joint_blocks)}
    raise ValueError(
        f"BAC works here on Flux and Stable Diffusion 3; this model is a {type(transformer).__name__}. For UNets use "
        "DeepCache, for other transformers ComfyUI's EasyCache."
    )


def _flux_double(index: int, block: Any) -> list[Part]:
    name, img, txt = f"transformer_blocks.{index}", block.img_attn, block.txt_attn
    return [
        Part(f"{name}.attn", "attention", (img.proj, txt.proj), (img.qkv, txt.qkv)),
        Part(f"{name}.ff", "ffn", (block.img_mlp,)),
        Part(f"{name}.ff_context", "ffn", (block.txt_mlp,)),
    ]


def _flux_single(index: int, block: Any) -> list[Part]:
    return [Part(f"single_transformer_blocks.{index}", "block", (block.linear2,), (block.linear1,))]


def _joint(index: int, block: Any) -> Iterator[Part]:
    name, x, context = f"transformer_blocks.{index}", block.x_block, block.context_block
    outputs = (x.attn.proj,) if context.pre_only else (x.attn.proj, context.attn.proj)
    yield Part(f"{name}.attn", "attention", outputs, (x.attn.qkv, context.attn.qkv))
    if x.x_block_self_attn:
        yield Part(f"{name}.attn2", "attention", (x.attn2.proj,), (x.attn2.qkv,))
    yield Part(f"{name}.ff", "ffn", (x.mlp,))
    if not context.pre_only:
        yield Part(f"{name}.ff_context", "ffn", (context.mlp,))


def kinds_of(places: Places) -> dict[str, str]:
    """Kind of each sub-block by name."""
    return {part.name: part.kind for parts in places.values() for part in parts}


def _one_token(module: torch.nn.Module) -> Callable:
    return lambda x: x.new_zeros(x.shape[0], 1, module.out_features)


def _output(call: Any, name: str, forward: Callable) -> Callable:
    """Flux multiplies in place where reference images are in play: what is stored is never handed out itself."""

    def run(*args, **kwargs):
        if name in call.reused:
            return call.recall(name).clone()
        output = forward(*args, **kwargs)
        call.keep(name, output)
        return output.clone() if name in call.kept else output

    return run


def _forwards(call: Any, parts: list[Part]) -> list[tuple[torch.nn.Module, Callable]]:
    """Our forward of each module of a block."""
    ours = [(m, _output(call, part.name, m.forward)) for part in parts for m in part.outputs]
    return ours + [(m, _one_token(m)) for part in parts if part.name in call.reused for m in part.inputs]


def _block_patch(call: Any, parts: list[Part], inner: Callable | None) -> Callable:
    """Patch of one block, in the form ComfyUI calls it."""

    def patch(args: dict, extra: dict) -> dict:
        if any(part.name in call.reused for part in parts if part.inputs):
            args = _without_attention(args)
        with standing_in(_forwards(call, parts)):
            return inner(args, extra) if inner else extra["original_block"](args)

    return patch


def _without_attention(args: dict) -> dict:
    """Positions, masks and patches of an attention over two empty tokens: none."""
    options = args["transformer_options"]
    patches = {kind: p for kind, p in options.get("patches", {}).items() if kind not in ATTENTION_PATCHES}
    return {**args, "pe": None, "attn_mask": None, "transformer_options": {**options, "patches": patches}}


class _Run:
    """One sampling run: where it is, and how often it reused.

    Args:
        source: `Plan`, or the `Recorder` of a calibration.
        new_kind: Makes the state of a kind of call.
        sigmas: Of the run.
    """

    def __init__(self, source: Any, new_kind: Callable, sigmas: torch.Tensor):
        from diffusers_ext.caching._common import RunTracker

        self.source, self.tracker = source, RunTracker(new_kind)
        self.sigmas = sigmas.tolist()
        self.computed = self.reused = 0

    def begin(self, x: torch.Tensor, options: dict) -> Any:
        """What to do with this call."""
        from diffusers_ext.caching._common import Inputs

        sigma = float(options["sigmas"].max())
        position = self.tracker.begin(Inputs(x, sigma, []), tuple(options["uuids"]))
        return self.source.begin(position.state, self.step_of(sigma))

    def step_of(self, sigma: float) -> int:
        """Step of the run at a noise level; those between two of the run belong to the step before."""
        return max(sum(s >= sigma * (1 - 1e-5) for s in self.sigmas[:-1]) - 1, 0)

    def end(self, call: Any) -> None:
        """The call succeeded."""
        call.end()
        self.reused += bool(call.reused)
        self.computed += not call.reused


class BlockCache:
    """The wrappers of one patched MODEL. What a run remembers lives in that run's options, never here.

    Args:
        new_run: Makes the `_Run` of a sampling run from its sigmas.
        places: See `places_of`.
    """

    def __init__(self, new_run: Callable[[torch.Tensor], _Run], places: Places):
        self.new_run, self.places = new_run, places

    def on(self, model: Any) -> Any:
        """A clone of a MODEL with this cache; one that is there already is replaced."""
        patched = model.clone()
        for kind, wrapper in ((WrappersMP.OUTER_SAMPLE, self.sample), (WrappersMP.APPLY_MODEL, self.forward)):
            patched.remove_wrappers_with_key(kind, KEY)
            patched.add_wrapper_with_key(kind, KEY, wrapper)
        return patched

    def sample(self, executor, noise, latent_image, sampler, sigmas, *args, **kwargs):
        """OUTER_SAMPLE: a fresh run, gone when it ends, however it ends."""
        run = self.new_run(sigmas)
        try:
            with run_options(executor.class_obj, KEY, run):
                return executor(noise, latent_image, sampler, sigmas, *args, **kwargs)
        finally:
            logger.info("BAC: %d model calls in full, %d with sub-blocks reused", run.computed, run.reused)

    def forward(self, executor, x, t, c_concat=None, context=None, control=None, transformer_options=None, **kwargs):
        """APPLY_MODEL: the transformer with every block asking first which of its parts must run."""
        options = transformer_options or {}
        run: _Run | None = options.get(KEY)
        if run is None or options.get("uuids") is None:
            return executor(x, t, c_concat, context, control, options, **kwargs)
        call = run.begin(x, options)
        output = executor(x, t, c_concat, context, control, self.patched(options, call), **kwargs)
        run.end(call)
        return output

    def patched(self, options: dict, call: Any) -> dict:
        """Options whose block patches are ours, around those of other nodes."""
        replaced = options.get("patches_replace", {})
        theirs = replaced.get("dit", {})
        ours = {place: _block_patch(call, parts, theirs.get(place)) for place, parts in self.places.items()}
        return {**options, "patches_replace": {**replaced, "dit": {**theirs, **ours}}}


def _measure(model, positive, negative, cfg, latent, sampler, sigmas, metric, seed):
    """Statistics of one sampling run of the latents, with ComfyUI's progress bar and interruption."""
    from diffusers_ext.caching._bac_calls import Recorder
    from diffusers_ext.caching.bac_calibration import MAX_ELEMENTS, BACStatistics

    places = places_of(model)
    recorder, bar = Recorder(metric, MAX_ELEMENTS, seed), comfy.utils.ProgressBar(len(sigmas) - 1)
    recording = BlockCache(lambda sigmas: _Run(recorder, recorder.new_kind, sigmas), places).on(model)

    def on_step(*_) -> None:
        bar.update(1)
        comfy.model_management.throw_exception_if_processing_interrupted()

    guider = comfy.samplers.CFGGuider(recording)
    guider.set_conds(positive, negative)
    guider.set_cfg(cfg)
    start = comfy.sample.fix_empty_latent_channels(model, latent["samples"])
    noise = comfy.sample.prepare_noise(start, seed)
    guider.sample(noise, start, sampler, sigmas, callback=on_step, disable_pbar=True, seed=seed)
    recorder.end_run()
    origin = {"model_class": type(model.model.diffusion_model).__name__, "metric": metric}
    return BACStatistics.of(recorder, kinds_of(places), origin)


class DXBACCalibrate(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="DXBACCalibrate",
            display_name="BAC Calibrate (Flux, SD3)",
            category="diffusers-ext/caching",
            description="Samples once in full, measures how fast every attention and feed-forward changes, and "
            "chooses the steps at which each is recomputed. Saved as output/bac/<name>.json.",
            search_aliases=["bac", "block-wise adaptive caching", "calibrate", "cache schedule", "diffusers-ext"],
            inputs=[
                io.Model.Input("model", tooltip="A Flux or Stable Diffusion 3 model without another cache."),
                io.Conditioning.Input("positive", tooltip="A typical prompt."),
                io.Conditioning.Input("negative", tooltip="Negative prompt."),
                io.Float.Input(
                    "cfg", default=1.0, min=0.0, max=100.0, step=0.1, tooltip="The cfg you will sample with."
                ),
                io.Latent.Input("latent", tooltip="Empty latents of the size you sample; 2 to 8 of them."),
                io.Sampler.Input("sampler", tooltip="The sampler you will use."),
                io.Sigmas.Input("sigmas", tooltip="The noise levels you will use: a schedule is for their number."),
                io.Int.Input(
                    "updates",
                    default=8,
                    min=2,
                    max=1000,
                    tooltip="How often each part is recomputed, at most once per step. A third of the steps is usual.",
                ),
                io.Combo.Input(
                    "metric",
                    options=["cosine", "mse", "l1", "l2"],
                    tooltip="How outputs of two steps are compared: by direction, or by distance.",
                    advanced=True,
                ),
                io.Boolean.Input(
                    "shared",
                    default=True,
                    tooltip="One list of steps for all parts, which kept pictures closer where it was measured. Off: "
                    "each part has its own, as in the paper.",
                ),
                io.Int.Input(
                    "bua_blocks",
                    default=5,
                    min=0,
                    max=500,
                    tooltip="With shared off: this many volatile feed-forwards are also recomputed whenever a later "
                    "one is.",
                ),
                seed_input("Seed of the noise."),
                name_input(),
            ],
            outputs=[SCHEDULE.Output(display_name="schedule", tooltip="For BAC Apply.")],
        )

    @classmethod
    def validate_inputs(cls, name):
        """Only a plain file name: nothing is written outside the output folder."""
        return check_name(name)

    @classmethod
    def execute(
        cls, model, positive, negative, cfg, latent, sampler, sigmas, updates, metric, shared, bua_blocks, seed, name
    ) -> io.NodeOutput:
        path = FILES.new(name)
        if updates > len(sigmas) - 1:
            raise ValueError(f"updates is {updates}; {len(sigmas) - 1} steps accept 2 to {len(sigmas) - 1}")
        measured = _measure(model, positive, negative, cfg, latent, sampler, sigmas, metric, seed)
        config = measured.config(updates, bua_blocks, shared=shared)
        config.save(path)
        return io.NodeOutput(config)


class DXBACApply(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="DXBACApply",
            display_name="BAC Apply (Flux, SD3)",
            category="diffusers-ext/caching",
            description="Recomputes every attention and feed-forward only at the steps of its schedule; in between, "
            "its last output is reused.",
            search_aliases=[
                "bac",
                "block-wise adaptive caching",
                "block cache",
                "speed up",
                "faster",
                "diffusers-ext",
            ],
            inputs=[
                io.Model.Input("model", tooltip="A Flux or Stable Diffusion 3 model. LoRA and control keep working."),
                io.Combo.Input(
                    "file",
                    options=[EVEN, *FILES.by_name()],
                    tooltip="A schedule of models/bac or output/bac, or steps at equal distances without calibration; "
                    "not used if schedule is connected.",
                ),
                io.Int.Input(
                    "updates",
                    default=8,
                    min=2,
                    max=1000,
                    tooltip="Recomputed steps at equal distances; not used with a schedule.",
                ),
                io.Boolean.Input(
                    "rescale",
                    default=False,
                    tooltip="Stretch the schedule to another number of steps instead of refusing it.",
                ),
                SCHEDULE.Input("schedule", optional=True, tooltip="Result of BAC Calibrate, instead of a file."),
                forecast_input(),
            ],
            outputs=[io.Model.Output(tooltip="The model with BAC. Works with every sampler node.")],
        )

    @classmethod
    def execute(cls, model, file, updates, rescale, schedule=None, forecast_order=0) -> io.NodeOutput:
        places = places_of(model)
        names = kinds_of(places)
        config = _config(file, updates, rescale, schedule, forecast_order)
        config.schedule_for(names, config.num_inference_steps or updates)  # refuses the schedule of another model
        return io.NodeOutput(BlockCache(lambda sigmas: _new_run(config, names, sigmas), places).on(model))


def _config(file: str, updates: int, rescale: bool, schedule: Any, forecast_order: float) -> Any:
    from dataclasses import replace

    from diffusers_ext.caching.bac import BACConfig

    if schedule is None:
        schedule = BACConfig(num_updates=updates) if file == EVEN else BACConfig.load(FILES.find(file))
    return replace(schedule, rescale=rescale, forecast_order=forecast_order)


def _new_run(config: Any, names: dict[str, str], sigmas: torch.Tensor) -> _Run:
    from diffusers_ext.caching._bac_calls import Plan

    total = len(sigmas) - 1
    return _Run(Plan.of(config.schedule_for(names, total), total, config.forecast_order), dict, sigmas)


NODES = [DXBACCalibrate, DXBACApply]
