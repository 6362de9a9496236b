"""A safetensors file, mapped into memory: its tensors are views of the map. Bytes are read when they are first used,
and the system may drop them again where memory is short.

    file = MappedFile("model.safetensors")
    file.tensors["language_model.model.norm.weight"]      # ((2048,), "BF16")
    file.read("language_model.model.norm.weight")

The format: 8 bytes with the length of the header, the header in JSON (for each name dtype, shape and the first and last
byte), the bytes. (https://github.com/huggingface/safetensors)

Why not `safe_open(path, "pt")`, which does the same? It maps the file private and writable, and Linux reserves memory
for such a map, so that a file larger than the machine's memory could not even be opened. Our map is writable too
(training in place changes the pages in memory, never the file), but nothing is reserved for it.
"""

from __future__ import annotations

import math
import mmap
import os
import sys
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from paligemma.files import parse_json, untrusted

Shape = tuple[int, ...]

FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
WHOLE_NUMBERS = {"I8": torch.int8, "U8": torch.uint8}  # in quantised checkpoints only
DTYPES = FLOATS | WHOLE_NUMBERS

MAP_NORESERVE = 0x4000  # of Linux; Python's module has no name for it


class MappedFile:
    """A file whose header was read; it is mapped when a tensor is. tensors: shape and dtype, as the format calls it, by
    name.

    Raises ValueError, naming it, for a file that is none or is cut off, and OSError.
    """

    def __init__(self, path: str | os.PathLike[str]):
        self._path = Path(path)
        with untrusted(self._path), safe_open(path, "np"):  # checks the header, and that all of its bytes are there
            pass
        with open(path, "rb") as file:
            self._state = _state(file.fileno())
            length = int.from_bytes(file.read(8), "little")
            header = parse_json(file.read(length))
        header.pop("__metadata__", None)
        self.tensors: dict[str, tuple[Shape, str]] = {n: (tuple(t["shape"]), t["dtype"]) for n, t in header.items()}
        self._first = {name: 8 + length + entry["data_offsets"][0] for name, entry in header.items()}

    def read(self, name: str, apart: bool = False) -> Tensor:
        """A view of the file. apart: in a map of its own, so that the pages that it touches leave memory with it; else
        in one map for all tensors. ValueError if the file is not what it was when its header was read."""
        shape, dtype = self.tensors[name]
        if not (count := math.prod(shape)):
            return torch.empty(shape, dtype=DTYPES[dtype])
        pages = self._mapped() if apart else self._shared
        return torch.frombuffer(pages, dtype=DTYPES[dtype], count=count, offset=self._first[name]).view(shape)

    @cached_property
    def _shared(self) -> mmap.mmap:
        return self._mapped()

    def _mapped(self) -> mmap.mmap:
        how: dict[str, Any] = {"access": mmap.ACCESS_COPY}
        if sys.platform == "linux":
            how = {"flags": mmap.MAP_PRIVATE | MAP_NORESERVE, "prot": mmap.PROT_READ | mmap.PROT_WRITE}
        with open(self._path, "rb") as file:
            if _state(file.fileno()) != self._state:
                raise ValueError(f"{self._path} was changed while it was read: try again")
            return mmap.mmap(file.fileno(), 0, **how)


def _state(descriptor: int) -> tuple[int, int, int]:
    found = os.fstat(descriptor)
    return found.st_ino, found.st_size, found.st_mtime_ns
