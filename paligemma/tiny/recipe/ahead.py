"""Batches that are made ahead in other processes, so that a GPU does not wait for them.

A batch is a function of the step, so any process can make any batch, and the training sees the same ones.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from concurrent.futures import Future, ProcessPoolExecutor
from typing import Any

import numpy as np
import torch
from torch import Tensor

from paligemma.tiny.recipe.shards import pixels

Batches = Callable[[int, int, int], dict[str, Tensor]]

_batches: Batches  # in a process that makes batches


def _prepare(make: Callable[..., Batches], arguments: dict[str, Any]) -> None:
    global _batches
    torch.set_num_threads(1)
    _batches = make(**arguments)


def _arrays(step: int, part: int, parts: int) -> dict[str, np.ndarray]:
    """A batch for the way between processes: pictures as bytes, a quarter of their size."""
    arrays = {name: value.numpy() for name, value in _batches(step, part, parts).items()}
    images = np.rint((arrays["pixel_values"] + 1) * 127.5).astype(np.uint8)
    return arrays | {"pixel_values": np.ascontiguousarray(images.transpose(0, 2, 3, 1))}


class Ahead:
    """`make(**arguments)`, called as a function of the step, but with the next batches already being made.

    With 0 processes nothing is made ahead.
    """

    def __init__(self, processes: int, make: Callable[..., Batches], **arguments: Any):
        self.processes = processes
        self.batches = make(**arguments) if processes == 0 else None
        self._waiting: dict[tuple[int, int, int], Future[dict[str, np.ndarray]]] = {}
        self._pool: ProcessPoolExecutor | None = None
        if processes:
            spawn = multiprocessing.get_context("spawn")  # a forked process would inherit the state of CUDA
            self._pool = ProcessPoolExecutor(processes, spawn, _prepare, (make, arguments))

    def __call__(self, step: int, part: int, parts: int) -> dict[str, Tensor]:
        if self.batches is not None:
            return self.batches(step, part, parts)
        assert self._pool is not None
        for later in range(step, step + 2 * self.processes):
            if (later, part, parts) not in self._waiting:
                self._waiting[later, part, parts] = self._pool.submit(_arrays, later, part, parts)
        arrays = self._waiting.pop((step, part, parts)).result()
        images = pixels(arrays.pop("pixel_values"))
        return {"pixel_values": images, **{name: torch.from_numpy(value) for name, value in arrays.items()}}

    def __enter__(self) -> Ahead:
        return self

    def __exit__(self, *error: object) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
