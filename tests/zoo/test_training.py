"""The training example: every stage runs, interruptions leave no trace, processes share the work."""

from __future__ import annotations

import importlib
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from diffusers_ext import zoo
from diffusers_ext.training import denoising, fitting, muon


FOLDER = Path(__file__).parents[2] / "examples" / "train_shapes"
MODULES = ("train", "stages", "report", "objectives", "networks")
TINY = ["--steps", "2", "--batch", "4", "--save-every", "1"]


@pytest.fixture(scope="module")
def example():
    """The example's modules, imported as its own script imports them."""
    sys.path.insert(0, str(FOLDER))
    yield {name: importlib.import_module(name) for name in MODULES}
    sys.path.remove(str(FOLDER))
    for name in MODULES:
        del sys.modules[name]


@pytest.fixture(scope="module")
def work(example, tmp_path_factory):
    """A working folder in which everything before the denoisers has run for two steps."""
    work = tmp_path_factory.mktemp("work")
    for stage in ("data", "judge", "clip", "t5", "vae", "cache"):
        run(example, stage, work, *([] if stage in ("data", "cache") else TINY), "--images", "24")
    return work


def run(example, stage, work, *options):
    example["train"].main([stage, "--work", str(work), *options])


def copy_cache(work, target):
    target.mkdir(exist_ok=True)
    (target / "cache.safetensors").write_bytes((work / "cache.safetensors").read_bytes())
    return target


def result(folder, name="unet"):
    return load_file(folder / f"{name}.safetensors")


def same(a, b):
    return a.keys() == b.keys() and all(a[k].equal(b[k]) for k in a)


def test_all_stages_make_pipelines_that_load(example, work):
    run(example, "unet", work, *TINY)
    teacher = ["--teacher", str(work / "unet.safetensors")]
    run(example, "unet-eps", work, *TINY, *teacher, "--init", str(work / "unet.safetensors"))
    run(example, "dit", work, *TINY, *teacher)
    run(example, "export", work)
    for kind, prediction in (("unet", "v_prediction"), ("unet-eps", "epsilon"), ("dit", None)):
        folder = work / "export" / f"shapes-{kind}"
        pipe = zoo.load_folder(folder)
        assert pipe.scheduler.config.get("prediction_type") == prediction
        assert zoo.generate(pipe, ["a red circle"], 1).isfinite().all()
    assert not list(work.rglob("*.part")) and not list(work.glob("*.checkpoint.*"))


@pytest.mark.slow
def test_evaluation_and_card(example, work):
    run(example, "unet", work, *TINY)
    run(example, "export", work, "--model", "unet")
    run(example, "evaluate", work, "--model", "unet", "-n", "10", "--inference-steps", "1")
    run(example, "card", work, "--model", "unet")
    folder = work / "export" / "shapes-unet"
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert "over 10 held-out captions" in card and "{" not in card.replace("{}", "")
    zoo.check_folder(folder)


@pytest.mark.parametrize("stage", ["unet", "dit"])
def test_a_crash_leaves_no_trace_in_the_result(example, work, tmp_path, monkeypatch, stage):
    whole, broken = copy_cache(work, tmp_path / "whole"), copy_cache(work, tmp_path / "broken")
    options = ["--steps", "5", "--batch", "4", "--save-every", "2"]
    run(example, stage, whole, *options)
    calls = []
    draw = fitting.Draws.indices

    def crash_in_fourth_step(self, *arguments):
        calls.append(1)
        if len(calls) == 4:
            raise ZeroDivisionError("power cut")
        return draw(self, *arguments)

    monkeypatch.setattr(fitting.Draws, "indices", crash_in_fourth_step)
    with pytest.raises(ZeroDivisionError):
        run(example, stage, broken, *options)
    assert (broken / f"{stage}.checkpoint.safetensors").exists() and not (broken / f"{stage}.safetensors").exists()
    run(example, stage, broken, *options)
    assert len(calls) == 4 + 3, "goes on after step 2, not from the start"
    assert same(result(whole, stage), result(broken, stage))


