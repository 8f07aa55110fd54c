"""EasyControl on ComfyUI's own Flux: its image stream, and the wrapper that lets its attention see conditions."""

from __future__ import annotations

from typing import Any

import comfy.model_management
import comfy.utils
import torch
from comfy.ldm.flux.layers import timestep_embedding
from comfy.ldm.flux.math import apply_rope, apply_rope1
from comfy.ldm.flux.model import Flux


class _Block:
    """What both kinds of blocks share. Heads are `[B, S, h, d]` outside, as the adapter wants them."""

    def __init__(self, block: torch.nn.Module):
        self.block = block

    def heads(self, q, k, v):
        q, k, v = (part.unflatten(-1, (self.block.num_heads, -1)) for part in (q, k, v))
        return *self.norm(q, k, v), v


class DoubleBlock(_Block):
    """The image side of ComfyUI's `DoubleStreamBlock`."""

    def norm(self, q, k, v):
        return self.block.img_attn.norm(q, k, v)

    def enter(self, tokens, vec):
        attention, mlp = self.block.img_mod(vec)
        return self.block.img_norm1(tokens) * (1 + attention.scale) + attention.shift, (attention, mlp)

    def project(self, normed, kept):
        return self.block.img_attn.qkv(normed).chunk(3, -1)

    def leave(self, tokens, attended, extra, kept):
        attention, mlp = kept
        tokens = tokens + attention.gate * (self.block.img_attn.proj(attended) + extra)
        return tokens + mlp.gate * self.block.img_mlp(self.block.img_norm2(tokens) * (1 + mlp.scale) + mlp.shift)


class SingleBlock(_Block):
    """ComfyUI's `SingleStreamBlock`, whose first layer makes q, k, v and the input of the MLP at once."""

    def norm(self, q, k, v):
        return self.block.norm(q, k, v)

    def enter(self, tokens, vec):
        modulation, _ = self.block.modulation(vec)
        normed = self.block.pre_norm(tokens) * (1 + modulation.scale) + modulation.shift
        return normed, (self.block.linear1(normed), modulation.gate)

    def project(self, normed, kept):
        return kept[0][..., : 3 * self.block.hidden_size].chunk(3, -1)

    def leave(self, tokens, attended, extra, kept):
        fused, gate = kept
        mlp = self.block.mlp_act(fused[..., 3 * self.block.hidden_size :])
        return tokens + gate * self.block.linear2(torch.cat([attended, mlp], 2))


def native_stream(model: Flux, y: torch.Tensor | None, guidance: torch.Tensor | None, x: torch.Tensor) -> Any:
    """The condition stream of a ComfyUI Flux, for latents and conditioning of a batch."""
    from diffusers_ext.adapters._easycontrol_stream import Stream

    def embedded(values: torch.Tensor) -> torch.Tensor:
        return timestep_embedding(values, 256).to(x.dtype)

    vec = model.time_in(embedded(torch.zeros(len(x), dtype=x.dtype, device=x.device)))
    if model.params.guidance_embed and guidance is not None:
        vec = vec + model.guidance_in(embedded(guidance))
    if model.vector_in is not None:
        pooled = x.new_zeros(len(x), model.params.vec_in_dim) if y is None else y[:, : model.params.vec_in_dim]
        vec = vec + model.vector_in(pooled)

    def rotation(ids: torch.Tensor):
        table = model.pe_embedder(ids[None])
        return lambda heads: apply_rope1(heads.transpose(1, 2), table).transpose(1, 2)

    blocks = [*map(DoubleBlock, model.double_blocks), *map(SingleBlock, model.single_blocks)]
    return Stream(blocks, model.img_in, vec, rotation)


def require_flux(model: Any, adapter: Any) -> None:
    """Raise `ValueError` unless a MODEL is a Flux of the adapter's sizes."""
    network = model.model.diffusion_model
    if not isinstance(network, Flux) or network.params.global_modulation:
        raise ValueError(
            f"EasyControl works on Flux.1 models, not on {type(network).__name__}: load one with Load Diffusion Model"
        )
    found = (len(network.double_blocks), len(network.single_blocks), network.hidden_size)
    names = ("num_layers", "num_single_layers", "dim")
    for name, size in zip(names, found):
        if adapter.config[name] != size:
            raise ValueError(
                f"this EasyControl file was made for {name}={adapter.config[name]}, the model has {size}: "
                "choose the file of this model"
            )


