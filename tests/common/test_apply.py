"""`apply`, `check`, `remove` and the handle, on methods that do almost nothing."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch

import diffusers_ext
from diffusers_ext import Attachment, MethodConfig
from diffusers_ext.apply import _active
from diffusers_ext.registry import MethodRecord


def record(slug, *conflicts):
    return MethodRecord(slug, "none", "cache", slug, "1", slug, ("any",), (), (), None, conflicts)


@dataclass(frozen=True)
class Step(MethodConfig):
    """Appends its name to the model's log when attached and removed."""

    fail: str = ""

    def check(self, target, num_inference_steps=None):
        if self.fail == "check":
            raise ValueError("this model does not fit")
        return ("too few steps",) if num_inference_steps == 1 else ()

    def attach(self, target):
        log, name = diffusers_ext.denoiser_of(target).log, self.method.slug
        if self.fail == "attach":
            raise RuntimeError("broke half way")
        log.append(name)
        return Attachment(lambda: log.append(f"-{name}"), lambda: {"name": name})


class A(Step):
    method = record("a")


class B(Step):
    method = record("b", "c")


class C(Step):
    method = record("c")


class D(Step):
    method = record("d")


@pytest.fixture
def model():
    model = torch.nn.Linear(2, 2)
    model.log = []
    return model


def test_order_summary_and_idempotent_removal(model):
    handle = diffusers_ext.apply(model, A(), B())
    assert model.log == ["a", "b"]
    assert handle.summary() == {"a": {"name": "a"}, "b": {"name": "b"}}
    handle.remove()
    handle.remove()
    assert model.log == ["a", "b", "-b", "-a"] and handle.summary() == {}
    assert _active(model) == [] and set(vars(model)) == {*vars(torch.nn.Linear(2, 2)), "log"}


def test_context_manager_removes_on_error(model):
    with pytest.raises(KeyError), diffusers_ext.apply(model, A()):
        raise KeyError
    assert model.log == ["a", "-a"] and not _active(model)


def test_remove_target_takes_everything_off(model):
    first, second = diffusers_ext.apply(model, A()), diffusers_ext.apply(model, C())
    diffusers_ext.remove(model)
    assert model.log == ["a", "c", "-c", "-a"] and not _active(model)
    first.remove()
    second.remove()
    diffusers_ext.remove(model)
    assert len(model.log) == 4


def test_handles_come_off_in_any_order(model):
    first, second = diffusers_ext.apply(model, A()), diffusers_ext.apply(model, B())
    first.remove()
    assert [config for config, _ in _active(model)] == [B()]
    diffusers_ext.apply(model, A()).remove()
    second.remove()
    assert not _active(model)


@pytest.mark.parametrize("fail, error", [("check", ValueError), ("attach", RuntimeError)])
def test_failure_leaves_nothing_applied(model, fail, error):
    with pytest.raises(error):
        diffusers_ext.apply(model, A(), C(), D(fail=fail))
    assert model.log == ["a", "c", "-c", "-a"]
    assert not _active(model)


def test_failure_keeps_what_was_there_before(model):
    diffusers_ext.apply(model, A())
    with pytest.raises(RuntimeError):
        diffusers_ext.apply(model, C(fail="attach"))
    assert [config for config, _ in _active(model)] == [A()]


@pytest.mark.parametrize("first, second", [(B(), C()), (C(), B())])
def test_conflicts_hold_in_both_directions(model, first, second):
    with pytest.raises(ValueError, match="cannot be combined"):
        diffusers_ext.apply(model, first, second)
    assert not _active(model)
    diffusers_ext.apply(model, first)
    with pytest.raises(ValueError, match="cannot be combined"):
        diffusers_ext.apply(model, second)


def test_twice_is_refused(model):
    diffusers_ext.apply(model, A())
    with pytest.raises(ValueError, match="already applied.*remove"):
        diffusers_ext.apply(model, A())


def test_check_answers_like_apply_and_changes_nothing(model):
    assert diffusers_ext.check(model, A(), B())
    preflight = diffusers_ext.check(model, A(fail="check"), B(), C(), "text", num_inference_steps=1)
    assert not preflight and len(preflight.errors) == 3
    assert "does not fit" in preflight.errors[0] and "combined" in preflight.errors[1]
    assert "not a method config" in preflight.errors[2] and preflight.warnings == ("too few steps",)
    assert model.log == [] and not _active(model)
    diffusers_ext.apply(model, A())
    assert "already" in diffusers_ext.check(model, A()).errors[0]


def test_warnings_are_logged(model, caplog):
    with caplog.at_level("WARNING"):
        diffusers_ext.apply(model, A(), num_inference_steps=1)
    assert "too few steps" in caplog.text


@pytest.mark.parametrize("bad", [None, "text", object(), MethodConfig()])
def test_not_a_config(model, bad):
    with pytest.raises(TypeError, match="not a method config"):
        diffusers_ext.apply(model, bad)


@pytest.mark.parametrize("bad", [None, "runwayml/stable-diffusion-v1-5", SimpleNamespace(unet=None)])
def test_not_a_target(bad):
    for call in (diffusers_ext.apply, diffusers_ext.check):
        with pytest.raises(TypeError, match="pipeline with a `unet` or `transformer`"):
            call(bad, A())
    with pytest.raises(TypeError):
        diffusers_ext.remove(bad)


def test_pipeline_and_model_share_what_is_applied(model):
    pipe = SimpleNamespace(unet=model)
    handle = diffusers_ext.apply(pipe, A())
    with pytest.raises(ValueError, match="already"):
        diffusers_ext.apply(model, A())
    assert diffusers_ext.denoiser_of(SimpleNamespace(transformer=model)) is model
    pipe.unet = torch.nn.Linear(1, 1)
    handle.remove()
    assert model.log == ["a", "-a"], "the model it was applied to, whatever the pipeline holds now"


def test_compiled_models_are_looked_through(model):
    compiled = torch.compile(model, backend="eager")
    with diffusers_ext.apply(compiled, A()), pytest.raises(ValueError, match="already"):
        diffusers_ext.apply(model, A())


def test_configs_as_dictionaries():
    from diffusers_ext import DeepCacheConfig

    values = DeepCacheConfig(cache_interval=4).to_dict()
    assert values["method"] == "deepcache" and MethodConfig.from_dict(values).cache_interval == 4
    with pytest.raises(ValueError, match="unknown method 'deepcach'.*'deepcache'"):
        MethodConfig.from_dict({"method": "deepcach"})
    with pytest.raises(ValueError, match="unknown field.*'interval'.*cache_interval"):
        DeepCacheConfig.from_dict({"interval": 3})
    with pytest.raises(ValueError, match="describe 'a'"):
        DeepCacheConfig.from_dict({"method": "a"})
