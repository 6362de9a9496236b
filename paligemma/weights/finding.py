"""From what people call a model to its files: "tiny", a hub id, a folder, or a file.

`resolve` finds the files, and downloads those of a hub id; `open_model` opens them, whatever they hold.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Sequence
from pathlib import Path

import torch

from paligemma.answers.mask_codec import CODEC_FILE
from paligemma.tokenizer import TOKENIZERS, Tokenizer, load_tokenizer
from paligemma.weights.adapters import CONFIG, Adapter, folded, is_adapter, open_adapter, open_settings
from paligemma.weights.extra import NO_EXTRA, Extra
from paligemma.weights.loading import parse_dtype
from paligemma.weights.npz import npz_parts
from paligemma.weights.opening import Checkpoint, open_checkpoint
from paligemma.weights.published import TINY
from paligemma.weights.quantized import QuantizedCheckpoint, open_quantized, stored_mode

# What is downloaded of a repository: no pickles, no copies in other formats, no pictures. The mask codec is not among
# the weights, since data with masks need it before.
SETTINGS = ["*.json", "tokenizer.model", "paligemma_tokenizer.model", CODEC_FILE]
WEIGHTS = ["*.safetensors"]


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
    if not isinstance(model_path, (str, os.PathLike)):
        raise TypeError(
            f"the model is {type(model_path).__name__}, expected its name: 'tiny', a hub id, a folder or a file"
        )
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
            f"{name}: no such file or folder" + (f". Did you mean {meant}?" if (meant := _meant(name)) else "")
        )
    # A mistyped path must not download somebody's repository. The names that Google published are no mistakes.
    if path.parent.is_dir() and not name.startswith("google/paligemma"):
        raise FileNotFoundError(
            f"{name}: no such file or folder. The hub was not asked, since a folder {path.parent} is here: for the "
            "repository of this name start from another folder"
        )
    return _download(name, revision, parse_dtype(dtype), weights)


def _meant(name: str) -> str | None:
    """What a mistyped name may stand for."""
    if name.startswith("paligemma") and "/" not in name:
        return f"google/{name} on the hub"
    return "tiny, the embedded model" if difflib.get_close_matches(name.lower(), ["tiny"], cutoff=0.75) else None


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


# ------------------------------------------------------------------------------------------------ opening


def open_model(
    path: Path, dtype: torch.dtype | str | None = None, extra: Extra = NO_EXTRA
) -> tuple[Checkpoint | QuantizedCheckpoint, list[Path]]:
    """Opens a checkpoint, or an adapter folded into its base; and the folders in which tokenizer and the like may lie.

    The adapter's own folder comes before that of its base. path, dtype: see `resolve`, which also finds the base.
    Raises as `resolve`, `open_checkpoint` and `open_adapter` do.
    """
    if stored_mode(path) is not None:
        if extra:
            raise ValueError(f"{path} holds rounded weights, and extra is for others: start from what it was made of")
        quantized = open_quantized(path)
        return quantized, [quantized.folder]
    if not is_adapter(path):
        checkpoint = open_checkpoint(path, extra)
        return checkpoint, [checkpoint.folder]
    adapter = open_adapter(path)
    checkpoint = open_checkpoint(find_base(adapter, dtype), extra)
    return folded(checkpoint, adapter), [path, checkpoint.folder]


def find_base(adapter: Adapter, dtype: torch.dtype | str | None = None, weights: bool = True) -> Path:
    """Where the base of an adapter lies: beside it, or where `resolve` finds it.

    Raises FileNotFoundError where there is none, ValueError for a base that is an adapter itself.
    """
    beside = adapter.folder / adapter.base
    name = adapter.base
    if Path(name).parts[-3:] == TINY.parts[-3:] and not Path(name).exists():
        name = "tiny"  # where it lies in another installation
    try:
        base = beside if beside.exists() else resolve(name, adapter.revision, dtype, weights)
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


def find_settings(
    model: str | os.PathLike[str], revision: str | None = None, dtype: torch.dtype | str | None = None
) -> tuple[Path, list[Path]]:
    """Where the settings of a model lie, for an adapter those of its base; and the folders that `open_model` names.

    Weights are neither read nor downloaded. model ... dtype: see `resolve`. Raises as it and `find_base` do.
    """
    path = resolve(model, revision, dtype, weights=False)
    folders = [path if path.is_dir() else path.parent]
    if is_adapter(path):
        path = find_base(open_settings(path), dtype, weights=False)
        folders.append(path if path.is_dir() else path.parent)
    return path, folders


def first_with(folders: Sequence[Path], *names: str) -> Path | None:
    """The first folder that has a file of one of these names."""
    return next((folder for folder in folders if any((folder / name).is_file() for name in names)), None)


def tokenizer_in(folders: Sequence[Path]) -> Tokenizer:
    """The tokenizer of the first folder that has one. Raises as `load_tokenizer` does."""
    return load_tokenizer(first_with(folders, *TOKENIZERS) or folders[-1])