def condition_latents(
    model: Any, vae: Any, image: torch.Tensor, kind: str, width: int, height: int = 0
) -> torch.Tensor:
    """Latents of an IMAGE `[n, h, w, c]` of this size (height 0: a square), as the model sees latents."""
    from diffusers_ext.adapters.easycontrol import fit_spatial, fit_subject

    covers = 2 * vae.spacial_compression_encode()
    for name, side in (("cond_size", width), ("cond_height", height)):
        if side % covers:
            raise ValueError(f"{name} is {side}: give a multiple of {covers}, the pixels that a token covers")
    if height and kind == "subject":
        raise ValueError(f"cond_height is {height}: subjects are padded to a square, leave it at 0")
    pictures = image[..., :3].movedim(-1, 1) * 2 - 1
    fitted = fit_subject(pictures, width) if kind == "subject" else fit_spatial(pictures, (height or width, width))
    latents = vae.encode((fitted.movedim(1, -1) + 1) / 2)
    return model.get_model_object("latent_format").process_in(latents)


class NativeControl:
    """One condition on a MODEL: a wrapper of the run, which forgets, and one of the network, which shows it.

    Args:
        adapter: The `EasyControlAdapter`, a copy of its own.
        latents: Of the condition.
        kind: "spatial" or "subject".
        sigmas: First and last noise level with control.
    """

    def __init__(self, adapter: Any, latents: torch.Tensor, kind: str, sigmas: tuple[float, float]):
        self.adapter, self.latents, self.kind, self.sigmas = adapter, latents, kind, sigmas
        self.kept: dict[tuple, list] = {}

    def sample(self, executor, *args, **kwargs):
        """OUTER_SAMPLE: every run computes its own keys and values."""
        self.kept.clear()
        try:
            return executor(*args, **kwargs)
        finally:
            self.kept.clear()
            self.adapter.to(comfy.model_management.unet_offload_device())

    def forward(
        self,
        executor,
        x,
        timestep,
        context,
        y=None,
        guidance=None,
        ref_latents=None,
        control=None,
        transformer_options={},  # noqa: B006 (ComfyUI's signature)
        **kwargs,
    ):
        """DIFFUSION_MODEL: adds an attention patch for this call."""
        options = transformer_options
        if self.is_active(options):
            pairs = self.keys_values(executor.class_obj, x, y, guidance, options)
            patch = AttentionPatch(pairs, len(executor.class_obj.double_blocks))
            patches = options.get("patches", {})
            patches = {**patches, "attn1_patch": [*patches.get("attn1_patch", []), patch]}
            options = {**options, "patches": patches}
        return executor(x, timestep, context, y, guidance, ref_latents, control, options, **kwargs)

    def is_active(self, options: dict) -> bool:
        """Does this step lie in the range of noise levels?"""
        sigma = options.get("sigmas")
        return sigma is None or self.sigmas[1] <= float(sigma[0]) <= self.sigmas[0]

    def keys_values(self, network: Flux, x, y, guidance, options: dict) -> list:
        """Of the cache, or computed."""
        key = (tuple(options.get("uuids", ())), tuple(x.shape), x.dtype, x.device)
        if not key[0] or key not in self.kept:
            chunks = len(options.get("cond_or_uncond", (0,)))
            latents = comfy.utils.repeat_to_batch_size(self.latents, len(x) // chunks).repeat(chunks, 1, 1, 1).to(x)
            grid = tuple(-(-side // network.patch_size) for side in x.shape[-2:])
            self.adapter.to(x.device, x.dtype)
            stream = native_stream(network, y, guidance, x)
            pairs = self.adapter.encode(stream, latents, self.kind, grid)
            self.kept[key] = [tuple(part.transpose(1, 2) for part in pair) for pair in pairs]
        return self.kept[key]


class AttentionPatch:
    """Appends a condition's keys and values, which are rotated already, to those of text and image."""

    def __init__(self, pairs: list, double: int):
        self.pairs, self.double = pairs, double

    def __call__(self, q, k, v, pe=None, attn_mask=None, extra_options=None):
        if pe is not None:
            q, k = apply_rope(q, k, pe)
        single = extra_options["block_type"] == "single"
        key, value = self.pairs[extra_options["block_index"] + self.double * single]
        k, v = torch.cat([k, key], 2), torch.cat([v, value], 2)
        if attn_mask is not None:
            more = attn_mask.new_ones if attn_mask.dtype == torch.bool else attn_mask.new_zeros
            attn_mask = torch.cat([attn_mask, more((*attn_mask.shape[:-1], key.shape[2]))], -1)
        return {"q": q, "k": k, "v": v, "pe": None, "attn_mask": attn_mask}
