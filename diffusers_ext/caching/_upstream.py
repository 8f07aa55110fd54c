"""diffusers' own caches behind `apply`: on every model and pipeline, one state per kind of call, never stale.

The arithmetic stays upstream's. What is added: a cache context where the pipeline sets none, resets, a state per
kind of call for the caches that keep only one, figures, and removal without a trace.
"""

from __future__ import annotations

import copy
import inspect
import itertools
import logging
import math
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from diffusers import hooks as upstream
from diffusers.hooks.hooks import CacheContext, StateManager

from ..apply import Attachment, MethodConfig, denoiser_of
from ..eval.macs import macs_by_module
from ..registration import describe_transformer_blocks
from ..registry import MethodRecord
from ._common import (
    PREFIX,
    Inputs,
    Position,
    RunHook,
    RunTracker,
    install,
    map_tensors,
    stateful_hooks,
    steps_left,
    tensors_in,
)
from ._upstream_members import KINDS, Kind, Member, install_hooks, uninstall_hooks
from ._upstream_vision import Vision, noise_levels, require_known_input, require_noise_levels


logger = logging.getLogger(__name__)
_HOOK = PREFIX + "upstream"
_CONTROL = (
    "block_controlnet_hidden_states",
    "controlnet_block_samples",
    "controlnet_single_block_samples",
    "controlnet_states",
)
# What TaylorSeer hooks where its own patterns, which end in "attn", match nothing: PixArt, DiT, Sana, Wan, UNets.
_ATTENTION = r"(.*\.)?(transformer_)?blocks\.\d+\.attn\d*"


@dataclass
class _Call:
    """Of one kind of call: the name its states go by, and those that diffusers keeps on the hooks themselves."""

    token: str
    states: dict[int, Any] = field(default_factory=dict)


# Transformers that get 1 - t.
_RISING = ("LuminaNextDiT2DModel", "Lumina2Transformer2DModel")


class _Clock:
    """Timestep in the scheduler's units, which diffusers' caches ask for. Infinite on a first call: nothing to reuse.

    Args:
        pipe: Pipeline whose scheduler counts, or a model.
        given: The user's own callback.
    """

    def __init__(self, pipe: Any, given: Callable[[], float] | None):
        self.pipe, self.given = pipe, given
        self.now = math.inf
        self.scale = self.factor = 1.0
        self.steps: int | None = None

    def __call__(self) -> float:
        return self.now

    @property
    def scheduler(self) -> Any:
        return getattr(self.pipe, "scheduler", None)

    def start(self, time: float) -> None:
        """Flux and its like hand their model t / 1000: find out at the first call of a run."""
        timesteps = getattr(self.scheduler, "timesteps", None)
        divided = timesteps is not None and len(timesteps) and time <= 1 < float(timesteps.max())
        self.scale = float(self.scheduler.config.num_train_timesteps) if divided else 1.0
        self.steps = steps_left(self.pipe, time * self.scale)

    def tick(self, time: float, first: bool) -> None:
        self.now = math.inf if first else float(self.given()) if self.given else time * self.scale

    def coordinates(self, step: int, time: float) -> dict[str, Any]:
        """Where the run is, as SeaCache wants to know."""
        sigma, self.factor = noise_levels(self.scheduler, time * self.scale)
        return {"step_index": step, "sigma": sigma, "num_inference_steps": self.steps}


class _OnMeta(torch.nn.Module):
    """A model on the meta device, without copying its weights."""

    def __init__(self, model: torch.nn.Module):
        super().__init__()
        self.model = model

    def forward(self, *args, **kwargs):
        tensors = {**dict(self.model.named_parameters()), **dict(self.model.named_buffers())}
        meta = map_tensors(tensors, lambda t: torch.empty_like(t, device="meta"))
        return torch.func.functional_call(self.model, meta, args, kwargs)


