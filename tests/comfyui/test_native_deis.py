from __future__ import annotations

import pytest

from diffusers_ext import DEISFullScheduler


pytestmark = pytest.mark.comfy


@pytest.mark.parametrize("method", ["t_ab", "rho_ab", "logrho_ab", "ipndm", "rho_rk"])
@pytest.mark.parametrize("steps", [5, 8, 10, 20])
@pytest.mark.parametrize("name", ["shapes-unet", "shapes-dit"])
def test_same_latents_as_the_scheduler(dx_nodes, scheduler_of, parity_gap, name, steps, method):
    scheduler = scheduler_of(DEISFullScheduler, name, method=method, final_sigmas_type="zero")
    sampler = dx_nodes["DXDEISExact"].execute(method, 3, "3kutta").result[0]
    assert parity_gap(sampler, scheduler, name, steps) < 1e-5


def test_node_refuses_a_degree_the_method_lacks(dx_nodes):
    node = dx_nodes["DXDEISExact"]
    assert node.validate_inputs("t_ab", 4) is True
    assert "0 to 3" in node.validate_inputs("ipndm", 4)
