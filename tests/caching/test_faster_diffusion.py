"""Faster Diffusion: what runs, in sequence and in parallel, against a decoder written out by hand."""

from __future__ import annotations

import json
import time
from types import SimpleNamespace

import pytest
import torch
from diffusers import (
    ControlNetModel,
    DDIMScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    StableDiffusionControlNetPipeline,
)
from diffusers.models.attention_processor import IPAdapterAttnProcessor2_0
from diffusers.models.embeddings import ImageProjection, MultiIPAdapterImageProjection

import diffusers_ext
from diffusers_ext import DeepCacheConfig, FasterDiffusionCallback, FasterDiffusionConfig, zoo
from diffusers_ext.caching.faster_diffusion import decoded_together, key_step_list, tile
from diffusers_ext.caching.faster_diffusion_sampling import faster_diffusion_denoise, initial_noise, injected
from diffusers_ext.eval import count_macs, mean_psnr, paired_ratio


NAMES = ["sd", "sd2", "sdxl", "inpaint", "one-layer", "uneven", "unet2d", "svd"]


def _pipe(unet, steps=12, scheduler=None):
    scheduler = scheduler or DDIMScheduler()
    scheduler.set_timesteps(steps)
    return SimpleNamespace(unet=unet, scheduler=scheduler)


def _decoder(unet, x, t_encoded, t, text):
    """Eps at time t from features of (x, t_encoded), written out for a plain Stable Diffusion UNet."""

    def embedding(time):
        return unet.time_embedding(unet.time_proj(torch.tensor([time]).expand(len(x))))

    h, emb = unet.conv_in(x), embedding(t_encoded)
    skips = [h]
    for block in unet.down_blocks:
        context = {"encoder_hidden_states": text} if hasattr(block, "attentions") else {}
        h, new = block(h, emb, **context)
        skips += new
    h, emb = unet.mid_block(h, emb, encoder_hidden_states=text), embedding(t)
    for block in unet.up_blocks:
        context = {"encoder_hidden_states": text} if hasattr(block, "attentions") else {}
        count = len(block.resnets)
        h = block(hidden_states=h, temb=emb, res_hidden_states_tuple=tuple(skips[-count:]), **context)
        skips = skips[:-count]
    return unet.conv_out(unet.conv_act(unet.conv_norm_out(h)))


@pytest.mark.parametrize("order", [0, 1, 2])
def test_equals_the_rule_written_out(make_unet, run_loop, by_hand, order):
    """Key steps at uneven distances; everything in front of the decoder gives what it gave, or its forecast."""
    unet, keys = make_unet(), [0, 1, 4, 6]
    encoder = ["conv_in", *(f"down_blocks.{i}" for i in range(len(unet.down_blocks))), "mid_block"]
    undo = by_hand(unet, dict.fromkeys(encoder, keys), order)
    expected = run_loop(unet, steps=9)
    undo()
    with diffusers_ext.apply(unet, FasterDiffusionConfig(keys, forecast_order=order)):
        torch.testing.assert_close(run_loop(unet, steps=9), expected, atol=1e-5, rtol=0)
    assert not torch.allclose(run_loop(unet, steps=9), expected, atol=1e-5)


# ---- schedules


def test_official_schedules():
    assert key_step_list(50) == key_step_list(50, "50ls") == [0, 1, 2, 3, 5, 10, 15, 25, 35]
    assert key_step_list(20) == [0, 4, 8, 12, 16] and key_step_list(7, 3) == [0, 3, 6]
    assert key_step_list(50, "pro") == [0, 2, 5, 9, 14, 20, 27, 35, 44]
    assert key_step_list(75, "75ls") == [*range(10), *range(10, 66, 5), *range(66, 75)]
    assert key_step_list(100, "100ls") == [*range(10), *range(10, 86, 5), *range(86, 100)]


@pytest.mark.parametrize("total", [1, 7, 20, 25, 100])
@pytest.mark.parametrize("name", ["50ls", "75ls", "100ls", "pro"])
def test_stretched_schedules_keep_the_first_step(total, name):
    keys = key_step_list(total, name)
    assert keys[0] == 0 and keys == sorted(set(keys)) and keys[-1] < total
    assert key_step_list(100, "50ls") == [2 * i for i in key_step_list(50, "50ls")]


