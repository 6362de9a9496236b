"""Your data -> rows to train on: a picture, what the model reads, what it shall write.

    rows = open_rows("my.jsonl")          # looks into the file to see what it is; print(rows.note) says what it saw
    rows[7]                               # Row(image="/data/7.png", prefix="answer en what ?", suffix="a dog", ...)

| kind            | what it is                                                                                     |
|-----------------|------------------------------------------------------------------------------------------------|
| `jsonl`         | one JSON object a line                                                                         |
| `json`          | one JSON list of objects (or {"data": [...]})                                                  |
| `csv`           | a table with a header, or the folder that it lies in                                           |
| `parquet`       | parquet files, or a folder of them                                                             |
| `arrow`         | a folder that Hugging Face `datasets` saved                                                    |
| `coco-detect`   | COCO annotations: `detect a ; b` -> boxes, a row for each picture                              |
| `coco-segment`  | the same with masks: `segment a ; b` (never guessed: COCO files with masks have boxes too)     |
| `coco-captions` | COCO captions: `caption en`, a row for each caption                                            |
| `vqa`           | VQA questions, with the file of annotations that goes with them                                |

In the first five a record says what the model reads and writes in one of three ways; what else it has is ignored:

    {"image": "7.png", "prefix": "answer en what is it ?", "suffix": "a dog"}     (or "answers" instead of a suffix)
    {"image": "7.png", "question": "what is it ?", "answers": ["a dog", "dog", "a dog"]}
    {"image": "7.png", "caption": "a dog asleep"}                                 (or a list of them)

`image` (or `file_name`) is a path, relative to the file it stands in (or to `images`), a list of them for a row that
sees several, or, in Arrow and parquet, the picture itself. `null` is allowed: a row without a picture.

Of several answers or captions training takes another in each epoch (`batches.py`), as the reference does, and measuring
takes any for right; with an "answer" or a suffix beside them, that one alone is learned.

Rows are read when they are asked for, and asking for a row twice gives the same row: see `data_files.py`.
"""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from string import Formatter
from typing import TYPE_CHECKING, Any

from paligemma.data.tables import BOM, ArrowFiles, CsvFile, JsonFile, JsonLines, RowError, elements_of
from paligemma.files import read_json

if TYPE_CHECKING:
    from paligemma.answers.mask_codec import Box, MaskCodec

Picture = str | bytes  # a path, or the bytes of a picture file

KINDS = ("jsonl", "json", "csv", "parquet", "arrow", "coco-detect", "coco-segment", "coco-captions", "vqa")


@dataclass(frozen=True)
class Row:
    """One example. `image`: one picture, a tuple of several that the row sees together, or None. `suffix` is what is
    trained on, unless there are `suffixes`, which are in turn; `answers` are all that count as right when answers are
    measured. Both are empty where the data have but one."""

    image: Picture | tuple[Picture, ...] | None
    prefix: str
    suffix: str
    number: int  # rows[number]
    source: str  # where it stands: "my.jsonl:12"
    size: tuple[int, int] | None = None  # width and height as the annotation gives them
    boxes: tuple[Box, ...] = field(default=(), repr=False)  # as annotated, in pixels, before they are cut and rounded
    answers: tuple[str, ...] = field(default=(), repr=False)
    suffixes: tuple[str, ...] = field(default=(), repr=False)

    @property
    def pictures(self) -> tuple[Picture, ...]:
        return self.image if isinstance(self.image, tuple) else () if self.image is None else (self.image,)


class Rows(Sequence[Row]):
    """Rows of one source. `rows[i]` raises `RowError` for a row that cannot be used, and reads nothing else.

    kind: one of `KINDS`. note: what was opened, for people. files: all that rows are read from, but for the pictures.
    """

    def __init__(
        self, kind: str, note: str, length: int, read: Callable[[int], Row], files: Sequence[Path] = ()
    ) -> None:
        self.kind, self.note, self.length, self.read, self.files = kind, note, length, read, tuple(files)

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, i: Any) -> Any:
        if isinstance(i, slice):
            return [self[k] for k in range(self.length)[i]]
        if not -self.length <= i < self.length:
            raise IndexError(f"row {i} of {self.length}")
        row = self.read(i % self.length)
        for text in (row.prefix, row.suffix, *row.suffixes, *row.answers):
            if not text.isascii() and (half := _HALF.search(text)):  # no tokenizer takes it, and no file
                raise RowError(row.source, "half a character", f"{half[0]!r} stands alone in {_short(text)}")
        return row


_HALF = re.compile("[\ud800-\udfff]")  # of a pair that makes a character beyond the first 65,536


