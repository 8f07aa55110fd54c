"""VMoBA as a MODEL patch: queries attend to the blocks of keys they look for most."""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass, field
from typing import Any

import torch
from comfy.ldm.flux.model import Flux
from comfy.ldm.modules.diffusionmodules.mmdit import MMDiT
from comfy.ldm.wan.model import WanModel
from comfy.patcher_extension import WrappersMP
from comfy_api.latest import io

from ._runs import run_options


KEY = "diffusers_ext.vmoba"
OVERRIDE = "optimized_attention_override"
logger = logging.getLogger(__name__)


def patch_sizes(transformer: torch.nn.Module) -> tuple[int, int, int]:
    """Frames, height and width of a token of a supported transformer. Others raise `ValueError`."""
    if type(transformer) is WanModel:
        return tuple(transformer.patch_size)
    if isinstance(transformer, Flux):
        return 1, transformer.patch_size, transformer.patch_size
    if isinstance(transformer, MMDiT):
        return 1, *transformer.x_embedder.patch_size
    raise ValueError(
        f"VMoBA works here on Wan (text or image to video), Flux and Stable Diffusion 3; this model is a "
        f"{type(transformer).__name__}"
    )


@dataclass
class Run:
    """What one sampling run has done."""

    full: int = 0
    sparse: int = 0
    kept: list[float] = field(default_factory=list)

    def __str__(self) -> str:
        share = f"{sum(self.kept) / len(self.kept):.0%}" if self.kept else "none"
        return f"{self.full} model calls with full attention, {self.sparse} sparse ones, {share} of the blocks kept"


@dataclass
class VMoBA:
    """The wrappers of one patched MODEL.

    Args:
        config: `VMoBAConfig`.
        patch: See `patch_sizes`.
        is_video: Whether the transformer is Wan, whose blocks have cross-attention too and no text in self-attention.
    """

    config: Any
    patch: tuple[int, int, int]
    is_video: bool

    def sample(self, executor, *args, **kwargs):
        """OUTER_SAMPLE: counts a run."""
        run = Run()
        try:
            with run_options(executor.class_obj, KEY, run):
                return executor(*args, **kwargs)
        finally:
            logger.info("VMoBA: %s", run)

    def forward(self, executor, x, t, c_concat=None, context=None, control=None, transformer_options=None, **kwargs):
        """APPLY_MODEL: sparse attention after the first steps."""
        options = transformer_options or {}
        run: Run | None = options.get(KEY)
        if run is not None:
            is_full = self._step(options) < self.config.full_steps(len(options["sample_sigmas"]) - 1)
            run.full += is_full
            run.sparse += not is_full
            if not is_full:
                options = {**options, OVERRIDE: SparseAttention(self, x.shape, run)}
        return executor(x, t, c_concat, context, control, options, **kwargs)

    @staticmethod
    def _step(options: dict) -> int:
        """Noise levels of the run above the one of this call."""
        sigma = float(options["sigmas"].max())
        return int((options["sample_sigmas"] > sigma * (1 + 1e-4)).sum())


class SparseAttention:
    """ComfyUI's attention override during one call of a model."""

    def __init__(self, method: VMoBA, shape: torch.Size, run: Run):
        size = (1, *shape[-2:]) if len(shape) == 4 else shape[-3:]
        self.grid = tuple(-(-length // patch) for length, patch in zip(size, method.patch))
        self.config, self.run, self.is_video = method.config, run, method.is_video
        self.cuts = method.config.partitions(self.grid)
        self.layer, self.block = -1, None

    def __call__(self, function, q, k, v, *args, **kwargs):
        options = kwargs.get("transformer_options", {})
        if self.is_video and options.get("block_index") == self.block:  # cross-attention follows in the same block
            return function(q, k, v, *args, **kwargs)
        self.block, self.layer = options.get("block_index"), self.layer + 1
        if self.layer < self.config.full_attention_first_layers:
            return function(q, k, v, *args, **kwargs)
        self._require(k.shape[-2], options, kwargs.get("mask"))
        return self._attention(q, k, v, kwargs["heads"] if "heads" in kwargs else args[0], kwargs)

    def _require(self, tokens: int, options: dict, mask: torch.Tensor | None) -> None:
        image = math.prod(self.grid)
        if tokens < image or (self.is_video and tokens != image) or options.get("reference_image_num_tokens"):
            raise ValueError(f"VMoBA met {tokens} tokens for a grid of {self.grid}: it does not work with references")
        if mask is not None:
            raise ValueError("VMoBA does not work with attention masks: take it or the mask off this model")

    def _attention(self, q, k, v, heads: int, kwargs: dict) -> torch.Tensor:
        from diffusers_ext.attention.vmoba_blocks import sparse_attention

        if not kwargs.get("skip_reshape"):
            # Stable Diffusion 3 keeps the heads of the values apart, and only theirs.
            q, k, v = (x.flatten(2).unflatten(2, (heads, -1)).transpose(1, 2) for x in (q, k, v))
        cut = self.cuts[self.layer % len(self.cuts)]
        out, cost = sparse_attention(q, k, v, cut, self.config.rule, self.is_video, kwargs.get("scale"))
        self.run.kept.append(cost.kept)
        return out if kwargs.get("skip_output_reshape") else out.transpose(1, 2).flatten(2)


class DXVMoBAAttention(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="DXVMoBAAttention",
            display_name="VMoBA Sparse Attention (Wan, Flux, SD3)",
            category="diffusers-ext/attention",
            description="Every query attends to its own block and to the blocks of the video it looks for most: "
            "slabs, columns and cubes in turn from layer to layer. Saves work on long videos and large pictures.",
            search_aliases=[
                "vmoba",
                "mixture of block attention",
                "sparse attention",
                "wan",
                "video",
                "diffusers-ext",
            ],
            inputs=[
                io.Model.Input("model", tooltip="A Wan, Flux or Stable Diffusion 3 model."),
                io.Float.Input(
                    "threshold",
                    default=0.25,
                    min=0.01,
                    max=1.0,
                    step=0.01,
                    tooltip="Share of all similarity that the chosen blocks hold. 1 is full attention.",
                ),
                io.Int.Input(
                    "blocks",
                    default=16,
                    min=1,
                    max=4096,
                    tooltip="Blocks a layer cuts the video into, as nearly as its size allows.",
                ),
                io.Float.Input(
                    "start_percent",
                    default=0.2,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="Share of the first steps that keep full attention.",
                ),
                io.Combo.Input(
                    "compete",
                    options=["query_head", "head_global", "overall"],
                    tooltip="What competes for the threshold: the blocks of each query, of all queries of a head (as "
                    "in the paper), or of all heads.",
                ),
            ],
            outputs=[io.Model.Output(tooltip="The model with sparse attention. Works with every sampler node.")],
        )

    @classmethod
    def execute(cls, model, threshold, blocks, start_percent, compete) -> io.NodeOutput:
        from diffusers_ext.attention.vmoba import VMoBAConfig

        transformer = model.model.diffusion_model
        patch = patch_sizes(transformer)
        config = VMoBAConfig(threshold, blocks, threshold_type=compete, full_attention_first_steps=start_percent)
        method, patched = VMoBA(config, patch, type(transformer) is WanModel), model.clone()
        wrappers = ((WrappersMP.OUTER_SAMPLE, method.sample), (WrappersMP.APPLY_MODEL, method.forward))
        for kind, wrapper in wrappers:
            patched.remove_wrappers_with_key(kind, KEY)
            patched.add_wrapper_with_key(kind, KEY, wrapper)
        return io.NodeOutput(patched)


NODES = [DXVMoBAAttention]
