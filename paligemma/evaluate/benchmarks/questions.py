"""Published question answering data sets -> examples, with the prompts of PaliGemma's transfers.

One reader for each format of annotations. The prompts are those of big_vision (`configs/proj/paligemma/transfers`). The
formats are those that its conversion scripts read (`datasets`), or else what the reader names. Splits whose answers are
kept on a server give examples without answers: the model can be run on them, but not measured.
"""

from __future__ import annotations

import csv
import itertools
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from paligemma.evaluate.benchmarks.files import Source
from paligemma.evaluate.examples import Example
from paligemma.images import load_image

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


def choose_from(question: str, choices: Sequence[str]) -> str:
    """The prompt for multiple choice: two spaces after "en"; a space, a tab and a space between the choices."""
    return f"answer en  {question} choose from: " + " \t ".join(choices)


# --- VQA v2 and what is written like it -----------------------------------------------------------

_COCO_2014 = {"train": "train2014", "val": "val2014", "test": "test2015", "test-dev": "test2015"}


def vqav2(source: Source) -> Iterator[Example]:
    """v2_OpenEnded_mscoco_val2014_questions.json, v2_mscoco_val2014_annotations.json, val2014/COCO_val2014_*.jpg."""
    year = "test-dev2015" if source.split == "test-dev" else _COCO_2014[source.split]
    answers = [f"v2_mscoco_{year}_annotations.json"] if "test" not in source.split else []
    yield from _question_pairs(source, [f"v2_OpenEnded_mscoco_{year}_questions.json"], answers)


def okvqa(source: Source) -> Iterator[Example]:
    """OpenEnded_mscoco_val2014_questions.json, mscoco_val2014_annotations.json, val2014/COCO_val2014_*.jpg."""
    year = _COCO_2014[source.split]
    answers = [f"mscoco_{year}_annotations.json"]
    yield from _question_pairs(source, [f"OpenEnded_mscoco_{year}_questions.json"], answers)


def _question_pairs(source: Source, questions: Sequence[str], annotations: Sequence[str]) -> Iterator[Example]:
    folder = _COCO_2014[source.split]
    answered = {a["question_id"]: a for a in source.json(*annotations)["annotations"]} if annotations else {}
    for entry in source.json(*questions)["questions"]:
        annotation = answered[entry["question_id"]] if annotations else {}
        name = f"{folder}/COCO_{folder}_{entry['image_id']:012d}.jpg"
        yield Example(
            id=str(entry["question_id"]),
            image=source.picture(name, f"images/{name}"),
            prompt=f"answer en {entry['question']}",
            task=source.task,
            answers=[a["answer"] for a in annotation.get("answers", ())],
            group=str(entry["image_id"]),
            kind=annotation.get("answer_type", ""),
        )


def aokvqa_da(source: Source) -> Iterator[Example]:
    """aokvqa_v1p0_val.json, val2017/*.jpg; direct answers."""
    for entry in source.json(f"aokvqa_v1p0_{source.split}.json"):
        yield _aokvqa(source, entry, f"answer en {entry['question']}", entry.get("direct_answers", ()))


def aokvqa_mc(source: Source) -> Iterator[Example]:
    """The same with four answers to choose from."""
    for entry in source.json(f"aokvqa_v1p0_{source.split}.json"):
        right = [entry["choices"][entry["correct_choice_idx"]]] if "correct_choice_idx" in entry else []
        yield _aokvqa(source, entry, choose_from(entry["question"], entry["choices"]), right)


def _aokvqa(source: Source, entry: dict[str, Any], prompt: str, answers: Sequence[str]) -> Example:
    name = f"{source.split}2017/{entry['image_id']:012d}.jpg"
    picture = source.picture(name, f"images/{name}")
    return Example(entry["question_id"], picture, prompt, source.task, answers, group=str(entry["image_id"]))


