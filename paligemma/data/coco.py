"""COCO's annotation files -> rows.

    {"images": [{"id": 1, "file_name": "1.jpg", "width": 640, "height": 480}, ...],
     "annotations": [{"image_id": 1, "category_id": 3, "bbox": [x, y, width, height], "segmentation": ...}, ...],
     "categories": [{"id": 3, "name": "dog"}, ...]}

One row for each picture: see `objects.py`. Crowds (`iscrowd`) are left out, since their box is not that of an object.
Some tools set the flag on every mask that they write as run lengths (CVAT, for what was painted with a brush): a mask
with such a tool's `attributes`, or in one piece, is one object and is kept; the note counts them. With captions instead
of boxes there is one row for each caption.

The file is read through once to note where everything stands; a picture's annotations are read, and its masks drawn and
encoded, when its row is asked for.
"""

from __future__ import annotations

import math
import os
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from paligemma.data.json_documents import JsonFile
from paligemma.data.masks import around_polygons, in_pairs, is_one_piece, mask_of, polygons_of, runs_of
from paligemma.data.objects import Object, ObjectRows, corners, four_numbers
from paligemma.data.rows import Row, RowError, Rows, short

if TYPE_CHECKING:
    from paligemma.answers.mask_codec import Box

OWN_CROWDS = 900_000_000_000  # COCO's own crowds have ids from here on
MOST_PIXELS = 1 << 28  # of a picture: half as much again as Pillow opens


@dataclass
class Index:
    """Where everything stands, and which annotation belongs to which picture."""

    file: JsonFile
    image_of: np.ndarray  # int64 [annotations], the number of the picture in `images`
    crowd: np.ndarray  # bool [annotations]
    single: int  # how many single objects are marked as crowds
    unclear: int  # how many crowds are masks in several pieces, and not of COCO itself
    categories: dict[Any, str]  # id -> name, in the order of the file
    roots: list[str]  # categories that have no annotations, and only hold the others


def read_index(path: Path, with_categories: bool) -> Index:
    """ValueError for annotations of pictures or categories that the file does not have: it says how many and names the
    first."""
    images: dict[Any, int] = {}
    categories: dict[Any, str] = {}
    image_ids: list[Any] = []
    category_ids: list[Any] = []
    crowd = array("b")
    parents: set[str] = set()
    single = unclear = 0

    def look(key: str, element: Any) -> None:
        nonlocal single, unclear
        before = {"images": len(images), "categories": len(categories), "annotations": len(image_ids)}.get(key)
        if before is None:
            return
        where = f"{path} {key}[{before}]"
        if not isinstance(element, dict):
            raise ValueError(f"{where}: expected an object, got {short(element)}")
        if key == "annotations":
            image_ids.append(_id(element, "image_id", where))
            category_ids.append(_id(element, "category_id", where) if with_categories else None)
            marked = bool(element.get("iscrowd", 0))
            crowd.append(marked and not is_single(element))
            single += marked and not crowd[-1]
            unclear += bool(crowd[-1]) and isinstance(element.get("segmentation"), dict) and not of_coco(element)
        elif key == "images":
            images[_id(element, "id", where)] = len(images)
        else:
            number, name = _id(element, "id", where), str(_id(element, "name", where))
            if (known := categories.setdefault(number, name)) != name:
                raise ValueError(
                    f"{where}: id {short(number)} is {name!r} here and {known!r} before: ids must be unique"
                )
            parents.add(str(element.get("supercategory")))

    file = JsonFile(path, look)
    for key in ("images", "annotations", "categories") if with_categories else ("images", "annotations"):
        if key not in file.spans:
            raise ValueError(f"{path} has no {key!r}, which a COCO file has; it has {', '.join(file.spans)}")
    if len(images) != file.count("images"):
        raise ValueError(f"{path} has several pictures with the same id: ids must be unique")
    _all_known(path, "image_id", image_ids, images, "images")
    if with_categories:
        _all_known(path, "category_id", category_ids, categories, "categories")
    used = set(category_ids)
    roots = [name for i, name in categories.items() if name in parents and i not in used]
    image_of = np.array([images[i] for i in image_ids], np.int64)
    return Index(file, image_of, np.array(crowd, bool), single, unclear, categories, roots)


