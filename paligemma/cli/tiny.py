"""`paligemma tiny`: the small world and the model that ships."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from paligemma.cli.options import Seed, one_of
from paligemma.cli.output import note


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
    world: Annotated[
        int,
        typer.Option(
            min=1, max=2, help="1: the world of the model that ships. 2: more artists, variety, degradations."
        ),
    ] = 1,
    size: Annotated[int, typer.Option(min=64, help="Side of the pictures in pixels.")] = 384,
    seed: Seed = 0,
    task: Annotated[
        str | None,
        typer.Option(
            help="count_color: count the objects of a colour, which the model was not taught. Default: all its tasks."
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
    if split == ("twemoji", "emojione")[2 - world]:
        raise typer.BadParameter(f"--split {split} is of world {3 - world}")
    if task not in (None, "count_color"):
        raise typer.BadParameter(
            f"--task is {task!r}, expected count_color; leave it out for the tasks that the model knows"
        )
    if task == "count_color" and world != 1:
        raise typer.BadParameter("--task count_color is of world 1")
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
) -> None:
    """Train the embedded model from scratch, or continue where the last run stopped."""
    from paligemma.tiny.recipe.train import train as train_tiny

    train_tiny(minutes, out)
