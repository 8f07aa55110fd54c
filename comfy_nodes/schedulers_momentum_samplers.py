"""Momentum samplers: generalised heavy ball, PLMS with heavy ball or Nesterov, DPM-Solver++ 2M with heavy ball."""

from __future__ import annotations

import comfy.samplers
from comfy_api.latest import io


def _order(default: float) -> io.Float.Input:
    return io.Float.Input(
        "order",
        default=default,
        min=0.1,
        max=5.0,
        step=0.1,
        tooltip="Accuracy against stability: integers are plain PLMS (1 is Euler), fractions lie between. Lower it "
        "when pictures get blotches.",
    )


def _denoise_last() -> io.Boolean.Input:
    return io.Boolean.Input(
        "denoise_last",
        default=False,
        tooltip="On a last step to noise level 0 return the clean prediction; off, the solver takes that step too.",
    )


def _sampler_output() -> list:
    return [io.Sampler.Output(tooltip="For SamplerCustom or SamplerCustomAdvanced.")]


class DXGHVBSampler(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="DXGHVBSampler",
            display_name="GHVB Sampler (momentum)",
            category="diffusers-ext/schedulers",
            description="Generalised heavy-ball momentum of any order: fewer blotches at few steps and large guidance "
            "than a high-order solver, sharper than Euler. One model call per step.",
            search_aliases=["ghvb", "momentum", "heavy ball", "plms", "artifacts", "sampler"],
            inputs=[_order(2.5), _denoise_last()],
            outputs=_sampler_output(),
        )

    @classmethod
    def execute(cls, order, denoise_last) -> io.NodeOutput:
        from diffusers_ext.schedulers.momentum_samplers import sample_momentum

        options = {"momentum": "ghvb", "order": order, "denoise_last": denoise_last}
        return io.NodeOutput(comfy.samplers.KSAMPLER(sample_momentum, options))


class DXPLMSHeavyBallSampler(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="DXPLMSHeavyBallSampler",
            display_name="PLMS Heavy Ball Sampler (momentum)",
            category="diffusers-ext/schedulers",
            description="PLMS with heavy-ball or Nesterov momentum: the most stable of the momentum samplers. One "
            "model call per step.",
            search_aliases=["plms", "momentum", "heavy ball", "nesterov", "sampler"],
            inputs=[
                _order(3.5),
                io.Boolean.Input("nesterov", default=False, tooltip="Nesterov momentum in place of heavy ball."),
                _denoise_last(),
            ],
            outputs=_sampler_output(),
        )

    @classmethod
    def execute(cls, order, nesterov, denoise_last) -> io.NodeOutput:
        from diffusers_ext.schedulers.momentum_samplers import sample_momentum

        kind = "nesterov" if nesterov else "hb"
        options = {"momentum": kind, "order": order, "denoise_last": denoise_last}
        return io.NodeOutput(comfy.samplers.KSAMPLER(sample_momentum, options))


class DXDPMpp2MHeavyBall(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="DXDPMpp2MHeavyBall",
            display_name="DPM++ 2M Heavy Ball (momentum)",
            category="diffusers-ext/schedulers",
            description="DPM-Solver++ 2M with heavy-ball momentum against blotches at few steps and large guidance.",
            search_aliases=["dpmpp 2m", "dpm++ 2m", "momentum", "heavy ball", "sampler"],
            inputs=[
                io.Float.Input(
                    "beta",
                    default=0.8,
                    min=0.05,
                    max=1.0,
                    step=0.05,
                    tooltip="1 is DPM++ 2M itself; smaller is more stable and less sharp.",
                )
            ],
            outputs=_sampler_output(),
        )

    @classmethod
    def execute(cls, beta) -> io.NodeOutput:
        from diffusers_ext.schedulers.momentum_samplers import sample_dpmpp_2m_momentum

        return io.NodeOutput(comfy.samplers.KSAMPLER(sample_dpmpp_2m_momentum, {"beta": beta}))


NODES = [DXGHVBSampler, DXPLMSHeavyBallSampler, DXDPMpp2MHeavyBall]