def test_groups_end_at_the_next_key_step():
    keys = [0, 1, 5]
    assert [decoded_together(i, 9, keys, 8) for i in (0, 1, 3, 5)] == [1, 4, 2, 4]
    assert decoded_together(1, 9, keys, 3) == 3


def test_copies_are_whole_batches_in_turn():
    x = torch.arange(3.0)[:, None]
    assert tile(x, 2).flatten().tolist() == [0, 1, 2, 0, 1, 2]
    assert tile({"a": x, "b": 5}, 2, rows=4)["a"] is x


@pytest.mark.parametrize(
    "values, words",
    [
        ({"key_steps": [1, 2]}, "must hold 0"),
        ({"key_steps": [-1, 0]}, "must hold 0"),
        ({"key_steps": []}, "must hold 0"),
        ({"key_steps": 0}, "key_steps is 0"),
        ({"key_steps": "fast"}, "50ls.*pro"),
        ({"key_steps": [0, 9], "num_inference_steps": 9}, r"\[9\].*9 steps"),
        ({"max_parallel": 0}, "max_parallel is 0"),
        ({"max_parallel": 4, "forecast_order": 1}, "forecast_order=1.*max_parallel=4.*leave one"),
    ],
)
def test_bad_values(values, words):
    with pytest.raises(ValueError, match=words):
        FasterDiffusionConfig(**values)


def test_other_refusals(make_unet, run_loop, traces):
    unet = make_unet()
    with pytest.raises(ValueError, match="9.*12 steps"):
        diffusers_ext.apply(unet, FasterDiffusionConfig(key_steps=[0, 90]), num_inference_steps=12)
    with diffusers_ext.apply(_pipe(unet, 6), FasterDiffusionConfig(key_steps=[0, 9])), pytest.raises(ValueError):
        run_loop(unet)
    with pytest.raises(ValueError, match="HeunDiscreteScheduler.*max_parallel=1"):
        diffusers_ext.apply(_pipe(unet, scheduler=HeunDiscreteScheduler()), FasterDiffusionConfig(max_parallel=2))
    with pytest.raises(ValueError, match="apply it to the pipeline"):
        diffusers_ext.apply(unet, FasterDiffusionConfig(max_parallel=2))
    with pytest.raises(ValueError, match="num_inference_steps"):
        diffusers_ext.apply(unet, FasterDiffusionConfig("pro"))
    with pytest.raises(ValueError, match="Linear has no conv_in.*FirstBlockCacheConfig"):
        diffusers_ext.apply(torch.nn.Linear(2, 2), FasterDiffusionConfig())
    with pytest.raises(ValueError, match="cannot be combined"):
        diffusers_ext.apply(unet, FasterDiffusionConfig(), DeepCacheConfig())
    assert traces(unet) == ({}, set(), False)


def test_config_travels_as_json():
    for config in (FasterDiffusionConfig(), FasterDiffusionConfig([0, 3], 4, True)):
        values = json.loads(json.dumps(config.to_dict()))
        assert diffusers_ext.MethodConfig.from_dict(values) == config


# ---- what runs


@pytest.mark.parametrize("name", NAMES)
def test_all_steps_key_is_exact_and_removal_leaves_nothing(make_unet, run_loop, traces, name):
    unet = make_unet(name)
    plain = run_loop(unet, name)
    for parallel in (1, 8):
        with diffusers_ext.apply(_pipe(unet, 6), FasterDiffusionConfig(1, parallel)):
            assert torch.equal(run_loop(unet, name), plain)
    with diffusers_ext.apply(_pipe(unet, 6), FasterDiffusionConfig(3)):
        cached = run_loop(unet, name)
    assert not torch.equal(cached, plain) and torch.isfinite(cached).all()
    assert torch.equal(run_loop(unet, name), plain) and traces(unet) == ({}, set(), False)


