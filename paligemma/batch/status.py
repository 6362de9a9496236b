"""How far a run is, from what lies in its folder: `paligemma batch status`, the progress line, `summary.json`."""

from __future__ import annotations

import errno
import json
import time
from collections import Counter
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from paligemma.batch import leases
from paligemma.batch.folder import RUN, SUMMARY, RunFolder
from paligemma.files import read_json, write_json


@dataclass
class Tally:
    """Counts the rows of finished shards. A part is read once, when it appears."""

    folder: RunFolder
    shards: range
    counted: dict[int, tuple[int, Counter[str]]] = field(default_factory=dict)  # by shard: answered, errors by kind

    def update(self) -> None:
        for shard in sorted(self.folder.done() & set(self.shards) - self.counted.keys()):
            try:
                self.counted[shard] = count_lines(self.folder.lines(shard))
            except FileNotFoundError:
                continue  # another process opened it again, with --retry-errors

    @property
    def answered(self) -> int:
        return sum(answered for answered, _ in self.counted.values())

    @property
    def errors(self) -> Counter[str]:
        return sum((errors for _, errors in self.counted.values()), Counter())

    @property
    def rows(self) -> int:
        """Rows in all of its shards."""
        size, last = self.folder.settings.shard_size, self.folder.num_shards - 1
        missing = size * self.folder.num_shards - self.folder.num_rows  # the last shard may be shorter
        return size * len(self.shards) - (missing if last in self.shards else 0)

    def beyond(self, begun: Counter[int]) -> int:
        """How many of the rows that are begun, see `rows_begun`, are in its shards that are not finished."""
        return sum(rows for shard, rows in begun.items() if shard in self.shards and shard not in self.counted)

    @property
    def is_complete(self) -> bool:
        return len(self.counted) == len(self.shards)


def count_lines(lines: Iterable[dict[str, Any]]) -> tuple[int, Counter[str]]:
    """How many rows were answered, and the errors by kind."""
    answered, errors = 0, Counter[str]()
    for line in lines:
        if line["error"] is None:
            answered += 1
        else:
            errors[line["error"]["kind"]] += 1
    return answered, errors


def rows_begun(folder: RunFolder) -> Counter[int]:
    """How many rows stand in the work files of each shard. They are kept, and not answered again."""
    begun = Counter[int]()
    for shard, path in folder.begun():
        with suppress(FileNotFoundError):  # its shard was finished a moment ago
            lines = path.read_bytes().rpartition(b"\n")[0].splitlines()  # a torn last line does not count
            begun[shard] += sum(line.startswith(b'{"id"') for line in lines)
    return begun


def is_worked_on(lease: Path) -> bool:
    """Who may only read the folder cannot see how old the lease of another machine is: it counts as held."""
    try:
        return not leases.is_abandoned(lease)
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise
        return True


def status_of(folder: RunFolder) -> dict[str, Any]:
    """The state of a run, for `--json`."""
    begun = rows_begun(folder)
    tally = Tally(folder, range(folder.num_shards))
    tally.update()  # after the work files, so that the rows of a shard that is finished meanwhile are counted once
    held = {path.name.split(".")[0] for path in folder.work.glob("*.lease*") if is_worked_on(path)}
    return {
        "folder": str(folder.path),
        "rows": folder.num_rows,
        "answered": tally.answered,
        "errors": dict(tally.errors),
        "shards": folder.num_shards,
        "shards_done": len(tally.counted),
        "shards_worked_on": len(held),
        "rows_in_open_shards": tally.beyond(begun),
        "complete": tally.is_complete,
        "options": folder.about["options"],
        "started": folder.about.get("started"),
    }


def write_summary(folder: RunFolder, seconds: float, rows: int, lost: int) -> dict[str, Any]:
    """Writes `summary.json`, and returns what it says. seconds, rows, lost: of this call (lost: workers that died);
    seconds and workers are added to those of earlier calls."""
    begun = rows_begun(folder)  # before the tally, see `status_of`
    tally = Tally(folder, range(folder.num_shards))
    tally.update()
    try:
        before = read_json(folder.path / SUMMARY)
    except (OSError, ValueError):
        before = {}
    summary = {
        "rows": folder.num_rows,
        "answered": tally.answered,
        "errors": dict(sorted(tally.errors.items())),
        "shards": folder.num_shards,
        "shards_done": len(tally.counted),
        "rows_in_open_shards": tally.beyond(begun),
        "complete": tally.is_complete,
        "seconds": round(before.get("seconds", 0) + seconds, 3),
        "rows_per_second": round(rows / seconds, 3) if rows and seconds else before.get("rows_per_second", 0),
        "workers_lost": before.get("workers_lost", 0) + lost,
        "written": time.strftime("%Y-%m-%d %H:%M:%S"),
    }
    if (folder.path / RUN).exists():  # not where somebody removed the folder
        write_json(folder.path / SUMMARY, summary)
    return json.loads(json.dumps(summary))
