"""Small data sets that once were trained on without a word, though something in them was wrong (`cases/`)."""

import json
import shutil
from pathlib import Path

import pytest
from PIL import Image

from paligemma.answers.mask_codec import CODEC_FILE, MaskCodec
from paligemma.data.check import check
from paligemma.data.masks import is_one_piece
from paligemma.data.options import open_rows
from paligemma.data.rows import RowError
from paligemma.weights.finding import TINY

CASES = Path(__file__).parent / "cases"


@pytest.fixture(scope="module")
def codec():
    return MaskCodec.load(TINY / CODEC_FILE)


def numbers_of(report):
    """Rows that have a problem, by number."""
    return sorted({found.row for group in report.first.values() for found in group})


# ---------------------------------------------------------------------------------------------------------- 1 sizes


def test_a_picture_that_exif_turns_is_not_the_one_that_was_annotated():
    report = check(open_rows(CASES / "exif.json"))
    assert report.counts == {"turned by EXIF": 1} and not report.ok
    text = str(report)
    assert "the annotation says 320 x 240" in text and "upright it is 240 x 320" in text
    assert "row 0, " in text and text.endswith("rows/s)") and "1 of 1 rows have a problem" in text


def annotated(folder, width, height, picture, orientation=None, bbox=(4, 5, 8, 10)):
    exif = Image.Exif()
    if orientation:
        exif[0x0112] = orientation
    Image.new("RGB", picture, "red").save(folder / "a.jpg", exif=exif)
    document = {
        "images": [{"id": 1, "file_name": "a.jpg", "width": width, "height": height}],
        "categories": [{"id": 1, "name": "car"}],
        "annotations": [{"id": 1, "image_id": 1, "category_id": 1, "bbox": list(bbox)}],
    }
    (folder / "a.json").write_text(json.dumps(document))
    return check(open_rows(folder / "a.json"))


@pytest.mark.parametrize("size, picture, orientation, problem, words", [
    ((40, 30), (40, 30), None, None, ""),
    ((30, 40), (40, 30), 6, None, ""),  # annotated upright
    ((40, 30), (40, 30), 6, "turned by EXIF", "upright it is 30 x 40"),
    ((40, 30), (30, 40), None, "another size", "the picture is 30 x 40 (width and height are swapped)"),
    ((40, 30), (50, 50), None, "another size", "the annotation says 40 x 30, the picture is 50 x 50"),
    ((40, 30), (80, 60), None, None, "1 picture is larger or smaller than its annotation says"),
    ((40, 30), (30, 22), None, None, "1 picture is larger or smaller"),  # reduced and rounded
    ((60, 80), (40, 30), 6, None, "1 picture is larger or smaller"),
    ((40, 30), (40, 30), 3, None, "whether the boxes of 1 rows belong to the upright picture"),
    ((40, 40), (40, 40), 6, None, "whether the boxes of 1 rows belong to the upright picture"),
])  # fmt: skip
def test_the_size_of_an_annotation_is_compared_with_the_upright_picture(
    tmp_path, size, picture, orientation, problem, words
):
    report = annotated(tmp_path, *size, picture, orientation)
    assert set(report.counts) == ({problem} if problem else set()), str(report)
    assert words in str(report)


@pytest.mark.parametrize("bbox, words", [
    ((0.1, 0.2, 0.3, 0.4), "all boxes lie within [0, 1]: are they normalised?"),
    ((20, 10, 39, 29), "read as corners x0, y0, x1, y1 it would lie inside"),
    ((30, 20, 20, 10), "read as the centre, width and height"),
    ((2, 25, 4, 12), "read as y, x, height, width"),
])  # fmt: skip
def test_boxes_of_another_form_are_seen_where_they_can_be(tmp_path, bbox, words):
    report = annotated(tmp_path, 40, 30, (40, 30), bbox=bbox)
    assert report.bad_rows == 1 and words in str(report)


def test_a_box_is_compared_with_the_polygon_beside_it(tmp_path):
    document = json.loads((CASES / "poly.json").read_text())
    document["annotations"] = document["annotations"][:1]
    document["annotations"][0]["bbox"] = [40, 50, 120, 150]  # corners instead of width and height
    (tmp_path / "x.json").write_text(json.dumps(document))
    report = check(open_rows(tmp_path / "x.json", images=CASES))
    assert report.counts == {"box or mask": 1}
    assert "the box 40, 50, 160, 200 of 'car' is not that of its mask, which is 40, 50, 120, 150" in str(report)


# --------------------------------------------------------------------------------------------------------- 2 crowds


@pytest.mark.parametrize("kind", ["coco-detect", "coco-segment"])
def test_single_objects_marked_as_crowds_are_taken(codec, kind):
    rows = open_rows(CASES / "cvat_mixed.json", kind, codec=codec)
    report = check(rows)
    assert (
        report.ok and len(rows) == 3 and "2 single objects among those marked as crowds (iscrowd): taken" in rows.note
    )
    assert len({row.suffix for row in rows}) == 1, "a polygon and run lengths of the same object"


