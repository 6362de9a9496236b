"""Scores of boxes and masks: probabilities, what they are made of, and the map that is fitted."""

import json
import math
from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from make_tokenizer import build_tokenizer

from paligemma.answers.parsing import parse_tokens
from paligemma.answers.scores import (
    CALIBRATION_FILE,
    IDENTITY,
    LEAST,
    Calibration,
    Distribution,
    chance_of_overlap,
    fit,
)
from paligemma.evaluate.regions import box_iou
from paligemma.generation import NOT_WATCHED
from paligemma.tokenizer import load_tokenizer

BOX = "<loc0256><loc0128><loc0768><loc0512>"  # y0 x0 y1 x1
CHOSEN = (256, 128, 768, 512)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return load_tokenizer(build_tokenizer(tmp_path_factory.mktemp("tokenizer")))


def sure(*edges):
    """Distributions that leave no doubt of each edge."""
    return [Distribution(edge, 0.0, 1.0, (edge,) * 12) for edge in edges]


# --- the overlap ------------------------------------------------------------------------------------


def test_no_doubt_is_certainty_and_doubt_of_another_box_is_what_it_is():
    edges = [(edge,) * 12 for edge in CHOSEN]
    assert chance_of_overlap(CHOSEN, edges) == 1.0
    assert chance_of_overlap(CHOSEN, [(900,) * 12, *edges[1:]]) == 0.0  # above its lower edge: no box at all
    elsewhere = [(256,) * 9 + (700,) * 3, *edges[1:]]  # a quarter of the probability of y0 on a flat box
    assert chance_of_overlap(CHOSEN, elsewhere) == 0.75
    nearby = [tuple(edge + wave for wave in (-20, 0, 20)) for edge in CHOSEN]
    assert chance_of_overlap(CHOSEN, nearby) == 1.0  # an IoU of .5 forgives that


@given(st.lists(st.lists(st.integers(0, 1023), min_size=3, max_size=3), min_size=4, max_size=4))
@settings(max_examples=60, deadline=None)
def test_the_overlap_by_its_definition(quantiles):
    """The share of all combinations of edges whose box has an IoU of at least .5 with the chosen one."""
    boxes = [(x0, y0, x1, y1) for y0, x0, y1, x1 in product(*quantiles)]
    chosen = [(CHOSEN[1], CHOSEN[0], CHOSEN[3], CHOSEN[2])]
    proper = np.array([x1 > x0 and y1 > y0 for x0, y0, x1, y1 in boxes])
    expected = np.mean((box_iou(boxes, chosen)[:, 0] >= 0.5) & proper)
    assert chance_of_overlap(CHOSEN, quantiles) == pytest.approx(expected, abs=1e-9)


# --- the probability of an item ---------------------------------------------------------------------


def scored(tokenizer, text, chances, distributions, **options):
    """The items of a text. chances: the probability of a token by its text, 1 where it is not given."""
    ids = tokenizer.encode(text)
    words = [tokenizer.decode([token]).strip() for token in ids]
    logprobs = [math.log(chances.get(word, 1.0)) for word in words]
    shown = iter(distributions)
    seen = [next(shown) if word.startswith("<loc") else NOT_WATCHED for word in words]
    return parse_tokens(ids, tokenizer, (1024, 1024), token_logprobs=logprobs, distributions=seen, **options)


def test_a_score_is_a_product_of_four_probabilities(tokenizer):
    first = [Distribution(256, 0.0, 0.9, (256,) * 9 + (700,) * 3), *sure(*CHOSEN[1:])]  # 10% that there is nothing
    text = f"{BOX} dog ; {BOX} cat"
    dog, cat = scored(tokenizer, text, {"dog": 0.8, ";": 0.6, "cat": 0.5}, [*first, *sure(*CHOSEN)]).detections
    assert dog.score == pytest.approx(0.9 * 0.8 * 0.75)
    assert cat.score == pytest.approx(0.6 * 1.0 * 0.5 * 1.0)  # the ";" decides that there is a second item


def test_words_before_a_box_are_no_doubt_of_it(tokenizer):
    (item,) = scored(tokenizer, f"a dog {BOX} cat", {"dog": 0.1, "cat": 0.5}, sure(*CHOSEN)).detections
    assert item.score == pytest.approx(0.5)


def test_the_certainty_of_the_codes_counts_for_masks(tokenizer):
    codes = "".join(f"<seg{number:03d}>" for number in range(16))
    chances = {"<seg000>": 0.25, "<seg001>": 0.5, "dog": 0.9}
    (item,) = scored(tokenizer, f"{BOX}{codes} dog", chances, sure(*CHOSEN)).segments
    assert item.score == pytest.approx(0.9 * (0.25 * 0.5) ** (1 / 16))


