"""`python benchmarks/run.py <slug|all>`: measure a method beside its peers and file the result.

`benchmarks/<kind>.py` holds `bench(record, out_dir) -> dict` for every method of that kind, `benchmarks/<module>.py`
for one that this comparison does not fit:

    {"columns": [...], "rows": [[...], ...], "notes": "...", "picture": Path}

The runner adds the machine and writes `benchmarks/results/<slug>.json` and `docs/assets/methods/<slug>.png`.
"""

from __future__ import annotations

import argparse
import importlib
import shutil
import sys
import tempfile
from pathlib import Path


ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks._common import environment, write_json  # noqa: E402
from diffusers_ext.registry import MethodRecord, get_method, list_methods  # noqa: E402


RESULTS = ROOT / "benchmarks" / "results"
PICTURES = ROOT / "docs" / "assets" / "methods"
FIELDS = {"columns", "rows", "notes", "picture"}


def measure(record: MethodRecord) -> dict:
    """Run one benchmark and file its result; nothing is written unless all of it succeeded."""
    own = record.module.rpartition(".")[2]
    name = own if (ROOT / "benchmarks" / f"{own}.py").is_file() else record.kind
    if not (ROOT / "benchmarks" / f"{name}.py").is_file():
        raise ValueError(f"no benchmark for methods of kind {name!r}: write benchmarks/{name}.py")
    bench = importlib.import_module(f"benchmarks.{name}").bench
    with tempfile.TemporaryDirectory() as folder:
        result = bench(record, Path(folder))
        missing = FIELDS - set(result)
        if missing:
            raise ValueError(f"{name}.py returned no {', '.join(sorted(missing))} for {record.slug}")
        PICTURES.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(result["picture"], PICTURES / f"{record.slug}.png")
    kept = {key: result[key] for key in ("columns", "rows", "notes")}
    filed = {"slug": record.slug, **kept, "environment": environment()}
    write_json(RESULTS / f"{record.slug}.json", filed)
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
    """Measure one method or all of them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("slug", nargs="?", default="all", help="method, or all (default)")
    args = parser.parse_args(argv)
    for record in list_methods() if args.slug == "all" else [get_method(args.slug)]:
        show(measure(record))
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except ValueError as error:
        sys.exit(f"benchmarks: {error}")
