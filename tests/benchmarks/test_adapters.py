"""The table of adapters: activations are counted once each, weights are not."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch


ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
from benchmarks.adapters import activations  # noqa: E402


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_activations_of_a_small_network(device):
    """Two linear layers and a SiLU: the second layer's input, and SiLU's (which is not its output)."""
    net = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.SiLU(), torch.nn.Linear(16, 4)).to(device)
    x = torch.zeros(32, 8, device=device)
    every = activations(lambda: net(x), net)
    assert every == 2 * 32 * (8 + 16 + 16)  # bytes in float16
    net.requires_grad_(False)
    assert activations(lambda: net(x), net) == 0
    assert activations(lambda: net(x.requires_grad_()), net) == 2 * 32 * 16


def test_attention_keeps_inputs_and_output_but_no_weights():
    q, k, v = (torch.zeros(1, 2, n, 8, requires_grad=True) for n in (64, 32, 32))
    counted = activations(lambda: torch.nn.functional.scaled_dot_product_attention(q * 1, k * 1, v * 1))
    assert counted == 2 * 2 * 8 * (64 + 32 + 32 + 64)
