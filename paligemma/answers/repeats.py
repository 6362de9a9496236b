"""Boxes that repeat an earlier one: the same label, and an IoU (intersection over union) above 0.9.

A model that was fine-tuned for a short time often writes the same box again and again, until its budget ends.
`count_repeats` finds that in an answer. `DetectionGrammar(forbid_repeats=True)` prevents it, and asks `repeating_edges`
which edges of a box that is being written would lead to a repetition.

Boxes of the grammar are whole numbers of bins, y0 x0 y1 x1, so IoU > 0.9 is decided exactly:

    intersection / (area + other area - intersection) > 9 / 10   <=>   19 * intersection > 9 * (area + other area)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from paligemma.answers.parsing import NUM_LOC

if TYPE_CHECKING:
    from paligemma.answers.results import Detection, Segment


def count_repeats(items: Sequence[Detection | Segment]) -> int:
    """How many items repeat one that comes before them."""
    earlier: dict[str, list[Sequence[float]]] = {}
    count = 0
    for item in items:
        same_label = earlier.setdefault(item.label, [])
        count += repeats(item.box, same_label)
        same_label.append(item.box)
    return count


def repeats(box: Sequence[float], earlier: Sequence[Sequence[float]]) -> bool:
    """Whether a box repeats one of the others. In any unit, and in the order x0 y0 x1 y1 or y0 x0 y1 x1."""
    if not earlier:
        return False
    low, high = np.array(box[:2]), np.array(box[2:])
    others = np.array(earlier)  # [m, 4]
    sides = (np.minimum(high, others[:, 2:]) - np.maximum(low, others[:, :2])).clip(0)  # [m, 2]
    areas = (high - low).prod() + (others[:, 2:] - others[:, :2]).prod(-1)
    return bool((19 * sides.prod(-1) > 9 * areas).any())


def repeating_edges(y0: int, x0: int, y1: np.ndarray, earlier: Sequence[Sequence[int]]) -> np.ndarray:
    """Where the last edge of a box must not lie: bool [n, 1024], True where (y0, x0, y1[i], x1) repeats an earlier box.

    y1: int [n]. earlier: at least one box y0 x0 y1 x1.

    For given y0, x0 and y1 the IoU with another box rises as x1 approaches the other's right edge, and falls beyond it.
    So each other box forbids one interval of x1, whose two ends follow from the inequality at the head of this file.
    """
    top, left, bottom, right = np.array(earlier).T  # each [m]
    height = (y1 - y0)[:, None]  # [n, 1]
    shared_height = (np.minimum(y1[:, None], bottom) - np.maximum(y0, top)).clip(0)  # [n, m]
    shared_left, area = np.maximum(x0, left), (bottom - top) * (right - left)

    # x1 <= right: the intersection is shared_height * (x1 - shared_left).
    slope = 19 * shared_height - 9 * height  # [n, m]
    first = (19 * shared_height * shared_left - 9 * height * x0 + 9 * area) // np.maximum(slope, 1) + 1
    # x1 >= right: the intersection is shared_height * (right - shared_left), whatever x1 is.
    last = x0 + (19 * shared_height * (right - shared_left) - 9 * area - 1) // (9 * height)

    row, other = np.nonzero((slope > 0) & (last >= right))  # else not even x1 = right repeats it
    changes = np.zeros((len(y1), NUM_LOC + 1), dtype=np.int16)  # there are fewer boxes than 2**15
    np.add.at(changes, (row, first[row, other].clip(0)), 1)
    np.add.at(changes, (row, last[row, other].clip(max=NUM_LOC - 1) + 1), -1)
    return changes.cumsum(1, dtype=np.int16)[:, :NUM_LOC] > 0
