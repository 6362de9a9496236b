"""What can be seen to be wrong in the text of a row: its prompt, its answer, and the two together."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

from paligemma.data.objects import numbers
from paligemma.data.prompts import asks_for_boxes, labels_of, plain_form
from paligemma.data.rows import Row, short
from paligemma.tasks import asks_for_items, split_labels

_RESERVED = re.compile(r"<(?:image|bos|eos|pad)>")
_ITEM = re.compile(r"<loc(\d{4})><loc(\d{4})><loc(\d{4})><loc(\d{4})>((?:<seg\d{3}>){16})?(?: ([^;<>\n]+))?")
_TOKEN = re.compile(r"<loc(0\d{3}|10[01]\d|102[0-3])>|<seg(0\d\d|1[01]\d|12[0-7])>")


def text_problems(row: Row) -> Iterator[tuple[str, str]]:
    """(problem, what exactly) of prefix, suffix (or each of several) and boxes."""
    prefix = row.prefix
    asked = asks_for_boxes(prefix)
    yield from _prompt_problems(prefix, asked)
    for suffix in dict.fromkeys(row.suffixes) or (row.suffix,):
        if "<" in suffix and (token := _RESERVED.search(suffix)):
            yield "reserved token", f"the suffix contains {token[0]}"
        if not suffix.strip() and not (suffix == "" and asks_for_boxes(plain_form(prefix))):
            yield "empty suffix", "the suffix is empty" if suffix == "" else f"the suffix is only space: {suffix!r}"
        if "<loc" in suffix or "<seg" in suffix or (asked and suffix.strip()):
            faults = list(_region_problems(suffix, asked, prefix.startswith("segment ")))
            yield from faults or _mismatches(prefix, suffix)
        elif suffix == "":
            yield from _mismatches(prefix, suffix, annotated=row.size is not None)
    yield from _boxes_outside(row)


def _prompt_problems(prefix: str, asked: bool) -> Iterator[tuple[str, str]]:
    if prefix.endswith(("\n", "\r")):
        yield "newline after prefix", f"the prefix ends in a line break: {prefix[-30:]!r}"
    if "<" in prefix and (token := _RESERVED.search(prefix)):
        yield "reserved token", f"the prefix contains {token[0]}"
    plain = plain_form(prefix)
    if plain != prefix.rstrip("\r\n") and not asks_for_boxes(plain):
        yield _form(prefix, plain)
    if asks_for_items(prefix) and not all(split_labels(prefix)):
        yield "empty label", f"the prompt {short(prefix)} has nothing where a label belongs"
    if asked and ";" in prefix:
        for label in prefix.partition(" ")[2].split(" ; "):
            if ";" in label:
                yield "label with ;", f"the prompt asks for {label!r}"


def _form(prefix: str, plain: str) -> tuple[str, str]:
    return "form of the prompt", f"the prompt is {short(prefix)}, the model knows it as {short(plain)}"


def _region_problems(suffix: str, asked: bool, masks: bool) -> Iterator[tuple[str, str]]:
    """asked: the prompt is detect or segment, so the answer has to be items and nothing else."""
    pieces = suffix.split(" ; ")
    whole = [_ITEM.fullmatch(piece) for piece in pieces]
    if all(
        item and item[1] < item[3] <= "1023" and item[2] < item[4] <= "1023" and (item[5] or not masks)
        and (not item[5] or max(re.findall(r"\d{3}(?=>)", item[5])) < "128")
        for item in whole
    ):  # fmt: skip
        return  # the common case, fast
    from paligemma.answers.parsing import parse

    for _, reason in parse(suffix, (1024, 1024)).invalid:
        yield "loc tokens", reason
    if strange := re.search(r"<(?:loc|seg)[^>]{0,6}>?", _TOKEN.sub("", suffix)):
        yield "loc tokens", f"{strange[0]!r} is no token"
    if asked:
        for piece in pieces:
            if not piece.startswith("<loc"):
                # What follows a label that has been cut at its semicolon, or no box at all.
                problem = "label with ;" if "<loc" in suffix and piece is not pieces[0] else "loc tokens"
                yield problem, f"{piece[:40]!r} has no box in front of it"
            elif ";" in piece:
                yield "label with ;", f"items are parted by ' ; ', but one contains ';': {piece[-40:]!r}"
            elif masks and "<seg" not in piece:
                yield "loc tokens", f"the prompt asks for a mask, but an item has no seg tokens: {piece[-40:]!r}"


# -- prompt and answer together --


def _mismatches(prefix: str, suffix: str, annotated: bool = False) -> Iterator[tuple[str, str]]:
    """An answer of boxes (or none) that does not fit its prompt. annotated: the labels come from a list of classes, so
    that a comma in one belongs to it."""
    plain = plain_form(prefix)
    items = [_ITEM.fullmatch(piece) for piece in suffix.split(" ; ")] if suffix else []
    if not all(items):
        return  # text with boxes in it, such as a caption
    labels = [(item[6] or "").strip() for item in items if item]
    if asks_for_boxes(plain):
        if plain != prefix:
            yield _form(prefix, plain)
        asked = labels_of(plain)
        comma = next((label for label in asked if "," in label and label not in labels), None)
        hint = f": {comma!r} is one label, several are parted by ' ; '" if comma else ""
        if strange := [label for label in labels if label not in asked]:
            given = repr(strange[0]) if strange[0] else "no label"
            yield "label not asked for", f"the answer says {given}, the prompt asks for {_listed(asked)}{hint}"
        elif comma and not annotated and not labels:
            yield "label not asked for", f"the prompt asks for {_listed(asked)}{hint}"
    elif items and not (not any(labels) and "<seg" in suffix):  # RefCOCO's prompts are bare, its answers without label
        yield (
            "boxes not asked for",
            f"the answer is boxes, but the prompt {short(prefix)} is neither detect nor segment",
        )


@dataclass
class AskedLabels:
    """Labels that prompts ask for again and again, and that no answer has: the model learns that they are nowhere."""

    rows: int = 0
    asked: Counter[str] = field(default_factory=Counter)
    answered: set[str] = field(default_factory=set)

    def add(self, row: Row) -> None:
        if not row.prefix.startswith(("detect ", "segment ")):
            return
        self.rows += 1
        self.asked.update(labels_of(row.prefix))
        for suffix in row.suffixes or (row.suffix,):
            self.answered.update(piece.rpartition(">")[2].strip() for piece in suffix.split(";"))

    def questions(self) -> list[str]:
        never = [label for label, count in self.asked.items() if label not in self.answered and count == self.rows > 1]
        if not never:
            return []
        return [f"all {self.rows:,} prompts ask for {_listed(never)}, and no answer has it: is that meant?"]


def _listed(labels: list[str]) -> str:
    return ", ".join(map(repr, labels[:5])) + (", ..." if len(labels) > 5 else "")


# -- boxes in pixels --


def _boxes_outside(row: Row) -> Iterator[tuple[str, str]]:
    if row.size is None:
        return
    width, height = row.size
    for box in row.boxes:
        x0, y0, x1, y1 = box
        if x0 < -1 or y0 < -1 or x1 > width + 1 or y1 > height + 1:  # a pixel is rounding
            fits = _what_would_fit(x0, y0, x1 - x0, y1 - y0, width, height)
            yield (
                "box outside",
                f"the box {numbers(box)} reaches out of the picture, which is {width} x {height}{fits}",
            )


def _what_would_fit(x: float, y: float, w: float, h: float, width: int, height: int) -> str:
    """How else the four numbers x, y, width, height could be meant so that the box lies inside."""
    readings = {
        "corners x0, y0, x1, y1": (x, y, w, h),
        "the centre, width and height": (x - w / 2, y - h / 2, x + w / 2, y + h / 2),
        "y, x, height, width": (y, x, y + h, x + w),
    }
    fitting = [
        name
        for name, (x0, y0, x1, y1) in readings.items()
        if 0 <= x0 < x1 <= width and 0 <= y0 < y1 <= height  # a pixel is no excuse here
    ]
    return f"; read as {' or as '.join(fitting)} it would lie inside" if fitting else ""
