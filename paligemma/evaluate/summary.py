"""From scored rows to figures.

Every row adds a numerator and a denominator to each figure of its task. A figure is the ratio of the sums over all
rows; see `metrics.py`.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from paligemma.evaluate.calibration import CALIBRATION_ERROR, Item, expected_calibration_error, scored_items
from paligemma.evaluate.examples import Example, Prediction
from paligemma.evaluate.intervals import ratio_interval
from paligemma.evaluate.metrics import Metric, Ratios
from paligemma.evaluate.report import Counts, Figure, Report, nan_to_none


@dataclass(frozen=True)
class Scored:
    """A row after it was answered: without its picture, and with its masks only as far as its metric needs them later.
    A million pictures or masks would not fit into memory."""

    example: Example
    prediction: Prediction
    ratios: Ratios
    items: list[Item] = field(default_factory=list)  # its boxes or masks, where their scores are measured


def score(example: Example, prediction: Prediction, metric: Metric) -> Scored:
    ratios = {name: (float(a), float(b)) for name, (a, b) in metric.score(example, prediction).items()}
    items = scored_items(example.regions, prediction.regions, metric.masks) if metric.scores else []
    true, found = ([metric.keep(region) for region in one.regions] for one in (example, prediction))
    return Scored(replace(example, image=None, regions=true), replace(prediction, regions=found), ratios, items)


def summarize(
    rows: Sequence[Scored],
    metrics: Mapping[str, Metric],
    targets: Mapping[tuple[str, str], float],
    about: Mapping[str, Any],
    published: Mapping[tuple[str, str], float] | None = None,
) -> Report:
    """Figures task by task, in the order of `metrics`."""
    figures: list[Figure] = []
    counts: dict[str, Counts] = {}
    items: dict[str, list[Item]] = {}
    for task, metric in metrics.items():
        own = [row for row in rows if row.example.task == task]
        if not own:
            continue
        counts[task] = Counts(
            len(own),
            sum(is_invalid(row.prediction, metric) for row in own),
            sum(not row.prediction.finished for row in own),
        )
        if scored := [item for row in own for item in row.items]:
            items[task] = scored
        baselines = baseline(own, metric)
        for name, found in values(own, metric).items():
            value, low, high = map(nan_to_none, found)
            figures.append(
                Figure(
                    task,
                    name,
                    value,
                    low,
                    high,
                    rows=len(own),
                    baseline=baselines.get(name),
                    target=targets.get((task, name)),
                    published=(published or {}).get((task, name)),
                    lower_is_better=name in metric.lower_is_better,
                )
            )
    masks = [task for task in items if metrics[task].masks]
    shares: dict[tuple[str, str], dict[str, tuple[str, float, float]]] = {}
    for row in rows:
        for name, (top, bottom) in row.ratios.items():
            of_rows = shares.setdefault((row.example.task, name), {})
            of_rows[row.example.id] = (row.example.group or row.example.id, top, bottom)
    return Report(figures, counts, dict(about), items=items, mask_tasks=masks, shares=shares)


def is_invalid(prediction: Prediction, metric: Metric) -> bool:
    """A part could not be read, or boxes were asked for and the text has none."""
    return bool(prediction.invalid) or (metric.regions and bool(prediction.text.strip()) and not prediction.regions)


def values(rows: Sequence[Scored], metric: Metric) -> dict[str, tuple[float, float, float]]:
    """Name -> value and the ends of its interval."""
    groups = [row.example.group or row.example.id for row in rows]
    found = {}
    for name in rows[0].ratios:
        tops, bottoms = [row.ratios[name][0] for row in rows], [row.ratios[name][1] for row in rows]
        total = sum(bottoms)
        interval = ratio_interval(tops, bottoms, groups) if total else (math.nan, math.nan)
        found[name] = (sum(tops) / total if total else math.nan, *interval)
    if metric.corpus:
        found |= metric.corpus([(row.example, row.prediction) for row in rows])
    if items := [item for row in rows for item in row.items]:
        found[CALIBRATION_ERROR] = (expected_calibration_error(items), math.nan, math.nan)
    return found


def baseline(rows: Sequence[Scored], metric: Metric) -> dict[str, float | None]:
    """The same figures if every answer were the commonest right one. Boxes have no commonest answer: no baseline."""
    commonest = Counter(answer for row in rows for answer in row.example.answers).most_common(1)
    if metric.regions or not commonest:
        return {}
    guess = Prediction(commonest[0][0])
    guesses = [Scored(row.example, guess, metric.score(row.example, guess)) for row in rows]
    sums = {name: [sum(row.ratios[name][part] for row in guesses) for part in (0, 1)] for name in guesses[0].ratios}
    figures = {name: top / bottom if bottom else None for name, (top, bottom) in sums.items()}
    if metric.corpus:
        figures |= {
            name: nan_to_none(value[0]) for name, value in metric.corpus([(row.example, guess) for row in rows]).items()
        }
    return figures


def badness(ratios: Ratios, metric: Metric) -> float:
    """How wrong a row is, from 0 (perfect) to 1 (it adds nothing to any figure): the mean over its figures."""
    parts = [
        min(top / bottom, 1.0) if name in metric.lower_is_better else 1 - min(top / bottom, 1.0)
        for name, (top, bottom) in ratios.items()
        if bottom and name not in metric.neutral
    ]
    return sum(parts) / len(parts) if parts else 0.0
