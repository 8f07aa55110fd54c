"""DPM-Solver samplers: single-step on a budget of calls, and adaptive."""

from __future__ import annotations

import comfy.samplers
from comfy_api.latest import io


def _solver_type() -> io.Combo.Input:
    return io.Combo.Input(
        "solver_type",
        options=["dpmsolver", "taylor"],
        default="dpmsolver",
        tooltip="Two updates of the same order; dpmsolver is the authors' default.",
    )


class DXDPMSolverFastExact(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="DXDPMSolverFastExact",
            display_name="DPM-Solver Fast (exact)",
            category="diffusers-ext/schedulers",
            description="Single-step DPM-Solver of order 3, 2 and 1 that spends exactly as many model calls as there "
            "are steps. Data form (++) or noise form.",
            search_aliases=["dpm fast", "dpm-solver", "dpm-solver++", "singlestep", "sampler"],
            inputs=[
                io.Int.Input("order", default=3, min=1, max=3, tooltip="Highest order of the steps; 1 is DDIM."),
                io.Combo.Input(
                    "algorithm",
                    options=["dpmsolver++", "dpmsolver"],
                    default="dpmsolver++",
                    tooltip="Expand the clean prediction (++, better with guidance) or the noise prediction.",
                ),
                _solver_type(),
                io.Combo.Input(
                    "spacing",
                    options=["paper", "given"],
                    default="paper",
                    tooltip="paper: keep the first and last noise level of sigmas and space the calls evenly in "
                    "log-SNR. given: call the model at the levels of sigmas.",
                ),
            ],
            outputs=[io.Sampler.Output(tooltip="For SamplerCustom or SamplerCustomAdvanced.")],
        )

    @classmethod
    def execute(cls, order, algorithm, solver_type, spacing) -> io.NodeOutput:
        from diffusers_ext.schedulers.dpm_solver import sample_dpm_solver_fast

        options = {"order": order, "algorithm_type": algorithm, "solver_type": solver_type, "spacing": spacing}
        return io.NodeOutput(comfy.samplers.KSAMPLER(sample_dpm_solver_fast, options))


class DXDPMSolverAdaptivePP(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="DXDPMSolverAdaptivePP",
            display_name="DPM-Solver++ Adaptive",
            category="diffusers-ext/schedulers",
            description="Chooses its own steps between the first and the last noise level, as many as the tolerance "
            "needs. Data form (++), where core's dpm_adaptive takes the noise form.",
            search_aliases=["dpm adaptive", "dpm-solver++", "adaptive step size", "sampler"],
            inputs=[
                io.Int.Input(
                    "order", default=3, min=2, max=3, tooltip="Model calls per step; compared with one less."
                ),
                io.Float.Input(
                    "rtol",
                    default=0.05,
                    min=0.0001,
                    max=1.0,
                    step=0.005,
                    tooltip="Error allowed per step, relative to the sample. Smaller: more calls, closer to the ODE.",
                ),
                io.Float.Input(
                    "atol",
                    default=0.0078,
                    min=0.0001,
                    max=1.0,
                    step=0.001,
                    tooltip="Error always allowed; 0.0078 is 2 of 256 grey levels.",
                ),
                _solver_type(),
            ],
            outputs=[io.Sampler.Output(tooltip="For SamplerCustom. Its steps are not those of sigmas.")],
        )

    @classmethod
    def execute(cls, order, rtol, atol, solver_type) -> io.NodeOutput:
        from diffusers_ext.schedulers.dpm_solver_adaptive import sample_dpm_solver_adaptive

        options = {"order": order, "rtol": rtol, "atol": atol, "solver_type": solver_type}
        return io.NodeOutput(comfy.samplers.KSAMPLER(sample_dpm_solver_adaptive, options))


NODES = [DXDPMSolverFastExact, DXDPMSolverAdaptivePP]
