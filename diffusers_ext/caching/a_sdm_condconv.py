"""Several kernels for the price of one convolution: what A-SDM adds to a smaller UNet (ME-CondConv)."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from ..registry import unknown


__all__ = ["ConditionalConv2d"]

GATINGS = ("softmax", "sigmoid")


def mixed_kernels(gates: torch.Tensor, experts: torch.Tensor) -> torch.Tensor:
    """The effective kernel of every sample, W = sum_k r_k W_k.

    Args:
        gates: r, `[B, K]`.
        experts: W_k, `[K, out, in / groups, h, w]`.

    Returns:
        `[B, out, in / groups, h, w]`.
    """
    return (gates @ experts.flatten(1)).view(len(gates), *experts.shape[1:])


def conv_per_sample(x: torch.Tensor, kernels: torch.Tensor, groups: int = 1, **geometry) -> torch.Tensor:
    """Convolve every sample with a kernel of its own, all in one grouped convolution.

    Args:
        x: `[B, in, H, W]`.
        kernels: `[B, out, in / groups, h, w]`.
        groups: Of each convolution.
        geometry: `stride`, `padding`, `dilation`.
    """
    batch = len(x)
    out = F.conv2d(x.reshape(1, -1, *x.shape[2:]), kernels.flatten(0, 1), groups=batch * groups, **geometry)
    return out.view(batch, -1, *out.shape[2:])


class ConditionalConv2d(nn.Module):
    """A convolution whose kernel is mixed for every sample out of K expert kernels, at nearly the cost of one.

    A gate looks at the mean of the input over its pixels, and at the time embedding where one is given.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias: As in `torch.nn.Conv2d`.
        num_experts: K, 1 or more. Default 4.
        gating: `"softmax"` (gates sum to one, so that equal experts are the plain convolution) or `"sigmoid"` (they do
            not: a converted convolution starts scaled by the sum of its gates).
        time_channels: Width of the time embedding for the gate; None for a gate without.

    Raises:
        ValueError: No expert, or an unknown gating.

    Example:
        >>> import torch
        >>> from diffusers_ext import ConditionalConv2d
        >>> plain = torch.nn.Conv2d(8, 8, 3, padding=1)
        >>> x = torch.randn(2, 8, 16, 16)
        >>> torch.allclose(ConditionalConv2d.from_conv(plain, num_experts=4)(x), plain(x), atol=1e-6)
        True
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        num_experts: int = 4,
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] | str = 0,
        dilation: int | tuple[int, int] = 1,
        groups: int = 1,
        bias: bool = True,
        gating: str = "softmax",
        time_channels: int | None = None,
    ):
        super().__init__()
        if num_experts < 1:
            raise ValueError(f"num_experts is {num_experts}; accepted: whole numbers from 1")
        if gating not in GATINGS:
            raise ValueError(unknown("gating", gating, GATINGS))
        plain = nn.Conv2d(in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias)
        self.in_channels, self.out_channels, self.groups = in_channels, out_channels, groups
        self.geometry = {"stride": plain.stride, "padding": plain.padding, "dilation": plain.dilation}
        self.gating, self.time_channels = gating, time_channels
        self.weight = nn.Parameter(plain.weight.detach()[None].repeat(num_experts, 1, 1, 1, 1))
        self.bias = nn.Parameter(plain.bias.detach().clone()) if bias else None
        self.gate = nn.Linear(in_channels + (time_channels or 0), num_experts)

    @classmethod
    def from_conv(
        cls, conv: nn.Conv2d, num_experts: int = 4, gating: str = "softmax", time_channels: int | None = None
    ) -> ConditionalConv2d:
        """The same convolution with `num_experts` experts that all start as its kernel. The gate starts at random.

        Raises:
            ValueError: No plain convolution, or one that pads with other than zeros.
        """
        if not isinstance(conv, nn.Conv2d) or conv.padding_mode != "zeros":
            raise ValueError(f"{conv} cannot have experts: give a torch.nn.Conv2d with padding_mode 'zeros'")
        geometry = {"stride": conv.stride, "padding": conv.padding, "dilation": conv.dilation, "groups": conv.groups}
        new = cls(
            conv.in_channels,
            conv.out_channels,
            conv.kernel_size,
            num_experts,
            bias=conv.bias is not None,
            gating=gating,
            time_channels=time_channels,
            **geometry,
        ).to(conv.weight.device, conv.weight.dtype)
        with torch.no_grad():
            new.weight.copy_(conv.weight)
            if conv.bias is not None:
                new.bias.copy_(conv.bias)
        return new.train(conv.training)

    def gates(self, x: torch.Tensor, temb: torch.Tensor | None = None) -> torch.Tensor:
        """r, `[B, K]`, of inputs `[B, in, H, W]` and time embeddings `[B, time_channels]`."""
        if (temb is None) != (self.time_channels is None):
            raise ValueError(f"time_channels is {self.time_channels}: temb must be given with it, and only with it")
        seen = x.mean((2, 3))
        logits = self.gate(seen if temb is None else torch.cat([seen, temb], 1))
        return logits.softmax(1) if self.gating == "softmax" else logits.sigmoid()

    def forward(self, x: torch.Tensor, temb: torch.Tensor | None = None) -> torch.Tensor:
        """Convolve `[B, in, H, W]`."""
        out = conv_per_sample(x, mixed_kernels(self.gates(x, temb), self.weight), self.groups, **self.geometry)
        return out if self.bias is None else out + self.bias[:, None, None]
