"""The formats that people's annotation tools write: YOLO, Pascal VOC, LabelMe, folders of classes, conversations."""

import base64
import json
import shutil
from pathlib import Path

import pytest
from PIL import Image
from samples import good, write_lines

from paligemma.answers.mask_codec import CODEC_FILE, MaskCodec
from paligemma.data.check import check
from paligemma.data.options import open_rows
from paligemma.data.rows import RowError
from paligemma.weights.finding import TINY

BOXES = "<loc0256><loc0512><loc0768><loc0768> cat ; <loc0000><loc0000><loc0512><loc0512> dog"


@pytest.fixture(scope="module")
def codec():
    return MaskCodec.load(TINY / CODEC_FILE)


# ------------------------------------------------------------------------------------------------------------- YOLO


def write_yolo(folder, labels, settings="train: images/train\nnames: [cat, dog]\n"):
    """labels: of pictures 0.png, 1.png, ...; None: no file."""
    (folder / "images" / "train").mkdir(parents=True)
    (folder / "labels" / "train").mkdir(parents=True)
    for i, text in enumerate(labels):
        Image.new("RGB", (40, 20), "red").save(folder / "images" / "train" / f"{i}.png")
        if text is not None:
            (folder / "labels" / "train" / f"{i}.txt").write_text(text)
    (folder / "data.yaml").write_text(settings)
    return folder


def test_yolo_boxes(tmp_path):
    folder = write_yolo(tmp_path, ["0 0.625 0.5 0.25 0.5\n1 0.25 0.25 0.5 0.5\n", "", None, "1 0.25 0.25 0.5 0.5"])
    for data in (folder, folder / "data.yaml"):
        rows = open_rows(data)
        assert (rows.kind, len(rows)) == ("yolo-detect", 2)
        assert (rows[0].prefix, rows[0].suffix) == ("detect cat ; dog", BOXES)
        assert rows[0].image == str(folder / "images" / "train" / "0.png") and rows[1].prefix == "detect dog"
        assert "(2 pictures without objects left out)" in rows.note and check(rows, open_pictures=True).ok
    rows = open_rows(folder, every_label=True)
    assert [row.prefix for row in rows] == ["detect cat ; dog"] * 4 and rows[1].suffix == ""


def test_yolo_masks(tmp_path, codec):
    folder = write_yolo(tmp_path, ["1 0 0 0.5 0 0.5 0.5 0 0.5", "0 0.5 0.5 0.2 0.2"])
    assert open_rows(folder)[0].suffix == "<loc0000><loc0000><loc0512><loc0512> dog"
    rows = open_rows(folder, "yolo-segment", codec=codec)
    assert rows[0].prefix == "segment dog" and rows[0].suffix.startswith("<loc0000><loc0000><loc0512><loc0512><seg")
    with pytest.raises(RowError, match="line 1: a box, but masks are asked for"):
        rows[1]


@pytest.mark.parametrize("line, problem, words", [
    ("2 0.5 0.5 0.2 0.2", "box or mask", "class 2, but data.yaml has the classes 0 to 1"),
    ("0 320 200 20 20", "box or mask", "320 is no share of the picture"),
    ("0 0.5 0.5 0 0.2", "box or mask", "has no area"),
    ("0 0.5 0.5 0.2", "box or mask", "3 numbers after the class"),
    ("0 0.5 0.5 0.2 0.2 0.9", "box or mask", "5 numbers after the class"),
    ("cat 0.5 0.5 0.2 0.2", "box or mask", "expected numbers"),
    ("0 0.9 0.5 0.4 0.2", "box outside", "YOLO gives a box by its centre"),
    ("0 nan 0.5 0.4 0.2", "box or mask", "nan is no share"),
    ("nan 0.5 0.5 0.4 0.2", "box or mask", "class nan, but data.yaml has the classes 0 to 1"),
    ("-inf 0.5 0.5 0.4 0.2", "box or mask", "class -inf, but data.yaml has the classes 0 to 1"),
])  # fmt: skip
def test_yolo_labels_that_cannot_be_right(tmp_path, line, problem, words):
    report = check(open_rows(write_yolo(tmp_path, [line, "0 0.5 0.5 0.2 0.2"])))
    assert report.counts == {problem: 1} and words in str(report) and "labels/train/0.txt: line 1" in str(report)


