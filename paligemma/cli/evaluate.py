"""`paligemma evaluate`: how good a model is."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from paligemma.cli.options import (
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
    Model,
    Revision,
)
from paligemma.cli.output import echo_json, hint_at_float32, print_table
from paligemma.data.options import DataOptions


def evaluate(
    model: Model = "tiny",
    data: Annotated[
        str,
        typer.Option(
            help="tiny, tiny:heldout, tiny:twemoji (the small world; a folder of this name is ./tiny), your rows, or a "
            "benchmark's folder."
        ),
    ] = "tiny",
    task: Annotated[
        str | None, typer.Option(help="A benchmark (textvqa, nlvr2, ...), or a metric for your rows (vqa, exact, ...).")
    ] = None,
    split: Annotated[str | None, typer.Option(help="Of a benchmark, or of a folder with several.")] = None,
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
    device: Device = None,
    dtype: Dtype = None,
    revision: Revision = None,
    as_json: Annotated[bool, typer.Option("--json", help="The results as one JSON object.")] = False,
) -> None:
    """Measure a model: a table of metrics with 95% intervals, beside baselines, targets and published figures.

    On scenes of the small world; on your own rows (as for `train`), by the metric that --task names; or on a published
    benchmark in the folder --data, with the prompt, decoding and metric of PaliGemma's transfers.
    """
    from paligemma.evaluate.benchmarks import BENCHMARKS, check_benchmark, evaluate_benchmark, resolved_split
    from paligemma.evaluate.output_folder import check_folder
    from paligemma.inference import load

    def opened() -> Any:  # after the data: what is wrong with them, or with --out, is told at once
        if out is not None:
            check_folder(out)
        pg = load(model, device=device, dtype=dtype, revision=revision)
        hint_at_float32(pg)
        return pg

    options: dict[str, Any] = {"batch_size": batch_size, "out_folder": out}
    about: dict[str, Any] = {"model": model, "data": data, "dtype": dtype}
    scenes = data.partition(":")[0] == "tiny"  # whatever lies here: a folder of this name is ./tiny
    if task in BENCHMARKS and not scenes:
        if (
            free
            or max_new_tokens
            or kind
            or images
            or annotations
            or image_name
            or every_label
            or language != DataOptions.language
        ):
            raise typer.BadParameter(f"how {task} is read and decoded is part of it: leave out the options for rows")
        split = resolved_split(task, split)
        if split in BENCHMARKS[task].hidden and out is None:
            raise typer.BadParameter(
                f"the answers to {task}/{split} are kept on a server: --out FOLDER saves the predictions to send there"
            )
        check_benchmark(task, data, split)
        report = evaluate_benchmark(opened(), task, data, split, count=count, about=about, **options)
    elif scenes:
        from paligemma.evaluate import evaluate as run_evaluation
        from paligemma.tiny.evaluation import METRICS, ROWS_PER_SCENE, targets, tiny_examples

        world = data.partition(":")[2] or "test"
        if world not in ("test", "heldout", "twemoji"):
            raise typer.BadParameter(f"--data is {data!r}, expected tiny, tiny:heldout or tiny:twemoji")
        if task or split:
            raise typer.BadParameter("the small world has its own tasks: --task and --split are for other --data")
        count = count or 1000
        report = run_evaluation(
            opened(),
            tiny_examples(count, world),
            METRICS,
            targets=targets(world),
            about={**about, "data": f"tiny:{world}"},
            constrained=not free,
            max_new_tokens=max_new_tokens,
            total=round(count * ROWS_PER_SCENE),
            **options,
        )
    else:
        from paligemma.data.checkpoint import codec_of
        from paligemma.evaluate.own_rows import evaluate_rows, metric_of_task

        metric = metric_of_task(task)
        source = DataOptions(data, kind, images, annotations, image_name, split, language, every_label)
        about |= source.how()
        rows = source.open(codec_of(model, revision, kind))
        report = evaluate_rows(
            opened(),
            rows,
            metric,
            count=count,
            about=about,
            constrained=not free,
            max_new_tokens=max_new_tokens,
            **options,
        )
    if as_json:
        echo_json(report.to_dict())
    else:
        print_table(report.table())
