"""Every form of picture that people have becomes the same upright RGB, and the same numbers as in the reference."""

import base64
import io
import os
import re
import struct
import subprocess
import sys
import tracemalloc
import urllib.parse
import warnings
import zlib
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image, UnidentifiedImageError

from paligemma import images
from paligemma.images import TooManyPixels, load_image, preprocess

RED, BLUE, WHITE = (255, 0, 0), (0, 0, 255), (255, 255, 255)


def random_rgb(width: int, height: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def pixels(image: Image.Image) -> np.ndarray:
    assert image.mode == "RGB"
    return np.asarray(image)


def encoded(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


# ------------------------------------------------------------------------------------------ the numbers of a picture


def reference_pixels(image, size: int) -> np.ndarray:
    from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

    processor = SiglipImageProcessorPil(size={"height": size, "width": size})
    return np.asarray(processor(images=[image])["pixel_values"][0])


@pytest.mark.parametrize("size", [28, 224, 448])
@pytest.mark.parametrize("shape", [(1, 1), (1, 37), (224, 224), (331, 17), (640, 480), (1500, 1001)])
def test_pixel_values_are_bit_equal_to_the_reference(shape, size):
    image = random_rgb(*shape, seed=sum(shape))
    ours = preprocess(image, size)
    assert ours.dtype == torch.float32 and ours.shape == (3, size, size) and ours.is_contiguous()
    assert np.array_equal(ours.numpy(), reference_pixels(image, size))


def test_every_value_of_a_pixel_is_bit_equal_to_the_reference():
    ramp = Image.fromarray(np.arange(256, dtype=np.uint8).reshape(16, 16)).convert("RGB")
    assert np.array_equal(preprocess(ramp, 16).numpy(), reference_pixels(ramp, 16))


def test_black_is_minus_one_white_is_one_and_the_picture_is_squashed_not_cropped():
    image = Image.new("RGB", (200, 10), "black")
    image.paste("white", (100, 0, 200, 10))
    values = preprocess(image, 32)
    assert (values[:, :, :12] == -1).all() and (values[:, :, 20:] == 1).all()


def test_channels_are_red_green_blue():
    values = preprocess(Image.new("RGB", (8, 8), (255, 0, 128)), 4)
    assert values[:, 0, 0].tolist() == [1.0, -1.0, pytest.approx(128 / 127.5 - 1, abs=1e-6)]


# ---------------------------------------------------------------------------------------------- where it comes from


def test_path_string_bytes_file_array_and_pil_object_are_the_same_picture(tmp_path):
    image = random_rgb(13, 7)
    path = tmp_path / "a picture.png"
    image.save(path)
    for source in (path, str(path), path.read_bytes(), io.BytesIO(path.read_bytes()), np.asarray(image), image):
        assert np.array_equal(pixels(load_image(source)), np.asarray(image))


def test_a_pipe_that_cannot_seek_is_read():
    class Pipe(io.BytesIO):
        def seekable(self):
            return False

        def seek(self, *args):
            raise OSError("Illegal seek")

    assert load_image(Pipe(encoded(Image.new("RGB", (3, 2), RED)))).size == (3, 2)


def test_the_callers_picture_is_left_alone():
    image = Image.new("RGBA", (4, 4), (0, 0, 0, 0))
    load_image(image).putpixel((0, 0), RED)
    assert image.mode == "RGBA" and image.getpixel((0, 0)) == (0, 0, 0, 0)
    rgb = Image.new("RGB", (4, 4))
    load_image(rgb).putpixel((0, 0), RED)
    assert rgb.getpixel((0, 0)) == (0, 0, 0)


def test_the_first_frame_of_an_animation():
    frames = [Image.new("RGB", (4, 4), colour) for colour in (RED, BLUE)]
    assert pixels(load_image(encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])))[0, 0].tolist() == [
        *RED
    ]


