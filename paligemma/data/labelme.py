"""LabelMe's files -> rows: a JSON file for each picture, with labelled shapes.

    {"imagePath": "7.jpg", "imageWidth": 640, "imageHeight": 480,
     "shapes": [{"label": "dog", "shape_type": "polygon", "points": [[8, 9], [90, 9], [50, 80]], "group_id": null}]}

Polygons, rectangles, circles and masks are objects; shapes of one label and one `group_id` are parts of one. Points
and lines have no area and are named as problems.
"""

from __future__ import annotations

import base64
import binascii
import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from paligemma.data.masks import around_polygons, box_around, fill, polygon_of
from paligemma.data.objects import Object, ObjectRows
from paligemma.data.rows import Picture, Row, RowError, Rows, short
from paligemma.files import LARGEST_JSON, read_bytes

NO_SHAPES = re.compile(rb'"shapes"\s*:\s*\[\s*\]')


def objects(files: Sequence[Path], kind: str, images: str | None, make: ObjectRows) -> Rows:
    annotated = [file for file in files if make.every_label or has_shapes(file)]
    if make.every_label:
        make = replace(make, names=sorted({name for file in files for name in names_in(file)}))
    place = str(files[0]) if len(files) == 1 else str(files[0].parent)
    left_out = len(files) - len(annotated)
    note = f"{place}: LabelMe {'masks' if make.segment else 'boxes'}, {len(annotated):,} rows"
    note += f" ({left_out:,} pictures without objects left out)" if left_out else ""
    return Rows(kind, note, len(annotated), ShapeReader(annotated, images, make), annotated)


def has_shapes(file: Path) -> bool:
    """Told by the head of the file, in whose end the whole picture may stand; where it stands first, by all of it."""
    with open(file, "rb") as content:
        head = content.read(1 << 16)
        return not NO_SHAPES.search(head if b'"shapes"' in head[:-1000] else head + content.read(LARGEST_JSON))


def names_in(file: Path) -> list[str]:
    """The labels in a file; none of one that is broken, which its row says."""
    try:
        shapes = parsed(file).get("shapes")
    except RowError:
        return []
    return [str(shape.get("label")) for shape in shapes or () if isinstance(shape, dict) and shape.get("label")]


def parsed(file: Path) -> dict[str, Any]:
    where = str(file)
    try:
        content = json.loads(read_bytes(file, LARGEST_JSON))  # whatever its encoding
    except (ValueError, RecursionError) as error:
        raise RowError(where, "not JSON", f"not JSON: {error}") from None
    if not isinstance(content, dict) or not isinstance(content.get("shapes"), list):
        raise RowError(where, "missing key", "no list of shapes, which a file of LabelMe has")
    return content


