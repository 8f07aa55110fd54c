"""What every cache and attention method must do, run on each registered one with the shipped models."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import fields
from types import NoneType
from typing import get_args, get_origin, get_type_hints

import pytest
import torch

import diffusers_ext
from diffusers_ext import zoo
from diffusers_ext.registry import list_methods


MODELS = {"unet": "shapes-unet", "dit": "shapes-dit", "mmdit": "shapes-dit", "any": "shapes-unet"}
# Methods for sizes that a model was not trained for: settings under which they act here, and the figure that tells so.
SETUPS = {
    "any-size-diffusion": ({"tile_size": 8}, "tiles"),
    "attention-entropy-scaling": ({"base_size": (8, 8)}, "scaled"),
    "hidiffusion": ({"base_size": (8, 8)}, "windowed_calls"),
    "vmoba": ({"blocks": 4}, "sparse"),
}
METHODS = [record for record in list_methods() if record.kind in ("cache", "attention")]
CASES = [
    (record, name) for record in METHODS for name in dict.fromkeys(MODELS[t] for t in record.targets if t in MODELS)
]
STEPS = 6


@pytest.fixture(scope="module", params=CASES, ids=lambda case: f"{case[0].slug}-{case[1]}")
def case(request):
    record, name = request.param
    return record, zoo.load(name)


@pytest.fixture
def draw(case):
    _, pipe = case

    def run(captions=("a red circle", "a blue star"), **kwargs):
        return zoo.generate(pipe, list(captions), **{"num_inference_steps": STEPS, **kwargs})

    return run


def config_of(record):
    return record.public(**SETUPS.get(record.slug, ({},))[0])


def denoiser(pipe):
    return diffusers_ext.denoiser_of(pipe)


def traces(pipe):
    model = denoiser(pipe)
    # Pipelines that set a cache context leave an empty registry of hooks on their model.
    return {
        name: (list(m._diffusers_hook.hooks) if hasattr(m, "_diffusers_hook") else [], "forward" in m.__dict__)
        for name, m in model.named_modules()
    }, set(vars(model)) - {"_diffusers_hook"}


def test_there_is_a_case_for_every_method():
    assert {record for record, _ in CASES} == set(METHODS)


def test_it_acts_and_comes_off_without_a_trace(case, draw):
    record, pipe = case
    plain, before = draw(), traces(pipe)
    with diffusers_ext.apply(pipe, config_of(record)) as handle:
        cached = draw()
        figures = handle.summary()[record.slug]
    assert figures[SETUPS.get(record.slug, ({}, "reused"))[1]] > 0
    assert record.kind != "cache" or figures["computed"] > 0
    assert torch.isfinite(cached).all() and not torch.equal(cached, plain)
    assert traces(pipe) == before
    assert torch.equal(draw(), plain)


def test_runs_in_a_row_do_not_see_each_other(case, draw):
    record, pipe = case
    with diffusers_ext.apply(pipe, config_of(record)):
        first = draw()
        draw(["a green ring"] * 3, seed=5)
        draw(guidance_scale=1.0)
        draw(height=96, width=64)
        assert torch.equal(draw(), first)


def test_an_interrupted_run_leaves_nothing_behind(case, draw):
    record, pipe = case

    def stop(pipe, step, t, kwargs):
        if step == 1:
            raise KeyboardInterrupt
        return {}

    with diffusers_ext.apply(pipe, config_of(record)):
        clean = draw()
        with pytest.raises(KeyboardInterrupt):
            draw(seed=3, callback_on_step_end=stop)
        assert torch.equal(draw(), clean)


def test_config_travels_as_json(case):
    config = config_of(case[0])
    values = json.loads(json.dumps(config.to_dict()))
    assert diffusers_ext.MethodConfig.from_dict(values) == config


def test_applying_twice_is_refused(case):
    record, pipe = case
    before = traces(pipe)
    with diffusers_ext.apply(pipe, config_of(record)), pytest.raises(ValueError, match="already"):
        diffusers_ext.apply(pipe, config_of(record))
    assert traces(pipe) == before


def test_one_step_warns(case):
    record, pipe = case
    if record.kind != "cache":
        pytest.skip("works on each step alone, or says so in tests of its own")
    assert diffusers_ext.check(pipe, config_of(record), num_inference_steps=1).warnings


def test_other_models_are_refused_by_name(case):
    record, _ = case
    with pytest.raises(ValueError, match="Linear"):
        diffusers_ext.apply(torch.nn.Linear(2, 2), config_of(record))


def kinds(hint):
    """What a field takes, one by one."""
    return {part for arg in get_args(hint) for part in kinds(arg)} if _is_union(hint) else {hint}


def _is_union(hint):
    return bool(get_args(hint)) and get_origin(hint) not in (tuple, Sequence, Mapping) and not _is_literal(hint)


def _is_literal(hint):
    return all(isinstance(arg, str) for arg in get_args(hint))


def bad_numbers(hint):
    """Values that are no numbers of the kind that a field takes."""
    taken = kinds(hint)
    if not taken & {int, float}:
        return []
    return ([2.5] if float not in taken else []) + [math.nan, math.inf, True] + (["3"] if str not in taken else [])


NUMBERS = [
    (record, field.name, bad)
    for record in METHODS
    for field in fields(record.public)
    for bad in bad_numbers(get_type_hints(record.public)[field.name])
]


def test_numbers_are_found():
    found = {(record.slug, name) for record, name, _ in NUMBERS}
    assert {slug for slug, _ in found} == {record.slug for record in METHODS}
    assert {("deepcache", "cache_interval"), ("faster-diffusion", "key_steps"), ("hidiffusion", "t1_ratio")} <= found
    assert bad_numbers(int | None)[0] == 2.5 and bad_numbers(float)[0] is math.nan and not bad_numbers(bool)
    assert NoneType in kinds(int | None)


@pytest.mark.parametrize("record, name, bad", NUMBERS, ids=lambda value: getattr(value, "slug", repr(value)))
def test_other_numbers_are_refused_by_name(record, name, bad):
    with pytest.raises((TypeError, ValueError), match=f"{name} is {bad!r}; accepted: "):
        record.public(**{name: bad})


@pytest.mark.parametrize(
    "slug, values",
    [
        ("faster-diffusion", {"key_steps": [0, 2.5]}),
        ("deepcache", {"skip_mode": [0, True]}),
        ("ras", {"error_reset_steps": [1.5]}),
        ("a-sdm", {"mode": [1, 0.5]}),
        ("bac", {"schedule": {"a": [0, 2.5]}, "num_inference_steps": 4}),
        ("vmoba", {"block_2d": (2, 2.5)}),
        ("hidiffusion", {"base_size": (16, True)}),
        ("attention-entropy-scaling", {"base_size": (16,)}),
        ("any-size-diffusion", {"allow_small": 1}),
    ],
)
def test_other_lists_are_refused_by_name(slug, values):
    with pytest.raises(ValueError, match=f"{next(iter(values))} is .*; accepted: "):
        diffusers_ext.get_method(slug).public(**values)


def test_numbers_of_other_libraries_are_numbers():
    import numpy

    assert diffusers_ext.DeepCacheConfig(numpy.int64(3), skip_mode=range(0, 9, 3)).cache_interval == 3
    assert diffusers_ext.VMoBAConfig(1, block_2d=[2, 4]).block_2d == (2, 4)
