"""Makes a clone of this repository a ComfyUI pack when it lies in `custom_nodes`."""

import importlib.util
import sys
from pathlib import Path


if __package__ and importlib.util.find_spec("comfy_api"):  # absent when pytest or a tool imports this file
    if importlib.util.find_spec("diffusers_ext") is None:  # a clone that was not pip-installed
        sys.path.append(str(Path(__file__).resolve().parent))
    from .comfy_nodes import comfy_entrypoint  # noqa: F401

WEB_DIRECTORY = "./comfy_nodes/web"
