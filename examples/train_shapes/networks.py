"""Tokenizers, networks and schedulers of the shapes pipelines, built from scratch with diffusers and transformers."""

from __future__ import annotations

import math
from collections import Counter
from itertools import pairwise

import torch
from torch import nn

from diffusers_ext.zoo import world


PROMPT_TOKENS = 20  # start and end included; the longest caption takes 17
WIDTH = 128  # of the text states, and of the shapes-dit trunk
POSTERIOR_STD = 0.06


def byte_pair_merges(words: list[str]) -> list[tuple[str, str]]:
    """Byte-pair merges, most frequent first (ties in alphabetical order), until every word is one piece."""
    split = [[*word[:-1], word[-1] + "</w>"] for word in words]
    merges = []
    while pairs := Counter(pair for pieces in split for pair in pairwise(pieces)):
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merges.append(best)
        for pieces in split:
            at = 0
            while at < len(pieces) - 1:
                if (pieces[at], pieces[at + 1]) == best:
                    pieces[at : at + 2] = ["".join(best)]
                at += 1
    return merges


def clip_tokenizer():
    """CLIP's byte-level BPE with merges learnt on this world: a known word is one token, others fall into letters."""
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import CLIPTokenizer

    merges, letters = byte_pair_merges(world.words()), sorted(ByteLevel.alphabet())
    pieces = [*letters, *(letter + "</w>" for letter in letters), *(a + b for a, b in merges)]
    pieces = [*dict.fromkeys(pieces), "<|startoftext|>", "<|endoftext|>"]
    vocabulary = {piece: index for index, piece in enumerate(pieces)}
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=PROMPT_TOKENS)


def t5_tokenizer():
    """A unigram tokenizer in T5's format: one piece per known word, letters for the rest."""
    from transformers import T5Tokenizer

    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("\u2581", -6.0)]
    pieces += [("\u2581" + word, -2.0) for word in world.words()] + [(",", -3.0)]
    pieces += [(character, -12.0) for character in "abcdefghijklmnopqrstuvwxyz0123456789.-"]
    return T5Tokenizer(vocab=pieces, extra_ids=0, model_max_length=PROMPT_TOKENS)


def clip_text(tokenizer) -> nn.Module:
    """CLIPTextModel, 3 layers of width 128."""
    from transformers import CLIPTextConfig, CLIPTextModel

    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        projection_dim=WIDTH,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=PROMPT_TOKENS,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return CLIPTextModel(config)


def t5_text(tokenizer) -> nn.Module:
    """T5EncoderModel, 3 layers of width 128; enough position buckets to tell all distances in a prompt apart."""
    from transformers import T5Config, T5EncoderModel

    config = T5Config(
        vocab_size=len(tokenizer),
        d_model=WIDTH,
        d_kv=WIDTH // 4,
        d_ff=2 * WIDTH,
        num_layers=3,
        num_heads=4,
        dropout_rate=0.0,
        relative_attention_num_buckets=48,
        relative_attention_max_distance=24,
        feed_forward_proj="gated-gelu",
        is_encoder_decoder=False,
        use_cache=False,
        pad_token_id=0,
        eos_token_id=1,
        decoder_start_token_id=0,
    )
    return T5EncoderModel(config)


def vae() -> nn.Module:
    """AutoencoderKL, 64 x 64 x 3 -> 16 x 16 x 4, with a posterior of fixed width."""
    from diffusers import AutoencoderKL

    model = AutoencoderKL(
        block_out_channels=(16, 16, 48),
        latent_channels=4,
        layers_per_block=1,
        norm_num_groups=1,  # more groups would normalise the mean colour away
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        mid_block_add_attention=False,
        sample_size=world.SIZE,
        force_upcast=False,
    )
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "resnets" in name and name.endswith("conv2.weight"):
                weight.mul_(0.1)  # residual branches that start small learn several times faster at first
        fix_posterior(model)
    return model


@torch.no_grad()
def fix_posterior(model: nn.Module) -> None:
    """Give the posterior of `model` the constant standard deviation it is trained with."""
    model.quant_conv.weight[4:].zero_()
    model.quant_conv.bias[4:].fill_(2 * math.log(POSTERIOR_STD))


def unet() -> nn.Module:
    """UNet2DConditionModel with Stable Diffusion's blocks, widths 32, 64, 128, 3.2 M parameters."""
    from diffusers import UNet2DConditionModel

    model = UNet2DConditionModel(
        sample_size=16,
        in_channels=4,
        out_channels=4,
        block_out_channels=(32, 64, 128),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=WIDTH,
        attention_head_dim=4,  # diffusers' name for the number of heads
        norm_num_groups=8,
    )
    nn.init.zeros_(model.conv_out.weight)
    nn.init.zeros_(model.conv_out.bias)
    return model


def dit() -> nn.Module:
    """FluxTransformer2DModel, 4 double and 8 single blocks of width 128 over 64 tokens, 4.5 M parameters."""
    from diffusers import FluxTransformer2DModel

    model = FluxTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=4,
        num_single_layers=8,
        attention_head_dim=32,
        num_attention_heads=4,
        joint_attention_dim=WIDTH,
        pooled_projection_dim=WIDTH,
        guidance_embeds=False,
        axes_dims_rope=(8, 12, 12),
    )
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            zero = name == "proj_out" or ("norm" in name and name.endswith(".linear"))  # adaLN-zero
            nn.init.zeros_(module.weight) if zero else nn.init.xavier_uniform_(module.weight)
            nn.init.zeros_(module.bias)
    return model


# Noise schedules of the UNets. The linear one ends near zero signal, so that flat grounds come out in the asked
# colour. A model that predicts noise cannot tell the picture there: it gets Stable Diffusion's, which ends earlier.
_BETAS = {"v_prediction": ("linear", 1e-4, 0.02), "epsilon": ("scaled_linear", 0.00085, 0.012)}


def diffusion_scheduler(prediction_type: str):
    """DDIM for a UNet that predicts `"v_prediction"` or `"epsilon"`, on the noise schedule it is trained with."""
    from diffusers import DDIMScheduler

    schedule, start, end = _BETAS[prediction_type]
    return DDIMScheduler(
        beta_schedule=schedule,
        beta_start=start,
        beta_end=end,
        prediction_type=prediction_type,
        clip_sample=False,
        set_alpha_to_one=True,
        steps_offset=1,
        timestep_spacing="trailing",
    )


def flow_scheduler():
    """Euler steps along straight flow-matching paths, evenly spaced noise levels."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    return FlowMatchEulerDiscreteScheduler(shift=1.0)
