"""Delta-DiT as a native MODEL patch: same decisions and outputs as the diffusers side, nothing of ComfyUI lost."""

from __future__ import annotations

import pytest
import torch

import diffusers_ext
from diffusers_ext import DeltaDiTConfig, zoo


pytestmark = pytest.mark.comfy
CAPTION = "a small red circle left of a large green square, striped blue background"
STEPS = 8


@pytest.fixture(scope="module")
def shapes(native_pipe, encode):
    model, clip, _ = native_pipe("shapes-dit")
    return model, encode(clip, CAPTION), encode(clip, "")


@pytest.fixture
def patch(dx_nodes):
    def node(model, interval=2, cached_blocks=0, boundary_percent=0.5, **options):
        return dx_nodes["DXDeltaDiTCache"].execute(model, interval, cached_blocks, boundary_percent, **options).args[0]

    return node


@pytest.fixture
def ksample(comfy, shapes):
    """The core KSampler node on the shapes model; returns latents."""
    _, positive, negative = shapes

    def run(model, steps=STEPS, sampler="euler", batch=1, size=16, denoise=1.0, positive=positive, negative=negative):
        latent = {"samples": torch.zeros(batch, model.model.latent_format.latent_channels, size, size)}
        return comfy.nodes.common_ksampler(
            model, 0, steps, 3.0, sampler, "simple", positive, negative, latent, denoise=denoise
        )[0]["samples"]

    return run


@pytest.mark.parametrize(
    "interval, blocks, boundary, order, start, full",
    [(2, 0, 0.5, 0, 1, 4), (3, 10, 0.4, 0, 1, 3), (2, 0, 0.5, 1, 1, 4), (3, 11, 0.5, 1, 3, 4)],
)
def test_parity_with_diffusers(shapes, patch, ksample, recorded, interval, blocks, boundary, order, start, full):
    """Spans here cross from double to single blocks."""
    outer, log = recorded(shapes[0])
    options = {"forecast_order": order, "start_step": start}
    ksample(patch(outer, interval, blocks, boundary, **options))
    pipe = zoo.load("shapes-dit")
    context, y = log[0][2:4]
    ids = pipe._prepare_latent_image_ids(1, 8, 8, torch.device("cpu"), torch.float32)
    words = torch.zeros(context.shape[1], 3)
    config = DeltaDiTConfig(interval, blocks or None, boundary, num_inference_steps=STEPS, **options)
    with torch.no_grad(), diffusers_ext.apply(pipe.transformer, config) as handle:
        for x, t, seen, *_, out in log:
            assert torch.equal(seen, context)
            tokens = pipe.transformer(
                pipe._pack_latents(x, len(x), 4, 16, 16), context, y, t, ids, words, return_dict=False
            )[0]
            torch.testing.assert_close(tokens, pipe._pack_latents(out, len(x), 4, 16, 16), atol=1e-4, rtol=0)
        figures = handle.summary()["delta-dit"]
    assert (figures["computed"], figures["reused"]) == (full, STEPS - full)


@pytest.fixture
def executed():
    """Block runs of a MODEL while a function runs, by block."""

    def count(model, function):
        transformer = model.model.diffusion_model
        lists = [getattr(transformer, n, []) for n in ("double_blocks", "joint_blocks", "single_blocks")]
        blocks = [block for blocks in lists for block in blocks]
        counts = [0] * len(blocks)

        def counter(index):
            def hook(*_):
                counts[index] += 1

            return hook

        handles = [block.register_forward_pre_hook(counter(i)) for i, block in enumerate(blocks)]
        function()
        for handle in handles:
            handle.remove()
        return counts

    return count


def test_what_runs(shapes, patch, ksample, executed):
    """Rear blocks are left out before the boundary, front blocks after it."""
    model = shapes[0]
    counts = executed(model, lambda: ksample(patch(model, 2, 4, 0.5)))
    assert counts == [6] * 4 + [8] * 4 + [6] * 4
    assert executed(model, lambda: ksample(patch(model, 4, 4, 1.0))) == [8] * 8 + [2] * 4
    assert executed(model, lambda: ksample(patch(model, 1))) == [8] * 12
    assert executed(model, lambda: ksample(patch(model, 2, 4, 1.0, start_step=4))) == [8] * 8 + [6] * 4
    assert executed(model, lambda: ksample(patch(model, 2, start_step=STEPS))) == [8] * 12


