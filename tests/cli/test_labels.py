"""`run --save-labels`: what is written is what was answered, and can be read back as data."""

import io
import json
import sys

import numpy as np
import pytest
import typer
from PIL import Image

from paligemma.answers.results import Detection, Segment
from paligemma.cli import main as cli
from paligemma.cli.labels import LabelFiles
from paligemma.cli.output import stem_of
from paligemma.data.options import open_rows

DOG, CAT = Detection("dog", (10.0, 5.0, 60.0, 45.0), 0.9), Detection("cat", (0.0, 0.0, 50.0, 25.0))


@pytest.fixture
def folder(tmp_path, monkeypatch):
    for name in ("a.png", "b.png"):
        Image.new("RGB", (100, 50), "red").save(tmp_path / name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def written(folder, format):
    labels = LabelFiles(folder / format, format, ["a.png", "b.png"], ["cat", "dog"])
    labels.add("a.png", (100, 50), [DOG, CAT])
    labels.add("b.png", (100, 50), [])
    labels.finish()
    return folder / format


def test_yolo(folder):
    out = written(folder, "yolo")
    assert (out / "a.txt").read_text().splitlines()[0] == "1 0.350000 0.500000 0.500000 0.800000"
    assert (out / "b.txt").read_text() == "", "looked at, and empty"
    assert (out / "classes.txt").read_text() == "cat\ndog\n"


def test_yolo_can_be_trained_on(folder):
    """After its pictures and label files were put into two folders, as data.yaml says."""
    out = written(folder, "yolo")
    assert (out / "data.yaml").read_text().startswith("# Put this file above a folder `images`")
    (folder / "set" / "images").mkdir(parents=True)
    (out / "data.yaml").rename(folder / "set" / "data.yaml")
    out.rename(folder / "set" / "labels")
    (folder / "a.png").rename(folder / "set" / "images" / "a.png")
    (row, *_) = open_rows(folder / "set")
    assert row.prefix == "detect cat ; dog" and row.suffix.count("<loc") == 8


def test_coco_can_be_trained_on(folder):
    out = written(folder, "coco")
    document = json.loads((out / "annotations.json").read_text())
    assert [image["file_name"] for image in document["images"]] == ["a.png", "b.png"]
    assert document["annotations"][0]["score"] == 0.9
    (row, *_) = open_rows(out / "annotations.json", images=folder)
    assert row.prefix == "detect cat ; dog" and row.suffix.count("<loc") == 8


def test_voc_can_be_trained_on(folder):
    out = written(folder, "voc")
    row = open_rows(out, images=folder)[0]
    assert row.prefix == "detect cat ; dog" and "dog" in row.suffix


def test_masks_have_their_pixels_as_area(folder):
    mask = np.zeros((50, 100), bool)
    mask[10:20, 30:60] = True
    labels = LabelFiles(folder / "out", "coco", ["a.png"], [])
    labels.add("a.png", (100, 50), [Segment("dog", (30.0, 10.0, 60.0, 20.0), mask)])
    labels.finish()
    (annotation,) = json.loads((folder / "out/annotations.json").read_text())["annotations"]
    assert annotation["area"] == 300 and annotation["segmentation"]["size"] == [50, 100]


def command(monkeypatch, capsys, *arguments):
    monkeypatch.setattr(sys, "argv", ["paligemma", *arguments])
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"")))
    with pytest.raises(SystemExit) as stop:
        cli.main()
        sys.exit(0)
    return (stop.value.code or 0, *capsys.readouterr())


def test_the_command_writes_what_it_prints(folder, monkeypatch, capsys):
    code, out, err = command(
        monkeypatch, capsys, "run", "detect dog ; cat", "a.png", "b.png", "--save-labels", "labels", "--json"
    )
    assert code == 0 and "labels: labels" in err
    boxes = [len(json.loads(line)["detections"]) for line in out.splitlines()]
    assert [len((folder / "labels" / f"{name}.txt").read_text().splitlines()) for name in "ab"] == boxes
    assert (folder / "labels/classes.txt").read_text() == "dog\ncat\n"


@pytest.mark.parametrize(("format", "files"), [("yolo", ["picture.txt"]), ("voc", ["picture.xml"]), ("coco", [])])
def test_a_data_url_is_called_picture(folder, format, files):
    """Its text is no name: behind the last slash of the base64 there may be thousands of letters, or very few."""
    url = "data:image/png;base64," + "A" * 300 + "/kJggg=="
    assert stem_of(url) == "picture" and stem_of("-") == "stdin" and stem_of("sub/a.b.png") == "a.b"
    labels = LabelFiles(folder / "out", format, [url], ["cat", "dog"])
    labels.add(url, (100, 50), [DOG])
    labels.finish()
    whole = {"yolo": ["classes.txt", "data.yaml"], "voc": [], "coco": ["annotations.json"]}[format]
    assert sorted(path.name for path in (folder / "out").iterdir()) == sorted([*files, *whole])
    if format == "coco":
        assert json.loads((folder / "out/annotations.json").read_text())["images"][0]["file_name"] == "picture"
    if format == "voc":
        assert "<filename>picture</filename>" in (folder / "out/picture.xml").read_text()


def test_two_data_urls_would_have_one_label_file(folder):
    urls = ["data:image/png;base64," + letter * 5000 for letter in "AB"]
    with pytest.raises(typer.BadParameter, match="would have one label file") as error:
        LabelFiles(folder / "out", "yolo", urls, [])
    assert len(str(error.value)) < 400


def test_a_picture_called_classes_does_not_lose_its_labels_to_the_list_of_names(folder):
    with pytest.raises(typer.BadParameter, match=r"the labels of sub/classes.png would be classes.txt"):
        LabelFiles(folder / "out", "yolo", ["sub/classes.png"], ["cat"])
    LabelFiles(folder / "out", "voc", ["sub/classes.png"], ["cat"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["caption en", "a.png", "--save-labels", "out"], "other answers have no boxes"),
        (["detect dog", "a.png", "--save-labels", "b.png"], "b.png is a file, expected a folder"),
        (["detect dog", "a.png", "--save-labels", "out", "--label-format", "csv"], "'csv', expected yolo, coco, voc"),
        (["detect dog", "a.png", "sub/a.png", "--save-labels", "out"], "would have one label file"),
    ],
)
def test_wrong_usage_is_told_before_a_model_is_loaded(folder, monkeypatch, capsys, arguments, message):
    monkeypatch.setattr("paligemma.inference.load", lambda *_, **__: pytest.fail("it is loaded"))
    code, out, err = command(monkeypatch, capsys, "run", *arguments)
    assert (code, out) == (2, "") and message in " ".join(err.replace("\u2502", " ").split())
