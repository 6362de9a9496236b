"""The folder of a run: everything that is known of it, so that any process on any machine can go on with it.

    answers/
      run.json              what was asked for, the fingerprint of the weights, versions, the number of rows and shards
      rows.jsonl            the frozen list: id, image, prompt. Pictures that are added meanwhile change nothing
      parts/00007.jsonl     a finished shard: its rows in order, each once. It appears by renaming, whole
      work/00007.W.jsonl    an open shard: rows that worker W has answered, as they come
      work/00007.lease      who works on it (`leases.py`)
      summary.json          how many rows were answered, errors by kind, seconds

A finished part is the truth. Everything in `work` may be lost: it only saves doing things twice.
"""

from __future__ import annotations

import json
import os
import re
import time
import uuid
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import IO, Any

from paligemma.batch import leases
from paligemma.batch.rows import InputRow, Line
from paligemma.batch.settings import Settings, differences
from paligemma.files import made_folder, read_json, write_json

RUN, ROWS, SUMMARY, SETUP = "run.json", "rows.jsonl", "summary.json", "setup.lease"

STARTED = "%Y-%m-%d %H:%M:%S"  # how run.json says when the run was begun, in local time

# How the two files are called while they are written, the second by `files.written_whole`.
BEGUN = f".{ROWS}.", f".{Path(RUN).stem}."


class AnotherRun(ValueError):
    """The folder holds a run with other options, weights or rows."""


