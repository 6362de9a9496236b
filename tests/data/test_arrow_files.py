"""Parquet and Arrow files."""

import json
import os
import pickle
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from paligemma.data.arrow_files import ArrowFiles
from paligemma.data.check import check
from paligemma.data.options import open_rows


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


def test_a_value_that_python_has_no_place_for_does_not_end_the_run(folder):
    pyarrow = pytest.importorskip("pyarrow")
    table = pyarrow.table(
        {
            "image": ["a.png"] * 2,
            "caption": ["one", "two"],
            "date": pyarrow.array([10**17, 0], pyarrow.timestamp("s")),
            "zone": pyarrow.array([1, 2], pyarrow.timestamp("s", tz="Nowhere/Here")),
        }
    )
    with pyarrow.ipc.new_stream(str(folder / "x.arrow"), table.schema) as stream:
        stream.write_table(table)
    assert [row.suffix for row in open_rows(folder / "x.arrow")] == ["one", "two"]


@pytest.mark.parametrize("column", ["label", "class", "category", "Label"])
def test_numbers_of_classes_have_the_names_that_datasets_noted(folder, column):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    features = {column: {"names": ["cat", "dog"], "_type": "ClassLabel"}, "image": {"_type": "Image"}}
    noted = {"huggingface": json.dumps({"info": {"features": features}})}
    table = pyarrow.table({"image": ["a.png"] * 3, column: [1, 0, 7]}).replace_schema_metadata(noted)
    parquet.write_table(table, folder / "x.parquet")
    rows = open_rows(folder / "x.parquet")
    assert [row.suffix for row in rows] == ["dog", "cat", "7"] and rows[0].prefix == "answer en what is this?"
    report = check(rows)
    assert report.ok and "1 row has a label that is a number without a name" in str(report)


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="counts open files")
def test_no_file_of_many_stays_open(folder):
    """A data set may have more files than a process may hold open."""
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    for number in range(40):
        parquet.write_table(
            pyarrow.table({"image": ["a.png"], "label": [str(number)]}), folder / f"x-{number:05d}.parquet"
        )
    before = len(os.listdir("/proc/self/fd"))
    rows = ArrowFiles(sorted(folder.glob("x-*.parquet")))
    assert [row["label"] for row in rows] == [str(number) for number in range(40)]
    assert len(os.listdir("/proc/self/fd")) - before < 5


def test_pictures_without_objects_are_left_out_and_not_read(folder):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    objects = [{"bbox": [], "category": []}, {"bbox": [[0, 0, 20, 10]], "category": ["dog"]}] * 2
    image = {"bytes": (folder / "a.png").read_bytes(), "path": None}
    parquet.write_table(pyarrow.table({"image": [image] * 4, "objects": objects}), folder / "x.parquet")
    opened = open_rows(folder / "x.parquet")
    for rows in (opened, pickle.loads(pickle.dumps(opened))):
        assert [(row.prefix, row.image) for row in rows] == [("detect dog", image["bytes"])] * 2
        assert rows.note.endswith("(2 pictures without objects left out)")
    assert list(ArrowFiles([folder / "x.parquet"], without=("image",))[0]) == ["objects"]


@pytest.mark.parametrize("form", ["a dict of lists", "a list of dicts"])
def test_a_column_of_objects_is_boxes(folder, form):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    objects = {"bbox": [[20, 5, 10, 10], [0, 0, 20, 10]], "category": [0, 1]}
    column, feature = objects, {"feature": {"category": {"names": ["cat", "dog"], "_type": "ClassLabel"}}}
    if form == "a list of dicts":
        column = [dict(zip(objects, values)) for values in zip(*objects.values())]
        feature = [feature["feature"]]
    noted = {"huggingface": json.dumps({"info": {"features": {"objects": feature}}})}
    image = {"bytes": (folder / "a.png").read_bytes(), "path": None}
    table = pyarrow.table({"image": [image], "objects": [column]}).replace_schema_metadata(noted)
    parquet.write_table(table, folder / "x.parquet")
    (row,) = open_rows(folder / "x.parquet")
    assert (row.prefix, row.size) == ("detect cat ; dog", (40, 20))
    assert row.suffix == "<loc0256><loc0512><loc0768><loc0768> cat ; <loc0000><loc0000><loc0512><loc0512> dog"


def test_threads_read_rows_of_one_parquet_file(folder):
    """As those do that open pictures ahead; more row groups than are kept, so that each read drops one."""
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pyarrow.table({"label": list(range(6))}), folder / "x.parquet", row_group_size=1)
    rows, before = ArrowFiles([folder / "x.parquet"]), sys.getswitchinterval()
    sys.setswitchinterval(1e-6)  # threads take turns as often as they can
    try:
        with ThreadPoolExecutor(4) as pool:
            assert [row["label"] for row in pool.map(rows.__getitem__, list(range(6)) * 200)] == list(range(6)) * 200
    finally:
        sys.setswitchinterval(before)
