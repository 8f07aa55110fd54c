"""Adapter files that the loaders list: `models/diffusers_ext_adapters` and the same folder of the output."""

from __future__ import annotations

from ._files import SavedFiles


ADAPTERS = SavedFiles("diffusers_ext_adapters", ".safetensors", "adapter")
