"""What a run of `paligemma batch` was asked for. `run.json` keeps it, and a folder is only continued with the same."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from paligemma.files import MAX_PIXELS

FORMATS = ("jsonl", "parquet")
MASKS = ("rle", "png", "none")
EXPORTS = ("parquet", "coco", "yolo", "label-studio", "csv", "jsonl", "openai")


@dataclass(frozen=True)
class Settings:
    """All that decides the rows of a run and their answers.

    prompt: of every row that brings none of its own. inputs: what the pictures are read from (absolute paths, "-" for
    stdin), or rows: the file that rows are read from. every: seconds between two frames of a video. model ...
    loc_scale: as of `paligemma.load`. max_new_tokens ... seed: as of `paligemma run`. max_pixels: of a picture at most,
    in millions. format, masks: how parts are written. shard_size: rows of a part. batch_size: rows answered together.
    dedupe: pictures with equal bytes and an equal prompt are answered once, as far as a worker remembers them: its last
    1,024 answers.
    """

    prompt: str | None = None
    inputs: tuple[str, ...] = ()
    rows: str | None = None
    every: float | None = None
    model: str = "tiny"
    revision: str | None = None
    device: str | None = None
    dtype: str | None = None
    quantize: str | None = None
    device_map: str | None = None
    image_size: int | None = None
    loc_scale: int = 1024
    max_new_tokens: int | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    beams: int = 1
    seed: int | None = None
    free: bool = False
    forbid_repeats: bool = False
    max_pixels: float = MAX_PIXELS // 10**6
    format: str = FORMATS[0]
    masks: str = MASKS[0]
    shard_size: int = 256
    batch_size: int = 16
    dedupe: bool = False

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "inputs": list(self.inputs)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Settings:
        """What `to_dict` made. Keys of another version are left out."""
        known = {field.name for field in fields(cls)} & set(values)
        settings = {name: values[name] for name in known}
        return cls(**{**settings, "inputs": tuple(settings.get("inputs", ()))})


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What differs between two runs (as `RunFolder.about` holds them), each in a few words.

    The name of the model does not count, because its weights do: they may lie somewhere else by now.
    """
    found = []
    # An older version had fewer options, and did what is now the default.
    old, new = {**Settings().to_dict(), **before.get("options", {})}, now["options"]
    for name in (*new, *(key for key in old if key not in new)):
        if name != "model" and old.get(name) != new.get(name):
            found.append(f"{_option(name)} is {_in_words(old.get(name))} there, {_in_words(new.get(name))} here")
    if before.get("weights") != now["weights"]:
        names = f"{old.get('model')} there, {new['model']} here"
        found.append(f"the weights are others ({names}: {before.get('weights')} and {now['weights']})")
    if before.get("list") != now["list"]:
        found.append(f"the content of {new.get('rows') or ', '.join(new['inputs'])} has changed")
    return found


def _option(name: str) -> str:
    words = {"prompt": "the prompt", "inputs": "the input"}
    return words.get(name, "--" + name.replace("_", "-"))


def _in_words(value: Any) -> str:
    if value is None:
        return "not given"
    if isinstance(value, bool):
        return "on" if value else "off"
    text = ", ".join(map(str, value)) if isinstance(value, list) else repr(value)
    return text if len(text) <= 100 else text[:97] + "..."


# ---------------------------------------------------------------------------------------------- fingerprints

WEIGHTS = (".safetensors", ".npz", ".json", ".model")  # the files of a checkpoint that decide what it answers


def fingerprint_of_model(model: str, revision: str | None = None, dtype: str | None = None) -> str:
    """A hash of the files of a checkpoint (of an adapter's base too), before anything is loaded.

    Files are read whole: two states of a fine-tuning run may differ anywhere. Only in the hub's cache nothing is read,
    since its files bear the hash of their content as their name. Raises what `open_model` raises.
    """
    from paligemma.weights.finding import open_model, resolve

    path = resolve(model, revision, dtype)
    _, folders = open_model(path, dtype)
    found = [file for folder in dict.fromkeys(folders) for file in sorted(folder.iterdir()) if _counts(file, path)]
    digest = hashlib.sha256()
    for file in found:
        digest.update(f"{file.name}\0{digest_of_file(file)}\0".encode())
    return digest.hexdigest()[:16]


def _counts(file: Path, model: Path) -> bool:
    """A model that is one file in a folder of several is that file, with the settings beside it."""
    weights = file.suffix in (".safetensors", ".npz") or ".npz.part" in file.name
    if model.is_file() and weights and file.parent == model.parent:
        return file == model or (".npz" in model.name and file.name.startswith(model.name))
    return file.is_file() and (weights or file.suffix in WEIGHTS)


def digest_of_file(path: Path) -> str:
    """SHA-256 of a file, from its name where it lies in the cache of the Hugging Face hub."""
    real = path.resolve()
    if real.parent.name == "blobs" and re.fullmatch("[0-9a-f]{64}", real.name):
        return real.name
    digest = hashlib.sha256()
    with real.open("rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()
