"""What other tools get: COCO, YOLO, Label Studio, tables."""

import base64
import csv
import io
import json
import tarfile

import numpy as np
import pytest
from PIL import Image
from standins import MARKS, in_batches, line_of

from paligemma.answers.formats import rle_encode
from paligemma.answers.results import Detection, Segment
from paligemma.batch.export import export
from paligemma.batch.folder import open_run
from paligemma.batch.inputs import list_inputs
from paligemma.batch.row_files import list_rows
from paligemma.batch.rows import InputRow, answered, failed
from paligemma.batch.settings import Settings
from paligemma.batch.shards import work_on
from paligemma.inference import Answer

MASK = np.zeros((10, 20), bool)
MASK[2:6, 4:14] = True


def answer_row(row):
    """Row a/0.jpg failed, a/1.jpg has a dog and a car, a/2.jpg is empty, b/1.jpg has a mask."""
    if row.id == "a/0.jpg":
        return failed(row, "missing", "gone")
    dog, car = Detection("dog", (2.0, 1.0, 12.0, 6.0), 0.75), Detection("car", (0.0, 0.0, 20.0, 10.0), None)
    segment = Segment("dog", (4.0, 2.0, 14.0, 6.0), MASK, [0] * 16, 0.5)
    found = {"a/1.jpg": ([dog, car], []), "a/2.jpg": ([], []), "b/1.jpg": ([], [segment])}[row.id]
    answer = Answer("words", [1], [0.0], 0.9, True, *found, [((0, 2), "half a box")])
    return answered(row, answer, (20, 10), "rle")


@pytest.fixture(params=["jsonl", "parquet"])
def folder(tmp_path, request):
    if request.param == "parquet":
        pytest.importorskip("pyarrow")
    settings = Settings("detect car ; dog", shard_size=3, format=request.param)
    names = ["a/0.jpg", "a/1.jpg", "a/2.jpg", "b/1.jpg"]
    rows = [InputRow(name, f"/photos/{name}", "detect car ; dog") for name in names]
    run = open_run(tmp_path / "run", settings, MARKS, lambda: rows)
    for shard in range(run.num_shards):
        assert work_on(run, shard, in_batches(answer_row, 2))
    return run


def exported(folder, to, name="out"):
    path = folder.path.parent / name
    count = export(folder, to, path)
    return count, path


def test_jsonl_has_the_lines_of_all_parts(folder):
    count, path = exported(folder, "jsonl")
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert count == len(lines) == 4
    for line in lines:
        row = InputRow(line["id"], line["image"], line["prompt"])
        assert {**line, "ms": 0} == {**json.loads(json.dumps(answer_row(row))), "ms": 0}


def test_parquet_has_columns(folder):
    pytest.importorskip("pyarrow")
    import pyarrow.parquet

    count, path = exported(folder, "parquet")
    rows = pyarrow.parquet.read_table(path).to_pylist()
    assert count == len(rows) == 4 and rows[1]["detections"][0]["box"] == [2, 1, 12, 6]
    assert json.loads(rows[3]["segments"][0]["mask"]) == rle_encode(MASK)
    assert rows[0]["error"] == {"kind": "missing", "message": "gone"} and rows[0]["text"] is None


def test_csv_is_a_table(folder):
    _, path = exported(folder, "csv")
    with open(path, newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["error_kind"] for row in rows] == ["missing", "", "", ""]
    assert json.loads(rows[1]["detections"])[1]["label"] == "car" and rows[1]["text"] == "words"


def test_coco_is_a_data_set(folder):
    count, path = exported(folder, "coco")
    data = json.loads(path.read_text())
    assert count == 3 and data["categories"] == [{"id": 1, "name": "car"}, {"id": 2, "name": "dog"}]
    assert [image["file_name"] for image in data["images"]] == ["a/1.jpg", "a/2.jpg", "b/1.jpg"]
    dog, _, segment = data["annotations"]
    assert dog == {
        "id": 1, "image_id": 1, "category_id": 2, "bbox": [2, 1, 10, 5], "area": 50, "iscrowd": 0, "score": 0.75,
    }  # fmt: skip
    assert segment["segmentation"] == rle_encode(MASK) and segment["area"] == 40 and segment["image_id"] == 3
    coco = pytest.importorskip("faster_coco_eval").COCO(str(path))
    assert (coco.annToMask(coco.loadAnns([3])[0]).astype(bool) == MASK).all()


