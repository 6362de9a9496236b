"""What an answer holds: text, boxes and masks. In a notebook a result shows itself: the picture with its boxes.

A result keeps the picture as it was given (a path, an array, ...), never a decoded copy, and opens it only to show it.
The picture is no part of the result: it plays no role in `==`, in `repr` and in `dataclasses.asdict`, and a pickle or a
copy leaves it out.
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, SupportsIndex, TypeVar, overload

import numpy as np

from paligemma.answers.mask_codec import Box

if TYPE_CHECKING:
    from paligemma.images import ImageInput

SMALLEST_SHOWN, LARGEST_SHOWN = 512, 1024  # pixels of the longer side, in a notebook


@dataclass(frozen=True)
class Detection:
    """A labelled box. `label` is "" where the answer has none; `score` and `edges` are None where they are unknown."""

    label: str
    box: Box  # x0, y0, x1, y1 in pixels of the original picture, not rounded
    score: float | None = None
    # float [4, 2]: mean and spread in pixels, in the order x0 y0 x1 y1
    edges: np.ndarray | None = field(default=None, compare=False, repr=False)


@dataclass(frozen=True)
class Segment:
    """A labelled box with a mask. Two segments are equal if they agree in all but `mask` (which follows from the codes)
    and `edges`."""

    label: str
    box: Box
    mask: np.ndarray | None = field(default=None, compare=False, repr=False)  # bool [H, W]; None without a codec
    codes: list[int] | None = None  # 16 numbers in 0..127
    score: float | None = None
    edges: np.ndarray | None = field(default=None, compare=False, repr=False)


@dataclass(frozen=True)
class Parsed:
    """What an answer says. Each item is in one of the three lists: a segment is not repeated in `detections`."""

    detections: list[Detection] = field(default_factory=list)
    segments: list[Segment] = field(default_factory=list)
    invalid: list[tuple[tuple[int, int], str]] = field(default_factory=list)  # (start, end) in the text, and the reason


ItemT = TypeVar("ItemT", bound="Detection | Segment")


class Items(list[ItemT]):
    """A list of boxes or masks that shows itself over its picture. In everything else it is a list."""

    picture: ImageInput | None

    def __init__(self, items: Iterable[ItemT] = (), picture: ImageInput | None = None) -> None:
        super().__init__(items)
        self.picture = picture

    @overload
    def __getitem__(self, index: SupportsIndex) -> ItemT: ...
    @overload
    def __getitem__(self, index: slice) -> Items[ItemT]: ...
    def __getitem__(self, index: SupportsIndex | slice) -> ItemT | Items[ItemT]:
        """A slice shows itself too."""
        return (
            Items(super().__getitem__(index), self.picture) if isinstance(index, slice) else super().__getitem__(index)
        )

    def __reduce__(self) -> tuple[type[Items[ItemT]], tuple[list[ItemT]]]:
        return Items, (list(self),)  # without the picture

    def _repr_png_(self) -> bytes | None:
        return shown_over(self.picture, self)


@dataclass
class Answer:
    """What the model wrote about one row.

    text: the answer; `str(answer)` is the same.
    token_ids: without the closing eos.
    token_logprobs: of the chosen tokens, under the distribution they were chosen from (after a constraint, before
        temperature).
    score: exp of their mean, in [0, 1]. For an empty answer the probability of saying nothing (0 if the budget ended
        it).
    finished: False when the budget ended it, also where a grammar closed the answer because another box did not fit.
    detections, segments: what the text's location tokens mean, in pixels of the (first) picture.
    invalid: what could not be read, as (span, reason).
    """

    text: str
    token_ids: list[int] = field(repr=False)
    token_logprobs: list[float] = field(repr=False)
    score: float
    finished: bool
    detections: list[Detection] = field(default_factory=list)
    segments: list[Segment] = field(default_factory=list)
    invalid: list[tuple[tuple[int, int], str]] = field(default_factory=list)

    # The (first) picture as it was given. Without an annotation it is no field of the dataclass; see the file's head.
    picture = None  # type: ImageInput | None

    def __str__(self) -> str:
        return self.text

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "picture"}

    def _repr_png_(self) -> bytes | None:
        return shown_over(self.picture, [*self.segments, *self.detections])


def shown_over(picture: ImageInput | None, items: Sequence[Detection | Segment]) -> bytes | None:
    """A PNG of the picture with the items over it, for a notebook; None if there is nothing to show or no way to.

    A small picture is enlarged, so that its labels have room; a large one is reduced, since the PNG becomes a part of
    the notebook. Nobody asked for this picture, so one that can't be opened any more is no error: text is shown then.
    """
    from paligemma.answers.drawing import draw
    from paligemma.images import load_image

    if picture is None or not items:
        return None
    try:
        image = load_image(picture[0] if isinstance(picture, tuple) else picture)
        side = max(image.size)
        drawn = draw(image, items, scale=min(max(side, SMALLEST_SHOWN), LARGEST_SHOWN) / side)
    except (OSError, ValueError, TypeError):
        return None
    file = io.BytesIO()
    drawn.save(file, "PNG")
    return file.getvalue()
