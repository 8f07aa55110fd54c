"""API pages from signatures and docstrings."""

from __future__ import annotations

import importlib
import inspect
import re
import textwrap
from collections.abc import Iterator
from typing import Any


SECTION = re.compile(r"^(Args|Attributes|Example|Examples|Limits|Raises|Returns|Yields): *(.*)$")
ENTRY = re.compile(r"^([*\w][\w ,.*`]*): +(.*)$")


def _sections(doc: str) -> Iterator[tuple[str, str]]:
    """(heading, body) of a docstring; the text before the first heading has an empty one."""
    heading, lines = "", []
    for line in inspect.cleandoc(doc).splitlines():
        match = SECTION.match(line)
        if match:
            yield heading, "\n".join(lines)
            heading, lines = match[1], ["    " + match[2]] if match[2] else []
        else:
            lines.append(line)
    yield heading, "\n".join(lines)


def _entries(body: str) -> str:
    """A list of `name: text` with wrapped lines as Markdown; plain text stays a paragraph."""
    items: list[str] = []
    for line in textwrap.dedent(body).splitlines():
        match = ENTRY.match(line)
        if match:
            names = ", ".join(f"`{name}`" for name in match[1].split(", "))
            items.append(f"- {names}: {match[2]}")
        elif line.strip():
            items.append(f"  {line.strip()}" if items else line)
    return "\n".join(items)


def docstring(doc: str) -> str:
    """A Google-style docstring as Markdown."""
    parts = []
    for heading, body in _sections(doc):
        if heading.startswith("Example"):
            parts.append(f"**Example**\n\n```python\n{textwrap.dedent(body).strip()}\n```")
        elif heading in ("Args", "Attributes", "Raises"):
            parts.append(f"**{heading}**\n\n{_entries(body)}")
        elif heading:
            parts.append(f"**{heading}**\n\n{textwrap.dedent(body).strip()}")
        else:
            parts.append(body.strip())
    return "\n\n".join(part for part in parts if part)


def signature(name: str, value: Any) -> str:
    """Signature in a code block, one argument per line where it is long."""
    try:
        parameters = inspect.signature(value).parameters.values()
    except (TypeError, ValueError):
        return ""
    shown = [str(p).replace("'", "") if p.default is p.empty else str(p) for p in parameters if p.name != "self"]
    line = f"{name}({', '.join(shown)})"
    if len(line) > 90:
        line = f"{name}(\n    " + ",\n    ".join(shown) + ",\n)"
    return f"```python\n{line}\n```"


def _members(cls: type) -> Iterator[tuple[str, Any]]:
    for name, member in vars(cls).items():
        function = member.__func__ if isinstance(member, (classmethod, staticmethod)) else member
        documented = function.__doc__ if callable(function) or isinstance(function, property) else None
        if not name.startswith("_") and documented and not inspect.isclass(function):
            yield name, function


def page(module: str, names: list[str]) -> str:
    """Markdown page of the public names of a module."""
    parts = [f"# {module}"]
    for name in names:
        value = getattr(importlib.import_module(module), name)
        parts += [f"## {name}", signature(name, value), docstring(value.__doc__)]
        for member, function in _members(value) if inspect.isclass(value) else ():
            shown = "" if isinstance(function, property) else signature(member, function)
            parts += [f"### {name}.{member}", shown, docstring(function.__doc__)]
    return "\n\n".join(part for part in parts if part) + "\n"
