"""SuperDiff in modular Stable Diffusion XL: a second prompt, and a denoiser that weighs the noise of each step."""

from __future__ import annotations

import torch
from diffusers.modular_pipelines import ModularPipelineBlocks, SequentialPipelineBlocks
from diffusers.modular_pipelines.modular_pipeline_utils import InputParam, OutputParam
from diffusers.modular_pipelines.stable_diffusion_xl.before_denoise import (
    StableDiffusionXLInputStep,
    StableDiffusionXLPrepareAdditionalConditioningStep,
    StableDiffusionXLPrepareLatentsStep,
    StableDiffusionXLSetTimestepsStep,
)
from diffusers.modular_pipelines.stable_diffusion_xl.decoders import StableDiffusionXLDecodeStep
from diffusers.modular_pipelines.stable_diffusion_xl.denoise import (
    StableDiffusionXLDenoiseLoopWrapper,
    StableDiffusionXLLoopAfterDenoiser,
    StableDiffusionXLLoopBeforeDenoiser,
    StableDiffusionXLLoopDenoiser,
)
from diffusers.modular_pipelines.stable_diffusion_xl.encoders import StableDiffusionXLTextEncoderStep

from .superdiff import SuperDiffGuidance
from .superdiff_scheduler import SuperDiffEulerScheduler


__all__ = ["SuperDiffStableDiffusionXLBlocks"]

_SECOND = ("prompt_embeds_b", "pooled_prompt_embeds_b")


class _SecondPromptStep(ModularPipelineBlocks):
    """Encodes `prompt_b` like the first prompt."""

    model_name = "stable-diffusion-xl"

    @property
    def description(self) -> str:
        return "Encodes the second prompt"

    @property
    def expected_components(self):
        return StableDiffusionXLTextEncoderStep().expected_components

    @property
    def inputs(self) -> list[InputParam]:
        return [
            InputParam("prompt_b", required=True, description="The second prompt, or one for every first prompt"),
            InputParam("num_images_per_prompt", default=1),
            InputParam("clip_skip"),
        ]

    @property
    def intermediate_outputs(self) -> list[OutputParam]:
        kind = {"type_hint": torch.Tensor, "kwargs_type": "denoiser_input_fields"}
        return [OutputParam(name, description="Text embeddings of the second prompt", **kind) for name in _SECOND]

    @torch.no_grad()
    def __call__(self, components, state):
        block = self.get_block_state(state)
        encoded = StableDiffusionXLTextEncoderStep.encode_prompt(
            components,
            block.prompt_b,
            num_images_per_prompt=block.num_images_per_prompt,
            prepare_unconditional_embeds=False,
            clip_skip=block.clip_skip,
        )
        block.prompt_embeds_b, block.pooled_prompt_embeds_b = encoded[0], encoded[2]
        self.set_block_state(state, block)
        return components, state


class _SuperDiffLoopDenoiser(StableDiffusionXLLoopDenoiser):
    """Calls the UNet for both prompts and the negative one; the guider first sees the noise of the step."""

    @property
    def inputs(self) -> list[InputParam]:
        return [*super().inputs, InputParam("generator"), InputParam("latents", required=True)]

    @property
    def intermediate_outputs(self) -> list[OutputParam]:
        return [
            OutputParam("log_likelihoods", type_hint=torch.Tensor, description="Log densities [2, B, N + 1]"),
            OutputParam("kappas", type_hint=torch.Tensor, description="Weights [2, B, N]"),
        ]

    @torch.no_grad()
    def __call__(self, components, block_state, i: int, t):
        guider, scheduler = components.guider, components.scheduler
        _require_parts(guider, scheduler)
        guider.set_state(step=i, num_inference_steps=block_state.num_inference_steps, timestep=t)
        guider.begin_step(scheduler.begin_step(block_state.latents, t, block_state.generator))
        batches = guider.prepare_inputs(_fields(block_state, len(block_state.latents)))
        for batch in batches:
            guider.prepare_models(components.unet)
            batch.noise_pred = components.unet(
                block_state.scaled_latents,
                t,
                encoder_hidden_states=batch.prompt_embeds,
                timestep_cond=block_state.timestep_cond,
                cross_attention_kwargs=block_state.cross_attention_kwargs,
                added_cond_kwargs={"text_embeds": batch.text_embeds, "time_ids": batch.time_ids},
                return_dict=False,
            )[0]
            guider.cleanup_models(components.unet)
        block_state.noise_pred = guider(batches)[0]
        block_state.log_likelihoods = guider.superposition.log_likelihoods
        block_state.kappas = guider.superposition.kappas
        return components, block_state


