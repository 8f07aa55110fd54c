#!/usr/bin/env python3
"""Train one concept for shapes-unet by Orthogonal Adaptation: its trigger word, then its LoRA.

    python examples/train_adapters/orthogonal_adaptation.py zib --work concepts
    python examples/train_adapters/orthogonal_adaptation.py mog --work concepts
    python examples/train_adapters/orthogonal_adaptation.py mog --work concepts --plain

Every concept is trained by itself and knows nothing of the others but the number of its slot. `--plain` trains an
ordinary LoRA on the same pictures with the same trigger, for comparison. A run that was stopped goes on when started
again.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from diffusers import StableDiffusionPipeline
from torch import nn

from diffusers_ext import OrthogonalLoraAdapter, zoo
from diffusers_ext.adapters.orthogonal_adaptation import directions
from diffusers_ext.training.denoising import task_of
from diffusers_ext.training.fitting import Budget, Draws, begin, fit, script_parser, write_tensors
from diffusers_ext.training.shapes import TRAIN_SEED, ShapesSet, denoising_loss, encode_images, encode_text
from diffusers_ext.zoo.concepts import CONCEPTS, concept_scenes, trigger


BASE = "shapes-unet"
LAYERS = ("attn2.to_k", "attn2.to_v")
# One direction holds the text state of a word. With more, the states of the words after it find room there too.
RANK = 1
BUDGET = Budget(steps=300, batch=12, lr=1e-2)
# Whose is which direction. In some of them, ordinary words have much of their text states (2 is one, 6 and 8 are the
# opposite): a concept there would act on captions that do not name it.
SLOTS = {"zib": 0, "mog": 1, "kelv": 6, "dax": 8}
CAPTION_DROP = 0.15
# Weight of the squared size of the updates, relative to that of the layers: what the word can do is left to the word.
# The ring takes a larger update: with 0.3 every fourth was red, as orange and red are close.
PENALTY = {"zib": 0.3, "mog": 0.3, "kelv": 0.1, "dax": 0.3}


def states(pipe, captions: list[str], token_id: int, embedding: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Text states `[n, tokens, width]` with this embedding for one token, and where that token is `[n, tokens]`."""
    length = pipe.tokenizer.model_max_length
    ids = pipe.tokenizer(captions, padding="max_length", max_length=length, return_tensors="pt").input_ids
    table, here = pipe.text_encoder.get_input_embeddings(), ids == token_id
    hook = table.register_forward_hook(lambda m, args, output: torch.where(here[..., None], embedding, output))
    try:
        return pipe.text_encoder(ids)[0], here
    finally:
        hook.remove()


def own_embedding(
    pipe, captions: list[str], token_id: int, columns: torch.Tensor, steps: int = 250, tries: int = 2
) -> torch.Tensor:
    """An embedding whose text state lies in the concept's directions wherever the token stands.

    The method supposes that what a concept is trained on lies in its own directions. Nothing makes the state
    of a word do so in a text encoder this small, so the word is chosen before anything is trained on pictures.
    """
    best, found = -1.0, None
    for seed in range(tries):
        draws = torch.randn(len(columns), generator=torch.Generator().manual_seed(seed))
        embedding = nn.Parameter(0.035 * draws)
        optimizer = torch.optim.Adam([embedding], lr=0.3)
        decay = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.01, steps)
        for _ in range(steps):
            out, here = states(pipe, captions, token_id, embedding)
            share = (out[here] @ columns).square().sum(1) / out[here].square().sum(1)
            (-share.mean()).backward()
            optimizer.step()
            optimizer.zero_grad()
            decay.step()
        if share.mean().item() > best:
            best, found = share.mean().item(), embedding.detach()[None]
    print(f"{best:.0%} of the word's state lies in its own directions")
    return found


