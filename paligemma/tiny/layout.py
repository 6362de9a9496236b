"""Where the objects of a scene lie: random places, until nothing hides another too much and no answer is in doubt."""

from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from paligemma.tiny.artwork import Stamp
from paligemma.tiny.world import Box

MIN_EDGE_GAP = 0.025  # of the side, between the left edges of any two objects: "from left to right" is then never a tie


@dataclass
class Placed:
    label: str
    x: int
    y: int
    stamp: Stamp
    mask: np.ndarray  # bool: what is still visible, within the stamp's box
    area: int  # all pixels of the object
    left: int  # its visible pixels

    @property
    def bounds(self) -> Box:
        """Bounds of the visible pixels."""
        rows, columns = np.flatnonzero(self.mask.any(1)), np.flatnonzero(self.mask.any(0))
        return (
            float(self.x + columns[0]),
            float(self.y + rows[0]),
            float(self.x + columns[-1] + 1),
            float(self.y + rows[-1] + 1),
        )

    def whole_mask(self, size: int) -> np.ndarray:
        """The visible pixels in a picture of this size: bool [size, size]."""
        mask = np.zeros((size, size), bool)
        window = np.s_[max(0, -self.y) : size - self.y, max(0, -self.x) : size - self.x]
        inside = self.mask[window]
        y, x = max(0, self.y), max(0, self.x)
        mask[y : y + inside.shape[0], x : x + inside.shape[1]] = inside
        return mask

    @property
    def char_boxes(self) -> tuple[Box, ...]:
        return tuple((a + self.x, b + self.y, c + self.x, d + self.y) for a, b, c, d in self.stamp.char_boxes)


def place(
    rng: np.random.Generator,
    stamp: Stamp,
    label: str,
    placed: list[Placed],
    size: int,
    visible: float,
    outside: float = 0.0,
) -> Placed | None:
    """Find a place where the stamp hides no other object too much and no left edges coincide; None after 24 trials.

    What the stamp covers is removed from the visible masks of `placed`.

    visible: least share of every object's own pixels that must stay visible.
    outside: largest share of the stamp's width and height that may lie outside the picture.
    """
    height, width = stamp.mask.shape
    if height > size or width > size:
        return None
    area = int(np.count_nonzero(stamp.mask))
    over_x, over_y = int(outside * width), int(outside * height)
    for _ in range(24):
        x = int(rng.integers(size - width + 1 + 2 * over_x)) - over_x
        y = int(rng.integers(size - height + 1 + 2 * over_y)) - over_y
        mask = stamp.mask
        if outside and (x < 0 or y < 0 or x + width > size or y + height > size):
            mask = _inside(mask, x, y, size)
            if np.count_nonzero(mask) < visible * area:
                continue
        hidden = []
        for other in placed:
            if abs(other.x - x) < MIN_EDGE_GAP * size:
                break
            a, b = max(x, other.x), min(x + width, other.x + other.mask.shape[1])
            c, d = max(y, other.y), min(y + height, other.y + other.mask.shape[0])
            if a >= b or c >= d:
                continue
            # Two of a kind may touch but not merge.
            if other.label == label and (b - a) * (d - c) > 0.08 * min(width * height, other.mask.size):
                break
            theirs = other.mask[c - other.y : d - other.y, a - other.x : b - other.x]
            lost = theirs & mask[c - y : d - y, a - x : b - x]
            if other.left - np.count_nonzero(lost) < visible * other.area:
                break
            hidden.append((theirs, lost, other))
        else:
            for theirs, lost, other in hidden:
                theirs ^= lost
                other.left -= int(np.count_nonzero(lost))
            return Placed(label, x, y, stamp, mask.copy(), area, int(np.count_nonzero(mask)))
    return None


def _inside(mask: np.ndarray, x: int, y: int, size: int) -> np.ndarray:
    """The part of a mask at (x, y) that lies inside the picture."""
    inside = np.zeros_like(mask)
    window = np.s_[max(0, -y) : size - y, max(0, -x) : size - x]
    inside[window] = mask[window]
    return inside


def left_edges_differ(placed: list[Placed], size: int) -> bool:
    """Whether all left edges still differ clearly after objects have covered parts of one another."""
    edges = sorted(spot.bounds[0] for spot in placed)
    return all(b - a >= MIN_EDGE_GAP * size for a, b in pairwise(edges))
