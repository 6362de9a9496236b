"""Weights on disk: every published layout in, two formats out, one tensor at a time.

    layout H   vision_tower.vision_model.*   language_model.model.*          what the hub has, and what we write
    layout W   vision_tower.*                language_model.model.*          what transformers 5 writes
    layout N   model.vision_tower.*          model.language_model.*          a state_dict of transformers 5
               model.vision_tower.vision_model.*   model.language_model.*    the same of transformers 4.52
    .npz       img/Transformer/...           llm/layers/...                  big_vision, all layers in one array

Our parameter names are those of layout H, so three of the four need only their names changed (`our_name`). The `.npz`
stacks the layers and transposes the matrices; `bigvision_table` says how, for both directions.

What is unusual:
- *Nothing is held twice.* The model is built without memory (the meta device) and its tensors are put in one by one.
  A safetensors file is memory-mapped (`mapped.py`): a tensor that keeps its dtype stays a view of the file and costs
  memory when it is first used. The map is private, so training in place changes the copy in memory and never the file.
  A tensor that changes its dtype gets a map of its own, which goes away with it.
- *Strict.* What is missing, unexpected, of another shape or not floating point is named, all in one error.
- *No pickle*, ever. And no name in a checkpoint reaches outside its folder.
- *Saving is all or nothing.* Everything is written into a folder beside and moved when it is complete. `convert` and
  its like never replace a file by another; `save_pretrained` replaces the checkpoint that it is told to replace.
"""

from __future__ import annotations

import contextlib
import filecmp
import json
import math
import os
import re
import shutil
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from torch import Tensor, nn

from paligemma.devices import on_meta_device
from paligemma.files import read_json, staging_folder, write_json
from paligemma.modeling_gemma import GemmaConfig, PaliGemmaConfig, PaliGemmaForConditionalGeneration
from paligemma.modeling_siglip import SiglipVisionConfig
from paligemma.processing_paligemma import PaliGemmaProcessor
from paligemma.tokenizer import load_tokenizer
from paligemma.weights.npz import NPY_DTYPES, NpzReader, damaged, npz_parts
from paligemma.weights.safetensors_file import DTYPES as SAFETENSORS_DTYPES
from paligemma.weights.safetensors_file import FLOATS, MappedFile, Shape

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
# Files that belong to a checkpoint and hold no weights of the model: `convert` takes them along.
COMPANIONS = (
    "tokenizer.json tokenizer.model tokenizer_config.json special_tokens_map.json added_tokens.json "
    "preprocessor_config.json processor_config.json generation_config.json mask_codec.npz"
).split()

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def parse_dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    """A torch.dtype or its name. Raises ValueError for anything but bfloat16, float16 and float32."""
    found = DTYPES.get(dtype) if isinstance(dtype, str) else dtype
    if dtype is not None and found not in DTYPES.values():
        raise ValueError(f"dtype is {dtype!r}, expected one of {', '.join(DTYPES)}")
    return found


# ------------------------------------------------------------------------------------------------ published sizes


def _gemma2(hidden: int, intermediate: int, layers: int, heads: int, kv_heads: int, **others: Any) -> GemmaConfig:
    sizes: dict[str, Any] = {"hidden_size": hidden, "intermediate_size": intermediate, "num_hidden_layers": layers}
    sizes |= {"num_attention_heads": heads, "num_key_value_heads": kv_heads, "vocab_size": 257216}
    return GemmaConfig.from_dict({"model_type": "gemma2", **sizes, **others})


PUBLISHED = {
    "paligemma-3b": GemmaConfig(),
    "paligemma2-3b": _gemma2(2304, 9216, 26, 8, 4),
    "paligemma2-10b": _gemma2(3584, 14336, 42, 16, 8),
    "paligemma2-28b": _gemma2(4608, 36864, 46, 32, 16, head_dim=128, query_pre_attn_scalar=4608 / 32),
}


def published_config(name: str, image_size: int) -> PaliGemmaConfig:
    """The configuration of a published size ("paligemma2-3b") at 224, 448 or 896 pixels."""
    return PaliGemmaConfig(text_config=PUBLISHED[name], vision_config=SiglipVisionConfig(image_size=image_size))


def published_name(config: PaliGemmaConfig) -> str | None:
    """The published size that a configuration has, whatever its resolution and vocabulary; None for all others."""
    for name, text in PUBLISHED.items():
        if _sizes(config.text_config, config.vision_config) == _sizes(text, SiglipVisionConfig()):
            return name
    return None


