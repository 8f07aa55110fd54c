"""RAS as a native MODEL patch: same choices and pictures as the diffusers side, nothing of ComfyUI lost."""

from __future__ import annotations

import pytest
import torch

import diffusers_ext
from diffusers_ext import RASConfig, zoo


pytestmark = pytest.mark.comfy
CAPTION = "a small red circle left of a large green square, striped blue background"
STEPS = 10


@pytest.fixture(scope="module")
def shapes(native_pipe, encode):
    model, clip, _ = native_pipe("shapes-dit")
    return model, encode(clip, CAPTION), encode(clip, "")


@pytest.fixture
def patch(dx_nodes):
    def node(model, ratio=0.5, start_step=3, end_step=1000, reset_steps="6", high_ratio=1.0, starvation=0.1, **more):
        execute = dx_nodes["DXRegionAdaptiveSampling"].execute
        return execute(model, ratio, start_step, end_step, reset_steps, "std", high_ratio, starvation, **more).args[0]

    return node


@pytest.fixture
def ksample(comfy, shapes):
    """The core KSampler node on the shapes model; returns latents."""
    _, positive, negative = shapes

    def run(model, steps=STEPS, sampler="euler", batch=1, size=(16, 16), denoise=1.0, cfg=3.0):
        latent = {"samples": torch.zeros(batch, 4, *size)}
        return comfy.nodes.common_ksampler(
            model, 0, steps, cfg, sampler, "simple", positive, negative, latent, denoise=denoise
        )[0]["samples"]

    return run


@pytest.fixture
def runs(comfy, monkeypatch):
    """Every run that the node starts, in order."""
    caching = pytest.importorskip("comfy_nodes.caching_ras")
    started, original = [], caching._new_run

    def new_run(*args):
        started.append(original(*args))
        return started[-1]

    monkeypatch.setattr(caching, "_new_run", new_run)
    return started


@pytest.mark.parametrize("reuse_text", [False, True])
@pytest.mark.parametrize("order", [0, 1])
def test_parity_with_diffusers(comfy, shapes, patch, runs, order, reuse_text):
    """Two pictures at once, guided: the same tokens at every step, and the same latents."""
    model, positive, negative = shapes
    pipe = zoo.load("shapes-dit")
    noise = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(3))
    more = {"forecast_order": order, "reuse_text": reuse_text}
    config = RASConfig(0.5, 3, None, [6], high_ratio=0.7, starvation_scale=0.5, **more)
    with diffusers_ext.apply(pipe, config) as handle:
        expected = pipe(
            [CAPTION] * 2,
            negative_prompt=[""] * 2,
            true_cfg_scale=3.0,
            guidance_scale=1.0,
            height=64,
            width=64,
            num_inference_steps=STEPS,
            max_sequence_length=20,
            latents=pipe._pack_latents(noise, 2, 4, 16, 16),
            output_type="latent",
        ).images
        figures = handle.summary()["ras"]
    sampled = comfy.sample.sample_custom(
        patch(model, 0.5, 3, 1000, "6", 0.7, 0.5, **more),
        noise,
        3.0,
        comfy.samplers.sampler_object("euler"),
        pipe.scheduler.sigmas,
        positive,
        negative,
        torch.zeros_like(noise),
        seed=0,
        disable_pbar=True,
    )
    latents = model.get_model_object("latent_format").process_in(sampled)
    torch.testing.assert_close(pipe._pack_latents(latents, 2, 4, 16, 16), expected, atol=1e-4, rtol=0)
    (run,) = runs
    assert run.regions.history == figures["tokens"] == [32] * 6
    left_out = run.regions.skips
    assert [int(left_out.min()), int(left_out.max())] == figures["times_left_out"]
    # Guidance runs in one batch here and in turn there.
    assert (2 * run.computed, 2 * run.reused) == (figures["computed"], figures["reused"]) == (8, 12)


def test_ratio_one_is_exact_and_the_given_model_is_untouched(shapes, patch, ksample):
    model = shapes[0]
    plain = ksample(model)
    assert torch.equal(ksample(patch(model, 1.0)), plain)
    cached = ksample(patch(model))
    assert not torch.equal(cached, plain) and torch.isfinite(cached).all()
    assert torch.equal(ksample(model), plain)


def test_what_is_computed(shapes, patch, ksample):
    """Tokens that enter the MLP of the first block."""
    model, seen = shapes[0], []
    mlp = model.model.diffusion_model.double_blocks[0].img_mlp
    handle = mlp.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[1]))
    ksample(patch(model, 0.25, 3, 7, "5"))
    handle.remove()
    assert seen == [64] * 3 + [16, 16, 64, 16, 16] + [64] * 2


@pytest.mark.parametrize("sampler", ["dpmpp_2m", "heun", "uni_pc"])
def test_samplers(shapes, patch, ksample, runs, sampler):
    patched = patch(shapes[0])
    first = ksample(patched, sampler=sampler)
    assert torch.isfinite(first).all() and runs[0].reused > 2
    assert torch.equal(ksample(patched, sampler=sampler), first)


