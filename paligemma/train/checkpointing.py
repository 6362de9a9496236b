"""Training state on disk: whole or not there at all.

    save(folder, step, state)      # folder/step-00001200/ ; older ones are removed
    state = load_last(folder)      # None if there is none

`state` is nested dicts and lists of tensors and plain values, such as a model's and an optimizer's `state_dict()`.
Tensors go to `tensors.safetensors`, the rest with their names to `state.json`: no pickle. A checkpoint is written
into a folder beside its place and renamed when it is complete, so a run that is killed at any moment leaves its last
good checkpoint and at most one `.part`.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

NAME = re.compile(r"step-(\d+)$")


def save(folder: Path, step: int, state: dict[str, Any], keep: int = 1) -> Path:
    """Write `folder/step-N` and remove all but the newest `keep`."""
    folder.mkdir(parents=True, exist_ok=True)
    place, beside = folder / f"step-{step:08d}", folder / f"step-{step:08d}.part"
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir()
    tensors: dict[str, Tensor] = {}
    plain = _take_tensors(state, "", tensors)
    save_file(tensors, beside / "tensors.safetensors")
    (beside / "state.json").write_text(json.dumps(plain))
    for path in beside.iterdir():  # on the disk before the name says so
        with open(path, "rb") as file:
            os.fsync(file.fileno())
    shutil.rmtree(place, ignore_errors=True)  # the same step saved again: after a resume that had lost its successors
    os.replace(beside, place)
    for old in checkpoints(folder)[:-keep]:
        shutil.rmtree(old, ignore_errors=True)
    return place


def checkpoints(folder: Path) -> list[Path]:
    """The complete checkpoints of a run, oldest first."""
    return sorted(path for path in folder.glob("step-*") if NAME.search(path.name))


def load_last(folder: Path) -> dict[str, Any] | None:
    """The state in the newest checkpoint, or None."""
    found = checkpoints(folder)
    return load(found[-1]) if found else None


def load(place: Path) -> dict[str, Any]:
    tensors = load_file(place / "tensors.safetensors")
    return _put_tensors(json.loads((place / "state.json").read_text()), tensors)


def _take_tensors(value: Any, name: str, tensors: dict[str, Tensor]) -> Any:
    """The same structure with {"tensor": name} in the places of tensors, which are collected. Int keys become pairs."""
    if isinstance(value, Tensor):
        tensors[name] = value.detach().cpu().contiguous().clone()  # safetensors refuses tensors that share memory
        return {"tensor": name}
    if isinstance(value, dict):
        return {"dict": [[key, _take_tensors(item, f"{name}/{key}", tensors)] for key, item in value.items()]}
    if isinstance(value, (list, tuple)):
        return [_take_tensors(item, f"{name}/{i}", tensors) for i, item in enumerate(value)]
    return value


def _put_tensors(value: Any, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, dict):
        if "tensor" in value:
            return tensors[value["tensor"]]
        return {key: _put_tensors(item, tensors) for key, item in value["dict"]}
    if isinstance(value, list):
        return [_put_tensors(item, tensors) for item in value]
    return value
