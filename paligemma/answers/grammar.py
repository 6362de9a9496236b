"""The language of `<loc>` and `<seg>` tokens: answers -> boxes and masks, boxes and masks -> answers, and the rules
as a state machine that generation can follow.

    answer = [ item { " ; " item } ]
    item   = 4 x <locNNNN>  [ 16 x <segNNN> ]  [ " " label ]

The four locations are y0, x0, y1, x1 (in this order), each a share of the picture's height or width in 1024 bins; the
sixteen codes are a mask inside that box (see `mask_codec`). The syntax is that of big_vision's PaliGemma; the reader
accepts all that the regular expression of the official demo accepts, and says what it could not read.

Coordinates are relative to the original picture, so its shape does not matter. Two scales are in use: big_vision writes
`round(x / W * 1023)` and reads `loc / 1023 * W`; the official demo and most users read `loc / 1024 * W`. Both are here
as `loc_scale`, 1024 by default; they differ by less than one pixel in a thousand.
"""

from __future__ import annotations

import math
import re
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from paligemma.answers.mask_codec import NUM_TOKENS, Box, MaskCodec, crop, paste

if TYPE_CHECKING:
    from paligemma.tokenizer import Tokenizer

NUM_LOC = 1024
NUM_SEG = 128
SEPARATOR = " ; "


@dataclass(frozen=True)
class Detection:
    """A labelled box. `label` is "" where the answer has none; `score` and `edges` are None where they are unknown."""

    label: str
    box: Box  # x0, y0, x1, y1 in pixels of the original picture, not rounded
    score: float | None = None
    edges: np.ndarray | None = field(default=None, compare=False)  # float [4, 2]: mean, spread in pixels; x0 y0 x1 y1


@dataclass(frozen=True)
class Segment:
    """A labelled box with a mask. Two segments are equal if they agree in all but `mask` (which follows from the codes)
    and `edges`."""

    label: str
    box: Box
    mask: np.ndarray | None = field(default=None, compare=False, repr=False)  # bool [H, W]; None without a codec
    codes: list[int] | None = None  # 16 numbers in 0..127
    score: float | None = None
    edges: np.ndarray | None = field(default=None, compare=False)


@dataclass(frozen=True)
class Parsed:
    """What an answer says. Each item is in one of the three lists: a segment is not repeated in `detections`."""

    detections: list[Detection] = field(default_factory=list)
    segments: list[Segment] = field(default_factory=list)
    invalid: list[tuple[tuple[int, int], str]] = field(default_factory=list)  # (start, end) in the text, and the reason


# -- answer -> boxes and masks --


def parse(
    text: str,
    image_size: tuple[int, int],
    loc_scale: int = 1024,
    codec: MaskCodec | None = None,
    paste_rule: str = "space",
) -> Parsed:
    """Read the boxes and masks in an answer; image_size is (W, H) of the original picture.

    Never raises on any text. Text before, between and after items is passed over, so a caption may contain boxes. A
    label is what follows a box up to ";", a line break or the next token, without the spaces around it. Boxes in a row
    without anything between them are each read, all but the last without a label.

    Listed in `invalid`, and nowhere else: a run of loc tokens that is not a multiple of four (any choice of four would
    be a guess), a box with y1 <= y0 or x1 <= x0, a run of seg tokens that is not sixteen or has no box before it, and a
    code that `codec` does not have. `<loc1024>` and the like are no tokens but text.

    Without `codec` the masks are None. `paste_rule`: see `mask_codec.paste`. ValueError for an impossible image_size or
    loc_scale, which no text can cause.
    """
    return _assemble(_items(text), image_size, loc_scale, codec, paste_rule)


