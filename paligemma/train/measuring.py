"""How good is a model on your rows? The data that can be trained on, asked and measured.

    report = evaluate_rows(pg, open_rows("test.jsonl"), "vqa", out_folder="runs/measured")

Right is what the suffix says, or any of the row's `answers` if it has several. VQA accuracy is made for the answers of
ten people: three have to agree, so two or three spellings of one answer are better measured as "exact". For captions
all rows that ask the same of the same picture are one, with all their captions as references. Boxes and masks are those
that the suffix's tokens stand for: rounded to a thousandth of the picture, and masks as the codec keeps them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from itertools import islice
from typing import TYPE_CHECKING, Any

from paligemma.evaluate import Example, evaluate
from paligemma.evaluate.benchmarks import BENCHMARKS
from paligemma.evaluate.measures import MEASURES
from paligemma.train.data import Row, Rows
from paligemma.train.sight import measure_of, opened, to_example

if TYPE_CHECKING:
    from paligemma.evaluate.report import Report
    from paligemma.inference import PaliGemma


def metric_of(task: str | None) -> str:
    """The metric that a task is measured by: its own name, but for "ocr"; "auto" without one. ValueError, naming all
    there are and the benchmarks, for a task that is none."""
    metric = {None: "auto", "ocr": "reading"}.get(task, task) or "auto"
    if metric != "auto" and metric not in MEASURES:
        raise ValueError(
            f"there is no task {task!r}. Metrics for your own rows: ocr, {', '.join(MEASURES)}. "
            f"Benchmarks: {', '.join(BENCHMARKS)}"
        )
    return metric


def evaluate_rows(
    pg: PaliGemma,
    rows: Rows,
    metric: str = "auto",
    *,
    count: int | None = None,
    about: Mapping[str, Any] | None = None,
    **options: Any,
) -> Report:
    """metric: one of `MEASURES`, or "auto": by the first word of each prompt. count: the first rows alone. about,
    options: as of `evaluate.runner.evaluate`.

    ValueError for an unknown metric, `RowError` for a row that cannot be read, and what `load_image` raises for its
    picture, with the row's place.
    """
    measure_of("", metric)  # a mistyped name is told at once
    # Captions are gathered first, so their number is not that of the rows.
    total = None if metric in ("auto", "caption") else min(len(rows), count or len(rows))
    examples: Iterator[Example] = examples_of(rows, metric, pg)
    return evaluate(
        pg, islice(examples, count), MEASURES, about={**(about or {}), "metric": metric}, total=total, **options
    )


def examples_of(rows: Rows, metric: str, pg: PaliGemma) -> Iterator[Example]:
    """Rows as they are asked for, each with its picture opened; captions last, picture by picture."""
    captions: dict[Any, Row] = {}
    for row in rows:
        measure = measure_of(row.prefix, metric)
        if measure == "caption":
            known = captions.setdefault((row.image, row.prefix), replace(row, answers=()))
            captions[row.image, row.prefix] = replace(known, answers=(*known.answers, *(row.answers or (row.suffix,))))
        else:
            yield _opened(row, measure, pg)
    for row in captions.values():
        yield _opened(row, "caption", pg)


def _opened(row: Row, measure: str, pg: PaliGemma) -> Example:
    if not row.pictures:
        raise ValueError(f"{row.source}: a row without a picture cannot be measured")
    try:
        picture = opened(row)
    except (OSError, ValueError) as error:
        raise type(error)(f"{row.source}: {error}") from None
    return to_example(row, measure, picture, pg)
