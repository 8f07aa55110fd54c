"""The joint picture of caches: every cache is in it, and the frontier is what nothing beats."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from diffusers_ext import zoo
from diffusers_ext.registry import list_methods


sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks import equal_quality, frontier
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
    """The first pair of each model, one picture: its figures, and the chart of their times."""
    pytest.importorskip("DeepCache")
    first = {name: next(equal_quality._pairs(name)) for name in equal_quality.STEPS}
    monkeypatch.setattr(equal_quality, "STEPS", {"shapes-unet": 6, "shapes-dit": 10})
    monkeypatch.setattr(equal_quality, "PICTURES", {64: 1, 128: 1})
    monkeypatch.setattr(equal_quality, "TIMED_PICTURES", {64: 1, 128: 1})
    monkeypatch.setattr(equal_quality, "PAIRS", 1)
    monkeypatch.setattr(equal_quality, "_pairs", lambda name: iter([first[name]]))
    found = equal_quality.bench(tmp_path)
    assert all(len(row) == len(found["columns"]) for row in found["rows"])
    ours, peer = found["rows"][0][2:4], found["rows"][0][5:7]
    assert ours == peer, "DeepCache and its published helper draw the same pictures with the same operations"
    assert found["picture"].stat().st_size > 5000
