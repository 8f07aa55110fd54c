"""The shipped pipelines: complete, offline, small, as good as their cards say, and refused when damaged."""

from __future__ import annotations

import json
import shutil
import socket
import time

import pytest
import torch

from diffusers_ext import zoo
from diffusers_ext.zoo.pipelines import MANIFEST, WEIGHTS


CLASSES = {"shapes-unet": "StableDiffusionPipeline", "shapes-unet-eps": "StableDiffusionPipeline"}
CLASSES["shapes-dit"] = "FluxPipeline"
PREDICTIONS = {"shapes-unet": "v_prediction", "shapes-unet-eps": "epsilon"}


@pytest.fixture(scope="module", params=sorted(CLASSES))
def name(request):
    return request.param


@pytest.fixture(scope="module")
def pipe(name):
    return zoo.load(name)


@pytest.fixture(scope="module")
def evaluation(name):
    return json.loads((WEIGHTS / name / "evaluation.json").read_text(encoding="utf-8"))


def test_names_are_the_shipped_models():
    assert zoo.names() == sorted(CLASSES)


def test_loads_offline_in_seconds(name, monkeypatch):
    def refuse(*_):
        raise AssertionError("loading a shipped model opened a connection")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    start = time.process_time()
    pipe = zoo.load(name, torch.float16)
    assert time.process_time() - start < 10
    assert type(pipe).__name__ == CLASSES[name] and pipe.vae.dtype == torch.float16
    assert pipe.scheduler.config.get("prediction_type") == PREDICTIONS.get(name)


def test_weights_are_small_and_half_precision(name):
    from safetensors import safe_open

    files = list((WEIGHTS / name).rglob("*.safetensors"))
    assert sum(path.stat().st_size for path in files) <= 16e6
    for path in files:
        with safe_open(path, "pt") as file:
            assert {file.get_slice(key).get_dtype() for key in file.keys()} == {"F16"}  # noqa: SIM118


def test_all_weights_fit_the_wheel():
    assert sum(path.stat().st_size for path in WEIGHTS.rglob("*") if path.is_file()) < 39.2e6


def test_models_share_one_latent_space():
    digests = [json.loads((WEIGHTS / n / MANIFEST).read_text(encoding="utf-8")) for n in zoo.names()]
    assert len({d["vae/diffusion_pytorch_model.safetensors"] for d in digests}) == 1


def test_every_word_is_one_token(pipe):
    tokenizers = [pipe.tokenizer, getattr(pipe, "tokenizer_2", None)]
    for tokenizer, markers in zip(tokenizers, (2, 1)):
        if tokenizer is not None:
            assert {len(tokenizer(word).input_ids) - markers for word in zoo.world.words()} == {1}


def test_a_batch_draws_what_single_calls_draw(pipe):
    captions = zoo.held_out(3).captions
    together, alone = (zoo.generate(pipe, captions, 3, batch_size=size) for size in (3, 1))
    assert together.shape == (3, 3, 64, 64) and together.dtype == torch.float32
    torch.testing.assert_close(together, alone, rtol=0, atol=2e-3)
    assert not torch.allclose(together[:1], zoo.generate(pipe, captions[:1], 3, seed=1), atol=0.05)


def test_guidance_of_one_ignores_the_empty_prompt(pipe):
    captions = zoo.held_out(1).captions
    plain, guided = (zoo.generate(pipe, captions, 2, guidance_scale=g) for g in (1.0, 3.0))
    assert not torch.allclose(plain, guided, atol=0.05)


def test_draws_what_captions_say_as_often_as_the_card_claims(pipe, judge, evaluation):
    scenes = zoo.held_out(32, start=5000)
    scores = judge.accuracy(zoo.generate(pipe, scenes.captions, evaluation["steps"], batch_size=32), scenes.specs)
    # Three standard errors of 32 pictures.
    expected = evaluation["pictures"]["all"]
    assert scores["all"] >= expected - 3 * (max(expected * (1 - expected), 0.02) / 32) ** 0.5


def test_card_shows_the_evaluation(name, evaluation):
    card = (WEIGHTS / name / "README.md").read_text(encoding="utf-8")
    assert evaluation["n"] >= 1000 and 20 <= evaluation["steps"] <= 25
    row = next(line for line in card.splitlines() if line.startswith("| this model"))
    assert f" {100 * evaluation['pictures']['all']:.1f} " in row
    assert evaluation["vae_round_trip"]["psnr_db"] >= 36
    assert "Apache-2.0" in card and "## Limits" in card and "## Training data" in card


def test_unknown_name_suggests_the_nearest():
    with pytest.raises(ValueError, match="Did you mean 'shapes-unet'"):
        zoo.load("shape-unet")


@pytest.mark.parametrize("captions", [[], "a red circle"])
def test_generate_refuses_what_is_no_list_of_captions(captions):
    with pytest.raises((ValueError, TypeError), match="captions"):
        zoo.generate(None, captions)


class TestDamage:
    """A folder that is not exactly what was exported must not load."""

    WEIGHT = "vae/diffusion_pytorch_model.safetensors"

    @pytest.fixture
    def folder(self, tmp_path):
        return shutil.copytree(WEIGHTS / "shapes-unet", tmp_path / "shapes-unet")

    def refused(self, folder, match):
        with pytest.raises(RuntimeError, match=match):
            zoo.load_folder(folder)

    def test_whole_folder_loads(self, folder):
        zoo.check_folder(folder)

    def test_truncated_weights(self, folder):
        path = folder / self.WEIGHT
        path.write_bytes(path.read_bytes()[:-1000])
        self.refused(folder, f"{self.WEIGHT} is damaged")

    def test_one_flipped_bit(self, folder):
        path = folder / self.WEIGHT
        content = bytearray(path.read_bytes())
        content[-100] ^= 1
        path.write_bytes(content)
        self.refused(folder, f"{self.WEIGHT} is damaged")

    def test_missing_file(self, folder):
        (folder / "unet" / "config.json").unlink()
        self.refused(folder, "unet/config.json is missing")

    def test_strange_file(self, folder):
        shutil.copy(folder / self.WEIGHT, folder / "vae" / "extra.safetensors")
        self.refused(folder, "vae/extra.safetensors is not in the manifest")

    @pytest.mark.parametrize("content", ["", "{", None])
    def test_no_readable_manifest(self, folder, content):
        (folder / MANIFEST).unlink() if content is None else (folder / MANIFEST).write_text(content)
        self.refused(folder, MANIFEST)
