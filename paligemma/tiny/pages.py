"""Pages: signs and drawings in rows, as many as fit. For vision pretraining alone.

    page = render_page(7)                     # the same picture always

A scene of the small world has three objects, and a sign in two of five, so a picture teaches the vision model less than
two letters on average. Letters are what it learns last: there are 62 of them, in 23 fonts, and two of the smallest
share a patch. A page has about 25 letters and four drawings. Nobody is asked about pages: they have more objects
than there are words for, and no order.

Most of the texts are no words (`signs.mixed_text`), so that letters are read and not guessed.
"""

import numpy as np

from paligemma.tiny import signs
from paligemma.tiny.artwork import Stamp, rim_color, varied_pictogram
from paligemma.tiny.backgrounds import MANY_COLORS, VARIED_PATTERNS, varied_background
from paligemma.tiny.degradations import sample_degradations
from paligemma.tiny.varied import MIN_CONTRAST, Drawing, degraded, drawn, sample_drawings
from paligemma.tiny.world import BACKGROUNDS, VARIED_STYLES, Scene, SceneObject, generator

PATTERN = "page"  # of a scene that is a page
CHAR_SIZE = (0.085, 0.13)  # of signs, as shares of the side: the smaller half of those in scenes
DRAWING_SIZE = (1 / 6, 0.27)  # longest side of a drawing, as a share of the side
DRAWINGS = 24  # at most
TRIALS = 4  # so many times something may be too large for what is left of the page


def render_page(seed: int, split: str = "train", size: int = 256, redraw: float = 0.0) -> Scene:
    """The page of a seed; arguments as of `varied.render_varied`."""
    rng, artist, after = generator(seed, split, world=2).spawn(4)[1:]
    chosen = sample_degradations(after)
    first, second = rng.permutation(len(BACKGROUNDS))[:2]
    colors = tuple(BACKGROUNDS)[first], tuple(BACKGROUNDS)[second]
    pattern = VARIED_PATTERNS[rng.integers(len(VARIED_PATTERNS))]
    canvas = varied_background(rng, colors, pattern, size)

    boards = [name for name, color in signs.BOARD_COLORS.items() if _stands_out(np.array(color), colors)]
    drawings = sample_drawings(rng, DRAWINGS, split, VARIED_STYLES[split])
    drawings = [d for d in drawings if _stands_out(rim_color(d.style, d.label, d.painted), colors)]
    share_of_signs = float(rng.choice((0.3, 0.7, 1.0)))

    objects: list[SceneObject] = []
    x, y, bottom, trials = _gap(rng, size), _gap(rng, size), 0, TRIALS
    while trials:
        drawing: Drawing | None = None
        text, board = "", None
        if boards and (not drawings or rng.random() < share_of_signs):
            text = signs.sign_text(rng) if rng.random() < 0.4 else signs.mixed_text(rng)
            board = boards[rng.integers(len(boards))]
            stamp = signs.varied_sign(rng, text, size, board, char_size=CHAR_SIZE)
        elif drawings:
            drawing = drawings.pop()
            stamp = varied_pictogram(rng, drawn(drawing, artist, redraw), size * float(rng.uniform(*DRAWING_SIZE)))
        else:
            break
        height, width = stamp.mask.shape
        if x + width > size:  # the next row
            x, y = _gap(rng, size), bottom + _gap(rng, size)
        if y + height > size or x + width > size:
            trials -= 1
            continue
        dx, dy = stamp.corner
        canvas.paste(stamp.image, (x - dx, y - dy), stamp.image)
        objects.append(_object(stamp, (x, y), size, drawing, text, board))
        x, bottom = x + width + _gap(rng, size), max(bottom, y + height)

    objects.sort(key=lambda thing: thing.box[0])
    name = None if pattern in MANY_COLORS else colors[0]
    canvas, objects, name = degraded(canvas, objects, name, chosen, after)
    return Scene(np.asarray(canvas), tuple(objects), name, PATTERN, "mixed", seed, split, 2, tuple(chosen))


def _gap(rng: np.random.Generator, size: int) -> int:
    return int(rng.integers(1, 1 + max(2, size // 24)))


def _stands_out(color: np.ndarray, backgrounds: tuple[str, str]) -> bool:
    middles = np.array([BACKGROUNDS[name][0] for name in backgrounds], np.float32)
    return bool(np.linalg.norm(middles - color, axis=-1).min() >= MIN_CONTRAST)


def _object(
    stamp: Stamp, corner: tuple[int, int], size: int, drawing: Drawing | None, text: str, board: str | None
) -> SceneObject:
    """What lies with the upper left corner of its mask at (x, y)."""
    x, y = corner
    height, width = stamp.mask.shape
    mask = np.zeros((size, size), bool)
    mask[y : y + height, x : x + width] = stamp.mask
    box = (float(x), float(y), float(x + width), float(y + height))
    letters = tuple((a + x, b + y, c + x, d + y) for a, b, c, d in stamp.char_boxes)
    if drawing is None:
        return SceneObject("sign", None, box, mask, 1.0, text, letters, board)
    return SceneObject(drawing.label, drawing.tint, box, mask, 1.0, color=None if drawing.tint else drawing.color)