def vizwizvqa(source: Source) -> Iterator[Example]:
    """annotations/val.json, val/VizWiz_val_*.jpg. Empty answers are left out, as in the reference."""
    for entry in source.json(f"annotations/{source.split}.json", f"{source.split}.json"):
        yield Example(
            id=entry["image"],
            image=source.picture(f"{source.split}/{entry['image']}", f"images/{source.split}/{entry['image']}"),
            prompt=f"answer en {entry['question']}",
            task=source.task,
            answers=[a["answer"] for a in entry.get("answers", ()) if a["answer"]],
        )


# --- questions about text in pictures -------------------------------------------------------------


def textvqa(source: Source) -> Iterator[Example]:
    """TextVQA_0.5.1_val.json, train_images/*.jpg (also for "val"), test_images/*.jpg.

    Some pictures lie on their side. As the reference does, we rotate them by the column "Rotation" of Open Images
    (`{train,test}-images-*with-rotation.csv`), if that table is in the folder of the pictures as rotation.csv.
    """
    folder = "test_images" if source.split == "test" else "train_images"
    turned: dict[str, int] = {}
    if source.has(f"{folder}/rotation.csv"):
        with open(source.file(f"{folder}/rotation.csv"), encoding="utf-8", newline="") as file:
            degrees = ((row["ImageID"], float(row["Rotation"] or 0)) for row in csv.DictReader(file))
            turned = {name: int(angle) for name, angle in degrees if angle}
    for entry in source.json(f"TextVQA_0.5.1_{source.split}.json")["data"]:
        name = str(entry["image_id"])
        image: Any = source.picture(f"{folder}/{name}.jpg")
        if name in turned:
            image = load_image(image).rotate(turned[name], expand=True)  # counter-clockwise, as tf.image.rot90
        yield Example(
            id=str(entry["question_id"]),
            image=image,
            prompt=f"answer en {entry['question']}",
            task=source.task,
            answers=entry.get("answers", ()),
            group=name,
        )


def docvqa(source: Source) -> Iterator[Example]:
    """val_v1.0_withQT.json, val/documents/*.png. The prompt is the question alone."""
    names = [f"{source.split}_v1.0{end}.json" for end in (("",) if source.split == "test" else ("_withQT", ""))]
    for entry in source.json(*names)["data"]:
        yield Example(
            id=str(entry["questionId"]),
            image=source.picture(f"{source.split}/{entry['image']}", entry["image"]),
            prompt=entry["question"],
            task=source.task,
            answers=entry.get("answers", ()),
            group=entry["image"],
        )


def orders(parts: list[str]) -> Iterable[Sequence[str]]:
    """All orders of up to six parts. Ten would have 3.6 million."""
    return itertools.permutations(parts) if len(parts) <= 6 else [parts]


def infovqa(source: Source) -> Iterator[Example]:
    """infographicsVQA_val_v1.0_withQT.json, images/*. In "val" the parts of an answer such as "a, b" may come in any
    order."""
    end = "_withQT" if source.split == "val" else ""
    for entry in source.json(f"infographicsVQA_{source.split}_v1.0{end}.json")["data"]:
        answers = entry.get("answers", [])
        if source.split == "val":
            answers = [", ".join(order) for a in answers for order in orders(a.split(", "))]
        yield Example(
            id=str(entry["questionId"]),
            image=source.picture(f"images/{entry['image_local_name']}"),
            prompt=f"answer en {entry['question']}",
            task=source.task,
            answers=answers,
            group=entry["image_local_name"],
        )


def stvqa(source: Source) -> Iterator[Example]:
    """train_task_3.json, train_images/*; test_task_3.json, test_task3_images/*. The reference takes the pictures of
    COCO-Text from COCO, where they are larger (train2014/*); so do we if they exist.

    The reference also has a split "val", a part of "train", whose list it has not published.
    """
    folder = "test_task3_images" if source.split == "test" else "train_images"
    for entry in source.json(f"{source.split}_task_3.json")["data"]:
        path = entry["file_path"]
        large = [path.replace("coco-text", "train2014", 1)] if path.startswith("coco-text") else []
        yield Example(
            id=str(entry["question_id"]),
            image=source.picture(*large, f"{folder}/{path}"),
            prompt=f"answer en {entry['question']}",
            task=source.task,
            answers=entry.get("answers", ()),
            group=path,
        )