def _require_parts(guider, scheduler) -> None:
    if not isinstance(guider, SuperDiffGuidance) or not isinstance(scheduler, SuperDiffEulerScheduler):
        raise ValueError(
            "SuperDiff blocks need pipe.update_components(guider=SuperDiffGuidance(...), "
            "scheduler=SuperDiffEulerScheduler.from_config(...)), got "
            f"{type(guider).__name__} and {type(scheduler).__name__}"
        )


def _fields(block, batch: int) -> dict[str, tuple]:
    """The guider's fields as (first prompt, second prompt, unconditional)."""
    second, pooled = (getattr(block, name) for name in _SECOND)
    if len(second) not in (1, batch):
        raise ValueError(
            f"`prompt_b` gives {len(second)} conditions for {batch} pictures; give one, or one per prompt"
        )
    repeat = batch // len(second)
    ids, negative_ids = block.add_time_ids, block.negative_add_time_ids
    return {
        "prompt_embeds": (block.prompt_embeds, second.repeat(repeat, 1, 1), block.negative_prompt_embeds),
        "text_embeds": (block.pooled_prompt_embeds, pooled.repeat(repeat, 1), block.negative_pooled_prompt_embeds),
        "time_ids": (ids, ids, negative_ids),
    }


class _SuperDiffDenoiseStep(StableDiffusionXLDenoiseLoopWrapper):
    """The denoising loop with SuperDiff's denoiser."""

    block_classes = [
        StableDiffusionXLLoopBeforeDenoiser,
        _SuperDiffLoopDenoiser,
        StableDiffusionXLLoopAfterDenoiser,
    ]
    block_names = ["before_denoiser", "denoiser", "after_denoiser"]


class SuperDiffStableDiffusionXLBlocks(SequentialPipelineBlocks):
    """Modular Stable Diffusion XL, text to image, with a second prompt `prompt_b` and SuperDiff's weights.

    Paper: https://arxiv.org/abs/2412.17762. Outputs `images`, and `log_likelihoods` `[2, B, N + 1]` and `kappas`
    `[2, B, N]` on request.

    Example:
        >>> pipe = SuperDiffStableDiffusionXLBlocks().init_pipeline("stabilityai/stable-diffusion-xl-base-1.0")
        >>> pipe.load_components(torch_dtype=torch.float16)
        >>> scheduler = SuperDiffEulerScheduler.from_config(pipe.scheduler.config)
        >>> pipe.update_components(guider=SuperDiffGuidance(operation="and"), scheduler=scheduler)
        >>> images = pipe(prompt="a cat", prompt_b="a teapot", num_inference_steps=100, output="images")

    Limits: two prompts and one model, no ControlNet or IP-Adapter. `save_pretrained` of modular pipelines drops the
    guider; save it beside with `guider.save_pretrained`.
    """

    model_name = "stable-diffusion-xl"
    block_classes = [
        StableDiffusionXLTextEncoderStep,
        _SecondPromptStep,
        StableDiffusionXLInputStep,
        StableDiffusionXLSetTimestepsStep,
        StableDiffusionXLPrepareLatentsStep,
        StableDiffusionXLPrepareAdditionalConditioningStep,
        _SuperDiffDenoiseStep,
        StableDiffusionXLDecodeStep,
    ]
    block_names = [
        "text_encoder", "second_prompt", "input", "set_timesteps", "prepare_latents", "prepare_add_cond", "denoise",
        "decode",
    ]  # fmt: skip

    @property
    def description(self) -> str:
        return "Text to image with Stable Diffusion XL from two prompts, mixed by SuperDiff"

    @property
    def outputs(self) -> list[OutputParam]:
        return [OutputParam.template("images")]
