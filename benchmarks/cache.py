"""Caches: what a setting saves (operations, time) and what it costs (difference to the uncached run, judge's score).

Everything in one process: the uncached run, each setting, and beside it the published `DeepCache` helper for UNets or
diffusers' own first-block cache for transformers.
"""

from __future__ import annotations

import functools
import itertools
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

import diffusers_ext
from benchmarks import _real_size as real
from benchmarks._common import picture_grid
from diffusers_ext import zoo
from diffusers_ext.caching.faster_diffusion import decoded_together, key_step_list
from diffusers_ext.eval import count_macs, mean_psnr, paired_ratio
from diffusers_ext.registry import MethodRecord


INTERVALS = (2, 3, 5)
THRESHOLDS = (0.1, 0.2, 0.4)
RATIOS = (0.75, 0.5, 0.25)
FORECAST = ", forecast"
BATCHED = "50ls"
# Delta-DiT: interval, first step that may be reused, order of the forecast.
WARM_UPS = ((2, 7, 0.7), (2, 5, 0.7), (3, 6, 0.5), (4, 5, 0.3), (5, 4, 0.3))
# RAS: first step that may leave out tokens, every how many steps one is in full, order of the forecast, text reused.
TURNS = ((7, 2, 0, False), (7, 2, 1, False), (7, 2, 1, True), (8, 3, 0.7, True), (6, 3, 0.5, True))
RAS_SHARE = 1 / 16
UNET = "SD 1.5 size, random weights"
TRANSFORMER_STEPS = {"PixArt-alpha": 20, "Stable Diffusion 3": 28}
BOTH = (real.FULL, real.CHEAP)
# A forecast costs something from the second full step on.
WITH_FORECAST = (real.FULL, "cheap, repeated", *BOTH)
COLUMNS = ["Model", "Setting", "MACs", "Time", "PSNR to uncached", "Judge: all attributes"]


UNET_NOTES = (
    " Stable Diffusion 1.5 size: random weights, 64 x 64 latents, batch 1, UNet calls only, float32. One full and one "
    "cheap call of the method, each timed beside a plain call; whole runs computed from them and their operations "
    "counted on the meta device."
)
TRANSFORMER_NOTES = (
    " PixArt-alpha and Stable Diffusion 3 medium size: random weights, 128 x 128 latents (4096 tokens, and 333 of "
    "text in Stable Diffusion 3), 20 and 28 steps, float32. Operations of whole runs on the meta device; time of a "
    "full and of a cheap step, each beside a plain one, on 4 of the blocks, whole runs computed from them."
)


@dataclass(frozen=True)
class Setting:
    """One row: a name, a context manager that turns it on for a pipeline, and what sets it off from the paper."""

    name: str
    turned_on: Callable[[Any], AbstractContextManager]
    family: str = ""


@dataclass(frozen=True)
class Size:
    """How much is drawn: transformers are measured at the 20 steps their papers report."""

    steps: int
    pictures: int
    timed_pictures: int
    timed_steps: int

    @classmethod
    def of(cls, record: MethodRecord) -> Size:
        return cls(50, 32, 4, 25) if "unet" in record.targets else cls(20, 16, 2, 20)


def _configs(record: MethodRecord) -> dict[str, Any]:
    """The strengths of a method; where it can, also with its features forecast instead of repeated."""
    return _strengths(record) | _forecasts(record)


def _forecasts(record: MethodRecord) -> dict[str, Any]:
    if "forecast_order" not in record.public.__dataclass_fields__:
        return {}
    return {name + FORECAST: replace(config, forecast_order=1) for name, config in _strengths(record).items()}


def _strengths(record: MethodRecord) -> dict[str, Any]:
    """Three, weakest first, by the field that a method has for it; else its default alone."""
    fields = record.public.__dataclass_fields__
    if "cache_interval" in fields:
        return {f"N = {n}": record.public(cache_interval=n) for n in INTERVALS}
    if "interval" in fields:
        return {f"N = {n}": record.public(interval=n) for n in INTERVALS}
    if "key_steps" in fields:
        return {f"key steps {k}": record.public(key_steps=k) for k in (2, 6, BATCHED)}  # 6 and 50ls cost the same
    if "sample_ratio" in fields:
        return {f"{r:.0%} of tokens": record.public(sample_ratio=r) for r in RATIOS}
    return {"default": record.public()}


def tuned(record: MethodRecord) -> tuple[str, dict[str, Any]]:
    """What brings a method closer than its paper's settings do, and such settings; "" where there are none."""
    if record.slug == "delta-dit":
        return "warm-up", {
            f"N = {n}, 11 blocks, from step {start}{ending(order)}": record.public(
                n, 11, start_step=start, forecast_order=order
            )
            for n, start, order in WARM_UPS
        }
    if record.slug == "faster-diffusion":
        keys = (2, 3, 4)
        return "parabola", {f"key steps {k}, parabola": record.public(k, forecast_order=2) for k in keys}
    if record.slug == "ras":
        text = {f"{r:.0%} of tokens, text reused": record.public(r, reuse_text=True) for r in RATIOS}
        return "tuned", text | dict(in_turns(record, *turn) for turn in TURNS)
    return "", {}


