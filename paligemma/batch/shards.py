"""One shard of a run, from its rows to its part. The other files of this folder are built around this one.

1. Take the lease. If another process holds it, the shard is not ours.
2. Read what workers before us left in `work`: every whole line of a row is kept, a torn last line is not.
3. Answer the rows that are missing. Each line is appended to a work file of our own as it comes.
4. Write the part beside its place and rename it. Then remove the work files and the leases.

Whatever is killed at whatever moment, the next holder finds either the part or the work files. Two holders at a time
(which leases prevent, but for machines that sleep) would write the same part twice.

A row may kill its worker, by a picture that breaks a decoder or by its size. So a shard that lost two workers is
answered row by row, and before each row its id is noted. A row that was noted twice and never answered killed two
workers alone: it becomes an error, and the shard goes on.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeAlias

from paligemma.batch import leases
from paligemma.batch.folder import RUN, RunFolder
from paligemma.batch.rows import InputRow, Line, failed

LOSSES = 2  # workers lost on a shard before its rows are answered one by one; workers lost by one row alone

# Answers rows, in any order, each with its line; it stops between two batches when it is asked to.
Answer: TypeAlias = Callable[[Sequence[InputRow], Callable[[], bool]], Iterator[tuple[InputRow, Line]]]


def work_on(
    folder: RunFolder,
    shard: int,
    answer: Answer,
    stop: Callable[[], bool] = lambda: False,
    on_line: Callable[[Line], object] = lambda line: None,
    on_lost: Callable[[int], object] = lambda count: None,
) -> bool:
    """Finishes a shard, if it is free. True if its part is there in the end.

    stop: asked between two batches. on_line: gets every new line. on_lost: gets the number of workers that were lost
    while they worked on the shard, once it is done. OSError if the folder can no longer be written to.
    """
    lease = leases.take(folder.lease(shard))
    if lease is None:
        return False
    try:
        with leases.Heartbeat(lease):
            if not folder.is_done(shard):  # it may have been finished before we had the lease
                _finish(folder, shard, lease, answer, stop, on_line)
            if not folder.is_done(shard):
                return False
            for left in folder.work.glob(f"{shard:05d}.*.jsonl"):
                left.unlink(missing_ok=True)
            leases.clear(folder.lease(shard))
            on_lost(lease.losses)
            return True
    finally:
        lease.release()


def _finish(
    folder: RunFolder,
    shard: int,
    lease: leases.Lease,
    answer: Answer,
    stop: Callable[[], bool],
    on_line: Callable[[Line], object],
) -> None:
    """Steps 2 to 4. Without a part at the end it was asked to stop, or lost its lease."""
    rows = folder.rows(shard)
    left = read_work(folder, shard, rows)
    lines = left.lines
    missing = [row for row in rows if row.id not in lines]
    with _work_file(folder, shard) as append:

        def keep(row: InputRow, line: Line) -> None:
            line["attempts"] += left.attempts[row.id]
            lines[row.id] = append(line)
            on_line(line)

        alone = lease.losses >= LOSSES
        for row in [row for row in missing if left.tried[row.id] >= LOSSES]:
            message = f"{left.tried[row.id]} workers were killed while they answered this row alone"
            keep(row, failed(row, "internal", message, 1 + left.tried[row.id]))
        # A row that was noted before comes last. So whoever kills workers at random hits another row each time, and
        # only a row that is guilty is noted twice.
        later = sorted((row for row in missing if row.id not in lines), key=lambda row: left.tried[row.id])
        for group in [[row] for row in later] if alone else [later]:
            if alone:
                append({"trying": group[0].id})
            for row, line in answer(group, stop):
                if not _is_ours(folder, lease):
                    return
                keep(row, line)
            if stop():
                break
    if len(lines) == len(rows) and _is_ours(folder, lease):
        write_part(folder, shard, (lines[row.id] for row in rows))


def _is_ours(folder: RunFolder, lease: leases.Lease) -> bool:
    """Whether we may go on. FileNotFoundError if somebody removed the folder: files that are open in it can still be
    written to, and nobody would ever see them."""
    if not lease.check():
        if not (folder.path / RUN).exists():
            raise FileNotFoundError(f"{folder.path} was removed while it was written to")
        return False
    return True


# ---------------------------------------------------------------------------------------------- files of a shard


class Work:
    """What earlier workers left of a shard. lines: by id, the line of a row that was answered. tried: how often a row
    was begun alone and not finished. attempts: how often a row failed that is to be tried again."""

    def __init__(self) -> None:
        self.lines: dict[str, bytes] = {}
        self.tried: Counter[str] = Counter()
        self.attempts: Counter[str] = Counter()


def read_work(folder: RunFolder, shard: int, rows: Iterable[InputRow]) -> Work:
    """Reads all work files of a shard. What is torn or is no line of this shard is left out."""
    known, work = {row.id for row in rows}, Work()
    for path in sorted(folder.work.glob(f"{shard:05d}.*.jsonl")):
        for line in path.read_bytes().splitlines(keepends=True):
            entry = _whole(line)
            if entry.get("trying") in known:
                work.tried[entry["trying"]] += 1
            elif entry.get("again") in known:
                work.attempts[entry["again"]] = max(work.attempts[entry["again"]], int(entry["attempts"]))
            elif entry.get("id") in known:
                work.lines.setdefault(entry["id"], line)
    for name in work.lines:
        del work.tried[name]
    return work


def _whole(line: bytes) -> dict[str, Any]:
    """The object in a line; an empty one for a line that is torn."""
    if line.endswith(b"\n"):
        try:
            entry = json.loads(line)
        except ValueError:
            return {}
        if isinstance(entry, dict):
            return entry
    return {}


@contextmanager
def _work_file(folder: RunFolder, shard: int) -> Iterator[Callable[[Line], bytes]]:
    """Yields a function that appends one line, in the system's hands when it returns. It returns the line."""
    path = folder.work / f"{shard:05d}.{leases.unique_name()}.jsonl"
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)

    def append(line: Line) -> bytes:
        data = json.dumps(line, ensure_ascii=False).encode() + b"\n"
        written = 0
        while written < len(data):  # a full disk may take a part of it, and then refuse the rest
            written += os.write(descriptor, data[written:])
        return data

    try:
        yield append
    finally:
        os.close(descriptor)


