"""Resolution shift for flow models."""

from __future__ import annotations

import comfy.model_sampling
from comfy_api.latest import io


class _ShiftedFlow(comfy.model_sampling.ModelSamplingDiscreteFlow, comfy.model_sampling.CONST):
    """Flow noise levels with a plain shift."""


class DXResolutionShift(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="DXResolutionShift",
            display_name="Resolution Shift",
            category="diffusers-ext/schedulers",
            description="Gives a flow model (SD3, Flux, AuraFlow...) the noise levels that fit the picture size: "
            "twice the side length doubles the shift.",
            search_aliases=["ModelSamplingSD3", "timestep shift", "flow shift", "SD3", "resolution"],
            inputs=[
                io.Model.Input("model", tooltip="A flow model. Stable Diffusion 1, 2 and XL are refused."),
                io.Int.Input("width", default=1024, min=16, max=16384, step=8, tooltip="Width of the picture."),
                io.Int.Input("height", default=1024, min=16, max=16384, step=8, tooltip="Height of the picture."),
                io.Int.Input(
                    "base_size",
                    default=1024,
                    min=16,
                    max=16384,
                    step=8,
                    tooltip="Side length that needs base_shift: 1024 with shift 3 for SD3, or 256 with shift 1.",
                ),
                io.Float.Input(
                    "base_shift",
                    default=3.0,
                    min=0.01,
                    max=100.0,
                    step=0.01,
                    tooltip="Shift at base_size x base_size pixels.",
                ),
            ],
            outputs=[io.Model.Output(tooltip="The model with the shifted noise levels.")],
        )

    @classmethod
    def execute(cls, model, width, height, base_size, base_shift) -> io.NodeOutput:
        from diffusers_ext.schedulers.rectified_flow_sd3 import resolution_shift

        patched, original = model.clone(), model.get_model_object("model_sampling")
        if not isinstance(original, comfy.model_sampling.CONST):
            raise ValueError(
                "Resolution Shift needs a flow model (SD3, Flux...), and this one is not: remove the node"
            )
        shifted = _ShiftedFlow(model.model.model_config)
        shift = resolution_shift(width * height, base_size**2, base_shift)
        shifted.set_parameters(shift=shift, multiplier=getattr(original, "multiplier", 1.0))
        shifted.set_noise_scale(getattr(original, "noise_scale", 1.0))
        patched.add_object_patch("model_sampling", shifted)
        return io.NodeOutput(patched)


NODES = [DXResolutionShift]
