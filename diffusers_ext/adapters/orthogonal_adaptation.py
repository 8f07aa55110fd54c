"""Orthogonal Adaptation: concepts trained apart, each LoRA on input directions of its own, that are simply added up.

Po, Yang, Aberman, Wetzstein, "Orthogonal Adaptation for Modular Customization of Diffusion Models", CVPR 2024,
https://arxiv.org/abs/2312.02432
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import register_to_config
from torch import nn

from ..apply import denoiser_of
from ..registry import Claim, MethodRecord, register, unknown
from ._common import Adapter


__all__ = ["OrthogonalLoraAdapter", "orthogonalise"]

BASES = ("shared_orthogonal", "random_gaussian")
ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
_GRID = 1e5  # the hash is of directions on this grid, as the last bits differ between processors


def _seed(*parts: Any) -> int:
    """A seed from names and numbers, the same on every machine."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:6], "big")


def orthonormal(rows: int, columns: int, seed: int) -> torch.Tensor:
    """Orthonormal columns `[rows, columns]` in float64: Q of a seeded Gaussian with the signs that make R positive."""
    generator = torch.Generator("cpu").manual_seed(seed)
    gaussian = torch.randn(rows, columns, generator=generator, dtype=torch.float64, device="cpu")
    q, r = torch.linalg.qr(gaussian)
    return q * torch.where(r.diagonal() < 0, -1.0, 1.0)


@functools.lru_cache(maxsize=16)
def shared_basis(n_in: int, basis_seed: int = 0) -> torch.Tensor:
    """O: a random orthogonal matrix `[n_in, n_in]`, the same for every layer of this width and for everyone."""
    return orthonormal(n_in, n_in, _seed("shared_orthogonal", n_in, basis_seed))


def _columns(n_in: int, rank: int, concept: int | str, basis_seed: int) -> torch.Tensor:
    """Which columns of O belong to a concept: a block for a slot, a random subset for a name."""
    if isinstance(concept, int):
        return torch.arange(concept * rank, (concept + 1) * rank, device="cpu")
    generator = torch.Generator("cpu").manual_seed(_seed("columns", n_in, concept, basis_seed))
    return torch.randperm(n_in, generator=generator, device="cpu")[:rank]


def directions(
    n_in: int, rank: int, concept: int | str, basis: str = "shared_orthogonal", basis_seed: int = 0
) -> torch.Tensor:
    """B_i: input directions of one concept in layers of `n_in` inputs, orthonormal columns `[n_in, rank]` in float64.

    Args:
        n_in: Inputs of the layer; for a convolution channels x height x width of its kernel.
        rank: r.
        concept: A slot: slot i owns columns i r to (i + 1) r - 1 of the shared basis, so slots are orthogonal. Or a
            name, where nobody hands out slots: r random columns, of which two names share r^2 / n_in on average.
        basis: `"shared_orthogonal"`, or `"random_gaussian"`: an own orthonormalised Gaussian, for any number of
            concepts; entries of B_i^T B_j then have the mean square 1 / n_in.
        basis_seed: The same for all concepts that are to be merged.

    Raises:
        ValueError: Unknown basis, or a layer of this width has no such slot.
    """
    if basis not in BASES:
        raise ValueError(unknown("basis", basis, BASES))
    if not 1 <= rank <= n_in or (isinstance(concept, int) and concept < 0):
        raise ValueError(f"rank {rank} and slot {concept} on {n_in} inputs; accepted: 1 <= rank <= inputs, slot >= 0")
    if basis == "random_gaussian":
        return orthonormal(n_in, rank, _seed(basis, n_in, concept, basis_seed))
    if isinstance(concept, int) and (concept + 1) * rank > n_in:
        raise ValueError(
            f"slot {concept} of rank {rank} needs {(concept + 1) * rank} inputs and the layer has {n_in}, which makes "
            f"{n_in // rank} slots: take a lower rank, a lower slot, a name, or basis='random_gaussian'"
        )
    return shared_basis(n_in, basis_seed)[:, _columns(n_in, rank, concept, basis_seed)]


def hash_of(parts: Mapping[int, torch.Tensor]) -> str:
    """Short hash of the directions of a concept, by width of the layer."""
    digest = hashlib.sha256()
    for n_in in sorted(parts):
        digest.update((parts[n_in] * _GRID).round().to(torch.int32).numpy().tobytes())
    return digest.hexdigest()[:16]


def plain(layer: nn.Module) -> nn.Module:
    """The layer itself where peft has wrapped it."""
    while hasattr(layer, "base_layer"):
        layer = layer.base_layer
    return layer


def shape_of(layer: nn.Module) -> list[int] | None:
    """[outputs, inputs] of a linear layer, [outputs, inputs, height, width] of a convolution, None of others."""
    if isinstance(layer, nn.Linear):
        return [layer.out_features, layer.in_features]
    if isinstance(layer, nn.Conv2d) and layer.groups == 1:
        return [layer.out_channels, layer.in_channels, *layer.kernel_size]
    return None


