"""Benchmarks: tiny data sets in the published formats, the prompts they give, and scores worked out by hand."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image
from reference import tiny_config
from rich.console import Console

from paligemma.answers.mask_codec import MaskCodec
from paligemma.evaluate.benchmarks import BENCHMARKS, benchmark_examples, evaluate_benchmark
from paligemma.evaluate.benchmarks.metrics import letter, same_number
from paligemma.evaluate.benchmarks.objects import mask_of
from paligemma.evaluate.benchmarks.questions import orders
from paligemma.evaluate.vqa import agreement
from paligemma.images import load_image
from paligemma.inference import Answer
from paligemma.weights.published import published_config


@dataclass
class Case:
    """A data set of one or a few rows. files: name -> what is in it; a name that ends as a picture's is a picture.
    rows: (prompt, pictures, answers) expected of each row, in order; says: what the model shall answer; figures: name
    -> value."""

    task: str
    files: dict[str, Any]
    rows: list[tuple[str, str | tuple[str, ...] | None, list[str]]]
    says: list[str] = field(default_factory=list)
    figures: dict[str, float] = field(default_factory=dict)
    split: str | None = None

    def __str__(self) -> str:
        return f"{self.task}-{self.split}" if self.split else self.task


def people(*answers: str) -> list[dict]:
    return [
        {"answer": a, "raw_answer": a, "answer_confidence": "yes", "answer_id": k} for k, a in enumerate(answers, 1)
    ]


TEN = ["red"] * 2 + ["dark red"] * 8
KARPATHY = {
    "images": [
        {"filepath": "val2014", "filename": "COCO_val2014_000000000042.jpg", "cocoid": 42, "imgid": 0, "split": "val",
         "sentences": [{"raw": "A dog runs.", "tokens": ["a", "dog", "runs"]}, {"raw": "The dog is running."}]},
        {"filepath": "train2014", "filename": "COCO_train2014_000000000009.jpg", "cocoid": 9, "split": "train",
         "sentences": [{"raw": "A bowl."}]},
        {"filepath": "val2014", "filename": "COCO_val2014_000000000073.jpg", "cocoid": 73, "split": "val",
         "sentences": [{"raw": "Two motorbikes."}]},
    ],
    "dataset": "coco",
}  # fmt: skip
SQUARE = [[10.0, 5.0, 30.0, 5.0, 30.0, 15.0, 10.0, 15.0]]
INSTANCES = {
    "images": [{"id": 7, "file_name": "COCO_train2014_000000000007.jpg", "width": 40, "height": 20}],
    "annotations": [
        {"id": 70, "image_id": 7, "category_id": 1, "bbox": [10, 5, 20, 10], "segmentation": SQUARE, "iscrowd": 0}
    ],
    "categories": [{"id": 1, "name": "dog"}],
}

CASES = [
    Case(
        "vqav2",
        {
            "v2_OpenEnded_mscoco_val2014_questions.json": {"questions": [
                {"image_id": 42, "question": "What color is it?", "question_id": 42000},
                {"image_id": 42, "question": "Is it a dog?", "question_id": 42001},
            ]},
            "v2_mscoco_val2014_annotations.json": {"annotations": [
                {"question_id": 42001, "answer_type": "yes/no", "answers": people(*["yes"] * 10)},
                {"question_id": 42000, "answer_type": "other", "answers": people(*TEN)},
            ]},
            "val2014/COCO_val2014_000000000042.jpg": None,
        },
        [("answer en What color is it?", "val2014/COCO_val2014_000000000042.jpg", TEN),
         ("answer en Is it a dog?", "val2014/COCO_val2014_000000000042.jpg", ["yes"] * 10)],
        ["The red", "yes"],  # normalised, since people disagree: two of ten said so, worth .6
        {"VQA accuracy": 0.8, "VQA accuracy, yes/no": 1, "VQA accuracy, other": 0.6},
    ),
    Case(
        "vqav2",
        {"v2_OpenEnded_mscoco_test-dev2015_questions.json": {"questions": [
            {"image_id": 1, "question": "Why?", "question_id": 1000}]},
         "images/test2015/COCO_test2015_000000000001.jpg": None},
        [("answer en Why?", "images/test2015/COCO_test2015_000000000001.jpg", [])],
        ["because"],
        split="test-dev",
    ),
    Case(
        "okvqa",
        {
            "OpenEnded_mscoco_val2014_questions.json": {"questions": [
                {"image_id": 3, "question": "Who made it?", "question_id": 30}]},
            "mscoco_val2014_annotations.json": {"annotations": [
                {"question_id": 30, "image_id": 3, "answer_type": "other", "question_type": "one",
                 "answers": people(*TEN)}]},
            "val2014/COCO_val2014_000000000003.jpg": None,
        },
        [("answer en Who made it?", "val2014/COCO_val2014_000000000003.jpg", TEN)],
        ["red"],  # two of the three that are needed; nobody is left out
        {"accuracy": 2 / 3},
    ),
    Case(
        "aokvqa-da",
        {"aokvqa_v1p0_val.json": [{"question_id": "abc", "image_id": 5, "question": "What is it for?",
                                   "choices": ["a", "b", "c", "d"], "correct_choice_idx": 1,
                                   "direct_answers": TEN, "difficult_direct_answer": False}],
         "val2017/000000000005.jpg": None},
        [("answer en What is it for?", "val2017/000000000005.jpg", TEN)],
        ["Red"],  # as it is written
        {"accuracy": 0},
    ),
    Case(
        "aokvqa-mc",
        {"aokvqa_v1p0_val.json": [{"question_id": "abc", "image_id": 5, "question": "What is it?",
                                   "choices": ["a cat", "dog", "cow", "red"], "correct_choice_idx": 1}],
         "val2017/000000000005.jpg": None},
        [("answer en  What is it? choose from: a cat \t dog \t cow \t red", "val2017/000000000005.jpg", ["dog"])],
        ["dog"],
        {"accuracy": 1},
    ),
    Case(
        "vizwizvqa",
        {"annotations/val.json": [{"image": "VizWiz_val_00000000.jpg", "question": "What is this?", "answerable": 1,
                                   "answer_type": "other", "answers": people("soup", "", "soup", "can")}],
         "val/VizWiz_val_00000000.jpg": None},
        [("answer en What is this?", "val/VizWiz_val_00000000.jpg", ["soup", "soup", "can"])],
        ["soup"],
        {"accuracy": 2 / 3},
    ),
    Case(
        "textvqa",
        {"TextVQA_0.5.1_val.json": {"dataset_type": "val", "dataset_name": "textvqa", "data": [
            {"question": "what does it say?", "image_id": "003a8ae2", "question_id": 34602, "answers": TEN,
             "image_classes": ["Sign"], "set_name": "val"}]},
         "train_images/003a8ae2.jpg": None},
        [("answer en what does it say?", "train_images/003a8ae2.jpg", TEN)],
        ["dark red"],
        {"VQA accuracy": 1},
    ),
    Case(
        "docvqa",
        {"val_v1.0_withQT.json": {"dataset_name": "docvqa", "data": [
            {"questionId": 49153, "question": "What is the 'actual' value?", "image": "documents/pybv0228_81.png",
             "docId": 14465, "answers": ["Room B12", "B12"], "data_split": "val"}]},
         "val/documents/pybv0228_81.png": None},
        [("What is the 'actual' value?", "val/documents/pybv0228_81.png", ["Room B12", "B12"])],
        ["room b1"],  # one edit of eight
        {"ANLS": 7 / 8},
    ),
    Case(
        "infovqa",
        {"infographicsVQA_val_v1.0_withQT.json": {"data": [
            {"questionId": 98313, "question": "Which two?", "image_local_name": "37313.jpeg",
             "answers": ["Left, right"], "data_split": "val"}]},
         "images/37313.jpeg": None},
        [("answer en Which two?", "images/37313.jpeg", ["Left, right", "right, Left"])],
        ["Right, left"],
        {"ANLS": 1},
    ),
    Case(
        "stvqa",
        {"train_task_3.json": {"data": [
            {"question": "What year?", "answers": ["2010"], "question_id": 1, "dataset": "coco-text",
             "file_path": "coco-text/COCO_train2014_000000000001.jpg"},
            {"question": "What year?", "answers": ["2011"], "question_id": 2, "dataset": "vizwiz",
             "file_path": "vizwiz/x.jpg"}]},
         "train2014/COCO_train2014_000000000001.jpg": None,
         "train_images/vizwiz/x.jpg": None},
        [("answer en What year?", "train2014/COCO_train2014_000000000001.jpg", ["2010"]),
         ("answer en What year?", "train_images/vizwiz/x.jpg", ["2011"])],
        ["2010", "20"],  # half of the second is wrong: nothing
        {"ANLS": 0.5},
    ),
    Case(
        "ocrvqa",
        {"dataset.json": {
            "761183272": {"imageURL": "http://x/61Y5.jpg", "questions": ["Who wrote this book?", "Is it a game?"],
                          "answers": ["Sandra Boynton", "No"], "title": "", "authorName": "", "genre": "", "split": 3},
            "2": {"imageURL": "http://x/y.jpg", "questions": ["Who?"], "answers": ["me"], "split": 1}},
         "images/761183272.jpg": None},
        [("answer en Who wrote this book?", "images/761183272.jpg", ["Sandra Boynton"]),
         ("answer en Is it a game?", "images/761183272.jpg", ["No"])],
        ["Sandra Boynton", "Yes"],
        {"accuracy": 0.5},
    ),
    Case(
        "gqa",
        {"testdev_balanced_questions.json": {"201307251": {
            "question": "Is it overcast?", "answer": "no", "imageId": "n161313", "isBalanced": True,
            "fullAnswer": "No, it is clear."}},
         "images/n161313.jpg": None},
        [("answer en Is it overcast?", "images/n161313.jpg", ["no"])],
        ["no"],
        {"accuracy": 1},
    ),
    Case(
        "nlvr2",
        {"test1.json": [
            {"identifier": "test1-0-1-0", "sentence": "There are two dogs.", "label": "False", "left_url": "",
             "right_url": ""},
            {"identifier": "test1-0-1-1", "sentence": "One is red.", "label": "True"}],
         "test1/test1-0-1-img0.png": None, "test1/test1-0-1-img1.png": None},
        [("answer en There are two dogs.", ("test1/test1-0-1-img0.png", "test1/test1-0-1-img1.png"), ["False"]),
         ("answer en One is red.", ("test1/test1-0-1-img0.png", "test1/test1-0-1-img1.png"), ["True"])],
        ["false", "False"],
        {"accuracy": 0.5},
    ),
    Case(
        "tallyqa",
        {"test.json": [
            {"image": "VG_100K_2/2410408.jpg", "image_id": 92410408, "question_id": 30096216, "answer": 2,
             "data_source": "imported_genome", "question": "How many dogs?", "issimple": True},
            {"image": "VG_100K_2/2410408.jpg", "image_id": 92410408, "question_id": 30096217, "answer": 3,
             "data_source": "amt", "question": "How many dogs are red?", "issimple": False}],
         "VG_100K_2/2410408.jpg": None},
        [("answer en How many dogs?", "VG_100K_2/2410408.jpg", ["2"]),
         ("answer en How many dogs are red?", "VG_100K_2/2410408.jpg", ["3"])],
        ["Two", "4"],
        {"accuracy": 0.5, "accuracy, simple": 1, "accuracy, complex": 0},
    ),
    Case(
        "pope",
        {
            f"coco_pope_{kind}.json": [
                {"question_id": k, "image": "COCO_val2014_000000000001.jpg", "image_id": 1, "label": label,
                 "text": f"Is there a {kind} dog in the image?"}
                for k, label in enumerate(("yes", "no"))
            ]
            for kind in ("random", "popular", "adversarial")
        } | {"val2014/COCO_val2014_000000000001.jpg": None},
        [(f"Is there a {kind} dog in the image?", "val2014/COCO_val2014_000000000001.jpg", [label])
         for kind in ("random", "popular", "adversarial") for label in ("yes", "no")],
        ["Yes", "no", "no", "no", "a dog", "No"],  # "a dog" is no answer, though POPE's script takes it for a yes
        {"accuracy": 4 / 6, "accuracy, random": 1, "accuracy, popular": 0.5, "accuracy, adversarial": 0.5,
         "F1": 4 / 5, "yes ratio": 2 / 6, "valid": 5 / 6},
    ),
    Case(
        "ai2d",
        {"ai2d_test_ids.csv": "10\n77\n",
         "questions/10.png.json": {"imageName": "10.png", "questions": {"What is A?": {
             "questionId": "10.png-0", "answerTexts": ["moon", "sun"], "correctAnswer": 1, "abcLabel": False}}},
         "annotations/10.png.json": {"text": {}},
         "questions/11.png.json": {"imageName": "11.png", "questions": {}},
         "images/10.png": None},
        [("answer en  What is A? choose from: moon \t sun", "images/10.png", ["sun"])],
        ["Sun"],  # the choices can be copied, so case counts
        {"accuracy": 0},
    ),
    Case(
        "scienceqa",
        {"problems.json": {
            "4": {"question": "Which is north?", "choices": ["Maine", "Utah"], "answer": 0, "hint": "", "split": "test",
                  "image": "image.png"},
            "5": {"question": "Why?", "choices": ["a", "b"], "answer": 0, "hint": "", "split": "test", "image": None},
            "6": {"question": "Who?", "choices": ["x", "y"], "answer": 1, "hint": "Look.", "split": "test",
                  "image": "image.png"},
            "7": {"question": "?", "choices": ["x", "y"], "answer": 1, "hint": "", "split": "val", "image": "i.png"}},
         "test/4/image.png": None, "images/test/6/image.png": None},
        [("Question: Which is north?\nContext: N/A\nOptions: (A) Maine, (B) Utah\nAnswer:", "test/4/image.png",
          ["The answer is A."]),
         ("Question: Who?\nContext: Look.\nOptions: (A) x, (B) y\nAnswer:", "images/test/6/image.png",
          ["The answer is B."])],
        ["the answer is a. Since", "B"],
        {"accuracy": 0.5, "valid": 0.5},
    ),
    Case(
        "chartqa",
        {"test/test_human.json": [{"imgname": "1.png", "query": "How many?", "label": "100"}],
         "test/test_augmented.json": [{"imgname": "1.png", "query": "Which?", "label": "Blue"},
                                      {"imgname": "1.png", "query": "When?", "label": "1990"}],
         "test/png/1.png": None},
        [("How many?", "test/png/1.png", ["100"]), ("Which?", "test/png/1.png", ["Blue"]),
         ("When?", "test/png/1.png", ["1990"])],
        ["105", "blue", "3"],
        {"relaxed accuracy": 2 / 3, "relaxed accuracy, human": 1, "relaxed accuracy, augmented": 0.5,
         "relaxed accuracy, mean of the two": 0.75},
    ),
    Case(
        "rsvqa-lr",
        {"LR_split_test_questions.json": {"questions": [
            {"id": 1, "active": True, "img_id": 0, "type": "presence", "question": "Is a road there?"},
            {"id": 2, "active": True, "img_id": 0, "type": "count", "question": "How many?", "answers_ids": [9]},
            {"id": 3, "active": False, "img_id": 0, "type": "comp"},
            {"id": 4, "active": True, "img_id": 0, "type": "comp", "question": "More?", "answers_ids": [11]},
            {"id": 5, "active": True, "img_id": 0, "type": "comp", "question": "Less?", "answers_ids": [12]}]},
         "LR_split_test_answers.json": {"answers": [
             {"id": 8, "active": True, "question_id": 1, "answer": "yes"},
             {"id": 9, "active": True, "question_id": 2, "answer": "7"},
             {"id": 10, "active": False},
             {"id": 11, "active": True, "question_id": 4, "answer": "no"},
             {"id": 12, "active": True, "question_id": 5, "answer": "no"}]},
         "Images_LR/0.tif": None},
        [("answer en Is a road there?", "Images_LR/0.tif", ["yes"]), ("answer en More?", "Images_LR/0.tif", ["no"]),
         ("answer en Less?", "Images_LR/0.tif", ["no"])],
        ["Yes", "no", "yes"],
        {"accuracy": 2 / 3, "accuracy, presence": 1, "accuracy, comp": 0.5, "accuracy, mean of types": 0.75},
    ),
    Case(
        "rsvqa-hr",
        {"USGS_split_test_phili_questions.json": {"questions": [
            {"id": 1, "active": True, "img_id": 3, "type": "presence", "question": "Is it?", "answers_ids": [1]},
            {"id": 2, "active": True, "img_id": 3, "type": "area", "question": "How large?", "answers_ids": [2]}]},
         "USGS_split_test_phili_answers.json": {"answers": [
             {"id": 1, "active": True, "question_id": 1, "answer": "yes"},
             {"id": 2, "active": True, "question_id": 2, "answer": "7m2"}]},
         "Data/3.png": None},
        [("answer en Is it?", "Data/3.png", ["yes"])],
        ["yes"],
        {"accuracy, mean of types": 1},
        split="test_2",
    ),
    Case(
        "cococap",
        {"dataset_coco.json": KARPATHY, "val2014/COCO_val2014_000000000042.jpg": None,
         "val2014/COCO_val2014_000000000073.jpg": None},
        [("caption en", "val2014/COCO_val2014_000000000042.jpg", ["A dog runs.", "The dog is running."]),
         ("caption en", "val2014/COCO_val2014_000000000073.jpg", ["Two motorbikes."])],
        ["a dog runs", "two motorbikes"],
        # Each equals a reference, but for case and full stop.
        {"BLEU-1": 1, "BLEU-2": 1},
    ),
    Case(
        "cococap",
        {"annotations/captions_val2017.json": {
            "images": [{"id": 3, "file_name": "000000000003.jpg"}],
            "annotations": [{"image_id": 3, "id": 1, "caption": "A cat."}, {"image_id": 3, "id": 2, "caption": "Cat"}]},
         "val2017/000000000003.jpg": None},
        [("caption en", "val2017/000000000003.jpg", ["A cat.", "Cat"])],
        split="val2017",
    ),
    Case(
        "nocaps",
        {"nocaps_val_4500_captions.json": {
            "images": [{"id": 0, "file_name": "0013ea20.jpg", "coco_url": "", "open_images_id": "0013ea20"}],
            "annotations": [{"image_id": 0, "id": 0, "caption": "A baby."}]},
         "validation/0013ea20.jpg": None},
        [("caption en", "validation/0013ea20.jpg", ["A baby."])],
    ),
    Case(
        "textcaps",
        {"TextCaps_0.1_val.json": {"data": [
            {"image_id": "ab", "image_name": "ab", "caption_str": "A sign.", "caption_id": 1, "set_name": "val"},
            {"image_id": "cd", "image_name": "cd", "caption_str": "A jar."},
            {"image_id": "ab", "image_name": "ab", "caption_str": "STOP it says."}]},
         "train_images/ab.jpg": None, "train_images/cd.jpg": None},
        [("caption en", "train_images/ab.jpg", ["A sign.", "STOP it says."]),
         ("caption en", "train_images/cd.jpg", ["A jar."])],
        ["stop it says", "a jar"],
        {"BLEU-1": 1},
    ),
    Case(
        "coco35l",
        {"dataset_coco.json": KARPATHY,
         "coco_mt_dev.jsonl": [
             {"image_id": "42_0", "src_lang": "en", "trg_lang": "de", "caption_tokenized": "a dog runs",
              "translation_tokenized": "ein Hund rennt"},
             {"image_id": "42_0", "src_lang": "en", "trg_lang": "fr", "caption_tokenized": "a dog runs",
              "translation_tokenized": "un chien court"},
             {"image_id": "42_1", "src_lang": "en", "trg_lang": "de", "caption_tokenized": "the dog",
              "translation_tokenized": "der Hund"}],
         "val2014/COCO_val2014_000000000042.jpg": None},
        [("caption de", "val2014/COCO_val2014_000000000042.jpg", ["ein Hund rennt", "der Hund"])],
        ["der Hund"],
        {"BLEU-1": 1},
        split="dev_de",
    ),
    Case(
        "xm3600",
        {"captions.jsonl": [{"image/key": "0001", "image/locale": "en", "en": {"caption": ["A view."]},
                             "fr": {"caption": ["Une vue.", "Vue"]}}],
         "images/0001.jpg": None},
        [("caption fr", "images/0001.jpg", ["Une vue.", "Vue"])],
        split="fr",
    ),
    Case(
        "screen2words",
        {"screen_summaries.csv": "screenId,summary\n54137,page displaying a login\n1,other\n54137,login page\n",
         "split/test_screens.txt": "54137\n", "combined/54137.jpg": None},
        [("caption en", "combined/54137.jpg", ["page displaying a login", "login page"])],
        ["login page"],
        {"BLEU-1": 1},
    ),
    Case(
        "widgetcap",
        {"widget_captions.csv": "screenId,nodeId,captions\n12,0.1,go back|back\n13,0,other\n", "split/test.txt": "12\n",
         "combined/12.jpg": None,
         "combined/12.json": {"activity": {"root": {"bounds": [0, 0, 1440, 2560], "children": [
             {}, {"bounds": [0, 1280, 1280, 2560]}]}}}},
        [("caption en", None, ["go back", "back"])],
        ["back"],
        {"BLEU-1": 1},
    ),
    Case(
        "scicap",
        {"List-of-Files-for-Each-Experiments/First-Sentence/No-Subfig/test/file_idx.json": ["1001-Figure1-1.png"],
         "SciCap-Caption-All/test/1001-Figure1-1.json": {
             "0-originally-extracted": "Figure 1: Loss.",
             "1-lowercase-and-token-and-remove-figure-index": {"caption": "loss ."}},
         "SciCap-No-Subfig-Img/test/1001-Figure1-1.png": None},
        [("caption en", "SciCap-No-Subfig-Img/test/1001-Figure1-1.png", ["loss ."])],
        ["loss"],
        {"BLEU-1": 1},
    ),
    Case(
        "refcoco-seg",
        {"refcoco+/refs(unc).json": [
            {"ref_id": 1, "ann_id": 70, "image_id": 7, "split": "val", "file_name": "COCO_train2014_000000000007_1.jpg",
             "sentences": [{"sent_id": 0, "sent": "left dog"}, {"sent_id": 1, "sent": "the dog"}]},
            {"ref_id": 2, "ann_id": 70, "image_id": 7, "split": "train", "sentences": [{"sent_id": 2, "sent": "it"}]}],
         "refcoco+/instances.json": INSTANCES, "train2014/COCO_train2014_000000000007.jpg": None},
        [("left dog", "train2014/COCO_train2014_000000000007.jpg", []),
         ("the dog", "train2014/COCO_train2014_000000000007.jpg", [])],
        # The whole picture, so the box is 200 of 800 pixels; and no answer at all.
        ["<loc0000><loc0000><loc1023><loc1023>" + "<seg000>" * 16, "dog"],
        {"valid": 0.5, "box accuracy at IoU .5": 0},
        split="refcoco+/val",
    ),
    Case(
        "refcoco-seg",
        {"finetune_refcocog_test.json": {
            "images": [{"id": 500, "file_name": "COCO_train2014_000000000007.jpg", "height": 20, "width": 40,
                        "original_id": 7, "caption": "a dog at rest", "dataset_name": "refcocog"}],
            "annotations": [{"id": 900, "image_id": 500, "bbox": [10, 5, 20, 10], "original_id": 70}]},
         "annotations/instances_train2014.json": INSTANCES, "train2014/COCO_train2014_000000000007.jpg": None},
        [("a dog at rest", "train2014/COCO_train2014_000000000007.jpg", [])],
        # y 5 to 15 of 20, x 10 to 30 of 40: the box itself, as near as 1,023 steps allow
        ["<loc0256><loc0256><loc0767><loc0767>" + "<seg000>" * 16],
        {"valid": 1, "box accuracy at IoU .5": 1, "box accuracy at IoU .75": 1},
        split="refcocog/test",
    ),
]  # fmt: skip


def write(folder: Path, files: dict[str, Any]) -> Path:
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix in (".jpg", ".jpeg", ".png", ".tif"):
            Image.new("RGB", (40, 20), "white").save(path)
        elif isinstance(content, str):
            path.write_text(content)
        elif path.suffix == ".jsonl" or path.name in ("test1.json",) or path.name.startswith("coco_pope"):
            path.write_text("".join(json.dumps(row) + "\n" for row in content))
        else:
            path.write_text(json.dumps(content))
    return folder


class Says:
    """A model of a published size (or, with None, another one) that opens its pictures and says what it is told to."""

    def __init__(self, texts: list[str], side: int = 224, size: str | None = "paligemma-3b"):
        self.texts, self.calls = iter(texts), []
        self.processor = SimpleNamespace(image_size=side)
        config = published_config(size, side) if size is not None else tiny_config("gemma")
        self.model = SimpleNamespace(config=config, state_dict=dict)
        self.codec = MaskCodec(
            num_codes=128, embedding_dim=8, encoder_widths=(2, 2, 2, 2), decoder_widths=(8, 8, 4, 4, 4)
        )

    def generate(self, images, prompts, max_new_tokens, **options):
        self.calls.append({"max_new_tokens": max_new_tokens, **options})
        for image in images:
            for one in image if isinstance(image, tuple) else (image,):
                load_image(one)
        return [Answer(next(self.texts), [], [], 0.5, True, [], [], []) for _ in prompts]


def measured(case: Case, folder: Path, pg: Says | None = None, **options: Any):
    pg = pg or Says(case.says)
    return evaluate_benchmark(pg, case.task, write(folder, case.files), case.split, progress=False, **options)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_prompts_pictures_and_answers(case: Case, tmp_path: Path):
    rows = list(benchmark_examples(case.task, write(tmp_path, case.files), case.split))
    assert [(row.prompt, list(row.answers)) for row in rows] == [(prompt, answers) for prompt, _, answers in case.rows]
    assert len({row.id for row in rows}) == len(rows) and all(row.task == case.task for row in rows)
    for row, (_, pictures, _) in zip(rows, case.rows):
        if pictures is not None:
            found = row.image if isinstance(row.image, tuple) else (row.image,)
            expected = pictures if isinstance(pictures, tuple) else (pictures,)
            assert found == tuple(str(tmp_path / name) for name in expected)


@pytest.mark.parametrize("case", [case for case in CASES if case.says], ids=str)
def test_figures(case: Case, tmp_path: Path):
    pg = Says(case.says)
    report = measured(case, tmp_path, pg)
    for name, value in case.figures.items():
        assert report[case.task, name].value == pytest.approx(value), name
    # Decoding is that of the transfer: freely, within its budget, with its beams.
    benchmark = BENCHMARKS[case.task]
    search = {"num_beams": benchmark.beams, "length_penalty": 0.0} if benchmark.beams > 1 else {}
    for call in pg.calls:
        assert call["max_new_tokens"] == benchmark.max_new_tokens and call["constrained"] is False
        assert {key: call[key] for key in ("num_beams", "length_penalty") if key in call} == search
    hidden = (case.split or benchmark.splits[0]) in benchmark.hidden
    assert bool(report.figures) != hidden, "where answers are on a server there is no figure"
    assert report.counts[case.task].rows == len(case.rows)


def test_every_benchmark_has_a_case_and_names_its_source():
    assert {case.task for case in CASES} == set(BENCHMARKS)
    for name, benchmark in BENCHMARKS.items():
        assert benchmark.source.endswith(".py") and benchmark.read.__doc__, name
        assert set(benchmark.hidden) | set(benchmark.published) <= set(benchmark.splits), name
        assert not set(benchmark.hidden) & set(benchmark.published), name


def test_the_page_lists_them_all():
    page = (Path(__file__).parents[2] / "docs/measuring.md").read_text(encoding="utf-8")
    listed = {row[1].strip(): row for row in (line.split("|") for line in page.splitlines()) if len(row) == 8}
    for name, benchmark in BENCHMARKS.items():
        _, _, _, budget, _, splits, source, _ = listed[name]
        assert budget.strip() == f"{benchmark.max_new_tokens}" + f", {benchmark.beams}" * (benchmark.beams > 1)
        assert source.strip() == f"`{benchmark.source}`"
        first = benchmark.splits[: 3 if "..." in splits else None]
        stars = [split + "*" * (split in benchmark.hidden) for split in first]
        assert splits.strip().removesuffix(", ...").split(", ") == stars


def test_published_figures_are_named_as_ours(tmp_path: Path):
    """Each stands beside a figure that the measure makes, and is a fraction (CIDEr: of ten)."""
    for number, case in enumerate(CASES):
        benchmark = BENCHMARKS[case.task]
        if not case.says:
            continue
        names = {figure.name for figure in measured(case, tmp_path / str(number)).figures}
        for figures in benchmark.published.values():
            for by_name in figures.values():
                if case.split not in benchmark.hidden:
                    assert set(by_name) <= names, case.task
                assert all(0 < value < (3 if name == "CIDEr-D" else 1) for name, value in by_name.items())


def test_published_figures_stand_beside_ours_where_model_resolution_and_split_agree(tmp_path: Path):
    case = next(case for case in CASES if case.task == "textvqa")
    two, large = "paligemma2-3b", "paligemma2-28b"
    for side, size, expected in ((224, two, 0.596), (448, large, 0.762), (896, two, None), (224, None, None)):
        folder = tmp_path / f"{side}-{size}"
        figure = measured(case, folder, Says(case.says, side, size))["textvqa", "VQA accuracy"]
        assert figure.published == expected
    report = measured(next(case for case in CASES if case.task == "gqa"), tmp_path / "gqa")
    console = Console(width=140, record=True, file=open(tmp_path / "table.txt", "w"))  # noqa: SIM115
    console.print(report.table())
    text = console.export_text()
    assert "published" in text and "0.656" in text and "target" not in text


def test_a_run_goes_on_and_invalid_answers_count(tmp_path: Path):
    """The runner's: predictions by row, and nothing dropped."""
    case = next(case for case in CASES if case.task == "pope")
    report = measured(case, tmp_path / "data", out_folder=tmp_path / "run")
    lines = [json.loads(line) for line in (tmp_path / "run/predictions.jsonl").read_text().splitlines()]
    assert [line["text"] for line in lines] == case.says and lines[4]["id"] == "adversarial-0"
    assert report["pope", "accuracy"].rows == 6
    again = measured(case, tmp_path / "data", Says([]), out_folder=tmp_path / "run")
    assert [figure.value for figure in again.figures] == [figure.value for figure in report.figures]
    for name in case.files:
        if name.endswith((".jpg", ".png")):
            Image.new("RGB", (9, 9), "blue").save(tmp_path / "data" / name)
    with pytest.raises(ValueError, match="saw another picture there than here"):
        evaluate_benchmark(Says([]), case.task, tmp_path / "data", case.split, out_folder=tmp_path / "run")
    first = measured(case, tmp_path / "data", count=2)
    assert first["pope", "accuracy"].rows == 2


