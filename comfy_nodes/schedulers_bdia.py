"""BDIA: a sampler that can be inverted exactly, its inversion, and sampling from an inverted pair."""

from __future__ import annotations

import comfy.sample
import comfy.samplers
import torch
from comfy_api.latest import io


LatentPair = io.Custom("LATENT_PAIR")


def _gamma(minimum: float) -> io.Float.Input:
    return io.Float.Input(
        "gamma",
        default=1.0,
        min=minimum,
        max=1.0,
        step=0.05,
        tooltip="1: fully symmetric, for 40 steps and for inversion. 0.5: for sampling at 10 steps. 0: DDIM.",
    )


def _conditioning(way: str) -> list:
    return [
        io.Conditioning.Input("positive", tooltip=f"Prompt of the {way}."),
        io.Conditioning.Input("negative", tooltip="Negative prompt."),
        io.Float.Input("cfg", default=1.0, min=0.0, max=100.0, step=0.1, tooltip="Guidance scale. Keep it the same "
                       "both ways to get the picture back."),
    ]  # fmt: skip


def _run(model, positive, negative, cfg, sigmas, latent, sampler) -> torch.Tensor:
    """ComfyUI's own sampling code with `sampler` on a latent without added noise."""
    import latent_preview

    callback = latent_preview.prepare_callback(model, len(sigmas) - 1)
    noise = torch.zeros_like(latent)
    return comfy.sample.sample_custom(
        model, noise, cfg, sampler, sigmas, positive, negative, latent, callback=callback, seed=0
    )


class DXBDIASampler(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="DXBDIASampler",
            display_name="BDIA Sampler",
            category="diffusers-ext/schedulers",
            description="A two-step DDIM that is symmetric in time. Better than DDIM at few steps, one model call per "
            "step, no noise added.",
            search_aliases=["bdia", "ddim", "exact inversion", "sampler"],
            inputs=[_gamma(0.0)],
            outputs=[io.Sampler.Output(tooltip="For SamplerCustom or SamplerCustomAdvanced.")],
        )

    @classmethod
    def execute(cls, gamma) -> io.NodeOutput:
        from diffusers_ext.schedulers.bdia_native import sample_bdia

        return io.NodeOutput(comfy.samplers.KSAMPLER(sample_bdia, {"gamma": gamma}))


class DXBDIAInvert(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="DXBDIAInvert",
            display_name="BDIA Invert",
            category="diffusers-ext/schedulers",
            description="Takes the latent of a picture back to noise, exactly: BDIA Sample From Pair with the same "
            "prompt returns the same latent, with another prompt an edit.",
            search_aliases=["bdia", "exact inversion", "unsampler", "edit"],
            inputs=[
                io.Model.Input("model", tooltip="The denoiser."),
                *_conditioning("picture as it is"),
                io.Sigmas.Input("sigmas", tooltip="Noise levels as for sampling; the low part only (SplitSigmas) goes "
                                "back less far and keeps more of the picture."),
                io.Latent.Input("latent_image", tooltip="Latent of the picture."),
                _gamma(0.05),
            ],
            outputs=[LatentPair.Output(display_name="pair", tooltip="Two latents at consecutive noise levels; the "
                                       "way back needs both.")],
        )  # fmt: skip

    @classmethod
    def execute(cls, model, positive, negative, cfg, sigmas, latent_image, gamma) -> io.NodeOutput:
        from diffusers_ext.schedulers.bdia_native import invert_bdia

        latent, found = comfy.sample.fix_empty_latent_channels(model, latent_image["samples"]), []

        def backwards(model, x, rising, extra_args=None, callback=None, disable=None):
            found.extend(invert_bdia(model, x, rising.flip(0), extra_args, callback, gamma))
            return x

        # rising levels, for ComfyUI scales the latent as at the first one
        _run(model, positive, negative, cfg, sigmas.flip(0), latent, comfy.samplers.KSAMPLER(backwards))
        return io.NodeOutput({"pair": tuple(found), "sigmas": sigmas, "gamma": gamma})


class DXBDIASampleFromPair(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="DXBDIASampleFromPair",
            display_name="BDIA Sample From Pair",
            category="diffusers-ext/schedulers",
            description="Samples from what BDIA Invert found: with the prompt of the inversion the original latent, "
            "with another prompt an edit of it.",
            search_aliases=["bdia", "exact inversion", "resample", "edit"],
            inputs=[
                io.Model.Input("model", tooltip="The denoiser of the inversion."),
                *_conditioning("picture as it should be"),
                LatentPair.Input("pair", tooltip="From BDIA Invert; brings its noise levels and gamma along."),
            ],
            outputs=[io.Latent.Output(tooltip="The clean latent.")],
        )

    @classmethod
    def execute(cls, model, positive, negative, cfg, pair) -> io.NodeOutput:
        from diffusers_ext.schedulers.bdia_native import sample_bdia

        sampler = comfy.samplers.KSAMPLER(sample_bdia, {"gamma": pair["gamma"], "pair": pair["pair"]})
        empty = torch.zeros_like(pair["pair"][0], dtype=torch.float32, device="cpu")
        return io.NodeOutput({"samples": _run(model, positive, negative, cfg, pair["sigmas"], empty, sampler)})


NODES = [DXBDIASampler, DXBDIAInvert, DXBDIASampleFromPair]
