"""How good is a model on your own rows? Whatever can be trained on can also be asked and measured.

    report = evaluate_rows(pg, open_rows("test.jsonl"), "vqa", out_folder="runs/measured")

An answer is right if it is what the row's suffix says, or one of the row's `answers` if it has several. VQA accuracy is
made for the answers of ten people, of whom three have to agree; two or three spellings of one answer are better
measured as "exact". For captions, all rows that ask the same of the same picture become one example, with all their
captions as references. The true boxes and masks are read from the suffix's tokens: boxes rounded to a thousandth of the
picture, masks as the codec keeps them.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from paligemma.answers.parsing import parse
from paligemma.data.prompts import plain_form
from paligemma.data.rows import Row, Rows
from paligemma.evaluate.average_precision import package
from paligemma.evaluate.benchmarks import BENCHMARKS
from paligemma.evaluate.examples import Example
from paligemma.evaluate.metrics import METRICS
from paligemma.evaluate.regions import Region
from paligemma.evaluate.runner import evaluate
from paligemma.images import load_image
from paligemma.tasks import task_of

if TYPE_CHECKING:
    from paligemma.evaluate.report import Report
    from paligemma.inference import PaliGemma

METRIC_OF = {  # by the first word of a prompt; all others: exact
    "detect": "detect",
    "segment": "segment",
    "ocr": "reading",
    "caption": "caption",
    "cap": "caption",  # the prompt for captions in the style of web pages
    "describe": "caption",  # for long ones
}


def evaluate_rows(
    pg: PaliGemma,
    rows: Rows,
    metric: str = "auto",
    *,
    count: int | None = None,
    max_pixels: int | None = None,
    about: Mapping[str, Any] | None = None,
    **options: Any,
) -> Report:
    """metric: one of `METRICS`, or "auto": by the first word of each prompt. count: only the first `count` questions,
    where all captions of a picture are one question. max_pixels: see `load_image`. about, options: as for
    `evaluate.runner.evaluate`. Answers that an `out_folder` holds already are reused row by row, as long as prompts and
    pictures are the same.

    ValueError for an unknown metric, `RowError` for a row that cannot be read, and what `load_image` raises for its
    picture, with the row's place.
    """
    metric_of_prompt("", metric)  # a mistyped name fails at once
    # Captions are gathered first, so their number is not that of the rows.
    total = count if metric in ("auto", "caption") else min(len(rows), count or len(rows))
    examples = examples_of(rows, metric, pg, count, max_pixels)
    about = {**(about or {}), "metric": metric}
    return evaluate(pg, examples, METRICS, about=about, total=total, **options)


def examples_of(
    rows: Rows, metric: str, pg: PaliGemma, count: int | None = None, max_pixels: int | None = None
) -> Iterator[Example]:
    """The first `count` questions of the rows, each with its picture loaded. Captions come last, picture by picture:
    those of one picture may stand anywhere, so all rows are read first."""
    captions: dict[tuple[str, str], tuple[int, list[str]]] = {}  # the picture's first row, what the rows say of it
    taken = 0
    for row in rows:
        metric_name, more = metric_of_prompt(row.prefix, metric), count is None or taken < count
        if metric_name == "caption":
            question = picture_key(row), row.prefix
            if more and question not in captions:
                captions[question] = row.number, []
                taken += 1
            if question in captions:
                captions[question][1].extend(right_answers(row, "caption"))
        elif more:
            taken += 1
            yield _example(row, metric_name, pg, max_pixels)
        if not more and not captions:
            return
    for number, answers in captions.values():
        yield _example(replace(rows[number], answers=tuple(answers)), "caption", pg, max_pixels)


def _example(row: Row, metric_name: str, pg: PaliGemma, max_pixels: int | None) -> Example:
    try:
        return to_example(row, metric_name, load_pictures(row, max_pixels), pg)
    except (OSError, ValueError) as error:
        raise type(error)(f"{row.source}: {error}") from None


# --------------------------------------------------------------------------------------------------- what is measured


def asks_for_scores(rows: Rows, metric: str, count: int | None = None) -> bool:
    """Whether any of the first `count` questions asks for boxes or masks, whose scores can be compared with how often
    they are right. Captions come last, see `examples_of`."""
    asked = 0
    for row in rows:
        name = metric_of_prompt(row.prefix, metric)
        if METRICS[name].scores:
            return True
        asked += name != "caption"
        if count is not None and asked >= count:
            return False
    return False


def metric_of_prompt(prompt: str, metric: str = "auto") -> str:
    """The metric for the answers to a prompt: `metric` if one is named, otherwise by the prompt's first word, even if
    it is written in an unusual way ("Detect license plate.").

    ValueError for an unknown metric, ImportError for one whose package is missing.
    """
    if metric == "auto":
        return METRIC_OF.get(task_of(plain_form(prompt)), "exact")
    metric = "reading" if metric == "ocr" else metric
    if metric not in METRICS:
        raise ValueError(f"there is no metric {metric!r}; there are: auto, ocr, {', '.join(METRICS)}")
    if metric.startswith("coco"):
        package()  # if it is missing, say so before the first answer and not after the last
    return metric


def metric_of_task(task: str | None) -> str:
    """The metric for the command's --task; "auto" without one. ValueError, listing metrics and benchmarks, for an
    unknown task."""
    if task is None:
        return "auto"
    try:
        return metric_of_prompt("", task)
    except ValueError:
        raise ValueError(
            f"there is no task {task!r}. Metrics for your own rows: ocr, {', '.join(METRICS)}. "
            f"Benchmarks: {', '.join(BENCHMARKS)}"
        ) from None


# ------------------------------------------------------------------------------------------------- from row to example


def right_answers(row: Row, metric: str) -> tuple[str, ...]:
    """The answers of the row, and what it trains on. VQA counts how many people gave an answer: nothing is added."""
    if row.suffix in row.answers or (row.answers and metric == "vqa"):
        return row.answers
    return (*row.answers, row.suffix)


def picture_key(row: Row) -> str:
    """Equal for rows with the same pictures: a hash of their paths or bytes, so that the bytes need not be kept. Rows
    without a picture have nothing in common."""
    if not row.pictures:
        return f"row {row.number}"
    digest = hashlib.blake2b(digest_size=16)
    for picture in row.pictures:
        digest.update(hashlib.blake2b(picture if isinstance(picture, bytes) else os.fsencode(picture)).digest())
    return digest.hexdigest()


def merge_captions(some: list[Row], rows: Rows, metric: str) -> list[Row]:
    """`some` of the rows, in which all that ask for a caption of the same picture in the same words become one row. Its
    answers are all captions that `rows` has of the picture. All rows are read once, if `some` has such rows at all."""
    captions: dict[tuple[str, str], list[str]] = {
        (picture_key(row), row.prefix): [] for row in some if metric_of_prompt(row.prefix, metric) == "caption"
    }
    if not captions:
        return some
    for row in rows:
        if metric_of_prompt(row.prefix, metric) == "caption":
            captions.get((picture_key(row), row.prefix), []).extend(right_answers(row, "caption"))
    kept = []
    for row in some:
        if metric_of_prompt(row.prefix, metric) != "caption":
            kept.append(row)
        elif answers := captions.pop((picture_key(row), row.prefix), None):
            kept.append(replace(row, answers=tuple(answers)))
    return kept


def load_pictures(row: Row, max_pixels: int | None = None) -> Any:
    """The picture of a row, a tuple of its pictures, or None for a row without. max_pixels: see `load_image`, whose
    errors are raised."""
    pictures = tuple(load_image(picture, max_pixels) for picture in row.pictures)
    return pictures if len(pictures) > 1 else next(iter(pictures), None)


def to_example(row: Row, metric: str, picture: Any, pg: PaliGemma) -> Example:
    """A row and its picture as an example. Boxes and masks in its suffix become regions; where boxes are measured, the
    box of a mask counts too. Rows about one picture are one group, since their answers are not independent: a
    confidence interval must know. ValueError for boxes without a picture, for boxes where masks are measured, and for
    a box or mask that cannot be read."""
    regions: list[Region] = []
    if METRICS[metric].regions:
        if picture is None:
            raise ValueError(f"boxes and masks of {row.prefix!r} need a picture, and the row has none")
        masks = METRICS[metric].masks
        size = (picture[0] if isinstance(picture, tuple) else picture).size
        parsed = parse(row.suffix, size, loc_scale=pg.loc_scale, codec=pg.codec if masks else None)
        if parsed.invalid:
            (start, end), reason = parsed.invalid[0]
            raise ValueError(f"the right answer cannot be read: {row.suffix[start:end]!r}: {reason}")
        if masks and parsed.detections:
            raise ValueError(f"{metric} measures masks, and the answer has boxes alone: choose another metric (detect)")
        found: list[Any] = [*parsed.segments] if masks else [*parsed.detections, *parsed.segments]
        regions = [Region(item.label, item.box, getattr(item, "mask", None)) for item in found]
    answers = () if regions else right_answers(row, metric)
    return Example(str(row.number), picture, row.prefix, metric, answers, regions, group=picture_key(row))
