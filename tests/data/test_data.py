"""Training data: reading it row by row, finding what is wrong with it, showing what the model will see."""

import csv
import io
import json
import pickle
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from make_tokenizer import build_tokenizer
from PIL import Image, ImageDraw
from work_count import lines_run

import paligemma
import paligemma.cli.main
import paligemma.utils
from paligemma.answers.mask_codec import MaskCodec
from paligemma.data import json_documents, text_files
from paligemma.data.check import PROBLEMS, check
from paligemma.data.checkpoint import processor_of
from paligemma.data.folders import in_folder, splits_of
from paligemma.data.json_documents import JsonFile
from paligemma.data.masks import fill, mask_of, unpacked
from paligemma.data.options import open_rows
from paligemma.data.rows import Row, RowError, Rows, short
from paligemma.data.show import COLORS, _chips, show, show_rows
from paligemma.data.text_files import CsvFile, JsonLines
from paligemma.train.batches import RowBatches
from paligemma.train.run_folder import fingerprint_of_data


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def processor(tmp_path_factory):
    tokenizer = paligemma.load_tokenizer(build_tokenizer(tmp_path_factory.mktemp("tokenizer")))
    return paligemma.PaliGemmaProcessor(tokenizer, num_image_tokens=4, image_size=28)


@pytest.fixture
def folder(tmp_path):
    for name in ("a.png", "b.png"):
        Image.new("RGB", (40, 20), "red").save(tmp_path / name)
    return tmp_path


def write_lines(folder, *records, name="my.jsonl"):
    text = "".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in records)
    (folder / name).write_text(text, encoding="utf-8")
    return folder / name


def good(**changes):
    return {"image": "a.png", "prefix": "answer en what is it ?", "suffix": "a dog", **changes}


# ------------------------------------------------------------------------------------------------------- JSON lines

texts = st.text(st.characters(codec="utf-8"), max_size=12)
records = st.dictionaries(texts, texts | st.integers() | st.none(), max_size=3)
blank = st.sampled_from(["", " ", "\t ", "  \x0b", "\x0c"])


@settings(deadline=None, max_examples=60)
@given(
    st.lists(records | blank, max_size=8),
    st.sampled_from(["\n", "\r\n"]),
    st.booleans(),
    st.booleans(),
    st.booleans(),
    st.integers(1, 40),
)
def test_every_line_is_found_again(tmp_path_factory, lines, newline, last_newline, bom, ascii_only, block):
    """Any text, line breaks of both kinds, blank lines anywhere, with and without an end, however it is read."""
    path = tmp_path_factory.getbasetemp() / "x.jsonl"
    written = [line if isinstance(line, str) else json.dumps(line, ensure_ascii=ascii_only) for line in lines]
    content = newline.join(written) + (newline if last_newline and lines else "")
    path.write_bytes(bom * text_files.BOM + content.encode("utf-8"))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(text_files, "BLOCK", block)
        file = JsonLines(path)
        expected = [(number, line) for number, line in enumerate(lines, 1) if not isinstance(line, str)]
        assert len(file) == len(expected)
        forwards = [file[i] for i in range(len(file))]
        backwards = [file[i] for i in reversed(range(len(file)))]
    assert forwards == backwards[::-1] == [line for _, line in expected]
    assert [file.where(i) for i in range(len(file))] == [f"{path}:{number}" for number, _ in expected]


def test_a_broken_line_is_named_and_the_others_can_be_read(tmp_path):
    path = tmp_path / "my.jsonl"
    path.write_bytes(b'{"a": 1}\n\n{"a": 2\n[1]\n{"a": "\xff"}\n' + b"[" * 100_000 + b'\n{"a": 3}')
    file = JsonLines(path)
    assert file[0] == {"a": 1} and file[5] == {"a": 3} and len(file) == 6
    for i, line, problem, words in (
        (1, 3, "not JSON", "at character 8"),
        (2, 4, "not JSON", "got list"),
        (3, 5, "not UTF-8", "byte 8 is not UTF-8 (0xff)"),
        (4, 6, "not JSON", "nested too deeply"),
    ):
        with pytest.raises(RowError) as error:
            file[i]
        assert (error.value.where, error.value.problem) == (f"{path}:{line}", problem)
        assert words in str(error.value) and str(error.value).startswith(f"{path}:{line}: ")
        assert str(pickle.loads(pickle.dumps(error.value))) == str(error.value)
    with pytest.raises(IndexError):
        file[6]


DIGITS = "9" * 5000  # Python makes a number of 4,300 at most


def test_a_number_of_too_many_digits_is_the_problem_of_its_row_alone(folder):
    fine, bad = json.dumps(good()), f'{{"image": "a.png", "caption": "süß", "id": 5, "area": {DIGITS}}}'
    as_lines, as_list = folder / "x.txt", folder / "x.json"
    for place, lines in enumerate(([bad, fine], [fine, bad, fine])):  # first too, by which the kind is known
        as_lines.write_text("\n".join(lines))
        as_list.write_text(f"[{','.join(lines)}]")
        for path, where in ((as_lines, f"{as_lines}:{place + 1}"), (as_list, f"{as_list} row[{place}]")):
            report = check(open_rows(path))
            assert report.counts == {"not JSON": 1} and report.rows == len(lines)
            assert f"{where}: not JSON that can be read: a number of thousands of digits" in str(report)


@pytest.mark.parametrize("block", [1, 100, 1 << 16])
def test_such_a_number_is_passed_over_wherever_a_window_ends(tmp_path, monkeypatch, block):
    monkeypatch.setattr(json_documents, "BLOCK", block)
    (tmp_path / "x.json").write_text(f'{{"a": [1, {DIGITS}, {{"b": -{DIGITS}, "id": 5, "é": 1}}, 2], "c": {DIGITS}}}')
    seen = []
    file = JsonFile(tmp_path / "x.json", lambda key, element: seen.append(element))
    assert seen == [1, DIGITS, {"b": "-" + DIGITS, "id": 5, "é": 1}, 2, DIGITS], "its siblings are numbers"
    assert (file.element("a", 0), file.element("a", 3)) == (1, 2)
    with pytest.raises(RowError, match=r"x\.json a\[1\]: not JSON that can be read"):
        file.element("a", 1)


def test_a_first_line_that_is_nested_too_deeply_is_a_broken_row(folder):
    path = write_lines(folder, "{" + '"a":{' * 100_000, good())
    report = check(open_rows(path))
    assert report.counts == {"not JSON": 1} and f"{path}:1: " in str(report) and "nested too deeply" in str(report)
    with pytest.raises(ValueError, match=r"no-name is not JSON: nested too deeply at byte 6"):
        open_rows(path.rename(folder / "no-name"))


def test_a_file_that_changes_is_not_read_at_old_places(tmp_path):
    path = write_lines(tmp_path, *[good(suffix="x" * 50_000) for _ in range(4)])
    rows = open_rows(path)
    assert len(rows[0].suffix) == 50_000
    write_lines(tmp_path, *[good() for _ in range(4)])
    with pytest.raises(OSError, match="changed after it was opened"):
        rows[3]


def test_rows_go_through_pickle(folder):
    """Which they need for nothing here: it is for those who load them in processes of their own."""
    rows = open_rows(write_lines(folder, good(), good(suffix="a cat")))
    again = pickle.loads(pickle.dumps(rows))
    assert again[1] == rows[1] and again.note == rows.note


def test_a_row_says_where_it_stands(folder):
    rows = open_rows(write_lines(folder, good(), "", good(image=["a.png", "b.png"], suffix="two"), good(image=None)))
    a, b = str(folder / "a.png"), str(folder / "b.png")
    source = str(folder / "my.jsonl")
    assert rows[0] == Row(a, "answer en what is it ?", "a dog", 0, source + ":1")
    assert rows[1] == Row((a, b), "answer en what is it ?", "two", 1, source + ":3")
    assert rows[-1].image is None and rows[-1].pictures == ()
    assert rows.kind == "jsonl" and rows.note == f"{source}: JSON lines, 3 rows"
    assert [row.number for row in rows] == [row.number for row in rows[:]] == [0, 1, 2]


