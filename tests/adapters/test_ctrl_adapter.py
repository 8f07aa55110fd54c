"""Ctrl-Adapter: layout of the authors' files, shapes, routers, frames, timesteps, and control that was learnt."""

from __future__ import annotations

import importlib.util
import json
import re

import pytest
import torch
from diffusers import (
    ControlNetModel,
    EulerDiscreteScheduler,
    I2VGenXLUNet,
    UNet2DConditionModel,
    UNetSpatioTemporalConditionModel,
)
from safetensors.torch import load_file, save_file

import diffusers_ext
from diffusers_ext import CtrlAdapterControl, CtrlAdapterModel, CtrlAdapterRouter, zoo
from diffusers_ext.adapters.ctrl_adapter_control import inference_timestep, inverse_timesteps, svd_levels
from diffusers_ext.eval import count_macs
from diffusers_ext.zoo.conditions import edge_f1, edge_iou, edges


SDXL = {"num_blocks": 1}
VIDEO = {
    "num_blocks": 1,
    "backbone_model_name": "i2vgenxl",
    "cross_attention_dim": 1024,
    "add_temporal_resnet": True,
    "add_temporal_transformer": True,
    "add_adapter_location_D": True,
    "add_adapter_location_M": True,
}
SMALL = {"transformer_dim": 32, "attention_head_dim": 8, "norm_groups": 8, "controlnet_sample_size": 16}
WIDTHS, FRAMES = (32, 64, 64, 64), 3
CONTROLNET, PICTURES = "controlnet-edges-shapes-unet-eps", 12
SHIPPED, TRANSFORMER = ["ctrl-adapter-shapes-unet", "ctrl-adapter-once-shapes-unet"], "ctrl-adapter-shapes-dit"


def control_network(seed=0) -> ControlNetModel:
    """A small ControlNet of four resolutions, as if it had learnt something."""
    torch.manual_seed(seed)
    model = ControlNetModel(
        block_out_channels=WIDTHS,
        layers_per_block=2,
        cross_attention_dim=16,
        norm_num_groups=8,
        attention_head_dim=4,
        conditioning_embedding_out_channels=(4, 4, 8, 8),
    )
    for layer in [*model.controlnet_down_blocks, model.controlnet_mid_block]:
        torch.nn.init.normal_(layer.weight, std=0.1)
    torch.nn.init.normal_(model.controlnet_cond_embedding.conv_out.weight, std=0.5)
    return model.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def network():
    return control_network()


@pytest.fixture(scope="module")
def tiny_xl():
    """A UNet of SDXL's three resolutions, on latents twice as large as the ControlNet's."""
    torch.manual_seed(1)
    return UNet2DConditionModel(
        sample_size=32,
        block_out_channels=WIDTHS[:3],
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=24,
        norm_num_groups=8,
        attention_head_dim=4,
    ).eval()


@pytest.fixture
def xl_call():
    torch.manual_seed(2)
    return torch.randn(2, 4, 32, 32), 500, torch.randn(2, 7, 24)


def hints(n=2, size=128):
    return torch.rand(n, 3, size, size, generator=torch.Generator().manual_seed(n))


def texts(n=2):
    return torch.randn(n, 5, 16, generator=torch.Generator().manual_seed(n))


@pytest.fixture(scope="module")
def xl_adapter(tiny_xl, network):
    torch.manual_seed(3)
    return CtrlAdapterModel.for_model(tiny_xl, network, latent_ratio=2, **SMALL).eval().requires_grad_(False)


@pytest.fixture(scope="module")
def edge_control():
    return zoo.load_controlnet(CONTROLNET)


@pytest.fixture
def drawn_by(shapes_unet_eps, edge_control):
    """`drawn_by(adapter, captions, edge maps)`: give the adapter something to draw by."""

    def set_control(adapter, captions, maps, **options):
        adapter.control = CtrlAdapterControl.from_prompts(
            edge_control,
            maps.expand(-1, 3, -1, -1),
            captions,
            shapes_unet_eps.tokenizer,
            shapes_unet_eps.text_encoder,
            **options,
        )

    return set_control


class TestPublishedLayout:
    """Names and numbers of the authors' files."""

    @pytest.mark.parametrize(("config", "tensors", "millions"), [(SDXL, 378, 183.8), (VIDEO, 1092, 587.3)])
    def test_counts(self, config, tensors, millions):
        with torch.device("meta"):
            model = CtrlAdapterModel(**config)
        assert len(model.state_dict()) == tensors
        assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, abs=0.05)

    def test_names_and_shapes_of_a_video_block(self):
        with torch.device("meta"):
            found = {k: tuple(v.shape) for k, v in CtrlAdapterModel(**VIDEO).state_dict().items()}
        block = {
            "resnet_time_embedding.linear_1.weight": (320, 320),
            "norm.weight": (320,),
            "proj_in.weight": (512, 320),
            "proj_out.weight": (320, 512),
            "spatial_resnets.0.conv_shortcut.weight": (320, 320, 1, 1),
            "spatial_resnets.0.time_emb_proj.weight": (320, 320),
            "spatial_resnets.0.conv2.weight": (320, 320, 3, 3),
            "spatial_attentions.0.attn1.to_q.weight": (320, 512),
            "spatial_attentions.0.attn1.to_out.0.weight": (512, 320),
            "spatial_attentions.0.attn2.to_k.weight": (320, 1024),
            "spatial_attentions.0.ff.net.0.proj.weight": (4096, 512),
            "spatial_attentions.0.ff.net.2.weight": (512, 2048),
            "transformer_time_embedding.linear_1.weight": (512, 320),
            "transformer_time_embedding.linear_2.weight": (512, 512),
            "temporal_resnets.0.conv1.weight": (320, 320, 3, 1, 1),
            "temporal_attentions.0.norm_in.weight": (512,),
            "temporal_attentions.0.ff_in.net.0.proj.weight": (4096, 512),
            "resnets_time_mixer.0.mix_factor": (1,),
            "transformers_time_mixer.0.mix_factor": (1,),
        }
        for name, shape in block.items():
            assert found[f"down_blocks_adapter.0.{name}"] == shape, name
        assert "down_blocks_adapter.0.temporal_resnets.0.conv_shortcut.weight" not in found
        assert found["mid_block_adapter.norm.weight"] == (1280,)
        assert {int(m[1]) for k in found if (m := re.match(r"down_blocks_adapter\.(\d+)", k))} == set(range(12))

    @pytest.mark.parametrize("config", [SDXL, VIDEO])
    def test_config_is_read_off_bare_tensors(self, config):
        with torch.device("meta"):
            tensors = CtrlAdapterModel(**config).state_dict()
            read, converted = CtrlAdapterModel.published(tensors)
            again = CtrlAdapterModel(**read).state_dict()
        assert {k: v.shape for k, v in again.items()} == {k: v.shape for k, v in converted.items()}

    def test_a_folder_under_the_authors_class_name_loads(self, tmp_path, xl_adapter):
        xl_adapter.save_pretrained(tmp_path)
        path = tmp_path / "config.json"
        config = json.loads(path.read_text()) | {"_class_name": "ControlNetAdapter", "_diffusers_version": "0.27.0"}
        path.write_text(json.dumps(config))
        again = CtrlAdapterModel.from_pretrained(tmp_path)
        assert all(torch.equal(v, again.state_dict()[k]) for k, v in xl_adapter.state_dict().items())

    def test_one_file_comes_back_bit_for_bit(self, tmp_path, xl_adapter):
        path = xl_adapter.save_file(tmp_path / "a.safetensors")
        again = CtrlAdapterModel.from_pretrained(path)
        assert all(torch.equal(v, again.state_dict()[k]) for k, v in xl_adapter.state_dict().items())
        assert again.save_file(tmp_path / "b.safetensors").read_bytes() == path.read_bytes()

    def test_adapters_per_location(self):
        with torch.device("meta"):
            active = [CtrlAdapterModel(**SDXL, num_adapters_per_location=n).active for n in (1, 2, 3)]
        assert active == [[2, 5, 8], [0, 2, 3, 5, 6, 8], list(range(9))]


