"""`paligemma batch export`: the answers of a run for other tools. Part after part is read, so memory stays small.

    jsonl, parquet    all lines in one file
    csv               a table; boxes and masks as JSON in their cells
    coco              a COCO data set: images, annotations with scores, categories
    yolo              labels/ID.txt for each picture, and classes.txt
    label-studio      tasks with predictions, to import: boxes, outlines of masks, or the text
    openai            answers in OpenAI's batch format

Rows that failed are in jsonl, parquet, csv and openai, which have a place for errors. The others leave them out.
"""

from __future__ import annotations

import csv
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from paligemma.answers.formats import outline, rle_encode, to_yolo
from paligemma.answers.results import Detection, Segment
from paligemma.batch.folder import STARTED, RunFolder
from paligemma.batch.openai_format import response_line
from paligemma.batch.pictures import places_of
from paligemma.batch.rows import InputRow, Line, Where, mask_of, path_of
from paligemma.batch.settings import EXPORTS
from paligemma.data.prompts import labels_of
from paligemma.files import is_data_url, picture_names, written_whole
from paligemma.tasks import asks_for_items

COLUMNS = (
    "id", "image", "prompt", "text", "score", "finished", "detections", "segments", "invalid", "image_size",
    "error_kind", "error_message", "attempts", "ms",
)  # fmt: skip


def export(folder: RunFolder, to: str, target: Path) -> int:
    """Writes the finished shards of a run to a file, for yolo to a folder. How many rows were written.

    to: one of the formats above. ValueError for another one, and for a target that is no place for it.
    """
    if to == "yolo":
        return export_yolo(folder, target)
    if target.is_dir():
        raise ValueError(f"{target} is a folder, expected the name of a file to write")
    if to == "parquet":
        from paligemma.batch.parquet import write_parquet

        with written_whole(target) as beside:
            return write_parquet(beside, lines_of(folder))
    writers = {
        "jsonl": write_jsonl, "csv": write_csv, "coco": write_coco, "label-studio": write_label_studio,
        "openai": write_openai,
    }  # fmt: skip
    if to not in writers:
        raise ValueError(f"there is no format {to!r}; there are: {', '.join(EXPORTS)}")
    with written_whole(target) as beside, beside.open("w", encoding="utf-8", newline="") as file:
        return writers[to](folder, file)


def lines_of(folder: RunFolder) -> Iterator[Line]:
    """All lines of finished shards, in the order of the list."""
    for shard in sorted(folder.done()):
        yield from folder.lines(shard)


def answered(folder: RunFolder) -> Iterator[Line]:
    """The same without rows that failed."""
    return (line for line in lines_of(folder) if line["error"] is None)


def _rows_and_lines(folder: RunFolder) -> Iterator[tuple[InputRow, Line]]:
    for shard in sorted(folder.done()):
        yield from zip(folder.rows(shard), folder.lines(shard), strict=True)


def _is_file(where: Where) -> bool:
    """Whether a picture is a file, and not a data: URL or a part of an archive, a video or a table."""
    return isinstance(where, str) and not is_data_url(where)


def items_of(line: Line) -> list[dict[str, Any]]:
    return [*line["detections"], *line["segments"]]


# ---------------------------------------------------------------------------------------------- lines and tables


def write_jsonl(folder: RunFolder, file: IO[str]) -> int:
    count = 0
    for line in lines_of(folder):
        file.write(json.dumps(line, ensure_ascii=False) + "\n")
        count += 1
    return count


def write_openai(folder: RunFolder, file: IO[str]) -> int:
    """`created` is when the run was begun: lines hold no time of their own. Nor do they say how many tokens prompt and
    answer had, so there is no `usage`, which OpenAI's format lets be absent."""
    count, created = 0, int(time.mktime(time.strptime(folder.about["started"], STARTED)))
    for line in lines_of(folder):
        file.write(json.dumps(response_line(line, folder.settings.model, created), ensure_ascii=False) + "\n")
        count += 1
    return count


