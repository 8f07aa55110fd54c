"""What a MODEL patch remembers during one run lives in the options of that run, never in the patch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from comfy.model_patcher import create_model_options_clone


T = TypeVar("T")


@contextmanager
def run_options(guider: Any, key: str, run: T) -> Iterator[T]:
    """In an OUTER_SAMPLE wrapper: `run` under `key` of the transformer options, gone afterwards, however it ends."""
    original = guider.model_options
    guider.model_options = create_model_options_clone(original)
    guider.model_options["transformer_options"][key] = run
    try:
        yield run
    finally:
        guider.model_options = original


@contextmanager
def standing_in(forwards: Iterable[tuple[torch.nn.Module, Callable]]) -> Iterator[None]:
    """Modules with our forward in front of theirs, put back however it ends."""
    forwards = list(forwards)
    before = [(module, module.__dict__.get("forward")) for module, _ in forwards]
    for module, forward in forwards:
        module.forward = forward
    try:
        yield
    finally:
        for module, forward in before:
            del module.forward
            if forward is not None:
                module.forward = forward