def test_decoder_by_hand(make_unet, make_inputs):
    """The time embedding of each step, features of the key step: in sequence and in one batch."""
    unet = make_unet()
    x, kwargs = make_inputs("sd", 2, 16)
    text = kwargs["encoder_hidden_states"]
    pipe = _pipe(unet, 5)
    times = pipe.scheduler.timesteps
    expected = [_decoder(unet, x, int(times[0]), int(t), text) for t in times]
    for parallel in (1, 2, 8):
        with torch.no_grad(), diffusers_ext.apply(pipe, FasterDiffusionConfig(5, parallel)) as handle:
            actual = [unet(x if i == 0 else torch.randn_like(x), t, text).sample for i, t in enumerate(times)]
            batches = handle.summary()["faster-diffusion"]["decoder_batches"]
        for one, other in zip(actual, expected):
            torch.testing.assert_close(one, other, atol=1e-5, rtol=0)
        assert batches == -(-5 // parallel)


@pytest.mark.parametrize("parallel", [1, 4])
def test_non_key_prediction_does_not_see_the_latents(make_unet, make_inputs, parallel):
    unet = make_unet()
    x, kwargs = make_inputs("sd", 2, 16)
    pipe = _pipe(unet, 4)
    results = []
    for noise in (0.0, 10.0):
        with torch.no_grad(), diffusers_ext.apply(pipe, FasterDiffusionConfig(4, parallel)):
            results.append(
                [unet(x + noise * (i > 0), t, **kwargs).sample for i, t in enumerate(pipe.scheduler.timesteps)]
            )
    assert all(torch.equal(a, b) for a, b in zip(*results))


@pytest.mark.parametrize("parallel, decoders", [(1, 50), (64, 9)])
def test_fifty_steps_run_nine_encoders(make_unet, run_loop, count_runs, parallel, decoders):
    unet = make_unet()
    with diffusers_ext.apply(_pipe(unet, 50), FasterDiffusionConfig("50ls", parallel)) as handle:
        counts = count_runs(
            lambda: run_loop(unet, steps=50, batch=1, size=8),
            down=unet.down_blocks[0].resnets[0],
            mid=unet.mid_block.resnets[0],
            up=unet.up_blocks[0].resnets[0],
        )
        figures = handle.summary()["faster-diffusion"]
    assert counts == {"down": 9, "mid": 9, "up": decoders}
    assert (figures["computed"], figures["reused"], figures["decoder_batches"]) == (9, 41, decoders)


@pytest.mark.parametrize("name", NAMES)
def test_parallel_equals_sequential(make_unet, run_loop, name):
    unet = make_unet(name)
    runs = []
    for parallel in (1, 3, 16):
        with diffusers_ext.apply(_pipe(unet, 12), FasterDiffusionConfig("50ls", parallel)):
            runs.append(run_loop(unet, name, steps=12))
    for other in runs[1:]:
        torch.testing.assert_close(other, runs[0], atol=1e-4, rtol=0)


def test_a_non_key_call_costs_its_decoder(make_unet, make_inputs):
    unet = make_unet()
    x, kwargs = make_inputs("sd", 2, 16)
    whole = count_macs(unet, x, 900, **kwargs)
    encoder = 0
    with torch.no_grad():
        skips = [unet.conv_in(x)]
        emb = unet.time_embedding(unet.time_proj(torch.tensor([900.0] * 2)))
        encoder += count_macs(unet.conv_in, x)
        h = skips[0]
        for block in [*unet.down_blocks, unet.mid_block]:
            context = kwargs if hasattr(block, "attentions") else {}
            encoder += count_macs(block, h, emb, **context)
            out = block(h, emb, **context)
            h = out[0] if isinstance(out, tuple) else out
    with diffusers_ext.apply(unet, FasterDiffusionConfig(2)) as handle:
        ran = [count_macs(unet, x, t, **kwargs) for t in (900, 800)]
        figures = handle.summary()["faster-diffusion"]
    assert ran == [whole, whole - encoder] == [figures["macs_full_call"], figures["macs_reused_call"]]
    assert figures["macs_saved"] == pytest.approx(encoder / (2 * whole))


def test_control_is_live_by_default_and_frozen_on_demand(make_unet, make_inputs):
    """Residuals of the current step are added once; frozen ones are those of the key step."""
    unet = make_unet()
    x, kwargs = make_inputs("sd", 1, 16)
    shapes = []
    with torch.no_grad():
        h, emb = unet.conv_in(x), unet.time_embedding(unet.time_proj(torch.tensor([900.0])))
        shapes.append(h.shape)
        for block in unet.down_blocks:
            h, new = block(h, emb, **(kwargs if hasattr(block, "attentions") else {}))
            shapes += [s.shape for s in new]

    def residuals(value):
        return {
            "down_block_additional_residuals": [torch.full(s, value) for s in shapes],
            "mid_block_additional_residual": torch.full(h.shape, value),
        }

    def run(config, values, pipe=None):
        with torch.no_grad(), diffusers_ext.apply(pipe or unet, config):
            return [unet(x, t, **kwargs, **residuals(v)).sample for t, v in zip((900, 800, 700), values)]

    live = FasterDiffusionConfig(3)
    # A decoder whose features are those of step 900 gives, at step 900 itself, the whole UNet's output.
    assert torch.equal(run(live, (0.1, 0.5, 0.5))[0], run(FasterDiffusionConfig(1), (0.1,) * 3)[0])
    with torch.no_grad(), diffusers_ext.apply(unet, live):
        unet(x, 900, **kwargs, **residuals(0.1))
        at_900 = unet(x, torch.tensor(900.0 - 1e-4), **kwargs, **residuals(0.5)).sample
    with torch.no_grad():
        torch.testing.assert_close(at_900, unet(x, 900, **kwargs, **residuals(0.5)).sample, atol=1e-4, rtol=0)
    pipe = _pipe(unet, 3)
    frozen = FasterDiffusionConfig(3, freeze_control=True, num_inference_steps=3)
    assert not torch.equal(run(live, (0.1, 0.5, 0.5))[1], run(live, (0.1, 0.2, 0.2))[1])
    for one, other in zip(run(frozen, (0.1, 0.5, 0.5)), run(live, (0.1, 0.1, 0.1))):
        assert torch.equal(one, other)
    ahead = FasterDiffusionConfig(3, max_parallel=3)
    with diffusers_ext.apply(pipe, ahead), pytest.raises(ValueError, match="freeze_control=True"):
        unet(x, pipe.scheduler.timesteps[0], **kwargs, **residuals(0.1))
    wide = FasterDiffusionConfig(3, 3, freeze_control=True)
    runs = []
    for config in (FasterDiffusionConfig(3, freeze_control=True), wide):
        with torch.no_grad(), diffusers_ext.apply(pipe, config):
            runs.append([unet(x, t, **kwargs, **residuals(0.1)).sample for t in pipe.scheduler.timesteps])
    for one, other in zip(*runs):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=0)


