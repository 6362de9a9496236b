"""World 2: scenes of the same things, drawn by six artists in many more ways, and degraded as pictures are.

    scene = render_varied(7)                              # degraded or not, by chance; the same picture always
    clean = render_varied(7, degradations=())             # the same scene, without
    noisy = render_varied(7, degradations=[("noise", 0.5)])

A model that was trained in world 1 learned its renderer: the artists, the sizes, the fonts, the clean edges. World 2
keeps names, prompts and the rules of `renderer.render`, and varies what does not matter for the answers: artists (mixed
in one scene of three), sizes from a sixth to two thirds of the side, one huge or six small things, outlines, shadows,
parts outside the frame, fonts and colours of signs, textures, backgrounds of many colours, degradations.

Colours. Of the classes that world 1 always tints, a third keeps its own colour here. If that colour is one of the
tints, captions name it ("a red car"); so held-out tints hold for it too. Other things can have a natural colour that
can be asked about ("what color is the corn ?"), but captions do not name it. A background of many colours has no name:
captions leave it out. In a gray picture nothing has a colour, and the background is white, gray, black or unnamed.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from PIL import Image, ImageFilter, ImageOps

from paligemma.tiny import signs
from paligemma.tiny.artwork import classes_of, contrasts, natural_color, rim_color, sprite, varied_pictogram
from paligemma.tiny.backgrounds import MANY_COLORS, VARIED_PATTERNS, varied_background
from paligemma.tiny.degradations import degrade, sample_degradations
from paligemma.tiny.layout import Placed, left_edges_differ, place
from paligemma.tiny.redrawing import redrawn
from paligemma.tiny.renderer import MIN_VISIBLE, render
from paligemma.tiny.world import (
    BACKGROUNDS,
    CLASSES,
    TINTABLE,
    TINTS,
    VARIED_STYLES,
    Scene,
    SceneObject,
    generator,
    has_held_out,
    held_out,
)

MOST = 6  # objects in a scene, the sign included
OUTSIDE = 0.3  # largest share of an object's width or height outside the frame
MIN_CONTRAST = 60.0  # distance in RGB between an object's rim and the middle of the background's colour
LARGEST = (0.667, 0.55, 0.46, 0.4, 0.36, 0.32)  # most size of one of so many objects, as a share of the side
SMALLEST = 1 / 6
UNPAINTABLE = {("emojione", "umbrella"), ("emojione", "butterfly")}  # of so many colours that no tint can be seen


@dataclass(frozen=True)
class Drawing:
    """What is drawn for one object of a scene."""

    style: str
    label: str
    painted: str | None  # the tint that it is painted in; None: as the artist drew it

    @property
    def color(self) -> str | None:
        """What its colour is called, if it has a name."""
        return self.painted or natural_color(self.style, self.label)

    @property
    def tint(self) -> str | None:
        """The colour by which captions name it."""
        return self.color if self.label in TINTABLE and self.color in TINTS else None


def render_varied(
    seed: int,
    split: str = "train",
    size: int = 256,
    style: str | None = None,
    *,
    degradations: Sequence[tuple[str, float]] | None = None,
    sign: float = 0.3,
    sign_only: float = 0.07,
    redraw: float = 0.0,
) -> Scene:
    """The scene of a seed in world 2: the same picture on every call.

    split:         "train", "val", "test", "heldout" or "emojione"; see world.py.
    size:          side of the picture in pixels.
    style:         this artist alone, instead of those of the split.
    degradations:  [(name, strength)] instead of those that the seed chooses; () for none. See degradations.py.
    sign:          probability of a sign beside pictograms of the usual sizes, of which there are one to four then.
    sign_only:     probability of a sign and nothing else.
    redraw:        probability that a drawing is changed as by another artist; only training does so. See redrawing.py.

    Raises ValueError for an unknown split, style or degradation, a negative seed, or a size below 64.
    """
    if size < 64:
        raise ValueError(f"size must be at least 64 pixels, got {size}")
    if style is not None:
        classes_of(style)  # an unknown one is an error even where the scene is a sign alone
    rng = generator(seed, split, world=2)
    # Random numbers for changed drawings and for degradations are apart: the scene does not depend on them.
    artist, _, after = generator(seed, split, world=2).spawn(3)
    chosen = tuple(sample_degradations(after) if degradations is None else degradations)

    kind = ("huge", "crowd", "usual")[int(np.searchsorted((0.1, 0.25), rng.random()))]
    with_sign, drawings = _contents(rng, split, style, kind, sign, sign_only)
    text = signs.sign_text(rng) if with_sign else ""
    board = tuple(signs.BOARD_COLORS)[rng.integers(len(signs.BOARD_COLORS))]
    colors = _background_colors(rng, drawings, board if with_sign else None)
    images = [drawn(drawing, artist, redraw) for drawing in drawings]
    placed = _lay_out(rng, drawings, images, (text, board), kind, size)
    pattern = VARIED_PATTERNS[rng.integers(len(VARIED_PATTERNS))]
    canvas = varied_background(rng, colors, pattern, size)
    name = None if pattern in MANY_COLORS else colors[0]

    objects = _draw(rng, canvas, placed, drawings, (text, board))
    canvas, objects, name = degraded(canvas, objects, name, chosen, after)
    styles = {drawing.style for drawing in drawings}
    drawn_by = "mixed" if len(styles) > 1 else styles.pop() if styles else "none"
    return Scene(np.asarray(canvas), tuple(objects), name, pattern, drawn_by, seed, split, 2, chosen)


def render_in_world(
    world: int, seed: int, split: str, size: int = 256, style: str | None = None, **options: Any
) -> Scene:
    """The scene of a seed in world 1 (`renderer.render`) or 2 (`render_varied`), with their own options."""
    if world == 1:
        return render(seed, split, size, style, **options)
    if world == 2:
        return render_varied(seed, split, size, style, **options)
    raise ValueError(f"unknown world {world!r}; there is: 1, 2")


def degraded(
    canvas: Image.Image,
    objects: list[SceneObject],
    background: str | None,
    chosen: Sequence[tuple[str, float]],
    rng: np.random.Generator,
) -> tuple[Image.Image, list[SceneObject], str | None]:
    """The picture after all degradations, its objects and the name of its background: in gray, nothing has a colour."""
    if any(degradation == "gray" for degradation, _ in chosen):
        objects = [replace(thing, tint=None, color=None) for thing in objects]
        background = _gray_name(background) if background else None
    for degradation, strength in chosen:
        canvas = degrade(canvas, degradation, strength, rng)
    return canvas, objects, background


def _gray_name(color: str) -> str | None:
    """What a background of this color is called in a picture without colours; None between two names."""
    shade = signs.brightness(BACKGROUNDS[color][0])
    return "white" if shade > 225 else "black" if shade < 60 else "gray" if 110 < shade < 160 else None


# --- what is in a scene ---------------------------------------------------------------------------


def _contents(
    rng: np.random.Generator, split: str, style: str | None, kind: str, sign: float, sign_only: float
) -> tuple[bool, list[Drawing]]:
    """Whether there is a sign, and the pictograms."""
    chance = float(rng.random())
    if chance < sign_only and split != "heldout":
        return True, []
    with_sign = chance < sign_only + sign and kind == "usual"
    if kind == "huge":
        count = 1
    elif kind == "crowd":
        count = int(rng.integers(4, MOST + 1))
    else:
        count = int(rng.integers(1, MOST - with_sign))
    styles = (style,) if style else VARIED_STYLES[split]
    if rng.random() < 0.67:
        styles = (styles[rng.integers(len(styles))],)
    return with_sign, sample_drawings(rng, count, split, styles)


def sample_drawings(rng: np.random.Generator, count: int, split: str, styles: Sequence[str]) -> list[Drawing]:
    """Some pictograms, a few of them repeated, within what the split may show."""

    def drawing(label: str, painted: str | None = None) -> Drawing:
        able = [style for style in styles if label in classes_of(style)]
        style = able[rng.integers(len(able))]
        if painted is None and label in TINTABLE and (rng.random() < 0.67 or natural_color(style, label) is None):
            painted = tuple(TINTS)[rng.integers(len(TINTS))]
        if label in TINTABLE and (style, label) in UNPAINTABLE:
            painted = None
        return Drawing(style, label, painted)

    known = [label for label in CLASSES if any(label in classes_of(style) for style in styles)]
    tintable = [label for label in known if label in TINTABLE]
    drawings: list[Drawing] = []
    if split == "heldout":
        pairs, tints = held_out()
        pairs = tuple(pair for pair in pairs if set(pair) <= set(known))
        tints = tuple(tint for tint in tints if tint[0] in known)
        if count > 1 and rng.random() < 0.6:
            drawings = [drawing(label) for label in pairs[rng.integers(len(pairs))]]
        else:
            drawings = [drawing(*tints[rng.integers(len(tints))])]
    repeating = rng.random() < 0.45  # only scenes with repeated classes make counting worth asking
    while len(drawings) < count:
        if drawings and repeating and rng.random() < 0.6:
            same = drawings[rng.integers(len(drawings))]
            new = same if rng.random() < 0.6 else drawing(same.label)
        else:
            pool = tintable if rng.random() < 0.25 else known
            new = drawing(pool[rng.integers(len(pool))])
        if split == "heldout" or not has_held_out([(d.label, d.tint) for d in [*drawings, new]]):
            drawings.append(new)
    return drawings


def _background_colors(rng: np.random.Generator, drawings: Sequence[Drawing], board: str | None) -> tuple[str, str]:
    """Two colours from which every object stands out, or the best there are. board: the colour of the sign, if any."""
    rims = [rim_color(drawing.style, drawing.label, drawing.painted) for drawing in drawings]
    if board is not None:
        rims.append(np.array(signs.BOARD_COLORS[board], np.float32))
    contrast = contrasts(rims)
    clear = np.flatnonzero(contrast >= MIN_CONTRAST)
    if len(clear) < 2:
        clear = contrast.argsort()[-2:]
    first, second = rng.permutation(clear)[:2]
    return tuple(BACKGROUNDS)[first], tuple(BACKGROUNDS)[second]


# --- where it lies, and how it is drawn -----------------------------------------------------------


def drawn(drawing: Drawing, artist: np.random.Generator, redraw: float) -> Image.Image:
    image = sprite(drawing.style, drawing.label, drawing.painted)
    if artist.random() >= redraw:
        return image
    return redrawn(image, artist, drawing.color is not None or drawing.label in TINTABLE)


def _lay_out(
    rng: np.random.Generator,
    drawings: Sequence[Drawing],
    images: Sequence[Image.Image],
    sign: tuple[str, str],
    kind: str,
    size: int,
) -> list[Placed]:
    """A place for everything; begins again, a little smaller, when something found none."""
    text, board = sign
    count = len(drawings) + bool(text)
    large = LARGEST[count - 1]
    small = {"huge": 0.55, "crowd": SMALLEST, "usual": SMALLEST}[kind]
    if kind == "crowd":
        large = max(SMALLEST * 1.2, large * float(rng.uniform(0.6, 1)))
    elif kind == "huge":
        large = 0.9
    shrink = 1.0
    while True:
        placed: list[Placed] = []
        for drawing, image in zip(drawings, images):
            longest = size * max(SMALLEST, float(rng.uniform(small, large)) * shrink)
            stamp = varied_pictogram(rng, image, longest)
            outside = OUTSIDE if rng.random() < 0.15 else 0.0
            spot = place(rng, stamp, drawing.label, placed, size, MIN_VISIBLE, outside)
            if spot is None:
                break
            placed.append(spot)
        if text and len(placed) == len(drawings):  # last, on top: nothing hides its text
            stamp = signs.varied_sign(rng, text, size, board, shrink)
            spot = place(rng, stamp, "sign", placed, size, MIN_VISIBLE)
            placed += [spot] if spot is not None else []
        if len(placed) == count and left_edges_differ(placed, size):
            return placed
        shrink *= 0.93


def _draw(
    rng: np.random.Generator,
    canvas: Image.Image,
    placed: Sequence[Placed],
    drawings: Sequence[Drawing],
    sign: tuple[str, str],
) -> list[SceneObject]:
    """Paste everything into the picture, a fifth of the scenes with shadows; the objects from left to right."""
    size = canvas.width
    shadow = rng.random() < 0.2
    reach = float(rng.uniform(0.005, 0.03)) * size
    objects = []
    for i, spot in enumerate(placed):
        dx, dy = spot.stamp.corner
        x, y = spot.x - dx, spot.y - dy
        if shadow:
            _cast(canvas, spot.stamp.image.getchannel("A"), (x, y), reach)
        canvas.paste(spot.stamp.image, (x, y), spot.stamp.image)
        drawing = drawings[i] if i < len(drawings) else None
        text, board = sign if drawing is None else ("", "")
        tint = drawing.tint if drawing else None
        color = board or (drawing.color if drawing and tint is None else None)
        visible = spot.left / spot.area
        mask = spot.whole_mask(size)
        objects.append(SceneObject(spot.label, tint, spot.bounds, mask, visible, text, spot.char_boxes, color))
    return sorted(objects, key=lambda thing: thing.box[0])


def _cast(canvas: Image.Image, alpha: Image.Image, corner: tuple[int, int], reach: float) -> None:
    """A soft shadow below and to the right of a drawing."""
    border = round(2 * reach)
    mask = ImageOps.expand(alpha.point([round(0.4 * shade) for shade in range(256)]), border)
    mask = mask.filter(ImageFilter.BoxBlur(reach))
    x, y = (round(place + reach - border) for place in corner)
    canvas.paste((0, 0, 0), (x, y), mask)