def test_a_request_to_stop_saves_and_goes_on(example, work, tmp_path, monkeypatch):
    whole, stopped = copy_cache(work, tmp_path / "whole"), copy_cache(work, tmp_path / "stopped")
    options = ["--steps", "3", "--batch", "4", "--save-every", "100"]
    run(example, "unet", whole, *options)
    draw = fitting.Draws.indices

    def ask_to_stop(self, *arguments):
        os.kill(os.getpid(), signal.SIGTERM)
        return draw(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(fitting.Draws, "indices", ask_to_stop)
        with pytest.raises(SystemExit, match="after step 1; run the same command to go on"):
            run(example, "unet", stopped, *options)
    run(example, "unet", stopped, *options)
    assert same(result(whole), result(stopped))


@pytest.mark.slow
def test_two_processes_make_the_same_model(example, work, tmp_path):
    alone, shared = copy_cache(work, tmp_path / "alone"), copy_cache(work, tmp_path / "shared")
    options = ["unet", "--steps", "2", "--batch", "4", "--lr", "1e-3", "--ema", "0"]
    run(example, options[0], alone, *options[1:])
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*launch, str(FOLDER / "train.py"), *options, "--work", str(shared)]
    subprocess.run(command, check=True, timeout=300, capture_output=True)
    one, two = result(alone), result(shared)
    start = example["networks"].unet
    torch.manual_seed(0)
    moved = {k: (one[k] - v).abs().max() for k, v in start().state_dict().items()}
    assert all((one[k] - two[k]).abs().max() <= 0.05 * moved[k] + 1e-6 for k in one), "beyond rounding"


def test_teacher_agrees_with_itself_in_every_parametrisation(example):
    """The teacher's mean must not depend on how the noisy latents are scaled: exact for a v model at its timesteps."""
    objectives, networks = example["objectives"], example["networks"]
    torch.manual_seed(0)
    unet = networks.unet()
    torch.nn.init.normal_(unet.conv_out.weight, std=0.1)
    teacher = objectives.Teacher(unet)
    z, noise, text = torch.randn(3, 4, 16, 16), torch.randn(3, 4, 16, 16), {"clip": torch.randn(3, 20, 128)}
    t = torch.tensor([50, 400, 900])
    alpha, sigma = (
        level[t].view(3, 1, 1, 1)
        for level in denoising.alphas_and_sigmas(networks.diffusion_scheduler("v_prediction"))
    )
    x = alpha * z + sigma * noise
    direct = alpha * x - sigma * unet(x, t, text["clip"]).sample
    total = alpha + sigma
    for scale in (1.0, 1 / total):
        clean = teacher.clean(x * scale, alpha * scale, sigma * scale, text)
        torch.testing.assert_close(clean, direct, rtol=0, atol=2e-3)


@pytest.mark.parametrize("shape", [(24, 40), (40, 24), (16, 16)])
def test_muon_updates_are_nearly_orthogonal(shape):
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    values = torch.linalg.svdvals(muon.orthogonalised(matrix))
    assert values.min() > 0.3 and values.max() < 1.3
    left, _, right = torch.linalg.svd(matrix, full_matrices=False)
    assert ((muon.orthogonalised(matrix) * (left @ right)).sum() / min(shape)) > 0.8


def test_object_weight_covers_the_objects_and_has_mean_one(example):
    scenes = zoo.held_out(100)
    weight = example["objectives"].object_weight(scenes.specs)
    assert weight.mean() == pytest.approx(1, abs=1e-5) and len(weight.unique()) == 2
    touched = torch.nn.functional.max_pool2d(scenes.masks.amax(1, keepdim=True), 4) > 0.5
    assert (weight[touched] == weight.max()).all()


def test_missing_stage_is_named(example, tmp_path):
    with pytest.raises(FileNotFoundError, match="run the stage that makes it first"):
        run(example, "unet", tmp_path, *TINY)
