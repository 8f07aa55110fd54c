"""Adapter files that the loaders list: `models/diffusers_ext_adapters`, the same folder of the output, and ours."""

from __future__ import annotations

import importlib.util
import json
from dataclasses import dataclass
from pathlib import Path

from ._files import SavedFiles


@dataclass(frozen=True)
class AdapterFiles(SavedFiles):
    """Files of adapters; those that ship with this pack, for its small models, are among them."""

    def folders(self) -> list[Path]:
        (package,) = importlib.util.find_spec("diffusers_ext").submodule_search_locations
        return [*super().folders(), Path(package) / "zoo/weights/adapters"]

    def of_class(self, name: str) -> dict[str, dict]:
        """File name -> config of every file that holds an adapter of this class; only headers are read."""
        found = {file: _metadata(path) for file, path in sorted(self.by_name().items())}
        return {file: json.loads(note["config"]) for file, note in found.items() if note.get("class") == name}


def _metadata(path: Path) -> dict:
    """The notes in the header of a safetensors file; none for a file that is no such file."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        try:
            return json.loads(file.read(min(length, path.stat().st_size))).get("__metadata__", {})
        except ValueError:
            return {}


ADAPTERS = AdapterFiles("diffusers_ext_adapters", ".safetensors", "adapter")