def crowds(folder, **changes):
    document = json.loads((CASES / "cvat_mixed.json").read_text())
    document["annotations"] = [{**document["annotations"][1], **changes}]
    document["annotations"][0].pop("attributes")
    (folder / "x.json").write_text(json.dumps(document))
    return open_rows(folder / "x.json", images=CASES)


def test_a_mask_in_one_piece_is_one_object_and_cocos_own_crowds_stay_crowds(tmp_path):
    assert len(crowds(tmp_path)) == 1
    assert len(crowds(tmp_path, id=900_100_000_000)) == 0
    two_pieces = {"size": [240, 320], "counts": [100, 10, 500, 10, 76180]}
    rows = crowds(tmp_path, segmentation=two_pieces)
    assert len(rows) == 0 and "1 crowds" in rows.note


@pytest.mark.parametrize("rows, pieces", [
    (["110", "011", "001"], 1), (["101", "101", "111"], 1), (["110", "001", "000"], 1), (["101", "000", "101"], 4),
    (["000", "000", "000"], 0), (["111", "111", "111"], 1), (["100", "000", "001"], 2),
])  # fmt: skip
def test_pieces_are_counted_on_run_lengths(rows, pieces):
    import numpy as np

    from paligemma.answers.formats import rle_encode

    mask = np.array([[cell == "1" for cell in row] for row in rows])
    assert is_one_piece(rle_encode(mask)["counts"], 3) == (pieces == 1)


def test_no_rows_is_never_a_success(tmp_path):
    report = check(crowds(tmp_path, segmentation={"size": [240, 320], "counts": [100, 10, 500, 10, 76180]}))
    assert not report.ok and "0 of 0 rows have a problem" in str(report)
    assert "there are no rows: nothing to train on or to measure" in str(report)


# ------------------------------------------------------------------------------------------------ 3 degenerate values


def test_polygons_that_are_none_are_named_and_pairs_are_read(tmp_path, codec):
    for i in range(6):
        shutil.copy(CASES / "0.png", tmp_path / f"{i}.png")
    shutil.copy(CASES / "poly.json", tmp_path)
    rows = open_rows(tmp_path / "poly.json", "coco-segment", codec=codec)
    report = check(rows, show=9)
    assert numbers_of(report) == [1, 2, 4, 5] and report.counts == {"box or mask": 4}
    assert [found.message for found in report.first["box or mask"]] == [
        "annotations[1]: its polygon has 2 corners, expected three or more",
        "annotations[2]: it has no segmentation: polygons or run lengths are needed for a mask",
        "annotations[4]: its segmentation is a flat list, expected a list of polygons: [[x0, y0, x1, y1, ...], ...]",
        "annotations[5]: the box of 'car' has no area: its corners are 0, 0, 0, 0 (x0, y0, x1, y1)",
    ]
    assert "note: 1 row has polygons in pairs [x, y], which COCO writes flat: read" in str(report)
    triangle = rows[3]
    assert triangle.suffix.startswith("<loc0213><loc0128><loc0640><loc0384><seg") and triangle.suffix.endswith(" car")


def test_boxes_that_are_none_are_named():
    report = check(open_rows(CASES / "zero.json"), show=99)
    assert numbers_of(report) == [0, 1, 2, 3, 4, 5, 6, 9, 10]
    assert report.counts == {"box or mask": 7, "box outside": 2}
    messages = [found.message for found in report.first["box or mask"]]
    assert all("no area" in message for message in messages[:4])
    assert all("expected four numbers" in message for message in messages[4:])


@pytest.mark.parametrize("segmentation, words", [
    ({"size": [240, 320], "counts": [76800]}, "its mask has no pixels"),
    ({"size": [240, 320], "counts": [1, 2]}, "the runs cover 3 pixels"),
    ({"size": [240, 320], "counts": None}, "the counts of its mask are None, expected run lengths"),
    ({"size": [240, 320], "counts": ["x"]}, "the counts of its mask are ['x'], expected run lengths"),
    ({"size": [240, 320]}, "the counts of its mask are None"),
    ({"size": 240, "counts": [76800]}, "its mask is 240, the picture [240, 320]"),
    ({"size": [240, 320], "counts": "é"}, "its packed mask contains 'é'"),
    ([[500, 500, 510, 500, 510, 510]], "is not that of its mask, which is 500, 500, 510, 510"),
    ([[40, 50, 120, 50, 120]], "its polygon has 5 numbers, expected x and y of each corner"),
    ([[40, 50, 120, 50, None, 3]], "expected numbers x0, y0, x1, y1, ..."),
    ([[[40, 50], [120, 50]]], "its polygon has 2 corners"),
    ([[]], "its polygon has 0 corners"),
    ("x", "it has no segmentation"),
    (None, "it has no segmentation"),
])  # fmt: skip
def test_masks_that_are_none_are_named_in_our_words(tmp_path, codec, segmentation, words):
    document = json.loads((CASES / "poly.json").read_text())
    document["annotations"] = [{**document["annotations"][0], "segmentation": segmentation}]
    (tmp_path / "x.json").write_text(json.dumps(document))
    with pytest.raises(RowError) as error:
        open_rows(tmp_path / "x.json", "coco-segment", codec=codec)[0]
    assert error.value.problem == "box or mask" and words in str(error.value)


