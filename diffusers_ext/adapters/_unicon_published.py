"""UniCon weights in the layout of the paper's authors: three LoRA files and one file of further layers."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file


LORAS = ("xy_lora", "yx_lora", "y_lora")
_LORA_FILE, _MODEL = "pytorch_lora_weights.safetensors", "model"
_LORA = re.compile(
    r"(?P<part>xy_lora|yx_lora|y_lora)\.(?:unet\.)?(?P<layer>.+\.attn(?:1n|1|2)\.to_(?:q|k|v|out\.0))"
    r"\.lora(?:\.|_)(?P<which>down|up|A|B)\.weight"
)
_POST = re.compile(_MODEL + r"\.(?:unet\.)?(?P<block>.+)\.(?:conv1n|post1n\.[^.]+)\.weight")
# Copies of the base's frozen self-attention, and the updates that the LoRA files hold already.
_COPY = re.compile(_MODEL + r"\..+(?:\.attn1n\.to_(?:q|k|v|out\.0)\.(?:base_layer\.)?(?:weight|bias)|lora.*)")
_SIDES = {"A": "down", "B": "up"}


def is_published(folder: Path) -> bool:
    """Whether a folder has the authors' layout."""
    return (folder / LORAS[0]).is_dir()


def read_published(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a folder, behind the name of the file they are from.

    Raises:
        ValueError: A file is missing, or only there as a pickle.
    """
    further = folder / f"{_MODEL}.safetensors"
    if not further.is_file():
        raise ValueError(
            f"{folder} has no {further.name}. Pickles such as {_MODEL}.pth are never loaded here: if you trust it, "
            f"read {_MODEL}.pth once with PyTorch (weights_only=True) and write its tensors with "
            f"safetensors.torch.save_file to {further.name} in the same folder"
        )
    found = {f"{_MODEL}.{name}": tensor for name, tensor in load_file(further).items()}
    for part in LORAS:
        path = folder / part / _LORA_FILE
        if path.is_file():
            found |= {f"{part}.{name}": tensor for name, tensor in load_file(path).items()}
        elif part != "y_lora":
            raise ValueError(f"{folder} has no {part}/{_LORA_FILE}: it is needed")
    return found


def convert(tensors: Mapping[str, torch.Tensor]) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Config and state dict of a `UniConAdapter` from what `read_published` returns.

    Raises:
        ValueError: Names that are not of this layout, or no layers after a joint attention.
    """
    state, strange = {}, []
    for name, tensor in tensors.items():
        lora, post = _LORA.fullmatch(name), _POST.fullmatch(name)
        if lora:
            side = _SIDES.get(lora["which"], lora["which"])
            state[f"{lora['part']}.{lora['layer']}.{side}.weight"] = tensor
        elif post:
            state[f"post.{post['block']}.weight"] = tensor
        elif not _COPY.fullmatch(name):
            strange.append(name)
    posts = {
        name[len("post.") : -len(".weight")]: tensor for name, tensor in state.items() if name.startswith("post.")
    }
    if strange or not posts:
        raise ValueError(
            f"not UniCon weights: {len(strange)} names are unknown"
            + (f", such as {sorted(strange)[0]}" if strange else "")
            + f"; {len(posts)} layers such as <block>.conv1n.weight were found"
        )
    return _config_of(state, posts), state


def _config_of(state: Mapping[str, torch.Tensor], posts: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    widths, missing = {}, []
    for block in posts:
        down = state.get(f"xy_lora.{block}.attn1n.to_q.down.weight")
        if down is None:
            missing.append(block)
        else:
            rank, widths[block] = down.shape
    if missing:
        raise ValueError(f"xy_lora has no update of {missing[0]}.attn1n.to_q, for which there is a layer conv1n")
    text = [t.shape[1] for name, t in state.items() if name.startswith("y_lora.") and "attn2.to_k.down" in name]
    block, weight = next(iter(posts.items()))
    return {
        "blocks": widths,
        "cross_attention_dim": text[0] if text else 768,
        "rank": rank,
        "post_joint": "conv" if len(weight) == widths[block] else "conv_fuse",
        "use_y_lora": any(name.startswith("y_lora.") for name in state),
    }
