"""`paligemma tiny`: the small world and the model that ships."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from paligemma.cli.options import Device, Dtype, Model, Revision, Seed, World, device_in, one_of, world_of
from paligemma.cli.output import echo_json, hint_at_float32, note, output


def scenes(
    out: Annotated[Path, typer.Option(help="The folder to write; it must not exist or be empty.")],
    count: Annotated[int, typer.Option(min=1, help="How many pictures.")] = 20,
    split: Annotated[
        str,
        typer.Option(
            help="train, val, test, heldout; in world 1 twemoji, in world 2 emojione: an artist kept for tests.",
            callback=one_of("train", "val", "test", "heldout", "twemoji", "emojione"),
        ),
    ] = "test",
    world: World = None,
    size: Annotated[int, typer.Option(min=64, help="Side of the pictures in pixels.")] = 384,
    seed: Seed = 0,
    task: Annotated[
        str | None,
        typer.Option(
            help="count_color: count the objects of a colour, which the model was not taught; scenes of world 1. "
            "Default: all its tasks."
        ),
    ] = None,
    questions: Annotated[
        int, typer.Option(min=1, help="How many questions about each picture, with --task count_color.")
    ] = 1,
    most: Annotated[
        int, typer.Option(min=1, max=5, help="Largest count of the colour asked about, with --task count_color.")
    ] = 5,
    apart: Annotated[
        bool, typer.Option("--apart", help="No object hides a part of another, with --task count_color.")
    ] = False,
) -> None:
    """Write pictures of the small world with prompts and answers (JSONL) and COCO annotations."""
    if task == "count_color" and world == 2:
        raise typer.BadParameter("--task count_color is of world 1")
    world = 1 if task == "count_color" else world_of(world)
    if split == ("twemoji", "emojione")[2 - world]:
        raise typer.BadParameter(f"--split {split} is of world {3 - world}")
    if task not in (None, "count_color"):
        raise typer.BadParameter(
            f"--task is {task!r}, expected count_color; leave it out for the tasks that the model knows"
        )
    if task == "count_color":
        from paligemma.tiny.color_counts import write_color_counts

        write_color_counts(count, out, split=split, size=size, seed=seed, questions=questions, most=most, apart=apart)
        note(f"written: {out}")
        return
    if questions != 1 or most != 5 or apart:
        raise typer.BadParameter("--questions, --most and --apart are for --task count_color")

    from paligemma.tiny.scenes import write_scenes

    write_scenes(count, out, split=split, size=size, seed=seed, world=world)
    note(f"written: {out}")


def train(
    minutes: Annotated[float, typer.Option(min=0.1, help="How long to train. Run the command again to continue.")] = 30,
    out: Annotated[Path, typer.Option(help="Folder for state, log and the packaged checkpoint.")] = Path("runs/tiny"),
    world: World = None,
    in_all: Annotated[
        float | None,
        typer.Option(
            min=0.1,
            help="Minutes of one long training that this run is a piece of; the learning rate follows all of it. "
            "Default: each run is whole.",
        ),
    ] = None,
    start: Annotated[
        str | None,
        typer.Option("--from", metavar="MODEL", help="Begin with the weights of this model, e.g. tiny."),
    ] = None,
    device: Annotated[
        str,
        typer.Option(help="cpu, cuda or mps. A GPU gets larger batches.", callback=device_in("cuda", "mps", "cpu")),
    ] = "cpu",
) -> None:
    """Train an embedded model from scratch, or continue where the last run stopped."""
    from paligemma.tiny.recipe.settings import RECIPES
    from paligemma.tiny.recipe.train import train as train_tiny

    try:
        train_tiny(minutes, out, recipe=RECIPES[world_of(world)], device=device, in_all=in_all, start=start)
    except KeyboardInterrupt as stop:
        note(str(stop) or "stopped")
        raise typer.Exit(getattr(stop, "exit_code", 130)) from None


def evaluate(
    model: Model = "tiny",
    count: Annotated[int, typer.Option(min=1, help="How many scenes in each part.")] = 1000,
    part: Annotated[
        list[str] | None,
        typer.Option(
            help="Only this part; can be repeated: test, heldout, emojione, clean, or a degradation. What "
            "degradations cost is reported if clean is named in the same call."
        ),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder for predictions, figures and the worst rows; a run continues there.")
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="How many rows are answered at a time.")] = 16,
    device: Device = None,
    dtype: Dtype = None,
    revision: Revision = None,
    as_json: Annotated[bool, typer.Option("--json", help="The figures as one JSON object.")] = False,
) -> None:
    """Measure how well a model generalizes in world 2: held-out pairs, an unseen artist, each degradation alone."""
    from paligemma.inference import load
    from paligemma.tiny.generalization import check_names, evaluate_parts, tables, to_dict

    try:
        check_names(part)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    pg = load(model, device=device, dtype=dtype, revision=revision)
    hint_at_float32(pg)
    about = {"model": model, "dtype": dtype}
    reports = evaluate_parts(pg, count, part, out, about, batch_size=batch_size)
    if as_json:
        echo_json(to_dict(reports))
    else:
        console = output()
        for table in tables(reports, console.width):
            console.print(table)
