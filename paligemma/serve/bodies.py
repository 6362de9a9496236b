"""The body of a request: read within its limits of time and size, and taken apart as JSON or as a form.

uvicorn limits neither. Bytes are counted as they come (a chunked body does not say how long it is), and all bodies
that are held at a time have a limit together.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from starlette.datastructures import Headers, UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.types import Receive

from paligemma.files import parse_json
from paligemma.serve.errors import ApiError, invalid, shown
from paligemma.serve.pictures import Source
from paligemma.serve.settings import Settings

BODIES_TOGETHER = 4  # times max_body
PIECE = 2**18  # bytes of a form that are looked through at a time
MOST_PARTS = 2_000  # fields, and as many files, of a form: to read one takes .1 ms and a kilobyte, even if it is empty
MOST_VALUES = 100_000  # in a JSON body: 32 MB of "[],[],[],..." would take a gigabyte once it is read


class ClientLeft(Exception):
    """The client closed the connection: nobody is there to be told anything."""


@dataclass
class Body:
    """What a client sent: the value of its JSON or of its form's fields, and the files named `image`."""

    value: Any
    files: list[Source]
    account: _Account

    def release(self) -> None:
        """Forgets all of it, once its pictures are pixels: an answer may take long, and others want to send theirs."""
        self.value, self.files = None, []
        self.account.give_back()


class BodyMemory:
    """Counts the bytes of all bodies that are held."""

    def __init__(self, settings: Settings) -> None:
        self.most, self.held = BODIES_TOGETHER * settings.body_bytes, 0

    @contextmanager
    def account(self) -> Iterator[_Account]:
        account = _Account(self)
        try:
            yield account
        finally:
            account.give_back()


class _Account:
    def __init__(self, memory: BodyMemory) -> None:
        self.memory, self.bytes = memory, 0

    def add(self, count: int) -> None:
        if self.memory.held + count > self.memory.most:
            raise ApiError(
                429, "too_many_bodies", "the requests that are being read are too large together: try again",
                retry_after=1,
            )  # fmt: skip
        self.memory.held += count
        self.bytes += count

    def give_back(self) -> None:
        self.memory.held -= self.bytes
        self.bytes = 0


async def read_body(headers: Headers, receive: Receive, settings: Settings, account: _Account) -> bytes:
    """The whole body. ApiError 408, 413 and 429; ClientLeft where the client closes the connection before its end."""
    limit = settings.body_bytes
    too_large = ApiError(
        413, "body_too_large", f"the body has more than {settings.max_body:g} MB: send a smaller picture"
    )
    length = headers.get("content-length", "0")
    if length.isdecimal() and int(length[:20]) > limit:
        raise too_large
    chunks = bytearray()

    async def all_of_it() -> None:
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise ClientLeft
            chunk = message.get("body", b"")
            if len(chunks) + len(chunk) > limit:
                raise too_large
            account.add(len(chunk))
            chunks.extend(chunk)
            if not message.get("more_body", False):
                return

    try:
        await asyncio.wait_for(all_of_it(), settings.body_timeout)
    except (asyncio.TimeoutError, TimeoutError):
        raise ApiError(
            408, "body_timeout", f"the body was not complete after {settings.body_timeout:g} seconds"
        ) from None
    return bytes(chunks)


def content_type(headers: Headers, forms: bool) -> str:
    """The media type, if it is taken. (Pages of other origins can send forms unasked: `guard.py` checks the origin.)"""
    kind = headers.get("content-type", "").partition(";")[0].strip().lower()
    taken = ["application/json", *(["multipart/form-data"] if forms else [])]
    if kind not in taken:
        raise ApiError(
            415, "unsupported_media_type", f"the content type is {shown(kind)}, expected {' or '.join(taken)}",
            "Content-Type",
        )  # fmt: skip
    if headers.get("content-encoding", "identity").lower() != "identity":
        raise ApiError(
            415, "unsupported_media_type", "compressed bodies are not taken: leave Content-Encoding out",
            "Content-Encoding",
        )  # fmt: skip
    return kind


def parse_object(body: bytes) -> Any:
    """The JSON value of a body. NaN and huge numbers pass: the check of their field can name it."""
    if sum(map(body.count, (b",", b"[", b"{"))) > MOST_VALUES:
        raise invalid(None, f"the body holds more than {MOST_VALUES:,} values", "invalid_json")
    try:
        return parse_json(body, any_number=True)
    except ValueError as error:
        raise invalid(None, f"the body is not JSON: {str(error)[:200]}", "invalid_json") from None


async def parse_form(headers: Headers, body: bytes) -> tuple[dict[str, Any], list[Source]]:
    """The fields of a form, each with the type that JSON would give it, and the files named `image`."""

    async def stream() -> AsyncIterator[bytes]:
        for start in range(0, len(body), PIECE):
            yield body[start : start + PIECE]
            await asyncio.sleep(0)  # others may run: to look through 32 MB takes a while

    # More than any request may have: the checks of its fields can say what there is too much of.
    parser = MultiPartParser(
        headers, stream(), max_files=MOST_PARTS, max_fields=MOST_PARTS, max_part_size=len(body)  # type: ignore[arg-type]
    )  # fmt: skip
    parser.spool_max_size = len(body) + 1  # everything is in memory already: nothing goes to disk
    try:
        form = await parser.parse()
    except MultiPartException as error:
        raise invalid(None, f"the form cannot be read: {error.message[:200]}", "invalid_form") from None
    except (KeyError, ValueError, UnicodeDecodeError):
        raise invalid(None, "the form cannot be read: it has no boundary, or a broken header", "invalid_form") from None
    fields: dict[str, Any] = {}
    sources: list[Source] = []
    try:
        for name, value in form.multi_items():
            if isinstance(value, UploadFile):
                if name != "image":
                    raise invalid(name[:100], f"unknown file {shown(name)}, expected image", "unknown_field")
                sources.append(Source(await value.read(), "image", value.filename or None))
            elif name == "labels":
                fields.setdefault("labels", []).append(value)
            elif name == "image" and ":" not in value[:64]:  # a file with filename*=, which RFC 7578 forbids in forms
                raise invalid("image", 'image is a field of text, expected a file (filename="...") or a data: URL')
            elif name in fields:
                raise invalid(name[:100], f"{shown(name)} is there twice")
            else:
                fields[name] = form_value(name, value)
    finally:
        await form.close()
    return fields, sources


TEXTS = ("image", "prompt", "model", "masks")


def form_value(name: str, value: str) -> Any:
    """Forms have no types: numbers and true and false are read as JSON, everything else is text."""
    if name in TEXTS:
        return value
    try:
        return parse_json(value.encode(), any_number=True)
    except ValueError:
        return value
