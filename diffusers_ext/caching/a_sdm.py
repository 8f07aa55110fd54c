"""A-SDM, feature inheritance: on some steps, chosen blocks, layers or units of a UNet do not run but inherit.

Zhu et al., "A-SDM: Accelerating Stable Diffusion through Model Assembly and Feature Inheritance Strategies", 2024,
https://arxiv.org/abs/2406.00210. Its other half, smaller models assembled from a large one, is in `a_sdm_assembly`.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from .._fields import require_types
from ..apply import Attachment, MethodConfig, denoiser_of
from ..registry import Claim, MethodRecord, register, unknown
from ._a_sdm_modules import GRANULARITIES, BranchHook, is_preset, preset_names, selected
from ._common import PREFIX, Position, refuse_fused_qkv, refuse_other_caches, steps_left
from ._forecast import History, require_order
from ._inherit import InheritHook, InheritRoot, Shared, inherit


__all__ = ["FeatureInheritanceConfig"]

_HOOK = PREFIX + "a-sdm"
MODES = ("uniform", "early_dense", "late_dense", "both_dense", "random")


def time_mask(
    total: int, interval: int, mode: str = "uniform", dense_fraction: float = 0.2, seed: int = 0
) -> list[int]:
    """The time mask m of a run of T steps: 1 where selected modules are computed, 0 where they inherit; m_0 = 1.

    Args:
        total: T.
        interval: N: outside of dense parts every N-th step is computed.
        mode: `"uniform"`; `"early_dense"`, the first p T steps are all computed; `"late_dense"`, the last p T;
            `"both_dense"`, p T / 2 at either end; `"random"`, as many steps as `"uniform"`, drawn at random.
        dense_fraction: p, 0 to 1.
        seed: Of `"random"`.
    """
    dense = math.ceil(dense_fraction * total)
    early = {"early_dense": dense, "both_dense": math.ceil(dense / 2)}.get(mode, 0)
    late = {"late_dense": dense, "both_dense": dense // 2}.get(mode, 0)
    if mode == "random":
        drawn = random.Random(seed).sample(range(1, total), math.ceil(total / interval) - 1)
        return [int(i == 0 or i in drawn) for i in range(total)]
    start = max(early - 1, 0)  # the last dense step, from which every N-th is counted
    return [int(i <= start or i >= total - late or (i - start) % interval == 0) for i in range(total)]


def is_computed(mask: Sequence[int], step: int) -> bool:
    """Is everything computed at this step? Steps that the mask does not reach are."""
    return step >= len(mask) or mask[step] == 1


class _RootHook(InheritRoot):
    """On the model: follows the time mask, and keeps features only where a later step needs them."""

    def __init__(self, config: FeatureInheritanceConfig, target: Any, shared: Shared, watched: int):
        super().__init__(self._is_computed, shared, watched, config.forecast_order)
        self.config, self.target = config, target
        self.mask: list[int] | None = None

    def begin_run(self, args: tuple, kwargs: dict) -> None:
        super().begin_run(args, kwargs)
        total = self.config.num_inference_steps or steps_left(self.target, self.tracker.time)
        self.mask = self.config.mask(total) if total else None

    def _is_computed(self, step: int) -> bool:
        if self.mask is None:
            return self.config.is_computed(step)
        return is_computed(self.mask, step)

    def begin_call(self, position: Position[History]) -> None:
        super().begin_call(position)
        if not self.shared.reuse and not self.config.forecast_order and self._is_computed(position.step + 1):
            self.shared.record = None


@register(
    MethodRecord(
        slug="a-sdm",
        family="caching",
        kind="cache",
        title="A-SDM: Accelerating Stable Diffusion through Model Assembly and Feature Inheritance Strategies",
        arxiv="2406.00210",
        summary="Chosen parts of a UNet inherit their features on some steps; smaller UNets assembled and distilled",
        targets=("unet",),
        predictions=("epsilon", "v_prediction", "sample", "flow_prediction"),
        nodes=("DXFeatureInheritance", "DXMultiModelSwitch"),
        claim=Claim(
            text="Throughput 40.0 percent up by feature inheritance (0.714 of the time), 22.4 percent by model "
            "assembly",
            setting="Stable Diffusion, GPU",
            value=1.4,
            unit="times faster",
        ),
        conflicts=("any-size-diffusion", "deepcache", "faster-diffusion", "hidiffusion"),
    )
)
@dataclass(frozen=True)
class FeatureInheritanceConfig(MethodConfig):
    """Saves a chosen part of a UNet on most steps: what it names inherits the features of the last computed step.

    A block or layer that inherits gives its stored output. A unit (resnet, self-attention, cross-attention,
    feed-forward, or a whole transformer inside of a layer) adds its stored branch to the live input, so that the
    output still follows the latents. Everything around runs as before: scheduler, guidance, ControlNet, LoRA. Works
    with Stable Diffusion 1, 2, XL, inpainting, video and unconditional UNets, and in units with transformers. Paper:
    https://arxiv.org/abs/2406.00210

    Args:
        modules: Which: `"deep"` (default), the redundant deep blocks around the middle; `"branch-K"`, what DeepCache
            leaves out at branch K (granularity "layer"); or names of modules, as in `model.named_modules()`. The name
            of something larger stands for all of the granularity inside.
        granularity: `"block"` (default), `"layer"` (a resnet with its attention) or `"unit"`.
        interval: N: every N-th step is computed, the others inherit. 1 changes nothing. Default 2.
        mode: Which steps are computed: `"uniform"`, `"early_dense"`, `"late_dense"`, `"both_dense"` or `"random"`, see
            `dense_fraction`; or the time mask itself, 1 for computed and 0 for inherited, one per step, 1 first.
        dense_fraction: Share of the run that the dense modes compute in full, at its beginning, at its end, or half
            at either. Default 0.2.
        seed: Of mode `"random"`.
        num_inference_steps: Steps of the run; read from the scheduler when applied to a pipeline.
        forecast_order: What is inherited: 0 (default), the features of the last computed step, as in the paper;
            1 or 2, their forecast, the line or parabola through the last two or three computed steps. For samplers
            that add no noise, 1 stays much closer to the run without inheritance at the same cost, but for memory.
            Fractions mix their neighbours: 0.5 is half of the trend.

    Raises:
        ValueError: Values out of range; on `apply`, unknown names, units without a residual branch, a transformer in
            blocks or layers, or a mode that needs the length of the run where nothing tells it.

    Example:
        >>> import diffusers_ext
        >>> from diffusers_ext import FeatureInheritanceConfig, zoo
        >>> pipe = zoo.load("shapes-unet")
        >>> with diffusers_ext.apply(pipe, FeatureInheritanceConfig("deep", interval=3)) as handle:
        ...     image = pipe("a red circle", num_inference_steps=12, height=64, width=64).images[0]
        ...     handle.summary()["a-sdm"]["reused"]
        8

    Limits:
        An inherited cross-attention has not seen a prompt that changes between steps (prompt-to-prompt, scheduled
        prompts); a call with other prompt tensors starts afresh. What a T2I adapter adds inside of an inherited
        block is that of the computed step. Units run the 1 x 1 shortcut of a resnet twice on computed steps.
        `torch.compile(fullgraph=True)` is impossible: the decision is a graph break.
    """

    modules: str | Sequence[str] = "deep"
    granularity: str = "block"
    interval: int = 2
    mode: str | Sequence[int] = "uniform"
    dense_fraction: float = 0.2
    seed: int = 0
    num_inference_steps: int | None = None
    forecast_order: float = 0

    def __post_init__(self) -> None:
        require_types(self)
        require_order(self.forecast_order)
        if isinstance(self.modules, str):
            names: tuple[str, ...] = (self.modules,)
            if not is_preset(self.modules):
                raise ValueError(
                    f"modules is {self.modules!r}; accepted: 'deep', 'branch-0' and on, or a list of module names"
                )
        else:
            names = tuple(self.modules)
            object.__setattr__(self, "modules", names)
        if not names:
            raise ValueError("modules is empty: name at least one module, or use 'deep'")
        if self.granularity not in GRANULARITIES:
            raise ValueError(unknown("granularity", self.granularity, GRANULARITIES))
        if self.interval < 1:
            raise ValueError(f"interval is {self.interval}; accepted: whole numbers from 1")
        if not 0 <= self.dense_fraction <= 1:
            raise ValueError(f"dense_fraction is {self.dense_fraction}; accepted: a share of the steps, 0 to 1")
        if self.num_inference_steps is not None and self.num_inference_steps < 1:
            raise ValueError(f"num_inference_steps is {self.num_inference_steps}; accepted: whole numbers from 1")
        if isinstance(self.mode, str):
            if self.mode not in MODES:
                raise ValueError(unknown("mode", self.mode, MODES))
            return
        object.__setattr__(self, "mode", tuple(self.mode))
        if not self.mode or self.mode[0] != 1 or set(self.mode) - {0, 1}:
            raise ValueError(f"mode is the time mask {self.mode}; it must hold 0s and 1s only and begin with 1")

    def mask(self, total: int) -> list[int]:
        """The time mask of a run of `total` steps; what a given mask does not reach is computed."""
        if isinstance(self.mode, str):
            return time_mask(total, self.interval, self.mode, self.dense_fraction, self.seed)
        return [*self.mode, *[1] * total][:total]

    def is_computed(self, step: int) -> bool:
        """Does everything run on this step of a run of unknown length?"""
        if self.mode == "uniform":
            return step % self.interval == 0
        return self.mask(step + 1)[step] == 1

    def names(self, model: Any) -> list[str]:
        """Names of the modules of a model that inherit."""
        return list(self._selected(denoiser_of(model)))

    def _selected(self, model: Any) -> dict[str, Any]:
        wanted = preset_names(model, self.modules) if isinstance(self.modules, str) else self.modules
        return selected(model, wanted, self.granularity)

    def check(self, target: Any, num_inference_steps: int | None = None) -> tuple[str, ...]:
        model = denoiser_of(target)
        self._selected(model)
        refuse_fused_qkv(model)
        refuse_other_caches(model)
        steps = num_inference_steps or self.num_inference_steps
        needs_length = isinstance(self.mode, str) and self.mode != "uniform"
        if needs_length and steps is None and getattr(target, "scheduler", None) is None:
            raise ValueError(f"mode={self.mode!r} depends on the length of the run: give num_inference_steps")
        if steps is not None and all(self.mask(steps)):
            return (f"a-sdm: none of {steps} steps can inherit; use more steps, a larger interval or another mode",)
        return ()

    def attach(self, target: Any) -> Attachment:
        model, shared = denoiser_of(target), Shared()
        modules = self._selected(model).values()
        kind = BranchHook if self.granularity == "unit" else InheritHook
        hooks = [kind(shared, i) for i in range(len(modules))]
        root = _RootHook(self, target, shared, hooks[-1].index)
        return Attachment(inherit(model, root, zip(modules, hooks), _HOOK), lambda: root.summary(model))