def test_rows_feed_training(folder, processor):
    """Batches take them as they are, a picture of several rows once; the order depends on seed and step alone."""
    path = write_lines(folder, *[good(suffix=str(i)) for i in range(8)])
    first, second = (RowBatches(open_rows(path), processor, batch_size=4, seed=1) for _ in range(2))
    batch = first(step=1)
    assert batch["pixel_values"].shape == (1, 3, 28, 28) and batch["pictures"].tolist() == [0, 0, 0, 0]
    assert torch.equal(batch["input_ids"], second(step=1)["input_ids"])
    halves = [second(step=1, part=part, parts=2)["input_ids"] for part in range(2)]
    assert torch.equal(torch.cat(halves), batch["input_ids"])


# --------------------------------------------------------------------------------------------------- JSON documents

values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=6,
)


@settings(deadline=None, max_examples=60)
@given(
    st.dictionaries(texts, values | st.lists(values, max_size=5), max_size=4) | st.lists(values, max_size=5),
    st.sampled_from([None, 1]),
    st.booleans(),
    st.booleans(),
)
def test_every_element_of_a_document_is_found_again(tmp_path_factory, document, indent, ascii_only, bom):
    path = tmp_path_factory.getbasetemp() / "x.json"
    text = json.dumps(document, indent=indent, ensure_ascii=ascii_only)
    path.write_bytes(bom * text_files.BOM + text.encode("utf-8"))
    seen = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_documents, "BLOCK", 1)  # windows of sixteen bytes: elements are cut everywhere
        file = JsonFile(path, lambda key, element: seen.setdefault(key, []).append(element))
    arrays = {"": document} if isinstance(document, list) else document
    expected = {key: value if isinstance(value, list) else [value] for key, value in arrays.items()}
    assert seen == {key: value for key, value in expected.items() if value}
    assert {key: [file.element(key, i) for i in range(file.count(key))] for key in file.spans} == expected


@pytest.mark.parametrize("text, words", [
    ('{"a": [1, 2', "expected , or ], found its end"),
    ('{"a": [1 2]}', "expected , or ], found 2 at byte 10"),
    ('{"a": [nope]}', "Expecting value at byte 8"),
    ('{"a": ["x]}', "Unterminated string"),
    ('{"a" 1}', "expected :, found 1 at byte 6"),
    ('{"a": 1} {"b": 2}', "more than one document at byte 10"),
    ("[" * 100_000, "nested too deeply"),
    ('{"a": [' + '"x", ' * 50_000 + "nope]}", "Expecting value at byte 250008"),
])  # fmt: skip
def test_a_broken_document_is_refused_with_the_place(tmp_path, text, words):
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(ValueError, match="is not JSON") as error:
        JsonFile(tmp_path / "x.json")
    assert words in str(error.value)


def test_a_list_of_records(folder):
    table = [good(), {"image": "b.png", "question": "where ?", "answers": ["here", "there", "there"]}, 3]
    for document in (table, {"data": table, "version": 1}):
        (folder / "x.json").write_text(json.dumps(document, indent=2))
        rows = open_rows(folder / "x.json")
        assert (rows.kind, len(rows)) == ("json", 3)
        assert (rows[1].image, rows[1].prefix, rows[1].suffix) == (
            str(folder / "b.png"), "answer en where ?", "there",
        )  # fmt: skip
        with pytest.raises(RowError, match=r"\[2\]: expected an object, got 3"):
            rows[2]


# -------------------------------------------------------------------------------------------------- forms of records


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


# -------------------------------------------------------------------------------------------------------------- CSV

cells = st.text(st.characters(codec="utf-8", exclude_characters="\r\0"), max_size=8)


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.tuples(cells, cells, cells), min_size=1, max_size=6),
    st.sampled_from(",;\t"),
    st.sampled_from(["\n", "\r\n"]),
    st.booleans(),
)
def test_every_record_of_a_csv_is_found_again(tmp_path_factory, table, delimiter, newline, bom):
    """Quoted cells with separators, quotes and line breaks included."""
    path = tmp_path_factory.getbasetemp() / "x.csv"
    text = io.StringIO()
    writer = csv.writer(text, delimiter=delimiter, lineterminator=newline, quoting=csv.QUOTE_ALL)
    writer.writerows([("image", "prefix", "suffix"), *table])
    path.write_bytes(bom * text_files.BOM + text.getvalue().encode("utf-8"))
    file = CsvFile(path)
    read = [tuple(file[i].values()) for i in reversed(range(len(file)))]
    assert read[::-1] == table and list(file[0]) == ["image", "prefix", "suffix"]


def test_a_cell_of_a_csv_may_hold_what_unicode_calls_a_line_break(tmp_path):
    (tmp_path / "x.csv").write_text("image,prefix,suffix\na.png,ocr,one\u2028two\x0bthree\x85four\nb.png,ocr,STOP\n")
    assert [row.suffix for row in open_rows(tmp_path / "x.csv")] == ["one\u2028two\x0bthree\x85four", "STOP"]


def test_a_folder_with_a_csv(folder):
    (folder / "list.csv").write_text('image,caption\na.png,"a dog,\nasleep"\nb.png\n')
    rows = open_rows(folder)
    assert (rows.kind, rows[0].image, rows[0].suffix) == ("csv", str(folder / "a.png"), "a dog,\nasleep")
    with pytest.raises(RowError, match=r"list.csv:4: 1 cells, but the header has 2"):
        rows[1]
    (folder / "second.csv").write_text("image,prefix,suffix\n")
    with pytest.raises(ValueError, match=r"2 files that could be meant \(list.csv, second.csv\): name one"):
        open_rows(folder)
    assert len(open_rows(folder / "second.csv")) == 0


# ------------------------------------------------------------------------------------------------------------- COCO

COCO = {
    "info": {"year": 2024},
    "images": [
        {"id": 30, "file_name": "a.png", "width": 40, "height": 20},
        {"id": 10, "file_name": "b.png", "width": 40, "height": 20},
        {"id": 20, "file_name": "none.png", "width": 40, "height": 20},
    ],
    "annotations": [
        {"id": 1, "image_id": 10, "category_id": 2, "bbox": [20, 5, 10, 10], "iscrowd": 0},
        {"id": 2, "image_id": 30, "category_id": 1, "bbox": [0, 0, 40, 20], "iscrowd": 1},
        {"id": 3, "image_id": 10, "category_id": 1, "bbox": [10, 0, 20, 20]},
        {"id": 4, "image_id": 10, "category_id": 1, "bbox": [0, 0, 20, 10]},
        {"id": 5, "image_id": 30, "category_id": 2, "bbox": [30, 10, 10, 10]},
    ],
    "categories": [{"id": 2, "name": "cat"}, {"id": 1, "name": "dog"}, {"id": 9, "name": "süß"}],
}


def write_coco(folder, name="coco.json", **changes):
    text = json.dumps({**COCO, **changes}, ensure_ascii=False)
    (folder / name).write_bytes(text.encode("utf-8", "surrogatepass"))  # halves of characters too
    return folder / name