def test_a_frozen_controlnet_runs_at_key_steps_only(count_runs):
    pipe = zoo.load("shapes-unet")
    torch.manual_seed(0)
    control = ControlNetModel.from_unet(pipe.unet, conditioning_embedding_out_channels=(8, 16, 16)).eval()
    for parameter in control.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    guided = StableDiffusionControlNetPipeline.from_pipe(pipe, controlnet=control)
    guided.set_progress_bar_config(disable=True)

    def draw():
        settings = {"num_inference_steps": 8, "output_type": "latent", "height": 64, "width": 64}
        generator = torch.Generator().manual_seed(0)
        return guided("a red circle", image=torch.zeros(1, 3, 64, 64), generator=generator, **settings).images

    plain = draw()
    with diffusers_ext.apply(guided, FasterDiffusionConfig(4, freeze_control=True)):
        counts = count_runs(draw, control=control.mid_block.resnets[0], mid=pipe.unet.mid_block.resnets[0])
        assert torch.equal(draw(), draw())
    assert counts == {"control": 2, "mid": 2}
    assert torch.equal(draw(), plain)


# ---- never stale


@pytest.mark.parametrize("parallel", [1, 3])
def test_runs_in_a_row_and_interrupted_ones(make_unet, run_loop, parallel):
    unet = make_unet()
    with diffusers_ext.apply(_pipe(unet, 6), FasterDiffusionConfig(4, parallel)):
        first = run_loop(unet)
        run_loop(unet, batch=1)
        run_loop(unet, size=8)
        run_loop(unet, calls=2)
        assert torch.equal(run_loop(unet), first)


