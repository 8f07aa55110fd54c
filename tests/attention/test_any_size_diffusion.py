"""Any-Size-Diffusion: tiles, merging, what is exact and what is stale, seams, the two stages, buckets for training."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DiTTransformer2DModel,
    HeunDiscreteScheduler,
    PixArtTransformer2DModel,
    StableDiffusionPanoramaPipeline,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)

import diffusers_ext
from diffusers_ext import AnySizeDiffusionPipeline, AspectBuckets, BucketBatchSampler, SeamlessTilingConfig, zoo
from diffusers_ext._flux_tokens import pack, unpack
from diffusers_ext.attention._tiles import (
    MODES,
    Offsets,
    boxes,
    cut,
    gaussian_window,
    merge,
    origins,
    overlapping_tiles,
    seam_ratio,
    uncovered,
)
from diffusers_ext.attention.any_size_diffusion import moved_time_ids


SLUG = "any-size-diffusion"
ALPHAS = DDIMScheduler().alphas_cumprod.double()


class Local(torch.nn.Module):
    """Exact noise prediction for a Gaussian field whose covariance is a product of one per axis.

    It sees the given canvas only, as a network does: tiles are fields of their own. `length` 0 is white noise.
    """

    def __init__(self, length=0.0):
        super().__init__()
        self.length, self.calls = length, []
        self.config = SimpleNamespace(sample_size=16)

    def _axis(self, n):
        x = torch.arange(n, dtype=torch.float64)
        d = (x[:, None] - x[None, :]) / max(self.length, 1e-9)
        return torch.linalg.eigh((-(d**2) / 2).exp())

    def forward(self, sample, timestep, encoder_hidden_states=None, return_dict=True):
        self.calls.append(tuple(sample.shape))
        bar = ALPHAS[int(timestep)]
        (rows, u), (columns, v) = (self._axis(n) for n in sample.shape[-2:])
        spectrum = bar * rows[:, None] * columns[None, :] + 1 - bar
        eps = u @ ((u.T @ sample @ v) / spectrum) @ v.T
        return ((1 - bar).sqrt() * eps,)


def pipe_of(model, steps=20):
    pipe = SimpleNamespace(unet=model, scheduler=DDIMScheduler(clip_sample=False, set_alpha_to_one=False))
    pipe.scheduler.set_timesteps(steps)
    return pipe


def sample(pipe, size=(32, 32), n=1, seed=0, *args):
    x = torch.randn(n, 1, *size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    with torch.no_grad():
        for t in pipe.scheduler.timesteps:
            x = pipe.scheduler.step(pipe.unet(x, t, *args)[0], t, x).prev_sample
    return x


def build(**kwargs):
    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        cross_attention_dim=8,
        attention_head_dim=2,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        **kwargs,
    ).eval()


def run(pipe, size=(16, 16), batch=1, calls=None, predict=None, channels=4, **kwargs):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(batch, channels, *size, generator=generator)
    text = torch.randn(batch, 5, 8, generator=generator)
    predict = predict or (lambda x, t: pipe.unet(x, t, text, **kwargs).sample)
    with torch.no_grad():
        for t in pipe.scheduler.timesteps[:calls]:
            x = x.clone()
            x[:, :4] += 0.1 * predict(x, t)
    return x


# ---- tiles


def test_origins_are_moved_inside_and_never_twice():
    assert origins(32, 16, 0, False) == [0, 16]
    assert origins(32, 16, 5, False) == [5, 16]
    assert origins(32, 16, 5, True) == [0, 5, 16]
    assert origins(40, 16, 0, False) == [0, 16, 24]
    assert origins(32, 16, -16, False) == [0]  # the two tiles coincide
    assert origins(16, 16, 7, False) == [0]


def test_rows_are_rows():
    """Pictures that are not square: y runs over the height."""
    assert boxes((16, 48), (16, 16), (0, 0), False) == [(0, 0), (0, 16), (0, 32)]
    assert boxes((48, 16), (16, 16), (3, 9), False) == [(3, 0), (19, 0), (32, 0)]


def test_offsets():
    random = Offsets("random", 16, 8, 8, 4, seed=0)
    assert [random.at(step) for step in (0, 4, 8)] == [(0, 0)] * 3
    moving = Offsets("random", 16, 8, 8, 4, seed=0, covering=True)
    assert moving.at(0) == (0, 0) and moving.at(4) != (0, 0) and [moving.is_reset(i) for i in (3, 4)] == [False, True]
    never = Offsets("random", 16, 8, 8, None, seed=0)
    assert never.at(0) == (0, 0) and sum(never.at(step) == (0, 0) for step in range(1, 641)) < 25
    drawn = torch.tensor([random.at(step) for step in range(1000) if step % 4])
    assert drawn.min() == 0 and drawn.max() == 7 and len(drawn.unique(dim=0)) == 64
    positive = Offsets("positive", 16, 8, 8, 4, seed=0)
    assert [positive.at(i) for i in range(5)] == [(0, 0), (0, 8), (8, 0), (8, 8), (0, 0)]
    complete = Offsets("complete", 16, 8, 8, 4, seed=0)
    assert [complete.at(i) for i in (0, 1, 5, 16)] == [(-16, -16), (-16, -8), (-8, -8), (-16, -16)]


def test_window_is_the_published_gaussian():
    w = gaussian_window((64, 64), torch.float64)
    assert w.max() <= 1 and torch.equal(w, w.flip(0)) and torch.equal(w, w.T)
    assert w[0, 31] / w[31, 31] == pytest.approx(math.exp(-((31.5 / 64) ** 2 - (0.5 / 64) ** 2) / 0.02))


def test_merged_tiles_of_a_whole_are_the_whole():
    x = torch.randn(2, 3, 40, 24, dtype=torch.float64)
    for offset in ((0, 0), (5, 3), (-7, 6)):
        corners = boxes((40, 24), (16, 16), offset, True)
        window = gaussian_window((16, 16), torch.float64)
        merged = merge(lambda c: cut(x, c, (40, 24), (16, 16)), (40, 24), corners, window, 3)
        torch.testing.assert_close(merged, x, atol=1e-9, rtol=0)


def test_reference_is_used_only_where_no_tile_is():
    corners = boxes((32, 32), (16, 16), (5, 3), False)
    ones = lambda chunk: torch.ones(len(chunk), 1, 16, 16)  # noqa: E731
    merged = merge(ones, (32, 32), corners, gaussian_window((16, 16)), 4, reference=torch.full((1, 1, 32, 32), 7.0))
    strip = torch.zeros(32, 32, dtype=torch.bool)
    strip[:5], strip[:, :3] = True, True
    assert torch.equal(merged[0, 0] == 7, strip) and torch.allclose(merged[0, 0][~strip], torch.ones(()))
    assert uncovered((32, 32), (16, 16), corners) == strip.sum()
    half = merge(ones, (32, 32), corners, gaussian_window((16, 16)), 4, torch.full((1, 1, 32, 32), 7.0), ema=0.25)
    torch.testing.assert_close(half[0, 0][~strip], torch.full((), 2.5).expand(int((~strip).sum())))


def test_residuals_of_deeper_levels_are_cut_in_step():
    x = torch.arange(32.0).view(1, 1, 1, 32).expand(1, 1, 32, 32)
    deep = x[..., ::4, ::4]
    assert torch.equal(cut(deep, [(0, 8)], (32, 32), (16, 16))[0, 0, 0], torch.tensor([8.0, 12, 16, 20]))
    assert cut(deep, [(15, 16)], (32, 32), (16, 16)).shape == (1, 1, 4, 4)


def test_seam_ratio():
    """A step of 1 on every 8th border, 0.5 elsewhere."""
    x = torch.arange(32.0) * 0.5 + (torch.arange(32) // 8) * 0.5
    grid = (x[:, None] + x[None, :]).view(1, 1, 32, 32)
    assert seam_ratio(grid, 8) == pytest.approx(2)
    assert seam_ratio(grid, 5) < 1.1


# ---- analytic models


@pytest.mark.parametrize("mode", MODES)
def test_white_noise_is_exact_where_tiles_always_are(mode):
    """Each pixel knows only itself: tiling changes nothing but strips that wait for a tile."""
    pipe = pipe_of(Local())
    plain = sample(pipe, (48, 32))
    with diffusers_ext.apply(pipe, SeamlessTilingConfig(offset_mode=mode)) as handle:
        tiled = sample(pipe, (48, 32))
        stale = handle.summary()[SLUG]["pixels_from_the_step_before"]
    # positive and random grids start up to half a tile late; complete ones also up to a whole tile early
    sure = {"complete": (slice(8, 32), slice(8, 16)), "fixed": (slice(None), slice(None))}.get(
        mode, (slice(8, None),) * 2
    )
    torch.testing.assert_close(tiled[..., sure[0], sure[1]], plain[..., sure[0], sure[1]], atol=1e-5, rtol=0)
    assert (stale > 0) == (mode != "fixed")
    if mode != "fixed":
        assert not torch.allclose(tiled, plain, atol=1e-5)


@pytest.mark.parametrize("covering", [False, True])
def test_stale_strips_are_of_first_order(covering):
    """The error of the strip falls in proportion to the steps (factor > 1.6 for twice as many)."""

    def error(steps):
        pipe, total = pipe_of(Local(), steps), 0.0
        plain = sample(pipe)
        for seed in range(12):
            with diffusers_ext.apply(pipe, SeamlessTilingConfig(seed=seed, cover_on_reset=covering)):
                total += float((sample(pipe) - plain).square().mean())
        return math.sqrt(total / 12)

    errors = [error(steps) for steps in (20, 40, 80)]
    assert errors[0] > 1.6 * errors[1] > 1.6**2 * errors[2] > 0


def test_seams_of_plain_tiles_and_of_moved_ones():
    """A field with a correlation length of 2 pixels, tiles of 16: 64 samples."""

    def ratio(**config):
        pipe = pipe_of(Local(2.0), 40)
        with diffusers_ext.apply(pipe, SeamlessTilingConfig(tile_batch_size=16, **config)):
            return seam_ratio(sample(pipe, (64, 64), 64), 16)

    whole = seam_ratio(sample(pipe_of(Local(2.0), 40), (64, 64), 64), 16)
    assert whole == pytest.approx(1, abs=0.05)
    fixed, published, covering = ratio(offset_mode="fixed"), ratio(cover_on_reset=False), ratio()
    assert fixed > 1.2
    assert covering == pytest.approx(1, abs=0.05)
    # (0, 0) at every 4th step, as published, strengthens the same borders again
    assert covering < published < 1 + (fixed - 1) / 4


@pytest.mark.parametrize("steps, reference", [(4, True), (20, False)])
def test_full_coverage(steps, reference):
    """Few steps, or no reference: further tiles, nothing stale."""
    pipe = pipe_of(Local(), steps)
    plain = sample(pipe)
    with diffusers_ext.apply(pipe, SeamlessTilingConfig(noise_reference=reference)) as handle:
        torch.testing.assert_close(sample(pipe), plain, atol=1e-9, rtol=0)
        assert handle.summary()[SLUG]["pixels_from_the_step_before"] == 0


# ---- cost


def test_evaluations_per_step():
    """Rows times columns exactly; ordinary tiles with shared halves are at least twice as many from 3 x 3 on."""
    model = Local()
    pipe = pipe_of(model)
    with diffusers_ext.apply(pipe, SeamlessTilingConfig(tile_batch_size=100, cover_on_reset=False)) as handle:
        sample(pipe, (48, 64))
        figures = handle.summary()[SLUG]
    assert {shape[0] for shape in model.calls} == {12} and figures["tiles"] == 20 * 12
    assert figures["tiles_with_half_overlap"] == 20 * 5 * 7
    model.calls.clear()
    with diffusers_ext.apply(pipe, SeamlessTilingConfig(tile_batch_size=100)):
        sample(pipe, (48, 64))
    # at every 4th step but the first, one row and one column more
    assert [shape[0] for shape in model.calls] == [12] * 4 + [20, 12, 12, 12] * 4
    for n in (3, 4, 8):
        assert overlapping_tiles((16 * n, 16 * n), (16, 16)) == (2 * n - 1) ** 2 >= 2 * n**2


def test_fewer_evaluations_than_the_panorama_pipeline():
    """The views of diffusers' MultiDiffusion on the same field: no more seam, from less than half of the tiles."""
    views = StableDiffusionPanoramaPipeline.get_views(SimpleNamespace(), 1024, 1024, window_size=64, stride=32)
    assert len(views) == overlapping_tiles((128, 128), (64, 64)) == 9
    assert len(boxes((128, 128), (64, 64), (0, 0), False)) == 4
    views = StableDiffusionPanoramaPipeline.get_views(SimpleNamespace(), 512, 512, window_size=16, stride=8)
    corners, found = [(top, left) for top, _, left, _ in views], {}
    published = SeamlessTilingConfig(offset_mode="fixed", window="uniform", tile_batch_size=100)
    for name, config in (("theirs", published), ("ours", SeamlessTilingConfig(tile_batch_size=100))):
        pipe = pipe_of(Local(2.0), 40)
        with diffusers_ext.apply(pipe, config) as handle, pytest.MonkeyPatch.context() as patch:
            if name == "theirs":
                patch.setattr("diffusers_ext.attention.any_size_diffusion.boxes", lambda *args, **kwargs: corners)
            found[name] = abs(seam_ratio(sample(pipe, (64, 64), 64), 16) - 1), handle.summary()[SLUG]["tiles"]
    assert found["ours"][0] < 0.05 and found["ours"][0] < found["theirs"][0] + 0.02, found
    assert 2 * found["ours"][1] < found["theirs"][1] == 40 * 49, found


