"""What is checked of every request and added to every reply, whatever its path. A plain ASGI application around the
other one: Starlette's `BaseHTTPMiddleware` would hide a client that leaves.

- *Host*: a name that is not the server's own is a page of somebody else whose name was made to point here (DNS
  rebinding): 403.
- *Origin*: a page of another origin may not ask, unless it was allowed: 403.
- *Key*: every path but the page, `/health` and pages of `/explored` (whose random names are secrets): 401.
- The log has a line for each request: never a prompt, a picture, a key or a query.
"""

from __future__ import annotations

import hmac
import json
import re
import sys
import time
from datetime import datetime, timezone
from urllib.parse import quote, urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from paligemma.serve.conversation import Reply
from paligemma.serve.errors import ApiError, shown
from paligemma.serve.service import Service
from paligemma.terminal import printable

HEADERS = {
    "content-security-policy": "default-src 'self'; img-src 'self' blob: data:",
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "no-referrer",
    "cache-control": "no-store",
}
OPEN_PATHS = ("/", "/health")
OPEN_FOLDERS = ("/static/", "/explored/")
ROUTES = (
    "/", "/health", "/metrics", "/openapi.json", "/v1/models", "/v1/chat/completions", "/v1/answer", "/v1/detect",
    "/v1/segment", "/v1/explore",
)  # fmt: skip


class Guard:
    def __init__(self, app: ASGIApp, service: Service) -> None:
        self.app, self.service = app, service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        if scope["type"] != "http":
            await send({"type": "websocket.close", "code": 1003})
            return
        start, status = time.perf_counter(), 0
        headers = Headers(scope=scope)
        origin = headers.get("origin")
        cors = origin if origin in self.service.settings.origins else None

        async def send_with_headers(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                added = MutableHeaders(scope=message)
                for name, value in HEADERS.items():
                    added.setdefault(name, value)
                if scope["path"].startswith("/static/") or scope["path"] == "/":
                    added["cache-control"] = "no-cache"  # the browser asks whether it changed
                if cors is not None:
                    added["access-control-allow-origin"] = cors
                    added["access-control-expose-headers"] = "Retry-After"
                    added.add_vary_header("Origin")
            await send(message)

        try:
            if cors is not None and scope["method"] == "OPTIONS":
                check_host(headers, self.service.settings.hosts)
                await preflight(headers, send_with_headers)
                return
            self.check(scope, headers)
            await self.app(scope, receive, send_with_headers)
        except ApiError as error:
            await Reply(send_with_headers).error(error)
        finally:
            self.record(scope, status, time.perf_counter() - start)

    def check(self, scope: Scope, headers: Headers) -> None:
        """ApiError 403 or 401."""
        settings = self.service.settings
        check_host(headers, settings.hosts)
        origin, host = headers.get("origin"), headers.get("host", "")
        # A proxy may speak TLS before us, so the scheme says nothing: name and port must be those that were asked.
        if origin is not None and origin not in settings.origins and netloc(origin) != host.lower():
            raise ApiError(
                403, "origin_not_allowed", f"pages of {shown(origin)} may not ask here (--cors allows them)", "Origin"
            )
        path = scope["path"]
        if settings.api_key is None or path in OPEN_PATHS or path.startswith(OPEN_FOLDERS):
            return
        scheme, _, key = headers.get("authorization", "").partition(" ")
        right = hmac.compare_digest(key.strip().encode("utf-8", "replace"), settings.api_key.encode())
        if scheme.lower() != "bearer" or not right:
            raise NoKey

    def record(self, scope: Scope, status: int, seconds: float) -> None:
        """One line of the log, and the count. Status 499: the client left before there was one."""
        path = scope["path"]
        route = next((r for r in ROUTES if r == path), None) or next(
            (f"{folder}..." for folder in (*OPEN_FOLDERS, "/v1/models/") if path.startswith(folder)), "other"
        )
        self.service.metrics.requests.labels(route, str(status or 499)).inc()
        written = quote(path)[:100] if route == "other" else route  # quoted: no line break, no control character
        client = scope["client"][0] if scope.get("client") else "-"
        moment = datetime.now(timezone.utc).isoformat(timespec="milliseconds")
        method, code, ms = printable(scope["method"])[:20], status or 499, round(seconds * 1000, 1)
        if self.service.settings.log == "json":
            line = json.dumps(
                {"time": moment, "client": client, "method": method, "path": written, "status": code, "ms": ms}
            )
        else:
            line = f"{moment} {client} {method} {written} {code} {ms} ms"
        print(line, file=sys.stderr, flush=True)


class NoKey(ApiError):
    def __init__(self) -> None:
        super().__init__(401, "invalid_api_key", "the key is missing or wrong: send Authorization: Bearer KEY")


async def preflight(asked: Headers, send: Send) -> None:
    """What a browser asks before it lets an allowed page of another origin ask with a key and JSON. Whatever headers it
    names are allowed: OpenAI's client sends several of its own, and none changes an answer."""
    names = asked.get("access-control-request-headers", "").split(",")
    more = [name.strip() for name in names if re.fullmatch(r"[\w!#$%&'*+.^`|~-]+", name.strip(), re.ASCII)]
    headers = [
        (b"access-control-allow-methods", b"GET, POST"),
        (b"access-control-allow-headers", ", ".join(["Authorization", "Content-Type", *more]).encode()),
        (b"access-control-max-age", b"600"),
        (b"content-length", b"0"),
    ]
    await send({"type": "http.response.start", "status": 204, "headers": headers})
    await send({"type": "http.response.body", "body": b""})


def check_host(headers: Headers, hosts: tuple[str, ...]) -> None:
    host = headers.get("host", "")
    if name_of(host) not in hosts:
        raise ApiError(
            403, "host_not_allowed", f"the Host header is {shown(host)}, which is not this server's name "
            "(--allow-host adds one)", "Host",
        )  # fmt: skip


def name_of(host: str) -> str:
    """Without the port: "[::1]:8000" -> "[::1]"."""
    name, colon, port = host.lower().rpartition(":")
    return name if colon and port.isdecimal() else host.lower()


def netloc(origin: str) -> str:
    try:
        return urlsplit(origin).netloc.lower()
    except ValueError:
        return ""
