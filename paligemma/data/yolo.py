"""YOLO's data sets -> rows: a `data.yaml`, and for each picture a text file of labels.

    # data.yaml                       # labels/7.txt, beside images/7.jpg
    train: images/train               0 0.5 0.5 0.2 0.3              class, then centre x, y, width, height of a box
    names: [cat, dog]                 1 0.1 0.1 0.4 0.1 0.4 0.6      class, then the corners of a polygon

All numbers are shares of the picture's width or height, so the size of a picture is not needed. The labels of
`.../images/x.jpg` lie in `.../labels/x.txt`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from paligemma.data.folders import of_one_split
from paligemma.data.masks import around_polygons, fill
from paligemma.data.objects import Object, ObjectRows
from paligemma.data.rows import Row, RowError, Rows, short
from paligemma.files import is_junk, picture_names

if TYPE_CHECKING:
    from paligemma.answers.mask_codec import Box

CANVAS = 1024  # pixels a side on which shares become boxes and masks
ROUNDING = 0.005  # how far a box may reach out of the picture, as a share of it


def read_yaml(path: Path) -> dict[str, Any]:
    """A small YAML file with keys at the top. ValueError for anything else."""
    import yaml

    known = yaml.SafeLoader.yaml_implicit_resolvers.items()
    null = "tag:yaml.org,2002:null"

    class AsText(yaml.SafeLoader):
        """A class called on stays on, where YAML would read true, and 010 does not become 8. Null is still nothing."""

        yaml_implicit_resolvers = {first: [one for one in forms if one[0] == null] for first, forms in known}

    if path.stat().st_size > 1 << 20:
        raise ValueError(f"{path} is larger than a description of a data set: expected names, train, val, ...")
    try:
        content = yaml.load(path.read_text(encoding="utf-8-sig"), AsText)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        place = getattr(error, "problem_mark", None)
        where = f" at line {place.line + 1}" if place is not None else ""
        raise ValueError(f"{path} is not YAML{where}: {getattr(error, 'problem', None) or error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected keys such as names and train, got {short(content)}")
    return content


def names_of(path: Path, settings: dict[str, Any]) -> list[str]:
    names = settings.get("names")
    if isinstance(names, dict):
        numbers = [str(number) for number in range(len(names))]
        names = [names[number] for number in numbers] if names.keys() == set(numbers) else None
    if not isinstance(names, list) or not names or not all(isinstance(name, str) and name.strip() for name in names):
        raise ValueError(f"{path}: expected names: [cat, dog, ...], by number; got {short(settings.get('names'))}")
    if (count := settings.get("nc")) and count != str(len(names)):
        raise ValueError(f"{path} says nc: {str(count)[:20]}, but names has {len(names)}: which is right?")
    return names


def objects(path: Path, kind: str, images: str | None, split: str | None, make: ObjectRows) -> Rows:
    """path: the data.yaml. make: without names, which it has."""
    settings = read_yaml(path)
    names = names_of(path, settings)
    splits = {name: [settings[name]] for name in ("train", "val", "valid", "test") if settings.get(name)}
    if not splits:
        raise ValueError(f"{path} names no pictures: expected train: images/train, or val, or test")
    chosen = of_one_split(splits, path, split)[0]
    pictures = pictures_of(path, settings.get("path"), chosen, Path(images) if images is not None else None)
    labelled = [picture for picture in pictures if make.every_label or has_labels(labels_of(picture))]
    make = replace(make, names=names)
    left_out = len(pictures) - len(labelled)
    note = f"{path}: YOLO {'masks' if make.segment else 'boxes'}, {len(labelled):,} rows"
    note += f" ({left_out:,} pictures without objects left out)" if left_out else ""
    files = [path, *(labels_of(picture) for picture in labelled if labels_of(picture).is_file())]
    return Rows(kind, note, len(labelled), LabelReader(labelled, names, make), files)


def pictures_of(path: Path, root: Any, chosen: Any, images: Path | None) -> list[Path]:
    """The pictures of a split (a folder, a list of pictures, or several of these), and those that are missing though
    they have labels."""
    if images is not None:
        places = [images]
    else:
        base = path.parent / str(root) if root else path.parent
        if not base.is_dir():
            base = path.parent  # the place where somebody else's copy lay
        entries = chosen if isinstance(chosen, list) else [chosen]
        places = [place_of(base, str(entry)) for entry in entries]
    found: list[Path] = []
    for place in places:
        if place.is_dir():
            found += pictures_in(place)
        elif place.is_file() and place.suffix == ".txt":
            lines = place.read_text(encoding="utf-8-sig").splitlines()
            found += [place.parent / line.strip() for line in lines if line.strip()]
        elif images is not None:
            raise ValueError(f"--images {images}: there is no such folder, nor a list of pictures (.txt)")
        else:
            raise ValueError(f"{path} names {place}, where no pictures are: give their folder as --images")
    return found


def place_of(base: Path, entry: str) -> Path:
    """Exports of Roboflow say "../train/images" for "train/images"."""
    place = base / entry
    if not place.exists() and entry.startswith("../"):
        place = base / entry[3:]
    return place


def pictures_in(folder: Path) -> list[Path]:
    """Those in the folder, and where the labels of others are, the names these must have had."""
    wanted = picture_names()
    pictures = [file for file in files_below(folder) if file.suffix.lower() in wanted]
    known = {labels_of(picture) for picture in pictures}
    labels = labels_of(folder / "x.jpg").parent
    if labels != folder and labels.is_dir():
        texts = {file for file in files_below(labels) if file.suffix == ".txt" and file.name != "classes.txt"}
        orphans = sorted(texts - known)
        pictures += [folder / orphan.relative_to(labels).with_suffix(".jpg") for orphan in orphans]
    return sorted(pictures)


def files_below(folder: Path) -> list[Path]:
    """What programs leave behind unasked is not among them."""
    files = folder.rglob("*")
    return [file for file in files if not any(map(is_junk, file.relative_to(folder).parts))]


def labels_of(picture: Path) -> Path:
    parts = list(picture.parts)
    for k in reversed(range(len(parts) - 1)):
        if parts[k] == "images":
            parts[k] = "labels"
            break
    return Path(*parts).with_suffix(".txt")


def has_labels(file: Path) -> bool:
    try:
        return file.stat().st_size > 16 or bool(file.read_bytes().strip())
    except OSError:
        return False


@dataclass(frozen=True)
class LabelReader:
    pictures: Sequence[Path]
    names: Sequence[str]
    make: ObjectRows

    def __call__(self, i: int) -> Row:
        picture = self.pictures[i]
        file = labels_of(picture)
        where = str(file)
        try:
            text = file.read_text(encoding="utf-8-sig") if file.is_file() else ""
        except UnicodeDecodeError as error:
            raise RowError(where, "not UTF-8", f"byte {error.start + 1} is not UTF-8: save the file as UTF-8") from None
        lines = enumerate(text.splitlines(), 1)
        found = [self.object(line.split(), f"line {number}", where) for number, line in lines if line.strip()]
        return self.make.row(str(picture), (CANVAS, CANVAS), found, i, where, annotated_size=False)

    def object(self, cells: list[str], name: str, where: str) -> Object:
        try:
            number, *values = [float(cell) for cell in cells]
        except ValueError:
            raise RowError(where, "box or mask", f"{name}: {short(' '.join(cells))}, expected numbers") from None
        if not number.is_integer() or not 0 <= number < len(self.names):  # nan and inf are no integers
            raise RowError(
                where,
                "box or mask",
                f"{name}: class {cells[0]}, but data.yaml has the classes 0 to {len(self.names) - 1}",
            )
        if len(values) != 4 and (len(values) < 6 or len(values) % 2):
            raise RowError(
                where,
                "box or mask",
                f"{name}: {len(values)} numbers after the class, expected 4 (x, y, width, height) or the corners of a "
                "polygon (6 or more, two each)",
            )
        if wrong := next((value for value in values if not -ROUNDING <= value <= 1 + ROUNDING), None):
            raise RowError(
                where,
                "box or mask",
                f"{name}: {wrong:g} is no share of the picture: YOLO's numbers lie within [0, 1]; are these pixels?",
            )
        if len(values) == 4 and self.make.segment:
            raise RowError(where, "box or mask", f"{name}: a box, but masks are asked for: use the kind yolo-detect")
        label = self.names[int(number)]
        if len(values) == 4:
            return Object(label, centred(values, name, where), name)
        polygon = np.array(values).reshape(-1, 2) * CANVAS
        mask = fill(polygon, (CANVAS, CANVAS)) if self.make.segment else None
        return Object(label, around_polygons([polygon]), name, mask)


def centred(values: Sequence[float], name: str, where: str) -> Box:
    """Centre, width and height in shares -> corners on the canvas."""
    x, y, width, height = values
    box = (x - width / 2, y - height / 2, x + width / 2, y + height / 2)
    if min(box) < -ROUNDING or max(box) > 1 + ROUNDING:
        shown = ", ".join(f"{edge:g}" for edge in box)
        raise RowError(
            where,
            "box outside",
            f"{name}: the box {shown} (x0, y0, x1, y1) reaches out of the picture: YOLO gives a box by its centre",
        )
    x0, y0, x1, y1 = (edge * CANVAS for edge in box)
    return x0, y0, x1, y1
