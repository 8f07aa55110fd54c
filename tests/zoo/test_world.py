"""The procedural world against closed-form areas, its own masks and its sentences."""

from __future__ import annotations

import math

import pytest
import torch

from diffusers_ext import zoo
from diffusers_ext.zoo import world


# Area of each shape in units of r^2, from plane geometry.
AREAS = {
    "circle": math.pi,
    "square": 1.74**2,
    "triangle": 3 * math.sqrt(3) / 4 * 1.15**2,
    "star": 5 * 0.45 * math.sin(math.pi / 5) * 1.15**2,
    "cross": 4 * 2 * 0.33 - (2 * 0.33) ** 2,
    "ring": math.pi * (1 - 0.5**2),
}


def of(colour_index: torch.Tensor) -> torch.Tensor:
    return torch.tensor([*world.COLOURS.values()])[colour_index] / 127.5 - 1


def test_same_seed_same_scenes_in_any_slice():
    whole, part = zoo.scenes(12, seed=5), zoo.scenes(4, seed=5, start=6)
    assert part.images.equal(whole.images[6:10]) and part.masks.equal(whole.masks[6:10])
    assert part.specs.equal(whole.specs[6:10]) and part.captions == whole.captions[6:10]
    assert not zoo.scenes(4, seed=6).images.equal(whole.images[:4])


def test_sentences_are_the_captions_of_the_scenes():
    specs, captions = world.sentences(9, seed=3, start=2, drop=0.5)
    drawn = zoo.scenes(9, seed=3, start=2, drop=0.5)
    assert specs.equal(drawn.specs) and captions == drawn.captions


def test_held_out_is_not_training_data():
    assert not zoo.held_out(1).images.equal(zoo.scenes(1, seed=1).images)


def test_captions_say_what_the_specs_hold(real):
    for index, text in enumerate(real.captions):
        words = real.attributes(index)
        objects = [f"a {words[f'size{k}']} {words[f'colour{k}']} {words[f'shape{k}']}" for k in (1, 2)]
        assert text.endswith(f", {words['texture']} {words['ground']} background")
        if words["shape2"] == "none":
            assert text.startswith(f"{objects[0]} {words['layout']},")
        else:
            ways = {"row": ("left of", "right of"), "column": ("above", "below")}[words["layout"]]
            sentences = (f"{objects[0]} {ways[0]} {objects[1]},", f"{objects[1]} {ways[1]} {objects[0]},")
            assert text.startswith(sentences)


def test_parse_inverts_caption(real):
    assert [zoo.parse(text) for text in real.captions] == real.specs.tolist()


def test_parse_leaves_dropped_phrases_open():
    drawn = zoo.scenes(300, seed=8, drop=0.5)
    parsed = torch.tensor([zoo.parse(text) for text in drawn.captions])
    assert ((parsed == drawn.specs) | (parsed == -1)).all()
    assert 0.1 < (parsed == -1).float().mean() < 0.4
    assert zoo.parse("a red circle") == [-1, -1, -1, 0, 0, -1, 6, 8, 2]


@pytest.mark.parametrize("shape", AREAS)
def test_coverage_has_the_area_of_the_shape(shape):
    at = torch.arange(64, dtype=torch.float64) + 0.5 - 32
    y, x = torch.meshgrid(at, at, indexing="ij")
    for radius in (9.0, 15.5):
        area = (0.5 - world.SHAPES[shape](x, y, torch.tensor(radius))).clamp(0, 1).sum().item()
        assert area == pytest.approx(AREAS[shape] * radius**2, rel=0.02)


def test_pictures_are_the_masks_filled_with_the_named_colours(real):
    for which in (0, 1):
        colour, inside = real.specs[:, 4 + 3 * which], real.masks[:, which] == 1
        present = inside.any((1, 2))
        assert present.equal(colour < 8)
        for index in torch.nonzero(present).flatten().tolist():
            pixels = real.images[index][:, inside[index]]
            assert pixels.std(1).max() < 1e-5
            assert (pixels[:, 0] - of(colour[index])).abs().max() <= 0.08 + 1e-5


def test_plain_grounds_have_the_named_colour_and_textures_two_tones(real):
    bare = (real.masks == 0).all(1)
    for index in range(200):
        pixels, texture = real.images[index][:, bare[index]], real.specs[index, 1]
        if texture == 0:
            assert (pixels - of(real.specs[index, 0])[:, None]).abs().max() <= 0.08 + 1e-5
        else:
            assert pixels.std(1).max() > 0.02


def test_objects_stay_apart_and_inside(real):
    assert (real.masks[:, 0] * real.masks[:, 1]).max() == 0
    border = torch.cat([real.masks[..., 0], real.masks[..., -1], real.masks[..., 0, :], real.masks[..., -1, :]], -1)
    assert border.max() < 0.5  # a tip may touch the last row, anti-aliased


def test_reach_holds_the_boxes(real):
    boxes, reach = real.boxes, world.reach(real.specs)
    assert boxes.isnan().equal(reach.isnan())
    present = ~boxes.isnan().any(-1)
    assert (boxes[present][:, :2] >= reach[present][:, :2] - 0.5).all()
    assert (boxes[present][:, 2:] <= reach[present][:, 2:] + 0.5).all()


def test_order_of_pairs_is_left_or_upper_first(real):
    middle = real.boxes.unflatten(-1, (2, 2)).mean(2)
    row, column = real.specs[:, 2] == world.ROW, real.specs[:, 2] == world.COLUMN
    assert (middle[row, 0, 0] < middle[row, 1, 0]).all()
    assert (middle[column, 0, 1] < middle[column, 1, 1]).all()


def test_depth_grows_with_size_and_is_zero_on_the_ground(real):
    depth = real.depth
    assert depth.shape == (1000, 1, 64, 64)
    assert depth[(real.masks == 0).all(1, keepdim=True)].max() == 0
    for size, nearness in ((0, 0.5), (1, 1.0)):
        chosen = real.specs[:, 5] == size
        assert (depth[chosen, 0][real.masks[chosen, 0] == 1] == nearness).all()


def test_every_class_is_drawn_and_no_object_has_the_ground_colour(real):
    for column, (name, classes) in enumerate(world.ATTRIBUTES.items()):
        assert real.specs[:, column].unique().tolist() == list(range(classes)), name
    assert (real.specs[:, 0] != real.specs[:, 4]).all() and (real.specs[:, 0] != real.specs[:, 7]).all()


@pytest.mark.parametrize("arguments", [{"n": 0}, {"n": 1, "start": -1}, {"n": 1, "drop": 1.5}])
def test_impossible_requests_are_refused(arguments):
    with pytest.raises(ValueError, match="got"):
        zoo.scenes(seed=0, **arguments)


@pytest.mark.parametrize(
    ("text", "hint"), [("a small rad circle", "Did you mean 'red'"), ("circle a red", "not in this order")]
)
def test_parse_says_what_is_wrong(text, hint):
    with pytest.raises(ValueError, match=hint):
        zoo.parse(text)
