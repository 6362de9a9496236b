"""Are scores probabilities? Of the boxes with a score near .8, about eight in ten should be right.

    reliability(items)                    # ten bins of equal width: how many items, their mean score, the share right
    expected_calibration_error(items)     # the mean difference of the two, weighted by the number of items
    fitted(items)                         # the map that makes scores probabilities on these items

An item is a box or a mask of an answer: its score, and whether it is right. Right means an equal label and an IoU of at
least .5 with an object that no better item has found. The figure is that of Guo et al. 2017, "On Calibration of Modern
Neural Networks", section 2.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from paligemma.answers.scores import IDENTITY, Calibration, fit
from paligemma.evaluate.regions import Region, match_by_score, match_masks

if TYPE_CHECKING:
    from PIL import Image

Item = tuple[float, bool]  # score, right
BINS = 10
LEAST_ITEMS = 10  # right ones and wrong ones, to fit a map to: with two or three it would follow each of them
CALIBRATION_ERROR = "calibration error"  # the name of the figure


@dataclass(frozen=True)
class Bin:
    """Items whose scores lie in one tenth of [0, 1]."""

    items: int
    score: float  # their mean score
    right: float  # the share that is right


def scored_items(truth: Sequence[Region], predicted: Sequence[Region], masks: bool) -> list[Item]:
    """Score and rightness of each predicted region that has a score; masks: by mask IoU instead of box IoU."""
    matches = match_masks(truth, predicted) if masks else match_by_score(truth, predicted)
    right = {i for i, _, iou in matches if iou >= 0.5}
    return [(region.score, i in right) for i, region in enumerate(predicted) if region.score is not None]


def reliability(items: Sequence[Item]) -> list[Bin | None]:
    """One for each tenth of [0, 1], None where no score lies in it. A score of 1 belongs to the last."""
    scores, right = np.array([s for s, _ in items], float), np.array([r for _, r in items], bool)
    place = np.minimum((scores * BINS).astype(int), BINS - 1)
    return [
        Bin(int(inside.sum()), float(scores[inside].mean()), float(right[inside].mean())) if inside.any() else None
        for inside in (place == number for number in range(BINS))
    ]


def expected_calibration_error(items: Sequence[Item]) -> float:
    """In [0, 1], 0 for a perfect score; NaN without an item."""
    bins = [one for one in reliability(items) if one is not None]
    total = sum(one.items for one in bins)
    return sum(one.items * abs(one.score - one.right) for one in bins) / total if total else float("nan")


def fitted(boxes: Sequence[Item], masks: Sequence[Item], before: Calibration = IDENTITY) -> Calibration:
    """The maps for these items, whose scores must be those without a map. A kind without items keeps its map `before`.

    ValueError without any item, and where a kind has less than `LEAST_ITEMS` right or wrong ones or cannot be fitted;
    see `scores.fit`.
    """
    if not boxes and not masks:
        raise ValueError("there are no boxes or masks with a score in these answers: nothing to calibrate")
    result = before
    for name, items in (("boxes", boxes), ("masks", masks)):
        if items:
            right = sum(is_right for _, is_right in items)
            if min(right, len(items) - right) < LEAST_ITEMS:
                raise ValueError(
                    f"{name}: {right} right and {len(items) - right} wrong ones are too few to fit a map to, expected "
                    f"{LEAST_ITEMS} of each: take more rows, or leave out those that ask for {name}"
                )
            try:
                result = replace(result, **{name: fit([score for score, _ in items], [right for _, right in items])})
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from None
    return result


def draw_reliability(parts: Mapping[str, Sequence[Bin | None]]) -> Image.Image:
    """The diagrams side by side: bars for the share that is right, a diagonal where it would equal the score, and how
    many items lie in each tenth."""
    from PIL import Image, ImageDraw, ImageFont

    side, left, top, bottom = 280, 40, 34, 54
    picture = Image.new("RGB", ((side + left + 16) * len(parts), side + top + bottom), "white")
    draw, font = ImageDraw.Draw(picture), ImageFont.load_default(12)
    for n, (name, bins) in enumerate(parts.items()):
        x, y = n * (side + left + 16) + left, top
        items = sum(one.items for one in bins if one is not None)
        draw.text((x, 8), f"{name}: {items:,} items", fill="black", font=font)
        for number, one in enumerate(bins):
            if one is None:
                continue
            a, b = (x + round(side * edge / BINS) for edge in (number, number + 1))
            draw.rectangle((a + 1, y + round(side * (1 - one.right)), b - 1, y + side), fill=(120, 160, 220))
            place = x + round(side * one.score), y + round(side * (1 - one.right))
            draw.ellipse((place[0] - 3, place[1] - 3, place[0] + 3, place[1] + 3), fill=(200, 60, 40))
            share = f"{100 * one.items / items:.0f}%"
            draw.text(((a + b) / 2, y + side + 20), share, fill=(90, 90, 90), font=font, anchor="mt")
        draw.line((x, y + side, x + side, y), fill=(90, 90, 90))
        draw.rectangle((x, y, x + side, y + side), outline="black")
        for number in range(0, BINS + 1, 2):
            at = round(side * number / BINS)
            draw.text((x + at, y + side + 4), f"{number / BINS:.1f}", fill="black", font=font, anchor="mt")
            draw.text((x - 6, y + side - at), f"{number / BINS:.1f}", fill="black", font=font, anchor="rm")
        draw.text((x + side / 2, y + side + 37), "score (bars: share right)", fill="black", font=font, anchor="mt")
    return picture
