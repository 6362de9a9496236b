"""Opens the picture of a row, or says in one of the kinds of `rows.py` why it cannot be opened.

A picture is where its row says:

    "/photos/a.jpg"                                             a file
    "data:image/png;base64,..."                                 in the row itself
    {"file": "x.tar", "start": 512, "size": 9000, "header": ..., "name": ...}
                                                                the bytes of another file: a member of a tar archive
    {"file": "x.jsonl", ..., "picture": 0}                      the same, where these bytes are a line of JSON
    {"table": "x.parquet", "row": 7, "column": "image", ...}    a cell of a parquet file
    {"video": "x.mp4", "time": 2.5, "name": ...}                a frame of a video, in seconds from its beginning

For `Predictor` it may also be there already: the bytes of a file, an array, or {"bytes", "path"} of Hugging Face.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np

from paligemma.batch.rows import RowFailure, Where
from paligemma.files import is_data_url
from paligemma.images import TooManyPixels, load_image

if TYPE_CHECKING:
    from PIL import Image


def open_picture(where: Where, max_pixels: float | None = None) -> Image.Image:
    """The picture as 8-bit RGB, upright. max_pixels: in millions; a larger one is refused before it is decoded.

    RowFailure of the kind missing, unreadable, too_many_pixels or out_of_memory.
    """
    try:
        return load_image(read(where), None if max_pixels is None else round(max_pixels * 1e6))
    except RowFailure:
        raise
    except MemoryError:
        raise RowFailure("out_of_memory", "the picture does not fit into memory") from None
    except FileNotFoundError as error:
        raise RowFailure("missing", _message(error)) from None
    except TooManyPixels as error:
        raise RowFailure("too_many_pixels", _message(error)) from None
    except (OSError, ValueError, TypeError, ImportError) as error:
        raise RowFailure("unreadable", _message(error)) from None


def places_of(image: Where | Sequence[Where] | None) -> Sequence[Where]:
    """The pictures of a row, of which there may be none or several."""
    if image is None:
        return ()
    return [image] if isinstance(image, (str, Mapping)) else image


def bytes_of(where: Where) -> bytes:
    """Bytes by which a picture is known again: those of its file, as far as it has one of its own."""
    if isinstance(where, str) and not is_data_url(where):
        with open(where, "rb") as file:
            return file.read()
    content = repr(sorted(where.items())) if isinstance(where, Mapping) and "video" in where else read(where)
    if isinstance(content, bytes):
        return content
    if isinstance(content, str):
        return content.encode("utf-8", "surrogatepass")
    array = content if isinstance(content, np.ndarray) else np.asarray(load_image(content))
    return f"{array.shape} {array.dtype.str}".encode() + array.tobytes()


def read(where: Where) -> Any:
    """What `load_image` takes: a path, a data: URL, bytes, or a decoded frame."""
    if not isinstance(where, Mapping):
        return where
    if "video" in where:
        return frame_of_video(where["video"], where["time"])
    if "table" in where:
        return _stored(_table(where["table"])[where["row"]][where["column"]])
    if "file" not in where:
        return _stored(where)
    with open(where["file"], "rb") as file:
        file.seek(where["start"])
        content = file.read(where["size"])
        if len(content) < where["size"]:
            raise OSError(f"{where['file']} has become shorter than it was when its pictures were listed")
        if "header" in where:
            from paligemma.batch.inputs import header_digest

            if header_digest(file, where["start"]) != where["header"]:
                raise OSError(f"{where['file']} has changed since its pictures were listed: list them anew")
    if "picture" in where:
        from paligemma.batch.row_files import pictures_in_line

        return _stored(pictures_in_line(content)[where["picture"]])
    return content


def _stored(image: Any) -> Any:
    """The bytes or the path of a picture, if it is as Hugging Face stores it."""
    return image.get("bytes") or image.get("path") if isinstance(image, Mapping) else image


@lru_cache(maxsize=4)
def _table(path: str) -> Any:
    from paligemma.data.arrow_files import ArrowFiles

    return ArrowFiles([path])


def frame_of_video(path: str, time: float) -> Any:
    """The frame that is shown `time` seconds after the beginning of a video, as a PIL picture.

    Frames asked for in order are decoded in one go: the last video stays open.
    """
    from paligemma.batch.videos import open_video

    return open_video(path).frame_at(time)


def _message(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return error.strerror if error.filename is None else f"{error.filename}: {error.strerror}"
    return str(error) or type(error).__name__
