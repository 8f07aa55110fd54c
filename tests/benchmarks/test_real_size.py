"""Rows of real size: which steps are cheap, what a run costs, and what is kept when they are measured again."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch


sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import diffusers_ext
from benchmarks import _real_size as real
from benchmarks import cache, run
from diffusers_ext import BACConfig, DeepCacheConfig, DeltaDiTConfig, FasterDiffusionConfig, RASConfig
from diffusers_ext.caching.faster_diffusion import key_step_list
from diffusers_ext.eval import count_macs
from diffusers_ext.registry import get_method


SMALL = {"sample_size": 16, "num_layers": 4, "num_attention_heads": 2, "cross_attention_dim": 144}


def test_a_run_costs_the_sum_of_its_steps():
    times = {real.FULL: 1.01, real.CHEAP: 0.3}
    assert real.of_a_run([8, 2, 2, 8], times) == (f"{20 / 32:.3f}", f"{(2 * 1.01 + 2 * 0.3) / 4:.3f}")


@pytest.mark.parametrize("config", [DeltaDiTConfig(3), RASConfig(0.25), BACConfig(num_updates=5)])
def test_the_short_run_has_the_steps_of_the_whole_one(config):
    """Its first step costs what every full step of the whole run does, its second what every cheap one does."""
    denoiser = real.pixart("meta", **SMALL)
    whole, short = (
        real.macs_of_steps(denoiser, lambda pipe, c=c: diffusers_ext.apply(pipe, c), count)
        for c, count in ((config, 20), (cache._short(config), real.SHORT))
    )
    assert set(whole) == {short[0], short[1]} and short[0] == max(whole) > short[1]


def _gain(denoiser, config, counts):
    """Operations of a plain run over those of one with `counts` full and cheap steps."""
    with diffusers_ext.apply(denoiser.pipe, config):
        step = denoiser.steps(real.SHORT)
        full, cheap = count_macs(step), count_macs(step)
    return sum(counts) * full / (counts[0] * full + counts[1] * cheap)


def test_papers_gains_in_operations():
    """What the papers report at real size, and half of the operations for RAS as it is by default."""
    plan = RASConfig().plan(28)
    cheap = sum(plan.skipped(step, 4096) > 0 for step in range(28))
    ras = replace(RASConfig(), start_step=1, error_reset_steps=())
    transformer = real.stable_diffusion_3("meta")
    assert _gain(transformer, ras, (28 - cheap, cheap)) > 2.0
    assert _gain(transformer, replace(ras, reuse_text=True), (28 - cheap, cheap)) > 2.5
    unet = real.stable_diffusion("meta")
    assert _gain(unet, DeepCacheConfig(cache_interval=5), (1, 4)) > 2.3
    keys = len(key_step_list(50, "50ls"))
    # 37,050 and 27,350 billion operations in the paper.
    assert _gain(unet, FasterDiffusionConfig(key_steps=2), (keys, 50 - keys)) > 1.354


@pytest.mark.parametrize("kinds", [cache.BOTH, cache.WITH_FORECAST])
def test_timed_steps_run_beside_a_twin_with_the_same_weights(kinds):
    denoiser = real.pixart("cpu", **SMALL)
    twin = denoiser.twin()
    pairs = list(zip(denoiser.network.parameters(), twin.network.parameters(), strict=True))
    assert twin.network is not denoiser.network and all(ours is theirs for ours, theirs in pairs)
    config = DeltaDiTConfig(2, forecast_order=1)
    times = real.timed(denoiser, lambda pipe: diffusers_ext.apply(pipe, config), kinds)
    assert set(times) == {*kinds} >= {real.FULL, real.CHEAP} and all(share > 0 for share in times.values())
    assert not hasattr(denoiser.network, "_diffusers_hook")


def test_steps_are_those_of_the_scheduler():
    denoiser = real.pixart("cpu", **SMALL)
    x = denoiser.noise
    step = denoiser.steps(2)
    step(), step()
    scheduler = denoiser.pipe.scheduler
    scheduler.set_timesteps(2)
    with torch.no_grad():
        for t in scheduler.timesteps:
            x = scheduler.step(denoiser.predict(denoiser.network, x, t), t, x).prev_sample
    with pytest.raises(StopIteration):
        step()
    assert torch.isfinite(x).all() and not torch.equal(x, denoiser.noise)


@pytest.fixture
def filed(tmp_path, monkeypatch):
    """A filed result, and a benchmark whose rows of real size are new."""
    record = get_method("ras")
    module = SimpleNamespace(real_size=lambda record: [["B, random weights", "0.2"]], notes=lambda record: "new notes")
    monkeypatch.setattr(run, "RESULTS", tmp_path)
    monkeypatch.setattr(run, "module_of", lambda record: module)
    result = {"slug": "ras", "columns": ["Model", "Time"], "environment": run.environment(), "notes": "old notes"}
    result["rows"] = [["shapes-dit", "0.9"], ["A, random weights", "0.1"]]
    path = tmp_path / "ras.json"
    path.write_text(json.dumps(result))
    return record, path, module


def test_only_rows_of_real_size_are_measured_again(filed):
    record, path, _ = filed
    result = run.measure_real_size(record)
    assert result["rows"] == [["shapes-dit", "0.9"], ["B, random weights", "0.2"]] and result["notes"] == "new notes"
    assert json.loads(path.read_text()) == result


def test_rows_of_another_machine_are_not_joined(filed):
    record, path, module = filed
    result = json.loads(path.read_text())
    path.write_text(json.dumps({**result, "environment": {**result["environment"], "torch": "1.0"}}))
    with pytest.raises(ValueError, match="another torch"):
        run.measure_real_size(record)
    del module.real_size
    with pytest.raises(ValueError, match="without --real-size"):
        run.measure_real_size(record)