def is_single(annotation: dict[str, Any]) -> bool:
    """Whether an annotation that is marked as a crowd is one object: see the head of this file."""
    mask = annotation.get("segmentation")
    if not isinstance(mask, dict) or of_coco(annotation):
        return False
    if "attributes" in annotation:
        return True
    size = mask.get("size")
    if not isinstance(size, list) or len(size) != 2 or not all(isinstance(side, int) and side > 0 for side in size):
        return False
    try:
        runs = runs_of(mask)
    except ValueError:
        return False
    return sum(runs) == size[0] * size[1] <= MOST_PIXELS and min(runs) >= 0 and is_one_piece(runs, size[0])


def of_coco(annotation: dict[str, Any]) -> bool:
    """Whether it is one of COCO's own crowds."""
    number = annotation.get("id")
    return isinstance(number, int) and number >= OWN_CROWDS


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


def objects(path: Path, folder: str, kind: str, make: ObjectRows) -> Rows:
    """`detect` or `segment` rows. make: without names, which the file has."""
    index = read_index(path, with_categories=True)
    usable = np.flatnonzero(~index.crowd)
    order = usable[np.argsort(index.image_of[usable], kind="stable")]  # annotations, picture by picture
    counts = np.bincount(index.image_of[usable], minlength=index.file.count("images"))
    images = np.arange(len(counts)) if make.every_label else np.flatnonzero(counts)
    names = [name for name in index.categories.values() if name not in index.roots]
    make = replace(make, names=names)
    reader = ObjectReader(index, images, order, np.cumsum(counts), folder, make)
    left_out = [f"{len(counts) - len(images):,} pictures without objects"] if len(images) < len(counts) else []
    left_out += [f"{int(index.crowd.sum()):,} crowds"] if index.crowd.any() else []
    note = f"{path}: COCO {'masks' if make.segment else 'boxes'}, {len(images):,} rows"
    note += f" ({' and '.join(left_out)} left out)" if left_out else ""
    if index.unclear:
        note += f"; {index.unclear:,} of the crowds may be single objects in several pieces: iscrowd 0 would say so"
    if index.single:
        note += f"; {index.single:,} single objects among those marked as crowds (iscrowd): taken"
    if make.every_label and index.roots:
        named = ", ".join(map(repr, index.roots))
        note += f"; not asked for: {named}, which no annotation has and other categories stand below"
    return Rows(kind, note, len(images), reader, [path])


@dataclass(frozen=True)
class ObjectReader:
    index: Index
    images: np.ndarray  # int64 [rows], number of each row's picture
    order: np.ndarray  # int64, annotations picture by picture
    ends: np.ndarray  # int64 [pictures], where in `order` the annotations of a picture end
    folder: str
    make: ObjectRows

    def __call__(self, i: int) -> Row:
        file = self.index.file
        number = int(self.images[i])
        image = file.element("images", number)
        where = f"{file.pieces.path} images[{number}] (id {image['id']})"
        places = self.order[int(self.ends[number - 1]) if number else 0 : int(self.ends[number])].tolist()
        size = _size(image, where, needed=True)
        annotations = [(place, file.element("annotations", place)) for place in places]
        found = [self.object(place, annotation, size, where) for place, annotation in annotations]
        paired = any(in_pairs(annotation.get("segmentation")) for _, annotation in annotations)
        picture = _path(self.folder, image, where)
        return self.make.row(picture, size, found, i, where, notes=["pairs"] if paired and self.make.segment else [])

    def object(self, place: int, annotation: dict[str, Any], size: tuple[int, int], where: str) -> Object:
        name = f"annotations[{place}]"
        label = self.index.categories[annotation["category_id"]]
        given, segmentation = annotation.get("bbox"), annotation.get("segmentation")
        try:
            box = corners(*four_numbers(given)) if given else None
            mask = mask_of(segmentation, size) if self.make.segment else None
        except ValueError as error:
            raise RowError(where, "box or mask", f"{name}: {error}") from None
        in_shares = box is not None and all(0 <= value <= 1 for value in four_numbers(given))
        return Object(label, box, name, mask, _outline(segmentation), in_shares)


def _outline(segmentation: Any) -> Box | None:
    """The box around polygons that can be read. Run lengths, which would have to be unpacked, are not looked at."""
    try:
        return around_polygons(polygons_of(segmentation))
    except ValueError:
        return None


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
