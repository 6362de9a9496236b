"""A table with a line for each box -> a row for each picture.

filename,width,height,class,xmin,ymin,xmax,ymax
7.jpg,640,480,dog,8,9,90,80
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from paligemma.data.objects import Object, ObjectRows, four_numbers
from paligemma.data.picture_checks import upright_size
from paligemma.data.records import LABEL, first_of, picture_of
from paligemma.data.rows import Row, RowError, Rows
from paligemma.data.text_files import CsvFile

EDGES = ("xmin", "ymin", "xmax", "ymax")


def is_box_table(table: CsvFile) -> bool:
    return set(EDGES) <= {name.lower() for name in table.header}


def objects(path: Path, table: CsvFile, folder: str, make: ObjectRows) -> Rows:
    """All lines are read once, to gather those of each picture, which may stand anywhere."""
    lines: dict[Any, list[int]] = {}
    for i in range(len(table)):
        try:
            lines.setdefault(picture_of(table[i], folder, None, table.where(i)), []).append(i)
        except RowError:
            lines[i] = [i]  # a row of its own, which says what is wrong with it
    reader = BoxReader(table, list(lines.values()), folder, make)
    note = f"{path}: CSV with a line for each of {len(table):,} boxes, {len(lines):,} rows"
    return Rows("csv", note, len(lines), reader, [path])


@dataclass(frozen=True)
class BoxReader:
    table: CsvFile
    lines: Sequence[Sequence[int]]
    folder: str
    make: ObjectRows

    def __call__(self, i: int) -> Row:
        where = self.table.where(self.lines[i][0])
        records = [(k, self.table[k]) for k in self.lines[i]]
        picture = picture_of(records[0][1], self.folder, None, where)
        if picture is None or isinstance(picture, tuple):
            raise RowError(where, "missing key", "boxes need one picture that they are in")
        found = [self.object(record, self.table.where(k), where) for k, record in records]
        try:
            size = int(float(records[0][1]["width"])), int(float(records[0][1]["height"]))
        except (KeyError, ValueError, OverflowError):
            size = upright_size(picture) or (0, 0)
        if min(size) < 1:
            raise RowError(where, "missing picture", f"no picture at {picture!r}, whose size the boxes need")
        return self.make.row(picture, size, found, i, where)

    def object(self, record: dict[str, Any], line: str, where: str) -> Object:
        which = "" if line == where else f"{line}: "
        label = str(first_of(record, LABEL, ()) or "").strip()
        if not label:
            raise RowError(where, "missing key", f"{which}no label: expected a column class or label")
        try:
            corners = four_numbers([first_of(record, (edge,), ()) for edge in EDGES])
        except ValueError as error:
            raise RowError(where, "box or mask", f"{which}{error} (xmin, ymin, xmax, ymax)") from None
        return Object(label, corners, line, in_shares=all(0 <= edge <= 1 for edge in corners))
