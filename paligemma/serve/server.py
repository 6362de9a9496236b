"""Running the server: its socket, uvicorn, signals, and how the process ends.

    SIGTERM, Ctrl-C    new requests get 503, and those whose body is still on its way; those that have a place are
                       finished within the grace
    the engine died    `/health` says so for two seconds, then the process ends with 1

uvicorn has no limit for slow headers, so its protocol gets a timer here. Its h11 protocol is taken, which refuses
headers of more than 64 KB; httptools takes any.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket
import stat
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from paligemma.allocator import give_back_freed_memory
from paligemma.inference import PaliGemma
from paligemma.serve.app import create_app
from paligemma.serve.conversation import log_fault
from paligemma.serve.guard import Guard
from paligemma.serve.settings import Settings
from paligemma.terminal import error_line

LINGER = 2.0  # seconds that a server with a dead engine still answers, so that whoever watches /health sees it
MOST_CONNECTIONS = 512  # with or without a request; beyond them a connection gets 503
# Seconds. Longer than clients (httpx and openai: 5) and proxies (mostly 60) keep a connection that they may use again:
# where the server hangs up first, a request that is just being sent is lost.
IDLE_CONNECTION = 75
LONGEST_HEADERS = 2**16  # bytes
FREED_AT_ONCE = 2**23  # bytes: bodies, and the blocks of large pictures
# Seconds for which the engine's thread keeps Python's lock while the event loop waits for it. With Python's own 5 ms, a
# reply that takes several turns waits for each. Measured in turns with 48 clients: the 99th percentile of /health was
# 170 and 85 ms with 5 ms, 87 and 18 ms with this; as many answers a second.
SWITCH_INTERVAL = 0.0005
LAST_BYTES = 5  # seconds for the last replies to be sent once everything has ended


def serve(
    load: Callable[[], PaliGemma], settings: Settings, listening: socket.socket, url: str, say: Callable[[str], object]
) -> int:
    """Serves until a signal or the death of the engine. Returns the exit code. say: gets the URL once it answers.

    Raises the error of `load`, where that fails.
    """
    give_back_freed_memory(FREED_AT_ONCE)
    sys.setswitchinterval(SWITCH_INTERVAL)
    logging.getLogger("python_multipart").setLevel(logging.CRITICAL)  # a form that is wrong is a 400, and in our log
    server = Server(create_app(load, settings), settings, lambda: say(url))
    server.run([listening])
    failure = server.service.engine.failure
    if failure is not None and not server.announced:
        raise failure  # the model could not be loaded
    if failure is not None:
        log_fault(failure)
        print(f"error: the engine died: {error_line(failure)}", file=sys.stderr, flush=True)
    return server.exit_code


class Server(uvicorn.Server):
    """uvicorn's server, which looks ten times a second how our service is."""

    def __init__(self, app: Guard, settings: Settings, announce: Callable[[], object]) -> None:
        self.service, self.settings = app.service, settings
        self.announce, self.announced = announce, False
        self.exit_code = 0
        self.give_up_at: float | None = None  # when the grace ends
        self.failed_at: float | None = None
        super().__init__(
            uvicorn.Config(
                app, loop="asyncio", http=TimedProtocol, ws="none", lifespan="on", log_config=None,
                log_level="critical",
                access_log=False, server_header=False, limit_concurrency=MOST_CONNECTIONS,
                timeout_keep_alive=IDLE_CONNECTION, timeout_graceful_shutdown=LAST_BYTES,
                h11_max_incomplete_event_size=LONGEST_HEADERS,
            )
        )  # fmt: skip
        TimedProtocol.seconds = settings.header_timeout

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self.service.stopping:  # the second signal
            self.should_exit = self.force_exit = True
            return
        self.service.stopping = True
        self.give_up_at = time.monotonic() + self.settings.grace
        self.exit_code = 130 if sig == signal.SIGINT else 0

    async def on_tick(self, counter: int) -> bool:
        now, service = time.monotonic(), self.service
        if service.stopping:
            service.stop_reading()
        if not self.announced and service.state == "ok":
            self.announced = True
            self.announce()
        if service.state == "failed":
            self.failed_at = self.failed_at or now
            self.exit_code = 1
            if not self.announced or now > self.failed_at + LINGER:
                return True
        elif self.give_up_at is not None and (service.taken == 0 or now > self.give_up_at):
            await service.engine.stop()  # tells the rows that still run
            return True
        return await super().on_tick(counter)


