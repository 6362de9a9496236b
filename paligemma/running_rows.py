"""The rows inside the engine, and how each of them gets its next token.

    allowed, fitting = allowed_for(rows, V)                      what each may choose from
    kept = choose_tokens(rows, logits, allowed, fitting, dtype)  a token for each, and who goes on

A row chooses by options of its own, so that greedy and sampled rows, with a grammar and without, run together. Where a
row fails (a constraint that raises or allows nothing, logits that are NaN or infinite), its ticket ends with that
error; the others go on. `engine.py` decides who runs, and when.

Letters: N rows, S prompt length, k tokens that are read together, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from paligemma.answers.constraints import Constraint, allowed_next, contains, masked_logits
from paligemma.attention_mask import PREFIX
from paligemma.generation import NOT_WATCHED, Generated, Options, Rules, choose, watched_distributions, why_no_token
from paligemma.tickets import Request, Ticket


@dataclass(eq=False)
class RunningRow:
    """What the engine knows of a request. unread: tokens that were chosen and are not in the cache yet."""

    request: Request
    ticket: Ticket
    rules: Rules
    constraint: Constraint | None
    generator: torch.Generator | None
    unread: list[int] = field(default_factory=list)

    @property
    def answer(self) -> Generated:
        return self.ticket.answer

    @property
    def remaining(self) -> int:
        return self.request.options.max_new_tokens - len(self.answer.token_ids)

    @property
    def columns_to_come(self) -> int:
        """How many columns of the cache the row may still need."""
        return len(self.unread) + self.remaining


def batch_of(requests: Sequence[Request]) -> dict[str, Tensor]:
    """The inputs of the model for some rows, padded on the left."""
    S = max(len(request.prompt) for request in requests)
    prompts = [request.prompt for request in requests]
    types = [torch.full_like(r.prompt, PREFIX) if r.token_type_ids is None else r.token_type_ids for r in requests]
    columns = {
        "input_ids": prompts,
        "attention_mask": [torch.ones_like(prompt) for prompt in prompts],
        "token_type_ids": types,
    }
    batch = {name: torch.stack([F.pad(row, (S - len(row), 0)) for row in rows]) for name, rows in columns.items()}
    features = [request.image_features for request in requests if request.image_features is not None]
    if features:
        batch["image_features"] = torch.cat(features)
    return batch


def unread_of(rows: Sequence[RunningRow], device: torch.device) -> tuple[Tensor, Tensor | None]:
    """The rows' unread tokens, int64 [N, k], padded on the left, and where they are real, bool [N, k].

    None in place of the second where all are real.
    """
    unread = [row.unread for row in rows]
    k = max(map(len, unread))
    tokens = torch.tensor([[0] * (k - len(ids)) + ids for ids in unread], device=device)
    if all(len(ids) == k for ids in unread):
        return tokens, None
    return tokens, torch.tensor([[False] * (k - len(ids)) + [True] * len(ids) for ids in unread], device=device)


# ---------------------------------------------------------------------------------------------- choosing


def allowed_for(rows: Sequence[RunningRow], vocab_size: int) -> tuple[list[Tensor | None], list[Tensor | None]]:
    """What each row may choose from, and which of these fit into its budget (None: all), see `allowed_next`.

    A row whose constraint raises ends with that error.
    """
    allowed: list[Tensor | None] = [None] * len(rows)
    fitting: list[Tensor | None] = [None] * len(rows)
    for n, row in enumerate(rows):
        if row.constraint is None:
            continue
        try:
            ids, fits = allowed_next([row.constraint], [row.answer.token_ids], row.remaining, vocab_size, row.rules.eos)
            allowed[n], fitting[n] = ids[0], fits.get(0)
        except Exception as error:
            row.ticket.end(error)
    return allowed, fitting


def choose_tokens(
    rows: Sequence[RunningRow],
    logits: Tensor,
    allowed: Sequence[Tensor | None],
    fitting: Sequence[Tensor | None],
    dtype: torch.dtype,
) -> list[int]:
    """Chooses a token for each row from its logits [N, V], and returns the places of the rows that go on.

    dtype: the model's, for the error of a row whose logits are NaN or infinite.
    """
    never = rows[0].rules.never
    if any(row.rules is not rows[0].rules for row in rows):
        never = torch.stack([row.rules.never for row in rows])
    scores = masked_logits(logits, never, allowed)
    totals = scores.logsumexp(-1)
    sound = [math.isfinite(total) for total in totals.tolist()]
    tokens = scores.argmax(-1)
    for options, places in _grouped(rows, lambda row: _sampling(row.request.options)):
        if options is not None and (places := [n for n in places if sound[n]]):
            generators = [generator for n in places if (generator := rows[n].generator) is not None]
            tokens[places] = choose(_taken(scores, places), options, generators)
    logprobs = (scores.gather(-1, tokens[:, None])[:, 0] - totals).tolist()
    watched = [NOT_WATCHED] * len(rows)
    for watch, places in _grouped(rows, lambda row: row.request.options.watch):
        if watch is not None:
            for n, found in zip(places, watched_distributions(_taken(scores, places), watch)):
                watched[n] = found

    kept: list[int] = []
    for n, (row, token) in enumerate(zip(rows, tokens.tolist())):
        fits = fitting[n]
        if row.ticket.done:
            continue  # its constraint has raised, or it was cancelled
        if not sound[n]:
            generated = row.answer.token_ids
            row.ticket.end(why_no_token(scores[n], allowed[n] is not None, generated, row.remaining, dtype))
        elif fits is not None and not contains(fits, token):
            row.ticket.end()  # what it chose does not fit into the budget, so the answer ends without it
        else:
            row.rules.record(row.answer, token, logprobs[n], watched[n])
            if row.answer.finished or not row.remaining:
                row.ticket.end()
            else:
                row.unread.append(token)
                row.ticket.tell()
                kept.append(n)
    return kept


Key = TypeVar("Key")


def _grouped(rows: Sequence[RunningRow], key: Callable[[RunningRow], Key]) -> Iterator[tuple[Key, list[int]]]:
    """The places of the rows that have the same key."""
    groups: dict[Key, list[int]] = {}
    for n, row in enumerate(rows):
        groups.setdefault(key(row), []).append(n)
    yield from groups.items()


def _taken(scores: Tensor, places: list[int]) -> Tensor:
    """These rows of the scores; no copy where it is all of them."""
    return scores if len(places) == len(scores) else scores[places]


def _sampling(options: Options) -> Options | None:
    """Equal for rows whose tokens are drawn in the same way; None for greedy rows."""
    if not options.do_sample:
        return None
    return Options(do_sample=True, temperature=options.temperature, top_k=options.top_k, top_p=options.top_p)
