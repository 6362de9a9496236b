"""Did a model learn the world, or only its renderer? Figures that show it, over several sets of scenes of world 2.

    parts = evaluate_parts(pg, count=1000, out_folder="runs/generalization")
    console = Console()
    console.print(*tables(parts, console.width))

The parts: "test" (scenes as in training), "heldout" (held-out pairs and tints), "emojione" (an artist never seen),
"clean" (the scenes of "test" without degradations), and one for each degradation: the same scenes with it alone, at its
middle strength. All but the first three are compared with "clean" only. Each part is an evaluation of its own, with its
predictions, figures and worst rows in a folder of its own; a run that was interrupted continues there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from paligemma.evaluate import Figure, Report, evaluate
from paligemma.evaluate.intervals import bootstrap
from paligemma.evaluate.report import nan_to_none
from paligemma.files import read_json, write_json
from paligemma.tiny.degradations import DEGRADATIONS
from paligemma.tiny.evaluation import METRICS, ROWS_PER_SCENE, targets, tiny_examples

if TYPE_CHECKING:
    from rich.table import Table

    from paligemma.inference import PaliGemma

MIDDLE = 0.5  # strength of a degradation that is tested alone
LOSS_ALLOWED = 0.04  # of each figure, by one degradation

# The figures of the table: those that have an aim.
FIGURES = tuple(targets("test", world=2))


@dataclass(frozen=True)
class Part:
    """One set of scenes."""

    name: str
    split: str = "test"
    degradations: Sequence[tuple[str, float]] | None = None  # None: those of the scenes' seeds

    @property
    def has_targets(self) -> bool:
        return self.name in ("test", "heldout", "emojione")


PARTS = (
    Part("test"),
    Part("heldout", "heldout"),
    Part("emojione", "emojione"),
    Part("clean", degradations=()),
    *(Part(name, degradations=((name, MIDDLE),)) for name in DEGRADATIONS),
)


def evaluate_parts(
    pg: PaliGemma,
    count: int = 1000,
    names: Sequence[str] | None = None,
    out_folder: str | Path | None = None,
    about: Mapping[str, Any] | None = None,
    **options: Any,
) -> dict[str, Report]:
    """{part: its report}, in the order of PARTS.

    count:      scenes of each part.
    names:      only these parts.
    out_folder: a folder for each part is made in it, and `table.json` with all figures, also those of other parts from
                earlier calls; of each part it says what was measured.
    about:      what is evaluated (model, dtype, ...), for the reports.
    options:    of `evaluate`, such as batch_size.

    Raises ValueError for the name of a part that there is not.
    """
    check_names(names)
    file = Path(out_folder) / "table.json" if out_folder is not None else None
    before = read_json(file) if file is not None and file.exists() else {}  # a damaged one is told now
    reports = {}
    for part in PARTS:
        if names and part.name not in names:
            continue
        reports[part.name] = evaluate(
            pg,
            tiny_examples(count, part.split, world=2, degradations=part.degradations),
            METRICS,
            targets=targets(part.split, world=2) if part.has_targets else None,
            about={**(about or {}), "data": f"world 2, {part.name}", "count": count},
            out_folder=Path(out_folder) / part.name if out_folder is not None else None,
            total=round(count * ROWS_PER_SCENE),
            **options,
        )
    if file is not None:
        table = to_dict(reports)
        table["about"] = {name: {**report.about, **report.environment} for name, report in reports.items()}
        write_json(file, {key: before.get(key, {}) | table[key] for key in table})
    return reports


def check_names(names: Sequence[str] | None) -> None:
    """Raises ValueError for a name that no part has."""
    for name in names or ():
        if name not in {part.name for part in PARTS}:
            raise ValueError(f"unknown part {name!r}; there is: {', '.join(part.name for part in PARTS)}")


def to_dict(reports: Mapping[str, Report]) -> dict[str, Any]:
    """{part: {"task: figure": value}}, and the losses against "clean", with their intervals and the largest of each."""
    values = {name: {f"{f.task}: {f.name}": f.value for f in report.figures} for name, report in reports.items()}
    lost = {name: loss for name in values if name in DEGRADATIONS and (loss := largest_loss(reports, name)) is not None}
    paired = {
        name: {
            f"{task}: {figure}": dict(zip(("loss", "low", "high"), map(nan_to_none, interval)))
            for task, figure in FIGURES
            if (interval := paired_loss(reports["clean"], reports[name], task, figure)) is not None
        }
        for name in lost
    }
    return {
        "figures": values,
        "losses": paired,
        "largest_loss": {name: {"figure": key, "loss": loss} for name, (key, loss) in lost.items()},
    }


def largest_loss(reports: Mapping[str, Report], name: str) -> tuple[str, float] | None:
    """The figure that a degradation costs most, and how much; None without "clean" to compare with."""
    if "clean" not in reports:
        return None
    losses = []
    for task, figure in FIGURES:
        before, after = (_figure(reports[part], task, figure) for part in ("clean", name))
        if before is None or after is None or before.value is None or after.value is None:
            continue
        loss = after.value - before.value if before.lower_is_better else before.value - after.value
        losses.append((loss, f"{task}: {figure}"))
    return (max(losses)[1], max(losses)[0]) if losses else None


def paired_loss(clean: Report, degraded: Report, task: str, figure: str) -> tuple[float, float, float] | None:
    """What a degradation costs, over the rows that were asked of both pictures, and the ends of its 95% interval.

    Both runs saw the same scenes, so the interval resamples scenes, each with its answers before and after: it is much
    narrower than those of the two figures. None where there is no row to compare.
    """
    before, after = (report.shares.get((task, figure), {}) for report in (clean, degraded))
    rows = [row for row in before if row in after]
    numbers = np.array([[*before[row][1:], *after[row][1:]] for row in rows]).reshape(-1, 4)
    if not numbers[:, 1].sum() or not numbers[:, 3].sum():
        return None
    sign = -1 if "error" in figure else 1

    def loss(weights: np.ndarray) -> float:
        a, b, c, d = weights @ numbers
        return float(sign * (a / b - c / d)) if b and d else float("nan")

    return loss(np.ones(len(rows))), *bootstrap(loss, [before[row][0] for row in rows], samples=500)


def _figure(report: Report, task: str, name: str) -> Figure | None:
    return next((figure for figure in report.figures if (figure.task, figure.name) == (task, name)), None)


def tables(reports: Mapping[str, Report], width: int) -> list[Table]:
    """For rich: a row for each figure, a column for each part; ✓ and ✗ where there is an aim. As many tables, one below
    the other, as it takes to fit into `width` columns of text.

    Figures after a degradation are marked ✗ where they lose more than `LOSS_ALLOWED` against "clean".
    """
    from rich.table import Table

    names = list(reports)
    left = max(len(task) for task, _ in FIGURES) + max(len(figure) for _, figure in FIGURES) + 7  # with their lines
    column = max(len("0.123 ✓"), *map(len, names)) + 3
    beside = max(1, (width - left) // column)
    made = []
    for first in range(0, len(names), beside):
        shown = names[first : first + beside]
        table = Table(title="world 2" if first == 0 else None, title_justify="left")
        for name in ("task", "figure"):
            table.add_column(name, no_wrap=True)
        for name in shown:
            table.add_column(name, justify="right", no_wrap=True)
        last = None
        for task, figure in FIGURES:
            cells = [_cell(reports, name, task, figure) for name in shown]
            table.add_row("" if task == last else task, figure, *cells)
            last = task
        made.append(table)
    return made


def _cell(reports: Mapping[str, Report], name: str, task: str, figure: str) -> str:
    found = _figure(reports[name], task, figure)
    if found is None or found.value is None:
        return "–"
    reached = found.reached
    clean = _figure(reports["clean"], task, figure) if name in DEGRADATIONS and "clean" in reports else None
    if clean is not None and clean.value is not None:
        loss = (found.value - clean.value) * (1 if found.lower_is_better else -1)
        reached = False if loss > LOSS_ALLOWED else None
    return f"{found.value:.3f}" + {None: "", True: " [green]✓[/green]", False: " [red]✗[/red]"}[reached]