@pytest.mark.parametrize(
    "shape, values, expected",
    [
        ((2, 2), 7, (7, 7, 7)),  # grey
        ((2, 2, 1), 7, (7, 7, 7)),
        ((2, 2, 2), [10, 0], WHITE),  # grey, transparent
        ((2, 2, 3), [1, 2, 3], (1, 2, 3)),
        ((2, 2, 4), [1, 2, 3, 255], (1, 2, 3)),
        ((2, 2, 4), [1, 2, 3, 0], WHITE),
    ],
)
def test_arrays_with_one_to_four_channels(shape, values, expected):
    array = np.broadcast_to(np.array(values, dtype=np.uint8), shape)
    assert (pixels(load_image(array)) == expected).all()


def test_an_array_that_is_a_view_keeps_its_order():
    image = np.asarray(random_rgb(6, 5))
    assert np.array_equal(pixels(load_image(image[::-1, ::2])), image[::-1, ::2])


# --------------------------------------------------------------------------------------------------------- upright

# What a viewer must do to a picture stored with this EXIF orientation.
UPRIGHT = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.transpose(1, 0, 2),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: a[::-1, ::-1].transpose(1, 0, 2),
    8: lambda a: np.rot90(a, 1),
}


@pytest.mark.parametrize("orientation", UPRIGHT)
def test_exif_orientation_is_applied_to_files_and_to_pil_objects(orientation):
    stored = random_rgb(5, 3)
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(stored, exif=exif)
    expected = UPRIGHT[orientation](np.asarray(stored))
    assert np.array_equal(pixels(load_image(data)), expected)
    opened = Image.open(io.BytesIO(data))
    assert np.array_equal(pixels(load_image(opened)), expected)
    assert np.array_equal(pixels(load_image(load_image(opened))), expected)  # once, not twice


