"""OLSS: fit a few steps to many, sample with them."""

from __future__ import annotations

import comfy.model_management
import comfy.sample
import comfy.samplers
import comfy.utils
import torch
from comfy_api.latest import io

from ._files import SavedFiles, check_name
from ._inputs import name_input, seed_input


COEFFICIENTS = io.Custom("DX_OLSS_COEFFS")
CATEGORY = "diffusers-ext/schedulers"
FILES = SavedFiles("olss", ".json", "OLSS coefficients")


def _coefficients(file: str, fitted):
    from diffusers_ext.schedulers.olss import OLSSCoefficients

    return fitted or OLSSCoefficients.load(FILES.find(file))


def _fit(guider, latent, sigmas, steps: int, path: str, ridge: float, seed: int):
    """Record a guider's model with ComfyUI's progress bar and interruption, then fit."""
    from diffusers_ext.schedulers.olss import fit_native

    found, bar = [], comfy.utils.ProgressBar(len(sigmas) - 1)

    def on_step(i: int) -> None:
        bar.update(1)
        comfy.model_management.throw_exception_if_processing_interrupted()

    def record(model, x, sigmas, extra_args=None, callback=None, disable=None):
        found.append(fit_native(model, x, sigmas, extra_args, steps, on_step, path=path, ridge=ridge))
        return x

    noise = comfy.sample.prepare_noise(latent["samples"], seed)
    guider.sample(noise, torch.zeros_like(noise), comfy.samplers.KSAMPLER(record), sigmas, seed=seed)
    return found[0]


class DXOLSSFit(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="DXOLSSFit",
            display_name="OLSS Fit",
            category=CATEGORY,
            description="Samples a batch with many steps and fits a few steps to it by least squares. Saved as "
            "output/olss/<name>.json.",
            search_aliases=["olss", "optimal linear subspace search", "calibrate", "few steps"],
            inputs=[
                io.Model.Input("model", tooltip="The model to fit steps for."),
                io.Conditioning.Input("positive", tooltip="A typical prompt."),
                io.Conditioning.Input("negative", tooltip="Negative prompt."),
                io.Float.Input(
                    "cfg", default=7.0, min=0.0, max=100.0, step=0.1, tooltip="The cfg you will sample with."
                ),
                io.Latent.Input("latent", tooltip="Empty latents of the size you sample; 8 or more of them."),
                io.Sigmas.Input(
                    "sigmas", tooltip="Noise levels of the teacher, e.g. 50 or 100 steps; from pure noise."
                ),
                io.Int.Input("steps", default=8, min=1, max=100, tooltip="Steps to fit."),
                io.Combo.Input(
                    "path",
                    options=["search", "uniform"],
                    default="search",
                    tooltip="Which teacher steps to visit: the best ones, or every so many.",
                ),
                io.Float.Input(
                    "ridge",
                    default=1e-6,
                    min=0.0,
                    max=1.0,
                    step=0.0000001,
                    tooltip="Keeps coefficients small. 0 is the published fit, which can blow up from 10 steps on.",
                    advanced=True,
                ),
                seed_input("Seed of the noise."),
                name_input(),
            ],
            outputs=[COEFFICIENTS.Output(display_name="coefficients", tooltip="For OLSS Sampler and OLSS Sigmas.")],
        )

    @classmethod
    def validate_inputs(cls, name):
        """Only a plain file name: nothing is written outside the output folder."""
        return check_name(name)

    @classmethod
    def execute(cls, model, positive, negative, cfg, latent, sigmas, steps, path, ridge, seed, name) -> io.NodeOutput:
        guider = comfy.samplers.CFGGuider(model)
        guider.set_conds(positive, negative)
        guider.set_cfg(cfg)
        fitted = _fit(guider, latent, sigmas, steps, path, ridge, seed)
        fitted.save(FILES.new(name))
        return io.NodeOutput(fitted)


def _choice() -> list:
    return [
        io.Combo.Input(
            "file",
            options=FILES.options(),
            tooltip="Coefficients of models/olss or output/olss; not used if coefficients is connected.",
        ),
        COEFFICIENTS.Input("coefficients", optional=True, tooltip="Result of OLSS Fit, instead of a file."),
    ]


class DXOLSSSampler(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="DXOLSSSampler",
            display_name="OLSS Sampler",
            category=CATEGORY,
            description="Samples with fitted steps. Use it with the noise levels of OLSS Sigmas and an empty latent.",
            search_aliases=["olss", "sampler", "few steps"],
            inputs=_choice(),
            outputs=[io.Sampler.Output(tooltip="For SamplerCustom, together with OLSS Sigmas.")],
        )

    @classmethod
    def execute(cls, file, coefficients=None) -> io.NodeOutput:
        from diffusers_ext.schedulers.olss import sample_olss

        options = {"coefficients": _coefficients(file, coefficients)}
        return io.NodeOutput(comfy.samplers.KSAMPLER(sample_olss, options))


class DXOLSSSigmas(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="DXOLSSSigmas",
            display_name="OLSS Sigmas",
            category=CATEGORY,
            description="The noise levels that fitted steps visit.",
            search_aliases=["olss", "sigmas", "scheduler"],
            inputs=_choice(),
            outputs=[io.Sigmas.Output(tooltip="For SamplerCustom, together with the OLSS Sampler.")],
        )

    @classmethod
    def execute(cls, file, coefficients=None) -> io.NodeOutput:
        return io.NodeOutput(torch.tensor(_coefficients(file, coefficients).timesteps, dtype=torch.float32))


NODES = [DXOLSSFit, DXOLSSSampler, DXOLSSSigmas]
