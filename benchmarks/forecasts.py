"""How much of a trend caches should continue: closeness to the run without a cache over the order of their forecasts.

The captions are others than those of all other tables of caches, so that settings can be chosen by these curves.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

import diffusers_ext
from benchmarks.bac import UPDATES
from benchmarks.cache import INTERVALS, TURNS, WARM_UPS, in_turns
from benchmarks.frontier import CalibratedBAC
from diffusers_ext import (
    DeepCacheConfig,
    DeltaDiTConfig,
    FasterDiffusionConfig,
    FeatureInheritanceConfig,
    RASConfig,
    zoo,
)
from diffusers_ext.eval import mean_psnr
from diffusers_ext.registry import get_method


STEPS = {"shapes-unet": 50, "shapes-dit": 20}
FIRST, PICTURES = 100, {"shapes-unet": 8, "shapes-dit": 16}
ORDERS = {"shapes-unet": (0, 0.3, 0.5, 0.7, 1, 1.5, 2), "shapes-dit": (0, 0.3, 0.5, 0.7, 1)}
ALL_ORDERS = ORDERS["shapes-unet"]
COLUMNS = ["Model", "Setting", *(f"Order {order:g}" for order in ALL_ORDERS)]
TurnedOn = Callable[[Any, float], AbstractContextManager]


def _applied(make: Callable[[float], Any]) -> TurnedOn:
    return lambda pipe, order: diffusers_ext.apply(pipe, make(order))


def settings(name: str) -> Iterator[tuple[str, TurnedOn]]:
    """What is turned on for a pipeline at an order, by name."""
    if name == "shapes-unet":
        for n in INTERVALS:
            yield f"deepcache, N = {n}", _applied(lambda o, n=n: DeepCacheConfig(n, forecast_order=o))
        for n in INTERVALS:
            yield f"a-sdm, N = {n}", _applied(lambda o, n=n: FeatureInheritanceConfig(interval=n, forecast_order=o))
        for k in (2, 3, 6):
            label = f"faster-diffusion, key steps {k}"
            yield label, _applied(lambda o, k=k: FasterDiffusionConfig(k, forecast_order=o))
        return
    for n, start, _ in WARM_UPS:
        label = f"delta-dit, N = {n}, 11 blocks, from step {start}"
        yield label, _applied(lambda o, n=n, s=start: DeltaDiTConfig(n, 11, start_step=s, forecast_order=o))
    for start, every, _, text in TURNS:
        if text:
            label, config = in_turns(get_method("ras"), start, every, 0, True)
            yield f"ras, {label}", _applied(lambda o, c=config: replace(c, forecast_order=o))
    yield "ras, 25% of tokens, text reused", _applied(lambda o: RASConfig(0.25, forecast_order=o, reuse_text=True))
    bac = CalibratedBAC(STEPS[name])
    for updates in UPDATES:
        yield f"bac, calibrated, M = {updates}", lambda pipe, o, m=updates: bac.turned_on(pipe, m, o)


def curves(name: str) -> Iterator[tuple[str, dict[float, float]]]:
    """PSNR to the run without a cache by order, for each setting."""
    pipe, captions = zoo.load(name), zoo.held_out(PICTURES[name], start=FIRST).captions
    if name == "shapes-unet":
        from diffusers import DDIMScheduler

        pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)

    def draw() -> torch.Tensor:
        return zoo.generate(pipe, captions, num_inference_steps=STEPS[name])

    reference = draw()
    for label, turned_on in settings(name):
        found = {}
        for order in ORDERS[name]:
            with turned_on(pipe, order):
                found[order] = mean_psnr(draw(), reference)
        yield label, found


def plot(found: dict[str, dict[str, dict[float, float]]], path: Path) -> Path:
    """A curve per setting, a panel per model."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, len(found), figsize=(12, 6.5), dpi=110)
    looks = itertools.product("osD^v", pyplot.get_cmap("tab10").colors[:5])
    for axes, (name, settings_of_model) in zip(panels, found.items()):
        for label, curve in settings_of_model.items():
            marker, color = next(looks)
            axes.plot(list(curve), list(curve.values()), marker=marker, color=color, ms=4, lw=1, label=label)
        axes.set(title=name, xlabel="order of the forecast", ylabel="PSNR to the run without a cache, dB")
        axes.grid(alpha=0.3)
        axes.legend(fontsize=6, loc="upper center", bbox_to_anchor=(0.5, -0.12), ncols=2)
    figure.tight_layout()
    figure.savefig(path)
    pyplot.close(figure)
    return path


def bench(out_dir: Path) -> dict[str, Any]:
    """Measure all curves; see `benchmarks/run.py` for what is returned."""
    found = {name: dict(curves(name)) for name in STEPS}
    rows = [
        [name, label, *(f"{curve[order]:.2f} dB" if order in curve else "" for order in ALL_ORDERS)]
        for name, settings_of_model in found.items()
        for label, curve in settings_of_model.items()
    ]
    counts = ", ".join(f"{count} on {name}" for name, count in PICTURES.items())
    notes = (
        f"PSNR to the pictures without a cache; held-out captions from number {FIRST} on ({counts}), guidance 3; DDIM "
        "with 50 steps, Euler with 20. An order costs no operations. BAC was calibrated on four other captions, RAS "
        "knows orders up to 1, and transformers were measured up to 1."
    )
    return {"columns": COLUMNS, "rows": rows, "notes": notes, "picture": plot(found, out_dir / "forecasts.png")}
