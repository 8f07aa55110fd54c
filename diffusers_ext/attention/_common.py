"""What methods for other picture sizes share: the length of a run that begins anywhere in its schedule."""

from __future__ import annotations

import math
from typing import Any

from ..caching._common import places_of, steps_of


def run_length(target: Any, time: float) -> int | None:
    """Steps of the run of a pipeline that begins at this timestep; None for a model without a scheduler."""
    scheduler = getattr(target, "scheduler", None)
    if scheduler is None:
        return None
    found = places_of(target, time)
    if not found:
        return steps_of(target)
    return math.ceil((len(scheduler.timesteps) - found[0]) / getattr(scheduler, "order", 1))
