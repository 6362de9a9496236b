"""Writing files so that nobody ever sees half of one."""

from __future__ import annotations

import os
import shutil
import tempfile
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


@contextmanager
def new_folder_written_whole(folder: Path) -> Iterator[Path]:
    """A folder to write to, which becomes `folder` at the end. FileExistsError if that is there and not empty."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(f"{folder} exists and is not an empty folder: choose another, or remove it")
    folder.parent.mkdir(parents=True, exist_ok=True)
    beside = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        yield beside
        beside.chmod(0o755)  # mkdtemp makes it private
        if folder.exists():
            folder.rmdir()
        beside.rename(folder)
    except BaseException:
        shutil.rmtree(beside, ignore_errors=True)
        raise


def write_text(path: Path, text: str) -> None:
    """A text file in UTF-8, whole or as it was."""
    with written_whole(path) as beside:
        beside.write_text(text, encoding="utf-8")
