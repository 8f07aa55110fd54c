"""Attention-entropy scaling as MODEL patches."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel
from comfy.patcher_extension import WrappersMP
from comfy_api.latest import io

from ._runs import run_options, wrap_network
from .attention_hidiffusion import Layout as UNetLayout


KEY = "diffusers_ext.attention_entropy_scaling"
OVERRIDE = "optimized_attention_override"


@dataclass
class EntropyScaling:
    """The patches of one MODEL: `query` for UNets, `forward` for transformers, `sample` announces the run's levels.

    Args:
        config: `AttentionEntropyScalingConfig`, with `base_size` in latent pixels.
        layout: The class `Layout`.
        trained: Tokens of each block of a UNet in training, by (list, index).
    """

    config: Any
    layout: Any
    trained: dict[tuple[str, int], int]

    def sample(self, executor, *args, **kwargs):
        """OUTER_SAMPLE: put the model's noise levels where the patches find them."""
        guider = executor.class_obj
        with run_options(guider, KEY, guider.model_patcher.get_model_object("model_sampling")):
            return executor(*args, **kwargs)

    def layout_now(self, options: dict, shape: torch.Size, tokens: int | None) -> Any:
        """What the picture of this call means for attention, or None where nothing is scaled."""
        base, sampling = self.config.base_size, options.get(KEY)
        ratio = base[0] * base[1] / (shape[-2] * shape[-1])
        if sampling is None or ratio == 1 or self.config.strength == 0:
            return None
        now = sampling.timestep(options["sigmas"].max().cpu())
        progress = 1 - float(now / sampling.timestep(torch.as_tensor(sampling.sigma_max).cpu()))
        active = self.config.is_active(min(max(progress, 0.0), 1.0))
        return self.layout(ratio, tokens, self.config.strength, self.config.count_text) if active else None

    def query(self, n, context, value, options):
        """attn1_patch of UNets. The query projection has no bias: scaling its input scales the queries."""
        layout = self.layout_now(options, options["original_shape"], None)
        if layout is not None:
            n = n * layout.factor(n.shape[1], context.shape[1], self.trained.get(options["block"]))
        return n, context, value

    def forward(self, executor, x, *args, **kwargs):
        """Around transformers: every attention of a picture over itself gets the factor."""
        # Models hand their options on by name or by position.
        place = next((i for i, value in enumerate(args) if isinstance(value, dict)), None)
        options = kwargs.get("transformer_options", {}) if place is None else args[place]
        layout = self.layout_now(options, x.shape, picture_tokens(executor.class_obj, x.shape))
        if layout is None:
            return executor(x, *args, **kwargs)
        attention = ScaledAttention(layout, options.get(OVERRIDE))
        if place is None:
            kwargs["transformer_options"] = {**options, OVERRIDE: attention}
        else:
            args = (*args[:place], {**options, OVERRIDE: attention}, *args[place + 1 :])
        output = executor(x, *args, **kwargs)
        if not attention.scaled:
            raise ValueError(
                f"the attention of {type(executor.class_obj).__name__} cannot be reached from a node: take "
                "Attention Entropy Scaling off this model, or use it in diffusers"
            )
        return output


class ScaledAttention:
    """ComfyUI's attention override: scales the queries where a picture attends to itself, then goes on to `before`."""

    def __init__(self, layout: Any, before: Any):
        self.layout, self.before, self.scaled = layout, before, 0

    def __call__(self, function, q, k, v, *args, **kwargs):
        if q.shape[-2] == k.shape[-2]:
            self.scaled += 1
            q = q * self.layout.factor(q.shape[-2], k.shape[-2])
        if self.before:
            return self.before(function, q, k, v, *args, **kwargs)
        return function(q, k, v, *args, **kwargs)


def picture_tokens(network: torch.nn.Module, shape: torch.Size) -> int:
    """Tokens that a transformer makes of latents `[n, c, h, w]` or `[n, c, f, h, w]`."""
    patch = getattr(network, "patch_size", 1)
    height, width = patch[-2:] if isinstance(patch, (tuple, list)) else (patch, patch)
    return -(-shape[-2] // height) * -(-shape[-1] // width) * (shape[2] if len(shape) == 5 else 1)


def levels_of(unet: UNetModel) -> dict[tuple[str, int], int]:
    """Level of every block of a UNet, 0 the outermost, by (list, index); none where blocks do not halve the size."""
    layout = UNetLayout.of(unet)
    if len(layout.pairs) != len(unet.channel_mult):
        return {}
    found = {("input", i): level for level, blocks in enumerate(layout.pairs) for i in blocks}
    found |= {("output", i): level for level, blocks in enumerate(layout.outputs) for i in blocks}
    return found | {("middle", 0): len(layout.pairs) - 1}


def latent_size(model: Any, width: int, height: int) -> tuple[int, int]:
    """Height and width of a model's latents for a picture."""
    scale = model.model.latent_format.spacial_downscale_ratio
    return max(height // scale, 1), max(width // scale, 1)


class DXAttentionEntropyScaling(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="DXAttentionEntropyScaling",
            display_name="Attention Entropy Scaling",
            category="diffusers-ext/attention",
            description="Keeps self-attention as sharp as it was at the trained picture size, so that larger pictures "
            "repeat less and smaller ones crop less. Costs nothing; at the trained size nothing changes.",
            search_aliases=["entropy", "resolution", "variable size", "attention scale", "diffusers-ext"],
            inputs=[
                io.Model.Input("model", tooltip="A UNet (SD 1, 2, XL), Flux, SD3 or another transformer."),
                io.Int.Input(
                    "base_width",
                    default=512,
                    min=16,
                    max=16384,
                    step=8,
                    tooltip="Width of the training pictures: 512 for SD 1.5, 1024 for SDXL, Flux and SD3.",
                ),
                io.Int.Input(
                    "base_height", default=512, min=16, max=16384, step=8, tooltip="Height of these pictures."
                ),
                io.Float.Input(
                    "strength",
                    default=1.0,
                    min=0.0,
                    max=1.0,
                    step=0.05,
                    tooltip="1 is the factor of the paper, 0 changes nothing.",
                ),
                io.Float.Input(
                    "start_percent",
                    default=0.0,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="Not scaled before this part of the noise range.",
                ),
                io.Float.Input(
                    "end_percent",
                    default=1.0,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="Not scaled after this part of the noise range.",
                ),
            ],
            outputs=[io.Model.Output(tooltip="The model, adapted to other sizes. Works with every sampler node.")],
        )

    @classmethod
    def execute(cls, model, base_width, base_height, strength, start_percent, end_percent) -> io.NodeOutput:
        from diffusers_ext.attention import attention_entropy_scaling as maths

        base = latent_size(model, base_width, base_height)
        config = maths.AttentionEntropyScalingConfig(base, strength, start=start_percent, end=end_percent)
        network, patched = model.model.diffusion_model, model.clone()
        levels = levels_of(network) if isinstance(network, UNetModel) and strength else {}
        trained = {block: maths.trained_tokens(base, level) for block, level in levels.items()}
        scaling = EntropyScaling(config, maths.Layout, trained)
        patched.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, KEY, scaling.sample)
        if isinstance(network, UNetModel):
            patched.set_model_attn1_patch(scaling.query)
        else:
            wrap_network(patched, KEY, scaling.forward)
        return io.NodeOutput(patched)


NODES = [DXAttentionEntropyScaling]
