"""Smaller UNets assembled from the parts of a large one that matter, and their distillation."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from diffusers.configuration_utils import ConfigMixin
from torch import nn
from torch.nn import functional as F

from ..prediction import expand, from_x0
from ..registry import unknown
from ._a_sdm_layout import compact, plain_config, stage_choices
from .a_sdm_condconv import ConditionalConv2d


__all__ = [
    "AssembledUNet",
    "AssemblyDistillation",
    "assemble_unet",
    "calibration_batches",
    "layers_to_keep",
    "prediction_error",
    "removable_units",
    "unit_sensitivity",
    "units_to_keep",
]

Calibration = Sequence[tuple[dict[str, Any], torch.Tensor]]


class Bypass(nn.Module):
    """In place of what was removed: hands on what came in, in the up path without the skip that was joined to it.

    Args:
        channels: Keep these first channels only; None for all.
        in_tuple: Return a tuple, as a whole transformer does.
    """

    def __init__(self, channels: int | None = None, in_tuple: bool = False):
        super().__init__()
        self.channels, self.in_tuple = channels, in_tuple

    def forward(self, hidden_states: torch.Tensor, *args, **kwargs) -> Any:
        kept = hidden_states if self.channels is None else hidden_states[:, : self.channels]
        return (kept,) if self.in_tuple else kept


def _bypasses(unet: nn.Module) -> Iterator[tuple[str, Bypass]]:
    """Every unit that can be left out, with what takes its place. Whatever changes the number of channels cannot."""
    channels = unet.config.block_out_channels[0]
    blocks = [(f"down_blocks.{i}", block) for i, block in enumerate(unet.down_blocks)]
    blocks += [("mid_block", unet.mid_block)] if unet.mid_block is not None else []
    blocks += [(f"up_blocks.{i}", block) for i, block in enumerate(unet.up_blocks)]
    for name, block in blocks:
        joins = name.startswith("up_blocks")
        for j, resnet in enumerate(block.resnets):
            if isinstance(resnet, Bypass):
                continue
            if resnet.out_channels == channels:
                yield f"{name}.resnets.{j}", Bypass(channels if joins else None)
            channels = resnet.out_channels
        for j, attention in enumerate(getattr(block, "attentions", None) or ()):
            if isinstance(attention, Bypass):
                continue
            yield f"{name}.attentions.{j}", Bypass(in_tuple=True)
            for k, inner in enumerate(attention.transformer_blocks if len(attention.transformer_blocks) > 1 else ()):
                if not isinstance(inner, Bypass):
                    yield f"{name}.attentions.{j}.transformer_blocks.{k}", Bypass()


def removable_units(unet: UNet2DConditionModel) -> dict[str, int]:
    """Name and number of parameters of every unit of a UNet that can be left out.

    Units are resnets that keep the number of channels, transformers inside of layers, and the blocks of those that
    have several. A resnet of the up path takes the skip connection along that was joined to its input.

    Raises:
        TypeError: It is no `UNet2DConditionModel`.
    """
    if not isinstance(unet, UNet2DConditionModel):
        raise TypeError(f"assembly needs a UNet2DConditionModel, got {type(unet).__name__}")
    return {name: sum(p.numel() for p in unet.get_submodule(name).parameters()) for name, _ in _bypasses(unet)}


@contextmanager
def _without(unet: nn.Module, name: str, bypass: Bypass) -> Iterator[None]:
    unit = unet.get_submodule(name)
    unet.set_submodule(name, bypass)
    try:
        yield
    finally:
        unet.set_submodule(name, unit)


def calibration_batches(
    scheduler: Any, latents: torch.Tensor, text: torch.Tensor, batch_size: int = 8, seed: int = 0, **extra: Any
) -> list[tuple[dict[str, Any], torch.Tensor]]:
    """Noised latents at timesteps spread evenly over the schedule, each with the output a perfect model would give.

    Args:
        scheduler: With `alphas_cumprod` and a `prediction_type`.
        latents: `[n, c, h, w]`, scaled as the denoiser sees them.
        text: Text states `[n, tokens, width]`.
        batch_size: Latents per batch.
        seed: Of the noise.
        extra: Further arguments of the UNet, as they are.

    Returns:
        Pairs of arguments and target for `unit_sensitivity`.
    """
    generator = torch.Generator().manual_seed(seed)
    alphas = scheduler.alphas_cumprod
    t = ((torch.arange(len(latents)) + 0.5) / len(latents) * len(alphas)).long()[
        torch.randperm(len(latents), generator=generator)
    ]
    noise = torch.randn(latents.shape, generator=generator).to(latents)
    alpha, sigma = (expand(v[t].sqrt().to(latents), latents) for v in (alphas, 1 - alphas))
    x = alpha * latents + sigma * noise
    target = from_x0(latents, x, alpha, sigma, scheduler.config.prediction_type)
    parts = zip(*(v.split(batch_size) for v in (x, t.to(latents.device), text, target)))
    return [({"sample": a, "timestep": b, "encoder_hidden_states": c, **extra}, d) for a, b, c, d in parts]


@torch.no_grad()
def prediction_error(unet: nn.Module, batches: Calibration) -> float:
    """Mean squared error of a UNet's outputs."""
    errors = [(F.mse_loss(unet(**given).sample.float(), target.float()), len(target)) for given, target in batches]
    return sum(float(error) * rows for error, rows in errors) / sum(rows for _, rows in errors)


