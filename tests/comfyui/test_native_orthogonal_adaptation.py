"""Orthogonal Adaptation in ComfyUI: concepts and words as in diffusers, the report, core LoRA loaders, refusals."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from diffusers_ext import OrthogonalLoraAdapter, zoo


pytestmark = pytest.mark.comfy
WORDS = ("zib", "mog")
FILES = [f"orthogonal-adaptation-{word}-shapes-unet.safetensors" for word in WORDS]
CAPTION = "a large <zib> left of a small <mog>, plain yellow background"
NATIVE = CAPTION.replace("<zib>", "embedding:trigger-zib-shapes-unet").replace(
    "<mog>", "embedding:trigger-mog-shapes-unet"
)


@pytest.fixture(scope="module")
def pipe():
    """The pipeline of diffusers with the words."""
    pipe = zoo.load("shapes-unet")
    for word in WORDS:
        pipe.load_textual_inversion(zoo.adapter_file(f"trigger-{word}-shapes-unet"))
    return pipe


@pytest.fixture
def merge(dx_nodes):
    def node(model, clip, *files, weights=(1.0, 1.0, 1.0, 1.0)):
        names = dict(zip([f"file_{k}" for k in range(1, 5)], [*files, *["none"] * 4]))
        strengths = {f"weight_{k}": weight for k, weight in enumerate(weights, 1)}
        return dx_nodes["DXOrthogonalLoraMerge"].execute(model, clip, **names, **strengths).args

    return node


@pytest.fixture
def sample(comfy, native_pipe, encode):
    """`sample(patch)` -> latents of the core KSampler, and every call of the model: arguments and output."""

    def run(patch=lambda model, clip: (model, clip), caption=NATIVE):
        model, clip, _ = native_pipe("shapes-unet")
        calls, (model, clip) = [], patch(model, clip)[:2]
        model = model.clone()

        def note(executor, x, timesteps, context, *rest, **kwargs):
            out = executor(x, timesteps, context, *rest, **kwargs)
            calls.append((x.clone(), timesteps.clone(), context.clone(), out.clone()))
            return out

        model.add_wrapper_with_key(comfy.patcher_extension.WrappersMP.DIFFUSION_MODEL, "note", note)
        conds = encode(clip, caption), encode(clip, "")
        latent = {"samples": torch.zeros(1, 4, 16, 16)}
        out = comfy.nodes.common_ksampler(model, 0, 2, 3.0, "euler", "normal", *conds, latent)[0]
        return out["samples"], calls

    return run


def test_words_are_those_of_diffusers(pipe, native_pipe):
    _, clip, _ = native_pipe("shapes-unet")
    native = clip.encode_from_tokens(clip.tokenize(NATIVE))
    torch.testing.assert_close(native, pipe.encode_prompt(CAPTION, "cpu", 1, False)[0], atol=1e-4, rtol=1e-4)


def test_parity_with_diffusers(sample, merge, pipe):
    _, calls = sample(lambda model, clip: merge(model, clip, *FILES, weights=(1.0, 0.6)))
    one, two = (OrthogonalLoraAdapter.from_pretrained(zoo.adapter_file(file[:-12])) for file in FILES)
    with torch.no_grad(), one.attach(pipe.unet, 1.0), two.attach(pipe.unet, 0.6):
        for x, t, context, out in calls:
            torch.testing.assert_close(pipe.unet(x, t, context).sample, out, atol=1e-3, rtol=1e-3)
    assert not torch.allclose(calls[0][-1], sample()[1][0][-1], atol=1e-2)


def test_it_is_what_cores_loaders_do(sample, merge, comfy, tmp_path, monkeypatch):
    """Core's LoraLoader, chained, on the same files under kohya's names."""
    import folder_paths

    for file in FILES:
        tensors = {}
        for name, value in load_file(zoo.adapter_file(file[:-12])).items():
            layer, side = name.removeprefix("unet.").split(".lora_")
            kohya = {"A.weight": "down.weight", "B.weight": "up.weight"}[side]
            tensors[f"lora_unet_{layer.replace('.', '_')}.lora_{kohya}"] = value
        save_file(tensors, tmp_path / f"kohya-{file}")
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "loras", ([str(tmp_path)], {".safetensors"}))
    folder_paths.filename_list_cache.pop("loras", None)

    def chained(model, clip):
        for file in FILES:
            model, clip = comfy.nodes.LoraLoader().load_lora(model, clip, f"kohya-{file}", 0.8, 0.8)
        return model, clip

    expected = sample(chained)[0]
    ours = sample(lambda model, clip: merge(model, clip, *FILES, weights=(0.8, 0.8)))[0]
    torch.testing.assert_close(ours, expected, atol=1e-3, rtol=1e-3)
    assert not torch.allclose(ours, sample()[0], atol=1e-2)


def test_the_report(merge, native_pipe):
    model, clip, _ = native_pipe("shapes-unet")
    *_, report = merge(model, clip, *FILES)
    assert FILES[0][:-12] in report and "overlap of directions 0.000" in report
    assert merge(model, clip, FILES[0])[2].startswith("nothing to compare")


def test_no_files_and_the_given_model(sample, merge, native_pipe):
    model, clip, _ = native_pipe("shapes-unet")
    same_model, same_clip, report = merge(model, clip)
    assert same_model is model and same_clip is clip and report == "no files"
    plain = sample()[0]
    sample(lambda model, clip: merge(model, clip, *FILES))
    assert torch.equal(sample()[0], plain)


def test_files_are_listed_and_refused(dx_nodes, merge, native_pipe, tmp_path, monkeypatch):
    import folder_paths

    inputs = {field.id: field for field in dx_nodes["DXOrthogonalLoraMerge"].define_schema().inputs}
    assert {"none", *FILES} <= set(inputs["file_1"].options)
    model, clip, _ = native_pipe("shapes-unet")
    with pytest.raises(ValueError, match=r"no LoRA 'x.safetensors' in models/loras"):
        merge(model, clip, "x.safetensors")
    again = OrthogonalLoraAdapter.from_pretrained(zoo.adapter_file(FILES[0][:-12]))
    for weight in again.parameters():
        if weight.requires_grad:
            nn.init.normal_(weight)
    again.save_file(tmp_path / "again.safetensors")
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "loras", ([str(tmp_path)], {".safetensors"}))
    folder_paths.filename_list_cache.pop("loras", None)
    with pytest.raises(ValueError, match="same directions"):
        merge(model, clip, FILES[0], "again.safetensors")
