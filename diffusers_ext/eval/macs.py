"""Exact multiply-accumulate counts: convolutions, matrix products and attention, by the shapes that really run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode


def attention_macs(query: torch.Size, key: torch.Size, value: torch.Size) -> int:
    """MACs of dense attention: `q @ k.T` and `weights @ v`.

    Args:
        query: Shape `(batch, heads, s_q, d)`.
        key: Shape `(batch, heads, s_k, d)`.
        value: Shape `(batch, heads, s_k, d_v)`.
    """
    batch, heads, s_q, d = query
    return batch * heads * s_q * key[-2] * (d + value[-1])


def _cpu_attention_flops(query, key, value, *args, out_shape=None, **kwargs) -> int:
    return 2 * attention_macs(query, key, value)


def _mapping() -> dict[Any, Callable]:
    """torch's counter knows the CUDA attention kernels but not the CPU one, which would count as free."""
    kernel = getattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu", None)
    return {} if kernel is None else {kernel: _cpu_attention_flops}


def count_macs(function: Callable[..., Any], *args: Any, **kwargs: Any) -> int:
    """Multiply-accumulates that `function(*args, **kwargs)` executes (forward only, element-wise work excluded).

    Counts what runs, so a cache that skips blocks is seen as it is. Works on any device, also `"meta"`.

    Args:
        function: Callable, e.g. a model.
        args, kwargs: Its arguments.

    Returns:
        Number of multiply-accumulates (half the usual FLOP count).

    Example:
        >>> import torch
        >>> from diffusers_ext.eval import count_macs
        >>> count_macs(torch.nn.Linear(8, 4), torch.zeros(2, 8))
        64
    """
    with torch.no_grad(), FlopCounterMode(display=False, custom_mapping=_mapping()) as counter:
        function(*args, **kwargs)
    return counter.get_total_flops() // 2


def macs_by_module(model: torch.nn.Module, *args: Any, depth: int = 1, **kwargs: Any) -> dict[str, int]:
    """MACs of one forward pass by sub-module name.

    Args:
        model: Module to run.
        args, kwargs: Inputs of its forward.
        depth: 0 gives the whole model only, 1 its children, and so on.

    Returns:
        `{"": total, "conv_in": ..., ...}`; modules that did no counted work are absent.
    """
    with torch.no_grad(), FlopCounterMode(display=False, depth=None, custom_mapping=_mapping()) as counter:
        model(*args, **kwargs)
    root = type(model).__name__
    counts = {"": counter.get_total_flops() // 2}
    for name, by_op in counter.get_flop_counts().items():
        path = name.removeprefix(root).lstrip(".")
        if name != "Global" and path and path.count(".") < depth:
            counts[path] = sum(by_op.values()) // 2
    return counts
