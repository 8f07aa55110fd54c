"""The world the zoo models draw: one or two flat objects on a coloured ground, rendered exactly, with ground truth.

A scene is nine small integers (see `ATTRIBUTES`) plus continuous draws (position, radius, tint, texture phase). Every
scene depends only on `(seed, index)`, so any slice of a data set can be made anywhere, on the fly, and nothing has to
be downloaded.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from ..registry import unknown


SIZE = 64
SIZES = ["small", "large"]
TEXTURES = ["plain", "striped", "checkered"]
COLOURS = {
    "red": (220, 40, 40),
    "green": (40, 160, 60),
    "blue": (45, 80, 215),
    "yellow": (245, 215, 50),
    "purple": (145, 60, 180),
    "orange": (240, 130, 30),
    "white": (240, 240, 240),
    "black": (25, 25, 25),
}
PLACES = ["in the center", "on the left", "on the right", "at the top", "at the bottom"]
RELATIONS = ["left of", "right of", "above", "below"]


def _circle(x: torch.Tensor, y: torch.Tensor, r: torch.Tensor) -> torch.Tensor:
    return torch.hypot(x, y) - r


def _square(x: torch.Tensor, y: torch.Tensor, r: torch.Tensor) -> torch.Tensor:
    return torch.maximum(x.abs(), y.abs()) - 0.87 * r


def _triangle(x: torch.Tensor, y: torch.Tensor, r: torch.Tensor) -> torch.Tensor:
    half = 0.575 * r
    y = y - 0.17 * r
    return torch.maximum(y, math.sqrt(0.75) * x.abs() - 0.5 * y) - half


def _star(x: torch.Tensor, y: torch.Tensor, r: torch.Tensor) -> torch.Tensor:
    # Fold the angle into a tenth of the star; what is left is the distance to one edge, from tip to notch.
    tenth = math.pi / 5
    angle = (torch.remainder(torch.atan2(x, -y) + tenth, 2 * tenth) - tenth).abs()
    rho, tip = torch.hypot(x, y), 1.15 * r
    edge_x, edge_y = tip * (0.45 * math.cos(tenth) - 1), tip * 0.45 * math.sin(tenth)
    px, py = rho * torch.cos(angle) - tip, rho * torch.sin(angle)
    return (px * edge_y - py * edge_x) / torch.hypot(edge_x, edge_y)


def _cross(x: torch.Tensor, y: torch.Tensor, r: torch.Tensor) -> torch.Tensor:
    upright = torch.maximum(x.abs() - 0.33 * r, y.abs() - r)
    lying = torch.maximum(x.abs() - r, y.abs() - 0.33 * r)
    return torch.minimum(upright, lying)


def _ring(x: torch.Tensor, y: torch.Tensor, r: torch.Tensor) -> torch.Tensor:
    return (torch.hypot(x, y) - 0.75 * r).abs() - 0.25 * r


# Signed distance in pixels, negative inside, of a shape of radius r around the origin (y points down).
SHAPES: dict[str, Callable] = {
    "circle": _circle,
    "square": _square,
    "triangle": _triangle,
    "star": _star,
    "cross": _cross,
    "ring": _ring,
}
# Attribute -> number of classes, in the order of a spec. `layout` is a place (0-4), a pair side by side (5) or a pair
# one above the other (6); object 1 is the only, left or upper one; the last class of object 2 means "absent".
ATTRIBUTES = {
    "ground": len(COLOURS),
    "texture": len(TEXTURES),
    "layout": len(PLACES) + 2,
    "shape1": len(SHAPES),
    "colour1": len(COLOURS),
    "size1": len(SIZES),
    "shape2": len(SHAPES) + 1,
    "colour2": len(COLOURS) + 1,
    "size2": len(SIZES) + 1,
}
ROW, COLUMN = len(PLACES), len(PLACES) + 1
OPTIONAL = ("size1", "size2", "place", "background")
_ABSENT = [len(SHAPES), len(COLOURS), len(SIZES)]

# Per layout: centre (x, y) of object 1 and 2 and the half range of their jitter. The ranges keep objects apart and
# inside the picture.
_CENTRES = torch.tensor(
    [
        [[32.0, 32.0], [20.0, 32.0], [44.0, 32.0], [32.0, 20.0], [32.0, 44.0], [16.5, 32.0], [32.0, 16.5]],
        [[32.0, 32.0], [32.0, 32.0], [32.0, 32.0], [32.0, 32.0], [32.0, 32.0], [47.5, 32.0], [32.0, 47.5]],
    ]
)
_JITTER = torch.tensor([[3.0, 3.0], [1.5, 4.0], [1.5, 4.0], [4.0, 1.5], [4.0, 1.5], [1.0, 5.0], [5.0, 1.0]])
# Radius range [alone / in a pair][small / large].
_RADII = torch.tensor([[[9.0, 10.5], [13.5, 15.5]], [[8.5, 10.0], [11.5, 13.0]]])
_PALETTE = torch.tensor([*COLOURS.values(), (0, 0, 0)]) / 255
_TINT = 0.04

_SPEC_DRAWS, _KEEP_DRAWS, _OBJECT_DRAWS = 12, len(OPTIONAL), 6
_DRAWS = _SPEC_DRAWS + _KEEP_DRAWS + 5 + 2 * _OBJECT_DRAWS


@dataclass(frozen=True)
class Scenes:
    """A batch of scenes with everything known about them.

    Attributes:
        specs: `[n, 9]` int64, one column per entry of `ATTRIBUTES`.
        captions: `n` strings.
        images: `[n, 3, 64, 64]` float32 in [-1, 1].
        masks: `[n, 2, 64, 64]` float32 in [0, 1], anti-aliased coverage of object 1 and 2 (0 where absent).
    """

    specs: torch.Tensor
    captions: list[str]
    images: torch.Tensor
    masks: torch.Tensor

    def __len__(self) -> int:
        return len(self.captions)

    @property
    def depth(self) -> torch.Tensor:
        """`[n, 1, 64, 64]` nearness: ground 0, small objects 0.5, large objects 1."""
        nearness = torch.tensor([0.5, 1.0, 0.0])[self.specs[:, [5, 8]]]
        return (self.masks * nearness[:, :, None, None]).sum(1, keepdim=True)

    @property
    def boxes(self) -> torch.Tensor:
        """`[n, 2, 4]` boxes (left, top, right, bottom) in pixels around the masks; NaN where an object is absent."""
        inside = self.masks > 0.5
        spans = []
        for along in (inside.any(2), inside.any(3)):
            first = along.int().argmax(-1)
            last = SIZE - along.int().flip(-1).argmax(-1)
            spans += [first, last]
        boxes = torch.stack([spans[0], spans[2], spans[1], spans[3]], -1).float()
        return boxes.masked_fill(~inside.any((2, 3))[..., None], math.nan)

    def attributes(self, index: int) -> dict[str, str]:
        """The words behind one spec, e.g. `{"ground": "blue", "texture": "plain", ...}`; `"none"` where absent."""
        words = {
            "ground": list(COLOURS),
            "texture": TEXTURES,
            "layout": [*PLACES, "row", "column"],
            "shape": [*SHAPES, "none"],
            "colour": [*COLOURS, "none"],
            "size": [*SIZES, "none"],
        }
        return {name: words[name.rstrip("12")][value] for name, value in zip(ATTRIBUTES, self.specs[index].tolist())}


def scenes(n: int, seed: int, start: int = 0, drop: float = 0.0) -> Scenes:
    """Draw scenes `start .. start + n - 1` of the endless sequence that `seed` names.

    Args:
        n: Number of scenes, at least 1.
        seed: Names the sequence. Seed 1 trained the shipped models, 999 is held out (see `held_out`).
        start: Index of the first scene.
        drop: Probability, in [0, 1], with which each optional phrase of a caption (see `OPTIONAL`) is left out.

    Returns:
        `Scenes`. Scene `i` is the same whatever slice it is drawn in.

    Example:
        >>> from diffusers_ext.zoo import world
        >>> world.scenes(1, seed=999).captions
        ['a small yellow ring above a small purple square, plain orange background']
    """
    specs, captions, draws = _sentences(n, seed, start, drop)
    parts = [render(s, d) for s, d in zip(specs.split(512), draws.split(512))]
    return Scenes(specs, captions, torch.cat([p[0] for p in parts]), torch.cat([p[1] for p in parts]))


def sentences(n: int, seed: int, start: int = 0, drop: float = 0.0) -> tuple[torch.Tensor, list[str]]:
    """Specs `[n, 9]` and captions of the scenes that `scenes` would return, without drawing them."""
    return _sentences(n, seed, start, drop)[:2]


def held_out(n: int, start: int = 0) -> Scenes:
    """Scenes with full captions that no shipped model was trained on (seed 999).

    Example:
        >>> from diffusers_ext import zoo
        >>> zoo.held_out(8).images.shape
        torch.Size([8, 3, 64, 64])
    """
    return scenes(n, 999, start)


def _sentences(n: int, seed: int, start: int, drop: float) -> tuple[torch.Tensor, list[str], torch.Tensor]:
    """Specs, captions, and the draws left for `render`; one row of uniform numbers settles all of a scene."""
    if n < 1 or start < 0 or not 0 <= drop <= 1:
        raise ValueError(f"scenes need n >= 1, start >= 0 and 0 <= drop <= 1; got n={n}, start={start}, drop={drop}")
    draws = torch.rand(start + n, _DRAWS, generator=torch.Generator().manual_seed(seed))[start:]
    widths = [_SPEC_DRAWS, _KEEP_DRAWS, _DRAWS - _SPEC_DRAWS - _KEEP_DRAWS]
    spec_draws, keep_draws, render_draws = draws.split(widths, 1)
    specs, swapped = _specs(spec_draws)
    captions = [
        caption(spec, swap, [name for name, u in zip(OPTIONAL, row) if u >= drop])
        for spec, swap, row in zip(specs.tolist(), swapped.tolist(), keep_draws.tolist())
    ]
    return specs, captions, render_draws


def _specs(u: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Uniform draws `[n, 12]` -> specs `[n, 9]` and whether the caption names object 2 first."""

    def pick(column: int, classes: int) -> torch.Tensor:
        return (u[:, column] * classes).long().clamp(max=classes - 1)

    ground, pair = pick(0, 8), pick(1, 2) == 1
    texture = torch.tensor([0, 0, 1, 2])[pick(2, 4)]
    layout = torch.where(pair, ROW + pick(3, 2), pick(4, 5))
    # An object never has the colour of the ground: step 1 to 7 colours on from it.
    first = [pick(5, 6), (ground + 1 + pick(6, 7)) % 8, pick(7, 2)]
    second = [pick(8, 6), (ground + 1 + pick(9, 7)) % 8, pick(10, 2)]
    second = [torch.where(pair, value, absent) for value, absent in zip(second, _ABSENT)]
    return torch.stack([ground, texture, layout, *first, *second], 1), pick(11, 2) == 1


