"""Objects annotated in a picture -> a row: `detect cat ; dog`, and as the answer their boxes (or masks).

The labels stand in the order of the data set's classes, the boxes in the grammar's canonical order: label by label as
in the prompt, each from left to right. Every reader of annotations (COCO, YOLO, VOC, LabelMe, `objects` columns) ends
here, so what cannot be right is refused here, once: a box without area, a mask without a pixel, numbers that are none.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from paligemma.data.masks import box_around
from paligemma.data.rows import Picture, Row, RowError, short

if TYPE_CHECKING:
    from paligemma.answers.mask_codec import Box, MaskCodec

SAME_BOX = 0.5  # intersection over union from which the box and the outline of a mask count as the same object


@dataclass(frozen=True)
class Object:
    """One object of a picture. name: where it stands, for messages: "annotations[7]". outline: the corners of a box
    around its polygon, where it has one, to compare with its box. mask: bool [H, W], if masks are wanted."""

    label: str
    box: Box | None
    name: str
    mask: np.ndarray | None = None
    outline: Box | None = None
    in_shares: bool = False  # whether all four numbers of its box lie within [0, 1]


@dataclass(frozen=True)
class ObjectRows:
    """How rows are made of objects. names: the classes of the data set, in order; None: no list is known, and the
    labels of a row are sorted."""

    segment: bool = False
    every_label: bool = False
    codec: MaskCodec | None = None
    loc_scale: int = 1024
    names: Sequence[str] | None = None

    def row(
        self,
        picture: Picture | None,
        size: tuple[int, int],
        objects: Sequence[Object],
        number: int,
        where: str,
        notes: Iterable[str] = (),
        annotated_size: bool = True,
    ) -> Row:
        """size: width and height that the boxes are in pixels of. annotated_size=False: it says nothing about the
        picture's own, since the annotation gives shares of it."""
        objects = [replace(found, label=found.label.strip()) for found in objects]  # as a prompt has them
        self.check(objects, size, where)
        labels = self.labels(objects, where)
        try:
            suffix, boxes = self.answer(objects, labels, size, where)
        except RowError:
            raise
        except ValueError as error:
            raise RowError(where, "box or mask", str(error)) from None
        prefix = f"{'segment' if self.segment else 'detect'} {' ; '.join(labels)}"
        if not annotated_size:
            return Row(picture, prefix, suffix, number, where, notes=tuple(notes))
        return Row(picture, prefix, suffix, number, where, size, boxes, notes=tuple(notes))

    def labels(self, objects: Sequence[Object], where: str) -> list[str]:
        """What the prompt asks for."""
        present = {found.label for found in objects}
        known = [name.strip() for name in self.names or ()]
        names = list(dict.fromkeys([*known, *sorted(present)]))
        labels = [name for name in names if self.every_label or name in present]
        if not labels:
            raise RowError(where, "missing key", "no object, and so no label to ask for: leave the row out")
        for label in labels:
            if ";" in label:
                raise RowError(
                    where, "label with ;", f"the label {label!r} contains ';', which parts labels: rename the category"
                )
        return labels

    def answer(
        self, objects: Sequence[Object], labels: Sequence[str], size: tuple[int, int], where: str
    ) -> tuple[str, tuple[Box, ...]]:
        """The suffix, and the boxes in its order."""
        from paligemma.answers.results import Detection, Segment
        from paligemma.answers.writing import canonical_order, format_detections, format_segments

        if not self.segment:
            found = []
            for one in objects:
                if one.box is None:
                    raise RowError(where, "box or mask", f"{one.name}: it has no box")
                found.append(Detection(one.label, one.box))
            found = canonical_order(found, labels)
            return format_detections(found, size, self.loc_scale), tuple(item.box for item in found)
        segments = []
        for one in objects:
            if one.mask is None or not one.mask.any():
                raise RowError(where, "box or mask", f"{one.name}: its mask has no pixels")
            segments.append(Segment(one.label, one.box or box_around(one.mask), one.mask))
        segments = canonical_order(segments, labels)
        return format_segments(segments, size, self.loc_scale, self.codec), tuple(item.box for item in segments)

    def check(self, objects: Sequence[Object], size: tuple[int, int], where: str) -> None:
        """RowError for the first object that cannot be right."""
        for found in objects:
            if problem := problem_of(found, size):
                raise RowError(where, "box or mask", f"{found.name}: {problem}")
        if objects and min(size) > 8 and all(found.in_shares for found in objects):
            raise RowError(
                where,
                "box or mask",
                "all boxes lie within [0, 1]: are they normalised? They are expected in pixels: multiply by width and "
                f"height ({size[0]} x {size[1]})",
            )


def problem_of(found: Object, size: tuple[int, int]) -> str | None:
    """What is wrong with the box of an object, or between its box and its mask."""
    if found.box is None:
        return None
    x0, y0, x1, y1 = found.box
    if not all(map(math.isfinite, found.box)):
        return f"the box {numbers(found.box)} is not finite"
    if x1 <= x0 or y1 <= y0:
        return f"the box of {found.label!r} has no area: its corners are {numbers(found.box)} (x0, y0, x1, y1)"
    if x1 <= 0 or y1 <= 0 or x0 >= size[0] or y0 >= size[1]:
        return (
            f"the box {numbers(found.box)} of {found.label!r} lies outside of the picture, which is "
            f"{size[0]} x {size[1]}"
        )
    outline = box_around(found.mask) if found.mask is not None and found.mask.any() else found.outline
    if outline is not None and overlap(found.box, outline) < SAME_BOX:
        return (
            f"the box {numbers(found.box)} of {found.label!r} is not that of its mask, which is "
            f"{numbers(outline)}: which of the two is right?"
        )
    return None


def overlap(a: Box, b: Box) -> float:
    """Intersection over union, both boxes grown by half a pixel on each side: masks are rounded to pixels."""
    width = min(a[2], b[2]) - max(a[0], b[0]) + 1
    height = min(a[3], b[3]) - max(a[1], b[1]) + 1
    both = max(width, 0.0) * max(height, 0.0)
    areas = sum((box[2] - box[0] + 1) * (box[3] - box[1] + 1) for box in (a, b))
    return both / (areas - both)


def numbers(box: Iterable[float]) -> str:
    return ", ".join(f"{edge:g}" for edge in box)


def four_numbers(values: Any) -> tuple[float, float, float, float]:
    """ValueError for what is not four numbers; text that is a number counts."""
    try:
        found = [float(value) for value in values]
    except (TypeError, ValueError, OverflowError):
        raise ValueError(f"its box is {short(values)}, expected four numbers") from None
    if len(found) != 4 or isinstance(values, (str, dict)):
        raise ValueError(f"its box is {short(values)}, expected four numbers")
    return found[0], found[1], found[2], found[3]


def corners(x: float, y: float, width: float, height: float) -> Box:
    return x, y, x + width, y + height
