"""VMix: a better look from a second value branch of cross-attention that uses the attention map of the content.

Wu, Ding, Li, Xia, Zhang, He, "VMix: Improving Text-to-Image Diffusion Model with Cross-Attention Mixing Control",
2024, https://arxiv.org/abs/2412.20800
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from diffusers.configuration_utils import register_to_config
from torch import nn

from ..apply import denoiser_of
from ..caching._common import tensors_in
from ..registry import Claim, MethodRecord, register, unknown
from ._common import Adapter, conditional_rows, require_range, within


__all__ = ["VMixAdapter"]

LABELS = (
    ("natural lighting", "flat lighting"),
    ("vivid colours", "dull colours"),
    ("balanced composition", "cluttered composition"),
    ("sharp focus", "blurry"),
)
UNCOND_MODES = ("none", "null")


def aesthetic_rows(aes_emb: torch.Tensor, strengths: torch.Tensor) -> torch.Tensor:
    """The aesthetic condition y_aes: per pair of labels, a point between nothing and one of the two labels.

    Args:
        aes_emb: `[2 K + 1, d]`, rows pos_0, neg_0, pos_1, ..., null.
        strengths: `[..., K]` in [-1, 1]; 1 is the positive label, -1 the negative one, 0 "unknown".

    Returns:
        `[..., K, d]`: null + s (pos - null) for s >= 0, null + |s| (neg - null) otherwise.
    """
    positive, negative, null = aes_emb[:-1:2], aes_emb[1:-1:2], aes_emb[-1]
    label = torch.where(strengths[..., None] >= 0, positive, negative)
    return null + strengths[..., None].abs() * (label - null)


class AestheticProjection(nn.Module):
    """P: from K label vectors to one vector per text token, so that values line up with the content's columns.

    Args:
        pairs: K.
        clip_dim: Width of a label vector.
        tokens: L, text tokens.
        width: D, width of the text states.
    """

    def __init__(self, pairs: int, clip_dim: int, tokens: int, width: int):
        super().__init__()
        self.token = nn.Linear(pairs, tokens)
        self.norm = nn.LayerNorm(clip_dim)
        self.channel = nn.Linear(clip_dim, width)

    def forward(self, y_aes: torch.Tensor) -> torch.Tensor:
        """f_a `[n, L, D]` of y_aes `[n, K, clip_dim]`."""
        return self.channel(self.norm(self.token(y_aes.mT).mT))


class LowRankValue(nn.Module):
    """Z_l of two layers, D -> rank -> inner; the last one starts at zero."""

    def __init__(self, width: int, rank: int, inner: int):
        super().__init__()
        self.down, self.up = nn.Linear(width, rank, bias=False), nn.Linear(rank, inner, bias=False)
        nn.init.zeros_(self.up.weight)

    def forward(self, f_a: torch.Tensor) -> torch.Tensor:
        """v_a `[n, L, inner]`."""
        return self.up(self.down(f_a))


def value_layer(width: int, inner: int, rank: int | None) -> nn.Module:
    """Z_l, zero-initialised: v_a = Z_l f_a."""
    if rank is not None:
        return LowRankValue(width, rank, inner)
    layer = nn.Linear(width, inner, bias=False)
    nn.init.zeros_(layer.weight)
    return layer


def _hang(root: nn.Module, path: str, module: nn.Module) -> None:
    """Make `module` the submodule of `root` that a dotted path names."""
    *parents, last = path.split(".")
    for name in parents:
        if name not in root._modules:
            root.add_module(name, nn.Module())
        root = root._modules[name]
    root.add_module(last, module)


def cross_attention(model: nn.Module) -> dict[str, nn.Module]:
    """The text cross-attention layers of a model by name: paths that end in `attn2`."""
    return {
        name: module
        for name, module in model.named_modules()
        if name.endswith("attn2") and hasattr(module, "to_v") and getattr(module, "is_cross_attention", False)
    }


def from_input_to_output(names: Iterable[str]) -> list[str]:
    """Names of a UNet's layers in the order in which they run."""

    def place(name: str) -> tuple:
        return ("down", "mid", "up").index(name.split("_")[0]), *map(int, re.findall(r"\d+", name))

    return sorted(names, key=place)


