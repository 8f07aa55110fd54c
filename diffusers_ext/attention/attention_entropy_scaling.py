"""Attention-entropy scaling: keep attention as sharp at a new picture size as it was at the trained one.

Jin, Shen, Li, Xue, "Training-free Diffusion Model Adaptation for Variable-Sized Text-to-Image Synthesis", NeurIPS
2023, https://arxiv.org/abs/2306.08645
"""

from __future__ import annotations

import functools
import inspect
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.hooks import ModelHook
from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry
from diffusers.models.attention_processor import AttnProcessor2_0
from torch.overrides import TorchFunctionMode

from .._fields import require_types
from ..apply import Attachment, MethodConfig, denoiser_of
from ..caching._common import PREFIX, Inputs, install, is_innermost
from ..registry import Claim, MethodRecord, register


__all__ = ["AttentionEntropyScalingConfig", "EntropyScaledAttnProcessor2_0"]

_HOOK = PREFIX + "attention-entropy-scaling"
# Attention along frames: its number of keys does not depend on the picture size.
_OVER_FRAMES = re.compile(r"temp|motion")
_UNET_BLOCK = re.compile(r"(down|up)_blocks\.(\d+)\.|mid_block\.")


def entropy_factor(keys: float, trained_keys: float, strength: float = 1.0) -> float:
    """Factor on the attention logits that keeps their entropy, (ln N / ln T)^(strength / 2).

    Args:
        keys: N, keys per query now, above 1.
        trained_keys: T, keys per query in training, above 1.
        strength: 1 is the paper's factor, 0 none.

    Raises:
        ValueError: One key or fewer, whose entropy is 0 whatever the factor.
    """
    if keys <= 1 or trained_keys <= 1:
        raise ValueError(
            f"attention over {keys:g} keys, {trained_keys:g} in training: the factor needs more than one key on both "
            "sides; use a larger picture or base size, or leave these layers out with `layers`"
        )
    return (math.log(keys) / math.log(trained_keys)) ** (strength / 2)


@dataclass(frozen=True)
class Layout:
    """What one call of a denoiser means for its attention layers.

    Args:
        area_ratio: Area of a picture in training over the area now.
        image_tokens: Tokens of the whole picture in a transformer; None for UNets, whose levels differ.
        strength: See `entropy_factor`.
        count_text: Do text tokens that are attended together with the picture count as keys?
    """

    area_ratio: float
    image_tokens: int | None
    strength: float
    count_text: bool

    def factor(self, queries: int, keys: int, trained: int | None = None) -> float:
        """Factor for a layer with these numbers of queries and keys.

        Keys beyond the picture's are text. Fewer keys than picture tokens are an image prompt's (IP-Adapter), which
        stays as it is.

        Args:
            queries: Tokens that attend.
            keys: Tokens that each of them attends to.
            trained: Picture tokens of this layer in training, whatever windows and shrunk features leave of them now.
                Default: by `area_ratio`, where windows and tiles count as pictures of their size.
        """
        image = min(queries, self.image_tokens or queries)
        if keys < image:
            return 1.0
        text = keys - image if self.count_text else 0
        before = image * self.area_ratio if trained is None else trained
        return entropy_factor(image + text, before + text, self.strength)


