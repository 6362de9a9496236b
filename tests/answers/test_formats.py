"""Results in the formats of other tools: checked against those tools where they are installed."""

import json
import sys
import types
import xml.etree.ElementTree as ElementTree
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from PIL import Image, ImageDraw

from paligemma.answers.formats import (
    outline,
    rle_decode,
    rle_encode,
    to_coco_results,
    to_dicts,
    to_supervision,
    to_voc,
    to_yolo,
)
from paligemma.answers.results import Detection, Segment

masks = hnp.arrays(bool, st.tuples(st.integers(1, 9), st.integers(1, 9)))

MASK = np.zeros((100, 200), bool)
MASK[20:40, 50:90] = True
DOG = Detection("dog", (10.5, 20.0, 60.5, 80.0), score=0.75)
CAT = Segment("cat", (50.0, 20.0, 90.0, 40.0), mask=MASK, codes=[0] * 16, score=0.5)
BARE = Segment("cat", (50.0, 20.0, 90.0, 40.0), codes=[0] * 16)


def test_run_lengths_go_down_the_columns_and_begin_outside():
    mask = np.array([[0, 1, 1], [0, 1, 0]], bool)
    assert rle_encode(mask) == {"size": [2, 3], "counts": [2, 3, 1]}
    assert rle_encode(~mask) == {"size": [2, 3], "counts": [0, 2, 3, 1]}
    assert rle_encode(np.zeros((2, 2), bool)) == {"size": [2, 2], "counts": [4]}


@given(masks)
def test_run_lengths_can_be_undone(mask):
    rle = json.loads(json.dumps(rle_encode(mask)))
    assert np.array_equal(rle_decode(rle), mask)


def test_run_lengths_that_do_not_fit_are_refused():
    for counts in ([3], [5], [-1, 5], []):
        with pytest.raises(ValueError, match="2 x 2"):
            rle_decode({"size": [2, 2], "counts": counts})


@given(masks)
@settings(max_examples=50)
def test_run_lengths_are_those_of_coco(mask):
    coco = pytest.importorskip("faster_coco_eval").mask
    rle = rle_encode(mask)
    theirs = coco.frPyObjects([rle], *rle["size"])
    assert np.array_equal(coco.decode(theirs)[:, :, 0], mask)
    assert theirs[0]["counts"] == coco.encode(np.asfortranarray(mask.astype(np.uint8)))["counts"]


def test_dicts_are_plain_json():
    rows = to_dicts([DOG, CAT, BARE, Detection("", (np.float32(1), 2, 3, 4))])
    assert json.loads(json.dumps(rows)) == rows
    assert rows[0] == {"label": "dog", "box": [10.5, 20.0, 60.5, 80.0], "score": 0.75}
    assert set(rows[1]) == {"label", "box", "score", "mask"}
    assert np.array_equal(rle_decode(rows[1]["mask"]), MASK)
    assert rows[2]["mask"] is None and rows[2]["score"] is None
    assert to_dicts([]) == []


def test_coco_results():
    rows = to_coco_results([DOG, CAT, BARE, Detection("ghost", (0, 0, 1, 1))], 7, {"dog": 18, "cat": 17})
    assert rows[0] == {"image_id": 7, "category_id": 18, "bbox": [10.5, 20.0, 50.0, 60.0], "score": 0.75}
    assert rows[1]["category_id"] == 17 and rows[1]["segmentation"]["size"] == [100, 200]
    assert rows[2]["score"] == 1.0 and "segmentation" not in rows[2]
    assert len(rows) == 3  # what is not a category cannot be in the file


