"""The result of an evaluation: figures with intervals, baselines and targets, as a table and as JSON."""

from __future__ import annotations

import math
import platform
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.table import Table

from paligemma import __version__
from paligemma.evaluate.calibration import Bin, Item, draw_reliability, reliability
from paligemma.files import write_json


@dataclass(frozen=True)
class Figure:
    """One value of one task.

    low, high: 95% interval. baseline: the value if every answer were the commonest right one. target: set by the
    caller. published: by the authors of the model, after fine-tuning it for this task. Each is None where there is
    none; `value` is None where there is nothing to divide by, such as precision without predictions.
    """

    task: str
    name: str
    value: float | None
    low: float | None
    high: float | None
    rows: int
    baseline: float | None = None
    target: float | None = None
    published: float | None = None
    lower_is_better: bool = False

    @property
    def reached(self) -> bool | None:
        """Whether the value (not its interval) is as good as the target; None without a target."""
        if self.target is None:
            return None
        if self.value is None:
            return False
        return self.value <= self.target if self.lower_is_better else self.value >= self.target


@dataclass(frozen=True)
class Counts:
    """invalid: rows with an answer that could not be read completely. unfinished: rows whose answer reached the token
    budget."""

    rows: int
    invalid: int
    unfinished: int


@dataclass(frozen=True)
class Report:
    figures: list[Figure]
    counts: dict[str, Counts]  # by task
    about: dict[str, Any]  # what was run: model, data, ...; see `evaluate`
    worst: list[dict[str, Any]] = field(default_factory=list)  # the rows that were drawn: id, task, file
    environment: dict[str, Any] = field(default_factory=dict)  # date, seconds, versions
    items: dict[str, list[Item]] = field(default_factory=dict, repr=False)  # task -> score and rightness of each item
    mask_tasks: list[str] = field(default_factory=list)  # those of them whose items are masks
    # (task, figure) -> row -> its group, and what it adds above and below the line; to compare two runs row by row
    shares: dict[tuple[str, str], dict[str, tuple[str, float, float]]] = field(default_factory=dict, repr=False)

    def __getitem__(self, key: tuple[str, str]) -> Figure:
        """report["caption", "exact"]"""
        for figure in self.figures:
            if (figure.task, figure.name) == key:
                return figure
        raise KeyError(f"no figure {key}; there is: {', '.join(f'{f.task}/{f.name}' for f in self.figures)}")

    def to_dict(self) -> dict[str, Any]:
        return {
            "about": self.about,
            "environment": self.environment,
            "figures": [{**vars(figure), "reached": figure.reached} for figure in self.figures],
            "counts": {task: vars(counts) for task, counts in self.counts.items()},
            "worst": self.worst,
            "reliability": {
                task: [None if one is None else vars(one) for one in bins] for task, bins in self.reliability.items()
            },
        }

    @property
    def reliability(self) -> dict[str, list[Bin | None]]:
        """Task -> for each tenth of [0, 1]: how many boxes or masks have such a score, and the share that is right."""
        return {task: reliability(items) for task, items in self.items.items()}

    def save(self, folder: Path) -> None:
        """folder/results.json, and folder/reliability.png where there are scores of boxes or masks."""
        if self.items:
            draw_reliability(self.reliability).save(folder / "reliability.png")
        write_json(folder / "results.json", self.to_dict())

    def table(self) -> Table:
        """For rich: `Console().print(report.table())`. Brackets in a path or the name of a task are not markup."""
        from rich.table import Table
        from rich.text import Text

        # The numbers of a calibration are in results.json; here they would fill a line.
        named = {key: "yes" if key == "calibration" else value for key, value in self.about.items()}
        about = ", ".join(f"{key} {value}" for key, value in named.items() if value is not None)
        table = Table(title=Text(about, "table.title"), title_justify="left")
        table.add_column("task", no_wrap=True)
        table.add_column("figure")
        targets, others = (any(getattr(f, part) is not None for f in self.figures) for part in ("target", "published"))
        columns = ["value", "95% interval", "commonest answer", *["target"] * targets, *["published"] * others, "rows"]
        for column in columns:
            table.add_column(column, justify="right", no_wrap=column in ("value", "95% interval", "target"))
        task = None
        for figure in self.figures:
            if task not in (None, figure.task):
                table.add_section()
            mark = {None: "", True: " [green]✓[/green]", False: " [red]✗[/red]"}[figure.reached]
            target = (
                "" if figure.target is None else ("≤ " if figure.lower_is_better else "≥ ") + rounded(figure.target)
            )
            interval = "" if figure.low is None else f"{rounded(figure.low)} … {rounded(figure.high)}"
            table.add_row(
                "" if figure.task == task else Text(figure.task),
                Text(figure.name),
                rounded(figure.value) + mark,
                interval,
                "" if figure.baseline is None else rounded(figure.baseline),
                *[target] * targets,
                *["" if figure.published is None else rounded(figure.published)] * others,
                str(figure.rows),
            )
            task = figure.task
        rows, invalid, unfinished = (
            sum(getattr(c, part) for c in self.counts.values()) for part in ("rows", "invalid", "unfinished")
        )
        table.caption = f"{invalid} of {rows} answers invalid, {unfinished} unfinished; they count as they are"
        return table


def rounded(value: float | None) -> str:
    return "–" if value is None else f"{round(value, 3) + 0.0:.3f}"  # + 0.0: no "-0.000"


def nan_to_none(value: float) -> float | None:
    """For JSON, which has no NaN."""
    return None if math.isnan(value) else float(value)


def environment() -> dict[str, Any]:
    """The machine and the versions that figures were made with."""
    return {
        "machine": platform.platform(),
        "versions": {"paligemma": __version__, **{name: version(name) for name in ("torch", "numpy", "pillow")}},
    }