def _value_projection(layer: nn.Module) -> nn.Module:
    """The plain projection, below any LoRA: a hook on it stays when a LoRA comes or goes."""
    projection = layer.to_v
    while hasattr(projection, "base_layer"):
        projection = projection.base_layer
    return projection


def _sizes(layer: nn.Module) -> tuple[int, int]:
    projection = _value_projection(layer)
    return projection.in_features, projection.out_features


@torch.no_grad()
def embed_labels(tokenizer: Any, encoder: nn.Module, texts: Sequence[str]) -> torch.Tensor:
    """State `[n, d]` of a frozen text encoder at the end token of each text, after its last norm.

    Args:
        tokenizer: With an end-of-text token.
        encoder: CLIP or T5 encoder of transformers.
        texts: Any strings; longer ones are cut at the tokenizer's length.
    """
    length = min(tokenizer.model_max_length, 512)
    ids = tokenizer(list(texts), padding="max_length", max_length=length, truncation=True, return_tensors="pt")
    ids = ids.input_ids.to(encoder.device)
    end = (ids == tokenizer.eos_token_id).int().argmax(1)
    return encoder(ids).last_hidden_state[torch.arange(len(ids), device=ids.device), end]


def label_embeddings(pipe: Any, labels: Iterable[Sequence[str]]) -> torch.Tensor:
    """AesEmb `[2 K + 1, d]` of pairs of labels: the vectors of all text encoders of a pipeline, side by side."""
    texts = [text for pair in labels for text in pair] + [""]
    pairs = [(getattr(pipe, f"tokenizer{n}", None), getattr(pipe, f"text_encoder{n}", None)) for n in ("", "_2")]
    return torch.cat([embed_labels(*pair, texts).float().cpu() for pair in pairs if None not in pair], -1)


def _prompt_tokens(pipe: Any) -> int:
    parameter = inspect.signature(type(pipe).__call__).parameters.get("max_sequence_length")
    return pipe.tokenizer.model_max_length if parameter is None else parameter.default


