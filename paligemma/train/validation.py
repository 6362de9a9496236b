"""Validation during a run: the model writes answers to some rows, and these are measured and drawn.

A falling loss proves little: each token is predicted with the right tokens before it, so every *generated* answer may
still be empty. Validation therefore generates, exactly as `paligemma evaluate` does: the same prompts, the same
metrics, and for captions all references that the data has for a picture.

    validation/step-00000200/predictions.jsonl, results.json    all answers; the figures
                             examples/00.png ...                 truth beside answer, the same rows each time
                             worst/                              the rows with the worst answers
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image

from paligemma.data.rows import Row, Rows
from paligemma.evaluate import Example, Prediction, evaluate
from paligemma.evaluate.comparison import compare
from paligemma.evaluate.metrics import METRICS
from paligemma.evaluate.output_folder import read_predictions
from paligemma.evaluate.own_rows import load_pictures, merge_captions, metric_of_prompt, to_example
from paligemma.evaluate.report import Report
from paligemma.files import written_whole
from paligemma.inference import PaliGemma
from paligemma.tasks import BOX_BUDGET, TEXT_BUDGET
from paligemma.train.options import TrainOptions

if TYPE_CHECKING:
    from torch import nn

DRAWN = 12  # rows that are drawn at every validation
LARGEST_BATCH = 16


def validation_of(options: TrainOptions, pg: PaliGemma, rows: Rows, say: Callable[[str], None]) -> Validation:
    """rows: those for validation; without any, those to train on, of which a few are shown in the report."""
    own = options.validation is not None
    sample = random_sample(rows, options.validation_rows if own else DRAWN)
    if own:
        sample = merge_captions(sample, rows, options.metric)
    folder = Path(options.out) / "validation"
    batch_size = min(LARGEST_BATCH, options.batch)
    return Validation(
        pg, sample, options.metric, folder, batch_size, token_budget(sample, pg), options.most_pixels, say
    )


def check_metric(options: TrainOptions, pg: PaliGemma, rows: Rows) -> None:
    """ValueError, naming the row, for one that will be asked and that the metric cannot measure: better before the
    first step than after the last."""
    stand_in = Image.new("RGB", (224, 224))  # pictures need not be read for this
    for row in random_sample(rows, options.validation_rows):
        metric = metric_of_prompt(row.prefix, options.metric)
        try:
            example = to_example(row, metric, stand_in if row.pictures else None, pg)
            METRICS[metric].score(example, Prediction(""))
        except ValueError as error:
            raise ValueError(f"validation: {row.source}: {error}") from None


def random_sample(rows: Rows, count: int) -> list[Row]:
    """`count` rows at random, the same ones every time, in their order; all of them if there are no more."""
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))
    return [rows[i] for i in sorted(order[:count].tolist())]


def token_budget(rows: list[Row], pg: PaliGemma) -> int:
    """The most new tokens of an answer: twice the longest right one and a few more, but no more than inference allows.
    A model that has not learned to stop would otherwise cost 512 tokens a row."""
    encode = pg.processor.tokenizer.encode
    longest = max(len(encode(text)) for row in rows for text in (row.suffix, *row.suffixes, *row.answers))
    most = BOX_BUDGET if any(METRICS[metric_of_prompt(row.prefix)].regions for row in rows) else TEXT_BUDGET
    return min(most, 2 * longest + 8)


@dataclass
class Validation:
    """Called by the training loop with the model and the step; `measure` also serves the final figures."""

    pg: PaliGemma
    rows: list[Row]
    metric: str
    folder: Path
    batch_size: int
    max_new_tokens: int
    max_pixels: int
    say: Callable[[str], None]

    def __call__(self, model: nn.Module, step: int) -> dict[str, Any]:
        """The figures of the model as it is now, for the log: {"exact": 0.93, ...}."""
        report, _ = self.measure(f"step-{step:08d}")
        if report is None:
            return {}
        figures = figures_of(report)
        shown = {name: "–" if value is None else f"{value:.3f}" for name, value in figures.items()}
        self.say(f"step {step}: " + ", ".join(f"{name} {value}" for name, value in shown.items()))
        return figures

    def measure(self, name: str) -> tuple[Report | None, list[tuple[Example, Prediction]]]:
        """The report, and the rows that are drawn with the model's answers. If no row can be used, it says so and
        returns no report: that does not end a run of hours."""
        folder = self.folder / name
        shutil.rmtree(folder, ignore_errors=True)  # left by a run that was killed in this step
        drawn: dict[str, Example] = {}
        unreadable: list[str] = []
        unfit: list[str] = []
        examples = self._examples(drawn, unreadable, unfit)
        first = next(examples, None)
        if first is None and unfit:
            self.say(f"no validation: none of the rows can be measured, the first is {unfit[0]}")
            return None, []
        if first is None:
            self.say(f"no validation: none of the pictures can be read, the first is that of {unreadable[0]}")
            return None, []
        report = evaluate(
            self.pg,
            chain([first], examples),
            METRICS,
            batch_size=self.batch_size,
            out_folder=folder,
            max_new_tokens=self.max_new_tokens,
            progress=False,
        )
        if unreadable:
            named = f"{unreadable[0]}{', ...' if len(unreadable) > 1 else ''}"
            count = f"{len(unreadable)} of {len(self.rows)}"
            self.say(f"validation: the pictures of {count} rows cannot be read, they were left out: {named}")
        if unfit:
            count = f"{len(unfit)} of {len(self.rows)}"
            self.say(f"validation: {count} rows cannot be measured, they were left out, the first is {unfit[0]}")
        answers = read_predictions(folder / "predictions.jsonl")
        answered = [(example, Prediction.from_dict(answers[name])) for name, example in drawn.items()]
        (folder / "examples").mkdir(exist_ok=True)
        for k, (example, prediction) in enumerate(answered):
            with written_whole(folder / "examples" / f"{k:02d}.png") as beside:
                compare(example, prediction).save(beside)
        return report, answered

    def _examples(self, drawn: dict[str, Example], unreadable: list[str], unfit: list[str]) -> Iterator[Example]:
        """The rows with their pictures, one at a time, so that not all pictures lie in memory together. Those to be
        drawn are collected in `drawn` by their id, rows without their pictures in `unreadable`, and those that the
        metric cannot measure, with the reason, in `unfit`."""
        to_draw = {row.number for row in self.rows[:: max(1, len(self.rows) // DRAWN)][:DRAWN]}
        for row in self.rows:
            try:
                pictures = load_pictures(row, self.max_pixels)
            except (OSError, ValueError):
                unreadable.append(row.source)
                continue
            try:
                example = to_example(row, metric_of_prompt(row.prefix, self.metric), pictures, self.pg)
            except (OSError, ValueError) as error:
                unfit.append(f"{row.source}: {error}")
                continue
            if row.number in to_draw:
                drawn[example.id] = example
            yield example


def figures_of(report: Report) -> dict[str, Any]:
    """Name -> value; with several metrics the name begins with the metric: "detect/recall"."""
    several = len(report.counts) > 1
    return {f"{f.task}/{f.name}" if several else f.name: f.value for f in report.figures}
