"""A small classifier that reads a picture of the shapes world back into its spec; its features measure distances."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from . import world


_CHANNELS, _FEATURES = (24, 48, 96, 128, 128), 128


class Judge(nn.Module):
    """Reads every attribute of a 64 x 64 picture: ground, texture, layout, and shape, colour, size of both objects.

    `load_judge` gives the trained one. Its features (128 numbers) are what Frechet distances of this world are
    measured on.

    Limits: it names the nearest class, so a wobbly circle still counts as a circle. Look at pictures too.
    """

    def __init__(self):
        super().__init__()
        layers, width = [], 3
        for index, channels in enumerate(_CHANNELS):
            stride = 1 if index == 3 else 2
            layers += [nn.Conv2d(width, channels, 3, stride, 1, bias=False), nn.BatchNorm2d(channels), nn.ReLU()]
            width = channels
        self.conv, self.fc = nn.Sequential(*layers), nn.Linear(width * 16, _FEATURES)
        self.heads = nn.ModuleList(nn.Linear(_FEATURES, classes) for classes in world.ATTRIBUTES.values())

    def forward(self, images: torch.Tensor) -> list[torch.Tensor]:
        """Logits, one tensor `[n, classes]` per entry of `world.ATTRIBUTES`, of images `[n, 3, 64, 64]` in [-1, 1]."""
        hidden = F.relu(self.fc(self.conv(images).flatten(1)))
        return [head(hidden) for head in self.heads]

    @torch.no_grad()
    def features(self, images: torch.Tensor, batch_size: int = 250) -> torch.Tensor:
        """Features `[n, 128]` of images `[n, 3, 64, 64]` in [-1, 1]."""
        _require_images(images)
        return torch.cat([self.fc(self.conv(x).flatten(1)) for x in self._batches(images, batch_size)])

    @torch.no_grad()
    def read(self, images: torch.Tensor, batch_size: int = 250) -> torch.Tensor:
        """The specs `[n, 9]` that the pictures `[n, 3, 64, 64]` in [-1, 1] show."""
        _require_images(images)
        batches = self._batches(images, batch_size)
        return torch.cat([torch.stack([logits.argmax(1) for logits in self(x)], 1) for x in batches])

    def accuracy(self, images: torch.Tensor, specs: torch.Tensor | Sequence[Sequence[int]]) -> dict[str, float]:
        """How often the pictures show what was asked for.

        Args:
            images: `[n, 3, 64, 64]` in [-1, 1]; judged as the 8-bit pictures they would be saved as.
            specs: `[n, 9]` what was asked for, e.g. `Scenes.specs` or `[world.parse(caption)]`. Negative entries are
                open and count as right.

        Returns:
            Share in [0, 1] per attribute, `"relation"` over the pairs (see `relation_right`; NaN without pairs) and
            `"all"`: every attribute of the picture right.

        Example:
            >>> from diffusers_ext import zoo
            >>> scenes = zoo.held_out(64)
            >>> zoo.load_judge().accuracy(scenes.images, scenes.specs)["all"] > 0.95
            True
        """
        specs = torch.as_tensor(specs)
        if specs.shape != (len(images), len(world.ATTRIBUTES)):
            raise ValueError(f"specs have shape {tuple(specs.shape)}; {len(images)} images need ({len(images)}, 9)")
        seen = self.read(((images.clamp(-1, 1) + 1) * 127.5).round() / 127.5 - 1).to(specs.device)
        right = (seen == specs) | (specs < 0)
        scores = dict(zip(world.ATTRIBUTES, right.float().mean(0).tolist()))
        scores["relation"] = relation_right(seen, specs)[specs[:, 2] >= world.ROW].float().mean().item()
        return scores | {"all": right.all(1).float().mean().item()}

    def _batches(self, images: torch.Tensor, batch_size: int):
        weight = self.fc.weight
        return (x.to(weight.device, weight.dtype) for x in images.split(batch_size))


def _require_images(images: torch.Tensor) -> None:
    if images.ndim != 4 or tuple(images.shape[1:]) != (3, world.SIZE, world.SIZE) or not images.is_floating_point():
        raise ValueError(
            f"images are {images.dtype} of shape {tuple(images.shape)}; "
            "the judge reads floats of shape [n, 3, 64, 64] in [-1, 1]"
        )


def relation_right(seen: torch.Tensor, asked: torch.Tensor) -> torch.Tensor:
    """Whether the two objects of a pair stand to each other as asked, `[n]` bool; meaningful for pairs only.

    A spec orders its objects by position (left or upper first). The relation is right when the pair lies in the asked
    direction and the two read objects fit the asked ones in this order at least as well as swapped.
    """
    first, second = seen[:, 3:6], seen[:, 6:9]
    straight = (first == asked[:, 3:6]).sum(1) + (second == asked[:, 6:9]).sum(1)
    swapped = (second == asked[:, 3:6]).sum(1) + (first == asked[:, 6:9]).sum(1)
    return (seen[:, 2] == asked[:, 2]) & (straight >= swapped)


def load_judge(path: str | Path | None = None) -> Judge:
    """A trained judge, ready to read (eval mode, float32).

    Args:
        path: Weights that the training example wrote; without it, those that ship with the package.

    Raises:
        RuntimeError: The file is missing, damaged or not a judge.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    source = Path(__file__).parent / "weights" / "judge.safetensors" if path is None else Path(path)
    judge = Judge()
    try:
        judge.load_state_dict(load_file(source))
    except (OSError, SafetensorError, RuntimeError) as error:
        advice = "reinstall diffusers-ext" if path is None else "train it again"
        raise RuntimeError(f"the judge {source} is missing or damaged ({error}); {advice}") from error
    return judge.eval().requires_grad_(False)
