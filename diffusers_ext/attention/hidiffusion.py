"""HiDiffusion: pictures two to four times larger than a UNet was trained for, without repeated objects, in less time.

Zhang et al., "HiDiffusion: Unlocking High-Resolution Creativity and Efficiency in Low-Resolution Trained Diffusion
Models", ECCV 2024, https://arxiv.org/abs/2311.17528
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers.hooks import ModelHook

from .._fields import require_types
from ..apply import Attachment, MethodConfig, denoiser_of
from ..caching._common import (
    PREFIX,
    Inputs,
    RunHook,
    RunTracker,
    install,
    macs_on_meta,
    macs_or_warning,
    outlines,
    refuse_other_caches,
    steps_of,
)
from ..registry import Claim, MethodRecord, register
from ._common import run_length
from ._hidiffusion_plan import (
    Active,
    Placement,
    Plan,
    Size,
    coarse,
    draw_quarters,
    from_windows,
    halved,
    is_downsampling,
    paper_ratios,
    plan,
    resized,
    to_windows,
    token_grid,
)


__all__ = ["HiDiffusionConfig"]

_HOOK = PREFIX + "hidiffusion"
_DOWN, _MIDDLE, _INTRA = (
    "down_block_additional_residuals",
    "mid_block_additional_residual",
    "down_intrablock_additional_residuals",
)
_SUPPORTED = (
    "supported: UNet2DConditionModel with `down_blocks` and `up_blocks` of resnets and attentions, shrunk by 3 x 3 "
    "convolutions of stride 2 (Stable Diffusion 1, 2, XL)"
)


def placement_of(unet: torch.nn.Module) -> Placement:
    """Where HiDiffusion acts in a UNet.

    Raises:
        ValueError: Not a UNet of this layout; says what is missing.
    """
    name = type(unet).__name__
    if not all(hasattr(unet, part) for part in ("down_blocks", "up_blocks", "conv_in")):
        raise ValueError(f"HiDiffusion changes the levels of a UNet, which {name} does not have; {_SUPPORTED}")
    attends = [bool(getattr(block, "attentions", None)) for block in unet.down_blocks]
    if not any(attends) or len(unet.up_blocks) != len(attends):
        raise ValueError(f"{name} has no down block with attention; {_SUPPORTED}")
    for level, block in enumerate(unet.down_blocks[:-1]):
        convolution = getattr((getattr(block, "downsamplers", None) or [None])[0], "conv", None)
        convolution = getattr(convolution, "base_layer", convolution)
        if convolution is None or not is_downsampling(convolution):
            raise ValueError(f"down_blocks.{level} of {name} has no such convolution; {_SUPPORTED}")
    place = Placement.of(attends)
    blocks = [unet.down_blocks[place.attention], unet.up_blocks[place.levels - 1 - place.attention]]
    if not all(hasattr(a, "transformer_blocks") for b in blocks for a in getattr(b, "attentions", None) or [None]):
        raise ValueError(f"the attentions of {name} are no transformers; {_SUPPORTED}")
    return place


def windowed_layers(unet: torch.nn.Module, place: Placement) -> list[torch.nn.Module]:
    """Self-attention of the outermost level that has any, in the order in which it runs."""
    blocks = [unet.down_blocks[place.attention], unet.up_blocks[place.levels - 1 - place.attention]]
    return [t.attn1 for b in blocks for a in b.attentions for t in a.transformer_blocks]


@dataclass
class _Shared:
    """Read by the hooks of layers, written by the root hook before each call."""

    active: Active = field(default_factory=Active)
    latent: Size = (0, 0)
    sizes: Sequence[tuple[Size, Size]] = ()
    quarters: Sequence[int] = ()


class _ConvHook(ModelHook):
    """On the chosen downsampler: takes a quarter of the size."""

    def __init__(self, shared: _Shared):
        super().__init__()
        self.shared = shared

    def new_forward(self, module: torch.nn.Module, *args, **kwargs):
        if not self.shared.active.conv:
            return self.fn_ref.original_forward(*args, **kwargs)
        with coarse(module.conv):
            return self.fn_ref.original_forward(*args, **kwargs)


class _UpHook(ModelHook):
    """On an upsampler: gives the size at which the level above ended."""

    def __init__(self, shared: _Shared, level: int):
        super().__init__()
        self.shared, self.level = shared, level

    def new_forward(self, module: torch.nn.Module, hidden_states: torch.Tensor, output_size=None, *args, **kwargs):
        if self.shared.active.conv or self.shared.active.pool:
            output_size = self.shared.sizes[self.level][1]
        return self.fn_ref.original_forward(hidden_states, output_size, *args, **kwargs)


class _PoolHook(ModelHook):
    """Behind an attention of the pooled level: on the way down to half the size, on the way up back to all of it."""

    def __init__(self, shared: _Shared, level: int, down: bool):
        super().__init__()
        self.shared, self.level, self.down = shared, level, down

    def post_forward(self, module: torch.nn.Module, output: Any) -> Any:
        if not self.shared.active.pool:
            return output
        x = output[0]
        x = halved(x) if self.down else resized(x, self.shared.sizes[self.level][0])
        return (x, *output[1:]) if isinstance(output, tuple) else type(output)(sample=x)


class _WindowHook(ModelHook):
    """On a self-attention layer: attends inside of shifted windows."""

    def __init__(self, shared: _Shared, index: int):
        super().__init__()
        self.shared, self.index = shared, index

    def new_forward(self, module: torch.nn.Module, hidden_states, encoder_hidden_states=None, *args, **kwargs):
        grid = self.shared.active.windows
        if grid == 1 or encoder_hidden_states is not None:
            return self.fn_ref.original_forward(hidden_states, encoder_hidden_states, *args, **kwargs)
        size = token_grid(self.shared.latent, hidden_states.shape[1])
        if size is None:
            raise RuntimeError(
                f"self-attention got {hidden_states.shape[1]} tokens, which is no level of latents of "
                f"{self.shared.latent[0]} x {self.shared.latent[1]}: another method merges or adds tokens. Use "
                "HiDiffusionConfig(windows=False) with it"
            )
        cut = (size, grid, self.shared.quarters[self.index])
        mask, place = _mask(args, kwargs)
        if mask is not None:  # a bias on keys, [b, 1, tokens]
            mask = to_windows(mask.mT, (size[0], size[1]), *cut[1:]).mT
            args, kwargs = ((mask, *args[1:]), kwargs) if place else (args, {**kwargs, "attention_mask": mask})
        x = self.fn_ref.original_forward(to_windows(hidden_states, *cut), None, *args, **kwargs)
        return from_windows(x, *cut)


def _mask(args: tuple, kwargs: dict) -> tuple[torch.Tensor | None, bool]:
    """The attention mask of a call and whether it was given by position."""
    return (args[0], True) if args else (kwargs.get("attention_mask"), False)


class _RootHook(RunHook[None]):
    """On the UNet: decides what each call does, and gives residuals of control models the sizes of its features."""

    def __init__(self, config: HiDiffusionConfig, shared: _Shared, target: Any, place: Placement):
        super().__init__(RunTracker(lambda: None))
        self.config, self.shared, self.target, self.place = config, shared, target, place
        self.unet = denoiser_of(target)
        self.layers = len(windowed_layers(self.unet, place))
        self.used: Counter[Active] = Counter()
        self.steps = 1
        self.arguments: tuple[tuple, dict] | None = None

    def begin_run(self, args: tuple, kwargs: dict) -> None:
        self.used.clear()
        self.arguments = outlines((args, kwargs))
        self.steps = self.config.num_inference_steps or run_length(self.target, self.tracker.time)

    @torch.compiler.disable
    def _decide(self, arguments: Mapping[str, Any]) -> None:
        step, latent = self.tracker.run_step, tuple(Inputs.of(arguments).sample.shape[-2:])
        plan = self.config.plan_for(self.unet, self.place, latent, self.steps, arguments.get(_MIDDLE) is not None)
        self.shared.latent = latent
        self._set(plan.at(step), draw_quarters(self.config.seed, step, self.layers))
        self.used[self.shared.active] += 1

    def _set(self, active: Active, quarters: Sequence[int]) -> None:
        shared = self.shared
        shared.active, shared.quarters = active, quarters
        shared.sizes = active.sizes(shared.latent, self.place)

    def release(self) -> None:
        self.shared.active = Active()

    @torch.compiler.disable(recursive=False)
    def run(self, args: tuple, kwargs: dict) -> Any:
        self._decide(self._signature.bind(*args, **kwargs).arguments)
        return self.fn_ref.original_forward(*args, **{**kwargs, **self._residuals(kwargs)})

    @torch.compiler.disable
    def _residuals(self, kwargs: dict) -> dict[str, Any]:
        """Residuals of ControlNets and T2I-Adapters in the sizes that the features have in this call."""
        if not (self.shared.active.conv or self.shared.active.pool):
            return {}
        fitted: dict[str, Any] = {}
        skips = skip_sizes(self.unet, self.shared.sizes)
        down, middle, intra = (kwargs.get(name) for name in (_DOWN, _MIDDLE, _INTRA))
        if middle is not None and down is not None:
            fitted[_DOWN] = tuple(resized(r, s) for r, s in zip(down, skips))
            fitted[_MIDDLE] = resized(middle, self.shared.sizes[-1][1])
        if intra is not None:
            fitted[_INTRA] = self._adapter(intra)
        return fitted

    def _adapter(self, residuals: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Adapters add behind the last pair of a level with attention, and behind the downsampler elsewhere."""
        sizes = self.shared.sizes
        ends = []
        for level, block in enumerate(self.unet.down_blocks):
            inside = getattr(block, "has_cross_attention", False) or level + 1 == len(sizes)
            ends.append(sizes[level][1] if inside else sizes[level + 1][0])
        return [resized(r, s) for r, s in zip(residuals, ends)] + list(residuals[len(ends) :])

    def macs_saved(self, unet: torch.nn.Module) -> dict[str, float]:
        """Share of the last run's operations that was saved, counted on the meta device."""
        counts, (args, kwargs) = {}, self.arguments
        with self.aside():
            self.shared.latent = tuple(Inputs.of(self._signature.bind(*args, **kwargs).arguments).sample.shape[-2:])
            for active in {Active(), *self.used}:
                self._set(active, [0] * self.layers)
                counts[active] = macs_on_meta(unet, (args, {**kwargs, **self._residuals(kwargs)}))
        done = sum(calls * counts[active] for active, calls in self.used.items())
        return {"macs_saved": 1 - done / (counts[Active()] * self.used.total())}