def in_turns(record: MethodRecord, start: int, every: int, order: float, text: bool) -> tuple[str, Any]:
    """RAS on 20 steps of which only some leave out tokens."""
    name = f"6%, from step {start}, every {('2nd', '3rd')[every - 2]} in full{ending(order)}" + ", text reused" * text
    resets = range(start + every - 1, 20, every)
    return name, record.public(RAS_SHARE, start, error_reset_steps=resets, forecast_order=order, reuse_text=text)


def ending(order: float) -> str:
    """What a forecast adds to a setting's name."""
    return "" if not order else FORECAST if order == 1 else f"{FORECAST} {order:g}"


@contextmanager
def helper(pipe: Any, interval: int, branch: int = 0) -> Iterator[None]:
    """The published helper package of DeepCache, the peer."""
    from DeepCache import DeepCacheSDHelper

    helper = DeepCacheSDHelper(pipe=pipe)
    helper.set_params(cache_interval=interval, cache_branch_id=branch)
    helper.enable()
    try:
        yield
    finally:
        helper.disable()


@contextmanager
def first_block(pipe: Any, threshold: float) -> Iterator[None]:
    """diffusers' own first-block cache, the peer of transformer caches."""
    from diffusers.hooks import FirstBlockCacheConfig

    config = FirstBlockCacheConfig(threshold=threshold)
    if not hasattr(pipe.transformer, "enable_cache"):  # PixArt: diffusers offers its caches to other models only
        with diffusers_ext.apply(pipe, config):
            yield
        return
    pipe.transformer.enable_cache(config)
    try:
        yield
    finally:
        pipe.transformer.disable_cache()


@contextmanager
def dbcache(pipe: Any, threshold: float) -> Iterator[None]:
    """cache-dit's DBCache: first block computed, the others by its residual, warm-up of two steps."""
    import cache_dit

    logging.getLogger("CACHE_DIT").setLevel(logging.ERROR)
    config = cache_dit.DBCacheConfig(
        Fn_compute_blocks=1,
        Bn_compute_blocks=0,
        max_warmup_steps=2,
        residual_diff_threshold=threshold,
        enable_separate_cfg=True,
    )
    cache_dit.enable_cache(pipe, cache_config=config)
    try:
        yield
    finally:
        cache_dit.disable_cache(pipe)


PEERS = {"diffusers FirstBlockCache": first_block, "cache-dit DBCache": dbcache}


def as_cheap_as(config: Any, peer: Callable[[Any, float], AbstractContextManager]) -> float:
    """The lowest threshold at which a peer computes no more than `config` does on shapes-dit, to a hundredth."""
    pipe, captions = zoo.load("shapes-dit"), list(zoo.held_out(1).captions)
    run = _denoise_only(pipe, captions, 20)
    with diffusers_ext.apply(pipe, config):
        allowed = count_macs(run)

    def cost(hundredths: int) -> int:
        with peer(pipe, hundredths / 100):
            return count_macs(run)

    low, high = 0, 64
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if cost(middle) <= 1.01 * allowed else (middle, high)
    return high / 100


def own_settings(record: MethodRecord) -> list[Setting]:
    """The settings of a method itself: its paper's at three strengths, the same with a forecast, tuned ones."""
    families = (("", _strengths(record)), ("forecast", _forecasts(record)), tuned(record))
    return [
        Setting(name, lambda pipe, config=config: diffusers_ext.apply(pipe, config), family)
        for family, configs in families
        for name, config in configs.items()
    ]


def _peers_as_cheap_as(record: MethodRecord) -> Iterator[Setting]:
    """First-block caches with as many operations as each interval of a method; last cache-dit, which leaves traces."""
    for (name, peer), n in itertools.product(PEERS.items(), INTERVALS):
        x = as_cheap_as(record.public(cache_interval=n), peer)
        yield Setting(f"{name}, as cheap as N = {n}: threshold {x:.2f}", lambda pipe, p=peer, x=x: p(pipe, x))


