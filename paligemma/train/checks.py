"""What is checked before a run begins, so that it does not fail after gigabytes were read or hours were spent.

In this order: the model (`check_model`), the packages, the rows (`check_rows`).
"""

from __future__ import annotations

import os
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from paligemma.data.check import check
from paligemma.data.rows import Row, Rows
from paligemma.train.options import TrainOptions
from paligemma.weights.adapters import is_adapter, open_settings
from paligemma.weights.finding import resolve

if TYPE_CHECKING:
    from paligemma.inference import PaliGemma

# Problems that do not keep a run from beginning, and what becomes of their rows.
TOLERATED = {
    "missing picture": "they are skipped",
    "too many pixels": "they are skipped (--max-pixels)",
    "box outside": "they are cut at its edge",
    "suffix too long": "the ends of their answers are cut off, as in the reference",
    "form of the prompt": "they are learned as they are written",
    "boxes not asked for": "they are learned as they are, and measured as text",
}


def check_model(options: TrainOptions) -> None:
    """ValueError for LoRA on top of an adapter: the base of an adapter is a whole model, so nothing could open the
    result. Also for a model inside the run's own folder: starting over would remove it."""
    path = resolve(options.model, options.revision, options.dtype, weights=False)
    places = [path, path / open_settings(path).base] if is_adapter(path) else [path]
    for place in places:
        if place.resolve().is_relative_to(Path(options.out).resolve()):
            raise ValueError(
                f"the model to begin with ({place}) lies in {options.out}, where the run would put its own: choose "
                "another --out"
            )
    if options.lora and is_adapter(path):
        raise ValueError(
            f"{options.model} is an adapter, and LoRA needs a whole model: fold it into its base, with 'paligemma "
            f"merge {options.model} FOLDER', and give that folder as --model; or train all of it, without --lora"
        )


def check_packages(options: TrainOptions) -> None:
    """ImportError for a missing package."""
    if options.quantize and find_spec("bitsandbytes") is None:
        raise ImportError(
            f"--quantize {options.quantize} is for CUDA, and needs bitsandbytes: pip install 'paligemma[quantize]'"
        )
    if options.lora and find_spec("peft") is None:
        raise ImportError("--lora needs peft: pip install peft")


def check_rows(
    rows: Rows, pg: PaliGemma, max_length: int, max_pixels: int, strict: bool, say: Callable[[str], None]
) -> None:
    """ValueError, naming the rows, for what cannot be trained on; a note for what is tolerated."""
    with Console(stderr=True).status(f"checking {len(rows):,} rows"):
        result = check(rows, pg.processor, max_length=max_length, max_pixels=max_pixels)
    refused = {name: count for name, count in result.counts.items() if strict or name not in TOLERATED}
    if refused:
        result.counts, result.not_checked = refused, []  # `not_checked` names options of another command
        raise ValueError(f"these rows cannot be trained on as they are:\n{result}")
    if result.counts.get("missing picture") and not any(map(has_its_pictures, rows)):
        first = result.first["missing picture"][0]
        raise ValueError(
            f"none of the pictures is there: {first.source}: {first.message}. Names are relative to the file they "
            "stand in, or to the folder given as --images: is that the right one?"
        )
    for text in result.notes():
        say(f"note: {text}")
    for name, count in result.counts.items():
        first = result.first[name][0]
        which = f"{name}: {count:,} of {len(rows):,} rows, {TOLERATED[name]}"
        say(f"note: {which}; the first is {first.source}: {first.message}")


def has_its_pictures(row: Row) -> bool:
    """Whether a row has pictures, and all of them are there."""
    return bool(row.pictures) and all(isinstance(one, bytes) or os.path.isfile(one) for one in row.pictures)
