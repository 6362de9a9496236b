"""The paths of the server, as a Starlette application.

FastAPI was weighed: it would check fields itself, but its errors are not in OpenAI's form, and half of the rules here
(neutral values, prompts, pictures) cannot be said in types.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import FileResponse, Response
from starlette.routing import BaseRoute, Mount, Route
from starlette.staticfiles import StaticFiles
from starlette.types import Receive, Scope, Send

from paligemma.inference import PaliGemma
from paligemma.serve.bodies import Body
from paligemma.serve.chat import parse_chat
from paligemma.serve.conversation import Reply, Work, converse, internal_error, log_fault
from paligemma.serve.errors import ApiError, json_bytes
from paligemma.serve.exploring import explore
from paligemma.serve.guard import Guard
from paligemma.serve.metrics import CONTENT_TYPE
from paligemma.serve.native import parse_native
from paligemma.serve.openapi import document
from paligemma.serve.replies import Chunks, completion, native
from paligemma.serve.service import Service
from paligemma.serve.settings import Settings

STATIC = Path(__file__).parent / "static"
# The look-inside page has its scripts and styles in itself, and shows what strangers typed: it may do nothing else.
EXPLORED_CSP = (
    "sandbox allow-scripts; default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; "
    "img-src data: blob:"
)


def create_app(load: Callable[[], PaliGemma], settings: Settings) -> Guard:
    """The whole server as one ASGI application, which loads the model when it is started."""
    service = Service(load, settings)

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        service.engine.start()
        yield
        await service.stop()

    app = Starlette(
        routes=routes(service),
        lifespan=lifespan,
        exception_handlers={HTTPException: http_error, ApiError: api_error, Exception: fault},  # type: ignore[dict-item]
    )
    return Guard(app, service)


def routes(service: Service) -> list[BaseRoute]:
    """Every path. A test walks this table and asks each one without a key."""
    settings = service.settings
    table: list[BaseRoute] = [
        Route("/health", health(service)),
        Route("/metrics", metrics(service)),
        Route("/v1/models", models(service)),
        Route("/v1/models/{name:path}", models(service)),
        Route("/openapi.json", openapi(service)),
        Route("/v1/chat/completions", Endpoint(service, chat(service)), methods=["POST"]),
        Route("/v1/explore", Endpoint(service, explored(service), forms=True), methods=["POST"]),
        Route("/explored/{page}", explored_page(service)),
    ]
    for task in ("answer", "detect", "segment"):
        endpoint = Endpoint(service, native_task(service, task), forms=True)
        table.append(Route(f"/v1/{task}", endpoint, methods=["POST"]))
    if settings.page:
        table.append(Route("/", page))
        table.append(Mount("/static", StaticFiles(directory=STATIC, check_dir=False)))
    return table


class Endpoint:
    """A POST path as an ASGI application of its own, so that it may watch for a client that leaves."""

    def __init__(self, service: Service, work: Work, forms: bool = False) -> None:
        self.service, self.work, self.forms = service, work, forms

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await converse(self.service, scope, receive, send, self.work, self.forms)


# ------------------------------------------------------------------------------------------------ questions


def chat(service: Service) -> Work:
    settings = service.settings

    async def work(body: Body, reply: Reply) -> None:
        request = await service.in_worker(parse_chat, body.value, settings)
        row = await service.row(request.ask)
        request = replace(request, ask=replace(request.ask, sources=()))
        body.release()
        id = f"chatcmpl-{secrets.token_hex(12)}"
        async with service.running(row) as job:
            await service.started(job)
            reply.turn.set()
            if not request.stream:
                await service.ended(job)
                await reply.whole(await service.in_writer(completion, service.pg, settings.name, id, job, request))
                return
            chunks = Chunks(service.pg, settings.name, id, request)
            await reply.start_stream()
            await reply.part(chunks.first())
            await stream(service, reply, chunks, job)

    return work


async def stream(service: Service, reply: Reply, chunks: Chunks, job: Any) -> None:
    """Sends pieces of text as they come; a comment where none came for a while, so that no proxy hangs up."""
    sent = time.monotonic()
    while True:
        job.news.clear()
        ended = job.ended
        if ended:
            service.observe(job)  # raises the row's error
        if (piece := chunks.text(job)) is not None:
            await reply.part(piece)
            sent = time.monotonic()
        if ended:
            break
        # Tokens may come that have no text: all of an answer in JSON, and half a character.
        left = sent + service.settings.comment_every - time.monotonic()
        if left <= 0 or not await service.news_of(job, left):
            await reply.part(b": the answer is on its way\n\n")
            sent = time.monotonic()
    *events, done = await service.in_writer(chunks.last, job)
    for one in events:
        await reply.part(one)
    await reply.part(done, more=False)


def native_task(service: Service, task: str) -> Work:
    settings = service.settings

    async def work(body: Body, reply: Reply) -> None:
        request = await service.in_worker(parse_native, task, body.value, body.files, settings)
        row = await service.row(request.ask)
        request = replace(request, ask=replace(request.ask, sources=()))
        body.release()
        async with service.running(row) as job:
            await service.started(job)
            reply.turn.set()
            await service.ended(job)
            id = f"{task}-{secrets.token_hex(12)}"
            await reply.whole(await service.in_writer(native, service.pg, settings.name, id, job, request))

    return work


def explored(service: Service) -> Work:
    async def work(body: Body, reply: Reply) -> None:
        request = await service.in_worker(parse_native, "explore", body.value, body.files, service.settings)
        url = await explore(service, request.ask, reply.turn)
        await reply.whole(json_bytes({"url": url}))

    return work


# ------------------------------------------------------------------------------------------------ the rest

Handler = Callable[[Request], Any]


def json_reply(value: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    return Response(json_bytes(value), status, headers, "application/json")


def health(service: Service) -> Handler:
    async def handler(request: Request) -> Response:
        state = service.state
        return json_reply({"status": state}, 200 if state == "ok" else 503)

    return handler


def metrics(service: Service) -> Handler:
    async def handler(request: Request) -> Response:
        return Response(service.metrics.text(), headers={"content-type": CONTENT_TYPE})

    return handler


def models(service: Service) -> Handler:
    """OpenAI's list, with what a client may want to know of the model under `paligemma`."""
    settings = service.settings

    async def handler(request: Request) -> Response:
        pg = service.pg
        about = {
            "image_size": pg.processor.image_size,
            "loc_scale": pg.loc_scale,
            "dtype": str(pg.model.dtype).removeprefix("torch."),
            "device": str(pg.model.device),
            "embedded": settings.embedded,
            "max_new_tokens": settings.max_new_tokens,
            "max_images": settings.max_images,
            "max_body": settings.body_bytes,
            "max_pixels": settings.most_pixels,
        }
        model = {
            "id": settings.name, "object": "model", "created": service.created, "owned_by": "paligemma",
            "paligemma": about,
        }  # fmt: skip
        name = request.path_params.get("name")
        if name is None:
            return json_reply({"object": "list", "data": [model]})
        if name != settings.name:
            raise ApiError(404, "model_not_found", f"there is no such model here, only {settings.name!r}", "model")
        return json_reply(model)

    return handler


