"""Seamless tiles of Any-Size-Diffusion as a MODEL patch."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from comfy.patcher_extension import WrappersMP
from comfy_api.latest import io

from ._runs import run_options, wrap_network


KEY = "diffusers_ext.any-size-diffusion"
# Of a ControlNet: they lie on the canvas and are cropped. All other tensors are repeated for every tile.
_RESIDUALS = ("input", "middle", "output")


class _Store:
    """Of one kind of call: its whole output at the step before."""

    reference: torch.Tensor | None = None


class SeamlessTiling:
    """The wrappers of one patched MODEL. What a run remembers lives in that run's options, never here.

    Args:
        config: `SeamlessTilingConfig` with a `tile_size`.
    """

    def __init__(self, config: Any):
        from diffusers_ext.attention import _tiles as maths
        from diffusers_ext.attention.any_size_diffusion import repeated

        self.config, self.maths, self.repeated = config, maths, repeated
        self.offsets = config.offsets(config.tile_size)

    def sample(self, executor, noise, latent_image, sampler, sigmas, *args, **kwargs):
        """OUTER_SAMPLE: a fresh memory for the run."""
        from diffusers_ext.caching._common import RunTracker

        with run_options(executor.class_obj, KEY, (RunTracker(_Store), len(sigmas) - 1)):
            return executor(noise, latent_image, sampler, sigmas, *args, **kwargs)

    def forward(self, executor, x, timesteps, *args, **kwargs):
        """Around the network: its outputs on every tile, merged."""
        place = next((i for i, value in enumerate(args) if isinstance(value, dict) and KEY in value), None)
        options = kwargs.get("transformer_options", {}) if place is None else args[place]
        size = tuple(x.shape[-2:])
        tile = self.config.tile_in(size, self.config.tile_size)
        if KEY not in options or options.get("uuids") is None or tile == size:
            return executor(x, timesteps, *args, **kwargs)
        store, corners = self._begin(options, x, tile)

        def predict(chunk):
            fit = partial(self._fitted, chunk=chunk, size=size, tile=tile, rows=len(x))
            rest = [fit(value) for value in (timesteps, *args)]
            return executor(fit(x, spatial=True), *rest, **{name: fit(value) for name, value in kwargs.items()})

        window = self.maths.gaussian_window(tile) if self.config.window == "gaussian" else torch.ones(tile)
        ema, batch = self.config.noise_ema or 0.0, self.config.tile_batch_size
        store.reference = self.maths.merge(predict, size, corners, window, batch, store.reference, ema)
        return store.reference

    def _begin(self, options: dict, x: torch.Tensor, tile: tuple[int, int]) -> tuple[_Store, list]:
        from diffusers_ext.caching._common import Inputs

        tracker, steps = options[KEY]
        position = tracker.begin(Inputs(x, float(options["sigmas"].max()), []), tuple(options["uuids"]))
        first = position.state.reference is None
        offset = (0, 0) if first else self.offsets.at(position.step)
        covering = self.offsets.covering and self.offsets.is_reset(position.step)
        cover = covering or steps < self.maths.FEW_STEPS or not self.config.noise_reference
        return position.state, self.maths.boxes(tuple(x.shape[-2:]), tile, offset, cover)

    def _fitted(self, value: Any, spatial: bool = False, **tiles) -> Any:
        """One argument of the network for some tiles."""
        if isinstance(value, dict) and KEY in value:
            many = {name: value[name] * len(tiles["chunk"]) for name in ("cond_or_uncond", "uuids") if name in value}
            return {**value, **many}
        if isinstance(value, dict):
            return {name: self._fitted(item, spatial or name in _RESIDUALS, **tiles) for name, item in value.items()}
        if isinstance(value, (list, tuple)):
            return type(value)(self._fitted(item, spatial, **tiles) for item in value)
        if not isinstance(value, torch.Tensor):
            return value
        if spatial:
            return self.maths.cut(value, tiles["chunk"], tiles["size"], tiles["tile"])
        return self.repeated(value, len(tiles["chunk"]), tiles["rows"])


def tile_in_latents(model: Any, pixels: int) -> int:
    """Side of a tile in latents, checked against what the network takes."""
    side = pixels // model.model.latent_format.spacial_downscale_ratio
    network = model.model.diffusion_model
    least = 2 ** (len(network.num_res_blocks) - 1) if hasattr(network, "num_res_blocks") else patch_of(network)
    if side < least or side % least:
        raise ValueError(
            f"tile_size is {pixels} pixels, {side} latents; {type(network).__name__} takes multiples of {least} "
            f"latents, {least * model.model.latent_format.spacial_downscale_ratio} pixels"
        )
    return side


def patch_of(network: Any) -> int:
    """Side of a transformer's patches in latents."""
    patch = getattr(network, "patch_size", 1)
    return int(patch[-1] if isinstance(patch, (tuple, list)) else patch)


