"""diffusers' own caches through `apply`: on pipelines and models that set no cache context, without stale state."""

from __future__ import annotations

import contextlib
import copy
from types import SimpleNamespace

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DiTPipeline,
    DPMSolverMultistepScheduler,
    EDMEulerScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    PixArtAlphaPipeline,
    QwenImageTransformer2DModel,
    SanaPipeline,
    SanaTransformer2DModel,
    StableDiffusion3Pipeline,
    WanTransformer3DModel,
)
from diffusers.hooks import (
    FasterCacheConfig,
    FirstBlockCacheConfig,
    LayerSkipConfig,
    MagCacheConfig,
    PyramidAttentionBroadcastConfig,
    SeaCacheConfig,
    TaylorSeerCacheConfig,
)

import diffusers_ext
from diffusers_ext import DeepCacheConfig
from diffusers_ext._flux_tokens import image_ids
from diffusers_ext.caching._upstream_vision import Vision, noise_levels
from diffusers_ext.eval import count_macs


STEPS = 6
MODELS = ("sd3", "pixart", "dit", "sana", "flux", "wan")
# Models of their own, and what differs from the tiny ones of all tests.
OWN = {"sana": SanaTransformer2DModel, "wan": WanTransformer3DModel}
CONFIGS = {
    "dit": {"out_channels": 8, "num_embeds_ada_norm": 1000},
    "flux": {"in_channels": 4},
    "sana": {
        "in_channels": 4,
        "out_channels": 4,
        "num_attention_heads": 2,
        "attention_head_dim": 8,
        "num_layers": 4,
        "num_cross_attention_heads": 2,
        "cross_attention_head_dim": 8,
        "cross_attention_dim": 16,
        "caption_channels": 16,
        "sample_size": 8,
        "patch_size": 1,
    },
    "wan": {
        "patch_size": (1, 2, 2),
        "num_attention_heads": 2,
        "attention_head_dim": 12,
        "in_channels": 4,
        "out_channels": 4,
        "text_dim": 16,
        "freq_dim": 16,
        "ffn_dim": 32,
        "num_layers": 3,
        "rope_max_seq_len": 32,
    },
}


def _conditions(name, batch, seed):
    generator = torch.Generator().manual_seed(seed)
    text = torch.randn(batch, 5, 16, generator=generator)
    if name == "dit":
        return {"class_labels": torch.randint(0, 1000, (batch,), generator=generator)}
    if name == "sd3":
        return {"encoder_hidden_states": text, "pooled_projections": torch.randn(batch, 16, generator=generator)}
    if name == "flux":
        pooled = torch.randn(batch, 16, generator=generator)
        ids = {"txt_ids": torch.zeros(5, 3)}
        return {"encoder_hidden_states": text, "pooled_projections": pooled, **ids}
    return {"encoder_hidden_states": text}


def _latents(name, batch, size, seed):
    generator = torch.Generator().manual_seed(seed)
    if name == "flux":
        return torch.randn(batch, size * size, 4, generator=generator)
    shape = (batch, 4, 2, size, size) if name == "wan" else (batch, 4, size, size)
    return torch.randn(shape, generator=generator)


def _extra(name, size):
    """Where Flux's tokens are in the picture."""
    if name != "flux":
        return {}
    return {"img_ids": image_ids(2 * size, 2 * size)}


def _loop(model, name, batch=2, size=8, seed=0, steps=STEPS, split=False, calls=1, stop=None, timesteps=None):
    """A plain sampling loop; `split` calls conditional and unconditional apart, `calls` repeats within a step."""
    kinds = [_conditions(name, batch, 10 + i) for i in range(2 if split else 1)]
    x = _latents(name, batch, size, seed)
    if timesteps is None:
        timesteps = torch.linspace(1000, 100, steps)
    extra = _extra(name, size)
    with torch.no_grad():
        for index, t in enumerate(timesteps):
            if stop == index:
                break
            for kind in kinds * calls:
                time = (t / 1000 if name == "flux" else t).expand(batch)
                out = model(hidden_states=x, timestep=time, return_dict=False, **kind, **extra)[0]
                x = x + 0.05 * (out[:, :4] if name == "dit" else out)
    return x


