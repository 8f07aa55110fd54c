"""The condition stream of EasyControl: what Flux does to image tokens, block by block, without noise and text.

Condition tokens see only each other (the causal mask of the paper), so this stream runs on its own. Any library's Flux
fits in that offers the few steps of `Block`; here are those of diffusers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from diffusers import FluxTransformer2DModel
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.embeddings import apply_rotary_emb
from diffusers.models.transformers.transformer_flux import (
    FluxAttention,
    FluxAttnProcessor,
    FluxIPAdapterAttnProcessor,
)
from torch import nn


KeyValue = tuple[torch.Tensor, torch.Tensor]


class Block(Protocol):
    """One block as the image stream sees it. Tokens are `[B, S, D]`, heads `[B, S, h, d]`."""

    def enter(self, tokens: torch.Tensor, temb: torch.Tensor) -> tuple[torch.Tensor, Any]:
        """Modulated norm before attention, and what the other steps need again."""

    def project(self, normed: torch.Tensor, kept: Any) -> Sequence[torch.Tensor]:
        """Queries, keys and values `[B, S, D]`."""

    def heads(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Sequence[torch.Tensor]:
        """The same per head, queries and keys normalised."""

    def leave(self, tokens: torch.Tensor, attended: torch.Tensor, extra: torch.Tensor | float, kept: Any):
        """Tokens after the block; `extra` is added to the output projection of `attended [B, S, D]`."""


@dataclass(frozen=True)
class Stream:
    """A Flux of any library, ready to take the condition tokens of one prompt.

    Attributes:
        blocks: Double blocks, then single blocks.
        embed: From packed latents to tokens `[B, n_c, D]`.
        temb: Modulation vector of timestep 0, `[B, D]`.
        rotation: From positions `[n_c, 3]` to the rotary embedding of `[B, n_c, h, d]`. They are fractions in float32:
            in bfloat16 they would be rounded.
    """

    blocks: Sequence[Block]
    embed: Callable[[torch.Tensor], torch.Tensor]
    temb: torch.Tensor
    rotation: Callable[[torch.Tensor], Callable[[torch.Tensor], torch.Tensor]]


class CausalLoRA(nn.Module):
    """Low-rank update of one linear map, without its scale: W_up W_down x.

    Args:
        dim: Width of input and output.
        rank: Width in between.
    """

    def __init__(self, dim: int, rank: int):
        super().__init__()
        self.down = nn.Linear(dim, rank, bias=False)
        self.up = nn.Linear(rank, dim, bias=False)
        nn.init.normal_(self.down.weight, std=1 / rank)
        nn.init.zeros_(self.up.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.up(self.down(x))


def condition_keys_values(
    stream: Stream,
    loras: Sequence[Callable[[str, torch.Tensor], torch.Tensor | float]],
    latents: torch.Tensor,
    ids: torch.Tensor,
) -> list[KeyValue]:
    """Keys (normalised, rotated) and values of the condition in every block, each `[B, n_c, h, d]`.

    Args:
        stream: The transformer.
        loras: Per block, from the name of a projection ("q", "k", "v", "proj") and its input to what is added.
        latents: The condition's, packed, `[B, n_c, 4 c]`.
        ids: Positions of the condition's tokens, `[n_c, 3]`.
    """
    tokens, rotate, found = stream.embed(latents), stream.rotation(ids.float().to(latents.device)), []
    for block, lora in zip(stream.blocks, loras):
        normed, kept = block.enter(tokens, stream.temb)
        q, k, v = (part + lora(name, normed) for name, part in zip("qkv", block.project(normed, kept)))
        q, k, v = block.heads(q, k, v)
        k = rotate(k)
        found.append((k, v))
        if len(found) < len(stream.blocks):  # nothing looks at the output of the last block
            attended = dispatch_attention_fn(rotate(q), k, v).flatten(2)
            tokens = block.leave(tokens, attended, lora("proj", attended), kept)
    return found


def _finite(tokens: torch.Tensor) -> torch.Tensor:
    return tokens.clip(-65504, 65504) if tokens.dtype == torch.float16 else tokens


class _FluxBlock:
    """Projections and heads of both kinds of diffusers' blocks."""

    def __init__(self, block: nn.Module):
        self.block, self.attn = block, block.attn

    def project(self, normed, kept):
        return self.attn.to_q(normed), self.attn.to_k(normed), self.attn.to_v(normed)

    def heads(self, q, k, v):
        q, k, v = (part.unflatten(-1, (-1, self.attn.head_dim)) for part in (q, k, v))
        return self.attn.norm_q(q), self.attn.norm_k(k), v


