"""A long training in pieces: each run does some minutes of it, and the learning rate follows the whole.

The training loop already saves and stops when it is asked to by a signal. A piece that is over asks in the same way.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from paligemma.train import distributed


class PieceOver(Exception):
    """The time of this run is over; the next one goes on."""


@contextmanager
def until(end: float) -> Iterator[Callable[[Callable[..., Any]], Callable[..., Any]]]:
    """Gives a wrapper for batches that stops the training loop after the step in which `time.monotonic()` passes `end`.

    Of several processes the first one's clock decides, so that all stop in the same step, for the same reason. Raises
    PieceOver if that is why the loop stopped.
    """
    stopped = False

    def limited(batches: Callable[..., Any]) -> Callable[..., Any]:
        def batch(step: int, part: int, parts: int) -> Any:
            nonlocal stopped
            over = distributed.broadcast(float(time.monotonic() > end))
            if over and not stopped:
                stopped = True
                signal.raise_signal(signal.SIGTERM)
            return batches(step, part, parts)

        return batch

    try:
        yield limited
    except KeyboardInterrupt:
        if stopped:
            raise PieceOver from None
        raise
