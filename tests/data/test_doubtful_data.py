"""What only the whole of a data set makes doubtful is asked as a question; formats that half work are read or named."""

import base64
import io
import json

import numpy as np
import pytest
from PIL import Image
from samples import write_lines

from paligemma.answers.mask_codec import CODEC_FILE, MaskCodec
from paligemma.data.check import check
from paligemma.data.options import open_rows
from paligemma.data.rows import RowError
from paligemma.train.run_folder import fingerprint_of_data
from paligemma.weights.finding import TINY

# ----------------------------------------------------------------------------------------- all boxes of a file together


def coco(folder, boxes, size=(640, 480), **changes):
    """A COCO file of one box [x, y, width, height] in each picture."""
    document = {
        "images": [{"id": i, "file_name": f"{i}.png", "width": size[0], "height": size[1]} for i in range(len(boxes))],
        "annotations": [{"id": i, "image_id": i, "category_id": 1, "bbox": box} for i, box in enumerate(boxes)],
        "categories": [{"id": 1, "name": "dog"}],
        **changes,
    }
    (folder / "coco.json").write_text(json.dumps(document))
    return folder / "coco.json"


def right_boxes(count=200, size=(640, 480)):
    """x, y, width, height: anywhere in the picture."""
    random = np.random.default_rng(0)
    shares = random.uniform(0.1, 0.4, (count, 2))
    return np.concatenate([random.uniform(0, 1 - shares), shares], 1) * (*size, *size)


def questions(folder, boxes):
    return check(open_rows(coco(folder, boxes.tolist()))).questions


def test_right_boxes_raise_no_question(tmp_path):
    assert questions(tmp_path, right_boxes()) == []
    assert questions(tmp_path, right_boxes(20) * 0.5) == []  # too few to conclude anything


def test_boxes_in_pixels_of_a_smaller_copy(tmp_path):
    found = questions(tmp_path, right_boxes() * 0.5)
    assert len(found) == 2 and all("pixels of a smaller copy" in text for text in found)
    assert found[0].startswith("none of 200 boxes reaches beyond 50% of the pictures' width")


def test_x_and_y_swapped(tmp_path):
    """In wide pictures, where x is still small enough for a y: no single row shows it."""
    boxes = right_boxes(400, size=(1000, 500))[:, [1, 0, 3, 2]]
    inside = boxes[boxes[:, 1] + boxes[:, 3] <= 500]
    (question,) = check(open_rows(coco(tmp_path, inside.tolist(), size=(1000, 500)))).questions
    assert "50% of the pictures' width" in question and "are x and y swapped?" in question


def test_centres_taken_for_corners(tmp_path):
    boxes = right_boxes()
    boxes[:, :2] += boxes[:, 2:] / 2
    inside = boxes[(boxes[:, :2] + boxes[:, 2:] <= (640, 480)).all(1)]  # each of them could be right
    (question,) = questions(tmp_path, inside)
    assert "are x and y those of its centre?" in question


def test_a_question_is_no_problem(tmp_path):
    for i in range(60):
        Image.new("RGB", (640, 480)).save(tmp_path / f"{i}.png")
    result = check(open_rows(coco(tmp_path, (right_boxes(60) * 0.5).tolist())))
    assert result.ok and "\nquestion: none of 60 boxes" in str(result)


def test_labels_that_every_prompt_asks_for_and_no_answer_has(tmp_path):
    categories = [{"id": 1, "name": "dog"}, {"id": 2, "name": "unicorn"}, {"id": 3, "name": "cat"}]
    path = coco(tmp_path, right_boxes(5).tolist(), categories=categories)
    (question,) = check(open_rows(path, every_label=True)).questions
    assert question == "all 5 prompts ask for 'unicorn', 'cat', and no answer has it: is that meant?"
    assert check(open_rows(path)).questions == []


def test_crowds_in_several_pieces_are_left_out_with_a_word(tmp_path):
    """Two runs of pixels, no attributes, no id of COCO's own crowds: one object or many, nobody can tell."""
    crowd = {"id": 7, "image_id": 0, "category_id": 1, "bbox": [0, 0, 4, 4], "iscrowd": 1}
    crowd["segmentation"] = {"size": [4, 4], "counts": [0, 2, 8, 2, 4]}
    box = {"id": 8, "image_id": 0, "category_id": 1, "bbox": [0, 0, 4, 4]}
    path = coco(tmp_path, [[0, 0, 4, 4]], size=(4, 4), annotations=[crowd, box])
    note = open_rows(path).note
    assert "1 crowds left out" in note and "iscrowd 0 would say so" in note
    path = coco(tmp_path, [[0, 0, 4, 4]], size=(4, 4), annotations=[{**crowd, "id": 900100000000}, box])
    assert "iscrowd 0" not in open_rows(path).note