def test_yolo_files_may_begin_as_windows_programs_write_them(tmp_path):
    """With a byte order mark: labels, and a list of pictures."""
    folder = write_yolo(tmp_path, ["\ufeff1 0.25 0.25 0.5 0.5"], "train: list.txt\nnames: [cat, dog]\n")
    (folder / "list.txt").write_text("\ufeffimages/train/0.png\n")
    rows = open_rows(folder)
    assert rows[0].suffix == "<loc0000><loc0000><loc0512><loc0512> dog" and check(rows, open_pictures=True).ok


def test_yolo_pictures_are_all_that_can_be_opened_but_not_what_programs_leave_behind(tmp_path):
    folder = write_yolo(tmp_path, ["0 0.5 0.5 0.2 0.2"] * 2)
    pictures, labels = folder / "images" / "train", folder / "labels" / "train"
    Image.open(pictures / "1.png").save(pictures / "1.jp2")
    (pictures / "1.png").unlink()
    for left in (
        pictures / "._0.png",
        labels / "._0.txt",
        labels / "__MACOSX" / "0.txt",
        pictures / ".trash" / "0.png",
    ):
        left.parent.mkdir(exist_ok=True)
        left.write_bytes(b"0 0.5 0.5 0.2 0.2")
    rows = open_rows(folder)
    assert [Path(row.image).name for row in rows] == ["0.png", "1.jp2"] and check(rows, open_pictures=True).ok


def test_yolo_labels_without_a_picture_are_named(tmp_path):
    folder = write_yolo(tmp_path, ["0 0.5 0.5 0.2 0.2"] * 2)
    (folder / "images" / "train" / "1.png").unlink()
    report = check(open_rows(folder))
    assert report.rows == 2 and report.counts == {"missing picture": 1}


@pytest.mark.parametrize("settings, words", [
    ("train: images/train\n", "expected names"),
    ("names: [a]\n", "names no pictures"),
    ("names: [a]\nnc: 3\ntrain: images/train\n", "says nc: 3, but names has 1"),
    ("names: [a\n", "is not YAML at line"),
    ("names: [a]\ntrain: nowhere\n", "where no pictures are"),
    ("- a\n", "expected keys such as names and train"),
    ("names: {1: a, 2: b}\ntrain: images/train\n", "by number"),
    ("names: [a]\ntrain: images/train\nval: images/train\n", "has the splits train, val: choose one with split="),
    ("names: !!python/object/apply:os.system [echo]\n", "is not YAML"),
    ("names: [a, '']\ntrain: images/train\n", "expected names"),
])  # fmt: skip
def test_a_data_yaml_that_cannot_be_used(tmp_path, settings, words):
    with pytest.raises(ValueError, match=r"data\.yaml") as error:
        open_rows(write_yolo(tmp_path, [""], settings))
    assert words in str(error.value)


def test_classes_of_yolo_are_text(tmp_path):
    """To YAML `on` and `no` are true and false, and 010 is eight."""
    names = "train: images/train\nval: null\ntest: ~\nnc: 4\nnames: [on, no, 010, 1.10]\n"
    folder = write_yolo(tmp_path, ["".join(f"{k} 0.5 0.5 0.2 0.2\n" for k in range(4))], names)
    assert open_rows(folder)[0].prefix == "detect on ; no ; 010 ; 1.10"
    with pytest.raises(ValueError, match=r"--images .*nowhere: there is no such folder"):
        open_rows(folder, images=tmp_path / "nowhere")


def test_a_split_of_yolo_as_roboflow_writes_it(tmp_path):
    folder = write_yolo(tmp_path, [])
    for split in ("train", "valid"):
        (folder / split / "images").mkdir(parents=True)
        (folder / split / "labels").mkdir()
        Image.new("RGB", (4, 4)).save(folder / split / "images" / "a.jpg")
        (folder / split / "labels" / "a.txt").write_text("0 0.5 0.5 0.2 0.2")
    (folder / "data.yaml").write_text("train: ../train/images\nval: ../valid/images\nnames:\n  0: cat\n  1: dog\n")
    assert open_rows(folder, split="val")[0].image == str(folder / "valid" / "images" / "a.jpg")


