"""Caches: what a setting saves (operations, time) and what it costs (difference to the uncached run, judge's score).

Everything in one process: the uncached run, each setting, and beside it the published `DeepCache` helper for UNets or
diffusers' own first-block cache for transformers.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

import diffusers_ext
from benchmarks._common import picture_grid
from diffusers_ext import zoo
from diffusers_ext.eval import count_macs, mean_psnr, paired_ratio
from diffusers_ext.registry import MethodRecord


INTERVALS = (2, 3, 5)
THRESHOLDS = (0.1, 0.2, 0.4)
RATIOS = (0.75, 0.5, 0.25)
# What fits a wall clock on one processor: PixArt-alpha's blocks at half their width, a quarter of its tokens.
SMALL_PIXART = {"num_layers": 4, "attention_head_dim": 36, "cross_attention_dim": 576, "sample_size": 64}
COLUMNS = ["Model", "Setting", "MACs", "Time", "PSNR to uncached", "Judge: all attributes"]


@dataclass(frozen=True)
class Setting:
    """One row: a name, and a context manager that turns it on for a pipeline."""

    name: str
    turned_on: Callable[[Any], AbstractContextManager]


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
    """Three strengths, weakest first, by the field that a method has for it; else its default alone."""
    fields = record.public.__dataclass_fields__
    if "cache_interval" in fields:
        return {f"N = {n}": record.public(cache_interval=n) for n in INTERVALS}
    if "interval" in fields:
        return {f"N = {n}": record.public(interval=n) for n in INTERVALS}
    if "key_steps" in fields:
        return {f"key steps {k}": record.public(key_steps=k) for k in (2, "50ls", 8)}
    if "sample_ratio" in fields:
        return {f"{r:.0%} of tokens": record.public(sample_ratio=r) for r in RATIOS}
    return {"default": record.public()}


@contextmanager
def helper(pipe: Any, interval: int) -> Iterator[None]:
    """The published helper package of DeepCache, the peer."""
    from DeepCache import DeepCacheSDHelper

    helper = DeepCacheSDHelper(pipe=pipe)
    helper.set_params(cache_interval=interval, cache_branch_id=0)
    helper.enable()
    try:
        yield
    finally:
        helper.disable()


@contextmanager
def _first_block(pipe: Any, threshold: float) -> Iterator[None]:
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
def _random_tokens(pipe: Any) -> Iterator[None]:
    """RAS with half of the tokens, drawn afresh at every step."""
    from diffusers_ext import RASConfig
    from diffusers_ext.caching import ras_tokens

    scores, generator = ras_tokens.token_scores, torch.Generator().manual_seed(0)
    ras_tokens.token_scores = lambda *args: torch.rand(scores(*args).shape, generator=generator)
    try:
        with diffusers_ext.apply(pipe, RASConfig(0.5, starvation_scale=0.0)):
            yield
    finally:
        ras_tokens.token_scores = scores


@contextmanager
def _every_other_output(pipe: Any) -> Iterator[None]:
    """The whole output of the step before, on every other of the steps on which RAS leaves out tokens."""
    from diffusers_ext import RASConfig

    plan, calls, last, original = RASConfig(0.5).plan(20), Counter(), {}, pipe.transformer.forward
    reused = [step for step in range(20) if plan.skipped(step, 64)][::2]

    def forward(*args: Any, **kwargs: Any) -> Any:
        kind = kwargs["encoder_hidden_states"].data_ptr()
        calls[kind] += 1
        if calls[kind] - 1 not in reused:
            last[kind] = original(*args, **kwargs)
        return last[kind]

    pipe.transformer.forward = forward
    try:
        yield
    finally:
        del pipe.transformer.forward


def own_settings(record: MethodRecord) -> list[Setting]:
    """The settings of a method itself."""
    return [
        Setting(name, lambda pipe, config=config: diffusers_ext.apply(pipe, config))
        for name, config in _configs(record).items()
    ]


def settings_of(record: MethodRecord) -> list[Setting]:
    """All rows of a method: its own settings, then its peers'."""
    rows = own_settings(record)
    if record.slug == "deepcache":
        rows += [Setting(f"N = {n}, PyPI DeepCache 0.1.1", lambda pipe, n=n: helper(pipe, n)) for n in INTERVALS]
    if record.slug == "delta-dit":
        config = record.public(span_order="front_then_rear")
        rows.append(Setting("N = 2, front then rear", lambda pipe: diffusers_ext.apply(pipe, config)))
    if record.slug == "ras":
        rows += [Setting("50%, at random", _random_tokens), Setting("every other whole output", _every_other_output)]
    if "unet" not in record.targets:
        peer = "diffusers FirstBlockCache"
        rows += [Setting(f"{peer}, threshold {x}", lambda pipe, x=x: _first_block(pipe, x)) for x in THRESHOLDS]
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
    for setting in (*settings_of(record), *extra):
        with setting.turned_on(pipe):
            images = draw()
        if setting.name in _configs(record):
            pictures[setting.name] = images
        macs = _ratio_of_macs(short, lambda s=setting: s.turned_on(pipe))
        timing = _time_ratio(short, lambda s=setting: s.turned_on(pipe), pairs=3)
        psnr = mean_psnr(images, reference)
        yield [name, setting.name, f"{macs:.3f}", str(timing), f"{psnr:.2f} dB", judged(images)]


