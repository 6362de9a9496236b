"""Runs a model over rows and measures it.

    report = evaluate(pg, examples, measures, out_folder="runs/measured")
    Console().print(report.table())

    runs/measured/
      run.json            what run this is: it only goes on with the same weights and options
      predictions.jsonl   every answer, written as it comes: a run that was cut off goes on where it stopped
      scores.jsonl        what every row adds to each figure
      results.json        the figures
      worst/              pictures of the worst rows: truth beside answer

The figures depend on `predictions.jsonl` and the examples alone, so they can be computed anew without the model.
"""

from __future__ import annotations

import hashlib
import heapq
import json
import math
import os
import platform
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence, Sized
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from paligemma.evaluate.examples import Example, Prediction
from paligemma.evaluate.intervals import ratio_interval
from paligemma.evaluate.metrics import METRICS, Metric, Ratios
from paligemma.evaluate.report import Counts, Figure, Report, number, write_lines
from paligemma.files import read_json_value, write_text
from paligemma.images import load_image
from paligemma.inference import BOX_BUDGET, TEXT_BUDGET

if TYPE_CHECKING:
    from paligemma.inference import PaliGemma

# What a run writes beside its run.json.
WRITTEN = ("predictions.jsonl", "scores.jsonl", "results.json", "worst")
# Where things lie. Data and models may be moved: weights are compared, and row by row what was asked and seen.
PLACES = ("model", "data", "images", "annotations")
AGAIN = "remove this line, and its row is asked again"


@dataclass(frozen=True)
class Scored:
    """A row after it was answered, without its picture, and its masks only as far as its measure keeps them: a million
    of them must not fill the memory."""

    example: Example
    prediction: Prediction
    ratios: Ratios