# -------------------------------------------------------------------------------------------------------------- VOC

VOC = """<annotation><filename>{name}</filename><size><width>40</width><height>20</height><depth>3</depth></size>
{objects}</annotation>"""


def voc_object(label, *box):
    edges = "".join(f"<{name}>{edge}</{name}>" for name, edge in zip(("xmin", "ymin", "xmax", "ymax"), box))
    part = "<part><name>head</name><bndbox><xmin>1</xmin></bndbox></part>"
    return f"<object><name>{label}</name><difficult>0</difficult><bndbox>{edges}</bndbox>{part}</object>"


def write_voc(folder, *objects):
    (folder / "Annotations").mkdir()
    (folder / "JPEGImages").mkdir()
    for i, text in enumerate(objects):
        Image.new("RGB", (40, 20), "red").save(folder / "JPEGImages" / f"{i}.jpg")
        (folder / "Annotations" / f"{i}.xml").write_text(VOC.format(name=f"{i}.jpg", objects=text))
    return folder


def test_pascal_voc(tmp_path):
    both = voc_object("dog", 0, 0, 20, 10) + voc_object("cat", 20, 5, 30, 15)
    folder = write_voc(tmp_path, both, "", voc_object("dog", 0, 0, 20, 10))
    for data in (folder, folder / "Annotations"):
        rows = open_rows(data)
        assert (rows.kind, len(rows)) == ("voc", 2) and check(rows, open_pictures=True).ok
        assert (rows[0].prefix, rows[0].suffix, rows[0].size) == ("detect cat ; dog", BOXES, (40, 20))
        assert rows[1].image == str(folder / "JPEGImages" / "2.jpg")
    assert open_rows(folder / "Annotations" / "0.xml")[0].suffix == BOXES
    assert [row.prefix for row in open_rows(folder, every_label=True)] == ["detect cat ; dog"] * 3
    (folder / "ImageSets" / "Main").mkdir(parents=True)
    (folder / "ImageSets" / "Main" / "val.txt").write_text("2\n")
    assert len(open_rows(folder, split="val")) == 1
    (folder / "ImageSets" / "Main" / "val.txt").write_text("2\n7\n8\n")
    with pytest.raises(ValueError, match=r"val\.txt names 2 pictures without an XML file in .*Annotations \(7, 8\)"):
        open_rows(folder, split="val")
    (folder / "ImageSets" / "Main" / "val.txt").write_text("\n")
    with pytest.raises(ValueError, match=r"val\.txt is empty"):
        open_rows(folder, split="val")


@pytest.mark.parametrize("text, problem, words", [
    (voc_object("dog", 20, 0, 20, 10), "box or mask", "has no area"),
    (voc_object("dog", 20, 0, "x", 10), "box or mask", "expected four numbers (xmin, ymin, xmax, ymax)"),
    (voc_object("", 0, 0, 20, 10), "missing key", "object 0 has no name"),
    ("<object><name>dog</name></object>", "box or mask", "has no bndbox"),
    (voc_object("dog", 0, 0, 60, 10), "box outside", "reaches out of the picture"),
    (voc_object("dog", 0.1, 0.1, 0.5, 0.5), "box or mask", "are they normalised?"),
    ("<object>", "not XML", "not XML: mismatched tag"),
    ('<!DOCTYPE x [<!ENTITY a "b">]><object>&a;</object>', "not XML", "declares a DOCTYPE"),
])  # fmt: skip
def test_voc_objects_that_cannot_be_right(tmp_path, text, problem, words):
    report = check(open_rows(write_voc(tmp_path, text)))
    assert report.counts == {problem: 1} and words in str(report)


