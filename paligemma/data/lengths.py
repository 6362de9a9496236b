"""How many tokens a row has, counted as the processor lays it out."""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING

from paligemma.data.rows import Row

if TYPE_CHECKING:
    from paligemma.processing_paligemma import PaliGemmaProcessor


class Lengths:
    """Tokens of a row: (pictures, <bos>, prefix and newline; suffix and <eos>, of several the longest)."""

    def __init__(self, processor: PaliGemmaProcessor) -> None:
        self.per_picture = processor.num_image_tokens
        encode = processor.tokenizer.encode
        self.prefix = lru_cache(maxsize=10_000)(lambda prefix: 1 + len(encode(prefix + "\n")))
        self.suffix = lru_cache(maxsize=10_000)(lambda suffix: len(encode(suffix + "<eos>")))

    def __call__(self, row: Row) -> tuple[int, int]:
        suffix = max(map(self.suffix, row.suffixes)) if row.suffixes else self.suffix(row.suffix)
        return len(row.pictures) * self.per_picture + self.prefix(row.prefix), suffix
