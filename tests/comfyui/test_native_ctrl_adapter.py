"""Ctrl-Adapter in ComfyUI: the same residuals as in diffusers, beside other controls, ranges, files and messages."""

from __future__ import annotations

import importlib

import pytest
import torch

from diffusers_ext import CtrlAdapterControl, CtrlAdapterModel, zoo
from diffusers_ext.training.denoising import FluxTask
from diffusers_ext.zoo.conditions import edges


pytestmark = pytest.mark.comfy
CAPTION = "a small red circle left of a large green square, striped blue background"
CONTROLNET = "controlnet-edges-shapes-unet-eps"
KINDS = {
    "shapes-unet": {},
    "shapes-dit": {"num_adapters_per_location": 1, "skip_conv_in": True, "fixed_controlnet_timestep": 500},
}


def made(name, seed=0, **config):
    """An adapter that does something, without training."""
    pipe = zoo.load(name)
    sizes = {"controlnet_sample_size": 16, "transformer_dim": 32, "attention_head_dim": 16, "norm_groups": 8}
    torch.manual_seed(seed)
    return CtrlAdapterModel.for_model(
        pipe, zoo.load_controlnet(CONTROLNET), "AB", **sizes, **{**KINDS[name], **config}
    ).eval()


@pytest.fixture(scope="module")
def adapters():
    return {name: made(name) for name in KINDS}


@pytest.fixture(scope="module")
def picture():
    """Edges as an IMAGE: `[1, h, w, 3]` in [0, 1]."""
    return edges(zoo.held_out(1).images).expand(-1, 3, -1, -1).movedim(1, -1)


@pytest.fixture(scope="module")
def control_net(comfy):
    return importlib.import_module("comfy_nodes._shapes").load_controlnet(CONTROLNET)


@pytest.fixture
def apply(dx_nodes, native_pipe, control_net, picture):
    """`apply(positive, negative, adapter, ...)` -> both, as the node gives them."""

    def node(positive, negative, adapter, strength=1.0, start=0.0, end=1.0):
        clip = native_pipe("shapes-unet-eps")[1]
        run = dx_nodes["DXCtrlAdapterApply"].execute
        return run(positive, negative, adapter, control_net, clip, CAPTION, picture, strength, start, end).args

    return node


@pytest.fixture
def sample(comfy, native_pipe, encode):
    """`sample(name, change)` -> latents of the core KSampler, and every call of the model: arguments and output.

    `change` is given both conditionings and returns them.
    """

    def run(name, change=lambda *conds: conds, steps=3):
        model, clip, _ = native_pipe(name)
        calls, model = [], model.clone()

        def note(executor, x, timesteps, context, *rest, **kwargs):
            out = executor(x, timesteps, context, *rest, **kwargs)
            calls.append((x.clone(), timesteps.clone(), context.clone(), rest, out.clone()))
            return out

        model.add_wrapper_with_key(comfy.patcher_extension.WrappersMP.DIFFUSION_MODEL, "note", note)
        conds = change(encode(clip, CAPTION), encode(clip, ""))
        latent = {"samples": torch.zeros(1, 4, 16, 16)}
        out = comfy.nodes.common_ksampler(model, 0, steps, 3.0, "euler", "normal", *conds, latent)[0]
        return out["samples"], calls

    return run


def own_text(*captions):
    source = zoo.load("shapes-unet-eps")
    return torch.cat([source.encode_prompt([c], "cpu", 1, False)[0] for c in captions])


def test_the_controlnet_is_that_of_diffusers(control_net, picture):
    torch.manual_seed(0)
    x, t, context = torch.randn(2, 4, 16, 16), torch.tensor([7.0, 700.0]), torch.randn(2, 20, 128)
    hint = picture.movedim(-1, 1).expand(2, -1, -1, -1)
    with torch.no_grad():
        down, mid = zoo.load_controlnet(CONTROLNET)(x, t, context, hint, return_dict=False)
        ours = control_net.control_model(x=x, hint=hint, timesteps=t, context=context)
    for a, b in zip([*down, mid], [*ours["output"], *ours["middle"]]):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


