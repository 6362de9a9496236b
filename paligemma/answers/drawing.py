"""Results over the picture: boxes, masks, labels and scores, legible at any size.

Line width and font grow with the picture, a label has one colour in all pictures (as far as the palette goes), and its
tag is put where it covers the least of the other tags and never runs off the edge.
"""

from __future__ import annotations

import math
import unicodedata
import zlib
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, TypeAlias, TypedDict

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from paligemma.arguments import check_number
from paligemma.images import Picture, load_image

if TYPE_CHECKING:
    from paligemma.answers.results import Detection, Segment

    Item: TypeAlias = Detection | Segment

Color = tuple[int, int, int]
Rectangle = tuple[int, int, int, int]  # left, top, right, bottom; right and bottom not included

# Chosen one after the other, each as far as possible from those before it (distance in OKLab, lightness 0.5 to 0.9).
PALETTE: tuple[Color, ...] = (
    (255, 45, 60),
    (0, 230, 0),
    (30, 60, 255),
    (30, 120, 0),
    (75, 195, 255),
    (225, 0, 255),
    (255, 195, 90),
    (135, 75, 150),
    (255, 150, 225),
    (120, 180, 30),
    (45, 255, 225),
    (0, 135, 195),
    (165, 75, 0),
    (210, 135, 30),
    (150, 120, 255),
    (135, 0, 240),
)

# Pillow's own font has the plain Latin letters. For others, the first of these that is installed and has them.
_SYSTEM_FONTS = (
    *("DejaVuSans.ttf", "NotoSans-Regular.ttf", "LiberationSans-Regular.ttf", "FreeSans.ttf"),
    *("NotoSansCJK-Regular.ttc", "wqy-microhei.ttc", "DroidSansFallbackFull.ttf", "unifont.ttf"),  # Linux
    *("arial.ttf", "segoeui.ttf", "msyh.ttc", "YuGothM.ttc", "malgun.ttf", "Nirmala.ttf", "seguisym.ttf"),  # Windows
    *("Arial Unicode.ttf", "PingFang.ttc", "Hiragino Sans GB.ttc", "AppleSDGothicNeo.ttc"),  # macOS
    *("NotoSansArabic-Regular.ttf", "NotoSansHebrew-Regular.ttf", "NotoSansDevanagari-Regular.ttf"),
    *("NotoSansBengali-Regular.ttf", "NotoSansThai-Regular.ttf", "NotoSansTelugu-Regular.ttf"),
)


SAME_THING = 0.7  # IoU from which a box and a mask with one label show one thing


class Style(TypedDict, total=False):
    """The options of `draw`."""

    scores: bool
    mask_opacity: float
    scale: float


def draw(
    image: Picture,
    items: Sequence[Item],
    *,
    scores: bool = True,
    mask_opacity: float = 0.4,
    scale: float = 1.0,
) -> Image.Image:
    """The picture with `items` over it, as a new RGB image.

    image: what `load_image` takes; `items` are in its pixels. scores: write them behind the labels, where they are
    known. mask_opacity: of the colour over a mask, 0 to 1. scale: draw on an enlarged (or reduced) copy, so that the
    labels of a small picture have room.

    A box is left out where a mask with the same label shows the same thing (`SAME_THING`): people put the answers to
    `detect` and `segment` into one picture.

    ValueError for a mask that has not the size of the picture, for a box that is not finite, for a scale of 0 or less,
    and for an opacity out of range.
    """
    check_number("scale", scale)
    check_number("mask_opacity", mask_opacity)
    if not 0 <= mask_opacity <= 1:
        raise ValueError(f"mask_opacity is {mask_opacity!r}, expected a number from 0 to 1 (solid)")
    if not 0 < scale < math.inf:
        raise ValueError(f"scale is {scale!r}, expected a number above 0; 1 is the size of the picture")
    picture = load_image(image)
    width, height = (max(1, round(side * scale)) for side in picture.size)
    if isinstance(items, str) or not isinstance(items, Iterable):
        raise TypeError(f"items is {type(items).__name__}, expected a list of detections or segments, or an Answer")
    for item in items:
        _check(item, picture.size)
    items = _each_once(items)
    if (width, height) != picture.size:
        picture = picture.resize((width, height), Image.Resampling.BICUBIC)
    elif picture is image:
        picture = picture.copy()

    size = math.sqrt(width * height)
    line = max(1, round(size / 300))
    font_size = max(10, round(size / 36))
    colors = label_colors([item.label for item in items])

    for item in items:
        mask = getattr(item, "mask", None)
        if mask is not None:
            _paint_mask(picture, _resized(mask, (width, height)), colors[item.label], mask_opacity, line)
    canvas = ImageDraw.Draw(picture)
    boxes = [_pixel_box(item.box, scale, (width, height)) for item in items]
    for box, item in zip(boxes, items):
        _draw_box(canvas, box, colors[item.label], line)

    placed: list[Rectangle] = []
    for box, item in zip(boxes, items):
        score = f"{item.score:.2f}" if scores and item.score is not None else ""
        tag = _Tag.fit(item.label, score, font_size, (width, height))
        if tag is not None:
            at = _place(tag, box, placed, (width, height))
            placed.append((*at, at[0] + tag.width, at[1] + tag.height))
            tag.draw(canvas, at, colors[item.label])
    return picture


