"""What rows that come and go are worth: CPU time per request, waiting times, and decoding at the official size.

    python benchmarks/engine.py                      # writes benchmarks/engine-DATE.json
    python benchmarks/engine.py --part embedded      # the embedded model alone, a minute or two
    python benchmarks/engine.py --part official --quantize int8 [--layers 4]

1. The embedded model in float32, one thread, CPU time (so other programs matter little). Clients ask one mixed request
   after the other, each about another picture: caption, ask, choices, detect, segment. Captions one by one and in
   batches. An answer of three tokens that arrives while a row of 512 tokens runs: when no other prompt was read lately,
   and right after another one was read, so that it has to wait (`prefill_every`).
2. The language model of `paligemma-3b-pt-224` with random weights. 48 rows end after 4 to 128 tokens, evenly spread by
   their logarithm, as answers and boxes are mixed; 8 run together. In static batches the next 8 begin when all of the
   last 8 have ended; refilled, rows take the places of those that have ended, as in `pg.generate`. Only decoding
   counts, since both read the same prompts.
"""

from __future__ import annotations

import argparse
import datetime
import json
import random
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from constraint import random_model
from torch import Tensor

import paligemma
from paligemma.answers.grammar import ChoiceGrammar, DetectionGrammar
from paligemma.bench.machine import describe_machine
from paligemma.engine import Engine
from paligemma.fast.swap import quantize
from paligemma.generation import Options
from paligemma.tickets import Request
from paligemma.tiny.evaluation import tiny_examples
from paligemma.weights.published import published_config

REQUESTS, CLIENTS = 64, (1, 8, 32)
ROWS, TOGETHER, SHORTEST, LONGEST, PROMPT = 48, 8, 4, 128, 64


def cpu_seconds(function: Callable[[], Any], rounds: int = 3) -> float:
    """The least of a few rounds, in CPU time of the whole process."""
    seconds = []
    for _ in range(rounds):
        begun = time.process_time()
        function()
        seconds.append(time.process_time() - begun)
    return min(seconds)


# ---------------------------------------------------------------------------------------------- the embedded model


class Asked:
    """Mixed requests to the embedded model, each about a picture of its own."""

    def __init__(self, pg: Any) -> None:
        self.pg, tokenizer = pg, pg.processor.tokenizer
        self.images = [example.image for example in tiny_examples(32, tasks=("caption",))]
        self.tasks = [
            ("caption en", None, 128),
            ("answer en how many dogs are there?", None, 128),
            ("answer en is there a dog?", ChoiceGrammar(tokenizer, ["yes", "no"]), 128),
            ("detect book ; dog", DetectionGrammar(tokenizer, ["book", "dog"]), 512),
            ("segment book", DetectionGrammar(tokenizer, ["book"], segments=True), 512),
        ]
        self.watch = (tokenizer.first_loc_id, 1024), len(tokenizer)

    def pixels(self, n: int) -> Tensor:
        inputs = self.pg.processor(text=["caption en"], images=[self.images[n % len(self.images)]])
        return inputs["pixel_values"]

    def request(self, n: int, features: Tensor) -> Request:
        prompt, constraint, budget = self.tasks[n % len(self.tasks)]
        ids = self.pg.processor.lay_out([prompt], [1])["input_ids"][0]
        watch, num_tokens = self.watch
        return Request(ids, features, Options(budget, watch=watch, num_tokens=num_tokens), constraint)

    def by_clients(self, clients: int) -> None:
        """Every client asks again as soon as it has its answer. Pictures that wait are encoded together."""
        engine = Engine(self.pg.model, max_rows=clients)
        asked, running = 0, []
        while asked < REQUESTS or running:
            new = range(asked, min(asked + clients - len(running), REQUESTS))
            if new:
                with torch.inference_mode():
                    features = self.pg.model.encode_image(torch.cat([self.pixels(n) for n in new]))
                running += [engine.admit(self.request(n, one[None])) for n, one in zip(new, features)]
                asked += len(new)
            engine.step()
            running = [ticket for ticket in running if not ticket.done]


def waiting(asked: Asked) -> dict[str, float]:
    """CPU milliseconds until an answer of three tokens is there: alone, and beside a row of 512 tokens."""
    pg, eos = asked.pg, asked.pg.model.config.eos_token_id
    with torch.inference_mode():
        features = pg.model.encode_image(asked.pixels(0))
    short = replace(asked.request(1, features), options=Options(3, suppress_tokens=[eos]))
    long = replace(asked.request(0, features), options=Options(512, suppress_tokens=[eos]))
    engine = Engine(pg.model)
    alone = min(cpu_seconds(lambda: engine.admit(short).result(), rounds=1) for _ in range(5))
    beside, after_another = [], []
    running = engine.admit(long)
    for n in range(1, 400):
        engine.step()
        if n % 40 == 0:
            beside.append(cpu_seconds(lambda: engine.admit(short).result(), rounds=1))
        if n % 40 == 20:
            another = engine.admit(short)
            while another.started is None:
                engine.step()
            after_another.append(cpu_seconds(lambda: engine.admit(short).result(), rounds=1))
    running.cancel()
    return {
        "alone": 1000 * alone,
        "beside": 1000 * statistics.median(beside),
        "after another": 1000 * statistics.median(after_another),
    }


