"""Masks as annotation files write them, polygons and run lengths -> pixels."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

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
        if list(segmentation.get("size", ())) != [height, width]:
            raise ValueError(f"its mask is {segmentation.get('size')}, the picture [{height}, {width}] (height, width)")
        counts = segmentation["counts"]
        return rle_decode({"size": [height, width], "counts": unpacked(counts) if isinstance(counts, str) else counts})
    if not isinstance(segmentation, list) or not segmentation:
        raise ValueError("it has no segmentation: polygons or run lengths are needed for a mask")
    mask = np.zeros((height, width), bool)
    for polygon in segmentation:
        corners = np.array(polygon, np.float64).reshape(-1, 2)
        if not (np.abs(corners) < 1e9).all():
            raise ValueError("its polygon has a corner without end, or one that is no number")
        mask |= fill(corners, size)
    return mask


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


def unpacked(text: str) -> list[int]:
    """COCO's packed run lengths: numbers in base 32, five bits a character and low bits first, from the third on as the
    difference to the last but one."""
    counts: list[int] = []
    value = shift = 0
    for character in text.encode("ascii"):
        bits = character - 48
        if not 0 <= bits < 64:
            raise ValueError(f"its packed mask contains {chr(character)!r}")
        value |= (bits & 31) << shift
        shift += 5
        if bits & 32:
            continue  # more to come
        if bits & 16:
            value -= 1 << shift  # negative
        counts.append(value + (counts[-2] if len(counts) > 2 else 0))
        value = shift = 0
    return counts


def box_around(mask: np.ndarray) -> Box:
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    if not len(rows):
        raise ValueError("its mask has no pixels")
    return float(columns[0]), float(rows[0]), float(columns[-1] + 1), float(rows[-1] + 1)
