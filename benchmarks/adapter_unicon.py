"""UniCon: image from condition, condition from image, both at once, two conditions: agreement, errors, costs."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from benchmarks._common import picture_grid
from benchmarks.adapter import Cost, inputs, parameters_of, peers, sd15, size_of, unet_macs
from diffusers_ext import UniConAdapter, UniConPipeline, zoo
from diffusers_ext.adapters._unicon_joint import blocks_of, joint_attention, post_joint
from diffusers_ext.eval import count_macs
from diffusers_ext.registry import MethodRecord
from diffusers_ext.zoo.conditions import depth, edge_f1, edge_iou, edges, outlines
from diffusers_ext.zoo.world import Scenes


PICTURES, STEPS = 12, 20
# Where captions say little, what is drawn without a condition differs much from picture to picture.
SHORT_PICTURES = 32
CONDITIONS = {"depth": depth, "edge": outlines}
COLUMNS = [
    "Adapter",
    "Drawn",
    "Agreement x, y",
    "Outlines IoU",
    "Exact outlines IoU",
    "Depth error",
    "Outlines F1",
    "Judge: objects",
]
OBJECTS = ("shape1", "colour1", "shape2", "colour2")


def plain_scenes(count: int, keep: tuple[str, ...] = ("background",)) -> Scenes:
    """Held-out scenes with plain grounds, where all edges are the objects'; captions tell neither place nor size."""
    scenes = zoo.held_out(3 * count)
    rows = (scenes.specs[:, 1] == 0).nonzero().flatten()[:count]
    captions = [zoo.caption(scenes.specs[i].tolist(), keep=keep) for i in rows]
    return Scenes(scenes.specs[rows], captions, scenes.images[rows], scenes.masks[rows])


def grey(pictures: torch.Tensor) -> torch.Tensor:
    """`[n, 1, h, w]` of pictures in [0, 1]."""
    return pictures.mean(1, keepdim=True)


def agreement(name: str, x: torch.Tensor, y: torch.Tensor) -> float:
    """Mean IoU of the edges of x with the edges of depth y, or with the lines of y; both in [0, 1]."""
    found = edges(x * 2 - 1)
    if name == "depth":
        return edge_iou(found, edges(y.expand(-1, 3, -1, -1) * 2 - 1)).mean().item()
    wide = torch.nn.functional.max_pool2d(found, 3, 1, 1)
    return edge_iou(wide, (grey(y) > 0.5).float(), 0).mean().item()


class Runs:
    """Draws with one pipeline, the same captions and noise every time."""

    def __init__(self, scenes: Scenes):
        self.scenes = scenes
        self.pipe = UniConPipeline.from_pipe(zoo.load("shapes-unet"))
        self.pipe.set_progress_bar_config(disable=True)
        self.adapters = {
            name: UniConAdapter.from_pretrained(zoo.adapter_file(f"unicon-{name}-shapes-unet")) for name in CONDITIONS
        }
        self.judge = zoo.load_judge()

    def draw(self, names: list[str], images: list[Any], texts: Any = None, guidance: float = 3.0, **options) -> list:
        """Pictures `[n, 3, 64, 64]` in [0, 1] of every input."""
        count = len(self.scenes)
        noise = [torch.Generator().manual_seed(i) for i in range(count)]
        texts = [self.scenes.captions] * len(images) if texts is None else texts
        with ExitStack() as attached:
            for name in names:
                attached.enter_context(self.adapters[name].attach(self.pipe))
            return self.pipe(
                images=images, prompts=texts, guidance_scale=guidance, num_inference_steps=STEPS, generator=noise,
                output_type="pt", **options,
            ).images  # fmt: skip

    def layout(self, x: torch.Tensor, tolerance: int = 1) -> float:
        """IoU of the edges of x with the outlines of the scenes, within so many pixels."""
        return edge_iou(edges(x * 2 - 1), outlines(self.scenes, 0), tolerance).mean().item()

    def objects(self, x: torch.Tensor) -> float:
        """Mean accuracy of what the caption says of the objects."""
        read = self.judge.accuracy(x * 2 - 1, self.scenes.specs)
        return sum(read[attribute] for attribute in OBJECTS) / len(OBJECTS)

    def x_row(self, name: str, drawn: str, x: torch.Tensor, match: float | None = None) -> list[str]:
        """Cells of an image that was drawn."""
        shown = "-" if match is None else f"{match:.3f}"
        found = f"{self.layout(x):.3f}", f"{self.layout(x, 0):.3f}"
        return [name, drawn, shown, *found, "-", "-", f"{self.objects(x):.1%}"]

    def y_row(self, name: str, y: torch.Tensor) -> list[str]:
        """Cells of a condition that was estimated."""
        error = f1 = "-"
        if name == "depth":
            error = f"{(grey(y) - depth(self.scenes)).abs().mean():.4f}"
        else:
            f1 = f"{edge_f1((grey(y) > 0.5).float(), outlines(self.scenes)).mean():.3f}"
        return [name, "y from x", "-", "-", "-", error, f1, "-"]


