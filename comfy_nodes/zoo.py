"""Small trained models that ship with the pack: pictures without a download."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from comfy_api.latest import io


def shipped_models() -> list[str]:
    """Names of the models that lie in `diffusers_ext`, found without importing it."""
    return sorted(p.parent.name for p in _weights().glob("*/manifest.json"))


def _weights() -> Path:
    (package,) = importlib.util.find_spec("diffusers_ext").submodule_search_locations
    return Path(package) / "zoo/weights"


class DXLoadShapes(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="DXLoadShapes",
            display_name="Load Shapes Model",
            category="diffusers-ext/zoo",
            description="Loads a small trained text-to-image model that ships with this pack. It draws 64 x 64 "
            "pictures of coloured shapes on a CPU in about a second: try a method without a download.",
            search_aliases=["tiny model", "test model", "shapes", "checkpoint", "diffusers-ext"],
            inputs=[
                io.Combo.Input(
                    "model",
                    options=shipped_models(),
                    default="shapes-unet",
                    tooltip="shapes-unet: Stable Diffusion layout, v prediction. shapes-unet-eps: the same with "
                    "epsilon prediction. shapes-dit: Flux layout, flow matching.",
                )
            ],
            outputs=[
                io.Model.Output(tooltip="The denoiser. Samples 64 x 64 pixels: set that size on the empty latent."),
                io.Clip.Output(
                    tooltip="Its text encoder. Prompts read 'a small red circle left of a large green "
                    "square, striped blue background'."
                ),
                io.Vae.Output(tooltip="Its autoencoder (4 pixels per latent)."),
            ],
        )

    @classmethod
    def execute(cls, model: str) -> io.NodeOutput:
        from . import _shapes

        return io.NodeOutput(_shapes.load_model(model), _shapes.load_clip(model), _shapes.load_vae(model))


class DXLoadShapesControlNet(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        files = sorted(p.stem for p in _weights().glob("adapters/controlnet-*.safetensors"))
        return io.Schema(
            node_id="DXLoadShapesControlNet",
            display_name="Load Shapes ControlNet",
            category="diffusers-ext/zoo",
            description="Loads a small trained ControlNet that ships with this pack, for the shapes models.",
            search_aliases=["tiny controlnet", "test controlnet", "edges", "canny", "diffusers-ext"],
            inputs=[
                io.Combo.Input(
                    "controlnet", options=files, tooltip="Its condition and the model it was made for are in its name."
                )
            ],
            outputs=[io.ControlNet.Output(tooltip="Takes pictures of white edges on black, 64 x 64.")],
        )

    @classmethod
    def execute(cls, controlnet) -> io.NodeOutput:
        from . import _shapes

        return io.NodeOutput(_shapes.load_controlnet(controlnet))


NODES = [DXLoadShapes, DXLoadShapesControlNet]
