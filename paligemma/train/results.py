"""What a run leaves behind: the saved model, its final figures, report.html and finished.json."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from paligemma.evaluate.report import Report, rounded
from paligemma.files import write_json
from paligemma.train.options import TrainOptions
from paligemma.train.run_folder import FINISHED, read_log, write_log
from paligemma.train.run_report import write_report
from paligemma.train.setup import compute_dtype_of
from paligemma.train.validation import Validation, figures_of
from paligemma.weights.adapters import save_adapter
from paligemma.weights.saving import save_pretrained

if TYPE_CHECKING:
    from paligemma.inference import PaliGemma

LogEntries = list[dict[str, Any]]


def check_learned(out: Path) -> None:
    """OSError if no row of any step could be read: the model is as it was, and that is no result."""
    log = read_log(out)
    skipped = [entry for entry in log if "skipped" in entry]
    if skipped and not any("loss" in entry for entry in log):
        last = skipped[-1]
        raise OSError(
            f"nothing was learned, since no picture could be read; the last of {len(skipped):,} rows that were left "
            f"out: {last['skipped']}: {last['error']}. Once they are there, begin anew with --no-resume"
        )


def save_model(pg: PaliGemma, options: TrainOptions, out: Path, dtype: torch.dtype) -> None:
    """The model as checkpoints are published, with its processor."""
    pg.calibration = None  # the one that it had was of other weights
    if options.lora:
        model: Any = pg.model  # peft has added an attribute
        model.peft_config["default"].revision = options.revision
        save_adapter(pg.model, out, options.model, pg.processor)
    else:
        pg.model.to(dtype)
        save_pretrained(pg.model, out, pg.processor)
        # What was saved is measured: the rounded weights, in the dtype in which the steps were computed.
        pg.model.to(compute_dtype_of(options, dtype, pg.model.device))


def finish(
    options: TrainOptions, pg: PaliGemma, out: Path, validation: Validation | None, say: Callable[[str], None]
) -> dict[str, Any]:
    """Measure the saved model, and write the report and finished.json, whose content is returned."""
    pg.model.eval()
    own_rows = options.validation is not None
    report, examples = validation.measure("final") if validation is not None else (None, [])
    measured = report if own_rows else None
    log = read_log(out)
    steps = [entry for entry in log if "loss" in entry]
    if measured is not None and steps:  # the end of the curve
        step = steps[-1]["step"]
        log = [entry for entry in log if entry["step"] != step or "validation" not in entry]  # of a run killed below
        log.append({"step": step, "validation": figures_of(measured), "time": time.time()})
        write_log(out, log)
    summary = summary_of(log, options.batch)
    summary["peak memory"] = f"{peak_memory(pg.model.device) / 1e9:.2f} GB"
    write_report(
        out / "report.html",
        f"{options.model} fine-tuned on {Path(options.data).name}",
        {key: f"{value:,}" if isinstance(value, (int, float)) else str(value) for key, value in summary.items()},
        log,
        measured.figures if measured is not None else [],
        examples,
        asdict(options),
        note_on_figures(options, validation),
    )
    content = {
        "summary": summary,
        "figures of": "validation" if own_rows else "rows it was trained on",
        "figures": [vars(figure) for figure in report.figures] if report is not None else [],
    }
    write_json(out / FINISHED, content)
    for line in in_words(measured) if measured is not None else []:
        say(line)
    say(f"the {'adapter' if options.lora else 'model'} is in {out}; look at {out / 'report.html'}")
    return content


def summary_of(log: LogEntries, batch: int) -> dict[str, Any]:
    steps = [entry for entry in log if "loss" in entry]
    last: dict[str, Any] = steps[-1] if steps else {"step": 0}
    return {
        "steps": last["step"],
        "rows seen": last["step"] * batch,
        "last loss": round(last["loss"], 4) if steps else None,
        "seconds of training": round(sum(entry["seconds"] for entry in steps), 1),
        "rows skipped": sum("skipped" in entry for entry in log),
    }


def note_on_figures(options: TrainOptions, validation: Validation | None) -> str:
    """What rows and what weights the figures in the report are of."""
    if options.validation is None or validation is None:
        return "There was no validation data; the examples are rows it was trained on."
    what = "adapter" if options.lora else "model"
    note = f"Figures and examples are of the {what} as it was saved: greedy answers to {len(validation.rows)} rows of "
    note += f"{options.validation}."
    if options.quantize:
        note += f" The weights beside it were rounded to {options.quantize}; beside whole ones answers may differ."
    return note


def in_words(report: Report) -> list[str]:
    """A line for each metric: "validation, 6 rows by exact: share of exact answers 1.000 (95%: 0.610 … 1.000)"."""
    lines = []
    for task, counts in report.counts.items():
        figures = []
        for figure in report.figures:
            if figure.task == task and figure.value is not None:
                name = "share of exact answers" if figure.name == "exact" else figure.name
                interval = "" if figure.low is None else f" (95%: {rounded(figure.low)} … {rounded(figure.high)})"
                figures.append(f"{name} {rounded(figure.value)}{interval}")
        rows = "1 row" if counts.rows == 1 else f"{counts.rows:,} rows"
        lines.append(f"validation, {rows} by {task}: {', '.join(figures)}")
    return lines


def peak_memory(device: torch.device) -> float:
    """Bytes: of the GPU if the model is on one, else of this process."""
    if device.type == "cuda":
        return float(torch.cuda.max_memory_allocated(device))
    try:
        import resource
    except ImportError:  # Windows
        return 0.0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return float(peak if sys.platform == "darwin" else peak * 1024)