def _stable_diffusion(device: str) -> tuple[Any, Callable[[], None]]:
    """Stable Diffusion 1.5's UNet with random weights (operations and time do not depend on them), and a call of it.

    Every call is the next timestep of a run on 64 x 64 latents, batch 1.
    """
    from diffusers import DDIMScheduler, UNet2DConditionModel

    torch.manual_seed(0)
    with torch.device(device):
        unet = UNet2DConditionModel(sample_size=64, cross_attention_dim=768).eval().requires_grad_(False)
        latents, text = torch.randn(1, 4, 64, 64), torch.randn(1, 77, 768)
    pipe = SimpleNamespace(unet=unet, scheduler=DDIMScheduler())
    pipe.scheduler.set_timesteps(50)
    timesteps = iter(pipe.scheduler.timesteps)

    @torch.no_grad()
    def call() -> None:
        unet(latents, next(timesteps), encoder_hidden_states=text, return_dict=False)

    return pipe, call


def real_size_rows(record: MethodRecord, extra: Sequence[Setting] = ()) -> Iterator[list[Any]]:
    """Rows on a UNet of Stable Diffusion 1.5's size.

    One full and one shallow call are measured at N = 2, where they alternate; a run at interval N is one full call
    and N - 1 shallow ones.
    """
    for setting in (*settings_of(record), *extra):
        if "N = 2" not in setting.name:
            continue
        pipe, call = _stable_diffusion("meta")
        with setting.turned_on(pipe):
            full, shallow = count_macs(call), count_macs(call)
        pipe, call = _stable_diffusion("cpu")
        with setting.turned_on(pipe):
            timing = paired_ratio(call, call, pairs=1, warmup=1, clock=time.process_time)
        for n in INTERVALS:
            name = setting.name.replace("N = 2", f"N = {n}")
            macs, seconds = ((1 + (n - 1) * share) / n for share in (shallow / full, timing.ratio))
            yield ["SD 1.5 size, random weights", name, f"{macs:.3f}", f"{seconds:.3f}", "", ""]


def key_step_rows(record: MethodRecord) -> Iterator[list[Any]]:
    """MACs of runs on a UNet of Stable Diffusion 1.5's size, from one call at a key step and one in between."""
    pipe, call = _stable_diffusion("meta")
    total = len(pipe.scheduler.timesteps)
    with diffusers_ext.apply(pipe, record.public(key_steps=total)):
        full, reused = count_macs(call), count_macs(call)
    for name, config in _configs(record).items():
        keys = sum(config.is_key_step(i, total) for i in range(total))
        share = (keys + (total - keys) * reused / full) / total
        yield ["SD 1.5 size, random weights", name, f"{share:.3f}", "", "", ""]


