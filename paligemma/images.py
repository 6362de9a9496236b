"""Pictures in any form -> 8-bit RGB -> the tensor of pixels that the vision tower takes.

Two steps. `load_image` opens whatever a person has (a path, an array, the bytes of a file), makes it RGB and upright:
the picture that boxes and masks refer to. `preprocess` brings it to the model's square.
"""

from __future__ import annotations

import base64
import contextlib
import io
import math
import os
import re
import urllib.parse
from collections.abc import Iterator
from typing import IO, TypeAlias, TypeVar

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError

from paligemma.files import MAX_PIXELS, is_data_url, picture_names

# One picture in the forms that can be opened again, and what a row may see: one picture, or a tuple of several.
Picture: TypeAlias = str | os.PathLike[str] | Image.Image | np.ndarray | bytes
ImageInput: TypeAlias = Picture | tuple[Picture, ...]
# For lists: a list of strings is a list of pictures too, which `list[ImageInput]` would not say (lists are invariant).
ImageT = TypeVar("ImageT", bound=ImageInput)


class TooManyPixels(ValueError):
    """A picture is larger than the limit. It was not decoded."""


def load_image(source: Picture | bytearray | memoryview | IO[bytes], max_pixels: int | None = None) -> Image.Image:
    """Any picture as 8-bit RGB, upright.

    `source`: a path, a `data:` URL, a `PIL.Image`, uint8 [H, W, 3] (also [H, W], and [H, W, C] with C = 1 grey, 2 grey
    + alpha, 4 RGB + alpha), the bytes of a picture file, or an open binary file (such as `sys.stdin.buffer`). Of a file
    with several pictures (GIF, TIFF) the first. HEIC, the format of many phones, is read where the package pillow-heif
    is installed.

    The EXIF orientation is applied, alpha is composited on white, palettes are expanded, 16 bits are scaled to 8 and
    CMYK is converted.

    max_pixels: width x height at most, read from the head of the file before anything is decoded. None: 100 million
    (`files.MAX_PIXELS`) for everything that has yet to be decoded, and no limit for a `PIL.Image` or an array. A file
    of 21 KB can hold 177 million pixels. While it is decoded a picture takes 50 MB and up to 8 bytes for each of its
    pixels (WebP 16, AVIF 10, JPEG 2000 20); what is returned takes 4. So 100 million pixels take .85 GB, and 40
    million .4 GB (as WebP .7 GB).
    Pillow's own limit holds in any case: `PIL.Image.MAX_IMAGE_PIXELS` (89 million), above which it warns, and twice
    that number (179 million, 1.5 GB), above which it refuses.

    Raises FileNotFoundError, IsADirectoryError, OSError for a damaged or truncated file, TooManyPixels (a ValueError),
    and ValueError for what is not a picture, has no pixels, or has values whose range nobody knows (floats); also for
    a pipe or a device, which could be read for ever, and for HEIC without pillow-heif.
    """
    if max_pixels is not None and (not isinstance(max_pixels, int) or max_pixels < 1):
        raise ValueError(f"max_pixels is {max_pixels!r}, expected a whole number of at least 1, or None")
    if isinstance(source, Image.Image):
        return _to_rgb(source, "the picture", max_pixels, ours=False)
    if isinstance(source, np.ndarray):
        return _to_rgb(_from_array(source), "the array", max_pixels)
    if isinstance(source, str) and is_data_url(source):
        return open_picture(io.BytesIO(_data_of_url(source)), "the data: URL", max_pixels)
    if isinstance(source, (str, os.PathLike)):
        return _load_file(os.fspath(source), max_pixels)
    if isinstance(source, (bytes, bytearray, memoryview)):
        return open_picture(io.BytesIO(source), "the data", max_pixels)
    if hasattr(source, "read"):
        data = source.read(LARGEST_STREAM + 1)  # whole, since a pipe cannot seek
        if not isinstance(data, bytes):
            raise TypeError("the file is open in text mode; open it with 'rb' (for stdin: sys.stdin.buffer)")
        name = _shortened(str(getattr(source, "name", "the data")))
        if len(data) > LARGEST_STREAM:
            raise ValueError(f"{name} has more than {LARGEST_STREAM:,} bytes, too many for a picture")
        return open_picture(io.BytesIO(data), name, max_pixels)
    raise TypeError(
        f"expected a picture (a path, a PIL.Image, uint8 [H, W, 3], bytes or an open file), got {type(source).__name__}"
    )


# More bytes than any picture has that is within Pillow's limit of pixels, in RGB and uncompressed.
LARGEST_STREAM = 600 * 2**20


