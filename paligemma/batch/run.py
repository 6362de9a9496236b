"""A run on one machine: starts workers, replaces those that die, shows how far they are, and sums up.

    summary = run_batch(open_run(...), workers=2)

The parent answers nothing itself and holds no model. What it knows of the workers' progress are two numbers each, in
shared memory: a worker that is killed can leave no half of a message there, and no lock.
"""

from __future__ import annotations

import multiprocessing
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from types import FrameType
from typing import Any

from paligemma.batch.folder import RunFolder
from paligemma.batch.shards import reopen_failed
from paligemma.batch.status import Tally, rows_begun, write_summary
from paligemma.batch.worker import FAILED, STOPPED, How, run_worker, shards_of

LOOK = 1.0  # seconds between two looks at the workers
TALLY = 10.0  # seconds between two looks at the parts of other processes
GIVE_UP = 8  # workers that may die in one place, one after the other, without a single row


@dataclass(frozen=True)
class Progress:
    """How far a run is: rows that are answered or failed, of all; errors; seconds and new rows since the first one."""

    rows: int
    total: int
    errors: int
    seconds: float
    new: int

    @property
    def rate(self) -> float:
        return self.new / self.seconds if self.seconds else 0.0

    @property
    def seconds_left(self) -> float | None:
        return (self.total - self.rows) / self.rate if self.rate else None


@dataclass(frozen=True)
class Ended:
    """How a call ended. summary: what `summary.json` says. errors: by kind, in the shards of this call. signal: the
    number of the signal that ended it, if one did. failure: why it could not go on, in a line. stopped: by
    --stop-after-errors. Each of them may have come so late that the call is complete all the same."""

    summary: dict[str, Any]
    answered: int
    errors: dict[str, int]
    complete: bool
    signal: int | None = None
    failure: str | None = None
    stopped: bool = False


class Worker:
    """A worker and its two counters. counts: answered, failed. before: how many died before it in its place, one after
    the other, without a row."""

    def __init__(self, folder: RunFolder, how: How, before: int = 0) -> None:
        context = multiprocessing.get_context("spawn")  # a forked process would inherit the state of CUDA
        self.how, self.before = how, before
        self.counts = context.Array("q", [0, 0], lock=False)
        self.process: BaseProcess = context.Process(
            target=run_worker, args=(folder.path, how, self.counts), daemon=True
        )
        with signals_ignored(signal.SIGINT):  # until it has a handler of its own
            self.process.start()

    @property
    def rows(self) -> int:
        return self.counts[0] + self.counts[1]


def run_batch(
    folder: RunFolder,
    workers: int = 1,
    how: How | None = None,
    stop_after_errors: int | None = None,
    retry_errors: bool = False,
    on_progress: Callable[[Progress], object] = lambda progress: None,
    note: Callable[[str], object] = lambda text: None,
) -> Ended:
    """Finishes the shards of a run (those of `how.part`), in as many processes as `workers` says.

    stop_after_errors: so many failed rows of this call end it. retry_errors: rows that failed earlier are tried again.
    on_progress: called about once a second. note: gets lines for a person to read.
    """
    how = how or How()
    tally = opened_tally(folder, how, retry_errors, note)
    watch = Watch(folder, tally, how, stop_after_errors, on_progress, note)
    if not tally.is_complete:
        with stop_signals() as signals:
            watch.run(min(workers, len(tally.shards) - len(tally.counted)), signals)
    tally.update()
    summary = write_summary(folder, watch.seconds, watch.new, watch.lost)
    errors = dict(sorted(tally.errors.items()))
    return Ended(summary, tally.answered, errors, tally.is_complete, watch.signal, watch.failure, watch.stopped)


def opened_tally(folder: RunFolder, how: How, retry_errors: bool, note: Callable[[str], object]) -> Tally:
    """What is done of the shards of this call, after rows that failed were opened again."""
    tally = Tally(folder, shards_of(folder.num_shards, how.part))
    if retry_errors:
        note(f"{reopen_failed(folder, tally.shards):,} rows that failed are tried again")
    begun = rows_begun(folder) if how.draw is not None else Counter()  # before the tally, see `status_of`
    tally.update()
    # The folder does not say where an earlier call drew, or whether it did.
    if how.draw is not None and (before := tally.answered + tally.beyond(begun)):
        note(f"note: {before:,} rows were answered before: they have drawings only if --draw was given then")
    return tally