def test_coco_boxes(folder):
    rows = open_rows(write_coco(folder))
    assert rows.kind == "coco-detect"
    assert rows.note.endswith("COCO boxes, 2 rows (1 pictures without objects and 1 crowds left out)")
    assert rows[0].prefix == "detect cat" and rows[0].suffix == "<loc0512><loc0768><loc1023><loc1023> cat"
    # labels in the order of the categories, the boxes of one from left to right
    assert rows[1].prefix == "detect cat ; dog"
    assert rows[1].suffix == (
        "<loc0256><loc0512><loc0768><loc0768> cat ; "
        "<loc0000><loc0000><loc0512><loc0512> dog ; <loc0000><loc0256><loc1023><loc0768> dog"
    )
    assert (rows[1].image, rows[1].size) == (str(folder / "b.png"), (40, 20))
    assert rows[1].boxes == ((20, 5, 30, 15), (0, 0, 20, 10), (10, 0, 30, 20))
    assert rows[1].source == f"{folder / 'coco.json'} images[1] (id 10)"
    assert check(rows).ok


def test_coco_boxes_asked_for_by_every_label(folder):
    rows = open_rows(write_coco(folder), every_label=True)
    assert [row.prefix for row in rows] == ["detect cat ; dog ; süß"] * 3
    assert rows[2].suffix == ""
    report = check(rows)
    assert report.counts == {"missing picture": 1}, "an empty answer is right where nothing is to be found"


def test_coco_at_the_other_scale(folder):
    assert open_rows(write_coco(folder), loc_scale=1023)[0].suffix == "<loc0512><loc0767><loc1023><loc1023> cat"


@pytest.mark.parametrize("changes, words", [
    ({"annotations": [{"image_id": 99, "category_id": 1, "bbox": [0, 0, 1, 1]}] * 3},
     "3 of 3 annotations have an unknown image_id, the first is annotations\\[0\\] with 99: add it to 'images'"),
    ({"annotations": [{"image_id": 10, "category_id": 7, "bbox": [0, 0, 1, 1]}]},
     "1 of 1 annotations have an unknown category_id, the first is annotations\\[0\\] with 7: add it to 'categories'"),
    ({"annotations": [{"category_id": 7, "bbox": [0, 0, 1, 1]}]}, "annotations\\[0\\] has no 'image_id'"),
    ({"annotations": [{"image_id": [1], "category_id": 1}]}, "no 'image_id': expected a number or text, got \\[1\\]"),
    ({"annotations": [{"image_id": 10, "category_id": {}}]}, "coco.json annotations\\[0\\] has no 'category_id'"),
    ({"annotations": [[1]]}, "annotations\\[0\\]: expected an object, got \\[1\\]"),
    ({"images": [{"file_name": "a.png"}]}, "images\\[0\\] has no 'id'"),
    ({"images": [{"id": {}}]}, "coco.json images\\[0\\] has no 'id'"),
    ({"categories": [{"id": 1, "name": "dog"}, {"id": [2], "name": "cat"}]}, "categories\\[1\\] has no 'id'"),
    ({"categories": [{"id": 1}]}, "categories\\[0\\] has no 'name'"),
    ({"images": COCO["images"] * 2}, "several pictures with the same id"),
])  # fmt: skip
def test_a_coco_file_that_does_not_fit_together(folder, changes, words):
    with pytest.raises(ValueError, match=words):
        open_rows(write_coco(folder, **changes))


@pytest.mark.parametrize("annotation, category, problem", [
    ({"bbox": [50, 0, 10, 10]}, "dog", "box or mask"),  # wholly outside
    ({"bbox": [10, 0, 30, 25]}, "dog", "box outside"),  # in part, at each side
    ({"bbox": [10, 0, 35, 20]}, "dog", "box outside"),
    ({"bbox": [-5, 0, 35, 20]}, "dog", "box outside"),
    ({"bbox": [0, -5, 35, 20]}, "dog", "box outside"),
    ({"bbox": [0, 0, 10, 10]}, "dog; small", "label with ;"),
    ({"bbox": [0, 0, -5, 10]}, "dog", "box or mask"),
    ({"bbox": [0, 0, 10]}, "dog", "box or mask"),
    ({}, "dog", "box or mask"),
    ({"bbox": [0, 0, float("inf"), 10]}, "dog", "box or mask"),
    ({"bbox": [0, 0, float("nan"), 10]}, "dog", "box or mask"),
    ({"bbox": [0, 0, 10**400, 10]}, "dog", "box or mask"),
    ({"bbox": 3}, "dog", "box or mask"),
    ({"bbox": []}, "dog", "box or mask"),
    ({"bbox": [0, 0, 10, 10]}, "half \ud83d", "half a character"),
])  # fmt: skip
def test_coco_rows_that_cannot_be_right(folder, annotation, category, problem):
    path = write_coco(
        folder,
        annotations=[{"image_id": 30, "category_id": 1, **annotation}, COCO["annotations"][0]],
        categories=[{"id": 1, "name": category}, {"id": 2, "name": "cat"}],
    )
    report = check(open_rows(path))
    assert report.counts == {problem: 1}
    assert report.first[problem][0].source == f"{path} images[0] (id 30)"
    assert report.bad_rows == 1 and report.rows == 2


def test_a_coco_annotation_with_such_a_number_belongs_to_its_picture(folder):
    path = write_coco(folder)
    path.write_text(path.read_text().replace('"id": 5,', f'"id": 5, "area": {DIGITS},'))
    report = check(open_rows(path))
    assert report.counts == {"not JSON": 1} and report.rows == 2
    assert report.first["not JSON"][0].source == f"{path} annotations[4]"


@pytest.mark.parametrize("width, height", [(20_000, 20_000), (1e9, 20), (1 << 26, 20), (10**400, 20)])
def test_a_coco_picture_larger_than_can_be_opened_is_its_rows_problem(folder, width, height):
    image = {**COCO["images"][0], "width": width, "height": height}
    path = write_coco(folder, images=[image, *COCO["images"][1:]])
    report = check(open_rows(path))
    assert report.counts == {"unreadable picture": 1} and report.rows == 2
    (found,) = report.first["unreadable picture"]
    assert found.source == f"{path} images[0] (id 30)"
    assert found.message == (
        f"width and height are {short(width)} x {height}: more pixels than a picture that can be opened "
        "has; expected 268,435,456 at most: correct them, or make the picture smaller"
    )


@pytest.mark.parametrize("width", [float("inf"), float("nan"), 0, None, "40"])
def test_a_coco_picture_without_a_size_is_its_rows_problem(folder, width):
    path = write_coco(folder, images=[{**COCO["images"][0], "width": width}, *COCO["images"][1:]])
    report = check(open_rows(path))
    assert report.counts == {"missing key": 1} and report.rows == 2
    (found,) = report.first["missing key"]
    assert found.source == f"{path} images[0] (id 30)"
    assert found.message == f"boxes need the picture's width and height, got {short(width)} x 20"


def test_a_pixel_beyond_the_border_is_rounding(folder):
    path = write_coco(folder, annotations=[{"image_id": 30, "category_id": 1, "bbox": [-0.5, 0, 41, 20.5]}])
    assert check(open_rows(path)).ok


def test_coco_captions(folder):
    captions = [{"image_id": 10, "caption": "a dog \n"}, {"image_id": 30, "caption": "ein Hund"}, {"image_id": 10}]
    path = write_coco(folder, annotations=captions)
    rows = open_rows(path, language="de")
    assert (rows.kind, len(rows)) == ("coco-captions", 3)
    assert (rows[0].image, rows[0].prefix, rows[0].suffix) == (str(folder / "b.png"), "caption de", "a dog")
    assert rows[1].image == str(folder / "a.png")
    assert check(rows).counts == {"missing key": 1}


# ------------------------------------------------------------------------------------------------------------ masks