@pytest.mark.slow
def test_fewer_evaluations_than_the_panorama_pipeline_on_the_same_weights(shapes_unet, monkeypatch):
    """diffusers' MultiDiffusion with views of the trained size that share halves, from pure noise, and ours."""
    components = {n: shapes_unet.components[n] for n in ("vae", "text_encoder", "tokenizer", "unet")}
    panorama = StableDiffusionPanoramaPipeline(
        **components,
        scheduler=DDIMScheduler.from_config(shapes_unet.scheduler.config),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    panorama.set_progress_bar_config(disable=True)
    views = [(y, y + 16, x, x + 16) for y in (0, 8, 16) for x in (0, 8, 16)]
    monkeypatch.setattr(panorama, "get_views", lambda *args, **kwargs: views)
    captions, found, rows = zoo.held_out(8).captions, {}, []
    count = shapes_unet.unet.conv_in.register_forward_pre_hook(lambda module, args: rows.append(len(args[0])))
    for name in ("theirs", "ours"):
        rows.clear()
        arguments = {
            "num_inference_steps": 12,
            "guidance_scale": 3.0,
            "height": 128,
            "width": 128,
            "output_type": "pt",
        }
        arguments["generator"] = torch.Generator().manual_seed(0)
        if name == "theirs":
            images = torch.cat([panorama(caption, **arguments).images for caption in captions])
        else:
            with diffusers_ext.apply(shapes_unet, SeamlessTilingConfig()):
                images = torch.cat([shapes_unet(caption, **arguments).images for caption in captions])
        found[name] = sum(rows), seam_ratio(images, 64)
    count.remove()
    assert found["theirs"][0] == 8 * 12 * 2 * 9 and found["ours"][0] < 0.75 * found["theirs"][0], found
    assert abs(found["ours"][1] - 1) < abs(found["theirs"][1] - 1) + 0.1, found


# ---- real models


@pytest.mark.parametrize("mode", MODES)
def test_one_tile_is_exact(mode):
    pipe = pipe_of(build())
    plain = run(pipe, (8, 8))
    with diffusers_ext.apply(pipe, SeamlessTilingConfig(offset_mode=mode)):
        assert torch.equal(run(pipe, (8, 8)), plain)


def test_comes_off_without_a_trace():
    pipe = pipe_of(build(), 5)
    plain, state = run(pipe), set(vars(pipe.unet))
    with diffusers_ext.apply(pipe, SeamlessTilingConfig()):
        assert not torch.allclose(run(pipe), plain)
    assert torch.equal(run(pipe), plain) and set(vars(pipe.unet)) == state


def test_tiles_in_batches_equal_tiles_in_turn():
    results = []
    for size in (1, 3, 100):
        pipe = pipe_of(build(), 10)
        with diffusers_ext.apply(pipe, SeamlessTilingConfig(tile_batch_size=size)):
            results.append(run(pipe, (20, 28), batch=2))
    for other in results[1:]:
        torch.testing.assert_close(other, results[0], atol=1e-4, rtol=0)


SETTINGS = [{}, {"size": (24, 16)}, {"batch": 2}, {"size": (17, 9)}, {"size": (6, 20)}, {"size": (8, 8)}, {}]


def test_runs_of_different_layouts_in_a_row():
    def fresh(**setting):
        pipe = pipe_of(build(), 10)
        with diffusers_ext.apply(pipe, SeamlessTilingConfig()):
            return run(pipe, **setting)

    pipe = pipe_of(build(), 10)
    with diffusers_ext.apply(pipe, SeamlessTilingConfig()):
        for setting in SETTINGS:
            assert torch.equal(run(pipe, **setting), fresh(**setting)), setting


def test_an_interrupted_run_leaves_nothing_behind():
    pipe = pipe_of(build(), 10)
    with diffusers_ext.apply(pipe, SeamlessTilingConfig()):
        clean = run(pipe)
        run(pipe, calls=3)
        assert torch.equal(run(pipe), clean)

        def fail(*_):
            raise KeyboardInterrupt

        broken = pipe.unet.mid_block.register_forward_pre_hook(fail)
        with pytest.raises(KeyboardInterrupt):
            run(pipe)
        broken.remove()
        assert torch.equal(run(pipe), clean)


def test_guidance_in_turn_equals_guidance_in_one_batch():
    """Conditional and unconditional calls have a reference each."""
    text = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(3))
    first, second = text[:1].clone(), text[1:].clone()
    results = []
    for split in (True, False):
        pipe = pipe_of(build(), 10)

        def predict(x, t, unet=pipe.unet, split=split):
            if split:
                u, c = unet(x, t, first).sample, unet(x, t, second).sample
            else:
                u, c = unet(torch.cat([x, x]), t, text).sample.chunk(2)
            return u + 2 * (c - u)

        with diffusers_ext.apply(pipe, SeamlessTilingConfig()):
            results.append(run(pipe, predict=predict))
    torch.testing.assert_close(*results, atol=1e-4, rtol=1e-4)


