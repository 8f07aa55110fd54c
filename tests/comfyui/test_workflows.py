"""Every shipped workflow: runs on a real server to real pictures, and opens in the real page without a complaint."""

from __future__ import annotations

import functools
import json
import os
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from diffusers_ext import zoo
from diffusers_ext.comfy_graph import for_shapes, set_prompt, set_values, shapes_substitutions, substitute, to_api


REPOSITORY = Path(__file__).resolve().parents[2]
WORKFLOWS = sorted((REPOSITORY / "workflows").glob("*.json"))
CAPTION = "a large red circle left of a small yellow star, striped blue background"
# Set to docs/assets/workflows (as `make thumbnails` does) to keep what Chromium showed.
SCREENSHOTS = os.environ.get("WORKFLOW_SCREENSHOTS")

each_workflow = pytest.mark.parametrize("path", WORKFLOWS, ids=lambda p: p.stem)


def _read(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


def _picture(path: Path) -> torch.Tensor:
    return torch.from_numpy(np.array(Image.open(path).convert("RGB"))).movedim(-1, 0) / 255.0


@pytest.fixture(scope="session")
def run_on_shapes(server, tmp_path_factory):
    """`run_on_shapes(path)` -> pictures of a workflow run on the server with a shipped model."""

    def run(path: Path, caption: str = CAPTION) -> list[torch.Tensor]:
        graph = for_shapes(_read(path), server.object_info, caption)
        entry = server.client.run(graph, timeout=300)
        return [_picture(p) for p in server.client.save_outputs(entry, tmp_path_factory.mktemp(path.stem))]

    return run


@each_workflow
def test_runs_to_pictures(run_on_shapes, picture_flaw, path):
    pictures = run_on_shapes(path)
    assert pictures
    assert {picture_flaw(p) for p in pictures} == {None}


@each_workflow
def test_is_explained_and_keeps_its_seed(path):
    nodes = _read(path)["nodes"]
    notes = [n for n in nodes if n["type"] == "MarkdownNote"]
    assert notes and all(len(n["widgets_values"][0]) > 80 for n in notes)
    assert any(n["type"] == "SaveImage" for n in nodes)
    rolling = {"increment", "decrement", "randomize"}
    assert not [n["type"] for n in nodes if rolling & {v for v in n.get("widgets_values") or [] if isinstance(v, str)}]


@each_workflow
def test_has_a_thumbnail(path):
    with Image.open(path.with_suffix(".jpg")) as thumbnail:
        assert min(thumbnail.size) >= 256


@pytest.fixture(scope="session")
def page_results(open_in_browser, tmp_path_factory):
    """What the page said of every workflow, opened one after the other."""
    folder = Path(SCREENSHOTS) if SCREENSHOTS else tmp_path_factory.mktemp("screenshots")
    jobs = [{"name": p.stem, "workflow": _read(p), "screenshot": str(folder / f"{p.stem}.png")} for p in WORKFLOWS]
    broken = _read(WORKFLOWS[0])
    broken["nodes"][0]["type"] = "NoSuchNode"
    jobs.append({"name": "broken", "workflow": broken})
    return {result["name"]: {**result, "folder": folder} for result in open_in_browser(jobs)}


@pytest.mark.browser
@each_workflow
def test_opens_in_the_page(page_results, path):
    result = page_results[path.stem]
    assert result["problems"] == []
    with Image.open(result["folder"] / f"{path.stem}.png") as shot:
        assert len(shot.convert("RGB").getcolors(2**24)) > 100


@pytest.mark.browser
@each_workflow
def test_our_conversion_is_the_pages(server, page_results, path):
    def plain(graph):
        return {i: {"class_type": n["class_type"], "inputs": n["inputs"]} for i, n in graph.items()}

    assert to_api(_read(path), server.object_info) == plain(page_results[path.stem]["prompt"])


@pytest.mark.browser
def test_the_page_reports_a_missing_node(page_results):
    assert any("missing node types: NoSuchNode" in p for p in page_results["broken"]["problems"])


@pytest.mark.parametrize("slug", ["shapes-text-to-image", "shapes-dit"])
def test_shapes_pictures_follow_the_prompt(run_on_shapes, judge, slug):
    """What the judge reads is what was asked for, far more often than by chance (1/8 and 1/9)."""
    scenes = zoo.held_out(3)
    right = []
    for caption, spec in zip(scenes.captions, scenes.specs):
        pictures = torch.stack(run_on_shapes(REPOSITORY / f"workflows/{slug}.json", caption)) * 2 - 1
        right.append(judge.accuracy(pictures, spec.expand(len(pictures), -1)))
    for attribute in ("ground", "layout"):
        assert sum(r[attribute] for r in right) / len(right) > 0.6, attribute


class TestSolverShootout:
    """The comparison is fair: one seed and guidance, and as many model calls for every sampler."""

    PATH = REPOSITORY / "workflows/solver-shootout.json"

    @pytest.fixture
    def graph(self, server):
        return for_shapes(_read(self.PATH), server.object_info, CAPTION)

    def test_six_samplers_share_seed_guidance_and_latent(self, graph):
        runs = [n["inputs"] for n in graph.values() if n["class_type"] == "SamplerCustomAdvanced"]
        assert len(runs) == len({graph[r["sampler"][0]]["class_type"] for r in runs}) == 6
        assert all(graph[r["sampler"][0]]["class_type"].startswith("DX") for r in runs)
        for shared in ("noise", "guider", "latent_image"):
            assert len({tuple(r[shared]) for r in runs}) == 1
        labels = [n["inputs"]["text"] for n in graph.values() if n["class_type"] == "TextOverlay"]
        assert len(set(labels)) == 6

    def test_every_sampler_makes_the_same_number_of_calls(self, comfy, dx_nodes, native_pipe, graph):
        model = native_pipe("shapes-unet")[0]
        calls = next(n["inputs"]["value"] for n in graph.values() if n["class_type"] == "PrimitiveInt")
        plain = comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), "normal", calls)
        made = {}
        for node in graph.values():
            if node["class_type"] == "SamplerCustomAdvanced":
                name = graph[node["inputs"]["sampler"][0]]["class_type"]
                inputs = dict(graph[node["inputs"]["sampler"][0]]["inputs"])
                inputs.update(
                    {key: {"model": model, "steps": calls}[key] for key in ("model", "steps") if key in inputs}
                )
                sampler, *sigmas = dx_nodes[name].execute(**inputs).result
                made[name] = self._count(comfy, model, sampler, sigmas[0] if sigmas else plain)
        assert len(made) == 6 and set(made.values()) == {calls}

    @staticmethod
    def _count(comfy, model, sampler, sigmas) -> int:
        calls, counted = [], model.clone()

        def count(apply_model, args):
            calls.append(1)
            return apply_model(args["input"], args["timestep"], **args["c"])

        counted.set_model_unet_function_wrapper(count)
        guider = comfy.samplers.CFGGuider(counted)
        guider.set_conds([[torch.zeros(1, 20, 128), {}]], [])
        guider.set_cfg(1.0)
        noise = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0))
        guider.sample(noise, torch.zeros_like(noise), sampler, sigmas)
        return len(calls)


