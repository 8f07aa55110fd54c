"""Saved pipelines with our classes come back in a fresh process that imports only the top level, bit for bit."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from diffusers import SchedulerMixin
from diffusers.utils import logging

from diffusers_ext import zoo
from diffusers_ext.registry import list_methods


RELOAD = """
import sys, torch, diffusers_ext
from diffusers import DiffusionPipeline
from diffusers_ext import zoo
results = {}
for folder in sys.argv[2:]:
    pipe = DiffusionPipeline.from_pretrained(folder, local_files_only=True)
    torch.manual_seed(0)
    results[folder] = {"name": type(pipe.scheduler).__name__, "images": zoo.generate(pipe, ["a red circle"], 4)}
assert "diffusers_ext.cli" not in sys.modules
torch.save(results, sys.argv[1])
"""
SCHEDULERS = [
    r for r in list_methods() if issubclass(r.public, SchedulerMixin) and not getattr(r.public, "needs_fit", False)
]
MODELS = {"shapes-unet": "v_prediction", "shapes-dit": "flow_prediction"}
PAIRS = [(model, r) for model, prediction in MODELS.items() for r in SCHEDULERS if prediction in r.predictions]


def _save(model, record, folder):
    """Save a pipeline with the scheduler of `record`; what it draws."""
    pipe = zoo.load(model)
    pipe.scheduler = record.public.from_config(pipe.scheduler.config)
    pipe.save_pretrained(folder)
    index = (folder / "model_index.json").read_text()
    assert f'"diffusers_ext",\n    "{record.public.__name__}"' in index
    torch.manual_seed(0)  # of samplers whose noise the pipeline leaves to torch
    return zoo.generate(pipe, ["a red circle"], 4)


@pytest.fixture(scope="module")
def reloaded(tmp_path_factory):
    """Every scheduler saved in every pipeline it supports, and all of them loaded by one fresh process."""
    root = tmp_path_factory.mktemp("reload")
    folders = {(model, r.slug): root / f"{model}-{r.slug}" for model, r in PAIRS}
    drawn = {(model, r.slug): _save(model, r, folders[model, r.slug]) for model, r in PAIRS}
    command = [sys.executable, "-c", RELOAD, str(root / "result.pt"), *map(str, folders.values())]
    result = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stderr
    again = torch.load(root / "result.pt", weights_only=True)
    return {key: (drawn[key], again[str(folder)]) for key, folder in folders.items()}


@pytest.mark.parametrize(("model", "record"), PAIRS, ids=[f"{model}-{r.slug}" for model, r in PAIRS])
def test_saved_scheduler_reloads_in_a_fresh_process(model, record, reloaded):
    drawn, again = reloaded[model, record.slug]
    assert again["name"] == record.public.__name__
    assert torch.equal(again["images"], drawn)


def test_without_the_import_diffusers_says_what_is_missing(shapes_unet, tmp_path):
    """The troubleshooting page quotes this message."""
    record = SCHEDULERS[0]
    shapes_unet.scheduler = record.public.from_config(shapes_unet.scheduler.config)
    shapes_unet.save_pretrained(tmp_path / "saved")
    code = f"from diffusers import DiffusionPipeline; DiffusionPipeline.from_pretrained({str(tmp_path / 'saved')!r})"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert result.returncode != 0
    assert "diffusers_ext" in result.stderr


def test_logging_of_the_host_is_left_alone():
    before = logging.get_verbosity()
    import diffusers_ext

    diffusers_ext.registration.register()
    assert logging.get_verbosity() == before