def test_unet_parity_with_diffusers(sample, apply, adapters, picture):
    adapter = adapters["shapes-unet"]
    _, calls = sample("shapes-unet", lambda *conds: apply(*conds, adapter, strength=0.8))
    plain = sample("shapes-unet")[1]
    unet, text = zoo.load("shapes-unet").unet, {1: own_text(CAPTION), 2: own_text(CAPTION, "")}
    empty = own_text("")
    controlnet, hint = zoo.load_controlnet(CONTROLNET), picture.movedim(-1, 1)
    with torch.no_grad(), adapter.attach(unet, 0.8):
        for x, t, context, _, out in calls:
            # Rows whose context is that of the empty prompt are unconditional.
            rows = [empty if torch.allclose(c, empty[0], atol=1e-4) else text[1] for c in context]
            adapter.control = CtrlAdapterControl(controlnet, hint, torch.cat(rows))
            torch.testing.assert_close(unet(x, t, context).sample, out, atol=1e-3, rtol=1e-3)
    assert not torch.allclose(calls[0][-1], plain[0][-1], atol=1e-2)


@pytest.mark.parametrize("trained", [False, True])
def test_transformer_parity_with_diffusers(sample, apply, adapters, picture, trained):
    adapter = adapters["shapes-dit"]
    if trained:
        adapter = CtrlAdapterModel.from_pretrained(
            zoo.adapter_file("ctrl-adapter-shapes-dit"), torch_dtype=torch.float32
        )
    _, calls = sample("shapes-dit", lambda *conds: apply(*conds, adapter))
    plain = sample("shapes-dit")[1]
    transformer, empty = (
        zoo.load("shapes-dit").transformer,
        zoo.load("shapes-dit").encode_prompt([""], None, max_sequence_length=20)[0],
    )
    controlnet, hint = zoo.load_controlnet(CONTROLNET), picture.movedim(-1, 1)
    with torch.no_grad(), adapter.attach(transformer):
        x, t, context, rest, out = calls[0]
        said = ["" if torch.allclose(c, empty[0], atol=1e-4) else CAPTION for c in context]
        adapter.control = CtrlAdapterControl(controlnet, hint, own_text(*said))
        ours = FluxTask.predict(transformer, x, t, {"t5": context, "pooled": rest[0]})
    torch.testing.assert_close(ours, out, atol=1e-3, rtol=1e-3)
    assert not torch.allclose(out, plain[0][-1], atol=1e-2)


@pytest.mark.parametrize("strength", [1.0, 0.5])
def test_a_control_that_does_not_depend_on_the_step_is_computed_once(
    sample, apply, control_net, monkeypatch, picture, strength
):
    """ControlNet and adapter run once per picture, and say what they say in diffusers."""
    adapter = made("shapes-unet", skip_conv_in=True, fixed_controlnet_timestep=500, fixed_adapter_timestep=300)
    ran, forward = [], control_net.control_model.forward
    monkeypatch.setattr(control_net.control_model, "forward", lambda *a, **k: ran.append(1) or forward(*a, **k))
    note = adapter.register_forward_hook(lambda *_: ran.append(2))
    _, calls = sample("shapes-unet", lambda *conds: apply(*conds, adapter, strength=strength), steps=4)
    note.remove()
    assert len(calls) == 4 and sorted(ran) == [1, 2]
    unet, empty = zoo.load("shapes-unet").unet, own_text("")
    with torch.no_grad(), adapter.attach(unet, strength):
        for x, t, context, _, out in calls[::3]:
            rows = [empty if torch.allclose(c, empty[0], atol=1e-4) else own_text(CAPTION) for c in context]
            adapter.control = CtrlAdapterControl(
                zoo.load_controlnet(CONTROLNET), picture.movedim(-1, 1), torch.cat(rows)
            )
            torch.testing.assert_close(unet(x, t, context).sample, out, atol=1e-3, rtol=1e-3)


