"""Boxes and masks for the tools that people already use: plain dicts, COCO results, YOLO labels, Pascal VOC,
supervision.

All take a list of `Detection` and `Segment`, in the pixels of the original picture. Formats that number their classes
have no place for a label outside of them: where classes are given, items with another label are left out.
"""

from __future__ import annotations

import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

if TYPE_CHECKING:
    from paligemma.answers.results import Detection, Segment

    Item: TypeAlias = Detection | Segment

NOT_IN_XML = re.compile(r"[^\t\n\r\x20-\uD7FF\uE000-\uFFFD\U00010000-\U0010FFFF]")  # section 2.2 of XML 1.0


def to_dicts(items: Sequence[Item]) -> list[dict[str, Any]]:
    """One dict an item, ready for `json.dumps`: label, box [x0, y0, x1, y1], score (or None), and for a segment mask:
    run lengths as of `rle_encode`, None if it was not decoded."""
    rows = []
    for item in items:
        row: dict[str, Any] = {
            "label": item.label,
            "box": [float(edge) for edge in item.box],
            "score": None if item.score is None else float(item.score),
        }
        if _is_segment(item):
            mask = _mask_of(item)
            row["mask"] = None if mask is None else rle_encode(mask)
        rows.append(row)
    return rows


def to_coco_results(items: Sequence[Item], image_id: int, category_ids: Mapping[str, int]) -> list[dict[str, Any]]:
    """Rows of a COCO results file for one picture, for `COCO.loadRes` of pycocotools or faster-coco-eval.

    bbox is [x, y, width, height]; segmentation, where an item has a mask, an uncompressed RLE, which both tools take.
    COCO results must have a score: an item without one gets 1.0.
    """
    rows = []
    for item in items:
        if item.label not in category_ids:
            continue
        x0, y0, x1, y1 = (float(edge) for edge in item.box)
        row: dict[str, Any] = {
            "image_id": image_id,
            "category_id": category_ids[item.label],
            "bbox": [x0, y0, x1 - x0, y1 - y0],
            "score": 1.0 if item.score is None else float(item.score),
        }
        mask = _mask_of(item)
        if mask is not None:
            row["segmentation"] = rle_encode(mask)
        rows.append(row)
    return rows


def to_yolo(items: Sequence[Item], image_size: tuple[int, int], names: Sequence[str]) -> list[str]:
    """Lines of a YOLO label file; image_size is (W, H), `names` the classes by number.

    A detection is "class x y width height" (the centre), a segment "class x0 y0 x1 y1 ...", the outline of its mask
    (see `outline`; of its box if the mask has no pixels). Everything is a share of the picture's width or height.
    """
    number = {name: i for i, name in enumerate(names)}
    size = np.array(image_size, dtype=float)
    lines = []
    for item in items:
        if item.label not in number:
            continue
        x0, y0, x1, y1 = item.box
        if _is_segment(item):
            mask = _mask_of(item)
            points = np.empty((0, 2)) if mask is None else outline(mask)
            if not len(points):
                points = np.array([(x0, y0), (x1, y0), (x1, y1), (x0, y1)])
            values = (points / size).clip(0, 1).flatten()
        else:
            corners = (np.array([(x0, y0), (x1, y1)]) / size).clip(0, 1)
            values = np.concatenate([corners.mean(0), corners[1] - corners[0]])
        lines.append(" ".join([str(number[item.label]), *(f"{value:.6f}" for value in values)]))
    return lines


def to_voc(items: Sequence[Item], image_size: tuple[int, int], file_name: str) -> str:
    """The XML file of Pascal VOC for one picture; image_size is (W, H). It has no place for masks and scores: a segment
    is its box. Corners are whole pixels, counted from 0, as most tools write them. Characters that XML has no place
    for, such as control characters, become spaces."""
    root = ElementTree.Element("annotation")
    ElementTree.SubElement(root, "filename").text = NOT_IN_XML.sub(" ", file_name)
    size = ElementTree.SubElement(root, "size")
    for name, value in zip(("width", "height", "depth"), (*image_size, 3)):
        ElementTree.SubElement(size, name).text = str(value)
    for item in items:
        element = ElementTree.SubElement(root, "object")
        ElementTree.SubElement(element, "name").text = NOT_IN_XML.sub(" ", item.label)
        box = ElementTree.SubElement(element, "bndbox")
        limits = (*image_size, *image_size)
        for name, edge, limit in zip(("xmin", "ymin", "xmax", "ymax"), item.box, limits):
            ElementTree.SubElement(box, name).text = str(min(max(round(edge), 0), limit))
    ElementTree.indent(root)
    return ElementTree.tostring(root, encoding="unicode") + "\n"