def _ground(specs: torch.Tensor, tint: Callable, phase: torch.Tensor, xs: torch.Tensor, ys: torch.Tensor):
    """Plain, striped or checkered pictures `[n, 3, S, S]` in [0, 1]; stripes and cells are 8 pixels wide."""
    base = tint(specs[:, 0])
    phase_x, phase_y = phase.mul(16)[..., None, None].unbind(1)

    def wave(position: torch.Tensor) -> torch.Tensor:
        """Square wave of period 16 with edges one pixel wide."""
        return (4.5 - (torch.remainder(position, 16) - 8).abs()).clamp(0, 1)

    across, down = wave(xs + phase_x), wave(ys + phase_y)
    stripes = wave((xs + ys) * math.sqrt(2) + phase_x)
    checks = across * (1 - down) + down * (1 - across)
    texture = specs[:, 1].view(-1, 1, 1)
    amount = torch.where(texture == 1, stripes, torch.where(texture == 2, checks, 0.0))[:, None]
    return torch.lerp(base, base * 0.6 + 0.2, amount)


def _coverage(specs: torch.Tensor, which: int, u: torch.Tensor, xs: torch.Tensor, ys: torch.Tensor) -> torch.Tensor:
    """Anti-aliased coverage `[n, S, S]` of object `which` (0 or 1), placed by draws `u [n, 3]`."""
    layout, shape, size = specs[:, 2], specs[:, 3 + 3 * which], specs[:, 5 + 3 * which]
    low, high = _RADII[(layout >= ROW).long(), size.clamp(max=1)].unbind(1)
    radius = torch.lerp(low, high, u[:, 0]).view(-1, 1, 1)
    centre = _CENTRES[which, layout] + (2 * u[:, 1:3] - 1) * _JITTER[layout]
    x, y = xs - centre[:, 0].view(-1, 1, 1), ys - centre[:, 1].view(-1, 1, 1)
    distance = torch.full_like(x, math.inf)
    for index, signed_distance in enumerate(SHAPES.values()):
        chosen = shape == index
        if chosen.any():
            distance[chosen] = signed_distance(x[chosen], y[chosen], radius[chosen])
    return (0.5 - distance).clamp(0, 1)


