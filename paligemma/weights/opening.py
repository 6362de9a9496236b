"""Opening a checkpoint: which tensors it holds, under our names, and how each is read. No weights are read yet.

    checkpoint = open_checkpoint("paligemma2-3b-mix-224/")
    checkpoint.config, checkpoint.tensors["multi_modal_projector.linear.bias"]     # shape and dtype
    checkpoint.read("multi_modal_projector.linear.bias")

What is unusual:
- *Strict.* What is missing, unexpected, of another shape or not floating point is named, all in one error.
- *No pickle*, ever. And no name in a checkpoint reaches outside its folder.
"""

from __future__ import annotations

import contextlib
import math
import os
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from paligemma.files import read_json
from paligemma.modeling_gemma import PaliGemmaConfig
from paligemma.weights.expected import check_tensors, expected_shapes
from paligemma.weights.extra import NO_EXTRA, Extra, shapes_with_extra
from paligemma.weights.layouts import EMBEDDING, HEAD, POSITIONS, ArrayLayout, bigvision_layout, our_name, prefix_of
from paligemma.weights.npz import NpzReader, npz_parts
from paligemma.weights.published import config_of_arrays
from paligemma.weights.safetensors_file import FLOATS, MappedFile, Shape

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


class Read(Protocol):
    """Reads one tensor by our name, in the dtype of the file.

    mapped: the tensor may stay a view of the file for as long as it lives. Otherwise copy it and drop it soon, since it
    keeps a memory map and an open file of its own.
    """

    def __call__(self, name: str, mapped: bool = False) -> Tensor: ...


@dataclass
class Checkpoint:
    """An opened and checked checkpoint: the names, shapes and dtypes of its tensors, and a way to read each."""

    path: Path
    format: str  # "safetensors" or "npz"
    files: list[Path]
    config: PaliGemmaConfig
    tensors: dict[str, tuple[Shape, torch.dtype]]  # by our names, in the order in which they are read fastest
    read: Read

    @property
    def folder(self) -> Path:
        return self.path if self.path.is_dir() else self.path.parent

    @property
    def dtype(self) -> torch.dtype:
        """That of the embedding, the largest tensor of all."""
        return self.tensors[EMBEDDING][1]


def open_checkpoint(path: str | os.PathLike[str], extra: Extra = NO_EXTRA) -> Checkpoint:
    """Opens a folder, a `.safetensors` file or a big_vision `.npz` (also in `.part` files), and reads headers only.

    extra: parts that are not PaliGemma's own, see `extra.py`; an `.npz` holds none.
    Raises FileNotFoundError or ValueError, naming the file: when there are no weights, when they are pickled, damaged
    or incomplete, or when they are not the weights of the model that the configuration describes.
    """
    path = Path(path)
    if path.is_dir():
        if (path / WEIGHTS).is_file():
            return _open_safetensors(path, [path / WEIGHTS], extra)
        if (path / INDEX).is_file():
            return _open_safetensors(path, files_of_index(path / INDEX), extra)
        archives = _archives(path)
        if len(archives) == 1:
            return _open_npz(path, archives[0])
        if archives:
            names = ", ".join(parts[0].name for parts in archives)
            raise ValueError(f"{path} holds several checkpoints: name one of {names}")
        raise _no_weights(path)
    if parts := npz_parts(path):
        return _open_npz(path, parts)
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file or folder")
    if path.suffix == ".safetensors":
        return _open_safetensors(path, [path], extra)
    raise _no_weights(path)


def _no_weights(path: Path) -> Exception:
    files = sorted(path.iterdir()) if path.is_dir() else [path]
    if ADAPTER_CONFIG in [file.name for file in files]:
        return ValueError(f"{path} holds an adapter, no whole weights: `paligemma merge` makes a checkpoint of it")
    if pickled := [file.name for file in files if file.suffix in PICKLED]:
        return ValueError(
            f"{path} holds pickled weights ({', '.join(pickled[:3])}), which can run any code when they are read: they "
            "are not. Take the safetensors files of the checkpoint, or write them where you trust the file: "
            "transformers' from_pretrained(...).save_pretrained(...)"
        )
    if path.is_file():
        return ValueError(f"{path} is no checkpoint: expected a folder, a .safetensors file or a big_vision .npz")
    if shards := [file.name for file in files if file.suffix == ".safetensors"]:
        return FileNotFoundError(f"{path} has {shards[0]} but neither {WEIGHTS} nor {INDEX}, which says what is where")
    return FileNotFoundError(f"{path} holds no weights: expected {WEIGHTS}, {INDEX} or a big_vision .npz")


# ------------------------------------------------------------------------------------------------ safetensors


