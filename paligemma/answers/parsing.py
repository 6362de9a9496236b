"""Answers -> boxes and masks: the language of `<loc>` and `<seg>` tokens.

    answer = [ item { " ; " item } ]
    item   = 4 x <locNNNN>  [ 16 x <segNNN> ]  [ " " label ]

The four locations are y0, x0, y1, x1 (in this order), each a share of the picture's height or width in 1024 bins. The
sixteen codes are a mask inside that box (see `mask_codec.py`). The syntax is that of big_vision's PaliGemma. The reader
accepts all that the regular expression of the official demo accepts, and says what it could not read.

Coordinates are relative to the original picture, so its shape does not matter. Two scales are in use: big_vision writes
`round(x / W * 1023)` and reads `loc / 1023 * W`; the official demo and most users read `loc / 1024 * W`. Both are here
as `loc_scale`, 1024 by default; they differ by less than one pixel in a thousand.
"""

from __future__ import annotations

import math
import re
import reprlib
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from paligemma.answers.mask_codec import NUM_TOKENS, Box, MaskCodec, paste
from paligemma.answers.results import Detection, Parsed, Segment
from paligemma.answers.scores import IDENTITY, Calibration, Distribution, chance_of_overlap

if TYPE_CHECKING:
    from paligemma.tokenizer import Tokenizer