def ocrvqa(source: Source) -> Iterator[Example]:
    """dataset.json, images/{id}.jpg. Format: https://ocr-vqa.github.io, as MMPretrain reads it (`ocr_vqa.py`); the
    reference has not published its reader."""
    number = {"train": 1, "val": 2, "test": 3}[source.split]
    for book, entry in source.json("dataset.json").items():
        if entry["split"] != number:
            continue
        image = source.picture(f"images/{book}{Path(entry['imageURL']).suffix}", f"images/{book}.jpg")
        for k, (question, answer) in enumerate(zip(entry["questions"], entry["answers"])):
            yield Example(f"{book}-{k}", image, f"answer en {question}", source.task, [answer], group=book)


# --- diagrams, charts, exams ----------------------------------------------------------------------


def ai2d(source: Source) -> Iterator[Example]:
    """questions/*.png.json, annotations/*.png.json, images/*.png, ai2d_test_ids.csv.

    If the answers are letters, the letters replace the labels in the picture. The reference draws them in the font DM
    Sans; we use Pillow's own font.
    """
    test = set(source.file("ai2d_test_ids.csv").read_text(encoding="utf-8").split())
    for path in sorted((source.folder / "questions").glob("*.json")):
        if (path.name.split(".")[0] in test) != (source.split == "test"):
            continue
        asked = source.json(f"questions/{path.name}")
        plain = source.picture(f"images/{asked['imageName']}")
        for question, entry in asked["questions"].items():
            image: Any = plain
            if entry["abcLabel"]:
                image = _relabelled(plain, source.json(f"annotations/{path.name}")["text"])
            yield Example(
                id=entry["questionId"],
                image=image,
                prompt=choose_from(question, entry["answerTexts"]),
                task=source.task,
                answers=[entry["answerTexts"][int(entry["correctAnswer"])]],
                group=asked["imageName"],
            )


