from __future__ import annotations

import pytest
import torch

from diffusers_ext import DPMSolverFastScheduler


pytestmark = pytest.mark.comfy


@pytest.mark.parametrize(
    "algorithm, order", [("dpmsolver++", 3), ("dpmsolver++", 2), ("dpmsolver", 2), ("dpmsolver", 3)]
)
@pytest.mark.parametrize("steps", [5, 8, 10, 20])
@pytest.mark.parametrize("name", ["shapes-unet", "shapes-dit"])
def test_same_latents_as_the_scheduler(dx_nodes, scheduler_of, parity_gap, name, steps, algorithm, order):
    if name == "shapes-dit" and algorithm == "dpmsolver":
        pytest.skip("the noise form divides by alpha")
    options = {"algorithm_type": algorithm, "order": order, "final_sigmas_type": "zero"}
    scheduler = scheduler_of(DPMSolverFastScheduler, name, **options)
    sampler = dx_nodes["DXDPMSolverFastExact"].execute(order, algorithm, "dpmsolver", "given").result[0]
    assert parity_gap(sampler, scheduler, name, steps) < 1e-5


@pytest.mark.parametrize("name", ["shapes-unet", "shapes-dit"])
def test_adaptive_node_follows_the_ode(dx_nodes, mixture, sample_analytic, name):
    flow = name == "shapes-dit"
    top = 0.999 if flow else 14.6
    sigmas = torch.tensor([top, 0.5, 0.01, 0.0])
    noise = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(1))
    sampler = dx_nodes["DXDPMSolverAdaptivePP"].execute(3, 1e-4, 1e-4, "dpmsolver").result[0]
    native = sample_analytic(sampler, sigmas, noise, mixture, name)
    first = (1 - top, top) if flow else (1.0, top)
    exact = mixture.ode(top * noise.double(), first, (1.0, 1e-6), steps=200)
    assert (native - exact).abs().max() < 2e-3