NUM_LOC = 1024


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
    loc_scale, which no text can cause, and TypeError for what is no text.
    """
    if not isinstance(text, str):
        raise TypeError(f"text is {type(text).__name__}, expected the answer as a string")
    check_codec(codec)
    return _assemble(_items(text), image_size, loc_scale, codec, paste_rule)


def parse_tokens(
    token_ids: Sequence[int],
    tokenizer: Tokenizer,
    image_size: tuple[int, int] | None,
    loc_scale: int = 1024,
    codec: MaskCodec | None = None,
    paste_rule: str = "space",
    token_logprobs: Sequence[float] | None = None,
    distributions: Sequence[Distribution] | None = None,
    calibration: Calibration = IDENTITY,
) -> Parsed:
    """`parse(tokenizer.decode(token_ids), ...)`, and how sure the model was of each item.

    The text decides what is a token: a model that spells out "<loc0007>" letter by letter has written a location. Both
    ways of reading an answer agree by construction, and nobody who only has the text reads something else.

    image_size: None for an answer about no picture; a box in it is then invalid.

    token_logprobs: log-probability of each token, and distributions: what was recorded of each location token -> the
    item's `score`, the probability that it is right (`scores.py`), as `calibration` maps it. Without distributions, or
    where a location is spelled out, the score is the geometric mean of the probabilities of the item's tokens, which
    says how sharply the model chose: where two neighbouring bins are equally good, each has half of the probability.

    distributions: also -> `edges`, mean and spread in pixels. Entries for other tokens are not looked at.
    """
    token_ids = list(token_ids)
    for name, values in (("token_logprobs", token_logprobs), ("distributions", distributions)):
        if values is not None and len(values) != len(token_ids):
            raise ValueError(f"{name} has {len(values)} entries for {len(token_ids)} tokens; it needs one for each")
    text = tokenizer.decode(token_ids)
    if image_size is None:
        return Parsed(invalid=[(item.span, "a box without a picture") for item in _items(text)])
    if (token_logprobs is None and distributions is None) or not _TOKEN.search(text):
        return parse(text, image_size, loc_scale, codec, paste_rule)

    tokens = _Tokens(token_ids, tokenizer, text)

    def score(item: _Item) -> float | None:
        if token_logprobs is None:
            return None
        if distributions is None or tokens.locations(item) is None:
            return tokens.mean_probability(item, token_logprobs)
        return calibration(tokens.probability(item, token_logprobs, distributions), mask=bool(item.segs))

    def edges(item: _Item) -> np.ndarray | None:
        return None if distributions is None else tokens.edges(item, distributions, image_size, loc_scale)

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
    width, height = check_scales(image_size, loc_scale)
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


def check_codec(codec: object) -> None:
    if codec is not None and not hasattr(codec, "num_codes"):
        raise TypeError(f"codec is {type(codec).__name__}, expected a MaskCodec, from MaskCodec.load(...), or None")


def check_scales(image_size: tuple[int, int], loc_scale: int) -> tuple[int, int]:
    try:
        width, height = image_size
        fine = width >= 1 and height >= 1 and width == int(width) and height == int(height)
    except (TypeError, ValueError, OverflowError):  # no pair, or no numbers
        fine = False
    if not fine:
        hint = ": pass its .size" if hasattr(image_size, "size") else ""
        raise ValueError(
            f"image_size must be (width, height) in pixels, both at least 1, got {reprlib.repr(image_size)}{hint}"
        )
    if loc_scale not in (NUM_LOC, NUM_LOC - 1):
        raise ValueError(f"loc_scale must be 1024 (default) or 1023, got {loc_scale}")
    return int(width), int(height)


class _Tokens:
    """The tokens of an answer and their places in its text, to look up what the model said of the tokens of an item."""

    def __init__(self, token_ids: list[int], tokenizer: Tokenizer, text: str) -> None:
        self.ids, self.first_loc, self.text = token_ids, tokenizer.first_loc_id, text
        self.starts = _token_starts(token_ids, tokenizer, text)

    def positions(self, piece: _Piece) -> range:
        """Positions of the tokens that a stretch of the text came from."""
        if piece.start == piece.end:
            return range(0)
        first = bisect_left(self.starts, piece.start)
        if first == len(self.starts) or self.starts[first] != piece.start:
            first -= 1
        return range(first, bisect_left(self.starts, piece.end))

    def locations(self, item: _Item) -> list[int] | None:
        """Positions of the item's four location tokens; None if one is spelled out."""
        at = [self.positions(loc) for loc in item.locs]
        if any(len(r) != 1 or not 0 <= self.ids[r[0]] - self.first_loc < NUM_LOC for r in at):
            return None
        return [r[0] for r in at]

    def mean_probability(self, item: _Item, logprobs: Sequence[float]) -> float:
        """The geometric mean of the probabilities of the item's tokens."""
        used = {i for piece in [*item.locs, *item.segs, item.label_at] for i in self.positions(piece)}
        return math.exp(sum(logprobs[i] for i in used) / len(used))

    def probability(self, item: _Item, logprobs: Sequence[float], distributions: Sequence[Distribution]) -> float:
        """That the item is right, as `scores.py` says."""
        at = self.locations(item)
        assert at is not None
        label, codes = (
            {i for piece in pieces for i in self.positions(piece)} for pieces in ([item.label_at], item.segs)
        )
        begins = sum(logprobs[i] for i in self._separator_before(at[0]))
        certain = sum(logprobs[i] for i in codes) / len(codes) if codes else 0.0
        overlap = chance_of_overlap([loc.value for loc in item.locs], [distributions[i].quantiles for i in at])
        return distributions[at[0]].share * overlap * math.exp(begins + sum(logprobs[i] for i in label) + certain)

    def _separator_before(self, position: int) -> Iterator[int]:
        """Positions of the tokens directly before this one that say nothing but ";" and spaces."""
        while position and self.text[self.starts[position - 1] : self.starts[position]].strip() in ("", ";"):
            position -= 1
            yield position

    def edges(
        self, item: _Item, distributions: Sequence[Distribution], image_size: tuple[int, int], loc_scale: int
    ) -> np.ndarray | None:
        """Mean and spread in pixels, [4, 2] in the order x0 y0 x1 y1; None if a location is spelled out."""
        at = self.locations(item)
        if at is None:
            return None
        y0, x0, y1, x1 = ((distributions[i].mean, distributions[i].spread) for i in at)
        size = np.array([image_size[0], image_size[1]] * 2)[:, None]
        pixels: np.ndarray = np.array([x0, y0, x1, y1], dtype=float) / loc_scale * size
        return pixels


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