def unit_sensitivity(
    unet: UNet2DConditionModel, batches: Calibration, units: Iterable[str] | None = None
) -> dict[str, float]:
    """How much the error of a UNet rises when a unit is left out, without any training.

    Args:
        unet: The UNet; it is left as it was.
        batches: Arguments and target of calls, see `calibration_batches`.
        units: Names out of `removable_units`; None for all.

    Raises:
        ValueError: No batch, or a unit that cannot be left out.
    """
    if not batches:
        raise ValueError("batches is empty: give at least one pair of arguments and target")
    known, scores = dict(_bypasses(unet)), {}
    units = list(known if units is None else units)
    _refuse_unknown(units, known)
    plain = prediction_error(unet, batches)
    for name in units:
        with _without(unet, name, known[name]):
            scores[name] = prediction_error(unet, batches) - plain
    return scores


def _refuse_unknown(names: Iterable[str], known: Iterable[str]) -> None:
    for name in names:
        if name not in known:
            raise ValueError(unknown("unit that can be left out", name, known))


def units_to_keep(scores: Mapping[str, float], keep_ratio: float) -> list[str]:
    """The most sensitive units of every block.

    Args:
        scores: From `unit_sensitivity`.
        keep_ratio: Share of each block's units to keep, above 0 to 1, rounded up.
    """
    if not 0 < keep_ratio <= 1:
        raise ValueError(f"keep_ratio is {keep_ratio}; accepted: above 0, to 1")
    blocks: dict[str, list[str]] = {}
    for name in scores:
        blocks.setdefault(name.partition(".resnets")[0].partition(".attentions")[0], []).append(name)
    best = (sorted(n, key=lambda u: -scores[u])[: math.ceil(keep_ratio * len(n))] for n in blocks.values())
    kept = set(itertools.chain(*best))
    return [name for name in scores if name in kept]


def layers_to_keep(unet: UNet2DConditionModel, scores: Mapping[str, float], layers_per_block: int) -> list[str]:
    """Units to keep for a UNet of fewer layers per block, which stays a plain `UNet2DConditionModel`.

    Of all ways to leave out whole layers, the same number in every down block and its up block, the one whose removed
    units have the least scores in sum.

    Args:
        unet: The UNet.
        scores: From `unit_sensitivity`, of all units.
        layers_per_block: Layers that remain in every down block, 1 or more.

    Raises:
        ValueError: No such way keeps the shapes.
    """
    removed: set[str] = set()
    for stage in range(len(unet.down_blocks)):
        ways = [way for way in stage_choices(unet, stage, layers_per_block) if all(unit in scores for unit in way)]
        if not ways:
            raise ValueError(
                f"down_blocks.{stage} and its up block cannot be cut to {layers_per_block} layers: their shapes do "
                f"not allow it; down_blocks.{stage} has {len(unet.down_blocks[stage].resnets)}"
            )
        removed |= set(min(ways, key=lambda way: sum(scores[unit] for unit in way)))
    return [name for name in scores if name not in removed]