def reach(specs: torch.Tensor) -> torch.Tensor:
    """`[n, 2, 4]` boxes (left, top, right, bottom) that hold objects 1 and 2 in any scene; NaN if absent.

    They depend on what a caption says only, so a loss may be weighted with them without a bias.
    """
    pair, layout = specs[:, 2] >= ROW, specs[:, 2]
    size = specs[:, [5, 8]]
    radius = _RADII[pair.long()[:, None], size.clamp(max=1), 1][..., None] * 1.15
    centre, span = _CENTRES[:, layout].transpose(0, 1), _JITTER[layout][:, None] + radius
    boxes = torch.cat([centre - span, centre + span], -1)
    return boxes.masked_fill((size == _ABSENT[2])[..., None], math.nan)


def render(specs: torch.Tensor, draws: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Pictures and object masks of given specs.

    Args:
        specs: `[n, 9]` int64, see `ATTRIBUTES`.
        draws: `[n, 17]` uniform numbers in [0, 1): tint of the ground (3), phase of the texture (2), then per object
            radius, position (2) and tint (3).

    Returns:
        Images `[n, 3, 64, 64]` in [-1, 1] and masks `[n, 2, 64, 64]` in [0, 1].
    """
    ground, phase, *objects = draws.split([3, 2, _OBJECT_DRAWS, _OBJECT_DRAWS], 1)
    at = torch.arange(SIZE) + 0.5
    ys, xs = torch.meshgrid(at, at, indexing="ij")

    def tinted(colour: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
        return (_PALETTE[colour] + (2 * u - 1) * _TINT).clamp(0, 1)[:, :, None, None]

    image = _ground(specs, lambda colour: tinted(colour, ground), phase, xs, ys)
    masks = []
    for which, u in enumerate(objects):
        mask = _coverage(specs, which, u, xs, ys)[:, None]
        image = torch.lerp(image, tinted(specs[:, 4 + 3 * which], u[:, 3:]), mask)
        masks.append(mask)
    return image * 2 - 1, torch.cat(masks, 1)


def caption(spec: Sequence[int], swapped: bool = False, keep: Sequence[str] = OPTIONAL) -> str:
    """The sentence for one spec, such as "a small red circle left of a large green square, striped blue background".

    Args:
        spec: Nine integers, see `ATTRIBUTES`.
        swapped: Name object 2 first (only pairs): "b right of a" instead of "a left of b".
        keep: Which optional phrases (see `OPTIONAL`) to say.
    """
    ground, texture, layout, *objects = (int(v) for v in spec)
    colours, shapes = list(COLOURS), list(SHAPES)

    def noun(which: int) -> str:
        shape, colour, size = objects[3 * which : 3 * which + 3]
        prefix = f"{SIZES[size]} " if f"size{which + 1}" in keep else ""
        return f"a {prefix}{colours[colour]} {shapes[shape]}"

    if layout < ROW:
        text = noun(0) + (f" {PLACES[layout]}" if "place" in keep else "")
    else:
        relation = RELATIONS[2 * (layout - ROW) + int(swapped)]
        text = f"{noun(1)} {relation} {noun(0)}" if swapped else f"{noun(0)} {relation} {noun(1)}"
    return text + (f", {TEXTURES[texture]} {colours[ground]} background" if "background" in keep else "")


def _one_of(words: Sequence[str], name: str, optional: bool = False) -> str:
    return rf"(?:(?P<{name}>{'|'.join(words)}) ){'?' if optional else ''}"


def _noun_pattern(which: int) -> str:
    size, colour = _one_of(SIZES, f"size{which}", optional=True), _one_of(COLOURS, f"colour{which}")
    return rf"a {size}{colour}(?P<shape{which}>{'|'.join(SHAPES)})"


_CAPTION = re.compile(
    rf"{_noun_pattern(1)}(?: (?P<place>{'|'.join(PLACES)})| {_one_of(RELATIONS, 'relation')}{_noun_pattern(2)})?"
    rf"(?:, {_one_of(TEXTURES, 'texture')}{_one_of(COLOURS, 'ground')}background)?"
)


def parse(text: str) -> list[int]:
    """The spec of a caption, the inverse of `caption`; -1 for what it leaves open.

    Raises:
        ValueError: The text is not a sentence of this world (names the first unknown word, if there is one).
    """
    match = _CAPTION.fullmatch(text.strip())
    if match is None:
        strange = [w for w in re.findall(r"\w+", text) if w not in words()]
        hint = unknown("word", strange[0], words()) if strange else "Every word is known, but not in this order."
        raise ValueError(
            f"not a caption of this world: {text!r}. {hint}. Form: {caption([2, 1, 5, 0, 0, 0, 1, 1, 1])!r}"
        )
    said = match.groupdict()

    def index(name: str, known: Sequence[str]) -> int:
        return -1 if said[name] is None else list(known).index(said[name])

    objects = [[index(f"shape{k}", SHAPES), index(f"colour{k}", COLOURS), index(f"size{k}", SIZES)] for k in (1, 2)]
    relation = index("relation", RELATIONS)
    if relation < 0:
        objects[1], layout = list(_ABSENT), index("place", PLACES)
    else:
        layout = ROW + relation // 2
        objects = objects[::-1] if relation % 2 else objects
    return [index("ground", COLOURS), index("texture", TEXTURES), layout, *objects[0], *objects[1]]


def words() -> list[str]:
    """Every word a caption can hold, sorted."""
    phrases = [*SHAPES, *COLOURS, *SIZES, *TEXTURES, *PLACES, *RELATIONS, "a", "background"]
    return sorted(set(" ".join(phrases).split()))
