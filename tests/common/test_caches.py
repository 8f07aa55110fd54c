"""What every cache must do, run on each registered one."""

from __future__ import annotations

import json

import pytest
import torch

import diffusers_ext
from diffusers_ext import zoo
from diffusers_ext.registry import list_methods


MODELS = {"unet": "shapes-unet", "dit": "shapes-dit", "mmdit": "shapes-dit", "any": "shapes-unet"}
CASES = [
    (record, name)
    for record in list_methods(kind="cache")
    for name in dict.fromkeys(MODELS[t] for t in record.targets if t in MODELS)
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


def denoiser(pipe):
    return diffusers_ext.denoiser_of(pipe)


def traces(pipe):
    model = denoiser(pipe)
    # Pipelines that set a cache context leave an empty registry of hooks on their model.
    return {
        name: (list(m._diffusers_hook.hooks) if hasattr(m, "_diffusers_hook") else [], "forward" in m.__dict__)
        for name, m in model.named_modules()
    }, set(vars(model)) - {"_diffusers_hook"}


def test_there_is_a_case_for_every_cache():
    assert {record.slug for record, _ in CASES} == {record.slug for record in list_methods(kind="cache")}


def test_default_config_applies_and_comes_off_without_a_trace(case, draw):
    record, pipe = case
    plain, before = draw(), traces(pipe)
    with diffusers_ext.apply(pipe, record.public()) as handle:
        cached = draw()
        figures = handle.summary()[record.slug]
    assert figures["computed"] > 0 and figures["reused"] > 0
    assert torch.isfinite(cached).all() and not torch.equal(cached, plain)
    assert traces(pipe) == before
    assert torch.equal(draw(), plain)


def test_runs_in_a_row_do_not_see_each_other(case, draw):
    record, pipe = case
    with diffusers_ext.apply(pipe, record.public()):
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

    with diffusers_ext.apply(pipe, record.public()):
        clean = draw()
        with pytest.raises(KeyboardInterrupt):
            draw(seed=3, callback_on_step_end=stop)
        assert torch.equal(draw(), clean)


def test_config_travels_as_json(case):
    config = case[0].public()
    values = json.loads(json.dumps(config.to_dict()))
    assert diffusers_ext.MethodConfig.from_dict(values) == config


def test_applying_twice_is_refused(case):
    record, pipe = case
    before = traces(pipe)
    with diffusers_ext.apply(pipe, record.public()), pytest.raises(ValueError, match="already"):
        diffusers_ext.apply(pipe, record.public())
    assert traces(pipe) == before


def test_one_step_warns(case):
    record, pipe = case
    assert diffusers_ext.check(pipe, record.public(), num_inference_steps=1).warnings


def test_other_models_are_refused_by_name(case):
    record, _ = case
    with pytest.raises(ValueError, match="Linear"):
        diffusers_ext.apply(torch.nn.Linear(2, 2), record.public())