def test_only_voc_files_that_say_so_have_no_objects(tmp_path):
    """Not those in another encoding, nor those that are broken."""
    folder = write_voc(tmp_path, voc_object("dog", 0, 0, 20, 10), "", "", "", "")
    annotations = folder / "Annotations"
    in_utf_16 = f'<?xml version="1.0" encoding="UTF-16"?>{(annotations / "0.xml").read_text()}'
    (annotations / "1.xml").write_text(in_utf_16, encoding="utf-16")
    (annotations / "2.xml").write_text("")
    (annotations / "3.xml").write_text(in_utf_16.replace("<annot", "<!DOCTYPE a><annot"), encoding="utf-16")
    rows = open_rows(folder)
    assert "4 rows (1 pictures without objects left out)" in rows.note and rows[1].suffix == rows[0].suffix
    report = check(rows)
    assert report.counts == {"not XML": 2} and "2.xml: not XML: no element found" in str(report)
    assert "3.xml: it declares a DOCTYPE" in str(report)


def test_the_size_in_voc_is_compared_with_the_picture(tmp_path):
    folder = write_voc(tmp_path, voc_object("dog", 0, 0, 20, 10))
    Image.new("RGB", (20, 40)).save(folder / "JPEGImages" / "0.jpg")
    assert check(open_rows(folder)).counts == {"another size": 1}


# ---------------------------------------------------------------------------------------------------------- LabelMe


def labelme(*shapes, **changes):
    return {
        "version": "5.0.1", "flags": {}, "shapes": list(shapes), "imagePath": "a.png", "imageData": None,
        "imageHeight": 20, "imageWidth": 40, **changes,
    }  # fmt: skip


def shape(label, points, kind="polygon", group=None):
    return {"label": label, "points": points, "group_id": group, "shape_type": kind, "flags": {}}


DOG = shape("dog", [[0, 0], [20, 10]], "rectangle")
CAT = shape("cat", [[20, 5], [30, 5], [30, 15], [20, 15]])


def test_labelme(folder, codec):
    (folder / "a.json").write_text(json.dumps(labelme(DOG, CAT), indent=2))
    (folder / "b.json").write_text(json.dumps(labelme(imagePath="b.png")))
    rows = open_rows(folder)
    assert (rows.kind, len(rows)) == ("labelme-detect", 1) and check(rows, open_pictures=True).ok
    assert (rows[0].prefix, rows[0].suffix) == ("detect cat ; dog", BOXES)
    assert open_rows(folder / "a.json")[0].suffix == BOXES
    (row,) = open_rows(folder, "labelme-segment", codec=codec)
    assert row.prefix == "segment cat ; dog" and row.suffix.count("<seg") == 32
    assert [row.suffix for row in open_rows(folder, every_label=True)] == [BOXES, ""]


def test_pictures_without_objects_are_left_out_where_labelme_writes_the_picture_first(folder):
    data = base64.b64encode(bytes(100_000)).decode()
    for name, shapes in {"a": [DOG], "b": []}.items():
        content = {"imageData": data, **labelme(*shapes)} | {"imageData": data}
        (folder / f"{name}.json").write_text(json.dumps(content))
    rows = open_rows(folder, "labelme-detect")
    assert [row.prefix for row in rows] == ["detect dog"] and "(1 pictures without objects left out)" in rows.note
    (folder / "a.json").unlink()
    with pytest.raises(RowError, match="no object, and so no label to ask for"):  # in the whole data set
        open_rows(folder, "labelme-detect", every_label=True)[0]


def test_a_picture_inside_a_file_of_labelme(folder):
    data = base64.b64encode((folder / "a.png").read_bytes()).decode()
    (folder / "a.json").write_text(json.dumps(labelme(DOG, imagePath="gone.png", imageData=data)))
    rows = open_rows(folder / "a.json")
    assert rows[0].image == (folder / "a.png").read_bytes() and check(rows, open_pictures=True).ok


def test_parts_of_one_object_of_labelme(folder):
    parts = [shape("dog", [[0, 0], [10, 0], [10, 10]], group=1), shape("dog", [[10, 0], [20, 0], [20, 10]], group=1)]
    (folder / "a.json").write_text(json.dumps(labelme(*parts)))
    assert open_rows(folder)[0].suffix == "<loc0000><loc0000><loc0512><loc0512> dog"


