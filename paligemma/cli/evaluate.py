"""`paligemma evaluate`: how good a model is."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from paligemma.cli.options import (
    DEFAULT_MAX_PIXELS,
    Annotations,
    Device,
    Dtype,
    EveryLabel,
    Free,
    ImageName,
    Images,
    Kind,
    Language,
    MaxNewTokens,
    MaxPixels,
    Model,
    Revision,
    World,
    pixels,
    world_of,
)
from paligemma.cli.output import check_writable, echo_json, hint_at_float32, note, print_table
from paligemma.data.options import DataOptions

if TYPE_CHECKING:
    from paligemma.evaluate.report import Report
    from paligemma.inference import PaliGemma


def evaluate(
    model: Model = "tiny",
    data: Annotated[
        str,
        typer.Option(
            help="tiny, tiny:val, tiny:heldout, tiny:emojione (the small world; in world 1 tiny:twemoji; a folder of "
            "this name is ./tiny), your rows, or a benchmark's folder."
        ),
    ] = "tiny",
    world: World = None,
    task: Annotated[
        str | None, typer.Option(help="A benchmark (textvqa, nlvr2, ...), or a metric for your rows (vqa, exact, ...).")
    ] = None,
    split: Annotated[str | None, typer.Option(help="The split of a benchmark, or of a folder with several.")] = None,
    count: Annotated[int | None, typer.Option(min=1, help="The first rows alone; scenes: 1000 by default.")] = None,
    out: Annotated[Path | None, typer.Option(help="Predictions, results and the worst rows; go on there.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Rows answered at a time.")] = 16,
    max_new_tokens: MaxNewTokens = None,
    free: Free = False,
    kind: Kind = None,
    images: Images = None,
    annotations: Annotations = None,
    image_name: ImageName = None,
    language: Language = DataOptions.language,
    every_label: EveryLabel = False,
    max_pixels: MaxPixels = DEFAULT_MAX_PIXELS,
    calibrate: Annotated[
        bool,
        typer.Option(
            "--calibrate",
            help="Fit the scores of boxes and masks to how often they are right: calibration.json beside the model.",
        ),
    ] = False,
    device: Device = None,
    dtype: Dtype = None,
    revision: Revision = None,
    as_json: Annotated[bool, typer.Option("--json", help="The results as one JSON object.")] = False,
) -> None:
    """Measure a model: a table of metrics with 95% intervals, beside baselines, targets and published figures.

    On scenes of the small world; on your own rows (as for `train`), by the metric that --task names; or on a published
    benchmark in the folder --data, with the prompt, decoding and metric of PaliGemma's own fine-tunings.
    """
    from paligemma.evaluate.benchmarks import BENCHMARKS
    from paligemma.evaluate.metrics import METRICS

    options: dict[str, Any] = {"batch_size": batch_size, "out_folder": out}
    about: dict[str, Any] = {"model": model, "data": data, "dtype": dtype}
    row_options: dict[str, Any] = {"constrained": not free, "max_new_tokens": max_new_tokens}
    source = DataOptions(data, kind, images, annotations, image_name, split, language, every_label)

    folder = _own_folder(model) if calibrate else None

    def loaded() -> PaliGemma:  # called after the data were checked: mistakes in them, or in --out, are found at once
        from paligemma.answers.scores import CALIBRATION_FILE
        from paligemma.evaluate.output_folder import check_folder
        from paligemma.inference import load

        if out is not None:
            check_folder(out)
        if folder is not None:
            check_writable(folder / CALIBRATION_FILE, "--calibrate")
        pg = load(model, device=device, dtype=dtype, revision=revision)
        hint_at_float32(pg)
        if folder is not None:
            pg.calibration = None  # the map is fitted to what the model says by itself
        return pg

    if calibrate and data.partition(":")[0] == "tiny" and data != "tiny:val":
        raise typer.BadParameter(f"--calibrate does not fit to {data}: use --data tiny:val, or rows of your own")
    if data.partition(":")[0] == "tiny":  # even if there is a folder of this name: that is ./tiny
        if task or split:
            raise typer.BadParameter("the small world has its own tasks: --task and --split are for other --data")
        if max_pixels != DEFAULT_MAX_PIXELS:
            raise typer.BadParameter("the pictures of the small world are all small: leave out --max-pixels")
        if source != DataOptions(data):
            raise typer.BadParameter("the small world makes its own rows: leave out the options for how rows are read")
        report = _on_scenes(loaded, data, world_of(world), count or 1000, about, **row_options, **options)
    elif world is not None:
        raise typer.BadParameter("--world is for the scenes of the small world, --data tiny")
    elif calibrate and task in BENCHMARKS:
        raise typer.BadParameter(
            f"--calibrate does not fit to {task}: figures are reported on it. Use rows of your own, and no --task"
        )
    elif calibrate and task is not None and task not in (scored := [name for name in METRICS if METRICS[name].scores]):
        raise typer.BadParameter(
            f"--calibrate is for the scores of boxes and masks, and --task {task} has none: expected one of "
            f"{', '.join(scored)}, or no --task"
        )
    elif task in BENCHMARKS:
        if free or max_new_tokens or max_pixels != DEFAULT_MAX_PIXELS or source != DataOptions(data, split=split):
            raise typer.BadParameter(f"how {task} is read and decoded is part of it: leave out the options for rows")
        report = _on_benchmark(loaded, task, source, count=count, about=about, **options)
    else:
        row_options["max_pixels"] = pixels(max_pixels)
        report = _on_rows(
            loaded, task, source, model, revision, calibrate, about, count=count, **row_options, **options
        )
    if as_json:
        echo_json(report.to_dict())
    else:
        print_table(report.table())
    if folder is not None:
        _calibrate(report, folder)


def _own_folder(model: str) -> Path:
    """The user's own folder of a checkpoint, to which a calibration can be written."""
    path = Path(model).expanduser()
    if model != "tiny" and (path.is_dir() or path.is_file()):  # a folder of that name is ./tiny
        return path if path.is_dir() else path.parent
    raise typer.BadParameter(
        f"--calibrate writes calibration.json beside the model, and {model} is no folder of yours: make it one with "
        f"`paligemma convert {model} FOLDER`"
    )


