"""SCEdit: small tuners edit the features that skip from the encoder of a UNet to its decoder.

Jiang, Mao, Pan, Han, Zhang, "SCEdit: Efficient and Controllable Image Diffusion Generation via Skip Connection
Editing", CVPR 2024, https://arxiv.org/abs/2312.11392
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel
from diffusers.configuration_utils import register_to_config
from torch import nn

from ..apply import denoiser_of
from ..caching._common import Inputs
from ..registry import Claim, MethodRecord, register
from ._common import Adapter, conditional_rows, require_pictures


__all__ = ["CSCTuner", "SCTuner"]

_PREFIX = re.compile(r"^(model\.)?(?P<condition>\d+\.)?(?=(pre_hint|dense_hint|lsc_))")
# Channels between the convolutions of the condition's encoder, before the last.
_PRE_HINT = (16, 16, 32, 32, 96, 96)
Edit = Callable[[int, torch.Tensor], "torch.Tensor | None"]


class _Perceptron(nn.Module):
    """W2 GELU(W1 x + b1) + b2 at every pixel; W2 and b2 begin at zero."""

    def __init__(self, channels: int, ratio: float):
        super().__init__()
        self.ln1 = nn.Linear(channels, max(1, int(channels * ratio)))
        self.ln2 = nn.Linear(self.ln1.out_features, channels)
        nn.init.zeros_(self.ln2.weight)
        nn.init.zeros_(self.ln2.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.ln2(F.gelu(self.ln1(x.movedim(1, -1)))).movedim(-1, 1)


class _Tuner(nn.Module):
    """The tuner of one skip connection, under the name of the authors' files."""

    def __init__(self, channels: int, ratio: float):
        super().__init__()
        self.tuner_op = _Perceptron(channels, ratio)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.tuner_op(x)


def tuners(skip_channels: Sequence[int], ratio: float, layers: Sequence[int] | None) -> nn.ModuleDict:
    """Tuners by decoder order m: the first one is for the last skip connection of the encoder."""
    chosen = range(len(skip_channels)) if layers is None else layers
    wrong = [m for m in chosen if not 0 <= m < len(skip_channels)]
    if wrong or not skip_channels:
        raise ValueError(f"use_layers {wrong} are no skip connections: there are 0 to {len(skip_channels) - 1}")
    if ratio <= 0:
        raise ValueError(f"down_ratio is {ratio}; accepted: above 0")
    return nn.ModuleDict({str(m): _Tuner(skip_channels[-1 - m], ratio) for m in chosen})


def skips_of(unet: nn.Module) -> tuple[list[int], list[bool]]:
    """Channels of the skip connections of a UNet in encoder order, and which of them begin a lower resolution."""
    if not isinstance(unet, UNet2DConditionModel):
        raise ValueError(
            f"{type(unet).__name__} has no skip connections that SCEdit knows: use a UNet2DConditionModel (Stable "
            "Diffusion 1, 2, XL)"
        )
    widths = unet.config.block_out_channels
    channels, down = [widths[0]], [False]
    for width, block in zip(widths, unet.down_blocks):
        channels += [width] * len(block.resnets)
        down += [False] * len(block.resnets)
        if block.downsamplers is not None:
            channels.append(width)
            down.append(True)
    return channels, down


