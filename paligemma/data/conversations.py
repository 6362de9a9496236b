"""Conversations about a picture, as ShareGPT, LLaVA and chat templates write them -> a record for each question.

    {"image": "7.jpg", "conversations": [{"from": "human", "value": "<image>\\nwhat is it?"},
                                         {"from": "gpt", "value": "a dog"}, ...]}
    {"images": ["7.jpg"], "messages": [{"role": "user", "content": "<image>what is it?"},
                                       {"role": "assistant", "content": "a dog"}, ...]}
    {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "7.jpg"}},
                                               {"type": "text", "text": "what is it?"}]}, ...]}

PaliGemma reads one prompt and writes one answer, so each question is asked alone, with the picture. `<image>`, or a
part {"type": "image"} without a picture, marks where the picture stood; the processor puts it in front. Pictures stand
in the parts, or in a column as in other records; a conversation without any says so: "image": null.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from paligemma.data.records import IMAGE, NOTES_KEY, OTHER_IMAGE, Records, first_of
from paligemma.data.rows import RowError, short
from paligemma.files import parse_json

KEYS = ("conversations", "messages")
ASKS = {"human", "user"}
ANSWERS = {"gpt", "assistant", "model"}
# Columns that would count as question or answer beside those of a turn. The others may name the picture.
SAYING = {*KEYS, "prefix", "suffix", "answers", "multiple_choice_answer", "objects"}


def is_conversation(record: dict[str, Any]) -> bool:
    if {"prefix", "question"} & set(record):
        return False
    as_text = not {"caption", "text", "label", "suffix"} & set(record)
    return any(isinstance(record.get(key), (list, str) if as_text else list) for key in KEYS)


class Questions:
    """Records with a question each, of records with a conversation each. All are read once, to count the questions."""

    def __init__(self, records: Records) -> None:
        self.records = records
        counts = []
        for i in range(len(records)):
            try:
                counts.append(max(1, len(questions_of(records[i], ""))))
            except RowError:
                counts.append(1)  # says what is wrong when it is read
        self.ends = np.cumsum(counts) if counts else np.empty(0, np.int64)

    def __len__(self) -> int:
        return int(self.ends[-1]) if len(self.ends) else 0

    def __getitem__(self, i: int) -> dict[str, Any]:
        record, k = self._place(i)
        found = questions_of(self.records[record], self.records.where(record))
        return found[k]

    def where(self, i: int) -> str:
        record, k = self._place(i)
        several = int(self.ends[record]) - (int(self.ends[record - 1]) if record else 0) > 1
        return self.records.where(record) + (f" question {k}" if several else "")

    def _place(self, i: int) -> tuple[int, int]:
        """The record that question i is of, and which of its questions."""
        if not 0 <= i < len(self):
            raise IndexError(f"there are {len(self)} rows")
        record = int(np.searchsorted(self.ends, i, side="right"))
        return record, i - (int(self.ends[record - 1]) if record else 0)


def questions_of(record: dict[str, Any], where: str) -> list[dict[str, Any]]:
    """RowError for a conversation that is not question, answer, question, answer, ..."""
    key = next((key for key in KEYS if isinstance(record.get(key), (list, str))), "")
    if not is_conversation(record):
        return [record]  # another form of record in the same file
    turns = record[key]
    if isinstance(turns, str):  # in a column of a table: JSON
        try:
            turns = parse_json(turns, any_number=True)
        except ValueError:
            turns = None
    if not isinstance(turns, list):
        raise RowError(where, "wrong type", f"{key} is {short(record[key])}, expected a list of turns, or one as JSON")
    pictures: list[Any] = []
    found: list[dict[str, Any]] = []
    asked: str | None = None
    marks, notes = 0, []
    for k, turn in enumerate(turns):
        speaker, text, inside = _turn(turn, f"turn {k}", where)
        pictures += inside
        marks += text.count("<image>")
        if speaker == "system":
            notes.append("system message")
        elif speaker in ASKS and asked is None:
            asked = text.replace("<image>", "").strip()
        elif speaker in ANSWERS and asked is not None:
            found.append({"question": asked, "answer": text.strip()})
            asked = None
        else:
            raise RowError(where, "wrong type", f"turn {k} is by {speaker!r}: expected question and answer in turn")
    if not found or asked is not None:
        raise RowError(where, "missing key", "a question without an answer" if found else "no question with an answer")
    rest = {key: value for key, value in record.items() if key not in SAYING}
    given = first_of(record, IMAGE, ())
    pictures = pictures or (given if isinstance(given, list) else [given] if given is not None else [])
    if pictures or set(IMAGE) & set(record):
        rest["image"], count = pictures[0] if len(pictures) == 1 else pictures or None, len(pictures)
    else:  # one of another column, or whose name is made of columns
        other = first_of(record, (), OTHER_IMAGE)
        count = len(other) if isinstance(other, list) else 1
    if marks and marks != count:
        raise RowError(where, "missing picture", f"{marks} times <image>, but {count} pictures")
    return [{**rest, **one, NOTES_KEY: notes} for one in found]


def _turn(turn: Any, name: str, where: str) -> tuple[str, str, list[Any]]:
    """Who speaks, the text with its marks, and the pictures that stand in it."""
    if not isinstance(turn, dict):
        raise RowError(where, "wrong type", f"{name} is {short(turn)}, expected an object")
    speaker = turn.get("from", turn.get("role"))
    content = turn.get("value", turn.get("content"))
    pictures: list[Any] = []
    if isinstance(content, list):
        texts = []
        for k, part in enumerate(content):
            kind = part.get("type") if isinstance(part, dict) else None
            picture = _picture(part) if isinstance(part, dict) and kind in (None, "image", "image_url") else None
            if kind == "text" and isinstance(part.get("text"), str):
                texts.append(part["text"])
            elif picture is not None:
                pictures.append(picture)
            elif kind == "image":
                texts.append("<image>")
            else:
                raise RowError(where, "wrong type", f"{name}: part {k} is {short(part)}, expected a text or a picture")
        content = "\n".join(texts)
    if not isinstance(speaker, str) or not isinstance(content, str):
        raise RowError(where, "wrong type", f"{name} is {short(turn)}, expected who speaks and a text")
    return speaker, content, pictures


def _picture(part: dict[str, Any]) -> Any:
    """The picture of a part, as OpenAI and as chat templates write it; None if there is none."""
    url = part.get("image_url")
    given = (part.get("image"), url.get("url") if isinstance(url, dict) else url, part.get("url"), part.get("path"))
    return next((picture for picture in given if picture is not None), None)
