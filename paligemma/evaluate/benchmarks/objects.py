"""RefCOCO, RefCOCO+ and RefCOCOg -> examples. The expression is the prompt; the answer is one object with its mask.

The data sets are published as pickles, which this project never reads: a pickle can run code. Two JSON formats are read
instead.

- MDETR's: finetune_refcoco_val.json and so on (https://github.com/ashkamath/mdetr, `refexp_coco_format.py`): one
  "image" for each expression. It has no masks; they are looked up by `original_id` in COCO's
  instances_train2014.json.
- The list in the pickle, saved as JSON by somebody who trusts the file: refs(unc).json or refs(umd).json, in the folder
  refcoco, refcoco+ or refcocog beside the published instances.json.

faster-coco-eval draws the masks from COCO's polygons, exactly as pycocotools does.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from paligemma.evaluate.average_precision import package
from paligemma.evaluate.benchmarks.files import Source
from paligemma.evaluate.examples import Example
from paligemma.evaluate.regions import Region


def refcoco(source: Source) -> Iterator[Example]:
    """Splits "refcoco/val", "refcoco+/testA", "refcocog/test", ...; pictures in train2014/."""
    data_set, split = source.split.split("/")
    by = "umd" if data_set == "refcocog" else "unc"
    mdetr = f"finetune_{data_set}_{split}.json"
    if source.has(mdetr) or source.has(f"{data_set}/{mdetr}"):
        document = source.json(mdetr, f"{data_set}/{mdetr}")
        said = {image["id"]: image["caption"] for image in document["images"]}
        # (expression, COCO's id of the object it means)
        pairs = [(said[a["image_id"]], a["original_id"]) for a in document["annotations"]]
    else:
        refs = source.json(f"{data_set}/refs({by}).json", mdetr)
        pairs = [(s["sent"], ref["ann_id"]) for ref in refs if ref["split"] == split for s in ref["sentences"]]
    instances = source.json(
        f"{data_set}/instances.json", "instances_train2014.json", "annotations/instances_train2014.json"
    )
    images = {image["id"]: image for image in instances["images"]}
    objects = {annotation["id"]: annotation for annotation in instances["annotations"]}
    for number, (expression, found) in enumerate(pairs):
        thing = objects[found]
        image = images[thing["image_id"]]
        x, y, width, height = thing["bbox"]
        mask = mask_of(thing["segmentation"], image["width"], image["height"])
        name = f"train2014/{image['file_name']}"
        yield Example(
            id=str(number),
            image=source.picture(name, f"images/{name}"),
            prompt=expression,
            task=source.task,
            regions=[Region("", (x, y, x + width, y + height), mask)],
            group=str(thing["image_id"]),
        )


def mask_of(segmentation: Any, width: int, height: int) -> np.ndarray:
    """COCO's polygons or run-length encoding -> bool [H, W]. ImportError without faster-coco-eval."""
    coco = package().mask
    if isinstance(segmentation, list):
        packed = coco.merge(coco.frPyObjects(segmentation, height, width))
    elif isinstance(segmentation["counts"], list):
        packed = coco.frPyObjects(segmentation, height, width)
    else:
        packed = segmentation
    return coco.decode(packed).astype(bool)
