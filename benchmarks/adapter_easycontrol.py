"""EasyControl: agreement with edges and colours, of one condition and of two, and its cost on FLUX.1's sizes."""

from __future__ import annotations

import contextlib
import copy
import functools
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import FluxControlNetModel, FluxTransformer2DModel

from benchmarks._common import picture_grid
from benchmarks.adapter import Cost, parameters_of, size_of
from diffusers_ext import EasyControlAdapter, zoo
from diffusers_ext._flux_tokens import image_ids
from diffusers_ext.adapters._easycontrol_stream import Bank, flux_attentions, flux_stream, put_on
from diffusers_ext.eval import PairedTiming, count_macs, paired_ratio
from diffusers_ext.registry import MethodRecord
from diffusers_ext.zoo.conditions import colourless, edge_f1, edge_iou, edges, subjects


PICTURES, JOINT, STEPS = 48, 96, 20
COLUMNS = [
    "Caption",
    "Control",
    "Edge IoU (exact)",
    "Edge F1 (1 pixel)",
    "Judge: first colour",
    "Judge: layout",
    "Judge: all attributes",
]
FULL, SHORT, WIDE, COLOURLESS = "full", "short", "full, 80 x 64 pixels", "short, first colour left out"


@functools.cache
def scenes(count: int = PICTURES) -> zoo.Scenes:
    """What is asked for; the first of them are the same for every count."""
    return zoo.held_out(count)


@functools.cache
def wanted(count: int = PICTURES) -> torch.Tensor:
    """Their edges."""
    return edges(scenes(count).images)


def wanted_subjects(count: int = PICTURES) -> torch.Tensor:
    """Their first objects by themselves."""
    return subjects(scenes(count).specs, seed=999)


def object_edges(which: int) -> torch.Tensor:
    """Edges of the first (0) or second (1) objects alone."""
    return edges((scenes().masks[:, which : which + 1] * 2 - 1).expand(-1, 3, -1, -1))


def stretched(images: torch.Tensor, width: int) -> torch.Tensor:
    """Pictures 64 pixels high and `width` wide."""
    return F.interpolate(images, (64, width), mode="bilinear", antialias=True)


def trained(kind: str = "edge") -> EasyControlAdapter:
    """A shipped adapter."""
    return EasyControlAdapter.from_pretrained(zoo.adapter_file(f"easycontrol-{kind}-shapes-dit"))


def agreement(images: torch.Tensor) -> tuple[float, float]:
    """IoU of edge pixels, and their F1 within one pixel, of pictures of any shape, scaled to 64 x 64."""
    found, asked = edges(images if images.shape[-1] == 64 else stretched(images, 64)), wanted(len(images))
    return edge_iou(found, asked, tolerance=0).mean().item(), edge_f1(found, asked).mean().item()


def pictures_of(pipe: Any) -> dict[tuple[str, str], torch.Tensor]:
    """Pictures by (caption, control)."""
    full, short = scenes().captions, zoo.scenes(PICTURES, 999, drop=1.0).captions
    one, other, found = trained(), trained(), {}

    def draw(captions: list[str], **size: int) -> torch.Tensor:
        return zoo.generate(pipe, captions, STEPS, batch_size=PICTURES, **size)

    found[FULL, "none"], found[SHORT, "none"], found[WIDE, "none"] = draw(full), draw(short), draw(full, width=80)
    conditions = {
        "edges": wanted(),
        "edges of another scene": wanted().roll(1, 0),
        "black": torch.zeros_like(wanted()),
    }
    with one.attach(pipe):
        for name, condition in conditions.items():
            one.set_condition(pipe, condition)
            found[FULL, name] = draw(full)
        one.set_condition(pipe, wanted())
        found[WIDE, "edges, squashed"], found[SHORT, "edges"] = draw(full, width=80), draw(short)
        one.set_condition(pipe, edges(stretched(scenes().images, 80)), cond_size=(64, 80))
        found[WIDE, "edges, 80 x 64"] = draw(full, width=80)
        one.set_condition(pipe, object_edges(0))
        other.set_condition(pipe, object_edges(1))
        with other.attach(pipe):
            found[SHORT, "edges of each object, two conditions"] = draw(short)
    return found


def joint_pictures_of(pipe: Any) -> dict[tuple[str, str], torch.Tensor]:
    """Pictures by (caption, control), of edges and a subject that were trained apart: each alone, and both."""
    captions = colourless(zoo.scenes(JOINT, 999, drop=1.0).captions, scenes(JOINT).specs)
    edge, colour, found = trained(), trained("colour"), {}
    edge.set_condition(pipe, wanted(JOINT))
    colour.set_condition(pipe, wanted_subjects(JOINT))
    controls = {"none": (), "edges": (edge,), "subject": (colour,), "edges and subject": (edge, colour)}
    for name, adapters in controls.items():
        with contextlib.ExitStack() as attached:
            for adapter in adapters:
                attached.enter_context(adapter.attach(pipe))
            found[COLOURLESS, name] = zoo.generate(pipe, captions, STEPS, batch_size=JOINT)
    return found


def quality_rows(pictures: dict[tuple[str, str], torch.Tensor]) -> list[list[str]]:
    """One row per kind of picture."""
    judge, rows = zoo.load_judge(), []
    for (caption, control), images in sorted(pictures.items()):
        iou, f1 = agreement(images)
        seen = judge.accuracy(stretched(images, 64), scenes(len(images)).specs)
        read = (f"{seen[name]:.1%}" for name in ("colour1", "layout", "all"))
        rows.append([caption, control, f"{iou:.3f}", f"{f1:.3f}", *read])
    return rows


