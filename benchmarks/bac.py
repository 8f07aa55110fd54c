"""BAC: calibrated lists of steps beside equal distances and the first-block cache: what each saves and costs."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

import diffusers_ext
from benchmarks import _real_size as real
from benchmarks._common import picture_grid
from benchmarks.cache import COLUMNS, ending, first_block, real_transformer
from diffusers_ext import BACConfig, BACStatistics, measure_bac, zoo
from diffusers_ext.eval import count_macs, mean_psnr, paired_ratio
from diffusers_ext.registry import MethodRecord


UPDATES, STEPS, PICTURES, TIMED = (10, 7, 5), 20, 16, 2
ORDERS = (0, 0.5, 1)
LONG_STEPS, LONG_UPDATES = 50, 10
UNIONS = 5
TurnedOn = real.TurnedOn


def unions_within(statistics: BACStatistics, budget: int) -> tuple[int, BACConfig]:
    """The most updates per sub-block whose schedule with unions costs no more than `budget` updates for each."""
    names = len(statistics.names)
    for updates in range(budget, 1, -1):
        config = statistics.config(updates, UNIONS, shared=False)
        if sum(map(len, config.schedule.values())) <= budget * names:
            return updates, config
    raise ValueError(f"unions of {UNIONS} blocks do not fit {budget} updates")


def kinds_of_lists(statistics: BACStatistics, updates: int) -> dict[str, BACConfig]:
    """The four ways to spend the same number of updates."""
    fewer, config = unions_within(statistics, updates)
    return {
        f"M = {updates}, calibrated, one list": statistics.config(updates),
        f"M = {updates}, equal distances": BACConfig(num_updates=updates),
        f"M = {updates}, calibrated, a list each": statistics.config(updates, 0, shared=False),
        f"M = {fewer}, a list each, unions": config,
    }


def settings(statistics: BACStatistics) -> dict[str, TurnedOn]:
    """All rows on pictures: three strengths, the paper's lists at the middle one, and the peer."""
    middle = UPDATES[1]
    configs = {}
    for updates in UPDATES:
        lists = (
            kinds_of_lists(statistics, middle)
            if updates == middle
            else {
                f"M = {updates}, calibrated, one list": statistics.config(updates),
                f"M = {updates}, equal distances": BACConfig(num_updates=updates),
            }
        )
        one, even = list(lists)[:2]
        forecast = {
            name + ending(order): replace(lists[name], forecast_order=order)
            for name in (one, even)
            for order in ORDERS[1:]
        }
        configs.update(lists | forecast)
    ours = {name: lambda pipe, c=config: diffusers_ext.apply(pipe, c) for name, config in configs.items()}
    peers = {f"diffusers FirstBlockCache, threshold {x}": lambda pipe, x=x: first_block(pipe, x) for x in (0.1, 0.2)}
    return {**ours, **peers}


def measured(pipe: Any, turned_on: TurnedOn, run: Callable[[], Any], plain: int) -> list[str]:
    """Operations and processor time of `run`, as shares of the full run."""

    def candidate() -> None:
        with turned_on(pipe):
            run()

    share = count_macs(candidate) / plain
    # Processor time of this process: other load on the machine must not decide.
    return [f"{share:.3f}", str(paired_ratio(candidate, run, pairs=3, clock=time.process_time))]


