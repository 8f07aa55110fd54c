"""Looks of the shapes world: what they change, what they leave, and that the statistics see it."""

from __future__ import annotations

import pytest
import torch

from diffusers_ext import zoo
from diffusers_ext.zoo import looks


@pytest.fixture(scope="module")
def scenes():
    return zoo.held_out(200)


def both_ways(scenes, column):
    look = torch.zeros(len(scenes), 3, dtype=torch.long)
    look[:, column] = 1
    return [looks.statistics(looks.show(scenes.images, sign * look), scenes.specs) for sign in (1, -1)]


def test_no_look_is_the_scene_itself(scenes):
    assert torch.equal(looks.show(scenes.images, torch.zeros(200, 3, dtype=torch.long)), scenes.images)


def test_levels_are_even_and_depend_on_the_seed_only():
    levels = looks.levels(3000, 4)
    assert torch.equal(levels, looks.levels(3000, 4)) and not torch.equal(levels, looks.levels(3000, 5))
    for column in levels.T:
        shares = torch.stack([(column == level).float().mean() for level in (-1, 0, 1)])
        assert (shares - torch.tensor([0.25, 0.5, 0.25])).abs().max() < 0.03


@pytest.mark.parametrize("column", range(3))
def test_each_statistic_sees_its_own_look_only(scenes, column):
    spread = looks.statistics(looks.show(scenes.images, looks.levels(200, 0)), scenes.specs).std(0)
    positive, negative = both_ways(scenes, column)
    moved = ((positive - negative).mean(0) / spread).abs()
    assert moved[column] > 1.5 and (moved[torch.arange(3) != column] < moved[column] / 20).all()


def test_plain_scenes_have_none_of_them(scenes):
    """What is left is the tint of the colours and the places of the objects."""
    plain = looks.statistics(scenes.images, scenes.specs)
    assert plain.mean(0).abs().max() < 0.04 and plain.std(0).max() < 0.07


def test_the_changes_are_those_that_were_asked_for():
    """A flat grey picture: its chroma stays none, the light is added; warm light keeps its luma."""
    grey = torch.zeros(1, 3, 64, 64)

    def colour(*look):
        return looks.show(grey, torch.tensor([look]))[0, :, 0, 0]

    for look, added in (([0, 0, 1], [0.06] * 3), ([1, 0, -1], [-0.06] * 3), ([-1, 0, 0], [0, 0, 0])):
        assert colour(*look).tolist() == pytest.approx(added, abs=1e-6)
    warm = colour(0, 1, 0)
    assert warm.tolist() == pytest.approx([0.05, -0.0158, -0.05], abs=1e-6)
    assert abs(warm @ torch.tensor([0.299, 0.587, 0.114])) < 1e-3
    assert torch.allclose(colour(0, -1, 0), -warm, atol=1e-6)


@pytest.mark.parametrize("look", torch.cartesian_prod(*[torch.tensor([-1, 1])] * 3).tolist(), ids=str)
def test_colours_keep_their_names(scenes, judge, look):
    """Every combination of looks leaves a picture that its caption still describes."""
    plain, pictures = scenes.images, looks.show(scenes.images, torch.tensor([look] * len(scenes)))
    read = [judge.accuracy(images, scenes.specs)["all"] for images in (plain, pictures)]
    assert read[1] > read[0] - 0.03


def test_the_judge_still_reads_the_scenes(scenes, judge):
    pictures = looks.show(scenes.images, looks.levels(200, 0))
    assert pictures.abs().max() <= 1
    read = judge.accuracy(pictures, scenes.specs)
    assert min(read["shape1"], read["layout"], read["size1"]) > 0.97
