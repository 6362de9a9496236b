"""What can be seen of a run while it goes on: the metric on answers that the model writes, pictures, TensorBoard.

A loss can fall while every answer stays empty: it is measured with the right tokens in front of it. So validation
lets the model *generate* and measures the answers, exactly as `paligemma evaluate` does: same prompts, same measures,
for captions all that the data has of a picture.

    validation/step-00000200/predictions.jsonl, results.json    all answers; the figures
                             examples/00.png ...                 truth beside answer, the same rows each time
                             worst/                              where it is furthest off
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from paligemma.data.rows import Row, Rows
from paligemma.evaluate import Example, Prediction, evaluate
from paligemma.evaluate.comparison import compare
from paligemma.evaluate.metrics import METRICS
from paligemma.evaluate.output_folder import read_predictions
from paligemma.evaluate.own_rows import load_pictures, metric_of_prompt, to_example
from paligemma.evaluate.report import Report
from paligemma.images import load_image
from paligemma.inference import BOX_BUDGET, TEXT_BUDGET, PaliGemma

if TYPE_CHECKING:
    from torch import nn

EXAMPLES = 12  # rows that are drawn at every validation


def chosen(rows: Rows, count: int, seed: int = 0) -> list[Row]:
    """`count` rows drawn by lot (always the same), in their order; all of them if there are no more."""
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))
    return [rows[i] for i in sorted(order[:count].tolist())]


@dataclass
class Sight:
    """Validation of one run. rows: to be answered. budget: see `budget_for`."""

    pg: PaliGemma
    rows: list[Row]
    metric: str
    folder: Path
    batch_size: int
    budget: int | None
    say: Callable[[str], None]

    def __call__(self, model: nn.Module, step: int) -> dict[str, Any]:
        """The figures of the model as it is, for the log: {"exact": 0.93, ...}."""
        report, _ = self.measure(f"step-{step:08d}")
        if report is None:
            return {}
        figures = figures_of(report)
        self.say(f"step {step}: " + ", ".join(f"{name} {shown(value)}" for name, value in figures.items()))
        return figures

    def measure(self, name: str) -> tuple[Report | None, list[tuple[Example, Prediction]]]:
        """The figures, and the rows that are drawn with what the model answered. Without a picture that can be read
        there are none, which is said: a run of hours goes on."""
        folder = self.folder / name
        shutil.rmtree(folder, ignore_errors=True)  # of a run that was killed here and does it again
        drawn = {str(row.number) for row in self.rows[:: max(1, len(self.rows) // EXAMPLES)][:EXAMPLES]}
        pictures: dict[str, Example] = {}
        missing: list[str] = []

        def examples() -> Iterator[Example]:
            """Opened one at a time: not all pictures lie in memory together."""
            for row in self.rows:
                try:
                    picture = load_pictures(row)
                except (OSError, ValueError):
                    missing.append(row.source)
                    continue
                example = to_example(row, metric_of_prompt(row.prefix, self.metric), picture, self.pg)
                if example.id in drawn:
                    pictures[example.id] = example
                yield example

        opening = examples()
        first = next(opening, None)
        if first is None:
            self.say(f"no validation: none of the pictures can be read, the first is that of {missing[0]}")
            return None, []
        report = evaluate(
            self.pg,
            chain([first], opening),
            METRICS,
            batch_size=self.batch_size,
            out_folder=folder,
            max_new_tokens=self.budget,
            progress=False,
        )
        if missing:
            named = f"{missing[0]}{', ...' if len(missing) > 1 else ''}"
            count = f"{len(missing)} of {len(self.rows)}"
            self.say(f"validation: the pictures of {count} rows cannot be read, they were left out: {named}")
        (folder / "examples").mkdir(exist_ok=True)
        answered = list(predictions_of(folder, pictures))
        for k, (example, prediction) in enumerate(answered):
            compare(example, prediction).save(folder / "examples" / f"{k:02d}.png")
        return report, answered


def predictions_of(folder: Path, examples: dict[str, Example]) -> Iterator[tuple[Example, Prediction]]:
    """Saved predictions of these examples (by id), in the order of the examples."""
    found = read_predictions(folder / "predictions.jsonl")
    for name, example in examples.items():
        yield example, Prediction.from_dict(found[name])


def figures_of(report: Report) -> dict[str, Any]:
    """Name -> value; with several measures the name says which: "detect/recall"."""
    several = len(report.counts) > 1
    return {f"{f.task}/{f.name}" if several else f.name: f.value for f in report.figures}


def shown(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


def budget_for(rows: list[Row], pg: PaliGemma) -> int:
    """New tokens that an answer may have: twice the longest right one and some, at most what inference allows. A model
    that has not learned to stop would otherwise cost 512 tokens a row."""
    encode = pg.processor.tokenizer.encode
    longest = max(len(encode(text)) for row in rows for text in (row.suffix, *row.suffixes, *row.answers))
    most = BOX_BUDGET if any(METRICS[metric_of_prompt(row.prefix)].regions for row in rows) else TEXT_BUDGET
    return min(most, 2 * longest + 8)


class TensorBoard:
    """Scalars and pictures for TensorBoard; nothing, said once, where it is not installed or cannot write."""

    def __init__(self, folder: Path, step: int, say: Callable[[str], None]) -> None:
        self.folder, self.say = folder, say
        self.writer: Any = None
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            say("no TensorBoard: pip install 'paligemma[train]' (log.jsonl has the same figures)")
            return
        self.writer = SummaryWriter(str(folder), purge_step=step + 1 if step else None)

    def __call__(self, entry: dict[str, Any]) -> None:
        """An entry of the log."""
        if self.writer is None:
            return
        named = entry.get("validation")
        scalars = {f"validation/{key}": value for key, value in named.items()} if named else entry
        try:
            for name, value in scalars.items():
                if isinstance(value, (int, float)) and name not in ("step", "time"):
                    self.writer.add_scalar(name if named else f"train/{name}", value, entry["step"])
            if named:
                self.pictures(
                    self.folder.parent / "validation" / f"step-{entry['step']:08d}" / "examples", entry["step"]
                )
        except OSError as error:  # a full disk ends the events, not the run
            self.say(f"TensorBoard ends here: {error}")
            self.writer = None

    def pictures(self, folder: Path, step: int) -> None:
        import numpy as np

        for path in sorted(folder.glob("*.png"))[:4]:
            self.writer.add_image(f"examples/{path.stem}", np.asarray(load_image(path)), step, dataformats="HWC")

    def close(self) -> None:
        if self.writer is not None:
            self.writer.close()
