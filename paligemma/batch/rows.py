"""One row of a run: what is asked of which picture, and the line that becomes of it.

A line has the keys of `paligemma run --json`, and `id, image_size, error, attempts, ms`:

    {"id": "a.jpg", "image": "/photos/a.jpg", "prompt": "detect dog", "text": "<loc0123>... dog", "score": 0.93,
     "finished": true, "detections": [...], "segments": [], "invalid": [], "image_size": [640, 480], "error": null,
     "attempts": 1, "ms": 137}

A row that could not be answered has a line too. Its `error` is {"kind": ..., "message": ...}, and its answers are null.
"""

from __future__ import annotations

import base64
import hashlib
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from paligemma.files import is_data_url

if TYPE_CHECKING:
    from paligemma.answers.results import Answer, Detection, Segment

# Why a row has no answer.
KINDS = (
    "unreadable",  # the picture is truncated, empty, a folder, no picture, or has no pixels
    "too_many_pixels",  # the picture is larger than --max-pixels
    "missing",  # there is no such file
    "prompt_too_long",  # prompt and answer have more tokens than the model has positions
    "constraint",  # the grammar of the prompt cannot be made, or no token was left that it allows
    "out_of_memory",  # even for this row alone
    "internal",  # anything else; its worker died twice over this row alone, say
)
ANSWERS = ("text", "score", "finished", "detections", "segments", "invalid")  # null where there is an error

Line: TypeAlias = dict[str, Any]  # one line of a part
# Where a picture is: a path, a data: URL, or a place inside another file (see `pictures.py`). None: a row without one.
Where: TypeAlias = str | Mapping[str, Any]


@dataclass(frozen=True)
class InputRow:
    """What is asked. image: None, one place of a picture, or several that one row sees. options: of generation, where
    the row brings its own ("max_new_tokens", "temperature", ...)."""

    id: str
    image: Where | Sequence[Where] | None
    prompt: str
    options: Mapping[str, Any] = field(default_factory=dict)

    def to_json(self) -> str:
        """One line of `rows.jsonl`. Names that are no UTF-8 are kept as Python keeps them, by escapes."""
        about = {"id": self.id, "image": self.image, "prompt": self.prompt}
        if self.options:
            about["options"] = dict(self.options)
        text = json.dumps(about, ensure_ascii=False)
        return text if _is_utf8(text) else json.dumps(about)

    @classmethod
    def from_json(cls, line: bytes) -> InputRow:
        about = json.loads(line)
        return cls(about["id"], about["image"], about["prompt"], about.get("options", {}))


class RowFailure(Exception):
    """One row cannot be answered. kind: one of `KINDS`."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(kind, message)
        self.kind, self.message = kind, message


def answered(row: InputRow, answer: Answer, size: tuple[int, int] | None, masks: str, ms: float = 0) -> Line:
    """The line of a row that was answered. size: (W, H) of its first picture. masks: "rle", "png" or "none"."""
    return {
        **_head(row),
        "text": answer.text,
        "score": round(answer.score, 4),
        "finished": answer.finished,
        "detections": [_item(item, masks) for item in answer.detections],
        "segments": [_item(item, masks) for item in answer.segments],
        "invalid": [{"span": list(span), "reason": reason} for span, reason in answer.invalid],
        "image_size": None if size is None else list(size),
        "error": None,
        "attempts": 1,
        "ms": round(ms),
    }


def failed(row: InputRow, kind: str, message: str, attempts: int = 1) -> Line:
    """The line of a row that could not be answered."""
    error = {"kind": kind, "message": plain(message)}
    nothing = dict.fromkeys(ANSWERS)
    return {**_head(row), **nothing, "image_size": None, "error": error, "attempts": attempts, "ms": 0}


def _head(row: InputRow) -> Line:
    return {"id": row.id, "image": name_of(row.image), "prompt": plain(row.prompt)}


def name_of(image: Any) -> Any:
    """What the line of a row calls its picture (or pictures): text that is UTF-8."""
    if image is None:
        return None
    if isinstance(image, str):
        return plain(f"{image[:40]}..." if is_data_url(image) else image)
    if isinstance(image, Mapping):
        name = image.get("name", image.get("path"))
        return None if name is None else plain(str(name))
    return [name_of(one) for one in image] if isinstance(image, list) else None


def path_of(id: str) -> Path:
    """The id of a row as a relative path that leads nowhere else, for a file that gets a suffix of up to 5 bytes."""
    parts = [part for part in id.replace("\\", "/").split("/") if part not in ("", ".")] or ["picture"]
    return Path(*("_" if part == ".." else _file_name(part) for part in parts))


def _file_name(part: str) -> str:
    """At most 229 bytes, as file systems take no more than 255. A hash keeps names with an equal beginning apart."""
    whole = part.encode()
    if len(whole) <= 220 and b"\0" not in whole:
        return part
    kept = whole[:220].decode(errors="ignore").replace("\0", "_")
    return f"{kept}-{hashlib.blake2b(whole, digest_size=4).hexdigest()}"


def plain(name: str) -> str:
    r"""Text that is UTF-8: bytes of a file's name that are not become \xNN, half of a surrogate pair \udNNN."""
    try:
        return name if _is_utf8(name) else name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    except UnicodeEncodeError:  # JSON can spell half of a pair, which stands for no byte
        return name.encode("utf-8", "backslashreplace").decode()


def _is_utf8(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _item(item: Detection | Segment, masks: str) -> dict[str, Any]:
    """A box or mask as JSON, with its score in 4 decimals."""
    from paligemma.answers.formats import rle_encode
    from paligemma.answers.results import Segment

    score = None if item.score is None else round(float(item.score), 4)
    line: dict[str, Any] = {"label": item.label, "box": [float(edge) for edge in item.box], "score": score}
    if isinstance(item, Segment):
        if item.mask is None or masks == "none":
            line["mask"] = None
        elif masks == "png":
            line["mask"] = {"size": list(item.mask.shape), "png": _png(item.mask)}
        else:
            line["mask"] = rle_encode(item.mask)
    return line


def _png(mask: Any) -> str:
    """bool [H, W] as a black and white PNG, in base64."""
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(mask).save(file, "PNG", optimize=True)
    return base64.b64encode(file.getvalue()).decode()


def mask_of(item: Mapping[str, Any]) -> Any:
    """The mask of a segment in a line, bool [H, W]; None where it has none."""
    import numpy as np
    from PIL import Image

    from paligemma.answers.formats import rle_decode

    mask = item.get("mask")
    if mask is None:
        return None
    if "png" in mask:
        return np.asarray(Image.open(io.BytesIO(base64.b64decode(mask["png"]))).convert("1"))
    return rle_decode(mask)
