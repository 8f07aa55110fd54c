"""HiDiffusion: windows, coarse downsampler, sizes of every level, the paper's values, pictures of twice the size."""

from __future__ import annotations

import itertools
import math
import time
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from diffusers import (
    ControlNetModel,
    DDIMScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    UNet2DConditionModel,
)

import diffusers_ext
from diffusers_ext import AttentionEntropyScalingConfig, HiDiffusionConfig, zoo
from diffusers_ext.attention._hidiffusion_plan import (
    Active,
    Placement,
    Plan,
    coarse,
    draw_quarters,
    from_windows,
    to_windows,
    token_grid,
    window_of,
    window_shift,
)
from diffusers_ext.attention.attention_entropy_scaling import Layout
from diffusers_ext.attention.hidiffusion import placement_of, windowed_layers
from diffusers_ext.eval import count_macs, paired_ratio


SLUG = "hidiffusion"
SD, XL = Placement(4, 0, 0, 1), Placement(3, 1, 1, 1)


def build(layout="sd", sample_size=8, layers=2, **kwargs):
    """A tiny UNet of the level layout of Stable Diffusion 1 or XL."""
    torch.manual_seed(0)
    cross_down, cross_up = "CrossAttnDownBlock2D", "CrossAttnUpBlock2D"
    types = {
        "sd": ((cross_down, cross_down, "DownBlock2D"), ("UpBlock2D", cross_up, cross_up)),
        "xl": (("DownBlock2D", cross_down, cross_down), (cross_up, cross_up, "UpBlock2D")),
    }[layout]
    return UNet2DConditionModel(
        sample_size=sample_size,
        block_out_channels=(8, 16, 16),
        layers_per_block=layers,
        norm_num_groups=4,
        cross_attention_dim=8,
        attention_head_dim=2,
        down_block_types=types[0],
        up_block_types=types[1],
        **kwargs,
    ).eval()


def pipe_of(unet, steps=10, scheduler=None):
    pipe = SimpleNamespace(unet=unet, scheduler=scheduler or DDIMScheduler())
    pipe.scheduler.set_timesteps(steps)
    return pipe


def inputs(size, batch=1, seed=1):
    generator = torch.Generator().manual_seed(seed)
    size = (size, size) if isinstance(size, int) else size
    return torch.randn(batch, 4, *size, generator=generator), torch.randn(batch, 5, 8, generator=generator)


def run(pipe, size=16, batch=1, calls=None, predict=None, **kwargs):
    x, text = inputs(size, batch)
    predict = predict or (lambda x, t: pipe.unet(x, t, text, **kwargs).sample)
    with torch.no_grad():
        for t in pipe.scheduler.timesteps[:calls]:
            x = x + 0.1 * predict(x, t)
    return x


@pytest.fixture
def middle_sizes():
    """`middle_sizes(unet)` -> list that fills with the size of the features in the middle block, call by call."""

    def of(unet):
        found = []
        unet.mid_block.register_forward_pre_hook(lambda _, args: found.append(tuple(args[0].shape[-2:])))
        return found

    return of


# ---- windows


