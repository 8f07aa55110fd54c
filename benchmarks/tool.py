"""Tools have little in common, so each is measured by a module of its own: `benchmarks/tool_<slug with _>.py`."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

from diffusers_ext.registry import MethodRecord


def bench(record: MethodRecord, out_dir: Path) -> dict[str, Any]:
    """Measure a tool with the `bench` of its module; returns what `benchmarks/run.py` expects."""
    module = importlib.import_module(f"benchmarks.tool_{record.slug.replace('-', '_')}")
    return module.bench(record, out_dir)
