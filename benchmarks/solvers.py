"""All schedulers side by side: how near 5 to 15 model calls come to the converged solution, and what a judge reads.

diffusers' own solvers and every scheduler of the catalogue run on the same noise, guided model and number of model
calls. Model, loop, peers and variants are those of `benchmarks/scheduler.py`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks import scheduler as bench_scheduler
from benchmarks.scheduler import Bed, NoSuchSteps, Outcome, judge, make_bed, outcome, peer, run, variants
from diffusers_ext.registry import list_methods


CALLS = (5, 6, 8, 10, 15)
PICTURES = 16
MODELS = ("shapes-unet", "shapes-dit")
REFERENCE_CALLS = {"UniPC": 200, "DDIM": 1000, "Euler": 1000}  # Euler's steps are DDIM's for flow models
CHECKED_PICTURES = 2
OURS, THEIRS = "diffusers-ext", "diffusers"
Measured = dict[tuple[str, str], list[Outcome | None]]  # (library, solver) -> one outcome per number of calls


def _converged(bed: Bed, name: str) -> torch.Tensor:
    """Latents of a diffusers solver with very many steps, from the noisiest level on."""
    solver = peer(name, bed)
    if not bed.flow:
        solver.register_to_config(timestep_spacing="linspace" if name == "UniPC" else "trailing")
    return run(solver, bed, REFERENCE_CALLS[name])[0]


def reference_gaps(name: str) -> str:
    """Root mean square differences of the reference to two other converged solutions, as a phrase."""
    bed = make_bed(name, CHECKED_PICTURES)
    found, first_order = _converged(bed, "UniPC"), "Euler" if bed.flow else "DDIM"

    def gap(other: torch.Tensor) -> str:
        return f"{(found - other).pow(2).mean().sqrt().item():.1e}"

    steps = REFERENCE_CALLS[first_order]
    runge_kutta = bench_scheduler.reference(bed, bench_scheduler.REFERENCE_STEPS)
    return (
        f"{name} {gap(_converged(bed, first_order))} to {first_order} with {steps}, {gap(runge_kutta)} to Runge-Kutta"
    )


def solvers_of(bed: Bed) -> Iterator[tuple[tuple[str, str], Any]]:
    """Every solver that can run the model of `bed`, by (library, name)."""
    for name in bench_scheduler.CLASSES:
        if (solver := peer(name, bed)) is not None:
            yield (THEIRS, name), solver
    for record in list_methods(kind="scheduler"):
        if bed.prediction in record.predictions:
            for label, solver in variants(record, bed).items():
                yield (OURS, label), solver


def _outcome(solver: Any, bed: Bed, calls: int) -> Outcome | None:
    """As `outcome`; None where the method takes no number of steps that small."""
    try:
        return outcome(solver, bed, calls)
    except NoSuchSteps:
        return None


def measure(bed: Bed, calls: Sequence[int]) -> Measured:
    """Run every solver at every number of calls."""
    bed.reference = _converged(bed, "UniPC")
    return {key: [_outcome(solver, bed, n) for n in calls] for key, solver in solvers_of(bed)}


def _cell(found: Outcome | None, calls: int) -> str:
    if found is None:
        return "-"
    note = "" if found.calls == calls else f" ({found.calls} calls)"
    return f"{found.error:.3f}, {found.accuracy:.0%}{note}"


def _rows(bed: Bed, measured: Measured, calls: Sequence[int]) -> list[list[str]]:
    """A row per solver, nearest at the fewest calls first."""

    def at_fewest(item: tuple[tuple[str, str], list[Outcome | None]]) -> float:
        return item[1][0].error if item[1][0] is not None else float("inf")

    rows = [
        [bed.name, library, label, *map(_cell, found, calls)]
        for (library, label), found in sorted(measured.items(), key=at_fewest)
    ]
    score = f"{judge().accuracy(bed.true_pictures, bed.specs)['all']:.0%}"
    return [*rows, [bed.name, THEIRS, f"UniPC, {REFERENCE_CALLS['UniPC']} calls (reference)", *[score] * len(calls)]]


def verdict(name: str, measured: Measured, calls: Sequence[int]) -> str:
    """Who is nearest to the converged solution at each number of calls, and who is behind diffusers' best solver."""
    parts = []
    for i, n in enumerate(calls):
        errors = {key: found[i].error for key, found in measured.items() if found[i] is not None}
        best = {
            library: min((e, key[1]) for key, e in errors.items() if key[0] == library) for library in (THEIRS, OURS)
        }
        ours = [key for key in errors if key[0] == OURS]
        behind = sum(errors[key] > best[THEIRS][0] for key in ours)
        parts.append(
            f"{n} calls: {best[OURS][1]} {best[OURS][0]:.3f} beside {best[THEIRS][1]} {best[THEIRS][0]:.3f}, "
            f"{behind} of our {len(ours)} behind it"
        )
    return f"{name}, our nearest beside diffusers' nearest: " + "; ".join(parts) + "."