@pytest.fixture
def make(tiny_model):
    """Fresh tiny model by name, with weights that move the input (upstream zero-initialises some outputs)."""

    def build(name):
        model = tiny_model(OWN.get(name, name), size=8, text=16, **CONFIGS.get(name, {}))
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.2)
        return model

    return build


class Pipe:
    """What the adapter reads of a pipeline."""

    def __init__(self, transformer, scheduler=None):
        self.transformer = transformer
        self.scheduler = scheduler or FlowMatchEulerDiscreteScheduler()
        self.scheduler.set_timesteps(STEPS)


def _configs():
    return {
        "first-block-cache": FirstBlockCacheConfig(threshold=1e9),
        "taylorseer-cache": TaylorSeerCacheConfig(cache_interval=3, disable_cache_before_step=2),
        "mag-cache": MagCacheConfig(mag_ratios=[1.0] * STEPS, num_inference_steps=STEPS, retention_ratio=0.2),
        "pyramid-attention-broadcast": PyramidAttentionBroadcastConfig(
            spatial_attention_block_skip_range=2, spatial_attention_timestep_skip_range=(0, 990)
        ),
        "faster-cache": FasterCacheConfig(is_guidance_distilled=True, attention_weight_callback=lambda _: 0.3),
        "sea-cache": SeaCacheConfig(threshold=1e9),
    }


CASES = [(slug, name) for slug in _configs() for name in ("sd3", "pixart", "dit", "sana", "flux")]


@pytest.fixture(params=CASES, ids=lambda case: "-".join(case))
def case(request, make):
    slug, name = request.param
    return _configs()[slug], slug, name, make(name)


def test_applies_reuses_and_comes_off_without_a_trace(case, traces):
    config, slug, name, model = case
    plain, before = _loop(model, name), traces(model)
    given = copy.copy(vars(config))
    with diffusers_ext.apply(Pipe(model), config) as handle:
        cached = _loop(model, name)
        figures = handle.summary()[slug]
    assert figures["computed"] > 0 and figures["reused"] > 0 and figures["computed"] + figures["reused"] == STEPS
    assert figures["modules_skipped"] > 0 and 0 < figures["macs_saved"] < 1
    assert torch.isfinite(cached).all() and not torch.equal(cached, plain)
    assert traces(model) == before and torch.equal(_loop(model, name), plain)
    assert vars(config) == given, "the user's config is not completed in place"


def test_never_stale(case):
    """Runs of other layouts, other prompts and interrupted ones in between change nothing."""
    config, _, name, model = case
    with diffusers_ext.apply(Pipe(model), config):
        first = _loop(model, name)
        _loop(model, name, batch=1, seed=1)
        _loop(model, name, size=4)
        _loop(model, name, stop=3, seed=5)
        assert torch.equal(_loop(model, name), first)
        with _fails_inside(model), pytest.raises(KeyboardInterrupt):
            _loop(model, name, seed=6)
        assert torch.equal(_loop(model, name), first)


@contextlib.contextmanager
def _fails_inside(model):
    calls = []

    def hook(*_):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt

    last = model.proj_out_2 if hasattr(model, "proj_out_2") else model.proj_out
    handle = last.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def test_kinds_of_calls_do_not_see_each_other(case):
    """Conditional and unconditional calls in turn, two calls per step: each as if it ran alone."""
    config, _, name, model = case
    outputs = {}
    kinds = [_conditions(name, 2, 10 + i) for i in range(2)]
    extra = _extra(name, 4)
    x = _latents(name, 2, 4, 0)

    def call(kind, t):
        return model(hidden_states=x * (1 + t / 1000), timestep=t.expand(2), return_dict=False, **kind, **extra)[0]

    times = torch.linspace(900, 100, STEPS)
    with torch.no_grad():
        for index, kind in enumerate(kinds):
            with diffusers_ext.apply(Pipe(model), config):
                outputs[index] = [call(kind, t) for t in times]
        with diffusers_ext.apply(Pipe(model), config):
            for step, t in enumerate(times):
                for index, kind in enumerate(kinds):
                    assert torch.equal(call(kind, t), outputs[index][step]), (index, step)