def test_coco_masks_become_the_codes_of_the_mask(folder):
    codec = MaskCodec(embedding_dim=8, encoder_widths=(4, 4, 4, 4), decoder_widths=(4, 4, 4, 4, 4)).eval()
    square = [[10, 5, 30, 5, 30, 15, 10, 15]]
    runs = {"size": [20, 40], "counts": [0, 800]}
    path = write_coco(
        folder,
        annotations=[
            {"image_id": 30, "category_id": 1, "bbox": [10, 5, 20, 10], "segmentation": square},
            {"image_id": 10, "category_id": 1, "segmentation": runs},  # without a box: that of the mask
            {"image_id": 20, "category_id": 1, "bbox": [0, 0, 5, 5], "segmentation": {"size": [5, 5], "counts": [25]}},
        ],
    )
    rows = open_rows(path, "coco-segment", codec=codec)
    codes = "".join(f"<seg{code:03d}>" for code in codec.encode(torch.ones(1, 64, 64))[0].tolist())
    assert rows[0].prefix == "segment dog"
    assert rows[0].suffix == f"<loc0256><loc0256><loc0768><loc0768>{codes} dog"
    assert rows[1].suffix == f"<loc0000><loc0000><loc1023><loc1023>{codes} dog"
    with pytest.raises(RowError, match=r"annotations\[2\]: its mask is \[5, 5\], the picture \[20, 40\]"):
        rows[2]
    codec.save(folder / "codec.npz")
    assert open_rows(path, "coco-segment", codec=folder / "codec.npz")[0] == rows[0]
    with pytest.raises(ValueError, match=r"masks need a codec .*: --model NAME \(tiny has its own\); in Python"):
        open_rows(path, "coco-segment")


def test_a_polygon_is_the_pixels_whose_centre_lies_inside():
    assert fill(np.array([(1, 1), (4, 1), (4, 3), (1, 3)]), (6, 4)).astype(int).tolist() == [
        [0, 0, 0, 0, 0, 0],
        [0, 1, 1, 1, 0, 0],
        [0, 1, 1, 1, 0, 0],
        [0, 0, 0, 0, 0, 0],
    ]
    assert fill(np.array([(-5, -5), (50, -5), (50, 50), (-5, 50)]), (6, 4)).all(), "cut off at the border"
    two = mask_of([[0, 0, 1, 0, 1, 4, 0, 4], [5, 0, 6, 0, 6, 4, 5, 4]], (6, 4))
    assert two.sum(0).tolist() == [4, 0, 0, 0, 0, 4]


@pytest.mark.parametrize("corner", [float("inf"), float("nan"), 1e308, "x", None])
def test_a_polygon_without_end_is_refused(corner):
    with pytest.raises((ValueError, TypeError)):
        mask_of([[0, 0, 1, 0, 1, corner]], (6, 4))


def test_masks_agree_with_cocos_own_tool():
    tool = pytest.importorskip("faster_coco_eval.core.mask")
    random = np.random.default_rng(0)
    differing = 0
    for _ in range(50):
        angles = np.sort(random.uniform(0, 2 * np.pi, 12))
        points = np.stack([60 + 50 * random.uniform(0.3, 1, 12) * np.cos(angles), 50 + 60 * np.sin(angles)], 1)
        packed = tool.merge(tool.frPyObjects([points.flatten().tolist()], 100, 120))
        theirs = tool.decode(packed).astype(bool)
        ours = mask_of([points.flatten().tolist()], (120, 100))
        differing += (ours != theirs).sum() / theirs.sum()
        assert (ours & theirs).sum() / (ours | theirs).sum() > 0.95
        text = packed["counts"].decode() if isinstance(packed["counts"], bytes) else packed["counts"]
        assert np.array_equal(mask_of({"size": [100, 120], "counts": text}, (120, 100)), theirs)
    assert differing / 50 < 0.02


def test_packed_run_lengths():
    """Worked by hand: 5 bits a character over "0", bit 6 says that more follow, from the third on differences."""
    assert unpacked("0") == [0]
    assert unpacked("5") == [5]
    assert unpacked("P1") == [32]  # 0 + more, then 1 * 32
    assert unpacked("352O") == [3, 5, 2, 5 - 1]  # the third still plain, the fourth -1 from the second
    with pytest.raises(ValueError, match="packed mask contains"):
        unpacked("a b")


# -------------------------------------------------------------------------------------------------------------- VQA


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
    answers["annotations"].pop()
    (folder / "b.json").write_text(json.dumps(answers))
    with pytest.raises(ValueError, match=r"1 of 2 questions .* the first is question_id 420"):
        open_rows(folder / "q.json", annotations=folder / "b.json")


# ------------------------------------------------------------------------------------------------ parquet and Arrow


def test_parquet_and_arrow(folder):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")

    data = (folder / "a.png").read_bytes()
    table = pyarrow.table(
        {
            "image": [{"bytes": data, "path": None}, {"bytes": None, "path": "b.png"}] * 3,
            "prefix": ["caption en"] * 6,
            "suffix": [str(i) for i in range(6)],
        }
    )
    (folder / "data").mkdir()
    for k in range(2):
        name = folder / "data" / f"train-0000{k}-of-00002.parquet"
        parquet.write_table(table.slice(3 * k, 3), name, row_group_size=2)
    parquet.write_table(table.slice(0, 1), folder / "data" / "test-00000-of-00001.parquet")
    with pytest.raises(ValueError, match="has the splits test, train: choose one"):
        open_rows(folder)
    rows = open_rows(folder, split="train", images=folder)
    assert (rows.kind, len(rows)) == ("parquet", 6)
    again = pickle.loads(pickle.dumps(rows))
    for i in (5, 0, 3, 2, 4, 1):
        assert rows[i].suffix == again[i].suffix == str(i)
        assert rows[i].image == (data if i % 2 == 0 else str(folder / "b.png"))
    assert rows[4].source.endswith("train-00001-of-00002.parquet row 1")
    assert check(rows, open_pictures=True).ok

    saved = folder / "saved"
    saved.mkdir()
    with pyarrow.ipc.new_stream(str(saved / "data-00000-of-00001.arrow"), table.schema) as stream:
        stream.write_table(table, max_chunksize=2)
    (saved / "state.json").write_text(json.dumps({"_data_files": [{"filename": "data-00000-of-00001.arrow"}]}))
    rows = open_rows(saved, images=folder)
    assert (rows.kind, [row.suffix for row in rows]) == ("arrow", list("012345"))


def test_a_text_in_parquet_that_is_not_utf8_is_its_rows_problem(folder):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    ends = pyarrow.py_buffer(np.array([0, 2, 4], np.int32).tobytes())
    captions = pyarrow.StringArray.from_buffers(2, ends, pyarrow.py_buffer(b"okb\xff"))
    parquet.write_table(pyarrow.table({"image": ["a.png"] * 2, "caption": captions}), folder / "x.parquet")
    report = check(open_rows(folder / "x.parquet"))
    assert report.counts == {"not UTF-8": 1} and report.first["not UTF-8"][0].source.endswith("x.parquet row 1")


def test_without_pyarrow_the_error_says_what_to_install(folder, monkeypatch):
    (folder / "x.parquet").write_bytes(b"PAR1....")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ImportError, match="pip install pyarrow"):
        open_rows(folder / "x.parquet")


# ----------------------------------------------------------------------------------------------------------- splits


def put(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"PAR1")


def files_of(folder, split=None):
    """Which files are read, without reading them."""
    return [file.relative_to(folder).as_posix() for file in in_folder(folder, None, split)[1]]


