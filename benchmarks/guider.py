"""Guiders, measured: mixtures with exact scores first, then what a judge reads in pictures of the shapes world."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import torch
from PIL import Image, ImageDraw

from diffusers_ext import SuperDiffEulerScheduler, SuperDiffPipeline, zoo
from diffusers_ext.guidance.superdiff import NoiseStep, Superposition, guided, karras_levels
from diffusers_ext.registry import MethodRecord
from diffusers_ext.zoo.analytic import GaussianMixture


COLUMNS = ["case", "SuperDiff", "plain average or other peer", "figure"]
SAMPLES, PICTURES, STEPS, GUIDANCE = 4000, 32, 50, 3.0
UP = GaussianMixture([[-1.5, 1.5], [1.5, 1.5]], variances=0.16)
DOWN = GaussianMixture([[-1.5, -1.5], [1.5, -1.5]], variances=0.16)
EITHER = ["a red circle", "a blue square"]
BOTH = ["a large red circle on the left", "a red circle, plain blue background"]
JOINT = "a large red circle on the left, plain blue background"


def bench(record: MethodRecord, out_dir: Path) -> dict:
    """Measure a guider; see `benchmarks/run.py` for the answer's form."""
    return {"superdiff": superdiff}[record.slug](out_dir)


def _walk(operation: str, steps: int, published_sign: bool = False):
    """Final samples `[n, 2]` and the density gap `[n]` they were estimated to have, from exact scores."""
    levels, generator = karras_levels(0.02, 80.0, steps).tolist(), torch.Generator().manual_seed(0)
    x = levels[0] * torch.randn(SAMPLES, 2, generator=generator, dtype=torch.float64)
    mix = Superposition(2, operation, guidance_scale=1.0)
    for i, (sigma, after) in enumerate(zip(levels, levels[1:])):
        noise = torch.randn(SAMPLES, 2, generator=generator, dtype=torch.float64)
        step = NoiseStep(x, noise, sigma, after, "epsilon", index=i, num_steps=steps)
        v = torch.stack([m.noise(x, 1.0, sigma) for m in (UP, DOWN)])
        kappa = mix.weigh(step, v, None)
        if published_sign:
            mix._log_q[-1] = mix._log_q[-1] + 2 * abs(step.d) / sigma * (v**2).sum(-1)
        x = step.moved(step.dx(guided(v, None, kappa, 1.0)))
    final = mix.log_likelihoods[..., -1]
    return x, final[0] - final[1]


def _gap(x: torch.Tensor) -> torch.Tensor:
    return UP.log_density(x) - DOWN.log_density(x)


def _modes(x: torch.Tensor) -> str:
    """Shares of the four modes, and of samples more than three standard deviations from each."""
    distance, nearest = torch.cdist(x, torch.cat([UP.means, DOWN.means])).min(1)
    shares = " ".join(f"{v:.2f}" for v in (torch.bincount(nearest, minlength=4) / len(x)).tolist())
    return f"{shares}, far {100 * (distance > 1.2).double().mean():.1f} %"


def analytic_rows() -> list[list[str]]:
    """OR, density estimate and AND on two mixtures in the plane, at 100 and 1000 steps."""
    rows = []
    for steps in (100, 1000):
        either, estimate = _walk("or", steps)
        average, _ = _walk("average", steps)
        both, own = _walk("and", steps)
        other, other_estimate = _walk("or", steps, published_sign=True)
        wrong = (other_estimate - _gap(other)).abs().median()
        name = f"exact scores, {steps} steps"
        rows += [
            [
                f"{name}: OR",
                _modes(either),
                f"average: {_modes(average)}",
                "shares of 4 modes (ideal 0.25 each, far 1.1 %)",
            ],
            [
                f"{name}: density estimate",
                f"{(estimate - _gap(either)).abs().median():.2f}",
                f"sign of the published OR code: {wrong:.1f} (modes {_modes(other)})",
                "median error of log q_A - log q_B, nats",
            ],
            [
                f"{name}: AND",
                f"{_gap(both).abs().median():.3f} (own estimate {own.abs().median():.0e})",
                f"average: {_gap(average).abs().median():.2f}",
                "median |log q_A - log q_B|, nats",
            ],
        ]
    return rows


def _wanted(prompt: str) -> torch.Tensor:
    return torch.tensor(zoo.parse(prompt))


def _shows(images: torch.Tensor, prompt: str) -> torch.Tensor:
    """Whether the judge reads everything that `prompt` says, `[n]`."""
    seen, wanted = zoo.load_judge().read(images), _wanted(prompt)
    return ((seen == wanted) | (wanted < 0)).all(1)


def _share(values: torch.Tensor) -> str:
    return f"{100 * values.float().mean():.0f} %"


def _generators() -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in range(PICTURES)]


def _mixed(pipe: SuperDiffPipeline, prompts: list[str], operation: str, **kwargs) -> torch.Tensor:
    out = pipe(
        prompts, operation=operation, guidance_scale=GUIDANCE, num_inference_steps=STEPS, generator=_generators(),
        num_images_per_prompt=PICTURES, output_type="pt", **kwargs,
    )  # fmt: skip
    return out.images * 2 - 1