def measured(runs: Runs) -> tuple[list[list[str]], dict[str, torch.Tensor]]:
    """Rows of the table and rows of the picture."""
    scenes = runs.scenes
    y_of = {name: condition(scenes) for name, condition in CONDITIONS.items()}
    free = runs.draw(["depth"], [None, y_of["depth"]], joint_scale=0.0)[0]
    blind = runs.draw(["depth"], [None, y_of["depth"]], texts="", joint_scale=0.0)[0]
    rows = [runs.x_row("none", "x without a prompt", blind)[:-1] + ["-"], runs.x_row("none", "x", free)]
    shown = {"image": scenes.images, "no adapter": free * 2 - 1}
    for name, y in y_of.items():
        x = runs.draw([name], [None, y])[0]
        rows.append(runs.x_row(name, "x from y", x, agreement(name, x, y)))
        for strength in (0.3, 0.6, 1.0):
            coarse = runs.draw([name], [None, y], strengths=[1.0, strength])[0]
            rows.append(runs.x_row(name, f"x from y with noise {strength:g}", coarse))
        found = runs.draw([name], [(scenes.images + 1) / 2, None], texts="", guidance=1.0)[1]
        rows.append(runs.y_row(name, found))
        both = runs.draw([name], [None, None])
        rows.append(runs.x_row(name, "x and y together", both[0], agreement(name, *both)))
        shown |= {
            f"{name}: y": y.expand(-1, 3, -1, -1) * 2 - 1,
            f"{name}: x from y": x * 2 - 1,
            f"{name} of image": found * 2 - 1,
        }
        shown |= {f"{name}: both, x": both[0] * 2 - 1, f"{name}: both, y": both[1] * 2 - 1}
    together = runs.draw(["depth", "edge"], [None, y_of["depth"], y_of["edge"]])[0]
    rows.append(runs.x_row("depth and edge", "x from two y", together))
    return rows, shown


def with_short_captions() -> list[list[str]]:
    """Rows of images whose captions name shapes and colours only, without an adapter and with each."""
    runs = Runs(plain_scenes(SHORT_PICTURES, keep=()))
    y_of = {name: condition(runs.scenes) for name, condition in CONDITIONS.items()}
    free = runs.draw(["depth"], [None, y_of["depth"]], joint_scale=0.0)[0]
    rows = [runs.x_row("none", "x, short caption", free)]
    for name, y in y_of.items():
        rows.append(runs.x_row(name, "x from y, short caption", runs.draw([name], [None, y])[0]))
    return rows


def sd15_cost() -> Cost:
    """A UniCon adapter of the paper's sizes on Stable Diffusion 1.5: the rows of y, updates, joint attention."""
    unet, (x, t, text) = sd15(), inputs()
    with torch.device("meta"):
        adapter = UniConAdapter.for_model(unet)
    per_step = count_macs(unet, x, t, text)
    sides = {320: 64, 640: 32, 1280: 16}
    blocks = blocks_of(unet)
    for name, width in adapter.config.blocks.items():
        side = 8 if name.startswith("mid") else sides[width]
        h = torch.zeros(1, side * side, width, device="meta")
        xy, yx = (lora.get_submodule(f"{name}.attn1n") for lora in (adapter.xy_lora, adapter.yx_lora))
        per_step += count_macs(joint_attention, blocks[name].attn1, h, h, xy, yx)
        per_step += count_macs(post_joint, adapter.post.get_submodule(name), h, h)
        for attention in ("attn1", "attn2"):
            for projection, lora in adapter.y_lora.get_submodule(f"{name}.{attention}").named_modules():
                if hasattr(lora, "factor"):
                    told = attention == "attn2" and projection in ("to_k", "to_v")
                    per_step += count_macs(lora, text if told else h)
    return Cost("UniCon", parameters_of(adapter), per_step, 0, size_of(x))


def bench(record: MethodRecord, out_dir: Path) -> dict[str, Any]:
    """Rows per adapter and direction."""
    runs = Runs(plain_scenes(PICTURES))
    rows, shown = measured(runs)
    rows += with_short_captions()
    blank = depth(runs.scenes).mean()
    macs = unet_macs()
    costs = "; ".join(cost.sentence(macs) for cost in (sd15_cost(), *peers()))
    notes = (
        f"shapes-unet, frozen; {PICTURES} held-out scenes with plain grounds, captions without places and sizes, "
        f"{STEPS} steps, guidance 3, the same noise for all; short captions ({SHORT_PICTURES} scenes) do not name "
        "the ground either, which the model then gives textures, too. "
        "Agreement: IoU of the edges of x with y, which is given or drawn along. Outlines IoU: of the edges of x with "
        "the outlines of the scene that y was made of, within a pixel; exact: without tolerance. Depth error: mean "
        f"difference from the true depth (an empty map has {blank:.4f}). Outlines F1: of the "
        "lines of y with the true ones, within a pixel, which is lenient with lines three wide. Judge: shapes and "
        "colours of the objects. Counted on the "
        f"Stable Diffusion 1.5 layout, 512 x 512, relative to one step of its UNet: {costs}."
    )
    picture = picture_grid({name: images[:7] for name, images in shown.items()}, out_dir / "grid.png")
    return {"columns": COLUMNS, "rows": rows, "notes": notes, "picture": picture}
