"""The base of all adapters, on one that adds a constant to a UNet's output."""

from __future__ import annotations

import contextlib
import json

import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, DiffusionPipeline, PixArtAlphaPipeline, PixArtTransformer2DModel
from diffusers.configuration_utils import register_to_config
from safetensors.torch import load_file, save_file

import diffusers_ext
from diffusers_ext import zoo
from diffusers_ext.adapters._common import Adapter, conditional_rows, require_range, within
from diffusers_ext.registry import Claim, MethodRecord


RECORD = MethodRecord(
    slug="shift",
    family="adapters",
    kind="adapter",
    title="Shift",
    arxiv="0000.00000",
    summary="adds a constant",
    targets=("unet",),
    predictions=("v_prediction",),
    nodes=(),
    claim=Claim("", "", 1, "x"),
)


class Shift(Adapter):
    method = RECORD

    @register_to_config
    def __init__(self, channels: int = 4):
        super().__init__()
        self.amount = torch.nn.Parameter(torch.arange(1.0, channels + 1))
        self.calls = []

    def check(self, target):
        channels = diffusers_ext.denoiser_of(target).config.out_channels
        if channels != len(self.amount):
            raise ValueError(f"{len(self.amount)} constants for {channels} channels")

    def begin_call(self, target, arguments):
        self.calls.append(float(arguments["timestep"]))

    def install(self, target, undo):
        model = diffusers_ext.denoiser_of(target)

        def add(module, _, output):
            return output + self.scale * self.amount[:, None, None] if self.scale else output

        undo.callback(model.conv_out.register_forward_hook(add).remove)
        if getattr(target, "fail", False):
            raise RuntimeError("half-way")


def draw(pipe, **kwargs):
    return zoo.generate(pipe, ["a red circle", "a blue star"], 3, **kwargs)


def traces(model):
    return [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()], set(vars(model))


def test_on_and_off_leave_no_trace(shapes_unet):
    plain, before = draw(shapes_unet), traces(shapes_unet.unet)
    adapter, names = Shift(), set(shapes_unet.unet.state_dict())
    with adapter.attach(shapes_unet):
        assert adapter.attached and not torch.equal(draw(shapes_unet), plain)
        assert set(shapes_unet.unet.state_dict()) == names
        adapter.set_scale(0)
        assert torch.equal(draw(shapes_unet), plain)
        with pytest.raises(ValueError, match="attached already"):
            adapter.attach(shapes_unet)
    assert not adapter.attached and traces(shapes_unet.unet) == before
    assert torch.equal(draw(shapes_unet), plain)
    adapter.attach(shapes_unet, 0.5)
    diffusers_ext.remove(shapes_unet)
    assert not adapter.attached and adapter.scale == 0.5
    adapter.detach()


def test_a_failure_half_way_leaves_the_model_alone(shapes_unet):
    before, adapter = traces(shapes_unet.unet), Shift()
    shapes_unet.fail = True
    try:
        with pytest.raises(RuntimeError, match="half-way"):
            adapter.attach(shapes_unet, 0.3)
    finally:
        del shapes_unet.fail
    assert traces(shapes_unet.unet) == before and not adapter.attached and adapter.scale == 1
    with pytest.raises(ValueError, match="5 constants for 4 channels"):
        Shift(channels=5).attach(shapes_unet)
    assert traces(shapes_unet.unet) == before


def test_several_add_up_and_sit_beside_a_cache(shapes_unet):
    one, two = Shift(), Shift()
    with diffusers_ext.apply(shapes_unet, diffusers_ext.DeepCacheConfig()):
        with one.attach(shapes_unet, 0.1), two.attach(shapes_unet, 0.2):
            both = draw(shapes_unet)
        with one.attach(shapes_unet, 0.3):
            assert torch.allclose(draw(shapes_unet), both, atol=1e-5)