def _load_file(path: str, max_pixels: int | None) -> Image.Image:
    name = _shortened(path)
    if not path:
        raise FileNotFoundError("the name of a picture is empty, expected that of a file")
    if path.startswith("~") and not os.path.exists(path):
        path = os.path.expanduser(path)  # as a shell does
    if not os.path.exists(path):
        scheme = re.match(r"([A-Za-z][\w+.-]+):/", path)  # of two letters or more: C:/ is a disk
        if scheme:
            way_out = "leave out 'file://'" if scheme[1].lower() == "file" else "download it first"
            raise FileNotFoundError(f"{name} is a URL, and pictures are read from files: {way_out}")
        raise FileNotFoundError(f"{name}: no such file")
    if os.path.isdir(path):
        raise IsADirectoryError(f"{name} is a folder, expected a picture")
    if not os.path.isfile(path):  # before it is opened: that alone may wait for ever
        raise ValueError(f"{name} is a pipe or a device, which may never end: pass the bytes ('-' of `run` is stdin)")
    with open(path, "rb") as file:
        return open_picture(file, name, max_pixels)


def _data_of_url(url: str) -> bytes:
    """The bytes in `data:[type][;base64],...` (RFC 2397)."""
    head, comma, data = url.partition(",")
    if not comma:
        raise ValueError(f"{_shortened(url, 40)} is no data: URL: expected data:image/png;base64,...")
    content = urllib.parse.unquote_to_bytes(data)
    if not head.lower().rstrip().endswith(";base64"):
        return content
    try:
        return from_base64(content)
    except ValueError as error:
        raise ValueError(f"the data: URL is not in base64, as it says: {error}") from None


def from_base64(packed: bytes) -> bytes:
    """What is in base64, as any program writes it. ValueError for what is not."""
    # Mail and some programs break the lines; others leave the padding out, or use the alphabet for URLs.
    packed = packed.translate(bytes.maketrans(b"-_", b"+/"), b" \t\r\n").rstrip(b"=")
    return base64.b64decode(packed + b"=" * (-len(packed) % 4), validate=True)


def open_picture(
    file: IO[bytes], name: str, max_pixels: int | None = None, formats: tuple[str, ...] | None = None
) -> Image.Image:
    """`load_image` for an open file that can be searched (`seek`). name: what errors call it. formats: the only ones
    that are tried, by Pillow's names for them; None: all that Pillow reads, and HEIC."""
    try:
        try:
            image = Image.open(file, formats=formats)
        except UnidentifiedImageError:
            if formats is not None or not _is_heic(file):
                raise
            _let_pillow_read_heic(name)
            image = Image.open(file)
    except UnidentifiedImageError:
        read = "any format that Pillow reads" if formats is None else f"one of the formats {', '.join(formats)}"
        raise ValueError(f"{name} is not a picture in {read}") from None
    except Image.DecompressionBombError as error:
        raise TooManyPixels(
            f"{name} is too large: {str(error).rstrip('.')}. Scale it down (or, in Python, raise "
            "PIL.Image.MAX_IMAGE_PIXELS if you trust it)"
        ) from None
    except (MemoryError, Warning, _NoHeic):
        raise
    except Exception as error:  # Pillow's plugins raise OSError, SyntaxError, EOFError, struct.error, ...
        raise OSError(f"{name} is damaged or truncated: {_shortened(str(error))}") from None
    return _to_rgb(image, name, max_pixels or MAX_PIXELS)


class _NoHeic(ValueError):
    pass


def _is_heic(file: IO[bytes]) -> bool:
    file.seek(0)
    return re.match(rb".{4}ftyp(hei[cfmsx]|hev[cmsx]|mif1|msf1)", file.read(12), re.DOTALL) is not None


def _let_pillow_read_heic(name: str) -> None:
    try:
        import pillow_heif
    except ImportError:
        raise _NoHeic(
            f"{name} is a HEIC picture, which Pillow reads with the help of pillow-heif: pip install pillow-heif "
            "(or export it as JPEG)"
        ) from None
    pillow_heif.register_heif_opener()


def _shortened(text: str, most: int = 200) -> str:
    """For an error, which must not repeat input of any length."""
    return text if len(text) <= most else f"{text[: most - 20]}...{text[-17:]}"


def looks_swapped(image: object, prompt: str) -> bool:
    """Whether picture and prompt may have changed places: the one is no picture, and the other is a file of one."""
    if not isinstance(image, str) or is_data_url(image) or os.path.exists(image):
        return False
    return os.path.splitext(prompt)[1].lower() in picture_names() and os.path.isfile(prompt)


def _from_array(array: np.ndarray) -> Image.Image:
    """uint8 [H, W] or [H, W, 1..4] -> PIL.Image"""
    shape = "x".join(map(str, array.shape))
    if array.dtype != np.uint8:
        raise ValueError(f"expected a uint8 array [H, W, 3] with values 0..255, got {array.dtype} {shape}")
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[:, :, 0]
    if array.ndim != 2 and not (array.ndim == 3 and array.shape[2] in (2, 3, 4)):
        first = array.ndim == 3 and array.shape[0] in (1, 3, 4)
        raise ValueError(
            f"expected a uint8 array [H, W, 3], got {shape}"
            + (": channels come last here, try array.transpose(1, 2, 0)" if first else "")
        )
    if 0 in array.shape:
        raise ValueError(f"the array has no pixels: {shape}")
    return Image.fromarray(array)


