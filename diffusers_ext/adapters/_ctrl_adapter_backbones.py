"""How a Ctrl-Adapter reads and reaches the backbones: UNets, video UNets and Flux transformers."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import (
    FluxTransformer2DModel,
    I2VGenXLUNet,
    UNet2DConditionModel,
    UNetSpatioTemporalConditionModel,
)
from torch import nn

from .._flux_tokens import grid_of, unpack
from .ctrl_adapter_control import inference_timestep, sites_of


@dataclass(frozen=True)
class Call:
    """One call of a backbone, as a ControlNet takes it.

    Attributes:
        latents: `[rows, c, h, w]`; for video a row is a frame.
        time: Of the ControlNet, of 1000; None where it depends on the step of the run.
        context: What the adapter attends to, `[rows, tokens, width]`.
        frames: Frames of a clip, 1 for pictures.
    """

    latents: torch.Tensor
    time: torch.Tensor | None
    context: torch.Tensor
    frames: int = 1


Compute = Callable[[Mapping[str, Any]], "list[torch.Tensor] | None"]


class UNetBackbone:
    """Stable Diffusion layout: residuals enter as those of a ControlNet do, and add to those that are there."""

    frames_per_clip = False
    locations = "ABC"

    def __init__(self, model: nn.Module):
        self.model = model
        self.context_width = model.config.cross_attention_dim
        channels, scales = sites_of(model)
        self.channels, self.scales = channels, scales

    def read(self, arguments: Mapping[str, Any]) -> Call:
        latents = arguments["sample"]
        return Call(latents, _times(arguments["timestep"], latents), arguments["encoder_hidden_states"])

    def shape_of(self, k: int) -> tuple[int, float]:
        """Channels of skip connection k (the last one is the middle), and how much smaller than the latents it is."""
        return self.channels[k], self.scales[k]

    @property
    def skips(self) -> int:
        """Number of skip connections."""
        return len(self.channels) - 1

    def install(self, compute: Compute, undo: ExitStack) -> None:
        @torch.compiler.disable
        def enter(_, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
            residuals = compute(_named(self.model, args, kwargs))
            if residuals is None:
                return None
            down, mid = residuals[: len(self.channels) - 1], residuals[-1]
            given = kwargs.get("down_block_additional_residuals")
            if given is not None:
                down = [a + b for a, b in zip(given, down)]
                mid = mid + kwargs["mid_block_additional_residual"]
            return args, {**kwargs, "down_block_additional_residuals": down, "mid_block_additional_residual": mid}

        undo.callback(self.model.register_forward_pre_hook(enter, with_kwargs=True).remove)


class VideoBackbone(UNetBackbone):
    """I2VGen-XL and Stable Video Diffusion, whose UNets take no residuals: they are added on the way."""

    frames_per_clip = True
    locations = "ABCDM"

    def read(self, arguments: Mapping[str, Any]) -> Call:
        sample, stable = arguments["sample"], isinstance(self.model, UNetSpatioTemporalConditionModel)
        # I2VGen-XL: [clips, channels, frames, h, w]; SVD: [clips, frames, channels, h, w], the picture behind.
        video = sample[:, :, :4] if stable else sample.transpose(1, 2)
        frames = video.shape[1]
        latents = video.flatten(0, 1)
        context = arguments["encoder_hidden_states" if stable else "image_embeddings"]
        context = context if context.ndim == 3 else context[:, None]
        time = None
        if not stable:
            time = _times(arguments["timestep"], sample).repeat_interleave(frames)
        return Call(latents, time, context.repeat_interleave(frames, 0), frames)

    def install(self, compute: Compute, undo: ExitStack) -> None:
        now: dict[str, list[torch.Tensor] | None] = {"residuals": None}

        @torch.compiler.disable
        def begin(_, args: tuple, kwargs: dict) -> None:
            now["residuals"] = compute(_named(self.model, args, kwargs))

        def middle(_, __, output: torch.Tensor) -> torch.Tensor:
            return output if now["residuals"] is None else output + now["residuals"][-1]

        def skips(first: int) -> Callable:
            def enter(_, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
                if now["residuals"] is None:
                    return None
                given = kwargs["res_hidden_states_tuple"]
                mine = now["residuals"][first : first + len(given)]
                return args, {**kwargs, "res_hidden_states_tuple": tuple(a + b for a, b in zip(given, mine))}

            return enter

        undo.callback(self.model.register_forward_pre_hook(begin, with_kwargs=True).remove)
        undo.callback(self.model.mid_block.register_forward_hook(middle).remove)
        last = len(self.channels) - 1
        for block in self.model.up_blocks:
            last -= len(block.resnets)
            undo.callback(block.register_forward_pre_hook(skips(last), with_kwargs=True).remove)


class FluxBackbone:
    """Flux layout: residuals become grids of tokens, added to the picture's tokens in the double blocks."""

    frames_per_clip = False
    locations = "ABCM"

    def __init__(self, model: nn.Module):
        self.model = model
        self.context_width = model.config.joint_attention_dim
        self.width = model.config.num_attention_heads * model.config.attention_head_dim
        self.blocks = len(model.transformer_blocks)

    def read(self, arguments: Mapping[str, Any]) -> Call:
        tokens, places = arguments["hidden_states"], arguments["img_ids"]
        height, width = grid_of(places)
        latents = unpack(tokens, 2 * height, 2 * width)
        time = (1000 * _times(arguments["timestep"], tokens)).round()
        return Call(latents, time, arguments["encoder_hidden_states"])

    def shape_of(self, k: int) -> tuple[int, float]:
        return self.width, 2

    def install(self, compute: Compute, undo: ExitStack) -> None:
        @torch.compiler.disable
        def enter(_, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
            residuals = compute(_named(self.model, args, kwargs))
            if residuals is None:
                return None
            mine = spread([r.flatten(2).transpose(1, 2) for r in residuals], self.blocks)
            given = kwargs.get("controlnet_block_samples")
            if given is not None:
                mine = [a + b for a, b in zip(spread(given, self.blocks), mine)]
            return args, {**kwargs, "controlnet_block_samples": mine}

        undo.callback(self.model.register_forward_pre_hook(enter, with_kwargs=True).remove)


def spread(samples: Sequence[torch.Tensor], blocks: int) -> list[torch.Tensor]:
    """One sample per block, as Flux hands out fewer samples than it has blocks."""
    interval = math.ceil(blocks / len(samples))
    return [samples[i // interval] for i in range(blocks)]


def _named(model: nn.Module, args: tuple, kwargs: dict) -> dict[str, Any]:
    """Arguments of a call by name."""
    return inspect.signature(type(model).forward).bind(model, *args, **kwargs).arguments


def _times(timestep: torch.Tensor | float, sample: torch.Tensor) -> torch.Tensor:
    return torch.as_tensor(timestep, device=sample.device).expand(len(sample))


def step_time(place: int | None, steps: int | None, call: Call) -> torch.Tensor:
    """Timesteps of the ControlNet for a backbone whose own do not tell, from the step of the run."""
    if place is None or steps is None:
        raise ValueError(
            "the ControlNet's timestep follows from the step of the run: attach to the pipeline, not to its model"
        )
    return torch.full((len(call.latents),), inference_timestep(place, steps), device=call.latents.device)


_BACKBONES = {
    UNet2DConditionModel: UNetBackbone,
    I2VGenXLUNet: VideoBackbone,
    UNetSpatioTemporalConditionModel: VideoBackbone,
    FluxTransformer2DModel: FluxBackbone,
}


def backbone_of(model: nn.Module) -> UNetBackbone | FluxBackbone:
    """The backbone behind a model. Raises `ValueError`, naming what is supported, for other models."""
    kind = next((k for cls, k in _BACKBONES.items() if isinstance(model, cls)), None)
    if kind is None:
        known = ", ".join(cls.__name__ for cls in _BACKBONES)
        raise ValueError(f"{type(model).__name__} is no backbone of a Ctrl-Adapter; supported: {known}")
    return kind(model)
