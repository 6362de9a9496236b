"""Small data sets that several tests of this folder write."""

import json

from hypothesis import strategies as st

texts = st.text(st.characters(codec="utf-8"), max_size=12)
DIGITS = "9" * 5000  # Python makes a number of 4,300 at most
BOX = "<loc0010><loc0020><loc0030><loc0040>"
CODES = "".join(f"<seg{i:03d}>" for i in range(16))


def write_lines(folder, *records, name="my.jsonl"):
    text = "".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in records)
    (folder / name).write_text(text, encoding="utf-8")
    return folder / name


def good(**changes):
    return {"image": "a.png", "prefix": "answer en what is it ?", "suffix": "a dog", **changes}


COCO = {
    "info": {"year": 2024},
    "images": [
        {"id": 30, "file_name": "a.png", "width": 40, "height": 20},
        {"id": 10, "file_name": "b.png", "width": 40, "height": 20},
        {"id": 20, "file_name": "none.png", "width": 40, "height": 20},
    ],
    "annotations": [
        {"id": 1, "image_id": 10, "category_id": 2, "bbox": [20, 5, 10, 10], "iscrowd": 0},
        {"id": 2, "image_id": 30, "category_id": 1, "bbox": [0, 0, 40, 20], "iscrowd": 1},
        {"id": 3, "image_id": 10, "category_id": 1, "bbox": [10, 0, 20, 20]},
        {"id": 4, "image_id": 10, "category_id": 1, "bbox": [0, 0, 20, 10]},
        {"id": 5, "image_id": 30, "category_id": 2, "bbox": [30, 10, 10, 10]},
    ],
    "categories": [{"id": 2, "name": "cat"}, {"id": 1, "name": "dog"}, {"id": 9, "name": "süß"}],
}


def write_coco(folder, name="coco.json", **changes):
    text = json.dumps({**COCO, **changes}, ensure_ascii=False)
    (folder / name).write_bytes(text.encode("utf-8", "surrogatepass"))  # halves of characters too
    return folder / name
