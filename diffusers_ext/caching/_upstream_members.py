"""The modules under diffusers' own cache hooks: put on, watched and taken off without a trace; see `_upstream`."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import hooks as upstream
from diffusers.hooks.hooks import HookFunctionReference, ModelHook

from ..registry import MethodRecord, list_methods
from ._common import tensors_in, unregister


# Methods under which one call of the denoiser is several of its blocks, or of other shapes.
_RESHAPE = ("any-size-diffusion", "hidiffusion")


@dataclass(frozen=True)
class Kind:
    """One of diffusers' caches: how it is applied, and what it cannot do."""

    slug: str
    title: str
    arxiv: str
    apply: Callable[[torch.nn.Module, Any], None]
    skips_blocks: bool = False
    needs_time: bool = False
    needs_sigma: bool = False

    @functools.cached_property
    def record(self) -> MethodRecord:
        """Stands in the catalogue's place. Caches exclude each other."""
        own = (record.slug for record in list_methods(kind="cache"))
        caches = [slug for slug in (*own, *(kind.slug for kind in KINDS.values())) if slug != self.slug]
        return MethodRecord(
            slug=self.slug,
            family="caching",
            kind="cache",
            title=self.title,
            arxiv=self.arxiv,
            summary=f"{self.title}, diffusers' own",
            targets=("any",),
            predictions=("epsilon", "v_prediction", "sample", "flow_prediction"),
            nodes=(),
            claim=None,  # not a method of this package
            conflicts=(*caches, *_RESHAPE),
        )


KINDS = {
    upstream.FirstBlockCacheConfig: Kind(
        "first-block-cache", "First Block Cache", "2411.19108", upstream.apply_first_block_cache, skips_blocks=True
    ),
    upstream.TaylorSeerCacheConfig: Kind(
        "taylorseer-cache", "TaylorSeer", "2503.06923", upstream.apply_taylorseer_cache
    ),
    upstream.MagCacheConfig: Kind("mag-cache", "MagCache", "2506.09045", upstream.apply_mag_cache, skips_blocks=True),
    upstream.PyramidAttentionBroadcastConfig: Kind(
        "pyramid-attention-broadcast",
        "Pyramid Attention Broadcast",
        "2408.12588",
        upstream.apply_pyramid_attention_broadcast,
        needs_time=True,
    ),
    upstream.FasterCacheConfig: Kind(
        "faster-cache", "FasterCache", "2410.19355", upstream.apply_faster_cache, needs_time=True
    ),
    upstream.SeaCacheConfig: Kind(
        "sea-cache", "SeaCache", "2602.18993", upstream.apply_sea_cache, skips_blocks=True, needs_sigma=True
    ),
}


class Probe:
    """Stands in for the forward below one of diffusers' hooks and notes whether it ran, and on how large a batch."""

    def __init__(self, forward: Callable, fill: tuple[int, Any] | None = None):
        self.forward, self.fill = forward, fill
        self.ran, self.batch = False, 0

    def __call__(self, *args, **kwargs):
        self.ran, self.batch = True, tensors_in([args, kwargs])[0].shape[0]
        output = self.forward(*args, **kwargs)
        if self.fill is None or not isinstance(output, tuple) or output[self.fill[0]] is not None:
            return output
        # The last block of SD3 returns no text, of which upstream would take a difference. Nobody reads it.
        index, metadata = self.fill
        text = metadata._get_parameter_from_args_kwargs("encoder_hidden_states", args, kwargs)
        return tuple(text if i == index else item for i, item in enumerate(output))


@dataclass
class Member:
    """A module under one of diffusers' hooks."""

    path: str
    module: torch.nn.Module
    hook: ModelHook
    name: str
    reference: HookFunctionReference
    original: Callable | None = None
    probe: Probe | None = None

    def watch(self) -> None:
        """Put the probe below the hook."""
        self.original = self.reference.original_forward
        if self.original is None:
            return
        metadata = getattr(self.hook, "_metadata", None)
        index = getattr(metadata, "return_encoder_hidden_states_index", None)
        self.probe = Probe(self.original, None if index is None else (index, metadata))
        self.reference.original_forward = self.probe

    def remove(self) -> None:
        if self.probe is not None and self.reference.original_forward is self.probe:
            self.reference.original_forward = self.probe.forward
        unregister(self.module, self.name)


def _hooked(model: torch.nn.Module) -> Iterator[tuple[str, torch.nn.Module, str]]:
    for path, module in model.named_modules():
        registry = getattr(module, "_diffusers_hook", None)
        for name in registry.hooks if registry else ():
            yield path, module, name


def install_hooks(model: torch.nn.Module, config: Any, kind: Kind) -> list[Member]:
    """Apply diffusers' cache; all or nothing.

    Returns:
        The modules it has hooked.
    """
    before = {(path, name) for path, _, name in _hooked(model)}
    bare = [m for m in model.modules() if not hasattr(m, "_diffusers_hook")]
    try:
        kind.apply(model, config)
    except BaseException as error:
        uninstall_hooks(_members(model, before), bare)
        if isinstance(error, (IndexError, ValueError)):
            raise ValueError(_unsupported(model, kind, str(error))) from error
        raise
    members = _members(model, before)
    if all(member.module is model for member in members):
        uninstall_hooks(members, bare)
        raise ValueError(_unsupported(model, kind, "none of its modules match"))
    for member in members:
        member.watch()
    return members


def _unsupported(model: torch.nn.Module, kind: Kind, reason: str) -> str:
    needs = "a list of at least two transformer blocks that diffusers knows" if kind.skips_blocks else "attention"
    return (
        f"{kind.title} cannot run on {type(model).__name__} ({reason}): it needs {needs}, as in Flux, SD3, PixArt, "
        "DiT, Sana or Wan, or other patterns in its config. For a UNet use DeepCacheConfig"
    )


def _members(model: torch.nn.Module, before: set[tuple[str, str]]) -> list[Member]:
    members = []
    for path, module, name in _hooked(model):
        if (path, name) not in before:
            registry = module._diffusers_hook
            reference = registry._fn_refs[registry._hook_order.index(name)]
            members.append(Member(path, module, registry.hooks[name], name, reference))
    return members


def uninstall_hooks(members: list[Member], bare: list[torch.nn.Module]) -> None:
    for member in reversed(members):
        member.remove()
    for module in bare:
        registry = getattr(module, "_diffusers_hook", None)
        if registry is not None and not registry.hooks:
            del module._diffusers_hook