@pytest.mark.parametrize("train, test, split", [
    (["train.parquet"], ["test.parquet"], "train"),
    (["train/0000.parquet", "train/0001.parquet"], ["test/0000.parquet"], "train"),  # how the Hub converts
    (["default/train/0000.parquet"], ["default/test/0000.parquet"], "train"),
    (["data/train-00000-of-00002.parquet", "data/train-00001-of-00002.parquet"],
     ["data/train_extra-00000-of-00001.parquet"], "train"),
    (["train-00000-of-00001-0123456789abcdef.parquet"], ["test-00000-of-00001-0123456789abcdef.parquet"], "train"),
    (["train.parquet/part-00000-c000.snappy.parquet", "train.parquet/part-00001-c000.snappy.parquet"],
     ["test.parquet/part-00000-c000.snappy.parquet"], "train"),  # Spark's folders
    (["train-001.parquet", "train-002.parquet"], ["test-001.parquet"], "train"),
    (["train_0.parquet", "train_1.parquet"], ["test_0.parquet", "test_1.parquet"], "train"),
    (["train.0.parquet", "train.1.parquet"], ["test.0.parquet"], "train"),
    (["train-000/x_0.parquet", "train-001/x_1.parquet"], ["test-000/x_0.parquet"], "train"),
    (["coco-2017-train.parquet"], ["coco-2017-val.parquet"], "coco-2017-train"),
    (["en/train-00000-of-00001.parquet"], ["en/test-00000-of-00001.parquet"], "train"),
    (["train.jsonl"], ["train_extra.jsonl", "constrained.jsonl"], "train"),
    (["train.csv"], ["test.csv"], "train"),
    (["train.jsonl"], ["labels.csv"], "train"),  # not the CSV because it is one
    (["captions_val2014.json"], ["captions_train2014.json"], "captions_val2014"),
])  # fmt: skip
def test_a_split_is_its_own_files_and_no_other(tmp_path, train, test, split):
    put(tmp_path, *train, *test)
    assert files_of(tmp_path, split) == train


@pytest.mark.parametrize("files, split, words", [
    (["train.parquet", "test.parquet"], None, "has the splits test, train: choose one with split= (--split)"),
    (["train/0000.parquet", "test/0000.parquet"], None, "has the splits test, train: choose"),
    (["data/train-00000-of-00001.parquet", "data/test-00000-of-00001.parquet"], None, "has the splits test, train:"),
    (["train_0.parquet", "train_1.parquet", "test_0.parquet"], None, "has the splits test, train: choose"),
    (["train.0.parquet", "test.0.parquet"], None, "has the splits test, train: choose"),
    (["train/0000.parquet"], "test", "has no split 'test'; it has train: choose one of these"),
    (["train.jsonl"], "test", "has no split 'test'; it has train"),
    (["train.jsonl", "val.csv"], "test", "has no split 'test'; it has val, train"),
    (["0000.parquet"], "test", "has no split 'test'; it has (numbers alone)"),
    # both languages have one
    (["de/train-00000-of-00001.parquet", "en/train-00000-of-00001.parquet"], "train", "the splits de/train, en/train"),
    # a language is no split
    (["en/test-00000-of-00001.parquet", "en/train-00000-of-00001.parquet"], "en", "the splits en/test, en/train"),
    (["train-00000.csv", "train-00001.csv"], "train", "2 files that could be meant"),
])  # fmt: skip
def test_splits_are_never_mixed_nor_ignored(tmp_path, files, split, words):
    put(tmp_path, *files)
    with pytest.raises(ValueError, match=re.escape(words)):
        open_rows(tmp_path, split=split)


SHARDS = [
    ["0000.parquet", "0001.parquet"],
    ["part-00000-c000.parquet", "part-00001-c000.parquet"],  # Spark
    ["year=2020/part-00000-c0.snappy.parquet", "year=2021/part-00000-c0.snappy.parquet"],  # Spark's partitionBy, Hive
    ["name-00000.parquet", "name-00001.parquet"],
    ["name-001.parquet", "name-002.parquet"],
    ["part.0.parquet", "part.1.parquet", "part.10.parquet", *(f"part.{i}.parquet" for i in range(2, 10))],  # dask
    ["data_0.parquet", "data_1.parquet"],  # DuckDB
    ["name-000000000000.parquet", "name-000000000001.parquet"],  # BigQuery
    ["data/chunk-000/episode_000000.parquet", "data/chunk-000/episode_000001.parquet",
     "data/chunk-001/episode_000002.parquet"],  # LeRobot
]  # fmt: skip


@pytest.mark.parametrize("files", SHARDS)
def test_files_of_one_split_need_no_choice(tmp_path, files):
    put(tmp_path, *files, "_SUCCESS")
    assert files_of(tmp_path) == files


@pytest.mark.parametrize("form", ["{}/", "split={}/", "year=2020/split={}/"])
@pytest.mark.parametrize("files", SHARDS)
def test_shards_of_several_splits_demand_a_choice(tmp_path, files, form):
    put(tmp_path, *(form.format(split) + file for split in ("train", "test") for file in files))
    with pytest.raises(ValueError, match=r"has the splits test\S*, train\S*: choose one with split="):
        files_of(tmp_path)
    assert files_of(tmp_path, "train") == [form.format("train") + file for file in files]


@pytest.mark.parametrize("files, names", [
    (["coco-2014.parquet", "coco-2017.parquet"], "coco-2014, coco-2017"),
    (["coco-2014/x_0.parquet", "coco-2014/x_1.parquet", "coco-2017/x_0.parquet"], "coco-2014/x, coco-2017/x"),
    (["x_0.parquet", "x_2.parquet"], "x_0, x_2"),  # a hole
    (["x_2.parquet", "x_3.parquet"], "x_2, x_3"),  # no beginning
    (["train.parquet", "train_1.parquet"], "train, train_1"),  # a copy, perhaps
    (["2014/0000.parquet", "2017/0000.parquet"], "2014, 2017"),
])  # fmt: skip
def test_numbers_that_do_not_count_shards_tell_data_sets_apart(tmp_path, files, names):
    put(tmp_path, *files)
    with pytest.raises(ValueError, match=f"has the splits {names}: choose one"):
        files_of(tmp_path)
    assert files_of(tmp_path, names.split(", ")[1]) == files[-1:]


def test_work_on_many_shards_grows_with_their_number_and_not_with_its_square(tmp_path):
    def work(count):
        files = [tmp_path / f"chunk-{i // 100:03d}/episode_{i:06d}.parquet" for i in range(count)]
        assert splits_of(files, tmp_path) == {"chunk/episode": files}
        return lines_run(lambda: splits_of(files, tmp_path))

    assert work(2000) < 3 * work(1000)


def test_a_folder_is_no_file_whatever_it_is_called(tmp_path):
    put(tmp_path, "x.csv/notes.txt", "y.csv")
    assert files_of(tmp_path) == ["y.csv"]


def test_the_split_of_a_full_name_comes_first(tmp_path):
    put(tmp_path, "train.parquet", "extra/train.parquet")
    assert files_of(tmp_path, "train") == ["train.parquet"]
    assert files_of(tmp_path, "extra/train") == ["extra/train.parquet"]


def test_where_there_are_no_splits_none_can_be_chosen(folder):
    with pytest.raises(ValueError, match=r"my\.jsonl is a single file, without splits: leave out split="):
        open_rows(write_lines(folder, good()), split="train")
    (folder / "saved").mkdir()
    (folder / "saved" / "state.json").write_text('{"_data_files": []}')
    with pytest.raises(ValueError, match="saved is one data set, without splits: leave out split="):
        open_rows(folder / "saved", split="train")
    (folder / "dataset_dict.json").write_text('{"splits": ["saved", "test"]}')
    with pytest.raises(ValueError, match="has the splits saved, test: choose one"):
        open_rows(folder)
    with pytest.raises(ValueError, match="has no split 'train'; it has saved, test"):
        open_rows(folder, split="train")
    assert len(in_folder(folder, None, "saved")[1]) == 0


# ------------------------------------------------------------------------------------------------------ what is it?


