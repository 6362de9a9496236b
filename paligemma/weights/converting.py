"""A checkpoint rewritten as another: in another format or dtype (`convert`), or with an adapter folded in (`merge`).

Tensor by tensor, so that the memory needed is that of the largest tensor.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from paligemma.arguments import check_path
from paligemma.processing_paligemma import PaliGemmaProcessor
from paligemma.tokenizer import OFFICIAL_SIZE, TOKENIZERS, load_tokenizer
from paligemma.weights.adapters import CONFIG, is_adapter
from paligemma.weights.expected import expected_shapes
from paligemma.weights.finding import first_with, open_model, resolve, tokenizer_in
from paligemma.weights.loading import cast, parse_dtype
from paligemma.weights.opening import WEIGHTS, Checkpoint, open_checkpoint
from paligemma.weights.saving import check_apart, write_config, write_folder
from paligemma.weights.writing import write_npz, write_safetensors


def convert(
    source: str | os.PathLike[str] | Checkpoint,
    target: str | os.PathLike[str],
    dtype: torch.dtype | str | None = None,
    format: str | None = None,
    max_shard_size: int = 5 * 10**9,
    folders: Sequence[Path] = (),
    revision: str | None = None,
) -> list[Path]:
    """Rewrites a checkpoint in another format or dtype, with its tokenizer and the like.

    source: "tiny", a hub id, a folder, a file, or one of these opened. folders: where tokenizer and the like lie, the
    first that has a file gives it; default the checkpoint's own.
    format: "safetensors" (target is a folder) or "npz" (target is a file in big_vision's layout, or a folder for a
    `model.npz`, with the configuration, tokenizer and the like beside it); default by the target's name. revision: of
    a hub id.

    Returns the files written. Raises as `open_checkpoint` and `save_pretrained` do, and ValueError where a file of
    other content would be replaced.
    """
    target, to = check_path("target", target), parse_dtype(dtype)
    format = _format_for(target, format)  # before anything is downloaded
    folder = target.parent if target.suffix == ".npz" else target
    checkpoint = source if isinstance(source, Checkpoint) else open_checkpoint(resolve(source, revision, to))
    folders = folders or [checkpoint.folder]
    check_apart(folder, folders)

    tensors = {name: (shape, to or own) for name, (shape, own) in checkpoint.tensors.items()}

    def write_settings(staging: Path) -> None:
        write_config(staging, checkpoint.config, to or checkpoint.dtype)
        of_processor = [staging / "tokenizer.json", staging / "preprocessor_config.json"]
        has_sentencepiece = any((staging / name).exists() for name in TOKENIZERS[1:])
        bare = has_sentencepiece and not all(path.exists() for path in of_processor)
        if format == "safetensors" and bare:
            # big_vision's checkpoints come without the files that transformers reads a processor from.
            PaliGemmaProcessor.for_config(tokenizer_in(folders), checkpoint.config).save_pretrained(staging)

    def write_weights(staging: Path, read: Callable[[str], Tensor]) -> None:
        if format == "npz":
            file = staging / (target.name if target.suffix == ".npz" else "model.npz")
            write_npz(file, checkpoint, tensors, read, _rows_of_embedding(checkpoint, folders))
        else:
            write_safetensors(staging, list(expected_shapes(checkpoint.config)), tensors, read, max_shard_size)

    return write_folder(
        folder,
        folders,
        tensors,
        lambda name: cast(name, checkpoint.read(name), tensors[name][1]),
        write_settings,
        write_weights,
        weights_to_come=WEIGHTS if format == "safetensors" else None,
    )


def _format_for(target: Path, format: str | None) -> str:
    """What is written to `target`. ValueError for an unknown format, and for a name that does not go with it."""
    format = format or ("npz" if target.suffix == ".npz" else "safetensors")
    if format not in ("safetensors", "npz"):
        raise ValueError(f"format is {format!r}, expected 'safetensors' or 'npz'")
    if target.suffix == ".safetensors" or (target.suffix == ".npz" and format != "npz"):
        raise ValueError(f"{target} is to hold {format}: name a folder{' or an .npz' if format == 'npz' else ''}")
    return format


def _rows_of_embedding(checkpoint: Checkpoint, folders: Sequence[Path]) -> int:
    """As big_vision has them. Of the published vocabulary it has no rows for <image> and the padding behind it, where
    `add_tokens` puts new tokens first."""
    rows = checkpoint.config.text_config.vocab_size
    if rows != 257216:
        return rows
    folder = first_with(folders, "tokenizer.json")  # a sentencepiece model has no added tokens
    added = folder is not None and len(load_tokenizer(folder)) > OFFICIAL_SIZE
    return rows if added else OFFICIAL_SIZE - 1


def merge(
    adapter: str | os.PathLike[str],
    target: str | os.PathLike[str],
    dtype: torch.dtype | str | None = None,
    revision: str | None = None,
) -> list[Path]:
    """Writes an adapter and its base as one checkpoint, in the published layout, tensor by tensor.

    adapter: a folder or a hub id, of which `revision` is one. target: a folder. dtype: default the base's own.
    Returns the files written. Raises ValueError for what is no adapter, and as `open_model` and `convert`
    do.
    """
    to, format = parse_dtype(dtype), _format_for(check_path("target", target), "safetensors")
    if not is_adapter(resolve(adapter, revision, weights=False)):  # seen without downloading a whole model
        raise ValueError(f"{adapter} is no adapter: it has no {CONFIG}, so there is nothing to merge")
    checkpoint, folders = open_model(resolve(adapter, revision), to)
    assert isinstance(checkpoint, Checkpoint)  # an adapter's base is never quantised
    return convert(checkpoint, target, to, format, folders=folders)
