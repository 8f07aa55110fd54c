"""Fixing the timesteps of a scheduler of diffusers, exactly and removably."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Mapping
from fractions import Fraction
from typing import TYPE_CHECKING, Any

import torch
from diffusers import DDIMScheduler

from ..prediction import NoiseSchedule
from ._common import NoiseLevelScheduler


if TYPE_CHECKING:
    from .autodiffusion import ScheduleSearchResult

_STATE = "_searched_schedule"


def apply_schedule(scheduler: Any, result: ScheduleSearchResult) -> Any:
    """Make a scheduler visit the timesteps of a search result, whatever pipeline drives it.

    The scheduler is changed in place: it takes exactly as many steps as the result has, its noise levels (and what a
    multistep solver derives from them) follow the irregular list, and the end of the run stays as it was. The saved
    config does not change; `remove_schedule` undoes it.

    Args:
        scheduler: DDIM, or any scheduler of diffusers or of this package with one model call per step that takes
            `timesteps` or works on `sigmas` (DPM-Solver++, UniPC, Euler, DEIS, LMS, FlowMatchEuler, ...).
        result: Result of a search, or one with your own `timesteps`.

    Returns:
        The same scheduler.

    Raises:
        ValueError: The scheduler cannot visit a list of timesteps, or has other noise levels than those of the
            search.

    Example:
        >>> apply_schedule(pipe.scheduler, ScheduleSearchResult.load("four-steps.json"))
        >>> image = pipe("a red circle", num_inference_steps=4).images[0]
    """
    remove_schedule(scheduler)
    _require_support(scheduler)
    _require_levels(scheduler, result)
    before = dict(scheduler.__dict__)
    scheduler.__class__ = _fixed(type(scheduler))
    setattr(scheduler, _STATE, result)
    try:
        scheduler.set_timesteps(len(result.timesteps))
        visited = [float(t) for t in scheduler.timesteps]
        if visited != [float(t) for t in result.timesteps]:
            raise ValueError(f"{type(scheduler).__name__} visits {visited} in place of {list(result.timesteps)}")
    except BaseException:
        scheduler.__class__ = type(scheduler)._parent
        scheduler.__dict__.clear()
        scheduler.__dict__.update(before)
        raise
    return scheduler


def remove_schedule(scheduler: Any) -> Any:
    """Undo `apply_schedule`; does nothing to other schedulers. Returns the scheduler."""
    if _STATE in scheduler.__dict__:
        delattr(scheduler, _STATE)
        scheduler.__class__ = type(scheduler)._parent
    return scheduler


def _require_support(scheduler: Any) -> None:
    cls = type(scheduler)
    single = getattr(scheduler, "order", 1) == 1
    listed = "timesteps" in inspect.signature(cls.set_timesteps).parameters
    known = isinstance(scheduler, DDIMScheduler) or listed or hasattr(scheduler, "_step_index")
    if not (single and known):
        raise ValueError(
            f"{cls.__name__} cannot visit a list of timesteps with one model call each; use DDIM, DPM-Solver++, "
            "UniPC, Euler or FlowMatchEuler"
        )


def _require_levels(scheduler: Any, result: ScheduleSearchResult) -> None:
    """The noise levels of the search must be those of this scheduler's model."""
    if not result.timesteps:
        raise ValueError("this result has no timesteps: run a search, or load one")
    schedule = NoiseSchedule.from_scheduler(scheduler)
    for t, wanted in zip(result.timesteps, result.sigmas):
        alpha, sigma = schedule.levels(schedule.log_snr(torch.tensor(float(t))))
        here = float(sigma if schedule.family == "flow" else sigma / alpha)
        if abs(here - wanted) > 0.02 * wanted:
            raise ValueError(
                f"this schedule was searched for a model whose timestep {t} has noise level {wanted:.4g}; with "
                f"{type(scheduler).__name__} it has {here:.4g}: search one for this model"
            )


@functools.cache
def _fixed(cls: type) -> type:
    """Subclass of a scheduler class that visits a stored list. Bears its name, so that pipelines save the parent."""
    upstream = inspect.signature(cls.set_timesteps)

    @functools.wraps(cls.set_timesteps)  # pipelines look at the signature
    def set_timesteps(self, *args, **kwargs):
        result = self.__dict__.get(_STATE)
        given = upstream.bind(self, *args, **kwargs).arguments
        if result is None:  # a scheduler made from this one's config
            return cls.set_timesteps(self, *args, **kwargs)
        _require_count(given, len(result.timesteps))
        if isinstance(self, DDIMScheduler):
            cls.set_timesteps(self, len(result.timesteps), device=given.get("device"))
            self.timesteps = torch.tensor(result.timesteps, dtype=torch.int64, device=given.get("device"))
        elif _takes_timesteps(self, upstream.parameters):
            cls.set_timesteps(self, timesteps=list(result.timesteps), device=given.get("device"))
        else:
            _overwrite(self, cls, upstream.parameters, given, result)

    members: dict[str, Any] = {"set_timesteps": set_timesteps, "_parent": cls}
    if issubclass(cls, DDIMScheduler):
        members["step"] = _ddim_step(cls)
    named = {"__module__": cls.__module__, "__qualname__": cls.__qualname__, "__doc__": cls.__doc__}
    return type(cls.__name__, (cls,), {**members, **named})


def _require_count(given: Mapping[str, Any], count: int) -> None:
    for name in ("num_inference_steps", "sigmas", "timesteps"):
        value = given.get(name)
        asked = value if name == "num_inference_steps" else None if value is None else len(value)
        if asked is not None and asked != count:
            raise ValueError(f"{asked} steps are asked for, but this scheduler has a searched schedule of {count}")


def _takes_timesteps(scheduler: Any, parameters: Mapping[str, Any]) -> bool:
    if "timesteps" not in parameters:
        return False
    # diffusers' flow schedulers would shift the levels of given timesteps, or ignore them
    return isinstance(scheduler, NoiseLevelScheduler) or NoiseSchedule.from_scheduler(scheduler).family != "flow"


def _overwrite(scheduler: Any, cls: type, parameters: Mapping[str, Any], given: Mapping[str, Any], result) -> None:
    """Let the scheduler start a run of as many steps, then put the searched levels in place of its own."""
    passed: dict[str, Any] = {"device": given.get("device")}
    if "mu" in parameters and scheduler.config.get("use_dynamic_shifting"):
        passed["mu"] = given.get("mu") or 1.0  # demanded, but the levels it shifts are replaced
    cls.set_timesteps(scheduler, len(result.timesteps), **passed)
    old = scheduler.sigmas
    levels = torch.tensor(result.sigmas[: len(result.timesteps)], dtype=old.dtype, device=old.device)
    scheduler.sigmas = torch.cat([levels, old[-1:]])
    times = scheduler.timesteps
    scheduler.timesteps = torch.tensor(result.timesteps, dtype=torch.float64).to(times.device, times.dtype)


def _ddim_step(cls: type):
    @functools.wraps(cls.step)
    def step(self, model_output, timestep, *args, **kwargs):
        result = self.__dict__.get(_STATE)
        if result is None:
            return cls.step(self, model_output, timestep, *args, **kwargs)
        times = [*result.timesteps, -1]
        i = times.index(int(timestep))
        # DDIM finds the next timestep as t - training steps // inference steps: this quotient is the gap, exactly
        self.num_inference_steps = Fraction(self.config.num_train_timesteps, int(times[i] - times[i + 1]))
        try:
            return cls.step(self, model_output, timestep, *args, **kwargs)
        finally:
            self.num_inference_steps = len(result.timesteps)

    return step
