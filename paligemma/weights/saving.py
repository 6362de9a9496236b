"""Writing checkpoint folders: a model, or any tensors one after the other.

Saving is all or nothing: everything is written into a hidden folder beside and moved when it is complete.
`save_pretrained` replaces the checkpoint that it is told to replace; `convert` and its like never replace a file by
another.
"""

from __future__ import annotations

import contextlib
import filecmp
import math
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from paligemma.answers.mask_codec import CODEC_FILE
from paligemma.answers.scores import CALIBRATION_FILE, Calibration
from paligemma.arguments import check_model, check_path
from paligemma.files import staging_folder, write_json
from paligemma.modeling_gemma import PaliGemmaConfig, PaliGemmaForConditionalGeneration
from paligemma.tokenizer import TOKENIZERS
from paligemma.weights.expected import check_tensors, expected_shapes
from paligemma.weights.extra import shapes_to_save
from paligemma.weights.opening import ADAPTER_CONFIG, ADAPTER_WEIGHTS, INDEX, WEIGHTS
from paligemma.weights.safetensors_file import Shape
from paligemma.weights.writing import progress_in_bytes, write_safetensors

# Files that belong to a checkpoint and hold no weights of the model: `convert` takes them along.
COMPANIONS = (
    "tokenizer.json tokenizer.model paligemma_tokenizer.model tokenizer_config.json special_tokens_map.json "
    f"added_tokens.json preprocessor_config.json processor_config.json generation_config.json {CODEC_FILE} "
    + CALIBRATION_FILE
).split()


def save_pretrained(
    model: PaliGemmaForConditionalGeneration,
    folder: str | os.PathLike[str],
    processor: Any = None,
    max_shard_size: int = 5 * 10**9,
    extra: Sequence[str] = (),
) -> None:
    """Writes a checkpoint that this project, transformers and what builds on it read: layout H, safetensors, sharded.

    processor: a `PaliGemmaProcessor` (or anything with `save_pretrained(folder)`), whose files are written too.
    max_shard_size: in bytes. extra: the names of parts that are not PaliGemma's own (see `extra.py`), which are to be
    saved with the rest. Other files in the folder are left alone; if anything fails, all of them are.
    Raises OSError when the files cannot be written, ValueError when the model is not as its configuration says.
    """
    check_model(model)
    folder = check_path("folder", folder)
    if processor is not None and not hasattr(processor, "save_pretrained"):
        hint = ": pass its `.processor`" if hasattr(processor, "processor") else ""
        raise TypeError(f"processor is {type(processor).__name__}, expected a PaliGemmaProcessor{hint}")
    state = model.state_dict()
    tensors = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in state.items()}
    if any(tensor.is_meta for tensor in state.values()):
        raise ValueError("the model is spread over devices and is not saved: load it without `device_map`")
    whole = {name: dtype for name, (_, dtype) in tensors.items() if not dtype.is_floating_point}
    if not {torch.int8, torch.uint8}.isdisjoint(whole.values()):
        raise ValueError(
            "the model is quantised and is not saved: load it without `quantize`, or write a quantised checkpoint with "
            "`paligemma quantize`"
        )
    if whole:
        named = ", ".join(f"{name} is {dtype}" for name, dtype in whole.items())
        raise ValueError(
            f"{named}: a checkpoint holds floating point alone. Set the counter of a BatchNorm to None (it needs none "
            "but with momentum=None), and register other buffers with persistent=False, or as floating point"
        )
    hint = "Merge or take out what was added to it first, or name a part that was changed: extra=['name']."
    check_tensors("the model to save", tensors, shapes_to_save(model, expected_shapes(model.config), extra), hint)
    with checkpoint_written_whole(folder) as staging:
        if processor is not None:
            processor.save_pretrained(staging)
        write_config(staging, model.config, model.dtype)
        write_safetensors(staging, list(tensors), tensors, lambda name: state[name].detach(), max_shard_size)


def write_folder(
    folder: Path,
    companions: Sequence[Path],
    tensors: Mapping[str, tuple[Shape, torch.dtype]],
    read: Callable[[str], Tensor],
    write_settings: Callable[[Path], object],
    write_weights: Callable[[Path, Callable[[str], Tensor]], object],
    weights_to_come: str | None = WEIGHTS,
) -> list[Path]:
    """Writes any tensors as a checkpoint folder, each read when its turn has come: all of it, or nothing.

    companions: folders whose tokenizer and the like are taken along, the first's where several have one. tensors: shape
    and dtype of what `read` gives. write_settings writes `config.json` and the like into the folder that it is given,
    write_weights then the tensors, which its second argument reads. weights_to_come: see `check_nothing_lost`; None
    for weights in a file of another kind. Returns the files written. ValueError where a file of other content would be
    replaced.
    """
    total = sum(math.prod(shape) * kind.itemsize for shape, kind in tensors.values())
    with (
        checkpoint_written_whole(folder, replaces=False) as staging,
        progress_in_bytes(f"writing {folder}", total) as advance,
    ):

        def counted(name: str) -> Tensor:
            tensor = read(name)
            advance(tensor.nbytes)
            return tensor

        copy_companions(companions, staging)
        write_settings(staging)
        check_nothing_lost(staging, folder, weights_to_come)  # before gigabytes are written
        write_weights(staging, counted)
        written = names_in(staging)
    return [folder / name for name in written]


