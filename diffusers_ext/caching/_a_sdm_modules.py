"""What can inherit: blocks, layers and units of a denoiser, by name, and how each of them does."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

import torch
from diffusers.models.attention import AttentionModuleMixin, BasicTransformerBlock, FeedForward
from diffusers.models.attention_processor import Attention
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.transformer_2d import Transformer2DModel

from ..registry import unknown
from ._common import map_tensors
from ._inherit import InheritHook
from .deepcache import branches, require_branches, skipped_modules


GRANULARITIES = ("block", "layer", "unit")
DEEP = "deep"
_BRANCH = re.compile(r"branch-(\d+)$")
_BLOCK = re.compile(r"((?:down|up)_blocks\.\d+|mid_block)$")
_PART = re.compile(r"((?:down|up)_blocks\.\d+|mid_block)\.(\w+)\.(\d+)$")
_SAMPLERS = ("downsamplers", "upsamplers")
_UNITS = (ResnetBlock2D, Transformer2DModel, BasicTransformerBlock, Attention, AttentionModuleMixin, FeedForward)


def is_preset(name: str) -> bool:
    """Is this the name of a set of modules, `"deep"` or `"branch-K"`?"""
    return name == DEEP or _BRANCH.match(name) is not None


def deep_blocks(attends: list[bool], mid: bool = True) -> list[str]:
    """Preset "deep": from the last down block with attention, but not the first, on, and up again.

    Args:
        attends: Of each down block, whether it has attention.
        mid: Whether there is a middle block.

    Example:
        >>> deep_blocks([True, True, True, False])  # Stable Diffusion 1
        ['down_blocks.2', 'down_blocks.3', 'mid_block', 'up_blocks.0', 'up_blocks.1']
    """
    count = len(attends)
    last = max((i for i, attention in enumerate(attends) if attention), default=count // 2)
    first = max(1, last)
    down = [f"down_blocks.{i}" for i in range(first, count)]
    return down + ["mid_block"] * mid + [f"up_blocks.{i}" for i in range(count - first)]


def preset_names(model: torch.nn.Module, preset: str) -> list[str]:
    """Module names that a preset stands for on this UNet."""
    if not hasattr(model, "down_blocks"):
        raise ValueError(
            f"modules={preset!r} names blocks of a UNet and {type(model).__name__} has none: give names of its own "
            "modules, with granularity='unit'"
        )
    if preset == DEEP:
        attends = [bool(getattr(block, "attentions", None)) for block in model.down_blocks]
        return deep_blocks(attends, getattr(model, "mid_block", None) is not None)
    require_branches(model)
    index, known = int(_BRANCH.match(preset)[1]), branches(model)
    if index >= len(known):
        raise ValueError(f"modules is {preset!r}; this UNet has branch-0 to branch-{len(known) - 1}")
    skipped = {id(module) for module in skipped_modules(model, known[index])[0]}
    return [name for name, module in model.named_modules() if id(module) in skipped]


def layer_parts(wanted: Iterable[str], names: Iterable[str]) -> list[str]:
    """The parts of the layers that `wanted` names, in the order of `names`.

    A layer is a resnet with the attention of the same number; the last one of a block takes the block's sampler along,
    whose input would be inherited anyway. A block's name stands for all of its layers.

    Args:
        wanted: Names of blocks, or of any part of a layer.
        names: Names of all modules.

    Raises:
        ValueError: A name that is neither.
    """
    parts = {name: _PART.match(name).groups() for name in names if _PART.match(name)}
    ends: dict[str, int] = {}
    for block, _, index in parts.values():
        ends[block] = max(ends.get(block, 0), int(index))
    layers: set[tuple[str, int]] = set()
    chosen: set[str] = set()
    for name in wanted:
        if name in ends:
            layers |= {(name, j) for j in range(ends[name] + 1)}
        elif name not in parts:
            raise ValueError(unknown("block or layer", name, [*ends, *parts]))
        elif parts[name][1] in _SAMPLERS:
            chosen.add(name)
        else:
            layers.add((parts[name][0], int(parts[name][2])))
    for name, (block, kind, index) in parts.items():
        if (block, ends[block] if kind in _SAMPLERS else int(index)) in layers:
            chosen.add(name)
    return [name for name in parts if name in chosen]


def unit_names(wanted: Iterable[str], names: Collection[str], units: Iterable[str]) -> list[str]:
    """The outermost units inside of what `wanted` names, in the order of `names`.

    Args:
        wanted: Names of units, or of anything that holds some.
        names: Names of all modules.
        units: Names of those whose output is, or ends in adding, a residual branch.

    Raises:
        ValueError: An unknown name, or one without units.
    """
    chosen: set[str] = set()
    units = list(units)
    for name in wanted:
        if name not in names:
            raise ValueError(unknown("module", name, units))
        inside = [unit for unit in units if unit == name or unit.startswith(name + ".")]
        if not inside:
            raise ValueError(
                f"the output of {name} has no residual branch: with granularity='unit' name resnets, attentions, "
                "feed-forwards or blocks that hold some"
            )
        chosen |= {u for u in inside if not any(u.startswith(outer + ".") for outer in inside)}
    return [name for name in names if name in chosen]


def _has_branch(module: torch.nn.Module) -> bool:
    if isinstance(module, ResnetBlock2D):
        return module.upsample is None and module.downsample is None
    if isinstance(module, Transformer2DModel):
        return bool(module.is_input_continuous)
    return True


def selected(model: torch.nn.Module, wanted: Iterable[str], granularity: str) -> dict[str, torch.nn.Module]:
    """The modules that inherit, by name, in running order of the model's definition.

    Raises:
        ValueError: A name the model does not have at this granularity, or a transformer in blocks or layers.
    """
    modules = dict(model.named_modules())
    if granularity == "unit":
        units = [name for name, module in modules.items() if isinstance(module, _UNITS) and _has_branch(module)]
        names = unit_names(wanted, modules, units)
        _refuse_chunks(modules, names)
        return {name: modules[name] for name in names}
    if not hasattr(model, "down_blocks"):
        raise ValueError(
            f"{type(model).__name__} is no UNet: behind an inherited {granularity} nothing would depend on the "
            "latents. Use granularity='unit', whose branches are added to live features"
        )
    if granularity == "layer":
        return {name: modules[name] for name in layer_parts(wanted, modules)}
    blocks, wanted = [name for name in modules if _BLOCK.match(name)], list(wanted)
    for name in wanted:
        if name not in blocks:
            raise ValueError(unknown("block", name, blocks))
    return {name: modules[name] for name in blocks if name in wanted}


def _refuse_chunks(modules: Mapping[str, torch.nn.Module], names: list[str]) -> None:
    for name in names:
        parent = modules[name.rpartition(".")[0]]
        if getattr(parent, "_chunk_size", None) is not None:
            raise ValueError(f"{name} runs in chunks, several times per step: call disable_forward_chunking() first")


def live_part(module: torch.nn.Module) -> Callable[[torch.Tensor], torch.Tensor] | None:
    """What the output of a unit takes straight from its input; None where the output is the branch alone."""
    if isinstance(module, ResnetBlock2D):
        shortcut = module.conv_shortcut or torch.nn.Identity()
        return lambda x: shortcut(x) / module.output_scale_factor
    if isinstance(module, (Transformer2DModel, BasicTransformerBlock)):
        return lambda x: x
    if getattr(module, "residual_connection", False):
        return lambda x: x / module.rescale_output_factor
    return None


class BranchHook(InheritHook):
    """On a unit: its branch is inherited and added to the live input.

    Where a unit ends in a residual sum, the branch is its output less what the input gives directly.
    """

    def keep(self, module: torch.nn.Module, output: Any, args: tuple, kwargs: dict) -> Any:
        live = live_part(module)
        if live is None:
            return super().keep(module, output, args, kwargs)
        through = live(_input(args, kwargs))
        return map_tensors(output, lambda t: (t - through).detach())

    def replay(self, module: torch.nn.Module, kept: Any, args: tuple, kwargs: dict) -> Any:
        live = live_part(module)
        if live is None:
            return super().replay(module, kept, args, kwargs)
        through = live(_input(args, kwargs))
        return map_tensors(kept, lambda branch: through + branch)


def _input(args: tuple, kwargs: dict) -> torch.Tensor:
    return args[0] if args else kwargs["hidden_states" if "hidden_states" in kwargs else "input_tensor"]
