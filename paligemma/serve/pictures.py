"""The pictures of a request: from data: URLs, uploads and allowed https URLs to the tensor of pixels.

A picture is refused by its header, before a single pixel is decoded: a PNG of 21 KB can hold 177 million of them. What
is decoded is decoded in a worker, brought to the model's square there, and dropped; large pictures go one at a time,
since one of 40 million pixels takes 300 MB while it is decoded.

Features of the last few pictures are kept by the SHA-256 of their bytes, so that many questions about one picture
decode and encode it once.
"""

from __future__ import annotations

import hashlib
import io
import threading
from collections import OrderedDict
from contextlib import nullcontext
from dataclasses import dataclass

from PIL import Image
from torch import Tensor

from paligemma.files import is_data_url
from paligemma.images import TooManyPixels, from_base64, open_picture, preprocess
from paligemma.serve.errors import ApiError, invalid, shown

# Those that browsers and phones make. Pillow reads forty more, each with a decoder of its own that may have faults.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
LARGE = 10_000_000  # pixels; larger pictures are decoded one at a time

_one_large_picture = threading.Lock()


@dataclass(frozen=True)
class Source:
    """Where a picture comes from: a `data:` URL, an https URL, or the bytes of an upload. param: its field."""

    value: str | bytes
    param: str
    name: str | None = None  # the file name of an upload, or the URL
    fetched: bool = False  # the bytes are those behind the URL `name`

    @property
    def is_url(self) -> bool:
        return isinstance(self.value, str) and not is_data_url(self.value)


@dataclass(frozen=True)
class Picture:
    """One picture of a row. pixels: float32 [3, side, side]; None where its features are kept already."""

    digest: bytes
    size: tuple[int, int]  # W, H, upright
    pixels: Tensor | None
    features: Tensor | None = None  # [P, D]


class FeatureCache:
    """The features of the last `most` pictures: {SHA-256: ((W, H), [P, D])}. Used by the workers and the engine."""

    def __init__(self, most: int) -> None:
        self.most, self.hits = most, 0
        self._kept: OrderedDict[bytes, tuple[tuple[int, int], Tensor]] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, digest: bytes) -> tuple[tuple[int, int], Tensor] | None:
        with self._lock:
            if (found := self._kept.get(digest)) is not None:
                self._kept.move_to_end(digest)
                self.hits += 1
            return found

    def put(self, picture: Picture, features: Tensor) -> None:
        with self._lock:
            self._kept[picture.digest] = picture.size, features
            self._kept.move_to_end(picture.digest)
            while len(self._kept) > self.most:
                self._kept.popitem(last=False)


def read(source: Source, cache: FeatureCache, most_pixels: int, side: int) -> Picture:
    """The picture as the model takes it: its features if they are known, else its pixels. Runs in a worker."""
    data = content(source)
    digest = hashlib.sha256(data).digest()
    if (known := cache.get(digest)) is not None:
        return Picture(digest, known[0], None, known[1])
    large = check_header(data, source, most_pixels) > LARGE
    with _one_large_picture if large else nullcontext():
        image = decode(data, source, most_pixels)
        size, pixels = image.size, preprocess(image, side)
        del image  # before the next one is decoded
    return Picture(digest, size, pixels)


def decode(data: bytes, source: Source, most_pixels: int) -> Image.Image:
    """8-bit RGB, upright. ApiError for a picture that is damaged, or too large for its format.

    Its header must have been checked.
    """
    try:
        return open_picture(io.BytesIO(data), "the data", most_pixels, FORMATS)
    except TooManyPixels as error:  # WebP has a lower limit than the other formats, see `load_image`
        raise ApiError(413, "too_many_pixels", f"{source.param}: {error}", source.param) from None
    except (ValueError, OSError) as error:
        raise bad_image(source, f"{source.param} is damaged or truncated: {error}") from None


def check_header(data: bytes, source: Source, most_pixels: int) -> int:
    """The number of pixels, from the header alone."""
    if not data:
        raise bad_image(source, f"{source.param} is empty: it holds no picture")
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            width, height = image.size
    except Image.DecompressionBombError:  # Pillow's own limit, above any of ours
        raise ApiError(413, "too_many_pixels", f"{source.param} has far too many pixels", source.param) from None
    except Exception:  # Pillow's plugins raise OSError, SyntaxError, struct.error, ... at broken headers
        raise bad_image(
            source, f"{source.param} is no picture that is read here: JPEG, PNG, WebP, GIF, BMP or TIFF"
        ) from None
    if width * height > most_pixels:
        raise ApiError(
            413, "too_many_pixels",
            f"{source.param} has {width:,} x {height:,} pixels, {width * height / 1e6:.0f} million; at most "
            f"{most_pixels / 1e6:g} million are taken: scale it down", source.param,
        )  # fmt: skip
    return width * height


def bad_image(source: Source, message: str) -> ApiError:
    """A 400; of an allowed URL, whose content the client may not know, a 422."""
    if source.fetched:
        return ApiError(422, "no_image_at_url", message, source.param)
    return invalid(source.param, message, "bad_image")


def content(source: Source) -> bytes:
    """The bytes of an upload or of a data: URL in base64 (RFC 2397)."""
    if isinstance(source.value, bytes):
        return source.value
    head, comma, data = source.value.partition(",")
    if not comma or not head.lower().rstrip().endswith(";base64"):
        raise invalid(
            source.param, f"{source.param} begins with {shown(source.value[:40])}, expected "
            "data:image/...;base64, and then the picture in base64", "bad_base64",
        )  # fmt: skip
    try:
        return from_base64(data.encode("ascii"))
    except ValueError as error:
        raise invalid(source.param, f"{source.param} is not base64: {shown(str(error))}", "bad_base64") from None
