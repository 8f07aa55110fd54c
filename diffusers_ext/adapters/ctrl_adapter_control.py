"""What a Ctrl-Adapter adapts: ControlNets of another model, run on the backbone's noisy latents, and a router.

Lin, Cho, Zala, Bansal, "Ctrl-Adapter", ICLR 2025, https://arxiv.org/abs/2404.09967
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, ControlNetModel, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import nn

from ._common import require_complete, require_pictures, require_range


__all__ = ["CtrlAdapterControl", "CtrlAdapterRouter"]

_MASKED = -1e6
_KARRAS_POINTS, _RHO = 200_000, 7.0


def inverse_timesteps(
    u: torch.Tensor, inverse_cdf: Callable[[torch.Tensor], torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Inverse timestep sampling: one u in [0, 1] gives the backbone's noise level and the ControlNet's timestep.

    Args:
        u: Uniform numbers.
        inverse_cdf: F^-1 of the distribution of noise levels that the backbone was trained with.

    Returns:
        Noise levels F^-1(u) and timesteps round(1000 u).
    """
    return inverse_cdf(u), (1000 * u).round().long()


def svd_levels(draws: torch.Tensor, num_inference_steps: int = 25) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Inverse timestep sampling for Stable Video Diffusion, over a fine Karras grid of sigmas.

    Args:
        draws: Uniform numbers in [0, 1).
        num_inference_steps: S of the runs to come; keeps u inside (0, 1).

    Returns:
        sigma, the backbone's timestep ln(sigma) / 4, and the ControlNet's timestep round(1000 u).
    """
    low, high = 0.002 ** (1 / _RHO), 700 ** (1 / _RHO)
    index = (draws.double() * _KARRAS_POINTS).floor() / (_KARRAS_POINTS - 1)
    sigma = (low + index * (high - low)) ** _RHO
    u = index * (1 - 1 / num_inference_steps) + 0.001
    return sigma, 0.25 * sigma.log(), (1000 * u).round().long()


def inference_timestep(step: int, num_inference_steps: int) -> int:
    """The ControlNet's timestep at step i (from 0) of S, for backbones with continuous noise levels."""
    return 1000 - (step + 1) * (1000 // num_inference_steps) + 1


def pooled(latents: torch.Tensor, ratio: int) -> torch.Tensor:
    """Latents `[n, c, h, w]` averaged over `ratio` x `ratio`, the size that the ControlNet was trained for."""
    if ratio == 1:
        return latents
    if any(size % ratio for size in latents.shape[-2:]):
        raise ValueError(
            f"latents of {latents.shape[-2]} x {latents.shape[-1]} cannot be averaged over {ratio} x {ratio}: choose "
            f"a picture size whose latents divide by {ratio}"
        )
    return F.adaptive_avg_pool2d(latents, [size // ratio for size in latents.shape[-2:]])


@contextlib.contextmanager
def latents_skipped(controlnet: nn.Module):
    """Latent skipping: inside the block the ControlNet sees its condition only, not the noisy latents."""
    handle = controlnet.conv_in.register_forward_hook(lambda module, args, output: torch.zeros_like(output))
    try:
        yield
    finally:
        handle.remove()


def sites_of(controlnet: nn.Module) -> tuple[list[int], list[int]]:
    """Channels and downscaling of every residual of a ControlNet, the middle last."""
    widths, layers = controlnet.config.block_out_channels, controlnet.config.layers_per_block
    channels, scales = [widths[0]], [1]
    for level, width in enumerate(widths):
        channels += [width] * layers
        scales += [2**level] * layers
        if level < len(widths) - 1:
            channels.append(width)
            scales.append(2 ** (level + 1))
    return [*channels, widths[-1]], [*scales, 2 ** (len(widths) - 1)]


@torch.no_grad()
def text_states(tokenizer, text_encoder, prompts: Sequence[str]) -> torch.Tensor:
    """States `[n, tokens, width]` of prompts, as a Stable Diffusion pipeline computes them."""
    length = min(tokenizer.model_max_length, text_encoder.config.max_position_embeddings)
    tokens = tokenizer(list(prompts), padding="max_length", max_length=length, truncation=True, return_tensors="pt")
    return text_encoder(tokens.input_ids.to(text_encoder.device))[0]


@dataclass(frozen=True)
class CtrlAdapterControl:
    """What to draw by: ControlNets, their condition pictures and the prompt in the words of their text encoder.

    Args:
        controlnets: One `ControlNetModel`, or several.
        images: Condition pictures `[n, channels, height, width]` in [0, 1], one tensor per ControlNet: one picture
            for all rows, one per prompt, or for video one per (key) frame.
        prompt_embeds: Prompt of every picture in the ControlNets' own text encoder, `[1 or n, tokens, width]`; see
            `from_prompts`.
        negative_prompt_embeds: The same for the unconditional half of guided batches. Default: the prompt.
        start, end: Part of the run that is controlled, as fractions of the steps.
        pool: Average larger latents to the size the ControlNets were trained for; without, they must have it.
        router: Weights of several ControlNets. Default: their mean.
        active: For a router, which ControlNets take part. Default all.
        sparse_frame_ids: For video, the frames that are controlled. Default all.

    Raises:
        ValueError: Numbers of pictures, ControlNets or rows that do not go together, or values out of range.
    """

    controlnets: ControlNetModel | Sequence[ControlNetModel]
    images: torch.Tensor | Sequence[torch.Tensor]
    prompt_embeds: torch.Tensor
    negative_prompt_embeds: torch.Tensor | None = None
    start: float = 0.0
    end: float = 1.0
    pool: bool = True
    router: CtrlAdapterRouter | None = None
    active: Sequence[bool] | None = None
    sparse_frame_ids: Sequence[int] | None = None

    def __post_init__(self) -> None:
        for name in ("controlnets", "images"):
            value = getattr(self, name)
            one = isinstance(value, (nn.Module, torch.Tensor))
            object.__setattr__(self, name, (value,) if one else tuple(value))
        if len(self.controlnets) != len(self.images) or not self.controlnets:
            raise ValueError(
                f"{len(self.controlnets)} ControlNets and {len(self.images)} condition pictures: give one each"
            )
        for controlnet, image in zip(self.controlnets, self.images):
            require_pictures(image, (controlnet.config.conditioning_channels,))
        self._require_text()
        require_range(self.start, self.end)
        if len({str(sites_of(c)) for c in self.controlnets}) > 1:
            raise ValueError("the ControlNets have residuals of different shapes: use ControlNets of one base model")

    def _require_text(self) -> None:
        shape, width = list(self.prompt_embeds.shape), self.controlnets[0].config.cross_attention_dim
        if len(shape) != 3 or shape[-1] != width:
            raise ValueError(
                f"prompt_embeds have the shape {shape}; these ControlNets read [1 or n, tokens, {width}] of their own "
                "text encoder: see CtrlAdapterControl.from_prompts"
            )
        other = self.negative_prompt_embeds
        if other is not None and list(other.shape[1:]) != shape[1:]:
            raise ValueError(f"negative_prompt_embeds {list(other.shape)} must have as many tokens as {shape}")

    @classmethod
    def from_prompts(
        cls,
        controlnets: ControlNetModel | Sequence[ControlNetModel],
        images: torch.Tensor | Sequence[torch.Tensor],
        prompts: str | Sequence[str],
        tokenizer,
        text_encoder,
        negative_prompt: str = "",
        **options,
    ) -> CtrlAdapterControl:
        """The same from texts, with tokenizer and text encoder of the model that the ControlNets were made for.

        Args:
            controlnets, images: See the class.
            prompts: One for all pictures or one each.
            tokenizer, text_encoder: CLIP-L for ControlNets of Stable Diffusion 1.5.
            negative_prompt: For the unconditional half of guided batches.
            options: Further fields of the class.
        """
        prompts = [prompts] if isinstance(prompts, str) else prompts
        positive = text_states(tokenizer, text_encoder, prompts)
        negative = text_states(tokenizer, text_encoder, [negative_prompt])
        return cls(controlnets, images, positive, negative, **options)

    @torch.no_grad()
    def residuals(
        self,
        latents: torch.Tensor,
        t: torch.Tensor,
        unconditional: int = 0,
        scale: float = 1.0,
        frames: int = 1,
        skip_latents: bool = False,
    ) -> tuple[list[torch.Tensor], torch.Tensor]:
        """Residuals of the ControlNets, combined: one per location, and that of the middle.

        Args:
            latents: As the ControlNets take them, `[rows, c, h, w]`.
            t: Their timesteps, `[rows]`.
            unconditional: How many of the rows, at the beginning, are unconditional; the parts behind are as long.
            scale: Multiplies the residuals.
            frames: Rows of one clip.
            skip_latents: Latent skipping, see `latents_skipped`.
        """
        part = unconditional or len(latents)
        copies = len(latents) // part
        prompts = [rows_of(self.prompt_embeds, part, "prompts")] * copies
        if unconditional and self.negative_prompt_embeds is not None:
            prompts[0] = rows_of(self.negative_prompt_embeds, part, "negative prompts")
        text = torch.cat(prompts)
        skipping = latents_skipped if skip_latents else contextlib.nullcontext
        outputs = []
        for controlnet, image in zip(self.controlnets, self.images):
            hint = fitted(image, latents.shape[-2:], controlnet)
            hint = torch.cat([rows_of(hint, part, "condition pictures", frames)] * copies)
            seen, text, hint = (v.to(controlnet.device, controlnet.dtype) for v in (latents, text, hint))
            with skipping(controlnet):
                down, mid = controlnet(
                    seen, t.to(seen.device), text, hint, conditioning_scale=scale, return_dict=False
                )
            outputs.append([*down, mid])
        return combined(outputs, self.router, self.active)


def rows_of(values: torch.Tensor, rows: int, what: str, frames: int = 1) -> torch.Tensor:
    """One value for all rows, or one for every so many: `[n, ...]` -> `[rows, ...]`; clips stay together."""
    run = frames if len(values) > 1 else 1
    if len(values) % run or rows % len(values):
        raise ValueError(
            f"{len(values)} {what} for {rows} pictures in a batch: give one, or as many as there are pictures; a run "
            "in several batches needs a control for each"
        )
    groups = values.unflatten(0, (-1, run))
    return groups.repeat_interleave(rows // len(values), 0).flatten(0, 1)


def fitted(image: torch.Tensor, size: Sequence[int], controlnet: nn.Module) -> torch.Tensor:
    """Condition pictures at the size that the ControlNet takes for latents of this size; larger ones are averaged."""
    factor = 2 ** (len(controlnet.config.conditioning_embedding_out_channels) - 1)
    wanted = [s * factor for s in size]
    channels = controlnet.config.conditioning_channels
    if image.shape[1] != channels or any(have < want for have, want in zip(image.shape[-2:], wanted)):
        raise ValueError(
            f"condition pictures of shape {list(image.shape[1:])}: this ControlNet takes {channels} channels and, for "
            f"these latents, at least {wanted[0]} x {wanted[1]} pixels"
        )
    shape = image.shape[-2] / image.shape[-1]
    if not math.isclose(shape, wanted[0] / wanted[1], rel_tol=0.03):
        raise ValueError(
            f"condition pictures of {image.shape[-2]} x {image.shape[-1]} pixels for a picture of {wanted[0]} x "
            f"{wanted[1]}: crop or pad them to its shape"
        )
    return image if list(image.shape[-2:]) == wanted else F.adaptive_avg_pool2d(image, wanted)


def combined(
    outputs: list[list[torch.Tensor]], router: CtrlAdapterRouter | None, active: Sequence[bool] | None
) -> tuple[list[torch.Tensor], torch.Tensor]:
    """One residual per location from those of all ControlNets: routed, or their mean."""
    if router is not None:
        residuals = router(outputs, active)
    elif len(outputs) == 1:
        residuals = outputs[0]
    else:
        residuals = [torch.stack(values).mean(0) for values in zip(*outputs)]
    return residuals[:-1], residuals[-1]


class _Gate(nn.Module):
    """Logits of the experts at one location, learned or all equal."""

    def __init__(self, experts: int, learned: bool):
        super().__init__()
        self.experts = experts
        if learned:
            self.wg = nn.Linear(1, experts, bias=False)

    def forward(self, like: torch.Tensor) -> torch.Tensor:
        return self.wg(like.new_ones(1)) if hasattr(self, "wg") else like.new_zeros(self.experts)


class CtrlAdapterRouter(ModelMixin, ConfigMixin):
    """Weighs the residuals of several ControlNets, one softmax per location. Paper: https://arxiv.org/abs/2404.09967

    Args:
        num_experts: Number of ControlNets.
        num_routers: Number of residuals besides that of the middle; 12 for Stable Diffusion 1.5.
        router_type: `"equal_weights"`, or `"simple_weights"`, which are learned.
        backbone_model_name: Kept for files of the authors.
        add_mid_block_router: Whether the middle has weights, too.
    """

    config_name = "config.json"

    @register_to_config
    def __init__(
        self,
        num_experts: int = 4,
        num_routers: int = 12,
        router_type: str = "simple_weights",
        backbone_model_name: str = "i2vgenxl",
        add_mid_block_router: bool = True,
    ):
        super().__init__()
        if router_type not in ("equal_weights", "simple_weights"):
            raise ValueError(f"router_type is {router_type!r}; accepted: 'equal_weights', 'simple_weights'")
        learned = router_type == "simple_weights"
        self.down_blocks_router = nn.ModuleList(_Gate(num_experts, learned) for _ in range(num_routers))
        if add_mid_block_router:
            self.mid_block_router = _Gate(num_experts, learned)
        # Equal weights have no parameters, and a pipeline asks every component where it is.
        self.register_buffer("_place", torch.zeros(()), persistent=False)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **kwargs: Any) -> CtrlAdapterRouter:
        """As diffusers' own, but `ValueError` where weights are missing, unknown or of another shape."""
        kwargs["output_loading_info"] = True
        model, found = super().from_pretrained(pretrained_model_name_or_path, **kwargs)
        require_complete(cls, found["missing_keys"], found["unexpected_keys"], found["mismatched_keys"])
        return model

    def weights(self, active: Sequence[bool] | None = None) -> torch.Tensor:
        """Weights `[locations, experts]`; every row sums to 1, experts that are not active have none."""
        experts = self.config.num_experts
        active = [True] * experts if active is None else list(active)
        if len(active) != experts or not any(active):
            raise ValueError(f"active is {active}: give {experts} truth values, at least one of them true")
        like = next(self.parameters(), self._place)
        gates = [*self.down_blocks_router, *([self.mid_block_router] if hasattr(self, "mid_block_router") else [])]
        logits = torch.stack([gate(like) for gate in gates])
        off = ~torch.tensor(active, device=logits.device)
        return logits.masked_fill(off, _MASKED).softmax(-1)

    def forward(
        self, outputs: Sequence[Sequence[torch.Tensor]], active: Sequence[bool] | None = None
    ) -> list[torch.Tensor]:
        """The weighted sum over the ControlNets, location by location.

        Args:
            outputs: Per ControlNet its residuals, the middle last.
            active: Which ControlNets take part.
        """
        weights = self.weights(active)
        if len(outputs) != weights.shape[1] or any(len(o) != len(weights) for o in outputs):
            raise ValueError(
                f"{len(outputs)} ControlNets with {len(outputs[0])} residuals; this router weighs "
                f"{weights.shape[1]} with {len(weights)}"
            )
        return [
            sum(w.to(r) * r for w, r in zip(row, values))  # type: ignore[misc]
            for row, values in zip(weights, zip(*outputs))
        ]
