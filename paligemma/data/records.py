"""Records (a line of JSON, a line of a table) -> rows.

A record says what the model reads and writes in one of these ways; what else it has is ignored:

    {"image": "7.png", "prefix": "answer en what is it ?", "suffix": "a dog"}     (or "answers" instead of a suffix)
    {"image": "7.png", "question": "what is it ?", "answers": ["a dog", "dog", "a dog"]}
    {"image": "7.png", "caption": "a dog asleep"}                                 (or "text", or a list of them)
    {"image": "7.png", "label": "dog"}                                            (a class: see LABEL_PROMPT)
    {"image": "7.png", "objects": {"bbox": [[x, y, width, height], ...], "category": ["dog", ...]}}   (or dicts)
    {"image": "7.png", "conversations": [{"from": "human", "value": "<image>what is it ?"}, ...]}   (conversations.py)

`image` (or `file_name`, and other usual names) is a path, relative to the file it stands in (or to `images`), a list of
them for a row that sees several, or, in Arrow and parquet, the picture itself. `null` is allowed: a row without a
picture. A question that already is a prompt ("detect nucleus") stays as it is.

Of several answers or captions training takes another in each epoch (`batches.py`), as the reference does, and measuring
takes any of them as right; with an "answer" or a suffix beside them, that one alone is learned.
"""

from __future__ import annotations

import base64
import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from string import Formatter
from typing import Any, Protocol

import numpy as np

from paligemma.data.objects import Object, ObjectRows, corners, four_numbers
from paligemma.data.picture_checks import upright_size
from paligemma.data.prompts import is_prompt
from paligemma.data.rows import Picture, Row, RowError, short
from paligemma.files import is_data_url, parse_json

IMAGE = ("image", "images", "file_name")
# Other usual names of the same columns. They are looked for after `image_name`, and in capitals too.
OTHER_IMAGE = ("filename", "file", "image_path", "image_file", "img", "img_path", "filepath", "path", "picture")
CAPTION = ("caption", "text")
OTHER_CAPTION = ("captions", "description", "sentence")
LABEL = ("label", "class", "category")
CATEGORIES = ("category", "categories", "label", "labels", "category_id", "name", "class")  # beside boxes
BOXES = ("bbox", "bboxes", "boxes", "box")
LABEL_PROMPT = "answer {language} what is this?"


class Records(Protocol):
    """What `JsonLines`, `JsonRecords`, `CsvFile` and `ArrowFiles` have in common."""

    def __len__(self) -> int: ...
    def __getitem__(self, i: int, /) -> dict[str, Any]: ...
    def where(self, i: int, /) -> str: ...


@dataclass(frozen=True)
class RecordReader:
    """Record i as a row. (Not a closure, so that rows can be pickled.)"""

    records: Records
    make: RecordRows

    def __call__(self, i: int) -> Row:
        return self.make.row(self.records[i], i, self.records.where(i))


