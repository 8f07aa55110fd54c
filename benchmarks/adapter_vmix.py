"""VMix: how far each slider moves each look, what the judge still reads, and what the values cost."""

from __future__ import annotations

import copy
import functools
import time
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel

from benchmarks._common import picture_grid
from benchmarks.adapter import Cost, inputs, parameters_of, peers, sd15, size_of, unet_macs
from diffusers_ext import VMixAdapter, zoo
from diffusers_ext.eval import PairedTiming, count_macs, paired_ratio
from diffusers_ext.registry import MethodRecord
from diffusers_ext.zoo import looks


PICTURES, STEPS = 48, 20
POSITIVE = [pair[0] for pair in looks.LABELS]
NEGATIVE = [pair[1] for pair in looks.LABELS]
COLUMNS = ["Model", "Labels", *POSITIVE, "Judge: first shape", "Judge: all attributes"]


def training_spread() -> torch.Tensor:
    """Standard deviation of each statistic over 1000 pictures such as those of the training."""
    scenes = zoo.scenes(1000, seed=1)
    return looks.statistics(looks.show(scenes.images, looks.levels(len(scenes), 0)), scenes.specs).std(0)


def settings() -> dict[str, list[str]]:
    """Name of a row -> labels."""
    return {"all positive": POSITIVE, "all negative": NEGATIVE} | {label: [label] for label in POSITIVE + NEGATIVE}


def sd15_cost() -> Cost:
    """VMix with four pairs of labels on Stable Diffusion 1.5, counted."""
    unet, labels = sd15(), [[f"{k}+", f"{k}-"] for k in range(4)]
    with torch.device("meta"):
        adapter = VMixAdapter.for_model(unet, labels, num_text_tokens=77, aes_emb=torch.zeros(9, 768))
    y_aes = torch.zeros(1, 4, 768, device="meta")
    with torch.no_grad():
        values = list(adapter.values(y_aes).values())
    with adapter.attach(unet):
        adapter.set_condition(y_aes)
        total = count_macs(unet, *inputs())
    once = count_macs(adapter.values, y_aes)
    return Cost("VMix", parameters_of(adapter), total - unet_macs() - once, once, size_of(values))


def step_time(pairs: int = 25) -> PairedTiming:
    """Time of a step with VMix over one without, on a UNet of Stable Diffusion's layout and a quarter of its width."""
    torch.manual_seed(0)
    plain = UNet2DConditionModel(block_out_channels=(80, 160, 320, 320), cross_attention_dim=192, norm_num_groups=16)
    mixed = copy.deepcopy(plain.eval())
    adapter = VMixAdapter.for_model(plain, num_text_tokens=77, aes_emb=torch.randn(9, 192))
    call = torch.randn(2, 4, 32, 32), 500, torch.randn(2, 77, 192)

    def step(model: torch.nn.Module) -> None:
        with torch.no_grad():
            model(*call)

    with adapter.attach(mixed):
        runs = functools.partial(step, mixed), functools.partial(step, plain)
        return paired_ratio(*runs, pairs=pairs, clock=time.process_time)


def pictures_of(pipe: Any, adapter: VMixAdapter, chosen: dict[str, list[str]]) -> dict[str, torch.Tensor]:
    """Pictures of one model by setting."""
    captions = zoo.held_out(PICTURES).captions
    pictures = {"plain": zoo.generate(pipe, captions, num_inference_steps=STEPS)}
    with adapter.attach(pipe):
        for setting, labels in chosen.items():
            adapter.set_labels(labels)
            pictures[setting] = zoo.generate(pipe, captions, num_inference_steps=STEPS)
    adapter.set_labels()
    return pictures


def rows_of(name: str, pictures: dict[str, torch.Tensor]) -> list[list[str]]:
    """Rows of one model: what every setting moves, and what lies between the two labels of a pair."""
    specs, judge, spread = zoo.held_out(PICTURES).specs, zoo.load_judge(), training_spread()
    shown = {setting: looks.statistics(images, specs).mean(0) / spread for setting, images in pictures.items()}

    def moved(found: torch.Tensor) -> list[str]:
        return [f"{m:+.2f}" for m in found.tolist()]

    rows = []
    for setting, images in pictures.items():
        read = judge.accuracy(images, specs)
        rows.append(
            [name, setting, *moved(shown[setting] - shown["plain"]), f"{read['shape1']:.1%}", f"{read['all']:.1%}"]
        )
    for positive, negative in looks.LABELS:
        if positive in shown:
            rows.append([name, f"{positive} less {negative}", *moved(shown[positive] - shown[negative]), "", ""])
    return rows


def bench(record: MethodRecord, out_dir: Path) -> dict[str, Any]:
    """Rows per setting: every statistic against the plain model, in standard deviations of the training pictures."""
    adapter = VMixAdapter.from_pretrained(zoo.adapter_file("vmix-shapes-unet"), torch_dtype=torch.float32)
    pipe = zoo.load("shapes-unet")
    every = settings()
    pictures = pictures_of(pipe, adapter, every)
    relative = {name: every[name] for name in ("all positive", "all negative")}
    rows = rows_of("shapes-unet", pictures)
    rows += rows_of("shapes-unet-eps", pictures_of(zoo.load("shapes-unet-eps"), adapter, relative))
    macs = unet_macs()
    costs = "; ".join(cost.sentence(macs) for cost in (sd15_cost(), *peers()))
    notes = (
        f"Trained on shapes-unet, base frozen; {PICTURES} held-out captions, {STEPS} steps, guidance 3, the same "
        "noise for all. Looks: mean change against the plain model in standard deviations of the training pictures. "
        "shapes-unet-eps is a relative with other weights and another prediction type, which the adapter has never "
        "seen. Counted on the Stable Diffusion 1.5 "
        f"layout, 512 x 512, relative to one step of its UNet: {costs}. Measured on a quarter of its width, 32 x 32 "
        f"latents: time of a step over the plain one {step_time()}."
    )
    picture = picture_grid({name: images[:7] for name, images in pictures.items()}, out_dir / f"{record.slug}.png")
    return {"columns": COLUMNS, "rows": rows, "notes": notes, "picture": picture}
