"""What is wrong with your data, before a run of hours finds out.

    result = check(open_rows("my.jsonl"), processor, max_length=320)
    print(result)            # how many rows have which problem, the first of each with its place and the way out
    result.ok

Goes through every row, at tens of thousands a second as long as no tokens are counted and no pictures opened: both are
done if asked for (`processor`, `open_pictures`).
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from typing import TYPE_CHECKING

from paligemma.data.rows import Picture, Row, RowError, Rows, printable

if TYPE_CHECKING:
    from paligemma.processing_paligemma import PaliGemmaProcessor

# Every problem there is, and the way out of it.
PROBLEMS = {
    "not UTF-8": "save the file in the encoding UTF-8",
    "not JSON": "write each row with json.dumps, one a line",
    "half a character": "an emoji that was cut in two, as by taking the first so many characters: write it whole",
    "missing key": "each row needs image, prefix and suffix (or question and answer, or caption)",
    "wrong type": "prefix and suffix are text, image is a path or a list of them",
    "missing picture": "paths are relative to the file they stand in, or to the folder given as images= (--images)",
    "unreadable picture": "replace the picture or leave the row out",
    "empty suffix": "a row needs something to learn; only detect and segment may have an empty answer: nothing there",
    "newline after prefix": "take the line break off: the processor puts the one that parts prefix and suffix",
    "reserved token": "leave out <image>, <bos>, <eos> and <pad>: the processor puts them where they belong",
    "label with ;": "labels are parted by ' ; ', so none can contain ';': rename it",
    "loc tokens": "a box is <locY0><locX0><locY1><locX1> (four digits, 0000 to 1023) with y0 < y1 and x0 < x1, "
    "then for a mask 16 <segNNN>, then the label",
    "box outside": "boxes are in pixels of the original picture: were they scaled, or width and height swapped?",
    "box or mask": "correct the annotation or leave it out",
    "suffix too long": "raise max_length or shorten the answers: what is cut off, the end token first, is not learned",
    "no room": "raise max_length: images and prompt alone fill it, and image tokens are never cut",
}


@dataclass(frozen=True)
class Problem:
    row: int
    source: str  # "my.jsonl:12"
    message: str


@dataclass
class CheckResult:
    """What `check` found. `str(result)` is for people."""

    note: str
    rows: int = 0
    counts: dict[str, int] = field(default_factory=dict)  # problem -> in how many rows
    first: dict[str, list[Problem]] = field(default_factory=dict)  # problem -> the first rows that have it
    bad_rows: int = 0
    longest: tuple[int, str] | None = None  # tokens of the longest row with its pictures, and where it is
    longest_suffix: tuple[int, str] | None = None  # tokens, <eos> included
    not_checked: list[str] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def ok(self) -> bool:
        return not self.counts

    def __str__(self) -> str:
        lines = [self.note]
        for problem, count in sorted(self.counts.items(), key=lambda item: -item[1]):
            lines.append(f"\n{problem}: {count:,} {'row' if count == 1 else 'rows'}. {PROBLEMS[problem]}")
            lines += [f"    {found.source}: {found.message}" for found in self.first[problem]]
            if count > len(self.first[problem]):
                lines.append(f"    ... and {count - len(self.first[problem]):,} more")
        if self.longest and self.longest_suffix:
            lines.append(
                f"\nlongest row: {self.longest[0]} tokens with its pictures ({self.longest[1]}); "
                f"longest suffix: {self.longest_suffix[0]} with its end ({self.longest_suffix[1]})"
            )
        if self.not_checked:
            lines.append(f"\nnot checked: {'; '.join(self.not_checked)}")
        speed = f"{self.rows / self.seconds:,.0f} rows/s" if self.seconds else ""
        lines.append(f"\n{self.bad_rows:,} of {self.rows:,} rows have a problem ({speed})")
        return "\n".join(lines).replace("\n\n\n", "\n\n")


def check(
    rows: Rows,
    processor: PaliGemmaProcessor | None = None,
    max_length: int | None = None,
    open_pictures: bool = False,
    show: int = 3,
    progress: Callable[[int], None] | None = None,
) -> CheckResult:
    """Check every row.

    processor: count tokens with it. max_length: as in training, of a whole row with its pictures. open_pictures: open
    each picture once. show: how many rows to name for each problem. progress: called now and then with the number of
    rows done.
    """
    if max_length is not None and processor is None:
        raise ValueError("max_length is in tokens, and counting them takes a processor")
    result = CheckResult(rows.note, len(rows))
    if processor is None:
        result.not_checked.append("lengths (needs the processor of a model: --model)")
    elif max_length is None:
        result.not_checked.append("whether rows are too long (no max_length: --max-length)")
    if not open_pictures:
        result.not_checked.append("whether pictures can be opened (open_pictures: --open-pictures)")
    lengths = Lengths(processor) if processor is not None else None
    # Bounded, so that a million different pictures do not fill the memory with their names.
    picture_problem = lru_cache(maxsize=100_000)(_opened if open_pictures else _there)

    begin = time.perf_counter()
    for i in range(len(rows)):
        found: dict[str, str] = {}
        source = ""
        try:
            row = rows[i]
        except RowError as error:
            found[error.problem], source = error.message, error.where
        else:
            source = row.source
            for picture in row.pictures:
                problem = picture_problem(picture) if isinstance(picture, str) else _data(picture, open_pictures)
                if problem is not None:
                    found.setdefault(*problem)
            for name, message in text_problems(row):
                found.setdefault(name, message)
            if lengths is not None and "reserved token" not in found:
                prefix, suffix = lengths(row)
                result.longest = max(result.longest or (0, ""), (prefix + suffix, source), key=lambda pair: pair[0])
                result.longest_suffix = max(
                    result.longest_suffix or (0, ""), (suffix, source), key=lambda pair: pair[0]
                )
                if max_length is not None and prefix >= max_length:
                    found["no room"] = f"pictures and prompt take {prefix} tokens, max_length is {max_length}"
                elif max_length is not None and prefix + suffix > max_length:
                    found["suffix too long"] = (
                        f"{prefix + suffix} tokens, max_length is {max_length}: "
                        f"{prefix + suffix - max_length} of the suffix's {suffix} would be cut off"
                    )
        if found:
            result.bad_rows += 1
            for name, message in found.items():
                result.counts[name] = result.counts.get(name, 0) + 1
                if result.counts[name] <= show:
                    result.first.setdefault(name, []).append(Problem(i, source, printable(message)))
        if progress is not None and i % 1000 == 999:
            progress(i + 1)
    if progress is not None:
        progress(len(rows))
    result.seconds = time.perf_counter() - begin
    return result


# -- pictures --


def _there(path: str) -> tuple[str, str] | None:
    if os.path.isfile(path):
        return None
    return "missing picture", f"{path} is a folder" if os.path.isdir(path) else f"no picture at {path}"


def _opened(path: str) -> tuple[str, str] | None:
    return _there(path) or _data(path, True)


def _data(picture: Picture, open_it: bool) -> tuple[str, str] | None:
    if not open_it:
        return None
    from paligemma.images import load_image

    try:
        load_image(picture)
    except (OSError, ValueError) as error:
        return "unreadable picture", str(error)
    return None


# -- text --

_RESERVED = re.compile(r"<(?:image|bos|eos|pad)>")
_ITEM = re.compile(r"<loc(\d{4})><loc(\d{4})><loc(\d{4})><loc(\d{4})>((?:<seg\d{3}>){16})?(?: [^;<>\n]+)?")


def text_problems(row: Row) -> Iterator[tuple[str, str]]:
    """(problem, what exactly) of prefix, suffix (or each of several) and boxes."""
    prefix = row.prefix
    asked = prefix.startswith(("detect ", "segment "))
    if prefix.endswith(("\n", "\r")):
        yield "newline after prefix", f"the prefix ends in a line break: {prefix[-30:]!r}"
    if "<" in prefix and (token := _RESERVED.search(prefix)):
        yield "reserved token", f"the prefix contains {token[0]}"
    if asked and ";" in prefix:
        for label in prefix.partition(" ")[2].split(" ; "):
            if ";" in label:
                yield "label with ;", f"the prompt asks for {label!r}"
    for suffix in dict.fromkeys(row.suffixes) or (row.suffix,):
        if "<" in suffix and (token := _RESERVED.search(suffix)):
            yield "reserved token", f"the suffix contains {token[0]}"
        if not suffix.strip() and not (asked and suffix == ""):
            yield "empty suffix", "the suffix is empty" if suffix == "" else f"the suffix is only space: {suffix!r}"
        if "<loc" in suffix or "<seg" in suffix or (asked and suffix.strip()):
            yield from _region_problems(suffix, asked, prefix.startswith("segment "))
    if row.size is not None:
        width, height = row.size
        for x0, y0, x1, y1 in row.boxes:
            if x0 < -1 or y0 < -1 or x1 > width + 1 or y1 > height + 1:  # a pixel is rounding
                yield (
                    "box outside",
                    f"the box {x0:g}, {y0:g}, {x1:g}, {y1:g} reaches out of the picture, which is {width} x {height}",
                )


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
    rest = re.sub(r"<loc(0\d{3}|10[01]\d|102[0-3])>|<seg(0\d\d|1[01]\d|12[0-7])>", "", suffix)
    if strange := re.search(r"<(?:loc|seg)[^>]{0,6}>?", rest):
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


# -- lengths --


class Lengths:
    """Tokens of a row: (pictures, <bos>, prefix and newline; suffix and <eos>, of several the longest)."""

    def __init__(self, processor: PaliGemmaProcessor) -> None:
        self.per_picture = processor.num_image_tokens
        encode = processor.tokenizer.encode
        self.prefix = lru_cache(maxsize=10_000)(lambda prefix: 1 + len(encode(prefix + "\n")))
        self.suffix = lru_cache(maxsize=10_000)(lambda suffix: len(encode(suffix + "<eos>")))

    def __call__(self, row: Row) -> tuple[int, int]:
        suffix = max(map(self.suffix, row.suffixes)) if row.suffixes else self.suffix(row.suffix)
        return len(row.pictures) * self.per_picture + self.prefix(row.prefix), suffix
