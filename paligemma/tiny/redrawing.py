"""Drawings as yet another artist might have made them, for training.

Six artists are few: a model that has seen six drawings of a dog can learn them by heart. So most of the drawings in
training are bent, recoloured, simplified, shaded or traced, a different way each time. What a drawing is called stays
true: a colour that has a name is changed no more than a camera would.
"""

import math

import numpy as np
from PIL import Image, ImageChops, ImageEnhance, ImageFilter, ImageOps

BENT = 0.09  # of the side: how far the points of a grid over the drawing are moved, at most
SHEARED = 0.2


def redrawn(image: Image.Image, rng: np.random.Generator, named_color: bool) -> Image.Image:
    """The drawing (RGBA) with some of its properties changed.

    named_color: whether its colour has a name in prompts or answers, and must stay what it is called.
    """
    if rng.random() < 0.6:
        image = bent(image, rng)
    colors, alpha = image.convert("RGB"), image.getchannel("A")
    if rng.random() < 0.2:
        colors = simplified(colors, rng)
    elif rng.random() < 0.25:
        colors = repainted(colors, rng, 0.01 if named_color else 0.12)
    if rng.random() < 0.2:
        colors = shaded(colors, rng)
    if rng.random() < 0.2:
        colors = traced(colors, alpha, rng, 0.1 if named_color else 0.6)
    if rng.random() < 0.6:
        if named_color:
            colors = recolored(colors, rng, turn=0.01, paler=0.9, bend=0.06)
        else:
            colors = recolored(colors, rng, turn=0.1 if rng.random() < 0.7 else 0.5)
    colors.putalpha(alpha)
    return colors


def bent(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Sheared, and the nine points of a 2 x 2 grid are moved apart or together, so that parts change their shares."""
    border = round(0.16 * max(image.size))
    image = ImageOps.expand(image, border, (0, 0, 0, 0))
    width, height = image.size
    grid = np.stack(np.meshgrid([0, width / 2, width], [0, height / 2, height]), -1)  # [row, column, (x, y)]
    moved = grid + rng.uniform(-BENT, BENT, grid.shape) * (width, height)
    slope = float(rng.uniform(-SHEARED, SHEARED))
    moved[..., 0] += slope * (grid[..., 1] - height / 2)
    mesh = []
    for row in range(2):
        for column in range(2):
            area = grid[row : row + 2, column : column + 2].round().astype(int)
            corners = moved[[row, row + 1, row + 1, row], [column, column, column + 1, column + 1]]
            mesh.append(((*area[0, 0].tolist(), *area[1, 1].tolist()), tuple(corners.ravel().tolist())))
    result = image.transform(image.size, Image.Transform.MESH, mesh, Image.Resampling.BILINEAR)
    box = result.getchannel("A").getbbox()
    return result.crop(box) if box else image


def recolored(
    colors: Image.Image, rng: np.random.Generator, turn: float, paler: float = 0.6, bend: float = 0.25
) -> Image.Image:
    """Paler or more colourful, lighter or darker, and all hues turned by up to `turn` of the colour circle.

    paler: the least share of its saturation that a colour keeps. bend: of the curve that makes middle shades lighter or
    darker; it turns hues as well, orange towards yellow.
    """
    colors = ImageEnhance.Color(colors).enhance(float(rng.uniform(paler, 1.3)))
    gain, exponent = float(rng.uniform(0.85, 1.1)), math.exp(float(rng.uniform(-bend, bend)))
    colors = colors.point([min(255, round(255 * gain * (shade / 255) ** exponent)) for shade in range(256)] * 3)
    return colors.convert("RGB", _hue_turned(float(rng.uniform(-turn, turn))))


def _hue_turned(turn: float) -> tuple[float, ...]:
    """The matrix that turns hues, approximately: the colour circle around the gray axis, [3 x 4] as Pillow takes it."""
    cos, sin = math.cos(2 * math.pi * turn), math.sin(2 * math.pi * turn)
    third, root = (1 - cos) / 3, math.sqrt(1 / 3) * sin
    same, before, after = cos + third, third - root, third + root
    return (same, before, after, 0, after, same, before, 0, before, after, same, 0)


def simplified(colors: Image.Image, rng: np.random.Generator) -> Image.Image:
    """In three to six flat colours."""
    return colors.quantize(int(rng.integers(3, 7)), Image.Quantize.FASTOCTREE, dither=Image.Dither.NONE).convert("RGB")


def repainted(colors: Image.Image, rng: np.random.Generator, turn: float) -> Image.Image:
    """In four to ten colours, each made lighter or darker, and its hue turned by up to `turn`, without the others."""
    flat = colors.quantize(int(rng.integers(4, 11)), Image.Quantize.FASTOCTREE, dither=Image.Dither.NONE)
    palette = np.array(flat.getpalette(), np.float32).reshape(-1, 3)
    mixed = np.array([np.reshape(_hue_turned(t), (3, 4))[:, :3] for t in rng.uniform(-turn, turn, len(palette))])
    palette = np.einsum("kij,kj->ki", mixed, palette) * rng.uniform(0.75, 1.2, (len(palette), 1))
    flat.putpalette(palette.clip(0, 255).astype(np.uint8).tobytes())
    return flat.convert("RGB")


def shaded(colors: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Lit from one side, darker towards the other."""
    light = Image.linear_gradient("L").resize((364, 364)).rotate(float(rng.uniform(0, 360)), Image.Resampling.BILINEAR)
    light = light.crop((54, 54, 310, 310))  # the middle, in which no corner is empty at any angle
    depth = float(rng.uniform(0.2, 0.6))
    light = light.resize(colors.size).point([round(255 - depth * (255 - shade)) for shade in range(256)])
    return ImageChops.multiply(colors, Image.merge("RGB", [light] * 3))


def traced(colors: Image.Image, alpha: Image.Image, rng: np.random.Generator, paler: float) -> Image.Image:
    """With dark lines where colours meet and along the outline, half of the time on colours mixed with up to `paler`
    of white. A red with a third of white would be called pink."""
    inner = colors.convert("L").filter(ImageFilter.FIND_EDGES)
    outer = alpha.filter(ImageFilter.FIND_EDGES)
    lines = ImageChops.lighter(inner, outer).filter(ImageFilter.BoxBlur(float(rng.uniform(0.5, 1.5))))
    lines = lines.point([max(0, 255 - 3 * shade) for shade in range(256)])
    if rng.random() < 0.5:
        colors = Image.blend(
            colors, Image.new("RGB", colors.size, (255, 255, 255)), float(rng.uniform(paler / 3, paler))
        )
    return ImageChops.multiply(colors, Image.merge("RGB", [lines] * 3))
