"""HiDiffusion as MODEL patches."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from comfy.ldm.modules.attention import SpatialTransformer
from comfy.ldm.modules.diffusionmodules.openaimodel import Downsample, UNetModel
from comfy.patcher_extension import WrappersMP
from comfy_api.latest import io


KEY = "diffusers_ext.hidiffusion"


@dataclass(frozen=True)
class Layout:
    """Where the levels of a UNet are in ComfyUI's lists of blocks.

    Args:
        downs: Index of each level's downsampler in `input_blocks`.
        pairs: Indices of each level's pairs of layers in `input_blocks`.
        outputs: Indices of each level's blocks in `output_blocks`.
        attends: Which levels have attention.
    """

    downs: list[int]
    pairs: list[list[int]]
    outputs: list[list[int]]
    attends: list[bool]

    @classmethod
    def of(cls, unet: UNetModel) -> Layout:
        downs: list[int] = []
        pairs: list[list[int]] = [[]]
        for index, block in enumerate(unet.input_blocks[1:], start=1):
            if any(isinstance(layer, Downsample) for layer in block):
                downs.append(index)
                pairs.append([])
            else:
                pairs[-1].append(index)
        # Every level has one block more on the way up than pairs on the way down.
        ends, outputs = len(unet.output_blocks), []
        for level in pairs:
            outputs.append(list(range(ends - len(level) - 1, ends)))
            ends -= len(level) + 1
        attends = [any(_transformers(unet.input_blocks[i]) for i in level) for level in pairs]
        return cls(downs, pairs, outputs, attends)

    def windowed(self, unet: UNetModel, level: int) -> dict[tuple[str, int, int], int]:
        """Order in which the self-attention layers of a level run, by (list, block, layer)."""
        blocks = [("input", i, unet.input_blocks[i]) for i in self.pairs[level]]
        blocks += [("output", i, unet.output_blocks[i]) for i in self.outputs[level]]
        places = [(kind, i, n) for kind, i, block in blocks for t in _transformers(block) for n in range(_depth(t))]
        return {place: order for order, place in enumerate(places)}


def _transformers(block: Any) -> list[Any]:
    return [layer for layer in block if isinstance(layer, SpatialTransformer)]


def _depth(transformer: Any) -> int:
    return len(transformer.transformer_blocks)


@dataclass(frozen=True)
class _Call:
    """What one call of the UNet does otherwise than usual."""

    active: Any
    sizes: list
    quarters: list[int]


class HiDiffusion:
    """The patches of one MODEL.

    Args:
        config: `HiDiffusionConfig`, with `base_size` in latent pixels.
        unet: Its UNet.
        special: Inpainting models, which take no aggressive form by themselves.
    """

    def __init__(self, config: Any, unet: UNetModel, special: bool):
        from diffusers_ext.attention import _hidiffusion_plan as maths

        self.config, self.special, self.maths = config, special, maths
        self.layout = Layout.of(unet)
        self.place = maths.Placement.of(self.layout.attends)
        self.layers = self.layout.windowed(unet, self.place.attention)

    def call_now(self, shape: torch.Size, options: dict, control: Any) -> _Call | None:
        """What happens in this call; None outside of a sampling run."""
        schedule, levels = options.get("sample_sigmas"), options.get("sigmas")
        if schedule is None or levels is None:
            return None
        # Stages between two noise levels belong to the step that began.
        step = int((schedule.cpu() >= levels.max().cpu() * (1 - 1e-5)).sum()) - 1
        base, latent = self.config.base_size, (shape[-2], shape[-1])
        scale = max(latent[0] / base[0], latent[1] / base[1])
        plan = self.config.plan_at(scale, self.place, len(schedule) - 1, bool(control), self.special)
        active = plan.at(max(step, 0))
        quarters = self.maths.draw_quarters(self.config.seed, max(step, 0), len(self.layers))
        return _Call(active, active.sizes(latent, self.place), quarters)

    def forward(self, executor, x, timesteps=None, context=None, y=None, control=None, transformer_options=None, **kw):
        """DIFFUSION_MODEL: decide, tell the patches, and let the chosen downsampler take a quarter of the size."""
        options = dict(transformer_options or {})
        call = options[KEY] = self.call_now(x.shape, options, control)
        if call is None or not (call.active.conv or call.active.pool):
            return executor(x, timesteps, context, y, control, options, **kw)
        control = self._fitted(control, call)
        if not call.active.conv:
            return executor(x, timesteps, context, y, control, options, **kw)
        down = executor.class_obj.input_blocks[self.layout.downs[self.place.conv]]
        with self.maths.coarse(down):
            return executor(x, timesteps, context, y, control, options, **kw)

    def _fitted(self, control: dict | None, call: _Call) -> dict | None:
        """Residuals of ControlNets in the sizes that the features have in this call. They are taken from the end."""
        if not control:
            return control
        inside = self._sizes(call, [begin for begin, _ in call.sizes])
        behind = self._sizes(call, [end for _, end in call.sizes])
        order = {"output": behind, "input": inside[::-1], "middle": [call.sizes[-1][1]]}
        fitted = dict(control)
        for name, sizes in order.items():
            residuals = control.get(name) or []
            sizes = sizes[len(sizes) - len(residuals) :]
            fitted[name] = [r if r is None else self.maths.resized(r, s) for r, s in zip(residuals, sizes)]
        return fitted

    def _sizes(self, call: _Call, first: list) -> list:
        """Size behind every input block; `first` is the size behind the first pair of each level."""
        found = [call.sizes[0][0]]
        for level, pairs in enumerate(self.layout.pairs):
            found += [first[level]] * min(len(pairs), 1) + [call.sizes[level][1]] * (len(pairs) - 1)
            found += [call.sizes[level + 1][0]] if level + 1 < len(call.sizes) else []
        return found

    def pool(self, h, options):
        """input_block_patch: half the size behind the first pair of the pooled level."""
        call = options.get(KEY)
        here = self.place.pool is not None and options["block"][1] == self.layout.pairs[self.place.pool][0]
        return self.maths.halved(h) if here and call is not None and call.active.pool else h

    def unpool(self, h, skip, options):
        """output_block_patch: back to the whole size in front of the last pair of the pooled level."""
        call = options.get(KEY)
        here = self.place.pool is not None and options["block"][1] == self.layout.outputs[self.place.pool][-1]
        return (self.maths.resized(h, skip.shape[-2:]) if here and call is not None and call.active.pool else h), skip

    def _cut(self, options: dict) -> tuple | None:
        call = options.get(KEY)
        order = self.layers.get((*options["block"], options["block_index"]))
        if call is None or order is None or call.active.windows == 1:
            return None
        return tuple(options["activations_shape"][-2:]), call.active.windows, call.quarters[order]

    def enter(self, n, context, value, options):
        """attn1_patch: tokens of the windows."""
        cut = self._cut(options)
        return (
            (n, context, value) if cut is None else tuple(self.maths.to_windows(t, *cut) for t in (n, context, value))
        )

    def leave(self, n, options):
        """attn1_output_patch: tokens of the picture again."""
        cut = self._cut(options)
        return n if cut is None else self.maths.from_windows(n, *cut)


def _ratio_input(name: str, which: str) -> io.Float.Input:
    return io.Float.Input(
        name,
        default=-1.0,
        min=-1.0,
        max=1.0,
        step=0.01,
        tooltip=f"Share of the run in which the {which} acts. -1: the paper's value for the size and model; 0: never.",
    )


class DXHiDiffusion(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="DXHiDiffusion",
            display_name="HiDiffusion (UNet)",
            category="diffusers-ext/attention",
            description="Draws pictures two to four times larger than a UNet was trained for: objects stay in one "
            "piece, and large pictures take less time. Stable Diffusion 1, 2, XL.",
            search_aliases=["hidiffusion", "high resolution", "deep shrink", "hypertile", "raunet", "diffusers-ext"],
            inputs=[
                io.Model.Input("model", tooltip="A UNet model. LoRA and ControlNet keep working."),
                io.Int.Input(
                    "trained_size",
                    default=512,
                    min=16,
                    max=4096,
                    step=8,
                    tooltip="Side of the training pictures: 512 for SD 1.5, 768 for SD 2.1, 1024 for SDXL. Up to this "
                    "size nothing changes.",
                ),
                io.Boolean.Input(
                    "raunet",
                    default=True,
                    tooltip="Let the deep part of the UNet see small features early in the run.",
                ),
                io.Boolean.Input(
                    "window_attention",
                    default=True,
                    tooltip="Attend inside of four shifted windows, which saves time.",
                ),
                _ratio_input("t1_ratio", "first device"),
                _ratio_input("t2_ratio", "second device"),
                io.Combo.Input(
                    "aggressive",
                    options=["auto", "on", "off"],
                    default="auto",
                    tooltip="SDXL: shrink first, then pool. auto: below four times the trained size, not for "
                    "inpainting. Turn it off for Playground models.",
                ),
                io.Int.Input("seed", default=0, min=0, max=2**31 - 1, tooltip="Of the shifts of the windows."),
            ],
            outputs=[io.Model.Output(tooltip="The model, ready for large pictures. Works with every sampler node.")],
        )

    @classmethod
    def execute(cls, model, trained_size, raunet, window_attention, t1_ratio, t2_ratio, aggressive, seed):
        from diffusers_ext.attention.hidiffusion import HiDiffusionConfig

        unet = require_unet(model.model.diffusion_model)
        side = max(trained_size // model.model.latent_format.spacial_downscale_ratio, 1)
        ratios = {"t1_ratio": given(t1_ratio), "t2_ratio": given(t2_ratio)}
        choice = {"auto": None, "on": True, "off": False}[aggressive]
        config = HiDiffusionConfig(
            raunet, window_attention, **ratios, aggressive=choice, base_size=(side, side), seed=seed
        )
        patches = HiDiffusion(config, unet, special=unet.in_channels != unet.out_channels)
        config.check_devices("this model", patches.place)
        return io.NodeOutput(patched(model, patches))


def given(ratio: float) -> float | None:
    """A ratio of the node: below 0 stands for the paper's."""
    return None if ratio < 0 else ratio


def patched(model: Any, patches: HiDiffusion) -> Any:
    """A clone of a MODEL with these patches."""
    clone = model.clone()
    clone.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, KEY, patches.forward)
    clone.set_model_input_block_patch(patches.pool)
    clone.set_model_output_block_patch(patches.unpool)
    clone.set_model_attn1_patch(patches.enter)
    clone.set_model_attn1_output_patch(patches.leave)
    return clone


def require_unet(network: Any) -> UNetModel:
    """The UNet of a model, or an error that says what is supported."""
    if not isinstance(network, UNetModel):
        raise ValueError(
            f"HiDiffusion needs a UNet (Stable Diffusion 1, 2, XL); this model is a {type(network).__name__}"
        )
    return network


NODES = [DXHiDiffusion]
