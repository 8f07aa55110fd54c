"""VMix as MODEL patches: the values of the diffusers side on the right rows, nothing at scale 0, refusals."""

from __future__ import annotations

import shutil

import pytest
import torch

from diffusers_ext import VMixAdapter, zoo
from diffusers_ext.adapters.vmix import from_input_to_output


pytestmark = pytest.mark.comfy
CAPTION = "a small red circle left of a large green square, striped blue background"
FILE = "vmix-shapes-unet.safetensors"


@pytest.fixture
def load(dx_nodes):
    def node(**strengths):
        return dx_nodes["DXVMixLoader"].execute({"file": FILE, **strengths}).args[0]

    return node


@pytest.fixture
def patch(dx_nodes, load):
    def node(model, vmix=None, scale=1.0, mode="none", start=0.0, end=1.0):
        return dx_nodes["DXVMixApply"].execute(model, vmix or load(), scale, mode, start, end).args[0]

    return node


@pytest.fixture
def sample(comfy, native_pipe, encode):
    """`sample(patch)` -> latents of the core KSampler, and every call: inputs, kinds of its rows, output."""

    def run(patch=lambda model: model, name="shapes-unet", steps=3, caption=CAPTION):
        model, clip, _ = native_pipe(name)
        calls, model = [], patch(model).clone()

        def note(executor, x, t, context, *rest, **kwargs):
            out = executor(x, t, context, *rest, **kwargs)
            options = kwargs.get("transformer_options") or next(r for r in rest if isinstance(r, dict))
            calls.append((x.clone(), t.clone(), context.clone(), list(options["cond_or_uncond"]), out.clone()))
            return out

        model.add_wrapper_with_key(comfy.patcher_extension.WrappersMP.DIFFUSION_MODEL, "note", note)
        conds = encode(clip, caption), encode(clip, "")
        latent = {"samples": torch.zeros(2, 4, 16, 16)}
        out = comfy.nodes.common_ksampler(model, 0, steps, 3.0, "euler", "normal", *conds, latent)[0]
        return out["samples"], calls

    return run


@pytest.mark.parametrize("mode", ["none", "null"])
def test_parity_with_diffusers(sample, patch, load, mode):
    strengths = {"vivid colours": -0.5, "warm light": 1.0, "bright light": 0.0}
    _, calls = sample(lambda model: patch(model, load(**strengths), 1.3, mode))
    unet = zoo.load("shapes-unet").unet
    adapter = VMixAdapter.from_pretrained(zoo.adapter_file("vmix-shapes-unet"), torch_dtype=torch.float32)
    chosen = {"conditional": strengths, "unconditional": []}

    def expected(x, t, context, which):
        if which == "unconditional" and mode == "none":
            return unet(x, t, context).sample
        adapter.set_labels(chosen[which])
        with adapter.attach(unet, 1.3):
            return unet(x, t, context).sample

    with torch.no_grad():
        for x, t, context, kinds, out in calls:
            assert sorted(kinds) == [0, 1]
            for kind, *part in zip(kinds, *(v.chunk(2) for v in (x, t, context, out))):
                wanted = expected(*part[:3], "unconditional" if kind else "conditional")
                torch.testing.assert_close(part[3], wanted, atol=1e-4, rtol=0)


def test_scale_zero_and_the_given_model_are_plain(sample, patch):
    plain = sample()[0]
    assert not torch.equal(sample(patch)[0], plain)
    assert torch.equal(sample(lambda model: patch(model, scale=0.0))[0], plain)
    assert torch.equal(sample()[0], plain)


def test_only_the_chosen_part_of_the_run(sample, patch):
    plain, late = sample()[1], sample(lambda model: patch(model, start=0.6))[1]
    same = [torch.equal(a[-1], b[-1]) for a, b in zip(plain, late)]
    assert same[0] and not same[-1]


def test_two_of_them_and_replacements_of_others_stack(sample, patch):
    twice = sample(lambda model: patch(patch(model, scale=0.4), scale=0.6))[0]
    torch.testing.assert_close(twice, sample(patch)[0], atol=1e-4, rtol=0)
    seen = []

    def other(q, k, v, options):
        seen.append(v.clone())
        return torch.zeros_like(q)

    def both(model):
        model = model.clone()
        model.set_model_attn2_replace(other, "middle", 0)
        return patch(model)

    def alone(model):
        model = model.clone()
        model.set_model_attn2_replace(other, "middle", 0)
        return model

    sample(alone, steps=1)
    sample(both, steps=1)
    assert len(seen) == 2 and not torch.equal(*seen)


def test_a_long_prompt_repeats_the_values(sample, patch):
    """Forty tokens: two chunks of the text encoder."""
    _, calls = sample(patch, caption=" ".join(["red circle"] * 12))
    assert calls[0][2].shape[1] == 40 and torch.isfinite(calls[-1][-1]).all()


