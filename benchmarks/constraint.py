"""What the grammar costs, as a share of a decode step at the official size.

    python benchmarks/constraint.py            # writes benchmarks/constraint-DATE.json

The decode step is that of `paligemma-3b-pt-224` in bfloat16 with random weights (5.8 GB): one row, 270 tokens in the
cache. Between its steps, interleaved, the mask on the logits is timed over the official vocabulary of 257,216: without
a constraint, under the `detect` grammar with listed labels, and with any label. A stand-in replaces the real tokenizer:
the grammar only looks at the ids, and once at the text of each token.
"""

from __future__ import annotations

import datetime
import json
import statistics
import time
from pathlib import Path

import torch

from paligemma.answers.constraints import allowed_next, masked_logits, never_produced
from paligemma.answers.grammar import DetectionGrammar
from paligemma.bench.machine import describe_machine
from paligemma.kv_cache import KVCache
from paligemma.modeling_gemma import PaliGemmaConfig, PaliGemmaForConditionalGeneration
from paligemma.weights.expected import empty_model
from paligemma.weights.published import published_config

STEPS = 25


class OfficialIds:
    """As much of a tokenizer as the grammar asks for: the official ids, with made-up words in between."""

    bos_token_id, eos_token_id, pad_token_id, image_token_id = 2, 1, 0, 257152
    first_loc_id, first_seg_id = 256000, 257024
    words = {" dog": 5929, " cat": 4401, " ;": 2161, " ": 235248}

    def __len__(self) -> int:
        return 257153

    def decode(self, ids: list[int]) -> str:
        return "".join(self._text(i) for i in ids)

    def _text(self, i: int) -> str:
        if 256000 <= i < 257024:
            return f"<loc{i - 256000:04d}>"
        if 257024 <= i < 257152:
            return f"<seg{i - 257024:03d}>"
        named = {number: word for word, number in self.words.items()}
        return named.get(i, "" if i < 3 else f" w{i}")

    def encode(self, text: str) -> list[int]:
        ids = []
        while text:
            if text.startswith("<loc"):
                ids, text = [*ids, 256000 + int(text[4:8])], text[9:]
            elif text.startswith("<seg"):
                ids, text = [*ids, 257024 + int(text[4:7])], text[8:]
            else:
                word = max((word for word in self.words if text.startswith(word)), key=len)
                ids, text = [*ids, self.words[word]], text[len(word) :]
        return ids


def random_model(config: PaliGemmaConfig) -> PaliGemmaForConditionalGeneration:
    """In bfloat16, with random weights: how fast it is does not depend on them."""
    model = empty_model(config).bfloat16().to_empty(device="cpu")
    pattern = torch.randn(2**20, generator=torch.Generator().manual_seed(0)).bfloat16() * 0.02
    with torch.no_grad():
        for parameter in model.parameters():
            flat = parameter.view(-1)
            for start in range(0, len(flat), len(pattern)):
                part = flat[start : start + len(pattern)]
                part.copy_(pattern[: len(part)])
    return model.eval()


@torch.inference_mode()
def main() -> None:
    model = random_model(published_config("paligemma-3b", 224))
    config = model.config
    cache = KVCache(config.text_config, 1, 270 + STEPS + 2, torch.bfloat16)
    model(torch.randint(3, 256000, (1, 270)), cache=cache, logits_to_keep=1)
    never = never_produced(config, 257153, None)
    tokenizer = OfficialIds()
    listed = DetectionGrammar(tokenizer, labels=["dog", "cat"])
    anything = DetectionGrammar(tokenizer, labels=None)
    box = [256100, 256200, 256300, 256400]
    answers = {"a location": box[:2], "after a label": [*box, 5929]}

    cases = {"mask without a constraint": (None, [])}
    for where, generated in answers.items():
        cases[f"mask, listed labels, {where}"] = (listed, generated)
        cases[f"mask, any label, {where}"] = (anything, generated)

    times: dict[str, list[float]] = {}
    token = torch.tensor([[5929]])
    for step in range(STEPS + 2):
        row = {}
        begun = time.perf_counter()
        logits = model(token, cache=cache, logits_to_keep=1).logits[:, -1]
        row["decode step"] = time.perf_counter() - begun
        for name, (grammar, generated) in cases.items():
            begun = time.perf_counter()
            allowed, _ = allowed_next([grammar], [generated], 100, len(never), 1)
            masked_logits(logits, never, allowed)
            row[name] = time.perf_counter() - begun
        if step >= 2:  # the first ones warm up
            for name, seconds in row.items():
                times.setdefault(name, []).append(1000 * seconds)

    step_ms = statistics.median(times["decode step"])
    free_ms = statistics.median(times["mask without a constraint"])
    record = {
        "what": "milliseconds; cost = (median with constraint - median without) / median decode step",
        "date": datetime.date.today().isoformat(),
        "command": "python benchmarks/constraint.py",
        **describe_machine(),
        "rows": {
            name: {
                "min": round(min(values), 3),
                "median": round(statistics.median(values), 3),
                "max": round(max(values), 3),
                **({"cost": round((statistics.median(values) - free_ms) / step_ms, 5)} if "label" in name else {}),
            }
            for name, values in times.items()
        },
    }
    print(json.dumps(record, indent=2))
    Path(__file__).with_name(f"constraint-{record['date']}.json").write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
