"""SuperDiff over whole pipelines: Stable Diffusion, Stable Diffusion XL and Flux layouts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import PIL.Image
import torch
from diffusers import DiffusionPipeline, FluxPipeline, StableDiffusionPipeline, StableDiffusionXLPipeline
from diffusers.utils import BaseOutput
from diffusers.utils.torch_utils import randn_tensor

from .superdiff import NoiseStep, Superposition, divergence, guided
from .superdiff_scheduler import SuperDiffEulerScheduler, noise_step


__all__ = ["SuperDiffPipeline", "SuperDiffPipelineOutput"]

_COMPONENTS = (
    "vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "unet", "transformer", "safety_checker",
    "feature_extractor",
)  # fmt: skip


@dataclass
class SuperDiffPipelineOutput(BaseOutput):
    """Pictures, and what the models made of them.

    Args:
        images: List of `PIL.Image`, array or tensor, or latents.
        log_likelihoods: `[K, B, N + 1]` float64, change of log q_k since the start (nats).
        kappas: `[K, B, N]` float64, weights of the models.
    """

    images: list[PIL.Image.Image] | np.ndarray | torch.Tensor
    log_likelihoods: torch.Tensor
    kappas: torch.Tensor


class _StableDiffusion:
    """How a Stable Diffusion pipeline encodes prompts and calls its UNet."""

    upstream: type = StableDiffusionPipeline
    extra = {"requires_safety_checker": False, "image_encoder": None}
    names = ("vae", "text_encoder", "tokenizer", "unet", "safety_checker", "feature_extractor")

    def __init__(self, components: dict[str, Any], scheduler, size: tuple[int | None, int | None], kwargs: dict):
        self.base = self.upstream(scheduler=scheduler, **{n: components[n] for n in self.names}, **self.extra)
        self.kwargs = kwargs
        default = self.model.config.sample_size * self.base.vae_scale_factor
        self.height, self.width = (n or default for n in size)

    @property
    def model(self) -> torch.nn.Module:
        return self.base.unet

    def encode(self, prompt: str | list[str], images: int, device) -> dict[str, Any]:
        embeds, _ = self.base.encode_prompt(prompt, device, images, False, **self.kwargs)
        return {"encoder_hidden_states": embeds}

    def negative(self, prompt: str | list[str] | None, batch: int, images: int, device) -> dict[str, Any]:
        """Condition to steer away from, for `batch` pictures in all."""
        if prompt is None:
            return self.unconditional(batch // images, images, device)
        return self.encode([prompt] * (batch // images) if isinstance(prompt, str) else prompt, images, device)

    def unconditional(self, batch: int, images: int, device) -> dict[str, Any]:
        """Condition of pictures without a negative prompt."""
        return self.encode([""] * batch, images, device)

    def latents(self, batch: int, dtype, device, generator, latents) -> torch.Tensor:
        channels = self.model.config.in_channels
        return self.base.prepare_latents(batch, channels, self.height, self.width, dtype, device, generator, latents)

    def predict(self, model, x: torch.Tensor, t: torch.Tensor, condition: dict) -> torch.Tensor:
        return model(x, t, **condition, return_dict=False)[0]

    def decode(self, latents: torch.Tensor, output_type: str):
        base = self.base
        image = base.vae.decode(latents.to(base.vae.dtype) / base.vae.config.scaling_factor, return_dict=False)[0]
        image, flagged = base.run_safety_checker(image, image.device, image.dtype)
        normalize = [True] * len(image) if flagged is None else [not bad for bad in flagged]
        return base.image_processor.postprocess(image, output_type=output_type, do_denormalize=normalize)


class _StableDiffusionXL(_StableDiffusion):
    """The same for Stable Diffusion XL: pooled embeddings and size conditioning."""

    upstream = StableDiffusionXLPipeline
    extra = {"image_encoder": None, "add_watermarker": False}
    names = ("vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "unet", "feature_extractor")

    def encode(self, prompt, images, device) -> dict[str, Any]:
        embeds, _, pooled, _ = self.base.encode_prompt(
            prompt, None, device, images, do_classifier_free_guidance=False, **self.kwargs
        )
        size, projection = (self.height, self.width), self.base.text_encoder_2.config.projection_dim
        ids = self.base._get_add_time_ids(size, (0, 0), size, embeds.dtype, projection).to(device)
        added = {"text_embeds": pooled, "time_ids": ids.repeat(len(embeds), 1)}
        return {"encoder_hidden_states": embeds, "added_cond_kwargs": added}

    def unconditional(self, batch, images, device) -> dict[str, Any]:
        """Zeros in place of text, which SDXL was trained with."""
        condition = super().unconditional(batch, images, device)
        added = condition["added_cond_kwargs"]
        return {
            "encoder_hidden_states": torch.zeros_like(condition["encoder_hidden_states"]),
            "added_cond_kwargs": {**added, "text_embeds": torch.zeros_like(added["text_embeds"])},
        }

    def decode(self, latents, output_type):
        base = self.base
        if base.vae.dtype == torch.float16 and base.vae.config.force_upcast:
            base.upcast_vae()
        latents = latents.to(base.vae.dtype) / base.vae.config.scaling_factor
        return base.image_processor.postprocess(base.vae.decode(latents, return_dict=False)[0], output_type)


class _Flux(_StableDiffusion):
    """The same for Flux: packed latents, time in [0, 1]."""

    upstream = FluxPipeline
    extra = {"image_encoder": None, "feature_extractor": None}
    names = ("vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "transformer")

    def __init__(self, components, scheduler, size, kwargs):
        self.base = self.upstream(scheduler=scheduler, **{n: components[n] for n in self.names}, **self.extra)
        self.embedded = kwargs.pop("embedded_guidance_scale", 3.5)
        self.kwargs = kwargs
        default = self.base.default_sample_size * self.base.vae_scale_factor
        self.height, self.width = (n or default for n in size)

    @property
    def model(self) -> torch.nn.Module:
        return self.base.transformer

    def encode(self, prompt, images, device) -> dict[str, Any]:
        embeds, pooled, ids = self.base.encode_prompt(
            prompt, None, device=device, num_images_per_prompt=images, **self.kwargs
        )
        guidance = (
            torch.full([len(embeds)], self.embedded, device=device) if self.model.config.guidance_embeds else None
        )
        return {
            "encoder_hidden_states": embeds,
            "pooled_projections": pooled,
            "txt_ids": ids,
            "guidance": guidance,
        }

    def latents(self, batch, dtype, device, generator, latents) -> torch.Tensor:
        channels = self.model.config.in_channels // 4
        packed, self.ids = self.base.prepare_latents(
            batch, channels, self.height, self.width, dtype, device, generator, latents
        )
        return packed * getattr(self.base.scheduler, "init_noise_sigma", 1.0)

    def predict(self, model, x, t, condition) -> torch.Tensor:
        time = t.expand(len(x)).to(x.dtype) / 1000
        return model(hidden_states=x, timestep=time, img_ids=self.ids, **condition, return_dict=False)[0]

    def decode(self, latents, output_type):
        base, config = self.base, self.base.vae.config
        latents = base._unpack_latents(latents, self.height, self.width, base.vae_scale_factor)
        latents = latents.to(base.vae.dtype) / config.scaling_factor + config.shift_factor
        return base.image_processor.postprocess(
            base.vae.decode(latents, return_dict=False)[0], output_type=output_type
        )


class SuperDiffPipeline(DiffusionPipeline):
    """One picture from several prompts or two models: OR, AND or their average, with log densities.

    Paper: https://arxiv.org/abs/2412.17762

    Args:
        vae, text_encoder, text_encoder_2, tokenizer, tokenizer_2, unet, transformer, safety_checker,
            feature_extractor: Parts of a Stable Diffusion, SDXL or Flux pipeline; see `from_pipe`.
        scheduler: `SuperDiffEulerScheduler`; `"and_ode"` also takes other schedulers with sigmas.
        denoiser_b: Optional second UNet or transformer, of the first one's layout, noise schedule and prediction type;
            it answers the second prompt.

    Example:
        >>> pipe = SuperDiffPipeline.from_pipe(zoo.load("shapes-unet"))
        >>> out = pipe(["a red circle", "a blue square"], operation="or", num_inference_steps=50)
        >>> out.images[0], out.log_likelihoods[..., -1]

    Limits: K + 1 network calls per step (K with guidance_scale 1); 50 steps or more.
    """

    model_cpu_offload_seq = "text_encoder->text_encoder_2->unet->transformer->denoiser_b->vae"
    _optional_components = [*_COMPONENTS, "denoiser_b"]
    _exclude_from_cpu_offload = ["safety_checker"]
    _callback_tensor_inputs = ["latents", "kappa", "log_q"]

    def __init__(
        self,
        scheduler,
        vae=None,
        text_encoder=None,
        text_encoder_2=None,
        tokenizer=None,
        tokenizer_2=None,
        unet=None,
        transformer=None,
        safety_checker=None,
        feature_extractor=None,
        denoiser_b=None,
    ):
        super().__init__()
        given = dict(locals())
        self.register_modules(scheduler=scheduler, denoiser_b=denoiser_b, **{n: given[n] for n in _COMPONENTS})
        self._layout_class()

    def _layout_class(self) -> type[_StableDiffusion]:
        if (self.unet is None) == (self.transformer is None):
            raise ValueError(
                "SuperDiffPipeline needs either a `unet` (Stable Diffusion, SDXL) or a `transformer` (Flux)"
            )
        if self.transformer is not None:
            return _Flux
        return _StableDiffusion if self.text_encoder_2 is None else _StableDiffusionXL

    @classmethod
    def from_pipe(cls, pipeline: DiffusionPipeline, denoiser_b: torch.nn.Module | None = None) -> SuperDiffPipeline:
        """A SuperDiff pipeline that shares the models of an existing one.

        Args:
            pipeline: `StableDiffusionPipeline`, `StableDiffusionXLPipeline` or `FluxPipeline`, or one of their
                text-to-image relatives with the same components. It is left as it is.
            denoiser_b: Second UNet or transformer.

        Raises:
            ValueError: Another kind of pipeline, or a second model of another layout.
        """
        bases = (StableDiffusionPipeline, StableDiffusionXLPipeline, FluxPipeline, cls)
        if not isinstance(pipeline, bases):
            names = ", ".join(b.__name__ for b in bases)
            raise ValueError(f"cannot build a SuperDiffPipeline from {type(pipeline).__name__}; supported: {names}")
        parts = {n: c for n, c in pipeline.components.items() if n in _COMPONENTS}
        own = parts.get("unet") or parts.get("transformer")
        if denoiser_b is not None and type(denoiser_b) is not type(own):
            raise ValueError(f"`denoiser_b` is a {type(denoiser_b).__name__}, the pipeline has a {type(own).__name__}")
        scheduler = pipeline.scheduler
        if not isinstance(scheduler, SuperDiffEulerScheduler):
            settings, _, _ = SuperDiffEulerScheduler.extract_init_dict(dict(scheduler.config))
            if isinstance(pipeline, FluxPipeline):
                settings["prediction_type"] = "flow_prediction"
            scheduler = SuperDiffEulerScheduler(**settings)
        return cls(scheduler=scheduler, denoiser_b=denoiser_b, **parts)

    @property
    def interrupt(self) -> bool:
        return self._interrupt

    def check_inputs(self, prompts, negative_prompt, operation: str, names: list[str]) -> None:
        """Raise `ValueError` before any work for prompts, scheduler or callback inputs that cannot work."""
        if isinstance(prompts, str) or len(prompts) < 2:
            raise ValueError(f"`prompts` must be a list of two or more prompts, got {prompts!r}")
        sizes = {1 if isinstance(p, str) else len(p) for p in prompts}
        if len(sizes) > 1:
            raise ValueError(f"every entry of `prompts` must hold as many captions as the others, got {sorted(sizes)}")
        if isinstance(negative_prompt, list) and len(negative_prompt) not in sizes:
            raise ValueError(f"`negative_prompt` must be a string or a list of {sizes.pop()}, got {negative_prompt!r}")
        if operation != "and_ode" and not isinstance(self.scheduler, SuperDiffEulerScheduler):
            raise ValueError(
                f"operation {operation!r} takes stochastic steps, which {type(self.scheduler).__name__} does not: set "
                "pipe.scheduler = SuperDiffEulerScheduler.from_config(pipe.scheduler.config), or use 'and_ode', the "
                "deterministic variant"
            )
        if not hasattr(self.scheduler, "sigmas") or self.scheduler.order != 1:
            raise ValueError(f"{type(self.scheduler).__name__} has no first-order `sigmas` for SuperDiff to follow")
        unknown = set(names) - set(self._callback_tensor_inputs)
        if unknown:
            raise ValueError(f"callback inputs {sorted(unknown)} are unknown; known: {self._callback_tensor_inputs}")

    @torch.no_grad()
    def __call__(
        self,
        prompts: list[str] | list[list[str]],
        negative_prompt: str | list[str] | None = None,
        operation: str = "and",
        guidance_scale: float = 7.5,
        temperature: float = 1.0,
        logp: float | list[float] = 0.0,
        lift: float | list[float] = 0.0,
        num_inference_steps: int = 100,
        final_noise: bool | None = None,
        height: int | None = None,
        width: int | None = None,
        num_images_per_prompt: int = 1,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[..., dict] | None = None,
        callback_on_step_end_tensor_inputs: list[str] = ("latents",),
        **encode_kwargs,
    ) -> SuperDiffPipelineOutput | tuple:
        """Make pictures.

        Args:
            prompts: K >= 2 prompts, or K lists of equally many captions for a batch of mixes.
            negative_prompt: What to steer away from; used with `guidance_scale` != 1.
            operation: `"or"`: every picture follows one of the prompts; `"and"`: equally likely under all of them;
                `"and_ode"`: the same without noise; `"average"`: equal weights.
            guidance_scale: Classifier-free guidance of the mix; 1 turns it off.
            temperature: Sharpness of OR, > 0; below 1 blends.
            logp: Bias of OR in nats: K numbers, or one for the first prompt.
            lift: Final log q_B - log q_A of AND, or K log densities.
            num_inference_steps: 50 or more.
            final_noise: Noise on the last step; default: the scheduler's setting.
            height, width: In pixels; default: the model's size.
            num_images_per_prompt: Pictures per mix.
            generator: One generator, or one per picture.
            latents: Starting noise in the layout of the underlying pipeline.
            output_type: `"pil"`, `"np"`, `"pt"` or `"latent"`.
            return_dict: False: a tuple `(images, log_likelihoods, kappas)`.
            callback_on_step_end: `callback(pipe, step, timestep, tensors) -> dict`, may return new `latents`; setting
                `pipe._interrupt = True` ends the run there.
            callback_on_step_end_tensor_inputs: Of `"latents"`, `"kappa"` `[K, B]`, `"log_q"` `[K, B]`.
            encode_kwargs: For the pipeline's `encode_prompt` (`clip_skip`, `max_sequence_length`...); Flux models with
                a guidance embedding also take `embedded_guidance_scale`.

        Returns:
            `SuperDiffPipelineOutput`.
        """
        mix = Superposition(len(prompts), operation, guidance_scale, temperature, logp, lift)
        self.check_inputs(prompts, negative_prompt, operation, callback_on_step_end_tensor_inputs)
        self._interrupt, device = False, self._execution_device
        layout = self._layout_class()(self.components, self.scheduler, (height, width), encode_kwargs)
        conditions = [layout.encode(prompt, num_images_per_prompt, device) for prompt in prompts]
        batch = len(conditions[0]["encoder_hidden_states"])
        if guidance_scale != 1:
            conditions.append(layout.negative(negative_prompt, batch, num_images_per_prompt, device))
        self.scheduler.set_timesteps(num_inference_steps, device=device)
        dtype = conditions[0]["encoder_hidden_states"].dtype
        latents = layout.latents(batch, dtype, device, generator, latents)

        with self.progress_bar(total=num_inference_steps) as progress_bar:
            for i, t in enumerate(self.scheduler.timesteps):
                step = noise_step(self.scheduler, i, latents, _noise(latents, operation, generator))
                step = step if final_noise is None else replace(step, final_noise=final_noise)
                latents = self._step(layout, mix, step, t, conditions, generator)
                progress_bar.update()
                if callback_on_step_end is not None:
                    known = {"latents": latents, "kappa": mix.kappas[..., -1], "log_q": mix.log_likelihoods[..., -1]}
                    chosen = {name: known[name] for name in callback_on_step_end_tensor_inputs}
                    latents = callback_on_step_end(self, i, t, chosen).pop("latents", latents)
                if self._interrupt:
                    break

        images = latents if output_type == "latent" else layout.decode(latents, output_type)
        self.maybe_free_model_hooks()
        output = SuperDiffPipelineOutput(images, mix.log_likelihoods, mix.kappas)
        return output if return_dict else output.to_tuple()

    def _step(self, layout, mix: Superposition, step: NoiseStep, t, conditions, generator) -> torch.Tensor:
        """The latents after one step: call the models, weigh them, move."""
        models = [layout.model] * len(conditions)
        if self.denoiser_b is not None:
            models[1] = self.denoiser_b
        count = mix.num_models
        if mix.operation == "and_ode":
            return self._ode_step(layout, mix, step, t, list(zip(models, conditions)), generator)
        x = step.model_input
        outputs = torch.stack([layout.predict(m, x, t, c) for m, c in zip(models, conditions)])
        v = step.epsilon(outputs)
        v_u = v[count] if len(v) > count else None
        kappa = mix.weigh(step, v[:count], v_u)
        return step.moved(step.dx(guided(v[:count], v_u, kappa, mix.guidance_scale)))

    def _ode_step(self, layout, mix: Superposition, step: NoiseStep, t, calls, generator) -> torch.Tensor:
        probe = randn_tensor(step.x.shape, generator=generator, device=step.x.device, dtype=step.x.dtype).sign()

        def epsilon(model, condition):
            return lambda x: step.at(x).epsilon(layout.predict(model, step.at(x).model_input, t, condition))

        pairs = [divergence(epsilon(*call), step.x, probe) for call in calls[: mix.num_models]]
        v, div = (torch.stack(parts) for parts in zip(*pairs))
        v_u = epsilon(*calls[-1])(step.x) if len(calls) > mix.num_models else None
        kappa = mix.weigh_ode(step, v, v_u, div)
        return step.moved(step.d * guided(v, v_u, kappa, mix.guidance_scale))


def _noise(latents: torch.Tensor, operation: str, generator) -> torch.Tensor:
    """Standard normal draw in float32 (or the latents' float64); none for the ODE."""
    dtype = torch.promote_types(latents.dtype, torch.float32)
    if operation == "and_ode":
        return torch.zeros_like(latents, dtype=dtype)
    return randn_tensor(latents.shape, generator=generator, device=latents.device, dtype=dtype)