class DXSeamlessTiledDiffusion(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="DXSeamlessTiledDiffusion",
            display_name="Seamless Tiled Diffusion",
            category="diffusers-ext/attention",
            description="Samples a large picture tile by tile. The grid of tiles moves at every step, so that no "
            "seams stay, at half the price of tiles that overlap. For enlarging: denoise up to about 0.5.",
            search_aliases=["tiled diffusion", "multidiffusion", "any size", "fstd", "upscale", "diffusers-ext"],
            inputs=[
                io.Model.Input("model", tooltip="Any model that works on pictures. LoRA and ControlNet keep working."),
                io.Int.Input(
                    "tile_size",
                    default=512,
                    min=16,
                    max=8192,
                    step=8,
                    tooltip="Side of a tile in pixels: the size of the training pictures is best.",
                ),
                io.Combo.Input(
                    "offset_mode",
                    options=["random", "positive", "complete", "fixed"],
                    default="random",
                    tooltip="How the grid moves. fixed: not at all, plain tiles.",
                ),
                io.Int.Input(
                    "overlap",
                    default=256,
                    min=8,
                    max=8192,
                    step=8,
                    tooltip="Random: largest move of the grid in pixels; the others: step between its places.",
                ),
                io.Int.Input(
                    "random_reset_step",
                    default=4,
                    min=0,
                    max=1000,
                    tooltip="Random: at every so manieth step tiles cover all of the picture. 0: only at the first.",
                ),
                io.Boolean.Input(
                    "cover_on_reset",
                    default=True,
                    tooltip="At these steps the grid moves too and tiles are added. Off: it goes back to its place as "
                    "published, which costs a little less and leaves traces of fixed borders.",
                ),
                io.Int.Input(
                    "tile_batch_size",
                    default=4,
                    min=1,
                    max=64,
                    tooltip="Tiles per call of the model. More takes memory.",
                ),
                io.Boolean.Input(
                    "noise_reference",
                    default=True,
                    tooltip="Where the moved grid leaves a strip, use the step before. Off: further tiles cover it.",
                ),
                io.Float.Input(
                    "noise_ema",
                    default=0.0,
                    min=0.0,
                    max=0.95,
                    step=0.05,
                    tooltip="Share of the step before in every output. 0: none.",
                ),
                io.Int.Input("seed", default=0, min=0, max=2**31 - 1, tooltip="Of the moves of the grid."),
            ],
            outputs=[io.Model.Output(tooltip="The model that works by tiles. Works with every sampler node.")],
        )

    @classmethod
    def execute(cls, model, tile_size, offset_mode, overlap, random_reset_step, cover_on_reset, **options):
        from diffusers_ext.attention.any_size_diffusion import SeamlessTilingConfig

        side, step = tile_in_latents(model, tile_size), overlap // model.model.latent_format.spacial_downscale_ratio
        places = {"offset_mode": offset_mode, "overlap": step, "offset_stride": step}
        resets = {"random_reset_step": random_reset_step or None, "cover_on_reset": cover_on_reset}
        tiling, patched = SeamlessTiling(SeamlessTilingConfig(side, **places, **resets, **options)), model.clone()
        for kind in (WrappersMP.OUTER_SAMPLE, WrappersMP.DIFFUSION_MODEL, WrappersMP.APPLY_MODEL):
            patched.remove_wrappers_with_key(kind, KEY)
        patched.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, KEY, tiling.sample)
        wrap_network(patched, KEY, tiling.forward)
        return io.NodeOutput(patched)


NODES = [DXSeamlessTiledDiffusion]
