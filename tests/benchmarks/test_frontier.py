"""The joint picture of caches: every cache is in it, and the frontier is what nothing beats."""

from __future__ import annotations

import itertools
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from diffusers_ext import zoo
from diffusers_ext.registry import list_methods


sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks import equal_quality, forecasts, frontier
from benchmarks.cache import FORECAST


def point(time: float, psnr: float) -> frontier.Point:
    return frontier.Point("x", "y", "z", 1.0, SimpleNamespace(ratio=time), psnr, 1.0)


def test_frontier_keeps_what_nothing_beats():
    points = [
        point(0.5, 30),
        point(0.4, 31),
        point(0.7, 40),
        point(0.7, 39),
        point(0.2, 20),
        point(0.9, 40),
        point(1.0, float("inf")),
    ]
    assert [(p.time.ratio, p.psnr) for p in frontier.frontier(points)] == [(0.2, 20), (0.4, 31), (0.7, 40)]


def test_every_cache_of_the_catalogue_is_measured():
    measured = {
        method.partition(",")[0]
        for name in frontier.STEPS
        for library, method, _ in frontier.settings_of(name)
        if library == frontier.OURS
    }
    assert any(method.endswith(FORECAST) for _, method, _ in frontier.settings_of("shapes-dit"))
    on_shapes = [r for r in list_methods(kind="cache") if {"unet", "dit", "mmdit", "any"} & set(r.targets)]
    assert measured == {r.slug for r in on_shapes}


@pytest.mark.parametrize("name", list(frontier.STEPS))
def test_every_peer_changes_pictures_and_comes_off(name):
    pytest.importorskip("tomesd")
    pytest.importorskip("cache_dit")
    pytest.importorskip("DeepCache")
    pipe = zoo.load(name)

    def draw():
        return zoo.generate(pipe, ["a red circle"], 8)

    plain = draw()
    strongest = {(library, method): setting for library, method, setting in frontier.settings_of(name)}
    peers = {key: setting for key, setting in strongest.items() if key[0] != frontier.OURS}
    for key, setting in peers.items():
        with setting.turned_on(pipe):
            assert not torch.equal(draw(), plain), key
        assert torch.equal(draw(), plain), key
    assert len(peers) >= 2


def test_equal_quality_in_small(tmp_path, monkeypatch):
    """One setting of each model beside two of its peers', one picture: figures, and the chart of their times."""
    pytest.importorskip("DeepCache")
    few = {
        kind: {name: list(itertools.islice(getattr(equal_quality, kind)(name), count)) for name in equal_quality.STEPS}
        for kind, count in (("ours", 1), ("peers", 2))
    }
    for kind, settings in few.items():
        monkeypatch.setattr(equal_quality, kind, settings.get)
    monkeypatch.setattr(equal_quality, "STEPS", {"shapes-unet": 6, "shapes-dit": 10})
    monkeypatch.setattr(equal_quality, "TIMED_PICTURES", {"shapes-unet": 1, "shapes-dit": 1})
    for name in ("PICTURES", "PAIRS"):
        monkeypatch.setattr(equal_quality, name, 1)
    found = equal_quality.bench(tmp_path)
    assert all(len(row) == len(found["columns"]) for row in found["rows"])
    ours, peer = found["rows"][0][2:4], found["rows"][0][5:7]
    assert ours == peer, "DeepCache and its published helper draw the same pictures with the same operations"
    assert found["picture"].stat().st_size > 5000


def test_the_cheapest_peer_that_is_as_close():
    known = [equal_quality.Setting(name, None, *of) for name, of in {"far": (30, 0.2), "dear": (50, 0.9)}.items()]
    known += [equal_quality.Setting("right", None, 41, 0.5), equal_quality.NOTHING]
    chosen = [equal_quality.cheapest(known, psnr).name for psnr in (25, 40, 41.04, 41.06, 60)]
    assert chosen == ["far", "right", "right", "dear", equal_quality.NOTHING.name]


def test_forecasts_in_small(tmp_path, monkeypatch):
    """One setting of each model, one picture: a value for every order measured, and the chart."""
    few = {name: list(itertools.islice(forecasts.settings(name), 1)) for name in forecasts.STEPS}
    monkeypatch.setattr(forecasts, "settings", few.get)
    monkeypatch.setattr(forecasts, "STEPS", {"shapes-unet": 6, "shapes-dit": 10})
    monkeypatch.setattr(forecasts, "PICTURES", {"shapes-unet": 1, "shapes-dit": 1})
    found = forecasts.bench(tmp_path)
    for row in found["rows"]:
        assert len(row) == len(found["columns"]) and sum(map(bool, row[2:])) == len(forecasts.ORDERS[row[0]])
    assert found["picture"].stat().st_size > 5000
