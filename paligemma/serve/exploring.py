"""`/v1/explore`: the look-inside page of a picture and a prompt, made by the same model that answers.

It is made on the engine's thread between two steps: what looks inside are hooks on the model, and they must not see
the rows of others. Rows wait meanwhile, so one page is made at a time, without knock-outs, which take a pass of the
model for every patch, and with routes, some hundred passes, only where these are quick. Where its client has left, it
ends with the pass that runs.
"""

from __future__ import annotations

import asyncio
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from PIL import Image

from paligemma.inference import PaliGemma
from paligemma.serve.errors import ApiError, invalid
from paligemma.serve.pictures import Source, check_header, content, decode
from paligemma.serve.rows import Ask, lay_out
from paligemma.serve.service import Service

MOST_BYTES = 8_000_000


class Abandoned(Exception):
    """Nobody waits for the page any more."""


async def explore(service: Service, ask: Ask, turn: asyncio.Event) -> str:
    """The path of the page. turn: set once the engine's thread begins with it."""
    await service.in_worker(lay_out, service.pg, ask)  # for its checks
    if service.exploring:
        raise ApiError(
            429, "exploring", "a page is being made already, and one is made at a time: try again", retry_after=5
        )
    service.exploring = True
    abandoned = threading.Event()
    try:
        sources = await service.contents(ask.sources)
        pictures = await service.in_worker(decode_all, sources, service.settings.most_pixels)
        loop = asyncio.get_running_loop()

        def begin(pg: PaliGemma) -> bytes:
            loop.call_soon_threadsafe(turn.set)
            return make_page(pg, pictures, ask, abandoned.is_set)

        made = service.engine.call(begin)
    except BaseException:
        service.exploring = False
        raise
    # Not when this request ends: where its client has left, a pass of the model still runs.
    made.add_done_callback(lambda _: setattr(service, "exploring", False))
    try:
        return service.keep_explored(await asyncio.wrap_future(made))
    finally:
        abandoned.set()


def decode_all(sources: list[Source], most_pixels: int) -> list[Image.Image]:
    """The pictures, which stay in memory until the page is made: together within the limit of one."""
    pictures, pixels = [], 0
    for source in sources:
        data = content(source)
        pixels += check_header(data, source, most_pixels)
        if pixels > most_pixels:
            raise ApiError(
                413, "too_many_pixels",
                f"the pictures have more than {most_pixels / 1e6:g} million pixels together: scale them down",
                source.param,
            )  # fmt: skip
        pictures.append(decode(data, source, most_pixels))
    return pictures


def make_page(pg: PaliGemma, pictures: list[Image.Image], ask: Ask, abandoned: Callable[[], bool]) -> bytes:
    """Raises Abandoned once `abandoned()` is true."""
    from paligemma import explore
    from paligemma.explore.stages import many_passes_are_quick

    try:
        with stopping_when(abandoned, pg), tempfile.TemporaryDirectory() as folder:
            path, seen = Path(folder) / "look.html", tuple(pictures) if len(pictures) > 1 else pictures[0]
            look = explore.look(pg, seen, ask.prompt, max_new_tokens=ask.max_new_tokens)
            explore.page(look, path, MOST_BYTES, knock_out=False, routes=many_passes_are_quick(pg))
            return path.read_bytes()
    except ValueError as error:
        raise invalid("prompt", f"the page could not be made: {error}") from None


@contextmanager
def stopping_when(abandoned: Callable[[], bool], pg: PaliGemma) -> Iterator[None]:
    """Within it every pass of the model, be it for one token of the answer or for a route, raises Abandoned at its
    beginning once `abandoned()` is true."""

    def check(*_: object) -> None:
        if abandoned():
            raise Abandoned

    handle = pg.model.language_model.model.register_forward_pre_hook(check)
    try:
        yield
    finally:
        handle.remove()