def parse_tokens(
    token_ids: Sequence[int],
    tokenizer: Tokenizer,
    image_size: tuple[int, int],
    loc_scale: int = 1024,
    codec: MaskCodec | None = None,
    paste_rule: str = "space",
    token_logprobs: Sequence[float] | None = None,
    bins: Sequence[tuple[float, float]] | None = None,
) -> Parsed:
    """`parse(tokenizer.decode(token_ids), ...)`, and how sure the model was of each item.

    The text decides what is a token: a model that spells out "<loc0007>" letter by letter has written a location. Both
    ways of reading an answer agree by construction, and nobody who only has the text reads something else.

    token_logprobs: log-probability of each token -> `score`, the exponential of the mean over the item's tokens: four
    locations, the label, and for a segment its sixteen codes. The geometric mean of probabilities, in [0, 1]. Items of
    one class and kind have the same number of tokens, so among them (which is where average precision compares) the
    ranking is that of the probability of the whole item; and unlike that product it does not sink with the length of
    the label. It says how sharply the model chose, and is not calibrated: where two neighbouring bins are equally good,
    each has half of the probability. Under a constraint that leaves one label, the label says nothing and the box
    decides.

    bins: for each token the mean and the spread (standard deviation) of the distribution over the 1024 locations, in
    bins -> `edges`, the same in pixels. Entries for other tokens are not looked at. A spelled-out location has none.
    """
    token_ids = list(token_ids)
    for name, values in (("token_logprobs", token_logprobs), ("bins", bins)):
        if values is not None and len(values) != len(token_ids):
            raise ValueError(f"{name} has {len(values)} entries for {len(token_ids)} tokens; it needs one for each")
    text = tokenizer.decode(token_ids)
    if (token_logprobs is None and bins is None) or not _TOKEN.search(text):
        return parse(text, image_size, loc_scale, codec, paste_rule)

    starts = _token_starts(token_ids, tokenizer, text)

    def tokens_of(span: tuple[int, int]) -> range:
        """Positions of the tokens that a stretch of the text came from."""
        if span[0] == span[1]:
            return range(0)
        first = bisect_left(starts, span[0])
        if first == len(starts) or starts[first] != span[0]:
            first -= 1
        return range(first, bisect_left(starts, span[1]))

    def score(item: _Item) -> float | None:
        if token_logprobs is None:
            return None
        used = {i for span in [*item.locs, *item.segs, item.label_at] for i in tokens_of((span.start, span.end))}
        return math.exp(sum(token_logprobs[i] for i in used) / len(used))

    def edges(item: _Item) -> np.ndarray | None:
        at = [tokens_of((loc.start, loc.end)) for loc in item.locs]
        if bins is None or any(len(r) != 1 or not 0 <= token_ids[r[0]] - tokenizer.first_loc_id < NUM_LOC for r in at):
            return None
        y0, x0, y1, x1 = (bins[r[0]] for r in at)
        size = np.array([image_size[0], image_size[1]] * 2)[:, None]
        return np.array([x0, y0, x1, y1], dtype=float) / loc_scale * size

    return _assemble(_items(text), image_size, loc_scale, codec, paste_rule, score, edges)


@dataclass(frozen=True)
class _Piece:
    """A token or a label in the text: text[start:end]."""

    value: int
    start: int
    end: int


@dataclass(frozen=True)
class _Item:
    locs: list[_Piece]
    segs: list[_Piece]
    label: str
    label_at: _Piece

    @property
    def span(self) -> tuple[int, int]:
        pieces = [*self.locs, *self.segs, *([self.label_at] if self.label else [])]
        return pieces[0].start, pieces[-1].end


_TOKEN = re.compile(r"<loc(0[0-9]{3}|10[01][0-9]|102[0-3])>|<seg(0[0-9]{2}|1[01][0-9]|12[0-7])>")
_LABEL_END = re.compile(r"[;\n]")


