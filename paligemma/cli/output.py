"""What commands print and write: the answer on stdout, everything else on stderr, pictures whole or not at all."""

from __future__ import annotations

import errno
import json
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer
from rich.console import Console

from paligemma.files import is_data_url, library_errors
from paligemma.terminal import error_line, printable

if TYPE_CHECKING:
    from PIL import Image
    from rich.table import Table

    from paligemma.inference import PaliGemma

notes = Console(stderr=True, highlight=False)
MARK = "Software", "paligemma"  # a text in the PNGs that are drawn: what lacks it is somebody's picture


def note(text: str) -> None:
    """A line on stderr. Brackets in a file name are not markup, and a long line is not broken."""
    notes.print(printable(text), style="dim", markup=False, soft_wrap=True)


def print_error(error: BaseException, doing: str = "") -> None:
    """One line on stderr that begins with "error:". doing: see `error_line`."""
    notes.print(f"error: {error_line(error, doing)}", style="bold red", markup=False, soft_wrap=True)


def say(text: str, newline: bool = True) -> None:
    """Writes to stdout. A terminal gets no control characters; a file or pipe gets the text as it is."""
    if sys.stdout is not None and sys.stdout.isatty():
        text = printable(text)
    try:
        typer.echo(text, nl=newline)
    except OSError as error:
        if error.errno == errno.EPIPE:  # `paligemma ... | head`: the reader has seen enough
            raise
        raise OSError(error.errno, error.strerror, "stdout") from error


def echo_json(value: Any) -> None:
    """One line of JSON. Letters are escaped only if stdout cannot encode them."""
    text = json.dumps(value, ensure_ascii=False)
    try:
        text.encode(getattr(sys.stdout, "encoding", None) or "utf-8")
    except UnicodeEncodeError:
        text = json.dumps(value)
    say(text)


def print_table(table: Table) -> None:
    """On stdout, as wide as the terminal, or 160 columns in a file or pipe."""
    output().print(table)


def output() -> Console:
    """stdout, as wide as the terminal, or 160 columns in a file or pipe."""
    terminal = sys.stdout is not None and sys.stdout.isatty()
    return Console(width=None if terminal else 160)


def save_picture(picture: Image.Image, path: Path) -> None:
    """Written beside and renamed, so that a full disk leaves no half of a picture and keeps the old one. A PNG is
    marked as a drawing of ours."""
    from PIL.PngImagePlugin import PngInfo

    from paligemma.files import written_whole

    mark = PngInfo()
    mark.add_text(*MARK)
    try:
        with written_whole(path) as beside:
            if path.suffix.lower() == ".png":
                picture.save(beside, pnginfo=mark)
            else:
                picture.save(beside)
    except OSError as error:
        raise OSError(f"{path} could not be written: {error.strerror or error}") from error


def check_writable(path: Path, option: str) -> None:
    """Raises OSError, naming the option, where no file can be written at `path`, before any work is done. It leaves
    nothing behind."""
    try:
        folder = next(folder for folder in path.absolute().parents if folder.exists())
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise OSError(f"{option} {path} cannot be written ({error.strerror}): choose another folder") from None


def is_drawing(path: Path) -> bool:
    """Whether a file is a PNG that `save_picture` has written."""
    from PIL import Image

    name, value = MARK
    try:
        with library_errors(str(path)), Image.open(path, formats=["PNG"]) as picture:
            return bool(picture.info.get(name) == value)
    except (ValueError, OSError):
        return False


def short_name(image: str) -> str:
    """What messages call a picture, which may be a long data: URL."""
    return image if len(image) <= 300 else f"{image[:60]}..."


def name_of(image: str) -> str:
    """The name of a picture without its folder; "stdin" and "picture" where it has none: of "-" and a data: URL."""
    if image == "-":
        return "stdin"
    return "picture" if is_data_url(image) else Path(image).name or "picture"


def stem_of(image: str) -> str:
    """The same without its ending: what files about the picture are named after."""
    return Path(name_of(image)).stem


def drawing_paths(save: Path, images: list[str], option: str = "--save") -> list[Path]:
    """Where the drawing of each picture goes: the file `save`, or a PNG in the folder `save` named after the picture.

    Names that would be used twice get a number. In a folder a drawing replaces neither a picture that is read nor any
    other file, except an earlier drawing.
    """
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
        stem = stem_of(name)
        path, number = save / f"{stem}.png", 1
        while str(path).lower() in taken or path.resolve() in read or (path.exists() and not is_drawing(path)):
            number += 1
            path = save / f"{stem}-{number}.png"
        taken.add(str(path).lower())
        paths.append(path)
    return paths


def hint_at_float32(pg: PaliGemma) -> None:
    """A hint where bfloat16 was asked for and is slow. (By default the better dtype is taken, see `utils.py`.)"""
    import torch

    from paligemma.devices import multiplies_bfloat16
    from paligemma.weights.published import published_name

    small = pg.model.dtype == torch.bfloat16 and published_name(pg.model.config) is None
    if small and not multiplies_bfloat16(pg.model.device):
        note("hint: this CPU multiplies bfloat16 slowly; --dtype float32 answers several times as fast")
