"""The small world: what can be in a scene, and what is held out of training.

A scene is 1 to 5 pictograms and sometimes a sign with short text. `renderer.render(seed)` draws it; here stand the
names (classes, tints, backgrounds), the record of a scene, and the random choice of what it contains.

Splits. "train", "val" and "test" have the same distribution. The seed of a scene is mixed with the name of its split
(`generator`), so the splits are disjoint streams of random numbers, whatever seeds are used. 1/16 of the pairs of
classes and 1/9 of the pairs of class and tint, chosen by a hash of their names, appear in "heldout" only, where every
scene has at least one of them. "twemoji" is like "test" in another artist's drawings, which no other split shows.

Two worlds. All of this is world 1. World 2 has the same names, prompts and rules, but six artists, more variety in
everything that is drawn, and degraded pictures (`varied.render_varied`). Its splits are "train", "val", "test",
"heldout", and "emojione" for the artist that is kept for tests. (There, three in a hundred scenes of "heldout" are like
others: what was held out is a tint, and the picture is gray.)

Random numbers come from NumPy's PCG64, so a seed gives the same scene on every machine.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import combinations

import numpy as np

SHIPPED = 2  # the world of the model that ships; commands work in it unless --world says otherwise

CLASSES = (
    "dog", "cat", "horse", "cow", "pig", "sheep", "elephant", "rabbit", "bird", "duck", "owl", "penguin", "fish",
    "whale", "turtle", "snake", "frog", "bee", "butterfly", "snail", "octopus", "crab", "apple", "banana", "orange",
    "pear", "lemon", "grape", "strawberry", "watermelon", "carrot", "corn", "bread", "cheese", "pizza", "hamburger",
    "cake", "donut", "car", "bus", "truck", "bicycle", "airplane", "rocket", "boat", "train", "tractor", "house",
    "tree", "flower", "tulip", "cactus", "mushroom", "star", "moon", "cloud", "heart", "ball", "balloon", "gift",
    "umbrella", "hat", "shirt", "book", "key", "clock", "guitar", "bell", "cup", "chair", "crown", "snowman",
)  # fmt: skip
LABELS = (*CLASSES, "sign")  # everything an object can be called

# The seven tints that make a car "a red car".
TINTS = {
    "red": (222, 32, 38),
    "orange": (250, 136, 12),
    "yellow": (252, 220, 30),
    "green": (46, 168, 62),
    "blue": (36, 104, 228),
    "purple": (132, 52, 186),
    "pink": (252, 128, 192),
}
# Classes with one dominant hue in every style. They always have a tint, so that their colour always has a name.
TINTABLE = (
    "bird", "fish", "butterfly", "car", "bus", "tulip", "star", "heart", "balloon", "gift", "umbrella", "shirt", "book",
    "key", "guitar", "bell", "cup", "chair",
)  # fmt: skip

# Backgrounds: the middle of a colour, and how far its shades may differ from it. No orange: some of its shades could
# also be called brown, yellow or red.
BACKGROUNDS = {
    "white": ((244, 244, 242), (10, 10, 10)),
    "gray": ((146, 146, 148), (24, 24, 24)),
    "black": ((30, 30, 32), (16, 16, 17)),
    "brown": ((122, 78, 44), (24, 17, 11)),
    "red": ((196, 44, 44), (30, 12, 12)),
    "pink": ((245, 172, 204), (10, 22, 18)),
    "yellow": ((240, 218, 96), (14, 16, 34)),
    "green": ((100, 176, 98), (26, 26, 26)),
    "blue": ((88, 142, 222), (28, 28, 20)),
    "purple": ((142, 94, 190), (24, 24, 24)),
}
PATTERNS = ("plain", "graded", "blotched", "striped", "noisy")
STYLES = {  # split -> artwork
    "train": ("noto", "openmoji"),
    "val": ("noto", "openmoji"),
    "test": ("noto", "openmoji"),
    "heldout": ("noto", "openmoji"),
    "twemoji": ("twemoji",),
}
ARTISTS = ("noto", "openmoji", "twemoji", "noto-v1", "fluent", "fluent-flat", "emojione")
VARIED_STYLES = {  # the same for world 2
    **dict.fromkeys(("train", "val", "test", "heldout"), ARTISTS[:6]),
    "emojione": ("emojione",),
}
STYLES_OF_WORLD = {1: STYLES, 2: VARIED_STYLES}

CHARACTERS = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"  # all that signs may say

Box = tuple[float, float, float, float]  # x0, y0, x1, y1 in pixels


@dataclass(frozen=True)
class SceneObject:
    """One object and what is visible of it."""

    label: str  # one of LABELS
    tint: str | None  # one of TINTS by which captions name it; in world 1 all of TINTABLE have one and no others
    box: Box  # exact bounds of the mask: x1 and y1 are the first column and row beyond it
    mask: np.ndarray  # bool [H, W], the visible pixels
    visible: float  # visible share of its own pixels, at least what `render` was asked for
    text: str = ""  # what a sign says
    char_boxes: tuple[Box, ...] = ()  # one per character of `text`
    color: str | None = None  # world 2: its natural colour, if it has no tint but a colour that has a name

    @property
    def center(self) -> tuple[float, float]:
        return (self.box[0] + self.box[2]) / 2, (self.box[1] + self.box[3]) / 2

    @property
    def area(self) -> int:
        """Visible pixels."""
        return int(np.count_nonzero(self.mask))

    @property
    def name(self) -> str:
        """ "red car", "dog"."""
        return f"{self.tint} {self.label}" if self.tint else self.label


@dataclass(frozen=True)
class Scene:
    image: np.ndarray  # uint8 [H, W, 3]
    objects: tuple[SceneObject, ...]  # from left to right by their left edge
    background: str | None  # one of BACKGROUNDS; world 2: None if it has no colour with one name
    pattern: str
    style: str  # of the drawings; world 2: "mixed" for several, "none" where there is only a sign
    seed: int
    split: str
    world: int = 1
    degradations: tuple[tuple[str, float], ...] = ()  # world 2: (name, strength), see degradations.py

    @property
    def size(self) -> int:
        return int(self.image.shape[0])

    @property
    def sign(self) -> SceneObject | None:
        return next((thing for thing in self.objects if thing.label == "sign"), None)


# --- what is held out -----------------------------------------------------------------------------


def _bucket(*names: str) -> int:
    """A number that depends only on the names, so it is the same on every machine and never changes."""
    return int.from_bytes(hashlib.sha256("|".join(names).encode()).digest()[:8], "big")


@cache
def is_held_out_pair(a: str, b: str) -> bool:
    """Whether the two classes never appear together in training: 1 pair of 16, never with a sign."""
    return a != b and "sign" not in (a, b) and _bucket("pair", *sorted((a, b))) % 16 == 1


@cache
def is_held_out_tint(label: str, tint: str | None) -> bool:
    """Whether this class never has this tint in training (1 of 9)."""
    return tint is not None and _bucket("tint", label, tint) % 9 == 1


@cache
def held_out() -> tuple[tuple[tuple[str, str], ...], tuple[tuple[str, str], ...]]:
    """Every held-out pair of classes, and every held-out pair of class and tint."""
    pairs = tuple((a, b) for a, b in combinations(CLASSES, 2) if is_held_out_pair(a, b))
    tints = tuple((label, tint) for label in TINTABLE for tint in TINTS if is_held_out_tint(label, tint))
    return pairs, tints


def has_held_out(things: Sequence[tuple[str, str | None]]) -> bool:
    """Whether a list of (label, tint) contains anything that training never shows."""
    labels = sorted({label for label, _ in things})
    return any(is_held_out_tint(*thing) for thing in things) or any(
        is_held_out_pair(a, b) for a, b in combinations(labels, 2)
    )


# --- what a scene contains ------------------------------------------------------------------------


def generator(seed: int, split: str, world: int = 1) -> np.random.Generator:
    """The random numbers of a scene. The split's name is part of the seed, so splits never share a scene."""
    if world not in STYLES_OF_WORLD:
        raise ValueError(f"unknown world {world!r}; there is: 1, 2")
    if split not in STYLES_OF_WORLD[world]:
        raise ValueError(f"unknown split {split!r}; there is: {', '.join(STYLES_OF_WORLD[world])}")
    if seed < 0:
        raise ValueError(f"seed must be 0 or more, got {seed}")
    stream = _bucket("split", split) if world == 1 else _bucket("world", str(world), "split", split)
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence([stream, int(seed)])))


