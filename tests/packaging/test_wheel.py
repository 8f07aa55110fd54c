"""The wheel: size, contents, and that it works on its own in a fresh process."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from diffusers_ext import zoo
from diffusers_ext.registry import list_methods


ROOT = Path(__file__).resolve().parents[2]
LIMIT = 40 * 2**20


@pytest.fixture(scope="session")
def wheel(tmp_path_factory) -> Path:
    """A wheel of the working tree."""
    pytest.importorskip("hatchling", reason="the dev extra is not installed: pip install -e .[dev]")
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", str(ROOT), "--no-deps", "--no-build-isolation", "-q", "-w"]
    result = subprocess.run([*command, str(folder)], capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="session")
def installed(wheel, tmp_path_factory) -> Path:
    """The wheel unpacked into a folder of its own, as `pip install --target` does."""
    folder = tmp_path_factory.mktemp("installed")
    command = [sys.executable, "-m", "pip", "install", "--no-deps", "-q", "--target", str(folder), str(wheel)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    return folder


def run_installed(folder: Path, cwd: Path, *arguments: str) -> subprocess.CompletedProcess:
    env = {**os.environ, "PYTHONPATH": str(folder)}
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, timeout=180, cwd=cwd, env=env)


def test_size(wheel):
    assert wheel.stat().st_size < LIMIT


def test_contents(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {"diffusers_ext/py.typed", "diffusers_ext/cli.py"} <= names
    for model in zoo.names():
        assert f"diffusers_ext/zoo/weights/{model}/model_index.json" in names
        assert f"diffusers_ext/zoo/weights/{model}/README.md" in names
    for record in list_methods():
        assert record.module.replace(".", "/") + ".py" in names
        assert f"diffusers_ext/_workflows/{record.slug}.json" in names
    top = {name.split("/")[0] for name in names}
    assert all(name == "diffusers_ext" or name.endswith(".dist-info") for name in top)
    assert not [name for name in names if name.endswith((".pt", ".ckpt", ".pkl", ".bin"))]


def test_license_and_metadata(wheel):
    archive = zipfile.ZipFile(wheel)
    (metadata,) = (archive.read(n).decode() for n in archive.namelist() if n.endswith("METADATA"))
    assert "Apache" in metadata and "Requires-Python: >=3.10" in metadata
    assert any(n.endswith("LICENSE") for n in archive.namelist())
    required = [line for line in metadata.splitlines() if line.startswith("Requires-Dist") and "extra" not in line]
    assert len(required) > 5 and all(">=" in line and "==" not in line for line in required), "lower bounds only"


def test_works_in_a_fresh_process(installed, tmp_path):
    code = (
        "import diffusers_ext; from diffusers_ext import zoo; print(diffusers_ext.__file__)\n"
        "for name in zoo.names(): print(zoo.generate(zoo.load(name), ['a red circle'], 2).shape)\n"
        "print(zoo.load_judge().accuracy(zoo.held_out(8).images, zoo.held_out(8).specs)['all'] > 0.5)"
    )
    result = run_installed(installed, tmp_path, "-c", code)
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    assert lines[0].startswith(str(installed))
    assert lines[1:] == ["torch.Size([1, 3, 64, 64])"] * len(zoo.names()) + ["True"]


def test_command_line_without_a_checkout(installed, tmp_path):
    result = run_installed(installed, tmp_path, "-m", "diffusers_ext.cli", "list")
    assert result.returncode == 0 and all(r.slug in result.stdout for r in list_methods())
    result = run_installed(installed, tmp_path, "-m", "diffusers_ext.cli", "bench", "deepcache")
    assert result.returncode == 1 and "clone" in result.stderr
    command = ["-m", "diffusers_ext.cli", "run", "deepcache", "--url", "http://127.0.0.1:9"]
    result = run_installed(installed, tmp_path, *command)
    assert result.returncode == 1 and "127.0.0.1:9" in result.stderr and "unknown workflow" not in result.stderr
