"""Writing files so that nobody ever sees half of one."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """A place beside `path` to write to; what lies there at the end takes the place of `path`.

    After an error, on a full disk for example, nothing is left of it and an old file is as it was. Folders on the way
    are made. The name ends as `path` does, since some writers look at that.

        with written_whole(path) as beside:
            beside.write_text(text)
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}")
    try:
        yield beside
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """A text file in UTF-8, whole or as it was."""
    with written_whole(path) as beside:
        beside.write_text(text, encoding="utf-8")