def skip_sizes(unet: torch.nn.Module, sizes: Sequence[tuple[Size, Size]]) -> list[Size]:
    """Height and width of every skip connection, in the order in which a UNet collects them."""
    found = [sizes[0][0]]
    for level, block in enumerate(unet.down_blocks):
        found += [sizes[level][1]] * len(block.resnets)
        if level + 1 < len(sizes):
            found.append(sizes[level + 1][0])
    return found


@register(
    MethodRecord(
        slug="hidiffusion",
        family="attention",
        kind="attention",
        title="HiDiffusion: Unlocking High-Resolution Creativity and Efficiency in Low-Resolution Trained Diffusion "
        "Models",
        arxiv="2311.17528",
        summary="Pictures two to four times larger than a UNet was trained for, fewer repeated objects, less time",
        targets=("unet",),
        predictions=("epsilon", "v_prediction", "sample", "flow_prediction"),
        nodes=("DXHiDiffusion",),
        claim=Claim(
            text="Pictures of 1024 to 4096 pixels in 40 to 60 percent less time",
            setting="SD 1.5, SD 2.1, SDXL, GPU",
            value=40,
            unit="percent less time",
        ),
        conflicts=("a-sdm", "deepcache", "faster-diffusion"),
    )
)
@dataclass(frozen=True)
class HiDiffusionConfig(MethodConfig):
    """Lets a UNet draw pictures larger than it was trained for, with its objects in one piece and in less time.

    In the first part of a run, in which a picture's layout forms, the deep part of the UNet sees features of the
    trained size: its downsampler takes a quarter of the size instead of half of it, or features are pooled. In the
    whole run the costly self-attention of the outermost level acts inside of four windows that shift from step to
    step. Up to the trained size nothing changes, bit by bit. Paper: https://arxiv.org/abs/2311.17528

    Args:
        raunet: Let the deep part of the UNet see smaller features.
        windows: Attend inside of windows.
        t1_ratio, t2_ratio: Shares of the run in which the first and the second device act, in [0, 1]. Default: the
            paper's, by size (T1 0.4 below four times the trained side, else 0.7 with T2 0.3; 0.5 for SDXL in up to 8
            steps or with ControlNet). The first device of SD 1 and 2 is the downsampler, of SDXL pooling.
        aggressive: SDXL only: the downsampler for the first 8/50 of the run, then pooling until T1. Default: below
            four times the trained side, except for inpainting and Playground models.
        window_grid: Windows on each axis, at least 2.
        base_size: Height and width of the latents in training. Default: the model's `config.sample_size`.
        seed: Of the shifts of the windows; torch's own random numbers are not touched.
        num_inference_steps: Steps of the run, where a UNet is used without a pipeline that knows.

    Raises:
        ValueError: Values out of range; on `apply`, a model that is no such UNet, or no length of the run.
        RuntimeError: In a run, if another method merges or adds tokens of windowed layers.

    Example:
        >>> import diffusers_ext
        >>> from diffusers_ext import HiDiffusionConfig, zoo
        >>> pipe = zoo.load("shapes-unet")  # trained at 64 x 64
        >>> with diffusers_ext.apply(pipe, HiDiffusionConfig()) as handle:
        ...     image = pipe("a red circle", num_inference_steps=10, height=128, width=128).images[0]
        ...     handle.summary()["hidiffusion"]["coarse_calls"]
        4

    Limits:
        Details are those of the trained size, drawn larger. Few steps leave little room between layout and detail.
    """

    raunet: bool = True
    windows: bool = True
    t1_ratio: float | None = None
    t2_ratio: float | None = None
    aggressive: bool | None = None
    window_grid: int = 2
    base_size: tuple[int, int] | None = None
    seed: int = 0
    num_inference_steps: int | None = None

    def __post_init__(self) -> None:
        require_types(self)
        for name in ("t1_ratio", "t2_ratio"):
            value = getattr(self, name)
            if value is not None and not 0 <= value <= 1:
                raise ValueError(f"{name} is {value}; accepted: 0 (off) to 1 (the whole run), or None for the paper's")
        if self.window_grid < 2:
            raise ValueError(f"window_grid is {self.window_grid}; accepted: whole numbers from 2, or windows=False")
        if self.num_inference_steps is not None and self.num_inference_steps < 1:
            raise ValueError(f"num_inference_steps is {self.num_inference_steps}; accepted: whole numbers from 1")
        if self.base_size is not None:
            size = tuple(self.base_size)
            if min(size) < 1:
                raise ValueError(
                    f"base_size is {self.base_size}; accepted: (height, width) of the latents in training"
                )
            object.__setattr__(self, "base_size", size)

    def base_of(self, unet: torch.nn.Module) -> Size:
        """Height and width of the latents in training."""
        size = self.base_size or getattr(getattr(unet, "config", None), "sample_size", None)
        if size is None:
            raise ValueError(
                f"{type(unet).__name__} does not say at which size it was trained: give base_size=(height, width) of "
                "its latents, (64, 64) for pictures of 512 x 512"
            )
        return (size, size) if isinstance(size, int) else tuple(size)

    def plan_for(self, unet: Any, place: Placement, latent: Size, steps: int, control: bool = False) -> Plan:
        """When each part acts in a run of `steps` steps on latents of this height and width."""
        base = self.base_of(unet)
        return self.plan_at(max(latent[0] / base[0], latent[1] / base[1]), place, steps, control, _is_special(unet))

    def plan_at(
        self, scale: float, place: Placement, steps: int, control: bool = False, special: bool = False
    ) -> Plan:
        """When each part acts in a run.

        Args:
            scale: Larger side over the side in training.
            place: Where the parts act in this UNet.
            steps: Steps of the run.
            control: Does a ControlNet take part?
            special: Inpainting and Playground models, which take no aggressive form by themselves.
        """
        windows = self.window_grid if self.windows and scale > 1 else 1
        if not self.raunet:
            return Plan(windows=windows)
        paper = paper_ratios(scale, place, steps, control)
        t1, t2 = (given if given is not None else own for given, own in zip((self.t1_ratio, self.t2_ratio), paper))
        aggressive = self.aggressive
        if aggressive is None:
            chosen = self.t1_ratio is not None or self.t2_ratio is not None
            aggressive = place.pool_is_first and scale < 4 and steps > 8 and not (special or chosen)
        return plan(place, steps, (t1, t2), aggressive, windows)

    def check(self, target: Any, num_inference_steps: int | None = None) -> tuple[str, ...]:
        unet = denoiser_of(target)
        place = placement_of(unet)
        refuse_other_caches(unet)
        self.base_of(unet)
        if self.raunet:
            self.check_devices(type(unet).__name__, place)
        steps = num_inference_steps or self.num_inference_steps
        if self.num_inference_steps is None and steps_of(target) is None:
            raise ValueError("HiDiffusion needs the length of the run: give num_inference_steps, or the pipeline")
        if self.t1_ratio == 0 and not self.t2_ratio and not self.windows:
            return ("hidiffusion: t1_ratio is 0 and windows are off: nothing changes",)
        if steps is not None and steps < 3:
            return (f"hidiffusion: {steps} steps have no early part in which the layout forms; use 4 or more",)
        return ()

    def check_devices(self, name: str, place: Placement) -> None:
        """Raise `ValueError` if the given ratios ask for a device that a UNet of this placement does not have."""
        first, second = ("pool", "conv") if place.pool_is_first else ("conv", "pool")
        needs = {"pool": "two levels with attention", "conv": "a downsampler below the first attention"}
        for ratio, device in ((self.t1_ratio, first), (self.t2_ratio, second)):
            if ratio and getattr(place, device) is None:
                raise ValueError(f"{name} has not what this ratio needs, {needs[device]}: leave it 0 or None")
        if self.aggressive and not (place.pool_is_first and place.conv is not None):
            raise ValueError(f"aggressive is for UNets whose outermost level has no attention (SDXL), not this {name}")

    def attach(self, target: Any) -> Attachment:
        unet, shared = denoiser_of(target), _Shared()
        place = placement_of(unet)
        root = _RootHook(self, shared, target, place)
        return Attachment(install(unet, _hooks(unet, root, place), _HOOK), lambda: _summary(root, unet))


