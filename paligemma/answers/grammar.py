"""What may come next in an answer, token by token, so that generation can only write what can be read.

Two grammars: `DetectionGrammar`, boxes (and masks) with the labels that were asked for, and `ChoiceGrammar`, one of a
few given answers. Both are constraints in the sense of `constraints.py`: functions of the tokens written so far and of
the tokens left in the budget.

The allowed texts (labels or choices) are kept as a tree of their tokens. Each place in the tree knows how many tokens
it takes from there to the end of the answer, so a text is only begun if there is room to finish it.
"""

from __future__ import annotations

import re
import reprlib
from collections.abc import Iterable, Sequence
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from paligemma.answers.mask_codec import NUM_TOKENS
from paligemma.answers.parsing import NUM_LOC
from paligemma.answers.repeats import repeating_edges, repeats
from paligemma.answers.writing import NUM_SEG, SEPARATOR, check_label, label_text

if TYPE_CHECKING:
    from paligemma.tokenizer import Tokenizer


class DetectionGrammar:
    """What may come next in an answer to `detect` or `segment`.

        grammar = DetectionGrammar(tokenizer, labels=["dog", "cat"])
        allowed = grammar(generated, remaining)       # int64 [n], sorted ids; eos where the answer may end

    The result depends on nothing but the tokens generated so far and the number of tokens left in the budget (eos
    counts as one), so one object serves all rows and beams. What it allows always parses: four locations with y1 > y0
    and x1 > x0, sixteen codes if `segments`, a label. The answer ends within the budget, since an item is only begun if
    there is room to finish it with the longest label. An empty answer is always possible. Whether the budget left no
    room for another item shows when the grammar is asked again with a larger one; `generate` does so before it calls an
    answer finished.

    labels: the labels that may be written, each exactly as the tokenizer writes it in its place. None: any text without
        ";", "<", ">" and control characters, or no label; the budget may cut it off, since no label is the longest.
        [""]: no labels, as in the answers of RefCOCO checkpoints; "" among others makes the label optional.
    forbid_repeats: no box may repeat an earlier one with the same label (see `repeats.py`). With labels=None a box
        repeats another whatever their labels are. A model that wants to repeat itself then writes other boxes, with low
        scores. (In the last few bins of the picture there may be no other box left; only there one is repeated.)

    The returned tensors are shared between calls and must not be changed. After tokens that do not follow the grammar
    only eos is allowed. ValueError for a label that the tokenizer cannot write.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        labels: Iterable[str] | None = None,
        segments: bool = False,
        eos_token_id: int | None = None,
        forbid_repeats: bool = False,
    ) -> None:
        self.forbid_repeats = forbid_repeats
        self.first_loc, self.first_seg = tokenizer.first_loc_id, tokenizer.first_seg_id
        self.num_codes = NUM_TOKENS if segments else 0
        eos = tokenizer.eos_token_id if eos_token_id is None else eos_token_id
        self.eos = torch.tensor([eos])
        self.locs = torch.arange(self.first_loc, self.first_loc + NUM_LOC)
        self.segs = torch.arange(self.first_seg, self.first_seg + NUM_SEG)
        self.start = torch.tensor(sorted([*self.locs[:-1].tolist(), eos]))
        self.labels: _ListedLabels | _AnyLabel
        if labels is None:
            self.labels = _AnyLabel(tokenizer, eos, self.num_codes)
        else:
            self.labels = _ListedLabels(tokenizer, eos, self.num_codes, _check_texts(labels, "labels"))

    def __call__(self, generated: Sequence[int], remaining: int) -> Tensor:
        if not generated:
            return self.start if remaining >= self.labels.item_cost else self.eos
        # Only the current item matters, and it begins with the last run of locations.
        end = len(generated)
        while end and not self._is_location(generated[end - 1]):
            end -= 1
        begin = end
        while begin and end - begin <= 4 and self._is_location(generated[begin - 1]):
            begin -= 1
        box = [generated[i] - self.first_loc for i in range(begin, end)]
        rest = list(generated[end:])
        if not box or len(box) > 4 or (len(box) < 4 and rest):
            return self.eos  # not of this grammar
        earlier = self._boxes_by_label(generated[:begin]) if self.forbid_repeats else {}
        if len(box) < 2:
            return self.locs[:-1]  # y0 and x0 leave room for a y1 and x1 beyond them
        if len(box) < 4:
            return self._edges(box, earlier)
        if not all(0 <= code - self.first_seg < NUM_SEG for code in rest[: self.num_codes]):
            return self.eos
        if len(rest) < self.num_codes:
            return self.segs
        forbidden = {label for label, boxes in earlier.items() if repeats(box, boxes)}
        allowed = self.labels.after(rest[self.num_codes :], remaining, forbidden)
        return self.locs[:-1] if allowed is None else allowed

    def _is_location(self, token: int) -> bool:
        return 0 <= token - self.first_loc < NUM_LOC

    def _edges(self, box: list[int], earlier: dict[str, list[list[int]]]) -> Tensor:
        """What y1 or x1 may be, after y0 x0 or y0 x0 y1."""
        edges = self.locs[box[len(box) - 2] + 1 :]
        if not self.labels.texts <= earlier.keys():
            return edges  # some label has no box yet, so with that one no box is a repetition
        y0, x0, *rest = box
        y1 = np.array(rest) if rest else np.arange(y0 + 1, NUM_LOC)
        repeated = [repeating_edges(y0, x0, y1, earlier[label]) for label in self.labels.texts]
        free = ~np.logical_and.reduce(repeated)[:, x0 + 1 :]  # [n, x1s]
        left = edges[torch.from_numpy(free[0] if rest else free.any(1))]
        return left if len(left) else edges

    def _boxes_by_label(self, generated: Sequence[int]) -> dict[str, list[list[int]]]:
        """The boxes of whole items, in bins, by their labels."""
        boxes: dict[str, list[list[int]]] = {}
        begin = 0
        while begin < len(generated):
            end = begin + 4
            while end < len(generated) and not self._is_location(generated[end]):
                end += 1
            label = self.labels.written(generated[begin + 4 + self.num_codes : end])
            boxes.setdefault(label, []).append([token - self.first_loc for token in generated[begin : begin + 4]])
            begin = end
        return boxes


class ChoiceGrammar:
    """One of a few answers, word for word: `pg.ask(image, question, choices=["yes", "no"])`.

    Used as `DetectionGrammar` is. A choice may begin like another one ("red", "red car"). ValueError for no choices,
    for one that the tokenizer cannot write, and, when decoding begins, for one that does not fit into the budget (see
    `check_budget`).
    """

    def __init__(self, tokenizer: Tokenizer, choices: Iterable[str], eos_token_id: int | None = None) -> None:
        self.eos = tokenizer.eos_token_id if eos_token_id is None else eos_token_id
        self.choices: dict[str, list[int]] = {}  # the tokens of each
        for choice in _check_texts(choices, "choices"):
            ids = tokenizer.encode(choice)
            if (written := tokenizer.decode(ids)) != choice:
                raise ValueError(
                    f"the tokenizer cannot write the choice {reprlib.repr(choice)}: it gives {reprlib.repr(written)}"
                )
            self.choices[choice] = ids

    def check_budget(self, budget: int) -> None:
        """ValueError if a choice and the end of the answer take more tokens than may be generated."""
        longest = max(self.choices, key=lambda choice: len(self.choices[choice]))
        if (cost := len(self.choices[longest]) + 1) > budget:
            raise ValueError(
                f"the choice {reprlib.repr(longest)} takes {cost} tokens with the end of the answer, "
                f"and only {budget} may be generated; raise max_new_tokens"
            )

    @cached_property
    def tree(self) -> _Tree:
        """Made when decoding begins: by then the choices are known to fit into the budget, so they are short."""
        tree = _Tree(self.eos)
        for choice, ids in self.choices.items():
            tree.insert(ids, choice).end = True
        tree.finish()
        return tree

    def __call__(self, generated: Sequence[int], remaining: int) -> Tensor:
        if not generated:
            self.check_budget(remaining)
        node = self.tree.walk(generated)
        return self.tree.allowed(node, remaining) if node else torch.tensor([self.eos])


class _Node:
    """A place in a tree of token sequences."""

    def __init__(self) -> None:
        self.children: dict[int, _Node] = {}
        self.texts: set[str] = set()  # those that can still be written from here
        self.text: str | None = None  # the one that is complete here
        self.end = False  # the answer may end here
        self.restart = False  # here a new item begins
        self.close = 0  # fewest tokens from here to the end of the answer, eos included
        self.full_cost = 0  # budget from which on every child can be afforded
        self.full = torch.empty(0, dtype=torch.int64)  # all children, and eos


class _Tree:
    """Texts as sequences of tokens that share their beginnings."""

    def __init__(self, eos: int) -> None:
        self.eos = eos
        self.root = _Node()
        self.nodes = [self.root]  # parents before children

    def insert(self, ids: Sequence[int], text: str) -> _Node:
        """Adds one way of writing `text`; returns the place where it is complete."""
        node = self.root
        node.texts.add(text)
        for token in ids:
            if token not in node.children:
                node.children[token] = _Node()
                self.nodes.append(node.children[token])
            node = node.children[token]
            node.texts.add(text)
        node.text = text
        return node

    def finish(self, item_cost: int = 0) -> None:
        """After the last insert, computes the costs of each place. item_cost: of an item and the end of the answer."""
        for node in reversed(self.nodes):
            costs = [1 + child.close for child in node.children.values()]
            node.full_cost = max(costs, default=0)
            node.close = min(costs + [1] * node.end + [item_cost] * node.restart)
            node.full = torch.tensor(sorted([*node.children, *[self.eos] * node.end]), dtype=torch.int64)

    def walk(self, ids: Sequence[int]) -> _Node | None:
        """The place that these tokens lead to."""
        node: _Node | None = self.root
        for token in ids:
            node = node.children.get(token) if node else None
        return node

    def allowed(self, node: _Node, remaining: int, forbidden: set[str] | None = None) -> Tensor:
        """The tokens that may follow at a place. forbidden: texts that must not be written, unless all are."""
        children, end = node.children, node.end
        if forbidden and not node.texts <= forbidden:
            children = {token: child for token, child in children.items() if not child.texts <= forbidden}
            end = end and node.text not in forbidden
        elif remaining >= node.full_cost:
            return node.full
        ids = [token for token, child in children.items() if 1 + child.close <= remaining]
        ids += [self.eos] * end
        # Nothing can be afforded only if the budget was cut short in between: then by the shortest way.
        ids = ids or [min(children, key=lambda token: children[token].close)]
        return torch.tensor(sorted(ids))


class _ListedLabels:
    """Labels as a tree of their tokens, each followed by eos or by the separator and a new item.

    How a label is cut into tokens can depend on what stands around it, so every label is encoded in both of its places,
    and the separator is whatever is left between label and location.
    """

    def __init__(self, tokenizer: Tokenizer, eos: int, num_codes: int, labels: list[str]) -> None:
        head = "<loc0000>" * 4 + "<seg000>" * num_codes
        head_ids = [tokenizer.first_loc_id] * 4 + [tokenizer.first_seg_id] * num_codes

        def encode(label: str, tail: str, tail_ids: list[int]) -> list[int]:
            """The tokens between the head and the tail's last ones."""
            text = head + label_text(label) + tail
            ids = tokenizer.encode(text)
            inner = ids[len(head_ids) : len(ids) - len(tail_ids)]
            if head_ids + inner + tail_ids != ids or tokenizer.decode(ids) != text:
                written = reprlib.repr(tokenizer.decode(ids[len(head_ids) :]))
                raise ValueError(f"the tokenizer cannot write the label {reprlib.repr(label)}: it gives {written}")
            return inner

        self.texts = set(labels)
        self.tree = _Tree(eos)
        longest = 0
        for label in labels:
            check_label(label, f"the label {reprlib.repr(label)}")
            ids = encode(label, "", [])
            self.tree.insert(ids, label).end = True
            longest = max(longest, len(ids))
        # An item and eos. With room for a shorter label alone, that one would be written in place of the right one.
        self.item_cost = 4 + num_codes + longest + 1
        for label in labels:
            # Nothing can follow at this place but a new item, since no label has the separator's ";".
            self.tree.insert(encode(label, SEPARATOR + "<loc0000>", head_ids[:1]), label).restart = True
        self.tree.finish(self.item_cost)

    def written(self, rest: Sequence[int]) -> str:
        """The label that these tokens write, with or without the separator behind it."""
        node = self.tree.walk(rest)
        return (node and node.text) or ""

    def after(self, rest: list[int], remaining: int, forbidden: set[str]) -> Tensor | None:
        """What may follow `rest`, the tokens since the box or the codes; None: the first location of a new item.

        forbidden: labels that must not be written, unless no other is left.
        """
        node = self.tree.walk(rest)
        if node is None:
            return torch.tensor([self.tree.eos])
        return None if node.restart else self.tree.allowed(node, remaining, forbidden)