# --- single steps ---------------------------------------------------------------------------------


def test_pictures_that_lie_on_their_side_are_turned(tmp_path: Path):
    case = next(case for case in CASES if case.task == "textvqa")
    write(tmp_path, case.files)
    noise = np.random.default_rng(0).integers(0, 256, (20, 40, 3), np.uint8)
    Image.fromarray(noise).save(tmp_path / "train_images/003a8ae2.jpg", quality=100)
    stored = load_image(tmp_path / "train_images/003a8ae2.jpg")
    (tmp_path / "train_images/rotation.csv").write_text("ImageID,Subset,Rotation\n003a8ae2,train,90.0\nx,train,\n")
    (row,) = benchmark_examples("textvqa", tmp_path)
    assert np.array_equal(np.asarray(row.image), np.rot90(np.asarray(stored))), "counter-clockwise"


def test_letters_take_the_place_of_labels_in_diagrams(tmp_path: Path):
    case = next(case for case in CASES if case.task == "ai2d")
    files = json.loads(json.dumps(case.files))
    files["questions/10.png.json"]["questions"]["What is A?"]["abcLabel"] = True
    files["annotations/10.png.json"] = {"text": {"T0": {"rectangle": [[10, 4], [30, 16]], "replacementText": "B"}}}
    write(tmp_path, files)
    Image.new("RGB", (40, 20), "red").save(tmp_path / "images/10.png")
    (row,) = benchmark_examples("ai2d", tmp_path)
    pixels = np.asarray(row.image)
    inside, outside = pixels[4:17, 10:31], pixels.copy()
    outside[4:17, 10:31] = (255, 0, 0)
    assert (outside == (255, 0, 0)).all()
    assert (inside == 255).all(-1).any() and inside.min() < 80, "a dark letter on white"


