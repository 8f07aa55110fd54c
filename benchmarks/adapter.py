"""Adapters: each is measured by a module of its own, `benchmarks/adapter_<slug with _>.py`; costs are counted here.

Costs are counted on the Stable Diffusion 1.5 layout at 512 x 512, beside diffusers' ControlNet and T2I-Adapter, on the
meta device: parameters, operations and sizes do not depend on trained weights.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import ControlNetModel, T2IAdapter, UNet2DConditionModel

from diffusers_ext.caching._common import tensors_in
from diffusers_ext.eval import count_macs
from diffusers_ext.registry import MethodRecord


LATENTS, PICTURE, TOKENS, WIDTH = 64, 512, 77, 768


def bench(record: MethodRecord, out_dir: Path) -> dict[str, Any]:
    """Measure an adapter with the `bench` of its module; returns what `benchmarks/run.py` expects."""
    module = importlib.import_module(f"benchmarks.adapter_{record.slug.replace('-', '_')}")
    return module.bench(record, out_dir)


@dataclass(frozen=True)
class Cost:
    """What an adapter adds to a Stable Diffusion 1.5 UNet, for one picture without guidance.

    Attributes:
        name: Of the adapter.
        parameters: Of the adapter alone.
        per_step: MACs added to every step.
        once: MACs of what is computed once per picture.
        held: Bytes of float16 tensors that are kept while the UNet runs, beside its own.
    """

    name: str
    parameters: int
    per_step: int
    once: int
    held: int

    def row(self, unet_macs: int) -> list[str]:
        """Cells: name, parameters, MACs per step over the UNet's, MACs once over the UNet's, memory."""
        return [
            self.name,
            f"{self.parameters / 1e6:.1f} M",
            f"{self.per_step / unet_macs:+.1%}",
            f"{self.once / unet_macs:.1%}",
            f"{self.held / 1e6:.1f} MB",
        ]

    def sentence(self, unet_macs: int) -> str:
        """The same in words."""
        name, parameters, step, once, held = self.row(unet_macs)
        return f"{name} {parameters} parameters, {step} MACs per step, {once} of a step once, {held} of tensors kept"


def sd15() -> UNet2DConditionModel:
    """A UNet of Stable Diffusion 1.5's sizes on the meta device."""
    with torch.device("meta"):
        return UNet2DConditionModel(cross_attention_dim=WIDTH).eval()


def inputs(device: str = "meta", size: int = LATENTS) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Latents, timestep and text states of one picture."""
    text = torch.zeros(1, TOKENS, WIDTH, device=device)
    return torch.zeros(1, 4, size, size, device=device), torch.zeros(1, device=device), text


def size_of(value: Any) -> int:
    """Bytes that the tensors in `value` take in float16."""
    return 2 * sum(t.numel() for t in tensors_in(value))


def parameters_of(model: torch.nn.Module) -> int:
    """Number of parameters."""
    return sum(p.numel() for p in model.parameters())


def unet_macs() -> int:
    """MACs of one plain step."""
    return count_macs(sd15(), *inputs())


def controlnet() -> ControlNetModel:
    """A ControlNet for Stable Diffusion 1.5."""
    return ControlNetModel(cross_attention_dim=WIDTH).eval()


def t2i_adapter() -> T2IAdapter:
    """A T2I-Adapter for Stable Diffusion 1.5."""
    return T2IAdapter(3, [320, 640, 1280, 1280], num_res_blocks=2, downscale_factor=8).eval()


def peers() -> list[Cost]:
    """ControlNet and T2I-Adapter of diffusers."""
    picture = torch.zeros(1, 3, PICTURE, PICTURE, device="meta")
    with torch.device("meta"):
        control, t2i = controlnet(), t2i_adapter()
    residuals = _no_grad(lambda: control(*inputs(), picture, return_dict=False))
    macs = count_macs(control, *inputs(), picture)
    features = _no_grad(lambda: t2i(picture))
    return [
        Cost("ControlNet", parameters_of(control), macs, 0, size_of(residuals)),
        Cost("T2I-Adapter", parameters_of(t2i), 0, count_macs(t2i, picture), size_of(features)),
    ]


def _no_grad(function: Callable[[], Any]) -> Any:
    with torch.no_grad():
        return function()
