"""Parquet and Arrow files, read one row at a time."""

from __future__ import annotations

import os
from bisect import bisect_right
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from paligemma.data.rows import RowError


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