class RunFolder:
    """A folder whose list is frozen. about: what `run.json` says."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """FileNotFoundError if there is no run in this folder, ValueError if its `run.json` cannot be read."""
        self.path = Path(path)
        if not (self.path / RUN).is_file():
            raise FileNotFoundError(f"{self.path} holds no run: there is no {RUN} in it")
        self.about = read_json(self.path / RUN)
        try:
            self.settings = Settings.from_dict(self.about["options"])
            self.num_rows, self.num_shards = int(self.about["rows"]), int(self.about["shards"])
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{self.path / RUN} is not of `paligemma batch`: {error!r}") from None

    @property
    def work(self) -> Path:
        return self.path / "work"

    def part(self, shard: int) -> Path:
        return self.path / "parts" / f"{shard:05d}.{self.settings.format}"

    def lease(self, shard: int) -> Path:
        return self.work / f"{shard:05d}.lease"

    def is_done(self, shard: int) -> bool:
        return self.part(shard).exists()

    def done(self) -> set[int]:
        """The shards that are finished, by one look at the folder. Other files in it are not of the run."""
        part = re.compile(rf"(\d{{5,}})\.{self.settings.format}")
        found = (part.fullmatch(entry.name) for entry in os.scandir(self.path / "parts"))
        return {int(name[1]) for name in found if name}

    def begun(self) -> list[tuple[int, Path]]:
        """The work files: each with its shard, of which several may have one."""
        numbered = [(re.match(r"(\d{5,})\.", path.name), path) for path in self.work.glob("*.jsonl")]
        return [(int(number[1]), path) for number, path in numbered if number]

    def lines(self, shard: int) -> Iterator[Line]:
        """The lines of a finished shard."""
        if self.settings.format == "parquet":
            from paligemma.batch.parquet import read_part

            yield from read_part(self.part(shard))
            return
        with open(self.part(shard), "rb") as file:
            yield from map(json.loads, file)

    def rows(self, shard: int) -> list[InputRow]:
        """What is asked in a shard."""
        with open(self.path / ROWS, "rb") as file:
            file.seek(self._starts[shard])
            size = self.settings.shard_size
            return [InputRow.from_json(line) for _, line in zip(range(size), file)]

    @cached_property
    def _starts(self) -> array[int]:
        """Where each shard begins in `rows.jsonl`: 8 bytes a shard, read once."""
        starts, position, size = array("q"), 0, self.settings.shard_size
        with open(self.path / ROWS, "rb") as file:
            for number, line in enumerate(file):
                if number % size == 0:
                    starts.append(position)
                position += len(line)
        return starts


# ---------------------------------------------------------------------------------------------- the beginning


def open_run(
    path: Path,
    settings: Settings,
    fingerprints: Mapping[str, Any],
    listed: Callable[[], Iterable[InputRow]],
    note: Callable[[str], object] = lambda text: None,
) -> RunFolder:
    """The run in a folder, begun here or by somebody else, now or earlier.

    fingerprints: "weights" and "list" of `run.json`. listed: gives the rows; called by the first process alone, while
    others wait for it. `AnotherRun` for a folder that holds another run, FileExistsError for a file or a folder with
    other content, ValueError for no rows or for ids that are there twice. Nothing is written then.
    """
    about = {"options": json.loads(json.dumps(settings.to_dict())), **fingerprints}
    waiting = False
    while not (path / RUN).exists():
        _check_place(path)
        with made_folder(path):
            lease = leases.take(path / SETUP)
            if lease is not None:
                try:
                    with leases.Heartbeat(lease):
                        if not (path / RUN).exists():
                            _begin(path, about, settings.shard_size, listed)
                finally:
                    leases.clear(path / SETUP)
                continue
        if not waiting:
            note(f"another process lists the rows of {path}: waiting for it")
        waiting = True
        time.sleep(0.5)
    folder = RunFolder(path)
    if found := differences(folder.about, about):
        raise AnotherRun(f"{path} holds another run: {'; '.join(found)}; choose another folder for this one")
    return folder


def _check_place(path: Path) -> None:
    if path.exists() and not path.is_dir():
        raise FileExistsError(f"{path} is a file, expected a folder to write the run to")
    if path.is_dir():
        ours = (RUN, ROWS, SETUP, "parts", "work", f"{SETUP}.", ".probe", *BEGUN)
        strange = [entry.name for entry in os.scandir(path) if not entry.name.startswith(ours)]
        if strange and not (path / RUN).exists():
            raise FileExistsError(
                f"{path} is not empty ({strange[0]} is in it) and holds no run: choose another folder"
            )


def _begin(path: Path, about: Mapping[str, Any], shard_size: int, listed: Callable[[], Iterable[InputRow]]) -> None:
    """Freezes the list. `run.json` comes last: where it is, everything is."""
    import torch

    from paligemma import __version__

    for beginning in BEGUN:  # of a process that was killed here
        for left in path.glob(f"{beginning}*"):
            left.unlink(missing_ok=True)
    beside = path / f".{ROWS}.{uuid.uuid4().hex}"
    try:
        count = write_list(beside, listed())
        for name in ("parts", "work"):
            (path / name).mkdir(exist_ok=True)
        os.replace(beside, path / ROWS)
    finally:
        beside.unlink(missing_ok=True)
    versions = {"paligemma": __version__, "torch": torch.__version__}
    numbers = {"rows": count, "shards": -(-count // shard_size)}
    write_json(path / RUN, {**about, **numbers, "versions": versions, "started": time.strftime(STARTED)})


def write_list(path: Path, rows: Iterable[InputRow]) -> int:
    """Writes the list to the disk, and returns how many rows it has. ValueError for none, or for ids that are there
    twice."""
    with open(path, "wb") as file:
        count = write_rows(file, rows)
        file.flush()
        os.fsync(file.fileno())
    if not count:
        raise ValueError("there is nothing to answer: no row was found")
    check_ids(path)
    return count


def write_rows(file: IO[bytes], rows: Iterable[InputRow]) -> int:
    """Writes the list, and returns how many rows it has."""
    count = 0
    for row in rows:
        file.write(row.to_json().encode() + b"\n")
        count += 1
    return count


def check_ids(path: Path) -> None:
    """ValueError, naming some, if two rows have one id."""
    doubles = rows_that_meet(path, lambda name: name)
    if doubles:
        counted = "one id is" if len(doubles) == 1 else f"{len(doubles):,} ids are"
        some = ", ".join(list(doubles)[:3]) + (", ..." if len(doubles) > 3 else "")
        raise ValueError(
            f"{counted} there more than once ({some}): name each picture once; of two folders with files of one name, "
            "name the folder above both; or give every row an id of its own with --rows"
        )


def rows_that_meet(path: Path, named: Callable[[str], str]) -> dict[str, list[str]]:
    """{name: the ids of the first two rows that have it}, of each name that `named` makes of the ids of several rows.

    Of a million names 64 bits each are kept. Where two of them agree the names themselves are compared.
    """
    import hashlib

    import numpy as np

    def rows() -> Iterator[tuple[int, str, str]]:
        with open(path, "rb") as file:
            for line in file:
                row = json.loads(line)["id"]
                name = named(row)
                hashed = hashlib.blake2b(name.encode("utf-8", "surrogateescape"), digest_size=8)
                yield int.from_bytes(hashed.digest(), "little"), name, row

    hashes = np.array(array("Q", (key for key, _, _ in rows())), np.uint64)
    hashes.sort()
    twice = set(hashes[1:][hashes[1:] == hashes[:-1]].tolist())
    found: dict[str, list[str]] = {}
    for key, name, row in rows() if twice else ():
        if key in twice and len(ids := found.setdefault(name, [])) < 2:
            ids.append(row)
    return {name: ids for name, ids in found.items() if len(ids) == 2}
