"""Boxes that repeat an earlier one, found and prevented."""

from fractions import Fraction
from itertools import takewhile

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from make_tokenizer import build_tokenizer

from paligemma.answers.grammar import DetectionGrammar
from paligemma.answers.parsing import parse
from paligemma.answers.repeats import count_repeats, repeating_edges, repeats
from paligemma.answers.results import Detection
from paligemma.tokenizer import load_tokenizer


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return load_tokenizer(build_tokenizer(tmp_path_factory.mktemp("tokenizer")))


def overlap(a, b) -> Fraction:
    """IoU of two boxes of whole numbers."""
    height, width = (max(0, min(a[i + 2], b[i + 2]) - max(a[i], b[i])) for i in (0, 1))
    areas = sum((box[2] - box[0]) * (box[3] - box[1]) for box in (a, b))
    return Fraction(height * width, areas - height * width)


@st.composite
def boxes_close_together(draw):
    y0, x0 = draw(st.integers(0, 990)), draw(st.integers(0, 990))
    height, width = draw(st.integers(1, 1023 - y0)), draw(st.integers(1, 1023 - x0))

    def near(value, low, high):
        return min(max(value + draw(st.integers(-3, 3)), low), high)

    def box():
        top, left = near(y0, 0, 1022), near(x0, 0, 1022)
        return top, left, near(y0 + height, top + 1, 1023), near(x0 + width, left + 1, 1023)

    return [box() for _ in range(draw(st.integers(2, 4)))]


@settings(max_examples=200, deadline=None)
@given(boxes=boxes_close_together())
def test_a_repetition_is_an_iou_above_nine_tenths(boxes):
    last, *earlier = boxes
    assert repeats(last, earlier) == any(overlap(last, other) > Fraction(9, 10) for other in earlier)
    y0, x0, y1, _ = last
    y1s = np.array([y1, min(y1 + 1, 1023)])
    for row, bottom in zip(repeating_edges(y0, x0, y1s, earlier), y1s.tolist()):
        for x1 in {x0 + 1, 1023, *(edge + step for *_, edge in boxes for step in range(-4, 5))}:
            if x0 < x1 <= 1023:
                assert row[x1] == repeats((y0, x0, bottom, x1), earlier)


def test_exactly_nine_tenths_is_no_repetition():
    assert overlap((0, 0, 10, 10), (0, 0, 10, 9)) == Fraction(9, 10)
    assert not repeats((0, 0, 10, 10), [(0, 0, 10, 9)]) and repeats((0, 0, 10, 11), [(0, 0, 10, 10)])


def test_repetitions_are_counted_within_a_label():
    dog, cat = Detection("dog", (0.0, 0.0, 50.0, 50.0)), Detection("cat", (0.0, 0.0, 50.0, 50.0))
    moved = Detection("dog", (1.0, 0.0, 51.0, 50.0))
    assert count_repeats([dog, cat]) == 0 and count_repeats([]) == 0
    assert count_repeats([dog, moved, cat, dog, cat]) == 3


def written_by_a_model_that_repeats_itself(grammar, tokenizer, box, budget):
    """The answer of a model that wants the same box and the first label again and again."""
    wanted = [tokenizer.first_loc_id + edge for edge in box]
    answer: list[int] = []
    for remaining in range(budget, 0, -1):
        allowed = grammar(answer, remaining).tolist()
        locations = [i for i in allowed if i in range(tokenizer.first_loc_id, tokenizer.first_loc_id + 1024)]
        others = [i for i in allowed if i not in locations and i != tokenizer.eos_token_id]
        if locations:
            edge = wanted[sum(1 for _ in takewhile(lambda i: i >= tokenizer.first_loc_id, reversed(answer)))]
            answer.append(min(locations, key=lambda i: abs(i - edge)))
        elif others:
            answer.append(others[0])
        else:
            break
    return parse(tokenizer.decode(answer), (1024, 1024))


@pytest.mark.parametrize(
    ("box", "labels", "segments"),
    [
        ((100, 200, 300, 400), ["dog"], False),
        ((100, 200, 300, 400), ["dog"], True),
        ((0, 0, 1023, 1023), ["dog", "cat"], False),
        ((5, 5, 7, 8), ["red", "red car", "cat"], False),
        ((5, 5, 7, 8), [""], False),
    ],
)
def test_the_grammar_keeps_a_model_from_repeating_a_box(tokenizer, box, labels, segments):
    budget = 400 if segments else 200
    free, strict = (DetectionGrammar(tokenizer, labels, segments, forbid_repeats=forbid) for forbid in (False, True))
    said = written_by_a_model_that_repeats_itself(free, tokenizer, box, budget)
    items = [*said.detections, *said.segments]
    assert count_repeats(items) >= len(items) - 2 > 6  # the last may be called otherwise, if room is short
    said = written_by_a_model_that_repeats_itself(strict, tokenizer, box, budget)
    items = [*said.detections, *said.segments]
    assert count_repeats(items) == 0 < 8 < len(items) and not said.invalid
    assert {item.label for item in items} == set(labels)  # the same box with another label is no repetition


def test_with_any_label_a_box_repeats_another_whatever_they_are_called(tokenizer):
    grammar = DetectionGrammar(tokenizer, None, forbid_repeats=True)
    said = written_by_a_model_that_repeats_itself(grammar, tokenizer, (100, 200, 300, 400), 300)
    boxes = [Detection("", item.box) for item in said.detections]
    assert len(boxes) >= 1 and count_repeats(boxes) == 0


def test_where_no_other_box_is_left_the_answer_still_parses(tokenizer):
    """The last bin has one box."""
    grammar = DetectionGrammar(tokenizer, ["dog"], forbid_repeats=True)
    said = written_by_a_model_that_repeats_itself(grammar, tokenizer, (1022, 1022, 1023, 1023), 60)
    assert len(said.detections) > 2 and not said.invalid


def test_by_default_repetitions_are_allowed(tokenizer):
    box = tokenizer.encode("<loc0100><loc0200><loc0300>")
    one = tokenizer.encode("<loc0100><loc0200><loc0300><loc0400> dog ; ")
    for forbid, expected in ((False, True), (True, False)):
        grammar = DetectionGrammar(tokenizer, ["dog"], forbid_repeats=forbid)
        assert (tokenizer.first_loc_id + 400 in grammar([*one, *box], 100)) == expected
    assert torch.equal(grammar(box, 100), grammar.locs[201:])  # the first box is free
