"""diffusers-ext: papers as drop-in schedulers, caches, guiders and adapters for diffusers and ComfyUI.

`import diffusers_ext` registers every class with diffusers; names load on first use.
"""

from __future__ import annotations

import importlib
from pathlib import Path

from . import registration
from .apply import apply  # noqa: F401  (or the name would turn into the module once a method is imported)
from .registry import public_names


__version__ = "0.1.0"

# diffusers looks these up on the library that model_index.json names, to learn how a component is loaded.
_RELOAD_BASES = {
    "SchedulerMixin": "diffusers",
    "ModelMixin": "diffusers",
    "DiffusionPipeline": "diffusers",
    "OnnxRuntimeModel": "diffusers",
    "BaseGuidance": "diffusers.guiders",
}

registration.register()


def __getattr__(name: str):
    module = _RELOAD_BASES.get(name)
    if module is None and not name.startswith("_"):
        module = public_names().get(name)
    if module is not None:
        value = getattr(importlib.import_module(module), name)
    elif (Path(__file__).parent / name / "__init__.py").is_file():
        return importlib.import_module(f"{__name__}.{name}")
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *public_names(), *_RELOAD_BASES})