def evaluate(
    pg: PaliGemma,
    examples: Iterable[Example],
    measures: Mapping[str, Metric] = METRICS,
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
    """Answers to every example, greedy or by beams, measured task by task.

    measures:       how each task is measured.
    out_folder:     see above. Rows that are in its `predictions.jsonl` are not run again.
    targets:        (task, figure) -> the least value hoped for (the most, for error rates).
    about:          what this run is (model, data, ...): goes into the report. A folder is only continued with the same,
                    and with the same weights; a row in it only counts if it was asked the same of the same picture.
    constrained:    decode `detect` and `segment` under the grammar, as `pg.detect` does; False: freely, as published
                    figures are made.
    max_new_tokens: default 512 for `detect` and `segment`, 128 for the rest.
    beams:          2 or more: the likeliest answer that a search with so many finds, without a penalty for length.
    published:      (task, figure) -> what others have published, to be shown beside ours.
    worst:          how many of the worst rows to draw into the folder.
    total:          how many rows there are, about, for the progress bar; a list tells it itself.

    Whatever the model answers counts: nothing is dropped. ValueError for a task without a measure, for two examples of
    one id, for no examples, and for a folder of another run.
    """
    about = {**(about or {}), "constrained": constrained, "max_new_tokens": max_new_tokens, "weights": fingerprint(pg)}
    if beams > 1:
        about["beams"] = beams
    folder = Path(out_folder) if out_folder is not None else None
    saved = open_folder(folder, about) if folder else {}
    rows: list[Scored] = []
    worst_rows = _Worst(worst if folder else 0, measures)
    place: dict[str, int] = {}  # of each row among the examples: figures must not depend on the order of answering

    def take(example: Example, prediction: Prediction) -> None:
        measure = measures[example.task]
        ratios = {name: (float(a), float(b)) for name, (a, b) in measure.score(example, prediction).items()}
        worst_rows.offer(example, prediction, badness(ratios, measure), place[example.id])
        there, found = ([measure.keep(region) for region in one.regions] for one in (example, prediction))
        rows.append(Scored(replace(example, image=None, regions=there), replace(prediction, regions=found), ratios))

    def fresh(bar: Any) -> Iterator[Example]:
        """Examples that still have to be run; the others are taken as they were saved."""
        for example in examples:
            if example.task not in measures:
                raise ValueError(
                    f"row {example.id}: no measure for the task {example.task!r}; there is: {', '.join(measures)}"
                )
            if example.id in place:
                raise ValueError(f"two rows have the id {example.id!r}")
            place[example.id] = len(place)
            if example.id in saved:
                take(example, saved_prediction(saved.pop(example.id), example, folder))
                bar()
            else:
                yield example

    started = time.perf_counter()
    with _progress(progress, len(examples) if isinstance(examples, Sized) else total) as bar:
        for number, batch in enumerate(batches(fresh(bar), batch_size)):
            predictions = answer(pg, batch, constrained, max_new_tokens, beams)
            if folder:
                if number == 0:  # a run without an answer, refused at a bad row, is none to be continued
                    write_notice(folder, about)
                append(folder / "predictions.jsonl", batch, predictions)
            for example, prediction in zip(batch, predictions):
                take(example, prediction)
                bar()
    if not rows:
        raise ValueError("there are no examples to evaluate")

    rows.sort(key=lambda row: place[row.example.id])
    report = summarize(rows, measures, targets or {}, about, published)
    measured = {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "seconds": round(time.perf_counter() - started, 1),  # of this call; saved rows take none
    }
    report = replace(report, environment=measured | environment())
    if folder:
        report = replace(report, worst=worst_rows.draw(folder / "worst"))
        write_lines(folder / "scores.jsonl", map(_score_line, rows))
        report.save(folder)
    return report


# --- running --------------------------------------------------------------------------------------


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
    """Answers to a batch; with `batch_size` in several smaller ones, for which a picture is encoded once."""
    prompts = [example.prompt for example in batch]
    search: dict[str, Any] = {"num_beams": beams, "length_penalty": 0.0} if beams > 1 else {}
    regions = any(prompt.split(" ")[0] in ("detect", "segment") for prompt in prompts)
    masks = any(prompt.split(" ")[0] == "segment" for prompt in prompts)
    answers = pg.generate(
        [example.image for example in batch],
        prompts,
        max_new_tokens or (BOX_BUDGET if regions else TEXT_BUDGET),
        constrained=constrained,
        batch_size=batch_size or len(batch),
        codec=pg.codec if masks else None,
        **search,
    )
    return [Prediction.of(a) for a in answers]


def fingerprint(pg: PaliGemma) -> str | None:
    """A few numbers of every weight, hashed: two states of one training run differ, in whatever folder they lie."""
    if getattr(pg, "model", None) is None:
        return None
    digest = hashlib.sha256()
    for name, weight in sorted(pg.model.state_dict().items()):
        digest.update(name.encode())
        digest.update(weight.flatten()[:16].float().cpu().numpy().tobytes())
    return digest.hexdigest()[:12]


@contextmanager
def _progress(show: bool, total: int | None) -> Iterator[Any]:
    """Yields a function to call after every row."""
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
    show = show and console.is_terminal  # in a log it would leave an empty line
    with Progress(TextColumn("evaluating"), *columns, console=console, disable=not show, transient=True) as bar:
        task = bar.add_task("", total=total)
        yield lambda: bar.advance(task)


# --- the folder -----------------------------------------------------------------------------------


def check_folder(folder: Path) -> None:
    """Whether a run could be written to a folder, told before a model is loaded. Nothing is left of the trial.

    ValueError for a folder with files of somebody else, FileExistsError for a file, OSError where nothing can be
    written.
    """
    if folder.exists() and not folder.is_dir():
        raise FileExistsError(f"{folder} is a file, expected a folder to write the run to")
    found = [name for name in WRITTEN if (folder / name).exists()]
    if found and not (folder / "run.json").exists():
        raise ValueError(
            f"{folder} has {', '.join(found)} and no run.json that says of which run: choose another folder, since a "
            "run would write over it"
        )
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise OSError(f"{folder} cannot be written to ({error.strerror}): choose another folder") from None
    finally:
        for path in made:
            with suppress(OSError):
                path.rmdir()


def open_folder(folder: Path, about: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Saved predictions by id. A last line that was cut off is removed; nothing else is changed, or made.

    ValueError if they are of another run or cannot be read, and what `check_folder` raises. Then nothing was changed.
    """
    check_folder(folder)
    notice, path = folder / "run.json", folder / "predictions.jsonl"
    if notice.exists():
        before, current = _read_notice(notice), json.loads(json.dumps(about))
        changed = [key for key in {**before, **current} if key not in PLACES and before.get(key) != current.get(key)]
        if changed:
            named = [f"{key} {_in_words(before.get(key))} there, {_in_words(current.get(key))} here" for key in changed]
            raise ValueError(f"{folder} holds another run: {'; '.join(named)}; choose another folder")
    saved = {}
    if path.exists():
        saved = read_predictions(path)  # before anything is cut off
        raw = path.read_bytes()
        whole = raw[: raw.rfind(b"\n") + 1]
        if whole != raw:
            with open(path, "r+b") as file:
                file.truncate(len(whole))
    return saved


def _in_words(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "not given" if value is None else str(value)


def write_notice(folder: Path, about: Mapping[str, Any]) -> None:
    """Of which run the predictions are that are going to lie beside it."""
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / "run.json", json.dumps(dict(about), indent=2) + "\n")


def _read_notice(path: Path) -> dict[str, Any]:
    try:
        notice = read_json_value(path)
        if not isinstance(notice, dict):
            raise ValueError(f"expected an object, got {type(notice).__name__}")
        return notice
    except ValueError as error:
        raise ValueError(f"{path} does not say what run this is ({error}): choose another folder") from None


def read_predictions(path: Path) -> dict[str, dict[str, Any]]:
    """By id; a last line that was cut off is none. ValueError names the line that cannot be read."""
    found = {}
    with open(path, "rb") as file:  # parts lines at \n alone; `splitlines` also at what an answer may hold, U+2028
        for number, line in enumerate(file, 1):
            if not line.endswith(b"\n"):
                break
            try:
                entry = json.loads(line)
                found[entry["id"]] = entry
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(
                    f"{path}:{number} is no prediction ({_reason(error)}): {AGAIN}, or choose another folder"
                ) from None
    return found


def _reason(error: Exception) -> str:
    """Of a KeyError Python says the key alone."""
    return f"no {error}" if isinstance(error, KeyError) else str(error)


def saved_prediction(entry: dict[str, Any], example: Example, folder: Path | None) -> Prediction:
    """What was answered to an example before. ValueError if it was asked something else then, or saw something else,
    and for an entry that is not whole.

    Right answers are not compared: no prediction depends on them, and figures are computed anew.
    """
    try:
        prompt, prediction = entry["prompt"], Prediction.from_dict(entry)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{folder}/predictions.jsonl: the line with the id {example.id!r} is no prediction ({_reason(error)}): "
            f"{AGAIN}"
        ) from None
    if prompt != example.prompt:
        raise ValueError(
            f"{folder}: row {example.id} was asked {prompt!r} there and {example.prompt!r} here; choose another folder"
        )
    if "seen" in entry and entry["seen"] != fingerprint_of_picture(example.image):  # older lines do not say
        raise ValueError(
            f"{folder}: row {example.id}, {prompt!r}, saw another picture there than here; choose another folder"
        )
    return prediction


def fingerprint_of_picture(image: Any) -> str:
    """Of one picture or a tuple: files by their bytes, all others by their pixels. Not by name: a picture may be
    replaced under its name, and a data set be moved."""
    digest = hashlib.blake2b(digest_size=8)
    for one in image if isinstance(image, tuple) else (image,):
        if isinstance(one, (str, os.PathLike)):
            digest.update(hashlib.blake2b(Path(one).read_bytes()).digest())
        else:
            pixels = np.ascontiguousarray(load_image(one))
            digest.update(f"{pixels.shape}".encode() + hashlib.blake2b(pixels.data).digest())
    return digest.hexdigest()


def append(path: Path, batch: Sequence[Example], predictions: Sequence[Prediction]) -> None:
    lines = [
        {
            "id": e.id,
            "task": e.task,
            "prompt": e.prompt,
            "seen": fingerprint_of_picture(e.image),
            "answers": list(e.answers),
            **p.to_dict(),
        }
        for e, p in zip(batch, predictions)
    ]
    with open(path, "a", encoding="utf-8", newline="\n") as file:
        file.writelines(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)


def environment() -> dict[str, Any]:
    """What figures were made on."""
    return {
        "machine": platform.platform(),
        "versions": {name: version(name) for name in ("paligemma", "torch", "numpy", "pillow")},
    }


def _score_line(row: Scored) -> dict[str, Any]:
    return {
        "id": row.example.id,
        "task": row.example.task,
        "answers": list(row.example.answers),
        "text": row.prediction.text,
        "scores": row.ratios,
    }


# --- measuring ------------------------------------------------------------------------------------


def summarize(
    rows: Sequence[Scored],
    measures: Mapping[str, Metric],
    targets: Mapping[tuple[str, str], float],
    about: Mapping[str, Any],
    published: Mapping[tuple[str, str], float] | None = None,
) -> Report:
    """Figures task by task, in the order of `measures`."""
    figures: list[Figure] = []
    counts = {}
    for task, measure in measures.items():
        own = [row for row in rows if row.example.task == task]
        if not own:
            continue
        counts[task] = Counts(
            len(own),
            sum(is_invalid(row.prediction, measure) for row in own),
            sum(not row.prediction.finished for row in own),
        )
        baselines = baseline(own, measure)
        for name, found in values(own, measure).items():
            value, low, high = map(number, found)
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
                    lower_is_better=name in measure.lower_is_better,
                )
            )
    return Report(figures, counts, dict(about))


def is_invalid(prediction: Prediction, measure: Metric) -> bool:
    """A part could not be read, or boxes were asked for and what was written holds none."""
    return bool(prediction.invalid) or (measure.regions and bool(prediction.text.strip()) and not prediction.regions)


def values(rows: Sequence[Scored], measure: Metric) -> dict[str, tuple[float, float, float]]:
    """Name -> value and the ends of its interval."""
    groups = [row.example.group or row.example.id for row in rows]
    found = {}
    for name in rows[0].ratios:
        tops, bottoms = [row.ratios[name][0] for row in rows], [row.ratios[name][1] for row in rows]
        total = sum(bottoms)
        interval = ratio_interval(tops, bottoms, groups) if total else (math.nan, math.nan)
        found[name] = (sum(tops) / total if total else math.nan, *interval)
    if measure.together:
        found |= measure.together([(row.example, row.prediction) for row in rows])
    return found


def baseline(rows: Sequence[Scored], measure: Metric) -> dict[str, float | None]:
    """The same figures if every answer were the commonest right one. None for boxes: there is no commonest."""
    commonest = Counter(answer for row in rows for answer in row.example.answers).most_common(1)
    if measure.regions or not commonest:
        return {}
    guess = Prediction(commonest[0][0])
    guesses = [Scored(row.example, guess, measure.score(row.example, guess)) for row in rows]
    sums = {name: [sum(row.ratios[name][part] for row in guesses) for part in (0, 1)] for name in guesses[0].ratios}
    figures = {name: top / bottom if bottom else None for name, (top, bottom) in sums.items()}
    if measure.together:
        figures |= {
            name: number(value[0]) for name, value in measure.together([(row.example, guess) for row in rows]).items()
        }
    return figures


# --- the worst ------------------------------------------------------------------------------------


def badness(ratios: Ratios, measure: Metric) -> float:
    """0 for a perfect row, 1 for one that adds nothing: the mean over its figures."""
    parts = [
        min(top / bottom, 1.0) if name in measure.lower_is_better else 1 - min(top / bottom, 1.0)
        for name, (top, bottom) in ratios.items()
        if bottom
    ]
    return sum(parts) / len(parts) if parts else 0.0


class _Worst:
    """Keeps the worst rows of every task with their pictures. Of equally bad rows the surest answers are the worst."""

    def __init__(self, limit: int, tasks: Iterable[str]) -> None:
        self.limit = limit
        self.heaps: dict[str, list[tuple[float, float, int, Example, Prediction]]] = {task: [] for task in tasks}

    def offer(self, example: Example, prediction: Prediction, bad: float, place: int) -> None:
        if bad > 0 and self.limit:
            heap = self.heaps[example.task]
            heapq.heappush(heap, (bad, prediction.score, -place, example, prediction))
            if len(heap) > self.limit:
                heapq.heappop(heap)

    def draw(self, folder: Path) -> list[dict[str, Any]]:
        """The worst of each task in turn, then the second worst, until there are enough."""
        from paligemma.evaluate.comparison import compare

        ranked = [sorted(heap, reverse=True) for heap in self.heaps.values()]
        chosen = [heap[i] for i in range(self.limit) for heap in ranked if i < len(heap)][: self.limit]
        folder.mkdir(parents=True, exist_ok=True)
        for old in folder.glob("*.png"):
            old.unlink()
        drawn = []
        for k, (bad, _, _, example, prediction) in enumerate(chosen):
            name = f"{k:02d}_{example.task}.png"
            compare(example, prediction).save(folder / name)
            drawn.append({"file": f"worst/{name}", "id": example.id, "task": example.task, "badness": bad})
        return drawn