class Watch:
    """Watches over the workers of one call until their shards are done."""

    def __init__(
        self,
        folder: RunFolder,
        tally: Tally,
        how: How,
        stop_after_errors: int | None,
        on_progress: Callable[[Progress], object],
        note: Callable[[str], object],
    ) -> None:
        self.folder, self.tally, self.how, self.stop_after_errors = folder, tally, how, stop_after_errors
        self.on_progress, self.note = on_progress, note
        self.gone = [0, 0]  # answered and failed by workers that have ended
        self.lost = 0
        self.signal: int | None = None
        self.failure: str | None = None
        self.stopped = False
        self.started, self.seconds = time.monotonic(), 0.0
        self.first: tuple[float, int] | None = None  # when the first rows came, and how many
        self.next_tally = TALLY
        self.before_errors = tally.errors.total()
        self.before = tally.answered + self.before_errors
        self.workers: list[Worker] = []

    @property
    def new(self) -> int:
        """Rows that the workers of this call have answered, failed ones too."""
        return sum(self.gone) + sum(worker.rows for worker in self.workers)

    @property
    def new_errors(self) -> int:
        return self.gone[1] + sum(worker.counts[1] for worker in self.workers)

    def run(self, count: int, signals: list[int]) -> None:
        """Starts `count` workers and returns when none is left. signals: numbers of signals, as they come."""
        self.workers = [Worker(self.folder, self.how_of(k)) for k in range(count)]
        asked = False
        try:
            while self.workers:
                wait([worker.process.sentinel for worker in self.workers], timeout=LOOK)
                self.seconds = time.monotonic() - self.started
                self.collect(stopping=asked or bool(signals))  # a signal may go to the workers as well
                self.report()
                if self.stop_after_errors is not None and self.new_errors >= self.stop_after_errors:
                    self.stopped = True
                self.signal = signals[0] if signals else None
                if len(signals) > 1 and signals[-1] == signal.SIGINT:
                    break  # a second Ctrl-C waits for nothing
                if (self.signal or self.failure or self.stopped) and not asked:
                    asked = True
                    for worker in self.workers:
                        worker.process.terminate()
        finally:
            for worker in self.workers:
                worker.process.kill()
                worker.process.join()
            self.seconds = time.monotonic() - self.started

    def how_of(self, number: int) -> How:
        """Workers are spread over the GPUs of this machine, if no single one was named."""
        if self.folder.settings.device not in (None, "cuda") or self.folder.settings.device_map is not None:
            return self.how
        import torch

        gpus = torch.cuda.device_count()
        return replace(self.how, device=f"cuda:{number % gpus}") if gpus > 1 else self.how

    def collect(self, stopping: bool) -> None:
        """Takes note of workers that have ended, and starts others in the place of those that died."""
        for number, worker in enumerate(list(self.workers)):
            code = worker.process.exitcode
            if code is None:
                continue
            worker.process.join()
            self.workers.remove(worker)
            self.gone = [self.gone[0] + worker.counts[0], self.gone[1] + worker.counts[1]]
            if code == FAILED:
                self.failure = "a worker could not go on: see the line above"
            elif code and not (stopping and code in (STOPPED, -signal.SIGTERM)):  # the latter: it had no handler yet
                self.replace(number, worker, code, stopping)

    def replace(self, number: int, worker: Worker, code: int, stopping: bool) -> None:
        """Starts another worker in the place of one that ended before its time. Where one after the other dies (its GPU
        may be broken), its place stays empty, and the others go on."""
        self.lost += 1
        if stopping:
            return
        died = 0 if worker.rows else worker.before + 1
        if died < GIVE_UP:
            self.note(f"a worker was lost ({killed_by(code)}); another one goes on")
            self.workers.insert(number, Worker(self.folder, worker.how, died))
        elif self.workers:
            self.note(f"{died} workers died before they had answered a row ({killed_by(code)}); the others go on")
        else:
            self.failure = f"{died} workers died before they had answered a row ({killed_by(code)})"

    def report(self) -> None:
        """Rows of other processes count too, when their parts are there. The rate is that of this call since its first
        row: before, models are loaded."""
        if self.seconds >= self.next_tally:
            self.next_tally = self.seconds + TALLY
            self.tally.update()
        found, failures = self.tally.answered, self.tally.errors.total()
        rows, errors = (
            max(self.before + self.new, found + failures),
            max(self.before_errors + self.new_errors, failures),
        )
        if self.new and self.first is None:
            self.first = self.seconds, self.new
        seconds, new = (0.0, 0) if self.first is None else (self.seconds - self.first[0], self.new - self.first[1])
        self.on_progress(Progress(min(rows, self.tally.rows), self.tally.rows, errors, seconds, new))


def killed_by(code: int) -> str:
    """What an exit code says, in words. The system's own killer uses SIGKILL."""
    if code > 0:
        return f"exit code {code}"
    try:
        name = signal.Signals(-code).name
    except ValueError:
        name = f"signal {-code}"
    return f"{name}, perhaps for want of memory" if name == "SIGKILL" else name


@contextmanager
def stop_signals(on_signal: Callable[[], object] = lambda: None) -> Iterator[list[int]]:
    """Yields a list to which the numbers of SIGINT and SIGTERM are added as they come. on_signal: called each time."""
    came: list[int] = []
    if threading.current_thread() is not threading.main_thread():  # only there signals may be handled
        yield came
        return

    def note(number: int, frame: FrameType | None) -> None:
        came.append(number)
        on_signal()

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield came
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def signals_ignored(number: int) -> Iterator[None]:
    """A process that is started inside ignores a signal until it says otherwise."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(number, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(number, before)