def test_what_cannot_be_opened(folder, tmp_path_factory):
    with pytest.raises(FileNotFoundError, match=r"nothing.jsonl: no such file or folder"):
        open_rows(folder / "nothing.jsonl")
    with pytest.raises(ValueError, match="a folder without a CSV file"):
        open_rows(folder)  # with pictures alone
    with pytest.raises(ValueError, match="no kind of data 'yolo'; there are: jsonl, json, csv"):
        open_rows(folder, kind="yolo")
    for name, content, words in (
        ("x.txt", b"hello\n", "There are jsonl, json, csv, parquet"),
        ("empty.jsonl", b" \n", "is empty"),
        ("x.jsonl.gz", b"\x1f\x8b123", "is compressed"),
        ("x.json", b'{"version":\n 1}', "the keys version"),
        ("broken.json", b'{"images": [', "is not JSON"),
    ):
        (folder / name).write_bytes(content)
        with pytest.raises(ValueError, match=words):
            open_rows(folder / name)


@pytest.mark.parametrize("name, text, kind", [
    ("x", '{"image": "a", "prefix": "b", "suffix": "c"}', "jsonl"),
    ("x.json", '{"image": "a", "caption": "b"}\n{"image": "a", "caption": "b"}\n', "jsonl"),
    ("x.jsonl", '{"image": \n', "jsonl"),  # a broken line is one row's problem
    ("x.txt", "\ufeff image;caption\r\na;b\r\n", "csv"),
    ("x.tsv", "file_name\ttext\n", "csv"),
    ("x.json", '[{"image": "a", "caption": "b"}]', "json"),
    ("x.json", '{"images": [], "categories": [], "annotations": []}', "coco-detect"),
])  # fmt: skip
def test_the_kind_follows_from_the_content(tmp_path, name, text, kind):
    (tmp_path / name).write_text(text, encoding="utf-8")
    assert open_rows(tmp_path / name).kind == kind


# ------------------------------------------------------------------------------------------------------ fingerprint


def test_the_fingerprint_is_that_of_the_rows_files_alone(folder):
    """A run that is written into the folder of its data goes on, whatever else lies there, unless its data change."""
    (folder / "list.csv").write_text("image,caption\na.png,a dog\n")
    rows = open_rows(folder)
    assert rows.files == (folder / "list.csv",)
    before = fingerprint_of_data(rows)
    (folder / "run").mkdir()
    for name in ("run/settings.json", "run/log.jsonl", "run/table.csv"):
        (folder / name).write_text("{}")
    assert fingerprint_of_data(open_rows(folder)) == fingerprint_of_data(open_rows(folder / "list.csv")) == before
    (folder / "list.csv").write_text("image,caption\na.png,a cat\n")
    assert fingerprint_of_data(open_rows(folder)) != before


def test_the_fingerprint_takes_in_the_answers(folder):
    questions = {"questions": [{"image_id": 7, "question": "is it red ?", "question_id": 70}]}
    (folder / "q.json").write_text(json.dumps(questions))
    found = set()
    for answer in ("yes", "no"):
        answers = {"annotations": [{"question_id": 70, "answers": [{"answer": answer}]}]}
        (folder / "a.json").write_text(json.dumps(answers))
        rows = open_rows(folder / "q.json", annotations=folder / "a.json")
        assert rows.files == (folder / "q.json", folder / "a.json")
        found.add(fingerprint_of_data(rows))
    (folder / "q.json").write_text(json.dumps({**questions, **answers}))
    rows = open_rows(folder / "q.json")
    assert rows.files == (folder / "q.json",) and len(found | {fingerprint_of_data(rows)}) == 3


def test_rows_of_no_file_have_no_fingerprint():
    assert fingerprint_of_data(Rows("jsonl", "made up", 1, lambda i: Row(None, "a", "b", i, "here"))) is None


# --------------------------------------------------------------------------------------------------------- checking

BOX = "<loc0010><loc0020><loc0030><loc0040>"
CODES = "".join(f"<seg{i:03d}>" for i in range(16))
BAD = {
    "not UTF-8": [],  # written below
    "not JSON": ["{'image': 'a.png'}"],
    "half a character": [
        good(suffix="a dog \ud83d"), good(prefix="\ude00 ?"), {"image": "a.png", "caption": ["x", "y\ud83d"]},
        {"image": "a.png", "question": "x", "answer": "y", "answers": ["y", "\ud83d"]},
    ],
    "missing key": [{"image": "a.png"}],
    "wrong type": [good(suffix=1)],
    "missing picture": [good(image="gone.png"), good(image=["a.png", "gone.png"]), good(image=".")],
    "empty suffix": [good(suffix=""), good(suffix=" \n"), good(prefix="detect dog", suffix=" ")],
    "newline after prefix": [good(prefix="caption en\n"), good(prefix="caption en\r\n")],
    "reserved token": [
        good(prefix="<image>caption en"), good(prefix="<bos>caption en"), good(suffix="a dog<eos>"),
        good(suffix="<image>"),
    ],
    "label with ;": [
        good(prefix="detect dog;cat", suffix=f"{BOX} dog"),
        good(prefix="detect dog ; cat", suffix=f"{BOX} dog ; small ; {BOX} cat"),
        good(prefix="detect dog", suffix=f"{BOX} dog;small"),
    ],
    "loc tokens": [
        good(prefix="detect dog", suffix="<loc0030><loc0020><loc0010><loc0040> dog"),  # y1 < y0
        good(prefix="detect dog", suffix="<loc0010><loc0020><loc0030><loc0020> dog"),  # x1 = x0
        good(prefix="detect dog", suffix="<loc0010><loc0020><loc0030> dog"),
        good(prefix="detect dog", suffix=BOX + BOX[:9] + " dog"),
        good(prefix="detect dog", suffix="<loc0010><loc0020><loc0030><loc1024> dog"),
        good(prefix="detect dog", suffix="<loc10><loc20><loc30><loc40> dog"),
        good(prefix="detect dog", suffix="dog"),
        good(prefix="segment dog", suffix=f"{BOX} dog"),
        good(prefix="segment dog", suffix=BOX + CODES[:-8] + " dog"),
        good(prefix="segment dog", suffix=BOX + CODES.replace("007", "128") + " dog"),
        good(prefix="the dog on the left", suffix=CODES),  # RefCOCO's prompts are bare
    ],
}  # fmt: skip
FINE = [
    good(), good(image=None), good(image=["a.png", "b.png"]), good(prefix=""), good(suffix="a ; b"),
    good(prefix="detect dog ; cat", suffix=f"{BOX} dog ; {BOX} cat"), good(prefix="detect dog", suffix=""),
    good(prefix="segment dog", suffix=f"{BOX}{CODES} dog"), good(prefix="the dog", suffix=BOX + CODES),
    good(suffix="a dog \U0001f600"),
    good(prefix="caption", suffix=f"{BOX} a dog; it sleeps"), good(prefix="answer en 1 < 2 ?", suffix="<yes>"),
]  # fmt: skip


@pytest.mark.parametrize("problem", [problem for problem, lines in BAD.items() if lines])
def test_every_problem_is_found_in_its_row_alone(folder, problem):
    """Each bad line between two good ones: named by its line, and nothing else is."""
    lines = [line for bad in BAD[problem] for line in (good(), bad)] + [good()]
    path = write_lines(folder, *lines)
    report = check(open_rows(path), show=99)
    assert report.counts == {problem: len(BAD[problem])}
    assert [found.source for found in report.first[problem]] == [
        f"{path}:{number}" for number in range(2, len(lines), 2)
    ]
    assert [found.row for found in report.first[problem]] == list(range(1, len(lines) - 1, 2))
    assert not report.ok and PROBLEMS[problem] in str(report)


def test_every_problem_has_a_test():
    elsewhere = {"box outside", "box or mask", "unreadable picture", "suffix too long", "no room"}
    assert set(PROBLEMS) == set(BAD) | elsewhere


def test_what_is_right_is_not_complained_about(folder, processor):
    report = check(open_rows(write_lines(folder, *FINE)), processor, max_length=100, open_pictures=True)
    assert report.ok and report.not_checked == [] and report.rows == len(FINE)


