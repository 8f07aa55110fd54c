"""EasyControl: condition pictures as extra tokens of a diffusion transformer, computed once and cached.

Zhang, Yuan, Song, Wang, Liu, "EasyControl: Adding Efficient and Flexible Control for Diffusion Transformer", 2025,
https://arxiv.org/abs/2503.07027
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import FluxTransformer2DModel
from diffusers.configuration_utils import register_to_config
from diffusers.image_processor import VaeImageProcessor
from diffusers.models.transformers.transformer_flux import FluxAttnProcessor, FluxIPAdapterAttnProcessor
from torch import nn

from .._flux_tokens import grid_of, pack
from ..apply import denoiser_of
from ..caching._common import Inputs, refuse_fused_qkv
from ..registry import Claim, MethodRecord, register, unknown
from ._common import Adapter, require_pictures, require_range, within
from ._easycontrol_stream import (
    Bank,
    CausalLoRA,
    EasyControlFluxAttnProcessor,
    KeyValue,
    Stream,
    condition_keys_values,
    flux_attentions,
    flux_stream,
    put_on,
    take_off,
)


__all__ = ["EasyControlAdapter", "easycontrol_images"]

KINDS = ("spatial", "subject")
_KEY = re.compile(
    r"(transformer_blocks|single_transformer_blocks)\.(\d+)\.attn\.processor\.(q|k|v|proj)_loras\.(\d+)\.(down|up)\.weight"
)
_KEPT = 4  # banks in memory: prompts of one step (true guidance has two), not of a whole evening
_GREY = 0.0


def spatial_ids(image: tuple[int, int], condition: tuple[int, int]) -> torch.Tensor:
    """Position encoding interpolation: the condition's grid stretched over the picture.

    Args:
        image: Rows and columns of image tokens.
        condition: Rows and columns of condition tokens.

    Returns:
        Positions (0, i H / H_c, j W / W_c), `[n_c, 3]` float64.
    """
    sides = [torch.arange(c, dtype=torch.float64) * (size / c) for size, c in zip(image, condition)]
    return F.pad(torch.cartesian_prod(*sides), (1, 0))


def subject_ids(condition: tuple[int, int], offset: int = 64) -> torch.Tensor:
    """Position encoding offset: the condition's grid below the picture, (0, i + offset, j), `[n_c, 3]` float64."""
    rows, columns = (torch.arange(c, dtype=torch.float64) for c in condition)
    return F.pad(torch.cartesian_prod(rows + offset, columns), (1, 0))


def fit_spatial(images: torch.Tensor, size: int | tuple[int, int]) -> torch.Tensor:
    """Pictures `[n, c, h, w]` resized to a square, or to (height, width), whatever their shape was."""
    sides = _sides(size)
    if images.shape[-2:] == sides:
        return images
    return F.interpolate(images.float(), sides, mode="bicubic", antialias=True).clamp(-1, 1)