def test_figures_are_those_that_ran(case):
    config, slug, name, model = case
    plain = count_macs(_loop, model, name)
    with diffusers_ext.apply(Pipe(model), config) as handle:
        ran = count_macs(_loop, model, name)
        figures = handle.summary()[slug]
        assert count_macs(_loop, model, name) == ran, "summary() does not disturb the cache"
    assert figures["macs_full_call"] * STEPS == plain
    assert figures["macs_saved"] == pytest.approx(1 - ran / plain)


def test_equals_diffusers_where_it_works_alone(make):
    """Flux sets the context in its pipeline: with one kind of call, upstream alone gives the same numbers."""
    for slug, config in _configs().items():
        if slug in ("pyramid-attention-broadcast", "faster-cache", "sea-cache"):
            continue  # they ask for a callback
        model = make("flux")
        model.enable_cache(copy.copy(config))
        with model.cache_context("cond"):
            expected = _loop(model, "flux")
        model.disable_cache()
        with diffusers_ext.apply(model, config):
            assert torch.equal(_loop(model, "flux"), expected), slug


def test_a_context_of_the_pipeline_is_kept(make):
    model = make("flux")
    with diffusers_ext.apply(Pipe(model), FirstBlockCacheConfig(1e9)), model.cache_context("cond"):
        _loop(model, "flux")
        (hook,) = model._diffusers_hook.hooks.values()
        assert hook.cache_context._context.name == "cond"


def test_faster_cache_skips_the_unconditional_half(make):
    """Batches of unconditional and conditional inputs, with what SD3 adds to upstream's list of inputs to split."""
    config = FasterCacheConfig(attention_weight_callback=lambda _: 0.5, unconditional_batch_skip_range=2)
    for name in ("sd3", "pixart", "sana"):
        model = make(name)
        plain = _loop(model, name, batch=4)
        with diffusers_ext.apply(Pipe(model), config) as handle:
            cached = _loop(model, name, batch=4)
            ran = count_macs(_loop, model, name, batch=4)
            figures = handle.summary()["faster-cache"]
        assert figures["reused"] > 0 and torch.isfinite(cached).all() and cached.shape == plain.shape
        assert 1 - figures["macs_saved"] == pytest.approx(ran / (STEPS * figures["macs_full_call"]))


def test_faster_cache_refuses_what_it_would_get_wrong(make):
    config = FasterCacheConfig(attention_weight_callback=lambda _: 0.5)
    with pytest.raises(ValueError, match="first.*is_guidance_distilled"):
        diffusers_ext.apply(Pipe(make("dit")), config)
    flux, sd3 = make("flux"), make("sd3")
    with diffusers_ext.apply(Pipe(flux), config), pytest.raises(ValueError, match="packed tokens"):
        _loop(flux, "flux")
    with diffusers_ext.apply(Pipe(sd3), config), pytest.raises(ValueError, match="batch of 3"):
        _loop(sd3, "sd3", batch=3)


@pytest.mark.parametrize(
    ("name", "scheduler"),
    [
        *((name, FlowMatchEulerDiscreteScheduler) for name in MODELS),
        ("dit", DDIMScheduler),
        ("pixart", DPMSolverMultistepScheduler),
        ("flux", DDIMScheduler),
    ],
)
def test_sea_cache_gets_its_coordinates(make, name, scheduler):
    """No pipeline of these models passes step and sigma, without which upstream alone never reuses anything."""
    pipe = Pipe(make(name), scheduler())
    times = pipe.scheduler.timesteps
    plain = _loop(pipe.transformer, name, timesteps=times)
    with diffusers_ext.apply(pipe, SeaCacheConfig(threshold=1e9)) as handle:
        cached = _loop(pipe.transformer, name, timesteps=times)
        figures = handle.summary()["sea-cache"]
        assert torch.equal(_loop(pipe.transformer, name, timesteps=times), cached)
    # Full: the retained first step, every third after two reuses, and the last.
    assert (figures["computed"], figures["reused"]) == (3, 3)
    assert not torch.equal(cached, plain)
    assert torch.equal(_loop(pipe.transformer, name, timesteps=times), plain)


