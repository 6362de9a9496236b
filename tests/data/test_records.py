"""What a record says becomes picture, prompt and answer."""

import csv
import re

import pytest
from samples import DIGITS, good, write_lines

from paligemma.data.check import check
from paligemma.data.options import open_rows
from paligemma.data.rows import RowError
from paligemma.train.batches import RowBatches


@pytest.mark.parametrize("record, prefix, suffix", [
    ({"prefix": "caption en", "suffix": ""}, "caption en", ""),
    ({"question": "who ?", "answer": "me"}, "answer en who ?", "me"),
    ({"question": "who ?", "answers": ["me", "you", "you", "me"]}, "answer en who ?", "me"),
    ({"question": "who ?", "answers": [{"answer": "x"}, {"answer": "y"}, {"answer": "y"}]}, "answer en who ?", "y"),
    ({"question": "who ?", "answers": ["x"], "multiple_choice_answer": "y"}, "answer en who ?", "y"),
    ({"caption": "a dog"}, "caption en", "a dog"),
    ({"text": ["a dog", "a hound"]}, "caption en", "a dog"),
])  # fmt: skip
def test_three_ways_to_say_it(folder, record, prefix, suffix):
    row = open_rows(write_lines(folder, {"image": "a.png", **record}))[0]
    assert (row.prefix, row.suffix) == (prefix, suffix)


@pytest.mark.parametrize("record, suffixes, answers", [
    ({"caption": ["one", "two", "three"]}, ("one", "two", "three"), ("one", "two", "three")),
    ({"question": "who ?", "answers": ["me", "you", "you"]}, ("me", "you", "you"), ("me", "you", "you")),
    ({"prefix": "x", "answers": [{"answer": "a"}, {"answer": "b"}]}, ("a", "b"), ("a", "b")),
    ({"question": "x", "answers": ["a", "b"], "multiple_choice_answer": "b"}, ("a", "b"), ("a", "b")),  # VQA's
    # an answer that is named is the only one that is learned
    ({"question": "who ?", "answer": "me", "answers": ["me", "you"]}, (), ("me", "you")),
    ({"prefix": "x", "suffix": "me", "answers": ["me", "you"]}, (), ("me", "you")),
    # what the picture reads is no caption of it
    ({"caption": "a street", "text": ["STOP", "GO"]}, (), ()),
    ({"caption": ["a street", "a road"], "answers": ["x"]}, ("a street", "a road"), ("a street", "a road")),
])  # fmt: skip
def test_of_several_answers_all_are_learned_and_all_are_right(folder, record, suffixes, answers):
    row = open_rows(write_lines(folder, {"image": "a.png", **record}))[0]
    assert (row.suffixes, row.answers) == (suffixes, answers)


def test_answers_in_a_cell_of_a_csv(folder):
    cells = ('["a","b"]', "a dog", "[a", '[{"answer": "x"}, {"answer": "y"}, {"answer": "y"}]')
    with open(folder / "x.csv", "w", newline="") as file:
        csv.writer(file).writerows([["image", "question", "answers"], *(["a.png", "who ?", cell] for cell in cells)])
    rows = open_rows(folder / "x.csv")
    assert [(row.suffix, row.answers) for row in rows] == [
        ("a", ("a", "b")), ("a dog", ()), ("[a", ()), ("y", ("x", "y", "y")),
    ]  # fmt: skip


def test_each_epoch_learns_another_caption(folder, processor):
    """In as many epochs as a row has captions each of them once; in one epoch, of as many rows, each once too. A batch
    stays a function of the step."""
    captions = ["one", "two", "three"]
    rows = open_rows(write_lines(folder, *[{"image": "a.png", "caption": captions}] * 3, good(suffix="always this")))
    decode, batches = processor.tokenizer.decode, RowBatches(rows, processor, batch_size=4, seed=5)

    def learned(step):
        batch = batches(step)
        return [decode(labels[labels != -100].tolist()[:-1]) for labels in batch["labels"]]

    epochs = [learned(step) for step in range(3)]
    assert [sorted(epoch) for epoch in epochs] == [sorted([*captions, "always this"])] * 3
    by_row = [[] for _ in rows]
    for step, epoch in enumerate(epochs):
        for place, suffix in enumerate(epoch):
            by_row[batches._row(4 * step + place)].append(suffix)
    assert [sorted(suffixes) for suffixes in by_row[:3]] == [sorted(captions)] * 3
    batches = RowBatches(rows, processor, batch_size=4, seed=5)
    assert [learned(step) for step in (2, 0, 1)] == [epochs[2], epochs[0], epochs[1]]


def test_each_of_several_answers_is_checked(folder, processor):
    path = write_lines(folder, *[{"image": "a.png", "caption": ["a dog", bad]} for bad in ("", "<eos>", "a dog " * 9)])
    report = check(open_rows(path), processor, max_length=20)
    assert report.counts == {"empty suffix": 1, "reserved token": 1, "suffix too long": 1}


