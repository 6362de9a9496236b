"""How a run is followed: the log on disk, and a progress bar in the terminal."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import rich.console
import rich.progress

from paligemma.train.run_folder import LOG, append_to_log, read_log, write_log


class Log:
    """One JSON object a line. Entries that a resumed run will write again are removed first."""

    def __init__(self, out: Path, step: int, on_log: Callable[[dict[str, Any]], None] | None = None):
        out.mkdir(parents=True, exist_ok=True)
        self.out, self.on_log = out, on_log
        if (out / LOG).exists():
            write_log(out, [entry for entry in read_log(out) if entry["step"] <= step])

    def write(self, entry: dict[str, Any]) -> None:
        append_to_log(self.out, entry)
        if self.on_log is not None:
            self.on_log(entry)


@contextmanager
def progress_bar(rank: int) -> Iterator[Callable[[float, str], None]]:
    """Yields a function that shows the share that is done and a note: on the first process, and on a terminal."""
    columns = (
        rich.progress.TextColumn("{task.description}"),
        rich.progress.BarColumn(),
        rich.progress.TextColumn("{task.fields[note]}"),
        rich.progress.TimeRemainingColumn(),
    )
    console = rich.console.Console(file=sys.stderr)
    with rich.progress.Progress(*columns, console=console, disable=rank != 0 or not console.is_terminal) as bar:
        task = bar.add_task("training", total=1.0, note="")
        yield lambda done, note: bar.update(task, completed=done, note=note)
