"""For every record: its docs page, workflow, node, help page, tests, benchmark result and picture exist and agree.

Nothing here is a second list: what is checked follows from the records.
"""

from __future__ import annotations

import ast
import json
from pathlib import Path

import pytest
from PIL import Image

from diffusers_ext.registry import list_methods


ROOT = Path(__file__).resolve().parents[2]
RECORDS = list_methods()
each_record = pytest.mark.parametrize("record", RECORDS, ids=lambda r: r.slug)


def node_classes(family: str) -> dict[str, str]:
    """node_id -> text of its module, for a family: `comfy_nodes/<family>.py` and `<family>_<slug>.py`."""
    found = {}
    for path in sorted((ROOT / "comfy_nodes").glob(f"{family}*.py")):
        text = path.read_text(encoding="utf-8")
        for cls in (n for n in ast.parse(text).body if isinstance(n, ast.ClassDef)):
            for call in (n for n in ast.walk(cls) if isinstance(n, ast.Call)):
                ids = [
                    k.value.value for k in call.keywords if k.arg == "node_id" and isinstance(k.value, ast.Constant)
                ]
                found.update(dict.fromkeys(ids, text))
    return found


@each_record
def test_docs_page(record):
    text = (ROOT / record.docs).read_text(encoding="utf-8")
    assert f"<!-- record:{record.slug} -->" in text and f"<!-- bench:{record.slug} -->" in text
    assert record.public.__name__ in text or record.slug in text
    assert len(text.split()) > 60


@each_record
def test_nodes_and_help_pages(record):
    known = node_classes(record.family)
    for node in record.nodes:
        assert node in known, f"no file comfy_nodes/{record.family}*.py defines {node}"
        assert f"diffusers-ext/{record.family}" in known[node]
        page = ROOT / "comfy_nodes" / "web" / "docs" / f"{node}.md"
        assert len(page.read_text(encoding="utf-8").split()) > 10


@each_record
def test_workflow(record):
    graph = json.loads((ROOT / record.workflow).read_text(encoding="utf-8"))
    types = {node["type"] for node in graph["nodes"]}
    assert types & set(record.nodes), f"{record.workflow} uses none of {record.nodes}"
    assert "SaveImage" in types
    notes = [str(n["widgets_values"]) for n in graph["nodes"] if n["type"] == "MarkdownNote"]
    assert notes and len(" ".join(notes)) > 40


@each_record
def test_workflow_picture(record):
    with Image.open((ROOT / record.workflow).with_suffix(".jpg")) as picture:
        assert min(picture.size) >= 128


@each_record
def test_test_file(record):
    name = f"test_{record.slug.replace('-', '_').replace('.', '_')}.py"
    text = (ROOT / "tests" / record.family / name).read_text(encoding="utf-8")
    assert text.count("def test_") >= 1


@each_record
def test_benchmark_result_and_picture(record):
    result = json.loads((ROOT / "benchmarks" / "results" / f"{record.slug}.json").read_text(encoding="utf-8"))
    assert result["slug"] == record.slug
    assert result["rows"] and all(len(row) == len(result["columns"]) for row in result["rows"])
    assert {"cpu", "torch", "diffusers", "threads", "date"} <= set(result["environment"])
    with Image.open(ROOT / "docs" / "assets" / "methods" / f"{record.slug}.png") as picture:
        assert min(picture.size) >= 128


def test_every_node_of_a_family_belongs_to_a_record():
    claimed = {node for record in RECORDS for node in record.nodes}
    for family in {record.family for record in RECORDS}:
        stray = set(node_classes(family)) - claimed
        assert not stray, f"no record names {stray}"


def test_every_docs_page_belongs_to_a_record():
    pages = {path.stem for path in (ROOT / "docs" / "methods").glob("*.md")}
    assert pages == {record.slug for record in RECORDS}
