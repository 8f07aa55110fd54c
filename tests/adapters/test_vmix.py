"""VMix: identities of the mixed value, what composes with it, and what the trained adapter does to pictures."""

from __future__ import annotations

import copy
import importlib.util

import pytest
import torch
from diffusers import (
    ControlNetModel,
    FluxTransformer2DModel,
    PixArtTransformer2DModel,
    StableDiffusionControlNetPipeline,
    UNet2DConditionModel,
)
from diffusers.models.attention_processor import AttnProcessor
from peft import LoraConfig
from safetensors.torch import load_file, save_file

import diffusers_ext
from diffusers_ext import VMixAdapter, zoo
from diffusers_ext.adapters.vmix import (
    LABELS,
    aesthetic_rows,
    cross_attention,
    embed_labels,
    from_input_to_output,
    label_embeddings,
)
from diffusers_ext.eval import count_macs
from diffusers_ext.training.denoising import UNetTask, task_of
from diffusers_ext.training.fitting import Budget, Draws
from diffusers_ext.training.shapes import shapes_set
from diffusers_ext.zoo import looks


CAPTIONS = ["a large red circle, plain blue background", "a small green star, plain white background"]


def randomised(adapter, seed=0):
    """An adapter whose zero layers are zero no more."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in adapter.value_layers.parameters():
            weight.copy_(0.05 * torch.randn(weight.shape, generator=generator))
    return adapter.eval()


@pytest.fixture(scope="module")
def embedded():
    """Label vectors of the shapes pipelines, computed once."""
    return label_embeddings(zoo.load("shapes-unet"), looks.LABELS)


@pytest.fixture
def fresh(embedded):
    """`fresh(target, **config)` -> an untrained adapter for a shapes UNet."""
    return lambda target, **config: VMixAdapter.for_model(
        target, **{"labels": looks.LABELS, "num_text_tokens": 20, "aes_emb": embedded, **config}
    )


@pytest.fixture
def adapter(fresh, shapes_unet):
    return randomised(fresh(shapes_unet))


@pytest.fixture(scope="session")
def trained():
    return VMixAdapter.from_pretrained(zoo.adapter_file("vmix-shapes-unet"), torch_dtype=torch.float32)


def call(unet, rows=2, tokens=20, timestep=500):
    generator = torch.Generator().manual_seed(1)
    x, text = torch.randn(rows, 4, 16, 16, generator=generator), torch.randn(rows, tokens, 128, generator=generator)
    with torch.no_grad():
        return unet(x, torch.tensor(timestep), text).sample


def draw(pipe, steps=3, **kwargs):
    return zoo.generate(pipe, CAPTIONS, steps, **kwargs)


class TestIdentities:
    @pytest.mark.parametrize("scale", [0.3, 1.0, 2.0])
    @pytest.mark.parametrize("rank", [None, 4])
    def test_a_fresh_adapter_changes_nothing(self, shapes_unet, fresh, scale, rank):
        plain = call(shapes_unet.unet)
        with fresh(shapes_unet, value_rank=rank).attach(shapes_unet, scale):
            assert torch.equal(call(shapes_unet.unet), plain)

    def test_scale_zero_and_detach_are_exact(self, shapes_unet, adapter):
        plain, names = draw(shapes_unet), set(shapes_unet.unet.state_dict())
        with adapter.attach(shapes_unet) as handle:
            assert (draw(shapes_unet) - plain).abs().max() > 0.01
            assert set(shapes_unet.unet.state_dict()) == names
            adapter.set_scale(0)
            assert torch.equal(draw(shapes_unet), plain)
            handle.remove()
        assert torch.equal(draw(shapes_unet), plain)

    def test_steps_outside_of_the_range_are_those_of_the_plain_model(self, shapes_unet, adapter):
        def outputs(*_):
            seen = []
            hook = shapes_unet.unet.register_forward_hook(lambda *args: seen.append(args[-1][0].clone()))
            draw(shapes_unet, steps=4)
            hook.remove()
            return seen

        plain = outputs()
        adapter.set_range(0.5, 1.0)
        with adapter.attach(shapes_unet):
            late = outputs()
        assert [torch.equal(a, b) for a, b in zip(plain, late)] == [True, True, False, False]

    def test_one_call_equals_attention_run_twice(self, shapes_unet, adapter):
        """W_o A (v_t + s v_a) = W_o A v_t + s W_o A v_a, with the bias of W_o once."""
        name, layer = next(iter(cross_attention(shapes_unet.unet).items()))
        generator = torch.Generator().manual_seed(0)
        x, text = torch.randn(1, 256, 32, generator=generator), torch.randn(1, 20, 128, generator=generator)
        split = lambda t: t.unflatten(-1, (layer.heads, -1)).transpose(1, 2)  # noqa: E731
        with torch.no_grad():
            q, k = split(layer.to_q(x)), split(layer.to_k(text))
            weights = (q @ k.mT * layer.scale).softmax(-1)
            v_a = adapter.chosen_values()[name][1:]
            w_o, bias = layer.to_out[0].weight, layer.to_out[0].bias
            parts = [(weights @ split(v)).transpose(1, 2).flatten(2) @ w_o.T for v in (layer.to_v(text), v_a)]
        for scale in (0.5, 1.7):
            mixed = self.inside(shapes_unet.unet, adapter, scale, lambda: layer(x, text))
            torch.testing.assert_close(mixed, parts[0] + scale * parts[1] + bias, atol=1e-5, rtol=0)

    @staticmethod
    def inside(unet, adapter, scale, function):
        """`function()` in the middle of a call of a UNet that carries the adapter."""
        found = []
        with adapter.attach(unet, scale):
            hook = unet.conv_out.register_forward_pre_hook(lambda *_: found.append(function()))
            call(unet, rows=1)
            hook.remove()
        return found[0]

    def test_the_first_attention_map_is_untouched_and_its_output_linear(self, shapes_unet, adapter):
        unet = shapes_unet.unet
        layer = next(iter(cross_attention(unet).values()))
        maps, outputs, original = [], [], layer.get_attention_scores
        unet.set_attn_processor(AttnProcessor())
        layer.get_attention_scores = lambda *args: maps.append(original(*args)) or maps[-1]
        hook = layer.register_forward_hook(lambda *args: outputs.append(args[-1]))
        try:
            for scale in (0.0, 1.0, 2.0):
                with adapter.attach(unet, scale):
                    call(unet)
        finally:
            hook.remove()
            del layer.get_attention_scores
            unet.set_default_attn_processor()
        assert torch.equal(maps[0], maps[1]) and torch.equal(maps[0], maps[2])
        torch.testing.assert_close(outputs[2] - outputs[0], 2 * (outputs[1] - outputs[0]), atol=1e-5, rtol=1e-4)

    def test_what_is_added_depends_on_what_a_position_attends_to(self, shapes_unet, adapter):
        """A constant added to all positions, whatever they look at, would not be VMix."""
        layer = next(iter(cross_attention(shapes_unet.unet).values()))
        generator = torch.Generator().manual_seed(0)
        x, text = 3 * torch.randn(1, 16, 32, generator=generator), 3 * torch.randn(1, 20, 128, generator=generator)
        mixed = self.inside(shapes_unet.unet, adapter, 1.0, lambda: layer(x, text))
        with torch.no_grad():
            added = mixed - layer(x, text)
        assert added.std(1).mean() > 0.1 * added.abs().mean() > 0


class TestCondition:
    def test_rows_lie_between_nothing_and_a_label(self):
        emb = torch.randn(7, 5, dtype=torch.float64)
        rows = aesthetic_rows(emb, torch.tensor([[1.0, -1.0, 0.0], [0.25, -0.25, 1.0]], dtype=torch.float64))
        assert torch.allclose(rows[0], torch.stack([emb[0], emb[3], emb[6]]))
        assert torch.allclose(rows[1], torch.stack([emb[6].lerp(emb[0], 0.25), emb[6].lerp(emb[3], 0.25), emb[4]]))

    def test_label_vectors_are_states_at_the_end_token(self, shapes_unet, embedded):
        """The pooled state of transformers' own model, which looks for the end token by itself."""
        text = [label for pair in looks.LABELS for label in pair] + [""]
        ids = shapes_unet.tokenizer(text, padding="max_length", max_length=20, return_tensors="pt").input_ids
        with torch.no_grad():
            pooled = shapes_unet.text_encoder(ids).pooler_output
        torch.testing.assert_close(embedded, pooled)
        long = embed_labels(shapes_unet.tokenizer, shapes_unet.text_encoder, ["very " * 30])
        assert torch.isfinite(long).all()

    def test_labels(self, adapter):
        every = dict.fromkeys([pair[0] for pair in looks.LABELS], 1.0)
        assert adapter.strengths == every
        adapter.set_labels(["grey colours"])
        assert list(adapter.strengths.values()) == [-1.0, 0.0, 0.0]
        adapter.set_labels({"cold light": 0.5, "bright light": -0.25})
        assert list(adapter.strengths.values()) == [0.0, -0.5, -0.25]
        adapter.set_labels()
        assert adapter.strengths == every

    @pytest.mark.parametrize(
        "labels, error, message",
        [
            ({"vivid colors": 1}, ValueError, "Did you mean 'vivid colours'"),
            ({"vivid colours": 1.5}, ValueError, "accepted: -1 to 1"),
            (["vivid colours", "grey colours"], ValueError, "opposites"),
            ("vivid colours", TypeError, "list of labels"),
        ],
    )
    def test_bad_labels(self, adapter, labels, error, message):
        before = adapter.strengths
        with pytest.raises(error, match=message):
            adapter.set_labels(labels)
        assert adapter.strengths == before

    def test_unconditional_rows_stay_plain_or_get_open_labels(self, shapes_unet, adapter):
        seen = []
        hook = shapes_unet.unet.register_forward_hook(lambda *args: seen.append(args[-1][0].clone()))
        with adapter.attach(shapes_unet):
            draw(shapes_unet, steps=1)
            adapter.set_uncond_mode("null")
            draw(shapes_unet, steps=1)
        draw(shapes_unet, steps=1)
        hook.remove()
        none, null, plain = seen
        torch.testing.assert_close(none[:2], plain[:2], atol=1e-6, rtol=0)
        assert (null[:2] - plain[:2]).abs().max() > 1e-3
        torch.testing.assert_close(null[2:], none[2:], atol=1e-6, rtol=0)
        with pytest.raises(ValueError, match="Known: none, null"):
            adapter.set_uncond_mode("both")

    def test_values_are_computed_once_and_again_when_something_changes(self, shapes_unet, adapter):
        computed = []
        adapter.proj.register_forward_hook(lambda *_: computed.append(1))
        with adapter.attach(shapes_unet):
            draw(shapes_unet, steps=4)
            assert len(computed) == 1
            adapter.set_labels(["grey colours"])
            draw(shapes_unet, steps=2)
            assert len(computed) == 2
            with torch.no_grad():
                adapter.proj.token.weight.mul_(2)
            draw(shapes_unet, steps=2)
            assert len(computed) == 3

    def test_a_step_costs_nothing_more(self, shapes_unet, adapter):
        """After the first step, whose values are kept, no multiplication more than without."""
        unet, inputs = shapes_unet.unet, (torch.zeros(2, 4, 16, 16), 500, torch.zeros(2, 20, 128))
        with torch.no_grad():
            plain = count_macs(unet, *inputs)
            with adapter.attach(unet):
                assert count_macs(unet, *inputs) > plain
                assert count_macs(unet, *inputs) == plain

    def test_a_prompt_of_several_chunks_repeats_the_values(self, shapes_unet, adapter):
        with adapter.attach(shapes_unet.unet):
            once, twice = call(shapes_unet.unet, tokens=20), call(shapes_unet.unet, tokens=40)
            text = torch.randn(1, 20, 128)
            x = torch.randn(1, 4, 16, 16)
            with torch.no_grad():
                single = shapes_unet.unet(x, 5, text).sample
                double = shapes_unet.unet(x, 5, text.repeat(1, 2, 1)).sample
            # Twice the same keys and values is the same attention.
            torch.testing.assert_close(single, double, atol=1e-5, rtol=0)
            with pytest.raises(ValueError, match="30 tokens.*multiples of 20"):
                call(shapes_unet.unet, tokens=30)
        assert once.shape == twice.shape

    def test_conditions_of_each_row_carry_gradients(self, shapes_unet, adapter):
        unet = shapes_unet.unet
        strengths = torch.tensor([[1.0, 0, 0], [0, 0, -1.0]])
        with adapter.attach(unet):
            adapter.set_condition(aesthetic_rows(adapter.aes_emb, strengths))
            x, text = torch.randn(2, 4, 16, 16), torch.randn(2, 20, 128)
            both = unet(x, 5, text).sample
            both.square().mean().backward()
            assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in adapter.parameters())
            adapter.zero_grad()
            adapter.set_condition(None)
            adapter.set_labels({"warm light": 0.0, "vivid colours": 1.0})
            with torch.no_grad():
                first = unet(x[:1], 5, text[:1]).sample
            torch.testing.assert_close(both[:1], first, atol=1e-5, rtol=0)
        with pytest.raises(ValueError, match=r"accepted: \[batch, 3, 128\]"):
            adapter.set_condition(torch.zeros(2, 4, 128))


