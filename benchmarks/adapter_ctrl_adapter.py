"""Ctrl-Adapter: edges on models the ControlNet was not made for, what the judge reads, what it costs."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from diffusers import ControlNetModel, StableDiffusionControlNetPipeline, UNet2DConditionModel
from torch.utils._pytree import tree_map

from benchmarks._common import picture_grid
from benchmarks.adapter import Cost, parameters_of, size_of
from diffusers_ext import CtrlAdapterControl, CtrlAdapterModel, zoo
from diffusers_ext.eval import PairedTiming, count_macs, paired_ratio
from diffusers_ext.registry import MethodRecord
from diffusers_ext.training.denoising import FluxTask
from diffusers_ext.zoo.conditions import edge_f1, edge_iou, edges


SOURCE, CONTROLNET = "shapes-unet-eps", "controlnet-edges-shapes-unet-eps"
PICTURES, STEPS = 24, 20
COLUMNS = [
    "Model",
    "Edges through",
    "Edge F1",
    "IoU of exact edges",
    "Judge: all attributes",
    "MACs per step",
    "Time of a run",
]
# The adapter whose control does not depend on the step.
ONCE = "once per picture"
RANDOM = "random weights"
Way = tuple[str, str]
Draw = Callable[[list[str]], torch.Tensor]


class Drawing:
    """The models, the edges to draw by, and the ways to get them into a picture."""

    def __init__(self):
        self.scenes, self.source = zoo.held_out(PICTURES), zoo.load(SOURCE)
        self.controlnet = zoo.load_controlnet(CONTROLNET)
        self.wanted = edges(self.scenes.images)
        self.pictures = self.wanted.expand(-1, 3, -1, -1)

    def plain(self, pipe: Any) -> Draw:
        """No control."""
        return lambda captions: zoo.generate(pipe, captions, num_inference_steps=STEPS)

    def native(self, pipe: Any) -> Draw:
        """The ControlNet plugged in as it is."""
        whole = StableDiffusionControlNetPipeline.from_pipe(pipe, controlnet=self.controlnet)
        whole.set_progress_bar_config(disable=True)
        return lambda captions: zoo.generate(
            whole, captions, num_inference_steps=STEPS, image=self.pictures[: len(captions)]
        )

    def control(self, captions: list[str]) -> CtrlAdapterControl:
        """The edges, with captions in the words of the ControlNet's own model."""
        return CtrlAdapterControl.from_prompts(
            self.controlnet,
            self.pictures[: len(captions)],
            captions,
            self.source.tokenizer,
            self.source.text_encoder,
        )

    def adapted(self, pipe: Any, adapter: CtrlAdapterModel) -> Draw:
        """Through a Ctrl-Adapter."""

        def draw(captions: list[str]) -> torch.Tensor:
            adapter.control = self.control(captions)
            with adapter.attach(pipe):
                return zoo.generate(pipe, captions, num_inference_steps=STEPS)

        return draw


def trained(name: str) -> CtrlAdapterModel:
    """A shipped adapter."""
    return CtrlAdapterModel.from_pretrained(zoo.adapter_file(f"ctrl-adapter-{name}"), torch_dtype=torch.float32)


def fresh(adapter: CtrlAdapterModel, **changes: Any) -> CtrlAdapterModel:
    """The same adapter with random weights, and with these changes of its config."""
    torch.manual_seed(0)
    config = {key: value for key, value in adapter.config.items() if not key.startswith("_")}
    return CtrlAdapterModel(**{**config, **changes}).eval()


def ways(drawing: Drawing) -> Iterator[tuple[str, str, Draw]]:
    """Model, name of the way, and the way itself."""
    yield SOURCE, "nothing", drawing.plain(drawing.source)
    yield SOURCE, "its ControlNet", drawing.native(drawing.source)
    unet, adapter = zoo.load("shapes-unet"), trained("shapes-unet")
    yield "shapes-unet", "nothing", drawing.plain(unet)
    yield "shapes-unet", "that ControlNet as it is", drawing.native(unet)
    yield "shapes-unet", "Ctrl-Adapter", drawing.adapted(unet, adapter)
    yield "shapes-unet", f"Ctrl-Adapter, {ONCE}", drawing.adapted(unet, trained("once-shapes-unet"))
    yield "shapes-unet", RANDOM, drawing.adapted(unet, fresh(adapter))
    dit, adapter = zoo.load("shapes-dit"), trained("shapes-dit")
    yield "shapes-dit", "nothing", drawing.plain(dit)
    yield "shapes-dit", f"Ctrl-Adapter, {ONCE}", drawing.adapted(dit, adapter)
    yield "shapes-dit", RANDOM, drawing.adapted(dit, fresh(adapter).start_small())


def run_times(drawing: Drawing, pairs: int = 5) -> dict[Way, PairedTiming]:
    """Processor time of a run over that of one without control, by model and way."""
    captions, found, plain = drawing.scenes.captions[:2], {}, drawing.plain(drawing.source)
    for model, way, draw in ways(drawing):
        if way == "nothing":
            plain = draw
        elif way != RANDOM:
            runs = functools.partial(draw, captions), functools.partial(plain, captions)
            found[model, way] = paired_ratio(*runs, pairs=pairs, clock=time.process_time)
    return found


