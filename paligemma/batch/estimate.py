"""`--dry-run`: how long a run would take, from the time of a few of its rows. Nothing is left behind."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from paligemma.batch.folder import ROWS, write_list
from paligemma.batch.rows import InputRow
from paligemma.batch.settings import Settings
from paligemma.batch.shards import Answer
from paligemma.batch.worker import shards_of

SAMPLE = 3  # batches that are answered; the first is not counted, since it pays for what is done once


def sample_of(rows: Iterator[InputRow], batch_size: int) -> tuple[int, list[InputRow]]:
    """How many rows there are, and some of them, spread over all: a few at a time are kept, every n-th."""
    kept: list[InputRow] = []
    step, count = 1, 0
    for row in rows:
        if count % step == 0:
            kept.append(row)
            if len(kept) == 2 * SAMPLE * batch_size:
                kept, step = kept[::2], step * 2
        count += 1
    spread = max(1, len(kept) // (SAMPLE * batch_size))
    return count, list(islice(kept, 0, None, spread))[: SAMPLE * batch_size]


def checked_sample(rows: Iterable[InputRow], batch_size: int) -> tuple[int, list[InputRow]]:
    """`sample_of` rows that pass the checks of a run. ValueError for rows that could not become one."""
    with TemporaryDirectory() as folder:
        path = Path(folder) / ROWS
        write_list(path, rows)
        with open(path, "rb") as file:
            return sample_of(map(InputRow.from_json, file), batch_size)


def estimate(
    count: int, sample: list[InputRow], settings: Settings, answer: Answer, workers: int, part: tuple[int, int] = (1, 1)
) -> dict[str, Any]:
    """Answers the sample, and says what all `count` rows would take, or one part of their shards. workers: assumed to
    work side by side without loss; there are no more of them than shards."""
    size = settings.shard_size
    shards = shards_of(-(-count // size), part)
    count = sum(min(size, count - size * shard) for shard in shards)
    workers = max(1, min(workers, len(shards)))
    first, rest = sample[: settings.batch_size], sample[settings.batch_size :]
    lines, seconds = [], 0.0
    for group in (first, rest):
        started = time.perf_counter()
        new = [line for _, line in answer(group, lambda: False)] if group else []
        if new:
            lines += new
            seconds = (time.perf_counter() - started) / len(new)  # that of the second group, where there is one
    return {
        "rows": count,
        "shards": len(shards),
        "asked": len(lines),
        "failed": sum(line["error"] is not None for line in lines),
        "seconds_per_row": round(seconds, 4),
        "workers": workers,
        "seconds": round(seconds * count / workers, 1),
        "bytes": round(count * sum(len(str(line)) for line in lines) / max(1, len(lines))),
    }
