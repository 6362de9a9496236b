"""Average precision: does the score rank right boxes above wrong ones?

    average_precision(rows)                       # mean over classes at IoU .5, ranked by score
    average_precision(rows, shuffle=generator)    # the same boxes in random order: what a constant score is worth
    coco_metrics(rows)                            # COCO's twelve figures, through faster-coco-eval

`rows` has one entry for each picture: (true regions, predicted regions).

COCO's figures come from faster-coco-eval instead of pycocotools, the reference. On 488 random data sets of boxes and of
masks all twelve figures were equal to 1e-15; 2,000 pictures with 42,000 boxes took 5 s instead of 22; and it takes a
data set from memory without printing. Its licence is Apache 2.0, and it is in the extra `evaluate`.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from paligemma.evaluate.regions import Region, match_by_score

TrueAndPredicted = tuple[Sequence[Region], Sequence[Region]]  # true and predicted regions of one picture

RECALL_POINTS = np.linspace(0, 1, 101)
COCO_FIGURES = (
    "AP", "AP50", "AP75", "AP_small", "AP_medium", "AP_large",
    "AR_1", "AR_10", "AR_100", "AR_small", "AR_medium", "AR_large",
)  # fmt: skip


@dataclass(frozen=True)
class Ranking:
    """All predictions of one class, highest score first: which are right, and which row each is in."""

    right: np.ndarray  # bool [predictions]
    row: np.ndarray  # int [predictions]
    objects: np.ndarray  # int [objects]: the row of each true object

    def area(self, weights: np.ndarray) -> float:
        """Area under precision over recall, NaN without an object. weights: float [rows], how often a row counts."""
        objects = weights[self.objects].sum()
        if not objects:
            return float("nan")
        if not len(self.right):
            return 0.0
        counts = weights[self.row]
        found = np.cumsum(counts * self.right)
        precision = found / np.maximum(np.cumsum(counts), 1e-12)
        falling = np.append(np.maximum.accumulate(precision[::-1])[::-1], 0.0)  # 0 beyond the last recall
        return float(falling[np.searchsorted(found / objects, RECALL_POINTS, side="left")].mean())


def rank(
    rows: Sequence[TrueAndPredicted],
    threshold: float = 0.5,
    shuffle: np.random.Generator | None = None,
    masks: bool = False,
) -> list[Ranking]:
    """A ranking for each class that has a true object. shuffle: rank by random numbers instead of the scores. masks: an
    item is right by its mask IoU instead of its box IoU."""
    ranked: dict[str, list[tuple[float, bool, int]]] = {}
    objects: dict[str, list[int]] = {}
    for k, (truth, predicted) in enumerate(rows):
        for region in truth:
            objects.setdefault(region.label, []).append(k)
        if shuffle is None:
            scores = [region.score if region.score is not None else 0.0 for region in predicted]
        else:
            scores = shuffle.random(len(predicted)).tolist()
        found = {i for i, _, _ in match_by_score(truth, predicted, threshold, scores, masks)}
        for i, region in enumerate(predicted):
            ranked.setdefault(region.label, []).append((scores[i], i in found, k))
    rankings = []
    for label in objects:
        best_first = sorted(ranked.get(label, []), key=lambda entry: -entry[0])
        right, row = [entry[1] for entry in best_first], [entry[2] for entry in best_first]
        rankings.append(Ranking(np.array(right, bool), np.array(row, int), np.array(objects[label])))
    return rankings


def average_precision(
    rows: Sequence[TrueAndPredicted],
    threshold: float = 0.5,
    shuffle: np.random.Generator | None = None,
    masks: bool = False,
) -> float:
    """Mean over the classes of the area under precision over recall, in [0, 1]; NaN without any true object.

    As COCO computes it at one IoU threshold: the predictions of all pictures in order of their scores, the precision
    curve made non-increasing and read at 101 values of recall. Classes without a true object do not count. Unlike in
    COCO (100), the number of predictions in a picture has no limit. shuffle, masks: see `rank`.
    """
    return mean_area(rank(rows, threshold, shuffle, masks), np.ones(len(rows)))


def mean_area(rankings: Sequence[Ranking], weights: np.ndarray) -> float:
    areas = [area for ranking in rankings if not math.isnan(area := ranking.area(weights))]
    return float(np.mean(areas)) if areas else float("nan")


def coco_metrics(rows: Sequence[TrueAndPredicted], masks: bool = False) -> dict[str, float]:
    """COCO's figures: AP (mean over IoU .50 to .95), AP50, AP75, AP by size, and average recall. Each is in [0, 1], or
    -1 where there is no object of that size.

    masks: compare masks instead of boxes, with sizes in pixels of the mask; regions may be `packed`, and predictions
    without a mask are left out. The true regions have no crowds.
    ImportError without faster-coco-eval; ValueError for masks and a true region without one.
    """
    coco = package()
    labels = sorted({region.label for truth, _ in rows for region in truth})
    ids = {label: number for number, label in enumerate(labels, 1)}
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    results: list[dict[str, Any]] = []
    for image_id, (truth, predicted) in enumerate(rows, 1):
        size = [1, 1]  # height and width; only masks need them
        for region, true in [*((r, True) for r in truth), *((r, False) for r in predicted)]:
            shape = _shape(region, masks)
            if shape is None and true:
                raise ValueError("a true region has no mask: COCO's mask figures need one for every object")
            # A label without a true object has no average precision.
            if shape is None or region.label not in ids:
                continue
            size = shape["segmentation"]["size"] if masks else size
            entry = {"image_id": image_id, "category_id": ids[region.label], **shape}
            if true:
                annotations.append({**entry, "id": len(annotations) + 1, "iscrowd": 0})
            else:
                results.append({**entry, "score": region.score if region.score is not None else 0.0})
        images.append({"id": image_id, "height": size[0], "width": size[1]})
    if not annotations:
        return dict.fromkeys(COCO_FIGURES, -1.0)
    rest = {"images": images, "categories": [{"id": number, "name": label} for label, number in ids.items()]}
    truth_set = coco.COCO({**rest, "annotations": annotations})
    # Before faster-coco-eval 1.8, loadRes refuses an empty list, as pycocotools does.
    result_set = truth_set.loadRes(results) if results else coco.COCO({**rest, "annotations": []})
    evaluation = coco.COCOeval_faster(
        truth_set, result_set, "segm" if masks else "bbox", print_function=lambda *words: None
    )
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    return {name: float(value) for name, value in zip(COCO_FIGURES, evaluation.stats)}


def packed(region: Region) -> Region:
    """The region with its mask as COCO's compressed run lengths: half a kilobyte instead of a byte for every pixel.
    ImportError without faster-coco-eval."""
    if region.mask is None:
        return region
    runs = package().mask.encode(np.asfortranarray(region.mask, np.uint8))
    return Region(region.label, region.box, None, region.score, runs)


def _shape(region: Region, masks: bool) -> dict[str, Any] | None:
    """A region's shape for COCO's tools; None for a mask that it does not have."""
    if not masks:
        x0, y0, x1, y1 = map(float, region.box)
        return {"bbox": [x0, y0, x1 - x0, y1 - y0], "area": (x1 - x0) * (y1 - y0)}
    runs = packed(region).packed
    # Without the box: if there is one, the tools use the area of the box, not of the mask, as the size.
    return None if runs is None else {"segmentation": runs, "area": int(package().mask.area(runs))}


def package() -> Any:
    """The module faster_coco_eval. ImportError that says what to install."""
    try:
        import faster_coco_eval
    except ImportError:
        raise ImportError("COCO's figures need faster-coco-eval: pip install 'paligemma[evaluate]'") from None
    return faster_coco_eval