class SDXL:
    """SDXL, its own ControlNet, SD 1.5's ControlNet and the adapter on the meta device; inputs for 1024 x 1024."""

    def __init__(self):
        with torch.device("meta"):
            self.unet = UNet2DConditionModel.from_config(_SDXL).eval()
            self.own = ControlNetModel.from_unet(self.unet).eval()
            self.small = ControlNetModel(cross_attention_dim=768).eval()
            self.adapter = CtrlAdapterModel(num_blocks=1).eval()
            self.picture, self.context = torch.zeros(1, 3, 1024, 1024), torch.zeros(1, 77, 2048)
            self.latents, self.t = torch.zeros(1, 4, 128, 128), torch.zeros(1)
            added = {"text_embeds": torch.zeros(1, 1280), "time_ids": torch.zeros(1, 6)}
            self.added = {"added_cond_kwargs": added}
            self.small_call = torch.zeros(1, 4, 64, 64), self.t, torch.zeros(1, 77, 768), torch.zeros(1, 3, 512, 512)
            with torch.no_grad():
                self.features = self.small(*self.small_call, return_dict=False)

    def costs(self) -> tuple[int, list[Cost]]:
        """MACs of a step of SDXL, and what Ctrl-Adapter (ControlNet apart) and SDXL's own ControlNet add to it."""
        call = self.latents, self.t, self.context
        with torch.no_grad():
            mapped = self.adapter(*self.features, self.t, self.context)[0]
            mapped = [mapped[k] for k in self.adapter.active if k < len(mapped)]
            residuals = self.own(*call, self.picture, **self.added, return_dict=False)
        mine = count_macs(self.adapter, *self.features, self.t, self.context)
        control = count_macs(self.small, *self.small_call)
        theirs = count_macs(self.own, *call, self.picture, **self.added)
        return count_macs(self.unet, *call, **self.added), [
            Cost("Ctrl-Adapter", parameters_of(self.adapter), mine, control, size_of(mapped)),
            Cost("ControlNet of SDXL", parameters_of(self.own), theirs, 0, size_of(residuals)),
        ]

    def seconds(self) -> dict[str, float]:
        """Processor time of one call in float32, by network; after this the networks have random weights."""
        calls = {
            "SD 1.5 ControlNet": (self.small, self.small_call, {}),
            "adapter": (self.adapter, (*self.features, self.t, self.context), {}),
            "SDXL ControlNet": (self.own, (self.latents, self.t, self.context, self.picture), self.added),
        }
        return {name: _seconds(*call) for name, call in calls.items()}


def _seconds(module: torch.nn.Module, args: tuple, kwargs: dict) -> float:
    torch.manual_seed(0)
    module.to_empty(device="cpu")
    with torch.no_grad():
        for weight in module.parameters():
            weight.normal_(std=0.02)
        args, kwargs = tree_map(lambda t: torch.randn(t.shape) if isinstance(t, torch.Tensor) else t, (args, kwargs))
        start = time.process_time()
        module(*args, **kwargs)
    used = time.process_time() - start
    module.to("meta")
    return used


def sdxl_cost() -> str:
    """The same in words."""
    models = SDXL()
    step, (mine, theirs) = models.costs()
    taken = models.seconds()
    every = mine.once  # of the SD 1.5 ControlNet, at every step unless latents are skipped
    return (
        "Counted on SDXL at 1024 x 1024, relative to one step of its UNet: "
        f"SDXL's own ControlNet {theirs.parameters / 1e6:.0f} M parameters, {theirs.per_step / step:+.1%}; the SD 1.5 "
        f"ControlNet at 512 x 512 {every / step:+.1%}, the authors' adapter {mine.parameters / 1e6:.0f} M, "
        f"{mine.per_step / step:+.1%}. Both at every step: {(every + mine.per_step) / theirs.per_step:.2f} x SDXL's "
        f"ControlNet; adapter alone (latents skipped, ControlNet at a fixed timestep, once per picture): "
        f"{mine.per_step / theirs.per_step:.2f} x it, but {mine.per_step / every:.1f} x the SD 1.5 ControlNet; both "
        f"{ONCE}: less than the SD 1.5 ControlNet alone from {int((every + mine.per_step) / every) + 1} steps on, "
        f"{(every + mine.per_step) / (50 * every):.2f} x it in 50. Processor time of one call each in float32, random "
        f"weights: adapter {taken['adapter'] / taken['SDXL ControlNet']:.2f} x SDXL's ControlNet, "
        f"{taken['adapter'] / taken['SD 1.5 ControlNet']:.1f} x SD 1.5's"
    )


_SDXL = {
    "sample_size": 128,
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}


