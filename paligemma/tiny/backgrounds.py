"""Backgrounds: in world 1 one of ten named colours in one of five patterns; in world 2 also textures and many colours.

Letters: S side of the picture.
"""

import math

import numpy as np
from PIL import Image, ImageChops, ImageDraw

from paligemma.tiny.world import BACKGROUNDS


def background(rng: np.random.Generator, color: str, pattern: str, size: int) -> Image.Image:
    """A picture of `color` in a pattern of lighter and darker shades that all still deserve the colour's name."""
    middle, reach = np.array(BACKGROUNDS[color], np.float32)
    base = middle + reach * np.float32(rng.uniform(-0.35, 0.35))
    if pattern == "plain":
        red, green, blue = (int(value) for value in np.clip(base + 0.5, 0, 255))
        return Image.new("RGB", (size, size), (red, green, blue))
    if pattern == "blotched":
        cells = int(rng.integers(3, 10))
        coarse = Image.fromarray(rng.uniform(-0.75, 0.75, (cells, cells)).astype(np.float32))
        shade = np.asarray(coarse.resize((size, size), Image.Resampling.BICUBIC))
    elif pattern == "noisy":
        shade = rng.standard_normal((size, size), dtype=np.float32) * np.float32(rng.uniform(0.2, 0.45))
    else:
        along = _along(rng, size)
        if pattern == "graded":
            shade = along * np.float32(1.4)
        else:
            period, depth = float(rng.uniform(0.06, 0.25)), float(rng.uniform(0.25, 0.65))
            shade = np.where((along + 1) % np.float32(period) < period / 2, np.float32(depth), np.float32(-depth))
    return _shaded(shade, base, reach)


def _shaded(shade: np.ndarray, base: np.ndarray, reach: np.ndarray) -> Image.Image:
    """The colour `base` lightened or darkened by `shade` [S, S] in [-1, 1] times `reach`."""
    # A palette of 256 shades turns one small array into three channels: much faster than arithmetic on all three.
    table = np.clip(np.linspace(-1, 1, 256, dtype=np.float32)[:, None] * reach + (base + 0.5), 0, 255).astype(np.uint8)
    shades = Image.fromarray(np.clip(shade * 127.5 + 128, 0, 255).astype(np.uint8))
    shades.putpalette(table.tobytes())
    return shades.convert("RGB")


# --- world 2 --------------------------------------------------------------------------------------

ONE_COLOR = ("plain", "graded", "blotched", "striped", "noisy", "checked", "dotted", "woven", "rough", "framed")
MANY_COLORS = ("halves", "photo", "shapes")  # their background has no colour with one name
VARIED_PATTERNS = ONE_COLOR + MANY_COLORS


def varied_background(rng: np.random.Generator, colors: tuple[str, str], pattern: str, size: int) -> Image.Image:
    """A background of world 2 in the first of two colours; "halves" has both."""
    color = colors[0]
    if pattern in ("plain", "graded", "blotched", "striped", "noisy"):
        return background(rng, color, pattern, size)
    middle, reach = np.array(BACKGROUNDS[color], np.float32)
    base = middle + reach * np.float32(rng.uniform(-0.35, 0.35))
    if pattern == "halves":
        image = background(rng, color, "plain", size)
        mask = Image.fromarray(((_along(rng, size) > rng.uniform(-0.2, 0.2)) * 255).astype(np.uint8))
        image.paste(background(rng, colors[1], "plain", size), (0, 0), mask)
        return image
    if pattern == "photo":
        return _photo(rng, base, size)
    if pattern == "shapes":
        return _shapes(rng, background(rng, color, "graded", size))
    return _shaded(_texture(rng, pattern, size), base, reach)


def _along(rng: np.random.Generator, size: int) -> np.ndarray:
    """How far each pixel is along a random direction, from the middle: [S, S], about -0.7 to 0.7."""
    angle = float(rng.uniform(0, 2 * math.pi))
    steps = np.linspace(-0.5, 0.5, size, dtype=np.float32)
    return np.float32(math.cos(angle)) * steps + np.float32(math.sin(angle)) * steps[:, None]


