"""Every command that opens pictures refuses one of too many pixels by its header, before anything is decoded.

A PNG of 21 KB can hold 13,300 x 13,300 pixels, which take 1.5 GB. The pixels of the file used here are missing, so that
decoding it would be another error: "damaged".
"""

import io
import json
import struct
import subprocess
import sys
import zlib

import pytest
from PIL import Image

from paligemma.cli import main as cli
from paligemma.files import MAX_PIXELS
from paligemma.images import TooManyPixels, load_image


def png_without_pixels(width: int, height: int) -> bytes:
    def chunk(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 6, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


@pytest.fixture
def command(tmp_path, monkeypatch, capsys):
    """A command in this process, in a folder with the picture and a data set of one row: (exit code, all it said)."""
    (tmp_path / "bomb.png").write_bytes(png_without_pixels(13_300, 13_300))
    row = {"image": "bomb.png", "prefix": "answer en what is it ?", "suffix": "a house"}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
    monkeypatch.chdir(tmp_path)

    def run(line: str) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["paligemma", *line.split()])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        said = capsys.readouterr()
        return stop.value.code or 0, " ".join((said.out + said.err).split())

    return run


COMMANDS = [
    "run ocr bomb.png",
    "explore ocr bomb.png --json",
    "data check rows.jsonl",
    "data check rows.jsonl --open-pictures",
    "data show rows.jsonl --out sheet.png",
    "evaluate --data rows.jsonl",
    "train --data rows.jsonl --out trained --steps 1 --strict",
]


@pytest.mark.parametrize("line", COMMANDS)
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_a_picture_of_too_many_pixels_is_refused_by_its_header(command, line):
    code, said = command(line)
    assert code == 1
    assert "bomb.png" in said and "13,300 x 13,300 are 176,890,000 pixels, and 100,000,000 are allowed" in said
    assert "--max-pixels" in said and "damaged" not in said
    code, said = command(f"{line} --max-pixels 177")
    assert ("damaged" in said) == (line != "data check rows.jsonl"), "a higher limit lets it be decoded"
    assert command(f"{line} --max-pixels 0")[0] == 2


def test_data_check_counts_it_as_a_row_with_a_problem(command, tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "fine.png")
    with open("rows.jsonl", "a") as rows:
        rows.write(json.dumps({"image": "fine.png", "prefix": "ocr", "suffix": "STOP"}) + "\n")
    code, said = command("data check rows.jsonl")
    assert code == 1 and "too many pixels: 1 row." in said and "1 of 2 rows have a problem" in said
    assert "2 of 2 rows have a problem" in command("data check rows.jsonl --max-pixels 0.00001")[1]
    (tmp_path / "bomb.png").write_bytes(png_without_pixels(30_000, 30_000))  # more than Pillow opens at all
    code, said = command("data check rows.jsonl --max-pixels 1000")
    assert code == 1 and "bomb.png: Image size (900000000 pixels) exceeds limit" in said


def test_an_option_that_does_nothing_is_refused(command):
    assert "leave out --max-pixels" in command("evaluate --data tiny --max-pixels 50")[1]
    for option in ("--kind json", "--images .", "--annotations a", "--image-name a", "--language de", "--every-label"):
        code, said = command(f"evaluate --data tiny:val --count 1 {option}")
        assert code == 2 and "leave out the options for how rows are read" in said, option
    assert "leave out the options for rows" in command("evaluate --data . --task textvqa --max-pixels 50")[1]


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_the_default_in_python_is_the_same():
    """Of what has yet to be decoded. A picture that the caller has opened is the caller's own affair."""
    too_many = png_without_pixels(10_000, MAX_PIXELS // 10_000 + 1)
    with pytest.raises(TooManyPixels, match="100,010,000 pixels, and 100,000,000 are allowed"):
        load_image(too_many)
    just_allowed = png_without_pixels(10_000, MAX_PIXELS // 10_000)
    for source, limit in ((just_allowed, None), (too_many, 100_010_000), (Image.open(io.BytesIO(too_many)), None)):
        with pytest.raises(OSError, match="damaged"):
            load_image(source, limit)


MEASURE = """
import sys
from pathlib import Path
from paligemma.data.options import open_rows
from paligemma.data.checkpoint import processor_of
from paligemma.images import load_image
from paligemma.train.batches import RowBatches
def memory(key):
    return next(int(line.split()[1]) for line in Path("/proc/self/status").open() if line.startswith(key)) * 1024
batches = RowBatches(open_rows(sys.argv[1]), processor_of("tiny")[0], batch_size=4)
before = memory("VmRSS")
Path("/proc/self/clear_refs").write_text("5")  # the peak is counted from here
batches.load(0)
print(memory("VmHWM") - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the peak of a process's memory is reset through /proc")
def test_a_batch_of_training_decodes_one_picture_at_a_time(tmp_path):
    """So that its peak is that of one picture: 50 MB and 8 bytes a pixel."""
    side = 3000
    for i in range(4):
        Image.new("RGBA", (side, side), (i, 0, 0, 9)).save(tmp_path / f"{i}.png")
    rows = [{"image": f"{i}.png", "prefix": "ocr", "suffix": "STOP"} for i in range(4)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    program = [sys.executable, "-c", MEASURE, str(tmp_path / "rows.jsonl")]
    peak = int(subprocess.run(program, capture_output=True, text=True, check=True).stdout)
    assert 3.9 * side**2 < peak < 8 * side**2 + 50e6