class TestShapes:
    def test_outputs_have_the_shapes_of_the_skip_connections(self, tiny_xl, xl_adapter, xl_call):
        skips, handles = [], []
        for block in tiny_xl.up_blocks:
            handles.append(
                block.register_forward_pre_hook(
                    lambda m, a, k: skips.extend(reversed(k["res_hidden_states_tuple"])), with_kwargs=True
                )
            )
        with torch.no_grad():
            tiny_xl(*xl_call)
        [h.remove() for h in handles]
        sizes = [16, 16, 16, 8, 8, 8, 4, 4, 4, 2, 2, 2]
        channels = xl_adapter.config.controlnet_channels
        given = [torch.randn(2, c, s, s) for c, s in zip(channels, sizes)]
        down, mid = xl_adapter(given, torch.randn(2, channels[-1], 2, 2), 500, xl_call[2])
        assert [d.shape for d in down[:9]] == [s.shape for s in reversed(skips)]
        assert all(d.abs().sum() > 0 for d in down[:9])
        assert not any(d.any() for d in down[9:]) and not mid.any()

    def test_a_small_start_is_the_same_in_small(self, tiny_xl, network, xl_call):
        """The last layers are linear in what is before them, which does not depend on them."""
        torch.manual_seed(3)
        fresh = CtrlAdapterModel.for_model(tiny_xl, network, "C", latent_ratio=2, **SMALL).eval()
        given = [torch.randn(2, c, 4, 4) for c in fresh.config.controlnet_channels[:-1]]

        def outputs():
            with torch.no_grad():
                return [fresh(given, None, 500, xl_call[2])[0][k] for k in fresh.active]

        whole = outputs()
        assert fresh.start_small(0.5) is fresh
        for a, b in zip(outputs(), whole):
            torch.testing.assert_close(a, b / 2, atol=1e-4, rtol=0)
        fresh.start_small(0)
        assert not any(output.any() for output in outputs()) and all(output.any() for output in whole)
        for share in (-0.1, 1.5):
            with pytest.raises(ValueError, match="accepted: 0 to 1"):
                fresh.start_small(share)

    def test_an_untrained_adapter_changes_the_picture(self, tiny_xl, network, xl_adapter, xl_call):
        xl_adapter.control = CtrlAdapterControl(network, hints(), texts())
        with torch.no_grad():
            plain = tiny_xl(*xl_call).sample
            with xl_adapter.attach(tiny_xl):
                assert not torch.allclose(tiny_xl(*xl_call).sample, plain, atol=1e-2)
            assert torch.equal(tiny_xl(*xl_call).sample, plain)

    def test_scale_multiplies_the_controlnets_residuals(self, network):
        control = CtrlAdapterControl(network, hints(), texts())
        x, t = torch.randn(2, 4, 16, 16), torch.tensor([500, 500])
        one, half = control.residuals(x, t)[0], control.residuals(x, t, scale=0.5)[0]
        assert all(torch.allclose(a * 0.5, b, atol=1e-6) for a, b in zip(one, half))

    def test_a_controlnet_of_the_backbone_adds_up(self, tiny_xl, network, xl_adapter, xl_call):
        """Residuals that the call brings along and those of the adapter are summed."""
        x, t, context = xl_call
        xl_adapter.control = CtrlAdapterControl(network, hints(), texts())
        shapes = [(32, 32)] * 3 + [(32, 16)] + [(64, 16)] * 2 + [(64, 8)] * 3
        own = [torch.randn(2, c, s, s) for c, s in shapes]
        own_mid = torch.randn(2, 64, 8, 8)
        call = {"down_block_additional_residuals": own, "mid_block_additional_residual": own_mid}
        small = torch.nn.functional.avg_pool2d(x, 2)
        with torch.no_grad():
            down, mid = xl_adapter.control.residuals(small, torch.tensor([t, t]))
            adapted = xl_adapter(down, mid, t, context)[0][:9]
            summed = [a + b for a, b in zip(own, adapted)]
            expected = tiny_xl(x, t, context, **{**call, "down_block_additional_residuals": summed}).sample
            with xl_adapter.attach(tiny_xl):
                assert torch.allclose(tiny_xl(x, t, context, **call).sample, expected, atol=1e-5)


