"""DPM-Solver-v3: measure a model's statistics, sample with them, keep them in files."""

from __future__ import annotations

import comfy.model_management
import comfy.samplers
import comfy.utils
import torch
from comfy_api.latest import io, ui

from ._files import SavedFiles, check_name
from ._inputs import name_input


EMSType = io.Custom("DX_EMS")
CATEGORY = "diffusers-ext/schedulers"
FILES = SavedFiles("ems", ".safetensors", "statistics file")


def _measure(guider: comfy.samplers.CFGGuider, latents: torch.Tensor, options: dict):
    """Statistics of a guider's model, with ComfyUI's progress bar and interruption."""
    from diffusers_ext.schedulers._ems import native_ems

    found, bar = [], comfy.utils.ProgressBar(options["num_grid"] + 1)

    def on_grid_point(n: int) -> None:
        bar.update(1)
        comfy.model_management.throw_exception_if_processing_interrupted()

    def measure(model, x, sigmas, extra_args=None, callback=None, disable=None):
        found.append(native_ems(model, x, extra_args, on_grid_point=on_grid_point, **options))
        return x

    # at noise level 0 the measuring "sampler" gets the latents as the model sees them
    guider.sample(torch.zeros_like(latents), latents, comfy.samplers.KSAMPLER(measure), torch.zeros(2), seed=0)
    return found[0]


class DXDPMv3ComputeEMS(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="DXDPMv3ComputeEMS",
            display_name="DPM-Solver-v3: Compute Statistics",
            category=CATEGORY,
            description="Measures the statistics of a model that let DPM-Solver-v3 take fewer steps. Takes minutes, "
            "once for a model and a cfg: save the result.",
            search_aliases=["ems", "empirical model statistics", "dpm solver v3", "calibrate"],
            inputs=[
                io.Model.Input("model", tooltip="The model to measure."),
                io.Conditioning.Input("positive", tooltip="Prompt that describes the latents."),
                io.Conditioning.Input("negative", tooltip="Prompt of the unconditional branch."),
                io.Latent.Input("latents", tooltip="A batch of clean latents, e.g. encoded pictures; 50 or more."),
                io.Float.Input(
                    "cfg", default=7.0, min=0.0, max=100.0, step=0.1, tooltip="The cfg you will sample with."
                ),
                io.Int.Input("grid", default=40, min=10, max=2000, tooltip="Noise levels measured, minus one."),
                io.Combo.Input(
                    "reduce",
                    options=["scalar", "channel", "element"],
                    tooltip="One curve for all (any size, about 50 latents), one per channel (some hundred latents), "
                    "or one per element (this size only, a thousand latents).",
                ),
                io.Int.Input("batch_size", default=8, min=1, max=1024, tooltip="Latents per model call."),
                io.Int.Input("seed", default=0, min=0, max=2**63 - 1, tooltip="Seed of the noise."),
            ],
            outputs=[EMSType.Output(display_name="EMS", tooltip="For the DPM-Solver-v3 sampler, or to be saved.")],
        )

    @classmethod
    def execute(cls, model, positive, negative, latents, cfg, grid, reduce, batch_size, seed) -> io.NodeOutput:
        guider = comfy.samplers.CFGGuider(model)
        guider.set_conds(positive, negative)
        guider.set_cfg(cfg)
        options = {"num_grid": grid, "reduce": reduce, "batch_size": batch_size, "seed": seed, "guidance_scale": cfg}
        return io.NodeOutput(_measure(guider, latents["samples"], options))


class DXDPMv3Sampler(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="DXDPMv3Sampler",
            display_name="DPM-Solver-v3 Sampler",
            category=CATEGORY,
            description="Few-step sampler that adapts to the model through its statistics. Without statistics it is "
            "DPM-Solver++ as a predictor-corrector.",
            search_aliases=["dpm solver v3", "dpmpp", "unipc", "few steps", "sampler"],
            inputs=[
                EMSType.Input("ems", optional=True, tooltip="Statistics of this model at the cfg you sample with."),
                io.Int.Input("order", default=2, min=1, max=3, tooltip="2 with cfg, 3 without."),
                io.Boolean.Input("corrector", default=True, tooltip="Correct every point with its own evaluation."),
                io.Boolean.Input(
                    "half_corrector", default=False, tooltip="Correct only the noisier half of time; for high cfg."
                ),
            ],
            outputs=[io.Sampler.Output(tooltip="For SamplerCustom or SamplerCustomAdvanced, with any sigmas.")],
        )

    @classmethod
    def execute(cls, order, corrector, half_corrector, ems=None) -> io.NodeOutput:
        from diffusers_ext.schedulers.dpm_solver_v3 import sample_dpm_solver_v3

        options = {"solver_order": order, "use_corrector": corrector, "half_corrector": half_corrector, "ems": ems}
        return io.NodeOutput(comfy.samplers.KSAMPLER(sample_dpm_solver_v3, options))


class DXSaveEMS(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="DXSaveEMS",
            display_name="DPM-Solver-v3: Save Statistics",
            category=CATEGORY,
            description="Saves statistics as output/ems/<name>.safetensors. Move the file to models/ems to keep it.",
            search_aliases=["ems", "save statistics"],
            inputs=[
                EMSType.Input("ems", tooltip="Statistics to save."),
                name_input(),
            ],
            outputs=[],
            is_output_node=True,
        )

    @classmethod
    def validate_inputs(cls, name):
        """Only a plain file name: nothing is written outside the output folder."""
        return check_name(name)

    @classmethod
    def execute(cls, ems, name) -> io.NodeOutput:
        path = FILES.new(name)
        ems.save(path)
        return io.NodeOutput(ui=ui.PreviewText(f"saved {path.name}: {ems.metadata}"))


class DXLoadEMS(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="DXLoadEMS",
            display_name="DPM-Solver-v3: Load Statistics",
            category=CATEGORY,
            description="Loads statistics from models/ems or output/ems.",
            search_aliases=["ems", "load statistics"],
            inputs=[io.Combo.Input("name", options=FILES.options(), tooltip="File in one of the folders.")],
            outputs=[EMSType.Output(display_name="EMS", tooltip="For the DPM-Solver-v3 sampler.")],
        )

    @classmethod
    def execute(cls, name) -> io.NodeOutput:
        from diffusers_ext import EMS

        return io.NodeOutput(EMS.load(FILES.find(name)))


NODES = [DXDPMv3ComputeEMS, DXDPMv3Sampler, DXSaveEMS, DXLoadEMS]