def test_boxes_and_masks_have_a_map_each(tokenizer):
    codes = "".join(f"<seg{number:03d}>" for number in range(16))
    calibration = Calibration(boxes=(1.0, 2.0), masks=(-1.0, 0.5))
    text = f"{BOX} dog ; {BOX}{codes} cat"
    parsed = scored(tokenizer, text, {"dog": 0.5, "cat": 0.8}, sure(*CHOSEN) * 2, calibration=calibration)
    assert parsed.detections[0].score == pytest.approx(1 / (1 + math.exp(-1)))
    inside = 0.001 + 0.998 * 0.8  # drawn away from 0 and 1, so that the last bits of p do not decide
    assert parsed.segments[0].score == pytest.approx(1 / (1 + math.exp(1 - 0.5 * math.log(inside / (1 - inside)))))


# --- the map ----------------------------------------------------------------------------------------


def test_the_fit_finds_the_map_that_made_the_data():
    rng = np.random.default_rng(0)
    p = rng.uniform(0.02, 0.98, 20_000)
    true = Calibration(boxes=(-0.7, 0.6))
    right = rng.random(len(p)) < [true(value) for value in p]
    assert fit(p, right) == pytest.approx((-0.7, 0.6), abs=0.06)


def test_certainties_far_apart_are_fitted_where_whole_steps_would_overshoot():
    """The map of two certainties goes through both: there, its log-odds are those of the mean target."""
    right = [False, False, True] + [True] * 3
    wrong_target, right_target = 1 / 4, 5 / 6  # Platt's, of 2 wrong and 4 right items
    unsure, sure = (math.log(q / (1 - q)) for q in ((2 * wrong_target + right_target) / 3, right_target))
    apart = math.log((1 - LEAST) / LEAST)  # the log-odds of 0 and 1 are minus and plus this
    expected = (unsure + sure) / 2, (sure - unsure) / (2 * apart)
    assert expected == pytest.approx((0.6931, 0.1327), abs=1e-4)
    assert fit([1e-9] * 3 + [1.0] * 3, right) == pytest.approx(expected, rel=1e-4)


def test_scores_without_any_meaning_are_refused():
    with pytest.raises(ValueError, match="needs right and wrong items, and all 2 are right"):
        fit([0.5, 0.6], [True, True])
    with pytest.raises(ValueError, match="surer items are not right more often"):
        fit([0.9, 0.8, 0.2, 0.1], [False, False, True, True])


def test_two_items_are_fitted_without_going_to_infinity():
    """All right items are surer than all wrong ones: without Platt's targets no finite map would be the best."""
    offset, slope = fit([0.1, 0.2, 0.8, 0.9], [False, False, True, True])
    assert math.isfinite(offset) and 0 < slope < 10


@given(st.floats(-5, 5), st.floats(0.05, 5), st.lists(st.floats(0, 1), min_size=2, max_size=6))
def test_the_order_of_scores_stays(offset, slope, values):
    mapped = [Calibration(masks=(offset, slope))(value, mask=True) for value in sorted(values)]
    assert mapped == sorted(mapped) and all(0 <= value <= 1 for value in mapped)


def test_a_steep_map_has_scores_too():
    """Right and wrong items whose scores differ in the fourth place: such a fit is steep."""
    found = fit([0.5] * 50 + [0.5001] * 50, [False] * 50 + [True] * 50)
    mapped = [Calibration(boxes=found)(p) for p in (0.0, 0.5, 0.5001, 1.0)]
    assert mapped == sorted(mapped) and mapped[0] < 0.01 and mapped[-1] > 0.99


def test_without_a_file_a_score_is_the_probability_itself():
    assert [IDENTITY(p) for p in (0.0, 0.3, 1.0)] == [0.0, 0.3, 1.0]


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[]",
        "{}",
        '{"boxes": [0, 1]}',
        '{"boxes": [0, 1], "masks": [0, 1], "circles": [0, 1]}',
        *(
            f'{{"boxes": {boxes}, "masks": [0, 1]}}'
            for boxes in ("[0, -1]", "[0, 1e-320]", "[0, 1, 2]", "[0, NaN]", "[true, true]", '["0", "1"]', "3", "null")
        ),
        '{"masks": [0, 1], "boxes": [1' + "0" * 400 + ", 1]}",
        "[" * 100_000,
    ],
)
def test_a_broken_file_is_named_with_the_way_out(tmp_path, content):
    (tmp_path / CALIBRATION_FILE).write_text(content)
    with pytest.raises(ValueError, match=r"calibration\.json is no calibration .*: delete it"):
        Calibration.load(tmp_path / CALIBRATION_FILE)


def test_a_file_gives_back_the_map(tmp_path):
    kept = Calibration(boxes=(0.5, 1.5), masks=(-1.0, 0.25))
    (tmp_path / CALIBRATION_FILE).write_text(json.dumps(kept.to_dict()))
    assert Calibration.load(tmp_path / CALIBRATION_FILE) == kept


def test_a_map_keeps_the_order_and_does_not_magnify_the_last_bits_of_a_probability():
    steep = Calibration(boxes=(0.6, 0.5))
    nearly = [1 - 2e-6, 1 - 1e-6, 1.0]
    scores = [steep(p) for p in nearly]
    assert scores == sorted(set(scores))
    assert scores[2] - scores[0] < 2e-5
    assert 0 < steep(0.0) < steep(1e-6)
