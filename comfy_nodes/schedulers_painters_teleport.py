"""Analytical teleportation: statistics of latents, and the first steps of a run in closed form."""

from __future__ import annotations

import comfy.sample
from comfy_api.latest import io

from ._files import SavedFiles, check_name
from ._inputs import name_input


STATS = io.Custom("DX_GAUSSIAN_STATS")
CATEGORY = "diffusers-ext/schedulers"
FILES = SavedFiles("gaussian_stats", ".safetensors", "statistics file")


def _statistics(file: str, stats):
    from diffusers_ext import GaussianStatistics

    return GaussianStatistics.load(FILES.find(file)) if stats is None else stats


class DXGaussianStatsFromLatents(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="DXGaussianStatsFromLatents",
            display_name="Gaussian Stats From Latents",
            category=CATEGORY,
            description="Mean and principal components of a batch of clean latents, for Analytic Teleport. Saved as "
            "output/gaussian_stats/<name>.safetensors.",
            search_aliases=["teleport", "gaussian", "pca", "covariance", "statistics", "calibrate"],
            inputs=[
                io.Model.Input("model", tooltip="The model the latents belong to; decides their scaling."),
                io.Latent.Input(
                    "latents",
                    tooltip="Clean latents of one prompt and size: drawn with the cfg you sample with, or encoded.",
                ),
                io.Int.Input(
                    "rank",
                    default=6,
                    min=0,
                    max=1024,
                    tooltip="Components to keep: a tenth of the batch or fewer. 0 (the mean alone) with cfg.",
                ),
                io.Float.Input(
                    "shrinkage",
                    default=0.0,
                    min=0.0,
                    max=0.99,
                    step=0.01,
                    tooltip="Draws the variances towards their mean; for few latents.",
                    advanced=True,
                ),
                name_input("my-prompt"),
            ],
            outputs=[STATS.Output(display_name="stats", tooltip="For Analytic Teleport.")],
        )

    @classmethod
    def validate_inputs(cls, name):
        """Only a plain file name: nothing is written outside the output folder."""
        return check_name(name)

    @classmethod
    def execute(cls, model, latents, rank, shrinkage, name) -> io.NodeOutput:
        from diffusers_ext import GaussianStatistics

        scaled = model.model.process_latent_in(latents["samples"])
        stats = GaussianStatistics.from_latents(scaled, rank, shrinkage)
        stats.save(FILES.new(name))
        return io.NodeOutput(stats)


class DXAnalyticTeleport(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="DXAnalyticTeleport",
            display_name="Analytic Teleport",
            category=CATEGORY,
            description="Replaces the first steps of a run by their closed form. Connect both outputs to "
            "SamplerCustomAdvanced, with DisableNoise as its noise.",
            search_aliases=["teleport", "skip steps", "gaussian", "accelerate"],
            inputs=[
                io.Model.Input("model", tooltip="The model that will be sampled; decides scaling and noise levels."),
                io.Noise.Input("noise", tooltip="RandomNoise: its seed decides the picture, as without teleport."),
                io.Sigmas.Input("sigmas", tooltip="Noise levels of the whole run, from pure noise."),
                io.Latent.Input("latent_image", tooltip="Empty latents of the size of the statistics."),
                io.Int.Input(
                    "skip", default=5, min=1, max=1000, tooltip="Steps to leave out: about a quarter of the run."
                ),
                io.Combo.Input(
                    "file",
                    options=FILES.options(),
                    tooltip="Statistics of models/gaussian_stats or output/gaussian_stats; not used if stats is "
                    "connected.",
                ),
                STATS.Input("stats", optional=True, tooltip="From Gaussian Stats From Latents, instead of a file."),
            ],
            outputs=[
                io.Latent.Output(display_name="latent", tooltip="Latents that already hold their noise."),
                io.Sigmas.Output(display_name="sigmas", tooltip="The noise levels that are left."),
            ],
        )

    @classmethod
    def execute(cls, model, noise, sigmas, latent_image, skip, file, stats=None) -> io.NodeOutput:
        from diffusers_ext.schedulers.painters_teleport import teleport_native

        statistics, empty = _statistics(file, stats), latent_image["samples"]
        empty = comfy.sample.fix_empty_latent_channels(
            model, empty, latent_image.get("downscale_ratio_spacial"), latent_image.get("downscale_ratio_temporal")
        )
        started = noise.generate_noise({"samples": empty})
        x = teleport_native(statistics, model.get_model_object("model_sampling"), started, sigmas, skip)
        return io.NodeOutput({"samples": model.model.process_latent_out(x)}, sigmas[skip:])


NODES = [DXGaussianStatsFromLatents, DXAnalyticTeleport]