@pytest.mark.parametrize("steps", [20, 50])
def test_sea_cache_counts_a_run_that_begins_late(make, steps):
    """Image to image: the last step of what is left is computed, whether the scheduler was told where it begins."""
    model, counts = make("pixart"), []
    for told in (True, False):
        pipe = Pipe(model, DPMSolverMultistepScheduler())
        pipe.scheduler.set_timesteps(steps)
        begin = steps - 6
        if told:
            pipe.scheduler.set_begin_index(begin)
        with diffusers_ext.apply(pipe, SeaCacheConfig(threshold=1e9, max_consecutive_cached=0)) as handle:
            _loop(model, "pixart", timesteps=pipe.scheduler.timesteps[begin:])
            counts.append(handle.summary()["sea-cache"]["computed"])
    assert counts == [2, 2]


def test_noise_levels_agree_with_samples():
    """A variance-preserving sample times the factor is the flow-matching sample of the level."""
    ddim, flow = DDIMScheduler(), FlowMatchEulerDiscreteScheduler()
    clean, noise = torch.randn(2, 4, 4, dtype=torch.float64), torch.randn(2, 4, 4, dtype=torch.float64)
    for time in (0, 250, 999):
        bar = ddim.alphas_cumprod[time].double()
        level, factor = noise_levels(ddim, float(time))
        vp = bar.sqrt() * clean + (1 - bar).sqrt() * noise
        torch.testing.assert_close(factor * vp, (1 - level) * clean + level * noise)
    assert noise_levels(flow, 1000.0) == (1.0, 1.0)
    assert noise_levels(flow, 250.0) == (pytest.approx(0.25), 1.0)


def test_sea_cache_sees_the_picture_of_packed_tokens(make):
    """As Flux's pipeline packs them, with the tokens of a reference picture after them."""
    pixels = torch.arange(2 * 6 * 8.0).view(2, 1, 6, 8)
    tokens = FluxPipeline._pack_latents(pixels, 2, 1, 6, 8)
    ids = FluxPipeline._prepare_latent_image_ids(2, 3, 4, "cpu", torch.float32)
    more = torch.cat([ids, ids + torch.tensor([1.0, 0, 0])])
    vision = Vision(make("flux"), lambda: 1.0)
    for x, places in ((tokens, ids), (torch.cat([tokens, tokens + 1], 1), more)):
        seen = vision.pictures({"hidden_states": x, "timestep": 1.0, "img_ids": places})
        assert torch.equal(torch.stack(seen), pixels[:, :, None])
    with pytest.raises(ValueError, match="12 tokens.*raw_vision_callback"):
        vision.pictures({"hidden_states": tokens, "timestep": 1.0, "img_ids": torch.zeros(12, 3)})


def test_sea_cache_refuses_what_it_cannot_see(make, traces):
    """Before the run where the model tells, else at its first call; never a run that reuses nothing."""
    config, sd3, flux = SeaCacheConfig(threshold=1e9), make("sd3"), make("flux")
    with pytest.raises(ValueError, match="apply it to the pipeline"):
        diffusers_ext.apply(sd3, config)
    edm = EDMEulerScheduler()
    assert (
        "EDMEulerScheduler is neither"
        in diffusers_ext.check(SimpleNamespace(unet=sd3, scheduler=edm), config).errors[0]
    )
    qwen = QwenImageTransformer2DModel(
        num_layers=2, attention_head_dim=8, num_attention_heads=2, joint_attention_dim=8, axes_dims_rope=(2, 2, 4)
    )
    assert "img_shapes" in diffusers_ext.check(Pipe(qwen), config).errors[0]
    with diffusers_ext.apply(Pipe(flux), config), pytest.raises(ValueError, match="raw_vision_callback"):
        flux(
            hidden_states=torch.zeros(1, 9, 4),
            timestep=torch.ones(1),
            img_ids=torch.zeros(9, 3),
            **_conditions("flux", 1, 0),
        )
    assert traces(sd3) == traces(flux) == traces(qwen) == ({}, set(), False)


