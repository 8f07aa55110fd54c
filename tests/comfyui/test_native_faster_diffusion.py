"""Faster Diffusion in ComfyUI's own classes: same decisions and outputs as the diffusers side."""

from __future__ import annotations

import uuid

import pytest
import torch

import diffusers_ext
from diffusers_ext import FasterDiffusionConfig, zoo
from diffusers_ext.caching.faster_diffusion import key_step_list
from diffusers_ext.caching.faster_diffusion_sampling import faster_diffusion_denoise


pytestmark = pytest.mark.comfy
CAPTION = "a small red circle left of a large green square, striped blue background"


@pytest.fixture(scope="module")
def shapes(native_pipe, encode):
    model, clip, _ = native_pipe("shapes-unet")
    return model, encode(clip, CAPTION), encode(clip, "")


@pytest.fixture
def patch(dx_nodes):
    return lambda model, key_steps="3", order=0: dx_nodes["DXFasterDiffusion"].execute(model, key_steps, order).args[0]


@pytest.fixture
def sampler(dx_nodes):
    def node(key_steps="3", max_parallel=8, noise_injection=0.0, injection_start=0.5, injection_point="official"):
        values = (key_steps, max_parallel, noise_injection, injection_start, injection_point)
        return dx_nodes["DXFasterDiffusionSampler"].execute(*values).args[0]

    return node


@pytest.fixture
def ksample(comfy, shapes):
    """The core KSampler on the shapes model, or a SAMPLER object in its place; returns latents."""
    _, positive, negative = shapes

    def run(model, steps=9, sampler="euler", seed=0, batch=2, size=16, denoise=1.0):
        latent = torch.zeros(batch, 4, size, size)
        if isinstance(sampler, str):
            nodes, given = comfy.nodes, {"samples": latent}
            return nodes.common_ksampler(
                model, seed, steps, 3.0, sampler, "normal", positive, negative, given, denoise=denoise
            )[0]["samples"]
        sampling = model.get_model_object("model_sampling")
        sigmas = comfy.samplers.calculate_sigmas(sampling, "normal", steps)
        noise = comfy.sample.prepare_noise(latent, seed)
        return comfy.sample.sample_custom(model, noise, 3.0, sampler, sigmas, positive, negative, latent, seed=seed)

    return run


@pytest.fixture
def executed(shapes):
    """Rows that the encoder's and the decoder's first modules work on, call by call, while a function runs."""
    unet = shapes[0].model.diffusion_model

    def count(function):
        calls = {"encoder": [], "decoder": []}
        modules = {"encoder": unet.input_blocks[1][0].in_layers[0], "decoder": unet.output_blocks[0][0].in_layers[0]}
        handles = [
            module.register_forward_pre_hook(lambda _, args, name=name: calls[name].append(len(args[0])))
            for name, module in modules.items()
        ]
        function()
        for handle in handles:
            handle.remove()
        return calls

    return count


@pytest.mark.parametrize("key_steps, order", [("3", 0), ("pro", 0), ("0, 1, 5", 0), ("3", 1)])
def test_parity_with_diffusers(comfy, shapes, patch, ksample, key_steps, order):
    log, outer = [], shapes[0].clone()

    def record(executor, x, timesteps, context, *rest, **kwargs):
        out = executor(x, timesteps, context, *rest, **kwargs)
        log.append([tensor.detach().clone() for tensor in (x, timesteps, context, out)])
        return out

    outer.add_wrapper_with_key(comfy.patcher_extension.WrappersMP.DIFFUSION_MODEL, "recorder", record)
    ksample(patch(outer, key_steps, order))
    given = {"3": 3, "pro": "pro", "0, 1, 5": [0, 1, 5]}[key_steps]
    unet, context = zoo.load("shapes-unet").unet, log[0][2]
    config = FasterDiffusionConfig(given, num_inference_steps=9, forecast_order=order)
    with torch.no_grad(), diffusers_ext.apply(unet, config) as handle:
        for x, t, _, out in log:
            torch.testing.assert_close(unet(x, t, context).sample, out, atol=1e-4, rtol=0)
        figures = handle.summary()["faster-diffusion"]
    assert figures["computed"] == len(key_step_list(9, given)) and figures["reused"] == 9 - figures["computed"]


