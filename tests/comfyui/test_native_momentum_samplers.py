from __future__ import annotations

import pytest

from diffusers_ext import DPMSolverMultistepMomentumScheduler, GHVBScheduler, PLMSMomentumScheduler


pytestmark = pytest.mark.comfy


@pytest.mark.parametrize("steps", [5, 8, 10, 20])
@pytest.mark.parametrize("name", ["shapes-unet", "shapes-dit"])
@pytest.mark.parametrize(
    "node, arguments, make, options",
    [
        ("DXGHVBSampler", (1.5, False), GHVBScheduler, {"order": 1.5}),
        ("DXGHVBSampler", (2.5, True), GHVBScheduler, {"order": 2.5, "denoise_last": True}),
        ("DXPLMSHeavyBallSampler", (3.5, False, False), PLMSMomentumScheduler, {"order": 3.5}),
        ("DXPLMSHeavyBallSampler", (2.5, True, False), PLMSMomentumScheduler,
         {"order": 2.5, "momentum_type": "nesterov"}),
        ("DXDPMpp2MHeavyBall", (0.7,), DPMSolverMultistepMomentumScheduler, {"beta": 0.7}),
    ],
)  # fmt: skip
def test_same_latents_as_the_scheduler(
    dx_nodes, scheduler_of, parity_gap, name, steps, node, arguments, make, options
):
    scheduler = scheduler_of(make, name, final_sigmas_type="zero", **options)
    assert parity_gap(dx_nodes[node].execute(*arguments).result[0], scheduler, name, steps) < 1e-5
