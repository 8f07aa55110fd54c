"""Attention-entropy scaling: the factor does what the theory says, where it should and nowhere else."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from diffusers import DiTTransformer2DModel, PixArtTransformer2DModel, SD3Transformer2DModel, UNet2DConditionModel
from diffusers.models.attention_processor import Attention, AttnProcessor, AttnProcessor2_0, SlicedAttnProcessor

import diffusers_ext
from diffusers_ext import AttentionEntropyScalingConfig, EntropyScaledAttnProcessor2_0, zoo
from diffusers_ext.attention.attention_entropy_scaling import Layout, ScaledQueries, entropy_factor, self_attention


SLUG = "attention-entropy-scaling"


def row_entropy(queries, keys, scale):
    logits = (queries @ keys.mT * scale).log_softmax(-1)
    return -(logits.exp() * logits).sum(-1).mean().item()


@pytest.fixture(scope="module")
def unet_pipe():
    return zoo.load("shapes-unet")


@pytest.fixture
def tiny_unet():
    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        cross_attention_dim=8,
        attention_head_dim=2,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    ).eval()


def call_unet(unet, size=16, timestep=500):
    generator = torch.Generator().manual_seed(0)
    x, text = torch.randn(2, 4, size, size, generator=generator), torch.randn(2, 5, 8, generator=generator)
    with torch.no_grad():
        return unet(x, torch.tensor(timestep), text).sample


@pytest.mark.parametrize("std, least", [(1, 0.05), (2, 0.15), (3, 0.25)])
@pytest.mark.parametrize("keys", [64, 1024, 4096])
def test_entropy_stays_closer_to_the_trained_one(std, least, keys):
    """Gaussian queries and keys, d = 64, T = 256; the gap shrinks most for sharp attention."""
    d, trained = 64, 256
    generator = torch.Generator().manual_seed(std)
    q = torch.randn(512, d, generator=generator, dtype=torch.float64)
    k = torch.randn(4096, d, generator=generator, dtype=torch.float64)
    scale = std / math.sqrt(d)
    target = row_entropy(q, k[:trained], scale)
    gap = abs(row_entropy(q, k[:keys], scale) - target)
    scaled = abs(row_entropy(q, k[:keys], scale * entropy_factor(keys, trained)) - target)
    assert scaled < (1 - least) * gap


def test_factor_is_the_square_root_of_the_ratio_of_logarithms():
    assert entropy_factor(4096, 256) == pytest.approx(math.sqrt(12 / 8), abs=1e-15)
    assert entropy_factor(256, 256) == 1.0
    assert entropy_factor(64, 256) == pytest.approx(math.sqrt(6 / 8), abs=1e-15)
    assert entropy_factor(4096, 256, strength=0.5) == pytest.approx((12 / 8) ** 0.25, abs=1e-15)


def test_joint_attention_counts_text_and_windows_count_as_small_pictures():
    joint = Layout(area_ratio=0.25, image_tokens=256, strength=1.0, count_text=True)
    assert joint.factor(276, 276) == entropy_factor(276, 64 + 20)
    assert joint.factor(64, 64) == entropy_factor(64, 16)
    alone = Layout(area_ratio=0.25, image_tokens=256, strength=1.0, count_text=False)
    assert alone.factor(276, 276) == entropy_factor(256, 64)


@pytest.mark.parametrize("processor", [AttnProcessor(), AttnProcessor2_0(), SlicedAttnProcessor(1)])
def test_equals_an_explicit_softmax(tiny_unet, processor):
    """Eager, SDPA and sliced processors against softmax(lambda Q K^T) V written out."""
    attn = tiny_unet.down_blocks[0].attentions[0].transformer_blocks[0].attn1
    attn.set_processor(processor)
    x = torch.randn(2, 64, 8, generator=torch.Generator().manual_seed(0))
    factor = entropy_factor(64, 16)
    with torch.no_grad(), ScaledQueries(Layout(0.25, None, 1.0, True).factor) as mode:
        got = attn(x)
    assert mode.seen
    q, k, v = (p(x).unflatten(-1, (attn.heads, -1)).transpose(1, 2) for p in (attn.to_q, attn.to_k, attn.to_v))
    weights = (q @ k.mT * factor / math.sqrt(q.shape[-1])).softmax(-1)
    expected = attn.to_out[0]((weights @ v).transpose(1, 2).flatten(2))
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=0)


def test_scales_after_norm_and_rotary_embedding():
    """Flux: query norms would undo a factor in front of them. All attention inputs are seen and recomputed."""
    model = zoo.load("shapes-dit").transformer
    seen, real = [], F.scaled_dot_product_attention
    arguments = {
        "hidden_states": torch.randn(1, 256, 16, generator=torch.Generator().manual_seed(0)),
        "timestep": torch.tensor([0.5]),
        "pooled_projections": torch.zeros(1, 128),
        "encoder_hidden_states": torch.zeros(1, 20, 128),
        "img_ids": torch.zeros(256, 3),
        "txt_ids": torch.zeros(20, 3),
    }

    def spy(query, *args, **kwargs):
        seen.append(query.detach().clone())
        return real(query, *args, **kwargs)

    def first_query(*configs):
        seen.clear()
        with torch.no_grad(), diffusers_ext.apply(model, *configs), pytest.MonkeyPatch.context() as patch:
            if configs:
                patch.setattr(ScaledQueries, "_scaled", spying_scaled)
            else:
                patch.setattr(F, "scaled_dot_product_attention", spy)
            model(**arguments)
        return seen[0]

    original = ScaledQueries._scaled

    def spying_scaled(self, args, kwargs, *rest):
        args, kwargs = original(self, args, kwargs, *rest)
        seen.append((kwargs["query"] if "query" in kwargs else args[0]).detach().clone())
        return args, kwargs

    plain, scaled = first_query(), first_query(AttentionEntropyScalingConfig(base_size=(16, 16)))
    torch.testing.assert_close(scaled, plain * entropy_factor(276, 84), atol=1e-6, rtol=1e-6)


def test_trained_size_and_strength_zero_are_exact(tiny_unet):
    for size, config in ((8, AttentionEntropyScalingConfig()), (16, AttentionEntropyScalingConfig(strength=0.0))):
        plain = call_unet(tiny_unet, size)
        with diffusers_ext.apply(tiny_unet, config) as handle:
            assert torch.equal(call_unet(tiny_unet, size), plain)
            assert handle.summary()[SLUG]["scaled"] == 0


def test_changes_the_output_elsewhere_and_comes_off(tiny_unet):
    plain = call_unet(tiny_unet)
    state = {name: (set(vars(m)), m.forward) for name, m in tiny_unet.named_modules()}
    with diffusers_ext.apply(tiny_unet, AttentionEntropyScalingConfig()) as handle:
        assert not torch.equal(call_unet(tiny_unet), plain)
        figures = handle.summary()[SLUG]
    assert figures == {"layers": len(self_attention(tiny_unet)), "scaled": 1, "plain": 0, "area_ratio": 0.25}
    assert torch.equal(call_unet(tiny_unet), plain)
    assert {name: (set(vars(m)), m.forward) for name, m in tiny_unet.named_modules()} == state


def test_cross_attention_is_untouched(tiny_unet):
    """Given the same inputs, attn2 answers the same; the text even has as many tokens as the picture."""
    block = tiny_unet.down_blocks[0].attentions[0].transformer_blocks[0]
    x, text = torch.randn(1, 256, 8), torch.randn(1, 256, 8)
    with torch.no_grad():
        plain = block.attn2(x, text)
        plain_self = block.attn1(x)
        answers = []
        handle = diffusers_ext.apply(tiny_unet, AttentionEntropyScalingConfig())
        block.norm3.register_forward_pre_hook(lambda *_: answers.append((block.attn2(x, text), block.attn1(x))))
        call_unet(tiny_unet)
        handle.remove()
    assert torch.equal(answers[0][0], plain) and not torch.equal(answers[0][1], plain_self)


def test_layers_and_window_of_the_run(tiny_unet):
    with diffusers_ext.apply(tiny_unet, AttentionEntropyScalingConfig(layers="up_blocks", end=0.5)) as handle:
        call_unet(tiny_unet, timestep=900)
        up = sum("up_blocks" in name for name in self_attention(tiny_unet))
        assert handle.summary()[SLUG]["layers"] == up
        call_unet(tiny_unet, timestep=400)
        assert handle.summary()[SLUG]["scaled"] == handle.summary()[SLUG]["plain"] == 1


def test_a_new_run_starts_new_figures_and_an_error_leaves_nothing(tiny_unet):
    config = AttentionEntropyScalingConfig()
    with diffusers_ext.apply(tiny_unet, config) as handle:
        clean = call_unet(tiny_unet)

        def fail(*_):
            raise KeyboardInterrupt

        broken = tiny_unet.mid_block.register_forward_pre_hook(fail)
        with pytest.raises(KeyboardInterrupt):
            call_unet(tiny_unet, timestep=400)
        broken.remove()
        attn = tiny_unet.down_blocks[0].attentions[0].transformer_blocks[0].attn1
        x = torch.randn(1, 256, 8)
        with torch.no_grad():
            outside = attn(x)
        assert torch.equal(call_unet(tiny_unet), clean)
        assert handle.summary()[SLUG]["scaled"] == 1
    with torch.no_grad():
        assert torch.equal(attn(x), outside)


def test_batch_equals_singles_and_half_precision(tiny_unet):
    x, text = torch.randn(3, 4, 16, 16), torch.randn(3, 5, 8)
    with torch.no_grad(), diffusers_ext.apply(tiny_unet, AttentionEntropyScalingConfig()):
        together = tiny_unet(x, 500, text).sample
        alone = torch.cat([tiny_unet(x[i : i + 1], 500, text[i : i + 1]).sample for i in range(3)])
        torch.testing.assert_close(together, alone, atol=1e-5, rtol=0)
        half = tiny_unet.to(torch.bfloat16)(x.bfloat16(), 500, text.bfloat16()).sample
    assert half.dtype == torch.bfloat16 and torch.isfinite(half).all()


@pytest.mark.parametrize("order", ["apply first", "compile first"])
def test_compiles(tiny_unet, order):
    with torch.no_grad(), diffusers_ext.apply(tiny_unet, AttentionEntropyScalingConfig()):
        eager = call_unet(tiny_unet)
    if order == "compile first":
        tiny_unet.compile(backend="eager")
    with diffusers_ext.apply(tiny_unet, AttentionEntropyScalingConfig()):
        if order == "apply first":
            tiny_unet.compile(backend="eager")
        torch.testing.assert_close(call_unet(tiny_unet), eager, atol=1e-6, rtol=0)


def _transformer(name):
    torch.manual_seed(0)
    small = {"num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 8, "sample_size": 8, "patch_size": 2}
    if name == "dit":
        model = DiTTransformer2DModel(
            **small, in_channels=4, out_channels=4, norm_num_groups=4, num_embeds_ada_norm=10
        )
        return model.eval(), {"class_labels": torch.tensor([1])}
    if name == "pixart":
        model = PixArtTransformer2DModel(
            **small, in_channels=4, out_channels=4, cross_attention_dim=16, caption_channels=6, norm_num_groups=4,
            use_additional_conditions=False,
        )  # fmt: skip
        kwargs = {"encoder_hidden_states": torch.randn(1, 7, 6)}
        return model.eval(), {**kwargs, "added_cond_kwargs": {"resolution": None, "aspect_ratio": None}}
    model = SD3Transformer2DModel(
        **small, in_channels=4, out_channels=4, joint_attention_dim=6, caption_projection_dim=16,
        pooled_projection_dim=6, pos_embed_max_size=16,
    )  # fmt: skip
    return model.eval(), {"encoder_hidden_states": torch.randn(1, 7, 6), "pooled_projections": torch.randn(1, 6)}


@pytest.mark.parametrize("size", [8, (7, 10)])
def test_levels_of_a_unet_are_those_of_its_features(size):
    """Tokens of every layer at the trained size, counted as they pass."""
    torch.manual_seed(0)
    cross = ("CrossAttnDownBlock2D",) * 3, ("CrossAttnUpBlock2D",) * 3
    unet = UNet2DConditionModel(
        sample_size=size, block_out_channels=(4, 8, 8), layers_per_block=1, norm_num_groups=2, cross_attention_dim=8,
        attention_head_dim=2, down_block_types=cross[0], up_block_types=cross[1],
    ).eval()  # fmt: skip
    config, layers, seen = AttentionEntropyScalingConfig(), self_attention(unet), {}
    for name, layer in layers.items():
        layer.register_forward_pre_hook(lambda _, args, name=name: seen.update({name: args[0].shape[1]}))
    with torch.no_grad():
        unet(torch.randn(1, 4, *config.base_of(unet)), 500, torch.randn(1, 5, 8))
    assert seen == config.trained_by_layer(unet, layers) and len(set(seen.values())) == 3


@pytest.mark.parametrize("name, keys, trained", [("dit", 64, 16), ("pixart", 64, 16), ("sd3", 71, 23)])
def test_transformers(monkeypatch, name, keys, trained):
    model, kwargs = _transformer(name)
    x = torch.randn(1, 4, 16, 16)
    original, used = Layout.factor, []

    def spy(self, queries, n, trained=None):
        used.append((n, original(self, queries, n, trained)))
        return used[-1][1]

    monkeypatch.setattr(Layout, "factor", spy)
    with torch.no_grad(), diffusers_ext.apply(model, AttentionEntropyScalingConfig()):
        model(x, timestep=torch.tensor([500]), **kwargs)
    assert used == [(keys, entropy_factor(keys, trained))] * 2


def test_processor_for_set_attn_processor(tiny_unet):
    with diffusers_ext.apply(tiny_unet, AttentionEntropyScalingConfig()):
        expected = call_unet(tiny_unet)
    tiny_unet.set_attn_processor(EntropyScaledAttnProcessor2_0(area_ratio=0.25))
    torch.testing.assert_close(call_unet(tiny_unet), expected, atol=1e-6, rtol=0)
    for bad in ({"area_ratio": 0}, {"area_ratio": 0.5, "strength": 2}):
        with pytest.raises(ValueError, match="accepted"):
            EntropyScaledAttnProcessor2_0(**bad)


def layer_entropies(pipe, size, *configs):
    """Mean row entropy of every self-attention layer at one noise level of real pictures' latents."""
    scenes, entropies, original = zoo.held_out(4), [], Attention.get_attention_scores

    def spy(self, *args):
        weights = original(self, *args)
        if not self.is_cross_attention:
            entropies.append(torch.special.entr(weights).sum(-1).mean().item())
        return weights

    images = F.interpolate(scenes.images, (size, size), mode="bicubic").clamp(-1, 1)
    pipe.unet.set_attn_processor(AttnProcessor())
    with torch.no_grad(), pytest.MonkeyPatch.context() as patch, diffusers_ext.apply(pipe, *configs):
        patch.setattr(Attention, "get_attention_scores", spy)
        z = pipe.vae.encode(images).latent_dist.mean * pipe.vae.config.scaling_factor
        noise = torch.randn(z.shape, generator=torch.Generator().manual_seed(0))
        x = pipe.scheduler.add_noise(z, noise, torch.full((4,), 400))
        ids = pipe.tokenizer(list(scenes.captions), padding="max_length", return_tensors="pt").input_ids
        pipe.unet(x, torch.tensor(400), pipe.text_encoder(ids)[0])
    pipe.unet.set_default_attn_processor()
    return torch.tensor(entropies)