# ------------------------------------------------------------------------------------------------ whole


def check_apart(target: Path, sources: Sequence[Path]) -> None:
    """ValueError if a checkpoint is to be written where one lies that it is made of."""
    if target.resolve() in [source.resolve() for source in sources]:
        raise ValueError(f"{target} is where the source lies: choose another folder, so that it stays whole")


def check_nothing_lost(staging: Path, folder: Path, weights_to_come: str | None = None) -> None:
    """ValueError if moving up what lies in `staging` would replace or remove a file of other content in `folder`. The
    same content is no loss: a command may be given twice. weights_to_come: the name of weights that will be written
    later; those in `folder` are compared at the end, when both are there."""
    new = names_in(staging)
    lost = [name for name in new if (folder / name).exists() and not _same(staging / name, folder / name)]
    if weights_to_come is None:
        lost += _outdated(folder, new, replaces=False)
    else:
        lost += [
            name for name in _outdated(folder, [*new, weights_to_come], replaces=False) if not name.startswith("model")
        ]
    if lost:
        where = "the current folder" if folder == Path() else folder
        raise ValueError(
            f"{where} holds {', '.join(lost[:8])}{f' and {len(lost) - 8} more' if len(lost) > 8 else ''} of other "
            "content, which would be lost: choose an empty folder, or move them away"
        )


def _same(one: Path, other: Path) -> bool:
    return other.is_file() and filecmp.cmp(one, other, shallow=False)


def names_in(folder: Path) -> list[str]:
    return sorted(file.name for file in folder.iterdir())


def _outdated(folder: Path, new: Sequence[str], replaces: bool) -> list[str]:
    """Files in the folder that would be taken for a part of the new weights: other weights, those of a whole model and
    those of an adapter, with their settings and their calibration.

    Where nothing is replaced, a mask codec that was put beside the same weights stays."""
    if not {WEIGHTS, INDEX, ADAPTER_WEIGHTS}.intersection(new):
        return []
    there = names_in(folder)
    old = {name for name in there if re.fullmatch(r"model(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?", name)}
    if old:
        old.add("config.json")  # of a quantised model it says so, and an adapter in its place would be taken for one
    old |= {ADAPTER_CONFIG, ADAPTER_WEIGHTS, CALIBRATION_FILE}
    if replaces and "preprocessor_config.json" in new:  # with its processor comes its own mask codec, if it has one
        old.add(CODEC_FILE)
    return [name for name in there if name in old and name not in new]


def copy_companions(folders: Sequence[Path], staging: Path) -> None:
    """Takes tokenizer and the like along, of the first folder that has a file. ValueError for a calibration that could
    not be read."""
    # An adapter's tokenizer.model beside its base's tokenizer.json would not be read any more.
    of_tokenizer = [folder for folder in folders if any((folder / name).is_file() for name in TOKENIZERS)][:1]
    for name in COMPANIONS:
        where = of_tokenizer if name in TOKENIZERS else folders
        if name == CALIBRATION_FILE:
            where = folders[:1]  # it is of the weights it lies beside: that of an adapter's base is of others
        if found := next((folder / name for folder in where if (folder / name).is_file()), None):
            if name == CALIBRATION_FILE:
                Calibration.load(found)
            shutil.copyfile(found, staging / name)


@contextlib.contextmanager
def checkpoint_written_whole(folder: Path, replaces: bool = True) -> Iterator[Path]:
    """A place inside `folder` to write into. What lies there at the end is moved up; after an error nothing is.

    replaces: whether files of the same names, and other weights, make room for it; False: ValueError instead.
    """
    with staging_folder(folder) as staging:
        try:
            yield staging
        except OSError as error:
            # An error while a file is copied names both files.
            named = [Path(name).resolve() for name in (error.filename, error.filename2) if isinstance(name, str)]
            if named and not any(name.is_relative_to(staging.resolve()) for name in named):
                raise  # it is of a file that is read
            said = f"{folder} could not be written ({error.strerror or error}); what was there is untouched"
            raise (OSError(said) if error.errno is None else OSError(error.errno, said)) from error
        if not replaces:
            check_nothing_lost(staging, folder)
        _move_up(staging, folder, replaces)


def _move_up(staging: Path, folder: Path, replaces: bool) -> None:
    """Replaces the files of a checkpoint. The index goes first and comes last, so that being killed in between leaves
    a checkpoint that says it is incomplete, never one that mixes old shards and new."""
    new = sorted(names_in(staging), key=lambda name: name == INDEX)
    old = _outdated(folder, new, replaces)
    if INDEX in (*new, *old):
        (folder / INDEX).unlink(missing_ok=True)
    for name in new:
        os.replace(staging / name, folder / name)
    for name in old:
        (folder / name).unlink(missing_ok=True)


def write_config(folder: Path, config: PaliGemmaConfig, dtype: torch.dtype) -> None:
    content = {**config.to_dict(), "torch_dtype": str(dtype).removeprefix("torch.")}
    write_json(folder / "config.json", content)
