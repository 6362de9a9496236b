"""The folder of a run: what it was started with, so that it only goes on with the same.

runs/mine/
  settings.json       the options of the command, what the data and the weights were, versions
  log.jsonl           loss, learning rate, validation, skipped rows
  checkpoints/        the last state of training
  validation/         answers, figures and pictures, step by step
  tensorboard/
  report.html         everything in one page, at the end
  finished.json       the final figures, written last (finished-00001000.json: before it was trained for longer)
  config.json, model.safetensors, ...    the fine-tuned model (or the adapter) itself
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from paligemma.data.rows import Rows
from paligemma.evaluate.report import environment
from paligemma.files import append_text, locked, made_folder, parse_json, read_json, write_json, write_text
from paligemma.train import checkpointing
from paligemma.train.options import defaults

SETTINGS, LOG, FINISHED = "settings.json", "log.jsonl", "finished.json"
# What a run may be given differently when it goes on: none of it changes the losses (but that dropout draws anew for
# each piece of a batch, and that another limit of pixels skips other rows: one that was too low need not end a run).
FREE = {
    "data",
    "images",
    "annotations",
    "validation",
    "validation_annotations",
    "out",
    "resume",
    "longer",
    "strict",
    "max_pixels",
    "save_every",
    "device",
    "accumulate",
    "checkpoint_gradients",
    "shard",
}
LENGTH = {"steps", "epochs", "minutes"}  # what may differ with --longer
MODEL_FILES = (
    "config.json", "model.safetensors", "model-?????-of-?????.safetensors", "model.safetensors.index.json",
    "adapter_config.json", "adapter_model.safetensors", "tokenizer.json", "tokenizer_config.json",
    "preprocessor_config.json", "mask_codec.npz", "calibration.json",
)  # fmt: skip


def fingerprint_of_data(rows: Rows) -> str | None:
    """Of the contents of all files that the rows are read from, such as VQA's questions and answers, but not of the
    pictures; None for rows that are read from no file.

    What else lies in the folder does not count (it may be the run itself), nor do names: data may be moved.
    """
    digest = hashlib.sha256()
    if rows.kind == "class-folders":  # there the names are the data
        for row in rows:
            digest.update(f"{row.suffix}/{Path(str(row.image)).name}\n".encode("utf-8", "surrogateescape"))
        return digest.hexdigest()[:16]
    if not rows.files:
        return None
    for file in rows.files:
        if len(rows.files) > 1:
            digest.update(f"{file.stat().st_size}\n".encode())  # where one ends and the next begins
        with open(file, "rb") as content:
            while block := content.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()[:16]


@contextmanager
def locked_run(out: Path) -> Iterator[None]:
    """Only one process may train in a folder: BlockingIOError, which says who does, for a second one. FileExistsError
    for a file. The folder is made if need be, and removed again if nothing came to lie in it."""
    with made_folder(out), locked(out, "paligemma train"):
        yield


def open_run(
    out: Path, settings: Mapping[str, Any], facts: Mapping[str, Any], resume: bool, longer: bool = False
) -> bool:
    """True if the folder holds a run with the same settings and facts, which will continue; False if a run will begin
    there: in a new folder, or with resume=False in the place of the old one. Changes nothing: `clear` does.

    settings: the options. facts: what they stood for: fingerprints of data and weights. longer: the length of the run
    may differ. ValueError that names what differs, and for a folder of something else.
    """
    known = (out / SETTINGS).is_file()
    if not known and out.is_dir() and any(file for file in out.iterdir() if not file.name.startswith(".")):
        raise ValueError(f"{out} is not empty and holds no run: choose another --out")
    if not known or not resume:
        return False
    here = _compared(_as_json(settings), _as_json(facts))
    there = {name: value for name, value in _as_json(defaults()).items() if name in here} | saved_settings(out)
    may_differ = LENGTH if longer else set()
    differing = [key for key in {**there, **here} if there.get(key) != here.get(key) and key not in may_differ]
    if differing:
        named = "; ".join(f"{key} {there.get(key)!r} there, {here.get(key)!r} here" for key in differing)
        way = "add --longer to train it further, " if LENGTH.issuperset(differing) else ""
        raise ValueError(
            f"{out} holds a run with other settings: {named}. Give the same ones to go on with it, {way}choose "
            "another --out, or begin anew with --no-resume, which removes it"
        )
    return True


def saved_settings(out: Path) -> dict[str, Any]:
    """Settings and facts of the run in a folder, as far as they are compared."""
    try:
        saved = read_json(out / SETTINGS)
    except ValueError as error:
        raise ValueError(f"{error}: choose another --out, or --no-resume") from None
    return _compared(saved.get("settings", {}), saved.get("facts", {}))


def is_longer(out: Path, settings: Mapping[str, Any]) -> bool:
    """Whether a run that continues was shorter when it was started last."""
    there, here = saved_settings(out), _as_json(settings)
    return any(there.get(key) != here.get(key) for key in LENGTH)


def reopen(out: Path, settings: Mapping[str, Any], facts: Mapping[str, Any]) -> None:
    """Continue a run with another length. The figures it had when it was finished stay, as `finished-00001000.json`.

    Killed between the two steps, the same command does the rest.
    """
    if (out / FINISHED).is_file():
        os.replace(out / FINISHED, out / f"finished-{last_checkpoint_step(out):08d}.json")
    write_settings(out, settings, facts)


def _as_json(values: Mapping[str, Any]) -> dict[str, Any]:
    """As they are read again: tuples become lists."""
    content: dict[str, Any] = json.loads(json.dumps(dict(values)))
    return content


def _compared(settings: dict[str, Any], facts: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in settings.items() if key not in FREE} | facts


def write_settings(out: Path, settings: Mapping[str, Any], facts: Mapping[str, Any]) -> None:
    write_json(out / SETTINGS, {"settings": dict(settings), "facts": dict(facts), "environment": environment()})


def clear(out: Path) -> None:
    """Remove a run, but for its settings, which those of the next one replace; other files in the folder stay.

    Killed in the middle it leaves less of the old run, which is still known as one and can be begun anew.
    """
    for file in out.glob("finished*.json"):
        file.unlink()
    for name in ("checkpoints", "validation", "tensorboard"):
        aside = out / f".{name}.old"  # removing takes a moment, and half a checkpoint must not be called one
        shutil.rmtree(aside, ignore_errors=True)
        if (out / name).exists():
            os.replace(out / name, aside)
            shutil.rmtree(aside, ignore_errors=True)
    for name in (LOG, "report.html"):
        (out / name).unlink(missing_ok=True)
    for pattern in MODEL_FILES:
        for file in out.glob(pattern):
            file.unlink()


def read_log(out: Path) -> list[dict[str, Any]]:
    """The entries of the log; half a line of a run that was killed is none."""
    entries = []
    path = out / LOG
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            entries.append(parse_json(line, any_number=True))
        except ValueError:
            continue
    return entries


def write_log(out: Path, entries: Iterable[Mapping[str, Any]]) -> None:
    """In the place of what the log holds."""
    write_text(out / LOG, "".join(json.dumps(dict(entry)) + "\n" for entry in entries))


def append_to_log(out: Path, entry: Mapping[str, Any]) -> None:
    append_text(out / LOG, json.dumps(dict(entry)) + "\n")


def last_checkpoint_step(out: Path) -> int:
    found = checkpointing.checkpoints(out / "checkpoints")
    return int(found[-1].name.removesuffix(".old").rpartition("-")[2]) if found else 0


def last_checkpoint_minutes(out: Path) -> float:
    """How long the run had trained."""
    found = checkpointing.checkpoints(out / "checkpoints")
    return checkpointing.number_in(found[-1], "elapsed") / 60 if found else 0.0


def last_checkpoint(out: Path) -> str:
    """In words, for the end of a message."""
    found = checkpointing.checkpoints(out / "checkpoints")
    return f"the last good checkpoint is {found[-1]}" if found else "there is no checkpoint yet"