@pytest.mark.parametrize("quarters", range(4))
@pytest.mark.parametrize("size, grid", [((8, 8), 2), ((16, 24), 2), ((9, 12), 3)])
def test_round_trip_of_windows_is_exact(size, grid, quarters):
    x = torch.randn(3, size[0] * size[1], 5)
    there = to_windows(x, size, grid, quarters)
    assert there.shape == (3 * grid**2, x.shape[1] // grid**2, 5)
    assert torch.equal(from_windows(there, size, grid, quarters), x)


@pytest.mark.parametrize("quarters", range(4))
def test_windows_hold_the_tokens_that_lie_in_them(quarters):
    """Against the definition, pixel by pixel: window of a token = its shifted place, modulo the picture."""
    h, w = 8, 16
    window, tokens = window_of((h, w), 2), torch.arange(h * w).view(1, -1, 1).float()
    shift = window_shift(window, quarters)
    parts = to_windows(tokens, (h, w), 2, quarters)[..., 0].long()
    for index, part in enumerate(parts):
        expected = [
            ((index // 2 * window[0] + y + shift[0]) % h) * w + (index % 2 * window[1] + x + shift[1]) % w
            for y in range(window[0])
            for x in range(window[1])
        ]
        assert part.tolist() == expected


def test_shifts_are_quarters_of_a_window_and_small_windows_do_not_shift():
    assert [window_shift((8, 18), q) for q in range(4)] == [(0, 0), (2, 4), (4, 8), (6, 12)]
    assert window_shift((3, 3), 3) == (0, 0)


@pytest.mark.parametrize("quarters", range(4))
def test_equals_full_attention_with_a_block_diagonal_mask(quarters):
    unet = build()
    layer, size = windowed_layers(unet, placement_of(unet))[0], (8, 12)
    x = torch.randn(2, 96, 8)
    with torch.no_grad():
        ours = from_windows(layer(to_windows(x, size, 2, quarters)), size, 2, quarters)
        labels = torch.arange(4).view(4, 1, 1).expand(4, 24, 1).float()
        label = from_windows(labels, size, 2, quarters)[0, :, 0]
        mask = torch.zeros(96, 96).masked_fill(label[:, None] != label[None, :], -math.inf)
        q, k, v = (p(x).unflatten(-1, (layer.heads, -1)).transpose(1, 2) for p in (layer.to_q, layer.to_k, layer.to_v))
        weights = (q @ k.mT / math.sqrt(q.shape[-1]) + mask).softmax(-1)
        expected = layer.to_out[0]((weights @ v).transpose(1, 2).flatten(2))
    torch.testing.assert_close(ours, expected, atol=1e-5, rtol=0)


def test_attention_costs_a_quarter():
    unet = build()
    layer, x = windowed_layers(unet, placement_of(unet))[0], torch.randn(1, 256, 8)
    projections = 4 * 256 * 8 * 8
    full = count_macs(layer, x) - projections
    assert count_macs(layer, to_windows(x, (16, 16), 2, 0)) - projections == full / 4


def test_odd_sizes_are_stretched_and_keep_a_constant():
    x = torch.ones(1, 15, 2)
    parts = to_windows(x, (3, 5), 2, 0)
    assert parts.shape == (4, 6, 2)
    torch.testing.assert_close(from_windows(parts, (3, 5), 2, 0), x)


def test_keys_can_be_masked_inside_of_windows():
    """A bias that forbids keys, as `attention_mask` becomes one, is cut like the tokens."""
    unet = build()
    pipe, forbidden = pipe_of(unet), torch.ones(1, 256)
    forbidden[:, 7] = 0
    place = placement_of(unet)
    layer = windowed_layers(unet, place)[0]
    x, changed = torch.randn(1, 256, 8), None
    changed = x.clone()
    changed[:, 7] += 3
    bias = ((1 - forbidden) * -10000.0).unsqueeze(1)
    with torch.no_grad(), diffusers_ext.apply(pipe, HiDiffusionConfig(raunet=False)):
        outputs = []

        def call(*_):  # inside of a call of the UNet, where windows act
            outputs.extend(layer(t, attention_mask=bias) for t in (x, changed))

        handle = unet.mid_block.register_forward_pre_hook(call)
        run(pipe, calls=1)
        handle.remove()
    others = torch.arange(256) != 7
    torch.testing.assert_close(outputs[0][:, others], outputs[1][:, others], atol=1e-6, rtol=0)
    assert not torch.allclose(outputs[0][:, 7], outputs[1][:, 7])


def test_grid_of_a_level_is_found_from_its_tokens():
    assert token_grid((33, 20), 17 * 10) == (17, 10)
    assert token_grid((33, 20), 33 * 20) == (33, 20)
    assert token_grid((33, 20), 100) is None


# ---- the coarse downsampler


def test_coarse_convolution_is_the_dilated_one_and_comes_back():
    convolution, x = torch.nn.Conv2d(3, 5, 3, 2, 1), torch.randn(2, 3, 16, 12)
    plain = convolution(x)
    with coarse(convolution):
        expected = F.conv2d(x, convolution.weight, convolution.bias, stride=4, padding=2, dilation=2)
        assert torch.equal(convolution(x), expected) and expected.shape[-2:] == (4, 3)
    assert torch.equal(convolution(x), plain)
    with pytest.raises(KeyError), coarse(convolution):
        raise KeyError
    assert (convolution.stride, convolution.padding, convolution.dilation) == ((2, 2), (1, 1), (1, 1))


def test_coarse_convolution_looks_at_every_second_pixel():
    convolution = torch.nn.Conv2d(1, 1, 3, 2, 1, bias=False)
    torch.nn.init.ones_(convolution.weight)
    x = torch.zeros(1, 1, 16, 16, requires_grad=True)
    with coarse(convolution):
        convolution(x)[0, 0, 1, 2].backward()
    assert x.grad[0, 0].nonzero().tolist() == [[i, j] for i in (2, 4, 6) for j in (6, 8, 10)]


def test_coarse_with_circular_padding():
    convolution = torch.nn.Conv2d(1, 1, 3, 2, 1, padding_mode="circular")
    x = torch.randn(1, 1, 8, 8)
    with coarse(convolution):
        got = convolution(x)
    padded = F.pad(x, (2, 2, 2, 2), mode="circular")
    expected = F.conv2d(padded, convolution.weight, convolution.bias, stride=4, dilation=2)
    torch.testing.assert_close(got, expected)


def test_lora_on_the_downsampler():
    """Both branches of the wrapped convolution take a quarter of the size."""
    from peft import LoraConfig, inject_adapter_in_model

    unet = build()
    inject_adapter_in_model(LoraConfig(r=2, target_modules=["downsamplers.0.conv"], init_lora_weights=False), unet)
    wrapped, x = unet.down_blocks[0].downsamplers[0].conv, torch.randn(1, 8, 16, 16)
    merged = wrapped.get_delta_weight("default") + wrapped.base_layer.weight
    with torch.no_grad(), coarse(wrapped):
        got = wrapped(x)
    expected = F.conv2d(x, merged, wrapped.base_layer.bias, stride=4, padding=2, dilation=2)
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=0)
    with diffusers_ext.apply(pipe_of(unet), HiDiffusionConfig()):
        assert torch.isfinite(run(pipe_of(unet))).all()


# ---- placement, sizes, plans


def test_placement_is_the_papers():
    """Level by level as published: Stable Diffusion 1.5 and XL."""
    assert Placement.of([True, True, True, False]) == SD
    assert Placement.of([False, True, True]) == XL
    assert not SD.pool_is_first and XL.pool_is_first
    assert Placement.of([True, False]) == Placement(2, 0, 0, None)
    assert Placement.of([True]) == Placement(1, 0, None, None)


@pytest.mark.parametrize("layout", ["sd", "xl"])
@pytest.mark.parametrize("layers", [1, 2])
def test_every_size_runs(layout, layers):
    """Twice, three and four times the trained size, odd and not square: every concatenation fits."""
    pipe = pipe_of(build(layout, layers=layers), steps=2)
    for t1, t2 in ((1.0, 0.0), (0.0, 1.0), (1.0, 1.0)):
        with torch.no_grad(), diffusers_ext.apply(pipe, HiDiffusionConfig(t1_ratio=t1, t2_ratio=t2)):
            for size in (16, 24, 32, (17, 16), (19, 27), (11, 40), (8, 13)):
                x, text = inputs(size)
                out = pipe.unet(x, pipe.scheduler.timesteps[0], text).sample
                assert out.shape == x.shape and torch.isfinite(out).all()


@pytest.mark.parametrize("layout", ["sd", "xl"])
@pytest.mark.parametrize("t1, t2, factor", [(0.4, 0.0, 2), (0.0, 0.4, 2), (0.4, 0.4, 4)])
def test_the_middle_sees_smaller_features_until_the_switch(layout, t1, t2, factor, middle_sizes):
    """As for an input of half the size (a quarter with both devices), then as usual."""
    unet = build(layout)
    found = middle_sizes(unet)
    pipe = pipe_of(unet)
    run(pipe, 32 // factor, calls=1)
    run(pipe, 32, calls=1)
    small, large = found
    found.clear()
    with diffusers_ext.apply(pipe, HiDiffusionConfig(t1_ratio=t1, t2_ratio=t2)):
        run(pipe, 32)
    assert found == [small] * 4 + [large] * 6


@pytest.mark.parametrize(
    "place, scale, control, expected",
    [
        (SD, 2, False, Plan((0, 20), (0, 0), 2)),
        (SD, 4, False, Plan((0, 35), (0, 15), 2)),
        (XL, 2, False, Plan((0, 8), (8, 20), 2)),
        (XL, 4, False, Plan((0, 15), (0, 35), 2)),
        (XL, 2, True, Plan((0, 8), (8, 25), 2)),
        (SD, 1, False, Plan()),
        (XL, 0.5, False, Plan()),
    ],
)
def test_published_values_of_50_steps(place, scale, control, expected):
    assert HiDiffusionConfig().plan_at(scale, place, 50, control) == expected


def test_plans_of_few_steps_inpainting_and_own_values():
    assert HiDiffusionConfig().plan_at(2, XL, 4) == Plan((0, 0), (0, 2), 2)
    assert HiDiffusionConfig().plan_at(2, XL, 50, special=True) == Plan((0, 0), (0, 20), 2)
    assert HiDiffusionConfig(t1_ratio=0.7).plan_at(2, SD, 10) == Plan((0, 7), (0, 0), 2)
    assert HiDiffusionConfig(t1_ratio=0.7, aggressive=True).plan_at(2, XL, 50) == Plan((0, 8), (8, 35), 2)
    assert HiDiffusionConfig(raunet=False, window_grid=3).plan_at(2, SD, 50) == Plan(windows=3)
    assert [Plan((0, 2), (1, 3), 2).at(i) for i in range(4)] == [
        Active(True, False, 2),
        Active(True, True, 2),
        Active(False, True, 2),
        Active(False, False, 2),
    ]


# ---- what it leaves alone


@pytest.mark.parametrize(
    "config", [{"raunet": False, "windows": False}, {"t1_ratio": 0, "t2_ratio": 0, "windows": False}]
)
def test_switched_off_is_exact(config):
    pipe = pipe_of(build())
    plain = run(pipe)
    with diffusers_ext.apply(pipe, HiDiffusionConfig(**config)):
        assert torch.equal(run(pipe), plain)


@pytest.mark.parametrize("size", [8, 6, (8, 5)])
def test_up_to_the_trained_size_nothing_changes(size):
    pipe = pipe_of(build())
    plain = run(pipe, size)
    with diffusers_ext.apply(pipe, HiDiffusionConfig()):
        assert torch.equal(run(pipe, size), plain)


def test_comes_off_without_a_trace():
    pipe = pipe_of(build())
    plain = run(pipe)
    state = {name: (set(vars(m)), str(m)) for name, m in pipe.unet.named_modules()}
    with diffusers_ext.apply(pipe, HiDiffusionConfig()):
        assert not torch.allclose(run(pipe), plain)
    assert {name: (set(vars(m)), str(m)) for name, m in pipe.unet.named_modules()} == state
    assert torch.equal(run(pipe), plain)


def test_after_the_early_part_without_windows_calls_are_plain():
    pipe = pipe_of(build())
    x, text = inputs(16)
    with torch.no_grad():
        plain = pipe.unet(x, pipe.scheduler.timesteps[5], text).sample
        with diffusers_ext.apply(pipe, HiDiffusionConfig(windows=False)):
            outputs = [pipe.unet(x, t, text).sample for t in pipe.scheduler.timesteps[:6]]
    assert torch.equal(outputs[5], plain)


def test_random_numbers_of_torch_are_not_touched_and_runs_repeat():
    pipe = pipe_of(build())
    torch.manual_seed(5)
    before = torch.get_rng_state()
    with diffusers_ext.apply(pipe, HiDiffusionConfig()):
        first = run(pipe)
        assert torch.equal(run(pipe), first)
    assert torch.equal(torch.get_rng_state(), before)
    with diffusers_ext.apply(pipe, HiDiffusionConfig(seed=1)):
        assert not torch.equal(run(pipe), first)


def test_shifts_are_uniform_and_differ_between_steps_and_layers():
    drawn = torch.tensor([draw_quarters(0, step, 10) for step in range(400)])
    counts = drawn.flatten().bincount(minlength=4)
    # chi-square with 3 degrees of freedom: above 16.3 in one of a thousand cases
    assert ((counts - 1000.0) ** 2 / 1000).sum() < 16.3
    assert len({tuple(d) for d in drawn.tolist()}) > 390


# ---- runs


SETTINGS = [{}, {"size": 24}, {"batch": 2}, {"size": (17, 24)}, {"size": 8}, {}]


def test_runs_of_different_layouts_in_a_row():
    def fresh(**setting):
        pipe = pipe_of(build())
        with diffusers_ext.apply(pipe, HiDiffusionConfig()):
            return run(pipe, **setting)

    pipe = pipe_of(build())
    with diffusers_ext.apply(pipe, HiDiffusionConfig()):
        for setting in SETTINGS:
            assert torch.equal(run(pipe, **setting), fresh(**setting)), setting


def test_sizes_may_change_within_a_step():
    """Tiles of different sizes at one timestep: each as if it were alone."""
    pipe, alone = pipe_of(build()), {}
    t = pipe.scheduler.timesteps[0]
    with torch.no_grad():
        for size in (16, 24, 8):
            with diffusers_ext.apply(pipe, HiDiffusionConfig()):
                x, text = inputs(size)
                alone[size] = pipe.unet(x, t, text).sample
        with diffusers_ext.apply(pipe, HiDiffusionConfig()):
            for size in (8, 24, 16):
                x, text = inputs(size)
                assert torch.equal(pipe.unet(x, t, text).sample, alone[size])


def test_an_interrupted_run_leaves_nothing_behind():
    pipe = pipe_of(build())
    with diffusers_ext.apply(pipe, HiDiffusionConfig()):
        clean = run(pipe)
        run(pipe, calls=3)
        assert torch.equal(run(pipe), clean)

        def fail(*_):
            raise KeyboardInterrupt

        broken = pipe.unet.mid_block.register_forward_pre_hook(fail)
        with pytest.raises(KeyboardInterrupt):
            run(pipe)
        broken.remove()
        assert pipe.unet.down_blocks[0].downsamplers[0].conv.stride == (2, 2)
        assert torch.equal(run(pipe), clean)


def test_another_dtype():
    pipe = pipe_of(build())
    with diffusers_ext.apply(pipe, HiDiffusionConfig()):
        run(pipe, calls=3)
        pipe.unet.to(torch.bfloat16)
        x, text = (t.bfloat16() for t in inputs(16))
        out = pipe.unet(x, pipe.scheduler.timesteps[0], text).sample
    assert out.dtype == torch.bfloat16 and torch.isfinite(out).all()


def test_guidance_in_turn_equals_guidance_in_one_batch():
    pipe = pipe_of(build())
    _, text = inputs(16, batch=2)
    first, second = text[:1].clone(), text[1:].clone()

    def split(x, t):
        u, c = pipe.unet(x, t, first).sample, pipe.unet(x, t, second).sample
        return u + 2 * (c - u)

    def batched(x, t):
        u, c = pipe.unet(torch.cat([x, x]), t, text).sample.chunk(2)
        return u + 2 * (c - u)

    results = []
    for predict in (split, batched):
        with diffusers_ext.apply(pipe, HiDiffusionConfig()):
            results.append(run(pipe, predict=predict))
    torch.testing.assert_close(*results, atol=1e-4, rtol=1e-4)


def test_steps_of_two_evaluations_count_once(middle_sizes):
    unet = build()
    found, pipe = middle_sizes(unet), pipe_of(unet, 10, HeunDiscreteScheduler())
    x, text = inputs(16)
    with torch.no_grad(), diffusers_ext.apply(pipe, HiDiffusionConfig()):
        for t in pipe.scheduler.timesteps:
            pipe.unet(x, t, text)
    # 4 of 10 steps: one evaluation at the first timestep, two at each later one
    assert found == [(2, 2)] * 7 + [(4, 4)] * 12


@pytest.mark.parametrize("scheduler", [DDIMScheduler, EulerDiscreteScheduler])
def test_image_to_image_counts_its_own_steps(scheduler, middle_sizes):
    """Also with schedulers that are not told where the run begins."""
    unet = build()
    found, pipe = middle_sizes(unet), pipe_of(unet, 20, scheduler())
    x, text = inputs(16)
    with torch.no_grad(), diffusers_ext.apply(pipe, HiDiffusionConfig()):
        for t in pipe.scheduler.timesteps[10:]:
            pipe.unet(x, t, text)
    assert found == [(2, 2)] * 4 + [(4, 4)] * 6


@pytest.mark.parametrize("order", ["apply first", "compile first"])
def test_compiles(order):
    pipe, config = pipe_of(build(layers=1), steps=2), HiDiffusionConfig(t1_ratio=0.5)
    with diffusers_ext.apply(pipe, config):
        eager = run(pipe)
    torch._dynamo.reset()
    if order == "compile first":
        pipe.unet.compile(backend="eager")
    with diffusers_ext.apply(pipe, config):
        if order == "apply first":
            pipe.unet.compile(backend="eager")
        torch.testing.assert_close(run(pipe), eager, atol=1e-5, rtol=0)


@pytest.mark.parametrize("t1, t2", [(1.0, 0.0), (0.0, 1.0), (1.0, 1.0)])
@pytest.mark.parametrize("layout", ["sd", "xl"])
def test_controlnet_and_adapters(layout, t1, t2):
    """Residuals are resized: a constant one must act as the same constant of the right size."""
    unet = build(layout)
    control = ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=(4, 8)).eval()
    pipe, (x, text) = pipe_of(unet), inputs(16)
    t = pipe.scheduler.timesteps[0]
    with torch.no_grad(), diffusers_ext.apply(pipe, HiDiffusionConfig(t1_ratio=t1, t2_ratio=t2)):
        down, middle = control(x, t, text, torch.rand(1, 3, 32, 32), return_dict=False)
        given = {
            "down_block_additional_residuals": [torch.full_like(d, 0.3) for d in down],
            "mid_block_additional_residual": torch.full_like(middle, 0.2),
        }
        out = unet(x, t, text, **given).sample
        # constants keep their value in any size: broadcast ones must give the same
        single = [torch.full((1, d.shape[1], 1, 1), 0.3) for d in down]
        given = {
            "down_block_additional_residuals": single,
            "mid_block_additional_residual": torch.full((1, middle.shape[1], 1, 1), 0.2),
        }
        expected = unet(x, t, text, **given).sample
        torch.testing.assert_close(out, expected, atol=1e-5, rtol=0)
        assert not torch.allclose(out, unet(x, t, text).sample)
        channels = [b.resnets[-1].out_channels for b in unet.down_blocks]
        sizes = [16, 8, 4]
        intra = [torch.full((1, c, s, s), 0.1) for c, s in zip(channels, sizes)]
        adapted = unet(x, t, text, down_intrablock_additional_residuals=list(intra)).sample
    assert torch.isfinite(adapted).all() and len(intra) == 3


def test_with_entropy_scaling():
    pipe = pipe_of(build(sample_size=16))
    with diffusers_ext.apply(pipe, HiDiffusionConfig()):
        alone = run(pipe, 32)
    for configs in (
        [HiDiffusionConfig(), AttentionEntropyScalingConfig()],
        [AttentionEntropyScalingConfig(), HiDiffusionConfig()],
    ):
        with diffusers_ext.apply(pipe, *configs) as handle:
            both = run(pipe, 32)
            assert handle.summary()["attention-entropy-scaling"]["scaled"] == 10
        assert torch.isfinite(both).all() and not torch.equal(both, alone)


def test_entropy_scaling_goes_by_the_keys_that_are_left(monkeypatch):
    """Windows and shrunk levels are compared with what their layers had in training, be it four tokens."""
    pipe, used, original = pipe_of(build()), set(), Layout.factor

    def spy(self, queries, keys, trained=None):
        used.add((keys, trained, original(self, queries, keys, trained)))
        return original(self, queries, keys, trained)

    monkeypatch.setattr(Layout, "factor", spy)
    early = {(64, 64, 1.0), (16, 16, 1.0), (4, 4, 1.0)}
    late = {(64, 64, 1.0), (64, 16, math.sqrt(6 / 4)), (16, 4, math.sqrt(4 / 2))}
    for configs in itertools.permutations([HiDiffusionConfig(), AttentionEntropyScalingConfig()]):
        with diffusers_ext.apply(pipe, *configs):
            for calls, expected in ((1, early), (None, early | late)):
                used.clear()
                assert torch.isfinite(run(pipe, 16, calls=calls)).all()
                assert used == expected


def test_merged_tokens_are_reported():
    pipe = pipe_of(build())
    layer = windowed_layers(pipe.unet, placement_of(pipe.unet))[0]
    handle = layer.register_forward_pre_hook(
        lambda _, args, kwargs: ((args[0][:, :-3], *args[1:]), kwargs), with_kwargs=True
    )
    with diffusers_ext.apply(pipe, HiDiffusionConfig()), pytest.raises(RuntimeError, match="windows=False"):
        run(pipe)
    handle.remove()


# ---- bad input


@pytest.mark.parametrize(
    "values",
    [
        {"t1_ratio": 1.5},
        {"t2_ratio": -0.1},
        {"window_grid": 1},
        {"base_size": (8,)},
        {"base_size": (0, 8)},
        {"num_inference_steps": 0},
    ],
)
def test_bad_values(values):
    with pytest.raises(ValueError, match="accepted"):
        HiDiffusionConfig(**values)


def test_bad_models():
    with pytest.raises(ValueError, match="FluxTransformer2DModel does not have; supported: UNet2DConditionModel"):
        diffusers_ext.apply(zoo.load("shapes-dit"), HiDiffusionConfig())
    with pytest.raises(ValueError, match="Linear"):
        diffusers_ext.apply(torch.nn.Linear(2, 2), HiDiffusionConfig())
    with pytest.raises(ValueError, match="num_inference_steps"):
        diffusers_ext.apply(build(), HiDiffusionConfig())
    with pytest.raises(ValueError, match="base_size"):
        diffusers_ext.apply(pipe_of(build(sample_size=None)), HiDiffusionConfig())
    with pytest.raises(ValueError, match="down_blocks.0"):
        diffusers_ext.apply(pipe_of(build(downsample_padding=0)), HiDiffusionConfig())
    with pytest.raises(ValueError, match="aggressive"):
        diffusers_ext.apply(pipe_of(build()), HiDiffusionConfig(aggressive=True))
    assert "forward" not in vars(build())


def test_applies_by_steps_and_warns():
    unet = build()
    with diffusers_ext.apply(unet, HiDiffusionConfig(num_inference_steps=10)) as handle:
        run(pipe_of(unet))
        figures = handle.summary()[SLUG]
    assert (figures["calls"], figures["coarse_calls"], figures["pooled_calls"]) == (10, 4, 0)
    assert (figures["windowed_calls"], figures["windowed_layers"]) == (10, 5) and 0 < figures["macs_saved"] < 1
    assert diffusers_ext.check(pipe_of(unet), HiDiffusionConfig(), num_inference_steps=1).warnings
    off = HiDiffusionConfig(t1_ratio=0, windows=False)
    assert diffusers_ext.check(pipe_of(unet), off).warnings
    config = HiDiffusionConfig(t1_ratio=0.5, base_size=(8, 16))
    assert diffusers_ext.MethodConfig.from_dict(config.to_dict()) == config


def test_with_another_cache_is_refused():
    pipe = pipe_of(build())
    with (
        diffusers_ext.apply(pipe, diffusers_ext.DeepCacheConfig()),
        pytest.raises(ValueError, match="cannot be combined"),
    ):
        diffusers_ext.apply(pipe, HiDiffusionConfig())


@pytest.mark.slow
def test_objects_stay_in_one_piece():
    """shapes-unet at twice its size, 32 captions of one object: areas that stand out from the ground are counted."""
    pipe, judge = zoo.load("shapes-unet"), zoo.load_judge()
    captions, specs = single_objects(32)

    def draw(*configs):
        with diffusers_ext.apply(pipe, *configs):
            images = zoo.generate(pipe, captions, batch_size=16, height=128, width=128)
        small = F.interpolate(images, (64, 64), mode="area")
        return count_areas(images).float(), judge.accuracy(small, specs)["shape1"]

    plain, plain_shapes = draw()
    ours, our_shapes = draw(HiDiffusionConfig(t1_ratio=0.7))
    assert (plain - 1).abs().mean() > 1, "the plain model must repeat objects, or there is nothing to repair"
    assert (ours - 1).abs().mean() < 0.6 * (plain - 1).abs().mean()
    assert our_shapes > plain_shapes + 0.25


@pytest.mark.slow
def test_windows_save_a_fifth_of_a_step_at_twice_the_size():
    unet = zoo.load("shapes-unet").unet
    x, text = torch.randn(4, 4, 32, 32), torch.randn(4, 20, unet.config.cross_attention_dim)

    @torch.no_grad()
    def step():
        unet(x, torch.tensor(500), text)

    def windowed():
        with diffusers_ext.apply(unet, HiDiffusionConfig(raunet=False, num_inference_steps=50)):
            step()

    timing = paired_ratio(windowed, step, pairs=7, clock=time.process_time)
    assert timing.ratio < 0.8, str(timing)


def single_objects(count):
    """Captions of one object on a plain ground, and what they say."""
    scenes = zoo.held_out(20 * count)
    shown = [scenes.attributes(i) for i in range(20 * count)]
    chosen = [i for i, a in enumerate(shown) if a["texture"] == "plain" and a["shape2"] == "none"][:count]
    return [scenes.captions[i] for i in chosen], scenes.specs[chosen]


def count_areas(images):
    """Connected areas above 1 % of each picture that differ from the colour of its border."""
    border = torch.cat([images[..., 0], images[..., -1], images[..., 0, :], images[..., -1, :]], -1)
    apart = ((images - border.median(-1).values[..., None, None]).abs().amax(1) > 0.4)[:, None]
    labels = torch.arange(1, apart[0].numel() + 1).view(apart[:1].shape).float() * apart
    while not torch.equal(grown := F.max_pool2d(labels, 3, 1, 1) * apart, labels):
        labels = grown
    counts = [l[l > 0].unique(return_counts=True)[1] for l in labels]
    return torch.tensor([int((c > 0.01 * apart[0].numel()).sum()) for c in counts])
