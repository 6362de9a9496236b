"""Two runs side by side: the options that differ, and how the runs ended.

    rich.print(compare("runs/a", "runs/b"))

Everything is read from the folders (`settings.json`, `log.jsonl`, `finished.json`); no model is loaded.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from paligemma.evaluate.report import rounded
from paligemma.files import read_json
from paligemma.train.options import defaults
from paligemma.train.results import summary_of
from paligemma.train.run_folder import FINISHED, SETTINGS, read_log

NOT_COMPARED = ("out", "resume", "longer")
Values = dict[str, str]


@dataclass
class Record:
    """What a folder says of its run, as text. options: defaults included. facts: fingerprints of data and weights, and
    versions. results: figures and summary."""

    options: Values
    facts: Values
    results: Values


def compare(first: str | os.PathLike[str], second: str | os.PathLike[str]) -> Table:
    """FileNotFoundError for a folder that holds no run, ValueError for files that are damaged."""
    one, other = read_run(Path(first)), read_run(Path(second))
    table = Table(title="options that differ, and results", title_justify="left")
    for column in ("", str(first), str(second)):
        table.add_column(Text(column), overflow="fold")  # brackets in a path are not markup
    for left, right in ((one.options, other.options), (one.facts, other.facts)):
        for name in {**left, **right}:
            if left.get(name) != right.get(name):
                table.add_row(*map(Text, (name, left.get(name, "–"), right.get(name, "–"))))
    if not table.row_count:
        table.add_row("options, data and weights", "the same", "the same")
    table.add_section()
    for name in {**one.results, **other.results}:
        table.add_row(*map(Text, (name, one.results.get(name, "–"), other.results.get(name, "–"))))
    return table


def read_run(folder: Path) -> Record:
    if not (folder / SETTINGS).is_file():
        raise FileNotFoundError(f"{folder} has no {SETTINGS}: expected the folder of a run of 'paligemma train'")
    saved = read_json(folder / SETTINGS)
    options = defaults() | _object(saved, "settings", folder)
    facts = {**_object(saved, "facts", folder), **_object(saved, "environment", folder)}
    log = read_log(folder)
    results: Values = {}
    if (folder / FINISHED).is_file():
        finished = read_json(folder / FINISHED)
        summary, figures = _object(finished, "summary", folder), finished.get("figures") or []
        several = len({figure["task"] for figure in figures}) > 1
        for figure in figures if finished.get("figures of") == "validation" else []:
            name = f"{figure['task']}: {figure['name']}" if several else figure["name"]
            interval = "" if figure["low"] is None else f" ({rounded(figure['low'])} … {rounded(figure['high'])})"
            results[name] = rounded(figure["value"]) + interval
    else:
        summary = {**summary_of(log, int(options["batch"] or 1)), "finished": "no"}
        for entry in log:
            for name, value in (entry.get("validation") or {}).items():
                results[name] = f"{rounded(value)} in step {entry['step']}"
    results |= _texts(summary)
    return Record(_texts({k: v for k, v in options.items() if k not in NOT_COMPARED}), _texts(facts), results)


def _object(saved: dict[str, Any], name: str, folder: Path) -> dict[str, Any]:
    value = saved.get(name, {})
    if not isinstance(value, dict):
        raise ValueError(f"{folder}: {name} is {type(value).__name__}, expected an object")
    return value


def _texts(values: dict[str, Any]) -> Values:
    """None and empty lists are written as a dash."""
    return {
        name: "–" if value is None or value == [] or value == () else
        ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else
        f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
        for name, value in values.items()
    }  # fmt: skip
