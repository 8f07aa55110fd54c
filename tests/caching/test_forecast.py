"""Forecasts of cached features: the polynomial itself, and what it is worth on trained models."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, EulerAncestralDiscreteScheduler

import diffusers_ext
from diffusers_ext import (
    BACConfig,
    DeepCacheConfig,
    DeltaDiTConfig,
    FasterDiffusionConfig,
    FeatureInheritanceConfig,
    zoo,
)
from diffusers_ext.caching._forecast import History, forecast_weights, lagrange_weights
from diffusers_ext.eval import mean_psnr
from diffusers_ext.registry import list_methods


CONFIGS = [m.public for m in list_methods() if "forecast_order" in getattr(m.public, "__dataclass_fields__", ())]


@pytest.mark.parametrize("steps", [(3,), (0, 4), (1, 2, 6), (0, 1, 5, 7)])
def test_weights_reproduce_polynomials(steps):
    for degree in range(len(steps)):
        polynomial = np.polynomial.Polynomial(np.arange(1.0, degree + 2))
        for step in (steps[-1] + 1, steps[-1] + 4.5):
            continued = sum(w * polynomial(s) for w, s in zip(lagrange_weights(steps, step), steps))
            assert continued == pytest.approx(polynomial(step), rel=1e-12)


@pytest.mark.parametrize("order", [0, 1, 2])
def test_a_history_continues_its_trend(order):
    """Errors of the features x^3: those of the interpolating polynomial, (s - s_0) ... (s - s_order)."""
    history, slope = History(order), torch.tensor([[1.0, -2.0]], dtype=torch.float64)
    for step in (0, 2, 3, 5):
        history.add(step, {0: (slope * step**order, None), 1: torch.tensor(float(step**3), dtype=torch.float64)})
        assert len(history.kept) <= order + 1
    value = history.at(7)
    torch.testing.assert_close(value[0][0], slope * 7**order, atol=1e-12, rtol=0)
    assert value[0][1] is None
    known = np.array([0, 2, 3, 5])[-order - 1 :]
    expected = np.polyval(np.polyfit(known, known**3, order), 7)
    assert value[1].item() == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("order", [0.3, 1.0, 1.5, 2.0])
def test_fractions_mix_their_neighbours(order):
    """In between of the polynomials that numpy fits through the last one, two or three values."""
    steps, values = [0, 2, 3, 5], [1.0, -2.0, 4.0, 3.0]
    history = History(order)
    for step, value in zip(steps, values):
        history.add(step, torch.tensor(value, dtype=torch.float64))
    low, high = int(order), int(np.ceil(order))
    ends = [np.polyval(np.polyfit(steps[-d - 1 :], values[-d - 1 :], d), 7) for d in (low, high)]
    assert history.at(7).item() == pytest.approx(ends[0] + (order - low) * (ends[1] - ends[0]), rel=1e-9)
    assert len(history.kept) == high + 1
    assert forecast_weights([4], 7, order) == [1.0], "as much as the steps allow"
    assert forecast_weights([3, 4], 7, order) == forecast_weights([3, 4], 7, min(order, 1))


def test_order_zero_repeats_the_newest_itself():
    history, value = History(), {0: torch.randn(3)}
    history.add(0, {0: torch.randn(3)})
    history.add(1, value)
    assert history.at(2) is value and len(history.kept) == 1


def test_too_few_steps_take_a_lower_order():
    history = History(2)
    history.add(0, torch.zeros(2))
    assert torch.equal(history.at(1), torch.zeros(2))
    history.add(1, torch.ones(2))
    assert torch.equal(history.at(3), torch.full((2,), 3.0))


def test_a_change_of_shape_is_not_continued():
    history = History(1)
    history.add(0, torch.zeros(2))
    history.add(1, torch.ones(3))
    assert torch.equal(history.at(2), torch.ones(3))


def test_tensors_without_numbers_and_twins():
    """Shapes on the meta device stay; a tensor that occurs twice stays one, as parents write into it."""
    history = History(1)
    for step in (0, 1):
        twin = torch.full((2,), float(step))
        history.add(step, (twin, [twin], torch.empty(5, device="meta"), torch.tensor([step])))
    first, (second,), outline, whole = history.at(2)
    assert first is second and torch.equal(first, torch.full((2,), 2.0))
    assert outline.device.type == "meta" and outline.shape == (5,) and whole.item() == 1


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_rounded_once(dtype):
    history, features = History(1), torch.randn(2, 1000).mul(300).to(dtype)
    history.add(0, features[0])
    history.add(3, features[1])
    wide = features.double()
    expected = (wide[1] + 2 / 3 * (wide[1] - wide[0])).to(dtype)
    assert history.at(5).dtype == dtype
    torch.testing.assert_close(history.at(5), expected, rtol=torch.finfo(dtype).eps, atol=0.01)


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("order", [-1, -0.1, 2.1, 3])
def test_other_orders_are_refused(config, order):
    with pytest.raises(ValueError, match=f"forecast_order is {order}; accepted: 0 to "):
        config(forecast_order=order)


@pytest.fixture(scope="module")
def pipes():
    unet = zoo.load("shapes-unet")
    unet.scheduler = DDIMScheduler.from_config(unet.scheduler.config)
    return {"shapes-unet": unet, "shapes-dit": zoo.load("shapes-dit")}


@pytest.mark.parametrize(
    "name, config, gain",
    [
        ("shapes-unet", DeepCacheConfig(2), 8),
        ("shapes-unet", DeepCacheConfig(3), 4),
        ("shapes-unet", FeatureInheritanceConfig(interval=2), 8),
        ("shapes-unet", FeatureInheritanceConfig(granularity="unit", interval=2), 4),
        ("shapes-unet", FasterDiffusionConfig(2), 5),
        ("shapes-dit", DeltaDiTConfig(2), 3),
        ("shapes-dit", BACConfig(num_updates=10), 2),
    ],
    ids=lambda value: getattr(type(value), "__name__", None),
)
def test_a_line_is_closer_at_the_same_cost(pipes, name, config, gain):
    """Without noise in between: decibels nearer to the run without a cache, and not one operation more."""
    pipe, captions = pipes[name], zoo.held_out(3).captions

    def draw():
        return zoo.generate(pipe, captions, num_inference_steps=20)

    reference, closeness, saved = draw(), [], []
    for order in (0, 1):
        with diffusers_ext.apply(pipe, dataclasses.replace(config, forecast_order=order)) as handle:
            closeness.append(mean_psnr(draw(), reference))
            saved.append(next(iter(handle.summary().values()))["macs_saved"])
    assert closeness[1] > closeness[0] + gain and saved[1] == saved[0] > 0


@pytest.mark.parametrize("interval, start", [(4, 5), (5, 4)])
def test_a_part_of_a_trend_is_closer_where_forecasts_reach_far(pipes, interval, start):
    pipe, captions = pipes["shapes-dit"], zoo.held_out(8).captions

    def draw():
        return zoo.generate(pipe, captions, num_inference_steps=20)

    reference, closeness = draw(), {}
    for order in (0, 0.3, 1):
        with diffusers_ext.apply(pipe, DeltaDiTConfig(interval, 11, start_step=start, forecast_order=order)):
            closeness[order] = mean_psnr(draw(), reference)
    assert closeness[0.3] > closeness[0] + 0.3 and closeness[0.3] > closeness[1] + 2, closeness


def test_noise_has_no_trend():
    """Samplers that add noise gain nothing, which is why repeating is the default."""
    pipe, captions = zoo.load("shapes-unet"), zoo.held_out(3).captions
    pipe.scheduler = EulerAncestralDiscreteScheduler.from_config(pipe.scheduler.config)

    def draw():
        torch.manual_seed(0)
        return zoo.generate(pipe, captions, num_inference_steps=20)

    reference, closeness = draw(), []
    for order in (0, 1):
        with diffusers_ext.apply(pipe, DeepCacheConfig(3, forecast_order=order)):
            closeness.append(mean_psnr(draw(), reference))
    assert torch.equal(draw(), reference) and abs(closeness[1] - closeness[0]) < 2
