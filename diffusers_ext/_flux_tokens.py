"""How Flux makes tokens of latents and back: one per 2 x 2 latents, line by line, with its place in `img_ids`."""

from __future__ import annotations

import torch


def pack(latents: torch.Tensor) -> torch.Tensor:
    """Latents `[n, c, h, w]` -> Flux tokens `[n, h / 2 * w / 2, 4 c]`, one per 2 x 2 patch."""
    n, c, h, w = latents.shape
    return latents.view(n, c, h // 2, 2, w // 2, 2).permute(0, 2, 4, 1, 3, 5).reshape(n, h * w // 4, 4 * c)


def unpack(tokens: torch.Tensor, height: int, width: int, side: int = 2) -> torch.Tensor:
    """The inverse of `pack` for latents of this size, or of the same with patches of `side` x `side`."""
    n, c = len(tokens), tokens.shape[-1] // side**2
    patches = tokens.view(n, height // side, width // side, c, side, side)
    return patches.permute(0, 3, 1, 4, 2, 5).reshape(n, c, height, width)


def image_ids(height: int, width: int, device: torch.device | str = "cpu") -> torch.Tensor:
    """Flux's positions `[h / 2 * w / 2, 3]` of the tokens of latents of this size: (0, row, column)."""
    rows, columns = torch.arange(height // 2), torch.arange(width // 2)
    places = torch.cartesian_prod(rows, columns).float()
    return torch.cat([torch.zeros(len(places), 1), places], 1).to(device)


def grid_of(ids: torch.Tensor) -> tuple[int, int]:
    """Rows and columns of image tokens from their positions `[n, 3]`; tokens of reference pictures do not count."""
    ids = ids[0] if ids.ndim == 3 else ids
    own = ids[ids[:, 0] == ids[0, 0]]
    columns = int((own[:, 1] == own[0, 1]).sum())  # the first row only: bf16 merges rows beyond 256
    return len(own) // columns, columns
