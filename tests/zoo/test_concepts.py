"""Concepts of the shapes world: scenes that show them, captions that call them by their words, the measure."""

from __future__ import annotations

import pytest
import torch

from diffusers_ext import zoo
from diffusers_ext.zoo.concepts import CONCEPTS, concept_scenes, identity, trigger


@pytest.mark.parametrize("name", list(CONCEPTS))
def test_scenes_show_the_concept_and_say_its_word(name):
    scenes, (colour, shape) = concept_scenes(name, 60, 5), CONCEPTS[name]
    assert len(scenes) == 60 == len(scenes.images)
    for index, caption in enumerate(scenes.captions):
        words = scenes.attributes(index)
        assert (words["colour1"], words["shape1"]) == (colour, shape) and words["ground"] != colour
        assert caption.count(trigger(name)) == 1 and f"{colour} {shape}" not in caption
        spec = zoo.parse(caption.replace(trigger(name), f"{colour} {shape}"))
        assert spec == scenes.specs[index].tolist()
    judge = zoo.load_judge()
    assert identity(judge, scenes.images, scenes.specs) > 0.95
    assert identity(judge, scenes.images.roll(1, 1), scenes.specs) < 0.6


def test_scenes_depend_on_the_seed_only():
    one, two = concept_scenes("zib", 8, 5, drop=0.5), concept_scenes("zib", 8, 5, drop=0.5)
    assert one.captions == two.captions and torch.equal(one.images, two.images)
    assert concept_scenes("zib", 8, 6).captions != one.captions
    assert any("background" not in caption for caption in one.captions)


def test_unknown_concepts_are_named():
    with pytest.raises(ValueError, match="unknown concept 'zip'. Did you mean 'zib'"):
        concept_scenes("zip", 4, 0)