def test_every_step_key_is_exact(shapes, patch, sampler, ksample):
    model = shapes[0]
    plain = ksample(model)
    assert torch.equal(ksample(patch(model, "1")), plain)
    torch.testing.assert_close(ksample(model, sampler=sampler("1")), plain, atol=1e-5, rtol=0)
    cached = ksample(patch(model))
    assert not torch.equal(cached, plain) and torch.isfinite(cached).all()
    assert torch.equal(ksample(model), plain)


def test_sampler_decodes_in_batches(shapes, patch, sampler, ksample, executed):
    model, results = shapes[0], {}

    def run(name, **kwargs):
        def function():
            results[name] = ksample(**kwargs)

        return executed(function)

    one = run("one", model=patch(model))
    assert (len(one["encoder"]), len(one["decoder"])) == (3, 9)
    many = run("many", model=model, sampler=sampler())
    assert many == {"encoder": [4] * 3, "decoder": [12] * 3}
    capped = run("capped", model=model, sampler=sampler(max_parallel=2))
    assert capped["decoder"] == [8, 4] * 3
    both = run("both", model=patch(model, "2"), sampler=sampler())
    assert both == many, "the sampler's schedule holds where a patched model brings its own"
    for name in ("many", "capped", "both"):
        torch.testing.assert_close(results[name], results["one"], atol=1e-4, rtol=0)


def test_runs_do_not_see_each_other(shapes, patch, ksample, sampler):
    for model, how in ((patch(shapes[0], "4"), "euler"), (shapes[0], sampler("4"))):
        clean = ksample(model, sampler=how)
        ksample(model, sampler=how, batch=1, size=24)
        ksample(model, sampler=how, steps=5)
        broken, calls = model.clone(), []

        def fail(args, calls=calls):
            calls.append(1)
            if len(calls) == 2:
                raise KeyboardInterrupt
            return args["denoised"]

        broken.set_model_sampler_post_cfg_function(fail)
        with pytest.raises(KeyboardInterrupt):
            ksample(broken, sampler=how)
        assert torch.equal(ksample(model, sampler=how), clean)


@pytest.mark.parametrize("name", ["heun", "dpmpp_2m", "dpmpp_2s_ancestral", "uni_pc"])
def test_samplers(shapes, patch, ksample, executed, name):
    patched = patch(shapes[0])
    calls = executed(lambda: ksample(patched, sampler=name))
    assert len(calls["encoder"]) < 0.7 * len(calls["decoder"])
    assert torch.equal(ksample(patched, sampler=name), ksample(patched, sampler=name))


def test_conditions_in_turn_equal_conditions_in_one_batch(shapes, patch, sampler, ksample, monkeypatch):
    cases = [(patch(shapes[0]), "euler"), (shapes[0], sampler())]
    together = [ksample(model, sampler=how) for model, how in cases]
    monkeypatch.setattr(shapes[0].model, "memory_required", lambda *_, **__: 1e30)
    for (model, how), expected in zip(cases, together):
        torch.testing.assert_close(ksample(model, sampler=how), expected, atol=1e-4, rtol=0)


def test_injection(shapes, sampler, ksample):
    """The point matters, the change is small, and smaller where it starts later."""
    model = shapes[0]
    without = ksample(model, sampler=sampler())
    points = [ksample(model, sampler=sampler(noise_injection=0.003, injection_point=p)) for p in ("model", "step")]
    assert not torch.equal(*points)
    assert torch.equal(ksample(model, sampler=sampler(noise_injection=0.003)), points[1])
    alone = ksample(model, sampler=sampler(max_parallel=1, noise_injection=0.003))
    torch.testing.assert_close(alone, points[0], atol=1e-4, rtol=0)
    for x in points:
        assert 0 < float((x - without).norm() / without.norm()) < 0.1
    late = ksample(model, sampler=sampler(noise_injection=0.003, injection_start=0.1))
    assert 0 < (late - without).norm() < (points[1] - without).norm()


