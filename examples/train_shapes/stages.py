"""The stages of the recipe, each from files in the working folder to files in the working folder."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import networks
import objectives
import torch
import torch.nn.functional as F
from accelerate import PartialState
from objectives import Cache, CaptionReader, Teacher, to_float
from torch import nn
from tqdm import tqdm

from diffusers_ext import zoo
from diffusers_ext.training.denoising import FluxTask, UNetTask
from diffusers_ext.training.fitting import Budget, fit, read_tensors, write_tensors
from diffusers_ext.zoo import world


TRAIN_SEED, TEXT_SEED = 1, 7
CAPTION_DROP = 0.15


def data(work: Path, images: int) -> None:
    """Draw the training set: `data.safetensors` (8-bit pictures and masks, specs) and `captions.json`."""
    pictures, specs, coverage, captions = [], [], [], []
    for start in tqdm(range(0, images, 512), desc="data"):
        part = zoo.scenes(min(512, images - start), TRAIN_SEED, start, CAPTION_DROP)
        pictures.append(((part.images + 1) * 127.5).round().byte())
        specs.append(part.specs)
        coverage.append((F.avg_pool2d(part.masks, 2) * 255).round().byte())
        captions += part.captions
    write_json(work / "captions.json", captions)
    tensors = {"images": torch.cat(pictures), "specs": torch.cat(specs), "coverage": torch.cat(coverage)}
    write_tensors(work / "data.safetensors", tensors)


def write_json(path: Path, value: object) -> None:
    """Write JSON in one move."""
    fresh = path.with_suffix(".part")
    fresh.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
    fresh.replace(path)


def _data(work: Path) -> dict[str, torch.Tensor]:
    return _tensors(work, "data")


def _tensors(work: Path, name: str) -> dict[str, torch.Tensor]:
    path = work / f"{name}.safetensors"
    if not path.exists():
        raise FileNotFoundError(f"{path} is missing: run the stage that makes it first (see --help)")
    return read_tensors(path)[0]


def _started(model: nn.Module, init: Path | None) -> nn.Module:
    """The model as built, or with the weights of a safetensors file."""
    if init is not None:
        from safetensors.torch import load_file

        model.load_state_dict({name: value.float() for name, value in load_file(init).items()})
    return model


def judge(work: Path, budget: Budget, init: Path | None) -> None:
    """Train the judge: `judge.safetensors`."""
    drawn, model = _data(work), _started(zoo.Judge(), init)
    loss = objectives.judge_loss(model, drawn["images"], drawn["specs"])
    model = fit("judge", model, loss, len(drawn["specs"]), budget, work)
    real = zoo.held_out(1000)
    print("judge on 1000 held-out pictures:", model.accuracy(real.images, real.specs))


def _encode(tokenizer, captions: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
    batch = tokenizer(captions, padding="max_length", max_length=networks.PROMPT_TOKENS, truncation=True)
    return torch.tensor(batch["input_ids"]), torch.tensor(batch["attention_mask"]).sum(1)


def text(work: Path, budget: Budget, init: Path | None, kind: str) -> None:
    """Train a text encoder, `kind` "clip" or "t5": a transformers folder `kind/` and its `kind.safetensors`."""
    tokenizer = networks.clip_tokenizer() if kind == "clip" else networks.t5_tokenizer()
    encoder = networks.clip_text(tokenizer) if kind == "clip" else networks.t5_text(tokenizer)
    specs, captions = world.sentences(40_000, TEXT_SEED, drop=0.05)
    ids, lengths = _encode(tokenizer, captions)
    reader = CaptionReader(_started(encoder, init))
    reader = fit(kind, reader, objectives.text_loss(reader, ids, lengths, specs), len(ids), budget, work)
    specs, captions = world.sentences(2000, 999)
    with torch.no_grad():
        logits, _ = reader(*_encode(tokenizer, captions))
    right = torch.stack([l.argmax(1) for l in logits], 1).eq(specs).all(1)
    print(f"{kind}: {right.float().mean():.2%} of 2000 held-out captions read without an error")
    if PartialState().is_main_process:
        reader.encoder.save_pretrained(work / kind)
        tokenizer.save_pretrained(work / kind)


def vae(work: Path, budget: Budget, init: Path | None) -> None:
    """Train the autoencoder: `vae.safetensors`."""
    drawn = _data(work)
    model = _started(networks.vae(), init).to(memory_format=torch.channels_last)
    model.quant_conv.requires_grad_(False)  # its other half only rotates latents, which the encoder can do itself
    model = fit(
        "vae", model, objectives.vae_loss(model, drawn["images"], drawn["specs"]), len(drawn["specs"]), budget, work
    )
    from report import round_trip

    print("VAE round trip:", round_trip(model, 500))


@torch.no_grad()
def cache(work: Path) -> None:
    """Encode the training set once: `cache.safetensors` with latents of unit variance and the text states."""
    model = networks.vae()
    model.load_state_dict(_tensors(work, "vae"))
    model.eval().to(memory_format=torch.channels_last)
    drawn = _data(work)
    latents = torch.cat(
        [model.encode(to_float(x)).latent_dist.mean for x in tqdm(drawn["images"].split(64), desc="latents")]
    )
    scale = 1 / latents.std().item()
    states = _text_states(work, ["", *json.loads((work / "captions.json").read_text(encoding="utf-8"))])
    tensors = {"latents": (latents * scale).half(), "specs": drawn["specs"], "coverage": drawn["coverage"], **states}
    write_tensors(work / "cache.safetensors", tensors, {"scale": scale})


def _text_states(work: Path, captions: list[str]) -> dict[str, torch.Tensor]:
    clip_tokenizer, clip, t5_tokenizer, t5 = text_models(work)
    states = {"clip": [], "pooled": [], "t5": []}
    for start in tqdm(range(0, len(captions), 512), desc="text"):
        part = captions[start : start + 512]
        output = clip(_encode(clip_tokenizer, part)[0])
        states["clip"].append(output.last_hidden_state.half())
        states["pooled"].append(output.pooler_output.half())
        states["t5"].append(t5(_encode(t5_tokenizer, part)[0])[0].half())
    return {name: torch.cat(parts) for name, parts in states.items()}


def text_models(work: Path) -> tuple:
    """The trained tokenizers and text encoders: CLIP's, then T5's."""
    from transformers import CLIPTextModel, CLIPTokenizer, T5EncoderModel, T5Tokenizer

    clip, t5 = work / "clip", work / "t5"
    return (
        CLIPTokenizer.from_pretrained(clip),
        CLIPTextModel.from_pretrained(clip).float().eval(),
        T5Tokenizer.from_pretrained(t5),
        T5EncoderModel.from_pretrained(t5).float().eval(),
    )


def unet_task(prediction: str) -> UNetTask:
    """Training of a UNet that predicts this.

    Stable Diffusion's schedule never hides the mean of a picture, so an epsilon model would read the ground from what
    is pure noise when it draws: noise with a random mean teaches it to ask the caption. And as a flat ground rests on
    the mean of 256 latents, small errors of the noise grow to a wrong colour: the mean is weighted.
    """
    epsilon = {"mean_weight": 2.0, "noise_offset": 0.1} if prediction == "epsilon" else {}
    return UNetTask(networks.diffusion_scheduler(prediction), **epsilon)


def denoiser(work: Path, budget: Budget, init: Path | None, kind: str, teacher: Path | None) -> None:
    """Train a denoiser, `kind` "unet", "unet-eps" or "dit": `kind.safetensors`.

    `teacher` is the weight file of a trained "unet"; without it the denoiser learns from the data.
    """
    torch.manual_seed(budget.seed)
    task = {"unet": unet_task("v_prediction"), "unet-eps": unet_task("epsilon"), "dit": FluxTask()}[kind]
    model = _started(networks.dit() if kind == "dit" else networks.unet(), init)
    if kind == "dit":
        objectives.add_mask_head(model)
    tensors = _tensors(work, "cache")
    cached = Cache(**{name: tensors[name] for name in Cache.__annotations__})
    guide = None if teacher is None else Teacher(_started(networks.unet(), teacher).to(budget.device))
    loss = objectives.denoising_loss(model, task, cached, guide)
    fit(kind, model, loss, len(cached.latents), budget, work, drop=objectives.MASK_HEAD)


def export(work: Path, kind: str) -> Path:
    """Assemble `work/export/shapes-<kind>`, a float16 diffusers folder with its manifest, and return its path."""
    from diffusers import FluxPipeline, StableDiffusionPipeline

    clip_tokenizer, clip, t5_tokenizer, t5 = text_models(work)
    autoencoder, model = networks.vae(), networks.dit() if kind == "dit" else networks.unet()
    autoencoder.load_state_dict(_tensors(work, "vae"))
    scale = read_tensors(work / "cache.safetensors")[1]["scale"]
    autoencoder.register_to_config(scaling_factor=scale, shift_factor=0.0)
    model.load_state_dict(_tensors(work, kind))
    common = {"vae": autoencoder, "text_encoder": clip, "tokenizer": clip_tokenizer}
    if kind == "dit":
        flux = {"text_encoder_2": t5, "tokenizer_2": t5_tokenizer, "scheduler": networks.flow_scheduler()}
        pipe = FluxPipeline(transformer=model, **common, **flux)
    else:
        scheduler = networks.diffusion_scheduler("epsilon" if kind == "unet-eps" else "v_prediction")
        plain = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
        pipe = StableDiffusionPipeline(unet=model, scheduler=scheduler, **common, **plain)
    folder, fresh = work / "export" / f"shapes-{kind}", work / "export" / f"shapes-{kind}.part"
    shutil.rmtree(fresh, ignore_errors=True)
    pipe.to(torch.float16).save_pretrained(fresh)
    for path in fresh.rglob("*.safetensors"):
        path.chmod(0o644)
    zoo.write_manifest(fresh)
    shutil.rmtree(folder, ignore_errors=True)
    fresh.rename(folder)
    return folder