@pytest.mark.parametrize("bad, problem, words", [
    (shape("dog", [[0, 0], [20, 10]]), "box or mask", "shapes[0]: its polygon has 2 corners"),
    (shape("dog", [[3, 4]], "point"), "box or mask", "a shape of the type 'point' has no area"),
    (shape("dog", [[3, 4], [3, 9]], "rectangle"), "box or mask", "has no area"),
    (shape("dog", [[3, None], [3, 9]], "rectangle"), "box or mask", "a rectangle has two points"),
    (shape("dog", [1, 2], "rectangle"), "box or mask", "a rectangle has two points, got"),
    (shape("dog", None), "box or mask", "its polygon is None"),
    (shape("", [[0, 0]]), "missing key", "shapes[0] has no label"),
    (3, "missing key", "shapes[0] has no label: 3"),
])  # fmt: skip
def test_shapes_that_cannot_be_right(folder, bad, problem, words):
    (folder / "a.json").write_text(json.dumps(labelme(bad)))
    report = check(open_rows(folder))
    assert report.counts == {problem: 1} and words in str(report)


# --------------------------------------------------------------------------------------------------- folders of classes


def test_folders_of_classes_and_of_splits(tmp_path):
    for split in ("train", "test"):
        for name in ("daisy", "rose"):
            (tmp_path / split / name).mkdir(parents=True)
            Image.new("RGB", (4, 4)).save(tmp_path / split / name / "1.jpg")
    rows = open_rows(tmp_path / "train")
    assert (rows.kind, len(rows)) == ("class-folders", 2) and check(rows, open_pictures=True).ok
    assert [(row.prefix, row.suffix) for row in rows] == [
        ("answer en what is this?", "daisy"), ("answer en what is this?", "rose"),
    ]  # fmt: skip
    with pytest.raises(ValueError, match="has the splits train, test: choose one with split="):
        open_rows(tmp_path)
    assert open_rows(tmp_path, split="test", language="de")[1].prefix == "answer de what is this?"


