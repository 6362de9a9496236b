"""Runs a model over examples and measures the answers.

    report = evaluate(pg, examples, metrics, out_folder="runs/measured")
    Console().print(report.table())

The answers are saved as they come, see `output_folder.py`. All figures are computed from the saved answers and the
examples alone, see `summary.py`, so they can be computed again without the model.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

from paligemma.answers.scores import IDENTITY
from paligemma.evaluate.examples import Example, Prediction
from paligemma.evaluate.metrics import METRICS, Metric
from paligemma.evaluate.output_folder import (
    append,
    fingerprint,
    fingerprint_of_codec,
    held,
    open_folder,
    saved_prediction,
    write_run_file,
    write_scores,
)
from paligemma.evaluate.report import Report, environment
from paligemma.evaluate.summary import Scored, badness, score, summarize
from paligemma.evaluate.worst import WorstRows
from paligemma.tasks import budget_of, task_of

if TYPE_CHECKING:
    from paligemma.inference import PaliGemma


def evaluate(
    pg: PaliGemma,
    examples: Iterable[Example],
    metrics: Mapping[str, Metric] = METRICS,
    *,
    batch_size: int = 16,
    out_folder: str | Path | None = None,
    targets: Mapping[tuple[str, str], float] | None = None,
    about: Mapping[str, Any] | None = None,
    constrained: bool = True,
    max_new_tokens: int | None = None,
    beams: int = 1,
    published: Mapping[tuple[str, str], float] | None = None,
    worst: int = 20,
    progress: bool = True,
    total: int | None = None,
) -> Report:
    """Answers every example, greedily or by beam search, and measures the answers task by task.

    metrics:        the metric of each task.
    out_folder:     where to save the answers; rows that are in it already are not run again.
    targets:        (task, figure) -> the least value hoped for (the largest, for error rates).
    about:          what this run is (model, data, ...): goes into the report. A folder is only continued with the same,
                    and with the same weights; a row in it only counts if it was asked the same of the same picture.
    constrained:    decode `detect` and `segment` under the grammar, as `pg.detect` does; False: without it, as
                    published figures were made.
    max_new_tokens: default 512 for `detect` and `segment`, 128 for the rest.
    beams:          2 or more: the likeliest answer that a search with this many beams finds, without a penalty for
                    length.
    published:      (task, figure) -> the value that others published, shown beside ours.
    worst:          how many of the worst rows are drawn into the folder.
    total:          about how many rows there are, for the progress bar; not needed if `examples` has a length.

    Every answer counts, whatever it is; none is dropped. ValueError for a task without a metric, for two examples with
    one id, for no examples at all, and for a folder that holds another run; what `output_folder.held` raises.
    """
    about = {**(about or {}), "constrained": constrained, "max_new_tokens": max_new_tokens, "weights": fingerprint(pg)}
    if beams > 1:
        about["beams"] = beams
    if (calibration := getattr(pg, "calibration", IDENTITY)) != IDENTITY:  # scores are saved as it maps them
        about["calibration"] = calibration.to_dict()
    folder = Path(out_folder) if out_folder is not None else None
    codec = functools.cache(lambda: fingerprint_of_codec(pg))  # asked for where there are masks
    with held(folder) if folder else nullcontext():
        started = time.perf_counter()
        results = _Results(metrics, WorstRows(worst if folder else 0, metrics))
        saved = open_folder(folder, about) if folder else {}
        with _progress(progress, len(examples) if isinstance(examples, Sized) else total) as advance:

            def unanswered() -> Iterator[Example]:
                for example in examples:
                    results.register(example)
                    if example.id in saved:
                        results.add(example, saved_prediction(saved.pop(example.id), example, folder, codec))
                        advance()
                    else:
                        yield example

            for number, batch in enumerate(batches(unanswered(), batch_size)):
                predictions = answer(pg, batch, constrained, max_new_tokens, beams)
                if folder:
                    if number == 0:  # not earlier: a run without an answer is nothing to continue
                        write_run_file(folder, about)
                    append(folder / "predictions.jsonl", batch, predictions, codec)
                for example, prediction in zip(batch, predictions):
                    results.add(example, prediction)
                    advance()

        rows = results.in_order()
        if not rows:
            raise ValueError("there are no examples to evaluate")
        report = summarize(rows, metrics, targets or {}, about, published)
        measured = {
            "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "seconds": round(time.perf_counter() - started, 1),  # of this call; saved rows take none
        }
        report = replace(report, environment=measured | environment())
        if folder:
            report = replace(report, worst=results.worst.draw(folder / "worst"))
            write_scores(folder, rows)
            report.save(folder)
    return report


class _Results:
    """The rows answered so far, each with its scores."""

    def __init__(self, metrics: Mapping[str, Metric], worst: WorstRows) -> None:
        self.metrics, self.worst = metrics, worst
        self.rows: list[Scored] = []
        # The position of each row among the examples: figures must not depend on the order in which rows are answered.
        self.position: dict[str, int] = {}

    def register(self, example: Example) -> None:
        """ValueError for a task without a metric and for an id that another row has."""
        if example.task not in self.metrics:
            raise ValueError(
                f"row {example.id}: no measure for the task {example.task!r}; there is: {', '.join(self.metrics)}"
            )
        if example.id in self.position:
            raise ValueError(f"two rows have the id {example.id!r}")
        self.position[example.id] = len(self.position)

    def add(self, example: Example, prediction: Prediction) -> None:
        metric = self.metrics[example.task]
        row = score(example, prediction, metric)
        self.worst.offer(example, prediction, badness(row.ratios, metric), self.position[example.id])
        self.rows.append(row)

    def in_order(self) -> list[Scored]:
        return sorted(self.rows, key=lambda row: self.position[row.example.id])


def batches(examples: Iterable[Example], size: int) -> Iterator[list[Example]]:
    """Batches of one task each: a batch is as slow as its longest answer, and a caption is longer than a "yes"."""
    waiting: dict[str, list[Example]] = {}
    for example in examples:
        batch = waiting.setdefault(example.task, [])
        batch.append(example)
        if len(batch) == size:
            yield waiting.pop(example.task)
    yield from waiting.values()


def answer(
    pg: PaliGemma,
    batch: Sequence[Example],
    constrained: bool = True,
    max_new_tokens: int | None = None,
    beams: int = 1,
    batch_size: int | None = None,
) -> list[Prediction]:
    """Answers to a batch; with `batch_size` in several smaller batches, for which a picture is encoded once."""
    prompts = [example.prompt for example in batch]
    search: dict[str, Any] = {"num_beams": beams, "length_penalty": 0.0} if beams > 1 else {}
    masks = any(task_of(prompt) == "segment" for prompt in prompts)
    answers = pg.generate(
        [example.image for example in batch],
        prompts,
        max_new_tokens or max(map(budget_of, prompts)),
        constrained=constrained,
        batch_size=batch_size or len(batch),
        codec=pg.codec if masks else None,
        **search,
    )
    return [Prediction.of(a) for a in answers]


@contextmanager
def _progress(show: bool, total: int | None) -> Iterator[Callable[[], None]]:
    """A progress bar on stderr. Yields a function to call after every row."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    show = show and console.is_terminal  # in a log file it would leave an empty line
    with Progress(TextColumn("evaluating"), *columns, console=console, disable=not show, transient=True) as bar:
        task = bar.add_task("", total=total)
        yield lambda: bar.advance(task)