def _calibrate(report: Report, folder: Path) -> None:
    """Fit the maps to the items of a report, and write them."""
    from paligemma.answers.scores import CALIBRATION_FILE, IDENTITY, Calibration
    from paligemma.evaluate.calibration import expected_calibration_error, fitted
    from paligemma.files import write_json

    kinds = {
        kind: [item for task, items in report.items.items() if (task in report.mask_tasks) == masks for item in items]
        for kind, masks in (("boxes", False), ("masks", True))
    }
    file = folder / CALIBRATION_FILE
    calibration = fitted(**kinds, before=Calibration.load(file) if file.exists() else IDENTITY)
    write_json(file, calibration.to_dict())
    for kind, items in kinds.items():
        if items:
            mapped = [(calibration(score, mask=kind == "masks"), right) for score, right in items]
            before, after = expected_calibration_error(items), expected_calibration_error(mapped)
            note(f"{kind}: calibration error {before:.3f} without a map, {after:.3f} with it, on these {len(items):,}")
    note(f"written: {file}")


def _on_scenes(
    loaded: Callable[[], PaliGemma], data: str, world: int, count: int, about: dict[str, Any], **options: Any
) -> Report:
    """`count` scenes of the small world; data: "tiny" or "tiny:SPLIT"."""
    from paligemma.evaluate import evaluate as run_evaluation
    from paligemma.tiny.evaluation import METRICS, ROWS_PER_SCENE, targets, tiny_examples

    split = data.partition(":")[2] or "test"
    artist = ("twemoji", "emojione")[world - 1]  # of whom only tests show drawings
    if split not in ("test", "val", "heldout", artist):
        raise typer.BadParameter(
            f"--data is {data!r}, expected tiny, tiny:val, tiny:heldout or tiny:{artist} in world {world}"
        )
    return run_evaluation(
        loaded(),
        tiny_examples(count, split, world=world),
        METRICS,
        targets=targets(split, world),
        about={**about, "data": f"tiny:{split}", "world": world},
        total=round(count * ROWS_PER_SCENE),
        **options,
    )


def _on_benchmark(loaded: Callable[[], PaliGemma], task: str, source: DataOptions, **options: Any) -> Report:
    """A published benchmark; source: its folder and split."""
    from paligemma.evaluate.benchmarks import BENCHMARKS, check_benchmark, evaluate_benchmark, resolved_split

    try:
        split = resolved_split(task, source.split)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    if split in BENCHMARKS[task].hidden and options["out_folder"] is None:
        raise typer.BadParameter(
            f"the answers to {task}/{split} are kept on a server: --out FOLDER saves the predictions to send there"
        )
    check_benchmark(task, source.data, split)
    return evaluate_benchmark(loaded(), task, source.data, split, **options)


def _on_rows(
    loaded: Callable[[], PaliGemma],
    task: str | None,
    source: DataOptions,
    model_name: str,
    revision: str | None,
    calibrate: bool,
    about: dict[str, Any],
    **options: Any,
) -> Report:
    """The user's own rows, by the metric that `task` names."""
    from paligemma.data.checkpoint import codec_of
    from paligemma.evaluate.own_rows import asks_for_scores, evaluate_rows, metric_of_task

    try:
        metric = metric_of_task(task)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    rows = source.open(codec_of(model_name, revision, source.kind))
    if calibrate and not asks_for_scores(rows, metric, options["count"]):
        raise typer.BadParameter(
            f"--calibrate is for the scores of boxes and masks, and no row of {source.data} asks for any"
        )
    return evaluate_rows(loaded(), rows, metric, about={**about, **source.how()}, **options)
