"""Finding the files of a benchmark in the folder where it was unpacked.

Every data set has its own layout, and people unpack archives in different places. A reader lists the paths that a file
may have, the usual one first; the first that exists is used.
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
    """folder: of the data set. task: the benchmark's name. split: "val", ... side: of the picture that the model sees,
    in pixels; only `widgetcap` needs it, which draws into the resized picture."""

    folder: Path
    task: str
    split: str
    side: int = 224

    def file(self, *names: str) -> Path:
        """The first of these that exists. FileNotFoundError, naming all of them, if none does."""
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
        """The values in a file with one JSON value on each line."""
        path = self.file(*names)
        with open(path, encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    try:
                        yield parse_json(line)
                    except ValueError as error:
                        raise ValueError(f"{path}:{number} is not JSON: {error}") from None

    def picture(self, *names: str) -> str:
        """The path of a picture. If none exists, the first: the error of opening it will name it."""
        found = next((name for name in names if (self.folder / name).is_file()), names[0])
        # Interned: a batch encodes a picture once for all questions about it if their paths are the same object.
        return sys.intern(str(self.folder / found))
