"""`python benchmarks/run.py <slug|all|joint comparison>`: measure a method beside its peers and file the result.

With `--real-size` only the rows of networks of real size are measured again, and replace those in the method's file.

`benchmarks/<kind>.py` holds `bench(record, out_dir) -> dict` for every method of that kind, `benchmarks/<module>.py`
for one that this comparison does not fit:

    {"columns": [...], "rows": [[...], ...], "notes": "...", "picture": Path}

and may hold `real_size(record) -> rows` and `notes(record) -> str`, of which `bench` makes its own.

The runner adds the machine and writes `benchmarks/results/<slug>.json` and `docs/assets/methods/<slug>.png`. A joint
comparison, such as `benchmarks/solvers.py`, holds `bench(out_dir)` and its picture is `docs/assets/solvers.png`.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import json
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import ModuleType


ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks._common import environment, write_json  # noqa: E402
from diffusers_ext.registry import MethodRecord, get_method, list_methods  # noqa: E402


RESULTS = ROOT / "benchmarks" / "results"
ASSETS = ROOT / "docs" / "assets"
FIELDS = {"columns", "rows", "notes", "picture"}
JOINT = ("solvers", "frontier", "equal_quality", "forecasts", "calibrations", "adapters")


def module_of(record: MethodRecord) -> ModuleType:
    """The benchmark of a method."""
    own = record.module.rpartition(".")[2]
    name = own if (ROOT / "benchmarks" / f"{own}.py").is_file() else record.kind
    if not (ROOT / "benchmarks" / f"{name}.py").is_file():
        raise ValueError(f"no benchmark for methods of kind {name!r}: write benchmarks/{name}.py")
    return importlib.import_module(f"benchmarks.{name}")


def measure(record: MethodRecord) -> dict:
    """Run one method's benchmark and file its result."""
    return file_result(record.slug, functools.partial(module_of(record).bench, record), ASSETS / "methods")


def measure_real_size(record: MethodRecord) -> dict:
    """Measure the rows of networks of real size, which hold random weights, and keep the filed others."""
    module, path = module_of(record), RESULTS / f"{record.slug}.json"
    if not hasattr(module, "real_size") or not path.is_file():
        raise ValueError(f"{record.slug} has no rows of real size, or was never measured: run it without --real-size")
    filed, now = json.loads(path.read_text(encoding="utf-8")), environment()
    changed = [key for key in now.keys() - {"date"} if filed["environment"][key] != now[key]]
    if changed:
        raise ValueError(f"{record.slug} was measured with another {', '.join(sorted(changed))}: measure all of it")
    rows = list(module.real_size(record))
    kept = [row for row in filed["rows"] if "random weights" not in row[0]]
    filed = {**filed, "rows": kept + rows, "notes": module.notes(record)}
    write_json(path, filed)
    return filed


def compare(name: str) -> dict:
    """Run one joint comparison and file its result."""
    return file_result(name, importlib.import_module(f"benchmarks.{name}").bench, ASSETS)


def file_result(name: str, bench: Callable[[Path], dict], assets: Path) -> dict:
    """Run one benchmark and write its JSON and picture; nothing is written unless all of it succeeded."""
    with tempfile.TemporaryDirectory() as folder:
        result = bench(Path(folder))
        missing = FIELDS - set(result)
        if missing:
            raise ValueError(f"the benchmark of {name} returned no {', '.join(sorted(missing))}")
        assets.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(result["picture"], assets / f"{name}.png")
    kept = {key: result[key] for key in ("columns", "rows", "notes")}
    filed = {"slug": name, **kept, "environment": environment()}
    write_json(RESULTS / f"{name}.json", filed)
    return filed


def show(result: dict) -> None:
    """Print one result as a table."""
    lines = [result["columns"], *result["rows"]]
    widths = [max(len(str(line[i])) for line in lines) for i in range(len(lines[0]))]
    print(f"\n{result['slug']}")
    for line in lines:
        print("  " + "  ".join(str(cell).ljust(width) for cell, width in zip(line, widths)).rstrip())
    print(f"  {result['notes']}")


def main(argv: list[str] | None = None) -> int:
    """Measure one method, one joint comparison or all of both."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("slug", nargs="?", default="all", help=f"method, {', '.join(JOINT)}, or all (default)")
    parser.add_argument("--real-size", action="store_true", help="only the rows of networks of real size")
    args = parser.parse_args(argv)
    joint = [name for name in JOINT if args.slug in ("all", name)]
    records = list_methods() if args.slug == "all" else [] if joint else [get_method(args.slug)]
    for record in records:
        show(measure_real_size(record) if args.real_size else measure(record))
    for name in joint:
        show(compare(name))
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except ValueError as error:
        sys.exit(f"benchmarks: {error}")
