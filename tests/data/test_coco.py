"""COCO's boxes, masks and captions."""

import numpy as np
import pytest
import torch
from samples import COCO, DIGITS, write_coco

from paligemma.answers.mask_codec import MaskCodec
from paligemma.data.check import check
from paligemma.data.masks import fill, mask_of, unpacked
from paligemma.data.options import open_rows
from paligemma.data.rows import RowError, short

# ----------------------------------------------------------------------------------------------------------------- COCO


def test_coco_boxes(folder):
    rows = open_rows(write_coco(folder))
    assert rows.kind == "coco-detect"
    assert rows.note.endswith("COCO boxes, 2 rows (1 pictures without objects and 1 crowds left out)")
    assert rows[0].prefix == "detect cat" and rows[0].suffix == "<loc0512><loc0768><loc1023><loc1023> cat"
    # labels in the order of the categories, the boxes of one from left to right
    assert rows[1].prefix == "detect cat ; dog"
    assert rows[1].suffix == (
        "<loc0256><loc0512><loc0768><loc0768> cat ; "
        "<loc0000><loc0000><loc0512><loc0512> dog ; <loc0000><loc0256><loc1023><loc0768> dog"
    )
    assert (rows[1].image, rows[1].size) == (str(folder / "b.png"), (40, 20))
    assert rows[1].boxes == ((20, 5, 30, 15), (0, 0, 20, 10), (10, 0, 30, 20))
    assert rows[1].source == f"{folder / 'coco.json'} images[1] (id 10)"
    assert check(rows).ok


def test_labels_have_no_spaces_around_them(folder):
    """Neither in the prompt nor in the answer, and however the names of all classes are written."""
    path = write_coco(folder)
    path.write_text(path.read_text().replace('"dog"', '" dog "').replace('"cat"', '"cat "'))
    rows = open_rows(path)
    assert rows[1].prefix == "detect cat ; dog" and rows[1].suffix.endswith("<loc1023><loc0768> dog")
    assert open_rows(path, every_label=True)[0].prefix == "detect cat ; dog ; süß"


def test_coco_boxes_asked_for_by_every_label(folder):
    rows = open_rows(write_coco(folder), every_label=True)
    assert [row.prefix for row in rows] == ["detect cat ; dog ; süß"] * 3
    assert rows[2].suffix == ""
    report = check(rows)
    assert report.counts == {"missing picture": 1}, "an empty answer is right where nothing is to be found"


def test_coco_at_the_other_scale(folder):
    assert open_rows(write_coco(folder), loc_scale=1023)[0].suffix == "<loc0512><loc0767><loc1023><loc1023> cat"


@pytest.mark.parametrize("changes, words", [
    ({"annotations": [{"image_id": 99, "category_id": 1, "bbox": [0, 0, 1, 1]}] * 3},
     "3 of 3 annotations have an unknown image_id, the first is annotations\\[0\\] with 99: add it to 'images'"),
    ({"annotations": [{"image_id": 10, "category_id": 7, "bbox": [0, 0, 1, 1]}]},
     "1 of 1 annotations have an unknown category_id, the first is annotations\\[0\\] with 7: add it to 'categories'"),
    ({"annotations": [{"category_id": 7, "bbox": [0, 0, 1, 1]}]}, "annotations\\[0\\] has no 'image_id'"),
    ({"annotations": [{"image_id": [1], "category_id": 1}]}, "no 'image_id': expected a number or text, got \\[1\\]"),
    ({"annotations": [{"image_id": 10, "category_id": {}}]}, "coco.json annotations\\[0\\] has no 'category_id'"),
    ({"annotations": [[1]]}, "annotations\\[0\\]: expected an object, got \\[1\\]"),
    ({"images": [{"file_name": "a.png"}]}, "images\\[0\\] has no 'id'"),
    ({"images": [{"id": {}}]}, "coco.json images\\[0\\] has no 'id'"),
    ({"categories": [{"id": 1, "name": "dog"}, {"id": [2], "name": "cat"}]}, "categories\\[1\\] has no 'id'"),
    ({"categories": [{"id": 1}]}, "categories\\[0\\] has no 'name'"),
    ({"categories": [{"id": 1, "name": "dog"}, {"id": 1, "name": "cat"}]},
     "categories\\[1\\]: id 1 is 'cat' here and 'dog' before"),
    ({"images": COCO["images"] * 2}, "several pictures with the same id"),
])  # fmt: skip
def test_a_coco_file_that_does_not_fit_together(folder, changes, words):
    with pytest.raises(ValueError, match=words):
        open_rows(write_coco(folder, **changes))


