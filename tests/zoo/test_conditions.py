"""Condition pictures and the agreement of edge maps."""

from __future__ import annotations

import pytest
import torch

from diffusers_ext import zoo
from diffusers_ext.zoo.conditions import colourless, depth, edge_f1, edge_iou, edges, segmentation, subjects


def test_edges_lie_on_the_outline_of_a_plain_disc():
    y, x = torch.meshgrid(torch.arange(64.0), torch.arange(64.0), indexing="ij")
    radius = torch.hypot(x - 31.5, y - 31.5)
    found = edges((radius < 16).float().expand(1, 3, 64, 64) * 2 - 1)
    assert set(found.unique().tolist()) == {0.0, 1.0}
    assert (radius[found[0, 0] > 0] - 16).abs().max() < 1.6 and found.sum() > 2 * 16 * 3


def test_agreement():
    a = torch.zeros(3, 1, 16, 16)
    a[:, :, 4] = 1
    b = torch.stack([a[0], a[0].roll(1, 1), a[0].roll(4, 1)])
    assert torch.equal(edge_f1(a, b), torch.tensor([1.0, 1.0, 0.0]))
    assert torch.equal(edge_f1(a, b, tolerance=0), torch.tensor([1.0, 0.0, 0.0]))
    assert torch.allclose(edge_iou(a, b), torch.tensor([1.0, 0.5, 0.0]))
    nothing = torch.zeros_like(a)
    assert edge_f1(nothing, a).tolist() == edge_iou(nothing, a).tolist() == [0, 0, 0]


def test_half_of_the_edges():
    wanted = torch.zeros(1, 1, 16, 16)
    wanted[:, :, 4] = 1
    found = wanted.clone()
    found[..., 8:] = 0
    # precision 1; recall: 8 of 16 and one within a pixel
    assert edge_f1(found, wanted).item() == pytest.approx(2 * 9 / 16 / (1 + 9 / 16))


def test_depth_and_segmentation_know_the_scene():
    scenes = zoo.held_out(8)
    assert torch.equal(depth(scenes), scenes.depth)
    colours = segmentation(scenes)
    assert colours.shape == (8, 3, 64, 64) and torch.equal(colours[:, :2], scenes.masks) and not colours[:, 2].any()


def test_subjects_show_the_first_object_on_grey():
    """Its colour wherever it covers a pixel, within the tint; nothing of the ground or of the second object."""
    scenes = zoo.held_out(64)
    pictures = subjects(scenes.specs)
    assert pictures.shape == (64, 3, 32, 32) and not pictures[..., [0, -1]].any() and not pictures[..., -1, :].any()
    palette = torch.tensor([*zoo.world.COLOURS.values()])[scenes.specs[:, 4]] / 127.5 - 1
    middle = pictures.abs().sum(1).flatten(1).argmax(1)
    found = pictures.flatten(2)[torch.arange(64), :, middle]
    assert (found - palette).abs().max() < 0.09
    other = scenes.specs.clone()
    other[:, [0, 1, 2, 5]], other[:, 6:] = 1, 0
    assert torch.equal(subjects(other), pictures) and not torch.equal(subjects(other, seed=1), pictures)


def test_captions_lose_the_first_colour_only():
    scenes = zoo.held_out(200)
    for before, after, spec in zip(scenes.captions, colourless(scenes.captions, scenes.specs), scenes.specs):
        left = before.split()
        for word in after.split():
            left.remove(word)
        assert left == [list(zoo.world.COLOURS)[spec[4]]]
    assert colourless(["a red ring above a red star"], torch.tensor([[0, 0, 6, 5, 0, 0, 3, 0, 0]])) == [
        "a ring above a red star"
    ]


def test_adapters_of_the_zoo_are_named():
    with pytest.raises(ValueError, match="unknown zoo adapter 'nothing'"):
        zoo.adapter_file("nothing")