class AssembledUNet(UNet2DConditionModel):
    """A Stable Diffusion UNet without some of its units, or with experts in some of its convolutions.

    It is saved, loaded and used as any UNet of diffusers; its config names what is left out. Made by `assemble_unet`.

    Args:
        removed: Names of units that are left out.
        conditional: Names of convolutions that are `ConditionalConv2d`.
        num_experts: Of those.
        gating: Of those.
        kwargs: Config of the whole UNet.
    """

    def __init__(
        self,
        removed: Sequence[str] = (),
        conditional: Sequence[str] = (),
        num_experts: int = 4,
        gating: str = "softmax",
        **kwargs,
    ):
        super().__init__(**kwargs)
        known = dict(_bypasses(self))
        _refuse_unknown(removed, known)
        for name in sorted(removed, key=len, reverse=True):  # what is inside before what holds it
            self.set_submodule(name, known[name])
        self.register_to_config(removed=list(removed), conditional=[], num_experts=num_experts, gating=gating)
        if conditional:
            self.add_experts(conditional, num_experts, gating)

    @staticmethod
    def _get_init_keys(input_class: type) -> set[str]:
        """Of this class, those of the plain UNet too, which `kwargs` stands for."""
        keys = ConfigMixin._get_init_keys(input_class)
        return keys | ConfigMixin._get_init_keys(UNet2DConditionModel) if "removed" in keys else keys

    def add_experts(self, names: Sequence[str], num_experts: int = 4, gating: str = "softmax") -> None:
        """Give convolutions experts that start as their kernel.

        Args:
            names: Names of 3 x 3 convolutions, e.g. `"up_blocks.1.resnets.0.conv1"`.
            num_experts: See `ConditionalConv2d`.
            gating: See `ConditionalConv2d`.

        Raises:
            ValueError: Unknown names, no convolutions, or experts of another kind in this model already.
        """
        modules = dict(self.named_modules())
        convolutions = [n for n, m in modules.items() if isinstance(m, nn.Conv2d)]
        for name in names:
            if name not in convolutions:
                raise ValueError(unknown("convolution", name, convolutions))
        before = self.config.conditional
        if before and (self.config.num_experts, self.config.gating) != (num_experts, gating):
            raise ValueError(
                f"this model has {self.config.num_experts} experts with {self.config.gating} gates already"
            )
        new = {name: ConditionalConv2d.from_conv(modules[name], num_experts, gating) for name in names}
        for name, module in new.items():
            self.set_submodule(name, module)
        self.register_to_config(conditional=[*before, *names], num_experts=num_experts, gating=gating)


