"""The shipped text-to-image pipelines: loading them, checked and offline, and drawing captions with them."""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from safetensors import safe_open

from ..registry import unknown
from . import world


WEIGHTS = Path(__file__).parent / "weights"
ADAPTERS = WEIGHTS / "adapters"
MANIFEST = "manifest.json"
_PROMPT_TOKENS = 20


def names() -> list[str]:
    """Names that `load` accepts."""
    return sorted(path.parent.name for path in WEIGHTS.glob(f"*/{MANIFEST}"))


def load(name: str, dtype: torch.dtype = torch.float32):
    """A shipped pipeline, ready to draw 64 x 64 pictures of the shapes world; nothing is downloaded.

    Args:
        name: `"shapes-unet"` (StableDiffusionPipeline, v prediction), `"shapes-unet-eps"` (the same, epsilon
            prediction) or `"shapes-dit"` (FluxPipeline, flow matching).
        dtype: Precision to compute in; the weights are stored in float16.

    Returns:
        A diffusers pipeline. Its folder under `zoo/weights` holds a README.md, the model card.

    Raises:
        ValueError: No such model.
        RuntimeError: The model's folder is damaged.

    Example:
        >>> from diffusers_ext import zoo
        >>> pipe = zoo.load("shapes-unet")
        >>> image = pipe("a large red star on the left, plain blue background", num_inference_steps=20).images[0]
    """
    if name not in names():
        raise ValueError(unknown("zoo model", name, names()))
    return load_folder(WEIGHTS / name, dtype)


def load_folder(folder: str | Path, dtype: torch.dtype = torch.float32):
    """A pipeline from a folder that the training example exported, after checking every file against its manifest.

    Raises:
        RuntimeError: A file is missing, unknown to the manifest, or not the one that was exported.
    """
    from diffusers import DiffusionPipeline

    check_folder(Path(folder))
    pipe = DiffusionPipeline.from_pretrained(folder, dtype=dtype, local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def adapter_file(name: str) -> Path:
    """Path of a shipped adapter for one of the models, such as `"vmix-shapes-unet"`.

    Raises:
        ValueError: No such adapter.
    """
    known = {path.stem: path for path in ADAPTERS.glob("*.safetensors")}
    if name not in known:
        raise ValueError(unknown("zoo adapter", name, known))
    return known[name]


def load_controlnet(name: str | Path, dtype: torch.dtype = torch.float32):
    """A shipped `ControlNetModel` for one of the models, such as `"controlnet-edges-shapes-unet-eps"`.

    Args:
        name: See `adapter_file`; or the path of a file that the training example wrote.
        dtype: Precision to compute in.

    Raises:
        ValueError: No such file, or it holds no ControlNet.
    """
    from diffusers import ControlNetModel
    from safetensors.torch import load_file

    path = name if isinstance(name, Path) else adapter_file(name)
    with safe_open(path, "pt") as file:
        metadata = file.metadata() or {}
    if metadata.get("class") != ControlNetModel.__name__:
        raise ValueError(f"{name} holds a {metadata.get('class')}, not a ControlNetModel")
    model = ControlNetModel(**json.loads(metadata["config"]))
    model.load_state_dict(load_file(path))
    return model.to(dtype).eval()


def _model_files(folder: Path) -> Iterator[Path]:
    """What the pipeline is loaded from: JSON and safetensors, all but the manifest and notes at the top."""
    for path in sorted(folder.rglob("*")):
        if path.suffix in (".json", ".safetensors") and (path.parent != folder or path.name == "model_index.json"):
            yield path


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def write_manifest(folder: str | Path) -> None:
    """Record the digests of an exported pipeline, so that `load_folder` can tell a damaged one."""
    folder = Path(folder)
    digests = {path.relative_to(folder).as_posix(): _digest(path) for path in _model_files(folder)}
    (folder / MANIFEST).write_text(json.dumps(digests, indent=1) + "\n", encoding="utf-8")


def check_folder(folder: str | Path) -> None:
    """Raise `RuntimeError` unless every model file in `folder` is the one its manifest records."""
    folder = Path(folder)
    advice = "reinstall diffusers-ext, or export the model again"
    try:
        digests = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RuntimeError(
            f"{folder} is not a complete zoo model: {MANIFEST} cannot be read ({error}); {advice}"
        ) from error
    present = {path.relative_to(folder).as_posix(): path for path in _model_files(folder)}
    problems = [f"{name} is missing" for name in digests.keys() - present.keys()]
    problems += [f"{name} is not in the manifest" for name in present.keys() - digests.keys()]
    problems += [
        f"{name} is damaged" for name in digests.keys() & present.keys() if _digest(present[name]) != digests[name]
    ]
    if problems:
        raise RuntimeError(f"the model folder {folder} is corrupted: {', '.join(sorted(problems))}; {advice}")


def _call_arguments(pipe, count: int, guidance_scale: float) -> dict:
    """Arguments that make `pipe` draw `count` pictures of this world with classifier-free guidance."""
    arguments = {"height": world.SIZE, "width": world.SIZE, "output_type": "pt"}
    if "true_cfg_scale" not in inspect.signature(pipe.__call__).parameters:
        return arguments | {"guidance_scale": guidance_scale}
    # Flux layout: `guidance_scale` would be the distilled guidance, which these models do not have.
    arguments |= {"guidance_scale": 1.0, "max_sequence_length": _PROMPT_TOKENS}
    if guidance_scale > 1:
        arguments |= {"negative_prompt": [""] * count, "true_cfg_scale": guidance_scale}
    return arguments


@torch.no_grad()
def generate(
    pipe,
    captions: Sequence[str],
    num_inference_steps: int = 20,
    guidance_scale: float = 3.0,
    seed: int = 0,
    batch_size: int = 50,
    **kwargs,
) -> torch.Tensor:
    """Draw captions with a zoo pipeline, the same way for both layouts.

    Args:
        pipe: A pipeline from `load`, whatever scheduler, cache or guider it carries.
        captions: What to draw, see `world.caption`.
        num_inference_steps: Steps of the scheduler.
        guidance_scale: Classifier-free guidance; 1 turns it off.
        seed: The starting noise of caption `i` depends on `(seed, i)` only, not on `batch_size` or the scheduler.
        batch_size: Captions per call.
        kwargs: Passed on to the pipeline; they win over the defaults of this function.

    Returns:
        Float32 tensor `[n, 3, 64, 64]` in [-1, 1] on the CPU.

    Example:
        >>> from diffusers_ext import zoo
        >>> images = zoo.generate(zoo.load("shapes-dit"), zoo.held_out(4).captions, num_inference_steps=8)
    """
    if isinstance(captions, str):
        raise TypeError(f"captions is the string {captions!r}; pass a list of strings")
    if not captions or batch_size < 1:
        raise ValueError(f"generate needs captions and batch_size >= 1; got {len(captions)} and {batch_size}")
    pictures = []
    for start in range(0, len(captions), batch_size):
        batch = list(captions[start : start + batch_size])
        noise = [torch.Generator().manual_seed(seed * 100003 + start + i) for i in range(len(batch))]
        arguments = _call_arguments(pipe, len(batch), guidance_scale) | {"generator": noise} | kwargs
        output = pipe(prompt=batch, num_inference_steps=num_inference_steps, **arguments).images
        pictures.append(output.float().cpu() * 2 - 1)
    return torch.cat(pictures)
