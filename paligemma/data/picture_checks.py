"""Are the pictures of a row there, can they be opened, and are they as large as the annotation says, and not too large?

A camera held upright often stores the picture lying on its side, with a flag (EXIF orientation) that says how to turn
it. The model sees it upright, as people do; annotations made by a tool that ignores the flag lie beside the objects.
"""

from __future__ import annotations

import io
import os
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import lru_cache

from paligemma.data.rows import Picture, Row
from paligemma.files import MAX_PIXELS

EXIF_ORIENTATION = 0x0112


@dataclass
class PictureChecks:
    """open_pictures: decode each picture once. Sizes are read without that, from the first bytes of the file: none may
    have more than max_pixels, and where an annotation gives a size, they are compared. uncertain: how many rows have a
    turned picture whose size does not show whether the annotation was made before or after."""

    open_pictures: bool
    max_pixels: int = MAX_PIXELS
    uncertain: int = 0
    notes: list[str] = field(default_factory=list)  # of the row that was checked last

    def __post_init__(self) -> None:
        # Bounded, so that a million different pictures do not fill the memory with their names.
        self.problem_at = lru_cache(maxsize=100_000)(self.problem)

    def problems(self, row: Row) -> Iterator[tuple[str, str]]:
        self.notes.clear()
        for picture in row.pictures:
            problem = self.problem_at(picture) if isinstance(picture, str) else self.problem(picture)
            if problem is not None:
                yield problem
        if row.size is not None and len(row.pictures) == 1:
            yield from self.size_problems(row.pictures[0], row.size)

    def problem(self, picture: Picture) -> tuple[str, str] | None:
        if isinstance(picture, str) and (missing := not_there(picture)):
            return missing
        return (decoded if self.open_pictures else too_large)(picture, self.max_pixels)

    def size_problems(self, picture: Picture, annotated: tuple[int, int]) -> Iterator[tuple[str, str]]:
        found = size_and_orientation(picture)
        if found is None:
            return
        (width, height), orientation = found
        upright = upright_of(found)
        says = f"the annotation says {annotated[0]} x {annotated[1]}"
        if annotated == upright:
            self.uncertain += orientation > 1 and (orientation < 5 or width == height)
        elif annotated == (width, height):
            yield (
                "turned by EXIF",
                f"{says}, which is the picture before its EXIF orientation turns it: upright it is "
                f"{upright[0]} x {upright[1]}, and its boxes lie beside the objects",
            )
        elif same_proportions(annotated, upright):
            self.notes.append("scaled")
        else:
            swapped = " (width and height are swapped)" if annotated == (upright[1], upright[0]) else ""
            yield "another size", f"{says}, the picture is {upright[0]} x {upright[1]}{swapped}"


def not_there(path: str) -> tuple[str, str] | None:
    if os.path.isfile(path):
        return None
    return "missing picture", f"{path} is a folder" if os.path.isdir(path) else f"no picture at {path}"


def decoded(picture: Picture, max_pixels: int) -> tuple[str, str] | None:
    from paligemma.images import TooManyPixels, load_image

    try:
        load_image(picture, max_pixels)
    except TooManyPixels as error:
        return "too many pixels", str(error)
    except (OSError, ValueError) as error:
        return "unreadable picture", str(error)
    return None


def too_large(picture: Picture, max_pixels: int) -> tuple[str, str] | None:
    """By the header alone. One that cannot be read is not reported here but by `decoded`, which opens the picture."""
    from PIL import Image

    try:
        width, height = read_header(picture)[0]
    except Image.DecompressionBombError as error:  # more pixels than Pillow opens at all
        found = str(error)
    except Exception:
        return None
    else:
        if width * height <= max_pixels:
            return None
        found = f"{width:,} x {height:,} are {width * height:,} pixels, and {max_pixels:,} are allowed"
    return "too many pixels", f"{picture if isinstance(picture, str) else 'the picture'}: {found}"


def size_and_orientation(picture: Picture) -> tuple[tuple[int, int], int] | None:
    """Width and height as stored, and the EXIF orientation (1 to 8; from 5 on upright has them swapped). None for what
    is not there or no picture."""
    if isinstance(picture, str) and not os.path.isfile(picture):
        return None
    try:
        return read_header(picture)
    except Exception:  # Pillow raises many kinds for a broken head; --open-pictures says what is wrong with it
        return None


def read_header(picture: Picture) -> tuple[tuple[int, int], int]:
    """What `size_and_orientation` returns. Nothing is decoded. Raises whatever Pillow raises."""
    from PIL import Image

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with Image.open(picture if isinstance(picture, str) else io.BytesIO(picture)) as image:
            # Asked for the EXIF data that a PNG does not have at its head, Pillow would decode all of it.
            known = image.format != "PNG" or "exif" in image.info
            orientation = image.getexif().get(EXIF_ORIENTATION, 1) if known else 1
            return image.size, orientation if orientation in range(1, 9) else 1


def upright_of(found: tuple[tuple[int, int], int]) -> tuple[int, int]:
    (width, height), orientation = found
    return (height, width) if orientation >= 5 else (width, height)


def upright_size(picture: Picture) -> tuple[int, int] | None:
    """Width and height of the picture as people (and the model) see it. None if it is not there or no picture."""
    found = size_and_orientation(picture)
    return None if found is None else upright_of(found)


def same_proportions(a: tuple[int, int], b: tuple[int, int]) -> bool:
    """Whether one size is the other, enlarged or reduced and rounded to pixels."""
    return abs(a[1] * b[0] / a[0] - b[1]) <= 1 or abs(a[0] * b[1] / a[1] - b[0]) <= 1