# --------------------------------------------------------------------------------------------------- 4, 5 prompts


def test_a_question_that_is_a_prompt_is_kept():
    rows = open_rows(CASES / "r1.jsonl")
    report = check(rows)
    assert [row.prefix for row in rows] == ["detect nucleus"] * 6 and report.ok
    assert "note: 6 questions are already prompts: kept as they are" in str(report)


@pytest.mark.parametrize("question, answer, prefix", [
    ("detect nucleus", "<loc0213><loc0128><loc0640><loc0384> nucleus", "detect nucleus"),
    ("detect nucleus", "", "detect nucleus"),
    ("answer en what is it?", "a dog", "answer en what is it?"),
    ("caption de", "ein Hund", "caption de"),
    ("ocr", "STOP", "ocr"),
    ("detect any fraud?", "no", "answer en detect any fraud?"),
    ("segment the market", "by age", "answer en segment the market"),
    ("caption this", "a dog", "answer en caption this"),
    ("describe the dog", "brown", "answer en describe the dog"),
    ("what is detected?", "a dog", "answer en what is detected?"),
])  # fmt: skip
def test_what_is_a_prompt(tmp_path, question, answer, prefix):
    (tmp_path / "x.jsonl").write_text(json.dumps({"image": None, "question": question, "answer": answer}))
    (row,) = open_rows(tmp_path / "x.jsonl")
    assert row.prefix == prefix and row.notes == (("prompt kept",) if prefix == question else ())


def test_labels_that_the_prompt_does_not_ask_for():
    report = check(open_rows(CASES / "label.jsonl"), show=9)
    assert report.counts == {"label not asked for": 4}
    assert [found.message for found in report.first["label not asked for"]] == [
        "the answer says 'fractured', the prompt asks for 'fracture'",
        "the answer says 'Plate', the prompt asks for 'license plate'",
        "the answer says 'car , bus', the prompt asks for 'car', 'bus'",
        "the answer says 'car', the prompt asks for 'car, bus': 'car, bus' is one label, several are parted by ' ; '",
    ]


def test_a_root_category_is_not_asked_for():
    rows = open_rows(CASES / "roboflow_root_category.coco.json", every_label=True)
    assert [row.prefix for row in rows] == ["detect 7 of clubs ; 8 of clubs"] * 3
    assert "not asked for: 'cards-kXyZ', which no annotation has" in rows.note
    assert check(rows).ok


# ------------------------------------------------------------------------------------- 14, 16, 18 files that misbehave


def test_an_arrow_file_with_broken_offsets_is_refused(paligemma_command):
    pytest.importorskip("pyarrow")
    code, out, err = paligemma_command("data", "check", CASES / "bad-offsets.arrow", "--kind", "arrow")
    assert (code, out) == (1, "")
    assert "bad-offsets.arrow is not a parquet or Arrow file that can be read" in " ".join(err.split())


def test_annotations_that_have_questions_of_their_own_are_refused():
    with pytest.raises(
        ValueError, match=r"both\.json holds 1 questions beside 1 annotations, .*q\.json has 1 questions"
    ):
        open_rows(CASES / "vqa" / "q.json", annotations=CASES / "vqa" / "both.json")
    assert len(open_rows(CASES / "vqa" / "both.json", "vqa")) == 1


@pytest.mark.skipif(not Path("/dev/zero").exists(), reason="no such device here")
def test_a_device_is_no_data(tmp_path):
    (tmp_path / "link.jsonl").symlink_to("/dev/zero")
    for path in ("/dev/zero", tmp_path / "link.jsonl"):
        with pytest.raises(ValueError, match="is a device or a pipe, expected a file or a folder"):
            open_rows(path)
    with pytest.raises(ValueError, match="is a device or a pipe"):
        open_rows(CASES / "vqa" / "q.json", annotations="/dev/zero")


def test_a_pipe_is_not_waited_for(tmp_path):
    import os

    os.mkfifo(tmp_path / "x.jsonl")
    with pytest.raises(ValueError, match="is a device or a pipe"):
        open_rows(tmp_path / "x.jsonl")


def test_names_of_files_do_not_steer_the_terminal(tmp_path):
    path = tmp_path / "x\x1b[2J.jsonl"
    path.write_text(json.dumps({"image": "y\x1b]0;z\x07.png", "prefix": "a", "suffix": "b\x1b"}) + "\n{\n")
    text = str(check(open_rows(path)))
    assert "\x1b" not in text and "\x07" not in text
    assert r"x\x1b[2J.jsonl:1: no picture at" in text and r"y\x1b]0;z\x07.png" in text
