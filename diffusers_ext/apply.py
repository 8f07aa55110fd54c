"""`apply(target, *configs)`: put methods on a pipeline or model, take them off again, ask beforehand whether they fit.

A method that is applied (cache, attention, guidance...) is a frozen dataclass that derives from `MethodConfig` and
implements two things: `check` (may it run here?) and `attach` (do it, return the undo).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import TYPE_CHECKING, Any, ClassVar

from .registry import MethodRecord, get_method, unknown


if TYPE_CHECKING:
    import torch

__all__ = ["Applied", "Attachment", "MethodConfig", "Preflight", "apply", "check", "denoiser_of", "remove"]

logger = logging.getLogger(__name__)
_ACTIVE = "_diffusers_ext_active"
NO_COPIES = (
    "a model with methods on it cannot be copied, as the copy would share them with the original: remove methods "
    "before copying (handle.remove() or diffusers_ext.remove(target)) and apply them to each"
)


def denoiser_of(target: Any) -> torch.nn.Module:
    """The UNet or transformer of a pipeline; a model is returned as it is, or as it was before `torch.compile`.

    Args:
        target: `DiffusionPipeline` with a `unet` or `transformer`, or the model itself.
    """
    from torch import nn  # here, so that importing the package loads no torch

    for model in (target, getattr(target, "unet", None), getattr(target, "transformer", None)):
        if isinstance(model, nn.Module):
            return getattr(model, "_orig_mod", model)
    raise TypeError(
        f"cannot apply a method to {type(target).__name__}: give a diffusers pipeline with a `unet` or `transformer`, "
        "or the model itself"
    )


@dataclass(frozen=True)
class Attachment:
    """What `MethodConfig.attach` returns: how to undo it and what it has measured so far.

    Args:
        remove: Restores the target bit-exactly.
        summary: Figures of the last run, e.g. `{"steps": 50, "reused": 40}`.
    """

    remove: Callable[[], None]
    summary: Callable[[], Mapping[str, Any]] = dict


class MethodConfig:
    """Base of every config that `apply` accepts. Subclasses are frozen dataclasses usable without arguments."""

    method: ClassVar[MethodRecord]

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON, with the method's slug under `"method"`."""
        return {"method": self.method.slug, **asdict(self)}  # type: ignore[call-overload]

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> MethodConfig:
        """The config that `to_dict` described; on `MethodConfig` itself, of whichever method it names.

        Raises:
            ValueError: Unknown method, another method's values, or fields that the config does not have.
        """
        given = dict(values)
        slug = given.pop("method", None)
        if cls is MethodConfig:
            cls = get_method(slug).public
        elif slug not in (None, cls.method.slug):
            raise ValueError(f"these values describe {slug!r}, not {cls.method.slug!r}; use MethodConfig.from_dict")
        known = [f.name for f in fields(cls)]  # type: ignore[arg-type]
        for name in given:
            if name not in known:
                raise ValueError(unknown(f"field of {cls.__name__}", name, known))
        return cls(**given)

    def check(self, target: Any, num_inference_steps: int | None = None) -> tuple[str, ...]:
        """Raise `ValueError`/`TypeError` if the method cannot run on `target`; return warnings otherwise."""
        return ()

    def attach(self, target: Any) -> Attachment:
        """Install the method. On failure the target must be as before."""
        raise NotImplementedError(f"{type(self).__name__} does not implement attach()")


@dataclass(frozen=True)
class Preflight:
    """Answer of `check`: `ok`, and what was found."""

    errors: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        return not self.errors

    def __bool__(self) -> bool:
        return self.ok


@dataclass
class Applied:
    """Handle on applied methods. A context manager: leaving the block removes them.

    Example:
        >>> with diffusers_ext.apply(pipe, diffusers_ext.DeepCacheConfig(cache_interval=3)) as handle:
        ...     image = pipe("a red circle").images[0]
        ...     print(handle.summary())
    """

    target: Any
    model: torch.nn.Module
    attachments: list[tuple[MethodConfig, Attachment]] = field(default_factory=list)

    def remove(self) -> None:
        """Take the methods off, last one first. Calling it again does nothing."""
        while self.attachments:
            config, attachment = self.attachments.pop()
            _forget(self.model, config)
            attachment.remove()

    def summary(self) -> dict[str, dict[str, Any]]:
        """Figures of the last run by method slug."""
        return {config.method.slug: dict(attachment.summary()) for config, attachment in self.attachments}

    def __deepcopy__(self, memo: dict) -> Applied:
        raise RuntimeError(NO_COPIES)

    def __enter__(self) -> Applied:
        return self

    def __exit__(self, *exc_info) -> None:
        self.remove()


