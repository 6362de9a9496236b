"""The one thread that runs the model, and the bridge between it and the event loop.

    event loop                          this thread, again and again
    submit(job)  -> waiting -> ...      1. calls between two steps (looking inside the model)
    cancel(job)                         2. jobs that wait: pictures are encoded, rows handed to the engine
    job.news     <- news of a step      3. one step of the engine; what is new goes to the event loop, all at once

The two share, under a lock, the lists of waiting jobs and calls, and `cancelled` and `ticket` of a job; the cache of
features has a lock of its own. What a job has come to is written on the event loop alone. The lists cannot grow without
limit, since each job and each call has a place (`service.py`). Where this thread ends by an error, every job is told,
and the server reports that it failed.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch

from paligemma.answers.parsing import NUM_LOC
from paligemma.devices import is_out_of_memory
from paligemma.engine import MOST_FAILURES, Engine, Request, Ticket
from paligemma.generation import Generated, Options, TooLong
from paligemma.inference import PaliGemma
from paligemma.serve.errors import ApiError, invalid, unavailable
from paligemma.serve.metrics import Metrics
from paligemma.serve.pictures import FeatureCache
from paligemma.serve.rows import Row, encode, row_failed
from paligemma.serve.settings import Settings

ENCODING = 0.05  # seconds that pictures of waiting rows are encoded for between two steps; at least one row's are
T = TypeVar("T")


@dataclass
class Times:
    """Moments of a job, `time.perf_counter`; 0 for what has not happened. What the engine waited for before it read
    the prompt counts as queue."""

    ready: float = field(default_factory=time.perf_counter)
    taken: float = 0.0
    encoded: float = 0.0
    started: float = 0.0
    first: float = 0.0
    ended: float = 0.0

    @property
    def queue(self) -> float:
        return self.taken - self.ready + self.started - self.encoded

    def in_ms(self) -> dict[str, float]:
        seconds = {
            "queue": self.queue,
            "vision": self.encoded - self.taken,
            "prefill": self.first - self.started,
            "decode": self.ended - self.first,
        }
        return {name: round(max(0.0, value) * 1000, 2) for name, value in seconds.items()}


class Job:
    """One row on its way through the engine, as the event loop sees it.

    started: its prompt is being read. ids, logprobs: what it has written so far. result or error: set once, at its end.
    news: set whenever any of these changed.
    """

    def __init__(self, row: Row) -> None:
        self.row, self.times, self.news = row, Times(), asyncio.Event()
        self.started = False
        self.ids: list[int] = []
        self.logprobs: list[float] = []
        self.result: Generated | None = None
        self.error: ApiError | None = None
        # The engine thread's own
        self.cancelled = False
        self.ticket: Ticket | None = None
        self.told: tuple[bool, int] = False, 0  # of `started` and `ids`: what the event loop knows

    @property
    def ended(self) -> bool:
        return self.result is not None or self.error is not None


@dataclass(frozen=True)
class News:
    """What the event loop is told of one job."""

    job: Job
    started: bool = False
    ids: Sequence[int] = ()
    logprobs: Sequence[float] = ()
    result: Generated | None = None
    error: ApiError | None = None


def tell(news: Sequence[News]) -> None:
    """On the event loop."""
    for one in news:
        job = one.job
        job.started |= one.started
        job.ids += one.ids
        job.logprobs += one.logprobs
        if not job.ended:
            job.result, job.error = one.result, one.error
        job.news.set()


class EngineThread:
    """load: opens the model; called on the thread, since that may take minutes and `/health` answers meanwhile.

    state: "loading", "ok" or "failed", then with the error in `failure`.
    """

    def __init__(
        self, load: Callable[[], PaliGemma], settings: Settings, metrics: Metrics, cache: FeatureCache
    ) -> None:
        self.settings, self.metrics, self.cache = settings, metrics, cache
        self.state = "loading"
        self.failure: BaseException | None = None
        self._failures = 0  # rows in a row that the model failed to take
        self.pg: PaliGemma | None = None
        self.engine: Engine | None = None
        self.running: list[Job] = []
        self.busy_since: float | None = None
        self._load = load
        self._loop: asyncio.AbstractEventLoop | None = None
        self._changed = threading.Condition()
        self._waiting: deque[Job] = deque()
        self._calls: deque[tuple[Callable[[PaliGemma], Any], Future[Any]]] = deque()
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    # ------------------------------------------------------------------------------------------ from the event loop

    def start(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._thread.start()

    def submit(self, row: Row) -> Job:
        job = Job(row)
        with self._changed:
            if self.state != "ok":
                raise unavailable(self.state)
            self._waiting.append(job)
            self._changed.notify()
        return job

    def cancel(self, job: Job) -> None:
        """The row leaves the queue at once, or the engine within its next step. Any number of times, at any time."""
        with self._changed:
            job.cancelled = True
            if job in self._waiting:
                self._waiting.remove(job)
            ticket = job.ticket
        if ticket is not None and not job.ended:
            ticket.cancel()

    def call(self, function: Callable[[PaliGemma], T]) -> Future[T]:
        """Runs a function of the model between two steps. Rows wait meanwhile; none is inside the model. What has not
        begun can be cancelled, and is forgotten then with all that it holds."""
        future: Future[T] = Future()
        with self._changed:
            if self.state != "ok":
                raise unavailable(self.state)
            self._calls.append((function, future))
            self._changed.notify()
        future.add_done_callback(self._forget_call)
        return future

    def _forget_call(self, future: Future[Any]) -> None:
        with self._changed:
            self._calls = deque(call for call in self._calls if call[1] is not future)

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    @property
    def cache_bytes(self) -> int:
        """Keys and values of the running rows."""
        return 0 if self.engine is None else self.engine.bytes_held

    @property
    def is_stuck(self) -> bool:
        """One step has taken longer than a whole request may."""
        since = self.busy_since
        return self.state == "ok" and since is not None and time.perf_counter() - since > self.settings.timeout

    @property
    def has_died(self) -> bool:
        """The thread is gone, whether it could say so or not."""
        return self._thread.ident is not None and not self._thread.is_alive() and not self._stopping

    async def stop(self) -> None:
        """Ends the thread after its current step; what still runs is told that the server stops."""
        with self._changed:
            self._stopping = True
            self._changed.notify()
        if self._thread.ident is not None:
            await asyncio.to_thread(self._thread.join, 5)

    # ------------------------------------------------------------------------------------------ on the thread

    def _run(self) -> None:
        error: ApiError = unavailable("stopping")
        try:
            if self.settings.threads is not None:
                torch.set_num_threads(self.settings.threads)
            self.pg = self._load()
            self.engine = self._make_engine(self.pg)
            self.state = "ok"
            while self._wait_for_work():
                self._do_calls()
                self._take_jobs()
                self._step()
        except BaseException as failure:  # whatever ended this thread, its jobs and the server must hear of it
            self.failure, error = failure, unavailable("failed")
        finally:
            self._end(error)

    def _make_engine(self, pg: PaliGemma) -> Engine:
        settings, memory = self.settings, self.settings.cache_memory
        return Engine(
            pg.model, max_rows=settings.max_rows, cache_bytes=None if memory is None else int(memory * 1e9),
            prefill_every=settings.prefill_every, compile=settings.compile,
            slot_length=settings.room(pg.processor.num_image_tokens),
        )  # fmt: skip

    def _end(self, error: ApiError) -> None:
        """Whoever still waits for this thread hears that it is over."""
        with self._changed:
            self.state = error.code
            left = [*self.running, *self._waiting]
            calls = [future for _, future in self._calls]
            self._waiting.clear()
            self._calls.clear()
        self.running = []
        self.busy_since = None
        self._tell([News(job, True, error=error) for job in left])
        for future in calls:
            if future.set_running_or_notify_cancel():
                future.set_exception(error)

    def _wait_for_work(self) -> bool:
        """Blocks until there is something to do. False: the thread is to end."""
        with self._changed:
            self.busy_since = None
            while not (self._waiting or self._calls or self.running or self._stopping):
                self._changed.wait()
            self.busy_since = time.perf_counter()
            return not self._stopping

    def _do_calls(self) -> None:
        while True:
            with self._changed:
                if not self._calls:
                    return
                function, future = self._calls.popleft()
            if not future.set_running_or_notify_cancel():
                continue
            try:
                assert self.pg is not None
                future.set_result(function(self.pg))
            except Exception as error:
                future.set_exception(error)

    def _take_jobs(self) -> None:
        """Hands waiting rows to the engine while it has room for them."""
        until = time.perf_counter() + ENCODING
        while len(self.running) < self.settings.max_rows:
            with self._changed:
                if not self._waiting:
                    return
                job = self._waiting.popleft()
            job.times.taken = time.perf_counter()
            try:
                ticket = self._admit(job)
            except Exception as error:
                if not isinstance(error, ApiError):
                    self.metrics.errors.inc()
                self._tell([News(job, True, error=row_failed(error))])
                self._count(error)
                continue
            self._failures = 0
            with self._changed:
                job.ticket = ticket
                if job.cancelled:  # while it was being admitted
                    ticket.cancel()
            self.running.append(job)
            if time.perf_counter() > until:
                return

    def _count(self, error: Exception) -> None:
        """Raises an error of the model after some in a row: a GPU that has failed fails in every picture. What a row
        is refused for, and memory that runs out, are no failures of the model."""
        if isinstance(error, (ApiError, ValueError)) or is_out_of_memory(error):
            return
        self._failures += 1
        if self._failures >= MOST_FAILURES:
            raise error

    def _admit(self, job: Job) -> Ticket:
        assert self.pg is not None and self.engine is not None
        features = []
        for picture in job.row.pictures:
            known = picture.features
            if known is None and (kept := self.cache.get(picture.digest)) is not None:
                known = kept[1]
            if known is None:
                assert picture.pixels is not None
                known = encode(self.pg, picture.pixels)
            self.cache.put(picture, known)
            features.append(known)
        job.times.encoded = time.perf_counter()
        tokenizer, row = self.pg.processor.tokenizer, job.row
        options = Options(
            row.max_new_tokens,
            watch=(tokenizer.first_loc_id, NUM_LOC),
            num_tokens=len(tokenizer),
            **row.sampling.options(),
        )
        try:
            return self.engine.admit(Request(row.ids, torch.stack(features), options, row.constraint))
        except TooLong as error:  # its keys and values would not fit into the whole cache
            raise invalid("max_tokens", str(error)) from None

    def _step(self) -> None:
        if not self.running:
            return
        assert self.engine is not None
        before = self.engine.rows_running
        self.engine.step()
        self.metrics.rows.observe(max(before, self.engine.rows_running))
        news = [self._news_of(job) for job in self.running]
        self.running = [one.job for one in news if one.result is None and one.error is None]
        self._tell([one for one in news if one.started or one.ids or one.result or one.error])
        if self.engine.failure is not None:
            raise self.engine.failure

    def _news_of(self, job: Job) -> News:
        """What has come to a job since it was last asked for."""
        ticket, (told_started, told) = job.ticket, job.told
        assert ticket is not None
        done = ticket.done  # before the tokens are read: they are complete then
        ids, logprobs = ticket.written(told)
        started = ticket.started is not None or done
        job.told = started, told + len(ids)
        if not done:
            return News(job, started and not told_started, ids, logprobs)
        times, now = job.times, time.perf_counter()
        times.started = ticket.started or now
        times.first, times.ended = ticket.first_token or now, ticket.ended or now
        try:
            return News(job, True, ids, logprobs, ticket.result())
        except Exception as error:
            if not job.cancelled:
                self.metrics.errors.inc()
            return News(job, True, ids, logprobs, None, row_failed(error))

    def _tell(self, news: list[News]) -> None:
        """One wake-up of the event loop for all rows of a step."""
        if news and self._loop is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(tell, news)