class SkipEdits:
    """All edits of the skip connections of one UNet. Every edit sees the features as the encoder left them.

    ControlNet residuals are in there already; FreeU works on what comes out.
    """

    _active: WeakKeyDictionary[nn.Module, SkipEdits] = WeakKeyDictionary()

    def __init__(self, unet: nn.Module):
        self.edits: list[Edit] = []
        last, self._hooks = len(skips_of(unet)[0]), []
        for block in unet.up_blocks:
            last -= len(block.resnets)
            self._hooks.append(block.register_forward_pre_hook(self._entry(last), with_kwargs=True))

    @classmethod
    def add(cls, unet: nn.Module, edit: Edit, undo: ExitStack) -> None:
        """Put an edit on a UNet: from the index (encoder order) and the features to what is added, or None."""
        mine = cls._active.get(unet) or cls._active.setdefault(unet, cls(unet))
        mine.edits.append(edit)
        undo.callback(mine._remove, unet, edit)

    def _remove(self, unet: nn.Module, edit: Edit) -> None:
        self.edits = [e for e in self.edits if e is not edit]
        if not self.edits:
            for hook in self._hooks:
                hook.remove()
            self._active.pop(unet, None)

    def _entry(self, first: int) -> Callable:
        @torch.compiler.disable
        def enter(_, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
            skips = kwargs["res_hidden_states_tuple"]
            edited = tuple(self._edited(first + j, x) for j, x in enumerate(skips))
            return args, {**kwargs, "res_hidden_states_tuple": edited}

        return enter

    def _edited(self, i: int, x: torch.Tensor) -> torch.Tensor:
        for added in [edit(i, x) for edit in self.edits]:
            x = x if added is None else x + added
        return x


class _SkipAdapter(Adapter):
    """What both tuners share: they fit a UNet whose skip connections have the channels of their config."""

    def check(self, target: Any) -> None:
        channels, _ = skips_of(denoiser_of(target))
        mine = list(self.config.skip_channels)
        if channels != mine:
            wrong = next((i for i, (a, b) in enumerate(zip(mine, channels)) if a != b), None)
            where = "their numbers differ"
            if wrong is not None:
                where = f"skip connection {wrong} has {channels[wrong]} channels, not {mine[wrong]}"
            raise ValueError(
                f"this {type(self).__name__} is for {len(mine)} skip connections, "
                f"{type(denoiser_of(target)).__name__} has {len(channels)}; {where}: use a file made for this model"
            )

    def install(self, target: Any, undo: ExitStack) -> None:
        SkipEdits.add(denoiser_of(target), self._edit_here, undo)

    def _edit_here(self, i: int, x: torch.Tensor) -> torch.Tensor | None:
        if x.is_meta and self.device.type != "meta":  # somebody counts the operations of a copy of the UNet
            return None
        return self._edit(i, x)

    def _edit(self, i: int, x: torch.Tensor) -> torch.Tensor | None:
        raise NotImplementedError


def _stripped(tensors: Mapping[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], set[str]]:
    """Names without the prefixes of the authors' files, and the conditions those name."""
    found = {name: _PREFIX.match(name) for name in tensors}
    conditions = {m["condition"] for m in found.values() if m and m["condition"]}
    return {_PREFIX.sub("", name): tensor for name, tensor in tensors.items()}, conditions


def _channels_of(tensors: Mapping[str, torch.Tensor], prefix: str) -> tuple[list[int], float]:
    """Channels of the skip connections in encoder order and the ratio, from the tuners of a file."""
    pattern = re.compile(re.escape(prefix) + r"\.(\d+)\.tuner_op\.ln1\.weight")
    shapes = {int(m[1]): tensors[m.string].shape for m in map(pattern.fullmatch, tensors) if m}
    if sorted(shapes) != list(range(len(shapes))) or not shapes:
        raise ValueError(
            f"the file holds tuners {sorted(shapes)} under {prefix}: one for every skip connection is needed"
        )
    width, channels = shapes[0]
    return [shapes[m][1] for m in reversed(range(len(shapes)))], width / channels


@register(
    MethodRecord(
        slug="scedit",
        family="adapters",
        kind="adapter",
        title="SCEdit: Efficient and Controllable Image Diffusion Generation via Skip Connection Editing",
        arxiv="2312.11392",
        summary="Styles and conditions by small tuners on the skip connections of a UNet, trained with little memory",
        targets=("unet",),
        predictions=("epsilon", "v_prediction", "sample"),
        nodes=("DXSCTunerLoader", "DXSCTunerApply", "DXCSCTunerApply"),
        claim=Claim(
            text="Styles and control by tuning skip connections alone, with gradients through the decoder only",
            setting="Stable Diffusion 1.5, 2.1 and XL",
        ),
    )
)
class SCTuner(_SkipAdapter):
    """A style or subject in a small tuner per skip connection: x' = x + s T(x).

    Paper: https://arxiv.org/abs/2312.11392

    Args:
        skip_channels: Channels of the UNet's skip connections in encoder order.
        down_ratio: Width of a tuner over its channels, above 0.
        use_layers: Skip connections that are tuned, in decoder order. Default all.

    Raises:
        ValueError: Values out of range; on `attach`, a model with other skip connections.

    Example:
        >>> from diffusers_ext import SCTuner, zoo
        >>> pipe = zoo.load("shapes-unet")
        >>> tuner = SCTuner.from_pretrained(zoo.adapter_file("scedit-checkered-shapes-unet"))
        >>> with tuner.attach(pipe, scale=1.0):
        ...     images = zoo.generate(pipe, ["a red circle"], num_inference_steps=4)

    Limits:
        Only what the decoder can still change: the encoder sees nothing of it within a step.
    """

    @register_to_config
    def __init__(self, skip_channels: Sequence[int], down_ratio: float = 1.0, use_layers: Sequence[int] | None = None):
        super().__init__()
        self.lsc_identity = tuners(skip_channels, down_ratio, use_layers)

    @classmethod
    def for_model(cls, target: Any, **config: Any) -> SCTuner:
        """A fresh tuner, which changes nothing, for a pipeline or UNet. `config`: further arguments of the class."""
        return cls(skips_of(denoiser_of(target))[0], **config)

    def _edit(self, i: int, x: torch.Tensor) -> torch.Tensor | None:
        m = str(len(self.config.skip_channels) - 1 - i)
        if self.scale == 0 or m not in self.lsc_identity:
            return None
        return self.scale * self.lsc_identity[m](x)

    @classmethod
    def published(cls, tensors: Mapping[str, torch.Tensor]) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
        """Config and weights from the authors' layout, `model.lsc_identity.{m}.tuner_op.ln1.weight` and so on."""
        stripped, _ = _stripped(tensors)
        if not any(name.startswith("lsc_identity.") for name in stripped):
            return super().published(tensors)
        channels, ratio = _channels_of(stripped, "lsc_identity")
        return {"skip_channels": channels, "down_ratio": ratio}, stripped


class CSCTuner(_SkipAdapter):
    """Draws by a condition picture: x' = x + s (T(x + g) + g), g the picture's hint at every skip connection.

    Several of them add up, each with its own picture and scale. Paper: https://arxiv.org/abs/2312.11392

    Args:
        skip_channels: Channels of the UNet's skip connections in encoder order.
        down_flags: Which of them begin a lower resolution.
        down_ratio: Width of a tuner over its channels, above 0.
        hint_channels: Channels of the condition picture.
        pre_hint_out: Channels of the picture's first features.
        pre_hint_dim_ratio: Scales the channels before those.
        pre_hint_strides: How the picture gets to the size of the latents: their product is pixels per latent.
        dense_hint_kernel: Kernel size of the hints' convolutions, 1 or 3.

    Raises:
        ValueError: Values that do not go together; on `attach`, a model with other skip connections; in a run,
            pictures that do not fit the latents or the batch.
        RuntimeError: In a run without a picture.

    Example:
        >>> from diffusers_ext import CSCTuner, zoo
        >>> pipe, scenes = zoo.load("shapes-unet"), zoo.held_out(2)
        >>> tuner = CSCTuner.from_pretrained(zoo.adapter_file("csc-edges-shapes-unet"))
        >>> tuner.set_condition(zoo.conditions.edges(scenes.images))
        >>> with tuner.attach(pipe):
        ...     images = zoo.generate(pipe, scenes.captions, num_inference_steps=4)
    """

    method = SCTuner.method  # type: ignore[attr-defined]

    @register_to_config
    def __init__(
        self,
        skip_channels: Sequence[int],
        down_flags: Sequence[bool],
        down_ratio: float = 1.0,
        hint_channels: int = 3,
        pre_hint_out: int = 256,
        pre_hint_dim_ratio: float = 1.0,
        pre_hint_strides: Sequence[int] = (2, 2, 2),
        dense_hint_kernel: int = 3,
    ):
        super().__init__()
        if len(down_flags) != len(skip_channels):
            raise ValueError(f"{len(down_flags)} down_flags for {len(skip_channels)} skip connections: give one each")
        if len(pre_hint_strides) != 3 or set(pre_hint_strides) - {1, 2}:
            raise ValueError(f"pre_hint_strides are {list(pre_hint_strides)}; accepted: three of 1 and 2")
        if dense_hint_kernel not in (1, 3):
            raise ValueError(f"dense_hint_kernel is {dense_hint_kernel}; accepted: 1, 3")
        self.pre_hint_blocks = _pre_hints(hint_channels, pre_hint_dim_ratio, pre_hint_out, pre_hint_strides)
        self.dense_hint_blocks = _dense_hints([pre_hint_out, *skip_channels], down_flags, dense_hint_kernel)
        self.lsc_tuner_blocks = tuners(skip_channels, down_ratio, None)
        self._images: torch.Tensor | None = None
        self._kept: tuple[Any, list[torch.Tensor]] = (None, [])
        self._rows: tuple[int, int] = (1, 1)

    @classmethod
    def for_model(cls, target: Any, **config: Any) -> CSCTuner:
        """A fresh tuner, which changes nothing, for a pipeline or UNet.

        Args:
            target: With a pipeline's VAE the size of its latents is known; for a bare UNet it is an eighth.
            config: Further arguments of the class.
        """
        channels, down = skips_of(denoiser_of(target))
        vae = getattr(target, "vae", None)
        halvings = 3 if vae is None else len(vae.config.block_out_channels) - 1
        strides = [2] * min(halvings, 3) + [1] * max(3 - halvings, 0)
        return cls(channels, down, **{"pre_hint_strides": strides, **config})

    def set_condition(self, images: torch.Tensor | None) -> None:
        """Choose the condition pictures.

        Args:
            images: `[n, channels, height, width]` in [0, 1] at the size of the picture to draw: one for all, or
                one per prompt. One channel stands for all. None for none.

        Raises:
            ValueError: Of another shape or range, or a size that does not divide into latents.
        """
        if images is not None:
            pixels, channels = self.pixels, self.config.hint_channels
            require_pictures(images, (channels, 1))
            if any(side % pixels for side in images.shape[-2:]):
                raise ValueError(
                    f"condition pictures of {list(images.shape[-2:])} pixels: height and width must be multiples of "
                    f"{pixels}"
                )
            images = images.expand(-1, channels, -1, -1)
        self._images, self._kept = images, (None, [])

    @property
    def pixels(self) -> int:
        """Pixels of the condition per latent, in each direction."""
        return int(torch.tensor(self.config.pre_hint_strides).prod())

    def hints(self, images: torch.Tensor) -> list[torch.Tensor]:
        """g_i for every skip connection in encoder order, from condition pictures `[n, channels, height, width]`."""
        g, found = self.pre_hint_blocks(images), []
        for block in self.dense_hint_blocks:
            g = block(g)
            found.append(g)
        return found

    def begin_call(self, target: Any, arguments: Mapping[str, Any]) -> None:
        """Have the hints ready, computed once per picture and precision."""
        if self.scale == 0:
            return
        if self._images is None:
            raise RuntimeError("nothing to draw by: call set_condition(pictures), or set_scale(0)")
        latents = Inputs.of(arguments).sample
        wanted = [size * self.pixels for size in latents.shape[-2:]]
        if list(self._images.shape[-2:]) != wanted:
            raise ValueError(
                f"condition pictures of {list(self._images.shape[-2:])} pixels for latents that need {wanted}: resize "
                "them to the size of the picture to draw"
            )
        part = conditional_rows(len(latents)).start or len(latents)
        if part % len(self._images):
            raise ValueError(
                f"{len(self._images)} condition pictures for {part} pictures in a batch: give one, or one per picture"
            )
        self._rows = part, len(latents)
        like = next(self.parameters())
        key = (like.device, like.dtype)
        if torch.is_grad_enabled() or self._kept[0] != key:
            hints = self.hints(self._images.to(like))
            self._kept = (None if torch.is_grad_enabled() else key, hints)

    def _edit(self, i: int, x: torch.Tensor) -> torch.Tensor | None:
        if self.scale == 0:
            return None
        part, batch = self._rows
        hint = self._kept[1][i]
        hint = hint.repeat_interleave(part // len(hint), 0)
        # Guidance stacks its parts; methods that decode several steps at once stack whole batches.
        hint = hint.repeat(len(x) // part, 1, 1, 1)
        m = str(len(self.config.skip_channels) - 1 - i)
        return self.scale * (self.lsc_tuner_blocks[m](x + hint) + hint)

    @classmethod
    def published(cls, tensors: Mapping[str, torch.Tensor]) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
        """Config and weights from the authors' layout, `0.pre_hint_blocks.0.weight` and so on, of one condition."""
        stripped, conditions = _stripped(tensors)
        if len(conditions) > 1:
            raise ValueError(
                f"the file holds {len(conditions)} conditions ({', '.join(sorted(conditions))}): save each by itself, "
                "and attach one CSCTuner each"
            )
        if "dense_hint_blocks.0.1.weight" not in stripped or "pre_hint_blocks.12.weight" not in stripped:
            return super().published(tensors)
        channels, ratio = _channels_of(stripped, "lsc_tuner_blocks")
        first, last = stripped["pre_hint_blocks.0.weight"], stripped["pre_hint_blocks.12.weight"]
        count = len(channels)
        if count % 3:
            raise ValueError(
                f"a file of {count} skip connections: only UNets with two resnets per resolution are known"
            )
        config = {
            "skip_channels": channels,
            "down_flags": [i > 0 and i % 3 == 0 for i in range(count)],
            "down_ratio": ratio,
            "hint_channels": first.shape[1],
            "pre_hint_out": last.shape[0],
            "pre_hint_dim_ratio": first.shape[0] / _PRE_HINT[0],
            "dense_hint_kernel": stripped["dense_hint_blocks.0.1.weight"].shape[-1],
        }
        return config, stripped


def _pre_hints(channels: int, ratio: float, out: int, strides: Sequence[int]) -> nn.Sequential:
    """The condition's encoder: seven convolutions with SiLU between them, three of them to a lower resolution."""
    widths = [channels, *(int(width * ratio) for width in _PRE_HINT), out]
    steps = [1, 1, strides[0], 1, strides[1], 1, strides[2]]
    layers: list[nn.Module] = []
    for before, after, stride in zip(widths[:-1], widths[1:], steps):
        layers += [nn.Conv2d(before, after, 3, stride, 1), nn.SiLU()]
    return nn.Sequential(*layers[:-1])


def _dense_hints(widths: Sequence[int], down: Sequence[bool], kernel: int) -> nn.ModuleList:
    """A chain of convolutions that begin at zero: the hint of every skip connection comes from the one before."""
    blocks = []
    for before, after, halve in zip(widths[:-1], widths[1:], down):
        conv = nn.Conv2d(before, after, kernel, 2 if halve else 1, kernel // 2)
        nn.init.zeros_(conv.weight)
        nn.init.zeros_(conv.bias)
        blocks.append(nn.Sequential(nn.SiLU(), conv))
    return nn.ModuleList(blocks)