def open_rows(
    path: str | os.PathLike[str],
    kind: str | None = None,
    *,
    images: str | os.PathLike[str] | None = None,
    annotations: str | os.PathLike[str] | None = None,
    image_name: str | None = None,
    split: str | None = None,
    language: str = "en",
    every_label: bool = False,
    codec: MaskCodec | str | os.PathLike[str] | None = None,
    loc_scale: int = 1024,
) -> Rows:
    """The rows of a file or folder; what it is follows from what is in it, unless `kind` says.

    images: the folder that names of pictures are relative to; default: where the file lies.
    annotations: for VQA, the file with the answers.
    image_name: where records have no image, the name of its file by their other fields:
        "COCO_val2014_{image_id:012d}.jpg", which is the default in files of VQA v2.
    split: "train", "test", ...: which one, in a folder with several. An error where there is none to choose.
    language: of questions and captions, in the prompts made of them.
    every_label: COCO: ask for all labels of the data set in every row, also in pictures without any (whose answer is
        empty), instead of those in the picture.
    codec, loc_scale: for masks and boxes, see `grammar.format_segments`. A codec may be given as its path.

    FileNotFoundError; ValueError, naming the file and the way out, for what is none of `KINDS` or is broken as a whole;
    ImportError that names a missing package.
    """
    path = Path(path)
    if kind is not None and kind not in KINDS:
        raise ValueError(f"there is no kind of data {kind!r}; there are: {', '.join(KINDS)}")
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file or folder")
    if image_name is not None:
        check_image_name(image_name)
    if split is not None and not path.is_dir():
        raise ValueError(f"{path} is a single file, without splits: leave out split= (--split), or name its folder")
    found, paths = _in_folder(path, kind, split) if path.is_dir() else (kind, [path])
    kind = kind or found or _recognised(paths[0])
    for option, given, kinds in (
        ("annotations", annotations, ("vqa",)),
        ("every_label", every_label, ("coco-detect", "coco-segment")),
    ):
        if given and kind not in kinds:
            raise ValueError(
                f"{option} is for data of the kind {' or '.join(kinds)}, and {path} is {kind}: leave out "
                f"{option}= (--{option.replace('_', '-')}), or say with kind= (--kind) what the data is"
            )
    folder = str(images if images is not None else paths[0].parent)

    if kind.startswith("coco"):
        from paligemma.data import coco as data_coco

        if kind == "coco-captions":
            return data_coco.captions(paths[0], folder, language)
        return data_coco.objects(paths[0], folder, kind, every_label, codec, loc_scale)
    if kind == "vqa":
        return _vqa(paths[0], annotations, folder, image_name, language)

    records: Any
    if kind == "jsonl":
        records = JsonLines(paths[0])
    elif kind == "json":
        records = JsonRecords(paths[0])
    elif kind == "csv":
        records = CsvFile(paths[0])
    else:
        records = ArrowFiles(paths)
    files = str(paths[0]) if len(paths) == 1 else f"{len(paths)} files in {path}"
    note = f"{files}: {_NAMES[kind]}, {len(records):,} rows"
    return Rows(kind, note, len(records), RecordReader(records, folder, language, image_name), paths)


_NAMES = {"jsonl": "JSON lines", "json": "a JSON list", "csv": "CSV", "parquet": "parquet", "arrow": "Arrow"}

# -- records -> rows --


@dataclass(frozen=True)
class RecordReader:
    """Record i as a row. (Not a closure, so that rows can be pickled.)"""

    records: Any  # records[i] -> dict, records.where(i)
    folder: str
    language: str
    image_name: str | None

    def __call__(self, i: int) -> Row:
        return to_row(self.records[i], self.folder, self.language, self.image_name, i, self.records.where(i))


