"""Slots of fixed size for rows that come and go, and the one graph that writes the next token of all of them.

    slots = Slots(model, max_rows=3, length=1_000)    # compiles the step

    slot 0     a a a a a a a    row A
    slot 1     . . b b b b .    row B came with the third step and left after the sixth
    slot 2     . . . . . . .    free: computed on as padding, its output is not used

A compiled graph wants tensors that keep their shape and their place. So the rows do not share one cache that is joined
and trimmed, as in `KVCache`; each has a slot of a `StaticKVCache`, and every step computes all slots. That costs little
where decoding is bound by launching operations and reading weights: on a GPU.

Letters: N rows running, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from paligemma.compiled import check_can_be_compiled, decode_compiled, empty_cache, room_for_graphs
from paligemma.kv_cache import KVCache, bytes_per_token

if TYPE_CHECKING:
    from paligemma.modeling_gemma import PaliGemmaForConditionalGeneration


class Slots:
    """Room for `max_rows` rows of at least `length` tokens each. Rows are counted in the order in which they joined.

    length: how many tokens a slot holds; the one asked for is rounded up. nbytes: what all slots take, used or not.
    Raises ValueError for a model that cannot be compiled.
    """

    @torch.inference_mode()
    def __init__(self, model: PaliGemmaForConditionalGeneration, max_rows: int, length: int):
        check_can_be_compiled(model)
        self.model = model
        self.cache = empty_cache(model, max_rows, length)
        self.cache.used = self.cache.max_length + 1  # prompts are read elsewhere: only answers continue here
        self.length = self.cache.max_length
        self.nbytes = max_rows * self.cache.used * bytes_per_token(model.config.text_config, model.dtype)
        self._max_rows = max_rows
        self._hold([])
        with room_for_graphs():
            for _ in range(3):  # now, and not for the first row: compiled, on CUDA recorded, and replayed
                self.decode([])

    def join(self, prompts: KVCache) -> None:
        """Gives each row of a cache that prompts were read into a free slot. The rows come behind those that run."""
        free = [slot for slot in range(self._max_rows) if slot not in self._held][: len(prompts.lengths)]
        for row, slot in enumerate(free):
            self.cache.put(slot, prompts, row)
        self._hold([*self._held, *free])

    def keep(self, rows: Sequence[int]) -> None:
        """Only these rows go on; the slots of the others are free."""
        self._hold([self._held[row] for row in rows])

    def decode(self, tokens: Sequence[int]) -> Tensor:
        """Reads one more token of each row: the logits of the token after it, [N, V]."""
        inputs = [0] * self._max_rows
        for slot, token in zip(self._held, tokens, strict=True):
            inputs[slot] = token
        logits = decode_compiled(self.model, torch.tensor(inputs, device=self.model.device), self.cache)
        return logits[self._held]

    def _hold(self, slots: list[int]) -> None:
        self._held = slots  # of each row
        self.cache.active.copy_(torch.tensor([slot in slots for slot in range(self._max_rows)]))