class ScaledQueries(TorchFunctionMode):
    """Multiplies the queries of every softmax attention inside the block, after norms and rotary embedding.

    Args:
        factor: From numbers of queries and keys to the factor.
    """

    def __init__(self, factor: Callable[[int, int], float]):
        super().__init__()
        self.factor, self.seen, self.ran = factor, 0, False

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        # As a function it breaks compiled graphs of torch 2.13, and the mode would meet each part of one again.
        if func is torch.Tensor.unflatten:
            return args[0].unflatten(*args[1:], **kwargs)
        if func is F.scaled_dot_product_attention:
            args, kwargs = self._scaled(args, kwargs, 0, ("query", "key"), -2)
        elif func is torch.baddbmm:  # logits of the processors that write the softmax out
            args, kwargs = self._scaled(args, kwargs, 1, ("batch1", "batch2"), -1)
        elif func is F.linear:
            self.ran = True
        return func(*args, **kwargs)

    def _scaled(self, args: tuple, kwargs: dict, place: int, names: tuple[str, str], keys: int) -> tuple[tuple, dict]:
        """The arguments with scaled queries. `keys` is the dimension of the key tensor that counts the keys."""
        name, key_name = names
        query = kwargs[name] if name in kwargs else args[place]
        key = kwargs[key_name] if key_name in kwargs else args[place + 1]
        self.seen += 1
        scaled = query * self.factor(query.shape[-2], key.shape[keys])
        if name in kwargs:
            return args, {**kwargs, name: scaled}
        return (*args[:place], scaled, *args[place + 1 :]), kwargs


def self_attention(model: torch.nn.Module) -> dict[str, torch.nn.Module]:
    """Attention layers of a UNet or transformer whose number of keys grows with the picture, by name."""
    return {
        name: module
        for name, module in model.named_modules()
        if hasattr(module, "to_q")
        and hasattr(module, "processor")
        and not getattr(module, "is_cross_attention", False)
        and not _OVER_FRAMES.search(name)
    }


def level_of(model: torch.nn.Module, name: str) -> int | None:
    """Level of a UNet that a layer is on, 0 the outermost; None in models whose blocks do not halve the size."""
    place, blocks = _UNET_BLOCK.match(name), getattr(model, "down_blocks", ())
    if place is None or not all(getattr(block, "downsamplers", None) for block in blocks[:-1]):
        return None
    last = len(blocks) - 1
    if place[1] is None:
        return last
    return int(place[2]) if place[1] == "down" else last - int(place[2])


def trained_tokens(base: tuple[int, int], level: int) -> int:
    """Tokens of a UNet's level at the size of training.

    Raises:
        ValueError: It is one, and the entropy of attention over one key is 0 whatever the factor.
    """
    tokens = math.ceil(base[0] / 2**level) * math.ceil(base[1] / 2**level)
    if tokens == 1:
        raise ValueError(
            f"a training size of {base[0]} x {base[1]} latents is a single token on level {level} of this UNet: "
            "attention over one key has no entropy to keep; give a larger size, or leave these layers out (`layers`)"
        )
    return tokens


@dataclass
class _Shared:
    """Read by the layer hooks, written by the root hook; `layout` is None outside of a call that is scaled."""

    layout: Layout | None = None
    area_ratio: float = 1.0
    scaled: int = 0
    plain: int = 0


class _LayerHook(ModelHook):
    """On a self-attention layer: runs it with scaled queries."""

    def __init__(self, shared: _Shared, name: str, trained: int | None):
        super().__init__()
        self.shared, self.name, self.trained = shared, name, trained

    def new_forward(self, module: torch.nn.Module, *args, **kwargs):
        layout = self.shared.layout
        if layout is None:
            return self.fn_ref.original_forward(*args, **kwargs)
        with ScaledQueries(functools.partial(layout.factor, trained=self.trained)) as mode:
            output = self.fn_ref.original_forward(*args, **kwargs)
        # Reading the counter inside a compiled graph makes torch 2.13 drop the mode from it.
        if not torch.compiler.is_compiling() and not mode.seen and (mode.ran or is_innermost(module, self)):
            raise RuntimeError(
                f"attention layer {self.name} ({type(module.processor).__name__}) computes its softmax outside of "
                "torch, where it cannot be scaled: use model.set_attention_backend('native') or AttnProcessor2_0"
            )
        return output


