"""Published captioning data sets -> examples. The prompt is "caption en"; all captions of a picture are its answers.

The formats are those that big_vision's conversion scripts read (`datasets`). See `questions.py`.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator, Sequence
from typing import Any

from PIL import Image, ImageDraw

from paligemma.evaluate.benchmarks.files import Source
from paligemma.evaluate.examples import Example
from paligemma.images import load_image


def _caption(source: Source, number: str, image: Any, captions: Sequence[str], language: str = "en") -> Example:
    return Example(number, image, f"caption {language}", source.task, captions)


def cococap(source: Source) -> Iterator[Example]:
    """dataset_coco.json (Karpathy's splits, the usual ones for captioning: 5,000 pictures in "val"),
    val2014/COCO_val2014_*.jpg. The splits "val2014" and "val2017" are COCO's own, from captions_val2014.json."""
    if source.split.startswith("val2"):
        yield from _coco(source, f"captions_{source.split}.json", source.split)
        return
    for entry in source.json("dataset_coco.json")["images"]:
        if entry["split"] == source.split:
            name = f"{entry['filepath']}/{entry['filename']}"
            captions = [sentence["raw"] for sentence in entry["sentences"]]
            yield _caption(source, str(entry["cocoid"]), source.picture(name, f"images/{name}"), captions)


def nocaps(source: Source) -> Iterator[Example]:
    """nocaps_val_4500_captions.json, validation/*.jpg of Open Images."""
    yield from _coco(source, "nocaps_val_4500_captions.json", "validation")


def _coco(source: Source, name: str, folder: str) -> Iterator[Example]:
    """COCO's format of captions: "images" and "annotations", joined by image_id."""
    document = source.json(name, f"annotations/{name}")
    captions: dict[Any, list[str]] = {}
    for annotation in document["annotations"]:
        captions.setdefault(annotation["image_id"], []).append(annotation["caption"])
    for entry in document["images"]:
        path = f"{folder}/{entry['file_name']}"
        image = source.picture(path, f"images/{path}", f"Images/{path}")
        yield _caption(source, str(entry["id"]), image, captions.get(entry["id"], []))


def textcaps(source: Source) -> Iterator[Example]:
    """TextCaps_0.1_val.json, train_images/*.jpg (also for "val"; unlike in TextVQA, the reference rotates none)."""
    folder = "test_images" if source.split == "test" else "train_images"
    captions: dict[str, list[str]] = {}
    names: dict[str, str] = {}
    for entry in source.json(f"TextCaps_0.1_{source.split}.json")["data"]:
        number = str(entry["image_id"])
        names.setdefault(number, entry["image_name"])
        captions.setdefault(number, []).extend([entry["caption_str"]] if entry.get("caption_str") else [])
    for number, name in names.items():
        yield _caption(source, number, source.picture(f"{folder}/{name}.jpg"), captions[number])


def coco35l(source: Source) -> Iterator[Example]:
    """coco_mt_dev.jsonl, dataset_coco.json (for the paths), val2014/*.jpg, train2014/*.jpg. Splits "dev_en", "dev_de",
    ...: English is the source of the translations into German.

    CIDEr in other languages depends on a tokenizer made for English; ours was compared with the original for English
    only.
    """
    split, _, language = source.split.partition("_")
    key, target = ("caption_tokenized", "de") if language == "en" else ("translation_tokenized", language)
    paths = {e["cocoid"]: f"{e['filepath']}/{e['filename']}" for e in source.json("dataset_coco.json")["images"]}
    captions: dict[str, list[str]] = {}
    for entry in source.lines(f"coco_mt_{split}.jsonl"):
        if entry["trg_lang"] == target:
            captions.setdefault(entry["image_id"].split("_")[0], []).append(entry[key])
    for number, right in captions.items():
        name = paths[int(number)]
        yield _caption(source, number, source.picture(name, f"images/{name}"), right, language)


def xm3600(source: Source) -> Iterator[Example]:
    """captions.jsonl, images/{key}.jpg. Splits "en", "de", ... See `coco35l`."""
    for entry in source.lines("captions.jsonl"):
        key = entry["image/key"]
        captions = entry[source.split]["caption"]
        yield _caption(source, key, source.picture(f"images/{key}.jpg"), captions, source.split)


def screen2words(source: Source) -> Iterator[Example]:
    """screen_summaries.csv, split/test_screens.txt, combined/{id}.jpg (RICO)."""
    summaries: dict[int, list[str]] = {}
    with open(source.file("screen_summaries.csv"), encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            summaries.setdefault(int(row["screenId"]), []).append(row["summary"])
    name = f"{source.split}_screens.txt"
    for number in source.file(f"split/{name}", name).read_text(encoding="utf-8").split():
        yield _caption(source, number, source.picture(f"combined/{number}.jpg"), summaries[int(number)])


def widgetcap(source: Source) -> Iterator[Example]:
    """widget_captions.csv, split/test.txt, combined/{id}.jpg and {id}.json (RICO).

    The widget to describe is marked by a red box, one pixel wide in the square picture that the model sees.
    """
    chosen = set(source.file(f"split/{source.split}.txt", f"{source.split}.txt").read_text(encoding="utf-8").split())
    with open(source.file("widget_captions.csv"), encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            screen, node = row["screenId"], row["nodeId"]
            if screen in chosen:
                picture = load_image(source.picture(f"combined/{screen}.jpg"))
                box = _node_box(source.json(f"combined/{screen}.json"), node)
                # The bounds refer to a screen 2,560 pixels high.
                box = [edge * picture.height / 2560 for edge in box]
                image = _boxed(picture, box, source.side)
                yield _caption(source, f"{screen}_{node}", image, row["captions"].split("|"))


def _node_box(view: dict[str, Any], node: str) -> list[float]:
    """The bounds of a node of the view hierarchy, named by its path: "0.2.1" is child 1 of child 2 of the root."""
    found = view["activity"]["root"]
    for index in node.split(".")[1:]:
        found = found["children"][int(index)]
    return found["bounds"]


def _boxed(picture: Image.Image, box: Sequence[float], side: int) -> Image.Image:
    """Resized to the model's square first, then the red box, as TensorFlow's draw_bounding_boxes does it."""
    seen = picture.resize((side, side), Image.Resampling.BICUBIC)
    corners = [int(box[k] / picture.size[k % 2] * (side - 1)) for k in range(4)]
    ImageDraw.Draw(seen).rectangle(corners, outline=(255, 0, 0))
    return seen


def scicap(source: Source) -> Iterator[Example]:
    """The first sentences of captions, for figures without subfigures:
    List-of-Files-for-Each-Experiments/First-Sentence/No-Subfig/test/file_idx.json, SciCap-Caption-All/test/*.json,
    SciCap-No-Subfig-Img/test/*.png."""
    listed = f"List-of-Files-for-Each-Experiments/First-Sentence/No-Subfig/{source.split}/file_idx.json"
    for name in source.json(listed):
        figure = name.removesuffix(".png")
        entry = source.json(f"SciCap-Caption-All/{source.split}/{figure}.json")
        caption = entry["1-lowercase-and-token-and-remove-figure-index"]["caption"]
        yield _caption(source, figure, source.picture(f"SciCap-No-Subfig-Img/{source.split}/{name}"), [caption])