def write_csv(folder: RunFolder, file: IO[str]) -> int:
    writer, count = csv.DictWriter(file, COLUMNS, extrasaction="ignore"), 0
    writer.writeheader()
    for line in lines_of(folder):
        error = line["error"] or {}
        cells = {name: _cell(value) for name, value in line.items()}
        writer.writerow({**cells, "error_kind": error.get("kind"), "error_message": error.get("message")})
        count += 1
    return count


def _cell(value: Any) -> Any:
    return json.dumps(value, ensure_ascii=False) if isinstance(value, list | dict) else value


# ---------------------------------------------------------------------------------------------- boxes and masks


def classes_of(folder: RunFolder) -> list[str]:
    """The labels of a run, numbered: those of the prompts in their order, then others as they come."""
    found: dict[str, None] = {}
    prompts: set[str] = set()
    for line in answered(folder):
        if line["prompt"] not in prompts and asks_for_items(line["prompt"]):
            prompts.add(line["prompt"])
            found.update(dict.fromkeys(labels_of(line["prompt"])))
        found.update(dict.fromkeys(item["label"] for item in items_of(line)))
    return list(found)


def write_coco(folder: RunFolder, file: IO[str]) -> int:
    """{"images": [...], "annotations": [...], "categories": [...]}, written as it goes. A picture that is asked about
    in several rows is one image."""
    numbers = {label: number for number, label in enumerate(classes_of(folder), 1)}
    images: dict[str, int] = {}  # number of each picture
    count = 0
    file.write('{"images": [')
    for line in answered(folder):
        count += 1
        picture = _picture_of(line)
        if picture not in images and line["image_size"] is not None:
            images[picture] = number = len(images) + 1
            name = line["id"] if picture.endswith(f"/{line['id']}") else picture  # that of the first row about it
            width, height = line["image_size"]
            _element(file, {"id": number, "file_name": name, "width": width, "height": height}, number > 1)
    file.write('\n], "annotations": [')
    annotations = 0
    for line in answered(folder):
        for item in items_of(line):
            annotations += 1
            entry = {"id": annotations, "image_id": images[_picture_of(line)], "category_id": numbers[item["label"]]}
            _element(file, {**entry, **_coco_of(item)}, annotations > 1)
    categories = [{"id": number, "name": label} for label, number in numbers.items()]
    file.write(f'\n], "categories": {json.dumps(categories, ensure_ascii=False)}}}\n')
    return count


def _element(file: IO[str], value: Any, follows: bool) -> None:
    file.write(",\n" if follows else "\n")
    file.write(json.dumps(value, ensure_ascii=False))


def _coco_of(item: dict[str, Any]) -> dict[str, Any]:
    x0, y0, x1, y1 = item["box"]
    entry = {"bbox": [x0, y0, x1 - x0, y1 - y0], "area": (x1 - x0) * (y1 - y0), "iscrowd": 0}
    entry["score"] = 1.0 if item["score"] is None else item["score"]
    mask = mask_of(item)
    if mask is not None:
        entry |= {"segmentation": rle_encode(mask), "area": int(mask.sum())}
    return entry


def _first_image(line: Line) -> str | None:
    """The picture that boxes and masks refer to: of several the first."""
    image = line["image"]
    if isinstance(image, list):
        return image[0] if image else None
    return image


def _picture_of(line: Line) -> str:
    """What tells pictures apart. The id where the picture has no name: of a data: URL a line holds only the beginning,
    which all PNGs have in common."""
    image = _first_image(line)
    return line["id"] if image is None or is_data_url(image) else image


