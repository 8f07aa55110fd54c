"""Small real models that ship inside the package, the world they draw, and analytic models with exact scores.

Example:
    >>> from diffusers_ext import zoo
    >>> pipe, scenes = zoo.load("shapes-unet"), zoo.held_out(16)
    >>> images = zoo.generate(pipe, scenes.captions, num_inference_steps=10)
    >>> scores = zoo.load_judge().accuracy(images, scenes.specs)
"""

from __future__ import annotations

from . import conditions, world
from .judge import Judge, load_judge
from .pipelines import adapter_file, check_folder, generate, load, load_controlnet, load_folder, names, write_manifest
from .world import Scenes, caption, held_out, parse, scenes


__all__ = [
    "Judge",
    "Scenes",
    "adapter_file",
    "caption",
    "check_folder",
    "conditions",
    "generate",
    "held_out",
    "load",
    "load_controlnet",
    "load_folder",
    "load_judge",
    "names",
    "parse",
    "scenes",
    "world",
    "write_manifest",
]
