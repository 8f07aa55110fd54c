"""DeepCache: run only the shallow part of a UNet on most steps.

Ma, Fang, Wang, "DeepCache: Accelerating Diffusion Models for Free", CVPR 2024, https://arxiv.org/abs/2312.00858
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.models.unets import unet_2d_blocks

from .._fields import require_types
from ..apply import Attachment, MethodConfig, denoiser_of
from ..registry import Claim, MethodRecord, register
from ._common import PREFIX, map_tensors, outlines, refuse_fused_qkv, refuse_other_caches, tensors_in
from ._forecast import require_order
from ._inherit import InheritHook, InheritRoot, Shared, inherit


__all__ = ["DeepCacheConfig"]

_HOOK = PREFIX + "deepcache"
# Lists of a block in the order in which a layer runs through them.
_LAYER_LISTS = ("resnets", "temp_convs", "attentions", "temp_attentions", "motion_modules")
_SAMPLER_LISTS = ("downsamplers", "upsamplers")
# Blocks that carry a second main-path tensor or join their skip only once: there is no single feature to store.
_OTHER_LAYOUTS = (
    unet_2d_blocks.KDownBlock2D,
    unet_2d_blocks.KCrossAttnDownBlock2D,
    unet_2d_blocks.SkipDownBlock2D,
    unet_2d_blocks.AttnSkipDownBlock2D,
)


def uniform_steps(total: int, interval: int) -> list[int]:
    """Full steps of the 1:N schedule, {i : i mod N = 0}."""
    return list(range(0, total, interval))


def quad_steps(total: int, interval: int, center: float, power: float) -> list[int]:
    """Full steps of the non-uniform 1:N schedule: dense around `center`, sparse away from it (section 3.4).

    n = ceil(T / N) + 1 knots are evenly spaced between (-c)^(1/p) and (T - c)^(1/p), taken to the power p, and shifted
    back by c. The root of -c is the principal complex one and real parts count. `power` is lowered in steps of 0.02
    until n distinct steps result.

    Raises:
        ValueError: No power above 1 gives enough distinct steps.
    """
    wanted, p = -(-total // interval), power
    while p > 1:
        low, high = complex(-center) ** (1 / p), complex(total - center) ** (1 / p)
        knots = (low + (high - low) * k / wanted for k in range(wanted + 1))
        inner = sorted({int((x**p).real) for x in knots})[1:-1]
        steps = [0] + [int(center + x) for x in inner]
        if len(set(steps)) == wanted:
            return steps
        p -= 0.02
    raise ValueError(
        f"pow={power} and center={center} give no schedule of {wanted} full steps out of {total}: "
        "move center toward the middle of the run, raise pow (above 1), or raise cache_interval"
    )


@dataclass(frozen=True)
class Branch:
    """The skip connection up to which the UNet still runs: layer `layer` of block `block` from the output side."""

    block: int
    layer: int


def branches(unet: torch.nn.Module) -> list[Branch]:
    """Every branch of a UNet, shallowest first; the index is the branch id (3 b + l for Stable Diffusion)."""
    return [Branch(b, l) for b, up in enumerate(reversed(unet.up_blocks)) for l in range(len(up.resnets))]


def _layers(block: torch.nn.Module) -> list[list[torch.nn.Module]]:
    """Modules of each layer of a block, in running order."""
    lists = [getattr(block, name) for name in _LAYER_LISTS if getattr(block, name, None) is not None]
    count = len(block.resnets)
    return [[items[j] for items in lists if j < len(items) and items[j] is not None] for j in range(count)]


def skipped_modules(unet: torch.nn.Module, branch: Branch) -> tuple[list[torch.nn.Module], torch.nn.Module]:
    """What does not run on a reused step, as whole blocks where possible, and which of them yields the stored feature.

    Returns:
        `(modules, source)`: `source` is the last of `modules` to run; its output is what enters the branch's layer.
    """
    ups = list(reversed(unet.up_blocks))
    down, up = unet.down_blocks[branch.block], ups[branch.block]
    skipped: list[torch.nn.Module] = []
    if branch.layer == 0:
        skipped.append(down)
    else:
        skipped += [m for layer in _layers(down)[branch.layer :] for m in layer]
        skipped += list(down.downsamplers or [])
    skipped += list(unet.down_blocks[branch.block + 1 :])
    if unet.mid_block is not None:
        skipped.append(unet.mid_block)
    skipped += list(reversed(ups[branch.block + 1 :]))
    first_live = len(up.resnets) - 1 - branch.layer
    skipped += [m for layer in _layers(up)[:first_live] for m in layer]
    return skipped, skipped[-1]


class _SkipHook(InheritHook):
    """On a module that is skipped: only the parent's shape arithmetic sees its output, so an empty one will do."""

    def keep(self, module: torch.nn.Module, output: Any, args: tuple, kwargs: dict) -> Any:
        return outlines(output), tensors_in(output)[0].device

    def replay(self, module: torch.nn.Module, kept: Any, args: tuple, kwargs: dict) -> Any:
        outline, device = kept
        return map_tensors(outline, lambda t: torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=device))