@functools.cache
def _vae():
    return zoo.load("shapes-unet").vae


@torch.no_grad()
def _decode(latent: torch.Tensor) -> torch.Tensor:
    return (_vae().decode(latent / _vae().config.scaling_factor).sample / 2 + 0.5).clamp(0, 1)


class TestPictureFlaw:
    """The two limits, against what they must tell apart."""

    @pytest.mark.parametrize("value", [0.0, 0.5, 1.0])
    def test_blank(self, picture_flaw, value):
        assert "blank" in picture_flaw(torch.full((3, 64, 64), value))

    def test_a_decoded_zero_latent_is_blank(self, picture_flaw):
        assert "blank" in picture_flaw(_decode(torch.zeros(1, 4, 16, 16))[0])

    def test_noisy_pixels(self, picture_flaw):
        assert "noise" in picture_flaw(torch.rand(3, 64, 64, generator=torch.Generator().manual_seed(0)))

    @pytest.mark.parametrize("scale", [1.0, 2.0])
    def test_decoded_noise(self, picture_flaw, scale):
        latents = scale * torch.randn(16, 4, 16, 16, generator=torch.Generator().manual_seed(0))
        assert all("noise" in picture_flaw(image) for image in _decode(latents))

    def test_no_scene_of_the_world_is_noise(self, picture_flaw):
        """Scenes of two similar colours may count as blank; the tests ask for red on blue."""
        scenes = zoo.held_out(400)
        flaws = {caption: picture_flaw(image / 2 + 0.5) for caption, image in zip(scenes.captions, scenes.images)}
        assert not [caption for caption, flaw in flaws.items() if flaw and "noise" in flaw]
        asked = [flaw for caption, flaw in flaws.items() if "large red" in caption and "blue background" in caption]
        assert asked and set(asked) == {None}


