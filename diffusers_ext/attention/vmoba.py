"""VMoBA: video attention over a choice of key blocks that the data makes, in blocks whose shape changes by layer.

"VMoBA: Mixture-of-Block Attention for Video Diffusion Models", 2025, https://arxiv.org/abs/2506.23858
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import FluxTransformer2DModel, SD3Transformer2DModel, WanTransformer3DModel
from diffusers.hooks import ModelHook
from torch.overrides import TorchFunctionMode

from .._fields import require_types
from ..apply import Attachment, MethodConfig, denoiser_of
from ..caching._common import (
    PREFIX,
    RunHook,
    RunTracker,
    install,
    is_innermost,
    macs_on_meta,
    macs_or_warning,
    outlines,
    steps_of,
)
from ..registry import Claim, MethodRecord, register
from .vmoba_blocks import FALLBACKS, MODES, SCOPES, Cost, Grid, Partition, Rule, partitions, sparse_attention


__all__ = ["VMoBAConfig"]

_HOOK = PREFIX + "vmoba"


@dataclass(frozen=True)
class Layout:
    """Where a transformer's self-attention is, what its tokens are, and where text goes."""

    blocks: tuple[str, ...]
    attention: tuple[str, ...]
    grid: Callable[[torch.nn.Module, Mapping[str, Any]], Grid]
    image_first: bool = True

    def layers(self, model: torch.nn.Module) -> list[torch.nn.Module]:
        """In running order."""
        blocks = (getattr(b, "_orig_mod", b) for name in self.blocks for b in getattr(model, name))
        return [getattr(b, name) for b in blocks for name in self.attention if getattr(b, name, None) is not None]


