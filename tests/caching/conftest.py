"""Tiny UNets of every layout, and the plainest denoising loop."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, UNet2DConditionModel, UNet2DModel, UNetSpatioTemporalConditionModel

from diffusers_ext.caching._common import map_tensors, tensors_in


def _seeded(cls, **config):
    torch.manual_seed(0)
    return cls(**config).eval().requires_grad_(False)


def _conditional(**overrides):
    config = {
        "sample_size": 16,
        "block_out_channels": (8, 16, 16),
        "layers_per_block": 2,
        "norm_num_groups": 4,
        "cross_attention_dim": 8,
        "attention_head_dim": 2,
        "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    }
    return _seeded(UNet2DConditionModel, **{**config, **overrides})


def _sdxl():
    return _conditional(
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 1, 2),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=4,
        projection_class_embeddings_input_dim=6 * 4 + 8,
    )


def _unconditional():
    return _seeded(
        UNet2DModel,
        sample_size=16,
        block_out_channels=(8, 16, 16),
        layers_per_block=2,
        norm_num_groups=4,
        attention_head_dim=4,
        down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
    )


def _svd():
    return _seeded(
        UNetSpatioTemporalConditionModel,
        sample_size=16,
        in_channels=8,
        block_out_channels=(32, 64),
        down_block_types=("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
        up_block_types=("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"),
        addition_time_embed_dim=4,
        projection_class_embeddings_input_dim=12,
        cross_attention_dim=8,
        num_attention_heads=(2, 4),
    )


_MODELS = {
    "sd": _conditional,
    "sd2": lambda: _conditional(use_linear_projection=True, attention_head_dim=(1, 2, 2)),
    "sdxl": _sdxl,
    "inpaint": lambda: _conditional(in_channels=9),
    "one-layer": lambda: _conditional(layers_per_block=1),
    "uneven": lambda: _conditional(layers_per_block=(1, 2, 1)),
    "unet2d": _unconditional,
    "svd": _svd,
}


def _inputs(name, batch, size):
    generator = torch.Generator().manual_seed(1)
    kwargs = {}
    if name == "svd":
        shape = (batch, 2, 8, size, size)
        kwargs = {"encoder_hidden_states": torch.randn(batch, 1, 8, generator=generator)}
        kwargs["added_time_ids"] = torch.tensor([[6.0, 127.0, 0.02]] * batch)
    else:
        shape = (batch, {"inpaint": 9, "unet2d": 3}.get(name, 4), size, size)
        if name != "unet2d":
            kwargs = {"encoder_hidden_states": torch.randn(batch, 5, 8, generator=generator)}
    if name == "sdxl":
        kwargs["added_cond_kwargs"] = {
            "text_embeds": torch.randn(batch, 8, generator=generator),
            "time_ids": torch.tensor([[16.0, 16, 0, 0, 16, 16]] * batch),
        }
    return torch.randn(shape, generator=generator), kwargs


def denoise(unet, name="sd", steps=6, batch=2, size=16, timesteps=None, calls=None, **extra):
    """Latents after a plain loop; `x` moves a little each step, by the model's own output."""
    x, kwargs = _inputs(name, batch, size)
    kwargs.update(extra)
    if timesteps is None:
        scheduler = DDIMScheduler()
        scheduler.set_timesteps(steps)
        timesteps = scheduler.timesteps
    with torch.no_grad():
        for index, t in enumerate(timesteps):
            if calls is not None and index == calls:
                break
            out = unet(x, t, return_dict=False, **kwargs)[0]
            x = x.clone()
            x[..., : out.shape[-3], :, :] += 0.1 * out
    return x


def continued(history, step, order):
    """The polynomial of an order through the newest of `(step, value)`, at a step: a least-squares fit of numpy."""
    history = history[-order - 1 :]
    steps = [s - step for s, _ in history]
    fits = []
    for tensors in zip(*(tensors_in(value) for _, value in history)):
        points = torch.stack(tensors).flatten(1).double().numpy()
        constant = np.polynomial.polynomial.polyfit(steps, points, len(steps) - 1)[0]
        fits.append(torch.from_numpy(constant).view(tensors[-1].shape).to(tensors[-1].dtype))
    return map_tensors(history[-1][1], lambda _: fits.pop(0))


def shadowed(model, schedule, order=0):
    """A cache by hand: `forward` of the modules in a schedule replaced by functions that count their own calls.

    Args:
        schedule: Module name -> steps at which it really runs.
        order: Of the polynomial that it gives at the others.

    Returns:
        Function that puts everything back.
    """

    def shadow(steps, forward):
        step, history = 0, []

        def run(*args, **kwargs):
            nonlocal step
            if step in steps:
                history.append((step, forward(*args, **kwargs)))
            value = continued(history, step, order) if order and step not in steps else history[-1][1]
            step += 1
            return value

        return run

    for name, steps in schedule.items():
        module = model.get_submodule(name)
        module.forward = shadow(steps, module.forward)
    return lambda: [model.get_submodule(name).__dict__.pop("forward") for name in schedule]


@pytest.fixture(scope="session")
def by_hand():
    return shadowed


@pytest.fixture(scope="session")
def continue_history():
    return continued


@pytest.fixture
def make_unet():
    """Builds a fresh tiny UNet by layout name."""
    return lambda name="sd": _MODELS[name]()


@pytest.fixture
def run_loop():
    return denoise


@pytest.fixture
def make_inputs():
    return _inputs


@pytest.fixture
def traces():
    """What a model carries beside its weights: hook registries and replaced forwards, by module name."""

    def of(model):
        hooks = {n: list(m._diffusers_hook.hooks) for n, m in model.named_modules() if hasattr(m, "_diffusers_hook")}
        forwards = {n for n, m in model.named_modules() if "forward" in m.__dict__}
        return hooks, forwards, "_reset_stateful_cache" in model.__dict__

    return of


@pytest.fixture
def count_runs():
    """How often modules really run during a function. Give modules inside of what a cache may skip."""

    def count(function, **modules):
        counts = dict.fromkeys(modules, 0)

        def counter(name):
            def hook(*_):
                counts[name] += 1

            return hook

        handles = [module.register_forward_pre_hook(counter(name)) for name, module in modules.items()]
        try:
            function()
        finally:
            for handle in handles:
                handle.remove()
        return counts

    return count