def test_it_follows_the_model_and_sees_the_arguments(shapes_unet):
    adapter = Shift()
    with adapter.attach(shapes_unet):
        draw(shapes_unet)
        assert adapter.calls == shapes_unet.scheduler.timesteps.tolist()
        try:
            shapes_unet.unet.to(torch.bfloat16)
            shapes_unet.unet(torch.zeros(1, 4, 16, 16).bfloat16(), 5, torch.zeros(1, 20, 128).bfloat16())
            assert adapter.amount.dtype == torch.bfloat16
        finally:
            shapes_unet.unet.to(torch.float32)


@pytest.mark.parametrize("scale", [float("nan"), float("inf"), "1", None, True])
def test_bad_scales(scale):
    with pytest.raises(ValueError, match="finite number"):
        Shift().set_scale(scale)


def test_files_come_back_bit_for_bit(tmp_path):
    adapter = Shift(channels=3)
    adapter.amount.data = torch.randn(3)
    file = adapter.save_file(tmp_path / "shift.safetensors")
    adapter.save_pretrained(tmp_path / "folder")
    for path in (file, tmp_path / "folder"):
        again = Shift.from_pretrained(path)
        assert torch.equal(again.amount, adapter.amount) and again.config.channels == 3 and not again.training
    assert Shift.from_pretrained(file).save_file(tmp_path / "b.safetensors").read_bytes() == file.read_bytes()
    assert Shift.from_pretrained(file, torch_dtype=torch.float16).amount.dtype == torch.float16


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        ({}, "1 tensors missing: amount"),
        ({"amount": torch.zeros(3), "more": torch.zeros(1)}, "1 tensors unknown: more"),
        ({"amount": torch.zeros(4)}, "1 tensors of another shape: amount"),
    ],
)
def test_wrong_tensors_are_named(tmp_path, tensors, words):
    metadata = {"class": "Shift", "config": json.dumps({"channels": 3})}
    save_file(tensors, tmp_path / "x.safetensors", metadata)
    with pytest.raises(ValueError, match=words):
        Shift.from_pretrained(tmp_path / "x.safetensors")


def test_fields_of_the_config_can_be_told_with_a_file(tmp_path):
    save_file({"amount": torch.zeros(3)}, tmp_path / "a.safetensors", {"class": "Shift", "config": "{}"})
    with pytest.raises(ValueError, match="of another shape: amount"):
        Shift.from_pretrained(tmp_path / "a.safetensors")
    assert Shift.from_pretrained(tmp_path / "a.safetensors", channels=3).config.channels == 3
    with pytest.raises(ValueError, match="Did you mean 'channels'"):
        Shift.from_pretrained(tmp_path / "a.safetensors", channel=3)


def test_a_path_that_does_not_exist(tmp_path):
    with pytest.raises(FileNotFoundError, match="neither a folder nor a file"):
        Shift.from_pretrained(tmp_path / "a.safetensors")


def test_a_folder_with_missing_tensors_is_refused(tmp_path):
    Shift(channels=3).save_pretrained(tmp_path)
    path = tmp_path / "diffusion_pytorch_model.safetensors"
    save_file({"more": load_file(path)["amount"]}, path, {"format": "pt"})
    with pytest.raises(ValueError, match="missing: amount; 1 tensors unknown: more"):
        Shift.from_pretrained(tmp_path)


def test_other_files_are_refused(tmp_path):
    save_file({"strange.key": torch.zeros(1)}, tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match="First keys: strange.key"):
        Shift.from_pretrained(tmp_path / "a.safetensors")
    save_file({"amount": torch.zeros(4)}, tmp_path / "b.safetensors", {"class": "Other", "config": "{}"})
    with pytest.raises(ValueError, match="holds a Other, not a Shift"):
        Shift.from_pretrained(tmp_path / "b.safetensors")
    (tmp_path / "c.safetensors").write_bytes(b"no tensors")
    with pytest.raises(ValueError, match="damaged"):
        Shift.from_pretrained(tmp_path / "c.safetensors")
    (tmp_path / "d.bin").write_bytes(b"")
    with pytest.raises(ValueError, match="safetensors files only"):
        Shift.from_pretrained(tmp_path / "d.bin")


