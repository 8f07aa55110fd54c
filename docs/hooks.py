"""What the site, the README and the tests derive from the catalogue: tables, the methods index, pages, the menu.

MkDocs loads this file as a hook. `python docs/hooks.py` rewrites the generated part of README.md.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

from diffusers import SchedulerMixin
from diffusers.guiders import BaseGuidance
from mkdocs.structure.files import File

import diffusers_ext
from diffusers_ext import zoo
from diffusers_ext.apply import MethodConfig
from diffusers_ext.registry import MethodRecord, get_method, list_methods, public_names


ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "docs"))

import api  # noqa: E402


MARKER = re.compile(r"<!-- (record|bench|joint|cards|workflows):?([\w.-]*) -->")
README_TABLE = re.compile(r"(<!-- methods -->\n).*?(<!-- /methods -->)", re.DOTALL)
REPOSITORY = "https://github.com/diffusers-ext/diffusers-ext/blob/main/"


def table(columns: list[str], rows: list[list[str]]) -> str:
    """Markdown table; a pipe inside a cell is escaped."""
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(str(c).replace("|", "\\|") for c in line) + " |" for line in lines)


def methods_table(link: str = "{slug}.md") -> str:
    """All methods with what they give. `link` is the address of a method's page."""
    rows = [
        [f"[{r.slug}]({link.format(slug=r.slug)})", r.summary, ", ".join(r.targets), f"[{r.title}]({r.paper_url})"]
        for r in list_methods()
    ]
    return table(["Method", "What you get", "Models", "Paper"], rows)


def door(record: MethodRecord) -> str:
    """How the public class of a method enters a pipeline, as one line of code."""
    public, name = record.public, f"diffusers_ext.{record.public.__name__}"
    if issubclass(public, MethodConfig):
        return f"handle = diffusers_ext.apply(pipe, {name}())"
    if issubclass(public, SchedulerMixin):
        return f"pipe.scheduler = {name}.from_config(pipe.scheduler.config)"
    if issubclass(public, BaseGuidance):
        return f"modular_pipe.update_components(guider={name}())"
    if hasattr(public, "attach") and hasattr(public, "from_pretrained"):
        return f"handle = {name}.from_pretrained(path).attach(pipe)"
    return f"pipe = {name}.from_pipe(pipe)" if hasattr(public, "from_pipe") else f"{name}(...)"


def facts(record: MethodRecord) -> str:
    """Facts table of a method page."""
    nodes = ", ".join(f"[{node}](../nodes/{node}.md)" for node in record.nodes)
    rows = [
        ["Paper", f"[{record.title}]({record.paper_url})"],
        ["Use", f"`{door(record)}`"],
        ["Models", ", ".join(record.targets)],
        ["Predictions", ", ".join(f"`{p}`" for p in record.predictions)],
        ["Not together with", ", ".join(f"[{s}]({s}.md)" for s in record.conflicts) or "no known conflict"],
        ["ComfyUI nodes", nodes],
        ["Workflow", f"[{record.slug}.json](../workflows/{record.slug}.json)"],
        ["The paper's headline", str(record.claim)],
        ["Code", f"[{record.module}]({REPOSITORY}{record.module.replace('.', '/')}.py)"],
    ]
    screenshot = ROOT / "docs" / "assets" / "workflows" / f"{record.slug}.png"
    picture = f"\n\n![{record.slug} in ComfyUI](../assets/workflows/{record.slug}.png)" if screenshot.is_file() else ""
    return table(["", ""], rows) + picture


def _result(name: str) -> dict[str, Any]:
    path = ROOT / "benchmarks" / "results" / f"{name}.json"
    if not path.is_file():
        raise FileNotFoundError(f"{name} has no benchmark result: run `diffusers-ext bench {name}`")
    return json.loads(path.read_text(encoding="utf-8"))


def _source(name: str, environment: dict[str, Any]) -> str:
    machine = ", ".join(f"{key} {value}" for key, value in environment.items())
    return f"<small>Measured by `diffusers-ext bench {name}`: {machine}.</small>"


def measured(record: MethodRecord) -> str:
    """Table of `benchmarks/results/<slug>.json` with the machine it was measured on, beside the paper's claim."""
    result = _result(record.slug)
    picture = f"![{record.slug}, measured](../assets/methods/{record.slug}.png)\n\n"
    return (
        f"{picture}{table(result['columns'], result['rows'])}\n\n{result['notes']}\n\n"
        f"The paper reports: {record.claim}.\n\n"
        f"{_source(record.slug, result['environment'])}"
    )


def joint(name: str) -> str:
    """What a comparison of many methods found: notes, picture, table, machine."""
    result = _result(name)
    rows = table(result["columns"], result["rows"])
    picture = f"![{name}, measured](assets/{name}.png)"
    return f"{result['notes']}\n\n{picture}\n\n{rows}\n\n{_source(name, result['environment'])}"