def test_image_prompts_are_left_alone():
    """Flux's IP-Adapter attends from all picture tokens to a few of its own."""
    layout = Layout(0.25, 1024, 1.0, count_text=True)
    assert layout.factor(1024, 4) == 1 < layout.factor(1024, 1024) == entropy_factor(1024, 256)
    assert layout.factor(1536, 1536) == entropy_factor(1536, 768)


@pytest.mark.parametrize("size", [128, 32])
def test_trained_model_keeps_its_entropy_better(unet_pipe, size):
    trained = layer_entropies(unet_pipe, 64)
    plain = layer_entropies(unet_pipe, size)
    scaled = layer_entropies(unet_pipe, size, AttentionEntropyScalingConfig())
    assert len(trained) == len(plain) == len(scaled) == len(self_attention(unet_pipe.unet))
    assert (scaled - trained).abs().mean() < (plain - trained).abs().mean()


@pytest.mark.parametrize(
    "values",
    [
        {"base_size": (64,)},
        {"base_size": (64, 0)},
        {"strength": 1.5},
        {"strength": -0.1},
        {"start": 0.7, "end": 0.2},
        {"layers": "("},
    ],
)
def test_bad_values(values):
    with pytest.raises(ValueError, match="accepted|expression"):
        AttentionEntropyScalingConfig(**values)


