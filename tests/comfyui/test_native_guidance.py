"""SuperDiff in ComfyUI: the same latents as the diffusers pipeline from the same noise, and clear refusals."""

from __future__ import annotations

import importlib
from types import SimpleNamespace

import pytest
import torch
from diffusers import FluxPipeline

from diffusers_ext import SuperDiffEulerScheduler, SuperDiffPipeline, zoo


pytestmark = pytest.mark.comfy
PROMPTS = ["a red circle", "a blue square"]
STEPS, BATCH = 16, 2


@pytest.fixture(scope="module")
def custom(comfy):
    return importlib.import_module("comfy_extras.nodes_custom_sampler")


@pytest.fixture
def sample(comfy, dx_nodes, native_pipe, encode, custom):
    """SamplerCustomAdvanced with our nodes: returns latents in the model's scale and the guider."""

    def run(
        name, operation="and", cfg=3.0, noises=None, sigmas=None, guider=None, sampler=None, model_b=None, **options
    ):
        model, clip, _ = native_pipe(name)
        texts = [encode(clip, t) for t in (*PROMPTS, "")]
        settings = (options.get("temperature", 1.0), options.get("bias", 0.0), options.get("lift", 0.0))
        make = dx_nodes["DXSuperDiffGuider"].execute
        guider = guider or make(model, *texts, operation, cfg, *settings, model_b).args[0]
        sampler = sampler or dx_nodes["DXSamplerSuperDiff"].execute(options.get("final_noise", True)).args[0]
        if noises is not None:
            rest = iter(noises[1:])
            sampler.extra_options["noise_sampler"] = lambda sigma, after: next(rest)
            noise = SimpleNamespace(seed=0, generate_noise=lambda latent: noises[0])
        else:
            noise = custom.RandomNoise.execute(options.get("seed", 0)).args[0]
        if sigmas is None:
            sigmas = dx_nodes["DXSuperDiffSigmas"].execute(model, options.get("steps", STEPS)).args[0]
        latent = {"samples": torch.zeros(BATCH, 4, 16, 16)}
        with torch.inference_mode():
            out = custom.SamplerCustomAdvanced.execute(noise, guider, sampler, sigmas, latent).args[0]
        samples = model.model.process_latent_in(out["samples"])
        return samples, guider, out

    return run


def drawn_noise(seed=0):
    """The noise SuperDiffPipeline draws from one generator: the start, then one draw per step."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(BATCH, 4, 16, 16, generator=generator) for _ in range(STEPS + 1)]


class TableScheduler(SuperDiffEulerScheduler):
    """Our scheduler on given noise levels and ComfyUI's whole timesteps."""

    def set_timesteps(self, num_inference_steps, device=None, mu=None):
        super().set_timesteps(num_inference_steps, device)
        if num_inference_steps == STEPS:
            self.timesteps, self.sigmas = self.given


@pytest.fixture
def table(native_pipe):
    """(sigmas, timesteps) that fall on trained timesteps, where both sides agree exactly."""
    sampling = native_pipe("shapes-unet")[0].get_model_object("model_sampling")
    timesteps = torch.linspace(999, 10, STEPS).round()
    return torch.cat([sampling.sigmas[timesteps.long()], torch.zeros(1)]).double(), timesteps