def plot(panels: dict[str, Measured], calls: Sequence[int], path: Path) -> Path:
    """Error over model calls, one panel per model; diffusers dashed in grey tones, ours solid in colours."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(len(panels), figsize=(9, 4.6 * len(panels)), dpi=110, squeeze=False)
    ours = sorted({label for measured in panels.values() for library, label in measured if library == OURS})
    colours = {label: pyplot.get_cmap("tab20")(i % 20) for i, label in enumerate(ours)}
    for panel, (name, measured) in zip(axes[:, 0], panels.items()):
        for place, ((library, label), found) in enumerate(measured.items()):
            points = [(o.calls, o.error) for o in found if o is not None]
            theirs = {"ls": "--", "color": str(0.09 * (place % 8)), "lw": 1.2}
            style = theirs if library == THEIRS else {"color": colours[label]}
            if points:
                panel.plot(*zip(*points), marker="osv^D<>"[place % 7], ms=4, label=label, **style)
        panel.set(xlabel="model calls", ylabel="RMSE of the latents", title=name, yscale="log")
        panel.grid(alpha=0.3, which="both")
        panel.legend(frameon=False, fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.tight_layout()
    figure.savefig(path)
    pyplot.close(figure)
    return path


def bench(
    out_dir: Path, pictures: int = PICTURES, calls: Sequence[int] = CALLS, models: Sequence[str] = MODELS
) -> dict[str, Any]:
    """Measure all solvers on the shipped models.

    Args:
        out_dir: Where the picture is written.
        pictures: Held-out captions to draw.
        calls: Numbers of model calls, fewest first. A call is one evaluation of the guided model, both branches.
        models: Shipped models.

    Returns:
        `columns`, `rows`, `notes` and `picture`, as `benchmarks/run.py` expects.
    """
    rows, verdicts, panels = [], [], {}
    for name in models:
        bed = make_bed(name, pictures)
        panels[name] = measure(bed, calls)
        rows += _rows(bed, panels[name], calls)
        verdicts.append(verdict(name, panels[name], calls))
    notes = (
        f"{' '.join(verdicts)}\n\nCells: root mean square error of the latents to the converged solution, and the "
        f"share of pictures in which the judge reads every attribute. {pictures} held-out captions, guidance "
        f"{bench_scheduler.GUIDANCE:g}, the same noise for all; the nearest solver at {calls[0]} calls comes first. A "
        "call is one evaluation of the guided model; where a solver needs an even or its own number, the calls it "
        f"made are given. Reference: UniPC with {REFERENCE_CALLS['UniPC']} calls; on {CHECKED_PICTURES} pictures its "
        f"latents differ by: {'; '.join(map(reference_gaps, models))}."
    )
    columns = ["Model", "Library", "Solver", *(f"{n} calls" for n in calls)]
    return {
        "columns": columns,
        "rows": rows,
        "notes": notes,
        "picture": plot(panels, calls, Path(out_dir) / "solvers.png"),
    }