@dataclass(frozen=True)
class RecordRows:
    """How rows are made of records. names: for columns that hold numbers of classes ("label", "objects"), the names by
    number. objects: how rows are made of boxes."""

    folder: str
    language: str
    image_name: str | None
    names: Mapping[str, Sequence[str]] = field(default_factory=dict)
    objects: ObjectRows = field(default_factory=ObjectRows)

    def row(self, record: dict[str, Any], number: int, where: str) -> Row:
        """RowError for a record in none of the forms at the head of this file."""
        if asks_for_objects(record):
            picture = picture_of(record, self.folder, self.image_name, where)
            return self.row_of_objects(record, picture, number, where)
        text = self.text(record, where)
        picture = picture_of(record, self.folder, self.image_name, where)
        suffixes = () if text.named else text.answers
        return Row(
            picture, text.prefix, text.suffix, number, where, None, (), text.answers, suffixes, tuple(text.notes)
        )

    def text(self, record: dict[str, Any], where: str) -> Text:
        """What the model reads and writes."""
        prefix, suffix, answers = record.get("prefix"), record.get("suffix"), _answers(record)
        named = suffix is not None or record.get("answer") is not None
        notes = list(record.get(NOTES_KEY, ()))
        if suffix is None and prefix is None and record.get("question") is not None:
            prefix, suffix = record["question"], best_answer(record)
            if isinstance(prefix, str) and is_prompt(prefix, suffix):
                notes.append("prompt kept")
            else:
                prefix = f"answer {self.language} {prefix}"
        elif suffix is None and prefix is not None:
            suffix = best_answer(record)
        elif suffix is None and (caption := first_of(record, CAPTION, OTHER_CAPTION)) is not None:
            prefix, answers, named = f"caption {self.language}", caption, False
            suffix = caption[0] if isinstance(caption, list) and caption else caption
        elif suffix is None and (column := column_of(record, LABEL, ())) is not None:
            prefix, answers = LABEL_PROMPT.format(language=self.language), None
            suffix = self.label(record[column], column, notes)
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
        right: tuple[str, ...] = ()
        if isinstance(answers, list) and all(isinstance(text, str) for text in answers):
            right = tuple(answers)
        return Text(str(prefix), str(suffix), right, named, notes)

    def label(self, label: Any, column: str, notes: list[str]) -> Any:
        """The name of a class that may be given by its number."""
        if isinstance(label, bool) or not isinstance(label, int):
            return label
        names = self.names.get(column)
        if names is not None and 0 <= label < len(names):
            return names[label]
        notes.append("label is a number")
        return str(label)

    def row_of_objects(self, record: dict[str, Any], picture: Any, number: int, where: str) -> Row:
        """A record with a column of boxes."""
        columns = columns_of(record["objects"], where)
        boxes, labels = first_of(columns, BOXES, ()) or [], first_of(columns, CATEGORIES, ()) or []
        readable = isinstance(boxes, list) and isinstance(labels, list) and len(boxes) == len(labels)
        if not readable or (not boxes and any(columns.values())):
            raise RowError(
                where,
                "box or mask",
                f"objects need as many boxes as labels: expected bbox and category, it has {', '.join(columns)}",
            )
        if picture is None or isinstance(picture, tuple):
            raise RowError(where, "missing key", "objects need one picture that they are in")
        size = self.size(record, picture, where)
        notes: list[str] = []
        found = []
        for k, (box, label) in enumerate(zip(boxes, labels)):
            try:
                numbers = four_numbers(box)
            except ValueError as error:
                raise RowError(where, "box or mask", f"objects[{k}]: {error}") from None
            if label is None or label == "":
                raise RowError(where, "missing key", f"objects[{k}] has no category")
            name = str(self.label(label, "objects", notes))
            in_shares = all(0 <= value <= 1 for value in numbers)
            found.append(Object(name, corners(*numbers), f"objects[{k}]", in_shares=in_shares))
        return self.objects.row(picture, size, found, number, where, dict.fromkeys(notes))

    def size(self, record: dict[str, Any], picture: Picture, where: str) -> tuple[int, int]:
        """Width and height as the record gives them, or else of the picture."""
        given = record.get("width"), record.get("height")
        if all(isinstance(side, int) and side > 0 for side in given):
            return given  # type: ignore[return-value]
        size = upright_size(picture)
        if size is None:
            raise RowError(where, "missing picture", f"no picture at {picture!r}, whose size the boxes need")
        return size


def asks_for_objects(record: Mapping[str, Any]) -> bool:
    """Whether the row is made of the column of objects. Beside a caption it may hold anything, such as names."""
    objects = record.get("objects")
    if not isinstance(objects, (dict, list)) or {"prefix", "suffix"} & set(record):
        return False
    if isinstance(objects, dict) and first_of(objects, BOXES, ()) is not None:
        return True
    if isinstance(objects, list) and any(isinstance(one, dict) for one in objects):
        return True
    return first_of(record, ("question", *CAPTION, *LABEL), OTHER_CAPTION) is None


def columns_of(objects: dict[str, Any] | list[Any], where: str) -> dict[str, Any]:
    """Objects as a dict of lists, which may stand as a list of dicts."""
    if isinstance(objects, dict):
        return objects
    for k, one in enumerate(objects):
        if not isinstance(one, dict):
            raise RowError(
                where, "box or mask", f"objects[{k}] is {short(one)}, expected an object with bbox and category"
            )
    return {key: [one.get(key) for one in objects] for key in dict.fromkeys(key for one in objects for key in one)}