class TestBypass:
    @pytest.mark.parametrize("name", ["shapes_unet", "shapes_dit"])
    def test_scale_zero_is_the_plain_pipeline_bit_for_bit(self, name, request, edge_control, drawn_by):
        pipe, scenes = request.getfixturevalue(name), zoo.held_out(2)
        torch.manual_seed(0)
        adapter = CtrlAdapterModel.for_model(pipe, edge_control, "AB", num_adapters_per_location=1, **SMALL)
        drawn_by(adapter, scenes.captions, edges(scenes.images))
        plain = zoo.generate(pipe, scenes.captions, 2)
        with adapter.attach(pipe):
            assert not torch.equal(zoo.generate(pipe, scenes.captions, 2), plain)
            adapter.set_scale(0)
            assert torch.equal(zoo.generate(pipe, scenes.captions, 2), plain)
        assert torch.equal(zoo.generate(pipe, scenes.captions, 2), plain)

    def test_steps_outside_the_range_are_plain(self, shapes_unet, edge_control, drawn_by):
        """Step i of S is controlled if i / S >= start and (i + 1) / S <= end."""
        scenes, seen = zoo.held_out(1), []
        adapter = CtrlAdapterModel.for_model(shapes_unet, edge_control, "A", **SMALL)
        drawn_by(adapter, scenes.captions, edges(scenes.images), start=0.2, end=0.6)
        note = shapes_unet.unet.register_forward_hook(
            lambda m, a, k, o: seen.append("down_block_additional_residuals" in k), with_kwargs=True
        )
        call = shapes_unet.unet.forward
        controlled = []

        def counted(*args, **kwargs):
            controlled.append(kwargs.get("down_block_additional_residuals") is not None)
            return call(*args, **kwargs)

        shapes_unet.unet.forward = counted
        try:
            with adapter.attach(shapes_unet):
                zoo.generate(shapes_unet, scenes.captions, 10)
        finally:
            del shapes_unet.unet.forward
            note.remove()
        assert controlled == [False] * 2 + [True] * 4 + [False] * 4


class TestLatentSkipping:
    def test_the_noisy_latents_matter_only_without_it(self, network):
        control, t = CtrlAdapterControl(network, hints(), texts()), torch.tensor([500, 500])
        x, y = torch.randn(2, 2, 4, 16, 16)
        for skip in (True, False):
            a, b = (control.residuals(z, t, skip_latents=skip)[0] for z in (x, y))
            assert all(torch.equal(r, s) == skip for r, s in zip(a, b))
        assert not network.conv_in._forward_hooks

    def test_with_a_fixed_timestep_the_controlnet_runs_once(self, shapes_dit, edge_control, drawn_by):
        scenes, calls = zoo.held_out(2), []
        adapter = CtrlAdapterModel.for_model(
            shapes_dit,
            edge_control,
            "AB",
            num_adapters_per_location=1,
            skip_conv_in=True,
            fixed_controlnet_timestep=500,
            **SMALL,
        )
        drawn_by(adapter, scenes.captions, edges(scenes.images))
        note = edge_control.register_forward_hook(lambda *_: calls.append(1))
        try:
            with adapter.attach(shapes_dit):
                first = zoo.generate(shapes_dit, scenes.captions, 3)
                assert len(calls) == 1
                drawn_by(adapter, scenes.captions, edges(scenes.images).roll(1, 0))
                assert not torch.equal(zoo.generate(shapes_dit, scenes.captions, 3), first)
            assert len(calls) == 2
        finally:
            note.remove()

    def test_with_both_timesteps_fixed_everything_runs_once(self, shapes_unet, edge_control, drawn_by):
        """And draws what it draws when computed anew at every step."""
        scenes, calls = zoo.held_out(2), []
        settings = {"skip_conv_in": True, "fixed_controlnet_timestep": 500, "fixed_adapter_timestep": 300}
        torch.manual_seed(0)
        adapter = CtrlAdapterModel.for_model(shapes_unet, edge_control, "AB", **settings, **SMALL).requires_grad_(
            False
        )
        drawn_by(adapter, scenes.captions, edges(scenes.images))
        note = adapter.register_forward_hook(lambda *_: calls.append(1))
        with adapter.attach(shapes_unet):
            once = zoo.generate(shapes_unet, scenes.captions, 4)
            assert len(calls) == 1
            zoo.generate(shapes_unet, scenes.captions[::-1], 2)  # other prompts
            assert len(calls) == 2
            with torch.enable_grad():  # in training nothing is kept
                call = torch.zeros(4, 4, 16, 16), 5, torch.zeros(4, 20, 128)
                assert shapes_unet.unet(*call).sample.isfinite().all() and len(calls) == 3
        step = shapes_unet.unet.register_forward_pre_hook(lambda *_: adapter._forget())
        with adapter.attach(shapes_unet):
            every = zoo.generate(shapes_unet, scenes.captions, 4)
        note.remove(), step.remove()
        assert torch.equal(once, every) and len(calls) == 7
        assert adapter._constant == (None, None, None) and not adapter._adapted


def block_macs(channels, side, words, context, width=512):
    """Operations of one location of an image adapter, counted by hand: `side` is that of the outputs."""
    pixels = side * side
    resnet = (9 + 9 + 1) * channels**2 * pixels + 3 * channels**2
    own = 4 * width * channels * pixels + 2 * pixels**2 * channels
    told = 2 * width * channels * pixels + 2 * context * channels * words + 2 * pixels * words * channels
    return resnet + 2 * width * channels * pixels + own + told + (8 + 4) * width**2 * pixels


