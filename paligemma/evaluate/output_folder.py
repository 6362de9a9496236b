"""The folder that an evaluation writes to, and continues from.

runs/measured/
  run.json            what run this is; the folder is only continued with the same weights and options
  predictions.jsonl   every answer, written as it comes: a run that was interrupted continues where it stopped
  scores.jsonl        what every row adds to each figure
  results.json        the figures
  reliability.png     how often boxes and masks of each score are right
  worst/              pictures of the worst rows: the truth beside the answer
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from paligemma.evaluate.examples import Example, Prediction
from paligemma.evaluate.summary import Scored
from paligemma.files import append_text, locked, made_folder, parse_json, read_json_value, write_text
from paligemma.images import load_image

if TYPE_CHECKING:
    from torch import nn

    from paligemma.inference import PaliGemma

WRITTEN = ("predictions.jsonl", "scores.jsonl", "results.json", "reliability.png", "worst")  # beside run.json
# Options that may change between two calls, since data and models may be moved. What counts is compared directly: the
# weights, and row by row the prompt and the picture.
PLACES = ("model", "data", "images", "annotations")
AGAIN = "remove this line, and its row is asked again"


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """Holds the folder for this run alone. It is made if need be, and removed again if nothing was written to it.

    ValueError for a folder with files of another program, FileExistsError for a file, BlockingIOError if another run
    writes to the folder, OSError where nothing can be written.
    """
    found = [name for name in WRITTEN if (folder / name).exists()]
    if found and not (folder / "run.json").exists():
        raise ValueError(
            f"{folder} has {', '.join(found)} and no run.json that says of which run: choose another folder, since a "
            "run would write over it"
        )
    with ExitStack() as stack:
        try:
            stack.enter_context(made_folder(folder))
            stack.enter_context(locked(folder, "paligemma evaluate"))
        except (BlockingIOError, FileExistsError):
            raise
        except OSError as error:
            raise OSError(f"{folder} cannot be written to ({error.strerror}): choose another folder") from None
        yield


def check_folder(folder: Path) -> None:
    """Checks that a run can be written to a folder, so that the user knows before a model is loaded. It leaves nothing
    behind, and raises what `held` raises."""
    with held(folder):
        pass


def open_folder(folder: Path, about: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The saved predictions by id. An incomplete last line is removed; nothing else is changed or created.

    ValueError if they are of another run or cannot be read; nothing is changed then. Call it while `held`.
    """
    run_file, path = folder / "run.json", folder / "predictions.jsonl"
    if run_file.exists():
        before, current = _read_run_file(run_file), json.loads(json.dumps(about))
        changed = [key for key in {**before, **current} if key not in PLACES and before.get(key) != current.get(key)]
        if changed:
            named = [f"{key} {_in_words(before.get(key))} there, {_in_words(current.get(key))} here" for key in changed]
            raise ValueError(f"{folder} holds another run: {'; '.join(named)}; choose another folder")
    saved = {}
    if path.exists():
        saved = read_predictions(path)  # before anything is changed
        raw = path.read_bytes()
        whole = raw[: raw.rfind(b"\n") + 1]
        if whole != raw:
            with open(path, "r+b") as file:
                file.truncate(len(whole))
    return saved


def _in_words(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "not given" if value is None else str(value)


def write_run_file(folder: Path, about: Mapping[str, Any]) -> None:
    """folder/run.json: which run the predictions in this folder are of."""
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / "run.json", json.dumps(dict(about), indent=2) + "\n")


def _read_run_file(path: Path) -> dict[str, Any]:
    try:
        value = read_json_value(path)
        if not isinstance(value, dict):
            raise ValueError(f"expected an object, got {type(value).__name__}")
        return value
    except ValueError as error:
        raise ValueError(f"{path} does not say what run this is ({error}): choose another folder") from None


def read_predictions(path: Path) -> dict[str, dict[str, Any]]:
    """By id, without an incomplete last line. ValueError names a line that cannot be read."""
    found = {}
    with open(path, "rb") as file:  # not `splitlines`: it also splits at U+2028, which an answer may hold
        for number, line in enumerate(file, 1):
            if not line.endswith(b"\n"):
                break
            try:
                entry = parse_json(line, any_number=True)
                found[entry["id"]] = entry
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(
                    f"{path}:{number} is no prediction ({_reason(error)}): {AGAIN}, or choose another folder"
                ) from None
    return found


