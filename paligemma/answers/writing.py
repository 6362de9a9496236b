"""Boxes and masks -> the answer that says them, to train on. The inverse of `parsing.py`, where the syntax stands."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import torch

from paligemma.answers.mask_codec import NUM_TOKENS, MaskCodec, crop
from paligemma.answers.parsing import NUM_LOC, check_scales
from paligemma.answers.results import Detection, ItemT, Segment

NUM_SEG = 128
SEPARATOR = " ; "


def format_detections(items: Sequence[Detection], image_size: tuple[int, int], loc_scale: int = 1024) -> str:
    """The answer that says these boxes: the suffix to train on, and the inverse of `parse`. "" for no boxes.

    The order is the caller's; `canonical_order` gives the one to use if there is no reason for another. image_size is
    (W, H); parts of a box outside of the picture are cut off. Coordinates are rounded to the nearest of the 1024 bins.
    Reading the answer with the same `loc_scale` gives every coordinate to within half a bin; with 1024, next to the
    right and bottom border, to within one (there is no location 1024). A box that is thinner than a bin is widened to
    one, since a box needs two different coordinates; that may cost another half bin, at that border another one.

    ValueError, naming the box: coordinates that are not finite, x1 < x0 or y1 < y0, a box wholly outside of the
    picture, a label with ";", "<", ">" or a line break, which could not be read back.
    """
    check_scales(image_size, loc_scale)
    return SEPARATOR.join(
        _box_text(item, i, image_size, loc_scale) + label_text(item.label) for i, item in enumerate(items)
    )


def format_segments(
    items: Sequence[Segment], image_size: tuple[int, int], loc_scale: int = 1024, codec: MaskCodec | None = None
) -> str:
    """As `format_detections`, with sixteen codes after each box: the item's own `codes`, or else its `mask` (bool
    [H, W]) cut out by its box and encoded by `codec`. ValueError, naming the item, if neither can be had.
    """
    check_scales(image_size, loc_scale)
    boxes = [_box_text(item, i, image_size, loc_scale) for i, item in enumerate(items)]  # checks boxes and labels
    crops = []
    for i, item in enumerate(items):
        if item.codes is not None:
            continue
        if item.mask is None or codec is None:
            raise ValueError(f"{_name(item, i)} has no codes, and to make them takes its mask and a codec")
        if item.mask.shape != (image_size[1], image_size[0]):
            raise ValueError(
                f"the mask of {_name(item, i)} is {list(item.mask.shape)}, the picture "
                f"[{image_size[1]}, {image_size[0]}] (height, width)"
            )
        crops.append(crop(item.mask, item.box))
    encoded: Iterator[list[int]] = iter([])
    if crops and codec is not None:
        with torch.no_grad():
            encoded = iter(codec.encode(torch.from_numpy(np.stack(crops))).tolist())

    texts = []
    for i, item in enumerate(items):
        codes = item.codes if item.codes is not None else next(encoded)
        if len(codes) != NUM_TOKENS or not all(0 <= code < NUM_SEG for code in codes):
            raise ValueError(f"{_name(item, i)} needs {NUM_TOKENS} codes in 0..{NUM_SEG - 1}, got {codes}")
        texts.append(boxes[i] + "".join(f"<seg{code:03d}>" for code in codes) + label_text(item.label))
    return SEPARATOR.join(texts)


def canonical_order(items: Iterable[ItemT], labels: Iterable[str] | None = None) -> list[ItemT]:
    """Class by class, each from left to right by the left edge, equal ones from top to bottom.

    `labels` is the order of the classes, for training usually that of the prompt; classes that it does not have, or all
    of them without it, come in the order of their first item.
    """
    items = list(items)
    classes = list(dict.fromkeys([*(labels or []), *(item.label for item in items)]))
    rank = {label: i for i, label in enumerate(classes)}
    return sorted(items, key=lambda item: (rank[item.label], item.box[0], item.box[1]))


def _name(item: Detection | Segment, index: int) -> str:
    return f"item {index} ({item.label!r}, box {tuple(item.box)})"


def label_text(label: str) -> str:
    label = label.strip()
    return " " + label if label else ""


def check_label(label: str, name: str) -> None:
    bad = re.search(r"[;<>\n]", label)
    if bad:
        raise ValueError(f"{name} contains {bad[0]!r}, which a label cannot: it would be read as its end or as a token")


def _box_text(item: Detection | Segment, index: int, image_size: tuple[int, int], loc_scale: int) -> str:
    name = _name(item, index)
    check_label(item.label.strip(), f"the label of {name}")
    if len(item.box) != 4 or not all(math.isfinite(edge) for edge in item.box):
        raise ValueError(f"{name}: a box is four finite numbers x0, y0, x1, y1")
    x0, y0, x1, y1 = item.box
    if x1 < x0 or y1 < y0:
        raise ValueError(f"{name} is inverted: a box is x0, y0, x1, y1 with x0 <= x1 and y0 <= y1")
    width, height = image_size
    if x1 < 0 or y1 < 0 or x0 > width or y0 > height:
        raise ValueError(f"{name} lies outside of the picture, which is {width} x {height}")
    left, right = _bins(x0 / width * loc_scale, x1 / width * loc_scale)
    top, bottom = _bins(y0 / height * loc_scale, y1 / height * loc_scale)
    return f"<loc{top:04d}><loc{left:04d}><loc{bottom:04d}><loc{right:04d}>"


def _bins(low: float, high: float) -> tuple[int, int]:
    """Two coordinates in bins -> two different bins in order, as near as can be."""
    last = NUM_LOC - 1
    first, second = (round(min(max(edge, 0), last)) for edge in (low, high))
    if first < second:
        return first, second
    middle = (low + high) / 2
    first = first if middle >= first else first - 1  # widen to the side on which the box lies
    first = min(max(first, 0), last - 1)
    return first, first + 1