def label_colors(labels: Sequence[str]) -> dict[str, Color]:
    """A colour for each label: the same in every picture, unless two labels of this one would share it."""
    names = sorted(set(labels))
    free = list(range(len(PALETTE)))
    colors = {}
    for name in names:
        wanted = zlib.crc32(name.encode("utf-8", "replace")) % len(PALETTE)  # `hash` differs from run to run
        free = free or list(range(len(PALETTE)))
        index = min(free, key=lambda i: (i - wanted) % len(PALETTE))
        free.remove(index)
        colors[name] = PALETTE[index]
    return colors


# -- boxes and masks --


def _check(item: Item, size: tuple[int, int]) -> None:
    if not hasattr(item, "box") or not hasattr(item, "label"):
        raise TypeError(
            f"items has {type(item).__name__}, expected detections or segments, which have a box and a label"
        )
    if not all(math.isfinite(edge) for edge in item.box):
        raise ValueError(f"the box of {item.label!r} is not finite: {item.box}")
    mask = getattr(item, "mask", None)
    if mask is not None and np.shape(mask) != size[::-1]:
        raise ValueError(f"the mask of {item.label!r} is {np.shape(mask)}, the picture {size[::-1]} (height, width)")


def _each_once(items: Iterable[Item]) -> list[Item]:
    """Without the boxes that a mask of the same label shows as well."""
    items = list(items)
    masked = [item for item in items if getattr(item, "mask", None) is not None]
    return [
        item
        for item in items
        if getattr(item, "mask", None) is not None
        or not any(item.label == other.label and _iou(item.box, other.box) >= SAME_THING for other in masked)
    ]


def _iou(a: Sequence[float], b: Sequence[float]) -> float:
    """Intersection over union of two boxes; 0 where both are empty."""
    sides = [min(a[axis + 2], b[axis + 2]) - max(a[axis], b[axis]) for axis in (0, 1)]
    shared = sides[0] * sides[1] if min(sides) > 0 else 0.0
    union = sum((box[2] - box[0]) * (box[3] - box[1]) for box in (a, b)) - shared
    return shared / union if union > 0 else 0.0


def _pixel_box(box: Sequence[float], scale: float, size: tuple[int, int]) -> Rectangle:
    """A box in whole pixels, within the picture and at least one pixel wide and high."""
    x0, x1 = sorted((box[0] * scale, box[2] * scale))
    y0, y1 = sorted((box[1] * scale, box[3] * scale))
    left, top = (min(max(round(edge), 0), side - 1) for edge, side in zip((x0, y0), size))
    return left, top, min(max(round(x1), left + 1), size[0]), min(max(round(y1), top + 1), size[1])