def _is_special(unet: Any) -> bool:
    config = unet.config
    return config.in_channels != config.out_channels or "playground" in str(config.get("_name_or_path", "")).lower()


def _hooks(unet: torch.nn.Module, root: _RootHook, place: Placement) -> Iterator[tuple[torch.nn.Module, ModelHook]]:
    shared, last = root.shared, place.levels - 1
    yield unet, root
    if place.conv is not None:
        yield unet.down_blocks[place.conv].downsamplers[0], _ConvHook(shared)
    for level in range(last):
        yield unet.up_blocks[last - 1 - level].upsamplers[0], _UpHook(shared, level)
    if place.pool is not None:
        yield unet.down_blocks[place.pool].attentions[0], _PoolHook(shared, place.pool, down=True)
        yield unet.up_blocks[last - place.pool].attentions[-2], _PoolHook(shared, place.pool, down=False)
    for index, layer in enumerate(windowed_layers(unet, place)):
        yield layer, _WindowHook(shared, index)


def _summary(root: _RootHook, unet: torch.nn.Module) -> Mapping[str, Any]:
    """Figures of the last run."""
    used = root.used
    figures: dict[str, Any] = {
        "calls": used.total(),
        "coarse_calls": sum(n for active, n in used.items() if active.conv),
        "pooled_calls": sum(n for active, n in used.items() if active.pool),
        "windowed_calls": sum(n for active, n in used.items() if active.windows > 1),
        "windowed_layers": root.layers,
    }
    if root.arguments is not None and used:
        figures.update(macs_or_warning(root.macs_saved, unet))
    return figures