# OR at cfg 1: with strong guidance its choice between the prompts magnifies rounding (measured up to 1e-3).
@pytest.mark.parametrize(("operation", "cfg"), [("or", 1.0), ("and", 3.0), ("average", 3.0)])
@pytest.mark.parametrize("final_noise", [True, False])
def test_unet_equals_diffusers(sample, table, operation, cfg, final_noise):
    sigmas, timesteps = table
    noises = drawn_noise()
    pipe = SuperDiffPipeline.from_pipe(zoo.load("shapes-unet"))
    pipe.set_progress_bar_config(disable=True)
    TableScheduler.given = (timesteps, sigmas)
    pipe.scheduler = TableScheduler(**dict(pipe.scheduler.config))
    expected = pipe(
        PROMPTS, operation=operation, guidance_scale=cfg, num_inference_steps=STEPS, num_images_per_prompt=BATCH,
        final_noise=final_noise, generator=torch.Generator().manual_seed(0), output_type="latent",
    )  # fmt: skip
    got, guider, _ = sample(
        "shapes-unet", operation, cfg, noises=noises, sigmas=sigmas.float(), final_noise=final_noise
    )
    torch.testing.assert_close(got, expected.images, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(guider.mix.kappas, expected.kappas, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize(("operation", "cfg"), [("or", 1.0), ("and", 3.0)])
def test_flux_equals_diffusers(sample, operation, cfg):
    """Flow models: continuous time, so the nodes' own noise levels serve both sides."""
    noises = drawn_noise()
    pipe = SuperDiffPipeline.from_pipe(zoo.load("shapes-dit"))
    pipe.set_progress_bar_config(disable=True)
    packed = iter([FluxPipeline._pack_latents(n, BATCH, 4, 16, 16) for n in noises[1:]])
    module = importlib.import_module("diffusers_ext.guidance.superdiff_pipeline")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "randn_tensor", lambda *_, **__: next(packed))
        expected = pipe(
            PROMPTS, operation=operation, guidance_scale=cfg, num_inference_steps=STEPS, num_images_per_prompt=BATCH,
            latents=FluxPipeline._pack_latents(noises[0], BATCH, 4, 16, 16), height=64, width=64,
            max_sequence_length=20, output_type="latent",
        )  # fmt: skip
    got, guider, _ = sample("shapes-dit", operation, cfg, noises=noises)
    unpacked = FluxPipeline._unpack_latents(expected.images, 64, 64, 4)
    torch.testing.assert_close(got, unpacked, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(guider.mix.log_likelihoods, expected.log_likelihoods, atol=1e-2, rtol=1e-4)


def test_second_model_is_used(sample, native_pipe):
    """The first model again changes nothing; with all weight on B the result is B's alone."""
    model = native_pipe("shapes-unet")[0]
    alone, twice = (sample("shapes-unet", "and", model_b=m)[0] for m in (None, model))
    torch.testing.assert_close(twice, alone, atol=1e-4, rtol=1e-4)
    other = model.clone()
    other.set_model_unet_function_wrapper(
        lambda apply, args: 0.9 * apply(args["input"], args["timestep"], **args["c"])
    )
    mixed = [sample("shapes-unet", "or", cfg=1.0, bias=-1e6, model_b=m)[0] for m in (None, other)]
    assert not torch.allclose(*mixed, atol=1e-3)


def test_a_second_run_starts_anew(sample):
    first, guider, _ = sample("shapes-unet", "or")
    again, guider, _ = sample("shapes-unet", "or", guider=guider)
    assert torch.equal(first, again)
    assert guider.mix.kappas.shape == (2, BATCH, STEPS)


def test_report(sample, dx_nodes):
    _, guider, latent = sample("shapes-unet", "and", lift=2.0)
    node = dx_nodes["DXSuperDiffReport"].execute(guider, latent)
    assert node.args[0] is latent
    lines = node.ui.value.splitlines()
    assert len(lines) == BATCH
    assert all("A -2.00, B 0.00 nats" in line for line in lines)


def test_core_guiders_are_refused(sample, comfy, native_pipe, encode, custom):
    model, clip, _ = native_pipe("shapes-unet")
    basic = custom.BasicGuider.execute(model, encode(clip, "a red circle")).args[0]
    with pytest.raises(ValueError, match="SuperDiff Guider"):
        sample("shapes-unet", guider=basic)


def test_core_samplers_are_refused(sample, comfy):
    with pytest.raises(RuntimeError, match="SuperDiff Sampler"):
        sample("shapes-unet", sampler=comfy.samplers.ksampler("euler"))


def test_coarse_noise_levels_are_refused(sample, comfy, native_pipe):
    sampling = native_pipe("shapes-dit")[0].get_model_object("model_sampling")
    with pytest.raises(ValueError, match="SuperDiff Sigmas"):
        sample("shapes-dit", sigmas=comfy.samplers.calculate_sigmas(sampling, "simple", 20))


def test_sigmas_cover_the_models_range(dx_nodes, native_pipe):
    for name in ("shapes-unet", "shapes-dit"):
        model = native_pipe(name)[0]
        sigmas = dx_nodes["DXSuperDiffSigmas"].execute(model, 50).args[0]
        assert sigmas.shape == (51,) and sigmas[-1] == 0
        assert (sigmas[:-1] > sigmas[1:]).all()
    assert sigmas[0] < 1
    sampling = native_pipe("shapes-unet")[0].get_model_object("model_sampling")
    sigmas = dx_nodes["DXSuperDiffSigmas"].execute(native_pipe("shapes-unet")[0], 50).args[0]
    torch.testing.assert_close(sigmas[[0, -2]], torch.tensor([float(sampling.sigma_max), float(sampling.sigma_min)]))
