"""SuperDiffPipeline on the shipped models: layouts, batches, callbacks, reload, refusals, and what it draws."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from diffusers import (
    DDIMPipeline,
    DDIMScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    HeunDiscreteScheduler,
)

import diffusers_ext
from diffusers_ext import SuperDiffEulerScheduler, SuperDiffPipeline, zoo


PROMPTS = ["a red circle", "a blue square"]
FLUX = {"height": 64, "width": 64, "max_sequence_length": 20}


def quiet(pipe):
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(params=["unet", "dit"])
def made(request, shapes_unet, shapes_dit):
    """A SuperDiff pipeline with a function that calls it for latents."""
    source, extra = (shapes_unet, {}) if request.param == "unet" else (shapes_dit, FLUX)
    pipe = quiet(SuperDiffPipeline.from_pipe(source))

    def call(prompts=PROMPTS, seed=0, **kwargs):
        settings = {
            "num_inference_steps": 8,
            "guidance_scale": 3.0,
            "output_type": "latent",
            "generator": torch.Generator().manual_seed(seed),
        }
        return pipe(prompts, **{**settings, **extra, **kwargs})

    return pipe, call


@pytest.mark.parametrize("operation", ["or", "and", "and_ode", "average"])
def test_shapes_of_the_answer(made, operation):
    _, call = made
    out = call(operation=operation, num_images_per_prompt=2, num_inference_steps=3, output_type="pil")
    assert len(out.images) == 2 and out.images[0].size == (64, 64)
    assert out.log_likelihoods.shape == (2, 2, 4)
    assert out.kappas.shape == (2, 2, 3)
    assert out.log_likelihoods.isfinite().all() and out.kappas.isfinite().all()
    torch.testing.assert_close(out.kappas.sum(0), torch.ones(2, 3, dtype=torch.float64))


@pytest.mark.parametrize("operation", ["or", "and", "and_ode"])
def test_batch_equals_singles(made, operation):
    _, call = made
    seeds = [3, 4]
    together = call(
        operation=operation,
        num_inference_steps=4,
        num_images_per_prompt=2,
        generator=[torch.Generator().manual_seed(s) for s in seeds],
    )
    alone = [call(operation=operation, num_inference_steps=4, seed=s) for s in seeds]
    torch.testing.assert_close(together.images, torch.cat([o.images for o in alone]), atol=2e-3, rtol=1e-3)
    torch.testing.assert_close(together.kappas, torch.cat([o.kappas for o in alone], 1), atol=2e-3, rtol=1e-3)


def test_lists_of_captions_are_a_batch_of_mixes(made):
    _, call = made
    pairs = [["a red circle", "a green star"], ["a blue square", "a white ring"]]
    generators = [torch.Generator().manual_seed(s) for s in (1, 2)]
    together = call(pairs, operation="and", generator=generators)
    second = call(["a green star", "a white ring"], operation="and", seed=2)
    torch.testing.assert_close(together.images[1:], second.images, atol=2e-3, rtol=1e-3)


def test_runs_do_not_leak_into_each_other(made):
    _, call = made
    first, _, again = call(operation="or"), call(operation="and", num_inference_steps=5), call(operation="or")
    assert torch.equal(first.images, again.images)
    assert torch.equal(first.log_likelihoods, again.log_likelihoods)


def test_equal_prompts_are_the_plain_sampler(shapes_unet):
    """The same prompt twice equals StableDiffusionPipeline with our scheduler, to the accuracy of batching."""
    pipe = quiet(SuperDiffPipeline.from_pipe(shapes_unet))
    settings = {"guidance_scale": 3.0, "num_inference_steps": 10, "output_type": "latent"}
    mixed = pipe([PROMPTS[0]] * 2, operation="and", generator=torch.Generator().manual_seed(0), **settings)
    plain = zoo.load("shapes-unet")
    plain.scheduler = SuperDiffEulerScheduler.from_config(plain.scheduler.config)
    expected = plain(PROMPTS[0], generator=torch.Generator().manual_seed(0), **settings).images
    torch.testing.assert_close(mixed.images, expected, atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(mixed.kappas, torch.full_like(mixed.kappas, 0.5))


def test_the_same_model_as_second_denoiser_changes_nothing(shapes_unet):
    settings = {"guidance_scale": 2.0, "num_inference_steps": 5, "output_type": "latent", "operation": "and"}
    first = quiet(SuperDiffPipeline.from_pipe(shapes_unet))
    second = quiet(SuperDiffPipeline.from_pipe(shapes_unet, denoiser_b=shapes_unet.unet))
    images = [p(PROMPTS, generator=torch.Generator().manual_seed(0), **settings).images for p in (first, second)]
    assert torch.equal(*images)


def test_second_denoiser_answers_the_second_prompt(shapes_unet):
    """OR with a bias of +-1e6 is one model alone, whichever it is."""
    other = zoo.load("shapes-unet").unet
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.01)
    pipe = quiet(SuperDiffPipeline.from_pipe(shapes_unet, denoiser_b=other))
    alone = zoo.load("shapes-unet")
    alone.unet = other
    lone = quiet(SuperDiffPipeline.from_pipe(alone))
    settings = {"guidance_scale": 1.0, "num_inference_steps": 5, "output_type": "latent", "operation": "or"}

    def run(p, prompts, logp):
        return p(prompts, logp=logp, generator=torch.Generator().manual_seed(0), **settings).images

    torch.testing.assert_close(run(pipe, PROMPTS, -1e6), run(lone, PROMPTS, -1e6))
    assert not torch.allclose(
        run(pipe, PROMPTS, -1e6), run(quiet(SuperDiffPipeline.from_pipe(shapes_unet)), PROMPTS, -1e6)
    )


def test_three_prompts(made):
    _, call = made
    out = call([*PROMPTS, "a green star"], operation="and")
    final = out.log_likelihoods[:, 0, -1]
    assert final.max() - final.min() < 1e-3 * final.abs().max()
    assert call([*PROMPTS, "a green star"], operation="or", logp=[0.0, 0.0, 1e6]).kappas[2].min() == 1


def test_final_noise_can_be_left_out(made):
    _, call = made
    with_noise, without = call(operation="and"), call(operation="and", final_noise=False)
    assert torch.equal(with_noise.log_likelihoods[..., :-1], without.log_likelihoods[..., :-1])
    assert torch.equal(without.log_likelihoods[..., -1], without.log_likelihoods[..., -2])
    assert not torch.equal(with_noise.images, without.images)


def test_callback_sees_and_changes_the_run(made):
    pipe, call = made
    seen = []

    def watch(p, i, t, tensors):
        seen.append((i, tensors["kappa"].shape, tensors["log_q"].shape))
        p._interrupt = i == 2
        return {"latents": torch.zeros_like(tensors["latents"])} if i == 2 else {}

    names = ["latents", "kappa", "log_q"]
    out = call(operation="or", callback_on_step_end=watch, callback_on_step_end_tensor_inputs=names)
    assert [s[0] for s in seen] == [0, 1, 2]
    assert seen[0][1:] == ((2, 1), (2, 1))
    assert out.images.abs().max() == 0
    assert out.kappas.shape[-1] == 3


def test_progress_bar_counts_steps(made, capsys):
    pipe, call = made
    pipe.set_progress_bar_config(disable=False)
    call(num_inference_steps=3)
    pipe.set_progress_bar_config(disable=True)
    assert "3/3" in capsys.readouterr().err


def test_no_guidance_calls_the_network_once_per_prompt(made):
    pipe, call = made
    model, calls = pipe.unet or pipe.transformer, []
    hook = model.register_forward_hook(lambda *_: calls.append(1))
    try:
        for scale, expected in ((1.0, 2), (3.0, 3)):
            calls.clear()
            call(num_inference_steps=4, guidance_scale=scale)
            assert len(calls) == 4 * expected
    finally:
        hook.remove()


def test_a_deterministic_scheduler_runs_the_ode(made):
    pipe, call = made
    other = FlowMatchEulerDiscreteScheduler() if pipe.transformer else EulerDiscreteScheduler.from_config(
        pipe.scheduler.config, prediction_type="v_prediction", timestep_spacing="trailing"
    )  # fmt: skip
    pipe.scheduler = other
    out = call(operation="and_ode")
    final = out.log_likelihoods[:, 0, -1]
    assert (final[0] - final[1]).abs() < 1e-4 * final.abs().max()
    for operation in ("and", "or", "average"):
        with pytest.raises(ValueError, match="'and_ode'"):
            call(operation=operation)


@pytest.mark.parametrize("scheduler", [DDIMScheduler(), HeunDiscreteScheduler()], ids=lambda s: type(s).__name__)
def test_schedulers_without_usable_sigmas_are_refused(shapes_unet, scheduler):
    pipe = quiet(SuperDiffPipeline.from_pipe(shapes_unet))
    pipe.scheduler = scheduler
    with pytest.raises(ValueError, match="sigmas"):
        pipe(PROMPTS, operation="and_ode", num_inference_steps=2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prompts": "a red circle"}, "list of two or more prompts"),
        ({"prompts": ["a red circle"]}, "two or more"),
        ({"prompts": [["a", "b"], ["c"]]}, "as many captions"),
        ({"negative_prompt": ["a", "b"]}, "negative_prompt"),
        ({"operation": "xor"}, "unknown operation 'xor'"),
        ({"temperature": -1.0}, "temperature"),
        ({"callback_on_step_end_tensor_inputs": ["nothing"]}, "nothing"),
    ],
)
def test_bad_calls_are_refused_before_any_work(shapes_unet, arguments, message):
    pipe = quiet(SuperDiffPipeline.from_pipe(shapes_unet))
    calls = []
    hook = pipe.unet.register_forward_hook(lambda *_: calls.append(1))
    with pytest.raises(ValueError, match=message):
        pipe(**{"prompts": PROMPTS, "num_inference_steps": 2, **arguments})
    hook.remove()
    assert not calls


def test_only_known_pipelines(shapes_unet, shapes_dit):
    with pytest.raises(ValueError, match="StableDiffusionPipeline"):
        SuperDiffPipeline.from_pipe(DDIMPipeline(shapes_unet.unet, DDIMScheduler()))
    with pytest.raises(ValueError, match="denoiser_b"):
        SuperDiffPipeline.from_pipe(shapes_unet, denoiser_b=shapes_dit.transformer)


def test_from_pipe_leaves_the_source_alone(shapes_unet):
    before = shapes_unet.scheduler
    pipe = SuperDiffPipeline.from_pipe(shapes_unet)
    assert shapes_unet.scheduler is before and pipe.unet is shapes_unet.unet
    assert SuperDiffPipeline.from_pipe(pipe).scheduler is pipe.scheduler


RELOAD = """
import sys, torch, diffusers_ext
from diffusers import DiffusionPipeline
pipe = DiffusionPipeline.from_pretrained(sys.argv[1])
pipe.set_progress_bar_config(disable=True)
extra = {"height": 64, "width": 64, "max_sequence_length": 20} if pipe.transformer else {}
out = pipe(["a red circle", "a blue square"], operation="and", num_inference_steps=4, output_type="latent",
           generator=torch.Generator().manual_seed(0), **extra)
