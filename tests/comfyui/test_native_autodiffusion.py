from __future__ import annotations

import diffusers
import pytest
import torch

import diffusers_ext
from diffusers_ext import ScheduleSearchResult, apply_schedule, skippable_blocks, zoo
from diffusers_ext.prediction import NoiseSchedule, from_x0
from diffusers_ext.schedulers._native import native_schedule
from diffusers_ext.schedulers.autodiffusion import sigmas_of
from diffusers_ext.zoo.analytic import GaussianMixture


pytestmark = pytest.mark.comfy
MIXTURE = GaussianMixture(torch.randn(3, 4, 16, 16, generator=torch.Generator().manual_seed(0)), variances=0.1)
TWENTY = (999, 961, 905, 850, 811, 760, 702, 655, 601, 540, 498, 455, 402, 350, 299, 240, 180, 121, 60, 11)


@pytest.fixture
def folders(comfy, monkeypatch, tmp_path):
    """ComfyUI's models and output folders, empty ones."""
    import folder_paths

    monkeypatch.setattr(folder_paths, "models_dir", str(tmp_path / "models"))
    monkeypatch.setattr(folder_paths, "get_output_directory", lambda: str(tmp_path / "output"))
    return tmp_path


def result_of(model, timesteps, **options) -> ScheduleSearchResult:
    where = native_schedule(model.get_model_object("model_sampling"))
    return ScheduleSearchResult(timesteps, sigmas_of(timesteps, where), **options)


@pytest.mark.parametrize("steps", [5, 8, 10, 20])
@pytest.mark.parametrize("name", ["shapes-unet", "shapes-dit"])
def test_same_latents_as_the_scheduler(comfy, dx_nodes, native_pipe, sample_analytic, name, steps):
    """Euler on the loaded noise levels: ComfyUI's own sampler beside diffusers' Euler with `apply_schedule`."""
    model, times = native_pipe(name)[0], TWENTY[:: 20 // steps][:steps]
    found = result_of(model, times)
    sigmas = dx_nodes["DXLoadSearchedSigmas"].execute("", found).result[0]
    noise = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(1))
    flow = name == "shapes-dit"
    config = zoo.load("shapes-unet").scheduler.config
    scheduler = (
        diffusers.FlowMatchEulerDiscreteScheduler()
        if flow
        else diffusers.EulerDiscreteScheduler.from_config(config, prediction_type="epsilon")
    )
    apply_schedule(scheduler, found)
    torch.testing.assert_close(scheduler.sigmas, sigmas, rtol=1e-5, atol=1e-5)
    level, kind = float(sigmas[0]), "flow_prediction" if flow else "epsilon"
    start = noise * level if flow else noise * (1 + level**2) ** 0.5
    native = sample_analytic(comfy.samplers.sampler_object("euler"), sigmas, start / level, MIXTURE, name)
    x = start
    for i, t in enumerate(scheduler.timesteps):
        s = float(scheduler.sigmas[i])
        alpha = 1 - s if flow else 1.0
        output = from_x0(MIXTURE.denoise(x, alpha, s), x.double(), alpha, s, kind if flow else "epsilon").float()
        if not flow:
            scheduler.scale_model_input(x, t)
        x = scheduler.step(output, t, x).prev_sample
    assert (native - x).abs().max() < 1e-5 * max(1.0, level)


@pytest.mark.parametrize("name, twin", [("shapes-unet", "unet"), ("shapes-dit", "transformer")])
def test_same_blocks_under_the_same_names(native_pipe, name, twin):
    module = __import__("comfy_nodes.schedulers_autodiffusion", fromlist=["skippable"])
    native = module.skippable(native_pipe(name)[0])
    assert set(native) == set(skippable_blocks(getattr(zoo.load(name), twin)))


@pytest.mark.parametrize("blocks", [(), ("mid_block.attentions.0", "down_blocks.0.resnets.0"), None])
def test_the_unet_without_blocks_is_that_of_diffusers(comfy, dx_nodes, native_pipe, encode, blocks):
    """Every call of the network in a run through ComfyUI's KSampler, repeated with diffusers."""
    model, clip, _ = native_pipe("shapes-unet")
    unet, log = zoo.load("shapes-unet").unet, []
    blocks = tuple(skippable_blocks(unet)) if blocks is None else blocks
    outer = model.clone()

    def record(executor, x, timesteps, context, *rest, **kwargs):
        log.append((x.clone(), timesteps.clone(), context.clone(), executor(x, timesteps, context, *rest, **kwargs)))
        return log[-1][-1]

    outer.add_wrapper_with_key(comfy.patcher_extension.WrappersMP.DIFFUSION_MODEL, "recorder", record)
    times = (937, 611, 402, 101)
    found = result_of(model, times, skip_blocks=((), blocks, (), blocks))
    patched = dx_nodes["DXApplyBlockSkipSchedule"].execute(outer, "", found).result[0]
    cond, latent = encode(clip, "a red circle"), {"samples": torch.zeros(1, 4, 16, 16)}
    sampler, sigmas = comfy.samplers.sampler_object("euler"), torch.tensor(found.sigmas)

    def sample(which):
        guider = comfy.samplers.CFGGuider(which)
        guider.set_conds(cond, encode(clip, ""))
        guider.set_cfg(3.0)
        noise = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0))
        return guider.sample(noise, latent["samples"], sampler, sigmas)

    before = sample(model)
    changed = sample(patched)
    assert torch.equal(sample(model), before) and torch.equal(changed, before) == (not blocks)
    assert not any("forward" in vars(m) for m in model.model.diffusion_model.modules())
    state = NoiseSchedule.from_scheduler(zoo.load("shapes-unet").scheduler)
    twin = ScheduleSearchResult(times, sigmas_of(times, state), found.skip_blocks)
    with torch.no_grad(), diffusers_ext.apply(unet, twin):
        for x, t, context, out in log:
            torch.testing.assert_close(unet(x, t.round(), context).sample, out, atol=2e-4, rtol=1e-3)
    assert len(log) >= 4


