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

Rows may come and go (see `engine.py`). `select` drops those that have ended, `join` puts the rows of another cache
below, so that all end in the same column, and `trim` removes the first columns if no row holds a token there:

    columns   0 1 2 3 4 5 6     select([1])       join              trim
    row 0     i i p p s s s
    row 1     . . . i i p s     . . . i i p s     . . . i i p s     i i p s
    another                                       . . . . i i p     . i i p

A token keeps its place in its row whatever the column is, so nothing is computed anew. `grow` makes room for more
columns.

A token takes layers x 2 x K x E numbers of 2 bytes in bfloat16: 18 KB for PaliGemma 1, 104 KB for PaliGemma 2 3b.

Letters: B batch, S new tokens, T columns, K key/value heads, E head size.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from paligemma.modeling_gemma import GemmaConfig


def bytes_per_token(config: GemmaConfig, dtype: torch.dtype) -> int:
    """What one token takes: a key and a value in every layer."""
    return config.num_hidden_layers * 2 * config.num_key_value_heads * config.head_dim * dtype.itemsize


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
        if not hasattr(config, "num_key_value_heads"):
            hint = ": pass its `.text_config`" if hasattr(config, "text_config") else ""
            raise TypeError(f"config is {type(config).__name__}, expected a GemmaConfig{hint}")
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

    def rewind(self, columns: int) -> None:
        """Forgets the last columns, so many of them. What stands before them stays as it is, to the bit.

        For a prefix that is read once and continued in different ways. Raises ValueError for more than are used.
        """
        if not 0 <= columns <= self.used:
            raise ValueError(f"columns is {columns}, and the cache holds {self.used}")
        kept = self.used - columns
        self.lengths = self.lengths - self.valid[:, kept : self.used].sum(-1)
        self.used = kept

    def select(self, rows: Tensor) -> None:
        """Keeps a copy of these rows, int64 [B'], in this order: to reorder beams, and to drop rows that have ended."""
        self.valid, self.positions, self.lengths = self.valid[rows], self.positions[rows], self.lengths[rows]
        for stored in (self.keys, self.values):
            for layer, old in enumerate(stored):  # one layer at a time, so that there is never a second cache
                new = old.new_empty(len(rows), *old.shape[1:])
                if torch.is_grad_enabled():  # `out` knows no gradients
                    new[:, :, : self.used] = old[:, :, : self.used].index_select(0, rows)
                else:
                    torch.index_select(old[:, :, : self.used], 0, rows, out=new[:, :, : self.used])
                stored[layer] = new

    def join(self, other: KVCache) -> None:
        """Adds a copy of the other cache's rows below these. The last used columns of both become the same column.

        The room behind them is the larger one of both. Raises ValueError for a cache of another dtype or shape.
        """
        ours, theirs = self.keys[0], other.keys[0]
        if (ours.dtype, ours.shape[1], ours.shape[3]) != (theirs.dtype, theirs.shape[1], theirs.shape[3]):
            raise ValueError(
                f"a cache of {ours.dtype} {list(ours.shape)} cannot take rows of {theirs.dtype} {list(theirs.shape)}"
            )
        used = max(self.used, other.used)
        columns = used + max(self.max_length - self.used, other.max_length - other.used)
        lengths = self.used, other.used
        for stored, added in ((self.keys, other.keys), (self.values, other.values)):
            for layer, pair in enumerate(zip(stored, added)):  # one layer at a time, as above
                stored[layer] = _stacked(pair, lengths, columns, dim=2)
        self.valid = _stacked((self.valid, other.valid), lengths, columns, dim=1)
        self.positions = _stacked((self.positions, other.positions), lengths, columns, dim=1)
        self.lengths = torch.cat([self.lengths, other.lengths])
        self.used, self.max_length = used, columns

    def trim(self) -> None:
        """Leaves out the first columns that hold no token of any row. Their memory is freed by the next copy."""
        held = self.valid[:, : self.used].any(0)
        first = int(held.long().argmax()) if held.numel() else 0  # of the columns that some row holds
        if first:
            for stored in (self.keys, self.values):
                stored[:] = [tensor[:, :, first:] for tensor in stored]  # views
            self.valid, self.positions = self.valid[:, first:], self.positions[:, first:]
            self.used, self.max_length = self.used - first, self.max_length - first

    def grow(self, max_length: int) -> None:
        """Room for at least `max_length` columns in all, those in use included, in new memory."""
        if max_length > self.max_length:
            for stored in (self.keys, self.values):
                for layer, tensor in enumerate(stored):
                    stored[layer] = _stacked([tensor], [self.used], max_length, dim=2)
            self.valid = _stacked([self.valid], [self.used], max_length, dim=1)
            self.positions = _stacked([self.positions], [self.used], max_length, dim=1)
            self.max_length = max_length


def _stacked(tensors: Sequence[Tensor], lengths: Sequence[int], columns: int, dim: int) -> Tensor:
    """The rows of several tensors in one with `columns` columns (dimension `dim`).

    The first `lengths[i]` columns of tensor i are copied so that all end in the same column.
    """
    shape = [*tensors[0].shape]
    shape[0], shape[dim] = sum(map(len, tensors)), columns
    stacked = tensors[0].new_empty(shape)
    below = stacked
    for old, length in zip(tensors, lengths):
        rows, below = below[: len(old)], below[len(old) :]
        gap = max(lengths) - length
        # Zeros, because columns that nobody may look at are still multiplied, with a weight of 0.
        rows.narrow(dim, 0, gap).zero_()
        rows.narrow(dim, gap, length).copy_(old.narrow(dim, 0, length))
    return stacked
