"""The model that ships, end to end: what it answers to scenes it never saw, here and in transformers."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

import paligemma
from paligemma.answers.mask_codec import crop
from paligemma.tiny.varied import render_in_world
from paligemma.tiny.world import SHIPPED
from paligemma.weights.finding import TINY

ANSWERS = json.loads(Path(__file__).with_name("tiny_answers.json").read_text(encoding="utf-8"))
SIZE = 256  # of the scenes; as `tiny_examples` draws them


@pytest.fixture(scope="module")
def pg():
    return paligemma.load("tiny", device="cpu", dtype="float32")


def test_the_answers_are_of_many_scenes_and_tasks():
    assert len({row["seed"] for row in ANSWERS}) >= 30
    assert len({row["task"] for row in ANSWERS}) >= 12


@pytest.mark.parametrize("task", sorted({row["task"] for row in ANSWERS}))
def test_it_answers_as_it_did_when_it_was_released(pg, task):
    """Right answers, all of them: `make_tiny_answers.py` takes no other."""
    rows = [row for row in ANSWERS if row["task"] == task]
    images = [render_in_world(SHIPPED, row["seed"], "test", SIZE).image for row in rows]
    boxes = task.startswith(("detect", "segment"))
    answers = pg.generate(images, [row["prompt"] for row in rows], 200, constrained=boxes)
    assert [answer.text for answer in answers] == [row["answer"] for row in rows]


@pytest.mark.parametrize("num_beams", [1, 3])
def test_boxes_that_do_not_fit_into_the_budget_leave_the_answer_unfinished(pg, num_beams):
    """Three boxes take 20 tokens with eos. Two do not fit into 12, and nothing fits into 2."""
    scene = Path(__file__).parents[2] / "examples" / "scene.png"

    def answer(budget):
        prompt = "detect book ; umbrella ; house"
        return pg.generate(scene, prompt, max_new_tokens=budget, constrained=True, num_beams=num_beams)

    three = ["book", "umbrella", "house"]
    for budget, finished, labels in ((2, False, []), (12, False, three[:1]), (19, False, three[:2]), (20, True, three)):
        assert [item.label for item in answer(budget).detections] == labels
        assert answer(budget).finished == finished
    assert answer(2).score == 0.0
    labels = [item.label for item in pg.detect(scene, ["hat", "book green"], max_new_tokens=7)]
    assert labels == ["book green"] and pg.detect(scene, ["hat", "book green"], max_new_tokens=6) == []


def test_its_files_fit_into_25_megabytes():
    assert sum(file.stat().st_size for file in TINY.iterdir()) <= 25e6
    assert {"config.json", "model.safetensors", "tokenizer.json", "preprocessor_config.json"} <= {
        file.name for file in TINY.iterdir()
    }


def test_transformers_reads_the_same_files_and_gives_the_same_logits_and_words(pg):
    theirs = transformers.PaliGemmaForConditionalGeneration.from_pretrained(
        TINY, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    image = render_in_world(SHIPPED, ANSWERS[0]["seed"], "test", SIZE).image
    inputs = pg.processor(["caption en"], [image])
    with torch.no_grad():
        ours = pg.model(**inputs).logits
        reference = theirs(**inputs).logits
        written = theirs.generate(**inputs, max_new_tokens=40, do_sample=False)
    torch.testing.assert_close(ours, reference, atol=1e-4, rtol=0)
    assert pg.processor.decode(written[0, inputs["input_ids"].shape[1] :]) == pg.caption(image).text


def overlap(a, b) -> float:
    return (a & b).sum() / max((a | b).sum(), 1)


def test_its_codec_keeps_masks(pg):
    """IoU of what is decoded from an object's 16 codes with the object, on scenes it never saw."""
    crops = []
    for seed in range(20_000_000, 20_000_060):
        crops += [crop(thing.mask, thing.box) for thing in render_in_world(SHIPPED, seed, "test", SIZE).objects]
    masks = torch.from_numpy(np.stack(crops))
    with torch.no_grad():
        codes = pg.codec.encode(masks)
        decoded = pg.codec.decode(codes) > 0
        again = pg.codec.decode(pg.codec.encode(decoded.float())) > 0
    kept = np.mean([overlap(a, b) for a, b in zip(decoded.numpy(), masks.numpy() > 0.5)])
    stable = np.mean([overlap(a, b) for a, b in zip(again.numpy(), decoded.numpy())])
    assert kept >= 0.90
    assert stable >= 0.95
