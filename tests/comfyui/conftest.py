"""ComfyUI for tests: in process on small native models, as a real server, and as the real page in Chromium.

Everything skips, with the reason, where ComfyUI or Chromium is absent; `make test` installs both.
"""

from __future__ import annotations

import functools
import importlib
import os
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest


REPOSITORY = Path(__file__).resolve().parents[2]
COMFYUI = Path(os.environ.get("COMFYUI_DIR", REPOSITORY / ".comfy/ComfyUI")).resolve()
BROWSER = Path(os.environ.get("BROWSER_DIR", REPOSITORY / ".comfy/browser")).resolve()
CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium")


def pytest_collection_modifyitems(items):
    """One server for all tests that use it: they stay on one xdist worker."""
    for item in items:
        if {"server", "open_in_browser"} & set(getattr(item, "fixturenames", ())):
            item.add_marker(pytest.mark.xdist_group("comfyui-server"))


@pytest.fixture(scope="session")
def comfyui_dir() -> Path:
    """Folder of the ComfyUI checkout."""
    if not (COMFYUI / "main.py").is_file():
        pytest.skip(f"no ComfyUI at {COMFYUI}: run `make .venv/.comfyui` or set COMFYUI_DIR")
    return COMFYUI


@pytest.fixture(scope="session")
def comfy(comfyui_dir):
    """ComfyUI's modules imported in this process, on the CPU: `comfy.samplers`, `comfy.nodes`, ..."""
    for folder in (REPOSITORY, comfyui_dir):
        if str(folder) not in sys.path:
            sys.path.append(str(folder))
    importlib.import_module("comfy.cli_args").args.cpu = True
    names = ("samplers", "sample", "utils", "model_management", "model_sampling", "model_patcher", "patcher_extension")
    modules = {name: importlib.import_module(f"comfy.{name}") for name in names}
    return SimpleNamespace(nodes=importlib.import_module("nodes"), **modules)


@pytest.fixture(scope="session")
def dx_nodes(comfy) -> dict:
    """Every node of the pack by its id."""
    return {node.define_schema().node_id: node for node in importlib.import_module("comfy_nodes").all_nodes()}


@pytest.fixture(scope="session")
def native_pipe(comfy):
    """`native_pipe(name)` -> (model, clip, vae) of a shipped model in ComfyUI's own classes.

    Nodes patch clones, so that tests may share them.
    """
    shapes = importlib.import_module("comfy_nodes._shapes")
    return functools.cache(lambda name: (shapes.load_model(name), shapes.load_clip(name), shapes.load_vae(name)))


@pytest.fixture(scope="session")
def encode():
    """`encode(clip, text)` -> conditioning, as the core node CLIPTextEncode makes it."""
    return lambda clip, text: clip.encode_from_tokens_scheduled(clip.tokenize(text), show_pbar=False)


@pytest.fixture(scope="session")
def server(comfyui_dir, tmp_path_factory):
    """A running ComfyUI with this repository as its only pack; `.client`, `.object_info`, `.models`, `.log`."""
    from diffusers_ext.comfy_client import ComfyClient, start_server

    base = tmp_path_factory.mktemp("comfyui")
    log = base / "server.log"
    with start_server(
        comfyui_dir, base_directory=base, pack=REPOSITORY, log=log, arguments=["--disable-api-nodes"]
    ) as running:
        assert "IMPORT FAILED" not in log.read_text(errors="replace"), log.read_text(errors="replace")
        # The picture that core's LoadImage shows by default.
        shutil.copy(comfyui_dir / "input/example.png", base / "input")
        client = ComfyClient(running.url)
        yield SimpleNamespace(
            url=running.url, client=client, object_info=client.object_info(), log=log, models=base / "models"
        )


@pytest.fixture(scope="session")
def open_in_browser(server):
    """`open_in_browser(jobs)` -> results of `scripts/frontend.mjs` on the real page (see there for jobs)."""
    if CHROMIUM is None:
        pytest.skip("no chromium on the PATH: the page is not opened (apt-get install chromium)")
    if shutil.which("node") is None or not (BROWSER / "node_modules/playwright-core").is_dir():
        pytest.skip(f"no node or no playwright-core in {BROWSER}: run `make .venv/.browser`")
    spec = importlib.util.spec_from_file_location("author_workflow", REPOSITORY / "scripts/author_workflow.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    os.environ["BROWSER_DIR"] = str(BROWSER)
    return lambda jobs: list(module.run_jobs(server.url, jobs))


@pytest.fixture(scope="session")
def picture_flaw():
    """`picture_flaw(image)` -> why an image [3, h, w] in [0, 1] is no picture, or None.

    Two numbers tell: the spread of the pixels around their mean colour, and the share of neighbouring pixels whose
    colours differ by less than 0.02. Measured: scenes of the shapes world and generated pictures have a spread from
    0.14 and a share from 0.5; a decoded zero latent 0.06 and 0.8; decoded noise 0.15 and 0.13; noisy pixels 0.29
    and 0.00. `test_workflows.py` holds all of these against the two limits.
    """

    def flaw(image) -> str | None:
        spread = (image - image.mean((1, 2), keepdim=True)).pow(2).mean().sqrt().item()
        steps = [(image[:, :, 1:] - image[:, :, :-1]), (image[:, 1:] - image[:, :-1])]
        flat = sum((s.abs().amax(0) < 0.02).sum().item() for s in steps) / sum(s[0].numel() for s in steps)
        if spread < 0.1:
            return f"blank: spread {spread:.3f}"
        return f"noise: only {flat:.2f} of the neighbouring pixels agree" if flat < 0.3 else None

    return flaw
