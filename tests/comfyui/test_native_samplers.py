"""Every sampler node on the weights of the epsilon model, beside its scheduler: the same network, the same latents."""

from __future__ import annotations

import pytest
import torch

from diffusers_ext import (
    BDIADDIMScheduler,
    DEISFullScheduler,
    DPMSolverFastScheduler,
    DPMSolverMultistepMomentumScheduler,
    DPMSolverV3MultistepScheduler,
    EVODiffMultistepScheduler,
    GHVBScheduler,
    PLMSMomentumScheduler,
    USFScheduler,
)


pytestmark = pytest.mark.comfy
NAME = "shapes-unet-eps"
CAPTION = "a large red circle left of a small yellow star, striped blue background"
ZERO = {"final_sigmas_type": "zero"}
SAMPLERS = [
    ("DXBDIASampler", (0.5,), BDIADDIMScheduler, {"gamma": 0.5, **ZERO}),
    ("DXDEISExact", ("t_ab", 3, "3kutta"), DEISFullScheduler, {"method": "t_ab", **ZERO}),
    ("DXDEISExact", ("ipndm", 3, "3kutta"), DEISFullScheduler, {"method": "ipndm", **ZERO}),
    ("DXDPMSolverFastExact", (3, "dpmsolver++", "dpmsolver", "given"), DPMSolverFastScheduler, ZERO),
    ("DXEVODiffSampler", ("ddim", True), EVODiffMultistepScheduler, {}),
    ("DXGHVBSampler", (2.5, False), GHVBScheduler, {"order": 2.5, **ZERO}),
    ("DXPLMSHeavyBallSampler", (3.5, False, False), PLMSMomentumScheduler, {"order": 3.5, **ZERO}),
    ("DXDPMpp2MHeavyBall", (0.8,), DPMSolverMultistepMomentumScheduler, {"beta": 0.8, **ZERO}),
    ("DXDPMv3Sampler", (2, True, False, None), DPMSolverV3MultistepScheduler, {}),
    ("DXUSFSampler", None, USFScheduler, {"preset": "unipc_bh2"}),
]


@pytest.fixture(scope="module")
def model_and_prompt(native_pipe, encode):
    model, clip, _ = native_pipe(NAME)
    return model, encode(clip, CAPTION)


@torch.no_grad()
def by_scheduler(scheduler, model, states, noise):
    """The scheduler's loop on ComfyUI's own network; whole timesteps, for ComfyUI rounds them."""
    x = noise
    for t in scheduler.timesteps:
        inputs = scheduler.scale_model_input(x, t)
        whole = torch.full((len(x),), round(float(t)))
        x = scheduler.step(model.model.diffusion_model(inputs, whole, context=states), t, x).prev_sample
    return x


@pytest.mark.parametrize("steps", [5, 10])
@pytest.mark.parametrize(
    "node, arguments, make, options", SAMPLERS, ids=[f"{s[0]}-{i}" for i, s in enumerate(SAMPLERS)]
)
def test_same_latents_as_the_scheduler(
    comfy, dx_nodes, model_and_prompt, scheduler_of, node, arguments, make, options, steps
):
    model, prompt = model_and_prompt
    sampling = model.get_model_object("model_sampling")
    sigmas = comfy.samplers.calculate_sigmas(sampling, "simple", steps)  # levels of whole timesteps
    scheduler = scheduler_of(make, NAME, **options)
    if arguments is None:
        sampler, own = dx_nodes[node].execute(model, "unipc_bh2", steps, "simple").result
        assert torch.allclose(own, sigmas, rtol=1e-5)
        scheduler.load_schedule(sampler.extra_options["solver_schedule"])
        scheduler.set_timesteps(steps)
    else:
        sampler = dx_nodes[node].execute(*arguments).result[0]
        scheduler.set_timesteps(sigmas=sigmas[:-1].tolist())
    noise = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(1))
    guider = comfy.samplers.CFGGuider(model)
    guider.set_conds(prompt, [])
    guider.set_cfg(1.0)
    native = guider.sample(noise, torch.zeros_like(noise), sampler, sigmas)
    native = model.get_model_object("latent_format").process_in(native)
    # at the noisiest level of a model ComfyUI's sample has variance one in the model's own space
    ours = by_scheduler(scheduler, model, prompt[0][0], noise)
    assert ours.std() > 0.1
    # the network sees samples rounded at a size of 15 in ComfyUI and of 1 in diffusers
    assert (native - ours).abs().max() < 1e-5 * ours.abs().max()
