"""Every metric against the package or the script that defines it, on random cases. Those that are not installed are
skipped; `test_metrics.py` checks the same metrics without them.

    pip install jiwer anls pycocotools pycocoevalcap        # the last one tokenizes with Java

Agreed with jiwer 4.0.0, anls 0.0.2, pycocotools 2.0.11 and pycocoevalcap 1.2 (Java 17).
"""

import contextlib
import io
import math
import random
import re
import shutil
from collections import Counter

import numpy as np
import pytest
from test_metrics import CAPTIONS, OFFICIAL_TOKENS, REFERENCES, random_pictures, ratios_of_sums

from paligemma.answers.formats import rle_encode
from paligemma.evaluate.average_precision import COCO_FIGURES, average_precision, coco_metrics
from paligemma.evaluate.captions import bleu, cider_d, tokenize
from paligemma.evaluate.regions import box_iou, mask_iou
from paligemma.evaluate.text import anls, character_errors, exact_match, relaxed_match, word_errors
from paligemma.evaluate.vqa import ARTICLES, CONTRACTIONS, NUMBERS, PUNCTUATION, normalize, vqa_accuracy
from paligemma.evaluate.yes_no import pope_counts, reads_as_yes

WORDS = "a dog Dog red car's two don't dont 1,000 3.5 12% the, The. car-park no not yes; (left) none ten".split()


def sentence(rng: random.Random, longest: int = 8, words: list[str] = WORDS) -> str:
    return " ".join(rng.choice(words) for _ in range(rng.randint(0, longest)))


# --- text -----------------------------------------------------------------------------------------


def test_error_rates_are_jiwers():
    jiwer = pytest.importorskip("jiwer")
    rng = random.Random(0)
    for _ in range(200):
        right = [sentence(rng) or "x" for _ in range(rng.randint(1, 4))]
        texts = [sentence(rng) for _ in right]
        for ours, theirs in ((character_errors, jiwer.cer), (word_errors, jiwer.wer)):
            edits, lengths = zip(*map(ours, texts, right))
            assert sum(edits) / sum(lengths) == pytest.approx(theirs(right, texts), abs=1e-12)


def test_anls_is_that_of_the_package():
    package = pytest.importorskip("anls")
    rng = random.Random(1)
    partly = 0
    for _ in range(400):
        answers = [sentence(rng, 3) or "x" for _ in range(rng.randint(1, 3))]
        text = rng.choice([sentence(rng, 3), rng.choice(answers)[1:]])
        theirs = package.anls_score(text, answers)
        assert anls(text, answers) == pytest.approx(theirs, abs=1e-12)
        partly += 0 < theirs < 1
    assert partly > 100


def test_exact_match_and_relaxed_accuracy_by_big_visions_steps():
    """transfers/vqa.py ("acc_any") and transfers/chartqa.py, step by step."""

    def number(text: str) -> float | None:
        try:
            return float(text.rstrip("%")) / 100.0 if text.endswith("%") else float(text)
        except ValueError:
            return None

    rng = random.Random(2)
    values = [
        "0",
        "0.0",
        "10",
        "10.5",
        "9.4",
        "11%",
        "0.11",
        "100",
        "104",
        "106",
        "-5",
        "-5.2",
        "yes",
        "Yes",
        "1,000",
        "",
    ]
    seen = Counter()
    for _ in range(600):
        text, answers = rng.choice(values), [rng.choice(values) for _ in range(rng.randint(1, 4))]
        assert exact_match(text, answers) == min(1.0, float(sum(text == answer for answer in answers)))
        prediction, target = number(text), number(answers[0])
        if prediction is not None and target:
            expected = abs(prediction - target) / abs(target) <= 0.05
        else:
            expected = text == answers[0]
        assert relaxed_match(text, answers[0]) == expected
        seen[expected] += 1
    assert min(seen.values()) > 50