@register(
    MethodRecord(
        slug="deepcache",
        family="caching",
        kind="cache",
        title="DeepCache: Accelerating Diffusion Models for Free",
        arxiv="2312.00858",
        summary="Two to four times fewer operations with near-identical pictures, on any UNet with skip connections",
        targets=("unet",),
        predictions=("epsilon", "v_prediction", "sample", "flow_prediction"),
        nodes=("DXDeepCache",),
        claim=Claim(
            text="Stable Diffusion v1.5 2.3 times faster for 0.05 of CLIP score",
            setting="SD v1.5, 50 PLMS steps, N = 5, GPU",
            value=2.3,
            unit="times faster",
        ),
        conflicts=("a-sdm", "any-size-diffusion", "faster-diffusion", "hidiffusion"),
    )
)
@dataclass(frozen=True)
class DeepCacheConfig(MethodConfig):
    """Makes a UNet pipeline two to four times cheaper with near-identical pictures.

    On full steps the whole UNet runs and the feature that enters one layer of the up path is stored. On the steps in
    between only the layers outside of that one run, from the current latents, and the stored feature stands in for
    everything deeper. Works with Stable Diffusion 1, 2, XL, inpainting, ControlNet, Stable Video Diffusion and
    unconditional UNets. Paper: https://arxiv.org/abs/2312.00858

    Args:
        cache_interval: N: one full step, then N - 1 cheap ones. 1 changes nothing. Default 3.
        cache_branch_id: Skip connection up to which the UNet still runs; 0 is the cheapest, larger is slower and
            more faithful. Default 0.
        cache_block_id: With `cache_layer_id`, names the branch by block and layer from the output side instead.
        cache_layer_id: See `cache_block_id`.
        skip_mode: `"uniform"`, `"quad"` (full steps dense around step `center`), or the list of full steps, with 0.
        center: Step around which `"quad"` is dense. Default 15.
        pow: How strongly, above 1. Default 1.4.
        num_inference_steps: Steps of the run; `"quad"` needs it, later steps are computed in full.
        forecast_order: What stands in for the deeper layers: 0 (default), the stored feature as it is, as in the
            paper; 1 or 2, its forecast, the line or parabola through the last two or three stored ones. For samplers
            that add no noise, 1 stays much closer to the run without a cache at the same cost, but for memory.
            Fractions mix their neighbours: 0.5 is half of the trend.

    Raises:
        ValueError: Values out of range; on `apply`, a model without skip connections or such a branch.

    Example:
        >>> import diffusers_ext
        >>> from diffusers_ext import DeepCacheConfig, zoo
        >>> pipe = zoo.load("shapes-unet")
        >>> with diffusers_ext.apply(pipe, DeepCacheConfig(cache_interval=3)) as handle:
        ...     image = pipe("a red circle", num_inference_steps=12, height=64, width=64).images[0]
        ...     handle.summary()["deepcache"]["reused"]
        8

    Limits:
        Steps of samplers for few steps (LCM, turbo) differ too much to share features. Inversion, where timesteps
        increase, computes every step. `torch.compile(fullgraph=True)` is impossible: the decision is a graph break.
    """

    cache_interval: int = 3
    cache_branch_id: int = 0
    cache_block_id: int | None = None
    cache_layer_id: int | None = None
    skip_mode: str | Sequence[int] = "uniform"
    center: float = 15
    pow: float = 1.4
    num_inference_steps: int | None = None
    forecast_order: float = 0

    def __post_init__(self) -> None:
        require_types(self)
        require_order(self.forecast_order)
        if self.cache_interval < 1:
            raise ValueError(f"cache_interval is {self.cache_interval}; accepted: whole numbers from 1")
        if (self.cache_block_id is None) != (self.cache_layer_id is None):
            raise ValueError("cache_block_id and cache_layer_id name a branch together: give both or neither")
        if not isinstance(self.skip_mode, str):
            object.__setattr__(self, "skip_mode", tuple(sorted(set(self.skip_mode))))
            if not self.skip_mode or self.skip_mode[0] != 0:
                raise ValueError(f"skip_mode lists full steps {self.skip_mode}; it must hold 0 and no negative step")
        elif self.skip_mode not in ("uniform", "quad"):
            raise ValueError(f"skip_mode is {self.skip_mode!r}; accepted: 'uniform', 'quad' or a list of full steps")
        elif self.skip_mode == "quad":
            if self.num_inference_steps is None:
                raise ValueError("skip_mode='quad' needs num_inference_steps, the number of steps of the run")
            self.full_steps(self.num_inference_steps)

    def full_steps(self, total: int) -> list[int]:
        """Steps of a run of `total` steps on which the whole UNet runs."""
        if self.skip_mode == "uniform":
            return uniform_steps(total, self.cache_interval)
        if self.skip_mode == "quad":
            steps = quad_steps(self.num_inference_steps, self.cache_interval, self.center, self.pow)
            return [s for s in steps if s < total] + list(range(self.num_inference_steps, total))
        return [s for s in self.skip_mode if s < total]

    def is_full_step(self, step: int) -> bool:
        """Does the whole UNet run on this step (counted from the start of the run)?"""
        if self.skip_mode == "uniform":
            return step % self.cache_interval == 0
        return step in self.full_steps(step + 1)

    def branch(self, unet: torch.nn.Module) -> Branch:
        """The branch of this config on a UNet."""
        known = branches(unet)
        if self.cache_block_id is not None:
            wanted = Branch(self.cache_block_id, self.cache_layer_id)
            if wanted not in known:
                raise ValueError(
                    f"cache_block_id={wanted.block}, cache_layer_id={wanted.layer} is not a branch of this UNet; "
                    f"accepted (block, layer): {', '.join(f'({x.block}, {x.layer})' for x in known)}"
                )
            return wanted
        if not 0 <= self.cache_branch_id < len(known):
            raise ValueError(
                f"cache_branch_id is {self.cache_branch_id}; this UNet has {len(known)} skip connections, "
                f"accepted: 0 to {len(known) - 1}"
            )
        return known[self.cache_branch_id]

    def check(self, target: Any, num_inference_steps: int | None = None) -> tuple[str, ...]:
        unet = denoiser_of(target)
        require_branches(unet)
        branch = self.branch(unet)
        if unet.mid_block is None and branch == branches(unet)[-1]:
            raise ValueError("this UNet has no mid block: its deepest branch skips nothing, choose a smaller one")
        refuse_fused_qkv(unet)
        refuse_other_caches(unet)
        steps = num_inference_steps or self.num_inference_steps
        if steps is not None and len(self.full_steps(steps)) >= steps:
            return (f"deepcache: none of {steps} steps can be reused; use more steps or a larger cache_interval",)
        return ()

    def attach(self, target: Any) -> Attachment:
        unet = denoiser_of(target)
        skipped, source = skipped_modules(unet, self.branch(unet))
        shared = Shared()
        hooks = [(InheritHook if m is source else _SkipHook)(shared, i) for i, m in enumerate(skipped)]
        root = InheritRoot(self.is_full_step, shared, hooks[-1].index, self.forecast_order)
        return Attachment(inherit(unet, root, zip(skipped, hooks), _HOOK), lambda: root.summary(unet))


