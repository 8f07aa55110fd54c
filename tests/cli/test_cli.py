"""The command line: what it prints, one-line errors, exit codes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from diffusers_ext import cli, demo, zoo
from diffusers_ext.registry import list_methods


SLUGS = [r.slug for r in list_methods()]


def run(capsys, *argv: str) -> tuple[int, str, str]:
    code = cli.main(argv)
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def fails(capsys, *argv: str) -> str:
    """The error of a command that must fail: one line, non-zero exit code, no traceback."""
    code, _, err = run(capsys, *argv)
    assert code == 1
    assert err.startswith("diffusers-ext: ") and err.count("\n") == 1 and "Traceback" not in err
    return err


def test_list_shows_every_method(capsys):
    code, out, _ = run(capsys, "list")
    assert code == 0
    assert [line.split()[0] for line in out.splitlines()[1:]] == SLUGS
    assert all(r.summary in out for r in list_methods())


@pytest.mark.parametrize("field", ["family", "kind"])
def test_list_filters(capsys, field):
    for value in {getattr(r, field) for r in list_methods()}:
        _, out, _ = run(capsys, "list", f"--{field}", value)
        assert [s.split()[0] for s in out.splitlines()[1:]] == [r.slug for r in list_methods(**{field: value})]


def test_list_unknown_family_names_the_nearest(capsys):
    assert "unknown family 'cashing'. Did you mean 'caching'?" in fails(capsys, "list", "--family", "cashing")


@pytest.mark.parametrize("record", list_methods(), ids=lambda r: r.slug)
def test_show(capsys, record):
    code, out, _ = run(capsys, "show", record.slug)
    assert code == 0
    for text in (record.title, record.paper_url, record.summary, record.workflow, record.docs, *record.nodes):
        assert text in out


@pytest.mark.parametrize("command", ["show", "check", "bench"])
def test_unknown_method(capsys, command):
    argv = [command, "deepcash", *(["shapes-unet"] if command == "check" else [])]
    assert "unknown method 'deepcash'. Did you mean 'deepcache'?" in fails(capsys, *argv)


def test_usage_error_exits_with_2(capsys):
    with pytest.raises(SystemExit) as info:
        cli.main(["lst"])
    assert info.value.code == 2
    assert "invalid choice" in capsys.readouterr().err


def test_check_accepts_and_refuses(capsys):
    code, out, _ = run(capsys, "check", "deepcache", "shapes-unet", "--steps", "20")
    assert code == 0 and out == "deepcache runs on shapes-unet\n"
    err = fails(capsys, "check", "deepcache", "shapes-dit")
    assert "deepcache cannot run on shapes-dit" in err and "unet" in err.lower()


def test_check_warns_about_too_few_steps(capsys):
    code, out, _ = run(capsys, "check", "deepcache", "shapes-unet", "--steps", "1")
    assert code == 0 and out.startswith("warning: ")


@pytest.mark.parametrize("record", list_methods(), ids=lambda r: r.slug)
def test_every_method_runs_on_a_shipped_model(capsys, record):
    assert 0 in [run(capsys, "check", record.slug, model)[0] for model in zoo.names()]


def test_check_does_not_touch_the_pipeline(shapes_unet):
    before = shapes_unet.scheduler, dict(shapes_unet.unet.__dict__)
    for record in list_methods():
        cli.preflight(record, shapes_unet)
    assert (shapes_unet.scheduler, dict(shapes_unet.unet.__dict__)) == before


def test_unknown_model(capsys, tmp_path):
    assert "Did you mean 'shapes-unet'?" in fails(capsys, "check", "deepcache", "shapes-unt")
    assert "there is no model folder" in fails(capsys, "check", "deepcache", "no/such/folder")
    assert "model_index.json" in fails(capsys, "check", "deepcache", str(tmp_path))


def test_damaged_model_folder(capsys, shapes_unet, tmp_path):
    shapes_unet.save_pretrained(tmp_path / "whole")
    assert run(capsys, "check", "deepcache", str(tmp_path / "whole"))[0] == 0
    weights = tmp_path / "whole" / "unet" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    err = fails(capsys, "check", "deepcache", str(tmp_path / "whole"))
    assert "missing or damaged" in err and "whole" in err


def test_unknown_workflow_names_the_nearest(capsys):
    assert "unknown workflow 'deepcash'. Did you mean 'deepcache'?" in fails(capsys, "run", "deepcash")
    assert "there is no file nothing.json" in fails(capsys, "run", "nothing.json")


def test_run_without_comfyui_says_what_to_do(capsys, tmp_path):
    err = fails(capsys, "run", "deepcache", "--url", "http://127.0.0.1:9", "--out", str(tmp_path / "out"))
    assert "127.0.0.1:9" in err
    err = fails(capsys, "run", "deepcache", "--comfyui", str(tmp_path), "--out", str(tmp_path / "out"))
    assert str(tmp_path) in err


def test_settings_without_a_value_are_refused(capsys, tmp_path):
    for text in ("steps", "=8"):
        err = fails(capsys, "run", "deepcache", "--url", "http://127.0.0.1:9", "--out", str(tmp_path), "--set", text)
        assert "NAME=VALUE" in err


SMALL = ["--latents", "2", "--grid", "10"]


def test_calibrate_writes_statistics_the_scheduler_takes(capsys, shapes_unet, tmp_path):
    from diffusers_ext import EMS, DPMSolverV3MultistepScheduler

    path = tmp_path / "new" / "ems.safetensors"
    code, out, _ = run(capsys, "calibrate", "shapes-unet", str(path), *SMALL, "--guidance-scale", "2")
    assert code == 0 and out == f"{path}\n"
    ems = EMS.load(path)
    assert len(ems.log_snr) == 11 and ems.metadata["guidance_scale"] == "2.0" and ems.metadata["num_data"] == "2"
    DPMSolverV3MultistepScheduler.from_config(shapes_unet.scheduler.config).load_ems(path)


def test_calibrate_on_own_pictures(capsys, shapes_unet, tmp_path):
    """Pictures of any size, each with its caption, for a pipeline saved in a folder."""
    from PIL import Image

    from diffusers_ext import EMS

    shapes_unet.save_pretrained(tmp_path / "model")
    (tmp_path / "data").mkdir()
    for name, size in (("a.png", (90, 70)), ("b.jpg", (64, 64))):
        Image.new("RGB", size, "red").save(tmp_path / "data" / name)
        (tmp_path / "data" / name).with_suffix(".txt").write_text("a red circle\n")
    arguments = [str(tmp_path / "model"), str(tmp_path / "ems.safetensors"), *SMALL]
    assert "--data" in fails(capsys, "calibrate", *arguments)
    assert run(capsys, "calibrate", *arguments, "--data", str(tmp_path / "data"))[0] == 0
    assert EMS.load(tmp_path / "ems.safetensors").metadata["dataset"] == "data"
    (tmp_path / "data" / "b.txt").unlink()
    assert "b.jpg has no caption" in fails(capsys, "calibrate", *arguments, "--data", str(tmp_path / "data"))
    assert "no pictures" in fails(capsys, "calibrate", *arguments, "--data", str(tmp_path / "model"))


def test_bench_from_a_wheel_says_where_benchmarks_are(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(cli, "_CHECKOUT", tmp_path)
    assert f"clone {cli.REPOSITORY}" in fails(capsys, "bench", "deepcache")


@pytest.mark.parametrize(
    "command", [["demo"], ["run", "deepcache", "--url", "http://127.0.0.1:9"]], ids=["demo", "run"]
)
def test_outputs_that_cannot_be_written(capsys, tmp_path, command):
    (tmp_path / "file").write_text("in the way")
    err = fails(capsys, *command, "--out", str(tmp_path / "file" / "out"))
    assert "cannot write to" in err and "--out" in err


def test_unexpected_errors_are_one_line_with_a_hint(capsys, monkeypatch):
    def broken(slug):
        raise KeyError("surprise")

    monkeypatch.setattr(cli, "get_method", broken)
    assert "KeyError; diffusers-ext --traceback" in fails(capsys, "show", "deepcache")
    with pytest.raises(KeyError):
        cli.main(["--traceback", "show", "deepcache"])


def test_help_is_quick_and_loads_nothing_heavy():
    code = (
        "import sys, time; from diffusers_ext import cli\ntry: cli.main(['list', '--help'])\nexcept SystemExit: pass\n"
    )
    code += "print(time.process_time(), sorted({'torch', 'diffusers', 'transformers'} & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    seconds, heavy = result.stdout.splitlines()[-1].split(maxsplit=1)
    assert heavy == "[]", result.stderr
    assert float(seconds) < 5


def test_module_entry_point():
    command = [sys.executable, "-m", "diffusers_ext.cli", "show", "nope"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert result.returncode == 1 and "unknown method 'nope'" in result.stderr


TINY = demo.Settings(count=8, steps=2, few=1, interval=2, superdiff_steps=2)


@pytest.fixture
def two_rows(monkeypatch):
    """A demo of the two cheapest rows of one model."""
    chosen = [row for row in demo.rows(TINY) if row.name in ("shapes-unet-baseline", "shapes-unet-few")]
    monkeypatch.setattr(demo, "QUICK", TINY)
    monkeypatch.setattr(demo, "rows", lambda settings: chosen)
    return chosen


def test_demo_writes_table_page_and_pictures(capsys, two_rows, tmp_path):
    code, out, _ = run(capsys, "demo", "--quick", "--out", str(tmp_path), "--sheet", str(tmp_path / "sheet.png"))
    assert code == 0
    assert "speed-up" in out and "baseline" in out
    page = (tmp_path / "index.html").read_text(encoding="utf-8")
    for row in two_rows:
        figures = json.loads((tmp_path / "rows" / f"{row.name}.json").read_text())
        assert figures["calls"] == {"shapes-unet-baseline": 2, "shapes-unet-few": 1}[row.name]
        assert f'src="rows/{row.name}-large.png"' in page
    assert figures["psnr"] > 5 and figures["speedup"] > 1
    assert (tmp_path / "sheet.png").read_bytes() == (tmp_path / "demo.png").read_bytes()
    assert not list(tmp_path.rglob("*.part"))


def test_demo_continues_after_an_interruption(capsys, monkeypatch, two_rows, tmp_path):
    drawn, draw = [], demo._draw

    def interrupted(row, *args):
        if len(drawn) == 1:
            raise KeyboardInterrupt
        drawn.append(row.name)
        draw(row, *args)

    monkeypatch.setattr(demo, "_draw", interrupted)
    code, _, err = run(capsys, "demo", "--quick", "--out", str(tmp_path))
    assert code == 130 and "run the same command again" in err
    assert not (tmp_path / "index.html").exists()
    first = (tmp_path / "rows" / f"{two_rows[0].name}.json").read_text()

    names = []
    monkeypatch.setattr(demo, "_draw", lambda row, *args: (names.append(row.name), draw(row, *args)))
    assert run(capsys, "demo", "--quick", "--out", str(tmp_path))[0] == 0
    assert names == [two_rows[1].name]
    assert (tmp_path / "rows" / f"{two_rows[0].name}.json").read_text() == first
    names.clear()
    assert run(capsys, "demo", "--quick", "--fresh", "--out", str(tmp_path))[0] == 0
    assert names == [row.name for row in two_rows]


def test_demo_leaves_the_pipeline_as_it_was(shapes_unet, judge, tmp_path):
    row = next(r for r in demo.rows(TINY) if r.name == "shapes-unet-deepcache")
    baseline = next(r for r in demo.rows(TINY) if r.name == row.baseline)
    store, before = demo.Store(tmp_path, TINY), (shapes_unet.scheduler, set(shapes_unet.unet.__dict__))
    for each in (baseline, row):
        demo._draw(each, shapes_unet, judge, store, TINY)
    assert (shapes_unet.scheduler, set(shapes_unet.unet.__dict__)) == before


def test_strip_round_trip():
    import torch

    images = torch.rand(16, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    again = demo.from_strip(demo.to_strip(images), 64)
    assert (again - images).abs().max() <= 1 / 255 + 1e-6


def test_shipped_workflows_are_found():
    assert set(SLUGS) <= {path.stem for path in map(cli.workflow_path, SLUGS)}
    assert all(isinstance(cli.workflow_path(slug), Path) for slug in SLUGS)