@pytest.mark.parametrize("kind", ["bbox", "segm"])
def test_coco_evaluation_takes_the_results(kind):
    """Two objects, one found with a perfect box and mask, one missed: half of the recall, all of the precision."""
    tools = pytest.importorskip("faster_coco_eval")
    other = np.zeros_like(MASK)
    other[60:90, 100:150] = True
    truth = tools.COCO(
        {
            "images": [{"id": 7, "width": 200, "height": 100}],
            "categories": [{"id": 17, "name": "cat"}],
            "annotations": [
                {"id": i, "image_id": 7, "category_id": 17, "iscrowd": 0, "bbox": box, "area": int(mask.sum())}
                | {"segmentation": rle_encode(mask)}
                for i, (box, mask) in enumerate((([50, 20, 40, 20], MASK), ([100, 60, 50, 30], other)), start=1)
            ],
        }
    )
    found = truth.loadRes(json.loads(json.dumps(to_coco_results([CAT], 7, {"cat": 17}))))
    evaluation = tools.COCOeval_faster(truth, found, kind)
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    assert evaluation.stats[0] == pytest.approx(51 / 101)  # 101 recall steps, precision 1 up to recall 0.5
    assert evaluation.stats[8] == pytest.approx(0.5)


def test_yolo_lines():
    lines = to_yolo([DOG, CAT, BARE, Detection("ghost", (0, 0, 1, 1))], (200, 100), ["cat", "dog"])
    assert lines[0] == "1 0.177500 0.500000 0.250000 0.600000"
    rectangle = "0 0.250000 0.200000 0.450000 0.200000 0.450000 0.400000 0.250000 0.400000"
    assert lines[1] == rectangle  # the outline of the mask
    assert lines[2] == rectangle  # of the box, for want of a mask
    assert len(lines) == 3
    assert to_yolo([Detection("dog", (-10, -10, 300, 50))], (200, 100), ["dog"]) == [
        "0 0.500000 0.250000 1.000000 0.500000"
    ]


def test_outline_of_simple_shapes():
    assert outline(np.ones((2, 3), bool)).tolist() == [[0, 0], [3, 0], [3, 2], [0, 2]]
    ell = np.array([[1, 0], [1, 1]], bool)
    assert outline(ell).tolist() == [[0, 0], [1, 0], [1, 1], [2, 1], [2, 2], [0, 2]]
    ring = np.ones((3, 3), bool)
    ring[1, 1] = False
    assert outline(ring).tolist() == [[0, 0], [3, 0], [3, 3], [0, 3]]  # the hole has no say
    assert outline(np.eye(2, dtype=bool)).tolist() == [[0, 0], [1, 0], [1, 1], [0, 1]]  # a corner does not connect
    assert outline(np.zeros((4, 4), bool)).shape == (0, 2)


SIDES = [(0, 1), (0, -1), (1, 0), (-1, 0)]
CORNERS = [(1, 1), (1, -1), (-1, 1), (-1, -1)]


def parts(mask, neighbours):
    """The connected parts of a mask, by flooding."""
    left, found = mask.copy(), []
    while left.any():
        part, new = np.zeros_like(mask), [tuple(np.argwhere(left)[0])]
        while new:
            y, x = new.pop()
            if 0 <= y < mask.shape[0] and 0 <= x < mask.shape[1] and left[y, x]:
                left[y, x], part[y, x] = False, True
                new += [(y + dy, x + dx) for dy, dx in neighbours]
        found.append(part)
    return found


def without_holes(part):
    outside = next(p for p in parts(np.pad(~part, 1, constant_values=True), SIDES + CORNERS) if p[0, 0])
    return ~outside[1:-1, 1:-1]


@given(masks)
@settings(max_examples=200)
def test_outline_encloses_exactly_the_largest_part(mask):
    points = outline(mask)
    filled = [without_holes(part) for part in parts(mask, SIDES)]
    if not filled:
        assert not len(points)
        return
    # Draw the polygon four times as large: the centre of every pixel is then well inside or well outside.
    picture = Image.new("1", (mask.shape[1] * 4, mask.shape[0] * 4))
    ImageDraw.Draw(picture).polygon([tuple(point) for point in (points * 4).tolist()], fill=1)
    drawn = np.asarray(picture)[2::4, 2::4]
    assert drawn.sum() == max(part.sum() for part in filled)
    assert any(np.array_equal(drawn, part) for part in filled)


