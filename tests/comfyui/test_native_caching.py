"""DeepCache as a native MODEL patch: same decisions and outputs as the diffusers side, nothing of ComfyUI lost."""

from __future__ import annotations

import uuid

import pytest
import torch

import diffusers_ext
from diffusers_ext import DeepCacheConfig, zoo
from diffusers_ext.caching._forecast import History


pytestmark = pytest.mark.comfy
CAPTION = "a small red circle left of a large green square, striped blue background"


@pytest.fixture(scope="module")
def shapes(native_pipe, encode):
    model, clip, _ = native_pipe("shapes-unet")
    return model, encode(clip, CAPTION), encode(clip, "")


@pytest.fixture
def patch(dx_nodes):
    def node(model, interval=3, block_id=0, start_percent=0.0, end_percent=1.0, **options):
        execute = dx_nodes["DXDeepCache"].execute
        return execute(model, interval, block_id, start_percent, end_percent, **options).args[0]

    return node


@pytest.fixture
def ksample(comfy, shapes):
    """The core KSampler node on the shapes model; returns latents."""
    _, positive, negative = shapes

    def run(model, steps=9, sampler="euler", seed=0, batch=2, size=16, denoise=1.0):
        latent = {"samples": torch.zeros(batch, 4, size, size)}
        return comfy.nodes.common_ksampler(
            model, seed, steps, 3.0, sampler, "normal", positive, negative, latent, denoise=denoise
        )[0]["samples"]

    return run


