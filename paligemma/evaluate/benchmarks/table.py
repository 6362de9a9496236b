"""Every published benchmark: its splits, metric, decoding, and the figures that were published for PaliGemma.

A figure depends on the prompt, the decoding and the metric. All three are therefore fixed, to those of the transfers in
https://github.com/google-research/big_vision (big_vision/configs/proj/paligemma/transfers).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

from paligemma.evaluate.benchmarks import captions, objects, questions
from paligemma.evaluate.benchmarks.files import Source
from paligemma.evaluate.benchmarks.metrics import (
    ACCURACY,
    AGREEMENT,
    CHART,
    LOWER_ACCURACY,
    LOWER_ANLS,
    POPE,
    REMOTE_SENSING,
    SCIENCE,
    TALLY,
    VQA_BY_TYPE,
)
from paligemma.evaluate.examples import Example
from paligemma.evaluate.metrics import CAPTION, VQA, Metric

# Published figures: split -> (model, side of its picture) -> name -> value, as fractions (CIDEr: of ten).
Published = Mapping[str, Mapping[tuple[str, int], Mapping[str, float]]]


@dataclass(frozen=True)
class Benchmark:
    """splits: the first is the default. source: the file in `transfers/`. max_new_tokens: `text_len` in that file.
    hidden: splits without published answers, which give predictions but no figures. metric: None for RefCOCO's, which
    needs the model's mask codec."""

    read: Callable[[Source], Iterator[Example]]
    splits: tuple[str, ...]
    metric: Metric | None
    source: str
    max_new_tokens: int
    beams: int = 1
    hidden: tuple[str, ...] = ()
    published: Published = field(default_factory=dict)


_P224, _P448, _P896 = (("paligemma-3b", side) for side in (224, 448, 896))


def _sizes(name: str, *values: float | None) -> dict[tuple[str, int], dict[str, float]]:
    """Figures of PaliGemma 3B at 224, 448 and 896 pixels, in percent."""
    sizes = (_P224, _P448, _P896)
    return {size: {name: value / 100} for size, value in zip(sizes, values) if value is not None}


def _pg2(name: str, *values: float) -> dict[tuple[str, int], dict[str, float]]:
    """Figures of PaliGemma 2 3B, 10B, 28B at 224 and then at 448 pixels, in percent."""
    models = [(f"paligemma2-{size}", side) for side in (224, 448) for size in ("3b", "10b", "28b")]
    return {model: {name: value / 100} for model, value in zip(models, values)}