class TestFiles:
    def test_file_and_folder_come_back_bit_equal(self, shapes_unet, adapter, tmp_path):
        path = adapter.save_file(tmp_path / "a.safetensors")
        adapter.save_pretrained(tmp_path / "folder")
        for loaded in (VMixAdapter.from_pretrained(path), VMixAdapter.from_pretrained(tmp_path / "folder")):
            state = loaded.state_dict()
            assert state.keys() == adapter.state_dict().keys()
            assert all(torch.equal(value, state[name]) for name, value in adapter.state_dict().items())
            with loaded.attach(shapes_unet.unet):
                mine = call(shapes_unet.unet)
            with adapter.attach(shapes_unet.unet):
                assert torch.equal(call(shapes_unet.unet), mine)

    def test_layout_of_the_file(self, adapter, tmp_path):
        tensors = load_file(adapter.save_file(tmp_path / "a.safetensors"))
        layers = {k for k in tensors if k.startswith("value_layers.")}
        assert layers == {f"value_layers.{name}.weight" for name in adapter.config.layer_dims} and len(layers) == 7
        assert {k: tuple(v.shape) for k, v in tensors.items() if k not in layers} == {
            "aes_emb": (7, 128),
            "proj.token.weight": (20, 3),
            "proj.token.bias": (20,),
            "proj.norm.weight": (128,),
            "proj.norm.bias": (128,),
            "proj.channel.weight": (128, 128),
            "proj.channel.bias": (128,),
        }

    def test_files_of_others_are_refused_by_name(self, adapter, tmp_path):
        save_file({"vmix.layer_0.weight": torch.zeros(2)}, tmp_path / "other.safetensors")
        with pytest.raises(ValueError, match="no published layout.*vmix.layer_0.weight"):
            VMixAdapter.from_pretrained(tmp_path / "other.safetensors")

    @pytest.mark.parametrize("labels", [[], ["ab"], [["a", "b", "c"]], [["a", "b"], ["b", "c"]]])
    def test_bad_pairs(self, labels):
        with pytest.raises(ValueError, match="pairs"):
            VMixAdapter(8, 4, 8, labels, {"mid_block.attn2": 8})

    def test_for_model_needs_a_text_encoder(self, shapes_unet):
        with pytest.raises(ValueError, match="give the pipeline"):
            VMixAdapter.for_model(shapes_unet.unet)
        assert VMixAdapter.for_model(shapes_unet).config.labels == [list(pair) for pair in LABELS]