def _draw_box(canvas: ImageDraw.ImageDraw, box: Rectangle, color: Color, line: int) -> None:
    left, top, right, bottom = box
    # Pillow's rectangle includes its last pixel. A darker rim inside keeps the line visible on its own colour.
    canvas.rectangle((left, top, right - 1, bottom - 1), outline=color, width=line)
    rim = max(1, line // 3)
    if right - left > 2 * (line + rim) and bottom - top > 2 * (line + rim):
        inner = (left + line, top + line, right - 1 - line, bottom - 1 - line)
        canvas.rectangle(inner, outline=_darker(color), width=rim)


def _darker(color: Color) -> Color:
    return color[0] // 3, color[1] // 3, color[2] // 3


def _resized(mask: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    mask = np.asarray(mask, dtype=bool)
    if mask.shape == size[::-1]:
        return mask
    return np.asarray(Image.fromarray(mask * np.uint8(255)).resize(size, Image.Resampling.BILINEAR)) > 127


def _paint_mask(picture: Image.Image, mask: np.ndarray, color: Color, opacity: float, line: int) -> None:
    """A tint inside the mask and a solid line along its border, in place."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    if not len(rows):
        return
    inside = mask[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]  # all else is not looked at
    tint = inside * np.uint8(round(255 * opacity))
    tint[inside & ~_eroded(inside, line)] = 255
    picture.paste(color, (int(columns[0]), int(rows[0])), Image.fromarray(tint))


def _eroded(mask: np.ndarray, by: int) -> np.ndarray:
    """What is left of a mask when `by` pixels are taken off all around, those at the edge of the array included."""
    mask = np.pad(mask, by)
    for axis in (0, 1):
        reach = 0
        while reach < by:  # a pixel survives if its neighbours up to `reach` away are set; each round doubles that
            step = min(reach + 1, by - reach)
            mask = mask & np.roll(mask, step, axis) & np.roll(mask, -step, axis)
            reach += step
    return mask[by:-by, by:-by]


# -- labels --


class _Tag:
    """A piece of text on a coloured background."""

    def __init__(self, text: str, font: ImageFont.FreeTypeFont) -> None:
        ascent, descent = font.getmetrics()
        self.text, self.font = text, font
        self.margin = max(1, round(ascent / 6))
        self.baseline = self.margin + ascent
        self.width = math.ceil(font.getlength(text)) + 2 * self.margin
        self.height = ascent + descent + 2 * self.margin

    @staticmethod
    def fit(label: str, score: str, font_size: int, room: tuple[int, int]) -> _Tag | None:
        """The tag for a label and a score, the label shortened until it fits into the picture; None if nothing does."""
        label = one_line(label[:200])
        font = font_for(label, font_size)

        def tag(length: int) -> _Tag:
            short = label if length == len(label) else label[:length].rstrip() + "…"
            return _Tag(f"{short} {score}".strip(), font)

        if not label and not score:
            return None
        low, high = 0, len(label)
        while low < high:  # the longest beginning that fits
            middle = (low + high + 1) // 2
            low, high = (middle, high) if tag(middle).width <= room[0] else (low, middle - 1)
        best = tag(low)
        return best if best.width <= room[0] and best.height <= room[1] else None

    def draw(self, canvas: ImageDraw.ImageDraw, at: tuple[int, int], color: Color) -> None:
        x, y = at
        canvas.rectangle((x, y, x + self.width - 1, y + self.height - 1), fill=color)
        ink = "black" if _luminance(color) > 0.18 else "white"  # where the contrast of the two (WCAG 2) is equal
        canvas.text((x + self.margin, y + self.baseline), self.text, fill=ink, font=self.font, anchor="ls")


def _luminance(color: Color) -> float:
    """Relative luminance, 0 to 1. It is a property of light, so sRGB's exponent is undone first."""
    red, green, blue = ((value / 255) ** 2.2 for value in color)
    return float(0.2126 * red + 0.7152 * green + 0.0722 * blue)


def _place(tag: _Tag, box: Rectangle, placed: list[Rectangle], size: tuple[int, int]) -> tuple[int, int]:
    """Where a tag covers the least of those before it; of equal places the first."""
    candidates = np.array(list(_places(tag, box, size)))  # [n, 2]
    covered = np.zeros(len(candidates))
    if placed:
        others = np.array(placed)  # [m, 4]
        far = candidates + np.array([tag.width, tag.height])
        overlap = np.minimum(far[:, None], others[None, :, 2:]) - np.maximum(candidates[:, None], others[None, :, :2])
        covered = overlap.clip(0).prod(-1).sum(1)
    x, y = candidates[int(covered.argmin())]
    return int(x), int(y)


def _places(tag: _Tag, box: Rectangle, size: tuple[int, int]) -> Iterator[tuple[int, int]]:
    """The corners of a box from outside and inside, beside it, then lower and lower inside; moved into the picture."""
    left, top, right, bottom = box
    inner = max(left, right - tag.width)
    places = [(x, y) for y in (top - tag.height, top, bottom, bottom - tag.height) for x in (left, inner)]
    places += [(right, top), (left - tag.width, top)]
    places += [(left, y) for y in range(top + tag.height, bottom - tag.height, tag.height)][:20]
    for x, y in places:
        yield max(0, min(x, size[0] - tag.width)), max(0, min(y, size[1] - tag.height))


@lru_cache(maxsize=64)
def _open_font(name: str | None, size: int) -> ImageFont.FreeTypeFont | None:
    try:
        font = ImageFont.truetype(name, size) if name else ImageFont.load_default(size)
    except OSError:
        return None
    return font if isinstance(font, ImageFont.FreeTypeFont) else None


def one_line(text: str) -> str:
    """As it can be drawn: one space for control characters, line breaks and spaces in a row; "?" for lone surrogates.

    Pillow stops with an error at some of them: raqm, which sets its lines, takes one paragraph at a time. (Characters
    without a shape of their own that join or part others stay: Persian and Hindi are written with them.)
    """
    text = text.encode("utf-8", "replace").decode()
    breaks = ("Cc", "Zl", "Zp")  # control characters, separators of lines, of paragraphs
    return " ".join("".join(" " if unicodedata.category(c) in breaks else c for c in text).split())


@lru_cache(maxsize=1024)
def font_for(text: str, size: int) -> ImageFont.FreeTypeFont:
    """Pillow's font, or if it lacks some of the characters, the first that lacks the fewest."""
    default = _open_font(None, size)
    if default is None:
        raise RuntimeError("this Pillow was built without FreeType, which drawing labels needs: pip install pillow")
    best, fewest = default, _missing(text, default)
    for name in _SYSTEM_FONTS:
        if not fewest:
            break
        font = _open_font(name, size)
        missing = _missing(text, font) if font else fewest
        if font and missing < fewest:
            best, fewest = font, missing
    return best


def _missing(text: str, font: ImageFont.FreeTypeFont) -> int:
    """How many characters the font draws as its sign for "no such character"."""

    def shape(character: str) -> tuple[object, bytes]:
        mask = font.getmask(character)
        return mask.size, bytes(mask)

    if text.isascii():
        return 0
    nothing = shape("\U0010fffe")  # is no character, so no font has it
    return sum(not c.isspace() and shape(c) == nothing for c in set(text))
