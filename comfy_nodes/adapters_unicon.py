"""UniCon: image and condition drawn side by side, over a diffusers pipeline."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from ._adapters import ADAPTERS


UNICON = io.Custom("DX_UNICON")
CATEGORY = "diffusers-ext/adapters"


class DXUniConLoader(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        from . import _unicon

        return io.Schema(
            node_id="DXUniConLoader",
            display_name="UniCon Loader",
            category=CATEGORY,
            description="Loads a Stable Diffusion model in diffusers' layout with a UniCon adapter, which draws "
            "images from conditions (depth, edges), conditions from images, and both together.",
            search_aliases=["UniCon", "depth estimation", "joint generation", "depth to image", "diffusers-ext"],
            inputs=[
                io.Combo.Input(
                    "base",
                    options=_unicon.base_names(),
                    tooltip="A folder in models/diffusers with a model_index.json, or a model of this pack.",
                ),
                io.Combo.Input(
                    "adapter",
                    options=ADAPTERS.options(),
                    tooltip="A file in models/diffusers_ext_adapters that was trained for this base, or one of this "
                    "pack.",
                ),
            ],
            outputs=[UNICON.Output(display_name="unicon", tooltip="For UniCon Sample.")],
        )

    @classmethod
    def execute(cls, base, adapter) -> io.NodeOutput:
        from . import _unicon

        return io.NodeOutput(_unicon.load(base, ADAPTERS.find(adapter)))


def _number(name: str, default: float, high: float, tooltip: str) -> Any:
    return io.Float.Input(name, default=default, min=0.0, max=high, step=0.05, tooltip=tooltip)


def _size(name: str) -> Any:
    return io.Int.Input(
        name, default=512, min=64, max=8192, step=8, tooltip="Of the result, where no picture is given."
    )


def _channels_first(image: Any) -> Any:
    return None if image is None else image.movedim(-1, 1)[:, :3]


class DXUniConSample(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="DXUniConSample",
            display_name="UniCon Sample",
            category=CATEGORY,
            description="Draws an image and its condition side by side. With a condition: the image follows it. With "
            "an image at strength 0: its condition is estimated. With neither: both are drawn from the prompt.",
            search_aliases=["UniCon", "depth estimation", "joint generation", "depth to image", "image to depth"],
            inputs=[
                UNICON.Input("unicon", tooltip="From UniCon Loader."),
                io.String.Input("prompt", multiline=True, default="", tooltip="Of the image."),
                io.String.Input(
                    "y_prompt",
                    multiline=True,
                    default="",
                    tooltip="Of the condition; the adapter's trigger word is put before it. Often the same as prompt.",
                ),
                io.Int.Input(
                    "seed", default=0, min=0, max=2**53 - 1, control_after_generate=True, tooltip="Of the noise."
                ),
                io.Int.Input("steps", default=50, min=1, max=1000, tooltip="Of an input that starts from noise."),
                _number("cfg", 7.5, 30.0, "Guidance by the prompts; 1 is off."),
                _number("joint_scale", 1.0, 2.0, "How strongly image and condition look at each other; 0 is not."),
                _number("cond_guidance", 0.0, 10.0, "Pushes further together; one more call of the model per step."),
                _number("image_strength", 1.0, 1.0, "Noise on the image: 0 keeps it, 1 draws it anew."),
                _number(
                    "cond_strength", 0.0, 1.0, "Noise on the condition: 0 keeps it, more takes it as coarse advice."
                ),
                _size("width"),
                _size("height"),
                io.Image.Input("image", optional=True, tooltip="Known image; without it one is drawn."),
                io.Image.Input("condition", optional=True, tooltip="Known condition; without it one is drawn."),
                io.Mask.Input("image_mask", optional=True, tooltip="Where to draw the image anew; needs an image."),
            ],
            outputs=[
                io.Image.Output(display_name="image", tooltip="The image."),
                io.Image.Output(display_name="condition", tooltip="Its condition."),
            ],
        )

    @classmethod
    def execute(
        cls, unicon, prompt, y_prompt, seed, steps, cfg, joint_scale, cond_guidance, image_strength, cond_strength,
        width, height, image=None, condition=None, image_mask=None,
    ) -> io.NodeOutput:  # fmt: skip
        from . import _unicon

        given = [_channels_first(image), _channels_first(condition)]
        strengths = [1.0 if one is None else s for one, s in zip(given, (image_strength, cond_strength))]
        size = {} if any(one is not None for one in given) else {"width": width, "height": height}
        mask = None if image_mask is None or image is None else image_mask[:, None]
        options = {"joint_scale": joint_scale, "guidance_scale": cfg, "cond_guidance_scale": cond_guidance, **size}
        prompts, masks = [prompt, y_prompt], [mask, None]
        drawn = _unicon.run(
            unicon, seed, steps, images=given, strengths=strengths, prompts=prompts, masks=masks, **options
        )
        return io.NodeOutput(*drawn)


NODES = [DXUniConLoader, DXUniConSample]
