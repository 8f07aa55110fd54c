"""Summing LoRA files into one, exactly, and what concepts in them do to each other."""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from ._common import _write


__all__ = ["CrosstalkReport", "crosstalk_report", "merge_concepts"]

_DOWN, _UP = ".lora_A.weight", ".lora_B.weight"
_METADATA = "lora_adapter_metadata"  # where diffusers keeps peft's configs
_SAME = 0.999
Factors = dict[str, tuple[torch.Tensor, torch.Tensor]]


@dataclass(frozen=True)
class Crosstalk:
    """Two concepts in one layer.

    Attributes:
        layer: Its name.
        pair: Names of the two files.
        bases: ||B_i^T B_j||_F.
        deltas: ||Delta_i Delta_j^T||_F.
        overlap: `bases` over what equal directions would give: 0 orthogonal, 1 the same; by chance sqrt(r / n_in).
        chance: That number.
    """

    layer: str
    pair: tuple[str, str]
    bases: float
    deltas: float
    overlap: float
    chance: float


@dataclass(frozen=True)
class CrosstalkReport:
    """What concepts do to each other, by layer and pair in `rows`; as text, one line per pair."""

    rows: tuple[Crosstalk, ...]

    def by_pair(self) -> dict[tuple[str, str], list[Crosstalk]]:
        """The rows of every pair."""
        found: dict[tuple[str, str], list[Crosstalk]] = {}
        for row in self.rows:
            found.setdefault(row.pair, []).append(row)
        return found

    def overlap(self, pair: tuple[str, str]) -> float:
        """Mean overlap of a pair over its layers."""
        rows = self.by_pair()[pair]
        return sum(row.overlap for row in rows) / len(rows)

    def __str__(self) -> str:
        lines = []
        for pair, rows in self.by_pair().items():
            worst = max(rows, key=lambda row: row.deltas)
            lines.append(
                f"{pair[0]} and {pair[1]}: overlap of directions {self.overlap(pair):.3f} on average over {len(rows)} "
                f"layers (by chance {sum(r.chance for r in rows) / len(rows):.3f}); ||Delta_i Delta_j^T|| at most "
                f"{worst.deltas:.2g} ({worst.layer})"
            )
        return "\n".join(lines) or "nothing to compare: one file, or no layer in common"


def _scales(path: Path, metadata: dict[str, str]) -> dict[str, float]:
    """alpha / r by the name of the model, from the notes that diffusers writes; 1 where there are none."""
    note = json.loads(metadata.get(_METADATA, "{}"))
    for key, value in note.items():
        if key.rpartition(".")[2] in ("rank_pattern", "alpha_pattern", "use_rslora", "use_dora") and value:
            raise ValueError(f"{path.name} uses {key}: only LoRAs with one rank and alpha per model can be merged")
    models = {key.rpartition(".")[0] for key in note}
    return {m: note[f"{m}.lora_alpha"] / note[f"{m}.r"] for m in models if f"{m}.lora_alpha" in note}


def factors(path: str | Path) -> Factors:
    """Layer -> (B^T `[r, n_in, ...]`, A `[n_out, r, ...]`) of a LoRA file of diffusers, its scale in A, float32.

    Raises:
        ValueError: Not a safetensors file, or not in the layout that diffusers writes.
    """
    path = Path(path)
    try:
        with safe_open(path, "pt") as file:
            tensors = {name: file.get_tensor(name).float() for name in file.keys()}  # noqa: SIM118
            scales = _scales(path, file.metadata() or {})
    except SafetensorError as error:
        raise ValueError(f"{path.name} is not a safetensors file, or a damaged one: {error}") from error
    layers = [name.removesuffix(_DOWN) for name in tensors if name.endswith(_DOWN)]
    strange = sorted(set(tensors) - {n + end for n in layers for end in (_DOWN, _UP)})
    if strange or not layers or 2 * len(layers) != len(tensors):
        raise ValueError(
            f"{path.name} is not a LoRA in the layout of diffusers (first strange key: {(strange or ['none'])[0]}): "
            "load it with pipe.load_lora_weights and save it with pipe.save_lora_weights"
        )
    return {n: (tensors[n + _DOWN], tensors[n + _UP] * scales.get(n.partition(".")[0], 1.0)) for n in layers}


def _pair(layer: str, names: tuple[str, str], one: tuple, other: tuple) -> Crosstalk:
    (b_i, a_i), (b_j, a_j) = ([t.flatten(1).double() for t in sides] for sides in (one, other))
    across = b_i @ b_j.T
    alike = ((b_i @ b_i.T).norm() * (b_j @ b_j.T).norm()).sqrt()
    return Crosstalk(
        layer=layer,
        pair=names,
        bases=across.norm().item(),
        deltas=(a_i @ across @ a_j.T).norm().item(),
        overlap=(across.norm() / alike.clamp(min=1e-12)).item(),
        chance=math.sqrt(math.sqrt(len(b_i) * len(b_j)) / b_i.shape[1]),
    )


