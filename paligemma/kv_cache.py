"""Keys and values of every layer, kept so that a new token costs one token of work.

The cache is allocated once, at the full length a row may reach, and written in place: growing it with `torch.cat`
would copy everything for every token. All rows of a batch write into the same columns; what differs per row is which
columns hold a real token (`valid`), which place in its row each has (`positions`, from 0) and how many there are
(`lengths`). So padding may stand on the left, on the right or in the middle, and rows of different length decode
together:

    columns   0 1 2 3 4 5        valid         lengths
    row 0     i i p p s s        1 1 1 1 1 1   6
    row 1     . i i p s .        0 1 1 1 1 0   4

A column that is not valid holds numbers too, but no query of a real token ever looks at them. That is padding, such as
the last column of row 1: there a caller fed row 0 alone. `generate` does not: rows that have ended leave with `select`.

In every pass `extend` opens the new columns once, for all layers. Then each layer's `update` writes its keys and values
into them.

A token takes layers x 2 x K x E numbers of 2 bytes in bfloat16: 18 KB for PaliGemma 1, 104 KB for PaliGemma 2 3b.

Letters: B batch, S new tokens, T columns, K key/value heads, E head size.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from paligemma.modeling_gemma import GemmaConfig


class KVCache:
    """A preallocated cache for `batch` rows of at most `max_length` tokens (padding included)."""

    def __init__(
        self,
        config: GemmaConfig,
        batch: int,
        max_length: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ):
        shape = (batch, config.num_key_value_heads, max_length, config.head_dim)
        layers = range(config.num_hidden_layers)
        self.keys = [torch.zeros(shape, dtype=dtype, device=device) for _ in layers]  # each [B, K, T, E]
        self.values = [torch.zeros(shape, dtype=dtype, device=device) for _ in layers]
        self.valid = torch.zeros(batch, max_length, dtype=torch.bool, device=device)
        self.positions = torch.zeros(batch, max_length, dtype=torch.int64, device=device)
        self.lengths = torch.zeros(batch, dtype=torch.int64, device=device)  # real tokens per row
        self.used = 0  # columns written
        self.max_length = max_length

    def extend(self, valid: Tensor) -> Tensor:
        """Opens S new columns, before any layer writes into them.

        valid: bool [B, S], False where a row has no token. Returns the place of each new token among the real tokens
        of its row, from 0: int64 [B, S]. Raises ValueError when the columns do not fit.
        """
        S = valid.shape[1]
        if len(valid) != len(self.valid):
            raise ValueError(f"the cache holds {len(self.valid)} rows, and {len(valid)} are to be read")
        if self.used + S > self.max_length:
            raise ValueError(f"the cache holds {self.max_length} tokens; {self.used} are used and {S} more do not fit")
        place = (self.lengths[:, None] + valid.long().cumsum(-1) - 1).clamp(min=0)
        columns = slice(self.used, self.used + S)
        self.valid[:, columns] = valid
        self.positions[:, columns] = place
        self.lengths = self.lengths + valid.sum(-1)
        self.used += S
        return place

    def update(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Writes one layer's new keys and values [B, K, S, E] into the columns that `extend` opened.

        Returns views of everything stored so far for that layer, [B, K, T, E] each. Raises ValueError if the cache was
        made for another dtype.
        """
        if keys.dtype != self.keys[layer].dtype:
            raise ValueError(f"the cache holds {self.keys[layer].dtype}, the model computes in {keys.dtype}")
        columns = slice(self.used - keys.shape[2], self.used)
        self.keys[layer][:, :, columns] = keys
        self.values[layer][:, :, columns] = values
        return self.keys[layer][:, :, : self.used], self.values[layer][:, :, : self.used]

    def select(self, rows: Tensor) -> None:
        """Keeps a copy of these rows, int64 [B'], in this order: to reorder beams, and to drop rows that have ended."""
        for stored in (self.keys, self.values):
            for layer, tensor in enumerate(stored):
                stored[layer] = tensor[rows]  # one layer at a time, so that there is never a second cache
        self.valid, self.positions, self.lengths = self.valid[rows], self.positions[rows], self.lengths[rows]
