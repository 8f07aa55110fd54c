"""The catalogue: records, public names, lazy imports."""

from __future__ import annotations

import importlib
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import diffusers
import pytest

import diffusers_ext
from diffusers_ext import registry
from diffusers_ext.registry import get_method, list_methods, public_names


RECORDS = list_methods()
FAMILIES = {path.name for path in Path(diffusers_ext.__file__).parent.iterdir() if path.is_dir()}
TARGETS = {"unet", "dit", "mmdit", "video", "any"}
PREDICTIONS = {"epsilon", "v_prediction", "sample", "flow_prediction"}


def run_python(code: str) -> str:
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.mark.parametrize("record", RECORDS, ids=lambda r: r.slug)
def test_record_is_complete(record):
    assert re.fullmatch(r"[a-z0-9]+([-.][a-z0-9]+)*", record.slug)
    assert record.family in FAMILIES
    assert record.targets and set(record.targets) <= TARGETS
    assert record.predictions and set(record.predictions) <= PREDICTIONS
    assert re.fullmatch(r"\d{4}\.\d{4,5}|10\.\S+", record.arxiv)
    assert len(record.summary) > 20 and "\n" not in record.summary
    assert record.claim.text and record.claim.setting and bool(record.claim.unit) == (record.claim.value is not None)
    assert record.nodes and all(node.startswith("DX") for node in record.nodes)
    assert set(record.conflicts) <= {r.slug for r in RECORDS} - {record.slug}


@pytest.mark.parametrize("record", RECORDS, ids=lambda r: r.slug)
def test_record_and_class_belong_together(record):
    module = importlib.import_module(record.module)
    assert record.public.method is record
    assert record.public.__module__ == record.module
    assert record.public.__name__ in module.__all__
    assert getattr(diffusers_ext, record.public.__name__) is record.public
    assert record.public.__doc__ and record.paper_url in f"{module.__doc__}{record.public.__doc__}"


def test_slugs_nodes_and_names_are_unique():
    for values in ([r.slug for r in RECORDS], [node for r in RECORDS for node in r.nodes]):
        assert len(values) == len(set(values))


@pytest.mark.parametrize("name", sorted(public_names()))
def test_public_names_resolve_and_are_documented(name):
    value = getattr(diffusers_ext, name)
    assert name in dir(diffusers_ext)
    assert value.__doc__
    # pipelines are findable on diffusers itself, which is where DiffusionPipeline.from_pretrained looks
    assert getattr(diffusers, name, value) is value, f"{name} shadows a name of diffusers"


def test_family_folders_do_not_break_reload():
    """diffusers resolves a library name that equals one of its pipeline folders to that folder."""
    upstream = {path.name for path in (Path(diffusers.__file__).parent / "pipelines").iterdir() if path.is_dir()}
    assert not {r.family for r in RECORDS} & upstream


def test_filters():
    for record in RECORDS:
        assert record in list_methods(family=record.family, kind=record.kind)
        assert all(r.kind == record.kind for r in list_methods(kind=record.kind))
    assert list_methods(family="no such family") == []


def test_unknown_method_names_the_nearest():
    slug = RECORDS[0].slug
    with pytest.raises(ValueError, match=f"Did you mean '{re.escape(slug)}'"):
        get_method(slug[:-1] + "x")
    with pytest.raises(ValueError, match="unknown method 'zzzz'. Known"):
        get_method("zzzz")


def test_duplicates_and_misplaced_records_are_refused():
    record = RECORDS[0]
    impostor = type("Impostor", (), {"__module__": record.module})
    with pytest.raises(ValueError, match="registered twice"):
        registry.register(record)(impostor)
    stray = type("Stray", (), {"__module__": "diffusers_ext.registry"})
    with pytest.raises(ValueError, match="whose module must be"):
        registry.register(replace(record, slug="stray"))(stray)
    assert get_method(record.slug) is record


def test_duplicate_public_name_is_refused(tmp_path, monkeypatch):
    for family in ("one", "two"):
        (tmp_path / family).mkdir()
        (tmp_path / family / "method.py").write_text('__all__ = ["Same"]\n')
    for core in ("registry.py", "apply.py"):
        (tmp_path / core).write_text("")
    monkeypatch.setattr(registry, "_PACKAGE", tmp_path)
    with pytest.raises(ImportError, match="'Same' is defined in both"):
        registry.public_names.__wrapped__()


def test_unknown_attribute():
    with pytest.raises(AttributeError, match="no_such_name"):
        diffusers_ext.no_such_name  # noqa: B018


def test_apply_stays_the_function_after_its_module_is_imported():
    out = run_python(
        "import diffusers_ext, diffusers_ext.apply; from diffusers_ext import apply; "
        "from diffusers_ext.apply import MethodConfig; print(callable(apply), callable(diffusers_ext.apply))"
    )
    assert out.split() == ["True", "True"]


def test_import_is_lazy_and_quick():
    code = """
import sys, time, diffusers
before = set(sys.modules)
start = time.process_time()
import diffusers_ext
print(time.process_time() - start)
heavy = {"transformers", "peft", "accelerate", "matplotlib", "comfy"}
print(sorted(heavy & (set(sys.modules) - before)))
print(sorted(m for m in sys.modules if m.startswith("diffusers_ext.") and m.count(".") > 1))
"""
    seconds, heavy, loaded = run_python(code).splitlines()
    assert float(seconds) < 0.3
    assert heavy == "[]"
    assert loaded == "[]"


def test_registration_is_idempotent():
    out = run_python(
        "import diffusers_ext, sys; from diffusers_ext import registration\n"
        "n = len(sys.meta_path); registration.register(); registration.register(); print(len(sys.meta_path) - n)\n"
        "from diffusers.pipelines import pipeline_loading_utils as u; print('diffusers_ext' in u.LOADABLE_CLASSES)\n"
        "registration.register(); print(list(u.LOADABLE_CLASSES).count('diffusers_ext'))"
    )
    assert out.split() == ["0", "True", "1"]