def _items(text: str) -> Iterator[_Item]:
    """The text's items in order, whether they make sense or not."""
    runs: list[tuple[bool, list[_Piece]]] = []  # tokens of one kind with nothing but spaces between: (is_loc, tokens)
    for match in _TOKEN.finditer(text):
        is_loc = match[1] is not None
        piece = _Piece(int(match[1] or match[2]), *match.span())
        if runs and runs[-1][0] == is_loc and not text[runs[-1][1][-1].end : piece.start].strip():
            runs[-1][1].append(piece)
        else:
            runs.append((is_loc, [piece]))

    for i, (is_loc, run) in enumerate(runs):
        after = runs[i + 1] if i + 1 < len(runs) else None
        next_start = after[1][0].start if after else len(text)
        between = text[run[-1].end : next_start]
        if is_loc and after and not after[0] and not between.strip():
            continue  # a box whose codes follow: the run of codes below takes it
        box: list[_Piece] = []
        if is_loc:
            box = run
        elif i and runs[i - 1][0] and not text[runs[i - 1][1][-1].end : run[0].start].strip():
            box = runs[i - 1][1]
        stop = _LABEL_END.search(between)
        written = between[: stop.start()] if stop else between
        label = written.strip()
        start = run[-1].end + len(written) - len(written.lstrip())
        label_at = _Piece(0, start, start + len(label))
        nothing = _Piece(0, 0, 0)
        if len(box) % 4 == 0:  # whole boxes in a row: all but the last stand alone
            for k in range(0, len(box) - 4, 4):
                yield _Item(box[k : k + 4], [], "", nothing)
            box = box[-4:]
        yield _Item(box, [] if is_loc else run, label, label_at)


def _fault(item: _Item, codec: MaskCodec | None) -> str | None:
    """Why an item is not a box or a mask; None if it is one."""
    if not item.locs:
        return "seg tokens without a box"
    if len(item.locs) != 4:
        return f"{len(item.locs)} loc tokens in a row, a box has 4"
    y0, x0, y1, x1 = (loc.value for loc in item.locs)
    for axis, low, high in (("y", y0, y1), ("x", x0, x1)):
        if high < low:
            return f"order: {axis}1 = {high} lies before {axis}0 = {low}"
        if high == low:
            return f"degenerate box: {axis}0 = {axis}1 = {low}"
    if item.segs and len(item.segs) != NUM_TOKENS:
        return f"{len(item.segs)} seg tokens, a mask has {NUM_TOKENS}"
    unknown = [seg.value for seg in item.segs if codec is not None and seg.value >= codec.num_codes]
    if unknown and codec is not None:
        return f"code {unknown[0]} is not one of the codec's {codec.num_codes}"
    return None


def _assemble(
    items: Iterator[_Item],
    image_size: tuple[int, int],
    loc_scale: int,
    codec: MaskCodec | None,
    paste_rule: str,
    score: Callable[[_Item], float | None] = lambda item: None,
    edges: Callable[[_Item], np.ndarray | None] = lambda item: None,
) -> Parsed:
    width, height = _check_scales(image_size, loc_scale)
    detections: list[Detection] = []
    invalid: list[tuple[tuple[int, int], str]] = []
    found: list[tuple[_Item, Box]] = []
    for item in items:
        reason = _fault(item, codec)
        if reason:
            invalid.append((item.span, reason))
            continue
        y0, x0, y1, x1 = (loc.value / loc_scale for loc in item.locs)
        box = (x0 * width, y0 * height, x1 * width, y1 * height)
        if item.segs:
            found.append((item, box))
        else:
            detections.append(Detection(item.label, box, score(item), edges(item)))

    codes = [[seg.value for seg in item.segs] for item, _ in found]
    masks: list[np.ndarray | None] = [None] * len(found)
    if codec is not None and found:
        with torch.no_grad():
            decoded = codec.decode(torch.tensor(codes)).float().cpu().numpy()  # [N, 64, 64]
        masks = [paste(mask, box, (width, height), paste_rule) for mask, (_, box) in zip(decoded, found)]
    segments = [
        Segment(item.label, box, mask, code, score(item), edges(item))
        for (item, box), mask, code in zip(found, masks, codes)
    ]
    return Parsed(detections, segments, invalid)