def _pixart(device: str, sample_size: int = 128, **changes: int) -> tuple[Any, Callable[[], None]]:
    """PixArt-alpha's transformer with random weights, and a run of 20 steps on one picture."""
    from diffusers import FlowMatchEulerDiscreteScheduler, PixArtTransformer2DModel

    torch.manual_seed(0)
    with torch.device(device):
        model = PixArtTransformer2DModel(
            sample_size=sample_size, caption_channels=4096, use_additional_conditions=False, **changes
        )
        noise, text = torch.randn(1, 4, sample_size, sample_size), torch.randn(1, 120, 4096)
    model.eval().requires_grad_(False)
    # Caches read the timestep, which has no value on the meta device: it gets there inside of the model.
    model.adaln_single.register_forward_pre_hook(lambda _, args: (args[0].to(device), *args[1:]))
    pipe = SimpleNamespace(transformer=model, scheduler=FlowMatchEulerDiscreteScheduler())

    @torch.no_grad()
    def run() -> None:
        latents = noise
        pipe.scheduler.set_timesteps(20)
        for t in pipe.scheduler.timesteps:
            velocity = model(latents, text, timestep=t.expand(1), return_dict=False)[0].chunk(2, 1)[0]
            latents = pipe.scheduler.step(velocity, t, latents, return_dict=False)[0]

    return pipe, run


def transformer_rows(record: MethodRecord) -> Iterator[list[Any]]:
    """A transformer of PixArt-alpha's size on the meta device, and a smaller one on the clock, beside the peer."""
    pipe, run = _pixart("meta")
    for name, config in _configs(record).items():
        share = _ratio_of_macs(run, lambda config=config: diffusers_ext.apply(pipe, config))
        yield ["PixArt-alpha size, random weights", name, f"{share:.3f}", "", "", ""]
    pipe, run = _pixart("cpu", **SMALL_PIXART)
    for setting in settings_of(record):
        if setting.turned_on in (_random_tokens, _every_other_output):
            continue
        macs = _ratio_of_macs(run, lambda s=setting: s.turned_on(pipe))
        timing = _time_ratio(run, lambda s=setting: s.turned_on(pipe), pairs=2)
        yield ["PixArt blocks, random weights", setting.name, f"{macs:.3f}", str(timing), "", ""]


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
    notes = (
        f"Shapes model: {size.pictures} held-out captions, {size.steps} steps, guidance 3; MACs and time of whole "
        f"pipeline calls with {size.timed_pictures} pictures and {size.timed_steps} steps. MACs and Time are shares "
        "of the uncached run; time is processor time, the median of interleaved pairs with their smallest and largest."
    )
    if "key_steps" in record.public.__dataclass_fields__:
        rows += key_step_rows(record)
        notes += (
            " Stable Diffusion 1.5 size: random weights, 64 x 64 latents, batch 1; MACs of one call with and one "
            "without the encoder on the meta device, a run of 50 steps computed from them."
        )
    elif "unet" in record.targets:
        rows += real_size_rows(record, extra)
        notes += (
            " Stable Diffusion 1.5 size: random weights, 64 x 64 latents, batch 1, UNet calls only; one full and one "
            "shallow call measured after a warm-up of both, intervals computed from them."
        )
    else:
        rows += transformer_rows(record)
        notes += (
            " PixArt-alpha size: random weights, 128 x 128 latents, 20 steps. PixArt blocks: 4 "
            "layers 576 wide, 64 x 64 latents (1024 tokens), otherwise the same; where the peer "
            "decides by its threshold, random weights decide what it skips: compare Time with MACs."
        )
    picture = picture_grid(pictures, out_dir / f"{record.slug}.png")
    return {"columns": COLUMNS, "rows": rows, "notes": notes, "picture": picture}