# PaliGemma's figures: big_vision/configs/proj/paligemma/README.md, for the splits with published answers. (The others
# come from test servers.) PaliGemma 2's: arXiv 2412.03555, taken from notes and not checked against the paper again.
BENCHMARKS: dict[str, Benchmark] = {
    # questions with the answers of ten people
    "vqav2": Benchmark(
        questions.vqav2, ("val", "train", "test", "test-dev"), VQA_BY_TYPE, "vqav2.py", 32, hidden=("test", "test-dev")
    ),
    "okvqa": Benchmark(
        questions.okvqa, ("val", "train"), AGREEMENT, "okvqa.py", 32,
        published={"val": _sizes("accuracy", 63.54, 63.15)},
    ),
    "aokvqa-da": Benchmark(
        questions.aokvqa_da, ("val", "train", "test"), AGREEMENT, "aokvqa_da.py", 32, hidden=("test",)
    ),
    "vizwizvqa": Benchmark(
        questions.vizwizvqa, ("val", "train", "test"), AGREEMENT, "vizwizvqa.py", 48, hidden=("test",)
    ),
    "textvqa": Benchmark(
        questions.textvqa, ("val", "train", "test"), VQA, "textvqa.py", 32, hidden=("test",),
        published={"val": _pg2("VQA accuracy", 59.6, 64.0, 64.7, 75.2, 76.6, 76.2)},
    ),
    # questions with one right answer, or several spellings of it
    "aokvqa-mc": Benchmark(
        questions.aokvqa_mc, ("val", "train", "test"), ACCURACY, "aokvqa_mc.py", 128, hidden=("test",)
    ),
    "gqa": Benchmark(
        questions.gqa, ("testdev_balanced", "val_balanced", "train_balanced"), ACCURACY, "gqa.py", 32,
        published={"testdev_balanced": _sizes("accuracy", 65.61, 67.03)},
    ),
    # Case is ignored, as in NLVR2's own script: how the reference spells "True" was not published.
    "nlvr2": Benchmark(
        questions.nlvr2, ("test", "dev", "train"), LOWER_ACCURACY, "nlvr2.py", 64,
        published={"test": _sizes("accuracy", 90.02, 88.93) | _pg2("accuracy", 91.4, 93.9, 94.2, 91.6, 93.7, 94.1)},
    ),
    "tallyqa": Benchmark(
        questions.tallyqa, ("test", "train"), TALLY, "tallyqa.py", 32,
        published={"test": {
            _P224: {"accuracy, simple": 0.8172, "accuracy, complex": 0.6956},
            _P448: {"accuracy, simple": 0.8486, "accuracy, complex": 0.7227},
        }},
    ),
    # The prompt is the question without "answer en". For a model that was fine-tuned for VQA v2.
    "pope": Benchmark(
        questions.pope, ("test", "random", "popular", "adversarial"), POPE, "pope.py", 48,
        published={"test": {
            _P224: {"accuracy, random": 0.8780, "accuracy, popular": 0.8587, "accuracy, adversarial": 0.8427},
            _P448: {"accuracy, random": 0.8823, "accuracy, popular": 0.8677, "accuracy, adversarial": 0.8590},
        }},
    ),
    "ai2d": Benchmark(
        questions.ai2d, ("test", "train"), ACCURACY, "ai2d.py", 128,
        published={"test": _sizes("accuracy", 72.12, 73.28)},
    ),
    "scienceqa": Benchmark(
        questions.scienceqa, ("test", "val", "train"), SCIENCE, "science_qa.py", 512,
        published={"test": _sizes("accuracy", 95.39, 95.93)},
    ),
    "rsvqa-lr": Benchmark(
        questions.rsvqa_lr, ("test", "val", "train"), REMOTE_SENSING, "rsvqa_lr.py", 32,
        published={"test": _sizes("accuracy, mean of types", 92.65, 93.11)},
    ),
    "rsvqa-hr": Benchmark(
        questions.rsvqa_hr, ("test", "test_2", "val", "train"), REMOTE_SENSING, "rsvqa_hr.py", 32,
        published={
            "test": _sizes("accuracy, mean of types", 92.61, 92.79),
            "test_2": _sizes("accuracy, mean of types", 90.58, 90.54),
        },
    ),
    # text in pictures
    "docvqa": Benchmark(
        questions.docvqa, ("val", "train", "test"), LOWER_ANLS, "docvqa.py", 32, hidden=("test",),
        published={"val": _pg2("ANLS", 39.9, 43.9, 44.9, 73.6, 76.6, 76.1)},
    ),
    "infovqa": Benchmark(
        questions.infovqa, ("val", "train", "test"), LOWER_ANLS, "infovqa.py", 48, hidden=("test",)
    ),
    "stvqa": Benchmark(questions.stvqa, ("train", "test"), LOWER_ANLS, "stvqa.py", 48, hidden=("test",)),
    "ocrvqa": Benchmark(
        questions.ocrvqa, ("test", "val", "train"), ACCURACY, "ocrvqa.py", 32,
        published={"test": _sizes("accuracy", 73.24, 75.60, 75.90)},
    ),
    "chartqa": Benchmark(
        questions.chartqa, ("test", "val", "train"), CHART, "chartqa.py", 48,
        published={"test": _sizes("relaxed accuracy, mean of the two", 57.08, 71.36)},
    ),
    # captions
    "cococap": Benchmark(
        captions.cococap, ("val", "test", "restval", "train", "val2014", "val2017"), CAPTION, "cococap.py", 32, beams=2,
        published={
            "val": _sizes("CIDEr-D", 141.92, 144.60) | _pg2("CIDEr-D", 141.3, 143.7, 144.0, 143.4, 145.0, 145.2)
        },
    ),
    # for a model fine-tuned for COCO captions
    "nocaps": Benchmark(
        captions.nocaps, ("val",), CAPTION, "cococap.py", 32, beams=2,
        published={"val": _sizes("CIDEr-D", 121.72, 123.58)},
    ),
    "coco35l": Benchmark(
        captions.coco35l, ("dev_en", *(f"dev_{language}" for language in (
            "ar bn cs da de el es fa fi fil fr he hi hr hu id it ja ko mi nl no pl pt ro ru sv sw te th tr uk vi zh"
        ).split())), CAPTION, "coco35l.py", 32,
        published={"dev_en": _sizes("CIDEr-D", 139.2, 141.2)},
    ),
    # for a model fine-tuned for COCO-35L
    "xm3600": Benchmark(
        captions.xm3600, ("en", *(
            "ar bn cs da de el es fa fi fil fr he hi hr hu id it ja ko mi nl no pl pt quz ro ru sv sw te th tr uk vi zh"
        ).split()), CAPTION, "coco35l.py", 32,
        published={"en": _sizes("CIDEr-D", 78.1, 80.0)},
    ),
    # The reference trains on lower-case captions; CIDEr ignores case.
    "textcaps": Benchmark(
        captions.textcaps, ("val", "train", "test"), CAPTION, "textcaps.py", 32, beams=3, hidden=("test",),
        published={"val": _sizes("CIDEr-D", 127.48, 153.94)},
    ),
    "screen2words": Benchmark(
        captions.screen2words, ("test", "dev", "train"), CAPTION, "screen2words.py", 24,
        published={"test": _sizes("CIDEr-D", 117.57, 119.59)},
    ),
    "widgetcap": Benchmark(
        captions.widgetcap, ("test", "dev", "train"), CAPTION, "widgetcap.py", 32,
        published={"test": _sizes("CIDEr-D", 136.07, 148.36)},
    ),
    "scicap": Benchmark(
        captions.scicap, ("test", "val", "train"), CAPTION, "scicap.py", 96,
        published={"test": {
            _P224: {"CIDEr-D": 1.6225, "BLEU-4": 0.192},
            _P448: {"CIDEr-D": 1.8149, "BLEU-4": 0.211},
        }},
    ),
    # objects
    "refcoco-seg": Benchmark(
        objects.refcoco,
        ("refcoco/val", "refcoco/testA", "refcoco/testB", "refcoco+/val", "refcoco+/testA", "refcoco+/testB",
         "refcocog/val", "refcocog/test"),
        None, "refcoco_seg.py", 48,
        published={
            "refcoco/val": _sizes("mIoU", 73.40, 75.57, 76.94) | _pg2("mIoU", 73.4, 75.9, 75.0, 76.3, 78.2, 77.3),
            "refcoco+/val": _sizes("mIoU", 68.32, 69.76, 72.18),
            "refcocog/val": _sizes("mIoU", 67.65, 70.17, 72.22),
        },
    ),
}  # fmt: skip
