"""What is saved where the grammar allows few tokens: rows of the output head, and forward passes of the model.

    python benchmarks/less.py            # writes benchmarks/less-DATE.json

1. A decode step of `paligemma-3b-pt-224` in bfloat16 with random weights (5.8 GB), as the model is loaded: with the
   whole head, with the 1,024 rows of the location tokens only, and with two tokens read in one pass (as after a token
   that the grammar forces). Run in turn; one row, 266 tokens in the cache.
2. The embedded model on `detect` and `segment` prompts over pictures of its small world: forward passes of the
   language model and seconds, with both savings and without them. The answers are compared, too.
"""

from __future__ import annotations

import argparse
import datetime
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from constraint import random_model

import paligemma
from paligemma import engine, generation
from paligemma.bench.machine import describe_machine
from paligemma.kv_cache import KVCache
from paligemma.tiny.evaluation import tiny_examples
from paligemma.weights.published import published_config

STEPS, SCENES = 12, 16
TASKS = ("detect_one", "detect_all", "segment")


def spread(values: Iterable[float]) -> dict[str, float]:
    values = [1000 * value for value in values]
    return {"min": round(min(values), 2), "median": round(statistics.median(values), 2), "max": round(max(values), 2)}


@torch.inference_mode()
def official_steps(model: Any) -> dict[str, dict[str, float]]:
    cache = KVCache(model.config.text_config, 1, 266 + 5 * STEPS, torch.bfloat16)
    model(torch.randint(3, 256000, (1, 266)), cache=cache, logits_to_keep=1)
    locations, token = torch.arange(256000, 257024), torch.tensor([[5929]])
    cases: dict[str, Callable[[], Any]] = {
        "one token, whole head": lambda: generation.decode(model, token, cache),
        "one token, 1,024 rows of the head": lambda: generation.decode(model, token, cache, only=locations),
        "two tokens in one pass, whole head": lambda: generation.decode(model, token.expand(1, 2), cache),
    }
    times: dict[str, list[float]] = {name: [] for name in cases}
    for step in range(STEPS):
        for name, run in cases.items():
            begun = time.perf_counter()
            run()
            if step:
                times[name].append(time.perf_counter() - begun)
    return {name: spread(found) for name, found in times.items()}


def nothing(*_: Any) -> None:
    """In place of `forced_ids` and `few_ids`: neither of the two savings applies."""


def embedded_answers() -> dict[str, Any]:
    pg = paligemma.load("tiny")
    passes = 0

    def count(*_: Any) -> None:
        nonlocal passes
        passes += 1

    pg.model.language_model.model.register_forward_hook(count)
    ways = {"as it is": (engine.forced_ids, engine.few_ids), "without the savings": (nothing, nothing)}
    figures: dict[str, Any] = {}
    examples = list(tiny_examples(SCENES, tasks=TASKS))
    for task in TASKS:
        asked = [example for example in examples if example.task == task]
        seconds: dict[str, list[float]] = {way: [] for way in ways}
        counts = dict.fromkeys(ways, 0)
        equal = 0
        for example in asked:
            answers = {}
            for way, functions in ways.items():
                engine.forced_ids, engine.few_ids = functions
                passes, begun = 0, time.perf_counter()
                answers[way] = pg.generate(example.image, example.prompt, 512, constrained=True).token_ids
                seconds[way].append(time.perf_counter() - begun)
                counts[way] += passes
            equal += len({tuple(ids) for ids in answers.values()}) == 1
        figures[task] = {"answers": len(asked), "equal answers": equal, "passes": counts}
        figures[task]["milliseconds"] = {way: spread(found) for way, found in seconds.items()}
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--part", choices=["official", "embedded"], help="measure one, keep the other of the record")
    part = parser.parse_args().part
    date = datetime.date.today().isoformat()
    path = Path(__file__).with_name(f"less-{date}.json")
    record = json.loads(path.read_text()) if part and path.exists() else {}
    record |= {
        "what": "milliseconds; passes: through the decoder, prompt included, over all answers",
        "date": date,
        **describe_machine(),
    }
    command = " ".join(["python", "benchmarks/less.py", *sys.argv[1:]])
    for name, value in (("threads", record["threads"]), ("command", command)):
        parts = record.setdefault(f"{name} of each part", {})
        parts |= dict.fromkeys([part] if part else ["official", "embedded"], value)
    if part != "embedded":
        record["decode step, official size"] = official_steps(random_model(published_config("paligemma-3b", 224)))
    if part != "official":
        record["embedded model"] = embedded_answers()
    print(json.dumps(record, indent=1))
    path.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