def layers_of(model: nn.Module, target_modules: Sequence[str]) -> dict[str, list[int]]:
    """Name -> shape of the layers whose names end in one of `target_modules`.

    Raises:
        ValueError: One of them names no layer.
    """
    shapes = {name.replace(".base_layer", ""): shape_of(plain(layer)) for name, layer in model.named_modules()}
    ends = {target: [n for n in shapes if f".{n}".endswith(f".{target}") and shapes[n]] for target in target_modules}
    empty = [target for target, found in ends.items() if not found]
    if empty or not ends:
        raise ValueError(
            f"{type(model).__name__} has no linear layer or convolution whose name ends in {empty or 'nothing'}: "
            f"give ends of layer names, such as {', '.join(ATTENTION)}"
        )
    wanted = {name for found in ends.values() for name in found}
    return {name: shape for name, shape in shapes.items() if name in wanted and shape}


class _Branch(nn.Module):
    """Delta_i = A_i B_i^T of one layer under peft's names: `lora_A` is B_i^T, frozen; `lora_B` is A_i, zero at first.

    Args:
        shape: Of the layer, see `shape_of`.
        columns: B_i `[n_in, rank]`.
    """

    def __init__(self, shape: Sequence[int], columns: torch.Tensor):
        super().__init__()
        n_out, n_in, *kernel = shape
        rank = columns.shape[1]
        self.lora_A, self.lora_B = nn.Module(), nn.Module()
        frozen = columns.T.reshape(rank, n_in, *kernel).float().contiguous()
        self.lora_A.weight = nn.Parameter(frozen, requires_grad=False)
        self.lora_B.weight = nn.Parameter(torch.zeros(n_out, rank, *(1 for _ in kernel)))

    def forward(self, x: torch.Tensor, layer: nn.Module) -> torch.Tensor:
        """Delta_i x for the input of `layer`."""
        down, up = self.lora_A.weight, self.lora_B.weight
        if isinstance(layer, nn.Linear):
            return F.linear(F.linear(x, down), up)
        return F.conv2d(F.conv2d(x, down, None, layer.stride, layer.padding, layer.dilation), up)