def test_widgets_are_marked_in_the_square_that_the_model_sees(tmp_path: Path):
    case = next(case for case in CASES if case.task == "widgetcap")
    (row,) = benchmark_examples("widgetcap", write(tmp_path, case.files), side=112)
    pixels = np.asarray(row.image)
    assert pixels.shape == (112, 112, 3)
    # A picture 20 pixels high shows a screen of 2,560: the box is x 0 to 10 of 40, y 10 to 20 of 20.
    red = (pixels == (255, 0, 0)).all(-1)
    rows, columns = np.flatnonzero(red.any(1)), np.flatnonzero(red.any(0))
    assert (rows[0], rows[-1], columns[0], columns[-1]) == (55, 111, 0, 27)
    assert red.sum() == 2 * (57 + 28) - 4, "one pixel wide"


def test_masks_are_cocos():
    mask = mask_of(SQUARE, 40, 20)
    assert mask.shape == (20, 40) and mask[5:15, 10:30].all() and mask.sum() == 200
    runs = {"size": [4, 3], "counts": [5, 2, 5]}  # column by column
    assert np.flatnonzero(mask_of(runs, 3, 4).T).tolist() == [5, 6]
    assert np.array_equal(mask_of({"size": [4, 3], "counts": b"525"}, 3, 4), mask_of(runs, 3, 4))