def to_row(record: dict[str, Any], folder: str, language: str, image_name: str | None, number: int, where: str) -> Row:
    """A record in one of the three forms at the head of this file -> a row. RowError for any other."""
    prefix, suffix, answers = record.get("prefix"), record.get("suffix"), _answers(record)
    named = suffix is not None or record.get("answer") is not None
    if suffix is None and prefix is None and record.get("question") is not None:
        prefix = f"answer {language} {record['question']}"
    if suffix is None and prefix is not None:
        suffix = best_answer(record)
    elif suffix is None:
        caption = next((record[key] for key in ("caption", "text") if record.get(key) is not None), None)
        if caption is not None:
            prefix, answers, named = f"caption {language}", caption, False
            suffix = caption[0] if isinstance(caption, list) and caption else caption
    for name, value in (("prefix", prefix), ("suffix", suffix)):
        if value is None:
            raise RowError(
                where,
                "missing key",
                f"no {name}: expected image, prefix and suffix (or question and answer, or caption); "
                f"it has {', '.join(map(str, record)) or 'nothing'}",
            )
        if not isinstance(value, str):
            raise RowError(where, "wrong type", f"the {name} is {_short(value)}, expected text in quotes")
    key = next((key for key in ("image", "images", "file_name") if key in record), None)
    if key is not None:
        value = record[key]
    elif image_name is None:
        raise RowError(
            where,
            "missing key",
            "no image: expected a path in 'image' (null for a row without one), or a name made of other fields "
            f"(image_name='{{image_id}}.jpg'); it has {', '.join(map(str, record))}",
        )
    else:
        try:
            value = image_name.format(**record)
        except (KeyError, ValueError, IndexError, TypeError, AttributeError, OverflowError) as error:
            raise RowError(
                where, "missing key", f"image_name {image_name!r} does not fit its fields: {error}"
            ) from None
    if isinstance(value, (list, tuple)):
        picture: Any = tuple(_picture(item, folder, where) for item in value) or None
    else:
        picture = None if value is None else _picture(value, folder, where)
    right: tuple[str, ...] = ()
    if isinstance(answers, list) and all(isinstance(text, str) for text in answers):
        right = tuple(answers)
    return Row(picture, prefix, suffix, number, where, answers=right, suffixes=() if named else right)  # type: ignore[arg-type]


def check_image_name(name: str) -> None:
    """ValueError for what cannot be filled in, or would be a longer name than any file has: a width of a thousand
    million takes as many bytes."""
    try:
        specs = [spec or "" for _, _, spec, _ in Formatter().parse(name)]
    except ValueError as error:
        raise ValueError(f"image_name {name!r}: {error}; expected something like '{{image_id:012d}}.jpg'") from None
    for spec in specs:
        if "{" in spec or any(float(number) > 255 for number in re.findall(r"\d+", spec)):
            raise ValueError(f"image_name {name!r}: {spec!r} is no width; expected a number up to 255, as in '012d'")


def _picture(value: Any, folder: str, where: str) -> Picture:
    if isinstance(value, dict):  # how Hugging Face stores a picture
        value = value.get("bytes") or value.get("path")
    if isinstance(value, str) and value:
        return os.path.join(folder, value)
    if isinstance(value, bytes) and value:
        return value
    raise RowError(where, "wrong type", f"the image is {_short(value)}, expected the path of a picture")


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def best_answer(record: dict[str, Any]) -> Any:
    """The answer that the data set names, or else the commonest; of equally common ones the first. None if there is
    none. Answers are text, or objects with the text in "answer" (VQA)."""
    for key in ("multiple_choice_answer", "suffix", "answer"):
        if record.get(key) is not None:
            return record[key]
    answers = _answers(record)
    if not isinstance(answers, list) or not answers:
        return answers or None
    if not all(isinstance(text, str) for text in answers):
        return answers
    return Counter(answers).most_common(1)[0][0]


def _answers(record: dict[str, Any]) -> Any:
    answers = record.get("answers")
    if isinstance(answers, dict):  # SQuAD and relatives
        answers = answers.get("text")
    if isinstance(answers, list):  # VQA's answers are objects
        return [answer.get("answer") if isinstance(answer, dict) else answer for answer in answers]
    return answers


class JsonRecords:
    """The objects of one JSON list."""

    def __init__(self, path: Path) -> None:
        self.file = JsonFile(path)
        self.key = next((key for key in ("", "data", "annotations", "questions") if key in self.file.spans), "")
        if not self.file.count(self.key):
            raise ValueError(f'{path} has no list of rows: expected [{{"image": ...}}, ...] or {{"data": [...]}}')

    def __len__(self) -> int:
        return self.file.count(self.key)

    def __getitem__(self, i: int) -> dict[str, Any]:
        if not 0 <= i < len(self):
            raise IndexError(f"there are {len(self)} rows")
        record = self.file.element(self.key, i)
        if not isinstance(record, dict):
            raise RowError(self.where(i), "not JSON", f"expected an object, got {_short(record)}")
        return record

    def where(self, i: int) -> str:
        return self.file.where(self.key, i)


# -- VQA --


@dataclass(frozen=True)
class QuestionReader:
    questions: JsonFile
    answers: JsonFile
    order: Any  # int64 [questions], where the answers to each stand
    folder: str
    image_name: str
    language: str

    def __call__(self, i: int) -> Row:
        where = self.questions.where("questions", i)
        question = self.questions.element("questions", i)
        answers = self.answers.element("annotations", int(self.order[i]))
        question |= {key: answers.get(key) for key in ("answer", "answers", "multiple_choice_answer")}
        return to_row(question, self.folder, self.language, self.image_name, i, where)


