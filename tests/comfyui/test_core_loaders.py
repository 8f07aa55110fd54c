"""Core's own loaders and samplers on small random models in the public layouts, in process and on the server."""

from __future__ import annotations

import pytest
import torch


def _sample(comfy, encode, pipe, channels: int) -> torch.Tensor:
    model, clip, vae = pipe
    latent = torch.zeros(1, channels, 8, 8)
    sampled = comfy.sample.sample(
        model,
        comfy.sample.prepare_noise(latent, 0),
        2,
        1.0,
        "euler",
        "simple",
        encode(clip, "a cat"),
        encode(clip, ""),
        latent,
        seed=0,
        disable_pbar=True,
    )
    return vae.decode(sampled)


@pytest.mark.parametrize(("name", "channels"), [("sd15", 4), ("flux", 16), ("sd3", 16)])
@torch.no_grad()
def test_tiny_models_sample(comfy, tiny_pipe, encode, name, channels):
    image = _sample(comfy, encode, tiny_pipe(name), channels)
    assert image.shape == (1, 64, 64, 3)
    assert image.isfinite().all() and image.std() > 0


def _node(class_type: str, **inputs) -> dict:
    return {"class_type": class_type, "inputs": inputs}


def _graph(name: str) -> dict:
    checkpoint = _node("CheckpointLoaderSimple", ckpt_name="tiny_sd15.safetensors")
    graph = {
        "clip": checkpoint,
        "model": _node("UNETLoader", unet_name=f"tiny_{name}.safetensors", weight_dtype="default"),
        "vae": _node("VAELoader", vae_name="tiny_vae16.safetensors"),
        "text": _node("CLIPTextEncode", clip=["clip", 1], text="a cat"),
        "latent": _node("EmptyLatentImage", width=64, height=64, batch_size=1),
        "sample": _node(
            "KSampler",
            model=["model", 0],
            positive=["text", 0],
            negative=["text", 0],
            latent_image=["latent", 0],
            seed=0,
            steps=2,
            cfg=1.0,
            sampler_name="euler",
            scheduler="simple",
            denoise=1.0,
        ),
        "decode": _node("VAEDecode", samples=["sample", 0], vae=["vae", 0]),
        "save": _node("SaveImage", images=["decode", 0], filename_prefix=name),
    }
    if name == "sd15":
        del graph["model"], graph["vae"]
        graph["sample"]["inputs"]["model"], graph["decode"]["inputs"]["vae"] = ["clip", 0], ["clip", 2]
    return graph


@pytest.mark.parametrize("name", ["sd15", "flux", "sd3"])
def test_core_loaders_on_the_server(tiny_models, server, tmp_path, name):
    entry = server.client.run(_graph(name), timeout=120)
    (path,) = server.client.save_outputs(entry, tmp_path)
    assert path.stat().st_size > 0
