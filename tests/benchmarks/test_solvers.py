"""The joint table of solvers: calls are counted as the model sees them, rows come from the catalogue."""

from __future__ import annotations

import functools
import sys
from pathlib import Path

import pytest
import torch

from diffusers_ext import zoo
from diffusers_ext.prediction import NoiseSchedule
from diffusers_ext.registry import list_methods


sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks import scheduler as bench_scheduler
from benchmarks import solvers
from benchmarks.scheduler import Bed, Outcome, peer, run


CALLS = (5, 6, 8)
load = functools.cache(zoo.load)


class CountingModel:
    """A network in name only: it counts its calls."""

    def __init__(self):
        self.calls = 0

    def __call__(self, x: torch.Tensor, timestep) -> torch.Tensor:
        self.calls += 1
        return 0.1 * x


@pytest.fixture(params=zoo.names())
def bed(request) -> Bed:
    pipe = load(request.param)
    schedule = NoiseSchedule.from_scheduler(pipe.scheduler)
    flow = schedule.family == "flow"
    prediction = "flow_prediction" if flow else pipe.scheduler.config.prediction_type
    noise = torch.randn(1, 64, 16) if flow else torch.randn(1, 4, 16, 16)
    return Bed(request.param, ["a red circle"], pipe, noise, CountingModel(), schedule, prediction, torch.zeros(1, 9))


@pytest.mark.parametrize("name", bench_scheduler.CLASSES)
@pytest.mark.parametrize("calls", CALLS)
def test_calls_of_diffusers_solvers_are_counted_at_the_model(bed, name, calls):
    solver = peer(name, bed)
    if solver is None:
        pytest.skip(f"diffusers has no {name} for flow models")
    latents, made = run(solver, bed, calls)
    assert bed.model.calls == made <= calls and torch.isfinite(latents).all()
    assert made == (calls - (calls + 1) % 2 if name == "Heun" else calls)


def test_calls_of_our_schedulers_are_counted_at_the_model(bed):
    fitted = {"olss", "usf-s3", "dpm-solver-v3"}
    for record in list_methods(kind="scheduler"):
        if bed.prediction in record.predictions and record.slug not in fitted:
            bed.model.calls = 0
            made = run(record.public.from_config(bed.pipe.scheduler.config), bed, 6)[1]
            assert bed.model.calls == made <= 6, record.slug


def test_rows_are_those_of_the_catalogue(bed, monkeypatch):
    monkeypatch.setattr(solvers, "variants", lambda record, bed: {record.slug: object()})
    labels = {key for key, _ in solvers.solvers_of(bed)}
    fits = {r.slug for r in list_methods(kind="scheduler") if bed.prediction in r.predictions}
    assert {label for library, label in labels if library == solvers.OURS} == fits
    assert {"UniPC", "DEIS multistep", "DPM++ 2M", "Euler", "Heun"} <= {
        n for lib, n in labels if lib == solvers.THEIRS
    }


def _measured(**errors: list[float]) -> solvers.Measured:
    return {
        (solvers.THEIRS if name == "UniPC" else solvers.OURS, name): [
            None if e is None else Outcome(n, torch.zeros(1, 3, 64, 64), e, 20.0, 0.5) for e, n in zip(row, CALLS)
        ]
        for name, row in errors.items()
    }


def test_verdict_names_the_nearest_and_counts_those_behind():
    found = _measured(UniPC=[0.3, 0.2, 0.1], A=[0.2, 0.25, 0.2], B=[None, 0.1, 0.4])
    text = solvers.verdict("m", found, CALLS)
    assert "5 calls: A 0.200 beside UniPC 0.300, 0 of our 1 behind it" in text
    assert "6 calls: B 0.100 beside UniPC 0.200, 1 of our 2 behind it" in text
    assert "8 calls: A 0.200 beside UniPC 0.100, 2 of our 2 behind it" in text


def test_picture_and_cells(tmp_path):
    found = _measured(UniPC=[0.3, 0.2, 0.1], B=[None, 0.1, 0.4])
    assert solvers.plot({"m": found}, CALLS, tmp_path / "x.png").stat().st_size > 1000
    assert solvers._cell(None, 5) == "-"
    assert solvers._cell(Outcome(5, torch.zeros(1), 0.25, 20.0, 0.5), 6) == "0.250, 50% (5 calls)"


def test_a_solver_without_such_steps_leaves_its_cell_empty(bed):
    class Never:
        def set_timesteps(self, steps):
            raise ValueError("never")

    assert solvers._outcome(Never(), bed, 5) is None
