"""What a MODEL patch remembers during one run lives in the options of that run, never in the patch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, TypeVar

import torch
from comfy.model_patcher import create_model_options_clone
from comfy.patcher_extension import WrapperExecutor, WrappersMP


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


def wrap_network(patched: Any, key: str, wrapper: Callable) -> None:
    """Put `wrapper` around every call of a MODEL's network.

    Some networks of ComfyUI ask no DIFFUSION_MODEL wrappers, Stable Diffusion 3 for one: there it stands in front of
    their forward, for as long as APPLY_MODEL runs.
    """
    if _asks_wrappers(patched.model.diffusion_model):
        patched.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, key, wrapper)
    else:
        patched.add_wrapper_with_key(WrappersMP.APPLY_MODEL, key, partial(_in_front, wrapper))


def _asks_wrappers(network: torch.nn.Module) -> bool:
    forwards = (vars(kind).get("forward") for kind in type(network).__mro__)
    return any(WrappersMP.DIFFUSION_MODEL.upper() in f.__code__.co_names for f in forwards if hasattr(f, "__code__"))


def _in_front(wrapper: Callable, executor: Any, *args: Any, **kwargs: Any) -> Any:
    """APPLY_MODEL: the model with `wrapper` in front of its network."""
    network = executor.class_obj.diffusion_model
    inner = WrapperExecutor.new_class_executor(network.forward, network, [wrapper])
    with standing_in([(network, inner.execute)]):
        return executor(*args, **kwargs)