class WithObjects:
    """The records of a data set of boxes, without those of pictures without objects. All are read once, of `columns`
    (the same records) no more than it takes to know this."""

    def __init__(self, records: Records, columns: Records) -> None:
        self.records = records
        self.kept = np.array([i for i in range(len(records)) if not without_objects(columns, i)], np.int64)

    def __len__(self) -> int:
        return len(self.kept)

    def __getitem__(self, i: int) -> dict[str, Any]:
        return self.records[int(self.kept[i])]

    def where(self, i: int) -> str:
        return self.records.where(int(self.kept[i]))


def without_objects(records: Records, i: int) -> bool:
    """Whether record i is one of boxes and has none."""
    try:
        record = records[i]
        if not asks_for_objects(record):
            return False
        columns = columns_of(record["objects"], "")
    except RowError:
        return False  # says what is wrong when it is read
    boxes, labels = first_of(columns, BOXES, ()), first_of(columns, CATEGORIES, ())
    return not boxes and not labels and (boxes is not None or not any(columns.values()))


NOTES_KEY = "\0notes"  # a key that no file has, by which `conversations.py` hands on what it left out


@dataclass(frozen=True)
class Text:
    """What a record says. named: one answer of several is the one to learn."""

    prefix: str
    suffix: str
    answers: tuple[str, ...]
    named: bool
    notes: list[str]


def first_of(record: Mapping[str, Any], names: Sequence[str], others: Sequence[str]) -> Any:
    """The value in `column_of`; None if there is none."""
    column = column_of(record, names, others)
    return None if column is None else record[column]


def column_of(record: Mapping[str, Any], names: Sequence[str], others: Sequence[str]) -> str | None:
    """The first of these columns that is there, exactly so or (`others` too) in other capitals; None if none is."""
    for name in (*names, *others):
        if record.get(name) is not None:
            return name
    small = {str(key).strip().lower(): key for key, value in record.items() if value is not None}
    return next((small[name] for name in (*names, *others) if name in small), None)


# -- pictures --


def picture_of(
    record: dict[str, Any], folder: str, image_name: str | None, where: str
) -> Picture | tuple[Picture, ...] | None:
    key = next((key for key in IMAGE if key in record), None)
    if key is not None:
        value = record[key]
    elif image_name is not None:
        try:
            value = image_name.format(**record)
        except (KeyError, ValueError, IndexError, TypeError, AttributeError, OverflowError) as error:
            raise RowError(
                where, "missing key", f"image_name {image_name!r} does not fit its fields: {error}"
            ) from None
    elif (value := first_of(record, IMAGE, OTHER_IMAGE)) is None:
        raise RowError(
            where,
            "missing key",
            "no image: expected a path in 'image' (null for a row without one), or a name made of other fields "
            f"(image_name='{{image_id}}.jpg'); it has {', '.join(str(key) for key in record if key != NOTES_KEY)}",
        )
    if isinstance(value, (list, tuple)):
        return tuple(_picture(item, folder, where) for item in value) or None
    return None if value is None else _picture(value, folder, where)


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
    if isinstance(value, str) and is_data_url(value):
        try:
            return base64.b64decode(value.partition(",")[2], validate=True)
        except ValueError:
            raise RowError(where, "unreadable picture", f"the image is {short(value)}, which is no base64") from None
    if isinstance(value, str) and value:
        return os.path.join(folder, value)
    if isinstance(value, bytes) and value:
        return value
    raise RowError(where, "wrong type", f"the image is {short(value)}, expected the path of a picture")


# -- answers --


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
    if isinstance(answers, str) and answers.startswith("["):  # a cell of a CSV
        with suppress(ValueError):
            listed = parse_json(answers)
            answers = listed if all(isinstance(one, (str, dict)) for one in listed) else answers
    if isinstance(answers, dict):  # SQuAD and relatives
        answers = answers.get("text")
    if isinstance(answers, list):  # VQA's answers are objects
        return [answer.get("answer") if isinstance(answer, dict) else answer for answer in answers]
    return answers
