"""The network that reads the noise level of a noisy latent, and its training, which takes a minute on a processor."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from tqdm.auto import tqdm

from ._checkpoint import Checkpoint
from ._pictures import encode
from .dmcmc import noise_levels


__all__ = ["NoiseLevelClassifier", "pipeline_latents", "train_noise_classifier"]

_FLOOR = 1e-12  # energy of a channel that is all zero


class NoiseLevelClassifier(ModelMixin, ConfigMixin):
    """Which of K noise levels a sample x0 + sigma n has: four convolutions and the energies of their channels.

    The released network has one output per level. Here two outputs give the logits of all, a parabola in the level's
    index u (noise levels are even in log sigma, and p(sigma | x) is nearly Gaussian there), which trains in seconds.
    Convolutions have no bias, so that the energies follow the scale of the noise, and they are averaged over the
    picture: any size will do. Paper: https://arxiv.org/abs/2209.14593.

    Args:
        in_channels: Channels of the latents.
        num_levels: K.
        sigma_min, sigma_max: Range of the levels, see `noise_levels`.
        width: Channels of the first convolution.
    """

    @register_to_config
    def __init__(
        self,
        in_channels: int = 4,
        num_levels: int = 1000,
        sigma_min: float = 0.01,
        sigma_max: float = 50.0,
        width: int = 16,
    ):
        super().__init__()
        widths = [in_channels, width, width, 2 * width, 2 * width]
        self.convs = torch.nn.ModuleList(
            torch.nn.Conv2d(a, b, 3, padding=1, bias=False) for a, b in zip(widths, widths[1:])
        )
        self.head = torch.nn.Sequential(torch.nn.Linear(sum(widths), 64), torch.nn.SiLU(), torch.nn.Linear(64, 2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Logits `[batch, K]` of latents `[batch, C, H, W]`, or `[batch, H * W, C]` of square pictures."""
        x = self._as_picture(x).to(self.convs[0].weight.dtype)
        energies = [_energy(x)]
        for i, conv in enumerate(self.convs):
            x = conv(x)
            energies.append(_energy(x))
            x = F.relu(x) if i == 0 or min(x.shape[-2:]) < 2 else F.avg_pool2d(F.relu(x), 2)
        mean, log_width = self.head(torch.cat(energies, 1)).unbind(1)
        levels = torch.linspace(1.0, 1e-3, self.config.num_levels, dtype=x.dtype, device=x.device)
        precision = torch.exp(-2 * log_width.clamp(-6, 2))  # of u; levels are 1 / K apart
        return -0.5 * precision[:, None] * (levels - mean[:, None]) ** 2

    def _as_picture(self, x: torch.Tensor) -> torch.Tensor:
        if x.ndim == 3:
            side = math.isqrt(x.shape[1])
            x = x.mT.reshape(len(x), x.shape[2], side, -1) if side * side == x.shape[1] else x
        if x.ndim != 4 or x.shape[1] != self.config.in_channels:
            raise ValueError(
                f"latents have shape {tuple(x.shape)}; this noise classifier reads {self.config.in_channels} "
                "channels: [batch, channels, height, width], or square pictures [batch, tokens, channels]"
            )
        return x


def _energy(x: torch.Tensor) -> torch.Tensor:
    """Log of the mean square of each channel, `[batch, C]`, scaled to the order of 1."""
    return torch.log(x.square().mean((2, 3)) + _FLOOR) / 8


@torch.no_grad()
def pipeline_latents(pipe, images, batch_size: int = 32) -> torch.Tensor:
    """Latents of pictures (PIL list, or tensor `[n, 3, h, w]` in [-1, 1]) as the pipeline's denoiser sees them."""
    parts = [images[i : i + batch_size] for i in range(0, len(images), batch_size)]
    return torch.cat([encode(pipe, part)[0] for part in parts]).float()


