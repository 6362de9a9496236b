"""What all requests share: the engine's thread, the workers, the places, and how the server is."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, contextmanager, nullcontext
from dataclasses import replace
from typing import Any, ParamSpec, TypeVar

from paligemma.inference import PaliGemma
from paligemma.serve.bodies import BodyMemory
from paligemma.serve.engine_thread import EngineThread, Job
from paligemma.serve.errors import ApiError, unavailable
from paligemma.serve.fetching import fetch
from paligemma.serve.metrics import Metrics
from paligemma.serve.pictures import FeatureCache, Picture, Source, read
from paligemma.serve.rows import Ask, Row, lay_out
from paligemma.serve.settings import MB, Settings

P = ParamSpec("P")
T = TypeVar("T")

EXPLORED_BYTES = 64 * MB  # of all look-inside pages that are kept, of which one has up to 8 MB
FETCHED_TOGETHER = 8  # pictures behind URLs


class Service:
    def __init__(self, load: Callable[[], PaliGemma], settings: Settings) -> None:
        self.settings, self.metrics = settings, Metrics()
        self.cache = FeatureCache(settings.image_cache)
        self.engine = EngineThread(load, settings, self.metrics, self.cache)
        self.memory = BodyMemory(settings)
        self.taken = 0  # places
        self.reading: set[asyncio.Task[bytes]] = set()  # bodies that are on their way
        self.stopping = False
        self.seconds = 1.0  # that a request takes, of late
        self.explored: OrderedDict[str, tuple[float, bytes]] = OrderedDict()  # {path: (until, page)}
        self.exploring = False
        self.created = int(time.time())
        self._decoders = ThreadPoolExecutor(settings.decode_workers, thread_name_prefix="decode")
        self._writers = ThreadPoolExecutor(1, thread_name_prefix="reply")
        self._fetching = asyncio.Semaphore(FETCHED_TOGETHER)
        self._add_gauges()

    def _add_gauges(self) -> None:
        metrics, engine = self.metrics, self.engine
        metrics.gauge("rows_running", "Rows in the engine.", lambda: len(engine.running))
        metrics.gauge("rows_waiting", "Rows that wait for the engine.", lambda: engine.waiting)
        metrics.gauge("places_taken", "Requests that run or wait, of all that may.", lambda: self.taken)
        metrics.gauge("cache_bytes", "Keys and values of the running rows.", lambda: engine.cache_bytes)
        metrics.gauge("image_cache_hits", "Pictures that were encoded already.", lambda: self.cache.hits)

    @property
    def pg(self) -> PaliGemma:
        if self.engine.pg is None or self.engine.state != "ok":
            raise unavailable(self.engine.state)
        return self.engine.pg  # also while the server stops: requests with a place are still answered

    @property
    def state(self) -> str:
        """ "ok", or the reason of a 503."""
        if self.engine.state == "failed" or self.engine.has_died:
            return "failed"
        if self.stopping:
            return "stopping"
        return "stuck" if self.engine.is_stuck else self.engine.state

    async def stop(self) -> None:
        await self.engine.stop()
        self._decoders.shutdown(wait=False, cancel_futures=True)
        self._writers.shutdown(wait=False, cancel_futures=True)

    # ------------------------------------------------------------------------------------------ places

    def check_open(self) -> None:
        """Before a body is read. ApiError 503 where no request can be answered, 429 where no place is free."""
        if (state := self.state) != "ok":
            raise unavailable(state)
        if self.taken >= self.settings.places:
            wait = self.seconds * self.taken / self.settings.max_rows
            raise ApiError(
                429, "queue_full", f"{self.taken} requests run or wait already, which is all that may: try again",
                retry_after=min(60, max(1, round(wait))),
            )  # fmt: skip

    async def while_open(self, reading: Coroutine[Any, Any, bytes]) -> bytes:
        """A body, unless the server stops before it is complete: it has no place yet, so nobody waits for it. ApiError
        503 then."""
        task = asyncio.ensure_future(reading)
        self.reading.add(task)
        try:
            return await task
        except asyncio.CancelledError:
            if not self.stopping:
                raise
            raise unavailable("stopping") from None
        finally:
            self.reading.discard(task)
            task.cancel()

    def stop_reading(self) -> None:
        for task in self.reading:
            task.cancel()

    @contextmanager
    def place(self) -> Iterator[None]:
        """One of the places of the queue, from when a body is complete until its reply is."""
        self.check_open()
        self.taken += 1
        start = time.perf_counter()
        try:
            yield
        finally:
            self.taken -= 1
            self.seconds += (time.perf_counter() - start - self.seconds) / 16  # a running mean

    # ------------------------------------------------------------------------------------------ work

    async def in_worker(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """For what takes long: what waits here has a place, so that no more than these can wait."""
        return await asyncio.get_running_loop().run_in_executor(self._decoders, lambda: function(*args, **kwargs))

    async def in_writer(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """For replies, which should not wait for the pictures of others to be decoded."""
        return await asyncio.get_running_loop().run_in_executor(self._writers, lambda: function(*args, **kwargs))

    async def row(self, ask: Ask) -> Row:
        """Prompt and pictures -> the row that the engine runs. The prompt is checked before a picture is looked at."""
        row = await self.in_worker(lay_out, self.pg, ask, self.settings.room(self.pg.processor.num_image_tokens))
        pictures = tuple([await self.picture(source) for source in ask.sources])
        self.metrics.tokens.labels("prompt").inc(len(row.ids))
        return replace(row, pictures=pictures)

    async def picture(self, source: Source) -> Picture:
        """What the source holds, as the model takes it. Behind a URL it is fetched only now, by a few requests at a
        time: until it is decoded its bytes are held, and nothing else counts them."""
        side = self.pg.processor.image_size
        async with self._fetching if source.is_url else nullcontext():
            (source,) = await self.contents((source,))
            return await self.in_worker(read, source, self.cache, self.settings.most_pixels, side)

    async def contents(self, sources: tuple[Source, ...]) -> list[Source]:
        """The same, with what lies behind URLs."""
        domains = self.settings.image_domains
        return [await fetch(source, domains) if source.is_url else source for source in sources]

    @asynccontextmanager
    async def running(self, row: Row) -> AsyncIterator[Job]:
        """The row in the engine. Whatever happens inside, it is gone from there at the end."""
        job = self.engine.submit(row)
        try:
            yield job
        finally:
            self.engine.cancel(job)

    async def started(self, job: Job) -> None:
        """Waits until the row has left the queue. Raises its error."""
        await _until(job, lambda: job.started)
        if job.error is not None:
            raise job.error

    async def news_of(self, job: Job, seconds: float) -> bool:
        """Waits for news of the row. False: there was none for so long."""
        try:
            await asyncio.wait_for(job.news.wait(), seconds)
        except (asyncio.TimeoutError, TimeoutError):
            return False
        return True

    async def ended(self, job: Job) -> None:
        """Waits for the end of the row. Raises its error."""
        await _until(job, lambda: job.ended)
        self.observe(job)

    def observe(self, job: Job) -> None:
        """Counts a row that has ended. Raises its error."""
        if job.error is not None:
            raise job.error
        assert job.result is not None
        count, times = len(job.result.token_ids), job.times
        self.metrics.tokens.labels("answer").inc(count)
        self.metrics.queue.observe(times.queue)
        self.metrics.first_token.observe(times.first - times.ready)
        if count > 1:
            self.metrics.per_token.observe((times.ended - times.first) / (count - 1))

    # ------------------------------------------------------------------------------------------ looking inside

    def keep_explored(self, page: bytes) -> str:
        """The path of a page that is kept for some minutes. Where all have too many bytes together, the oldest goes."""
        path = f"/explored/{secrets.token_urlsafe(24)}"
        self.explored[path] = time.monotonic() + self.settings.explored_for, page
        while sum(len(kept) for _, kept in self.explored.values()) > EXPLORED_BYTES:
            self.explored.popitem(last=False)
        return path

    def find_explored(self, path: str) -> bytes | None:
        now = time.monotonic()
        for old in [key for key, (until, _) in self.explored.items() if until < now]:
            del self.explored[old]
        return self.explored[path][1] if path in self.explored else None


async def _until(job: Job, holds: Callable[[], bool]) -> None:
    while not holds():
        job.news.clear()
        if job.ended:
            return
        await job.news.wait()
