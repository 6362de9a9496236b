"""What can be seen of a run while it goes on: the metric on answers that the model writes, pictures, TensorBoard.

A loss can fall while every answer stays empty: it is measured with the right tokens in front of it. So validation
lets the model *generate* and measures the answers, exactly as `paligemma evaluate` does: same prompts, same measures,
for captions all that the data has of a picture.

    validation/step-00000200/predictions.jsonl, results.json    all answers; the figures
                             examples/00.png ...                 truth beside answer, the same rows each time
                             worst/                              where it is furthest off
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from paligemma.answers.parsing import parse
from paligemma.data.rows import Row, Rows
from paligemma.evaluate import Example, Prediction, Region, evaluate
from paligemma.evaluate.average_precision import package
from paligemma.evaluate.measures import MEASURES
from paligemma.evaluate.pictures import compare
from paligemma.evaluate.report import Report
from paligemma.evaluate.runner import read_predictions
from paligemma.images import load_image
from paligemma.inference import BOX_BUDGET, TEXT_BUDGET, PaliGemma

if TYPE_CHECKING:
    from torch import nn

MEASURE_OF = {  # all others: exact
    "detect": "detect",
    "segment": "segment",
    "ocr": "reading",
    "caption": "caption",
    "cap": "caption",  # as pages of the web have it
    "describe": "caption",  # at length
}
EXAMPLES = 12  # rows that are drawn at every validation


def measure_of(prompt: str, metric: str = "auto") -> str:
    """The name of the measure for a prompt: by its first word, or `metric`. ValueError for a metric that is none,
    ImportError for one whose package is missing."""
    if metric == "auto":
        return MEASURE_OF.get(prompt.strip().partition(" ")[0], "exact")
    metric = "reading" if metric == "ocr" else metric
    if metric not in MEASURES:
        raise ValueError(f"there is no metric {metric!r}; there are: auto, ocr, {', '.join(MEASURES)}")
    if metric.startswith("coco"):
        package()  # missing, it is told before the first answer and not after the last
    return metric


def chosen(rows: Rows, count: int, seed: int = 0) -> list[Row]:
    """`count` rows drawn by lot (always the same), in their order; all of them if there are no more."""
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))
    return [rows[i] for i in sorted(order[:count].tolist())]


def right_answers(row: Row) -> tuple[str, ...]:
    return row.answers or (row.suffix,)


def what_is_seen(row: Row) -> str:
    """Equal for rows with the same pictures: their paths or bytes, hashed, so that not all bytes stay in memory."""
    digest = hashlib.blake2b(digest_size=16)
    for picture in row.pictures:
        digest.update(hashlib.blake2b(picture if isinstance(picture, bytes) else os.fsencode(picture)).digest())
    return digest.hexdigest()


def with_all_captions(some: list[Row], rows: Rows, metric: str) -> list[Row]:
    """`some` of the rows, where those that ask the same caption of the same picture become one, with all captions that
    `rows` has of it as its answers. Only if there are such, all rows are read once."""
    captions: dict[tuple[str, str], list[str]] = {
        (what_is_seen(row), row.prefix): [] for row in some if measure_of(row.prefix, metric) == "caption"
    }
    if not captions:
        return some
    for row in rows:
        if measure_of(row.prefix, metric) == "caption":
            captions.get((what_is_seen(row), row.prefix), []).extend(right_answers(row))
    kept = []
    for row in some:
        if measure_of(row.prefix, metric) != "caption":
            kept.append(row)
        elif answers := captions.pop((what_is_seen(row), row.prefix), None):
            kept.append(replace(row, answers=tuple(answers)))
    return kept


def opened(row: Row) -> Any:
    """The picture of a row, or a tuple of its pictures. Raises what `load_image` raises."""
    pictures = tuple(load_image(picture) for picture in row.pictures)
    return pictures if len(pictures) > 1 else pictures[0]


def to_example(row: Row, measure: str, picture: Any, pg: PaliGemma) -> Example:
    """A row with its picture opened. What its suffix says of boxes and masks becomes regions: where boxes are measured
    also the box of each mask. Rows about one picture are of one group: an interval must not take them for independent.
    """
    regions: list[Region] = []
    if MEASURES[measure].regions:
        masks = MEASURES[measure].masks
        size = (picture[0] if isinstance(picture, tuple) else picture).size
        parsed = parse(row.suffix, size, loc_scale=pg.loc_scale, codec=pg.codec if masks else None)
        found: list[Any] = [*parsed.segments] if masks else [*parsed.detections, *parsed.segments]
        regions = [Region(item.label, item.box, getattr(item, "mask", None)) for item in found]
    answers = () if regions else right_answers(row)
    return Example(str(row.number), picture, row.prefix, measure, answers, regions, group=what_is_seen(row))


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
                    picture = opened(row)
                except (OSError, ValueError):
                    missing.append(row.source)
                    continue
                example = to_example(row, measure_of(row.prefix, self.metric), picture, self.pg)
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
            MEASURES,
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
    most = BOX_BUDGET if any(MEASURES[measure_of(row.prefix)].regions for row in rows) else TEXT_BUDGET
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