@pytest.mark.parametrize("parallel", [1, 3])
def test_split_guidance_equals_batched(make_unet, make_inputs, parallel):
    unet = make_unet()
    x0, kwargs = make_inputs("sd", 2, 16)
    both = kwargs["encoder_hidden_states"]
    uncond, cond = both[:1], both[1:].clone()
    pipe = _pipe(unet, 6)

    def run(predict):
        x = x0[:1]
        with torch.no_grad():
            for t in pipe.scheduler.timesteps:
                u, c = predict(x, t)
                x = x + 0.1 * (u + 3 * (c - u))
        return x

    with diffusers_ext.apply(pipe, FasterDiffusionConfig(3, parallel)):
        split = run(lambda x, t: (unet(x, t, uncond).sample, unet(x, t, cond).sample))
        batched = run(lambda x, t: unet(torch.cat([x, x]), t, both).sample.chunk(2))
    torch.testing.assert_close(split, batched, atol=1e-4, rtol=0)


def test_heun_in_sequence(make_unet, run_loop, count_runs):
    unet = make_unet()
    pipe = _pipe(unet, 8, HeunDiscreteScheduler())
    with diffusers_ext.apply(pipe, FasterDiffusionConfig(4)):
        counts = count_runs(lambda: run_loop(unet, timesteps=pipe.scheduler.timesteps), mid=unet.mid_block.resnets[0])
    assert counts["mid"] == 4, "predictor and corrector evaluations have features each: 2 of 8 and 2 of 7"


def test_compiled(make_unet, run_loop):
    unet = make_unet("one-layer")
    torch._dynamo.reset()
    with diffusers_ext.apply(_pipe(unet, 6), FasterDiffusionConfig(3)):
        expected = run_loop(unet)
        torch.testing.assert_close(run_loop(torch.compile(unet, backend="eager")), expected, atol=1e-5, rtol=0)
    torch._dynamo.reset()


# ---- noise injection


def test_injection_starts_in_the_second_half():
    x, x_T = torch.ones(2), torch.full((2,), 2.0)
    assert injected(x, x_T, 0.1, 0.5, 0.5) is x
    torch.testing.assert_close(injected(x, x_T, 0.1, 0.49, 0.5), torch.full((2,), 1.2))
    for values in ({"noise_injection": -1.0}, {"injection_start": 0.0}, {"injection_start": 1.1}):
        with pytest.raises(ValueError, match="noise_injection is"):
            FasterDiffusionCallback(x, **values)


@pytest.fixture
def shapes(shapes_unet):
    shapes_unet.scheduler = DDIMScheduler.from_config(shapes_unet.scheduler.config)
    return shapes_unet


