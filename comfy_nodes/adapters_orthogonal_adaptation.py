"""Orthogonal Adaptation: several concepts summed into one patch of MODEL and CLIP."""

from __future__ import annotations

from pathlib import Path

import comfy.sd
from comfy_api.latest import io

from ._adapters import ADAPTERS


SLOTS = 4
NONE = "none"


def shipped() -> dict[str, Path]:
    """Concepts that come with this pack, for its small models, by file name."""
    files = ADAPTERS.by_name()
    return {name: files[name] for name in ADAPTERS.of_class("OrthogonalLoraAdapter")}


def options() -> list[str]:
    """Choices of a file input."""
    import folder_paths

    return [NONE, *sorted({*folder_paths.get_filename_list("loras"), *shipped()})]


def path_of(name: str) -> Path:
    """The LoRA of that name. Raises `ValueError` when there is none."""
    import folder_paths

    found = folder_paths.get_full_path("loras", name) or shipped().get(name)
    if found is None:
        raise ValueError(f"no LoRA {name!r} in models/loras")
    return Path(found)


def native(tensors: dict) -> dict:
    """A LoRA of diffusers under names that ComfyUI knows: of UNets, core maps kohya's names only."""
    renamed = {}
    for name, tensor in tensors.items():
        layer, _, side = name.partition(".lora_")
        if layer.startswith("unet."):
            name = f"lora_unet_{layer.removeprefix('unet.').replace('.', '_')}.lora_{side}"
        renamed[name] = tensor
    return renamed


def _inputs(slot: int) -> list[io.Input]:
    return [
        io.Combo.Input(
            f"file_{slot}",
            options=options(),
            default=NONE,
            tooltip="A concept: a LoRA file in models/loras, or one that ships with this pack for its small models.",
        ),
        io.Float.Input(
            f"weight_{slot}",
            default=1.0,
            min=-4.0,
            max=4.0,
            step=0.05,
            tooltip="How strongly this concept counts; 1 is the trained strength.",
        ),
    ]


class DXOrthogonalLoraMerge(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="DXOrthogonalLoraMerge",
            display_name="Orthogonal LoRA Merge",
            category="diffusers-ext/adapters",
            description="Sums concepts that were trained apart on orthogonal directions, and reports their crosstalk.",
            search_aliases=["orthogonal adaptation", "lora", "merge", "concepts", "modular", "diffusers-ext"],
            inputs=[
                io.Model.Input("model", tooltip="The model that the concepts were trained on."),
                io.Clip.Input("clip", tooltip="Its text encoder, for files that hold a part for it."),
                *(field for slot in range(1, SLOTS + 1) for field in _inputs(slot)),
            ],
            outputs=[
                io.Model.Output(tooltip="The model with all concepts."),
                io.Clip.Output(tooltip="The text encoder with all concepts."),
                io.String.Output("report", tooltip="For every pair of files how far their directions are apart."),
            ],
        )

    @classmethod
    def execute(cls, model, clip, **chosen) -> io.NodeOutput:
        from diffusers_ext import crosstalk_report, merge_concepts

        slots = [k for k in range(1, SLOTS + 1) if chosen.get(f"file_{k}", NONE) != NONE]
        if not slots:
            return io.NodeOutput(model, clip, "no files")
        paths = [path_of(chosen[f"file_{k}"]) for k in slots]
        merged = merge_concepts(paths, [chosen[f"weight_{k}"] for k in slots])
        patched = comfy.sd.load_lora_for_models(model, clip, native(merged), 1.0, 1.0)
        return io.NodeOutput(*patched, str(crosstalk_report(paths)))


NODES = [DXOrthogonalLoraMerge]
