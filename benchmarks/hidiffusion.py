"""HiDiffusion: objects at two and four times the trained size, operations of a run, time of a run."""

from __future__ import annotations

import time
from collections import Counter
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel

import diffusers_ext
from benchmarks._common import picture_grid
from diffusers_ext import HiDiffusionConfig, zoo
from diffusers_ext.attention._hidiffusion_plan import Active
from diffusers_ext.attention.hidiffusion import placement_of
from diffusers_ext.eval import count_macs, paired_ratio
from diffusers_ext.registry import MethodRecord


COLUMNS = [
    "Model",
    "Size",
    "Setting",
    "MACs of a run",
    "Time of a run",
    "Objects in place of one",
    "Shape",
    "All attributes",
]
TRAINED = 64
SETTINGS = {
    "off": None,
    "windows alone": HiDiffusionConfig(raunet=False),
    "paper's values": HiDiffusionConfig(),
    "T1 0.7": HiDiffusionConfig(t1_ratio=0.7),
    "T1 1": HiDiffusionConfig(t1_ratio=1.0),
}
LARGE = {
    "off": None,
    "paper's values": HiDiffusionConfig(),
    "T1 1, T2 0.7": HiDiffusionConfig(t1_ratio=1.0, t2_ratio=0.7),
}
SDXL = {
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
}
SD15, SDXL_SIZE = "SD 1.5 size, random weights", "SDXL size, random weights"
REAL_SIZES = [
    (SD15, {"sample_size": 64, "cross_attention_dim": 768}, (1024, 2048)),
    (SDXL_SIZE, {"sample_size": 128, **SDXL}, (2048, 4096)),
]
# What is put on the clock, and its numbers: SDXL in float32 does not leave a small machine enough memory.
TIMED = {(SD15, 1024): torch.float32, (SDXL_SIZE, 2048): torch.bfloat16}
TIMED_THREADS = 2


def single_objects(count: int) -> tuple[list[str], torch.Tensor]:
    """Held-out captions of one object on a plain ground, and what they say."""
    scenes = zoo.held_out(20 * count)
    shown = [scenes.attributes(i) for i in range(20 * count)]
    chosen = [i for i, a in enumerate(shown) if a["texture"] == "plain" and a["shape2"] == "none"][:count]
    return [scenes.captions[i] for i in chosen], scenes.specs[chosen]


def count_objects(images: torch.Tensor) -> torch.Tensor:
    """Connected areas, above 1 % of a picture of 128 x 128, that differ from the median colour of the border."""
    border = torch.cat([images[..., 0], images[..., -1], images[..., 0, :], images[..., -1, :]], -1)
    apart = ((images - border.median(-1).values[..., None, None]).abs().amax(1) > 0.4)[:, None]
    labels = torch.arange(1, apart[0].numel() + 1).view(apart[:1].shape).float() * apart
    while not torch.equal(grown := F.max_pool2d(labels, 3, 1, 1) * apart, labels):
        labels = grown
    areas = (l[l > 0].unique(return_counts=True)[1] for l in labels)
    return torch.tensor([int((area > 0.01 * 128**2).sum()) for area in areas])


def turned_on(pipe: Any, config: HiDiffusionConfig | None):
    """The method on a pipeline, or nothing."""
    return nullcontext() if config is None else diffusers_ext.apply(pipe, config)


def picture_rows(size: int, count: int, settings: dict, pictures: dict[str, torch.Tensor]):
    """Rows of shapes-unet at one size; what it draws goes into `pictures`."""
    pipe, judge = zoo.load("shapes-unet"), zoo.load_judge()
    captions, specs = single_objects(count)

    def draw(n: int, steps: int) -> torch.Tensor:
        return zoo.generate(pipe, captions[:n], num_inference_steps=steps, batch_size=8, height=size, width=size)

    plain_macs = count_macs(draw, 1, 10)
    for name, config in settings.items():
        macs = timing = "1"
        with turned_on(pipe, config):
            images = draw(count, 20)
            if config is not None:
                macs = f"{count_macs(draw, 1, 10) / plain_macs:.3f}"
        if config is not None:
            timing = str(
                paired_ratio(lambda c=config: timed(pipe, c, draw), lambda: draw(1, 10), 3, clock=time.process_time)
            )
        read = judge.accuracy(F.interpolate(images, (TRAINED, TRAINED), mode="area"), specs)
        shares = f"{count_objects(images).float().mean():.2f}", f"{read['shape1']:.0%}", f"{read['all']:.0%}"
        pictures[f"{size}\n{name}"] = images
        yield ["shapes-unet", f"{size} x {size}", name, macs, timing, *shares]


