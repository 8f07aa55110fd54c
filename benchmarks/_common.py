"""What every benchmark needs: the machine, files, charts."""

from __future__ import annotations

import datetime
import json
import os
import platform
import textwrap
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.is_file() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def environment() -> dict[str, Any]:
    """What a reader needs to judge a measurement: processor, threads, versions, date."""
    return {
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "diffusers": version("diffusers"),
        "python": platform.python_version(),
        "date": datetime.date.today().isoformat(),
    }


def write_json(path: Path, value: Any) -> None:
    """Write JSON so that an interruption leaves the old file or the new one, never half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
    os.replace(part, path)


def line_chart(
    path: Path,
    series: Mapping[str, Sequence[tuple[float, float]]],
    xlabel: str,
    ylabel: str,
    title: str,
    log_y: bool = False,
) -> Path:
    """Save a line chart.

    Args:
        path: PNG file to write.
        series: Name of a line -> its (x, y) points.
        xlabel: Text under the x axis.
        ylabel: Text beside the y axis.
        title: Text above the chart.
        log_y: Logarithmic y axis.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.2), dpi=120)
    for name, points in series.items():
        axes.plot(*zip(*points), marker="o", label=name)
    axes.set(xlabel=xlabel, ylabel=ylabel, title=title, yscale="log" if log_y else "linear")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    figure.tight_layout()
    figure.savefig(path)
    pyplot.close(figure)
    return path


def picture_grid(lines: dict[str, Any], path: Path, count: int | None = None) -> Path:
    """Save rows of pictures, a label before each.

    Args:
        lines: Label -> `[n, 3, h, w]` in [-1, 1].
        path: Of the PNG.
        count: Pictures per row; default: as many as the longest row has, at most 8.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    count = count or min(8, max(len(images) for images in lines.values()))
    size = (1.1 * count + 1.5, 1.15 * len(lines))
    figure, axes = pyplot.subplots(len(lines), count, figsize=size, dpi=120, squeeze=False)
    for line, (label, images) in zip(axes, lines.items()):
        for cell in line:
            cell.set(xticks=[], yticks=[])
        for cell, image in zip(line, images):
            cell.imshow(((image.permute(1, 2, 0) + 1) / 2).clamp(0, 1).numpy(), interpolation="nearest")
        for cell in line[len(images) :]:
            cell.axis("off")
        wrapped = "\n".join(textwrap.fill(part, 18) for part in label.split("\n"))
        line[0].set_ylabel(wrapped, fontsize=7, rotation=0, ha="right", va="center")
    figure.tight_layout(pad=0.4)
    figure.savefig(path)
    pyplot.close(figure)
    return path