def test_two_stage_steps():
    pipe = pipe_of(build())
    pipe.scheduler = HeunDiscreteScheduler()
    pipe.scheduler.set_timesteps(10)
    with diffusers_ext.apply(pipe, SeamlessTilingConfig()):
        first = run(pipe)
        assert torch.isfinite(first).all() and torch.equal(run(pipe), first)


def test_inpainting_channels_and_residuals_are_cut():
    """A canvas of four equal tiles with constant residuals: every quarter is as if it were alone."""
    unet = build(in_channels=9)
    pipe, levels = pipe_of(unet, 10), ((8, 16), (8, 16), (8, 8), (16, 8))
    residuals = {
        "down_block_additional_residuals": [torch.full((1, c, side, side), 0.3) for c, side in levels],
        "mid_block_additional_residual": torch.full((1, 16, 8, 8), 0.2),
    }
    with diffusers_ext.apply(pipe, SeamlessTilingConfig()):
        controlled = run(pipe, channels=9, **residuals)
        plain = run(pipe, channels=9)

    assert torch.isfinite(controlled).all() and not torch.allclose(controlled, plain)
    small = build(in_channels=9)
    with torch.no_grad():
        x, text = torch.randn(1, 9, 8, 8), torch.randn(1, 5, 8)
        eight = [d[..., : d.shape[-2] // 2, : d.shape[-1] // 2] for d in residuals["down_block_additional_residuals"]]
        middle = residuals["mid_block_additional_residual"][..., :4, :4]
        expected = small(
            x, 500, text, down_block_additional_residuals=eight, mid_block_additional_residual=middle
        ).sample
        with diffusers_ext.apply(pipe_of(unet, 10), SeamlessTilingConfig()):
            doubled = unet(x.repeat(1, 1, 2, 2), 500, text, **residuals).sample
    torch.testing.assert_close(doubled[..., :8, :8], expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(doubled[..., 8:, 8:], expected, atol=1e-5, rtol=0)


def test_sdxl_coordinates():
    ids = torch.tensor([[512.0, 512, 0, 0, 512, 512]] * 4)
    moved = moved_time_ids(ids, [(0, 8), (16, 0)], 8)
    assert moved[:, 2:4].tolist() == [[0, 64], [0, 64], [128, 0], [128, 0]]
    assert torch.equal(moved[:, [0, 1, 4, 5]], ids[:, [0, 1, 4, 5]])


def test_coordinates_reach_the_model():
    unet = build(
        addition_embed_type="text_time",
        addition_time_embed_dim=4,
        projection_class_embeddings_input_dim=32,
    )
    pipe = pipe_of(unet, 8)
    added = {"text_embeds": torch.zeros(1, 8), "time_ids": torch.zeros(1, 6)}
    results = []
    for told in (True, False):
        with diffusers_ext.apply(pipe, SeamlessTilingConfig(tile_coordinates=told)):
            results.append(run(pipe, added_cond_kwargs=added))
    assert not torch.allclose(*results) and torch.equal(added["time_ids"], torch.zeros(1, 6))


def test_transformers_at_their_trained_size():
    torch.manual_seed(0)
    small = {"num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 8, "sample_size": 8, "patch_size": 2}
    small |= {"in_channels": 4, "out_channels": 4, "norm_num_groups": 4}
    dit = DiTTransformer2DModel(**small, num_embeds_ada_norm=10).eval()
    pixart = PixArtTransformer2DModel(
        **small, cross_attention_dim=16, caption_channels=6, use_additional_conditions=False
    )
    x, t = torch.randn(1, 4, 16, 8), torch.tensor([500])
    for model, kwargs in (
        (dit, {"class_labels": torch.tensor([1])}),
        (pixart.eval(), {"encoder_hidden_states": torch.randn(1, 7, 6)}),
    ):
        pipe = SimpleNamespace(transformer=model, scheduler=DDIMScheduler())
        with torch.no_grad():
            parts = [model(part, timestep=t, **kwargs).sample for part in x.chunk(2, -2)]
            with diffusers_ext.apply(pipe, SeamlessTilingConfig(tile_batch_size=1)):
                whole = model(x, timestep=t, **kwargs).sample
        torch.testing.assert_close(whole, torch.cat(parts, -2), atol=1e-5, rtol=0)
        with pytest.raises(ValueError, match="absolute positions"):
            diffusers_ext.apply(pipe, SeamlessTilingConfig(tile_size=4))


def test_flux_with_control():
    """Tiles side by side give what separate pictures give, residuals of a ControlNet cut along."""
    pipe = zoo.load("shapes-dit")
    model = pipe.transformer
    x, residual = torch.randn(1, 4, 24, 8), torch.randn(1, model.inner_dim, 12, 4)
    text = {
        "encoder_hidden_states": torch.randn(1, 5, model.config.joint_attention_dim),
        "pooled_projections": torch.randn(1, model.config.pooled_projection_dim),
        "txt_ids": torch.zeros(5, 3),
        "timestep": torch.tensor([0.5]),
    }

    def call(latents, control):
        rows, columns = (torch.arange(side / 2) for side in latents.shape[-2:])
        control = [control.flatten(2).mT]
        residuals = {"controlnet_block_samples": control, "controlnet_single_block_samples": control}
        places = torch.cartesian_prod(torch.zeros(1), rows, columns)
        return unpack(model(pack(latents), img_ids=places, **text, **residuals).sample, *latents.shape[-2:])

    with torch.no_grad():
        alone = [call(*pair) for pair in zip(x.split(8, -2), residual.split(4, -2))]
        with diffusers_ext.apply(pipe, SeamlessTilingConfig(tile_size=8)) as handle:
            whole = call(x, residual)
            assert handle.summary()[SLUG]["tiles"] == 3
    torch.testing.assert_close(whole, torch.cat(alone, -2), atol=1e-5, rtol=0)


def test_reference_pictures_of_flux_are_refused():
    pipe = zoo.load("shapes-dit")
    ids = torch.cartesian_prod(torch.arange(2.0), torch.arange(4.0), torch.arange(4.0))
    with (
        diffusers_ext.apply(pipe, SeamlessTilingConfig(tile_size=4)),
        pytest.raises(ValueError, match="32 tokens are not 4 x 4"),
    ):
        pipe.transformer(torch.randn(1, 32, 16), timestep=torch.tensor([0.5]), img_ids=ids)


@pytest.mark.parametrize("order", ["apply first", "compile first"])
def test_compiles(order):
    pipe = pipe_of(build(), 2)
    with diffusers_ext.apply(pipe, SeamlessTilingConfig()):
        eager = run(pipe)
    torch._dynamo.reset()
    if order == "compile first":
        pipe.unet.compile(backend="eager")
    with diffusers_ext.apply(pipe, SeamlessTilingConfig()):
        if order == "apply first":
            pipe.unet.compile(backend="eager")
        torch.testing.assert_close(run(pipe), eager, atol=1e-5, rtol=0)


# ---- bad input


@pytest.mark.parametrize(
    "values",
    [
        {"offset_mode": "spiral"},
        {"window": "hann"},
        {"tile_size": 0},
        {"offset_stride": 0},
        {"overlap": 0},
        {"random_reset_step": 0},
        {"tile_batch_size": 0},
        {"noise_ema": 1.0},
    ],
)
def test_bad_values(values):
    with pytest.raises(ValueError, match="accepted|Known"):
        SeamlessTilingConfig(**values)


def test_bad_models_and_sizes():
    pipe = pipe_of(build())
    for side in (1, 7):
        with pytest.raises(ValueError, match="multiples of 2, and nothing below 2"):
            diffusers_ext.apply(pipe, SeamlessTilingConfig(tile_size=side))
    with pytest.raises(ValueError, match="larger than a tile"):
        diffusers_ext.apply(pipe, SeamlessTilingConfig(overlap=9))
    flux = zoo.load("shapes-dit")
    with pytest.raises(ValueError, match="FluxTransformer2DModel does not say.*tile_size"):
        diffusers_ext.apply(flux, SeamlessTilingConfig())
    with pytest.raises(ValueError, match="multiples of 2"):
        diffusers_ext.apply(flux, SeamlessTilingConfig(tile_size=15))
    with pytest.raises(ValueError, match="Linear"):
        diffusers_ext.apply(torch.nn.Linear(2, 2), SeamlessTilingConfig())
    with (
        diffusers_ext.apply(pipe, SeamlessTilingConfig(allow_small=False)),
        pytest.raises(ValueError, match="smaller"),
    ):
        run(pipe, (6, 16))
    assert diffusers_ext.check(pipe, SeamlessTilingConfig(), num_inference_steps=4).warnings
    config = SeamlessTilingConfig(tile_size=8, noise_ema=0.2)
    assert diffusers_ext.MethodConfig.from_dict(config.to_dict()) == config


# ---- both stages


def test_pipeline_of_both_stages(tmp_path):
    pipe = AnySizeDiffusionPipeline.from_pipe(zoo.load("shapes-unet"))
    pipe.set_progress_bar_config(disable=True)
    arguments = {"height": 96, "width": 128, "num_inference_steps": 8, "guidance_scale": 3.0, "output_type": "pt"}
    arguments["buckets"] = AspectBuckets(area=64 * 64, multiple=8)

    def draw(pipe):
        return pipe("a red circle", generator=torch.Generator().manual_seed(0), **arguments).images

    first = draw(pipe)
    assert first.shape == (1, 3, 96, 128) and not pipe.vae.use_tiling and "forward" not in vars(pipe.unet)
    pipe.save_pretrained(tmp_path)
    again = AnySizeDiffusionPipeline.from_pretrained(tmp_path)
    again.set_progress_bar_config(disable=True)
    assert torch.equal(draw(again), first)
    assert not torch.equal(
        pipe(
            "a red circle", generator=torch.Generator().manual_seed(0), enlarging_guidance_scale=1.0, **arguments
        ).images,
        first,
    )
    with pytest.raises(ValueError, match="strength"):
        pipe("a red circle", strength=0.01, **arguments)


@pytest.mark.slow
def test_second_stage_keeps_the_object():
    """Pictures of twice the size, read by the judge at the trained one; plain tiles leave seams, moved ones do not."""
    pipe = AnySizeDiffusionPipeline.from_pipe(zoo.load("shapes-unet"))
    pipe.set_progress_bar_config(disable=True)
    scenes, judge = zoo.held_out(6), zoo.load_judge()
    arguments = {"height": 128, "width": 128, "num_inference_steps": 60, "strength": 0.15, "guidance_scale": 3.0}
    arguments |= {
        "enlarging_guidance_scale": 1.0,
        "buckets": AspectBuckets(area=64 * 64, multiple=8),
        "output_type": "pt",
    }

    def draw(**config):
        generator = torch.Generator().manual_seed(0)
        tiling = SeamlessTilingConfig(**config)
        return pipe(list(scenes.captions), generator=generator, tiling=tiling, **arguments).images

    moved, fixed = draw(), draw(offset_mode="fixed")
    small = torch.nn.functional.interpolate(moved * 2 - 1, (64, 64), mode="area")
    assert judge.accuracy(small, scenes.specs)["shape1"] >= 4 / 6
    # below 1 where few scenes have an edge in their middle
    assert seam_ratio(moved, 64) < 1.05 and seam_ratio(fixed, 64) > seam_ratio(moved, 64) + 0.1


# ---- buckets


def test_buckets_have_nearly_equal_areas():
    buckets = AspectBuckets()
    assert buckets.sizes[0] == (512, 512)
    for height, width in buckets.sizes:
        assert abs(height * width / buckets.area - 1) < 0.07 and height % 64 == width % 64 == 0
    assert buckets.nearest(300, 310) == (512, 512)
    assert buckets.nearest(1920, 1080) == (704, 384)
    fine = AspectBuckets(area=64 * 64, multiple=8)
    for height, width in [(64, 64), (100, 50), (30, 70), (9, 16)]:
        chosen = fine.nearest(height, width)
        distance = {s: abs(math.log(s[0] / s[1]) - math.log(height / width)) for s in fine.sizes}
        assert distance[chosen] == min(distance.values())


@pytest.mark.parametrize("shape", [(3, 100, 70), (3, 40, 90), (3, 17, 16), (3, 64, 64)])
def test_pictures_fit_their_canvas(shape):
    buckets = AspectBuckets(area=64 * 64, multiple=8)
    x = torch.rand(shape)
    fitted = buckets.fit(x)
    assert tuple(fitted.shape[1:]) == buckets.nearest(*shape[1:])
    assert fitted.min() >= x.min() and fitted.max() <= x.max()
    generators = [torch.Generator().manual_seed(i) for i in range(8)]
    crops = [buckets.fit(x, g) for g in generators]
    assert all(c.shape == fitted.shape for c in crops)
    wide = AspectBuckets(area=64 * 64, multiple=8, ratios=(1.0,))
    gradient = torch.linspace(0, 1, 256).expand(3, 64, 256)
    middle = wide.fit(gradient)
    assert middle.mean() == pytest.approx(0.5, abs=0.01)
    assert len({round(float(wide.fit(gradient, g).mean()), 3) for g in generators}) > 1


def test_batches_hold_one_canvas_and_every_picture_once():
    generator = torch.Generator().manual_seed(0)
    sizes = torch.randint(50, 200, (101, 2), generator=generator).tolist()
    buckets = AspectBuckets(area=64 * 64, multiple=8)
    sampler = BucketBatchSampler(sizes, buckets, batch_size=4)
    batches = list(sampler)
    assert sorted(i for batch in batches for i in batch) == list(range(101))
    assert all(len({buckets.nearest(*sizes[i]) for i in batch}) == 1 for batch in batches)
    assert len(sampler) == len(batches) and list(sampler) == batches
    sampler.set_epoch(1)
    assert list(sampler) != batches
    whole = BucketBatchSampler(sizes, buckets, batch_size=4, drop_last=True)
    assert {len(batch) for batch in whole} == {4} and len(list(whole)) == len(whole)


def test_bad_buckets():
    with pytest.raises(ValueError, match="ratios"):
        AspectBuckets(ratios=())
    with pytest.raises(ValueError, match="no canvas"):
        AspectBuckets(area=1000)
    with pytest.raises(ValueError, match="batch_size"):
        BucketBatchSampler([(1, 1)], AspectBuckets(), 0)


def test_a_lora_trains_on_buckets_and_reloads(tmp_path):
    """Two canvases, a few steps of the ordinary loss: it falls on a fixed batch, and the file loads as any LoRA."""
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict

    pipe, buckets = zoo.load("shapes-unet"), AspectBuckets(area=64 * 64, multiple=8, ratios=(1.0, 1 / 2))
    images = [torch.rand(3, 70, 140), torch.rand(3, 80, 80), torch.rand(3, 60, 130)]
    unet = pipe.unet.requires_grad_(False)
    unet.add_adapter(LoraConfig(r=4, lora_alpha=4, target_modules=["to_q", "to_v"]))
    optimizer = torch.optim.Adam([p for p in unet.parameters() if p.requires_grad], lr=1e-2)
    ids = pipe.tokenizer(["a red circle"] * 2, padding="max_length", return_tensors="pt").input_ids
    text, shapes = pipe.text_encoder(ids)[0].detach(), set()

    def loss(batch):
        generator = torch.Generator().manual_seed(1)
        pixels = torch.stack([buckets.fit(images[i]) for i in batch]) * 2 - 1
        shapes.add(tuple(pixels.shape[-2:]))
        z = pipe.vae.encode(pixels).latent_dist.mean.detach() * pipe.vae.config.scaling_factor
        eps = torch.randn(z.shape, generator=generator)
        t = torch.full((len(z),), 400)
        x = pipe.scheduler.add_noise(z, eps, t)
        return (unet(x, t, text[: len(z)]).sample - pipe.scheduler.get_velocity(z, eps, t)).square().mean()

    before = float(loss([0, 2]).detach())
    for epoch in range(4):
        sampler = BucketBatchSampler([i.shape[-2:] for i in images], buckets, 2)
        sampler.set_epoch(epoch)
        for batch in sampler:
            optimizer.zero_grad()
            loss(batch).backward()
            optimizer.step()
    assert float(loss([0, 2]).detach()) < before and len(shapes) == 2
    StableDiffusionPipeline.save_lora_weights(tmp_path, unet_lora_layers=get_peft_model_state_dict(unet))
    fresh = zoo.load("shapes-unet")
    fresh.load_lora_weights(tmp_path)
    x, t = torch.randn(1, 4, 16, 16), torch.tensor(400)
    with torch.no_grad():
        torch.testing.assert_close(fresh.unet(x, t, text[:1]).sample, unet(x, t, text[:1]).sample, atol=1e-5, rtol=0)