def write_part(folder: RunFolder, shard: int, lines: Iterable[bytes]) -> None:
    """Writes a part, whole. The rename comes after the content is on the disk."""
    path = folder.part(shard)
    beside = path.with_name(f".{shard:05d}.{leases.unique_name()}{path.suffix}")
    try:
        if folder.settings.format == "parquet":
            from paligemma.batch.parquet import write_parquet

            write_parquet(beside, map(json.loads, lines))
        else:
            with open(beside, "wb") as file:
                file.writelines(lines)
        _to_disk(beside)
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


def _to_disk(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def reopen_failed(folder: RunFolder, shards: Iterable[int]) -> int:
    """Lets the rows that failed in these shards, finished or not, be tried once more. How many there are."""
    begun = {shard for shard, _ in folder.begun()}
    return sum(reopen(folder, shard) for shard in sorted((folder.done() | begun) & set(shards)))


def reopen(folder: RunFolder, shard: int) -> int:
    """The same for one shard. A shard that another process works on is left alone: 0.

    Everything is read under the lease. One new work file gets what is known of the shard, before the old work files and
    the part are removed, so nothing is lost in between.
    """
    lease = leases.take(folder.lease(shard))
    if lease is None:
        return 0
    try:
        old = sorted(folder.work.glob(f"{shard:05d}.*.jsonl"))
        done = folder.is_done(shard)
        left = Work() if done else read_work(folder, shard, folder.rows(shard))
        lines = list(folder.lines(shard)) if done else [json.loads(line) for line in left.lines.values()]
        failures = sum(line["error"] is not None for line in lines)
        if not failures:
            return 0
        with _work_file(folder, shard) as append:
            for line in lines:
                again = line["error"] is not None
                append({"again": line["id"], "attempts": line["attempts"]} if again else line)
            for name, attempts in left.attempts.items():
                append({"again": name, "attempts": attempts})
            for name in left.tried.elements():
                append({"trying": name})
        for path in old:
            path.unlink(missing_ok=True)
        if done:
            folder.part(shard).unlink()
        return failures
    finally:
        lease.release()
