"""One row of training data, and rows as a sequence: what every reader in this folder gives.

    row = rows[7]         # Row(image="/data/7.png", prefix="answer en what ?", suffix="a dog", ...)

A row that cannot be used is a `RowError` when it is read; the rows beside it can still be read.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, overload

from paligemma.terminal import printable

if TYPE_CHECKING:
    from paligemma.answers.mask_codec import Box

Picture = str | bytes  # a path, or the bytes of a picture file


@dataclass(frozen=True)
class Row:
    """One example. `image`: one picture, a tuple of several that the row sees together, or None. `suffix` is what is
    trained on, unless there are `suffixes`, which are used in turn; `answers` are all that count as right when answers
    are measured. Both are empty where the data have only one."""

    image: Picture | tuple[Picture, ...] | None
    prefix: str
    suffix: str
    number: int  # rows[number]
    source: str  # where it stands: "my.jsonl:12"
    size: tuple[int, int] | None = None  # width and height as the annotation gives them
    boxes: tuple[Box, ...] = field(default=(), repr=False)  # as annotated, in pixels, before clipping and rounding
    answers: tuple[str, ...] = field(default=(), repr=False)
    suffixes: tuple[str, ...] = field(default=(), repr=False)
    notes: tuple[str, ...] = field(default=(), repr=False)  # what was repaired with certainty: keys of `check.NOTES`

    @property
    def pictures(self) -> tuple[Picture, ...]:
        return self.image if isinstance(self.image, tuple) else () if self.image is None else (self.image,)


class Rows(Sequence[Row]):
    """Rows of one source. `rows[i]` raises `RowError` for a row that cannot be used, and reads nothing else.

    kind: one of `kinds.KINDS`. note: what was opened, for people. files: all files that rows are read from, without
    the pictures.
    """

    def __init__(
        self, kind: str, note: str, length: int, read: Callable[[int], Row], files: Sequence[Path] = ()
    ) -> None:
        self.kind, self.note, self.length, self.read, self.files = kind, note, length, read, tuple(files)

    def __len__(self) -> int:
        return self.length

    @overload
    def __getitem__(self, i: int) -> Row: ...
    @overload
    def __getitem__(self, i: slice) -> list[Row]: ...
    def __getitem__(self, i: int | slice) -> Row | list[Row]:
        if isinstance(i, slice):
            return [self[k] for k in range(self.length)[i]]
        if not -self.length <= i < self.length:
            raise IndexError(f"row {i} of {self.length}")
        row = self.read(i % self.length)
        for text in (row.prefix, row.suffix, *row.suffixes, *row.answers):
            if not text.isascii() and (half := _HALF.search(text)):  # no tokenizer takes it, and no file
                raise RowError(row.source, "half a character", f"{half[0]!r} stands alone in {short(text)}")
        return row


_HALF = re.compile("[\ud800-\udfff]")  # of a pair that makes a character beyond the first 65,536


class RowError(ValueError):
    """A row that cannot be used. `where`: "my.jsonl:12"; `problem`: one of `check.PROBLEMS`."""

    def __init__(self, where: str, problem: str, message: str) -> None:
        where, message = printable(where), printable(message)  # they may quote what is in the row
        super().__init__(where, problem, message)  # what pickle hands to __init__ again
        self.where, self.problem, self.message = where, problem, message

    def __str__(self) -> str:
        return f"{self.where}: {self.message}"


def short(value: object) -> str:
    """A value as an error message quotes it."""
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
