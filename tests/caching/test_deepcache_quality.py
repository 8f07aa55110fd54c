"""DeepCache on the trained shapes model: what it saves, what it costs, and how it behaves inside of pipelines."""

from __future__ import annotations

import time

import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionImg2ImgPipeline

import diffusers_ext
from diffusers_ext import DeepCacheConfig, zoo
from diffusers_ext.eval import mean_psnr, paired_ratio


@pytest.fixture(scope="module")
def pipe():
    pipe = zoo.load("shapes-unet")
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    return pipe


@pytest.fixture(scope="module")
def draw(pipe):
    captions = zoo.held_out(3).captions

    def run(config=None, steps=50):
        if config is None:
            return zoo.generate(pipe, captions, num_inference_steps=steps)
        with diffusers_ext.apply(pipe, config):
            return zoo.generate(pipe, captions, num_inference_steps=steps)

    return run


@pytest.fixture(scope="module")
def reference(draw):
    return draw()


def test_a_reused_call_costs_less_than_35_percent(pipe):
    with diffusers_ext.apply(pipe, DeepCacheConfig(cache_interval=3)) as handle:
        zoo.generate(pipe, ["a red circle"], num_inference_steps=3)
        figures = handle.summary()["deepcache"]
    assert figures["macs_reused_call"] < 0.35 * figures["macs_full_call"]
    assert (figures["computed"], figures["reused"]) == (1, 2)


def test_wall_time_at_interval_three(pipe):
    """Process time, so that other load on the machine does not decide; the median of interleaved pairs."""

    def draw():
        zoo.generate(pipe, ["a red circle"] * 4, num_inference_steps=9)

    def cached():
        with diffusers_ext.apply(pipe, DeepCacheConfig(cache_interval=3)):
            draw()

    timing = paired_ratio(cached, draw, pairs=3, clock=time.process_time)
    assert timing.ratio < 0.6, str(timing)


def test_longer_intervals_are_less_faithful(draw, reference):
    scores = [mean_psnr(draw(DeepCacheConfig(cache_interval=n)), reference) for n in (2, 5, 10)]
    assert scores[0] > scores[1] > scores[2], scores
    assert mean_psnr(draw(DeepCacheConfig(cache_interval=1)), reference) == float("inf")


@pytest.mark.slow
def test_deeper_branches_are_not_worse_by_more_than_half_a_decibel(draw, reference):
    scores = [mean_psnr(draw(DeepCacheConfig(cache_interval=3, cache_branch_id=b)), reference) for b in range(6)]
    assert all(deeper > shallower - 0.5 for shallower, deeper in zip(scores, scores[1:])), scores


def test_two_calls_with_one_seed_are_identical(pipe):
    with diffusers_ext.apply(pipe, DeepCacheConfig(cache_interval=3)):
        first, second = (zoo.generate(pipe, ["a red circle"], num_inference_steps=5) for _ in range(2))
    assert torch.equal(first, second)


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_a_batch_equals_its_singles(pipe, guidance):
    captions = zoo.held_out(2).captions
    settings = {"num_inference_steps": 6, "guidance_scale": guidance}
    with diffusers_ext.apply(pipe, DeepCacheConfig(cache_interval=2)):
        whole = zoo.generate(pipe, captions, **settings)
        singles = zoo.generate(pipe, captions, batch_size=1, **settings)
    torch.testing.assert_close(whole, singles, atol=1e-4, rtol=0)


def test_image_to_image_starts_its_schedule_at_its_first_step(pipe, count_runs):
    image = zoo.held_out(1).images
    second = StableDiffusionImg2ImgPipeline.from_pipe(pipe)
    second.set_progress_bar_config(disable=True)

    def run():
        generator = torch.Generator().manual_seed(0)
        settings = {"strength": 0.5, "num_inference_steps": 14, "generator": generator, "output_type": "latent"}
        return second("a red circle", image=image, **settings).images

    plain = run()
    with diffusers_ext.apply(second, DeepCacheConfig(cache_interval=3)):
        counts = count_runs(lambda: run(), mid=pipe.unet.mid_block.resnets[0], all=pipe.unet.conv_in)
        assert torch.equal(run(), run())
    assert counts == {"mid": 3, "all": 7}
    assert torch.equal(run(), plain)


def test_an_interrupt_from_a_callback_leaves_nothing_behind(pipe):
    def stop(pipe, step, t, kwargs):
        raise KeyboardInterrupt

    def run(**kwargs):
        return zoo.generate(pipe, ["a red circle"], num_inference_steps=5, **kwargs)

    with diffusers_ext.apply(pipe, DeepCacheConfig(cache_interval=4)):
        clean = run()
        for steps in (5, 9):
            with pytest.raises(KeyboardInterrupt):
                zoo.generate(pipe, ["a red circle"], num_inference_steps=steps, seed=7, callback_on_step_end=stop)
            assert torch.equal(run(), clean)


def test_memory_is_given_back_at_the_end_of_a_run(pipe):
    with diffusers_ext.apply(pipe, DeepCacheConfig(cache_interval=4)):
        zoo.generate(pipe, ["a red circle"], num_inference_steps=3)
        (hook,) = pipe.unet._diffusers_hook.hooks.values()
        assert not hook.tracker._contexts and hook.shared.record is None