class _AnyLabel:
    """Any text or none, then eos or the separator and a new item."""

    texts = {""}  # what `written` returns: labels are not told apart

    def __init__(self, tokenizer: Tokenizer, eos: int, num_codes: int) -> None:
        self.eos = eos
        self.item_cost = 4 + num_codes + 1
        texts = _token_texts(tokenizer, len(tokenizer))
        special = {eos, tokenizer.bos_token_id, tokenizer.pad_token_id, tokenizer.image_token_id}
        self.words = [i for i, text in enumerate(texts) if text and i not in special and not _UNFIT.search(text)]
        self.first_words = [i for i in self.words if texts[i].startswith(" ")]

        # The separator as the tokenizer writes it between boxes, usually " ;" and " ". Its first token with a ";" tells
        # it from the label (a space before that one would be a part of the label, and is stripped in reading).
        loc = tokenizer.first_loc_id
        ids = tokenizer.encode("<loc0000>" + SEPARATOR + "<loc0000>")
        semicolon = next((k for k, i in enumerate(ids) if ";" in texts[i]), None)
        if ids[:1] != [loc] or ids[-1:] != [loc] or semicolon is None:
            raise ValueError(f"the tokenizer does not keep boxes apart: '<loc0000> ; <loc0000>' gives {ids}")
        self.separator = ids[semicolon:-1]
        self.tensors: dict[tuple[bool, bool, bool], Tensor] = {}

    def written(self, rest: Sequence[int]) -> str:
        return ""

    def after(self, rest: list[int], remaining: int, forbidden: set[str]) -> Tensor | None:
        """As in `_ListedLabels`. A repetition is prevented by its box alone."""
        if self.separator[0] in rest:
            written = rest[rest.index(self.separator[0]) :]
            if written == self.separator:
                return None
            following = self.separator[len(written) :] if self.separator[: len(written)] == written else [self.eos]
            return torch.tensor(following[:1])
        longer = remaining >= 2  # a word, and eos
        another = remaining >= len(self.separator) + self.item_cost
        state = (bool(rest), longer, another)
        if state not in self.tensors:
            ids = (self.words if rest else self.first_words) if longer else []
            self.tensors[state] = torch.tensor(sorted([*ids, *self.separator[:1] * another, self.eos]))
        return self.tensors[state]


# Not in a free label: what ends it, what could look like a token, control characters.
_UNFIT = re.compile(r"[;<>\x00-\x1f\x7f-\x9f]")


@lru_cache(maxsize=2)
def _token_texts(tokenizer: Tokenizer, size: int) -> list[str]:
    """What each token adds to a text, after a location (where no decoder takes a space for the beginning of a text).
    size: how many tokens there are now. It is a part of the cache's key, since tokens may be added."""
    first = tokenizer.first_loc_id
    skip = len(tokenizer.decode([first]))
    return [tokenizer.decode([first, i])[skip:] for i in range(size)]


def _check_texts(texts: Iterable[str], name: str) -> list[str]:
    given = [] if isinstance(texts, str) or not isinstance(texts, Iterable) else list(texts)
    if not given or not all(isinstance(text, str) for text in given):
        raise ValueError(f"{name} must be a list of one or more strings, got {reprlib.repr(texts)}")
    if name == "choices" and not all(text.strip() for text in given):
        raise ValueError(f"choices has an empty string, and each must say something: {reprlib.repr(given)}")
    return list(dict.fromkeys(text.strip() if name == "labels" else text for text in given))
