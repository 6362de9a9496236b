"""Checkpoints with rounded weights, on disk and while loading.

    quantize_checkpoint("official/", "small/", "int8")   writes a folder, tensor by tensor; "int4" likewise
    open_quantized(Path("small/")).load()                a model whose weights are views of these files
    load_quantizing(checkpoint, "int8")                  the same model of an ordinary checkpoint, rounded while read

A rounded weight is stored as the tensors that its layer holds: `q_proj.weight` (whole numbers) and `q_proj.scale`, in 4
bits also `q_proj.steps`; the embedding's are `embed_tokens.head.weight` and `.scale`. All else keeps its name and is
floating point. `config.json` has a `quantization_config` with the mode. `fast/rounding.py` says what the numbers mean.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from paligemma.fast.rounding import GROUP
from paligemma.fast.swap import (
    STORED,
    check_compute_dtype,
    put_rounded,
    round_weight,
    rounded_kinds,
    rounded_names,
    rounded_shapes,
    use_fast_layers,
)
from paligemma.files import read_json, write_json
from paligemma.modeling_gemma import PaliGemmaConfig, PaliGemmaForConditionalGeneration
from paligemma.weights.expected import check_tensors, empty_model, expected_shapes
from paligemma.weights.layouts import POSITIONS
from paligemma.weights.loading import (
    at_image_size,
    config_at_image_size,
    default_dtype,
    parse_dtype,
    resample_positions,
)
from paligemma.weights.opening import INDEX, WEIGHTS, Checkpoint, files_of_index, open_checkpoint
from paligemma.weights.safetensors_file import DTYPES, MappedFile, Shape
from paligemma.weights.saving import check_apart, write_folder
from paligemma.weights.writing import write_safetensors

QUANT_METHOD = "paligemma"  # in `quantization_config` of config.json


def stored_tensors(config: PaliGemmaConfig, mode: str, dtype: torch.dtype) -> dict[str, tuple[Shape, torch.dtype]]:
    """Name, shape and dtype of every tensor of a quantised checkpoint, in the order in which it is written."""
    layers = rounded_kinds(empty_model(config), mode)
    stored: dict[str, tuple[Shape, torch.dtype]] = {}
    for name, shape in expected_shapes(config).items():
        kind = layers.get(module := name.removesuffix(".weight"))
        if kind is None:
            stored[name] = shape, dtype
        else:
            stored.update(zip(rounded_names(module, kind), rounded_shapes(shape, kind)))
    return stored


def rounded_reader(checkpoint: Checkpoint, mode: str, dtype: torch.dtype) -> Callable[[str], Tensor]:
    """A function that reads the tensors of `stored_tensors` by name. It rounds those of a checkpoint when asked for."""
    layers = rounded_kinds(empty_model(checkpoint.config), mode)
    source = {part: (name, kind) for name, kind in layers.items() for part in rounded_names(name, kind)}
    kept: dict[str, Tensor] = {}  # the other tensors of the weight just rounded, which are asked for next

    def read(name: str) -> Tensor:
        if name in kept:
            return kept.pop(name)
        if name not in source:
            return checkpoint.read(name, mapped=checkpoint.tensors[name][1] == dtype).to(dtype)
        module, kind = source[name]
        parts = rounded_names(module, kind)
        rounded = dict(zip(parts, round_weight(module, checkpoint.read(f"{module}.weight"), kind)))
        kept.clear()
        kept.update({part: tensor for part, tensor in rounded.items() if part != name})
        return rounded[name]

    return read


def quantize_checkpoint(
    source: Checkpoint | QuantizedCheckpoint | str | os.PathLike[str],
    target: str | os.PathLike[str],
    mode: str,
    dtype: torch.dtype | str | None = None,
    max_shard_size: int = 5 * 10**9,
    folders: Sequence[Path] = (),
) -> list[Path]:
    """Writes a quantised checkpoint into a folder, tensor by tensor. Loading it only maps its files into memory.

    source: a folder, a `.safetensors` file, a big_vision `.npz`, or one of these opened. mode: "int8" or "int4".
    dtype: of what is not rounded; default bfloat16 for the published sizes, the checkpoint's own for all others.
    folders: searched in this order for the tokenizer and other files to copy; default the source's own.
    Only one matrix is in memory at a time, before and after rounding. If anything fails, the folder is as it was.
    Returns the files written. Raises ValueError and OSError as `open_checkpoint` and `convert` do.
    """
    if mode not in STORED:
        raise ValueError(f"mode is {mode!r}, expected {' or '.join(STORED)}: the others change nothing on disk")
    if isinstance(source, QuantizedCheckpoint):
        raise ValueError(f"{source.folder} is quantised already: start from the checkpoint that it was made of")
    checkpoint, folder = source if isinstance(source, Checkpoint) else open_checkpoint(source), Path(target)
    folders = folders or [checkpoint.folder]
    check_apart(folder, [checkpoint.folder, *folders])
    kept = parse_dtype(dtype) or default_dtype(checkpoint)
    check_compute_dtype(mode, kept)
    settings = {
        **checkpoint.config.to_dict(),
        "torch_dtype": str(kept).removeprefix("torch."),
        "quantization_config": {"quant_method": QUANT_METHOD, "mode": mode, "group_size": GROUP},
    }
    stored = stored_tensors(checkpoint.config, mode, kept)
    return write_folder(
        folder,
        folders,
        stored,
        rounded_reader(checkpoint, mode, kept),
        lambda staging: write_json(staging / "config.json", settings),
        lambda staging, read: write_safetensors(staging, list(stored), stored, read, max_shard_size),
    )


def load_quantizing(
    checkpoint: Checkpoint, mode: str, dtype: torch.dtype | str | None = None, image_size: int | None = None
) -> PaliGemmaForConditionalGeneration:
    """A checkpoint -> the quantised model. Each matrix is rounded as soon as it is read. mode: "int8" or "int4".

    dtype, image_size: as for `load_model`.
    """
    if image_size is not None:
        checkpoint = at_image_size(checkpoint, image_size)
    kept = parse_dtype(dtype) or default_dtype(checkpoint)
    check_compute_dtype(mode, kept)
    names = stored_tensors(checkpoint.config, mode, kept)
    return _assemble(checkpoint.config, mode, kept, names, rounded_reader(checkpoint, mode, kept))


def stored_mode(path: Path) -> str | None:
    """The mode of a quantised checkpoint of ours, None for all others. ValueError if another program quantised it."""
    folder = path if path.is_dir() else path.parent
    try:
        given = read_json(folder / "config.json").get("quantization_config")
    except (OSError, ValueError):
        return None  # `open_checkpoint` says what is wrong with it
    if given is None:
        return None
    method = given.get("quant_method") if isinstance(given, dict) else given
    if method != QUANT_METHOD:
        raise ValueError(
            f"{folder} holds weights that were quantised by {method!r}, whose format is not read here: take the "
            "checkpoint they were made of, and `--quantize int8`"
        )
    mode, group = given.get("mode"), given.get("group_size")
    if mode not in STORED or group != GROUP:
        raise ValueError(
            f"{folder / 'config.json'}: quantization_config has mode {mode!r} and group_size {group!r}, expected "
            f"{' or '.join(STORED)} and {GROUP}: write it anew with `paligemma quantize`"
        )
    return str(mode)


@dataclass
class QuantizedCheckpoint:
    """An opened and checked checkpoint with rounded weights. It can be loaded, and nothing else.

    file_of: the file that each tensor is in, by the tensor's name.
    """

    folder: Path
    config: PaliGemmaConfig
    mode: str
    dtype: torch.dtype
    file_of: dict[str, Path]

    def load(
        self,
        mode: str | None = None,
        dtype: torch.dtype | str | None = None,
        image_size: int | None = None,
        device: torch.device | str = "cpu",
    ) -> PaliGemmaForConditionalGeneration:
        """The model, in evaluation mode. Its weights are views of the files and are read when they are first used.

        mode: the requested one; ValueError if the files hold another. dtype, image_size: as for `load_model`. device:
        ValueError for any but the CPU.
        """
        if mode not in (None, self.mode):
            raise ValueError(f"{self.folder} holds {self.mode} weights, not {mode}: leave out `quantize`")
        if torch.device(device).type != "cpu":
            raise ValueError(
                f"{self.folder} holds {self.mode} weights, which are for the CPU, not for {device}: choose the device "
                "cpu, or the checkpoint that they were made of"
            )
        kept, config = parse_dtype(dtype) or self.dtype, self.config
        check_compute_dtype(self.mode, kept)
        if image_size is not None:
            config = config_at_image_size(config, image_size)
        maps = {file: MappedFile(file) for file in set(self.file_of.values())}
        not_rounded = expected_shapes(config)

        def read(name: str) -> Tensor:
            tensor = maps[self.file_of[name]].read(name)
            if name == POSITIONS and image_size is not None:
                tensor = resample_positions(tensor, config.vision_config.num_patches).to(tensor.dtype)
            return tensor.to(kept) if name in not_rounded and tensor.is_floating_point() else tensor

        return _assemble(config, self.mode, kept, list(self.file_of), read)


def open_quantized(path: Path) -> QuantizedCheckpoint:
    """Opens a folder that `quantize_checkpoint` wrote, and reads headers only.

    Raises ValueError or FileNotFoundError, which names everything that does not fit at once.
    """
    folder = path if path.is_dir() else path.parent
    config, mode = _config_of(folder), stored_mode(folder)
    assert mode is not None
    files = [folder / WEIGHTS]
    if not files[0].is_file() and (folder / INDEX).is_file():
        files = files_of_index(folder / INDEX)
    if not files[0].is_file():
        raise FileNotFoundError(f"{folder} holds no weights: expected {WEIGHTS} or {INDEX}")
    file_of: dict[str, Path] = {}
    found: dict[str, tuple[Shape, torch.dtype | str]] = {}
    for file in files:
        for name, (shape, code) in MappedFile(file).tensors.items():
            if name in file_of:
                raise ValueError(f"{folder} holds {name} twice, in {file_of[name].name} and in {file.name}")
            file_of[name] = file
            found[name] = shape, DTYPES.get(code, code)
    norm = found.get("language_model.model.norm.weight", ((), torch.bfloat16))[1]
    dtype = norm if isinstance(norm, torch.dtype) and norm.is_floating_point else torch.bfloat16
    expected = stored_tensors(config, mode, dtype)
    check_tensors(str(folder), found, {name: shape for name, (shape, _) in expected.items()})
    for name, (_, kind) in expected.items():
        if found[name][1] != kind:
            raise ValueError(f"{folder}: {name} is {found[name][1]}, expected {kind}: write it anew")
    return QuantizedCheckpoint(folder, config, mode, dtype, {name: file_of[name] for name in expected})


def _config_of(folder: Path) -> PaliGemmaConfig:
    settings = read_json(folder / "config.json")
    del settings["quantization_config"]  # `stored_mode` has read it; the model's configuration has no such key
    try:
        return PaliGemmaConfig.from_dict(settings)
    except ValueError as error:
        raise ValueError(f"{folder / 'config.json'}: {error}") from None


def _assemble(
    config: PaliGemmaConfig, mode: str, dtype: torch.dtype, names: Iterable[str], read: Callable[[str], Tensor]
) -> PaliGemmaForConditionalGeneration:
    """The quantised model: built on the meta device, then filled with one tensor after the other."""
    model, shapes = empty_model(config), expected_shapes(config)
    for name, kind in rounded_kinds(model, mode).items():
        shape = shapes[f"{name}.weight"]
        parts = [torch.empty(size, dtype=kept, device="meta") for size, kept in rounded_shapes(shape, kind)]
        put_rounded(model, name, kind, parts, dtype)
    use_fast_layers(model)
    for name in names:
        parent, _, leaf = name.rpartition(".")
        module, tensor = model.get_submodule(parent), read(name)
        if leaf in module._parameters:
            setattr(module, leaf, nn.Parameter(tensor, requires_grad=False))
        else:
            setattr(module, leaf, tensor)
    return model.eval()