def test_sea_cache_takes_a_callback_of_yours(make):
    seen = []

    def look(module, args, kwargs):
        seen.append(kwargs["timestep"])
        return [x[:, None] for x in kwargs["hidden_states"].unbind(0)]

    model = make("sd3")
    with diffusers_ext.apply(Pipe(model), SeaCacheConfig(threshold=1e9, raw_vision_callback=look)) as handle:
        _loop(model, "sd3")
        assert handle.summary()["sea-cache"]["reused"] == 3 and len(seen) == STEPS


def test_mag_cache_reports_its_calibration(make):
    model = make("sd3")
    config = MagCacheConfig(calibrate=True, num_inference_steps=STEPS)
    plain = _loop(model, "sd3")
    with diffusers_ext.apply(model, config) as handle:
        assert torch.equal(_loop(model, "sd3"), plain)
        (ratios,) = handle.summary()["mag-cache"]["mag_ratios"]
    assert len(ratios) == STEPS and ratios[0] == 1.0 and all(r > 0 for r in ratios)
    with diffusers_ext.apply(model, MagCacheConfig(mag_ratios=ratios, num_inference_steps=STEPS, threshold=1e9)):
        assert not torch.equal(_loop(model, "sd3"), plain)


def test_threshold_off_is_exact(make):
    for name in ("sd3", "pixart", "dit", "sana", "flux"):
        model = make(name)
        plain = _loop(model, name)
        mag = MagCacheConfig(threshold=-1.0, mag_ratios=[1.0] * STEPS)
        for config in (FirstBlockCacheConfig(-1.0), mag, SeaCacheConfig(threshold=0)):
            with diffusers_ext.apply(Pipe(model), config) as handle:
                assert torch.equal(_loop(model, name), plain)
                (figures,) = handle.summary().values()
            assert figures["reused"] == 0 and figures["macs_saved"] == 0


def test_control_residuals_are_refused_by_caches_that_skip_blocks(make):
    model = make("sd3")
    control = [torch.zeros(2, 16, 16)]
    kwargs = {"hidden_states": _latents("sd3", 2, 8, 0), "timestep": torch.tensor([500.0, 500.0])}
    kwargs |= {"block_controlnet_hidden_states": control, **_conditions("sd3", 2, 0)}
    with diffusers_ext.apply(model, FirstBlockCacheConfig()), pytest.raises(ValueError, match="count twice"):
        model(**kwargs)
    with torch.no_grad(), diffusers_ext.apply(model, TaylorSeerCacheConfig()):
        model(**kwargs)


@pytest.mark.parametrize("slug", ["first-block-cache", "taylorseer-cache", "mag-cache"])
def test_only_one_cache_at_a_time(make, slug):
    model, config = make("sd3"), _configs()[slug]
    with diffusers_ext.apply(model, config):
        with pytest.raises(ValueError, match="already applied"):
            diffusers_ext.apply(model, config)
        with pytest.raises(ValueError, match=f"pyramid-attention-broadcast cannot be combined with {slug}"):
            diffusers_ext.apply(Pipe(model), _configs()["pyramid-attention-broadcast"])
    flux = make("flux")
    flux.enable_cache(config)
    with pytest.raises(ValueError, match="already has an active cache"):
        diffusers_ext.apply(Pipe(flux), config)


def test_stacking_with_caches_of_this_package_is_refused(make_unet, traces):
    unet = make_unet()
    broadcast = PyramidAttentionBroadcastConfig(cross_attention_block_skip_range=2)
    pipe = Pipe(unet, DDIMScheduler())
    for configs in ((DeepCacheConfig(), broadcast), (broadcast, DeepCacheConfig())):
        assert "cannot be combined" in diffusers_ext.check(pipe, *configs).errors[0], "before one of them is applied"
        with diffusers_ext.apply(pipe, configs[0]), pytest.raises(ValueError, match="cannot be combined"):
            diffusers_ext.apply(pipe, configs[1])
    assert traces(unet) == ({}, set(), False)