def learn_word(pipe, name: str, work: Path) -> None:
    """Load the trigger's embedding into the pipeline, made and written first if there is none yet."""
    path, token = work / f"trigger-{name}-{BASE}.safetensors", trigger(name)
    if not path.exists():
        draft = zoo.load(BASE)
        draft.text_encoder.requires_grad_(False)
        width = draft.text_encoder.config.hidden_size
        draft.load_textual_inversion({token: torch.zeros(1, width)})
        columns = directions(width, RANK, SLOTS[name]).float()
        captions = concept_scenes(name, 20, TRAIN_SEED).captions
        found = own_embedding(draft, captions, draft.tokenizer.convert_tokens_to_ids(token), columns)
        write_tensors(path, {token: found})
    pipe.load_textual_inversion(path)


def fresh(pipe, name: str, plain: bool) -> OrthogonalLoraAdapter:
    """A LoRA in the concept's slot; a plain one has random directions, as peft draws them, and trains them too."""
    adapter = OrthogonalLoraAdapter.for_model(pipe, LAYERS, rank=RANK, concept=SLOTS[name], trigger=trigger(name))
    for key, weight in adapter.named_parameters():
        if plain and key.endswith("lora_A.weight"):
            nn.init.kaiming_uniform_(weight.requires_grad_(True), a=5**0.5)
    return adapter


def size_of(adapter: OrthogonalLoraAdapter, unet: nn.Module) -> torch.Tensor:
    """Mean over the layers of ||Delta||^2 / ||W||^2."""
    weights = dict(adapter.named_parameters())
    sizes = []
    for name in adapter.config.layers:
        update = weights[f"{name}.lora_B.weight"] @ weights[f"{name}.lora_A.weight"]
        sizes.append(update.square().sum() / unet.get_submodule(name.removeprefix("unet.")).weight.square().sum())
    return torch.stack(sizes).mean()


def data_of(pipe, name: str, images: int) -> ShapesSet:
    """As many scenes of the concept as ordinary ones, which keep the model as it was where the trigger is not said."""
    mine, usual = (
        concept_scenes(name, images // 2, TRAIN_SEED, CAPTION_DROP),
        zoo.scenes(images // 2, TRAIN_SEED, drop=CAPTION_DROP),
    )
    both = zoo.Scenes(
        torch.cat([mine.specs, usual.specs]),
        [*mine.captions, *usual.captions],
        torch.cat([mine.images, usual.images]),
        torch.cat([mine.masks, usual.masks]),
    )
    return ShapesSet(both, encode_images(pipe, both.images), encode_text(pipe, ["", *both.captions]))


def train(name: str, work: Path, budget: Budget, images: int, plain: bool) -> Path:
    """Train a concept and write its file."""
    pipe = zoo.load(BASE)
    pipe.unet.requires_grad_(False)
    learn_word(pipe, name, work)
    data, task, adapter = data_of(pipe, name, images), task_of(pipe), fresh(pipe, name, plain)
    adapter.attach(pipe.unet)

    def loss(rows: torch.Tensor, draws: Draws) -> torch.Tensor:
        return denoising_loss(task, pipe.unet, data, rows, draws) + PENALTY[name] * size_of(adapter, pipe.unet)

    kind = "plain-lora" if plain else "orthogonal-adaptation"
    fit(f"{kind}-{name}", adapter, loss, len(data), budget, work)
    adapter.detach()
    path = work / f"{kind}-{name}-{BASE}.safetensors"
    if not plain:
        return adapter.save_file(path)
    layers = {key.removeprefix("unet."): value for key, value in adapter.state_dict().items()}
    StableDiffusionPipeline.save_lora_weights(work, unet_lora_layers=layers, weight_name=path.name)
    return path


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = script_parser(__doc__, "orthogonal_work", 1000)
    parser.add_argument("concept", choices=list(CONCEPTS))
    parser.add_argument("--plain", action="store_true", help="train an ordinary LoRA for comparison")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    """Entry point of the command line."""
    options = _arguments(argv)
    budget = begin(BUDGET, options)
    torch.manual_seed(budget.seed + SLOTS[options.concept])
    print("wrote", train(options.concept, options.work, budget, options.images, options.plain))


if __name__ == "__main__":
    main()
