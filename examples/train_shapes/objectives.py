"""What each network is trained on: the losses of the judge, the text encoders, the autoencoder and the denoisers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import networks
import torch
import torch.nn.functional as F
from torch import nn

from diffusers_ext.prediction import expand, from_x0, to_x0
from diffusers_ext.training.denoising import FluxTask, UNetTask, alphas_and_sigmas
from diffusers_ext.training.fitting import Draws
from diffusers_ext.zoo import Judge, world


def to_float(images: torch.Tensor) -> torch.Tensor:
    """8-bit pictures -> floats in [-1, 1]."""
    return images.float() / 127.5 - 1


def attribute_loss(logits: list[torch.Tensor], specs: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy over the attributes of a scene."""
    return sum(F.cross_entropy(l, specs[:, i]) for i, l in enumerate(logits)) / len(logits)


def judge_loss(judge: Judge, images: torch.Tensor, specs: torch.Tensor) -> Callable:
    """Read the attributes from pictures with a little noise, so that a decoder's errors do not matter."""

    def loss(rows: torch.Tensor, draws: Draws) -> torch.Tensor:
        pictures = to_float(images[rows])
        strength = 0.06 * draws.uniform(1, 1, 1)
        noisy = pictures.to(strength.device) + strength * draws.normal(*pictures.shape[1:])
        return attribute_loss(judge(noisy), specs[rows].to(strength.device))

    return loss


class CaptionReader(nn.Module):
    """A text encoder with classifiers of the scene on top: it learns to read before any picture is drawn."""

    def __init__(self, encoder: nn.Module):
        super().__init__()
        self.encoder = encoder
        sizes = world.ATTRIBUTES.values()
        self.heads = nn.ModuleList(nn.Linear(networks.WIDTH, size + 1) for size in sizes)
        self.token_heads = nn.ModuleList(nn.Linear(networks.WIDTH, size + 1) for size in sizes)

    def forward(self, ids: torch.Tensor, lengths: torch.Tensor) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """Logits of the whole sentence (state of its last token) and of every position."""
        states = self.encoder(input_ids=ids).last_hidden_state
        last = states[torch.arange(len(ids)), lengths - 1]
        return [head(last) for head in self.heads], [head(states) for head in self.token_heads]


def text_loss(reader: CaptionReader, ids: torch.Tensor, lengths: torch.Tensor, specs: torch.Tensor) -> Callable:
    """Tell the scene from the last token, and (weight 0.3) from one random position."""

    def loss(rows: torch.Tensor, draws: Draws) -> torch.Tensor:
        device = reader.heads[0].weight.device
        sentence, tokens = reader(ids[rows].to(device), lengths[rows].to(device))
        position = 2 + int(draws.shared() * (networks.PROMPT_TOKENS - 2))
        target = specs[rows].to(device)
        return attribute_loss(sentence, target) + 0.3 * attribute_loss([t[:, position] for t in tokens], target)

    return loss


def reconstruction_loss(decoded: torch.Tensor, images: torch.Tensor) -> torch.Tensor:
    """L1 + 2 MSE + 0.5 L1 of the differences between neighbours, which keeps edges sharp."""
    error = decoded - images
    edges = error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()
    return error.abs().mean() + 2 * error.square().mean() + 0.5 * edges


