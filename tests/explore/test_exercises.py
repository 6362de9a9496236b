"""Every exercise of the course has one right answer, which the model gives; a wrong one is told what is wrong with it.

The truths are found here once more, each in another way than `cli/exercises.py` finds it.
"""

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from paligemma import explore
from paligemma.cli import exercises, main
from paligemma.tiny import course

TABLE = "language_model.model.embed_tokens.weight"
WORDS = {7: ["bos", "caption", "en", "newline"], 9: [*exercises.ROUTES], 11: ["y0", "x0", "y1", "x1"]}
PARAMETERS = ["lm_head.weight", "language_model.model.norm.weight", "multi_modal_projector.linear.weight", "weight"]
OFFICIAL = (1024, 588, 2304, 1028, 27)


def candidates(number: int, P: int) -> list:
    """What somebody might answer, the slips included. P: patches of the picture."""
    if number in WORDS:
        return WORDS[number]
    if number == 8:
        return [TABLE, *PARAMETERS]
    if number == 12:
        return [OFFICIAL, (1024, 588, 2304, 1028, 26), (256, 588, 2304, 260, 27), (1024, 196, 2304, 1028, 27)]
    if number == 5:
        near = (P + 4) ** 2 + 2 * (P + 5)
        return [*range(near - 10, near + 11), P * P, (P + 4) ** 2, (P + 6) ** 2, (P + 6) * (P + 7) // 2]
    return [*range(-2, P + 3)]


def accepted(tiny, number) -> list:
    truth = exercises.EXERCISES[number].solve(tiny)
    right = []
    for candidate in candidates(number, tiny.processor.num_image_tokens):
        is_right, why = exercises.judge(truth, candidate)
        assert why.startswith("right: " if is_right else "wrong: ") and "\n" not in why and len(why) < 300
        right += [candidate] * is_right
    return right


def test_there_is_an_exercise_for_every_chapter():
    assert list(exercises.EXERCISES) == list(range(1, 13))


def test_exercises_about_shapes_and_tables_accept_the_truth_alone(tiny):
    P, (row, column) = tiny.processor.num_image_tokens, exercises.PIXEL
    g = round(P**0.5)
    assert accepted(tiny, 1) == [row * g // course.SIZE * g + column * g // course.SIZE]
    positions = tiny.model.vision_tower.vision_model.embeddings.position_embedding.weight
    alike = torch.cosine_similarity(positions[27][None], positions).detach()
    assert accepted(tiny, 2) == [int(alike.argsort()[-2])]
    assert accepted(tiny, 5) == [sum(P + 4 for _ in range(P + 4)) + (P + 5) + (P + 6)]
    assert accepted(tiny, 8) == [TABLE]
    assert accepted(tiny, 12) == [OFFICIAL]


@pytest.mark.slow
def test_exercises_about_what_the_model_does_accept_the_truth_alone(tiny):
    scene = course.scene()
    look = explore.look(tiny, scene.image, "caption en")
    assert accepted(tiny, 3) == [3]
    state = tiny.model.language_model.model.norm(look.hidden_states[-1][: look.first_text])
    words, decode = tiny.model.logits(state).argmax(-1).tolist(), tiny.processor.tokenizer.decode
    assert accepted(tiny, 4) == [sum(decode([word]).strip() == "umbrella" for word in words)]
    token = look.answer.replace(",", " ,").split().index("book")
    on_book = [
        sum(
            float(explore.attention(look).of(token)[4, head, patch])
            for patch in course.patches(scene, "book", look.grid)
        )
        for head in range(tiny.model.config.text_config.num_attention_heads)
    ]
    assert accepted(tiny, 6) == [int(np.argmin(on_book))]
    assert accepted(tiny, 7) == ["caption"]
    assert accepted(tiny, 9) == ["image->prompt"]
    (found,) = accepted(tiny, 10)
    assert found in course.patches(scene, "umbrella", look.grid)
    (house,) = tiny.detect(scene.image, ["house"])
    assert accepted(tiny, 11) == [["x0", "y0", "x1", "y1"][int(house.edges[:, 1].argmax())]]


def test_a_parameter_may_be_called_by_the_end_of_its_name():
    assert exercises.ends_of("a.b.weight") == {"a.b.weight", "b.weight", "a.b", "b"}


@pytest.mark.parametrize(
    "number, answer",
    [(0, "1"), (13, "1"), (1, ""), (1, "abc"), (1, "1.5"), (7, "image"), (8, "a b"), (9, "prompt->last"), (12, "1 2")],
)
def test_what_cannot_be_an_answer_is_an_error_that_says_what_can(number, answer):
    with pytest.raises(ValueError, match=r"there is no exercise|expected"):
        exercises.read(number, answer)


@pytest.mark.parametrize("answer", ["caption", " caption ", "'caption'", '"caption"'])
def test_quotes_and_spaces_around_an_answer_do_not_matter(answer):
    assert exercises.read(7, answer) == "caption"


def test_the_command_says_right_or_wrong_and_why(tiny):
    S = tiny.processor.num_image_tokens + 6  # the row of exercise 5
    truth = str((S - 2) ** 2 + S - 1 + S)

    def run(*arguments):
        result = CliRunner().invoke(main.app, ["explore", *arguments])
        return result.exit_code, result.stdout

    code, text = run("--check", "5", truth)
    assert code == 0 and text.startswith(f"right: {S - 2} rows of the prefix")
    code, text = run("--check", "5", str(S * (S + 1) // 2))
    assert code == 1 and text.startswith("wrong: that is a causal mask")
    assert run("--check", "5", "-1")[0] == 1  # an answer, though a wrong one: not an option
    assert run("--check", "99", "1") == (2, "")
    assert run("--check", "5", "many") == (2, "")
    assert run("--check", "5", truth, "--json") == (2, "")
    for others in (["--quantize", "int8"], ["--coarse"], ["--max-mb", "2"], ["--max-pixels", "5"]):
        assert run("--check", "5", truth, *others) == (2, "")
    assert run("caption en", "--out", "look.html") == (2, "")
