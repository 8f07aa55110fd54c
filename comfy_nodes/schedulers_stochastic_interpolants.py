"""Stochastic interpolants: an SDE sampler for flow models."""

from __future__ import annotations

import comfy.samplers
from comfy_api.latest import io


class DXFlowSDESampler(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="DXFlowSDESampler",
            display_name="Flow SDE Sampler",
            category="diffusers-ext/schedulers",
            description="Samples a flow model (SD3, Flux...) with fresh noise in every step. How much is free: the "
            "distribution of the pictures stays the same.",
            search_aliases=["stochastic interpolants", "sde", "flow matching", "ancestral", "sampler"],
            inputs=[
                io.Combo.Input(
                    "profile",
                    options=["sigma", "sigma2", "sin", "constant"],
                    default="sigma",
                    tooltip="How the noise falls with the noise level: like sigma, like sigma^2, none at both ends "
                    "(sin), or not at all.",
                ),
                io.Float.Input(
                    "scale",
                    default=0.5,
                    min=0.0,
                    max=20.0,
                    step=0.05,
                    tooltip="How much noise. 0 is the euler sampler, 0.5 mild, 1 to 2 strong.",
                ),
                io.Combo.Input(
                    "integrator",
                    options=["euler", "heun", "trapezoid"],
                    default="euler",
                    tooltip="euler: one model call per step. heun (the authors') and trapezoid (more accurate): two.",
                ),
                io.Float.Input(
                    "clip",
                    default=1.0,
                    min=0.01,
                    max=1000.0,
                    step=0.01,
                    tooltip="Limits the noise where a step is too long for it. Large numbers turn the limit off.",
                    advanced=True,
                ),
                io.Combo.Input(
                    "last_step",
                    options=["denoise", "sde"],
                    default="denoise",
                    tooltip="denoise: no noise in the step to noise level 0.",
                    advanced=True,
                ),
            ],
            outputs=[io.Sampler.Output(tooltip="For SamplerCustom or SamplerCustomAdvanced.")],
        )

    @classmethod
    def execute(cls, profile, scale, integrator, clip, last_step) -> io.NodeOutput:
        from diffusers_ext.schedulers.stochastic_interpolants_native import sample_flow_sde

        options = {"profile": profile, "scale": scale, "integrator": integrator, "clip": clip, "last_step": last_step}
        return io.NodeOutput(comfy.samplers.KSAMPLER(sample_flow_sde, options))


NODES = [DXFlowSDESampler]
