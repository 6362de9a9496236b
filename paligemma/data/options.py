"""The options that say what the data are, with all their defaults, as train, evaluate and the data commands take them.

    rows = DataOptions("my.jsonl", images="pictures").open()
    rows = open_rows("my.jsonl", images="pictures")         # the same in one call; print(rows.note) says what it found
    rows[7]                                                 # Row(image="/data/7.png", prefix="answer en what ?", ...)

| kind            | what it is                                                                                     |
|-----------------|------------------------------------------------------------------------------------------------|
| `jsonl`         | one JSON object a line                                                                         |
| `json`          | one JSON list of objects (or {"data": [...]})                                                  |
| `csv`           | a table with a header, or the folder that it lies in                                           |
| `parquet`       | parquet files, or a folder of them                                                             |
| `arrow`         | a folder that Hugging Face `datasets` saved                                                    |
| `coco-detect`   | COCO annotations: `detect a ; b` -> boxes, a row for each picture                              |
| `coco-segment`  | the same with masks: `segment a ; b`                                                           |
| `coco-captions` | COCO captions: `caption en`, a row for each caption                                            |
| `vqa`           | VQA questions, with the file of annotations that goes with them                                |
| `yolo-detect`   | YOLO: a `data.yaml` (or its folder) and text files of labels                                   |
| `yolo-segment`  | the same with polygons as masks                                                                |
| `voc`           | Pascal VOC: an XML file for each picture                                                       |
| `labelme-detect`, `labelme-segment` | LabelMe: a JSON file for each picture                                      |
| `class-folders` | a folder of pictures for each class                                                            |

In the first five each record says what the model reads and writes: see `records.py`. Masks are never guessed, since
their annotations have boxes too. Rows are read when they are asked for, and asking for a row twice gives the same row.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from paligemma.answers.mask_codec import MaskCodec
    from paligemma.data.rows import Rows


@dataclass(frozen=True)
class DataOptions:
    """Where the data are and how rows are made of them.

    data: a file or a folder.
    kind: one of the table above; None: it follows from what is in the file.
    images: the folder that names of pictures are relative to; None: where the file lies.
    annotations: for VQA, the file with the answers.
    image_name: where records have no image, the name of its file by their other fields:
        "COCO_val2014_{image_id:012d}.jpg", which is the default in files of VQA v2.
    split: "train", "test", ...: which one, in a folder with several. An error where there is none to choose.
    language: of questions and captions, in the prompts made of them.
    every_label: of annotated boxes and masks: ask for all labels of the data set in every row, also in pictures without
        any (whose answer is empty), instead of those in the picture.
    """

    data: str | os.PathLike[str]
    kind: str | None = None
    images: str | os.PathLike[str] | None = None
    annotations: str | os.PathLike[str] | None = None
    image_name: str | None = None
    split: str | None = None
    language: str = "en"
    every_label: bool = False

    def how(self) -> dict[str, str | bool | None]:
        """How rows are made of the data, wherever they lie: results are only continued with the same. Options that are
        not set are left out, but for the kind."""
        named = {field.name: getattr(self, field.name) for field in fields(self) if field.name != "data"}
        return {name: value for name, value in named.items() if value or name == "kind"}

    def open(self, codec: MaskCodec | str | os.PathLike[str] | None = None, loc_scale: int = 1024) -> Rows:
        """The rows. codec, loc_scale: for masks and boxes, see `writing.format_segments`; a codec may be given as its
        path.

        FileNotFoundError; ValueError, naming the file and the way out, for what is of no known kind or is broken as a
        whole; ImportError that names a missing package.
        """
        from paligemma.data.opening import open_data

        return open_data(self, codec, loc_scale)


def open_rows(
    data: str | os.PathLike[str],
    kind: str | None = DataOptions.kind,
    *,
    images: str | os.PathLike[str] | None = DataOptions.images,
    annotations: str | os.PathLike[str] | None = DataOptions.annotations,
    image_name: str | None = DataOptions.image_name,
    split: str | None = DataOptions.split,
    language: str = DataOptions.language,
    every_label: bool = DataOptions.every_label,
    codec: MaskCodec | str | os.PathLike[str] | None = None,
    loc_scale: int = 1024,
) -> Rows:
    """`DataOptions(...).open(codec, loc_scale)` in one call."""
    options = DataOptions(data, kind, images, annotations, image_name, split, language, every_label)
    return options.open(codec, loc_scale)