def _video_grid(model: torch.nn.Module, arguments: Mapping[str, Any]) -> Grid:
    size = arguments["hidden_states"].shape[-3:]
    return tuple(length // patch for length, patch in zip(size, model.config.patch_size))


def _picture_grid(model: torch.nn.Module, arguments: Mapping[str, Any]) -> Grid:
    height, width = arguments["hidden_states"].shape[-2:]
    return 1, height // model.config.patch_size, width // model.config.patch_size


def _packed_grid(model: torch.nn.Module, arguments: Mapping[str, Any]) -> Grid:
    """Flux gets packed tokens; their positions tell the size."""
    tokens, ids = arguments["hidden_states"].shape[1], arguments["img_ids"]
    ids = ids[0] if ids.ndim == 3 else ids
    height, width = (len(ids[:, axis].unique()) for axis in (1, 2))
    if height * width != tokens:
        raise ValueError(
            f"VMoBA needs the tokens of one picture, line by line: {tokens} tokens are not {height} x {width} "
            "(reference pictures are not supported)"
        )
    return 1, height, width


LAYOUTS = {
    WanTransformer3DModel: Layout(("blocks",), ("attn1",), _video_grid),
    SD3Transformer2DModel: Layout(("transformer_blocks",), ("attn", "attn2"), _picture_grid),
    FluxTransformer2DModel: Layout(
        ("transformer_blocks", "single_transformer_blocks"), ("attn",), _packed_grid, image_first=False
    ),
}


def layout_of(model: torch.nn.Module) -> Layout:
    """The layout of a supported transformer. Others raise `ValueError`."""
    for kind, layout in LAYOUTS.items():
        if isinstance(model, kind):
            return layout
    known = ", ".join(kind.__name__ for kind in LAYOUTS)
    raise ValueError(f"VMoBA does not know the token grid of {type(model).__name__}; it works on {known}")


class _Replaced(TorchFunctionMode):
    """Replaces the first softmax attention computed inside."""

    def __init__(self, function: Callable[..., torch.Tensor]):
        super().__init__()
        self.function, self.done, self.ran = function, False, False

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.ran = self.ran or func is F.linear
        if func is not F.scaled_dot_product_attention or self.done:
            return func(*args, **(kwargs or {}))
        self.done = True
        return self.function(*args, **(kwargs or {}))


@dataclass
class _Shared:
    """Read by the layer hooks, written by the root hook; `cuts` is None where attention stays full."""

    rule: Rule
    image_first: bool
    cuts: tuple[Partition, ...] | None = None
    costs: dict[int, list[Cost]] = field(default_factory=dict)


class _LayerHook(ModelHook):
    """On a self-attention layer."""

    outermost = True  # others may change queries and keys before blocks are chosen

    def __init__(self, shared: _Shared, index: int):
        super().__init__()
        self.shared, self.index = shared, index

    def new_forward(self, module: torch.nn.Module, *args, **kwargs):
        if self.shared.cuts is None:
            return self.fn_ref.original_forward(*args, **kwargs)
        return self._sparse(module, args, kwargs)

    # What is computed depends on the data: this layer stays outside of compiled graphs.
    @torch.compiler.disable
    def _sparse(self, module: torch.nn.Module, args: tuple, kwargs: dict) -> Any:
        with _Replaced(self._attention) as mode:
            output = self.fn_ref.original_forward(*args, **kwargs)
        if not mode.done and (mode.ran or is_innermost(module, self)):  # a cache may stand in for the layer
            raise RuntimeError(
                f"the attention of {type(module).__name__} does not run through torch's scaled_dot_product_attention: "
                "VMoBA works with the native attention backend, call set_attention_backend('native')"
            )
        return output

    def _attention(self, query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, **kwargs):
        if attn_mask is not None or is_causal:
            raise ValueError(
                "VMoBA does not work with attention masks: every token must be free to attend to any other"
            )
        shared = self.shared
        cut = shared.cuts[self.index % len(shared.cuts)]
        output, cost = sparse_attention(query, key, value, cut, shared.rule, shared.image_first, scale)
        shared.costs.setdefault(self.index, []).append(cost)
        return output


class _RootHook(RunHook[dict]):
    """On the transformer: reads the size of the video, and leaves the first steps alone."""

    def __init__(self, config: VMoBAConfig, target: Any, shared: _Shared, layout: Layout):
        super().__init__(RunTracker(dict))
        self.config, self.target, self.shared, self.layout = config, target, shared, layout
        self.model = denoiser_of(target)
        self.full_steps = 0
        self.calls = {"full": 0, "sparse": 0}
        self.grid: Grid | None = None
        self.cuts: tuple[Partition, ...] = ()
        self.arguments: tuple[tuple, dict] | None = None

    def begin_run(self, args: tuple, kwargs: dict) -> None:
        self.full_steps = self.config.full_steps(steps_of(self.target))
        self.calls = {"full": 0, "sparse": 0}
        self.shared.costs.clear()
        self.arguments = outlines((args, kwargs))

    @torch.compiler.disable
    def _begin(self, args: tuple, kwargs: dict) -> None:
        super()._begin(args, kwargs)
        if self.tracker.run_step < self.full_steps:
            return
        grid = self.layout.grid(self.model, self._signature.bind(*args, **kwargs).arguments)
        if grid != self.grid:
            self.cuts, self.grid = self.config.partitions(grid), grid
        self.shared.cuts = self.cuts

    def end_call(self) -> None:
        self.calls["full" if self.shared.cuts is None else "sparse"] += 1

    def release(self) -> None:
        self.shared.cuts = None

    def macs(self, model: torch.nn.Module) -> dict[str, int]:
        """MACs of a call with full attention, on the meta device."""
        with self.aside():
            return {"full": macs_on_meta(model, self.arguments)}


@register(
    MethodRecord(
        slug="vmoba",
        family="attention",
        kind="attention",
        title="VMoBA: Mixture-of-Block Attention for Video Diffusion Models",
        arxiv="2506.23858",
        summary="Every query attends to the key blocks it looks for most; blocks are slabs, columns and cubes in turn",
        targets=("video", "mmdit"),
        predictions=("epsilon", "v_prediction", "sample", "flow_prediction"),
        nodes=("DXVMoBAAttention",),
        claim=Claim(
            text="Training-free at high resolution: 2.40 times fewer operations, 1.35 times faster",
            setting="55 thousand tokens, GPU",
            value=1.35,
            unit="times faster",
        ),
        conflicts=("ras",),
    )
)
@dataclass(frozen=True)
class VMoBAConfig(MethodConfig):
    """Makes the self-attention of video transformers sparse, without training.

    Layers cut the video in turn into slabs of time, columns through all frames, and cubes. Every query attends to its
    own block and to those whose mean key it matches best; queries that concentrate keep few blocks, others many.
    Attention over the chosen blocks is exact. Works on Wan, and on Stable Diffusion 3 and Flux for large pictures,
    which count as videos of one frame. Paper: https://arxiv.org/abs/2506.23858

    Args:
        threshold: Share of all similarity that the chosen blocks hold, above 0; 1 is full attention. Default 0.25.
        blocks: Blocks that a layer cuts the video into, as nearly as its size allows, from 1. Default 16.
        block_1d: Frames of a slab instead, maybe a fraction.
        block_2d: Height and width of a column in tokens instead.
        block_3d: Frames, height and width of a cube in tokens instead.
        threshold_type: What competes for the threshold: `"query_head"`, the blocks of each query alone (the published
            code's default), `"head_global"`, all queries of a head (the paper's), or `"overall"`, all heads too.
        select_mode: `"threshold"`, or `"topk"` for a fixed number of blocks.
        topk: With `"topk"`: blocks per query on average, its own included.
        full_attention_first_steps: Share of the run's first steps that keep full attention, 0 to 1. Default 0.2.
        full_attention_first_layers: First layers that do.
        fallback: `"self"`, or `"full"`: what to do where only own blocks are chosen.
        num_inference_steps: Steps of the run; read from the scheduler when applied to a pipeline.

    Raises:
        ValueError: Values out of range; blocks that do not divide the video; on `apply`, an unsupported model.

    Example:
        >>> import diffusers_ext
        >>> from diffusers_ext import VMoBAConfig, zoo
        >>> pipe = zoo.load("shapes-dit")
        >>> with diffusers_ext.apply(pipe, VMoBAConfig(threshold=0.5)) as handle:
        ...     images = zoo.generate(pipe, ["a red circle"], num_inference_steps=5, height=128, width=128)
        ...     handle.summary()["vmoba"]["sparse"]  # calls, with guidance
        8

    Limits:
        The choice is made by plain torch operations: products are saved, but on GPUs the many small ones may cost
        more than a fused full attention. No masks. Reference pictures (Flux Kontext) are refused.
    """

    threshold: float = 0.25
    blocks: int = 16
    block_1d: float | None = None
    block_2d: tuple[int, int] | None = None
    block_3d: tuple[int, int, int] | None = None
    threshold_type: str = "query_head"
    select_mode: str = "threshold"
    topk: int = 4
    full_attention_first_steps: float = 0.2
    full_attention_first_layers: int = 0
    fallback: str = "self"
    num_inference_steps: int | None = None

    def __post_init__(self) -> None:
        require_types(self)
        for name, length in (("block_2d", 2), ("block_3d", 3)):
            value = getattr(self, name)
            if value is not None:
                if min(value) < 1:
                    raise ValueError(f"{name} is {value!r}; accepted: {length} whole numbers from 1, or None")
                object.__setattr__(self, name, tuple(value))
        rules = (
            ("threshold", 0 < self.threshold <= 1, "above 0, up to 1 (full attention)"),
            ("blocks", self.blocks >= 1, "whole numbers from 1"),
            ("block_1d", self.block_1d is None or self.block_1d > 0, "numbers above 0, or None"),
            ("threshold_type", self.threshold_type in SCOPES, tuple(SCOPES)),
            ("select_mode", self.select_mode in MODES, MODES),
            ("topk", self.topk >= 1, "whole numbers from 1"),
            ("full_attention_first_steps", 0 <= self.full_attention_first_steps <= 1, "a share, 0 to 1"),
            ("full_attention_first_layers", self.full_attention_first_layers >= 0, "whole numbers from 0"),
            ("fallback", self.fallback in FALLBACKS, FALLBACKS),
        )
        for name, right, accepted in rules:
            if not right:
                raise ValueError(f"{name} is {getattr(self, name)!r}; accepted: {accepted}")

    @property
    def rule(self) -> Rule:
        """How blocks are chosen."""
        return Rule(self.select_mode, self.threshold, self.threshold_type, self.topk, self.fallback)

    def partitions(self, grid: Grid) -> tuple[Partition, ...]:
        """The cuts of a video of t x h x w tokens that layers use in turn."""
        return partitions(grid, self.blocks, self.block_1d, self.block_2d, self.block_3d)

    def full_steps(self, steps: int | None) -> int:
        """First steps with full attention, in a run of `steps` steps."""
        steps = self.num_inference_steps or steps
        if steps is None and self.full_attention_first_steps:
            raise ValueError(
                "VMoBA keeps a share of the first steps full and must know how many there are: apply it to the "
                "pipeline, give num_inference_steps, or set full_attention_first_steps=0"
            )
        return round(self.full_attention_first_steps * (steps or 0))

    def check(self, target: Any, num_inference_steps: int | None = None) -> tuple[str, ...]:
        model = denoiser_of(target)
        layers = layout_of(model).layers(model)
        if self.full_attention_first_layers >= len(layers):
            given = self.full_attention_first_layers
            raise ValueError(f"full_attention_first_layers is {given}; accepted: fewer than its {len(layers)} layers")
        steps = num_inference_steps or steps_of(target)
        if self.full_steps(steps) >= (steps or math.inf):
            return (f"vmoba: all {steps} steps keep full attention; lower full_attention_first_steps",)
        return ()

    def attach(self, target: Any) -> Attachment:
        model = denoiser_of(target)
        layout = layout_of(model)
        shared = _Shared(self.rule, layout.image_first)
        root = _RootHook(self, target, shared, layout)

        def hooks() -> Iterator[tuple[torch.nn.Module, ModelHook]]:
            yield model, root
            for index, layer in list(enumerate(layout.layers(model)))[self.full_attention_first_layers :]:
                yield layer, _LayerHook(shared, index)

        return Attachment(install(model, hooks(), _HOOK), lambda: _summary(root, model))


def _summary(root: _RootHook, model: torch.nn.Module) -> dict[str, Any]:
    """Figures of the last run: calls, share of blocks that each layer kept, operations saved."""
    costs = root.shared.costs
    figures: dict[str, Any] = dict(root.calls)
    figures["kept"] = {layer: sum(c.kept for c in own) / len(own) for layer, own in costs.items()}
    calls = sum(root.calls.values())
    if calls and (macs := macs_or_warning(root.macs, model)):
        saved = sum(cost.full_macs - cost.macs for own in costs.values() for cost in own)
        figures["macs_full_call"] = macs["full"]
        figures["macs_saved"] = saved / (macs["full"] * calls)
    return figures
