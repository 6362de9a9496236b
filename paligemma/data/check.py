"""What is wrong with your data, before a run of hours finds out.

    result = check(open_rows("my.jsonl"), processor, max_length=320)
    print(result)            # how many rows have which problem, the first of each with its place and the way out
    result.ok

Goes through every row, at tens of thousands a second as long as no tokens are counted and no pictures opened: both are
done if asked for (`processor`, `open_pictures`). Of each picture the header is read, for its size.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from paligemma.data.box_statistics import BoxStatistics
from paligemma.data.lengths import Lengths
from paligemma.data.picture_checks import PictureChecks
from paligemma.data.row_checks import AskedLabels, text_problems
from paligemma.data.rows import RowError, Rows
from paligemma.files import MAX_PIXELS
from paligemma.terminal import printable

if TYPE_CHECKING:
    from paligemma.processing_paligemma import PaliGemmaProcessor

# Every problem there is, and the way out of it.
PROBLEMS = {
    "not UTF-8": "save the file in the encoding UTF-8",
    "not JSON": "write each row with json.dumps, one a line",
    "not XML": "write the annotation again: an XML file of <annotation> for each picture",
    "half a character": "an emoji that was cut in two, as by taking the first so many characters: write it whole",
    "missing key": "each row needs image, prefix and suffix (or question and answer, or caption)",
    "wrong type": "prefix and suffix are text, image is a path or a list of them",
    "missing picture": "paths are relative to the file they stand in, or to the folder given as images= (--images)",
    "too many pixels": "scale the picture down, leave the row out, or raise the limit (max_pixels: --max-pixels)",
    "unreadable picture": "replace the picture or leave the row out",
    "empty suffix": "a row needs something to learn; only detect and segment may have an empty answer: nothing there",
    "newline after prefix": "take the line break off: the processor puts the one that parts prefix and suffix",
    "reserved token": "leave out <image>, <bos>, <eos> and <pad>: the processor puts them where they belong",
    "label with ;": "labels are parted by ' ; ', so none can contain ';': rename it",
    "empty label": "detect and segment ask for one label or more, parted by ' ; ': write what is missing, or take the "
    "semicolon out",
    "loc tokens": "a box is <locY0><locX0><locY1><locX1> (four digits, 0000 to 1023) with y0 < y1 and x0 < x1, "
    "then for a mask 16 <segNNN>, then the label",
    "box outside": "boxes are in pixels of the original picture: were they scaled, or width and height swapped?",
    "box or mask": "correct the annotation or leave it out",
    "turned by EXIF": "annotate the picture as people see it, or save it turned (Pillow: ImageOps.exif_transpose)",
    "another size": "boxes are in pixels of the picture that the annotation describes: is this another, or was it cut?",
    "form of the prompt": "the model knows its prompts in small letters and without a full stop: rewrite it",
    "label not asked for": "an answer's labels are those of its prompt, letter by letter: no others can be written",
    "boxes not asked for": "ask for boxes by 'detect a ; b', for masks by 'segment a ; b': other answers count as text",
    "suffix too long": "raise max_length or shorten the answers: what is cut off, the end token first, is not learned",
    "no room": "raise max_length: images and prompt alone fill it, and image tokens are never cut",
}


# What was repaired, with certainty: of one row, of several.
NOTES = {
    "prompt kept": ("question is already a prompt: kept as it is", "questions are already prompts: kept as they are"),
    "scaled": (
        "picture is larger or smaller than its annotation says, in the same proportions: its boxes are scaled",
        "pictures are larger or smaller than their annotations say, in the same proportions: their boxes are scaled",
    ),
    "pairs": (
        "row has polygons in pairs [x, y], which COCO writes flat: read",
        "rows have polygons in pairs [x, y], which COCO writes flat: read",
    ),
    "label is a number": (
        "row has a label that is a number without a name: the number is learned as text",
        "rows have a label that is a number without a name: the number is learned as text",
    ),
    "system message": (
        "conversation has a system message, which the model has no place for: left out",
        "conversations have a system message, which the model has no place for: left out",
    ),
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
    repaired: dict[str, int] = field(default_factory=dict)  # key of NOTES -> in how many rows
    longest: tuple[int, str] | None = None  # tokens of the longest row with its pictures, and where it is
    longest_suffix: tuple[int, str] | None = None  # tokens, <eos> included
    questions: list[str] = field(default_factory=list)  # what the rows together make doubtful, and only people know
    not_checked: list[str] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def ok(self) -> bool:
        """Without rows nothing is right."""
        return not self.counts and self.rows > 0

    def notes(self) -> list[str]:
        """What was repaired, in words."""
        return [f"{count:,} {NOTES[name][count > 1]}" for name, count in self.repaired.items()]

    def __str__(self) -> str:
        lines = [self.note]
        for problem, count in sorted(self.counts.items(), key=lambda item: -item[1]):
            lines.append(f"\n{problem}: {count:,} {'row' if count == 1 else 'rows'}. {PROBLEMS[problem]}")
            lines += [f"    row {found.row}, {found.source}: {found.message}" for found in self.first[problem]]
            if count > len(self.first[problem]):
                lines.append(f"    ... and {count - len(self.first[problem]):,} more")
        if self.repaired:
            lines.append("\n" + "\n".join(f"note: {text}" for text in self.notes()))
        lines += [f"\nquestion: {text}" for text in self.questions]
        if self.longest and self.longest_suffix:
            lines.append(
                f"\nlongest row: {self.longest[0]} tokens with its pictures ({self.longest[1]}); "
                f"longest suffix: {self.longest_suffix[0]} with its end ({self.longest_suffix[1]})"
            )
        if self.not_checked:
            lines.append(f"\nnot checked: {'; '.join(self.not_checked)}")
        if not self.rows:
            lines.append("\nthere are no rows: nothing to train on or to measure")
        speed = f"{self.rows / self.seconds:,.0f} rows/s" if self.seconds else ""
        lines.append(f"\n{self.bad_rows:,} of {self.rows:,} rows have a problem ({speed})")
        return printable("\n".join(lines).replace("\n\n\n", "\n\n"))

    def add(self, row: int, source: str, found: dict[str, str], show: int) -> None:
        """The problems of a row."""
        self.bad_rows += bool(found)
        for name, message in found.items():
            self.counts[name] = self.counts.get(name, 0) + 1
            if self.counts[name] <= show:
                self.first.setdefault(name, []).append(Problem(row, printable(source), printable(message)))


def check(
    rows: Rows,
    processor: PaliGemmaProcessor | None = None,
    max_length: int | None = None,
    open_pictures: bool = False,
    show: int = 3,
    max_pixels: int = MAX_PIXELS,
    progress: Callable[[int], None] | None = None,
) -> CheckResult:
    """Check every row.

    processor: count tokens with it. max_length: as in training, of a whole row with its pictures. open_pictures: open
    each picture once. show: how many rows to name for each problem. max_pixels: of a picture, by its header. progress:
    called now and then with the number of rows done.
    """
    if max_length is not None and processor is None:
        raise ValueError("max_length is in tokens, and counting them takes a processor")
    result = CheckResult(rows.note, len(rows))
    pictures = PictureChecks(open_pictures, max_pixels)
    lengths = Lengths(processor) if processor is not None else None
    boxes, labels = BoxStatistics(), AskedLabels()
    begin = time.perf_counter()
    for i in range(len(rows)):
        found: dict[str, str] = {}
        try:
            row = rows[i]
        except RowError as error:
            found[error.problem], source = error.message, error.where
        else:
            source = row.source
            for name, message in (*pictures.problems(row), *text_problems(row)):
                found.setdefault(name, message)
            boxes.add(row)
            labels.add(row)
            for note in (*row.notes, *pictures.notes):
                result.repaired[note] = result.repaired.get(note, 0) + 1
            if lengths is not None and "reserved token" not in found:
                prefix, suffix = lengths(row)
                result.longest = max(result.longest or (0, ""), (prefix + suffix, source), key=lambda pair: pair[0])
                longest_suffix = result.longest_suffix or (0, "")
                result.longest_suffix = max(longest_suffix, (suffix, source), key=lambda pair: pair[0])
                found |= length_problems(prefix, suffix, max_length)
        result.add(i, source, found, show)
        if progress is not None and (i % 1000 == 999 or i + 1 == len(rows)):
            progress(i + 1)
    result.seconds = time.perf_counter() - begin
    result.questions = [*boxes.questions(), *labels.questions()]
    result.not_checked = what_was_not_checked(processor is not None, max_length, pictures)
    return result


def length_problems(prefix: int, suffix: int, max_length: int | None) -> dict[str, str]:
    """prefix, suffix: in tokens."""
    if max_length is None or prefix + suffix <= max_length:
        return {}
    if prefix >= max_length:
        return {"no room": f"pictures and prompt take {prefix} tokens, max_length is {max_length}"}
    return {
        "suffix too long": f"{prefix + suffix} tokens, max_length is {max_length}: {prefix + suffix - max_length} of "
        f"the suffix's {suffix} would be cut off"
    }


def what_was_not_checked(counted: bool, max_length: int | None, pictures: PictureChecks) -> list[str]:
    left = []
    if not counted:
        left.append("lengths (needs the processor of a model: --model)")
    elif max_length is None:
        left.append("whether rows are too long (no max_length: --max-length)")
    if not pictures.open_pictures:
        left.append("whether pictures can be opened (open_pictures: --open-pictures)")
    if pictures.uncertain:
        left.append(
            f"whether the boxes of {pictures.uncertain:,} rows belong to the upright picture: EXIF turns it, which its "
            "size does not show (look at them with data show)"
        )
    return left
