"""Every two methods on the same model, in both orders: refused beforehand, or both work and come off again."""

from __future__ import annotations

import itertools
from types import SimpleNamespace

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.hooks import (
    FasterCacheConfig,
    FirstBlockCacheConfig,
    MagCacheConfig,
    PyramidAttentionBroadcastConfig,
    SeaCacheConfig,
    TaylorSeerCacheConfig,
)

import diffusers_ext
from diffusers_ext._flux_tokens import image_ids
from diffusers_ext.caching._upstream import UpstreamCache
from diffusers_ext.registry import list_methods


STEPS = 8
SIZE = 16
TRAINED = 8
# Layouts, and what records call them.
TARGETS = {"unet": "unet", "dit": "dit", "pixart": "dit", "sd3": "mmdit", "flux": "mmdit"}
# What a method needs to act on pictures of 16 x 16 in 8 steps; all others take their defaults.
SETTINGS = {
    "any-size-diffusion": {"tile_size": TRAINED, "overlap": 4},
    "attention-entropy-scaling": {"base_size": (6, 6)},  # smaller than a tile
    "hidiffusion": {"base_size": (4, 4)},
    "ras": {"start_step": 2},
    "vmoba": {"blocks": 4},
}
OWN = {r.slug: r for r in list_methods() if r.family in ("caching", "attention")}
UPSTREAM = {
    UpstreamCache(config).method.slug: config
    for config in (
        FirstBlockCacheConfig(threshold=1e9),
        TaylorSeerCacheConfig(cache_interval=3, disable_cache_before_step=2),
        MagCacheConfig(mag_ratios=[1.0] * STEPS, num_inference_steps=STEPS),
        PyramidAttentionBroadcastConfig(
            spatial_attention_block_skip_range=2,
            spatial_attention_timestep_skip_range=(0, 1000),
            cross_attention_block_skip_range=2,
            cross_attention_timestep_skip_range=(0, 1000),
        ),
        FasterCacheConfig(is_guidance_distilled=True, attention_weight_callback=lambda _: 0.3),
        SeaCacheConfig(threshold=1e9),
    )
}
SLUGS = [*OWN, *UPSTREAM]
# How the others than caches show in their summary that they acted.
ACTED = {
    "any-size-diffusion": lambda f: f["tiles"] > f["calls"],
    "attention-entropy-scaling": lambda f: f["scaled"] > 0,
    "hidiffusion": lambda f: f["windowed_calls"] > 0,
    "vmoba": lambda f: f["sparse"] > 0,
}


def _config(slug):
    return UPSTREAM[slug] if slug in UPSTREAM else OWN[slug].public(**SETTINGS.get(slug, {}))


def _conflicts(slug):
    return UpstreamCache(UPSTREAM[slug]).method.conflicts if slug in UPSTREAM else OWN[slug].conflicts


def _inputs(layout):
    generator = torch.Generator().manual_seed(1)
    text = torch.randn(1, 5, 8, generator=generator)
    if layout == "dit":
        return {"class_labels": torch.tensor([3])}
    if layout in ("unet", "pixart"):
        return {"encoder_hidden_states": text}
    pooled = {"encoder_hidden_states": text, "pooled_projections": torch.randn(1, 8, generator=generator)}
    if layout == "sd3":
        return pooled
    return {"img_ids": image_ids(SIZE, SIZE), "txt_ids": torch.zeros(5, 3), **pooled}


def _run(pipe, layout):
    """Latents after a plain sampling loop."""
    inputs, scheduler = _inputs(layout), pipe.scheduler
    shape = (1, SIZE * SIZE // 4, 16) if layout == "flux" else (1, 4, SIZE, SIZE)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(2))
    scheduler.set_timesteps(STEPS)
    scheduler.set_begin_index(0)
    with torch.no_grad():
        for t in scheduler.timesteps:
            time = t if layout == "unet" else t.expand(1) / (1000 if layout == "flux" else 1)
            out = pipe.transformer(x, timestep=time, return_dict=False, **inputs)[0]
            x = scheduler.step(out, t, x).prev_sample
    return x


@pytest.fixture(autouse=True)
def _uncounted(monkeypatch):
    """Summaries leave operations out, which would take most of the time here."""

    def refuse(*_):
        raise NotImplementedError

    monkeypatch.setattr(torch.func, "functional_call", refuse)


@pytest.fixture(scope="module", params=TARGETS)
def scene(request, tiny_model):
    """A tiny model of each layout, what it draws, and the methods that it takes alone."""
    model = tiny_model(request.param, layers=2, size=TRAINED)
    pipe = SimpleNamespace(transformer=model, scheduler=FlowMatchEulerDiscreteScheduler())
    plain = _run(pipe, request.param)
    return request.param, pipe, plain, {s for s in SLUGS if diffusers_ext.check(pipe, _config(s))}


def _acted(slug, figures):
    return ACTED[slug](figures) if slug in ACTED else figures["computed"] > 0 and figures["reused"] > 0


def test_each_method_acts_alone(scene):
    layout, pipe, plain, fitting = scene
    for slug in fitting:
        with diffusers_ext.apply(pipe, _config(slug)) as handle:
            assert not torch.equal(_run(pipe, layout), plain), slug
            assert _acted(slug, handle.summary()[slug]), slug


@pytest.mark.parametrize("slugs", itertools.combinations(SLUGS, 2), ids="+".join)
def test_two_methods(scene, slugs):
    layout, pipe, plain, fitting = scene
    drawn = []
    exclusive = slugs[1] in _conflicts(slugs[0]) or slugs[0] in _conflicts(slugs[1])
    for order in (slugs, slugs[::-1]):
        configs = [_config(slug) for slug in order]
        preflight = diffusers_ext.check(pipe, *configs)
        assert preflight.ok == (fitting.issuperset(slugs) and not exclusive), (order, preflight.errors)
        if not preflight.ok:
            continue
        with diffusers_ext.apply(pipe, *configs) as handle:
            first = _run(pipe, layout)
            drawn.append(first)
            assert torch.isfinite(first).all() and not torch.equal(first, plain)
            for slug, figures in handle.summary().items():
                assert _acted(slug, figures), (order, slug, figures)
            assert torch.equal(_run(pipe, layout), first), order
    assert torch.equal(_run(pipe, layout), plain)
    if drawn and "any-size-diffusion" in slugs:
        assert torch.equal(*drawn), "tiles go around everything else"


@pytest.mark.parametrize("slug", SLUGS)
def test_conflicts_are_declared_on_both_sides(slug):
    for other in _conflicts(slug):
        if other in OWN and slug in OWN:
            assert slug in _conflicts(other), (slug, other)


def test_every_method_fits_somewhere(scene):
    """Where the layout is one that the record names."""
    layout, _, _, fitting = scene
    named = {slug for slug, record in OWN.items() if {TARGETS[layout], "any"} & set(record.targets)}
    assert {slug for slug in fitting if slug in OWN} == named
    assert len(fitting & set(UPSTREAM)) >= 2