def flux(blocks: tuple[int, int] = (19, 38), heads: int = 24) -> FluxTransformer2DModel:
    """FLUX.1-dev, or a smaller one with heads of the same size."""
    return FluxTransformer2DModel(
        num_layers=blocks[0], num_single_layers=blocks[1], num_attention_heads=heads, guidance_embeds=True
    ).eval()


def inputs(device: str, side: int = 64, words: int = 512) -> dict[str, torch.Tensor]:
    """Arguments of a call for `side` x `side` image tokens; 64 is a picture of 1024 x 1024 pixels."""
    return {
        "hidden_states": torch.zeros(1, side * side, 64, device=device),
        "encoder_hidden_states": torch.zeros(1, words, 4096, device=device),
        "pooled_projections": torch.zeros(1, 768, device=device),
        "timestep": torch.ones(1, device=device),
        "guidance": torch.ones(1, device=device),
        "img_ids": image_ids(2 * side, 2 * side, device=device),
        "txt_ids": torch.zeros(words, 3, device=device),
    }


def flux_controlnet() -> FluxControlNetModel:
    """A ControlNet of 5 + 10 blocks for FLUX.1-dev."""
    return FluxControlNetModel(num_layers=5, num_single_layers=10, guidance_embeds=True).eval()


def flux_costs() -> tuple[int, list[Cost]]:
    """MACs of a step of FLUX.1-dev at 1024 x 1024; what a condition of 512 x 512 and a ControlNet add to it."""
    call = inputs("meta")
    with torch.device("meta"):
        model, adapter, net, latents = flux(), EasyControlAdapter(), flux_controlnet(), torch.zeros(1, 16, 64, 64)
    stream = flux_stream(model, call["pooled_projections"], call["guidance"], torch.float32)
    condition = (stream, latents, "spatial", (64, 64))
    with torch.no_grad():
        pairs = adapter.encode(*condition)
        residuals = net(**call, controlnet_cond=call["hidden_states"], return_dict=False)
    base, once = count_macs(model, **call), count_macs(adapter.encode, *condition)
    put_on(flux_attentions(model), Bank(adapter, made=pairs))
    more = count_macs(model, **call) - base
    control = count_macs(net, **call, controlnet_cond=call["hidden_states"])
    return base, [
        Cost("EasyControl", parameters_of(adapter), more, once, size_of(pairs)),
        Cost("ControlNet of 5 + 10 blocks", parameters_of(net), control, 0, size_of(residuals)),
    ]


def costs() -> str:
    """The same in words."""
    base, found = flux_costs()
    return (
        "FLUX.1-dev sizes, 1024 x 1024, condition 512 x 512 (25 % of the tokens), counted: "
        f"{'; '.join(cost.sentence(base) for cost in found)}. diffusers has no T2I-Adapter for Flux."
    )


def step_times(pairs: int = 5) -> tuple[PairedTiming, PairedTiming]:
    """Time of a step with a condition of 25 % of the tokens over one without: cached, and computed anew each step."""
    torch.manual_seed(0)
    plain, call = flux((2, 4), 4), inputs("cpu", 32, 128)
    controlled, adapter = copy.deepcopy(plain), EasyControlAdapter.for_model(plain, rank=16)
    adapter.set_latents(torch.randn(1, 16, 32, 32))

    def step(model: torch.nn.Module) -> None:
        with torch.no_grad():
            model(**call)

    times = []
    with adapter.attach(controlled):
        for cached in (True, False):
            adapter.use_kv_cache = cached
            runs = functools.partial(step, controlled), functools.partial(step, plain)
            times.append(paired_ratio(*runs, pairs=pairs, clock=time.process_time))
    return times[0], times[1]


def bench(record: MethodRecord, out_dir: Path) -> dict[str, Any]:
    """Measure EasyControl; returns what `benchmarks/run.py` expects."""
    pipe, (cached, anew) = zoo.load("shapes-dit"), step_times()
    pictures = pictures_of(pipe) | joint_pictures_of(pipe)
    notes = (
        f"shapes-dit, {PICTURES} held-out scenes ({JOINT} where the first colour is left out: only the subject, a "
        f"picture of the first object, tells it), {STEPS} steps, guidance 3, adapters of "
        f"{parameters_of(trained()) / 1e3:.0f} thousand parameters. A "
        "full caption alone puts most objects near their edges; a short one says neither place, size nor ground, but "
        "the judge reads them all the same. Two conditions: the adapter twice, each with the outline of one object; "
        "the ground is free. No model here has seen wide pictures; they are scaled to 64 x 64 before. "
        f"{costs()} Measured on 2 + 4 blocks of width 512, 1024 image and 128 text tokens, condition of 25 %: time of "
        f"a step over the plain one {cached} with the cache, {anew} without."
    )
    shown = {"scenes": scenes().images, "their edges": wanted().expand(-1, 3, -1, -1) * 2 - 1}
    shown |= {f"caption: {c}\ncontrol: {k}": pictures[c, k] for c in (FULL, SHORT) for k in ("none", "edges")}
    shown["subjects"] = F.pad(wanted_subjects(), (16,) * 4)
    shown |= {f"no first colour\ncontrol: {k}": found for (c, k), found in pictures.items() if c == COLOURLESS}
    picture = picture_grid({name: images[:8] for name, images in shown.items()}, out_dir / "easycontrol.png")
    return {"columns": COLUMNS, "rows": quality_rows(pictures), "notes": notes, "picture": picture}