class _RootHook(ModelHook):
    """On the denoiser: measures each call's picture and tells the layers."""

    _is_stateful = True

    def __init__(self, config: AttentionEntropyScalingConfig, base: tuple[int, int], shared: _Shared):
        super().__init__()
        self.config, self.base, self.shared = config, base, shared
        self._last = math.inf
        self._start = 0.0

    def initialize_hook(self, module: torch.nn.Module) -> torch.nn.Module:
        self._signature = inspect.signature(module.forward)
        return module

    # Not recursive: what is measured stays outside of compiled graphs, the model's own forward is still compiled.
    @torch.compiler.disable(recursive=False)
    def new_forward(self, module: torch.nn.Module, *args, **kwargs):
        try:
            self._begin(module, args, kwargs)
            return self.fn_ref.original_forward(*args, **kwargs)
        finally:
            self.shared.layout = None

    @torch.compiler.disable
    def _begin(self, module: torch.nn.Module, args: tuple, kwargs: dict) -> None:
        inputs = Inputs.of(self._signature.bind(*args, **kwargs).arguments)
        if inputs.time > self._last or self._last == math.inf:
            # Some transformers take timesteps in [0, 1], all others in [0, 1000]; the first of a run tells.
            self._start = 1.0 if inputs.time <= 1 else 1000.0
            self.shared.scaled = self.shared.plain = 0
        self._last = inputs.time
        ratio, tokens = picture_of(module, inputs.sample, self.base)
        active = self.config.is_active(1 - inputs.time / self._start) and ratio != 1 and self.config.strength > 0
        if active:
            self.shared.layout = Layout(ratio, tokens, self.config.strength, self.config.count_text)
        self.shared.area_ratio = ratio
        self.shared.scaled += active
        self.shared.plain += not active

    def reset_state(self, module: torch.nn.Module) -> torch.nn.Module:
        self._last = math.inf
        return module