@pytest.mark.parametrize("annotation, category, problem", [
    ({"bbox": [50, 0, 10, 10]}, "dog", "box or mask"),  # wholly outside
    ({"bbox": [40, 0, 10, 10]}, "dog", "box or mask"),  # and touching the border, at each side
    ({"bbox": [0, 20, 10, 10]}, "dog", "box or mask"),
    ({"bbox": [-10, 0, 10, 10]}, "dog", "box or mask"),
    ({"bbox": [0, -10, 10, 10]}, "dog", "box or mask"),
    ({"bbox": [10, 0, 30, 25]}, "dog", "box outside"),  # in part, at each side
    ({"bbox": [10, 0, 35, 20]}, "dog", "box outside"),
    ({"bbox": [-5, 0, 35, 20]}, "dog", "box outside"),
    ({"bbox": [0, -5, 35, 20]}, "dog", "box outside"),
    ({"bbox": [0, 0, 10, 10]}, "dog; small", "label with ;"),
    ({"bbox": [0, 0, -5, 10]}, "dog", "box or mask"),
    ({"bbox": [0, 0, 10]}, "dog", "box or mask"),
    ({}, "dog", "box or mask"),
    ({"bbox": [0, 0, float("inf"), 10]}, "dog", "box or mask"),
    ({"bbox": [0, 0, float("nan"), 10]}, "dog", "box or mask"),
    ({"bbox": [0, 0, 10**400, 10]}, "dog", "box or mask"),
    ({"bbox": 3}, "dog", "box or mask"),
    ({"bbox": []}, "dog", "box or mask"),
    ({"bbox": [0, 0, 10, 10]}, "half \ud83d", "half a character"),
])  # fmt: skip
def test_coco_rows_that_cannot_be_right(folder, annotation, category, problem):
    path = write_coco(
        folder,
        annotations=[{"image_id": 30, "category_id": 1, **annotation}, COCO["annotations"][0]],
        categories=[{"id": 1, "name": category}, {"id": 2, "name": "cat"}],
    )
    report = check(open_rows(path))
    assert report.counts == {problem: 1}
    assert report.first[problem][0].source == f"{path} images[0] (id 30)"
    assert report.bad_rows == 1 and report.rows == 2


def test_a_coco_annotation_with_such_a_number_belongs_to_its_picture(folder):
    path = write_coco(folder)
    path.write_text(path.read_text().replace('"id": 5,', f'"id": 5, "area": {DIGITS},'))
    report = check(open_rows(path))
    assert report.counts == {"not JSON": 1} and report.rows == 2
    assert report.first["not JSON"][0].source == f"{path} annotations[4]"


@pytest.mark.parametrize("width, height", [(20_000, 20_000), (1e9, 20), (1 << 26, 20), (10**400, 20)])
def test_a_coco_picture_larger_than_can_be_opened_is_its_rows_problem(folder, width, height):
    image = {**COCO["images"][0], "width": width, "height": height}
    path = write_coco(folder, images=[image, *COCO["images"][1:]])
    report = check(open_rows(path))
    assert report.counts == {"unreadable picture": 1} and report.rows == 2
    (found,) = report.first["unreadable picture"]
    assert found.source == f"{path} images[0] (id 30)"
    assert found.message == (
        f"width and height are {short(width)} x {height}: more pixels than a picture that can be opened "
        "has; expected 268,435,456 at most: correct them, or make the picture smaller"
    )


@pytest.mark.parametrize("width", [float("inf"), float("nan"), 0, None, "40"])
def test_a_coco_picture_without_a_size_is_its_rows_problem(folder, width):
    path = write_coco(folder, images=[{**COCO["images"][0], "width": width}, *COCO["images"][1:]])
    report = check(open_rows(path))
    assert report.counts == {"missing key": 1} and report.rows == 2
    (found,) = report.first["missing key"]
    assert found.source == f"{path} images[0] (id 30)"
    assert found.message == f"boxes need the picture's width and height, got {short(width)} x 20"


def test_a_pixel_beyond_the_border_is_rounding(folder):
    path = write_coco(folder, annotations=[{"image_id": 30, "category_id": 1, "bbox": [-0.5, 0, 41, 20.5]}])
    assert check(open_rows(path)).ok


def test_coco_captions(folder):
    captions = [{"image_id": 10, "caption": "a dog \n"}, {"image_id": 30, "caption": "ein Hund"}, {"image_id": 10}]
    path = write_coco(folder, annotations=captions)
    rows = open_rows(path, language="de")
    assert (rows.kind, len(rows)) == ("coco-captions", 3)
    assert (rows[0].image, rows[0].prefix, rows[0].suffix) == (str(folder / "b.png"), "caption de", "a dog")
    assert rows[1].image == str(folder / "a.png")
    assert check(rows).counts == {"missing key": 1}


