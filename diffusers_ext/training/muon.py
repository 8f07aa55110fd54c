"""Muon: momentum whose update is made orthogonal, for the matrices inside a network (https://kellerjordan.github.io/posts/muon/).

`torch.optim.Muon` takes matrices only; the networks here hold convolutions too, so they are flattened to
`[out, in * height * width]`.
"""

from __future__ import annotations

import torch
from torch import nn


def orthogonalised(matrix: torch.Tensor, steps: int = 5) -> torch.Tensor:
    """The matrix with all its singular values moved close to 1, by Newton-Schulz iteration.

    Args:
        matrix: Shape `[m, n]`.
        steps: Iterations; five bring singular values above 1 % of the Frobenius norm to 0.7 .. 1.2.
    """
    tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.T if tall else matrix
    x = x / (x.norm() + 1e-7)
    for _ in range(steps):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=-4.7750, alpha=2.0315), x, beta=3.4445)
    return x.T if tall else x


class Muon(torch.optim.Optimizer):
    """Orthogonalised Nesterov momentum for weights of two or more dimensions.

    Args:
        params: Weights `[out, in, ...]`.
        lr: Learning rate on AdamW's scale: updates have a root mean square of about 0.2 lr.
        momentum: Decay of the running mean of gradients, in [0, 1).
        weight_decay: Decoupled, per step `lr * weight_decay`.
    """

    def __init__(self, params, lr: float, momentum: float = 0.95, weight_decay: float = 0.01):
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure=None):
        """One update from the gradients that are in place."""
        for group in self.param_groups:
            for weight in group["params"]:
                mean = self.state[weight].setdefault("mean", torch.zeros_like(weight))
                mean.lerp_(weight.grad, 1 - group["momentum"])
                direction = weight.grad.lerp(mean, group["momentum"]).reshape(len(weight), -1)
                size = 0.2 * max(direction.shape) ** 0.5
                weight.mul_(1 - group["lr"] * group["weight_decay"])
                weight.add_(orthogonalised(direction).reshape(weight.shape), alpha=-group["lr"] * size)


def optimizers(model: nn.Module, lr: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices and convolutions inside `model`, AdamW for everything else that is trained.

    Everything else: biases, norms, embeddings, the first and last layer, and weights with a side below 16.
    """
    hidden, rest = [], []
    for name, weight in model.named_parameters():
        outer = name.startswith(("conv_in", "conv_out", "proj_out"))
        table = any(part in name for part in ("embed", "shared", "relative"))
        inner = weight.ndim >= 2 and min(weight.shape[:2]) >= 16 and not outer and not table
        if weight.requires_grad:
            (hidden if inner else rest).append(weight)
    found: list[torch.optim.Optimizer] = [Muon(hidden, lr)] if hidden else []
    if rest:  # an adapter may have matrices only
        found.append(torch.optim.AdamW(rest, lr, betas=(0.9, 0.99), weight_decay=0.01))
    return found
