"""A worker: a process that loads the model once and finishes shards until none is left.

It needs nothing but the folder. Its parent starts it, counts what it has done through two shared numbers, and starts
another one if it dies; if the parent dies, it ends by itself after the batch it is at.
"""

from __future__ import annotations

import multiprocessing
import signal
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from paligemma.batch import leases
from paligemma.batch.folder import RunFolder
from paligemma.batch.rows import Line
from paligemma.batch.settings import Settings
from paligemma.batch.shards import Answer, work_on
from paligemma.terminal import error_line

FAILED = 1  # exit code of a worker that cannot go on: another one would not fare better
STOPPED = 143  # of one that was asked to stop
PAUSE = 1.0  # seconds between two looks for a free shard


@dataclass(frozen=True)
class How:
    """How one worker works, which decides no answer. part: (1, 4) is the first of four parts of the shards. load: makes
    what answers rows; None: `answering.load_answer`."""

    threads: int | None = None
    device: str | None = None
    part: tuple[int, int] = (1, 1)
    draw: Path | None = None
    load: Callable[[Settings, str | None, Path | None], Answer] | None = None

    def loaded(self, settings: Settings) -> Answer:
        """What answers rows. The model, and torch with it, is imported only now."""
        # Pillow warns of pictures from half the size on at which it refuses them.
        warnings.filterwarnings("ignore", "Image size .* exceeds limit")
        if self.threads is not None:
            import torch

            torch.set_num_threads(self.threads)
        if self.load is not None:
            return self.load(settings, self.device, self.draw)
        from paligemma.batch.answering import load_answer

        return load_answer(settings, self.device, self.draw)


def shards_of(num_shards: int, part: tuple[int, int]) -> range:
    """The shards of one part of n: every n-th, so that all parts take about as long."""
    return range(part[0] - 1, num_shards, part[1])


def finish_shards(
    folder: RunFolder,
    shards: Sequence[int],
    answer: Callable[[], Answer],
    stop: Callable[[], bool],
    on_line: Callable[[Line], object],
    on_lost: Callable[[int], object] = lambda count: None,
) -> None:
    """Finishes all of these shards, or waits until others have finished them. answer: loads the model; it is called
    when there is a free shard to work on, and before its lease is taken: a process that is killed while it loads does
    not count as lost on the shard. on_line, on_lost: see `work_on`."""
    loaded: Answer | None = None
    while left := sorted(set(shards) - folder.done()):
        progress = False
        for shard in left:
            if stop():
                return
            if folder.is_done(shard):
                continue
            if loaded is None:
                if leases.is_held(folder.lease(shard)):
                    continue
                loaded = answer()
            progress |= work_on(folder, shard, loaded, stop, on_line, on_lost)
        if not progress:
            time.sleep(PAUSE)  # other processes hold what is left
        if stop():
            return


def run_worker(path: Path, how: How, counts: Any) -> None:
    """What the process does. counts: two shared numbers, of rows answered and of rows that failed."""
    stopping = []
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to all processes of a terminal; the parent passes it on
    signal.signal(signal.SIGTERM, lambda *_: stopping.append(True))
    parent = multiprocessing.parent_process()

    def stop() -> bool:
        return bool(stopping) or (parent is not None and not parent.is_alive())

    def count(line: Line) -> None:
        counts[0 if line["error"] is None else 1] += 1

    with errors_in_a_line():
        folder = RunFolder(path)
        finish_shards(folder, shards_of(folder.num_shards, how.part), lambda: how.loaded(folder.settings), stop, count)
    if stop():
        sys.exit(STOPPED)


@contextmanager
def errors_in_a_line() -> Iterator[None]:
    """An error of a worker is one line on stderr, with --debug a traceback, and its exit code is `FAILED`."""
    try:
        yield
    except Exception as error:
        if "--debug" in sys.argv:
            raise
        sys.stderr.write(f"error: {error_line(error, doing='paligemma batch')}\n")
        sys.exit(FAILED)
