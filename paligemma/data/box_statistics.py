"""What the boxes of a whole data set look like together. One box can't show that its numbers are meant otherwise (from
the centre; y before x; in pixels of a smaller copy): it lies in the picture all the same. Many can.

Boxes that are right begin and end anywhere. So it is asked how likely it would be by chance that

- not one of them reaches into the last part of the pictures' width (or height): resized, or the axes are swapped;
- every one keeps half its width from the left edge and half its height from the top, as it does where x and y are
  those of the centre.
"""

from __future__ import annotations

import math
from array import array
from dataclasses import dataclass, field

from paligemma.data.rows import Row

FEWEST = 50  # boxes; from fewer nothing is concluded
BY_CHANCE = 1e-4  # less likely than this is worth a question
REACHED = 0.8  # of the width or height: objects of real pictures leave no wider margin free in all of them


@dataclass
class BoxStatistics:
    boxes: int = 0
    farthest: list[float] = field(default_factory=lambda: [0.0, 0.0])  # share of the width, of the height
    sizes: list[array[float]] = field(default_factory=lambda: [array("f"), array("f")])  # as shares, of all boxes
    always_off_the_edges: bool = True  # by half the box
    chance_of_that: float = 0.0  # log10, if boxes lie anywhere

    def add(self, row: Row) -> None:
        if row.size is None:
            return
        for box in row.boxes:
            self.boxes += 1
            for axis in (0, 1):
                low, high = box[axis] / row.size[axis], box[axis + 2] / row.size[axis]
                size = min(max(high - low, 0.0), 0.999)
                self.farthest[axis] = max(self.farthest[axis], high)
                self.sizes[axis].append(size)
                self.always_off_the_edges &= low >= size / 2 - 1e-3
                self.chance_of_that += math.log10(max(1 - size / 2 / (1 - size), 1e-9)) if size < 0.6 else -9

    def questions(self) -> list[str]:
        if self.boxes < FEWEST:
            return []
        asked = []
        for axis, name in ((0, "width"), (1, "height")):
            farthest = self.farthest[axis]
            # A box of the size s begins anywhere in [0, 1 - s], so it ends below m with the chance (m - s) / (1 - s).
            log = sum(math.log10(max((farthest - s) / (1 - s), 1e-9)) for s in self.sizes[axis])
            if farthest < REACHED and log < math.log10(BY_CHANCE):
                asked.append(
                    f"none of {self.boxes:,} boxes reaches beyond {farthest:.0%} of the pictures' {name}: are they in "
                    "pixels of a smaller copy, or are x and y swapped?"
                )
        if self.always_off_the_edges and self.chance_of_that < math.log10(BY_CHANCE):
            asked.append(
                f"each of {self.boxes:,} boxes keeps half its width from the left edge and half its height from the "
                "top: are x and y those of its centre?"
            )
        return asked
