"""Frames of real videos, written and read by FFmpeg through PyAV."""

from fractions import Fraction

import numpy as np
import pytest

from paligemma.batch import videos
from paligemma.batch.inputs import list_inputs
from paligemma.batch.pictures import open_picture

av = pytest.importorskip("av")
pytestmark = pytest.mark.slow
FRAMES = 60


def drawn(number: int) -> np.ndarray:
    """The number in binary, six fields of black and white: coding with loss does not change it."""
    bits = [number >> bit & 1 for bit in range(6)]
    return np.repeat(np.repeat(np.array([bits], np.uint8) * 255, 48, 0), 16, 1)[..., None].repeat(3, -1)


def write_video(path, codec="mpeg4", *, rate=12, times=None, b_frames=0):
    """A video in which every frame shows its number. times: when the frames begin, in seconds."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=rate)
        stream.width, stream.height, stream.pix_fmt = 96, 48, "yuv420p"
        stream.codec_context.gop_size, stream.codec_context.max_b_frames = 24, b_frames
        stream.codec_context.time_base = Fraction(1, 600)
        for number in range(FRAMES):
            frame = av.VideoFrame.from_ndarray(drawn(number), format="rgb24")
            frame.time_base = Fraction(1, 600)
            frame.pts = round(600 * (number / rate if times is None else times[number]))
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def rows_of(path, every):
    videos.open_video.cache_clear()
    return list(list_inputs([str(path)], "caption en", every=every))


def frame_of(row):
    """Which frame the picture is."""
    fields = np.asarray(open_picture(row.image).convert("L"))[24, 8::16]
    return sum(int(field > 127) << bit for bit, field in enumerate(fields))


@pytest.mark.parametrize("name", ["v.mp4", "v.mkv", "v.avi"])
def test_frames_are_found_by_their_time(name, tmp_path):
    rows = rows_of(write_video(tmp_path / name), every=0.5)
    assert [row.id.rpartition("/")[2] for row in rows] == [f"{n // 2:04}.{n % 2 * 5}00" for n in range(10)]
    assert [frame_of(row) for row in rows] == [6 * n for n in range(10)]
    assert [frame_of(rows[n]) for n in (7, 2, 9, 0)] == [42, 12, 54, 0]  # in any order, between key frames too


def test_frames_that_are_stored_out_of_order(tmp_path):
    rows = rows_of(write_video(tmp_path / "v.mp4", b_frames=2), every=0.75)
    assert [frame_of(row) for row in rows] == [9 * n for n in range(7)]


def test_a_rate_that_changes(tmp_path):
    """Thirty frames within a second, then one each half second: what is shown is the last frame that has begun."""
    times = [n / 30 for n in range(30)] + [1 + n / 2 for n in range(30)]
    rows = rows_of(write_video(tmp_path / "v.mkv", times=times), every=0.4)
    shown = [max(n for n, begin in enumerate(times) if begin <= 0.4 * k + 1e-6) for k in range(len(rows))]
    assert len(rows) >= 37 and [frame_of(row) for row in rows] == shown


def test_a_video_that_was_cut_off(tmp_path):
    """What can still be read is, and what can't be is an error that names the file."""
    whole = write_video(tmp_path / "v.avi").read_bytes()
    (tmp_path / "cut.avi").write_bytes(whole[: len(whole) * 2 // 3])
    videos.open_video.cache_clear()
    rows = rows_of(tmp_path / "cut.avi", every=0.5)
    assert [frame_of(row) for row in rows[:4]] == [0, 6, 12, 18]
    (tmp_path / "no.mp4").write_bytes(b"no video" * 100)
    with pytest.raises(OSError, match=r"no\.mp4 is no video"):
        rows_of(tmp_path / "no.mp4", every=0.5)