@register(
    MethodRecord(
        slug="vmix",
        family="adapters",
        kind="adapter",
        title="VMix: Improving Text-to-Image Diffusion Model with Cross-Attention Mixing Control",
        arxiv="2412.20800",
        summary="Sliders for the look of pictures (light, colour, composition) that leave their content alone",
        targets=("unet", "dit"),
        predictions=("epsilon", "v_prediction", "sample", "flow_prediction"),
        nodes=("DXVMixLoader", "DXVMixApply"),
        claim=Claim(
            text="Better aesthetics than the methods compared with, with text alignment kept",
            setting="FID, CLIP score and aesthetic score on MJHQ-30K and LAION-HQ10K",
        ),
    )
)
class VMixAdapter(Adapter):
    """Changes the look of a text-to-image model's pictures with one slider per pair of labels, at next to no cost.

    The prompt says what is in the picture; labels such as "vivid colours" and "dull colours" say how it looks. Every
    text cross-attention layer gets a second value, computed from the labels: `out = W_o A (v_t + scale * v_a)`. The
    attention map A comes from the prompt alone, so layout and content stay. The values do not change over a run and
    are computed once. Paper: https://arxiv.org/abs/2412.20800

    Use `for_model` for a fresh adapter, `from_pretrained` for a trained one, then `attach`.

    Args:
        text_embed_dim: D, width of the text states that cross-attention reads.
        num_text_tokens: L, tokens of a prompt; prompts of several times this length repeat the values.
        clip_dim: Width of the label vectors.
        labels: K pairs (positive, negative).
        layer_dims: Name of a cross-attention layer -> width of its values.
        value_rank: Two value layers of this rank per attention layer instead of one; None for one.
        base_model_type: Class of the model it was made for, for people.

    Raises:
        ValueError: Labels that repeat or are no pairs; on `attach`, layers of other names or sizes, fused projections,
            or a model without cross-attention to text.

    Example:
        >>> from diffusers_ext import VMixAdapter, zoo
        >>> pipe = zoo.load("shapes-unet")
        >>> adapter = VMixAdapter.from_pretrained(zoo.adapter_file("vmix-shapes-unet"))
        >>> with adapter.attach(pipe, scale=1.0):
        ...     adapter.set_labels({"warm light": 1.0, "grey colours": 0.5})
        ...     image = pipe("a red circle", num_inference_steps=2).images[0]

    Limits:
        Not for models that attend to text and picture together (Flux, SD3). Guidance amplifies the look, as it does
        the prompt: lower the scale if it is too much.
    """

    @register_to_config
    def __init__(
        self,
        text_embed_dim: int,
        num_text_tokens: int,
        clip_dim: int,
        labels: Sequence[Sequence[str]],
        layer_dims: Mapping[str, int],
        value_rank: int | None = None,
        base_model_type: str | None = None,
    ):
        super().__init__()
        _require_labels(labels)
        self.register_buffer("aes_emb", torch.zeros(2 * len(labels) + 1, clip_dim))
        self.proj = AestheticProjection(len(labels), clip_dim, num_text_tokens, text_embed_dim)
        self.value_layers = nn.Module()
        for name, inner in layer_dims.items():
            _hang(self.value_layers, name, value_layer(text_embed_dim, inner, value_rank))
        self._strengths = (1.0,) * len(labels)
        self._uncond_mode, self._range = "none", (0.0, 1.0)
        self._condition: torch.Tensor | None = None
        self._key: tuple | None = None
        self._table: dict[str, torch.Tensor] = {}
        self._active = False

    @classmethod
    def for_model(
        cls,
        target: Any,
        labels: Sequence[Sequence[str]] = LABELS,
        value_rank: int | None = None,
        num_text_tokens: int | None = None,
        aes_emb: torch.Tensor | None = None,
    ) -> VMixAdapter:
        """A fresh adapter, which changes nothing until it is trained.

        Args:
            target: Pipeline with a text encoder, or a model; a model needs the last two arguments.
            labels: Pairs (positive, negative).
            value_rank: See the class; 64 suits SDXL, whose full layers would have 170 million parameters.
            num_text_tokens: Default: what the pipeline's tokenizer makes of a prompt.
            aes_emb: Label vectors `[2 K + 1, d]`, see `label_embeddings`. Default: from the pipeline's text encoders.
        """
        layers = _layers_of(target)
        if aes_emb is None or num_text_tokens is None:
            if getattr(target, "text_encoder", None) is None:
                raise ValueError(
                    f"{type(target).__name__} has no text encoder to embed the labels with: give the pipeline, or "
                    "aes_emb (see label_embeddings) and num_text_tokens"
                )
            aes_emb = label_embeddings(target, labels) if aes_emb is None else aes_emb
            num_text_tokens = num_text_tokens or _prompt_tokens(target)
        widths = {name: _sizes(layer) for name, layer in layers.items()}
        adapter = cls(
            text_embed_dim=next(iter(widths.values()))[0],
            num_text_tokens=num_text_tokens,
            clip_dim=aes_emb.shape[-1],
            labels=[list(pair) for pair in labels],
            layer_dims={name: inner for name, (_, inner) in widths.items()},
            value_rank=value_rank,
            base_model_type=type(denoiser_of(target)).__name__,
        )
        adapter.aes_emb.copy_(aes_emb)
        return adapter

    @property
    def strengths(self) -> dict[str, float]:
        """Strength per pair, under the name of its positive label."""
        return {pair[0]: s for pair, s in zip(self.config.labels, self._strengths)}

    def set_labels(self, labels: Mapping[str, float] | Sequence[str] | None = None) -> None:
        """Choose the look, also between two steps of a run.

        Args:
            labels: Label -> strength in [-1, 1], or just labels; pairs that are not named are left open. A negative
                strength asks for the other label of the pair. None: all positive labels, as in the paper.

        Raises:
            ValueError: Unknown label, both labels of a pair, or a strength out of range.
        """
        if labels is None:
            self._strengths = (1.0,) * len(self.config.labels)
            return
        given = dict(labels) if isinstance(labels, Mapping) else dict.fromkeys(_sequence(labels), 1.0)
        chosen: dict[int, float] = {}
        places = {label: (k, sign) for k, pair in enumerate(self.config.labels) for label, sign in zip(pair, (1, -1))}
        for label, strength in given.items():
            if label not in places:
                raise ValueError(unknown("label", label, places))
            if not -1 <= strength <= 1:
                raise ValueError(f"strength of {label!r} is {strength}; accepted: -1 to 1")
            pair, sign = places[label]
            if pair in chosen:
                raise ValueError(
                    f"{' and '.join(map(repr, self.config.labels[pair]))} are opposites: give one of them"
                )
            chosen[pair] = float(sign * strength)
        self._strengths = tuple(chosen.get(k, 0.0) for k in range(len(self.config.labels)))

    def set_uncond_mode(self, mode: str) -> None:
        """What the unconditional half of guidance gets: `"none"`, the plain model, or `"null"`, open labels."""
        if mode not in UNCOND_MODES:
            raise ValueError(unknown("uncond mode", mode, UNCOND_MODES))
        self._uncond_mode = mode

    def set_range(self, start: float = 0.0, end: float = 1.0) -> None:
        """Work only on a part of the steps, `0 <= start < end <= 1`."""
        require_range(start, end)
        self._range = (float(start), float(end))

    def set_condition(self, y_aes: torch.Tensor | None) -> None:
        """Use label vectors of your own, one set per row of the batch, with gradients: for training.

        Args:
            y_aes: `[batch, K, clip_dim]`, see `aesthetic_rows`; None goes back to the chosen labels.
        """
        shape = (len(self.config.labels), self.config.clip_dim)
        if y_aes is not None and tuple(y_aes.shape[1:]) != shape:
            raise ValueError(f"y_aes has shape {tuple(y_aes.shape)}; accepted: [batch, {shape[0]}, {shape[1]}]")
        self._condition = y_aes

    def values(self, y_aes: torch.Tensor) -> dict[str, torch.Tensor]:
        """v_a `[n, L, inner]` of every layer, by name, for label vectors `[n, K, clip_dim]`."""
        f_a = self.proj(y_aes)
        return {name: self.value_layers.get_submodule(name)(f_a) for name in self.config.layer_dims}

    @torch.no_grad()
    def chosen_values(self, uncond_mode: str = "none") -> dict[str, torch.Tensor]:
        """v_a `[2, L, inner]` of every layer: for the unconditional rows, and of the chosen labels for the others."""
        chosen = torch.tensor([(0.0,) * len(self._strengths), self._strengths]).to(self.aes_emb)
        values = self.values(aesthetic_rows(self.aes_emb, chosen))
        if uncond_mode == "none":
            values = {name: torch.stack([torch.zeros_like(v[1]), v[1]]) for name, v in values.items()}
        return values

    def check(self, target: Any) -> None:
        layers, wanted = _layers_of(target), self.config.layer_dims
        if layers.keys() != wanted.keys():
            other = sorted(layers.keys() ^ wanted.keys())[0]
            where = "the model has" if other in layers else "the adapter expects"
            model = type(denoiser_of(target)).__name__
            raise ValueError(
                f"this adapter is for another model: it has {len(wanted)} layers and {model} {len(layers)}; only "
                f"{where} {other}"
            )
        for name, layer in layers.items():
            sizes, mine = _sizes(layer), (self.config.text_embed_dim, wanted[name])
            if sizes != mine:
                raise ValueError(
                    f"layer {name} projects text of width {sizes[0]} to values of width {sizes[1]}; this adapter is "
                    f"for {mine[0]} and {mine[1]}: take the adapter that was trained for this kind of model"
                )

    def install(self, target: Any, undo: ExitStack) -> None:
        for name, layer in _layers_of(target).items():
            undo.callback(_value_projection(layer).register_forward_hook(partial(self._mix, name)).remove)
        undo.callback(self._forget)

    def begin_call(self, target: Any, arguments: Mapping[str, Any]) -> None:
        self._active = self._scale != 0 and within(target, arguments["timestep"], *self._range)
        if not self._active:
            return
        text = tensors_in(arguments["encoder_hidden_states"])[0]
        repeats, rest = divmod(text.shape[1], self.config.num_text_tokens)
        if rest:
            raise ValueError(
                f"the prompt has {text.shape[1]} tokens; this adapter is for multiples of "
                f"{self.config.num_text_tokens}: pad the prompt"
            )
        if self._condition is None:
            self._compute(conditional_rows(len(text)), len(text), repeats)
        else:
            values, self._key = self.values(self._condition), None
            self._table = {name: self._scale * v.repeat(1, repeats, 1) for name, v in values.items()}

    def _compute(self, rows: slice, batch: int, repeats: int) -> None:
        """Fill the table of what is added to the values of a batch, if anything that it depends on has changed."""
        weights = tuple((p.data_ptr(), 0 if p.is_inference() else p._version) for p in self.parameters())
        layout = (rows.start, batch, repeats, self.dtype, self.device)
        key = (self._scale, self._strengths, self._uncond_mode, layout, weights)
        if key == self._key:
            return
        kinds = torch.zeros(batch, dtype=torch.long, device=self.device)
        kinds[rows] = 1
        values = self.chosen_values(self._uncond_mode)
        self._table = {name: self._scale * v.repeat(1, repeats, 1)[kinds] for name, v in values.items()}
        self._key = key

    def _mix(self, name: str, _: nn.Module, __: tuple, value: torch.Tensor) -> torch.Tensor | None:
        """Hook on a value projection: v_t + scale * v_a."""
        if not self._active:
            return None
        added = self._table[name]
        if len(value) != len(added):  # caches may compute several copies of the batch at once
            added = added.repeat(len(value) // len(added), 1, 1)
        return value + added.to(value.dtype)

    def _forget(self) -> None:
        self._table, self._key, self._active = {}, None, False


def _sequence(labels: Any) -> Sequence[str]:
    if isinstance(labels, str):
        raise TypeError(f"labels is the string {labels!r}; pass a list of labels or a dict of strengths")
    return labels


def _require_labels(labels: Sequence[Sequence[str]]) -> None:
    flat = [label for pair in labels for label in pair]
    if not labels or any(isinstance(pair, str) or len(pair) != 2 for pair in labels) or len(set(flat)) != len(flat):
        raise ValueError(f"labels are {labels!r}; accepted: pairs (positive, negative) of different strings")


def _layers_of(target: Any) -> dict[str, nn.Module]:
    model = denoiser_of(target)
    layers = cross_attention(model)
    if not layers:
        raise ValueError(
            f"{type(model).__name__} has no separate cross-attention to text, so no values to mix; supported: UNets "
            "of Stable Diffusion 1, 2 and XL, PixArt and other models with attn2 layers"
        )
    fused = [name for name, layer in layers.items() if getattr(layer, "fused_projections", False)]
    if fused:
        raise ValueError(f"the projections of {fused[0]} are fused: call unfuse_qkv_projections() first")
    return layers
