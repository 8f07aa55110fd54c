"""Networks of real size with random weights: operations on the meta device, processor time of every kind of step.

Whole runs of such networks take hours on a processor. A run's share of time follows from one step of every kind, each
timed beside a plain one, and from how many of them the run has.
"""

from __future__ import annotations

import copy
import itertools
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import torch

from diffusers_ext.eval import count_macs, paired_ratio


TurnedOn = Callable[[Any], AbstractContextManager]
# Blocks of a transformer on the clock: a step's share is that of one block, which more blocks do not change.
TIMED_BLOCKS = 4
FULL, CHEAP = "full", "cheap"
# Steps of the run of which the first are timed: every method has cheap ones in it.
SHORT = 4


@dataclass(frozen=True)
class Denoiser:
    """As much of a pipeline as `apply` wants, and what a step of it computes.

    Args:
        pipe: Network and scheduler.
        predict: (network, latents, timestep) -> what the scheduler is given.
        noise: Latents with which a run begins.
    """

    pipe: Any
    predict: Callable[[torch.nn.Module, torch.Tensor, torch.Tensor], torch.Tensor]
    noise: torch.Tensor

    @property
    def network(self) -> torch.nn.Module:
        return getattr(self.pipe, "unet", None) or self.pipe.transformer

    def steps(self, count: int) -> Callable[[], None]:
        """A function whose every call is the next step of a run of `count` steps."""
        scheduler, latents = self.pipe.scheduler, self.noise
        scheduler.set_timesteps(count)
        timesteps = iter(scheduler.timesteps)

        @torch.no_grad()
        def step() -> None:
            nonlocal latents
            t = next(timesteps)
            prediction = self.predict(self.network, latents, t)
            latents = scheduler.step(prediction, t, latents, return_dict=False)[0]

        return step

    def run(self, count: int) -> None:
        """A whole run."""
        step = self.steps(count)
        for _ in range(count):
            step()

    def twin(self) -> Denoiser:
        """The same weights in a second network, which no method has touched."""
        network = self.network
        shared = {id(t): t for t in itertools.chain(network.parameters(), network.buffers())}
        name = "unet" if hasattr(self.pipe, "unet") else "transformer"
        pipe = SimpleNamespace(scheduler=copy.deepcopy(self.pipe.scheduler), **{name: copy.deepcopy(network, shared)})
        return replace(self, pipe=pipe)


def stable_diffusion(device: str) -> Denoiser:
    """Stable Diffusion 1.5's UNet on 64 x 64 latents, batch 1."""
    from diffusers import DDIMScheduler, UNet2DConditionModel

    torch.manual_seed(0)
    with torch.device(device):
        unet = UNet2DConditionModel(sample_size=64, cross_attention_dim=768).eval().requires_grad_(False)
        noise, text = torch.randn(1, 4, 64, 64), torch.randn(1, 77, 768)

    def predict(unet: torch.nn.Module, latents: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return unet(latents, t, encoder_hidden_states=text, return_dict=False)[0]

    return Denoiser(SimpleNamespace(unet=unet, scheduler=DDIMScheduler()), predict, noise)


def pixart(device: str, sample_size: int = 128, **changes: int) -> Denoiser:
    """PixArt-alpha's transformer, one picture of 1024 pixels."""
    from diffusers import FlowMatchEulerDiscreteScheduler, PixArtTransformer2DModel

    torch.manual_seed(0)
    with torch.device(device):
        model = PixArtTransformer2DModel(
            sample_size=sample_size, caption_channels=4096, use_additional_conditions=False, **changes
        )
        noise, text = torch.randn(1, 4, sample_size, sample_size), torch.randn(1, 120, 4096)
    model.eval().requires_grad_(False)
    # Caches read the timestep, which has no value on the meta device: it gets there inside of the model.
    model.adaln_single.register_forward_pre_hook(lambda _, args: (args[0].to(device), *args[1:]))

    def predict(model: torch.nn.Module, latents: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return model(latents, text, timestep=t.expand(1), return_dict=False)[0].chunk(2, 1)[0]

    return Denoiser(SimpleNamespace(transformer=model, scheduler=FlowMatchEulerDiscreteScheduler()), predict, noise)


def stable_diffusion_3(device: str, num_layers: int = 24) -> Denoiser:
    """Stable Diffusion 3 medium's transformer, one picture of 1024 pixels: 4096 tokens and 333 of text."""
    from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel

    torch.manual_seed(0)
    with torch.device(device):
        model = SD3Transformer2DModel(
            sample_size=128,
            num_layers=num_layers,
            attention_head_dim=64,
            num_attention_heads=24,
            joint_attention_dim=4096,
            caption_projection_dim=1536,
            pooled_projection_dim=2048,
            pos_embed_max_size=192,
        )
        noise, text, pooled = torch.randn(1, 16, 128, 128), torch.randn(1, 333, 4096), torch.randn(1, 2048)
    model.eval().requires_grad_(False)
    model.time_text_embed.register_forward_pre_hook(lambda _, args: (args[0].to(device), *args[1:]))

    def predict(model: torch.nn.Module, latents: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return model(latents, text, pooled, t.expand(1), return_dict=False)[0]

    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    return Denoiser(SimpleNamespace(transformer=model, scheduler=scheduler), predict, noise)


TRANSFORMERS = {"PixArt-alpha": pixart, "Stable Diffusion 3": stable_diffusion_3}


def shares(method: Callable[[], Any], plain: Callable[[], Any], kinds: Sequence[str]) -> dict[str, float]:
    """Time of the next steps of a run over that of a plain step beside each: the median of every kind.

    Args:
        method: Takes the next step of a run with a method.
        plain: Takes a plain step.
        kinds: Of the next steps of `method`.
    """
    plain()
    found = defaultdict(list)
    for kind in kinds:
        # Processor time of this process: other load on the machine must not decide.
        found[kind].append(paired_ratio(method, plain, pairs=1, warmup=0, clock=time.process_time).ratio)
    return {kind: statistics.median(ratios) for kind, ratios in found.items()}


def timed(denoiser: Denoiser, turned_on: TurnedOn, kinds: Sequence[str]) -> dict[str, float]:
    """`shares` of the first steps of a run of `SHORT` steps, and of which kinds these are."""
    twin = denoiser.twin()
    plain = twin.steps(len(kinds) + 1)  # one of them warms up
    with turned_on(denoiser.pipe):
        return shares(denoiser.steps(SHORT), plain, kinds)


def macs_of_steps(denoiser: Denoiser, turned_on: TurnedOn, count: int) -> list[int]:
    """Operations of each step of a run."""
    with turned_on(denoiser.pipe):
        step = denoiser.steps(count)
        return [count_macs(step) for _ in range(count)]


def of_a_run(macs: Sequence[int], times: dict[str, float]) -> tuple[str, str]:
    """Shares of operations and of time that remain in a run.

    Args:
        macs: Operations of its steps. Those with the most are full.
        times: Share of time of a full and of a cheap step.
    """
    full, steps = max(macs), len(macs)
    cheap = sum(count < full for count in macs)
    spent = ((steps - cheap) * times[FULL] + cheap * times[CHEAP]) / steps
    return f"{sum(macs) / (steps * full):.3f}", f"{spent:.3f}"