class _RootHook(RunHook[_Call]):
    """On the denoiser, around diffusers' own hooks: gives each kind of call its states and keeps count."""

    def __init__(self, config: Any, kind: Kind, members: list[Member], clock: _Clock):
        tokens = itertools.count()
        super().__init__(RunTracker(lambda: _Call(f"{_HOOK}.{next(tokens)}")))
        self.config, self.kind, self.members, self.clock = config, kind, members, clock
        given = getattr(config, "raw_vision_callback", None)
        self.vision = given if isinstance(given, Vision) else None
        attributes = [value for member in members for value in vars(member.hook).values()]
        self.managers = list({id(v): v for v in attributes if isinstance(v, StateManager)}.values())
        self.holders = [member.hook for member in members if hasattr(member.hook, "state")]
        self.probes = [member for member in members if member.probe is not None]
        self.computed = self.reused = 0
        self.executed: Counter[tuple[frozenset[str], float]] = Counter()
        self.arguments: tuple[tuple, dict] | None = None
        self.mag_ratios: list[list[float]] = []

    @torch.compiler.disable
    def _begin(self, args: tuple, kwargs: dict) -> None:
        arguments = self._signature.bind(*args, **kwargs).arguments
        self._require(arguments)
        self.batch = Inputs.of(arguments).sample.shape[0]
        super()._begin(args, kwargs)

    def _require(self, arguments: dict[str, Any]) -> None:
        """Refuse calls that diffusers' cache would get wrong."""
        control = [name for name in _CONTROL if tensors_in(arguments.get(name))]
        if control and (self.kind.skips_blocks or getattr(self.config, "use_lite_mode", False)):
            raise ValueError(
                f"{self.kind.title} skips blocks between which ControlNet adds its residuals ({control[0]}), which "
                "would then count twice: use TaylorSeerCacheConfig or PyramidAttentionBroadcastConfig there"
            )
        if self.vision is not None:
            self.vision.pictures(arguments)  # upstream would swallow the error and reuse nothing
        if isinstance(self.config, upstream.FasterCacheConfig) and not self.config.is_guidance_distilled:
            _require_guidance_batch(arguments)
            if Inputs.of(arguments).sample.ndim == 4:
                self.holders[0].tensor_format = "BCHW"

    def begin_run(self, args: tuple, kwargs: dict) -> None:
        self._reset_members()
        self.computed = self.reused = 0
        self.executed.clear()
        self.mag_ratios = []
        self.arguments = map_tensors((args, kwargs), lambda t: torch.empty_like(t, device="meta"))
        self.clock.start(self.tracker.time)

    def begin_call(self, position: Position[_Call]) -> None:
        call, time = position.state, self.tracker.time
        self.clock.tick(time, first=position.step == 0)
        given = self.cache_context._context
        context = replace(given or CacheContext(""), name=call.token)
        if self.kind.needs_sigma and context.step_index is None:
            context = replace(context, **self.clock.coordinates(self.tracker.run_step, time))
        self.given_context = given
        self._set_context(context)
        for index, hook in enumerate(self.holders):
            hook.state = call.states.setdefault(index, type(hook.state)())
        for member in self.probes:
            member.probe.ran = False
        self._follow_calibration()

    def _follow_calibration(self) -> None:
        """Keep hold of the list that MagCache fills and then forgets."""
        if getattr(self.config, "calibrate", False):
            ratios = self.managers[0].get_state().calibration_ratios
            if not any(ratios is known for known in self.mag_ratios):
                self.mag_ratios.append(ratios)

    def end_call(self) -> None:
        self._set_context(self.given_context)
        skipped = frozenset(member.path for member in self.probes if not member.probe.ran)
        outermost = frozenset(p for p in skipped if not any(p.startswith(f"{other}.") for other in skipped))
        whole = next((m.probe for m in self.probes if not m.path), None)
        share = whole.batch / self.batch if whole else 1.0
        reused = bool(outermost) or share < 1
        self.reused += reused
        self.computed += not reused
        self.executed[outermost, share] += 1

    def _set_context(self, context: CacheContext | None) -> None:
        for manager in self.managers:
            manager.set_context(context)

    def _reset_members(self) -> None:
        for member in self.members:
            if member.hook._is_stateful:
                member.hook.reset_state(member.module)

    def reset_state(self, module: torch.nn.Module) -> torch.nn.Module:
        self._reset_members()
        return super().reset_state(module)

    @contextmanager
    def _bypassed(self) -> Iterator[None]:
        """The model as if nothing were applied."""
        kept = [(m.reference, m.reference.forward, m.reference.pre_forward) for m in self.members]
        for member in self.members:
            if member.original is not None:
                member.reference.forward = member.original
            member.reference.pre_forward = lambda module, *args, **kwargs: (args, kwargs)
        try:
            with self.aside():
                yield
        finally:
            for reference, forward, pre_forward in kept:
                reference.forward, reference.pre_forward = forward, pre_forward

    def figures(self, model: torch.nn.Module) -> dict[str, Any]:
        """Of the last run. MACs are left out for models that cannot run on the meta device (offloaded ones)."""
        skipped = sum(len(paths) * count for (paths, _), count in self.executed.items())
        figures = {"computed": self.computed, "reused": self.reused, "modules_skipped": skipped}
        if self.mag_ratios:
            figures["mag_ratios"] = [list(ratios) for ratios in self.mag_ratios]
        if not self.computed + self.reused:
            return figures
        try:
            with self._bypassed():
                args, kwargs = map_tensors(self.arguments, torch.empty_like)
                macs = macs_by_module(_OnMeta(model), *args, depth=99, **kwargs)
        except (NotImplementedError, RuntimeError, TypeError, ValueError) as error:
            logger.warning("%s: operations were not counted, %s", self.kind.slug, error)
            return figures
        whole = macs[""]
        ran = sum(
            count * share * (whole - sum(macs.get(f"model.{path}", 0) for path in paths))
            for (paths, share), count in self.executed.items()
        )
        figures["macs_full_call"] = whole
        figures["macs_saved"] = 1 - ran / (whole * (self.computed + self.reused))
        return figures