def test_injection_moves_the_latents_a_little_and_adds_detail(shapes):
    noise = torch.randn(4, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    prompts = list(zoo.held_out(4).captions)

    def draw(**kwargs):
        return shapes(prompts, latents=noise, num_inference_steps=20, output_type="latent", **kwargs).images

    def high_frequencies(x):
        spectrum = torch.fft.fft2(x).abs() ** 2
        radius = torch.fft.fftfreq(16)[:, None] ** 2 + torch.fft.fftfreq(16)[None] ** 2
        return float(spectrum[..., radius > 0.25**2].sum())

    with diffusers_ext.apply(shapes, FasterDiffusionConfig(4)):
        without, zero = draw(), draw(callback_on_step_end=FasterDiffusionCallback(noise, 0.0))
        with_noise = draw(callback_on_step_end=FasterDiffusionCallback(noise))
    assert torch.equal(without, zero)
    assert 0 < float((with_noise - without).norm() / without.norm()) < 0.1
    assert high_frequencies(with_noise) > high_frequencies(without)


def test_initial_noise_in_the_units_of_the_latents():
    """Divided by what the scheduler divides its input by, it is the same at every step."""
    noise = torch.randn(1, 4, 2, 2)
    for scheduler in (DDIMScheduler(), EulerDiscreteScheduler()):
        scheduler.set_timesteps(10)
        seen = []
        for i, t in enumerate(scheduler.timesteps):
            scheduler._step_index = i
            seen.append(scheduler.scale_model_input(initial_noise(scheduler, noise, i), t))
        for x in seen[1:]:
            torch.testing.assert_close(x, seen[0])
        torch.testing.assert_close(seen[0], noise, atol=0.01, rtol=0)


def test_own_loop_equals_the_pipeline(shapes):
    """In sequence, with injection before the model, it is the callback in the pipeline's loop."""
    noise = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    prompts = list(zoo.held_out(2).captions)
    text, negative = shapes.encode_prompt(prompts, "cpu", 1, True, negative_prompt=[""] * 2)
    settings = {"num_inference_steps": 10, "guidance_scale": 3.0}

    def own(config, **kwargs):
        return faster_diffusion_denoise(shapes, noise, text, negative, config, **settings, **kwargs)

    def pipeline(**kwargs):
        return shapes(prompts, latents=noise, output_type="latent", **settings, **kwargs).images

    one, many = FasterDiffusionConfig(3), FasterDiffusionConfig(3, 4)
    with diffusers_ext.apply(shapes, one):
        expected = pipeline(callback_on_step_end=FasterDiffusionCallback(noise))
        plain = pipeline()
    torch.testing.assert_close(own(one), expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(own(one, injection_point="model"), expected, atol=1e-5, rtol=0)
    for config in (one, many):
        torch.testing.assert_close(own(config, noise_injection=0.0), plain, atol=1e-4, rtol=0)
    torch.testing.assert_close(own(many), own(one, injection_point="step"), atol=1e-4, rtol=0)
    assert not torch.allclose(own(many), expected, atol=1e-4)
    with pytest.raises(ValueError, match="'official'"):
        own(one, injection_point="never")


@pytest.mark.parametrize("batch", [1, 2])
def test_image_prompts_of_steps_decoded_together(make_unet, batch):
    """IP-Adapter: its images are repeated with the batch, so that parallel equals sequential."""
    unet = make_unet()
    torch.manual_seed(5)
    processors = {
        name: p if "attn1" in name else IPAdapterAttnProcessor2_0(attn_width(unet, name), 8, num_tokens=(4,))
        for name, p in unet.attn_processors.items()
    }
    unet.set_attn_processor(processors)
    unet.encoder_hid_proj = MultiIPAdapterImageProjection([ImageProjection(6, 8, 4)])
    unet.register_to_config(encoder_hid_dim_type="ip_image_proj")
    unet.requires_grad_(False)
    pipe = _pipe(unet, 8)
    text, images = torch.randn(batch, 5, 8), torch.randn(2, batch, 1, 6)

    def run(config, image):
        x = torch.randn(batch, 4, 16, 16, generator=torch.Generator().manual_seed(1))
        with torch.no_grad(), diffusers_ext.apply(pipe, config) as handle:
            for t in pipe.scheduler.timesteps:
                eps = unet(x, t, text, added_cond_kwargs={"image_embeds": [image]}).sample
                x = pipe.scheduler.step(eps, t, x).prev_sample
            return x, handle.summary()["faster-diffusion"]["decoder_batches"]

    sequential, calls = run(FasterDiffusionConfig(4), images[0])
    parallel, fewer = run(FasterDiffusionConfig(4, max_parallel=4), images[0])
    torch.testing.assert_close(parallel, sequential, atol=1e-4, rtol=0)
    assert (calls, fewer) == (8, 2)
    assert not torch.allclose(run(FasterDiffusionConfig(4, max_parallel=4), images[1])[0], parallel, atol=1e-3)


def attn_width(unet, name):
    return unet.get_submodule(name.removesuffix(".processor")).to_q.out_features


# ---- what it saves on the trained model


@pytest.mark.slow
def test_wall_time_at_fifty_steps(shapes):
    """Every 6th step: 0.755 of the operations of whole runs remain. Process time, which other load still lengthens."""

    def draw():
        zoo.generate(shapes, ["a red circle"] * 2, num_inference_steps=50)

    def cached():
        with diffusers_ext.apply(shapes, FasterDiffusionConfig(6)):
            draw()

    timing = paired_ratio(cached, draw, pairs=3, clock=time.process_time)
    assert timing.ratio < 0.8, str(timing)


@pytest.mark.slow
def test_fewer_key_steps_are_less_faithful(shapes):
    captions = zoo.held_out(4).captions

    def draw():
        return zoo.generate(shapes, captions, num_inference_steps=50)

    reference, scores = draw(), []
    for keys in (2, 8):
        with diffusers_ext.apply(shapes, FasterDiffusionConfig(keys)):
            scores.append(mean_psnr(draw(), reference))
    assert scores[0] > scores[1], scores