class FluxDouble(_FluxBlock):
    """The image side of a `FluxTransformerBlock`."""

    def enter(self, tokens, temb):
        normed, gate, shift_mlp, scale_mlp, gate_mlp = self.block.norm1(tokens, emb=temb)
        return normed, [part[:, None] for part in (gate, shift_mlp, scale_mlp, gate_mlp)]

    def leave(self, tokens, attended, extra, kept):
        gate, shift_mlp, scale_mlp, gate_mlp = kept
        project, dropout = self.attn.to_out
        tokens = tokens + gate * dropout(project(attended) + extra)
        return _finite(tokens + gate_mlp * self.block.ff(self.block.norm2(tokens) * (1 + scale_mlp) + shift_mlp))


class FluxSingle(_FluxBlock):
    """A `FluxSingleTransformerBlock`."""

    def enter(self, tokens, temb):
        normed, gate = self.block.norm(tokens, emb=temb)
        return normed, (normed, gate[:, None])

    def leave(self, tokens, attended, extra, kept):
        normed, gate = kept
        mlp = self.block.act_mlp(self.block.proj_mlp(normed))
        return _finite(tokens + gate * self.block.proj_out(torch.cat([attended, mlp], 2)))


def flux_stream(
    model: FluxTransformer2DModel, pooled: torch.Tensor, guidance: torch.Tensor | None, dtype: torch.dtype
) -> Stream:
    """The condition stream of a Flux transformer of diffusers, for one prompt and guidance."""
    zero = torch.zeros(len(pooled), dtype=dtype, device=pooled.device)
    more = () if guidance is None else (guidance.to(dtype) * 1000,)

    def rotation(ids: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
        table = model.pos_embed(ids)
        return lambda x: apply_rotary_emb(x, table, sequence_dim=1)

    double = (FluxDouble(block) for block in model.transformer_blocks)
    single = (FluxSingle(block) for block in model.single_transformer_blocks)
    return Stream([*double, *single], model.x_embedder, model.time_text_embed(zero, *more, pooled), rotation)


def flux_attentions(model: FluxTransformer2DModel) -> dict[str, FluxAttention]:
    """The attention layers by name, double blocks first."""
    groups = ("transformer_blocks", "single_transformer_blocks")
    return {f"{group}.{i}.attn": block.attn for group in groups for i, block in enumerate(getattr(model, group))}


@dataclass
class Bank:
    """Keys and values of one condition for the denoiser call that is under way; empty when it is switched off.

    Attributes:
        owner: The adapter that the condition belongs to.
        make: Computes them; called when a layer asks first.
        made: They, one pair per layer.
    """

    owner: Any
    make: Callable[[], list[KeyValue]] | None = None
    made: list[KeyValue] | None = field(default=None, repr=False)

    def at(self, place: int) -> KeyValue | None:
        """The pair of one layer, None when the condition is switched off."""
        if self.made is None and self.make is not None:
            self.made = self.make()
        return None if self.made is None else self.made[place]


class EasyControlFluxAttnProcessor(nn.Module):
    """Flux attention whose queries also see the cached keys and values of conditions.

    Text and image attend to every condition, whose own rows are not computed again. Without an active condition it
    calls the processor it stands in for.

    Args:
        inner: The processor before: diffusers' `FluxAttnProcessor` or its IP-Adapter's.
        place: Index of the layer among those of `flux_attentions`.
    """

    def __init__(self, inner: FluxAttnProcessor | FluxIPAdapterAttnProcessor, place: int):
        super().__init__()
        self.inner, self.place = inner, place
        self.banks: list[Bank] = []

    @property
    def _attention_backend(self):
        return self.inner._attention_backend

    @_attention_backend.setter
    def _attention_backend(self, backend):
        self.inner._attention_backend = backend

    @property
    def _parallel_config(self):
        return self.inner._parallel_config

    @_parallel_config.setter
    def _parallel_config(self, config):
        self.inner._parallel_config = config

    def __call__(
        self,
        attn: FluxAttention,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        image_rotary_emb: tuple[torch.Tensor, torch.Tensor] | None = None,
        ip_hidden_states: list[torch.Tensor] | None = None,
        ip_adapter_masks: torch.Tensor | None = None,
    ):
        seen = [pair for bank in self.banks if (pair := bank.at(self.place)) is not None]
        with_ip = isinstance(self.inner, FluxIPAdapterAttnProcessor)
        if not seen:
            rest = {"ip_hidden_states": ip_hidden_states, "ip_adapter_masks": ip_adapter_masks} if with_ip else {}
            return self.inner(attn, hidden_states, encoder_hidden_states, attention_mask, image_rotary_emb, **rest)
        q, k, v = _heads(attn, (attn.to_q, attn.to_k, attn.to_v), (attn.norm_q, attn.norm_k), hidden_states)
        image_query, text = q, 0
        if encoder_hidden_states is not None:
            added = (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj)
            parts = _heads(attn, added, (attn.norm_added_q, attn.norm_added_k), encoder_hidden_states)
            text = encoder_hidden_states.shape[1]
            q, k, v = (torch.cat(pair, 1) for pair in zip(parts, (q, k, v)))
        if image_rotary_emb is not None:
            q, k = (apply_rotary_emb(part, image_rotary_emb, sequence_dim=1) for part in (q, k))
        k, v = (torch.cat([own, *more], 1) for own, more in zip((k, v), zip(*seen)))
        out = self._attend(q, k, v, _widened(attention_mask, k.shape[1]))
        if encoder_hidden_states is None:
            return out
        project, dropout = attn.to_out
        streams = dropout(project(out[:, text:].contiguous())), attn.to_add_out(out[:, :text].contiguous())
        return (*streams, self._look_at_ip(image_query, ip_hidden_states)) if with_ip else streams

    def _attend(self, q, k, v, mask=None) -> torch.Tensor:
        backend = {"backend": self._attention_backend, "parallel_config": self._parallel_config}
        return dispatch_attention_fn(q, k, v, attn_mask=mask, **backend).flatten(2).to(q.dtype)

    def _look_at_ip(self, query: torch.Tensor, ip_hidden_states: list[torch.Tensor]) -> torch.Tensor:
        """What the IP-Adapter underneath adds to the image tokens."""
        inner, total = self.inner, 0
        for states, scale, to_k, to_v in zip(ip_hidden_states, inner.scale, inner.to_k_ip, inner.to_v_ip):
            k, v = (to(states).unflatten(-1, query.shape[2:]) for to in (to_k, to_v))
            total = total + scale * self._attend(query, k.flatten(1, -3), v.flatten(1, -3))
        return total


def _heads(attn: FluxAttention, maps: tuple, norms: tuple, tokens: torch.Tensor) -> list[torch.Tensor]:
    q, k, v = (to(tokens).unflatten(-1, (-1, attn.head_dim)) for to in maps)
    return [norms[0](q), norms[1](k), v]


def _widened(mask: torch.Tensor | None, keys: int) -> torch.Tensor | None:
    """A mask whose new columns hide nothing."""
    if mask is None:
        return None
    more = mask.new_ones if mask.dtype == torch.bool else mask.new_zeros
    return torch.cat([mask, more((*mask.shape[:-1], keys - mask.shape[-1]))], -1)


def put_on(attentions: dict[str, FluxAttention], bank: Bank) -> list[EasyControlFluxAttnProcessor]:
    """Let every layer see a bank. Layers that see one already keep their processor."""
    processors = []
    for place, attn in enumerate(attentions.values()):
        if not isinstance(attn.processor, EasyControlFluxAttnProcessor):
            attn.set_processor(EasyControlFluxAttnProcessor(attn.processor, place))
        attn.processor.banks.append(bank)
        processors.append(attn.processor)
    return processors


def take_off(attentions: dict[str, FluxAttention], processors: list, bank: Bank) -> None:
    """Undo `put_on`: the last bank to go brings back the processors that were there before."""
    for attn, processor in zip(attentions.values(), processors):
        processor.banks[:] = [other for other in processor.banks if other is not bank]
        if not processor.banks and attn.processor is processor:
            attn.set_processor(processor.inner)