@pytest.mark.parametrize(
    "interval, block_id, order", [(2, 0, 0), (3, 1, 0), (3, 4, 0), (5, 2, 0), (3, 5, 0), (2, 0, 1), (3, 4, 2)]
)
def test_parity_with_diffusers(shapes, patch, ksample, recorded, interval, block_id, order):
    outer, log = recorded(shapes[0])
    ksample(patch(outer, interval, block_id, forecast_order=order))
    unet = zoo.load("shapes-unet").unet
    context = log[0][2]
    config = DeepCacheConfig(cache_interval=interval, cache_branch_id=block_id, forecast_order=order)
    with torch.no_grad(), diffusers_ext.apply(unet, config) as handle:
        for x, t, seen, out in log:
            assert torch.equal(seen, context)
            torch.testing.assert_close(unet(x, t, context).sample, out, atol=1e-4, rtol=0)
        figures = handle.summary()["deepcache"]
    assert figures["computed"] == -(-9 // interval) and figures["reused"] == 9 - figures["computed"]


@pytest.fixture
def executed(shapes):
    """Runs of the middle block and of the output convolution while a function runs."""
    unet = shapes[0].model.diffusion_model

    def count(function):
        counts = [0, 0]

        def counter(index):
            def hook(*_):
                counts[index] += 1

            return hook

        modules = (unet.middle_block[0].in_layers[0], unet.out)
        handles = [m.register_forward_pre_hook(counter(i)) for i, m in enumerate(modules)]
        function()
        for handle in handles:
            handle.remove()
        return counts

    return count


def test_what_runs(shapes, patch, ksample, executed):
    model = shapes[0]
    assert executed(lambda: ksample(model, steps=10)) == [10, 10]
    assert executed(lambda: ksample(patch(model, 5), steps=10)) == [2, 10]
    assert executed(lambda: ksample(patch(model, 1), steps=10)) == [10, 10]


def test_only_the_chosen_part_of_the_run_reuses(shapes, patch, ksample, executed):
    model = shapes[0]
    early = executed(lambda: ksample(patch(model, 10, end_percent=0.5), steps=10))[0]
    late = executed(lambda: ksample(patch(model, 10, start_percent=0.5), steps=10))[0]
    assert 1 < early < 10 and 1 < late < 10 and early + late == 12


def test_interval_one_is_exact_and_the_given_model_is_untouched(shapes, patch, ksample):
    model = shapes[0]
    plain = ksample(model)
    assert torch.equal(ksample(patch(model, 1)), plain)
    cached = ksample(patch(model, 3))
    assert not torch.equal(cached, plain) and torch.isfinite(cached).all()
    assert torch.equal(ksample(model), plain)


@pytest.mark.parametrize("sampler", ["heun", "dpmpp_2m", "dpmpp_2s_ancestral", "uni_pc", "ddim"])
def test_samplers(shapes, patch, ksample, executed, sampler):
    patched = patch(shapes[0], 3)
    full, all_calls = executed(lambda: ksample(patched, sampler=sampler))
    assert full < 0.7 * all_calls
    assert torch.equal(ksample(patched, sampler=sampler), ksample(patched, sampler=sampler))


def test_runs_do_not_see_each_other(shapes, patch, ksample, recorded):
    patched = patch(shapes[0], 4)
    clean = ksample(patched)
    ksample(patched, batch=1, size=24)
    ksample(patched, denoise=0.5)
    assert torch.equal(ksample(patched), clean)
    outer, log = recorded(shapes[0])

    def fail_after_two(args):
        if len(log) == 2:
            raise KeyboardInterrupt
        return args["denoised"]

    broken = patch(outer, 4)
    broken.set_model_sampler_post_cfg_function(fail_after_two)
    with pytest.raises(KeyboardInterrupt):
        ksample(broken)
    assert torch.equal(ksample(patched), clean)


def test_conditions_in_turn_equal_conditions_in_one_batch(shapes, patch, ksample, monkeypatch):
    patched = patch(shapes[0], 3)
    together = ksample(patched)
    monkeypatch.setattr(shapes[0].model, "memory_required", lambda *_, **__: 1e30)
    apart = ksample(patched)
    torch.testing.assert_close(apart, together, atol=1e-4, rtol=0)


def test_patching_twice_replaces(shapes, patch, ksample):
    model = shapes[0]
    assert torch.equal(ksample(patch(patch(model, 7, 3), 3, 1)), ksample(patch(model, 3, 1)))


@pytest.mark.parametrize("block_id", range(6))
def test_shallow_pass_with_a_fresh_feature_is_the_whole_pass(shapes, patch, comfy, block_id):
    """With everything that may be attached: control, patches that write in place, patches that read block numbers."""
    caching = pytest.importorskip("comfy_nodes.caching")
    kind = comfy.patcher_extension.WrappersMP.DIFFUSION_MODEL
    unet = shapes[0].model.diffusion_model
    torch.manual_seed(0)
    x, context = torch.randn(2, 4, 16, 16), torch.randn(2, 20, 128)
    skips = []
    seen: dict[tuple, list] = {}

    def note(h, options):
        skips.append(h)
        return h

    def in_place(h, skip, options):
        h[:, :8] *= 1.3
        return h, skip * 0.9

    def attention(q, k, v, extra):
        seen.setdefault((*extra["block"], extra["transformer_index"]), []).append(q.mean().item())
        return q * 1.1, k, v

    def options(**patches):
        return {"patches": patches, "sigmas": torch.tensor([1.0]), "uuids": [uuid.uuid4()]}

    unet(x, torch.tensor([500.0] * 2), context, transformer_options=options(input_block_patch=[note]))

    def control():
        generator = torch.Generator().manual_seed(1)
        noise = [torch.randn(s.shape, generator=generator) * 0.1 for s in skips]
        return {"output": noise, "middle": [noise[-1].clone()], "input": [n * 0.5 for n in reversed(noise)]}

    store = caching._Store(History())
    cache = caching.DeepCache(DeepCacheConfig(2), block_id, 0.0, 1.0)
    arguments = (x, torch.tensor([500.0] * 2), context, None)
    given = options(output_block_patch=[in_place], attn1_patch=[attention], input_block_patch=[lambda h, o: h * 1.01])

    def whole(executor, *args, **kwargs):
        rest = list(args)
        rest[5] = cache._recording(rest[5], store, 0, executor.class_obj)
        return executor(*rest, **kwargs)

    with torch.no_grad():
        wrapped = {**given, "wrappers": {kind: {"test": [whole]}}}
        expected = unet(*arguments, control(), wrapped)
        whole_run = {place: values[-1] for place, values in seen.items()}
        seen.clear()
        feature, start = store.features.newest.clone(), store.transformer_index
        actual = caching.shallow_forward(unet, block_id, feature, start, *arguments, control(), dict(given))
    torch.testing.assert_close(actual, expected, atol=1e-6, rtol=0)
    assert seen.items() and all(whole_run[place] == pytest.approx(values[0]) for place, values in seen.items())
    assert len(seen) < len(whole_run) or block_id == 5


def test_refusals(native_pipe, shapes, patch):
    with pytest.raises(ValueError, match="block_id is 6.*the last is 5"):
        patch(shapes[0], 3, block_id=6)
    with pytest.raises(ValueError, match="this model is a Flux"):
        patch(native_pipe("shapes-dit")[0])
