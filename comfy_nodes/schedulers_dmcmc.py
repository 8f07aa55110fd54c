"""Denoising MCMC: start Markov chains of latents, and take pictures from them."""

from __future__ import annotations

import comfy.model_management
import comfy.sample
import comfy.samplers
import comfy.utils
import torch
from comfy_api.latest import io

from ._inputs import seed_input


CATEGORY = "diffusers-ext/schedulers"
CHAIN = io.Custom("DX_DLG_CHAIN")


def _conditioning() -> list:
    return [
        io.Model.Input("model", tooltip="The denoiser."),
        io.Conditioning.Input("positive", tooltip="Prompt of all chains."),
        io.Conditioning.Input("negative", tooltip="Negative prompt."),
        io.Float.Input("cfg", default=7.0, min=0.0, max=100.0, step=0.1, tooltip="Guidance scale."),
    ]


def _drive(model, positive, negative, cfg, latent: torch.Tensor, run):
    """ComfyUI's own sampling code around `run(model function, x, extra_args)`; its result, brought out of it."""
    guider, found = comfy.samplers.CFGGuider(model), []
    guider.set_conds(positive, negative)
    guider.set_cfg(cfg)

    def sampler(model, x, sigmas, extra_args=None, callback=None, disable=None):
        found.append(run(model, x, extra_args))
        return x

    sigmas = torch.tensor([float(model.get_model_object("model_sampling").sigma_max), 0.0])
    guider.sample(torch.zeros_like(latent), latent, comfy.samplers.KSAMPLER(sampler), sigmas, seed=0)
    return found[0]


def _ticks(count: int):
    bar = comfy.utils.ProgressBar(count)

    def tick(*_):
        bar.update(1)
        comfy.model_management.throw_exception_if_processing_interrupted()

    return tick


class DXDLGChainInit(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="DXDLGChainInit",
            display_name="DLG Chain Init",
            category=CATEGORY,
            description="Starts Markov chains of noisy latents near a prompt's pictures. DLG Sample takes pictures "
            "from them, at fewer model calls each than sampling from noise.",
            search_aliases=["dmcmc", "denoising mcmc", "langevin gibbs", "markov chain"],
            inputs=[
                *_conditioning(),
                io.Latent.Input("latent", tooltip="Empty latents; each of the batch is one chain. Take 4 or more."),
                seed_input("Of everything random, in DLG Sample too."),
                io.Float.Input(
                    "eta",
                    default=0.8,
                    min=0.001,
                    max=100.0,
                    step=0.01,
                    tooltip="Step size. Larger: pictures of a chain differ more, and start from more noise.",
                ),
                io.Combo.Input(
                    "sigma_update",
                    options=["argmax", "sample"],
                    default="argmax",
                    tooltip="The noise level of a chain: the most likely one (the authors'), or one drawn.",
                    advanced=True,
                ),
                io.Int.Input(
                    "training_steps",
                    default=1000,
                    min=100,
                    max=20000,
                    tooltip="Of the small network that reads noise levels; it learns from the first samples.",
                    advanced=True,
                ),
            ],
            outputs=[CHAIN.Output(display_name="chain", tooltip="For DLG Sample.")],
        )

    @classmethod
    def execute(cls, model, positive, negative, cfg, latent, seed, eta, sigma_update, training_steps) -> io.NodeOutput:
        from diffusers_ext.schedulers.dmcmc_native import init_calls, init_native, native_config

        empty = torch.zeros_like(comfy.sample.fix_empty_latent_channels(model, latent["samples"]))

        def run(function, x, extra):
            config = native_config(function, eta=eta, sigma_update=sigma_update)
            tick = _ticks(init_calls(config) + training_steps)
            state, classifier = init_native(
                function, x.shape, x.device, seed, config, extra, training_steps, on_call=tick, on_training_step=tick
            )
            return {"state": state, "classifier": classifier, "config": config}

        return io.NodeOutput(_drive(model, positive, negative, cfg, empty, run))


class DXDLGSample(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="DXDLGSample",
            display_name="DLG Sample",
            category=CATEGORY,
            description="Takes pictures from Markov chains: some sweeps, then a copy of every chain is denoised.",
            search_aliases=["dmcmc", "denoising mcmc", "langevin gibbs", "markov chain"],
            inputs=[
                *_conditioning(),
                CHAIN.Input("chain", tooltip="From DLG Chain Init, or from another DLG Sample to go on."),
                io.Int.Input("n_images", default=8, min=1, max=1024, tooltip="Pictures in all."),
                io.Int.Input("n_skip", default=10, min=1, max=1000, tooltip="Sweeps, of one model call each, between "
                             "two pictures of a chain. More: they differ more."),
                io.Int.Input("points", default=10, min=3, max=200, tooltip="Noise levels of the denoising."),
                io.Combo.Input(
                    "integrator",
                    options=["kar1", "kar2", "euler", "dpmpp_2m"],
                    default="dpmpp_2m",
                    tooltip="kar1 (Heun) and kar2 (Heun with fresh noise) make two model calls per noise level.",
                ),
            ],
            outputs=[
                io.Latent.Output(tooltip="The pictures, one after the other from each chain."),
                CHAIN.Output(display_name="chain", tooltip="The chains as they are now."),
            ],
        )  # fmt: skip

    @classmethod
    def execute(cls, model, positive, negative, cfg, chain, n_images, n_skip, points, integrator) -> io.NodeOutput:
        from dataclasses import replace

        from diffusers_ext.schedulers.dmcmc_native import sample_calls, sample_native

        config = replace(chain["config"], n_skip=n_skip, points=points, integrator=integrator)
        empty = torch.zeros_like(chain["state"]["x"], device="cpu")
        tick = _ticks(sample_calls(config, len(empty), n_images))

        def run(function, x, extra):
            classifier = chain["classifier"].to(x.device)
            return sample_native(function, chain["state"], classifier, config, n_images, x.device, extra, tick)

        samples, state = _drive(model, positive, negative, cfg, empty, run)
        samples = model.model.process_latent_out(samples.float()).cpu()
        return io.NodeOutput({"samples": samples}, {**chain, "state": state})


NODES = [DXDLGChainInit, DXDLGSample]
