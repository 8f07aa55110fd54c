"""Shared by all tests: the repository's root and the shipped models, loaded once and handed out clean."""

from __future__ import annotations

import os


# Idle threads that spin slow each other down when cores are shared; must be set before torch is imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import diffusers_ext


@pytest.fixture(scope="session")
def repository() -> Path:
    """Root of the checkout."""
    return Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def _loaded() -> dict[str, Any]:
    return {}


def _layers(model: Any) -> list[tuple[str, str, str]]:
    """Names and types of all modules of a model, and of their attention processors."""
    return [
        (name, type(m).__name__, type(getattr(m, "processor", None)).__name__) for name, m in model.named_modules()
    ]


def _lend(name: str, loaded: dict[str, Any]) -> Iterator[Any]:
    from diffusers_ext import zoo

    if name not in loaded:
        loaded[name] = zoo.load(name)
    pipe = loaded[name]
    scheduler, model = pipe.scheduler, diffusers_ext.denoiser_of(pipe)
    before = _layers(model)
    yield pipe
    diffusers_ext.remove(pipe)
    pipe.scheduler = scheduler
    if _layers(model) != before:  # a LoRA leaves its wrappers, which change the names of weights
        del loaded[name]


@pytest.fixture
def shapes_unet(_loaded) -> Iterator[Any]:
    """Stable Diffusion layout, v prediction. Scheduler and methods are put back after the test."""
    yield from _lend("shapes-unet", _loaded)


@pytest.fixture
def shapes_unet_eps(_loaded) -> Iterator[Any]:
    """The same layout with epsilon prediction."""
    yield from _lend("shapes-unet-eps", _loaded)


@pytest.fixture
def shapes_dit(_loaded) -> Iterator[Any]:
    """Flux layout, flow matching."""
    yield from _lend("shapes-dit", _loaded)


@pytest.fixture(scope="session")
def judge() -> Any:
    """The classifier that reads the pictures."""
    from diffusers_ext import zoo

    return zoo.load_judge()
