"""What commands print and write: the answer on stdout, all else on stderr, pictures whole or not at all."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import typer
from rich.console import Console

notes = Console(stderr=True, highlight=False)


def note(text: str) -> None:
    """A line on stderr. File names are no markup, and long lines are not broken."""
    notes.print(text, style="dim", markup=False, soft_wrap=True)


def complain(error: BaseException) -> None:
    text = str(error) or type(error).__name__
    if isinstance(error, OSError) and text.startswith("[Errno"):  # what the system refused, without its number
        text = f"{error.strerror}" if error.filename is None else f"{error.filename}: {error.strerror}"
    notes.print(f"error: {text}", style="bold red", markup=False, soft_wrap=True)


def echo_json(value: Any) -> None:
    """One line. Letters stay letters, unless stdout cannot hold them (another encoding, a file name that is none)."""
    text = json.dumps(value, ensure_ascii=False)
    try:
        text.encode(getattr(sys.stdout, "encoding", None) or "utf-8")
    except UnicodeEncodeError:
        text = json.dumps(value)
    typer.echo(text)


def print_table(table: Any) -> None:
    """On stdout, as wide as the terminal; a file is as wide as the table."""
    terminal = sys.stdout is not None and sys.stdout.isatty()
    Console(width=None if terminal else 160).print(table)


def save_picture(picture: Any, path: Path) -> None:
    """Written beside and renamed: a full disk leaves no half of a picture, and an old one whole."""
    from paligemma.files import written_whole

    try:
        with written_whole(path) as beside:
            picture.save(beside)
    except OSError as error:
        raise OSError(f"{path} could not be written: {error.strerror or error}") from error


def drawing_paths(save: Path, images: list[str], option: str = "--save") -> list[Path]:
    """Where the drawing of each picture goes: `save` itself, or a PNG in the folder `save`, named after the picture and
    numbered where two would have one name. No drawing replaces a picture that is read."""
    for folder in save.parents if save.suffix and not save.is_dir() else (save, *save.parents):
        if folder.exists() and not folder.is_dir():
            raise typer.BadParameter(f"{option} {save}: {folder} is a file, expected a folder, or a name such as a.png")
    read = {Path(name).resolve() for name in images if name != "-"}
    if save.suffix and not save.is_dir():
        from PIL import Image

        if len(images) > 1:
            raise typer.BadParameter(f"--save {save} names one file for {len(images)} pictures; name a folder")
        if Image.registered_extensions().get(save.suffix.lower()) not in Image.SAVE:
            raise typer.BadParameter(
                f"{option} {save}: no picture is written as {save.suffix}; try .png, or make a folder of that name"
            )
        if save.resolve() in read:
            raise typer.BadParameter(f"--save {save} would replace the picture itself; choose another name")
        return [save]
    paths: list[Path] = []
    taken: set[str] = set()  # in lower case: not every disk tells A.png from a.png
    for name in images:
        stem = "stdin" if name == "-" else Path(name).stem or "picture"
        path, number = save / f"{stem}.png", 1
        while str(path).lower() in taken or path.resolve() in read:
            number += 1
            path = save / f"{stem}-{number}.png"
        taken.add(str(path).lower())
        paths.append(path)
    return paths


def hinted(pg: Any) -> Any:
    """The model; with a hint where what follows would be slow. (Published sizes help themselves, see `utils.py`.)"""
    import torch

    from paligemma.devices import multiplies_bfloat16
    from paligemma.weights.published import published_name

    small = pg.model.dtype == torch.bfloat16 and published_name(pg.model.config) is None
    if small and not multiplies_bfloat16(pg.model.device):
        note("hint: this CPU has no fast products of bfloat16; --dtype float32 answers several times as fast")
    return pg
