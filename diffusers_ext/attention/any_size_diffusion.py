"""Any-Size-Diffusion: enlarge a picture to any size with tiles whose grid moves at every step, so that no seam stays.

Zheng et al., "Any-Size-Diffusion: Toward Efficient Text-Driven Synthesis for Any-Size HD Images", 2023,
https://arxiv.org/abs/2308.16582
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import FluxTransformer2DModel

from .._fields import require_types
from .._flux_tokens import pack, unpack
from ..apply import Attachment, MethodConfig, denoiser_of
from ..caching._common import (
    PREFIX,
    Inputs,
    Position,
    RunHook,
    RunTracker,
    install,
    map_tensors,
    refuse_other_caches,
)
from ..registry import Claim, MethodRecord, register, unknown
from ._common import run_length
from ._tiles import (
    FEW_STEPS,
    MODES,
    Mode,
    Offsets,
    Size,
    boxes,
    cut,
    gaussian_window,
    merge,
    overlapping_tiles,
    uncovered,
)


__all__ = ["SeamlessTilingConfig"]

_HOOK = PREFIX + "any-size-diffusion"
_SPATIAL = (
    "down_block_additional_residuals",
    "mid_block_additional_residual",
    "down_intrablock_additional_residuals",
)
_TOKENS = ("block_controlnet_hidden_states", "controlnet_block_samples", "controlnet_single_block_samples")
_SUPPORTED = "supported: UNets, transformers that take latents [n, c, h, w] (DiT, PixArt, SD3), and Flux"


@dataclass
class _Store:
    """Of one kind of call: its whole output at the step before."""

    reference: torch.Tensor | None = None


def smallest_tile(model: torch.nn.Module) -> int:
    """Sides of tiles must be a multiple of this: a UNet's factor from its first to its last level, a patch."""
    blocks = getattr(model, "down_blocks", None)
    if blocks is not None:
        return 2 ** (len(blocks) - 1)
    if isinstance(model, FluxTransformer2DModel):  # its pipelines pack 2 x 2 latents into a token themselves
        return 2
    return getattr(getattr(model, "config", None), "patch_size", None) or 1


class _RootHook(RunHook[_Store]):
    """On the denoiser: splits its call into tiles and merges what they give."""

    outermost = True

    def __init__(self, config: SeamlessTilingConfig, target: Any):
        super().__init__(RunTracker(_Store))
        self.config, self.target, self.model = config, target, denoiser_of(target)
        self.side = config.side_of(self.model)
        self.offsets = config.offsets(self.side)
        self.figures: dict[str, int] = {}
        self.few = False

    def begin_run(self, args: tuple, kwargs: dict) -> None:
        self.figures = {"calls": 0, "tiles": 0, "tiles_with_half_overlap": 0, "pixels_from_the_step_before": 0}
        steps = self.config.num_inference_steps or run_length(self.target, self.tracker.time)
        self.few = steps is not None and steps < FEW_STEPS

    def begin_call(self, position: Position[_Store]) -> None:
        self.store, self.step = position.state, position.step

    def release(self) -> None:
        self.store = None

    @torch.compiler.disable(recursive=False)
    def run(self, args: tuple, kwargs: dict) -> Any:
        arguments = _flat(self._signature.bind(*args, **kwargs))
        size = size_of(arguments)
        tile = self.config.tile_in(size, self.side)
        corners = self._corners(size, tile)
        self.figures["calls"] += 1
        self.figures["tiles"] += len(corners)
        self.figures["tiles_with_half_overlap"] += overlapping_tiles(size, tile)
        if tile == size:
            return self.fn_ref.original_forward(*args, **kwargs)
        return self._merged(arguments, size, tile, corners)

    def _corners(self, size: Size, tile: Size) -> list[Size]:
        first = self.store.reference is None
        offset = (0, 0) if first else self.offsets.at(self.step)
        covering = self.offsets.covering and self.offsets.is_reset(self.step)
        corners = boxes(size, tile, offset, cover=covering or self.few or not self.config.noise_reference)
        self.figures["pixels_from_the_step_before"] += uncovered(size, tile, corners)
        return corners

    def _merged(self, arguments: dict, size: Size, tile: Size, corners: Sequence[Size]) -> Any:
        config, outputs = self.config, []

        def predict(chunk: Sequence[Size]) -> torch.Tensor:
            outputs[:] = [self.fn_ref.original_forward(**self._cropped(arguments, size, tile, chunk))]
            return unpack(outputs[0][0], *tile) if "img_ids" in arguments else outputs[0][0]

        window = gaussian_window(tile) if config.window == "gaussian" else torch.ones(tile)
        reference = self.store.reference
        whole = merge(predict, size, corners, window, config.tile_batch_size, reference, config.noise_ema or 0.0)
        self.store.reference = whole
        whole = pack(whole) if "img_ids" in arguments else whole
        return (whole,) if isinstance(outputs[0], tuple) else type(outputs[0])(sample=whole)

    def _cropped(self, arguments: dict, size: Size, tile: Size, chunk: Sequence[Size]) -> dict[str, Any]:
        """Arguments of the call for some tiles: spatial ones cropped, all others repeated for each."""
        sample = Inputs.of(arguments).sample
        rows, cropped = sample.shape[0], {}
        for name, value in arguments.items():
            if name == "img_ids":
                cropped[name] = first_places(value, size, tile)
            elif value is sample and sample.ndim == 3:
                cropped[name] = pack(cut(unpack(value, *size), chunk, size, tile))
            elif value is sample or name in _SPATIAL:
                cropped[name] = map_tensors(value, lambda t: cut(t, chunk, size, tile))
            elif name in _TOKENS:
                cropped[name] = map_tensors(value, lambda t: cut_tokens(t, chunk, size, tile))
            else:
                cropped[name] = map_tensors(value, lambda t: repeated(t, len(chunk), rows))
        added = cropped.get("added_cond_kwargs") or {}
        if self.config.tile_coordinates and "time_ids" in added:
            moved = moved_time_ids(added["time_ids"], chunk, self.config.pixels_per_latent)
            cropped["added_cond_kwargs"] = {**added, "time_ids": moved}
        return cropped


