"""SCEdit: tuners on the skip connections of a UNet as MODEL patches."""

from __future__ import annotations

from typing import Any

import comfy.utils
import torch
from comfy_api.latest import io

from ._adapters import ADAPTERS
from ._skips import skip_widths


SC_TUNER = io.Custom("DX_SC_TUNER")
CATEGORY = "diffusers-ext/adapters"
PATCH = "output_block_patch"


class StyleEdit:
    """What an SC-Tuner adds to the features of a skip connection."""

    def __init__(self, tuner: Any, scale: float):
        self.tuner, self.scale = tuner, scale

    def to(self, where: Any) -> None:
        self.tuner.to(where)

    def __call__(self, m: int, x: torch.Tensor, options: dict) -> torch.Tensor | None:
        tuners = self.tuner.to(x.device, x.dtype).lsc_identity
        return self.scale * tuners[str(m)](x) if str(m) in tuners else None


class ConditionEdit:
    """What a CSC-Tuner adds to the features of a skip connection.

    Args:
        tuner: `CSCTuner`.
        scale: Multiplies what it adds.
        image: IMAGE `[n, h, w, channels]`.
    """

    def __init__(self, tuner: Any, scale: float, image: torch.Tensor):
        self.tuner, self.scale, self.image = tuner, scale, image
        self._kept: tuple[Any, list[torch.Tensor]] = (None, [])

    def to(self, where: Any) -> None:
        self.tuner.to(where)

    def __call__(self, m: int, x: torch.Tensor, options: dict) -> torch.Tensor:
        tuner, hints = self.tuner.to(x.device, x.dtype), self._hints(x, options["original_shape"])
        hint = hints[len(hints) - 1 - m]
        if len(x) % len(hint):
            raise ValueError(f"{len(hint)} condition pictures for a batch of {len(x)}: give one, or one per latent")
        hint = hint.repeat(len(x) // len(hint), 1, 1, 1)
        return self.scale * (tuner.lsc_tuner_blocks[str(m)](x + hint) + hint)

    def _hints(self, x: torch.Tensor, shape: torch.Size) -> list[torch.Tensor]:
        """Hints of all skip connections, computed once per size and precision."""
        key = (tuple(shape[-2:]), x.device, x.dtype)
        if self._kept[0] != key:
            height, width = (size * self.tuner.pixels for size in shape[-2:])
            picture = self.image.movedim(-1, 1)[:, : self.tuner.config.hint_channels]
            picture = comfy.utils.common_upscale(picture, width, height, "nearest-exact", "center")
            self._kept = key, self.tuner.hints(picture.to(x.device, x.dtype))
        return self._kept[1]


class SkipEdits:
    """All tuners of one MODEL in one patch: each sees the features as the encoder left them."""

    def __init__(self, edits: list[Any]):
        self.edits = edits

    def to(self, where: Any) -> SkipEdits:
        for edit in self.edits:
            edit.to(where)
        return self

    def __call__(self, h: torch.Tensor, skip: torch.Tensor, options: dict) -> tuple[torch.Tensor, torch.Tensor]:
        m, edited = options["block"][1], skip
        for edit in self.edits:
            added = edit(m, skip, options)
            edited = edited if added is None else edited + added
        return h, edited


def with_edit(model: Any, edit: Any) -> Any:
    """A clone of a MODEL with one more tuner. Tuners come before other patches of the skips, such as FreeU.

    Raises:
        ValueError: The tuner is for another model.
    """
    mine = list(edit.tuner.config.skip_channels)
    theirs = skip_widths(model.model.diffusion_model, "SCEdit")
    if mine != theirs:
        raise ValueError(f"this tuner is for skip connections of {mine} channels, the model has {theirs}")
    patched = model.clone()
    patches = patched.model_options["transformer_options"].setdefault("patches", {})
    others = patches.get(PATCH, [])
    edits = [e for patch in others if isinstance(patch, SkipEdits) for e in patch.edits]
    patches[PATCH] = [SkipEdits([*edits, edit]), *(p for p in others if not isinstance(p, SkipEdits))]
    return patched


class DXSCTunerLoader(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="DXSCTunerLoader",
            display_name="SC-Tuner Loader",
            category=CATEGORY,
            description="Loads an SC-Tuner: a style or subject in small tuners on a UNet's skip connections.",
            search_aliases=["scedit", "sc tuner", "style", "skip connection", "diffusers-ext"],
            inputs=[
                io.Combo.Input(
                    "file",
                    options=ADAPTERS.options(),
                    tooltip="A file in models/diffusers_ext_adapters (the authors' as well), or a shipped one.",
                )
            ],
            outputs=[SC_TUNER.Output(tooltip="For SC-Tuner Apply.")],
        )

    @classmethod
    def execute(cls, file) -> io.NodeOutput:
        from diffusers_ext import SCTuner

        return io.NodeOutput(SCTuner.from_pretrained(ADAPTERS.find(file)))


class DXSCTunerApply(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="DXSCTunerApply",
            display_name="SC-Tuner Apply",
            category=CATEGORY,
            description="Draws in the style of an SC-Tuner.",
            search_aliases=["scedit", "sc tuner", "style", "skip connection", "diffusers-ext"],
            inputs=[
                io.Model.Input("model", tooltip="A UNet: SD 1, 2 or XL, as the tuner was made for."),
                SC_TUNER.Input("sc_tuner", tooltip="From SC-Tuner Loader."),
                io.Float.Input(
                    "scale",
                    default=1.0,
                    min=-4.0,
                    max=4.0,
                    step=0.05,
                    tooltip="1 is the trained strength, 0 changes nothing.",
                ),
            ],
            outputs=[io.Model.Output(tooltip="The model with the style. Further tuners add up in any order.")],
        )

    @classmethod
    def execute(cls, model, sc_tuner, scale) -> io.NodeOutput:
        return io.NodeOutput(with_edit(model, StyleEdit(sc_tuner, scale)) if scale else model)


class DXCSCTunerApply(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="DXCSCTunerApply",
            display_name="CSC-Tuner Apply",
            category=CATEGORY,
            description="Draws by a condition picture (edges, depth, ...) with a CSC-Tuner on skip connections.",
            search_aliases=["scedit", "csc tuner", "controlnet", "edges", "condition", "diffusers-ext"],
            inputs=[
                io.Model.Input("model", tooltip="A UNet: SD 1, 2 or XL, as the tuner was made for."),
                io.Combo.Input(
                    "file",
                    options=ADAPTERS.options(),
                    tooltip="A file in models/diffusers_ext_adapters (the authors' as well), or a shipped one.",
                ),
                io.Image.Input("image", tooltip="The condition picture, as the tuner was trained on."),
                io.Float.Input(
                    "strength",
                    default=1.0,
                    min=0.0,
                    max=4.0,
                    step=0.05,
                    tooltip="1 is the trained strength, 0 changes nothing.",
                ),
            ],
            outputs=[io.Model.Output(tooltip="The model with the condition. Further conditions add up.")],
        )

    @classmethod
    def execute(cls, model, file, image, strength) -> io.NodeOutput:
        from diffusers_ext import CSCTuner

        tuner = CSCTuner.from_pretrained(ADAPTERS.find(file))
        return io.NodeOutput(with_edit(model, ConditionEdit(tuner, strength, image)) if strength else model)


NODES = [DXSCTunerLoader, DXSCTunerApply, DXCSCTunerApply]