def test_vqa_accuracy_by_the_official_steps():
    """vqaEval.py: the order of its steps, written plainly, on random answers full of what they treat."""

    def official(text: str) -> str:
        out = text
        for mark in PUNCTUATION:
            if f"{mark} " in text or f" {mark}" in text or re.search(r"(\d)(,)(\d)", text):
                out = out.replace(mark, "")
            else:
                out = out.replace(mark, " ")
        out = re.compile(r"(?!<=\d)(\.)(?!\d)").sub("", out, re.UNICODE)  # the flag where the count goes, as there
        words = []
        for word in out.lower().split():
            word = NUMBERS.get(word, word)
            if word not in ARTICLES:
                words.append(word)
        return " ".join(CONTRACTIONS.get(word, word) for word in words)

    rng = random.Random(3)
    changed = 0
    for _ in range(500):
        pool = [sentence(rng, 3) for _ in range(3)]
        given = [rng.choice(pool) for _ in range(10)]
        text = rng.choice([*pool, sentence(rng, 3)])
        assert normalize(text) == official(text)
        changed += normalize(text) != text
        said, answers = text.strip(), [answer.strip() for answer in given]
        if len(set(answers)) > 1:
            said, answers = official(said), list(map(official, answers))
        scores = []
        for k in range(10):
            others = answers[:k] + answers[k + 1 :]
            scores.append(min(1, float(sum(answer == said for answer in others)) / 3))
        assert vqa_accuracy(text, given) == pytest.approx(sum(scores) / 10)
    assert changed > 200


def test_pope_by_the_steps_of_its_script():
    """evaluate.py of https://github.com/AoiDragon/POPE on random sentences."""
    rng = random.Random(4)
    words = ["yes", "Yes,", "no", "No,", "not", "No.", "a", "dog", "nothing", "NO", "is", "there."]
    for _ in range(200):
        texts = [sentence(rng, 5, words) for _ in range(rng.randint(1, 12))]
        labels = [rng.choice(["yes", "no"]) for _ in texts]
        read = []
        for text in texts:
            first = (text.split(".")[0] if text.find(".") != -1 else text).replace(",", "").split(" ")
            read.append("no" if "No" in first or "not" in first or "no" in first else "yes")
        assert ["yes" if reads_as_yes(text) else "no" for text in texts] == read
        cells = Counter(zip(read, labels))
        tp, fp, tn, fn = cells["yes", "yes"], cells["yes", "no"], cells["no", "no"], cells["no", "yes"]
        figures = ratios_of_sums(map(pope_counts, texts, labels))
        assert figures["accuracy"] == pytest.approx((tp + tn) / len(texts))
        if tp:
            precision, recall = tp / (tp + fp), tp / (tp + fn)
            assert figures["precision"] == pytest.approx(precision) and figures["recall"] == pytest.approx(recall)
            assert figures["F1"] == pytest.approx(2 * precision * recall / (precision + recall))


# --- captions -------------------------------------------------------------------------------------


def random_corpus(rng: random.Random) -> tuple[list[str], list[list[str]]]:
    words = "a dog cat red car two on the table runs bike with man's hat".split()
    references = [[sentence(rng, 9, words) or "a" for _ in range(rng.randint(1, 5))] for _ in range(rng.randint(1, 6))]
    captions = [
        " ".join(word if rng.random() < 0.7 else rng.choice(words) for word in rng.choice(group).split())
        for group in references
    ]
    return captions, references


def test_bleu_and_cider_are_those_of_pycocoevalcap():
    """Its scorers, on texts that are tokenized already."""
    bleu_module = pytest.importorskip("pycocoevalcap.bleu.bleu")
    cider_module = pytest.importorskip("pycocoevalcap.cider.cider")
    rng = random.Random(5)
    for _ in range(200):
        captions, references = random_corpus(rng)
        texts = {k: [" ".join(tokenize(caption))] for k, caption in enumerate(captions)}
        right = {k: [" ".join(tokenize(r)) for r in group] for k, group in enumerate(references)}
        with contextlib.redirect_stdout(io.StringIO()):
            theirs, _ = bleu_module.Bleu(4).compute_score(right, texts)
        corpus, each = cider_module.Cider().compute_score(right, texts)
        assert bleu(captions, references) == pytest.approx(theirs, abs=1e-12)
        ours, ours_each = cider_d(captions, references)
        assert ours == pytest.approx(corpus, abs=1e-9) and ours_each == pytest.approx(list(each), abs=1e-9)


