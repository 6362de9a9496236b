"""The drawings of the pictograms, and how they take a tint.

`sprites/<style>/atlas.png` holds all classes drawn by one artist, `index.json` where each lies. ARTWORK.md says whose
they are and under which licence, `extract_sprites.py` how they were made.
"""

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageFilter, ImageOps

from paligemma.tiny.world import ARTISTS, BACKGROUNDS, TINTS, Box

SPRITES = Path(__file__).with_name("sprites")

# The body of these drawings is white or gray, so the tint replaces pale pixels instead of the dominant hue.
PALE = {
    ("noto", "bus"), ("twemoji", "bus"), ("noto", "cup"), ("openmoji", "cup"), ("twemoji", "cup"), ("noto-v1", "cup"),
    ("fluent", "cup"), ("fluent-flat", "cup"), ("emojione", "cup"), ("emojione", "bell"), ("emojione", "fish"),
}  # fmt: skip
HUES = {  # degrees, where leaves, windows or a ribbon have more pixels than the body
    ("twemoji", "tulip"): 350, ("twemoji", "gift"): 40, ("fluent", "bus"): 38, ("fluent-flat", "bus"): 42,
    ("emojione", "gift"): 190,
}  # fmt: skip

# World 2 shows some drawings in their own colours. These are the ones that have a name beyond doubt.
NATURAL_COLORS = {
    "pig": "pink", "sheep": "white", "elephant": "gray", "whale": "blue", "turtle": "green", "snake": "green",
    "frog": "green", "tree": "green", "cactus": "green", "pear": "green", "apple": "red", "strawberry": "red",
    "banana": "yellow", "lemon": "yellow", "orange": "orange", "carrot": "orange", "corn": "yellow",
    "cheese": "yellow", "grape": "purple", "moon": "yellow", "cloud": "white", "snowman": "white", "crown": "yellow",
    "flower": "yellow", "fish": "blue", "car": "red", "tulip": "pink", "star": "yellow", "heart": "red",
    "balloon": "red", "book": "red",
}  # fmt: skip
# Drawings that differ from that; None where no name is beyond doubt.
_OTHER_COLORS: dict[str, dict[str, str | None]] = {
    "noto": {"umbrella": "blue", "key": "yellow", "bell": "yellow", "bird": "blue"},
    "noto-v1": {
        "pig": None, "elephant": "blue", "orange": None, "grape": None, "car": "blue", "tulip": "orange",
        "heart": "pink", "balloon": "orange", "book": "pink", "star": "orange", "bird": "blue", "umbrella": "blue",
        "key": "yellow", "bell": "yellow", "butterfly": None,
    },
    "openmoji": {"cloud": None, "butterfly": "blue", "shirt": "blue", "bell": "yellow", "tulip": None},
    "twemoji": {
        "cheese": None, "bird": "red", "butterfly": "blue", "umbrella": "purple", "shirt": "blue", "star": "yellow",
    },
    "fluent": {"pear": None, "umbrella": "purple", "shirt": "green", "heart": None, "book": None, "chair": None},
    "fluent-flat": {"umbrella": "purple", "shirt": "green", "book": None},
    "emojione": {
        "pear": None, "turtle": None, "fish": None, "book": "red", "bird": "blue", "shirt": "blue", "heart": None,
    },
}  # fmt: skip


def natural_color(style: str, label: str) -> str | None:
    """What the colour of this drawing is called as it is; None if it has several, or one that is hard to name."""
    return _OTHER_COLORS[style].get(label, NATURAL_COLORS.get(label))


@cache
def _atlas(style: str) -> tuple[Image.Image, dict[str, list[int]]]:
    folder = SPRITES / style
    if not (folder / "index.json").is_file():
        raise ValueError(f"no artwork of style {style!r}; there is: {', '.join(ARTISTS)}")
    with Image.open(folder / "atlas.png") as image:
        atlas = image.convert("RGBA")
    return atlas, json.loads((folder / "index.json").read_text(encoding="utf-8"))["boxes"]


@cache
def classes_of(style: str) -> tuple[str, ...]:
    """The classes that this artist has drawn."""
    return tuple(_atlas(style)[1])


@cache
def sprite(style: str, label: str, tint: str | None = None) -> Image.Image:
    """The drawing of a class: RGBA, tight, longest side 96."""
    atlas, boxes = _atlas(style)
    image = atlas.crop(tuple(boxes[label]))  # type: ignore[arg-type]
    if tint is None:
        return image
    return _tinted(image, TINTS[tint], (style, label) in PALE, HUES.get((style, label)))


