"""SCEdit: identity, formulas of both tuners, the authors' files, memory of training, a style and conditions learnt."""

from __future__ import annotations

import contextlib
import importlib.util

import pytest
import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel
from safetensors.torch import save_file
from torch import nn

from diffusers_ext import CSCTuner, SCTuner, zoo
from diffusers_ext.adapters.scedit import skips_of
from diffusers_ext.training.denoising import task_of
from diffusers_ext.training.fitting import Draws
from diffusers_ext.training.shapes import denoising_loss, shapes_set
from diffusers_ext.zoo.conditions import edge_f1, edge_iou, edges


SMALL = {"pre_hint_dim_ratio": 0.5, "pre_hint_out": 32}
SD15_SKIPS = [320, 320, 320, 320, 640, 640, 640, 1280, 1280, 1280, 1280, 1280]
SD15_DOWN = [i in (3, 6, 9) for i in range(12)]
PICTURES = 12


def awake(tuner, seed=0, std=0.1):
    """A tuner that does something, without training."""
    torch.manual_seed(seed)
    for parameter in tuner.parameters():
        nn.init.normal_(parameter, std=std)
    return tuner.eval()


def draw(pipe, steps=2, captions=("a red circle", "a blue star"), **options):
    return zoo.generate(pipe, list(captions), steps, **options)