def to_supervision(items: Sequence[Item], names: Sequence[str] | None = None) -> Any:
    """`supervision.Detections` with class_id and data["class_name"].

    `names` are the classes by number; without them labels are numbered as they come. Masks and confidences are there
    if every item has one. ImportError if supervision is not installed.
    """
    try:
        import supervision
    except ImportError:
        raise ImportError("to_supervision needs the package supervision: pip install supervision") from None

    number = {name: i for i, name in enumerate(names or dict.fromkeys(item.label for item in items))}
    kept = [item for item in items if item.label in number]
    if not kept:
        return supervision.Detections.empty()
    masks = [_mask_of(item) for item in kept]
    scores = [item.score for item in kept]
    return supervision.Detections(
        xyxy=np.array([item.box for item in kept], dtype=np.float32),
        mask=np.stack([m for m in masks if m is not None]) if all(m is not None for m in masks) else None,
        confidence=np.array(scores, dtype=np.float32) if None not in scores else None,
        class_id=np.array([number[item.label] for item in kept]),
        data={"class_name": np.array([item.label for item in kept])},
    )


def rle_encode(mask: np.ndarray) -> dict[str, list[int]]:
    """bool [H, W] -> {"size": [H, W], "counts": [...]}, COCO's uncompressed run lengths.

    Column by column (not row by row), runs of False and True in turn, beginning with False (0 if there are none).
    """
    flat = np.asarray(mask, dtype=bool).ravel(order="F")
    changes = np.flatnonzero(flat[1:] != flat[:-1]) + 1
    counts = np.diff(np.concatenate([[0], changes, [flat.size]])).tolist()
    return {"size": list(mask.shape), "counts": [0, *counts] if flat.size and flat[0] else counts}


def rle_decode(rle: Mapping[str, Sequence[int]]) -> np.ndarray:
    """The inverse of `rle_encode`: bool [H, W]. ValueError if the runs do not fill the picture."""
    height, width = rle["size"]
    counts = np.asarray(rle["counts"], dtype=np.int64)
    if (counts < 0).any() or counts.sum() != height * width:
        raise ValueError(f"the runs cover {counts.sum()} pixels, the picture has {height} x {width}")
    flat = np.repeat(np.arange(len(counts)) % 2 == 1, counts)
    return flat.reshape(width, height).T


def outline(mask: np.ndarray) -> np.ndarray:
    """bool [H, W] -> float [n, 2], x and y of the corners of the largest part's outer border; [0, 2] if it is empty.

    The border runs along the edges of pixels, clockwise, so the polygon covers exactly the pixels of that part (and the
    holes in it, which a single polygon cannot leave out). Parts that touch only at a corner are two.
    """
    steps = _border_steps(mask)
    best, best_area = np.empty((0, 2)), 0.0
    while steps:
        points = np.array(_walk(steps), dtype=float)
        nx, ny = np.roll(points, -1, axis=0).T
        area = float((points[:, 0] * ny - nx * points[:, 1]).sum() / 2)  # negative around a hole
        if area > best_area:
            best, best_area = points, area
    return best


_Point: TypeAlias = tuple[int, int]  # x, y


def _border_steps(mask: np.ndarray) -> dict[_Point, list[_Point]]:
    """From each corner on a border, the directions in which the border goes on, with the inside on the right."""
    inside = np.pad(np.asarray(mask, dtype=bool), 1)
    steps: dict[_Point, list[_Point]] = {}
    # (dy, dx): where outside is; the step's start relative to the pixel's upper left corner; its direction.
    for dy, dx, start, direction in (
        (-1, 0, (0, 0), (1, 0)),
        (0, 1, (1, 0), (0, 1)),
        (1, 0, (1, 1), (-1, 0)),
        (0, -1, (0, 1), (0, -1)),
    ):
        rows, columns = np.nonzero(inside & ~np.roll(inside, (-dy, -dx), (0, 1)))
        for y, x in zip((rows - 1).tolist(), (columns - 1).tolist()):
            steps.setdefault((x + start[0], y + start[1]), []).append(direction)
    return steps


def _walk(steps: dict[_Point, list[_Point]]) -> list[_Point]:
    """The corners of one closed border. Its steps are taken out of `steps`."""
    first = x, y = next(iter(steps))  # a top left corner
    step = steps[first][0]
    corners = [first]
    while True:
        steps[x, y].remove(step)
        if not steps[x, y]:
            del steps[x, y]
        x, y = x + step[0], y + step[1]
        options = steps.get((x, y), [])
        right = (-step[1], step[0])
        if (x, y) == first and right not in options:
            return corners
        # Where two parts touch at a corner there are two ways on; the right turn stays with this part.
        way = right if right in options else options[0]
        if way != step:
            corners.append((x, y))
        step = way


def _is_segment(item: Item) -> bool:
    return hasattr(item, "mask")


def _mask_of(item: Item) -> np.ndarray | None:
    return getattr(item, "mask", None)
