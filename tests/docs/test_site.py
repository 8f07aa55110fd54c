"""The site: a strict build, generated tables, and every Python example run as printed."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from diffusers_ext.registry import list_methods


ROOT = Path(__file__).resolve().parents[2]
FENCE = re.compile(r"^([ \t]*)```python[^\n]*\n(.*?)^\1```", re.MULTILINE | re.DOTALL)
SKIP = "<!-- no-exec -->"
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), *sorted((ROOT / "docs" / "methods").glob("*.md"))]


def python_blocks(text: str) -> list[str]:
    """Python examples of a page in order; a block right under the skip marker is left out."""
    kept = (m for m in FENCE.finditer(text) if not text[: m.start()].rstrip().endswith(SKIP))
    return [textwrap.dedent(match[2]) for match in kept]


@pytest.fixture(scope="session")
def hooks():
    pytest.importorskip("mkdocs", reason="the docs extra is not installed: pip install -e .[docs]")
    sys.path.insert(0, str(ROOT / "docs"))
    try:
        import hooks
    finally:
        sys.path.remove(str(ROOT / "docs"))
    return hooks


@pytest.fixture(scope="session")
def site(hooks, tmp_path_factory) -> Path:
    """The whole site, built in strict mode."""
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stdout + result.stderr
    return folder


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_python_examples_run(page, tmp_path, monkeypatch):
    """All blocks of a page share one namespace, in a folder of their own."""
    blocks = python_blocks(page.read_text(encoding="utf-8"))
    if not blocks:
        pytest.skip("no Python on this page")
    monkeypatch.chdir(tmp_path)
    namespace: dict = {"__name__": "__main__"}
    for number, block in enumerate(blocks, 1):
        exec(compile(block, f"{page.name} block {number}", "exec"), namespace)


def test_block_finder():
    marked = f"```python\na\n```\n\n{SKIP}\n```python\nb\n```\n"
    indented = "    ```python title='x'\n    c\n    ```\n```bash\nd\n```\n"
    assert python_blocks(marked + indented) == ["a\n", "c\n"]


def test_site_has_every_page(site):
    guides = [path.stem for path in (ROOT / "docs").glob("*.md") if path.stem != "index"]
    for page in (".", "methods", "gallery", "contributing", "changelog", *guides):
        assert (site / page / "index.html").is_file(), page


@pytest.mark.parametrize("record", list_methods(), ids=lambda r: r.slug)
def test_method_page_shows_facts_and_measurements(site, record):
    page = (site / "methods" / record.slug / "index.html").read_text(encoding="utf-8")
    assert record.paper_url in page and record.public.__name__ in page
    assert f"../../workflows/{record.slug}.json" in page and f"assets/methods/{record.slug}.png" in page
    result = json.loads((ROOT / "benchmarks" / "results" / f"{record.slug}.json").read_text(encoding="utf-8"))
    assert all(str(column) in page for column in result["columns"])
    assert "<!-- record:" not in page and "<!-- bench:" not in page
    assert json.loads((site / "workflows" / f"{record.slug}.json").read_text())["nodes"]
    for node in record.nodes:
        assert (site / "nodes" / node / "index.html").is_file()


@pytest.mark.parametrize("record", list_methods(), ids=lambda r: r.slug)
def test_method_page_has_facts_measurements_and_an_example(record):
    text = (ROOT / record.docs).read_text(encoding="utf-8")
    assert f"<!-- record:{record.slug} -->" in text and f"<!-- bench:{record.slug} -->" in text
    assert python_blocks(text), "an example that runs"


def test_solvers_page_compares_every_scheduler(hooks, site):
    """The rows come from the catalogue; Markdown and picture from the filed result."""
    page = (site / "solvers" / "index.html").read_text(encoding="utf-8")
    result = json.loads((ROOT / "benchmarks" / "results" / "solvers.json").read_text(encoding="utf-8"))
    assert "assets/solvers.png" in page and "<!-- joint:" not in page
    assert all(row[2] in page for row in result["rows"])
    assert {"DDIM", "DPM++ 2M", "DPM++ 2M Karras", "UniPC", "DEIS multistep", "Euler", "Heun"} <= {
        row[2] for row in result["rows"] if row[0] == "shapes-unet"
    }
    assert hooks.joint("solvers").count("\n| ") >= len(result["rows"])


def test_caches_page_shows_the_frontier(hooks, site):
    page = (site / "caches" / "index.html").read_text(encoding="utf-8")
    result = json.loads((ROOT / "benchmarks" / "results" / "frontier.json").read_text(encoding="utf-8"))
    assert "assets/frontier.png" in page and "<!-- joint:" not in page
    ours = {row[2].split(",")[0] for row in result["rows"] if row[1] == "diffusers-ext"}
    on_shapes = [r for r in list_methods(kind="cache") if {"unet", "dit", "mmdit", "any"} & set(r.targets)]
    assert ours == {r.slug for r in on_shapes}
    assert {"DeepCache (PyPI)", "tomesd", "cache-dit", "diffusers", "-"} <= {row[1] for row in result["rows"]}


def test_index_lists_every_method(site):
    page = (site / "methods" / "index.html").read_text(encoding="utf-8")
    assert all(f"../methods/{r.slug}/" in page or f'href="{r.slug}/"' in page for r in list_methods())


def test_readme_table_is_current(hooks):
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert hooks.readme() == text, "run `python docs/hooks.py`"
    assert all(f"docs/methods/{r.slug}.md" in text for r in list_methods())


def test_readme_links_exist():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    for link in re.findall(r"\]\((?!https?:|#)([^)#]+)", text):
        assert (ROOT / link).exists(), link


def test_a_pipe_in_a_cell_does_not_break_the_table(hooks):
    assert hooks.table(["a"], [["x|y"]]).splitlines()[-1] == r"| x\|y |"
