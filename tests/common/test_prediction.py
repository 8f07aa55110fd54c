"""Conversions between predictions, and noise schedules, against definitions and diffusers."""

from __future__ import annotations

import math

import diffusers
import pytest
import torch

from diffusers_ext.prediction import (
    PREDICTIONS,
    NoiseSchedule,
    expand,
    flow_from_ve,
    from_x0,
    log_snr,
    to_noise,
    to_x0,
    vp_from_ve,
)
from diffusers_ext.zoo import analytic


LAMBDAS = torch.linspace(-6, 6, 25, dtype=torch.float64)
SCHEDULES = {name: analytic.schedule(name) for name in analytic.SCHEDULES}


def levels(prediction):
    return (0.3, 0.7) if prediction == "flow_prediction" else (0.6, 0.8)


def truth(prediction, x0, noise):
    alpha, sigma = levels(prediction)
    target = {
        "epsilon": noise,
        "sample": x0,
        "v_prediction": alpha * noise - sigma * x0,
        "flow_prediction": noise - x0,
    }
    return alpha * x0 + sigma * noise, target[prediction]


@pytest.fixture
def pair():
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(2, 3, 4, generator=generator, dtype=torch.float64) for _ in range(2)]


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_conversions_follow_the_definitions(prediction, pair):
    x0, noise = pair
    x, output = truth(prediction, x0, noise)
    torch.testing.assert_close(to_x0(output, x, *levels(prediction), prediction), x0)
    torch.testing.assert_close(to_noise(output, x, *levels(prediction), prediction), noise)
    torch.testing.assert_close(from_x0(x0, x, *levels(prediction), prediction), output)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_conversions_agree_with_diffusers(prediction, pair):
    x0, noise = (v.float() for v in pair)
    scheduler = diffusers.DDIMScheduler(prediction_type=prediction, clip_sample=False)
    scheduler.set_timesteps(10)
    bar = scheduler.alphas_cumprod[500]
    x, output = bar.sqrt() * x0 + (1 - bar).sqrt() * noise, noise
    theirs = scheduler.step(output, 500, x).pred_original_sample
    torch.testing.assert_close(to_x0(output, x, bar.sqrt(), (1 - bar).sqrt(), prediction), theirs)


def test_unknown_prediction_is_named():
    for convert in (to_x0, to_noise, from_x0):
        with pytest.raises(ValueError, match="'score'; accepted: epsilon"):
            convert(torch.zeros(1), torch.zeros(1), 1.0, 1.0, "score")


def test_levels_per_batch_item_broadcast(pair):
    x0, noise = pair
    alpha, sigma = torch.tensor([0.6, 0.8]), torch.tensor([0.8, 0.6])
    x = torch.stack([alpha[i] * x0[i] + sigma[i] * noise[i] for i in range(2)])
    torch.testing.assert_close(to_x0(noise, x, expand(alpha, x), expand(sigma, x), "epsilon"), x0)
    assert expand(torch.tensor(0.5), x).shape == (1, 1, 1) or expand(torch.tensor(0.5), x).numel() == 1


def test_same_signal_to_noise_ratio_from_ve():
    ve = torch.tensor([0.03, 1.0, 14.6], dtype=torch.float64)
    for convert, total in ((vp_from_ve, lambda a, s: a**2 + s**2), (flow_from_ve, lambda a, s: a + s)):
        alpha, sigma = convert(ve)
        torch.testing.assert_close(log_snr(alpha, sigma), -torch.log(ve))
        torch.testing.assert_close(total(alpha, sigma), torch.ones(3, dtype=torch.float64))


@pytest.mark.parametrize("name", SCHEDULES)
def test_levels_have_the_log_snr_and_lie_in_the_family(name):
    schedule = SCHEDULES[name]
    alpha, sigma = schedule.levels(LAMBDAS)
    torch.testing.assert_close(log_snr(alpha, sigma), LAMBDAS)
    total = {"vp": alpha**2 + sigma**2, "flow": alpha + sigma, "ve": alpha}[schedule.family]
    torch.testing.assert_close(total, torch.ones_like(total))


@pytest.mark.parametrize("name", SCHEDULES)
def test_time_and_log_snr_are_inverse(name):
    schedule = SCHEDULES[name]
    lam = LAMBDAS if schedule.table is None else torch.linspace(*schedule.table[[-1, 0]].tolist(), 25).double()
    torch.testing.assert_close(schedule.log_snr(schedule.timestep(lam)), lam)


def test_whole_timesteps_are_the_table():
    schedule = SCHEDULES["sd"]
    assert torch.equal(schedule.log_snr(torch.arange(1000)), schedule.table)
    torch.testing.assert_close(schedule.timestep(schedule.table), torch.arange(1000.0, dtype=torch.float64))


@pytest.mark.parametrize("name", SCHEDULES)
def test_derivatives_pass_through(name):
    schedule, lam = SCHEDULES[name], torch.tensor(0.3, dtype=torch.float64)
    _, slope = torch.func.jvp(schedule.timestep, (lam,), (torch.ones_like(lam),))
    h = 1e-5
    expected = (schedule.timestep(lam + h) - schedule.timestep(lam - h)) / (2 * h)
    torch.testing.assert_close(slope, expected, rtol=1e-4, atol=0)


def test_ends_are_finite():
    zero_snr = NoiseSchedule.from_scheduler(diffusers.DDIMScheduler(rescale_betas_zero_snr=True))
    assert zero_snr.table.isfinite().all() and math.isclose(
        zero_snr.levels(zero_snr.table[-1])[0], 2**-12, rel_tol=1e-3
    )
    alpha, sigma = SCHEDULES["flow"].levels(torch.tensor([-math.inf, math.inf], dtype=torch.float64))
    assert alpha.tolist() == [0, 1] and sigma.tolist() == [1, 0]


def test_schedule_of_a_scheduler():
    assert NoiseSchedule.from_scheduler(diffusers.FlowMatchEulerDiscreteScheduler()).family == "flow"
    assert NoiseSchedule.from_scheduler(diffusers.EDMEulerScheduler()).family == "ve"
    flow = diffusers.UniPCMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction")
    assert NoiseSchedule.from_scheduler(flow).family == "flow"
    vp = NoiseSchedule.from_scheduler(diffusers.DDIMScheduler())
    assert vp.family == "vp" and len(vp.table) == 1000


def test_bad_schedules():
    with pytest.raises(ValueError, match="family"):
        NoiseSchedule("edm")
    with pytest.raises(ValueError, match="from_betas"):
        NoiseSchedule("vp")