def test_half_a_character_is_named_with_a_tokenizer_too_and_can_be_printed(folder, processor):
    """It is neither counted nor written out, since no tokenizer and no stream takes it."""
    path = write_lines(folder, good(), good(suffix="\ud83d"), good(image="\ud83d.png"), {"\ud83d": 1})
    report = check(open_rows(path), processor)
    assert report.counts == {"half a character": 1, "missing picture": 1, "missing key": 1}
    text = str(report).encode("utf-8").decode("utf-8")
    assert f"{path}:2: '\\ud83d' stands alone in '\\ud83d'" in text
    assert "no picture at" in text and "\\ud83d.png" in text and "it has \\ud83d" in text
    with pytest.raises(RowError, match=r"my\.jsonl:2"):
        open_rows(path)[:3]


def test_bytes_that_are_no_text(folder):
    (folder / "my.jsonl").write_bytes(b'{"image": "a.png", "caption": "caf\xe9"}\n')
    report = check(open_rows(folder / "my.jsonl"))
    assert report.counts == {"not UTF-8": 1}


def test_pictures_are_opened_only_if_asked(folder):
    (folder / "broken.png").write_bytes((folder / "a.png").read_bytes()[:40])
    (folder / "text.png").write_text("no picture")
    path = write_lines(folder, good(), good(image="broken.png"), good(image=["a.png", "text.png"]))
    closed = check(open_rows(path))
    assert closed.ok and "whether pictures can be opened" in str(closed)
    report = check(open_rows(path), open_pictures=True)
    assert report.counts == {"unreadable picture": 2}
    assert [found.source for found in report.first["unreadable picture"]] == [f"{path}:2", f"{path}:3"]


def test_lengths(folder, processor):
    """Four image tokens and <bos>, prompt and newline; suffix and <eos>: counted as the processor lays them out."""
    rows = open_rows(
        write_lines(
            folder,
            good(prefix="caption en", suffix="a cat"),
            good(prefix="caption en", suffix="a cat and a dog"),
            good(image=["a.png", "b.png"], prefix="caption en", suffix="a"),
        )
    )
    sizes = [processor.lay_out([r.prefix], [len(r.pictures)], [r.suffix])["input_ids"].shape[1] for r in rows]
    report = check(rows, processor)
    assert report.longest == (max(sizes), rows[sizes.index(max(sizes))].source)
    assert report.longest_suffix == (len(processor.tokenizer.encode("a cat and a dog<eos>")), rows[1].source)
    prefix = len(processor.lay_out(["caption en"], [1])["input_ids"][0])
    short = len(processor.lay_out(["caption en"], [1], ["a cat"])["input_ids"][0])
    report = check(rows, processor, max_length=short)
    assert report.counts == {"suffix too long": 1, "no room": 1}
    assert report.first["suffix too long"][0].row == 1 and report.first["no room"][0].row == 2
    assert check(rows, processor, max_length=short - 1).counts == {"suffix too long": 2, "no room": 1}
    assert check(rows, processor, max_length=prefix).counts == {"no room": 3}
    with pytest.raises(ValueError, match="takes a processor"):
        check(rows, max_length=10)


def test_the_report_counts_rows_and_names_the_first(folder):
    path = write_lines(folder, *[good(image=f"{i}.png", suffix="") for i in range(5)], good())
    report = check(open_rows(path), show=2)
    assert report.counts == {"missing picture": 5, "empty suffix": 5} and report.bad_rows == 5
    text = str(report)
    assert "missing picture: 5 rows. paths are relative to" in text
    assert f"{path}:1: no picture at {folder / '0.png'}" in text and f"{path}:3:" not in text
    assert "... and 3 more" in text and "5 of 6 rows have a problem" in text


# ----------------------------------------------------------------------------------------------------- a large file


def write_many(folder, count):
    with open(folder / "many.jsonl", "w") as file:
        for i in range(count):
            row = good(image="ab"[i % 2] + ".png", prefix=f"answer en how many things are in picture {i} ?")
            if i % 2:
                row |= {"prefix": "detect dog", "suffix": f"<loc{i % 500:04d}><loc0000><loc1000><loc0700> dog"}
            file.write(json.dumps(row) + "\n")
    return folder / "many.jsonl"


def test_twenty_thousand_rows(folder):
    rows = open_rows(write_many(folder, 20_000))
    report = check(rows)
    assert report.ok and report.rows == 20_000
    order = np.random.default_rng(0).permutation(20_000)[:200].tolist()
    for i in order:
        assert rows[i].suffix == ("a dog" if i % 2 == 0 else f"<loc{i % 500:04d}><loc0000><loc1000><loc0700> dog")
        assert rows[i].source.endswith(f":{i + 1}")


# The peak is read from /proc: what getrusage says survives exec, so it would be at least that of this process.
MEASURE = """
import re, sys, time
from paligemma.data.options import open_rows
from paligemma.data.check import check
start = time.process_time()
report = check(open_rows(sys.argv[1]))
assert report.ok, report
seconds = time.process_time() - start
print(report.rows / seconds, int(re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1]) / 1024)
"""


@pytest.mark.official
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="memory is read from /proc")
def test_a_million_rows_are_checked_fast_and_in_little_memory(folder):
    """In a process of its own; of its processor time, so that it can be run on a busy machine."""
    path = write_many(folder, 1_000_000)
    run = subprocess.run([sys.executable, "-c", MEASURE, str(path)], capture_output=True, text=True, check=True)
    speed, megabytes = map(float, run.stdout.split())
    assert speed > 20_000 and megabytes < 200


# ---------------------------------------------------------------------------------------------------------- showing


def count(image, color):
    return int((np.asarray(image) == color).all(-1).sum())