def _check_scales(image_size: tuple[int, int], loc_scale: int) -> tuple[int, int]:
    width, height = image_size
    if not (width >= 1 and height >= 1 and width == int(width) and height == int(height)):
        raise ValueError(f"image_size must be (width, height) in pixels, both at least 1, got {tuple(image_size)}")
    if loc_scale not in (NUM_LOC, NUM_LOC - 1):
        raise ValueError(f"loc_scale must be 1024 (default) or 1023, got {loc_scale}")
    return int(width), int(height)


def _token_starts(token_ids: list[int], tokenizer: Tokenizer, text: str) -> list[int]:
    """Where in the text each token begins: the length of what the tokens before it agree on with the text.

    A character can be made of several byte tokens; up to the last of them, decoding gives a placeholder for it. That is
    why the comparison, and why tokens may share a start: they belong to the character that begins there. No character
    reaches across a token that is no byte, so only the tokens since the last one of those are decoded again and again.
    """
    # Before what is decoded stands a location: no decoder takes a space behind it for the text's beginning.
    loc = tokenizer.first_loc_id
    skip = len(tokenizer.decode([loc]))
    starts: list[int] = []
    pending: list[int] = []  # the tokens to decode again
    here = start = 0  # where in the text they begin, where the current token begins
    for token in token_ids:
        before = tokenizer.decode(pending)
        while start - here < len(before) and text[start : start + 1] == before[start - here]:
            start += 1
        starts.append(start)
        if tokenizer.decode_stable([token]):  # no byte, and not left out
            pending, here = [loc, token], here + len(before) - skip
        else:
            pending.append(token)
    return starts


# -- boxes and masks -> answer --


def format_detections(items: Sequence[Detection], image_size: tuple[int, int], loc_scale: int = 1024) -> str:
    """The answer that says these boxes: the suffix to train on, and the inverse of `parse`. "" for no boxes.

    The order is the caller's; `canonical_order` gives the one to use if there is no reason for another. image_size is
    (W, H); parts of a box outside of the picture are cut off. Coordinates are rounded to the nearest of the 1024 bins.
    Reading the answer with the same `loc_scale` gives every coordinate to within half a bin; with 1024, next to the
    right and bottom border, to within one (there is no location 1024). A box that is thinner than a bin is widened to
    one, since a box needs two different coordinates; that may cost another half bin, at that border another one.

    ValueError, naming the box: coordinates that are not finite, x1 < x0 or y1 < y0, a box wholly outside of the
    picture, a label with ";", "<", ">" or a line break, which could not be read back.
    """
    _check_scales(image_size, loc_scale)
    return SEPARATOR.join(
        _box_text(item, i, image_size, loc_scale) + _label_text(item.label) for i, item in enumerate(items)
    )


def format_segments(
    items: Sequence[Segment], image_size: tuple[int, int], loc_scale: int = 1024, codec: MaskCodec | None = None
) -> str:
    """As `format_detections`, with sixteen codes after each box: the item's own `codes`, or else its `mask` (bool
    [H, W]) cut out by its box and encoded by `codec`. ValueError, naming the item, if neither can be had.
    """
    _check_scales(image_size, loc_scale)
    boxes = [_box_text(item, i, image_size, loc_scale) for i, item in enumerate(items)]  # checks boxes and labels
    crops = []
    for i, item in enumerate(items):
        if item.codes is not None:
            continue
        if item.mask is None or codec is None:
            raise ValueError(f"{_name(item, i)} has no codes, and to make them takes its mask and a codec")
        if item.mask.shape != (image_size[1], image_size[0]):
            raise ValueError(
                f"the mask of {_name(item, i)} is {list(item.mask.shape)}, the picture "
                f"[{image_size[1]}, {image_size[0]}] (height, width)"
            )
        crops.append(crop(item.mask, item.box))
    encoded: Iterator[list[int]] = iter([])
    if crops and codec is not None:
        with torch.no_grad():
            encoded = iter(codec.encode(torch.from_numpy(np.stack(crops))).tolist())

    texts = []
    for i, item in enumerate(items):
        codes = item.codes if item.codes is not None else next(encoded)
        if len(codes) != NUM_TOKENS or not all(0 <= code < NUM_SEG for code in codes):
            raise ValueError(f"{_name(item, i)} needs {NUM_TOKENS} codes in 0..{NUM_SEG - 1}, got {codes}")
        texts.append(boxes[i] + "".join(f"<seg{code:03d}>" for code in codes) + _label_text(item.label))
    return SEPARATOR.join(texts)


