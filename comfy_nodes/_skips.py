"""Skip connections of ComfyUI's UNets."""

from __future__ import annotations

import torch


def skip_widths(network: torch.nn.Module, method: str) -> list[int]:
    """Channels of the skip connections of a UNet, from the input on.

    Raises:
        ValueError: It is no UNet; `method` is who asks.
    """
    if not hasattr(network, "input_blocks"):
        raise ValueError(f"{method} works on UNets (SD 1, 2, XL); this model is a {type(network).__name__}")
    layers = ([m for m in block if hasattr(m, "out_channels")] for block in network.input_blocks)
    return [found[-1].out_channels for found in layers]
