"""Reading an `.npz` slice by slice, without holding whole arrays, from one file or from several parts.

An `.npz` is a zip of `.npy` files. big_vision keeps all layers of a kind in one array (31 GB for one matrix of the
28b), so that NumPy's own reading, an array at a time, would need twice the memory of the model. Here a slice of the
first axis is read straight into the tensor that wants it.

Nothing is ever unpickled: an array of objects is an array of an unknown dtype, and stays unread.
"""

from __future__ import annotations

import glob
import io
import math
import re
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from paligemma.files import untrusted

# NumPy has no bfloat16: big_vision's arrays of it come as two nameless bytes.
NPY_DTYPES = {"<f8": torch.float64, "<f4": torch.float32, "<f2": torch.float16, "|V2": torch.bfloat16}


def npz_parts(path: Path) -> list[Path]:
    """The files behind the name of an `.npz`: itself, or its parts in order. Empty if there are none.

    The 28b checkpoints are cut into `x.npz.part0`, `x.npz.part1`, ...; `path` may be `x.npz` or any of them.
    Raises FileNotFoundError when the numbers have a gap.
    """
    name, dot_npz, part = path.name.partition(".npz")
    if not dot_npz or not (part == "" or part.startswith(".part")):
        return []
    if path.is_file() and not part:
        return [path]
    parts = list(path.parent.glob(glob.escape(name) + ".npz.part*"))
    number = {file: re.search(r"\d+", file.name.rpartition(".part")[2]) for file in parts}
    there = sorted((int(match[0]), file) for file, match in number.items() if match)
    if len(there) < len(parts):
        return sorted(parts)  # .partaa, .partab, ...
    numbers = [n for n, _ in there]
    if numbers and (numbers[0] > 1 or numbers != list(range(numbers[0], numbers[0] + len(numbers)))):
        raise FileNotFoundError(f"{path.parent / name}.npz has only its parts {numbers}: some are missing")
    return [file for _, file in there]


class NpzReader:
    """The arrays of an archive: `arrays` says name, shape and dtype of each (a string, where torch has no such
    floating-point dtype), `fill` reads one. A leading `params/` of the names is left out.

    Raises ValueError for an archive that is damaged or incomplete.
    """

    def __init__(self, parts: list[Path]):
        self.path = parts[0]
        self.arrays: dict[str, tuple[tuple[int, ...], torch.dtype | str]] = {}
        self.in_params = False  # whether names begin with "params/": others beside these are the state of training
        self._members: dict[str, tuple[str, int, bool]] = {}  # name in the archive, bytes before the data, order
        self._open: tuple[str, Any] = "", None
        self._file: Any = parts[0].open("rb") if len(parts) == 1 else io.BufferedReader(_Joined(parts))
        try:
            with untrusted(self.path):
                self._zip = zipfile.ZipFile(self._file)
                for member in self._zip.infolist():
                    self._read_header(member)
        except BaseException:
            self._file.close()
            raise

    def close(self) -> None:
        self._zip.close()
        self._file.close()  # an archive does not close a file that it was given

    def __del__(self) -> None:
        if hasattr(self, "_zip"):
            self.close()  # nobody reads on once the checkpoint is gone

    def fill(self, key: str, out: Tensor, index: int | None = None) -> Tensor:
        """Reads an array, or its slice `index`, into `out`: contiguous, of that shape and dtype. Returns `out`.

        Slices are read fastest in ascending order.
        """
        name, start, fortran = self._members[key]
        if fortran:  # the first axis runs fastest, so its slices are scattered: read all of it
            backwards = torch.empty(self.arrays[key][0][::-1], dtype=out.dtype)
            whole = self._fill(name, start, backwards).permute(*reversed(range(backwards.ndim)))
            return out.copy_(whole if index is None else whole[index])
        return self._fill(name, start + (index or 0) * out.nbytes, out)

    def _read_header(self, member: zipfile.ZipInfo) -> None:
        with self._zip.open(member) as file:
            shape, fortran, dtype = _npy_header(file)
            start = file.tell()
        name = member.filename.removesuffix(".npy")
        key = name.removeprefix("params/")
        self.in_params |= key != name
        torch_dtype = NPY_DTYPES.get(dtype.str, dtype.str)
        if isinstance(torch_dtype, torch.dtype):
            expected = start + math.prod(shape) * torch_dtype.itemsize
            if expected != member.file_size:
                raise ValueError(f"{key} has {member.file_size} bytes, expected {expected}")
        if key in self.arrays:
            raise ValueError(f"{key} is there twice")
        self.arrays[key] = shape, torch_dtype
        self._members[key] = member.filename, start, fortran

    def _fill(self, name: str, start: int, out: Tensor) -> Tensor:
        target = out.view(-1).view(torch.uint8).numpy().data
        with untrusted(self.path):
            if self._open[0] != name:
                self._open = name, self._zip.open(name)
            member = self._open[1]
            member.seek(start)
            for at in range(0, len(target), 2**24):
                piece = target[at : at + 2**24]
                if member.readinto(piece) != len(piece):
                    raise EOFError(f"{name} ends early")
        return out


def _npy_header(file: Any) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    """Shape, whether the axes are in Fortran's order, and dtype."""
    version = np.lib.format.read_magic(file)
    if version == (1, 0):
        return np.lib.format.read_array_header_1_0(file)
    if version == (2, 0):
        return np.lib.format.read_array_header_2_0(file)
    raise ValueError(f"an array has the .npy version {version}, expected 1.0 or 2.0")


class _Joined(io.RawIOBase):
    """Several files, read as if they were one: the parts of an archive, without writing it out."""

    def __init__(self, parts: list[Path]):
        self.files = [part.open("rb") for part in parts]
        self.starts = [0]
        for part in parts:
            self.starts.append(self.starts[-1] + part.stat().st_size)
        self.at = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self.at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        origin = {io.SEEK_SET: 0, io.SEEK_CUR: self.at, io.SEEK_END: self.starts[-1]}[whence]
        if origin + offset < 0:
            raise OSError("seek before the start")  # what zipfile expects of a file that is too short
        self.at = origin + offset
        return self.at

    def readinto(self, buffer: Any) -> int:
        for file, start, end in zip(self.files, self.starts, self.starts[1:]):
            if start <= self.at < end:
                file.seek(self.at - start)
                count = file.readinto(memoryview(buffer)[: end - self.at])
                self.at += count
                return count
        return 0

    def close(self) -> None:
        for file in self.files:
            file.close()
        super().close()