def tiny_sdxl():
    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=16, block_out_channels=(8, 16), layers_per_block=1, cross_attention_dim=24, norm_num_groups=4,
        attention_head_dim=(1, 2), transformer_layers_per_block=(1, 3),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    ).eval()  # fmt: skip


def tiny_pixart():
    torch.manual_seed(0)
    return PixArtTransformer2DModel(
        num_layers=2, num_attention_heads=2, attention_head_dim=8, sample_size=8, patch_size=2, in_channels=4,
        out_channels=4, cross_attention_dim=16, caption_channels=6, norm_num_groups=4,
        use_additional_conditions=False,
    ).eval()  # fmt: skip


class TestModels:
    def test_sdxl_layout_with_several_transformers_per_block(self):
        unet = tiny_sdxl()
        adapter = VMixAdapter.for_model(unet, aes_emb=torch.randn(9, 12), num_text_tokens=7, value_rank=2)
        assert len(adapter.config.layer_dims) == 3 + 3 + 2 * 3
        x, text = torch.randn(1, 4, 16, 16), torch.randn(1, 7, 24)
        with torch.no_grad():
            plain = unet(x, 5, text).sample
            with randomised(adapter).attach(unet):
                assert not torch.equal(unet(x, 5, text).sample, plain)

    def test_transformer_with_cross_attention(self):
        model = tiny_pixart()
        adapter = VMixAdapter.for_model(model, aes_emb=torch.randn(9, 6), num_text_tokens=7)
        kwargs = {"added_cond_kwargs": {"resolution": None, "aspect_ratio": None}, "timestep": torch.tensor([5])}
        x, text = torch.randn(1, 4, 8, 8), torch.randn(1, 7, 6)
        with torch.no_grad():
            plain = model(x, text, **kwargs).sample
            with randomised(adapter).attach(model):
                assert not torch.equal(model(x, text, **kwargs).sample, plain)
            assert torch.equal(model(x, text, **kwargs).sample, plain)

    def test_real_sizes(self):
        """Parameters of full value layers, as computed for the layouts: 16 layers, 9.6 M and 70 layers, 170 M."""
        with torch.device("meta"):
            sd15 = UNet2DConditionModel(cross_attention_dim=768)
            xl = UNet2DConditionModel(
                block_out_channels=(320, 640, 1280), cross_attention_dim=2048, transformer_layers_per_block=(1, 2, 10),
                down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
                up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            )  # fmt: skip
            for unet, layers, width in ((sd15, 16, 12480), (xl, 70, 83200)):
                found = cross_attention(unet)
                assert len(found) == layers and sum(l.to_v.out_features for l in found.values()) == width

    def test_layers_in_the_order_in_which_they_run(self, shapes_unet):
        ran, hooks = [], []
        layers = cross_attention(shapes_unet.unet)
        for name, layer in layers.items():
            hooks.append(layer.register_forward_hook(lambda *_, name=name: ran.append(name)))
        call(shapes_unet.unet)
        for hook in hooks:
            hook.remove()
        assert from_input_to_output(layers) == ran

    def test_misfits_are_refused_and_leave_no_trace(self, shapes_unet, adapter):
        flux = FluxTransformer2DModel(
            in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=8, num_attention_heads=1,
            joint_attention_dim=8, pooled_projection_dim=8, axes_dims_rope=(2, 2, 4),
        )  # fmt: skip
        with pytest.raises(ValueError, match="FluxTransformer2DModel has no separate cross-attention"):
            adapter.attach(flux)
        with pytest.raises(ValueError, match="it has 7 layers and UNet2DConditionModel 12"):
            adapter.attach(tiny_sdxl())
        config = dict(adapter.config)
        name = "mid_block.attentions.0.transformer_blocks.0.attn2"
        wrong = VMixAdapter(128, 20, 128, config["labels"], {**config["layer_dims"], name: 99})
        with pytest.raises(ValueError, match=f"layer {name} .*128; this adapter is for 128 and 99"):
            wrong.attach(shapes_unet)
        fused = copy.deepcopy(shapes_unet.unet)
        fused.fuse_qkv_projections()
        with pytest.raises(ValueError, match="unfuse_qkv_projections"):
            adapter.attach(fused)
        assert not any(m._forward_hooks for m in shapes_unet.unet.modules())