def timed(pipe: Any, config: HiDiffusionConfig, draw: Any) -> None:
    """A short run with the method."""
    with diffusers_ext.apply(pipe, config):
        draw(1, 10)


def real_size(record: MethodRecord):
    """A run of 50 steps on UNets of real size, from one call of every kind: operations, and time where it fits."""
    for name, config, sizes in REAL_SIZES:
        for size in sizes:
            unet, x, text = real_unet(config, size, "meta")
            place = placement_of(unet)
            plan = HiDiffusionConfig().plan_for(unet, place, x.shape[-2:], 50)
            kinds = Counter(plan.at(step) for step in range(50))
            macs = {kind: call_macs(unet, x, text, place, kind) for kind in (Active(), *kinds)}
            share = sum(n * macs[kind] for kind, n in kinds.items()) / (50 * macs[Active()])
            timing = ""
            if (name, size) in TIMED:
                times = call_times(*real_unet(config, size, "cpu", TIMED[name, size]), place, kinds)
                timing = f"{sum(n * times[kind] for kind, n in kinds.items()) / 50:.3f}"
            yield [name, f"{size} x {size}", "paper's values", f"{share:.3f}", timing, "", "", ""]


def real_unet(config: dict, size: int, device: str, dtype: torch.dtype = torch.float32) -> tuple[Any, ...]:
    """A UNet with random weights, latents of a picture of this size, and text."""
    torch.manual_seed(0)
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            unet = UNet2DConditionModel(**config).eval().requires_grad_(False)
            return unet, torch.randn(1, 4, size // 8, size // 8), torch.randn(1, 77, config["cross_attention_dim"])
    finally:
        torch.set_default_dtype(default)


def acting(kind: Active, place: Any) -> HiDiffusionConfig:
    """The config with which every call is of this kind."""
    first, second = (kind.pool, kind.conv) if place.pool_is_first else (kind.conv, kind.pool)
    return HiDiffusionConfig(
        windows=kind.windows > 1,
        t1_ratio=float(first),
        t2_ratio=float(second),
        aggressive=False,
        num_inference_steps=50,
    )


def call_macs(unet: Any, x: torch.Tensor, text: torch.Tensor, place: Any, kind: Active) -> int:
    """MACs of one call in which these parts act."""
    with diffusers_ext.apply(unet, acting(kind, place)):
        return count_macs(unet, x, torch.tensor(999), text)


@torch.no_grad()
def call_times(unet: Any, x: torch.Tensor, text: torch.Tensor, place: Any, kinds: Any) -> dict[Active, float]:
    """Processor time of one call of every kind over that of one plain call."""

    def seconds(kind: Active, latents: torch.Tensor = x) -> float:
        with diffusers_ext.apply(unet, acting(kind, place)):
            began = time.process_time()
            unet(latents, torch.tensor(999), text)
        return time.process_time() - began

    before = torch.get_num_threads()
    torch.set_num_threads(TIMED_THREADS)
    seconds(Active(), x[..., : x.shape[-2] // 4, : x.shape[-1] // 4])  # makes ready what the first call would
    plain = seconds(Active())
    shares = {kind: seconds(kind) / plain for kind in kinds}
    torch.set_num_threads(before)
    return shares


def notes(record: MethodRecord) -> str:
    """How it was measured."""
    return (
        "shapes-unet, trained at 64 x 64: held-out captions of one object on a plain ground (24 at 128 x 128, 4 at "
        "256 x 256), 20 steps, guidance 3. Objects are areas of more than 163 pixels that differ from the border; the "
        "judge reads pictures scaled down to the trained size. MACs and time: whole pipeline calls, one picture, 10 "
        "steps, as shares of the plain run; processor time, median of three interleaved pairs with smallest and "
        "largest. UNets of real size: 50 steps, computed from one call of every kind: operations on the meta device, "
        "processor time beside one plain call (Stable Diffusion 1.5 in float32, SDXL in bfloat16; two threads). The "
        "package hidiffusion 0.1.10 does not import with this diffusers, so there is no peer in this table."
    )


def bench(record: MethodRecord, out_dir: Path) -> dict[str, Any]:
    """Measure HiDiffusion; see `benchmarks/run.py` for the answer's form."""
    pictures: dict[str, torch.Tensor] = {}
    rows = [*picture_rows(128, 24, SETTINGS, pictures), *picture_rows(256, 4, LARGE, pictures), *real_size(record)]
    return {
        "columns": COLUMNS,
        "rows": rows,
        "notes": notes(record),
        "picture": picture_grid(pictures, out_dir / "grid.png", 4),
    }