def files_of_index(index: Path) -> list[Path]:
    """The shards that an index names, all of them there and in its own folder."""
    try:
        names: list[Any] = sorted(set(read_json(index)["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{index} is not an index of safetensors files ({error!r}): download it again") from None
    files = []
    for name in names:
        # The files themselves may be links that lead out: those of the hub's cache do.
        if not isinstance(name, str) or name in ("", ".", "..") or re.search(r"[/\\:]", name):
            raise ValueError(f"{index} names {name!r}, expected the plain name of a file in its own folder")
        files.append(index.parent / name)
        if not files[-1].is_file():
            raise FileNotFoundError(f"{files[-1]} is missing, and {index.name} says that it holds weights")
    if not files:
        raise ValueError(f"{index} names no files")
    return files


def _open_safetensors(path: Path, files: list[Path], extra: Extra) -> Checkpoint:
    settings: dict[str, Any] = {}
    with contextlib.suppress(ValueError, OSError):  # whatever is wrong with it, the next call says it better
        settings = read_json(files[0].parent / "config.json")
    if settings.get("quantization_config") is not None:
        raise ValueError(
            f"{path} holds quantised weights, which can be run but not changed: start from the checkpoint they were "
            "made of"
        )
    config = PaliGemmaConfig.from_pretrained(files[0].parent)
    place, found, prefix = _tensors_of(path, files)
    if HEAD in found:
        _check_head(path, place, found)
    shapes = {name: shape for name, (shape, _) in found.items()}
    expected, unused = shapes_with_extra(expected_shapes(config), shapes, extra)
    for name in unused:
        del place[name], found[name]
    if HEAD in found:  # still: its dtype is none that is read, which is named with all else that does not fit
        expected[HEAD] = found[HEAD][0]
    check_tensors(str(path), found, expected, _reason(found, expected, config))
    if prefix:
        warnings.warn(f"{path}: the names of its tensors begin with {prefix!r}, which is left out", stacklevel=3)

    def read(name: str, mapped: bool = False) -> Tensor:
        file, key = place[name]
        return file.read(key, apart=not mapped)

    tensors = {name: (shape, dtype) for name, (shape, dtype) in found.items() if isinstance(dtype, torch.dtype)}
    return Checkpoint(path, "safetensors", files, config, tensors, read)


def _tensors_of(
    path: Path, files: list[Path]
) -> tuple[dict[str, tuple[MappedFile, str]], dict[str, tuple[Shape, torch.dtype | str]], str]:
    """By our names: the file of each tensor and its own name there, and its shape and dtype. Also the common prefix."""
    place: dict[str, tuple[MappedFile, str]] = {}
    found: dict[str, tuple[Shape, torch.dtype | str]] = {}
    opened = [MappedFile(file) for file in files]
    prefix = prefix_of(key for file in opened for key in file.tensors)
    for file in opened:
        for key, (shape, kind) in file.tensors.items():
            name = our_name(key.removeprefix(prefix))
            if name in place:
                raise ValueError(f"{path} holds {name} twice, as {place[name][1]} and as {key}")
            place[name] = file, key
            found[name] = shape, FLOATS.get(kind, kind)
    return place, found, prefix


def _check_head(
    path: Path, place: dict[str, tuple[MappedFile, str]], found: dict[str, tuple[Shape, torch.dtype | str]]
) -> None:
    """Drops the output layer, which is the input embedding under another name: ValueError if it is not. It may be the
    only one in the file. One of a dtype that is not read stays."""
    if EMBEDDING not in found:  # some writers drop the other one of two names for one matrix
        place[EMBEDDING], found[EMBEDDING] = place[HEAD], found[HEAD]
    elif isinstance(found[HEAD][1], str):
        return
    elif not isinstance(found[EMBEDDING][1], str) and not _equal(place[HEAD], place[EMBEDDING]):
        raise ValueError(
            f"{path}: {place[HEAD][1]} differs from {place[EMBEDDING][1]}. PaliGemma's output layer is its input "
            "embedding; a checkpoint in which the two were trained apart cannot be loaded. It runs in transformers; "
            "for here train it again with tie_word_embeddings=true, or remove the one of the two that was not trained"
        )
    del place[HEAD], found[HEAD]


def _reason(
    found: Mapping[str, tuple[Shape, torch.dtype | str]], expected: Mapping[str, Shape], config: PaliGemmaConfig
) -> str:
    """Why weights may not fit, as their names and shapes tell: the last line of the error."""
    strange = [name for name in found if name not in expected]
    if any(name.endswith((".scales", ".biases")) for name in strange):
        return (
            "They were quantised by mlx (scales, biases), whose format is not read here: take the checkpoint they were "
            "made of, and quantize='int8' or 'int4'."
        )
    if any(".lora_" in name or ".base_layer." in name for name in strange):
        return "LoRA is still beside its layers: save the adapter alone, or the model after peft's merge_and_unload()."
    shape, there = expected.get(POSITIONS), found.get(POSITIONS, ((), ""))[0]
    if shape and len(there) == 2 and there != shape and there[1] == shape[1]:
        side = math.isqrt(there[0]) * config.vision_config.patch_size
        return (
            f"config.json says image_size {config.vision_config.image_size}, and the weights are those of {side}: "
            f"write {side} there, and ask for another resolution when loading, with image_size= or --image-size."
        )
    return (
        "The download is incomplete, or it is another model's, or a part of the model was changed: then give the part "
        "to load(..., extra={name: module}), see docs/changing.md (convert, merge and quantize know PaliGemma's own "
        "parts alone: save such a model by save_pretrained, in the dtype it was loaded in)."
    )


def _equal(one: tuple[MappedFile, str], other: tuple[MappedFile, str]) -> bool:
    """Whether two matrices on disk are the same, compared a few rows at a time."""
    a, b = (file.read(key, apart=True) for file, key in (one, other))
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    return all(map(torch.equal, a.split(8192), b.split(8192)))


# ------------------------------------------------------------------------------------------------ big_vision .npz


def _archives(folder: Path) -> list[list[Path]]:
    """The archives in a folder that hold a PaliGemma. (A mask codec is an `.npz` too.)"""
    names = {file.name.partition(".npz")[0] for file in folder.iterdir() if ".npz" in file.name}
    archives = []
    for name in sorted(names):
        if parts := npz_parts(folder / f"{name}.npz"):
            with contextlib.closing(NpzReader(parts)) as archive:
                if any(key.startswith("llm/") for key in archive.arrays):
                    archives.append(parts)
    return archives


def _open_npz(path: Path, parts: list[Path]) -> Checkpoint:
    archive = NpzReader(parts)
    folder = parts[0].parent
    if (folder / "config.json").is_file():
        config = PaliGemmaConfig.from_pretrained(folder)
    else:
        config = config_of_arrays(parts[0], {key: shape for key, (shape, _) in archive.arrays.items()})

    # big_vision's embedding has no rows for <image> and for the padding of the vocabulary. Here they are zeros (in
    # transformers' conversion: random, around the mean). No answer ever holds these ids.
    shape, _ = archive.arrays.get("llm/embedder/input_embedding", ((), ""))
    rows = shape[0] if shape else 0
    if not config.image_token_index <= rows <= config.text_config.vocab_size:
        rows = config.text_config.vocab_size
    layout = {array.key: array for array in bigvision_layout(config, rows)}
    training = [key for key in archive.arrays if archive.in_params and key.startswith(("opt/", "chrono/"))]
    arrays = {key: found for key, found in archive.arrays.items() if key not in training}
    check_tensors(str(path), arrays, {key: array.shape for key, array in layout.items()})
    if training:
        warnings.warn(f"{path}: what else training has saved is left out ({training[0]} and the like)", stacklevel=3)

    expected = expected_shapes(config)
    place: dict[str, tuple[ArrayLayout, int | None, int]] = {}  # our name -> array, layer, which of its names
    tensors: dict[str, tuple[Shape, torch.dtype]] = {}
    for key, (_, dtype) in arrays.items():  # in the order of the file
        array = layout[key]
        for i in range(array.layers or 1):
            for j, template in enumerate(array.names):
                name = template.format(i=i)
                place[name] = array, i if array.layers else None, j
                assert isinstance(dtype, torch.dtype)
                tensors[name] = expected[name], dtype
    return Checkpoint(path, "npz", parts, config, tensors, _npz_reader(archive, place, tensors, rows))


def _npz_reader(
    archive: NpzReader,
    place: dict[str, tuple[ArrayLayout, int | None, int]],
    tensors: dict[str, tuple[Shape, torch.dtype]],
    rows: int,
) -> Read:
    """Reads tensors out of the slices that hold them. rows: of the embedding in the file."""
    last: tuple[tuple[str, int | None], Tensor] | None = None

    def read(name: str, mapped: bool = False) -> Tensor:
        nonlocal last
        array, i, j = place[name]
        shape, dtype = tensors[name]
        if name == EMBEDDING:
            out = torch.zeros(shape, dtype=dtype)
            archive.fill(array.key, out[:rows])
            return out
        if last is not None and last[0] == (array.key, i):
            values = last[1]
        else:
            values = torch.empty(array.shape[1:] if array.layers else array.shape, dtype=dtype)
            archive.fill(array.key, values, i)
        # One slice holds keys and values, or gate and up: the second of them is asked for next.
        last = ((array.key, i), values) if len(array.names) > 1 and j == 0 else None
        return array.unpack(values[j] if len(array.names) > 1 else values, shape)

    return read
