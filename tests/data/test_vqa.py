"""VQA's questions and answers."""

import json

import pytest

from paligemma.data.options import open_rows


def test_vqa_questions_and_annotations(folder):
    questions = {
        "data_subtype": "val2014",
        "questions": [
            {"image_id": 42, "question": "what is it ?", "question_id": 420},
            {"image_id": 7, "question": "is it red ?", "question_id": 70},
        ],
    }
    answers = {
        "annotations": [
            {"question_id": 70, "answers": [{"answer": a, "answer_id": 1} for a in ("no", "yes", "yes")]},
            {"question_id": 420, "multiple_choice_answer": "dog", "answers": [{"answer": "cat"}]},
        ]
    }
    (folder / "q.json").write_text(json.dumps(questions))
    (folder / "a.json").write_text(json.dumps(answers))
    rows = open_rows(folder / "q.json", annotations=folder / "a.json")
    assert rows.kind == "vqa"
    assert [(row.image, row.prefix, row.suffix) for row in rows] == [
        (str(folder / "COCO_val2014_000000000042.jpg"), "answer en what is it ?", "dog"),
        (str(folder / "COCO_val2014_000000000007.jpg"), "answer en is it red ?", "yes"),
    ]
    assert [row.suffixes for row in rows] == [row.answers for row in rows] == [("cat",), ("no", "yes", "yes")]
    with pytest.raises(ValueError, match="questions without answers: name the file"):
        open_rows(folder / "q.json")
    for questions["questions"][1]["question_id"] in ([1], {}, None):
        (folder / "c.json").write_text(json.dumps(questions))
        with pytest.raises(ValueError, match=r"c\.json questions\[1\] has no question_id.* expected a number or text"):
            open_rows(folder / "c.json", annotations=folder / "a.json")
    answers["annotations"][0]["question_id"] = [1]
    (folder / "b.json").write_text(json.dumps(answers))
    with pytest.raises(ValueError, match=r"b\.json annotations\[0\] has no question_id"):
        open_rows(folder / "q.json", annotations=folder / "b.json")
    answers["annotations"][0]["question_id"] = 70
    answers["annotations"].append(answers["annotations"][0])
    (folder / "b.json").write_text(json.dumps(answers))
    with pytest.raises(ValueError, match=r"b\.json has answers to question_id 70 twice, annotations\[0\] and \[2\]"):
        open_rows(folder / "q.json", annotations=folder / "b.json")
    del answers["annotations"][1:]
    (folder / "b.json").write_text(json.dumps(answers))
    with pytest.raises(ValueError, match=r"1 of 2 questions .* the first is question_id 420"):
        open_rows(folder / "q.json", annotations=folder / "b.json")