def test_yolo_is_a_file_for_each_picture(folder):
    count, path = exported(folder, "yolo")
    assert count == 3 and (path / "classes.txt").read_text() == "car\ndog\n"
    assert (path / "labels" / "a" / "1.txt").read_text().splitlines()[0] == "1 0.350000 0.350000 0.500000 0.500000"
    assert (path / "labels" / "a" / "2.txt").read_text() == ""
    assert (path / "labels" / "b" / "1.txt").read_text().startswith("1 0.200000 0.200000")
    assert not (path / "labels" / "a" / "0.txt").exists()


def test_labels_of_other_classes_are_not_mixed_with_those_of_yolo(folder):
    _, path = exported(folder, "yolo")
    assert exported(folder, "yolo")[0] == 3  # again, and the same
    (path / "classes.txt").write_text("owl\n")
    before = (path / "labels" / "a" / "1.txt").read_bytes()
    with pytest.raises(ValueError, match=r"classes\.txt numbers other classes, of label files that lie beside it"):
        exported(folder, "yolo")
    assert (path / "classes.txt").read_text() == "owl\n" and (path / "labels" / "a" / "1.txt").read_bytes() == before


def test_labels_that_another_tool_wrote_are_not_overwritten(folder):
    path = folder.path.parent / "out"
    (path / "labels" / "a").mkdir(parents=True)
    (path / "data.yaml").write_text("names: [owl]")
    (path / "labels" / "a" / "1.txt").write_text("0 0.5 0.5 1 1\n")
    with pytest.raises(ValueError, match=r"out holds label files of another origin \(labels.a.1\.txt, and no classes"):
        exported(folder, "yolo")
    assert (path / "labels" / "a" / "1.txt").read_text() == "0 0.5 0.5 1 1\n" and not (path / "classes.txt").exists()


def test_an_export_of_labels_that_was_cut_short_can_be_repeated(folder, monkeypatch):
    with monkeypatch.context() as patched:
        patched.setattr("paligemma.batch.export.mask_of", lambda item: 1 / 0)  # that of the third picture
        with pytest.raises(ZeroDivisionError):
            exported(folder, "yolo")
    assert exported(folder, "yolo")[0] == 3


@pytest.mark.parametrize("image", [None, "/a.jpg", "/[a].jpg", "[a.jpg", [], ["/a.jpg"], [None, "/b.jpg"]])
def test_names_of_pictures_come_back_from_parquet_as_they_were(tmp_path, image):
    pytest.importorskip("pyarrow")
    run = open_run(tmp_path / "run", Settings("ocr", format="parquet"), MARKS, lambda: [InputRow("a", image, "ocr")])
    assert work_on(run, 0, in_batches(lambda row: failed(row, "missing", "gone"), 1))
    assert [line["image"] for line in run.lines(0)] == [image]


def test_label_studio_gets_predictions(folder):
    _, path = exported(folder, "label-studio")
    boxes, words, masks = json.loads(path.read_text())
    dog = boxes["predictions"][0]["result"][0]
    assert dog["value"] == {
        "x": 10, "y": 10, "width": 50, "height": 50, "rotation": 0, "rectanglelabels": ["dog"],
    }  # fmt: skip
    assert words["predictions"][0]["result"][0]["value"] == {"text": ["words"]}
    outline = masks["predictions"][0]["result"][0]["value"]
    assert sorted(map(tuple, outline["points"])) == [(20, 20), (20, 60), (70, 20), (70, 60)]


def test_openai_has_a_line_for_each_row(folder):
    count, path = exported(folder, "openai")
    answers = [json.loads(line) for line in path.read_text().splitlines()]
    assert count == 4 and [answer["response"]["status_code"] for answer in answers] == [400, 200, 200, 200]


def test_what_cannot_be_written_is_said(folder):
    with pytest.raises(ValueError, match="there is no format 'word'"):
        exported(folder, "word")
    with pytest.raises(ValueError, match="is a folder"):
        export(folder, "csv", folder.path)
    with pytest.raises(ValueError, match="is a file"):
        export(folder, "yolo", folder.path / "run.json")


def run_of(path, rows, answer_row=line_of):
    """A finished run of these rows."""
    folder = open_run(path, Settings("detect dog"), MARKS, lambda: rows)
    assert work_on(folder, 0, in_batches(answer_row, 2))
    return folder


def test_two_pictures_that_would_have_one_label_file(tmp_path):
    rows = [InputRow(name, None, "detect dog") for name in ("0.jpg", "a.jpg", "a.png")]
    folder = run_of(tmp_path / "run", rows)
    with pytest.raises(ValueError, match=r"a\.jpg and a\.png would have one label file"):
        export(folder, "yolo", tmp_path / "labels")
    assert not (tmp_path / "labels").exists()  # nothing is written before all names are known