def size_of(arguments: Mapping[str, Any]) -> Size:
    """Height and width of the latents of a call.

    Raises:
        ValueError: Flux's tokens are not those of one picture.
    """
    sample, ids = Inputs.of(arguments).sample, arguments.get("img_ids")
    if ids is None:
        return tuple(sample.shape[-2:])
    rows, columns = (len(ids[..., axis].unique()) for axis in (-2, -1))
    if rows * columns != sample.shape[1]:
        raise ValueError(
            f"tiles are cut out of one picture: {sample.shape[1]} tokens are not {rows} x {columns} (reference "
            "pictures are not supported)"
        )
    return 2 * rows, 2 * columns


def first_places(ids: torch.Tensor, size: Size, tile: Size) -> torch.Tensor:
    """Positions of the tokens of the first tile, which serve all: Flux compares positions, nothing more."""
    grid = ids.unflatten(-2, (size[0] // 2, size[1] // 2))
    return grid[..., : tile[0] // 2, : tile[1] // 2, :].flatten(-3, -2)


def cut_tokens(t: torch.Tensor, chunk: Sequence[Size], size: Size, tile: Size) -> torch.Tensor:
    """`cut` of what a ControlNet adds to tokens `[b, tokens, c]`, line by line."""
    by = round((size[0] * size[1] / t.shape[1]) ** 0.5)
    return cut(t.mT.unflatten(2, (size[0] // by, size[1] // by)), chunk, size, tile).flatten(2).mT


def _flat(bound: inspect.BoundArguments) -> dict[str, Any]:
    """Arguments by name, those of `**kwargs` among them."""
    arguments = dict(bound.arguments)
    extra = arguments.pop("kwargs", {})
    return {**arguments, **extra}


def repeated(t: torch.Tensor, copies: int, rows: int) -> torch.Tensor:
    """`copies` of a tensor with one row per picture, one whole batch after the other; others stay as they are."""
    return t.repeat(copies, *[1] * (t.ndim - 1)) if t.ndim and t.shape[0] == rows else t


def moved_time_ids(ids: torch.Tensor, chunk: Sequence[Size], pixels: int) -> torch.Tensor:
    """SDXL's sizes and coordinates `[tiles * b, 6]` with every tile's corner as the place of its crop."""
    corners = torch.tensor(chunk, dtype=ids.dtype, device=ids.device) * pixels
    moved = ids.clone()
    moved[:, 2:4] += corners.repeat_interleave(ids.shape[0] // len(chunk), 0)
    return moved


@register(
    MethodRecord(
        slug="any-size-diffusion",
        family="attention",
        kind="attention",
        title="Any-Size-Diffusion: Toward Efficient Text-Driven Synthesis for Any-Size HD Images",
        arxiv="2308.16582",
        summary="Enlarges pictures to any size tile by tile: the grid moves at every step, so that no seam stays",
        targets=("unet", "dit", "mmdit"),
        predictions=("epsilon", "v_prediction", "sample", "flow_prediction"),
        nodes=("DXSeamlessTiledDiffusion",),
        claim=Claim(
            text="Twice as fast as tiles that overlap, without seams",
            setting="Stable Diffusion 2.1, GPU",
            value=2,
            unit="times faster",
        ),
        conflicts=("a-sdm", "bac", "deepcache", "delta-dit", "faster-diffusion", "ras"),
    )
)
@dataclass(frozen=True)
class SeamlessTilingConfig(MethodConfig):
    """Runs a denoiser on tiles of a large picture; the grid of tiles moves at every step, so that no border stays.

    Tiles hardly overlap, which costs half as much as tiles with shared halves or less. Where the moved grid leaves a
    strip, the output of the step before stands in for it. Made for the second half of a run that enlarges a picture
    (image-to-image with a strength up to about 0.6). Paper: https://arxiv.org/abs/2308.16582

    Args:
        tile_size: Side of a tile in latents, a multiple of the model's factor (8 for Stable Diffusion). Default: the
            model's `config.sample_size`, the size it was trained for; Flux has none, 128 is good.
        offset_mode: `"random"` (default), `"positive"`, `"complete"`, or `"fixed"` for plain tiling. The first step
            always covers all of the picture.
        offset_stride: Step between the offsets of `"positive"` and `"complete"`. Default: half a tile.
        overlap: Random offsets are below this. Default: half a tile.
        random_reset_step: At every so manieth step tiles cover all of the picture. None: only at the first; then
            strips at the upper and left border may wait for long.
        cover_on_reset: At these steps the grid moves too, and further tiles cover what it leaves (default). False:
            the grid goes back to (0, 0), as published, which costs less and strengthens the same borders again.
        tile_batch_size: Tiles per call of the model. More takes more memory.
        noise_reference: Let the step before stand in for missing strips. Without, and in runs of fewer than 8 steps,
            further tiles cover them.
        noise_ema: m in [0, 1); the output becomes m times that of the step before plus 1 - m times its own.
        window: Weights where tiles overlap: `"gaussian"` (default) or `"uniform"`.
        allow_small: On a side shorter than a tile, make the tile shorter. False: an error.
        tile_coordinates: SDXL: tell the model where each tile lies.
        pixels_per_latent: For `tile_coordinates`.
        seed: Of the random offsets; torch's own random numbers are not touched.
        num_inference_steps: Steps of the run, where a model is used without a pipeline that knows.

    Raises:
        ValueError: Values out of range; on `apply`, a tile that is smaller than the model's minimum or no multiple of
            it, a transformer with absolute positions and tiles of another size than it was trained for, or a model
            that takes tokens (but Flux); in a run, reference pictures (Flux Kontext).

    Example:
        >>> import diffusers_ext
        >>> from diffusers_ext import SeamlessTilingConfig, zoo
        >>> pipe = zoo.load("shapes-unet")  # trained at 16 x 16 latents
        >>> with diffusers_ext.apply(pipe, SeamlessTilingConfig()) as handle:
        ...     image = pipe("a red circle", num_inference_steps=8, height=128, width=128).images[0]
        ...     handle.summary()["any-size-diffusion"]["tiles"]
        37

    Limits:
        Every tile gets the whole prompt: from pure noise each draws the object anew. Enlarge a picture instead.
    """

    tile_size: int | None = None
    offset_mode: Mode = "random"
    offset_stride: int | None = None
    overlap: int | None = None
    random_reset_step: int | None = 4
    cover_on_reset: bool = True
    tile_batch_size: int = 4
    noise_reference: bool = True
    noise_ema: float | None = None
    window: str = "gaussian"
    allow_small: bool = True
    tile_coordinates: bool = False
    pixels_per_latent: int = 8
    seed: int = 0
    num_inference_steps: int | None = None

    def __post_init__(self) -> None:
        require_types(self)
        if self.offset_mode not in MODES:
            raise ValueError(unknown("offset_mode", self.offset_mode, MODES))
        if self.window not in ("gaussian", "uniform"):
            raise ValueError(unknown("window", self.window, ("gaussian", "uniform")))
        counts = ("tile_size", "offset_stride", "overlap", "random_reset_step", "num_inference_steps")
        for name in (*counts, "tile_batch_size", "pixels_per_latent"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} is {value}; accepted: whole numbers from 1")
        if self.noise_ema is not None and not 0 <= self.noise_ema < 1:
            raise ValueError(f"noise_ema is {self.noise_ema}; accepted: 0 (own output alone) to below 1, or None")

    def side_of(self, model: torch.nn.Module) -> int:
        """Side of a tile in latents."""
        side = self.tile_size or getattr(getattr(model, "config", None), "sample_size", None)
        if not isinstance(side, int):
            raise ValueError(
                f"{type(model).__name__} does not say for which square size it was trained: give tile_size"
            )
        return side

    def offsets(self, side: int) -> Offsets:
        """Where the grid begins at each step, for tiles of this side."""
        half = max(side // 2, 1)
        stride, overlap = self.offset_stride or half, self.overlap or half
        for name, value in (("offset_stride", stride), ("overlap", overlap)):
            if value > side:
                raise ValueError(f"{name} is {value}, larger than a tile of {side}; accepted: 1 to {side}")
        reset = self.random_reset_step, self.seed, self.cover_on_reset
        return Offsets(self.offset_mode, side, stride, overlap, *reset)

    def tile_in(self, size: Size, side: int) -> Size:
        """Size of a tile on a canvas of this size."""
        if min(size) < side and not self.allow_small:
            raise ValueError(
                f"the latents are {size[0]} x {size[1]}, smaller than a tile of {side}: draw a larger picture, use a "
                "smaller tile_size, or allow_small=True"
            )
        return min(size[0], side), min(size[1], side)

    def check(self, target: Any, num_inference_steps: int | None = None) -> tuple[str, ...]:
        model = denoiser_of(target)
        _require_spatial(model)
        refuse_other_caches(model)
        side, least = self.side_of(model), smallest_tile(model)
        self.offsets(side)
        if side % least:
            raise ValueError(
                f"tile_size is {side}; {type(model).__name__} takes multiples of {least}, and nothing below {least}"
            )
        trained = getattr(getattr(model, "config", None), "sample_size", None)
        if not hasattr(model, "down_blocks") and trained is not None and side != trained:
            raise ValueError(
                f"{type(model).__name__} has absolute positions: its tiles must have the size it was trained for, "
                f"tile_size={trained}, not {side}"
            )
        steps = num_inference_steps or self.num_inference_steps
        if steps is not None and steps < FEW_STEPS and self.noise_reference:
            return (
                f"any-size-diffusion: in {steps} steps the output of the step before is too old to be used; "
                "further tiles cover what the grid leaves",
            )
        return ()

    def attach(self, target: Any) -> Attachment:
        model = denoiser_of(target)
        root = _RootHook(self, target)
        return Attachment(install(model, [(model, root)], _HOOK), lambda: _summary(root))


def _summary(root: _RootHook) -> Mapping[str, Any]:
    """Figures of the last run."""
    return dict(root.figures)


def _require_spatial(model: torch.nn.Module) -> None:
    names = inspect.signature(model.forward).parameters
    tokens = "img_ids" in names and not isinstance(model, FluxTransformer2DModel)
    if "timestep" not in names or not {"sample", "hidden_states"} & set(names) or tokens:
        raise ValueError(f"tiles are cut out of latents, which {type(model).__name__} does not take; {_SUPPORTED}")
