"""What the UniCon nodes do on a diffusers pipeline: finding and loading models, and a run with ComfyUI's progress."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import comfy.model_management
import comfy.utils
import torch

from .zoo import shipped_models


def base_folders() -> dict[str, Path]:
    """Stable Diffusion in diffusers' layout, by the name of the folder in `models/diffusers`."""
    import folder_paths

    roots = [Path(root) for root in folder_paths.get_folder_paths("diffusers")]
    return {
        path.parent.name: path.parent for root in roots if root.is_dir() for path in root.glob("*/model_index.json")
    }


def base_names() -> list[str]:
    """Choices of the loader: folders, and what ships with this pack."""
    return sorted({*base_folders(), *(name for name in shipped_models() if "unet" in name)})


def load(base: str, adapter_path: Path) -> Any:
    """`UniConPipeline` of a base model with an adapter attached."""
    from diffusers import StableDiffusionPipeline

    from diffusers_ext import UniConAdapter, UniConPipeline, zoo

    dtype = torch.float16 if comfy.model_management.should_use_fp16() else torch.float32
    folder = base_folders().get(base)
    if folder is None:
        pipe = zoo.load(base, dtype)
    else:
        pipe = StableDiffusionPipeline.from_pretrained(
            folder, torch_dtype=dtype, local_files_only=True, use_safetensors=True
        )
    pipe = UniConPipeline.from_pipe(pipe)
    pipe.set_progress_bar_config(disable=True)
    UniConAdapter.from_pretrained(adapter_path).attach(pipe)
    return pipe


def run(pipe: Any, seed: int, steps: int, **options: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw with ComfyUI's progress bar and stop button, on its device; two IMAGEs."""
    bar = comfy.utils.ProgressBar(steps)
    device = comfy.model_management.get_torch_device()

    def note(pipe: Any, step: int, times: list, tensors: dict) -> dict:
        comfy.model_management.throw_exception_if_processing_interrupted()
        bar.update_absolute(step + 1)
        return {}

    modules = [part for part in pipe.components.values() if isinstance(part, torch.nn.Module)]
    comfy.model_management.free_memory(sum(comfy.model_management.module_size(m) for m in modules), device)
    try:
        found = pipe.to(device)(
            num_inference_steps=steps, generator=torch.Generator().manual_seed(seed), output_type="pt",
            callback_on_step_end=note, **options,
        ).images  # fmt: skip
    finally:
        pipe.to(comfy.model_management.unet_offload_device())
    return tuple(image.movedim(1, -1).float().cpu() for image in found)
