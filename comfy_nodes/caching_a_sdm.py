"""A-SDM as MODEL patches: parts of a UNet that inherit their features, and another model from some step on."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from comfy.ldm.modules.attention import BasicTransformerBlock, SpatialTransformer
from comfy.ldm.modules.diffusionmodules.openaimodel import Downsample, ResBlock, UNetModel, Upsample
from comfy.patcher_extension import WrappersMP, copy_nested_dicts
from comfy_api.latest import io

from ._inputs import forecast_input
from ._runs import run_options, standing_in


KEY = "diffusers_ext.a-sdm"
SWITCH = "diffusers_ext.a-sdm.switch"
OF_A_CALL = ("cond_or_uncond", "uuids", "sigmas", "sample_sigmas")
logger = logging.getLogger(__name__)


def _is_sampler(module: torch.nn.Module) -> bool:
    return isinstance(module, (Downsample, Upsample)) or (isinstance(module, ResBlock) and module.updown)


def _layer(block: str, index: int, modules: Any) -> dict[str, torch.nn.Module]:
    """Parts of one entry of a UNet's block list, under the names that they have in diffusers."""
    parts = {}
    for module in modules:
        if _is_sampler(module):
            parts[f"{block}.{'down' if block.startswith('down') else 'up'}samplers.0"] = module
        elif isinstance(module, ResBlock):
            parts[f"{block}.resnets.{index}"] = module
        elif isinstance(module, SpatialTransformer):
            parts[f"{block}.attentions.{index}"] = module
    return parts


def parts_of(unet: UNetModel) -> dict[str, torch.nn.Module]:
    """Resnets, attentions and samplers of a UNet in running order, under the names that they have in diffusers."""
    parts: dict[str, torch.nn.Module] = {}
    for side, entries in (("down_blocks", unet.input_blocks[1:]), ("up_blocks", unet.output_blocks)):
        block = layer = 0
        for modules in entries:
            found = _layer(f"{side}.{block}", layer, modules)
            parts.update(found)
            ends = any("samplers" in name for name in found)
            block, layer = (block + 1, 0) if ends else (block, layer + 1)
        if side == "down_blocks" and unet.middle_block is not None:
            parts.update(_middle(unet.middle_block))
    return parts


def _middle(modules: Any) -> dict[str, torch.nn.Module]:
    resnets = [m for m in modules if isinstance(m, ResBlock)]
    attentions = [m for m in modules if isinstance(m, SpatialTransformer)]
    return {f"mid_block.resnets.{j}": m for j, m in enumerate(resnets)} | {
        f"mid_block.attentions.{j}": m for j, m in enumerate(attentions)
    }


def _units_of(parts: dict[str, torch.nn.Module]) -> dict[str, torch.nn.Module]:
    """Everything in the parts that adds a branch to its input, or gives one."""
    units = {}
    for name, module in parts.items():
        if type(module) is ResBlock and not module.updown:
            units[name] = module
        elif isinstance(module, SpatialTransformer):
            units[name] = module
            for k, inner in enumerate(module.transformer_blocks):
                units[f"{name}.transformer_blocks.{k}"] = inner
                places = {part: getattr(inner, part, None) for part in ("attn1", "attn2", "ff")}
                units |= {f"{name}.transformer_blocks.{k}.{p}": m for p, m in places.items() if m is not None}
    return units


def select(unet: UNetModel, config: Any) -> dict[str, torch.nn.Module]:
    """The modules that inherit, by name, as `FeatureInheritanceConfig` means it on the diffusers side."""
    from diffusers_ext.caching._a_sdm_modules import deep_blocks, layer_parts, unit_names

    parts = parts_of(unet)
    blocks = list(dict.fromkeys(".".join(name.split(".")[: 1 + (not name.startswith("mid"))]) for name in parts))
    wanted = config.modules
    if wanted == "deep":
        count = sum(name.startswith("down") for name in blocks)
        attends = [any(name.startswith(f"down_blocks.{i}.attentions") for name in parts) for i in range(count)]
        wanted = deep_blocks(attends, "mid_block" in blocks)
    if config.granularity == "unit":
        known = parts | _units_of(parts)
        return {name: known[name] for name in unit_names(wanted, [*blocks, *known], _units_of(parts))}
    if config.granularity == "block" and set(wanted) - set(blocks):
        raise ValueError(f"{sorted(set(wanted) - set(blocks))} are no blocks of this UNet: it has {', '.join(blocks)}")
    return {name: parts[name] for name in layer_parts(wanted, parts)}