def _node(class_type: str, **inputs) -> dict:
    return {"class_type": class_type, "inputs": inputs}


INFO = {
    "CheckpointLoaderSimple": {"name": "CheckpointLoaderSimple", "output": ["MODEL", "CLIP", "VAE"]},
    "VAELoader": {"name": "VAELoader", "output": ["VAE"]},
    "DXLoadShapes": {"name": "DXLoadShapes", "output": ["MODEL", "CLIP", "VAE"]},
}


class TestGraphChanges:
    """Substitution and prompts on plain data."""

    def test_outputs_are_reconnected_by_type(self):
        graph = {"1": _node("VAELoader", vae_name="a"), "2": _node("VAEDecode", vae=["1", 0], samples=["9", 0])}
        changed = substitute(graph, {"VAELoader": {"class_type": "DXLoadShapes", "inputs": {"model": "m"}}}, INFO)
        assert changed["1"] == _node("DXLoadShapes", model="m")
        assert changed["2"]["inputs"] == {"vae": ["1", 2], "samples": ["9", 0]}
        assert graph["1"] == _node("VAELoader", vae_name="a")

    def test_values_and_inputs_are_replaced(self):
        graph = {"1": _node("CheckpointLoaderSimple", ckpt_name="big"), "2": _node("KSampler", steps=20, cfg=7.0)}
        changed = substitute(graph, {"big": "small", "KSampler": {"inputs": {"steps": 2}}}, INFO)
        assert changed == {
            "1": _node("CheckpointLoaderSimple", ckpt_name="small"),
            "2": _node("KSampler", steps=2, cfg=7.0),
        }

    def test_public_settings_become_those_of_the_shipped_models(self):
        graph = {
            "1": _node("EmptyLatentImage", width=512, height=512, batch_size=2),
            "2": _node("KSampler", cfg=7.0, steps=20),
        }
        assert substitute(graph, shapes_substitutions("shapes-unet"), INFO) == {
            "1": _node("EmptyLatentImage", width=64, height=64, batch_size=2),
            "2": _node("KSampler", cfg=3.0, steps=20),
        }

    def test_a_replacement_must_have_the_output(self):
        graph = {"1": _node("CheckpointLoaderSimple"), "2": _node("Use", model=["1", 0])}
        with pytest.raises(ValueError, match="VAELoader has no MODEL output"):
            substitute(graph, {"CheckpointLoaderSimple": {"class_type": "VAELoader"}}, INFO)

    def test_values_are_set_by_the_names_people_type(self):
        graph = {
            "1": _node("CheckpointLoaderSimple", ckpt_name="v1-5-fp16.safetensors"),
            "2": _node("KSampler", model=["1", 0], steps=20, cfg=7, sampler_name="euler"),
            "3": _node("BasicScheduler", model=["1", 0], steps=20),
            "4": _node("Overlay", outline=True),
        }
        changes = {
            "v1-5-fp16.safetensors": "mine.safetensors",
            "KSampler.steps": "8",
            "cfg": "3.5",
            "euler": "heun",
            "outline": "False",
        }
        changed = set_values(graph, changes)
        assert changed == {
            "1": _node("CheckpointLoaderSimple", ckpt_name="mine.safetensors"),
            "2": _node("KSampler", model=["1", 0], steps=8, cfg=3.5, sampler_name="heun"),
            "3": _node("BasicScheduler", model=["1", 0], steps=20),
            "4": _node("Overlay", outline=False),
        }
        assert [n["inputs"].get("steps") for n in set_values(graph, {"steps": "6"}).values()] == [None, 6, 6, None]
        assert graph["2"]["inputs"]["cfg"] == 7

    @pytest.mark.parametrize(
        "values, message",
        [
            ({"v1-5-fp61.safetensors": "x"}, "Did you mean 'v1-5-fp16.safetensors'"),
            ({"KSampler.stps": "3"}, "Did you mean 'KSampler.steps'"),
            ({"model": "x"}, "unknown value 'model'"),
            ({"steps": "many"}, "steps is 'many'; a number is needed"),
            ({"outline": "yes"}, "accepted: true, false"),
        ],
    )
    def test_values_that_fit_nowhere_are_refused(self, values, message):
        graph = {
            "1": _node("CheckpointLoaderSimple", ckpt_name="v1-5-fp16.safetensors"),
            "2": _node("KSampler", model=["1", 0], steps=20, outline=True),
        }
        with pytest.raises(ValueError, match=re.escape(message)):
            set_values(graph, values)

    def test_only_positive_prompts_change(self):
        graph = {
            "1": _node("CLIPTextEncode", clip=["0", 1], text="a cat"),
            "2": _node("CLIPTextEncode", clip=["0", 1], text="blurry"),
            "3": _node("ConditioningSetTimestepRange", conditioning=["2", 0]),
            "4": _node("KSampler", positive=["1", 0], negative=["3", 0]),
        }
        changed = set_prompt(graph, "a dog")
        assert [changed[i]["inputs"].get("text") for i in ("1", "2")] == ["a dog", "blurry"]
        changed = set_prompt(graph, "a dog", negative="")
        assert [changed[i]["inputs"].get("text") for i in ("1", "2")] == ["a dog", ""]

    def test_bypassed_muted_and_rerouted_nodes(self):
        link = {"link": None}
        workflow = {
            "nodes": [
                {"id": 1, "type": "Load", "inputs": [], "outputs": [{"type": "MODEL"}], "widgets_values": []},
                {
                    "id": 2,
                    "type": "Patch",
                    "mode": 4,
                    "inputs": [{"name": "model", "type": "MODEL", "link": 1}],
                    "outputs": [{"type": "MODEL"}],
                },
                {"id": 3, "type": "Reroute", "inputs": [{"name": "", "type": "*", "link": 2}], "outputs": [{}]},
                {"id": 4, "type": "Load", "mode": 2, "inputs": [], "outputs": [{"type": "MODEL"}]},
                {"id": 5, "type": "PrimitiveNode", "inputs": [], "outputs": [{}], "widgets_values": [9, "fixed"]},
                {
                    "id": 6,
                    "type": "Use",
                    "inputs": [
                        {"name": "model", "type": "MODEL", "link": 3},
                        {"name": "other", "type": "MODEL", "link": 4},
                        {"name": "seed", "type": "INT", "link": 5},
                        {"name": "free", "type": "MODEL", **link},
                    ],
                    "widgets_values": [1, "randomize", 0.5],
                },
            ],
            "links": [[1, 1, 0, 2, 0], [2, 2, 0, 3, 0], [3, 3, 0, 6, 0], [4, 4, 0, 6, 1], [5, 5, 0, 6, 2]],
        }
        schema = {"seed": ["INT", {"control_after_generate": True}], "cfg": ["FLOAT", {}]}
        info = {"Load": {"input": {}}, "Use": {"input": {"required": schema}}}
        assert to_api(workflow, info) == {
            "1": _node("Load"),
            "6": _node("Use", seed=9, cfg=0.5, model=["1", 0]),
        }

    def test_subgraphs_are_refused(self):
        with pytest.raises(ValueError, match="subgraphs"):
            to_api({"nodes": [], "links": [], "definitions": {"subgraphs": [{}]}}, {})