def test_attention_caches_work_on_unets(make_unet, run_loop):
    unet = make_unet()
    plain = run_loop(unet)
    wide = PyramidAttentionBroadcastConfig(
        cross_attention_block_skip_range=2, cross_attention_timestep_skip_range=(0, 1000)
    )
    for config in (wide, TaylorSeerCacheConfig(cache_interval=2, disable_cache_before_step=1)):
        with diffusers_ext.apply(Pipe(unet, DDIMScheduler()), config) as handle:
            cached = run_loop(unet)
            (figures,) = handle.summary().values()
            assert torch.equal(run_loop(unet), cached)
        assert figures["reused"] > 0 and not torch.equal(cached, plain)
    assert torch.equal(run_loop(unet), plain)


@pytest.mark.parametrize("config", [FirstBlockCacheConfig(), MagCacheConfig(mag_ratios=[1.0])])
def test_block_caches_refuse_unets(make_unet, traces, config):
    unet = make_unet()
    with pytest.raises(ValueError, match="UNet2DConditionModel.*DeepCacheConfig"):
        diffusers_ext.apply(unet, config)
    assert not diffusers_ext.check(unet, config)
    assert traces(unet) == ({}, set(), False)


def test_other_refusals(make, traces):
    sd3, dit = make("sd3"), make("dit")
    with pytest.raises(ValueError, match="apply it to the pipeline"):
        diffusers_ext.apply(sd3, PyramidAttentionBroadcastConfig(spatial_attention_block_skip_range=2))
    with pytest.raises(ValueError, match="lite mode.*proj_out"):
        diffusers_ext.apply(dit, TaylorSeerCacheConfig(use_lite_mode=True))
    with pytest.raises(TypeError, match="LayerSkipConfig.*FirstBlockCacheConfig"):
        diffusers_ext.apply(sd3, LayerSkipConfig(indices=[0], fqn="transformer_blocks"))
    with pytest.raises(ValueError, match="Linear"):
        diffusers_ext.apply(torch.nn.Linear(2, 2), FirstBlockCacheConfig())
    assert traces(sd3) == traces(dit) == ({}, set(), False)


def test_preflight_warns_of_runs_that_gain_nothing(make):
    model = make("sd3")
    assert "none of 3" in diffusers_ext.check(model, TaylorSeerCacheConfig(), num_inference_steps=3).warnings[0]
    assert not diffusers_ext.check(model, TaylorSeerCacheConfig(), num_inference_steps=9).warnings
    mag = MagCacheConfig(mag_ratios=[1.0] * 8, num_inference_steps=8)
    assert "other steps" in diffusers_ext.check(model, mag, num_inference_steps=9).warnings[0]


@pytest.mark.parametrize("slug", ["first-block-cache", pytest.param("taylorseer-cache", marks=pytest.mark.slow)])
def test_compiled(make, slug):
    model, config = make("sd3"), _configs()[slug]
    torch._dynamo.reset()
    with diffusers_ext.apply(model, config) as handle:
        expected = _loop(model, "sd3")
        compiled = torch.compile(model, backend="eager")
        torch.testing.assert_close(_loop(compiled, "sd3"), expected, atol=1e-5, rtol=0)
        assert handle.summary()[slug]["reused"] > 0
    torch._dynamo.reset()


def test_lora_before_and_after(make):
    from peft import LoraConfig

    results = []
    for first in (True, False):
        model = make("sd3")
        lora = LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False)
        if first:
            model.add_adapter(lora)
        with diffusers_ext.apply(model, TaylorSeerCacheConfig(cache_interval=3, disable_cache_before_step=2)):
            if not first:
                model.add_adapter(lora)
            for index, (name, parameter) in enumerate(sorted(model.named_parameters())):
                if "lora" in name:
                    torch.manual_seed(index)
                    torch.nn.init.normal_(parameter, std=0.2)
            results.append(_loop(model, "sd3"))
    assert torch.equal(*results)