def test_bad_models(tiny_unet):
    flux = zoo.load("shapes-dit").transformer
    with pytest.raises(ValueError, match="base_size"):
        diffusers_ext.apply(flux, AttentionEntropyScalingConfig())
    with pytest.raises(ValueError, match="matches none of"):
        diffusers_ext.apply(tiny_unet, AttentionEntropyScalingConfig(layers="nothing"))
    with pytest.raises(ValueError, match="single token"):
        diffusers_ext.apply(tiny_unet, AttentionEntropyScalingConfig(base_size=(1, 1)))
    with pytest.raises(ValueError, match="2 x 2 latents is a single token on level 1"):
        diffusers_ext.apply(tiny_unet, AttentionEntropyScalingConfig(base_size=(2, 2)))
    outer = AttentionEntropyScalingConfig(base_size=(2, 2), layers="down_blocks|up_blocks")
    with diffusers_ext.apply(tiny_unet, outer):  # without the middle block
        assert torch.isfinite(call_unet(tiny_unet)).all()
    with diffusers_ext.apply(tiny_unet, AttentionEntropyScalingConfig()), pytest.raises(ValueError, match="one key"):
        call_unet(tiny_unet, size=2)
    assert "forward" not in vars(tiny_unet)


@pytest.mark.parametrize(
    "name, error", [("SanaLinearAttnProcessor2_0", TypeError), ("LuminaAttnProcessor2_0", ValueError)]
)
def test_attention_of_another_kind_is_refused(tiny_unet, name, error):
    from diffusers.models import attention_processor

    tiny_unet.mid_block.attentions[0].transformer_blocks[0].attn1.processor = getattr(attention_processor, name)()
    with pytest.raises(error, match=name):
        diffusers_ext.apply(tiny_unet, AttentionEntropyScalingConfig())


def test_hidden_softmax_is_reported_in_the_run(tiny_unet):
    class Elsewhere:
        def __call__(self, attn, hidden_states, *args, **kwargs):
            return hidden_states

    tiny_unet.mid_block.attentions[0].transformer_blocks[0].attn1.processor = Elsewhere()
    with (
        diffusers_ext.apply(tiny_unet, AttentionEntropyScalingConfig()),
        pytest.raises(RuntimeError, match="mid_block"),
    ):
        call_unet(tiny_unet)


def test_one_step_needs_no_warning_and_config_travels(unet_pipe):
    config = AttentionEntropyScalingConfig(base_size=(8, 16), layers="up", end=0.5)
    assert diffusers_ext.MethodConfig.from_dict(config.to_dict()) == config
    assert diffusers_ext.check(unet_pipe, AttentionEntropyScalingConfig(), num_inference_steps=1).ok
