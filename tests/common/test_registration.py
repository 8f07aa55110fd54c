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
pipe = DiffusionPipeline.from_pretrained(sys.argv[1], local_files_only=True)
assert "diffusers_ext.cli" not in sys.modules
torch.save({"name": type(pipe.scheduler).__name__, "images": zoo.generate(pipe, ["a red circle"], 4)}, sys.argv[2])
"""
SCHEDULERS = [r for r in list_methods() if issubclass(r.public, SchedulerMixin)]


@pytest.mark.parametrize("record", SCHEDULERS, ids=lambda r: r.slug)
@pytest.mark.parametrize("model", ["shapes_unet", "shapes_dit"])
def test_saved_scheduler_reloads_in_a_fresh_process(record, model, request, tmp_path):
    pipe = request.getfixturevalue(model)
    pipe.scheduler = record.public.from_config(pipe.scheduler.config)
    images = zoo.generate(pipe, ["a red circle"], 4)
    pipe.save_pretrained(tmp_path / "saved")
    assert f'"diffusers_ext",\n    "{record.public.__name__}"' in (tmp_path / "saved" / "model_index.json").read_text()
    command = [sys.executable, "-c", RELOAD, str(tmp_path / "saved"), str(tmp_path / "result.pt")]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    again = torch.load(tmp_path / "result.pt", weights_only=True)
    assert again["name"] == record.public.__name__
    assert torch.equal(again["images"], images)


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
