"""The only file that touches upstream mappings.

`register()` lets `DiffusionPipeline.from_pretrained` resolve `["diffusers_ext", "<Class>"]` entries of a saved
`model_index.json`. The table it extends lives in a diffusers module that pulls in transformers, so an import of
`diffusers_ext` does not load it: the entry is added as soon as diffusers itself loads that module.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType

from .registry import public_names


LIBRARY = "diffusers_ext"
_LOADING_UTILS = "diffusers.pipelines.pipeline_loading_utils"


def _make_loadable(loading_utils: ModuleType) -> None:
    table = getattr(loading_utils, "LOADABLE_CLASSES", None)
    if not isinstance(table, dict):
        raise RuntimeError(
            f"{_LOADING_UTILS}.LOADABLE_CLASSES is not a dict any more: this diffusers release changed how saved "
            "pipelines are resolved. Install diffusers 0.42 or a newer diffusers-ext."
        )
    table.setdefault(LIBRARY, {})
    _make_pipelines_findable()


def _make_pipelines_findable() -> None:
    """Let `DiffusionPipeline.from_pretrained` find our pipeline classes, which it looks up on `diffusers` itself.

    Still lazy: `diffusers` imports a class's module, here this package under an alias, when the name is first used.
    """
    diffusers = sys.modules["diffusers"]
    if not isinstance(getattr(diffusers, "_class_to_module", None), dict):
        raise RuntimeError(
            "diffusers no longer keeps a table of lazily imported classes: install diffusers 0.42 or a newer "
            "diffusers-ext"
        )
    sys.modules.setdefault(f"diffusers.{LIBRARY}", sys.modules[LIBRARY])
    for name in public_names():
        if name.endswith("Pipeline"):
            diffusers._class_to_module.setdefault(name, LIBRARY)


class _PatchingLoader(Loader):
    """Runs the real loader, then `action(module)`."""

    def __init__(self, inner: Loader, action: Callable[[ModuleType], None]):
        self._inner, self._action = inner, action

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._inner.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self._inner.exec_module(module)
        self._action(module)

    def __getattr__(self, name: str):
        return getattr(self._inner, name)


class _AfterImport(MetaPathFinder):
    def __init__(self, actions: dict[str, Callable[[ModuleType], None]]):
        self._actions = actions

    def find_spec(self, fullname, path=None, target=None):
        action = self._actions.get(fullname)
        spec = PathFinder.find_spec(fullname, path) if action else None
        if spec is None or spec.loader is None:
            return None
        spec.loader = _PatchingLoader(spec.loader, action)
        return spec


_ACTIONS: dict[str, Callable[[ModuleType], None]] = {_LOADING_UTILS: _make_loadable}


def register() -> None:
    """Make every public class of this package loadable by diffusers. Safe to call any number of times."""
    pending = {}
    for name, action in _ACTIONS.items():
        if name in sys.modules:
            action(sys.modules[name])
        else:
            pending[name] = action
    if pending and not any(isinstance(finder, _AfterImport) for finder in sys.meta_path):
        sys.meta_path.insert(0, _AfterImport(pending))


def describe_transformer_blocks() -> None:
    """Tell diffusers' block caches where blocks that it left out return their hidden states. Safe to call again."""
    from diffusers.hooks._helpers import TransformerBlockMetadata, TransformerBlockRegistry
    from diffusers.models.transformers.sana_transformer import SanaTransformerBlock

    try:
        TransformerBlockRegistry.get(SanaTransformerBlock)
    except ValueError:
        TransformerBlockRegistry.register(SanaTransformerBlock, TransformerBlockMetadata(return_hidden_states_index=0))
