"""Boxes and masks: intersection over union, which prediction found which object, precision and recall.

Letters: n, m regions; H, W the picture.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

Box = tuple[float, float, float, float]  # x0, y0, x1, y1 in pixels


@dataclass(frozen=True)
class Region:
    """An object in a picture, true or predicted. A `Detection` or `Segment` of an answer can stand in for it."""

    label: str
    box: Box
    mask: np.ndarray | None = None  # bool [H, W]
    score: float | None = None  # of a prediction
    packed: dict[str, Any] | None = None  # COCO's run-length encoding of the mask; a small substitute


def box_iou(a: Sequence[Box], b: Sequence[Box]) -> np.ndarray:
    """Area of the overlap over area of the union, of every pair: float [n, m] in [0, 1]; 0 where both are empty."""
    p, q = np.asarray(a, float).reshape(-1, 1, 4), np.asarray(b, float).reshape(1, -1, 4)
    sides = np.minimum(p[..., 2:], q[..., 2:]) - np.maximum(p[..., :2], q[..., :2])  # [n, m, 2]
    overlap = np.prod(np.maximum(sides, 0), axis=-1)
    areas = [np.prod(np.maximum(r[..., 2:] - r[..., :2], 0), axis=-1) for r in (p, q)]
    return overlap / np.maximum(areas[0] + areas[1] - overlap, 1e-12)


def mask_iou(a: np.ndarray, b: np.ndarray) -> float:
    """Pixels in both masks over pixels in either: bool [H, W] each -> [0, 1]; 0 where both are empty."""
    if a.shape != b.shape:
        raise ValueError(f"masks of different pictures: {list(a.shape)} and {list(b.shape)}")
    return int(np.count_nonzero(a & b)) / max(int(np.count_nonzero(a | b)), 1)


def match_by_score(
    truth: Sequence[Region],
    predicted: Sequence[Region],
    threshold: float = 0.5,
    scores: Sequence[float] | None = None,
    masks: bool = False,
) -> list[tuple[int, int, float]]:
    """[(index of a prediction, index of the object it found, IoU)], at most one prediction for an object.

    COCO's rule: in order of their scores (`scores`, or else their own; without any, as listed), each prediction takes
    the free object of its label with the largest IoU, if that is at least the threshold. masks: by mask IoU; ValueError
    if a true region has no mask, and a predicted one without finds nothing. (`match_masks` has another rule.)
    """
    if scores is None:
        scores = [p.score if p.score is not None else 0.0 for p in predicted]
    if masks:
        if any(t.mask is None for t in truth):
            raise ValueError("a true region has no mask: mask IoU needs one for every object")
        pairs = [
            [mask_iou(p.mask, t.mask) if p.mask is not None and t.mask is not None else -1.0 for t in truth]
            for p in predicted
        ]
        iou = np.array(pairs, float).reshape(len(predicted), len(truth))
    else:
        iou = box_iou([p.box for p in predicted], [t.box for t in truth])
    same = np.array([[p.label == t.label for t in truth] for p in predicted], bool).reshape(iou.shape)
    iou[~same] = -1
    matches = []
    for i in sorted(range(len(predicted)), key=lambda i: -scores[i]):
        j = int(iou[i].argmax()) if len(truth) else -1
        if j >= 0 and iou[i, j] >= threshold:
            matches.append((i, j, float(iou[i, j])))
            iou[:, j] = -1  # taken
    return matches


def match_masks(truth: Sequence[Region], predicted: Sequence[Region]) -> list[tuple[int, int, float]]:
    """[(index of a prediction, index of the object it found, mask IoU)], at most one prediction for an object.

    The pair of equal label with the largest IoU is matched first, then the largest of the rest, and so on. ValueError
    if a true region has no mask; a predicted region without one (an answer of boxes) finds nothing.
    """
    if any(t.mask is None for t in truth):
        raise ValueError("a true region has no mask: mask IoU needs one for every object")
    pairs = sorted(
        (
            (mask_iou(t.mask, p.mask), i, j)
            for i, t in enumerate(truth)
            for j, p in enumerate(predicted)
            if t.label == p.label and t.mask is not None and p.mask is not None
        ),
        key=lambda pair: -pair[0],
    )
    matches: list[tuple[int, int, float]] = []
    for iou, i, j in pairs:
        if all(j != other and i != found for other, found, _ in matches):
            matches.append((j, i, iou))
    return matches


def instance_ious(truth: Sequence[Region], predicted: Sequence[Region]) -> list[float]:
    """The mask IoU with which each true object was found (`match_masks`), 0 where it was missed. Additional predictions
    lower nothing here; precision counts them."""
    found = {i: iou for _, i, iou in match_masks(truth, predicted)}
    return [found.get(i, 0.0) for i in range(len(truth))]
