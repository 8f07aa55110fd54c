"""Concepts of the shapes world: things of one look that the shipped models know by no name."""

from __future__ import annotations

import torch

from ..registry import unknown
from . import world
from .judge import Judge


# Name -> colour and shape of the thing.
CONCEPTS = {
    "zib": ("purple", "star"),
    "mog": ("green", "cross"),
    "kelv": ("orange", "ring"),
    "dax": ("blue", "triangle"),
}


def trigger(name: str) -> str:
    """The token that calls a concept in a prompt, such as `"<zib>"`.

    Raises:
        ValueError: No such concept.
    """
    if name not in CONCEPTS:
        raise ValueError(unknown("concept", name, CONCEPTS))
    return f"<{name}>"


def concept_scenes(name: str, n: int, seed: int, drop: float = 0.0) -> world.Scenes:
    """Scenes whose first object is a concept and whose captions call it by its trigger.

    Args:
        name: One of `CONCEPTS`.
        n: Number of scenes.
        seed: Names the sequence, as in `world.scenes`.
        drop: Probability with which each optional phrase of a caption is left out.

    Returns:
        Scenes like "a small <zib> left of a large red circle, plain blue background".

    Raises:
        ValueError: No such concept.
    """
    token = trigger(name)
    colour, shape = CONCEPTS[name]
    hue, form = list(world.COLOURS).index(colour), list(world.SHAPES).index(shape)
    # About a fifth is left out: the thing on a ground of its colour, or beside another of its kind.
    specs, _ = world.sentences(2 * n + 20, seed)
    alike = (specs[:, 0] == hue) | (specs[:, 6] == form) & (specs[:, 7] == hue)
    specs = specs[~alike][:n].clone()
    specs[:, 3], specs[:, 4] = form, hue
    draws = torch.rand(n, 18 + len(world.OPTIONAL), generator=torch.Generator().manual_seed(seed))
    parts = [world.render(s, u) for s, u in zip(specs.split(512), draws[:, :17].split(512))]
    captions = []
    for spec, row in zip(specs.tolist(), draws[:, 17:].tolist()):
        keep = [phrase for phrase, u in zip(world.OPTIONAL, row[1:]) if u >= drop]
        captions.append(world.caption(spec, row[0] < 0.5, keep).replace(f"{colour} {shape}", token))
    return world.Scenes(specs, captions, torch.cat([p[0] for p in parts]), torch.cat([p[1] for p in parts]))


def identity(judge: Judge, images: torch.Tensor, specs: torch.Tensor) -> float:
    """Share of pictures `[n, 3, 64, 64]` whose first object has the colour and the shape that `specs [n, 9]` say."""
    return (judge.read(images)[:, 3:5] == specs[:, 3:5]).all(1).float().mean().item()