def test_flux_without_blocks_is_that_of_diffusers(comfy, dx_nodes, native_pipe, encode):
    model, clip, _ = native_pipe("shapes-dit")
    names = ("transformer_blocks.1", "single_transformer_blocks.2")
    found = result_of(model, (900, 500), skip_blocks=(names, ()))
    pipe = zoo.load("shapes-dit")
    prompt = "a red circle"

    def native(which):
        guider = comfy.samplers.CFGGuider(which)
        guider.set_conds(encode(clip, prompt), [])
        guider.set_cfg(1.0)
        noise = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0))
        sampler = comfy.samplers.sampler_object("euler")
        return guider.sample(noise, torch.zeros_like(noise), sampler, torch.tensor(found.sigmas))

    ours = [native(m) for m in (model, dx_nodes["DXApplyBlockSkipSchedule"].execute(model, "", found).result[0])]
    noise = 0.9 * torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    packed = pipe._pack_latents(noise, *noise.shape)
    apply_schedule(pipe.scheduler, found)

    def theirs():
        out = pipe(
            prompt, height=64, width=64, num_inference_steps=2, guidance_scale=1.0, latents=packed.clone(),
            max_sequence_length=20, output_type="latent",
        ).images  # fmt: skip
        latents = pipe._unpack_latents(out, 64, 64, pipe.vae_scale_factor)
        return latents / pipe.vae.config.scaling_factor + (pipe.vae.config.shift_factor or 0)

    plain = theirs()
    with diffusers_ext.apply(pipe.transformer, found):
        skipped = theirs()
    for a, b in zip(ours, (plain, skipped)):
        torch.testing.assert_close(a, b, atol=2e-3, rtol=1e-2)
    assert (ours[0] - ours[1]).abs().max() > 0.01


def test_search_saves_loads_and_resumes(comfy, dx_nodes, native_pipe, encode, folders, monkeypatch):
    model, clip, _ = native_pipe("shapes-unet")
    cond, latent = encode(clip, "a red circle"), {"samples": torch.zeros(1, 4, 16, 16)}
    node, sampler = dx_nodes["DXSearchSigmas"], comfy.samplers.sampler_object("euler")
    module = __import__("comfy_nodes.schedulers_autodiffusion", fromlist=["comfy"])
    shown, stop_at = [], [7]

    class Bar:
        def __init__(self, total):
            self.total = total

        def update_absolute(self, value):
            shown.append((value, self.total))
            if value == stop_at[0]:
                raise InterruptedError

    monkeypatch.setattr(module.comfy.utils, "ProgressBar", Bar)
    arguments = (model, cond, cond, latent, sampler, 1.0, 2, 20, 0.3, 0, "mine")
    with pytest.raises(InterruptedError):
        node.execute(*arguments)
    state = folders / "output/schedules/mine.search"
    assert state.is_file() and not (folders / "output/schedules/mine.json").exists()
    stop_at[0] = 0
    sigmas, found, report = node.execute(*arguments).result
    assert (
        not state.exists()
        and [n for n, _ in shown] == list(range(1, len(shown) + 1))
        and len(shown) <= shown[0][1] == 20
    )
    assert ScheduleSearchResult.load(folders / "output/schedules/mine.json") == found
    assert len(sigmas) == 3 and "2 steps" in report
    assert torch.equal(dx_nodes["DXLoadSearchedSigmas"].execute("mine.json").result[0], sigmas)
    patched = dx_nodes["DXApplyBlockSkipSchedule"].execute(model, "mine.json").result[0]
    assert patched is not model
    for bad in ("../x", "a/b", "", ".hidden", "a\\b"):
        assert node.validate_inputs(bad) is not True
    with pytest.raises(ValueError, match="no searched schedule"):
        dx_nodes["DXLoadSearchedSigmas"].execute("../output/schedules/mine.json")


def test_models_and_blocks_that_do_not_fit(dx_nodes, native_pipe, tiny_pipe):
    model = native_pipe("shapes-unet")[0]
    bad = result_of(model, (900,), skip_blocks=(("down_blocks.1.resnets.0",),))
    with pytest.raises(ValueError, match="'down_blocks.1.resnets.0'"):
        dx_nodes["DXApplyBlockSkipSchedule"].execute(model, "", bad)
    with pytest.raises(ValueError, match="only UNets and Flux"):
        dx_nodes["DXApplyBlockSkipSchedule"].execute(tiny_pipe("sd3")[0], "", bad)
