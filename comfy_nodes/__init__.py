"""The ComfyUI side: thin V3 nodes, one module per family, found by listing this folder.

A module here imports only torch, comfy, comfy_api and the standard library; `diffusers_ext` is imported when a
node runs, so that the pack adds next to nothing to ComfyUI's start.
"""

from __future__ import annotations

import importlib
import pkgutil

from comfy_api.latest import ComfyExtension, io


def all_nodes() -> list[type[io.ComfyNode]]:
    """Every node of the pack: the `NODES` of each public module of this folder."""
    names = sorted(m.name for m in pkgutil.iter_modules(__path__) if not m.name.startswith("_"))
    modules = [importlib.import_module(f"{__name__}.{name}") for name in names]
    return [node for module in modules for node in module.NODES]


class DiffusersExtPack(ComfyExtension):
    """Hands the nodes to ComfyUI."""

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return all_nodes()


async def comfy_entrypoint() -> DiffusersExtPack:
    return DiffusersExtPack()
