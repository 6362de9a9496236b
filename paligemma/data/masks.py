"""Masks as annotation files write them, polygons and run lengths -> pixels."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from paligemma.data.rows import short

if TYPE_CHECKING:
    from paligemma.answers.mask_codec import Box


def mask_of(segmentation: Any, size: tuple[int, int]) -> np.ndarray:
    """COCO's three ways to write a mask -> bool [H, W]: a list of polygons [x0, y0, x1, y1, ...], run lengths
    {"size": [H, W], "counts": [...]}, and the same with the counts packed into text. size: (width, height).

    ValueError for what is none of them or does not fit the picture.
    """
    from paligemma.answers.formats import rle_decode

    width, height = size
    if isinstance(segmentation, dict):
        if segmentation.get("size") != [height, width]:
            raise ValueError(f"its mask is {segmentation.get('size')}, the picture [{height}, {width}] (height, width)")
        return rle_decode({"size": [height, width], "counts": runs_of(segmentation)})
    mask = np.zeros((height, width), bool)
    for polygon in polygons_of(segmentation):
        mask |= fill(polygon, size)
    return mask


def box_around(mask: np.ndarray) -> Box:
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    if not len(rows):
        raise ValueError("its mask has no pixels")
    return float(columns[0]), float(rows[0]), float(columns[-1] + 1), float(rows[-1] + 1)


# -- polygons --


def polygons_of(segmentation: Any) -> list[np.ndarray]:
    """The corners of each polygon: float [n, 2], x and y. ValueError for what is no list of polygons of at least three
    corners. A polygon may be flat, [x0, y0, x1, y1, ...], or in pairs, and a single one in pairs may stand alone."""
    if not isinstance(segmentation, list) or not segmentation:
        raise ValueError("it has no segmentation: polygons or run lengths are needed for a mask")
    if not any(isinstance(polygon, list) for polygon in segmentation):
        raise ValueError("its segmentation is a flat list, expected a list of polygons: [[x0, y0, x1, y1, ...], ...]")
    if all(_is_pair(corner) for corner in segmentation):
        return [polygon_of(segmentation)]
    return [polygon_of(polygon) for polygon in segmentation]


def in_pairs(segmentation: Any) -> bool:
    """Whether polygons are lists of [x, y], which COCO's are not."""
    return isinstance(segmentation, list) and any(
        _is_pair(polygon) or (isinstance(polygon, list) and polygon and _is_pair(polygon[0]))
        for polygon in segmentation
    )


def polygon_of(corners: Any) -> np.ndarray:
    """One polygon, flat or in pairs -> float [n, 2]."""
    if isinstance(corners, list) and corners and all(_is_pair(corner) for corner in corners):
        corners = [value for corner in corners for value in corner]
    try:
        values = [float(value) for value in corners]
    except (TypeError, ValueError, OverflowError):
        raise ValueError(f"its polygon is {short(corners)}, expected numbers x0, y0, x1, y1, ...") from None
    if len(values) % 2:
        raise ValueError(f"its polygon has {len(values)} numbers, expected x and y of each corner")
    if len(values) < 6:
        raise ValueError(f"its polygon has {len(values) // 2} corners, expected three or more")
    if not all(abs(value) < 1e9 for value in values):
        raise ValueError("its polygon has a corner that is not finite")
    return np.array(values).reshape(-1, 2)


def _is_pair(corner: Any) -> bool:
    return isinstance(corner, list) and len(corner) == 2 and not any(isinstance(value, list) for value in corner)


def around_polygons(polygons: Sequence[np.ndarray]) -> Box:
    points = np.concatenate(polygons)
    (x0, y0), (x1, y1) = points.min(0).tolist(), points.max(0).tolist()
    return x0, y0, x1, y1


def fill(corners: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """The pixels whose centre lies inside a polygon: bool [H, W]. corners: float [n, 2], x, y; size: (width, height).

    (COCO's own tool draws the outline at five times the size, which gives the same but for single pixels on it.)
    """
    width, height = size
    flips = np.zeros((height, width + 1), np.int64)  # how often an edge is crossed on the way to a pixel from its left
    for (xa, ya), (xb, yb) in zip(corners, np.roll(corners, -1, axis=0)):
        low, high = sorted((ya, yb))
        rows = np.arange(max(0, int(np.ceil(low - 0.5))), min(height, int(np.ceil(high - 0.5))))
        if len(rows):
            x = xa + (rows + 0.5 - ya) / (yb - ya) * (xb - xa)  # where the edge crosses the middle of each row
            flips[rows, np.ceil(x - 0.5).clip(0, width).astype(np.int64)] += 1
    return flips[:, :width].cumsum(1) % 2 == 1


# -- run lengths --


def runs_of(segmentation: dict[str, Any]) -> list[int]:
    """The lengths of a COCO mask's runs, packed or not. ValueError for what is neither."""
    counts = segmentation.get("counts")
    if isinstance(counts, str):
        return unpacked(counts)
    if not isinstance(counts, list) or not all(isinstance(run, int) and run >= 0 for run in counts):
        raise ValueError(f"the counts of its mask are {short(counts)}, expected run lengths: [9650, 100, ...]")
    return counts


def unpacked(text: str) -> list[int]:
    """COCO's packed run lengths: numbers in base 32, five bits a character and low bits first, from the third on as the
    difference to the last but one."""
    counts: list[int] = []
    value = shift = 0
    for character in text:
        bits = ord(character) - 48
        if not 0 <= bits < 64:
            raise ValueError(f"its packed mask contains {character!r}")
        value |= (bits & 31) << shift
        shift += 5
        if bits & 32:
            continue  # more to come
        if bits & 16:
            value -= 1 << shift  # negative
        counts.append(value + (counts[-2] if len(counts) > 2 else 0))
        value = shift = 0
    return counts


def is_one_piece(runs: Sequence[int], height: int) -> bool:
    """Whether the pixels of a mask, given as COCO's run lengths (column by column), all hang together."""
    piece_of: dict[int, int] = {}  # a piece -> one that it was found to belong to

    def root(piece: int) -> int:
        while piece in piece_of:
            piece = piece_of[piece]
        return piece

    pieces = 0
    before: list[tuple[int, int, int]] = []  # the stretches of the last column: start, end, piece
    column_before = -2
    for column, stretches in _columns(runs, height):
        here = []
        neighbours = before if column == column_before + 1 else []
        for start, end in stretches:
            touching = {root(piece) for low, high, piece in neighbours if low <= end and start <= high}
            piece = min(touching, default=pieces)
            pieces += not touching
            piece_of.update(dict.fromkeys(touching - {piece}, piece))
            here.append((start, end, piece))
        before, column_before = here, column
    return pieces - len(piece_of) == 1


def _columns(runs: Sequence[int], height: int) -> Iterator[tuple[int, list[tuple[int, int]]]]:
    """The columns that have pixels, and in each the stretches (start, end) of pixels."""
    stretches: list[tuple[int, int]] = []
    column, at = -1, 0
    for k, run in enumerate(runs):
        start, end = at, at + run
        at = end
        while k % 2 and start < end:
            here = start // height
            if here != column:
                if stretches:
                    yield column, stretches
                column, stretches = here, []
            stop = min(end, (here + 1) * height)
            stretches.append((start - here * height, stop - here * height))
            start = stop
    if stretches:
        yield column, stretches