@dataclass(frozen=True)
class ShapeReader:
    files: Sequence[Path]
    images: str | None
    make: ObjectRows

    def __call__(self, i: int) -> Row:
        file = self.files[i]
        where = str(file)
        content = parsed(file)
        size = content.get("imageWidth"), content.get("imageHeight")
        if not all(isinstance(side, int) and 0 < side < 1 << 20 for side in size):
            raise RowError(where, "missing key", f"expected imageWidth and imageHeight, got {size[0]} x {size[1]}")
        parts: dict[Any, list[tuple[int, dict[str, Any]]]] = {}  # the shapes of each object
        for k, shape in enumerate(content["shapes"]):
            if not isinstance(shape, dict) or not isinstance(shape.get("label"), str) or not shape["label"].strip():
                raise RowError(where, "missing key", f"shapes[{k}] has no label: {short(shape)}")
            group = shape.get("group_id")
            key = (shape["label"], group) if isinstance(group, (int, str)) else k
            parts.setdefault(key, []).append((k, shape))
        found = [self.object(group, size, where) for group in parts.values()]  # type: ignore[arg-type]
        return self.make.row(self.picture(file, content, where), size, found, i, where)  # type: ignore[arg-type]

    def object(self, group: list[tuple[int, dict[str, Any]]], size: tuple[int, int], where: str) -> Object:
        outlines, masks = [], []
        for k, shape in group:
            try:
                if shape.get("shape_type") == "mask":
                    masks.append(painted(shape, size))
                    x0, y0, x1, y1 = box_around(masks[-1])
                    outlines.append(np.array([(x0, y0), (x1, y1)], float))
                else:
                    outlines.append(outline_of(shape))
                    masks += [fill(outlines[-1], size)] if self.make.segment else []
            except ValueError as error:
                raise RowError(where, "box or mask", f"shapes[{k}]: {error}") from None
        k, shape = group[0]
        mask = np.logical_or.reduce(masks) if self.make.segment else None
        return Object(shape["label"].strip(), around_polygons(outlines), f"shapes[{k}]", mask)

    def picture(self, file: Path, content: dict[str, Any], where: str) -> Picture:
        """Beside the file (or in `images`), or else the copy that the file holds."""
        name = content.get("imagePath")
        if isinstance(name, str) and name:
            name = name.replace("\\", "/")
            place = file.parent / name if self.images is None else Path(self.images) / name.rpartition("/")[2]
            if place.is_file() or not content.get("imageData"):
                return str(place)
        try:
            return base64.b64decode(content["imageData"], validate=True)
        except (KeyError, TypeError, ValueError, binascii.Error):
            raise RowError(where, "missing key", "no imagePath, and no imageData that can be read") from None


def painted(shape: dict[str, Any], size: tuple[int, int]) -> np.ndarray:
    """The pixels of a mask, bool [H, W]: a PNG file in base64, whose first pixel lies at the first of the points.
    ValueError for one that cannot be read or has no pixels."""
    from paligemma.images import load_image  # and torch with it, which takes 150 MB: only where there are masks

    points, width, height = shape.get("points"), *size
    try:
        x, y = (int(value) for value in points[0])  # type: ignore[index]
        picture = load_image(base64.b64decode(shape["mask"], validate=True), max_pixels=width * height)
    except (KeyError, TypeError, ValueError, OverflowError, OSError, IndexError) as error:
        raise ValueError(f"its mask cannot be read ({type(error).__name__}: {short(str(error))})") from None
    inside = np.asarray(picture)[:, :, 0] > 0
    if x < 0 or y < 0 or y + inside.shape[0] > height or x + inside.shape[1] > width:
        raise ValueError(f"its mask at {x}, {y} reaches out of the picture, which is {width} x {height}")
    if not inside.any():
        raise ValueError("its mask has no pixels")
    whole = np.zeros((height, width), bool)
    whole[y : y + inside.shape[0], x : x + inside.shape[1]] = inside
    return whole


def outline_of(shape: dict[str, Any]) -> np.ndarray:
    """The corners of a shape: float [n, 2]. ValueError for one without area."""
    kind, points = shape.get("shape_type", "polygon"), shape.get("points")
    if kind == "polygon":
        return polygon_of(points)
    if kind not in ("rectangle", "circle"):
        raise ValueError(f"a shape of the type {kind!r} has no area: expected polygon, rectangle, circle or mask")
    # Two points: opposite corners, or the centre and a point on the circle.
    given = points if isinstance(points, list) else []
    flat = [value for point in given for value in (point if isinstance(point, list) else [point, None])]
    if len(flat) != 4 or not all(isinstance(value, (int, float)) and math.isfinite(value) for value in flat):
        raise ValueError(f"a {kind} has two points, got {short(points)}")
    x0, y0, x1, y1 = flat
    if kind == "rectangle":
        return np.array([(x0, y0), (x1, y0), (x1, y1), (x0, y1)], float)
    radius, angles = math.hypot(x1 - x0, y1 - y0), np.linspace(0, 2 * np.pi, 64, endpoint=False)
    return np.stack([x0 + radius * np.cos(angles), y0 + radius * np.sin(angles)], 1)