def _sd3_pipeline(make):
    """The real pipeline on given prompt embeddings, without text encoders and decoder."""
    pipe = StableDiffusion3Pipeline(
        transformer=make("sd3"),
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=None,
        text_encoder=None,
        tokenizer=None,
        text_encoder_2=None,
        tokenizer_2=None,
        text_encoder_3=None,
        tokenizer_3=None,
    )
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    text = {f"{p}prompt_embeds": torch.randn(1, 5, 16, generator=generator) for p in ("", "negative_")}
    text |= {f"{p}pooled_prompt_embeds": torch.randn(1, 16, generator=generator) for p in ("", "negative_")}

    def draw(**kwargs):
        settings = {"num_inference_steps": STEPS, "height": 64, "width": 64, "output_type": "latent"} | kwargs
        return pipe(**text, **settings, generator=torch.Generator().manual_seed(1)).images

    return pipe, draw


def _tiny_vae():
    torch.manual_seed(0)
    return AutoencoderKL(block_out_channels=(4,), norm_num_groups=1, mid_block_add_attention=False)


def _dit_pipeline(make):
    pipe = DiTPipeline(transformer=make("dit"), vae=_tiny_vae(), scheduler=DDIMScheduler())
    pipe.set_progress_bar_config(disable=True)

    def draw(**kwargs):
        generator = torch.Generator().manual_seed(0)
        settings = {"num_inference_steps": STEPS, "generator": generator, "output_type": "np"} | kwargs
        return torch.from_numpy(pipe([1, 2], **settings).images)

    return pipe, draw


def _with_embeddings(pipe, size):
    """Draws latents with a pipeline that takes embeddings and masks of T5 or Gemma."""
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    text = {f"{p}prompt_embeds": torch.randn(1, 5, 16, generator=generator) for p in ("", "negative_")}
    text |= {f"{p}prompt_attention_mask": torch.ones(1, 5) for p in ("", "negative_")}
    text |= {"negative_prompt": None, "use_resolution_binning": False, "output_type": "latent"}

    def draw(**kwargs):
        settings = {"num_inference_steps": STEPS, "height": size, "width": size} | kwargs
        return pipe(**text, **settings, generator=torch.Generator().manual_seed(1)).images

    return pipe, draw


def _pixart_pipeline(make):
    parts = {"tokenizer": None, "text_encoder": None, "vae": _tiny_vae(), "transformer": make("pixart")}
    return _with_embeddings(PixArtAlphaPipeline(**parts, scheduler=DPMSolverMultistepScheduler()), 8)


def _sana_pipeline(make):
    parts = {"tokenizer": None, "text_encoder": None, "vae": None, "transformer": make("sana")}
    scheduler = DPMSolverMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0, final_sigmas_type="zero"
    )
    return _with_embeddings(SanaPipeline(**parts, scheduler=scheduler), 256)


@pytest.mark.parametrize("build", [_sd3_pipeline, _dit_pipeline, _pixart_pipeline, _sana_pipeline])
@pytest.mark.parametrize("slug", _configs())
def test_real_pipelines_that_set_no_context(make, build, slug, traces):
    """Where diffusers alone raises "No cache context is set", or mixes its states, runs are exact and repeatable."""
    pipe, draw = build(make)
    plain, before = draw(), traces(pipe.transformer)
    with diffusers_ext.apply(pipe, _configs()[slug]) as handle:
        first = draw()
        figures = handle.summary()[slug]
        draw(guidance_scale=1.0)
        draw(num_inference_steps=4)
        assert torch.equal(draw(), first)
    assert figures["reused"] > 0 and not torch.equal(first, plain)
    assert traces(pipe.transformer) == before and torch.equal(draw(), plain)


def test_diffusers_alone_raises_on_sd3(make):
    """The limitation that this package removes; if it is gone upstream, say so in docs/apply.md."""
    from diffusers.hooks import apply_first_block_cache

    pipe, draw = _sd3_pipeline(make)
    apply_first_block_cache(pipe.transformer, FirstBlockCacheConfig())
    with pytest.raises(ValueError, match="cache context"):
        draw()


def test_models_that_count_upwards_are_refused():
    """Lumina's pipelines give their model 1 - t: nothing would ever be reused."""
    from diffusers import Lumina2Transformer2DModel

    with torch.device("meta"):
        model = Lumina2Transformer2DModel(num_layers=1, num_refiner_layers=1)
    with pytest.raises(ValueError, match="counts time upwards"):
        diffusers_ext.apply(model, FirstBlockCacheConfig())
