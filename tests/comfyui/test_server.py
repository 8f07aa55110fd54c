"""The client on a real server: a good run, and every way a run can go wrong, each told in one line."""

from __future__ import annotations

import copy
import json
import threading
import time
from pathlib import Path

import PIL.Image
import pytest

from diffusers_ext import cli
from diffusers_ext.comfy_client import ComfyClient, ComfyError, run_workflow, start_server
from diffusers_ext.comfy_graph import to_api


REPOSITORY = Path(__file__).resolve().parents[2]
HELLO = REPOSITORY / "workflows/shapes-text-to-image.json"


@pytest.fixture
def graph(server):
    return to_api(json.loads(HELLO.read_text()), server.object_info)


def _sampler(graph) -> dict:
    return next(node["inputs"] for node in graph.values() if node["class_type"] == "KSampler")


def _one_line(error) -> str:
    message = str(error.value)
    assert "\n" not in message
    return message


def test_our_pack_is_loaded_without_complaint(server):
    log = server.log.read_text(errors="replace")
    assert "IMPORT FAILED" not in log
    assert "DXLoadShapes" in server.object_info


def test_run_workflow_saves_every_picture(server, tmp_path):
    paths = run_workflow(HELLO, url=server.url, output_dir=tmp_path / "new" / "folder", progress=False)
    assert len(paths) == 4
    assert all(p.parent == tmp_path / "new/folder" and p.read_bytes()[:4] == b"\x89PNG" for p in paths)


def test_progress_counts_the_steps(server, graph):
    _sampler(graph).update(seed=1, steps=5)
    seen = []
    server.client.run(graph, progress=lambda *event: seen.append(event))
    steps = [step for name, step, steps in seen if name == "KSampler" and steps == 5]
    assert steps[-1] == 5
    assert steps == sorted(steps)


def test_prompt_and_substitutions_reach_the_server(server, tmp_path):
    arguments = {"url": server.url, "progress": False}
    plain = run_workflow(HELLO, output_dir=tmp_path / "a", **arguments)
    other = run_workflow(HELLO, output_dir=tmp_path / "b", prompt="a small white ring", **arguments)
    fewer = run_workflow(
        HELLO,
        output_dir=tmp_path / "c",
        substitutions={"EmptyLatentImage": {"inputs": {"batch_size": 1}}},
        **arguments,
    )
    assert plain[0].read_bytes() != other[0].read_bytes()
    assert len(fewer) == 1


def test_the_command_line_changes_prompt_model_and_settings(server, tmp_path, capsys):
    """Read back from the graph that ComfyUI writes into its pictures."""
    changes = ["--prompt", "a small white ring", "--set", "shapes-unet=shapes-unet-eps", "--set", "batch_size=1"]
    main = ["run", str(HELLO), "--url", server.url]
    assert cli.main([*main, *changes, "--set", "KSampler.steps=4", "--out", str(tmp_path / "a")]) == 0
    assert cli.main([*main, *changes, "--set", "KSampler.steps=5", "--out", str(tmp_path / "b")]) == 0
    first, second = (Path(line) for line in capsys.readouterr().out.splitlines())
    assert first.parent == tmp_path / "a" and first.read_bytes() != second.read_bytes()
    graph = json.loads(PIL.Image.open(first).text["prompt"])
    used = [(key, value) for node in graph.values() for key, value in node["inputs"].items()]
    wanted = [("model", "shapes-unet-eps"), ("batch_size", 1), ("steps", 4), ("text", "a small white ring")]
    assert all(pair in used for pair in wanted)
    assert cli.main([*main, "--set", "shapes-unt=shapes-dit", "--out", str(tmp_path / "c")]) == 1
    assert "unknown value 'shapes-unt'" in capsys.readouterr().err


def test_an_unknown_node_type_is_named(server, tmp_path):
    graph = {"1": {"class_type": "NoSuchNode", "inputs": {}}}
    (tmp_path / "w.json").write_text(json.dumps(graph))
    with pytest.raises(ComfyError, match="lacks the node types NoSuchNode") as error:
        run_workflow(tmp_path / "w.json", url=server.url)
    _one_line(error)


def test_a_refused_input_is_named(server, graph):
    _sampler(graph)["sampler_name"] = "no-such-sampler"
    with pytest.raises(ComfyError, match=r"KSampler.*sampler_name.*no-such-sampler") as error:
        server.client.run(graph)
    _one_line(error)


def test_a_dropped_branch_is_an_error(server, graph):
    bad = copy.deepcopy(graph)
    save = next(i for i, n in bad.items() if n["class_type"] == "SaveImage")
    bad["99"] = {"class_type": "SaveImage", "inputs": {"images": ["98", 0], "filename_prefix": "x"}}
    bad["98"] = {"class_type": "LoadImage", "inputs": {"image": "no-such-picture.png"}}
    assert save in bad
    with pytest.raises(ComfyError, match=r"leave out.*no-such-picture") as error:
        server.client.run(bad)
    _one_line(error)


def test_a_node_that_raises_is_named(server, graph):
    save = next(i for i, n in graph.items() if n["class_type"] == "SaveImage")
    graph[save]["inputs"]["filename_prefix"] = "../../outside"
    with pytest.raises(ComfyError, match=rf"node {save} \(SaveImage\) failed: .*output folder") as error:
        server.client.run(graph)
    _one_line(error)


def test_interrupt_ends_a_run(server, graph):
    _sampler(graph).update(seed=3, steps=10_000)
    client, started = ComfyClient(server.url), threading.Event()

    def stop():
        started.wait(60)
        running = client.get("/queue")["queue_running"]
        client.interrupt(running[0][1])

    thread = threading.Thread(target=stop)
    thread.start()
    begin = time.monotonic()
    with pytest.raises(ComfyError, match="interrupted"):
        server.client.run(graph, progress=lambda *event: started.set())
    thread.join()
    assert time.monotonic() - begin < 60


def test_timeout_interrupts_and_frees_the_server(server, graph):
    _sampler(graph).update(seed=4, steps=10_000)
    with pytest.raises(ComfyError, match=r"no result after 2 s; the run was interrupted"):
        server.client.run(graph, timeout=2)
    _sampler(graph).update(seed=5, steps=1)
    assert server.client.run(graph, timeout=120)["status"]["status_str"] == "success"


def test_nobody_at_the_address(tmp_path):
    with pytest.raises(ComfyError, match="no ComfyUI answers at http://127.0.0.1:9") as error:
        run_workflow(HELLO, url="http://127.0.0.1:9")
    _one_line(error)


def test_a_folder_without_comfyui(tmp_path):
    with pytest.raises(ComfyError, match=r"no ComfyUI in .*: there is no main.py") as error, start_server(tmp_path):
        pass
    _one_line(error)


def test_a_server_that_ends_at_once(comfyui_dir, tmp_path):
    arguments = {"log": tmp_path / "log", "base_directory": tmp_path, "arguments": ["--no-such-option"]}
    with (
        pytest.raises(ComfyError, match="ended with status 2.*no-such-option"),
        start_server(comfyui_dir, **arguments),
    ):
        pass


@pytest.mark.parametrize(
    ("text", "message"),
    [("{", "is not a JSON workflow"), ("[1]", "is not a ComfyUI workflow"), (None, "no workflow at")],
)
def test_files_that_are_no_workflows(tmp_path, text, message):
    path = tmp_path / "w.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ComfyError, match=message) as error:
        run_workflow(path)
    _one_line(error)
