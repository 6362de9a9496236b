"""`run --save-labels`: what is written is what was answered, and can be read back as data."""

import io
import json
import subprocess
import sys

import numpy as np
import pytest
import typer
from PIL import Image

from paligemma.answers.results import Detection, Segment
from paligemma.cli import main as cli
from paligemma.cli.labels import FORMATS, LabelFiles, labels_into
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


def answered(out, format, image, items, classes):
    """A run of its own about one picture."""
    labels = LabelFiles(out, format, [image], classes)
    labels.add(image, (100, 50), items)
    labels.finish()


def test_a_later_run_adds_to_the_classes_of_yolo(folder):
    """Else the numbers in the files of the first run would stand for other things."""
    answered(folder / "out", "yolo", "a.png", [CAT, DOG], ["cat", "dog"])
    answered(folder / "out", "yolo", "b.png", [DOG, Detection("owl", (0.0, 0.0, 9.0, 9.0))], ["owl", "dog"])
    assert (folder / "out/classes.txt").read_text() == "cat\ndog\nowl\n"
    assert '  2: "owl"\n' in (folder / "out/data.yaml").read_text()
    assert [[line[0] for line in (folder / f"out/{name}.txt").read_text().splitlines()] for name in "ab"] == [
        ["0", "1"],
        ["1", "2"],
    ]


def test_numbers_of_an_interrupted_run_keep_their_meaning(folder):
    LabelFiles(folder / "out", "yolo", ["a.png"], ["cat", "dog"]).add("a.png", (100, 50), [DOG])
    answered(folder / "out", "yolo", "b.png", [DOG], ["dog"])
    assert (folder / "out/classes.txt").read_text() == "cat\ndog\n"


def test_a_killed_run_that_added_a_class_leaves_its_name(folder):
    """A class that is asked for has a number before it is found. The file must know it before the number is used."""
    answered(folder / "out", "yolo", "a.png", [DOG], ["dog"])
    LabelFiles(folder / "out", "yolo", ["b.png"], ["cat"]).add("b.png", (100, 50), [CAT])  # no `finish`: killed
    assert (folder / "out/b.txt").read_text().startswith("1 ")
    assert (folder / "out/classes.txt").read_text() == "dog\ncat\n"


@pytest.mark.parametrize(("format", "file"), [("yolo", "a.txt"), ("coco", "annotations.json"), ("voc", "a.xml")])
def test_an_interrupted_run_keeps_the_labels_of_what_it_answered(folder, format, file):
    out = folder / "out"
    with pytest.raises(KeyboardInterrupt), labels_into(out, format, ["a.png", "b.png"], ["cat", "dog"]) as labels:
        labels.add("a.png", (100, 50), [DOG])
        raise KeyboardInterrupt
    answered(folder / "whole", format, "a.png", [DOG], ["cat", "dog"])
    assert (out / file).read_text() == (folder / "whole" / file).read_text()


def test_two_runs_into_one_folder(folder):
    """Each would give the number 0 to its own class."""
    with labels_into(folder / "out", "yolo", ["a.png"], ["cat"]) as labels:
        labels.add("a.png", (100, 50), [CAT])
        code = """if 1:
            from pathlib import Path
            from paligemma.cli.labels import labels_into
            with labels_into(Path("out"), "yolo", ["b.png"], ["dog"]):
                pass
        """
        second = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True)
    assert "is being written by another process (paligemma run --save-labels" in second.stderr
    assert sorted(path.name for path in (folder / "out").iterdir()) == ["a.txt", "classes.txt", "data.yaml"]
    with pytest.raises(KeyError), labels_into(folder / "new", "yolo", ["a.png"], ["cat"]):
        raise KeyError  # before anything was answered
    assert not (folder / "new").exists()


def test_the_names_of_the_classes_in_other_encodings(folder):
    (folder / "out").mkdir()
    (folder / "out/classes.txt").write_bytes(b"\xef\xbb\xbfcat\r\ndog\r\n")
    answered(folder / "out", "yolo", "a.png", [CAT], ["cat"])
    assert (folder / "out/classes.txt").read_bytes() == b"cat\ndog\n"
    (folder / "out/classes.txt").write_bytes("café".encode("latin-1"))
    with pytest.raises(typer.BadParameter, match=r"classes.txt is no text in UTF-8"):
        LabelFiles(folder / "out", "yolo", ["a.png"], ["cat"])


def test_a_later_run_adds_to_the_data_set_of_coco(folder):
    file = folder / "out/annotations.json"
    answered(folder / "out", "coco", "a.png", [CAT, DOG], ["cat", "dog"])
    file.write_text(json.dumps({**json.loads(file.read_text()), "info": {"year": 2026}}))
    answered(folder / "out", "coco", "b.png", [DOG], ["owl", "dog"])
    answered(folder / "out", "coco", "a.png", [DOG], ["dog"])  # the same picture: its labels are replaced
    document = json.loads(file.read_text())
    assert document["info"] == {"year": 2026}
    assert {image["file_name"]: image["id"] for image in document["images"]} == {"a.png": 1, "b.png": 2}
    assert [category["name"] for category in document["categories"]] == ["cat", "dog", "owl"]
    boxes = [(row["id"], row["image_id"], row["category_id"]) for row in document["annotations"]]
    assert boxes == [(3, 2, 2), (4, 1, 2)]


def test_the_same_run_again_writes_the_same_files(folder):
    for format in FORMATS:
        first = {path.name: path.read_bytes() for path in written(folder, format).iterdir()}
        assert {path.name: path.read_bytes() for path in written(folder, format).iterdir()} == first


@pytest.mark.parametrize(
    ("format", "name", "content"),
    [
        ("yolo", "data.yaml", "train: ../images/train\nnames: [cat]\n"),
        ("coco", "annotations.json", "[]"),
        ("coco", "annotations.json", '{"images": [{"id": "a", "file_name": "a.png"}]}'),
        ("coco", "annotations.json", '{"images": ["a.png"]}'),
    ],
)
def test_files_that_cannot_be_added_to_are_kept(folder, format, name, content):
    (folder / "out").mkdir()
    (folder / "out" / name).write_text(content)
    with pytest.raises(typer.BadParameter, match=f"{name} is n.*choose another folder"):
        LabelFiles(folder / "out", format, ["a.png"], ["cat"])
    assert (folder / "out" / name).read_text() == content


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
        (["detect dog", "a.png", "--label-format", "coco"], "--label-format is for --save-labels FOLDER"),
        (["detect dog", "a.png", "--save-labels", "b.png"], "b.png is a file, expected a folder"),
        (["detect dog", "a.png", "--save-labels", "out", "--label-format", "csv"], "'csv', expected yolo, coco, voc"),
        (["detect dog", "a.png", "sub/a.png", "--save-labels", "out"], "would have one label file"),
    ],
)
def test_wrong_usage_is_told_before_a_model_is_loaded(folder, monkeypatch, capsys, arguments, message):
    monkeypatch.setattr("paligemma.inference.load", lambda *_, **__: pytest.fail("it is loaded"))
    code, out, err = command(monkeypatch, capsys, "run", *arguments)
    assert (code, out) == (2, "") and message in " ".join(err.replace("\u2502", " ").split())
