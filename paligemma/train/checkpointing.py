"""Training state on disk: whole or not there at all.

    save(folder, step, state)      # folder/step-00001200/ ; older ones are removed
    state = load_last(folder)      # None if there is none

`state` is nested dicts and lists of tensors and plain values, such as a model's and an optimizer's `state_dict()`. No
pickle: a checkpoint is

    state.json                             the structure, plain values, names in the places of tensors
    tensors.safetensors                    the tensors
    rows-00000-of-00002.safetensors ...    of a sharded model (see `sharding.py`): its tensors' rows, a file a process

It is written into a folder beside its place and renamed when it is complete, so a run that is killed at any moment
leaves its last good checkpoint and at most one `.part` and a few `.old`, which the next one removes.

Where a row lies is seen from the files themselves: the rows of one follow those of the one before. So a checkpoint of
two processes can be read by three, each of which takes the rows that are now its own, or by one, which takes them all.
All processes must see the same folder.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from paligemma.files import library_errors, named_in_errors, read_json_value
from paligemma.train.distributed import is_sharded, own_rows, together
from paligemma.train.sharding import from_own_rows, places_of_own_rows

NAME = re.compile(r"step-(\d+)$")
ROWS = re.compile(r"rows-(\d+)-of-(\d+)\.safetensors$")


def save(folder: Path, step: int, state: dict[str, Any], keep: int = 1) -> Path:
    """Write `folder/step-N` and remove all but the newest `keep`.

    A state with sharded tensors has to be saved by all processes together; if one of them cannot write, all raise
    OSError.
    """
    place, beside = folder / f"step-{step:08d}", folder / f"step-{step:08d}.part"
    tensors: dict[str, Tensor] = {}
    rows: dict[str, Tensor] = {}
    plain = _take_tensors(state, "", tensors, rows)
    rank, world = (dist.get_rank(), dist.get_world_size()) if rows else (0, 1)

    def make_room() -> None:
        if rank == 0:
            folder.mkdir(parents=True, exist_ok=True)
            shutil.rmtree(beside, ignore_errors=True)
            beside.mkdir()

    def write() -> None:
        if rows:
            _write(rows, beside / f"rows-{rank:05d}-of-{world:05d}.safetensors")
        if rank == 0:
            _write(tensors, beside / "tensors.safetensors")
            with named_in_errors(place):
                (beside / "state.json").write_text(json.dumps(plain))
            _flush(beside / "state.json")

    def put_in_place() -> None:
        if rank:
            return
        if rows and len(_files_of_rows(beside)) != world:
            raise OSError(f"{beside} does not have the files of all {world} processes: do all of them see this folder?")
        if place.exists():  # the same step again, by the end of a run or one that had lost its successors
            _set_aside(place)
        os.replace(beside, place)
        for old in checkpoints(folder)[:-keep]:
            _set_aside(old)
        for left in (*folder.glob("step-*.old"), *folder.glob("step-*.part")):  # of runs that were killed, too
            shutil.rmtree(left, ignore_errors=True)

    for act in (make_room, write, put_in_place):
        together(act) if rows else act()
    return place


def checkpoints(folder: Path) -> list[Path]:
    """The complete checkpoints of a run, oldest first."""
    complete = sorted(path for path in folder.glob("step-*") if NAME.search(path.name))
    # None: a run was killed after the same step's first checkpoint was set aside and before the second had its name.
    return complete or sorted(folder.glob("step-*.old"))


def load_last(folder: Path, mesh: Any = None) -> dict[str, Any] | None:
    """The state in the newest checkpoint, or None."""
    found = checkpoints(folder)
    return load(found[-1], mesh) if found else None


def load(place: Path, mesh: Any = None) -> dict[str, Any]:
    """The state of a checkpoint, with whole tensors. With a DeviceMesh every process reads its own rows alone, and
    tensors are sharded over it (but for single numbers), whatever they were when they were saved.

    ValueError for a checkpoint of which something is missing or damaged.
    """
    with _one_error(place):
        names = _files_of_rows(place)
        if names and len(names) != int(ROWS.search(names[0].name)[2]):  # type: ignore[index]
            raise ValueError(f"not complete: {len(names)} files of rows, beginning with {names[0].name}")
        tensors = place / "tensors.safetensors"
        files = {True: [safe_open(name, "pt") for name in names], False: [safe_open(tensors, "pt")]}
        plain = read_json_value(place / "state.json", any_number=True)
        state: dict[str, Any] = _put_tensors(plain, lambda name, sharded: _read(files[sharded], name, mesh))
    return state


def number_in(place: Path, name: str) -> float:
    """A number of the state, such as its step, without reading any tensor. ValueError as in `load`."""
    with _one_error(place):
        plain: Any = read_json_value(place / "state.json", any_number=True)
        return float(dict(plain["dict"])[name])


@contextmanager
def _one_error(place: Path) -> Iterator[None]:
    """Whatever is missing or damaged in a checkpoint is one ValueError, with a way out."""
    try:
        with library_errors("not readable"):
            yield
    except (ValueError, FileNotFoundError) as error:
        raise ValueError(
            f"{place} is no checkpoint of a training, or damaged ({error}). Only the last one is kept: bring it back "
            "from a copy, or begin anew (`paligemma train --no-resume`, or another folder)"
        ) from None


def _set_aside(place: Path) -> None:
    """Takes its name from a checkpoint. Removing takes a moment, and half a checkpoint must not be called one."""
    aside = place.with_name(f"{place.name}.old")
    shutil.rmtree(aside, ignore_errors=True)
    os.replace(place, aside)


def _write(tensors: dict[str, Tensor], path: Path) -> None:
    seen: set[int] = set()
    for name, tensor in tensors.items():
        memory = tensor.untyped_storage().data_ptr()
        if memory in seen:
            tensors[name] = tensor.clone()  # safetensors refuses tensors that share memory
        seen.add(memory)
    try:
        save_file(tensors, path)
    except SafetensorError as error:  # its words for what the system said
        raise OSError(f"{path} could not be written: {error}") from None
    _flush(path)


def _flush(path: Path) -> None:
    """It has to be on the disk before the folder's name says so."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def _files_of_rows(place: Path) -> list[Path]:
    return sorted(path for path in place.glob("rows-*.safetensors") if ROWS.search(path.name))


