"""How likely an item of an answer is right: its label, and its box (or mask) with an IoU of at least .5.

While the model writes, each location token leaves its distribution over the bins (`Distribution`). The probability of
an item is a product:

    P(an item here, rather than the end)      locations together, and the ";" before the item
  x P(its label | its box)                    the label's tokens
  x P(IoU >= .5 | the four distributions)     the box as chosen, against boxes drawn from the distributions
  x certainty of the codes                    masks only: geometric mean of the probabilities of the sixteen codes

Where a label can be longer ("ice cream" after "ice"), the doubt whether it ends is not in the score of its own item. If
another item follows, it is in that one's: in its ";".

Models are surer than they are right, or less sure. So a monotone map follows, with two numbers for boxes and two for
masks, which are fitted on data (Platt 1999, "Probabilistic outputs for support vector machines"): `calibration.json`
in the folder of a checkpoint. Without the file the product itself is the score.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from paligemma.files import read_json

CALIBRATION_FILE = "calibration.json"
LEAST_SLOPE = 1e-6  # of a map: with less, scores that differ would become equal
LEAST = 1e-3  # what the map leaves between a probability and 0 or 1, see `log_odds`


class Distribution(NamedTuple):
    """How probable the watched ids were in one place of an answer; ids are counted from the first of them."""

    mean: float
    spread: float  # standard deviation
    share: float  # of the probability of all allowed tokens, in [0, 1]
    quantiles: tuple[int, ...]  # in the middle of n equal shares of the probability of the watched ids


def chance_of_overlap(chosen: Sequence[float], quantiles: Sequence[Sequence[float]]) -> float:
    """The probability that the true box has an IoU of at least .5 with the chosen one.

    chosen: its edges in bins, in the order of an answer: y0 x0 y1 x1. quantiles: of each edge's distribution, in the
    middle of n equal shares. The edges are taken as independent: that leaves n^4 equally likely boxes.
    """
    y0, x0, y1, x1 = (float(edge) for edge in chosen)
    q = [np.asarray(values, np.float32) for values in quantiles]
    high, shared_high = _sides(y0, y1, q[0], q[2])
    wide, shared_wide = _sides(x0, x1, q[1], q[3])
    shared = shared_high[:, None] * shared_wide
    union = (y1 - y0) * (x1 - x0) + high[:, None] * wide - shared
    return float(np.mean(shared >= 0.5 * union))


def _sides(low: float, high: float, lows: np.ndarray, highs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Along one axis, for each pair of a lower and an upper edge: the length of the side, and how much of it is shared
    with the chosen side. [n * n] each; 0 where the edges are in the wrong order."""
    side = np.maximum(highs[:, None] - lows, 0)
    shared = np.maximum(np.minimum(highs[:, None], high) - np.maximum(lows, low), 0)
    return side.ravel(), np.where(side > 0, shared, 0).ravel()


@dataclass(frozen=True)
class Calibration:
    """Probability p -> sigmoid(offset + slope * log_odds(p)), one map for boxes and one for masks.

    The slope is above 0 (at least LEAST_SLOPE), so the order of scores, and with it average precision, stays. Raises
    ValueError otherwise.
    """

    boxes: tuple[float, float] = (0.0, 1.0)  # offset, slope
    masks: tuple[float, float] = (0.0, 1.0)

    def __post_init__(self) -> None:
        for name in ("boxes", "masks"):
            numbers = getattr(self, name)
            is_pair = isinstance(numbers, (tuple, list)) and len(numbers) == 2
            if not is_pair or not all(
                isinstance(n, (int, float)) and not isinstance(n, bool) and math.isfinite(n) for n in numbers
            ):
                raise ValueError(f"{name} is {numbers!r}, expected two finite numbers: offset and slope")
            if numbers[1] < LEAST_SLOPE:
                raise ValueError(
                    f"{name} has the slope {numbers[1]:g}, expected {LEAST_SLOPE:g} or more: surer is likelier right"
                )
            object.__setattr__(self, name, tuple(numbers))  # JSON has lists

    def __call__(self, p: float, mask: bool = False) -> float:
        offset, slope = self.masks if mask else self.boxes
        if (offset, slope) == (0.0, 1.0):
            return p
        z = offset + slope * float(log_odds(np.asarray(p)))
        return 1 / (1 + math.exp(-max(z, -500.0)))  # exp(710) is too large for a float

    def to_dict(self) -> dict[str, Any]:
        return {"boxes": list(self.boxes), "masks": list(self.masks)}  # as JSON gives it back

    @classmethod
    def load(cls, file: Path) -> Calibration:
        """ValueError that names the file, for one that is none; OSError where it cannot be opened."""
        try:
            found = read_json(file)
            if set(found) != {"boxes", "masks"}:
                raise ValueError(f"it has {', '.join(map(repr, found)) or 'nothing'}, expected 'boxes' and 'masks'")
            return cls(**found)
        except ValueError as error:
            raise ValueError(
                f"{file} is no calibration ({error}): delete it; `paligemma evaluate --calibrate` then fits a new one"
            ) from error


IDENTITY = Calibration()


def log_odds(p: np.ndarray) -> np.ndarray:
    """log(p / (1 - p)), where p is first mapped linearly from [0, 1] to [LEAST, 1 - LEAST], which keeps the order.

    A probability of exactly 0 or 1 has no log-odds. And close to 1, an item's probability differs in its last bits from
    one batch to another: without the margin, the map would turn a difference of 1e-6 into one of 1e-4.
    """
    inside = LEAST + (1 - 2 * LEAST) * p
    return np.log(inside / (1 - inside))


def fit(p: Sequence[float], right: Sequence[bool], rounds: int = 50) -> tuple[float, float]:
    """Offset and slope of the map under which scores `p` say best how often items were `right`: logistic regression.

    As Platt advises, the targets are (n + 1) / (n + 2) and 1 / (n + 2) with n the number of right and of wrong items:
    nothing is certain. ValueError without a right and a wrong item, and where surer items are not right more often.
    """
    given, truth = np.asarray(p, float), np.asarray(right, bool)
    if not truth.any() or truth.all():
        raise ValueError(
            f"calibration needs right and wrong items, and all {len(truth)} are {'right' if truth.any() else 'wrong'}"
        )
    x = np.stack([np.ones(len(given)), log_odds(given)], -1)
    target = np.where(truth, (truth.sum() + 1) / (truth.sum() + 2), 1 / ((~truth).sum() + 2))
    weights = np.array([0.0, 1.0])
    for _ in range(rounds):  # Newton's method, on a concave function; half a step where a whole one makes it worse
        gradient, hessian = _slope_and_curve(x, target, weights)
        step, before = np.linalg.solve(hessian, gradient), _likelihood(x, target, weights)
        while _likelihood(x, target, weights + step) < before and np.abs(step).max() > 1e-12:
            step /= 2
        weights = weights + step
        if np.abs(step).max() < 1e-9:
            break
    if weights[1] <= 0:
        raise ValueError("the surer items are not right more often: scores of this model say nothing on these data")
    return float(weights[0]), float(weights[1])


def _slope_and_curve(x: np.ndarray, target: np.ndarray, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    q = 1 / (1 + np.exp(-np.clip(x @ weights, -500, 500)))
    return x.T @ (target - q), (x * (q * (1 - q))[:, None]).T @ x + 1e-9 * np.eye(2)


def _likelihood(x: np.ndarray, target: np.ndarray, weights: np.ndarray) -> float:
    z = x @ weights
    return float(np.sum(target * z - np.logaddexp(0, z)))