def settings_of(record: MethodRecord) -> list[Setting]:
    """All rows of a method: its own settings, then its peers'."""
    rows = own_settings(record)
    if record.slug == "deepcache":
        rows += [Setting(f"N = {n}, PyPI DeepCache 0.1.1", lambda pipe, n=n: helper(pipe, n)) for n in INTERVALS]
    if record.slug == "delta-dit":
        config = record.public(span_order="front_then_rear")
        rows.append(Setting("N = 2, front then rear", lambda pipe: diffusers_ext.apply(pipe, config)))
        return [*rows, *_peers_as_cheap_as(record)]
    if record.slug == "faster-diffusion":
        rows += [
            Setting(f"PyPI DeepCache 0.1.1, N = {n}, branch {b}", lambda pipe, n=n, b=b: helper(pipe, n, b))
            for n, b in ((2, 0), (2, 3), (2, 4), (3, 6), (2, 6))
        ]
    if "unet" not in record.targets:
        peer = "diffusers FirstBlockCache"
        rows += [Setting(f"{peer}, threshold {x}", lambda pipe, x=x: first_block(pipe, x)) for x in THRESHOLDS]
    return rows


def _zoo_pipeline(record: MethodRecord):
    pipe = zoo.load("shapes-unet" if "unet" in record.targets else "shapes-dit")
    if "unet" in record.targets:
        from diffusers import DDIMScheduler

        pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    return pipe


def _ratio_of_macs(run: Callable[[], Any], turned_on: Callable[[], AbstractContextManager]) -> float:
    plain = count_macs(run)
    with turned_on():
        return count_macs(run) / plain


def _time_ratio(run: Callable[[], Any], turned_on: Callable[[], AbstractContextManager], pairs: int):
    def candidate() -> None:
        with turned_on():
            run()

    # Processor time of this process: other load on the machine must not decide.
    return paired_ratio(candidate, run, pairs=pairs, clock=time.process_time)


def _denoise_only(pipe: Any, captions: list[str], steps: int) -> Callable[[], Any]:
    return lambda: zoo.generate(pipe, captions, num_inference_steps=steps)


def measured(
    pipe: Any, setting: Setting, draw: Callable[[], torch.Tensor], short: Callable[[], Any]
) -> tuple[torch.Tensor, list[str]]:
    """Pictures that `draw` makes under a setting, and its shares of the operations and time of `short`."""
    with setting.turned_on(pipe):
        images = draw()
    macs = _ratio_of_macs(short, lambda: setting.turned_on(pipe))
    return images, [f"{macs:.3f}", str(_time_ratio(short, lambda: setting.turned_on(pipe), pairs=3))]


def zoo_rows(
    record: MethodRecord, size: Size, pictures: dict[str, torch.Tensor], extra: Sequence[Setting] = ()
) -> Iterator[list[Any]]:
    """Rows on the trained shapes model; pictures of the method's own settings are put into `pictures`."""
    pipe, scenes, judge = _zoo_pipeline(record), zoo.held_out(size.pictures), zoo.load_judge()
    name = "shapes-unet" if "unet" in record.targets else "shapes-dit"

    def draw() -> torch.Tensor:
        return zoo.generate(pipe, scenes.captions, num_inference_steps=size.steps)

    def judged(images: torch.Tensor) -> str:
        return f"{judge.accuracy(images, scenes.specs)['all']:.1%}"

    reference = pictures["uncached"] = draw()
    yield [name, "uncached", "1", "1", "", judged(reference)]
    short = _denoise_only(pipe, list(scenes.captions[: size.timed_pictures]), size.timed_steps)
    own = {setting.name for setting in own_settings(record)}
    for setting in (*settings_of(record), *extra):
        images, costs = measured(pipe, setting, draw, short)
        if setting.name in own:
            pictures[setting.name] = images
        yield [name, setting.name, *costs, f"{mean_psnr(images, reference):.2f} dB", judged(images)]


def unet_rows(record: MethodRecord, extra: Sequence[Setting] = ()) -> Iterator[list[Any]]:
    """Rows on a UNet of Stable Diffusion 1.5's size.

    One full and one shallow call are measured at N = 2, where they alternate; a run at interval N is one full call
    and N - 1 shallow ones.
    """
    for setting in (*settings_of(record), *extra):
        if "N = 2" not in setting.name:
            continue
        full, shallow = real.macs_of_steps(real.stable_diffusion("meta"), setting.turned_on, 2)
        kinds = WITH_FORECAST if setting.name.endswith(FORECAST) else BOTH
        times = real.timed(real.stable_diffusion("cpu"), setting.turned_on, kinds)
        for n in INTERVALS:
            name = setting.name.replace("N = 2", f"N = {n}")
            yield [UNET, name, *real.of_a_run([full, *[shallow] * (n - 1)], times), "", ""]


