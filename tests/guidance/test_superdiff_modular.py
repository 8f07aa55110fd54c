"""SuperDiffGuidance in a modular Stable Diffusion XL pipeline, held to SuperDiffPipeline on the same weights."""

from __future__ import annotations

import pytest
import torch
from diffusers.guiders import ClassifierFreeGuidance

import diffusers_ext
from diffusers_ext.guidance.superdiff import NoiseStep


@pytest.fixture
def modular(tiny_sdxl):
    pipe = diffusers_ext.SuperDiffStableDiffusionXLBlocks().init_pipeline()
    scheduler = diffusers_ext.SuperDiffEulerScheduler.from_config(tiny_sdxl.scheduler.config)
    parts = {n: getattr(tiny_sdxl, n) for n in tiny_sdxl.components if n not in ("scheduler", "image_encoder")}
    pipe.update_components(scheduler=scheduler, **{n: c for n, c in parts.items() if n in pipe.component_names})
    pipe.set_progress_bar_config(disable=True)
    return pipe


def run_modular(pipe, guider, **kwargs):
    pipe.update_components(guider=guider)
    names = ["latents", "log_likelihoods", "kappas"]
    return pipe(
        prompt="a red circle", prompt_b="a blue square", height=8, width=8, num_inference_steps=6,
        generator=torch.Generator().manual_seed(0), num_images_per_prompt=2, output=names, output_type="latent",
        **kwargs,
    )  # fmt: skip


@pytest.mark.parametrize("operation", ["or", "and", "average"])
@pytest.mark.parametrize("guidance_scale", [1.0, 4.0])
def test_modular_equals_the_pipeline(modular, tiny_sdxl, operation, guidance_scale):
    guider = diffusers_ext.SuperDiffGuidance(operation=operation, guidance_scale=guidance_scale)
    got = run_modular(modular, guider)
    ready = diffusers_ext.SuperDiffPipeline.from_pipe(tiny_sdxl)
    ready.set_progress_bar_config(disable=True)
    expected = ready(
        ["a red circle", "a blue square"], operation=operation, guidance_scale=guidance_scale, height=8, width=8,
        num_inference_steps=6, num_images_per_prompt=2, generator=torch.Generator().manual_seed(0),
        output_type="latent",
    )  # fmt: skip
    torch.testing.assert_close(got["latents"], expected.images, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(got["log_likelihoods"], expected.log_likelihoods, rtol=1e-4, atol=1e-2)
    torch.testing.assert_close(got["kappas"], expected.kappas, rtol=1e-3, atol=1e-3)


def test_second_run_starts_anew(modular):
    guider = diffusers_ext.SuperDiffGuidance(operation="and", guidance_scale=2.0)
    first, second = (run_modular(modular, guider) for _ in range(2))
    assert torch.equal(first["latents"], second["latents"])
    assert second["log_likelihoods"].shape == (2, 2, 7)
    assert torch.equal(first["log_likelihoods"], second["log_likelihoods"])


def test_another_guider_is_refused(modular):
    with pytest.raises(ValueError, match="SuperDiffGuidance"):
        run_modular(modular, ClassifierFreeGuidance())


def test_average_alone_needs_no_step():
    guider = diffusers_ext.SuperDiffGuidance(operation="average", guidance_scale=1.0)
    a, b = torch.randn(2, 3, 4), torch.randn(2, 3, 4)
    torch.testing.assert_close(guider.forward(a, b).pred, (a + b) / 2)
    with pytest.raises(RuntimeError, match="SuperDiffStableDiffusionXLBlocks"):
        diffusers_ext.SuperDiffGuidance(operation="or", guidance_scale=1.0).forward(a, b)


def test_disabled_is_the_first_prompt():
    guider = diffusers_ext.SuperDiffGuidance(enabled=False)
    fields = {"x": (torch.zeros(1), torch.ones(1), torch.ones(1))}
    assert guider.num_conditions == 1
    assert [b.x.item() for b in guider.prepare_inputs(fields)] == [0.0]
    guider.enable()
    assert guider.num_conditions == 3
    assert guider.new(guidance_scale=1.0, enabled=True).num_conditions == 2


def test_a_window_limits_the_mix():
    guider = diffusers_ext.SuperDiffGuidance(start=0.5, guidance_scale=1.0)
    counts = []
    for i in range(4):
        guider.set_state(step=i, num_inference_steps=4, timestep=torch.tensor(0))
        counts.append(guider.num_conditions)
    assert counts == [1, 1, 2, 2]


def test_guider_sees_densities_of_unguided_predictions():
    """The log densities do not depend on what guidance does to the step beyond the step itself."""
    x, noise = torch.randn(1, 6, dtype=torch.float64), torch.zeros(1, 6, dtype=torch.float64)
    step = NoiseStep(x, noise, 2.0, 1.9, "epsilon")
    a, b, u = (torch.randn(1, 6, dtype=torch.float64) for _ in range(3))
    guider = diffusers_ext.SuperDiffGuidance(operation="average", guidance_scale=5.0)
    guider.begin_step(step)
    pred = guider.forward(a, b, u).pred
    dx = -0.2 * pred
    expected = torch.stack([-(0.1 / 2) * (v * v).sum() - (dx * v).sum() / 2 for v in (a, b)])
    torch.testing.assert_close(guider.superposition.log_likelihoods[:, 0, -1], expected)


def test_ode_is_refused():
    with pytest.raises(ValueError, match="SuperDiffPipeline"):
        diffusers_ext.SuperDiffGuidance(operation="and_ode")
