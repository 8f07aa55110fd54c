"""BAC where it comes from: a diffusion policy that plans chunks of actions, several times cheaper.

    python examples/diffusion_policy.py [--steps 1500] [--updates 25]

A point robot crosses a room with a round obstacle in the middle. Demonstrations pass it on either side, so the policy
must choose one. A small transformer decoder learns to denoise whole paths; BAC then recomputes each of its attentions
and feed-forwards at a quarter of the denoising steps. Printed are the share of rooms crossed without touching the
obstacle and the operations.
"""

from __future__ import annotations

import argparse
from types import SimpleNamespace
from typing import Any

import torch
from diffusers import DDPMScheduler
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.embeddings import TimestepEmbedding, Timesteps

import diffusers_ext
from diffusers_ext import BACConfig, measure_bac
from diffusers_ext.eval import count_macs


HORIZON, OBSTACLE, STEPS = 16, 0.3, 100


class TinyDiffusionPolicy(torch.nn.Module):
    """Transformer decoder over a chunk of actions: self-attention, attention to observation and time, feed-forward.

    Args:
        width: Of the tokens, a multiple of 16.
        layers: Number of blocks.
    """

    def __init__(self, width: int = 64, layers: int = 4):
        super().__init__()
        self.actions_in = torch.nn.Linear(2, width)
        self.places = torch.nn.Parameter(0.02 * torch.randn(HORIZON, width))
        self.observation_in = torch.nn.Linear(4, width)
        self.time = torch.nn.Sequential(Timesteps(width, True, 0), TimestepEmbedding(width, width))
        self.blocks = torch.nn.ModuleList(
            BasicTransformerBlock(width, width // 16, 16, cross_attention_dim=width) for _ in range(layers)
        )
        self.norm, self.actions_out = torch.nn.LayerNorm(width), torch.nn.Linear(width, 2)

    def forward(
        self, sample: torch.Tensor, timestep: torch.Tensor, encoder_hidden_states: torch.Tensor
    ) -> torch.Tensor:
        """Predicted noise `[B, HORIZON, 2]` of noisy paths, for observations `[B, 1, 4]` (start and goal)."""
        time = self.time(timestep.expand(len(sample)))[:, None]
        memory = torch.cat([time, self.observation_in(encoder_hidden_states)], 1)
        tokens = self.actions_in(sample) + self.places
        for block in self.blocks:
            tokens = block(tokens, encoder_hidden_states=memory)
        return self.actions_out(self.norm(tokens))


def rooms(count: int, generator: torch.Generator) -> torch.Tensor:
    """Start on the left wall and goal on the right one, `[count, 1, 4]`."""
    heights = torch.rand(count, 2, generator=generator) - 0.5
    sides = torch.tensor([-1.0, 1.0]).expand(count, 2)
    return torch.stack([sides, heights], -1).reshape(count, 1, 4)


def demonstrations(observed: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Arcs from start to goal above or below the obstacle, by the toss of a coin: `[count, HORIZON, 2]`."""
    start, goal = observed[:, :, :2], observed[:, :, 2:]
    side = torch.randint(0, 2, (len(observed), 1, 1), generator=generator) * 2 - 1
    over = torch.cat([torch.zeros_like(side), side * 1.2], -1)
    t = torch.linspace(0, 1, HORIZON).view(1, -1, 1)
    return (1 - t) ** 2 * start + 2 * t * (1 - t) * over + t**2 * goal


def crossed(paths: torch.Tensor, observed: torch.Tensor) -> torch.Tensor:
    """Which paths go from start to goal without a point in the obstacle: `[count]`, bool."""
    ends = torch.stack([paths[:, 0] - observed[:, 0, :2], paths[:, -1] - observed[:, 0, 2:]], 1)
    return (ends.norm(dim=-1) < 0.1).all(1) & (paths.norm(dim=-1) > OBSTACLE).all(1)


def new_target(policy: TinyDiffusionPolicy) -> Any:
    """The policy with its scheduler, as `apply` takes a pipeline."""
    return SimpleNamespace(transformer=policy, scheduler=DDPMScheduler(STEPS, beta_schedule="squaredcos_cap_v2"))


def train(steps: int = 1500, batch: int = 128, seed: int = 0) -> Any:
    """A trained policy with its scheduler."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    target = new_target(TinyDiffusionPolicy())
    optimizer = torch.optim.AdamW(target.transformer.parameters(), lr=1e-3, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
    for step in range(steps):
        observed = rooms(batch, generator)
        paths = demonstrations(observed, generator)
        noise, t = (
            torch.randn(paths.shape, generator=generator),
            torch.randint(0, STEPS, (batch,), generator=generator),
        )
        predicted = target.transformer(target.scheduler.add_noise(paths, noise, t), t, observed)
        loss = torch.nn.functional.mse_loss(predicted, noise)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 250 == 249:
            print(f"step {step + 1}: loss {loss.item():.4f}")
    target.transformer.eval().requires_grad_(False)
    return target


@torch.no_grad()
def plan(target: Any, seed: int, count: int = 64, steps: int = STEPS) -> tuple[torch.Tensor, torch.Tensor]:
    """Denoised paths for `count` new rooms, and the rooms."""
    generator = torch.Generator().manual_seed(seed)
    observed = rooms(count, generator)
    paths = torch.randn(count, HORIZON, 2, generator=generator)
    target.scheduler.set_timesteps(steps)
    for t in target.scheduler.timesteps:
        noise = target.transformer(paths, t, encoder_hidden_states=observed)
        paths = target.scheduler.step(noise, t, paths, generator=generator).prev_sample
    return paths, observed


def calibrated(target: Any) -> diffusers_ext.BACStatistics:
    """Statistics of eight rooms that no evaluation sees."""
    return measure_bac(target, lambda seed: plan(target, seed, 1), 8, calibration_seed=10_000, progress=False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=1500, help="training steps")
    parser.add_argument("--updates", type=int, default=25, help=f"updates of each sub-block in {STEPS} steps")
    args = parser.parse_args()
    target = train(args.steps)
    statistics = calibrated(target)
    full = count_macs(plan, target, 0, 1)
    settings = {
        "plain": None,
        "equal distances": BACConfig(num_updates=args.updates),
        "calibrated, one list for all": statistics.config(args.updates),
        "calibrated, a list for each": statistics.config(args.updates, bua_blocks=0, shared=False),
        "calibrated, a list for each, with unions": statistics.config(args.updates, shared=False),
    }
    for name, config in settings.items():
        with diffusers_ext.apply(target, *([config] if config else [])):
            share = count_macs(plan, target, 0, 1) / full
            rate = crossed(*plan(target, 1, 512)).float().mean()
        print(f"{name}: {rate:.1%} of 512 rooms crossed, {share:.3f} of the operations")


if __name__ == "__main__":
    main()