def test_frames_of_a_video_have_label_files_of_their_own(tmp_path):
    rows = [InputRow(f"x.mp4/0000.{part}", None, "detect dog") for part in ("000", "500")]
    assert export(run_of(tmp_path / "run", rows), "yolo", tmp_path / "yolo") == 2
    files = sorted(path.name for path in (tmp_path / "yolo" / "labels" / "x.mp4").iterdir())
    assert files == ["0000.000.txt", "0000.500.txt"]


def test_pictures_that_stand_in_their_rows_are_images_of_their_own(tmp_path):
    """The line of such a row holds the beginning of its data: URL, which all PNGs have in common."""

    def answer_row(row):
        answer = Answer("", [1], [0.0], 0.9, True, [Detection("dog", (0.0, 0.0, 2.0, 2.0), 0.5)], [], [])
        return answered(row, answer, (4, 3), "rle")

    url = "data:image/png;base64,iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAA"
    rows = [InputRow(id, image, "detect dog") for id, image in (("p", url + "A"), ("q", url + "B"), ("r", [url]))]
    folder = run_of(tmp_path / "run", rows, answer_row)
    export(folder, "coco", tmp_path / "coco.json")
    data = json.loads((tmp_path / "coco.json").read_text())
    assert [image["file_name"] for image in data["images"]] == ["p", "q", "r"]
    assert [annotation["image_id"] for annotation in data["annotations"]] == [1, 2, 3]


@pytest.mark.parametrize("kind", ["data: URL in a CSV", "data: URL in JSON", "tar"])
def test_label_studio_shows_files_alone(tmp_path, monkeypatch, kind):
    monkeypatch.chdir(tmp_path)
    buffer = io.BytesIO()
    Image.new("RGB", (4, 3), "red").save(buffer, "PNG")
    url = f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"
    if kind == "tar":
        (tmp_path / "a.png").write_bytes(buffer.getvalue())
        with tarfile.open("set.tar", "w") as archive:
            archive.add("a.png")
        rows = list(list_inputs(["set.tar"], "detect dog"))
    elif kind == "data: URL in JSON":
        (tmp_path / "rows.jsonl").write_text(json.dumps({"image": url, "prompt": "detect dog"}) + "\n")
        rows = list(list_rows("rows.jsonl"))
    else:
        (tmp_path / "rows.csv").write_text(f'image,prompt\n"{url}",detect dog\n')
        rows = list(list_rows("rows.csv"))
    folder = run_of(
        tmp_path / "run", rows, lambda row: answered(row, Answer("", [1], [0.0], 0.9, True, [], [], []), (4, 3), "rle")
    )
    with pytest.raises(ValueError, match=r"its picture is no file of its own \(.*export to coco or jsonl"):
        export(folder, "label-studio", tmp_path / "tasks.json")
    assert not (tmp_path / "tasks.json").exists()


def test_rows_about_one_picture(tmp_path):
    """One has the picture's name as its id, which is the default; one sees another picture as well."""

    def answer_row(row):
        answer = Answer("", [1], [0.0], 0.9, True, [Detection("dog", (0.0, 0.0, 2.0, 2.0), 0.5)], [], [])
        return answered(row, answer, (4, 3), "rle")

    image = "/home/me/photos/7.jpg"
    asked = (("photos/7.jpg", image), ("q2", image), ("q3", [image, "/home/me/photos/8.jpg"]))
    folder = run_of(tmp_path / "run", [InputRow(id, where, "detect dog") for id, where in asked], answer_row)
    export(folder, "coco", tmp_path / "coco.json")
    data = json.loads((tmp_path / "coco.json").read_text())
    assert data["images"] == [{"id": 1, "file_name": "photos/7.jpg", "width": 4, "height": 3}]
    assert [annotation["image_id"] for annotation in data["annotations"]] == [1, 1, 1]
    export(folder, "label-studio", tmp_path / "tasks.json")
    tasks = json.loads((tmp_path / "tasks.json").read_text())
    assert [(task["data"]["id"], task["data"]["image"]) for task in tasks] == [(id, image) for id, _ in asked]


@pytest.mark.parametrize("to", ["jsonl", "csv", "coco", "yolo", "label-studio", "openai"])
def test_a_row_with_an_empty_list_of_pictures(tmp_path, to):
    def answer_row(row):
        return answered(row, Answer("words", [1], [0.0], 0.9, True, [], [], []), None, "rle")

    folder = run_of(tmp_path / "run", [InputRow("none", [], "caption en")], answer_row)
    assert export(folder, to, tmp_path / "out") == 1
