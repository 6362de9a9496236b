"""A stand-in for the engine: rows one after another."""

from __future__ import annotations

from collections import deque
from typing import Any

from torch import Tensor

from paligemma.answers.parsing import NUM_LOC
from paligemma.engine import generate
from paligemma.generation import Generated, Options


class Request:
    def __init__(self, prompt: Tensor, image_features: Any, options: Options, constraint: Any = None) -> None:
        self.prompt, self.image_features, self.options, self.constraint = prompt, image_features, options, constraint


class Ticket:
    def __init__(self, request: Request) -> None:
        self.request, self.done, self.cancelled = request, False, False
        self.generated = Generated()
        self.error: Exception | None = None

    def written(self, start: int) -> tuple[list[int], list[float]]:
        return self.generated.token_ids[start:], self.generated.token_logprobs[start:]

    def result(self) -> Generated:
        if self.error:
            raise self.error
        return self.generated

    def cancel(self) -> None:
        self.cancelled = True


class Engine:
    def __init__(self, model: Any, **_: Any) -> None:
        self.model = model
        self.waiting: deque[Ticket] = deque()

    def admit(self, request: Request) -> Ticket:
        self.waiting.append(ticket := Ticket(request))
        return ticket

    def step(self) -> bool:
        ticket = self.waiting.popleft()
        request = ticket.request
        try:
            if ticket.cancelled:
                raise ValueError("cancelled")
            inputs = {"input_ids": request.prompt[None], "image_features": request.image_features}
            fields: dict[str, Any] = {**vars(request.options), "constraint": request.constraint}
            (ticket.generated,) = generate(self.model, inputs, **fields)
        except Exception as error:
            ticket.error = error
        ticket.done = True
        return bool(self.waiting)


def row_options(pg: Any, row: Any) -> Options:
    tokenizer = pg.processor.tokenizer
    watch = (tokenizer.first_loc_id, NUM_LOC)
    return Options(row.max_new_tokens, watch=watch, num_tokens=len(tokenizer), **row.sampling.options())