def _sizes(text: GemmaConfig, vision: SiglipVisionConfig) -> tuple[object, ...]:
    mouth = (text.model_type, text.hidden_size, text.intermediate_size, text.num_hidden_layers)
    heads = (text.num_attention_heads, text.num_key_value_heads, text.head_dim, vision.num_attention_heads)
    eye = (vision.hidden_size, vision.intermediate_size, vision.num_hidden_layers, vision.patch_size)
    return mouth + heads + eye


def empty_model(config: PaliGemmaConfig) -> PaliGemmaForConditionalGeneration:
    """The model without memory for its weights: every parameter is on the meta device."""
    with on_meta_device():
        return PaliGemmaForConditionalGeneration(config)


def expected_shapes(config: PaliGemmaConfig) -> dict[str, Shape]:
    """Name and shape of every tensor that a checkpoint of this configuration holds."""
    return {name: tuple(tensor.shape) for name, tensor in empty_model(config).state_dict().items()}


# ------------------------------------------------------------------------------------------------ names

EMBEDDING = "language_model.model.embed_tokens.weight"
HEAD = "language_model.lm_head.weight"  # in no model of ours: it is the embedding
POSITIONS = "vision_tower.vision_model.embeddings.position_embedding.weight"


def our_name(key: str) -> str:
    """The name in any published layout -> the name in layout H, which is ours."""
    name = key.removeprefix("model.")
    if name == "lm_head.weight":
        return HEAD
    for tower, inner in (("vision_tower.", "vision_model."), ("language_model.", "model.")):
        if name.startswith(tower) and not name.startswith((tower + inner, HEAD)):
            name = tower + inner + name.removeprefix(tower)
    return name


def check_tensors(
    where: str,
    found: Mapping[str, tuple[Shape, torch.dtype | str]],
    expected: dict[str, Shape],
    hint: str = "The download is incomplete, or it is another model's.",
    listed: int = 8,
) -> None:
    """One ValueError with all that keeps these tensors from being these parameters, by name."""
    problems = {
        "missing": [name for name in expected if name not in found],
        "unexpected": [name for name in found if name not in expected],
        "of another shape": [
            f"{name} is {list(shape)}, expected {list(expected[name])}"
            for name, (shape, _) in found.items()
            if name in expected and shape != expected[name]
        ],
        "not floating point": [
            f"{name} is {dtype}" for name, (_, dtype) in found.items() if name in expected and isinstance(dtype, str)
        ],
    }
    lines = []
    for problem, names in problems.items():
        if names:
            more = f" and {len(names) - listed} more" if len(names) > listed else ""
            lines.append(f"\n  {len(names)} {problem}: {', '.join(names[:listed])}{more}")
    if lines:
        raise ValueError(
            f"{where}: these weights are not those of the model that its configuration describes"
            f" ({len(expected)} tensors).{''.join(lines)}\n{hint}"
        )


# ------------------------------------------------------------------------------------------------ opening


class Read(Protocol):
    """Reads one tensor by our name, in the dtype of the file. `mapped`: it may stay a view of the file for good. Else
    copy it and forget it: as long as it is there, it holds a map and an open file of its own."""

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


def open_checkpoint(path: str | os.PathLike[str]) -> Checkpoint:
    """Opens a folder, a `.safetensors` file or a big_vision `.npz` (also in `.part` files), and reads headers only.

    Raises FileNotFoundError or ValueError, naming the file: when there are no weights, when they are pickled, damaged
    or incomplete, or when they are not the weights of the model that the configuration describes.
    """
    path = Path(path)
    if path.is_dir():
        if (path / WEIGHTS).is_file():
            return _open_safetensors(path, [path / WEIGHTS])
        if (path / INDEX).is_file():
            return _open_safetensors(path, files_of_index(path / INDEX))
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
        return _open_safetensors(path, [path])
    raise _no_weights(path)


def _no_weights(path: Path) -> Exception:
    files = sorted(path.iterdir()) if path.is_dir() else [path]
    if "adapter_config.json" in [file.name for file in files]:
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


