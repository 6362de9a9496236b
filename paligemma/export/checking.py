"""Compares exported files with the model they were made of, on a random picture and two prompts of different length.

The rows are padded to one length, so the padding is checked as well. In float32 the two differ by rounding only.
Rounded weights differ by more; what counts there is whether the likeliest token is the same.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from paligemma.export.runtime import load_exported
from paligemma.generation import decode_one_token, prefill
from paligemma.inference import PaliGemma
from paligemma.processing_paligemma import PaliGemmaProcessor
from paligemma.weights.finding import tokenizer_in
from paligemma.weights.loading import load_model
from paligemma.weights.opening import Checkpoint

STEPS = 20
MOST = 1e-3  # in logits: what float32 may differ by; 5e-5 is usual


@dataclass
class Difference:
    """The largest differences from PyTorch in float32, and in how many of `tokens` the likeliest one is the same."""

    weights: str
    features: float
    prompt: float
    steps: float
    same: int
    tokens: int

    def __str__(self) -> str:
        return (
            f"{self.weights}: image features differ by {self.features:.1e}, logits of the prompt by {self.prompt:.1e}, "
            f"of {STEPS} steps by {self.steps:.1e}; the likeliest token is the same in {self.same} of {self.tokens}"
        )


def in_pytorch(checkpoint: Checkpoint, folders: Sequence[Path]) -> PaliGemma:
    """The exported checkpoint, as `exporting.opened` gives it, as a model in float32. (`load(..., dtype="float32")`
    would take a PaliGemma 1 on the hub from its branch in 32 bits: a second download, of other weights.)"""
    processor = PaliGemmaProcessor.for_config(tokenizer_in(folders), checkpoint.config)
    return PaliGemma(load_model(checkpoint, "cpu", torch.float32), processor)


@torch.inference_mode()
def differences(pg: PaliGemma, folder: str | os.PathLike[str], weights: str) -> Difference:
    """pg: the model in float32. folder: where it was exported to. Both are given the tokens that pg chooses."""
    other: Any = load_exported(Path(folder), weights).model
    model, side = pg.model, pg.processor.image_size
    pixels = torch.rand(1, 3, side, side, generator=torch.Generator().manual_seed(0)) * 2 - 1
    rows = pg.processor.lay_out(["caption en", "answer en what is in the middle of this picture ?"], [1, 1])
    own, exported = model.encode_image(pixels), other.encode_image(pixels)
    found = Difference(weights, _largest(own, exported), 0.0, 0.0, 0, 2 * (STEPS + 1))
    logits, cache = prefill(model, {**rows, "image_features": own.expand(2, -1, -1)}, STEPS)
    logits_too, cache_too = prefill(other, {**rows, "image_features": exported.expand(2, -1, -1)}, STEPS)
    found.prompt = _largest(logits, logits_too)
    of_steps = []
    for step in range(STEPS + 1):
        tokens = logits.argmax(-1)
        found.same += int((tokens == logits_too.argmax(-1)).sum())
        if step < STEPS:
            logits, logits_too = decode_one_token(model, tokens, cache), decode_one_token(other, tokens, cache_too)
            of_steps.append(_largest(logits, logits_too))
    found.steps = float(torch.tensor(of_steps).max())  # NaN if any is NaN, unlike Python's max
    return found


def check(difference: Difference) -> None:
    """RuntimeError where weights that were not rounded give other logits, or logits that are no numbers."""
    if difference.weights == "fp32" and not (difference.prompt < MOST and difference.steps < MOST):
        raise RuntimeError(f"the exported files compute something else: {difference}")


def _largest(one: Tensor, other: Tensor) -> float:
    return float((one - other).abs().max())
