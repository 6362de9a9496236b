"""Boxes and masks of `paligemma run` as label files, for tools that annotate pictures or train on them.

    --label-format yolo     FOLDER/photo.txt for photo.jpg, and FOLDER/classes.txt with the names of the numbers
    --label-format coco     FOLDER/annotations.json, one data set with the scores of the boxes
    --label-format voc      FOLDER/photo.xml for photo.jpg; a mask is written as its box

A picture in which nothing was found gets a file too: in all three formats that means "looked at, and empty".
A later run into the same folder adds to it: classes keep their numbers, and only labels of the same picture are
replaced.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from paligemma.cli.output import name_of, short_name, stem_of
from paligemma.files import locked, made_folder, read_json, write_json, write_text

if TYPE_CHECKING:
    from paligemma.answers.results import Detection, Segment

FORMATS = ("yolo", "coco", "voc")

CLASSES, DATA, COCO = "classes.txt", "data.yaml", "annotations.json"

# YOLO finds the labels of images/7.jpg in labels/7.txt, so a data set needs a folder of each.
YOLO_HEAD = "# Put this file above a folder `images` with the pictures and a folder `labels` with the text files.\n"


@contextmanager
def labels_into(folder: Path, format: str, images: Sequence[str], classes: Sequence[str]) -> Iterator[LabelFiles]:
    """The label files of one run, in a folder that no other run writes to meanwhile. What was answered is written, even
    if the run is ended before its last picture. BlockingIOError where another run writes."""
    with made_folder(folder), locked(folder, "paligemma run --save-labels"):
        labels = LabelFiles(folder, format, images, classes)
        try:
            yield labels
        finally:
            labels.finish()


class LabelFiles:
    """The label files of one run. classes: the labels that the prompt asks for. They are numbered in this order, behind
    those that the folder already has; labels beyond them (an answer without the grammar may have some) are numbered as
    they come."""

    def __init__(self, folder: Path, format: str, images: Sequence[str], classes: Sequence[str]) -> None:
        """A usage error if two pictures have one name, or one that of the list of classes: label files are named after
        their pictures. Also where the folder holds files that cannot be added to."""
        self.folder, self.format = folder, format
        names: dict[str, str] = {}
        for image in images:
            name = name_of(image) if format == "coco" else stem_of(image)
            if format == "yolo" and name == "classes":
                raise typer.BadParameter(
                    f"--save-labels: the labels of {short_name(image)} would be classes.txt, which holds the names of "
                    "the classes; rename the picture, or take another --label-format"
                )
            if name in names:
                raise typer.BadParameter(
                    f"--save-labels: {names[name]} and {short_name(image)} would have one label file; run them one by "
                    "one, each into a folder of its own"
                )
            names[name] = short_name(image)
        self.classes: list[str] = []  # of YOLO, by number
        self.document: dict[str, Any] = {"images": [], "annotations": [], "categories": []}  # what COCO's file says
        self.images: list[dict[str, Any]] = []  # of this run, for COCO
        self.annotations: list[dict[str, Any]] = []
        self.unwritten = False  # whether `finish` has something to write
        if format == "yolo":
            self._read_yolo()
        elif format == "coco":
            self._read_coco()
        self.unnamed = self._number(classes)  # whether there are numbers that classes.txt does not explain yet

    def add(self, image: str, size: tuple[int, int], items: Sequence[Detection | Segment]) -> None:
        """size: width and height of the picture."""
        from paligemma.answers.formats import to_coco_results, to_voc, to_yolo

        name, stem = name_of(image), stem_of(image)
        self.unwritten = True
        self.unnamed |= self._number(item.label for item in items)
        if self.format == "yolo":
            if self.unnamed or not (self.folder / CLASSES).exists():
                self._write_names()  # before the numbers: those of a run that is killed keep their meaning too
            lines = to_yolo(items, size, self.classes)
            write_text(self.folder / f"{stem}.txt", "".join(f"{line}\n" for line in lines))
        elif self.format == "voc":
            write_text(self.folder / f"{stem}.xml", to_voc(items, size, name))
        else:
            number = self.image_ids.setdefault(name, max(self.image_ids.values(), default=0) + 1)
            self.images.append({"id": number, "file_name": name, "width": size[0], "height": size[1]})
            numbers = {category["name"]: category["id"] for category in self.document["categories"]}
            for row in to_coco_results(items, number, numbers):
                area = row["bbox"][2] * row["bbox"][3]
                if "segmentation" in row:
                    area = sum(row["segmentation"]["counts"][1::2])  # pixels inside the mask
                self.annotations.append({**row, "area": area, "iscrowd": 0})

    def finish(self) -> None:
        """Writes what belongs to all pictures together."""
        if not self.unwritten:
            return
        if self.format == "yolo":
            self._write_names()
        elif self.format == "coco":
            answered = {image["id"] for image in self.images}
            images = [image for image in self.document["images"] if image["id"] not in answered]
            annotations = [row for row in self.document["annotations"] if row["image_id"] not in answered]
            first = max((row["id"] for row in annotations), default=0) + 1
            annotations += [{"id": number, **row} for number, row in enumerate(self.annotations, first)]
            write_json(
                self.folder / COCO, {**self.document, "images": images + self.images, "annotations": annotations}
            )
        self.unwritten = False

    # ------------------------------------------------------------------------------------------ an earlier run

    def _read_yolo(self) -> None:
        path = self.folder / DATA
        if path.exists() and not path.read_text("utf-8", "replace").startswith(YOLO_HEAD):
            raise typer.BadParameter(f"--save-labels: {path} is not from this command; choose another folder")
        if (names := self.folder / CLASSES).exists():
            try:
                self.classes = names.read_text("utf-8-sig").splitlines()
            except UnicodeDecodeError:
                raise typer.BadParameter(f"--save-labels: {names} is no text in UTF-8; save it as UTF-8") from None

    def _read_coco(self) -> None:
        path = self.folder / COCO
        try:
            if path.exists():
                self.document |= read_json(path, largest=path.stat().st_size)
            self.image_ids: dict[str, int] = {image["file_name"]: image["id"] for image in self.document["images"]}
            numbers = [
                *self.image_ids.values(),
                *(row[key] for row in self.document["annotations"] for key in ("id", "image_id")),
                *(category["id"] for category in self.document["categories"] if category["name"]),
            ]
            if not all(isinstance(number, int) for number in numbers):
                raise ValueError("an id is no whole number")
        except (ValueError, LookupError, TypeError) as error:
            raise typer.BadParameter(
                f"--save-labels: {path} is no COCO data set that labels can be added to ({error!r}); choose another "
                "folder"
            ) from None

    # ------------------------------------------------------------------------------------------ classes

    def _number(self, labels: Iterable[str]) -> bool:
        """Gives numbers to labels that have none. Whether there were any."""
        categories = self.document["categories"]
        known = {*self.classes, *(category["name"] for category in categories)}
        new = [label for label in dict.fromkeys(labels) if label not in known]
        self.classes += new
        first = max((category["id"] for category in categories), default=0) + 1
        categories += [{"id": number, "name": label} for number, label in enumerate(new, first)]
        return bool(new)

    def _write_names(self) -> None:
        write_text(self.folder / CLASSES, "".join(f"{label}\n" for label in self.classes))
        names = "".join(f"  {number}: {json.dumps(label)}\n" for number, label in enumerate(self.classes))
        write_text(self.folder / DATA, f"{YOLO_HEAD}train: images\nnames:\n{names}")
        self.unnamed = False
