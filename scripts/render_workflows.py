"""Draw the thumbnail of every workflow (run on a shipped model) and the page's view of it for the docs.

usage: render_workflows.py [slug ...]

Writes workflows/<slug>.jpg, shown in ComfyUI's template browser, and docs/assets/workflows/<slug>.png.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import sys
import tempfile
from pathlib import Path

from author_workflow import COMFYUI, REPOSITORY, provide_model_names, run_jobs
from PIL import Image, ImageOps

from diffusers_ext.comfy_client import ComfyClient, ComfyServer, start_server
from diffusers_ext.comfy_graph import for_shapes


CAPTION = "a large red circle left of a small yellow star, striped blue background"
SIZE = 512


def montage(paths: list[Path]) -> Image.Image:
    """The pictures of one run in a square grid of 512 pixels."""
    side = math.ceil(math.sqrt(len(paths)))
    cell = SIZE // side
    sheet = Image.new("RGB", (cell * side, cell * side), "white")
    for i, path in enumerate(paths):
        with Image.open(path) as picture:
            tile = ImageOps.pad(picture.convert("RGB"), (cell, cell), Image.Resampling.BICUBIC, color="white")
        sheet.paste(tile, (i % side * cell, i // side * cell))
    return sheet


def draw_thumbnail(client: ComfyClient, path: Path, folder: Path) -> None:
    graph = for_shapes(json.loads(path.read_text(encoding="utf-8")), client.object_info(), CAPTION)
    pictures = client.save_outputs(client.run(graph, timeout=600), folder / path.stem)
    montage(pictures).save(path.with_suffix(".jpg"), quality=88)


def take_screenshots(server: ComfyServer, paths: list[Path]) -> list[str]:
    shots = REPOSITORY / "docs/assets/workflows"
    jobs = [
        {
            "name": p.stem,
            "workflow": json.loads(p.read_text(encoding="utf-8")),
            "screenshot": str(shots / f"{p.stem}.png"),
        }
        for p in paths
    ]
    return [f"{result['name']}: {p}" for result in run_jobs(server.url, jobs) for p in result["problems"]]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("slugs", nargs="*", help="default: all")
    slugs = parser.parse_args().slugs
    paths = [p for p in sorted((REPOSITORY / "workflows").glob("*.json")) if not slugs or p.stem in slugs]
    with tempfile.TemporaryDirectory() as base:
        folder = Path(base)
        provide_model_names(folder / "models", (json.loads(p.read_text(encoding="utf-8")) for p in paths))
        with start_server(
            COMFYUI, base_directory=base, pack=REPOSITORY, log=folder / "log", arguments=["--disable-api-nodes"]
        ) as server:
            shutil.copy(COMFYUI / "input/example.png", folder / "input")
            for path in paths:
                draw_thumbnail(ComfyClient(server.url), path, folder / "pictures")
                print(path.with_suffix(".jpg"), flush=True)
            problems = take_screenshots(server, paths)
    print("\n".join(problems) or f"{len(paths)} workflows drawn")
    return bool(problems)


if __name__ == "__main__":
    sys.exit(main())