def _vqa(
    path: Path, annotations: str | os.PathLike[str] | None, folder: str, image_name: str | None, language: str
) -> Rows:
    import numpy as np

    ids: dict[str, list[Any]] = {"questions": [], "annotations": []}
    subtype: list[str] = []

    def look(key: str, element: Any) -> None:
        if key in ids:
            found = element.get("question_id") if isinstance(element, dict) else None
            if not isinstance(found, (int, float, str)):
                raise ValueError(
                    f"{file} {key}[{len(ids[key])}] has no question_id, by which questions and answers are joined: "
                    f"expected a number or text, got {_short(found)}"
                )
            ids[key].append(found)
        elif key == "data_subtype":
            subtype.append(str(element))

    file = path
    questions = answers = JsonFile(file, look)
    if annotations is not None:
        ids["annotations"].clear()
        file = Path(annotations)
        answers = JsonFile(file, look)
    if not questions.count("questions"):
        raise ValueError(f"{path} has no 'questions'")
    if not answers.count("annotations"):
        raise ValueError(
            f"{path} has questions without answers: name the file with the answers too (annotations=...), such as "
            "v2_mscoco_train2014_annotations.json"
        )
    place = {question: i for i, question in enumerate(ids["annotations"])}
    missing = [question for question in ids["questions"] if question not in place]
    if missing:
        raise ValueError(
            f"{len(missing)} of {len(ids['questions'])} questions in {path} have no answer in "
            f"{answers.pieces.path}, the first is question_id {missing[0]}: do the two files belong together?"
        )
    order = np.array([place[question] for question in ids["questions"]], np.int64)
    if image_name is None:
        image_name = f"COCO_{subtype[0]}_{{image_id:012d}}.jpg" if subtype else "{image_id}.jpg"
    reader = QuestionReader(questions, answers, order, folder, image_name, language)
    files = dict.fromkeys((path, answers.pieces.path))  # which may be one
    return Rows("vqa", f"{path}: VQA questions, {len(order):,} rows", len(order), reader, list(files))


# -- what is it? --


def _in_folder(folder: Path, kind: str | None, split: str | None) -> tuple[str | None, list[Path]]:
    """The kind and the files of the data set in a folder. They are of one split, and of several none is chosen unasked:
    who trains on "test" too doesn't see it."""
    saved = folder / "dataset_dict.json"  # several data sets that `datasets` has saved together
    if saved.is_file():
        splits = {name: [folder / name] for name in read_json(saved)["splits"]}
        return _in_folder(_of_one_split(splits, folder, split)[0], kind, None)
    state = folder / "state.json"
    if state.is_file() and kind in (None, "arrow"):
        if split is not None:
            raise ValueError(f"{folder} is one data set, without splits: leave out split= (--split)")
        files = read_json(state)["_data_files"]
        # Names out of a file, so they must not lead elsewhere.
        return "arrow", [folder / Path(file["filename"]).name for file in files]

    parquet = sorted(file for file in folder.rglob("*.parquet") if file.is_file())  # Spark calls folders so too
    if parquet and kind in (None, "parquet"):
        return "parquet", _of_one_split(_splits(parquet, folder), folder, split)

    others: list[Path] = []  # files that are no rows of this split
    for name, endings in (("csv", (".csv", ".tsv")), ("jsonl", (".jsonl", ".ndjson")), (None, (".json",))):
        if kind is not None and name not in (None, kind):
            continue
        found = sorted(file for file in folder.iterdir() if file.suffix.lower() in endings and file.is_file())
        if split is not None:
            others += found
            found = _splits(found, folder).get(split, [])
        if len(found) > 1:
            raise ValueError(
                f"{folder} has {len(found)} files that could be meant ({', '.join(file.name for file in found[:5])}"
                f"{', ...' if len(found) > 5 else ''}): name one of them"
            )
        if found:
            return kind or name, found
    if others:
        return None, _of_one_split(_splits(others, folder), folder, split)  # which says what there is
    raise ValueError(
        f"{folder} is a folder without a CSV file that says what its pictures show (nor JSON lines, JSON, parquet or a "
        "data set of Hugging Face): write a CSV with the columns image, prefix, suffix"
    )


# What numbers the files that belong together: all of the name, all that Spark writes, or the end of it.
_NUMBER = re.compile(r"^\d+$|^part-\d+.*$|-\d{5}(-of-\d{5})?(-[0-9a-f]+)?$")