def require_branches(model: torch.nn.Module) -> None:
    """Raise `ValueError` if a model is no UNet with skip connections of a layout that is known."""
    blocks = [*getattr(model, "down_blocks", ()), *getattr(model, "up_blocks", ())]
    name = type(model).__name__
    if not blocks or not all(hasattr(block, "resnets") for block in blocks):
        raise ValueError(
            f"DeepCache needs a UNet with skip connections (down_blocks, mid_block, up_blocks of resnets); {name} is "
            "none. Transformers have caches of their own, e.g. diffusers' FirstBlockCacheConfig"
        )
    if any(isinstance(block, _OTHER_LAYOUTS) for block in blocks) or len(model.down_blocks) != len(model.up_blocks):
        raise ValueError(f"DeepCache does not know the block layout of this {name}: {_block_names(blocks)}")
    for block in blocks:
        lists = {n for n, child in block.named_children() if isinstance(child, torch.nn.ModuleList)}
        unknown = lists - {*_LAYER_LISTS, *_SAMPLER_LISTS}
        if unknown:
            raise ValueError(f"DeepCache does not know {', '.join(sorted(unknown))} of {type(block).__name__}")


def _block_names(blocks: list[torch.nn.Module]) -> str:
    return ", ".join(sorted({type(block).__name__ for block in blocks}))