def test_classes_are_folders_that_people_made_and_what_is_left_out_is_told(tmp_path):
    names = ["cat/1.jfif", "cat/._1.jpg", "dog/2.jp2", "dog/puppies/3.png", "4.png", "__MACOSX/5.png", ".thumbs/6.png"]
    for name in (*names, "dog/notes.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    rows = open_rows(tmp_path)
    assert [(row.suffix, Path(row.image).name) for row in rows] == [("cat", "1.jfif"), ("dog", "2.jp2")]
    assert rows.note.endswith("folders of 2 classes, 2 rows (3 files left out: not pictures right in a class's folder)")
    alone = open_rows(tmp_path / "cat" / "1.jfif", "class-folders")
    assert alone.note.endswith("1 rows")


def test_a_split_in_a_folder_below(folder):
    for split in ("train", "valid"):
        (folder / split).mkdir()
        shutil.copy(folder / "a.png", folder / split)
        write_lines(folder / split, good(suffix=split))
    assert open_rows(folder, split="valid")[0].suffix == "valid"
    with pytest.raises(ValueError, match="has no split 'test'; it has train, valid"):
        open_rows(folder, split="test")


# -------------------------------------------------------------------------------------------------------------- CSV


@pytest.mark.parametrize("text, prefix, suffix", [
    ("filename,caption\na.png,a dog\n", "caption en", "a dog"),
    ("Filename;Caption\na.png;a dog\n", "caption en", "a dog"),
    ("filename,text\na.png,a dog\n", "caption en", "a dog"),
    ("image_path,label\na.png,dog\n", "answer en what is this?", "dog"),
    ("img,question,answer\na.png,what is it?,a dog\n", "answer en what is it?", "a dog"),
    ("path,class\na.png,7\n", "answer en what is this?", "7"),
])  # fmt: skip
def test_the_usual_headers_of_a_table(folder, text, prefix, suffix):
    (folder / "x.csv").write_text(text)
    (row,) = open_rows(folder / "x.csv")
    assert (row.image, row.prefix, row.suffix) == (str(folder / "a.png"), prefix, suffix)


@pytest.mark.parametrize("header, sizes", [
    ("filename,class,xmin,ymin,xmax,ymax,width,height", ",40,20"), ("image,label,xmin,ymin,xmax,ymax,more,more2", ",,"),
])  # fmt: skip
def test_a_table_of_boxes_is_a_row_for_each_picture(folder, header, sizes):
    lines = ["a.png,dog,0,0,20,10", "b.png,dog,0,0,20,10", "a.png,cat,20,5,30,15"]
    (folder / "x.csv").write_text("\n".join([header, *(line + sizes for line in lines)]))
    rows = open_rows(folder / "x.csv")
    assert [row.image for row in rows] == [str(folder / "a.png"), str(folder / "b.png")] and check(rows).ok
    assert (rows[0].prefix, rows[0].suffix, rows[0].size) == ("detect cat ; dog", BOXES, (40, 20))


@pytest.mark.parametrize("line, problem, words", [
    ("b.png,dog,9,0,9,10", "box or mask", "x.csv:3: the box of 'dog' has no area"),
    ("b.png,dog,9,0,x,10", "box or mask", "expected four numbers"),
    ("b.png,,9,0,19,10", "missing key", "no label"),
    ("gone.png,dog,9,0,19,10", "missing picture", "whose size the boxes need"),
    ("b.png,dog,9,0,19", "missing key", "5 cells, but the header has 6"),
])  # fmt: skip
def test_lines_of_boxes_that_cannot_be_right(folder, line, problem, words):
    (folder / "x.csv").write_text(f"filename,class,xmin,ymin,xmax,ymax\na.png,dog,0,0,20,10\n{line}\n")
    report = check(open_rows(folder / "x.csv"))
    assert report.rows == 2 and report.counts == {problem: 1} and words in str(report)


# ---------------------------------------------------------------------------------------------------- conversations

LLAVA = {
    "id": "1", "image": "a.png",
    "conversations": [
        {"from": "human", "value": "<image>\nwhat is it?"}, {"from": "gpt", "value": "a dog"},
        {"from": "human", "value": "detect dog"}, {"from": "gpt", "value": "<loc0000><loc0000><loc0512><loc0512> dog"},
    ],
}  # fmt: skip
MESSAGES = {
    "images": ["b.png"],
    "messages": [
        {"role": "system", "content": "be kind"}, {"role": "user", "content": "<image>what is it?"},
        {"role": "assistant", "content": "a cat"},
    ],
}  # fmt: skip
PARTS = {
    "messages": [
        {"role": "user", "content": [{"type": "image", "image": "b.png"}, {"type": "text", "text": "what is it?"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "a cat"}]},
    ]
}


@pytest.mark.parametrize("as_list", [True, False])
def test_conversations_are_asked_question_by_question(folder, as_list):
    records = [LLAVA, MESSAGES, PARTS, good(prefix="caption en")]
    path = write_lines(folder, *records)
    if as_list:
        path = folder / "x.json"
        path.write_text(json.dumps(records))
    rows = open_rows(path)
    assert rows.note.endswith("5 questions of 4 conversations")
    assert [(row.prefix, row.suffix) for row in rows] == [
        ("answer en what is it?", "a dog"),
        ("detect dog", "<loc0000><loc0000><loc0512><loc0512> dog"),
        ("answer en what is it?", "a cat"),
        ("answer en what is it?", "a cat"),
        ("caption en", "a dog"),
    ]
    assert [row.image for row in rows] == [str(folder / name) for name in ("a.png", "a.png", "b.png", "b.png", "a.png")]
    assert rows[1].source.endswith(" question 1") and not rows[2].source.endswith("question 0")
    report = check(rows, open_pictures=True)
    assert report.ok and "1 conversation has a system message" in str(report)


@pytest.mark.parametrize("turns, problem, words", [
    ([{"from": "human", "value": "x"}], "missing key", "no question with an answer"),
    ([{"from": "gpt", "value": "x"}], "wrong type", "turn 0 is by 'gpt'"),
    ([*LLAVA["conversations"], {"from": "human", "value": "and?"}], "missing key", "a question without an answer"),
    ([{"from": "human", "value": "<image><image>x"}, {"from": "gpt", "value": "y"}], "missing picture", "2 times"),
    (["x"], "wrong type", "turn 0 is 'x'"),
    ([{"from": "human", "value": 3}], "wrong type", "turn 0 is"),
])  # fmt: skip
def test_conversations_that_are_none(folder, turns, problem, words):
    report = check(open_rows(write_lines(folder, {"image": "a.png", "conversations": turns})))
    assert report.counts == {problem: 1} and words in str(report)


def conversation(*parts, **columns):
    content = list(parts) or "what is it?"
    turns = [{"role": "user", "content": content}, {"role": "assistant", "content": "a dog"}]
    return {**columns, "messages": turns}


TEXT = {"type": "text", "text": "what is it?"}
DATA_URL = "data:image/png;base64," + base64.b64encode(b"the picture").decode()


@pytest.mark.parametrize("record", [
    conversation(image_path="a.png"), conversation(FileName="a.png"), conversation(file_name="a.png"),
    conversation({"type": "image_url", "image_url": {"url": "a.png"}}, TEXT),
    conversation({"type": "image_url", "image_url": "a.png"}, TEXT),
    conversation({"type": "image", "path": "a.png"}, TEXT),
    conversation({"type": "image", "text": None}, {**TEXT, "image": None}, images=["a.png"]),  # as Arrow fills them
    conversation({"type": "image"}, TEXT, path="a.png"),
    conversation(image_path="a.png", answers=["b"], objects=["dog"], suffix=None, caption=3),  # other columns
])  # fmt: skip
def test_where_a_conversation_has_its_picture(folder, record):
    (row,) = open_rows(write_lines(folder, record))
    assert (row.image, row.prefix, row.suffix) == (str(folder / "a.png"), "answer en what is it?", "a dog")
    assert row.suffixes == ()


def test_a_conversation_whose_picture_is_named_by_other_columns(folder):
    path = write_lines(folder, conversation(id="a", path="somewhere"), conversation(id="b", image="b.png"))
    assert [row.image for row in open_rows(path, image_name="{id}.png")] == [
        str(folder / "a.png"),
        str(folder / "b.png"),
    ]


def test_a_conversation_with_the_picture_itself(folder):
    (row,) = open_rows(write_lines(folder, conversation({"type": "image_url", "image_url": {"url": DATA_URL}}, TEXT)))
    assert row.image == b"the picture"


def test_a_conversation_without_a_picture_says_so(folder):
    rows = open_rows(write_lines(folder, conversation(image=None), conversation(images=[]), conversation(id="a")))
    assert rows[0].image is rows[1].image is None
    with pytest.raises(RowError, match="no image: expected a path in 'image'"):
        rows[2]


@pytest.mark.parametrize("record, problem, words", [
    (conversation({"type": "video", "path": "a.mp4"}, TEXT), "wrong type", "turn 0: part 0 is {'type': 'video'"),
    (conversation("what is it?"), "wrong type", "part 0 is 'what is it?', expected a text or a picture"),
    (conversation({"type": "text"}), "wrong type", "part 0 is"),
    (conversation({"type": "image_url"}, TEXT), "wrong type", "part 0 is"),
    (conversation({"type": "image"}, {"type": "image"}, TEXT, image="a.png"), "missing picture", "2 times <image>"),
    (conversation({"type": "image"}, {"type": "image"}, TEXT, path="a.png"), "missing picture", "2 times <image>"),
    (conversation({"type": "image"}, TEXT, image=None), "missing picture", "but 0 pictures"),
    (conversation({"type": "image_url", "image_url": "data:image/png;base64,?"}, TEXT), "unreadable picture", "base64"),
    (conversation(image=""), "wrong type", "the image is ''"),
])  # fmt: skip
def test_parts_that_are_neither_text_nor_picture(folder, record, problem, words):
    report = check(open_rows(write_lines(folder, {"image": None, **record} if "video" in str(record) else record)))
    assert report.counts == {problem: 1} and words in str(report)
