"""Counts the bytes of all tensors while code runs: PyTorch tells of every new tensor, and of every one that goes."""

from __future__ import annotations

import weakref
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

WEIGHTS, CAST, WORKSPACE = "weights", "weights, rounded for the products", "workspace"


class Memory(TorchDispatchMode):
    """Counts the bytes of the tensors that exist, by what they are for.

    The bytes of a kind are multiplied by its `weight`, if it has one. `fullest`: the bytes of each kind at the fullest
    moment so far.
    """

    def __init__(self, weight: dict[str, float]):
        super().__init__()
        self.weight = weight
        self.held: dict[str, float] = defaultdict(float)  # by kind
        self.kinds: dict[int, str] = {}  # by the identity of a storage
        self.fullest: dict[str, float] = {}
        self.moment, self._doing, self._kind = "", "", WORKSPACE

    @contextmanager
    def at(self, moment: str) -> Iterator[None]:
        """What is being done inside."""
        self._doing = moment
        yield

    @contextmanager
    def of(self, kind: str) -> Iterator[None]:
        """New tensors inside are of this kind."""
        before, self._kind = self._kind, kind
        yield
        self._kind = before

    def hold(self, tensors: Any, kind: str) -> None:
        """Count tensors, or move those already counted to another kind."""
        for tensor in tensors:
            storage = tensor.untyped_storage()
            size = storage.nbytes() * self.weight.get(kind, 1.0)
            known = self.kinds.get(id(storage))
            if known is None:
                weakref.finalize(storage, self._gone, id(storage), storage.nbytes())
            else:
                self.held[known] -= storage.nbytes() * self.weight.get(known, 1.0)
            self.kinds[id(storage)] = kind
            self.held[kind] += size
        if sum(self.held.values()) > sum(self.fullest.values()):
            self.fullest, self.moment = dict(self.held), self._doing

    def _gone(self, identity: int, size: int) -> None:
        kind = self.kinds.pop(identity)
        self.held[kind] -= size * self.weight.get(kind, 1.0)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, Tensor) and id(tensor.untyped_storage()) not in self.kinds:
                rounded = func is torch.ops.aten._to_copy.default and self._is_weight(args[0])
                self.hold([tensor], CAST if rounded else self._kind)
        return out

    def _is_weight(self, tensor: Tensor) -> bool:
        return self.kinds.get(id(tensor.untyped_storage())) == WEIGHTS