def adapter_macs(drawing: Drawing, name: str) -> tuple[int, int]:
    """Operations of one call of the ControlNet and of an adapter."""
    call = torch.zeros(1, 4, 16, 16), torch.zeros(1), torch.zeros(1, 20, 128)
    with torch.no_grad():
        down, mid = drawing.controlnet(*call, drawing.pictures[:1], return_dict=False)
    control = count_macs(drawing.controlnet, *call, drawing.pictures[:1])
    return control, count_macs(trained(name), down, mid, call[1], call[2])


def step_macs(drawing: Drawing) -> tuple[int, int, int]:
    """Operations of one call of the small UNet, of the ControlNet and of the adapter."""
    call = torch.zeros(1, 4, 16, 16), torch.zeros(1), torch.zeros(1, 20, 128)
    return count_macs(zoo.load("shapes-unet").unet, *call), *adapter_macs(drawing, "shapes-unet")


def per_step(drawing: Drawing) -> dict[Way, str]:
    """Operations that every way adds to a step, of a run of `STEPS`."""
    step, control, mine = step_macs(drawing)
    once = sum(adapter_macs(drawing, "once-shapes-unet"))
    x, text = torch.zeros(1, 4, 16, 16), {"t5": torch.zeros(1, 20, 128), "pooled": torch.zeros(1, 128)}
    flux = count_macs(FluxTask.predict, zoo.load("shapes-dit").transformer, x, torch.zeros(1), text)
    source, mapped = adapter_macs(drawing, "shapes-dit")
    shares = {
        (SOURCE, "its ControlNet"): control / step,
        ("shapes-unet", "that ControlNet as it is"): control / step,
        ("shapes-unet", "Ctrl-Adapter"): (control + mine) / step,
        ("shapes-unet", f"Ctrl-Adapter, {ONCE}"): once / STEPS / step,
        # Both calls of a guided step share what the ControlNet says.
        ("shapes-dit", f"Ctrl-Adapter, {ONCE}"): (source / 2 + mapped) / STEPS / flux,
    }
    return {way: f"{share:+.1%}" for way, share in shares.items()}


def skipping(drawing: Drawing) -> str:
    """What latent skipping alone saves on the small model: the ControlNet once per picture, the adapter every step."""
    step, control, mine = step_macs(drawing)
    unet, captions = zoo.load("shapes-unet"), drawing.scenes.captions[:2]
    half = fresh(trained("shapes-unet"), skip_conv_in=True, fixed_controlnet_timestep=500)
    runs = drawing.adapted(unet, half), drawing.plain(unet)
    taken = paired_ratio(*(functools.partial(draw, captions) for draw in runs), clock=time.process_time)
    return (
        "With latent skipping and a fixed timestep of the ControlNet alone, the adapter still runs at every step: "
        f"{(control / STEPS + mine) / step:+.1%} MACs per step, {taken} of the time; the adapter alone has "
        f"{mine / control:.2f} x the MACs of the ControlNet"
    )


def bench(record: MethodRecord, out_dir: Path) -> dict[str, Any]:
    """Rows per model and way: agreement with edges the captions do not tell, and what the judge reads."""
    drawing, judge, rows = Drawing(), zoo.load_judge(), []
    scenes, wanted = drawing.scenes, drawing.wanted
    short = [zoo.caption(spec, keep=()) for spec in scenes.specs.tolist()]
    pictures = {"edges": drawing.pictures * 2 - 1}
    macs, times = per_step(drawing), run_times(drawing)
    for model, way, draw in ways(drawing):
        images = draw(short)
        found = edges(images)
        agreement = [edge_f1(found, wanted).mean(), edge_iou(found, wanted, tolerance=0).mean()]
        read = judge.accuracy(draw(scenes.captions), scenes.specs)["all"]
        costs = macs.get((model, way), "-"), str(times.get((model, way), "-"))
        rows.append([model, way, *(f"{a:.3f}" for a in agreement), f"{read:.1%}", *costs])
        pictures[f"{model}:\n{way}"] = images
    notes = (
        f"{PICTURES} held-out scenes, {STEPS} steps, guidance 3. Edges: of pictures whose captions name shapes and "
        "colours only, against the edges drawn by: F1 within one pixel, IoU without tolerance. Judge: on full "
        f"captions, drawn by the edges too. The ControlNet was trained on {SOURCE}, the adapter with ControlNet and "
        "backbone frozen (steps and data in examples/train_adapters/README.md). Once per picture: latents skipped, "
        "ControlNet and adapter at a fixed timestep. MACs relative to a step of the model, spread over the run; "
        "time of a run of two pictures over one without control. Random weights for shapes-dit: as small as training "
        "starts with; larger ones draw noise, whose many edges meet any others. ControlNet "
        f"{parameters_of(drawing.controlnet) / 1e6:.2f} M parameters, adapter "
        f"{parameters_of(trained('shapes-unet')) / 1e6:.2f} M, that for shapes-dit "
        f"{parameters_of(trained('shapes-dit')) / 1e6:.2f} M. {skipping(drawing)}. {sdxl_cost()}."
    )
    return {
        "columns": COLUMNS,
        "rows": rows,
        "notes": notes,
        "picture": picture_grid(_few(pictures), out_dir / "grid.png"),
    }


def _few(pictures: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: images[:7] for name, images in pictures.items()}
