"""Metrics that only a benchmark has: after lower-casing, separately for parts of the data, by the letter of a choice.

They follow big_vision's evaluators (`evaluators/proj/paligemma/transfers`) and are built from `evaluate/metrics.py`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence

from paligemma.evaluate.examples import Example, Prediction
from paligemma.evaluate.metrics import NAN, Answered, Metric, Ratios, Values
from paligemma.evaluate.text import anls, exact_match, relaxed_accuracy
from paligemma.evaluate.vqa import agreement, vqa_accuracy
from paligemma.evaluate.yes_no import pope_counts

Score = Callable[[str, Sequence[str]], float]  # text, right answers -> 0 to 1


def share(name: str, score: Score, *, lower: bool = False) -> Metric:
    """The mean of a score over the rows. lower: text and answers in lower case."""
    return Metric(lambda example, prediction: {name: (_scored(score, example, prediction, lower), 1)})


def _scored(score: Score, example: Example, prediction: Prediction, lower: bool) -> float:
    text, answers = prediction.text, list(example.answers)
    if lower:
        text, answers = text.lower(), [answer.lower() for answer in answers]
    return score(text, answers)


def in_parts(name: str, score: Score, kinds: Sequence[str], *, lower: bool = False, mean: str = "") -> Metric:
    """The same, and separately for each kind of rows. mean: the name of the mean over the kinds that occur, if that is
    the published figure."""

    def rated(example: Example, prediction: Prediction) -> Ratios:
        value = _scored(score, example, prediction, lower)
        apart = {f"{name}, {kind}": (value, 1) if example.kind == kind else (0, 0) for kind in kinds}
        return {name: (value, 1), **apart}

    def over_kinds(rows: Answered) -> Values:
        sums = {kind: [_scored(score, e, p, lower) for e, p in rows if e.kind == kind] for kind in kinds}
        parts = [sum(values) / len(values) for values in sums.values() if values]
        return {mean: (sum(parts) / len(parts) if parts else math.nan, NAN, NAN)}

    return Metric(rated, over_kinds if mean else None)


# --- TallyQA --------------------------------------------------------------------------------------

_NUMBERS = {
    word: str(number)
    for number, word in enumerate(
        "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen "
        "seventeen eighteen nineteen twenty".split()
    )
} | {"none": "0"}


def same_number(text: str, answers: Sequence[str]) -> float:
    """Exact match; a number may be written as a word, up to "twenty"."""
    return exact_match(_NUMBERS.get(text.strip().lower(), text), answers)


# --- ScienceQA ------------------------------------------------------------------------------------


def letter(text: str) -> str | None:
    """The "b" of "The answer is B."; None for a text that does not begin like this."""
    found = re.match(r"the answer is ([a-z])\.", text.lower())
    return found[1] if found else None


def _science(example: Example, prediction: Prediction) -> Ratios:
    said, right = letter(prediction.text), letter(example.answers[0])
    return {"accuracy": (said == right, 1), "valid": (said is not None, 1)}


# --- POPE -----------------------------------------------------------------------------------------


def _pope(example: Example, prediction: Prediction) -> Ratios:
    """Accuracy as in big_vision: only "yes" and "no" are answers. F1 and yes ratio as in POPE's own script, which takes
    everything that does not deny for a yes."""
    text, right = prediction.text.strip().lower(), example.answers[0]
    accuracy = (text == right, 1)
    apart = {
        f"accuracy, {kind}": accuracy if example.kind == kind else (0, 0)
        for kind in ("random", "popular", "adversarial")
    }
    by_script = pope_counts(prediction.text, right)
    return {"accuracy": accuracy, **apart, **{name: by_script[name] for name in ("F1", "yes ratio", "valid")}}


# --- the metrics ---------------------------------------------------------------------------------

VQA_BY_TYPE = in_parts("VQA accuracy", vqa_accuracy, ("yes/no", "number", "other"))
AGREEMENT = share("accuracy", agreement)
ACCURACY = share("accuracy", exact_match)
LOWER_ACCURACY = share("accuracy", exact_match, lower=True)
LOWER_ANLS = share("ANLS", anls, lower=True)
CHART = in_parts(
    "relaxed accuracy", relaxed_accuracy, ("human", "augmented"), lower=True, mean="relaxed accuracy, mean of the two"
)
TALLY = in_parts("accuracy", same_number, ("simple", "complex"))
REMOTE_SENSING = in_parts(
    "accuracy", exact_match, ("comp", "presence", "rural_urban"), lower=True, mean="accuracy, mean of types"
)
SCIENCE = Metric(_science)
POPE = Metric(_pope, neutral=("yes ratio",))
NOTHING = Metric(lambda example, prediction: {})  # for splits whose answers are kept on a server
