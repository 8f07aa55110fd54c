"""The catalogue: one record per method, written beside the method, read by everything else."""

from __future__ import annotations

import difflib
import functools
import importlib
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar


Kind = Literal[
    "scheduler", "cache", "attention", "adapter", "quantizer", "guider", "pipeline", "training", "model", "tool"
]

__all__ = ["Claim", "MethodRecord", "register", "list_methods", "get_method"]

_PACKAGE = Path(__file__).parent
_ALL = re.compile(r"^__all__ = \[(.*?)\]", re.MULTILINE | re.DOTALL)
_RECORDS: dict[str, MethodRecord] = {}
_T = TypeVar("_T", bound=type)


@dataclass(frozen=True)
class Claim:
    """The paper's headline: what was measured, where, and the number, if there is one.

    Args:
        text: What the paper says.
        setting: Where it was measured or shown.
        value: The number; None where the paper gives no figure.
        unit: Of the number.
    """

    text: str
    setting: str
    value: float | None = None
    unit: str = ""

    def __post_init__(self) -> None:
        if (self.value is None) != (not self.unit):
            raise ValueError(f"a claim needs a value with its unit or neither, got {self.value!r} and {self.unit!r}")

    def __str__(self) -> str:
        return f"{self.text}{'' if self.value is None else f': {self.value:g} {self.unit}'} ({self.setting})"


@dataclass(frozen=True)
class MethodRecord:
    """Everything the catalogue knows about one method.

    Args:
        slug: Unique name, e.g. `"deepcache"`; also names the module, docs page, workflow and test file.
        family: Folder of `diffusers_ext` that holds the module.
        kind: Door the method enters through (see `Kind`).
        title: Title of the paper.
        arxiv: arXiv number, or the DOI where there is none.
        summary: One line: what a user gets.
        targets: Denoisers it works on: `"unet"`, `"dit"`, `"mmdit"`, `"video"`, `"any"`.
        predictions: Prediction types it supports: `"epsilon"`, `"v_prediction"`, `"sample"`, `"flow_prediction"`.
        nodes: ComfyUI node ids.
        claim: The paper's headline.
        conflicts: Slugs that cannot be active on the same model.
    """

    slug: str
    family: str
    kind: Kind
    title: str
    arxiv: str
    summary: str
    targets: tuple[str, ...]
    predictions: tuple[str, ...]
    nodes: tuple[str, ...]
    claim: Claim
    conflicts: tuple[str, ...] = ()
    public: Any = None  # the decorated class

    @property
    def module(self) -> str:
        return f"diffusers_ext.{self.family}.{self.slug.replace('-', '_').replace('.', '_')}"

    @property
    def paper_url(self) -> str:
        prefix = "https://doi.org/" if self.arxiv.startswith("10.") else "https://arxiv.org/abs/"
        return prefix + self.arxiv

    @property
    def workflow(self) -> str:
        return f"workflows/{self.slug}.json"

    @property
    def docs(self) -> str:
        return f"docs/methods/{self.slug}.md"


def register(record: MethodRecord):
    """Class decorator that files `record` in the catalogue and binds it to the class as `cls.method`.

    The class is the method's public entry: a scheduler, a config for `apply`, an adapter or a pipeline.
    """

    def bind(cls: _T) -> _T:
        if cls.__module__ == record.module:
            known = _RECORDS.get(record.slug)
            if known is not None and known.public.__qualname__ != cls.__qualname__:
                raise ValueError(f"method {record.slug!r} is registered twice: {known.public} and {cls}")
        elif cls.__module__.startswith("diffusers_ext."):
            raise ValueError(f"{cls.__module__} registers {record.slug!r}, whose module must be {record.module}")
        bound = MethodRecord(**{**record.__dict__, "public": cls})
        _RECORDS[record.slug] = bound
        cls.method = bound  # type: ignore[attr-defined]
        return cls

    return bind


def _method_modules() -> Iterable[Path]:
    """Modules of the families; `zoo` and `eval` serve the methods and hold none."""
    files = (p for p in sorted(_PACKAGE.glob("*/*.py")) if p.parent.name not in ("zoo", "eval"))
    return (p for p in files if not p.name.startswith("_"))


@functools.cache
def public_names() -> dict[str, str]:
    """Public name -> module, read from the `__all__` of the core and method modules without importing any."""
    names: dict[str, str] = {}
    for path in [_PACKAGE / "registry.py", _PACKAGE / "apply.py", *_method_modules()]:
        match = _ALL.search(path.read_text(encoding="utf-8"))
        module = ".".join(path.relative_to(_PACKAGE.parent).with_suffix("").parts)
        for name in re.findall(r"[\"'](\w+)[\"']", match.group(1)) if match else ():
            if name in names:
                raise ImportError(f"public name {name!r} is defined in both {names[name]} and {module}")
            names[name] = module
    return names


def list_methods(family: str | None = None, kind: str | None = None) -> list[MethodRecord]:
    """All methods, sorted by slug.

    Args:
        family: Keep only this family, e.g. `"caching"`.
        kind: Keep only this kind, e.g. `"scheduler"`.

    Example:
        >>> import diffusers_ext
        >>> "deepcache" in [m.slug for m in diffusers_ext.list_methods(kind="cache")]
        True
    """
    for path in _method_modules():
        if "@register(" in path.read_text(encoding="utf-8"):
            importlib.import_module(f"diffusers_ext.{path.parent.name}.{path.stem}")
    chosen = (r for r in _RECORDS.values() if family in (None, r.family) and kind in (None, r.kind))
    return sorted(chosen, key=lambda r: r.slug)


def get_method(slug: str) -> MethodRecord:
    """The record of one method. Unknown names raise `ValueError` with the nearest known one."""
    records = {r.slug: r for r in list_methods()}
    if slug not in records:
        raise ValueError(unknown("method", slug, records))
    return records[slug]


def unknown(what: str, given: str, known: Iterable[str]) -> str:
    """Message for an unknown name: what was given, the nearest match, and what is accepted."""
    known = sorted(known)
    near = difflib.get_close_matches(str(given).lower(), known, n=1, cutoff=0.5)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    return f"unknown {what} {given!r}.{hint} Known: {', '.join(known)}"
