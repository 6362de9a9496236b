"""Frames of a video, by PyAV (the package `av`), where it is installed.

Times count from the first frame. A frame is found by its time and not by its number: many videos have no constant rate.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from fractions import Fraction
from functools import lru_cache
from threading import Lock
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from PIL import Image


def times_of(path: str, every: float) -> Iterator[float]:
    """0, every, 2 x every, ... up to the end of the video. ValueError where its length is not known."""
    video = Video(path)
    try:
        if video.seconds is None:
            raise ValueError(f"{path} does not say how long it is: rewrite it (ffmpeg -i {path} -c copy new.mp4)")
        for number in range(max(1, math.ceil(video.seconds / every - 1e-6))):
            yield round(number * every, 6)
    finally:
        video.container.close()


@lru_cache(maxsize=1)
def open_video(path: str) -> Video:
    """The video that was asked for last stays open: frames in order are decoded in one go."""
    return Video(path)


class Video:
    """An open video. ImportError without PyAV; OSError or ValueError for a file that is none."""

    def __init__(self, path: str) -> None:
        try:
            import av
        except ImportError:
            raise ImportError(f"{path}: frames of videos are read by PyAV: pip install av") from None
        try:
            self.container = av.open(path)
            self.stream: Any = self.container.streams.video[0]
        except IndexError:
            raise ValueError(f"{path} has no pictures: it is sound alone") from None
        except av.FFmpegError as error:
            raise OSError(f"{path} is no video that can be read: {error}") from None
        self.error = av.FFmpegError
        self.path = path
        self.lock = Lock()  # several threads open pictures, and a decoder can serve one at a time
        self.frames: Iterator[Any] = iter(())
        self.last: Any = None  # the frame that was shown last
        self.ahead: Any = None  # the one after it, where it was decoded already
        self.tick = Fraction(self.stream.time_base or 1)  # seconds between two counts of its clock
        self.start = float((self.stream.start_time or 0) * self.tick)
        if self.stream.duration:
            self.seconds: float | None = float(self.stream.duration * self.tick)
        else:
            self.seconds = self.container.duration / 1e6 if self.container.duration else None

    def frame_at(self, time: float) -> Image.Image:
        """The last frame that begins at `time` or before. ValueError beyond the end or at a broken frame. Threads may
        call this at the same time."""
        with self.lock:
            return self._frame_at(time)

    def _frame_at(self, time: float) -> Image.Image:
        try:
            if self.last is None or not -1e-6 <= time - self._time(self.last) < 5:
                self._seek(time)
            while (frame := self.ahead or next(self.frames, None)) is not None:
                self.ahead = frame
                if self._time(frame) > time + 1e-6:
                    break
                self.last, self.ahead = frame, None
        except Exception as error:
            self.last = None  # the decoder has ended here: later frames are looked for from a key frame on
            if isinstance(error, self.error):
                raise ValueError(f"{self.path} is damaged near {time:.3f} s: {error}") from None
            raise
        if self.last is None:
            raise ValueError(f"{self.path} has no frame at {time:.3f} s")
        picture: Image.Image = self.last.to_image()
        return picture

    def _seek(self, time: float) -> None:
        target = int((time + self.start) / self.tick)
        self.container.seek(target, stream=self.stream, backward=True)  # to the key frame before it
        self.frames = self.container.decode(self.stream)
        self.last = self.ahead = None

    def _time(self, frame: Any) -> float:
        return float(frame.pts * self.tick) - self.start