def test_a_row_as_the_model_sees_it(folder, processor):
    """Types of tokens have their colours; the picture is squashed, enlarged, and has the box of the suffix on it."""
    row = open_rows(write_lines(folder, good(prefix="detect dog", suffix=f"{BOX.replace('0040', '0900')} dog")))[0]
    image = show(row, processor)
    assert image.width == 1000
    for kind in ("image", "prefix", "suffix", "eos"):
        assert count(image, COLORS[kind]) > 200, kind
    side = 320 // 28 * 28
    picture = np.asarray(image)[12 : 12 + side, 12 : 12 + side]
    red = (picture == (254, 0, 0)).all(-1) | (picture == (255, 0, 0)).all(-1)
    assert 0.8 < red.mean() < 1, "a red picture, but for the box and its label"
    assert red[side // 2 :].all(), "below the box"


@pytest.mark.parametrize("answers, words", [
    (["a dog", "a dog", "a cat"], "(one of 2 answers, which are learned in turn)"),
    (["a dog", "a dog"], None),
])  # fmt: skip
def test_the_answers_that_are_learned_in_turn_are_counted_once_each(folder, processor, monkeypatch, answers, words):
    written = []
    monkeypatch.setattr(ImageDraw.ImageDraw, "text", lambda pen, at, text, **how: written.append(text))
    show(open_rows(write_lines(folder, {"image": "a.png", "question": "what ?", "answers": answers}))[0], processor)
    (head,) = [text for text in written if text.startswith("row 0")]
    assert head.endswith(words) if words else "in turn" not in head


def test_a_token_that_cannot_be_seen_is_spelled_out(folder, processor):
    row = open_rows(write_lines(folder, good(suffix="a\tdog\u200d\n")))[0]
    inputs = processor.lay_out([row.prefix], [1], [row.suffix])
    ids, types, valid, labels = (
        inputs[name][0].tolist() for name in ("input_ids", "token_type_ids", "attention_mask", "labels")
    )
    text = "".join(chip.text for chip in _chips(ids, types, valid, labels, processor) if chip.kind == "suffix")
    assert text == r"a\tdog<0xE2><0x80><0x8D>\n"


def test_the_picture_is_that_of_training(folder, processor):
    """Pixel by pixel what the processor makes of it, each eleven times as large."""
    noise = np.random.default_rng(0).integers(0, 256, (20, 40, 3), np.uint8)
    Image.fromarray(noise).save(folder / "noise.png")
    row = open_rows(write_lines(folder, good(image="noise.png")))[0]
    times = 320 // 28
    drawn = np.asarray(show(row, processor))[12 : 12 + 28 * times : times, 12 : 12 + 28 * times : times]
    trained_on = processor([row.prefix], [row.image])["pixel_values"][0].permute(1, 2, 0).numpy()
    assert np.array_equal(drawn, np.rint((trained_on * 0.5 + 0.5) * 255))


def test_padding_shows_where_rows_differ_in_length(folder, processor):
    rows = open_rows(write_lines(folder, good(), good(suffix="a dog and a cat on the house"), good(image=None)))
    one, both = show(rows[0], processor), show_rows(rows[:2], processor)
    legend = 12 * 12
    assert count(one, COLORS["padding"]) < legend + 2 * one.width
    assert count(both, COLORS["padding"]) > count(one, COLORS["padding"]) + legend
    assert count(show(rows[2], processor), COLORS["image"]) <= legend, "a row without a picture has no image tokens"
    with pytest.raises(ValueError, match="no rows to show"):
        show_rows([], processor)


def test_the_mask_is_that_of_training(folder, processor):
    """Prefix: a full block. Suffix: a triangle. Drawn from the mask that the model gets, so its area can be counted."""
    from paligemma.data.show import IMAGE_ROWS, _mask_picture

    inputs = processor.lay_out(["caption en"], [1], ["a cat"])
    row = [inputs[name][0].tolist() for name in ("input_ids", "token_type_ids", "attention_mask", "labels")]
    chips = list(_chips(*row, processor))
    assert [chip.kind for chip in chips] == ["image", *["prefix"] * 4, *["suffix"] * 2, "eos"]
    assert chips[0].text == "<image> x 4" and chips[4].text == "\\n" and chips[6].text == "·cat"
    assert [chip.label for chip in chips] == ["-"] * 5 + [str(i) for i in row[0][-3:]]
    allowed = paligemma.attention_mask.prefix_lm_mask(inputs["token_type_ids"], inputs["attention_mask"].bool())
    picture = np.asarray(_mask_picture(chips, allowed[0, 0].numpy()))[1:-1, 1:-1]
    cells = picture[:: 150 // 11, :: 150 // 11]
    seen = (cells < 255).any(-1)
    block = IMAGE_ROWS + 4
    assert seen.shape == (11, 11) and seen[:block, :block].all() and not seen[:block, block:].any()
    assert np.array_equal(seen[block:, block:], np.tril(np.ones((3, 3), bool)))
    # and in the whole drawing: of two suffix tokens the first is seen by three, the second by two
    whole = show(open_rows(write_lines(folder, good(prefix="caption en", suffix="a cat")))[0], processor)
    assert count(whole, tuple(int(0.8 * value) for value in COLORS["suffix"])) == 5 * (150 // 11) ** 2


def test_a_long_row_is_cut_short_and_says_so(folder, processor):
    row = open_rows(write_lines(folder, good(suffix="1 2 3 " * 700)))[0]
    assert show(row, processor).height < 40 * 502


# ------------------------------------------------------------------------------------------------------ the commands


@pytest.fixture
def paligemma_command(monkeypatch, capsys):
    """Runs `paligemma ...` in this process: (exit code, stdout, stderr)."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["paligemma", *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            paligemma.cli.main.main()
            sys.exit(0)
        return (stop.value.code or 0, *capsys.readouterr())

    return run


def test_the_command_check_names_bad_rows_and_fails(folder, paligemma_command):
    path = write_lines(folder, good(), good(image="gone.png"), good(suffix=""), good())
    code, out, _ = paligemma_command("data", "check", path)
    assert code == 1
    assert f"{path}:2: no picture at" in out and f"{path}:3: the suffix is empty" in out
    assert "2 of 4 rows have a problem" in out and "rows/s" in out
    code, out, _ = paligemma_command("data", "check", write_lines(folder, good(), good(), name="fine.jsonl"))
    assert code == 0 and "0 of 2 rows have a problem" in out


def test_the_command_check_counts_tokens_and_opens_pictures_if_asked(folder, paligemma_command):
    (folder / "text.png").write_text("no picture")
    other = folder / "other"
    other.mkdir()
    path = write_lines(other, good(image="text.png"), good(suffix="a dog " * 40))
    asked = ("data", "check", path, "--images", folder)
    assert paligemma_command(*asked)[0] == 0
    code, out, _ = paligemma_command(*asked, "--open-pictures", "--model", "tiny", "--max-length", "100")
    assert code == 1
    assert f"{path}:1: {folder / 'text.png'} is not a picture" in out
    assert "suffix too long: 1 row" in out and f"{path}:2: " in out and "max_length is 100" in out
    code, _, err = paligemma_command(*asked, "--max-length", "100")
    assert code == 2 and "--model" in err
    code, _, err = paligemma_command("data", "check", folder / "nothing.jsonl")
    assert code == 1 and "no such file" in err


def test_the_command_show_draws_a_sheet_or_a_folder(folder, paligemma_command):
    path = write_lines(folder, *[good(prefix="detect dog", suffix=f"{BOX} dog") for _ in range(6)])
    code, out, err = paligemma_command("data", "show", path, "--out", folder / "sheet.png", "--rows", "0,5")
    assert (code, out) == (0, "") and "drawn: " in err
    with Image.open(folder / "sheet.png") as sheet:
        processor, codec = processor_of("tiny")
        rows = open_rows(path)
        expected = show_rows([rows[0], rows[5]], processor, codec)
        assert np.array_equal(np.asarray(sheet), np.asarray(expected))
    assert paligemma_command("data", "show", path, "--out", folder / "each", "--count", "3")[0] == 0
    assert sorted(p.name for p in (folder / "each").iterdir()) == [f"row-00000{k}.png" for k in (0, 2, 4)]


@pytest.mark.parametrize("command", [["check"], ["show", "--out", "x.png"]])
def test_a_model_without_a_codec_takes_the_official_one(folder, paligemma_command, command, monkeypatch):
    """Which may be missing too: the ways to it are named."""
    shutil.copytree(paligemma.weights.finding.TINY, folder / "bare", ignore=shutil.ignore_patterns("mask_codec.npz"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HOME", str(folder / "cache"))
    square = {"image_id": 30, "category_id": 1, "bbox": [10, 5, 20, 10], "segmentation": [[10, 5, 30, 5, 30, 15]]}
    path = write_coco(folder, annotations=[square])
    asked = ("data", *command, path, "--kind", "coco-segment", "--model", folder / "bare")
    code, out, err = paligemma_command(*asked)
    assert (code, out) == (1, "") and "as mask_codec.npz into the folder of the checkpoint" in err
    (folder / "cache" / "paligemma").mkdir(parents=True)
    shutil.copy(paligemma.weights.finding.TINY / "mask_codec.npz", folder / "cache" / "paligemma" / "vae-oid.npz")
    monkeypatch.chdir(folder)
    assert paligemma_command(*asked)[0] == 0


@pytest.mark.parametrize("options, message", [
    (["--out", "x.xyz"], "--out x.xyz: no picture is written as .xyz"),
    (["--out", "x.png", "--rows", "9"], "there is no row 9"),
    (["--out", "x.png", "--rows", "first"], "expected numbers of rows"),
])  # fmt: skip
def test_what_show_cannot_draw(folder, paligemma_command, options, message):
    path = write_lines(folder, good())
    code, _, err = paligemma_command("data", "show", path, *options)
    assert code == 2 and message in " ".join(err.replace("│", " ").split())
