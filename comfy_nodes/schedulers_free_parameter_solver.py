"""Noise levels with free parameters."""

from __future__ import annotations

import comfy.model_sampling
from comfy_api.latest import io


class DXFreeParameterSigmas(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="DXFreeParameterSigmas",
            display_name="Free Parameter Sigmas",
            category="diffusers-ext/schedulers",
            description="Noise levels for Stable Diffusion in 4 to 8 steps. They stop before the noise is gone; a VAE "
            "hides the rest. Use them with euler (4 to 6 steps) or dpmpp_2m (8 steps).",
            search_aliases=["few steps", "5 steps", "sigmas", "scheduler", "hyperparameters"],
            inputs=[
                io.Model.Input(
                    "model", tooltip="A model with Stable Diffusion's noise levels; flow models are refused."
                ),
                io.DynamicCombo.Input(
                    "preset",
                    options=[
                        io.DynamicCombo.Option("sd15", [_steps()]),
                        io.DynamicCombo.Option("sdxl", [_steps()]),
                        io.DynamicCombo.Option("custom", _custom()),
                    ],
                    tooltip="The paper's settings for SD 1.5 or SDXL, or your own.",
                ),
            ],
            outputs=[io.Sigmas.Output(tooltip="For SamplerCustom with euler or dpmpp_2m. The last one is above 0.")],
        )

    @classmethod
    def execute(cls, model, preset) -> io.NodeOutput:
        from diffusers_ext.schedulers._native import native_schedule
        from diffusers_ext.schedulers.free_parameter_solver import FreeParameterSigmas

        sampling = model.get_model_object("model_sampling")
        if isinstance(sampling, comfy.model_sampling.CONST):
            raise ValueError("Free Parameter Sigmas is made for Stable Diffusion's noise levels, not for flow models")
        options = {**preset, "steps": int(preset["steps"])}
        grid = FreeParameterSigmas(**options)
        return io.NodeOutput((-grid.log_snr(native_schedule(sampling))).exp().float())


def _steps():
    return io.Combo.Input("steps", options=["4", "5", "6", "8"], default="5", tooltip="Steps, one model call each.")


def _custom() -> list:
    return [
        io.Int.Input("steps", default=5, min=1, max=100, tooltip="Steps, one model call each."),
        io.Int.Input("n0", default=8, min=2, max=1000, tooltip="Levels of the coarse grid."),
        io.Float.Input("rho0", default=5.0, min=0.1, max=100.0, step=0.1, tooltip="Its exponent."),
        io.Int.Input(
            "stop_index",
            default=6,
            min=1,
            max=999,
            tooltip="Level of the coarse grid to stop at; below n0. A smaller one leaves more noise.",
        ),
        io.Float.Input("time_rho", default=1.2, min=0.1, max=10.0, step=0.05, tooltip="Bend of the grid over time."),
    ]


NODES = [DXFreeParameterSigmas]
