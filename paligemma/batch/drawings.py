"""--draw: the pictures of a run with boxes and masks over them, in a folder of their own."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from paligemma.batch.folder import ROWS, RunFolder, rows_that_meet
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
    """ValueError, naming two rows, if their drawings would be one file."""
    meeting = rows_that_meet(folder.path / ROWS, lambda name: drawing_path(Path(), name).as_posix())
    if meeting:
        path, (one, other) = next(iter(meeting.items()))
        raise ValueError(
            f"{one!r} and {other!r} would have one drawing, {path}: give them other ids, or leave --draw out"
        )


def drawing_path(folder: Path, name: str) -> Path:
    """Where the drawing of a row goes: below `folder`, whatever its id is. The folders of the id are kept, so that
    equal names in two folders do not meet, and so is the ending: a.jpg and a.png are two pictures."""
    path = folder / path_of(name)
    return path.with_name(f"{path.name}.png")
