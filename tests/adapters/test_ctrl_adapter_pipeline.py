"""SDXL with a Ctrl-Adapter as one pipeline: the same as attaching by hand, saved as a whole, off at scale 0."""

from __future__ import annotations

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    ControlNetModel,
    DiffusionPipeline,
    EulerDiscreteScheduler,
    MultiControlNetModel,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from PIL import Image
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from diffusers_ext import (
    CtrlAdapterControl,
    CtrlAdapterModel,
    CtrlAdapterRouter,
    StableDiffusionXLCtrlAdapterPipeline,
    zoo,
)


PROMPTS = ["a red circle", "a blue star"]
OPTIONS = {"num_inference_steps": 3, "output_type": "latent", "height": 16, "width": 16}


def unet():
    return UNet2DConditionModel(
        block_out_channels=(8, 16), layers_per_block=1, sample_size=16, norm_num_groups=4, cross_attention_dim=32,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=(2, 4), use_linear_projection=True, addition_embed_type="text_time",
        addition_time_embed_dim=8, projection_class_embeddings_input_dim=16 + 6 * 8,
    )  # fmt: skip


def controlnet(seed):
    """A ControlNet for latents of half the size, and for text states of width 128."""
    torch.manual_seed(seed)
    model = ControlNetModel(
        block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4, cross_attention_dim=128,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), attention_head_dim=4,
        conditioning_embedding_out_channels=(4, 8),
    )  # fmt: skip
    for layer in [*model.controlnet_down_blocks, model.controlnet_mid_block]:
        torch.nn.init.normal_(layer.weight)
    torch.nn.init.normal_(model.controlnet_cond_embedding.conv_out.weight)
    return model


@pytest.fixture(scope="module")
def source():
    """The model that the ControlNets were made for."""
    return zoo.load("shapes-unet-eps")


@pytest.fixture(scope="module")
def plain(source):
    """Stable Diffusion XL's layout with random weights."""
    torch.manual_seed(0)
    tokenizer = source.tokenizer
    text = CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=tokenizer.model_max_length, projection_dim=16, bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    pipe = StableDiffusionXLPipeline(
        vae=AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, latent_channels=4),
        text_encoder=CLIPTextModel(text), text_encoder_2=CLIPTextModelWithProjection(text), tokenizer=tokenizer,
        tokenizer_2=tokenizer, unet=unet(), scheduler=EulerDiscreteScheduler(), add_watermarker=False,
    )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def controlled(plain, source):
    """`controlled(ControlNet)` -> the pipeline around the same parts."""

    def make(network, **parts):
        torch.manual_seed(1)
        sizes = {"controlnet_sample_size": 8, "transformer_dim": 16, "attention_head_dim": 4, "norm_groups": 4}
        first = getattr(network, "nets", [network])[0]
        pipe = StableDiffusionXLCtrlAdapterPipeline(
            **plain.components,
            controlnet=network,
            ctrl_adapter=CtrlAdapterModel.for_model(plain, first, latent_ratio=2, **sizes).eval(),
            controlnet_text_encoder=source.text_encoder,
            controlnet_tokenizer=source.tokenizer,
            add_watermarker=False,
            **parts,
        )
        pipe.set_progress_bar_config(disable=True)
        return pipe

    return make


def picture(seed=0, n=1):
    return torch.rand(n, 3, 16, 16, generator=torch.Generator().manual_seed(seed))


def draw(pipe, *arguments, **options):
    return pipe(PROMPTS, *arguments, generator=torch.Generator().manual_seed(0), **OPTIONS, **options).images


def test_it_is_what_attaching_gives(plain, controlled, source):
    pipe = controlled(controlnet(2))
    drawn = draw(pipe, picture(n=2), "a ring", controlnet_conditioning_scale=0.7, control_guidance_end=0.7)
    free = draw(plain, negative_prompt="a ring")
    adapter = pipe.ctrl_adapter
    adapter.control = CtrlAdapterControl.from_prompts(
        pipe.controlnet, picture(n=2), PROMPTS, source.tokenizer, source.text_encoder, "a ring", end=0.7
    )
    with adapter.attach(plain, 0.7):
        by_hand = draw(plain, negative_prompt="a ring")
    assert torch.equal(drawn, by_hand) and not torch.allclose(drawn, free, atol=1e-2)
    assert not adapter.attached and torch.equal(draw(plain, negative_prompt="a ring"), free)


def test_at_scale_zero_it_is_sdxl(plain, controlled):
    pipe = controlled(controlnet(2))
    off = draw(pipe, picture(), negative_prompt="", controlnet_conditioning_scale=0.0)
    assert torch.equal(off, draw(plain, negative_prompt=""))
    assert torch.equal(draw(pipe, picture(), control_guidance_end=0.3), off)  # a third of the run is no whole step


def test_pil_pictures_and_several_per_prompt(controlled):
    pipe = controlled(controlnet(2))
    image = Image.fromarray((picture()[0].permute(1, 2, 0) * 255).round().byte().numpy())
    exact = torch.tensor(list(image.tobytes()), dtype=torch.float32).view(1, 16, 16, 3).permute(0, 3, 1, 2) / 255
    torch.testing.assert_close(draw(pipe, image), draw(pipe, exact))
    assert len(draw(pipe, picture(n=2), num_images_per_prompt=2)) == 4


def test_several_controlnets_and_a_router(controlled):
    both = MultiControlNetModel([controlnet(2), controlnet(3)])
    router = CtrlAdapterRouter(num_experts=2, num_routers=4, router_type="equal_weights")
    pictures = [picture(0), picture(1)]
    mean, routed = (draw(controlled(both, **parts), pictures) for parts in ({}, {"ctrl_adapter_router": router}))
    torch.testing.assert_close(mean, routed)
    first = draw(controlled(both, ctrl_adapter_router=router), pictures, active=[True, False])
    torch.testing.assert_close(first, draw(controlled(controlnet(2)), picture(0)))
    with pytest.raises(ValueError, match="2 ControlNets and 1 condition pictures"):
        draw(controlled(both), [picture(0)])


def test_saved_and_loaded(controlled, tmp_path):
    pipe = controlled(controlnet(2))
    pipe.save_pretrained(tmp_path)
    again = DiffusionPipeline.from_pretrained(tmp_path)
    again.set_progress_bar_config(disable=True)
    assert type(again) is StableDiffusionXLCtrlAdapterPipeline
    assert torch.equal(draw(again, picture()), draw(pipe, picture()))
