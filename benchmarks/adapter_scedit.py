"""SCEdit: a style and edges on the skip connections: what is drawn, read by the judge, and paid."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig

from benchmarks._common import picture_grid
from benchmarks.adapter import Cost, parameters_of, peers, sd15, size_of, unet_macs
from diffusers_ext import CSCTuner, SCTuner, zoo
from diffusers_ext.eval import count_macs
from diffusers_ext.registry import MethodRecord
from diffusers_ext.training.denoising import task_of
from diffusers_ext.training.fitting import Draws
from diffusers_ext.training.shapes import denoising_loss, shapes_set
from diffusers_ext.zoo.conditions import edge_f1, edge_iou, edges


PICTURES, STEPS = 32, 20
COLUMNS = [
    "Tuners",
    "Captions",
    "Checkered grounds",
    "Edge F1",
    "Edge IoU",
    "IoU of exact edges",
    "Judge: objects and layout",
]
OBJECTS = ("layout", "shape1", "colour1", "size1", "shape2", "colour2", "size2")


def loaded(cls: type, name: str) -> Any:
    """A shipped tuner in float32."""
    return cls.from_pretrained(zoo.adapter_file(f"{name}-shapes-unet"), torch_dtype=torch.float32)


def kept_for_backward(pipe: Any) -> int:
    """Bytes of activations that one training step keeps, whatever is trained on the UNet."""
    kept: dict[int, int] = {}
    data, rows = shapes_set(pipe, 16), torch.arange(16)

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = denoising_loss(task_of(pipe), pipe.unet, data, rows, Draws(0, 0, 16, "cpu"))
    loss.backward()
    return sum(kept.values())


def memory() -> str:
    """Activations that training keeps, beside LoRA's."""
    pipe = zoo.load("shapes-unet")
    pipe.unet.requires_grad_(False)
    with SCTuner.for_model(pipe).attach(pipe.unet):
        ours = kept_for_backward(pipe)
    pipe.unet.add_adapter(LoraConfig(r=4, target_modules=["to_q", "to_k", "to_v", "to_out.0"]))
    lora = kept_for_backward(pipe)
    return (
        f"Training an SC-Tuner on the small model keeps {ours / 1e6:.0f} MB of activations at batch 16, LoRA of "
        f"rank 4 on its attention {lora / 1e6:.0f} MB ({ours / lora:.2f} x)"
    )


def sd15_costs() -> list[Cost]:
    """Both tuners on Stable Diffusion 1.5, counted."""
    unet = sd15()
    with torch.device("meta"):
        style, condition = SCTuner.for_model(unet), CSCTuner.for_model(unet)
        skips = [
            torch.zeros(1, c, 64 // 2 ** (i // 3), 64 // 2 ** (i // 3))
            for i, c in enumerate(style.config.skip_channels)
        ]
        picture = torch.zeros(1, 3, 512, 512)
    with torch.no_grad():
        per_step = sum(count_macs(style.lsc_identity[str(11 - i)], x) for i, x in enumerate(skips))
        once = count_macs(condition.hints, picture)
        held = size_of(condition.hints(picture))
    return [
        Cost("SC-Tuner", parameters_of(style), per_step, 0, 0),
        Cost("CSC-Tuner", parameters_of(condition), per_step, once, held),
    ]


def two_conditions(pipe: Any, count: int = 16) -> str:
    """Agreement with the outlines of two objects, each given by a tuner of its own, and by one of them alone."""
    scenes = zoo.held_out(5 * count)
    rows = ((scenes.specs[:, 1] == 0) & (scenes.specs[:, 2] >= zoo.world.ROW)).nonzero().flatten()[:count]
    captions = [zoo.caption(spec, keep=()) for spec in scenes.specs[rows].tolist()]
    wanted = [edges((scenes.masks[rows, k : k + 1] * 2 - 1).expand(-1, 3, -1, -1)) for k in (0, 1)]
    tuners = [loaded(CSCTuner, "csc-edges") for _ in wanted]
    for tuner, outline in zip(tuners, wanted):
        tuner.set_condition(outline)

    def drawn(*active: CSCTuner) -> str:
        with ExitStack() as attached:
            for tuner in active:
                attached.enter_context(tuner.attach(pipe))
            found = edges(zoo.generate(pipe, captions, num_inference_steps=STEPS))
        return f"{edge_f1(found, torch.maximum(*wanted)).mean():.3f}"

    alone = " and ".join(drawn(tuner) for tuner in tuners)
    return (
        f"Two tuners for edges, each given the outline of one object ({count} scenes, plain grounds): F1 of both "
        f"outlines {drawn(*tuners)} together, {alone} with one of them, {drawn()} with none"
    )


def bench(record: MethodRecord, out_dir: Path) -> dict[str, Any]:
    """Rows per set of tuners and kind of caption."""
    pipe, scenes, judge = zoo.load("shapes-unet"), zoo.held_out(PICTURES), zoo.load_judge()
    wanted = edges(scenes.images)
    style, condition = loaded(SCTuner, "scedit-checkered"), loaded(CSCTuner, "csc-edges")
    condition.set_condition(wanted)
    captions = {"full": scenes.captions, "objects only": [zoo.caption(s, keep=()) for s in scenes.specs.tolist()]}
    styled = scenes.specs.clone()
    styled[:, 1] = zoo.world.TEXTURES.index("checkered")
    rows, pictures = [], {"edges": wanted.expand(-1, 3, -1, -1) * 2 - 1}
    for name, tuners in (("none", []), ("style", [style]), ("edges", [condition]), ("both", [style, condition])):
        for kind, texts in captions.items():
            with ExitStack() as attached:
                for tuner in tuners:
                    attached.enter_context(tuner.attach(pipe))
                images = zoo.generate(pipe, texts, num_inference_steps=STEPS)
            found, read = edges(images), judge.accuracy(images, styled)
            objects = sum(read[attribute] for attribute in OBJECTS) / len(OBJECTS)
            agreement = [edge_f1(found, wanted).mean(), *(edge_iou(found, wanted, t).mean() for t in (1, 0))]
            rows.append([name, kind, f"{read['texture']:.0%}", *(f"{a:.3f}" for a in agreement), f"{objects:.1%}"])
            if (name in ("edges", "both")) == (kind == "objects only") or name == "none":
                pictures[f"{name}, {kind}"] = images
    macs = unet_macs()
    costs = "; ".join(cost.sentence(macs) for cost in (*sd15_costs(), *peers()))
    notes = (
        f"shapes-unet, frozen; {PICTURES} held-out captions, {STEPS} steps, guidance 3, the same noise for all. The "
        "style is a checkered ground whatever the caption says of its texture. Edges within one pixel of those drawn "
        "by, and without tolerance; captions that name objects only leave place, size and ground to them. "
        f"Judge: mean of seven attributes of objects and layout. {two_conditions(pipe)}. {memory()}. "
        "Counted on the Stable Diffusion 1.5 layout, 512 x 512, "
        f"relative to one step of its UNet: {costs}."
    )
    picture = picture_grid({name: images[:7] for name, images in pictures.items()}, out_dir / "grid.png")
    return {"columns": COLUMNS, "rows": rows, "notes": notes, "picture": picture}
