"""One location of a Ctrl-Adapter: resnets and transformers in space and, for video, in time."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from diffusers.models.attention import BasicTransformerBlock, TemporalBasicTransformerBlock
from diffusers.models.embeddings import TimestepEmbedding, Timesteps
from diffusers.models.resnet import AlphaBlender, ResnetBlock2D, TemporalResnetBlock
from torch import nn


@dataclass(frozen=True)
class Parts:
    """What every location of one adapter is made of.

    Attributes:
        layers: Repetitions of resnets and transformers.
        dim: Width of the transformers' residual stream.
        head_dim: Channels of an attention head; a location with C channels has C / head_dim heads.
        context_dim: Width of the backbone's context.
        groups: Of the group norms.
        spatial_resnet, temporal_resnet, spatial_transformer, temporal_transformer: Which kinds there are.
    """

    layers: int
    dim: int
    head_dim: int
    context_dim: int
    groups: int
    spatial_resnet: bool
    temporal_resnet: bool
    spatial_transformer: bool
    temporal_transformer: bool


def over_frames(x: torch.Tensor, frames: int) -> torch.Tensor:
    """`[b * f, c, h, w]` -> `[b, c, f, h, w]`."""
    return x.unflatten(0, (-1, frames)).transpose(1, 2)


def one_by_one(x: torch.Tensor) -> torch.Tensor:
    """`[b, c, f, h, w]` -> `[b * f, c, h, w]`."""
    return x.transpose(1, 2).flatten(0, 1)


def tokens_of(x: torch.Tensor) -> torch.Tensor:
    """`[n, c, h, w]` -> `[n, h * w, c]`."""
    return x.flatten(2).transpose(1, 2)


def _blend(mixer: AlphaBlender, spatial: torch.Tensor, temporal: torch.Tensor, clips: int, frames: int):
    return mixer(spatial, temporal, image_only_indicator=spatial.new_zeros(clips, frames))


class AdapterBlock(nn.Module):
    """Maps one ControlNet residual to the feature space of one skip connection of the backbone.

    Its submodules carry the names of the published files.

    Args:
        channels: C, of the residual.
        out_channels: Of the skip connection.
        scale: Size of the skip connection over that of the residual: a power of two, at most 2.
        parts: What the block is made of.
    """

    def __init__(self, channels: int, out_channels: int, scale: float, parts: Parts):
        super().__init__()
        self.scale, self.parts, layers = scale, parts, range(parts.layers)
        self.time_proj = Timesteps(channels, flip_sin_to_cos=True, downscale_freq_shift=0)
        self.frame_proj = Timesteps(out_channels, flip_sin_to_cos=True, downscale_freq_shift=0)
        widths = [channels] + [out_channels] * parts.layers
        if parts.spatial_resnet or parts.temporal_resnet:
            self.resnet_time_embedding = TimestepEmbedding(channels, channels)
        if parts.spatial_resnet:
            self.spatial_resnets = nn.ModuleList(
                ResnetBlock2D(
                    in_channels=widths[l],
                    out_channels=out_channels,
                    temb_channels=channels,
                    groups=parts.groups,
                    use_in_shortcut=True,
                    up=scale == 2 and l == 0,
                )
                for l in layers
            )
        if parts.temporal_resnet:
            resnets = (TemporalResnetBlock(out_channels, out_channels, channels) for _ in layers)
            self.temporal_resnets = nn.ModuleList(resnets)
            self.resnets_time_mixer = nn.ModuleList(AlphaBlender(0.5) for _ in layers)
        if parts.spatial_transformer or parts.temporal_transformer:
            self._add_transformers(out_channels)

    def _add_transformers(self, channels: int) -> None:
        parts = self.parts
        heads, layers = channels // parts.head_dim, range(parts.layers)
        self.norm = nn.GroupNorm(parts.groups, channels, eps=1e-6)
        self.proj_in = nn.Linear(channels, parts.dim)
        self.proj_out = nn.Linear(parts.dim, channels)
        if parts.spatial_transformer:
            self.spatial_attentions = nn.ModuleList(
                BasicTransformerBlock(parts.dim, heads, parts.head_dim, cross_attention_dim=parts.context_dim)
                for _ in layers
            )
        if parts.temporal_transformer:
            self.transformer_time_embedding = TimestepEmbedding(channels, parts.dim)
            self.temporal_attentions = nn.ModuleList(
                TemporalBasicTransformerBlock(parts.dim, parts.dim, heads, parts.head_dim, parts.context_dim)
                for _ in layers
            )
            self.transformers_time_mixer = nn.ModuleList(AlphaBlender(0.5) for _ in layers)

    def forward(self, x: torch.Tensor, t: torch.Tensor, context: torch.Tensor, frames: int = 1) -> torch.Tensor:
        """The residual of the backbone.

        Args:
            x: Residual of the ControlNet `[b * f, channels, h, w]`.
            t: Timesteps of 1000, `[b * f]`.
            context: What the backbone attends to, `[b * f, tokens, context_dim]`.
            frames: f.

        Returns:
            `[b * f, out_channels, h * scale, w * scale]`.
        """
        # torch's group norm crashes backwards on channels-last inputs that need no gradient themselves.
        x = x.contiguous()
        if self.scale < 1:
            x = F.avg_pool2d(x, round(1 / self.scale))
        embedded = None
        if hasattr(self, "resnet_time_embedding"):
            embedded = self.resnet_time_embedding(self.time_proj(t).to(x.dtype))
        for l in range(self.parts.layers):
            x = self._resnets(l, x, embedded, frames)
            if hasattr(self, "proj_in"):
                x = self._transformers(l, x, context, frames)
        return x

    def _resnets(self, l: int, x: torch.Tensor, embedded: torch.Tensor | None, frames: int) -> torch.Tensor:
        if self.parts.spatial_resnet:
            x = self.spatial_resnets[l](x, embedded)
        if self.parts.temporal_resnet:
            video = over_frames(x, frames)
            mixed = self.temporal_resnets[l](video, embedded.unflatten(0, (-1, frames)))
            x = one_by_one(_blend(self.resnets_time_mixer[l], video, mixed, len(video), frames))
        return x

    def _transformers(self, l: int, x: torch.Tensor, context: torch.Tensor, frames: int) -> torch.Tensor:
        tokens = self.proj_in(tokens_of(self.norm(x)))
        if self.parts.spatial_transformer:
            tokens = self.spatial_attentions[l](tokens, encoder_hidden_states=context)
        if self.parts.temporal_transformer:
            tokens = self._in_time(l, tokens, context, frames)
        return x + self.proj_out(tokens).transpose(1, 2).unflatten(2, x.shape[-2:])

    def _in_time(self, l: int, tokens: torch.Tensor, context: torch.Tensor, frames: int) -> torch.Tensor:
        clips = len(tokens) // frames
        index = torch.arange(frames, device=tokens.device).repeat(clips)
        place = self.transformer_time_embedding(self.frame_proj(index).to(tokens.dtype))
        # Every pixel's track through time attends to the context of the first frame.
        first = context[::frames].repeat_interleave(tokens.shape[1], 0)
        mixed = self.temporal_attentions[l](tokens + place[:, None], frames, encoder_hidden_states=first)
        return _blend(self.transformers_time_mixer[l], tokens, mixed, clips, frames)
