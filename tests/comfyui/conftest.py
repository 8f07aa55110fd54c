"""ComfyUI for tests: in process on small native models, as a real server, and as the real page in Chromium.

Everything skips, with the reason, where ComfyUI or Chromium is absent; `make test` installs both.
"""

from __future__ import annotations

import functools
import importlib.util
import json
import os
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch


REPOSITORY = Path(__file__).resolve().parents[2]
COMFYUI = Path(os.environ.get("COMFYUI_DIR", REPOSITORY / ".comfy/ComfyUI")).resolve()
BROWSER = Path(os.environ.get("BROWSER_DIR", REPOSITORY / ".comfy/browser")).resolve()
TINY_MODELS = Path(os.environ.get("TINY_MODELS", REPOSITORY / ".comfy/tiny")).resolve()
CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium")


def _script(name: str):
    """A module of the folder `scripts`, which is no package."""
    spec = importlib.util.spec_from_file_location(name, REPOSITORY / f"scripts/{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def comfyui_dir() -> Path:
    """Folder of the ComfyUI checkout."""
    if not (COMFYUI / "main.py").is_file():
        pytest.skip(f"no ComfyUI at {COMFYUI}: run `make .venv/.comfyui` or set COMFYUI_DIR")
    return COMFYUI


@pytest.fixture(scope="session")
def comfy(comfyui_dir):
    """ComfyUI's modules imported in this process, on the CPU: `comfy.samplers`, `comfy.nodes`, ..."""
    for folder in (REPOSITORY, comfyui_dir):
        if str(folder) not in sys.path:
            sys.path.append(str(folder))
    importlib.import_module("comfy.cli_args").args.cpu = True
    names = ("samplers", "sample", "utils", "model_management", "model_sampling", "model_patcher", "patcher_extension")
    modules = {name: importlib.import_module(f"comfy.{name}") for name in names}
    return SimpleNamespace(nodes=importlib.import_module("nodes"), **modules)


@pytest.fixture(scope="session")
def recorded():
    """`recorded(model)` -> a clone that logs every call of its network, before any patch: tensors in, tensor out."""

    def record(model):
        log, outer = [], model.clone()

        def wrapper(executor, *args, **kwargs):
            out = executor(*args, **kwargs)
            log.append([tensor.detach().clone() for tensor in (*args, out) if isinstance(tensor, torch.Tensor)])
            return out

        outer.wrappers["diffusion_model"] = {"recorder": [wrapper], **outer.wrappers.get("diffusion_model", {})}
        return outer, log

    return record


@pytest.fixture(scope="session")
def dx_nodes(comfy) -> dict:
    """Every node of the pack by its id."""
    return {node.define_schema().node_id: node for node in importlib.import_module("comfy_nodes").all_nodes()}


@pytest.fixture(scope="session")
def native_pipe(comfy):
    """`native_pipe(name)` -> (model, clip, vae) of a shipped model in ComfyUI's own classes.

    Nodes patch clones, so that tests may share them.
    """
    shapes = importlib.import_module("comfy_nodes._shapes")
    return functools.cache(lambda name: (shapes.load_model(name), shapes.load_clip(name), shapes.load_vae(name)))


@pytest.fixture(scope="session")
def encode():
    """`encode(clip, text)` -> conditioning, as the core node CLIPTextEncode makes it."""
    return lambda clip, text: clip.encode_from_tokens_scheduled(clip.tokenize(text), show_pbar=False)


@pytest.fixture(scope="session")
def tiny_models() -> Path:
    """A models folder with random Stable Diffusion 1.5, Flux and Stable Diffusion 3 for the core loaders."""
    if not (TINY_MODELS / ".written").is_file():
        pytest.skip(f"no tiny models in {TINY_MODELS}: run `make .comfy/tiny/.written`")
    return TINY_MODELS


@pytest.fixture(scope="session")
def tiny_pipe(comfy, tiny_models):
    """`tiny_pipe(name)` -> (model, clip, vae) of `"sd15"`, `"flux"` or `"sd3"`, as ComfyUI's loaders return them."""
    sd = importlib.import_module("comfy.sd")

    @functools.cache
    def load(name: str):
        checkpoint = str(tiny_models / "checkpoints/tiny_sd15.safetensors")
        if name == "sd15":
            return sd.load_checkpoint_guess_config(checkpoint)[:3]
        model = sd.load_diffusion_model(str(tiny_models / f"diffusion_models/tiny_{name}.safetensors"))
        vae = sd.VAE(sd=comfy.utils.load_torch_file(str(tiny_models / "vae/tiny_vae16.safetensors")))
        return model, load("sd15")[1], vae

    return load


@pytest.fixture
def sd3_twins(comfy, tiny_model):
    """A Stable Diffusion 3 trained at 8 x 8 latents, of random weights, in ComfyUI and in diffusers.

    MODEL, the transformer of diffusers, two conditionings, and a list that fills with every call of ComfyUI's network:
    latents, timesteps, text, pooled text, output.
    """
    # ComfyUI takes heads of 64 channels, as many as blocks.
    sizes = {"attention_head_dim": 64, "caption_projection_dim": 128, "in_channels": 16, "out_channels": 16}
    theirs = tiny_model("sd3", layers=2, size=8, text=32, **sizes)
    load = importlib.import_module("comfy.sd").load_diffusion_model_state_dict
    weights = {name: weight.clone() for name, weight in theirs.state_dict().items()}  # changed in place
    model, calls = load(weights, {"dtype": torch.float32}), []

    def note(_, args, kwargs, out):
        calls.append([t.clone() for t in (*args[:2], kwargs["context"], kwargs["y"], out)])

    model.model.diffusion_model.register_forward_hook(note, with_kwargs=True)
    generator = torch.Generator().manual_seed(0)
    texts, pooled = torch.randn(2, 1, 7, 32, generator=generator), torch.randn(2, 1, 32, generator=generator)
    return model, theirs, [[[text, {"pooled_output": y}]] for text, y in zip(texts, pooled)], calls


def _link_tiny_models(models: Path) -> None:
    for file in TINY_MODELS.glob("*/*.safetensors"):
        (models / file.parent.name).mkdir(parents=True, exist_ok=True)
        (models / file.parent.name / file.name).symlink_to(file)


@pytest.fixture(scope="session")
def server(comfyui_dir, tmp_path_factory):
    """A running ComfyUI with this repository as its only pack; `.client`, `.object_info`, `.models`, `.log`."""
    from diffusers_ext.comfy_client import ComfyClient, start_server

    base = tmp_path_factory.mktemp("comfyui")
    log = base / "server.log"
    workflows = [json.loads(p.read_text(encoding="utf-8")) for p in (REPOSITORY / "workflows").glob("*.json")]
    _script("author_workflow").provide_model_names(base / "models", workflows)
    with start_server(
        comfyui_dir, base_directory=base, pack=REPOSITORY, log=log, arguments=["--disable-api-nodes"]
    ) as running:
        _link_tiny_models(base / "models")
        assert "IMPORT FAILED" not in log.read_text(errors="replace"), log.read_text(errors="replace")
        # The picture that core's LoadImage shows by default.
        shutil.copy(comfyui_dir / "input/example.png", base / "input")
        client = ComfyClient(running.url)
        yield SimpleNamespace(
            url=running.url, client=client, object_info=client.object_info(), log=log, models=base / "models"
        )


@pytest.fixture(scope="session")
def open_in_browser(server):
    """`open_in_browser(jobs)` -> results of `scripts/frontend.mjs` on the real page (see there for jobs)."""
    if CHROMIUM is None:
        pytest.skip("no chromium on the PATH: the page is not opened (apt-get install chromium)")
    if shutil.which("node") is None or not (BROWSER / "node_modules/playwright-core").is_dir():
        pytest.skip(f"no node or no playwright-core in {BROWSER}: run `make .venv/.browser`")
    os.environ["BROWSER_DIR"] = str(BROWSER)
    return lambda jobs: list(_script("author_workflow").run_jobs(server.url, jobs))


@pytest.fixture(scope="session")
def picture_flaw():
    """`picture_flaw(image)` -> why an image [3, h, w] in [0, 1] is no picture, or None.

    Two numbers tell: the spread of the pixels around their mean colour, and the share of neighbouring pixels whose
    colours differ by less than 0.02 everywhere. Measured on the shapes world: scenes with a large red object on blue
    have a spread from 0.15, a decoded zero latent 0.06; all scenes have a share from 0.68, decoded noise up to 0.27,
    noisy pixels 0.00. `test_workflows.py` holds these against the limits.
    """

    def flaw(image) -> str | None:
        spread = (image - image.mean((1, 2), keepdim=True)).pow(2).mean().sqrt().item()
        steps = [(image[:, :, 1:] - image[:, :, :-1]), (image[:, 1:] - image[:, :-1])]
        flat = sum((s.abs().amax(0) < 0.02).sum().item() for s in steps) / sum(s[0].numel() for s in steps)
        if spread < 0.1:
            return f"blank: spread {spread:.3f}"
        return f"noise: only {flat:.2f} of the neighbouring pixels agree" if flat < 0.4 else None

    return flaw


@pytest.fixture
def sample_analytic(comfy, native_pipe, monkeypatch):
    """`sample_analytic(sampler, sigmas, noise, mixture, model=..., latent=None)` -> latents of ComfyUI's own code.

    `model` is a shipped model's name or a MODEL; its network is replaced by the exact denoiser of `mixture`. `latent`
    is the picture to begin with, empty by default.
    """
    import torch

    from diffusers_ext.zoo.analytic import comfy_denoiser

    def run(sampler, sigmas, noise, mixture, model="shapes-unet", latent=None):
        model = (native_pipe(model)[0] if isinstance(model, str) else model).clone()
        flow = isinstance(model.get_model_object("model_sampling"), comfy.model_sampling.CONST)
        denoise = comfy_denoiser(mixture, flow)
        model.set_model_unet_function_wrapper(lambda apply_model, args: denoise(args["input"], args["timestep"]))
        monkeypatch.setattr(type(model.model.latent_format), "process_out", lambda self, latent: latent)
        guider = comfy.samplers.CFGGuider(model)
        guider.set_conds([[torch.zeros(1, 20, 128), {"pooled_output": torch.zeros(1, 128)}]], [])
        guider.set_cfg(1.0)
        return guider.sample(noise, torch.zeros_like(noise) if latent is None else latent, sampler, sigmas)

    return run


@pytest.fixture(scope="session")
def mixture():
    """Three Gaussians of latent shape, the data of the parity tests."""
    import torch

    from diffusers_ext.zoo.analytic import GaussianMixture

    return GaussianMixture(torch.randn(3, 4, 16, 16, generator=torch.Generator().manual_seed(0)), variances=0.1)


@pytest.fixture
def scheduler_of(native_pipe):
    """`scheduler_of(make, name, **options)` -> a scheduler with exactly the noise levels of a ComfyUI model.

    It takes `shapes-dit` for flow matching and the others for epsilon.
    """
    import torch

    from diffusers_ext.schedulers._native import native_schedule

    def build(make, name, **options):
        if name == "shapes-dit":
            return make(prediction_type="flow_prediction", **options)
        sampling = native_pipe(name)[0].get_model_object("model_sampling")
        bar = 1 / (1 + sampling.sigmas.double() ** 2)
        betas = 1 - bar / torch.cat([torch.ones(1), bar[:-1]])
        scheduler = make(trained_betas=betas.tolist(), **options)
        scheduler.noise_schedule = native_schedule(sampling)  # diffusers multiplies betas up in float32
        if hasattr(scheduler, "_clock"):
            scheduler._clock = type(scheduler._clock)(scheduler.noise_schedule)
        return scheduler

    return build


@pytest.fixture
def solved(mixture):
    """`solved(scheduler, noise)` -> latents of a scheduler with its timesteps set, on the denoiser of `mixture`."""
    from diffusers_ext.prediction import from_x0

    def run(scheduler, noise):
        x, prediction = noise, scheduler.config.prediction_type
        for (alpha, sigma), t in zip(scheduler._levels, scheduler.timesteps):
            inputs = scheduler.scale_model_input(x, t)
            output = from_x0(mixture.denoise(inputs, alpha, sigma), inputs.double(), alpha, sigma, prediction)
            x = scheduler.step(output.to(x.dtype), t, x).prev_sample
        return x

    return run


@pytest.fixture
def parity_gap(native_pipe, sample_analytic, mixture, solved):
    """`parity_gap(sampler, scheduler, name, steps)` -> largest difference of both doors on equal noise levels."""
    import torch

    def gap(sampler, scheduler, name, steps):
        sampling = native_pipe(name)[0].get_model_object("model_sampling")
        top, bottom = (1.0, 0.03) if name == "shapes-dit" else (14.6, float(sampling.sigmas[0]))
        sigmas = torch.cat([torch.linspace(top**0.3, bottom**0.3, steps) ** (1 / 0.3), torch.zeros(1)])
        sigmas[0] = top
        scheduler.set_timesteps(sigmas=sigmas[:-1].tolist())
        noise = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(1))
        native = sample_analytic(sampler, sigmas, noise, mixture, name)
        # ComfyUI adds sigma * noise below its noisiest level
        return (native - solved(scheduler, noise * scheduler._levels[0][1])).abs().max().item()

    return gap