def _reason(error: Exception) -> str:
    """The text of a KeyError is only the key."""
    return f"no {error}" if isinstance(error, KeyError) else str(error)


def saved_prediction(
    entry: dict[str, Any], example: Example, folder: Path | None, codec: Callable[[], str | None]
) -> Prediction:
    """The answer to an example that was saved before. ValueError if prompt or picture were others then, for masks that
    another codec drew, and for an incomplete entry.

    The right answers may have changed: no prediction depends on them, and the figures are computed again.
    """
    try:
        prompt, prediction = entry["prompt"], Prediction.from_dict(entry)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{folder}/predictions.jsonl: the line with the id {example.id!r} is no prediction ({_reason(error)}): "
            f"{AGAIN}"
        ) from None
    if prompt != example.prompt:
        raise ValueError(
            f"{folder}: row {example.id} was asked {prompt!r} there and {example.prompt!r} here; choose another folder"
        )
    if "seen" in entry and entry["seen"] != fingerprint_of_picture(example.image):  # older lines do not say
        raise ValueError(
            f"{folder}: row {example.id}, {prompt!r}, saw another picture there than here; choose another folder"
        )
    if "codec" in entry and entry["codec"] != codec():
        raise ValueError(f"{folder}: the masks of row {example.id} were drawn by another codec; choose another folder")
    return prediction


def append(
    path: Path, batch: Sequence[Example], predictions: Sequence[Prediction], codec: Callable[[], str | None]
) -> None:
    lines = [
        {
            "id": e.id,
            "task": e.task,
            "prompt": e.prompt,
            "seen": fingerprint_of_picture(e.image),
            "answers": list(e.answers),
            **({"codec": codec()} if any(region.mask is not None for region in p.regions) else {}),
            **p.to_dict(),
        }
        for e, p in zip(batch, predictions)
    ]
    append_text(path, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))


def write_scores(folder: Path, rows: Iterable[Scored]) -> None:
    """folder/scores.jsonl"""
    lines = [
        {
            "id": row.example.id,
            "task": row.example.task,
            "answers": list(row.example.answers),
            "text": row.prediction.text,
            "scores": row.ratios,
        }
        for row in rows
    ]
    write_text(folder / "scores.jsonl", "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))


# --------------------------------------------------------------------------------------- the same weights and pictures


def fingerprint(pg: PaliGemma) -> str | None:
    """A hash of a few numbers of every weight: two states of one training run differ, wherever they are stored. None
    without a model (a stand-in of a test)."""
    if getattr(pg, "model", None) is None:
        return None
    return _hash_of(pg.model, numbers=16)


def fingerprint_of_codec(pg: PaliGemma) -> str | None:
    """A hash of the mask codec, which draws the masks that are saved. It is small, so all of its numbers count. None
    without a model."""
    if getattr(pg, "model", None) is None:
        return None
    return _hash_of(pg.codec)


def _hash_of(module: nn.Module, numbers: int | None = None) -> str:
    """Of the first `numbers` of every weight, or of all."""
    digest = hashlib.sha256()
    for name, weight in sorted(module.state_dict().items()):
        digest.update(name.encode())
        if weight.is_meta:  # of a layer that visits the device while it computes: accelerate keeps it elsewhere
            owner, _, leaf = name.rpartition(".")
            hook: Any = module.get_submodule(owner)._hf_hook
            weight = hook.weights_map[leaf]
        digest.update(weight.flatten()[:numbers].float().cpu().numpy().tobytes())
    return digest.hexdigest()[:12]


def fingerprint_of_picture(image: Any) -> str:
    """A hash of one picture, of a tuple or of none: of the bytes of a file, of the pixels of anything else. The name
    does not count: a picture may be replaced under its name, and a data set may be moved."""
    digest = hashlib.blake2b(digest_size=8)
    for one in image if isinstance(image, tuple) else () if image is None else (image,):
        if isinstance(one, (str, os.PathLike)):
            digest.update(hashlib.blake2b(Path(one).read_bytes()).digest())
        else:
            pixels = np.ascontiguousarray(load_image(one))
            digest.update(f"{pixels.shape}".encode() + hashlib.blake2b(pixels.data).digest())
    return digest.hexdigest()