def canonical_order(items: Sequence, labels: Sequence[str] | None = None) -> list:
    """Class by class, each from left to right by the left edge, equal ones from top to bottom.

    `labels` is the order of the classes, for training usually that of the prompt; classes that it does not have, or all
    of them without it, come in the order of their first item.
    """
    classes = list(dict.fromkeys([*(labels or []), *(item.label for item in items)]))
    rank = {label: i for i, label in enumerate(classes)}
    return sorted(items, key=lambda item: (rank[item.label], item.box[0], item.box[1]))


def _name(item: Detection | Segment, index: int) -> str:
    return f"item {index} ({item.label!r}, box {tuple(item.box)})"


def _label_text(label: str) -> str:
    label = label.strip()
    return " " + label if label else ""


def _check_label(label: str, name: str) -> None:
    bad = re.search(r"[;<>\n]", label)
    if bad:
        raise ValueError(f"{name} contains {bad[0]!r}, which a label cannot: it would be read as its end or as a token")


def _box_text(item: Detection | Segment, index: int, image_size: tuple[int, int], loc_scale: int) -> str:
    name = _name(item, index)
    _check_label(item.label.strip(), f"the label of {name}")
    if len(item.box) != 4 or not all(math.isfinite(edge) for edge in item.box):
        raise ValueError(f"{name}: a box is four finite numbers x0, y0, x1, y1")
    x0, y0, x1, y1 = item.box
    if x1 < x0 or y1 < y0:
        raise ValueError(f"{name} is inverted: a box is x0, y0, x1, y1 with x0 <= x1 and y0 <= y1")
    width, height = image_size
    if x1 < 0 or y1 < 0 or x0 > width or y0 > height:
        raise ValueError(f"{name} lies outside of the picture, which is {width} x {height}")
    left, right = _bins(x0 / width * loc_scale, x1 / width * loc_scale)
    top, bottom = _bins(y0 / height * loc_scale, y1 / height * loc_scale)
    return f"<loc{top:04d}><loc{left:04d}><loc{bottom:04d}><loc{right:04d}>"


def _bins(low: float, high: float) -> tuple[int, int]:
    """Two coordinates in bins -> two different bins in order, as near as can be."""
    last = NUM_LOC - 1
    first, second = (round(min(max(edge, 0), last)) for edge in (low, high))
    if first < second:
        return first, second
    middle = (low + high) / 2
    first = first if middle >= first else first - 1  # widen to the side on which the box lies
    first = min(max(first, 0), last - 1)
    return first, first + 1


# -- the grammar as a state machine --


