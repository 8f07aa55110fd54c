"""DPM-OT: fit a transport from noise to noisy latents, begin a run at what it chooses."""

from __future__ import annotations

from pathlib import Path

import comfy.model_management
import comfy.utils
import torch
from comfy_api.latest import io

from ._files import SavedFiles, check_name
from ._inputs import name_input, seed_input


OT_MAP = io.Custom("DX_OT_MAP")
CATEGORY = "diffusers-ext/schedulers"
FILES = SavedFiles("ot_maps", ".safetensors", "map")


def _map(file: str, ot_map):
    from diffusers_ext import SemiDiscreteOT

    return SemiDiscreteOT.load(FILES.find(file)) if ot_map is None else ot_map


def _sigma(sigmas: torch.Tensor, steps_left: int) -> torch.Tensor:
    if not 0 < steps_left < len(sigmas):
        raise ValueError(f"steps_left is {steps_left}; with {len(sigmas) - 1} steps it must be 1 to {len(sigmas) - 1}")
    return sigmas[-1 - steps_left]


def _fit(ot, iterations: int, seed: int, unfinished: Path):
    """Fit with ComfyUI's progress bar and interruption; the next run goes on where this one was stopped."""
    bar = comfy.utils.ProgressBar(iterations)

    def on_iteration(done: int) -> None:
        bar.update_absolute(done)
        comfy.model_management.throw_exception_if_processing_interrupted()

    ot.fit(iterations, seed=seed, checkpoint=unfinished, progress=False, on_iteration=on_iteration)
    unfinished.unlink(missing_ok=True)
    return ot


class DXOTFit(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="DXOTFit",
            display_name="OT Fit",
            category=CATEGORY,
            description="Puts noise on clean latents and fits an optimal transport from pure noise to them, for OT "
            "Start Latent. Saved as output/ot_maps/<name>.safetensors; an interrupted fit goes on when run again.",
            search_aliases=["dpm-ot", "optimal transport", "brenier", "few steps", "calibrate"],
            inputs=[
                io.Model.Input("model", tooltip="The model the latents belong to; decides their scaling."),
                io.Latent.Input(
                    "latents", tooltip="Clean latents of one prompt and size: hundreds, drawn or encoded."
                ),
                io.Sigmas.Input("sigmas", tooltip="Noise levels of the whole run."),
                io.Int.Input(
                    "steps_left", default=10, min=1, max=1000, tooltip="Steps before the end at which runs will begin."
                ),
                io.Int.Input(
                    "iterations",
                    default=500,
                    min=1,
                    max=10000,
                    tooltip="At most; a good fit stops earlier.",
                ),
                seed_input("Seed of the noise put on the latents and of the fit.", largest=2**31 - 1),
                name_input("my-prompt"),
            ],
            outputs=[OT_MAP.Output(display_name="ot_map", tooltip="For OT Start Latent.")],
        )

    @classmethod
    def validate_inputs(cls, name):
        """Only a plain file name: nothing is written outside the output folder."""
        return check_name(name)

    @classmethod
    def execute(cls, model, latents, sigmas, steps_left, iterations, seed, name) -> io.NodeOutput:
        from diffusers_ext import SemiDiscreteOT
        from diffusers_ext.schedulers._start import native_level

        level = native_level(model.get_model_object("model_sampling"), _sigma(sigmas, steps_left))
        clean, path = model.model.process_latent_in(latents["samples"]), FILES.new(name)
        ot = SemiDiscreteOT.from_latents(clean, level, seed)
        _fit(ot, iterations, seed, path.with_suffix(".unfinished")).save(path)
        return io.NodeOutput(ot)


class DXOTStartLatent(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="DXOTStartLatent",
            display_name="OT Start Latent",
            category=CATEGORY,
            description="Sends noise to the noisy latents of a transport and returns them with the noise levels that "
            "are left. Connect both to SamplerCustomAdvanced, with DisableNoise as its noise.",
            search_aliases=["dpm-ot", "optimal transport", "skip steps", "few steps"],
            inputs=[
                io.Model.Input("model", tooltip="The model that will be sampled; decides scaling and noise levels."),
                io.Sigmas.Input("sigmas", tooltip="Noise levels of the whole run."),
                io.Int.Input(
                    "steps_left",
                    default=11,
                    min=1,
                    max=1000,
                    tooltip="Steps to make. As many as in OT Fit: the latents as they are. More: noise is added, so "
                    "that pictures differ.",
                ),
                io.Int.Input("batch_size", default=1, min=1, max=4096, tooltip="Pictures."),
                io.Int.Input(
                    "topk",
                    default=1,
                    min=1,
                    max=16,
                    tooltip="1: one stored latent for each picture. More: mixes of neighbours of one mode.",
                    advanced=True,
                ),
                seed_input("Seed of the noise.", largest=2**63 - 2),
                io.Combo.Input(
                    "file",
                    options=FILES.options(),
                    tooltip="Map of models/ot_maps or output/ot_maps; not used if ot_map is connected.",
                ),
                OT_MAP.Input("ot_map", optional=True, tooltip="From OT Fit, instead of a file."),
            ],
            outputs=[
                io.Latent.Output(display_name="latent", tooltip="Latents that already hold their noise."),
                io.Sigmas.Output(display_name="sigmas", tooltip="The noise levels that are left."),
            ],
        )

    @classmethod
    def execute(cls, model, sigmas, steps_left, batch_size, topk, seed, file, ot_map=None) -> io.NodeOutput:
        from diffusers_ext.schedulers.dpm_ot import start_native

        ot, first = _map(file, ot_map), _sigma(sigmas, steps_left)
        shape = (batch_size, *ot.targets.shape[1:])
        noise = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
        x = start_native(ot, model.get_model_object("model_sampling"), first, noise, seed, topk)
        return io.NodeOutput({"samples": model.model.process_latent_out(x)}, sigmas[-1 - steps_left :])


NODES = [DXOTFit, DXOTStartLatent]