def _report(loaded: dict[str, Factors]) -> CrosstalkReport:
    rows = []
    for one, other in combinations(loaded, 2):
        shared = [layer for layer in loaded[one] if layer in loaded[other]]
        rows += [_pair(layer, (one, other), loaded[one][layer], loaded[other][layer]) for layer in shared]
    return CrosstalkReport(tuple(rows))


def _load(paths: Sequence[str | Path]) -> dict[str, Factors]:
    names = [str(path) for path in paths]
    if not names or len(set(names)) < len(names):
        raise ValueError(f"files {names}: give one or more, each once; a weight of 2 counts a concept twice")
    stems = [Path(name).stem for name in names]
    labels = stems if len(set(stems)) == len(stems) else names
    loaded = {label: factors(name) for label, name in zip(labels, names)}
    _require_one_model(loaded)
    return loaded


def _require_one_model(loaded: dict[str, Factors]) -> None:
    seen: dict[str, tuple[str, list[int]]] = {}
    for name, file in loaded.items():
        for layer, (down, up) in file.items():
            shape = [len(up), *down.shape[1:]]
            other, expected = seen.setdefault(layer, (name, shape))
            if shape != expected:
                raise ValueError(
                    f"{layer} has outputs and inputs {shape} in {name} and {expected} in {other}: the files are for "
                    "different models"
                )


def crosstalk_report(paths: Sequence[str | Path]) -> CrosstalkReport:
    """How far the concepts of LoRA files are apart.

    Args:
        paths: LoRA files in the layout of diffusers, orthogonal or ordinary.

    Example:
        >>> from diffusers_ext import crosstalk_report, zoo
        >>> files = [zoo.adapter_file(f"orthogonal-adaptation-{word}-shapes-unet") for word in ("zib", "mog")]
        >>> max(row.deltas for row in crosstalk_report(files).rows) < 1e-5
        True
    """
    return _report(_load(paths))


def _require_apart(report: CrosstalkReport) -> None:
    for pair, rows in report.by_pair().items():
        overlap, chance = report.overlap(pair), sum(row.chance for row in rows) / len(rows)
        if overlap > _SAME:
            raise ValueError(
                f"{pair[0]} and {pair[1]} have the same directions: they were trained in the same slot. Train one of "
                "them in another slot"
            )
        if overlap > 2 * chance:
            warnings.warn(
                f"{pair[0]} and {pair[1]} share directions (overlap {overlap:.2f}, by chance {chance:.2f}): they are "
                "likely to disturb each other",
                stacklevel=3,
            )


def merge_concepts(
    paths: Sequence[str | Path], weights: Sequence[float] | None = None, output: str | Path | None = None
) -> dict[str, torch.Tensor]:
    """Sum concepts into one LoRA, exactly: what `set_adapters(names, weights)` gives, in one file.

    Args:
        paths: LoRA files in the layout of diffusers.
        weights: One lambda per file; 1 by default.
        output: Where to save the merged LoRA, a `.safetensors` file.

    Returns:
        Its tensors. Every layer has the sum of all ranks; a file that lacks a layer counts as zeros there.

    Raises:
        ValueError: Files that are no LoRAs of one model, weights that do not match, two concepts in one slot.

    Example:
        >>> from diffusers_ext import merge_concepts, zoo
        >>> pipe = zoo.load("shapes-unet")
        >>> files = [zoo.adapter_file(f"orthogonal-adaptation-{word}-shapes-unet") for word in ("zib", "mog")]
        >>> pipe.load_lora_weights(merge_concepts(files, weights=[1.0, 0.8]))
    """
    weights = [1.0] * len(paths) if weights is None else list(weights)
    if len(weights) != len(paths) or not all(math.isfinite(w) for w in weights):
        raise ValueError(f"{len(weights)} weights {weights} for {len(paths)} files: give one finite number per file")
    if output is not None and Path(output).suffix != ".safetensors":
        raise ValueError(f"output is {Path(output).name!r}: give a name that ends in .safetensors")
    loaded = _load(paths)
    _require_apart(_report(loaded))
    merged: dict[str, torch.Tensor] = {}
    for layer in dict.fromkeys(layer for file in loaded.values() for layer in file):
        merged[layer + _DOWN], merged[layer + _UP] = _sum(layer, loaded, weights)
    if output is not None:
        _write(Path(output), merged, {"format": "pt"})
    return merged


def _sum(layer: str, loaded: dict[str, Factors], weights: Sequence[float]) -> tuple[torch.Tensor, torch.Tensor]:
    """All B^T on top of each other, all A side by side with their weights."""
    like_down, like_up = next(file[layer] for file in loaded.values() if layer in file)
    downs, ups = [], []
    for file, weight in zip(loaded.values(), weights):
        down, up = file.get(layer, (None, None))
        if down is None:  # zeros of this file's rank, as loaders take one rank for all layers
            rank = len(next(iter(file.values()))[0])
            down = like_down.new_zeros(rank, *like_down.shape[1:])
            up = like_up.new_zeros(len(like_up), rank, *like_up.shape[2:])
        downs.append(down)
        ups.append(up * weight)
    return torch.cat(downs).contiguous(), torch.cat(ups, 1).contiguous()
