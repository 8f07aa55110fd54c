"""VMix as MODEL patches: values of cross-attention get a second part that comes from labels for the look."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from comfy.ldm.modules.attention import SpatialTransformer, optimized_attention
from comfy_api.latest import io

from ._adapters import ADAPTERS
from ._files import NO_FILES


VMIX = io.Custom("DX_VMIX")
CATEGORY = "diffusers-ext/adapters"


class MixedAttention:
    """Replaces one cross-attention: text values get the label values of their kind of row.

    Args:
        values: `[2, tokens, width]`, already scaled: for unconditional rows, for conditional rows.
        sigmas: Noise levels between which it works, the larger first.
        before: Another replacement that was there already; it is called in place of plain attention.
    """

    def __init__(self, values: torch.Tensor, sigmas: tuple[float, float], before: Callable | None):
        self.values, self.sigmas, self.before = values, sigmas, before

    def __call__(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, options: dict) -> torch.Tensor:
        if self.sigmas[0] >= float(options["sigmas"].max()) >= self.sigmas[1]:
            v = v + self._of_rows(v, options["cond_or_uncond"])
        if self.before is not None:
            return self.before(q, k, v, options)
        precision = options.get("attn_precision")
        return optimized_attention(q, k, v, options["n_heads"], attn_precision=precision, transformer_options=options)

    def _of_rows(self, v: torch.Tensor, cond_or_uncond: list[int]) -> torch.Tensor:
        repeats, rest = divmod(v.shape[1], self.values.shape[1])
        if rest:
            raise ValueError(
                f"the prompt has {v.shape[1]} tokens; this VMix file is for multiples of {self.values.shape[1]}"
            )
        self.values = self.values.to(v)
        kinds = torch.tensor([1 - kind for kind in cond_or_uncond], device=v.device)
        rows = kinds.repeat_interleave(len(v) // len(kinds))
        return self.values.repeat(1, repeats, 1)[rows]


def cross_attentions(unet: torch.nn.Module) -> Iterator[tuple[tuple[str, int, int], torch.nn.Module]]:
    """Block id and layer of every text cross-attention of a UNet, from the input to the output."""
    sections = (("input", unet.input_blocks), ("middle", [unet.middle_block]), ("output", unet.output_blocks))
    for section, blocks in sections:
        for number, block in enumerate(blocks):
            for transformer in (m for m in block.modules() if isinstance(m, SpatialTransformer)):
                for index, inner in enumerate(transformer.transformer_blocks):
                    yield (section, number, index), inner.attn2


def blocks_of(model: Any, config: Any, ordered: list[str]) -> dict[str, tuple[str, int, int]]:
    """Layer name in the file -> block id in this MODEL.

    Args:
        model: MODEL.
        config: Of the adapter.
        ordered: The names of its layers from the input to the output.

    Raises:
        ValueError: The file is for another kind of model.
    """
    unet = model.model.diffusion_model
    if not hasattr(unet, "input_blocks"):
        raise ValueError(f"VMix works on UNets (SD 1, 2, XL); this model is a {type(unet).__name__}")
    found = list(cross_attentions(unet))
    if len(found) != len(ordered):
        raise ValueError(f"this VMix file is for another model: {len(ordered)} layers, this one has {len(found)}")
    for name, (block, layer) in zip(ordered, found):
        sizes, mine = tuple(layer.to_v.weight.shape), (config.layer_dims[name], config.text_embed_dim)
        if sizes != mine:
            raise ValueError(f"this VMix file is for another model: {name} is {mine}, block {block} here is {sizes}")
    return {name: block for name, (block, _) in zip(ordered, found)}


def _sliders(labels: list[list[str]]) -> list[io.Input]:
    return [
        io.Float.Input(
            positive,
            default=1.0,
            min=-1.0,
            max=1.0,
            step=0.05,
            tooltip=f"1: {positive}. -1: {negative}. 0: left open.",
        )
        for positive, negative in labels
    ]


class DXVMixLoader(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        options = [
            io.DynamicCombo.Option(name, _sliders(config["labels"]))
            for name, config in ADAPTERS.of_class("VMixAdapter").items()
        ]
        return io.Schema(
            node_id="DXVMixLoader",
            display_name="VMix Loader",
            category=CATEGORY,
            description="Loads a VMix adapter and chooses the look, with one slider per pair of labels in the file.",
            search_aliases=["vmix", "aesthetic", "look", "lighting", "colour", "diffusers-ext"],
            inputs=[
                io.DynamicCombo.Input(
                    "file",
                    options=options or [io.DynamicCombo.Option(NO_FILES, [])],
                    tooltip="A file in models/diffusers_ext_adapters, or one that ships with this pack.",
                )
            ],
            outputs=[VMIX.Output(display_name="vmix", tooltip="For VMix Apply.")],
        )

    @classmethod
    def execute(cls, file: dict) -> io.NodeOutput:
        from diffusers_ext.adapters.vmix import VMixAdapter

        strengths = dict(file)
        adapter = VMixAdapter.from_pretrained(ADAPTERS.find(strengths.pop("file")), torch_dtype=torch.float32)
        adapter.set_labels(strengths)
        return io.NodeOutput(adapter)


class DXVMixApply(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="DXVMixApply",
            display_name="VMix Apply",
            category=CATEGORY,
            description="Gives pictures the look chosen in VMix Loader. What they show stays: attention to the prompt "
            "is not touched.",
            search_aliases=["vmix", "aesthetic", "look", "lighting", "colour", "diffusers-ext"],
            inputs=[
                io.Model.Input("model", tooltip="The UNet that the file was trained for, or a relative of it."),
                VMIX.Input("vmix", tooltip="From VMix Loader."),
                io.Float.Input(
                    "scale",
                    default=1.0,
                    min=0.0,
                    max=2.0,
                    step=0.05,
                    tooltip="Strength of the look. 0 leaves the model as it is.",
                ),
                io.Combo.Input(
                    "uncond_mode",
                    options=["none", "null"],
                    default="none",
                    tooltip="The negative side of guidance: the plain model, or the adapter with all labels open.",
                    advanced=True,
                ),
                io.Float.Input(
                    "start_percent",
                    default=0.0,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="Works from this part of the run.",
                ),
                io.Float.Input(
                    "end_percent",
                    default=1.0,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="Works up to this part of the run.",
                ),
            ],
            outputs=[io.Model.Output(tooltip="The model with the look. Works with every sampler node.")],
        )

    @classmethod
    def execute(cls, model, vmix, scale, uncond_mode, start_percent, end_percent) -> io.NodeOutput:
        from diffusers_ext.adapters.vmix import from_input_to_output

        patched, sampling = model.clone(), model.get_model_object("model_sampling")
        blocks = blocks_of(model, vmix.config, from_input_to_output(vmix.config.layer_dims))
        sigmas = tuple(float(sampling.percent_to_sigma(p)) for p in (start_percent, end_percent))
        present = patched.model_options["transformer_options"].get("patches_replace", {}).get("attn2", {})
        for name, values in vmix.chosen_values(uncond_mode).items() if scale else ():
            block = blocks[name]
            before = present.get(block, present.get(block[:2]))
            patched.set_model_attn2_replace(MixedAttention(scale * values, sigmas, before), *block)
        return io.NodeOutput(patched)


NODES = [DXVMixLoader, DXVMixApply]
