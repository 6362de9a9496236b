"""Three scores of the same boxes and masks: which one is a probability, and which one puts the right ones first?

    python benchmarks/score_calibration.py --scenes 20     # a try
    python benchmarks/score_calibration.py                 # 1,000, and 1,000 of an artist it never saw; writes a record

The model answers each row once. Its items are then scored by the geometric mean of their tokens' probabilities, by the
product of `answers/scores.py`, and by that product through the map of the checkpoint's `calibration.json`. Reported are
the calibration error and the average precision at IoU .5 (of masks for `segment`), with the paired interval of its
difference. The map keeps the order of the products, so their average precision is that of the map as well.
"""

from __future__ import annotations

import argparse
import datetime
import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.progress import track

import paligemma
from paligemma.answers.parsing import parse_tokens
from paligemma.answers.scores import IDENTITY
from paligemma.bench.machine import describe_machine
from paligemma.evaluate.average_precision import mean_area, rank
from paligemma.evaluate.calibration import expected_calibration_error, scored_items
from paligemma.evaluate.examples import Example, Prediction, Region
from paligemma.evaluate.intervals import bootstrap
from paligemma.evaluate.runner import answer, batches
from paligemma.files import write_text
from paligemma.tiny.evaluation import tiny_examples

PARTS, TASKS = ("test", "emojione"), ("detect_all", "detect_one", "segment")
SCORES = ("geometric mean", "product", "product and map")
BATCH = 32  # rows


class Scorer(paligemma.PaliGemma):
    """Keeps, of each answer in turn, the scores of its items in three ways."""

    scores: list[dict[str, list[float]]]

    def to_answer(self, generated: Any, size: Any, image: Any = None, codec: Any = None) -> Any:
        seen = {"distributions": generated.distributions}
        ways: list[dict[str, Any]] = [{}, seen | {"calibration": IDENTITY}, seen | {"calibration": self.calibration}]
        found = {}
        for name, more in zip(SCORES, ways):
            parsed = parse_tokens(
                generated.token_ids, self.processor.tokenizer, size,
                token_logprobs=generated.token_logprobs, **more,
            )  # fmt: skip
            found[name] = [item.score for item in (*parsed.detections, *parsed.segments)]
        self.scores.append(found)
        return super().to_answer(generated, size, image, codec)


Row = tuple[Example, Prediction, dict[str, list[float]]]


def answered(pg: Scorer, examples: list[Example]) -> Iterator[Row]:
    for batch in batches(track(examples, "rows"), BATCH):
        pg.scores = []
        predictions = answer(pg, batch)
        yield from zip(batch, predictions, pg.scores, strict=True)


def compared(rows: list[Row]) -> dict[str, Any]:
    """The figures of one task."""
    masks = rows[0][0].task == "segment"
    scored: dict[str, list[tuple[list[Region], list[Region]]]] = {
        name: [
            (list(e.regions), [replace(r, score=s) for r, s in zip(p.regions, scores[name], strict=True)])
            for e, p, scores in rows
        ]
        for name in SCORES
    }
    items = {name: [i for pair in scored[name] for i in scored_items(*pair, masks)] for name in SCORES}
    made: dict[str, Any] = {
        "items": len(items["product"]),
        "right": sum(right for _, right in items["product"]) / max(len(items["product"]), 1),
        "calibration error": {name: expected_calibration_error(items[name]) for name in SCORES},
    }
    mean, product = (rank(scored[name], masks=masks) for name in SCORES[:2])
    once = np.ones(len(rows))

    def gain(weights: np.ndarray) -> float:
        return mean_area(product, weights) - mean_area(mean, weights)

    low, high = bootstrap(gain, [example.group for example, _, _ in rows])
    made["average precision"] = {
        "geometric mean": mean_area(mean, once), "product": mean_area(product, once),
        "difference": gain(once), "low": low, "high": high,
    }  # fmt: skip
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--scenes", type=int, default=1000, help="of each part")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path, help="folder; default benchmarks/ from 1,000 scenes on, else runs/")
    options = parser.parse_args()
    out = options.out or (Path(__file__).parent if options.scenes >= 1000 else Path("runs"))
    torch.set_num_threads(options.threads)
    loaded = paligemma.load("tiny", device="cpu", dtype="float32")
    pg = Scorer(loaded.model, loaded.processor)
    figures: dict[str, Any] = {}
    for part in PARTS:
        for task in TASKS:
            examples = list(tiny_examples(options.scenes, part, tasks=(task,)))
            figures[f"{task}, {part}"] = compared(list(answered(pg, examples)))
            print(task, part, json.dumps(figures[f"{task}, {part}"]), flush=True)
    date = datetime.date.today().isoformat()
    record = {
        "what": "calibration error and average precision of three scores of the same boxes and masks",
        "date": date,
        "command": " ".join(["python", "benchmarks/score_calibration.py", *sys.argv[1:]]),
        **describe_machine(),
        "scenes": options.scenes,
        "calibration": pg.calibration.to_dict(),
        "figures": figures,
    }
    path = out / f"score-calibration-{date}.json"
    path.parent.mkdir(exist_ok=True)
    write_text(path, json.dumps(record, indent=1) + "\n")
    print(path)


if __name__ == "__main__":
    main()
