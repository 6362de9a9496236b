"""COCO's annotation files -> rows.

    {"images": [{"id": 1, "file_name": "1.jpg", "width": 640, "height": 480}, ...],
     "annotations": [{"image_id": 1, "category_id": 3, "bbox": [x, y, width, height], "segmentation": ...}, ...],
     "categories": [{"id": 3, "name": "dog"}, ...]}

One row for each picture: `detect cat ; dog` with its labels in the order of `categories`, and as the answer its boxes
in the grammar's canonical order (label by label as in the prompt, each from left to right). Crowds (`iscrowd`) are left
out: their box is not that of an object. With captions instead of boxes there is one row for each caption.

The file is read through once to note where everything stands; a picture's annotations are read, and its masks drawn and
encoded, when its row is asked for.
"""

from __future__ import annotations

import math
import os
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from paligemma.data.json_documents import JsonFile
from paligemma.data.masks import box_around, mask_of
from paligemma.data.rows import Row, RowError, Rows, short

if TYPE_CHECKING:
    from paligemma.answers.mask_codec import Box, MaskCodec


MOST_PIXELS = 1 << 28  # of a picture: half as much again as Pillow opens


@dataclass
class Index:
    """Where everything stands, and which annotation belongs to which picture."""

    file: JsonFile
    image_of: np.ndarray  # int64 [annotations], the number of the picture in `images`
    crowd: np.ndarray  # bool [annotations]
    categories: dict[Any, str]  # id -> name, in the order of the file


def read_index(path: Path, with_categories: bool) -> Index:
    """ValueError for annotations of pictures or categories that the file does not have: it says how many and names the
    first."""
    images: dict[Any, int] = {}
    categories: dict[Any, str] = {}
    image_ids: list[Any] = []
    category_ids: list[Any] = []
    crowd = array("b")

    def look(key: str, element: Any) -> None:
        before = {"images": len(images), "categories": len(categories), "annotations": len(image_ids)}.get(key)
        if before is None:
            return
        where = f"{path} {key}[{before}]"
        if not isinstance(element, dict):
            raise ValueError(f"{where}: expected an object, got {short(element)}")
        if key == "annotations":
            image_ids.append(_id(element, "image_id", where))
            category_ids.append(_id(element, "category_id", where) if with_categories else None)
            crowd.append(bool(element.get("iscrowd", 0)))
        elif key == "images":
            images[_id(element, "id", where)] = len(images)
        else:
            categories[_id(element, "id", where)] = str(_id(element, "name", where))

    file = JsonFile(path, look)
    for key in ("images", "annotations", "categories") if with_categories else ("images", "annotations"):
        if key not in file.spans:
            raise ValueError(f"{path} has no {key!r}, which a COCO file has; it has {', '.join(file.spans)}")
    if len(images) != file.count("images"):
        raise ValueError(f"{path} has several pictures with the same id: ids must be unique")
    _all_known(path, "image_id", image_ids, images, "images")
    if with_categories:
        _all_known(path, "category_id", category_ids, categories, "categories")
    return Index(file, np.array([images[i] for i in image_ids], np.int64), np.array(crowd, bool), categories)


def _id(element: dict[str, Any], key: str, where: str) -> Any:
    value = element.get(key)
    if not isinstance(value, (int, float, str)):
        raise ValueError(f"{where} has no {key!r}: expected a number or text, got {short(value)}")
    return value


def _all_known(path: Path, key: str, ids: Sequence[Any], known: dict[Any, Any], where: str) -> None:
    unknown = [number for number, i in enumerate(ids) if i not in known]
    if unknown:
        raise ValueError(
            f"{path}: {len(unknown)} of {len(ids)} annotations have an unknown {key}, the first is "
            f"annotations[{unknown[0]}] with {short(ids[unknown[0]])}: add it to {where!r}, or remove them"
        )


# -- boxes and masks --


def objects(
    path: Path,
    folder: str,
    kind: str,
    every_label: bool,
    codec: MaskCodec | str | os.PathLike[str] | None,
    loc_scale: int,
) -> Rows:
    """`detect` or `segment` rows."""
    if kind == "coco-segment" and codec is None:
        raise ValueError(
            "masks need a codec to become tokens, the model's or the official one: --model NAME (tiny has its own); in "
            "Python codec='vae-oid.npz', or MaskCodec.load() to fetch it"
        )
    index = read_index(path, with_categories=True)
    usable = np.flatnonzero(~index.crowd)
    order = usable[np.argsort(index.image_of[usable], kind="stable")]  # annotations, picture by picture
    counts = np.bincount(index.image_of[usable], minlength=index.file.count("images"))
    images = np.arange(len(counts)) if every_label else np.flatnonzero(counts)
    ends = np.cumsum(counts)
    reader = ObjectReader(index, images, order, ends, folder, kind == "coco-segment", every_label, codec, loc_scale)
    left_out = [f"{len(counts) - len(images):,} pictures without objects"] if len(images) < len(counts) else []
    left_out += [f"{int(index.crowd.sum()):,} crowds"] if index.crowd.any() else []
    note = f"{path}: COCO {'masks' if reader.segment else 'boxes'}, {len(images):,} rows"
    note += f" ({' and '.join(left_out)} left out)" if left_out else ""
    return Rows(kind, note, len(images), reader, [path])


