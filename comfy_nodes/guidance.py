"""Guiders: how the predictions for several prompts or models become one."""

from __future__ import annotations

import comfy.model_patcher
import comfy.model_sampling
import comfy.sampler_helpers
import comfy.samplers
import torch
from comfy.k_diffusion.sampling import default_noise_sampler, trange
from comfy_api.latest import io, ui


_COARSEST = 0.9


class SuperDiffGuider(comfy.samplers.CFGGuider):
    """ComfyUI's guider for SuperDiff; `mix` holds the log densities of the last run."""

    def __init__(self, model_patcher, second_patcher=None):
        super().__init__(model_patcher)
        self.second_patcher = second_patcher
        self.settings: dict = {}
        self.mix = None
        self._second, self._second_conds, self._second_options, self._noise_step = None, None, None, None

    def begin_step(self, step) -> None:
        """Called by the SuperDiff sampler with the noise it is about to add."""
        from diffusers_ext.guidance.superdiff import Superposition

        if step.index == 0:
            self.mix = Superposition(2, guidance_scale=self.cfg, **self.settings)
        self._noise_step = step

    def outer_sample(self, noise, *args, **kwargs):
        if self.second_patcher is None:
            return super().outer_sample(noise, *args, **kwargs)
        conds = {"positive_b": [c.copy() for c in self.conds["positive_b"]]}
        options = comfy.model_patcher.create_model_options_clone(self.second_patcher.model_options)
        comfy.sampler_helpers.prepare_model_patcher(self.second_patcher, conds, options)
        self._second, conds, loaded = comfy.sampler_helpers.prepare_sampling(
            self.second_patcher, noise.shape, conds, options
        )
        self._second_conds, self._second_options = conds["positive_b"], options
        self.second_patcher.pre_run()
        try:
            return super().outer_sample(noise, *args, **kwargs)
        finally:
            self.second_patcher.cleanup()
            comfy.sampler_helpers.cleanup_models(conds, loaded)
            self._second = self._second_conds = self._second_options = None

    def inner_sample(self, noise, latent_image, device, sampler, sigmas, denoise_mask, *args, **kwargs):
        if self._second is not None:
            self._second_options["transformer_options"]["sample_sigmas"] = sigmas
            seed, shapes = (args[2] if len(args) > 2 else kwargs.get("seed")), kwargs.get("latent_shapes")
            latent = self._second.process_latent_in(latent_image) if latent_image.count_nonzero() else latent_image
            self._second_conds = comfy.samplers.process_conds(
                self._second, noise, {"positive_b": self._second_conds}, device, latent, denoise_mask, seed, shapes
            )["positive_b"]
        return super().inner_sample(noise, latent_image, device, sampler, sigmas, denoise_mask, *args, **kwargs)

    def predict_noise(self, x, timestep, model_options=None, seed=None):
        """The mixed denoised latents."""
        from diffusers_ext.guidance.superdiff import guided

        step, self._noise_step = self._noise_step, None
        if step is None:
            raise RuntimeError("SuperDiff Guider needs the SuperDiff Sampler: connect it to the sampler input")
        denoised, negative = self._denoised(x, timestep, model_options or {})
        v_u = None if negative is None else step.epsilon(negative)
        kappa = self.mix.weigh(step, step.epsilon(denoised), v_u)
        return guided(denoised, negative, kappa, self.cfg)

    def _denoised(self, x, timestep, options) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Predictions for both prompts, stacked, and for the negative one unless cfg is 1."""
        names = ["positive_a", "positive_b", "negative"][: 2 if self.cfg == 1 else 3]
        conds = [self.conds[name] for name in names]
        if self._second is not None:
            conds.pop(1)
        found = comfy.samplers.calc_cond_batch(self.inner_model, conds, x, timestep, options)
        if self._second is not None:
            second = comfy.samplers.calc_cond_batch(
                self._second, [self._second_conds], x, timestep, self._second_options
            )
            found = [found[0], second[0], *found[1:]]
        return torch.stack(found[:2]), found[2] if len(found) > 2 else None


def sample_superdiff(
    model, x, sigmas, extra_args=None, callback=None, disable=None, final_noise=True, noise_sampler=None
):
    """Euler steps of the reverse SDE whose noise the guider sees before it is added."""
    from diffusers_ext.guidance.superdiff import NoiseStep

    guider, extra_args = model.inner_model, extra_args or {}
    if not isinstance(guider, SuperDiffGuider):
        raise ValueError("SuperDiff Sampler works with the SuperDiff Guider only: connect it to the guider input")
    flow = isinstance(guider.inner_model.model_sampling, comfy.model_sampling.CONST)
    levels = [s / max(1 - s, 1e-3) if flow else s for s in sigmas.tolist()]
    _require_fine(levels)
    noise_sampler = noise_sampler or default_noise_sampler(x, seed=extra_args.get("seed"))
    steps = len(levels) - 1
    for i in trange(steps, disable=disable):
        noise = noise_sampler(sigmas[i], sigmas[i + 1])
        step = NoiseStep(x, noise, levels[i], levels[i + 1], "sample", flow, i, steps, final_noise)
        guider.begin_step(step)
        denoised = model(x, sigmas[i] * x.new_ones([len(x)]), **extra_args)
        if callback is not None:
            callback({"x": x, "i": i, "sigma": sigmas[i], "sigma_hat": sigmas[i], "denoised": denoised})
        x = step.moved(step.dx(step.epsilon(denoised)))
    return x


def _require_fine(levels: list[float]) -> None:
    for before, after in zip(levels, levels[1:]):
        if after > 0 and after < (1 - _COARSEST) * before:
            raise ValueError(
                f"the noise falls from {before:.3g} to {after:.3g} in one step, too coarse for SuperDiff: use the "
                "SuperDiff Sigmas node, or more steps"
            )


class DXSuperDiffGuider(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="DXSuperDiffGuider",
            display_name="SuperDiff Guider",
            category="diffusers-ext/guidance",
            description="Mixes two prompts, or two models, by their running log densities. or: every picture follows "
            "one of them; and: every picture is equally likely under both; average: equal weights. Needs the "
            "SuperDiff Sampler.",
            search_aliases=["superposition", "logical or", "logical and", "mix prompts", "two models", "SuperDiff"],
            inputs=[
                io.Model.Input("model", tooltip="Model of prompt A and of the negative prompt."),
                io.Conditioning.Input("positive_a", tooltip="Prompt A."),
                io.Conditioning.Input("positive_b", tooltip="Prompt B."),
                io.Conditioning.Input("negative", tooltip="Negative prompt; not used at cfg 1."),
                io.Combo.Input(
                    "operation",
                    options=["and", "or", "average"],
                    default="and",
                    tooltip="and: both at once. or: one of the two. average: plain mixing, for comparison.",
                ),
                io.Float.Input(
                    "cfg", default=7.5, min=0.0, max=100.0, step=0.1, tooltip="Guidance of the mix; 1 is off."
                ),
                io.Float.Input(
                    "temperature",
                    default=1.0,
                    min=0.0001,
                    max=10.0,
                    step=0.01,
                    tooltip="Sharpness of 'or'. Below 1 the choice comes later and blends more.",
                    advanced=True,
                ),
                io.Float.Input(
                    "bias",
                    default=0.0,
                    min=-10000.0,
                    max=10000.0,
                    step=0.1,
                    tooltip="Head start of prompt A under 'or', in nats.",
                    advanced=True,
                ),
                io.Float.Input(
                    "lift",
                    default=0.0,
                    min=-10000.0,
                    max=10000.0,
                    step=0.1,
                    tooltip="Under 'and': how much likelier B should end than A, in nats.",
                    advanced=True,
                ),
                io.Model.Input(
                    "model_b",
                    optional=True,
                    tooltip="Model of prompt B. Must share latents and noise schedule with the first.",
                ),
            ],
            outputs=[io.Guider.Output(tooltip="For SamplerCustomAdvanced, together with the SuperDiff Sampler.")],
        )

    @classmethod
    def execute(
        cls, model, positive_a, positive_b, negative, operation, cfg, temperature, bias, lift, model_b=None
    ) -> io.NodeOutput:
        guider = SuperDiffGuider(model, model_b)
        guider.inner_set_conds({"positive_a": positive_a, "positive_b": positive_b, "negative": negative})
        guider.set_cfg(cfg)
        guider.settings = {"operation": operation, "temperature": temperature, "logp": bias, "lift": lift}
        return io.NodeOutput(guider)


class DXSamplerSuperDiff(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="DXSamplerSuperDiff",
            display_name="SuperDiff Sampler",
            category="diffusers-ext/guidance",
            description="The stochastic sampler that the SuperDiff Guider needs: it shows the guider the noise of "
            "each step before adding it.",
            search_aliases=["superposition", "SDE sampler", "SuperDiff"],
            inputs=[
                io.Boolean.Input(
                    "final_noise",
                    default=True,
                    tooltip="Noise on the last step too, as in the paper's code. Off: end on the denoised latents.",
                )
            ],
            outputs=[io.Sampler.Output(tooltip="Works with the SuperDiff Guider only.")],
        )

    @classmethod
    def execute(cls, final_noise: bool) -> io.NodeOutput:
        return io.NodeOutput(comfy.samplers.KSAMPLER(sample_superdiff, {"final_noise": final_noise}))


class DXSuperDiffSigmas(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="DXSuperDiffSigmas",
            display_name="SuperDiff Sigmas",
            category="diffusers-ext/guidance",
            description="Noise levels with the fine, even ratios SuperDiff's density estimate needs, for "
            "Stable Diffusion and flow models alike.",
            search_aliases=["karras", "scheduler", "SuperDiff"],
            inputs=[
                io.Model.Input("model", tooltip="The model that will be sampled."),
                io.Int.Input(
                    "steps", default=100, min=1, max=10000, tooltip="50 or more; 100 to 200 for reliable densities."
                ),
            ],
            outputs=[io.Sigmas.Output(tooltip="For SamplerCustomAdvanced.")],
        )

    @classmethod
    def execute(cls, model, steps: int) -> io.NodeOutput:
        from diffusers_ext.guidance.superdiff import FLOW_RANGE, karras_levels

        sampling = model.get_model_object("model_sampling")
        if isinstance(sampling, comfy.model_sampling.CONST):
            levels = karras_levels(*FLOW_RANGE, steps)
            return io.NodeOutput((levels / (1 + levels)).float())
        return io.NodeOutput(karras_levels(float(sampling.sigma_min), float(sampling.sigma_max), steps).float())


class DXSuperDiffReport(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="DXSuperDiffReport",
            display_name="SuperDiff Report",
            category="diffusers-ext/guidance",
            description="Shows how likely every picture became under prompt A and prompt B.",
            search_aliases=["log density", "likelihood", "SuperDiff"],
            inputs=[
                io.Guider.Input("guider", tooltip="The SuperDiff Guider of the run."),
                io.Latent.Input("latent", tooltip="The sampled latents; makes the report wait for the run."),
            ],
            outputs=[io.Latent.Output(tooltip="The latents, unchanged.")],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, guider, latent) -> io.NodeOutput:
        if not isinstance(guider, SuperDiffGuider) or guider.mix is None:
            raise ValueError("SuperDiff Report needs the SuperDiff Guider of a finished run")
        return io.NodeOutput(latent, ui=ui.PreviewText(guider.mix.report()))


NODES = [DXSuperDiffGuider, DXSamplerSuperDiff, DXSuperDiffSigmas, DXSuperDiffReport]