@pytest.mark.parametrize("record, problem, words", [
    ({"image": "a.png", "prefix": "x"}, "missing key", "no suffix"),
    ({"image": "a.png", "suffix": "x"}, "missing key", "no prefix"),
    ({"image": "a.png", "question": "x"}, "missing key", "no suffix"),
    ({"prefix": "x", "suffix": "y"}, "missing key", "no image"),
    ({}, "missing key", "it has nothing"),
    (good(suffix=3), "wrong type", "the suffix is 3, expected text"),
    (good(prefix=["x"]), "wrong type", "the prefix is"),
    (good(image=3), "wrong type", "the image is 3"),
    (good(image=""), "wrong type", "the image is ''"),
    (good(image=["a.png", None]), "wrong type", "the image is None"),
    ({"image": "a.png", "question": "x", "answers": [1]}, "wrong type", "the suffix is [1]"),
])  # fmt: skip
def test_what_is_no_row_is_named(folder, record, problem, words):
    rows = open_rows(write_lines(folder, good(), record))
    with pytest.raises(RowError) as error:
        rows[1]
    assert error.value.problem == problem and words in str(error.value)
    assert str(error.value).startswith(f"{folder / 'my.jsonl'}:2: ")


def test_pictures_in_another_folder_and_under_other_names(folder, tmp_path_factory):
    other = tmp_path_factory.mktemp("other")
    path = write_lines(other, {"image_id": 7, "caption": "x"}, {"image_id": 7, "file_name": "b.png", "caption": "x"})
    rows = open_rows(path, images=folder, image_name="{image_id:03d}.png", language="de")
    assert (rows[0].image, rows[0].prefix) == (str(folder / "007.png"), "caption de")
    assert rows[1].image == str(folder / "b.png")
    with pytest.raises(RowError, match="'name'"):
        open_rows(path, image_name="{name}.png")[0]
    with pytest.raises(RowError, match="image_name"):
        open_rows(path)[0]


@pytest.mark.parametrize("name", ["{image_id:5}.jpg", "{image_id.x}.jpg", "{image_id[0]}.jpg", "{image_id:c}.jpg"])
def test_a_name_that_does_not_fit_a_row_is_its_problem(folder, name):
    records = [{"image_id": value, "caption": "x"} for value in ({}, None, [], 1 << 40)]
    report = check(open_rows(write_lines(folder, *records), image_name=name))
    assert report.rows == 4 and set(report.counts) <= {"missing key", "missing picture"}
    assert "my.jsonl:1: image_name" in str(report)


@pytest.mark.parametrize("name, words", [
    ("{image_id:1000000000}.jpg", "'1000000000' is no width; expected a number up to 255"),
    ("{image_id:.1000000000f}.jpg", "is no width"),
    ("{image_id:0000000001000000000d}.jpg", "is no width"),
    (f"{{image_id:{DIGITS}}}.jpg", "is no width"),
    ("{image_id:{width}}.jpg", "'{width}' is no width"),
    ("{image_id.jpg", "expected '}' before end of string; expected something like '{image_id:012d}.jpg'"),
])  # fmt: skip
def test_a_name_that_would_fill_the_memory_is_refused(folder, name, words):
    with pytest.raises(ValueError, match=re.escape(words)):
        open_rows(write_lines(folder, {"image_id": 1, "width": 10**9, "caption": "x"}), image_name=name)


# -- objects --

ONE = {"bbox": [0, 0, 20, 10], "category": "dog"}


def test_pictures_without_objects_are_left_out(folder):
    several = [{"bbox": [], "category": []}, [ONE], [], {"bbox": None, "category": None}, {}, {"bbox": [], "id": 7}]
    rows = open_rows(write_lines(folder, *[{"image": "a.png", "objects": objects} for objects in several]))
    assert [(row.prefix, row.number, row.source) for row in rows] == [("detect dog", 0, f"{folder / 'my.jsonl'}:2")]
    assert rows.note.endswith("1 rows (5 pictures without objects left out)") and check(rows).ok


def test_in_a_file_of_other_rows_a_picture_without_objects_is_named(folder):
    rows = open_rows(write_lines(folder, good(), {"image": "a.png", "objects": {"bbox": [], "category": []}}))
    report = check(rows)
    assert report.counts == {"missing key": 1} and "no object, and so no label to ask for" in str(report)


@pytest.mark.parametrize("objects", [["dog", "cat"], [], [None], {}, {"dog": 2}, {"bbox": None}, "dog", 3])
def test_objects_that_are_no_boxes_are_another_column(folder, objects):
    row = open_rows(write_lines(folder, {"image": "a.png", "caption": "a dog", "objects": objects}))[0]
    assert (row.prefix, row.suffix) == ("caption en", "a dog")


@pytest.mark.parametrize("objects, problem, words", [
    (["dog"], "box or mask", "objects[0] is 'dog', expected an object with bbox and category"),
    ([ONE, None], "box or mask", "objects[1] is None"),
    ([{}, ONE], "box or mask", "objects[0]: its box is None"),
    ([ONE, {"bbox": [0, 0, 9, 9]}], "missing key", "objects[1] has no category"),
    ({"bbox": [[0, 0, 9, 9]], "category": [None]}, "missing key", "objects[0] has no category"),
    ({"bbox": [[0, 0, 9, 9]], "category": [""]}, "missing key", "objects[0] has no category"),
    ({"bboxs": [[0, 0, 9, 9]], "kinds": ["dog"]}, "box or mask", "expected bbox and category, it has bboxs, kinds"),
    ({"bbox": [], "category": ["dog"]}, "box or mask", "as many boxes as labels"),
])  # fmt: skip
def test_objects_that_cannot_be_right(folder, objects, problem, words):
    records = [{"image": "a.png", "objects": one} for one in ([ONE], objects)]
    report = check(open_rows(write_lines(folder, *records)))
    assert report.rows == 2 and report.counts == {problem: 1} and words in str(report)
