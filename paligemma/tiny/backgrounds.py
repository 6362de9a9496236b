"""Backgrounds: one of ten named colours, in one of five patterns."""

import math

import numpy as np
from PIL import Image

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
        angle = float(rng.uniform(0, 2 * math.pi))
        steps = np.linspace(-0.5, 0.5, size, dtype=np.float32)
        along = np.float32(math.cos(angle)) * steps + np.float32(math.sin(angle)) * steps[:, None]
        if pattern == "graded":
            shade = along * np.float32(1.4)
        else:
            period, depth = float(rng.uniform(0.06, 0.25)), float(rng.uniform(0.25, 0.65))
            shade = np.where((along + 1) % np.float32(period) < period / 2, np.float32(depth), np.float32(-depth))
    # A table of 256 shades turns one small array into three channels: much faster than arithmetic on all three.
    table = np.clip(np.linspace(-1, 1, 256, dtype=np.float32)[:, None] * reach + (base + 0.5), 0, 255).astype(np.uint8)
    shades = Image.fromarray(np.clip(shade * 127.5 + 128, 0, 255).astype(np.uint8))
    return Image.merge("RGB", [shades.point(column.tolist()) for column in table.T])