def _live_part(module: torch.nn.Module) -> Callable[[torch.Tensor], torch.Tensor] | None:
    """What the output of a unit takes straight from its input; None where the output is the branch alone."""
    if isinstance(module, ResBlock):
        return module.skip_connection
    return (lambda x: x) if isinstance(module, (SpatialTransformer, BasicTransformerBlock)) else None


@dataclass
class Call:
    """What one call of the UNet does: inherit from `features`, or fill them; None to do neither."""

    step: int
    features: dict[str, torch.Tensor] | None
    inherits: bool = False

    def forward(self, name: str, module: torch.nn.Module, unit: bool) -> Callable:
        """Stands in for a module. Copies both ways, as control and patches write in place."""
        original, live = module.forward, _live_part(module) if unit else None

        def run(x, *args, **kwargs):
            if self.inherits and name in self.features:
                stored = self.features[name]
                return stored.clone() if live is None else live(x) + stored
            output = original(x, *args, **kwargs)
            if not self.inherits:
                self.features[name] = (output if live is None else output - live(x)).detach().clone()
            return output

        return run


class _Run:
    """One sampling run: its time mask, where it is, which part of it may inherit, and how often it did.

    Of every kind of call the tracker keeps the `History` of its features by module name.
    """

    def __init__(self, tracker: Any, mask: list[int], start_sigma: float, end_sigma: float):
        self.tracker, self.mask, self.start_sigma, self.end_sigma = tracker, mask, start_sigma, end_sigma
        self.computed = self.reused = 0

    def begin(self, x: torch.Tensor, options: dict) -> tuple[Any, Call] | None:
        """What to do with a call, and where its features stay; None where inheritance is off."""
        from diffusers_ext.caching._common import Inputs
        from diffusers_ext.caching.a_sdm import is_computed

        sigma, uuids = float(options["sigmas"].max()), options.get("uuids")
        if uuids is None or not self.end_sigma < sigma <= self.start_sigma:
            return None
        position = self.tracker.begin(Inputs(x, sigma, []), tuple(uuids))
        step, history = position.step, position.state
        if history.kept and not is_computed(self.mask, step):
            return history, Call(step, history.at(step), inherits=True)
        needed = history.order or not is_computed(self.mask, step + 1)
        return history, Call(step, {} if needed else None)

    def end(self, history: Any, call: Call) -> None:
        """The call succeeded."""
        self.reused += call.inherits
        self.computed += not call.inherits
        if not call.inherits:
            if call.features:
                history.add(call.step, call.features)
            else:
                history.kept.clear()


