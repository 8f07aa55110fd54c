"""USF: sample with a solver schedule, search one."""

from __future__ import annotations

import comfy.model_management
import comfy.sample
import comfy.samplers
import comfy.utils
import torch
from comfy_api.latest import io

from ._files import SavedFiles, check_name
from ._inputs import name_input, seed_input
from .schedulers import EMSType


SCHEDULE = io.Custom("DX_SOLVER_SCHEDULE")
CATEGORY = "diffusers-ext/schedulers"
FILES = SavedFiles("usf", ".json", "solver schedule")
SOLVERS = ["dpmpp_2m", "dpmpp_2m_taylor", "dpmpp_3m", "unipc", "unipc_bh1", "unipc_bh2", "ddim", "dpm_2m"]


def _schedule(sampling, solver: str, spacing: str, steps: int):
    """The schedule of a file, or a named solver on ComfyUI's noise levels."""
    from diffusers_ext.schedulers._native import native_schedule
    from diffusers_ext.schedulers.usf_s3 import SolverSchedule, preset_of_sigmas

    if solver in SOLVERS:
        sigmas = comfy.samplers.calculate_sigmas(sampling, spacing, steps).tolist()
        return preset_of_sigmas(solver, sigmas, native_schedule(sampling))
    return SolverSchedule.load(FILES.find(solver))


class DXUSFSampler(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="DXUSFSampler",
            display_name="USF Sampler",
            category=CATEGORY,
            description="Sampler and noise levels of a solver schedule, in which every step has its own solver: a "
            "searched one, a file from models/usf, or a named solver.",
            search_aliases=["usf", "s3", "solver schedule", "solver search", "dpmpp", "unipc"],
            inputs=[
                io.Model.Input("model", tooltip="The model that will be sampled; decides the noise levels."),
                io.Combo.Input(
                    "solver",
                    options=[*SOLVERS, *FILES.by_name()],
                    default="dpmpp_2m",
                    tooltip="A named solver, or a file of models/usf or output/usf. `searched` wins if connected.",
                ),
                io.Int.Input("steps", default=8, min=1, max=1000, tooltip="Steps of a named solver."),
                io.Combo.Input(
                    "spacing",
                    options=list(comfy.samplers.SCHEDULER_NAMES),
                    default="normal",
                    tooltip="Noise levels of a named solver.",
                ),
                SCHEDULE.Input("searched", optional=True, tooltip="Result of USF Search, instead of solver."),
                EMSType.Input(
                    "ems",
                    optional=True,
                    tooltip="Statistics of this model, for schedules that were searched with them.",
                ),
            ],
            outputs=[
                io.Sampler.Output(tooltip="For SamplerCustom, together with the sigmas of this node."),
                io.Sigmas.Output(tooltip="Noise levels of the solver schedule."),
            ],
        )

    @classmethod
    def execute(cls, model, solver, steps, spacing, searched=None, ems=None) -> io.NodeOutput:
        from diffusers_ext.schedulers._native import native_schedule
        from diffusers_ext.schedulers.usf_s3 import native_sigmas, sample_usf

        sampling = model.get_model_object("model_sampling")
        chosen = searched or _schedule(sampling, solver, spacing, steps)
        sampler = comfy.samplers.KSAMPLER(sample_usf, {"solver_schedule": chosen, "ems": ems})
        return io.NodeOutput(sampler, native_sigmas(chosen, native_schedule(sampling)))


def _search(guider, latent, sampling, calls: int, evaluations: int, seed: int, **options):
    """Search on a guider's model, with ComfyUI's progress bar and interruption."""
    from diffusers_ext.schedulers.usf_s3 import search_native

    found, bar = [], comfy.utils.ProgressBar(evaluations)

    def on_evaluation(n: int) -> None:
        bar.update(1)
        comfy.model_management.throw_exception_if_processing_interrupted()

    starts = {n: comfy.samplers.calculate_sigmas(sampling, "normal", n).tolist() for n in (calls, 4 * calls + 10)}

    def search(model, x, sigmas, extra_args=None, callback=None, disable=None):
        found.append(search_native(model, x, extra_args, starts, calls, evaluations, seed, on_evaluation, **options))
        return x

    noise = comfy.sample.prepare_noise(latent["samples"], seed)
    start = comfy.samplers.calculate_sigmas(sampling, "normal", calls)
    guider.sample(noise, torch.zeros_like(noise), comfy.samplers.KSAMPLER(search), start, seed=seed)
    return found[0]


class DXUSFSearch(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="DXUSFSearch",
            display_name="USF Search",
            category=CATEGORY,
            description="Searches the solver schedule that comes nearest to many steps with a given number of model "
            "calls, and saves it as output/usf/<name>.json.",
            search_aliases=["usf", "s3", "solver search", "calibrate", "few steps"],
            inputs=[
                io.Model.Input("model", tooltip="The model to search for."),
                io.Conditioning.Input("positive", tooltip="A typical prompt."),
                io.Conditioning.Input("negative", tooltip="Negative prompt."),
                io.Latent.Input("latent", tooltip="Empty latents of the size you sample; 4 or more of them."),
                io.Float.Input(
                    "cfg", default=7.0, min=0.0, max=100.0, step=0.1, tooltip="The cfg you will sample with."
                ),
                io.Int.Input("calls", default=5, min=3, max=12, tooltip="Model calls of the schedule."),
                io.Int.Input("evaluations", default=60, min=4, max=10000, tooltip="Schedules to try."),
                seed_input("Seed of noise and search."),
                name_input(),
                io.Int.Input(
                    "screen",
                    default=4,
                    min=1,
                    max=64,
                    tooltip="Candidates that a small predictor looks at for each schedule that is tried, from the "
                    "20th on; 1 tries every candidate.",
                    advanced=True,
                ),
                EMSType.Input(
                    "ems",
                    optional=True,
                    tooltip="Statistics of this model; lets the search use DPM-Solver-v3's steps.",
                ),
            ],
            outputs=[SCHEDULE.Output(display_name="searched", tooltip="For the USF Sampler.")],
        )

    @classmethod
    def validate_inputs(cls, name):
        """Only a plain file name: nothing is written outside the output folder."""
        return check_name(name)

    @classmethod
    def execute(
        cls, model, positive, negative, latent, cfg, calls, evaluations, seed, name, screen=4, ems=None
    ) -> io.NodeOutput:
        guider = comfy.samplers.CFGGuider(model)
        guider.set_conds(positive, negative)
        guider.set_cfg(cfg)
        sampling, options = model.get_model_object("model_sampling"), {"screen": screen, "ems": ems}
        found = _search(guider, latent, sampling, calls, evaluations, seed, **options)
        found.save(FILES.new(name))
        return io.NodeOutput(found)


NODES = [DXUSFSampler, DXUSFSearch]