def _texture(rng: np.random.Generator, pattern: str, size: int) -> np.ndarray:
    """Shades in [-1, 1] of a pattern in one colour: [S, S]."""
    depth = np.float32(rng.uniform(0.2, 0.7))
    if pattern == "rough":  # plaster, paper: coarse and fine noise added
        return _fractal(rng, size, depth)
    if pattern == "framed":  # darker or lighter towards the edges
        steps = np.linspace(-1, 1, size, dtype=np.float32)
        return (steps**2 + steps[:, None] ** 2 - 1) * depth * np.float32(rng.choice((-1, 1)))
    period = float(rng.uniform(0.03, 0.2))
    angle = float(rng.choice((0, 0, rng.uniform(0, math.pi / 2))))
    steps = np.arange(size, dtype=np.float32) * np.float32(2 * math.pi / (period * size))
    cos, sin = np.float32(math.cos(angle)), np.float32(math.sin(angle))
    u, v = cos * steps + sin * steps[:, None], cos * steps[:, None] - sin * steps
    waves = np.sin(u) * np.sin(v)
    if pattern == "checked":
        return np.where(waves > 0, depth, -depth)
    if pattern == "dotted":
        return np.where(waves > np.float32(0.5), depth, -depth)
    return waves * depth  # woven


FINEST = 108  # cells in a row of the finest noise


def _fractal(rng: np.random.Generator, size: int, depth: np.float32) -> np.ndarray:
    """Noise of four sizes added up, the finer the weaker: [S, S], mostly in [-depth, depth]."""
    total = np.zeros((FINEST, FINEST), np.float32)
    for octave in range(4):
        cells = 4 * 3**octave
        coarse = Image.fromarray(rng.uniform(-1, 1, (cells, cells)).astype(np.float32))
        total += np.asarray(coarse.resize((FINEST, FINEST), Image.Resampling.BILINEAR)) * np.float32(0.6 * 0.7**octave)
    return np.asarray(Image.fromarray(total).resize((size, size), Image.Resampling.BILINEAR)) * depth


def _photo(rng: np.random.Generator, base: np.ndarray, size: int) -> Image.Image:
    """Something like an unfocused photograph: a colour that changes slowly, with a grain of all sizes."""
    cells = int(rng.integers(2, 6))
    spread = np.float32(rng.uniform(20, 55))
    corners = np.clip(base + spread * rng.standard_normal((cells, cells, 3)), 0, 255).astype(np.uint8)
    image = Image.fromarray(corners).resize((size, size), Image.Resampling.BICUBIC)
    grain = Image.fromarray(
        np.clip(128 + 90 * _fractal(rng, size, np.float32(rng.uniform(0.1, 0.5))), 0, 255).astype(np.uint8)
    )
    return ImageChops.add(image, Image.merge("RGB", [grain] * 3), scale=1, offset=-128)


def _shapes(rng: np.random.Generator, image: Image.Image) -> Image.Image:
    """Lines and ellipses of many colours, half mixed with what is behind them."""
    size = image.width
    front = image.copy()
    draw = ImageDraw.Draw(front)
    for _ in range(int(rng.integers(6, 20))):
        red, green, blue = (int(shade) for shade in rng.integers(30, 226, 3))
        x, y, across, down = (float(value) for value in rng.uniform(0, 1, 4) * size)
        if rng.random() < 0.5:
            draw.line((x, y, across, down), (red, green, blue), max(1, round(size * rng.uniform(0.005, 0.03))))
        else:
            reach = 0.05 + 0.1 * float(rng.random())
            draw.ellipse((x - size * reach, y - size * reach, x + size * reach, y + size * reach), (red, green, blue))
    return Image.blend(image, front, float(rng.uniform(0.25, 0.5)))