@pytest.mark.skipif(shutil.which("java") is None, reason="Stanford's tokenizer runs in Java")
def test_tokens_are_those_of_stanfords_tokenizer():
    """On random words with clitics, numbers and marks, and on the sentences whose tokens `test_metrics` writes down."""
    module = pytest.importorskip("pycocoevalcap.tokenizer.ptbtokenizer")
    rng = random.Random(6)
    words = [
        *WORDS,
        "it's",
        "they're",
        "can't",
        "cannot",
        "U.S.",
        "10:30",
        "1/2",
        "$5",
        "t-shirt",
        "w/",
        "St.",
        "&",
        "-",
        "...",
    ]
    sentences = [sentence(rng, 12, words) or "a" for _ in range(300)]
    captions = [*sentences, *OFFICIAL_TOKENS, *CAPTIONS, *(r for group in REFERENCES for r in group)]
    given = {k: [{"caption": caption}] for k, caption in enumerate(captions)}
    theirs = module.PTBTokenizer().tokenize(given)
    different = [caption for k, caption in enumerate(captions) if tokenize(caption) != theirs[k][0].split()]
    assert different == []


# --- boxes and masks ------------------------------------------------------------------------------


def test_ious_are_pycocotools():
    mask_module = pytest.importorskip("pycocotools.mask")
    rng = np.random.default_rng(7)
    for _ in range(200):
        corners = rng.uniform(0, 50, (7, 2, 2))
        boxes = np.concatenate([corners.min(1), corners.max(1)], 1)  # x0, y0, x1, y1
        sides = np.concatenate([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], 1)
        theirs = mask_module.iou(sides[:4], sides[4:], [0] * 3)
        assert np.allclose(box_iou(boxes[:4], boxes[4:]), theirs, atol=1e-12)
        masks = rng.random((2, 12, 9)) < rng.random()
        packed = [mask_module.encode(np.asfortranarray(mask.astype(np.uint8))) for mask in masks]
        assert mask_iou(*masks) == pytest.approx(float(mask_module.iou(packed[:1], packed[1:], [0])[0, 0]))


@pytest.mark.parametrize("masks", [False, True])
def test_coco_figures_are_pycocotools(masks: bool):
    """All twelve, on 200 data sets of one to five pictures; and our own AP at IoU .5 without any package."""
    coco = pytest.importorskip("pycocotools.coco")
    evaluation = pytest.importorskip("pycocotools.cocoeval")
    coding = pytest.importorskip("pycocotools.mask")
    rng = random.Random(8)
    compared = 0
    while compared < 200:
        rows = random_pictures(rng, rng.randint(1, 5), masks)
        labels = sorted({region.label for truth, _ in rows for region in truth})
        ids = {label: k for k, label in enumerate(labels, 1)}
        truth, results = [], []
        for image_id, (there, found) in enumerate(rows, 1):
            for region, out in [*((r, truth) for r in there), *((r, results) for r in found)]:
                if region.label not in ids:
                    continue
                x0, y0, x1, y1 = region.box
                entry = {"image_id": image_id, "category_id": ids[region.label]}
                if masks:  # without a box, as COCO's result files have them: an object's size is that of its mask
                    entry["segmentation"] = coding.frPyObjects(rle_encode(region.mask), 160, 200)
                else:
                    entry["bbox"] = [x0, y0, x1 - x0, y1 - y0]
                area = int(region.mask.sum()) if masks else (x1 - x0) * (y1 - y0)
                out.append(
                    {**entry, "id": len(out) + 1, "area": area, "iscrowd": 0}
                    if out is truth
                    else {**entry, "score": region.score}
                )
        if not truth or not results:
            continue
        data = coco.COCO.__new__(coco.COCO)
        with contextlib.redirect_stdout(io.StringIO()):
            data.__init__()
            data.dataset = {
                "images": [{"id": k + 1, "height": 160, "width": 200} for k in range(len(rows))],
                "annotations": truth,
                "categories": [{"id": number, "name": label} for label, number in ids.items()],
                "info": {},
            }
            data.createIndex()
            scored = evaluation.COCOeval(data, data.loadRes(results), "segm" if masks else "bbox")
            scored.evaluate()
            scored.accumulate()
            scored.summarize()
        ours = coco_metrics(rows, masks)
        assert list(ours.values()) == pytest.approx(list(scored.stats), abs=1e-9), dict(zip(COCO_FIGURES, scored.stats))
        if not masks:
            assert average_precision(rows) == pytest.approx(scored.stats[1], abs=1e-9)
            assert not math.isnan(average_precision(rows))
        compared += 1