def vae_loss(vae: nn.Module, images: torch.Tensor, specs: torch.Tensor) -> Callable:
    """Reconstruct; 85 % of the steps see 32 x 32 crops near an object, for most of a picture is plain ground."""
    middle = world.reach(specs)[:, 0].unflatten(1, (2, 2)).mean(1)

    def crops(rows: torch.Tensor, draws: Draws) -> torch.Tensor:
        at = middle[rows] - 16 + 28 * (draws.uniform(2).cpu() - 0.5)
        at = at.round().long().clamp(0, world.SIZE - 32)
        return torch.stack([images[i, :, y : y + 32, x : x + 32] for i, (x, y) in zip(rows.tolist(), at.tolist())])

    def loss(rows: torch.Tensor, draws: Draws) -> torch.Tensor:
        near = draws.shared() < 0.85
        x = to_float(crops(rows, draws) if near else images[rows[: max(len(rows) // 4, 1)]])
        x = x.to(vae.device).contiguous(memory_format=torch.channels_last)
        z = vae.encode(x).latent_dist.mean
        noise = draws.normal(*z.shape[1:])[: len(z)]
        decoded = vae.decode(z + networks.POSTERIOR_STD * noise).sample
        return reconstruction_loss(decoded, x) + 1e-3 * z.square().mean()

    return loss


@dataclass(frozen=True)
class Cache:
    """What the denoisers are trained on, computed once: unit-variance latents and the text states of their captions.

    Row 0 of the text states is the empty prompt; `coverage` holds the object masks at half size, 8 bit.
    """

    latents: torch.Tensor
    specs: torch.Tensor
    coverage: torch.Tensor
    clip: torch.Tensor
    pooled: torch.Tensor
    t5: torch.Tensor


def object_weight(specs: torch.Tensor) -> torch.Tensor:
    """Loss weight `[n, 1, 16, 16]` of every latent, mean 1: five times as much where objects can be as elsewhere."""
    at = (torch.arange(16) + 0.5) * 4
    left, top, right, bottom = world.reach(specs)[..., None].unbind(2)
    inside_x = (at >= left - 2) & (at <= right + 2)
    inside_y = (at >= top - 2) & (at <= bottom + 2)
    weight = 1 + 4.0 * (inside_y[..., :, None] & inside_x[..., None, :]).any(1)
    return (weight / weight.mean())[:, None]


class Teacher:
    """A trained v-prediction UNet in the place of the data: it knows the mean of all clean latents behind a noisy one.

    A denoiser learns that mean anyway, from single samples; taking it from the teacher removes the sampling noise from
    the gradients, which is most of the loss of these models.
    """

    def __init__(self, unet: nn.Module):
        self.unet = unet.eval().requires_grad_(False)
        alpha, sigma = alphas_and_sigmas(networks.diffusion_scheduler("v_prediction"))
        self._noise_to_signal = sigma / alpha

    @torch.no_grad()
    def clean(self, x: torch.Tensor, alpha: torch.Tensor, sigma: torch.Tensor, text: dict) -> torch.Tensor:
        """Mean clean latents given `x = alpha * x0 + sigma * noise`, in any scaling of alpha and sigma."""
        ratio, known = (sigma / alpha).flatten().log(), self._noise_to_signal.to(x.device).log()
        above = torch.searchsorted(known, ratio.contiguous()).clamp(1, len(known) - 1)
        t = above - 1 + ((ratio - known[above - 1]) / (known[above] - known[above - 1])).clamp(0, 1)
        norm = (alpha**2 + sigma**2).sqrt()
        scaled = x / norm
        return to_x0(UNetTask.predict(self.unet, scaled, t, text), scaled, alpha / norm, sigma / norm, "v_prediction")


MASK_HEAD = "mask_head"


def add_mask_head(dit: nn.Module) -> None:
    """Give a Flux transformer a head that reads the object masks from the tokens of a middle block, for training only.

    A transformer has to discover where objects are and which outline they have; asking for it directly is faster.
    """
    dit.mask_head = nn.Linear(networks.WIDTH, 2 * 16)

    def read(_, __, output: tuple[torch.Tensor, torch.Tensor]) -> None:
        patches = dit.mask_head(output[1]).view(-1, 8, 8, 2, 4, 4)
        dit.mask_logits = patches.permute(0, 3, 1, 4, 2, 5).reshape(-1, 2, 32, 32)

    dit.single_transformer_blocks[3].register_forward_hook(read)


def denoising_loss(model: nn.Module, task: UNetTask | FluxTask, cache: Cache, teacher: Teacher | None) -> Callable:
    """Weighted squared error of the model's output; 10 % of the captions are emptied, for guidance.

    A model with a mask head also pays half the cross-entropy of the masks.
    """
    everywhere = object_weight(cache.specs).half()

    def masks(rows: torch.Tensor) -> torch.Tensor:
        truth = cache.coverage[rows].to(model.mask_logits) / 255
        return F.binary_cross_entropy_with_logits(model.mask_logits, truth)

    def loss(rows: torch.Tensor, draws: Draws) -> torch.Tensor:
        z, noise, level = cache.latents[rows], draws.normal(*cache.latents.shape[1:]), task.levels(draws)
        z, weight = z.to(noise), everywhere[rows].to(noise)
        said = torch.where(draws.uniform().cpu() < 0.1, 0, rows + 1)
        text = {name: getattr(cache, name)[said].to(noise) for name in ("clip", "pooled", "t5")}
        alpha, sigma = (expand(v, z) for v in task.noise_levels(level))
        x = alpha * z + sigma * noise
        clean = z if teacher is None else teacher.clean(x, alpha, sigma, text)
        x = x + sigma * task.noise_offset * draws.normal(z.shape[1], 1, 1)
        error = task.predict(model, x, level, text) - from_x0(clean, x, alpha, sigma, task.prediction)
        level_weight = task.weight(alpha, sigma)
        value = (level_weight * weight * error.square()).mean()
        value = value + task.mean_weight * (level_weight * error.mean((2, 3), keepdim=True).square()).mean()
        return value + 0.5 * masks(rows) if hasattr(model, MASK_HEAD) else value

    return loss
