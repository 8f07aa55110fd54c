"""Shared by all tests: the repository's root, tiny models, and the shipped ones, loaded once and handed out clean."""

from __future__ import annotations

import os


# Idle threads that spin slow each other down when cores are shared; must be set before torch is imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch

import diffusers_ext


@pytest.fixture(scope="session")
def repository() -> Path:
    """Root of the checkout."""
    return Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def _loaded() -> dict[str, Any]:
    return {}


def _layers(model: Any) -> list[tuple[str, str, str]]:
    """Names and types of all modules of a model, and of their attention processors."""
    return [
        (name, type(m).__name__, type(getattr(m, "processor", None)).__name__) for name, m in model.named_modules()
    ]


def _lend(name: str, loaded: dict[str, Any]) -> Iterator[Any]:
    from diffusers_ext import zoo

    if name not in loaded:
        loaded[name] = zoo.load(name)
    pipe = loaded[name]
    scheduler, model = pipe.scheduler, diffusers_ext.denoiser_of(pipe)
    before = _layers(model)
    yield pipe
    diffusers_ext.remove(pipe)
    pipe.scheduler = scheduler
    if _layers(model) != before:  # a LoRA leaves its wrappers, which change the names of weights
        del loaded[name]


@pytest.fixture
def shapes_unet(_loaded) -> Iterator[Any]:
    """Stable Diffusion layout, v prediction. Scheduler and methods are put back after the test."""
    yield from _lend("shapes-unet", _loaded)


@pytest.fixture
def shapes_unet_eps(_loaded) -> Iterator[Any]:
    """The same layout with epsilon prediction."""
    yield from _lend("shapes-unet-eps", _loaded)


@pytest.fixture
def shapes_dit(_loaded) -> Iterator[Any]:
    """Flux layout, flow matching."""
    yield from _lend("shapes-dit", _loaded)


@pytest.fixture(scope="session")
def judge() -> Any:
    """The classifier that reads the pictures."""
    from diffusers_ext import zoo

    return zoo.load_judge()


def _tiny(layout: str, layers: int, size: int, text: int) -> tuple[str, dict[str, Any]]:
    """Class and config of the smallest model of a layout."""
    heads = {"num_attention_heads": 2, "attention_head_dim": 8}
    square = {**heads, "in_channels": 4, "num_layers": layers, "sample_size": size}
    joint = {"joint_attention_dim": text, "pooled_projection_dim": text}
    if layout == "unet":
        return "UNet2DConditionModel", {
            "sample_size": size,
            "block_out_channels": (8, 16),
            "layers_per_block": 1,
            "norm_num_groups": 4,
            "cross_attention_dim": text,
            "attention_head_dim": 2,
            "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
            "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        }
    if layout == "dit":
        return "DiTTransformer2DModel", {**square, "num_embeds_ada_norm": 9}
    if layout == "pixart":
        own = {"cross_attention_dim": 16, "caption_channels": text, "use_additional_conditions": False}
        return "PixArtTransformer2DModel", {**square, **own, "out_channels": 4}
    if layout == "sd3":
        own = {"caption_projection_dim": 16, "pos_embed_max_size": 16, "qk_norm": "rms_norm"}
        return "SD3Transformer2DModel", {**square, **joint, **own, "out_channels": 4}
    blocks = {"num_layers": layers // 2, "num_single_layers": layers // 2, "axes_dims_rope": (2, 2, 4)}
    return "FluxTransformer2DModel", {**heads, **joint, **blocks, "in_channels": 16}


@pytest.fixture(scope="session")
def tiny_model() -> Callable[..., torch.nn.Module]:
    """`tiny_model(layout, layers=4, size=4, text=8, **config)` -> a fresh model, always with the same weights.

    Layouts are unet (of two levels), dit, pixart, sd3 and flux, for latents of 4 channels, trained at `size` x `size`,
    with text of width `text`; any other model by its class and whole config. No weight is zero: adaLN-zero and zero
    output layers would hide every block.
    """

    def build(
        layout: str | type[torch.nn.Module], layers: int = 4, size: int = 4, text: int = 8, **config: Any
    ) -> torch.nn.Module:
        torch.manual_seed(0)
        if isinstance(layout, str):
            name, own = _tiny(layout, layers, size, text)
            model = getattr(diffusers, name)(**{**own, **config})
        else:
            model = layout(**config)
        for parameter in model.eval().requires_grad_(False).parameters():
            if parameter.abs().max() == 0:
                torch.nn.init.normal_(parameter, std=0.2)
        return model

    return build
