"""Boxes and masks of `paligemma run` as label files, for tools that annotate pictures or train on them.

    --label-format yolo     FOLDER/photo.txt for photo.jpg, and FOLDER/classes.txt with the names of the numbers
    --label-format coco     FOLDER/annotations.json, one data set with the scores of the boxes
    --label-format voc      FOLDER/photo.xml for photo.jpg; a mask is written as its box

A picture in which nothing was found gets a file too: in all three formats that means "looked at, and empty".
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from paligemma.cli.output import name_of, short_name, stem_of

if TYPE_CHECKING:
    from paligemma.answers.results import Detection, Segment

FORMATS = ("yolo", "coco", "voc")

# YOLO finds the labels of images/7.jpg in labels/7.txt, so a data set needs a folder of each.
YOLO_HEAD = "# Put this file above a folder `images` with the pictures and a folder `labels` with the text files.\n"


class LabelFiles:
    """The label files of one run. classes: the labels that the prompt asks for, numbered in this order; labels beyond
    them (an answer without the grammar may have some) are numbered as they come."""

    def __init__(self, folder: Path, format: str, images: Sequence[str], classes: Sequence[str]) -> None:
        """A usage error if two pictures have one name, or one that of the list of classes: label files are named after
        their pictures."""
        self.folder, self.format, self.classes = folder, format, list(classes)
        self.images: list[dict[str, Any]] = []
        self.annotations: list[dict[str, Any]] = []
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

    def add(self, image: str, size: tuple[int, int], items: Sequence[Detection | Segment]) -> None:
        """size: width and height of the picture."""
        from paligemma.answers.formats import to_coco_results, to_voc, to_yolo
        from paligemma.files import write_text

        name, stem = name_of(image), stem_of(image)
        self.classes += dict.fromkeys(item.label for item in items if item.label not in self.classes)
        if self.format == "yolo":
            lines = to_yolo(items, size, self.classes)
            write_text(self.folder / f"{stem}.txt", "".join(f"{line}\n" for line in lines))
        elif self.format == "voc":
            write_text(self.folder / f"{stem}.xml", to_voc(items, size, name))
        else:
            number = len(self.images) + 1
            self.images.append({"id": number, "file_name": name, "width": size[0], "height": size[1]})
            numbers = {label: k for k, label in enumerate(self.classes, 1)}
            for row in to_coco_results(items, number, numbers):
                area = row["bbox"][2] * row["bbox"][3]
                if "segmentation" in row:
                    area = sum(row["segmentation"]["counts"][1::2])  # pixels inside the mask
                self.annotations.append({"id": len(self.annotations) + 1, **row, "area": area, "iscrowd": 0})

    def finish(self) -> None:
        """Writes what belongs to all pictures together."""
        from paligemma.files import write_json, write_text

        if self.format == "yolo":
            write_text(self.folder / "classes.txt", "".join(f"{label}\n" for label in self.classes))
            names = "".join(f"  {k}: {json.dumps(label)}\n" for k, label in enumerate(self.classes))
            write_text(self.folder / "data.yaml", f"{YOLO_HEAD}train: images\nnames:\n{names}")
        elif self.format == "coco":
            categories = [{"id": number, "name": label} for number, label in enumerate(self.classes, 1)]
            document = {"images": self.images, "annotations": self.annotations, "categories": categories}
            write_json(self.folder / "annotations.json", document)