def picture_rows(pictures: dict[str, torch.Tensor]) -> Iterator[list[str]]:
    """Rows on shapes-dit with guidance; some pictures are put into `pictures`."""
    pipe, scenes, judge = zoo.load("shapes-dit"), zoo.held_out(PICTURES + 8), zoo.load_judge()
    captions, specs = scenes.captions[:PICTURES], scenes.specs[:PICTURES]

    def calibration_run(seed: int) -> None:
        zoo.generate(pipe, [scenes.captions[seed]], num_inference_steps=STEPS, seed=seed)

    def draw() -> torch.Tensor:
        return zoo.generate(pipe, captions, num_inference_steps=STEPS)

    def short() -> None:
        zoo.generate(pipe, captions[:TIMED], num_inference_steps=STEPS)

    def judged(images: torch.Tensor) -> str:
        return f"{judge.accuracy(images, specs)['all']:.1%}"

    statistics = measure_bac(pipe, calibration_run, 8, calibration_seed=PICTURES, progress=False)
    reference = pictures["uncached"] = draw()
    plain = count_macs(short)
    yield ["shapes-dit", "uncached", "1", "1", "", judged(reference)]
    for name, turned_on in settings(statistics).items():
        with turned_on(pipe):
            images = draw()
        if name.endswith("one list"):
            pictures[name.partition(",")[0]] = images
        costs = measured(pipe, turned_on, short, plain)
        yield ["shapes-dit", name, *costs, f"{mean_psnr(images, reference):.2f} dB", judged(images)]


def latent_rows() -> Iterator[list[str]]:
    """Mean squared difference of the final latents of 16 noises, without guidance."""
    pipe, captions = zoo.load("shapes-dit"), zoo.held_out(24).captions

    def draw(captions: list[str], seed: int) -> torch.Tensor:
        kept = {}

        def keep(_: Any, step: int, t: Any, values: dict[str, torch.Tensor]) -> dict:
            kept.update(values)
            return {}

        options = {"num_inference_steps": LONG_STEPS, "guidance_scale": 1.0, "callback_on_step_end": keep}
        zoo.generate(pipe, captions, seed=seed, **options)
        return kept["latents"]

    statistics = measure_bac(pipe, lambda seed: draw([captions[seed]], seed), 8, calibration_seed=16, progress=False)
    reference = draw(captions[:16], 0)
    for name, config in kinds_of_lists(statistics, LONG_UPDATES).items():
        with diffusers_ext.apply(pipe, config) as handle:
            error = (draw(captions[:16], 0) - reference).pow(2).mean().item()
            share = 1 - handle.summary()["bac"]["macs_saved"]
        yield [f"shapes-dit, {LONG_STEPS} steps, latents", name, f"{share:.3f}", "", f"MSE {error:.4f}", ""]


def real_size(record: MethodRecord) -> Iterator[list[str]]:
    """A transformer of PixArt-alpha's size."""
    for order in (0, 1):
        for updates in UPDATES:
            config = BACConfig(num_updates=updates, forecast_order=order)
            costs = real_transformer("PixArt-alpha", config, STEPS)
            name = f"M = {updates}, equal distances{ending(order)}"
            yield ["PixArt-alpha size, random weights", name, *costs, "", ""]


def notes(record: MethodRecord) -> str:
    """How it was measured."""
    return (
        f"Shapes model: {PICTURES} held-out captions, {STEPS} steps, guidance 3, calibrated on 8 others; MACs and "
        f"time of whole pipeline calls with {TIMED} pictures. MACs and Time are shares of the uncached run; time is "
        "processor time, the median of interleaved pairs with their smallest and largest. M is the number of updates "
        f"per sub-block; with unions of {UNIONS} blocks as many as cost no more than the rows above. Latents: mean "
        f"squared difference to the full run of {LONG_STEPS} steps, 16 noises, no guidance, MACs of the transformer. "
        "PixArt-alpha size: random weights, 128 x 128 latents (4096 tokens), 20 steps, float32; operations on the "
        "meta device, time computed from a full and a reused step on 4 of its blocks, each beside a plain one. "
        "Pictures: one calibrated list."
    )


def bench(record: MethodRecord, out_dir: Path) -> dict[str, Any]:
    """Measure BAC; see `benchmarks/run.py` for what is returned."""
    pictures: dict[str, torch.Tensor] = {}
    rows = [*picture_rows(pictures), *latent_rows(), *real_size(record)]
    picture = picture_grid(pictures, out_dir / f"{record.slug}.png")
    return {
        "columns": COLUMNS[:4] + ["Difference to the full run", COLUMNS[-1]],
        "rows": rows,
        "notes": notes(record),
        "picture": picture,
    }
