"""What SeaCache looks at: the noisy picture of a call, and its noise level as flow matching counts it."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch

from .._flux_tokens import unpack
from ..prediction import NoiseSchedule
from ._common import Inputs


# Arguments that tell the sizes of packed tokens in a way of the model's own (QwenImage, LTX).
_SIZES_APART = ("img_shapes", "num_frames")
_ADVICE = "set raw_vision_callback in its config to a function (module, args, kwargs) -> list of latents [C, T, H, W]"


def is_flow(scheduler: Any) -> bool:
    """Does a scheduler step along straight lines, x = (1 - sigma) x0 + sigma noise?"""
    config = getattr(scheduler, "config", {})
    return (
        "FlowMatch" in type(scheduler).__name__
        or config.get("prediction_type") == "flow_prediction"
        or bool(config.get("use_flow_sigmas"))
    )


def noise_levels(scheduler: Any, timestep: float) -> tuple[float, float]:
    """Flow-matching sigma with the signal-to-noise ratio of a timestep, and what turns the model's input into flow's.

    With alpha^2 + sigma^2 = 1 (DDIM, DPM-Solver), x = alpha x0 + sigma noise is a flow-matching sample times
    alpha + sigma, at the level sigma / (alpha + sigma).

    Args:
        scheduler: For flow matching, or with `alphas_cumprod`.
        timestep: In the scheduler's units.
    """
    log_snr = NoiseSchedule.from_scheduler(scheduler).log_snr(torch.tensor(timestep))
    level = float(torch.sigmoid(-log_snr))
    return level, 1.0 if is_flow(scheduler) else (level**2 + (1 - level) ** 2) ** 0.5


def require_noise_levels(scheduler: Any) -> None:
    """Raise `ValueError` unless `noise_levels` can tell those of a scheduler."""
    if scheduler is None:
        raise ValueError("SeaCache needs to know step and noise level: apply it to the pipeline, not to its model")
    if not is_flow(scheduler) and not hasattr(scheduler, "alphas_cumprod"):
        raise ValueError(
            f"SeaCache needs a flow-matching scheduler or one with alphas_cumprod; {type(scheduler).__name__} is "
            "neither: use FlowMatchEulerDiscreteScheduler, DDIMScheduler or DPMSolverMultistepScheduler, for example"
        )


def require_known_input(model: torch.nn.Module) -> None:
    """Raise `ValueError` if a model takes its picture in a form that `Vision` cannot read."""
    own = [name for name in _SIZES_APART if name in inspect.signature(model.forward).parameters]
    if own:
        raise ValueError(
            f"SeaCache compares pictures, which {type(model).__name__} gets as packed tokens with their sizes in "
            f"{own[0]}: {_ADVICE}"
        )


class Vision:
    """Stands in for SeaCache's `raw_vision_callback`, of which diffusers has one for video models only.

    Args:
        model: Transformer that takes latents `[n, c, h, w]` or `[n, c, f, h, w]`, or tokens `[n, l, c]` and `img_ids`.
        factor: What the model's input has to be multiplied by at present; see `noise_levels`.
    """

    def __init__(self, model: torch.nn.Module, factor: Callable[[], float]):
        self.signature = inspect.signature(type(model).forward)
        config, self.name, self.factor = model.config, type(model).__name__, factor
        self.channels = config.in_channels
        self.own = getattr(config, "out_channels", None) or config.in_channels

    def __call__(self, module: torch.nn.Module, args: tuple, kwargs: dict[str, Any]) -> list[torch.Tensor]:
        return self.pictures(self.signature.bind(module, *args, **kwargs).arguments)

    def pictures(self, arguments: Mapping[str, Any]) -> list[torch.Tensor]:
        """One `[c, f, h, w]` per picture of the batch, without channels and tokens that only condition it.

        Raises:
            ValueError: The input has another form.
        """
        x = Inputs.of(arguments).sample
        if x.ndim == 3 and arguments.get("img_ids") is not None:
            x = _unpacked(x[..., : self.own], arguments["img_ids"])
        elif x.ndim in (4, 5) and x.shape[1] == self.channels:
            x = x[:, : self.own]
        else:
            raise ValueError(
                f"SeaCache compares pictures; it cannot tell what in the input of {self.name}, {tuple(x.shape)}, is "
                f"one: {_ADVICE}"
            )
        x = x.unsqueeze(2) if x.ndim == 4 else x
        return list((x * self.factor()).unbind(0))


def _unpacked(tokens: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Tokens `[n, l, c]` at places `[l, 3]` -> pictures `[n, c / 4, 2 h, 2 w]`, without those of further pictures.

    Tokens are 2 x 2 pixels, channels first, as Flux packs them; where c is no multiple of 4, single pixels.
    """
    ids = ids[0] if ids.ndim == 3 else ids
    own = ids[:, 0] == ids[0, 0]
    height, width = (len(ids[own, axis].unique()) for axis in (1, 2))
    if height * width != int(own.sum()) or len(ids) != tokens.shape[1]:
        raise ValueError(
            f"SeaCache compares pictures, but {tokens.shape[1]} tokens at {int(own.sum())} places are not one of "
            f"{height} x {width}: {_ADVICE}"
        )
    side = 2 if tokens.shape[-1] % 4 == 0 else 1
    return unpack(tokens[:, own], side * height, side * width, side)
