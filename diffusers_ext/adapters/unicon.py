"""UniCon: image and condition are denoised side by side, so that each can be drawn from the other, or both at once.

Li, Herrmann, Chan, Li, Sun, Ma, Jiang, Xu, Yang, "A Simple Approach to Unifying Diffusion-based Conditional
Generation", ICLR 2025, https://arxiv.org/abs/2410.11439
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, ClassVar
from weakref import WeakKeyDictionary

import torch
from diffusers.configuration_utils import register_to_config
from diffusers.hooks import HookRegistry, ModelHook
from torch import nn

from ..apply import denoiser_of
from ..caching._common import Inputs, map_tensors, refuse_fused_qkv, unregister
from ..registry import Claim, MethodRecord, register
from ._common import Adapter, conditional_rows, require_pictures, running_pipeline
from ._unicon_joint import (
    POST_JOINTS,
    PROJECTIONS,
    Arrangement,
    Pair,
    blocks_of,
    joint_attention,
    low_ranks,
    plain,
    post_joint,
    post_layers,
    rows_of,
    widths_of,
)
from ._unicon_published import convert, is_published, read_published


__all__ = ["UniConAdapter"]

_HOOK = "diffusers_ext.unicon"
_RESIDUALS = (
    "down_block_additional_residuals",
    "mid_block_additional_residual",
    "down_intrablock_additional_residuals",
)


@register(
    MethodRecord(
        slug="unicon",
        family="adapters",
        kind="adapter",
        title="A Simple Approach to Unifying Diffusion-based Conditional Generation",
        arxiv="2410.11439",
        summary="One adapter draws images from depth or edges, depth or edges from images, and both together",
        targets=("unet",),
        predictions=("epsilon", "v_prediction", "sample"),
        nodes=("DXUniConLoader", "DXUniConSample"),
        claim=Claim(
            text="Parameters added, as a share of the base model",
            setting="Stable Diffusion 1.5, rank 64; one training stage for control, estimation and joint generation",
            value=15,
            unit="%",
        ),
    )
)
class UniConAdapter(Adapter):
    """Ties an image x and a picture y of the same size (depth, edges, pose...) together while both are drawn.

    On an ordinary pipeline y is a given picture (`set_condition`) that the image follows. `UniConPipeline` also draws
    y from x, both together, from a coarse y, with masks, and with several adapters.
    Paper: https://arxiv.org/abs/2410.11439

    Args:
        blocks: Channels of the transformer blocks by name; `for_model` fills them in.
        cross_attention_dim: Width of the text states.
        model_name: How `UniConPipeline` calls this adapter, such as `"depth"`.
        base: Model that it was made for; a note.
        rank: Of the updates, 1 or more; the authors take 64.
        lora_alpha: The updates are scaled by `lora_alpha / rank`. Default: `rank`.
        post_joint: `"conv_fuse"` (depth, edges, pose) or `"conv"` (identity, appearance).
        trigger_word: Stands before the prompt of y.
        use_y_lora: Whether the model itself is updated for y, for pictures that are far from photos.

    Raises:
        ValueError: Values out of range; on `attach`, a model of other sizes; in a run, pictures that do not fit the
            latents or the batch.
        RuntimeError: In a run without a picture.

    Example:
        >>> from diffusers_ext import UniConAdapter, zoo
        >>> pipe, scenes = zoo.load("shapes-unet"), zoo.held_out(2)
        >>> adapter = UniConAdapter.from_pretrained(zoo.adapter_file("unicon-depth-shapes-unet"))
        >>> adapter.set_condition(pipe, scenes.depth)
        >>> with adapter.attach(pipe):
        ...     images = zoo.generate(pipe, scenes.captions, num_inference_steps=8)

    Limits:
        Every step computes x, y and the attention between them, 2.5 times the work of the plain model. x and y have
        the same size.
    """

    @register_to_config
    def __init__(
        self,
        blocks: Mapping[str, int],
        cross_attention_dim: int = 768,
        model_name: str = "condition",
        base: str = "",
        rank: int = 64,
        lora_alpha: float | None = None,
        post_joint: str = "conv_fuse",
        trigger_word: str = "",
        use_y_lora: bool = True,
    ):
        super().__init__()
        if rank < 1:
            raise ValueError(f"rank is {rank}: give 1 or more")
        if post_joint not in POST_JOINTS:
            raise ValueError(f"post_joint is {post_joint!r}; accepted: {', '.join(map(repr, POST_JOINTS))}")
        if not blocks:
            raise ValueError("no blocks: UniConAdapter.for_model(pipe) reads them from a model")
        alpha = float(rank if lora_alpha is None else lora_alpha)
        self.xy_lora = low_ranks(blocks, ["attn1n"], cross_attention_dim, rank, alpha)
        self.yx_lora = low_ranks(blocks, ["attn1n"], cross_attention_dim, rank, alpha)
        if use_y_lora:
            self.y_lora = low_ranks(blocks, ["attn1", "attn2"], cross_attention_dim, rank, alpha)
        self.post = post_layers(blocks, post_joint)
        self._condition: torch.Tensor | None = None
        self._text: torch.Tensor | None = None
        self._given: tuple[tuple[Any, Any, float, float], ...] | None = None
        self._joint = True
        self._live: Arrangement | None = None
        self._companions: _Companions | None = None

    @classmethod
    def for_model(cls, target: Any, skip_encoder: bool = False, **config: Any) -> UniConAdapter:
        """A fresh adapter, which changes nothing, with the sizes of a model.

        Args:
            target: Pipeline or UNet.
            skip_encoder: Leave the blocks of the encoder alone: cheaper, weaker.
            config: Further arguments of the class, e.g. `rank=16`.
        """
        widths = widths_of(blocks_of(target))
        kept = {name: width for name, width in widths.items() if not (skip_encoder and name.startswith("down_"))}
        return cls(kept, denoiser_of(target).config.cross_attention_dim, **config)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **kwargs: Any) -> UniConAdapter:
        """As `Adapter.from_pretrained`; also a folder in the authors' layout.

        Args:
            pretrained_model_name_or_path: The authors' folder holds `xy_lora`, `yx_lora`, perhaps `y_lora` (a LoRA
                file each), and `model.safetensors` in place of their `model.pth`.
            kwargs: For the authors' folders: `torch_dtype`, and of the config `model_name` (default: the folder's
                name), `base` and `trigger_word`, which the files do not tell.

        Raises:
            ValueError: Tensors are missing, unknown, or of another shape than the config says.
        """
        folder = Path(pretrained_model_name_or_path)
        if not is_published(folder):
            return super().from_pretrained(folder, **kwargs)
        dtype = kwargs.pop("torch_dtype", None)
        config, tensors = convert(read_published(folder))
        return cls._assembled({"model_name": folder.name, **config, **kwargs}, tensors, dtype)

    @classmethod
    def published(cls, tensors: Mapping[str, torch.Tensor]) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
        """Config and weights from one file that joins the authors' files, each behind its name."""
        return convert(tensors)

    def check(self, target: Any) -> None:
        found = widths_of(blocks_of(target))
        for name, width in self.config.blocks.items():
            if found.get(name) != width:
                has = f"has {found[name]} channels" if name in found else "is missing"
                raise ValueError(
                    f"{name}, which the adapter expects with {width} channels, {has}: use an adapter of this model, "
                    "or UniConAdapter.for_model"
                )
        text = denoiser_of(target).config.cross_attention_dim
        if self.config.use_y_lora and text != self.config.cross_attention_dim:
            raise ValueError(
                f"the model reads text of width {text}, the adapter {self.config.cross_attention_dim}: use an adapter "
                "of this model"
            )
        refuse_fused_qkv(denoiser_of(target))

    def install(self, target: Any, undo: ExitStack) -> None:
        blocks = blocks_of(target)
        for name in self.config.blocks:
            attn1 = blocks[name].attn1
            hook = attn1.register_forward_hook(partial(self._join, name), with_kwargs=True)
            undo.callback(hook.remove)
            for attention in ("attn1", "attn2") if self.config.use_y_lora else ():
                for projection in PROJECTIONS:
                    layer = plain(getattr(blocks[name], attention).get_submodule(projection))
                    lora = self.y_lora.get_submodule(f"{name}.{attention}.{projection}")
                    undo.callback(layer.register_forward_hook(partial(self._update_y, lora)).remove)
        _Companions.add(target, self, undo)

    def set_condition(
        self, pipe: Any, images: Any, prompt: str | Sequence[str] | None = None, latents: torch.Tensor | None = None
    ) -> None:
        """Choose the picture y that the images of an ordinary pipeline follow; None for none.

        Args:
            pipe: Pipeline whose `vae` encodes it, and whose text encoder reads the prompt.
            images: `[n, 3 or 1, height, width]` in [0, 1]: one for all, or one per prompt.
            prompt: Of y, without the trigger word. Default: y reads what the image reads.
            latents: In place of `images`, `[n, c, h, w]`, scaled as the UNet sees them.

        Raises:
            ValueError: Pictures of another shape.
        """
        self._text = None if prompt is None else prompt_states(pipe, self.config.trigger_word, prompt)
        self._condition = encode_pictures(pipe, images) if latents is None and images is not None else latents

    @contextmanager
    def paired(self, *pairs: tuple[Any, Any, float, float], joint: bool = True) -> Iterator[None]:
        """Inside the block the rows of a batch are joined as said; for training, and for `UniConPipeline`.

        Args:
            pairs: (rows of x, rows of y, weight of x, weight of y); rows are slices or lists of as many indices.
            joint: False leaves out the joint attention only.
        """
        before = self._given, self._joint
        self._given, self._joint = pairs, joint
        try:
            yield
        finally:
            self._given, self._joint = before

    def begin_call(self, target: Any, arguments: Mapping[str, Any]) -> None:
        if self.scale != 0 and self._given is None and self._condition is None:
            raise RuntimeError(
                "nothing to draw by: call set_condition(pipe, pictures), use UniConPipeline, or set_scale(0)"
            )

    def _arranged(self, batch: int, device: torch.device) -> Arrangement:
        pairs = [
            Pair(rows_of(x, batch, device), rows_of(y, batch, device), w_x, w_y)
            for x, y, w_x, w_y in self._given or ()
        ]
        return Arrangement(tuple(pairs), batch, self._joint)

    def _active(self, value: torch.Tensor) -> bool:
        live = self._live
        return live is not None and bool(live.pairs) and self.scale != 0 and not value.is_meta

    @torch.compiler.disable
    def _join(self, name: str, attn1: nn.Module, args: tuple, kwargs: dict, output: torch.Tensor) -> Any:
        """Hook on a self-attention: a_x + s w_x jx, a_y + s w_y jy."""
        if not self._active(output) or not self._live.joint:
            return None
        h = args[0] if args else kwargs["hidden_states"]
        xy, yx = (lora.get_submodule(f"{name}.attn1n") for lora in (self.xy_lora, self.yx_lora))
        self._companions.joining = True
        try:
            for pair in self._live.stacked(len(h)):
                jx, jy = joint_attention(attn1, h[pair.x], h[pair.y], xy, yx)
                jx, jy = post_joint(self.post.get_submodule(name), jx, jy)
                output = output.index_add(0, pair.x, self.scale * pair.w_x * jx)
                output = output.index_add(0, pair.y, self.scale * pair.w_y * jy)
        finally:
            self._companions.joining = False
        return output

    @torch.compiler.disable
    def _update_y(self, lora: nn.Module, _: nn.Module, args: tuple, output: torch.Tensor) -> torch.Tensor | None:
        """Hook on a projection of the model: the update of y, for rows of y only."""
        if not self._active(output) or self._companions.joining:
            return None
        y = torch.cat([pair.y for pair in self._live.stacked(len(output))]).unique()
        return output.index_add(0, y, lora(args[0][y]))


