"""Files of a million rows, read one row at a time.

Nothing here keeps rows in memory. When a file is opened it is read through once, and what is kept is *where* each row
begins (eight bytes a row, sixteen for JSON). After that any row can be had by itself, in any order, which is all that
shuffling, resuming and sharing out among processes need: they work on row numbers.

    JsonLines("my.jsonl")[7]              # {"image": ..., ...}
    CsvFile("my.csv")[7]
    JsonFile("coco.json").element("annotations", 7)
    ArrowFiles([path, ...])[7]            # parquet, and the folders of Hugging Face `datasets`

Each gives records, dicts as they stand in the file; `data.py` makes rows of them. `where(i)` names a record for errors.
What is wrong with a record is found when it is read, as a `RowError`; opening fails only for what concerns the whole
file.
"""

from __future__ import annotations

import csv
import io
import json
import os
import re
from array import array
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np

BLOCK = 1 << 16  # bytes read at a time
BOM = b"\xef\xbb\xbf"  # what Windows programs like to put in front of UTF-8


class RowError(ValueError):
    """A row that cannot be used. `where`: "my.jsonl:12"; `problem`: one of `data_check.PROBLEMS`."""

    def __init__(self, where: str, problem: str, message: str) -> None:
        message = printable(message)  # it may quote what is in the row
        super().__init__(where, problem, message)  # what pickle hands to __init__ again
        self.where, self.problem, self.message = where, problem, message

    def __str__(self) -> str:
        return f"{self.where}: {self.message}"


def printable(text: str) -> str:
    """Halves of characters, which no stream takes, as "\\ud83d"."""
    return text if text.isascii() else text.encode("utf-8", "backslashreplace").decode("utf-8")


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
        record = json.loads(text)
    except json.JSONDecodeError as error:
        # Not `str(error)`: its line number would count within the line.
        raise RowError(where, "not JSON", f"not JSON: {error.msg} at character {error.pos + 1}") from None
    except (RecursionError, ValueError) as error:
        raise RowError(where, "not JSON", _unreadable(error)) from None
    if not isinstance(record, dict):
        raise RowError(where, "not JSON", f'expected an object like {{"image": ...}}, got {type(record).__name__}')
    return record


def _unreadable(error: Exception) -> str:
    """What Python does not read though it is JSON."""
    deep = isinstance(error, RecursionError)
    return f"not JSON that can be read: {'nested too deeply' if deep else 'a number of thousands of digits'}"


# -- one large JSON document --


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
            return json.loads(self.pieces.read(start, end))
        except (RecursionError, ValueError) as error:
            raise RowError(self.where(key, i), "not JSON", _unreadable(error)) from None

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


# -- CSV --


