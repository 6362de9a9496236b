"""One large JSON document, such as COCO's annotations, read one element at a time.

    JsonFile("coco.json").element("annotations", 7)

The file is read through once when it is opened, and what is kept is where each element begins and ends (sixteen bytes).
"""

from __future__ import annotations

import json
import os
import re
from array import array
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

import numpy as np

from paligemma.data.rows import RowError, short
from paligemma.data.text_files import BLOCK, BOM, Pieces, unreadable
from paligemma.files import parse_json


class JsonFile:
    """The arrays at the top of a JSON document: {"images": [...], "annotations": [...]}, or one [...] (its key: "").

    `look(key, element)` is called once for each element while the file is read through, to collect what an index needs.
    A value that is not an array counts as one of a single element.

    ValueError, with the place, if it is not JSON.
    """

    def __init__(self, path: str | os.PathLike[str], look: Callable[[str, Any], None] | None = None) -> None:
        self.pieces = Pieces(path)
        spans: dict[str, array[int]] = {}
        for key, element, start, end in elements_of(path):
            span = spans.setdefault(key, array("q"))
            if end > start:
                span.extend((start, end))
                if look is not None:
                    look(key, element)
        # start and end of each element, in bytes: int64 [elements, 2]
        self.spans = {key: np.array(flat, np.int64).reshape(-1, 2) for key, flat in spans.items()}

    def count(self, key: str) -> int:
        return len(self.spans.get(key, ()))

    def element(self, key: str, i: int) -> Any:
        start, end = self.spans[key][i].tolist()
        try:
            return parse_json(self.pieces.read(start, end), any_number=True)
        except ValueError as error:
            raise RowError(self.where(key, i), "not JSON", unreadable(error)) from None

    def where(self, key: str, i: int) -> str:
        return f"{self.pieces.path} {key or 'row'}[{i}]"


def _int_or_digits(digits: str) -> int | str:
    """Python makes no int of more than 4,300 digits. Such a number stays text; those beside it are still numbers, so
    that an id is found by what it is."""
    try:
        return int(digits)
    except ValueError:
        return digits


class _Window:
    """A stretch of a JSON file, moved along it.

    Decoded as Latin-1, one character a byte: what JSON is built of is ASCII, so a place in the text is a place in the
    file, and no character can be cut in two.
    """

    decoder = json.JSONDecoder()
    lenient = json.JSONDecoder(parse_int=_int_or_digits)  # slower
    space = re.compile(r"[ \t\n\r]*")

    def __init__(self, file: IO[bytes], name: str) -> None:
        self.file, self.name = file, name
        self.start = len(BOM) if file.read(len(BOM)) == BOM else 0  # of the text, in the file
        file.seek(self.start)
        self.text, self.at = "", 0

    def grow(self) -> bool:
        """Forget what has been read and read on; each time more, for an element that is longer than a block."""
        rest = self.text[self.at :]
        more = self.file.read(max(16 * BLOCK, len(rest)))
        self.start, self.text, self.at = self.start + self.at, rest + more.decode("latin-1"), 0
        return bool(more)

    def next(self) -> str:
        """The next character that is not a space; "" at the end of the file."""
        while True:
            self.at = self.space.match(self.text, self.at).end()  # type: ignore[union-attr]
            if self.at < len(self.text):
                return self.text[self.at]
            if not self.grow():
                return ""

    def take(self, wanted: str) -> str:
        found = self.next()
        if not found or found not in wanted:
            raise self.error(f"expected {' or '.join(wanted)}, found {found or 'its end'}")
        self.at += 1
        return found

    def value(self) -> tuple[Any, int, int]:
        """The next value and the bytes it stands in."""
        if not self.next():
            raise self.error("it ends early")
        decoder = self.decoder
        while True:
            try:
                value, end = decoder.raw_decode(self.text, self.at)
            except json.JSONDecodeError as error:
                # Cut off by the end of the window, or really wrong?
                cut_off = error.msg.startswith("Unterminated") or error.pos > len(self.text) - 16
                wrong = self.error(error.msg, error.pos)  # before the text moves
                if cut_off and self.grow():
                    continue
                raise wrong from None
            except RecursionError:
                raise self.error("nested too deeply") from None
            except ValueError:  # too many digits: the row's problem, when it is read, and not the file's
                decoder = self.lenient
                continue
            if len(self.text) - end < 3 and self.text[end : end + 1] not in tuple(" \t\n\r,]}") and self.grow():
                continue  # a number that might go on: "1" of "1e+16"
            piece, start = self.text[self.at : end], self.start + self.at
            self.at = end
            if not piece.isascii():
                try:
                    value = decoder.decode(piece.encode("latin-1").decode("utf-8", "surrogatepass"))
                except UnicodeDecodeError:
                    raise self.error("it is not UTF-8") from None
            return value, start, start + len(piece)

    def error(self, what: str, at: int | None = None) -> ValueError:
        place = self.start + (self.at if at is None else at)
        return ValueError(f"{self.name} is not JSON: {what} at byte {place + 1}")


def elements_of(path: str | os.PathLike[str]) -> Iterator[tuple[str, Any, int, int]]:
    """(key, element, start, end) of every element of the arrays at the top, one at a time. Before the first of an array
    comes an empty stretch, so that an empty array is known to be there."""
    with open(path, "rb") as file:
        yield from _elements(_Window(file, str(path)))


def _elements(window: _Window) -> Iterator[tuple[str, Any, int, int]]:
    def of_array(key: str) -> Iterator[tuple[str, Any, int, int]]:
        window.take("[")
        yield key, None, 0, 0
        if window.next() == "]":
            window.take("]")
            return
        while True:
            yield (key, *window.value())
            if window.take(",]") == "]":
                return

    if window.next() == "[":
        yield from of_array("")
    else:
        window.take("{")
        while window.next() != "}":
            key, _, _ = window.value()
            if not isinstance(key, str):
                raise window.error("a key that is not a string")
            window.take(":")
            if window.next() == "[":
                yield from of_array(key)
            else:
                yield (key, *window.value())
            if window.next() != "}":
                window.take(",")
        window.take("}")
    if window.next():
        raise window.error("more than one document")


class JsonRecords:
    """The objects of one JSON list."""

    def __init__(self, path: Path) -> None:
        self.file = JsonFile(path)
        self.key = next((key for key in ("", "data", "annotations", "questions") if key in self.file.spans), "")
        if not self.file.count(self.key):
            raise ValueError(f'{path} has no list of rows: expected [{{"image": ...}}, ...] or {{"data": [...]}}')

    def __len__(self) -> int:
        return self.file.count(self.key)

    def __getitem__(self, i: int) -> dict[str, Any]:
        if not 0 <= i < len(self):
            raise IndexError(f"there are {len(self)} rows")
        record = self.file.element(self.key, i)
        if not isinstance(record, dict):
            raise RowError(self.where(i), "not JSON", f"expected an object, got {short(record)}")
        return record

    def where(self, i: int) -> str:
        return self.file.where(self.key, i)
