"""From what people call a model to the model: "tiny", a hub id, a folder, or a file.

    model, tokenizer = load_hf_model("google/paligemma2-3b-mix-224", device=None)

`resolve` finds the files (and downloads them), `checkpoints.py` reads them; `adapters.py` where they are an adapter.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path

import torch

from paligemma.devices import pick_device
from paligemma.fast.offload import check_device_map, offload
from paligemma.fast.quantization import (
    STORED,
    QuantizedCheckpoint,
    check_mode,
    load_quantizing,
    open_quantized,
    stored_mode,
)
from paligemma.fast.quantization import quantize as quantize_model
from paligemma.modeling_gemma import PaliGemmaForConditionalGeneration
from paligemma.tokenizer import Tokenizer, check_tokenizer, load_tokenizer
from paligemma.weights.adapters import CONFIG, Adapter, folded, is_adapter, open_adapter
from paligemma.weights.checkpoints import Checkpoint, convert, load_model, open_checkpoint, parse_dtype, published_name
from paligemma.weights.npz import npz_parts

TINY = Path(__file__).parent / "assets" / "tiny"

# What is downloaded of a repository. No pickles, no copies in other formats, no pictures.
SETTINGS = ["*.json", "tokenizer.model"]
WEIGHTS = ["*.safetensors", "mask_codec.npz"]


def load_hf_model(
    model_path: str | os.PathLike[str],
    device: torch.device | str | None = None,
    dtype: torch.dtype | str | None = None,
    quantize: str | None = None,
    revision: str | None = None,
    image_size: int | None = None,
    device_map: str | None = None,
    max_memory: Mapping[str, int | str] | None = None,
) -> tuple[PaliGemmaForConditionalGeneration, Tokenizer]:
    """A model in evaluation mode (its parameters trainable), and the tokenizer that lies beside its weights.

    model_path: "tiny" (the model that ships), a hub id, a folder, a `.safetensors` file or a big_vision `.npz`. An
    adapter is folded into its base, and takes the base's tokenizer where it has none of its own.
    device: default CUDA, else MPS, else CPU. dtype: a torch.dtype or its name; default bfloat16 for the published
    sizes, the checkpoint's own for small ones. revision: branch, tag or commit of a hub id. image_size: another
    resolution than the checkpoint's, for which its table of positions is resampled. quantize: "int8" or "int4" rounds
    the weights as they are read, "bnb-int8" or "nf4" through bitsandbytes; a checkpoint may be quantised already. On a
    CPU the published sizes take "bf16" by themselves, which changes no weight (see `quantization.py`). device_map:
    "auto" for a model larger than its device, by accelerate; max_memory: what may be used of each (see `offload.py`).

    Raises ValueError or OSError (FileNotFoundError, PermissionError for a gated repository, ...) in a line or two that
    say what to do.
    """
    device, wanted = pick_device(device), parse_dtype(dtype)
    if quantize is not None:
        check_mode(quantize, device)
    check_device_map(device_map, quantize)
    if max_memory is not None and device_map is None:
        raise ValueError("max_memory is for device_map='auto', which is not asked for")
    path = resolve(model_path, revision, wanted)
    checkpoint, folders = open_model(path, wanted)  # headers only: what does not fit shows before gigabytes are read
    tokenizer = load_tokenizer(first_with(folders, "tokenizer.json", "tokenizer.model") or folders[-1])
    check_tokenizer(tokenizer, checkpoint.config)
    if isinstance(checkpoint, QuantizedCheckpoint):
        check_device_map(device_map, checkpoint.mode)
        check_mode(checkpoint.mode, device)
        return checkpoint.load(quantize, wanted, image_size), tokenizer
    if quantize is not None and quantize in STORED:
        return load_quantizing(checkpoint, quantize, wanted, image_size), tokenizer
    model = load_model(checkpoint, "cpu" if device_map else device, wanted, image_size)
    if quantize is None and device.type == "cpu" and published_name(model.config) and model.dtype == torch.bfloat16:
        quantize = "bf16"  # the same weights, read faster
    model = model if quantize is None else quantize_model(model, quantize)
    return (model if device_map is None else offload(model, device, max_memory)), tokenizer


def open_model(
    path: Path, dtype: torch.dtype | str | None = None
) -> tuple[Checkpoint | QuantizedCheckpoint, list[Path]]:
    """Opens a checkpoint, or an adapter folded into its base; and the folders in which tokenizer and the like may lie.

    The adapter's own folder comes before that of its base. path, dtype: see `resolve`, which also finds the base.
    Raises as `resolve`, `open_checkpoint` and `open_adapter` do.
    """
    if stored_mode(path) is not None:
        quantized = open_quantized(path)
        return quantized, [quantized.folder]
    if not is_adapter(path):
        checkpoint = open_checkpoint(path)
        return checkpoint, [checkpoint.folder]
    adapter = open_adapter(path)
    checkpoint = open_checkpoint(find_base(adapter, dtype))
    return folded(checkpoint, adapter), [path, checkpoint.folder]


def find_base(adapter: Adapter, dtype: torch.dtype | str | None = None, weights: bool = True) -> Path:
    """Where the base of an adapter lies: beside it, or where `resolve` finds it.

    Raises FileNotFoundError where there is none, ValueError for a base that is an adapter itself.
    """
    beside = adapter.folder / adapter.base
    try:
        base = beside if beside.exists() else resolve(adapter.base, adapter.revision, dtype, weights)
    except (FileNotFoundError, ValueError) as error:
        raise FileNotFoundError(
            f"{adapter.folder} is an adapter, and its base cannot be found: {error}. Where it lies stands in {CONFIG}, "
            "as base_model_name_or_path"
        ) from None
    if is_adapter(base):
        raise ValueError(
            f"{adapter.folder} is an adapter beside another, {base}: merge that one first (`paligemma merge`)"
        )
    return base


def first_with(folders: list[Path], *names: str) -> Path | None:
    """The first folder that has a file of one of these names."""
    return next((folder for folder in folders if any((folder / name).is_file() for name in names)), None)


def merge(
    adapter: str | os.PathLike[str],
    target: str | os.PathLike[str],
    dtype: torch.dtype | str | None = None,
    revision: str | None = None,
) -> list[Path]:
    """Writes an adapter and its base as one checkpoint, in the published layout, tensor by tensor.

    adapter: a folder or a hub id, of which `revision` is one. target: a folder. dtype: default the base's own.
    Returns the files written. Raises ValueError for what is no adapter, and as `open_model` and `checkpoints.convert`
    do.
    """
    path = resolve(adapter, revision)
    if not is_adapter(path):
        raise ValueError(f"{path} is no adapter: it has no {CONFIG}, so there is nothing to merge")
    checkpoint, folders = open_model(path, parse_dtype(dtype))
    assert isinstance(checkpoint, Checkpoint)  # an adapter's base is never quantised
    return convert(checkpoint, target, dtype, "safetensors", folders=folders)


def resolve(
    model_path: str | os.PathLike[str],
    revision: str | None = None,
    dtype: torch.dtype | str | None = None,
    weights: bool = True,
) -> Path:
    """Where the files of a model lie: a folder or a file. A hub id is downloaded into the hub's cache first.

    revision: of a hub id; a PaliGemma 1 of Google's is taken from the branch with half the bytes, unless `dtype` asks
    for float32. weights: False downloads the settings alone. Raises FileNotFoundError for a path that does not exist
    (which is never looked for on the hub; nor is "a/b" where a folder "a" is here, but for "google/paligemma..."),
    PermissionError for a gated repository, ValueError for an unknown id.
    """
    if not str(model_path):
        raise ValueError("the name of the model is empty: expected 'tiny', a hub id, a folder or a file")
    if model_path == "tiny":
        path = TINY
        if not path.is_dir():
            raise FileNotFoundError(f"{path} is missing: the package was installed without the model that ships")
    else:
        path = Path(model_path).expanduser()
    if path.exists() or npz_parts(path):
        if revision is not None:
            raise ValueError(f"{path} is here, and has no revision {revision!r}: only a hub id has revisions")
        return path

    name = str(model_path)
    is_id = re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", name)
    if isinstance(model_path, os.PathLike) or not is_id or path.suffix in (".npz", ".safetensors"):
        raise FileNotFoundError(
            f"{name}: no such file or folder"
            + (f". Did you mean google/{name} on the hub?" if name.startswith("paligemma") and "/" not in name else "")
        )
    # A typing error in a path is not to ask for somebody's repository. What Google published is no such error.
    if path.parent.is_dir() and not name.startswith("google/paligemma"):
        raise FileNotFoundError(
            f"{name}: no such file or folder. The hub was not asked, since a folder {path.parent} is here: for the "
            "repository of this name start from another folder"
        )
    return _download(name, revision, parse_dtype(dtype), weights)


def _download(name: str, revision: str | None, dtype: torch.dtype | None, weights: bool) -> Path:
    """The snapshot of a hub repository in the hub's own cache, with its token and its progress bars."""
    import huggingface_hub
    from huggingface_hub import constants, errors

    patterns = SETTINGS + (WEIGHTS if weights else [])
    if weights and name.endswith("-jax"):
        patterns += ["*.npz", "*.npz.part*"]

    def snapshot(revision: str | None) -> Path:
        return Path(huggingface_hub.snapshot_download(name, revision=revision, allow_patterns=patterns))

    try:
        if revision is None and (half := _half_the_bytes(name, dtype)) is not None:
            try:
                return snapshot(half)
            except (errors.RevisionNotFoundError, errors.LocalEntryNotFoundError):
                pass  # our choice, not the user's: the main branch will do
        return snapshot(revision)
    except errors.GatedRepoError:
        raise PermissionError(
            f"{name} is gated. Two steps open it: accept its licence at https://huggingface.co/{name}, then log in "
            "with `hf auth login` (or set HF_TOKEN to a token of yours)"
        ) from None
    except errors.RevisionNotFoundError:
        raise ValueError(f"{name} has no revision {revision!r}: see https://huggingface.co/{name}/branches") from None
    except errors.RepositoryNotFoundError:
        raise ValueError(
            f"{name} is neither a folder here nor a repository on the hub (or it is private: log in with "
            "`hf auth login`, or set HF_TOKEN)"
        ) from None
    except errors.HFValidationError as error:
        raise ValueError(f"{name!r} is neither a folder here nor a possible hub id: {error}") from None
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled) as error:
        if constants.HF_HUB_OFFLINE:
            raise ConnectionError(
                f"{name} is not (or not completely) in the hub's cache, and HF_HUB_OFFLINE forbids to download it: "
                "unset it, or give the path of a folder"
            ) from None
        raise ConnectionError(
            f"{name} is not in the hub's cache and the hub cannot be reached ({_first_line(error)}): check the "
            "network, or give the path of a folder"
        ) from None
    except errors.HfHubHTTPError as error:
        raise ConnectionError(f"{name} could not be downloaded: {_first_line(error)}") from None


def _half_the_bytes(name: str, dtype: torch.dtype | None) -> str | None:
    """The branch of a PaliGemma 1 repository that holds its weights in 16 bits; main holds float32.
    PaliGemma 2 has bfloat16 on main."""
    if not name.startswith("google/paligemma-3b-") or dtype == torch.float32:
        return None
    return "float16" if dtype == torch.float16 else "bfloat16"


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
