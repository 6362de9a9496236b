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
from typing import TYPE_CHECKING, Any

from paligemma.data.rows import Row, Rows
from paligemma.evaluate import Example, evaluate
from paligemma.evaluate.benchmarks import BENCHMARKS
from paligemma.evaluate.measures import MEASURES
from paligemma.train.sight import measure_of, opened, right_answers, to_example, what_is_seen

if TYPE_CHECKING:
    from paligemma.evaluate.report import Report
    from paligemma.inference import PaliGemma


def metric_of(task: str | None) -> str:
    """The metric that a task is measured by: its own name, but for "ocr"; "auto" without one. ValueError, naming all
    there are and the benchmarks, for a task that is none."""
    if task is None:
        return "auto"
    try:
        return measure_of("", task)
    except ValueError:
        raise ValueError(
            f"there is no task {task!r}. Metrics for your own rows: ocr, {', '.join(MEASURES)}. "
            f"Benchmarks: {', '.join(BENCHMARKS)}"
        ) from None


def evaluate_rows(
    pg: PaliGemma,
    rows: Rows,
    metric: str = "auto",
    *,
    count: int | None = None,
    about: Mapping[str, Any] | None = None,
    **options: Any,
) -> Report:
    """metric: one of `MEASURES`, or "auto": by the first word of each prompt. count: the first so many alone, where all
    captions of a picture are one. about, options: as of `evaluate.runner.evaluate`. What an `out_folder` holds is taken
    row by row, as long as prompts and pictures are the same.

    ValueError for an unknown metric, `RowError` for a row that cannot be read, and what `load_image` raises for its
    picture, with the row's place.
    """
    measure_of("", metric)  # a mistyped name is told at once
    # Captions are gathered first, so their number is not that of the rows.
    total = count if metric in ("auto", "caption") else min(len(rows), count or len(rows))
    examples = examples_of(rows, metric, pg, count)
    about = {**(about or {}), "metric": metric}
    return evaluate(pg, examples, MEASURES, about=about, total=total, **options)


def examples_of(rows: Rows, metric: str, pg: PaliGemma, count: int | None = None) -> Iterator[Example]:
    """The first `count` questions of the rows, each with its picture opened; captions last, picture by picture. All
    rows are gone through for captions: those of one picture may lie anywhere."""
    captions: dict[tuple[str, str], tuple[int, list[str]]] = {}  # the picture's first row, what the rows say of it
    taken = 0
    for row in rows:
        measure, more = measure_of(row.prefix, metric), count is None or taken < count
        if measure == "caption":
            question = what_is_seen(row), row.prefix
            if more and question not in captions:
                captions[question] = row.number, []
                taken += 1
            if question in captions:
                captions[question][1].extend(right_answers(row))
        elif more:
            taken += 1
            yield _opened(row, measure, pg)
        if not more and not captions:
            return
    for number, answers in captions.values():
        yield _opened(replace(rows[number], answers=tuple(answers)), "caption", pg)


def _opened(row: Row, measure: str, pg: PaliGemma) -> Example:
    if not row.pictures:
        raise ValueError(f"{row.source}: a row without a picture cannot be measured")
    try:
        picture = opened(row)
    except (OSError, ValueError) as error:
        raise type(error)(f"{row.source}: {error}") from None
    return to_example(row, measure, picture, pg)
