"""What kind of data is a file? Told by its beginning."""

from __future__ import annotations

import json
from pathlib import Path

from paligemma.data.json_documents import elements_of
from paligemma.data.records import IMAGE, OTHER_IMAGE
from paligemma.data.text_files import BOM

KINDS = (
    "jsonl", "json", "csv", "parquet", "arrow", "coco-detect", "coco-segment", "coco-captions", "vqa", "yolo-detect",
    "yolo-segment", "voc", "labelme-detect", "labelme-segment", "class-folders",
)  # fmt: skip


def kind_of_file(path: Path, needs_images: bool = True) -> str:
    """One of `KINDS`. ValueError for a file that is none of them. needs_images: whether a table is known by a column
    of pictures, or by the ending of its name."""
    with open(path, "rb") as file:
        head = file.read(1 << 20).removeprefix(BOM)
    if head.startswith(b"PAR1"):
        return "parquet"
    if head.startswith((b"ARROW1", b"\xff\xff\xff\xff")):
        return "arrow"
    if head.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise ValueError(f"{path} is text in UTF-16: save it as UTF-8 (in Excel: CSV UTF-8)")
    if head.startswith((b"\x1f\x8b", b"PK\x03\x04", b"\xfd7zXZ", b"BZh", b"\x28\xb5\x2f\xfd")):
        raise ValueError(f"{path} is compressed: unpack it first, since rows are read at their places in the file")
    start = head.lstrip()
    if path.suffix.lower() in (".yaml", ".yml"):
        return "yolo-detect"
    if not start:
        raise ValueError(f"{path} is empty")
    if start.startswith(b"["):
        return "json"
    if start.startswith(b"{"):
        try:
            first = json.loads(start.split(b"\n", 1)[0], parse_int=str)  # however many digits
        except (ValueError, RecursionError):
            first = None  # not whole on a line: a document, unless its name says that the line is broken
        document = first is None or any(isinstance(first.get(key), list) for key in _DOCUMENT)
        if path.suffix.lower() in (".jsonl", ".ndjson") or not document:
            return "jsonl"
        return _document(path)
    if start.startswith(b"<") and b"<annotation" in start:
        return "voc"
    line = start.split(b"\n", 1)[0].decode("utf-8", "replace")
    columns = {name.strip(' "\r').lower() for name in max((line.split(c) for c in ",;\t"), key=len)}
    if columns & {*IMAGE, *OTHER_IMAGE} or (not needs_images and path.suffix.lower() in (".csv", ".tsv")):
        return "csv"
    raise ValueError(
        f"{path} is no data that is known here. There are {', '.join(KINDS)}; a table needs a header with the columns "
        "image, prefix, suffix"
    )


_DOCUMENT = ("images", "annotations", "questions", "data", "categories", "shapes")


def _document(path: Path) -> str:
    """The kind of a JSON document, by the keys of the objects in it."""
    keys: dict[str, set[str]] = {}  # at the top, and in the first object there
    for key, element, _, _ in elements_of(path):
        if not keys.get(key):
            keys[key] = set(element) if isinstance(element, dict) else set()
        if keys.get("annotations") and ("images" in keys or "questions" in keys):
            break  # enough seen, without going through the whole file
    annotation = keys.get("annotations", set())
    if "shapes" in keys:
        return "labelme-detect"
    if "questions" in keys and not {"answer", "answers"} & keys["questions"]:
        return "vqa"
    if "images" in keys and "caption" in annotation:
        return "coco-captions"
    if "images" in keys and ({"bbox", "segmentation", "category_id"} & annotation or "categories" in keys):
        return "coco-detect"
    if "data" in keys or "questions" in keys or "image" in annotation:
        return "json"
    raise ValueError(
        f"{path} is a JSON document with the keys {', '.join(sorted(keys)) or 'nothing'}, which is no data that is "
        f"known here. There are {', '.join(KINDS)}"
    )
