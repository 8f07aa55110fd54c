"""Denoising Langevin Gibbs on ComfyUI's model functions."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import torch

from ..prediction import expand
from ._native import is_flow, model_sampling_of
from .dmcmc import DenoisingLangevinGibbs, DLGConfig, integrator_calls
from .dmcmc_classifier import NoiseLevelClassifier, train_noise_classifier


HIGHEST_FLOW_LEVEL = 80.0  # sigma / alpha; flow models have no highest one


def native_denoiser(model: Callable, extra_args: dict | None = None) -> Callable:
    """`D(x, sigma)` of samples x0 + sigma n from the function that a KSAMPLER hands to its sampler."""
    flow, extra = is_flow(model_sampling_of(model)), extra_args or {}

    def denoise(x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        if not flow:
            return model(x, sigma, **extra)
        alpha = 1 / (1 + sigma)
        return model(expand(alpha, x) * x, sigma * alpha, **extra)

    return denoise


def native_config(model: Callable, **options) -> DLGConfig:
    """`DLGConfig` with the noise levels of a ComfyUI model."""
    sampling, low = model_sampling_of(model), DLGConfig.sigma_min
    if is_flow(sampling):
        return DLGConfig(**{"sigma_max": HIGHEST_FLOW_LEVEL, **options})
    low, high = max(low, float(sampling.sigma_min)), float(sampling.sigma_max)
    return DLGConfig(**{"sigma_min": low, "sigma_max": high, "tweedie_sigma": low, **options})


def native_chain(model: Callable, classifier: Callable, config: DLGConfig, extra_args=None, on_call=None):
    """Chains of `config` that have not been started, on a ComfyUI model."""
    chain = DenoisingLangevinGibbs(native_denoiser(model, extra_args), classifier, config)
    chain.on_call = on_call
    return chain


def init_calls(config: DLGConfig) -> int:
    """Model calls of `init_native`."""
    return 2 * (config.init_points - 1) - 1 + config.init_sweeps + config.burn_in


@torch.no_grad()
def init_native(
    model: Callable,
    shape: tuple[int, ...],
    device: torch.device,
    seed: int,
    config: DLGConfig,
    extra_args: dict | None = None,
    training_steps: int = 1000,
    examples: torch.Tensor | None = None,
    on_call: Callable | None = None,
    on_training_step: Callable | None = None,
) -> tuple[dict[str, torch.Tensor], NoiseLevelClassifier]:
    """Start chains: samples by the stochastic sampler, a noise classifier trained on them, sweeps.

    Args:
        model, extra_args: As ComfyUI passes them.
        shape: Of the latents, one chain each.
        device: Where they are.
        seed: Of everything random.
        config: See `native_config`.
        training_steps: Of the classifier.
        examples: More clean latents to train it on.
        on_call, on_training_step: Called after every model call and training step.

    Returns:
        The chains' `state_dict` and the classifier.
    """
    unused = replace(config, sigma_update="exact")  # no classifier is asked before the start
    chain = native_chain(model, lambda x, sigma: sigma, unused, extra_args, on_call)
    clean = chain.initial_samples(shape, torch.Generator(device).manual_seed(seed))
    data = clean if examples is None else torch.cat([clean, examples.to(clean)])
    levels = (config.num_levels, config.sigma_min, config.sigma_max)
    classifier = train_noise_classifier(
        data, *levels, training_steps, seed=seed, progress=False, on_step=on_training_step
    )
    started = native_chain(model, classifier, config, extra_args, on_call)
    started.generator = chain.generator
    return started.start(clean).state_dict(), classifier


@torch.no_grad()
def sample_native(
    model: Callable,
    state: dict[str, torch.Tensor],
    classifier: Callable,
    config: DLGConfig,
    n: int,
    device: torch.device,
    extra_args: dict | None = None,
    on_call: Callable | None = None,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """`n` clean latents from chains of `init_native`, and the chains afterwards; `state` itself stays as it is."""
    chain = native_chain(model, classifier, config, extra_args, on_call)
    chain.load_state_dict(state, device)
    return chain.sample(n), chain.state_dict()


def sample_calls(config: DLGConfig, chains: int, n: int) -> int:
    """Model calls of `sample_native`."""
    block = config.n_skip + integrator_calls(config.integrator, config.points) + (config.tweedie_sigma > 0)
    return block * math.ceil(n / chains)