torch.save([out.images, out.log_likelihoods], sys.argv[2])
"""


@pytest.mark.parametrize("made", ["unet", "dit"], indirect=True)
def test_save_and_reload_in_a_fresh_process(made, tmp_path):
    pipe, call = made
    pipe.save_pretrained(tmp_path / "saved")
    command = [sys.executable, "-c", RELOAD, str(tmp_path / "saved"), str(tmp_path / "out.pt")]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    images, log_likelihoods = torch.load(tmp_path / "out.pt")
    here = call(operation="and", num_inference_steps=4, guidance_scale=7.5)
    assert torch.equal(images, here.images)
    assert torch.equal(log_likelihoods, here.log_likelihoods)
    assert "not expected" not in result.stderr


def test_scheduler_serves_as_a_plain_sampler_for_img2img_noise():
    scheduler = SuperDiffEulerScheduler(prediction_type="flow_prediction")
    scheduler.set_timesteps(20)
    x0, noise = torch.randn(2, 4), torch.randn(2, 4)
    t = scheduler.timesteps[5].repeat(2)
    s = float(scheduler.sigmas[5])
    torch.testing.assert_close(scheduler.add_noise(x0, noise, t), (1 - s) * x0 + s * noise, rtol=1e-5, atol=1e-5)


def pick(images: torch.Tensor) -> torch.Tensor:
    """Index of the prompt each picture shows by the judge's shape and colour, -1 for neither."""
    seen = zoo.load_judge().read(images * 2 - 1)[:, 3:5]
    wanted = torch.tensor([zoo.parse(p)[3:5] for p in PROMPTS])
    hits = (seen[:, None] == wanted).all(-1)
    return torch.where(hits.any(1), hits.int().argmax(1), -1)


@pytest.mark.slow
def test_or_draws_either_prompt(shapes_unet):
    pipe = quiet(SuperDiffPipeline.from_pipe(shapes_unet))
    for logp, low, high in ((0.0, 0.35, 0.65), (1000.0, 0.9, 1.0)):
        out = pipe(
            PROMPTS, operation="or", guidance_scale=3.0, num_inference_steps=50, logp=logp, output_type="pt",
            num_images_per_prompt=64, generator=[torch.Generator().manual_seed(s) for s in range(64)],
        )  # fmt: skip
        chosen = pick(out.images)
        assert (chosen >= 0).float().mean() > 0.7
        assert low <= (chosen[chosen >= 0] == 0).float().mean() <= high


def test_public_names_load_lazily():
    names = ("SuperDiffEulerScheduler", "SuperDiffGuidance", "SuperDiffPipeline", "SuperDiffStableDiffusionXLBlocks")
    assert all(getattr(diffusers_ext, name).__doc__ for name in names)