def fit_subject(images: torch.Tensor, size: int) -> torch.Tensor:
    """Pictures resized so that the longer side is `size`, and padded with mid grey; an odd rest goes bottom right."""
    height, width = images.shape[-2:]
    sides = [max(1, int(side * size / max(height, width))) for side in (height, width)]
    if sides != [height, width]:
        images = F.interpolate(images.float(), sides, mode="bicubic", antialias=True).clamp(-1, 1)
    top, left = ((size - side) // 2 for side in sides)
    return F.pad(images, (left, size - sides[1] - left, top, size - sides[0] - top), value=_GREY)


def _sides(size: int | tuple[int, int]) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else (size[0], size[1])


@dataclass(frozen=True, eq=False)
class _Condition:
    """What the adapter looks at: latents `[n, c, h, w]` of one kind, in one part of the run."""

    latents: torch.Tensor
    kind: str
    start: float
    end: float


class _Slot(nn.Module):
    """The updates of one attention layer, under the names of the published files."""

    def __init__(self, names: Sequence[str], dim: int, rank: int):
        super().__init__()
        self.attn = nn.Module()
        self.attn.processor = nn.Module()
        for name in names:
            setattr(self.attn.processor, f"{name}_loras", nn.ModuleList([CausalLoRA(dim, rank)]))

    def update(self, name: str, x: torch.Tensor) -> torch.Tensor | float:
        """Delta of one projection; 0 where there is none (output projections of single blocks)."""
        loras = getattr(self.attn.processor, f"{name}_loras", None)
        return 0.0 if loras is None else loras[0](x)


@register(
    MethodRecord(
        slug="easycontrol",
        family="adapters",
        kind="adapter",
        title="EasyControl: Adding Efficient and Flexible Control for Diffusion Transformer",
        arxiv="2503.07027",
        summary="Edge maps, subjects and other pictures control Flux through cached tokens; several at once",
        targets=("mmdit",),
        predictions=("flow_prediction",),
        nodes=("DXEasyControlLoader", "DXEasyControlApply"),
        claim=Claim(
            text="Parameters of one condition adapter for FLUX.1-dev",
            setting="rank 128, 190 low-rank pairs, 19 double and 38 single blocks",
            value=149.4,
            unit="M",
        ),
    )
)
class EasyControlAdapter(Adapter):
    """Lets a picture control a Flux transformer: edges, depth, pose (spatial), or a person or object (subject).

    The picture becomes extra tokens that image and text attend to. Low-rank updates act on these tokens only, so the
    model itself is untouched and several adapters, trained apart, work together. The tokens see neither noise nor
    text: their keys and values are computed once per run and prompt, and every further step pays for the attention to
    them alone. Paper: https://arxiv.org/abs/2503.07027

    Args:
        num_layers, num_single_layers: Double and single blocks of the transformer.
        dim: Width of the transformer.
        rank: Of the updates, 1 to `dim`; the authors take 128.
        network_alpha: The updates are scaled by `network_alpha / rank`. Default: `rank`.
        cond_size: Side of the picture after resizing, in pixels; a multiple of what a token covers (16 for Flux).
        condition_type: `"spatial"` (the picture is laid over the image) or `"subject"` (it lies beside the image).
        subject_offset: Rows between the image's first token and a subject's.

    Attributes:
        use_kv_cache: False computes the condition anew in every step, with the same result.

    Raises:
        ValueError: Values out of range; on `attach`, a model of other sizes.

    Example:
        >>> from diffusers_ext import EasyControlAdapter, zoo
        >>> pipe, scenes = zoo.load("shapes-dit"), zoo.held_out(1)
        >>> adapter = EasyControlAdapter.from_pretrained(zoo.adapter_file("easycontrol-edge-shapes-dit"))
        >>> adapter.set_condition(pipe, zoo.conditions.edges(scenes.images))
        >>> with adapter.attach(pipe):
        ...     images = zoo.generate(pipe, scenes.captions, num_inference_steps=8)

    Limits:
        Scale 0 removes the tokens; a small scale does not, it weakens what was trained on them, so results do not fade
        evenly towards the plain model. Flux of diffusers only; ComfyUI's through the node.
    """

    @register_to_config
    def __init__(
        self,
        num_layers: int = 19,
        num_single_layers: int = 38,
        dim: int = 3072,
        rank: int = 128,
        network_alpha: float | None = None,
        cond_size: int = 512,
        condition_type: str = "spatial",
        subject_offset: int = 64,
    ):
        super().__init__()
        if not 1 <= rank <= dim:
            raise ValueError(f"rank is {rank}: give 1 to {dim}, the width of the model")
        if network_alpha is not None and not 0 < network_alpha < math.inf:
            raise ValueError(f"network_alpha is {network_alpha}: give a finite number above 0, or None for the rank")
        if cond_size < 8 or cond_size % 8:
            raise ValueError(f"cond_size is {cond_size}: give a multiple of 16 (8 for the smallest models)")
        _require_kind(condition_type)
        self.transformer_blocks = nn.ModuleList(_Slot(("q", "k", "v", "proj"), dim, rank) for _ in range(num_layers))
        self.single_transformer_blocks = nn.ModuleList(
            _Slot(("q", "k", "v"), dim, rank) for _ in range(num_single_layers)
        )
        self.use_kv_cache = True
        self._condition: _Condition | None = None
        self._bank = Bank(self)
        self._kept: dict[Any, tuple[list[KeyValue], Inputs]] = {}
        self._last_time = 0.0
        self._processors: list[EasyControlFluxAttnProcessor] = []

    @classmethod
    def for_model(cls, target: Any, **config: Any) -> EasyControlAdapter:
        """A fresh adapter with the sizes of a pipeline's or model's transformer.

        Args:
            target: Pipeline or `FluxTransformer2DModel`.
            config: Further arguments, e.g. `rank=16`.
        """
        return cls(**_sizes_of(_flux(target)), **config)

    @classmethod
    def published(cls, tensors: Mapping[str, torch.Tensor]) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
        """Sizes from a file of the paper's authors, whose names are those of this class."""
        found = {key: match for key in tensors if (match := _KEY.fullmatch(key))}
        strange = sorted(tensors.keys() - found.keys())
        if strange or not found:
            raise ValueError(
                f"not an EasyControl file: names such as {strange[0] if strange else 'none at all'} are unknown; "
                "expected transformer_blocks.0.attn.processor.q_loras.0.down.weight and the like"
            )
        if {m[4] for m in found.values()} != {"0"}:
            raise ValueError("this EasyControl file holds several conditions: split it, one file per index of *_loras")
        shapes = {key: tensor.shape for key, tensor in tensors.items()}
        rank, dim = next(shape for key, shape in sorted(shapes.items()) if key.endswith("down.weight"))
        for key, shape in sorted(shapes.items()):
            expected = (rank, dim) if key.endswith("down.weight") else (dim, rank)
            if tuple(shape) != expected:
                raise ValueError(f"{key} has shape {tuple(shape)}; the rest of the file asks for {expected}")
        double, single = (
            1 + max((int(m[2]) for m in found.values() if m[1] == name), default=-1)
            for name in ("transformer_blocks", "single_transformer_blocks")
        )
        return {"num_layers": double, "num_single_layers": single, "dim": dim, "rank": rank}, dict(tensors)

    def set_condition(
        self,
        pipe: Any,
        image: Any,
        condition_type: str | None = None,
        cond_size: int | tuple[int, int] | None = None,
        start: float = 0.0,
        end: float = 1.0,
        generator: torch.Generator | None = None,
    ) -> None:
        """Choose the picture that controls the next runs; also between runs and while attached.

        Args:
            pipe: Pipeline whose `vae` encodes it.
            image: PIL picture, list of them, or tensor: `[n, 3, h, w]` in [-1, 1], or `[n, 1, h, w]` in [0, 1] (edges,
                depth). One for all pictures of a batch, or one each.
            condition_type: `"spatial"` or `"subject"`; default: what the adapter was made for.
            cond_size: Side in pixels; default: the config's. Spatial pictures also take (height, width), such as the
                image's own: in shapes that training never saw they are followed more closely than stretched squares.
            start, end: Part of the steps with control, `0 <= start < end <= 1`.
            generator: Draws from the VAE's posterior, as the authors do; without it, its mean.

        Raises:
            ValueError: `cond_size` is no multiple of what a token covers, or another value is out of range.
        """
        if not hasattr(pipe, "vae"):
            raise TypeError(f"{type(pipe).__name__} has no vae: give a pipeline, or use set_latents")
        kind, size = condition_type or self.config.condition_type, cond_size or self.config.cond_size
        _require_kind(kind)
        vae = pipe.vae
        covers = 2 ** len(vae.config.block_out_channels)
        if any(side < covers or side % covers for side in _sides(size)):
            raise ValueError(f"cond_size is {size}: give a multiple of {covers}, the pixels that a token covers")
        if kind == "spatial":
            pictures = fit_spatial(_pictures(image), size)
        elif isinstance(size, int):
            pictures = fit_subject(_pictures(image), size)
        else:
            raise ValueError(f"cond_size is {size}: subjects are padded to a square, give one number")
        with torch.no_grad():
            posterior = vae.encode(pictures.to(vae.device, vae.dtype)).latent_dist
        z = posterior.mean if generator is None else posterior.sample(generator)
        latents = (z - (vae.config.shift_factor or 0.0)) * vae.config.scaling_factor
        self.set_latents(latents, kind, start, end)

    def set_latents(
        self, latents: torch.Tensor, condition_type: str | None = None, start: float = 0.0, end: float = 1.0
    ) -> None:
        """As `set_condition`, with the latents `[n, c, h, w]` of the picture, scaled as the transformer sees them."""
        require_range(start, end)
        kind = condition_type or self.config.condition_type
        _require_kind(kind)
        if latents.ndim != 4 or latents.shape[-2] % 2 or latents.shape[-1] % 2:
            raise ValueError(f"condition latents have shape {tuple(latents.shape)}: give [n, c, h, w] with even sides")
        self._condition = _Condition(latents, kind, start, end)
        self.clear_cache()

    def set_scale(self, scale: float) -> None:
        """Factor on the updates, 1 as trained; 0 takes the condition tokens away. Also between two steps of a run."""
        super().set_scale(scale)
        self.clear_cache()

    def clear_cache(self) -> None:
        """Forget the keys and values. Needed only after changing the model's weights in the middle of a run."""
        self._kept.clear()

    def check(self, target: Any) -> None:
        model = _flux(target)
        asked = {name: self.config[name] for name in ("num_layers", "num_single_layers", "dim")}
        for name, size in _sizes_of(model).items():
            if size != asked[name]:
                raise ValueError(
                    f"the adapter was made for {name}={asked[name]}, this transformer has {size}: "
                    "use the adapter of this model, or EasyControlAdapter.for_model"
                )
        refuse_fused_qkv(model)
        known = (FluxAttnProcessor, FluxIPAdapterAttnProcessor, EasyControlFluxAttnProcessor)
        for name, attn in flux_attentions(model).items():
            if not isinstance(attn.processor, known):
                raise ValueError(
                    f"{name} has a {type(attn.processor).__name__}; EasyControl works on the processors of diffusers "
                    "and its IP-Adapter: put the original back with transformer.set_attn_processor"
                )

    def install(self, target: Any, undo: ExitStack) -> None:
        attentions = flux_attentions(_flux(target))
        processors = put_on(attentions, self._bank)
        undo.callback(take_off, attentions, processors, self._bank)
        undo.callback(self._empty)
        self._processors = processors

    def _empty(self) -> None:
        self._bank.make = self._bank.made = None
        self.clear_cache()
        self._processors = []

    def begin_call(self, target: Any, arguments: Mapping[str, Any]) -> None:
        self._bank.make = self._bank.made = None
        if self.scale == 0:
            return
        condition, model = self._condition, _flux(target)
        if condition is None:
            raise RuntimeError("EasyControl has no picture: call set_condition(pipe, image), or set the scale to 0")
        self._require_processors(model)
        if not within(target, arguments["timestep"], condition.start, condition.end):
            return
        self._bank.make = functools.partial(self._keys_values, model, condition, dict(arguments))
        # With offloading the model comes to the device later: its first attention layer asks then.
        if torch.is_grad_enabled() or model.device == arguments["hidden_states"].device:
            self._bank.at(0)

    def _require_processors(self, model: FluxTransformer2DModel) -> None:
        for (name, attn), processor in zip(flux_attentions(model).items(), self._processors):
            if attn.processor is not processor:
                raise RuntimeError(
                    f"the processor of {name} was replaced while EasyControl was attached: detach it, "
                    "load the other adapter, and attach it again"
                )

    def _keys_values(
        self, model: FluxTransformer2DModel, condition: _Condition, arguments: Mapping[str, Any]
    ) -> list[KeyValue]:
        names = ("pooled_projections", "guidance", "img_ids")
        seen = [arguments[name] for name in names if arguments.get(name) is not None]
        inputs = Inputs(arguments["hidden_states"], arguments["timestep"], seen)
        if torch.is_grad_enabled() or not self.use_kv_cache:
            return self._encode(model, condition, arguments)
        if inputs.time > self._last_time:  # a new run: weights may have changed since
            self.clear_cache()
        self._last_time = inputs.time
        key = inputs.key()
        if key not in self._kept:
            while len(self._kept) >= _KEPT:
                del self._kept[next(iter(self._kept))]
            self._kept[key] = self._encode(model, condition, arguments), inputs
        return self._kept[key][0]

    def _encode(
        self, model: FluxTransformer2DModel, condition: _Condition, arguments: Mapping[str, Any]
    ) -> list[KeyValue]:
        x, pooled = arguments["hidden_states"], arguments["pooled_projections"]
        latents = _for_batch(condition.latents, len(x)).to(x)
        if 4 * latents.shape[1] != x.shape[-1]:
            raise ValueError(
                f"a condition token has {4 * latents.shape[1]} numbers, the transformer takes {x.shape[-1]}: "
                "encode the picture with the pipeline's own VAE"
            )
        stream = flux_stream(model, pooled, arguments.get("guidance"), x.dtype)
        return self.encode(stream, latents, condition.kind, grid_of(arguments["img_ids"]))

    def encode(
        self, stream: Stream, latents: torch.Tensor, condition_type: str, image: tuple[int, int]
    ) -> list[KeyValue]:
        """The condition stream, run once: keys and values of the condition for every block.

        Args:
            stream: The transformer, of diffusers (`flux_stream`) or of another library.
            latents: Of the condition, `[B, c, h, w]`.
            condition_type: `"spatial"` or `"subject"`.
            image: Rows and columns of image tokens.
        """
        grid = latents.shape[-2] // 2, latents.shape[-1] // 2
        offset = self.config.subject_offset
        ids = spatial_ids(image, grid) if condition_type == "spatial" else subject_ids(grid, offset)
        factor = self.scale * (self.config.network_alpha or self.config.rank) / self.config.rank
        slots = (*self.transformer_blocks, *self.single_transformer_blocks)
        return condition_keys_values(
            stream, [functools.partial(_scaled, slot, factor) for slot in slots], pack(latents), ids
        )


def _scaled(slot: _Slot, factor: float, name: str, x: torch.Tensor) -> torch.Tensor | float:
    return factor * slot.update(name, x)


def _flux(target: Any) -> FluxTransformer2DModel:
    model = denoiser_of(target)
    if not isinstance(model, FluxTransformer2DModel):
        raise ValueError(f"EasyControl works on FluxTransformer2DModel, not on {type(model).__name__}")
    return model


def _sizes_of(model: FluxTransformer2DModel) -> dict[str, int]:
    config = model.config
    return {
        "num_layers": config.num_layers,
        "num_single_layers": config.num_single_layers,
        "dim": config.num_attention_heads * config.attention_head_dim,
    }


def _require_kind(kind: str) -> None:
    if kind not in KINDS:
        raise ValueError(unknown("condition_type", kind, KINDS))


def _pictures(image: Any) -> torch.Tensor:
    """Float pictures `[n, 3, h, w]` in [-1, 1]."""
    if not isinstance(image, torch.Tensor):
        return VaeImageProcessor(do_resize=False, do_convert_rgb=True).preprocess(image)
    require_pictures(image, (3, 1), low=-1.0 if image.shape[1:2] == (3,) else 0.0)
    return image if image.shape[1] == 3 else (image * 2 - 1).expand(-1, 3, -1, -1)


def _for_batch(latents: torch.Tensor, batch: int) -> torch.Tensor:
    """One condition for every row of the batch."""
    if len(latents) not in (1, batch):
        raise ValueError(
            f"{len(latents)} condition pictures for a batch of {batch}: give one, or one per row "
            "(with several pictures per prompt, or guidance in one batch, repeat them)"
        )
    return latents.expand(batch, -1, -1, -1)


def easycontrol_images(
    pipe: Any,
    spatial_images: Sequence[Any] = (),
    subject_images: Sequence[Any] = (),
    cond_size: int | tuple[int, int] | None = None,
) -> None:
    """Give every EasyControl that is attached to a pipeline its picture, in the order of attaching.

    Args:
        pipe: Flux pipeline.
        spatial_images: One picture per attached adapter of type `"spatial"`; see `EasyControlAdapter.set_condition`.
        subject_images: One picture per attached adapter of type `"subject"`.
        cond_size: For all of them, see `EasyControlAdapter.set_condition`; default: each adapter's own.

    Raises:
        ValueError: The numbers of pictures and adapters differ.
    """
    first = next(iter(flux_attentions(_flux(pipe)).values())).processor
    adapters = [bank.owner for bank in getattr(first, "banks", ())]
    pairs: list[tuple[EasyControlAdapter, Any]] = []
    for kind, images in zip(KINDS, (spatial_images, subject_images)):
        takers = [adapter for adapter in adapters if adapter.config.condition_type == kind]
        if len(takers) != len(images):
            raise ValueError(f"{len(images)} {kind} pictures for {len(takers)} attached {kind} adapters")
        pairs += zip(takers, images)
    for adapter, image in pairs:
        adapter.set_condition(pipe, image, cond_size=cond_size)
