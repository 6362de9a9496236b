"""Rows -> batches. A batch is a pure function of the step's number, so a run that resumes needs to remember nothing
else.

    batches = RowBatches(rows, processor, batch_size=32)
    batches(step=7, part=0, parts=4)       # the first quarter of step 7's 32 rows, as tensors for the model

`rows` is anything with `len` and `[i]` that gives `{"image": ..., "prefix": ..., "suffix": ...}` (or an object with
such attributes). `image` is what `load_image` takes, or a tuple of them. The parts of a step are shared out among
processes and among the pieces of an accumulated batch; together they are the same rows however many parts there are.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from paligemma.processing_paligemma import PaliGemmaProcessor

Batch = dict[str, Tensor]


class RowBatches:
    """Shuffles anew in every epoch; the last rows of an epoch are filled up with the first of the next.

    max_length cuts rows (images included) at the end of the suffix; padding is on the right, as in the reference's
    training.
    """

    def __init__(
        self,
        rows: Sequence[Any],
        processor: PaliGemmaProcessor,
        batch_size: int,
        seed: int = 0,
        max_length: int | None = None,
        shuffle: bool = True,
    ):
        if not len(rows):
            raise ValueError("there are no rows to train on")
        self.rows, self.processor, self.batch_size = rows, processor, batch_size
        self.seed, self.max_length, self.shuffle = seed, max_length, shuffle
        self._epoch, self._order = -1, torch.empty(0)

    def __call__(self, step: int, part: int = 0, parts: int = 1) -> Batch | None:
        """None where a step has more parts than rows and nothing is left for this one."""
        places = range(step * self.batch_size, (step + 1) * self.batch_size)
        rows = [self.rows[self._row(place)] for place in places[part::parts]]
        if not rows:
            return None
        prefix, suffix, image = ([_get(row, name) for row in rows] for name in ("prefix", "suffix", "image"))
        return self.processor(
            text=prefix, images=image, suffix=suffix, padding_side="right", max_length=self.max_length
        )

    def _row(self, place: int) -> int:
        """Which row stands at a place of the endless shuffled stream."""
        epoch, place = divmod(place, len(self.rows))
        if not self.shuffle:
            return place
        if epoch != self._epoch:
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
            self._epoch, self._order = epoch, torch.randperm(len(self.rows), generator=generator)
        return int(self._order[place])


def _get(row: Any, name: str) -> Any:
    return row[name] if isinstance(row, dict) else getattr(row, name)