class _Companions(ModelHook):
    """Gives the images of a batch their y, for all adapters on a UNet, and takes it out of the result.

    Attributes:
        adapters: In the order in which they were attached.
        joining: Whether a joint attention is computed, which the updates of y do not touch.
    """

    _active: ClassVar[WeakKeyDictionary[nn.Module, _Companions]] = WeakKeyDictionary()

    def __init__(self, target: Any):
        super().__init__()
        self.target, self.joining = target, False
        self.adapters: list[UniConAdapter] = []
        self.signature = inspect.signature(type(denoiser_of(target)).forward)

    @classmethod
    def add(cls, target: Any, adapter: UniConAdapter, undo: ExitStack) -> None:
        """Put an adapter on the UNet of `target`."""
        unet = denoiser_of(target)
        mine = cls._active.get(unet)
        if mine is None:
            mine = cls._active.setdefault(unet, cls(target))
            HookRegistry.check_if_exists_or_initialize(unet).register_hook(mine, _HOOK)
        mine.adapters.append(adapter)
        adapter._companions = mine
        undo.callback(mine._drop, unet, adapter)

    def _drop(self, unet: nn.Module, adapter: UniConAdapter) -> None:
        self.adapters = [other for other in self.adapters if other is not adapter]
        adapter._companions = None
        if not self.adapters:
            unregister(unet, _HOOK)
            self._active.pop(unet, None)

    @torch.compiler.disable(recursive=False)
    def new_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        try:
            args, kwargs, images = self._begin(module, args, kwargs)
            return _first_rows(self.fn_ref.original_forward(*args, **kwargs), images)
        finally:
            self._end()

    @torch.compiler.disable
    def _begin(self, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict, int]:
        """The arguments of the call with the rows of y, and how many rows come back."""
        acting = [adapter for adapter in self.adapters if adapter.scale != 0]
        bound = self.signature.bind(module, *args, **kwargs)
        sample = Inputs.of(bound.arguments).sample
        given = [adapter for adapter in acting if adapter._given is not None]
        for adapter in given:
            adapter._live = adapter._arranged(len(sample), sample.device)
        if acting and not given:
            self._extend(bound.arguments, acting)
        return bound.args[1:], bound.kwargs, len(sample)

    @torch.compiler.disable
    def _end(self) -> None:
        for adapter in self.adapters:
            adapter._live = None

    def _extend(self, arguments: dict[str, Any], adapters: Sequence[UniConAdapter]) -> None:
        """Append the rows of every adapter's y to a call, and tell the adapters."""
        pipeline = running_pipeline()[0] or self.target
        if getattr(pipeline, "do_perturbed_attention_guidance", False):
            raise ValueError(
                "perturbed attention guidance counts the rows of a batch, to which UniCon adds those of y: set "
                "pag_scale=0"
            )
        sample, count = Inputs.of(arguments).sample, 1 + len(adapters)
        batch, device = len(sample), sample.device
        part = conditional_rows(batch).start or batch
        conditions = [_spread(adapter._condition, part, batch, sample) for adapter in adapters]
        text = [_text_for(adapter, arguments["encoder_hidden_states"], part) for adapter in adapters]
        time = torch.as_tensor(arguments["timestep"], device=device).expand(batch)
        clean = time.new_full([batch * len(adapters)], _clean_timestep(pipeline))
        for name, value in arguments.items():
            if name in _RESIDUALS:
                arguments[name] = map_tensors(
                    value, lambda t: torch.cat([t, t.new_zeros(t.shape).repeat_interleave(count - 1, 0)])
                )
            elif name not in ("self", "sample", "timestep"):
                arguments[name] = map_tensors(
                    value, lambda t: torch.cat([t] * count) if t.ndim and len(t) == batch else t
                )
        arguments["sample"] = torch.cat([sample, *conditions])
        arguments["timestep"] = torch.cat([time, clean])
        arguments["encoder_hidden_states"] = torch.cat([arguments["encoder_hidden_states"][:batch], *text])
        rows = torch.arange(batch * count, device=device).split(batch)
        for adapter, mine in zip(adapters, rows[1:]):
            adapter._live = Arrangement((Pair(rows[0], mine),), batch * count)


