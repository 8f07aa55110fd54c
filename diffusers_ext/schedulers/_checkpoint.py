"""Files of calibrations: written in one move, sizes checked; unfinished work goes on only as the same work."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file


MAX_ELEMENTS = 2**28  # of any array that is allocated for statistics or targets


def require_size(what: str, *shape: int) -> None:
    """Raise `ValueError` if an array of this shape is too large to be allocated."""
    if math.prod(shape) > MAX_ELEMENTS:
        raise ValueError(f"{what} of shape {tuple(shape)} are too large (at most {MAX_ELEMENTS} numbers)")


def write_tensors(path: str | Path, tensors: Mapping[str, torch.Tensor], header: dict[str, str]) -> None:
    """Write a safetensors file so that an interruption leaves the old file or the new one, never half of it."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    save_file({name: t.detach().cpu().contiguous() for name, t in tensors.items()}, part, header)
    os.replace(part, path)


class Checkpoint:
    """Unfinished work in a safetensors file.

    Args:
        path: Of the file; None keeps nothing.
        work: What is being made, for messages.
        about: Everything that decides the result, as JSON can hold it.
    """

    def __init__(self, path: str | Path | None, work: str, about: Mapping[str, Any]):
        self.path = None if path is None else Path(path)
        self.work, self.about = work, json.loads(json.dumps(about))

    def read(self) -> dict[str, torch.Tensor]:
        """What has been written so far; empty when there is nothing.

        Raises:
            ValueError: The file is of other work or settings.
        """
        if self.path is None or not self.path.is_file():
            return {}
        with safe_open(self.path, "pt") as file:
            header = file.metadata() or {}
            known = json.loads(header.get("about", "{}")) if header.get("unfinished") == self.work else {}
            wrong = [name for name, value in self.about.items() if name not in known or known[name] != value]
            if wrong:
                raise ValueError(
                    f"{self.path} holds no unfinished {self.work} with {wrong[0]} = {self.about[wrong[0]]!r}: delete "
                    "it, or name another checkpoint"
                )
            names = list(file.keys())
            for name in names:
                require_size(name, *file.get_slice(name).get_shape())
            return {name: file.get_tensor(name) for name in names}

    def write(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Keep what there is by now."""
        if self.path is not None:
            write_tensors(self.path, tensors, {"unfinished": self.work, "about": json.dumps(self.about)})

    def delete(self) -> None:
        """The work is finished."""
        if self.path is not None:
            self.path.unlink(missing_ok=True)
