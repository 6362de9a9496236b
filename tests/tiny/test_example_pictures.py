"""The scripts that make example pictures and rows."""

import gzip
import json
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

EXAMPLES = Path(__file__).parents[2] / "examples"


def as_mnist(array):
    """The array of bytes in the format of MNIST."""
    head = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">i4").tobytes()
    return gzip.compress(head + array.tobytes())


def run(script, *arguments, monkeypatch):
    monkeypatch.setattr(sys, "argv", [script, *arguments])
    return runpy.run_path(str(EXAMPLES / script), run_name="__main__")


def test_fashion_mnist_becomes_rows(tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    images, labels = rng.integers(0, 256, (5, 28, 28), np.uint8), np.array([9, 0, 3, 8, 1], np.uint8)
    for prefix in ("train", "t10k"):
        (tmp_path / f"{prefix}-images-idx3-ubyte.gz").write_bytes(as_mnist(images))
        (tmp_path / f"{prefix}-labels-idx1-ubyte.gz").write_bytes(as_mnist(labels))
    out = tmp_path / "rows"
    arguments = ["--files", str(tmp_path), "--out", str(out), "--train", "3", "--test", "9"]
    run("fashion_mnist.py", *arguments, monkeypatch=monkeypatch)
    rows = [json.loads(line) for line in (out / "test.jsonl").read_text().splitlines()]
    assert [row["suffix"] for row in rows] == ["boot", "t-shirt", "dress", "bag", "trousers"]
    assert np.array_equal(np.asarray(Image.open(out / rows[2]["image"])), images[2])
    assert len((out / "train.jsonl").read_text().splitlines()) == 3


def test_fashion_mnist_without_its_files_says_where_they_come_from(tmp_path, monkeypatch, capsys):
    with pytest.raises(SystemExit):
        run("fashion_mnist.py", "--files", str(tmp_path / "none"), monkeypatch=monkeypatch)
    assert "install dataset-fashion-mnist" in capsys.readouterr().err


def test_the_ten_pictures_are_those_of_their_script(tmp_path):
    made = runpy.run_path(str(EXAMPLES / "hand_made.py"))
    made["write_pictures"](tmp_path)
    names = sorted(made["PICTURES"])
    assert len(names) == 10 and names == sorted(file.name for file in tmp_path.iterdir())
    kept = EXAMPLES / "hand_made"
    assert sum((kept / name).stat().st_size for name in names) < 300_000
    for name in names:
        new, old = (np.asarray(Image.open(folder / name).convert("RGB"), float) for folder in (tmp_path, kept))
        assert new.shape == old.shape and np.abs(new - old).mean() < 2, name  # other releases of Pillow round otherwise
