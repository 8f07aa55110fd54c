"""UniCon in ComfyUI: what the nodes draw is what the pipeline draws, modes, files, messages."""

from __future__ import annotations

import pytest
import torch

from diffusers_ext import UniConAdapter, UniConPipeline, zoo


pytestmark = pytest.mark.comfy
FILE = "unicon-depth-shapes-unet.safetensors"
CAPTION = "a large red circle left of a small yellow star, plain blue background"
SETTINGS = {
    "prompt": CAPTION, "y_prompt": CAPTION, "seed": 3, "steps": 4, "cfg": 3.0, "joint_scale": 1.0,
    "cond_guidance": 0.0, "image_strength": 1.0, "cond_strength": 0.0, "width": 64, "height": 64,
}  # fmt: skip


@pytest.fixture(scope="module")
def unicon(dx_nodes):
    return dx_nodes["DXUniConLoader"].execute("shapes-unet", FILE).args[0]


@pytest.fixture(scope="module")
def sample(dx_nodes, unicon):
    return lambda **options: dx_nodes["DXUniConSample"].execute(unicon, **{**SETTINGS, **options}).args


@pytest.fixture(scope="module")
def depth():
    """As LoadImage gives one: `[1, h, w, 3]` in [0, 1]."""
    return zoo.held_out(1).depth.expand(-1, 3, -1, -1).movedim(1, -1).contiguous()


def by_hand(**options):
    pipe = UniConPipeline.from_pipe(zoo.load("shapes-unet"))
    with UniConAdapter.from_pretrained(zoo.adapter_file(FILE.removesuffix(".safetensors"))).attach(pipe):
        found = pipe(
            prompts=[CAPTION, CAPTION], guidance_scale=3.0, num_inference_steps=4, output_type="pt",
            generator=torch.Generator().manual_seed(3), **options,
        ).images  # fmt: skip
    return [image.movedim(1, -1) for image in found]


def test_control_is_what_the_pipeline_draws(sample, depth):
    drawn = sample(condition=depth)
    for image, expected in zip(drawn, by_hand(images=[None, depth.movedim(-1, 1)]), strict=True):
        assert image.shape == (1, 64, 64, 3)
        torch.testing.assert_close(image, expected, atol=1e-4, rtol=1e-3)


def test_joint_generation_and_strengths(sample, depth):
    image, own = sample()
    torch.testing.assert_close(image, by_hand()[0], atol=1e-4, rtol=1e-3)
    assert not torch.allclose(sample(joint_scale=0.0)[0], image, atol=1e-2)
    assert not torch.allclose(sample(cond_guidance=2.0)[0], image, atol=1e-2)
    kept, coarse = sample(condition=depth)[1], sample(condition=depth, cond_strength=0.7)[1]
    assert (kept - depth).abs().mean() < (coarse - depth).abs().mean()
    assert torch.equal(sample()[1], own)


def test_estimation_keeps_the_image(sample):
    given = (zoo.held_out(1).images.movedim(1, -1) + 1) / 2
    image, estimated = sample(image=given, image_strength=0.0, prompt="", y_prompt="", width=512, height=512)
    assert (image - given).abs().mean() < 0.05 and image.shape == estimated.shape == given.shape


def test_a_mask_keeps_the_rest(sample, depth):
    given = (zoo.held_out(1).images.movedim(1, -1) + 1) / 2
    mask = torch.zeros(1, 64, 64)
    mask[..., 32:] = 1
    image = sample(image=given, condition=depth, image_mask=mask)[0]
    # The VAE's receptive field blurs the border.
    assert (image - given)[:, :, :16].abs().mean() < 0.05 < (image - given)[:, :, 40:].abs().mean()


def test_choices_of_the_loader(dx_nodes, tmp_path, monkeypatch):
    import folder_paths

    (tmp_path / "mine").mkdir()
    (tmp_path / "no-model").mkdir()
    zoo.load("shapes-unet").save_pretrained(tmp_path / "mine")
    monkeypatch.setattr(folder_paths, "get_folder_paths", lambda kind: [str(tmp_path)])
    loader = dx_nodes["DXUniConLoader"]
    base, adapter = loader.define_schema().inputs
    assert base.options == ["mine", "shapes-unet", "shapes-unet-eps"] and FILE in adapter.options
    assert type(loader.execute("mine", FILE).args[0]).__name__ == "UniConPipeline"
    with pytest.raises(ValueError, match="no adapter 'other.safetensors'"):
        loader.execute("mine", "other.safetensors")
    with pytest.raises(ValueError, match="holds a CSCTuner, not a UniConAdapter"):
        loader.execute("mine", "csc-edges-shapes-unet.safetensors")


def test_stop_button(sample, comfy, monkeypatch):
    def stop():
        raise comfy.model_management.InterruptProcessingException

    monkeypatch.setattr(comfy.model_management, "throw_exception_if_processing_interrupted", stop)
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        sample()


def test_pictures_of_two_sizes(sample, depth):
    with pytest.raises(ValueError, match="different sizes"):
        sample(image=depth[:, :32], condition=depth)
