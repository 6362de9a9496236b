"""Lines as parquet: parts with --format parquet, and `export --to parquet`.

The columns are the keys of a line. Boxes are lists of structs; masks are their JSON, since run lengths and PNG differ.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import Any

from paligemma.batch.rows import Line

ROWS = 256  # of a row group


def schema() -> Any:
    """The columns, as pyarrow has them. ImportError, with the way out, without pyarrow."""
    try:
        import pyarrow as pa
    except ImportError:
        raise ImportError("parquet needs the package pyarrow: pip install pyarrow") from None

    item = [("label", pa.string()), ("box", pa.list_(pa.float64())), ("score", pa.float64())]
    error = [("kind", pa.string()), ("message", pa.string())]
    span = [("span", pa.list_(pa.int64())), ("reason", pa.string())]
    return pa.schema(
        [
            ("id", pa.string()),
            ("image", pa.string()),
            ("prompt", pa.string()),
            ("text", pa.string()),
            ("score", pa.float64()),
            ("finished", pa.bool_()),
            ("detections", pa.list_(pa.struct(item))),
            ("segments", pa.list_(pa.struct([*item, ("mask", pa.string())]))),
            ("invalid", pa.list_(pa.struct(span))),
            ("image_size", pa.list_(pa.int64())),
            ("error", pa.struct(error)),
            ("attempts", pa.int64()),
            ("ms", pa.int64()),
        ]
    )


def write_parquet(path: Path, lines: Iterable[Line]) -> int:
    """Writes lines, a row group at a time. How many they were."""
    columns = schema()
    import pyarrow as pa
    import pyarrow.parquet

    count, rows = 0, iter(lines)
    with pyarrow.parquet.ParquetWriter(path, columns) as writer:
        while group := [_flat(line) for line in islice(rows, ROWS)]:
            writer.write_table(pa.Table.from_pylist(group, columns))
            count += len(group)
    return count


def read_part(path: Path) -> Iterator[Line]:
    """The lines of a part, as they were written."""
    import pyarrow.parquet

    with pyarrow.parquet.ParquetFile(path) as file:
        for batch in file.iter_batches(ROWS):
            yield from map(_whole, batch.to_pylist())


def _flat(line: Line) -> Line:
    segments = line["segments"]
    if segments is not None:
        segments = [{**item, "mask": None if item["mask"] is None else json.dumps(item["mask"])} for item in segments]
    image = line["image"]
    return {**line, "segments": segments, "image": image if isinstance(image, str | None) else json.dumps(image)}


def _whole(line: Line) -> Line:
    for item in line["segments"] or []:
        item["mask"] = None if item["mask"] is None else json.loads(item["mask"])
    return {**line, "image": _image_of(line["image"])}


def _image_of(stored: str | None) -> str | list[str | None] | None:
    """A name, or the names of several pictures, which are stored as JSON."""
    if stored is not None and stored.startswith("["):  # a name may begin so too
        with suppress(ValueError):
            names: list[str | None] = json.loads(stored)
            return names
    return stored