def add_ip_adapter(unet, seed=0):
    """Random IP-Adapter weights in the published layout."""
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: 0.05 * torch.randn(*shape, generator=generator)  # noqa: E731
    width, tokens, image = unet.config.cross_attention_dim, 4, 16
    projection = {"proj.weight": draw(tokens * width, image), "proj.bias": draw(tokens * width)}
    projection |= {"norm.weight": torch.ones(width), "norm.bias": torch.zeros(width)}
    weights = {}
    names = [name for name in unet.attn_processors if "attn2" in name]
    for index, name in enumerate(names):
        inner = unet.get_submodule(name.removesuffix(".processor")).to_v.out_features
        weights |= {f"{2 * index + 1}.to_{part}_ip.weight": draw(inner, width) for part in "kv"}
    unet._load_ip_adapter_weights([{"image_proj": projection, "ip_adapter": weights}])


def random_lora(unet, seed=0):
    torch.manual_seed(seed)
    targets = ["to_q", "to_k", "to_v", "to_out.0"]
    unet.add_adapter(LoraConfig(r=2, target_modules=targets, init_lora_weights=False))


class TestComposition:
    """Together with an IP-Adapter, a LoRA and a ControlNet on one pipeline."""

    @pytest.fixture(scope="class")
    def run(self):
        """`run(order)` -> a picture; `order` names what is loaded, and when."""

        def make(order, scale=1.0):
            base = zoo.load("shapes-unet")
            control = ControlNetModel.from_unet(base.unet, conditioning_embedding_out_channels=(4, 4, 8))
            torch.manual_seed(0)
            with torch.no_grad():
                for module in (*control.controlnet_down_blocks, control.controlnet_mid_block):
                    module.weight.normal_(std=0.02)
            pipe = StableDiffusionControlNetPipeline(**base.components, controlnet=control)
            pipe.set_progress_bar_config(disable=True)
            adapter = randomised(VMixAdapter.for_model(pipe, looks.LABELS))
            load = {
                "vmix": lambda: adapter.attach(pipe, scale),
                "lora": lambda: random_lora(pipe.unet),
                "ip": lambda: add_ip_adapter(pipe.unet),
            }
            for name in order:
                load[name]()
            hint = torch.linspace(0, 1, 3 * 4096).view(1, 3, 64, 64)
            return pipe(
                CAPTIONS[0], image=hint, num_inference_steps=2, guidance_scale=3.0, output_type="pt", height=64,
                width=64, ip_adapter_image_embeds=[torch.ones(2, 1, 16)], generator=torch.Generator().manual_seed(0),
            ).images  # fmt: skip

        return make

    def test_scale_zero_is_the_composition_without(self, run):
        assert torch.equal(run(["lora", "ip", "vmix"], scale=0.0), run(["lora", "ip"]))

    def test_order_does_not_matter(self, run):
        first, second, third = run(["vmix", "lora", "ip"]), run(["ip", "lora", "vmix"]), run(["lora", "vmix", "ip"])
        assert (first - second).abs().max() < 1e-5 and (first - third).abs().max() < 1e-5
        assert (first - run(["lora", "ip"])).abs().max() > 1e-3

    def test_a_lora_may_leave_while_vmix_stays(self, adapter):
        unet = zoo.load("shapes-unet").unet
        with adapter.attach(unet):
            alone = call(unet)
        random_lora(unet)
        with adapter.attach(unet):
            together = call(unet)
            unet.delete_adapters("default")
            from peft.tuners.lora import LoraLayer

            for name, module in list(unet.named_modules()):
                if isinstance(module, LoraLayer):
                    unet.set_submodule(name, module.base_layer)
            assert torch.equal(call(unet), alone) and not torch.equal(together, alone)

    def test_two_adapters_add_up_in_any_order(self, shapes_unet, fresh):
        one, two = randomised(fresh(shapes_unet), 1), randomised(fresh(shapes_unet), 2)
        with one.attach(shapes_unet), two.attach(shapes_unet):
            first = draw(shapes_unet)
        with two.attach(shapes_unet), one.attach(shapes_unet):
            assert (draw(shapes_unet) - first).abs().max() < 1e-5
        with one.attach(shapes_unet):
            assert (draw(shapes_unet) - first).abs().max() > 1e-3

    @pytest.mark.parametrize(
        "config",
        [
            diffusers_ext.DeepCacheConfig(cache_interval=2),
            diffusers_ext.FasterDiffusionConfig(max_parallel=3),
            diffusers_ext.AttentionEntropyScalingConfig(base_size=(8, 8)),
        ],
        ids=lambda c: c.method.slug,
    )
    def test_beside_the_caches_of_this_package(self, shapes_unet, adapter, config):
        with diffusers_ext.apply(shapes_unet, config):
            plain = draw(shapes_unet, steps=6)
            with adapter.attach(shapes_unet, 0.0):
                assert torch.equal(draw(shapes_unet, steps=6), plain)
                adapter.set_scale(1.0)
                after = draw(shapes_unet, steps=6)
        with adapter.attach(shapes_unet), diffusers_ext.apply(shapes_unet, config):
            torch.testing.assert_close(draw(shapes_unet, steps=6), after, atol=1e-5, rtol=0)
        assert (after - plain).abs().max() > 0.01

    def test_steps_decoded_ahead_get_their_own_rows(self, shapes_unet, adapter):
        """Faster Diffusion decodes several steps in one batch; each row must still be told apart."""
        one, three = (diffusers_ext.FasterDiffusionConfig(max_parallel=n) for n in (1, 3))
        with adapter.attach(shapes_unet):
            with diffusers_ext.apply(shapes_unet, one):
                single = draw(shapes_unet, steps=8)
            with diffusers_ext.apply(shapes_unet, three):
                torch.testing.assert_close(draw(shapes_unet, steps=8), single, atol=1e-4, rtol=0)

    @pytest.mark.parametrize(
        "name", ["BDIADDIMScheduler", "DEISFullScheduler", "EVODiffMultistepScheduler", "GHVBScheduler"]
    )
    def test_with_schedulers_of_this_package(self, shapes_unet, adapter, name):
        shapes_unet.scheduler = getattr(diffusers_ext, name).from_config(shapes_unet.scheduler.config)
        plain = draw(shapes_unet, steps=4)
        with adapter.attach(shapes_unet):
            mixed = draw(shapes_unet, steps=4)
        assert torch.isfinite(mixed).all() and not torch.equal(mixed, plain)
        assert torch.equal(draw(shapes_unet, steps=4), plain)

    def test_half_precision_and_compile(self, shapes_unet, adapter):
        unet = copy.deepcopy(shapes_unet.unet)
        with adapter.attach(unet):
            eager = call(unet)
            unet.compile(backend="eager")
            torch.testing.assert_close(call(unet), eager, atol=1e-6, rtol=0)
        half = copy.deepcopy(shapes_unet.unet).to(torch.bfloat16)
        with torch.no_grad(), adapter.attach(half):
            out = half(torch.zeros(1, 4, 16, 16).bfloat16(), 5, torch.ones(1, 20, 128).bfloat16()).sample
        assert out.dtype == torch.bfloat16 and torch.isfinite(out).all()
        adapter.to(torch.float32)


