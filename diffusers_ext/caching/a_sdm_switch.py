"""Several UNets of one layout over the course of a run: a large one first, a light one after."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import ModelMixin, UNet2DConditionModel
from torch import nn

from ..registry import unknown
from .a_sdm_assembly import AssembledUNet


__all__ = ["MultiUNetSwitch"]

_FILE = "switch.json"
# What the latents, prompts and sizes of a pipeline depend on.
_SHARED = ("in_channels", "out_channels", "cross_attention_dim", "addition_embed_type", "time_cond_proj_dim")
_KINDS = {cls.__name__: cls for cls in (UNet2DConditionModel, AssembledUNet)}


def model_at(timestep: float, train_timesteps: int, points: Sequence[tuple[float, str]]) -> str:
    """Key of the model that runs at a timestep: of the last point at or before this part of the run.

    Args:
        timestep: `train_timesteps` - 1 at the beginning, 0 at the end.
        train_timesteps: Timesteps of training, usually 1000.
        points: (fraction of the run, key), by fraction, the first at 0.
    """
    done = 1 - (timestep + 1) / train_timesteps
    return [key for fraction, key in points if fraction <= done or fraction == 0][-1]


class MultiUNetSwitch(ModelMixin):
    """A drop-in for `pipe.unet` that runs another UNet in each part of the run.

    Args:
        unets: UNets by key, of one latent space and one text width; the first gives config, dtype and device.
        switch_points: (fraction of the run, key of the UNet from there on), the first at 0. Fractions are of the
            timesteps, 0 for the noisiest.
        train_timesteps: Timesteps of training. Default 1000.

    Raises:
        ValueError: No or unknown keys, points out of order or not from 0, or UNets that do not fit together; on a
            call, a batch of timesteps on both sides of a point.

    Example:
        >>> from diffusers_ext import AssembledUNet, MultiUNetSwitch, assemble_unet, removable_units, zoo
        >>> pipe = zoo.load("shapes-unet")
        >>> keep = [name for name in removable_units(pipe.unet) if "mid_block" not in name]
        >>> light = assemble_unet(pipe.unet, keep)
        >>> pipe.unet = MultiUNetSwitch({"full": pipe.unet, "light": light}, [(0, "full"), (0.5, "light")])
        >>> image = pipe("a red circle", num_inference_steps=4, height=64, width=64).images[0]

    Limits:
        `load_lora_weights` and `apply` want one UNet: use them on those in `unets` before they go in.
    """

    def __init__(
        self,
        unets: Mapping[str, nn.Module],
        switch_points: Sequence[tuple[float, str]],
        train_timesteps: int = 1000,
    ):
        super().__init__()
        if not unets:
            raise ValueError("unets is empty: give at least one UNet by its key")
        points = [(float(fraction), key) for fraction, key in switch_points]
        fractions = [fraction for fraction, _ in points]
        if not points or fractions[0] != 0 or fractions != sorted(set(fractions)) or fractions[-1] > 1:
            raise ValueError(f"switch_points is {points}; accepted: rising fractions from 0 to 1, the first 0")
        for _, key in points:
            if key not in unets:
                raise ValueError(unknown("model", key, unets))
        first = next(iter(unets.values()))
        for key, unet in unets.items():
            _refuse_mismatch(key, unet, first)
        self.unets = nn.ModuleDict(unets)
        self.switch_points, self.train_timesteps = points, train_timesteps

    @property
    def first(self) -> nn.Module:
        """The UNet that stands for all of them."""
        return next(iter(self.unets.values()))

    @property
    def config(self) -> Any:
        return self.first.config

    @property
    def add_embedding(self) -> nn.Module | None:
        return getattr(self.first, "add_embedding", None)

    @property
    def dtype(self) -> torch.dtype:
        return self.first.dtype

    @torch.compiler.disable
    def key_at(self, timestep: torch.Tensor | float) -> str:
        """Key of the UNet that runs at this timestep."""
        times = torch.as_tensor(timestep).reshape(-1).tolist()
        keys = {model_at(t, self.train_timesteps, self.switch_points) for t in (min(times), max(times))}
        if len(keys) > 1:
            raise ValueError(f"timesteps {min(times)} to {max(times)} of one batch belong to {sorted(keys)}: split it")
        return keys.pop()

    def forward(self, sample: torch.Tensor, timestep: torch.Tensor | float, *args, **kwargs) -> Any:
        """The call of the UNet whose turn it is."""
        return self.unets[self.key_at(timestep)](sample, timestep, *args, **kwargs)

    def save_pretrained(self, save_directory: str | Path, **kwargs) -> None:
        """Every UNet in a folder of its key, and the points beside them."""
        folder = Path(save_directory)
        for key, unet in self.unets.items():
            unet.save_pretrained(folder / key, **kwargs)
        kinds = {key: type(unet).__name__ for key, unet in self.unets.items()}
        values = {"unets": kinds, "switch_points": self.switch_points, "train_timesteps": self.train_timesteps}
        (folder / _FILE).write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **kwargs) -> MultiUNetSwitch:
        """What `save_pretrained` wrote; `kwargs` as for each UNet's own."""
        folder = Path(pretrained_model_name_or_path)
        if subfolder := kwargs.pop("subfolder", None):
            folder = folder / subfolder
        if not (folder / _FILE).is_file():
            raise ValueError(f"{folder} holds no {_FILE}: give a folder that MultiUNetSwitch.save_pretrained wrote")
        values = json.loads((folder / _FILE).read_text(encoding="utf-8"))
        unets = {}
        for key, kind in values["unets"].items():
            if kind not in _KINDS:
                raise ValueError(unknown("kind of UNet", kind, _KINDS))
            unets[key] = _KINDS[kind].from_pretrained(folder / key, **kwargs)
        return cls(unets, [tuple(point) for point in values["switch_points"]], values["train_timesteps"])


def _refuse_mismatch(key: str, unet: nn.Module, first: nn.Module) -> None:
    for name in _SHARED:
        mine, theirs = unet.config.get(name), first.config.get(name)
        if mine != theirs:
            raise ValueError(f"{name} of {key!r} is {mine}, of the first model {theirs}: they cannot share latents")