class Calls(DiffusionPipeline):
    """A pipeline whose call asks for its rows."""

    def __init__(self, **properties):
        super().__init__()
        for name, value in properties.items():
            setattr(type(self), name, value)

    def __call__(self, batch, guided=None):
        if guided is not None:
            do_classifier_free_guidance = guided  # noqa: F841 what PixArt's pipelines decide in their call
        return conditional_rows(batch)


def calls(**properties):
    return type("Calls", (Calls,), {})(**properties)


class TestConditionalRows:
    def test_outside_of_a_pipeline_all_count(self):
        assert conditional_rows(3) == slice(0, None)

    def test_by_the_pipeline_that_runs(self):
        assert calls(do_classifier_free_guidance=True)(6) == slice(3, None)
        assert calls(do_classifier_free_guidance=False)(3) == slice(0, None)
        both = calls(do_classifier_free_guidance=True, _pag_scale=1.0, do_perturbed_attention_guidance=True)
        assert both(6) == slice(2, None)
        with pytest.raises(ValueError, match="batch of 3"):
            calls(do_classifier_free_guidance=True)(3)

    def test_by_the_variables_of_a_call(self):
        assert calls()(6, True) == slice(3, None) and calls()(6, False) == slice(0, None) == calls()(6)

    def test_another_order_of_rows_is_refused(self):
        with pytest.raises(ValueError, match="prompt first"):
            calls(do_classifier_free_guidance=True, image_guidance_scale=1.5)(6)

    def test_of_pixart(self):
        """Its pipeline tells nobody about guidance."""
        seen = []
        pipe = pixart()
        handle = pipe.transformer.register_forward_hook(lambda _, __, output: seen.append(output[0]))
        adapter = diffusers_ext.VMixAdapter.for_model(pipe.transformer, aes_emb=torch.randn(9, 6), num_text_tokens=7)
        with torch.no_grad():
            for weight in adapter.value_layers.parameters():
                weight.normal_(std=0.5)
        text = {"prompt_embeds": torch.randn(1, 7, 6), "prompt_attention_mask": torch.ones(1, 7)}
        options = {**text, **{f"negative_{name}": value for name, value in text.items()}, "negative_prompt": None}
        size = {"height": 8, "width": 8, "use_resolution_binning": False, "output_type": "latent"}
        for attach in (contextlib.nullcontext, lambda: adapter.attach(pipe)):
            with attach():
                pipe(**options, **size, num_inference_steps=1, generator=torch.Generator().manual_seed(0))
        handle.remove()
        plain, changed = seen
        assert torch.equal(plain[0], changed[0]) and not torch.allclose(plain[1], changed[1])


def pixart():
    """A tiny PixArt pipeline without a text encoder."""
    torch.manual_seed(0)
    transformer = PixArtTransformer2DModel(
        num_layers=2,
        num_attention_heads=2,
        attention_head_dim=8,
        sample_size=8,
        out_channels=8,
        cross_attention_dim=16,
        caption_channels=6,
        norm_num_groups=4,
        use_additional_conditions=False,
    )
    vae = AutoencoderKL(block_out_channels=(8,), norm_num_groups=4)
    pipe = PixArtAlphaPipeline(None, None, vae, transformer.eval(), DDIMScheduler())
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_within_a_range_of_the_run(shapes_unet, shapes_dit, dtype):
    shapes_unet.scheduler.set_timesteps(10)
    shapes_dit.scheduler.set_timesteps(10, mu=0.5)
    flux_times = (shapes_dit.scheduler.timesteps.to(dtype) / 1000).unbind()
    for pipe, times in ((shapes_unet, shapes_unet.scheduler.timesteps), (shapes_dit, flux_times)):
        inside = [within(pipe, t, 0.2, 0.5) for t in times]
        assert inside == [False] * 2 + [True] * 3 + [False] * 5
    assert within(shapes_unet.unet, 5, 0, 1)
    with pytest.raises(ValueError, match="attach to the pipeline"):
        within(shapes_unet.unet, 5, 0, 0.5)
    for bad in ((0.5, 0.5), (-0.1, 1), (0, 1.1)):
        with pytest.raises(ValueError, match="fractions of the steps"):
            require_range(*bad)