def sample_things(rng: np.random.Generator, count: int, split: str) -> list[tuple[str, str | None]]:
    """(label, tint) of `count` pictograms, some of them repeated, within what the split may show."""
    colors = tuple(TINTS)

    def tint_of(label: str) -> str | None:
        return colors[rng.integers(len(colors))] if label in TINTABLE else None

    things: list[tuple[str, str | None]] = []
    if split == "heldout":
        pairs, tints = held_out()
        if count > 1 and rng.random() < 0.6:
            for label in pairs[rng.integers(len(pairs))]:
                things.append((label, tint_of(label)))
        else:
            things.append(tints[rng.integers(len(tints))])
    repeating = rng.random() < 0.45  # only scenes with repeated classes make counting worth asking
    while len(things) < count:
        if things and repeating and rng.random() < 0.6:
            label, tint = things[rng.integers(len(things))]
            thing = (label, tint if rng.random() < 0.6 else tint_of(label))
        else:
            # Half of the samples are from the tintable quarter of the classes: colours are learned only from them.
            pool = TINTABLE if rng.random() < 0.3 else CLASSES
            label = pool[rng.integers(len(pool))]
            thing = (label, tint_of(label))
        if split == "heldout" or not has_held_out([*things, thing]):
            things.append(thing)
    return things
