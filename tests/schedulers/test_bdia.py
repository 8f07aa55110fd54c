"""BDIA: exact both ways against DDIM inversion that is not, on exact scores and on the shipped model."""

from __future__ import annotations

import logging
import math

import pytest
import torch
from diffusers import DDIMInverseScheduler, DDIMScheduler

import diffusers_ext
from diffusers_ext import BDIADDIMInverseScheduler, BDIADDIMScheduler, bdia_edit, bdia_invert, bdia_sample, zoo
from diffusers_ext.prediction import PREDICTIONS
from diffusers_ext.schedulers.bdia import bdia_inverse_step, bdia_step, ddim_map
from diffusers_ext.schedulers.bdia_native import invert_bdia, sample_bdia
from diffusers_ext.zoo import analytic


SD = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
MIX = analytic.GaussianMixture(
    torch.tensor([[-1.5, 0.5], [1.0, 1.2], [0.5, -1.4]]), variances=torch.tensor([0.05, 0.1, 0.08])
)


def noise(n=6, seed=1):
    return torch.randn(n, 2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def drive(scheduler, model, x, times=None):
    for t in scheduler.timesteps if times is None else times:
        x = scheduler.step(model(x, t), t, x).prev_sample
    return x


def pair_of(steps, gamma, cls=BDIADDIMInverseScheduler, **options):
    scheduler = cls(**SD, gamma=gamma, **options)
    scheduler.set_timesteps(steps)
    return scheduler


def invert(x, steps, gamma, model, strength=1.0, **options):
    scheduler = pair_of(steps, gamma, **options)
    drive(scheduler, model, x, scheduler.timesteps[: int(steps * strength)])
    return scheduler.get_pair()


def regenerate(pair, steps, gamma, model, strength=1.0, **options):
    scheduler = pair_of(steps, gamma, BDIADDIMScheduler, **options)
    begin = steps - int(steps * strength) + 1
    scheduler.set_begin_index(begin)
    scheduler.set_pair(*pair)
    return drive(scheduler, model, pair[1], scheduler.timesteps[begin:])


def sd_model(prediction="epsilon"):
    return analytic.AnalyticDenoiser(MIX, analytic.schedule("sd"), prediction)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-6), (torch.float64, 1e-12)])
@pytest.mark.parametrize("to_one", [True, False])
@pytest.mark.parametrize("spacing, offset", [("leading", 1), ("leading", 0), ("trailing", 0)])
def test_gamma_zero_is_ddim(dtype, tolerance, to_one, spacing, offset):
    ddim = DDIMScheduler(
        **SD, clip_sample=False, set_alpha_to_one=to_one, timestep_spacing=spacing, steps_offset=offset
    )
    ours = BDIADDIMScheduler.from_config(ddim.config, gamma=0.0)
    ddim.alphas_cumprod = ddim.alphas_cumprod.double()  # it computes in the table's precision
    ddim.final_alpha_cumprod = ddim.final_alpha_cumprod.double()
    for scheduler in (ddim, ours):
        scheduler.set_timesteps(20)
    assert torch.equal(ddim.timesteps, ours.timesteps)
    x = noise().to(dtype)
    expected = drive(ddim, sd_model(), x.double()) if dtype == torch.float64 else drive(ddim, sd_model(), x)
    # the model of the float32 run sees float32 samples on both sides
    assert (drive(ours, sd_model(), x) - expected).abs().max() < tolerance * max(1, expected.abs().max())


