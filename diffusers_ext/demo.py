"""`diffusers-ext demo`: the shipped models draw the same captions with and without the methods; a table and a page.

Every finished row is a PNG with its pictures and a JSON with its figures in `OUT/rows`, the JSON last. An interrupted
demo therefore continues with the first row that has no JSON.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from tqdm import tqdm

import diffusers_ext

from . import _demo_page, zoo
from .apply import apply, denoiser_of
from .eval.metrics import mean_psnr
from .zoo import caption


__all__ = ["Row", "Settings", "run"]

COLUMNS = 8
SHEET_COLUMNS = 6


@dataclass(frozen=True)
class Settings:
    """How much the demo draws.

    Args:
        count: Pictures per row, a multiple of 8.
        steps: Steps of the baseline.
        few: Steps of the few-step rows.
        interval: DeepCache runs the whole network every `interval`-th step.
        superdiff_steps: Steps of the SuperDiff rows.
        statistics: Scenes on which DPM-Solver-v3 measures its model.
        guidance_scale: Classifier-free guidance of every row.
    """

    count: int = 16
    steps: int = 50
    few: int = 6
    interval: int = 3
    superdiff_steps: int = 50
    statistics: int = 8
    guidance_scale: float = 3.0


QUICK = Settings(count=8, steps=20, superdiff_steps=30)


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Args:
        name: File name of the row.
        model: Zoo model.
        title: What the reader sees.
        prepare: `(row, pipe, settings) -> (draw, describe)`. Only `draw() -> pictures` is timed.
        captions: What the pictures should show.
        accuracy: `(judge, pictures) -> float`.
        baseline: Name of the row it is compared with, None for a baseline.
    """

    name: str
    model: str
    title: str
    prepare: Callable[[Row, Any, Settings], tuple[Callable[[], torch.Tensor], Callable[[], str]]]
    captions: tuple[str, ...]
    accuracy: Callable[[Any, torch.Tensor], float]
    baseline: str | None = None


class Store:
    """Finished rows on disk. A row drawn with other settings counts as missing."""

    def __init__(self, folder: Path, settings: Settings):
        self.folder = folder / "rows"
        self.folder.mkdir(parents=True, exist_ok=True)
        self.key = {"version": diffusers_ext.__version__, **asdict(settings)}

    def load(self, name: str) -> dict[str, Any] | None:
        """Figures of a finished row, None if it has to be drawn."""
        path = self.folder / f"{name}.json"
        if not path.is_file() or not path.with_suffix(".png").is_file():
            return None
        figures = json.loads(path.read_text(encoding="utf-8"))
        return figures if figures["key"] == self.key else None

    def finished(self, name: str) -> dict[str, Any]:
        """Figures of a row that must be there."""
        figures = self.load(name)
        if figures is None:
            raise RuntimeError(f"row {name} disappeared from {self.folder} during the demo: run it again")
        return figures

    def save(self, name: str, images: torch.Tensor, figures: dict[str, Any]) -> None:
        """Pictures first, figures last, each in one move."""
        strip = to_strip(images)
        for suffix, picture in ((".png", strip), ("-large.png", _demo_page.enlarged(strip, 2))):
            part = self.folder / f"{name}{suffix}.part"
            picture.save(part, format="PNG")
            os.replace(part, self.folder / f"{name}{suffix}")
        part = self.folder / f"{name}.json.part"
        part.write_text(json.dumps({**figures, "key": self.key}, indent=2) + "\n", encoding="utf-8")
        os.replace(part, self.folder / f"{name}.json")

    def strip(self, name: str) -> Image.Image:
        """Pictures of a finished row, 8 side by side."""
        return Image.open(self.folder / f"{name}.png").convert("RGB")