def spread_of_training():
    """Standard deviation of every statistic over pictures such as those of the training."""
    scenes = zoo.scenes(400, seed=1)
    return looks.statistics(looks.show(scenes.images, looks.levels(400, 0)), scenes.specs).std(0)


def moved(pipe, adapter, scenes, labels, steps):
    """Mean change of the statistics from the negative to the positive look, in standard deviations; both pictures."""
    pictures = []
    with adapter.attach(pipe):
        for sign in (1.0, -1.0):
            adapter.set_labels(dict.fromkeys(labels, sign))
            pictures.append(zoo.generate(pipe, scenes.captions, steps))
    adapter.set_labels()
    change = looks.statistics(pictures[0], scenes.specs) - looks.statistics(pictures[1], scenes.specs)
    return change.mean(0) / spread_of_training(), pictures


POSITIVE = [pair[0] for pair in looks.LABELS]


class TestTrained:
    def test_all_positive_against_all_negative(self, shapes_unet, trained):
        change, _ = moved(shapes_unet, trained, zoo.held_out(8), POSITIVE, steps=8)
        assert (change > 1).all(), change

    @pytest.mark.parametrize("index", range(len(POSITIVE)))
    def test_a_slider_moves_its_own_statistic(self, shapes_unet, trained, index):
        """A quick look; `test_each_slider_is_independent` holds the numbers."""
        change, _ = moved(shapes_unet, trained, zoo.held_out(8), [POSITIVE[index]], steps=8)
        others = change.abs()[torch.arange(3) != index]
        assert change[index] > 1 and others.max() < change[index] / 2, change

    def test_it_works_on_a_fine_tuned_copy(self, trained):
        """A UNet whose attention a LoRA has moved by a fortieth."""
        pipe = zoo.load("shapes-unet")
        random_lora(pipe.unet)
        with torch.no_grad():
            for name, weight in pipe.unet.named_parameters():
                if "lora_B" in name:
                    weight.mul_(0.05)
        change, _ = moved(pipe, trained, zoo.held_out(16), POSITIVE, steps=20)
        assert change.mean() > 1 and (change > 0.5).all(), change

    @pytest.mark.slow
    @pytest.mark.parametrize("start", [0, 100])
    @pytest.mark.parametrize("index", range(len(POSITIVE)))
    def test_each_slider_is_independent(self, shapes_unet, trained, index, start):
        """More than one standard deviation of its own statistic, and of the others less than a third of that."""
        change, _ = moved(shapes_unet, trained, zoo.held_out(50, start), [POSITIVE[index]], steps=20)
        others = change.abs()[torch.arange(3) != index]
        assert change[index] > 1 and others.max() < change[index] / 3, change

    @pytest.mark.slow
    def test_pictures_keep_their_content(self, shapes_unet, trained, judge):
        """All looks at once: shapes at most two points below the plain model, whole captions three."""
        scenes = zoo.held_out(100)
        plain = judge.accuracy(zoo.generate(shapes_unet, scenes.captions), scenes.specs)
        _, pictures = moved(shapes_unet, trained, scenes, POSITIVE, steps=20)
        for images in pictures:
            mixed = judge.accuracy(images, scenes.specs)
            for attribute, most in (("shape1", 0.02), ("shape2", 0.02), ("all", 0.03)):
                assert mixed[attribute] > plain[attribute] - most, (attribute, plain, mixed)


