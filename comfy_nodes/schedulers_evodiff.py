"""EVODiff sampler."""

from __future__ import annotations

import comfy.samplers
from comfy_api.latest import io


class DXEVODiffSampler(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="DXEVODiffSampler",
            display_name="EVODiff Sampler",
            category="diffusers-ext/schedulers",
            description="Two-step sampler that rescales its second-order term per picture and channel as it goes. One "
            "model call per step, nothing to calibrate; made for 5 to 25 steps.",
            search_aliases=["evodiff", "entropy", "variance optimized", "sampler", "dpm++"],
            inputs=[
                io.Combo.Input(
                    "final",
                    options=["ddim", "official"],
                    default="ddim",
                    tooltip="Last step of the solver. official: of the released code, for models that end at sigma "
                    "0.002 (EDM) only.",
                ),
                io.Boolean.Input(
                    "denoise_to_zero",
                    default=True,
                    tooltip="With noise levels that end at 0: the last call is spent on the clean prediction, as the "
                    "authors do. Off: the solver itself takes the last step.",
                ),
            ],
            outputs=[io.Sampler.Output(tooltip="For SamplerCustom or SamplerCustomAdvanced, 3 steps or more.")],
        )

    @classmethod
    def execute(cls, final, denoise_to_zero) -> io.NodeOutput:
        from diffusers_ext.schedulers.evodiff import sample_evodiff

        options = {"final": final, "denoise_to_zero": denoise_to_zero}
        return io.NodeOutput(comfy.samplers.KSAMPLER(sample_evodiff, options))


NODES = [DXEVODiffSampler]
