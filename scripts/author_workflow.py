"""Turn a graph in API format into a shipped workflow: laid out by the real page, seeds fixed, with a note beside it.

usage: author_workflow.py GRAPH.json workflows/<slug>.json --note NOTE.md

Needs what `make .venv/.browser .venv/.comfyui` installs.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

from diffusers_ext.comfy_client import start_server


REPOSITORY = Path(__file__).resolve().parent.parent
COMFYUI = Path(os.environ.get("COMFYUI_DIR", REPOSITORY / ".comfy/ComfyUI"))


FOLDERS = {
    "CheckpointLoaderSimple": "checkpoints",
    "UNETLoader": "diffusion_models",
    "CLIPLoader": "text_encoders",
    "DualCLIPLoader": "text_encoders",
    "VAELoader": "vae",
    "LoraLoader": "loras",
    "LoraLoaderModelOnly": "loras",
    "ControlNetLoader": "controlnet",
    "DXEasyControlLoader": "diffusers_ext_adapters",
    "DXCtrlAdapterLoader": "diffusers_ext_adapters",
    "DXSCTunerLoader": "diffusers_ext_adapters",
    "DXCSCTunerApply": "diffusers_ext_adapters",
}


def provide_model_names(models: Path, workflows: Iterable[dict]) -> None:
    """Create empty files under the names that loaders mention, or the page would report missing models."""
    shipped = {path.name for path in (REPOSITORY / "diffusers_ext/zoo/weights/adapters").iterdir()}
    for workflow in workflows:
        nodes = workflow["nodes"] if "nodes" in workflow else workflow.values()
        for node in nodes:
            folder = models / FOLDERS.get(node.get("type") or node.get("class_type"), "")
            values = node["inputs"].values() if "class_type" in node else node.get("widgets_values") or []
            for name in values if folder != models else ():
                if isinstance(name, str) and name.endswith(".safetensors") and name not in shipped:
                    (folder / name).parent.mkdir(parents=True, exist_ok=True)
                    (folder / name).touch()


def run_jobs(url: str, jobs: list[dict]) -> Iterator[dict]:
    """Hand jobs to `frontend.mjs` and yield its results as they come (see there for both)."""
    process = subprocess.Popen(
        ["node", REPOSITORY / "scripts/frontend.mjs", url],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={"BROWSER_DIR": str(REPOSITORY / ".comfy/browser"), **os.environ},
    )
    with process:
        process.stdin.write(json.dumps(jobs))
        process.stdin.close()
        yield from (json.loads(line) for line in process.stdout)
    if process.returncode:
        raise RuntimeError(f"frontend.mjs ended with status {process.returncode}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("graph", type=Path, help="API-format JSON")
    parser.add_argument("workflow", type=Path, help="file to write")
    parser.add_argument("--note", type=Path, required=True, help="Markdown file that explains the workflow")
    parser.add_argument("--test", type=json.loads, help="what stands in for what in the tests, see scripts/README.md")
    parser.add_argument("--screenshot", type=Path, help="PNG of the result")
    args = parser.parse_args()
    job = {
        "name": args.workflow.stem,
        "workflow": json.loads(args.graph.read_text(encoding="utf-8")),
        "save": str(args.workflow),
        "note": args.note.read_text(encoding="utf-8"),
    }
    if args.test:
        job["extra"] = {"diffusers_ext": args.test}
    if args.screenshot:
        job["screenshot"] = str(args.screenshot)
    with tempfile.TemporaryDirectory() as base:
        log = Path(base) / "server.log"
        provide_model_names(Path(base) / "models", [job["workflow"]])
        with start_server(
            COMFYUI, base_directory=base, pack=REPOSITORY, log=log, arguments=["--disable-api-nodes"]
        ) as server:
            problems = [p for result in run_jobs(server.url, [job]) for p in result["problems"]]
    print("\n".join(problems) or f"wrote {args.workflow}")
    return bool(problems)


if __name__ == "__main__":
    sys.exit(main())
