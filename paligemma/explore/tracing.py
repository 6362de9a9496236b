"""Where the answer comes from: which route the information takes, and where it stands after each layer.

`routes` cuts one kind of edge at a time, such as all those from the prompt to the picture, in a few layers around each
layer. `patch` goes the other way: it takes two pictures that differ in one thing, runs the model on the second, and
puts the first one's hidden states in its place, a group of columns and a layer at a time. Where that brings back the
first answer, the difference stands there.

Follows arXiv 2411.18620 (cutting edges) and 2202.05262 (patching hidden states).
Letters: S tokens, L layers, G groups, n images, P patches of an image, R routes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from paligemma.explore.changing import cutting, edges_between
from paligemma.explore.watching import ROWS_AT_ONCE, Look, numbers_of, run

Change = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


@dataclass(repr=False)
class Routes:
    """change: float32 [R, L], 1 - p_cut / p of the token: 1 where it is lost, 0 where nothing changes, below 0 where it
    gets likelier. names: of the routes, "image->prompt" for what the prompt reads from the picture."""

    change: Tensor
    names: list[str]

    def __repr__(self) -> str:
        return f"Routes({', '.join(self.names)}; {self.change.shape[1]} layers)"


def routes(look: Look, token: int, window: int = 3) -> Routes:
    """Every route between groups of columns, cut in the `window` layers around each layer (fewer at the ends).

    Groups as in `Look.groups`; "X->Y" cuts the edges by which the queries of Y look at the keys of X. No column is cut
    from itself, and only the last column reads the answer so far. Raises ValueError for a token that the answer does
    not have, or a window below 1.
    """
    if window < 1:
        raise ValueError(f"window is {window}, expected at least one layer")
    groups = look.groups(token)
    last = groups["last"][0]
    names, edges = [], []
    for source in ("image", "bos", "prompt", "newline", "answer so far"):
        for target in ("image", "bos", "prompt", "newline", "last"):
            if target == "newline" and groups[target] == [last]:
                continue  # before token 0 the newline is the last column
            keys = [column for column in groups[source] if column != last]
            if source == target or not keys or not groups[target]:
                continue
            if source == "answer so far" and target != "last":
                continue  # the prefix never sees the answer
            names.append(f"{source.removesuffix(' so far')}->{target}")
            edges.append(edges_between(look, groups[target], keys))
    L = look.num_layers
    tries = [(route, layer) for route in range(len(names)) for layer in range(L)]
    found = []
    for start in range(0, len(tries), ROWS_AT_ONCE):
        some = tries[start : start + ROWS_AT_ONCE]
        of_rows = torch.stack([edges[route] for route, _ in some])  # [rows, S, S]
        around = torch.tensor([layer for _, layer in some])
        changes: dict[int, Change] = {}
        for layer in range(L):
            # Of a window of 3 the layers l - 1 ... l + 1; of an even one, one more before than after.
            active = (around - window // 2 <= layer) & (layer < around - window // 2 + window)
            if active.any():
                changes[layer] = cutting(of_rows & active[:, None, None])
        found.append(_logprobs(look, run(look, len(some), layers=changes), last)[:, look.answer_ids[token]])
    change = 1 - (torch.cat(found) - look.logprobs[token]).exp()
    return Routes(change.view(len(names), L), names)


@dataclass(repr=False)
class Patching:
    """restored: float32 [G, L], how much of the difference between the two answers comes back when the input of layer l
    is that of the first picture in one group of columns: 0 nothing, 1 all. names: of the groups. per_patch: [L, n * P],
    the same for single patches, if asked for."""

    restored: Tensor
    names: list[str]
    per_patch: Tensor | None = None

    def __repr__(self) -> str:
        return f"Patching({', '.join(self.names)}; {self.restored.shape[1]} layers)"


def patch(
    look_a: Look,
    look_b: Look,
    token: int,
    groups: Mapping[str, Sequence[int]] | None = None,
    patches: bool = False,
) -> Patching:
    """Runs b with hidden states of a. The measure is m = log p(a's token) - log p(b's token), where answer token
    `token` is predicted; restored = (m - m_b) / (m_a - m_b).

    groups: {name: columns}; default those of `Look.groups`; empty ones are left out. patches: also each patch by
    itself. Raises ValueError where a and b are not of the same model and prompt, do not have the same number of
    columns, or do not differ in what they predict there, for columns that do not exist, and if all groups are empty.
    """
    check_same_prompt(look_a, look_b)
    column = look_b.query_of(token)
    if look_a.query_of(token) != column or len(look_a.input_ids) != len(look_b.input_ids):
        raise ValueError(
            f"the two passes have {len(look_a.input_ids)} and {len(look_b.input_ids)} columns: patching needs equal "
            "numbers. Pass both looks an answer of the same length"
        )
    of_a, of_b = int(look_a.answer_ids[token]), int(look_b.answer_ids[token])
    if of_a == of_b:
        raise ValueError(f"answer token {token} is {look_a.tokens[column + 1]!r} in both: there is nothing to restore")

    S, named = len(look_b.input_ids), look_b.groups(token) if groups is None else groups
    checked = {name: numbers_of(columns, S, f"group {name!r} has", "columns") for name, columns in named.items()}
    kept = {name: columns for name, columns in checked.items() if columns}
    if not kept:
        raise ValueError("no group has any column: there is nothing to put in")

    def measure(hidden: Tensor) -> Tensor:
        logprobs = _logprobs(look_b, hidden, column)
        return logprobs[:, of_a] - logprobs[:, of_b]

    m_a, m_b = measure(run(look_a)), measure(run(look_b))
    if (m_a - m_b).abs() < 1e-4:
        raise ValueError(
            f"both pictures make {look_a.tokens[column + 1]!r} equally likely: there is nothing to restore"
        )

    def restored(columns: list[Sequence[int]]) -> Tensor:
        """float32 [groups, L]"""
        L = look_b.num_layers
        tries = [(group, layer) for group in columns for layer in range(L)]
        found = []
        for start in range(0, len(tries), ROWS_AT_ONCE):
            some = tries[start : start + ROWS_AT_ONCE]
            changes = {layer: _replacing(look_a, layer, some) for layer in range(L)}
            found.append(measure(run(look_b, len(some), layers=changes)))
        return ((torch.cat(found) - m_b) / (m_a - m_b)).view(len(columns), L)

    per_patch = restored([[int(c)] for c in look_b.image_columns]).T if patches else None
    return Patching(restored(list(kept.values())), list(kept), per_patch)


def check_same_prompt(look_a: Look, look_b: Look) -> None:
    """Raises ValueError unless the two looks are of one model and one prompt, so that only what is in the pictures
    differs."""
    if look_a.pg.model is not look_b.pg.model:
        raise ValueError("the two looks are of different models: patching needs the same one")
    if not torch.equal(look_a.input_ids[: look_a.first_answer], look_b.input_ids[: look_b.first_answer]):
        a, b = (f"{look.prompt!r} ({look.images} pictures)" for look in (look_a, look_b))
        raise ValueError(f"the two looks are of {a} and {b}: patching needs the same prompt, and as many pictures")


def _replacing(look_a: Look, layer: int, tries: list[tuple[Sequence[int], int]]) -> Change:
    def change(x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        x = x.clone()
        for row, (columns, own) in enumerate(tries):
            if own == layer:
                x[row, list(columns)] = look_a.hidden_states[layer][list(columns)].to(x.device, x.dtype)
        return x, mask

    return change


@torch.no_grad()
def _logprobs(look: Look, hidden: Tensor, column: int) -> Tensor:
    """[R, S, D] -> float32 [R, V] of what is predicted at one column."""
    return look.pg.model.logits(hidden[:, column]).float().log_softmax(-1).cpu()