def export_yolo(folder: RunFolder, target: Path) -> int:
    """A text file for each row that was answered, also where nothing was found: it was looked at, and is empty."""
    if target.exists() and not target.is_dir():
        raise ValueError(f"{target} is a file, expected a folder for the label files")
    files: dict[Path, str] = {}  # whose they are, known before anything is written
    for line in answered(folder):
        path = _label_file(line["id"])
        if path in files:
            raise ValueError(f"{files[path]} and {line['id']} would have one label file: give them other ids")
        files[path] = line["id"]
    classes, count = classes_of(folder), 0
    if (there := target / "classes.txt").is_file():
        before = there.read_text("utf-8", "replace").splitlines()
        if classes[: len(before)] != before:  # the same run may have found more by now
            raise ValueError(
                f"{there} numbers other classes, of label files that lie beside it: choose another folder, or remove it"
            )
    elif (foreign := next((target / "labels").rglob("*.txt"), None)) is not None:
        raise ValueError(
            f"{target} holds label files of another origin ({foreign.relative_to(target)}, and no classes.txt), which "
            "are not overwritten: choose another folder"
        )
    with written_whole(there) as beside:  # before the labels, so that an export that was cut short can be repeated
        beside.write_text("".join(f"{label}\n" for label in classes), encoding="utf-8", newline="\n")
    for line in answered(folder):
        items = [_result(item) for item in items_of(line)]
        text = "".join(f"{label}\n" for label in to_yolo(items, tuple(line["image_size"] or (1, 1)), classes))
        with written_whole(target / "labels" / _label_file(line["id"])) as beside:
            beside.write_text(text, encoding="utf-8", newline="\n")
        count += 1
    return count


def _label_file(id: str) -> Path:
    """The path of a picture with .txt in place of its ending. (In x.mp4/0007.500 the 500 is no ending.)"""
    path = path_of(id)
    return path.with_name(f"{path.stem if path.suffix.lower() in picture_names() else path.name}.txt")


def _result(item: dict[str, Any]) -> Detection | Segment:
    """A box or mask of a line as the result it was."""
    x0, y0, x1, y1 = item["box"]
    if "mask" in item:
        return Segment(item["label"], (x0, y0, x1, y1), mask_of(item), score=item["score"])
    return Detection(item["label"], (x0, y0, x1, y1), item["score"])


def write_label_studio(folder: RunFolder, file: IO[str]) -> int:
    """A list of tasks with predictions. The labelling interface needs an Image named "image", and RectangleLabels or
    PolygonLabels named "label", or a TextArea named "answer". ValueError for a picture that is no file of its own, as
    Label Studio could not show it."""
    count = 0
    file.write("[")
    for row, line in _rows_and_lines(folder):
        if line["error"] is not None:
            continue
        image = _first_image(line)
        if image is not None and not _is_file(places_of(row.image)[0]):
            raise ValueError(
                f"row {line['id']!r}: its picture is no file of its own ({image}), and Label Studio opens files: save "
                "the pictures as files and answer anew, or export to coco or jsonl"
            )
        results = [_label_studio_of(item, line["image_size"]) for item in items_of(line)]
        if not results:
            text = {"from_name": "answer", "to_name": "image", "type": "textarea", "value": {"text": [line["text"]]}}
            results = [text]
        prediction = {"model_version": folder.settings.model, "score": line["score"], "result": results}
        data = {"image": image, "id": line["id"], "prompt": line["prompt"]}
        count += 1
        _element(file, {"data": data, "predictions": [prediction]}, count > 1)
    file.write("\n]\n")
    return count


def _label_studio_of(item: dict[str, Any], size: list[int]) -> dict[str, Any]:
    """Coordinates are percents of the picture."""
    width, height = size
    mask = mask_of(item)
    points = [] if mask is None else (outline(mask) / [width, height] * 100).tolist()
    if points:
        kind, value = "polygonlabels", {"points": points, "closed": True, "polygonlabels": [item["label"]]}
    else:
        x0, y0, x1, y1 = item["box"]
        left, top = x0 / width * 100, y0 / height * 100
        sides = {"width": (x1 - x0) / width * 100, "height": (y1 - y0) / height * 100, "rotation": 0}
        kind, value = "rectanglelabels", {"x": left, "y": top, **sides, "rectanglelabels": [item["label"]]}
    about = {"from_name": "label", "to_name": "image", "type": kind, "value": value, "score": item["score"]}
    return {**about, "original_width": width, "original_height": height, "image_rotation": 0}
