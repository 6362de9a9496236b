"""A benchmark as it was downloaded and unpacked: finding its files in a folder.

Every data set has its own layout, and people unpack archives in different places. A reader names a file by the paths
under which it may lie, the usual one first; the first that exists is taken.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from paligemma.files import parse_json, read_json_value

LARGEST = 2**32  # bytes of one file: the annotations of the largest benchmarks have hundreds of megabytes


@dataclass(frozen=True)
class Source:
    """folder: the data set. task: the benchmark's name. split: "val", ... side: of the model's picture in pixels, for
    the one benchmark that draws into it."""

    folder: Path
    task: str
    split: str
    side: int = 224

    def file(self, *names: str) -> Path:
        """FileNotFoundError, naming all places, if there is none."""
        for name in names:
            if (self.folder / name).is_file():
                return self.folder / name
        raise FileNotFoundError(f"{self.folder} has no {' and no '.join(names)}, as the data set is published")

    def has(self, name: str) -> bool:
        return (self.folder / name).is_file()

    def json(self, *names: str) -> Any:
        """The value in a JSON file. ValueError for a file that is not JSON."""
        return read_json_value(self.file(*names), LARGEST)

    def lines(self, *names: str) -> Iterator[Any]:
        """The objects of a file with one JSON object a line."""
        path = self.file(*names)
        with open(path, encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    try:
                        yield parse_json(line)
                    except ValueError as error:
                        raise ValueError(f"{path}:{number} is not JSON: {error}") from None

    def picture(self, *names: str) -> str:
        """The path of a picture; the first name where none exists, so that the error of opening it names that."""
        found = next((name for name in names if (self.folder / name).is_file()), names[0])
        # One object for equal paths: a picture is encoded once for all the questions about it in a batch.
        return sys.intern(str(self.folder / found))
