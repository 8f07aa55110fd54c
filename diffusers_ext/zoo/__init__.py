"""Small real models that ship inside the package, the world they draw, and analytic models with exact scores."""

from __future__ import annotations

from pathlib import Path

import torch


_WEIGHTS = Path(__file__).parent / "weights"


def load(name: str, dtype: torch.dtype = torch.float32):
    """A shipped pipeline: `"shapes-unet"` (Stable Diffusion layout) or `"shapes-dit"` (Flux layout)."""
    from diffusers import DiffusionPipeline

    pipe = DiffusionPipeline.from_pretrained(_WEIGHTS / name, dtype=dtype, local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    return pipe