@dataclass
class ObjectReader:
    index: Index
    images: np.ndarray  # int64 [rows], number of each row's picture
    order: np.ndarray  # int64, annotations picture by picture
    ends: np.ndarray  # int64 [pictures], where in `order` the annotations of a picture end
    folder: str
    segment: bool
    every_label: bool
    codec: Any
    loc_scale: int

    def __call__(self, i: int) -> Row:
        from paligemma.answers.results import Detection, Segment
        from paligemma.answers.writing import canonical_order, format_detections, format_segments

        file, names = self.index.file, self.index.categories
        number = int(self.images[i])
        image = file.element("images", number)
        where = f"{file.pieces.path} images[{number}] (id {image['id']})"
        annotations = self.order[int(self.ends[number - 1]) if number else 0 : int(self.ends[number])]
        size = _size(image, where, needed=True)

        items: list[Detection | Segment] = []
        for place in annotations.tolist():
            annotation = file.element("annotations", place)
            label = names[annotation["category_id"]]
            try:
                if self.segment:
                    mask = mask_of(annotation.get("segmentation"), size)
                    items.append(Segment(label, _box(annotation) or box_around(mask), mask))
                else:
                    box = _box(annotation)
                    if box is None:
                        raise ValueError("it has no bbox")
                    items.append(Detection(label, box))
            except (ValueError, TypeError, KeyError, OverflowError) as error:
                raise RowError(where, "box or mask", f"annotations[{place}]: {error}") from None

        present = {item.label for item in items}
        labels = [name for name in dict.fromkeys(names.values()) if self.every_label or name in present]
        for label in labels:
            if ";" in label:
                raise RowError(
                    where, "label with ;", f"the label {label!r} contains ';', which parts labels: rename the category"
                )
        items = canonical_order(items, labels)
        boxes = tuple(item.box for item in items)
        for item in items:
            x0, y0, x1, y1 = item.box
            if x0 <= x1 and y0 <= y1 and (x1 < 0 or y1 < 0 or x0 > size[0] or y0 > size[1]):
                raise RowError(
                    where,
                    "box or mask",
                    f"the box {item.box} of {item.label!r} lies outside of the picture, which is {size[0]} x {size[1]}",
                )
        try:
            if self.segment:
                if isinstance(self.codec, (str, os.PathLike)):
                    from paligemma.answers.mask_codec import MaskCodec

                    self.codec = MaskCodec.load(Path(self.codec))
                suffix = format_segments(items, size, self.loc_scale, self.codec)  # type: ignore[arg-type]
            else:
                suffix = format_detections(items, size, self.loc_scale)  # type: ignore[arg-type]
        except ValueError as error:
            raise RowError(where, "box or mask", str(error)) from None
        prefix = f"{'segment' if self.segment else 'detect'} {' ; '.join(labels)}"
        return Row(_path(self.folder, image, where), prefix, suffix, i, where, size, boxes)


def _path(folder: str, image: dict[str, Any], where: str) -> str:
    name = image.get("file_name")
    if not isinstance(name, str) or not name:
        raise RowError(where, "missing key", f"no file_name; it has {', '.join(image)}")
    return os.path.join(folder, name)


def _size(image: dict[str, Any], where: str, needed: bool = False) -> Any:
    """(width, height) in pixels."""
    size = image.get("width"), image.get("height")
    sides = [int(side) for side in size if isinstance(side, (int, float)) and 1 <= side < math.inf]
    if len(sides) == 2 and sides[0] * sides[1] <= MOST_PIXELS:
        return sides[0], sides[1]
    if not needed:
        return None
    given = f"{short(size[0])} x {short(size[1])}"
    if len(sides) == 2:
        raise RowError(
            where,
            "unreadable picture",
            f"width and height are {given}: more pixels than a picture that can be opened has; expected "
            f"{MOST_PIXELS:,} at most: correct them, or make the picture smaller",
        )
    raise RowError(where, "missing key", f"boxes need the picture's width and height, got {given}")


def _box(annotation: dict[str, Any]) -> Box | None:
    """COCO's [x, y, width, height] -> x0, y0, x1, y1."""
    bbox = annotation.get("bbox")
    if not bbox:
        return None
    x, y, width, height = map(float, bbox)
    return x, y, x + width, y + height


# -- captions --


@dataclass
class CaptionReader:
    index: Index
    folder: str
    language: str

    def __call__(self, i: int) -> Row:
        file = self.index.file
        where = f"{file.pieces.path} annotations[{i}]"
        caption = file.element("annotations", i).get("caption")
        if not isinstance(caption, str):
            raise RowError(where, "missing key", "no caption")
        image = file.element("images", int(self.index.image_of[i]))
        picture = _path(self.folder, image, where)
        return Row(picture, f"caption {self.language}", caption.strip(), i, where, _size(image, where))


def captions(path: Path, folder: str, language: str) -> Rows:
    index = read_index(path, with_categories=False)
    count, reader = len(index.image_of), CaptionReader(index, folder, language)
    return Rows("coco-captions", f"{path}: COCO captions, {count:,} rows", count, reader, [path])