def _open_safetensors(path: Path, files: list[Path]) -> Checkpoint:
    settings: dict[str, Any] = {}
    with contextlib.suppress(ValueError, OSError):  # whatever is wrong with it, the next call says it better
        settings = read_json(files[0].parent / "config.json")
    if settings.get("quantization_config") is not None:
        raise ValueError(
            f"{path} holds quantised weights, which can be run but not changed: start from the checkpoint they were "
            "made of"
        )
    config = PaliGemmaConfig.from_pretrained(files[0].parent)
    place: dict[str, tuple[Path, str]] = {}  # our name -> file and its own name there
    found: dict[str, tuple[Shape, torch.dtype | str]] = {}
    for file in files:
        try:
            tensors_of_file = MappedFile(file).tensors
        except SafetensorError as error:
            raise damaged(file, error) from None
        for key, (shape, kind) in tensors_of_file.items():
            name = our_name(key)
            if name in place:
                raise ValueError(f"{path} holds {name} twice, as {place[name][1]} and as {key}")
            place[name] = file, key
            found[name] = shape, FLOATS.get(kind, kind)

    if HEAD in found:
        if EMBEDDING not in found:  # some writers drop the other one of two names for one matrix
            place[EMBEDDING], found[EMBEDDING] = place[HEAD], found[HEAD]
        elif _are_numbers(found[HEAD], found[EMBEDDING]) and not _equal(place[HEAD], place[EMBEDDING]):
            raise ValueError(
                f"{path}: {place[HEAD][1]} differs from {place[EMBEDDING][1]}. PaliGemma's output layer is its input "
                "embedding; a checkpoint in which the two were trained apart cannot be loaded"
            )
        del place[HEAD], found[HEAD]
    check_tensors(str(path), found, expected_shapes(config))

    maps: dict[Path, MappedFile] = {}

    def read(name: str, mapped: bool = False) -> Tensor:
        file, key = place[name]
        if not mapped:
            return MappedFile(file).read(key)  # a map of its own: the pages it touched go with the tensor
        if file not in maps:  # one map per file, shared by all of its tensors
            maps[file] = MappedFile(file)
        return maps[file].read(key)

    tensors = {name: (shape, dtype) for name, (shape, dtype) in found.items() if isinstance(dtype, torch.dtype)}
    return Checkpoint(path, "safetensors", files, config, tensors, read)


def _are_numbers(*found: tuple[Shape, torch.dtype | str]) -> bool:
    """Whether all are of a dtype that is read here. Others are named later, with all else that does not fit."""
    return all(isinstance(dtype, torch.dtype) for _, dtype in found)


def _equal(one: tuple[Path, str], other: tuple[Path, str], rows: int = 8192) -> bool:
    """Whether two matrices on disk are the same, compared a few rows at a time."""
    a, b = MappedFile(one[0]).read(one[1]), MappedFile(other[0]).read(other[1])
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    return all(map(torch.equal, a.split(rows), b.split(rows)))


# ------------------------------------------------------------------------------------------------ big_vision .npz


@dataclass(frozen=True)
class Row:
    """How one array of an `.npz` becomes tensors of ours.

    The array is [layers, len(names), *item], without the axes that would be 1. Each item, with its axes reordered and
    then flattened to the shape of the parameter, is one tensor. Read backwards it makes the array.
    """

    key: str
    names: tuple[str, ...]  # "{i}" is the layer
    item: Shape
    axes: Shape = ()  # () keeps the order
    layers: int = 0  # 0: not stacked

    @property
    def shape(self) -> Shape:
        return (
            *((self.layers,) if self.layers else ()),
            *((len(self.names),) if len(self.names) > 1 else ()),
            *self.item,
        )

    def unpack(self, item: Tensor, shape: Shape) -> Tensor:
        axes = self.axes or tuple(range(item.ndim))
        tensor = torch.empty(shape, dtype=item.dtype)  # its own memory, so that nothing keeps the whole slice alive
        tensor.view([item.shape[axis] for axis in axes]).copy_(item.permute(axes))
        return tensor

    def pack(self, tensor: Tensor) -> Tensor:
        axes = self.axes or tuple(range(len(self.item)))
        reordered = tensor.reshape([self.item[axis] for axis in axes])
        return reordered.permute([axes.index(axis) for axis in range(len(axes))])


