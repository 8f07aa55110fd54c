"""Leaving out blocks at chosen timesteps: which blocks can be left out, and the hooks that do it."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from diffusers.hooks import ModelHook
from diffusers.hooks._helpers import TransformerBlockMetadata, TransformerBlockRegistry
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.transformer_2d import Transformer2DModel

from ..caching._common import install


HOOK = "diffusers_ext.autodiffusion"
_PIPELINE_SCALE = 1000  # Flux-like pipelines hand their model the timestep divided by this


def _metadata(block: torch.nn.Module) -> TransformerBlockMetadata | None:
    try:
        return TransformerBlockRegistry.get(type(block))
    except ValueError:
        return None


def shape_change(block: torch.nn.Module) -> str | None:
    """Why this block cannot be replaced by the identity; None if it can, and no block at all is `"not a block"`."""
    if isinstance(block, ResnetBlock2D):
        if block.in_channels != block.out_channels:
            return f"changes {block.in_channels} channels to {block.out_channels}"
        resized = block.upsample is not None or block.downsample is not None
        return "changes the size" if resized else None
    if isinstance(block, Transformer2DModel):
        return None if block.is_input_continuous else "changes the shape"
    return None if _metadata(block) is not None else "is no residual or attention block"


def skippable_blocks(model: torch.nn.Module) -> dict[str, torch.nn.Module]:
    """Blocks of a UNet or transformer that the identity can stand in for, outermost ones, by name in running order.

    Residual blocks that keep the number of channels and the size, attention blocks, and transformer blocks known to
    diffusers' hooks.
    """
    found: dict[str, torch.nn.Module] = {}

    def visit(module: torch.nn.Module, prefix: str) -> None:
        for name, child in module.named_children():
            if shape_change(child) is None:
                found[prefix + name] = child
            else:
                visit(child, f"{prefix}{name}.")

    visit(getattr(model, "_orig_mod", model), "")
    return found


def require_blocks(model: torch.nn.Module, names: Sequence[str]) -> dict[str, torch.nn.Module]:
    """The named blocks.

    Raises:
        ValueError: One does not exist, changes its input's shape, or is no block; names it.
    """
    known, every = skippable_blocks(model), dict(model.named_modules())
    for name in names:
        if name in known:
            continue
        block = every.get(name)
        reason = f"{shape_change(block) or 'lies inside another one'}" if block is not None else "does not exist"
        raise ValueError(
            f"block {name!r} of {type(model).__name__} cannot be left out: it {reason}. Blocks that can: "
            f"{', '.join(known) or 'none'}"
        )
    return {name: known[name] for name in names}


def nearest(level: float, levels: Sequence[float], tolerance: float) -> int | None:
    """Index of the entry that is `level` up to a relative tolerance; None if none is."""
    if not levels:
        return None
    best = min(range(len(levels)), key=lambda i: abs(levels[i] - level))
    return best if abs(levels[best] - level) <= tolerance * max(abs(level), 1e-3) else None


class BlockSkipHook(ModelHook):
    """On one block: hands its input through while its name is in `active`, the names left out at the current call."""

    def __init__(self, name: str, active: set[str]):
        super().__init__()
        self.name, self.active = name, active

    def initialize_hook(self, module: torch.nn.Module) -> torch.nn.Module:
        self._outputs = _identity(module)
        return module

    def new_forward(self, module: torch.nn.Module, *args, **kwargs):
        if self.name not in self.active:
            return self.fn_ref.original_forward(*args, **kwargs)
        return self._outputs(args, kwargs)


def _identity(block: torch.nn.Module) -> Callable[[tuple, dict], Any]:
    """What a block returns if it does nothing, in the form its caller expects."""
    signature, data = inspect.signature(block.forward), _metadata(block)

    def run(args: tuple, kwargs: dict):
        bound = signature.bind(*args, **kwargs)
        bound.apply_defaults()
        given = bound.arguments
        if isinstance(block, ResnetBlock2D):
            return given["input_tensor"]
        if isinstance(block, Transformer2DModel):
            x = given["hidden_states"]
            return Transformer2DModelOutput(sample=x) if given["return_dict"] else (x,)
        x = given[data.hidden_states_argument_name]
        if data.return_encoder_hidden_states_index is None:
            return x
        both = {
            data.return_hidden_states_index: x,
            data.return_encoder_hidden_states_index: given[data.encoder_hidden_states_argument_name],
        }
        return tuple(both[i] for i in sorted(both))

    return run


class _RootHook(ModelHook):
    """On the denoiser: decides by its timestep which blocks are left out of a call. Keeps nothing between calls."""

    def __init__(self, table: Mapping[float, Sequence[str]], active: set[str], total: int):
        super().__init__()
        self.levels, self.rows = list(table), [tuple(names) for names in table.values()]
        self.active, self.total, self.executed, self.calls = active, total, 0, 0

    def initialize_hook(self, module: torch.nn.Module) -> torch.nn.Module:
        self._signature = inspect.signature(module.forward)
        return module

    def new_forward(self, module: torch.nn.Module, *args, **kwargs):
        self._decide(self._signature.bind(*args, **kwargs).arguments["timestep"])
        try:
            return self.fn_ref.original_forward(*args, **kwargs)
        finally:
            self.active.clear()

    @torch.compiler.disable
    def _decide(self, timestep) -> None:
        rounding = 1e-6
        if isinstance(timestep, torch.Tensor) and timestep.is_floating_point():
            rounding = max(rounding, torch.finfo(timestep.dtype).eps)
        time = float(timestep.max()) if isinstance(timestep, torch.Tensor) else float(timestep)
        row = nearest(time, self.levels, rounding)
        if row is None and 0 < time <= 1:
            row = nearest(time * _PIPELINE_SCALE, self.levels, rounding)
        names = self.rows[row] if row is not None else ()
        self.active.update(names)
        self.calls += 1
        self.executed += self.total - len(names)


def install_skips(model: torch.nn.Module, table: Mapping[float, Sequence[str]]) -> tuple[Callable, Callable]:
    """Leave blocks out at timesteps, exactly removable.

    Args:
        model: UNet or transformer.
        table: Timestep -> names of blocks.

    Returns:
        `(remove, summary)`.
    """
    active: set[str] = set()
    blocks = require_blocks(model, sorted({name for names in table.values() for name in names}))
    root = _RootHook(table, active, len(skippable_blocks(model)))
    hooks = [(model, root), *((block, BlockSkipHook(name, active)) for name, block in blocks.items())]
    undo = install(model, hooks, HOOK)

    def summary() -> dict[str, int]:
        return {"calls": root.calls, "executed_blocks": root.executed, "blocks_per_call": root.total}

    return undo, summary


@contextmanager
def skipping(model: torch.nn.Module, table: Mapping[float, Sequence[str]]):
    """`install_skips` for the length of a block; nothing is touched if the table leaves nothing out."""
    if not any(table.values()):
        yield
        return
    undo, _ = install_skips(model, table)
    try:
        yield
    finally:
        undo()
