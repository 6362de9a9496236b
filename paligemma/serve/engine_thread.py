"""The one thread that runs the model, and the bridge between it and the event loop.

    event loop                          this thread, again and again
    submit(job)  -> waiting -> ...      1. calls between two steps (looking inside the model)
    cancel(job)                         2. jobs that wait: pictures are encoded, rows handed to the engine
    job.news     <- news of a step      3. one step of the engine; what is new goes to the event loop, all at once

The two share a list of waiting jobs under a lock, and nothing else: what a job has come to is written on the event
loop alone. The list cannot grow without limit, since each job has a place (`service.py`). Where this thread ends by an
error, every job is told, and the server reports that it failed.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch

from paligemma.generation import Generated
from paligemma.inference import PaliGemma
from paligemma.serve.errors import ApiError, unavailable
from paligemma.serve.metrics import Metrics
from paligemma.serve.pictures import FeatureCache
from paligemma.serve.rows import Row, encode, row_failed
from paligemma.serve.settings import Settings
from paligemma.serve.slice_engine import Engine, Request, Ticket, row_options

ENCODING = 0.05  # seconds that pictures of waiting rows are encoded for between two steps; at least one row's are
T = TypeVar("T")


@dataclass
class Times:
    """Moments of a job, `time.perf_counter`; 0 for what has not happened."""

    ready: float = field(default_factory=time.perf_counter)
    taken: float = 0.0
    admitted: float = 0.0
    first: float = 0.0
    ended: float = 0.0

    def in_ms(self) -> dict[str, float]:
        steps = {
            "queue": (self.ready, self.taken), "vision": (self.taken, self.admitted),
            "prefill": (self.admitted, self.first), "decode": (self.first, self.ended),
        }  # fmt: skip
        return {name: round(max(0.0, end - start) * 1000, 2) for name, (start, end) in steps.items()}


class Job:
    """One row on its way through the engine, as the event loop sees it.

    started: it has left the queue. ids, logprobs: what it has written so far. result or error: set once, at its end.
    news: set whenever any of these changed.
    """

    def __init__(self, row: Row) -> None:
        self.row, self.times, self.news = row, Times(), asyncio.Event()
        self.started = False
        self.ids: list[int] = []
        self.logprobs: list[float] = []
        self.result: Generated | None = None
        self.error: ApiError | None = None
        # The engine thread's
        self.cancelled = False
        self.ticket: Ticket | None = None
        self.told = 0  # tokens that the event loop knows of

    @property
    def ended(self) -> bool:
        return self.result is not None or self.error is not None

    def tell(self, ids: list[int], logprobs: list[float], result: Generated | None, error: ApiError | None) -> None:
        """On the event loop."""
        self.started = True
        self.ids += ids
        self.logprobs += logprobs
        if not self.ended:
            self.result, self.error = result, error
        self.news.set()


News = tuple[Job, list[int], list[float], "Generated | None", "ApiError | None"]


class EngineThread:
    """load: opens the model; called on the thread, since that may take minutes and `/health` answers meanwhile.

    state: "loading", "ok" or "failed", then with the error in `failure`.
    """

    def __init__(
        self, load: Callable[[], PaliGemma], settings: Settings, metrics: Metrics, cache: FeatureCache
    ) -> None:
        self.settings, self.metrics, self.cache = settings, metrics, cache
        self.state, self.failure = "loading", None
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

    failure: BaseException | None

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

    async def call(self, function: Callable[[PaliGemma], T]) -> T:
        """Runs a function of the model between two steps. Rows wait meanwhile; none is inside the model."""
        future: Future[T] = Future()
        with self._changed:
            if self.state != "ok":
                raise unavailable(self.state)
            self._calls.append((function, future))
            self._changed.notify()
        return await asyncio.wrap_future(future)

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    @property
    def cache_bytes(self) -> int:
        """Keys and values of the running rows."""
        return getattr(self.engine, "cache_bytes_used", 0)

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
            memory = self.settings.cache_memory
            self.engine = Engine(
                self.pg.model, max_rows=self.settings.max_rows,
                cache_bytes=None if memory is None else int(memory * 1e9), prefill_every=self.settings.prefill_every,
            )  # fmt: skip
            self.state = "ok"
            while self._wait_for_work():
                self._do_calls()
                self._take_jobs()
                self._step()
        except BaseException as failure:  # whatever ended this thread, its jobs and the server must hear of it
            self.failure, error = failure, unavailable("failed")
        finally:
            self._end(error)

    def _end(self, error: ApiError) -> None:
        with self._changed:
            self.state = "failed"
            left = [*self.running, *self._waiting]
            calls = [future for _, future in self._calls]
            self._waiting.clear()
            self._calls.clear()
        self.running = []
        self.busy_since = None
        self._tell([(job, [], [], None, error) for job in left])
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
        while self._calls:
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
        news: list[News] = []
        until = time.perf_counter() + ENCODING
        while len(self.running) < self.settings.max_rows:
            with self._changed:
                if not self._waiting:
                    break
                job = self._waiting.popleft()
            job.times.taken = time.perf_counter()
            try:
                ticket = self._admit(job)
            except Exception as error:
                self.metrics.errors.inc()
                news.append((job, [], [], None, row_failed(error)))
                continue
            with self._changed:
                job.ticket = ticket
            if job.cancelled:  # while it was being admitted
                ticket.cancel()
            self.running.append(job)
            news.append((job, [], [], None, None))
            if time.perf_counter() > until:
                break
        self._tell(news)

    def _admit(self, job: Job) -> Ticket:
        assert self.pg is not None and self.engine is not None
        features = []
        for picture in job.row.pictures:
            known = picture.features
            if known is None and (kept := self.cache.get(picture.digest)) is not None:
                known = kept[1]
            if known is None:
                assert picture.pixels is not None
                (known,) = encode(self.pg, [picture.pixels])
            self.cache.put(picture, known)
            features.append(known)
        job.times.admitted = time.perf_counter()
        row = job.row
        return self.engine.admit(Request(row.ids, torch.stack(features), row_options(self.pg, row), row.constraint))

    def _step(self) -> None:
        if not self.running:
            return
        assert self.engine is not None
        self.metrics.rows.observe(len(self.running))
        self.engine.step()
        now = time.perf_counter()
        news: list[News] = []
        going: list[Job] = []
        for job in self.running:
            ticket = job.ticket
            assert ticket is not None
            new = ticket.written(job.told)  # (ids, log-probabilities)
            if new[0] and not job.told:
                job.times.first = now
            job.told += len(new[0])
            if not ticket.done:
                going.append(job)
                if new[0]:
                    news.append((job, *new, None, None))
                continue
            job.times.ended = now
            job.times.first = job.times.first or now
            try:
                news.append((job, *new, ticket.result(), None))
            except Exception as error:
                if not job.cancelled:
                    self.metrics.errors.inc()
                news.append((job, *new, None, row_failed(error)))
        self.running = going
        self._tell(news)

    def _tell(self, news: list[News]) -> None:
        """One wake-up of the event loop for all rows of a step."""
        if news and self._loop is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(_tell_all, news)


def _tell_all(news: list[News]) -> None:
    for job, ids, logprobs, result, error in news:
        job.tell(ids, logprobs, result, error)