class FeatureInheritance:
    """The wrappers of one patched MODEL. What a run remembers lives in that run's options, never here.

    Args:
        config: `FeatureInheritanceConfig`.
        modules: What inherits, see `select`.
        start_percent, end_percent: Part of the run that may inherit.
    """

    def __init__(self, config: Any, modules: dict[str, torch.nn.Module], start_percent: float, end_percent: float):
        self.config, self.modules = config, modules
        self.start_percent, self.end_percent = start_percent, end_percent

    def on(self, model: Any) -> Any:
        """A clone of a MODEL with this patch; one that is there already is replaced."""
        patched = model.clone()
        for kind, wrapper in ((WrappersMP.OUTER_SAMPLE, self.sample), (WrappersMP.DIFFUSION_MODEL, self.forward)):
            patched.remove_wrappers_with_key(kind, KEY)
            patched.add_wrapper_with_key(kind, KEY, wrapper)
        return patched

    def sample(self, executor, noise, latent_image, sampler, sigmas, *args, **kwargs):
        """OUTER_SAMPLE: a fresh run, gone when it ends, however it ends."""
        from diffusers_ext.caching._common import RunTracker
        from diffusers_ext.caching._forecast import History

        guider = executor.class_obj
        sampling = guider.model_patcher.get_model_object("model_sampling")
        start, end = sampling.percent_to_sigma(self.start_percent), sampling.percent_to_sigma(self.end_percent)
        steps = sum(end < sigma <= start for sigma in sigmas[:-1].tolist())
        tracker = RunTracker(lambda: History(self.config.forecast_order))
        run = _Run(tracker, self.config.mask(steps), start, end)
        try:
            with run_options(guider, KEY, run):
                return executor(noise, latent_image, sampler, sigmas, *args, **kwargs)
        finally:
            logger.info("A-SDM: %d UNet calls in full, %d with inherited features", run.computed, run.reused)

    def forward(
        self, executor, x, timesteps=None, context=None, y=None, control=None, transformer_options=None, **kwargs
    ):
        """DIFFUSION_MODEL: the UNet, with the chosen modules asked first whether they must run."""
        options = transformer_options or {}
        run: _Run | None = options.get(KEY)
        found = run.begin(x, options) if run else None
        if found is None:
            return executor(x, timesteps, context, y, control, options, **kwargs)
        history, call = found
        unit = self.config.granularity == "unit"
        watched = self.modules.items() if call.features is not None else ()
        with standing_in([(module, call.forward(name, module, unit)) for name, module in watched]):
            output = executor(x, timesteps, context, y, control, options, **kwargs)
        run.end(history, call)
        return output


def _percent(name: str, default: float, tooltip: str) -> io.Float.Input:
    return io.Float.Input(name, default=default, min=0.0, max=1.0, step=0.01, tooltip=tooltip)


class DXFeatureInheritance(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="DXFeatureInheritance",
            display_name="Feature Inheritance (A-SDM, UNet)",
            category="diffusers-ext/caching",
            description="On some steps the deep blocks of a UNet, or any others, do not run: they give the features "
            "of the last computed step. Stable Diffusion 1, 2, XL.",
            search_aliases=["a-sdm", "asdm", "feature inheritance", "speed up", "feature cache", "diffusers-ext"],
            inputs=[
                io.Model.Input("model", tooltip="A UNet model. LoRA, ControlNet and other patches keep working."),
                io.Combo.Input(
                    "preset",
                    options=["deep", "custom"],
                    tooltip="deep: the redundant blocks around the middle. custom: what modules names.",
                ),
                io.Combo.Input(
                    "granularity",
                    options=["block", "layer", "unit"],
                    tooltip="block and layer: outputs are inherited. unit: the branches of resnets and attentions "
                    "are, and added to the live features, which saves less.",
                ),
                io.Int.Input(
                    "interval",
                    default=2,
                    min=1,
                    max=100,
                    tooltip="Every interval-th step is computed, the others inherit. 1 changes nothing.",
                ),
                io.Combo.Input(
                    "mode",
                    options=["uniform", "early_dense", "late_dense", "both_dense", "random"],
                    tooltip="Where all steps are computed: nowhere, at the beginning, at the end or at both. random: "
                    "as many as uniform, drawn at random.",
                ),
                _percent("dense_fraction", 0.2, "Share of the run that the dense modes compute in full."),
                _percent("start_percent", 0.0, "Steps before this part of the run are computed in full."),
                _percent("end_percent", 1.0, "Steps after this part of the run are computed in full."),
                io.String.Input(
                    "modules",
                    default="",
                    optional=True,
                    tooltip="For custom: names as in diffusers, separated by commas, e.g. mid_block, up_blocks.0, "
                    "up_blocks.1.attentions.0.",
                ),
                forecast_input(),
            ],
            outputs=[io.Model.Output(tooltip="The model with feature inheritance. Works with every sampler node.")],
        )

    @classmethod
    def execute(
        cls,
        model,
        preset,
        granularity,
        interval,
        mode,
        dense_fraction,
        start_percent,
        end_percent,
        modules="",
        forecast_order=0,
    ) -> io.NodeOutput:
        from diffusers_ext.caching.a_sdm import FeatureInheritanceConfig

        unet = model.model.diffusion_model
        if not isinstance(unet, UNetModel):
            raise ValueError(
                f"feature inheritance needs a UNet (Stable Diffusion 1, 2, XL); this model is a {type(unet).__name__}"
                ". For other models use ComfyUI's EasyCache."
            )
        names = preset if preset == "deep" else [name.strip() for name in modules.split(",") if name.strip()]
        config = FeatureInheritanceConfig(
            names, granularity, interval, mode, dense_fraction, forecast_order=forecast_order
        )
        return io.NodeOutput(FeatureInheritance(config, select(unet, config), start_percent, end_percent).on(model))