def test_simplified_and_general_form_agree():
    """z_{i+1} - (1 - g)(z_{i+1} - z_i) - g Delta(i -> i+1) + Delta(i -> i-1) of the paper."""
    level = {k: (math.cos(a), math.sin(a)) for k, a in ((0, 0.3), (1, 0.5), (2, 0.8))}
    x0, e, noisier = noise(seed=2), noise(seed=3), noise(seed=4)
    z = ddim_map(x0, e, level[1])
    for g in (0.0, 0.3, 1.0):
        general = (
            noisier - (1 - g) * (noisier - z) - g * (ddim_map(x0, e, level[2]) - z) + (ddim_map(x0, e, level[0]) - z)
        )
        simple = bdia_step(x0, e, noisier, level[2], level[0], g)
        torch.testing.assert_close(simple, general, rtol=1e-13, atol=1e-13)
        if g:
            back = bdia_inverse_step(x0, e, simple, level[0], level[2], g)
            torch.testing.assert_close(back, noisier, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("final", ["zero", "sigma_min"])
def test_inversion_is_exact(prediction, final):
    options = {"prediction_type": prediction, "final_sigmas_type": final}
    schedule = "flow" if prediction == "flow_prediction" else "sd"
    model = analytic.AnalyticDenoiser(MIX, analytic.schedule(schedule), prediction)
    x = MIX.sample(6, torch.Generator().manual_seed(0))
    pair = invert(x, 50, 1.0, model, **options)
    assert model.calls == 50
    assert (regenerate(pair, 50, 1.0, model, **options) - x).abs().max() < 1e-9
    assert model.calls == 99
    assert pair[0].abs().max() < 5


def test_partial_inversion_is_exact():
    x = MIX.sample(6, torch.Generator().manual_seed(0))
    pair = invert(x, 40, 1.0, sd_model(), strength=0.6)
    assert (regenerate(pair, 40, 1.0, sd_model(), strength=0.6) - x).abs().max() < 1e-9


@pytest.mark.parametrize("steps", [20, 50])
def test_ddim_inversion_is_not_exact(steps):
    """The same round trip with diffusers' pair of schedulers: what the test above would show if it were blind."""
    x = MIX.sample(6, torch.Generator().manual_seed(0))
    settings = {
        **SD,
        "clip_sample": False,
        "set_alpha_to_one": False,
        "timestep_spacing": "leading",
        "steps_offset": 1,
    }
    inverse, forward = DDIMInverseScheduler(**settings), DDIMScheduler(**settings)
    for scheduler in (inverse, forward):
        scheduler.set_timesteps(steps)
    back = drive(forward, sd_model(), drive(inverse, sd_model(), x))
    assert (back - x).abs().max() > 1e-2


def test_gamma_below_one_is_exact_but_grows():
    x = MIX.sample(6, torch.Generator().manual_seed(0))
    pair = invert(x, 20, 0.5, sd_model())
    assert (regenerate(pair, 20, 0.5, sd_model()) - x).abs().max() < 1e-9
    assert pair[0].abs().max() > 100


@pytest.mark.parametrize("gamma", [0.5, 1.0])
def test_sampling_then_inversion_recovers_the_noise(gamma):
    steps, model, states = 20, sd_model(), [noise()]
    forward = pair_of(steps, gamma, BDIADDIMScheduler)
    for t in forward.timesteps:
        states.append(forward.step(model(states[-1], t), t, states[-1]).prev_sample)
    assert model.calls == steps
    inverse = pair_of(steps, gamma)
    inverse.set_pair(states[-2], states[-1])
    drive(inverse, model, states[-2], inverse.timesteps[1:])
    noisy, less_noisy = inverse.get_pair()
    assert (noisy - states[0]).abs().max() < 1e-8
    assert (less_noisy - states[1]).abs().max() < 1e-8


def test_half_precision_loop_keeps_the_digits_of_the_state():
    """float16 latents in the loop, float64 states inside: still exact, for the model sees the same rounded samples."""
    x = MIX.sample(6, torch.Generator().manual_seed(0)).half()
    pair = invert(x, 30, 1.0, sd_model())
    assert pair[0].dtype == torch.float64
    assert torch.equal(regenerate((pair[0], pair[1].clone()), 30, 1.0, lambda z, t: sd_model()(z.half(), t)).half(), x)


def test_converges_to_the_ode():
    s, errors = pair_of(40, 1.0, BDIADDIMScheduler), []
    for steps in (25, 100):
        s.set_timesteps(steps)
        levels = [s._levels[k] for k in (0, -1)]
        errors.append((drive(s, sd_model(), noise()) - MIX.ode(noise(), *levels, steps=300)).abs().mean().item())
    assert errors[1] < errors[0] / 3


# --- pictures -----------------------------------------------------------------------------------------------------


def psnr(a, b):
    return 10 * math.log10((b.max() - b.min()) ** 2 / (a - b).square().mean().clamp(min=1e-30))


@pytest.fixture(scope="module")
def pipe():
    return zoo.load("shapes-unet")


def latents_of(pipe, n=2):
    return (pipe.vae.encode(zoo.held_out(n).images).latent_dist.mode() * pipe.vae.config.scaling_factor).detach()


def test_reconstruction_with_the_shipped_model(pipe):
    captions, x = zoo.held_out(2).captions, latents_of(pipe)
    pair = bdia_invert(pipe, x, captions, num_inference_steps=20)
    ours = psnr(bdia_sample(pipe, pair, captions), x)
    plain = DDIMScheduler.from_config(pipe.scheduler.config)
    inverse = DDIMInverseScheduler.from_config(pipe.scheduler.config)
    model = diffusers_ext.schedulers._common.guided_model(pipe, captions)
    for scheduler in (plain, inverse):
        scheduler.set_timesteps(20)
    with torch.no_grad():
        theirs = psnr(drive(plain, model, drive(inverse, model, x)), x)
    assert ours > 60 and theirs < ours - 20


@pytest.mark.parametrize("name", ["shapes-unet", "shapes-dit"])
def test_editing_returns_pictures(name):
    scene = zoo.held_out(1)
    (picture,) = bdia_edit(
        zoo.load(name), scene.images, scene.captions, ["a large red star on the left, plain blue background"],
        num_inference_steps=6, strength=0.7,
    )  # fmt: skip
    assert picture.size == (64, 64)


def test_warning_when_the_latent_is_no_noise(pipe, caplog):
    with caplog.at_level(logging.WARNING):
        bdia_invert(pipe, latents_of(pipe, 1), zoo.held_out(1).captions, num_inference_steps=16, gamma=0.3)
    assert "gamma=1 or fewer steps" in caplog.text


# --- native -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [10, 30])
def test_native_round_trip_is_exact(steps):
    sigmas = torch.cat([torch.linspace(10.0**0.3, 0.05**0.3, steps) ** (1 / 0.3), torch.zeros(1)])
    x, model = MIX.sample(6, torch.Generator().manual_seed(0)), analytic.comfy_denoiser(MIX)
    pair = invert_bdia(model, x, sigmas)
    back = sample_bdia(model, torch.zeros_like(x), sigmas, pair=pair)
    assert (back - x).abs().max() < 1e-9


# --- bad input ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gamma", [-0.1, 1.5, math.nan])
def test_gamma_out_of_range(gamma):
    for cls in (BDIADDIMScheduler, BDIADDIMInverseScheduler):
        with pytest.raises(ValueError, match=r"must lie in \[0, 1\]"):
            cls(gamma=gamma)


def test_inversion_needs_gamma():
    with pytest.raises(ValueError, match="not invertible"):
        BDIADDIMInverseScheduler(gamma=0.0)
    with pytest.raises(ValueError, match="not invertible"):
        invert_bdia(analytic.comfy_denoiser(MIX), noise(), torch.tensor([1.0, 0.0]), gamma=0.0)
    with pytest.raises(ValueError, match="float64"):
        BDIADDIMInverseScheduler(gamma=0.5, state_dtype="float32")


def test_steps_out_of_order():
    s = pair_of(10, 1.0, BDIADDIMScheduler)
    x = s.step(noise(), s.timesteps[0], noise()).prev_sample
    with pytest.raises(ValueError, match="901.*where 801|where 801"):
        s.step(noise(), s.timesteps[0], x)
    s.step(noise(), s.timesteps[1], x)


def test_pair_at_the_wrong_time():
    s = BDIADDIMScheduler(**SD)
    with pytest.raises(RuntimeError, match="right after"):
        s.set_pair(noise(), noise())
    s.set_timesteps(10)
    with pytest.raises(RuntimeError, match="no pair"):
        s.get_pair()
    with pytest.raises(ValueError, match="two shapes"):
        s.set_pair(noise(), noise(3))


def test_strength_and_prompts_are_checked(pipe):
    with pytest.raises(ValueError, match="strength is 0"):
        bdia_invert(pipe, latents_of(pipe, 1), "x", strength=0)
    with pytest.raises(ValueError, match="2 prompts for 1"):
        bdia_invert(pipe, latents_of(pipe, 1), ["x", "y"])
