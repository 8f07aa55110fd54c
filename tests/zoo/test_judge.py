"""The judge reads real pictures, its scores mean what they say, and its features measure distance."""

from __future__ import annotations

import math

import pytest
import torch

from diffusers_ext import zoo
from diffusers_ext.eval.metrics import frechet_distance
from diffusers_ext.zoo import world


def test_reads_every_attribute_of_fresh_real_pictures(real, judge):
    scores = judge.accuracy(real.images, real.specs)
    assert set(scores) == {*world.ATTRIBUTES, "relation", "all"}
    assert min(scores.values()) >= 0.99, scores


def test_accuracy_counts_wrong_attributes(real, judge):
    asked = real.specs[:200].clone()
    asked[:50, 0] = (asked[:50, 0] + 1) % 8
    scores, before = (judge.accuracy(real.images[:200], s) for s in (asked, real.specs[:200]))
    assert scores["ground"] == pytest.approx(before["ground"] - 0.25, abs=0.011)
    assert scores["shape1"] == before["shape1"]


def test_relation_is_wrong_when_the_pair_is_swapped_or_turned(real, judge):
    pairs = real.specs[:, 2] >= world.ROW
    pairs &= (real.specs[:, 3:6] != real.specs[:, 6:9]).any(1)
    images, specs = real.images[pairs], real.specs[pairs]
    swapped = specs[:, [0, 1, 2, 6, 7, 8, 3, 4, 5]]
    turned = specs.clone()
    turned[:, 2] = 2 * world.ROW + 1 - turned[:, 2]
    assert judge.accuracy(images, specs)["relation"] > 0.99
    assert judge.accuracy(images, swapped)["relation"] < 0.01
    assert judge.accuracy(images, turned)["relation"] < 0.01


def test_relation_of_single_objects_is_undefined(real, judge):
    single = real.specs[:, 2] < world.ROW
    assert math.isnan(judge.accuracy(real.images[single], real.specs[single])["relation"])


def test_open_attributes_count_as_right(judge):
    scene = zoo.scenes(1, seed=3, drop=1.0)
    (caption,) = scene.captions
    assert "background" not in caption
    assert judge.accuracy(scene.images, [zoo.parse(caption)])["all"] == 1


def test_noise_is_not_read_as_the_picture(real, judge):
    noise = torch.randn(200, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    assert judge.accuracy(noise, real.specs[:200])["all"] == 0


def test_batches_do_not_matter(real, judge):
    one, many = (judge.features(real.images[:20], batch_size=size) for size in (20, 7))
    assert one.shape == (20, 128)
    torch.testing.assert_close(one, many, rtol=1e-4, atol=1e-4)


def test_frechet_distance_of_features(real, judge):
    features, others = judge.features(real.images[:500]), judge.features(real.images[500:])
    noise = torch.randn(real.images[:500].shape, generator=torch.Generator().manual_seed(0))
    noisy = [judge.features(real.images[:500] + level * noise) for level in (0.1, 0.3)]
    distances = [frechet_distance(features, f) for f in (features, others, *noisy)]
    assert distances[0] == pytest.approx(0, abs=1e-2)
    assert distances[0] < distances[1] < distances[2] < distances[3]
    assert frechet_distance(others, features) == pytest.approx(distances[1], rel=1e-6)


@pytest.mark.parametrize(
    "images", [torch.zeros(2, 3, 32, 32), torch.zeros(3, 64, 64), torch.zeros(1, 3, 64, 64).byte()]
)
def test_wrong_pictures_are_refused(images, judge):
    with pytest.raises(ValueError, match="the judge reads floats"):
        judge.read(images)


def test_wrong_specs_are_refused(real, judge):
    with pytest.raises(ValueError, match=r"\(2, 9\)"):
        judge.accuracy(real.images[:2], real.specs[:3])


def test_damaged_judge_is_named(tmp_path):
    path = tmp_path / "judge.safetensors"
    with pytest.raises(RuntimeError, match="missing or damaged"):
        zoo.load_judge(path)
    path.write_bytes(b"\x08\x00\x00\x00\x00\x00\x00\x00{}      ")
    with pytest.raises(RuntimeError, match="missing or damaged"):
        zoo.load_judge(path)
