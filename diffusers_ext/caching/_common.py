"""What every cache needs: where in a run a call is, state per prompt, hooks that leave no trace, resets."""

from __future__ import annotations

import inspect
import logging
import math
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

import torch
from diffusers.hooks import HookRegistry, ModelHook
from diffusers.hooks.hooks import BaseState, StateManager

from ..apply import NO_COPIES
from ..eval.macs import count_macs


logger = logging.getLogger(__name__)
PREFIX = "diffusers_ext."
_RESET = "_reset_stateful_cache"
_SAMPLE = ("sample", "hidden_states")
_CONDITIONING = (
    "encoder_hidden_states",
    "pooled_projections",
    "class_labels",
    "added_cond_kwargs",
    "added_time_ids",
)
S = TypeVar("S")


def map_tensors(value: Any, function: Callable[[torch.Tensor], Any]) -> Any:
    """`function` on every tensor inside tuples, lists and dicts; anything else is passed through."""
    if isinstance(value, torch.Tensor):
        return function(value)
    if isinstance(value, (tuple, list)):
        return type(value)(map_tensors(item, function) for item in value)
    if isinstance(value, dict):
        return {key: map_tensors(item, function) for key, item in value.items()}
    return value


def distinct_tensors(value: Any, function: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """`map_tensors` that keeps a tensor that occurs twice one, as parents write into blocks' last outputs."""
    known: list[tuple[torch.Tensor, torch.Tensor]] = []  # compared by `is`, which compiles without a graph break

    def once(tensor: torch.Tensor) -> torch.Tensor:
        for before, result in known:
            if before is tensor:
                return result
        known.append((tensor, function(tensor)))
        return known[-1][1]

    return map_tensors(value, once)


def tensors_in(value: Any) -> list[torch.Tensor]:
    """All tensors inside tuples, lists and dicts, in order."""
    found: list[torch.Tensor] = []
    map_tensors(value, found.append)
    return found


def outlines(value: Any) -> Any:
    """The same tuples, lists and dicts with tensors on the meta device: shapes and types without numbers."""
    return map_tensors(value, lambda t: torch.empty_like(t, device="meta"))


def macs_on_meta(model: torch.nn.Module, arguments: tuple[tuple, dict]) -> int:
    """MACs of one call of `model` with the shapes of `arguments` = (args, kwargs), counted on the meta device."""
    state = outlines({**dict(model.named_parameters()), **dict(model.named_buffers())})
    args, kwargs = outlines(arguments)
    return count_macs(torch.func.functional_call, model, state, args, kwargs)


def macs_or_warning(count: Callable[[torch.nn.Module], dict[str, int]], model: torch.nn.Module) -> dict[str, int]:
    """`count(model)`, or nothing with a warning for models that cannot run on the meta device (offloaded ones)."""
    try:
        return count(model)
    except (NotImplementedError, RuntimeError, TypeError, ValueError) as error:
        logger.warning("operations were not counted: %s", error)
        return {}


def _memory(tensor: torch.Tensor) -> tuple:
    """Equal for two tensors only if they are the same, unmodified numbers. Valid while one of them is kept alive."""
    version = 0 if tensor.is_inference() else tensor._version
    place = (tensor.untyped_storage().data_ptr(), tensor.storage_offset(), tensor.stride())
    return place, tuple(tensor.shape), tensor.dtype, tensor.device, version


@dataclass
class Inputs:
    """The arguments of a denoiser call that decide which cached state belongs to it."""

    sample: torch.Tensor
    timestep: torch.Tensor | float
    conditioning: list[torch.Tensor]

    @classmethod
    def of(cls, arguments: Mapping[str, Any]) -> Inputs:
        """Read them from the bound arguments of a UNet's or transformer's forward."""
        sample = next(arguments[name] for name in _SAMPLE if name in arguments)
        conditioning = tensors_in([arguments.get(name) for name in _CONDITIONING])
        return cls(sample, arguments["timestep"], conditioning)

    @property
    def time(self) -> float:
        t = self.timestep
        return float(t.max()) if isinstance(t, torch.Tensor) else float(t)

    @property
    def schedule(self) -> torch.Tensor | None:
        """The timestep if it is a view into a longer schedule, as in `for t in scheduler.timesteps`."""
        t = self.timestep
        is_view = isinstance(t, torch.Tensor) and t.ndim == 0 and t.untyped_storage().nbytes() > t.element_size()
        return t if is_view else None

    def key(self) -> Hashable:
        x = self.sample
        return tuple(x.shape), x.dtype, x.device, tuple(_memory(t) for t in self.conditioning)


@dataclass
class _Context(Generic[S]):
    state: S
    kept_alive: list[torch.Tensor]
    calls: int = 0
    tick: int = 0


@dataclass(frozen=True)
class Position(Generic[S]):
    """Where a denoiser call is: its step in the run (from 0) and the state that belongs to its kind of call."""

    step: int
    state: S


@dataclass
class RunTracker(Generic[S]):
    """Tells which step of which run a denoiser call is, and keeps one state per kind of call.

    Steps are counted, never looked up by timestep value: duplicated and fractional timesteps are fine. Conditional and
    unconditional calls are told apart by the memory of their conditioning tensors (and by diffusers' cache context
    where a pipeline sets one); several calls at one timestep (Heun, perturbed guidance, tiles) by their order. None
    of them ever sees the state of another. All state is dropped when the timestep increases, the timesteps belong to
    another schedule, or `reset` is called. A kind of call starts afresh when its sample shape, dtype, device or
    conditioning change, or when it sat out a step.

    Args:
        new_state: Makes the state of one kind of call.
    """

    new_state: Callable[[], S]
    runs: int = 0
    _contexts: dict[Hashable, _Context[S]] = field(default_factory=dict)
    _at_this_time: Counter = field(default_factory=Counter)
    _time: float | None = None
    _schedule: torch.Tensor | None = None
    _tick: int = 0

    @property
    def run_step(self) -> int:
        """Timesteps of this run before the current one, whichever kind of call saw them."""
        return self._tick

    @property
    def time(self) -> float | None:
        """Timestep of the current call as the denoiser got it, None before the first."""
        return self._time

    def reset(self) -> None:
        """Forget the run."""
        self._contexts.clear()
        self._at_this_time.clear()
        self._time, self._schedule, self._tick = None, None, 0

    def begin(self, inputs: Inputs, name: Hashable = None) -> Position[S]:
        """Register a call. `name` tells kinds of calls apart where the caller knows them, e.g. a cache context."""
        time = inputs.time
        if self._is_new_run(time, inputs.schedule):
            self.reset()
        if self._time is None:
            self.runs += 1
        elif time != self._time:
            self._advance()
        self._time, self._schedule = time, inputs.schedule
        kind = (name, inputs.key())
        key = (kind, self._at_this_time[kind])
        self._at_this_time[kind] += 1
        context = self._contexts.get(key)
        if context is None:
            context = self._contexts[key] = _Context(self.new_state(), inputs.conditioning)
        context.calls += 1
        context.tick = self._tick
        return Position(context.calls - 1, context.state)

    def _is_new_run(self, time: float, schedule: torch.Tensor | None) -> bool:
        if self._time is None:
            return False
        if time > self._time:
            return True
        before = self._schedule
        if schedule is None or before is None:
            return False
        return schedule.untyped_storage().data_ptr() != before.untyped_storage().data_ptr()

    def _advance(self) -> None:
        """A new timestep: kinds of calls that did not happen at the one before have gone stale."""
        self._contexts = {key: c for key, c in self._contexts.items() if c.tick == self._tick}
        self._at_this_time.clear()
        self._tick += 1


class RunHook(ModelHook, Generic[S]):
    """Root hook of a cache: announces each call to `begin_call` and `end_call`, resets when anything goes wrong.

    Subclasses decide in `begin_call(position)` or `run`, look back in `end_call()`, and let go of what belongs to one
    call in `release()`. `reset_state` runs at the end of a pipeline call.
    """

    _is_stateful = True

    def __init__(self, tracker: RunTracker[S]):
        super().__init__()
        self.tracker = tracker
        self.cache_context = StateManager(BaseState)
        self.paused = False

    def initialize_hook(self, module: torch.nn.Module) -> torch.nn.Module:
        self._signature = inspect.signature(module.forward)
        return module

    def begin_call(self, position: Position[S]) -> None:
        """Called before every call with its place in the run."""

    def end_call(self) -> None:
        """Called after every call that succeeded."""

    def release(self) -> None:
        """Called after `end_call`, when a run is forgotten and behind `aside`: nothing of a call may stay."""

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Calls inside pass this hook by, for counting operations; afterwards nothing of them stays."""
        paused, self.paused = self.paused, True
        try:
            yield
        finally:
            self.paused = paused
            self.release()

    # Not recursive: the decision stays outside of compiled graphs, the model's own forward is still compiled.
    @torch.compiler.disable(recursive=False)
    def new_forward(self, module: torch.nn.Module, *args, **kwargs):
        if self.paused:
            return self.fn_ref.original_forward(*args, **kwargs)
        try:
            self._begin(args, kwargs)
            output = self.run(args, kwargs)
            self._end()
        except BaseException:
            self.reset_state(module)
            raise
        return output

    @torch.compiler.disable(recursive=False)
    def run(self, args: tuple, kwargs: dict) -> Any:
        """The call itself; subclasses may change its inputs or leave it out."""
        return self.fn_ref.original_forward(*args, **kwargs)

    @torch.compiler.disable
    def _begin(self, args: tuple, kwargs: dict) -> None:
        context = self.cache_context._context
        inputs = Inputs.of(self._signature.bind(*args, **kwargs).arguments)
        runs = self.tracker.runs
        position = self.tracker.begin(inputs, context.name if context else None)
        if self.tracker.runs != runs:
            self.begin_run(args, kwargs)
        self.begin_call(position)

    @torch.compiler.disable
    def _end(self) -> None:
        self.end_call()
        self.release()

    def begin_run(self, args: tuple, kwargs: dict) -> None:
        """Called before the first call of every run, with its arguments."""

    def reset_state(self, module: torch.nn.Module) -> torch.nn.Module:
        self.release()
        self.tracker.reset()
        return module

    def retire(self, module: torch.nn.Module) -> None:
        """Forget the run and pass calls through: what another tool has wrapped may outlive its removal."""
        self.reset_state(module)
        self.paused = True


class _Single:
    """Refuses to be copied. A copied module would run diffusers' hooks, and with them the original's weights."""

    def __deepcopy__(self, memo: dict) -> _Single:
        raise RuntimeError(NO_COPIES)


def install(
    model: torch.nn.Module, hooks: Iterable[tuple[torch.nn.Module, ModelHook]], name: str
) -> Callable[[], None]:
    """Register hooks under `name` and wire the end-of-run reset. All or nothing. Until undone, copying is refused.

    Returns:
        Function that takes them off and leaves every module as it was.
    """
    done: list[tuple[torch.nn.Module, ModelHook]] = []

    def undo() -> None:
        retired = list(done)
        while done:
            unregister(done.pop()[0], name)
        if not stateful_hooks(model):
            model.__dict__.pop(_RESET, None)
        if hasattr(model, "_diffusers_hook"):
            model._diffusers_hook.invalidate_child_registries_cache()
        for module, hook in retired:
            if isinstance(hook, RunHook):
                hook.retire(module)

    try:
        for module, hook in hooks:
            hook.single = _Single()  # type: ignore[attr-defined]
            HookRegistry.check_if_exists_or_initialize(module).register_hook(hook, name)
            done.append((module, hook))
            _keep_outermost(module)
        if not hasattr(model, _RESET):
            registry = HookRegistry.check_if_exists_or_initialize(model)
            model.__dict__[_RESET] = registry.reset_stateful_hooks
        HookRegistry.check_if_exists_or_initialize(model).invalidate_child_registries_cache()
    except BaseException:
        undo()
        raise
    return undo


def _keep_outermost(module: torch.nn.Module) -> None:
    """Let hooks with `outermost` stay around those of other methods, in whatever order they are applied."""
    registry = HookRegistry.check_if_exists_or_initialize(module)
    for name, hook in list(registry.hooks.items()):
        if getattr(hook, "outermost", False) and name != registry._hook_order[-1]:
            unregister(module, name)
            registry.register_hook(hook, name)


def is_innermost(module: torch.nn.Module, hook: ModelHook) -> bool:
    """Is the module's own forward what this hook calls, and not another hook that may stand in for it?"""
    return next(iter(module._diffusers_hook.hooks.values())) is hook


def unregister(module: torch.nn.Module, name: str) -> None:
    """Take one hook off a module, whatever was registered after it; the last one leaves no trace."""
    registry: HookRegistry = module._diffusers_hook
    index = registry._hook_order.index(name)
    ours = registry._fn_refs[index]
    later = registry._fn_refs[index + 1] if index + 1 < len(registry._fn_refs) else None
    later_forward = later.forward if later else None
    registry.remove_hook(name, recurse=False)
    if later is not None and later.original_forward is not None:
        # remove_hook() links the later hook past its own new_forward; keep that one and move its origin instead.
        origin = ours.forward if ours.original_forward is None else ours.original_forward
        later.forward, later.original_forward = later_forward, origin
    if not registry.hooks:
        del module._diffusers_hook
        if getattr(module.__dict__.get("forward"), "__func__", None) is type(module).forward:
            del module.forward


def stateful_hooks(model: torch.nn.Module) -> list[str]:
    """Names of all hooks on a model that keep something between calls: the marks of an active cache."""
    registries = (m._diffusers_hook for m in model.modules() if hasattr(m, "_diffusers_hook"))
    return [name for registry in registries for name, hook in registry.hooks.items() if hook._is_stateful]


def steps_of(target: Any) -> int | None:
    """Steps of the run that a pipeline is about to start, from its scheduler; None for a model without one."""
    scheduler = getattr(target, "scheduler", None)
    if scheduler is None:
        return None
    left = len(scheduler.timesteps) - (getattr(scheduler, "begin_index", None) or 0)
    return math.ceil(left / getattr(scheduler, "order", 1))


def places_of(target: Any, time: float) -> list[int]:
    """Indices of a timestep, as the denoiser gets it, in the scheduler of a pipeline; none for a model without one."""
    scheduler = getattr(target, "scheduler", None)
    if getattr(scheduler, "timesteps", None) is None:
        return []
    times = scheduler.timesteps.double()
    if time <= 1 < times.max():  # Flux and its relatives get times from 0 to 1, in float32
        length = getattr(getattr(scheduler, "config", None), "num_train_timesteps", 1000)
        found = ((times / length - time).abs() < 1e-6).nonzero().flatten().tolist()
        if found:
            return found
    return (times == time).nonzero().flatten().tolist()


def place_of(target: Any, time: float) -> int | None:
    """Index of a timestep in the scheduler of a pipeline; None where it is not in there exactly once."""
    found = places_of(target, time)
    return found[0] if len(found) == 1 else None


def steps_left(target: Any, time: float) -> int | None:
    """Steps of a run that starts at this timestep; None for a model without a scheduler."""
    place = place_of(target, time)
    if place is None:
        return steps_of(target)
    return math.ceil((len(target.scheduler.timesteps) - place) / getattr(target.scheduler, "order", 1))


def refuse_other_caches(model: torch.nn.Module) -> None:
    """Raise `ValueError` if a cache that is not ours is active on the model."""
    foreign = sorted({name for name in stateful_hooks(model) if not name.startswith(PREFIX)})
    if getattr(model, "is_cache_enabled", False) or foreign:
        active = type(getattr(model, "_cache_config", None)).__name__ if not foreign else ", ".join(foreign)
        raise ValueError(
            f"{type(model).__name__} already has an active cache of diffusers ({active}): call model.disable_cache(), "
            "or remove its hooks, first"
        )


def refuse_fused_qkv(model: torch.nn.Module) -> None:
    """Raise `ValueError` if the attention projections are fused."""
    if any(getattr(module, "fused_projections", False) for module in model.modules()):
        raise ValueError(
            f"{type(model).__name__} has fused QKV projections, which replace its attention processors: "
            "call unfuse_qkv_projections() first"
        )
