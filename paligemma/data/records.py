"""Records (a line of JSON, a line of a table) -> rows.

A record says what the model reads and writes in one of three ways; what else it has is ignored:

    {"image": "7.png", "prefix": "answer en what is it ?", "suffix": "a dog"}     (or "answers" instead of a suffix)
    {"image": "7.png", "question": "what is it ?", "answers": ["a dog", "dog", "a dog"]}
    {"image": "7.png", "caption": "a dog asleep"}                                 (or a list of them)

`image` (or `file_name`) is a path, relative to the file it stands in (or to `images`), a list of them for a row that
sees several, or, in Arrow and parquet, the picture itself. `null` is allowed: a row without a picture.

Of several answers or captions training takes another in each epoch (`batches.py`), as the reference does, and measuring
takes any of them as right; with an "answer" or a suffix beside them, that one alone is learned.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from dataclasses import dataclass
from string import Formatter
from typing import Any, Protocol

from paligemma.data.rows import Picture, Row, RowError, short


class Records(Protocol):
    """What `JsonLines`, `JsonRecords`, `CsvFile` and `ArrowFiles` have in common."""

    def __len__(self) -> int: ...
    def __getitem__(self, i: int, /) -> dict[str, Any]: ...
    def where(self, i: int, /) -> str: ...


@dataclass(frozen=True)
class RecordReader:
    """Record i as a row. (Not a closure, so that rows can be pickled.)"""

    records: Records
    folder: str
    language: str
    image_name: str | None

    def __call__(self, i: int) -> Row:
        return to_row(self.records[i], self.folder, self.language, self.image_name, i, self.records.where(i))


def to_row(record: dict[str, Any], folder: str, language: str, image_name: str | None, number: int, where: str) -> Row:
    """A record -> a row. RowError for any other."""
    prefix, suffix, answers = record.get("prefix"), record.get("suffix"), _answers(record)
    named = suffix is not None or record.get("answer") is not None
    if suffix is None and prefix is None and record.get("question") is not None:
        prefix = f"answer {language} {record['question']}"
    if suffix is None and prefix is not None:
        suffix = best_answer(record)
    elif suffix is None:
        caption = next((record[key] for key in ("caption", "text") if record.get(key) is not None), None)
        if caption is not None:
            prefix, answers, named = f"caption {language}", caption, False
            suffix = caption[0] if isinstance(caption, list) and caption else caption
    for name, value in (("prefix", prefix), ("suffix", suffix)):
        if value is None:
            raise RowError(
                where,
                "missing key",
                f"no {name}: expected image, prefix and suffix (or question and answer, or caption); "
                f"it has {', '.join(map(str, record)) or 'nothing'}",
            )
        if not isinstance(value, str):
            raise RowError(where, "wrong type", f"the {name} is {short(value)}, expected text in quotes")
    key = next((key for key in ("image", "images", "file_name") if key in record), None)
    if key is not None:
        value = record[key]
    elif image_name is None:
        raise RowError(
            where,
            "missing key",
            "no image: expected a path in 'image' (null for a row without one), or a name made of other fields "
            f"(image_name='{{image_id}}.jpg'); it has {', '.join(map(str, record))}",
        )
    else:
        try:
            value = image_name.format(**record)
        except (KeyError, ValueError, IndexError, TypeError, AttributeError, OverflowError) as error:
            raise RowError(
                where, "missing key", f"image_name {image_name!r} does not fit its fields: {error}"
            ) from None
    if isinstance(value, (list, tuple)):
        picture: Any = tuple(_picture(item, folder, where) for item in value) or None
    else:
        picture = None if value is None else _picture(value, folder, where)
    right: tuple[str, ...] = ()
    if isinstance(answers, list) and all(isinstance(text, str) for text in answers):
        right = tuple(answers)
    return Row(picture, prefix, suffix, number, where, answers=right, suffixes=() if named else right)  # type: ignore[arg-type]


def check_image_name(name: str) -> None:
    """ValueError for what cannot be filled in, or would be a longer name than any file has: a width of a thousand
    million takes as many bytes."""
    try:
        specs = [spec or "" for _, _, spec, _ in Formatter().parse(name)]
    except ValueError as error:
        raise ValueError(f"image_name {name!r}: {error}; expected something like '{{image_id:012d}}.jpg'") from None
    for spec in specs:
        if "{" in spec or any(float(number) > 255 for number in re.findall(r"\d+", spec)):
            raise ValueError(f"image_name {name!r}: {spec!r} is no width; expected a number up to 255, as in '012d'")


def _picture(value: Any, folder: str, where: str) -> Picture:
    if isinstance(value, dict):  # how Hugging Face stores a picture
        value = value.get("bytes") or value.get("path")
    if isinstance(value, str) and value:
        return os.path.join(folder, value)
    if isinstance(value, bytes) and value:
        return value
    raise RowError(where, "wrong type", f"the image is {short(value)}, expected the path of a picture")


def best_answer(record: dict[str, Any]) -> Any:
    """The answer that the data set names, or else the commonest; of equally common ones the first. None if there is
    none. Answers are text, or objects with the text in "answer" (VQA)."""
    for key in ("multiple_choice_answer", "suffix", "answer"):
        if record.get(key) is not None:
            return record[key]
    answers = _answers(record)
    if not isinstance(answers, list) or not answers:
        return answers or None
    if not all(isinstance(text, str) for text in answers):
        return answers
    return Counter(answers).most_common(1)[0][0]


def _answers(record: dict[str, Any]) -> Any:
    answers = record.get("answers")
    if isinstance(answers, dict):  # SQuAD and relatives
        answers = answers.get("text")
    if isinstance(answers, list):  # VQA's answers are objects
        return [answer.get("answer") if isinstance(answer, dict) else answer for answer in answers]
    return answers