def test_supervision_detections(monkeypatch):
    """Against a stand-in with the same constructor; the package itself is large and not needed for anything else."""

    class Detections(types.SimpleNamespace):
        @classmethod
        def empty(cls):
            return cls(xyxy=np.empty((0, 4)))

    monkeypatch.setitem(sys.modules, "supervision", types.SimpleNamespace(Detections=Detections))
    both = to_supervision([CAT, CAT, Segment("dog", (0, 0, 5, 5), mask=MASK, score=0.1)])
    assert both.xyxy.shape == (3, 4) and both.mask.shape == (3, 100, 200) and both.mask.dtype == bool
    assert both.class_id.tolist() == [0, 0, 1] and both.data["class_name"].tolist() == ["cat", "cat", "dog"]
    np.testing.assert_allclose(both.confidence, [0.5, 0.5, 0.1])
    mixed = to_supervision([DOG, BARE, Detection("ghost", (0, 0, 1, 1))], names=["cat", "dog"])
    assert mixed.mask is None and mixed.confidence is None and mixed.class_id.tolist() == [1, 0]
    assert to_supervision([]).xyxy.shape == (0, 4)


def test_supervision_is_asked_for_by_name_when_it_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "supervision", None)
    with pytest.raises(ImportError, match="pip install supervision"):
        to_supervision([DOG])


def test_the_real_supervision_takes_them():
    supervision = pytest.importorskip("supervision")
    detections = to_supervision([CAT, CAT])
    assert isinstance(detections, supervision.Detections) and len(detections) == 2
    assert detections.area.tolist() == [800, 800]
    assert len(detections[detections.confidence > 0.6]) == 0
    assert len(detections.with_nms(0.5)) == 1
    assert len(to_supervision([])) == 0


def test_voc_is_read_back(tmp_path):
    """By the reader of training data: what was predicted can be corrected in a tool and trained on."""
    from paligemma.data.options import open_rows

    ghost = Detection("a & b <c>", (-10.0, 20.4, 300.0, 80.0))
    Image.new("RGB", (200, 100)).save(tmp_path / "a.png")
    (tmp_path / "a.xml").write_text(to_voc([DOG, CAT, ghost], (200, 100), "a.png"))
    assert "<name>a &amp; b &lt;c&gt;</name>" in (tmp_path / "a.xml").read_text()
    (tmp_path / "a.xml").write_text(to_voc([DOG, CAT], (200, 100), "a.png"))
    (row,) = open_rows(tmp_path / "a.xml")
    assert (row.prefix, row.size, row.image) == ("detect cat ; dog", (200, 100), str(tmp_path / "a.png"))
    assert row.boxes == ((50, 20, 90, 40), (10, 20, 60, 80))


def test_characters_that_xml_has_no_place_for_become_spaces():
    text = to_voc([replace(DOG, label="a\0 big\x1b dog\uffff \U0001f415")], (200, 100), "a\x07.png")
    annotation = ElementTree.fromstring(text)
    assert annotation.findtext("object/name") == "a  big  dog  \U0001f415"
    assert annotation.findtext("filename") == "a .png"


def test_yolo_and_coco_are_read_back(tmp_path):
    from paligemma.data.options import open_rows

    (tmp_path / "images").mkdir()
    (tmp_path / "labels").mkdir()
    Image.new("RGB", (200, 100)).save(tmp_path / "images" / "a.png")
    (tmp_path / "labels" / "a.txt").write_text("\n".join(to_yolo([DOG, CAT], (200, 100), ["cat", "dog"])))
    (tmp_path / "data.yaml").write_text("train: images\nnames: [cat, dog]\n")
    (row,) = open_rows(tmp_path)
    coco = {
        "images": [{"id": 1, "file_name": "images/a.png", "width": 200, "height": 100}],
        "categories": [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}],
        "annotations": to_coco_results([DOG, CAT], 1, {"cat": 1, "dog": 2}),
    }
    (tmp_path / "coco.json").write_text(json.dumps(coco))
    (same,) = open_rows(tmp_path / "coco.json")
    assert (row.prefix, row.suffix) == (same.prefix, same.suffix)
    assert row.suffix == "<loc0205><loc0256><loc0410><loc0461> cat ; <loc0205><loc0054><loc0819><loc0310> dog"
