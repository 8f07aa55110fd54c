"""EasyControl: pictures that control Flux through cached tokens."""

from __future__ import annotations

import copy

from comfy.patcher_extension import WrappersMP
from comfy_api.latest import io

from . import _easycontrol as native
from ._adapters import ADAPTERS


EASYCONTROL = io.Custom("DX_EASYCONTROL")
FROM_FILE = "as the file says"


class DXEasyControlLoader(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="DXEasyControlLoader",
            display_name="Load EasyControl",
            category="diffusers-ext/adapters",
            description="Loads an EasyControl adapter (edges, depth, pose, subject, ...): one saved by diffusers-ext, "
            "or a file of the paper's authors.",
            search_aliases=["easycontrol", "control lora", "condition", "diffusers-ext"],
            inputs=[
                io.Combo.Input(
                    "file",
                    options=ADAPTERS.options(),
                    tooltip="A file in models/diffusers_ext_adapters.",
                )
            ],
            outputs=[EASYCONTROL.Output(display_name="easycontrol", tooltip="For Apply EasyControl.")],
        )

    @classmethod
    def execute(cls, file: str) -> io.NodeOutput:
        from diffusers_ext import EasyControlAdapter

        return io.NodeOutput(EasyControlAdapter.from_pretrained(ADAPTERS.find(file)))


class DXEasyControlApply(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="DXEasyControlApply",
            display_name="Apply EasyControl",
            category="diffusers-ext/adapters",
            description="Lets a picture control a Flux model. Its tokens are computed once per run and cached, so "
            "each step costs hardly more. Chain it for several pictures.",
            search_aliases=["easycontrol", "controlnet", "edges", "subject", "reference", "diffusers-ext"],
            inputs=[
                io.Model.Input("model", tooltip="A Flux.1 model."),
                io.Vae.Input("vae", tooltip="Its VAE; it encodes the picture."),
                EASYCONTROL.Input("easycontrol", tooltip="From Load EasyControl."),
                io.Image.Input("image", tooltip="The condition: edges, depth, pose, ... or the subject's photo."),
                io.Float.Input(
                    "strength",
                    default=1.0,
                    min=0.0,
                    max=2.0,
                    step=0.05,
                    tooltip="Factor on the adapter's weights, 1 as trained. 0 takes the condition away; values near 0 "
                    "leave untrained tokens in, which is something else.",
                ),
                io.Combo.Input(
                    "condition_type",
                    options=[FROM_FILE, "spatial", "subject"],
                    default=FROM_FILE,
                    tooltip="spatial: the picture is laid over the image. subject: it lies beside the image. Files of "
                    "the paper's authors do not say and count as spatial: choose subject for their subject file.",
                ),
                io.Int.Input(
                    "cond_size",
                    default=0,
                    min=0,
                    max=4096,
                    step=8,
                    tooltip="Side of the condition in pixels, or its width if cond_height is given; fewer are faster "
                    "and less exact. 0: as trained (512 for the authors' files).",
                ),
                io.Float.Input(
                    "start_percent", default=0.0, min=0.0, max=1.0, step=0.01, tooltip="No control before this part."
                ),
                io.Float.Input(
                    "end_percent", default=1.0, min=0.0, max=1.0, step=0.01, tooltip="No control after this part."
                ),
                io.Int.Input(
                    "cond_height",
                    default=0,
                    min=0,
                    max=4096,
                    step=8,
                    optional=True,
                    tooltip="Height of a spatial condition that is no square, such as the image's own: wide and tall "
                    "images follow it more closely then. 0: a square of cond_size.",
                    advanced=True,
                ),
            ],
            outputs=[io.Model.Output(tooltip="The model under control. Works with every sampler node.")],
        )

    @classmethod
    def execute(
        cls,
        model,
        vae,
        easycontrol,
        image,
        strength,
        condition_type,
        cond_size,
        start_percent,
        end_percent,
        cond_height=0,
    ) -> io.NodeOutput:
        native.require_flux(model, easycontrol)
        patched, adapter = model.clone(), copy.copy(easycontrol)
        if strength == 0:
            return io.NodeOutput(patched)
        adapter.set_scale(strength)
        kind = adapter.config.condition_type if condition_type == FROM_FILE else condition_type
        width = cond_size or adapter.config.cond_size
        latents = native.condition_latents(model, vae, image, kind, width, cond_height)
        sigmas = tuple(map(model.get_model_object("model_sampling").percent_to_sigma, (start_percent, end_percent)))
        control = native.NativeControl(adapter, latents, kind, sigmas)
        key = f"diffusers_ext.easycontrol.{id(control)}"
        patched.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, key, control.sample)
        patched.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, key, control.forward)
        return io.NodeOutput(patched)


NODES = [DXEasyControlLoader, DXEasyControlApply]
