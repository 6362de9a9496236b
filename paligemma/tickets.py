"""What goes into the engine and what comes back: a `Request`, and the `Ticket` by which its answer is followed.

    ticket = engine.admit(Request(prompt, image_features, Options(max_new_tokens=64)))
    for token in ticket: ...        # ids as they come
    for piece in ticket.pieces(): ...
    ticket.result()                 # Generated, or the error of this row

The engine writes into a ticket in its own thread, and any other thread may wait for it.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import CancelledError
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from torch import Tensor

from paligemma.answers.constraints import Constraint
from paligemma.generation import Generated, Options
from paligemma.tokenizer import start_of_last_character

if TYPE_CHECKING:
    from paligemma.engine import Engine


@dataclass(frozen=True, eq=False)
class Request:
    """One row to answer.

    prompt: int64 [S], without padding; <image> stands P times for each picture. image_features: [n, P, D] from
    `model.encode_image`, the row's n pictures; None for a row without. options: its seed and constraint are this
    row's; beams run in `generate` only. constraint: in place of the options' one. token_type_ids: int64 [S], 1 for the
    beginning of an answer that is to be continued; None where all is prompt.
    """

    prompt: Tensor
    image_features: Tensor | None = None
    options: Options = field(default_factory=Options)
    constraint: Constraint | None = None
    token_type_ids: Tensor | None = None


class Ticket:
    """A request on its way. All methods may be called from any thread.

    Iterating, `pieces` and `result` wait for what comes next while another thread drives the engine (calls `step`).
    Where no other thread does, they take the steps themselves.

    answer: what is written so far. done: whether the row has ended. error: what it ended with, None for an answer.
    admitted, started, first_token, ended: when (`time.perf_counter()`) it was admitted, its prompt began to be read,
    its first token came, and it ended; None before that.
    """

    def __init__(self, engine: Engine, listener: Callable[[], object] | None = None):
        self._engine, self._listener = engine, listener
        self.answer = Generated()
        self._changed = threading.Condition()
        self.done = False
        self.error: BaseException | None = None
        self.admitted = time.perf_counter()
        self.started: float | None = None
        self.first_token: float | None = None
        self.ended: float | None = None

    def __iter__(self) -> Iterator[int]:
        """The ids of the answer, without eos, from the first one. Raises as `result` does."""
        count = 0
        while self._more_than(count):
            yield self.answer.token_ids[count]
            count += 1
        self.result()

    def pieces(self) -> Generator[str, None, Generated]:
        """The answer in pieces of text, as `stream` gives them; the generator returns the `Generated`.

        Raises as `result` does, and ValueError if the engine has no tokenizer.
        """
        tokenizer, count, shown = self._engine.tokenizer, 0, 0
        if tokenizer is None:
            raise ValueError("the engine has no tokenizer: give it one to get text")
        while self._more_than(count):
            ids = self.answer.token_ids[:]
            text, count = tokenizer.decode_stable(ids), len(ids)
            whole = start_of_last_character(text)
            if whole > shown:
                yield text[shown:whole]
                shown = whole
        answer = self.result()
        text = tokenizer.decode(answer.token_ids)
        if len(text) > shown:
            yield text[shown:]
        return answer

    def result(self) -> Generated:
        """The answer. Raises the error of this row, or `concurrent.futures.CancelledError` after `cancel`."""
        self._more_than(math.inf)
        if self.error is not None:
            raise self.error
        return self.answer

    def written(self, start: int = 0) -> tuple[list[int], list[float]]:
        """The ids from place `start` on that are there now, and their log-probabilities. Does not wait."""
        ids = self.answer.token_ids[start:]
        return ids, self.answer.token_logprobs[start : start + len(ids)]

    def cancel(self) -> None:
        """Gives the answer up. The row leaves before the engine's next step; nothing happens if it has ended."""
        self.end(CancelledError("the request was cancelled"))

    def _more_than(self, count: float) -> bool:
        """Waits until there are more than `count` tokens, or the row has ended. Whether there are."""
        while not self.done and len(self.answer.token_ids) <= count:
            if self._engine.runs_elsewhere():
                with self._changed:  # for a second at most, because the thread that drives the engine may die
                    self._changed.wait_for(lambda: self.done or len(self.answer.token_ids) > count, timeout=1)
            else:
                self._engine.advance()
        return len(self.answer.token_ids) > count

    # ------------------------------------------------------------------------------------------ for the engine

    def tell(self) -> None:
        """A token has come, or the end: wakes whoever waits."""
        if self.first_token is None and self.answer.token_ids:
            self.first_token = time.perf_counter()
        with self._changed:
            self._changed.notify_all()
        if self._listener is not None:
            try:
                self._listener()
            except Exception as error:  # the fault of this row alone; it is not called again
                self._listener = None
                self.end(error)

    def end(self, error: BaseException | None = None) -> None:
        """The row ends, with its answer or with an error. Only the first end counts."""
        with self._changed:
            if self.done:
                return
            self.error, self.ended, self.done = error, time.perf_counter(), True
        self.tell()