@pytest.mark.parametrize("max_parallel", [1, 4])
def test_injection_equals_diffusers(comfy, shapes, sampler, max_parallel):
    """The own loops of both sides on the same noise levels, with Euler steps and injection at the official point."""
    from diffusers import EulerDiscreteScheduler

    model, positive, _ = shapes
    pipe = zoo.load("shapes-unet")
    pipe.scheduler = EulerDiscreteScheduler.from_config(pipe.scheduler.config, timestep_spacing="linspace")
    noise = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    config = FasterDiffusionConfig(3, max_parallel)
    expected = faster_diffusion_denoise(pipe, noise, positive[0][0], config=config, num_inference_steps=10)
    sigmas = pipe.scheduler.sigmas
    scaled = noise * pipe.scheduler.init_noise_sigma / (1 + sigmas[0] ** 2).sqrt()
    how = sampler("3", max_parallel, 0.003)
    latent = torch.zeros_like(noise)
    out = comfy.sample.sample_custom(model, scaled, 1.0, how, sigmas, positive, positive, latent, seed=0)
    out = model.model.process_latent_in(out)
    torch.testing.assert_close(out, expected, atol=1e-4, rtol=0)


def test_decoder_with_a_fresh_encoder_is_the_whole_pass(shapes, comfy):
    """With everything that may be attached: control, patches that write in place, patches that read block numbers."""
    nodes = pytest.importorskip("comfy_nodes.caching_faster_diffusion")
    unet = shapes[0].model.diffusion_model
    torch.manual_seed(0)
    x, context, t = torch.randn(2, 4, 16, 16), torch.randn(2, 20, 128), torch.tensor([500.0] * 2)
    skips, seen = [], {}

    def attention(q, k, v, extra):
        seen.setdefault((*extra["block"], extra["transformer_index"]), []).append(q.mean().item())
        return q * 1.1, k, v

    def in_place(h, skip, options):
        h[:, :8] *= 1.3
        return h, skip * 0.9

    def after_middle(args):
        return {"h": args["h"] * 1.02}

    def options(**patches):
        return {"patches": patches, "sigmas": torch.tensor([1.0]), "uuids": [uuid.uuid4()]}

    with torch.no_grad():
        unet(x, t, context, transformer_options=options(input_block_patch=[lambda h, o: skips.append(h) or h]))

    def control():
        generator = torch.Generator().manual_seed(1)
        noise = [torch.randn(s.shape, generator=generator) * 0.1 for s in skips]
        return {"output": noise, "middle": [noise[-1].clone()], "input": [n * 0.5 for n in reversed(noise)]}

    given = options(
        output_block_patch=[in_place],
        attn1_patch=[attention],
        input_block_patch=[lambda h, o: h * 1.01],
        input_block_patch_after_skip=[lambda h, o: h * 0.98],
        middle_block_after_patch=[after_middle],
    )
    with torch.no_grad():
        expected = unet(x, t, context, None, control(), dict(given))
        whole, controls = {k: v[-1] for k, v in seen.items()}, control()
        seen.clear()
        features = nodes.encode(unet, x, t, context, None, controls, dict(given))
        actual = nodes.decode(unet, features, x, t, context, None, controls, dict(given))
        again = nodes.decode(unet, features, x, t, context, None, control(), dict(given))
    torch.testing.assert_close(actual, expected, atol=1e-6, rtol=0)
    torch.testing.assert_close(again, expected, atol=1e-6, rtol=0)
    assert (
        all(whole[place] == pytest.approx(values[0]) for place, values in seen.items()) and seen.keys() == whole.keys()
    )


def test_refusals(native_pipe, shapes, patch, sampler, ksample):
    with pytest.raises(ValueError, match="this model is a Flux"):
        patch(native_pipe("shapes-dit")[0])
    for text, words in (("fast", "50ls"), ("1, 2", "must hold 0"), ("0", "key_steps is 0")):
        with pytest.raises(ValueError, match=words):
            sampler(text)
    with pytest.raises(ValueError, match="9 steps"):
        ksample(patch(shapes[0], "0, 30"))