def card(model: str) -> str:
    """The model card of a shipped model, its headings one level deeper."""
    text = (ROOT / "diffusers_ext" / "zoo" / "weights" / model / "README.md").read_text(encoding="utf-8")
    return re.sub(r"^#", "##", re.sub(r"\A---\n.*?\n---\n", "", text, flags=re.DOTALL), flags=re.MULTILINE)


def workflows() -> str:
    """Every shipped workflow, with its picture."""
    titles = {r.slug: f"[{r.slug}](methods/{r.slug}.md): {r.summary}" for r in list_methods()}
    items = []
    for path in sorted((ROOT / "workflows").glob("*.json")):
        picture = f"[![{path.stem}](workflows/{path.stem}.jpg)](workflows/{path.name})\n\n"
        picture = picture if path.with_suffix(".jpg").is_file() else ""
        title = titles.get(path.stem, path.stem)
        items.append(f"{picture}{title}. [Download](workflows/{path.name}){{ download }}")
    return "\n\n".join(items)


def methods_index() -> str:
    by_family: dict[str, list[MethodRecord]] = {}
    for record in list_methods():
        by_family.setdefault(record.family, []).append(record)
    menu = "\n".join(f"- **{f}**: " + ", ".join(f"[{r.slug}]({r.slug}.md)" for r in rs) for f, rs in by_family.items())
    return f"# Methods\n\n{methods_table()}\n\n## By family\n\n{menu}\n"


def gallery() -> str:
    figures = "\n".join(
        f"<figure markdown='span'>[![{r.slug}](assets/methods/{r.slug}.png)](methods/{r.slug}.md)"
        f"<figcaption>{r.slug}: {r.summary}</figcaption></figure>"
        for r in list_methods()
        if (ROOT / "docs" / "assets" / "methods" / f"{r.slug}.png").is_file()
    )
    return (
        "# Gallery\n\nEvery picture is drawn by `diffusers-ext bench` with the models of this package.\n\n"
        f'<div class="gallery" markdown>\n{figures}\n</div>\n'
    )


def api_pages() -> dict[str, str]:
    """One API page per module that has public names."""
    modules: dict[str, list[str]] = {}
    for name, module in public_names().items():
        modules.setdefault(module, []).append(name)
    return {f"api/{m.removeprefix('diffusers_ext.')}.md": api.page(m, names) for m, names in modules.items()}


def generated_pages() -> dict[str, str]:
    """Pages that exist only on the site: path -> Markdown."""
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    contributing = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    helps = {f"nodes/{p.stem}.md": p.read_text(encoding="utf-8") for p in (ROOT / "comfy_nodes/web/docs").glob("*.md")}
    return {
        "methods/index.md": methods_index(),
        "gallery.md": gallery(),
        "changelog.md": changelog,
        "contributing.md": contributing,
        **helps,
        **api_pages(),
    }


def _menu(pages: dict[str, str]) -> list[dict[str, Any]]:
    methods = ["methods/index.md", *(f"methods/{r.slug}.md" for r in list_methods())]
    titled = lambda prefix: [{Path(p).stem: p} for p in sorted(pages) if p.startswith(prefix)]  # noqa: E731
    return [{"Methods": methods}, {"Gallery": "gallery.md"}, {"Nodes": titled("nodes/")}, {"API": titled("api/")}]


def on_config(config: Any) -> Any:
    """Add the generated sections to the menu, after the hand-written guide pages."""
    config.nav = [*config.nav[:-3], *_menu(generated_pages()), *config.nav[-3:]]
    return config


def on_files(files: Any, config: Any) -> Any:
    """Add the generated pages, and the workflows so that a reader can download them."""
    for path, text in generated_pages().items():
        files.append(File.generated(config, path, content=text))
    for workflow in sorted((ROOT / "workflows").glob("*.jp*g")) + sorted((ROOT / "workflows").glob("*.json")):
        files.append(File.generated(config, f"workflows/{workflow.name}", abs_src_path=str(workflow)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Replace `<!-- record:slug -->` and the other markers by what the catalogue and the results say."""
    if page.file.src_uri == "contributing.md":  # shows the markers to people
        return markdown
    render = {
        "record": lambda slug: facts(get_method(slug)),
        "bench": lambda slug: measured(get_method(slug)),
        "joint": joint,
        "cards": lambda _: "\n\n".join(card(model) for model in zoo.names()),
        "workflows": lambda _: workflows(),
    }
    return MARKER.sub(lambda match: render[match[1]](match[2]), markdown)


def readme() -> str:
    """README.md with a current table of methods."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    rows = methods_table("docs/methods/{slug}.md")
    return README_TABLE.sub(lambda match: f"{match[1]}{rows}\n{match[2]}", text)


if __name__ == "__main__":
    (ROOT / "README.md").write_text(readme(), encoding="utf-8")
    print(f"README.md lists {len(list_methods())} methods of diffusers-ext {diffusers_ext.__version__}")
