"""A quick look at how good a model is on unseen scenes: one row of every task a scene allows, greedy, unconstrained.

    python -m paligemma.tiny.recipe_measure --model runs/tiny/package --count 200

The recipe's own yardstick while it trains. `paligemma evaluate --data tiny` measures with confidence intervals.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from paligemma.generation import generate
from paligemma.grammar import parse
from paligemma.mask_codec import MaskCodec, crop, paste
from paligemma.modeling_gemma import PaliGemmaForConditionalGeneration
from paligemma.processing_paligemma import PaliGemmaProcessor
from paligemma.tiny import rows, world

Box = tuple[float, float, float, float]


def box_iou(a: Box, b: Box) -> float:
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    if width <= 0 or height <= 0:
        return 0.0
    both = width * height
    return both / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - both)


def matches(found: list[tuple[str, Box]], true: list[tuple[str, Box]]) -> list[tuple[int, int, float]]:
    """Pairs of the same label, best overlap first, each used once: (index in found, in true, IoU)."""
    pairs = [
        (box_iou(f[1], t[1]), i, j) for i, f in enumerate(found) for j, t in enumerate(true) if f[0] == t[0]
    ]  # fmt: skip
    taken_f, taken_t, chosen = set(), set(), []
    for iou, i, j in sorted(pairs, reverse=True):
        if iou > 0 and i not in taken_f and j not in taken_t:
            taken_f.add(i)
            taken_t.add(j)
            chosen.append((i, j, iou))
    return chosen


def named_objects(sentence: str) -> Counter[str]:
    """The objects a caption names: "two red cars and a dog on a ..." -> {"red car": 2, "dog": 1}."""
    singular = {rows.plural(label): label for label in world.LABELS}
    found: Counter[str] = Counter()
    for part in sentence.rsplit(" on a", 1)[0].replace(" and ", ", ").split(", "):
        words = part.split()
        if len(words) < 2:
            continue
        count = rows.NUMBERS.index(words[0]) if words[0] in rows.NUMBERS else 1
        found[" ".join([*words[1:-1], singular.get(words[-1], words[-1])])] += count
    return found


def edit_distance(a: str, b: str) -> int:
    line = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        previous, line[0] = line[0], i
        for j, y in enumerate(b, 1):
            previous, line[j] = line[j], min(line[j] + 1, line[j - 1] + 1, previous + (x != y))
    return line[-1]


@torch.inference_mode()
def measure(
    model: PaliGemmaForConditionalGeneration,
    processor: PaliGemmaProcessor,
    codec: MaskCodec,
    count: int = 200,
    split: str = "test",
    first: int = 0,
    size: int = 256,
    examples: list[dict[str, str]] | None = None,
) -> dict[str, float]:
    """Figures per task over `count` scenes; `examples`, where given, collects prompts with answers."""

    def encode_mask(asked: Any) -> Any:
        return codec.encode(torch.from_numpy(np.stack([crop(mask, box) for mask, box in asked]))).numpy()

    cases: list[tuple[world.Scene, int, rows.Row]] = []
    features = []
    for i in range(count):
        scene = world.render(first + i, split, size)
        rng = np.random.default_rng(first + i)
        cases += [(scene, i, row) for row in rows.rows(scene, rng, canonical=True, encode_mask=encode_mask)]
        pixel_values = processor(text=["ocr"], images=[Image.fromarray(scene.image)])["pixel_values"]
        features.append(model.encode_image(pixel_values))
    answers: dict[int, str] = {}
    order = sorted(range(len(cases)), key=lambda k: (cases[k][2].task, k))  # answers of about the same length together
    for start in range(0, len(order), 32):
        chosen = order[start : start + 32]
        inputs = processor(text=[cases[k][2].prefix for k in chosen], images=[Image.new("RGB", (8, 8))] * len(chosen))
        del inputs["pixel_values"]
        inputs["image_features"] = torch.cat([features[cases[k][1]] for k in chosen])
        made = generate(model, inputs, max_new_tokens=160, num_tokens=len(processor.tokenizer))
        answers |= {k: processor.tokenizer.decode(g.token_ids) for k, g in zip(chosen, made)}

    sums: dict[str, list[float]] = defaultdict(list)
    for k, (scene, _, row) in enumerate(cases):
        answer = answers[k]
        if examples is not None:
            examples.append(
                {"task": row.task, "prompt": row.prefix, "truth": row.suffix, "answer": answer, "seed": str(scene.seed)}
            )
        sums[f"{row.task}/exact"].append(answer == row.suffix)
        if row.task == "caption":
            said, true = named_objects(answer), named_objects(row.suffix)
            sums["caption/f1"].append(2 * (said & true).total() / max(said.total() + true.total(), 1))
        elif row.task == "ocr":
            sums["ocr/errors"].append(edit_distance(answer, row.suffix))
            sums["ocr/characters"].append(len(row.suffix))
        elif row.task in ("detect_one", "detect_all"):
            found = [(d.label, d.box) for d in parse(answer, (size, size)).detections]
            pairs = matches(found, [(thing.label, thing.box) for thing in row.expected])
            sums[f"{row.task}/hits"].append(sum(iou >= 0.5 for _, _, iou in pairs))
            sums[f"{row.task}/found"].append(len(found))
            sums[f"{row.task}/true"].append(len(row.expected))
            sums[f"{row.task}/iou"] += [iou for _, _, iou in pairs if iou >= 0.5]
        elif row.task == "segment":
            segments = parse(answer, (size, size), codec=codec).segments
            masks = [paste(codec.decode(torch.tensor([s.codes]))[0], s.box, (size, size)) for s in segments]
            best = []
            for thing in row.expected:
                ious = [(m & thing.mask).sum() / max((m | thing.mask).sum(), 1) for m in masks]
                best.append(float(max(ious, default=0.0)))
            sums["segment/miou"] += best
    figures = {}
    for name, values in sums.items():
        if not name.endswith(("/hits", "/found", "/true", "/errors", "/characters")):
            figures[name] = round(float(np.mean(values)), 4)
    for task in ("detect_one", "detect_all"):
        hits = sum(sums[f"{task}/hits"])
        figures[f"{task}/precision"] = round(hits / max(sum(sums[f"{task}/found"]), 1), 4)
        figures[f"{task}/recall"] = round(hits / max(sum(sums[f"{task}/true"]), 1), 4)
    figures["ocr/cer"] = round(sum(sums["ocr/errors"]) / max(sum(sums["ocr/characters"]), 1), 4)
    return dict(sorted(figures.items()))


def main() -> None:
    import paligemma

    parser = argparse.ArgumentParser(description="Measure a model on the small world.")
    parser.add_argument("--model", required=True)
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--split", default="test")
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--examples", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    pg = paligemma.load(args.model, dtype=args.dtype)
    examples: list[dict[str, str]] = []
    figures = measure(pg.model, pg.processor, pg.codec, args.count, args.split, size=args.size, examples=examples)
    print(json.dumps(figures, indent=1))
    if args.examples:
        args.examples.write_text("".join(json.dumps(example) + "\n" for example in examples))


if __name__ == "__main__":
    main()
