"""Training recipes: the same small model trained for the same number of steps with each choice, then compared."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import FluxTransformer2DModel

from benchmarks._common import line_chart
from diffusers_ext import zoo
from diffusers_ext.eval.metrics import frechet_distance
from diffusers_ext.registry import MethodRecord
from diffusers_ext.schedulers.rectified_flow_sd3 import FlowMatchTrainingScheduler, flow_matching_loss


TIMESTEP_SAMPLERS = {
    "uniform": {"timestep_sampler": "uniform"},
    "logit-normal (0, 1)": {"timestep_sampler": "logit_normal"},
    "mode 1.29": {"timestep_sampler": "mode", "sampler_scale": 1.29},
    "CosMap": {"timestep_sampler": "cosmap"},
}
_LEVELS = torch.linspace(0.05, 0.95, 19)


@torch.no_grad()
def shapes_latents(pipe, n: int, seed: int) -> torch.Tensor:
    """Packed latents `[n, 64, 16]` of scenes, as the shapes DiT is trained on."""
    config, images = pipe.vae.config, zoo.scenes(n, seed).images
    raw = torch.cat([pipe.vae.encode(part).latent_dist.mean for part in images.split(64)])
    latents = (raw - (config.shift_factor or 0)) * config.scaling_factor
    return pipe._pack_latents(latents, *latents.shape)


class SmallFlow:
    """An unconditional Flux-layout denoiser of packed 8 x 8 tokens."""

    def __init__(self, seed: int):
        torch.manual_seed(seed)
        self.net = FluxTransformer2DModel(
            in_channels=16,
            num_layers=1,
            num_single_layers=2,
            attention_head_dim=32,
            num_attention_heads=3,
            joint_attention_dim=8,
            pooled_projection_dim=8,
            axes_dims_rope=(8, 12, 12),
        )
        rows, columns = torch.meshgrid(torch.arange(8.0), torch.arange(8.0), indexing="ij")
        self.ids = torch.stack([torch.zeros(64), rows.flatten(), columns.flatten()], 1)

    def __call__(self, x: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        return self.net(
            hidden_states=x,
            timestep=timesteps / 1000,
            encoder_hidden_states=x.new_zeros(len(x), 1, 8),
            pooled_projections=x.new_zeros(len(x), 8),
            txt_ids=torch.zeros(1, 3),
            img_ids=self.ids,
            return_dict=False,
        )[0]


def train(options: dict, data: torch.Tensor, steps: int, seed: int = 0, batch_size: int = 16) -> SmallFlow:
    """A model trained from scratch; data order and noise depend on `seed` only."""
    scheduler, model = FlowMatchTrainingScheduler(**options), SmallFlow(seed)
    optimizer = torch.optim.AdamW(model.net.parameters(), lr=2e-3, weight_decay=0.0)
    decay = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: min(1.0, i / 50) * (1 - i / (steps + 1)))
    draws, levels = torch.Generator().manual_seed(seed), torch.Generator().manual_seed(seed + 1)
    for _ in range(steps):
        x0 = data[torch.randint(len(data), (batch_size,), generator=draws)]
        noise = torch.randn(x0.shape, generator=draws)
        sigmas, timesteps = scheduler.sample_noise_levels(batch_size, levels)
        output = model(scheduler.noised(x0, noise, sigmas), timesteps)
        loss = scheduler.loss(output, x0, noise, sigmas)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.net.parameters(), 1.0)
        optimizer.step()
        decay.step()
    return model


@torch.no_grad()
def validation_losses(model: SmallFlow, data: torch.Tensor) -> list[float]:
    """Unweighted loss at the noise levels `_LEVELS`, the same data and noise for each."""
    noise = torch.randn(data.shape, generator=torch.Generator().manual_seed(5))
    losses = []
    for t in _LEVELS:
        output = model((1 - t) * data + t * noise, torch.full((len(data),), 1000 * t.item()))
        losses.append(flow_matching_loss(output, data, noise).item())
    return losses


@torch.no_grad()
def sampled_distance(model: SmallFlow, data: torch.Tensor, n: int = 256, steps: int = 20) -> float:
    """Frechet distance of sampled latents to `data`, on latents averaged over 2 x 2 tokens."""
    scheduler = FlowMatchTrainingScheduler()
    scheduler.set_timesteps(steps)
    x = torch.randn(n, *data.shape[1:], generator=torch.Generator().manual_seed(6))
    for t in scheduler.timesteps:
        x = scheduler.step(model(x, t.expand(n)), t, x).prev_sample
    return frechet_distance(_features(x), _features(data))


def _features(latents: torch.Tensor) -> torch.Tensor:
    grid = latents.unflatten(1, (8, 8)).permute(0, 3, 1, 2)
    return F.adaptive_avg_pool2d(grid, 2).flatten(1).double()


def middle(losses: list[float]) -> float:
    """Mean loss at the levels 0.25 to 0.75."""
    chosen = [loss for t, loss in zip(_LEVELS.tolist(), losses) if 0.245 < t < 0.755]
    return sum(chosen) / len(chosen)


def bench(record: MethodRecord, out_dir: Path, steps: int = 400) -> dict:
    """Loss and samples of one small model per way of drawing noise levels."""
    pipe = zoo.load("shapes-dit")
    data, held = shapes_latents(pipe, 1024, 1), shapes_latents(pipe, 128, 999)
    rows, curves = [], {}
    for name, options in TIMESTEP_SAMPLERS.items():
        model = train(options, data, steps)
        losses = validation_losses(model, held)
        curves[name] = list(zip(_LEVELS.tolist(), losses))
        whole = sum(losses) / len(losses)
        rows.append([name, f"{middle(losses):.4f}", f"{whole:.4f}", f"{sampled_distance(model, data):.3f}"])
    best = {name: [(t, v / u) for (t, v), (_, u) in zip(c, curves["uniform"])] for name, c in curves.items()}
    picture = line_chart(
        out_dir / f"{record.slug}.png", best, "noise level t", "held-out loss / uniform's", "Equal training budget"
    )
    return {
        "columns": ["Noise levels in training", "Loss, t 0.25-0.75", "Loss, all t", "Frechet distance of samples"],
        "rows": rows,
        "notes": f"One small Flux-layout model per row, {steps} steps of 16 latents of the shapes world from the same "
        "initial weights, data and noise. Losses on held-out scenes, unweighted; samples with 20 Euler steps.",
        "picture": picture,
    }
