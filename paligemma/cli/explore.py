"""`paligemma explore`: look inside the model while it answers."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.progress import Progress
from rich.text import Text

from paligemma.cli.options import (
    DEFAULT_MAX_PIXELS,
    DTYPES,
    Device,
    ImageSize,
    MaxPixels,
    Model,
    Quantize,
    Revision,
    Threads,
    check_order,
    one_of,
    picture_named,
    pixels,
)
from paligemma.cli.output import check_writable, echo_json, note, notes, say

if TYPE_CHECKING:
    from paligemma.explore import Attention, KnockOut, Look, Stage


COARSE = 4  # blocks in a row of the picture with --coarse


def explore(
    prompt: Annotated[
        str | None, typer.Argument(metavar="PROMPT", help="'caption en', 'answer en what is this ?', 'detect dog', ...")
    ] = None,
    image: Annotated[str | None, typer.Argument(metavar="IMAGE", help="The picture.")] = None,
    out: Annotated[Path | None, typer.Option(help="The page to write, such as look.html.")] = None,
    model: Model = "tiny",
    answer: Annotated[str | None, typer.Option(help="Look at this answer instead of the model's own.")] = None,
    compare: Annotated[
        str | None, typer.Option(help="Another picture for the same prompt: what makes the answers differ?")
    ] = None,
    knock_out: Annotated[
        bool | None,
        typer.Option(
            "--knock-out/--no-knock-out",
            help="Measure what each patch is needed for (a pass of the model each) and the routes (hundreds). "
            "Default: for small models, and on CUDA.",
        ),
    ] = None,
    coarse: Annotated[
        bool,
        typer.Option("--coarse", help="Knock out 16 blocks of the picture (4 x 4), a pass each, for large models."),
    ] = False,
    window: Annotated[
        int,
        typer.Option(
            min=1, help="Side of the square of patches, and number of layers, that are changed together; odd."
        ),
    ] = 3,
    max_mb: Annotated[float, typer.Option(min=0.1, help="Size of the page at most; a larger one is made coarser.")] = 8,
    as_json: Annotated[bool, typer.Option("--json", help="Print the numbers instead of writing a page.")] = False,
    check: Annotated[
        tuple[int, str] | None,
        typer.Option(
            "--check", metavar="N ANSWER", help="Is this the answer to the exercise of chapter N of the course?"
        ),
    ] = None,
    device: Device = None,
    dtype: Annotated[
        str | None,
        typer.Option(
            help="bfloat16, float16 or float32. Default: float32 for tiny and with --check, else as for `run`.",
            callback=one_of(*DTYPES),
        ),
    ] = None,
    quantize: Quantize = None,
    revision: Revision = None,
    image_size: ImageSize = None,
    max_pixels: MaxPixels = DEFAULT_MAX_PIXELS,
    threads: Threads = None,
) -> None:
    """Write a page that shows how the model came to its answer to PROMPT about IMAGE.

    Attention, what each patch would say, what each word needs, where box edges are, by which way the picture
    reaches the answer. The page is one file that needs no network.
    """
    if check is not None:
        others = (prompt, out, compare, answer, quantize, revision, image_size, knock_out)
        numbers_given = (window, max_mb, max_pixels) != (3, 8, DEFAULT_MAX_PIXELS)
        if as_json or coarse or numbers_given or any(other is not None for other in others):
            raise typer.BadParameter(
                "--check takes the exercise and the answer: paligemma explore --check 2 12 (and --model, --dtype)"
            )
        check_exercise(*check, model, device, dtype, threads)
        return
    if prompt is None or image is None:
        raise typer.BadParameter(
            "give a prompt and a picture: paligemma explore 'caption en' photo.jpg --out look.html"
        )
    if (out is None) != as_json:
        raise typer.BadParameter("give --out page.html, or --json for the numbers, one of them")
    if window % 2 == 0:
        raise typer.BadParameter(f"--window is {window}, expected an odd number: it lies around a patch")
    if coarse and knock_out is False:
        raise typer.BadParameter("--coarse is a way to knock out: leave it out with --no-knock-out")
    if as_json and compare is not None:
        raise typer.BadParameter("--compare adds a screen to the page: leave it out with --json")

    check_order(prompt, [image], "explore")
    if out is not None and out.is_dir():
        raise typer.BadParameter(f"--out {out} is a folder: name a page, such as {out / 'look.html'}")
    if out is not None and out.resolve() in [Path(name).resolve() for name in (image, compare) if name is not None]:
        raise typer.BadParameter(f"--out {out} would replace the picture itself; choose another name")
    if out is not None:
        check_writable(out, "--out")

    import torch

    from paligemma.explore import flow, look, page
    from paligemma.explore.stages import duration, many_passes_are_quick
    from paligemma.inference import load

    if threads is not None:
        torch.set_num_threads(threads)
    picture = picture_named(image, pixels(max_pixels))
    other_picture = picture_named(compare, pixels(max_pixels)) if compare is not None else None
    with notes.status(Text(f"loading {model}")):
        # The embedded model is small enough for float32, in which two runs give the same numbers.
        wanted = "float32" if dtype is None and quantize is None and model == "tiny" else dtype
        pg = load(model, device, wanted, quantize, revision, image_size)
    found = look(pg, picture, prompt, answer)
    stages = flow(pg, found.picture, prompt)
    quick = many_passes_are_quick(pg)
    wants_knock_out = coarse or (quick if knock_out is None else knock_out)
    with_routes = quick or bool(knock_out)
    grid = min(COARSE, found.grid) if coarse else None
    if not quick and knock_out is not False:
        passes = found.images * (grid or found.grid) ** 2
        time = f"{passes:,} passes of the model, {duration(stages, passes)}"
        if wants_knock_out:
            note(f"note: knock-outs take {time}" + ("; routes take some hundred more" if with_routes else ""))
        else:
            note(
                f"note: no knock-outs, which take {time}, and no routes, which take some hundred; --knock-out asks for "
                f"both, --coarse for knock-outs in {COARSE**2} passes"
            )
    with Progress(console=notes, transient=True) as bar:
        task = bar.add_task("knock-outs", total=None, visible=wants_knock_out)

        def progress(done: int, total: int) -> None:
            bar.update(task, completed=done, total=total)

        if out is None:
            from paligemma.explore import attention
            from paligemma.explore import knock_out as knock_out_patches

            drops, attended = None, attention(found, "answer")  # this one first, since it may be refused
            if wants_knock_out:
                drops = knock_out_patches(found, window, progress=progress, grid=grid)
            numbers = as_numbers(found, stages, attended, drops, window, with_routes)
        else:
            other = look(pg, other_picture, prompt) if other_picture is not None else None
            most = int(max_mb * 1e6)
            left_out = page(found, out, most, other, wants_knock_out, window, progress, with_routes, grid, stages)
    if out is None:
        echo_json(numbers)
        return
    said = ("knock-out", "routes") if knock_out is None and not wants_knock_out else ()  # before the work began
    for what, why in left_out.items():
        if what not in said:
            note(f"note: {what}: {why}")
    note(f"written: {out}, {out.stat().st_size / 1000:,.0f} KB; answer: {found.answer}")


def check_exercise(
    number: int, answer: str, model: str, device: str | None, dtype: str | None, threads: int | None
) -> None:
    """Says whether the answer to an exercise is right, and why. Exit code 1 if it is wrong."""
    from paligemma.cli.exercises import EXERCISES, judge, read

    try:
        given = read(number, answer)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None

    import torch

    from paligemma.inference import load

    if threads is not None:
        torch.set_num_threads(threads)
    right, why = judge(EXERCISES[number].solve(load(model, device, dtype or "float32")), given)
    say(why)
    if not right:
        raise typer.Exit(1)


def as_numbers(
    found: Look,
    stages: list[Stage],
    attended: Attention,
    drops: KnockOut | None,
    window: int,
    with_routes: bool = True,
) -> dict[str, Any]:
    """What `--json` prints: the results of the functions of `paligemma.explore`, under their names."""
    from paligemma.explore import lens, locations, routes

    read = lens(found)
    traced = [routes(found, token, window) for token in range(min(1, len(found.answer_ids))) if with_routes]
    return {
        "look": {
            "prompt": found.prompt,
            "answer": found.answer,
            "input_ids": found.input_ids.tolist(),
            "token_type_ids": found.token_type_ids.tolist(),
            "tokens": found.tokens,
            "images": found.images,
            "grid": found.grid,
            "first_text": found.first_text,
            "first_answer": found.first_answer,
            "logprobs": found.logprobs.tolist(),
        },
        "attention": {
            "queries": attended.queries.tolist(),
            "share": attended.share().tolist(),
            "on_image": attended.on_image().mean(1).tolist(),  # mean of the heads
        },
        "lens": {
            "columns": read.columns.tolist(),
            "ids": read.ids.tolist(),
            "logprobs": read.logprobs.tolist(),
            "ranks": read.ranks.tolist(),
        },
        "knock_out": None
        if drops is None
        else {
            "drop": drops.drop.tolist(),
            "base": drops.base.tolist(),
            "filled_with": drops.filled_with.tolist(),
        },
        "locations": [
            {"token": e.token, "name": e.name, "mass": e.mass.tolist(), "mean": e.mean, "spread": e.spread,
             "pixels": e.pixels, "pixel_spread": e.pixel_spread}
            for e in locations(found)
        ],
        "routes": [{"token": 0, "names": found.names, "change": found.change.tolist()} for found in traced],
        "flow": [dataclasses.asdict(stage) for stage in stages],
    }  # fmt: skip