def _to_rgb(image: Image.Image, name: str, max_pixels: int | None, ours: bool = True) -> Image.Image:
    """ours: nobody else holds this picture, so it is turned in place. A copy of 179 million pixels takes 700 MB."""
    width, height = image.size
    if 0 in image.size:
        raise ValueError(f"{name} has no pixels: {width} x {height}")
    if max_pixels is not None and width * height > max_pixels:
        raise TooManyPixels(
            f"{name} is too large: {width:,} x {height:,} are {width * height:,} pixels, and {max_pixels:,} are "
            "allowed. Scale it down, or raise the limit: max_pixels, for a command --max-pixels in millions"
        )
    try:
        image.load()  # so far only the header has been read
    except MemoryError:
        raise
    except Exception as error:  # as above
        said = "is damaged or truncated" if ours else "cannot be read (it was closed, or its file is damaged)"
        raise OSError(f"{name} {said}: {_shortened(str(error))}") from None
    with contextlib.suppress(Exception):  # a broken EXIF block is no reason to refuse the picture
        if ours:
            ImageOps.exif_transpose(image, in_place=True)
        else:
            image = ImageOps.exif_transpose(image)
    if image.mode == "I" or image.mode.startswith("I;16"):
        return _to_8_bits(image, name)
    if image.mode == "F":
        raise ValueError(f"{name} has floating-point pixels, whose range nobody knows: scale it to 8 bits first")
    if image.mode == "La":  # premultiplied; Pillow takes this one step at a time
        image = image.convert("LA")
    try:
        if image.has_transparency_data:
            return _on_white(image)
        return image if image.mode == "RGB" else image.convert("RGB")
    except ValueError as error:
        raise ValueError(f"{name} has the mode {image.mode}, which cannot be made RGB: {error}") from None


def _strips(size: tuple[int, int]) -> Iterator[tuple[int, int, int, int]]:
    """The picture as boxes of about a million pixels, from top to bottom: what is done to one takes little memory."""
    width, height = size
    rows = max(1, 2**20 // width)
    for top in range(0, height, rows):
        yield 0, top, width, min(top + rows, height)


def _on_white(image: Image.Image) -> Image.Image:
    """Alpha composited on white."""
    opaque = Image.new("RGB", image.size)
    for box in _strips(image.size):
        strip = image.crop(box).convert("RGBA")
        opaque.paste(Image.alpha_composite(Image.new("RGBA", strip.size, "white"), strip).convert("RGB"), box)
    return opaque


def _to_8_bits(image: Image.Image, name: str) -> Image.Image:
    """16 bits of grey as RGB, scaled: Pillow would clip them at 255.

    Mode "I" is what Pillow makes of some 16-bit files (PGM, TIFF); more bits than 16 have no agreed range.
    """
    rgb = Image.new("RGB", image.size)
    lowest, highest = math.inf, -math.inf
    for box in _strips(image.size):
        values = np.asarray(image.crop(box)).astype(np.int64)
        lowest, highest = min(lowest, values.min()), max(highest, values.max())
        strip = (values + 128) // 257
        if (transparent := image.info.get("transparency")) is not None:  # one grey level, in PNG files
            strip[values == transparent] = 255
        rgb.paste(Image.fromarray(strip.astype(np.uint8)).convert("RGB"), box)
    if lowest < 0 or highest > 65535:
        raise ValueError(f"{name} has values from {lowest} to {highest}, beyond 16 bits: scale it first")
    return rgb


# A pixel has 256 values, so the arithmetic on it is done once. Each step rounds as in the reference: the product in
# float64, then float32.
_NORMALIZED = ((np.arange(256, dtype=np.float64) * (1 / 255)).astype(np.float32) - np.float32(0.5)) / np.float32(0.5)


def preprocess(image: Image.Image, image_size: int) -> torch.Tensor:
    """RGB picture -> float32 [3, image_size, image_size] in [-1, 1].

    Squashed to a square without keeping the aspect (which is why boxes are relative to the picture), antialiased
    bicubic, then (x / 255 - 0.5) / 0.5. Bit-equal to transformers' PIL path. big_vision resizes bilinearly.
    """
    pixels = np.asarray(image.resize((image_size, image_size), Image.Resampling.BICUBIC))  # [H, W, 3] uint8
    return torch.from_numpy(_NORMALIZED[pixels].transpose(2, 0, 1).copy())  # [3, H, W]