def assemble_unet(
    unet: UNet2DConditionModel,
    keep: Iterable[str],
    conditional: Sequence[str] = (),
    num_experts: int = 4,
    gating: str = "softmax",
) -> UNet2DConditionModel:
    """A smaller UNet of the units to keep, with the original weights. What cannot be left out always stays.

    Where whole layers, all attention of a block or the whole middle are left out the same way down and up, the result
    is a plain `UNet2DConditionModel` of another config; otherwise an `AssembledUNet`. Both compute what the original
    computes with the other units bypassed.

    Args:
        unet: The UNet; it is left as it is.
        keep: Names out of `removable_units`, e.g. from `units_to_keep`.
        conditional: Convolutions of the new UNet that get experts (`AssembledUNet.add_experts`).
        num_experts: Of those.
        gating: Of those.

    Raises:
        ValueError: A name that is no removable unit, or nothing to do.

    Example:
        >>> from diffusers_ext import assemble_unet, removable_units, zoo
        >>> unet = zoo.load("shapes-unet").unet
        >>> units = removable_units(unet)
        >>> light = assemble_unet(unet, [name for name in units if "mid_block" not in name])
        >>> round(light.num_parameters() / unet.num_parameters(), 2)
        0.69
    """
    known, keep = removable_units(unet), set(keep)
    _refuse_unknown(keep, known)
    removed = [name for name in known if name not in keep]
    removed = [n for n in removed if not any(n.startswith(outer + ".") for outer in removed)]
    if not removed and not conditional:
        raise ValueError("keep names every unit: there is nothing to leave out")
    state = {k: v for k, v in unet.state_dict().items() if not k.startswith(tuple(f"{n}." for n in removed))}
    smaller = None if conditional or isinstance(unet, AssembledUNet) else compact(unet, removed, state)
    if smaller is None:
        config = plain_config(unet)
        smaller = _filled(AssembledUNet, {**config, "removed": [*config.get("removed", ()), *removed]}, state)
    else:
        smaller = _filled(UNet2DConditionModel, *smaller)
    if conditional:
        smaller.add_experts(conditional, num_experts, gating)
    return smaller.train(unet.training)


def _filled(cls: type[UNet2DConditionModel], config: dict[str, Any], state: dict[str, torch.Tensor]) -> Any:
    """A model with these weights, copied."""
    with torch.device("meta"):
        model = cls.from_config(config)
    model.load_state_dict({name: value.detach().clone() for name, value in state.items()}, assign=True)
    return model


class AssemblyDistillation:
    """Loss that teaches an assembled UNet what the original does.

    L = L_task + w1 |eps_T - eps_S|^2 + w2 sum |f_T - f_S|^2, where f are the outputs of the down
    blocks, the middle and the up blocks; squares are means over elements.

    Args:
        teacher: The original UNet; it gets no gradients.
        student: The assembled one.
        output_weight: w1, default 1.
        feature_weight: w2, default 1.

    Example:
        >>> import torch
        >>> from diffusers_ext import AssemblyDistillation, assemble_unet, removable_units, zoo
        >>> unet = zoo.load("shapes-unet").unet
        >>> student = assemble_unet(unet, [n for n in removable_units(unet) if "mid_block.att" not in n])
        >>> x, text = torch.randn(1, 4, 16, 16), torch.randn(1, 20, 128)
        >>> loss = AssemblyDistillation(unet, student)(torch.zeros_like(x), x, 500, text)
        >>> loss.backward()
    """

    def __init__(
        self, teacher: nn.Module, student: nn.Module, output_weight: float = 1.0, feature_weight: float = 1.0
    ):
        self.teacher, self.student = teacher, student
        self.output_weight, self.feature_weight = output_weight, feature_weight

    def __call__(self, target: torch.Tensor, *args, **kwargs) -> torch.Tensor:
        """Loss of one batch: what a perfect model would give, then the arguments of the UNets."""
        with torch.no_grad():
            expected, theirs = _with_features(self.teacher, args, kwargs)
        output, ours = _with_features(self.student, args, kwargs)
        loss = F.mse_loss(output, target) + self.output_weight * F.mse_loss(output, expected)
        return loss + self.feature_weight * sum(F.mse_loss(ours[name], theirs[name]) for name in ours)


def _with_features(unet: nn.Module, args: tuple, kwargs: dict) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Output of a UNet and of its blocks by name."""
    found: dict[str, torch.Tensor] = {}

    def note(name: str):
        return lambda _, __, output: found.update({name: output[0] if isinstance(output, tuple) else output})

    blocks = [(f"down.{i}", b) for i, b in enumerate(unet.down_blocks)] + [("mid", unet.mid_block)]
    blocks += [(f"up.{i}", b) for i, b in enumerate(unet.up_blocks)]
    handles = [block.register_forward_hook(note(name)) for name, block in blocks if block is not None]
    try:
        return unet(*args, **kwargs).sample, found
    finally:
        for handle in handles:
            handle.remove()
