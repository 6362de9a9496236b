"""RefCOCO, RefCOCO+ and RefCOCOg -> examples: the expression alone is the prompt, one object with its mask the answer.

The data sets are published as pickles, which this project never reads: a pickle can run code. Two forms in JSON serve.

- MDETR's: finetune_refcoco_val.json and so on (https://github.com/ashkamath/mdetr, `refexp_coco_format.py`): one
  "image" for each expression. It leaves out the masks; they are looked up by `original_id` in COCO's
  instances_train2014.json.
- The list in the pickle, refs(unc).json or refs(umd).json, written as JSON by whoever trusts the file, in the folder
  refcoco, refcoco+ or refcocog beside the published instances.json.

Masks come from COCO's polygons by faster-coco-eval, which draws them as pycocotools does.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

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
        # An expression and the object it means, in COCO's own numbers.
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
    """COCO's polygons or run lengths -> bool [H, W]. ImportError without faster-coco-eval."""
    try:
        from faster_coco_eval.core import mask as coco
    except ImportError:
        raise ImportError("COCO's masks need faster-coco-eval: pip install 'paligemma[evaluate]'") from None
    if isinstance(segmentation, list):
        packed = coco.merge(coco.frPyObjects(segmentation, height, width))
    elif isinstance(segmentation["counts"], list):
        packed = coco.frPyObjects(segmentation, height, width)
    else:
        packed = segmentation
    return coco.decode(packed).astype(bool)
