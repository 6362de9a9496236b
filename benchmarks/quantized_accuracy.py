"""What rounded weights cost in accuracy: the embedded model in bfloat16, int8 and int4 over the same rows.

    python benchmarks/quantized_accuracy.py --rows 40      # a try, a minute
    python benchmarks/quantized_accuracy.py                # 3,000 rows a task; writes a dated record

Two questions are asked for every mode. Both comparisons are paired: the same row, once with bfloat16 and once with
quantised weights.

1. Do answers get worse? The rows, answers and measures of `paligemma evaluate --data tiny`: of every task the first
   `--rows` rows over the scenes in their order. The paired difference of two figures has a much narrower interval than
   either figure, since rows that both get wrong do not widen it.
2. Do predictions change? With the right answer as input (teacher forcing), the next-token distribution p of bfloat16 is
   compared at each position with q of the quantised model: KL(p, q), and whether both have the same likeliest token.

Several processes of one thread each work on blocks of scenes. All modes answer a block before the next one, so that no
distribution has to be stored. A finished block is a line in the work folder and is not computed again.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import sys
import time
from collections import Counter
from collections.abc import Hashable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from multiprocessing import get_context
from pathlib import Path
from typing import Any
from zlib import crc32

import numpy as np
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

import paligemma
from paligemma.answers.mask_codec import crop
from paligemma.bench.machine import describe_machine
from paligemma.evaluate.examples import Example, Prediction
from paligemma.evaluate.intervals import bootstrap, wilson
from paligemma.evaluate.output_folder import fingerprint, open_folder, write_run_file
from paligemma.evaluate.runner import answer
from paligemma.tiny.evaluation import FIRST_SEED, METRICS, no_codes, to_example
from paligemma.tiny.rows import TASKS, asker, rows
from paligemma.tiny.varied import render_in_world
from paligemma.tiny.world import SHIPPED

# Values of `quantize`. "bf16" rounds no weights: bfloat16 by the kernels of this package, which take a seventh of the
# time of PyTorch's own on a CPU with AVX2 alone.
MODES = ("bf16", "int8", "int4")
AIMS = {"int8": 0.01, "int4": 0.03}  # what a figure may lose at most
BATCH = 64
BLOCK = 32  # scenes
BOXES = ("detect_one", "detect_all", "detect_absent", "segment")
# Of one block, tasks that every scene allows come first: an image is encoded once for rows that are near each other.
ORDER = (
    "caption", "background", "exists", "count", "count_all", "color", "left_right", "largest", "ocr", "left_of", "what",
    *BOXES,
)  # fmt: skip

# ---------------------------------------------------------------------------------------------- paired statistics


def paired_difference(
    before: Sequence[tuple[float, float]], after: Sequence[tuple[float, float]], groups: Sequence[Hashable]
) -> tuple[float, float, float]:
    """How much a figure differs between two runs over the same rows: the difference and the ends of its 95% interval.

    before, after: (numerator, denominator) of each row, the figure being the ratio of their sums. The bootstrap draws
    groups, each with both runs' rows. Where no row differs it sees no variation; then it is the most that can hide from
    so many groups (Wilson's interval of none among them).
    """
    both = np.array([[*a, *b] for a, b in zip(before, after, strict=True)], float)  # [rows, 4]

    def difference(weights: np.ndarray) -> float:
        top, bottom, other_top, other_bottom = weights @ both
        return float(other_top / other_bottom - top / bottom) if bottom and other_bottom else float("nan")

    value = difference(np.ones(len(both)))
    if (both[:, :2] == both[:, 2:]).all():
        most = wilson(0, len(set(groups)))[1]
        return value, -most, most
    return value, *bootstrap(difference, groups)


def mean_interval(sums: Sequence[float], counts: Sequence[float], groups: Sequence[Hashable]) -> list[float]:
    """sum(sums) / sum(counts) and the ends of its interval."""
    both = np.array([sums, counts], float)
    return [both[0].sum() / both[1].sum(), *bootstrap(lambda weights: float(np.divide(*(both @ weights))), groups)]


# ---------------------------------------------------------------------------------------------- one block


models: dict[str, paligemma.PaliGemma] = {}  # of this process


def start_worker() -> None:
    """One thread a process: the model is so small that two would wait for each other."""
    torch.set_num_threads(1)
    for mode in MODES:
        # By itself, a CPU that multiplies bfloat16 slowly would load a small model in float32.
        models[mode] = paligemma.load("tiny", device="cpu", dtype="bfloat16", quantize=mode)


def run_block(number: int, tasks: Sequence[str], forced_every: int) -> list[dict[str, Any]]:
    """Everything that is asked of the rows of one block of scenes. One dictionary a row."""
    codec = models["bf16"].codec

    def encode(masks: Any) -> list[list[int]]:
        return codec.encode(torch.stack([torch.as_tensor(crop(mask, box)) for mask, box in masks])).tolist()

    found: list[tuple[Example, str]] = []
    for seed in range(FIRST_SEED + number * BLOCK, FIRST_SEED + (number + 1) * BLOCK):
        scene = render_in_world(SHIPPED, seed, "test")
        # All tasks, although some have enough rows: what is asked must not depend on which they are.
        codes = encode if "segment" in tasks else no_codes
        made = rows(scene, asker(scene), tasks=TASKS, canonical=True, encode_mask=codes)
        found += [(to_example(scene, row), row.suffix) for row in made if row.task in tasks]
    found.sort(key=lambda pair: ORDER.index(pair[0].task))
    examples, suffixes = [example for example, _ in found], [suffix for _, suffix in found]
    entries: list[dict[str, Any]] = [
        {"id": e.id, "task": e.task, "group": e.group, "right": suffix, "text": {}, "scores": {}, "forced": {}}
        for e, suffix in found
    ]
    for mode, pg in models.items():
        for entry, example, prediction in zip(entries, examples, answers(pg, examples)):
            score = METRICS[example.task].score(example, prediction)
            entry["text"][mode] = prediction.text
            entry["scores"][mode] = {name: [float(top), float(bottom)] for name, (top, bottom) in score.items()}
    # Chosen by name, so that they are the same however the work is split.
    chosen = [n for n, example in enumerate(examples) if crc32(example.id.encode()) % forced_every == 0]
    for start in range(0, len(chosen), BATCH // 2):
        batch = chosen[start : start + BATCH // 2]
        for n, forced in zip(batch, compare([examples[n] for n in batch], [suffixes[n] for n in batch])):
            entries[n]["forced"] = forced
    return entries


def answers(pg: paligemma.PaliGemma, examples: Sequence[Example]) -> Iterator[Prediction]:
    """As `paligemma evaluate` asks for them, but in two calls a block, so that images are encoded less often."""
    for boxes in (False, True):
        if part := [example for example in examples if (example.task in BOXES) == boxes]:
            yield from answer(pg, part, batch_size=BATCH)


@torch.inference_mode()
def compare(examples: Sequence[Example], suffixes: Sequence[str]) -> list[dict[str, list[float]]]:
    """Row by row {mode: [sum of KL in nats, places with the same favourite, places]}, over the answer and its eos."""
    processor = models["bf16"].processor
    inputs = processor([e.prompt for e in examples], [e.image for e in examples], suffix=list(suffixes))
    labels = inputs.pop("labels")[:, 1:]  # [B, S - 1]; the logits at place t are about token t + 1
    there = labels != -100
    found: list[dict[str, list[float]]] = [{} for _ in examples]
    reference: torch.Tensor | None = None
    for mode, pg in models.items():
        logits = pg.model(**inputs).logits[:, :-1][there].float().log_softmax(-1)  # [places of all rows, V]
        if reference is None:
            reference = logits
            continue
        kl = (reference.exp() * (reference - logits)).sum(-1)
        same = (reference.argmax(-1) == logits.argmax(-1)).float()
        counts = there.sum(-1).tolist()
        for row, k, s in zip(found, kl.split(counts), same.split(counts)):
            row[mode] = [float(k.sum()), float(s.sum()), len(k)]
    return found


# ---------------------------------------------------------------------------------------------- all blocks


def collect(folder: Path, about: Mapping[str, Any], wanted: int, forced_every: int, workers: int) -> list[dict]:
    """The first `wanted` rows of every task. What the folder holds is taken from it."""
    saved = open_folder(folder, about)
    write_run_file(folder, about)
    blocks: dict[int, list[dict]] = {int(entry["id"]): entry["rows"] for entry in saved.values()}
    bar = Progress(
        *(TextColumn("rows"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn()),
        console=Console(stderr=True),
    )
    total = bar.add_task("", total=wanted * len(TASKS))

    def counts(before: int | None = None) -> Counter[str]:
        """Rows of each task in finished blocks, or in those of them that come before a block."""
        return Counter(row["task"] for n, made in blocks.items() if before is None or n < before for row in made)

    # A worker is a fresh process: one that inherits threads could hang.
    pool = ProcessPoolExecutor(workers, get_context("spawn"), start_worker)
    running: dict[Future, int] = {}
    number = 0
    with bar:
        try:
            while True:
                bar.update(total, completed=sum(min(n, wanted) for n in counts().values()))
                while len(running) <= workers:
                    had = counts(before=number)
                    # A task is left out only where earlier blocks have enough of it, so the first rows are all there.
                    tasks = [task for task in TASKS if had[task] < wanted]
                    if not tasks:
                        break
                    if number not in blocks:
                        running[pool.submit(run_block, number, tasks, forced_every)] = number
                    number += 1
                if not running:
                    break
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    n = running.pop(future)
                    blocks[n] = future.result()
                    with open(folder / "predictions.jsonl", "a", encoding="utf-8", newline="\n") as file:
                        file.write(json.dumps({"id": n, "rows": blocks[n]}) + "\n")
        finally:
            pool.shutdown(cancel_futures=True)
    taken: Counter[str] = Counter()
    kept = []
    for n in sorted(blocks):
        for row in blocks[n]:
            if taken[row["task"]] < wanted:
                taken[row["task"]] += 1
                kept.append(row)
    return kept


# ---------------------------------------------------------------------------------------------- figures


def figures(found: Sequence[dict]) -> list[dict[str, Any]]:
    """Of every task and figure: its value in bfloat16, and in each mode with the paired difference."""
    made = []
    for task in TASKS:
        own = [row for row in found if row["task"] == task]
        groups = [row["group"] for row in own]
        for name in own[0]["scores"]["bf16"] if own else ():
            scores = {mode: [row["scores"][mode][name] for row in own] for mode in MODES}
            values = {mode: _ratio(pairs) for mode, pairs in scores.items()}
            figure: dict[str, Any] = {"task": task, "figure": name, "rows": len(own), "bf16": values["bf16"]}
            for mode, aim in AIMS.items():
                difference, low, high = paired_difference(scores["bf16"], scores[mode], groups)
                worse = difference if name in METRICS[task].lower_is_better else -difference
                figure[mode] = {
                    "value": values[mode],
                    "difference": difference,
                    "low": low,
                    "high": high,
                    "within the aim": bool(worse <= aim),
                }
            made.append(figure)
    return made


def _ratio(pairs: Sequence[Sequence[float]]) -> float:
    top, bottom = np.sum(np.asarray(pairs, float), axis=0)
    return float(top / bottom) if bottom else float("nan")


def next_tokens(found: Sequence[dict]) -> dict[str, Any]:
    """Of every mode, over all tasks and task by task: same favourite, KL in nats, how many places and rows."""
    made: dict[str, Any] = {}
    for mode in AIMS:
        made[mode] = {}
        for task in ("all", *TASKS):
            own = [row for row in found if row["forced"] and task in ("all", row["task"])]
            if own:
                kl, same, places = zip(*(row["forced"][mode] for row in own))
                groups = [row["group"] for row in own]
                made[mode][task] = {
                    "same favourite": mean_interval(same, places, groups),
                    "KL, nats": mean_interval(kl, places, groups),
                    "places": int(sum(places)),
                    "rows": len(own),
                }
    return made


def tables(record: Mapping[str, Any]) -> Iterator[Table]:
    points = Table(title="difference to bfloat16 in points (95% interval)", title_justify="left")
    for column in ("task", "figure", "rows", "bf16", *AIMS):
        points.add_column(column, justify="left" if column in ("task", "figure") else "right")
    for figure in record["figures"]:
        cells = [figure["task"], figure["figure"], str(figure["rows"]), f"{100 * figure['bf16']:.2f}"]
        for mode in AIMS:
            d = figure[mode]
            mark = "✓" if d["within the aim"] else "✗"
            cells.append(f"{100 * d['difference']:+.2f} ({100 * d['low']:+.2f} … {100 * d['high']:+.2f}) {mark}")
        points.add_row(*cells)
    yield points
    moved = Table(title="the next token, right answers shown (95% interval)", title_justify="left")
    for column in ("mode", "task", "places", "same favourite", "KL, nats"):
        moved.add_column(column, justify="left" if column in ("mode", "task") else "right")
    for mode, tasks in record["next token"].items():
        for task, got in tasks.items():
            same, kl = got["same favourite"], got["KL, nats"]
            moved.add_row(
                mode,
                task,
                str(got["places"]),
                f"{same[0]:.4f} ({same[1]:.4f} … {same[2]:.4f})",
                f"{kl[0]:.5f} ({kl[1]:.5f} … {kl[2]:.5f})",
            )
    yield moved


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=3000, help="of every task")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes, of one thread each")
    parser.add_argument(
        "--forced-every", type=int, default=6, help="of how many rows one has its next tokens compared too"
    )
    parser.add_argument("--folder", type=Path, help="where work is kept; default runs/quantized-accuracy-ROWS")
    parser.add_argument("--out", type=Path, help="the record; default benchmarks/ from 3,000 rows on, else the folder")
    options = parser.parse_args()
    folder = options.folder or Path("runs") / f"quantized-accuracy-{options.rows}"
    date = datetime.date.today().isoformat()
    path = options.out or (
        Path(__file__).with_name(f"quantized-accuracy-{date}.json") if options.rows >= 3000 else folder / "record.json"
    )
    about = {
        "rows": options.rows,
        "forced every": options.forced_every,
        "modes": list(MODES),
        "weights": fingerprint(paligemma.load("tiny", "cpu")),
    }
    begun = time.perf_counter()
    found = collect(folder, about, options.rows, options.forced_every, options.workers)
    record = {
        "what": "the embedded model on tiny:test, figures in shares of 1; difference: mode less bf16 on the same rows",
        "date": date,
        "command": " ".join(["python", "benchmarks/quantized_accuracy.py", *sys.argv[1:]]),
        **describe_machine(),
        "threads": 1,
        "processes": options.workers,
        "seconds of the last call": round(time.perf_counter() - begun, 1),
        **about,
        "scenes from": FIRST_SEED,
        "aims": AIMS,
        "figures": figures(found),
        "next token": next_tokens(found),
    }
    for table in tables(record):
        Console().print(table)
    path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print(f"written: {path}", file=sys.stderr)


if __name__ == "__main__":
    main()
