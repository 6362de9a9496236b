"""`paligemma batch`: many pictures, on one machine or many."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from paligemma.batch.settings import EXPORTS, FORMATS, MASKS
from paligemma.cli.options import (
    DEFAULT_MAX_PIXELS,
    Beams,
    Device,
    DeviceMap,
    Dtype,
    ForbidRepeats,
    Free,
    ImageSize,
    LocScale,
    MaxNewTokens,
    MaxPixels,
    Model,
    Quantize,
    Revision,
    Temperature,
    TopK,
    TopP,
    check_labels,
    check_order,
    one_of,
    within_cores,
)
from paligemma.cli.output import check_writable, echo_json, note, notes, print_error, say
from paligemma.cli.run import note_embedded_model, note_unusual_prompt, sampling_options
from paligemma.tasks import asks_for_items
from paligemma.terminal import error_line

if TYPE_CHECKING:
    from paligemma.batch.folder import RunFolder
    from paligemma.batch.run import Ended, Progress
    from paligemma.batch.settings import Settings

LOG_EVERY = 30.0  # seconds between two lines of progress where stderr is no terminal


def check_address(ray: str | None) -> str | None:
    """Without an address --ray takes the option that follows it."""
    if ray is not None and ray.startswith("-"):
        raise typer.BadParameter(f"--ray needs an address, or 'local', got {ray}")
    return ray


def batch(
    prompt: Annotated[
        str | None, typer.Argument(help="'caption en', 'detect dog ; cat', ... Rows of --rows may have their own.")
    ] = None,
    inputs: Annotated[
        list[str] | None,
        typer.Argument(
            help="Pictures, folders, patterns, a list.txt of paths ('-': stdin), .tar archives, videos.",
            metavar="INPUT",
        ),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="The folder of the run. The same command again goes on there.")
    ] = None,
    rows: Annotated[
        Path | None, typer.Option(help="Rows in place of INPUT: .jsonl, .csv, .parquet, or an OpenAI batch file.")
    ] = None,
    labels: Annotated[
        str | None, typer.Option(help="With the prompt 'detect' or 'segment': what to look for, 'dog,cat'.")
    ] = None,
    every: Annotated[
        float | None, typer.Option(help="For videos, which need it: seconds from one frame to the next.")
    ] = None,
    model: Model = "tiny",
    revision: Revision = None,
    device: Device = None,
    dtype: Dtype = None,
    quantize: Quantize = None,
    device_map: DeviceMap = None,
    image_size: ImageSize = None,
    loc_scale: LocScale = 1024,
    max_new_tokens: MaxNewTokens = None,
    temperature: Temperature = None,
    top_k: TopK = None,
    top_p: TopP = None,
    beams: Beams = 1,
    seed: Annotated[int | None, typer.Option(min=0, max=2**53, help="Makes sampling repeatable.")] = None,
    free: Free = False,
    forbid_repeats: ForbidRepeats = False,
    max_pixels: MaxPixels = DEFAULT_MAX_PIXELS,
    format: Annotated[
        str, typer.Option(help="Of the files in parts/: jsonl or parquet.", callback=one_of(*FORMATS))
    ] = "jsonl",
    masks: Annotated[
        str, typer.Option(help="rle (run lengths), png (in base64) or none.", callback=one_of(*MASKS))
    ] = "rle",
    draw: Annotated[Path | None, typer.Option(help="Draw boxes and masks over the pictures, into this folder.")] = None,
    coco: Annotated[Path | None, typer.Option(help="In the end, write boxes and masks as a COCO data set.")] = None,
    shard_size: Annotated[
        int, typer.Option(min=1, help="Rows of a shard, the unit of work: one file in parts/.")
    ] = 256,
    batch_size: Annotated[int, typer.Option(min=1, help="Rows answered together.")] = 16,
    workers: Annotated[int, typer.Option(min=1, help="Processes, each with a model of its own.")] = 1,
    threads: Annotated[
        int | None, typer.Option(min=1, help="Threads of each worker. Default: the cores, shared among the workers.")
    ] = None,
    part: Annotated[
        str, typer.Option(help="i/n, i from 1 to n: only the i-th of n shares of the shards, for job arrays.")
    ] = "1/1",
    ray: Annotated[
        str | None,
        typer.Option(help="Work on a Ray cluster: its address, or 'local'.", metavar="ADDRESS", callback=check_address),
    ] = None,
    max_errors: Annotated[str, typer.Option(help="Rows that may fail: a number, or a share such as 5%.")] = "0",
    stop_after_errors: Annotated[int | None, typer.Option(min=1, help="Stop when so many rows have failed.")] = None,
    retry_errors: Annotated[bool, typer.Option("--retry-errors", help="Try the rows again that failed.")] = False,
    dedupe: Annotated[
        bool, typer.Option("--dedupe", help="Answer pictures with equal bytes and an equal prompt once.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Count the rows, answer a few, and estimate the time. Writes nothing.")
    ] = False,
) -> None:
    """Answer PROMPT about many pictures, into the folder --out: a line for each, in parts/*.jsonl.

    A run that is interrupted goes on with the same command. A row that cannot be answered has a line that says why;
    the exit code is 1 then (0 within --max-errors). `paligemma batch status DIR` says how far a run is, and `paligemma
    batch export DIR --to coco FILE` writes its answers for other tools.
    """
    from paligemma.batch.settings import Settings

    sampling_options(temperature, top_k, top_p, beams, seed)
    check_usage(prompt, inputs, rows, out, dry_run, every)
    prompt = with_labels(prompt, labels)
    check_prompt(prompt, inputs, free, forbid_repeats, model)
    if coco is not None and coco.is_dir():
        raise typer.BadParameter(f"--coco {coco} is a folder, expected the name of a file to write")
    allowed = parsed_max_errors(max_errors)
    which = parsed_part(part)
    settings = Settings(
        prompt=prompt, inputs=tuple(absolute_inputs(inputs or [])),
        rows=None if rows is None else str(rows.absolute()), every=every, model=model, revision=revision, device=device,
        dtype=dtype, quantize=quantize, device_map=device_map, image_size=image_size, loc_scale=loc_scale,
        max_new_tokens=max_new_tokens, temperature=temperature, top_k=top_k, top_p=top_p, beams=beams, seed=seed,
        free=free, forbid_repeats=forbid_repeats, max_pixels=max_pixels, format=format, masks=masks,
        shard_size=shard_size, batch_size=batch_size, dedupe=dedupe,
    )  # fmt: skip
    if ray is None:  # a cluster's machines may have more cores than this one
        threads = within_cores(threads)
    if dry_run:
        show_estimate(settings, inputs or [], workers, threads, which)
        return
    assert out is not None
    if coco is not None:
        check_writable(coco, "--coco")
    if draw is not None:
        check_writable(draw / "ID.png", "--draw")
    folder = opened(out, settings, inputs or [])
    if draw is not None:
        check_draw(folder)
    ended = worked(folder, workers, threads, which, draw, ray, stop_after_errors, retry_errors)
    finish(folder, ended, allowed, coco)


def check_usage(
    prompt: str | None,
    inputs: list[str] | None,
    rows: Path | None,
    out: Path | None,
    dry_run: bool,
    every: float | None,
) -> None:
    if rows is not None and inputs:
        raise typer.BadParameter("pictures come from INPUT or from --rows, and not from both")
    if rows is None and prompt is None:
        raise typer.BadParameter("expected PROMPT INPUT..., or --rows FILE")
    if rows is None and not inputs:
        raise typer.BadParameter(f"there is no INPUT after the prompt {prompt!r}: name pictures, folders or a list")
    if out is None and not dry_run:
        raise typer.BadParameter("--out DIR is missing: the folder that the answers are written to")
    if every is not None and not 0 < every < float("inf"):
        raise typer.BadParameter(f"--every is {every:g}, expected a number of seconds above 0")


def check_prompt(prompt: str | None, inputs: list[str] | None, free: bool, forbid_repeats: bool, model: str) -> None:
    """Options that do not fit the prompt are an error, a prompt that is unusual for the model a note."""
    if prompt is not None and inputs:
        check_order(prompt, inputs, "batch", folders=True)
    if prompt is not None:
        check_labels(prompt, free)
    if forbid_repeats and free:
        raise typer.BadParameter("--forbid-repeats is a rule of the grammar, which --free leaves out: choose one")
    if prompt is None:
        return
    if (free or forbid_repeats) and inputs and not asks_for_items(prompt):
        raise typer.BadParameter(
            "--free and --forbid-repeats are for detect and segment: other answers have no grammar"
        )
    if inputs:
        note_unusual_prompt(prompt, model)
        note_embedded_model(model)


def with_labels(prompt: str | None, labels: str | None) -> str | None:
    """The prompt, with the labels of --labels where it is the bare word detect or segment."""
    if labels is None:
        return prompt
    if prompt is None or prompt.strip() not in ("detect", "segment"):
        raise typer.BadParameter(
            "--labels is for the prompt 'detect' or 'segment', and is all of it: leave out the rest"
        )
    names = [name.strip() for name in labels.split(",") if name.strip()]
    if not names:
        raise typer.BadParameter("--labels names nothing to look for")
    return f"{prompt.strip()} {' ; '.join(names)}"


def parsed_max_errors(text: str) -> tuple[float, bool]:
    """The number, and whether it is a share in percent."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)(%?)", text.strip())
    if not found or (not found[2] and "." in found[1]) or (found[2] and float(found[1]) > 100):
        raise typer.BadParameter(f"--max-errors is {text!r}, expected a number of rows, or a share such as 5%")
    return float(found[1]), bool(found[2])


def parsed_part(text: str) -> tuple[int, int]:
    found = re.fullmatch(r"(\d{1,9})/(\d{1,9})", text)
    if not found or not 1 <= int(found[1]) <= int(found[2]):
        raise typer.BadParameter(f"--part is {text!r}, expected i/n, such as 1/4 for the first of four")
    return int(found[1]), int(found[2])


def absolute_inputs(inputs: list[str]) -> list[str]:
    from paligemma.batch.inputs import absolute

    return [absolute(name) for name in inputs]


# ---------------------------------------------------------------------------------------------- the three steps


def rows_of(settings: Settings, inputs: list[str]) -> Iterator[Any]:
    """The rows that the command names."""
    from paligemma.batch.inputs import list_inputs
    from paligemma.batch.row_files import list_rows

    if settings.rows is not None:
        return list_rows(settings.rows, settings.prompt)
    return list_inputs(inputs, settings.prompt or "", settings.every, note)


def opened(out: Path, settings: Settings, inputs: list[str]) -> RunFolder:
    """The folder of the run, with its list frozen. What cannot be a run is an error of usage."""
    from paligemma.batch.folder import AnotherRun, open_run
    from paligemma.batch.inputs import digest_of_lists
    from paligemma.batch.settings import fingerprint_of_model

    with notes.status("looking at the model and the list of pictures"):
        weights = fingerprint_of_model(settings.model, settings.revision, settings.dtype)
        try:
            marks = {"weights": weights, "list": digest_of_lists(settings.inputs, settings.rows)}
            return open_run(out, settings, marks, lambda: rows_of(settings, inputs), note)
        except AnotherRun as error:
            raise typer.BadParameter(str(error)) from None
        except (ValueError, FileExistsError, FileNotFoundError, NotADirectoryError) as error:
            raise typer.BadParameter(error_line(error)) from None


def check_draw(folder: RunFolder) -> None:
    """Rows whose drawings would overwrite each other are an error of usage, before any of them is answered."""
    from paligemma.batch.drawings import check_drawings

    try:
        check_drawings(folder)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None


def worked(
    folder: RunFolder,
    workers: int,
    threads: int | None,
    part: tuple[int, int],
    draw: Path | None,
    ray: str | None,
    stop_after_errors: int | None,
    retry_errors: bool,
) -> Ended:
    """All shards of the part, finished or interrupted."""
    from paligemma import __version__
    from paligemma.batch.run import run_batch
    from paligemma.batch.worker import How

    if ray in (None, "local"):  # this machine's cores say nothing of a cluster's, where each worker reserves one
        threads = threads_of_each(workers, threads)
    how = How(threads, None, part, draw and draw.absolute())
    begun_by = folder.about.get("versions", {}).get("paligemma")
    if begun_by != __version__:
        note(f"note: the run was begun by version {begun_by}, this is {__version__}")
    with progress_line() as show:
        if ray is not None:
            from paligemma.batch.on_ray import run_on_ray

            return run_on_ray(folder, ray, workers, how, stop_after_errors, retry_errors, show, note)
        return run_batch(folder, workers, how, stop_after_errors, retry_errors, show, note)


def threads_of_each(workers: int, threads: int | None) -> int:
    """--threads; by default the cores, shared among the workers."""
    from paligemma.devices import cpu_count

    return threads or max(1, cpu_count() // workers)


def finish(folder: RunFolder, ended: Ended, allowed: tuple[float, bool], coco: Path | None) -> None:
    """Says how it went, and exits with what the errors allow."""
    from paligemma.batch.row_files import is_batch_file

    errors = sum(ended.errors.values())
    kinds = ", ".join(f"{count:,} {kind}" for kind, count in ended.errors.items())
    note(f"{ended.answered:,} rows answered, {errors:,} failed{f' ({kinds})' if kinds else ''}: {folder.path}")
    if waiting := ended.summary.get("rows_in_open_shards"):
        note(f"{waiting:,} more rows stand in shards that are not finished; they are kept")
    if not ended.complete:  # a signal or a failure may also come in the last moment, when every row has its line
        if ended.signal is not None and ended.failure is None:
            note("interrupted; the same command goes on")
            raise typer.Exit(128 + ended.signal)
        stopped = "stopped by --stop-after-errors" if ended.stopped else "the run is not complete"
        print_error(RuntimeError(f"{ended.failure or stopped}. The same command goes on"))
        raise typer.Exit(1)
    if coco is not None and ended.summary["complete"]:
        from paligemma.batch.export import export

        export(folder, "coco", coco)
    if ended.summary["complete"] and is_batch_file(folder.settings.rows):
        from paligemma.batch.export import export

        export(folder, "openai", folder.path / "output.jsonl")
        note(f"answers in OpenAI's format: {folder.path / 'output.jsonl'}")
    limit, is_share = allowed
    if 100 * errors > limit * (ended.answered + errors) if is_share else errors > limit:
        raise typer.Exit(1)  # every row has its line all the same


@contextmanager
def progress_line() -> Iterator[Any]:
    """Yields a function that shows how far the run is: on a terminal a bar, else a line now and then."""
    from rich import progress as rich_progress

    if notes.is_terminal:
        with rich_progress.Progress(
            rich_progress.BarColumn(), rich_progress.TextColumn("{task.description}"), console=notes, transient=True
        ) as bar:
            task = bar.add_task("loading the model", total=None)
            yield lambda now: bar.update(task, completed=now.rows, total=now.total, description=in_words(now))
        return
    last = time.monotonic()

    def log(now: Progress) -> None:
        nonlocal last
        if time.monotonic() - last >= LOG_EVERY:
            last = time.monotonic()
            note(in_words(now))

    yield log


def in_words(now: Progress) -> str:
    left = "" if now.seconds_left is None else f", {duration(now.seconds_left)} left"
    failed = f", {now.errors:,} failed" if now.errors else ""
    return f"{now.rows:,} of {now.total:,} rows{failed}, {now.rate:.3g} rows/s{left}"


def duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def show_estimate(
    settings: Settings, inputs: list[str], workers: int, threads: int | None, part: tuple[int, int]
) -> None:
    """--dry-run: on stdout, since it is asked for. It refuses what a run refuses, and answers as a worker does."""
    from paligemma.batch.estimate import checked_sample, estimate
    from paligemma.batch.worker import How

    with notes.status("answering a few rows"):
        try:
            count, sample = checked_sample(rows_of(settings, inputs), settings.batch_size)
        except (ValueError, FileNotFoundError, NotADirectoryError) as error:
            raise typer.BadParameter(str(error)) from None
        answer = How(threads_of_each(workers, threads)).loaded(settings)
        found = estimate(count, sample, settings, answer, workers, part)
    say(f"{found['rows']:,} rows in {found['shards']:,} shards")
    if found["rows"] and found["asked"]:
        say(f"{found['asked']} of them answered to see how long it takes, {found['failed']} failed")
        say(f"about {found['seconds_per_row']:.3g} s a row, {duration(found['seconds'])} with {found['workers']} "
            f"workers, {found['bytes'] / 1e6:.3g} MB of answers")  # fmt: skip


# ---------------------------------------------------------------------------------------------- status, export


def run_folder(folder: Path) -> RunFolder:
    from paligemma.batch.folder import RunFolder

    try:
        return RunFolder(folder)
    except FileNotFoundError as error:
        raise typer.BadParameter(str(error)) from None


Folder = Annotated[Path, typer.Argument(help="The folder of a run.", metavar="DIR")]


def status(
    folder: Folder, as_json: Annotated[bool, typer.Option("--json", help="The state as one JSON object.")] = False
) -> None:
    """How far a run of `paligemma batch` is."""
    from paligemma.batch.status import status_of

    state = status_of(run_folder(folder))
    if as_json:
        echo_json(state)
        return
    errors = sum(state["errors"].values())
    kinds = ", ".join(f"{count:,} {kind}" for kind, count in sorted(state["errors"].items()))
    say(f"{state['answered'] + errors:,} of {state['rows']:,} rows are done" + (", all" if state["complete"] else ""))
    say(f"{state['answered']:,} answered, {errors:,} failed{f' ({kinds})' if kinds else ''}")
    say(f"{state['shards_done']:,} of {state['shards']:,} shards finished, {state['shards_worked_on']} worked on")
    if state["rows_in_open_shards"]:
        say(f"{state['rows_in_open_shards']:,} more rows stand in shards that are not finished; they are kept")


def export(
    folder: Folder,
    target: Annotated[Path, typer.Argument(help="The file to write; for yolo a folder.", metavar="FILE_OR_FOLDER")],
    to: Annotated[str, typer.Option(help=f"{', '.join(EXPORTS)}.", callback=one_of(*EXPORTS))],
) -> None:
    """Write the answers of a run for other tools."""
    from paligemma.batch.export import export as write

    run = run_folder(folder)
    missing = run.num_shards - len(run.done())
    if missing:
        note(f"note: {missing:,} of {run.num_shards:,} shards are not finished, and are left out")
    note(f"{write(run, to, target):,} rows written: {target}")
