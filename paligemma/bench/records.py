"""What every record of `paligemma bench` begins with, and the file it is kept in."""

from __future__ import annotations

import datetime
import itertools
import json
from pathlib import Path
from typing import Any

from paligemma.bench.machine import describe_machine
from paligemma.files import write_text


def new_record(what: str, model: str, command: str, threads: int | None = None) -> dict[str, Any]:
    """what: what is in it, in words. threads: see `describe_machine`."""
    return {
        "what": what,
        "date": datetime.datetime.now().isoformat(timespec="minutes"),
        "command": command,
        "model": model,
        **describe_machine(threads),
    }


def record_path(folder: Path, kind: str, model: str, suffix: str = "") -> Path:
    """benchmarks/speed-paligemma-3b-pt-224-2026-11-24.json; for a second one of this day, ...-2026-11-24-2.json"""
    name = f"{kind}-{Path(model).name}{suffix}-{datetime.date.today().isoformat()}"
    names = itertools.chain([name], (f"{name}-{number}" for number in itertools.count(2)))
    return next(path for name in names if not (path := folder / f"{name}.json").exists())


def save(record: dict[str, Any], path: Path | None) -> None:
    """None: the record is kept in memory only."""
    if path is not None:
        write_text(path, json.dumps(record, indent=1) + "\n")