def _read(files: list[Any], name: str, mesh: Any) -> Tensor:
    """One tensor, whose rows lie one after the other in the files. With a mesh only the rows of this process."""
    if mesh is None and len(files) == 1:
        return files[0].get_tensor(name)
    parts = [file.get_slice(name) for file in files]
    shapes = [part.get_shape() for part in parts]
    if not shapes[0]:  # a single number
        return files[0].get_tensor(name)
    rows = sum(shape[0] for shape in shapes)
    first, end = places_of_own_rows(rows, mesh) if mesh is not None else (0, rows)
    own, before = [], 0
    for part, shape in zip(parts, shapes):
        begin, stop = max(first - before, 0), min(end - before, shape[0])
        if begin < stop:
            own.append(part[begin:stop])
        before += shape[0]
    tensor = torch.cat(own) if own else files[0].get_tensor(name)[:0]
    return from_own_rows(tensor, rows, mesh) if mesh is not None else tensor


def _take_tensors(value: Any, name: str, tensors: dict[str, Tensor], rows: dict[str, Tensor]) -> Any:
    """The same structure with {"tensor": name} in the places of tensors, {"rows": name} in those of sharded ones. Both
    are collected. Int keys become pairs."""
    if isinstance(value, Tensor):
        sharded = is_sharded(value)
        (rows if sharded else tensors)[name] = own_rows(value).detach().cpu().contiguous()
        return {"rows" if sharded else "tensor": name}
    if isinstance(value, dict):
        return {"dict": [[key, _take_tensors(item, f"{name}/{key}", tensors, rows)] for key, item in value.items()]}
    if isinstance(value, (list, tuple)):
        return [_take_tensors(item, f"{name}/{i}", tensors, rows) for i, item in enumerate(value)]
    return value


def _put_tensors(value: Any, read: Any) -> Any:
    if isinstance(value, dict):
        if "dict" not in value:
            ((kind, name),) = value.items()
            return read(name, kind == "rows")
        return {key: _put_tensors(item, read) for key, item in value["dict"]}
    if isinstance(value, list):
        return [_put_tensors(item, read) for item in value]
    return value
