"""Ctrl-Adapter: edges on models the ControlNet was not made for, what the judge reads, what it costs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from diffusers import ControlNetModel, StableDiffusionControlNetPipeline, UNet2DConditionModel

from benchmarks._common import picture_grid
from benchmarks.adapter import parameters_of
from diffusers_ext import CtrlAdapterControl, CtrlAdapterModel, zoo
from diffusers_ext.eval import count_macs
from diffusers_ext.registry import MethodRecord
from diffusers_ext.zoo.conditions import edge_f1, edge_iou, edges


SOURCE, CONTROLNET = "shapes-unet-eps", "controlnet-edges-shapes-unet-eps"
PICTURES, STEPS = 24, 20
COLUMNS = ["Model", "Edges through", "Edge F1", "IoU of exact edges", "Judge: all attributes"]
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
    """The shipped adapter of a model."""
    return CtrlAdapterModel.from_pretrained(zoo.adapter_file(f"ctrl-adapter-{name}"), torch_dtype=torch.float32)


def untrained(adapter: CtrlAdapterModel) -> CtrlAdapterModel:
    """The same adapter with random weights."""
    torch.manual_seed(0)
    return CtrlAdapterModel(**{key: value for key, value in adapter.config.items() if not key.startswith("_")}).eval()


def ways(drawing: Drawing) -> Iterator[tuple[str, str, Draw]]:
    """Model, name of the way, and the way itself."""
    yield SOURCE, "nothing", drawing.plain(drawing.source)
    yield SOURCE, "its ControlNet", drawing.native(drawing.source)
    unet, adapter = zoo.load("shapes-unet"), trained("shapes-unet")
    yield "shapes-unet", "nothing", drawing.plain(unet)
    yield "shapes-unet", "that ControlNet as it is", drawing.native(unet)
    yield "shapes-unet", "Ctrl-Adapter", drawing.adapted(unet, adapter)
    yield "shapes-unet", "random weights", drawing.adapted(unet, untrained(adapter))


def sdxl_cost() -> str:
    """Operations per step of SDXL at 1024 x 1024, counted on the meta device."""
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(_SDXL).eval()
        own = ControlNetModel.from_unet(unet).eval()
        small = ControlNetModel(cross_attention_dim=768).eval()
        adapter = CtrlAdapterModel(num_blocks=1).eval()
        picture, text, context = torch.zeros(1, 3, 1024, 1024), torch.zeros(1, 77, 768), torch.zeros(1, 77, 2048)
        added = {"added_cond_kwargs": {"text_embeds": torch.zeros(1, 1280), "time_ids": torch.zeros(1, 6)}}
        latents, t = torch.zeros(1, 4, 128, 128), torch.zeros(1)
        pooled, hint = torch.zeros(1, 4, 64, 64), torch.zeros(1, 3, 512, 512)
        with torch.no_grad():
            down, mid = small(pooled, t, text, hint, return_dict=False)
    step = count_macs(unet, latents, t, context, **added)
    theirs = count_macs(own, latents, t, context, picture, **added)
    control = count_macs(small, pooled, t, text, hint)
    mine = count_macs(adapter, down, mid, t, context)
    return (
        f"Counted on SDXL at 1024 x 1024, relative to one step of its UNet: SDXL's own ControlNet "
        f"{parameters_of(own) / 1e6:.0f} M parameters, {theirs / step:+.1%}; Ctrl-Adapter "
        f"{parameters_of(adapter) / 1e6:.0f} M parameters, {mine / step:+.1%} beside the SD 1.5 ControlNet's "
        f"{control / step:+.1%}, which with latent skipping at a fixed timestep runs once per picture"
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


def small_cost(drawing: Drawing) -> str:
    """Operations per step of the small model, counted."""
    unet, adapter = zoo.load("shapes-unet").unet, trained("shapes-unet")
    call = torch.zeros(1, 4, 16, 16), torch.zeros(1), torch.zeros(1, 20, 128)
    with torch.no_grad():
        down, mid = drawing.controlnet(*call, drawing.pictures[:1], return_dict=False)
    step, control = count_macs(unet, *call), count_macs(drawing.controlnet, *call, drawing.pictures[:1])
    mine = count_macs(adapter, down, mid, call[1], call[2])
    return (
        f"Counted on the small model, relative to one step of its UNet: ControlNet "
        f"{parameters_of(drawing.controlnet) / 1e6:.2f} M parameters, {control / step:+.1%}; adapter "
        f"{parameters_of(adapter) / 1e6:.2f} M, {mine / step:+.1%}"
    )


def bench(record: MethodRecord, out_dir: Path) -> dict[str, Any]:
    """Rows per model and way: agreement with edges the captions do not tell, and what the judge reads."""
    drawing, judge, rows = Drawing(), zoo.load_judge(), []
    scenes, wanted = drawing.scenes, drawing.wanted
    short = [zoo.caption(spec, keep=()) for spec in scenes.specs.tolist()]
    pictures = {"edges": drawing.pictures * 2 - 1}
    for model, way, draw in ways(drawing):
        images = draw(short)
        found = edges(images)
        agreement = [edge_f1(found, wanted).mean(), edge_iou(found, wanted, tolerance=0).mean()]
        read = judge.accuracy(draw(scenes.captions), scenes.specs)["all"]
        rows.append([model, way, *(f"{a:.3f}" for a in agreement), f"{read:.1%}"])
        pictures[f"{model}:\n{way}"] = images
    notes = (
        f"{PICTURES} held-out scenes, {STEPS} steps, guidance 3. Edges: of pictures whose captions name shapes and "
        "colours only, against the edges drawn by: F1 within one pixel, IoU without tolerance. Judge: on full "
        f"captions, drawn by the edges too. The ControlNet was trained on {SOURCE}, the adapter with ControlNet and "
        "backbone frozen (steps and data in examples/train_adapters/README.md). "
        f"{small_cost(drawing)}. {sdxl_cost()}."
    )
    return {
        "columns": COLUMNS,
        "rows": rows,
        "notes": notes,
        "picture": picture_grid(_few(pictures), out_dir / "grid.png"),
    }


def _few(pictures: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: images[:7] for name, images in pictures.items()}
