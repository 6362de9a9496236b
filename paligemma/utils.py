"""The door to a model: from a name, folder or file to the model and its tokenizer.

    model, tokenizer = load_hf_model("google/paligemma2-3b-mix-224", device=None)

`weights/finding.py` finds and opens the files, `weights/loading.py` makes a model of them.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import torch

from paligemma.devices import multiplies_bfloat16, pick_device
from paligemma.fast.offload import check_device_map, offload
from paligemma.fast.swap import STORED, check_mode, check_package
from paligemma.fast.swap import quantize as quantize_model
from paligemma.modeling_gemma import PaliGemmaForConditionalGeneration
from paligemma.tokenizer import Tokenizer, check_tokenizer
from paligemma.weights.extra import NO_EXTRA, Extra
from paligemma.weights.finding import open_model, resolve, tokenizer_in
from paligemma.weights.loading import default_dtype, load_model, parse_dtype
from paligemma.weights.opening import Checkpoint
from paligemma.weights.published import published_name
from paligemma.weights.quantized import QuantizedCheckpoint, load_quantizing


def load_hf_model(
    model_path: str | os.PathLike[str],
    device: torch.device | str | None = None,
    dtype: torch.dtype | str | None = None,
    quantize: str | None = None,
    revision: str | None = None,
    image_size: int | None = None,
    device_map: str | None = None,
    max_memory: Mapping[str, int | str] | None = None,
    extra: Extra = NO_EXTRA,
) -> tuple[PaliGemmaForConditionalGeneration, Tokenizer]:
    """A model in evaluation mode (its parameters trainable), and the tokenizer that lies beside its weights.

    model_path: "tiny" (the model that ships), a hub id, a folder, a `.safetensors` file or a big_vision `.npz`. An
    adapter is folded into its base, and takes the base's tokenizer where it has none of its own.
    device: default CUDA, else MPS, else CPU. dtype: a torch.dtype or its name; default bfloat16 for the published
    sizes, the checkpoint's own for small ones, but float32 on a CPU that multiplies bfloat16 slowly. revision: branch,
    tag or commit of a hub id. image_size: another resolution than the checkpoint's, for which its table of positions is
    resampled. quantize: "int8" or "int4" rounds the weights as they are read, "bnb-int8" or "nf4" through bitsandbytes;
    a checkpoint may be quantised already. On a CPU the published sizes take "bf16" by themselves, which changes no
    weight (see `fast/swap.py`). device_map: "auto" for a model larger than its device, by accelerate; max_memory: what
    may be used of each (see `offload.py`). extra: modules by their names, for a model in which parts are not
    PaliGemma's own (see `weights/extra.py`).

    Raises ValueError or OSError (FileNotFoundError, PermissionError for a gated repository, ...) in a line or two that
    say what to do.
    """
    return load_with_folders(model_path, device, dtype, quantize, revision, image_size, device_map, max_memory, extra)[
        :2
    ]


def load_with_folders(
    model_path: str | os.PathLike[str],
    device: torch.device | str | None,
    dtype: torch.dtype | str | None,
    quantize: str | None,
    revision: str | None,
    image_size: int | None,
    device_map: str | None,
    max_memory: Mapping[str, int | str] | None,
    extra: Extra,
) -> tuple[PaliGemmaForConditionalGeneration, Tokenizer, list[Path]]:
    """As `load_hf_model`, and the folders in which more may lie beside the weights (see `open_model`)."""
    device, wanted = pick_device(device), parse_dtype(dtype)
    if quantize is not None:
        check_mode(quantize, device, wanted)
    check_device_map(device_map, quantize)
    if max_memory is not None and device_map is None:
        raise ValueError("max_memory is for device_map='auto', which is not asked for")
    path = resolve(model_path, revision, wanted)
    # Headers only: what does not fit shows before gigabytes are read.
    checkpoint, folders = open_model(path, wanted, extra)
    tokenizer = tokenizer_in(folders)
    check_tokenizer(tokenizer, checkpoint.config)
    if isinstance(checkpoint, QuantizedCheckpoint):
        check_device_map(device_map, checkpoint.mode)
        return checkpoint.load(quantize, wanted, image_size, device), tokenizer, folders
    if extra and quantize is not None:
        raise ValueError(
            "quantize reads PaliGemma's own layers and cannot be combined with extra: load without it, then call "
            f"paligemma.quantize(pg.model, {quantize!r}), which rounds the linear layers of the new parts too"
        )
    if quantize is not None:
        check_package(quantize)
    if quantize is not None and quantize in STORED:
        return load_quantizing(checkpoint, quantize, wanted, image_size), tokenizer, folders
    if wanted is None and runs_in_float32(checkpoint, device):
        wanted = torch.float32
    model = load_model(checkpoint, "cpu" if device_map else device, wanted, image_size, extra)
    is_published = published_name(model.config) is not None and model.dtype == torch.bfloat16
    if quantize is None and not extra and device.type == "cpu" and is_published:
        quantize = "bf16"  # the same weights, read faster
    model = model if quantize is None else quantize_model(model, quantize)
    return (model if device_map is None else offload(model, device, max_memory)), tokenizer, folders


def runs_in_float32(checkpoint: Checkpoint, device: torch.device) -> bool:
    """Whether a small model in bfloat16 answers several times as fast in float32, as on CPUs with AVX2 alone.

    (The published sizes stay in bfloat16: there are kernels for it, see `fast/`, and float32 would not fit everywhere.)
    """
    small = published_name(checkpoint.config) is None
    return small and checkpoint.dtype == torch.bfloat16 and not multiplies_bfloat16(device)


def stored_dtype(model_path: str | os.PathLike[str], revision: str | None = None) -> torch.dtype | None:
    """The dtype that a model has by default where no device has a say: to save it as it was found.

    None for a quantised checkpoint. Raises as `load_hf_model` does.
    """
    checkpoint, _ = open_model(resolve(model_path, revision))
    return None if isinstance(checkpoint, QuantizedCheckpoint) else default_dtype(checkpoint)