@register(
    MethodRecord(
        slug="orthogonal-adaptation",
        family="adapters",
        kind="adapter",
        title="Orthogonal Adaptation for Modular Customization of Diffusion Models",
        arxiv="2312.02432",
        summary="Concepts trained apart as LoRAs on orthogonal input directions, merged by plain summing",
        targets=("unet", "dit", "mmdit"),
        predictions=("epsilon", "v_prediction", "sample", "flow_prediction"),
        nodes=("DXOrthogonalLoraMerge",),
        claim=Claim(
            text="Concepts trained apart are merged at once and keep their identity better than in other merges",
            setting="Stable Diffusion 1.5 layout, people and objects",
        ),
    )
)
class OrthogonalLoraAdapter(Adapter):
    """One concept: a LoRA whose input side is a frozen part of an orthogonal basis that all concepts share.

    The file of `save_file` is an ordinary LoRA of diffusers: `pipe.load_lora_weights` and `pipe.set_adapters` load and
    sum concepts. Paper: https://arxiv.org/abs/2312.02432

    Args:
        layers: Name (with `unet.` or `transformer.` in front) -> shape of the layers, see `for_model`.
        rank: r of every layer. The scale is 1 for any rank, as it must be the same for concepts that are summed.
        concept: Slot or name of the concept, see `directions`.
        basis: `"shared_orthogonal"` or `"random_gaussian"`, see `directions`.
        basis_seed: The same for all concepts that are to be merged.
        trigger: Word that calls the concept, for information.
        basis_hash: Of the directions as the file was made; computed when not given.

    Raises:
        ValueError: Values out of range, more slots than a layer has room for, or directions that come out differently
            here than where the file was made; on `attach`, a model without these layers.

    Example:
        >>> from diffusers_ext import OrthogonalLoraAdapter, zoo
        >>> pipe = zoo.load("shapes-unet")
        >>> concept = OrthogonalLoraAdapter.from_pretrained(zoo.adapter_file("orthogonal-adaptation-zib-shapes-unet"))
        >>> pipe.load_textual_inversion(zoo.adapter_file("trigger-zib-shapes-unet"))
        >>> with concept.attach(pipe):
        ...     images = zoo.generate(pipe, ["a large <zib> on the left"], num_inference_steps=4)

    Limits:
        Concepts do not disturb each other as far as the inputs that each was trained on lie in its own directions.
        Nothing is promised beside ordinary LoRAs.
    """

    @register_to_config
    def __init__(
        self,
        layers: Mapping[str, Sequence[int]],
        rank: int = 16,
        concept: int | str = 0,
        basis: str = "shared_orthogonal",
        basis_seed: int = 0,
        trigger: str | None = None,
        basis_hash: str | None = None,
    ):
        super().__init__()
        if not layers:
            raise ValueError("no layers: use OrthogonalLoraAdapter.for_model(pipe)")
        widths = {name: int(torch.Size(shape[1:]).numel()) for name, shape in layers.items()}
        parts = {n: directions(n, rank, concept, basis, basis_seed) for n in sorted(set(widths.values()))}
        found = hash_of(parts)
        if basis_hash not in (None, found):
            raise ValueError(
                f"concept {concept!r} of basis {basis!r} has the hash {basis_hash} in the file and {found} here: this "
                "release of torch draws other numbers, so load the file with pipe.load_lora_weights instead"
            )
        self.register_to_config(basis_hash=found)
        for name, shape in layers.items():
            self._put(name, _Branch(shape, parts[widths[name]]))

    def _put(self, name: str, branch: _Branch) -> None:
        *path, last = name.split(".")
        node: nn.Module = self
        for part in path:
            if part not in node._modules:
                node.add_module(part, nn.Module())
            node = node._modules[part]  # type: ignore[assignment]
        node.add_module(last, branch)

    @classmethod
    def for_model(cls, target: Any, target_modules: Sequence[str] = ATTENTION, **config: Any) -> OrthogonalLoraAdapter:
        """A fresh concept, which changes nothing, for a pipeline or model.

        Args:
            target: Pipeline or denoiser.
            target_modules: Ends of the names of the layers, as in peft.
            config: Further arguments of the class.
        """
        model = denoiser_of(target)
        found = layers_of(model, target_modules)
        return cls({f"{_prefix(model)}.{name}": shape for name, shape in found.items()}, **config)

    def _branches(self) -> Iterator[tuple[str, _Branch]]:
        return ((name, module) for name, module in self.named_modules() if isinstance(module, _Branch))

    def check(self, target: Any) -> None:
        model = denoiser_of(target)
        names, prefix = dict(model.named_modules()), _prefix(model)
        for name, shape in self.config.layers.items():
            start, _, inner = name.partition(".")
            theirs = shape_of(plain(names[inner])) if start == prefix and inner in names else None
            if theirs != list(shape):
                raise ValueError(
                    f"this concept is for a layer {name} of shape {list(shape)}; {type(model).__name__} has "
                    f"{'none' if theirs is None else theirs}: use a file made for this model"
                )
            if getattr(names.get(inner.rpartition(".")[0]), "fused_projections", False):
                raise ValueError(f"the projections of {name} are fused: call unfuse_qkv_projections() first")

    def install(self, target: Any, undo: ExitStack) -> None:
        model = denoiser_of(target)
        for name, branch in self._branches():
            layer = plain(model.get_submodule(name.partition(".")[2]))
            undo.callback(layer.register_forward_hook(self._beside(branch)).remove)

    def _beside(self, branch: _Branch) -> Callable:
        def add(layer: nn.Module, args: tuple, output: torch.Tensor) -> torch.Tensor:
            return output if self.scale == 0 else output + self.scale * branch(args[0], layer)

        return add


def _prefix(model: nn.Module) -> str:
    """How diffusers' LoRA files call this model."""
    return "unet" if "UNet" in type(model).__name__ else "transformer"


def orthogonalise(
    model: nn.Module,
    adapter_name: str = "default",
    concept: int | str = 0,
    basis: str = "shared_orthogonal",
    basis_seed: int = 0,
) -> list[str]:
    """Turn a fresh LoRA of peft into a concept: its input sides become the concept's directions and are frozen.

    For any training script that adds its LoRA by `model.add_adapter(LoraConfig(...))`: UNets, transformers, text
    encoders. Call it before the optimizer takes the trainable parameters; save as the script does.

    Args:
        model: Holds the adapter.
        adapter_name: Its name in peft.
        concept, basis, basis_seed: See `directions`.

    Returns:
        Names of the layers.

    Raises:
        ValueError: No such adapter, or a layer has no room for the slot. The model is left as it was.

    Example:
        >>> from peft import LoraConfig
        >>> from diffusers_ext import orthogonalise, zoo
        >>> unet = zoo.load("shapes-unet").unet.requires_grad_(False)
        >>> unet.add_adapter(LoraConfig(r=8, lora_alpha=8, target_modules=["attn2.to_k", "attn2.to_v"]), "mine")
        >>> names = orthogonalise(unet, "mine", concept=3)
    """
    found = {n: m for n, m in model.named_modules() if adapter_name in getattr(m, "lora_A", {})}
    if not found:
        raise ValueError(f"{type(model).__name__} has no LoRA named {adapter_name!r}: call add_adapter(...) first")
    sides = {name: (m.lora_A[adapter_name].weight, m.lora_B[adapter_name].weight) for name, m in found.items()}
    parts = {n: directions(d[0].numel(), len(d), concept, basis, basis_seed) for n, (d, _) in sides.items()}
    for name, (down, up) in sides.items():
        with torch.no_grad():
            down.copy_(parts[name].T.reshape(down.shape))
            up.zero_()
        down.requires_grad_(False)
        up.requires_grad_(True)
    return list(found)
