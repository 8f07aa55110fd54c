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


def grid(lines: dict[str, Any], path: Path) -> Path:
    """Save rows of pictures `[n, 3, h, w]` in [-1, 1] with a label before each."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    count = max(len(images) for images in lines.values())
    size = (1.1 * count + 1.4, 1.2 * len(lines))
    figure, axes = pyplot.subplots(len(lines), count, figsize=size, dpi=120, squeeze=False)
    for line, (label, images) in zip(axes, lines.items()):
        for cell, image in zip(line, images):
            cell.imshow(((image.permute(1, 2, 0) + 1) / 2).clamp(0, 1).numpy(), interpolation="nearest")
            cell.set(xticks=[], yticks=[])
        line[0].set_ylabel(label, fontsize=7)
    figure.tight_layout(pad=0.4)
    figure.savefig(path)
    pyplot.close(figure)
    return path