def _relabelled(path: str, texts: dict[str, Any]) -> Image.Image:
    """Every text is covered by a white box with its replacement, in the largest font that fits."""
    image = load_image(path)
    pen = ImageDraw.Draw(image)
    for text in texts.values():
        (x0, y0), (x1, y1) = text["rectangle"]
        pen.rectangle((x0, y0, x1, y1), fill="white")
        for size in range(100, 0, -1):
            font = ImageFont.load_default(size)
            _, _, right, bottom = font.getbbox(text["replacementText"])
            if right <= x1 - x0 and bottom <= y1 - y0:
                pen.text((x0 + (x1 - x0 - right) // 2, y0), text["replacementText"], fill="black", font=font)
                break
    return image


def scienceqa(source: Source) -> Iterator[Example]:
    """problems.json, test/{id}/image.png; only the problems that have a picture."""
    for number, entry in source.json("problems.json").items():
        if entry["split"] != source.split or not entry["image"]:
            continue
        choices = ", ".join(f"({letter}) {choice}" for letter, choice in zip(LETTERS, entry["choices"]))
        name = f"{source.split}/{number}/{entry['image']}"
        yield Example(
            id=number,
            image=source.picture(name, f"images/{name}"),
            prompt=f"Question: {entry['question']}\nContext: {entry['hint'] or 'N/A'}\nOptions: {choices}\nAnswer:",
            task=source.task,
            answers=[f"The answer is {LETTERS[int(entry['answer'])]}."],
        )


def chartqa(source: Source) -> Iterator[Example]:
    """test/test_human.json, test/test_augmented.json, test/png/*.png. The prompt is the question alone."""
    for kind in ("human", "augmented"):
        for number, entry in enumerate(source.json(f"{source.split}/{source.split}_{kind}.json")):
            yield Example(
                id=f"{kind}-{number}",
                image=source.picture(f"{source.split}/png/{entry['imgname']}"),
                prompt=entry["query"],
                task=source.task,
                answers=[str(entry["label"])],
                group=entry["imgname"],
                kind=kind,
            )


# --- reasoning, counting, hallucination -----------------------------------------------------------


def gqa(source: Source) -> Iterator[Example]:
    """testdev_balanced_questions.json, images/*.jpg."""
    for number, entry in source.json(f"{source.split}_questions.json").items():
        yield Example(
            id=number,
            image=source.picture(f"images/{entry['imageId']}.jpg"),
            prompt=f"answer en {entry['question']}",
            task=source.task,
            answers=[entry["answer"]] if "answer" in entry else [],
            group=entry["imageId"],
        )


def nlvr2(source: Source) -> Iterator[Example]:
    """test1.json (one object a line), test1/{identifier}-img0.png and -img1.png: two pictures a row.

    Format and names: https://github.com/lil-lab/nlvr, nlvr2/README.md; the reference has not published its reader.
    """
    name = {"test": "test1"}.get(source.split, source.split)
    for entry in source.lines(f"{name}.json", f"data/{name}.json"):
        pair = entry["identifier"].rsplit("-", 1)[0]
        folders = [name, f"images/{name}", f"images/{name}/{entry.get('directory', '')}", "."]
        sides = (f"{pair}-img0.png", f"{pair}-img1.png")
        yield Example(
            id=entry["identifier"],
            image=tuple(source.picture(*(f"{folder}/{side}" for folder in folders)) for side in sides),
            prompt=f"answer en {entry['sentence']}",
            task=source.task,
            answers=[str(entry["label"])],
            group=pair,
        )


def tallyqa(source: Source) -> Iterator[Example]:
    """test.json, VG_100K/*.jpg, VG_100K_2/*.jpg (Visual Genome), and for "train" train2014/* and val2014/* of COCO."""
    for entry in source.json(f"{source.split}.json"):
        path = entry["image"]
        yield Example(
            id=f"{entry['image_id']}-{entry['question_id']}",
            image=source.picture(path, f"visual_genome/{path}", f"coco/{path}"),
            prompt=f"answer en {entry['question']}",
            task=source.task,
            answers=[str(int(entry["answer"]))],
            group=path,
            kind={True: "simple", False: "complex"}[bool(entry["issimple"])] if "issimple" in entry else "",
        )


def pope(source: Source) -> Iterator[Example]:
    """coco_pope_random.json, _popular, _adversarial (one object a line), val2014/COCO_val2014_*.jpg. The prompt is
    the question alone, with its capital letter."""
    for kind in ("random", "popular", "adversarial") if source.split == "test" else (source.split,):
        name = f"coco_pope_{kind}.json"
        for number, entry in enumerate(source.lines(name, f"output/coco/{name}")):
            yield Example(
                id=f"{kind}-{number}",
                image=source.picture(f"val2014/{entry['image']}", f"images/val2014/{entry['image']}"),
                prompt=entry["text"],
                task=source.task,
                answers=[entry["label"]],
                group=entry["image"],
                kind=kind,
            )


def rsvqa_lr(source: Source) -> Iterator[Example]:
    """LR_split_test_questions.json, LR_split_test_answers.json, Images_LR/{img_id}.tif; without numeric answers."""
    yield from _remote_sensing(source, f"LR_split_{source.split}", "Images_LR", ".tif", ("count",))


def rsvqa_hr(source: Source) -> Iterator[Example]:
    """USGS_split_test_questions.json, _answers.json (test_2: test_phili), Data/{img_id}.png; not numeric."""
    split = {"test_2": "test_phili"}.get(source.split, source.split)
    yield from _remote_sensing(source, f"USGS_split_{split}", "Data", ".png", ("area", "count"))


def _remote_sensing(source: Source, name: str, folder: str, ending: str, numeric: Sequence[str]) -> Iterator[Example]:
    questions = source.json(f"{name}_questions.json")["questions"]
    answers = {
        entry["question_id"]: entry for entry in source.json(f"{name}_answers.json")["answers"] if entry["active"]
    }
    for entry in questions:
        if not entry["active"] or entry["type"] in numeric:
            continue
        yield Example(
            id=str(entry["id"]),
            image=source.picture(f"{folder}/{entry['img_id']}{ending}"),
            prompt=f"answer en {entry['question']}",
            task=source.task,
            answers=[answers[entry["id"]]["answer"]],
            group=str(entry["img_id"]),
            kind=entry["type"],
        )
