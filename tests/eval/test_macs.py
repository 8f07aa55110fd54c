"""MAC counts against closed forms."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from diffusers_ext.eval import attention_macs, count_macs, macs_by_module


def test_linear_and_convolution():
    assert count_macs(torch.nn.Linear(8, 4), torch.zeros(3, 8)) == 3 * 8 * 4
    conv = torch.nn.Conv2d(6, 10, 3, stride=2, padding=1, groups=2)
    assert count_macs(conv, torch.zeros(2, 6, 8, 8)) == 2 * 4 * 4 * 10 * (6 // 2) * 9


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention(device, dtype):
    q = torch.zeros(2, 3, 16, 8, device=device, dtype=dtype)
    kv = torch.zeros(2, 3, 20, 8, device=device, dtype=dtype)
    assert count_macs(F.scaled_dot_product_attention, q, kv, kv) == 2 * (2 * 3 * 16 * 20 * 8)
    assert attention_macs(q.shape, kv.shape, kv.shape) == 2 * (2 * 3 * 16 * 20 * 8)


def test_counts_what_runs():
    layer = torch.nn.Linear(8, 8)

    class Sometimes(torch.nn.Module):
        def forward(self, x, times):
            for _ in range(times):
                x = layer(x)
            return x

    assert [count_macs(Sometimes(), torch.zeros(1, 8), times=n) for n in (0, 1, 3)] == [0, 64, 192]


def test_by_module_adds_up():
    model = torch.nn.Sequential(torch.nn.Linear(8, 4), torch.nn.ReLU(), torch.nn.Sequential(torch.nn.Linear(4, 2)))
    x = torch.zeros(1, 8)
    assert macs_by_module(model, x) == {"": 40, "0": 32, "2": 8}
    assert macs_by_module(model, x, depth=2) == {"": 40, "0": 32, "2": 8, "2.0": 8}
