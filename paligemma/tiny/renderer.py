"""Draws the scenes of the small world, with exact truth about what is visible.

    scene = render(7)                       # the same picture everywhere, always
    scene.image                             # uint8 [256, 256, 3]
    scene.objects[0].label, .tint, .box, .mask

Pictograms are pasted one over the other. An object's box and mask are read off its *visible* pixels, so they are exact
by construction. Scenes whose answers would be in doubt (two objects that begin at the same column, text that is half
hidden) are not drawn.

All randomness is NumPy's PCG64, all resampling Pillow's. Another processor may round the shade of a pixel differently;
what is in the scene, and where, stays the same.
"""

from collections.abc import Sequence

import numpy as np
from PIL import Image

from paligemma.tiny import signs
from paligemma.tiny.artwork import classes_of, contrasts, pictogram, rim_color
from paligemma.tiny.backgrounds import background
from paligemma.tiny.layout import Placed, left_edges_differ, place
from paligemma.tiny.world import BACKGROUNDS, PATTERNS, STYLES, Scene, SceneObject, generator, sample_things

MIN_VISIBLE = 0.65  # default share of an object's own pixels that no other object hides
MIN_CONTRAST = 75.0  # distance in RGB between an object's rim and the middle of the background's colour

Thing = tuple[str, str | None]  # label, tint


def render(
    seed: int,
    split: str = "train",
    size: int = 256,
    style: str | None = None,
    *,
    objects: tuple[int, int] = (1, 5),
    object_size: tuple[float, float] = (0.2, 0.5),
    sign: float = 0.25,
    sign_only: float = 0.06,
    text_length: tuple[int, int] = (1, 6),
    char_size: tuple[float, float] = (0.12, 0.2),
    things: Sequence[Thing] | None = None,
    visible: float = MIN_VISIBLE,
) -> Scene:
    """The scene of a seed: the same labels, boxes and picture on every call.

    split:        "train", "val", "test", "heldout" or "twemoji"; see world.py.
    size:         side of the picture in pixels.
    style:        "noto", "openmoji" or "twemoji" instead of one of the split's own.
    objects:      least and most pictograms.
    object_size:  least and most length of a pictogram's longer side, before it is turned, as a share of the side.
    sign:         probability of a sign beside the pictograms; sign_only: of a sign and nothing else.
    text_length:  least and most characters on a sign.
    char_size:    font size (em) of a sign as a share of the side; long texts are shrunk until the board fits.
    things:       these pictograms, (label, tint), even if the split holds them out; `objects` is then ignored.
    visible:      least visible share of a pictogram; 1: none hides another.

    Raises ValueError for an unknown split or style, a negative seed, or bounds that make no sense.
    """
    _check(objects, text_length, object_size, visible, size)
    rng = generator(seed, split)
    style = style or STYLES[split][rng.integers(len(STYLES[split]))]
    classes_of(style)  # an unknown one is an error even where the scene is a sign alone

    chance = rng.random()
    alone = chance < sign_only and split != "heldout"
    with_sign = alone or chance < sign_only + sign
    count = 0 if alone else int(rng.integers(objects[0], objects[1] + 1))
    if things is None:
        things = sample_things(rng, count, split)
    text = signs.sign_text(rng, text_length) if with_sign else ""
    colors = int(rng.integers(len(signs.BOARDS)))
    color = _background_color(rng, style, things, signs.BOARDS[colors][0] if with_sign else None)
    pattern = PATTERNS[rng.integers(len(PATTERNS))]

    bounds = _size_bounds(len(things) + with_sign, object_size)
    shrink = 1.0
    while True:  # start again, a little smaller, when something found no place
        placed = _lay_out(rng, style, things, bounds, shrink, size, visible)
        if placed is not None and with_sign:  # last, on top: nothing hides its text
            spot = place(rng, signs.sign(rng, text, size, char_size, colors), "sign", placed, size, visible)
            placed = [*placed, spot] if spot is not None else None
        if placed is not None and left_edges_differ(placed, size):
            break
        shrink *= 0.93

    canvas = background(rng, color, pattern, size)
    tints = [tint for _, tint in things] + [None]
    found = [_paste(spot, canvas, tint, text) for spot, tint in zip(placed, tints)]
    found.sort(key=lambda thing: thing.box[0])
    return Scene(np.asarray(canvas), tuple(found), color, pattern, style, seed, split)


def _check(
    objects: tuple[int, int],
    text_length: tuple[int, int],
    object_size: tuple[float, float],
    visible: float,
    size: int,
) -> None:
    if not 1 <= objects[0] <= objects[1] <= 5:
        raise ValueError(f"objects must be a pair with 1 <= least <= most <= 5, got {objects}")
    if not 1 <= text_length[0] <= text_length[1] <= 6:
        raise ValueError(f"text_length must be a pair with 1 <= least <= most <= 6, got {text_length}")
    if not 0.08 <= object_size[0] <= object_size[1] <= 0.7:
        raise ValueError(f"object_size must be a pair with 0.08 <= least <= most <= 0.7, got {object_size}")
    if not 0 < visible <= 1:
        raise ValueError(f"visible must be a share above 0 and at most 1, got {visible}")
    if size < 64:
        raise ValueError(f"size must be at least 64 pixels, got {size}")


def _background_color(
    rng: np.random.Generator, style: str, things: Sequence[Thing], board: tuple[int, int, int] | None
) -> str:
    """A colour from which every object stands out, or the best there is. board: the colour of the sign, if any."""
    rims = [rim_color(style, *thing) for thing in things]
    if board is not None:
        rims.append(np.array(board, np.float32))
    contrast = contrasts(rims)
    clear = np.flatnonzero(contrast >= MIN_CONTRAST)
    return tuple(BACKGROUNDS)[clear[rng.integers(len(clear))] if len(clear) else int(contrast.argmax())]


def _size_bounds(count: int, object_size: tuple[float, float]) -> tuple[float, float]:
    """Least and most size of one of `count` objects: the more there are, the smaller each.

    At most about two fifths of the picture are covered.
    """
    least, most = object_size
    return least, max(least, min(most, (0.5, 0.5, 0.46, 0.4, 0.36, 0.33)[min(count, 6) - 1]))


def _lay_out(
    rng: np.random.Generator,
    style: str,
    things: Sequence[Thing],
    bounds: tuple[float, float],
    shrink: float,
    size: int,
    visible: float,
) -> list[Placed] | None:
    """A place for every pictogram, the later ones on top; None when one found none."""
    small, large = bounds
    placed: list[Placed] = []
    for label, tint in things:
        longest = size * max(small, float(rng.uniform(small, large)) * shrink)
        spot = place(rng, pictogram(rng, style, label, tint, longest), label, placed, size, visible)
        if spot is None:
            return None
        placed.append(spot)
    return placed


def _paste(spot: Placed, canvas: Image.Image, tint: str | None, text: str) -> SceneObject:
    """Draw the object into the picture, and say what is visible of it."""
    dx, dy = spot.stamp.corner
    canvas.paste(spot.stamp.image, (spot.x - dx, spot.y - dy), spot.stamp.image)
    mask, text = spot.whole_mask(canvas.width), text if spot.label == "sign" else ""
    return SceneObject(spot.label, tint, spot.bounds, mask, spot.left / spot.area, text, spot.char_boxes)