def test_interval_one_is_exact_and_the_given_model_is_untouched(shapes, patch, ksample):
    model = shapes[0]
    plain = ksample(model)
    assert torch.equal(ksample(patch(model, 1)), plain)
    cached = ksample(patch(model))
    assert not torch.equal(cached, plain) and torch.isfinite(cached).all()
    assert torch.equal(ksample(model), plain)


@pytest.mark.parametrize("sampler", ["heun", "dpmpp_2m"])
def test_samplers(shapes, patch, ksample, executed, sampler):
    patched = patch(shapes[0], 2, 10)
    counts = executed(patched, lambda: ksample(patched, sampler=sampler))
    assert 0.4 < sum(counts) / (12 * max(counts)) < 0.8


def test_runs_do_not_see_each_other(shapes, patch, ksample, recorded):
    patched = patch(shapes[0], 4)
    clean = ksample(patched)
    ksample(patched, batch=2, size=20)
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
    torch.testing.assert_close(ksample(patched), together, atol=1e-4, rtol=0)


def test_patching_twice_replaces(shapes, patch, ksample):
    model = shapes[0]
    assert torch.equal(ksample(patch(patch(model, 4, 3), 2, 6)), ksample(patch(model, 2, 6)))


def test_block_patches_of_other_nodes_stay_inside(shapes, patch, ksample):
    """A node that leaves out block 1, as skip-layer guidance does."""
    model = shapes[0].clone()
    model.set_model_patch_replace(lambda args, extra: args, "dit", "double_block", 1)
    plain = ksample(model)
    assert torch.equal(ksample(patch(model, 1)), plain) and not torch.equal(plain, ksample(shapes[0]))


def test_control_counts_once(shapes, patch):
    """With an input that does not move, a pass that leaves a span out equals the whole pass, residuals included."""
    caching = pytest.importorskip("comfy_nodes.caching_delta_dit")
    from diffusers_ext.caching.delta_dit import Store

    transformer = shapes[0].model.diffusion_model
    torch.manual_seed(0)
    x, context, y = torch.randn(1, 4, 16, 16), torch.randn(1, 20, 128), torch.randn(1, 128)
    places = caching.block_places(shapes[0])
    plan = DeltaDiTConfig(2, 9, boundary_step=1).plan(len(places), None)

    def control():
        generator = torch.Generator().manual_seed(1)
        return {k: [torch.randn(1, 64, 128, generator=generator) for _ in range(8)] for k in ("input", "output")}

    def run(call):
        options = caching.DeltaDiT(None, None, places)._patched({}, call) if call else {}
        return transformer(x, torch.tensor([0.5]), context, y, control=control(), transformer_options=options)

    with torch.no_grad():
        store, plain = Store(), run(None)
        full = plan.call(store, 0, 0)
        assert torch.equal(run(full), plain)
        plan.keep(store, full)
        late, rear = plan.call(store, 1, 1), DeltaDiTConfig(2, 9, span_order="rear").plan(12, None)
        assert late.reused == "front"
        torch.testing.assert_close(run(late), plain, atol=1e-4, rtol=1e-4)
        store = Store()
        full = rear.call(store, 0, 0)
        run(full)
        rear.keep(store, full)
        torch.testing.assert_close(run(rear.call(store, 1, 1)), plain, atol=1e-4, rtol=1e-4)


def test_stable_diffusion_3(tiny_pipe, patch, executed, comfy):
    """Joint blocks, the last of which drops the text."""
    model = tiny_pipe("sd3")[0]
    blocks = len(model.model.diffusion_model.joint_blocks)
    width = model.model.diffusion_model.context_embedder.in_features
    pooled = model.model.diffusion_model.y_embedder.mlp[0].in_features
    cond = [[torch.randn(1, 7, width), {"pooled_output": torch.randn(1, pooled)}]]
    latent = {"samples": torch.zeros(1, 16, 8, 8)}

    def run(m):
        return comfy.nodes.common_ksampler(m, 0, 4, 2.0, "euler", "simple", cond, cond, latent)[0]["samples"]

    plain = run(model)
    assert torch.equal(run(patch(model, 1)), plain)
    cached = patch(model, 2, blocks - 1, 0.5)
    counts = executed(model, lambda: run(cached))
    assert counts == [3] * 1 + [2] * (blocks - 2) + [3] * 1
    assert torch.isfinite(run(cached)).all() and not torch.equal(run(cached), plain)


def test_refusals(native_pipe, shapes, patch):
    with pytest.raises(ValueError, match="num_cached_blocks is 12.*accepted: 1 to 11"):
        patch(shapes[0], 2, 12)
    with pytest.raises(ValueError, match="this model is a UNetModel"):
        patch(native_pipe("shapes-unet")[0])