def _require_guidance_batch(arguments: dict[str, Any]) -> None:
    sample = Inputs.of(arguments).sample
    if sample.ndim < 4:
        raise ValueError(
            "FasterCache estimates the unconditional output from frequencies of a picture, but this model gets packed "
            f"tokens {tuple(sample.shape)}: set is_guidance_distilled=True to reuse attention only"
        )
    if sample.shape[0] % 2:
        raise ValueError(
            f"FasterCache expects unconditional and conditional inputs together, got a batch of {sample.shape[0]}: "
            "use guidance, or set is_guidance_distilled=True"
        )
    if tensors_in(arguments.get("added_cond_kwargs")):
        raise ValueError(
            "FasterCache cannot split added_cond_kwargs (sizes of PixArt's 1024 px models): set "
            "is_guidance_distilled=True to reuse attention only"
        )


@dataclass(frozen=True)
class UpstreamCache(MethodConfig):
    """Makes a config of `diffusers.hooks` usable with `apply`, `check` and `remove`.

    Args:
        config: `FirstBlockCacheConfig`, `TaylorSeerCacheConfig`, `MagCacheConfig`, `PyramidAttentionBroadcastConfig`,
            `FasterCacheConfig` or `SeaCacheConfig`.

    Raises:
        TypeError: Another class.
    """

    config: Any

    def __post_init__(self) -> None:
        if type(self.config) not in KINDS:
            known = ", ".join(kind.__name__ for kind in KINDS)
            raise TypeError(
                f"{type(self.config).__name__} of diffusers is not a method config of apply(); accepted: {known}"
            )

    @property
    def kind(self) -> Kind:
        return KINDS[type(self.config)]

    @property
    def method(self) -> MethodRecord:  # type: ignore[override]
        return self.kind.record

    def check(self, target: Any, num_inference_steps: int | None = None) -> tuple[str, ...]:
        model = denoiser_of(target)
        active = sorted({name for name in stateful_hooks(model) if not name.startswith(PREFIX)})
        if active or getattr(model, "is_cache_enabled", False):
            raise ValueError(
                f"{type(model).__name__} already has an active cache ({', '.join(active) or 'enable_cache'}): "
                "remove it first (handle.remove() or model.disable_cache())"
            )
        self._require_time(target)
        _require_signature(model)
        self._require_layout(model)
        bare = [m for m in model.modules() if not hasattr(m, "_diffusers_hook")]
        uninstall_hooks(install_hooks(model, self._resolved(model, _Clock(target, None)), self.kind), bare)
        return _warnings(self.config, self.kind, num_inference_steps) if num_inference_steps else ()

    def attach(self, target: Any) -> Attachment:
        model = denoiser_of(target)
        bare = [m for m in model.modules() if not hasattr(m, "_diffusers_hook")]
        clock = _Clock(target, getattr(self.config, "current_timestep_callback", None))
        config = self._resolved(model, clock)
        members = install_hooks(model, config, self.kind)
        try:
            root = _RootHook(config, self.kind, members, clock)
            undo = install(model, [(model, root)], _HOOK)
        except BaseException:
            uninstall_hooks(members, bare)
            raise

        def remove() -> None:
            root.reset_state(model)
            root.paused = True
            uninstall_hooks(members, [])
            undo()
            uninstall_hooks([], bare)

        return Attachment(remove, lambda: root.figures(model))

    def _resolved(self, model: torch.nn.Module, clock: _Clock) -> Any:
        """A copy of the config, which diffusers completes in place, with what the model asks for."""
        describe_transformer_blocks()
        config = copy.copy(self.config)
        if self.kind.needs_time:
            config.current_timestep_callback = clock
        if self.kind.needs_sigma and config.raw_vision_callback is None:
            config.raw_vision_callback = Vision(model, lambda: clock.factor)
        if isinstance(config, upstream.FasterCacheConfig):
            split = config._unconditional_conditional_input_kwargs_identifiers
            config._unconditional_conditional_input_kwargs_identifiers = [*split, "pooled_projections"]
        if isinstance(config, upstream.TaylorSeerCacheConfig) and not _names_of(config, model):
            config.cache_identifiers = [_ATTENTION]
        return config

    def _require_time(self, target: Any) -> None:
        given = getattr(self.config, "current_timestep_callback", None)
        scheduler = getattr(target, "scheduler", None)
        if self.kind.needs_time and given is None and scheduler is None:
            raise ValueError(
                f"{self.kind.title} needs to know the timestep: apply it to the pipeline, or set "
                "current_timestep_callback"
            )
        if self.kind.needs_sigma:
            require_noise_levels(scheduler)

    def _require_layout(self, model: torch.nn.Module) -> None:
        name = type(model).__name__
        if self.kind.needs_sigma and self.config.raw_vision_callback is None:
            require_known_input(model)
        if getattr(self.config, "use_lite_mode", False) and not hasattr(model, "proj_out"):
            raise ValueError(f"TaylorSeer's lite mode predicts the output of proj_out, which {name} does not have")
        splits = isinstance(self.config, upstream.FasterCacheConfig) and not self.config.is_guidance_distilled
        if splits and name == "DiTTransformer2DModel":
            raise ValueError(
                "FasterCache takes the second half of the batch for the conditional one, DiT's is the first: set "
                "is_guidance_distilled=True to reuse attention only"
            )


