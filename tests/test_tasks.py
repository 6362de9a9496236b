"""The first word of a prompt is its task, wherever the prompt is read."""

import pytest

from paligemma.evaluate.examples import Example
from paligemma.evaluate.runner import answer
from paligemma.inference import Answer
from paligemma.tasks import BOX_BUDGET, TEXT_BUDGET, asks_for_items, budget_of, task_of


@pytest.mark.parametrize(
    ("prompt", "task", "items"),
    [
        ("detect dog ; cat", "detect", True),
        ("  segment dog", "segment", True),
        ("detect", "detect", True),
        ("detection of dogs", "detection", False),
        ("caption en", "caption", False),
        ("Detect dog", "Detect", False),
        ("", "", False),
    ],
)
def test_the_first_word_is_the_task(prompt, task, items):
    assert task_of(prompt) == task and asks_for_items(prompt) is items
    assert budget_of(prompt) == (BOX_BUDGET if items else TEXT_BUDGET)


def test_an_evaluation_gives_masks_their_budget_and_codec_also_behind_a_space():
    asked = []

    class Pg:
        codec = "the codec"

        def generate(self, images, prompts, budget, **how):
            asked.append((budget, how["codec"]))
            return [Answer("", [], [], 0.5, True) for _ in images]

    for prompt in ("segment dog", " segment dog", "caption en"):
        answer(Pg(), [Example("1", "a.png", prompt, "segment")])
    assert asked == [(BOX_BUDGET, "the codec"), (BOX_BUDGET, "the codec"), (TEXT_BUDGET, None)]