def _active(model: torch.nn.Module) -> list[tuple[MethodConfig, Applied]]:
    return model.__dict__.get(_ACTIVE, [])


def _forget(model: torch.nn.Module, config: MethodConfig) -> None:
    left = [(c, a) for c, a in _active(model) if c is not config]
    if left:
        model.__dict__[_ACTIVE] = left
    else:
        model.__dict__.pop(_ACTIVE, None)


def _conflict(config: MethodConfig, others: list[MethodConfig]) -> str | None:
    mine = config.method
    for other in (c.method for c in others):
        if other.slug == mine.slug and mine.kind != "adapter":  # adapters of one kind differ by their weights
            return f"{mine.slug} is already applied to this model: remove it first (handle.remove() or remove(target))"
        if other.slug in mine.conflicts or mine.slug in other.conflicts:
            return f"{mine.slug} cannot be combined with {other.slug}, which is active: remove one of them"
    return None


def _adopted(config: Any) -> Any:
    """Configs of diffusers' own caches enter through an adapter; anything else stays as it is."""
    if not type(config).__module__.startswith("diffusers.hooks."):
        return config
    from .caching._upstream import UpstreamCache

    return UpstreamCache(config)


def _checked(config: MethodConfig, target: Any, others: list[MethodConfig], steps: int | None) -> tuple[str, ...]:
    if not isinstance(config, MethodConfig) or not hasattr(config, "method"):
        raise TypeError(
            f"{config!r} is not a method config; pass objects such as DeepCacheConfig() "
            "(diffusers_ext.list_methods() shows all)"
        )
    problem = _conflict(config, others)
    if problem:
        raise ValueError(problem)
    return config.check(target, num_inference_steps=steps)


def check(target: Any, *configs: MethodConfig, num_inference_steps: int | None = None) -> Preflight:
    """Would `apply(target, *configs)` work? Nothing is changed.

    Args:
        target: Pipeline or model.
        configs: Method configs, in the order they would be applied; those of diffusers' own caches too.
        num_inference_steps: Steps of the planned run; lets methods warn when it has too few to help.

    Returns:
        `Preflight` with `ok`, `errors` and `warnings`.
    """
    errors: list[str] = []
    warnings: list[str] = []
    others = [c for c, _ in _active(denoiser_of(target))]
    for config in configs:
        try:
            config = _adopted(config)
            warnings += _checked(config, target, others, num_inference_steps)
            others.append(config)
        except (ValueError, TypeError) as error:
            errors.append(str(error))
    return Preflight(tuple(errors), tuple(warnings))


def apply(target: Any, *configs: MethodConfig, num_inference_steps: int | None = None) -> Applied:
    """Put one or more methods on a pipeline or model.

    Args:
        target: `DiffusionPipeline`, UNet or transformer.
        configs: Method configs, and those of diffusers' own caches (`FirstBlockCacheConfig`, ...); applied in this
            order, removed in reverse.
        num_inference_steps: Steps of the planned run, for the same warnings as `check`.

    Returns:
        `Applied` handle with `.remove()` and `.summary()`; also a context manager.

    Raises:
        ValueError: Unsupported model, conflicting or repeated method. The target is left untouched.
        TypeError: Not a method config, or not a pipeline or model.
    """
    model = denoiser_of(target)
    handle = Applied(target, model)
    try:
        for config in map(_adopted, configs):
            others = [c for c, _ in _active(model)]
            for warning in _checked(config, target, others, num_inference_steps):
                logger.warning(warning)
            handle.attachments.append((config, config.attach(target)))
            model.__dict__[_ACTIVE] = [*_active(model), (config, handle)]
    except BaseException:
        handle.remove()
        raise
    return handle


def remove(target: Any) -> None:
    """Take every method of this package off `target` (last applied first)."""
    model = denoiser_of(target)
    while _active(model):
        _active(model)[-1][1].remove()