def key_step_rows(record: MethodRecord) -> Iterator[list[Any]]:
    """A run of 50 steps on a UNet of Stable Diffusion 1.5's size, from calls at a key step and in between.

    The last row decodes up to `real.SHORT` steps in one batch, as the paper does.
    """
    total, half = 50, record.public(key_steps=2)
    together = record.public(key_steps=(0,), max_parallel=real.SHORT)
    full, reused = real.macs_of_steps(real.stable_diffusion("meta"), lambda p: diffusers_ext.apply(p, half), 2)
    denoiser = real.stable_diffusion("cpu")
    repeated = real.timed(denoiser, lambda p: diffusers_ext.apply(p, half), BOTH)
    forecast = replace(half, forecast_order=1)
    times = (repeated, real.timed(denoiser, lambda p: diffusers_ext.apply(p, forecast), WITH_FORECAST))
    for name, config in _configs(record).items():
        macs = [full if config.is_key_step(i, total) else reused for i in range(total)]
        yield [UNET, name, *real.of_a_run(macs, times[config.forecast_order]), "", ""]
    batch = real.timed(denoiser, lambda p: diffusers_ext.apply(p, together), (real.FULL,))[real.FULL]
    decoder = (batch - repeated[real.FULL] + repeated[real.CHEAP]) / real.SHORT
    spent = _decoded_in_batches(total, repeated, decoder)
    name = f"key steps {BATCHED}, {real.SHORT} decoded at once"
    yield [UNET, name, real.of_a_run(macs, repeated)[0], f"{spent:.3f}", "", ""]


def _decoded_in_batches(total: int, times: dict[str, float], decoder: float) -> float:
    """Share of time of a run with `BATCHED` whose full batches of `real.SHORT` steps cost `decoder` a step."""
    keys, encoder = key_step_list(total, BATCHED), times[real.FULL] - times[real.CHEAP]
    step, spent = 0, len(keys) * encoder
    while step < total:
        count = decoded_together(step, total, keys, real.SHORT)
        spent += count * (decoder if count == real.SHORT else times[real.CHEAP])
        step += count
    return spent / total


def transformer_rows(record: MethodRecord) -> Iterator[list[Any]]:
    """Transformers of real size: operations of whole runs on the meta device, time of a full and of a cheap step."""
    for name, steps in TRANSFORMER_STEPS.items():
        for setting, config in _configs(record).items():
            yield [f"{name} size, random weights", setting, *real_transformer(name, config, steps), "", ""]


def real_transformer(name: str, config: Any, steps: int) -> tuple[str, str]:
    """Shares of operations and time of a run on a transformer of `real.TRANSFORMERS`."""
    macs = real.macs_of_steps(real.TRANSFORMERS[name]("meta"), lambda p: diffusers_ext.apply(p, config), steps)
    return real.of_a_run(macs, _times(name, _short(config)))


def _short(config: Any) -> Any:
    """The same full and cheap steps in turn, from the first step on."""
    if hasattr(config, "sample_ratio"):
        return replace(config, start_step=1, error_reset_steps=())
    return replace(config, **{"num_updates" if hasattr(config, "num_updates") else "cache_interval": 2})


@functools.cache
def _times(name: str, config: Any) -> dict[str, float]:
    denoiser = real.TRANSFORMERS[name]("cpu", num_layers=real.TIMED_BLOCKS)
    kinds = WITH_FORECAST if getattr(config, "forecast_order", 0) else BOTH
    return real.timed(denoiser, lambda pipe: diffusers_ext.apply(pipe, config), kinds)


def real_size(record: MethodRecord, extra: Sequence[Setting] = ()) -> Iterator[list[Any]]:
    """Rows of networks of real size, which hold random weights."""
    if "unet" not in record.targets:
        return transformer_rows(record)
    return key_step_rows(record) if "key_steps" in record.public.__dataclass_fields__ else unet_rows(record, extra)


def notes(record: MethodRecord, size: Size | None = None) -> str:
    """How it was measured."""
    size = size or Size.of(record)
    return (
        f"Shapes model: {size.pictures} held-out captions, {size.steps} steps, guidance 3; MACs and time of whole "
        f"pipeline calls with {size.timed_pictures} pictures and {size.timed_steps} steps. MACs and Time are shares "
        "of the uncached run; time is processor time, the median of interleaved pairs with their smallest and largest."
        + (UNET_NOTES if "unet" in record.targets else TRANSFORMER_NOTES)
    )


def bench(
    record: MethodRecord, out_dir: Path, extra: Sequence[Setting] = (), size: Size | None = None
) -> dict[str, Any]:
    """Measure a cache.

    Args:
        record: Its catalogue record.
        out_dir: Where the picture is written.
        extra: Settings of a UNet cache beside those of its record and its peers.
        size: How much is drawn; None for what its kind of cache is measured with.

    Returns:
        `columns`, `rows`, `notes` and `picture`, as `benchmarks/run.py` expects.
    """
    pictures: dict[str, torch.Tensor] = {}
    size = size or Size.of(record)
    rows = list(zoo_rows(record, size, pictures, extra))
    rows += real_size(record, extra)
    picture = picture_grid(pictures, out_dir / f"{record.slug}.png")
    return {"columns": COLUMNS, "rows": rows, "notes": notes(record, size), "picture": picture}
