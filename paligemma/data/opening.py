"""Opening a data set: what it is, which files it is made of, and the reader for them."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from paligemma.data import box_tables, class_folders, coco, labelme, voc, vqa, yolo
from paligemma.data.arrow_files import ArrowFiles
from paligemma.data.conversations import Questions, is_conversation
from paligemma.data.folders import in_folder
from paligemma.data.json_documents import JsonRecords
from paligemma.data.kinds import KINDS, kind_of_file
from paligemma.data.objects import ObjectRows
from paligemma.data.records import (
    IMAGE,
    OTHER_IMAGE,
    RecordReader,
    RecordRows,
    Records,
    WithObjects,
    asks_for_objects,
    check_image_name,
)
from paligemma.data.rows import RowError, Rows
from paligemma.data.text_files import CsvFile, JsonLines

if TYPE_CHECKING:
    from paligemma.answers.mask_codec import MaskCodec
    from paligemma.data.options import DataOptions

ANNOTATED = tuple(kind for kind in KINDS if kind.endswith(("-detect", "-segment")) or kind == "voc")
# Which kinds of data an option is for, where it is not for all.
ONLY_FOR = {"annotations": ("vqa",), "every_label": ANNOTATED}
NAMES = {"jsonl": "JSON lines", "json": "a JSON list", "csv": "CSV", "parquet": "parquet", "arrow": "Arrow"}


def open_data(options: DataOptions, codec: MaskCodec | str | os.PathLike[str] | None, loc_scale: int) -> Rows:
    """See `DataOptions.open`."""
    kind, paths = kind_and_files(options)
    check_options(options, kind)
    folder = str(options.images if options.images is not None else paths[0].parent)
    if kind == "coco-captions":
        return coco.captions(paths[0], folder, options.language)
    if kind in ANNOTATED:
        make = ObjectRows(kind.endswith("-segment"), options.every_label, opened_codec(kind, codec), loc_scale)
        return open_annotated(kind, paths, options, make, folder)
    if kind == "vqa":
        return vqa.questions(paths[0], options.annotations, folder, options.image_name, options.language)
    if kind == "class-folders":
        return class_folders.pictures(paths, options.language, Path(options.data).is_dir())
    return open_table(kind, paths, options, folder, loc_scale)


def open_annotated(kind: str, paths: list[Path], options: DataOptions, make: ObjectRows, folder: str) -> Rows:
    """Boxes or masks."""
    images = None if options.images is None else str(options.images)
    if kind.startswith("coco"):
        return coco.objects(paths[0], folder, kind, make)
    if kind.startswith("yolo"):
        return yolo.objects(paths[0], kind, images, options.split, make)
    if kind == "voc":
        return voc.objects(paths, images, make)
    return labelme.objects(paths, kind, images, make)


def open_table(kind: str, paths: list[Path], options: DataOptions, folder: str, loc_scale: int) -> Rows:
    """Records, each of which is a row (or a conversation of several)."""
    records = open_records(kind, paths)
    if isinstance(records, CsvFile) and box_tables.is_box_table(records):
        return box_tables.objects(paths[0], records, folder, ObjectRows(loc_scale=loc_scale))
    files = str(paths[0]) if len(paths) == 1 else f"{len(paths)} files in {options.data}"
    note = f"{files}: {NAMES[kind]}, {len(records):,} rows"
    names = records.class_names if isinstance(records, ArrowFiles) else {}
    if starts_with(asks_for_objects, records):
        columns = ArrowFiles(paths, without=IMAGE + OTHER_IMAGE) if isinstance(records, ArrowFiles) else records
        pictures, records = len(records), WithObjects(records, columns)
        note = f"{files}: {NAMES[kind]}, {len(records):,} rows"
        left_out = pictures - len(records)
        note += f" ({left_out:,} pictures without objects left out)" if left_out else ""
    elif starts_with(is_conversation, records):
        conversations, records = records, Questions(records)
        note = f"{files}: {NAMES[kind]}, {len(records):,} questions of {len(conversations):,} conversations"
    boxes = ObjectRows(loc_scale=loc_scale, names=names.get("objects"))
    make = RecordRows(folder, options.language, options.image_name, names, boxes)
    return Rows(kind, note, len(records), RecordReader(records, make), paths)


def starts_with(form: Callable[[dict[str, Any]], bool], records: Records) -> bool:
    try:
        return len(records) > 0 and form(records[0])
    except RowError:
        return False


def kind_and_files(options: DataOptions) -> tuple[str, list[Path]]:
    """What the data are and the files they are read from, of which there is at least one."""
    path, kind = Path(options.data), options.kind
    if kind is not None and kind not in KINDS:
        raise ValueError(f"there is no kind of data {kind!r}; there are: {', '.join(KINDS)}")
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file or folder")
    for given in (path, options.annotations):
        if given is not None and os.path.exists(given) and not (os.path.isfile(given) or os.path.isdir(given)):
            raise ValueError(
                f"{given} is a device or a pipe, expected a file or a folder: save what it gives to a file"
            )
    if options.split is not None and not path.is_dir() and path.suffix.lower() not in (".yaml", ".yml"):
        raise ValueError(f"{path} is a single file, without splits: leave out split= (--split), or name its folder")
    found, paths = in_folder(path, kind, options.split) if path.is_dir() else (None, [path])
    return kind or found or kind_of_file(paths[0], needs_images=options.image_name is None), paths


def check_options(options: DataOptions, kind: str) -> None:
    """ValueError for options that do not fit the data."""
    if options.image_name is not None:
        check_image_name(options.image_name)
    for option, kinds in ONLY_FOR.items():
        if getattr(options, option) and kind not in kinds:
            raise ValueError(
                f"{option} is for data of the kind {' or '.join(kinds)}, and {options.data} is {kind}: leave out "
                f"{option}= (--{option.replace('_', '-')}), or say with kind= (--kind) what the data is"
            )


def opened_codec(kind: str, codec: MaskCodec | str | os.PathLike[str] | None) -> MaskCodec | None:
    """None for data without masks. ValueError where masks have no codec to become tokens."""
    if not kind.endswith("-segment"):
        return None
    if codec is None:
        raise ValueError(
            "masks need a codec to become tokens, the model's or the official one: --model NAME (tiny has its own); in "
            "Python codec='vae-oid.npz', or MaskCodec.load() to fetch it"
        )
    if not isinstance(codec, (str, os.PathLike)):
        return codec
    from paligemma.answers.mask_codec import MaskCodec

    return MaskCodec.load(Path(codec))


def open_records(kind: str, paths: list[Path]) -> Records:
    if kind == "jsonl":
        return JsonLines(paths[0])
    if kind == "json":
        return JsonRecords(paths[0])
    if kind == "csv":
        return CsvFile(paths[0])
    return ArrowFiles(paths)