def attached_adapters(target: Any) -> list[UniConAdapter]:
    """The UniCon adapters on a pipeline or UNet, in the order they were attached."""
    companions = _Companions._active.get(denoiser_of(target))
    return [] if companions is None else list(companions.adapters)


def _spread(latents: torch.Tensor, part: int, batch: int, sample: torch.Tensor) -> torch.Tensor:
    """Condition latents for every row of a batch."""
    if latents.shape[1:] != sample.shape[1:]:
        raise ValueError(
            f"y has latents of shape {list(latents.shape[1:])}, the image of {list(sample.shape[1:])}: give pictures "
            "of the size of the image to draw"
        )
    if part % len(latents):
        raise ValueError(f"{len(latents)} pictures y for {part} images in a batch: give one, or one per image")
    return latents.to(sample).repeat_interleave(part // len(latents), 0).repeat(batch // part, 1, 1, 1)


def _text_for(adapter: UniConAdapter, states: torch.Tensor, part: int) -> torch.Tensor:
    """What the y of every row reads: the text of its image, or in the last part the adapter's own."""
    if adapter._text is None:
        return states
    own = adapter._text.to(states)
    if part % len(own):
        raise ValueError(f"{len(own)} prompts of y for {part} images in a batch: give one, or one per image")
    return torch.cat([states[:-part], own.repeat_interleave(part // len(own), 0)])


def _clean_timestep(target: Any) -> float:
    """Timestep of a y without noise: the last one of the schedule."""
    timesteps = getattr(getattr(target, "scheduler", None), "timesteps", None)
    return 0 if timesteps is None or not len(timesteps) else float(timesteps[-1])


def _first_rows(output: Any, rows: int) -> Any:
    if isinstance(output, tuple):
        return (output[0][:rows], *output[1:]) if len(output[0]) > rows else output
    if len(output.sample) > rows:
        output.sample = output.sample[:rows]
    return output


@torch.no_grad()
def encode_pictures(pipe: Any, images: torch.Tensor) -> torch.Tensor:
    """Latents of pictures `[n, 3 or 1, h, w]` in [0, 1], as the UNet sees them."""
    require_pictures(images, (3, 1))
    vae = pipe.vae
    pictures = images.expand(-1, 3, -1, -1).to(vae.device, vae.dtype) * 2 - 1
    return (vae.encode(pictures).latent_dist.mean - (vae.config.shift_factor or 0.0)) * vae.config.scaling_factor


def prompt_states(pipe: Any, trigger: str, prompt: str | Sequence[str]) -> torch.Tensor:
    """Text states of prompts behind a trigger word."""
    prompts = [prompt] if isinstance(prompt, str) else list(prompt)
    return pipe.encode_prompt([trigger + text for text in prompts], pipe.device, 1, False)[0]