class TestCost:
    """Operations of a run, counted exactly; with latent skipping control is cheaper than the ControlNet it adapts."""

    STEPS = 3

    @pytest.mark.parametrize(
        ("fixed", "of_controlnet", "of_adapter"),
        [({}, STEPS, STEPS), ({"controlnet": 500}, 1, STEPS), ({"controlnet": 500, "adapter": 500}, 1, 1)],
    )
    def test_a_run_on_the_small_model(self, shapes_unet, edge_control, drawn_by, fixed, of_controlnet, of_adapter):
        scenes = zoo.held_out(1)
        settings = {f"fixed_{name}_timestep": t for name, t in fixed.items()} | {"skip_conv_in": bool(fixed)}
        adapter = CtrlAdapterModel.for_model(shapes_unet, edge_control, "AB", **settings, **SMALL)
        drawn_by(adapter, scenes.captions, edges(scenes.images))
        x, t, text = torch.zeros(2, 4, 16, 16), torch.zeros(2), torch.zeros(2, 20, 128)  # both halves of guidance
        hint = torch.zeros(2, 3, 64, 64)
        with torch.no_grad():
            down, mid = edge_control(x, t, text, hint, return_dict=False)
        control = count_macs(edge_control, x, t, text, hint)
        own = count_macs(adapter, down, mid, t, text)
        plain = count_macs(zoo.generate, shapes_unet, scenes.captions, self.STEPS)
        with adapter.attach(shapes_unet):
            whole = count_macs(zoo.generate, shapes_unet, scenes.captions, self.STEPS)
        assert whole - plain == of_controlnet * control + of_adapter * own

    def test_the_authors_sizes(self):
        """SDXL at 1024 x 1024 with a ControlNet of SD 1.5."""
        with torch.device("meta"):
            control, adapter = ControlNetModel(cross_attention_dim=768).eval(), CtrlAdapterModel(**SDXL).eval()
            call = torch.zeros(1, 4, 64, 64), torch.zeros(1), torch.zeros(1, 77, 768), torch.zeros(1, 3, 512, 512)
            context = torch.zeros(1, 77, 2048)
            with torch.no_grad():
                down, mid = control(*call, return_dict=False)
            once, own = count_macs(control, *call), count_macs(adapter, down, mid, call[1], context)
        sides = [128, 128, 128, 64, 64, 64, 32, 32, 32]
        channels = [320] * 4 + [640] * 3 + [1280] * 2
        assert own == sum(block_macs(c, s, 77, 2048) for c, s in zip(channels, sides))
        # At every step the adapter alone is dearer than the ControlNet; once per picture, both are cheaper.
        assert own > once and once + own < 10 * once

    def test_the_shipped_adapter_against_the_controlnet_at_every_step(self, edge_control):
        x, t, text = torch.zeros(1, 4, 16, 16), torch.zeros(1), torch.zeros(1, 20, 128)
        hint = torch.zeros(1, 3, 64, 64)
        adapter = CtrlAdapterModel.from_pretrained(zoo.adapter_file("ctrl-adapter-once-shapes-unet")).float()
        with torch.no_grad():
            down, mid = edge_control(x, t, text, hint, return_dict=False)
        control = count_macs(edge_control, x, t, text, hint)
        assert control + count_macs(adapter, down, mid, t, text) < 2 * control  # so two steps are enough to gain


class TestRouter:
    def outputs(self, n):
        generator = torch.Generator().manual_seed(0)
        return [[torch.randn(1, 2, 3, 3, generator=generator) for _ in range(13)] for _ in range(n)]

    @pytest.mark.parametrize("kind", ["equal_weights", "simple_weights"])
    def test_weights_sum_to_one_and_masked_experts_have_none(self, kind):
        torch.manual_seed(0)
        router = CtrlAdapterRouter(num_experts=4, router_type=kind)
        assert torch.allclose(router.weights().sum(-1), torch.ones(13))
        masked = router.weights([True, False, True, False])
        assert masked[:, [1, 3]].max() < 1e-6 and torch.allclose(masked.sum(-1), torch.ones(13))

    def test_names_of_the_authors_files(self):
        names = {k: tuple(v.shape) for k, v in CtrlAdapterRouter(num_experts=4).state_dict().items()}
        assert names == {f"down_blocks_router.{k}.wg.weight": (4, 1) for k in range(12)} | {
            "mid_block_router.wg.weight": (4, 1)
        }
        assert not CtrlAdapterRouter(router_type="equal_weights").state_dict()

    def test_a_single_expert_is_the_plain_path(self, network):
        router = CtrlAdapterRouter(num_experts=1, router_type="equal_weights")
        x, t = torch.randn(2, 4, 16, 16), torch.tensor([3, 3])
        plain = CtrlAdapterControl(network, hints(), texts()).residuals(x, t)
        routed = CtrlAdapterControl(network, hints(), texts(), router=router).residuals(x, t)
        assert all(torch.equal(a, b) for a, b in zip([*plain[0], plain[1]], [*routed[0], routed[1]]))

    def test_the_weighted_sum(self):
        torch.manual_seed(0)
        router, outputs = CtrlAdapterRouter(num_experts=3), self.outputs(3)
        weights = router.weights()
        for k, combined in enumerate(router(outputs)):
            expected = sum(weights[k, e] * outputs[e][k] for e in range(3))
            assert torch.allclose(combined, expected, atol=1e-6)

    def test_without_a_router_it_is_the_mean(self, network):
        other, x, t = control_network(9), torch.randn(2, 4, 16, 16), torch.tensor([3, 3])
        parts = [CtrlAdapterControl(c, hints(), texts()).residuals(x, t)[1] for c in (network, other)]
        both = CtrlAdapterControl([network, other], [hints(), hints()], texts()).residuals(x, t)[1]
        assert torch.allclose(both, (parts[0] + parts[1]) / 2, atol=1e-6)


class _Pipe:
    def __init__(self, unet):
        self.unet, self.scheduler = unet, EulerDiscreteScheduler()
        self.scheduler.set_timesteps(5)


@pytest.fixture(scope="module")
def videos():
    """Video UNets by name, each with the arguments of a call."""
    torch.manual_seed(4)
    common = {"sample_size": 16, "block_out_channels": WIDTHS, "cross_attention_dim": 24}
    first = I2VGenXLUNet(**common, norm_num_groups=8, attention_head_dim=8).eval()
    stable = UNetSpatioTemporalConditionModel(
        **common,
        num_attention_heads=4,
        projection_class_embeddings_input_dim=24,
        addition_time_embed_dim=8,
        num_frames=FRAMES,
    ).eval()
    pictures = torch.randn(2, 4, FRAMES, 16, 16)
    return {
        "i2vgenxl": (
            _Pipe(first),
            {
                "sample": torch.randn(2, 4, FRAMES, 16, 16),
                "timestep": torch.tensor(500),
                "fps": torch.tensor([8, 8]),
                "image_latents": pictures,
                "image_embeddings": torch.randn(2, 24),
                "encoder_hidden_states": torch.randn(2, 5, 24),
            },
        ),
        "svd": (
            _Pipe(stable),
            {
                "sample": torch.randn(2, FRAMES, 8, 16, 16),
                "timestep": _Pipe(stable).scheduler.timesteps[2],
                "encoder_hidden_states": torch.randn(2, 1, 24),
                "added_time_ids": torch.randn(2, 3),
            },
        ),
    }