def picture_of(model: torch.nn.Module, sample: torch.Tensor, base: tuple[int, int]) -> tuple[float, int | None]:
    """Area in training over the area of `sample`, and the number of picture tokens (None for UNets).

    Args:
        model: Denoiser.
        sample: Latents `[n, c, h, w]` or `[n, c, f, h, w]`, or tokens `[n, l, c]` of 2 x 2 patches.
        base: Height and width of the latents in training.
    """
    if sample.ndim == 3:
        return base[0] * base[1] / 4 / sample.shape[1], sample.shape[1]
    ratio = base[0] * base[1] / (sample.shape[-2] * sample.shape[-1])
    if hasattr(model, "down_blocks"):
        return ratio, None
    patch = getattr(model.config, "patch_size", 1) or 1
    height, width = patch[-2:] if isinstance(patch, (tuple, list)) else (patch, patch)
    frames = sample.shape[2] if sample.ndim == 5 else 1
    return ratio, frames * (sample.shape[-2] // height) * (sample.shape[-1] // width)


@register(
    MethodRecord(
        slug="attention-entropy-scaling",
        family="attention",
        kind="attention",
        title="Training-free Diffusion Model Adaptation for Variable-Sized Text-to-Image Synthesis",
        arxiv="2306.08645",
        summary="Attention stays as sharp as at the trained picture size, at no cost, with any self-attention",
        targets=("unet", "dit", "mmdit"),
        predictions=("epsilon", "v_prediction", "sample", "flow_prediction"),
        nodes=("DXAttentionEntropyScaling",),
        claim=Claim(
            text="Entropy of attention, and with it the layout of pictures, kept away from the trained size",
            setting="theory; the abstract gives no figure",
        ),
        conflicts=("ras",),
    )
)
@dataclass(frozen=True)
class AttentionEntropyScalingConfig(MethodConfig):
    """Adapts a model to pictures larger or smaller than it was trained for, at no cost.

    With more tokens, every row of a self-attention map spreads over more keys, and large pictures repeat objects; with
    fewer, it is too sharp, and small pictures crop them. Scaling the logits by sqrt(ln N / ln T), where N is the
    number of keys now and T in training, keeps the entropy. Cross-attention to text is left alone. At the trained size
    nothing changes, bit by bit. Paper: https://arxiv.org/abs/2306.08645

    Args:
        base_size: Height and width of the latents in training (pixels / 8 for most models). Default: the model's
            `config.sample_size`; Flux has none, give `(128, 128)`.
        strength: In [0, 1]; 1 is the paper's factor, 0 changes nothing.
        layers: Regular expression; only layers whose name it finds are scaled, e.g. `"up_blocks"`. Default all.
        start, end: Part of the noise range, from 0 (pure noise) to 1, in which layers are scaled. Default all.
        count_text: In transformers that attend to text and picture together, count the text tokens as keys too.

    Raises:
        ValueError: Values out of range; on `apply`, no `base_size`, no such layer, a layer that saw one token in
            training, a fused attention backend, or a model that scales its attention itself (Lumina).
        TypeError: On `apply`, linear attention (Sana), which has no softmax.
        RuntimeError: In a run, if a layer's softmax is computed where it cannot be reached.

    Example:
        >>> import diffusers_ext
        >>> from diffusers_ext import AttentionEntropyScalingConfig, zoo
        >>> pipe = zoo.load("shapes-unet")  # trained at 64 x 64
        >>> with diffusers_ext.apply(pipe, AttentionEntropyScalingConfig()) as handle:
        ...     image = pipe("a red circle", num_inference_steps=2, height=128, width=128).images[0]
        ...     handle.summary()["attention-entropy-scaling"]["area_ratio"]
        0.25

    Limits:
        It repairs the statistics of attention, not the receptive field of convolutions, which repeat objects too. The
        softer a model's attention, the less there is to repair.
    """

    base_size: tuple[int, int] | None = None
    strength: float = 1.0
    layers: str | None = None
    start: float = 0.0
    end: float = 1.0
    count_text: bool = True

    def __post_init__(self) -> None:
        require_types(self)
        if self.base_size is not None:
            size = tuple(self.base_size)
            if min(size) < 1:
                raise ValueError(
                    f"base_size is {self.base_size}; accepted: (height, width) of the latents in training"
                )
            object.__setattr__(self, "base_size", size)
        if not 0 <= self.strength <= 1:
            raise ValueError(f"strength is {self.strength}; accepted: 0 (off) to 1 (the paper's factor)")
        if not 0 <= self.start <= self.end <= 1:
            raise ValueError(f"start, end are {self.start}, {self.end}; accepted: 0 <= start <= end <= 1")
        try:
            re.compile(self.layers or "")
        except re.error as error:
            raise ValueError(f"layers is {self.layers!r}, which is no regular expression: {error}") from error

    def is_active(self, progress: float) -> bool:
        """Are layers scaled at this part of the noise range, 0 (pure noise) to 1?"""
        return self.start <= progress <= self.end

    def base_of(self, model: torch.nn.Module) -> tuple[int, int]:
        """Height and width of the latents in training."""
        size = self.base_size or getattr(getattr(model, "config", None), "sample_size", None)
        if size is None:
            raise ValueError(
                f"{type(model).__name__} does not say at which size it was trained: give base_size=(height, width) of "
                "its latents, (128, 128) for pictures of 1024 x 1024"
            )
        return (size, size) if isinstance(size, int) else tuple(size)

    def layers_of(self, model: torch.nn.Module) -> dict[str, torch.nn.Module]:
        """The layers that are scaled, by name."""
        known = self_attention(model)
        if not known:
            raise ValueError(
                f"{type(model).__name__} has no self-attention layers; supported: UNets with attention, DiT, PixArt, "
                "SD3, Flux and other transformers of diffusers"
            )
        chosen = {name: module for name, module in known.items() if re.search(self.layers or "", name)}
        if not chosen:
            raise ValueError(f"layers={self.layers!r} matches none of {', '.join(known)}")
        return chosen

    def check(self, target: Any, num_inference_steps: int | None = None) -> tuple[str, ...]:
        model = denoiser_of(target)
        layers = self.layers_of(model)
        for name, module in layers.items():
            _refuse_processor(name, module.processor)
        base = self.base_of(model)
        if base[0] * base[1] <= 1:
            raise ValueError(f"base_size {base} is a single token: attention over one key has no entropy to keep")
        if self.strength == 0:
            return ("strength is 0: attention-entropy-scaling changes nothing",)
        self.trained_by_layer(model, layers)
        return ()

    def trained_by_layer(self, model: torch.nn.Module, layers: Iterable[str]) -> dict[str, int | None]:
        """Picture tokens in training of the layers of a UNet; None where they follow from the size of each call."""
        base, levels = self.base_of(model), {name: level_of(model, name) for name in layers}
        return {name: level if level is None else trained_tokens(base, level) for name, level in levels.items()}

    def attach(self, target: Any) -> Attachment:
        model, shared = denoiser_of(target), _Shared()
        layers = self.layers_of(model)
        trained = self.trained_by_layer(model, layers) if self.strength else dict.fromkeys(layers)

        def hooks() -> Iterator[tuple[torch.nn.Module, ModelHook]]:
            yield model, _RootHook(self, self.base_of(model), shared)
            for name, module in layers.items():
                yield module, _LayerHook(shared, name, trained[name])

        def summary() -> Mapping[str, Any]:
            calls = {"scaled": shared.scaled, "plain": shared.plain}
            return {"layers": len(layers), **calls, "area_ratio": shared.area_ratio}

        return Attachment(install(model, hooks(), _HOOK), summary)


def _refuse_processor(name: str, processor: Any) -> None:
    kind = type(processor).__name__
    if "Linear" in kind:
        raise TypeError(f"{name} is linear attention ({kind}), which has no softmax to scale")
    if "Lumina" in kind:
        raise ValueError(f"{name} ({kind}) scales its attention by itself: applying it again would scale twice")
    backend = getattr(processor, "_attention_backend", None)
    backend = AttentionBackendName(backend) if backend else _AttentionBackendRegistry.get_active_backend()[0]
    if "XFormers" in kind or (hasattr(processor, "_attention_backend") and "native" not in backend.value):
        raise ValueError(
            f"{name} computes attention with {kind if 'XFormers' in kind else backend.value}, whose queries cannot be "
            "reached: use model.set_attention_backend('native') or pipe.disable_xformers_memory_efficient_attention()"
        )


class EntropyScaledAttnProcessor2_0(AttnProcessor2_0):
    """Attention processor with the paper's factor, for `unet.set_attn_processor`; cross-attention is left alone.

    Args:
        area_ratio: Area of a picture in training over the area now, e.g. 0.25 for twice the trained width and height.
        strength: In [0, 1]; 1 is the paper's factor.

    Example:
        >>> from diffusers_ext import EntropyScaledAttnProcessor2_0, zoo
        >>> pipe = zoo.load("shapes-unet")
        >>> pipe.unet.set_attn_processor(EntropyScaledAttnProcessor2_0(area_ratio=0.25))

    Limits:
        The ratio is fixed; `AttentionEntropyScalingConfig` measures it on every call.
    """

    def __init__(self, area_ratio: float, strength: float = 1.0):
        super().__init__()
        if not area_ratio > 0:
            raise ValueError(f"area_ratio is {area_ratio}; accepted: numbers above 0 (trained area / area now)")
        if not 0 <= strength <= 1:
            raise ValueError(f"strength is {strength}; accepted: 0 (off) to 1 (the paper's factor)")
        self.layout = Layout(area_ratio, None, strength, count_text=True)

    def __call__(self, attn, hidden_states, *args, **kwargs):
        if attn.is_cross_attention or self.layout.area_ratio == 1:
            return super().__call__(attn, hidden_states, *args, **kwargs)
        with ScaledQueries(self.layout.factor):
            return super().__call__(attn, hidden_states, *args, **kwargs)