# ------------------------------------------------------------------------------------------------------ LabelMe's masks


def labelme(folder, pixels, corners, **changes):
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    text = base64.b64encode(file.getvalue()).decode()
    shape = {"label": "dog", "shape_type": "mask", "points": corners, "mask": text, **changes}
    Image.new("RGB", (40, 20)).save(folder / "a.png")
    content = {"imagePath": "a.png", "imageWidth": 40, "imageHeight": 20, "shapes": [shape]}
    (folder / "a.json").write_text(json.dumps(content))
    return folder


def test_masks_of_labelme(tmp_path):
    """A picture of the part that has the mask, and where it lies."""
    mask = np.ones((10, 20), bool)
    folder = labelme(tmp_path, mask, [[10, 5], [29, 14]])
    assert open_rows(folder)[0].suffix == "<loc0256><loc0256><loc0768><loc0768> dog"
    rows = open_rows(folder, "labelme-segment", codec=MaskCodec.load(TINY / CODEC_FILE))
    assert rows[0].suffix.startswith("<loc0256><loc0256><loc0768><loc0768><seg")


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"mask": "no picture"}, "its mask cannot be read"),
        ({"mask": None}, "its mask cannot be read"),
        ({"points": []}, "its mask cannot be read"),
        ({"points": [[30, 5], [49, 14]]}, "reaches out of the picture, which is 40 x 20"),
    ],
)
def test_masks_of_labelme_that_cannot_be_right(tmp_path, changes, words):
    folder = labelme(tmp_path, np.ones((10, 20), bool), [[10, 5], [29, 14]], **changes)
    with pytest.raises(RowError, match=words):
        open_rows(folder)[0]
    folder = labelme(tmp_path, np.zeros((10, 20), bool), [[10, 5], [29, 14]])
    with pytest.raises(RowError, match="its mask has no pixels"):
        open_rows(folder)[0]


# ------------------------------------------------------------------------------------------------------------- the rest


def test_conversations_as_text(tmp_path):
    turns = [{"from": "human", "value": "what is it?"}, {"from": "gpt", "value": "a dog"}]
    rows = open_rows(write_lines(tmp_path, {"image": "a.png", "conversations": json.dumps(turns)}))
    assert (rows[0].prefix, rows[0].suffix) == ("answer en what is it?", "a dog")
    rows = open_rows(write_lines(tmp_path, {"image": "a.png", "conversations": "what is it?"}))
    with pytest.raises(RowError, match="conversations is 'what is it\\?', expected a list of turns"):
        rows[0]


def test_a_problem_of_a_table_names_its_line_once(tmp_path):
    table = "filename,width,height,class,xmin,ymin,xmax,ymax\na.png,40,20,dog,1,2,x,9\n"
    (tmp_path / "boxes.csv").write_text(table)
    assert str(check(open_rows(tmp_path / "boxes.csv"))).count("boxes.csv:2") == 1


def test_folders_of_classes_are_known_again_by_their_pictures(tmp_path):
    """A run must not go on with other rows: here the names of the files are the data."""
    for name in ("cat/1.png", "dog/2.png"):
        (tmp_path / "a" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (4, 4)).save(tmp_path / "a" / name)
    before = fingerprint_of_data(open_rows(tmp_path / "a"))
    (tmp_path / "a").rename(tmp_path / "moved")
    assert before is not None and fingerprint_of_data(open_rows(tmp_path / "moved")) == before
    (tmp_path / "moved" / "dog" / "2.png").rename(tmp_path / "moved" / "cat" / "2.png")
    assert fingerprint_of_data(open_rows(tmp_path / "moved")) != before


@pytest.mark.parametrize("content", ["{}", '{"splits": 3}', '{"splits": []}', '{"splits": [3]}', '{"splits": [".."]}'])
def test_hostile_lists_of_splits(tmp_path, content):
    (tmp_path / "dataset_dict.json").write_text(content)
    with pytest.raises(ValueError, match=r"dataset_dict\.json: expected names of files under 'splits'"):
        open_rows(tmp_path)


@pytest.mark.parametrize("content", ["{}", '{"_data_files": 3}', '{"_data_files": [{"filename": 3}]}'])
def test_hostile_states(tmp_path, content):
    (tmp_path / "state.json").write_text(content)
    with pytest.raises(ValueError, match=r"state\.json: expected names of files under '_data_files'"):
        open_rows(tmp_path)
    (tmp_path / "state.json").write_text('{"_data_files": []}')
    with pytest.raises(ValueError, match=r"state\.json: expected names of files under '_data_files', got \[\]"):
        open_rows(tmp_path)