class TestVideo:
    @pytest.mark.parametrize("name", ["i2vgenxl", "svd"])
    def test_on_off_and_key_frames(self, videos, network, name):
        pipe, call = videos[name]
        torch.manual_seed(5)
        adapter = CtrlAdapterModel.for_model(pipe, network, **SMALL)
        with torch.no_grad():
            plain = pipe.unet(**call).sample
            with adapter.attach(pipe):
                adapter.control = CtrlAdapterControl(network, hints(FRAMES), texts(1))
                dense = pipe.unet(**call).sample
                adapter.control = CtrlAdapterControl(network, hints(1), texts(1), sparse_frame_ids=[1])
                sparse = pipe.unet(**call).sample
                adapter.set_scale(0)
                assert torch.equal(pipe.unet(**call).sample, plain)
            assert torch.equal(pipe.unet(**call).sample, plain)
        assert not torch.allclose(dense, plain, atol=1e-2) and not torch.allclose(sparse, plain, atol=1e-2)
        assert not torch.allclose(dense, sparse, atol=1e-2)

    @pytest.fixture(scope="class")
    def adapter(self, videos, network):
        torch.manual_seed(6)
        return CtrlAdapterModel.for_model(videos["svd"][0], network, **SMALL).eval()

    def residuals(self, rows):
        generator = torch.Generator().manual_seed(0)
        sizes = [(32, 16)] * 3 + [(32, 8)] + [(64, 8)] * 2 + [(64, 4)] * 3 + [(64, 2)] * 3
        down = [torch.randn(rows, c, s, s, generator=generator) for c, s in sizes]
        return down, torch.randn(rows, 64, 2, 2, generator=generator)

    @torch.no_grad()
    def test_residuals_of_other_frames_are_zero(self, adapter):
        down, mid = self.residuals(4)  # two clips, two key frames each
        context = torch.randn(4, 1, 24)
        full, full_mid = adapter(down, mid, 5, context, num_frames=5, sparse_frame_ids=[1, 3])
        keys, keys_mid = adapter(down, mid, 5, context, num_frames=2)
        for whole, key in zip([*full, full_mid], [*keys, keys_mid]):
            assert len(whole) == 10 and torch.equal(whole[[1, 3, 6, 8]], key)
            assert not whole[[0, 2, 4, 5, 7, 9]].any()

    @torch.no_grad()
    def test_clips_do_not_see_each_other_and_frames_do(self, adapter):
        down, mid = self.residuals(2 * FRAMES)
        context = torch.randn(2 * FRAMES, 1, 24)
        both = adapter(down, mid, 5, context, num_frames=FRAMES)[1]
        rows = slice(FRAMES, None)
        alone = adapter([d[rows] for d in down], mid[rows], 5, context[rows], num_frames=FRAMES)[1]
        assert torch.allclose(both[rows], alone, atol=1e-5)
        changed = mid.clone()
        changed[0] += 1
        moved = adapter(down, changed, 5, context, num_frames=FRAMES)[1]
        assert not torch.allclose(moved[1], both[1], atol=1e-4)  # the next frame of the same clip
        assert torch.allclose(moved[rows], both[rows], atol=1e-6)

    def test_frames_must_be_whole_clips(self, adapter):
        down, mid = self.residuals(4)
        with pytest.raises(ValueError, match="4 frames are no number of clips of 3"):
            adapter(down, mid, 5, torch.randn(4, 1, 24), num_frames=FRAMES)
        with pytest.raises(ValueError, match="frames go from 0 to 4"):
            adapter(down, mid, 5, torch.randn(4, 1, 24), num_frames=5, sparse_frame_ids=[1, 5])

    def test_a_picture_adapter_is_refused(self, videos, network):
        pipe, _ = videos["svd"]
        adapter = CtrlAdapterModel.for_model(pipe, network, add_temporal_resnet=False, **SMALL)
        with pytest.raises(ValueError, match="no temporal parts"):
            adapter.attach(pipe)


