"""A cache whose tensors never change their shape or their place, so that a decoding step can be compiled once.

`KVCache` returns views of what has been written so far. They are longer after every token, and a compiled graph (a CUDA
graph even more so) wants the same shapes and addresses each time. Here every step reads all columns, under a mask.

A row's tokens stand together from column 1 on, without its padding. So the column says which token of the row it holds,
and the mask follows from places alone: a query at place 2 sees places up to 2. What has not been written yet lies
beyond. `lengths` is the only thing that changes beside keys and values, and nothing is ever read back by the host:

    columns    0     1 2 3 4 5 6        lengths
    places     far   0 1 2 3 4 5
    row 0      .     i i p p s          5
    row 1      .     i i p              3

Padding is written into column 0, which lies too far away to be seen. A row that has ended goes on as padding, once
`active` says so.

The price: attention over columns that are not in use. It pays where launching operations takes longer than computing
them: on a GPU, for few rows. After gpt-fast (github.com/pytorch-labs/gpt-fast), whose rows all have one length.

Letters: B batch, S new tokens, T columns, K key/value heads, E head size.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import Tensor

from paligemma.kv_cache import KVCache

if TYPE_CHECKING:
    from paligemma.modeling_gemma import GemmaConfig

FAR = 2**40  # a place that no query reaches


class StaticKVCache(KVCache):
    """A cache for `batch` rows of at most `max_length` tokens (padding not counted), to be used as `KVCache`.

    Rows stay where they are, and there is one length: `put` is all that changes them. The prompt cannot be read under a
    mask of the caller's own, and a mask for what follows must leave every query a key. A row that grows beyond
    `max_length` is an error of PyTorch's: index out of bounds.

    active: bool [B], to be changed in place. Where it is False, all new tokens of the row are padding.
    """

    def __init__(
        self,
        config: GemmaConfig,
        batch: int,
        max_length: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ):
        super().__init__(config, batch, max_length + 1, dtype, device)
        self.max_length = max_length
        places = torch.arange(-1, max_length, device=device)
        places[0] = FAR
        self.positions = places.expand(batch, -1)  # [B, T]; as `valid`, it never changes
        self.valid.fill_(True)
        self.columns = torch.zeros(batch, max_length + 1, dtype=torch.int64, device=device)  # of the S new tokens
        self.active = torch.ones(batch, dtype=torch.bool, device=device)
        self.reads_prompt = False

    def extend(self, valid: Tensor) -> Tensor:
        """Chooses the columns of S new tokens, before any layer writes into them. As in `KVCache`."""
        if len(valid) != len(self.valid):
            raise ValueError(f"the cache holds {len(self.valid)} rows, and {len(valid)} are to be read")
        self.reads_prompt = self.used == 0
        self.used = self.max_length + 1  # all columns, as soon as there is something to see
        valid = valid & self.active[:, None]
        place = (self.lengths[:, None] + valid.long().cumsum(-1) - 1).clamp(min=0)
        self.columns[:, : valid.shape[1]] = (place + 1) * valid
        self.lengths += valid.sum(-1)
        return place

    def update(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Writes one layer's new keys and values [B, K, S, E]. Returns all columns, [B, K, T, E] each.

        For the prompt it returns what it was given: the prompt sees itself, as it is laid out, and nothing else.
        """
        if keys.dtype != self.keys[layer].dtype:
            raise ValueError(f"the cache holds {self.keys[layer].dtype}, the model computes in {keys.dtype}")
        columns = self.columns[:, None, : keys.shape[2], None].expand_as(keys)
        self.keys[layer].scatter_(2, columns, keys)
        self.values[layer].scatter_(2, columns, values)
        return (keys, values) if self.reads_prompt else (self.keys[layer], self.values[layer])

    def put(self, row: int, prompt: KVCache, source: int = 0) -> None:
        """Takes over one row of a cache into which a prompt was read, in the place of whatever `row` held."""
        columns = prompt.valid[source, : prompt.used].nonzero()[:, 0]  # int64 [S], without padding
        if len(columns) > self.max_length:
            raise ValueError(f"the cache holds {self.max_length} tokens a row, and the prompt has {len(columns)}")
        for own, given in ((self.keys, prompt.keys), (self.values, prompt.values)):
            for layer, tensor in enumerate(given):
                own[layer][row].zero_()  # numbers beyond the prompt are masked, but 0 * NaN would be NaN
                own[layer][row, :, 1 : len(columns) + 1] = tensor[source][:, columns]
        self.lengths[row] = len(columns)
        self.used = self.max_length + 1

    def reset(self) -> None:
        """Empties it, for other rows."""
        for tensor in (*self.keys, *self.values):
            tensor.zero_()  # as in `put`: NaN would reach other rows from behind a mask
        self.lengths.zero_()
        self.active.fill_(True)
        self.used = 0

    def _not_offered(self, *_: Any, **__: Any) -> NoReturn:
        """A graph was compiled for these shapes."""
        raise ValueError("a StaticKVCache keeps its rows and its length: use KVCache to drop, add or reorder rows")

    select = rewind = join = trim = grow = _not_offered