def _tinted(image: Image.Image, color: tuple[int, int, int], pale: bool, main_hue: float | None) -> Image.Image:
    """The drawing with its main hue (the dominant one if None), or its pale pixels, painted in `color`.

    Lighter and darker shades stay lighter and darker.
    """
    pixels = np.asarray(image).astype(np.float32)
    rgb, alpha = pixels[..., :3], pixels[..., 3]
    high, low = rgb.max(-1), rgb.min(-1)
    saturation = (high - low) / np.maximum(high, 1)
    if pale:
        weight = np.clip((0.42 - saturation) / 0.1, 0, 1) * np.clip((high - 70) / 50, 0, 1)
    else:
        hue = np.asarray(image.convert("RGB").convert("HSV"))[..., 0].astype(np.float32) * (360 / 255)
        if main_hue is None:
            strong = np.where((alpha > 128) & (high > 50), saturation**2, 0)
            histogram = np.bincount((hue / 10).astype(int).ravel() % 36, strong.ravel(), 36)
            smooth = histogram + 0.6 * (np.roll(histogram, 1) + np.roll(histogram, -1))
            main_hue = float(smooth.argmax() * 10 + 5)
        distance = np.abs((hue - main_hue + 180) % 360 - 180)
        weight = np.clip((48 - distance) / 12, 0, 1) * np.clip((saturation - 0.12) / 0.12, 0, 1)
        weight *= np.clip((high - 30) / 30, 0, 1)
    light = rgb @ np.array([0.299, 0.587, 0.114], np.float32)
    chosen = light[(weight > 0.5) & (alpha > 128)]
    usual = float(np.median(chosen)) if chosen.size else 128.0
    shade = np.clip(light / usual, 0.45, 1)[..., None]
    shine = np.clip((light - usual) / max(255 - usual, 40), 0, 0.75)[..., None]
    target = np.array(color, np.float32)
    painted = target * shade + (255 - target) * shine
    rgb = rgb + weight[..., None] * (painted - rgb)
    result = np.concatenate([rgb, alpha[..., None]], -1)
    return Image.fromarray(np.clip(result + 0.5, 0, 255).astype(np.uint8), "RGBA")


@cache
def rim_color(style: str, label: str, tint: str | None) -> np.ndarray:
    """Mean colour along the outline, which has to stand out from the background."""
    pixels = np.asarray(sprite(style, label, tint)).astype(np.float32)
    return _rim(pixels)


def contrasts(rims: list[np.ndarray]) -> np.ndarray:
    """Of each background's colour the distance in RGB to the nearest rim: [backgrounds]."""
    middles = np.array([middle for middle, _ in BACKGROUNDS.values()], np.float32)
    return np.linalg.norm(middles[:, None] - np.stack(rims)[None], axis=-1).min(1)


def _rim(pixels: np.ndarray) -> np.ndarray:
    solid = np.pad(pixels[..., 3] >= 128, 3)
    inner = solid.copy()
    for shift in (1, 2, 3):
        for axis in (0, 1):
            inner &= np.roll(solid, shift, axis) & np.roll(solid, -shift, axis)
    rim = (solid & ~inner)[3:-3, 3:-3]
    return pixels[rim][:, :3].mean(0)


# --- stamps ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Stamp:
    """An object drawn, ready to be pasted somewhere."""

    image: Image.Image  # RGBA with its soft edge
    corner: tuple[int, int]  # where the mask's box begins in the image
    mask: np.ndarray  # bool [h, w], tight: at least half opaque
    char_boxes: tuple[Box, ...] = ()  # relative to the mask's box


def stamp_of(image: Image.Image) -> Stamp:
    """The stamp of a drawing, RGBA: its mask is what is at least half opaque."""
    solid = np.asarray(image)[..., 3] >= 128
    rows, columns = np.flatnonzero(solid.any(1)), np.flatnonzero(solid.any(0))
    y0, y1, x0, x1 = rows[0], rows[-1] + 1, columns[0], columns[-1] + 1
    return Stamp(image, (int(x0), int(y0)), solid[y0:y1, x0:x1])


def pictogram(rng: np.random.Generator, style: str, label: str, tint: str | None, longest: float) -> Stamp:
    """A pictogram stretched a little, mirrored half the time, turned by up to 28 degrees."""
    image = sprite(style, label, tint)
    stretch = float(rng.uniform(0.86, 1.16))
    width, height = image.width * stretch, float(image.height)
    scale = longest / max(width, height)
    if rng.random() < 0.5:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    image = image.resize((max(4, round(width * scale)), max(4, round(height * scale))), Image.Resampling.BICUBIC)
    angle = float(rng.uniform(-28, 28))
    return stamp_of(image.rotate(angle, Image.Resampling.BILINEAR, expand=True))


def varied_pictogram(rng: np.random.Generator, image: Image.Image, longest: float) -> Stamp:
    """A pictogram of world 2: as in world 1, but upright one time in four, and one in eight has an outline."""
    stretch = float(rng.uniform(0.82, 1.2))
    width, height = image.width * stretch, float(image.height)
    scale = longest / max(width, height)
    if rng.random() < 0.5:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    image = image.resize((max(6, round(width * scale)), max(6, round(height * scale))), Image.Resampling.BICUBIC)
    if rng.random() < 0.75:
        image = image.rotate(float(rng.uniform(-28, 28)), Image.Resampling.BILINEAR, expand=True)
    if rng.random() < 0.125:
        shade = 255 if rng.random() < 0.7 else 20
        image = _outlined(image, (shade, shade, shade), 2 * round(0.02 * longest) + 1)
    return stamp_of(image)


def _outlined(image: Image.Image, color: tuple[int, int, int], width: int) -> Image.Image:
    """The drawing as a sticker: on a silhouette that is wider by a few pixels, which belongs to the object."""
    padded = ImageOps.expand(image, width, (0, 0, 0, 0))
    silhouette = Image.new("RGBA", padded.size, (*color, 0))
    wide = padded.getchannel("A").filter(ImageFilter.BoxBlur(width / 2))  # a maximum filter would take far longer
    silhouette.putalpha(wide.point([min(255, 6 * shade) for shade in range(256)]))
    silhouette.alpha_composite(padded)
    return silhouette
