"""Degradations of pictures: compression, blur, noise, another exposure, fewer pixels, no colour.

    degrade(image, "jpeg", 0.5, rng)        # a JPEG of quality 62

Every degradation has a strength from 0 (hardly visible) to 1 (as bad as it gets in training), and none of them moves
anything: boxes and masks stay true. Colours keep their names, except in "gray" (see `varied.render_varied`).
"""

import io
from collections.abc import Callable
from functools import cache

import numpy as np
from PIL import Image, ImageChops, ImageEnhance, ImageFilter

Degradation = Callable[[Image.Image, float, np.random.Generator], Image.Image]


def jpeg(image: Image.Image, strength: float, rng: np.random.Generator) -> Image.Image:
    """Quality 95 to 30."""
    file = io.BytesIO()
    image.save(file, "JPEG", quality=round(95 - 65 * strength))
    file.seek(0)
    return Image.open(file).convert("RGB")


def blur(image: Image.Image, strength: float, rng: np.random.Generator) -> Image.Image:
    """Out of focus: a radius of up to 1% of the side."""
    return image.filter(ImageFilter.GaussianBlur(image.width * (0.002 + 0.008 * strength)))


def sharpen(image: Image.Image, strength: float, rng: np.random.Generator) -> Image.Image:
    """With the halos that phones draw around edges."""
    blurred = image.filter(ImageFilter.BoxBlur(image.width / 128))
    return Image.blend(blurred, image, 1.5 + 2 * strength)  # beyond 1: away from the blurred picture


def noise(image: Image.Image, strength: float, rng: np.random.Generator) -> Image.Image:
    """Of a sensor: a standard deviation of 3 to 21 of 255, a part of it the same in all three channels."""
    grain = _grain()
    repeats = -(-image.width // len(grain))
    grain = np.tile(grain, (repeats, repeats, 1)) if repeats > 1 else grain
    y, x = (int(rng.integers(len(grain) - image.width + 1)) for _ in range(2))
    piece = grain[y : y + image.height, x : x + image.width]
    pixels = np.asarray(image) + piece * np.float32(3 + 18 * strength)
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))


@cache
def _grain() -> np.ndarray:
    """Standard normal noise, float32 [601, 601, 3], made once, because sampling is slow."""
    rng = np.random.Generator(np.random.PCG64(20))
    common = rng.standard_normal((601, 601, 1), dtype=np.float32)
    return np.float32(0.8) * common + np.float32(0.6) * rng.standard_normal((601, 601, 3), dtype=np.float32)


def brightness(image: Image.Image, strength: float, rng: np.random.Generator) -> Image.Image:
    """Darker or brighter by up to a quarter."""
    change = 0.05 + 0.2 * strength
    return ImageEnhance.Brightness(image).enhance(1 + change if rng.random() < 0.5 else 1 - change)


def contrast(image: Image.Image, strength: float, rng: np.random.Generator) -> Image.Image:
    """Less or more by up to two fifths, around middle gray."""
    change = 0.08 + 0.32 * strength
    factor = 1 + change if rng.random() < 0.5 else 1 - change
    return image.point([min(255, max(0, round(128 + factor * (shade - 128)))) for shade in range(256)] * 3)


def hue(image: Image.Image, strength: float, rng: np.random.Generator) -> Image.Image:
    """A colour cast: the channels are scaled by up to an eighth in either direction."""
    change = 0.03 + 0.095 * strength
    factors = 1 + change * rng.uniform(-1, 1, 3)
    return image.point([min(255, round(factor * shade)) for factor in factors for shade in range(256)])


def gamma(image: Image.Image, strength: float, rng: np.random.Generator) -> Image.Image:
    """A tone curve with an exponent of up to 1.4, or its inverse."""
    exponent = 1.05 + 0.35 * strength
    exponent = exponent if rng.random() < 0.5 else 1 / exponent
    return image.point([round(255 * (shade / 255) ** exponent) for shade in range(256)] * 3)


def rescale(image: Image.Image, strength: float, rng: np.random.Generator) -> Image.Image:
    """Reduced to as little as two fifths of its size, but not below 96 pixels, and enlarged again by another filter."""
    side = max(min(96, image.width), round(image.width / (1.2 + 1.3 * strength)))
    filters = (Image.Resampling.NEAREST, Image.Resampling.BILINEAR, Image.Resampling.BICUBIC)
    smaller = image.resize((side, side), (Image.Resampling.BOX, *filters[1:])[rng.integers(3)])
    return smaller.resize(image.size, filters[rng.integers(3)])


def saturation(image: Image.Image, strength: float, rng: np.random.Generator) -> Image.Image:
    """Paler or more colourful by up to a third."""
    change = 0.08 + 0.26 * strength
    return ImageEnhance.Color(image).enhance(1 + change if rng.random() < 0.5 else 1 - change)


def gray(image: Image.Image, strength: float, rng: np.random.Generator) -> Image.Image:
    """Without colours, or with a tone like old paper's, the stronger the more often."""
    shades = image.convert("L")
    if rng.random() >= 0.5 * strength:
        return Image.merge("RGB", [shades] * 3)
    return ImageChops.multiply(Image.merge("RGB", [shades] * 3), Image.new("RGB", image.size, (255, 247, 230)))


DEGRADATIONS: dict[str, Degradation] = {
    "jpeg": jpeg, "blur": blur, "noise": noise, "brightness": brightness, "contrast": contrast, "hue": hue,
    "saturation": saturation, "gamma": gamma, "rescale": rescale, "sharpen": sharpen, "gray": gray,
}  # fmt: skip


def degrade(image: Image.Image, name: str, strength: float, rng: np.random.Generator) -> Image.Image:
    """The picture after one degradation. Raises ValueError for an unknown name or a strength outside [0, 1]."""
    if name not in DEGRADATIONS:
        raise ValueError(f"unknown degradation {name!r}; there is: {', '.join(DEGRADATIONS)}")
    if not 0 <= strength <= 1:
        raise ValueError(f"the strength of a degradation must be from 0 to 1, got {strength}")
    return DEGRADATIONS[name](image, strength, rng)


def sample_degradations(rng: np.random.Generator) -> list[tuple[str, float]]:
    """(name, strength) of what happens to one picture in training: nothing to two of five, else one to three things.

    Mild ones are more common. Losing colours and pixels comes before noise, and compression last, as in a camera.
    """
    if rng.random() < 0.4:
        return []
    count = 1 + int(rng.integers(3))
    names = [name for name in DEGRADATIONS if name != "gray"]
    chosen = {names[i] for i in rng.permutation(len(names))[:count]}
    if rng.random() < 0.1:
        chosen.add("gray")
    order = (
        "gray",
        "hue",
        "saturation",
        "brightness",
        "contrast",
        "gamma",
        "rescale",
        "blur",
        "noise",
        "sharpen",
        "jpeg",
    )
    return [(name, float(rng.random() ** 1.5)) for name in order if name in chosen]
