"""Attention methods: pictures away from the trained size, read by the judge, and the entropy of attention."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import Attention, AttnProcessor

import diffusers_ext
from benchmarks._common import picture_grid
from diffusers_ext import AttentionEntropyScalingConfig, zoo
from diffusers_ext.eval import paired_ratio
from diffusers_ext.registry import MethodRecord


COLUMNS = [
    "Size",
    "Setting",
    "Entropy off by (nats)",
    "Judge: all attributes",
    "First shape",
    "More objects than asked",
]
SIZES = (32, 48, 96, 128)
STRENGTHS = (0.0, 0.25, 0.5, 1.0)
PICTURES, STEPS, TRAINED = 24, 20, 64
# Four times the trained side costs too much for more than a look.
LARGEST, FEW = 256, 4


def bench(record: MethodRecord, out_dir: Path) -> dict[str, Any]:
    """Measure an attention method; see `benchmarks/run.py` for the answer's form."""
    return {"attention-entropy-scaling": entropy_scaling}[record.slug](out_dir)


@contextmanager
def recorded_entropies(pipe: Any) -> Iterator[list[float]]:
    """Mean row entropies of the UNet's self-attention layers, in the order in which they run."""
    found, original = [], Attention.get_attention_scores

    def note(self, *args):
        weights = original(self, *args)
        if not self.is_cross_attention:
            found.append(torch.special.entr(weights).sum(-1).mean().item())
        return weights

    before = pipe.unet.attn_processors
    pipe.unet.set_attn_processor(AttnProcessor())
    Attention.get_attention_scores = note
    try:
        yield found
    finally:
        Attention.get_attention_scores = original
        pipe.unet.set_attn_processor(before)


def entropies(pipe: Any, size: int, strength: float) -> torch.Tensor:
    """Entropy by layer, mean over the steps of a short run."""
    config = AttentionEntropyScalingConfig(strength=strength)
    with recorded_entropies(pipe) as found, diffusers_ext.apply(pipe, config):
        zoo.generate(pipe, zoo.held_out(4).captions, num_inference_steps=5, height=size, width=size)
    return torch.tensor(found).view(5, -1).mean(0)


def count_objects(images: torch.Tensor) -> torch.Tensor:
    """Connected areas, above 1 % of the picture, that differ from the ground (the median colour of the border).

    Args:
        images: `[n, 3, h, w]` in [-1, 1], on plain grounds.
    """
    border = torch.cat([images[..., 0], images[..., -1], images[..., 0, :], images[..., -1, :]], -1)
    ground = border.median(-1).values[..., None, None]
    apart = ((images - ground).abs().amax(1) > 0.4)[:, None]
    labels = torch.arange(1, apart[0].numel() + 1).view(apart[:1].shape).float() * apart
    while not torch.equal(grown := F.max_pool2d(labels, 3, 1, 1) * apart, labels):
        labels = grown
    least = 0.01 * apart[0].numel()
    areas = (l[l > 0].unique(return_counts=True)[1] for l in labels)
    return torch.tensor([int((area > least).sum()) for area in areas])


def _repeated(images: torch.Tensor, scenes: Any) -> float:
    """Share of plain-ground pictures that show more objects than the caption names."""
    shown = [scenes.attributes(i) for i in range(len(scenes.captions))]
    plain = torch.tensor([a["texture"] == "plain" for a in shown])
    asked = torch.tensor([1 + (a["shape2"] != "none") for a in shown])
    return (count_objects(images[plain]) > asked[plain]).float().mean().item()


def _name(strength: float) -> str:
    return f"strength {strength:g}" if strength else "off"


def entropy_scaling(out_dir: Path) -> dict[str, Any]:
    """Sizes from half to twice the trained one, without and at three strengths, and a look at four times."""
    pipe, scenes, judge = zoo.load("shapes-unet"), zoo.held_out(PICTURES), zoo.load_judge()
    trained, rows, pictures = entropies(pipe, TRAINED, 0.0), [], {}
    for size in SIZES:
        for strength in STRENGTHS:
            with diffusers_ext.apply(pipe, AttentionEntropyScalingConfig(strength=strength)):
                images = zoo.generate(pipe, scenes.captions, num_inference_steps=STEPS, height=size, width=size)
            read = judge.accuracy(F.interpolate(images, (TRAINED, TRAINED), mode="area"), scenes.specs)
            off = (entropies(pipe, size, strength) - trained).abs().mean()
            name = _name(strength)
            shares = (read["all"], read["shape1"], _repeated(images, scenes))
            rows.append([f"{size} x {size}", name, f"{off:.3f}", *(f"{share:.1%}" for share in shares)])
            pictures[f"{size}, {name}"] = images
    for strength in STRENGTHS:
        with diffusers_ext.apply(pipe, AttentionEntropyScalingConfig(strength=strength)):
            few = zoo.generate(pipe, scenes.captions[:FEW], num_inference_steps=STEPS, height=LARGEST, width=LARGEST)
        pictures[f"{LARGEST}, {_name(strength)}"] = few
    config = AttentionEntropyScalingConfig()

    def plain() -> None:
        zoo.generate(pipe, scenes.captions[:2], num_inference_steps=5, height=128, width=128)

    def scaled() -> None:
        with diffusers_ext.apply(pipe, config):
            plain()

    cost = paired_ratio(scaled, plain, pairs=5, clock=time.process_time)
    notes = (
        f"shapes-unet, trained at {TRAINED} x {TRAINED}; {PICTURES} held-out captions, {STEPS} steps, guidance 3. "
        "Entropy: difference to the trained size, mean over layers and 5 steps. The judge reads pictures scaled to "
        "the trained size; objects are counted on plain grounds. Time of a run with the method over one without: "
        f"{cost}."
    )
    shown = {name: p for name, p in pictures.items() if name.split(",")[0] in ("32", "128", str(LARGEST))}
    return {"columns": COLUMNS, "rows": rows, "notes": notes, "picture": picture_grid(shown, out_dir / "grid.png")}
