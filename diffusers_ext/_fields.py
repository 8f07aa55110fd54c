"""Fields of a config hold what their annotations say: whole numbers, finite numbers, lists of them."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields
from numbers import Integral, Real
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints


_NAMES = {int: "whole numbers", float: "finite numbers", bool: "True or False", str: "text", NoneType: "None"}


def require_types(config: Any) -> None:
    """Raise `ValueError` unless every field of a dataclass holds what its annotation says.

    An `int` is a whole number, a `float` a finite one, neither of them a truth value; lists and tuples stand for each
    other. Classes other than these are not looked at.
    """
    hints = _hints(type(config))
    for field in fields(config):
        value, hint = getattr(config, field.name), hints[field.name]
        if not fits(value, hint):
            raise ValueError(f"{field.name} is {value!r}; accepted: {described(hint)}")


@functools.cache
def _hints(cls: type) -> dict[str, Any]:
    return get_type_hints(cls)


def fits(value: Any, hint: Any) -> bool:
    """Is `value` what an annotation says?"""
    kind, inner = get_origin(hint), get_args(hint)
    if kind in (Union, UnionType):
        return any(fits(value, one) for one in inner)
    if kind is Literal:
        return value in inner
    if hint is int or hint is float:
        numeric = isinstance(value, Integral if hint is int else Real) and not isinstance(value, bool)
        return numeric and math.isfinite(value)
    if hint in (bool, str, NoneType):
        return isinstance(value, hint)
    if kind is tuple and inner[-1] is not Ellipsis:
        return _is_list(value) and len(value) == len(inner) and all(map(fits, value, inner))
    if kind in (tuple, Sequence):
        return _is_list(value) and all(fits(item, inner[0]) for item in value)
    if kind is Mapping:
        return isinstance(value, Mapping) and all(fits(item, inner[1]) for item in value.values())
    return True


def _is_list(value: Any) -> bool:
    return isinstance(value, Iterable) and hasattr(value, "__len__") and not isinstance(value, (str, bytes, Mapping))


def described(hint: Any) -> str:
    """What an annotation accepts, in words."""
    kind, inner = get_origin(hint), get_args(hint)
    if kind in (Union, UnionType):
        return ", or ".join(described(one) for one in inner)
    if kind is Literal:
        return ", ".join(map(repr, inner))
    if kind is tuple and inner[-1] is not Ellipsis:
        return f"{len(inner)} {described(inner[0])}"
    if kind in (tuple, Sequence):
        return f"lists of {described(inner[0])}"
    if kind is Mapping:
        return f"a dictionary of {described(inner[1])}"
    return _NAMES.get(hint, getattr(hint, "__name__", str(hint)))
