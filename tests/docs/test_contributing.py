"""CONTRIBUTING.md is followed literally: its five files, in a copy of the repository, are a working method."""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest


ROOT = Path(__file__).resolve().parents[2]
BLOCK = re.compile(r'^(`{3,})\w+ title="([^"]+)"\n(.*?)^\1$', re.MULTILINE | re.DOTALL)
SLUG = "ab2"


def templates() -> dict[str, str]:
    """Path -> text of every file that the guide prints."""
    return {path: body for _, path, body in BLOCK.findall((ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8"))}


def run(copy: Path, *arguments: str) -> str:
    env = {**os.environ, "PYTHONPATH": str(copy), "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        [sys.executable, *arguments], cwd=copy, env=env, capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def copy(tmp_path_factory) -> Path:
    """The repository with the guide's files added, and nothing else."""
    folder = tmp_path_factory.mktemp("checkout")
    for name in ("diffusers_ext", "comfy_nodes", "workflows", "tests", "benchmarks", "docs"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("README.md", "CHANGELOG.md", "CONTRIBUTING.md", "mkdocs.yml", "pyproject.toml"):
        shutil.copy(ROOT / name, folder / name)
    for path, text in templates().items():
        assert not (folder / path).exists(), f"{path} must be new"
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text(text, encoding="utf-8")
    return folder


def test_the_guide_prints_five_parts():
    """Module, node (with its help page), workflow, docs page, tests: one heading each."""
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    assert re.findall(r"^### (\d)\.", text, re.MULTILINE) == list("12345")
    folders = {path.split("/")[0] for path in templates()}
    assert folders == {"diffusers_ext", "comfy_nodes", "workflows", "docs", "tests"}


def test_command_line_knows_it(copy):
    code = "import sys\nfrom diffusers_ext.cli import main\n"
    code += (
        f"main(['list', '--kind', 'scheduler']); main(['show', {SLUG!r}]); main(['check', {SLUG!r}, 'shapes-unet'])"
    )
    out = run(copy, "-c", code)
    assert f"\n{SLUG} " in out and "AB2Scheduler" in out and f"{SLUG} runs on shapes-unet" in out


def test_an_unsupported_model_is_refused_without_a_line_of_code(copy):
    code = f"from diffusers_ext.cli import main; assert main(['check', {SLUG!r}, 'shapes-dit']) == 1"
    run(copy, "-c", code)


def test_its_own_tests_pass(copy):
    out = run(copy, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"tests/schedulers/test_{SLUG}.py")
    assert "1 passed" in out


def test_generated_tests_pick_it_up(copy):
    """All but what the guide has commands draw: workflow picture, benchmark result."""
    wanted = f"{SLUG} and not picture and not benchmark and not shapes_dit"
    files = ["tests/common/test_registry.py", "tests/common/test_records.py", "tests/common/test_registration.py"]
    out = run(copy, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", wanted, *files)
    passed = int(re.search(r"(\d+) passed", out)[1])
    assert passed >= 8, out


def test_documentation_picks_it_up(copy):
    run(copy, "docs/hooks.py")
    assert f"[{SLUG}](docs/methods/{SLUG}.md)" in (copy / "README.md").read_text(encoding="utf-8")
    code = "import sys; sys.path.insert(0, 'docs'); import hooks; from diffusers_ext.registry import get_method\n"
    code += f"print(hooks.facts(get_method({SLUG!r}))); print(hooks.methods_index()); print(list(hooks.api_pages()))"
    out = run(copy, "-c", code)
    assert "DXAB2Sampler" in out and f"({SLUG}.md)" in out and f"api/schedulers.{SLUG}.md" in out


def test_docs_example_runs(copy):
    out = run(
        copy, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", f"examples and {SLUG}", "tests/docs/test_site.py"
    )
    assert "1 passed" in out


def test_node_imports_only_what_the_house_allows(copy):
    """torch, ComfyUI and the standard library at module level; our package inside `execute`."""
    (text,) = (body for path, body in templates().items() if path.startswith("comfy_nodes/") and path.endswith(".py"))
    top = [n for n in ast.parse(text).body if isinstance(n, (ast.Import, ast.ImportFrom))]
    modules = {n.module if isinstance(n, ast.ImportFrom) else n.names[0].name for n in top}
    assert {m.split(".")[0] for m in modules} <= {
        "__future__",
        "comfy",
        "comfy_api",
        "torch",
        *sys.stdlib_module_names,
    }
    assert "from diffusers_ext." in text


def test_printed_code_is_formatted(copy):
    files = [p for p in templates() if p.endswith(".py")]
    run(copy, "-m", "ruff", "check", *files)
    run(copy, "-m", "ruff", "format", "--check", *files)
