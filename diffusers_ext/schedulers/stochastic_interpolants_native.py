"""The SDE of flow models on ComfyUI's model functions."""

from __future__ import annotations

import torch

from ._native import NativeRun
from .stochastic_interpolants import advance, check_options, flow_plan, flow_slope


def seeded_generator(x: torch.Tensor, seed: int | None) -> torch.Generator | None:
    """Generator on x's device; on the CPU one seed further, as ComfyUI does, for the seed itself drew the start."""
    if seed is None:
        return None
    return torch.Generator(x.device).manual_seed(seed + 1 if x.device.type == "cpu" else seed)


@torch.no_grad()
def sample_flow_sde(
    model,
    x,
    sigmas,
    extra_args=None,
    callback=None,
    disable=None,
    profile: str = "sigma",
    scale: float = 0.5,
    integrator: str = "euler",
    clip: float | None = 1.0,
    last_step: str = "denoise",
):
    """SDE of a flow model as a ComfyUI sampler.

    Args:
        model, x, sigmas, extra_args, callback, disable: As ComfyUI passes them.
        profile, scale, integrator, clip, last_step: See `StochasticInterpolantScheduler`.

    Raises:
        ValueError: The model is no flow model, or an option is out of range.
    """
    check_options(profile, scale, integrator, clip, last_step)
    run = NativeRun(model, x, sigmas, extra_args, callback)
    if not run.flow:
        raise ValueError("Flow SDE Sampler needs a flow model (SD3, Flux...), and this one is not: use SDE samplers "
                         "such as dpmpp_2m_sde with it")  # fmt: skip
    steps = [a - b for a, b in zip(run.sigmas, run.sigmas[1:])]
    generator, memory = seeded_generator(x, (extra_args or {}).get("seed")), None
    for move in flow_plan(run.sigmas, steps, profile, scale, integrator, clip, last_step):
        slope = None
        if move.step:  # "heun" begins with noise alone
            x0 = run.denoised(x, move.at)
            run.report(min(move.node, run.steps - 1), x, x0)
            slope = flow_slope(x, (x - x0) / move.at, move.at, move.rate)
        z = torch.randn(x.shape, generator=generator, device=x.device, dtype=x.dtype) if move.noise else None
        x, memory = advance(move, x, slope, memory, z)
    return run.finish(x)
