"""SCEdit in ComfyUI: the features of diffusers, several tuners in any order, before FreeU, files, messages."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from diffusers_ext import CSCTuner, SCTuner, zoo


pytestmark = pytest.mark.comfy
CAPTION = "a small red circle left of a large green square, striped blue background"
SMALL = {"pre_hint_dim_ratio": 0.5, "pre_hint_out": 32}


def awake(tuner, seed=0, std=0.1):
    torch.manual_seed(seed)
    for parameter in tuner.parameters():
        nn.init.normal_(parameter, std=std)
    return tuner.eval()


@pytest.fixture(scope="module")
def style():
    return awake(SCTuner.for_model(zoo.load("shapes-unet")))


@pytest.fixture(scope="module")
def condition():
    return awake(CSCTuner.for_model(zoo.load("shapes-unet"), **SMALL), 1)


@pytest.fixture(scope="module")
def picture():
    return torch.rand(1, 64, 64, 3, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def files(condition, tmp_path, monkeypatch, comfy):
    """A models folder with the condition's tuner in it."""
    import folder_paths

    (tmp_path / "diffusers_ext_adapters").mkdir()
    condition.save_file(tmp_path / "diffusers_ext_adapters/mine.safetensors")
    monkeypatch.setattr(folder_paths, "models_dir", str(tmp_path))
    return tmp_path / "diffusers_ext_adapters"


@pytest.fixture
def with_style(dx_nodes, style):
    return lambda model, scale=1.0: dx_nodes["DXSCTunerApply"].execute(model, style, scale).args[0]


@pytest.fixture
def with_condition(dx_nodes, files, picture):
    def node(model, strength=1.0, image=picture):
        return dx_nodes["DXCSCTunerApply"].execute(model, "mine.safetensors", image, strength).args[0]

    return node


@pytest.fixture
def sample(comfy, native_pipe, encode, recorded):
    """`sample(patch)` -> latents from the core KSampler, and every call of the model: arguments and output."""

    def run(patch=lambda model: model, name="shapes-unet", batch=1):
        model, clip, _ = native_pipe(name)
        model, calls = recorded(patch(model))
        latent = {"samples": torch.zeros(batch, 4, 16, 16)}
        conds = encode(clip, CAPTION), encode(clip, "")
        out = comfy.nodes.common_ksampler(model, 0, 2, 3.0, "euler", "normal", *conds, latent)[0]
        return out["samples"], calls

    return run


def test_parity_with_diffusers(sample, with_style, with_condition, style, condition, picture):
    _, calls = sample(lambda model: with_condition(with_style(model, 0.7), 0.5))
    unet = zoo.load("shapes-unet").unet
    condition.set_condition(picture.movedim(-1, 1))
    with torch.no_grad(), style.attach(unet, 0.7), condition.attach(unet, 0.5):
        for x, t, context, out in calls:
            torch.testing.assert_close(unet(x, t, context).sample, out, atol=1e-3, rtol=1e-3)
    assert not torch.allclose(calls[0][-1], sample()[1][0][-1], atol=1e-2)


def test_the_order_does_not_matter(sample, with_style, with_condition):
    one = sample(lambda model: with_condition(with_style(model)))[0]
    torch.testing.assert_close(sample(lambda model: with_style(with_condition(model)))[0], one, atol=1e-3, rtol=1e-3)


def test_tuners_come_before_freeu(sample, with_style, comfy):
    from comfy_extras.nodes_freelunch import FreeU

    def freed(model):
        return FreeU.execute(model, 1.3, 1.4, 0.9, 0.2).args[0]

    before = sample(lambda model: freed(with_style(model)))[0]
    behind = sample(lambda model: with_style(freed(model)))[0]
    assert torch.equal(before, behind)
    assert not torch.allclose(before, sample(with_style)[0], atol=1e-3)


def test_scale_zero_and_the_given_model(sample, with_style, with_condition):
    plain = sample()[0]
    assert torch.equal(sample(lambda model: with_condition(with_style(model, 0.0), 0.0))[0], plain)
    sample(lambda model: with_condition(with_style(model)))
    assert torch.equal(sample()[0], plain)


def test_pictures_of_a_batch(sample, with_condition, picture):
    two = torch.cat([picture, picture.flip(1)])
    both = sample(lambda model: with_condition(model, image=two), batch=2)[0]
    turned = sample(lambda model: with_condition(model, image=two[[1, 1]]), batch=2)[0]
    torch.testing.assert_close(both[1], turned[1], atol=1e-3, rtol=1e-3)
    assert not torch.allclose(both[0], turned[0], atol=1e-2)
    with pytest.raises(ValueError, match="3 condition pictures for a batch of"):
        sample(lambda model: with_condition(model, image=two[[0, 1, 1]]), batch=2)


def test_a_larger_picture_is_scaled(sample, with_condition, picture):
    large = picture.repeat_interleave(2, 1).repeat_interleave(2, 2)
    one = sample(lambda model: with_condition(model))[0]
    torch.testing.assert_close(sample(lambda model: with_condition(model, image=large))[0], one)


def test_files(dx_nodes, files, style):
    style.save_file(files / "style.safetensors")
    loader = dx_nodes["DXSCTunerLoader"]
    assert {"mine.safetensors", "style.safetensors"} <= set(loader.define_schema().inputs[0].options)
    loaded = loader.execute("style.safetensors").args[0]
    assert all(torch.equal(v, loaded.state_dict()[k]) for k, v in style.state_dict().items())
    with pytest.raises(ValueError, match="holds a CSCTuner, not a SCTuner"):
        loader.execute("mine.safetensors")


def test_another_model_is_refused(with_style, with_condition, native_pipe, dx_nodes):
    with pytest.raises(ValueError, match="SCEdit works on UNets"):
        with_style(native_pipe("shapes-dit")[0])
    other = SCTuner([8, 8])
    with pytest.raises(ValueError, match=r"skip connections of \[8, 8\] channels, the model has \[32"):
        dx_nodes["DXSCTunerApply"].execute(native_pipe("shapes-unet")[0], other, 1.0)
