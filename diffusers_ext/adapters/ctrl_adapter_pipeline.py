"""Stable Diffusion XL with ControlNets of Stable Diffusion 1.5, in one pipeline that is saved and loaded as a whole.

Lin, Cho, Zala, Bansal, "Ctrl-Adapter", ICLR 2025, https://arxiv.org/abs/2404.09967
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from diffusers import StableDiffusionXLPipeline
from diffusers.image_processor import PipelineImageInput, VaeImageProcessor

from .ctrl_adapter import CtrlAdapterModel
from .ctrl_adapter_control import CtrlAdapterControl, CtrlAdapterRouter


__all__ = ["StableDiffusionXLCtrlAdapterPipeline"]


class StableDiffusionXLCtrlAdapterPipeline(StableDiffusionXLPipeline):
    """SDXL drawn by ControlNets of another model. Paper: https://arxiv.org/abs/2404.09967

    What `CtrlAdapterModel.attach` does with any pipeline, with all of its parts as components.

    Args:
        vae, text_encoder, text_encoder_2, tokenizer, tokenizer_2, unet, scheduler, image_encoder, feature_extractor,
            force_zeros_for_empty_prompt, add_watermarker: As for `StableDiffusionXLPipeline`.
        controlnet: `ControlNetModel`, or a `MultiControlNetModel` of several.
        ctrl_adapter: `CtrlAdapterModel` made for the UNet.
        controlnet_text_encoder, controlnet_tokenizer: Of the model that the ControlNet was made for.
        ctrl_adapter_router: `CtrlAdapterRouter`, which weighs several ControlNets; their mean without one.

    Example:
        >>> from diffusers import StableDiffusionXLPipeline
        >>> from diffusers_ext import StableDiffusionXLCtrlAdapterPipeline
        >>> def with_control(pipe: StableDiffusionXLPipeline, **parts) -> StableDiffusionXLCtrlAdapterPipeline:
        ...     return StableDiffusionXLCtrlAdapterPipeline(**pipe.components, **parts)

    Limits:
        The adapter is on the UNet only while the pipeline is called.
    """

    _optional_components = [*StableDiffusionXLPipeline._optional_components, "ctrl_adapter_router"]

    def __init__(
        self,
        vae: Any,
        text_encoder: Any,
        text_encoder_2: Any,
        tokenizer: Any,
        tokenizer_2: Any,
        unet: Any,
        scheduler: Any,
        controlnet: Any,
        ctrl_adapter: CtrlAdapterModel,
        controlnet_text_encoder: Any,
        controlnet_tokenizer: Any,
        ctrl_adapter_router: CtrlAdapterRouter | None = None,
        image_encoder: Any = None,
        feature_extractor: Any = None,
        force_zeros_for_empty_prompt: bool = True,
        add_watermarker: bool | None = None,
    ):
        super().__init__(
            vae, text_encoder, text_encoder_2, tokenizer, tokenizer_2, unet, scheduler, image_encoder,
            feature_extractor, force_zeros_for_empty_prompt, add_watermarker,
        )  # fmt: skip
        self.register_modules(
            controlnet=controlnet,
            ctrl_adapter=ctrl_adapter,
            controlnet_text_encoder=controlnet_text_encoder,
            controlnet_tokenizer=controlnet_tokenizer,
            ctrl_adapter_router=ctrl_adapter_router,
        )

    def __call__(
        self,
        prompt: str | Sequence[str],
        control_image: PipelineImageInput | Sequence[PipelineImageInput],
        negative_prompt: str = "",
        controlnet_conditioning_scale: float = 1.0,
        control_guidance_start: float = 0.0,
        control_guidance_end: float = 0.6,
        active: Sequence[bool] | None = None,
        **kwargs: Any,
    ) -> Any:
        """Draw pictures.

        Args:
            prompt: For SDXL and, in the words of its own text encoder, for the ControlNet.
            control_image: PIL, or tensors `[n, 3, h, w]` in [0, 1]; with several ControlNets a list of one each.
                Larger pictures are averaged down to what the ControlNet takes.
            negative_prompt: For both, too.
            controlnet_conditioning_scale: Multiplies what the ControlNet says; 0 is plain SDXL.
            control_guidance_start, control_guidance_end: Part of the run that is controlled.
            active: With a router, which ControlNets take part.
            kwargs: All other arguments of `StableDiffusionXLPipeline`.

        Returns:
            What `StableDiffusionXLPipeline` returns.

        Raises:
            ValueError: See `CtrlAdapterControl` and `CtrlAdapterModel`.
        """
        networks = list(getattr(self.controlnet, "nets", [self.controlnet]))
        pictures = control_image if len(networks) > 1 else [control_image]
        read = VaeImageProcessor(do_resize=False, do_normalize=False, do_convert_rgb=True).preprocess
        self.ctrl_adapter.control = CtrlAdapterControl.from_prompts(
            networks,
            [picture if isinstance(picture, torch.Tensor) else read(picture) for picture in pictures],
            prompt,
            self.controlnet_tokenizer,
            self.controlnet_text_encoder,
            negative_prompt,
            start=control_guidance_start,
            end=control_guidance_end,
            router=self.ctrl_adapter_router,
            active=active,
        )
        with self.ctrl_adapter.attach(self, controlnet_conditioning_scale):
            return super().__call__(prompt, negative_prompt=negative_prompt, **kwargs)
