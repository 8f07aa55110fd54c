"""`python benchmarks/run.py <slug|all|joint comparison>`: measure a method beside its peers and file the result.

`benchmarks/<kind>.py` holds `bench(record, out_dir) -> dict` for every method of that kind, `benchmarks/<module>.py`
for one that this comparison does not fit:

    {"columns": [...], "rows": [[...], ...], "notes": "...", "picture": Path}

The runner adds the machine and writes `benchmarks/results/<slug>.json` and `docs/assets/methods/<slug>.png`. A joint
comparison, such as `benchmarks/solvers.py`, holds `bench(out_dir)` and its picture is `docs/assets/solvers.png`.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path


ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks._common import environment, write_json  # noqa: E402
from diffusers_ext.registry import MethodRecord, get_method, list_methods  # noqa: E402


RESULTS = ROOT / "benchmarks" / "results"
ASSETS = ROOT / "docs" / "assets"
FIELDS = {"columns", "rows", "notes", "picture"}
JOINT = ("solvers", "frontier", "calibrations", "adapters")


def measure(record: MethodRecord) -> dict:
    """Run one method's benchmark and file its result."""
    own = record.module.rpartition(".")[2]
    name = own if (ROOT / "benchmarks" / f"{own}.py").is_file() else record.kind
    if not (ROOT / "benchmarks" / f"{name}.py").is_file():
        raise ValueError(f"no benchmark for methods of kind {name!r}: write benchmarks/{name}.py")
    bench = importlib.import_module(f"benchmarks.{name}").bench
    return file_result(record.slug, functools.partial(bench, record), ASSETS / "methods")


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
    args = parser.parse_args(argv)
    joint = [name for name in JOINT if args.slug in ("all", name)]
    records = list_methods() if args.slug == "all" else [] if joint else [get_method(args.slug)]
    for record in records:
        show(measure(record))
    for name in joint:
        show(compare(name))
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except ValueError as error:
        sys.exit(f"benchmarks: {error}")
