"""Counting by colour: the task with which fine-tuning is shown."""

import json
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from paligemma.tiny.color_counts import color_questions, color_scene, write_color_counts
from paligemma.tiny.recipe.tokenizer import build_tokenizer
from paligemma.tiny.rows import NUMBERS
from paligemma.tiny.world import has_held_out


def test_the_answer_counts_the_things_of_the_tint_asked_for():
    for seed in range(20):
        scene, row = color_scene(seed, "train", 64)
        color = row.prefix.removeprefix("answer en how many ").removesuffix(" things are there ?")
        tints = [thing.tint for thing in scene.objects]
        assert None not in tints and len(tints) in range(1, 6)
        assert row.suffix == NUMBERS[tints.count(color)]


def test_no_answer_is_a_good_guess():
    answers = Counter(color_scene(seed, "train", 64)[1].suffix for seed in range(200))
    assert set(answers) == set(NUMBERS[:6])
    assert max(answers.values()) < 0.3 * 200


def test_no_more_of_a_color_than_wanted_among_as_many_things():
    scenes = [color_scene(seed, "train", 64, most=3) for seed in range(80)]
    answers = Counter(row.suffix for _, row in scenes)
    assert set(answers) == set(NUMBERS[:4]) and max(answers.values()) < 0.4 * 80
    assert {len(scene.objects) for scene, _ in scenes} == {1, 2, 3, 4, 5}
    for most in (0, 6):
        with pytest.raises(ValueError, match=f"most must be 1 to 5, got {most}"):
            color_scene(0, most=most)


def test_things_apart_hide_no_part_of_one_another():
    hidden = 0
    for seed in range(25):
        usual, question = color_scene(seed, "train", 64, most=3)
        scene, same = color_scene(seed, "train", 64, most=3, apart=True)
        assert (same.prefix, same.suffix) == (question.prefix, question.suffix)
        assert all(thing.visible == 1 for thing in scene.objects)
        hidden += sum(thing.visible < 1 for thing in usual.objects)
    assert hidden > 5, "in the usual scenes of the same seeds"


@pytest.mark.parametrize("questions", [2, 6])
def test_several_questions_are_about_as_many_colors(questions):
    answers = Counter()
    for seed in range(30):
        scene, rows = color_questions(seed, "train", 64, questions)
        tints = [thing.tint for thing in scene.objects]
        assert len({row.prefix for row in rows}) == questions and len(tints) in range(1, 6)
        for row in rows:
            color = row.prefix.removeprefix("answer en how many ").removesuffix(" things are there ?")
            assert row.suffix == NUMBERS[tints.count(color)]
        answers[rows[0].suffix] += 1
    assert set(answers) == set(NUMBERS[:6]) and max(answers.values()) < 0.4 * 30, "the first is balanced as ever"


def test_questions_that_cannot_be_asked_are_refused():
    for questions in (0, 7):
        with pytest.raises(ValueError, match=f"1 to 6, got {questions}"):
            color_questions(0, questions=questions)


@pytest.mark.parametrize("split, held_out", [("train", False), ("test", False), ("heldout", True)])
def test_splits_show_what_they_may(split, held_out):
    for seed in range(15):
        scene, _ = color_scene(seed, split, 64)
        assert has_held_out([(thing.label, thing.tint) for thing in scene.objects]) == held_out


def test_all_words_are_known():
    tokenizer = build_tokenizer()
    _, row = color_scene(3)
    assert len(tokenizer.encode(row.prefix)) == len(row.prefix.split())


def test_the_questions_about_a_picture_follow_one_another(tmp_path):
    folder = write_color_counts(2, tmp_path / "color", size=64, questions=3, progress=False)
    lines = [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()]
    assert [line["image"] for line in lines] == ["images/train_000000.png"] * 3 + ["images/train_000001.png"] * 3
    assert [line["prefix"] for line in lines[:3]] == [row.prefix for row in color_questions(0, questions=3)[1]]


def test_rows_and_pictures_are_written(tmp_path):
    folder = write_color_counts(3, tmp_path / "new" / "color", "test", size=64, seed=7, progress=False)
    lines = [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()]
    scene, row = color_scene(7, "test", 64)
    assert lines[0] == {"image": "images/test_000007.png", "prefix": row.prefix, "suffix": row.suffix}
    assert np.array_equal(np.asarray(Image.open(folder / lines[0]["image"])), scene.image)
    assert len(lines) == 3
    with pytest.raises(FileExistsError, match="not an empty folder"):
        write_color_counts(1, folder, progress=False)
    with pytest.raises(ValueError, match="at least 1"):
        write_color_counts(0, tmp_path / "none", progress=False)