class TestTimesteps:
    def test_inverse_sampling_is_uniform_for_the_controlnet_and_exact_for_the_backbone(self):
        n = 20_000
        u = torch.rand(n, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        normal = torch.distributions.Normal(0.7, 1.6)
        sigma, t = inverse_timesteps(u, lambda q: normal.icdf(q).exp())
        # Kolmogorov-Smirnov at p = 0.01, for timesteps rounded to integers.
        order = t.double().sort().values / 1000
        distance = (order - torch.arange(1, n + 1) / n).abs().max()
        assert distance < 1.63 / n**0.5 + 0.5 / 1000
        assert torch.allclose(normal.cdf(sigma.log()), u, atol=1e-9)
        assert rank_correlation(t.double(), sigma) > 0.999

    def test_stable_video_diffusion(self):
        draws = torch.rand(20_000, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        sigma, own, t = svd_levels(draws)
        assert rank_correlation(t.double(), sigma) > 0.999
        assert sigma.min() >= 0.002 - 1e-9 and sigma.max() <= 700 + 1e-6
        assert torch.allclose(own, sigma.log() / 4)
        assert t.min() >= 1 and t.max() <= 961 and (t.double() / 961).mean() == pytest.approx(0.5, abs=0.01)

    def test_steps_of_a_run(self):
        assert [inference_timestep(i, 4) for i in range(4)] == [751, 501, 251, 1]


def rank_correlation(a, b):
    ranks = torch.stack([v.argsort().argsort().double() for v in (a, b)])
    return torch.corrcoef(ranks)[0, 1].item()


@pytest.fixture(scope="module")
def scenes():
    return zoo.held_out(PICTURES)


@pytest.fixture(scope="module")
def wanted(scenes):
    return edges(scenes.images)


@pytest.fixture(scope="module")
def captions(scenes):
    """Shapes and colours only: where things are and how large is for the edges to say."""
    return [zoo.caption(spec, keep=()) for spec in scenes.specs.tolist()]


@pytest.fixture(scope="module")
def native(captions, wanted, edge_control):
    """Agreement of the ControlNet on its own model."""
    from diffusers import StableDiffusionControlNetPipeline

    pipe = StableDiffusionControlNetPipeline.from_pipe(zoo.load("shapes-unet-eps"), controlnet=edge_control)
    pipe.set_progress_bar_config(disable=True)
    images = zoo.generate(pipe, captions, 10, image=wanted.expand(-1, 3, -1, -1))
    return edge_f1(edges(images), wanted).mean()


class TestLearnt:
    """The shipped files: an edge ControlNet of shapes-unet-eps, and adapters that bring it to other models."""

    def test_files_are_small(self):
        for name in (CONTROLNET, TRANSFORMER, *SHIPPED):
            assert zoo.adapter_file(name).stat().st_size < 3e6

    def test_other_files_are_no_controlnet(self):
        with pytest.raises(ValueError, match="holds a CtrlAdapterModel, not a ControlNetModel"):
            zoo.load_controlnet("ctrl-adapter-shapes-unet")

    @pytest.fixture(scope="class")
    def free(self, captions):
        """Edges of pictures without control."""
        return edges(zoo.generate(zoo.load("shapes-unet"), captions, 10))

    def drawn(self, pipe, adapter, captions, wanted, drawn_by):
        drawn_by(adapter, captions, wanted)
        with adapter.attach(pipe):
            return edges(zoo.generate(pipe, captions, 10))

    @pytest.mark.parametrize("name", SHIPPED)
    def test_control_carries_over(self, shapes_unet, captions, wanted, native, free, drawn_by, name):
        adapter = CtrlAdapterModel.from_pretrained(zoo.adapter_file(name))
        found = self.drawn(shapes_unet, adapter, captions, wanted, drawn_by)
        f1, without = edge_f1(found, wanted).mean(), edge_f1(free, wanted).mean()
        assert f1 > 0.7 * native and f1 > 2 * without
        exact = [edge_iou(maps, wanted, tolerance=0).mean() for maps in (found, free)]
        assert exact[0] > 3 * exact[1]

    def test_random_weights_do_not(self, shapes_unet, captions, wanted, free, drawn_by):
        adapter = CtrlAdapterModel.from_pretrained(zoo.adapter_file(SHIPPED[0]))
        torch.manual_seed(0)
        untrained = CtrlAdapterModel(**{k: v for k, v in adapter.config.items() if not k.startswith("_")})
        found = self.drawn(shapes_unet, untrained, captions, wanted, drawn_by)
        assert edge_f1(found, wanted).mean() < 1.25 * edge_f1(free, wanted).mean()

    @pytest.fixture(scope="class")
    def plain(self, scenes, judge):
        """What the judge reads of pictures without control."""
        return judge.accuracy(zoo.generate(zoo.load("shapes-unet"), scenes.captions, 10), scenes.specs)

    @pytest.mark.parametrize("name", SHIPPED)
    def test_the_judge_reads_as_before(self, shapes_unet, scenes, wanted, plain, drawn_by, judge, name):
        adapter = CtrlAdapterModel.from_pretrained(zoo.adapter_file(name))
        drawn_by(adapter, scenes.captions, wanted)
        with adapter.attach(shapes_unet):
            controlled = judge.accuracy(zoo.generate(shapes_unet, scenes.captions, 10), scenes.specs)
        for attribute in ("ground", "layout", "shape1", "colour1"):
            assert controlled[attribute] > plain[attribute] - 0.1  # one of twelve pictures


class TestLearntByATransformer:
    """The ControlNet of an epsilon UNet draws with a flow-matching transformer: other width, tokens, noise levels."""

    @pytest.fixture
    def adapter(self):
        return CtrlAdapterModel.from_pretrained(zoo.adapter_file(TRANSFORMER))

    def draw(self, pipe, adapter, texts, maps, drawn_by):
        drawn_by(adapter, texts, maps)
        with adapter.attach(pipe):
            return zoo.generate(pipe, texts, 10)

    def agreements(self, images, maps):
        found = edges(images)
        return edge_f1(found, maps).mean(), edge_iou(found, maps, tolerance=0).mean()

    def test_the_models_differ(self, shapes_dit, edge_control, adapter):
        widths = {edge_control.config.block_out_channels[k] for k in range(3)}
        width = shapes_dit.transformer.config.num_attention_heads * shapes_dit.transformer.config.attention_head_dim
        (place,) = adapter.active
        assert adapter.widths[place] == width != adapter.config.controlnet_channels[place] in widths
        assert zoo.adapter_file(TRANSFORMER).stat().st_size < 0.9e6

    def test_control_carries_over(self, shapes_dit, captions, wanted, native, adapter, drawn_by, example):
        """Random weights draw no more by the edges than the plain model does.

        They are as small as training starts with: larger ones draw noise, whose many edges meet any edge map.
        """
        torch.manual_seed(0)
        untrained = CtrlAdapterModel(**{k: v for k, v in adapter.config.items() if not k.startswith("_")})
        assert "shapes-dit" in example.START_SMALL
        untrained.start_small()
        free = self.agreements(zoo.generate(shapes_dit, captions, 10), wanted)
        random = self.agreements(self.draw(shapes_dit, untrained, captions, wanted, drawn_by), wanted)
        f1, exact = self.agreements(self.draw(shapes_dit, adapter, captions, wanted, drawn_by), wanted)
        assert f1 > 0.7 * native and f1 > 2 * free[0] and exact > 3 * free[1]
        assert random[0] < 1.25 * free[0] and random[1] < 1.25 * free[1]

    @pytest.mark.slow
    def test_on_many_captions(self, shapes_dit, adapter, drawn_by, judge):
        """Three times the exact agreement; the judge reads full captions as before."""
        scenes = zoo.held_out(100)
        maps = edges(scenes.images)
        short = [zoo.caption(spec, keep=()) for spec in scenes.specs.tolist()]
        free = self.agreements(zoo.generate(shapes_dit, short, 10, batch_size=100), maps)
        drawn_by(adapter, short, maps)
        with adapter.attach(shapes_dit):
            found = self.agreements(zoo.generate(shapes_dit, short, 10, batch_size=100), maps)
            drawn_by(adapter, scenes.captions, maps)
            full = zoo.generate(shapes_dit, scenes.captions, 10, batch_size=100)
        assert found[0] > 1.7 * free[0] and found[1] > 3 * free[1]  # F1 by chance is 0.35: many scenes are striped
        plain = zoo.generate(shapes_dit, scenes.captions, 10, batch_size=100)
        read = [judge.accuracy(images, scenes.specs)["all"] for images in (full, plain)]
        assert read[0] > read[1] - 0.03

    def test_true_guidance_controls_both_calls_and_computes_them_once(
        self, shapes_dit, edge_control, drawn_by, adapter
    ):
        """A step calls the transformer with the prompt and with the empty one; each has its own control, kept."""
        scenes, calls, given = zoo.held_out(2), [], []
        drawn_by(adapter, scenes.captions, edges(scenes.images))
        notes = [
            adapter.register_forward_hook(lambda *_: calls.append("adapter")),
            edge_control.register_forward_hook(lambda *_: calls.append("ControlNet")),
        ]
        forward = shapes_dit.transformer.forward

        def counted(*args, **kwargs):
            given.append(kwargs["controlnet_block_samples"][0])
            return forward(*args, **kwargs)

        shapes_dit.transformer.forward = counted
        try:
            with adapter.attach(shapes_dit):
                zoo.generate(shapes_dit, scenes.captions, 3)
        finally:
            del shapes_dit.transformer.forward
            [note.remove() for note in notes]
        assert len(given) == 6 and all(sample.any() for sample in given)
        assert sorted(calls) == ["ControlNet", "adapter", "adapter"]
        assert all(torch.equal(given[k], given[k % 2]) for k in range(6)) and not torch.equal(*given[:2])


@pytest.fixture(scope="module")
def example(repository_root):
    spec = importlib.util.spec_from_file_location(
        "train_ctrl_adapter", repository_root / "examples/train_adapters/ctrl_adapter.py"
    )
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def repository_root(request):
    return request.config.rootpath


def test_training_changes_the_adapter_only(example, tmp_path, monkeypatch, edge_control):
    """Both stages run, go on from one another, and leave backbone and ControlNet as they were."""
    loaded = {}
    original = zoo.load
    monkeypatch.setattr(zoo, "load", lambda name: loaded.setdefault(name, original(name)))
    made = []
    build = CtrlAdapterModel.for_model
    monkeypatch.setattr(example.CtrlAdapterModel, "for_model", lambda *a, **k: made.append(build(*a, **k)) or made[-1])
    before = {k: v.clone() for k, v in original("shapes-unet").unet.state_dict().items()}
    example.main(["controlnet", "--work", str(tmp_path), "--images", "8", "--steps", "2", "--batch", "4"])
    frozen = (tmp_path / f"{CONTROLNET}.safetensors").read_bytes()
    example.main(["shapes-unet", "--work", str(tmp_path), "--images", "8", "--steps", "2", "--batch", "4"])
    unet = loaded["shapes-unet"].unet
    assert all(torch.equal(v, before[k]) for k, v in unet.state_dict().items())
    assert all(p.grad is None for p in unet.parameters())
    assert (tmp_path / f"{CONTROLNET}.safetensors").read_bytes() == frozen
    trained = CtrlAdapterModel.from_pretrained(tmp_path / "ctrl-adapter-shapes-unet.safetensors")
    torch.manual_seed(0)
    assert trained.config.skip_conv_in is False and not unet._forward_pre_hooks
    fresh = build(loaded["shapes-unet"], edge_control, "AB", **example.SMALL, num_adapters_per_location=3)
    assert trained.state_dict().keys() == fresh.state_dict().keys()


class TestTogether:
    def test_two_adapters_in_either_order(self, tiny_xl, network, xl_call):
        adapters = []
        for seed in (1, 2):
            torch.manual_seed(seed)
            adapters.append(CtrlAdapterModel.for_model(tiny_xl, network, latent_ratio=2, **SMALL))
            adapters[-1].control = CtrlAdapterControl(control_network(seed), hints(), texts())
        outputs = []
        for first, second in (adapters, adapters[::-1]):
            with torch.no_grad(), first.attach(tiny_xl), second.attach(tiny_xl):
                outputs.append(tiny_xl(*xl_call).sample)
        assert torch.allclose(*outputs, atol=1e-5)

    def test_two_on_a_transformer(self, shapes_dit, edge_control, drawn_by):
        scenes, outputs, adapters = zoo.held_out(1), [], []
        for seed in (1, 2):
            torch.manual_seed(seed)
            made = CtrlAdapterModel.for_model(shapes_dit, edge_control, "AB", num_adapters_per_location=seed, **SMALL)
            drawn_by(made, scenes.captions, edges(scenes.images))
            adapters.append(made)
        for first, second in (adapters, adapters[::-1]):
            with first.attach(shapes_dit), second.attach(shapes_dit):
                outputs.append(zoo.generate(shapes_dit, scenes.captions, 2))
        assert torch.allclose(*outputs, atol=1e-4)

    def test_beside_a_lora_and_a_cache(self, edge_control, drawn_by):
        from peft import LoraConfig

        shapes_unet, scenes = zoo.load("shapes-unet"), zoo.held_out(1)  # a LoRA leaves its wrappers behind
        adapter = CtrlAdapterModel.for_model(shapes_unet, edge_control, "AB", **SMALL)
        drawn_by(adapter, scenes.captions, edges(scenes.images))
        plain = zoo.generate(shapes_unet, scenes.captions, 4)
        with adapter.attach(shapes_unet):
            alone = zoo.generate(shapes_unet, scenes.captions, 4)
            with diffusers_ext.apply(shapes_unet, diffusers_ext.DeepCacheConfig(cache_interval=2)):
                cached = zoo.generate(shapes_unet, scenes.captions, 4)
            shapes_unet.unet.add_adapter(LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False), "style")
            try:
                styled = zoo.generate(shapes_unet, scenes.captions, 4)
            finally:
                shapes_unet.unet.delete_adapters("style")
            assert torch.equal(zoo.generate(shapes_unet, scenes.captions, 4), alone)
        with diffusers_ext.apply(shapes_unet, diffusers_ext.DeepCacheConfig(cache_interval=2)):
            assert not torch.allclose(cached, zoo.generate(shapes_unet, scenes.captions, 4), atol=0.05)
        assert not torch.equal(styled, alone) and not torch.equal(styled, plain)


class TestBadInput:
    def test_context_of_another_width(self, tiny_xl, network):
        adapter = CtrlAdapterModel.for_model(tiny_xl, network, latent_ratio=2, cross_attention_dim=20, **SMALL)
        with pytest.raises(ValueError, match="cross_attention_dim is 20, but UNet2DConditionModel .* width 24"):
            adapter.attach(tiny_xl)

    def test_another_backbone(self, shapes_unet, xl_adapter, tiny_xl):
        torch.manual_seed(0)
        wide = CtrlAdapterModel(**{**xl_adapter.config, "cross_attention_dim": 128})
        with pytest.raises(ValueError, match="the adapter at residual"):
            wide.attach(shapes_unet)
        with pytest.raises(ValueError, match="Linear is no backbone"):
            xl_adapter.attach(torch.nn.Linear(1, 1))

    @pytest.mark.parametrize("letters", ["AX", "", "Z"])
    def test_unknown_locations(self, tiny_xl, network, letters):
        with pytest.raises(ValueError, match="this ControlNet has A, B, C, D, M"):
            CtrlAdapterModel.for_model(tiny_xl, network, letters, **SMALL)

    def test_no_control(self, tiny_xl, network, xl_call):
        adapter = CtrlAdapterModel.for_model(tiny_xl, network, latent_ratio=2, **SMALL)
        with pytest.raises(RuntimeError, match="nothing to draw by"), adapter.attach(tiny_xl):
            tiny_xl(*xl_call)

    @pytest.mark.parametrize(
        ("options", "size", "words"),
        [
            ({"pool": False}, 32, "latents of 32 x 32 without pooling: the ControlNet takes 16 x 16"),
            ({}, 20, r"at least 80 x 80 pixels"),
            ({}, 31, "cannot be averaged over 2 x 2"),
        ],
    )
    def test_sizes(self, tiny_xl, network, xl_adapter, options, size, words):
        picture = hints(2, 64 if size == 20 else 128)
        xl_adapter.control = CtrlAdapterControl(network, picture, texts(), **options)
        with pytest.raises(ValueError, match=words), xl_adapter.attach(tiny_xl), torch.no_grad():
            tiny_xl(torch.randn(2, 4, size, size), 5, torch.randn(2, 7, 24))

    @pytest.mark.parametrize(
        ("change", "words"),
        [
            ({"images": [hints(), hints()]}, "1 ControlNets and 2 condition pictures"),
            ({"images": hints() + 2}, r"accepted: a tensor \[n, 3, height, width\] in \[0, 1\]"),
            ({"images": hints() * torch.nan}, "values from nan to nan"),
            ({"images": hints()[0]}, r"accepted: a tensor \[n, 3, height, width\]"),
            ({"prompt_embeds": texts()[..., :3]}, "of their own text encoder: see CtrlAdapterControl.from_prompts"),
            ({"negative_prompt_embeds": texts()[:, :3]}, "must have as many tokens"),
            ({"start": 0.7, "end": 0.5}, "fractions of the steps"),
        ],
    )
    def test_controls(self, network, change, words):
        with pytest.raises(ValueError, match=words):
            CtrlAdapterControl(**{"controlnets": network, "images": hints(), "prompt_embeds": texts(), **change})

    def test_pictures_of_another_shape(self, tiny_xl, network, xl_adapter, xl_call):
        wide = torch.cat([hints(1), hints(1)], -1)
        xl_adapter.control = CtrlAdapterControl(network, wide, texts())
        with pytest.raises(ValueError, match="crop or pad them to its shape"), xl_adapter.attach(tiny_xl):
            tiny_xl(*xl_call)

    def test_files_of_routers(self, tmp_path):
        CtrlAdapterRouter(num_experts=2).save_pretrained(tmp_path)
        path = tmp_path / "diffusion_pytorch_model.safetensors"
        tensors = load_file(path)
        tensors["strange"] = tensors.pop("mid_block_router.wg.weight")
        save_file(tensors, path, {"format": "pt"})
        with pytest.raises(ValueError, match="missing: mid_block_router.wg.weight; 1 tensors unknown: strange"):
            CtrlAdapterRouter.from_pretrained(tmp_path)

    def test_pictures_and_batch(self, tiny_xl, network, xl_adapter, xl_call):
        xl_adapter.control = CtrlAdapterControl(network, hints(3), texts())
        with pytest.raises(ValueError, match="3 condition pictures for 2 pictures"), xl_adapter.attach(tiny_xl):
            tiny_xl(*xl_call)

    @pytest.mark.parametrize(
        ("config", "words"),
        [
            ({"num_adapters_per_location": 4}, "accepted: 1, 2, 3"),
            ({"out_channels": [32]}, "1 out_channels and 13 up_sampling_scales for 13 residuals"),
            ({"up_sampling_scales": [4] * 13}, "scales go up to 2"),
            ({"attention_head_dim": 512}, "less than attention_head_dim 512"),
            ({"fixed_controlnet_timestep": 2000}, "fixed_controlnet_timestep is 2000; accepted: 0 to 1000"),
            ({"fixed_adapter_timestep": -2}, "fixed_adapter_timestep is -2; accepted: 0 to 1000"),
            ({f"add_adapter_location_{letter}": False for letter in "ABC"}, "this ControlNet has A, B, C, D, M"),
        ],
    )
    def test_configs(self, config, words):
        with pytest.raises(ValueError, match=words), torch.device("meta"):
            CtrlAdapterModel(**config)

    @pytest.mark.parametrize("active", [[True], [False] * 4])
    def test_routers(self, active):
        with pytest.raises(ValueError, match="give 4 truth values"):
            CtrlAdapterRouter().weights(active)
        with pytest.raises(ValueError, match="accepted: 'equal_weights'"):
            CtrlAdapterRouter(router_type="patch")
