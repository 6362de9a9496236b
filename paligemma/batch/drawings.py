"""--draw: the pictures of a run with boxes and masks over them, in a folder of their own."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from paligemma.batch.folder import ROWS, RunFolder
from paligemma.batch.pictures import open_picture, places_of
from paligemma.batch.rows import InputRow, RowFailure, path_of

if TYPE_CHECKING:
    from paligemma.answers.results import Answer, Detection, Segment


def draw_answer(folder: Path, row: InputRow, answer: Answer, max_pixels: float | None) -> None:
    """FOLDER/ID.png: the (first) picture of the row with what was found in it. Nothing where nothing was found.

    The picture is opened a second time: while its answer is awaited, only the model's square of it is kept.
    """
    from paligemma.answers.drawing import draw
    from paligemma.files import written_whole

    items: list[Detection | Segment] = [*answer.detections, *answer.segments]
    places = places_of(row.image)
    if not items or not places:
        return
    try:
        picture = open_picture(places[0], max_pixels)
    except RowFailure:  # it was removed a moment ago
        return
    drawn = draw(picture, items, scale=max(1, -(-512 // max(picture.size))))
    with written_whole(drawing_path(folder, row.id)) as beside:
        drawn.save(beside)


def copy_drawing(folder: Path, name: str, other: str) -> None:
    """The drawing of the row `name`, if there is one, for another row with the same picture and answer too."""
    from paligemma.files import written_whole

    drawn = drawing_path(folder, name)
    if drawn.exists():
        with written_whole(drawing_path(folder, other)) as beside:
            shutil.copyfile(drawn, beside)


def check_drawings(folder: RunFolder) -> None:
    """ValueError, naming two rows, if their drawings would be one file. Of a million rows 64 bits each are kept."""

    def names() -> Iterator[tuple[str, Path]]:
        with open(folder.path / ROWS, "rb") as file:
            for line in file:
                name = json.loads(line)["id"]
                yield name, drawing_path(Path(), name)

    hashes = np.fromiter((hash(path) for _, path in names()), np.int64)
    hashes.sort()
    twice = set(hashes[1:][hashes[1:] == hashes[:-1]].tolist())
    seen: dict[Path, str] = {}
    for name, path in names() if twice else ():
        if hash(path) in twice and (other := seen.setdefault(path, name)) != name:
            raise ValueError(
                f"{other!r} and {name!r} would have one drawing, {path.as_posix()}: give them other ids, or leave "
                "--draw out"
            )


def drawing_path(folder: Path, name: str) -> Path:
    """Where the drawing of a row goes: below `folder`, whatever its id is. The folders of the id are kept, so that
    equal names in two folders do not meet, and so is the ending: a.jpg and a.png are two pictures."""
    path = folder / path_of(name)
    return path.with_name(f"{path.name}.png")