def to_strip(images: torch.Tensor) -> Image.Image:
    """Pictures `[n, 3, h, w]` in [-1, 1] as one 8-bit image, 8 side by side."""
    n, c, h, w = images.shape
    grid = images.reshape(n // COLUMNS, COLUMNS, c, h, w).permute(0, 3, 1, 4, 2).reshape(-1, COLUMNS * w, c)
    return Image.fromarray(((grid.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).numpy())


def from_strip(strip: Image.Image, side: int) -> torch.Tensor:
    """The inverse of `to_strip`, up to 8-bit rounding."""
    flat = torch.frombuffer(bytearray(strip.tobytes()), dtype=torch.uint8).float() / 127.5 - 1
    grid = flat.reshape(strip.height // side, side, COLUMNS, side, 3)
    return grid.permute(0, 2, 4, 1, 3).reshape(-1, 3, side, side)


class Counter:
    """Counts the calls of a module while it is open."""

    def __init__(self, module: torch.nn.Module):
        self.calls = 0
        self._handle = module.register_forward_pre_hook(self._count)

    def _count(self, *_: Any) -> None:
        self.calls += 1

    def __enter__(self) -> Counter:
        return self

    def __exit__(self, *exc_info: Any) -> None:
        self._handle.remove()


def plain(steps: str, make_scheduler: Callable[[Any, Settings], tuple[Any, str]] | None = None):
    """Rows that only differ in the scheduler. `steps` names the field of `Settings`."""

    def prepare(row: Row, pipe: Any, settings: Settings):
        remark = ""
        if make_scheduler is not None:
            start = time.perf_counter()
            pipe.scheduler, remark = make_scheduler(pipe, settings)
            remark = remark.format(seconds=time.perf_counter() - start)
        n = getattr(settings, steps)
        return lambda: _generate(pipe, row, settings, n), lambda: f"{n} steps{remark}"

    return prepare


def _generate(pipe: Any, row: Row, settings: Settings, steps: int) -> torch.Tensor:
    return zoo.generate(pipe, list(row.captions), num_inference_steps=steps, guidance_scale=settings.guidance_scale)


def _dpmpp(pipe: Any, settings: Settings) -> tuple[Any, str]:
    """diffusers' DPM-Solver++, second order: the peer of DPM-Solver-v3."""
    from diffusers import DPMSolverMultistepScheduler

    if hasattr(pipe, "unet"):
        return DPMSolverMultistepScheduler.from_config(pipe.scheduler.config), ""
    # FluxPipeline hands `mu` to the scheduler, which then insists on dynamic shifting: shift by exp(0).
    flow = {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "time_shift_type": "exponential"}
    scheduler = DPMSolverMultistepScheduler(**flow, use_dynamic_shifting=True)
    scheduler.register_to_config(base_shift=0.0, max_shift=0.0)
    return scheduler, ""


def _dpm_v3(pipe: Any, settings: Settings) -> tuple[Any, str]:
    """DPM-Solver-v3 with statistics of the model, measured here on scenes that the demo does not draw."""
    scenes = zoo.scenes(settings.statistics, seed=1)
    scheduler = diffusers_ext.DPMSolverV3MultistepScheduler.from_config(pipe.scheduler.config)
    latents = diffusers_ext.clean_latents(pipe, scenes.images)
    options = {"num_grid": 6 * settings.few, "estimator": "fd", "progress": False}
    scheduler.load_ems(diffusers_ext.calibrate_ems(pipe, latents, scenes.captions, settings.guidance_scale, **options))
    return scheduler, "; statistics of the model measured once before, in {seconds:.0f} s"


def deepcache(row: Row, pipe: Any, settings: Settings):
    """DeepCache at the baseline's number of steps."""
    handle = apply(pipe, diffusers_ext.DeepCacheConfig(cache_interval=settings.interval))

    def describe() -> str:
        figures = handle.summary()["deepcache"]
        full, reused, saved = figures["computed"], figures["reused"], figures["macs_saved"]
        return f"{settings.steps} steps, {full} of them full, {reused} cached: {saved:.0%} of the work saved"

    return lambda: _generate(pipe, row, settings, settings.steps), describe


def superdiff(operation: str):
    """SuperDiff rows: captions are pairs joined by the operation, in capitals."""

    def prepare(row: Row, pipe: Any, settings: Settings):
        mixer = diffusers_ext.SuperDiffPipeline.from_pipe(pipe)
        mixer.set_progress_bar_config(disable=True)
        size = {"height": zoo.world.SIZE, "width": zoo.world.SIZE}
        if hasattr(pipe, "transformer"):
            size["max_sequence_length"] = pipe.tokenizer_2.model_max_length
        prompts = [list(side) for side in zip(*(text.split(f" {operation.upper()} ") for text in row.captions))]

        def draw() -> torch.Tensor:
            generators = [torch.Generator().manual_seed(i) for i in range(len(row.captions))]
            images = mixer(
                prompts,
                operation=operation,
                guidance_scale=settings.guidance_scale,
                num_inference_steps=settings.superdiff_steps,
                final_noise=False,
                generator=generators,
                output_type="pt",
                **size,
            ).images
            return images * 2 - 1

        return draw, lambda: f"{settings.superdiff_steps} steps, two captions per picture"

    return prepare


def rows(settings: Settings) -> list[Row]:
    """Everything the demo draws, in order. Captions come from the held-out scenes."""
    scenes = zoo.held_out(128)
    specs = scenes.specs[: settings.count]
    captions = tuple(scenes.captions[: settings.count])
    one = scenes.specs[scenes.specs[:, 2] < zoo.world.ROW][:COLUMNS]
    two = one.roll(-1, 0)
    both = tuple(f"{caption(s, keep=('size1', 'place'))} AND {caption(s, keep=('background',))}" for s in one)
    either = tuple(f"{caption(a)} OR {caption(b)}" for a, b in zip(one, two))

    def shared(judge: Any, images: torch.Tensor) -> float:
        return judge.accuracy(images, specs)["all"]

    def all_of(judge: Any, images: torch.Tensor) -> float:
        return judge.accuracy(images, one)["all"]

    def any_of(judge: Any, images: torch.Tensor) -> float:
        hits = [max(judge.accuracy(x[None], s[None])["all"] for s in pair) for x, *pair in zip(images, one, two)]
        return sum(hits) / len(hits)

    found = []
    for model, peer in (("shapes-unet", "DDIM"), ("shapes-dit", "Euler")):
        base = f"{model}-baseline"
        table = [
            ("baseline", f"baseline, {peer}", plain("steps"), captions, shared),
            ("few", f"{peer}, few steps", plain("few"), captions, shared),
            ("dpmpp", "DPM-Solver++, few steps", plain("few", _dpmpp), captions, shared),
            ("v3", "DPM-Solver-v3, few steps", plain("few", _dpm_v3), captions, shared),
            ("deepcache", "DeepCache", deepcache, captions, shared),
            ("superdiff-and", "SuperDiff AND", superdiff("and"), both, all_of),
            ("superdiff-or", "SuperDiff OR", superdiff("or"), either, any_of),
        ]
        for name, title, prepare, texts, accuracy in table:
            if name == "deepcache" and model == "shapes-dit":
                continue
            baseline = None if name == "baseline" else base
            found.append(Row(f"{model}-{name}", model, title, prepare, texts, accuracy, baseline))
    return found


def _draw(row: Row, pipe: Any, judge: Any, store: Store, settings: Settings) -> None:
    """Draw one row and file it; the pipeline is left as it was."""
    scheduler = pipe.scheduler
    try:
        draw, describe = row.prepare(row, pipe, settings)
        with Counter(denoiser_of(pipe)) as counter:
            start = time.perf_counter()
            images = draw()
            seconds = time.perf_counter() - start
        detail = describe()
    finally:
        diffusers_ext.remove(pipe)
        pipe.scheduler = scheduler
    images = from_strip(to_strip(images), images.shape[-1])
    base = store.load(row.baseline) if row.baseline else None
    same = base is not None and base["captions"] == list(row.captions)
    reference = from_strip(store.strip(base["row"]), images.shape[-1]) if base and same else None
    per_picture = seconds / len(images)
    figures = {
        "row": row.name,
        "model": row.model,
        "title": row.title,
        "baseline": row.baseline,
        "detail": detail,
        "calls": counter.calls,
        "seconds": per_picture,
        "speedup": base["seconds"] / per_picture if base else 1.0,
        "accuracy": row.accuracy(judge, images),
        "psnr": None if reference is None else mean_psnr(images, reference),
        "captions": list(row.captions),
    }
    store.save(row.name, images, figures)


def _warm_up(pipe: Any) -> None:
    zoo.generate(pipe, ["a red circle"], num_inference_steps=2)


def run(out: Path, quick: bool = False, fresh: bool = False, sheet: Path | None = None) -> list[dict[str, Any]]:
    """Draw what is missing, print the table, write the page.

    Args:
        out: Folder for `index.html`, `demo.png` and `rows/`.
        quick: Fewer pictures and steps.
        fresh: Forget finished rows.
        sheet: Another place to write the contact sheet to.

    Returns:
        The figures of every row.
    """
    settings = QUICK if quick else Settings()
    if fresh:
        shutil.rmtree(out / "rows", ignore_errors=True)
    store, wanted = Store(out, settings), rows(settings)
    missing = [row for row in wanted if store.load(row.name) is None]
    judge, pipes = zoo.load_judge(), {}
    for row in (progress := tqdm(missing, unit="row", disable=not missing)):
        progress.set_description(f"{row.model}, {row.title}")
        if row.model not in pipes:
            pipes = {row.model: zoo.load(row.model)}
            _warm_up(pipes[row.model])
        _draw(row, pipes[row.model], judge, store, settings)
    results = [store.finished(row.name) for row in wanted]
    _report(out, results, settings, store, sheet)
    return results


def _report(out: Path, results: list[dict[str, Any]], settings: Settings, store: Store, sheet: Path | None) -> None:
    notes = (
        f"{settings.count} pictures of 64 x 64 per row, guidance {settings.guidance_scale:g}, "
        f"{torch.get_num_threads()} thread(s). Seconds are per picture.",
        "Calls: forward passes of the denoiser for the whole row. Judge: share of pictures in which a small "
        "classifier finds every attribute of the caption. PSNR: against the baseline of the same model and noise.",
        "SuperDiff AND: two captions that each say half; right when both halves are there. OR: two captions; right "
        "when the picture is one of them.",
    )
    _demo_page.write_page(out / "index.html", results, notes)
    columns: dict[str, list[tuple[str, str, Image.Image]]] = {}
    for figures in results:
        strip = store.strip(figures["row"])
        shown = strip.crop((0, 0, SHEET_COLUMNS * zoo.world.SIZE, zoo.world.SIZE))
        line = (figures["title"], _demo_page.remark_of(figures), shown)
        columns.setdefault(figures["model"], []).append(line)
    picture = _demo_page.contact_sheet(columns)
    for path in (out / "demo.png", *([sheet] if sheet else [])):
        path.parent.mkdir(parents=True, exist_ok=True)
        picture.save(path, optimize=True)
    print(_demo_page.text_table(results))
    print("\n".join(notes))
    print(f"\nopen {out / 'index.html'}")