def embedded() -> dict[str, Any]:
    torch.set_num_threads(1)
    pg = paligemma.load("tiny", dtype="float32", device="cpu")
    asked = Asked(pg)
    asked.by_clients(8)  # warm
    by_clients = {n: 1000 * cpu_seconds(lambda n=n: asked.by_clients(n)) / REQUESTS for n in CLIENTS}
    images = asked.images  # all different: features of a picture that comes again would be kept
    one_by_one = 1000 * cpu_seconds(lambda: [pg.caption(image) for image in images]) / 32
    batches = {
        n: 1000 * cpu_seconds(lambda n=n: pg.generate(images, "caption en", batch_size=n)) / 32 for n in (16, 32)
    }
    waits = waiting(asked)
    return {
        "CPU ms a request, by clients": by_clients,
        "of that at 1": {n: by_clients[n] / by_clients[1] for n in CLIENTS},
        "CPU ms a caption": {"one by one": one_by_one, **{f"batches of {n}": ms for n, ms in batches.items()}},
        "times as many captions": {n: one_by_one / ms for n, ms in batches.items()},
        "CPU ms of an answer of 3 tokens": waits,
        "times as long as alone": {name: ms / waits["alone"] for name, ms in waits.items()},
    }


# ---------------------------------------------------------------------------------------------- the official size


def decoding(model: Any, refilled: bool) -> dict[str, float]:
    """How many decode steps there were, and how long they took."""
    draw = random.Random(1)
    words = torch.randint(3, 200_000, (ROWS, PROMPT), generator=torch.Generator().manual_seed(1))
    eos = model.config.eos_token_id
    lengths = [round(SHORTEST * (LONGEST / SHORTEST) ** draw.random()) for _ in words]
    requests = [Request(row, None, Options(n, suppress_tokens=[eos])) for row, n in zip(words, lengths)]
    groups = [requests] if refilled else [requests[n : n + TOGETHER] for n in range(0, ROWS, TOGETHER)]
    engine = Engine(model, max_rows=TOGETHER, prefill_every=None)
    steps, seconds, cpu_seconds = 0, 0.0, 0.0
    for group in groups:
        tickets = [engine.admit(request) for request in group]
        while engine.rows_running or engine.rows_waiting:
            started = sum(ticket.started is not None for ticket in tickets)
            begun, cpu_begun = time.perf_counter(), time.process_time()
            engine.step()
            if started == sum(ticket.started is not None for ticket in tickets):  # no prompt was read
                steps += 1
                seconds += time.perf_counter() - begun
                cpu_seconds += time.process_time() - cpu_begun
    return {"decode steps": steps, "seconds": round(seconds, 2), "CPU seconds": round(cpu_seconds, 2)}


def official(layers: int | None, mode: str) -> dict[str, Any]:
    config = published_config("paligemma-3b", 224)
    vision = replace(config.vision_config, num_hidden_layers=1)  # no picture is encoded
    text = replace(config.text_config, num_hidden_layers=layers or config.text_config.num_hidden_layers)
    model = quantize(random_model(replace(config, text_config=text, vision_config=vision)), mode)
    found: dict[str, Any] = {"layers": model.config.text_config.num_hidden_layers, "precision": mode}
    found |= {"static": decoding(model, refilled=False), "refilled": decoding(model, refilled=True)}
    found["refilled over static"] = {name: found["static"][name] / found["refilled"][name] for name in found["static"]}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--part", choices=["embedded", "official"], help="measure one, keep the other of the record")
    parser.add_argument("--layers", type=int, help="of the official language model; default: all 18")
    parser.add_argument("--quantize", choices=["bf16", "int8", "int4"], default="bf16")
    options = parser.parse_args()
    date = datetime.date.today().isoformat()
    path = Path(__file__).with_name(f"engine-{date}.json")
    record = json.loads(path.read_text()) if options.part and path.exists() else {}
    command = " ".join(["python", "benchmarks/engine.py", *sys.argv[1:]])
    record |= {"date": date, **describe_machine()}
    if options.part != "embedded":
        record["official size"] = {"command": command, **official(options.layers, options.quantize)}
    if options.part != "official":
        record["embedded model"] = {"command": command, **embedded()}
    print(json.dumps(record, indent=1))
    path.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
