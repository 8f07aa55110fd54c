"""An accelerator that is set to skip nothing costs less than 3 % of a step."""

from __future__ import annotations

import copy
import itertools
import statistics
import time
from types import SimpleNamespace

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    FlowMatchEulerDiscreteScheduler,
    PixArtTransformer2DModel,
    SD3Transformer2DModel,
    UNet2DConditionModel,
)

import diffusers_ext
from diffusers_ext.registry import list_methods


STEPS = 24
LIMIT = 1.03
# With these values a method does nothing, step after step.
NOTHING = {
    "a-sdm": {"interval": 1},
    "any-size-diffusion": {"tile_size": 32},
    "attention-entropy-scaling": {"strength": 0.0},
    "bac": {"num_updates": STEPS},
    "deepcache": {"cache_interval": 1},
    "delta-dit": {"cache_interval": 1},
    "faster-diffusion": {"key_steps": 1},
    "hidiffusion": {"raunet": False, "windows": False},
    "ras": {"sample_ratio": 1.0},
}
# At threshold 1 it computes the same numbers another way, block by block: that is no overhead but another algorithm.
NEVER_IDLE = {"vmoba"}


def _unet():
    model = UNet2DConditionModel(
        sample_size=32,
        block_out_channels=(64, 96, 96),
        layers_per_block=2,
        cross_attention_dim=64,
        attention_head_dim=4,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    )
    text = torch.randn(1, 16, 64)
    call = lambda model, x, t: model(x, t, text, return_dict=False)[0]  # noqa: E731
    return SimpleNamespace(unet=model, scheduler=DDIMScheduler()), call, _noise()


def _pixart():
    model = PixArtTransformer2DModel(
        num_attention_heads=4,
        attention_head_dim=72,
        in_channels=4,
        out_channels=4,
        num_layers=8,
        cross_attention_dim=288,
        sample_size=32,
        caption_channels=64,
        use_additional_conditions=False,
    )
    text = torch.randn(1, 16, 64)
    call = lambda model, x, t: model(x, text, timestep=t.expand(1), return_dict=False)[0]  # noqa: E731
    return SimpleNamespace(transformer=model, scheduler=FlowMatchEulerDiscreteScheduler()), call, _noise()


def _sd3():
    model = SD3Transformer2DModel(
        sample_size=32,
        in_channels=4,
        out_channels=4,
        num_layers=8,
        attention_head_dim=64,
        num_attention_heads=4,
        joint_attention_dim=64,
        caption_projection_dim=256,
        pooled_projection_dim=64,
        pos_embed_max_size=32,
    )
    text, pooled = torch.randn(1, 16, 64), torch.randn(1, 64)
    call = lambda model, x, t: model(x, text, pooled, t.expand(1), return_dict=False)[0]  # noqa: E731
    return SimpleNamespace(transformer=model, scheduler=FlowMatchEulerDiscreteScheduler()), call, _noise()


def _noise():
    return torch.randn(1, 4, 32, 32)


BUILDERS = {"unet": _unet, "dit": _pixart, "mmdit": _sd3}
CASES = [
    pytest.param(record, target, id=f"{record.slug}-{target}")
    for record in list_methods()
    if record.slug in NOTHING
    for target in BUILDERS
    if target in record.targets
]


def test_every_accelerator_is_here():
    accelerators = {r.slug for r in list_methods() if r.family in ("caching", "attention")}
    assert accelerators == NOTHING.keys() | NEVER_IDLE
    assert {case.values[0].slug for case in CASES} == NOTHING.keys()


def _stepper(pipe, call, latents):
    pipe.scheduler.set_timesteps(STEPS)
    model, timesteps = getattr(pipe, "unet", None) or pipe.transformer, iter(pipe.scheduler.timesteps)

    @torch.no_grad()
    def step():
        nonlocal latents
        t = next(timesteps)
        started = time.process_time()
        latents = pipe.scheduler.step(call(model, latents, t), t, latents, return_dict=False)[0]
        return time.process_time() - started

    return step


@pytest.mark.slow
@pytest.mark.parametrize("record, target", CASES)
def test_a_method_that_skips_nothing_costs_nothing(record, target):
    """Steps in turn with those of a twin: the median of the pairs, in processor time."""
    torch.manual_seed(0)
    pipe, call, noise = BUILDERS[target]()
    model = (getattr(pipe, "unet", None) or pipe.transformer).eval().requires_grad_(False)
    shared = {id(t): t for t in itertools.chain(model.parameters(), model.buffers())}
    twin = SimpleNamespace(**{name: copy.deepcopy(part, shared) for name, part in vars(pipe).items()})
    plain = _stepper(twin, call, noise)
    with diffusers_ext.apply(pipe, record.public(**NOTHING[record.slug])):
        idle = _stepper(pipe, call, noise)
        plain(), idle()
        pairs = [(plain(), idle()) for _ in range(STEPS - 1)]
    assert min(pairs)[0] > 0.05, "too small a step to measure"
    ratio = statistics.median(with_it / without for without, with_it in pairs)
    assert ratio < LIMIT, f"{ratio - 1:.1%} of a step"
