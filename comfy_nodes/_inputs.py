"""Inputs that several nodes have."""

from __future__ import annotations

from comfy_api.latest import io


def seed_input(tooltip: str, largest: int = 2**63 - 1) -> io.Int.Input:
    """A seed that stays as it is from run to run."""
    fixed = io.ControlAfterGenerate.fixed
    return io.Int.Input("seed", default=0, min=0, max=largest, control_after_generate=fixed, tooltip=tooltip)


def name_input(default: str = "my-model") -> io.String.Input:
    """Under which name a result is saved; for `_files.SavedFiles.new`."""
    return io.String.Input("name", default=default, tooltip="File name without folder or extension.")