def test_refcocos_regions_are_pixels(tmp_path: Path):
    case = CASES[-1]
    (row,) = benchmark_examples(case.task, write(tmp_path, case.files), case.split)
    (region,) = row.regions
    assert region.box == (10, 5, 30, 15) and region.mask.shape == (20, 40) and region.mask.sum() == 200


def test_small_measures():
    assert agreement("red ", ["red"] * 5 + ["blue"]) == 1 and agreement("red", ["red", "blue"]) == pytest.approx(1 / 3)
    assert letter("The answer is B. Since") == "b" and letter("B") is None and letter("So the answer is B.") is None
    assert same_number("Twelve", ["12"]) == 1 and same_number("12", ["12"]) == 1 and same_number("a dozen", ["12"]) == 0
    assert same_number("none", ["0"]) == 1


def test_what_is_missing_or_is_no_data_set_is_named(tmp_path: Path):
    with pytest.raises(ValueError, match="there is no benchmark 'mmlu'; there are: vqav2, okvqa"):
        next(benchmark_examples("mmlu", tmp_path))
    with pytest.raises(ValueError, match="gqa has no split 'dev'; it has testdev_balanced"):
        next(benchmark_examples("gqa", tmp_path, "dev"))
    with pytest.raises(FileNotFoundError, match="no such folder; expected one with the published files of gqa"):
        next(benchmark_examples("gqa", tmp_path / "nowhere"))
    with pytest.raises(FileNotFoundError, match=r"has no testdev_balanced_questions.json"):
        next(benchmark_examples("gqa", tmp_path))
    write(tmp_path, {"testdev_balanced_questions.json": {"1": {"question": "?"}}})
    with pytest.raises(ValueError, match=r"is not gqa as it is published .*imageId"):
        list(benchmark_examples("gqa", tmp_path))
    (tmp_path / "testdev_balanced_questions.json").write_text("{")
    with pytest.raises(ValueError, match="is not JSON"):
        list(benchmark_examples("gqa", tmp_path))
    write(tmp_path, {"testdev_balanced_questions.json": {"1": {"question": "?", "imageId": "gone", "answer": "x"}}})
    with pytest.raises(FileNotFoundError, match=r"images.gone.jpg"):
        evaluate_benchmark(Says(["x"]), "gqa", tmp_path, progress=False)


def test_one_object_for_equal_paths(tmp_path: Path):
    """By which the runner's batches encode a picture once for all its questions."""
    first, second = benchmark_examples("vqav2", write(tmp_path, CASES[0].files))
    assert first.image is second.image


def test_parts_of_an_answer_come_in_all_orders_unless_there_are_too_many():
    assert sorted(map("".join, orders(list("abc")))) == ["abc", "acb", "bac", "bca", "cab", "cba"]
    assert list(orders(list("abcdefg"))) == [list("abcdefg")]
