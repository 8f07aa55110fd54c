"""Measure an exported pipeline and write its model card; every figure in a card comes from `evaluation.json`."""

from __future__ import annotations

import json
import time
from pathlib import Path

import torch
from stages import write_json
from torch import nn

from diffusers_ext import zoo
from diffusers_ext.eval.metrics import frechet_distance, mean_psnr
from diffusers_ext.zoo import world


def quantised(images: torch.Tensor) -> torch.Tensor:
    """Pictures in [-1, 1] as their 8-bit files hold them."""
    return ((images.clamp(-1, 1) + 1) * 127.5).round() / 127.5 - 1


@torch.no_grad()
def round_trip(vae: nn.Module, n: int) -> dict[str, float]:
    """Mean PSNR in dB and `scores` of `n` held-out pictures, encoded and decoded: the ceiling of a pipeline."""
    real = zoo.held_out(n)
    decoded = torch.cat([vae.decode(vae.encode(x).latent_dist.mode()).sample for x in real.images.split(50)])
    return {"psnr_db": mean_psnr(quantised(decoded), real.images), **scores(decoded, real)}


def scores(images: torch.Tensor, asked: zoo.Scenes) -> dict[str, float]:
    """Judge accuracies and the Frechet distance to as many other real pictures."""
    judge, others = zoo.load_judge(), zoo.held_out(len(asked), start=100_000)
    distance = frechet_distance(judge.features(quantised(images)), judge.features(others.images))
    return {**judge.accuracy(images, asked.specs), "frechet": distance}


def evaluate(folder: Path, n: int, steps: int, guidance: float) -> dict:
    """Draw `n` held-out captions with the pipeline in `folder` and write `evaluation.json` and `samples.jpg` there."""
    pipe, asked = zoo.load_folder(folder), zoo.held_out(n)
    start = time.perf_counter()
    images = zoo.generate(pipe, asked.captions, steps, guidance)
    seconds = time.perf_counter() - start
    denoiser = getattr(pipe, "unet", None) or pipe.transformer
    result = {
        "n": n,
        "steps": steps,
        "guidance": guidance,
        "scheduler": type(pipe.scheduler).__name__,
        "denoiser": type(denoiser).__name__,
        "parameters": denoiser.num_parameters(),
        "megabytes": round(sum(p.stat().st_size for p in folder.rglob("*.safetensors")) / 1e6, 2),
        "seconds_per_image": round(seconds / n, 3),
        "threads": torch.get_num_threads(),
        "pictures": scores(images, asked),
        "by_shape": _by_shape(images, asked),
        "vae_round_trip": round_trip(pipe.vae, n),
        "real": scores(asked.images, asked),
    }
    write_json(folder / "evaluation.json", result)
    sheet(images[:40], folder / "samples.jpg")
    return result


def _by_shape(images: torch.Tensor, asked: zoo.Scenes) -> dict[str, float]:
    """Share of first objects of each shape that the judge reads as that shape."""
    right = zoo.load_judge().read(quantised(images))[:, 3] == asked.specs[:, 3]
    return {name: right[asked.specs[:, 3] == i].float().mean().item() for i, name in enumerate(world.SHAPES)}


def sheet(images: torch.Tensor, path: Path, columns: int = 10) -> None:
    """Save pictures side by side, two pixels apart, twice their size."""
    from PIL import Image

    pad = torch.nn.functional.pad((images + 1) / 2, (1, 1, 1, 1), value=1.0)
    rows = [torch.cat(list(row), 2) for row in pad.split(columns) if len(row) == columns]
    pixels = (torch.cat(rows, 1).clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy()
    picture = Image.fromarray(pixels)
    picture.resize((picture.width * 2, picture.height * 2), Image.Resampling.NEAREST).save(path, quality=90)


_USE = {
    "unet": "v prediction, StableDiffusionPipeline",
    "unet-eps": "epsilon prediction, StableDiffusionPipeline",
    "dit": "flow matching, FluxPipeline",
}


def card(folder: Path, recipe: Path) -> None:
    """Write the README.md of an evaluated folder; `recipe` is a text file that says how these weights came about."""
    found = json.loads((folder / "evaluation.json").read_text(encoding="utf-8"))
    kind = folder.name.removeprefix("shapes-")
    template = (Path(__file__).parent / "card.md").read_text(encoding="utf-8")
    rows = {"this model": found["pictures"], "its VAE alone": found["vae_round_trip"], "real pictures": found["real"]}
    columns = [*world.ATTRIBUTES, "relation", "all", "frechet"]
    table = ["| | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for name, row in rows.items():
        cells = [f"{100 * row[c]:.1f}" for c in columns[:-1]] + [f"{row['frechet']:.1f}"]
        table.append(f"| {name} | " + " | ".join(cells) + " |")
    text = template.format(
        name=folder.name,
        use=_USE[kind],
        table="\n".join(table),
        shapes=", ".join(f"{k} {100 * v:.1f}" for k, v in found["by_shape"].items()),
        psnr=found["vae_round_trip"]["psnr_db"],
        recipe=recipe.read_text(encoding="utf-8").strip(),
        example=_example(folder.name, kind),
        **{
            k: found[k]
            for k in ("n", "steps", "guidance", "scheduler", "denoiser", "megabytes", "seconds_per_image", "threads")
        },
        millions=found["parameters"] / 1e6,
    )
    (folder / "README.md").write_text(text, encoding="utf-8")


def _example(name: str, kind: str) -> str:
    options = {"num_inference_steps": 20, "height": 64, "width": 64, "guidance_scale": 3.0}
    if kind == "dit":
        options |= {"guidance_scale": 1.0, "true_cfg_scale": 3.0, "negative_prompt": "", "max_sequence_length": 20}
    values = ("    {}={},".format(key, '""' if value == "" else value) for key, value in options.items())
    return "\n".join(
        [
            "from diffusers_ext import zoo\n",
            f'pipe = zoo.load("{name}")',
            "image = pipe(",
            '    "a small red circle left of a large green square, striped blue background",',
            *values,
            ").images[0]",
        ]
    )
