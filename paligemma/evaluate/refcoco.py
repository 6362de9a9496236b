"""Segmentation of the object that an expression refers to: RefCOCO, RefCOCO+, RefCOCOg.

The mIoU of PaliGemma's published figures, as big_vision computes it (`transfers/segmentation.py`): one object in each
row, the mean over rows of the mask IoU at the picture's full size, 0 for an invalid answer. (The literature has two
figures of that name. This one is the mean of the rows' IoUs; the other, "oIoU", divides summed areas.)
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import numpy as np

from paligemma.answers.parsing import parse
from paligemma.evaluate.regions import Box, box_iou, mask_iou

if TYPE_CHECKING:
    from paligemma.answers.mask_codec import MaskCodec

_MASK = re.compile(r"(<loc\d{4}>){4}(<seg\d{3}>){16}")


def refcoco_ious(text: str, box: Box, mask: np.ndarray, codec: MaskCodec) -> tuple[float, float, bool]:
    """(mask IoU, box IoU, valid) of one answer. box: the true one, in pixels; mask: bool [H, W].

    An answer is valid if it begins with four locations and sixteen codes and y1 > y0 and x1 > x0, also in whole pixels;
    the rest is ignored. Locations are divided by 1023, and the mask is pasted by the rule "big_vision" (see
    `mask_codec.paste`).
    """
    head = _MASK.match(text.strip())
    height, width = mask.shape
    parsed = parse(head[0], (width, height), loc_scale=1023, codec=codec, paste_rule="big_vision") if head else None
    if parsed is None or not parsed.segments:
        return 0.0, 0.0, False
    answer = parsed.segments[0]
    overlap = mask_iou(answer.mask, mask) if answer.mask is not None else 0.0
    x0, y0, x1, y1 = map(int, answer.box)
    return overlap, float(box_iou([answer.box], [box])[0, 0]), y1 > y0 and x1 > x0