def test_strength_zero_and_steps_outside_the_range_change_nothing(sample, apply, adapters):
    adapter, plain = adapters["shapes-unet"], sample("shapes-unet")
    assert torch.equal(sample("shapes-unet", lambda *conds: apply(*conds, adapter, strength=0.0))[0], plain[0])
    early = sample("shapes-unet", lambda *conds: apply(*conds, adapter, end=0.1))[1]
    assert not torch.equal(early[0][-1], plain[1][0][-1])
    late = sample("shapes-unet", lambda *conds: apply(*conds, adapter, start=0.9))
    assert torch.equal(late[1][0][-1], plain[1][0][-1])


def test_a_run_leaves_nothing_behind(sample, apply, adapters, control_net):
    before = sample("shapes-dit")[0]
    sample("shapes-dit", lambda *conds: apply(*conds, adapters["shapes-dit"]))
    assert not control_net.control_model.input_blocks[0]._forward_hooks
    assert control_net.cond_hint_original is None
    assert torch.equal(sample("shapes-dit")[0], before)


def test_beside_a_controlnet_of_the_model(sample, apply, adapters, comfy, control_net, picture):
    """In either order, and not the same as one of them alone."""
    own = comfy.nodes.ControlNetApplyAdvanced().apply_controlnet
    adapter = adapters["shapes-unet"]

    def before(*conds):
        return apply(*own(*conds, control_net, picture, 0.7, 0.0, 1.0), adapter)

    def behind(*conds):
        return own(*apply(*conds, adapter), control_net, picture, 0.7, 0.0, 1.0)

    outputs = [sample("shapes-unet", change)[1][0][-1] for change in (before, behind)]
    # The core node takes the text of the ControlNet from the same place: only the order differs.
    torch.testing.assert_close(*outputs, atol=1e-4, rtol=1e-3)
    alone = sample("shapes-unet", lambda *conds: apply(*conds, adapter))[1][0][-1]
    assert not torch.allclose(outputs[0], alone, atol=1e-3)


def test_both_prompts_share_one_control(apply, adapters, native_pipe, encode):
    clip = native_pipe("shapes-unet")[1]
    positive, negative = apply(encode(clip, CAPTION), encode(clip, ""), adapters["shapes-unet"])
    assert positive[0][1]["control"] is negative[0][1]["control"]
    texts = [c[0][1]["cross_attn_controlnet"] for c in (positive, negative)]
    torch.testing.assert_close(torch.cat(texts), own_text(CAPTION, ""), atol=1e-4, rtol=1e-3)


def test_a_file_for_another_model_is_refused(sample, apply, adapters):
    with pytest.raises(ValueError, match="use a file that was made for this model"):
        sample("shapes-dit", lambda *conds: apply(*conds, adapters["shapes-unet"]))
    with pytest.raises(ValueError, match="use a file that was made for this model"):
        sample("shapes-unet", lambda *conds: apply(*conds, adapters["shapes-dit"]))


def test_the_loader_finds_files(dx_nodes, adapters, tmp_path, monkeypatch, comfy):
    import folder_paths

    (tmp_path / "diffusers_ext_adapters").mkdir()
    adapters["shapes-unet"].save_file(tmp_path / "diffusers_ext_adapters/mine.safetensors")
    monkeypatch.setattr(folder_paths, "models_dir", str(tmp_path))
    loader = dx_nodes["DXCtrlAdapterLoader"]
    assert "mine.safetensors" in loader.define_schema().inputs[0].options
    loaded = loader.execute("mine.safetensors").args[0]
    assert all(torch.equal(v, loaded.state_dict()[k]) for k, v in adapters["shapes-unet"].state_dict().items())
    with pytest.raises(ValueError, match="no adapter 'other.safetensors'"):
        loader.execute("other.safetensors")
