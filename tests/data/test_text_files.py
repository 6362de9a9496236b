"""JSON lines and CSV, read one row at a time."""

import csv
import io
import json
import pickle
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from samples import DIGITS, good, texts, write_lines

from paligemma.data import json_documents, text_files
from paligemma.data.check import check
from paligemma.data.json_documents import JsonFile
from paligemma.data.options import open_rows
from paligemma.data.rows import Row, RowError
from paligemma.data.text_files import CsvFile, JsonLines
from paligemma.train.batches import RowBatches

# ----------------------------------------------------------------------------------------------------------- JSON lines

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


# ------------------------------------------------------------------------------------------------------------------ CSV

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


@pytest.mark.parametrize("cell", ['"5 inch screen', '"Hello" he said', '"a ""dog""'])
def test_a_quote_that_is_out_of_place_is_named_and_takes_no_rows_with_it(tmp_path, cell):
    path = tmp_path / "x.csv"
    path.write_text(f"image,prefix,suffix\na.png,ocr,one\nb.png,ocr,{cell}\n" + "a.png,ocr,one\n" * 50)
    with pytest.raises(ValueError, match=r"x.csv:3: not CSV: .*inside it a quote is written \"\""):
        open_rows(path)


def test_ordinary_quotes_of_a_csv(tmp_path):
    text = '\ufeff"image","prefix",suffix\na.png,"ocr","a ""dog"",\n\nasleep"\n\n"b.png",ocr,5" screen\nc.png,ocr,""\n'
    (tmp_path / "x.csv").write_text(text)
    assert [row.suffix for row in open_rows(tmp_path / "x.csv")] == ['a "dog",\n\nasleep', '5" screen', ""]
    (tmp_path / "x.csv").write_text('\ufeff"im\nage",suffix\na.png,one\n')
    assert list(CsvFile(tmp_path / "x.csv")[0].values()) == ["a.png", "one"]


def test_a_cell_of_a_csv_may_hold_a_picture(tmp_path):
    """As a data: URL, which is longer than Python's own limit of a cell."""
    url = f"data:image/png;base64,{'A' * 500_000}"
    (tmp_path / "x.csv").write_text(f'image,label\n"{url}",dog\n')
    assert CsvFile(tmp_path / "x.csv")[0] == {"image": url, "label": "dog"}


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-be"])
@pytest.mark.parametrize("name", ["x.csv", "x.jsonl"])
def test_text_in_utf_16_is_told(tmp_path, name, encoding):
    """Excel calls it Unicode text."""
    text = "image,label\na.png,dog\n" if name == "x.csv" else '{"image": "a.png", "label": "dog"}\n'
    mark = "\ufeff" if encoding == "utf-16-be" else ""
    (tmp_path / name).write_text(mark + text, encoding=encoding)
    with pytest.raises(ValueError, match=r"is text in UTF-16: save it as UTF-8"):
        open_rows(tmp_path / name)


def test_the_header_of_a_csv(folder):
    """A blank line before it does not hide the separator; a name that stands there twice says two things."""
    path = folder / "my.csv"
    path.write_text("\n\nimage;prefix;suffix\na.png;caption en;x, y, z\n")
    assert open_rows(path)[0].suffix == "x, y, z"
    path.write_text("image,prefix,suffix,suffix\na.png,caption en,right,\n")
    with pytest.raises(ValueError, match=r"my\.csv: the header names suffix twice"):
        open_rows(path)
    path.write_text("image_id,question,answer\n7,what is this,dog\n")
    assert open_rows(path, image_name="{image_id}.jpg")[0].image == str(folder / "7.jpg")


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


# --------------------------------------------------------------------------------------------------------- a large file


def write_many(folder, count):
    with open(folder / "many.jsonl", "w") as file:
        for i in range(count):
            row = good(image="ab"[i % 2] + ".png", prefix=f"answer en how many things are in picture {i} ?")
            if i % 2:
                row |= {"prefix": "detect dog", "suffix": f"<loc{i % 500:04d}><loc0000><loc1000><loc0700> dog"}
            file.write(json.dumps(row) + "\n")
    return folder / "many.jsonl"


def test_rows_are_read_and_checked_without_torch(folder):
    """Which takes 150 MB and more time than some thousand rows."""
    code = "import sys; from paligemma.data.options import open_rows; from paligemma.data.check import check; "
    code += "print(check(open_rows(sys.argv[1])).ok, 'torch' in sys.modules)"
    run = [sys.executable, "-c", code, str(write_many(folder, 10))]
    assert subprocess.run(run, capture_output=True, text=True, check=True).stdout == "True False\n"


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


def test_a_record_that_is_only_a_byte_order_mark_is_a_row_without_cells(tmp_path):
    """Files that were put together have such marks inside, too."""
    (tmp_path / "rows.csv").write_bytes(b"image,prefix,suffix\na.png,ocr,text\n\xef\xbb\xbf")
    rows = CsvFile(tmp_path / "rows.csv")
    assert len(rows) == 2 and rows[0]["suffix"] == "text"
    with pytest.raises(RowError, match="0 cells, but the header has 3"):
        rows[1]
