"""Both stages of Any-Size-Diffusion in one call: a picture of the nearest trained canvas, then enlarged by tiles.

Zheng et al., "Any-Size-Diffusion: Toward Efficient Text-Driven Synthesis for Any-Size HD Images", 2023,
https://arxiv.org/abs/2308.16582
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import StableDiffusionImg2ImgPipeline, StableDiffusionPipeline

from ..apply import apply
from .any_size_diffusion import SeamlessTilingConfig
from .any_size_diffusion_buckets import AspectBuckets


__all__ = ["AnySizeDiffusionPipeline"]


class AnySizeDiffusionPipeline(StableDiffusionImg2ImgPipeline):
    """Draws a prompt at any size with a Stable Diffusion model: composes at a known size, then adds detail by tiles.

    Load it with `from_pretrained`, or make it of a pipeline: `AnySizeDiffusionPipeline.from_pipe(pipe)`. A LoRA that
    was trained on many aspect ratios (`BucketBatchSampler`) is loaded as any other.

    Example:
        >>> from diffusers_ext import AnySizeDiffusionPipeline, AspectBuckets, zoo
        >>> pipe = AnySizeDiffusionPipeline.from_pipe(zoo.load("shapes-unet"))
        >>> buckets = AspectBuckets(area=64 * 64, multiple=8)
        >>> image = pipe("a red circle", height=128, width=96, num_inference_steps=8, buckets=buckets).images[0]
        >>> image.size
        (96, 128)
    """

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | Sequence[str],
        height: int = 1024,
        width: int = 1024,
        strength: float = 0.3,
        num_inference_steps: int = 50,
        guidance_scale: float = 7.5,
        enlarging_guidance_scale: float | None = None,
        negative_prompt: str | Sequence[str] | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        buckets: AspectBuckets | None = None,
        tiling: SeamlessTilingConfig | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
    ) -> Any:
        """Draw.

        Args:
            prompt: What to draw.
            height, width: Of the result, multiples of 8.
            strength: Of the second stage, in (0, 1]: how much the tiles may change. Near 1 every tile draws the whole
                prompt anew.
            num_inference_steps: Of both stages; the second runs its last `strength` of them.
            enlarging_guidance_scale: Of the second stage; lower it if tiles draw parts of the prompt anew. Default:
                that of the first.
            guidance_scale, negative_prompt, generator, output_type, return_dict: As in `StableDiffusionPipeline`.
            buckets: Canvases of the first stage. Default: about 512 x 512 pixels.
            tiling: Of the second stage. Default: tiles of the trained size, moved at random.

        Returns:
            `StableDiffusionPipelineOutput`, or a tuple.

        Raises:
            ValueError: A strength that leaves the second stage no step, or what the two pipelines refuse.
        """
        if not 0 < strength <= 1 or int(num_inference_steps * strength) < 1:
            raise ValueError(
                f"strength is {strength} of {num_inference_steps} steps, which leaves the second stage none; "
                "accepted: above 0 to 1, and at least one step"
            )
        shared = {
            "prompt": prompt if isinstance(prompt, str) else list(prompt),
            "negative_prompt": negative_prompt,
            "num_inference_steps": num_inference_steps,
            "generator": generator,
        }
        canvas = (buckets or AspectBuckets()).nearest(height, width)
        first = StableDiffusionPipeline.from_pipe(self)
        first.set_progress_bar_config(**getattr(self, "_progress_bar_config", {}))
        size = {"height": canvas[0], "width": canvas[1]}
        small = first(**shared, **size, guidance_scale=guidance_scale, output_type="pt").images
        large = F.interpolate(small.float(), size=(height, width), mode="bicubic").clamp(0, 1)
        with tiled_vae(self.vae), apply(self, tiling or SeamlessTilingConfig()):
            return super().__call__(
                **shared,
                image=large,
                strength=strength,
                guidance_scale=guidance_scale if enlarging_guidance_scale is None else enlarging_guidance_scale,
                output_type=output_type,
                return_dict=return_dict,
            )


@contextmanager
def tiled_vae(vae: Any) -> Iterator[None]:
    """Inside the block the VAE works by tiles too; it is left as it was."""
    before = vae.use_tiling
    vae.enable_tiling()
    try:
        yield
    finally:
        vae.use_tiling = before
