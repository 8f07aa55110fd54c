"""Training data on top of a shipped pipeline, and its loss."""

from __future__ import annotations

import pytest
import torch

from diffusers_ext.training.denoising import task_of
from diffusers_ext.training.fitting import Draws
from diffusers_ext.training.shapes import denoising_loss, encode_images, shapes_set


@pytest.mark.parametrize("name", ["shapes_unet", "shapes_unet_eps", "shapes_dit"])
def test_the_shipped_models_have_a_small_loss_on_their_own_data(name, request):
    pipe = request.getfixturevalue(name)
    data = shapes_set(pipe, 16)
    assert len(data) == 16 and data.latents.shape == (16, 4, 16, 16)
    assert all(len(states) == 17 for states in data.text.values())
    assert data.latents.std() == pytest.approx(1, abs=0.15)
    model = getattr(pipe, "unet", None) or pipe.transformer
    rows = torch.arange(16)
    with torch.no_grad():
        right = denoising_loss(task_of(pipe), model, data, rows, Draws(0, 0, 16, "cpu"))
        torch.manual_seed(0)
        shuffled = {key: states.roll(5, 0) for key, states in data.text.items()}
        wrong = type(data)(data.scenes, data.latents, shuffled)
        misread = denoising_loss(task_of(pipe), model, wrong, rows, Draws(0, 0, 16, "cpu"))
    assert right < 0.5 * misread


def test_text_and_latents_are_those_of_the_pipeline(shapes_unet):
    data = shapes_set(shapes_unet, 3)
    empty = shapes_unet.encode_prompt([""], "cpu", 1, False)[0]
    assert torch.equal(data.text["clip"][:1], empty)
    decoded = shapes_unet.vae.decode(data.latents / shapes_unet.vae.config.scaling_factor).sample
    assert (decoded - data.scenes.images).square().mean() < 1e-3


def test_pictures_may_be_changed_before_they_are_encoded(shapes_unet):
    seen = []

    def darker(images, start):
        seen.append((start, len(images)))
        return images - 0.5

    data = shapes_set(shapes_unet, 70, change=darker)
    assert seen == [(0, 64), (64, 6)]
    assert torch.allclose(data.latents[:4], encode_images(shapes_unet, data.scenes.images[:4] - 0.5), atol=1e-4)
