"""The two formats as bytes: safetensors and big_vision's `.npz`, each tensor written as soon as it is read."""

from __future__ import annotations

import contextlib
import functools
import json
import math
import os
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from paligemma.files import write_json
from paligemma.weights.layouts import EMBEDDING, bigvision_layout
from paligemma.weights.npz import NPY_DTYPES
from paligemma.weights.opening import INDEX, WEIGHTS, Checkpoint
from paligemma.weights.safetensors_file import DTYPES as SAFETENSORS_DTYPES
from paligemma.weights.safetensors_file import Shape


def write_safetensors(
    folder: Path,
    order: list[str],
    tensors: dict[str, tuple[Shape, torch.dtype]],
    read: Callable[[str], Tensor],
    max_shard_size: int,
) -> None:
    """Writes `tensors` into one file, or into several of at most `max_shard_size` bytes and an index.

    order: the order in which tensors are assigned to files. They are read in the order of `tensors`, each once.

    The format is a length (8 bytes), a JSON header with dtype, shape and offsets, and the tensors end to end. It is
    written here and not by the safetensors package so that a tensor is written as soon as it is read.
    """
    if max_shard_size <= 0:
        raise ValueError(f"max_shard_size is {max_shard_size}, expected a number of bytes")
    size = {name: math.prod(shape) * dtype.itemsize for name, (shape, dtype) in tensors.items()}
    shards: list[list[str]] = [[]]
    for name in order:
        if shards[-1] and sum(size[other] for other in shards[-1]) + size[name] > max_shard_size:
            shards.append([])
        shards[-1].append(name)
    files = [WEIGHTS]
    if len(shards) > 1:
        files = [f"model-{number:05d}-of-{len(shards):05d}.safetensors" for number in range(1, len(shards) + 1)]

    codes = {dtype: code for code, dtype in SAFETENSORS_DTYPES.items()}
    with contextlib.ExitStack() as stack:
        place: dict[str, tuple[Any, int]] = {}
        for file_name, names in zip(files, shards):
            file = stack.enter_context((folder / file_name).open("wb"))
            header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
            end = 0
            # Wide numbers before narrow ones, so that each starts at a multiple of its own size.
            for name in sorted(names, key=lambda name: -tensors[name][1].itemsize):
                shape, dtype = tensors[name]
                start, end = end, end + size[name]
                header[name] = {"dtype": codes[dtype], "shape": list(shape), "data_offsets": [start, end]}
            text = json.dumps(header, separators=(",", ":")).encode()
            text += b" " * (-(8 + len(text)) % 64)  # the tensors begin at a cache line
            file.write(len(text).to_bytes(8, "little") + text)
            for name in names:
                place[name] = file, 8 + len(text) + header[name]["data_offsets"][0]
        for name in tensors:
            file, offset = place[name]
            file.seek(offset)
            write_tensor(file, read(name))
        for file in {id(file): file for file, _ in place.values()}.values():
            file.flush()
            os.fsync(file.fileno())  # some file systems find out here that they are full
    if len(shards) > 1:
        weight_map = {name: file for file, names in zip(files, shards) for name in names}
        index = {"metadata": {"total_size": sum(size.values())}, "weight_map": weight_map}
        write_json(folder / INDEX, index)


def write_tensor(file: Any, tensor: Tensor) -> None:
    file.write(tensor.cpu().contiguous().view(-1).view(torch.uint8).numpy().data)


def write_npz(
    path: Path,
    checkpoint: Checkpoint,
    tensors: dict[str, tuple[Shape, torch.dtype]],
    read: Callable[[str], Tensor],
    rows: int,
) -> None:
    """Writes big_vision's layout, one slice of an array after the other. rows: of the embedding."""
    codes = {dtype: code for code, dtype in NPY_DTYPES.items()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for array in bigvision_layout(checkpoint.config, rows):
            # One array holds a matrix of all layers; where they differ, the widest dtype holds all of their values.
            names = [template.format(i=i) for i in range(array.layers or 1) for template in array.names]
            dtype = functools.reduce(torch.promote_types, (tensors[name][1] for name in names))
            header = {"descr": codes[dtype], "fortran_order": False, "shape": array.shape}
            with archive.open(zipfile.ZipInfo(f"params/{array.key}.npy"), "w", force_zip64=True) as file:
                np.lib.format.write_array_header_1_0(file, header)
                for i in range(array.layers or 1):
                    for template in array.names:
                        tensor = read(template.format(i=i)).to(dtype)
                        write_tensor(file, array.pack(tensor[:rows] if template == EMBEDDING else tensor))
    with path.open("rb+") as whole:
        os.fsync(whole.fileno())


@contextlib.contextmanager
def progress_in_bytes(title: str, total: int) -> Iterator[Callable[[int], None]]:
    """A progress bar in bytes on stderr, where that is a terminal. Yields the function that moves it on."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    columns = TextColumn("{task.description}", markup=False), BarColumn(), DownloadColumn(), TimeRemainingColumn()
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task(title, total=total)
        yield lambda count: progress.advance(task, count)
