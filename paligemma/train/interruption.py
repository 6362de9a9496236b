"""Ctrl-C and SIGTERM end a run between two steps, when it can be saved."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


class Terminated(KeyboardInterrupt):
    """SIGTERM came, not Ctrl-C."""

    exit_code = 143  # Ctrl-C: 130


@contextmanager
def stop_signals() -> Iterator[Callable[[], bool]]:
    """Yields a function that says whether Ctrl-C was pressed (or SIGTERM came). A second Ctrl-C stops at once. After
    SIGTERM, the KeyboardInterrupt that is raised inside becomes Terminated."""
    asked: list[int] = []

    def handle(number: int, frame: Any) -> None:
        if asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        asked.append(number)

    if threading.current_thread() is not threading.main_thread():  # only there signals may be handled
        yield lambda: False
        return
    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: bool(asked)
    except KeyboardInterrupt as stop:
        if asked[:1] == [signal.SIGTERM]:
            raise Terminated(*stop.args) from None
        raise
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
