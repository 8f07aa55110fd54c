"""Latents as Flux's tokens and back, as Flux's own pipeline does it."""

from __future__ import annotations

import pytest
import torch
from diffusers import FluxPipeline

from diffusers_ext._flux_tokens import grid_of, image_ids, pack, unpack


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_packing_is_what_flux_does(layout):
    z = torch.randn(2, 4, 6, 8).contiguous(memory_format=layout)
    tokens = FluxPipeline._pack_latents(z, 2, 4, 6, 8)
    assert pack(z).equal(tokens) and unpack(tokens, 6, 8).equal(z)
    assert FluxPipeline._unpack_latents(tokens, 48, 64, 8).equal(unpack(tokens, 6, 8))


def test_positions_are_those_of_flux():
    ids = image_ids(6, 8)
    assert ids.equal(FluxPipeline._prepare_latent_image_ids(2, 3, 4, "cpu", torch.float32))
    assert grid_of(ids) == grid_of(ids[None]) == (3, 4)


@pytest.mark.parametrize("side", [1, 3])
def test_patches_of_other_sides(side):
    z = torch.randn(2, 4, 6, 9)
    tokens = torch.nn.functional.unfold(z, side, stride=side).mT
    assert unpack(tokens, 6, 9, side).equal(z)
