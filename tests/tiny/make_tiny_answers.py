"""Writes tests/tiny_answers.json: right and confident answers of the embedded model to unseen scenes.

    python tests/tiny/make_tiny_answers.py          # after the checkpoint has changed

Of every task a few rows whose answer is right and in which every token leads the second by a clear margin, so that
rounding on another machine cannot change the text. `test_tiny_model.py` asks the same questions and compares.
"""

import json
import math
from pathlib import Path

import torch

import paligemma
from paligemma.evaluate.regions import Region, box_iou
from paligemma.tiny.evaluation import FIRST_SEED, tiny_examples

PER_TASK = 7
SURE = 0.6  # probability of every token: then the second has at most 0.4
SEED = FIRST_SEED + 500_000  # scenes that no evaluation takes


def is_right(example, answer) -> bool:
    if not example.task.startswith(("detect", "segment")):
        return answer.text == example.answers[0]
    found = [*answer.detections, *answer.segments]
    truth: list[Region] = list(example.regions)
    return len(found) == len(truth) and all(
        item.label == region.label and box_iou([item.box], [region.box])[0, 0] > 0.6
        for item, region in zip(found, truth)
    )


def main() -> None:
    pg = paligemma.load("tiny", device="cpu", dtype="float32")
    taken: dict[str, list[dict]] = {}
    for example in tiny_examples(150, seed=SEED):
        rows = taken.setdefault(example.task, [])
        if len(rows) == PER_TASK:
            continue
        constrained = example.task.startswith(("detect", "segment"))
        answer = pg.generate(example.image, example.prompt, 200, constrained=constrained)
        sure = all(logprob > math.log(SURE) for logprob in answer.token_logprobs)
        if answer.finished and is_right(example, answer) and (is_stable(pg, example, answer) if constrained else sure):
            seed = int(example.id.split("-")[1])
            rows.append({"seed": seed, "task": example.task, "prompt": example.prompt, "answer": answer.text})
    rows = [row for of_task in taken.values() for row in of_task]
    path = Path(__file__).with_name("tiny_answers.json")
    path.write_text("[\n" + ",\n".join(json.dumps(row) for row in rows) + "\n]\n", encoding="utf-8")
    print({task: len(rows) for task, rows in taken.items()}, len({row["seed"] for row in rows}), "scenes")


def is_stable(pg, example, answer) -> bool:
    """Locations are rarely sure: neighbouring bins share the probability. Then the best two must lie apart."""
    inputs = pg.processor([example.prompt], [example.image])
    gaps = []
    grammar = pg.grammar(example.prompt)
    ids = [*answer.token_ids, pg.model.config.eos_token_id]
    prompt = inputs["input_ids"][0].tolist()
    with torch.inference_mode():
        row = torch.tensor([prompt + ids])
        types = torch.tensor([[0] * len(prompt) + [1] * len(ids)])
        logits = pg.model(row, token_type_ids=types, pixel_values=inputs["pixel_values"]).logits[0]
    for at in range(len(ids)):
        allowed = grammar(ids[:at], 200 - at)
        best = logits[len(prompt) - 1 + at, allowed].topk(min(2, len(allowed))).values
        gaps.append(float(best[0] - best[-1]) if len(best) == 2 else math.inf)
    return min(gaps) > 0.05


if __name__ == "__main__":
    main()
