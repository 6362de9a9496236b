"""What may come next: two masks that lie on the logits before a token is chosen.

1. Ids that were never trained, and those the caller suppresses, are never produced (`never_produced`).
2. A *constraint*, one function per row, may allow a few ids only: `grammar.py` has those for boxes, masks and choices.

    constraint([<loc0100>, <loc0020>], remaining=30)  ->  the ids of <loc0000> ... <loc1023>

A constraint knows the budget, so that it can close an answer in time. But then an end says nothing about what the
model wanted: with 3 tokens left there is no room for another box of 5, so eos is the only id that fits, and would look
like the model's own choice. So wherever an answer may end, the constraint is asked twice, the second time as if the
budget had no end (`allowed_next`). The model chooses among the ids of both. If it chooses one that does not fit, the
budget has ended the answer.

Letters: N rows (or beams) still running, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

if TYPE_CHECKING:
    from paligemma.modeling_gemma import PaliGemmaConfig

# Constraint(generated, remaining) -> int64 [n], the ids that may come next (never empty), or None for any. They are
# best given in ascending order, each once: others are sorted at every step.
# generated: what the row has produced so far. remaining: tokens left in the budget; eos counts as one. A pure function
# of the two, since beams fork and rows leave.
Constraint = Callable[[Sequence[int], int], "Tensor | None"]

NO_END = 2**31  # `remaining` of a budget that never ends

# Tensors of ids that were found to be in order. Our grammars give the same few again and again, and to look through a
# quarter of a million ids (a label of any text) at every step would take as long as the rest of the constraint.
_SORTED = WeakTensorKeyDictionary()


def never_produced(config: PaliGemmaConfig, num_tokens: int | None, suppress_tokens: Sequence[int] | None) -> Tensor:
    """bool [V], True for the ids that no answer may hold.

    num_tokens: `len(tokenizer)`; the embedding has rows beyond it that were never trained. Without it everything from
    <image> on counts as untrained, which is so wherever <image> is the last token: in every published checkpoint.
    """
    V, image = config.text_config.vocab_size, config.image_token_index
    never = torch.zeros(V, dtype=torch.bool)
    never[image if num_tokens is None else num_tokens :] = True
    never[image : image + 1] = True  # a slice: the id may lie beyond the embedding
    for token in suppress_tokens or ():
        if not 0 <= token < V:
            raise ValueError(f"suppress_tokens has {token}, expected ids from 0 to {V - 1}")
        never[token] = True
    if never.all():
        raise ValueError("every token of the vocabulary is suppressed: nothing could be produced")
    return never


def one_per_row(given: Constraint | Sequence[Constraint | None] | None, rows: int) -> list[Constraint | None]:
    """A constraint, or None, for each row. Raises ValueError for a list of another length."""
    if given is None or callable(given):
        return [given] * rows
    if len(given) != rows:
        raise ValueError(f"{len(given)} constraints for {rows} rows: pass one for all, or one (or None) per row")
    return list(given)


def allowed_ids(
    constraints: Sequence[Constraint | None], generated: Sequence[Sequence[int]], remaining: int, vocab_size: int
) -> list[Tensor | None]:
    """What each row's constraint allows next, sorted; None for anything. ValueError for ids that do not exist."""
    allowed: list[Tensor | None] = []
    for row, constraint in enumerate(constraints):
        ids = constraint(generated[row], remaining) if constraint else None
        if ids is not None and not isinstance(ids, Tensor):
            raise TypeError(f"a constraint returned {type(ids).__name__}, expected ids as an int64 tensor, or None")
        if ids is not None and ids not in _SORTED:
            if bool((ids[1:] > ids[:-1]).all()):
                _SORTED[ids] = True
            else:
                ids = torch.unique(ids)
        if ids is not None and ids.numel() and (int(ids[0]) < 0 or int(ids[-1]) >= vocab_size):
            raise ValueError(f"a constraint allows ids {int(ids[0])} to {int(ids[-1])}, the model has {vocab_size}")
        allowed.append(ids)
    return allowed


def allowed_next(
    constraints: Sequence[Constraint | None],
    generated: Sequence[Sequence[int]],
    remaining: int,
    vocab_size: int,
    eos: int,
) -> tuple[list[Tensor | None], dict[int, Tensor]]:
    """What each of the N rows chooses from, None for anything; and by the row's place among the N those ids that fit
    into its budget, where not all do.

    Within an answer, a row chooses from what the constraint allows. Where the answer may end, also from what it would
    allow without a budget: else an end that the budget forces would look like the model's own choice, and so would a
    shorter label in place of a longer one. (So the answer to a smaller budget is the beginning of that to a larger.)
    """
    allowed = allowed_ids(constraints, generated, remaining, vocab_size)
    fitting: dict[int, Tensor] = {}
    for row, ids in enumerate(allowed):
        if ids is None or not contains(ids, eos):
            continue
        (wanted,) = allowed_ids(constraints[row : row + 1], generated[row : row + 1], NO_END, vocab_size)
        if wanted is not ids and (wanted is None or not torch.equal(wanted, ids)):
            allowed[row] = wanted if wanted is None else torch.unique(torch.cat([wanted, ids]))
            fitting[row] = ids
    return allowed, fitting


def contains(ids: Tensor, token: int) -> bool:
    """Whether sorted ids contain this one. (`in` would look at all of them: a quarter of a
    million where a label may be any text.)"""
    place = int(torch.searchsorted(ids, token))
    return place < len(ids) and int(ids[place]) == token


def masked_logits(logits: Tensor, never: Tensor, allowed: Sequence[Tensor | None]) -> Tensor:
    """The logits in float32 with -inf wherever a token is not allowed: [N, V] -> [N, V], a copy.

    never: bool [V], or [N, V] where rows differ. allowed: from `allowed_next`, one per row of `logits`. A row in which
    nothing is left has -inf everywhere: `nothing_allowed` is the error for it.
    """
    scores = logits.to(torch.float32, copy=True).masked_fill_(never, -math.inf)
    for row, ids in enumerate(allowed):
        if ids is None:
            continue
        ids = ids.to(scores.device)
        kept = scores[row, ids]
        scores[row] = -math.inf
        scores[row, ids] = kept
    return scores


class NothingAllowed(ValueError):
    """What a row ends with whose constraint leaves nothing that may be produced."""


def nothing_allowed(generated: Sequence[int], remaining: int) -> NothingAllowed:
    return NothingAllowed(
        f"a constraint allows nothing that may be produced after {list(generated)}, with {remaining} left in the "
        "budget: it must always leave a token, at the end eos"
    )
