"""When leaving units out of a UNet is the same as another config of the plain class, and which."""

from __future__ import annotations

import itertools
import re
from collections.abc import Collection, Iterator
from typing import Any

import torch
from torch import nn


_PLAIN = {"CrossAttnDownBlock2D": "DownBlock2D", "CrossAttnUpBlock2D": "UpBlock2D"}
_INDEXED = re.compile(r"(.*?\.(?:resnets|attentions))\.(\d+)(.*)")
_INNER = re.compile(r"(.*?\.transformer_blocks)\.(\d+)(.*)")


class NotPlainError(Exception):
    """No config of the plain class describes this."""


def _kept(name: str, count: int, removed: Collection[str]) -> list[int]:
    return [j for j in range(count) if f"{name}.{j}" not in removed]


def joins_alike(layers: int, down: list[int], up: list[int]) -> bool:
    """Do the kept up layers of a stage get the same skips from a model without the other layers as with them bypassed?

    Args:
        layers: Layers of the down block; its up block has one more.
        down, up: Layers that stay.
    """
    if len(up) != len(down) + 1 or not down:
        return False
    # The skip of a removed layer is that of the last kept one before it; -1 is the input of the stage.
    bypassed = [max((j for j in down if j <= layers - 1 - k), default=-1) for k in up]
    return bypassed == [*reversed(down), -1]


def stage_choices(unet: nn.Module, stage: int, layers: int) -> Iterator[list[str]]:
    """Units of every way to cut a stage, a down block and its up block, to this number of layers."""
    number = len(unet.down_blocks) - 1 - stage
    names = {f"down_blocks.{stage}": unet.down_blocks[stage], f"up_blocks.{number}": unet.up_blocks[number]}
    total = len(unet.down_blocks[stage].resnets)
    for down in itertools.combinations(range(total), layers):
        for up in itertools.combinations(range(total + 1), layers + 1):
            if joins_alike(total, list(down), list(up)):
                yield [
                    f"{name}.{part}.{j}"
                    for (name, block), stay in zip(names.items(), (down, up))
                    for part in ("resnets", "attentions")
                    for j in range(len(getattr(block, part, None) or ()))
                    if j not in stay
                ]


def _block(name: str, block: nn.Module, removed: Collection[str]) -> tuple[list[int], bool, set[int]]:
    """Of one block: layers that stay, whether they have attention, and how deep that is."""
    stay = _kept(f"{name}.resnets", len(block.resnets), removed)
    attentions = getattr(block, "attentions", None) or ()
    attend = _kept(f"{name}.attentions", len(attentions), removed)
    if attend and attend != stay:
        raise NotPlainError
    inner = f"{name}.attentions.{{}}.transformer_blocks"
    depths = {len(_kept(inner.format(j), len(attentions[j].transformer_blocks), removed)) for j in attend}
    return stay, bool(attend), depths


def _mid(unet: nn.Module, removed: Collection[str]) -> tuple[bool, set[int]]:
    """Does the middle stay, and how deep is its attention?"""
    if unet.mid_block is None:
        return False, set()
    attentions = getattr(unet.mid_block, "attentions", None) or ()
    units = [f"mid_block.resnets.{j}" for j in range(len(unet.mid_block.resnets))]
    units += [f"mid_block.attentions.{j}" for j in range(len(attentions))]
    gone = sum(unit in removed for unit in units)
    if gone not in (0, len(units)):
        raise NotPlainError
    inner = "mid_block.attentions.{}.transformer_blocks"
    depths = {len(_kept(inner.format(j), len(a.transformer_blocks), removed)) for j, a in enumerate(attentions)}
    return not gone, depths if not gone else set()


def plain_config(unet: nn.Module) -> dict[str, Any]:
    """Config of a UNet without notes on where it came from and on which values were defaults: all count."""
    return {name: value for name, value in unet.config.items() if not name.startswith("_")}


def _config(unet: nn.Module, removed: Collection[str]) -> dict[str, Any]:
    config, stages = plain_config(unet), len(unet.down_blocks)
    depth = config["transformer_layers_per_block"]
    depth = [depth] * stages if isinstance(depth, int) else list(depth)
    if not all(isinstance(d, int) for d in depth):
        raise NotPlainError
    layers = []
    kinds = {kind: list(config[kind]) for kind in ("down_block_types", "up_block_types")}
    has_mid, mid_depths = _mid(unet, removed)
    for i, down in enumerate(unet.down_blocks):
        number = stages - 1 - i
        stay, attends, depths = _block(f"down_blocks.{i}", down, removed)
        up_stay, up_attends, up_depths = _block(f"up_blocks.{number}", unet.up_blocks[number], removed)
        if not joins_alike(len(down.resnets), stay, up_stay):
            raise NotPlainError
        layers.append(len(stay))
        found = depths | up_depths | (mid_depths if i == stages - 1 else set())
        if len(found) > 1 or 0 in found:
            raise NotPlainError
        depth[i] = found.pop() if found else depth[i]
        for kind, place, keeps in (("down_block_types", i, attends), ("up_block_types", number, up_attends)):
            if not keeps:
                kinds[kind][place] = _PLAIN.get(kinds[kind][place], kinds[kind][place])
    config.update(kinds, layers_per_block=layers, transformer_layers_per_block=depth)
    if not has_mid:
        config["mid_block_type"] = None
    return config


def _renumbered(name: str, removed: Collection[str]) -> str:
    """Name of a weight in the model where what follows something removed has moved up."""
    for pattern in (_INDEXED, _INNER):
        if match := pattern.match(name):
            parent, index, rest = match[1], int(match[2]), match[3]
            gone = sum(f"{parent}.{j}" in removed for j in range(index))
            name = f"{parent}.{index - gone}{rest}"
    return name


def compact(
    unet: nn.Module, removed: Collection[str], state: dict[str, torch.Tensor]
) -> tuple[dict[str, Any], dict[str, torch.Tensor]] | None:
    """Config and weights of a plain UNet that is this one without the removed units; None if there is none."""
    try:
        config = _config(unet, removed)
    except NotPlainError:
        return None
    state = {_renumbered(name, removed): value for name, value in state.items()}
    with torch.device("meta"):
        expected = type(unet).from_config(config).state_dict()
    same = {k: v.shape for k, v in expected.items()} == {k: v.shape for k, v in state.items()}
    return (config, state) if same else None