class DetectionGrammar:
    """What may come next in an answer to `detect` or `segment`, for constrained decoding.

        grammar = DetectionGrammar(tokenizer, labels=["dog", "cat"])
        allowed = grammar(generated, remaining)       # int64 [n], sorted ids; eos where the answer may end

    A pure function of what has been generated and of how many tokens are left in the budget (eos counts as one), so one
    object serves all rows and beams. What follows it always parses: y1 > y0, x1 > x0, four locations, sixteen codes if
    `segments`, and an answer that ends within the budget, since an item is only begun if there is room to finish it,
    whichever of the labels it gets. An empty answer is always possible. That the budget left no room for another item
    shows by asking again with a larger one, which is what `generate` does before it calls an answer finished.

    labels: the labels that may be written, each exactly as the tokenizer writes it in its place. None: any text without
    ";", "<", ">" and control characters, or no label. [""]: no labels, as in the answers of RefCOCO checkpoints; ""
    among others makes the label optional. (Of any text the budget may cut off the end: there is no longest label.)

    The returned tensors are shared between calls and must not be changed. A sequence that is not of this grammar can
    only end: eos. ValueError for a label that the tokenizer cannot write.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        labels: Sequence[str] | None = None,
        segments: bool = False,
        eos_token_id: int | None = None,
    ) -> None:
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
        while end and not 0 <= generated[end - 1] - self.first_loc < NUM_LOC:
            end -= 1
        begin = end
        while begin and end - begin <= 4 and 0 <= generated[begin - 1] - self.first_loc < NUM_LOC:
            begin -= 1
        box = [generated[i] - self.first_loc for i in range(begin, end)]
        rest = list(generated[end:])
        if not box or len(box) > 4 or (len(box) < 4 and rest):
            return self.eos  # not of this grammar
        if len(box) < 2:
            return self.locs[:-1]  # y0 and x0 leave room for a y1 and x1 beyond them
        if len(box) < 4:
            return self.locs[box[len(box) - 2] + 1 :]
        if not all(0 <= code - self.first_seg < NUM_SEG for code in rest[: self.num_codes]):
            return self.eos
        if len(rest) < self.num_codes:
            return self.segs
        allowed = self.labels.after(rest[self.num_codes :], remaining)
        return self.locs[:-1] if allowed is None else allowed


class ChoiceGrammar:
    """One of a few answers, word for word: `pg.ask(image, question, choices=["yes", "no"])`.

    Used as `DetectionGrammar` is. A choice may begin like another one ("red", "red car"). ValueError for no choices,
    for one that the tokenizer cannot write, and, when decoding begins, for one that does not fit into the budget.
    """

    def __init__(self, tokenizer: Tokenizer, choices: Sequence[str], eos_token_id: int | None = None) -> None:
        self.eos = tokenizer.eos_token_id if eos_token_id is None else eos_token_id
        self.tree = _Tree(self.eos)
        self.costs = {}  # choice -> tokens it takes, eos included
        for choice in _check_texts(choices, "choices"):
            ids = tokenizer.encode(choice)
            if tokenizer.decode(ids) != choice:
                raise ValueError(
                    f"the tokenizer cannot write the choice {choice!r}: it gives {tokenizer.decode(ids)!r}"
                )
            self.tree.insert(ids).end = True
            self.costs[choice] = len(ids) + 1
        self.tree.finish()

    def __call__(self, generated: Sequence[int], remaining: int) -> Tensor:
        if not generated and remaining < max(self.costs.values()):
            longest = max(self.costs, key=lambda choice: self.costs[choice])
            raise ValueError(
                f"the choice {longest!r} takes {self.costs[longest]} tokens with the end of the answer, "
                f"and only {remaining} may be generated; raise max_new_tokens"
            )
        node = self.tree.walk(generated)
        return self.tree.allowed(node, remaining) if node else torch.tensor([self.eos])


class _Node:
    """A place in a tree of token sequences."""

    def __init__(self) -> None:
        self.children: dict[int, _Node] = {}
        self.end = False  # the answer may end here
        self.restart = False  # here a new item begins
        self.close = 0  # fewest tokens from here to the end of the answer, eos included
        self.full_cost = 0  # budget from which on every child can be afforded
        self.full = torch.empty(0, dtype=torch.int64)  # all children, and eos


class _Tree:
    def __init__(self, eos: int) -> None:
        self.eos = eos
        self.root = _Node()
        self.nodes = [self.root]  # parents before children

    def insert(self, ids: Sequence[int]) -> _Node:
        node = self.root
        for token in ids:
            if token not in node.children:
                node.children[token] = _Node()
                self.nodes.append(node.children[token])
            node = node.children[token]
        return node

    def finish(self, item_cost: int = 0) -> None:
        """After the last insert, work out what each place costs. item_cost: of an item and the end of the answer."""
        for node in reversed(self.nodes):
            costs = [1 + child.close for child in node.children.values()]
            node.full_cost = max(costs, default=0)
            node.close = min(costs + [1] * node.end + [item_cost] * node.restart)
            node.full = torch.tensor(sorted([*node.children, *[self.eos] * node.end]), dtype=torch.int64)

    def walk(self, ids: Sequence[int]) -> _Node | None:
        node: _Node | None = self.root
        for token in ids:
            node = node.children.get(token) if node else None
        return node

    def allowed(self, node: _Node, remaining: int) -> Tensor:
        if remaining >= node.full_cost:
            return node.full
        ids = [token for token, child in node.children.items() if 1 + child.close <= remaining]
        ids += [self.eos] * node.end
        # Nothing can be afforded only if the budget was cut short in between: then by the shortest way.
        ids = ids or [min(node.children, key=lambda token: node.children[token].close)]
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
            """The tokens between head and the tail's last ones."""
            text = head + _label_text(label) + tail
            ids = tokenizer.encode(text)
            inner = ids[len(head_ids) : len(ids) - len(tail_ids)]
            if head_ids + inner + tail_ids != ids or tokenizer.decode(ids) != text:
                raise ValueError(
                    f"the tokenizer cannot write the label {label!r}: {text!r} comes back as {tokenizer.decode(ids)!r}"
                )
            return inner

        self.tree = _Tree(eos)
        longest = 0
        for label in labels:
            _check_label(label, f"the label {label!r}")
            ids = encode(label, "", [])
            self.tree.insert(ids).end = True
            longest = max(longest, len(ids))
        # An item and eos. With room for a shorter label alone, that one would be written in place of the right one.
        self.item_cost = 4 + num_codes + longest + 1
        for label in labels:
            # Nothing can follow at this place but a new item, since no label has the separator's ";".
            self.tree.insert(encode(label, SEPARATOR + "<loc0000>", head_ids[:1])).restart = True
        self.tree.finish(self.item_cost)

    def after(self, rest: list[int], remaining: int) -> Tensor | None:
        """What may follow `rest`, the tokens since the box or the codes; None: the first location of a new item."""
        node = self.tree.walk(rest)
        if node is None:
            return torch.tensor([self.tree.eos])
        return None if node.restart else self.tree.allowed(node, remaining)