class CsvFile:
    """A table with a header; the separator is a comma, semicolon or tab. Cells in quotes may contain line breaks."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.pieces = Pieces(path)
        starts, lines, position = array("q"), array("q"), 0

        def counted(file: IO[bytes]) -> Iterator[str]:
            nonlocal position
            for line in file:
                position += len(line)
                # Only where records end matters here, and no byte of a longer character looks like a quote.
                yield line.decode("latin-1")

        with open(path, "rb") as file:
            first = file.readline()
            self.delimiter = max(",;\t", key=first.decode("latin-1").count)
            file.seek(0)
            reader = csv.reader(counted(file), delimiter=self.delimiter)
            at = before = 0
            try:
                for record in reader:  # takes the lines of one record and no more
                    if record:
                        starts.append(at)
                        lines.append(before + 1)
                    at, before = position, reader.line_num
            except csv.Error as error:
                raise ValueError(f"{path}:{before + 1}: not CSV: {error}") from None
        if not starts:
            raise ValueError(f"{path} is empty")
        starts.append(position)
        self.starts, self.lines = np.array(starts, np.int64), np.array(lines, np.int64)
        self.header = [name.strip() for name in self._cells(0)]

    def _cells(self, record: int) -> list[str]:
        data = self.pieces.read(int(self.starts[record]), int(self.starts[record + 1]))
        text = text_of(data, f"{self.pieces.path}:{self.lines[record]}")
        return next(csv.reader(io.StringIO(text, newline=""), delimiter=self.delimiter))

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


# -- Arrow and parquet --


class ArrowFiles:
    """The tables of several parquet or Arrow files as one, in order.

    Arrow files (which Hugging Face `datasets` saves) are mapped into memory, so a row costs what it holds. Parquet has
    to unpack a whole row group for it; the last two are kept, so rows in order are cheap, and in a random order dear if
    row groups are large.

    ImportError without pyarrow.
    """

    def __init__(self, paths: Sequence[str | os.PathLike[str]]) -> None:
        self.paths = [Path(path) for path in paths]
        self.kept: dict[tuple[int, int], Any] = {}  # unpacked row groups
        self.files: list[Any] = []
        self.groups: list[tuple[int, int]] = []  # (file, record batch or row group in it)
        self.firsts = [0]  # row with which each group begins, and the number of rows
        self.files_first: list[int] = []  # row with which each file begins
        for number, path in enumerate(self.paths):
            file, lengths = _open_table(path)
            self.files.append(file)
            self.files_first.append(self.firsts[-1])
            for k, length in enumerate(lengths):
                if length:
                    self.groups.append((number, k))
                    self.firsts.append(self.firsts[-1] + length)

    def __len__(self) -> int:
        return self.firsts[-1]

    def __getitem__(self, i: int) -> dict[str, Any]:
        if not 0 <= i < len(self):
            raise IndexError(f"there are {len(self)} rows")
        group = bisect_right(self.firsts, i) - 1
        file, k = self.groups[group]
        batch = self.files[file][k] if isinstance(self.files[file], list) else self._unpacked(file, k)
        row = i - self.firsts[group]
        try:
            return {name: batch.column(j)[row].as_py() for j, name in enumerate(batch.schema.names)}
        except UnicodeDecodeError as error:
            raise RowError(self.where(i), "not UTF-8", f"a text that is not UTF-8: {error}") from None

    def _unpacked(self, file: int, k: int) -> Any:
        if (file, k) not in self.kept:
            while len(self.kept) > 1:
                del self.kept[next(iter(self.kept))]
            self.kept[file, k] = self.files[file].read_row_group(k)
        return self.kept[file, k]

    def where(self, i: int) -> str:
        file = bisect_right(self.files_first, i) - 1
        return f"{self.paths[file]} row {i - self.files_first[file]}"

    def __getstate__(self) -> dict[str, Any]:
        return {"paths": self.paths}  # open tables stay behind

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["paths"])  # type: ignore[misc]


def _open_table(path: Path) -> tuple[Any, list[int]]:
    """What gives the groups of a file (a list of record batches, or a ParquetFile), and their lengths."""
    try:
        import pyarrow
        import pyarrow.ipc
        import pyarrow.parquet
    except ImportError:
        raise ImportError(f"reading {path} needs the package pyarrow: pip install pyarrow") from None

    try:
        with open(path, "rb") as file:
            magic = file.read(6)
        if magic.startswith(b"PAR1"):
            parquet = pyarrow.parquet.ParquetFile(path)
            return parquet, [parquet.metadata.row_group(k).num_rows for k in range(parquet.num_row_groups)]
        mapped = pyarrow.memory_map(str(path))
        if magic == b"ARROW1":
            opened = pyarrow.ipc.open_file(mapped)
            batches = [opened.get_batch(k) for k in range(opened.num_record_batches)]
        else:
            batches = list(pyarrow.ipc.open_stream(mapped))
    except pyarrow.ArrowException as error:
        raise ValueError(f"{path} is not a parquet or Arrow file that can be read: {error}") from None
    return batches, [batch.num_rows for batch in batches]
