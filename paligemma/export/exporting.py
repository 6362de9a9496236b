"""Writes the folder that transformers.js opens: `onnx/`, the configuration, tokenizer and preprocessor.

    exported/
      onnx/vision_encoder.onnx  embed_tokens.onnx  decoder_model_merged.onnx     and with a suffix for other weights
      config.json  generation_config.json  preprocessor_config.json  tokenizer.json  tokenizer_config.json
      calibration.json  mask_codec.npz     where the checkpoint has them; for `load_exported`

A file of ONNX holds 2 GB at most. What is larger lies beside it as NAME.onnx_data, and config.json says so, because
transformers.js does not look for it otherwise. Weights are read and written one after the other, so the memory needed
is that of the largest one, the embedding.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import onnx_ir as ir
from onnxscript import optimizer

from paligemma.export.graphs import GRAPHS, quietly
from paligemma.export.storing import SUFFIXES, store
from paligemma.files import new_folder_written_whole, write_json
from paligemma.processing_paligemma import PaliGemmaProcessor
from paligemma.weights.finding import open_model, resolve, tokenizer_in
from paligemma.weights.opening import Checkpoint
from paligemma.weights.saving import copy_companions

LARGEST_FILE = 1_900_000_000  # bytes of weights in one .onnx, below the 2 GB of its format


def export(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    weights: Sequence[str] = ("fp32",),
    revision: str | None = None,
    say: Callable[[str], object] = lambda text: None,
) -> list[Path]:
    """Writes a model as ONNX files. Returns what was written.

    source: "tiny", a hub id, a folder (an adapter's too) or an `.npz`. target: a new folder. weights: see `storing.py`.
    say: is told what is being done. Raises as `load_hf_model` does; ValueError for unknown weights and for a checkpoint
    that is rounded already; FileExistsError where the folder is not empty.
    """
    if not weights or (unknown := [name for name in weights if name not in SUFFIXES]):
        raise ValueError(f"weights are {', '.join(unknown) if weights else 'none'}, expected {', '.join(SUFFIXES)}")
    with new_folder_written_whole(Path(target)) as staging:  # a folder that is full is told before a download
        checkpoint, folders = opened(source, weights, revision)
        _write_processor(checkpoint, folders, staging)
        (staging / "onnx").mkdir()
        external: dict[str, int] = {}
        for graph in GRAPHS:
            say(f"tracing {graph}")
            traced = GRAPHS[graph](checkpoint.config)
            for name in dict.fromkeys(weights):
                model = traced.clone()
                store(model, checkpoint.read, name)
                with quietly():
                    optimizer.optimize(model)
                path = staging / "onnx" / f"{graph}{SUFFIXES[name]}.onnx"
                say(f"writing {path.name}")
                if _save(model, path):
                    external[path.name] = 1
        _write_configs(checkpoint, staging, list(weights), external)
        names = sorted(path.relative_to(staging) for path in staging.rglob("*") if path.is_file())
    return [Path(target) / name for name in names]


def opened(
    source: str | os.PathLike[str], weights: Sequence[str], revision: str | None = None
) -> tuple[Checkpoint, list[Path]]:
    """The checkpoint that `export` writes, and the folders beside it, see `open_model`. Of a PaliGemma 1 on the hub it
    is the one in 16 bits, with half the bytes, unless fp32 is among the weights."""
    dtype = "float32" if "fp32" in weights else None
    checkpoint, folders = open_model(resolve(source, revision, dtype), dtype)
    if not isinstance(checkpoint, Checkpoint):
        raise ValueError(
            f"{source} holds rounded weights: export the checkpoint it was made of, with --weights q8 or q4"
        )
    return checkpoint, folders


def _save(model: ir.Model, path: Path) -> bool:
    """Writes one graph. True if its weights lie in a file beside it."""
    size = sum(value.const_value.nbytes for value in model.graph.initializers.values() if value.const_value is not None)
    beside = f"{path.name}_data" if size > LARGEST_FILE else None
    try:
        ir.save(model, path, external_data=beside)
    except ir.serde.SerdeError as error:  # around what was wrong with a weight, or with the disk
        reason: BaseException = error
        while reason.__cause__ is not None:
            reason = reason.__cause__
        raise reason from None
    return beside is not None


def _write_processor(checkpoint: Checkpoint, folders: Sequence[Path], staging: Path) -> None:
    copy_companions(folders, staging)
    if not all((staging / name).exists() for name in ("tokenizer.json", "preprocessor_config.json")):
        PaliGemmaProcessor.for_config(tokenizer_in(folders), checkpoint.config).save_pretrained(staging)


def _write_configs(checkpoint: Checkpoint, staging: Path, weights: list[str], external: dict[str, int]) -> None:
    config = checkpoint.config
    for_javascript: dict[str, Any] = {}
    if external:
        for_javascript["use_external_data_format"] = external
    if "fp32" not in weights:
        for_javascript["dtype"] = weights[0]  # what is opened where the caller names nothing
    content = {**config.to_dict(), "torch_dtype": "float32"}
    write_json(staging / "config.json", {**content, "transformers.js_config": for_javascript})
    if not (staging / "generation_config.json").exists():
        ids = {name: getattr(config, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
        write_json(staging / "generation_config.json", ids)