class TimedProtocol(H11Protocol):
    """uvicorn's protocol with a limit to the time that a client may take to send

    - headers: from the first connection, and from the first byte of a later request, to their end
    - the rest of a body whose request was answered already, which is read so that the client gets to see its answer

    and to the time in which it may take nothing of an answer that waits for it.

    uvicorn's own timer of idle connections ends with the next byte. (How long a body may take that is still wanted is
    limited in `bodies.py`.)
    """

    seconds = 30.0
    timeout_keep_alive_task: asyncio.TimerHandle | None  # uvicorn's own
    _timer: asyncio.TimerHandle | None = None
    _reader: asyncio.TimerHandle | None = None  # runs while a part of the answer waits for the client
    _unread = 0  # bytes

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        transport.set_write_buffer_limits(0)  # `pause_writing` is called as soon as anything waits for the client
        self._timer = self.loop.call_later(self.seconds, self._too_slow)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._watch()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._watch()

    def _watch(self) -> None:
        """Lets the timer run while headers or the rest of a body are on their way."""
        if self.transport.is_closing():
            return
        answered = self.cycle is None or self.cycle.response_complete
        idle = self.cycle is not None and self.conn.their_state is h11.IDLE and self.conn.trailing_data[0] == b""
        if not answered or idle:
            self._stop_timer()
        elif self._timer is None:
            self._timer = self.loop.call_later(self.seconds, self._too_slow)
        if answered and idle and self.timeout_keep_alive_task is None:  # it ended with the bytes of the body
            self.timeout_keep_alive_task = self.loop.call_later(
                self.timeout_keep_alive, self.timeout_keep_alive_handler
            )

    def pause_writing(self) -> None:
        super().pause_writing()
        self._unread = self.transport.get_write_buffer_size()
        self._reader = self.loop.call_later(self.seconds, self._look_at_reader)

    def resume_writing(self) -> None:
        super().resume_writing()
        self._stop_reader()

    def _look_at_reader(self) -> None:
        """Hangs up on a client that has read nothing; a slow one gets more time."""
        before, self._unread = self._unread, self.transport.get_write_buffer_size()
        if self._unread >= before:
            self.transport.abort()  # `close` would wait for it to read the rest
        else:
            self._reader = self.loop.call_later(self.seconds, self._look_at_reader)

    def _stop_reader(self) -> None:
        if self._reader is not None:
            self._reader.cancel()
            self._reader = None

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_timer()
        self._stop_reader()
        super().connection_lost(exc)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _too_slow(self) -> None:
        self._timer = None
        if self.transport.is_closing():
            return
        if self.conn.their_state is h11.IDLE:  # else it has its answer
            self.transport.write(b"HTTP/1.1 408 Request Timeout\r\nconnection: close\r\ncontent-length: 0\r\n\r\n")
        self.transport.close()


# ------------------------------------------------------------------------------------------------ sockets


def listen(host: str, port: int) -> tuple[socket.socket, str]:
    """(a listening socket, its URL). OSError in a line that says what to do, before a model is loaded."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0][0]
        listening = socket.create_server((host, port), family=family, backlog=1024)
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or error
        raise OSError(f"{host} port {port} cannot be listened on: {reason}. Choose another with --port") from None
    written = f"[{host}]" if ":" in host else host
    return listening, f"http://{written}:{listening.getsockname()[1]}"


def listen_at(path: Path) -> tuple[socket.socket, str]:
    """The same for a Unix socket. One that a server left behind is replaced, nothing else."""
    listening = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        if path.exists() and stat.S_ISSOCK(path.stat().st_mode):
            with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as trial:
                if trial.connect_ex(str(path)) == 0:
                    raise OSError("another server listens there")
            os.unlink(path)
        listening.bind(str(path))
        listening.listen(1024)
    except OSError as error:
        listening.close()
        raise OSError(f"{path} cannot be listened on: {error.strerror or error}") from None
    return listening, f"unix:{path}"


def mark_of(path: Path) -> tuple[int, int, int] | None:
    """By what the file of a socket is known again; None where there is none. File systems give the number of a removed
    file to the next one, so the time counts too."""
    try:
        found = path.lstat()
    except OSError:
        return None
    return found.st_dev, found.st_ino, found.st_mtime_ns
