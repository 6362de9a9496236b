"""Parquet and Arrow files, read one row at a time.

An Arrow file is memory-mapped, and its values are found by offsets that stand in it: a broken or hostile file would
lead a reader out of its memory. So every batch is validated in full before a value is read. Text that is not UTF-8 is
left to the row that it stands in.
"""

from __future__ import annotations

import errno
import json
import os
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from threading import Lock
from typing import Any

from paligemma.data.rows import RowError


class ArrowFiles:
    """The tables of several parquet or Arrow files as one, in order.

    Arrow files (which Hugging Face `datasets` saves) are mapped into memory, so a row costs what it holds. Parquet has
    to unpack a whole row group for it; the last two are kept, so rows in order are cheap, and in a random order dear if
    row groups are large.

    without: columns that are not read, such as that of the pictures. ImportError without pyarrow.
    """

    def __init__(self, paths: Sequence[str | os.PathLike[str]], without: Sequence[str] = ()) -> None:
        self.paths, self.without = [Path(path) for path in paths], tuple(without)
        self.kept: dict[tuple[int, int], Any] = {}  # unpacked row groups
        self.lock = Lock()  # of `kept`: `paligemma batch` opens pictures in several threads
        self.files: list[Any] = []  # record batches of an Arrow file; of a parquet file what its end says of it
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
        record = {}
        for j, name in enumerate(batch.schema.names):
            if name in self.without:
                continue
            try:
                record[name] = batch.column(j)[row].as_py()
            except UnicodeDecodeError as error:
                raise RowError(self.where(i), "not UTF-8", f"a text that is not UTF-8: {error}") from None
            except (ValueError, OverflowError):
                pass  # a value that Python has no place for, such as a date in the year 300,000: the column is missing
        return record

    def _unpacked(self, file: int, k: int) -> Any:
        with self.lock:  # else two threads would drop one group twice, or one that the other is about to return
            if (file, k) not in self.kept:
                while len(self.kept) > 1:
                    del self.kept[next(iter(self.kept))]
                import pyarrow.parquet

                # Opened for each group: a data set may have more files than a process may hold open.
                path, metadata = self.paths[file], self.files[file]
                with _refusing(path), pyarrow.parquet.ParquetFile(path, metadata=metadata) as opened:
                    names = [name for name in opened.schema_arrow.names if name not in self.without]
                    group = opened.read_row_group(k, names if self.without else None)
                    _validate(group)
                self.kept[file, k] = group
            return self.kept[file, k]

    @property
    def class_names(self) -> dict[str, list[str]]:
        """For columns that hold numbers of classes, the names by number, where Hugging Face `datasets` noted them."""
        if not self.files:
            return {}
        first = self.files[0]
        schemas = [first[0].schema] if isinstance(first, list) and first else []
        schemas += [] if isinstance(first, list) else [first.schema.to_arrow_schema()]
        try:
            features = json.loads(schemas[0].metadata[b"huggingface"])["info"]["features"]
            return {column: names for column, feature in features.items() if (names := _names_in(feature))}
        except (IndexError, KeyError, TypeError, ValueError, AttributeError, RecursionError):
            return {}

    def where(self, i: int) -> str:
        file = bisect_right(self.files_first, i) - 1
        return f"{self.paths[file]} row {i - self.files_first[file]}"

    def __getstate__(self) -> dict[str, Any]:
        return {"paths": self.paths, "without": self.without}  # open tables stay behind

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]


def _names_in(feature: Any) -> list[str] | None:
    """The names of the first ClassLabel in the description of a column."""
    if isinstance(feature, list):
        feature = dict(enumerate(feature))
    if not isinstance(feature, dict):
        return None
    if feature.get("_type") == "ClassLabel":
        names = feature.get("names")
        return names if isinstance(names, list) and all(isinstance(name, str) for name in names) else None
    return next((names for inner in feature.values() if (names := _names_in(inner))), None)


def _open_table(path: Path) -> tuple[Any, list[int]]:
    """What gives the groups of a file (a list of record batches, or the metadata of parquet), and their lengths."""
    try:
        import pyarrow
        import pyarrow.ipc
        import pyarrow.parquet
    except ImportError:
        raise ImportError(
            f"reading {path} needs the package pyarrow: pip install pyarrow, or pip install 'paligemma[parquet]'"
        ) from None

    with _refusing(path):
        with open(path, "rb") as file:
            magic = file.read(6)
        if magic.startswith(b"PAR1"):
            metadata = pyarrow.parquet.read_metadata(path)
            return metadata, [metadata.row_group(k).num_rows for k in range(metadata.num_row_groups)]
        mapped = pyarrow.memory_map(str(path))
        if magic == b"ARROW1":
            opened = pyarrow.ipc.open_file(mapped)
            batches = [opened.get_batch(k) for k in range(opened.num_record_batches)]
        else:
            batches = list(pyarrow.ipc.open_stream(mapped))
        for batch in batches:
            _validate(batch)
        return batches, [batch.num_rows for batch in batches]


@contextmanager
def _refusing(path: Path) -> Iterator[None]:
    """What pyarrow raises becomes one error that names the file."""
    import pyarrow

    try:
        yield
    except FileNotFoundError:
        raise
    except (pyarrow.ArrowException, OSError, OverflowError) as error:
        if isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE):
            raise OSError(error.errno, "too many files are open: raise the limit (ulimit -n)", str(path)) from None
        raise ValueError(
            f"{path} is not a parquet or Arrow file that can be read: {error}: write or download it again"
        ) from None


def _validate(batch: Any) -> None:
    """All offsets of a record batch or table, as bytes: text that is not UTF-8 does not refuse the whole file."""
    for column in batch.columns:
        for chunk in getattr(column, "chunks", [column]):
            chunk.view(_as_bytes(chunk.type)).validate(full=True)


def _as_bytes(kind: Any) -> Any:
    """An Arrow type with bytes in the place of text."""
    import pyarrow

    types = pyarrow.types
    if types.is_string(kind):
        return pyarrow.binary()
    if types.is_large_string(kind):
        return pyarrow.large_binary()
    if types.is_struct(kind):
        return pyarrow.struct([pyarrow.field(one.name, _as_bytes(one.type)) for one in kind])
    if types.is_list(kind):
        return pyarrow.list_(_as_bytes(kind.value_type))
    if types.is_large_list(kind):
        return pyarrow.large_list(_as_bytes(kind.value_type))
    return kind
