"""JSON lines and CSV files of a million rows, read one row at a time.

Nothing here keeps rows in memory. When a file is opened it is read through once, and what is kept is *where* each row
begins (eight bytes a row). After that any row can be read by itself, in any order, which is all that shuffling,
resuming and splitting among processes need: they work on row numbers.

    JsonLines("my.jsonl")[7]              # {"image": ..., ...}
    CsvFile("my.csv")[7]

Each gives records, dicts as they stand in the file; `records.py` makes rows of them. `where(i)` names a record for
errors. What is wrong with a record is found when it is read, as a `RowError`; opening fails only for what concerns the
whole file.
"""

from __future__ import annotations

import csv
import io
import json
import os
from array import array
from bisect import bisect_right
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import numpy as np

from paligemma.data.rows import RowError
from paligemma.files import parse_json

BLOCK = 1 << 16  # bytes read at a time
BOM = b"\xef\xbb\xbf"  # what Windows programs like to put in front of UTF-8


class Pieces:
    """Bytes of a file by their offsets. Holds no file open, so that it can be pickled, forked and shared by threads."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self.stamp = _stamp(os.stat(self.path))
        self.block = (0, b"")  # the last bytes read and where they stand: reading in order rarely goes to the file

    def read(self, start: int, end: int) -> bytes:
        at, block = self.block
        if not at <= start <= end <= at + len(block):
            with open(self.path, "rb") as file:
                if _stamp(os.fstat(file.fileno())) != self.stamp:
                    raise OSError(f"{self.path} was changed after it was opened: open it again")
                file.seek(start)
                block = file.read(max(end - start, BLOCK))
            at, self.block = start, (start, block)
        return block[start - at : end - at]


def _stamp(stat: os.stat_result) -> tuple[int, int]:
    return stat.st_size, stat.st_mtime_ns


def text_of(data: bytes, where: str) -> str:
    try:
        return data.removeprefix(BOM).decode("utf-8")
    except UnicodeDecodeError as error:
        raise RowError(
            where,
            "not UTF-8",
            f"byte {error.start + 1} is not UTF-8 ({data[error.start]:#04x}): save the file as UTF-8",
        ) from None


# -- JSON lines --


class JsonLines:
    """One JSON object a line. Blank lines are no records; the last line needs no end, and "\\r\\n" ends one too."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.pieces = Pieces(path)
        starts, blanks, position = array("q"), array("q"), 0
        with open(path, "rb") as file:
            for line in file:
                if not (line if position else line.removeprefix(BOM)).strip():
                    blanks.append(len(starts))
                else:
                    starts.append(position)
                position += len(line)
        # Where each record begins, and where the last one ends. Blank lines count with the record before them.
        starts.append(position)
        self.starts = np.array(starts, np.int64)
        self.blanks = blanks

    def __len__(self) -> int:
        return len(self.starts) - 1

    def __getitem__(self, i: int) -> dict[str, Any]:
        if not 0 <= i < len(self):
            raise IndexError(f"there are {len(self)} rows")
        start, end = self.starts[i : i + 2].tolist()
        where = self.where(i)
        return parse_object(text_of(self.pieces.read(start, end), where).rstrip(), where)

    def where(self, i: int) -> str:
        return f"{self.pieces.path}:{i + 1 + bisect_right(self.blanks, i)}"


def parse_object(text: str, where: str) -> dict[str, Any]:
    try:
        record = parse_json(text, any_number=True)
    except json.JSONDecodeError as error:
        # Not `str(error)`: its line number would count within the line.
        raise RowError(where, "not JSON", f"not JSON: {error.msg} at character {error.pos + 1}") from None
    except ValueError as error:
        raise RowError(where, "not JSON", unreadable(error)) from None
    if not isinstance(record, dict):
        raise RowError(where, "not JSON", f'expected an object like {{"image": ...}}, got {type(record).__name__}')
    return record


def unreadable(error: ValueError) -> str:
    """What `parse_json` does not read though it is JSON."""
    deep = "nested" in str(error)
    return f"not JSON that can be read: {'nested too deeply' if deep else 'a number of thousands of digits'}"


# -- CSV --


LONGEST_CELL = 2**26  # letters: a cell may hold a picture, as a data: URL; Python's own limit is 131,072


class CsvFile:
    """A table with a header; the separator is a comma, semicolon or tab. Cells in quotes may contain line breaks."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        csv.field_size_limit(max(LONGEST_CELL, csv.field_size_limit()))
        self.pieces = Pieces(path)
        starts, lines, position = array("q"), array("q"), 0

        def counted(file: IO[bytes]) -> Iterator[str]:
            nonlocal position
            for line in file:
                text = line if position else line.removeprefix(BOM)
                position += len(line)
                # Only where records end matters here, and no byte of a longer character looks like a quote.
                yield text.decode("latin-1")

        with open(path, "rb") as file:
            first = next((line for line in file if line.removeprefix(BOM).strip()), b"")
            self.delimiter = max(",;\t", key=first.decode("latin-1").count)
            file.seek(0)
            # strict: a quote that is never closed would take all that follows into its cell without a word
            reader = csv.reader(counted(file), delimiter=self.delimiter, strict=True)
            at = before = 0
            try:
                for record in reader:  # takes the lines of one record and no more
                    if record:
                        starts.append(at)
                        lines.append(before + 1)
                    at, before = position, reader.line_num
            except csv.Error as error:
                raise ValueError(
                    f"{path}:{before + 1}: not CSV: {error} (a cell that begins with a quote ends with the next one; "
                    'inside it a quote is written "")'
                ) from None
        if not starts:
            raise ValueError(f"{path} is empty")
        starts.append(position)
        self.starts, self.lines = np.array(starts, np.int64), np.array(lines, np.int64)
        self.header = [name.strip() for name in self._cells(0)]
        if twice := sorted({name for name in self.header if name and self.header.count(name) > 1}):
            raise ValueError(f"{path}: the header names {', '.join(twice)} twice: which column is meant?")

    def _cells(self, record: int) -> list[str]:
        data = self.pieces.read(int(self.starts[record]), int(self.starts[record + 1]))
        text = text_of(data, f"{self.pieces.path}:{self.lines[record]}")
        return next(
            csv.reader(io.StringIO(text, newline=""), delimiter=self.delimiter), []
        )  # []: only a byte order mark

    def __len__(self) -> int:
        return len(self.starts) - 2

    def __getitem__(self, i: int) -> dict[str, Any]:
        if not 0 <= i < len(self):
            raise IndexError(f"there are {len(self)} rows")
        cells = self._cells(i + 1)
        if len(cells) != len(self.header):
            raise RowError(
                self.where(i),
                "missing key",
                f"{len(cells)} cells, but the header has {len(self.header)} ({', '.join(self.header)}): "
                f"a cell that contains {self.delimiter!r} needs quotes",
            )
        return dict(zip(self.header, cells))

    def where(self, i: int) -> str:
        return f"{self.pieces.path}:{self.lines[i + 1]}"
