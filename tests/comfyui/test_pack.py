"""What ComfyUI sees of the pack: cheap to import, every node explained."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest


REPOSITORY = Path(__file__).resolve().parents[2]
MODULES = sorted(p for p in (REPOSITORY / "comfy_nodes").glob("*.py") if not p.name.startswith("_"))
ALLOWED = {"torch", "comfy", "comfy_api", "comfy_extras", "comfy_execution", "__future__", *sys.stdlib_module_names}

# Run in a fresh interpreter, after what ComfyUI itself has imported by the time it reads packs.
_IMPORT_COST = """
import json, sys, time
sys.path[:0] = {paths!r}
import comfy.cli_args
comfy.cli_args.args.cpu = True
import nodes, comfy.sd, comfy_api.latest
before = set(sys.modules)
start = time.process_time()
import comfy_nodes
count = len(comfy_nodes.all_nodes())
seconds = time.process_time() - start
print(json.dumps({{"seconds": seconds, "nodes": count, "new": sorted(set(sys.modules) - before)}}))
"""


def test_import_adds_little_and_no_heavy_library(comfyui_dir):
    script = _IMPORT_COST.format(paths=[str(comfyui_dir), str(REPOSITORY)])
    for _ in range(2):  # the first may have to compile the modules
        done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
    cost = json.loads(done.stdout.strip().splitlines()[-1])
    heavy = {"diffusers", "transformers", "peft", "accelerate", "diffusers_ext"}
    assert not [m for m in cost["new"] if m.split(".")[0] in heavy]
    assert cost["nodes"] > 0
    assert cost["seconds"] < 0.3


def _module_level_imports(path: Path) -> set[str]:
    """Root packages imported when the module is, following relative imports inside the folder."""
    roots = set()
    for node in ast.walk(_without_functions(ast.parse(path.read_text(encoding="utf-8")))):
        if isinstance(node, ast.Import):
            roots |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            roots.add(node.module.split(".")[0])
        elif isinstance(node, ast.ImportFrom):
            names = [node.module] if node.module else [alias.name for alias in node.names]
            for name in names:
                roots |= _module_level_imports(path.parent / f"{name}.py")
    return roots


def _without_functions(tree: ast.Module) -> ast.Module:
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            node.body = []
    return tree


@pytest.mark.parametrize("path", MODULES, ids=lambda p: p.stem)
def test_node_modules_import_only_torch_and_comfyui(path):
    assert _module_level_imports(path) <= ALLOWED


def test_node_ids_are_prefixed_and_unique(comfy):
    import comfy_nodes

    ids = [node.define_schema().node_id for node in comfy_nodes.all_nodes()]
    assert len(ids) == len(set(ids))
    assert all(i.startswith("DX") for i in ids)


def _tooltips_missing(slots) -> list[str]:
    return [s.id or s.display_name or type(s).__qualname__ for s in slots if not s.tooltip]


def test_every_node_explains_itself(dx_nodes):
    missing = {}
    for node_id, node in dx_nodes.items():
        schema = node.define_schema()
        lacks = [f"tooltip of {name}" for name in _tooltips_missing([*schema.inputs, *schema.outputs])]
        lacks += [t for t in ("display_name", "description", "search_aliases") if not getattr(schema, t)]
        if not schema.category.startswith("diffusers-ext/"):
            lacks.append("category diffusers-ext/<family>")
        if not (REPOSITORY / f"comfy_nodes/web/docs/{node_id}.md").is_file():
            lacks.append(f"comfy_nodes/web/docs/{node_id}.md")
        if lacks:
            missing[node_id] = lacks
    assert not missing


def test_help_pages_belong_to_nodes(dx_nodes):
    pages = {p.stem for p in (REPOSITORY / "comfy_nodes/web/docs").glob("*.md")}
    assert pages <= set(dx_nodes)
