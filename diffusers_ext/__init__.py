"""diffusers-ext: papers as drop-in schedulers, caches, guiders and adapters for diffusers and ComfyUI.

`import diffusers_ext` registers every class with diffusers; names load on first use.
"""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import ModuleType

from . import registration
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


class _Package(ModuleType):
    """Importing the submodule `apply` would bind that name to the module; users mean the function of the same name."""

    def __setattr__(self, name: str, value: object) -> None:
        if isinstance(value, ModuleType) and public_names().get(name) == value.__name__:
            value = getattr(value, name)
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
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