def _names_of(config: Any, model: torch.nn.Module) -> bool:
    """Does TaylorSeer have patterns that match something here?"""
    if config.use_lite_mode or config.cache_identifiers or config.skip_predict_identifiers:
        return True
    return any(path.endswith("attn") and "blocks" in path.split(".")[0] for path, _ in model.named_modules())


def _require_signature(model: torch.nn.Module) -> None:
    names = inspect.signature(model.forward).parameters
    if "timestep" not in names or not {"sample", "hidden_states"} & set(names):
        raise ValueError(
            f"{type(model).__name__} takes no `hidden_states` and `timestep`, by which runs are told apart: use "
            "diffusers' own enable_cache() with it"
        )
    if type(model).__name__ in _RISING:
        raise ValueError(
            f"{type(model).__name__} counts time upwards, where every step looks like the first one of another run: "
            "use diffusers' own enable_cache() with it"
        )


def _warnings(config: Any, kind: Kind, steps: int) -> tuple[str, ...]:
    """What a run of `steps` steps will not get out of the cache."""
    idle = steps < 2
    if isinstance(config, upstream.TaylorSeerCacheConfig):
        idle = idle or steps <= config.disable_cache_before_step or config.cache_interval == 1
    elif isinstance(config, upstream.SeaCacheConfig):
        idle = idle or steps <= config.retention_steps + config.cache_end_steps
    found = [f"{kind.slug}: none of {steps} steps can be reused"] if idle else []
    if isinstance(config, upstream.MagCacheConfig) and steps != config.num_inference_steps:
        found.append(
            f"mag-cache: num_inference_steps of its config is {config.num_inference_steps}, the run has {steps}: its "
            "ratios belong to other steps"
        )
    return tuple(found)
