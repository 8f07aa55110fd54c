"""Orthogonal Adaptation: what is left of every concept when several are summed, beside ordinary LoRAs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from time import perf_counter
from typing import Any

import torch

from benchmarks._common import picture_grid
from diffusers_ext import crosstalk_report, merge_concepts, zoo
from diffusers_ext.registry import MethodRecord
from diffusers_ext.zoo.concepts import CONCEPTS, concept_scenes, identity, trigger


PICTURES, STEPS = 96, 10
KINDS = {"orthogonal": "orthogonal-adaptation", "ordinary LoRA": "plain-lora"}
COLUMNS = ["Training", "Concept", "Identity alone", "Sum of 4", "Lost", "All attributes alone", "All in the sum"]
NAMES = list(CONCEPTS)


def file_of(kind: str, name: str) -> Path:
    """The shipped LoRA of a concept."""
    return zoo.adapter_file(f"{KINDS[kind]}-{name}-shapes-unet")


def with_words() -> Any:
    """The small model with the words of all concepts."""
    pipe = zoo.load("shapes-unet")
    for name in NAMES:
        pipe.load_textual_inversion(zoo.adapter_file(f"trigger-{name}-shapes-unet"))
    return pipe


def drawn(pipe: Any, captions: Sequence[str], loras: Sequence[str]) -> torch.Tensor:
    """Pictures with these LoRAs summed."""
    pipe.set_adapters(list(loras))
    return zoo.generate(pipe, captions, num_inference_steps=STEPS)


def pairs() -> tuple[list[str], torch.Tensor]:
    """Captions with two concepts in one picture, and what they ask for."""
    captions, specs = [], []
    for first, second in ((a, b) for a in NAMES for b in NAMES if a != b):
        colour, shape = CONCEPTS[second]
        hue, form = list(zoo.world.COLOURS).index(colour), list(zoo.world.SHAPES).index(shape)
        scenes = concept_scenes(first, 60, 999)
        keep = (scenes.specs[:, 2] >= zoo.world.ROW) & (scenes.specs[:, 0] != hue)
        for row in keep.nonzero().flatten().tolist()[:4]:
            spec = scenes.specs[row].clone()
            spec[6], spec[7] = form, hue
            text = zoo.caption(spec.tolist())
            for name in (first, second):
                text = text.replace(" ".join(CONCEPTS[name]), trigger(name))
            captions.append(text)
            specs.append(spec)
    return captions, torch.stack(specs)


def both_right(images: torch.Tensor, specs: torch.Tensor, judge: Any) -> float:
    """Share of pictures in which both objects have the right colour and shape."""
    return (judge.read(images)[:, [3, 4, 6, 7]] == specs[:, [3, 4, 6, 7]]).all(1).float().mean().item()


def rows_of(kind: str, judge: Any) -> tuple[list[list[str]], dict[str, torch.Tensor], float]:
    """Rows of one kind of training, pictures for the grid, and how often the sum of all draws two at once."""
    pipe, rows, pictures = with_words(), [], {}
    for name in NAMES:
        pipe.load_lora_weights(file_of(kind, name), adapter_name=name)
    for name in NAMES:
        scenes, same, whole = concept_scenes(name, PICTURES, 999), [], []
        for loras in ([name], NAMES):
            images = drawn(pipe, scenes.captions, loras)
            same.append(identity(judge, images, scenes.specs))
            whole.append(judge.accuracy(images, scenes.specs)["all"])
            pictures[f"{kind}, <{name}>, {'alone' if len(loras) == 1 else 'sum of 4'}"] = images
        lost = f"{100 * (same[0] - same[1]):.1f} points"
        rows.append([kind, trigger(name), *(f"{share:.1%}" for share in same), lost, *(f"{w:.1%}" for w in whole)])
    captions, specs = pairs()
    return rows, pictures, both_right(drawn(pipe, captions, NAMES), specs, judge)


def bench(record: MethodRecord, out_dir: Path) -> dict[str, Any]:
    """Rows per kind of training and concept."""
    judge, rows, pictures, notes = zoo.load_judge(), [], {}, []
    for kind in KINDS:
        found, images, both = rows_of(kind, judge)
        rows += found
        pictures |= {name: value[:7] for name, value in images.items()}
        files = [file_of(kind, name) for name in NAMES]
        report = crosstalk_report(files)
        notes.append(
            f"{kind}: both concepts right in {both:.1%} of {len(pairs()[0])} pictures with two; mean overlap of "
            f"directions {sum(r.overlap for r in report.rows) / len(report.rows):.3f}, largest "
            f"||Delta_i Delta_j^T|| {max(r.deltas for r in report.rows):.2g}"
        )
    start = perf_counter()
    merge_concepts([file_of("orthogonal", name) for name in NAMES])
    seconds = perf_counter() - start
    text = (
        f"shapes-unet; {PICTURES} held-out captions per concept, one concept per caption, {STEPS} steps, guidance 3, "
        "the same noise for all. Identity: the judge reads the concept's colour and shape. Both kinds have the same "
        f"words, pictures, steps and rank. {'; '.join(notes)}. Merging four files takes {1000 * seconds:.0f} ms."
    )
    picture = picture_grid(pictures, out_dir / f"{record.slug}.png")
    return {"columns": COLUMNS, "rows": rows, "notes": text, "picture": picture}