def _splits(files: Sequence[Path], folder: Path) -> dict[str, list[Path]]:
    """The files of each split. Its name is what remains of their paths without numbers: "train" of `train.jsonl`,
    `data/train-00000-of-00002.parquet`, `train/0000.parquet`, `train.parquet/part-00000.parquet` and
    `split=train/year=2020/part-00000.parquet`, "en/train" of `en/train-00000-of-00001.parquet`."""
    names = []
    for file in files:
        *folders, _ = file.relative_to(folder).parts
        parts = [part.removesuffix(".parquet") for part in folders if part != "data"]  # as the Hub likes to call it
        # Hive and Spark: a column's value, of which rows of one split may have any
        parts = [part.removeprefix("split=") for part in parts if "=" not in part or part.startswith("split=")]
        parts.append(_NUMBER.sub("", file.stem))
        names.append("/".join(filter(None, parts)) or "(numbers alone)")
    splits: dict[str, list[Path]] = {}
    for name, file in zip(_without_shard_numbers(names), files, strict=True):
        splits.setdefault(name, []).append(file)
    return splits


def _without_shard_numbers(names: Sequence[str]) -> list[str]:
    """`part.0` and `part.1` -> `part` twice, `chunk-000/episode_000000` -> `chunk/episode`.

    Numbers at the end of a file's or folder's name are those of shards where they begin with 0 or 1 and count up
    without holes. Others tell data sets apart, as in `coco-2014` and `coco-2017`; so does a number whose name stands
    there without any too: `train_1` beside `train`.
    """
    pieces = [re.split(r"([-_.]\d+)(?=/|$)", name) for name in names]  # text, "-001", text, ..., text
    seen: dict[tuple[str, ...], list[set[int]]] = {}  # the texts -> the numbers at each place between them
    for parts in pieces:
        numbers = seen.setdefault(tuple(parts[::2]), [set() for _ in parts[1::2]])
        for found, number in zip(numbers, parts[1::2], strict=True):
            found.add(int(number[1:]))

    taken = set(names)
    are_shards = {
        texts: [min(found) <= 1 and max(found) - min(found) + 1 == len(found) for found in numbers]
        for texts, numbers in seen.items()
        if "".join(texts) not in taken
    }
    for parts in pieces:
        for place, is_shard in enumerate(are_shards.get(tuple(parts[::2]), ())):
            if is_shard:
                parts[2 * place + 1] = ""
    return ["".join(parts) for parts in pieces]


def _of_one_split(splits: dict[str, list[Path]], folder: Path, split: str | None) -> list[Path]:
    """The files of the split that is asked for, or of the only one. "train" is "en/train" too, if no other is."""
    names = list(splits) if split is None else [name for name in splits if split in name.split("/")]
    if split in splits:
        names = [split]
    if not names:
        raise ValueError(
            f"{folder} has no split {split!r}; it has {', '.join(splits)}: choose one of these with split= (--split)"
        )
    if len(names) > 1:
        raise ValueError(
            f"{folder} has the splits {', '.join(names)}: choose one with split= (--split); files that belong together "
            "are called NAME-00000, NAME-00001, ..."
        )
    return splits[names[0]]


def _recognised(path: Path) -> str:
    """The kind of a file, by its beginning."""
    with open(path, "rb") as file:
        head = file.read(1 << 20).removeprefix(BOM)
    if head.startswith(b"PAR1"):
        return "parquet"
    if head.startswith((b"ARROW1", b"\xff\xff\xff\xff")):
        return "arrow"
    if head.startswith((b"\x1f\x8b", b"PK\x03\x04", b"\xfd7zXZ", b"BZh", b"\x28\xb5\x2f\xfd")):
        raise ValueError(f"{path} is compressed: unpack it first, since rows are read at their places in the file")
    start = head.lstrip()
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
    line = start.split(b"\n", 1)[0].decode("utf-8", "replace")
    if {"image", "file_name"} & {name.strip(' "\r') for name in max((line.split(c) for c in ",;\t"), key=len)}:
        return "csv"
    raise ValueError(
        f"{path} is no data that is known here. There are {', '.join(KINDS)}; a table needs a header with the columns "
        "image, prefix, suffix"
    )


_DOCUMENT = ("images", "annotations", "questions", "data", "categories")


def _document(path: Path) -> str:
    """The kind of a JSON document, by the keys of the objects in it."""
    keys: dict[str, set[str]] = {}  # at the top, and in the first object there
    for key, element, _, _ in elements_of(path):
        if not keys.get(key):
            keys[key] = set(element) if isinstance(element, dict) else set()
        if keys.get("annotations") and ("images" in keys or "questions" in keys):
            break  # enough seen, without going through the whole file
    annotation = keys.get("annotations", set())
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
