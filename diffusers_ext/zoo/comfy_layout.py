"""Weights of the shipped models in the key layouts ComfyUI's own model classes use.

Every function is pure: a diffusers or transformers state dict and its JSON config in, renamed tensors or constructor
arguments out. Nothing here imports ComfyUI, and all sizes come from the configs.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import torch

from ..registry import unknown
from .pipelines import WEIGHTS, check_folder, names


StateDict = dict[str, torch.Tensor]

_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_FLUX_TOP = {
    "x_embedder": "img_in",
    "context_embedder": "txt_in",
    "proj_out": "final_layer.linear",
    "norm_out.linear": "final_layer.adaLN_modulation.1",
    "time_text_embed.timestep_embedder.linear_1": "time_in.in_layer",
    "time_text_embed.timestep_embedder.linear_2": "time_in.out_layer",
    "time_text_embed.text_embedder.linear_1": "vector_in.in_layer",
    "time_text_embed.text_embedder.linear_2": "vector_in.out_layer",
    "time_text_embed.guidance_embedder.linear_1": "guidance_in.in_layer",
    "time_text_embed.guidance_embedder.linear_2": "guidance_in.out_layer",
}
_FLUX_DOUBLE = {
    "norm1.linear": "img_mod.lin",
    "norm1_context.linear": "txt_mod.lin",
    "attn.to_out.0": "img_attn.proj",
    "attn.to_add_out": "txt_attn.proj",
    "attn.norm_q": "img_attn.norm.query_norm",
    "attn.norm_k": "img_attn.norm.key_norm",
    "attn.norm_added_q": "txt_attn.norm.query_norm",
    "attn.norm_added_k": "txt_attn.norm.key_norm",
    "ff.net.0.proj": "img_mlp.0",
    "ff.net.2": "img_mlp.2",
    "ff_context.net.0.proj": "txt_mlp.0",
    "ff_context.net.2": "txt_mlp.2",
}
_FLUX_SINGLE = {
    "norm.linear": "modulation.lin",
    "proj_out": "linear2",
    "attn.norm_q": "norm.query_norm",
    "attn.norm_k": "norm.key_norm",
}
_FLUX_FUSED = {
    "img_attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "txt_attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
}
_FLUX_FUSED_SINGLE = {"linear1": ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp")}


def model_folder(name: str) -> Path:
    """Folder of a shipped model, its files checked. Raises `ValueError` for an unknown name."""
    if name not in names():
        raise ValueError(unknown("zoo model", name, names()))
    check_folder(WEIGHTS / name)
    return WEIGHTS / name


def read_config(name: str, component: str) -> dict:
    """The JSON config of one component, e.g. `read_config("shapes-unet", "vae")`."""
    folder = WEIGHTS / name / component
    file = "scheduler_config.json" if component == "scheduler" else "config.json"
    return json.loads((folder / file).read_text(encoding="utf-8"))


def read_weights(name: str, component: str) -> StateDict:
    """The weights of one component in float32."""
    from safetensors.torch import load_file

    (file,) = (WEIGHTS / name / component).glob("*.safetensors")
    return {key: tensor.float() for key, tensor in load_file(file).items()}


def _rename(state: StateDict, pairs: Iterator[tuple[str, str]]) -> StateDict:
    """Replace module prefixes; every tensor must be named by exactly one pair."""
    table = dict(pairs)
    out = {}
    for key, tensor in state.items():
        prefix = next((p for p in _prefixes(key) if p in table), None)
        if prefix is None:
            raise ValueError(f"no ComfyUI name for the tensor {key!r}: this architecture is not supported")
        out[table[prefix] + key[len(prefix) :]] = tensor
    return out


def _prefixes(key: str) -> Iterator[str]:
    parts = key.split(".")
    return (".".join(parts[:n]) for n in range(len(parts) - 1, 0, -1))


def unet_arguments(config: dict) -> dict:
    """Constructor arguments of ComfyUI's `UNetModel` for a `UNet2DConditionModel` config."""
    widths, depth = config["block_out_channels"], config["layers_per_block"]
    down = [int("CrossAttn" in b) for b in config["down_block_types"]]
    up = [int("CrossAttn" in b) for b in config["up_block_types"]]
    return {
        "image_size": config["sample_size"],
        "in_channels": config["in_channels"],
        "out_channels": config["out_channels"],
        "model_channels": widths[0],
        "channel_mult": [w // widths[0] for w in widths],
        "num_res_blocks": [depth] * len(widths),
        "transformer_depth": [d for d in down for _ in range(depth)],
        # Listed from the highest resolution down and read from the end.
        "transformer_depth_output": [u for u in reversed(up) for _ in range(depth + 1)],
        "transformer_depth_middle": 1,
        "context_dim": config["cross_attention_dim"],
        # diffusers' "attention_head_dim" is the number of heads in this layout.
        "num_heads": config["attention_head_dim"],
        "num_head_channels": -1,
        "use_spatial_transformer": True,
        "use_linear_in_transformer": config["use_linear_projection"],
        "legacy": False,
    }


def _unet_block_names(config: dict) -> Iterator[tuple[str, str]]:
    """diffusers prefix -> ComfyUI prefix of each resnet (without its inner names), attention and resampler."""
    depth, levels = config["layers_per_block"], len(config["block_out_channels"])
    for i in range(levels):
        for j in range(depth):
            index = 1 + i * (depth + 1) + j
            yield f"down_blocks.{i}.resnets.{j}", f"input_blocks.{index}.0"
            yield f"down_blocks.{i}.attentions.{j}", f"input_blocks.{index}.1"
        yield f"down_blocks.{i}.downsamplers.0.conv", f"input_blocks.{(i + 1) * (depth + 1)}.0.op"
        for j in range(depth + 1):
            index = i * (depth + 1) + j
            yield f"up_blocks.{i}.resnets.{j}", f"output_blocks.{index}.0"
            yield f"up_blocks.{i}.attentions.{j}", f"output_blocks.{index}.1"
        position = 2 if "CrossAttn" in config["up_block_types"][i] else 1
        yield f"up_blocks.{i}.upsamplers.0.conv", f"output_blocks.{(i + 1) * (depth + 1) - 1}.{position}.conv"
    for theirs, ours in (("resnets.0", 0), ("attentions.0", 1), ("resnets.1", 2)):
        yield f"mid_block.{theirs}", f"middle_block.{ours}"


def unet_state(state: StateDict, config: dict) -> StateDict:
    """Weights of a `UNet2DConditionModel` under the names of ComfyUI's `UNetModel`."""

    def pairs() -> Iterator[tuple[str, str]]:
        yield from {
            "conv_in": "input_blocks.0.0",
            "time_embedding.linear_1": "time_embed.0",
            "time_embedding.linear_2": "time_embed.2",
            "conv_norm_out": "out.0",
            "conv_out": "out.2",
        }.items()
        for theirs, ours in _unet_block_names(config):
            if ".resnets." in theirs:
                yield from ((f"{theirs}.{a}", f"{ours}.{b}") for a, b in _RESNET.items())
            else:
                yield theirs, ours

    return _rename(state, pairs())


def controlnet_arguments(config: dict) -> dict:
    """Constructor arguments of ComfyUI's `ControlNet` for a `ControlNetModel` config."""
    whole = {**config, "sample_size": None, "out_channels": None, "up_block_types": []}
    middle = {"transformer_depth_middle": 1 if "CrossAttn" in config["mid_block_type"] else -1}
    return {**unet_arguments(whole), "hint_channels": config["conditioning_channels"], **middle}


def controlnet_state(state: StateDict, config: dict) -> StateDict:
    """Weights of a `ControlNetModel` under the names of ComfyUI's `ControlNet`.

    Its encoder of the condition is a list of convolutions with an activation after each but the last.
    """
    own = {"controlnet_mid_block": "middle_block_out.0", "controlnet_cond_embedding.conv_in": "input_hint_block.0"}
    steps = 2 * (len(config["conditioning_embedding_out_channels"]) - 1)
    own |= {f"controlnet_cond_embedding.blocks.{i}": f"input_hint_block.{2 * i + 2}" for i in range(steps)}
    own["controlnet_cond_embedding.conv_out"] = f"input_hint_block.{2 * steps + 2}"
    count = len(config["block_out_channels"]) * (config["layers_per_block"] + 1)
    own |= {f"controlnet_down_blocks.{k}": f"zero_convs.{k}.0" for k in range(count)}
    mine = {key: value for key, value in state.items() if key.startswith("controlnet_")}
    rest = {key: value for key, value in state.items() if not key.startswith("controlnet_")}
    none = [""] * len(config["block_out_channels"])
    return {**_rename(mine, own.items()), **unet_state(rest, {**config, "up_block_types": none})}


def flux_arguments(config: dict, latent_channels: int) -> dict:
    """Constructor arguments of ComfyUI's `Flux` for a `FluxTransformer2DModel` config."""
    patch = int((config["in_channels"] // latent_channels) ** 0.5)
    return {
        "image_model": "flux",
        "in_channels": latent_channels,
        "out_channels": latent_channels,
        "patch_size": patch,
        "vec_in_dim": config["pooled_projection_dim"],
        "context_in_dim": config["joint_attention_dim"],
        "hidden_size": config["num_attention_heads"] * config["attention_head_dim"],
        "mlp_ratio": 4.0,
        "num_heads": config["num_attention_heads"],
        "depth": config["num_layers"],
        "depth_single_blocks": config["num_single_layers"],
        "axes_dim": list(config["axes_dims_rope"]),
        "theta": 10000,
        "qkv_bias": True,
        "guidance_embed": config["guidance_embeds"],
        "txt_ids_dims": [],
    }


def _fuse(state: StateDict, prefix: str, target: str, groups: dict[str, tuple[str, ...]]) -> StateDict:
    """Concatenate the projections that ComfyUI keeps in one linear layer, removing them from `state`."""
    out = {}
    for name, parts in groups.items():
        for kind in ("weight", "bias"):
            out[f"{target}.{name}.{kind}"] = torch.cat([state.pop(f"{prefix}.{part}.{kind}") for part in parts])
    return out


def flux_state(state: StateDict, config: dict) -> StateDict:
    """Weights of a `FluxTransformer2DModel` under the names of ComfyUI's `Flux`."""
    state, out = dict(state), {}
    pairs = dict(_FLUX_TOP)
    for i in range(config["num_layers"]):
        theirs, ours = f"transformer_blocks.{i}", f"double_blocks.{i}"
        out |= _fuse(state, theirs, ours, _FLUX_FUSED)
        pairs |= {f"{theirs}.{a}": f"{ours}.{b}" for a, b in _FLUX_DOUBLE.items()}
    for i in range(config["num_single_layers"]):
        theirs, ours = f"single_transformer_blocks.{i}", f"single_blocks.{i}"
        out |= _fuse(state, theirs, ours, _FLUX_FUSED_SINGLE)
        pairs |= {f"{theirs}.{a}": f"{ours}.{b}" for a, b in _FLUX_SINGLE.items()}
    out |= _rename(state, pairs.items())
    for kind in ("weight", "bias"):  # diffusers keeps (scale, shift), ComfyUI (shift, scale)
        key = f"final_layer.adaLN_modulation.1.{kind}"
        out[key] = torch.cat(out[key].chunk(2)[::-1])
    return out


def vae_arguments(config: dict) -> dict:
    """Constructor arguments (`embed_dim`, `ddconfig`) of ComfyUI's `AutoencoderKL`."""
    widths = config["block_out_channels"]
    return {
        "embed_dim": config["latent_channels"],
        "ddconfig": {
            "double_z": True,
            "z_channels": config["latent_channels"],
            "resolution": config["sample_size"],
            "in_channels": config["in_channels"],
            "out_ch": config["out_channels"],
            "ch": widths[0],
            "ch_mult": [w // widths[0] for w in widths],
            "num_res_blocks": config["layers_per_block"],
            "attn_resolutions": [],
        },
    }


def _vae_names(config: dict) -> Iterator[tuple[str, str]]:
    depth, levels = config["layers_per_block"], len(config["block_out_channels"])
    yield from ((name, name) for name in ("quant_conv", "post_quant_conv"))
    for side, block, resample in (("encoder", "down", "downsample"), ("decoder", "up", "upsample")):
        yield from ((f"{side}.{name}", f"{side}.{name}") for name in ("conv_in", "conv_out"))
        yield f"{side}.conv_norm_out", f"{side}.norm_out"
        resnets = [(f"{side}.mid_block.resnets.{j}", f"{side}.mid.block_{j + 1}") for j in range(2)]
        for i in range(levels):
            level = i if side == "encoder" else levels - 1 - i
            yield f"{side}.{block}_blocks.{i}.{resample}rs.0.conv", f"{side}.{block}.{level}.{resample}.conv"
            count = depth + (side == "decoder")
            resnets += [
                (f"{side}.{block}_blocks.{i}.resnets.{j}", f"{side}.{block}.{level}.block.{j}") for j in range(count)
            ]
        for theirs, ours in resnets:
            yield from ((f"{theirs}.{name}", f"{ours}.{name}") for name in ("norm1", "conv1", "norm2", "conv2"))
            yield f"{theirs}.conv_shortcut", f"{ours}.nin_shortcut"


def vae_state(state: StateDict, config: dict) -> StateDict:
    """Weights of an `AutoencoderKL` without middle attention under the names of ComfyUI's class.

    ComfyUI always builds an attention layer in the middle; its output projection is set to zero, which makes it the
    identity. Raises `ValueError` for a VAE that has such a layer.
    """
    if config["mid_block_add_attention"]:
        raise ValueError("this VAE has attention in its middle block; only VAEs without it can be converted")
    out = _rename(state, _vae_names(config))
    width = config["block_out_channels"][-1]
    for side in ("encoder", "decoder"):
        for name in ("q", "k", "v", "proj_out"):
            out[f"{side}.mid.attn_1.{name}.weight"] = torch.zeros(width, width, 1, 1)
            out[f"{side}.mid.attn_1.{name}.bias"] = torch.zeros(width)
        out[f"{side}.mid.attn_1.norm.weight"] = torch.ones(width)
        out[f"{side}.mid.attn_1.norm.bias"] = torch.zeros(width)
    return out


def clip_state(state: StateDict, config: dict) -> StateDict:
    """Weights of a `CLIPTextModel` under the names of ComfyUI's CLIP, with an identity as text projection."""
    out = {key if key.startswith("text_model.") else f"text_model.{key}": t for key, t in state.items()}
    return {**out, "text_projection.weight": torch.eye(config["hidden_size"])}


def clip_arguments(config: dict) -> dict:
    """Config and special tokens of ComfyUI's CLIP text model."""
    return {
        "textmodel_json_config": dict(config),
        "max_length": config["max_position_embeddings"],
        "special_tokens": {
            "start": config["bos_token_id"],
            "end": config["eos_token_id"],
            "pad": config["pad_token_id"],
        },
    }


def t5_arguments(config: dict) -> dict:
    """Config and special tokens of ComfyUI's T5 encoder."""
    renamed = {"gelu_new": "gelu_pytorch_tanh"}
    activation = renamed.get(config["dense_act_fn"], config["dense_act_fn"])
    return {
        "textmodel_json_config": {**config, "dense_act_fn": activation},
        "special_tokens": {"end": config["eos_token_id"], "pad": config["pad_token_id"]},
    }


def sampling_settings(config: dict) -> dict:
    """ComfyUI's `sampling_settings` for a diffusers scheduler config.

    Raises `ValueError` for a schedule that ComfyUI's discrete sampling cannot express.
    """
    if "shift" in config:
        return {"shift": config["shift"], "multiplier": 1.0}
    # ComfyUI calls scaled_linear "linear" and linear "sqrt_linear".
    schedules = {"linear": "sqrt_linear", "scaled_linear": "linear"}
    if config["beta_schedule"] not in schedules:
        raise ValueError(unknown("beta schedule", config["beta_schedule"], schedules))
    return {
        "beta_schedule": schedules[config["beta_schedule"]],
        "linear_start": config["beta_start"],
        "linear_end": config["beta_end"],
        "timesteps": config["num_train_timesteps"],
        "zsnr": config["rescale_betas_zero_snr"],
    }
