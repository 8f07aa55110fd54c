"""Write small random-weight models in the public layouts, for tests of core loaders that need no trained model.

usage: write_tiny_models.py COMFYUI_DIR MODELS_DIR

checkpoints/tiny_sd15.safetensors       Stable Diffusion 1.5: UNet, CLIP-L, a 4-channel TAESD as VAE
diffusion_models/tiny_flux.safetensors  Flux: one double and one single block, fed by the CLIP-L above
diffusion_models/tiny_sd3.safetensors   Stable Diffusion 3: depth 2, fed by the same
vae/tiny_vae16.safetensors              a 16-channel TAESD for the last two

Only sizes that ComfyUI reads from the weights are small; it fixes all of CLIP-L, and width and context of the first.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from safetensors.torch import save_file


def random_weights(module: torch.nn.Module, prefix: str) -> dict[str, torch.Tensor]:
    """Weights that keep activations bounded: unit norms, no biases, the rest scaled by fan-in."""
    generator, out = torch.Generator().manual_seed(0), {}
    for name, p in module.state_dict().items():
        if name.endswith("position_ids"):
            continue
        if p.ndim == 0:
            tensor = p.detach().clone()
        elif p.ndim == 1:
            tensor = torch.zeros(p.shape) if name.endswith("bias") else torch.ones(p.shape)
        else:
            scale = 0.02 if "embedding" in name else p[0].numel() ** -0.5
            tensor = torch.randn(p.shape, generator=generator) * scale
        out[prefix + name] = tensor.to(torch.float16).contiguous()
    return out


def stable_diffusion() -> dict[str, torch.Tensor]:
    """A checkpoint that CheckpointLoaderSimple takes for Stable Diffusion 1.5."""
    import comfy.sd1_clip
    from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel
    from comfy.ops import disable_weight_init
    from comfy.taesd.taesd import TAESD

    unet = UNetModel(
        image_size=32,
        in_channels=4,
        out_channels=4,
        model_channels=320,
        channel_mult=[1, 1],
        num_res_blocks=[1, 1],
        transformer_depth=[1, 1],
        transformer_depth_output=[1, 1, 1, 1],
        transformer_depth_middle=1,
        context_dim=768,
        num_heads=8,
        use_spatial_transformer=True,
        use_linear_in_transformer=False,
        legacy=False,
        operations=disable_weight_init,
    )
    clip = comfy.sd1_clip.SD1ClipModel(device="cpu", dtype=torch.float32).clip_l.transformer.text_model
    return {
        **random_weights(unet, "model.diffusion_model."),
        **random_weights(clip, "cond_stage_model.transformer.text_model."),
        **random_weights(TAESD(latent_channels=4), "first_stage_model."),
    }


def flux() -> dict[str, torch.Tensor]:
    """A diffusion model that UNETLoader takes for Flux."""
    from comfy.ldm.flux.model import Flux
    from comfy.ops import disable_weight_init

    model = Flux(
        image_model="flux",
        in_channels=16,
        out_channels=16,
        patch_size=2,
        vec_in_dim=768,
        context_in_dim=768,
        hidden_size=128,
        mlp_ratio=4.0,
        num_heads=1,
        depth=1,
        depth_single_blocks=1,
        axes_dim=[16, 56, 56],
        theta=10000,
        qkv_bias=True,
        guidance_embed=True,
        txt_ids_dims=[],
        operations=disable_weight_init,
    )
    return random_weights(model, "")


def stable_diffusion_3() -> dict[str, torch.Tensor]:
    """A diffusion model that UNETLoader takes for Stable Diffusion 3."""
    from comfy.ldm.modules.diffusionmodules.mmdit import MMDiT
    from comfy.ops import disable_weight_init

    model = MMDiT(
        input_size=None,
        patch_size=2,
        in_channels=16,
        out_channels=16,
        depth=2,
        adm_in_channels=768,
        num_patches=1024,
        pos_embed_max_size=32,
        pos_embed_scaling_factor=None,
        context_embedder_config={
            "target": "torch.nn.Linear",
            "params": {"in_features": 768, "out_features": 128},
        },
        operations=disable_weight_init,
    )
    return random_weights(model, "")


def write(models: Path) -> None:
    """Write all files; ComfyUI must be importable."""
    from comfy.taesd.taesd import TAESD

    files = {
        "checkpoints/tiny_sd15": stable_diffusion,
        "diffusion_models/tiny_flux": flux,
        "diffusion_models/tiny_sd3": stable_diffusion_3,
        "vae/tiny_vae16": lambda: random_weights(TAESD(latent_channels=16), ""),
    }
    for name, make in files.items():
        path = models / f"{name}.safetensors"
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(make(), path)


def main() -> None:
    comfyui, models = sys.argv[1:3]
    sys.argv = sys.argv[:1]
    sys.path.insert(0, comfyui)
    import comfy.cli_args

    comfy.cli_args.args.cpu = True
    write(Path(models))


if __name__ == "__main__":
    main()