def bigvision_table(config: PaliGemmaConfig, embedding_rows: int) -> list[Row]:
    """Every array of big_vision's `.npz` for a configuration.

    Source: big_vision models/vit.py and models/ppp/gemma.py; the names of the norms differ between Gemma 1 and 2.
    """
    vision, text = config.vision_config, config.text_config
    d, f, h = vision.hidden_size, vision.intermediate_size, vision.num_attention_heads
    D, M, E = text.hidden_size, text.intermediate_size, text.head_dim  # M: width of the MLP
    H, K = text.num_attention_heads, text.num_key_value_heads
    patch, turn = vision.patch_size, (1, 0)

    eye = "vision_tower.vision_model."
    rows = [
        Row("img/embedding/kernel", (eye + "embeddings.patch_embedding.weight",), (patch, patch, 3, d), (3, 2, 0, 1)),
        Row("img/embedding/bias", (eye + "embeddings.patch_embedding.bias",), (d,)),
        Row("img/pos_embedding", (POSITIONS,), (1, vision.num_patches, d)),
        Row("img/Transformer/encoder_norm/scale", (eye + "post_layernorm.weight",), (d,)),
        Row("img/Transformer/encoder_norm/bias", (eye + "post_layernorm.bias",), (d,)),
        Row("img/head/kernel", ("multi_modal_projector.linear.weight",), (d, D), turn),
        Row("img/head/bias", ("multi_modal_projector.linear.bias",), (D,)),
    ]
    block, layer, L = "img/Transformer/encoderblock/", eye + "encoder.layers.{i}.", vision.num_hidden_layers
    for theirs, ours in (("LayerNorm_0", "layer_norm1"), ("LayerNorm_1", "layer_norm2")):
        rows += [
            Row(f"{block}{theirs}/scale", (f"{layer}{ours}.weight",), (d,), layers=L),
            Row(f"{block}{theirs}/bias", (f"{layer}{ours}.bias",), (d,), layers=L),
        ]
    attention = block + "MultiHeadDotProductAttention_0/"
    for theirs, ours in (("query", "q_proj"), ("key", "k_proj"), ("value", "v_proj")):
        linear = f"{layer}self_attn.{ours}"
        rows += [
            Row(f"{attention}{theirs}/kernel", (f"{linear}.weight",), (d, h, d // h), (1, 2, 0), L),
            Row(f"{attention}{theirs}/bias", (f"{linear}.bias",), (h, d // h), layers=L),
        ]
    rows += [
        Row(f"{attention}out/kernel", (f"{layer}self_attn.out_proj.weight",), (h, d // h, d), (2, 0, 1), L),
        Row(f"{attention}out/bias", (f"{layer}self_attn.out_proj.bias",), (d,), layers=L),
        Row(f"{block}MlpBlock_0/Dense_0/kernel", (f"{layer}mlp.fc1.weight",), (d, f), turn, L),
        Row(f"{block}MlpBlock_0/Dense_0/bias", (f"{layer}mlp.fc1.bias",), (f,), layers=L),
        Row(f"{block}MlpBlock_0/Dense_1/kernel", (f"{layer}mlp.fc2.weight",), (f, d), turn, L),
        Row(f"{block}MlpBlock_0/Dense_1/bias", (f"{layer}mlp.fc2.bias",), (d,), layers=L),
    ]

    block, layer, L = "llm/layers/", "language_model.model.layers.{i}.", text.num_hidden_layers
    keys_values = (f"{layer}self_attn.k_proj.weight", f"{layer}self_attn.v_proj.weight")
    gate_up = (f"{layer}mlp.gate_proj.weight", f"{layer}mlp.up_proj.weight")
    rows += [
        Row("llm/embedder/input_embedding", (EMBEDDING,), (embedding_rows, D)),
        Row("llm/final_norm/scale", ("language_model.model.norm.weight",), (D,)),
        Row(f"{block}attn/q_einsum/w", (f"{layer}self_attn.q_proj.weight",), (H, D, E), (0, 2, 1), L),
        Row(f"{block}attn/kv_einsum/w", keys_values, (K, D, E), (0, 2, 1), L),
        Row(f"{block}attn/attn_vec_einsum/w", (f"{layer}self_attn.o_proj.weight",), (H, E, D), (2, 0, 1), L),
        Row(f"{block}mlp/gating_einsum", gate_up, (D, M), turn, L),
        Row(f"{block}mlp/linear", (f"{layer}mlp.down_proj.weight",), (M, D), turn, L),
    ]
    norms = {"pre_attention_norm": "input_layernorm", "pre_ffw_norm": "post_attention_layernorm"}
    if text.model_type == "gemma2":
        norms |= {"pre_ffw_norm": "pre_feedforward_layernorm", "post_ffw_norm": "post_feedforward_layernorm"}
        norms |= {"post_attention_norm": "post_attention_layernorm"}
    rows += [
        Row(f"{block}{theirs}/scale", (f"{layer}{ours}.weight",), (D,), layers=L) for theirs, ours in norms.items()
    ]
    return rows


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
        config = _config_from_arrays(parts[0], {key: shape for key, (shape, _) in archive.arrays.items()})

    # big_vision's embedding has no rows for <image> and for the padding of the vocabulary. Here they are zeros (in
    # transformers' conversion: random, around the mean). No answer ever holds these ids.
    expected = expected_shapes(config)
    shape, _ = archive.arrays.get("llm/embedder/input_embedding", ((), ""))
    rows = shape[0] if shape else 0
    if not config.image_token_index <= rows <= config.text_config.vocab_size:
        rows = config.text_config.vocab_size
    table = bigvision_table(config, rows)
    check_tensors(str(path), archive.arrays, {row.key: row.shape for row in table})

    place: dict[str, tuple[Row, int | None, int]] = {}
    tensors: dict[str, tuple[Shape, torch.dtype]] = {}
    by_key = {row.key: row for row in table}
    for key, (_, dtype) in archive.arrays.items():  # in the order of the file
        row = by_key[key]
        for i in range(row.layers or 1):
            for j, template in enumerate(row.names):
                name = template.format(i=i)
                place[name] = row, i if row.layers else None, j
                assert isinstance(dtype, torch.dtype)
                tensors[name] = expected[name], dtype

    last: tuple[tuple[str, int | None], Tensor] | None = None

    def read(name: str, mapped: bool = False) -> Tensor:
        nonlocal last
        row, i, j = place[name]
        shape, dtype = tensors[name]
        if name == EMBEDDING:
            out = torch.zeros(shape, dtype=dtype)
            archive.fill(row.key, out[:rows])
            return out
        if last is not None and last[0] == (row.key, i):
            array = last[1]
        else:
            array = torch.empty(row.shape[1:] if row.layers else row.shape, dtype=dtype)
            archive.fill(row.key, array, i)
        # One slice holds keys and values, or gate and up: the second of them is asked for next.
        last = ((row.key, i), array) if len(row.names) > 1 and j == 0 else None
        return row.unpack(array[j] if len(row.names) > 1 else array, shape)

    return Checkpoint(path, "npz", parts, config, tensors, read)


def _config_from_arrays(path: Path, shapes: dict[str, Shape]) -> PaliGemmaConfig:
    """An `.npz` has no configuration of its own: the sizes follow from the shapes, the rest is as published."""
    try:
        patch, _, _, d = shapes["img/embedding/kernel"]
        layers, _, heads, _ = shapes["img/Transformer/encoderblock/MultiHeadDotProductAttention_0/query/kernel"]
        grid = math.isqrt(shapes["img/pos_embedding"][1])
        f = shapes["img/Transformer/encoderblock/MlpBlock_0/Dense_0/bias"][1]
        L, H, D, E = shapes["llm/layers/attn/q_einsum/w"]
        K, M = shapes["llm/layers/attn/kv_einsum/w"][2], shapes["llm/layers/mlp/linear"][1]
        V = shapes["llm/embedder/input_embedding"][0]
    except (KeyError, IndexError, ValueError) as error:
        raise ValueError(f"{path} is not a PaliGemma of big_vision: no array of that kind {error}") from None
    if V not in (257152, 257216):
        raise ValueError(
            f"{path} has an embedding of {V} rows, the published ones 257152: what its ids mean does not follow from "
            "the shapes. Put its config.json beside it"
        )
    sizes: dict[str, Any] = {"model_type": "gemma", "vocab_size": 257216, "hidden_size": D, "head_dim": E}
    sizes |= {"num_hidden_layers": L, "num_attention_heads": H, "num_key_value_heads": K, "intermediate_size": M}
    if "llm/layers/post_attention_norm/scale" in shapes:
        # The 27B scales its queries by the width per head, all others by the size of a head.
        sizes |= {"model_type": "gemma2", "query_pre_attn_scalar": D / H if D == 4608 and H else E}
    eye = {"hidden_size": d, "intermediate_size": f, "num_hidden_layers": layers, "num_attention_heads": heads}
    eye |= {"image_size": grid * patch, "patch_size": patch}
    try:  # an empty array can claim a billion layers in a few bytes
        return PaliGemmaConfig(GemmaConfig.from_dict(sizes), SiglipVisionConfig.from_dict(eye))
    except ValueError as error:
        raise ValueError(f"{path}: the shapes of its arrays are those of no model: {error}") from None


# ------------------------------------------------------------------------------------------------ loading


def load_model(
    source: str | os.PathLike[str] | Checkpoint,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | str | None = None,
    image_size: int | None = None,
) -> PaliGemmaForConditionalGeneration:
    """A checkpoint, opened or by its path -> the model, in evaluation mode, its parameters trainable.

    dtype: default bfloat16 for the published sizes, the checkpoint's own for all others. image_size: another
    resolution than the checkpoint's; its position table is resampled. Raises as `open_checkpoint` does.
    """
    checkpoint = source if isinstance(source, Checkpoint) else open_checkpoint(source)
    if image_size is not None:
        checkpoint = at_image_size(checkpoint, image_size)
    if (dtype := parse_dtype(dtype)) is None:
        dtype = default_dtype(checkpoint)
    device = torch.device(device)
    model = empty_model(checkpoint.config)
    for name, (_, stored) in checkpoint.tensors.items():
        tensor = checkpoint.read(name, mapped=stored == dtype and device.type == "cpu")
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, nn.Parameter(_cast(name, tensor, dtype, device)))
    return model.eval()


def default_dtype(checkpoint: Checkpoint) -> torch.dtype:
    """bfloat16 for the published sizes, the checkpoint's own for all others."""
    return torch.bfloat16 if published_name(checkpoint.config) else checkpoint.dtype


def _cast(name: str, tensor: Tensor, dtype: torch.dtype, device: torch.device | None = None) -> Tensor:
    cast = tensor.to(device, dtype)
    if dtype == torch.float16 and tensor.dtype != dtype and bool(cast.isinf().any()):
        raise ValueError(f"{name} has values beyond 65504, the largest of float16: use bfloat16 or float32")
    return cast


def config_at_image_size(config: PaliGemmaConfig, image_size: int) -> PaliGemmaConfig:
    """The same configuration for another resolution. ValueError for one that its patches or positions do not allow."""
    if type(image_size) is not int or image_size <= 0:
        raise ValueError(f"image_size is {image_size!r}, expected a positive whole number of pixels")
    vision = replace(config.vision_config, image_size=image_size)  # raises ValueError for an odd size
    limit = config.text_config.max_position_embeddings
    if vision != config.vision_config and vision.num_patches >= limit:
        raise ValueError(
            f"image_size {image_size:,} makes {vision.num_patches:,} image tokens, and the model has {limit:,} "
            "positions for image and text: choose a smaller one"
        )
    return replace(config, vision_config=vision)


def at_image_size(checkpoint: Checkpoint, image_size: int) -> Checkpoint:
    """The same checkpoint for another resolution: only its table of positions changes."""
    config = config_at_image_size(checkpoint.config, image_size)
    if config == checkpoint.config:
        return checkpoint
    vision = config.vision_config
    shape, dtype = (vision.num_patches, vision.hidden_size), checkpoint.tensors[POSITIONS][1]

    def read(name: str, mapped: bool = False) -> Tensor:
        if name == POSITIONS:
            return resample_positions(checkpoint.read(name), vision.num_patches).to(dtype)
        return checkpoint.read(name, mapped)

    return replace(checkpoint, config=config, tensors=checkpoint.tensors | {POSITIONS: (shape, dtype)}, read=read)


def resample_positions(table: Tensor, num_patches: int) -> Tensor:
    """A table of positions [P, D] for a grid of another size: float32 [num_patches, D].

    Linear in both directions, corners on corners: what big_vision does with scipy.ndimage.zoom(order=1).
    """
    old, new = math.isqrt(table.shape[0]), math.isqrt(num_patches)
    grid = table.float().T.reshape(1, -1, old, old)  # [1, D, grid, grid]
    grid = F.interpolate(grid, size=(new, new), mode="bilinear", align_corners=True)
    return grid.reshape(-1, new * new).T.contiguous()


# ------------------------------------------------------------------------------------------------ saving


def save_pretrained(
    model: PaliGemmaForConditionalGeneration,
    folder: str | os.PathLike[str],
    processor: Any = None,
    max_shard_size: int = 5 * 10**9,
) -> None:
    """Writes a checkpoint that this project, transformers and what builds on it read: layout H, safetensors, sharded.

    processor: a `PaliGemmaProcessor` (or anything with `save_pretrained(folder)`), whose files are written too.
    max_shard_size: in bytes. Other files in the folder are left alone; if anything fails, all of them are.
    Raises OSError when the files cannot be written, ValueError when the model is not as its configuration says.
    """
    state = model.state_dict()
    tensors = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in state.items()}
    if not all(dtype.is_floating_point for _, dtype in tensors.values()):
        raise ValueError(
            "the model is quantised and is not saved: load it without `quantize`, or write a quantised checkpoint with "
            "`paligemma quantize`"
        )
    hint = "Merge or take out what was added to it first."
    check_tensors("the model to save", tensors, expected_shapes(model.config), hint)
    with checkpoint_written_whole(Path(folder)) as staging:
        if processor is not None:
            processor.save_pretrained(staging)
        _write_config(staging, model.config, model.dtype)
        _write_safetensors(staging, list(tensors), tensors, lambda name: state[name].detach(), max_shard_size)


def convert(
    source: str | os.PathLike[str] | Checkpoint,
    target: str | os.PathLike[str],
    dtype: torch.dtype | str | None = None,
    format: str | None = None,
    max_shard_size: int = 5 * 10**9,
    folders: Sequence[Path] = (),
) -> list[Path]:
    """Rewrites a checkpoint, opened or by its path, in another format or dtype, with its tokenizer and the like.

    Tensor by tensor, so that the memory needed is that of the largest. folders: where tokenizer and the like lie, the
    first that has a file gives it; default the checkpoint's own.
    format: "safetensors" (target is a folder) or "npz" (target is a file in big_vision's layout, or a folder for a
    `model.npz`, with the configuration, tokenizer and the like beside it); default by the target's name.

    Returns the files written. Raises as `open_checkpoint` and `save_pretrained` do, and ValueError where a file of
    other content would be replaced.
    """
    target, to = Path(target), parse_dtype(dtype)
    format = format or ("npz" if target.suffix == ".npz" else "safetensors")
    if format not in ("safetensors", "npz"):
        raise ValueError(f"format is {format!r}, expected 'safetensors' or 'npz'")
    if target.suffix == ".safetensors" or (target.suffix == ".npz" and format != "npz"):
        raise ValueError(f"{target} is to hold {format}: name a folder{' or an .npz' if format == 'npz' else ''}")
    folder = target.parent if target.suffix == ".npz" else target
    checkpoint = source if isinstance(source, Checkpoint) else open_checkpoint(source)
    folders = folders or [checkpoint.folder]
    check_apart(folder, folders)

    tensors = {name: (shape, to or own) for name, (shape, own) in checkpoint.tensors.items()}
    total = sum(math.prod(shape) * kind.itemsize for shape, kind in tensors.values())
    with checkpoint_written_whole(folder, replaces=False) as staging, _bar(f"writing {target}", total) as advance:

        def read(name: str) -> Tensor:
            tensor = _cast(name, checkpoint.read(name), tensors[name][1])
            advance(tensor.nbytes)
            return tensor

        _copy_companions(folders, staging)
        _write_config(staging, checkpoint.config, to or checkpoint.dtype)
        of_processor = [staging / "tokenizer.json", staging / "preprocessor_config.json"]
        bare = (staging / "tokenizer.model").exists() and not all(path.exists() for path in of_processor)
        if format == "safetensors" and bare:
            # big_vision's checkpoints come without the files that transformers reads a processor from.
            vision = checkpoint.config.vision_config
            tokenizer = load_tokenizer(checkpoint.folder)
            PaliGemmaProcessor(tokenizer, vision.num_patches, vision.image_size).save_pretrained(staging)
        check_nothing_lost(staging, folder)  # before gigabytes are written
        if format == "npz":
            _write_npz(staging / (target.name if target.suffix == ".npz" else "model.npz"), checkpoint, tensors, read)
        else:
            order = list(expected_shapes(checkpoint.config))
            _write_safetensors(staging, order, tensors, read, max_shard_size)
        written = _names(staging)
    return [folder / name for name in written]


def write_folder(
    folder: Path,
    companions: Sequence[Path],
    config: dict[str, Any],
    tensors: dict[str, tuple[Shape, torch.dtype]],
    read: Callable[[str], Tensor],
    max_shard_size: int = 5 * 10**9,
) -> list[Path]:
    """Writes any tensors as a checkpoint folder, each read when its turn has come: all of it, or nothing.

    companions: folders whose tokenizer and the like are taken along, the first's where several have one. config: what
    `config.json` is to hold. Returns the files written. ValueError where a file of other content would be replaced.
    """
    total = sum(math.prod(shape) * kind.itemsize for shape, kind in tensors.values())
    with checkpoint_written_whole(folder, replaces=False) as staging, _bar(f"writing {folder}", total) as advance:

        def counted(name: str) -> Tensor:
            tensor = read(name)
            advance(tensor.nbytes)
            return tensor

        _copy_companions(companions, staging)
        write_json(staging / "config.json", config)
        check_nothing_lost(staging, folder)  # before gigabytes are written
        _write_safetensors(staging, list(tensors), tensors, counted, max_shard_size)
        written = _names(staging)
    return [folder / name for name in written]


def check_apart(target: Path, sources: Sequence[Path]) -> None:
    """ValueError if a checkpoint is to be written where one lies that it is made of."""
    if target.resolve() in [source.resolve() for source in sources]:
        raise ValueError(f"{target} is where the source lies: choose another folder, so that it stays whole")


def check_nothing_lost(staging: Path, folder: Path) -> None:
    """ValueError if moving up what lies in `staging` would replace or remove a file of other content in `folder`. The
    same content is no loss: a command may be given twice."""
    new = _names(staging)
    lost = [name for name in new if (folder / name).exists() and not _same(staging / name, folder / name)]
    lost += _left_over(folder, new)
    if lost:
        where = "the current folder" if folder == Path() else folder
        raise ValueError(
            f"{where} holds {', '.join(lost[:8])}{f' and {len(lost) - 8} more' if len(lost) > 8 else ''} of other "
            "content, which would be lost: choose an empty folder, or move them away"
        )


def _same(one: Path, other: Path) -> bool:
    return other.is_file() and filecmp.cmp(one, other, shallow=False)


def _names(folder: Path) -> list[str]:
    return sorted(file.name for file in folder.iterdir())


def _left_over(folder: Path, new: Sequence[str]) -> list[str]:
    """Weights in the folder that do not belong to the new ones, and would be taken for a part of them."""
    if WEIGHTS not in new and INDEX not in new:
        return []
    pattern = r"model(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?"
    return [name for name in _names(folder) if re.fullmatch(pattern, name) and name not in new]


def _copy_companions(folders: Sequence[Path], staging: Path) -> None:
    """Takes tokenizer and the like along, of the first folder that has a file."""
    for name in COMPANIONS:
        if found := next((folder / name for folder in folders if (folder / name).is_file()), None):
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
            raise OSError(
                error.errno, f"{folder} could not be written ({error.strerror or error}); what was there is untouched"
            ) from error
        if not replaces:
            check_nothing_lost(staging, folder)
        _move_up(staging, folder)


def _move_up(staging: Path, folder: Path) -> None:
    """Replaces the files of a checkpoint. The index goes first and comes last, so that being killed in between leaves
    a checkpoint that says it is incomplete, never one that mixes old shards and new."""
    new = sorted(_names(staging), key=lambda name: name == INDEX)
    old = _left_over(folder, new)
    if INDEX in (*new, *old):
        (folder / INDEX).unlink(missing_ok=True)
    for name in new:
        os.replace(staging / name, folder / name)
    for name in old:
        (folder / name).unlink(missing_ok=True)


def _write_config(folder: Path, config: PaliGemmaConfig, dtype: torch.dtype) -> None:
    content = {**config.to_dict(), "torch_dtype": str(dtype).removeprefix("torch.")}
    write_json(folder / "config.json", content)


def _write_safetensors(
    folder: Path,
    order: list[str],
    tensors: dict[str, tuple[Shape, torch.dtype]],
    read: Callable[[str], Tensor],
    max_shard_size: int,
) -> None:
    """Writes `tensors` into one file or several, filled in the order of `order`, each read once and in its own order.

    The format is a length (8 bytes), a JSON header with dtype, shape and offsets, and the tensors end to end. Writing
    it here, and not through safetensors, is what lets a tensor go to its place as soon as it is read.
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
            text += b" " * (-(8 + len(text)) % 64)  # the tensors begin where the processor likes to load from
            file.write(len(text).to_bytes(8, "little") + text)
            for name in names:
                place[name] = file, 8 + len(text) + header[name]["data_offsets"][0]
        for name in tensors:
            file, offset = place[name]
            file.seek(offset)
            _write_tensor(file, read(name))
        for file in {id(file): file for file, _ in place.values()}.values():
            file.flush()
            os.fsync(file.fileno())  # some file systems find out here that they are full
    if len(shards) > 1:
        weight_map = {name: file for file, names in zip(files, shards) for name in names}
        index = {"metadata": {"total_size": sum(size.values())}, "weight_map": weight_map}
        write_json(folder / INDEX, index)


def _write_tensor(file: Any, tensor: Tensor) -> None:
    file.write(tensor.cpu().contiguous().view(-1).view(torch.uint8).numpy().data)


def _write_npz(
    path: Path,
    checkpoint: Checkpoint,
    tensors: dict[str, tuple[Shape, torch.dtype]],
    read: Callable[[str], Tensor],
) -> None:
    """Writes big_vision's layout, one slice of an array after the other."""
    # big_vision has no rows for <image> and the padding behind it. Only the published vocabulary is known to end there.
    vocab_size = checkpoint.config.text_config.vocab_size
    rows = 257152 if vocab_size == 257216 else vocab_size
    codes = {dtype: code for code, dtype in NPY_DTYPES.items()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for row in bigvision_table(checkpoint.config, rows):
            dtype = tensors[row.names[0].format(i=0)][1]
            header = {"descr": codes[dtype], "fortran_order": False, "shape": row.shape}
            with archive.open(zipfile.ZipInfo(f"params/{row.key}.npy"), "w", force_zip64=True) as file:
                np.lib.format.write_array_header_1_0(file, header)
                for i in range(row.layers or 1):
                    for template in row.names:
                        tensor = read(template.format(i=i))
                        _write_tensor(file, row.pack(tensor[:rows] if template == EMBEDDING else tensor))
    with path.open("rb+") as whole:
        os.fsync(whole.fileno())


@contextlib.contextmanager
def _bar(title: str, total: int) -> Iterator[Callable[[int], None]]:
    """A progress bar in bytes on stderr, where that is a terminal. Yields the function that moves it on."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    columns = TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn()
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task(title, total=total)
        yield lambda count: progress.advance(task, count)
