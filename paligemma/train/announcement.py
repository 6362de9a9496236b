"""What a run says before its first step: the data, what learns, how long, and in what precision.

data    jsonl from rows.jsonl: 8 rows; a row has 15 tokens, 2.0 of them the answer, the longest 16 (8 rows looked at)
learns  LoRA of rank 8 in decoder 55,296: 55,296 of 4,210,432 parameters
steps   60 steps (7.5 epochs) of 1 rows; adamw, learning rate 0.0001, 5% warm-up, then cosine
numbers computed in float32, what learns is kept in float32 and saved in float32; on cpu
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import nn

from paligemma.data.rows import Rows
from paligemma.train import parts
from paligemma.train.options import TrainOptions
from paligemma.train.setup import UNLIMITED, max_length_of

if TYPE_CHECKING:
    from paligemma.inference import PaliGemma

SAMPLED = 200  # rows whose tokens are counted


def announcement(
    options: TrainOptions, rows: Rows, pg: PaliGemma, steps: int, saved: torch.dtype, computed: torch.dtype
) -> list[str]:
    """The four lines. saved: dtype in which the whole model would be saved; computed: of the matrix products."""
    slow = "" if computed == saved else f" (this CPU has no fast products of {name_of(saved)})"
    return [
        f"data    {rows.note}; {lengths(options, rows, pg)}",
        f"learns  {what_learns(options, pg.model)}",
        f"steps   {how_long(options, len(rows), steps)}; {how_it_learns(options, steps)}",
        f"numbers computed in {name_of(computed)}{slow}, what learns is kept in float32 and saved in "
        f"{'float32' if options.lora else name_of(saved)}; on {pg.model.device}",
    ]


def lengths(options: TrainOptions, rows: Rows, pg: PaliGemma) -> str:
    """Of about `SAMPLED` rows, evenly spaced over the data."""
    sample = [rows[i] for i in range(0, len(rows), max(1, len(rows) // SAMPLED))]
    with cuts_not_reported():
        batch = pg.processor.lay_out(
            [row.prefix for row in sample],
            [len(row.pictures) for row in sample],
            [row.suffix for row in sample],
            max_length=max_length_of(options, pg.model.config),
        )
    tokens, answer = (float(batch[name].sum()) / len(sample) for name in ("attention_mask", "token_type_ids"))
    longest = int(batch["attention_mask"].sum(-1).max())
    counted = f"({len(sample):,} rows looked at)"
    return f"a row has {tokens:.0f} tokens, {answer:.1f} of them the answer, the longest {longest} {counted}"


def what_learns(options: TrainOptions, model: nn.Module) -> str:
    learned: dict[str, int] = {}  # parameters of each part
    total = 0
    for name, parameter in model.named_parameters():
        part = next(part for part, prefix in parts.PARTS.items() if name.startswith(prefix))
        total += parts.count(parameter)
        if parameter.requires_grad:
            learned[part] = learned.get(part, 0) + parameter.numel()
    how = f"LoRA of rank {options.rank} in " if options.lora else ""
    listed = ", ".join(f"{part} {count:,}" for part, count in learned.items())
    rounded = f", the weights beside it rounded to {options.quantize}" if options.quantize else ""
    return f"{how}{listed}: {sum(learned.values()):,} of {total:,} parameters{rounded}"


def how_long(options: TrainOptions, rows: int, steps: int) -> str:
    if steps == UNLIMITED:
        length = f"{options.minutes:g} minutes"
    else:
        counted = "1 step" if steps == 1 else f"{steps:,} steps"
        epochs = steps * options.batch / rows
        length = f"{counted} ({epochs:.2g} epochs)" if epochs < 10 else f"{counted} ({epochs:,.0f} epochs)"
        if options.minutes is not None:
            length += f", at most {options.minutes:g} minutes"
    return f"{length} of {options.batch} rows"


def how_it_learns(options: TrainOptions, steps: int) -> str:
    rates = f"{options.peak_lr:g}"
    if options.optimizer == "muon":
        rates += f" ({options.peak_lr_beside_muon:.2g} for embedding, norms and biases, by AdamW)"
    if options.vision_lr != 1:
        rates += f", {options.vision_lr:g} of it for the vision tower"
    warmup = f"{options.warmup:.0%} warm-up" if options.warmup * steps >= 1 else "no warm-up"
    return f"{options.optimizer}, learning rate {rates}, {warmup}, then {options.schedule}"


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


@contextmanager
def cuts_not_reported() -> Iterator[None]:
    """Inside, the processor gives no warning for each answer that it cuts: `check_rows` has reported them all."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".* suffixes were cut")
        yield