def pictures(n=2, seed=0, channels=3):
    return torch.rand(n, channels, 64, 64, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def call(shapes_unet):
    torch.manual_seed(0)
    return torch.randn(2, 4, 16, 16), 500, torch.randn(2, 20, 128)


class TestIdentity:
    def test_fresh_tuners_and_scale_zero_change_nothing(self, shapes_unet):
        plain = draw(shapes_unet)
        for tuner in (SCTuner.for_model(shapes_unet), CSCTuner.for_model(shapes_unet, **SMALL)):
            if isinstance(tuner, CSCTuner):
                tuner.set_condition(pictures())
            with tuner.attach(shapes_unet):
                assert torch.equal(draw(shapes_unet), plain)
                awake(tuner)
                if isinstance(tuner, CSCTuner):
                    tuner.set_condition(pictures())
                assert not torch.equal(draw(shapes_unet), plain)
                tuner.set_scale(0)
                assert torch.equal(draw(shapes_unet), plain)
            assert torch.equal(draw(shapes_unet), plain)

    def test_hooks_are_gone_with_the_last_tuner(self, shapes_unet):
        one, two = SCTuner.for_model(shapes_unet), SCTuner.for_model(shapes_unet)
        one.attach(shapes_unet)
        two.attach(shapes_unet)
        counts = []
        for tuner in (one, two):
            counts.append([len(b._forward_pre_hooks) for b in shapes_unet.unet.up_blocks])
            tuner.detach()
        assert counts == [[1, 1, 1], [1, 1, 1]]
        assert not any(b._forward_pre_hooks for b in shapes_unet.unet.up_blocks)


class TestFormulas:
    """What the decoder is given, against the paper's formulas written out with the weights of the state dict."""

    def perceptron(self, weights, prefix, x):
        def dense(name, y):
            return F.linear(y, weights[f"{prefix}.tuner_op.{name}.weight"], weights[f"{prefix}.tuner_op.{name}.bias"])

        return dense("ln2", F.gelu(dense("ln1", x.permute(0, 2, 3, 1)))).permute(0, 3, 1, 2)

    @torch.no_grad()
    def test_sc_tuner(self, shapes_unet, call):
        before = self._listen_last(shapes_unet.unet, call)
        tuner = awake(SCTuner.for_model(shapes_unet))
        weights, count = tuner.state_dict(), len(before)
        for scale in (1.0, 0.3):
            with tuner.attach(shapes_unet.unet, scale):
                again = self._listen_last(shapes_unet.unet, call)
            for i, x in before.items():
                expected = x + scale * self.perceptron(weights, f"lsc_identity.{count - 1 - i}", x)
                torch.testing.assert_close(again[i], expected)

    def _listen_last(self, unet, call):
        """Skips behind the tuners: hooks that were registered after theirs."""
        found, handles, last = {}, [], len(skips_of(unet)[0])
        for block in unet.up_blocks:
            last -= len(block.resnets)

            def note(module, args, kwargs, first=last):
                found.update({first + j: x for j, x in enumerate(kwargs["res_hidden_states_tuple"])})

            handles.append(block.register_forward_pre_hook(note, with_kwargs=True))
        unet(*call)
        [h.remove() for h in handles]
        return found

    def hints(self, tuner, images):
        """The chain of hints, from the paper's formulas."""
        weights, x = tuner.state_dict(), images
        strides = tuner.config.pre_hint_strides
        for layer, stride in zip(range(0, 13, 2), [1, 1, strides[0], 1, strides[1], 1, strides[2]]):
            name = f"pre_hint_blocks.{layer}"
            x = F.conv2d(x, weights[f"{name}.weight"], weights[f"{name}.bias"], stride, 1)
            x = x if layer == 12 else F.silu(x)
        found = []
        for i, down in enumerate(tuner.config.down_flags):
            name = f"dense_hint_blocks.{i}.1"
            x = F.conv2d(F.silu(x), weights[f"{name}.weight"], weights[f"{name}.bias"], 2 if down else 1, 1)
            found.append(x)
        return found

    @torch.no_grad()
    def test_two_conditions_and_a_style(self, shapes_unet, call):
        """x' = x + sum over conditions of s_k (T(x + g) + g) + s T'(x), every term from the same x."""
        plain = self._listen_last(shapes_unet.unet, call)
        count = len(plain)
        style = awake(SCTuner.for_model(shapes_unet), 1)
        conditions = [awake(CSCTuner.for_model(shapes_unet, **SMALL), seed) for seed in (2, 3)]
        for k, tuner in enumerate(conditions):
            tuner.set_condition(pictures(seed=k))
        expected = {}
        for i, x in plain.items():
            expected[i] = x + 0.5 * self.perceptron(style.state_dict(), f"lsc_identity.{count - 1 - i}", x)
        for k, (tuner, scale) in enumerate(zip(conditions, (0.8, 1.5))):
            for i, g in enumerate(self.hints(tuner, pictures(seed=k))):
                name = f"lsc_tuner_blocks.{count - 1 - i}"
                expected[i] = expected[i] + scale * (self.perceptron(tuner.state_dict(), name, plain[i] + g) + g)
        model = shapes_unet.unet
        with style.attach(model, 0.5), conditions[0].attach(model, 0.8), conditions[1].attach(model, 1.5):
            found = self._listen_last(model, call)
        with conditions[1].attach(model, 1.5), style.attach(model, 0.5), conditions[0].attach(model, 0.8):
            turned = self._listen_last(model, call)
        for i in expected:
            torch.testing.assert_close(found[i], expected[i], atol=1e-4, rtol=1e-4)
            torch.testing.assert_close(turned[i], expected[i], atol=1e-4, rtol=1e-4)

    @torch.no_grad()
    def test_the_first_decoder_block_is_given_something_linear_in_the_scale(self, shapes_unet, call):
        tuner, found = awake(SCTuner.for_model(shapes_unet)), []
        for scale in (0.0, 1.0, 2.0):
            with tuner.attach(shapes_unet.unet, scale):
                found.append(self._listen_last(shapes_unet.unet, call)[len(skips_of(shapes_unet.unet)[0]) - 1])
        torch.testing.assert_close(found[2] - found[0], 2 * (found[1] - found[0]), atol=1e-5, rtol=1e-5)

    def test_a_hint_is_zero_until_the_first_moves(self, shapes_unet):
        tuner = CSCTuner.for_model(shapes_unet, **SMALL)
        assert not any(g.any() for g in tuner.hints(pictures()))
        nn.init.normal_(tuner.dense_hint_blocks[1][1].weight)
        assert not any(g.any() for g in tuner.hints(pictures()))
        nn.init.normal_(tuner.dense_hint_blocks[0][1].weight)
        assert [bool(g.any()) for g in tuner.hints(pictures())] == [True, True, False, False, False, False]

    def test_rows_of_guided_batches(self, shapes_unet):
        """Each picture has its condition, in both halves of the batch; one condition stands for all."""
        tuner = awake(CSCTuner.for_model(shapes_unet, **SMALL), std=0.2)
        both = pictures(2)
        with tuner.attach(shapes_unet):
            tuner.set_condition(both)
            together = draw(shapes_unet)
            tuner.set_condition(both[1:])
            # The noise of a caption depends on its place, so the second is drawn in a batch of two again.
            other = draw(shapes_unet)
        assert torch.allclose(together[1], other[1], atol=1e-4)
        assert not torch.allclose(together[0], other[0], atol=1e-2)

    def test_hints_are_computed_once(self, shapes_unet):
        tuner, calls = awake(CSCTuner.for_model(shapes_unet, **SMALL)), []
        tuner.pre_hint_blocks.register_forward_hook(lambda *_: calls.append(1))
        tuner.set_condition(pictures())
        with tuner.attach(shapes_unet):
            draw(shapes_unet, 4)
            assert len(calls) == 1
            tuner.set_condition(pictures(seed=1))
            draw(shapes_unet, 4)
        assert len(calls) == 2


class TestFiles:
    def test_parameters(self, shapes_unet):
        channels, _ = skips_of(shapes_unet.unet)
        for ratio in (1.0, 0.5):
            tuner = SCTuner.for_model(shapes_unet, down_ratio=ratio)
            expected = sum(int(2 * c * c * ratio + c * ratio + c) for c in channels)
            assert sum(p.numel() for p in tuner.parameters()) == expected

    def test_stable_diffusion_has_twelve_tuners(self):
        with torch.device("meta"):
            unet = UNet2DConditionModel(cross_attention_dim=768)
            assert skips_of(unet) == (SD15_SKIPS, SD15_DOWN)
            names = set(SCTuner.for_model(unet).state_dict())
            control = CSCTuner.for_model(unet)
        parts = [f"{layer}.{kind}" for layer in ("ln1", "ln2") for kind in ("weight", "bias")]
        assert names == {f"lsc_identity.{m}.tuner_op.{part}" for m in range(12) for part in parts}
        found = {name: tuple(t.shape) for name, t in control.state_dict().items()}
        assert found["pre_hint_blocks.0.weight"] == (16, 3, 3, 3)
        assert found["pre_hint_blocks.12.weight"] == (256, 96, 3, 3)
        assert found["dense_hint_blocks.0.1.weight"] == (320, 256, 3, 3)
        assert found["dense_hint_blocks.4.1.weight"] == (640, 320, 3, 3)
        assert found["lsc_tuner_blocks.0.tuner_op.ln1.weight"] == (1280, 1280)
        assert len(found) == 2 * 7 + 2 * 12 + 4 * 12
        strides = [block[1].stride[0] for block in control.dense_hint_blocks]
        assert strides == [2 if down else 1 for down in SD15_DOWN]

    @pytest.mark.parametrize("prefix", ["", "model.", "model.0.", "0."])
    def test_files_of_the_authors(self, tmp_path, prefix):
        torch.manual_seed(0)
        channels = [8, 8, 8, 8, 16, 16]
        down = [False, False, False, True, False, False]
        style = awake(SCTuner(channels, down_ratio=0.5))
        control = awake(CSCTuner(channels, down, **SMALL, dense_hint_kernel=1))
        for tuner in (style, control):
            path = tmp_path / "published.safetensors"
            save_file({prefix + name: tensor for name, tensor in tuner.state_dict().items()}, path)
            again = type(tuner).from_pretrained(path)
            configs = [
                {k: list(v) if isinstance(v, tuple) else v for k, v in t.config.items() if not k.startswith("_")}
                for t in (again, tuner)
            ]
            assert configs[0] == configs[1]
            assert all(torch.equal(v, again.state_dict()[k]) for k, v in tuner.state_dict().items())

    def test_a_published_file_draws_the_same(self, shapes_unet, tmp_path):
        tuner = awake(SCTuner.for_model(shapes_unet), std=0.05)
        path = tmp_path / "style.safetensors"
        save_file({f"model.{name}": tensor for name, tensor in tuner.state_dict().items()}, path)
        with tuner.attach(shapes_unet):
            expected = draw(shapes_unet)
        with SCTuner.from_pretrained(path).attach(shapes_unet):
            assert torch.equal(draw(shapes_unet), expected)

    def test_round_trip(self, shapes_unet, tmp_path):
        for tuner in (SCTuner.for_model(shapes_unet, use_layers=[0, 2]), CSCTuner.for_model(shapes_unet, **SMALL)):
            path = awake(tuner).save_file(tmp_path / "a.safetensors")
            again = type(tuner).from_pretrained(path)
            assert again.save_file(tmp_path / "b.safetensors").read_bytes() == path.read_bytes()

    def test_wrong_files(self, tmp_path):
        path = tmp_path / "x.safetensors"
        save_file({"0.lsc_tuner_blocks.0.tuner_op.ln1.weight": torch.zeros(1, 1), "1.lsc_x": torch.zeros(1)}, path)
        with pytest.raises(ValueError, match="2 conditions"):
            CSCTuner.from_pretrained(path)
        save_file({"lsc_identity.1.tuner_op.ln1.weight": torch.zeros(1, 1)}, path)
        with pytest.raises(ValueError, match=r"tuners \[1\] under lsc_identity"):
            SCTuner.from_pretrained(path)
        save_file({"something": torch.zeros(1)}, path)
        for tuner in (SCTuner, CSCTuner):
            with pytest.raises(ValueError, match="no published layout"):
                tuner.from_pretrained(path)


def saved_bytes(function) -> int:
    """Bytes of activations that a computation keeps for its backward pass."""
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        loss = function()
    loss.backward()
    return sum(kept.values())


class TestTraining:
    @pytest.fixture(scope="class")
    def data(self):
        return shapes_set(zoo.load("shapes-unet"), 8)

    def test_no_gradient_in_the_encoder_and_less_memory_than_lora(self, data):
        from peft import LoraConfig

        pipe = zoo.load("shapes-unet")
        unet, rows = pipe.unet.requires_grad_(False), torch.arange(8)

        def loss():
            return denoising_loss(task_of(pipe), unet, data, rows, Draws(0, 0, 8, "cpu"))

        tuner = awake(SCTuner.for_model(pipe))
        inputs = []
        unet.mid_block.register_forward_hook(lambda m, a, output: inputs.append(output.requires_grad))
        with tuner.attach(unet):
            ours = saved_bytes(loss)
        assert inputs == [False]
        assert all(p.grad is None for p in unet.parameters()) and all(p.grad is not None for p in tuner.parameters())
        unet.add_adapter(LoraConfig(r=4, target_modules=["to_q", "to_k", "to_v", "to_out.0"]))
        lora = saved_bytes(loss)
        assert ours < 0.75 * lora

    @pytest.fixture(scope="class")
    def example(self, request):
        path = request.config.rootpath / "examples/train_adapters/scedit.py"
        spec = importlib.util.spec_from_file_location("train_scedit", path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    @pytest.mark.parametrize(
        ("stage", "cls", "name"), [("checkered", SCTuner, "scedit-checkered"), ("edges", CSCTuner, "csc-edges")]
    )
    def test_the_example_runs(self, example, tmp_path, stage, cls, name):
        example.main([stage, "--work", str(tmp_path), "--images", "16", "--steps", "2", "--batch", "2"])
        trained = cls.from_pretrained(tmp_path / f"{name}-shapes-unet.safetensors")
        moved = [k for k, v in trained.state_dict().items() if "ln2.weight" in k and v.any()]
        assert moved and all(torch.isfinite(v).all() for v in trained.state_dict().values())


@pytest.fixture(scope="module")
def scenes():
    return zoo.held_out(PICTURES)


class TestLearnt:
    def test_a_style(self, shapes_unet, scenes, judge):
        """Checkered grounds, whatever the caption says of them, and nothing else."""
        tuner = SCTuner.from_pretrained(zoo.adapter_file("scedit-checkered-shapes-unet"))
        before = judge.accuracy(draw(shapes_unet, 10, scenes.captions), scenes.specs)
        with tuner.attach(shapes_unet):
            images = draw(shapes_unet, 10, scenes.captions)
        styled = scenes.specs.clone()
        styled[:, 1] = zoo.world.TEXTURES.index("checkered")
        after = judge.accuracy(images, styled)
        assert after["texture"] > 0.9
        for attribute in ("shape1", "colour1", "layout"):
            assert after[attribute] > before[attribute] - 0.1  # one of twelve pictures

    def test_edges(self, shapes_unet, scenes):
        wanted = edges(scenes.images)
        captions = [zoo.caption(spec, keep=()) for spec in scenes.specs.tolist()]
        free = edges(draw(shapes_unet, 10, captions))
        tuner = CSCTuner.from_pretrained(zoo.adapter_file("csc-edges-shapes-unet"))
        tuner.set_condition(wanted)
        with tuner.attach(shapes_unet):
            found = edges(draw(shapes_unet, 10, captions))
        assert edge_iou(found, wanted).mean() > 2 * edge_iou(free, wanted).mean()
        assert edge_iou(found, wanted, 0).mean() > 3 * edge_iou(free, wanted, 0).mean()
        assert edge_f1(found, wanted).mean() > 0.5

    def test_two_conditions_are_both_met(self, shapes_unet):
        """Each tuner is given the outline of one object."""
        scenes = zoo.held_out(40)
        rows = ((scenes.specs[:, 1] == 0) & (scenes.specs[:, 2] >= zoo.world.ROW)).nonzero().flatten()[:8]
        captions = [zoo.caption(spec, keep=()) for spec in scenes.specs[rows].tolist()]
        wanted = [edges((scenes.masks[rows, k : k + 1] * 2 - 1).expand(-1, 3, -1, -1)) for k in (0, 1)]
        tuners = [CSCTuner.from_pretrained(zoo.adapter_file("csc-edges-shapes-unet")) for _ in wanted]
        for tuner, outline in zip(tuners, wanted):
            tuner.set_condition(outline)

        def met(*active):
            """Share of each outline that is drawn, within a pixel."""
            with contextlib.ExitStack() as attached:
                for tuner in active:
                    attached.enter_context(tuner.attach(shapes_unet))
                found = edges(draw(shapes_unet, 8, captions))
            near = torch.nn.functional.max_pool2d(found, 3, 1, 1)
            return [((outline * near).sum() / outline.sum()).item() for outline in wanted]

        first, second, both = met(tuners[0]), met(tuners[1]), met(*tuners)
        assert min(both) > 0.9 and first[1] < 0.6 and second[0] < 0.6


class TestBadInput:
    def test_another_model(self, shapes_unet, shapes_dit):
        with pytest.raises(ValueError, match="skip connection 0 has 32 channels, not 16"):
            SCTuner([16, 32, 32, 64, 64, 128]).attach(shapes_unet)
        with pytest.raises(ValueError, match="is for 2 skip connections, UNet2DConditionModel has 6"):
            SCTuner([32, 32]).attach(shapes_unet)
        with pytest.raises(ValueError, match="FluxTransformer2DModel has no skip connections"):
            SCTuner.for_model(shapes_dit)

    @pytest.mark.parametrize(
        ("config", "words"),
        [
            ({"down_flags": [False]}, "1 down_flags for 2 skip connections"),
            ({"pre_hint_strides": (2, 2)}, "three of 1 and 2"),
            ({"dense_hint_kernel": 2}, "accepted: 1, 3"),
            ({"down_ratio": 0.0}, "accepted: above 0"),
        ],
    )
    def test_configs(self, config, words):
        with pytest.raises(ValueError, match=words):
            CSCTuner(**{"skip_channels": [8, 8], "down_flags": [False, False], **config})
        with pytest.raises(ValueError, match="there are 0 to 1"):
            SCTuner([8, 8], use_layers=[2])

    def test_conditions(self, shapes_unet):
        tuner = CSCTuner.for_model(shapes_unet, **SMALL)
        with pytest.raises(ValueError, match="multiples of 4"):
            tuner.set_condition(torch.zeros(1, 3, 62, 64))
        for wrong in (torch.zeros(3, 64, 64), torch.zeros(1, 2, 64, 64), torch.full((1, 3, 64, 64), 255.0)):
            with pytest.raises(ValueError, match="accepted: a tensor"):
                tuner.set_condition(wrong)
        with pytest.raises(ValueError, match="values from nan to nan"):
            tuner.set_condition(torch.full((1, 3, 64, 64), torch.nan))
        with pytest.raises(TypeError, match="pictures are of type str"):
            tuner.set_condition("edges.png")
        with tuner.attach(shapes_unet):
            with pytest.raises(RuntimeError, match="nothing to draw by"):
                draw(shapes_unet)
            tuner.set_condition(torch.zeros(1, 3, 32, 32))
            with pytest.raises(ValueError, match=r"latents that need \[64, 64\]"):
                draw(shapes_unet)
            tuner.set_condition(pictures(3))
            with pytest.raises(ValueError, match="3 condition pictures for 2 pictures"):
                draw(shapes_unet)
