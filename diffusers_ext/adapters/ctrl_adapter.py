"""Ctrl-Adapter: ControlNets of one model drive another one.

Lin, Cho, Zala, Bansal, "Ctrl-Adapter: An Efficient and Versatile Framework for Adapting Diverse Controls to Any
Diffusion Model", ICLR 2025, https://arxiv.org/abs/2404.09967
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from diffusers.configuration_utils import register_to_config
from torch import nn

from ..apply import denoiser_of
from ..caching._common import place_of, steps_of
from ..registry import Claim, MethodRecord, register
from ._common import Adapter, conditional_rows, within
from ._ctrl_adapter_backbones import Call, FluxBackbone, UNetBackbone, backbone_of, step_time
from ._ctrl_adapter_block import AdapterBlock, Parts
from .ctrl_adapter_control import CtrlAdapterControl, pooled, sites_of


__all__ = ["CtrlAdapterModel"]

_LETTERS = "ABCD"
# Residuals of Stable Diffusion 1.5's ControlNet, the middle last.
_SD15 = (320, 320, 320, 320, 640, 640, 640, 1280, 1280, 1280, 1280, 1280, 1280)
# The output of a location is a sum of what these layers give.
_LAST_LAYERS = ("conv2", "conv_shortcut", "proj_out")
_KEY = re.compile(r"(down_blocks_adapter\.(?P<index>\d+)|mid_block_adapter)\.norm\.weight")


def chosen(locations: str, group: int, count: int) -> list[int]:
    """Indices of the residuals that get an adapter.

    Args:
        locations: Letters; A is the first group of residuals, B the second, ...
        group: Residuals per group: those of one resolution of the encoder, and the layer that leads to it.
        count: Adapters per group: 1 takes the last residual, 2 the first and the last, more take all.
    """
    found: list[int] = []
    for letter in sorted(set(locations) - {"M"}):
        first = _LETTERS.index(letter) * group
        members = list(range(first, first + group))
        found += members[-1:] if count == 1 else [members[0], members[-1]] if count == 2 and group > 1 else members
    return found


@register(
    MethodRecord(
        slug="ctrl-adapter",
        family="adapters",
        kind="adapter",
        title="Ctrl-Adapter: An Efficient and Versatile Framework for Adapting Diverse Controls to Any Diffusion "
        "Model",
        arxiv="2404.09967",
        summary="ControlNets made for one model control another one, through a small trained adapter",
        targets=("unet", "mmdit", "video"),
        predictions=("epsilon", "v_prediction", "sample", "flow_prediction"),
        nodes=("DXCtrlAdapterLoader", "DXCtrlAdapterApply"),
        claim=Claim(
            text="Control as exact as a ControlNet's of the backbone, after less training than",
            setting="images with SDXL, video with I2VGen-XL and SVD",
            value=10,
            unit="GPU hours",
        ),
    )
)
class CtrlAdapterModel(Adapter):
    """Lets ControlNets of one model control another. Paper: https://arxiv.org/abs/2404.09967

    The ControlNet runs on the noisy latents of the new model (the backbone); at every chosen residual a small network
    maps what it says to the backbone's own features, where it is added. ControlNet and backbone stay as they are. The
    first arguments are those of the authors' files; `for_model` fills all of them in.

    Args:
        backbone_model_name: `"sdxl"`, `"i2vgenxl"`, `"svd"`, or any other name.
        num_blocks: Resnets and transformers at each location.
        num_frames: Frames of a clip in training; kept for the authors' files.
        num_adapters_per_location: 1, 2 or 3, see `chosen`.
        cross_attention_dim: Width of the backbone's context.
        adapter_type: Kept for the authors' files.
        add_spatial_resnet, add_temporal_resnet, add_spatial_transformer, add_temporal_transformer: What an adapter is
            made of.
        add_adapter_location_A, add_adapter_location_B, add_adapter_location_C, add_adapter_location_D,
            add_adapter_location_M: Which groups of residuals, and whether the middle, have adapters.
        num_repeats: 1; kept for the authors' files.
        out_channels: Of the backbone at every residual, the middle last. Default: those of the ControlNet.
        controlnet_channels: Channels of the ControlNet's residuals, the middle last.
        controlnet_group: Residuals per letter.
        up_sampling_scales: Size of the backbone's features over that of every residual: 2, 1, 1/2, ... Default: 2
            for `"sdxl"`, else 1.
        latent_ratio: Size of the backbone's latents over those the ControlNet takes. Default: as above.
        controlnet_sample_size: Size of the latents the ControlNet was trained with.
        transformer_dim: Width inside the transformers.
        attention_head_dim: Channels per attention head.
        norm_groups: Of the group norms.
        skip_conv_in: Latent skipping: the ControlNet sees its condition only. For key frames and for backbones with
            another noise scale.
        fixed_controlnet_timestep: In [0, 1000], whatever that of the backbone; -1 for off. With `skip_conv_in` the
            ControlNet says the same at every step and runs once per picture.
        fixed_adapter_timestep: The same for the adapter itself (not in the authors' files). With both and
            `skip_conv_in`, nothing of the control depends on the step: it is computed once per picture.

    Raises:
        ValueError: Values that do not go together; on `attach`, another backbone than the adapter was made for; in a
            run, numbers of pictures or sizes that do not fit.
        RuntimeError: In a run, if there is no `control` yet.

    Example:
        >>> from diffusers_ext import CtrlAdapterControl, CtrlAdapterModel, zoo
        >>> pipe, scenes = zoo.load("shapes-unet"), zoo.held_out(2)
        >>> source = zoo.load("shapes-unet-eps")  # the model that the ControlNet was made for
        >>> controlnet = zoo.load_controlnet("controlnet-edges-shapes-unet-eps")
        >>> edges = zoo.conditions.edges(scenes.images).expand(-1, 3, -1, -1)
        >>> adapter = CtrlAdapterModel.from_pretrained(zoo.adapter_file("ctrl-adapter-shapes-unet"))
        >>> adapter.control = CtrlAdapterControl.from_prompts(
        ...     controlnet, edges, scenes.captions, source.tokenizer, source.text_encoder
        ... )
        >>> with adapter.attach(pipe):
        ...     images = zoo.generate(pipe, scenes.captions, num_inference_steps=4)

    Limits:
        A fresh adapter is not the identity: it has to be trained. Control costs a run of ControlNet and adapter per
        step, unless they are constant (see `fixed_controlnet_timestep` and `fixed_adapter_timestep`).
    """

    @register_to_config
    def __init__(
        self,
        backbone_model_name: str = "sdxl",
        num_blocks: int = 2,
        num_frames: int = 16,
        num_adapters_per_location: int = 3,
        cross_attention_dim: int = 2048,
        adapter_type: str = "spatial_temporal_resnet_transformer",
        add_spatial_resnet: bool = True,
        add_temporal_resnet: bool = False,
        add_spatial_transformer: bool = True,
        add_temporal_transformer: bool = False,
        add_adapter_location_A: bool = True,
        add_adapter_location_B: bool = True,
        add_adapter_location_C: bool = True,
        add_adapter_location_D: bool = False,
        add_adapter_location_M: bool = False,
        num_repeats: int = 1,
        out_channels: Sequence[int] | None = None,
        controlnet_channels: Sequence[int] = _SD15,
        controlnet_group: int = 3,
        up_sampling_scales: Sequence[float] | None = None,
        latent_ratio: int | None = None,
        controlnet_sample_size: int = 64,
        transformer_dim: int = 512,
        attention_head_dim: int = 64,
        norm_groups: int = 32,
        skip_conv_in: bool = False,
        fixed_controlnet_timestep: int = -1,
        fixed_adapter_timestep: int = -1,
    ):
        super().__init__()
        for name in ("fixed_controlnet_timestep", "fixed_adapter_timestep"):
            if not -1 <= self.config[name] <= 1000:
                raise ValueError(f"{name} is {self.config[name]}; accepted: 0 to 1000, -1 for off")
        up = 2 if backbone_model_name == "sdxl" else 1
        self.control: CtrlAdapterControl | None = None
        self.latent_ratio = latent_ratio or up
        self.up_scales = list(up_sampling_scales or [up] * len(controlnet_channels))
        self.widths = list(out_channels or controlnet_channels)
        flags = {letter: getattr(self.config, f"add_adapter_location_{letter}") for letter in [*_LETTERS, "M"]}
        self.active = self._locations("".join(letter for letter, on in flags.items() if on))
        parts = Parts(
            num_blocks,
            transformer_dim,
            attention_head_dim,
            cross_attention_dim,
            norm_groups,
            add_spatial_resnet,
            add_temporal_resnet,
            add_spatial_transformer,
            add_temporal_transformer,
        )
        middle = len(controlnet_channels) - 1
        blocks = {k: self._block(k, parts) for k in self.active}
        self.down_blocks_adapter = nn.ModuleList(block for k, block in blocks.items() if k != middle)
        if middle in blocks:
            self.mid_block_adapter = blocks[middle]
        self._forget()

    def _locations(self, letters: str) -> list[int]:
        config, last = self.config, len(self.config.controlnet_channels) - 1
        if not len(self.widths) == len(self.up_scales) == last + 1:
            raise ValueError(
                f"{len(self.widths)} out_channels and {len(self.up_scales)} up_sampling_scales for {last + 1} "
                "residuals of the ControlNet (the middle included): give one each"
            )
        if config.num_adapters_per_location not in (1, 2, 3):
            raise ValueError(f"num_adapters_per_location is {config.num_adapters_per_location}; accepted: 1, 2, 3")
        found = chosen(letters, config.controlnet_group, config.num_adapters_per_location)
        if not letters or max(found, default=0) >= last:
            known = _LETTERS[: last // config.controlnet_group] + "M"
            raise ValueError(
                f"adapter locations {letters!r}: this ControlNet has {', '.join(known)}; choose from them"
            )
        return found + ([last] if "M" in letters else [])

    def _block(self, k: int, parts: Parts) -> AdapterBlock:
        channels, width, scale = self.config.controlnet_channels[k], self.widths[k], self.up_scales[k]
        if scale > 2 or scale <= 0 or (scale == 2 or width != channels) and not parts.spatial_resnet:
            raise ValueError(
                f"residual {k}: {channels} channels to {width} at scale {scale:g}; scales go up to 2, and changing "
                "size or channels needs add_spatial_resnet"
            )
        if width < parts.head_dim:
            raise ValueError(f"residual {k} has {width} channels, less than attention_head_dim {parts.head_dim}")
        return AdapterBlock(channels, width, scale, parts)

    @classmethod
    def for_model(cls, target: Any, controlnet: nn.Module, locations: str | None = None, **config: Any):
        """A fresh adapter with all sizes read from the backbone and the ControlNet. It has to be trained.

        Args:
            target: Pipeline or model to be controlled.
            controlnet: `ControlNetModel` of another model.
            locations: Letters of the groups with adapters: A (highest resolution), B, C, D, and M for the middle.
                Default: `"ABC"`, with M for transformers and with D and M for video, as far as there are such.
            config: Further arguments of the class.

        Raises:
            ValueError: Unknown backbone or location, or sizes that no power of two relates.
        """
        backbone = backbone_of(denoiser_of(target))
        channels, shrink = sites_of(controlnet)
        group = controlnet.config.layers_per_block + 1
        known = _LETTERS[: (len(channels) - 1) // group] + "M"
        wanted = "".join(l for l in backbone.locations if l in known) if locations is None else locations
        if not wanted or set(wanted) - set(known):
            raise ValueError(f"adapter locations {wanted!r}: this ControlNet has {', '.join(known)}; choose from them")
        # The size a ControlNet was trained at is not in its config; give controlnet_sample_size where it differs.
        ratio = config.pop("latent_ratio", 1)
        shapes = [backbone.shape_of(_last(backbone, k, len(channels))) for k in range(len(channels))]
        settings = {
            "backbone_model_name": type(backbone.model).__name__,
            "num_blocks": 1,
            "cross_attention_dim": backbone.context_width,
            "controlnet_channels": channels,
            "controlnet_group": group,
            "out_channels": [width for width, _ in shapes],
            "up_sampling_scales": [ratio * have / want for have, (_, want) in zip(shrink, shapes)],
            "latent_ratio": ratio,
            **{f"add_adapter_location_{letter}": letter in wanted for letter in [*_LETTERS, "M"]},
        }
        if backbone.frames_per_clip:
            settings |= {"add_temporal_resnet": True, "add_temporal_transformer": True}
        return cls(**{**settings, **config})

    @torch.no_grad()
    def start_small(self, share: float = 0.1) -> CtrlAdapterModel:
        """Shrink the last layers of every location, for the start of training.

        What fresh weights add disturbs a transformer in every block; this much less of it is easier to unlearn.

        Args:
            share: What these layers are multiplied by, from 0 to 1; with one block at each location, also what the
                adapter gives.

        Returns:
            The adapter itself.

        Raises:
            ValueError: Another share.
        """
        if not 0 <= share <= 1:
            raise ValueError(f"share is {share}; accepted: 0 to 1")
        for name, weight in self.named_parameters():
            if any(f".{layer}." in name for layer in _LAST_LAYERS):
                weight.mul_(share)
        return self

    def check(self, target: Any) -> None:
        backbone = backbone_of(denoiser_of(target))
        if backbone.context_width != self.config.cross_attention_dim:
            raise ValueError(
                f"cross_attention_dim is {self.config.cross_attention_dim}, but {type(backbone.model).__name__} "
                f"attends to a context of width {backbone.context_width}: use an adapter made for this backbone"
            )
        if backbone.frames_per_clip and not self.config.add_temporal_resnet:
            raise ValueError("this adapter has no temporal parts: use one that was trained for video")
        shrink = shrinking(len(self.config.controlnet_channels), self.config.controlnet_group)
        for k in self.active:
            skip = _last(backbone, k, len(shrink))
            if k != len(shrink) - 1 and isinstance(backbone, UNetBackbone) and k >= backbone.skips:
                raise ValueError(
                    f"the adapter at residual {k} has no skip connection to go to: {backbone.skips} exist"
                )
            width, want = backbone.shape_of(skip)
            given = self.widths[k], self.latent_ratio * shrink[k] / self.up_scales[k]
            if given != (width, want):
                raise ValueError(
                    f"the adapter at residual {k} gives {given[0]} channels at 1/{given[1]:g} of the latents' size; "
                    f"{type(backbone.model).__name__} has {width} at 1/{want:g} there: use an adapter made for it"
                )

    def install(self, target: Any, undo: ExitStack) -> None:
        backbone = backbone_of(denoiser_of(target))

        def compute(arguments: Mapping[str, Any]) -> list[torch.Tensor] | None:
            return self._residuals(target, backbone, arguments)

        undo.callback(self._forget)
        backbone.install(compute, undo)

    def _forget(self) -> None:
        """Drop what is kept between the steps of a picture."""
        self._constant: tuple[Any, Any, Any] = (None, None, None)
        self._adapted: list[tuple[Any, Any, Any]] = []

    def _residuals(
        self, target: Any, backbone: UNetBackbone | FluxBackbone, arguments: Mapping[str, Any]
    ) -> list[torch.Tensor] | None:
        """What is added to the backbone in this call; None in calls without control."""
        control = self.control
        if self.scale == 0:
            return None
        if control is None:
            raise RuntimeError("nothing to draw by: set adapter.control = CtrlAdapterControl(...), or scale 0")
        if not within(target, arguments["timestep"], control.start, control.end):
            return None
        call = backbone.read(arguments)
        if call.latents.is_meta:  # somebody counts the backbone's operations
            return None
        time = call.time
        if time is None:
            place = place_of(target, float(torch.as_tensor(arguments["timestep"]).flatten()[0]))
            time = step_time(place, steps_of(target), call)
        rows, frames, ids = len(call.latents), call.frames, control.sparse_frame_ids
        keep = slice(None) if ids is None else frame_rows(rows, frames, ids, call.latents.device)
        keys = frames if ids is None else len(ids)
        before = conditional_rows(rows // frames).start * keys
        down, mid = self._controlled(control, call.latents[keep], time[keep], before, keys)
        down, mid = self._mapped(down, mid, call, time[keep], keep)
        if isinstance(backbone, UNetBackbone):
            return [*down[: backbone.skips], mid]
        return [output for k, output in enumerate([*down, mid]) if k in self.active]

    def _controlled(
        self, control: CtrlAdapterControl, latents: torch.Tensor, time: torch.Tensor, before: int, frames: int
    ) -> tuple[list[torch.Tensor], torch.Tensor]:
        ratio = self.latent_ratio if control.pool else 1
        size = self.config.controlnet_sample_size
        if not control.pool and tuple(latents.shape[-2:]) != (size, size):
            raise ValueError(
                f"latents of {latents.shape[-2]} x {latents.shape[-1]} without pooling: the ControlNet takes "
                f"{size} x {size}; leave `pool` on"
            )
        skip, fixed = self.config.skip_conv_in, self.config.fixed_controlnet_timestep
        key = (tuple(latents.shape), latents.device, latents.dtype, before, self.scale)
        if self._constant[0] is control and self._constant[1] == key:
            return self._constant[2]
        time = time if fixed < 0 else torch.full_like(time, fixed)
        residuals = control.residuals(pooled(latents, ratio), time, before, self.scale, frames, skip)
        if skip and fixed >= 0:
            self._constant = (control, key, residuals)
        return residuals

    def _mapped(
        self, down: list[torch.Tensor], mid: torch.Tensor, call: Call, time: torch.Tensor, keep: slice | torch.Tensor
    ) -> tuple[list[torch.Tensor], torch.Tensor]:
        """`forward`, or what it gave for the same constant residuals and context in an earlier step."""
        for given, context, outputs in self._adapted:
            if given is down and (context is call.context or torch.equal(context, call.context)):
                return outputs
        fixed = self.config.fixed_adapter_timestep
        outputs = self(
            [d.to(call.latents) for d in down],
            mid.to(call.latents),
            timestep=time if fixed < 0 else torch.full_like(time, fixed),
            encoder_hidden_states=call.context[keep],
            num_frames=call.frames,
            sparse_frame_ids=self.control.sparse_frame_ids,
        )
        constant = self._constant[2] is not None and self._constant[2][0] is down
        if fixed >= 0 and constant and not torch.is_grad_enabled():
            # Two: Flux's true guidance calls the model with the prompt and with the negative prompt in turn.
            self._adapted = [*self._adapted[-1:], (down, call.context, outputs)]
        return outputs

    def forward(
        self,
        down_block_res_samples: Sequence[torch.Tensor],
        mid_block_res_sample: torch.Tensor | None = None,
        timestep: torch.Tensor | float = 0,
        encoder_hidden_states: torch.Tensor | None = None,
        num_frames: int = 1,
        sparse_frame_ids: Sequence[int] | None = None,
    ) -> tuple[list[torch.Tensor], torch.Tensor]:
        """Map the residuals of a ControlNet to those of the backbone.

        Args:
            down_block_res_samples: `[rows, c, h, w]` each; for video the rows are frames, clip by clip.
            mid_block_res_sample: That of the middle.
            timestep: Of 1000, one or one per row.
            encoder_hidden_states: Context of the backbone `[rows, tokens, width]`.
            num_frames: Frames of a clip.
            sparse_frame_ids: Where the given rows are only some frames of each clip: which ones.

        Returns:
            Residuals for the skip connections and the middle: zeros where there is no adapter, and at the other
            frames.
        """
        samples = [*down_block_res_samples, mid_block_res_sample]
        rows, keys = len(samples[0]), num_frames if sparse_frame_ids is None else len(sparse_frame_ids)
        if rows % keys:
            raise ValueError(f"{rows} frames are no number of clips of {keys} frames: give whole clips")
        if sparse_frame_ids is not None and not all(0 <= i < num_frames for i in sparse_frame_ids):
            raise ValueError(f"sparse_frame_ids {list(sparse_frame_ids)}: frames go from 0 to {num_frames - 1}")
        t = torch.as_tensor(timestep, device=samples[0].device).expand(rows)
        blocks = dict(zip(self.active, [*self.down_blocks_adapter, getattr(self, "mid_block_adapter", None)]))
        outputs = []
        for k, sample in enumerate(samples):
            if k in blocks and sample is not None:
                output = blocks[k](sample, t, encoder_hidden_states, keys)
            else:
                output = self._zeros(k, sample, samples[0])
            if sparse_frame_ids is not None and output.ndim:
                output = scattered(output, num_frames, sparse_frame_ids)
            outputs.append(output)
        return outputs[:-1], outputs[-1]

    def _zeros(self, k: int, sample: torch.Tensor | None, like: torch.Tensor) -> torch.Tensor:
        if sample is None:
            return like.new_zeros(())
        height, width = (max(1, round(size * self.up_scales[k])) for size in sample.shape[-2:])
        return like.new_zeros(len(sample), self.widths[k], height, width)

    @classmethod
    def published(cls, tensors: Mapping[str, torch.Tensor]) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
        """Config of the authors' weights without their `config.json`: three adapters per location, SD 1.5."""
        down = [m for m in map(_KEY.fullmatch, tensors) if m and m["index"]]
        first = "down_blocks_adapter.0."
        context = tensors.get(first + "spatial_attentions.0.attn2.to_k.weight")
        if not down or len(down) % 3 or len(down) > 12 or context is None:
            return super().published(tensors)
        letters = _LETTERS[: len(down) // 3] + ("M" if "mid_block_adapter.norm.weight" in tensors else "")
        config = {
            "backbone_model_name": "sdxl" if context.shape[1] == 2048 else "i2vgenxl",
            "num_blocks": len([k for k in tensors if re.fullmatch(first + r"spatial_resnets\.\d+\.norm1\.weight", k)]),
            "cross_attention_dim": context.shape[1],
            "add_temporal_resnet": any(".temporal_resnets." in k for k in tensors),
            "add_temporal_transformer": any(".temporal_attentions." in k for k in tensors),
            **{f"add_adapter_location_{letter}": letter in letters for letter in [*_LETTERS, "M"]},
        }
        return config, dict(tensors)


def shrinking(count: int, group: int) -> list[int]:
    """How much smaller than the latents each residual of a ControlNet is; the last one is that of the middle."""
    scales = [2 ** (k // group) for k in range(count - 1)]
    return [*scales, scales[-1]]


def frame_rows(rows: int, frames: int, ids: Sequence[int], device: torch.device) -> torch.Tensor:
    """Rows of the chosen frames in a batch of clips."""
    starts = torch.arange(0, rows, frames, device=device)
    return (starts[:, None] + torch.as_tensor(list(ids), device=device)).flatten()


def scattered(values: torch.Tensor, frames: int, ids: Sequence[int]) -> torch.Tensor:
    """Rows of the chosen frames at their places in whole clips, zeros elsewhere."""
    clips = len(values) // len(ids)
    full = values.new_zeros(clips * frames, *values.shape[1:])
    full[frame_rows(len(full), frames, ids, values.device)] = values
    return full


def _last(backbone: UNetBackbone | FluxBackbone, k: int, count: int) -> int:
    """Which of the backbone's features residual k goes to; the last residual is the middle's."""
    if not isinstance(backbone, UNetBackbone):
        return k
    return backbone.skips if k == count - 1 else min(k, backbone.skips - 1)
