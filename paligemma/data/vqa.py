"""VQA's files -> rows: questions in one file, the answers of ten people to each in another.

{"questions": [{"question_id": 1, "image_id": 42, "question": "what is it ?"}, ...], "data_subtype": "val2014"}
{"annotations": [{"question_id": 1, "multiple_choice_answer": "dog", "answers": [{"answer": "dog"}, ...]}, ...]}
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from paligemma.data.json_documents import JsonFile
from paligemma.data.records import RecordRows
from paligemma.data.rows import Row, Rows, short


@dataclass(frozen=True)
class QuestionReader:
    questions: JsonFile
    answers: JsonFile
    order: Any  # int64 [questions], where the answers to each stand
    make: RecordRows

    def __call__(self, i: int) -> Row:
        where = self.questions.where("questions", i)
        question = self.questions.element("questions", i)
        answers = self.answers.element("annotations", int(self.order[i]))
        question |= {key: answers.get(key) for key in ("answer", "answers", "multiple_choice_answer")}
        return self.make.row(question, i, where)


def questions(
    path: Path, annotations: str | os.PathLike[str] | None, folder: str, image_name: str | None, language: str
) -> Rows:
    ids: dict[str, list[Any]] = {"questions": [], "annotations": []}
    subtype: list[str] = []

    def look(key: str, element: Any) -> None:
        if key in ids:
            found = element.get("question_id") if isinstance(element, dict) else None
            if not isinstance(found, (int, float, str)):
                raise ValueError(
                    f"{file} {key}[{len(ids[key])}] has no question_id, by which questions and answers are joined: "
                    f"expected a number or text, got {short(found)}"
                )
            ids[key].append(found)
        elif key == "data_subtype":
            subtype.append(str(element))

    file = path
    questions = answers = JsonFile(file, look)
    if annotations is not None:
        ids["annotations"].clear()
        asked = len(ids["questions"])
        file = Path(annotations)
        answers = JsonFile(file, look)
        if answers.count("questions"):
            raise ValueError(
                f"{file} holds {answers.count('questions'):,} questions beside {answers.count('annotations'):,} "
                f"annotations, and {path} has {asked:,} questions of its own: give {file} alone, without annotations= "
                "(--annotations), or name a file that has the annotations alone"
            )
    if not questions.count("questions"):
        raise ValueError(f"{path} has no 'questions'")
    if not answers.count("annotations"):
        raise ValueError(
            f"{path} has questions without answers: name the file with the answers too (annotations=...), such as "
            "v2_mscoco_train2014_annotations.json"
        )
    place: dict[Any, int] = {}
    for i, question in enumerate(ids["annotations"]):
        if place.setdefault(question, i) != i:
            raise ValueError(
                f"{answers.pieces.path} has answers to question_id {short(question)} twice, annotations"
                f"[{place[question]}] and [{i}]: which are right?"
            )
    missing = [question for question in ids["questions"] if question not in place]
    if missing:
        raise ValueError(
            f"{len(missing)} of {len(ids['questions'])} questions in {path} have no answer in "
            f"{answers.pieces.path}, the first is question_id {missing[0]}: do the two files belong together?"
        )
    order = np.array([place[question] for question in ids["questions"]], np.int64)
    if image_name is None:
        image_name = f"COCO_{subtype[0]}_{{image_id:012d}}.jpg" if subtype else "{image_id}.jpg"
    reader = QuestionReader(questions, answers, order, RecordRows(folder, language, image_name))
    files = dict.fromkeys((path, answers.pieces.path))  # which may be one
    return Rows("vqa", f"{path}: VQA questions, {len(order):,} rows", len(order), reader, list(files))
