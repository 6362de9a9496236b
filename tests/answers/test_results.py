"""Results in a notebook: they show themselves, and are plain values in everything else."""

import copy
import dataclasses
import io
import json
import pickle

import numpy as np
import pytest
from PIL import Image

from paligemma.answers.drawing import draw
from paligemma.answers.results import Answer, Detection, Items, Segment

ARRAY = np.random.default_rng(0).integers(0, 256, (600, 800, 3), dtype=np.uint8)
DOG = Detection("dog", (10.0, 20.0, 300.0, 400.0), 0.9, np.zeros((4, 2)))
CAT = Detection("cat", (50.0, 20.0, 90.0, 80.0), 0.8)


def seen(png: bytes) -> Image.Image:
    return Image.open(io.BytesIO(png)).convert("RGB")


def answer_about(picture, **found) -> Answer:
    answer = Answer("text", [5, 6], [-0.1, -0.2], 0.86, True, **found)
    answer.picture = picture
    return answer


def test_boxes_are_shown_over_their_picture(tmp_path):
    Image.fromarray(ARRAY).save(tmp_path / "picture.png")
    expected = np.asarray(draw(ARRAY, [DOG, CAT]))
    as_bytes = (tmp_path / "picture.png").read_bytes()
    for picture in (ARRAY, Image.fromarray(ARRAY), tmp_path / "picture.png", as_bytes, (ARRAY, ARRAY[:9])):
        shown = seen(Items([DOG, CAT], picture)._repr_png_())
        assert np.array_equal(np.asarray(shown), expected)
    assert np.array_equal(np.asarray(seen(answer_about(ARRAY, detections=[DOG, CAT])._repr_png_())), expected)


def test_masks_are_shown_too():
    mask = np.zeros((600, 800), bool)
    mask[100:200, 100:200] = True
    segment = Segment("dog", (100.0, 100.0, 200.0, 200.0), mask, [0] * 16)
    expected = np.asarray(draw(ARRAY, [segment]))
    assert np.array_equal(np.asarray(seen(Items([segment], ARRAY)._repr_png_())), expected)
    assert np.array_equal(np.asarray(seen(answer_about(ARRAY, segments=[segment])._repr_png_())), expected)


@pytest.mark.parametrize(
    ("size", "shown"), [((64, 48), (512, 384)), ((700, 90), (700, 90)), ((3000, 4000), (768, 1024))]
)
def test_a_small_picture_is_enlarged_and_a_large_one_does_not_swell_the_notebook(size, shown):
    box = Detection("dog", (1.0, 2.0, 30.0, 40.0))
    assert seen(Items([box], Image.new("RGB", size))._repr_png_()).size == shown


def test_without_a_picture_or_without_boxes_the_text_is_shown(tmp_path):
    assert Items([DOG])._repr_png_() is None
    assert Items([], ARRAY)._repr_png_() is None
    assert answer_about(ARRAY)._repr_png_() is None
    assert answer_about(None, detections=[DOG])._repr_png_() is None
    # The picture may be gone by the time it is to be shown, or be another one.
    assert Items([DOG], tmp_path / "removed.png")._repr_png_() is None
    assert Items([Segment("dog", DOG.box, np.ones((5, 5), bool))], ARRAY)._repr_png_() is None


def test_items_are_a_list():
    items = Items([DOG, CAT], ARRAY)
    assert items == [DOG, CAT] and items == [DOG, CAT] and items != [CAT]
    assert repr(items) == repr([DOG, CAT]) and repr(Items()) == "[]" and not Items()
    assert items[0] is DOG and items[-1] is CAT
    assert items[:1] == [DOG] and items[:1].picture is ARRAY
    assert sorted(items, key=lambda item: item.label) == [CAT, DOG]
    assert json.dumps(Items([1, 2])) == "[1, 2]"
    items.append(DOG)
    assert len(items) == 3


def test_the_picture_is_the_one_given_and_no_part_of_the_result():
    class Unpicklable:
        def __reduce__(self):
            raise AssertionError("the picture is pickled")

    for result in (Items([DOG], Unpicklable()), answer_about(Unpicklable(), detections=[DOG])):
        for again in (pickle.loads(pickle.dumps(result)), copy.deepcopy(result)):
            assert type(again) is type(result) and again == result and again.picture is None
            assert repr(again) == repr(result)
    answer = answer_about(ARRAY)
    assert answer.picture is ARRAY
    assert answer == answer_about(ARRAY[:9]) and "picture" not in dataclasses.asdict(answer)


def test_a_repr_is_short():
    answer = answer_about(ARRAY, detections=[DOG])
    assert repr(answer) == (
        "Answer(text='text', score=0.86, finished=True, "
        "detections=[Detection(label='dog', box=(10.0, 20.0, 300.0, 400.0), score=0.9)], segments=[], invalid=[])"
    )