def test_block_ids_of_stable_diffusion(dx_nodes):
    """The published correspondence of ComfyUI's block ids and diffusers' names, for SD 1.5 and SDXL."""
    from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel
    from diffusers import UNet2DConditionModel

    from comfy_nodes.adapters_vmix import cross_attentions
    from diffusers_ext.adapters.vmix import cross_attention

    shared = {"image_size": 32, "in_channels": 4, "out_channels": 4, "model_channels": 32, "num_head_channels": 16}
    shared |= {"use_spatial_transformer": True, "legacy": False, "num_heads": -1}
    with torch.device("meta"):
        sd15 = UNetModel(
            **shared, num_res_blocks=2, channel_mult=(1, 2, 4, 4), context_dim=24,
            transformer_depth=[1] * 6 + [0] * 2, transformer_depth_output=[1] * 9 + [0] * 3,
            transformer_depth_middle=1,
        )  # fmt: skip
        xl = UNetModel(
            **shared, num_res_blocks=2, channel_mult=(1, 2, 4), context_dim=24, transformer_depth_middle=10,
            transformer_depth=[0, 0, 2, 2, 10, 10], transformer_depth_output=[0, 0, 0, 2, 2, 2, 10, 10, 10],
        )  # fmt: skip
        theirs = {
            "sd15": UNet2DConditionModel(
                block_out_channels=(32, 64, 128, 128), cross_attention_dim=24, attention_head_dim=2
            ),
            "xl": UNet2DConditionModel(
                block_out_channels=(32, 64, 128), cross_attention_dim=24, transformer_layers_per_block=(1, 2, 10),
                down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
                up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"), attention_head_dim=2,
            ),
        }  # fmt: skip

    def pairs(ours, name):
        ordered = from_input_to_output(cross_attention(theirs[name]))
        return {block: n for (block, _), n in zip(cross_attentions(ours), ordered, strict=True)}

    def name(prefix, index=0):
        return f"{prefix}.transformer_blocks.{index}.attn2"

    wanted = {("middle", 0, 0): name("mid_block.attentions.0")}
    wanted |= {("input", n, 0): name(f"down_blocks.{n // 3}.attentions.{n % 3 - 1}") for n in (1, 2, 4, 5, 7, 8)}
    wanted |= {("output", n, 0): name(f"up_blocks.{n // 3}.attentions.{n % 3}") for n in range(3, 12)}
    assert pairs(sd15, "sd15") == wanted
    wanted = {("middle", 0, i): name("mid_block.attentions.0", i) for i in range(10)}
    for n, depth in ((4, 2), (5, 2), (7, 10), (8, 10)):
        wanted |= {("input", n, i): name(f"down_blocks.{n // 3}.attentions.{n % 3 - 1}", i) for i in range(depth)}
    for n, depth in ((0, 10), (1, 10), (2, 10), (3, 2), (4, 2), (5, 2)):
        wanted |= {("output", n, i): name(f"up_blocks.{n // 3}.attentions.{n % 3}", i) for i in range(depth)}
    assert pairs(xl, "xl") == wanted


def test_wrong_models_are_refused(patch, native_pipe, load):
    with pytest.raises(ValueError, match="VMix works on UNets"):
        patch(native_pipe("shapes-dit")[0])
    vmix = load()
    layers = dict(vmix.config.layer_dims)
    fewer = {name: layers[name] for name in list(layers)[1:]}
    other = VMixAdapter(128, 20, 128, vmix.config.labels, fewer)
    with pytest.raises(ValueError, match="6 layers, this one has 7"):
        patch(native_pipe("shapes-unet")[0], other)
    name = next(iter(layers))
    other = VMixAdapter(128, 20, 128, vmix.config.labels, {**layers, name: 99})
    with pytest.raises(ValueError, match=f"{name} is .99, 128."):
        patch(native_pipe("shapes-unet")[0], other)


def test_the_loader_lists_files_and_their_sliders(comfy, dx_nodes, load, tmp_path, monkeypatch):
    import folder_paths

    monkeypatch.setattr(folder_paths, "models_dir", str(tmp_path))
    folder = tmp_path / "diffusers_ext_adapters"
    folder.mkdir()
    shutil.copy(zoo.adapter_file("vmix-shapes-unet"), folder / "mine.safetensors")
    (folder / "broken.safetensors").write_bytes(b"no such file")
    options = {o.key: o.inputs for o in dx_nodes["DXVMixLoader"].define_schema().inputs[0].options}
    assert {"mine.safetensors", FILE} <= set(options) and "broken.safetensors" not in options
    assert [i.id for i in options["mine.safetensors"]] == ["vivid colours", "warm light", "bright light"]
    vmix = load(**{"vivid colours": -1.0, "warm light": 0.25, "bright light": 1.0})
    assert list(vmix.strengths.values()) == [-1.0, 0.25, 1.0]
    with pytest.raises(ValueError, match="no adapter 'gone.safetensors'"):
        dx_nodes["DXVMixLoader"].execute({"file": "gone.safetensors"})
