"""Parquet and Arrow files."""

import json
import pickle
import sys

import numpy as np
import pytest

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