class _AnyLabel:
    """Any text or none, then eos or the separator and a new item."""

    def __init__(self, tokenizer: Tokenizer, eos: int, num_codes: int) -> None:
        self.eos = eos
        self.item_cost = 4 + num_codes + 1
        texts = _token_texts(tokenizer)
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

    def after(self, rest: list[int], remaining: int) -> Tensor | None:
        """As in `_ListedLabels`."""
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


_UNFIT = re.compile(r"[;<>\x00-\x1f\x7f-\x9f]")  # for a label: what ends it, what could look like a token, control


@lru_cache(maxsize=2)
def _token_texts(tokenizer: Tokenizer) -> list[str]:
    """What each token adds to a text, after a location (where no decoder takes a space for the beginning of a text)."""
    first = tokenizer.first_loc_id
    skip = len(tokenizer.decode([first]))
    return [tokenizer.decode([first, i])[skip:] for i in range(len(tokenizer))]


def _check_texts(texts: Sequence[str], name: str) -> list[str]:
    given = [] if isinstance(texts, str) else list(texts)
    if not given or not all(isinstance(text, str) for text in given):
        raise ValueError(f"{name} must be a list of one or more strings, got {texts!r}")
    return list(dict.fromkeys(text.strip() if name == "labels" else text for text in given))
