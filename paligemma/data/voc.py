"""Pascal VOC's files -> rows: an XML file for each picture, with the corners of its boxes.

    <annotation><filename>7.jpg</filename><size><width>640</width><height>480</height></size>
      <object><name>dog</name><bndbox><xmin>8</xmin><ymin>9</ymin><xmax>90</xmax><ymax>80</ymax></bndbox></object>
    </annotation>

Corners are taken as they stand. (VOC itself counts pixels from 1, most tools from 0: a difference of one pixel.)
"""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from paligemma.data.objects import Object, ObjectRows, four_numbers
from paligemma.data.rows import Row, RowError, Rows

if TYPE_CHECKING:
    from paligemma.answers.mask_codec import Box


PICTURES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")  # endings, in the order they are tried


def objects(files: Sequence[Path], images: str | None, make: ObjectRows) -> Rows:
    annotated = [file for file in files if make.every_label or has_objects(file)]
    if make.every_label:
        found = {name for file in files for name in names_in(file)}
        make = replace(make, names=sorted(found))
    place = str(files[0]) if len(files) == 1 else str(files[0].parent)
    left_out = len(files) - len(annotated)
    note = f"{place}: Pascal VOC, {len(annotated):,} rows"
    note += f" ({left_out:,} pictures without objects left out)" if left_out else ""
    return Rows("voc", note, len(annotated), XmlReader(annotated, images, make), annotated)


def has_objects(file: Path) -> bool:
    """True for a broken file too: its row says what is wrong with it. Most files need not be parsed for this."""
    if b"<object" in file.read_bytes():
        return True
    try:
        return parsed(file).find("object") is not None
    except RowError:
        return True


def names_in(file: Path) -> list[str]:
    """The labels in a file; none of one that is broken, which its row says."""
    try:
        return [found.findtext("name", "").strip() for found in parsed(file).findall("object")]
    except RowError:
        return []


def parsed(file: Path) -> ElementTree.Element:
    where = str(file)
    content = file.read_bytes()
    ascii_part = content.replace(b"\0", b"")  # of UTF-16 too
    if b"<!DOCTYPE" in ascii_part or b"<!ENTITY" in ascii_part:
        raise RowError(where, "not XML", "it declares a DOCTYPE or entities, which no annotation needs")
    try:
        return ElementTree.fromstring(content)
    except (ElementTree.ParseError, ValueError, LookupError, RecursionError) as error:
        raise RowError(where, "not XML", f"not XML: {error}") from None


@dataclass(frozen=True)
class XmlReader:
    files: Sequence[Path]
    images: str | None
    make: ObjectRows

    def __call__(self, i: int) -> Row:
        file = self.files[i]
        where = str(file)
        root = parsed(file)
        size = size_of(root, where)
        found = [self.object(element, k, where) for k, element in enumerate(root.findall("object"))]
        return self.make.row(self.picture(file, root), size, found, i, where)

    def object(self, element: ElementTree.Element, k: int, where: str) -> Object:
        label = element.findtext("name", "").strip()
        if not label:
            raise RowError(where, "missing key", f"object {k} has no name")
        box = element.find("bndbox")
        if box is None:
            raise RowError(where, "box or mask", f"object {k} ({label!r}) has no bndbox")
        given = [box.findtext(edge) for edge in ("xmin", "ymin", "xmax", "ymax")]
        try:
            corners: Box = four_numbers(given)
        except ValueError as error:
            raise RowError(where, "box or mask", f"object {k}: {error} (xmin, ymin, xmax, ymax)") from None
        return Object(label, corners, f"object {k}", in_shares=all(0 <= edge <= 1 for edge in corners))

    def picture(self, file: Path, root: ElementTree.Element) -> str:
        """By its name in the file, or else by the file's own: beside it, or in JPEGImages or images."""
        name = root.findtext("filename", "").strip().replace("\\", "/").rpartition("/")[2] or f"{file.stem}.jpg"
        beside = [file.parent, file.parent.parent / "JPEGImages", file.parent.parent / "images"]
        folders = [Path(self.images)] if self.images is not None else beside
        names = [name, *(file.stem + ending for ending in PICTURES)]
        places = [folder / name for name in names for folder in folders]
        return str(next((place for place in places if place.is_file()), places[0]))


def size_of(root: ElementTree.Element, where: str) -> tuple[int, int]:
    given = root.findtext("size/width"), root.findtext("size/height")
    try:
        width, height = (int(float(side or "")) for side in given)
        if width < 1 or height < 1:
            raise ValueError
    except (ValueError, OverflowError):
        raise RowError(
            where, "missing key", f"boxes need the picture's width and height, got {given[0]} x {given[1]}"
        ) from None
    return width, height
