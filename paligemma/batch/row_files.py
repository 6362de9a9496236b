"""--rows FILE -> rows: JSON lines, CSV, parquet, or a batch file in OpenAI's format.

    {"id": "7", "image": "photos/7.jpg", "prompt": "caption en"}           a line of JSON, a record of a CSV or parquet
    {"custom_id": "7", "method": "POST", "url": "/v1/chat/completions",    a line of an OpenAI batch file
     "body": {"messages": [...], "max_tokens": 64}}

`prefix` stands for `prompt` too, as in training data. `image` is a path relative to the file, a data: URL, a list of
them for a row that sees several, null for a row without a picture, and in parquet also the bytes of a picture. Without
an `id` the image as it stands there is the id. A blank cell of a CSV is null.

Anything that is wrong with the file is an error before work starts. (What is wrong with a picture is found later, and
is one row's error.)
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from paligemma.batch.inputs import refuse_url
from paligemma.batch.openai_format import is_request, read_request
from paligemma.batch.rows import InputRow, Where, plain
from paligemma.data.arrow_files import ArrowFiles
from paligemma.data.records import IMAGE, OTHER_IMAGE, first_of
from paligemma.data.text_files import CsvFile, JsonLines, parse_object, text_of
from paligemma.files import is_data_url


def list_rows(file: str, prompt: str | None = None) -> Iterator[InputRow]:
    """The rows of a file. prompt: of those that bring none. ValueError, naming the place, for what is no row."""
    path = Path(file)
    if not path.is_file():
        raise FileNotFoundError(f"{file}: no such file")
    records = _opened(path)
    for number in range(len(records)):
        record, place = records[number], records.where(number)
        if isinstance(records, CsvFile):
            record = {name: cell if cell.strip() else None for name, cell in record.items()}
        if is_request(record):
            yield _of_request(record, records, number, place)
        else:
            yield _of_record(record, records, number, place, prompt)


def is_batch_file(file: str | None) -> bool:
    """Whether a file of rows is a batch file in OpenAI's format, to be answered in its own format."""
    if file is None or not os.path.isfile(file):
        return False
    try:
        return is_request(_opened(Path(file))[0])
    except (ValueError, IndexError):
        return False


def _opened(path: Path) -> JsonLines | CsvFile | ArrowFiles:
    ending = path.suffix.lower()
    if ending in (".parquet", ".pq", ".arrow"):
        return ArrowFiles([path])
    if ending in (".csv", ".tsv"):
        return CsvFile(path)
    if ending in (".jsonl", ".ndjson"):
        return JsonLines(path)
    raise ValueError(f"{path}: rows are read from .jsonl, .csv and .parquet; a list of paths (.txt) is an INPUT")


def _of_record(record: dict[str, Any], records: Any, number: int, place: str, prompt: str | None) -> InputRow:
    asked = next((record[key] for key in ("prompt", "prefix") if record.get(key) is not None), prompt)
    if not isinstance(asked, str):
        raise ValueError(f"{place}: no prompt: expected one in 'prompt' (or before --rows, for all rows)")
    key = next((key for key in IMAGE if key in record), None)
    image = record[key] if key is not None else first_of(record, IMAGE, OTHER_IMAGE)
    if image is None and key is None:
        raise ValueError(f"{place}: no image: expected a path in 'image', or null for a row without a picture")
    column = key or next((name for name in record if record[name] is image), "image")
    given = record.get("id")
    if given is None:
        inline = not isinstance(image, str) or is_data_url(image)
        given = f"{os.path.basename(_file_of(records))}:{number + 1}" if inline else image
    places: Where | list[Where] | None = None
    if isinstance(image, list):
        places = [_where(one, records, number, place, column, k) for k, one in enumerate(image)]
    elif image is not None:
        places = _where(image, records, number, place, column, None)
    return InputRow(plain(str(given)), places, asked)


def _where(image: Any, records: Any, number: int, place: str, column: str, k: int | None) -> Where:
    """Where a picture is. What stands in the file itself is not copied into the list."""
    if isinstance(image, Mapping):  # how Hugging Face stores a picture
        content = image.get("bytes")
        if content and not isinstance(content, bytes):  # base64, perhaps: JSON has no bytes
            raise ValueError(
                f"{place}: the bytes of the image are text, expected its path or a data: URL in their place"
            )
        image = content or image.get("path")
    if isinstance(image, str) and image:
        if not is_data_url(image):
            refuse_url(image, f"{place}: ")
            return os.path.abspath(os.path.join(os.path.dirname(_file_of(records)), image))
        return _line(records, number, k or 0) if isinstance(records, JsonLines) else image
    if isinstance(image, bytes) and k is None:
        return {"table": os.path.abspath(_file_of(records)), "row": number, "column": column, "name": place}
    found = "empty" if image in ("", None) else type(image).__name__
    raise ValueError(
        f"{place}: the image is {found}, expected the path of a picture, or null in 'image' for a row without one"
    )


def _of_request(record: dict[str, Any], records: Any, number: int, place: str) -> InputRow:
    name, prompt, urls, options = read_request(record, place)
    places: list[Where] = []
    for k, url in enumerate(urls):
        places.append(_where(url, records, number, place, "image", k))
    return InputRow(plain(name), places if len(places) > 1 else places[0] if places else None, prompt, options)


def _line(records: JsonLines, number: int, picture: int) -> Where:
    """The place of a line, and of a picture in it."""
    start, end = (int(position) for position in records.starts[number : number + 2])
    path = os.path.abspath(records.pieces.path)
    name = f"{path}:{number + 1}"
    return {"file": path, "start": start, "size": end - start, "picture": picture, "name": name}


def pictures_in_line(line: bytes) -> list[Any]:
    """The pictures in a line of JSON, as they stand there: text, or {"path"}."""
    record = parse_object(text_of(line, "a line").strip(), "a line")
    if is_request(record):
        return read_request(record, "a line")[2]
    image = first_of(record, IMAGE, OTHER_IMAGE)
    return image if isinstance(image, list) else [image]


def _file_of(records: Any) -> str:
    return str(records.paths[0] if isinstance(records, ArrowFiles) else records.pieces.path)
