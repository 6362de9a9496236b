"""The metric of each task.

A metric looks at one row at a time and returns what the row adds to each figure: a numerator and a denominator. A
figure is the ratio of the sums over all rows, and its interval follows from the same numbers (`intervals.py`). Figures
that are no ratio of sums (average precision, BLEU) come from a second function, which sees all rows at once.

    EXACT.score(example, prediction)  ->  {"exact": (1, 1)}
    DETECT.score(example, prediction) ->  {"precision": (2, 3), "recall": (2, 2), "mean IoU of matches": (1.7, 2)}
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import cycle
from typing import TYPE_CHECKING

import numpy as np

from paligemma.evaluate.average_precision import coco_metrics, mean_area, packed, rank
from paligemma.evaluate.calibration import CALIBRATION_ERROR
from paligemma.evaluate.captions import bleu, cider_d
from paligemma.evaluate.examples import Example, Prediction
from paligemma.evaluate.intervals import bootstrap
from paligemma.evaluate.regions import Region, instance_ious, match_by_score
from paligemma.evaluate.text import anls, character_errors, edit_distance, exact_match, relaxed_accuracy, word_errors
from paligemma.evaluate.vqa import normalize, vqa_accuracy
from paligemma.evaluate.yes_no import pope_counts

if TYPE_CHECKING:
    from paligemma.answers.mask_codec import MaskCodec

Ratios = Mapping[str, tuple[float, float]]
Answered = Sequence[tuple[Example, Prediction]]  # without pictures; regions as `Metric.keep` leaves them
Values = dict[str, tuple[float, float, float]]  # value and the ends of its interval; NaN where there is none

NAN = float("nan")


def without_mask(region: Region) -> Region:
    return replace(region, mask=None)


@dataclass(frozen=True)
class Metric:
    """score: one row -> what it adds to each figure. corpus: all rows -> further figures.

    regions: answers are boxes or masks; a text that is not empty and has none of them is invalid.
    lower_is_better: names of figures; neutral: of those that are neither better nor worse when they are higher.
    masks: the regions need masks.
    keep: what is kept of a region until `corpus` sees all rows. (A whole mask has a byte for every pixel.)
    scores: whether the scores of its boxes or masks are compared with how often they are right: `calibration.py`.
    """

    score: Callable[[Example, Prediction], Ratios]
    corpus: Callable[[Answered], Values] | None = None
    regions: bool = False
    lower_is_better: tuple[str, ...] = ()
    neutral: tuple[str, ...] = ()
    masks: bool = False
    keep: Callable[[Region], Region] = without_mask
    scores: bool = False


def _exact(example: Example, prediction: Prediction) -> Ratios:
    return {"exact": (exact_match(prediction.text, example.answers), 1)}


def _vqa(example: Example, prediction: Prediction) -> Ratios:
    """With a single answer no three people can agree, so it is compared directly, after normalisation."""
    if len(example.answers) == 1:
        return {"VQA accuracy": (normalize(prediction.text) == normalize(example.answers[0]), 1)}
    return {"VQA accuracy": (vqa_accuracy(prediction.text, example.answers), 1)}


def _anls(example: Example, prediction: Prediction) -> Ratios:
    return {"ANLS": (anls(prediction.text, example.answers), 1), **_exact(example, prediction)}


def _relaxed(example: Example, prediction: Prediction) -> Ratios:
    return {"relaxed accuracy": (relaxed_accuracy(prediction.text, example.answers), 1), **_exact(example, prediction)}


def _reading(example: Example, prediction: Prediction) -> Ratios:
    answer = min(example.answers, key=lambda right: edit_distance(prediction.text, right))
    return {
        "exact": (exact_match(prediction.text, example.answers), 1),
        "character error rate": character_errors(prediction.text, answer),
        "word error rate": word_errors(prediction.text, answer),
    }


def _pope(example: Example, prediction: Prediction) -> Ratios:
    right = example.answers[0].strip().lower()
    if right not in ("yes", "no"):
        raise ValueError(
            f"row {example.id}: the right answer is {example.answers[0]!r}, and yes-no is for questions that yes or no "
            "answers: choose another metric"
        )
    return pope_counts(prediction.text, right)


def _captions(rows: Answered) -> Values:
    texts, references = [p.text for _, p in rows], [e.answers for e, _ in rows]
    cider, each = cider_d(texts, references)
    shares = np.array(each)
    interval = bootstrap(lambda weights: float(weights @ shares / weights.sum()), [e.group or e.id for e, _ in rows])
    values = {"CIDEr-D": (cider, *interval)}
    values |= {f"BLEU-{n}": (value, NAN, NAN) for n, value in enumerate(bleu(texts, references), 1)}
    return values


def _empty(example: Example, prediction: Prediction) -> Ratios:
    return {"empty": (not prediction.text.strip(), 1)}


def _detect(example: Example, prediction: Prediction) -> Ratios:
    matches = match_by_score(example.regions, prediction.regions, 0.5)
    return {
        "precision": (len(matches), len(prediction.regions)),
        "recall": (len(matches), len(example.regions)),
        "mean IoU of matches": (sum(iou for _, _, iou in matches), len(matches)),
    }


def _ranking(rows: Answered) -> Values:
    """Average precision at IoU .5 ranked by score; the same boxes with a constant score, which means in random order
    (the mean over 20 of them); and the difference, whose interval compares both on the same rows."""
    pictures = [(e.regions, p.regions) for e, p in rows]
    by_score = rank(pictures)
    shuffled = [rank(pictures, shuffle=np.random.default_rng(seed)) for seed in range(20)]
    once = np.ones(len(rows))
    value, constant = mean_area(by_score, once), float(np.mean([mean_area(order, once) for order in shuffled]))
    order = cycle(shuffled)
    gained = bootstrap(
        lambda weights: mean_area(by_score, weights) - mean_area(next(order), weights),
        [e.group or e.id for e, _ in rows],
        samples=200,
    )
    return {
        "AP at IoU .5 by score": (value, NAN, NAN),
        "AP with constant scores": (constant, NAN, NAN),
        "AP gained by the score": (value - constant, *gained),
    }


def _coco(rows: Answered, masks: bool = False) -> Values:
    figures = coco_metrics([(e.regions, p.regions) for e, p in rows], masks)
    return {name: (value, NAN, NAN) for name, value in figures.items() if value >= 0}  # -1: no object of this size


def _segment(example: Example, prediction: Prediction) -> Ratios:
    ious = instance_ious(example.regions, prediction.regions)
    found = sum(iou >= 0.5 for iou in ious)
    return {
        "mIoU": (sum(ious), len(ious)),  # over the objects; a missed one counts 0
        "precision": (
            found,
            len(prediction.regions),
        ),  # at mask IoU .5; mIoU ignores wrong extra objects
        "recall": (found, len(ious)),
    }


EXACT = Metric(_exact)
VQA = Metric(_vqa)
ANLS = Metric(_anls)
RELAXED = Metric(_relaxed)
READING = Metric(_reading, lower_is_better=("character error rate", "word error rate"))
YES_NO = Metric(_pope, neutral=("yes ratio",))
CAPTION = Metric(lambda example, prediction: {}, _captions)
EMPTY = Metric(_empty)
DETECT = Metric(_detect, _ranking, regions=True, scores=True, lower_is_better=(CALIBRATION_ERROR,))
COCO = replace(DETECT, corpus=_coco)  # of boxes
SEGMENT = replace(DETECT, score=_segment, corpus=None, masks=True)
COCO_MASKS = replace(SEGMENT, corpus=partial(_coco, masks=True), keep=packed)

METRICS: dict[str, Metric] = {
    "exact": EXACT,
    "vqa": VQA,
    "anls": ANLS,
    "relaxed": RELAXED,
    "reading": READING,
    "yes-no": YES_NO,
    "caption": CAPTION,
    "empty": EMPTY,
    "detect": DETECT,
    "coco": COCO,
    "segment": SEGMENT,
    "coco-masks": COCO_MASKS,
}


def refcoco(codec: MaskCodec) -> Metric:
    """The metric of RefCOCO: mIoU, and the shares of boxes with an IoU of at least .5 and .75. Every row has one region
    with a mask."""
    from paligemma.evaluate.refcoco import refcoco_ious

    def score(example: Example, prediction: Prediction) -> Ratios:
        (region,) = example.regions
        if region.mask is None:
            raise ValueError(f"row {example.id} has no mask")
        mask, box, valid = refcoco_ious(prediction.text, region.box, region.mask, codec)
        return {
            "mIoU": (mask, 1),
            "box accuracy at IoU .5": (box >= 0.5, 1),
            "box accuracy at IoU .75": (box >= 0.75, 1),
            "valid": (valid, 1),
        }

    return Metric(score, regions=True)
