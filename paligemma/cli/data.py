"""`paligemma data`: check and show rows before a model sees them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.text import Text

from paligemma.cli.options import (
    DEFAULT_MAX_PIXELS,
    Annotations,
    Data,
    EveryLabel,
    ImageName,
    Images,
    Kind,
    Language,
    MaxPixels,
    Model,
    Revision,
    Split,
    pixels,
)
from paligemma.cli.output import drawing_paths, is_drawing, note, notes, save_picture, say
from paligemma.data.options import DataOptions


def data_check(
    data: Data,
    images: Images = None,
    kind: Kind = None,
    annotations: Annotations = None,
    image_name: ImageName = None,
    split: Split = None,
    language: Language = DataOptions.language,
    every_label: EveryLabel = False,
    model: Annotated[
        str | None, typer.Option("--model", "-m", help="Also count tokens with the tokenizer of this model.")
    ] = None,
    max_length: Annotated[
        int | None, typer.Option(min=1, help="The most tokens a row may have, pictures included; needs --model.")
    ] = None,
    open_pictures: Annotated[bool, typer.Option("--open-pictures", help="Also open every picture.")] = False,
    max_pixels: MaxPixels = DEFAULT_MAX_PIXELS,
    show: Annotated[int, typer.Option(min=1, help="Rows to name for each problem.")] = 3,
    revision: Revision = None,
) -> None:
    """Look for problems in every row. Exit code 1 if there are any."""
    if max_length is not None and model is None:
        raise typer.BadParameter("--max-length counts tokens: give --model too")
    from paligemma.data.check import check

    options = DataOptions(data, kind, images, annotations, image_name, split, language, every_label)
    processor = codec = None
    if model is not None:
        from paligemma.data.checkpoint import processor_of  # and torch, which nothing else here needs

        processor, codec = processor_of(model, revision, kind)
    with notes.status(Text(f"reading {data}")) as status:
        rows = options.open(codec)
        result = check(
            rows, processor, max_length, open_pictures, show, pixels(max_pixels),
            progress=lambda done: status.update(Text(f"{done:,} of {len(rows):,} rows")),
        )  # fmt: skip
    say(str(result))
    if not result.ok:
        raise typer.Exit(1)


def data_show(
    data: Data,
    out: Annotated[Path, typer.Option(help="One picture of all rows, or a folder for one picture of each.")],
    rows: Annotated[
        str | None,
        typer.Option(help="Numbers of rows, counted from 0: 7,12. Default: --count rows at equal distances."),
    ] = None,
    count: Annotated[int, typer.Option(min=1, help="How many rows, without --rows.")] = 4,
    model: Model = "tiny",
    max_length: Annotated[int | None, typer.Option(min=1, help="Cut longer rows, as training would.")] = None,
    images: Images = None,
    kind: Kind = None,
    annotations: Annotations = None,
    image_name: ImageName = None,
    split: Split = None,
    language: Language = DataOptions.language,
    every_label: EveryLabel = False,
    revision: Revision = None,
    max_pixels: MaxPixels = DEFAULT_MAX_PIXELS,
) -> None:
    """Draw rows as the model gets them: picture, tokens, labels and mask."""
    numbers = [part.strip() for part in (rows or "").split(",") if part.strip()]
    if not all(number.isdecimal() for number in numbers):
        raise typer.BadParameter(f"--rows is {rows!r}, expected numbers of rows such as 7,12")
    drawing_paths(out, [], "--out")  # a name that cannot be a picture is refused at once
    from paligemma.data.checkpoint import processor_of
    from paligemma.data.show import show_rows

    options = DataOptions(data, kind, images, annotations, image_name, split, language, every_label)
    processor, codec = processor_of(model, revision, kind)
    found = options.open(codec)
    if not len(found):
        raise ValueError(f"{data}: there are no rows")
    some = min(count, len(found))
    chosen = [int(number) for number in numbers] or [k * len(found) // some for k in range(some)]
    for number in chosen:
        if number >= len(found):
            raise typer.BadParameter(f"there is no row {number}: {data} has {len(found):,}, counted from 0")
    sheets = [chosen] if out.suffix and not out.is_dir() else [[number] for number in chosen]
    paths = [out if sheet is chosen else out / f"row-{sheet[0]:06d}.png" for sheet in sheets]
    rows_of_sheets = [[found[k] for k in sheet] for sheet in sheets]
    for path, shown in zip(paths, rows_of_sheets):  # before anything is drawn
        read = [picture for row in shown for picture in row.pictures if isinstance(picture, str | Path)]
        if path.resolve() in [Path(picture).resolve() for picture in read]:
            raise typer.BadParameter(f"--out {out} would replace a picture of the data; choose another name")
        if path != out and path.exists() and not is_drawing(path):
            raise typer.BadParameter(
                f"--out {out}: {path} is there and was not drawn here; choose another folder, or move it away"
            )
    for path, shown in zip(paths, rows_of_sheets):
        save_picture(show_rows(shown, processor, codec, max_length=max_length, max_pixels=pixels(max_pixels)), path)
        note(f"drawn: {path}")