def test_sizes_that_are_not_square_nor_even(shapes, patch, ksample):
    model = shapes[0]
    for size in ((16, 24), (17, 15)):
        plain, cached = ksample(model, size=size, batch=2), ksample(patch(model), size=size, batch=2)
        assert cached.shape == plain.shape and 0 < (cached - plain).norm() < 0.5 * plain.norm()


def test_runs_do_not_see_each_other(shapes, patch, ksample):
    patched = patch(shapes[0])
    clean = ksample(patched)
    ksample(patched, batch=2, size=(20, 20))
    ksample(patched, denoise=0.5)
    calls = []

    def fail(args):
        calls.append(1)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return args["denoised"]

    broken = patched.clone()
    broken.set_model_sampler_post_cfg_function(fail)
    with pytest.raises(KeyboardInterrupt):
        ksample(broken)
    assert torch.equal(ksample(patched), clean)


def test_conditions_in_turn_equal_conditions_in_one_batch(shapes, patch, ksample, monkeypatch):
    patched = patch(shapes[0])
    together = ksample(patched)
    monkeypatch.setattr(shapes[0].model, "memory_required", lambda *_, **__: 1e30)
    torch.testing.assert_close(ksample(patched), together, atol=1e-4, rtol=0)


def test_patching_twice_replaces(shapes, patch, ksample):
    model = shapes[0]
    assert torch.equal(ksample(patch(patch(model, 0.2, 2), 0.5)), ksample(patch(model, 0.5)))


@pytest.mark.parametrize("reuse_text", [False, True])
@pytest.mark.parametrize("name", ["shapes-dit", "sd3"])
def test_a_part_equals_the_same_part_of_the_whole(name, reuse_text, native_pipe, tiny_pipe, patch, comfy):
    """With fresh keys and values and an input that does not move: control, other patches, two conditions at once."""
    caching = pytest.importorskip("comfy_nodes.caching_ras")
    from diffusers_ext.caching.ras_tokens import Cache, Call

    model = (native_pipe(name) if name == "shapes-dit" else tiny_pipe(name))[0]
    flux = name == "shapes-dit"
    base, transformer = model.model, model.model.diffusion_model
    torch.manual_seed(0)
    x = torch.randn(2, base.latent_format.latent_channels, 8, 10)
    words = 128 if flux else transformer.context_embedder.in_features
    pooled = 128 if flux else transformer.y_embedder.mlp[0].in_features
    arguments = {"c_crossattn": torch.randn(2, 6, words), "y": torch.randn(2, pooled)}
    width = transformer.hidden_size
    residual = 0.3 * torch.randn(2, 20, width)
    last = caching._Places(model).last[1]

    def control():
        kinds = {"input": [residual.clone()], "output": [residual.clone()] * (last + 1)}
        return kinds if flux else {"output": kinds["output"]}

    cache = caching.RegionAdaptiveSampling(None, caching._Places(model))
    store = Cache()

    def run(call):
        options = cache._patched({}, call) if call else {}
        with torch.no_grad():
            denoised = base.apply_model(
                x,
                torch.tensor([0.6, 0.6]),
                control=cache._control(control(), call) if call else control(),
                transformer_options=options,
                **arguments,
            )
        return caching._tokens((x - denoised) / 0.6, 2)

    plain = run(None)
    full = Call(store, None, True, 20)
    assert torch.equal(full.complete(run(full)), plain)
    index = torch.tensor([[0, 3, 4, 17], [1, 2, 18, 19]])
    part = Call(store, index, True, 20, reuse_text=reuse_text)
    computed = part.gather(run(part))
    torch.testing.assert_close(computed, part.gather(plain), atol=1e-4, rtol=1e-3)
    torch.testing.assert_close(part.complete(computed), plain, atol=1e-4, rtol=1e-3)


def test_stable_diffusion_3(tiny_pipe, patch, comfy, runs):
    model = tiny_pipe("sd3")[0]
    transformer = model.model.diffusion_model
    words, pooled = transformer.context_embedder.in_features, transformer.y_embedder.mlp[0].in_features
    cond = [[torch.randn(1, 7, words), {"pooled_output": torch.randn(1, pooled)}]]
    latent = {"samples": torch.zeros(1, 16, 8, 8)}

    def run(m):
        return comfy.nodes.common_ksampler(m, 0, 6, 2.0, "euler", "simple", cond, cond, latent)[0]["samples"]

    plain = run(model)
    assert torch.equal(run(patch(model, 1.0, reset_steps="4")), plain)
    cached = run(patch(model, 0.5, 2, 1000, "4"))
    assert runs[-1].reused == 3 and torch.isfinite(cached).all() and not torch.equal(cached, plain)


def test_refusals(native_pipe, shapes, patch, ksample):
    with pytest.raises(ValueError, match="this model is a UNetModel"):
        patch(native_pipe("shapes-unet")[0])
    with pytest.raises(ValueError, match="reset_steps is 'six'"):
        patch(shapes[0], reset_steps="six")
    with pytest.raises(ValueError, match="a run of 4 steps accepts 0 to 3"):
        ksample(patch(shapes[0], reset_steps="6"), steps=4)
