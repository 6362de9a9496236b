"""What an answer holds: boxes and masks with their labels."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from paligemma.answers.mask_codec import Box


@dataclass(frozen=True)
class Detection:
    """A labelled box. `label` is "" where the answer has none; `score` and `edges` are None where they are unknown."""

    label: str
    box: Box  # x0, y0, x1, y1 in pixels of the original picture, not rounded
    score: float | None = None
    edges: np.ndarray | None = field(default=None, compare=False)  # float [4, 2]: mean, spread in pixels; x0 y0 x1 y1


@dataclass(frozen=True)
class Segment:
    """A labelled box with a mask. Two segments are equal if they agree in all but `mask` (which follows from the codes)
    and `edges`."""

    label: str
    box: Box
    mask: np.ndarray | None = field(default=None, compare=False, repr=False)  # bool [H, W]; None without a codec
    codes: list[int] | None = None  # 16 numbers in 0..127
    score: float | None = None
    edges: np.ndarray | None = field(default=None, compare=False)


@dataclass(frozen=True)
class Parsed:
    """What an answer says. Each item is in one of the three lists: a segment is not repeated in `detections`."""

    detections: list[Detection] = field(default_factory=list)
    segments: list[Segment] = field(default_factory=list)
    invalid: list[tuple[tuple[int, int], str]] = field(default_factory=list)  # (start, end) in the text, and the reason