class ModelSwitch:
    """The wrapper of a MODEL that hands calls to another one from some noise level on, with that one's own patches.

    Args:
        other: The other MODEL.
        sigma: Noise level from which it runs.
    """

    def __init__(self, other: Any, sigma: float):
        self.other, self.sigma = other, sigma

    def forward(self, executor, x, t, c_concat=None, context=None, control=None, transformer_options=None, **kwargs):
        """APPLY_MODEL."""
        options = transformer_options or {}
        if float(t.max()) > self.sigma:
            return executor(x, t, c_concat, context, control, options, **kwargs)
        own = copy_nested_dicts(self.other.model_options.get("transformer_options", {}))
        own.update({name: options[name] for name in OF_A_CALL if name in options})
        return self.other.model.apply_model(x, t, c_concat, context, control, own, **kwargs)


def _refuse_other_shapes(model_a: Any, model_b: Any) -> None:
    """Raise `ValueError` where the two cannot take turns on the same latents and prompts."""
    for name in ("in_channels", "context_dim", "adm_in_channels"):
        sizes = [m.model.model_config.unet_config.get(name) for m in (model_a, model_b)]
        if sizes[0] != sizes[1]:
            raise ValueError(f"{name} of model_a is {sizes[0]}, of model_b {sizes[1]}: they cannot share one run")
    channels = [m.model.latent_format.latent_channels for m in (model_a, model_b)]
    if channels[0] != channels[1]:
        raise ValueError(
            f"model_a has {channels[0]} latent channels, model_b {channels[1]}: they cannot share one run"
        )
    if model_a.is_clone(model_b) and model_a.patches_uuid != model_b.patches_uuid:
        raise ValueError(
            "model_a and model_b patch the weights of one loaded model in different ways, which can only be in memory "
            "once: load the checkpoint a second time for model_b"
        )


class DXMultiModelSwitch(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="DXMultiModelSwitch",
            display_name="Multi-Model Switch",
            category="diffusers-ext/caching",
            description="One model that is model_a at the beginning of the run and model_b after: a large UNet where "
            "the picture is decided, a light one for the rest, or any two of one latent space.",
            search_aliases=["a-sdm", "multi-unet", "model switch", "refiner", "speed up", "diffusers-ext"],
            inputs=[
                io.Model.Input("model_a", tooltip="Runs first. Its noise schedule and prompt encoding count."),
                io.Model.Input("model_b", tooltip="Runs after, with its own LoRA and patches."),
                _percent("switch_percent", 0.5, "Part of the run after which model_b takes over. 1: never."),
            ],
            outputs=[io.Model.Output(tooltip="A model for every sampler node.")],
        )

    @classmethod
    def execute(cls, model_a, model_b, switch_percent: float) -> io.NodeOutput:
        _refuse_other_shapes(model_a, model_b)
        patched = model_a.clone()
        sigma = patched.get_model_object("model_sampling").percent_to_sigma(switch_percent)
        patched.remove_wrappers_with_key(WrappersMP.APPLY_MODEL, SWITCH)
        patched.add_wrapper_with_key(WrappersMP.APPLY_MODEL, SWITCH, ModelSwitch(model_b, sigma).forward)
        patched.set_additional_models(SWITCH, [] if model_a.is_clone(model_b) else [model_b])
        return io.NodeOutput(patched)


NODES = [DXFeatureInheritance, DXMultiModelSwitch]
