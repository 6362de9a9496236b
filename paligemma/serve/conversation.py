"""One request from its body to its reply, with a client that may leave and times that may run out.

    check_open -> read the body -> take a place -> the work of the endpoint, until
        it is done, the client leaves (its row is cancelled), its turn does not come in time (503), or the time of the
        request is over (504)

An error becomes a reply with its status; where a stream has begun already, an event of the stream.
"""

from __future__ import annotations

import asyncio
import sys
import time
import traceback
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any

from starlette.datastructures import Headers
from starlette.types import Receive, Scope, Send

from paligemma.serve.bodies import Body, ClientLeft, content_type, parse_form, parse_object, read_body
from paligemma.serve.errors import ApiError, json_bytes
from paligemma.serve.replies import event
from paligemma.serve.service import Service


class Reply:
    """What is sent to one client: one body, or a stream of events. turn: set once the model begins with its row."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self.started = False
        self.turn = asyncio.Event()

    async def whole(self, body: bytes, status: int = 200, headers: dict[str, str] | None = None) -> None:
        own = {"content-type": "application/json", "content-length": str(len(body))}
        await self._start(status, {**own, **(headers or {})})
        await self._send({"type": "http.response.body", "body": body})

    async def start_stream(self) -> None:
        # The last header keeps nginx from collecting events.
        await self._start(200, {"content-type": "text/event-stream; charset=utf-8", "x-accel-buffering": "no"})

    async def part(self, data: bytes, more: bool = True) -> None:
        await self._send({"type": "http.response.body", "body": data, "more_body": more})

    async def error(self, error: ApiError) -> None:
        if self.started:
            await self.part(event(error.body()), more=False)  # no [DONE]: the answer is not complete
            return
        await self.whole(json_bytes(error.body()), error.status, error.headers())

    async def _start(self, status: int, headers: dict[str, str]) -> None:
        self.started = True
        raw = [(name.encode("latin-1"), value.encode("latin-1")) for name, value in headers.items()]
        await self._send({"type": "http.response.start", "status": status, "headers": raw})


Work = Callable[[Body, Reply], Coroutine[Any, Any, None]]  # does what is asked, and sends the reply


async def converse(service: Service, scope: Scope, receive: Receive, send: Send, work: Work, forms: bool) -> None:
    """Answers one request. forms: multipart bodies are taken too."""
    reply = Reply(send)
    try:
        service.check_open()
        headers = Headers(scope=scope)
        kind = content_type(headers, forms)
        with service.memory.account() as account:
            content = await service.while_open(read_body(headers, receive, service.settings, account))
            with service.place():
                body = Body(content, [], account)
                del content
                await while_connected(_answer(service, headers, kind, body, work, reply), receive, service, reply.turn)
    except ClientLeft:
        service.metrics.cancelled.inc()
    except ApiError as error:
        await reply.error(error)
    except Exception as error:
        log_fault(error)
        await reply.error(internal_error())


async def _answer(service: Service, headers: Headers, kind: str, body: Body, work: Work, reply: Reply) -> None:
    if kind == "multipart/form-data":
        body.value, body.files = await parse_form(headers, body.value)
    else:
        body.value = await service.in_worker(parse_object, body.value)
    await work(body, reply)


async def while_connected(
    work: Coroutine[Any, Any, None], receive: Receive, service: Service, turn: asyncio.Event
) -> None:
    """Runs `work` to its end. It is cancelled where the client leaves (ClientLeft), `turn` is not set in time, or its
    time is over (ApiError)."""
    start, seconds, queued = time.perf_counter(), service.settings.timeout, service.settings.queue_timeout
    task, left = asyncio.ensure_future(work), asyncio.ensure_future(until_disconnect(receive))
    begun = asyncio.ensure_future(turn.wait())
    try:
        # All of the wait counts, not only that for the engine: pictures are fetched, and wait to be decoded.
        await asyncio.wait({task, left, begun}, timeout=min(queued, seconds), return_when=asyncio.FIRST_COMPLETED)
        if turn.is_set():
            over = start + seconds - time.perf_counter()
            await asyncio.wait({task, left}, timeout=max(0, over), return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        if left.done():
            raise ClientLeft
        if not turn.is_set() and queued < seconds:
            raise ApiError(
                503, "queue_timeout", f"the model did not begin with the request within {queued:g} seconds: try again",
                retry_after=min(60, max(1, round(service.seconds))),
            )  # fmt: skip
        raise ApiError(504, "timeout", f"the answer was not complete after {seconds:g} seconds")
    finally:
        for one in (task, left, begun):
            one.cancel()
        await asyncio.gather(task, left, begun, return_exceptions=True)


async def until_disconnect(receive: Callable[[], Awaitable[Any]]) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def internal_error() -> ApiError:
    return ApiError(500, "internal", "the server made a mistake, which its log describes")


def log_fault(error: BaseException) -> None:
    """Where a fault of ours happened. Not its message, which may quote a prompt."""
    where = "".join(traceback.format_tb(error.__traceback__))
    print(f"fault: {type(error).__name__}\n{where}", file=sys.stderr, end="", flush=True)
