"""Inputs that several nodes have."""

from __future__ import annotations

from comfy_api.latest import io


def seed_input(tooltip: str, largest: int = 2**63 - 1) -> io.Int.Input:
    """A seed that stays as it is from run to run."""
    fixed = io.ControlAfterGenerate.fixed
    return io.Int.Input("seed", default=0, min=0, max=largest, control_after_generate=fixed, tooltip=tooltip)


def forecast_input(largest: int = 2) -> io.Float.Input:
    """What a cache gives in place of what it does not compute."""
    three = ", 2 of three" if largest == 2 else ""
    return io.Float.Input(
        "forecast_order",
        default=0.0,
        min=0.0,
        max=float(largest),
        step=0.05,
        optional=True,
        tooltip="What stands in for what is not computed: 0 repeats the last full step; 1 continues the trend of the "
        f"last two{three}. In between, a part of it. 0.5 to 1 is much closer with samplers that add no noise; leave "
        "0 for ancestral and SDE ones.",
    )


def name_input(default: str = "my-model") -> io.String.Input:
    """Under which name a result is saved; for `_files.SavedFiles.new`."""
    return io.String.Input("name", default=default, tooltip="File name without folder or extension.")