def _native(base, prompts: list[str]) -> torch.Tensor:
    """diffusers alone: the mean of the prompts' embeddings, same scheduler, steps and noise."""
    embeds = torch.stack([base.encode_prompt(p, base.device, 1, False)[0] for p in prompts]).mean(0)
    negative = base.encode_prompt("", base.device, 1, False)[0]
    images = base(
        prompt_embeds=embeds.repeat(PICTURES, 1, 1), negative_prompt_embeds=negative.repeat(PICTURES, 1, 1),
        guidance_scale=GUIDANCE, num_inference_steps=STEPS, generator=_generators(), output_type="pt",
    ).images  # fmt: skip
    return images * 2 - 1


def picture_rows(base, pipe: SuperDiffPipeline) -> tuple[list[list[str]], dict[str, torch.Tensor]]:
    """What the judge reads in pictures of OR and AND, beside averages; and the pictures of EITHER."""
    pictures = {"A": _native(base, EITHER[:1]), "B": _native(base, EITHER[1:])}
    pictures |= {name: _mixed(pipe, EITHER, name) for name in ("or", "and", "average")}
    pictures |= {"biased": _mixed(pipe, EITHER, "or", logp=1000.0), "embeddings": _native(base, EITHER)}
    read = {name: [_shows(images, p) for p in EITHER] for name, images in pictures.items()}

    def shares(name: str) -> str:
        a, b = read[name]
        return f"A {_share(a)}, B {_share(b)}, neither {_share(~(a | b))}"

    what = f"pictures showing A ({EITHER[0]}) or B ({EITHER[1]}), n {PICTURES}"
    peers = f"average: {shares('average')}; mean of embeddings: {shares('embeddings')}"
    rows = [
        ["shapes-unet: OR", shares("or"), peers, what],
        ["shapes-unet: OR, 1000 nats for A", shares("biased"), f"prompt A alone: {shares('A')}", what],
    ]
    joint = {name: _mixed(pipe, BOTH, name) for name in ("and", "average")}
    joint |= {"embeddings": _native(base, BOTH), "one prompt": _native(base, [JOINT])}
    right = {name: _share(_shows(images, JOINT)) for name, images in joint.items()}
    others = ", ".join(f"{name}: {value}" for name, value in right.items() if name != "and")
    rows.append(["shapes-unet: AND", right["and"], others, f'pictures showing all of "{JOINT}", n {PICTURES}'])
    return rows, pictures


def _seconds(run: Callable[[], object], rounds: int = 5) -> float:
    """Fastest of several runs, which the rest of the machine disturbed least."""
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return min(times)


def cost_row(base, pipe: SuperDiffPipeline) -> list[str]:
    """Seconds of a step over those of the plain sampler with guidance and over those of a plain average."""
    settings = {"guidance_scale": GUIDANCE, "num_inference_steps": 10, "output_type": "latent"}
    pipe(EITHER, **settings), base(EITHER[0], **settings)
    plain = _seconds(lambda: base(EITHER[0], **settings))
    average = _seconds(lambda: pipe(EITHER, operation="average", **settings))
    mixed = _seconds(lambda: pipe(EITHER, operation="and", **settings))
    return [
        "cost of a step, AND",
        f"{mixed / plain:.2f} x of one guided prompt (3 network calls over 2)",
        f"{mixed / average:.2f} x of the average of two prompts",
        "time ratio, batch 1, fastest of 5 runs",
    ]


def grid(path: Path, rows: dict[str, torch.Tensor], columns: int = 8, scale: int = 2) -> Path:
    """Save pictures `[n, 3, 64, 64]` in [-1, 1] as named rows."""
    side, margin = zoo.world.SIZE * scale, 150
    sheet = Image.new("RGB", (margin + columns * side, len(rows) * side), "white")
    for r, (name, images) in enumerate(rows.items()):
        ImageDraw.Draw(sheet).text((8, r * side + side // 2 - 8), name, fill="black", font_size=15)
        for c, image in enumerate(images[:columns]):
            pixels = ((image.clamp(-1, 1) + 1) * 127.5).round().byte().permute(1, 2, 0).numpy()
            sheet.paste(
                Image.fromarray(pixels).resize((side, side), Image.Resampling.NEAREST), (margin + c * side, r * side)
            )
    sheet.save(path)
    return path


def superdiff(out_dir: Path) -> dict:
    """SuperDiff beside plain averaging, averaged embeddings, and the published code's sign."""
    base = zoo.load("shapes-unet")
    pipe = SuperDiffPipeline.from_pipe(base)
    pipe.set_progress_bar_config(disable=True)
    base.scheduler = SuperDiffEulerScheduler(**{k: v for k, v in pipe.scheduler.config.items() if k[0] != "_"})
    rows, pictures = picture_rows(base, pipe)
    shown = {"A: red circle": "A", "B: blue square": "B", "A OR B": "or", "A AND B": "and", "average": "average"}
    return {
        "columns": COLUMNS,
        "rows": [*analytic_rows(), *rows, cost_row(base, pipe)],
        "notes": f"Exact scores: {SAMPLES} samples of two mixtures in the plane, float64, noise from 80 to 0.02. "
        f"Pictures: {STEPS} steps, guidance {GUIDANCE:g}, the same seeds in every row of the picture and every column "
        "of the table, our scheduler throughout; the judge reads them. A red circle and a blue square exclude each "
        "other, so their AND is neither; the AND of the table takes two captions that one picture can satisfy.",
        "picture": grid(out_dir / "superdiff.png", {label: pictures[key] for label, key in shown.items()}),
    }