@pytest.fixture(scope="module")
def script(repository):
    """The training example."""
    spec = importlib.util.spec_from_file_location("train_vmix", repository / "examples/train_adapters/vmix.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class TestTraining:
    @pytest.mark.parametrize("lora_rank", [0, 2])
    def test_the_script_runs(self, script, tmp_path, lora_rank):
        path = script.train(tmp_path, Budget(steps=2, batch=4, lr=1e-2), images=8, lora_rank=lora_rank)
        adapter = VMixAdapter.from_pretrained(path)
        assert adapter.config.labels == [list(pair) for pair in looks.LABELS]
        assert any(weight.abs().sum() > 0 for weight in adapter.value_layers.parameters())

    def test_the_paired_loss_is_what_looks_change(self, script, shapes_unet, fresh, monkeypatch):
        """Zero where looks change nothing; and for a model that ignores its input, the size of the change alone."""
        data = shapes_set(shapes_unet, 4)
        adapter, rows = fresh(shapes_unet), torch.arange(4)
        levels, shift = torch.zeros(4, 3), 0.1

        def loss(shown):
            return script.paired_loss(shapes_unet, adapter, data, shown, levels)(rows, Draws(0, 0, 4, "cpu"))

        with adapter.attach(shapes_unet):
            assert loss(data.latents) == 0
            monkeypatch.setattr(UNetTask, "predict", staticmethod(lambda model, x, *_: torch.zeros_like(x)))
            draws, task = Draws(0, 0, 4, "cpu"), task_of(shapes_unet)
            known = draws.uniform(1) >= script.LABELS_DROPPED
            draws.normal(4, 16, 16)
            alpha, sigma = task.noise_levels(task.levels(draws))
            # v of the look alone is -sigma times it.
            wanted = (task.weight(alpha, sigma) * (sigma * shift * known[:, 0]).square()).mean()
            torch.testing.assert_close(loss(data.latents + shift), wanted, rtol=1e-4, atol=0)
