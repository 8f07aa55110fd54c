"""VMoBA: operations, time and error beside full attention and a random choice of as many blocks.

Its home is video, for which the package ships no trained model: the picture model at twice its size says what the
choice does to pictures, Wan's layers with random weights what they cost.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

import diffusers_ext
from benchmarks._common import picture_grid
from diffusers_ext import VMoBAConfig, zoo
from diffusers_ext.attention.vmoba_blocks import Rule, block_attention, gates, partitions, sparse_attention
from diffusers_ext.caching._common import macs_on_meta
from diffusers_ext.eval import count_macs, mean_psnr, paired_ratio
from diffusers_ext.registry import MethodRecord


COLUMNS = ["Layers", "Setting", "Blocks kept", "MACs", "Time", "Off by"]
THRESHOLDS = (0.75, 0.5, 0.25)
PICTURES, STEPS, SIZE = 4, 10, 128
GRID = (16, 16, 16)
# Frames, height and width in tokens; the last is 81 frames of 480 x 832 pixels.
VIDEOS = {
    "4096 tokens": (16, 16, 16),
    "32760 tokens (81 frames, 480 x 832)": (21, 30, 52),
}


def planted(blocks: int = 16) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Queries, keys and values `[1, 4, 4096, 64]` whose queries look for one block of keys each, with noise."""
    generator = torch.Generator().manual_seed(0)
    size, width = GRID[0] * GRID[1] * GRID[2] // blocks, 64

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(1, 4, *shape, generator=generator)

    centres = F.normalize(normal(blocks, width), dim=-1) * 8
    wanted = torch.randint(0, blocks, (blocks * size,), generator=generator)
    keys = centres.repeat_interleave(size, 2) + 0.5 * normal(blocks * size, width)
    return centres[:, :, wanted] + 0.5 * normal(blocks * size, width), keys, normal(blocks * size, width)


def attention_rows() -> list[list[Any]]:
    """One attention over 4096 tokens in 16 blocks of 256, in block order."""
    query, key, value = planted()
    sizes, own = (256,) * 16, torch.arange(16).repeat_interleave(256)
    partition = partitions(GRID)[0]
    full = F.scaled_dot_product_attention(query, key, value)
    plain, rows = count_macs(F.scaled_dot_product_attention, query, key, value), []
    for tau in (1.0, 0.5, 0.25, 0.1):
        rule = Rule(threshold=tau)
        output, cost = sparse_attention(query, key, value, partition, rule)
        timing = paired_ratio(
            lambda rule=rule: sparse_attention(query, key, value, partition, rule),
            lambda: F.scaled_dot_product_attention(query, key, value),
            pairs=2,
            clock=time.process_time,
        )
        error = (output - full).norm() / full.norm()
        rows.append(
            [f"threshold {tau:g}", f"{cost.kept:.3f}", f"{cost.macs / plain:.3f}", str(timing), f"{error:.1%}"]
        )
    keep = Rule(threshold=0.25).select(gates(query, key, sizes), own)
    order = torch.rand(keep.shape, generator=torch.Generator().manual_seed(1)).argsort(-1)
    random = keep.gather(-1, order) | F.one_hot(own, 16).bool()
    error = (block_attention(query, key, value, random, sizes) - full).norm() / full.norm()
    rows.append(["as many as at 0.25, at random", f"{random.float().mean():.3f}", "", "", f"{error:.1%}"])
    return [["attention alone, planted blocks, 4096 tokens", *row] for row in rows]


def real_size(record: MethodRecord) -> Iterator[list[Any]]:
    """A layer of Wan 2.1 1.3B's size with random weights, one call on videos of rising length."""
    from diffusers import WanTransformer3DModel

    torch.manual_seed(0)
    model = WanTransformer3DModel(
        num_attention_heads=12, attention_head_dim=128, ffn_dim=8960, num_layers=1, text_dim=64
    )
    model.eval().requires_grad_(False)
    config, text = VMoBAConfig(full_attention_first_steps=0), torch.randn(1, 16, 64)
    for name, (frames, height, width) in VIDEOS.items():
        latents = torch.randn(1, 16, frames, 2 * height, 2 * width)
        run = _call(model, latents, text)
        plain = macs_on_meta(model, ((latents, torch.tensor([500]), text), {}))
        with diffusers_ext.apply(model, config) as handle:
            macs = count_macs(run)
            kept = list(handle.summary()["vmoba"]["kept"].values())
        timing = paired_ratio(_under(model, config, run), run, pairs=1, warmup=0, clock=time.process_time)
        row = [f"threshold {config.threshold:g}", f"{sum(kept):.3f}", f"{macs / plain:.3f}", f"{timing.ratio:.3f}"]
        yield [f"Wan 1.3B size, one layer, random weights, {name}", *row, ""]


def _call(model: torch.nn.Module, latents: torch.Tensor, text: torch.Tensor) -> Callable[[], None]:
    @torch.no_grad()
    def run() -> None:
        model(latents, torch.tensor([500]), text, return_dict=False)

    return run


def _under(model: torch.nn.Module, config: VMoBAConfig, run: Callable[[], None]) -> Callable[[], None]:
    def sparse() -> None:
        with diffusers_ext.apply(model, config):
            run()

    return sparse


def picture_rows(pictures: dict[str, torch.Tensor]) -> list[list[Any]]:
    """The trained picture model at 128 x 128, twice its size: 256 tokens."""
    pipe, scenes, rows = zoo.load("shapes-dit"), zoo.held_out(PICTURES), []

    def draw() -> torch.Tensor:
        return zoo.generate(pipe, scenes.captions, num_inference_steps=STEPS, height=SIZE, width=SIZE)

    reference = pictures["full"] = draw()
    settings = {f"threshold {tau:g}": VMoBAConfig(tau) for tau in THRESHOLDS}
    settings["0.25, heads decide"] = VMoBAConfig(0.25, threshold_type="head_global")
    for name, config in settings.items():
        with diffusers_ext.apply(pipe, config) as handle:
            images = draw()
            figures = handle.summary()["vmoba"]
        if config.threshold_type == "query_head":
            pictures[name] = images
        kept = sum(figures["kept"].values()) / len(figures["kept"])
        psnr = f"{mean_psnr(images, reference):.2f} dB"
        rows.append(["shapes-dit at 128 x 128", name, f"{kept:.3f}", f"{1 - figures['macs_saved']:.3f}", "", psnr])
    return rows


def notes(record: MethodRecord) -> str:
    """How it was measured."""
    return (
        "MACs and Time are shares of full attention (first rows) or of the whole model with it; processor time "
        "on a CPU, the median of interleaved pairs with their smallest and largest. No GPU was at hand. Off by: "
        "relative error of the output, and PSNR to the pictures of full attention. Planted blocks: each query looks "
        f"for one block of 256 keys. shapes-dit: {PICTURES} held-out captions, {STEPS} steps of which 2 are full, 16 "
        "blocks of 16 tokens. Wan: one call of each."
    )


def bench(record: MethodRecord, out_dir: Path) -> dict[str, Any]:
    """Measure VMoBA; see `benchmarks/run.py` for the answer's form."""
    pictures: dict[str, torch.Tensor] = {}
    rows = [*attention_rows(), *real_size(record), *picture_rows(pictures)]
    return {
        "columns": COLUMNS,
        "rows": rows,
        "notes": notes(record),
        "picture": picture_grid(pictures, out_dir / "grid.png", PICTURES),
    }