def openapi(service: Service) -> Handler:
    async def handler(request: Request) -> Response:
        return json_reply(document(service.settings))

    return handler


def explored_page(service: Service) -> Handler:
    async def handler(request: Request) -> Response:
        page = service.find_explored(request.url.path)
        if page is None:
            raise ApiError(404, "not_found", "this page is not kept any more: ask for it again")
        return Response(page, media_type="text/html", headers={"content-security-policy": EXPLORED_CSP})

    return handler


async def page(request: Request) -> Response:
    return FileResponse(STATIC / "index.html")


async def api_error(request: Request, error: ApiError) -> Response:
    return json_reply(error.body(), error.status, error.headers())


async def fault(request: Request, error: Exception) -> Response:
    """A mistake of ours on a path that answers no question."""
    log_fault(error)
    return json_reply(internal_error().body(), 500)


async def http_error(request: Request, error: HTTPException) -> Response:
    """Starlette's own errors: no such path, or not by this method."""
    code = {404: "not_found", 405: "method_not_allowed"}.get(error.status_code, "http_error")
    message = {404: "there is no such path", 405: f"{request.method} is not offered here"}.get(
        error.status_code, str(error.detail)
    )
    return json_reply(ApiError(error.status_code, code, message).body(), error.status_code, dict(error.headers or {}))