def train_noise_classifier(
    latents: torch.Tensor,
    num_levels: int = 1000,
    sigma_min: float = 0.01,
    sigma_max: float = 50.0,
    steps: int = 1000,
    batch_size: int = 64,
    learning_rate: float = 3e-3,
    seed: int = 0,
    checkpoint: str | Path | None = None,
    progress: bool = True,
    on_step: Callable[[int], None] | None = None,
) -> NoiseLevelClassifier:
    """A noise classifier for latents of one kind, by cross-entropy on uniformly drawn levels.

    Args:
        latents: Clean ones `[n, C, H, W]` or `[n, tokens, C]`; a few dozen will do.
        num_levels, sigma_min, sigma_max: The levels.
        steps, batch_size, learning_rate: Of Adam, whose rate falls to 0 along a cosine.
        seed: Same seed, same classifier, interrupted or not.
        checkpoint: A safetensors file, written every 100 steps; an interrupted training continues from it.
        progress: Show a progress bar.
        on_step: Called with the number of each finished step, e.g. to look for an interruption.

    Raises:
        ValueError: The latents or the checkpoint do not fit.
    """
    if latents.ndim not in (3, 4) or not torch.isfinite(latents).all():
        raise ValueError(f"latents must be finite and [n, C, H, W] or [n, tokens, C], got {tuple(latents.shape)}")
    settings = {"steps": steps, "seed": seed, "batch_size": batch_size, "learning_rate": learning_rate}
    # ComfyUI runs nodes in inference mode, whose tensors cannot be trained on
    with torch.inference_mode(False), torch.enable_grad():
        levels = noise_levels(sigma_min, sigma_max, num_levels)
        channels = latents.shape[1] if latents.ndim == 4 else latents.shape[2]
        with torch.random.fork_rng([]):
            torch.manual_seed(seed)
            net = NoiseLevelClassifier(channels, num_levels, sigma_min, sigma_max).to(latents.device)
        return _fit(net, latents.clone(), levels.to(latents), settings, checkpoint, progress, on_step)


def _fit(net, latents, levels, settings, checkpoint, progress: bool, on_step) -> NoiseLevelClassifier:
    steps, rate = settings["steps"], settings["learning_rate"]
    optimizer = torch.optim.Adam(net.parameters(), rate)
    about = {**settings, "shape": tuple(latents.shape), **net.config}
    about = {name: value for name, value in about.items() if name[0] != "_"}
    unfinished = Checkpoint(checkpoint, "noise classifier", about)
    first = _resume(net, optimizer, unfinished.read())
    for step in tqdm(range(first, steps), initial=first, total=steps, desc="noise classifier", disable=not progress):
        loss = _training_loss(net, latents, levels, settings["batch_size"], settings["seed"] * 1_000_003 + step)
        for group in optimizer.param_groups:
            group["lr"] = rate * (1 + math.cos(math.pi * step / steps)) / 2
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 100 == 99 or step == steps - 1:
            unfinished.write({"step": torch.tensor(step + 1), **_tensors(net, optimizer)})
        if on_step is not None:
            on_step(step + 1)
    return net.eval().requires_grad_(False)


def _training_loss(net, latents: torch.Tensor, levels: torch.Tensor, batch_size: int, seed: int) -> torch.Tensor:
    """Cross-entropy of one batch; everything random follows from `seed`."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randint(len(latents), (batch_size,), generator=generator).to(latents.device)
    target = torch.randint(len(levels), (batch_size,), generator=generator).to(latents.device)
    z = torch.randn(batch_size, *latents.shape[1:], generator=generator).to(latents)
    sigma = levels[target].reshape(-1, *[1] * (latents.ndim - 1))
    return F.cross_entropy(net(latents[rows] + sigma * z), target)


def _tensors(net, optimizer) -> dict[str, torch.Tensor]:
    kept = {f"net.{name}": value for name, value in net.state_dict().items()}
    for i, state in optimizer.state_dict()["state"].items():
        kept |= {f"adam.{i}.{name}": value for name, value in state.items()}
    return kept


def _resume(net, optimizer, tensors: dict[str, torch.Tensor]) -> int:
    """Put a checkpoint back; the number of steps it has."""
    if not tensors:
        return 0
    net.load_state_dict({name[4:]: value for name, value in tensors.items() if name.startswith("net.")})
    state: dict[int, dict[str, torch.Tensor]] = {}
    for name, value in tensors.items():
        if name.startswith("adam."):
            _, i, key = name.split(".")
            state.setdefault(int(i), {})[key] = value
    optimizer.load_state_dict({**optimizer.state_dict(), "state": state})
    return int(tensors["step"])