@pytest.mark.parametrize("orientation", [0, 9, 65535])
def test_an_orientation_that_does_not_exist_is_ignored(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    assert load_image(encoded(random_rgb(5, 3), exif=exif)).size == (5, 3)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
def test_a_broken_exif_block_is_ignored():
    data = encoded(random_rgb(5, 3), "JPEG", exif=b"Exif\x00\x00MM\x00*\xff\xff\xff\xffgarbage")
    assert load_image(data).size == (5, 3)


# ------------------------------------------------------------------------------------------------------------ modes


def half_transparent(mode: str) -> Image.Image:
    image = random_rgb(8, 8).convert("RGBA")
    image.putalpha(Image.fromarray(np.linspace(0, 255, 64, dtype=np.uint8).reshape(8, 8)))
    return image.convert(mode)


def palette_with_transparency() -> Image.Image:
    image = random_rgb(8, 8).quantize(16)
    image.info["transparency"] = 3
    return image


@pytest.mark.parametrize(
    "image",
    [
        *(pytest.param(half_transparent(mode), id=mode) for mode in ("RGBA", "LA", "RGBa")),
        *(
            pytest.param(random_rgb(8, 8).convert(mode), id=mode)
            for mode in ("RGB", "L", "1", "P", "CMYK", "YCbCr", "HSV", "RGBX")
        ),
        pytest.param(palette_with_transparency(), id="P with transparency"),
    ],
)
def test_every_mode_becomes_the_rgb_of_the_reference(image):
    from transformers.image_transforms import convert_to_rgb

    if image.mode == "RGBa":  # the reference knows only the name "A" of an alpha channel
        image, ours = image.convert("RGBA"), load_image(image)
    else:
        ours = load_image(image)
    assert np.array_equal(pixels(ours), convert_to_rgb(image, return_numpy=True))


@pytest.mark.parametrize("mode", ["RGBA", "LA", "PA", "La", "RGBa"])
def test_what_is_transparent_is_white(mode):
    assert (pixels(load_image(Image.new(mode, (3, 3)))) == 255).all()


def test_half_transparent_red_is_pink():
    assert pixels(load_image(Image.new("RGBA", (1, 1), (255, 0, 0, 128)))).tolist() == [[[255, 127, 127]]]


def test_transparency_of_png_files_without_an_alpha_channel():
    """A palette entry, a grey level or a colour can be declared transparent."""
    palette = Image.new("P", (2, 1))
    palette.putpalette([*RED, *BLUE])
    palette.putpixel((1, 0), 1)
    assert pixels(load_image(encoded(palette, transparency=1))).tolist() == [[[*RED], [*WHITE]]]
    assert pixels(load_image(encoded(palette, transparency=bytes([255, 0])))).tolist() == [[[*RED], [*WHITE]]]
    assert pixels(load_image(encoded(Image.new("L", (1, 1), 9), transparency=9))).tolist() == [[[*WHITE]]]
    assert pixels(load_image(encoded(Image.new("RGB", (1, 1), RED), transparency=RED))).tolist() == [[[*WHITE]]]


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_sixteen_bits_are_scaled_not_clipped(kind):
    levels = np.array([[0, 255, 257, 4000, 32768, 65535]], dtype=np.uint16)
    loaded = pixels(load_image(encoded(Image.fromarray(levels), kind)))
    assert loaded[0, :, 0].tolist() == [0, 1, 1, 16, 128, 255]
    assert (loaded == loaded[:, :, :1]).all()


def test_other_forms_of_sixteen_bits():
    levels = np.array([[0, 32768, 65535]])
    for image in (
        Image.fromarray(levels.astype(np.int32)),  # mode I
        Image.frombytes("I;16B", (3, 1), levels.astype(">u2").tobytes()),
        io.BytesIO(b"P5 3 1 65535\n" + levels.astype(">u2").tobytes()),  # PGM
    ):
        assert pixels(load_image(image))[0, :, 0].tolist() == [0, 128, 255]


def test_every_level_of_sixteen_bits_in_a_picture_of_several_strips():
    levels = np.arange(2**21 + 1000, dtype=np.uint32).reshape(-1, 8).astype(np.uint16)
    expected = (levels.astype(np.int64) + 128) // 257
    assert np.array_equal(pixels(load_image(Image.fromarray(levels)))[:, :, 0], expected)


def test_a_grey_level_of_sixteen_bits_declared_transparent_is_white():
    levels = np.array([[999, 1000, 1001]], dtype=np.uint16)
    assert pixels(load_image(encoded(Image.fromarray(levels), transparency=1000)))[0, :, 0].tolist() == [4, 255, 4]


def test_arithmetic_on_sixteen_bits_takes_no_more_memory_for_a_larger_picture():
    peaks = []
    for height in (4000, 16_000):
        picture = Image.new("I;16", (1000, height))
        tracemalloc.start()  # sees what NumPy takes, not the pictures of Pillow
        load_image(picture)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.1 * peaks[0]


# ------------------------------------------------------------------------------------------------------------ errors


def png_header_only(width: int, height: int) -> bytes:
    def chunk(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def refused(source, error: type[Exception], *words: str, **options) -> None:
    with pytest.raises(error) as caught:
        load_image(source, **options)
    message = str(caught.value)
    assert "\n" not in message and all(word in message for word in words), message


def test_no_such_file(tmp_path):
    refused(tmp_path / "cat.jpg", FileNotFoundError, "cat.jpg", "no such file")
    refused("", FileNotFoundError, "the name of a picture is empty")


def test_a_url():
    """It is not fetched, and stays as it was written: a path would lose one of its slashes."""
    for url in ("https://example.com/a.png", "http://example.com/a.png", "s3://bucket/a.png"):
        refused(url, FileNotFoundError, f"{url} is a URL", "download it first")
    refused("file:///tmp/a.png", FileNotFoundError, "file:///tmp/a.png is a URL", "leave out 'file://'")
    refused(Path("https://example.com/a.png"), FileNotFoundError, "is a URL")
    refused("C:/pictures/a.png", FileNotFoundError, "a.png: no such file")


def test_a_data_url():
    array = np.random.default_rng(0).integers(0, 256, (9, 7, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(array).save(file, "PNG")
    text = base64.b64encode(file.getvalue()).decode()
    unpadded = base64.urlsafe_b64encode(file.getvalue()).decode().rstrip("=")
    for url in (
        f"data:image/png;base64,{text}",
        f"DATA:;BASE64,{text}",
        f"data:image/png;name=a.png;base64,{text[:50]}\n {text[50:]}",
        f"data:image/png;base64,{unpadded}",
        f"data:image/png;base64,{urllib.parse.quote(text)}",
        f"data:image/png,{urllib.parse.quote(file.getvalue())}",
    ):
        assert np.array_equal(np.asarray(load_image(url)), array), url[:40]


def test_broken_data_urls_are_never_repeated():
    for url, words in (
        ("data:image/png;base64," + "x" * 10_000, "the data: URL is not a picture"),
        ("data:image/png;base64," + "*" * 10_000, "not in base64"),
        ("data:image/png;base64," + "x" * 10_001, "not in base64"),
        ("data:," + "x" * 10_000, "the data: URL is not a picture"),
        ("data:image/png;" + "x" * 10_000, "is no data: URL: expected data:image/png;base64,..."),
        ("data:", "is no data: URL"),
    ):
        with pytest.raises(ValueError, match=re.escape(words)) as caught:
            load_image(url)
        assert len(str(caught.value)) < 200


def test_no_error_repeats_a_name_of_any_length(tmp_path):
    for name in ("x" * 10_000, "https://example.com/" + "x" * 10_000, "\0" + "x" * 10_000):
        with pytest.raises(FileNotFoundError) as caught:
            load_image(name)
        assert len(str(caught.value)) < 400


def test_a_pipe_or_a_device_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    for path in (tmp_path / "pipe.png", "/dev/zero"):
        refused(path, ValueError, str(path), "is a pipe or a device")


def test_an_open_file_that_never_ends(monkeypatch):
    monkeypatch.setattr(images, "LARGEST_STREAM", 2**20)
    with open("/dev/zero", "rb") as file:
        refused(file, ValueError, "/dev/zero has more than 1,048,576 bytes")


HEIC = b"\x00\x00\x00\x1cftypheic" + b"\x00" * 50


def test_heic_names_the_package_that_reads_it(tmp_path, monkeypatch):
    (tmp_path / "IMG_1.HEIC").write_bytes(HEIC)
    monkeypatch.setitem(sys.modules, "pillow_heif", None)  # as if it were not installed
    refused(tmp_path / "IMG_1.HEIC", ValueError, "IMG_1.HEIC is a HEIC picture", "pip install pillow-heif")
    refused(HEIC, ValueError, "the data is a HEIC picture")


def test_heic_is_read_with_that_package(monkeypatch):
    """By a stand-in with its one function, which teaches Pillow the format."""

    def open_(file, name="", mode="r", formats=None):
        if taught:
            return Image.new("RGB", (5, 4), "teal")
        raise UnidentifiedImageError

    taught: list[bool] = []
    monkeypatch.setattr(Image, "open", open_)
    package = SimpleNamespace(register_heif_opener=lambda: taught.append(True))
    monkeypatch.setitem(sys.modules, "pillow_heif", package)
    assert load_image(HEIC).size == (5, 4)


def test_a_real_heic_file(tmp_path):
    pillow_heif = pytest.importorskip("pillow_heif")
    pillow_heif.from_pillow(Image.new("RGB", (40, 30), "red")).save(tmp_path / "red.heic")
    assert np.allclose(np.asarray(load_image(tmp_path / "red.heic")), (255, 0, 0), atol=3)


def test_a_picture_is_not_copied_more_often_than_needed(tmp_path, monkeypatch):
    """Pillow allows 179 million pixels, 700 MB for each copy: of a file of 21 KB, four of them were made."""
    sizes = []
    new, copy = Image.new, Image.Image.copy

    def counted(size, image):
        sizes.append(size[0] * size[1])
        return image

    monkeypatch.setattr(Image, "new", lambda mode, size, *color: counted(size, new(mode, size, *color)))
    monkeypatch.setattr(Image.Image, "copy", lambda self: counted(self.size, copy(self)))
    for mode in ("RGB", "RGBA", "LA"):
        new(mode, (2000, 3000)).save(tmp_path / "large.png")
        assert load_image(tmp_path / "large.png").size == (2000, 3000)
        large = [size for size in sizes if size > 2**20]
        assert len(large) == (mode != "RGB")  # the result; all else is made in strips
        sizes.clear()


def test_the_callers_picture_is_left_as_it_is():
    picture = Image.new("RGB", (20, 10))
    picture.getexif()[0x0112] = 6
    assert load_image(picture).size == (10, 20) and picture.size == (20, 10)
    plain = Image.new("RGB", (20, 10))
    assert load_image(plain) is not plain


def test_a_file_in_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    Image.new("RGB", (20, 10)).save(tmp_path / "a.png")
    assert load_image("~/a.png").size == (20, 10)
    refused("~/b.png", FileNotFoundError, "~/b.png: no such file")


def test_a_folder(tmp_path):
    refused(tmp_path, IsADirectoryError, str(tmp_path), "is a folder")


@pytest.mark.parametrize("content", [b"", b"not a picture", b"\x89PNG\r\n\x1a\n", b"%PDF-1.7", bytes(1000)])
def test_not_a_picture(tmp_path, content):
    (tmp_path / "cat.jpg").write_bytes(content)
    refused(tmp_path / "cat.jpg", ValueError, "cat.jpg", "not a picture")
    refused(content, ValueError, "not a picture")


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "BMP", "TIFF", "WEBP", "GIF"])
def test_a_truncated_picture(tmp_path, kind):
    data = encoded(random_rgb(64, 64), kind)
    (tmp_path / "cat").write_bytes(data[: len(data) // 2])
    with pytest.raises((OSError, ValueError), match=r"damaged or truncated|not a picture") as caught:
        load_image(tmp_path / "cat")
    assert "cat" in str(caught.value)


def test_a_truncated_picture_behind_a_lazy_pil_object():
    data = encoded(random_rgb(64, 64), "JPEG")
    refused(Image.open(io.BytesIO(data[: len(data) // 2])), OSError, "its file is damaged): image file is truncated")


def test_a_pil_object_that_was_closed():
    picture = Image.new("RGB", (8, 8))
    picture.close()
    refused(picture, OSError, "cannot be read (it was closed")


def test_thirty_thousand_by_thirty_thousand(tmp_path):
    """Refused from the header, before any memory is taken: a PNG of a hundred bytes can claim gigabytes."""
    (tmp_path / "bomb.png").write_bytes(png_header_only(30_000, 30_000))
    refused(tmp_path / "bomb.png", ValueError, "bomb.png", "too large", "900000000", "MAX_IMAGE_PIXELS")


def test_max_pixels_refuses_before_anything_is_decoded(tmp_path):
    """The pixels of these files are missing, so decoding them would be another error."""
    (tmp_path / "large.png").write_bytes(png_header_only(5_000, 4_000))
    for source in (tmp_path / "large.png", png_header_only(5_000, 4_000), Image.open(tmp_path / "large.png")):
        with pytest.raises(TooManyPixels, match="5,000 x 4,000 are 20,000,000 pixels, and 19,999,999 are allowed"):
            load_image(source, max_pixels=19_999_999)
        with pytest.raises(OSError, match="damaged"):
            load_image(source, max_pixels=20_000_000)
    refused(np.zeros((3, 4, 3), np.uint8), TooManyPixels, "12 pixels", "11", max_pixels=11)
    assert load_image(np.zeros((3, 4, 3), np.uint8), max_pixels=12).size == (4, 3)
    refused(tmp_path / "large.png", ValueError, "max_pixels is 0", max_pixels=0)
    refused(tmp_path / "large.png", ValueError, "max_pixels is '4M'", max_pixels="4M")


def test_pillows_own_limit_is_kept(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 200)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        picture = Image.new("RGB", (15, 20))
        assert load_image(encoded(picture)).size == (15, 20)
        refused(encoded(Image.new("RGB", (15, 30))), TooManyPixels, "MAX_IMAGE_PIXELS")


# Bytes that each pixel takes while it is decoded, beside 50 MB for any picture: see the docstring of `load_image`.
BYTES_PER_PIXEL = [
    ("1", "PNG", 5),
    ("RGBA", "PNG", 8),
    ("I;16", "PNG", 8),
    ("I", "TIFF", 8),
    ("CMYK", "JPEG", 8),
    ("RGBA", "WEBP", 16),
    ("RGB", "JPEG2000", 20),
]


@pytest.mark.skipif(sys.platform != "linux", reason="the peak of a process's memory is reset through /proc")
def test_peak_memory_for_each_pixel(tmp_path):
    side = 3000
    for mode, kind, _ in BYTES_PER_PIXEL:
        Image.new(mode, (side, side)).save(tmp_path / f"{mode[:1]}{len(mode)}.{kind}", kind)
    program = """
import os
import sys
from pathlib import Path
from PIL import Image
from paligemma.images import load_image
def memory(key):
    return next(int(line.split()[1]) for line in Path("/proc/self/status").open() if line.startswith(key)) * 1024
Image.init()
for path in sys.argv[1:]:
    if not os.fork():  # a process for each, so that no memory is left of the one before
        before = memory("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # the peak is counted from here
        picture = load_image(path)
        print(memory("VmHWM") - before, flush=True)
        os._exit(0)
    os.wait()
"""
    paths = [str(tmp_path / f"{mode[:1]}{len(mode)}.{kind}") for mode, kind, _ in BYTES_PER_PIXEL]
    done = subprocess.run([sys.executable, "-c", program, *paths], capture_output=True, text=True, check=True)
    for (mode, kind, most), measured in zip(BYTES_PER_PIXEL, map(int, done.stdout.split()), strict=True):
        assert 3.9 * side**2 < measured < most * side**2 + 50e6, (mode, kind)


def test_no_pixels(tmp_path):
    refused(Image.new("RGB", (0, 5)), ValueError, "no pixels", "0 x 5")
    refused(np.zeros((0, 5, 3), np.uint8), ValueError, "no pixels", "0x5x3")
    with pytest.raises((OSError, ValueError), match=r"not a picture|no pixels|damaged"):
        load_image(png_header_only(0, 5))


@pytest.mark.parametrize(
    "array, words",
    [
        (np.zeros((4, 4, 3), np.float32), ["uint8", "float32"]),
        (np.zeros((4, 4), bool), ["uint8", "bool"]),
        (np.zeros((3, 224, 224), np.uint8), ["3x224x224", "channels come last", "transpose"]),
        (np.zeros((4, 4, 5), np.uint8), ["4x4x5"]),
        (np.zeros((1, 4, 4, 3), np.uint8), ["1x4x4x3"]),
        (np.zeros(4, np.uint8), ["[H, W, 3]"]),
    ],
)
def test_arrays_that_are_not_pictures(array, words):
    refused(array, ValueError, *words)


def test_things_that_are_not_pictures_at_all():
    refused(42, TypeError, "int")
    refused(torch.zeros(3, 4, 4), TypeError, "Tensor")
    refused(io.StringIO("text"), TypeError, "text mode")


def test_values_without_a_known_range():
    refused(Image.new("F", (2, 2)), ValueError, "floating-point")
    refused(Image.new("I", (2, 2), 70_000), ValueError, "beyond 16 bits", "from 70000 to 70000")
    refused(Image.new("I", (2, 2), -1), ValueError, "beyond 16 bits")