# ---------------------------------------------------------------------------------------------------------------- masks


def test_coco_masks_become_the_codes_of_the_mask(folder):
    codec = MaskCodec(embedding_dim=8, encoder_widths=(4, 4, 4, 4), decoder_widths=(4, 4, 4, 4, 4)).eval()
    square = [[10, 5, 30, 5, 30, 15, 10, 15]]
    runs = {"size": [20, 40], "counts": [0, 800]}
    path = write_coco(
        folder,
        annotations=[
            {"image_id": 30, "category_id": 1, "bbox": [10, 5, 20, 10], "segmentation": square},
            {"image_id": 10, "category_id": 1, "segmentation": runs},  # without a box: that of the mask
            {"image_id": 20, "category_id": 1, "bbox": [0, 0, 5, 5], "segmentation": {"size": [5, 5], "counts": [25]}},
        ],
    )
    rows = open_rows(path, "coco-segment", codec=codec)
    codes = "".join(f"<seg{code:03d}>" for code in codec.encode(torch.ones(1, 64, 64))[0].tolist())
    assert rows[0].prefix == "segment dog"
    assert rows[0].suffix == f"<loc0256><loc0256><loc0768><loc0768>{codes} dog"
    assert rows[1].suffix == f"<loc0000><loc0000><loc1023><loc1023>{codes} dog"
    with pytest.raises(RowError, match=r"annotations\[2\]: its mask is \[5, 5\], the picture \[20, 40\]"):
        rows[2]
    codec.save(folder / "codec.npz")
    assert open_rows(path, "coco-segment", codec=folder / "codec.npz")[0] == rows[0]
    with pytest.raises(ValueError, match=r"masks need a codec .*: --model NAME \(tiny has its own\); in Python"):
        open_rows(path, "coco-segment")


def test_a_polygon_is_the_pixels_whose_centre_lies_inside():
    assert fill(np.array([(1, 1), (4, 1), (4, 3), (1, 3)]), (6, 4)).astype(int).tolist() == [
        [0, 0, 0, 0, 0, 0],
        [0, 1, 1, 1, 0, 0],
        [0, 1, 1, 1, 0, 0],
        [0, 0, 0, 0, 0, 0],
    ]
    assert fill(np.array([(-5, -5), (50, -5), (50, 50), (-5, 50)]), (6, 4)).all(), "cut off at the border"
    two = mask_of([[0, 0, 1, 0, 1, 4, 0, 4], [5, 0, 6, 0, 6, 4, 5, 4]], (6, 4))
    assert two.sum(0).tolist() == [4, 0, 0, 0, 0, 4]


@pytest.mark.parametrize("corner", [float("inf"), float("nan"), 1e308, "x", None])
def test_a_polygon_without_end_is_refused(corner):
    with pytest.raises((ValueError, TypeError)):
        mask_of([[0, 0, 1, 0, 1, corner]], (6, 4))


def test_masks_agree_with_cocos_own_tool():
    tool = pytest.importorskip("faster_coco_eval.core.mask")
    random = np.random.default_rng(0)
    differing = 0
    for _ in range(50):
        angles = np.sort(random.uniform(0, 2 * np.pi, 12))
        points = np.stack([60 + 50 * random.uniform(0.3, 1, 12) * np.cos(angles), 50 + 60 * np.sin(angles)], 1)
        packed = tool.merge(tool.frPyObjects([points.flatten().tolist()], 100, 120))
        theirs = tool.decode(packed).astype(bool)
        ours = mask_of([points.flatten().tolist()], (120, 100))
        differing += (ours != theirs).sum() / theirs.sum()
        assert (ours & theirs).sum() / (ours | theirs).sum() > 0.95
        text = packed["counts"].decode() if isinstance(packed["counts"], bytes) else packed["counts"]
        assert np.array_equal(mask_of({"size": [100, 120], "counts": text}, (120, 100)), theirs)
    assert differing / 50 < 0.02


def test_packed_run_lengths():
    """Worked by hand: 5 bits a character over "0", bit 6 says that more follow, from the third on differences."""
    assert unpacked("0") == [0]
    assert unpacked("5") == [5]
    assert unpacked("P1") == [32]  # 0 + more, then 1 * 32
    assert unpacked("352O") == [3, 5, 2, 5 - 1]  # the third still plain, the fourth -1 from the second
    with pytest.raises(ValueError, match="packed mask contains"):
        unpacked("a b")
